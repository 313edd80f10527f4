//! NATS: a publisher, nats-server, and a subscriber; no TLS. The client protocol is spoken here, with large buffers,
//! so that a client library costs nothing: <https://docs.nats.io/reference/reference-protocols/nats-protocol>.

use std::env;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;

use crate::args::{Load, Scenario};
use crate::fanout::{self, Fanout};
use crate::ours::{MESSAGE, all, ping_values};
use crate::peer::{Ready, Report};

const PROGRAM: &str = "nats-server";
/// Of reading and of writing, in bytes.
const BUFFER: usize = 256 << 10;
/// How long the server may take to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether the server is installed.
pub(crate) fn installed() -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(PROGRAM).is_file())
}

/// The server's process and its configuration, both of which go when it is dropped.
struct Server {
    child: Child,
    _config: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the server and a subscriber, which work until they are dropped.
pub(crate) async fn serve(
    listen: SocketAddr,
) -> anyhow::Result<(Ready, impl Send + 'static + use<>)> {
    // The server cannot tell which port it took.
    let address = TcpListener::bind(listen)?.local_addr()?;
    let config = TempDir::with_prefix("udpack-bench.")?;
    let file = config.path().join("nats.conf");
    // By default it parts with a subscriber that is 64 MB behind, and messages are lost.
    fs::write(
        &file,
        format!("listen: \"{address}\"\nmax_pending: 4GB\nwrite_deadline: \"60s\"\n"),
    )?;
    let child = Command::new(PROGRAM)
        .arg("-c")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start nats-server")?;
    let server = Server {
        child,
        _config: config,
    };
    let begun = Instant::now();
    let mut peer = loop {
        match Peer::connect(address).await {
            Ok(peer) => break peer,
            Err(error) if begun.elapsed() > PATIENCE => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    peer.write
        .write_all(b"SUB count 1\r\nSUB echo 2\r\n")
        .await?;
    peer.settle().await?;
    tokio::spawn(async move {
        // The client notices: it gets no answer.
        let _ = subscribe(peer).await;
    });
    let ready = Ready {
        address,
        key: String::new(),
    };
    Ok((ready, server))
}

/// Counts what comes without wanting an answer; answers the rest, with the count or as it came.
async fn subscribe(mut peer: Peer) -> anyhow::Result<()> {
    let mut messages = 0_u64;
    loop {
        let Some(message) = peer.next().await? else {
            continue;
        };
        if message.reply.is_empty() {
            messages += u64::from(peer.payload.len() == MESSAGE);
            continue;
        }
        if message.echo {
            let payload = peer.payload.clone();
            peer.publish(&message.reply, b"", &payload).await?;
        } else {
            peer.publish(&message.reply, b"", messages.to_string().as_bytes())
                .await?;
        }
        peer.write.flush().await?;
    }
}

struct Message {
    echo: bool,
    reply: Vec<u8>,
}

/// A connection to the server.
struct Peer {
    read: BufReader<OwnedReadHalf>,
    write: BufWriter<OwnedWriteHalf>,
    line: Vec<u8>,
    /// Of the last message.
    payload: Vec<u8>,
    /// Answers to `settle`.
    pongs: u64,
}

impl Peer {
    async fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let (read, write) = tcp.into_split();
        let mut peer = Self {
            read: BufReader::with_capacity(BUFFER, read),
            write: BufWriter::with_capacity(BUFFER, write),
            line: Vec::new(),
            payload: Vec::new(),
            pongs: 0,
        };
        peer.write
            .write_all(b"CONNECT {\"verbose\":false,\"pedantic\":false}\r\n")
            .await?;
        peer.settle().await?;
        Ok(peer)
    }

    /// Waits until the server has dealt with all that was written.
    async fn settle(&mut self) -> anyhow::Result<()> {
        let before = self.pongs;
        self.write.write_all(b"PING\r\n").await?;
        self.write.flush().await?;
        while self.pongs == before {
            ensure!(self.next().await?.is_none(), "a message instead of a pong");
        }
        Ok(())
    }

    async fn publish(&mut self, subject: &[u8], reply: &[u8], data: &[u8]) -> anyhow::Result<()> {
        for part in [b"PUB ", subject, b" ", reply] {
            self.write.write_all(part).await?;
        }
        let size = format!(" {}\r\n", data.len());
        for part in [size.as_bytes(), data, b"\r\n"] {
            self.write.write_all(part).await?;
        }
        Ok(())
    }

    /// The next message; `None` for any other line, which is dealt with.
    async fn next(&mut self) -> anyhow::Result<Option<Message>> {
        self.line.clear();
        ensure!(
            self.read.read_until(b'\n', &mut self.line).await? > 0,
            "nats-server has gone"
        );
        let mut words = self.line.trim_ascii_end().split(|byte| *byte == b' ');
        match words.next() {
            Some(b"MSG") => {}
            Some(b"PONG") => {
                self.pongs += 1;
                return Ok(None);
            }
            Some(b"PING") => {
                self.write.write_all(b"PONG\r\n").await?;
                self.write.flush().await?;
                return Ok(None);
            }
            Some(b"-ERR") => bail!("{}", String::from_utf8_lossy(&self.line)),
            _ => return Ok(None),
        }
        // The subject, the subscription, where to reply (if wanted), the size.
        let echo = words.next() == Some(b"echo");
        let (_, third) = (words.next(), words.next().context("no size")?);
        let (reply, size) = words.next().map_or((&b""[..], third), |size| (third, size));
        let size: usize = std::str::from_utf8(size)?.parse()?;
        ensure!(size <= BUFFER, "a message of {size} bytes");
        let reply = reply.to_vec();
        self.payload.resize(size + 2, 0);
        self.read.read_exact(&mut self.payload).await?;
        self.payload.truncate(size);
        Ok(Some(Message { echo, reply }))
    }

    /// The answer to a question.
    async fn ask(&mut self, subject: &[u8], inbox: &[u8], data: &[u8]) -> anyhow::Result<()> {
        self.publish(subject, inbox, data).await?;
        self.write.flush().await?;
        while self.next().await?.is_none() {}
        Ok(())
    }
}

/// Runs a scenario's client.
pub(crate) async fn drive(
    scenario: Scenario,
    ready: &Ready,
    load: &Load,
) -> anyhow::Result<Report> {
    let mut peers = Vec::with_capacity(load.sockets);
    for nth in 0..load.sockets {
        let mut peer = Peer::connect(ready.address).await?;
        let inbox = format!("inbox.{nth}");
        peer.write
            .write_all(format!("SUB {inbox} 1\r\n").as_bytes())
            .await?;
        peer.settle().await?;
        peers.push((peer, inbox));
    }
    match scenario {
        Scenario::Fanout => fanout(ready, peers, load).await,
        Scenario::Messages => messages(peers, load).await,
        Scenario::Ping => ping(peers, load).await,
        _ => bail!("NATS takes no part in it"),
    }
}

async fn messages(peers: Vec<(Peer, String)>, load: &Load) -> anyhow::Result<Report> {
    let each = load.count / load.sockets as u64;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for (mut peer, inbox) in peers {
        tasks.spawn(async move {
            let data = [0xa5; MESSAGE];
            let mut line = format!("PUB count {MESSAGE}\r\n").into_bytes();
            line.extend_from_slice(&data);
            line.extend_from_slice(b"\r\n");
            for _ in 0..each {
                peer.write.write_all(&line).await?;
            }
            peer.settle().await?;
            Ok((peer, inbox))
        });
    }
    let peers = all(tasks).await?;
    let (mut peer, inbox) = peers.into_iter().next().context("no sockets")?;
    peer.ask(b"count", inbox.as_bytes(), b"how many").await?;
    let messages: u64 = std::str::from_utf8(&peer.payload)?.parse()?;
    ensure!(
        messages == load.count,
        "{messages} messages of {} arrived",
        load.count
    );
    let rate = load.count as f64 / begun.elapsed().as_secs_f64();
    Ok(Report::default().value("rate", rate))
}

async fn ping(peers: Vec<(Peer, String)>, load: &Load) -> anyhow::Result<Report> {
    let each = load.count / load.sockets as u64;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for (mut peer, inbox) in peers {
        tasks.spawn(async move {
            let data = [0xa5; MESSAGE];
            let mut micros = Vec::with_capacity(each as usize);
            for _ in 0..each {
                let asked = Instant::now();
                peer.ask(b"echo", inbox.as_bytes(), &data).await?;
                micros.push(asked.elapsed().as_secs_f64() * 1e6);
                ensure!(peer.payload == data, "another reply than the request");
            }
            Ok(micros)
        });
    }
    let micros = all(tasks).await?.concat();
    Ok(ping_values(&micros, begun.elapsed()))
}

/// All peers subscribe to one subject, and one more publishes there.
async fn fanout(ready: &Ready, peers: Vec<(Peer, String)>, load: &Load) -> anyhow::Result<Report> {
    let run = Fanout::new(load);
    let mut tasks = JoinSet::new();
    for (mut peer, _) in peers {
        peer.write.write_all(b"SUB room 2\r\n").await?;
        peer.settle().await?;
        let (run, load) = (run.clone(), load.clone());
        tasks.spawn(async move {
            let mut millis = Vec::new();
            for _ in 0..load.count {
                while peer.next().await?.is_none() {}
                let sent = peer.payload.first_chunk().context("a short message")?;
                millis.push(run.received(u64::from_be_bytes(*sent)));
            }
            Ok(millis)
        });
    }
    let mut publisher = Peer::connect(ready.address).await?;
    let mut data = [0xa5; MESSAGE];
    let begun = Instant::now();
    for _ in 0..load.count {
        let now = run.next().await?.to_be_bytes();
        data.iter_mut().zip(now).for_each(|(byte, now)| *byte = now);
        publisher.publish(b"room", b"", &data).await?;
        publisher.write.flush().await?;
    }
    let millis = all(tasks).await?.concat();
    Ok(fanout::values(&millis, begun))
}
