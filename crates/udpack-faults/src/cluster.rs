//! Three servers with a NATS broker between them, senders and members on each, and faults one after the other: each member
//! must hear each sender in order, nothing twice, and be told where something is missing.

use std::collections::HashMap;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use udpack::{Channel, Client, Fingerprint, Identity, Limits, TokenFile};

use crate::rig::{Rig, Server, free_port};
use crate::rng::Rng;

/// Servers.
const NODES: usize = 3;
/// Everything is accounted for in this time after a fault has ended: a node counts as lost after 10 s.
const PATIENCE: Duration = Duration::from_secs(90);
/// Bytes of each message beside its number.
const PADDING: usize = 512;

#[derive(Debug, Args)]
pub(crate) struct ClusterArgs {
    /// Faults, one after the other.
    #[arg(long, default_value_t = 8)]
    faults: u32,

    /// Members on each server.
    #[arg(long, default_value_t = 4)]
    members: usize,

    /// Longest time that the broker is paused or a server cut off, in seconds.
    #[arg(long, default_value_t = 4)]
    longest: u64,
}

pub(crate) fn run(args: &ClusterArgs, rig: &Rig, rng: Rng) -> anyhow::Result<bool> {
    let Some(broker) = Broker::start(rig)? else {
        println!("SKIPPED: no nats-server: scripts/install-test-tools");
        return Ok(true);
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(break_it(args, rig, rng, broker))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The `nats-server`.
struct Broker {
    port: u16,
    config: std::path::PathBuf,
    child: Child,
}

impl Broker {
    fn start(rig: &Rig) -> anyhow::Result<Option<Self>> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port();
        let config = rig.work().join("nats.conf");
        std::fs::write(
            &config,
            format!("listen: \"127.0.0.1:{port}\"\nmax_payload: 2MB\n"),
        )?;
        Ok(Self::spawn(&config).map(|child| Self {
            port,
            config,
            child,
        }))
    }

    fn spawn(config: &std::path::Path) -> Option<Child> {
        let names = ["nats-server", "/usr/sbin/nats-server"].into_iter();
        let start = |name| {
            let mut command = Command::new(name);
            command.arg("-c").arg(config);
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        };
        names.map(start).find_map(Result::ok)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("the broker is gone")
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = Self::spawn(&self.config).context("nats-server does not start again")?;
        Ok(())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The way of one server to the broker, which can be cut.
struct Way {
    port: u16,
    cut: watch::Sender<bool>,
}

impl Way {
    async fn to(broker: u16) -> anyhow::Result<Self> {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let cut = watch::Sender::new(false);
        let state = cut.subscribe();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(relay(stream, broker, state.clone()));
            }
        });
        Ok(Self { port, cut })
    }
}

/// Passes bytes on until the way is cut; the ends hear nothing then, as where a cable is pulled.
async fn relay(mut stream: TcpStream, broker: u16, mut cut: watch::Receiver<bool>) {
    let _ = cut.wait_for(|cut| !cut).await;
    let Ok(mut there) = TcpStream::connect((Ipv4Addr::LOCALHOST, broker)).await else {
        return;
    };
    tokio::select! {
        _ = copy_bidirectional(&mut stream, &mut there) => return,
        _ = cut.wait_for(|cut| *cut) => {}
    }
    // Held, so that no reset tells of it, and closed with what was under way lost.
    let _ = cut.wait_for(|cut| !cut).await;
}

/// What a sender has had confirmed by its server.
struct Sender {
    id: u64,
    node: usize,
    confirmed: AtomicU64,
    /// Its server was killed.
    over: AtomicBool,
}

/// What a member knows of the senders.
#[derive(Default)]
struct Heard {
    /// The last number of each, and whether a gap came after it.
    senders: HashMap<u64, (u64, bool)>,
    over: bool,
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    heard: AtomicU64,
    gaps: AtomicU64,
    told: AtomicU64,
    holes: AtomicU64,
    missing: AtomicU64,
    doubled: AtomicU64,
    silent: AtomicU64,
}

impl Counts {
    fn add(count: &AtomicU64, n: u64) {
        count.fetch_add(n, Ordering::Relaxed);
    }

    fn get(count: &AtomicU64) -> u64 {
        count.load(Ordering::Relaxed)
    }
}

/// One server with those on it.
struct Node {
    port: u16,
    way: Way,
    server: Option<Server>,
    members: Vec<Arc<Member>>,
}

struct Member {
    heard: Mutex<Heard>,
    /// It takes nothing.
    lazy: watch::Sender<bool>,
}

struct World<'a> {
    rig: &'a Rig,
    pin: Fingerprint,
    token: String,
    nodes: Vec<Node>,
    senders: Vec<Arc<Sender>>,
    counts: Arc<Counts>,
    pause: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

async fn break_it(
    args: &ClusterArgs,
    rig: &Rig,
    mut rng: Rng,
    mut broker: Broker,
) -> anyhow::Result<bool> {
    let mut world = World::new(rig, &mut rng, &broker).await?;
    for node in 0..NODES {
        world.start(node, args.members).await?;
    }
    world.settle().await?;
    let begun = Instant::now();
    let names = ["kill", "pause", "empty", "cut", "slow"];
    let mut done = [0_u32; 5];
    for _ in 0..args.faults {
        let fault = rng.index(names.len());
        let node = rng.index(NODES);
        let time = Duration::from_millis(rng.range(100, args.longest * 1000));
        world.pause.send_replace(false);
        match names[fault] {
            "kill" => {
                tokio::time::sleep(time / 4).await;
                world.kill(node);
                tokio::time::sleep(time / 2).await;
                world.start(node, args.members).await?;
            }
            "pause" => {
                broker.signal(Signal::STOP)?;
                tokio::time::sleep(time).await;
                broker.signal(Signal::CONT)?;
            }
            "empty" => {
                tokio::time::sleep(time / 4).await;
                broker.restart()?;
            }
            "cut" => {
                world.nodes[node].way.cut.send_replace(true);
                tokio::time::sleep(time).await;
                world.nodes[node].way.cut.send_replace(false);
            }
            _ => {
                let member = rng.index(args.members);
                let member = world.nodes[node].members[member].clone();
                member.lazy.send_replace(true);
                tokio::time::sleep(time).await;
                member.lazy.send_replace(false);
            }
        }
        done[fault] += 1;
        tokio::time::sleep(Duration::from_millis(300)).await;
        world
            .settle()
            .await
            .with_context(|| format!("after {} of server {node} for {time:?}", names[fault]))?;
    }
    let faults: Vec<String> = names
        .iter()
        .zip(done)
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    Ok(world.report(&faults.join(", "), begun.elapsed()))
}

impl<'a> World<'a> {
    async fn new(rig: &'a Rig, rng: &mut Rng, broker: &Broker) -> anyhow::Result<Self> {
        let keys = rig.keys();
        std::fs::create_dir_all(&keys)?;
        let pin = Identity::load_or_create(&keys)?.fingerprint();
        let tokens = TokenFile::load_or_create(keys.join("token"))?;
        let token = tokens.first_token().context("a new token is plain")?;
        let mut nodes = Vec::new();
        for _ in 0..NODES {
            nodes.push(Node {
                port: free_port(rng)?,
                way: Way::to(broker.port).await?,
                server: None,
                members: Vec::new(),
            });
        }
        Ok(Self {
            rig,
            pin,
            token: token.to_string(),
            nodes,
            senders: Vec::new(),
            counts: Arc::default(),
            pause: watch::Sender::new(false),
            tasks: JoinSet::new(),
        })
    }

    /// Starts a server, and a sender and members on it.
    async fn start(&mut self, at: usize, members: usize) -> anyhow::Result<()> {
        let node = &mut self.nodes[at];
        let url = format!("nats://127.0.0.1:{}", node.way.port);
        let uploads = self.rig.work().join(format!("uploads-{at}"));
        let name = format!("node-{at}");
        let begun = Instant::now();
        node.server = loop {
            let arguments = ["--cluster", &url, "--cluster-name", &name, "--no-tcp"];
            match self.rig.server_with(node.port, &uploads, &arguments) {
                Ok(server) => break Some(server),
                // The broker may be about to start.
                Err(error) if begun.elapsed() > PATIENCE => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        };
        node.members.clear();
        for _ in 0..members {
            let channel = self.connect(at).await?;
            let member = Arc::new(Member {
                heard: Mutex::default(),
                lazy: watch::Sender::new(false),
            });
            self.nodes[at].members.push(member.clone());
            self.tasks.spawn(hear(channel, member, self.counts.clone()));
        }
        let sender = Arc::new(Sender {
            id: self.senders.len() as u64,
            node: at,
            confirmed: AtomicU64::new(0),
            over: AtomicBool::new(false),
        });
        let channel = self.connect(at).await?;
        self.senders.push(sender.clone());
        let (pause, counts) = (self.pause.subscribe(), self.counts.clone());
        self.tasks.spawn(send(channel, sender, pause, counts));
        Ok(())
    }

    async fn connect(&self, at: usize) -> anyhow::Result<Channel> {
        let limits = Limits {
            stream_window: 64 << 10,
            connection_window: 64 << 10,
            ..Limits::default()
        };
        let socket = Client::builder()
            .pin(self.pin)
            .token(self.token.as_str())
            .limits(limits)
            .connect(&format!("127.0.0.1:{}", self.nodes[at].port))
            .await?;
        let channel = socket.open("events").await?;
        // The answer tells that it has joined.
        let _: serde_json::Value = channel.request("joined", &()).await?;
        Ok(channel)
    }

    fn kill(&mut self, at: usize) {
        for sender in self.senders.iter().filter(|sender| sender.node == at) {
            sender.over.store(true, Ordering::Relaxed);
        }
        if let Some(server) = self.nodes[at].server.take() {
            server.kill();
        }
        for member in &self.nodes[at].members {
            lock(&member.heard).over = true;
        }
    }

    /// Waits until everything that was confirmed is with each member that has heard its sender, or a gap in its place.
    async fn settle(&self) -> anyhow::Result<()> {
        self.pause.send_replace(true);
        let begun = Instant::now();
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let Some(open) = self.open() else {
                return Ok(());
            };
            if begun.elapsed() > PATIENCE {
                Counts::add(&self.counts.silent, 1);
                bail!("a loss that nobody told of: {open}");
            }
            ensure!(
                self.nodes.iter().all(|node| node.server.is_some()),
                "a server is missing"
            );
        }
    }

    fn open(&self) -> Option<String> {
        let members = self.nodes.iter().enumerate();
        let members = members.flat_map(|(at, node)| node.members.iter().map(move |m| (at, m)));
        for (at, member) in members {
            let heard = lock(&member.heard);
            for sender in &self.senders {
                let confirmed = sender.confirmed.load(Ordering::Relaxed);
                if let Some((last, gap)) = heard.senders.get(&sender.id)
                    && *last < confirmed
                    && !gap
                    && !heard.over
                {
                    return Some(format!(
                        "a member on server {at} has {last} of sender {} on server {}, which sent {confirmed}",
                        sender.id, sender.node
                    ));
                }
            }
        }
        None
    }

    fn report(&self, faults: &str, took: Duration) -> bool {
        let counts = &self.counts;
        println!(
            "{faults} in {:.0} s: sent {}, heard {}, gaps {} of {} messages, holes {} of {} messages, \
             doubled or reordered {}, holes without a gap {}",
            took.as_secs_f64(),
            Counts::get(&counts.sent),
            Counts::get(&counts.heard),
            Counts::get(&counts.gaps),
            Counts::get(&counts.told),
            Counts::get(&counts.holes),
            Counts::get(&counts.missing),
            Counts::get(&counts.doubled),
            Counts::get(&counts.silent),
        );
        Counts::get(&counts.doubled) + Counts::get(&counts.silent) == 0
    }
}

/// Sends numbers until its server is gone.
async fn send(
    channel: Channel,
    sender: Arc<Sender>,
    mut pause: watch::Receiver<bool>,
    counts: Arc<Counts>,
) {
    let padding = "x".repeat(PADDING);
    // Nobody takes what comes to this channel but the task that waits for replies.
    for n in 1_u64.. {
        if pause.wait_for(|pause| !pause).await.is_err() {
            return;
        }
        let message = (sender.id, n, &padding);
        let reply: Result<serde_json::Value, _> = channel.request("line", &message).await;
        if reply.is_err() {
            return;
        }
        sender.confirmed.store(n, Ordering::Relaxed);
        Counts::add(&counts.sent, 1);
        tokio::time::sleep(Duration::from_millis(10)).await;
        while let Some(Ok(Some(_))) = futures_now(channel.recv()).await {}
    }
}

/// What is there already.
async fn futures_now<F: Future>(future: F) -> Option<F::Output> {
    tokio::time::timeout(Duration::ZERO, future).await.ok()
}

/// Takes everything that comes, and looks whether it may.
async fn hear(channel: Channel, member: Arc<Member>, counts: Arc<Counts>) {
    let mut lazy = member.lazy.subscribe();
    while let Ok(Some(message)) = channel.recv().await {
        if lazy.wait_for(|lazy| !lazy).await.is_err() {
            return;
        }
        let mut heard = lock(&member.heard);
        if let Some(gap) = message.gap() {
            Counts::add(&counts.gaps, 1);
            Counts::add(&counts.told, gap.lost);
            heard.senders.values_mut().for_each(|(_, gap)| *gap = true);
            continue;
        }
        let Ok((from, n, _)) = message.data::<(u64, u64, &str)>() else {
            // A greeting.
            continue;
        };
        Counts::add(&counts.heard, 1);
        let Some((last, gap)) = heard.senders.insert(from, (n, false)) else {
            continue;
        };
        if n <= last {
            Counts::add(&counts.doubled, 1);
            println!("{n} of sender {from} after {last}");
        } else if n > last + 1 {
            Counts::add(&counts.holes, 1);
            Counts::add(&counts.missing, n - last - 1);
            if !gap {
                Counts::add(&counts.silent, 1);
                println!("{n} of sender {from} after {last}, and no gap");
            }
        }
    }
    lock(&member.heard).over = true;
}
