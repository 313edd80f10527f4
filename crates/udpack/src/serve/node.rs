//! One server as a node of a cluster: it publishes its rooms' messages to other nodes, delivers theirs, and turns
//! missing messages into gaps.
//!
//! One task of each server handles the broker's events and the clock. A message is published where it is sent, under
//! the lock of its topic, so that its number and its place in the queue agree. Nothing waits for the broker.
//!
//! Order of locks: that of the rooms' table, then the topics, then one topic's `seen`, `out` or `reading`. None of them is
//! held while a room's own locks are taken, but `reading` while that of its copy's log is.

mod homes;
mod logs;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

use crate::base::LogLimit;
use crate::base::lock;
use crate::base::text::printable_within;
use crate::cluster::sequence::{Heard, MAX_NODES, Verdict};
use crate::cluster::wire::{self, AROUND, Body, Head};
use crate::cluster::{Cluster, ClusterState, Incoming, NodeId, Topic};
use crate::metrics::{Count, Counts};
use crate::serve::everywhere::Questions;
use crate::serve::node::logs::Reading;
use crate::serve::presence::Change;
use crate::serve::rooms::{Directory, Room, Rooms};
use crate::wire::message::encode_data;
use crate::wire::msgpack::{Fields, validate};

pub(crate) use self::homes::Spread;

/// The interval of the node's timer.
const TICK: Duration = Duration::from_secs(1);
/// A node publishes that it is alive in every third tick.
const BEAT: u32 = 3;
/// A node that was silent for this long is lost.
const SILENCE: Duration = Duration::from_secs(10);
/// A lost node is forgotten after this time.
const FORGET: Duration = Duration::from_secs(600);
/// A node that has been followed for this long has published the marks of what it sent before.
const SETTLED: Duration = Duration::from_secs(5);
/// The ticks after the last message to a topic in which the node publishes its number.
const MARKS: [u8; 3] = [1, 3, 9];
/// The ticks after the last message to a room without members on this node, until its numbers are forgotten.
const COLD: u8 = 60;
/// The ticks after a message was lost because the queue was full, until the cluster no longer counts as degraded.
const FULL: u32 = 5;
/// The ticks after a request for a node's presence in which it is not repeated.
const ASK_AGAIN: u8 = 2;
/// The topics for which a node keeps numbers, beside those of its own rooms.
const MAX_TOPICS: usize = 1 << 16;
/// The longest name and the longest address of a node, in bytes.
const ABOUT: usize = 256;

/// What other nodes and clients know of a server.
#[derive(Debug, Clone, Default)]
pub(crate) struct About {
    pub(crate) name: String,
    /// The address where clients reach it.
    pub(crate) address: String,
}

/// A server's part of its cluster.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    cluster: Arc<dyn Cluster>,
    topics: Mutex<HashMap<Topic, Arc<Shared>>>,
    others: Mutex<HashMap<NodeId, Other>>,
    /// Set while no other node was ever heard: then nothing needs to be published.
    alone: AtomicBool,
    epochs: AtomicU32,
    gone: AtomicBool,
    load: Load,
    health: Health,
    counts: Arc<Counts>,
    frame: usize,
    about: About,
    pub(crate) questions: Questions,
    log_limit: LogLimit,
}

/// What a node tells the others of its work, beside its sockets, which are counted elsewhere.
#[derive(Default)]
struct Load {
    draining: AtomicBool,
    /// Rooms with members here, and their members, as of the last tick.
    rooms: AtomicU64,
    members: AtomicU64,
}

/// How well the broker carries messages to and from a node.
struct Health {
    /// Set while the broker cannot be reached.
    down: AtomicBool,
    /// Set when messages of other nodes were lost here: in the next tick they are asked for their numbers.
    behind: AtomicBool,
    /// The ticks for which the queue to the broker still counts as full.
    full: AtomicU32,
    state: watch::Sender<ClusterState>,
}

impl Health {
    /// Sets the state; returns whether it was another one.
    fn becomes(&self, new: ClusterState) -> bool {
        self.state
            .send_if_modified(|state| std::mem::replace(state, new) != new)
    }

    fn is_degraded(&self) -> bool {
        *self.state.borrow() == ClusterState::Degraded
    }
}

/// Another node.
struct Other {
    since: Instant,
    heard: Instant,
    /// The ticks since it said that it leaves, if it did.
    leaving: Option<u8>,
    /// What it said about itself last.
    told: ClusterNode,
}

/// One topic: that of a room, with or without members on this node.
pub(crate) struct Shared {
    topic: Topic,
    out: Mutex<Out>,
    seen: Mutex<Seen>,
    /// Set if the cluster keeps the room's messages.
    reading: Mutex<Option<Reading>>,
}

/// This node's sequence on the topic.
struct Out {
    epoch: u32,
    last: u64,
    /// The number of the last message that was sent by the topic's log.
    appended: u64,
    /// How many had no place in the log's queue, and no entry says so yet.
    unsent: u64,
    /// The version of this node's presence.
    version: u64,
    /// The ticks since the last message.
    quiet: u8,
}

/// The sequences of other nodes on the topic.
#[derive(Default)]
struct Seen {
    room: Weak<Room>,
    since: Option<Instant>,
    heard: Heard,
    /// The nodes that were asked for their presence, and the ticks until they may be asked again.
    asked: HashMap<NodeId, u8>,
}

impl Shared {
    fn room_id(&self) -> [u8; 16] {
        match self.topic {
            Topic::Room(id) => id,
            Topic::Nodes | Topic::Node(_) => [0; 16],
        }
    }
}

/// Owns the task of a node. Dropping it makes the node leave the cluster.
pub(crate) struct Running {
    pub(crate) node: Arc<Node>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.node.bye();
        self.task.abort();
    }
}

impl Node {
    pub(crate) fn new(
        cluster: Arc<dyn Cluster>,
        about: About,
        frame: usize,
        counts: Arc<Counts>,
    ) -> Result<Arc<Self>, aws_lc_rs::error::Unspecified> {
        let mut id = NodeId([0; 8]);
        aws_lc_rs::rand::fill(&mut id.0)?;
        Ok(Arc::new(Self {
            id,
            cluster,
            topics: Mutex::default(),
            others: Mutex::default(),
            alone: AtomicBool::new(true),
            epochs: AtomicU32::new(0),
            gone: AtomicBool::new(false),
            load: Load::default(),
            health: Health {
                down: AtomicBool::new(false),
                behind: AtomicBool::new(false),
                full: AtomicU32::new(0),
                state: watch::Sender::new(ClusterState::Connected),
            },
            counts,
            frame,
            about,
            questions: Questions::default(),
            log_limit: LogLimit::default(),
        }))
    }

    pub(crate) fn run(self: &Arc<Self>, directory: Weak<Directory>) -> Running {
        let node = self.clone();
        self.cluster.subscribe(Topic::Nodes);
        self.cluster.subscribe(Topic::Node(self.id));
        Running {
            node: self.clone(),
            task: tokio::spawn(async move { node.hear(&directory).await }),
        }
    }

    async fn hear(&self, directory: &Weak<Directory>) {
        let mut clock = tokio::time::interval(TICK);
        clock.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut ticks = 0_u32;
        loop {
            let incoming = tokio::select! {
                incoming = self.cluster.next() => match incoming {
                    Some(incoming) => Some(incoming),
                    None => return self.lose_broker(),
                },
                _ = clock.tick() => None,
            };
            let Some(directory) = directory.upgrade() else {
                return;
            };
            if self.gone.load(Ordering::Relaxed) {
                return;
            }
            match incoming {
                Some(Incoming::Message { topic, message }) => {
                    self.message(&directory, topic, &message);
                }
                Some(Incoming::Kept { topic, kept }) => self.kept(&directory, topic, kept),
                Some(Incoming::Lost) => self.health.behind.store(true, Ordering::Relaxed),
                Some(Incoming::Down) => self.lose_broker(),
                Some(Incoming::Up) => {
                    self.health.down.store(false, Ordering::Relaxed);
                    let (most, needed) = (self.cluster.max_message(), self.frame + AROUND);
                    if most < needed {
                        tracing::error!(most, needed, "the broker takes less than a frame");
                    }
                    self.recover();
                }
                None => {
                    if ticks.is_multiple_of(BEAT) {
                        self.beat();
                    }
                    ticks = ticks.wrapping_add(1);
                    self.tick(&directory);
                }
            }
        }
    }

    /// The topic of a room that was created here.
    pub(crate) fn enter(&self, name: &str) -> Option<Arc<Shared>> {
        let topic = Topic::room(name);
        let shared = {
            let mut topics = lock(&self.topics);
            let new = || self.shared(topic);
            topics.entry(topic).or_insert_with(new).clone()
        };
        self.cluster.subscribe(topic);
        self.ask(&shared, topic);
        Some(shared)
    }

    /// The topic of a room without members on this node.
    pub(crate) fn stray(&self, name: &str) -> Option<Arc<Shared>> {
        let topic = Topic::room(name);
        let mut topics = lock(&self.topics);
        if let Some(shared) = topics.get(&topic) {
            return Some(shared.clone());
        }
        if topics.len() >= MAX_TOPICS {
            self.counts.one(Count::ClusterDropped);
            return None;
        }
        let shared = self.shared(topic);
        topics.insert(topic, shared.clone());
        Some(shared)
    }

    fn shared(&self, topic: Topic) -> Arc<Shared> {
        Arc::new(Shared {
            topic,
            out: Mutex::new(Out {
                epoch: self.epochs.fetch_add(1, Ordering::Relaxed),
                last: 0,
                appended: 0,
                unsent: 0,
                version: 0,
                quiet: u8::MAX,
            }),
            seen: Mutex::default(),
            reading: Mutex::default(),
        })
    }

    pub(crate) fn entered(&self, shared: &Shared, room: &Arc<Room>) {
        let mut seen = lock(&shared.seen);
        seen.room = Arc::downgrade(room);
        seen.since = Some(Instant::now());
    }

    /// Called when the room of this topic was removed.
    pub(crate) fn leave(&self, shared: &Shared) {
        self.cluster.unsubscribe(shared.topic);
        *lock(&shared.seen) = Seen::default();
    }

    /// Publishes a frame for the members on other nodes.
    pub(crate) fn publish(&self, shared: &Shared, except: &[&str], frame: &[u8]) {
        let mut out = lock(&shared.out);
        out.last += 1;
        out.quiet = 0;
        if self.alone.load(Ordering::Relaxed) || self.gone.load(Ordering::Relaxed) {
            return;
        }
        let message = wire::room(&self.head(out.epoch, out.last), except, frame);
        match self.cluster.publish(shared.topic, message) {
            Ok(()) => self.counts.one(Count::ClusterPublished),
            Err(_) => {
                drop(out);
                self.counts.one(Count::ClusterDropped);
                self.health.full.store(FULL, Ordering::Relaxed);
                self.degrade();
            }
        }
    }

    fn head(&self, epoch: u32, sequence: u64) -> Head {
        Head {
            node: self.id,
            epoch,
            sequence,
        }
    }

    fn ask(&self, shared: &Shared, to: Topic) {
        let ask = wire::ask(&self.head(0, 0), &shared.room_id());
        let _ = self.cluster.publish(to, ask);
    }

    /// Publishes that a session of this node is present in a room.
    pub(crate) fn joined(&self, shared: &Shared, entry: &[u8]) {
        self.change(shared, |at| wire::join(at, entry));
    }

    /// Publishes that a session of this node is not present any more.
    pub(crate) fn left(&self, shared: &Shared, session: &str) {
        let moving = self.load.draining.load(Ordering::Relaxed);
        self.change(shared, |at| wire::leave(at, session, moving));
    }

    fn change(&self, shared: &Shared, encode: impl FnOnce(&Head) -> Bytes) {
        let mut out = lock(&shared.out);
        out.version += 1;
        out.quiet = 0;
        if !self.gone.load(Ordering::Relaxed) {
            let change = encode(&self.head(out.epoch, out.version));
            let _ = self.cluster.publish(shared.topic, change);
        }
    }

    /// From now on, sessions that leave may connect to another node, and no client is sent to this one.
    pub(crate) fn drain(&self) {
        self.load.draining.store(true, Ordering::Relaxed);
        self.beat();
    }

    /// Answers a node that asks for a room.
    fn answer(&self, shared: &Shared, to: NodeId) {
        self.mark(shared, Topic::Node(to));
        let room = lock(&shared.seen).room.upgrade();
        let tell = |entries: &[Bytes]| {
            let out = lock(&shared.out);
            if out.version > 0 {
                let at = self.head(out.epoch, out.version);
                let present = wire::present(&at, &shared.room_id(), entries);
                let _ = self.cluster.publish(Topic::Node(to), present);
            }
        };
        match room {
            Some(room) => room.own_entries(tell),
            None => tell(&[]),
        }
    }

    /// Publishes this node's last number on a topic, if there is one.
    fn mark(&self, shared: &Shared, to: Topic) {
        let out = lock(&shared.out);
        if out.last > 0 || out.version > 0 {
            let at = self.head(out.epoch, out.last);
            let mark = wire::mark(&at, &shared.room_id(), out.version);
            let _ = self.cluster.publish(to, mark);
        }
    }

    /// Publishes a question to all nodes; returns whether it was sent.
    pub(crate) fn question(&self, number: u64, question: &[u8], frame: &[u8]) -> bool {
        let question = wire::question(&self.head(0, number), question, frame);
        self.cluster.publish(Topic::Nodes, question).is_ok()
    }

    /// This node, as it shows itself to the others.
    fn own(&self) -> ClusterNode {
        ClusterNode {
            id: self.id,
            name: self.about.name.clone(),
            address: self.about.address.clone(),
            sockets: self.counts.get(Count::Sockets),
            rooms: self.load.rooms.load(Ordering::Relaxed),
            members: self.load.members.load(Ordering::Relaxed),
            draining: self.load.draining.load(Ordering::Relaxed),
            degraded: self.health.is_degraded(),
            lost: false,
        }
    }

    fn beat(&self) {
        if let Ok(body) = encode_data(&Beat::of(&self.own())) {
            let beat = wire::beat(&self.head(0, 0), &body);
            let _ = self.cluster.publish(Topic::Nodes, beat);
        }
    }

    /// Publishes that this node leaves, and the last numbers of its sequences.
    pub(crate) fn bye(&self) {
        if self.gone.swap(true, Ordering::Relaxed) {
            return;
        }
        for shared in self.all() {
            if lock(&shared.out).quiet <= MARKS[2] {
                self.mark(&shared, shared.topic);
            }
        }
        let bye = wire::bye(&self.head(0, 0));
        let _ = self.cluster.publish(Topic::Nodes, bye);
    }

    fn all(&self) -> Vec<Arc<Shared>> {
        lock(&self.topics).values().cloned().collect()
    }

    /// Asks other nodes for their numbers, because some of their messages may be lost.
    fn ask_all(&self) {
        for shared in self.all() {
            if lock(&shared.seen).since.is_some() {
                self.ask(&shared, shared.topic);
            }
        }
    }

    /// Repeats this node's numbers in the next ticks, because some of its messages may be lost.
    fn remark(&self) {
        for shared in self.all() {
            let mut out = lock(&shared.out);
            if out.last > 0 || out.version > 0 {
                out.quiet = 0;
            }
        }
    }

    fn lose_broker(&self) {
        self.health.down.store(true, Ordering::Relaxed);
        self.degrade();
    }

    fn degrade(&self) {
        if self.health.becomes(ClusterState::Degraded) {
            self.counts.one(Count::ClusterDegraded);
            tracing::warn!("the cluster is degraded: other nodes may miss messages of rooms");
        }
    }

    fn recover(&self) {
        if self.health.becomes(ClusterState::Connected) {
            self.counts.less(Count::ClusterDegraded);
            tracing::info!("the cluster is whole again");
        }
        self.beat();
        self.remark();
    }

    fn ignored(&self, why: &dyn fmt::Display) {
        self.counts.one(Count::ClusterIgnored);
        if let Some(left_out) = self.log_limit.line() {
            tracing::warn!(%why, left_out, "ignored a message of another node");
        }
    }

    fn message(&self, directory: &Directory, topic: Topic, bytes: &Bytes) {
        let (head, body) = match wire::decode(bytes, self.frame) {
            Ok(read) => read,
            Err(bad) => return self.ignored(&bad),
        };
        if head.node == self.id {
            return;
        }
        let Some(since) = self.heard(head.node) else {
            return self.ignored(&"there are too many nodes");
        };
        match body {
            Body::Room { except, frame } => {
                let verdict = |heard: &mut Heard, known| {
                    heard.message(head.node, head.epoch, head.sequence, known)
                };
                if let Some(room) = self.follow(directory, topic, since, verdict) {
                    let except: Vec<&str> = except.iter().map(String::as_str).collect();
                    self.counts.one(Count::ClusterReceived);
                    directory.deliver(&room, &frame, &except);
                }
            }
            Body::Mark { room, version } => {
                let topic = Topic::Room(room);
                let verdict = |heard: &mut Heard, known| {
                    heard.mark(head.node, head.epoch, head.sequence, known)
                };
                self.follow(directory, topic, since, verdict);
                self.present(topic, &head, |room| room.knows(&head, version));
            }
            Body::Ask(room) => {
                let shared = lock(&self.topics).get(&Topic::Room(room)).cloned();
                if let Some(shared) = shared {
                    self.answer(&shared, head.node);
                }
            }
            Body::Join(entry) => {
                self.present(topic, &head, |room| {
                    room.change(&head, Change::Join(&entry))
                });
            }
            Body::Leave { session, moving } => {
                let session = session.as_str();
                self.present(topic, &head, |room| {
                    room.change(&head, Change::Leave { session, moving })
                });
            }
            Body::Present { room, entries } => {
                self.present(Topic::Room(room), &head, |room| {
                    room.replace(&head, &entries);
                    true
                });
            }
            Body::Question { question, frame } => {
                match self.questions.reply(directory, &question, frame) {
                    Some(reply) => {
                        let reply = wire::answer(&self.head(0, head.sequence), &reply);
                        let _ = self.cluster.publish(Topic::Node(head.node), reply);
                    }
                    None => self.ignored(&"a question that cannot be read"),
                }
            }
            Body::Answer(body) => {
                // An answer that comes too late is ignored.
                self.questions.answer(head.sequence, head.node, body);
            }
            Body::Beat(body) => self.beaten(head.node, &body),
            Body::Bye => {
                if let Some(other) = lock(&self.others).get_mut(&head.node) {
                    other.leaving.get_or_insert(0);
                }
            }
        }
    }

    /// Records that a node is alive. Returns since when it is followed, or `None` if there are too many nodes.
    fn heard(&self, id: NodeId) -> Option<Instant> {
        let now = Instant::now();
        let mut others = lock(&self.others);
        if !others.contains_key(&id) && others.len() >= MAX_NODES {
            return None;
        }
        let mut new = false;
        let other = others.entry(id).or_insert_with(|| {
            new = true;
            Other {
                since: now,
                heard: now,
                leaving: None,
                told: ClusterNode::new(id),
            }
        });
        other.heard = now;
        let back = std::mem::replace(&mut other.told.lost, false);
        let since = other.since;
        drop(others);
        if new || back {
            self.counts.one(Count::ClusterNodes);
        }
        if new {
            self.alone.store(false, Ordering::Relaxed);
            self.beat();
        }
        if back {
            tracing::info!(node = %id, "a node of the cluster is heard again");
            self.remark();
        }
        Some(since)
    }

    fn beaten(&self, id: NodeId, body: &[u8]) {
        let mut others = lock(&self.others);
        let told = others
            .get_mut(&id)
            .map(|other| other.told.read(body).is_some());
        drop(others);
        if told == Some(false) {
            self.ignored(&"a node says about itself what cannot be read");
        }
    }

    /// Follows another node's sequence to a room of this node: reports missing messages to the members. Returns the
    /// room if its members are to receive the message.
    fn follow(
        &self,
        directory: &Directory,
        topic: Topic,
        node: Instant,
        verdict: impl FnOnce(&mut Heard, bool) -> Verdict,
    ) -> Option<Arc<Room>> {
        let shared = lock(&self.topics).get(&topic).cloned()?;
        let (room, verdict) = {
            let mut seen = lock(&shared.seen);
            let room = seen.room.upgrade()?;
            let known =
                node.elapsed() >= SETTLED && seen.since.is_some_and(|at| at.elapsed() >= SETTLED);
            (room, verdict(&mut seen.heard, known))
        };
        match verdict {
            Verdict::Next { lost } => {
                self.missing(directory, &room, lost);
                Some(room)
            }
            Verdict::Old => None,
            Verdict::Bad => {
                self.ignored(&"a number that cannot be");
                None
            }
        }
    }

    /// Applies another node's presence in a room of this node. If `apply` returns false, that node is asked for its
    /// whole presence.
    fn present(&self, topic: Topic, head: &Head, apply: impl FnOnce(&Room) -> bool) {
        let Some(shared) = lock(&self.topics).get(&topic).cloned() else {
            return;
        };
        let Some(room) = lock(&shared.seen).room.upgrade() else {
            return;
        };
        let understood = apply(&room);
        let ask = {
            let asked = &mut lock(&shared.seen).asked;
            match understood {
                true => {
                    asked.remove(&head.node);
                    false
                }
                false => asked.insert(head.node, ASK_AGAIN).is_none(),
            }
        };
        if ask {
            self.ask(&shared, Topic::Node(head.node));
        }
    }

    fn missing(&self, directory: &Directory, room: &Room, lost: u64) {
        if lost > 0 {
            self.counts.add(Count::ClusterLost, lost);
            directory.missing(room, lost);
        }
    }

    fn tick(&self, directory: &Directory) {
        let full = self.health.full.load(Ordering::Relaxed);
        if full > 0 {
            self.health.full.store(full - 1, Ordering::Relaxed);
            if full == 1 && !self.health.down.load(Ordering::Relaxed) {
                self.recover();
            }
        }
        if self.health.behind.swap(false, Ordering::Relaxed) {
            self.ask_all();
        }
        let (lost, left) = self.watch();
        let topics = self.all();
        let (mut rooms, mut members) = (0, 0);
        for shared in &topics {
            let (room, told) = {
                let mut seen = lock(&shared.seen);
                for node in &left {
                    seen.heard.forget(*node);
                }
                let told = lost.iter().map(|node| seen.heard.silent(*node)).sum();
                for ticks in seen.asked.values_mut() {
                    *ticks = ticks.saturating_sub(1);
                }
                // A mark shows again what is missing.
                seen.asked.retain(|_, ticks| *ticks > 0);
                (seen.room.upgrade(), told)
            };
            if let Some(room) = room {
                self.missing(directory, &room, told);
                room.desert(&lost, &left);
                let here = room.guests().len() as u64;
                rooms += u64::from(here > 0);
                members += here;
            }
            let quiet = {
                let mut out = lock(&shared.out);
                self.tell_unsent(shared, &mut out);
                out.quiet = out.quiet.saturating_add(1);
                out.quiet
            };
            if MARKS.contains(&quiet) && !self.alone.load(Ordering::Relaxed) {
                self.mark(shared, shared.topic);
            }
        }
        self.load.rooms.store(rooms, Ordering::Relaxed);
        self.load.members.store(members, Ordering::Relaxed);
        lock(&self.topics).retain(|_, shared| {
            // No other task can take a handle meanwhile; a task that has one is about to publish.
            Arc::strong_count(shared) > 2
                || lock(&shared.seen).since.is_some()
                || lock(&shared.out).quiet < COLD
        });
    }

    /// The nodes that were lost since the last tick, and those that are not followed any more.
    fn watch(&self) -> (Vec<NodeId>, Vec<NodeId>) {
        let (mut lost, mut left) = (Vec::new(), Vec::new());
        lock(&self.others).retain(|id, other| {
            let silent = other.heard.elapsed();
            if let Some(ticks) = &mut other.leaving {
                *ticks += 1;
            }
            let leaves = other.leaving.is_some_and(|ticks| ticks > 1);
            if !other.told.lost && (leaves || silent >= SILENCE) {
                other.told.lost = true;
                self.counts.less(Count::ClusterNodes);
                if !leaves {
                    tracing::warn!(node = %id, name = other.told.name, "a node of the cluster is lost");
                    lost.push(*id);
                }
            }
            let keep = !leaves && silent < FORGET;
            if !keep {
                left.push(*id);
            }
            keep
        });
        (lost, left)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("topic", &self.topic)
            .finish_non_exhaustive()
    }
}

/// A node's description of itself.
#[derive(Serialize)]
struct Beat<'a> {
    name: &'a str,
    address: &'a str,
    sockets: u64,
    rooms: u64,
    members: u64,
    draining: bool,
    degraded: bool,
}

impl<'a> Beat<'a> {
    fn of(node: &'a ClusterNode) -> Self {
        Self {
            name: &node.name,
            address: &node.address,
            sockets: node.sockets,
            rooms: node.rooms,
            members: node.members,
            draining: node.draining,
            degraded: node.degraded,
        }
    }
}

impl ClusterNode {
    /// A node that has not said anything about itself yet.
    fn new(id: NodeId) -> Self {
        Self {
            id,
            name: String::new(),
            address: String::new(),
            sockets: 0,
            rooms: 0,
            members: 0,
            draining: false,
            degraded: false,
            lost: false,
        }
    }

    /// Takes over what the node says about itself; `None`, and nothing, if that cannot be read.
    fn read(&mut self, body: &[u8]) -> Option<()> {
        validate(body).ok()?;
        let fields = Fields::parse(body).ok()?;
        let name = printable_within(fields.str("name").ok()?, ABOUT);
        let address = printable_within(fields.str("address").ok()?, ABOUT);
        let sockets = fields.u64("sockets").ok()?;
        let rooms = fields.opt_u64("rooms").ok()?;
        let members = fields.opt_u64("members").ok()?;
        let draining = fields.opt_bool("draining").ok()?;
        let degraded = fields.opt_bool("degraded").ok()?;
        (self.name, self.address, self.sockets) = (name, address, sockets);
        self.rooms = rooms.unwrap_or_default();
        self.members = members.unwrap_or_default();
        self.draining = draining.unwrap_or_default();
        self.degraded = degraded.unwrap_or_default();
        Some(())
    }
}

/// A server's view of its cluster. A handle: clones share the view.
#[derive(Clone)]
pub struct ClusterView {
    node: Arc<Node>,
    rooms: Rooms,
    states: watch::Receiver<ClusterState>,
}

impl ClusterView {
    pub(crate) fn new(node: &Arc<Node>, rooms: &Rooms) -> Self {
        Self {
            node: node.clone(),
            rooms: rooms.clone(),
            states: node.health.state.subscribe(),
        }
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    pub(crate) fn directory(&self) -> &Directory {
        self.rooms.directory()
    }

    /// The id of this node.
    pub fn id(&self) -> NodeId {
        self.node.id
    }

    /// Whether the broker can be reached.
    pub fn state(&self) -> ClusterState {
        *self.states.borrow()
    }

    /// Waits until the state has changed since this handle, or the one that it was cloned from, last waited; returns
    /// the new state. Never ready once the server is gone.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn changed(&mut self) -> ClusterState {
        if self.states.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        *self.states.borrow_and_update()
    }

    /// This node, as it shows itself to the others. What it counts is up to a second old.
    pub fn own(&self) -> ClusterNode {
        self.node.own()
    }

    /// The other nodes, sorted by id: those heard within the last 10 s, and those lost in the last 10 minutes.
    pub fn nodes(&self) -> Vec<ClusterNode> {
        let others = lock(&self.node.others);
        let mut nodes: Vec<_> = others.values().map(|other| other.told.clone()).collect();
        nodes.sort_by_key(|node| node.id);
        nodes
    }
}

impl fmt::Debug for ClusterView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterView")
            .field("id", &self.id())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// A node, as it described itself last.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClusterNode {
    /// Its id, which is a new one after each restart.
    pub id: NodeId,
    /// Its name, as its operator chose it; may be empty.
    pub name: String,
    /// The address where clients reach it; may be empty.
    pub address: String,
    /// Its number of sockets.
    pub sockets: u64,
    /// How many rooms have members on it.
    pub rooms: u64,
    /// How many members these have on it.
    pub members: u64,
    /// It shuts down: its clients move to other nodes.
    pub draining: bool,
    /// It cannot reach the broker, or that takes less than it sends.
    pub degraded: bool,
    /// Whether it has been silent for 10 s.
    pub lost: bool,
}
