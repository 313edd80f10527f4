//! File transfer inside a program: uploads a file with progress pushed to a watcher, and reads it back into memory,
//! verified, without a local file.
//!
//! Run it with `cargo run --example fetch`.

use std::error::Error;

use udpack::{Client, Hello, Identity, Peer, Server};
use udpack_transfer::{
    Event, Fetch, Receiver, ReceiverConfig, Scope, Source, Store, StoreConfig, Uploader,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let store = Store::open(dir.path().join("uploads"), StoreConfig::default())?;
    let config = ReceiverConfig {
        default_scope: Scope {
            read: true,
            ..Scope::default()
        },
        ..ReceiverConfig::default()
    };
    let server = Receiver::new(store, config)
        .attach(Server::builder())
        .identity(Identity::generate()?)
        .auth(async |_: Hello| Ok(Peer::new("guest")))
        .bind("127.0.0.1:0")
        .await?;
    let client = Client::builder().pin(server.fingerprint());
    let socket = client.connect(&server.local_addr().to_string()).await?;

    let photo = vec![7; 20 << 20];
    let sources = [Source::bytes(photo.clone(), "beach.jpg".parse()?)];
    let mut upload = Uploader::new(&socket).put(sources);
    let mut watch = upload.watch();
    let drawing = tokio::spawn(async move {
        while let Some(moving) = watch.next().await {
            for file in &moving.files {
                println!("{}: {} of {} bytes", file.path, file.bytes, file.size);
            }
        }
    });
    while let Some(event) = upload.next().await {
        if let Event::Failed { path, error, .. } = event {
            return Err(format!("{path}: {error}").into());
        }
    }
    drawing.await?;

    // The bytes are the file only after an `Ok`. After an error they must be discarded.
    let mut bytes = Vec::new();
    let fetched = Fetch::new(&socket)
        .read(&"beach.jpg".parse()?, &mut bytes)
        .await?;
    assert_eq!(bytes, photo);
    println!("{} bytes of {} are in memory", fetched.size, fetched.path);
    Ok(())
}
