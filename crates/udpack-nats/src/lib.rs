//! Rooms of [udpack](https://docs.rs/udpack) servers on several machines, over a NATS broker.
//!
//! ```no_run
//! # async fn run(builder: udpack::ServerBuilder) -> Result<(), Box<dyn std::error::Error>> {
//! use udpack_nats::Nats;
//!
//! let nats = Nats::connect("nats://127.0.0.1:4222").await?;
//! let server = builder.cluster(nats).advertise("node-1", "node-1.example:45456").bind("[::]:45456").await?;
//! # Ok(()) }
//! ```
//!
//! Core NATS is enough, with nothing on the broker's disk: one subject per room, to which a server subscribes while it
//! has members in it. With [`NatsOptions::keep_histories`] JetStream keeps the rooms with a history. The broker must take messages as large as the servers' frames: `max_payload: 2MB` in its configuration for
//! `Limits::default()`.
//!
//! Every queue is bounded: 8,192 messages and 32 MiB to the broker, the same again to the logs of rooms with a history; 1,024
//! messages from it for each room and 4,096 for all.
//! What has no place is lost, and the members are told how much.
#![warn(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod logs;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::jetstream::context::GetStreamError;
use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use udpack::History;
use udpack::cluster::{Cluster, Incoming, Lost, Topic};

use crate::logs::Logs;

/// Messages that wait for the broker, and their bytes.
const OUTGOING: usize = 8192;
const OUTGOING_BYTES: usize = 32 << 20;
/// Messages that wait in the client behind that, which knows no bytes.
const HANDED_OVER: usize = 32;
/// The most bytes of a message's headers in a log.
const HEADERS: usize = 128;
/// Messages of all topics that wait for the server, and of each one before that.
const INCOMING: usize = 4096;
const INCOMING_EACH: usize = 1024;
/// The broker is asked so often whether it is there; two answers may be missing.
const PING: Duration = Duration::from_secs(2);
/// Longest time for one attempt to connect.
const CONNECT: Duration = Duration::from_secs(5);
/// Shortest and longest time between two attempts.
const RETRY: (u64, u64) = (100, 2000);
/// Longest time for the last messages to leave.
const FLUSH: Duration = Duration::from_secs(2);

/// A connection to a NATS broker, to be given to
/// [`ServerBuilder::cluster`](udpack::ServerBuilder::cluster).
///
/// Dropping it closes the connection after what is queued has left, at the latest after two seconds.
pub struct Nats {
    outgoing: mpsc::Sender<(Topic, Bytes)>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Incoming>>,
    desk: Arc<Desk>,
    client: Client,
    logs: Option<Logs>,
}

/// How to connect; see [`Nats::options`].
#[derive(Debug, Clone)]
#[must_use = "options do nothing until `connect` is awaited"]
pub struct NatsOptions {
    namespace: String,
    wait: bool,
    replicas: Option<usize>,
}

/// Why there is no connection to the broker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NatsError {
    /// The address is none.
    #[error(
        "not the address of a NATS broker (nats://HOST:PORT or tls://HOST:PORT, several with commas)"
    )]
    Address(#[source] std::io::Error),
    /// A namespace is a part of subjects.
    #[error("a namespace has 1 to 64 letters, digits, - and _")]
    Namespace,
    /// The broker cannot be reached, or does not let us in.
    #[error("cannot connect to the NATS broker")]
    Connect(#[source] async_nats::ConnectError),
    /// The broker shall keep histories, and has no JetStream for this account.
    #[error("the NATS broker keeps no histories: it needs JetStream")]
    JetStream(#[source] GetStreamError),
}

/// What `Nats` and its task share.
#[derive(Default)]
struct Desk {
    queued: AtomicUsize,
    wanted: Mutex<Wanted>,
    /// `wanted` is not what the broker knows.
    changed: AtomicBool,
    work: Notify,
    news: Mutex<News>,
    told: Notify,
    /// Counts the connections to the broker.
    connections: watch::Sender<u64>,
}

/// The topics to be subscribed to, and those of which that has changed since the writer looked: it looks at no others, for there
/// are many.
#[derive(Default)]
struct Wanted {
    topics: HashSet<Topic>,
    changed: HashSet<Topic>,
}

impl Wanted {
    fn want(&mut self, topic: Topic) {
        if self.topics.insert(topic) {
            self.changed.insert(topic);
        }
    }

    fn leave(&mut self, topic: Topic) {
        if self.topics.remove(&topic) {
            self.changed.insert(topic);
        }
    }

    /// The topics that have changed, and whether each is wanted now.
    fn changes(&mut self) -> Vec<(Topic, bool)> {
        let changed = std::mem::take(&mut self.changed).into_iter();
        changed
            .map(|topic| (topic, self.topics.contains(&topic)))
            .collect()
    }
}

/// What is to be told before the next message.
#[derive(Default)]
struct News {
    up: Option<bool>,
    lost: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Nats {
    /// Connects to a broker, or the first of several that can be reached: `nats://HOST:PORT` or `tls://HOST:PORT`, with
    /// `USER:PASSWORD@` or `TOKEN@` before the host where the broker asks for it; several with commas between them. Later it
    /// reconnects by itself, for as long as it takes.
    ///
    /// # Errors
    /// When no broker can be reached within five seconds: a server that cannot reach its cluster when it starts is
    /// misconfigured more often than not. [`NatsOptions::start_degraded`] starts without.
    ///
    /// # Cancel safety
    /// Dropping the future gives the attempt up.
    pub async fn connect(url: &str) -> Result<Self, NatsError> {
        Self::options().connect(url).await
    }

    /// Other ways to connect.
    pub fn options() -> NatsOptions {
        NatsOptions {
            namespace: "udpack".to_owned(),
            wait: true,
            replicas: None,
        }
    }
}

impl NatsOptions {
    /// The first part of all subjects: servers of one namespace are one cluster. 1 to 64 letters, digits, `-` and `_`;
    /// `udpack` by default.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Does not wait for the broker: the server starts degraded and joins its cluster when the broker is there.
    pub fn start_degraded(mut self) -> Self {
        self.wait = false;
        self
    }

    /// Lets the broker keep the messages of rooms with a [history](udpack::Rooms::history): in a JetStream stream for each,
    /// on so many of the brokers (1 to 5; 1 if there is one). All nodes share it then, and it survives them. All nodes of
    /// a cluster must have this option, or none.
    pub fn keep_histories(mut self, replicas: usize) -> Self {
        self.replicas = Some(replicas.clamp(1, 5));
        self
    }

    /// Connects; see [`Nats::connect`].
    ///
    /// # Errors
    /// As there, for a namespace that cannot be one, and if the broker shall keep histories and has no JetStream.
    ///
    /// # Cancel safety
    /// Dropping the future gives the attempt up.
    pub async fn connect(self, url: &str) -> Result<Nats, NatsError> {
        let sound = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if !(1..=64).contains(&self.namespace.len()) || !self.namespace.chars().all(sound) {
            return Err(NatsError::Namespace);
        }
        let addresses: Vec<ServerAddr> = url
            .split(',')
            .map(|url| url.trim().parse())
            .collect::<Result<_, _>>()
            .map_err(NatsError::Address)?;
        let desk = Arc::new(Desk::default());
        let hears = Arc::downgrade(&desk);
        let random = RandomState::new();
        let mut options = ConnectOptions::new()
            .name("udpack")
            .no_echo()
            .ping_interval(PING)
            .connection_timeout(CONNECT)
            .client_capacity(HANDED_OVER)
            .subscription_capacity(INCOMING_EACH)
            .max_reconnects(None)
            .reconnect_delay_callback(move |attempts| {
                let most = RETRY.0.saturating_mul(1 << attempts.min(5)).min(RETRY.1);
                Duration::from_millis(most / 2 + random.hash_one(attempts) % (most / 2))
            })
            .event_callback(move |event| {
                if let Some(desk) = hears.upgrade() {
                    desk.hear(&event);
                }
                std::future::ready(())
            });
        if !self.wait {
            desk.tell(|news| news.up = Some(false));
            options = options.retry_on_initial_connect();
        }
        let client = options
            .connect(addresses)
            .await
            .map_err(NatsError::Connect)?;
        let (outgoing, queue) = mpsc::channel(OUTGOING);
        let (inbox, incoming) = mpsc::channel(INCOMING);
        let logs = self.replicas.map(|replicas| {
            let settings = (self.namespace.as_str(), replicas);
            Logs::new(&client, settings, inbox.clone(), desk.clone())
        });
        if let Some(logs) = logs.as_ref().filter(|_| self.wait) {
            logs.check().await.map_err(NatsError::JetStream)?;
        }
        let writer = Writer {
            namespace: self.namespace,
            client: client.clone(),
            desk: desk.clone(),
            inbox,
            readers: JoinSet::new(),
            subscribed: HashMap::new(),
        };
        tokio::spawn(writer.run(queue));
        Ok(Nats {
            outgoing,
            incoming: tokio::sync::Mutex::new(incoming),
            desk,
            client,
            logs,
        })
    }
}

impl Cluster for Nats {
    fn max_message(&self) -> usize {
        match self.client.try_server_info() {
            Some(info) => info.max_payload,
            None => 0,
        }
    }

    fn publish(&self, topic: Topic, message: Bytes) -> Result<(), Lost> {
        let size = message.len();
        let most = self.client.max_payload();
        if (most > 0 && size > most) || self.desk.queued.load(Ordering::Relaxed) > OUTGOING_BYTES {
            return Err(Lost);
        }
        self.desk.queued.fetch_add(size, Ordering::Relaxed);
        self.outgoing.try_send((topic, message)).map_err(|_| {
            self.desk.queued.fetch_sub(size, Ordering::Relaxed);
            Lost
        })
    }

    fn subscribe(&self, topic: Topic) {
        lock(&self.desk.wanted).want(topic);
        self.desk.change();
    }

    fn unsubscribe(&self, topic: Topic) {
        lock(&self.desk.wanted).leave(topic);
        self.desk.change();
    }

    fn keeps(&self) -> bool {
        self.logs.is_some()
    }

    fn keep(&self, topic: Topic, bounds: History) {
        if let Some(logs) = &self.logs {
            logs.keep(topic, bounds);
        }
    }

    fn forget(&self, topic: Topic) {
        if let Some(logs) = &self.logs {
            logs.forget(topic);
        }
    }

    fn append(&self, topic: Topic, message: Bytes) -> Result<(), Lost> {
        let most = self.client.max_payload();
        if most > 0 && message.len() + HEADERS > most {
            return Err(Lost);
        }
        self.logs.as_ref().ok_or(Lost)?.append(topic, message)
    }

    fn confirm(&self, topic: Topic, number: u64) {
        if let Some(logs) = &self.logs {
            logs.confirm(topic, number);
        }
    }

    fn next(&self) -> BoxFuture<'_, Option<Incoming>> {
        async {
            let mut incoming = self.incoming.lock().await;
            loop {
                if let Some(news) = self.desk.news() {
                    return Some(news);
                }
                tokio::select! {
                    biased;
                    () = self.desk.told.notified() => {}
                    message = incoming.recv() => return message,
                }
            }
        }
        .boxed()
    }
}

impl fmt::Debug for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nats")
            .field("state", &self.client.connection_state())
            .field("queued", &self.desk.queued)
            .field("logs", &self.logs)
            .finish_non_exhaustive()
    }
}

impl Desk {
    fn change(&self) {
        self.changed.store(true, Ordering::Release);
        self.work.notify_one();
    }

    fn tell(&self, change: impl FnOnce(&mut News)) {
        change(&mut lock(&self.news));
        self.told.notify_one();
    }

    /// Changes with each connection to the broker.
    fn connected(&self) -> watch::Receiver<u64> {
        self.connections.subscribe()
    }

    fn news(&self) -> Option<Incoming> {
        let mut news = lock(&self.news);
        if let Some(up) = news.up.take() {
            return Some(if up { Incoming::Up } else { Incoming::Down });
        }
        std::mem::take(&mut news.lost).then_some(Incoming::Lost)
    }

    fn hear(&self, event: &Event) {
        match event {
            Event::Connected => {
                self.connections.send_modify(|count| *count += 1);
                self.tell(|news| news.up = Some(true));
            }
            Event::Disconnected | Event::Closed => self.tell(|news| news.up = Some(false)),
            Event::SlowConsumer(_) => self.tell(|news| news.lost = true),
            Event::LameDuckMode => tracing::info!("the NATS broker is about to stop"),
            Event::Draining => {}
            Event::ServerError(error) => tracing::warn!(%error, "the NATS broker complains"),
            Event::ClientError(error) => tracing::warn!(%error, "trouble with the NATS broker"),
        }
    }
}

/// The task that talks to the broker.
struct Writer {
    namespace: String,
    client: Client,
    desk: Arc<Desk>,
    inbox: mpsc::Sender<Incoming>,
    readers: JoinSet<()>,
    subscribed: HashMap<Topic, tokio::task::AbortHandle>,
}

impl Writer {
    async fn run(mut self, mut queue: mpsc::Receiver<(Topic, Bytes)>) {
        loop {
            let message = tokio::select! {
                () = self.desk.work.notified() => None,
                message = queue.recv() => match message {
                    Some(message) => Some(message),
                    None => break,
                },
            };
            if self.desk.changed.swap(false, Ordering::Acquire) {
                self.subscribe().await;
            }
            if let Some((topic, message)) = message {
                let size = message.len();
                let subject = format!("{}.{topic}", self.namespace);
                // Too large or closed: the numbers tell whoever misses it.
                let _ = self.client.publish(subject, message).await;
                self.desk.queued.fetch_sub(size, Ordering::Relaxed);
            }
        }
        let _ = tokio::time::timeout(FLUSH, self.client.flush()).await;
    }

    /// Subscribes to what is wanted now and was not, and ends what is wanted no more.
    async fn subscribe(&mut self) {
        let changes = lock(&self.desk.wanted).changes();
        while self.readers.try_join_next().is_some() {}
        for (topic, wanted) in changes {
            if !wanted && let Some(reader) = self.subscribed.remove(&topic) {
                reader.abort();
            }
            if !wanted || self.subscribed.contains_key(&topic) {
                continue;
            }
            let subject = format!("{}.{topic}", self.namespace);
            let Ok(mut messages) = self.client.subscribe(subject).await else {
                // The client is closed.
                return;
            };
            let inbox = self.inbox.clone();
            let reader = self.readers.spawn(async move {
                while let Some(message) = messages.next().await {
                    let message = message.payload;
                    if inbox
                        .send(Incoming::Message { topic, message })
                        .await
                        .is_err()
                    {
                        break;
                    }
                }
            });
            self.subscribed.insert(topic, reader);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_writer_looks_at_what_has_changed_and_at_nothing_else() {
        let topic = |n: u32| Topic::room(&n.to_string());
        let mut wanted = Wanted::default();
        (0..65_536).for_each(|n| wanted.want(topic(n)));
        assert_eq!(wanted.changes().len(), 65_536);
        assert_eq!(wanted.changes(), []);
        wanted.want(topic(7));
        wanted.leave(topic(70_000));
        assert_eq!(wanted.changes(), [], "nothing is new");
        wanted.leave(topic(7));
        assert_eq!(wanted.changes(), [(topic(7), false)]);
        wanted.want(topic(7));
        wanted.leave(topic(7));
        wanted.want(topic(7));
        assert_eq!(wanted.changes(), [(topic(7), true)], "as it is in the end");
    }
}

#[cfg(doctest)]
#[doc = include_str!("../../../docs/CLUSTER.md")]
struct Guide;
