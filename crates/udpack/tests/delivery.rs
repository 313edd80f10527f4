//! What resumable channels promise: numbered messages both ways through everything that happens to a
//! connection, none lost, none doubled, none out of order; and an honest word where that is not possible.

mod common;

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::{client, over_tcp, reconnect, server, timeouts};
use futures_util::future::BoxFuture;
use futures_util::stream;
use proptest::prelude::*;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use udpack::testing::Net;
use udpack::{
    Authenticate, Channel, ClientBuilder, CloseCode, Context, Deny, Drain, Fault, Hello, Identity,
    Items, Limits, Message, Peer, PresenceMap, Reconnect, RecvError, Router, SendError, Server,
    ServerBuilder, Socket, SocketState, SocketStates, Streaming, Timeouts,
};

/// Messages each way.
const MANY: u64 = 10_000;

/// Nothing here takes longer than this, on the paused clock.
async fn bounded<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(1200), future)
        .await
        .expect("it ends")
}

/// Sends the numbers at a pace, then finishes.
async fn count_up(
    channel: &Channel,
    numbers: std::ops::Range<u64>,
    pace: Duration,
) -> Result<(), SendError> {
    for number in numbers {
        channel.send("n", &number).await?;
        if number % 10 == 9 && !pace.is_zero() {
            tokio::time::sleep(pace).await;
        }
    }
    channel.finish().await
}

/// Everything that comes, until the peer finishes.
async fn listen(channel: &Channel) -> Result<Vec<u64>, RecvError> {
    let mut heard = Vec::new();
    while let Some(message) = channel.recv().await? {
        heard.push(message.data().expect("a number"));
    }
    Ok(heard)
}

/// A server that counts up on each `numbers` channel and tells what it heard there.
async fn counting_server(net: &Net, pace: Duration) -> (Server, mpsc::UnboundedReceiver<Vec<u64>>) {
    let (tell, heard) = mpsc::unbounded_channel();
    let builder = counting(pace, tell);
    (net.bind(builder).await.expect("an address"), heard)
}

fn counting(pace: Duration, tell: mpsc::UnboundedSender<Vec<u64>>) -> ServerBuilder {
    server()
        .timeouts(timeouts())
        .channel("numbers", move |channel: Channel| {
            let tell = tell.clone();
            async move {
                let (sent, heard) =
                    tokio::join!(count_up(&channel, 0..MANY, pace), listen(&channel));
                sent.expect("everything was sent");
                let _ = tell.send(heard.expect("the client finishes"));
            }
        })
}

async fn resumable(net: &Net, server: &Server) -> (Socket, Channel) {
    let builder = client(server).timeouts(timeouts()).reconnect(reconnect());
    let socket = net
        .connect(builder, server)
        .await
        .expect("the server lets us in");
    let channel = socket
        .channel("numbers")
        .resumable()
        .open()
        .await
        .expect("a channel");
    (socket, channel)
}

fn all() -> Vec<u64> {
    (0..MANY).collect()
}

/// How often the socket has connected, and whether the session went on each time.
fn connections(socket: &Socket) -> Arc<Mutex<Vec<bool>>> {
    let seen: Arc<Mutex<Vec<bool>>> = Arc::default();
    let mut states = socket.states();
    let list = seen.clone();
    tokio::spawn(async move {
        while let Some(state) = states.next().await {
            if let SocketState::Connected { resumed, .. } = state {
                list.lock().expect("sound").push(resumed);
            }
        }
    });
    seen
}

/// Counts both ways while `trouble` happens; returns whether each connection resumed the session.
async fn through<F: Future<Output = ()>>(
    net: &Net,
    pace: Duration,
    trouble: impl FnOnce(Socket) -> F,
) -> Vec<bool> {
    bounded(async {
        let (server, heard) = counting_server(net, pace).await;
        let (socket, channel) = resumable(net, &server).await;
        count(&socket, &channel, heard, pace, trouble(socket.clone())).await
    })
    .await
}

/// As [`through`], on a channel that is there.
async fn count(
    socket: &Socket,
    channel: &Channel,
    mut heard: mpsc::UnboundedReceiver<Vec<u64>>,
    pace: Duration,
    trouble: impl Future<Output = ()>,
) -> Vec<bool> {
    let connections = connections(socket);
    let counting = async {
        let (sent, ours) = tokio::join!(count_up(channel, 0..MANY, pace), listen(channel));
        sent.expect("everything was sent");
        let ours = ours.expect("the server finishes");
        let theirs = heard.recv().await.expect("the server tells");
        assert!(ours == all(), "to the client: {} messages", ours.len());
        assert!(theirs == all(), "to the server: {} messages", theirs.len());
    };
    tokio::select! {
        () = counting => {}
        () = async { trouble.await; std::future::pending().await } => {}
    }
    std::mem::take(&mut *connections.lock().expect("sound"))
}

/// The next time the socket is connected: whether its session goes on, and why not.
async fn again(states: &mut SocketStates) -> (bool, Option<String>) {
    loop {
        match states.next().await.expect("another state") {
            SocketState::Connected { resumed, reason } => return (resumed, reason),
            SocketState::Closed(reason) => panic!("gave up: {reason}"),
            _ => {}
        }
    }
}

/// Silence for so long that the connection is lost, then the socket is connected again.
async fn lose(net: &Net, socket: &Socket) {
    let mut states = socket.states();
    states.next().await.expect("the present state");
    net.cut_for(Duration::from_secs(12));
    assert_eq!(again(&mut states).await, (true, None));
}

#[tokio::test(start_paused = true)]
async fn two_seconds_of_silence_every_ten_do_not_even_reconnect() {
    let net = Net::new(1).delay(Duration::from_millis(20));
    let cuts = net.clone();
    // 10,000 messages over a minute: six cuts.
    let connections = through(&net, Duration::from_millis(60), |_| async move {
        loop {
            tokio::time::sleep(Duration::from_secs(8)).await;
            cuts.cut_for(Duration::from_secs(2));
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    })
    .await;
    assert_eq!(connections, [false], "one connection all the time");
}

#[tokio::test(start_paused = true)]
async fn a_silence_longer_than_the_idle_time_resumes_the_session_any_number_of_times() {
    let net = Net::new(2).delay(Duration::from_millis(20)).loss(0.01);
    let cuts = net.clone();
    let connections = through(&net, Duration::from_millis(60), |_| async move {
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_secs(6)).await;
            cuts.cut_for(Duration::from_secs(12));
            tokio::time::sleep(Duration::from_secs(12)).await;
        }
    })
    .await;
    assert!(connections.len() >= 5, "{connections:?}");
    assert!(
        connections[1..].iter().all(|resumed| *resumed),
        "{connections:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_change_of_address_does_not_reconnect() {
    if over_tcp() {
        // TCP does not outlive one.
        return;
    }
    let net = Net::new(3).delay(Duration::from_millis(20));
    let moves = net.clone();
    let connections = through(&net, Duration::from_millis(10), |socket| async move {
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            moves
                .move_client(&socket)
                .expect("a client of this network");
        }
    })
    .await;
    assert_eq!(connections, [false], "one connection all the time");
}

/// The `$open` itself is lost, and nothing but keep-alives had passed before.
#[tokio::test(start_paused = true)]
async fn a_loss_before_the_first_event_loses_nothing_either() {
    for (seed, opened) in [(4, true), (5, false)] {
        let net = Net::new(seed).delay(Duration::from_millis(20));
        bounded(async {
            let pace = Duration::from_millis(1);
            let (server, heard) = counting_server(&net, pace).await;
            let builder = client(&server).timeouts(timeouts()).reconnect(reconnect());
            let socket = net.connect(builder, &server).await.expect("let in");
            let mut channel = None;
            if opened {
                channel = Some(socket.channel("numbers").resumable().open().await);
            }
            net.cut();
            if !opened {
                channel = Some(socket.channel("numbers").resumable().open().await);
            }
            let channel = channel.expect("set").expect("a channel");
            tokio::time::sleep(Duration::from_secs(12)).await;
            net.mend();
            let done = std::future::pending();
            let connections = count(&socket, &channel, heard, pace, done).await;
            assert_eq!(connections.last(), Some(&true), "{connections:?}");
        })
        .await;
    }
}

/// The connection is lost again after each number of packets that the way back takes.
#[tokio::test(start_paused = true)]
async fn a_loss_at_any_step_of_the_way_back_is_one_more_loss() {
    for step in 0..40 {
        let net = Net::new(100 + step)
            .delay(Duration::from_millis(10))
            .jitter(Duration::from_millis(10));
        let cuts = net.clone();
        let connections = through(&net, Duration::from_millis(5), |_| async move {
            tokio::time::sleep(Duration::from_millis(700 + step)).await;
            cuts.cut_for(Duration::from_secs(8));
            for _ in 0..2 {
                // Silent: what arrives next belongs to the way back.
                tokio::time::sleep(Duration::from_secs(7)).await;
                let before = cuts.traffic().delivered;
                while cuts.traffic().delivered < before + step {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                cuts.cut_for(Duration::from_secs(8));
            }
        })
        .await;
        assert!(connections.len() >= 2, "step {step}: {connections:?}");
        assert!(
            connections[1..].iter().all(|resumed| *resumed),
            "step {step}: {connections:?}"
        );
    }
}

/// A step of an admission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The client's first packet, and what it repeats of it.
    Dial,
    /// `$hello`, on its way.
    Hello,
    /// What the verifier says to it.
    Verdict,
    /// `$welcome`, on its way.
    Welcome,
}

/// One way of the network that admissions are late on.
const WAY: Duration = Duration::from_millis(50);

/// Makes one step of one admission late.
#[derive(Clone)]
struct Late {
    net: Net,
    step: Stage,
    by: Duration,
    armed: Arc<AtomicBool>,
}

impl Late {
    fn is(&self, step: Stage) -> bool {
        self.step == step && self.armed.swap(false, Ordering::Relaxed)
    }

    /// The client dials now.
    fn dials(&self) {
        let Self { net, by, .. } = self.clone();
        if self.is(Stage::Dial) {
            net.cut_for(by);
        } else if self.is(Stage::Hello) {
            tokio::spawn(async move {
                // The handshake's answer has come, and `$hello` is on its way.
                tokio::time::sleep(2 * WAY + WAY / 2).await;
                net.cut_for(by);
            });
        }
    }
}

impl Authenticate for Late {
    fn authenticate(&self, hello: Hello) -> BoxFuture<'static, Result<Peer, Deny>> {
        let late = self.clone();
        Box::pin(async move {
            if hello.token() != common::TOKEN {
                return Err(Deny::auth_failed());
            }
            if late.is(Stage::Verdict) {
                tokio::time::sleep(late.by).await;
            } else if late.is(Stage::Welcome) {
                late.net.cut_for(late.by);
            }
            Ok(Peer::new("tester"))
        })
    }
}

#[tokio::test(start_paused = true)]
async fn an_admission_that_is_late_at_any_named_step_loses_nothing() {
    for step in [Stage::Dial, Stage::Hello, Stage::Verdict, Stage::Welcome] {
        for by in [100, 500, 1_000, 2_600, 5_200, 10_000, 20_000, 60_000] {
            let net = Net::new(by).delay(WAY);
            let late = Late {
                net: net.clone(),
                step,
                by: Duration::from_millis(by),
                armed: Arc::default(),
            };
            bounded(async {
                let pace = Duration::from_millis(5);
                let (tell, heard) = mpsc::unbounded_channel();
                let server = counting(pace, tell).auth(late.clone());
                let server = net.bind(server).await.expect("an address");
                let dials = late.clone();
                let token = move || {
                    dials.dials();
                    std::future::ready(Ok::<_, String>(common::TOKEN.to_owned()))
                };
                let builder = client(&server).token_with(token);
                let builder = builder.timeouts(timeouts()).reconnect(reconnect());
                let socket = net.connect(builder, &server).await.expect("let in");
                let channel = socket.channel("numbers").resumable().open().await;
                let channel = channel.expect("a channel");
                let trouble = async {
                    tokio::time::sleep(Duration::from_millis(700)).await;
                    let mut states = socket.states();
                    net.cut();
                    while !matches!(states.next().await, Some(SocketState::Reconnecting { .. })) {}
                    net.mend();
                    late.armed.store(true, Ordering::Relaxed);
                };
                let connections = count(&socket, &channel, heard, pace, trouble).await;
                let armed = late.armed.load(Ordering::Relaxed);
                assert!(!armed, "{step:?} was not late by {by} ms");
                assert!(
                    connections.len() >= 2 && connections[1..].iter().all(|resumed| *resumed),
                    "{step:?} late by {by} ms: {connections:?}"
                );
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_real_addresses_does_not_reconnect() {
    if over_tcp() {
        return;
    }
    let all = async {
        let pace = Duration::from_millis(1);
        let (tell, heard) = mpsc::unbounded_channel();
        let server = common::bind(counting(pace, tell)).await;
        let builder = client(&server).timeouts(timeouts()).reconnect(reconnect());
        let address = server.local_addr().to_string();
        let socket = builder.connect(&address).await.expect("let in");
        let channel = socket.channel("numbers").resumable().open().await;
        let channel = channel.expect("a channel");
        let trouble = async {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(150)).await;
                let here = "127.0.0.1:0".parse().expect("an address");
                socket.rebind(here).expect("a free port");
            }
        };
        count(&socket, &channel, heard, pace, trouble).await
    };
    assert_eq!(
        common::bounded(all).await,
        [false],
        "one connection all the time"
    );
}

/// What came so far.
type Heard = Arc<Mutex<Vec<u64>>>;

async fn note(channel: &Channel, heard: &Heard) -> Result<(), RecvError> {
    while let Some(message) = channel.recv().await? {
        let number = message.data().expect("a number");
        heard.lock().expect("sound").push(number);
    }
    Ok(())
}

/// Where the numbers of both directions stand, across servers and channels.
#[derive(Clone, Default)]
struct Tally {
    /// The next number for the client.
    next: Arc<AtomicU64>,
    heard: Heard,
}

impl Tally {
    /// A server that goes on counting on each channel where the one before left off, until its client stops.
    fn server(&self) -> ServerBuilder {
        let tally = self.clone();
        server()
            .timeouts(timeouts())
            .channel("numbers", move |channel: Channel| {
                let tally = tally.clone();
                async move {
                    let sending = tally.send(&channel, &tally.next, Duration::from_millis(10));
                    let sending = async {
                        if sending.await.is_ok() {
                            let _ = channel.finish().await;
                        }
                        std::future::pending().await
                    };
                    tokio::select! {
                        biased;
                        heard = note(&channel, &tally.heard) => heard,
                        () = sending => Ok(()),
                    }
                }
            })
    }

    async fn send(
        &self,
        channel: &Channel,
        next: &AtomicU64,
        pace: Duration,
    ) -> Result<(), SendError> {
        while next.load(Ordering::Relaxed) < MANY {
            let number = next.load(Ordering::Relaxed);
            channel.send("n", &number).await?;
            next.store(number + 1, Ordering::Relaxed);
            if number % 10 == 9 {
                tokio::time::sleep(pace).await;
            }
        }
        Ok(())
    }

    /// Counts both ways, on a new channel whenever one has `moved`; returns how many channels that took.
    async fn client(&self, socket: &Socket) -> usize {
        let (next, heard, mut channels) = (AtomicU64::new(0), Heard::default(), 0);
        loop {
            let channel = socket.channel("numbers").resumable().open().await;
            let channel = channel.expect("a channel");
            channels += 1;
            let (sent, ended) = tokio::join!(
                self.send(&channel, &next, Duration::from_millis(10)),
                note(&channel, &heard)
            );
            if let Err(error) = sent {
                let SendError::Closed(reason) = error else {
                    panic!("{error}");
                };
                assert_eq!(reason.code, CloseCode::MOVED);
            }
            match ended {
                Err(error) => assert_eq!(error.reason().code, CloseCode::MOVED),
                Ok(()) if heard.lock().expect("sound").len() == all().len() => {
                    channel.finish().await.expect("the server hears everything");
                    break;
                }
                Ok(()) => {}
            }
        }
        assert!(*heard.lock().expect("sound") == all(), "to the client");
        assert!(*self.heard.lock().expect("sound") == all(), "to the server");
        channels
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_drains_hands_its_clients_over_without_loss() {
    bounded(async {
        let net = Net::new(6).delay(Duration::from_millis(20));
        let tally = Tally::default();
        let first = net.bind(tally.server()).await.expect("an address");
        let second = net.bind(tally.server()).await.expect("an address");
        let builder = client(&first)
            .timeouts(timeouts())
            .reconnect(reconnect())
            .fallback(second.local_addr().to_string(), Some(second.fingerprint()));
        let socket = net.connect(builder, &first).await.expect("let in");
        let mut states = socket.states();
        states.next().await.expect("the present state");
        let drain = Drain::within(Duration::from_secs(20)).spread(Duration::from_secs(4));
        let draining = async {
            let signal = tokio::time::sleep(Duration::from_secs(3));
            first.run_until(signal, drain).await.expect("drained");
        };
        let ((), channels) = tokio::join!(draining, tally.client(&socket));
        assert_eq!(channels, 2);
        let state = states.next().await.expect("a state");
        assert!(matches!(state, SocketState::GoingAway(_)), "{state:?}");
        assert!(
            !again(&mut states).await.0,
            "another server, another session"
        );
        assert_eq!(second.sockets().len(), 1);
        assert_eq!(socket.close_reason(), None);
    })
    .await;
}

/// A channel that is on its way to a server when that begins to drain is served, and moves like any other.
#[tokio::test(start_paused = true)]
async fn a_channel_on_its_way_to_a_draining_server_is_served_and_moves() {
    bounded(async {
        for millis in [0, 1, 19, 20, 21, 39, 40] {
            let net = Net::new(8).delay(Duration::from_millis(20));
            let (tell, mut heard) = mpsc::unbounded_channel();
            let serve = move |channel: Channel| {
                let tell = tell.clone();
                async move {
                    let _ = tell.send(listen(&channel).await.expect("the client finishes"));
                }
            };
            let first = server().timeouts(timeouts()).channel("numbers", serve);
            let first = net.bind(first).await.expect("an address");
            let second = server().channel("numbers", |_: Channel| async {});
            let second = net.bind(second).await.expect("an address");
            let builder = client(&first)
                .timeouts(timeouts())
                .reconnect(reconnect())
                .fallback(second.local_addr().to_string(), Some(second.fingerprint()));
            let socket = net.connect(builder, &first).await.expect("let in");
            let channel = socket.channel("numbers").resumable().open().await;
            let channel = channel.expect("a channel");
            channel.send("n", &1_u64).await.expect("queued");
            let signal = tokio::time::sleep(Duration::from_millis(millis));
            let draining = first.run_until(signal, Drain::within(Duration::from_secs(20)));
            let read = async {
                while let Ok(Some(_)) = channel.recv().await {}
                channel.closed().await
            };
            let (drained, ended) = tokio::join!(draining, read);
            drained.expect("drained");
            assert_eq!(ended.code, CloseCode::MOVED, "{millis} ms: {ended}");
            assert_eq!(heard.recv().await, Some(vec![1]), "{millis} ms");
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn two_hundred_clients_move_one_after_the_other() {
    bounded(async {
        let net = Net::new(7).delay(Duration::from_millis(5));
        let times: Arc<Mutex<Vec<Instant>>> = Arc::default();
        let note = times.clone();
        let first = net
            .bind(Tally::default().server())
            .await
            .expect("an address");
        let second = Tally::default().server().connection(move |_| {
            note.lock().expect("sound").push(Instant::now());
            async {}
        });
        let second = net.bind(second).await.expect("an address");
        let (mut sockets, mut channels) = (Vec::new(), Vec::new());
        for number in 0..200 {
            let builder = client(&first)
                .timeouts(timeouts())
                .reconnect(reconnect())
                .fallback(second.local_addr().to_string(), Some(second.fingerprint()));
            let socket = net.connect(builder, &first).await.expect("let in");
            // Those that have nothing to end are let go at once, and wait for their turn without a connection.
            if number % 2 == 0 {
                channels.push(socket.open("numbers").await.expect("a channel"));
            }
            sockets.push(socket);
        }
        let drain = Drain::within(Duration::from_secs(30)).spread(Duration::from_secs(20));
        let begun = Instant::now();
        first
            .run_until(std::future::ready(()), drain)
            .await
            .expect("drained");
        tokio::time::sleep_until(begun + Duration::from_secs(25)).await;
        let times = times.lock().expect("sound").clone();
        assert_eq!(times.len(), 200);
        let mut seconds = [0; 21];
        for time in times {
            let second = usize::try_from((time - begun).as_secs()).expect("soon");
            seconds[second.min(20)] += 1;
        }
        // Ten a second on average.
        assert!(seconds.iter().all(|count| *count <= 15), "{seconds:?}");
        assert!(seconds[..20].iter().all(|count| *count >= 5), "{seconds:?}");
        assert!(sockets.iter().all(|socket| socket.close_reason().is_none()));
    })
    .await;
}

/// Counts both ways until the session cannot go on after `trouble`. Both sides must have heard a beginning of
/// what was said, the rest must be among what is reported as unconfirmed, and the socket must be of use again.
/// Returns the reason that the client is told.
async fn broken(
    net: &Net,
    server: &Server,
    builder: ClientBuilder,
    tally: &Tally,
    trouble: impl Future<Output = ()>,
) -> Option<String> {
    let builder = builder.timeouts(timeouts()).reconnect(reconnect());
    let socket = net.connect(builder, server).await.expect("let in");
    let channel = socket.channel("numbers").resumable().open().await;
    let channel = channel.expect("a channel");
    let mut states = socket.states();
    states.next().await.expect("the present state");
    let (next, heard) = (AtomicU64::new(0), Heard::default());
    let sending = async {
        loop {
            let number = next.load(Ordering::Relaxed);
            if let Err(error) = channel.send("n", &number).await {
                break error;
            }
            next.store(number + 1, Ordering::Relaxed);
            if number % 10 == 9 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    let (error, ended, ()) = tokio::join!(sending, note(&channel, &heard), trouble);
    let SendError::Closed(reason) = error else {
        panic!("{error}");
    };
    assert_eq!(reason.code, CloseCode::NOT_RESUMED);
    let ended = ended.expect_err("not an end in order");
    assert_eq!(ended.reason().code, CloseCode::NOT_RESUMED);
    assert_eq!(channel.closed().await.code, CloseCode::NOT_RESUMED);
    let (resumed, why) = again(&mut states).await;
    assert!(!resumed);

    let (sent, left) = (next.load(Ordering::Relaxed), channel.unconfirmed());
    let arrived = {
        let theirs = tally.heard.lock().expect("sound");
        assert!(
            theirs.iter().copied().eq(0..theirs.len() as u64),
            "to the server"
        );
        theirs.len() as u64
    };
    assert!(arrived > 0 && arrived <= sent, "{arrived} of {sent}");
    assert!(
        left > 0 && sent - arrived <= left,
        "{arrived} of {sent}, {left} unconfirmed"
    );
    let ours = heard.lock().expect("sound").clone();
    assert!(
        ours.iter().copied().eq(0..ours.len() as u64),
        "to the client"
    );
    assert!(ours.len() as u64 <= tally.next.load(Ordering::Relaxed));

    let channel = socket.channel("numbers").resumable().open().await;
    let channel = channel.expect("a channel");
    channel
        .finish()
        .await
        .expect("the server has heard the end");
    why
}

#[tokio::test(start_paused = true)]
async fn a_server_that_restarts_says_that_it_knows_nothing() {
    bounded(async {
        let net = Net::new(8).delay(Duration::from_millis(20));
        let tally = Tally::default();
        let identity = Identity::generate().expect("a key");
        let builder = || tally.server().identity(identity.clone());
        let victim = net.bind(builder()).await.expect("an address");
        let address = victim.local_addr();
        let builder_again = builder();
        let restart = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            net.take_down(&victim);
            net.bind_at(builder_again, address).await.expect("free")
        };
        let next = Arc::new(Mutex::new(None));
        let trouble = async {
            *next.lock().expect("sound") = Some(restart.await);
        };
        let reason = broken(&net, &victim, client(&victim), &tally, trouble).await;
        assert_eq!(reason.as_deref(), Some("unknown"));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_session_waits_for_its_client_no_longer_than_it_says() {
    bounded(async {
        let net = Net::new(9).delay(Duration::from_millis(20));
        let tally = Tally::default();
        let brief = Timeouts {
            resume: Duration::from_secs(10),
            ..timeouts()
        };
        let server = net
            .bind(tally.server().timeouts(brief))
            .await
            .expect("an address");
        let trouble = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            net.cut_for(Duration::from_secs(30));
        };
        let reason = broken(&net, &server, client(&server), &tally, trouble).await;
        assert_eq!(reason.as_deref(), Some("unknown"));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_keeps_no_sessions_says_so() {
    bounded(async {
        let net = Net::new(10).delay(Duration::from_millis(20));
        let tally = Tally::default();
        let none = Timeouts {
            resume: Duration::ZERO,
            ..timeouts()
        };
        let server = net
            .bind(tally.server().timeouts(none))
            .await
            .expect("an address");
        let trouble = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            net.cut_for(Duration::from_secs(10));
        };
        let reason = broken(&net, &server, client(&server), &tally, trouble).await;
        assert_eq!(reason.as_deref(), Some("off"));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_session_does_not_go_on_for_somebody_else() {
    bounded(async {
        let net = Net::new(11).delay(Duration::from_millis(20));
        let tally = Tally::default();
        let by_name = tally.server().auth(|hello: Hello| {
            let peer = Peer::new(hello.token());
            async move { Ok::<_, Deny>(peer) }
        });
        let server = net.bind(by_name).await.expect("an address");
        let name = Arc::new(Mutex::new("anna".to_owned()));
        let asked = name.clone();
        let builder = client(&server).token_with(move || {
            let name = asked.lock().expect("sound").clone();
            async move { Ok::<_, std::convert::Infallible>(name) }
        });
        let trouble = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            "bert".clone_into(&mut name.lock().expect("sound"));
            net.cut_for(Duration::from_secs(10));
        };
        let reason = broken(&net, &server, builder, &tally, trouble).await;
        assert_eq!(reason.as_deref(), Some("identity"));
    })
    .await;
}

/// Both ends of a session on this network.
async fn ends(net: &Net, server: ServerBuilder, limits: Limits) -> (Server, Socket, Socket) {
    let server = net
        .bind(server.timeouts(timeouts()))
        .await
        .expect("an address");
    let (here, there) = visitor(net, &server, limits).await;
    (server, here, there)
}

/// One more client of a server that hands its sockets out.
async fn visitor(net: &Net, server: &Server, limits: Limits) -> (Socket, Socket) {
    let builder = client(server)
        .timeouts(timeouts())
        .reconnect(reconnect())
        .limits(limits);
    let (here, there) = tokio::join!(net.connect(builder, server), server.accept());
    (here.expect("let in"), there.expect("a socket"))
}

/// A resumable channel that `from` opens, and its other end.
async fn channel(from: &Socket, to: &Socket) -> (Channel, Channel) {
    let opening = from.channel("c").resumable().open();
    let (here, there) = tokio::join!(opening, to.accept_channel());
    let (here, there) = (here.expect("a channel"), there.expect("its other end"));
    assert!(here.is_resumable() && there.is_resumable());
    (here, there)
}

async fn next(channel: &Channel) -> Message {
    channel.recv().await.expect("alive").expect("a message")
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_the_server_opened_goes_on_as_well() {
    bounded(async {
        let net = Net::new(12).delay(Duration::from_millis(20));
        let (_server, here, there) = ends(&net, server(), Limits::default()).await;
        let (theirs, ours) = channel(&there, &here).await;
        let pace = Duration::from_millis(10);
        let (sent, heard, back, returned, ()) = tokio::join!(
            count_up(&theirs, 0..MANY, pace),
            listen(&ours),
            count_up(&ours, 0..MANY, pace),
            listen(&theirs),
            async {
                for _ in 0..2 {
                    tokio::time::sleep(Duration::from_secs(2)).await;
                    lose(&net, &here).await;
                }
            }
        );
        sent.expect("everything was sent");
        back.expect("everything was sent");
        assert!(heard.expect("an end in order") == all());
        assert!(returned.expect("an end in order") == all());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn requests_and_streams_of_items_go_on_after_a_loss() {
    bounded(async {
        let net = Net::new(13).delay(Duration::from_millis(20));
        let router = Router::new()
            .on("slow", |n: u64, _: Context| async move {
                tokio::time::sleep(Duration::from_secs(3)).await;
                Ok::<_, Fault>(n)
            })
            .on("sum", |mut items: Items<u64>| async move {
                let mut sum = 0;
                while let Some(n) = items.next().await {
                    sum += n.map_err(|error| error.to_string())?;
                }
                Ok::<_, Fault>(sum)
            })
            .on("count", |most: u64, _: Context| async move {
                Ok::<_, Fault>(Streaming::new(stream::iter(0..most)))
            })
            .concurrency(8);
        let builder = server().timeouts(timeouts()).channel("rpc", router);
        let server = net.bind(builder).await.expect("an address");
        let builder = client(&server).timeouts(timeouts()).reconnect(reconnect());
        let here = net.connect(builder, &server).await.expect("let in");
        let rpc = here
            .channel("rpc")
            .resumable()
            .open()
            .await
            .expect("a channel");
        let minute = Duration::from_secs(60);
        // Paced, so that the loss falls into the middle of it.
        let numbers = stream::unfold(0_u64, |n| async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            (n < MANY).then_some((n, n + 1))
        });
        let taken = async {
            let mut items = rpc
                .request("count", &MANY)
                .timeout(minute)
                .items::<u64>()
                .await
                .expect("items");
            let mut taken = Vec::new();
            while let Some(item) = items.next().await {
                taken.push(item.expect("an item"));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            taken
        };
        let (slow, acked, sum, taken, ()) = tokio::join!(
            rpc.request::<_, u64>("slow", &7).timeout(minute),
            rpc.send_acked("slow", &8).timeout(minute),
            rpc.request::<_, u64>("sum", &())
                .with_items(numbers)
                .timeout(minute),
            taken,
            async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                lose(&net, &here).await;
            }
        );
        assert_eq!(slow.expect("an answer"), 7);
        acked.expect("done");
        assert_eq!(sum.expect("a sum"), MANY * (MANY - 1) / 2);
        assert!(taken == all());
    })
    .await;
}

/// Large frames, cut off in the middle: by silences, shorter and longer than the idle time, both of them
/// longer than a frame may take.
#[tokio::test(start_paused = true)]
async fn a_frame_that_was_begun_when_the_path_fell_silent_arrives_whole() {
    for (seed, silence) in [(14, 4), (15, 12)] {
        bounded(async {
            let net = Net::new(seed)
                .delay(Duration::from_millis(20))
                .rate(200_000);
            let times = Timeouts {
                frame: Duration::from_secs(3),
                ..timeouts()
            };
            let server = net
                .bind(server().timeouts(times.clone()))
                .await
                .expect("an address");
            let builder = client(&server).timeouts(times).reconnect(reconnect());
            let (here, there) = tokio::join!(net.connect(builder, &server), server.accept());
            let (here, there) = (here.expect("let in"), there.expect("a socket"));
            let (ours, theirs) = channel(&here, &there).await;
            let send = async |channel: &Channel| {
                for n in 0..12_u8 {
                    let payload = Bytes::from(vec![n; 400_000]);
                    let header = std::collections::BTreeMap::from([("n", n)]);
                    channel
                        .send_bulk("b", &header, "bytes", payload)
                        .await
                        .expect("queued");
                }
                channel.finish().await.expect("confirmed");
            };
            let hear = async |channel: &Channel| {
                for n in 0..12_u8 {
                    let bytes = next(channel).await.bulk("bytes").expect("bytes");
                    assert!(bytes.len() == 400_000 && bytes.iter().all(|byte| *byte == n));
                }
                assert!(channel.recv().await.expect("in order").is_none());
            };
            tokio::join!(
                send(&ours),
                hear(&theirs),
                send(&theirs),
                hear(&ours),
                async {
                    for _ in 0..2 {
                        tokio::time::sleep(Duration::from_millis(3100)).await;
                        net.cut_for(Duration::from_secs(silence));
                        tokio::time::sleep(Duration::from_secs(silence)).await;
                    }
                }
            );
        })
        .await;
    }
}

/// Waits until neither side keeps a channel.
async fn nothing_kept(here: &Socket, there: &Socket) {
    while here.channels() + there.channels() > 0 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_ends_without_a_connection_ends_in_order_with_the_next() {
    let code = CloseCode::new(0x1234);
    for how in ["finish", "close", "drop"] {
        for own in [true, false] {
            bounded(async {
                let net = Net::new(16).delay(Duration::from_millis(20));
                let (_server, here, there) = ends(&net, server(), Limits::default()).await;
                let (ours, theirs) = channel(&here, &there).await;
                ours.send("n", &0).await.expect("queued");
                next(&theirs).await;
                let (near, far) = if own { (ours, theirs) } else { (theirs, ours) };
                net.cut();
                tokio::time::sleep(Duration::from_secs(8)).await;
                for n in 1..100_u64 {
                    near.send("n", &n).await.expect("queued");
                }
                let finished = match how {
                    "finish" => Some(near),
                    "close" => {
                        drop(near.close(code, "enough"));
                        None
                    }
                    _ => {
                        drop(near);
                        None
                    }
                };
                let ending = async {
                    if let Some(near) = &finished {
                        near.finish().await.expect("confirmed");
                    }
                };
                let hearing = async {
                    for n in 1..100_u64 {
                        assert_eq!(next(&far).await.data::<u64>().expect("a number"), n);
                    }
                    match far.recv().await {
                        Ok(end) => assert!(end.is_none() && how != "close"),
                        Err(error) => {
                            assert_eq!((error.reason().code, how), (code, "close"));
                        }
                    }
                };
                let mending = async {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    net.mend();
                };
                tokio::join!(ending, hearing, mending);
                if let Some(near) = finished {
                    let (done, end) = tokio::join!(far.finish(), near.recv());
                    done.expect("confirmed");
                    assert!(end.expect("in order").is_none());
                }
                drop(far);
                nothing_kept(&here, &there).await;
                // The next loss finds nothing that it could repeat.
                lose(&net, &here).await;
                let (ours, theirs) = channel(&here, &there).await;
                ours.send("n", &1).await.expect("queued");
                next(&theirs).await;
            })
            .await;
        }
    }
}

/// Sent and forgotten: the word that everything was received is lost with the connection.
#[tokio::test(start_paused = true)]
async fn a_channel_that_is_over_at_the_other_side_is_not_served_twice() {
    for cut in 0..30 {
        bounded(async {
            let net = Net::new(17).delay(Duration::from_millis(20));
            let heard = Heard::default();
            let served = heard.clone();
            let builder = server()
                .timeouts(timeouts())
                .channel("note", move |channel: Channel| {
                    let heard = served.clone();
                    async move { note(&channel, &heard).await }
                });
            let server = net.bind(builder).await.expect("an address");
            let builder = client(&server).timeouts(timeouts()).reconnect(reconnect());
            let here = net.connect(builder, &server).await.expect("let in");
            let channel = here
                .channel("note")
                .resumable()
                .open()
                .await
                .expect("a channel");
            for n in 0..10_u64 {
                channel.send("n", &n).await.expect("queued");
            }
            drop(channel);
            tokio::time::sleep(Duration::from_millis(5 * cut)).await;
            lose(&net, &here).await;
            tokio::time::sleep(Duration::from_secs(5)).await;
            let heard = heard.lock().expect("sound").clone();
            assert!(heard.iter().copied().eq(0..10), "cut {cut}: {heard:?}");
        })
        .await;
    }
}

/// What was read ahead and not taken is repeated: taken while the channel finds its way, it must not count too.
#[tokio::test(start_paused = true)]
async fn a_reader_that_lags_hears_nothing_twice() {
    bounded(async {
        let net = Net::new(24).delay(Duration::from_millis(20));
        let (_server, here, there) = ends(&net, server(), Limits::default()).await;
        let (ours, theirs) = channel(&here, &there).await;
        for n in 0..100_u64 {
            assert!(theirs.try_send("n", &n).expect("alive"));
        }
        assert_eq!(next(&ours).await.data::<u64>().expect("a number"), 0);
        lose(&net, &here).await;
        for n in 1..100_u64 {
            // More than one while the channel waits to be opened again.
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert_eq!(next(&ours).await.data::<u64>().expect("a number"), n);
        }
        let (done, end) = tokio::join!(theirs.finish(), ours.recv());
        done.expect("confirmed");
        assert!(end.expect("in order").is_none());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn members_of_rooms_stay_and_miss_nothing() {
    bounded(async {
        let net = Net::new(18).delay(Duration::from_millis(20));
        let (server, here, there) = ends(&net, server(), Limits::default()).await;
        let (watcher, watched) = visitor(&net, &server, Limits::default()).await;
        let (ours, theirs) = channel(&here, &there).await;
        let (eyes, eyes_there) = channel(&watcher, &watched).await;
        eyes_there.join("hall").expect("joined");
        theirs.track("hall", &"here").expect("tracked");
        let mut map = PresenceMap::new("hall");
        while map.is_empty() {
            map.apply(&next(&eyes).await).expect("about the presence");
        }
        while next(&ours).await.event() != "presence_state" {}

        let mut states = here.states();
        states.next().await.expect("the present state");
        net.cut_client_for(&here, Duration::from_secs(12));
        for n in 0..100_u64 {
            let sent = server.rooms().to("hall").send("n", &n).expect("encoded");
            assert_eq!((sent.delivered, sent.dropped), (2, 0));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(again(&mut states).await, (true, None));
        theirs.track("hall", &"here").expect("tracked");
        // Longer than one may take to track again.
        tokio::time::sleep(Duration::from_secs(20)).await;
        server.rooms().to("hall").send("n", &100).expect("encoded");
        for n in 0..=100_u64 {
            for channel in [&ours, &eyes] {
                let message = next(channel).await;
                assert_eq!((message.event(), message.data().ok()), ("n", Some(n)));
            }
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_is_bounded_and_a_full_queue_goes_on_afterwards() {
    let by_messages = Limits {
        replay_messages: 100,
        ..Limits::default()
    };
    let by_bytes = Limits {
        replay_bytes: 4 << 10,
        ..Limits::default()
    };
    let in_all = Limits {
        resume_bytes: 4 << 10,
        ..Limits::default()
    };
    for limits in [by_messages, by_bytes, in_all] {
        bounded(async {
            let net = Net::new(19).delay(Duration::from_millis(20));
            let (_server, here, there) = ends(&net, server(), limits).await;
            let (ours, theirs) = channel(&here, &there).await;
            net.cut();
            tokio::time::sleep(Duration::from_secs(8)).await;
            let mut sent = 0_u64;
            while ours.try_send("n", &sent).expect("alive") {
                sent += 1;
                assert!(sent <= 4096, "no bound");
            }
            assert!(sent >= 50, "{sent}");
            assert_eq!(ours.unconfirmed(), sent);
            let waiting = ours.send("n", &sent);
            tokio::pin!(waiting);
            let wait = tokio::time::timeout(Duration::from_secs(5), &mut waiting);
            assert!(wait.await.is_err(), "it waits");
            net.mend();
            let sending = async {
                waiting.await.expect("queued");
                ours.finish().await.expect("confirmed");
            };
            let ((), heard) = tokio::join!(sending, listen(&theirs));
            assert!(heard.expect("in order").into_iter().eq(0..=sent));
            assert_eq!((ours.unconfirmed(), ours.queued_bytes()), (0, 0));
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_keeps_only_so_many_sessions_without_a_connection() {
    bounded(async {
        let net = Net::new(20).delay(Duration::from_millis(20));
        let one = Limits {
            detached_sockets: 1,
            ..Limits::default()
        };
        let (server, anna, _there) = ends(&net, server().limits(one), Limits::default()).await;
        let (bert, _there) = visitor(&net, &server, Limits::default()).await;
        let mut states = [anna.states(), bert.states()];
        for states in &mut states {
            states.next().await.expect("the present state");
        }
        net.cut_for(Duration::from_secs(12));
        let [a, b] = &mut states;
        let mut ends = [again(a).await, again(b).await];
        ends.sort();
        assert_eq!(ends, [(false, Some("unknown".to_owned())), (true, None)]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_goes_while_its_client_is_away_loses_nothing_silently() {
    bounded(async {
        let net = Net::new(21).delay(Duration::from_millis(20));
        let tally = Tally::default();
        let first = net.bind(tally.server()).await.expect("an address");
        let second = net.bind(tally.server()).await.expect("an address");
        let builder =
            client(&first).fallback(second.local_addr().to_string(), Some(second.fingerprint()));
        let trouble = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            net.cut_for(Duration::from_secs(12));
            tokio::time::sleep(Duration::from_secs(8)).await;
            let begun = Instant::now();
            let drain = Drain::within(Duration::from_secs(60));
            first
                .run_until(std::future::ready(()), drain)
                .await
                .expect("drained");
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "it waits for nobody"
            );
        };
        let reason = broken(&net, &first, builder, &tally, trouble).await;
        assert_eq!(reason.as_deref(), Some("unknown"));
        assert_eq!(second.sockets().len(), 1);
    })
    .await;
}

/// A socket that has lost its connection and tries to come back, with a channel.
async fn away(net: &Net, reconnect: Reconnect) -> (Server, Socket, Channel) {
    let server = net
        .bind(server().timeouts(timeouts()))
        .await
        .expect("an address");
    let builder = client(&server).timeouts(timeouts()).reconnect(reconnect);
    let here = net.connect(builder, &server).await.expect("let in");
    let channel = here
        .channel("c")
        .resumable()
        .open()
        .await
        .expect("a channel");
    net.cut();
    let mut states = here.states();
    while !matches!(
        states.next().await,
        Some(SocketState::Reconnecting { attempt: 2, .. })
    ) {}
    (server, here, channel)
}

#[tokio::test(start_paused = true)]
async fn closing_a_socket_that_is_away_takes_no_time() {
    bounded(async {
        let net = Net::new(22);
        let (_server, here, channel) = away(&net, reconnect()).await;
        let begun = Instant::now();
        assert_eq!(
            here.close(CloseCode::NORMAL, "").await.code,
            CloseCode::NORMAL
        );
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "{:?}",
            begun.elapsed()
        );
        assert!(channel.recv().await.expect("normal").is_none());
        assert!(channel.send("n", &1).await.expect_err("over").is_closed());
        assert!(matches!(here.state(), SocketState::Closed(_)));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn channels_that_nobody_reads_keep_little_and_stop_no_other() {
    let limits = Limits {
        resume_bytes: 256 << 10,
        ..Limits::default()
    };
    bounded(async {
        let net = Net::new(24).delay(Duration::from_millis(20));
        let (_server, here, there) = ends(&net, server(), limits).await;
        let block = "x".repeat(1 << 10);
        let (mut unread, mut kept) = (Vec::new(), 0);
        for _ in 0..16 {
            let (ours, theirs) = channel(&here, &there).await;
            while ours.try_send("n", &block).expect("alive") {}
            kept += ours.queued_bytes();
            unread.push((ours, theirs));
        }
        assert!(kept >= (256 << 10) + 12 * (64 << 10), "{kept}");
        assert!(kept <= (256 << 10) + 16 * (66 << 10), "{kept}");
        let (ours, theirs) = channel(&here, &there).await;
        for number in 0..1000_u64 {
            ours.send("n", &number).await.expect("alive");
            assert_eq!(next(&theirs).await.data::<u64>().expect("a number"), number);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_sent_away_each_time_comes_back_less_and_less_often() {
    bounded(async {
        let net = Net::new(25);
        let visits = Arc::new(AtomicUsize::new(0));
        let count = visits.clone();
        let builder = server().connection(move |socket| {
            count.fetch_add(1, Ordering::Relaxed);
            async move { socket.abort(CloseCode::RATE_LIMITED, "not so often") }
        });
        let server = net.bind(builder).await.expect("an address");
        let builder = client(&server).reconnect(Reconnect::default());
        let socket = net.connect(builder, &server).await;
        tokio::time::sleep(Duration::from_secs(600)).await;
        // At once, a few times, and then a wait of 15 s on average.
        let visits = visits.load(Ordering::Relaxed);
        assert!((8..160).contains(&visits), "{visits}");
        drop(socket);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_socket_gives_up_when_its_patience_ends() {
    let patient = Reconnect {
        patience: Duration::from_secs(20),
        ..reconnect()
    };
    let thrice = Reconnect {
        attempts: Some(3),
        ..reconnect()
    };
    for policy in [patient, thrice] {
        bounded(async {
            let net = Net::new(23);
            let (_server, here, channel) = away(&net, policy).await;
            let begun = Instant::now();
            let reason = here.closed().await;
            assert!(
                begun.elapsed() < Duration::from_secs(50),
                "{:?}",
                begun.elapsed()
            );
            assert_eq!(here.state(), SocketState::Closed(reason.clone()));
            assert!(reason.retry, "{reason}");
            let error = channel.recv().await.expect_err("not in order");
            assert_eq!(error.reason().code, reason.code);
            assert!(channel.send("n", &1).await.expect_err("over").is_closed());
            assert!(here.open("c").await.is_err());
        })
        .await;
    }
}

/// One thing that happens in a session.
#[derive(Debug, Clone)]
enum Step {
    Open {
        client: bool,
    },
    Send {
        end: usize,
        count: u64,
    },
    /// The application takes so many more messages at this end.
    Take {
        end: usize,
        count: usize,
    },
    Finish {
        end: usize,
    },
    Close {
        end: usize,
    },
    Drop {
        end: usize,
    },
    Cut,
    Mend,
    /// Silence until both sides have lost the connection, and a little of what follows.
    Lose {
        then: u64,
    },
    Move,
    Wait {
        millis: u64,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let end = 0..12_usize;
    let step = prop_oneof![
        3 => any::<bool>().prop_map(|client| Step::Open { client }),
        8 => (end.clone(), 1..200_u64).prop_map(|(end, count)| Step::Send { end, count }),
        6 => (end.clone(), 1..150_usize).prop_map(|(end, count)| Step::Take { end, count }),
        1 => end.clone().prop_map(|end| Step::Finish { end }),
        1 => end.clone().prop_map(|end| Step::Close { end }),
        1 => end.prop_map(|end| Step::Drop { end }),
        2 => Just(Step::Cut),
        3 => Just(Step::Mend),
        4 => (0..400_u64).prop_map(|then| Step::Lose { then }),
        1 => Just(Step::Move),
        6 => (0..120_u64).prop_map(|millis| Step::Wait { millis }),
    ];
    proptest::collection::vec(step, 10..60)
}

/// One end of a channel, with somebody who takes as many messages as the steps permit.
struct Party {
    channel: Option<Channel>,
    permits: Arc<Semaphore>,
    heard: Heard,
    reader: tokio::task::JoinHandle<()>,
    sent: u64,
    /// This end refuses what still comes.
    deaf: bool,
    ended: bool,
}

impl Party {
    fn new(channel: Channel) -> Self {
        let (permits, heard) = (Arc::new(Semaphore::new(0)), Heard::default());
        let (reader, may, list) = (channel.clone(), permits.clone(), heard.clone());
        let reader = tokio::spawn(async move {
            loop {
                may.acquire().await.expect("open").forget();
                match reader.recv().await {
                    Ok(Some(message)) => {
                        let number = message.data().expect("a number");
                        list.lock().expect("sound").push(number);
                    }
                    Ok(None) | Err(_) => break,
                }
            }
        });
        Self {
            channel: Some(channel),
            permits,
            heard,
            reader,
            sent: 0,
            deaf: false,
            ended: false,
        }
    }

    fn send(&mut self, count: u64) {
        for _ in 0..count {
            match self
                .channel
                .as_ref()
                .map(|channel| channel.try_send("n", &self.sent))
            {
                Some(Ok(true)) => self.sent += 1,
                _ => break,
            }
        }
    }
}

type Parties = Arc<Mutex<std::collections::BTreeMap<usize, Party>>>;

/// Takes the channels that the peer opens; the name tells which.
fn accept(socket: &Socket, parties: &Parties) {
    let (socket, parties) = (socket.clone(), parties.clone());
    tokio::spawn(async move {
        while let Some(channel) = socket.accept_channel().await {
            let number = channel.name().parse().expect("a number");
            let twice = parties
                .lock()
                .expect("sound")
                .insert(number, Party::new(channel));
            assert!(twice.is_none(), "channel {number} was opened twice");
        }
    });
}

async fn play(seed: u64, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let net = Net::new(seed)
        .delay(Duration::from_millis(10))
        .jitter(Duration::from_millis(10))
        .loss(0.02);
    let (_server, here, there) = ends(&net, server(), Limits::default()).await;
    let parties = Parties::default();
    accept(&here, &parties);
    accept(&there, &parties);
    let mut opening = tokio::task::JoinSet::new();
    let mut opened = 0;
    for step in steps {
        match step {
            // The ends of the n-th channel are numbers 2n, which opened it, and 2n + 1.
            Step::Open { client } if opened < 6 => {
                let (from, parties, number) = (
                    if client { &here } else { &there }.clone(),
                    parties.clone(),
                    opened,
                );
                opened += 1;
                opening.spawn(async move {
                    let name = (2 * number + 1).to_string();
                    // A server without its client opens nothing.
                    let channel = from.channel(&name).resumable().open().await.ok()?;
                    parties
                        .lock()
                        .expect("sound")
                        .insert(2 * number, Party::new(channel));
                    Some(number)
                });
            }
            Step::Open { .. } => {}
            Step::Send { end, count } => {
                if let Some(party) = parties.lock().expect("sound").get_mut(&end) {
                    party.send(count);
                }
            }
            Step::Take { end, count } => {
                if let Some(party) = parties.lock().expect("sound").get_mut(&end) {
                    party.permits.add_permits(count);
                }
            }
            Step::Finish { end } => {
                if let Some(party) = parties.lock().expect("sound").get_mut(&end)
                    && let Some(channel) = &party.channel
                {
                    // It acts when it is polled first.
                    let _ = futures_util::FutureExt::now_or_never(channel.finish());
                    party.ended = true;
                }
            }
            Step::Close { end } => {
                if let Some(party) = parties.lock().expect("sound").get_mut(&end)
                    && let Some(channel) = &party.channel
                {
                    drop(channel.close(CloseCode::new(0x1234), "enough"));
                    party.deaf = true;
                    party.ended = true;
                }
            }
            Step::Drop { end } => {
                if let Some(party) = parties.lock().expect("sound").get_mut(&end) {
                    party.reader.abort();
                    party.channel = None;
                    party.deaf = true;
                    party.ended = true;
                }
            }
            Step::Cut => net.cut(),
            Step::Mend => net.mend(),
            Step::Lose { then } => {
                net.cut();
                tokio::time::sleep(Duration::from_secs(7)).await;
                net.mend();
                tokio::time::sleep(Duration::from_millis(then)).await;
            }
            Step::Move => {
                if !over_tcp() {
                    net.move_client(&here);
                }
            }
            Step::Wait { millis } => tokio::time::sleep(Duration::from_millis(millis)).await,
        }
    }
    net.mend();
    let mut numbers = Vec::new();
    while let Some(number) = opening.join_next().await {
        numbers.extend(number.expect("no panic"));
    }
    for number in &numbers {
        while !parties
            .lock()
            .expect("sound")
            .contains_key(&(2 * number + 1))
        {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let mut parties = std::mem::take(&mut *parties.lock().expect("sound"));
    for party in parties.values_mut() {
        party.permits.add_permits(1 << 20);
        if let Some(channel) = &party.channel {
            let _ = futures_util::FutureExt::now_or_never(channel.finish());
        }
    }
    for party in parties.values_mut() {
        if let Err(error) = (&mut party.reader).await {
            prop_assert!(error.is_cancelled(), "{error}");
        }
    }
    for number in numbers {
        for (from, to) in [(2 * number, 2 * number + 1), (2 * number + 1, 2 * number)] {
            let (from, to) = (&parties[&from], &parties[&to]);
            let heard = to.heard.lock().expect("sound").clone();
            prop_assert!(heard.iter().copied().eq(0..heard.len() as u64), "{heard:?}");
            prop_assert!(heard.len() as u64 <= from.sent);
            if !to.deaf {
                prop_assert_eq!(heard.len() as u64, from.sent, "channel {}", number);
            }
        }
    }
    drop(parties);
    nothing_kept(&here, &there).await;
    prop_assert_eq!(here.close_reason(), None);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens, each side hears a beginning of what the other said, and all of it unless it refused.
    #[test]
    fn whatever_happens_each_side_hears_what_was_said(seed in any::<u64>(), steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(bounded(play(seed, steps)))?;
    }
}
