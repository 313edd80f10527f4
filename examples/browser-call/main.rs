//! A call: each page sends its camera to the server, which passes it on to all others as volatile messages. A picture that
//! is late gives way to the next, and the page counts what it has not seen.
//!
//! Run it with `cargo run --example browser-call`, and open the page that it names, with `#NAME` behind it. Where there is no
//! camera, and with `?synthetic`, it sends a painted picture.

#[path = "../browser/page.rs"]
mod page;

use std::error::Error;

use udpack::{Channel, Hello, Identity, JoinError, Peer, Router, Server, Web};

const CALL: &str = "call";

/// Passes a member's volatile messages on, undecoded, for as long as its socket lives.
async fn relay(channel: Channel) -> Result<(), JoinError> {
    channel.join(CALL)?;
    let (socket, id) = (channel.socket(), channel.session_id());
    if let Some(rooms) = channel.rooms_handle() {
        tokio::spawn(async move {
            while let Some(message) = socket.recv_volatile().await {
                rooms.to(CALL).except(&id).relay_volatile(&message);
            }
        });
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(async |hello: Hello| Ok(Peer::new(hello.token())))
        .web(Web::new())
        .channel(CALL, Router::new().on_open(relay));
    page::run(server, include_str!("index.html"), include_str!("page.js")).await
}
