//! The state of a server, as it is told on a channel `stats`.
//!
//! Written and read by the same types. Each key may be missing, and those that are not known are ignored.

use serde::{Deserialize, Serialize};
use udpack::text::printable_within;

use crate::base::path::RelPath;
use crate::store::Space;

/// Longest text that is taken from a server, in bytes.
const TEXT: usize = 1024;

/// The state of a server at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ServerStats {
    /// How long it runs, in seconds.
    pub uptime: f64,
    /// It goes down.
    pub draining: bool,
    /// Bytes of all sockets, past ones included, but for those of the channels `stats`: frames without what QUIC adds.
    pub received: u64,
    /// As [`received`](Self::received), the other way.
    pub sent: u64,
    /// Bytes a second that come, of the last two seconds.
    pub receive_rate: u64,
    /// Bytes a second that go, of the last two seconds.
    pub send_rate: u64,
    /// Its transfers.
    pub jobs: JobCounts,
    /// Files stored since the start.
    pub files: u64,
    /// Their bytes.
    pub stored: u64,
    /// Bytes of memory that its process has; `None` where the system does not say.
    pub memory: Option<u64>,
    /// Bytes that its disk has for new files; `None` where its files go elsewhere.
    pub disk_free: Option<u64>,
    /// Bytes of its disk in all.
    pub disk_total: Option<u64>,
    /// Sockets in all.
    pub sockets_in_all: u64,
    /// Those that have moved most bytes, 256 at most.
    pub sockets: Vec<SocketStats>,
    /// Rooms in all.
    pub rooms_in_all: u64,
    /// Those with most members, 256 at most.
    pub rooms: Vec<RoomStats>,
    /// The cluster that it is a node of, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterStats>,
    /// The server's own quota, and those of the tokens whose clients are there: 64 at most.
    pub quotas: Vec<QuotaStats>,
}

/// How many transfers run, and how many have ended since the server's start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct JobCounts {
    /// Uploads that run.
    pub puts: u64,
    /// Downloads that run.
    pub gets: u64,
    /// Ended well.
    pub done: u64,
    /// Failed.
    pub failed: u64,
    /// Were cancelled.
    pub cancelled: u64,
    /// Were interrupted, and can be resumed.
    pub suspended: u64,
}

/// One socket of a server.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct SocketStats {
    /// Its id, by which it is closed.
    pub id: String,
    /// The name of its token.
    pub peer: String,
    /// The address of its peer.
    pub address: String,
    /// What its connection speaks: `quic`, `webtransport` or `websocket`.
    pub transport: String,
    /// What its peer's program calls itself.
    pub agent: String,
    /// How long its session is there, in seconds.
    pub age: f64,
    /// Its peer is in reach.
    pub connected: bool,
    /// Channels that are open on it.
    pub channels: u64,
    /// Bytes received: frames without what QUIC adds.
    pub received: u64,
    /// Bytes sent, but for those of its channel `stats`.
    pub sent: u64,
    /// The round trip to its peer, in seconds.
    pub rtt: f64,
}

/// One room of a server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct RoomStats {
    /// Its name.
    pub name: String,
    /// Channels that are in it.
    pub members: u64,
}

/// A server's cluster, as that server sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ClusterStats {
    /// The id of this node.
    pub id: String,
    /// The broker cannot be reached, or takes less than is sent: other nodes may miss messages.
    pub degraded: bool,
    /// The other nodes, 256 at most.
    pub nodes: Vec<NodeStats>,
}

/// Another node of a server's cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct NodeStats {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Where clients reach it; may be empty.
    pub address: String,
    /// Sockets on it.
    pub sockets: u64,
    /// It was not heard for 10 s.
    pub lost: bool,
}

/// One quota of a server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct QuotaStats {
    /// The name of the token; `None` for the quota of the whole server.
    pub peer: Option<String>,
    /// The directory whose files are counted; `None` for all.
    pub prefix: Option<String>,
    /// Bytes that are taken; `None` where the files were not counted yet.
    pub used: Option<u64>,
    /// Bytes that may be.
    pub quota: u64,
}

impl ServerStats {
    /// Says the same of what does not change by itself as time goes by: clocks, and what nobody looks at in detail.
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

    /// With lists of half their length, for a peer that takes small frames only; false when there is nothing left to cut.
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
            );
        if let Some(cluster) = &mut self.cluster {
            cluster.nodes.truncate(longest / 2);
        }
        self.sockets.truncate(longest / 2);
        self.rooms.truncate(longest / 2);
        self.quotas.truncate(longest / 2);
        longest > 0
    }

    /// What came from a server, safe to print.
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
            for node in &mut cluster.nodes {
                mend(&mut node.id);
                mend(&mut node.name);
                mend(&mut node.address);
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
