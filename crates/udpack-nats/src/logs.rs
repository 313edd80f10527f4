//! Logs of rooms, each in a JetStream stream of its own: appended to message by message, and read in the stream's order.
//!
//! The broker is asked for nothing that it does not need: the reader is a consumer without acknowledgements, which the
//! broker forgets by itself. Whatever goes wrong, the reader begins again at the entry that it needs next, and the
//! writer sends the message again that was not acknowledged; the broker knows it by its id for two minutes, and servers
//! by its number after that.

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_nats::Client;
use async_nats::connection::State;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::context::{
    Context, ContextBuilder, GetStreamError, GetStreamErrorKind, PublishErrorKind,
};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{self, DiscardPolicy, Info, StorageType, Stream};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use udpack::History;
use udpack::cluster::{Incoming, Kept, Lost, Topic};

use crate::{Desk, FLUSH, OUTGOING, OUTGOING_BYTES, lock};

/// Longest time for an answer of the broker.
const ANSWER: Duration = Duration::from_secs(5);
/// Entries that are asked for at once. They wait in the client, which has room for more.
const BATCH: usize = 256;
/// The broker shows this often that a reader is still served.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// A reader asks again after this time, and the broker forgets one that does not.
const EXPIRES: Duration = Duration::from_secs(30);
/// Shortest and longest pause after trouble.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// What was told as the log's end is looked for this often, as the broker may have dropped it since.
const LOOK: Duration = Duration::from_secs(1);
/// For how long the broker knows the ids of messages.
const KNOWN: Duration = Duration::from_secs(120);
/// The least that streams keep: nodes read what they deliver from there, and drop more exactly themselves.
const LEAST_MESSAGES: usize = 1024;
const LEAST_BYTES: usize = 4 << 20;
/// Beyond that a stream has no bound of its own in bytes.
const MOST_BYTES: usize = 1 << 40;
/// No stream keeps its messages for longer.
const MOST_AGE: Duration = Duration::from_secs(100 * 365 * 86_400);

/// All logs of a connection.
pub(crate) struct Logs {
    common: Arc<Common>,
    rooms: Mutex<HashMap<Topic, Room>>,
    runtime: Handle,
}

struct Room {
    log: Arc<Log>,
    task: JoinHandle<()>,
}

/// What the tasks of all logs share.
struct Common {
    context: Context,
    namespace: String,
    replicas: usize,
    inbox: mpsc::Sender<Incoming>,
    desk: Arc<Desk>,
    /// What waits for the broker, in messages and bytes.
    queued: AtomicUsize,
    queued_bytes: AtomicUsize,
    /// How many writers and readers are in trouble.
    troubled: AtomicUsize,
    /// The ids of messages: this connection's part, and the next number.
    id: u64,
    next: AtomicU64,
}

/// The log of one room.
struct Log {
    common: Arc<Common>,
    topic: Topic,
    /// The stream's name and its only subject.
    name: String,
    subject: String,
    bounds: Mutex<History>,
    /// The bounds have changed.
    changed: Notify,
    queue: Mutex<VecDeque<Bytes>>,
    work: Notify,
    /// The highest number with which the end was asked for.
    asked: AtomicU64,
    question: Notify,
    over: watch::Sender<bool>,
}

/// Why a log cannot be read or written now.
#[derive(Debug)]
enum Trouble {
    /// The broker has answered otherwise than hoped, or not at all.
    Broker(String),
    /// The stream is not there.
    Missing,
    /// The reader begins again, at once.
    Again,
    /// Nobody wants the log any more.
    Over,
}

impl Trouble {
    fn of(error: impl Error) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        Self::Broker(text)
    }
}

impl Logs {
    pub(crate) fn new(
        client: &Client,
        (namespace, replicas): (&str, usize),
        inbox: mpsc::Sender<Incoming>,
        desk: Arc<Desk>,
    ) -> Self {
        let context = ContextBuilder::new().timeout(ANSWER).build(client.clone());
        Self {
            common: Arc::new(Common {
                context,
                namespace: namespace.to_owned(),
                replicas,
                inbox,
                desk,
                queued: AtomicUsize::new(0),
                queued_bytes: AtomicUsize::new(0),
                troubled: AtomicUsize::new(0),
                id: RandomState::new().hash_one(namespace),
                next: AtomicU64::new(0),
            }),
            rooms: Mutex::default(),
            runtime: Handle::current(),
        }
    }

    /// Whether the broker has JetStream for us.
    pub(crate) async fn check(&self) -> Result<(), GetStreamError> {
        // A stream of no room: that it is not there is an answer.
        let name = format!("{}-none", self.common.namespace);
        match self.common.context.get_stream(name).await {
            Err(error) if !is_missing(&error) => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    pub(crate) fn keep(&self, topic: Topic, bounds: History) {
        let mut rooms = lock(&self.rooms);
        if let Some(room) = rooms.get(&topic)
            && !room.log.is_over()
        {
            *lock(&room.log.bounds) = bounds;
            room.log.changed.notify_one();
            return;
        }
        rooms.retain(|_, room| !room.task.is_finished());
        // What it still has to send comes first.
        let before = rooms.remove(&topic).map(|room| room.task);
        let log = Arc::new(Log {
            common: self.common.clone(),
            topic,
            name: format!("{}-{topic}", self.common.namespace).replace('.', "-"),
            subject: format!("{}.log.{topic}", self.common.namespace),
            bounds: Mutex::new(bounds),
            changed: Notify::new(),
            queue: Mutex::default(),
            work: Notify::new(),
            asked: AtomicU64::new(0),
            question: Notify::new(),
            over: watch::Sender::new(false),
        });
        let task = self.runtime.spawn(log.clone().run(before));
        rooms.insert(topic, Room { log, task });
    }

    pub(crate) fn forget(&self, topic: Topic) {
        if let Some(log) = self.log(topic) {
            log.over.send_replace(true);
        }
    }

    pub(crate) fn append(&self, topic: Topic, message: Bytes) -> Result<(), Lost> {
        let log = self.log(topic).ok_or(Lost)?;
        log.append(message)
    }

    pub(crate) fn confirm(&self, topic: Topic, number: u64) {
        if let Some(log) = self.log(topic) {
            log.asked.fetch_max(number, Ordering::Relaxed);
            log.question.notify_one();
        }
    }

    fn log(&self, topic: Topic) -> Option<Arc<Log>> {
        let rooms = lock(&self.rooms);
        let log = &rooms.get(&topic)?.log;
        (!log.is_over()).then(|| log.clone())
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        for room in lock(&self.rooms).values() {
            room.log.over.send_replace(true);
        }
    }
}

impl fmt::Debug for Logs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logs")
            .field("rooms", &lock(&self.rooms).len())
            .field("queued", &self.common.queued)
            .finish_non_exhaustive()
    }
}

/// Pauses between attempts, and whether the last one failed.
struct Attempts<'a> {
    log: &'a Log,
    what: &'static str,
    pause: Duration,
    troubled: AtomicBool,
}

impl<'a> Attempts<'a> {
    fn new(log: &'a Log, what: &'static str) -> Self {
        Self {
            log,
            what,
            pause: PAUSE.0,
            troubled: AtomicBool::new(false),
        }
    }

    fn succeeded(&mut self) {
        self.pause = PAUSE.0;
        self.calm();
    }

    fn calm(&self) {
        let common = &self.log.common;
        if self.troubled.swap(false, Ordering::Relaxed)
            && common.troubled.fetch_sub(1, Ordering::Relaxed) == 1
            && common.context.client().connection_state() == State::Connected
        {
            common.desk.tell(|news| news.up = Some(true));
        }
    }

    /// Tells of the trouble and waits, until the broker is connected again at the latest.
    async fn failed(&mut self, why: &str, connected: &mut watch::Receiver<u64>) {
        let common = &self.log.common;
        if !self.troubled.swap(true, Ordering::Relaxed) {
            common.troubled.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(stream = self.log.name, why, "{}", self.what);
        }
        common.desk.tell(|news| news.up = Some(false));
        // Without a sender the connection is gone, and the log is over soon.
        let _ = tokio::time::timeout(self.pause, connected.changed()).await;
        self.pause = (self.pause * 2).min(PAUSE.1);
    }
}

impl Drop for Attempts<'_> {
    fn drop(&mut self) {
        self.calm();
    }
}

impl Log {
    fn is_over(&self) -> bool {
        *self.over.borrow()
    }

    async fn ends(&self) {
        // It is not dropped while a task holds the log.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    async fn run(self: Arc<Self>, before: Option<JoinHandle<()>>) {
        if let Some(before) = before {
            let _ = before.await;
        }
        let written = async {
            tokio::select! {
                () = self.write() => {}
                () = async { self.ends().await; tokio::time::sleep(FLUSH).await; } => {}
            }
        };
        let read = async {
            tokio::select! {
                () = self.read() => {}
                () = self.ends() => {}
            }
        };
        tokio::join!(written, read);
        while self.done() {}
    }

    fn append(&self, message: Bytes) -> Result<(), Lost> {
        let (common, size) = (&self.common, message.len());
        if common.queued.load(Ordering::Relaxed) >= OUTGOING
            || common.queued_bytes.load(Ordering::Relaxed) + size > OUTGOING_BYTES
        {
            return Err(Lost);
        }
        common.queued.fetch_add(1, Ordering::Relaxed);
        common.queued_bytes.fetch_add(size, Ordering::Relaxed);
        lock(&self.queue).push_back(message);
        self.work.notify_one();
        Ok(())
    }

    /// The first message of the queue is settled; returns whether there was one.
    fn done(&self) -> bool {
        let Some(message) = lock(&self.queue).pop_front() else {
            return false;
        };
        let common = &self.common;
        common.queued.fetch_sub(1, Ordering::Relaxed);
        common
            .queued_bytes
            .fetch_sub(message.len(), Ordering::Relaxed);
        true
    }

    /// Appends what is queued, one message after the other, so that they are kept in this order.
    async fn write(&self) {
        let mut attempts = Attempts::new(self, "a room's log cannot be written");
        let mut connected = self.common.desk.connected();
        loop {
            let Some(message) = lock(&self.queue).front().cloned() else {
                if self.is_over() {
                    return;
                }
                tokio::select! {
                    () = self.work.notified() => {}
                    () = self.ends() => {}
                }
                continue;
            };
            let number = self.common.next.fetch_add(1, Ordering::Relaxed);
            let id = format!("{:016x}-{number}", self.common.id);
            while let Err(trouble) = self.send(&message, &id, &mut connected).await {
                match trouble {
                    Trouble::Broker(why) => attempts.failed(&why, &mut connected).await,
                    Trouble::Missing => {
                        if let Err(Trouble::Broker(why)) = self.open().await {
                            attempts.failed(&why, &mut connected).await;
                        }
                    }
                    Trouble::Again | Trouble::Over => {}
                }
            }
            attempts.succeeded();
            self.done();
        }
    }

    /// Appends a message; returns when the broker has it.
    async fn send(
        &self,
        message: &Bytes,
        id: &str,
        connected: &mut watch::Receiver<u64>,
    ) -> Result<(), Trouble> {
        connected.borrow_and_update();
        let publish = PublishMessage::build()
            .payload(message.clone())
            .message_id(id);
        let sent = async {
            let answer = self
                .common
                .context
                .send_publish(self.subject.clone(), publish);
            answer.await?.await
        };
        let sent = tokio::select! {
            sent = sent => sent,
            // The answer would have come over the connection before this one.
            Ok(()) = connected.changed() => return Err(Trouble::Again),
        };
        match sent {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == PublishErrorKind::StreamNotFound => Err(Trouble::Missing),
            Err(error) if error.kind() == PublishErrorKind::MaxPayloadExceeded => {
                // Nothing that a server queues is so large, unless the broker takes less than when it started.
                tracing::error!(stream = self.name, "the broker takes less than a frame");
                Ok(())
            }
            Err(error) => Err(Trouble::of(error)),
        }
    }

    /// The stream as it shall be. Others of its settings are left as they are.
    fn settings(&self, config: stream::Config) -> stream::Config {
        let bounds = *lock(&self.bounds);
        let bytes = bounds.bytes.saturating_mul(2).max(LEAST_BYTES);
        stream::Config {
            // Beyond what a number can say there is no bound.
            max_messages: i64::try_from(bounds.messages.max(LEAST_MESSAGES)).unwrap_or(-1),
            max_bytes: match bytes <= MOST_BYTES {
                true => i64::try_from(bytes).unwrap_or(-1),
                false => -1,
            },
            max_age: bounds.age.clamp(KNOWN, MOST_AGE),
            num_replicas: self.common.replicas,
            ..config
        }
    }

    /// The stream, made or changed if need be.
    async fn open(&self) -> Result<Stream<Info>, Trouble> {
        let context = &self.common.context;
        let stream = match context.get_stream(&self.name).await {
            Ok(stream) => stream,
            Err(error) => {
                if !is_missing(&error) {
                    return Err(Trouble::of(error));
                }
                let new = self.settings(stream::Config {
                    name: self.name.clone(),
                    subjects: vec![self.subject.clone()],
                    description: Some("messages of a room, kept by udpack".to_owned()),
                    storage: StorageType::File,
                    discard: DiscardPolicy::Old,
                    duplicate_window: KNOWN,
                    ..stream::Config::default()
                });
                let made = context.create_stream(new).await;
                return made.map_err(Trouble::of);
            }
        };
        let known = &stream.cached_info().config;
        let wanted = self.settings(known.clone());
        if wanted != *known {
            context.update_stream(&wanted).await.map_err(Trouble::of)?;
        }
        Ok(stream)
    }

    /// Reads the stream from its oldest entry on.
    async fn read(&self) {
        let mut attempts = Attempts::new(self, "a room's log cannot be read");
        let mut connected = self.common.desk.connected();
        let mut at = Place::default();
        loop {
            connected.borrow_and_update();
            let again = tokio::select! {
                trouble = self.read_on(&mut at, &mut attempts) => trouble,
                // What the broker sends over the new connection is not what it sent over the old one.
                Ok(()) = connected.changed() => Trouble::Again,
                () = self.changed.notified() => Trouble::Again,
            };
            match again {
                Trouble::Broker(why) => attempts.failed(&why, &mut connected).await,
                Trouble::Again | Trouble::Missing => {}
                Trouble::Over => return,
            }
        }
    }

    async fn read_on(&self, at: &mut Place, attempts: &mut Attempts<'_>) -> Trouble {
        match self.try_read_on(at, attempts).await {
            Ok(never) => match never {},
            Err(trouble) => trouble,
        }
    }

    async fn try_read_on(
        &self,
        at: &mut Place,
        attempts: &mut Attempts<'_>,
    ) -> Result<std::convert::Infallible, Trouble> {
        let number = self.asked.load(Ordering::Relaxed);
        let stream = self.open().await?;
        let info = stream.cached_info();
        let (epoch, first, last) = (
            epoch(info),
            info.state.first_sequence.max(1),
            info.state.last_sequence,
        );
        if at.epoch == epoch && last + 1 < at.next {
            self.begin_anew(info).await?;
            return Err(Trouble::Again);
        }
        if at.epoch != epoch {
            *at = Place { epoch, next: first };
            self.tell(Kept::Begin { epoch, first, last }).await?;
        }
        let mut end = Some((last, number));
        self.tell_end(at, &mut end).await?;
        let start_sequence = at.next;
        let consumer = stream.create_consumer(pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence },
            ack_policy: AckPolicy::None,
            inactive_threshold: 2 * EXPIRES,
            memory_storage: true,
            num_replicas: 1,
            ..pull::Config::default()
        });
        let consumer = consumer.await.map_err(Trouble::of)?;
        let messages = consumer.stream().max_messages_per_batch(BATCH);
        let messages = messages.heartbeat(HEARTBEAT).expires(EXPIRES).messages();
        let mut messages = messages.await.map_err(Trouble::of)?;
        attempts.succeeded();
        let mut delivered = 0;
        loop {
            tokio::select! {
                message = messages.next() => {
                    let message = match message {
                        Some(message) => message.map_err(Trouble::of)?,
                        None => return Err(Trouble::Again),
                    };
                    let info = message.info();
                    let info = info.map_err(|error| Trouble::Broker(error.to_string()))?;
                    delivered += 1;
                    if info.consumer_sequence != delivered {
                        // One is lost on its way.
                        return Err(Trouble::Again);
                    }
                    let (offset, age) = (info.stream_sequence, age(info.published.unix_timestamp_nanos()));
                    at.next = offset + 1;
                    let message = message.message.payload;
                    self.tell(Kept::Message { offset, age, message }).await?;
                }
                () = self.question.notified() => {
                    let number = self.asked.load(Ordering::Relaxed);
                    let info = stream.get_info().await.map_err(Trouble::of)?;
                    end = Some((info.state.last_sequence, number));
                }
                () = tokio::time::sleep(LOOK), if end.is_some() => {
                    let info = stream.get_info().await.map_err(Trouble::of)?;
                    at.next = at.next.max(info.state.first_sequence);
                }
            }
            self.tell_end(at, &mut end).await?;
        }
    }

    /// Tells the end that was asked for, if all before it has been told.
    async fn tell_end(&self, at: &Place, end: &mut Option<(u64, u64)>) -> Result<(), Trouble> {
        match end.take_if(|(last, _)| at.next > *last) {
            Some((offset, number)) => self.tell(Kept::End { offset, number }).await,
            None => Ok(()),
        }
    }

    async fn tell(&self, kept: Kept) -> Result<(), Trouble> {
        let topic = self.topic;
        let told = self.common.inbox.send(Incoming::Kept { topic, kept });
        told.await.map_err(|_| Trouble::Over)
    }

    /// The stream is shorter than what was read of it: the broker has lost what it had acknowledged, and would give the
    /// same offsets to other messages. A new stream takes its place, with an epoch of its own.
    async fn begin_anew(&self, info: &Info) -> Result<(), Trouble> {
        tracing::error!(
            stream = self.name,
            "the broker has lost messages of a room's log: it begins anew"
        );
        let context = &self.common.context;
        let now = context.get_stream(&self.name).await.map_err(Trouble::of)?;
        if now.cached_info().created == info.created {
            let gone = context.delete_stream(&self.name).await;
            gone.map_err(Trouble::of)?;
        }
        Ok(())
    }
}

fn is_missing(error: &GetStreamError) -> bool {
    matches!(error.kind(), GetStreamErrorKind::JetStream(error)
        if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// How far a log has been read.
#[derive(Default)]
struct Place {
    epoch: u64,
    next: u64,
}

/// A stream's identity: when it was made, in microseconds.
fn epoch(info: &Info) -> u64 {
    let nanoseconds = info.created.unix_timestamp_nanos();
    u64::try_from(nanoseconds / 1000).unwrap_or(1).max(1)
}

/// How long ago that was, in nanoseconds since 1970.
fn age(published: i128) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.unwrap_or_default().as_nanos();
    let before = now.saturating_sub(u128::try_from(published).unwrap_or_default());
    Duration::from_nanos(u64::try_from(before).unwrap_or(u64::MAX))
}
