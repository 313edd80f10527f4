//! Rooms: a line is encoded once and goes to every member. One who reads too slowly holds up nobody: it loses
//! lines, and is told how many and where.
//!
//! Run it with `cargo run --example chat`.

use std::error::Error;

use serde::{Deserialize, Serialize};
use udpack::{Authenticate, Channel, Client, Event, Fault, Hello, Identity, Limits};
use udpack::{Overflow, Peer, Rooms, Router, Server, ServerBuilder};

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

async fn say(say: Say, mine: Channel, peer: Peer, rooms: Rooms) -> Result<(), Fault> {
    let (from, text) = (peer.id().to_owned(), say.text);
    let mine = mine.session_id();
    let others = rooms.to(&say.room).except(&mine);
    others.emit(&Said { from, text })?;
    Ok(())
}

fn server(identity: Identity, auth: impl Authenticate) -> ServerBuilder {
    let chat = Router::new().event(join).event(say);
    let server = Server::builder().identity(identity).auth(auth);
    server.channel("chat", chat)
}

const LINES: u64 = 150;

async fn member(server: &Server, name: &str) -> Result<Channel, Box<dyn Error>> {
    let small = Limits {
        stream_window: 64 << 10,
        connection_window: 64 << 10,
        ..Limits::default()
    };
    let client = Client::builder().pin(server.fingerprint()).token(name);
    let address = server.local_addr().to_string();
    let socket = client.limits(small).connect(&address).await?;
    let channel = socket.open("chat").await?;
    let room = "hall".to_owned();
    channel.call(&Join { room }).await?;
    Ok(channel)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let everybody = async |hello: Hello| Ok(Peer::new(hello.token()));
    let server = server(Identity::generate()?, everybody);
    let server = server.bind("127.0.0.1:0").await?;
    let slow = Overflow::DropOldest { messages: 16 };
    server.rooms().policy("hall", slow)?;
    let ann = member(&server, "ann").await?;
    let (bob, eve) = (member(&server, "bob").await?, member(&server, "eve").await?);

    let text = "bla ".repeat(8 << 10);
    for _ in 0..LINES {
        let (room, text) = ("hall".to_owned(), text.clone());
        ann.call(&Say { room, text }).await?;
        let said: Said = bob.recv().await?.ok_or("bob is out")?.data()?;
        assert_eq!(said.from, "ann");
    }
    println!("bob heard {LINES} lines");

    let (mut heard, mut lost) = (0, 0);
    while heard + lost < LINES {
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
