//! Sessions on networks that let no UDP pass, from the beginning or from some moment on.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{client, reconnect, server, timeouts};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use udpack::testing::Net;
use udpack::{
    Channel, ClientBuilder, ConnectError, Deny, Hello, Peer, Server, ServerBuilder, Socket,
    SocketState, Timeouts, Transport, TransportChoice, TransportReason,
};

/// Messages each way.
const MANY: u64 = 10_000;

async fn bounded<F: Future>(future: F) -> F::Output {
    let output = tokio::time::timeout(Duration::from_secs(1200), future).await;
    output.expect("it ends")
}

async fn count_up(channel: &Channel) {
    for number in 0..MANY {
        channel.send("n", &number).await.expect("sent");
        if number % 10 == 9 {
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    }
    channel.finish().await.expect("finished");
}

/// Sends numbers without looking at what comes until the socket is back on QUIC, and some more; says how many.
async fn flood(socket: &Socket, channel: &Channel) -> u64 {
    let (mut number, mut more) = (0, 500);
    while more > 0 {
        channel.send("n", &number).await.expect("sent");
        number += 1;
        more -= u64::from(socket.transport() == Transport::Quic);
        if number % 20 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    channel.finish().await.expect("finished");
    number
}

async fn heard(channel: &Channel) -> Vec<u64> {
    let mut all = Vec::new();
    while let Some(message) = channel.recv().await.expect("a message") {
        all.push(message.data().expect("a number"));
    }
    all
}

/// The transports of a socket, one after the other, and whether its session went on over each.
fn watch(socket: &Socket) -> JoinHandle<Vec<(bool, bool)>> {
    let mut states = socket.states();
    let watched = socket.clone();
    tokio::spawn(async move {
        let mut ways = Vec::new();
        while let Some(state) = states.next().await {
            if let SocketState::Connected { resumed, .. } = state {
                ways.push((watched.transport() == Transport::Quic, resumed));
            }
        }
        ways
    })
}

/// The changes of a socket's transport, as they are told.
fn changes(socket: &Socket) -> JoinHandle<Vec<(Transport, Transport, TransportReason)>> {
    let mut states = socket.states();
    tokio::spawn(async move {
        let mut changes = Vec::new();
        while let Some(state) = states.next().await {
            if let SocketState::TransportChanged { from, to, why } = state {
                changes.push((from, to, why));
            }
        }
        changes
    })
}

const TCP: Transport = Transport::WebSocket { origin: None };

/// A server with a channel of numbers, and where it tells what it was sent.
fn numbers() -> (ServerBuilder, mpsc::UnboundedReceiver<Vec<u64>>) {
    let (tell, told) = mpsc::unbounded_channel();
    let builder = server()
        .timeouts(timeouts())
        .channel("numbers", move |channel: Channel| {
            let tell = tell.clone();
            async move {
                let ((), all) = tokio::join!(count_up(&channel), heard(&channel));
                let _ = tell.send(all);
            }
        });
    (builder, told)
}

/// A server that says each number back.
fn echo() -> ServerBuilder {
    server()
        .timeouts(timeouts())
        .channel("echo", |channel: Channel| async move {
            while let Ok(Some(message)) = channel.recv().await {
                let number: u64 = message.data().expect("a number");
                channel.send("n", &number).await.expect("sent");
            }
        })
}

fn auto(server: &Server) -> ClientBuilder {
    client(server)
        .timeouts(timeouts())
        .reconnect(reconnect())
        .transport(TransportChoice::Auto)
}

/// UDP stops to pass in the middle of numbered messages both ways, and passes again 30 s later.
#[tokio::test(start_paused = true)]
async fn a_session_goes_over_to_tcp_and_back_with_udp_and_loses_nothing() {
    bounded(async {
        let net = Net::new(1).delay(Duration::from_millis(20));
        let (builder, mut told) = numbers();
        let server = net.bind(builder).await.expect("an address");
        let socket = net.connect(auto(&server), &server).await.expect("let in");
        let reason = socket.transport_reason();
        assert_eq!(reason, Some(TransportReason::UdpPasses));
        let (ways, changed) = (watch(&socket), changes(&socket));
        let channel = socket.channel("numbers").resumable().open();
        let channel = channel.await.expect("a channel");
        let firewall = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            net.block_udp(true);
            tokio::time::sleep(Duration::from_secs(30)).await;
            net.block_udp(false);
        };
        let ((), all, ()) = tokio::join!(count_up(&channel), heard(&channel), firewall);
        let sent: Vec<_> = (0..MANY).collect();
        assert!(all == sent, "to the client: {}", all.len());
        let all = told.recv().await.expect("the server tells");
        assert!(all == sent, "to the server: {}", all.len());
        let reason = socket.transport_reason();
        assert_eq!(reason, Some(TransportReason::UdpPassesAgain));
        socket.close(udpack::CloseCode::NORMAL, "").await;
        drop(socket);
        let ways = ways.await.expect("no panic");
        assert_eq!(ways, [(true, false), (false, true), (true, true)]);
        let changed = changed.await.expect("no panic");
        let expected = [
            (Transport::Quic, TCP, TransportReason::UdpBlocked),
            (TCP, Transport::Quic, TransportReason::UdpPassesAgain),
        ];
        assert_eq!(changed, expected);
    })
    .await;
}

/// The session goes over while both sides send as fast as they can, at many moments.
#[tokio::test(start_paused = true)]
async fn the_way_back_to_udp_costs_a_busy_session_nothing_at_any_moment() {
    for seed in 0..12 {
        bounded(async {
            let net = Net::new(seed)
                .delay(Duration::from_millis(5 + 3 * seed))
                .rate(100_000);
            net.block_udp(true);
            let server = net.bind(echo()).await.expect("an address");
            let socket = net.connect(auto(&server), &server).await.expect("let in");
            assert_eq!(socket.transport(), TCP, "seed {seed}");
            let changed = changes(&socket);
            net.block_udp(false);
            let channel = socket.channel("echo").resumable().open();
            let channel = channel.await.expect("a channel");
            let (sent, all) = tokio::join!(flood(&socket, &channel), heard(&channel));
            let expected: Vec<_> = (0..sent).collect();
            assert!(all == expected, "seed {seed}: {} of {sent}", all.len());
            assert_eq!(server.sockets().len(), 1, "seed {seed}");
            socket.close(udpack::CloseCode::NORMAL, "").await;
            drop(socket);
            assert_eq!(changed.await.expect("no panic").len(), 1, "seed {seed}");
        })
        .await;
    }
}

/// A channel that would end with the connection keeps the session there, also while only the peer has something to say.
#[tokio::test(start_paused = true)]
async fn a_session_stays_on_tcp_while_a_channel_would_end_with_the_connection() {
    bounded(async {
        let net = Net::new(4).delay(Duration::from_millis(20));
        net.block_udp(true);
        let server = net.bind(echo()).await.expect("an address");
        let socket = net.connect(auto(&server), &server).await.expect("let in");
        net.block_udp(false);
        let channel = socket.open("echo").await.expect("a channel");
        for number in 0..200_u64 {
            channel.send("n", &number).await.expect("it lives");
            let answer = channel.recv().await.expect("it lives").expect("an answer");
            assert_eq!(answer.data::<u64>().expect("a number"), number);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(socket.transport(), TCP);
        // What this side has ended may still have an answer to come.
        channel.send("n", &200_u64).await.expect("it lives");
        channel.finish().await.expect("all was taken");
        tokio::time::sleep(Duration::from_secs(200)).await;
        let answer = channel.recv().await.expect("it lives").expect("an answer");
        assert_eq!(answer.data::<u64>().expect("a number"), 200);
        assert_eq!(socket.transport(), TCP);
        let mut states = socket.states();
        drop(channel);
        while socket.transport() == TCP {
            states.next().await.expect("it lives");
        }
        assert_eq!(socket.transport(), Transport::Quic);
        assert!(socket.is_connected());
    })
    .await;
}

/// A network that lets handshakes pass and loses what comes behind them is not tried again at once.
#[tokio::test(start_paused = true)]
async fn a_session_whose_way_back_fails_goes_on_over_tcp() {
    bounded(async {
        let net = Net::new(5).delay(Duration::from_millis(20));
        net.block_udp(true);
        let (builder, mut told) = numbers();
        let server = net.bind(builder).await.expect("an address");
        let socket = net.connect(auto(&server), &server).await.expect("let in");
        let changed = changes(&socket);
        let channel = socket.channel("numbers").resumable().open();
        let channel = channel.await.expect("a channel");
        let net = &net;
        let firewall = async {
            net.block_udp(false);
            let mut states = socket.states();
            while socket.transport() == TCP {
                states.next().await.expect("it lives");
            }
            net.block_udp(true);
        };
        let ((), all, ()) = tokio::join!(count_up(&channel), heard(&channel), firewall);
        let sent: Vec<_> = (0..MANY).collect();
        assert!(all == sent, "to the client: {}", all.len());
        let all = told.recv().await.expect("the server tells");
        assert!(all == sent, "to the server: {}", all.len());
        assert_eq!(socket.transport(), TCP);
        socket.close(udpack::CloseCode::NORMAL, "").await;
        drop(socket);
        let whys: Vec<_> = changed.await.expect("no panic");
        let whys: Vec<_> = whys.into_iter().map(|(.., why)| why).collect();
        use TransportReason::{UdpBlocked, UdpPassesAgain};
        assert_eq!(whys, [UdpPassesAgain, UdpBlocked]);
    })
    .await;
}

/// The path ends while the server answers the hello on it: nobody waits as long for that as for a slow server.
#[tokio::test(start_paused = true)]
async fn a_welcome_that_is_lost_on_the_new_path_stalls_nobody() {
    bounded(async {
        use TransportReason::UdpPassesAgain;
        for slow in [Duration::ZERO, Duration::from_secs(4)] {
            let net = Net::new(6).delay(Duration::from_millis(20));
            net.block_udp(true);
            let (builder, mut told) = numbers();
            let hellos = Arc::new(AtomicUsize::new(0));
            let (firewall, counted) = (net.clone(), hellos.clone());
            // Nothing else keeps the path busy meanwhile.
            let calm = Timeouts {
                idle: Duration::from_secs(30),
                keep_alive: Duration::from_secs(10),
                ..timeouts()
            };
            let builder = builder.timeouts(calm.clone());
            // The second hello comes over the new path. A slow server is no lost one: its path lives.
            let builder = builder.auth(move |hello: Hello| {
                let (firewall, counted) = (firewall.clone(), counted.clone());
                async move {
                    if counted.fetch_add(1, Ordering::Relaxed) == 1 {
                        tokio::time::sleep(slow).await;
                        firewall.block_udp(slow.is_zero());
                    }
                    Ok::<_, Deny>(Peer::new(hello.agent()))
                }
            });
            let server = net.bind(builder).await.expect("an address");
            let auto = auto(&server).timeouts(calm);
            let socket = net.connect(auto, &server).await.expect("let in");
            let changed = changes(&socket);
            let channel = socket.channel("numbers").resumable().open();
            let channel = channel.await.expect("a channel");
            net.block_udp(false);
            let mut last = tokio::time::Instant::now();
            let mut longest = Duration::ZERO;
            let heard = async {
                let mut all = Vec::new();
                while let Some(message) = channel.recv().await.expect("a message") {
                    all.push(message.data::<u64>().expect("a number"));
                    longest = longest.max(last.elapsed());
                    last = tokio::time::Instant::now();
                }
                all
            };
            let ((), all) = tokio::join!(count_up(&channel), heard);
            let sent: Vec<_> = (0..MANY).collect();
            assert!(all == sent, "to the client: {}", all.len());
            let all = told.recv().await.expect("the server tells");
            assert!(all == sent, "to the server: {}", all.len());
            assert!(longest < Duration::from_secs(6), "{slow:?}: {longest:?}");
            socket.close(udpack::CloseCode::NORMAL, "").await;
            drop(socket);
            let whys = changed.await.expect("no panic").into_iter();
            let whys: Vec<_> = whys.map(|(.., why)| why).collect();
            // Where the path lives the session is on it at once, and where it dies back on TCP, where it was.
            let hellos = hellos.load(Ordering::Relaxed);
            match slow.is_zero() {
                true => assert_eq!((&whys[..], hellos), (&[][..], 3)),
                false => assert_eq!((&whys[..], hellos), (&[UdpPassesAgain][..], 2)),
            }
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn where_no_udp_passes_tcp_is_connected_less_than_300_ms_later() {
    bounded(async {
        let net = Net::new(2).delay(Duration::from_millis(20));
        net.block_udp(true);
        let server = net.bind(server()).await.expect("an address");
        let auto = client(&server).transport(TransportChoice::Auto);
        let begun = tokio::time::Instant::now();
        let socket = net.connect(auto, &server).await.expect("let in");
        assert_eq!(socket.transport(), Transport::WebSocket { origin: None });
        let took = begun.elapsed();
        assert!(took < Duration::from_millis(500), "{took:?}");
        // Who allows only one gets only one.
        let quic = client(&server).transport(TransportChoice::Quic);
        let error = net.connect(quic, &server).await.expect_err("no UDP");
        assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
        net.block_udp(false);
        let auto = client(&server).transport(TransportChoice::Auto);
        let socket = net.connect(auto, &server).await.expect("let in");
        assert_eq!(socket.transport(), Transport::Quic);
    })
    .await;
}
