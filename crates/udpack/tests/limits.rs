//! Every bound and every deadline, passed once: what becomes of it, in which words, and where it is counted.
//!
//! One row for each field. The rows take `Limits` and `Timeouts` apart, so that a new field without a row
//! does not compile. Runs on a network in memory with a paused clock: no deadline is waited for.

#[allow(dead_code, reason = "this binary uses its own part")]
#[path = "hostile/bare.rs"]
mod bare;
#[allow(unused_imports, reason = "this binary uses its own part")]
mod common;

use std::fmt::Display;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bare::{Bare, Ended, Stream, open};
use futures_util::future::BoxFuture;
use serde_bytes::ByteBuf;
use tokio::time::Instant;
use udpack::testing::{self, Net};
use udpack::wire::Decode;
use udpack::{
    Authenticate, Channel, Client, CloseCode, CloseReason, ConnectError, Context, Deny, Fault,
    Hello, History, Limits, Metrics, Peer, Position, PresenceMap, Reconnect, RecvError,
    RequestError, Server, ServerBuilder, Socket, SocketState, Start, Timeouts,
};

/// What came of passing a bound.
struct Seen {
    /// The close code's name, the fault's code, or what else tells it from other ends.
    what: String,
    text: String,
    /// How often the counter of this bound has counted; asked when everything has settled.
    counted: Counter,
    /// How long it took, by the paused clock.
    took: Duration,
}

type Counter = Box<dyn Fn() -> u64>;

impl Seen {
    fn new(what: impl Display, text: impl Display, counted: impl Fn() -> u64 + 'static) -> Self {
        Self {
            what: what.to_string(),
            text: text.to_string(),
            counted: Box::new(counted),
            took: Duration::ZERO,
        }
    }

    fn closed(reason: &CloseReason, counted: impl Fn() -> u64 + 'static) -> Self {
        Self::new(reason.code.name(), &reason.text, counted)
    }

    fn after(mut self, begun: Instant) -> Self {
        self.took = begun.elapsed();
        self
    }
}

type Breach = Pin<Box<dyn Future<Output = Seen>>>;

/// One field: its name, how it is passed, what must come of it, what the text must name.
struct Row {
    field: &'static str,
    breach: Breach,
    what: &'static str,
    text: &'static str,
    counted: u64,
}

macro_rules! rows {
    ($of:ident { $($field:ident: $breach:ident => $what:literal, $text:literal, $counted:literal;)* }) => {{
        let $of { $($field: _),* } = $of::default();
        [$(Row {
            field: stringify!($field),
            breach: Box::pin($breach()),
            what: $what,
            text: $text,
            counted: $counted,
        }),*]
    }};
}

/// Passes the bound of each row; returns how long each took.
async fn check(rows: impl IntoIterator<Item = Row>) -> Vec<(&'static str, Duration)> {
    let (mut times, mut wrong) = (Vec::new(), Vec::new());
    for row in rows {
        let field = row.field;
        let seen = tokio::time::timeout(Duration::from_secs(7200), row.breach)
            .await
            .unwrap_or_else(|_| panic!("{field}: nothing came of it"));
        // The clock moves on when nothing is left to do.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (what, text, counted) = (seen.what, seen.text, (seen.counted)());
        if what != row.what || !text.contains(row.text) || counted != row.counted {
            wrong.push(format!(
                "{field}: {what}, {text:?}, counted {counted} times"
            ));
        }
        times.push((field, seen.took));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    times
}

#[tokio::test(start_paused = true)]
async fn every_limit_has_its_end_its_words_and_its_counter() {
    check(rows!(Limits {
        frame: frame => "frame_too_large", "frame of 4097 bytes is above the limit: 4096", 1;
        channels: channels => "no channel", "the peer permits no further channel: 2 may be open", 2;
        sockets: sockets => "server_busy", "all 1 sockets are in use", 1;
        sockets_per_address: sockets_per_address => "server_busy", "1 sockets of this address are in use", 1;
        handshakes: handshakes => "server_busy", "all 1 handshakes are in use; try again in a few seconds", 1;
        handshake_rate: handshake_rate => "waits", "1s", 1;
        retry_from: retry_from => "proved its address", "", 1;
        channel_rate: channel_rate => "rate_limited", "more than 2 channels a second", 1;
        outbound_bytes: outbound_bytes => "full", "10000 bytes", 1;
        outbound_messages: outbound_messages => "full", "3 messages", 3;
        replay_bytes: replay_bytes => "full", "10000 bytes", 1;
        replay_messages: replay_messages => "full", "3 messages", 3;
        resume_bytes: resume_bytes => "full", "10 messages of 1000 bytes", 10;
        detached_sockets: detached_sockets => "1 of 2 are kept", "session could not be resumed: unknown", 1;
        backlog_messages: backlog_messages => "backlog", "stand before the reply: 10 messages may wait", 1;
        backlog_bytes: backlog_bytes => "backlog", "stand before the reply: 10000 bytes may wait", 1;
        rooms: rooms => "join", "there are 2 rooms already", 1;
        rooms_per_channel: rooms_per_channel => "join", "the channel is in 2 rooms already", 1;
        history_bytes: history_bytes => "the oldest are gone", "gone from 1 to 98", 98;
        stream_window: stream_window => "slow_peer", "the peer took nothing off the channel for 10s", 1;
        connection_window: connection_window => "slow_peer", "the peer took nothing off the channel for 10s", 1;
        send_window: send_window => "full", "within the window", 0;
        receive_budget: receive_budget => "slow_peer", "the peer took nothing off the channel for 10s", 1;
        auth_failures: auth_failures => "auth_failed", "", 1;
        volatile_keys: volatile_keys => "the newest are left", "8 9", 8;
        volatile_bytes: volatile_bytes => "refused", "is above the limit: 1000", 0;
        socket_buffer: socket_buffer => "served", "", 1;
    }))
    .await;
}

#[tokio::test(start_paused = true)]
async fn every_deadline_has_its_end_its_words_and_its_counter() {
    let times = check(rows!(Timeouts {
        handshake: handshake => "unreachable", "no answer from 10.1.0.1:45456", 0;
        auth: auth => "auth_timeout", "not authenticated within 5", 1;
        auth_failure: auth_failure => "auth_failed", "", 1;
        auth_pause: auth_pause => "server_busy", "2 wrong tokens from this address, again in 1 s", 4;
        frame: frame_time => "frame_timeout", "30s", 1;
        slow_peer: stream_window => "slow_peer", "the peer took nothing off the channel for 10s", 1;
        idle: idle => "timed_out", "nothing was heard from the peer in time", 1;
        keep_alive: keep_alive => "setting", "keep-alive interval must be below the idle time", 0;
        resume: resume => "not_resumed", "session could not be resumed: unknown", 1;
        close: close => "normal", "", 1;
        request: request => "timeout", "no reply within 30s", 1;
        handler: handler => "timeout", "no answer within 30s", 1;
        recheck: recheck => "auth_revoked", "the token was withdrawn", 1;
        presence: presence => "presence_diff", "hall", 1;
    }))
    .await;
    let defaults = Timeouts::default();
    for (field, took) in times {
        let due = match field {
            "handshake" => defaults.handshake,
            "auth" => defaults.auth,
            "auth_failure" => defaults.auth_failure,
            // Four turns, of which the first is counted from the last wrong token.
            "auth_pause" => defaults.auth_pause * 4 - defaults.auth_failure,
            "frame" => defaults.frame,
            "slow_peer" => defaults.slow_peer,
            // From the last packet of the peer, which the clock of the test does not see.
            "idle" => defaults.idle - defaults.keep_alive,
            "close" => defaults.close,
            "request" => defaults.request,
            "handler" => defaults.handler,
            "resume" => defaults.resume,
            "recheck" => defaults.recheck,
            "presence" => defaults.presence,
            _ => continue,
        };
        let late = match field {
            "idle" => defaults.keep_alive + Duration::from_secs(1),
            _ => Duration::from_secs(1),
        };
        assert!(
            took >= due && took < due + late,
            "{field}: {took:?}, due after {due:?}"
        );
    }
}

/// A server on a network of its own: `echo` answers, `deaf` takes nothing, `never` does not answer.
async fn serve(limits: Limits) -> (Net, Server) {
    let net = Net::new(0);
    let server = net
        .bind(channels_of(testing::server()).limits(limits))
        .await;
    (net, server.expect("a free address"))
}

fn channels_of(builder: ServerBuilder) -> ServerBuilder {
    builder
        .channel("echo", |channel: Channel| async move {
            channel
                .on(
                    "echo",
                    |n: u64, _: Context| async move { Ok::<_, Fault>(n) },
                )
                .on("never", |(): (), _: Context| std::future::pending::<()>())
                .on("join", |room: String, cx: Context| async move {
                    let joined = cx.channel().join(&room);
                    joined.map_err(|error| Fault::new("join", error.to_string()))
                })
                .on("track", |room: String, cx: Context| async move {
                    let tracked = cx.channel().track(&room, &"here");
                    tracked.map_err(|error| Fault::new("track", error.to_string()))
                })
                .on(
                    "flood",
                    |(count, bytes): (u64, usize), cx: Context| async move {
                        for _ in 0..count {
                            let block = ByteBuf::from(vec![0; bytes]);
                            let sent = cx.channel().send("event", &block).await;
                            sent.map_err(|error| Fault::new("send", error.to_string()))?;
                        }
                        Ok::<_, Fault>(())
                    },
                )
                .run()
                .await
        })
        .channel("deaf", |channel: Channel| async move {
            channel.closed().await;
        })
}

async fn connect(net: &Net, server: &Server) -> Socket {
    connect_with(net, server, Limits::default()).await
}

async fn connect_with(net: &Net, server: &Server, limits: Limits) -> Socket {
    let builder = testing::client(server).limits(limits);
    net.connect(builder, server).await.expect("let in")
}

/// One that comes back when its connection is lost.
async fn comes_back(net: &Net, server: &Server, limits: Limits) -> Socket {
    let builder = testing::client(server)
        .limits(limits)
        .reconnect(Reconnect::default());
    net.connect(builder, server).await.expect("let in")
}

/// Waits until the server has noticed that its connection to `count` clients is lost.
async fn detached(server: &Server, count: u64) {
    while server.metrics().detached != count {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// How a resumable channel of a client ended that came back too late.
async fn not_resumed(channel: &Channel) -> CloseReason {
    match channel.recv().await {
        Err(RecvError::Closed(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

async fn resumable(socket: &Socket, name: &str) -> Channel {
    let channel = socket.channel(name).resumable().open().await;
    channel.expect("a channel")
}

async fn echo(socket: &Socket) {
    let channel = socket.open("echo").await.expect("a channel");
    assert_eq!(
        channel
            .request::<_, u64>("echo", &1)
            .await
            .expect("an answer"),
        1
    );
}

async fn bare(net: &Net, server: &Server) -> Bare {
    let endpoint = net.bare().expect("an address");
    let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
    Bare::dial(&endpoint, server.local_addr(), config)
        .await
        .expect("a sound handshake")
}

/// The last word on a channel.
async fn last(stream: &mut Stream) -> CloseReason {
    loop {
        let message = stream.message().await.expect("a $close");
        if message.event() == "$close" {
            return CloseReason::decode(&message).expect("a sound $close");
        }
    }
}

fn denied(result: Result<Socket, ConnectError>) -> CloseReason {
    match result {
        Err(ConnectError::Denied(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

/// How many channels ended with this code.
fn channels_closed(metrics: &Metrics, code: CloseCode) -> u64 {
    let ends = metrics.channels_closed.iter();
    ends.filter(|ends| ends.code == code.name())
        .map(|ends| ends.count)
        .sum()
}

fn closed(metrics: &Metrics, code: CloseCode) -> u64 {
    let ends = metrics.closed.iter();
    ends.filter(|ends| ends.code == code.name())
        .map(|ends| ends.count)
        .sum()
}

fn word(words: &std::collections::BTreeMap<&'static str, u64>, word: &str) -> u64 {
    words.get(word).copied().unwrap_or_default()
}

async fn frame() -> Seen {
    let (net, server) = serve(Limits {
        frame: 4096,
        ..Limits::default()
    })
    .await;
    let bare = bare(&net, &server).await;
    let _control = bare.enter("").await;
    let mut stream = bare.channel(1, "echo").await;
    stream.write(&4097_u32.to_be_bytes()).await;
    let reason = last(&mut stream).await;
    let counted = move || channels_closed(&server.metrics(), CloseCode::FRAME_TOO_LARGE);
    Seen::closed(&reason, counted)
}

async fn channels() -> Seen {
    let (net, server) = serve(Limits {
        channels: 2,
        ..Limits::default()
    })
    .await;
    let socket = connect(&net, &server).await;
    let _held = [socket.open("echo").await, socket.open("echo").await].map(Result::unwrap);
    let begun = Instant::now();
    let error = socket.open("echo").await.expect_err("two are all");
    Seen::new("no channel", error, move || {
        server.metrics().channels_accepted
    })
    .after(begun)
}

async fn sockets() -> Seen {
    let (net, server) = serve(Limits {
        sockets: 1,
        ..Limits::default()
    })
    .await;
    let first = connect(&net, &server).await;
    let reason = denied(net.connect(testing::client(&server), &server).await);
    echo(&first).await;
    Seen::closed(&reason, move || {
        word(&server.metrics().refused, "server_busy")
    })
}

async fn sockets_per_address() -> Seen {
    let (net, server) = serve(Limits {
        sockets_per_address: 1,
        ..Limits::default()
    })
    .await;
    let address = server.local_addr().to_string();
    let client = net
        .attach(testing::client(&server))
        .build()
        .expect("a client");
    let first = client.connect(&address).await.expect("let in");
    let reason = denied(client.connect(&address).await);
    echo(&first).await;
    echo(&connect(&net, &server).await).await;
    Seen::closed(&reason, move || {
        word(&server.metrics().refused, "server_busy")
    })
}

async fn handshakes() -> Seen {
    let (net, server) = serve(Limits {
        handshakes: 1,
        ..Limits::default()
    })
    .await;
    // Has shaken hands and says nothing: it counts until it is decided.
    let _silent = bare(&net, &server).await;
    let reason = denied(net.connect(testing::client(&server), &server).await);
    Seen::closed(&reason, move || {
        word(&server.metrics().knocks_refused, "busy")
    })
}

async fn handshake_rate() -> Seen {
    let (net, server) = serve(Limits {
        handshake_rate: 1,
        ..Limits::default()
    })
    .await;
    let endpoint = net.bare().expect("an address");
    let address = server.local_addr();
    let begun = Instant::now();
    // A burst of eight times as many, and one more.
    for _ in 0..9 {
        let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
        let bare = Bare::dial(&endpoint, address, config).await;
        let conn = bare.expect("a sound handshake").conn;
        conn.close(0_u32.into(), b"");
        // The server has counted it by then.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let waited = begun.elapsed().as_secs();
    Seen::new("waits", format!("{waited}s"), move || {
        server.metrics().handshakes_paced
    })
}

async fn retry_from() -> Seen {
    let (net, server) = serve(Limits {
        retry_from: 0,
        ..Limits::default()
    })
    .await;
    echo(&connect(&net, &server).await).await;
    Seen::new("proved its address", "", move || server.metrics().retries)
}

async fn channel_rate() -> Seen {
    let (net, server) = serve(Limits {
        channel_rate: 2,
        ..Limits::default()
    })
    .await;
    let socket = connect(&net, &server).await;
    // A burst of twice as many, and one more.
    for _ in 0..5 {
        drop(socket.open("deaf").await.expect("a channel"));
    }
    let reason = socket.closed().await;
    Seen::closed(&reason, move || {
        closed(&server.metrics(), CloseCode::RATE_LIMITED)
    })
}

async fn outbound_bytes() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let limits = Limits {
        outbound_bytes: 10_000,
        ..Limits::default()
    };
    let socket = connect_with(&net, &server, limits).await;
    let channel = socket.open("deaf").await.expect("a channel");
    // Nothing between two sends: the writer has had no turn.
    let block = ByteBuf::from(vec![0; 9_999]);
    let first = channel.try_send("block", &block).expect("open");
    let second = channel.try_send("block", &block).expect("open");
    assert!(first && channel.queued_bytes() >= 10_000);
    let what = if second { "taken" } else { "full" };
    Seen::new(what, "10000 bytes", move || u64::from(first))
}

async fn outbound_messages() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let limits = Limits {
        outbound_messages: 3,
        ..Limits::default()
    };
    let socket = connect_with(&net, &server, limits).await;
    let channel = socket.open("deaf").await.expect("a channel");
    while channel.queued_bytes() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let taken = (0..4)
        .filter(|_| channel.try_send("note", &()).expect("open"))
        .count();
    Seen::new("full", format!("{taken} messages"), move || taken as u64)
}

/// Fills a resumable channel of which nothing is confirmed, because nobody reads it.
async fn unconfirmed(limits: Limits, bytes: usize, most: usize) -> (Socket, Channel, usize) {
    let (net, server) = serve(Limits::default()).await;
    let socket = comes_back(&net, &server, limits).await;
    let channel = resumable(&socket, "deaf").await;
    let block = ByteBuf::from(vec![0; bytes]);
    let mut taken = 0;
    // What QUIC has taken still counts.
    for _ in 0..10 {
        while channel.try_send("block", &block).expect("open") {
            taken += 1;
            assert!(taken <= most, "nothing holds it");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    (socket, channel, taken)
}

async fn replay_bytes() -> Seen {
    let limits = Limits {
        replay_bytes: 10_000,
        ..Limits::default()
    };
    let (socket, channel, taken) = unconfirmed(limits, 9_999, 1).await;
    assert!(channel.queued_bytes() >= 10_000);
    Seen::new("full", "10000 bytes", move || {
        socket.metrics().sockets * taken as u64
    })
}

async fn replay_messages() -> Seen {
    let limits = Limits {
        replay_messages: 3,
        ..Limits::default()
    };
    let (socket, channel, taken) = unconfirmed(limits, 1, 3).await;
    Seen::new("full", format!("{taken} messages"), move || {
        socket.metrics().sockets * channel.unconfirmed()
    })
}

async fn resume_bytes() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let limits = Limits {
        resume_bytes: 10_000,
        ..Limits::default()
    };
    let socket = comes_back(&net, &server, limits).await;
    let channels = [
        resumable(&socket, "echo").await,
        resumable(&socket, "echo").await,
    ];
    let mut states = socket.states();
    net.cut();
    while !matches!(states.next().await, Some(SocketState::Reconnecting { .. })) {}
    // In turn: the bound is that of both together.
    let block = ByteBuf::from(vec![0; 1_000]);
    let mut taken = 0;
    while channels[taken % 2].try_send("block", &block).expect("open") {
        taken += 1;
    }
    assert!(
        !channels[(taken + 1) % 2]
            .try_send("block", &block)
            .expect("open")
    );
    Seen::new(
        "full",
        format!("{taken} messages of 1000 bytes"),
        move || channels.iter().map(Channel::unconfirmed).sum(),
    )
}

async fn detached_sockets() -> Seen {
    let (net, server) = serve(Limits {
        detached_sockets: 1,
        ..Limits::default()
    })
    .await;
    let mut sockets = Vec::new();
    for _ in 0..2 {
        let socket = comes_back(&net, &server, Limits::default()).await;
        let channel = resumable(&socket, "deaf").await;
        echo(&socket).await;
        sockets.push((socket, channel));
    }
    net.cut();
    detached(&server, 1).await;
    tokio::time::sleep(Duration::from_secs(40)).await;
    let kept = server.metrics().detached;
    net.mend();
    let ends = sockets
        .iter()
        .map(|(_, channel)| Box::pin(not_resumed(channel)));
    let (reason, which, _) = futures_util::future::select_all(ends).await;
    for (socket, _) in &sockets {
        echo(socket).await;
    }
    assert_eq!(reason.code, CloseCode::NOT_RESUMED);
    assert_eq!(sockets[1 - which].1.close_reason(), None);
    Seen::new(format!("{kept} of 2 are kept"), reason.text, move || {
        word(&server.metrics().resumes_refused, "unknown")
    })
}

/// Joins until the server says no.
async fn joins(limits: Limits) -> Seen {
    let (net, server) = serve(limits).await;
    let socket = connect(&net, &server).await;
    let channel = socket.open("echo").await.expect("a channel");
    for room in ["a", "b", "a"] {
        channel.request::<_, ()>("join", room).await.expect("room");
    }
    let joined = channel.request::<_, ()>("join", "c").await;
    let Err(RequestError::Fault(fault)) = joined else {
        panic!("{joined:?}");
    };
    Seen::new(fault.code, fault.message, move || {
        word(&server.metrics().faults_sent, "application")
    })
}

async fn rooms() -> Seen {
    joins(Limits {
        rooms: 2,
        ..Limits::default()
    })
    .await
}

async fn rooms_per_channel() -> Seen {
    joins(Limits {
        rooms_per_channel: 2,
        ..Limits::default()
    })
    .await
}

async fn history_bytes() -> Seen {
    let limits = Limits {
        // As two messages of 1,000 bytes need.
        history_bytes: 2_300,
        ..Limits::default()
    };
    let builder = testing::server().limits(limits);
    let builder = builder.channel("hall", |channel: Channel| async move {
        let rooms = channel.rooms_handle().expect("a server's");
        let Position { epoch, .. } = rooms.position("hall").expect("a history");
        let begin = Start::Since(Position { epoch, offset: 0 });
        channel.join_at("hall", begin).expect("a sound room");
        while let Ok(Some(_)) = channel.recv().await {}
    });
    let net = Net::new(1);
    let server = net.bind(builder).await.expect("an address");
    for room in ["hall", "other"] {
        let history = server.rooms().history(room, History::default());
        history.expect("a sound room");
    }
    // Those of the other room are older, and go first.
    for room in ["other", "hall"] {
        tokio::time::advance(Duration::from_secs(1)).await;
        for _ in 0..100 {
            let sent = server.rooms().to(room).send("text", &"x".repeat(1000));
            sent.expect("a sound message");
        }
    }
    let socket = connect(&net, &server).await;
    let channel = socket.open("hall").await.expect("a channel");
    let gap = channel.recv().await.expect("open").expect("a gap");
    let gap = gap.gap().expect("a gap");
    let missing = gap.missing.expect("of positions");
    let text = format!("{:?} from {} to {}", missing.why, missing.from, missing.to);
    Seen::new("the oldest are gone", text.to_lowercase(), move || gap.lost)
}

async fn backlog(limits: Limits, count: u64, bytes: usize) -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let socket = connect_with(&net, &server, limits).await;
    let channel = socket.open("echo").await.expect("a channel");
    let error = channel
        .request::<_, ()>("flood", &(count, bytes))
        .await
        .expect_err("more than may wait");
    assert!(matches!(error, RequestError::Backlog { .. }), "{error}");
    // None of them is lost.
    for _ in 0..count {
        let event = channel.recv().await.expect("open").expect("an event");
        assert_eq!(event.event(), "event");
    }
    Seen::new("backlog", error, move || socket.metrics().requests_sent)
}

async fn backlog_messages() -> Seen {
    backlog(
        Limits {
            backlog_messages: 10,
            ..Limits::default()
        },
        11,
        1,
    )
    .await
}

async fn backlog_bytes() -> Seen {
    backlog(
        Limits {
            backlog_bytes: 10_000,
            ..Limits::default()
        },
        11,
        1_000,
    )
    .await
}

/// Sends on `count` channels that nobody reads until the first is given up; no more than `window` and what is
/// queued here may have been taken.
async fn unread(limits: Limits, count: usize, window: usize) -> Seen {
    const QUEUE: usize = 16 << 10;
    let (net, server) = serve(limits).await;
    let ours = Limits {
        outbound_bytes: QUEUE,
        ..Limits::default()
    };
    let socket = connect_with(&net, &server, ours).await;
    let block = ByteBuf::from(vec![0; 8 << 10]);
    let mut channels = Vec::new();
    for _ in 0..count {
        channels.push(socket.open("deaf").await.expect("a channel"));
    }
    let mut taken = 0;
    loop {
        let mut more = false;
        for channel in &channels {
            while channel.try_send("block", &block).expect("open") {
                taken += 8 << 10;
                more = true;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        if !more {
            break;
        }
    }
    let most = window + count * (QUEUE + (64 << 10));
    assert!(taken <= most, "{taken} bytes taken, {most} allowed");
    assert!(
        taken >= window.min(most) / 2,
        "{taken} bytes taken, {window} granted"
    );
    // What stands still has done so since the last look but one.
    let begun = Instant::now() - Duration::from_millis(200);
    let ends = channels.iter().map(|channel| Box::pin(channel.closed()));
    // The end of one makes room for what others have queued, so not all of them are lost.
    let (reason, ..) = futures_util::future::select_all(ends).await;
    let took = begun.elapsed();
    let counted = socket.metrics().slow_peers.min(1);
    // What they held is free again.
    for channel in channels {
        channel.close(CloseCode::CANCELLED, "enough").await;
    }
    echo(&socket).await;
    let mut seen = Seen::closed(&reason, move || counted);
    seen.took = took;
    seen
}

async fn stream_window() -> Seen {
    unread(
        Limits {
            stream_window: 64 << 10,
            ..Limits::default()
        },
        1,
        64 << 10,
    )
    .await
}

async fn connection_window() -> Seen {
    let limits = Limits {
        connection_window: 128 << 10,
        ..Limits::default()
    };
    unread(limits, 4, 128 << 10).await
}

async fn receive_budget() -> Seen {
    let limits = Limits {
        receive_budget: 128 << 10,
        ..Limits::default()
    };
    unread(limits, 4, 128 << 10).await
}

/// Two channels have a stream window's worth lie unread, each, which is more than the connection's window is at
/// first: it grows, and a third is served as if they were not there.
#[tokio::test(start_paused = true)]
async fn what_nobody_reads_leaves_room_for_the_others() {
    let (net, server) = serve(Limits::default()).await;
    let socket = connect(&net, &server).await;
    let mut deaf = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let channel = socket.open("deaf").await.expect("a channel");
        deaf.spawn(async move {
            let block = ByteBuf::from(vec![0; 512 << 10]);
            let mut sent = 0;
            while channel.send("block", &block).await.is_ok() {
                sent += block.len();
            }
            sent
        });
    }
    // Less than the time after which channels are given up that get nowhere.
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        echo(&socket).await;
    }
    assert_eq!(socket.metrics().slow_peers, 0);
    // They are, in the end, when their streams' windows are full.
    while let Some(sent) = deaf.join_next().await {
        let sent = sent.expect("no panic");
        let window = Limits::default().stream_window as usize;
        assert!((window..window + (3 << 20)).contains(&sent), "{sent}");
    }
    echo(&socket).await;
}

async fn send_window() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let limits = Limits {
        send_window: 64 << 10,
        outbound_bytes: 16 << 10,
        ..Limits::default()
    };
    let socket = connect_with(&net, &server, limits).await;
    let channel = socket.open("deaf").await.expect("a channel");
    // Nothing is acknowledged any more.
    net.cut();
    let block = ByteBuf::from(vec![0; 8 << 10]);
    let mut taken = 0;
    for _ in 0..1000 {
        while channel.try_send("block", &block).expect("open") {
            taken += 8 << 10;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let most = (64 << 10) + (16 << 10) + (16 << 10);
    assert!((64 << 10..=most).contains(&taken), "{taken}");
    Seen::new("full", "within the window", || 0)
}

/// A server that two wrong tokens make slow, and clients of one address: one whose token is wrong, one whose is right.
async fn guessed() -> (Server, Client, Client) {
    let net = Net::new(0);
    let verifier = |hello: Hello| async move {
        match hello.token() {
            "right" => Ok(Peer::new("tester")),
            _ => Err(Deny::auth_failed()),
        }
    };
    let server = testing::server().auth(verifier).limits(Limits {
        auth_failures: 2,
        ..Limits::default()
    });
    let server = net.bind(server).await.expect("a free address");
    let builder = net.attach(testing::client(&server));
    let client = |token| builder.clone().token(token).build().expect("a client");
    let (wrong, right) = (client("wrong"), client("right"));
    let address = server.local_addr().to_string();
    for _ in 0..2 {
        let reason = denied(wrong.connect(&address).await);
        assert_eq!(reason.code, CloseCode::AUTH_FAILED);
    }
    (server, wrong, right)
}

async fn auth_failures() -> Seen {
    let (server, wrong, right) = guessed().await;
    let address = server.local_addr().to_string();
    // It waits for its turn, and then it is looked at.
    let reason = denied(wrong.connect(&address).await);
    assert_eq!(server.metrics().tokens_slowed, 1);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    right.connect(&address).await.expect("let in");
    Seen::closed(&reason, move || server.metrics().tokens_slowed)
}

async fn auth_pause() -> Seen {
    let (server, wrong, right) = guessed().await;
    let address = server.local_addr().to_string();
    let begun = Instant::now();
    let turns = std::iter::repeat_n(&wrong, 4).chain([&right, &wrong]);
    let all = futures_util::future::join_all(turns.map(|client| {
        let connecting = client.connect(&address);
        async move { (connecting.await, begun.elapsed()) }
    }));
    let all = all.await;
    let took = begun.elapsed();
    let (mut let_in, mut full, mut failed) = (0, None, 0);
    for (result, after) in all {
        match result {
            Ok(_) => let_in += 1,
            Err(error) => match denied(Err(error)) {
                reason if reason.code == CloseCode::AUTH_FAILED => failed += 1,
                reason => {
                    let least = Timeouts::default().auth_failure;
                    assert!(after >= least, "refused after {after:?}");
                    full = Some(reason);
                }
            },
        }
    }
    assert_eq!(let_in + failed, 4, "as many as may wait");
    let reason = full.expect("the others are told");
    let mut seen = Seen::closed(&reason, move || server.metrics().tokens_slowed);
    seen.took = took;
    seen
}

async fn volatile_keys() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let limits = Limits {
        volatile_keys: 2,
        ..Limits::default()
    };
    let socket = connect_with(&net, &server, limits).await;
    let there = server.sockets().pop().expect("the socket");
    // All in one go: none has been sent yet.
    for n in 0..10_u64 {
        socket
            .send_volatile_keyed("at", &n.to_string(), &n)
            .expect("queued");
    }
    let mut left = Vec::new();
    for _ in 0..2 {
        let volatile = there.recv_volatile().await.expect("a message");
        left.push(volatile.data::<u64>().expect("a number").to_string());
    }
    Seen::new("the newest are left", left.join(" "), move || {
        socket.metrics().volatile_dropped
    })
}

async fn volatile_bytes() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let limits = Limits {
        volatile_bytes: 1000,
        ..Limits::default()
    };
    let socket = connect_with(&net, &server, limits).await;
    let error = socket
        .send_volatile("at", &ByteBuf::from(vec![0; 1000]))
        .expect_err("too large");
    Seen::new("refused", error, move || socket.metrics().volatile_dropped)
}

/// Nobody can pass this one: it is what is asked of the kernel. A tiny one costs speed and nothing else. Its
/// socket is a real one and needs a clock that is not paused.
async fn socket_buffer() -> Seen {
    let real = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(common::bounded(async {
            let limits = Limits {
                socket_buffer: 1,
                ..Limits::default()
            };
            let server = common::server().limits(limits.clone());
            let server = common::bind(channels_of(server)).await;
            let address = server.local_addr().to_string();
            let client = common::client(&server).limits(limits);
            echo(&client.connect(&address).await.expect("let in")).await;
            server.metrics().admitted
        }))
    });
    let admitted = real.join().expect("served");
    Seen::new("served", "", move || admitted)
}

async fn handshake() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    net.cut();
    let begun = Instant::now();
    let error = net.connect(testing::client(&server), &server).await;
    let error = error.expect_err("nobody answers");
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    Seen::new("unreachable", error, move || server.metrics().admitted).after(begun)
}

async fn auth() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let begun = Instant::now();
    let bare = bare(&net, &server).await;
    let error = bare.conn.closed().await;
    let quinn::ConnectionError::ApplicationClosed(close) = error else {
        panic!("{error}");
    };
    let code = CloseCode::new(close.error_code.into_inner());
    let text = String::from_utf8_lossy(&close.reason);
    let counted = move || word(&server.metrics().refused, "auth_timeout");
    Seen::new(code.name(), text, counted).after(begun)
}

async fn auth_failure() -> Seen {
    let net = Net::new(0);
    let server = testing::server().auth(|_: Hello| async { Err::<Peer, _>(Deny::auth_failed()) });
    let server = net.bind(server).await.expect("a free address");
    let begun = Instant::now();
    let reason = denied(net.connect(testing::client(&server), &server).await);
    Seen::closed(&reason, move || {
        word(&server.metrics().refused, "auth_failed")
    })
    .after(begun)
}

async fn frame_time() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let bare = bare(&net, &server).await;
    let _control = bare.enter("").await;
    let mut stream = bare.stream().await;
    stream.write(&open(1, "echo")).await;
    let begun = Instant::now();
    stream.write(&100_u32.to_be_bytes()).await;
    let reason = last(&mut stream).await;
    assert!(matches!(stream.message().await, Err(Ended::Fin)));
    let counted = move || channels_closed(&server.metrics(), CloseCode::FRAME_TIMEOUT);
    Seen::closed(&reason, counted).after(begun)
}

async fn idle() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let socket = connect(&net, &server).await;
    tokio::time::sleep(Duration::from_secs(100)).await;
    net.cut();
    let begun = Instant::now();
    let reason = socket.closed().await;
    let took = begun.elapsed();
    let mut seen = Seen::closed(&reason, move || {
        closed(&server.metrics(), CloseCode::TIMED_OUT)
    });
    seen.took = took;
    seen
}

async fn keep_alive() -> Seen {
    let timeouts = Timeouts {
        keep_alive: Duration::from_secs(30),
        ..Timeouts::default()
    };
    let error = testing::server()
        .timeouts(timeouts)
        .bind("127.0.0.1:0")
        .await;
    Seen::new(
        "setting",
        error.expect_err("never below the idle time"),
        || 0,
    )
}

async fn close() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let socket = connect(&net, &server).await;
    let channel = socket.open("deaf").await.expect("a channel");
    echo(&socket).await;
    // What is queued cannot be delivered any more.
    net.cut();
    channel.send("note", &()).await.expect("queued");
    let begun = Instant::now();
    let reason = socket.close(CloseCode::NORMAL, "done").await;
    Seen::closed(&reason, move || {
        closed(&socket.metrics(), CloseCode::NORMAL)
    })
    .after(begun)
}

async fn request() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let socket = connect(&net, &server).await;
    let channel = socket.open("deaf").await.expect("a channel");
    let begun = Instant::now();
    let error = channel
        .request::<_, ()>("ask", &())
        .await
        .expect_err("no answer");
    assert!(error.is_timeout(), "{error}");
    Seen::new("timeout", error, move || {
        socket.metrics().requests_timed_out
    })
    .after(begun)
}

async fn handler() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let socket = connect(&net, &server).await;
    let channel = socket.open("echo").await.expect("a channel");
    let begun = Instant::now();
    let asked = channel
        .request::<_, ()>("never", &())
        .timeout(Duration::from_secs(60))
        .await;
    let Err(RequestError::Fault(fault)) = asked else {
        panic!("{asked:?}");
    };
    let counted = move || word(&server.metrics().faults_sent, "timeout");
    Seen::new(&fault.code, &fault.message, counted).after(begun)
}

async fn resume() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let socket = comes_back(&net, &server, Limits::default()).await;
    let channel = resumable(&socket, "deaf").await;
    echo(&socket).await;
    net.cut();
    detached(&server, 1).await;
    let begun = Instant::now();
    detached(&server, 0).await;
    let took = begun.elapsed();
    net.mend();
    let reason = not_resumed(&channel).await;
    let mut seen = Seen::closed(&reason, move || {
        socket.metrics().sockets * word(&server.metrics().resumes_refused, "unknown")
    });
    seen.took = took;
    seen
}

/// Lets everybody in, and finds each token withdrawn when it looks again.
#[derive(Default)]
struct Once(AtomicBool);

impl Authenticate for Once {
    fn authenticate(&self, _: Hello) -> BoxFuture<'static, Result<Peer, Deny>> {
        Box::pin(std::future::ready(Ok(Peer::new("tester"))))
    }

    fn is_valid(&self, _: &Peer) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }
}

async fn recheck() -> Seen {
    let net = Net::new(0);
    let server = net.bind(testing::server().auth(Once::default())).await;
    let server = server.expect("a free address");
    let socket = connect(&net, &server).await;
    let begun = Instant::now();
    let reason = socket.closed().await;
    Seen::closed(&reason, move || server.metrics().revoked).after(begun)
}

async fn presence() -> Seen {
    let (net, server) = serve(Limits::default()).await;
    let watching = connect(&net, &server).await;
    let watch = watching.open("echo").await.expect("a channel");
    let goes = comes_back(&net, &server, Limits::default()).await;
    let channel = goes.open("echo").await.expect("a channel");
    channel.request::<_, ()>("track", "hall").await.expect("in");
    watch.request::<_, ()>("join", "hall").await.expect("in");
    let mut map = PresenceMap::new("hall");
    let state = watch.recv().await.expect("open").expect("a message");
    assert_eq!(map.apply(&state).map(|diff| diff.joins.len()), Some(1));
    net.cut_client(&goes);
    detached(&server, 1).await;
    net.mend_client(&goes);
    detached(&server, 0).await;
    // It was noticed within 10 ms.
    let begun = Instant::now() - Duration::from_millis(10);
    // Its channel ended with its connection, and it tracks nothing on another.
    let diff = watch.recv().await.expect("open").expect("a message");
    assert_eq!(map.apply(&diff).map(|diff| diff.leaves.len()), Some(1));
    Seen::new(diff.event(), "hall", move || {
        watching.metrics().sockets * server.metrics().resumed
    })
    .after(begun)
}
