//! The smallest server and the smallest client, in one process: every message comes back.
//!
//! Run it with `cargo run --example echo`.

use std::error::Error;

use serde::{Deserialize, Serialize};
use udpack::{Channel, Client, CloseCode, Deny, Hello, Identity, Peer, Server};

#[derive(Serialize, Deserialize)]
struct Say {
    text: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(admit)
        .channel("echo", echo)
        .bind("127.0.0.1:0")
        .await?;

    let socket = Client::builder()
        .pin(server.fingerprint())
        .token("open sesame")
        .connect(&server.local_addr().to_string())
        .await?;
    let channel = socket.open("echo").await?;
    for text in ["hello", "is anybody there?"] {
        let text = text.to_owned();
        channel.send("say", &Say { text }).await?;
        let message = channel.recv().await?.ok_or("the server has finished")?;
        println!("{}: {}", message.event(), message.data::<Say>()?.text);
    }
    let reason = socket.close(CloseCode::NORMAL, "that was all").await;
    println!("{reason}");
    Ok(())
}

/// Decides who gets in. A real server takes a `TokenFile`, which never compares tokens themselves.
async fn admit(hello: Hello) -> Result<Peer, Deny> {
    match hello.token() {
        "open sesame" => Ok(Peer::new("ali")),
        _ => Err(Deny::auth_failed()),
    }
}

/// Runs once for each channel that a client opens under this name.
async fn echo(channel: Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
    while let Some(message) = channel.recv().await? {
        let say: Say = message.data()?;
        channel.send(message.event(), &say).await?;
    }
    Ok(())
}
