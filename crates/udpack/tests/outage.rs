//! What an outage of the path does to a session: what a connection lent returns with it, and what is busy outlives
//! a silence as long as its connection does.

mod common;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{client, reconnect, server, timeouts};
use futures_util::future::BoxFuture;
use serde_bytes::ByteBuf;
use udpack::testing::Net;
use udpack::{
    Authenticate, Channel, CloseCode, Context, Deny, Drain, Fault, Hello, Limits, Peer, Priority,
    Reconnect, Router, Server, ServerBuilder, Socket, SocketState,
};

/// Nothing here takes longer than this, on the paused clock.
async fn bounded<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(3600), future)
        .await
        .expect("it ends")
}

/// Both ends of a session on this network.
async fn ends(net: &Net, server: ServerBuilder, limits: Limits) -> (Server, Socket, Socket) {
    let server = net
        .bind(server.timeouts(timeouts()))
        .await
        .expect("an address");
    let builder = client(&server)
        .timeouts(timeouts())
        .reconnect(reconnect())
        .limits(limits);
    let (here, there) = tokio::join!(net.connect(builder, &server), server.accept());
    let (here, there) = (here.expect("let in"), there.expect("a socket"));
    (server, here, there)
}

/// A channel that `from` opens, and its other end.
async fn channel(from: &Socket, to: &Socket, priority: Priority, keep: bool) -> (Channel, Channel) {
    let opening = from.channel("c").priority(priority);
    let opening = match keep {
        true => opening.resumable(),
        false => opening,
    };
    let (here, there) = tokio::join!(opening.open(), to.accept_channel());
    (here.expect("a channel"), there.expect("its other end"))
}

/// Silence for so long that the connection is lost, then the socket is connected again.
async fn lose(net: &Net, socket: &Socket) {
    let mut states = socket.states();
    states.next().await.expect("the present state");
    net.cut_for(Duration::from_secs(12));
    loop {
        match states.next().await.expect("another state") {
            SocketState::Connected { resumed, .. } => return assert!(resumed),
            SocketState::Closed(reason) => panic!("gave up: {reason}"),
            _ => {}
        }
    }
}

/// Sends without end.
async fn flood(channel: Channel) {
    let block = ByteBuf::from(vec![7; 100_000]);
    while channel.send("block", &block).await.is_ok() {}
}

/// Takes everything.
async fn drink(channel: Channel) {
    while let Ok(Some(_)) = channel.recv().await {}
}

/// What was under way when a connection was lost is not waited for on the next one. Every handle of the channels that
/// ended is kept, as a program may: they keep QUIC's state of the old connections, with all bytes in it.
#[tokio::test(start_paused = true)]
async fn what_a_lost_connection_lent_is_there_again_on_the_next() {
    for (seed, (from_client, keep)) in (0..).zip([(true, false), (false, false), (true, true)]) {
        bounded(async {
            let net = Net::new(seed)
                .delay(Duration::from_millis(20))
                .rate(1_000_000);
            let (_server, here, there) = ends(&net, server(), Limits::default()).await;
            let (from, to) = match from_client {
                true => (&here, &there),
                false => (&there, &here),
            };
            let mut held = Vec::new();
            let mut tasks = tokio::task::JoinSet::new();
            // A session is kept for its channels.
            held.push(channel(&here, &there, Priority::Normal, true).await);
            for _ in 0..2 {
                for priority in [Priority::Bulk, Priority::Bulk, Priority::Normal] {
                    let (busy, other) = channel(from, to, priority, keep).await;
                    tasks.spawn(flood(busy.clone()));
                    tasks.spawn(drink(other.clone()));
                    held.push((busy, other));
                }
                tokio::time::sleep(Duration::from_secs(2)).await;
                net.cut();
                tasks.abort_all();
                lose(&net, &here).await;
                for priority in [Priority::High, Priority::Normal, Priority::Bulk] {
                    let (ours, theirs) = channel(from, to, priority, false).await;
                    // More than bulk channels may have under way together.
                    let blocks = 20;
                    let sent = async {
                        let block = ByteBuf::from(vec![7; 100_000]);
                        for _ in 0..blocks {
                            ours.send("block", &block).await.expect("alive");
                        }
                        ours.finish().await.expect("all was taken");
                    };
                    let counted = async {
                        let mut count = 0;
                        while theirs.recv().await.expect("alive").is_some() {
                            count += 1;
                        }
                        count
                    };
                    let moved = async { tokio::join!(sent, counted).1 };
                    let moved = tokio::time::timeout(Duration::from_secs(120), moved).await;
                    assert_eq!(moved, Ok(blocks), "{priority:?}, kept {keep}");
                }
            }
            drop(held);
        })
        .await;
    }
}

/// A resumable channel to a server that answers each number with itself, and how often it has answered.
async fn asking(net: &Net, server: ServerBuilder) -> (Server, Socket, Channel, Arc<AtomicU64>) {
    let answered = Arc::new(AtomicU64::new(0));
    let counted = answered.clone();
    let answers = Router::new().on("same", move |number: u64, _: Context| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move { Ok::<_, Fault>(number) }
    });
    let server = server.timeouts(timeouts()).channel("c", answers);
    let server = net.bind(server).await.expect("an address");
    let builder = client(&server).timeouts(timeouts()).reconnect(reconnect());
    let socket = net.connect(builder, &server).await.expect("let in");
    let channel = socket.channel("c").resumable().open().await;
    let channel = channel.expect("a channel");
    let first: u64 = channel.request("same", &1).await.expect("answered");
    assert_eq!(first, 1);
    (server, socket, channel, answered)
}

/// Silence until the connection is lost; then the moment at which so many packets of the way back have arrived.
async fn on_the_way_back(net: &Net, packets: u64) {
    net.cut_for(Duration::from_secs(12));
    tokio::time::sleep(Duration::from_secs(11)).await;
    let before = net.traffic().delivered;
    while net.traffic().delivered < before + packets {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Whatever part of an admission takes long, a client that gives it up does not take its session with it.
#[tokio::test(start_paused = true)]
async fn an_admission_that_is_late_at_any_step_costs_no_session() {
    for late in [100, 2_600, 5_200, 20_000, 60_000] {
        for step in 1..9 {
            bounded(async {
                let net = Net::new(step).delay(Duration::from_millis(50));
                let (server, socket, channel, _) = asking(&net, server()).await;
                let mut states = socket.states();
                states.next().await.expect("the present state");
                on_the_way_back(&net, step).await;
                let usual = net.path();
                net.set_path(udpack::testing::Path {
                    delay: Duration::from_millis(late),
                    ..usual.clone()
                });
                tokio::time::sleep(Duration::from_millis(300)).await;
                net.set_path(usual);
                let again = channel
                    .request::<_, u64>("same", &2)
                    .timeout(Duration::from_secs(600))
                    .await;
                assert_eq!(again.ok(), Some(2), "{late} ms at step {step}");
                let refused = server.metrics().resumes_refused;
                let refused: u64 = refused.values().sum();
                assert_eq!(refused, 0, "{late} ms at step {step}");
            })
            .await;
        }
    }
}

/// A verifier that finds a withdrawn token, as a token file does.
struct Knows(Arc<AtomicBool>);

impl Authenticate for Knows {
    fn authenticate(&self, _: Hello) -> BoxFuture<'static, Result<Peer, Deny>> {
        let good = self.0.load(Ordering::Relaxed);
        Box::pin(async move {
            match good {
                true => Ok(Peer::new("anna")),
                false => Err(Deny::auth_failed()),
            }
        })
    }

    fn is_valid(&self, _: &Peer) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_revoked_at_any_packet_of_its_way_back_answers_nothing_more() {
    for step in 0..40 {
        bounded(async {
            let net = Net::new(step)
                .delay(Duration::from_millis(10))
                .jitter(Duration::from_millis(10));
            let good = Arc::new(AtomicBool::new(true));
            let verifier = server().auth(Knows(good.clone()));
            let (server, socket, channel, answered) = asking(&net, verifier).await;
            on_the_way_back(&net, step).await;
            good.store(false, Ordering::Relaxed);
            server.revoke(|_| true);
            let before = answered.load(Ordering::Relaxed);
            let asked = channel
                .request::<_, u64>("same", &2)
                .timeout(Duration::from_secs(60))
                .await;
            assert!(asked.is_err(), "step {step}: {asked:?}");
            assert_eq!(answered.load(Ordering::Relaxed), before, "step {step}");
            let reason = socket.closed().await;
            let codes = [CloseCode::AUTH_REVOKED, CloseCode::AUTH_FAILED];
            assert!(codes.contains(&reason.code), "step {step}: {reason}");
            assert!(server.sockets().is_empty(), "step {step}");
        })
        .await;
    }
}

/// A server names a wait of years; the client waits for as long as its own policy says.
#[tokio::test(start_paused = true)]
async fn no_server_makes_a_client_wait_longer_than_its_patience() {
    bounded(async {
        let net = Net::new(1);
        let server = net.bind(server()).await.expect("an address");
        let policy = Reconnect {
            patience: Duration::from_secs(60),
            ..reconnect()
        };
        let socket = net.connect(client(&server).reconnect(policy), &server);
        let socket = socket.await.expect("let in");
        let years = Duration::from_secs(1 << 40);
        let drain = Drain::within(Duration::from_secs(1)).spread(years);
        let drained = server.run_until(std::future::ready(()), drain).await;
        drained.expect("it served until then");
        let reason = socket.closed().await;
        assert!(reason.retry, "{reason}");
    })
    .await;
}

const MINUTE: Duration = Duration::from_secs(60);

/// 1 MB/s and 20 ms: windows are full within a second.
fn slow_net() -> Net {
    Net::new(3).delay(Duration::from_millis(20)).rate(1_000_000)
}

/// `sink` reads what comes, `source` sends without an end, `echo` answers, `hall` joins a room.
async fn serve(net: &Net) -> Server {
    let builder = udpack::testing::server()
        .channel("sink", |channel: Channel| async move {
            while let Ok(Some(_)) = channel.recv().await {}
        })
        .channel("source", |channel: Channel| async move {
            while channel.send("blob", &blob()).await.is_ok() {}
        })
        .channel("hall", |channel: Channel| async move {
            let _ = channel.join("hall");
            while let Ok(Some(_)) = channel.recv().await {}
        })
        .channel(
            "echo",
            Router::new().on("say", |said: String, _: Context| async move {
                Ok::<_, Fault>(said)
            }),
        );
    net.bind(builder).await.expect("a server")
}

async fn connect(net: &Net, server: &Server) -> Socket {
    let client = udpack::testing::client(server).reconnect(Reconnect::default());
    net.connect(client, server).await.expect("let in")
}

fn blob() -> ByteBuf {
    ByteBuf::from(vec![0; 100_000])
}

async fn open(socket: &Socket, name: &str, priority: Priority, resumable: bool) -> Channel {
    let opener = socket.channel(name).priority(priority);
    let opener = if resumable {
        opener.resumable()
    } else {
        opener
    };
    opener.open().await.expect("a channel")
}

/// Waits until the socket is connected again.
async fn comes_back(socket: &Socket) {
    let mut states = socket.states();
    while !socket.is_connected() {
        tokio::time::timeout(3 * MINUTE, states.next())
            .await
            .expect("in time");
    }
}

async fn answers(channel: &Channel) -> bool {
    let reply = channel.request::<_, String>("say", "hello");
    reply
        .timeout(MINUTE)
        .await
        .is_ok_and(|said| said == "hello")
}

/// Every priority sends on a socket that has lost a connection with much under way, in both directions.
#[tokio::test(start_paused = true)]
async fn what_was_under_way_at_a_loss_burdens_no_later_connection() {
    for (name, priority, resumable) in [
        ("sink", Priority::Normal, false),
        ("sink", Priority::Bulk, false),
        ("sink", Priority::Bulk, true),
        ("source", Priority::Bulk, false),
        ("source", Priority::Bulk, true),
    ] {
        let net = slow_net();
        let server = serve(&net).await;
        let socket = connect(&net, &server).await;
        // The handle outlives the connection, as a program may keep it.
        let busy = open(&socket, name, priority, resumable).await;
        let worker = tokio::spawn({
            let busy = busy.clone();
            async move {
                match name {
                    "sink" => while busy.send("blob", &blob()).await.is_ok() {},
                    _ => while let Ok(Some(_)) = busy.recv().await {},
                }
            }
        });
        for lost in 1..=2 {
            tokio::time::sleep(Duration::from_secs(3)).await;
            net.cut_for(Duration::from_secs(45));
            tokio::time::sleep(Duration::from_secs(46)).await;
            comes_back(&socket).await;
            for priority in [Priority::High, Priority::Normal, Priority::Bulk] {
                let echo = open(&socket, "echo", priority, false).await;
                assert!(
                    answers(&echo).await,
                    "{name} {priority:?} resumable {resumable}, connection {lost} lost"
                );
            }
        }
        worker.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_busy_channel_lives_through_a_cut_as_long_as_its_connection() {
    for (priority, resumable) in [
        (Priority::Normal, false),
        (Priority::Normal, true),
        (Priority::Bulk, false),
        (Priority::Bulk, true),
    ] {
        for seconds in [8, 12, 25] {
            let net = slow_net();
            let server = serve(&net).await;
            let socket = connect(&net, &server).await;
            let busy = open(&socket, "sink", priority, resumable).await;
            let sender = tokio::spawn({
                let busy = busy.clone();
                async move { while busy.send("blob", &blob()).await.is_ok() {} }
            });
            tokio::time::sleep(Duration::from_secs(3)).await;
            net.cut_for(Duration::from_secs(seconds));
            let ended = tokio::time::timeout(MINUTE, busy.closed()).await;
            // QUIC repeats what is lost at intervals that double, so a busy connection may be silent for twice as
            // long as its path. Where that is beyond the idle time it is lost, and its channel with it.
            let lost = ended.as_ref().is_ok_and(|reason| {
                [CloseCode::TIMED_OUT, CloseCode::PEER_RESTARTED].contains(&reason.code)
            });
            assert!(
                ended.is_err() || (lost && seconds > 15 && !resumable),
                "{priority:?} resumable {resumable}, silent for {seconds} s: {ended:?}"
            );
            assert_eq!(socket.metrics().slow_peers, 0);
            sender.abort();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_cut_below_the_idle_time_costs_no_quiet_channel_and_no_member_of_a_room() {
    for seconds in [8, 25] {
        for resumable in [false, true] {
            let net = Net::new(3).delay(Duration::from_millis(20));
            let server = serve(&net).await;
            let socket = connect(&net, &server).await;
            let echo = open(&socket, "echo", Priority::Normal, resumable).await;
            let hall = open(&socket, "hall", Priority::Normal, resumable).await;
            assert!(answers(&echo).await);
            net.cut_for(Duration::from_secs(seconds));
            for number in 0..60_u32 {
                server.rooms().to("hall").send("n", &number).expect("sent");
                echo.send("say", "once a second")
                    .await
                    .expect("the channel lives");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            assert!(answers(&echo).await, "silent for {seconds} s");
            for number in 0..60_u32 {
                let message = tokio::time::timeout(MINUTE, hall.recv())
                    .await
                    .expect("in time");
                let message = message.expect("the channel lives").expect("a message");
                assert_eq!(message.data::<u32>().expect("a number"), number);
            }
        }
    }
}

/// A large frame that comes slowly, and a silence longer than its time in the middle of it.
#[tokio::test(start_paused = true)]
async fn a_silence_within_a_large_frame_is_not_the_sender_being_slow() {
    for resumable in [false, true] {
        for begins in [5, 9, 14] {
            let net = Net::new(3).delay(Duration::from_millis(20)).rate(20_000);
            let times = udpack::Timeouts {
                frame: Duration::from_secs(10),
                ..udpack::Timeouts::default()
            };
            let server = udpack::testing::server().timeouts(times).accept_channels();
            let server = net.bind(server).await.expect("an address");
            let (here, there) = tokio::join!(connect(&net, &server), server.accept());
            let there = there.expect("a socket");
            let (ours, theirs) = tokio::join!(
                open(&here, "c", Priority::Normal, resumable),
                there.accept_channel()
            );
            let theirs = theirs.expect("its other end");
            // 50 seconds of it.
            let large = ByteBuf::from(vec![7; 1_000_000]);
            ours.send("large", &large).await.expect("queued");
            let net = net.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(begins)).await;
                net.cut_for(Duration::from_secs(12));
            });
            let came = tokio::time::timeout(10 * MINUTE, theirs.recv()).await;
            let came = came.expect("in time").expect("the channel lives");
            assert!(came.expect("a message").len() > 1_000_000);
        }
    }
}
