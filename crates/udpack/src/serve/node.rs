//! One server as a node of a cluster: its rooms' messages go out to other nodes, those of others come in, and what is
//! missing becomes a gap.
//!
//! One task for each server hears the broker and the clock; publishing happens where a message is sent, under the lock of
//! its topic, so that numbers and queue agree. Nothing waits for the broker.
//!
//! Order of locks: that of the rooms' table, then the topics, then one topic's `seen` or `out`. A room's own locks are not
//! taken with any of them held.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
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
use crate::serve::presence::Change;
use crate::serve::rooms::{Directory, Room, Rooms};
use crate::wire::message::encode_data;
use crate::wire::msgpack::{Fields, validate};

/// How often the clock is looked at.
const TICK: Duration = Duration::from_secs(1);
/// A node says in every third tick that it is there.
const BEAT: u32 = 3;
/// A node that was not heard for so long is lost.
const SILENCE: Duration = Duration::from_secs(10);
/// A lost node is forgotten after so long.
const FORGET: Duration = Duration::from_secs(600);
/// Whoever is followed for so long has told what it sent before.
const SETTLED: Duration = Duration::from_secs(5);
/// Ticks after the last message to a topic, in which the node tells its number.
const MARKS: [u8; 3] = [1, 3, 9];
/// Ticks after the last message to a room without members here, until its number is forgotten.
const COLD: u8 = 60;
/// Ticks after a message was lost to a full queue, until the cluster counts as whole again.
const FULL: u32 = 5;
/// Ticks after a node was asked for its presence, in which it is not asked again.
const ASK_AGAIN: u8 = 2;
/// Topics that a node keeps numbers for, beside those of its own rooms.
const MAX_TOPICS: usize = 1 << 16;
/// Most bytes of a node's name and of its address.
const ABOUT: usize = 256;

/// How a server is known in its cluster.
#[derive(Debug, Clone, Default)]
pub(crate) struct About {
    pub(crate) name: String,
    /// Where clients reach it.
    pub(crate) address: String,
}

/// What a server has of its cluster.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    cluster: Arc<dyn Cluster>,
    topics: Mutex<HashMap<Topic, Arc<Shared>>>,
    others: Mutex<HashMap<NodeId, Other>>,
    /// No other node was ever heard: nothing needs to be published.
    alone: AtomicBool,
    epochs: AtomicU32,
    gone: AtomicBool,
    draining: AtomicBool,
    /// The broker cannot be reached.
    down: AtomicBool,
    /// Messages of others were lost here: they are to say how far they are, in the next tick.
    behind: AtomicBool,
    /// Ticks for which the queue to the broker still counts as too full.
    full: AtomicU32,
    state: watch::Sender<ClusterState>,
    counts: Arc<Counts>,
    frame: usize,
    about: About,
    pub(crate) questions: Questions,
    log_limit: LogLimit,
}

/// Another node.
struct Other {
    since: Instant,
    heard: Instant,
    lost: bool,
    /// It said that it goes, this many ticks ago.
    leaving: Option<u8>,
    name: String,
    address: String,
    sockets: u64,
}

/// One topic: a room's, whether or not it has members here.
pub(crate) struct Shared {
    topic: Topic,
    out: Mutex<Out>,
    seen: Mutex<Seen>,
}

/// What this node publishes to it.
struct Out {
    epoch: u32,
    last: u64,
    /// Which changes of presence were told.
    version: u64,
    /// Ticks since anything was.
    quiet: u8,
}

/// What other nodes published to it.
#[derive(Default)]
struct Seen {
    room: Weak<Room>,
    since: Option<Instant>,
    heard: Heard,
    /// Nodes that were asked for their presence, and the ticks until they are asked again.
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

/// Owns the task of a node; the node leaves the cluster when this is dropped.
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
            draining: AtomicBool::new(false),
            down: AtomicBool::new(false),
            behind: AtomicBool::new(false),
            full: AtomicU32::new(0),
            state: watch::Sender::new(ClusterState::Connected),
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
                Some(Incoming::Lost) => self.behind.store(true, Ordering::Relaxed),
                Some(Incoming::Down) => self.lose_broker(),
                Some(Incoming::Up) => {
                    self.down.store(false, Ordering::Relaxed);
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

    /// The topic of a room that was made here.
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

    /// The topic of a room that has no members here.
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
                version: 0,
                quiet: u8::MAX,
            }),
            seen: Mutex::default(),
        })
    }

    pub(crate) fn entered(&self, shared: &Shared, room: &Arc<Room>) {
        let mut seen = lock(&shared.seen);
        seen.room = Arc::downgrade(room);
        seen.since = Some(Instant::now());
    }

    /// The room of this topic is no more.
    pub(crate) fn leave(&self, shared: &Shared) {
        self.cluster.unsubscribe(shared.topic);
        *lock(&shared.seen) = Seen::default();
    }

    /// Sends a frame to the members on other nodes.
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
                self.full.store(FULL, Ordering::Relaxed);
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

    /// Somebody is present in a room by this node.
    pub(crate) fn joined(&self, shared: &Shared, entry: &[u8]) {
        self.change(shared, |at| wire::join(at, entry));
    }

    /// Somebody is no longer.
    pub(crate) fn left(&self, shared: &Shared, session: &str) {
        let moving = self.draining.load(Ordering::Relaxed);
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

    /// From now on, those who leave may come to another node.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
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

    /// Says how far this node's stream to a topic is, if there is any.
    fn mark(&self, shared: &Shared, to: Topic) {
        let out = lock(&shared.out);
        if out.last > 0 || out.version > 0 {
            let at = self.head(out.epoch, out.last);
            let mark = wire::mark(&at, &shared.room_id(), out.version);
            let _ = self.cluster.publish(to, mark);
        }
    }

    /// Asks all nodes; says whether that was sent.
    pub(crate) fn question(&self, number: u64, question: &[u8], frame: &[u8]) -> bool {
        let question = wire::question(&self.head(0, number), question, frame);
        self.cluster.publish(Topic::Nodes, question).is_ok()
    }

    fn beat(&self) {
        let beat = Beat {
            name: &self.about.name,
            address: &self.about.address,
            sockets: self.counts.get(Count::Sockets),
        };
        if let Ok(body) = encode_data(&beat) {
            let beat = wire::beat(&self.head(0, 0), &body);
            let _ = self.cluster.publish(Topic::Nodes, beat);
        }
    }

    /// Tells the others that this node goes, and where its streams end.
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

    /// Messages of others may be lost: they say where they are.
    fn ask_all(&self) {
        for shared in self.all() {
            if lock(&shared.seen).since.is_some() {
                self.ask(&shared, shared.topic);
            }
        }
    }

    /// Messages of this node may be lost: it says where it is, in the next ticks.
    fn remark(&self) {
        for shared in self.all() {
            let mut out = lock(&shared.out);
            if out.last > 0 || out.version > 0 {
                out.quiet = 0;
            }
        }
    }

    fn lose_broker(&self) {
        self.down.store(true, Ordering::Relaxed);
        self.degrade();
    }

    fn degrade(&self) {
        let changed = self.state.send_if_modified(|state| {
            std::mem::replace(state, ClusterState::Degraded) != ClusterState::Degraded
        });
        if changed {
            self.counts.one(Count::ClusterDegraded);
            tracing::warn!("the cluster is degraded: other nodes may miss messages of rooms");
        }
    }

    fn recover(&self) {
        let changed = self.state.send_if_modified(|state| {
            std::mem::replace(state, ClusterState::Connected) != ClusterState::Connected
        });
        if changed {
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
                // One that comes too late is no news.
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

    /// Notes that a node is there; since when, or `None` when it is one too many.
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
                lost: false,
                leaving: None,
                name: String::new(),
                address: String::new(),
                sockets: 0,
            }
        });
        other.heard = now;
        let back = std::mem::replace(&mut other.lost, false);
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
        let read = || {
            validate(body).ok()?;
            let fields = Fields::parse(body).ok()?;
            let name = printable_within(fields.str("name").ok()?, ABOUT);
            let address = printable_within(fields.str("address").ok()?, ABOUT);
            Some((name, address, fields.u64("sockets").ok()?))
        };
        let Some((name, address, sockets)) = read() else {
            return self.ignored(&"a node says about itself what cannot be read");
        };
        if let Some(other) = lock(&self.others).get_mut(&id) {
            (other.name, other.address, other.sockets) = (name, address, sockets);
        }
    }

    /// Follows another node's stream to a room here: tells the members what they miss. Returns the room if its members are to
    /// have the message.
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

    /// Another node tells of its presence in a room here: `apply` says whether that was understood, otherwise it is asked for
    /// the whole.
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
        let full = self.full.load(Ordering::Relaxed);
        if full > 0 {
            self.full.store(full - 1, Ordering::Relaxed);
            if full == 1 && !self.down.load(Ordering::Relaxed) {
                self.recover();
            }
        }
        if self.behind.swap(false, Ordering::Relaxed) {
            self.ask_all();
        }
        let (lost, left) = self.watch();
        let topics = self.all();
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
                // A mark tells again that something is missing.
                seen.asked.retain(|_, ticks| *ticks > 0);
                (seen.room.upgrade(), told)
            };
            if let Some(room) = room {
                self.missing(directory, &room, told);
                room.desert(&lost, &left);
            }
            let quiet = {
                let mut out = lock(&shared.out);
                out.quiet = out.quiet.saturating_add(1);
                out.quiet
            };
            if MARKS.contains(&quiet) && !self.alone.load(Ordering::Relaxed) {
                self.mark(shared, shared.topic);
            }
        }
        lock(&self.topics).retain(|_, shared| {
            // Nobody else can take a handle meanwhile; whoever has one is about to publish.
            Arc::strong_count(shared) > 2
                || lock(&shared.seen).since.is_some()
                || lock(&shared.out).quiet < COLD
        });
    }

    /// The nodes that are lost since the last tick, and those that are not followed any more.
    fn watch(&self) -> (Vec<NodeId>, Vec<NodeId>) {
        let (mut lost, mut left) = (Vec::new(), Vec::new());
        lock(&self.others).retain(|id, other| {
            let silent = other.heard.elapsed();
            if let Some(ticks) = &mut other.leaving {
                *ticks += 1;
            }
            let leaves = other.leaving.is_some_and(|ticks| ticks > 1);
            if !other.lost && (leaves || silent >= SILENCE) {
                other.lost = true;
                self.counts.less(Count::ClusterNodes);
                if !leaves {
                    tracing::warn!(node = %id, name = other.name, "a node of the cluster is lost");
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

/// What a node says about itself.
#[derive(Serialize)]
struct Beat<'a> {
    name: &'a str,
    address: &'a str,
    sockets: u64,
}

/// A server's view of its cluster. A handle: clones are the same.
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
            states: node.state.subscribe(),
        }
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    pub(crate) fn directory(&self) -> &Directory {
        self.rooms.directory()
    }

    /// This node.
    pub fn id(&self) -> NodeId {
        self.node.id
    }

    /// Whether the broker can be reached.
    pub fn state(&self) -> ClusterState {
        *self.states.borrow()
    }

    /// Waits until that has changed since this handle, or the one that it was cloned from, last waited; the state then.
    /// Pending for good once the server is gone.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn changed(&mut self) -> ClusterState {
        if self.states.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        *self.states.borrow_and_update()
    }

    /// The other nodes, in the order of their ids: those heard within the last 10 s, and the lost ones of the last 10 minutes.
    pub fn nodes(&self) -> Vec<ClusterNode> {
        let others = lock(&self.node.others);
        let mut nodes: Vec<_> = others
            .iter()
            .map(|(id, other)| ClusterNode {
                id: *id,
                name: other.name.clone(),
                address: other.address.clone(),
                sockets: other.sockets,
                lost: other.lost,
            })
            .collect();
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

/// Another node, as it was heard last.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClusterNode {
    /// Its id, a new one after each restart.
    pub id: NodeId,
    /// Its name, as its operator chose it; may be empty.
    pub name: String,
    /// Where clients reach it; may be empty.
    pub address: String,
    /// How many sockets it has.
    pub sockets: u64,
    /// It was not heard for 10 s.
    pub lost: bool,
}
