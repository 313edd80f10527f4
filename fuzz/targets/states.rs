//! Whatever a peer says in whichever state of its connection, in whichever order, and whatever it does to its streams:
//! the server answers it or closes it with a code, serves others as before, and holds little for it.
//!
//! Input: a byte for the state, then steps of three bytes: what is done, which message it is about, how that is changed.
//! The network is in memory and the clock is paused: limits of time pass in milliseconds.
#![no_main]

#[allow(dead_code, reason = "shared with tests")]
#[path = "../../crates/udpack/tests/hostile/bare.rs"]
mod bare;
#[allow(dead_code, reason = "shared with tests")]
#[path = "../../crates/udpack/tests/hostile/states.rs"]
mod site;

use std::cell::RefCell;
use std::time::Duration;

use bare::{Bare, Stream, Value, event, map};
use libfuzzer_sys::{Corpus, fuzz_target};
use quinn::ConnectionError;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, timeout};
use udpack::wire::Decode;
use udpack::{CloseCode, CloseReason};
use udpack_fuzz::{held, peak};

use site::{Outcome, STATES, Site, State};

/// Steps of a script; more are not looked at.
const STEPS: usize = 24;
/// What one peer of so few steps may make the process hold, in bytes: both sides of a connection.
const AT_ONCE: usize = 16 << 20;
/// What may stay when all who came are gone: what was made once for the whole process.
const LEFT: usize = 1 << 20;
/// After so many peers it is looked at.
const PEERS: u32 = 64;
/// Longer than any session is kept without a connection.
const LONG: Duration = Duration::from_secs(200);
/// Longer than any limit that ends a peer that says nothing more.
const PATIENCE: Duration = Duration::from_secs(90);

fuzz_target!(|input: &[u8]| -> Corpus {
    let [state, script @ ..] = input else {
        return Corpus::Reject;
    };
    let state = STATES[usize::from(*state) % STATES.len()];
    WORLD.with_borrow_mut(|world| world.meet(state, script));
    Corpus::Keep
});

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

struct World {
    runtime: Runtime,
    site: Site,
    messages: Vec<Vec<u8>>,
    peers: u32,
    /// Held after the first so many peers.
    held: Option<usize>,
}

impl World {
    fn new() -> Self {
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let site = runtime.block_on(Site::new());
        let messages = site::messages();
        Self {
            runtime,
            site,
            messages: messages.into_iter().map(|(_, bytes)| bytes).collect(),
            peers: 0,
            held: None,
        }
    }

    fn meet(&mut self, state: State, script: &[u8]) {
        let before = held();
        self.runtime.block_on(async {
            let (bare, streams) = self.site.reach(state).await;
            let mut peer = Peer {
                bare,
                streams,
                passed: Vec::new(),
                others: &self.messages,
            };
            for step in script.as_chunks().0.iter().take(STEPS) {
                if !peer.does(*step).await {
                    break;
                }
            }
            peer.is_answered_or_closed(state.is_on_control()).await;
            peer.bare.conn.close(0_u32.into(), b"");
            self.site.serves().await;
        });
        let most = peak();
        assert!(
            most <= before + AT_ONCE,
            "{} bytes for one peer",
            most - before
        );
        self.peers += 1;
        if self.peers % PEERS == 0 {
            self.runtime.block_on(async { sleep(LONG).await });
            let now = held();
            let first = *self.held.get_or_insert(now);
            assert!(now <= first + LEFT, "{} bytes are left", now - first);
        }
    }
}

/// A peer of bare QUIC, with its streams; it speaks on the last.
struct Peer<'a> {
    bare: Bare,
    streams: Vec<Stream>,
    /// Streams that are not read any more; dropping them would do something to them.
    passed: Vec<Stream>,
    others: &'a [Vec<u8>],
}

impl Peer<'_> {
    /// Whether there is something left to do anything with.
    async fn does(&mut self, [what, which, how]: [u8; 3]) -> bool {
        let message = self.message(which, how);
        let Some(last) = self.streams.last_mut() else {
            return false;
        };
        match what % 16 {
            0..=6 => say(last, &message).await,
            // Cut anywhere: the rest may come with the next message, or never.
            7 => say(last, &message[..usize::from(how) % message.len()]).await,
            8 | 9 => {
                let opened = timeout(Duration::from_secs(1), self.bare.conn.open_bi()).await;
                let Ok(Ok((send, recv))) = opened else {
                    return false;
                };
                let mut stream = Stream::new(send, recv);
                if what % 16 == 8 {
                    let flag = |on: bool| Value::Raw(vec![if on { 0xc3 } else { 0xc2 }]);
                    let name = if how & 1 == 0 { "echo" } else { "back" };
                    let mut fields = vec![
                        ("id".into(), Value::Uint(u64::from(which % 8))),
                        ("name".into(), name.into()),
                    ];
                    if how & 2 != 0 {
                        fields.push(("resumable".into(), flag(how & 4 != 0)));
                    }
                    if how & 8 != 0 {
                        fields.push(("received".into(), Value::Uint(u64::from(how >> 4))));
                    }
                    say(&mut stream, &event("$open", Value::Map(fields))).await;
                }
                self.streams.push(stream);
            }
            10 => {
                let at = usize::from(which) % self.streams.len();
                self.streams[at..].rotate_left(1);
            }
            11 => drop(last.send.finish()),
            12 => drop(last.send.reset(u32::from(which).into())),
            13 => {
                drop(last.recv.stop(u32::from(which).into()));
                self.passed.extend(self.streams.pop());
            }
            14 => drop(self.bare.conn.send_datagram(message[4..].to_vec().into())),
            _ => sleep(Duration::from_millis(u64::from(which) * 20)).await,
        }
        true
    }

    /// One of the messages, perhaps with one bit of its body changed, or with another number for a channel.
    fn message(&self, which: u8, how: u8) -> Vec<u8> {
        if which >= 240 {
            let numbers = [0, 1, 2, 1 << 32, u64::MAX];
            let number = |at: u8| Value::Uint(numbers[usize::from(at) % numbers.len()]);
            let own = Value::Raw(vec![if how & 0x80 == 0 { 0xc2 } else { 0xc3 }]);
            return match which % 4 {
                0 => event(
                    "$ack",
                    map([
                        ("channel", number(how)),
                        ("own", own),
                        ("received", number(how / 5)),
                    ]),
                ),
                1 => event(
                    "$passed",
                    map([
                        ("channel", number(how)),
                        ("own", own),
                        ("mark", number(how / 5)),
                    ]),
                ),
                2 => event(
                    "$channels",
                    map([("open", Value::Array(vec![number(how), number(how / 5)]))]),
                ),
                _ => event(
                    "$resume",
                    map([
                        ("received", number(how)),
                        ("done", Value::Raw(vec![0xc2 + (how >> 7)])),
                    ]),
                ),
            };
        }
        let mut bytes = self.others[usize::from(which) % self.others.len()].clone();
        if how >= 128 {
            let at = 4 + usize::from(how - 128) % (bytes.len() - 4);
            bytes[at] ^= 1 << (which / 32);
        }
        bytes
    }

    /// Panics unless the connection answers, or is closed with a code that the document knows, in time.
    async fn is_answered_or_closed(&mut self, control: bool) {
        for stream in &mut self.streams {
            let close = async {
                while let Ok(message) = stream.message().await {
                    if message.event() == "$close" {
                        assert_allowed(CloseReason::decode(&message).expect("a sound $close").code);
                    }
                }
            };
            let _ = timeout(Duration::from_millis(200), close).await;
        }
        let answer = async {
            // Streams on which nothing was said are known to nobody, and take the credit all the same.
            let opened = timeout(Duration::from_secs(1), self.bare.conn.open_bi()).await;
            let (send, recv) = match opened {
                Ok(Ok(stream)) => stream,
                Ok(Err(_)) => return std::future::pending().await,
                Err(_) => return,
            };
            let mut probe = Stream::new(send, recv);
            say(&mut probe, &bare::open(9_000, "echo")).await;
            if site::until_answered(&mut probe).await != Outcome::Lives {
                // Closed, and the connection goes on or is about to end.
                std::future::pending::<()>().await;
            }
        };
        let closed = async {
            match self.bare.conn.closed().await {
                ConnectionError::ApplicationClosed(close) => {
                    assert_allowed(CloseCode::new(close.error_code.into_inner()));
                }
                other => panic!("closed without a code: {other}"),
            }
        };
        let end = async {
            tokio::select! {
                biased;
                () = closed => {}
                () = answer => {}
            }
        };
        let ended = timeout(PATIENCE, end).await;
        assert!(
            ended.is_ok(),
            "neither answered nor closed, control: {control}"
        );
    }
}

/// Says this, unless the server does not take it.
async fn say(stream: &mut Stream, bytes: &[u8]) {
    let _ = timeout(Duration::from_secs(1), stream.write(bytes)).await;
}

/// Codes that one side tells the other because of what that one did.
fn assert_allowed(code: CloseCode) {
    let known = CloseCode::ALL.contains(&code);
    let local = code.value() >= CloseCode::CONNECTION_LOST.value();
    assert!(
        known && !local && code != CloseCode::INTERNAL,
        "closed with {code:?}"
    );
}
