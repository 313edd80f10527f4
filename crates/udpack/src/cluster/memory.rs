//! A cluster of the servers of one process, for tests. It can fail as a broker does.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use crate::base::lock;
use crate::cluster::{Cluster, Incoming, Lost, Topic};

/// Messages that may wait for one node.
const QUEUE: usize = 4096;
const MAX_MESSAGE: usize = 8 << 20;

/// A broker in memory. A handle: clones share the broker.
#[derive(Clone, Default)]
pub struct Memory {
    hub: Arc<Mutex<Hub>>,
}

#[derive(Default)]
struct Hub {
    nodes: HashMap<u64, Port>,
    next: u64,
}

/// The broker's side of one node.
struct Port {
    topics: HashSet<Topic>,
    queue: mpsc::Sender<Incoming>,
    /// Whether no message passes, in either direction.
    cut: bool,
    /// How many of the next messages to it are lost.
    lose: u64,
}

impl Memory {
    /// A broker without nodes.
    pub fn new() -> Self {
        Self::default()
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

    /// Ends a cut.
    pub fn mend(&self) {
        self.set(false, Some(Incoming::Up));
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

    fn next(&self) -> BoxFuture<'_, Option<Incoming>> {
        async { self.incoming.lock().await.recv().await }.boxed()
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
