//! A server that dies without a word and comes back: its old clients must learn of it from the first packet
//! they send, not from their idle time.
//!
//! On a network in memory with a paused clock, so that what "soon" means is exact.

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;
use udpack::testing::{self, Net};
use udpack::{CloseCode, Identity, Server, Side, Socket, Timeouts};

/// A few round trips of 2 ms; far below the idle time of 30 s.
const SOON: Duration = Duration::from_millis(100);

/// No test takes longer than this, by its paused clock.
async fn bounded<F: Future>(test: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(120), test)
        .await
        .expect("the test took longer than 120 s")
}

fn builder(identity: Identity) -> udpack::ServerBuilder {
    testing::server()
        .identity(identity)
        .channel("echo", common::echo)
}

async fn serve(net: &Net, identity: Identity) -> Server {
    net.bind(builder(identity)).await.expect("a free address")
}

async fn dial(net: &Net, server: &Server) -> Socket {
    net.connect(testing::client(server), server)
        .await
        .expect("the server lets us in")
}

/// Ends a server without a single packet; its address is free afterwards.
fn kill(net: &Net, server: Server) -> SocketAddr {
    let address = server.local_addr();
    net.take_down(&server);
    address
}

/// Another server in the place of a dead one.
async fn again(net: &Net, identity: Identity, address: SocketAddr) -> Server {
    let server = net.bind_at(builder(identity), address).await;
    server.expect("the address is free")
}

#[tokio::test(start_paused = true)]
async fn a_restarted_server_is_noticed_with_the_next_packet() {
    bounded(async {
        let identity = Identity::generate().expect("a key");
        let net = Net::new(0);
        let victim = serve(&net, identity.clone()).await;
        let socket = dial(&net, &victim).await;
        let channel = socket.open("echo").await.expect("a channel");
        let n: u64 = channel.request("echo", &1).await.expect("an answer");
        assert_eq!(n, 1);

        let address = kill(&net, victim);
        assert!(socket.close_reason().is_none(), "nobody said goodbye");
        let server = again(&net, identity.clone(), address).await;
        let begun = Instant::now();
        let refused = channel.request::<_, u64>("echo", &2).await;
        assert!(refused.is_err(), "{refused:?}");
        let reason = socket.closed().await;
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
        assert_eq!(
            (reason.code, reason.by, reason.retry),
            (CloseCode::PEER_RESTARTED, Side::Transport, true)
        );

        let second = dial(&net, &server).await;
        let channel = second.open("echo").await.expect("a channel");
        let n: u64 = channel.request("echo", &3).await.expect("an answer");
        assert_eq!(n, 3);
    })
    .await;
}

/// A client that has nothing to say finds out with its next sign of life.
#[tokio::test(start_paused = true)]
async fn a_silent_client_notices_with_its_keep_alive() {
    bounded(async {
        let identity = Identity::generate().expect("a key");
        let net = Net::new(0);
        let victim = serve(&net, identity.clone()).await;
        let socket = dial(&net, &victim).await;
        // The last acknowledgement is out: nothing but the keep-alive is left to send.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let address = kill(&net, victim);
        let _server = again(&net, identity, address).await;
        let begun = Instant::now();
        let reason = socket.closed().await;
        let (took, due) = (begun.elapsed(), Timeouts::default().keep_alive);
        assert!(took > due / 2 && took < due + SOON, "{took:?}");
        assert_eq!(reason.code, CloseCode::PEER_RESTARTED);
    })
    .await;
}

/// Resets are rationed; all clients of a busy server must still get theirs soon.
#[tokio::test(start_paused = true)]
async fn many_clients_notice_together() {
    bounded(async {
        let identity = Identity::generate().expect("a key");
        let net = Net::new(0);
        let victim = serve(&net, identity.clone()).await;
        let mut clients = Vec::new();
        for _ in 0..100 {
            let socket = dial(&net, &victim).await;
            let channel = socket.open("echo").await.expect("a channel");
            let _: u64 = channel.request("echo", &1).await.expect("an answer");
            clients.push((socket, channel));
        }
        let address = kill(&net, victim);
        let _server = again(&net, identity, address).await;
        let begun = Instant::now();
        for (_, channel) in &clients {
            channel.send("note", &1).await.expect("queued");
        }
        for (socket, _) in &clients {
            assert_eq!(socket.closed().await.code, CloseCode::PEER_RESTARTED);
        }
        assert!(begun.elapsed() < 2 * SOON, "{:?}", begun.elapsed());
    })
    .await;
}

/// Another key in the same place is another server: it cannot end the connections of the first, and a client
/// that pinned the first does not talk to it.
#[tokio::test(start_paused = true)]
async fn a_stranger_on_the_port_cannot_end_a_connection() {
    bounded(async {
        let identity = Identity::generate().expect("a key");
        let net = Net::new(0);
        let victim = serve(&net, identity.clone()).await;
        let socket = dial(&net, &victim).await;
        let address = kill(&net, victim);
        let stranger = Identity::generate().expect("a key");
        let _server = again(&net, stranger, address).await;
        let reason = socket.closed().await;
        assert_eq!((reason.code, reason.retry), (CloseCode::TIMED_OUT, true));
    })
    .await;
}
