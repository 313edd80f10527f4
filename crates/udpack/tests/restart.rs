//! A server that dies without a word and comes back: its old clients must learn of it from the first packet
//! they send, not from their idle time.

mod common;

use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::{TOKEN, bounded, connect};
use tokio::time::Instant;
use udpack::{
    Channel, Client, CloseCode, Context, Fault, Identity, Limits, Server, Side, Socket, Timeouts,
};

/// Far above what noticing takes, far below the idle time of 30 s.
const SOON: Duration = Duration::from_secs(2);

/// A server in a thread and a runtime of its own, so that it can die like a process does.
struct Victim {
    kill: tokio::sync::oneshot::Sender<()>,
    thread: JoinHandle<()>,
    address: SocketAddr,
}

impl Victim {
    fn start(identity: Identity) -> Self {
        let (tell, told) = mpsc::channel();
        let (kill, killed) = tokio::sync::oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let server = runtime.block_on(async {
                let server = serve(identity, "127.0.0.1:0".parse().expect("an address")).await;
                tell.send(server.local_addr()).expect("the test waits");
                let _ = killed.await;
                server
            });
            // Everything that could still send a packet goes first.
            drop(runtime);
            drop(server);
        });
        let address = told.recv().expect("the server starts");
        Self {
            kill,
            thread,
            address,
        }
    }

    /// Ends it without a single packet; the port is free afterwards.
    fn kill(self) -> SocketAddr {
        self.kill.send(()).expect("the server runs");
        self.thread.join().expect("the server's thread");
        self.address
    }
}

async fn serve(identity: Identity, address: SocketAddr) -> Server {
    common::server()
        .identity(identity)
        .limits(Limits {
            sockets_per_address: 256,
            ..Limits::default()
        })
        .channel("echo", |channel: Channel| async move {
            channel
                .on(
                    "echo",
                    |n: u64, _: Context| async move { Ok::<_, Fault>(n) },
                )
                .run()
                .await
        })
        .bind(address)
        .await
        .expect("the port is free")
}

async fn dial(identity: &Identity, address: SocketAddr, timeouts: Timeouts) -> Socket {
    Client::builder()
        .pin(identity.fingerprint())
        .token(TOKEN)
        .timeouts(timeouts)
        .connect(&address.to_string())
        .await
        .expect("the server lets us in")
}

#[tokio::test]
async fn a_restarted_server_is_noticed_with_the_next_packet() {
    bounded(async {
        let identity = Identity::generate().expect("a key");
        let victim = Victim::start(identity.clone());
        let socket = dial(&identity, victim.address, Timeouts::default()).await;
        let channel = socket.open("echo").await.expect("a channel");
        let n: u64 = channel.request("echo", &1).await.expect("an answer");
        assert_eq!(n, 1);

        let address = victim.kill();
        assert!(socket.close_reason().is_none(), "nobody said goodbye");
        let server = serve(identity.clone(), address).await;
        let begun = Instant::now();
        let refused = channel.request::<_, u64>("echo", &2).await;
        assert!(refused.is_err(), "{refused:?}");
        let reason = socket.closed().await;
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
        assert_eq!(
            (reason.code, reason.by, reason.retry),
            (CloseCode::PEER_RESTARTED, Side::Transport, true)
        );

        let again = connect(&server).await;
        let channel = again.open("echo").await.expect("a channel");
        let n: u64 = channel.request("echo", &3).await.expect("an answer");
        assert_eq!(n, 3);
    })
    .await;
}

/// A client that has nothing to say finds out with its next sign of life.
#[tokio::test]
async fn a_silent_client_notices_with_its_keep_alive() {
    bounded(async {
        let identity = Identity::generate().expect("a key");
        let victim = Victim::start(identity.clone());
        let timeouts = Timeouts {
            keep_alive: Duration::from_millis(200),
            ..Timeouts::default()
        };
        let socket = dial(&identity, victim.address, timeouts).await;
        let address = victim.kill();
        let _server = serve(identity, address).await;
        let begun = Instant::now();
        let reason = socket.closed().await;
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
        assert_eq!(reason.code, CloseCode::PEER_RESTARTED);
    })
    .await;
}

/// Resets are rationed; all clients of a busy server must still get theirs soon.
#[tokio::test]
async fn many_clients_notice_together() {
    bounded(async {
        let identity = Identity::generate().expect("a key");
        let victim = Victim::start(identity.clone());
        let mut clients = Vec::new();
        for _ in 0..100 {
            let socket = dial(&identity, victim.address, Timeouts::default()).await;
            let channel = socket.open("echo").await.expect("a channel");
            let _: u64 = channel.request("echo", &1).await.expect("an answer");
            clients.push((socket, channel));
        }
        let address = victim.kill();
        let _server = serve(identity, address).await;
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
#[tokio::test]
async fn a_stranger_on_the_port_cannot_end_a_connection() {
    bounded(async {
        let identity = Identity::generate().expect("a key");
        let victim = Victim::start(identity.clone());
        let timeouts = Timeouts {
            idle: Duration::from_millis(1500),
            keep_alive: Duration::from_millis(100),
            ..Timeouts::default()
        };
        let socket = dial(&identity, victim.address, timeouts).await;
        let address = victim.kill();
        let stranger = Identity::generate().expect("a key");
        let _server = serve(stranger, address).await;
        let reason = socket.closed().await;
        assert_eq!((reason.code, reason.retry), (CloseCode::TIMED_OUT, true));
    })
    .await;
}
