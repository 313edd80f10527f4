//! Positions of which only the newest counts: sent without waiting, and lost without harm.
//!
//! Run it with `cargo run --example telemetry`.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use udpack::{Client, Hello, Identity, Peer, SendError, Server, Socket};

const SHIPS: [&str; 3] = ["ann", "bea", "eve"];
const HARBOUR: u32 = 100;

/// Sends each ship's position repeatedly until the other side has seen enough.
async fn sail(socket: &Socket) -> Result<(), SendError> {
    let mut clock = tokio::time::interval(Duration::from_millis(2));
    for mile in 0.. {
        clock.tick().await;
        for ship in SHIPS {
            socket.send_volatile_keyed("position", ship, &HARBOUR.min(mile))?;
        }
    }
    Ok(())
}

/// Reads less often than positions are sent: replaced ones are never seen.
async fn watch(socket: &Socket) -> Result<(), Box<dyn Error>> {
    let mut ships = BTreeMap::new();
    while let Some(message) = socket.recv_volatile().await {
        let mile: u32 = message.data()?;
        let ship = message.key().unwrap_or("unknown");
        ships.insert(ship.to_owned(), mile);
        println!("{ship} is at mile {mile}");
        if ships.len() == SHIPS.len() && ships.values().all(|mile| *mile == HARBOUR) {
            println!("all are in the harbour");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err("the socket is over".into())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(async |_: Hello| Ok(Peer::new("fleet")))
        .bind("127.0.0.1:0")
        .await?;
    let client = Client::builder().pin(server.fingerprint());
    let socket = client.connect(&server.local_addr().to_string()).await?;
    let fleet = server.accept().await.ok_or("the server is over")?;
    tokio::select! {
        seen = watch(&fleet) => seen,
        sailed = sail(&socket) => Ok(sailed?),
    }
}
