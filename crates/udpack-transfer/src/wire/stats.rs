//! The state of a server, as sent on a channel named `stats`.
//!
//! The same types write and read it. Each key may be missing; unknown keys are ignored.

use serde::{Deserialize, Serialize};
use udpack::text::printable_within;

use crate::base::path::RelPath;
use crate::store::Space;

/// Longest text accepted from a server, in bytes.
const TEXT: usize = 1024;

/// The state of a server at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ServerStats {
    /// How long it has been running, in seconds.
    pub uptime: f64,
    /// Whether it is shutting down.
    pub draining: bool,
    /// Bytes received on all sockets, including past ones, except those of `stats` channels. Frames are counted without
    /// QUIC's overhead.
    pub received: u64,
    /// Bytes sent, counted like [`received`](Self::received).
    pub sent: u64,
    /// Received bytes per second, over the last two seconds.
    pub receive_rate: u64,
    /// Sent bytes per second, over the last two seconds.
    pub send_rate: u64,
    /// Its transfers.
    pub jobs: JobCounts,
    /// Files stored since the start.
    pub files: u64,
    /// The bytes of these files.
    pub stored: u64,
    /// Memory of its process, in bytes; `None` if the system does not tell.
    pub memory: Option<u64>,
    /// Bytes that its disk has free for new files; `None` if its files go elsewhere.
    pub disk_free: Option<u64>,
    /// Size of its disk, in bytes.
    pub disk_total: Option<u64>,
    /// Number of sockets.
    pub sockets_in_all: u64,
    /// The sockets that have moved the most bytes, at most 256.
    pub sockets: Vec<SocketStats>,
    /// Number of rooms.
    pub rooms_in_all: u64,
    /// The rooms with the most members, at most 256.
    pub rooms: Vec<RoomStats>,
    /// The cluster that it is a node of, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterStats>,
    /// What it copies to an object store behind its disk, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub push: Option<PushStats>,
    /// The server's own quota and those of the connected tokens, at most 64.
    pub quotas: Vec<QuotaStats>,
}

/// How many transfers are running, and how many have ended since the server's start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct JobCounts {
    /// Running uploads.
    pub puts: u64,
    /// Running downloads.
    pub gets: u64,
    /// Transfers that succeeded.
    pub done: u64,
    /// Transfers that failed.
    pub failed: u64,
    /// Transfers that were cancelled.
    pub cancelled: u64,
    /// Transfers that were interrupted and can be resumed.
    pub suspended: u64,
}

/// One socket of a server.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct SocketStats {
    /// Its id, with which an admin can close it.
    pub id: String,
    /// The name of its token.
    pub peer: String,
    /// The address of its peer.
    pub address: String,
    /// The transport of its connection: `quic`, `webtransport` or `websocket`.
    pub transport: String,
    /// The name and version that its peer's program sent.
    pub agent: String,
    /// The age of its session, in seconds.
    pub age: f64,
    /// Whether its peer is connected.
    pub connected: bool,
    /// Number of channels that are open on it.
    pub channels: u64,
    /// Bytes received: frames without QUIC's overhead.
    pub received: u64,
    /// Bytes sent, except those of its `stats` channel.
    pub sent: u64,
    /// The round-trip time to its peer, in seconds.
    pub rtt: f64,
}

/// One room of a server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct RoomStats {
    /// Its name.
    pub name: String,
    /// Number of channels that are in it.
    pub members: u64,
}

/// A server's cluster, as that server sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ClusterStats {
    /// The id of this node.
    pub id: String,
    /// Whether the broker cannot be reached or accepts less than is sent. Other nodes may then miss messages.
    pub degraded: bool,
    /// This node.
    pub own: NodeStats,
    /// The other nodes, at most 256.
    pub nodes: Vec<NodeStats>,
}

/// A node of a server's cluster, as it told of itself last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct NodeStats {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The address where clients reach it; may be empty.
    pub address: String,
    /// Number of sockets on it.
    pub sockets: u64,
    /// Rooms with members on it.
    pub rooms: u64,
    /// Their members on it.
    pub members: u64,
    /// It shuts down.
    pub draining: bool,
    /// It cannot reach the broker, or that takes less than it sends.
    pub degraded: bool,
    /// Whether it has been silent for 10 s.
    pub lost: bool,
}

/// What a server copies to an object store behind its disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PushStats {
    /// Changes that are not yet in the object store, those on their way included.
    pub waiting: u64,
    /// Files stored there since the start.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects removed since the start.
    pub removed: u64,
    /// Attempts that failed since the start.
    pub failures: u64,
    /// Why nothing is tried at the moment.
    pub trouble: Option<String>,
    /// Files on their way, 16 at most.
    pub moving: Vec<PushingStats>,
    /// The latest changes that failed and are tried again, 16 at most.
    pub failed: Vec<PushFailureStats>,
}

/// A file on its way to an object store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PushingStats {
    /// Its name.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes that were given to the object store, those of an earlier attempt included.
    pub bytes: u64,
}

/// A change that is not in the object store, as that failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PushFailureStats {
    /// The name of the file.
    pub path: String,
    /// Why.
    pub text: String,
}

/// One quota of a server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct QuotaStats {
    /// The name of the token; `None` for the quota of the whole server.
    pub peer: Option<String>,
    /// The directory whose files are counted; `None` for all files.
    pub prefix: Option<String>,
    /// Bytes in use; `None` while the files have not been counted yet.
    pub used: Option<u64>,
    /// Bytes allowed.
    pub quota: u64,
}

impl ServerStats {
    /// A copy without the values that change all the time: clocks and details. Two equal copies need no new message.
    pub(crate) fn steady(&self) -> Self {
        const MIB: u32 = 20;
        let mut steady = self.clone();
        steady.uptime = 0.0;
        for amount in [&mut steady.memory, &mut steady.disk_free] {
            *amount = amount.map(|bytes| bytes >> MIB);
        }
        for socket in &mut steady.sockets {
            (socket.age, socket.rtt) = (0.0, 0.0);
        }
        steady
    }

    /// Halves its lists, for a peer that accepts small frames only. Returns false when nothing is left to remove.
    pub(crate) fn halve(&mut self) -> bool {
        let longest = self
            .sockets
            .len()
            .max(self.rooms.len())
            .max(self.quotas.len())
            .max(
                self.cluster
                    .as_ref()
                    .map_or(0, |cluster| cluster.nodes.len()),
            )
            .max(
                self.push
                    .as_ref()
                    .map_or(0, |push| push.moving.len().max(push.failed.len())),
            );
        if let Some(push) = &mut self.push {
            push.moving.truncate(longest / 2);
            push.failed.truncate(longest / 2);
        }
        if let Some(cluster) = &mut self.cluster {
            cluster.nodes.truncate(longest / 2);
        }
        self.sockets.truncate(longest / 2);
        self.rooms.truncate(longest / 2);
        self.quotas.truncate(longest / 2);
        longest > 0
    }

    /// A copy whose texts, which came from a server, are safe to print.
    pub(crate) fn printable(mut self) -> Self {
        let mend = |text: &mut String| *text = printable_within(text, TEXT);
        for socket in &mut self.sockets {
            mend(&mut socket.id);
            mend(&mut socket.peer);
            mend(&mut socket.address);
            mend(&mut socket.transport);
            mend(&mut socket.agent);
        }
        self.rooms.iter_mut().for_each(|room| mend(&mut room.name));
        if let Some(cluster) = &mut self.cluster {
            mend(&mut cluster.id);
            for node in cluster.nodes.iter_mut().chain([&mut cluster.own]) {
                mend(&mut node.id);
                mend(&mut node.name);
                mend(&mut node.address);
            }
        }
        if let Some(push) = &mut self.push {
            push.trouble.iter_mut().for_each(mend);
            for moving in &mut push.moving {
                mend(&mut moving.path);
            }
            for failed in &mut push.failed {
                mend(&mut failed.path);
                mend(&mut failed.text);
            }
        }
        for quota in &mut self.quotas {
            let texts = [&mut quota.peer, &mut quota.prefix];
            texts.into_iter().flatten().for_each(mend);
        }
        self
    }

    pub(crate) fn set_space(&mut self, space: Option<Space>) {
        self.disk_free = space.map(|space| space.free);
        self.disk_total = space.map(|space| space.total);
    }
}

impl QuotaStats {
    pub(crate) fn of(
        peer: Option<&str>,
        prefix: Option<&RelPath>,
        used: Option<u64>,
        quota: u64,
    ) -> Self {
        Self {
            peer: peer.map(str::to_owned),
            prefix: prefix.map(|prefix| crate::base::names::shown(prefix.as_str())),
            used,
            quota,
        }
    }
}
