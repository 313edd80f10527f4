//! Rooms on several servers: what a server requires of the broker between them, and the messages over it.
//!
//! [`Cluster`] is the seam: it delivers the messages of a topic in order and does not promise that all arrive.
//! `udpack-nats` implements it on NATS; [`Memory`] connects the servers of one process, mainly for tests. What a server
//! makes of it (sequences, gaps, presence, questions to all nodes) is the same over either.
//!
//! A broker that can also keep messages gives rooms with a [history](crate::Rooms::history) one log for all nodes, with
//! one order and one set of positions ([`Cluster::keeps`]).
//!
//! ```no_run
//! # async fn run(builder: udpack::ServerBuilder) -> Result<(), udpack::BindError> {
//! use udpack::cluster::Memory;
//!
//! let memory = Memory::new();
//! let server = builder.cluster(memory.node()).bind("127.0.0.1:0").await?;
//! # Ok(()) }
//! ```

pub(crate) mod memory;
pub(crate) mod sequence;
pub(crate) mod wire;

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::channel::history::History;

pub use self::memory::{Memory, MemoryLink, MemoryNode};

/// Connects a server to the other nodes of its cluster.
///
/// Each message is delivered at most once and may be lost silently: numbers in the messages show losses. Messages that
/// one node publishes to one topic must arrive in order. A node need not receive its own messages, and ignores them.
pub trait Cluster: Send + Sync + 'static {
    /// The largest message in bytes; 0 while the broker has not told it.
    fn max_message(&self) -> usize;

    /// Queues a message for all other nodes that are subscribed to the topic. Never waits.
    ///
    /// # Errors
    /// If the queue is full or the message too large. The message is lost.
    fn publish(&self, topic: Topic, message: Bytes) -> Result<(), Lost>;

    /// Subscribes to a topic, before anything that is published after this call. Never waits. Subscriptions survive a
    /// reconnect to the broker.
    fn subscribe(&self, topic: Topic);

    /// Ends a subscription. Messages that are already on their way may still arrive.
    fn unsubscribe(&self, topic: Topic);

    /// Whether the broker keeps the messages of rooms with a history, by the four methods below. Without that, which is
    /// the default, each node keeps what it knows in memory.
    fn keeps(&self) -> bool {
        false
    }

    /// Keeps the log of a room within these bounds or wider ones from now on, and reads it from its oldest entry: events
    /// [`Incoming::Kept`] follow. Called again, it changes the bounds. Never waits.
    fn keep(&self, topic: Topic, bounds: History) {
        let _ = (topic, bounds);
    }

    /// Ends the reading of a log. Never waits. The broker keeps the log; events that are on their way may still arrive.
    fn forget(&self, topic: Topic) {
        let _ = topic;
    }

    /// Queues a message for a log that is [kept](Self::keep). Never waits. Messages of one node to one log must arrive in
    /// order. A message is kept until the broker has it, over any time without the broker; it may get into the log
    /// twice.
    ///
    /// # Errors
    /// If the queue is full or the message too large. The message is lost.
    fn append(&self, topic: Topic, message: Bytes) -> Result<(), Lost> {
        let _ = (topic, message);
        Err(Lost)
    }

    /// Asks how far a log goes: an event [`Kept::End`] with at least this number follows. Numbers rise. Never waits.
    fn confirm(&self, topic: Topic, number: u64) {
        let _ = (topic, number);
    }

    /// The next event; `None` when there will be no more. One task calls it repeatedly. Dropping a future that is not
    /// ready loses nothing.
    fn next(&self) -> BoxFuture<'_, Option<Incoming>>;
}

/// An event from the broker.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Incoming {
    /// A message of another node arrived.
    Message {
        /// The topic of the message.
        topic: Topic,
        /// The message.
        message: Bytes,
    },
    /// News of a log that this node reads.
    Kept {
        /// The topic of the room.
        topic: Topic,
        /// What is new.
        kept: Kept,
    },
    /// Messages of unknown topics to this node were lost because the node was too slow.
    Lost,
    /// The broker cannot be reached.
    Down,
    /// The broker can be reached again. Messages published in the meantime may be lost.
    Up,
}

/// What a node reads in the log of a room, in the log's order.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kept {
    /// The entries `first` to `last` follow, as far as they are still kept, and then new ones.
    Begin {
        /// Tells this log from every other that the room had or will have; from 1 to 2^53 - 1.
        epoch: u64,
        /// The offset of the oldest entry, or of the next one; 1 for the first that this log ever had.
        first: u64,
        /// The offset of the newest entry; `first` - 1 if there is none.
        last: u64,
    },
    /// An entry. Offsets rise; those between two entries are not kept any more.
    Message {
        /// Its offset.
        offset: u64,
        /// How long ago the broker took it.
        age: Duration,
        /// What a node appended.
        message: Bytes,
    },
    /// All entries up to this offset have been told, or are not kept any more; when it was asked, the log ended there.
    End {
        /// The log's last offset, or 0.
        offset: u64,
        /// The highest number with which it was [asked](Cluster::confirm) before.
        number: u64,
    },
}

/// The message was not published: the queue to the broker is full, or the message is too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the queue to the broker is full, or the message is too large for it")]
pub struct Lost;

/// The topics of messages between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Topic {
    /// Received by all nodes.
    Nodes,
    /// Received by one node.
    Node(NodeId),
    /// Received by the nodes that have members in one room. The id is the first 16 bytes of the SHA-256 of the room's
    /// name.
    Room([u8; 16]),
}

impl Topic {
    /// The topic of the room with this name.
    pub fn room(name: &str) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&digest.as_ref()[..16]);
        Self::Room(id)
    }
}

/// The form in a broker's subject: `nodes`, or `node.` or `room.` and hexadecimal digits.
impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nodes => f.write_str("nodes"),
            Self::Node(id) => write!(f, "node.{id}"),
            Self::Room(id) => {
                f.write_str("room.")?;
                id.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

/// Identifies one run of one server: 8 random bytes, drawn at each start. Displayed as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) [u8; 8]);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}

/// Whether this server can use the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClusterState {
    /// The broker is reachable.
    Connected,
    /// The broker is unreachable, or accepts less than is sent. Members on this node receive each other's messages.
    /// Members on other nodes learn of lost messages by gaps, later.
    Degraded,
}
