//! Rooms on several machines: what a server asks of the broker between them, and what goes over it.
//!
//! [`Cluster`] is the seam: topics, messages in the order that they were published in, and no promise that all arrive.
//! `udpack-nats` implements it on NATS; [`Memory`] is one for the servers of a single process, for tests above all. What a
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

/// What connects a server with the other nodes of its cluster.
///
/// Delivery is at most once and may fail without a word: numbers in the messages show what is missing. What one node
/// publishes to one topic must arrive in order. A node's own messages should not come back to it; those that do are
/// ignored.
pub trait Cluster: Send + Sync + 'static {
    /// Most bytes of a message; 0 while the broker has not said so yet.
    fn max_message(&self) -> usize;

    /// Queues a message for all other nodes that are subscribed to the topic. Never waits.
    ///
    /// # Errors
    /// When the queue is full or the message too large: it is lost.
    fn publish(&self, topic: Topic, message: Bytes) -> Result<(), Lost>;

    /// Subscribes to a topic, before anything that is published after this call. Never waits. Subscriptions survive
    /// trouble with the broker.
    fn subscribe(&self, topic: Topic);

    /// Ends a subscription. Messages that are on their way may still come.
    fn unsubscribe(&self, topic: Topic);

    /// What happens next; `None` once there will be nothing more. Called by one task, again and again; a future
    /// that is dropped before it is ready loses nothing.
    fn next(&self) -> BoxFuture<'_, Option<Incoming>>;
}

/// What came from the broker.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Incoming {
    /// A message of another node.
    Message {
        /// Where it was published.
        topic: Topic,
        /// What was published.
        message: Bytes,
    },
    /// Messages of unknown topics were lost on their way to this node, because it was too slow.
    Lost,
    /// The broker cannot be reached.
    Down,
    /// The broker can be reached again; what was published meanwhile may be lost.
    Up,
}

/// A message was not published: the queue to the broker is full, or the message too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the queue to the broker is full, or the message is too large for it")]
pub struct Lost;

/// Where messages between nodes are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Topic {
    /// All nodes.
    Nodes,
    /// One node.
    Node(NodeId),
    /// The nodes with members in one room: the first 16 bytes of the SHA-256 of its name.
    Room([u8; 16]),
}

impl Topic {
    /// That of a room of this name.
    pub fn room(name: &str) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&digest.as_ref()[..16]);
        Self::Room(id)
    }
}

/// As part of a broker's subject: `nodes`, `node.` and `room.` with hexadecimal digits.
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

/// One run of one server: 8 random bytes, drawn at each start. Displayed as 16 hexadecimal digits.
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

/// Whether this server reaches the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClusterState {
    /// It does.
    Connected,
    /// It does not, or the broker takes less than is sent: members on this node hear each other; what others miss they are
    /// told as gaps later.
    Degraded,
}
