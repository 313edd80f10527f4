//! Sessions on networks that let no UDP pass, from the beginning or from some moment on.

mod common;

use std::time::Duration;

use common::{client, reconnect, server, timeouts};
use tokio::sync::mpsc;
use udpack::testing::Net;
use udpack::{Channel, ConnectError, SocketState, Transport, TransportChoice};

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

async fn heard(channel: &Channel) -> Vec<u64> {
    let mut all = Vec::new();
    while let Some(message) = channel.recv().await.expect("a message") {
        all.push(message.data().expect("a number"));
    }
    all
}

/// UDP stops to pass in the middle of numbered messages both ways.
#[tokio::test(start_paused = true)]
async fn a_session_goes_on_over_tcp_when_udp_is_blocked_and_loses_nothing() {
    bounded(async {
        let net = Net::new(1).delay(Duration::from_millis(20));
        let (tell, mut told) = mpsc::unbounded_channel();
        let builder = server()
            .timeouts(timeouts())
            .channel("numbers", move |channel: Channel| {
                let tell = tell.clone();
                async move {
                    let ((), all) = tokio::join!(count_up(&channel), heard(&channel));
                    let _ = tell.send(all);
                }
            });
        let server = net.bind(builder).await.expect("an address");
        let client = client(&server)
            .timeouts(timeouts())
            .reconnect(reconnect())
            .transport(TransportChoice::Auto);
        let socket = net.connect(client, &server).await.expect("let in");
        let mut states = socket.states();
        let watched = socket.clone();
        let ways = tokio::spawn(async move {
            let mut ways = Vec::new();
            while let Some(state) = states.next().await {
                if let SocketState::Connected { resumed, .. } = state {
                    ways.push((watched.transport() == Transport::Quic, resumed));
                }
            }
            ways
        });
        let channel = socket.channel("numbers").resumable().open();
        let channel = channel.await.expect("a channel");
        let firewall = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            net.block_udp(true);
        };
        let ((), all, ()) = tokio::join!(count_up(&channel), heard(&channel), firewall);
        let sent: Vec<_> = (0..MANY).collect();
        assert!(all == sent, "to the client: {}", all.len());
        let all = told.recv().await.expect("the server tells");
        assert!(all == sent, "to the server: {}", all.len());
        socket.close(udpack::CloseCode::NORMAL, "").await;
        drop(socket);
        let ways = ways.await.expect("no panic");
        assert_eq!(ways, [(true, false), (false, true)], "over QUIC, resumed");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn where_no_udp_passes_tcp_is_connected_300_ms_later() {
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
