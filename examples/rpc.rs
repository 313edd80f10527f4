//! Requests: a typed one, one with a stream for an answer, one that carries a stream, one that its asker drops
//! and one whose deadline passes. Either side of a channel may ask; here the client does.
//!
//! Run it with `cargo run --example rpc`.

use std::error::Error;
use std::time::Duration;

use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use udpack::{Client, Data, Event, Fault, Hello, Identity, Items, Peer};
use udpack::{Router, Server, State, Streaming};

#[derive(Serialize, Deserialize, Event)]
#[event(reply = i64)]
struct Divide(i64, i64);

async fn divide(Divide(a, b): Divide) -> Result<i64, Fault> {
    let quotient = a.checked_div(b);
    quotient.ok_or_else(|| Fault::new("undefined", "that has no answer"))
}

async fn count(Data(most): Data<u64>) -> Streaming {
    Streaming::new(stream::iter(1..=most))
}

async fn sum(_: Data<()>, mut numbers: Items<u64>) -> Result<u64, Fault> {
    let mut sum = 0;
    while let Some(number) = numbers.next().await {
        sum += number?;
    }
    Ok(sum)
}

/// Never answers. The other end of `starts` receives when it begins and when its future is dropped.
async fn ponder(_: Data<()>, State(starts): State<mpsc::Sender<mpsc::Sender<()>>>) {
    let (alive, _watched) = mpsc::channel(1);
    let _ = starts.send(alive).await;
    std::future::pending().await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (starts, mut begun) = mpsc::channel::<mpsc::Sender<()>>(1);
    let desk = Router::new().event(divide).on("count", count);
    let desk = desk.on("sum", sum).on("ponder", ponder).state(starts);
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(async |_: Hello| Ok(Peer::new("guest")))
        .channel("desk", desk)
        .bind("127.0.0.1:0")
        .await?;
    let client = Client::builder().pin(server.fingerprint());
    let socket = client.connect(&server.local_addr().to_string()).await?;
    let desk = socket.open("desk").await?;

    assert_eq!(desk.call(&Divide(126, 3)).await?, 42);
    let fault = desk.call(&Divide(1, 0)).await.expect_err("a fault");
    println!("1 / 0: {fault}");

    let mut numbers = desk.request("count", &3).items::<u64>().await?;
    while let Some(number) = numbers.next().await {
        println!("counted {}", number?);
    }
    let numbers = stream::iter(1..=100_u64);
    let sum: u64 = desk.request("sum", &()).with_items(numbers).await?;
    assert_eq!(sum, 5050);

    let begun = tokio::select! {
        begun = begun.recv() => begun.ok_or("nobody ponders")?,
        answer = desk.request::<_, ()>("ponder", &()) => return Err(format!("{answer:?}").into()),
    };
    begun.closed().await;
    println!("the request was dropped, and its handler with it");
    let patience = Duration::from_millis(50);
    let late = desk.request::<_, ()>("ponder", &()).timeout(patience).await;
    println!("ponder: {}", late.expect_err("no answer"));
    Ok(())
}
