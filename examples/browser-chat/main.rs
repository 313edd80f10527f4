//! The guide's chat with its page: browsers and Rust clients in one room. Whoever comes says a name as token.
//!
//! Run it with `cargo run --example browser-chat`, and open the page that it names, with `#NAME` behind it.

#[path = "../browser/page.rs"]
mod page;

use std::error::Error;

use serde::{Deserialize, Serialize};
use udpack::{Channel, Event, Fault, Hello, Identity, Peer, Rooms, Router, Server, Web};

#[derive(Serialize, Deserialize, Event)]
struct Join {
    room: String,
}

#[derive(Serialize, Deserialize, Event)]
struct Say {
    room: String,
    text: String,
}

#[derive(Serialize, Deserialize, Event)]
struct Said {
    from: String,
    text: String,
}

async fn join(join: Join, channel: Channel) -> Result<(), Fault> {
    Ok(channel.join(&join.room)?)
}

async fn say(say: Say, peer: Peer, rooms: Rooms) -> Result<(), Fault> {
    let (from, text) = (peer.id().to_owned(), say.text);
    rooms.to(&say.room).emit(&Said { from, text })?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(async |hello: Hello| Ok(Peer::new(hello.token())))
        .web(Web::new())
        .channel("chat", Router::new().event(join).event(say));
    page::run(server, include_str!("index.html"), include_str!("page.js")).await
}
