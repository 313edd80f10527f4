//! Rooms: a line is encoded once and goes to every member. A member that reads too slowly delays nobody: it
//! loses lines and learns how many and where.
//!
//! Run it with `cargo run --example chat`.

use std::error::Error;

use serde::{Deserialize, Serialize};
use udpack::{Authenticate, Channel, Client, Data, Event, Fault, Hello, Identity, Limits};
use udpack::{Overflow, Peer, Rooms, Router, Server, ServerBuilder};

#[derive(Serialize, Deserialize, Event)]
struct Said {
    from: String,
    text: String,
}

async fn join(room: String, channel: Channel) -> Result<(), Fault> {
    Ok(channel.join(&room)?)
}

async fn say(text: Data<String>, mine: Channel, peer: Peer, rooms: Rooms) -> Result<(), Fault> {
    let (from, text) = (peer.id().to_owned(), text.0);
    let others = rooms.to("hall");
    others
        .except(&mine.session_id())
        .emit(&Said { from, text })?;
    Ok(())
}

fn server(identity: Identity, auth: impl Authenticate) -> ServerBuilder {
    let chat = Router::new().on("join", join).on("say", say);
    Server::builder()
        .identity(identity)
        .auth(auth)
        .channel("chat", chat)
}

async fn member(server: &Server, name: &str) -> Result<Channel, Box<dyn Error>> {
    let mut limits = Limits::default();
    (limits.stream_window, limits.connection_window) = (64 << 10, 64 << 10);
    let client = Client::builder().pin(server.fingerprint()).token(name);
    let address = server.local_addr().to_string();
    let socket = client.limits(limits).connect(&address).await?;
    let channel = socket.open("chat").await?;
    channel.send_acked("join", "hall").await?;
    Ok(channel)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let everybody = async |hello: Hello| Ok(Peer::new(hello.token()));
    let server = server(Identity::generate()?, everybody)
        .bind("127.0.0.1:0")
        .await?;
    server
        .rooms()
        .policy("hall", Overflow::DropOldest { messages: 16 })?;
    let (ann, bob) = (member(&server, "ann").await?, member(&server, "bob").await?);
    let eve = member(&server, "eve").await?;

    let text = "bla ".repeat(8 << 10);
    for _ in 0..150 {
        ann.send_acked("say", &text).await?;
        let said: Said = bob.recv().await?.ok_or("bob is out")?.data()?;
        assert_eq!(said.from, "ann");
    }
    println!("bob heard 150 lines");

    let (mut heard, mut lost) = (0, 0);
    while heard + lost < 150 {
        let message = eve.recv().await?.ok_or("eve is out")?;
        match message.gap() {
            Some(gap) => lost += gap.lost,
            None => heard += 1,
        }
    }
    assert!(heard > 0 && lost > 0, "{heard} heard, {lost} lost");
    println!("eve, who slept, heard some and knows of each that she missed");
    Ok(())
}
