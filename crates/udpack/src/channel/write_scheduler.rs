//! Decides which of a connection's channels writes next, and limits the bulk data in flight.
//!
//! All channels of a connection share its flow-control and send windows. QUIC sends the data that it was given in
//! order of priority, but it accepts no more once a window is full. A small message of a high-priority channel would
//! then wait for the bulk data before it. So bulk channels leave room in the window, and of several channels that
//! wait for room, those of higher priority get it first.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::wire::config::Priority;

/// Bytes that the bulk channels of a connection may always have in flight, even on a narrow path.
pub(crate) const BULK_FLOOR: u64 = 1 << 20;
/// The number of congestion windows that they may have in flight: one on the path, the others because a lost packet
/// keeps everything after it unacknowledged and must not stop them.
const BULK_WINDOWS: u64 = 4;

/// Shared by the writers of one connection.
#[derive(Debug, Default)]
pub(crate) struct WriteScheduler {
    lots: AtomicU64,
    /// Writers that wait until QUIC takes more, by priority.
    blocked: [AtomicUsize; 3],
    /// Created on first use.
    bulk: OnceLock<Arc<Bulk>>,
}

impl WriteScheduler {
    fn bulk(&self) -> &Arc<Bulk> {
        self.bulk.get_or_init(Arc::default)
    }

    /// Counts a waiting writer of this priority while the guard lives.
    pub(crate) fn wait(&self, priority: Priority) -> Waiting<'_> {
        let blocked = self.blocked(priority);
        blocked.fetch_add(1, Ordering::Relaxed);
        Waiting(blocked)
    }

    /// How often a writer that was woken yields to the other writers.
    ///
    /// When room becomes free, quinn wakes every blocked stream, always in nearly the same order (last in, first
    /// out), and the first writer takes all of it. So writers of equal priority draw random numbers, and writers of
    /// lower priority yield to all of higher priority. The number is bounded, because a writer of higher priority may
    /// wait for its peer instead.
    pub(crate) fn let_pass(&self, priority: Priority) -> u64 {
        let waits = |other| self.blocked(other).load(Ordering::Relaxed);
        let higher = [Priority::Normal, Priority::High]
            .into_iter()
            .filter(|other| *other > priority && waits(*other) > 0)
            .count() as u64;
        let lot = if waits(priority) > 1 {
            self.draw() % 4
        } else {
            0
        };
        4 * higher + lot
    }

    /// Waits until the bulk channels may have more bytes in flight. Their limit is four congestion windows, at least
    /// 1 MiB, at most half of `send_window`. Bytes that QUIC has not accepted because a peer reads nothing do not
    /// count.
    ///
    /// `congestion_window` is called each time: a writer that used an old, smaller window would never find room
    /// beside a writer that uses the current one.
    pub(crate) async fn bulk_room(
        &self,
        congestion_window: impl Fn() -> u64,
        send_window: u64,
        turn: usize,
    ) {
        // Writers wait in line. Without the line a busy writer would take the room each time before the notified
        // writer runs.
        let _first = self.bulk().queue.lock().await;
        loop {
            let mut room = std::pin::pin!(self.bulk().room.notified());
            room.as_mut().enable();
            let most = congestion_window()
                .saturating_mul(BULK_WINDOWS)
                .min(send_window / 2)
                .max(BULK_FLOOR);
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            let stuck = turn.saturating_mul(self.blocked(Priority::Bulk).load(Ordering::Relaxed));
            if self.bulk().under_way.load(Ordering::Relaxed) < most.saturating_add(stuck) {
                return;
            }
            room.await;
        }
    }

    /// Counts these bytes as in flight until QUIC and all others have dropped them. QUIC drops them when they are
    /// acknowledged, or when the last handle of the connection is dropped, which may be long after its end.
    pub(crate) fn hold(&self, bytes: Bytes) -> Bytes {
        self.bulk()
            .under_way
            .fetch_add(bytes.len(), Ordering::Relaxed);
        Bytes::from_owner(Held {
            bytes,
            bulk: self.bulk().clone(),
        })
    }

    fn blocked(&self, priority: Priority) -> &AtomicUsize {
        let [bulk, normal, high] = &self.blocked;
        match priority {
            Priority::Bulk => bulk,
            Priority::Normal => normal,
            Priority::High => high,
        }
    }

    /// A small pseudo-random number; only fairness depends on it.
    fn draw(&self) -> u64 {
        // A mixed Weyl sequence: successive draws are unrelated.
        let x = self
            .lots
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^ (x >> 27)
    }
}

/// See [`WriteScheduler::wait`].
pub(crate) struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Bulk {
    under_way: AtomicUsize,
    /// The writer that waits for room holds this lock; the others wait for the lock, in order.
    queue: tokio::sync::Mutex<()>,
    room: Notify,
}

struct Held {
    bytes: Bytes,
    bulk: Arc<Bulk>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.bulk
            .under_way
            .fetch_sub(self.bytes.len(), Ordering::Relaxed);
        self.bulk.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn lower_writers_let_higher_ones_go_first() {
        let scheduler = WriteScheduler::default();
        let _bulk = scheduler.wait(Priority::Bulk);
        assert_eq!(scheduler.let_pass(Priority::Bulk), 0, "nobody else waits");
        let high = scheduler.wait(Priority::High);
        for _ in 0..100 {
            assert_eq!(scheduler.let_pass(Priority::High), 0);
            assert_eq!(scheduler.let_pass(Priority::Bulk), 4);
            assert_eq!(scheduler.let_pass(Priority::Normal), 4);
        }
        let _normal = [
            scheduler.wait(Priority::Normal),
            scheduler.wait(Priority::Normal),
        ];
        for _ in 0..100 {
            assert_eq!(scheduler.let_pass(Priority::High), 0);
            assert!((4..8).contains(&scheduler.let_pass(Priority::Normal)));
            assert_eq!(scheduler.let_pass(Priority::Bulk), 8);
        }
        drop(high);
        for _ in 0..100 {
            assert!(scheduler.let_pass(Priority::Normal) < 4);
            assert_eq!(scheduler.let_pass(Priority::Bulk), 4);
        }
    }

    #[test]
    fn a_writer_that_waits_goes_by_the_present_window() {
        let scheduler = WriteScheduler::default();
        let window = AtomicU64::new(0);
        let _held = scheduler.hold(Bytes::from(vec![0; BULK_FLOOR as usize + 100]));
        let waits = scheduler.bulk_room(|| window.load(Ordering::Relaxed), 16 << 20, 1);
        let mut waits = std::pin::pin!(waits);
        assert!(waits.as_mut().now_or_never().is_none());
        window.store(BULK_FLOOR, Ordering::Relaxed);
        drop(scheduler.hold(Bytes::from_static(b"one that is acknowledged")));
        assert!(waits.now_or_never().is_some(), "the path has grown");
    }

    #[test]
    fn bulk_waits_until_what_is_under_way_is_let_go() {
        let scheduler = WriteScheduler::default();
        let free = |window| {
            scheduler
                .bulk_room(|| window, 16 << 20, 1)
                .now_or_never()
                .is_some()
        };
        let floor = BULK_FLOOR as usize;
        assert!(free(0));
        let mut held = scheduler.hold(Bytes::from(vec![0; floor]));
        assert!(!free(0), "the floor is reached");
        assert!(free(BULK_FLOOR), "a wide path takes more");
        let _stuck = scheduler.wait(Priority::Bulk);
        assert!(free(0), "what nobody takes does not count");
        drop(_stuck);
        let part = held.split_to(100);
        drop(held);
        assert!(!free(0), "a part is not acknowledged yet");
        drop(part);
        assert!(free(0));
        let _most = scheduler.hold(Bytes::from(vec![0; 8 << 20]));
        assert!(!free(1 << 40), "half of the send window is the others'");
    }
}
