//! Rooms on several servers: what a server requires of the broker between them, and the messages over it.
//!
//! [`Cluster`] is the seam: it delivers the messages of a topic in order and does not promise that all arrive.
//! `udpack-nats` implements it on NATS; [`Memory`] connects the servers of one process, mainly for tests. Sequences,
//! gaps, presence and questions to all nodes work the same on both.
//! server makes of it (sequences, gaps, presence, questions to all nodes) is the same over either.
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

use bytes::Bytes;
use futures_util::future::BoxFuture;

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
    /// Messages of unknown topics to this node were lost because the node was too slow.
    Lost,
    /// The broker cannot be reached.
    Down,
    /// The broker can be reached again. Messages published in the meantime may be lost.
    Up,
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
