//! A server for browsers, and for other clients on the same port: what a page needs to connect stands in the first line
//! that it prints, as JSON. It takes files, too, and keeps them until it ends.
//!
//! `cargo run --example web -- [--dir DIR] [--tcp ADDRESS] [ADDRESS [ORIGIN...]]` serves until its input ends; without an
//! origin every page may connect. In DIR it keeps its keys and files for the next run. At the second address it takes
//! WebSockets, for clients that cannot reach it over UDP.

use std::error::Error;
use std::fmt::Write;
use std::io::Read;
use std::path::PathBuf;

use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use udpack::{
    Channel, Data, Deny, Drain, Encoded, Fault, Hello, History, Identity, Items, Origins, Peer,
    Router, Server, Socket, Streaming, Web,
};
use udpack_transfer::{Receiver, ReceiverConfig, Scope, Store, StoreConfig};
use udpack_web::{HttpListener, Site};

const TOKEN: &str = "open sesame";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).peekable();
    let kept = arguments.next_if_eq("--dir").map(|_| arguments.next());
    let kept = kept.map(|dir| dir.map(PathBuf::from).ok_or("--dir needs a directory"));
    let kept = kept.transpose()?;
    let tcp = arguments.next_if_eq("--tcp").map(|_| arguments.next());
    let tcp = tcp.map(|tcp| tcp.ok_or("--tcp needs an address"));
    let tcp = tcp.transpose()?;
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:0".to_owned());
    let origins: Vec<String> = arguments.collect();
    let origins = match origins.is_empty() {
        true => Origins::Any,
        false => Origins::Only(origins),
    };
    let math = Router::new()
        .on("add", async |Data((a, b)): Data<(i64, i64)>| {
            let sum = a.checked_add(b);
            sum.ok_or_else(|| Fault::new("overflow", "the sum is too large"))
        })
        .on("count", async |Data(most): Data<u64>| {
            Streaming::new(stream::iter(1..=most))
        })
        .on("sum", sum)
        .on("call back", call_back);
    let temporary = tempfile::tempdir()?;
    let (identity, files) = match kept {
        Some(dir) => (
            Identity::load_or_create(dir.join("keys"))?,
            dir.join("files"),
        ),
        None => (Identity::generate()?, temporary.path().to_owned()),
    };
    let config = ReceiverConfig {
        default_scope: Scope {
            read: true,
            ..Scope::default()
        },
        ..ReceiverConfig::default()
    };
    let web = Web::new().origins(origins);
    let receiver = Receiver::new(Store::open(&files, StoreConfig::default())?, config);
    let server = receiver
        .attach(Server::builder())
        .identity(identity)
        .auth(admit)
        .web(web.clone())
        .channel("echo", echo)
        .channel("math", math)
        .channel("news", news)
        .connection(repeat)
        .bind(address)
        .await?;
    server.rooms().history("news", History::default())?;

    let mut hashes = Vec::new();
    for hash in server.certificate_hashes() {
        let mut digits = String::new();
        for byte in hash {
            write!(digits, "{byte:02x}")?;
        }
        hashes.push(format!("\"{digits}\""));
    }
    let mut sockets = String::new();
    if let Some(tcp) = tcp {
        let listener = HttpListener::bind(tcp).await?;
        let at = listener.local_addr();
        write!(sockets, r#""socketUrl":"ws://{at}/udpack","#)?;
        tokio::spawn(listener.serve(Site::of(server.clone(), web)));
    }
    let (address, hashes) = (server.local_addr(), hashes.join(","));
    let (pin, files) = (server.fingerprint(), files.display());
    println!(
        r#"{{"url":"https://{address}/udpack",{sockets}"hashes":[{hashes}],"token":"{TOKEN}","pin":"{pin}","files":"{files}"}}"#
    );
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    server.run_until(ended, Drain::default()).await?;
    println!("nobody is left");
    Ok(())
}

async fn admit(hello: Hello) -> Result<Peer, Deny> {
    match hello.token() {
        TOKEN => Ok(Peer::new("guest")),
        _ => Err(Deny::auth_failed()),
    }
}

/// What pages send: anything that JSON can say, or bytes.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Anything {
    Json(serde_json::Value),
    Bytes(ByteBuf),
}

/// Sends each message back as it came.
async fn echo(channel: Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
    while let Some(message) = channel.recv().await? {
        let data: Anything = message.data()?;
        channel.send(message.event(), &data).await?;
    }
    Ok(())
}

/// What is said goes to everybody, and to those who come back, from where they were.
async fn news(channel: Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
    channel.join("news")?;
    let rooms = channel.rooms_handle().ok_or("a server has rooms")?;
    while let Some(message) = channel.recv().await? {
        rooms.to("news").send_encoded(&Encoded::relay(&message)?);
    }
    Ok(())
}

async fn sum(_: Data<()>, mut numbers: Items<u64>) -> Result<u64, Fault> {
    let mut sum = 0;
    while let Some(number) = numbers.next().await {
        sum += number?;
    }
    Ok(sum)
}

/// Opens a channel to whoever asks, says hello there and waits for an answer.
async fn call_back(Data(name): Data<String>, socket: Socket) -> Result<String, Fault> {
    let failed = |error: &dyn Error| Fault::new("failed", error.to_string());
    let channel = socket.open(&name).await.map_err(|error| failed(&error))?;
    let answer = channel.request("hello", "from the server").await;
    answer.map_err(|error| failed(&error))
}

/// Sends volatile messages back with the key they came with.
async fn repeat(socket: Socket) {
    while let Some(message) = socket.recv_volatile().await {
        let Ok(data) = message.data::<i64>() else {
            continue;
        };
        let sent = match message.key() {
            Some(key) => socket.send_volatile_keyed(message.event(), key, &data),
            None => socket.send_volatile(message.event(), &data),
        };
        if sent.is_err() {
            return;
        }
    }
}
