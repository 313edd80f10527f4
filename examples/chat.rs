//! A room by hand: each line is encoded once and goes to every member; one who reads too slowly is
//! left behind and holds up nobody. Three clients play it through, and one of them never listens.
//!
//! Run it with `cargo run --example chat`.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex};

use udpack::{Channel, Client, CloseCode, Encoded, Hello, Identity, Peer, Server};

type Room = Arc<Mutex<HashMap<String, Channel>>>;
type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

async fn member(room: Room, channel: Channel) -> Outcome<()> {
    let me = channel.session_id().to_owned();
    room.lock()
        .expect("sound")
        .insert(me.to_string(), channel.clone());
    channel.send("welcome", &()).await?;
    while let Some(message) = channel.recv().await? {
        let line = Encoded::new("line", message.data::<&str>()?)?;
        room.lock().expect("sound").retain(|_, other| {
            let queued = other.try_send_encoded(&line).unwrap_or(false);
            if !queued {
                drop(other.close(CloseCode::SLOW_PEER, "too slow for this room"));
            }
            queued
        });
    }
    Ok(())
}

async fn join(server: &Server) -> Outcome<Channel> {
    let client = Client::builder().pin(server.fingerprint());
    let socket = client.connect(&server.local_addr().to_string()).await?;
    let channel = socket.open("chat").await?;
    channel.recv().await?.ok_or("nobody welcomes us")?;
    Ok(channel)
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let room = Room::default();
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(async |_: Hello| Ok(Peer::new("guest")))
        .channel("chat", move |channel: Channel| {
            member(room.clone(), channel)
        })
        .bind("127.0.0.1:0")
        .await?;
    let (ann, bob) = (join(&server).await?, join(&server).await?);
    let eve = join(&server).await?;
    let text = "bla ".repeat(16 << 10);
    for _ in 0..400 {
        ann.send("say", &text).await?;
        assert!(ann.recv().await?.is_some() && bob.recv().await?.is_some());
    }
    println!("ann and bob heard 400 lines");
    while let Ok(Some(_)) = eve.recv().await {}
    println!("eve was left behind: {}", eve.closed().await.code);
    Ok(())
}
