//! Uploads with the transfer crate alone: a server that takes files, a client that sends two, and
//! their progress. What is printed as stored is whole, verified and safe on the server's disk.
//!
//! Run it with `cargo run --example upload`.

use std::error::Error;

use udpack::{Client, Hello, Identity, Peer, Server};
use udpack_transfer::{Event, Receiver, ReceiverConfig, Source, Store, StoreConfig, Uploader};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let root = dir.path().join("uploads");
    let store = Store::open(&root, StoreConfig::default())?;
    let receiver = Receiver::new(store, ReceiverConfig::default());
    let server = receiver
        .attach(Server::builder())
        .identity(Identity::generate()?)
        .auth(async |_: Hello| Ok(Peer::new("guest")))
        .bind("127.0.0.1:0")
        .await?;

    let local = dir.path().join("beach.jpg");
    std::fs::write(&local, vec![7; 20 << 20])?;
    let sources = vec![
        Source::file(&local, "holiday/beach.jpg".parse()?),
        Source::bytes("remember the milk", "notes.txt".parse()?),
    ];

    let client = Client::builder().pin(server.fingerprint());
    let socket = client.connect(&server.local_addr().to_string()).await?;
    let mut upload = Uploader::new(&socket).lanes(2).put(sources);
    let mut stored = 0;
    while let Some(event) = upload.next().await {
        match event {
            Event::Progress(now) => println!("{} of {} bytes", now.acked, now.total),
            Event::Done(file) => {
                println!("stored {} in {:?}", file.path, file.elapsed);
                stored += file.size;
            }
            Event::Failed { path, error, .. } => return Err(format!("{path}: {error}").into()),
            _ => {}
        }
    }

    let published = std::fs::metadata(root.join("holiday/beach.jpg"))?;
    assert_eq!(published.len(), 20 << 20);
    println!("{stored} bytes are stored");
    Ok(())
}
