//! What all arms of `fanout` have in common: how many messages are under way, and what is measured of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::Semaphore;

use crate::args::Load;
use crate::ours::millis_since;
use crate::peer::Report;
use crate::stats::rank;

/// Messages to a room that are under way at once, so that nobody's queue overflows.
const WINDOW: usize = 4;

/// One run, shared by the publisher and the members.
pub(crate) struct Fanout {
    epoch: Instant,
    window: Semaphore,
    delivered: AtomicU64,
    members: u64,
}

impl Fanout {
    pub(crate) fn new(load: &Load) -> Arc<Self> {
        Arc::new(Self {
            epoch: Instant::now(),
            window: Semaphore::new(WINDOW),
            delivered: AtomicU64::new(0),
            members: load.sockets as u64,
        })
    }

    /// Waits until one more message may be under way. Returns the moment, to be sent with it.
    pub(crate) async fn next(&self) -> anyhow::Result<u64> {
        self.window.acquire().await?.forget();
        Ok(self.epoch.elapsed().as_nanos() as u64)
    }

    /// A member has a message that was sent at this moment. Returns the milliseconds that it took.
    pub(crate) fn received(&self, sent: u64) -> f64 {
        let took = millis_since(self.epoch, sent);
        let seen = self.delivered.fetch_add(1, Ordering::Relaxed) + 1;
        if seen.is_multiple_of(self.members) {
            self.window.add_permits(1);
        }
        took
    }
}

/// From the milliseconds of each delivery.
pub(crate) fn values(millis: &[f64], begun: Instant) -> Report {
    let took = begun.elapsed().as_secs_f64();
    Report::default()
        .value("rate", millis.len() as f64 / took)
        .value("p50", rank(millis, 0.5))
        .value("p99", rank(millis, 0.99))
}
