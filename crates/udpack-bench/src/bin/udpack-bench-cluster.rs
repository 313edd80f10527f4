//! One message to a room of many, on one server or spread over the nodes of a cluster: what `bench/cluster.sh` runs. A node and the
//! members are processes of their own; the members say what they measured in a line of JSON.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::{Parser, Subcommand};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use udpack::{Channel, Client, Encoded, Fault, Fingerprint, Identity, Limits, Peer, Server};
use udpack_nats::Nats;

/// Messages that are under way at once where the rate is measured, so that nobody's queue overflows.
const WINDOW: usize = 4;
/// Bytes of each message beside its number and its time.
const TEXT: &str = "one of forty-four bytes, as in other fanouts";
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// From the last message of a steady run until what is missing counts as lost: marks come within 9 s.
const REST: Duration = Duration::from_secs(15);

#[derive(Debug, Parser)]
#[command(
    about = "Measures a room on one server or on the nodes of a cluster; bench/cluster.sh runs it"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves until it is killed; prints its address and the fingerprint of its key.
    Node {
        /// Directory of the key, which all nodes share.
        keys: PathBuf,
        /// The broker, `nats://HOST:PORT`; a server of its own without.
        #[arg(long)]
        cluster: Option<String>,
    },
    /// Connects members to the nodes in turn, and one more client that sends; prints what was measured.
    Members {
        /// The key of all nodes.
        key: Fingerprint,
        /// Their addresses.
        #[arg(required = true)]
        nodes: Vec<SocketAddr>,
        #[arg(long, default_value_t = 1000)]
        members: usize,
        /// Messages, as fast as members take them.
        #[arg(long, default_value_t = 300)]
        count: u64,
        /// Instead, one every 20 ms for so many seconds: how many are lost, and how many of these are told.
        #[arg(long)]
        steady: Option<u64>,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Node { keys, cluster } => node(keys, cluster).await,
        Command::Members {
            key,
            nodes,
            members,
            count,
            steady,
        } => {
            let clients = Clients { key, nodes };
            let work = async {
                match steady {
                    Some(seconds) => clients.lost(members, seconds).await,
                    None => clients.rate(members, count).await,
                }
            };
            let told = tokio::time::timeout(PATIENCE, work);
            println!("{}", told.await.context("it takes too long")??);
            Ok(())
        }
    }
}

async fn node(keys: PathBuf, cluster: Option<String>) -> anyhow::Result<()> {
    let limits = Limits {
        sockets: 1 << 16,
        sockets_per_address: 1 << 16,
        ..Limits::default()
    };
    let server = Server::builder()
        .identity(Identity::load_or_create(keys)?)
        .auth(|_| async { Ok(Peer::new("bench")) })
        .limits(limits)
        .channel("room", room);
    let server = match cluster {
        Some(url) => server.cluster(Nats::connect(&url).await?),
        None => server,
    };
    let server = server.bind("127.0.0.1:0").await?;
    println!("{} {}", server.local_addr(), server.fingerprint());
    std::future::pending::<()>().await;
    drop(server);
    Ok(())
}

/// Members join; whatever is said goes to all of them.
async fn room(channel: Channel) -> anyhow::Result<()> {
    let rooms = channel.rooms_handle().context("a server has rooms")?;
    while let Some(message) = channel.recv().await? {
        if message.event() == "join" {
            match channel.join("all") {
                Ok(()) => channel.reply(&message, &()).await?,
                Err(error) => channel.fault(&message, &Fault::from(error)).await?,
            }
        } else {
            rooms.to("all").send_encoded(&Encoded::relay(&message)?);
        }
    }
    Ok(())
}

struct Clients {
    key: Fingerprint,
    nodes: Vec<SocketAddr>,
}

impl Clients {
    /// A channel to each node in turn. The sockets live with their channels.
    async fn channels(&self, count: usize) -> anyhow::Result<Vec<(udpack::Socket, Channel)>> {
        let client = Client::builder().pin(self.key).build()?;
        let mut channels = Vec::with_capacity(count);
        for node in self.nodes.iter().cycle().take(count) {
            let socket = client.connect(&node.to_string()).await?;
            let channel = socket.open("room").await?;
            channels.push((socket, channel));
        }
        Ok(channels)
    }

    async fn members(&self, count: usize) -> anyhow::Result<Vec<(udpack::Socket, Channel)>> {
        let members = self.channels(count).await?;
        for (_, channel) in &members {
            let () = channel.request("join", &()).await?;
        }
        // Each node has heard of the others by then, and knows which streams it follows.
        tokio::time::sleep(Duration::from_secs(6)).await;
        Ok(members)
    }

    async fn rate(&self, count: usize, messages: u64) -> anyhow::Result<serde_json::Value> {
        let (epoch, window) = (Instant::now(), Arc::new(Semaphore::new(WINDOW)));
        let delivered = Arc::new(AtomicU64::new(0));
        let mut tasks: JoinSet<anyhow::Result<Vec<f64>>> = JoinSet::new();
        let members = self.members(count).await?;
        for (socket, channel) in members {
            let (window, delivered) = (window.clone(), delivered.clone());
            tasks.spawn(async move {
                let mut millis = Vec::new();
                for _ in 0..messages {
                    let message = channel.recv().await?.context("the room has closed")?;
                    ensure!(message.gap().is_none(), "messages are lost");
                    let (_, sent, _): (u64, u64, &str) = message.data()?;
                    let took = epoch.elapsed() - Duration::from_nanos(sent);
                    millis.push(took.as_secs_f64() * 1e3);
                    let seen = delivered.fetch_add(1, Ordering::Relaxed) + 1;
                    if seen.is_multiple_of(count as u64) {
                        window.add_permits(1);
                    }
                }
                drop(socket);
                Ok(millis)
            });
        }
        let sender = self.channels(1).await?;
        let begun = Instant::now();
        for n in 0..messages {
            window.acquire().await?.forget();
            let now = epoch.elapsed().as_nanos() as u64;
            for (_, channel) in &sender {
                channel.send("said", &(n, now, TEXT)).await?;
            }
        }
        let mut millis = Vec::new();
        while let Some(member) = tasks.join_next().await {
            millis.extend(member??);
        }
        let took = begun.elapsed().as_secs_f64();
        millis.sort_by(f64::total_cmp);
        let rank = |share: f64| millis.get((millis.len() as f64 * share) as usize);
        Ok(json!({
            "rate": millis.len() as f64 / took,
            "p50": rank(0.5),
            "p99": rank(0.99),
        }))
    }

    async fn lost(&self, count: usize, seconds: u64) -> anyhow::Result<serde_json::Value> {
        let mut tasks: JoinSet<anyhow::Result<(u64, u64)>> = JoinSet::new();
        let messages = seconds * 50;
        for (socket, channel) in self.members(count).await? {
            tasks.spawn(async move {
                let (mut heard, mut told, mut last) = (0_u64, 0_u64, None);
                let until = Duration::from_secs(seconds) + REST;
                let hear = async {
                    while let Some(message) = channel.recv().await? {
                        if let Some(gap) = message.gap() {
                            told += gap.lost;
                            continue;
                        }
                        let (n, _, _): (u64, u64, &str) = message.data()?;
                        ensure!(last.is_none_or(|last| last < n), "doubled or reordered");
                        (heard, last) = (heard + 1, Some(n));
                    }
                    Ok(())
                };
                if let Ok(ended) = tokio::time::timeout(until, hear).await {
                    ended?;
                }
                drop(socket);
                Ok((heard, told))
            });
        }
        let sender = self.channels(1).await?;
        println!("begun");
        let mut clock = tokio::time::interval(Duration::from_millis(20));
        for n in 0..messages {
            clock.tick().await;
            for (_, channel) in &sender {
                channel.send("said", &(n, 0_u64, TEXT)).await?;
            }
        }
        let (mut heard, mut told) = (0, 0);
        while let Some(member) = tasks.join_next().await {
            let (one_heard, one_told) = member??;
            (heard, told) = (heard + one_heard, told + one_told);
        }
        let all = messages * count as u64;
        Ok(json!({ "sent": all, "lost": all - heard, "told": told }))
    }
}
