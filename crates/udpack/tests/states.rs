//! Every message of the protocol in every state of a connection: what becomes of it is in one table.

#[allow(dead_code, reason = "this binary uses its own part")]
#[path = "hostile/bare.rs"]
mod bare;
#[path = "hostile/states.rs"]
mod site;

use bare::{Value, event, map, request};
use site::{Outcome, STATES, Site, State};
use udpack::CloseCode;

/// A sound one of each message, of events that belong to nobody, and of an application's.
fn messages() -> Vec<(&'static str, Vec<u8>)> {
    let flag = |on: bool| Value::Raw(vec![if on { 0xc3 } else { 0xc2 }]);
    let close = || map([("code", 0.into()), ("text", "".into())]);
    let channel = |more: (&str, Value)| map([("channel", 1.into()), ("own", flag(true)), more]);
    let fault = map([("code", "x".into()), ("message", "x".into())]);
    let hello = [
        ("v", 1.into()),
        ("token", "t".into()),
        ("agent", "a".into()),
    ];
    let limits = map([("frame", 65_536.into()), ("channels", 1.into())]);
    let welcome = [
        ("v", 1.into()),
        ("session", "0".repeat(32).as_str().into()),
        ("agent", "a".into()),
        ("limits", limits),
    ];
    let goaway = [
        ("code", 1.into()),
        ("text", "".into()),
        ("retry_after_ms", 0.into()),
        ("window_ms", 0.into()),
    ];
    let bare = [
        ("$hello", map(hello)),
        ("$welcome", map(welcome)),
        ("$refresh", map([("token", "anyone".into())])),
        ("$refreshed", map([])),
        ("$channels", map([("open", Value::Array(vec![]))])),
        ("$ack", channel(("received", 0.into()))),
        ("$passed", channel(("mark", 1.into()))),
        ("$goaway", map(goaway)),
        ("$open", map([("id", 2.into()), ("name", "echo".into())])),
        (
            "$resume",
            map([("received", 0.into()), ("done", flag(false))]),
        ),
        ("$gap", map([("room", "r".into()), ("lost", 1.into())])),
        ("$mark", 1.into()),
        ("$close", close()),
        ("$nonsense", Value::Nil),
        ("say", Value::Nil),
    ];
    let about = [
        ("$reply", Value::Nil),
        ("$fault", fault),
        ("$item", Value::Nil),
        ("$want", 1.into()),
        ("$cancel", Value::Nil),
        ("$push", Value::Nil),
        ("$end", Value::Nil),
        ("$credit", 1.into()),
    ];
    let bare = bare.map(|(name, data)| (name, event(name, data)));
    let about = about.map(|(name, data)| (name, request(name, data, 7.into())));
    bare.into_iter().chain(about).collect()
}

/// What the document says becomes of it.
fn expected(state: State, message: &str) -> Outcome {
    let order = CloseCode::PROTOCOL_ORDER;
    match (state, message) {
        (State::Greeting, "$hello") => Outcome::Lives,
        (State::Greeting, _) => Outcome::Socket(CloseCode::AUTH_REQUIRED),
        (State::Listing, "$channels") => Outcome::Lives,
        (State::Admitted | State::Resumable | State::Listed, "$ack" | "$passed" | "$refresh") => {
            Outcome::Lives
        }
        (state, "$close") if state.is_on_control() => Outcome::Socket(CloseCode::NORMAL),
        (state, _) if state.is_on_control() => Outcome::Socket(order),
        (State::Opening, "$open") | (State::Answering, "$resume") => Outcome::Lives,
        (State::Opening, _) => Outcome::Channel(order),
        (_, "$close") => Outcome::Over,
        (State::Answering, _) => Outcome::Channel(order),
        (_, "$nonsense") => Outcome::Channel(CloseCode::BAD_MESSAGE),
        (
            _,
            "$hello" | "$welcome" | "$refresh" | "$refreshed" | "$channels" | "$ack" | "$passed"
            | "$goaway" | "$open" | "$resume" | "$mark",
        ) => Outcome::Channel(order),
        _ => Outcome::Lives,
    }
}

#[tokio::test(start_paused = true)]
async fn each_message_has_its_places_and_no_other() {
    let site = Site::new().await;
    let mut wrong = Vec::new();
    for state in STATES {
        for (name, bytes) in messages() {
            let (found, expected) = (site.say(state, &bytes).await, expected(state, name));
            // What is open is finished before the connection is closed, and answers until then.
            let leaves = name == "$close" && state.is_on_control() && found == Outcome::Lives;
            if found != expected && !leaves {
                wrong.push(format!("{state:?}, {name}: {found:?}, not {expected:?}"));
            }
            site.serves().await;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
