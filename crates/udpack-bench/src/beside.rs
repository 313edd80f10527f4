//! A good client beside a hostile one that has taken all it can get of one thing, for each such thing: how long the
//! good one's connecting, request and upload take alone, and beside the other.
//!
//! The server has its default limits and a runtime of its own; the hostile client is a process of its own, at another
//! address and with another token. `docs/RESOURCES.md` holds what was measured.

#[expect(dead_code, reason = "shared with tests")]
#[path = "../../udpack/tests/hostile/bare.rs"]
mod bare;
mod hog;
#[path = "../../udpack-transfer/tests/raw/hogs.rs"]
mod hogs;
#[path = "../../udpack-transfer/tests/raw/mod.rs"]
mod raw;

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde_bytes::ByteBuf;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::time::sleep;
use udpack::{
    Channel, Client, Context, Deny, Fault, Fingerprint, Hello, Identity, Peer, Router, Server,
    Socket, Tenant,
};
use udpack_transfer::{Event, Receiver, ReceiverConfig, Source, Store, StoreConfig, Uploader};

use crate::driver::{Whose, cpu};
use crate::report::Machine;
use crate::stats::median;
use hog::{Hogging, ROWS, Row};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Rounds, each with a new server
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only these rows: handshakes, files …
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Where files are kept meanwhile; by default memory (/dev/shm) where there is some
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// What the hostile client's process is told.
#[derive(Debug, Args)]
pub(crate) struct Target {
    /// The row
    row: String,
    /// The server's address
    #[arg(long)]
    connect: SocketAddr,
    /// The server's key
    #[arg(long)]
    key: Fingerprint,
}

const GOOD: &str = "good";
const HOSTILE: &str = "hostile";
/// How often each round asks alone, and then beside.
const TIMES: usize = 3;
/// The good client's upload, in bytes.
const UPLOAD: usize = 64 << 10;
/// The hostile client's large file, and how many it has in a directory.
const LARGE: u64 = 1 << 30;
const MANY: usize = 2000;
/// How long the hostile client may take to get all it can.
const PATIENCE: Duration = Duration::from_secs(30);
/// So few bytes in 100 ms are none.
const STILL: u64 = 64 << 10;
/// What the good client does, in the order of the columns.
const ASKED: [&str; 3] = ["put", "request", "connect"];

/// Measures each row and prints a table of milliseconds.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    for name in &options.only {
        ensure!(
            ROWS.iter().any(|row| row.name == name),
            "no row is called {name}"
        );
    }
    println!("{}, {} rounds", Machine::here()?, options.rounds);
    println!("milliseconds alone / beside = ratio\n");
    print!("| taken by one peer |");
    ASKED.iter().for_each(|asked| print!(" `{asked}` |"));
    println!(" processors: server and good client, hostile client |");
    println!("| --- | --- | --- | --- | --- |");
    let mut worst = 0.0_f64;
    for row in ROWS {
        if !options.only.is_empty() && !options.only.iter().any(|name| name == row.name) {
            continue;
        }
        let (mut alone, mut beside) = (Times::default(), Times::default());
        for _ in 0..options.rounds {
            round(row, options, &mut alone, &mut beside).with_context(|| row.name.to_owned())?;
        }
        print!("| {} |", row.name);
        for (alone, beside) in alone.asked.iter().zip(&beside.asked) {
            let (alone, beside) = (median(alone), median(beside));
            let ratio = beside / alone;
            worst = worst.max(ratio);
            print!(" {alone:.2} / {beside:.2} = {ratio:.2} |");
        }
        let [server, hostile] = Load::share(&beside.load);
        println!(" {server:.0} %, {hostile:.0} % |");
    }
    println!("\nthe highest ratio is {worst:.2}");
    Ok(())
}

#[derive(Default)]
struct Times {
    /// Milliseconds of each of [`ASKED`].
    asked: [Vec<f64>; 3],
    load: Vec<Load>,
}

/// Seconds of processor time, and of time.
struct Load {
    server: f64,
    hostile: f64,
    begun: Instant,
    lasted: f64,
}

impl Load {
    fn begin(hog: &Hogging) -> anyhow::Result<Self> {
        Ok(Self {
            server: cpu("self", Whose::Own)?,
            hostile: hog.cpu()?,
            begun: Instant::now(),
            lasted: 0.0,
        })
    }

    fn end(self, hog: &Hogging) -> anyhow::Result<Self> {
        Ok(Self {
            server: cpu("self", Whose::Own)? - self.server,
            hostile: hog.cpu()? - self.hostile,
            lasted: self.begun.elapsed().as_secs_f64(),
            ..self
        })
    }

    /// Percents of all processors that the server's process and the hostile client's took.
    fn share(all: &[Self]) -> [f64; 2] {
        let sum = |part: fn(&Self) -> f64| all.iter().map(part).sum::<f64>();
        let processors = available_parallelism().map_or(1, usize::from);
        let whole = sum(|load| load.lasted) * processors as f64;
        [sum(|load| load.server), sum(|load| load.hostile)].map(|part| part / whole * 100.0)
    }
}

fn round(
    row: &Row,
    options: &Options,
    alone: &mut Times,
    beside: &mut Times,
) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let site = Site::new(row, options)?;
    let early = runtime.block_on(site.connect())?;
    // What is done for the first time takes longer.
    let mut warm = Times::default();
    runtime.block_on(site.measure(&early, &mut warm))?;
    runtime.block_on(site.measure(&early, alone))?;
    let hog = Hogging::start(row.name, site.server.local_addr(), site.key())?;
    let deadline = Instant::now() + PATIENCE;
    // The good client's connection lives on this thread: it must not block.
    let pause = |millis| runtime.block_on(async { sleep(Duration::from_millis(millis)).await });
    while !(row.reached)(&site) {
        ensure!(Instant::now() < deadline, "the bound is not reached");
        pause(10);
    }
    // What fills a bound is under way for a while.
    let mut passed = site.passed();
    loop {
        pause(100);
        let now = site.passed();
        if !row.still || now < passed + STILL {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "the hostile client does not rest"
        );
        passed = now;
    }
    let load = Load::begin(&hog)?;
    runtime.block_on(site.measure(&early, beside))?;
    beside.load.push(load.end(&hog)?);
    ensure!((row.reached)(&site), "the bound was not kept up");
    drop(hog);
    drop(site);
    Ok(())
}

/// A server that takes files and has a channel for everything.
struct Site {
    server: Server,
    receiver: Receiver,
    runtime: Option<Runtime>,
    counts: Arc<Counts>,
    _dir: TempDir,
}

/// What the channels of a [`Site`] have done.
#[derive(Default)]
struct Counts {
    /// Bytes that `flood` has handed over.
    flooded: AtomicU64,
    /// Requests that `hang` holds.
    hanging: AtomicU64,
}

impl Site {
    fn new(row: &Row, options: &Options) -> anyhow::Result<Self> {
        let memory = PathBuf::from("/dev/shm");
        let dir = match &options.dir {
            Some(dir) => tempfile::tempdir_in(dir)?,
            None if memory.is_dir() => tempfile::tempdir_in(memory)?,
            None => tempfile::tempdir()?,
        };
        let root = dir.path().join("up");
        let config = StoreConfig {
            min_free: Some(0),
            ..StoreConfig::default()
        };
        let mut receiver = Receiver::new(Store::open(&root, config)?, ReceiverConfig::default());
        if row.name == "hooks" {
            receiver = receiver.hook(hogs::Stuck(HOSTILE));
        }
        fs::File::create(root.join(hogs::LARGE))?.set_len(LARGE)?;
        fs::create_dir(root.join(hogs::MANY))?;
        for n in 0..MANY {
            fs::write(root.join(hogs::MANY).join(n.to_string()), "")?;
        }
        let runtime = Builder::new_multi_thread().enable_all().build()?;
        let counts = Arc::<Counts>::default();
        let hang = {
            let counts = counts.clone();
            move |_: u64, _: Context| {
                counts.hanging.fetch_add(1, Ordering::Relaxed);
                std::future::pending::<Result<(), Fault>>()
            }
        };
        let flood = {
            let counts = counts.clone();
            move |channel| flood(channel, counts.clone())
        };
        let server = runtime.block_on(async {
            let server = Server::builder()
                .identity(Identity::generate()?)
                .auth(admit)
                .channel("echo", Router::new().on("echo", echo))
                .channel("size", Router::new().on("size", size))
                .channel("hang", Router::new().on("hang", hang))
                .channel("deaf", |channel: Channel| async move {
                    channel.closed().await;
                })
                .channel("flood", flood);
            anyhow::Ok(receiver.attach(server).bind("127.0.0.1:0").await?)
        })?;
        Ok(Self {
            server,
            receiver,
            runtime: Some(runtime),
            counts,
            _dir: dir,
        })
    }

    fn key(&self) -> Fingerprint {
        self.server.fingerprint()
    }

    /// Whether the hostile client holds all places of this pool that it may, and waits for more.
    fn is_exhausted(&self, name: &str) -> bool {
        let mut pools = self.receiver.pools();
        pools
            .find(|(known, _)| *known == name)
            .is_some_and(|(_, pool)| hogs::is_exhausted(pool, &Tenant::peer(&Peer::new(HOSTILE))))
    }

    fn flooded(&self) -> u64 {
        self.counts.flooded.load(Ordering::Relaxed)
    }

    fn hanging(&self) -> u64 {
        self.counts.hanging.load(Ordering::Relaxed)
    }

    /// Bytes that the server has sent and received.
    fn passed(&self) -> u64 {
        let metrics = self.server.metrics();
        metrics.stats.wire_sent + metrics.stats.wire_received
    }

    async fn connect(&self) -> anyhow::Result<Socket> {
        let client = Client::builder().pin(self.key()).token(GOOD);
        let address = self.server.local_addr().to_string();
        Ok(client.connect(&address).await?)
    }

    /// A good client's doings, a few times.
    async fn measure(&self, early: &Socket, times: &mut Times) -> anyhow::Result<()> {
        let channel = early.open("echo").await?;
        for n in 0..TIMES {
            let name = format!("{n}-{}", times.asked[0].len());
            let unique = format!(
                "{name}-{}",
                self.receiver.store().map_or(0, |store| store.stored().0)
            );
            let begun = Instant::now();
            let source = Source::bytes(vec![n as u8; UPLOAD], unique.parse()?);
            let mut upload = Uploader::new(early).put([source]);
            while let Some(event) = upload.next().await {
                if let Event::Failed { error, .. } = event {
                    bail!("the upload: {error}");
                }
            }
            times.asked[0].push(millis(begun));
            let begun = Instant::now();
            let answer: u64 = channel.request("echo", &7).await.context("the request")?;
            ensure!(answer == 7, "another answer");
            times.asked[1].push(millis(begun));
            let begun = Instant::now();
            let late = self.connect().await.context("connecting")?;
            times.asked[2].push(millis(begun));
            drop(late);
        }
        Ok(())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn millis(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

async fn admit(hello: Hello) -> Result<Peer, Deny> {
    let everything = [("scope".to_owned(), "read,write,delete".to_owned())];
    match hello.token() {
        name @ (GOOD | HOSTILE) => Ok(Peer::new(name).with_claims(everything.into())),
        _ => Err(Deny::auth_failed()),
    }
}

async fn echo(number: u64, _: Context) -> Result<u64, Fault> {
    Ok(number)
}

async fn size(bytes: ByteBuf, _: Context) -> Result<usize, Fault> {
    Ok(bytes.len())
}

/// Sends without an end.
async fn flood(channel: Channel, counts: Arc<Counts>) -> Result<(), udpack::SendError> {
    let block = ByteBuf::from(vec![0; 64 << 10]);
    loop {
        channel.send("block", &block).await?;
        counts
            .flooded
            .fetch_add(block.len() as u64, Ordering::Relaxed);
    }
}

/// Takes all it can get of one row and holds it, until standard input ends.
pub(crate) fn hold(target: &Target) -> anyhow::Result<()> {
    hog::hold(target)
}
