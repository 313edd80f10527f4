//! Inspects a server repeatedly, for [`ServerStats`].

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;
use udpack::{ClusterNode, ClusterState, ClusterView, Server, Socket, Transport};

use super::{BytesSent, Inner, lock};
use crate::server::scope::Scope;
use crate::store::{Space, Tenant};
use crate::wire::stats::{
    ClusterStats, JobCounts, NodeStats, QuotaStats, RoomStats, ServerStats, SocketStats,
};

/// The most sockets, and the most rooms, that are reported one by one.
const LISTED: usize = 256;
/// The most quotas that are reported.
const QUOTAS: usize = 64;
/// The time over which rates are averaged.
const OVER: Duration = Duration::from_secs(2);
/// The interval at which the free space is read.
const DISK: Duration = Duration::from_secs(2);

/// A cluster as one of its nodes sees it.
fn seen(cluster: &ClusterView) -> ClusterStats {
    let nodes = cluster.nodes().into_iter().take(LISTED);
    ClusterStats {
        id: cluster.id().to_string(),
        degraded: cluster.state() != ClusterState::Connected,
        own: of_node(cluster.own()),
        nodes: nodes.map(of_node).collect(),
    }
}

fn of_node(node: ClusterNode) -> NodeStats {
    NodeStats {
        id: node.id.to_string(),
        name: node.name,
        address: node.address,
        sockets: node.sockets,
        rooms: node.rooms,
        members: node.members,
        draining: node.draining,
        degraded: node.degraded,
        lost: node.lost,
    }
}

/// The traffic of the last seconds: bytes received and sent in each, the oldest first.
#[derive(Default)]
pub(super) struct History {
    seconds: VecDeque<(u64, u64)>,
    /// The end of the last second, and bytes received and sent until then.
    until: Option<(Instant, u64, u64)>,
    /// The same values at recent inspections, for the rates.
    recent: VecDeque<(Instant, u64, u64)>,
}

#[derive(Serialize)]
pub(super) struct HistoryFields {
    every: f64,
    received: Vec<u64>,
    sent: Vec<u64>,
}

impl History {
    /// The number of recorded seconds.
    const KEPT: usize = 300;
    /// The most bytes of one second in a message; a few seconds' worth covers the rest of the message.
    pub(super) const BYTES: usize = 24;

    /// Records the bytes until now. Traffic over several seconds is divided among them.
    fn note(&mut self, now: Instant, received: u64, sent: u64) {
        self.recent.push_back((now, received, sent));
        while let Some((second, ..)) = self.recent.get(1)
            && now.saturating_duration_since(*second) >= OVER
        {
            self.recent.pop_front();
        }
        let Some((then, received_then, sent_then)) = self.until else {
            self.until = Some((now, received, sent));
            return;
        };
        let seconds = now.saturating_duration_since(then).as_secs();
        if seconds == 0 {
            return;
        }
        let second = (
            received.saturating_sub(received_then) / seconds,
            sent.saturating_sub(sent_then) / seconds,
        );
        for _ in 0..seconds.min(Self::KEPT as u64) {
            if self.seconds.len() >= Self::KEPT {
                self.seconds.pop_front();
            }
            self.seconds.push_back(second);
        }
        self.until = Some((then + Duration::from_secs(seconds), received, sent));
    }

    /// Bytes received and sent per second.
    fn rates(&self) -> (u64, u64) {
        let (Some((since, before, sent_before)), Some((now, received, sent))) =
            (self.recent.front(), self.recent.back())
        else {
            return (0, 0);
        };
        let secs = now.saturating_duration_since(*since).as_secs_f64();
        let rate = |now: u64, before: u64| match secs > 0.0 {
            true => (now.saturating_sub(before) as f64 / secs) as u64,
            false => 0,
        };
        (rate(*received, *before), rate(*sent, *sent_before))
    }

    /// At most `most` of the last seconds.
    pub(super) fn fields(&self, most: usize) -> HistoryFields {
        let first = self.seconds.len().saturating_sub(most);
        let (received, sent) = self.seconds.iter().skip(first).copied().unzip();
        HistoryFields {
            every: 1.0,
            received,
            sent,
        }
    }
}

/// Inspects one server.
pub(super) struct Looker<'a> {
    inner: &'a Inner,
    server: &'a Server,
    space: Option<(Instant, Option<Space>)>,
}

impl<'a> Looker<'a> {
    pub(super) fn new(inner: &'a Inner, server: &'a Server) -> Self {
        Self {
            inner,
            server,
            space: None,
        }
    }

    /// Records the traffic; returns the bytes received and sent.
    pub(super) fn note(&self) -> (u64, u64) {
        let (received, sent) = self.server.traffic();
        let sent = sent.saturating_sub(self.inner.told.load(Ordering::Relaxed));
        lock(&self.inner.history).note(Instant::now(), received, sent);
        (received, sent)
    }

    pub(super) async fn look(&mut self) -> ServerStats {
        let (received, sent) = self.note();
        let sockets = self.server.sockets();
        let (puts, gets, ended) = self.inner.receiver.jobs.counts();
        let mut stats = ServerStats {
            uptime: self.inner.began.elapsed().as_secs_f64(),
            draining: self.inner.draining.load(Ordering::Relaxed),
            received,
            sent,
            jobs: JobCounts {
                puts: puts as u64,
                gets: gets as u64,
                done: ended.done,
                failed: ended.failed,
                cancelled: ended.cancelled,
                suspended: ended.suspended,
            },
            memory: memory(),
            sockets_in_all: sockets.len() as u64,
            quotas: self.quotas(&sockets),
            sockets: busiest(&sockets),
            ..ServerStats::default()
        };
        (stats.receive_rate, stats.send_rate) = lock(&self.inner.history).rates();
        (stats.rooms_in_all, stats.rooms) = self.rooms();
        stats.push = self.inner.receiver.pushed.as_ref().map(|pushed| pushed());
        stats.cluster = self.server.cluster().map(|cluster| seen(&cluster));
        if let Some(store) = self.inner.receiver.store() {
            (stats.files, stats.stored) = store.stored();
        }
        stats.set_space(self.space().await);
        stats
    }

    fn rooms(&self) -> (u64, Vec<RoomStats>) {
        let mut sizes = self.server.rooms().sizes();
        let all = sizes.len() as u64;
        sizes.sort_by(|(a, a_size), (b, b_size)| (b_size, a).cmp(&(a_size, b)));
        sizes.truncate(LISTED);
        let rooms = sizes.into_iter().map(|(name, members)| RoomStats {
            name,
            members: members as u64,
        });
        (all, rooms.collect())
    }

    /// The server's own quota, then those of tokens in the order of their names.
    fn quotas(&self, sockets: &[Socket]) -> Vec<QuotaStats> {
        let receiver = &self.inner.receiver;
        let Some(store) = receiver.store() else {
            return Vec::new();
        };
        let own = store.config().quota.map(|quota| {
            let tenant = Tenant {
                prefix: None,
                quota,
                outer: None,
            };
            QuotaStats::of(None, None, store.used(&tenant), quota)
        });
        let mut tenants: HashMap<String, Tenant> = HashMap::new();
        for socket in sockets {
            let peer = socket.peer();
            if peer.claim("quota").is_some()
                && !tenants.contains_key(peer.id())
                && let Ok(scope) = Scope::of(Some(&peer), &receiver.config.default_scope)
                && let Some(tenant) = scope.tenant()
            {
                tenants.insert(peer.id().to_owned(), tenant);
            }
        }
        let mut tenants: Vec<_> = tenants.into_iter().collect();
        tenants.sort_by(|(a, _), (b, _)| a.cmp(b));
        tenants.truncate(QUOTAS - 1);
        let quotas = tenants.iter().map(|(peer, tenant)| {
            let used = store.used(tenant);
            QuotaStats::of(Some(peer), tenant.prefix.as_ref(), used, tenant.quota)
        });
        own.into_iter().chain(quotas).collect()
    }

    /// Reads the free space on a thread that may block, because a disk may be slow to answer.
    async fn space(&mut self) -> Option<Space> {
        let store = self.inner.receiver.store()?.clone();
        if let Some((at, space)) = self.space
            && at.elapsed() < DISK
        {
            return space;
        }
        let asked = tokio::task::spawn_blocking(move || store.space()).await;
        let space = match asked {
            Ok(Ok(space)) => Some(space),
            Ok(Err(_)) | Err(_) => None,
        };
        self.space = Some((Instant::now(), space));
        space
    }
}

/// The sockets with the most traffic, in the order of their ids.
fn busiest(sockets: &[Socket]) -> Vec<SocketStats> {
    let mut moved: Vec<_> = sockets
        .iter()
        .map(|socket| (socket.stats(), socket))
        .collect();
    if moved.len() > LISTED {
        moved.sort_by_key(|(stats, _)| Reverse(stats.received.saturating_add(stats.sent)));
        moved.truncate(LISTED);
    }
    let told = |socket: &Socket| {
        let told: Option<BytesSent> = socket.extensions().get();
        told.map_or(0, |told| told.0.load(Ordering::Relaxed))
    };
    let mut listed: Vec<_> = moved
        .into_iter()
        .map(|(stats, socket)| SocketStats {
            id: socket.id().as_str().to_owned(),
            peer: socket.peer().id().to_owned(),
            address: socket.remote_address().to_string(),
            transport: match socket.transport() {
                Transport::WebSocket { .. } => "websocket",
                other => other.name(),
            }
            .to_owned(),
            agent: socket.agent(),
            age: socket.age().as_secs_f64(),
            connected: socket.is_connected(),
            channels: socket.channels() as u64,
            received: stats.received,
            sent: stats.sent.saturating_sub(told(socket)),
            rtt: stats.rtt.as_secs_f64(),
        })
        .collect();
    listed.sort_by(|a, b| b.age.total_cmp(&a.age));
    listed
}

/// The resident memory of this process, in bytes.
fn memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_kept_in_order_and_no_more_than_there_is_room_for() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut history = History::default();
        history.note(at(0), 1000, 10);
        history.note(at(900), 1500, 10);
        assert_eq!(history.seconds, []);
        history.note(at(1100), 3000, 10);
        // Looked at late: each of both seconds has its half.
        history.note(at(3050), 4000, 30);
        assert_eq!(history.seconds, [(2000, 0), (500, 10), (500, 10)]);
        let told = history.fields(2);
        assert_eq!((told.received, told.sent), (vec![500, 500], vec![10, 10]));
        history.note(at(10_000_000), 4000, 30);
        assert_eq!(history.seconds.len(), History::KEPT);
        assert!(history.seconds.iter().all(|second| *second == (0, 0)));
    }
}
