//! Every message of the protocol in every state of a connection: what becomes of it is in one table.

#[allow(dead_code, reason = "this binary uses its own part")]
#[path = "hostile/bare.rs"]
mod bare;
#[path = "hostile/states.rs"]
mod site;

use site::{Outcome, STATES, Site, State, messages};
use udpack::CloseCode;

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
