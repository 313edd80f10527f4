//! A sink of your own: uploads become the bodies of HTTP requests, as they arrive, and never touch this machine's disk.
//!
//! The last chunk of a body is sent only when size and hash of the file are right. Whatever goes wrong before leaves a
//! body without its end, which an HTTP server discards. So nothing is visible there that is not whole.
//!
//! Run it with `cargo run --example sink`.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use udpack::{Client, Hello, Identity, Peer, Server};
use udpack_transfer::{
    Begun, Bytes, Event, Expected, NewUpload, Published, Receiver, ReceiverConfig, Sink, Source,
    StoreError, Synced, Uploader,
};

/// How long the HTTP server may take for one step.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends each upload to an HTTP server, as a `PUT` of its name.
#[derive(Debug)]
pub(crate) struct Forward {
    to: SocketAddr,
}

/// A request whose body has begun.
#[derive(Debug)]
pub(crate) struct Request {
    stream: TcpStream,
    path: String,
    size: Option<u64>,
    hasher: blake3::Hasher,
}

impl Sink for Forward {
    type Upload = Request;
    type Whole = Request;

    async fn begin(&self, new: &NewUpload<'_>) -> Result<Begun<Request>, StoreError> {
        let path = new.path.as_str().to_owned();
        let head = format!(
            "PUT /{} HTTP/1.1\r\nHost: {}\r\nTransfer-Encoding: chunked\r\n\r\n",
            encoded(&path),
            self.to
        );
        let opening = async {
            let mut stream = TcpStream::connect(self.to).await?;
            stream.write_all(head.as_bytes()).await?;
            Ok(stream)
        };
        Ok(Begun::New(Request {
            stream: in_time(opening).await?,
            path,
            size: new.size,
            hasher: blake3::Hasher::new(),
        }))
    }

    async fn write(
        &self,
        request: &mut Request,
        offset: u64,
        bytes: Bytes,
    ) -> Result<(), StoreError> {
        let expected = request.hasher.count();
        if offset != expected {
            return Err(StoreError::BadOffset { expected });
        }
        let got = offset.saturating_add(bytes.len() as u64);
        if let Some(expected) = request.size.filter(|size| got > *size) {
            return Err(StoreError::SizeMismatch { expected, got });
        }
        let head = format!("{:x}\r\n", bytes.len());
        let stream = &mut request.stream;
        in_time(async {
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&bytes).await?;
            stream.write_all(b"\r\n").await
        })
        .await?;
        request.hasher.update(&bytes);
        Ok(())
    }

    async fn finish(&self, request: Request, expected: Expected) -> Result<Request, StoreError> {
        let got = request.hasher.count();
        let sizes = [request.size, expected.size];
        if let Some(expected) = sizes.into_iter().flatten().find(|size| *size != got) {
            return Err(StoreError::SizeMismatch { expected, got });
        }
        let got = request.hasher.finalize().into();
        match expected.hash {
            Some(expected) if expected != got => Err(StoreError::HashMismatch { expected, got }),
            _ => Ok(request),
        }
    }

    async fn publish(&self, mut request: Request) -> Result<Published, StoreError> {
        let stream = &mut request.stream;
        let answer = in_time(async {
            stream.write_all(b"0\r\n\r\n").await?;
            let mut answer = String::new();
            let mut reader = BufReader::new(stream.take(LINE));
            reader.read_line(&mut answer).await?;
            Ok(answer)
        });
        if !answer.await?.starts_with("HTTP/1.1 2") {
            let why = "the archive took the file, but did not keep it".to_owned();
            return Err(StoreError::Unavailable { why });
        }
        Ok(Published {
            path: request.path,
            size: request.hasher.count(),
            hash: request.hasher.finalize().into(),
            same: false,
            // The promise is the archive's.
            sync: Synced::None,
            other_time: None,
            xattrs: 0,
        })
    }

    async fn abort(&self, request: Request) {
        drop(request);
    }
}

/// Waits for the HTTP server, but not for ever.
async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> Result<T, StoreError> {
    let failed = |why: &str| StoreError::Unavailable { why: why.into() };
    match timeout(PATIENCE, work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(_)) => Err(failed("the archive cannot be reached")),
        Err(_) => Err(failed("the archive takes nothing")),
    }
}

/// A name as a part of a URL.
fn encoded(path: &str) -> String {
    path.bytes()
        .fold(String::new(), |encoded, byte| match byte {
            b'/' | b'.' | b'-' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => {
                encoded + char::from(byte).encode_utf8(&mut [0; 4])
            }
            _ => encoded + &format!("%{byte:02X}"),
        })
}

/// What an HTTP server was sent, by the name in the URL.
pub(crate) type Bodies = Arc<Mutex<HashMap<String, Vec<u8>>>>;

/// A small HTTP server that keeps each body that came to its end, and where it listens.
pub(crate) async fn archive() -> io::Result<(Forward, Bodies)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let forward = Forward {
        to: listener.local_addr()?,
    };
    let bodies = Bodies::default();
    let kept = bodies.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let kept = kept.clone();
            tokio::spawn(async move { keep(stream, kept).await });
        }
    });
    Ok((forward, bodies))
}

/// Longest line that is read of a request or an answer, in bytes.
const LINE: u64 = 8 << 10;

/// Reads one request; an error where its body has no end.
async fn keep(stream: TcpStream, bodies: Bodies) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let request = line(&mut stream).await?;
    while !line(&mut stream).await?.is_empty() {}
    let mut body = Vec::new();
    loop {
        let len = u64::from_str_radix(&line(&mut stream).await?, 16).map_err(io::Error::other)?;
        if (&mut stream).take(len).read_to_end(&mut body).await? as u64 != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line(&mut stream).await?;
        if len == 0 {
            break;
        }
    }
    let name = request.split(' ').nth(1).unwrap_or_default();
    let name = name.trim_start_matches('/').to_owned();
    bodies.lock().expect("no panic").insert(name, body);
    stream.write_all(b"HTTP/1.1 201 Created\r\n\r\n").await
}

async fn line(stream: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    stream.take(LINE).read_line(&mut line).await?;
    match line.strip_suffix("\r\n") {
        Some(line) => Ok(line.to_owned()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (forward, bodies) = archive().await?;
    let receiver = Receiver::into_sink(forward, ReceiverConfig::default());
    let server = receiver
        .attach(Server::builder())
        .identity(Identity::generate()?)
        .auth(async |_: Hello| Ok(Peer::new("guest")))
        .bind("127.0.0.1:0")
        .await?;

    let sources = [
        Source::bytes(vec![7; 20 << 20], "holiday/beach.jpg".parse()?),
        Source::bytes("remember the milk", "notes.txt".parse()?),
    ];
    let client = Client::builder().pin(server.fingerprint());
    let socket = client.connect(&server.local_addr().to_string()).await?;
    let mut upload = Uploader::new(&socket).put(sources);
    while let Some(event) = upload.next().await {
        match event {
            Event::Done(file) => println!("sent {} on", file.path),
            Event::Failed { path, error, .. } => return Err(format!("{path}: {error}").into()),
            _ => {}
        }
    }

    let bodies = bodies.lock().expect("no panic");
    let bytes: usize = bodies.values().map(Vec::len).sum();
    println!(
        "{} bodies of {bytes} bytes are in the archive",
        bodies.len()
    );
    Ok(())
}
