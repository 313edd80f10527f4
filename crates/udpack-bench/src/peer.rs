//! One side of one arm, in a process of its own, and what it tells the driver on standard output.
//!
//! A server prints [`Ready`], then a [`Memory`] for each line it reads, and ends with its standard input. A client
//! prints [`Report`] when it is done; before that, a line [`MARK`] asks the driver to take the server's memory, and
//! the client waits for a line that says it is taken.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, stdin};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use crate::Heap;
use crate::args::{Arm, Load, Peer};
use crate::driver::{Whose, cpu};
use crate::raw::Settings;
use crate::{nats, ours, raw, udp, web, wss};

/// The longest that a client may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// A client's line that asks for the server's memory.
pub(crate) const MARK: &str = "mark";

/// Where a server listens, and how it is known.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) address: SocketAddr,
    pub(crate) key: String,
}

/// What a client measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// By the name of the metric.
    pub(crate) values: BTreeMap<String, f64>,
    /// Packets that it took for lost.
    pub(crate) lost: Option<u64>,
}

impl Report {
    pub(crate) fn value(mut self, name: &str, value: f64) -> Self {
        self.values.insert(name.to_owned(), value);
        self
    }

    pub(crate) fn lost(mut self, packets: u64) -> Self {
        self.lost = Some(packets);
        self
    }
}

/// What a process uses: bytes, and time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Memory {
    pub(crate) rss: f64,
    /// Where it is counted.
    pub(crate) heap: Option<f64>,
    /// Seconds of processor time so far.
    pub(crate) cpu: f64,
}

impl Memory {
    fn now(heap: Heap) -> anyhow::Result<Self> {
        let statm = fs::read_to_string("/proc/self/statm")?;
        let pages = statm.split(' ').nth(1).context("no resident pages")?;
        let pages: u64 = pages.parse()?;
        Ok(Self {
            rss: (pages * rustix::param::page_size() as u64) as f64,
            heap: heap.map(|heap| heap() as f64),
            cpu: cpu("self", Whose::Own)?,
        })
    }

    /// What each of `count` things takes of the growth to `after`, in kB.
    pub(crate) fn each(self, after: Self, count: usize) -> (f64, Option<f64>) {
        let kilobytes = |bytes: f64| bytes / count as f64 / 1e3;
        let heap = self.heap.zip(after.heap);
        (
            kilobytes(after.rss - self.rss),
            heap.map(|(before, after)| kilobytes(after - before)),
        )
    }
}

/// A client's view of the driver, for scenarios that measure memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Marks(Heap);

impl Marks {
    /// Has the server's memory taken, and takes ours.
    pub(crate) fn mark(self) -> anyhow::Result<Memory> {
        println!("{MARK}");
        if stdin().lock().read_line(&mut String::new())? == 0 {
            bail!("the driver has gone");
        }
        Memory::now(self.0)
    }
}

/// Serves until standard input ends.
pub(crate) fn serve(peer: &Peer, heap: Heap) -> anyhow::Result<()> {
    let load = peer.load();
    let runtime = runtime(&load)?;
    let (ready, _server) = runtime.block_on(start(peer, &load))?;
    println!("{}", serde_json::to_string(&ready)?);
    let mut line = String::new();
    while stdin().lock().read_line(&mut line)? > 0 {
        println!("{}", serde_json::to_string(&Memory::now(heap)?)?);
    }
    runtime.shutdown_background();
    Ok(())
}

async fn start(peer: &Peer, load: &Load) -> anyhow::Result<(Ready, Box<dyn Any>)> {
    let listen = peer.listen;
    Ok(match peer.arm {
        Arm::Udpack | Arm::Web => {
            let browsers = peer.arm == Arm::Web;
            let (ready, server) = ours::serve(listen, load, peer.dir.as_deref(), browsers).await?;
            (ready, Box::new(server))
        }
        Arm::Quinn | Arm::QuinnEach => raw::serve(listen, Settings::Defaults)?,
        Arm::Tuned => raw::serve(listen, Settings::Tuned)?,
        Arm::Wss | Arm::WssBatch => (wss::serve(listen).await?, Box::new(())),
        Arm::Udp => (udp::serve(listen)?, Box::new(())),
        Arm::Nats => {
            let (ready, server) = nats::serve(listen).await?;
            (ready, Box::new(server))
        }
    })
}

/// Runs a client, and prints what it measured.
pub(crate) fn drive(peer: &Peer, heap: Heap) -> anyhow::Result<()> {
    let load = peer.load();
    let ready = Ready {
        address: peer.connect,
        key: peer.key.clone(),
    };
    let marks = Marks(heap);
    let runtime = runtime(&load)?;
    let told = runtime.block_on(async {
        let client = async {
            match peer.arm {
                Arm::Udpack => ours::drive(peer.scenario, &ready, &load, marks).await,
                Arm::Quinn => {
                    let client = raw::Client::new(&ready, Settings::Defaults)?;
                    client.drive(peer, &load, false, marks).await
                }
                Arm::Tuned => {
                    let client = raw::Client::new(&ready, Settings::Tuned)?;
                    client.drive(peer, &load, false, marks).await
                }
                Arm::QuinnEach => {
                    let client = raw::Client::new(&ready, Settings::Defaults)?;
                    client.drive(peer, &load, true, marks).await
                }
                Arm::Web => web::drive(peer.scenario, &ready, &load, marks).await,
                Arm::Wss => wss::drive(peer.scenario, &ready, &load, 1).await,
                Arm::WssBatch => wss::drive(peer.scenario, &ready, &load, 256).await,
                Arm::Nats => nats::drive(peer.scenario, &ready, &load).await,
                Arm::Udp => udp::drive(peer.scenario, &ready, &load).await,
            }
        };
        let timely = tokio::time::timeout(PATIENCE, client).await;
        timely.context("the client took too long")?
    })?;
    println!("{}", serde_json::to_string(&told)?);
    runtime.shutdown_background();
    Ok(())
}

fn runtime(load: &Load) -> anyhow::Result<tokio::runtime::Runtime> {
    // A socket is a file, and there may be a thousand of them.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(workers) = load.workers {
        builder.worker_threads(workers);
    }
    builder
        .enable_all()
        .build()
        .context("cannot start the runtime")
}
