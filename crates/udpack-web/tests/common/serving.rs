//! A server that takes WebSockets on loopback.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use udpack::{
    Channel, Client, ClientBuilder, Context, Deny, Fault, Hello, Identity, Peer, Server,
    TransportChoice, Web,
};
use udpack_web::{HttpListener, Site};

pub(crate) const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

pub(crate) async fn bounded<F: Future>(future: F) -> F::Output {
    let output = tokio::time::timeout(Duration::from_secs(60), future).await;
    output.expect("the test takes no minute")
}

/// A server, and where it takes WebSockets.
pub(crate) async fn serving() -> (Server, SocketAddr) {
    let server = Server::builder()
        .identity(Identity::generate().unwrap())
        .auth(|hello: Hello| async move {
            match hello.token() {
                "right" => Ok(Peer::new(format!("{:?}", hello.transport()))),
                _ => Err(Deny::auth_failed()),
            }
        })
        .channel("echo", |channel: Channel| async move {
            let echo = |text: String, _: Context| async move { Ok::<_, Fault>(text) };
            channel.on("echo", echo).run().await
        })
        .bind(LOCAL)
        .await
        .unwrap();
    let listener = HttpListener::bind(LOCAL).await.unwrap();
    let address = listener.local_addr();
    let site = Site::of(server.clone(), Web::new());
    tokio::spawn(listener.serve(site));
    (server, address)
}

/// A client of it that goes over TCP.
pub(crate) fn client(server: &Server) -> ClientBuilder {
    Client::builder()
        .pin(server.fingerprint())
        .token("right")
        .transport(TransportChoice::WebSocket)
}
