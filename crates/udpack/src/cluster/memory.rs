//! A cluster of the servers of one process, for tests. It can fail as a broker does.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use crate::base::lock;
use crate::channel::history::History;
use crate::cluster::{Cluster, Incoming, Kept, Lost, Topic};

/// Messages that may wait for one node.
const QUEUE: usize = 4096;
const MAX_MESSAGE: usize = 8 << 20;
/// Messages for logs that wait while a node is cut off.
const WAITING: usize = 64;

/// A broker in memory. A handle: clones share the broker.
#[derive(Clone, Default)]
pub struct Memory {
    hub: Arc<Mutex<Hub>>,
}

#[derive(Default)]
struct Hub {
    nodes: HashMap<u64, Port>,
    next: u64,
    keeps: bool,
    logs: HashMap<Topic, Log>,
    epochs: u64,
}

/// The log of a room.
struct Log {
    epoch: u64,
    /// The offset of the oldest entry.
    first: u64,
    entries: VecDeque<Bytes>,
}

impl Log {
    fn last(&self) -> u64 {
        self.first + self.entries.len() as u64 - 1
    }

    fn drop_oldest(&mut self) {
        if self.entries.pop_front().is_some() {
            self.first += 1;
        }
    }
}

/// A node's place in a log.
#[derive(Default)]
struct Place {
    epoch: u64,
    next: u64,
    most: usize,
    asked: Option<u64>,
}

impl Hub {
    fn log(&mut self, topic: Topic) -> &mut Log {
        let epochs = &mut self.epochs;
        self.logs.entry(topic).or_insert_with(|| {
            *epochs += 1;
            Log {
                epoch: *epochs,
                first: 1,
                entries: VecDeque::new(),
            }
        })
    }

    fn append(&mut self, topic: Topic, message: Bytes) {
        let places = self
            .nodes
            .values()
            .filter_map(|port| port.reads.get(&topic));
        let most = places.map(|place| place.most).max().unwrap_or(usize::MAX);
        let log = self.log(topic);
        log.entries.push_back(message);
        while log.entries.len() > most {
            log.drop_oldest();
        }
        let nodes: Vec<u64> = self.nodes.keys().copied().collect();
        nodes.iter().for_each(|number| self.pump(*number));
    }

    /// Tells a node what is new in the logs that it reads, as far as there is room.
    fn pump(&mut self, number: u64) {
        let Some(port) = self
            .nodes
            .get(&number)
            .filter(|port| !port.cut && !port.held)
        else {
            return;
        };
        let topics: Vec<Topic> = port.reads.keys().copied().collect();
        for topic in topics {
            self.log(topic);
            let (Some(log), Some(port)) = (self.logs.get(&topic), self.nodes.get_mut(&number))
            else {
                continue;
            };
            let (queue, place) = (&port.queue, port.reads.get_mut(&topic));
            let tell = |kept| queue.try_send(Incoming::Kept { topic, kept }).is_ok();
            if let Some(place) = place {
                place.read(log, tell);
            }
        }
    }
}

impl Place {
    fn read(&mut self, log: &Log, tell: impl Fn(Kept) -> bool) {
        let (epoch, first, last) = (log.epoch, log.first, log.last());
        if self.epoch != epoch {
            if !tell(Kept::Begin { epoch, first, last }) {
                return;
            }
            (self.epoch, self.next) = (epoch, first);
        }
        self.next = self.next.max(first);
        while let Some(message) = log.entries.get((self.next - first) as usize) {
            let kept = Kept::Message {
                offset: self.next,
                age: Duration::ZERO,
                message: message.clone(),
            };
            if !tell(kept) {
                return;
            }
            self.next += 1;
        }
        if let Some(number) = self.asked {
            let offset = last;
            if tell(Kept::End { offset, number }) {
                self.asked = None;
            }
        }
    }
}

/// The broker's side of one node.
struct Port {
    topics: HashSet<Topic>,
    queue: mpsc::Sender<Incoming>,
    /// Whether no message passes, in either direction.
    cut: bool,
    /// How many of the next messages to it are lost.
    lose: u64,
    /// The logs that it reads.
    reads: HashMap<Topic, Place>,
    /// Whether it hears nothing of logs.
    held: bool,
    /// What it appended while it was cut off.
    waiting: VecDeque<(Topic, Bytes)>,
}

impl Memory {
    /// A broker without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// A broker without nodes that keeps the messages of rooms with a history, as many of each as the bounds say. It
    /// knows no other bounds.
    pub fn keeping() -> Self {
        let memory = Self::default();
        lock(&memory.hub).keeps = true;
        memory
    }

    /// Drops the oldest messages that it keeps of a room.
    pub fn drop_oldest(&self, room: &str, messages: usize) {
        let mut hub = lock(&self.hub);
        let log = hub.log(Topic::room(room));
        (0..messages).for_each(|_| log.drop_oldest());
    }

    /// Loses all that it keeps of a room. The room's log begins anew.
    pub fn lose_log(&self, room: &str) {
        let mut hub = lock(&self.hub);
        hub.logs.remove(&Topic::room(room));
        let nodes: Vec<u64> = hub.nodes.keys().copied().collect();
        nodes.iter().for_each(|number| hub.pump(*number));
    }

    /// Returns a connection to the broker for one server.
    pub fn node(&self) -> MemoryNode {
        let (queue, incoming) = mpsc::channel(QUEUE);
        let mut hub = lock(&self.hub);
        let number = hub.next;
        hub.next += 1;
        let port = Port {
            topics: HashSet::new(),
            queue,
            cut: false,
            lose: 0,
            reads: HashMap::new(),
            held: false,
            waiting: VecDeque::new(),
        };
        hub.nodes.insert(number, port);
        MemoryNode {
            link: MemoryLink {
                hub: self.hub.clone(),
                number,
            },
            incoming: tokio::sync::Mutex::new(incoming),
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = lock(&self.hub).nodes.len();
        f.debug_struct("Memory").field("nodes", &nodes).finish()
    }
}

/// Causes the faults of one node's connection in a test.
#[derive(Clone)]
pub struct MemoryLink {
    hub: Arc<Mutex<Hub>>,
    number: u64,
}

impl MemoryLink {
    /// Cuts the node off: messages that it publishes and messages to it are lost. The node is told that the broker is
    /// down.
    pub fn cut(&self) {
        self.set(true, Some(Incoming::Down));
    }

    /// Like [`cut`](Self::cut), but the node is not told.
    pub fn cut_silently(&self) {
        self.set(true, None);
    }

    /// Ends a cut. Messages for logs that waited meanwhile, at most 64, are appended.
    pub fn mend(&self) {
        self.set(false, Some(Incoming::Up));
        let mut hub = lock(&self.hub);
        let waiting = hub.nodes.get_mut(&self.number);
        let waiting = waiting.map(|port| std::mem::take(&mut port.waiting));
        for (topic, message) in waiting.unwrap_or_default() {
            hub.append(topic, message);
        }
        hub.pump(self.number);
    }

    /// Withholds from the node what is new in logs, or no longer.
    pub fn hold_logs(&self, hold: bool) {
        let mut hub = lock(&self.hub);
        if let Some(port) = hub.nodes.get_mut(&self.number) {
            port.held = hold;
        }
        hub.pump(self.number);
    }

    /// Loses the next messages to the node that are for rooms.
    pub fn lose(&self, messages: u64) {
        if let Some(port) = lock(&self.hub).nodes.get_mut(&self.number) {
            port.lose += messages;
        }
    }

    /// Delivers a message to the node as if another node had published it.
    pub fn inject(&self, topic: Topic, message: Bytes) {
        if let Some(port) = lock(&self.hub).nodes.get_mut(&self.number) {
            let _ = port.queue.try_send(Incoming::Message { topic, message });
        }
    }

    fn set(&self, cut: bool, tell: Option<Incoming>) {
        if let Some(port) = lock(&self.hub).nodes.get_mut(&self.number) {
            port.cut = cut;
            if let Some(tell) = tell {
                let _ = port.queue.try_send(tell);
            }
        }
    }
}

impl fmt::Debug for MemoryLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryLink")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// One server's connection to a [`Memory`].
pub struct MemoryNode {
    link: MemoryLink,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Incoming>>,
}

impl MemoryNode {
    /// Returns the handle with which faults are caused.
    pub fn link(&self) -> MemoryLink {
        self.link.clone()
    }
}

impl Cluster for MemoryNode {
    fn max_message(&self) -> usize {
        MAX_MESSAGE
    }

    fn publish(&self, topic: Topic, message: Bytes) -> Result<(), Lost> {
        if message.len() > MAX_MESSAGE {
            return Err(Lost);
        }
        let mut hub = lock(&self.link.hub);
        let here = self.link.number;
        if hub.nodes.get(&here).is_none_or(|port| port.cut) {
            return Ok(());
        }
        for (number, port) in &mut hub.nodes {
            if *number == here || port.cut || !port.topics.contains(&topic) {
                continue;
            }
            if port.lose > 0 && matches!(topic, Topic::Room(_)) {
                port.lose -= 1;
                continue;
            }
            // A node that is too slow detects the loss by the numbers of its messages.
            let message = message.clone();
            let _ = port.queue.try_send(Incoming::Message { topic, message });
        }
        Ok(())
    }

    fn subscribe(&self, topic: Topic) {
        if let Some(port) = lock(&self.link.hub).nodes.get_mut(&self.link.number) {
            port.topics.insert(topic);
        }
    }

    fn unsubscribe(&self, topic: Topic) {
        if let Some(port) = lock(&self.link.hub).nodes.get_mut(&self.link.number) {
            port.topics.remove(&topic);
        }
    }

    fn keeps(&self) -> bool {
        lock(&self.link.hub).keeps
    }

    fn keep(&self, topic: Topic, bounds: History) {
        let mut hub = lock(&self.link.hub);
        if let Some(port) = hub.nodes.get_mut(&self.link.number) {
            port.reads.entry(topic).or_default().most = bounds.messages;
        }
        hub.pump(self.link.number);
    }

    fn forget(&self, topic: Topic) {
        if let Some(port) = lock(&self.link.hub).nodes.get_mut(&self.link.number) {
            port.reads.remove(&topic);
        }
    }

    fn append(&self, topic: Topic, message: Bytes) -> Result<(), Lost> {
        let mut hub = lock(&self.link.hub);
        let port = hub.nodes.get_mut(&self.link.number).ok_or(Lost)?;
        if message.len() > MAX_MESSAGE || (port.cut && port.waiting.len() >= WAITING) {
            return Err(Lost);
        }
        match port.cut {
            true => port.waiting.push_back((topic, message)),
            false => hub.append(topic, message),
        }
        Ok(())
    }

    fn confirm(&self, topic: Topic, number: u64) {
        let mut hub = lock(&self.link.hub);
        if let Some(port) = hub.nodes.get_mut(&self.link.number)
            && let Some(place) = port.reads.get_mut(&topic)
        {
            place.asked = Some(number);
        }
        hub.pump(self.link.number);
    }

    fn next(&self) -> BoxFuture<'_, Option<Incoming>> {
        async {
            let mut incoming = self.incoming.lock().await;
            if incoming.is_empty() {
                // What had no room in the queue.
                lock(&self.link.hub).pump(self.link.number);
            }
            incoming.recv().await
        }
        .boxed()
    }
}

impl Drop for MemoryNode {
    fn drop(&mut self) {
        lock(&self.link.hub).nodes.remove(&self.link.number);
    }
}

impl fmt::Debug for MemoryNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryNode")
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}
