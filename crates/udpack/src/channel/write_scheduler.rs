//! Who of a connection's channels writes next, and how much bulk data may be under way.
//!
//! All channels of a connection share its flow-control and send windows. QUIC sends what it was given in
//! order of priority, but it takes nothing once a window is full: then a small message of a high channel would
//! wait until the bulk data in front of it is gone. So bulk channels leave room, and where several wait for
//! room, the higher ones get it first.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::wire::config::Priority;

/// Bytes that the bulk channels of a connection may have under way however narrow the path seems.
pub(crate) const BULK_FLOOR: u64 = 1 << 20;
/// They may have so many congestion windows under way: one on the path, the others so that a lost packet, which
/// keeps everything behind it unacknowledged, does not stop them.
const BULK_WINDOWS: u64 = 4;

/// Shared by the writers of one connection.
#[derive(Debug, Default)]
pub(crate) struct WriteScheduler {
    lots: AtomicU64,
    /// Writers that wait until QUIC takes more, by priority.
    blocked: [AtomicUsize; 3],
    /// Made when first needed.
    bulk: OnceLock<Arc<Bulk>>,
}

impl WriteScheduler {
    fn bulk(&self) -> &Arc<Bulk> {
        self.bulk.get_or_init(Arc::default)
    }

    /// A writer of this priority waits, for as long as the guard lives.
    pub(crate) fn wait(&self, priority: Priority) -> Waiting<'_> {
        let blocked = self.blocked(priority);
        blocked.fetch_add(1, Ordering::Relaxed);
        Waiting(blocked)
    }

    /// How often a writer that was woken lets the others go first.
    ///
    /// When room becomes free, quinn wakes every blocked stream, always in nearly the same order (last in,
    /// first out), and who writes first takes it all. So equals draw lots, and lower ones let all higher ones
    /// have their try before. Bounded, because a higher one may wait for something else: its own peer.
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

    /// Waits until the bulk channels may have more under way: fewer bytes given to QUIC and not yet
    /// acknowledged than four congestion windows, at least 1 MiB, at most half of `send_window`. Those that
    /// QUIC has not taken, because a peer reads nothing, do not count.
    ///
    /// `congestion_window` is asked anew each time: a writer that went on by an old, smaller one would never
    /// find room beside a writer that goes by the present one.
    pub(crate) async fn bulk_room(
        &self,
        congestion_window: impl Fn() -> u64,
        send_window: u64,
        turn: usize,
    ) {
        // Who comes later waits behind who waits already: between a notice and its reader a busy writer would
        // else take the room each time.
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

    /// Counts these bytes as under way until QUIC and everybody else has let go of them. QUIC does when they are
    /// acknowledged, or when nobody has a handle of the connection any more, which may be long after its end.
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

    /// A small number that looks random; nothing but fairness depends on it.
    fn draw(&self) -> u64 {
        // A Weyl sequence, stirred: neighbours draw unrelated numbers.
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
    /// Held by the one that waits for room; the others wait for it, in order.
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
