//! What the tests share: a server on a free port, a client that is let in, and a bound on everything.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::UdpSocket;
use udpack::{
    Channel, Client, ClientBuilder, Context, Deny, Fault, Hello, Identity, Peer, Reconnect,
    RecvError, Server, ServerBuilder, Socket, Timeouts, TransportChoice,
};

/// The token that the test server accepts.
pub(crate) const TOKEN: &str = "a-token-that-only-tests-know";

/// Nothing in a test takes longer than this.
pub(crate) async fn bounded<F: Future>(future: F) -> F::Output {
    match tokio::time::timeout(Duration::from_secs(30), future).await {
        Ok(output) => output,
        Err(_) => panic!("the test took longer than 30 s"),
    }
}

/// Time-outs that make a lost connection show within seconds.
pub(crate) fn timeouts() -> Timeouts {
    Timeouts {
        idle: Duration::from_secs(5),
        keep_alive: Duration::from_secs(1),
        resume: Duration::from_secs(900),
        ..Timeouts::default()
    }
}

/// Comes back soon and does not give up.
pub(crate) fn reconnect() -> Reconnect {
    Reconnect {
        first: Duration::from_millis(50),
        most: Duration::from_secs(2),
        patience: Duration::from_secs(900),
        ..Reconnect::default()
    }
}

/// A builder with a fresh identity and a verifier that knows one token.
pub(crate) fn server() -> ServerBuilder {
    Server::builder()
        .identity(Identity::generate().expect("a fresh key"))
        .auth(verify)
}

async fn verify(hello: Hello) -> Result<Peer, Deny> {
    if hello.token() == TOKEN {
        Ok(Peer::new("tester"))
    } else {
        Err(Deny::auth_failed())
    }
}

/// A client builder that trusts this server and presents the right token.
pub(crate) fn client(server: &Server) -> ClientBuilder {
    let client = Client::builder().pin(server.fingerprint()).token(TOKEN);
    match over_tcp() {
        true => client.transport(TransportChoice::WebSocket),
        false => client,
    }
}

/// Whether this binary of tests is about WebSockets.
pub(crate) fn over_tcp() -> bool {
    env!("CARGO_CRATE_NAME").ends_with("_websocket")
}

/// Connects a client that is let in.
pub(crate) async fn connect(server: &Server) -> Socket {
    client(server)
        .connect(&server.local_addr().to_string())
        .await
        .expect("the server lets us in")
}

/// Binds on a free loopback port.
pub(crate) async fn bind(builder: ServerBuilder) -> Server {
    builder
        .bind("127.0.0.1:0")
        .await
        .expect("a free loopback port")
}

/// Passes datagrams on to a server and back, unless it is cut.
pub(crate) async fn path(server: SocketAddr) -> (SocketAddr, Arc<AtomicBool>) {
    let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a port"));
    let (address, cut) = (
        front.local_addr().expect("bound"),
        Arc::new(AtomicBool::new(false)),
    );
    let is_cut = cut.clone();
    tokio::spawn(async move {
        let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
        let mut tasks = tokio::task::JoinSet::new();
        let mut buf = vec![0; 64 << 10];
        while let Ok((len, from)) = front.recv_from(&mut buf).await {
            if is_cut.load(Ordering::Relaxed) {
                continue;
            }
            if let Entry::Vacant(new) = backs.entry(from) {
                let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a port"));
                back.connect(server).await.expect("an address");
                new.insert(back.clone());
                let (front, is_cut) = (front.clone(), is_cut.clone());
                tasks.spawn(async move {
                    let mut buf = vec![0; 64 << 10];
                    while let Ok(len) = back.recv(&mut buf).await {
                        if !is_cut.load(Ordering::Relaxed) {
                            let _ = front.send_to(&buf[..len], from).await;
                        }
                    }
                });
            }
            let _ = backs[&from].send(&buf[..len]).await;
        }
    });
    (address, cut)
}

/// Answers `echo` with the number that was asked about.
pub(crate) async fn echo(channel: Channel) -> Result<(), RecvError> {
    let echo = |n: u64, _: Context| async move { Ok::<_, Fault>(n) };
    channel.on("echo", echo).run().await
}
