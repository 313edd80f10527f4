//! The arm that is measured: udpack by its public interface, with its default settings.

use std::io::{self, Read};
use std::iter;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::Serialize;
use tokio::task::JoinSet;
use udpack::{
    Channel, Client, CloseCode, Context, Deny, Encoded, Fault, Hello, Identity, Limits, Peer,
    RecvError, Router, Server, Socket, Web, wire::PREFIX,
};
use udpack_transfer::{
    Event, IfExists, Overwrite, Receiver, ReceiverConfig, RelPath, Source, Store, StoreConfig,
    Uploader,
};

use crate::args::{Load, Scenario};
use crate::fanout::{self, Fanout};
use crate::peer::{Marks, Ready, Report};
use crate::stats::rank;

pub(crate) const TOKEN: &str = "benchmarks-have-no-secrets";
/// Longest that a receiver may take to count what is still on its way.
const LAST: Duration = Duration::from_secs(120);
/// Bytes in one call of `send_bulk`, and in one write of raw quinn.
pub(crate) const CHUNK: usize = 1 << 20;
/// Bytes of an encoded `[event, data]`.
pub(crate) const MESSAGE: usize = 64;
/// Connections that are being made at once.
pub(crate) const AT_ONCE: usize = 32;

/// The time between two messages of `interference`.
const TICK: Duration = Duration::from_millis(10);
/// How late one may be sent before that counts as waiting: timers are as fine as a millisecond.
const LATE: Duration = Duration::from_millis(2);

/// The name of the event in `messages`.
pub(crate) const EVENT: &str = "message";
/// Its data, which takes [`MESSAGE`] bytes with it: 11 bytes are heads and the name.
pub(crate) const TEXT: &str = "a message of sixty-four bytes with its heads and name";

#[derive(Serialize)]
struct Nothing {}

/// Starts a server for all scenarios; with a directory, one that takes files as well. `browsers`: it serves those, too.
pub(crate) async fn serve(
    listen: SocketAddr,
    load: &Load,
    files: Option<&Path>,
    browsers: bool,
) -> anyhow::Result<(Ready, Server)> {
    // Defaults, but that all sockets come from one address, and one after the other without a pause.
    let sockets = Limits::default().sockets.max(load.sockets + AT_ONCE);
    let limits = Limits {
        sockets,
        sockets_per_address: sockets,
        ..Limits::default()
    };
    let echo = |text: String, _: Context| async move { Ok::<_, Fault>(text) };
    let server = Server::builder()
        .identity(Identity::generate()?)
        .auth(|hello: Hello| async move {
            if hello.token() == TOKEN {
                Ok(Peer::new("bench"))
            } else {
                Err(Deny::auth_failed())
            }
        })
        .limits(limits)
        .channel("sink", sink)
        .channel("echo", Router::new().on("echo", echo))
        .channel("mirror", mirror)
        .channel("room", room);
    let server = if browsers {
        server.web(Web::new())
    } else {
        server
    };
    let server = match files {
        Some(dir) => {
            let config = StoreConfig {
                min_free: Some(0),
                overwrite: Overwrite::Always,
                ..StoreConfig::default()
            };
            Receiver::new(Store::open(dir, config)?, ReceiverConfig::default()).attach(server)
        }
        None => server,
    };
    let server = server.bind(listen).await?;
    let ready = Ready {
        address: server.local_addr(),
        key: server.fingerprint().to_string(),
    };
    Ok((ready, server))
}

/// Counts what comes, messages only if they say what they should, and says how much it was when asked.
async fn sink(channel: Channel) -> Result<(), RecvError> {
    let (mut bytes, mut messages) = (0_u64, 0_u64);
    while let Some(message) = channel.recv().await? {
        match message.event() {
            EVENT => {
                bytes += message.len() as u64;
                messages += u64::from(message.data::<&str>().is_ok_and(|text| text == TEXT));
            }
            "bytes" => bytes += message.bulk("bytes").map_or(0, |bytes| bytes.len() as u64),
            _ => {
                let _ = channel.reply(&message, &(bytes, messages)).await;
            }
        }
    }
    Ok(())
}

/// Sends everything back.
async fn mirror(channel: Channel) -> Result<(), RecvError> {
    while let Some(message) = channel.recv().await? {
        let Ok(message) = Encoded::relay(&message) else {
            break;
        };
        if channel.send_encoded(&message).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Members join; whatever is said goes to all of them.
async fn room(channel: Channel) -> Result<(), RecvError> {
    let rooms = channel.rooms_handle();
    while let Some(message) = channel.recv().await? {
        if message.event() == "join" {
            let fault = channel.join("all").err().map(Fault::from);
            let _ = match fault {
                None => channel.reply(&message, &()).await,
                Some(fault) => channel.fault(&message, &fault).await,
            };
        } else if let Some(rooms) = &rooms
            && let Ok(said) = Encoded::relay(&message)
        {
            rooms.to("all").send_encoded(&said);
        }
    }
    Ok(())
}

/// Runs a scenario's client.
pub(crate) async fn drive(
    scenario: Scenario,
    ready: &Ready,
    load: &Load,
    marks: Marks,
) -> anyhow::Result<Report> {
    let dialler = Dialler::new(ready)?;
    match scenario {
        Scenario::Stream => stream(&dialler, load).await,
        Scenario::Messages => messages(&dialler, load).await,
        Scenario::Ping => ping(&dialler, load).await,
        Scenario::Handshakes => handshakes(&dialler, load).await,
        Scenario::Idle => idle(load, marks, |count| dialler.many(count)).await,
        Scenario::Fanout => fanout(&dialler, load).await,
        Scenario::Interference => interference(&dialler, load).await,
        Scenario::Upload | Scenario::SmallFiles => bail!("the real programs do that"),
    }
}

#[derive(Clone)]
struct Dialler {
    client: Client,
    address: String,
}

impl Dialler {
    fn new(ready: &Ready) -> anyhow::Result<Self> {
        let client = Client::builder().pin(ready.key.parse()?).token(TOKEN);
        Ok(Self {
            client: client.build()?,
            address: ready.address.to_string(),
        })
    }

    async fn one(&self) -> anyhow::Result<Socket> {
        Ok(self.client.connect(&self.address).await?)
    }

    async fn many(&self, count: usize) -> anyhow::Result<Vec<Socket>> {
        let dials = stream::iter(0..count).map(|_| self.one());
        dials.buffer_unordered(AT_ONCE).try_collect().await
    }
}

fn lost(sockets: &[Socket]) -> u64 {
    sockets
        .iter()
        .map(|socket| socket.stats().packets_lost)
        .sum()
}

async fn stream(dialler: &Dialler, load: &Load) -> anyhow::Result<Report> {
    let socket = dialler.one().await?;
    let channel = socket.open("sink").await?;
    let chunk = Bytes::from(vec![0xa5; CHUNK]);
    let begun = Instant::now();
    let mut left = load.bytes;
    while left > 0 {
        let size = left.min(CHUNK as u64);
        let payload = chunk.slice(..size as usize);
        channel
            .send_bulk("bytes", &Nothing {}, "bytes", payload)
            .await?;
        left -= size;
    }
    let (bytes, _): (u64, u64) = channel.request("done", &()).timeout(LAST).await?;
    let took = begun.elapsed().as_secs_f64();
    ensure!(
        bytes == load.bytes,
        "{bytes} bytes of {} arrived",
        load.bytes
    );
    Ok(Report::default()
        .value("rate", bytes as f64 / took / 1e6)
        .lost(lost(&[socket])))
}

async fn messages(dialler: &Dialler, load: &Load) -> anyhow::Result<Report> {
    let frame = Encoded::new(EVENT, TEXT)?.len();
    ensure!(frame == PREFIX + MESSAGE, "a message takes {frame} bytes");
    let sockets = dialler.many(load.sockets).await?;
    let mut channels = Vec::with_capacity(sockets.len());
    for socket in &sockets {
        channels.push(socket.open("sink").await?);
    }
    let each = load.count / load.sockets as u64;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for channel in channels {
        tasks.spawn(async move {
            for _ in 0..each {
                channel.send(EVENT, TEXT).await?;
            }
            let (bytes, messages): (u64, u64) = channel.request("done", &()).timeout(LAST).await?;
            ensure!(
                messages == each && bytes == each * frame as u64,
                "{messages} messages of {each} arrived, with {bytes} bytes"
            );
            Ok(())
        });
    }
    all(tasks).await?;
    let rate = load.count as f64 / begun.elapsed().as_secs_f64();
    Ok(Report::default().value("rate", rate).lost(lost(&sockets)))
}

/// Waits for all tasks; the first failure is the result.
pub(crate) async fn all<T: 'static>(
    mut tasks: JoinSet<anyhow::Result<T>>,
) -> anyhow::Result<Vec<T>> {
    let mut results = Vec::with_capacity(tasks.len());
    while let Some(result) = tasks.join_next().await {
        results.push(result.context("a task failed")??);
    }
    Ok(results)
}

async fn ping(dialler: &Dialler, load: &Load) -> anyhow::Result<Report> {
    let sockets = dialler.many(load.sockets).await?;
    let each = load.count / load.sockets as u64;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for socket in sockets.clone() {
        tasks.spawn(async move {
            let channel = socket.open("echo").await?;
            let mut micros = Vec::with_capacity(each as usize);
            for _ in 0..each {
                let asked = Instant::now();
                let text: String = channel.request("echo", TEXT).await?;
                micros.push(asked.elapsed().as_secs_f64() * 1e6);
                ensure!(text == TEXT, "another reply than the request");
            }
            Ok(micros)
        });
    }
    let micros = all(tasks).await?.concat();
    Ok(ping_values(&micros, begun.elapsed()).lost(lost(&sockets)))
}

async fn handshakes(dialler: &Dialler, load: &Load) -> anyhow::Result<Report> {
    let shake = async || -> anyhow::Result<f64> {
        let begun = Instant::now();
        let socket = dialler.one().await?;
        let millis = begun.elapsed().as_secs_f64() * 1e3;
        socket.abort(CloseCode::NORMAL, "");
        Ok(millis)
    };
    let begun = Instant::now();
    let mut alone = Vec::new();
    for _ in 0..load.count {
        alone.push(shake().await?);
    }
    let alone_took = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let shakes = stream::iter(0..load.count).map(|_| shake());
    let beside: Vec<f64> = shakes.buffer_unordered(AT_ONCE).try_collect().await?;
    let beside_took = begun.elapsed().as_secs_f64();
    Ok(handshake_values(&alone, alone_took, &beside, beside_took))
}

/// The values of `ping` from the microseconds of each and the time of all.
pub(crate) fn ping_values(micros: &[f64], took: Duration) -> Report {
    Report::default()
        .value("rate", micros.len() as f64 / took.as_secs_f64())
        .value("p50", rank(micros, 0.5))
        .value("p99", rank(micros, 0.99))
}

/// The values of `handshakes` from the milliseconds of each and the seconds of all.
pub(crate) fn handshake_values(
    alone: &[f64],
    alone_took: f64,
    beside: &[f64],
    beside_took: f64,
) -> Report {
    Report::default()
        .value("rate", alone.len() as f64 / alone_took)
        .value("p50", rank(alone, 0.5))
        .value("p99", rank(alone, 0.99))
        .value("p99.9", rank(alone, 0.999))
        .value("rate of 32", beside.len() as f64 / beside_took)
        .value("p50 of 32", rank(beside, 0.5))
        .value("p99 of 32", rank(beside, 0.99))
        .value("p99.9 of 32", rank(beside, 0.999))
}

/// Memory of `load.sockets` connections, as `many` makes them, on which nothing happens.
pub(crate) async fn idle<T>(
    load: &Load,
    marks: Marks,
    many: impl AsyncFn(usize) -> anyhow::Result<Vec<T>>,
) -> anyhow::Result<Report> {
    // What the first connections leave behind in both processes belongs to none of the others.
    let _first = many(AT_ONCE).await?;
    tokio::time::sleep(Duration::from_secs_f64(load.seconds)).await;
    let before = marks.mark()?;
    let begun = Instant::now();
    let _connections = many(load.sockets).await?;
    let connects = load.sockets as f64 / begun.elapsed().as_secs_f64();
    tokio::time::sleep(Duration::from_secs_f64(load.seconds)).await;
    let after = marks.mark()?;
    tokio::time::sleep(Duration::from_secs_f64(load.seconds)).await;
    // For what keeping them alive has cost meanwhile.
    marks.mark()?;
    let (rss, heap) = before.each(after, load.sockets);
    let told = Report::default()
        .value("client RSS", rss)
        .value("connects", connects);
    Ok(match heap {
        Some(heap) => told.value("client heap", heap),
        None => told,
    })
}

async fn fanout(dialler: &Dialler, load: &Load) -> anyhow::Result<Report> {
    let sockets = dialler.many(load.sockets).await?;
    let run = Fanout::new(load);
    let mut tasks = JoinSet::new();
    for socket in &sockets {
        let channel = socket.open("room").await?;
        let () = channel.request("join", &()).await?;
        let (run, load) = (run.clone(), load.clone());
        tasks.spawn(async move {
            let mut millis = Vec::new();
            for _ in 0..load.count {
                let message = channel.recv().await?.context("the room has closed")?;
                let (sent, _): (u64, &str) = message.data()?;
                millis.push(run.received(sent));
            }
            Ok(millis)
        });
    }
    let publisher = dialler.one().await?;
    let channel = publisher.open("room").await?;
    let begun = Instant::now();
    for _ in 0..load.count {
        let now = run.next().await?;
        channel.send("said", &(now, &TEXT[..44])).await?;
    }
    let millis = all(tasks).await?.concat();
    Ok(fanout::values(&millis, begun))
}

async fn interference(dialler: &Dialler, load: &Load) -> anyhow::Result<Report> {
    let socket = dialler.one().await?;
    let channel = socket.open("mirror").await?;
    let alone = ticks(&channel, load.seconds).await?;
    let acked = Arc::new(AtomicU64::new(0));
    let mut upload = JoinSet::<anyhow::Result<()>>::new();
    upload.spawn(endless(socket.clone(), load.bytes, acked.clone()));
    tokio::time::sleep(ramp(load)).await;
    let before = acked.load(Ordering::Relaxed);
    let begun = Instant::now();
    let beside = ticks(&channel, load.seconds).await?;
    let bytes = acked.load(Ordering::Relaxed) - before;
    let took = begun.elapsed();
    if let Some(ended) = upload.try_join_next() {
        ended.context("a task failed")??;
    }
    Ok(interference_values(&alone, &beside, bytes, took).lost(lost(&[socket])))
}

/// Uploads the same file again and again.
async fn endless(socket: Socket, bytes: u64, acked: Arc<AtomicU64>) -> anyhow::Result<()> {
    let name: RelPath = "upload".parse()?;
    let sources = iter::repeat_with(move || {
        let reader = io::repeat(0xa5).take(bytes);
        Source::reader(reader, name.clone())
    });
    let uploader = Uploader::new(&socket)
        .lanes(1)
        .if_exists(IfExists::Overwrite);
    let mut upload = uploader.put(sources);
    while let Some(event) = upload.next().await {
        match event {
            Event::Progress(progress) => acked.store(progress.acked, Ordering::Relaxed),
            Event::Failed { error, .. } => return Err(error.into()),
            _ => {}
        }
    }
    bail!("there is no end of files")
}

/// Milliseconds of round trips of messages that are sent at fixed times.
async fn ticks(channel: &Channel, seconds: f64) -> anyhow::Result<Vec<f64>> {
    let count = tick_count(seconds);
    let epoch = Instant::now();
    let sending = async {
        for nth in 0..count {
            let now = tick(epoch, nth).await;
            channel.send("tick", &(now, &TEXT[..44])).await?;
        }
        anyhow::Ok(())
    };
    let receiving = async {
        let mut millis = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let message = channel.recv().await?.context("the mirror has closed")?;
            let (sent, _): (u64, &str) = message.data()?;
            millis.push(millis_since(epoch, sent));
        }
        Ok(millis)
    };
    let ((), millis) = tokio::try_join!(sending, receiving)?;
    Ok(millis)
}

/// How many messages `interference` sends in so many seconds.
pub(crate) fn tick_count(seconds: f64) -> u64 {
    (seconds / TICK.as_secs_f64()).round() as u64
}

/// What the upload has to come up to speed before anything is measured beside it.
pub(crate) fn ramp(load: &Load) -> Duration {
    Duration::from_secs_f64(load.seconds.min(1.0))
}

/// Waits until the `nth` message is due; the nanoseconds since `epoch` from which its way counts. That is when it
/// was due if the one before it had to wait, so that no wait is left out.
pub(crate) async fn tick(epoch: Instant, nth: u64) -> u64 {
    let due = TICK * nth as u32;
    tokio::time::sleep_until((epoch + due).into()).await;
    let now = epoch.elapsed();
    let since = if now > due + LATE { due } else { now };
    since.as_nanos() as u64
}

/// Milliseconds since a moment that is told in nanoseconds since `epoch`.
pub(crate) fn millis_since(epoch: Instant, moment: u64) -> f64 {
    (epoch.elapsed().as_nanos() as u64).saturating_sub(moment) as f64 / 1e6
}

/// The values of `interference` from the milliseconds of each round trip and what was uploaded.
pub(crate) fn interference_values(
    alone: &[f64],
    beside: &[f64],
    bytes: u64,
    took: Duration,
) -> Report {
    Report::default()
        .value("p50 alone", rank(alone, 0.5))
        .value("p99 alone", rank(alone, 0.99))
        .value("p50 beside", rank(beside, 0.5))
        .value("p99 beside", rank(beside, 0.99))
        .value("p99 ratio", rank(beside, 0.99) / rank(alone, 0.99))
        .value("upload", bytes as f64 / took.as_secs_f64() / 1e6)
}
