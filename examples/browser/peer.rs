//! A Rust client beside the pages of the examples: does what a page does, and prints what it sees.
//!
//! `cargo run --example browser-peer -- (chat | call | progress) ADDRESS PIN`, with what the example printed.

use std::error::Error;

use serde::{Deserialize, Serialize};
use udpack::{Client, Event, Socket};

type Outcome = Result<(), Box<dyn Error>>;

#[derive(Serialize, Deserialize, Event)]
struct Join {
    room: String,
}

#[derive(Serialize, Deserialize, Event)]
struct Say {
    room: String,
    text: String,
}

#[derive(Deserialize)]
struct Said {
    from: String,
    text: String,
}

/// Says something, and prints what is said in the room.
async fn chat(socket: &Socket) -> Outcome {
    let chat = socket.channel("chat").resumable().open().await?;
    let (room, text) = ("lobby".to_owned(), "hello from Rust".to_owned());
    chat.emit(&Join { room: room.clone() }).await?;
    chat.emit(&Say { room, text }).await?;
    while let Some(message) = chat.recv().await? {
        let Said { from, text } = message.data()?;
        println!("{from}: {text}");
    }
    Ok(())
}

/// Prints from whom pictures come.
async fn call(socket: &Socket) -> Outcome {
    let _call = socket.open("call").await?;
    while let Some(message) = socket.recv_volatile().await {
        let (from, bytes) = (message.key().unwrap_or_default(), message.raw().len());
        println!("{from}: {} of {bytes} bytes", message.event());
    }
    Ok(())
}

#[derive(Deserialize)]
struct Progress {
    done: u32,
    total: u32,
}

/// Has a job done and prints how far it is.
async fn progress(socket: &Socket) -> Outcome {
    let jobs = socket.open("jobs").await?;
    let mut items = jobs.request("start", &50).items().await?;
    while let Some(item) = items.next().await {
        let Progress { done, total } = item?;
        println!("{done} of {total}");
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, address, pin] = &arguments[..] else {
        return Err("usage: browser-peer (chat | call | progress) ADDRESS PIN".into());
    };
    let client = Client::builder().pin(pin.parse()?).token("rust");
    let socket = client.connect(address).await?;
    match what.as_str() {
        "chat" => chat(&socket).await,
        "call" => call(&socket).await,
        "progress" => progress(&socket).await,
        _ => Err("there is no such example".into()),
    }
}
