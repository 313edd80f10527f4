//! A room: each line is encoded once and goes to every member; one who reads too slowly is left behind
//! and holds up nobody. Three clients play it through, and one of them never listens.
//!
//! Run it with `cargo run --example chat`.

use std::error::Error;

use udpack::{Channel, Client, Hello, Identity, Overflow, Peer, Server};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

async fn member(channel: Channel) -> Outcome<()> {
    let rooms = channel.rooms_handle().ok_or("rooms are a server's")?;
    channel.join("chat")?;
    channel.send("welcome", &()).await?;
    while let Some(message) = channel.recv().await? {
        rooms.to("chat").send("line", message.data::<&str>()?)?;
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
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(async |_: Hello| Ok(Peer::new("guest")))
        .channel("chat", member)
        .bind("127.0.0.1:0")
        .await?;
    server.rooms().policy("chat", Overflow::Disconnect)?;
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
