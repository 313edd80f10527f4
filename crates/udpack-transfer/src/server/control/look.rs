//! One look at a server after the other: what [`ServerStats`] are made of.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use udpack::{Server, Socket};

use super::{Inner, ToldTo};
use crate::server::scope::Scope;
use crate::store::{Space, Tenant};
use crate::wire::stats::{JobCounts, QuotaStats, RoomStats, ServerStats, SocketStats};

/// Sockets and rooms that are told of one by one.
const LISTED: usize = 256;
/// Quotas that are.
const QUOTAS: usize = 64;
/// Rates are those of so long.
const OVER: Duration = Duration::from_secs(2);
/// How often the disk is asked for its space.
const DISK: Duration = Duration::from_secs(2);

/// Looks at one server, and remembers what rates are made of.
pub(super) struct Looker<'a> {
    inner: &'a Inner,
    server: &'a Server,
    /// When, and bytes received and sent until then.
    moved: VecDeque<(Instant, u64, u64)>,
    space: Option<(Instant, Option<Space>)>,
}

impl<'a> Looker<'a> {
    pub(super) fn new(inner: &'a Inner, server: &'a Server) -> Self {
        Self {
            inner,
            server,
            moved: VecDeque::new(),
            space: None,
        }
    }

    /// Nobody watches for now.
    pub(super) fn rest(&mut self) {
        self.moved.clear();
    }

    pub(super) async fn look(&mut self) -> ServerStats {
        let all = self.server.stats();
        let told = self.inner.told.load(Ordering::Relaxed);
        let sockets = self.server.sockets();
        let (puts, gets, ended) = self.inner.receiver.jobs.counts();
        let mut stats = ServerStats {
            uptime: self.inner.began.elapsed().as_secs_f64(),
            draining: self.inner.draining.load(Ordering::Relaxed),
            received: all.received,
            sent: all.sent.saturating_sub(told),
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
        (stats.receive_rate, stats.send_rate) = self.rates(stats.received, stats.sent);
        (stats.rooms_in_all, stats.rooms) = self.rooms();
        if let Some(store) = self.inner.receiver.store() {
            (stats.files, stats.stored) = store.stored();
        }
        stats.set_space(self.space().await);
        stats
    }

    fn rates(&mut self, received: u64, sent: u64) -> (u64, u64) {
        let now = Instant::now();
        self.moved.push_back((now, received, sent));
        while let Some((second, ..)) = self.moved.get(1)
            && now.saturating_duration_since(*second) >= OVER
        {
            self.moved.pop_front();
        }
        let Some((since, before, sent_before)) = self.moved.front() else {
            return (0, 0);
        };
        let secs = now.saturating_duration_since(*since).as_secs_f64();
        let rate = |now: u64, before: u64| match secs > 0.0 {
            true => (now.saturating_sub(before) as f64 / secs) as u64,
            false => 0,
        };
        (rate(received, *before), rate(sent, *sent_before))
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

    /// The server's own, then those of tokens in the order of their names.
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

    /// A disk that is slow to answer is not asked on a thread that serves sockets.
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

/// Those that have moved most bytes, in the order of their ids.
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
        let told: Option<ToldTo> = socket.extensions().get();
        told.map_or(0, |told| told.0.load(Ordering::Relaxed))
    };
    let mut listed: Vec<_> = moved
        .into_iter()
        .map(|(stats, socket)| SocketStats {
            id: socket.id().as_str().to_owned(),
            peer: socket.peer().id().to_owned(),
            address: socket.remote_address().to_string(),
            transport: match socket.transport().is_web() {
                true => "web",
                false => "quic",
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

/// Bytes of memory that this process has.
fn memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
