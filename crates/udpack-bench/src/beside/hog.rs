//! The hostile client: how it takes all it can get of each thing.

use std::any::Any;
use std::env;
use std::future::Future;
use std::hint::black_box;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_bytes::ByteBuf;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use udpack::{Client, ClientBuilder, ConnectError, Fingerprint, Limits, Socket};

use super::bare::{self, Bare};
use super::hogs::{Grip, HOGS};
use super::{HOSTILE, Site, Target};
use crate::driver::{Whose, cpu};

/// One thing of `docs/RESOURCES.md` that one peer can use up.
pub(super) struct Row {
    pub(super) name: &'static str,
    /// Takes all of it and keeps it.
    take: fn(Reach) -> Taking,
    /// Whether the server says that all of it is taken.
    pub(super) reached: fn(&Site) -> bool,
    /// Whether the hostile client then has nothing to do: the server receives and sends almost nothing.
    pub(super) still: bool,
}

/// What keeps a thing taken while it lives.
type Taken = Box<dyn Any>;
type Taking = Pin<Box<dyn Future<Output = anyhow::Result<Taken>>>>;

macro_rules! row {
    ($name:literal, $take:expr, $still:literal, $reached:expr) => {
        Row {
            name: $name,
            take: |reach| Box::pin($take(reach)),
            reached: $reached,
            still: $still,
        }
    };
    // A pool of the file transfer, taken by this many sockets.
    ($name:literal, $sockets:literal, $still:literal) => {
        row!(
            $name,
            |reach| places(reach, $name, $sockets),
            $still,
            |site| site.is_exhausted($name)
        )
    };
}

pub(super) const ROWS: &[Row] = &[
    // What it costs the others that a process takes processor time of this machine, whatever it does with it.
    row!("a processor", compute, false, |_| { true }),
    row!("handshakes", handshakes, false, |site| {
        let metrics = site.server.metrics();
        let times = |refused: Option<&u64>| refused.copied().unwrap_or(0);
        let refused =
            times(metrics.knocks_refused.get("busy")) + times(metrics.refused.get("server_busy"));
        refused > 0 && metrics.handshakes_paced > 0
    }),
    row!("handshakes begun and left", leaves, false, |site| {
        site.server.metrics().handshakes_paced > 0
    }),
    row!("wrong tokens", guesses, false, |site| {
        site.server.metrics().tokens_slowed > 0
    }),
    row!("sockets of an address", sockets, true, |site| {
        site.server.sockets().len() > Limits::default().sockets_per_address
    }),
    row!("unfinished frames", unfinished, true, |site| {
        site.server.metrics().frames_held_up > 0
    }),
    // A window grows to its most while nobody reads.
    row!("windows", unread, true, |site| {
        let most = u64::from(Limits::default().connection_window);
        site.server.metrics().stats.wire_received >= SOCKETS as u64 * most
    }),
    row!("what is sent and not read", unheard, true, |site| {
        let queued = Limits::default().outbound_bytes as u64 / 2;
        site.flooded() >= SOCKETS as u64 * CHANNELS * queued
    }),
    row!("requests without an answer", unanswered, true, |site| {
        site.hanging() >= SOCKETS as u64 * CHANNELS
    }),
    row!("files", 13, true),
    row!("downloads", 7, true),
    row!("requests", 3, false),
    row!("hashes", 3, true),
    row!("checks", 3, true),
    row!("hooks", 3, true),
];

/// Sockets of the hostile client where it needs only a few.
const SOCKETS: usize = 4;
/// Channels of one of its sockets: the bound is 64.
const CHANNELS: u64 = 60;
/// The hostile client's address: the good one is at 127.0.0.1.
const FROM: [u8; 4] = [127, 0, 0, 2];
const HELD: &str = "held";

/// Where the server is.
#[derive(Clone, Copy)]
struct Reach {
    address: SocketAddr,
    key: Fingerprint,
}

impl Reach {
    fn client(self) -> ClientBuilder {
        Client::builder()
            .pin(self.key)
            .token(HOSTILE)
            .local_address(SocketAddr::from((FROM, 0)))
    }

    async fn connect(self) -> Result<Socket, ConnectError> {
        self.client().connect(&self.address.to_string()).await
    }

    async fn dial(self, endpoint: &quinn::Endpoint) -> Result<Bare, quinn::ConnectionError> {
        let config = bare::quic(bare::tls(&[b"udpack/1"]), 64 << 10);
        Bare::dial(endpoint, self.address, config).await
    }
}

fn endpoint() -> anyhow::Result<quinn::Endpoint> {
    Ok(quinn::Endpoint::client((FROM, 0).into())?)
}

/// Computes without an end, and does not talk to the server.
async fn compute(_: Reach) -> anyhow::Result<Taken> {
    let computing = std::thread::spawn(|| {
        let mut number = 0_u64;
        loop {
            number = black_box(number.wrapping_mul(31) + 1);
        }
    });
    Ok(Box::new(computing))
}

/// Shakes hands until it is refused, says nothing then, and comes again for those that are given up.
async fn handshakes(reach: Reach) -> anyhow::Result<Taken> {
    let endpoint = endpoint()?;
    let mut held = Vec::new();
    // Beyond its sockets an address is let in to be told so.
    while let Ok(bare) = reach.dial(&endpoint).await
        && held
            .iter()
            .all(|bare: &Bare| bare.conn.close_reason().is_none())
    {
        held.push(bare);
        ensure!(held.len() <= 256, "nobody refuses it");
    }
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            held.retain(|bare| bare.conn.close_reason().is_none());
            match reach.dial(&endpoint).await {
                Ok(bare) => held.push(bare),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    });
    Ok(Box::new(tasks))
}

/// Shakes hands and leaves, over and over.
async fn leaves(reach: Reach) -> anyhow::Result<Taken> {
    let endpoint = endpoint()?;
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let endpoint = endpoint.clone();
        tasks.spawn(async move {
            loop {
                match reach.dial(&endpoint).await {
                    Ok(bare) => bare.conn.close(0_u32.into(), b""),
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        });
    }
    Ok(Box::new(tasks))
}

async fn guesses(reach: Reach) -> anyhow::Result<Taken> {
    let client = Arc::new(reach.client().token("wrong").build()?);
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let client = client.clone();
        tasks.spawn(async move {
            let address = reach.address.to_string();
            loop {
                drop(client.connect(&address).await);
            }
        });
    }
    Ok(Box::new(tasks))
}

async fn sockets(reach: Reach) -> anyhow::Result<Taken> {
    let mut held = Vec::new();
    loop {
        match reach.connect().await {
            Ok(socket) => held.push(socket),
            Err(ConnectError::Denied(_)) => return Ok(Box::new(held)),
            Err(error) => bail!(error),
        }
    }
}

/// Begins the largest frame on every channel, and sends all of it but the last byte.
async fn unfinished(reach: Reach) -> anyhow::Result<Taken> {
    let frame = Limits::default().frame;
    let mut bytes = u32::try_from(frame)?.to_be_bytes().to_vec();
    bytes.resize(4 + frame - 1, 0x5a);
    let bytes = Arc::new(bytes);
    let mut held = Vec::new();
    for _ in 0..SOCKETS {
        let endpoint = endpoint()?;
        let bare = Arc::new(reach.dial(&endpoint).await?);
        let control = bare.enter(HOSTILE).await;
        let mut tasks = JoinSet::new();
        for id in 0..CHANNELS {
            let (bare, bytes) = (bare.clone(), bytes.clone());
            tasks.spawn(async move {
                let mut stream = bare.channel(id, "size").await;
                stream.write(&bytes).await;
                std::future::pending::<()>().await;
            });
        }
        held.push((endpoint, bare, control, tasks));
    }
    Ok(Box::new(held))
}

/// Sends without an end on channels that nobody reads.
async fn unread(reach: Reach) -> anyhow::Result<Taken> {
    let mut held = Vec::new();
    for _ in 0..SOCKETS {
        let socket = reach.connect().await?;
        let mut tasks = JoinSet::new();
        for _ in 0..CHANNELS {
            let channel = socket.open("deaf").await?;
            tasks.spawn(async move {
                let block = ByteBuf::from(vec![0; 64 << 10]);
                while channel.send("block", &block).await.is_ok() {}
            });
        }
        held.push((socket, tasks));
    }
    Ok(Box::new(held))
}

/// Reads nothing of what it is sent without an end.
async fn unheard(reach: Reach) -> anyhow::Result<Taken> {
    let mut held = Vec::new();
    for _ in 0..SOCKETS {
        let endpoint = endpoint()?;
        let bare = reach.dial(&endpoint).await?;
        let control = bare.enter(HOSTILE).await;
        let mut streams = Vec::new();
        for id in 0..CHANNELS {
            streams.push(bare.channel(id, "flood").await);
        }
        held.push((endpoint, bare, control, streams));
    }
    Ok(Box::new(held))
}

/// Asks on every channel what is never answered.
async fn unanswered(reach: Reach) -> anyhow::Result<Taken> {
    let mut held = Vec::new();
    for _ in 0..SOCKETS {
        let socket = reach.connect().await?;
        let mut tasks = JoinSet::new();
        for _ in 0..CHANNELS {
            let channel = socket.open("hang").await?;
            for n in 0..100_u64 {
                let channel = channel.clone();
                tasks.spawn(async move {
                    let answer = channel.request::<_, ()>("hang", &n);
                    let _ = answer.timeout(Duration::from_secs(600)).await;
                });
            }
        }
        held.push((socket, tasks));
    }
    Ok(Box::new(held))
}

/// Takes all places of one kind.
async fn places(reach: Reach, name: &str, count: usize) -> anyhow::Result<Taken> {
    let hog = HOGS.iter().find(|hog| hog.name == name);
    let hog = hog.context("no such place")?;
    let mut sockets = Vec::new();
    for _ in 0..count {
        sockets.push(reach.connect().await?);
    }
    let mut grip = Grip::over(sockets).await;
    (hog.take)(&mut grip).await;
    Ok(Box::new(grip))
}

/// The process of the hostile client; ends with this.
pub(super) struct Hogging(Child);

impl Hogging {
    /// Starts it and waits until it has what it can get.
    pub(super) fn start(row: &str, address: SocketAddr, key: Fingerprint) -> anyhow::Result<Self> {
        let child = Command::new(env::current_exe()?)
            .args(["hog", row, "--connect", &address.to_string()])
            .args(["--key", &key.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut this = Self(child);
        let stdout = this.0.stdout.take().context("no standard output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line.trim() == HELD, "the hostile client ended");
        Ok(this)
    }

    /// Seconds of processor time that it has taken.
    pub(super) fn cpu(&self) -> anyhow::Result<f64> {
        cpu(&self.0.id().to_string(), Whose::Own)
    }
}

impl Drop for Hogging {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Takes all it can get of one row and holds it, until standard input ends.
pub(super) fn hold(target: &Target) -> anyhow::Result<()> {
    let row = ROWS.iter().find(|row| row.name == target.row);
    let row = row.context("no such row")?;
    let reach = Reach {
        address: target.connect,
        key: target.key,
    };
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let taken = (row.take)(reach).await?;
        println!("{HELD}");
        io::stdout().flush()?;
        let ended = tokio::task::spawn_blocking(|| io::stdin().read_to_end(&mut Vec::new()));
        ended.await??;
        drop(taken);
        Ok(())
    })
}
