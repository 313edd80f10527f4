//! Takes a peer of bare QUIC to each state that a connection or a channel can be in, and lets it say anything there.
//!
//! Shared by the test of the table and the fuzz target. A network in memory, with a paused clock.

use std::time::Duration;

use udpack::testing::{self, Net};
use udpack::wire::{Decode, Message, Welcome};
use udpack::{Channel, CloseCode, CloseReason, Context, Fault, Items, Limits, Server};

use crate::bare::{self, Bare, Stream, Value, event, map, request};

/// Where a peer can be when it speaks: the stream it speaks on, and what was said before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The control stream, first.
    Greeting,
    /// The control stream behind `$welcome`, of a session that cannot be resumed.
    Admitted,
    /// The same of one that can, with a channel.
    Resumable,
    /// The control stream of a resumed session, before `$channels`.
    Listing,
    /// And behind it.
    Listed,
    /// A stream of the peer's, first.
    Opening,
    /// A channel.
    Plain,
    /// A channel with a request under way that takes items.
    Asked,
    /// A resumable channel.
    Kept,
    /// A resumable channel that has gone on over another connection.
    WentOn,
    /// A stream that the server opened for its own channel, once more: `$resume` is due.
    Answering,
}

impl State {
    /// Whether the peer speaks on the control stream.
    pub(crate) fn is_on_control(self) -> bool {
        use State::{Admitted, Greeting, Listed, Listing, Resumable};
        matches!(self, Greeting | Admitted | Resumable | Listing | Listed)
    }
}

pub(crate) const STATES: [State; 11] = [
    State::Greeting,
    State::Admitted,
    State::Resumable,
    State::Listing,
    State::Listed,
    State::Opening,
    State::Plain,
    State::Asked,
    State::Kept,
    State::WentOn,
    State::Answering,
];

/// A sound one of each message, of events that belong to nobody, and of an application's.
pub(crate) fn messages() -> Vec<(&'static str, Vec<u8>)> {
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

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The stream, or the connection where it is the control stream, answers.
    Lives,
    /// The server closed the channel.
    Channel(CloseCode),
    /// The server closed the connection.
    Socket(CloseCode),
    /// Its direction of the stream ended, or nothing comes any more.
    Over,
}

/// A server, and a client that behaves.
pub(crate) struct Site {
    net: Net,
    server: Server,
    good: Channel,
}

impl Site {
    pub(crate) async fn new() -> Self {
        let net = Net::new(0);
        let limits = Limits {
            auth_failures: 1_000_000,
            ..Limits::default()
        };
        let server = testing::server()
            .limits(limits)
            .channel("echo", |channel: Channel| async move {
                let echo = channel.on(
                    "echo",
                    |n: u64, _: Context| async move { Ok::<_, Fault>(n) },
                );
                let hold = echo.on("hold", |(): (), items: Items<Item>| async move {
                    std::future::pending::<()>().await;
                    drop(items);
                });
                hold.concurrency(4).run().await
            })
            // Opens a channel of its own to whoever opens this one.
            .channel("back", |channel: Channel| async move {
                let own = channel.socket().channel("own").resumable().open().await;
                let echo = own?.on(
                    "echo",
                    |n: u64, _: Context| async move { Ok::<_, Fault>(n) },
                );
                echo.run().await?;
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
            });
        let server = net.bind(server).await.expect("a free address");
        let socket = net.connect(testing::client(&server), &server).await;
        let good = socket.expect("let in").open("echo").await;
        let good = good.expect("a channel");
        Self { net, server, good }
    }

    /// Panics unless the server serves others.
    pub(crate) async fn serves(&self) {
        let answer = self.good.request::<_, u64>("echo", &7).await;
        assert_eq!(answer.expect("an answer"), 7);
    }

    async fn dial(&self) -> Bare {
        let endpoint = self.net.bare().expect("an address");
        let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
        let dialled = Bare::dial(&endpoint, self.server.local_addr(), config).await;
        dialled.expect("a sound handshake")
    }

    async fn enter(&self, resume: Option<Value>) -> (Bare, Stream, Welcome) {
        let bare = self.dial().await;
        let mut control = bare.stream().await;
        let mut fields = vec![
            ("v".into(), 1.into()),
            ("token".into(), "anyone".into()),
            ("agent".into(), "bare".into()),
        ];
        if let Some(resume) = resume {
            fields.push(("resume".into(), resume));
        }
        control.write(&event("$hello", Value::Map(fields))).await;
        let welcome = control.message().await.expect("admitted");
        let welcome = Welcome::decode(&welcome).expect("a sound $welcome");
        (bare, control, welcome)
    }

    /// Says these bytes in this state, and then asks whether anybody is there.
    pub(crate) async fn say(&self, state: State, bytes: &[u8]) -> Outcome {
        let (bare, streams) = self.reach(state).await;
        let outcome = {
            let mut streams = streams;
            let control = state.is_on_control();
            let mut stream = streams.pop().expect("one to speak on");
            stream.write(bytes).await;
            let answer = async {
                if control {
                    // Whoever is not let in is closed in time.
                    let mut probe = bare.channel(9_000, "echo").await;
                    tokio::select! {
                        outcome = until_answered(&mut probe) => outcome,
                        () = until_closed(&mut stream) => std::future::pending().await,
                    }
                } else {
                    until_answered(&mut stream).await
                }
            };
            let patience = Duration::from_secs(120);
            tokio::select! {
                biased;
                code = closed(&bare) => code,
                outcome = answer => match outcome {
                    Outcome::Over => over(&bare).await,
                    outcome => outcome,
                },
                () = tokio::time::sleep(patience) => Outcome::Over,
            }
        };
        bare.conn.close(0_u32.into(), b"");
        outcome
    }

    /// A peer in this state; it speaks on the last of its streams.
    pub(crate) async fn reach(&self, state: State) -> (Bare, Vec<Stream>) {
        let resumable = ("resumable", Value::Raw(vec![0xc3]));
        match state {
            State::Greeting => {
                let bare = self.dial().await;
                let control = bare.stream().await;
                (bare, vec![control])
            }
            State::Admitted => {
                let (bare, control, _) = self.enter(None).await;
                (bare, vec![control])
            }
            State::Opening => {
                let (bare, control, _) = self.enter(Some(map([]))).await;
                let stream = bare.stream().await;
                (bare, vec![control, stream])
            }
            State::Plain | State::Asked => {
                let (bare, control, _) = self.enter(None).await;
                let mut stream = bare.channel(1, "echo").await;
                if state == State::Asked {
                    stream.write(&request("hold", Value::Nil, 1.into())).await;
                }
                (bare, vec![control, stream])
            }
            State::Resumable | State::Kept => {
                let (bare, control, _) = self.enter(Some(map([]))).await;
                let mut stream = bare.stream().await;
                let fields = [("id", 1.into()), ("name", "echo".into()), resumable];
                stream.write(&event("$open", map(fields))).await;
                assert_eq!(until_answered(&mut stream).await, Outcome::Lives);
                match state {
                    State::Kept => (bare, vec![control, stream]),
                    _ => (bare, vec![stream, control]),
                }
            }
            State::Listing | State::Listed | State::WentOn | State::Answering => {
                let (before, _control, welcome) = self.enter(Some(map([]))).await;
                let mut first = before.stream().await;
                let name = if state == State::Answering {
                    "back"
                } else {
                    "echo"
                };
                let fields = [("id", 1.into()), ("name", name.into()), resumable.clone()];
                first.write(&event("$open", map(fields))).await;
                // Kept until the session has gone on: dropping it ends the channel.
                let mut own = None;
                if state == State::Answering {
                    let opened = before.conn.accept_bi().await;
                    own = Some(opened.expect("a channel of the server's"));
                } else {
                    assert_eq!(until_answered(&mut first).await, Outcome::Lives);
                }
                let grant = welcome.resume.expect("a grant");
                let ticket = map([
                    ("session", welcome.session.as_str().into()),
                    ("token", Value::Bin(grant.token.to_vec())),
                ]);
                let (bare, mut control, welcome) = self.enter(Some(ticket)).await;
                assert!(welcome.resumed);
                drop((first, own));
                if state == State::Listing {
                    return (bare, vec![control]);
                }
                let open = map([("open", Value::Array(vec![1.into()]))]);
                control.write(&event("$channels", open)).await;
                match state {
                    State::WentOn => {
                        let mut stream = bare.stream().await;
                        let received = ("received", 1.into());
                        let fields = [("id", 1.into()), ("name", name.into()), resumable, received];
                        stream.write(&event("$open", map(fields))).await;
                        let answer = stream.message().await.expect("a message");
                        assert_eq!(answer.event(), "$resume");
                        (bare, vec![control, stream])
                    }
                    State::Answering => {
                        let (send, recv) = bare.conn.accept_bi().await.expect("opened again");
                        let mut stream = Stream::new(send, recv);
                        let open = stream.message().await.expect("a message");
                        assert_eq!(open.event(), "$open");
                        (bare, vec![control, stream])
                    }
                    _ => (bare, vec![control]),
                }
            }
        }
    }
}

/// Any data of an item.
type Item = serde::de::IgnoredAny;

/// Asks on a channel and waits for the answer, or for the end.
pub(crate) async fn until_answered(stream: &mut Stream) -> Outcome {
    stream.write(&request("echo", 5.into(), 99.into())).await;
    loop {
        match stream.message().await {
            Ok(message) if message.id() == Some(99) => return Outcome::Lives,
            Ok(message) if message.event() == "$close" => return Outcome::Channel(code(&message)),
            Ok(_) => {}
            Err(_) => return Outcome::Over,
        }
    }
}

fn code(message: &Message) -> CloseCode {
    CloseReason::decode(message).expect("a sound $close").code
}

/// Reads what the server says, so that it is never held up.
async fn until_closed(stream: &mut Stream) {
    while stream.message().await.is_ok() {}
}

/// How the server closes the connection.
async fn closed(bare: &Bare) -> Outcome {
    match bare.conn.closed().await {
        quinn::ConnectionError::ApplicationClosed(close) => {
            Outcome::Socket(CloseCode::new(close.error_code.into_inner()))
        }
        _ => Outcome::Over,
    }
}

/// The stream is over, perhaps because the connection is about to be.
async fn over(bare: &Bare) -> Outcome {
    let soon = Duration::from_secs(10);
    let closed = tokio::time::timeout(soon, closed(bare)).await;
    closed.unwrap_or(Outcome::Over)
}
