//! Peers and handlers that take everything or give too much: the others do not notice, and memory is bounded.
//!
//! On a network in memory with a paused clock: what is waited for costs no time.

#[allow(dead_code, reason = "this binary uses its own part")]
#[path = "hostile/bare.rs"]
mod bare;
mod common;
#[path = "common/heap.rs"]
mod heap;

use std::sync::Arc;
use std::time::Duration;

use bare::{Bare, event};
use heap::{Mark, alone, dial};
use serde_bytes::ByteBuf;
use tokio::time::Instant;
use udpack::testing::{self, Net};
use udpack::wire::{Decode, Welcome};
use udpack::{
    Channel, ClientBuilder, CloseCode, Context, Fault, Limits, Reconnect, RequestError, SendError,
    Server, Socket,
};

/// What everybody together may hold at most over what the test began with.
const MOST: usize = 4 << 20;

/// A network, a server on it and a client that behaves, which must be answered all the time.
struct Site {
    net: Net,
    server: Server,
    good: Channel,
    heap: Mark,
}

impl Site {
    async fn new() -> Self {
        let net = Net::new(0);
        let limits = Limits {
            stream_window: 128 << 10,
            connection_window: 512 << 10,
            outbound_bytes: 64 << 10,
            replay_bytes: 64 << 10,
            ..Limits::default()
        };
        let server = testing::server()
            .limits(limits)
            .channel("echo", common::echo)
            // A member of the hall; what it sends is not read.
            .channel("hall", |channel: Channel| async move {
                let _ = channel.join("hall");
                let _ = channel.send("joined", &()).await;
                channel.closed().await;
            })
            // Takes nothing off the channel.
            .channel("deaf", |channel: Channel| async move {
                channel.closed().await;
            })
            // Its handlers do not come back.
            .channel("stuck", |channel: Channel| async move {
                channel
                    .on("never", |_: ByteBuf, _: Context| {
                        std::future::pending::<()>()
                    })
                    .run()
                    .await
            })
            // Speaks without end.
            .channel("spam", |channel: Channel| async move {
                let block = ByteBuf::from(vec![0x5a; 8 << 10]);
                loop {
                    channel.send("block", &block).await?;
                }
                #[allow(unreachable_code, reason = "says what the error is")]
                Ok::<(), SendError>(())
            });
        let server = net.bind(server).await.expect("a free address");
        let socket = net
            .connect(testing::client(&server), &server)
            .await
            .expect("let in");
        let good = socket.open("echo").await.expect("a channel");
        let site = Self {
            net,
            server,
            good,
            heap: Mark::set(),
        };
        site.others_live("nobody misbehaved yet").await;
        Self {
            heap: Mark::set(),
            ..site
        }
    }

    /// Another client, whose own queues are small.
    async fn connect(&self) -> Socket {
        self.connect_with(|client| client).await
    }

    /// As [`connect`](Self::connect), and it comes back when its connection is lost.
    async fn comes_back(&self) -> Socket {
        self.connect_with(|client| client.reconnect(Reconnect::default()))
            .await
    }

    async fn connect_with(&self, set: impl FnOnce(ClientBuilder) -> ClientBuilder) -> Socket {
        let limits = Limits {
            outbound_bytes: 64 << 10,
            replay_bytes: 64 << 10,
            ..Limits::default()
        };
        let client = set(testing::client(&self.server).limits(limits));
        self.net
            .connect(client, &self.server)
            .await
            .expect("let in")
    }

    async fn bare(&self) -> Bare {
        dial(&self.net, &self.server, 16 << 10).await
    }

    /// The client that behaves is answered in a few round trips of 2 ms.
    async fn others_live(&self, what: &str) {
        for n in 0..5 {
            answers(&self.good, n, what).await;
        }
    }

    /// Nobody holds more than they may.
    fn bounded(&self, what: &str) {
        self.heap.bounded(MOST, what);
    }

    /// How many channels the server closed with this code.
    fn closed(&self, code: CloseCode) -> u64 {
        let metrics = self.server.metrics();
        let ends = metrics.channels_closed.iter();
        ends.filter(|ends| ends.code == code.name())
            .map(|ends| ends.count)
            .sum()
    }
}

async fn answers(channel: &Channel, n: u64, what: &str) {
    let begun = Instant::now();
    let answer = channel.request::<_, u64>("echo", &n).await;
    assert_eq!(answer.unwrap_or_else(|error| panic!("{what}: {error}")), n);
    let took = begun.elapsed();
    assert!(
        took < Duration::from_millis(200),
        "{what}: answered after {took:?}"
    );
}

/// Sends until the channel is lost.
async fn send_until_lost(channel: &Channel, event: &str) -> SendError {
    let block = ByteBuf::from(vec![0; 16 << 10]);
    for _ in 0..10_000 {
        if let Err(error) = channel.send(event, &block).await {
            return error;
        }
    }
    panic!("nobody was held up")
}

fn slow(error: &SendError) -> bool {
    matches!(error, SendError::Closed(reason) if reason.code == CloseCode::SLOW_PEER)
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_is_stuck_costs_its_channel_and_nobody_else() {
    alone(async {
        let site = Site::new().await;
        let socket = site.connect().await;
        let (deaf, own) = (
            socket.open("deaf").await.expect("a channel"),
            socket.open("echo").await.expect("a channel"),
        );
        let lost = async {
            let error = send_until_lost(&deaf, "block").await;
            assert!(slow(&error), "{error}");
        };
        let lives = async {
            for n in 0..50 {
                answers(&own, n, "another channel of the same socket").await;
                answers(&site.good, n, "another socket").await;
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        };
        tokio::join!(lost, lives);
        site.bounded("a stuck reader");
        assert_eq!(socket.metrics().slow_peers, 1);
        answers(&own, 1, "after the loss").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_never_returns_holds_up_its_own_channel_and_nobody_else() {
    alone(async {
        let site = Site::new().await;
        let socket = site.connect().await;
        let own = socket.open("echo").await.expect("a channel");

        // An event: nobody waits for it. The sender is held up, in the end the channel is lost.
        let stuck = socket.open("stuck").await.expect("a channel");
        let error = send_until_lost(&stuck, "never").await;
        assert!(slow(&error), "{error}");
        answers(&own, 1, "behind an event").await;

        // A request: it is answered with a fault when its time is over, and the next one is served.
        let stuck = socket.open("stuck").await.expect("a channel");
        let asked = async {
            stuck
                .request::<_, ()>("never", &ByteBuf::new())
                .timeout(Duration::from_secs(60))
                .await
        };
        let lives = async {
            for n in 0..20 {
                answers(&own, n, "another channel of the same socket").await;
                answers(&site.good, n, "another socket").await;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let (asked, ()) = tokio::join!(asked, lives);
        assert!(
            matches!(&asked, Err(RequestError::Fault(fault)) if fault.code == Fault::TIMEOUT),
            "{asked:?}"
        );
        let unknown = stuck.request::<_, ()>("unknown", &()).await;
        assert!(
            matches!(unknown, Err(RequestError::NoHandler)),
            "{unknown:?}"
        );
        site.bounded("a handler that never returns");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn requests_that_nobody_takes_end_in_time() {
    alone(async {
        let site = Site::new().await;
        let socket = site.connect().await;
        let own = socket.open("echo").await.expect("a channel");
        let deaf = socket.open("deaf").await.expect("a channel");
        let block = ByteBuf::from(vec![0; 1 << 10]);
        let ask = |_| async {
            let asked = deaf.request::<_, ()>("ask", &block).await;
            let error = asked.expect_err("nobody takes it");
            assert!(
                error.is_timeout()
                    || matches!(&error, RequestError::Closed(_))
                    || matches!(&error, RequestError::Send(error) if slow(error)),
                "{error}"
            );
        };
        let asking = futures_util::future::join_all((0..1000).map(ask));
        let lives = async {
            for n in 0..40 {
                answers(&own, n, "another channel of the same socket").await;
                answers(&site.good, n, "another socket").await;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let begun = Instant::now();
        let took = async {
            asking.await;
            begun.elapsed()
        };
        let (took, ()) = tokio::join!(took, lives);
        assert!(took < Duration::from_secs(31), "{took:?}");
        site.bounded("requests that nobody takes");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn channels_opened_without_end_cost_the_socket() {
    alone(async {
        let site = Site::new().await;
        let flood = site.connect().await;
        let reason = loop {
            match flood.open("echo").await {
                Ok(channel) => drop(channel.close(CloseCode::CANCELLED, "the next one")),
                Err(_) => break flood.closed().await,
            }
        };
        assert_eq!(reason.code, CloseCode::RATE_LIMITED, "{reason}");
        site.others_live("opens without end").await;
        site.bounded("opens without end");
        assert_eq!(site.server.sockets().len(), 1);
    })
    .await;
}

/// Frames for channels that take nothing, as fast as flow control lets them through.
#[tokio::test(start_paused = true)]
async fn a_bare_peers_streams_are_held_within_the_windows() {
    alone(async {
        let site = Site::new().await;
        let bare = site.bare().await;
        let _control = bare.enter("").await;
        let mut streams = Vec::new();
        for id in 1..=30 {
            streams.push(bare.channel(id, "deaf").await);
        }
        let block = event("block", bare::Value::Bin(vec![0; 32 << 10]));
        let mut written = 0;
        for stream in &mut streams {
            // Until nothing moves for a while.
            while tokio::time::timeout(Duration::from_millis(100), stream.write(&block))
                .await
                .is_ok()
            {
                written += block.len();
                assert!(written < 1 << 20, "nobody was held up");
            }
        }
        site.others_live("30 full streams").await;
        // The peer's own copy of what it could not send is in this heap, too.
        site.bounded("30 full streams");
        assert!(written > 256 << 10, "{written}");
    })
    .await;
}

/// Frames that lack their last byte, on every channel of three sockets: the peer's budget holds for them, too.
#[tokio::test(start_paused = true)]
async fn unfinished_frames_are_held_within_the_budget() {
    alone(async {
        const BUDGET: usize = 16 << 20;
        let net = Net::new(0);
        let limits = Limits {
            receive_budget: BUDGET as u64,
            connection_window: 4 << 20,
            stream_window: 1 << 20,
            ..Limits::default()
        };
        let frame = limits.frame;
        let server = testing::server()
            .limits(limits)
            .channel("echo", common::echo);
        let server = net.bind(server).await.expect("an address");
        let mut bytes = u32::try_from(frame).expect("fits").to_be_bytes().to_vec();
        bytes.resize(4 + frame - 1, 0x5a);
        let bytes = Arc::new(bytes);
        let mark = Mark::set();
        let mut held = Vec::new();
        for _ in 0..3 {
            let bare = Arc::new(dial(&net, &server, 64 << 10).await);
            let control = bare.enter("").await;
            let mut writers = tokio::task::JoinSet::new();
            for id in 0..60 {
                let (bare, bytes) = (bare.clone(), bytes.clone());
                writers.spawn(async move {
                    let mut stream = bare.channel(id, "echo").await;
                    stream.write(&bytes).await;
                    std::future::pending::<()>().await;
                });
            }
            held.push((bare, control, writers));
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(server.metrics().frames_held_up > 0);
        // With what the sender has under way, which is in this heap, too.
        mark.bounded(3 * BUDGET, "180 unfinished frames");
        for (bare, _, _) in &held {
            bare.conn.close(0_u32.into(), b"");
        }
        drop(held);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let left = mark.held();
        assert!(left < 1 << 20, "{left} bytes are left");
    })
    .await;
}

/// Datagrams, sound ones and garbage, that nobody takes.
#[tokio::test(start_paused = true)]
async fn a_bare_peers_datagrams_are_dropped_and_counted() {
    alone(async {
        let site = Site::new().await;
        let bare = site.bare().await;
        let _control = bare.enter("").await;
        for n in 0..20_000_u64 {
            let body = match n % 2 {
                // Without its prefix a frame is a volatile message: each with a name of its own.
                0 => event(&format!("at{n}"), bare::Value::Uint(n)).split_off(4),
                _ => vec![0xc1; 100],
            };
            let sent = bare.conn.send_datagram(body.into());
            if sent.is_err() {
                panic!("{sent:?}");
            }
            if n % 1000 == 0 {
                site.others_live("datagrams").await;
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        site.bounded("datagrams");
        assert_eq!(bare.conn.close_reason(), None);
        let metrics = site.server.metrics();
        assert!(metrics.volatile_received > 1000, "{metrics:?}");
        assert!(metrics.volatile_dropped > 0, "{metrics:?}");
        assert!(metrics.volatile_malformed > 1000, "{metrics:?}");
    })
    .await;
}

/// Peers that have everything sent to them and read nothing.
#[tokio::test(start_paused = true)]
async fn what_is_sent_to_peers_that_read_nothing_is_bounded() {
    alone(async {
        let site = Site::new().await;
        let bare = site.bare().await;
        let _control = bare.enter("").await;
        let mut streams = Vec::new();
        for id in 1..=20 {
            streams.push(bare.channel(id, "spam").await);
        }
        for stream in &mut streams {
            site.others_live("20 deaf peers").await;
            let reset = stream
                .recv
                .received_reset()
                .await
                .expect("the connection lives");
            assert_eq!(reset.map(u64::from), Some(CloseCode::SLOW_PEER.value()));
        }
        site.bounded("20 deaf peers");
        assert_eq!(site.server.metrics().slow_peers, 20);
        assert_eq!(site.closed(CloseCode::SLOW_PEER), 20);
        assert_eq!(bare.conn.close_reason(), None);
    })
    .await;
}

/// Several clients at once that send what nobody reads.
#[tokio::test(start_paused = true)]
async fn many_who_flood_share_a_bound_each() {
    alone(async {
        let site = Site::new().await;
        let mut floods = tokio::task::JoinSet::new();
        for _ in 0..5 {
            let socket = site.connect().await;
            floods.spawn(async move {
                let channel = socket.open("deaf").await.expect("a channel");
                send_until_lost(&channel, "block").await
            });
        }
        while let Some(error) = floods.join_next().await {
            let error = error.expect("no panic");
            assert!(slow(&error), "{error}");
            site.others_live("five floods").await;
        }
        site.bounded("five floods");
    })
    .await;
}

async fn resumable(socket: &Socket, name: &str) -> Channel {
    let channel = socket.channel(name).resumable().open().await;
    channel.expect("a channel")
}

/// A resumable channel keeps what its peer does not confirm: no more than its bound, and not for ever while the
/// peer is there.
#[tokio::test(start_paused = true)]
async fn resumable_channels_that_nobody_reads_are_held_to_the_same_rules() {
    alone(async {
        let site = Site::new().await;
        let socket = site.comes_back().await;
        let own = resumable(&socket, "echo").await;
        for (name, event) in [("deaf", "block"), ("stuck", "never")] {
            let channel = resumable(&socket, name).await;
            let lost = async {
                let error = send_until_lost(&channel, event).await;
                assert!(slow(&error), "{name}: {error}");
                assert_eq!(channel.queued_bytes(), 0, "{name}: nothing is kept of it");
            };
            let lives = async {
                for n in 0..50 {
                    answers(&own, n, "another channel of the same socket").await;
                    answers(&site.good, n, "another socket").await;
                    tokio::time::sleep(Duration::from_millis(250)).await;
                }
            };
            tokio::join!(lost, lives);
            site.bounded(name);
        }
        // A lost connection changes nothing for the others.
        site.net.cut_client_for(&socket, Duration::from_secs(35));
        assert_eq!(
            own.request::<_, u64>("echo", &1)
                .timeout(Duration::from_secs(100))
                .await
                .expect("resumed"),
            1
        );
        assert_eq!(socket.metrics().resumed, 1);
        site.others_live("after a lost connection").await;
        site.bounded("after a lost connection");
    })
    .await;
}

/// A bare peer that reads everything and confirms nothing.
#[tokio::test(start_paused = true)]
async fn a_peer_that_never_confirms_loses_its_channels() {
    alone(async {
        let site = Site::new().await;
        let bare = site.bare().await;
        let mut control = bare.stream().await;
        let yes = || bare::Value::Raw(vec![0xc3]);
        let hello = bare::map([
            ("v", bare::Value::Uint(1)),
            ("token", "".into()),
            ("agent", "bare".into()),
            ("resume", bare::map([])),
        ]);
        control.write(&event("$hello", hello)).await;
        let welcome = control.message().await.expect("admitted");
        let welcome = Welcome::decode(&welcome).expect("a sound $welcome");
        assert!(welcome.resume.is_some());
        let mut streams = Vec::new();
        for id in 1..=10_u64 {
            let mut stream = bare.stream().await;
            let fields = bare::map([
                ("id", id.into()),
                ("name", "spam".into()),
                ("resumable", yes()),
            ]);
            stream.write(&event("$open", fields)).await;
            streams.push(stream);
        }
        for stream in &mut streams {
            let mut bytes = 0;
            let end = loop {
                match stream.message().await {
                    Ok(message) => bytes += message.raw().len(),
                    Err(end) => break end,
                }
            };
            let slow = CloseCode::SLOW_PEER.value();
            assert_eq!(end, bare::Ended::Reset(slow));
            assert!(
                bytes <= (64 << 10) + (8 << 10),
                "{bytes} without confirmation"
            );
            site.others_live("a peer that confirms nothing").await;
        }
        site.bounded("a peer that confirms nothing");
        assert_eq!(site.closed(CloseCode::SLOW_PEER), 10);
        assert_eq!(bare.conn.close_reason(), None);
    })
    .await;
}

/// What a room sends to a resumable member that is stuck, or away, is no more than its queue and its policy hold.
#[tokio::test(start_paused = true)]
async fn a_room_does_not_wait_for_resumable_members() {
    alone(async {
        let site = Site::new().await;
        let (stuck, away, reads) = (
            site.comes_back().await,
            site.comes_back().await,
            site.comes_back().await,
        );
        let mut channels = Vec::new();
        for socket in [&stuck, &away, &reads] {
            let channel = resumable(socket, "hall").await;
            let joined = channel.recv().await.expect("open").expect("a message");
            assert_eq!(joined.event(), "joined");
            channels.push(channel);
        }
        site.net.cut_client(&away);
        let rooms = site.server.rooms();
        let block = ByteBuf::from(vec![0; 1 << 10]);
        let (mut lost, mut next) = (0, 0);
        for n in 0..5_000_u64 {
            let sent = rooms.to("hall").send("line", &(n, &block)).expect("sound");
            assert!(sent.delivered >= 1);
            lost += sent.dropped;
            // Whoever reads gets everything, in order.
            let line = channels[2].recv().await.expect("open").expect("a line");
            let (got, _) = line.data::<(u64, ByteBuf)>().expect("sound");
            assert_eq!(got, next);
            next += 1;
            if n % 500 == 0 {
                site.others_live("a room with stuck members").await;
            }
        }
        site.bounded("a room with stuck members");
        assert!(lost > 4_000, "{lost}");
        let metrics = site.server.metrics();
        assert_eq!(metrics.room_dropped, lost);
        assert_eq!(rooms.dropped(), lost);
        assert!(metrics.room_sent >= 5_000, "{}", metrics.room_sent);
        // The one that was away gets what fits, and is told of the rest.
        site.net.mend_client(&away);
        let (mut heard, mut told) = (0, 0);
        while heard + told < 5_000 {
            let message = channels[1].recv().await.expect("open").expect("a message");
            match message.gap() {
                Some(gap) => told += gap.lost,
                None => heard += 1,
            }
        }
        assert!(told > 0 && heard > 0, "{heard} heard, {told} told");
        assert!(site.server.metrics().gaps > 0);
        drop(stuck);
    })
    .await;
}
