//! What resumable channels promise: numbered messages both ways through everything that happens to a
//! connection, none lost, none doubled, none out of order; and an honest word where that is not possible.

mod common;

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{client, server};
use tokio::sync::mpsc;
use udpack::testing::Net;
use udpack::{
    Channel, ClientBuilder, CloseCode, Deny, Drain, Hello, Identity, Limits, Peer, Reconnect,
    RecvError, SendError, Server, ServerBuilder, Socket, SocketState, SocketStates, Timeouts,
};

/// Messages each way.
const MANY: u64 = 10_000;

/// Time-outs that make a lost connection show within seconds.
fn timeouts() -> Timeouts {
    Timeouts {
        idle: Duration::from_secs(5),
        keep_alive: Duration::from_secs(1),
        ..Timeouts::default()
    }
}

fn reconnect() -> Reconnect {
    Reconnect {
        first: Duration::from_millis(50),
        most: Duration::from_secs(2),
        ..Reconnect::default()
    }
}

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
    let connections = connections.lock().expect("sound").clone();
    connections
}

/// The next time the socket is connected: whether its session goes on, and why not.
async fn again(states: &mut SocketStates) -> (bool, Option<String>) {
    loop {
        match states.next().await.expect("another state") {
            SocketState::Connected { resumed, reason } => return (resumed, reason),
            SocketState::GaveUp(reason) => panic!("gave up: {reason}"),
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_real_addresses_does_not_reconnect() {
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

#[tokio::test(start_paused = true)]
async fn two_hundred_clients_move_one_after_the_other() {
    bounded(async {
        let net = Net::new(7).delay(Duration::from_millis(5));
        let times: Arc<Mutex<Vec<tokio::time::Instant>>> = Arc::default();
        let note = times.clone();
        let first = net
            .bind(Tally::default().server())
            .await
            .expect("an address");
        let second = Tally::default().server().connection(move |_| {
            note.lock()
                .expect("sound")
                .push(tokio::time::Instant::now());
            async {}
        });
        let second = net.bind(second).await.expect("an address");
        let mut sockets = Vec::new();
        for _ in 0..200 {
            let builder = client(&first)
                .timeouts(timeouts())
                .reconnect(reconnect())
                .fallback(second.local_addr().to_string(), Some(second.fingerprint()));
            sockets.push(net.connect(builder, &first).await.expect("let in"));
        }
        let drain = Drain::within(Duration::from_secs(30)).spread(Duration::from_secs(20));
        let begun = tokio::time::Instant::now();
        first
            .run_until(std::future::ready(()), drain)
            .await
            .expect("drained");
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
    channel.send("n", &sent).await.expect("queued");
    channel.recv().await.expect("alive").expect("a message");
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
