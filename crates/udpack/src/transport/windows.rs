//! Receive windows of connections: they grow with use, within a server's budget.
//!
//! A connection begins with a share of the budget. It grows in two cases. If the program reads a quarter of it within
//! one round trip, the window would soon limit the peer (Chromium and quic-go use the same rule). And if many unread
//! bytes have arrived, the window grows so that the channels that are read keep their room: an unread channel does
//! not delay the others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::base::lock;
use crate::base::pool::Shares;
use crate::transport::{Connection, ConnectionStats};
use crate::wire::config::{Limits, MIN_WINDOW};

/// Initial window of a connection, in bytes, if the budget permits. On a slow path, writers would fill a smaller one
/// for seconds, and the control stream would find no room.
const FIRST: u64 = 12 << 20;
/// The interval between checks for unread bytes. It is short compared with the slow-peer time-out.
const LOOK: Duration = Duration::from_secs(1);
/// Overhead in bytes per packet: packet headers, and frames that carry no channel data.
const OVERHEAD: u64 = 40;

/// Ticks when it is time to call [`ReceiveWindow::stuck`].
pub(crate) fn look() -> Interval {
    let mut interval = tokio::time::interval(LOOK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// The budget by which all windows of a server may grow together: a quarter of the receive budget. Half of that
/// budget is for the initial windows, and the last quarter for frames that arrive in parts.
#[derive(Debug)]
pub(crate) struct Pool {
    free: AtomicU64,
}

impl Pool {
    pub(crate) fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            free: AtomicU64::new(limits.receive_budget / 4),
        })
    }

    /// Takes up to `wanted` bytes, but at most half of the rest, so that some remains for later connections. Takes
    /// nothing if the amount would be too small to be useful.
    fn take(&self, wanted: u64) -> u64 {
        let share = |free: u64| Some(wanted.min(free / 2)).filter(|share| *share >= MIN_WINDOW);
        let taken = self
            .free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| {
                share(free).map(|share| free - share)
            });
        taken.ok().and_then(share).unwrap_or(0)
    }
}

/// Divides the memory for large frames that arrive in parts: a quarter of the budget, in bytes. Half of that is
/// reserved for one frame of each tenant. Every channel may wait.
pub(crate) fn frame_shares(limits: &Limits) -> Shares {
    let budget = usize::try_from(limits.receive_budget / 4).unwrap_or(usize::MAX);
    let places = budget.max(limits.frame.saturating_mul(4));
    Shares {
        places,
        each: places,
        minimum: limits.frame,
        reserve: places / 2,
        waiting: usize::MAX,
        waiting_each: usize::MAX,
    }
}

/// The initial window of each connection, in bytes, for this number of sockets. It changes in powers of two, so that
/// it changes rarely.
pub(crate) fn first(limits: &Limits, sockets: usize) -> u64 {
    let most = u64::from(limits.connection_window);
    let share = limits.receive_budget / 2 / sockets.max(1).next_power_of_two() as u64;
    share.clamp(MIN_WINDOW, FIRST).min(most)
}

/// The window of a session's connection.
#[derive(Debug)]
pub(crate) struct ReceiveWindow {
    /// Bytes that the program has read on the current connection.
    read: AtomicU64,
    /// The number of read bytes at which the window is checked.
    look_at: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The initial window and the growth, in bytes.
    first: u64,
    grown: u64,
    most: u64,
    stream: u64,
    /// On a server, the budget for growth.
    pool: Option<Arc<Pool>>,
    /// When the window was last checked because of read bytes.
    since: Instant,
    /// Bytes that had arrived, and bytes that were read, at the last check for unread bytes.
    arrived: u64,
    taken: u64,
    unread: u64,
}

impl ReceiveWindow {
    /// The window of a client, which is the initial one of its connections.
    pub(crate) fn new(limits: &Limits) -> Self {
        let state = State {
            first: u64::from(limits.connection_window).min(FIRST),
            grown: 0,
            most: limits.connection_window.into(),
            stream: limits.stream_window.into(),
            pool: None,
            since: Instant::now(),
            arrived: 0,
            taken: 0,
            unread: 0,
        };
        Self {
            read: AtomicU64::new(0),
            look_at: AtomicU64::new(state.window() / 4),
            state: Mutex::new(state),
        }
    }

    /// Gives an admitted connection of a server its initial window.
    pub(crate) fn admit(&self, first: u64, pool: &Arc<Pool>, conn: &Connection) {
        lock(&self.state).pool = Some(pool.clone());
        self.resize(first, conn);
    }

    /// Changes the initial window; the growth stays.
    pub(crate) fn resize(&self, first: u64, conn: &Connection) {
        let mut state = lock(&self.state);
        state.first = first;
        self.set(&state, conn);
    }

    /// Moves to another connection of the session, which starts with the initial window.
    pub(crate) fn renew(&self, conn: &Connection) {
        let mut state = lock(&self.state);
        state.shrink();
        self.read.store(0, Ordering::Relaxed);
        (state.arrived, state.taken, state.unread) = (0, 0, 0);
        self.set(&state, conn);
    }

    /// Returns the growth to the budget. The connection has ended, and another may follow.
    pub(crate) fn lost(&self) {
        let mut state = lock(&self.state);
        state.shrink();
        // Unread bytes of the old connection no longer count.
        state.unread = 0;
    }

    /// As [`Self::lost`]; no connection follows.
    pub(crate) fn end(&self) {
        let mut state = lock(&self.state);
        state.shrink();
        // Nothing more is taken.
        state.pool = None;
        state.most = 0;
    }

    /// Counts bytes that the program has read. Returns whether the window must be checked by [`Self::used`].
    pub(crate) fn read(&self, bytes: u64) -> bool {
        let read = self.read.fetch_add(bytes, Ordering::Relaxed) + bytes;
        read >= self.look_at.load(Ordering::Relaxed)
    }

    /// Grows the window if a quarter of it was read within a round trip.
    pub(crate) fn used(&self, conn: &Connection) {
        let rtt = conn.rtt();
        let mut state = lock(&self.state);
        if self.read.load(Ordering::Relaxed) < self.look_at.load(Ordering::Relaxed) {
            // Another thread has checked it in the meantime.
            return;
        }
        let now = Instant::now();
        let before = state.window();
        if now.duration_since(state.since) < rtt {
            state.grow(before.saturating_mul(2));
        }
        state.since = now;
        if state.window() == before {
            self.look_later(before);
        } else {
            self.set(&state, conn);
        }
    }

    /// Grows the window if more than half of it lies unread, by what the connection has received. To be called with each
    /// tick of [`look`].
    pub(crate) fn stuck(&self, conn: &Connection, stats: &ConnectionStats) {
        let overhead = stats.datagrams_received.saturating_mul(OVERHEAD);
        let arrived = stats.bytes_received.saturating_sub(overhead);
        let mut state = lock(&self.state);
        state.seen(arrived, self.read.load(Ordering::Relaxed));
        if state.unread > state.window() / 2 {
            let wanted = state.unread.saturating_add(state.stream);
            state.grow(wanted);
            self.set(&state, conn);
        }
    }

    fn set(&self, state: &State, conn: &Connection) {
        let window = state.window();
        self.look_later(window);
        if state.most > 0 {
            conn.set_receive_window(window);
        }
    }

    fn look_later(&self, window: u64) {
        let read = self.read.load(Ordering::Relaxed);
        self.look_at
            .store(read.saturating_add(window / 4), Ordering::Relaxed);
    }
}

impl State {
    fn window(&self) -> u64 {
        self.first.saturating_add(self.grown)
    }

    /// Returns the growth to the budget.
    fn shrink(&mut self) {
        let grown = std::mem::take(&mut self.grown);
        if let Some(pool) = &self.pool {
            pool.free.fetch_add(grown, Ordering::Relaxed);
        }
    }

    /// Grows the window to `wanted` bytes, as far as it may.
    fn grow(&mut self, wanted: u64) {
        let more = wanted.min(self.most).saturating_sub(self.window());
        self.grown += match &self.pool {
            Some(pool) => pool.take(more),
            None => more,
        };
    }

    /// Estimates the unread bytes from all bytes that have arrived, including duplicates and frames without data, and
    /// the bytes read. An eighth more than was read is counted as such overhead.
    fn seen(&mut self, arrived: u64, read: u64) {
        let came = arrived.saturating_sub(self.arrived);
        let taken = read.saturating_sub(self.taken);
        (self.arrived, self.taken) = (arrived, read);
        if came > taken.saturating_add(taken / 8) {
            self.unread = self.unread.saturating_add(came - taken).min(self.window());
        } else {
            self.unread = self.unread.saturating_sub(taken.saturating_sub(came));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn state(pool: Option<&Arc<Pool>>) -> State {
        State {
            first: 2 * MIB,
            grown: 0,
            most: 24 * MIB,
            stream: 8 * MIB,
            pool: pool.cloned(),
            since: Instant::now(),
            arrived: 0,
            taken: 0,
            unread: 0,
        }
    }

    #[test]
    fn all_windows_together_stay_within_the_budget() {
        let limits = Limits {
            receive_budget: 64 * MIB,
            ..Limits::default()
        };
        let pool = Pool::new(&limits);
        for sockets in [1, 5, 16, 100] {
            let sum = first(&limits, sockets) * sockets as u64;
            assert!(sum <= 32 * MIB, "{sockets} sockets begin with {sum} bytes");
        }
        let mut states: Vec<State> = (0..100).map(|_| state(Some(&pool))).collect();
        for _ in 0..10 {
            for state in &mut states {
                state.grow(state.window() * 2);
            }
        }
        let grown: u64 = states.iter().map(|state| state.grown).sum();
        assert!(grown <= 16 * MIB, "{grown}");
        assert_eq!(states[0].window(), 4 * MIB, "{:?}", states[0]);
        assert!(states[1].grown > 0, "{:?}", states[1]);
        assert_eq!(grown + pool.free.load(Ordering::Relaxed), 16 * MIB);
    }

    #[test]
    fn all_that_a_window_has_grown_by_returns_with_its_connection() {
        let limits = Limits {
            receive_budget: 64 * MIB,
            ..Limits::default()
        };
        let pool = Pool::new(&limits);
        let whole = pool.free.load(Ordering::Relaxed);
        let windows: Vec<_> = (0..8)
            .map(|_| {
                let window = ReceiveWindow::new(&limits);
                *lock(&window.state) = state(Some(&pool));
                window
            })
            .collect();
        for round in 0..5 {
            for window in &windows {
                let mut state = lock(&window.state);
                state.seen((round + 1) * 2 * MIB, 0);
                state.grow(8 * MIB);
            }
            assert!(pool.free.load(Ordering::Relaxed) < whole);
            windows.iter().for_each(ReceiveWindow::lost);
            assert_eq!(pool.free.load(Ordering::Relaxed), whole);
            assert_eq!(lock(&windows[0].state).unread, 0, "nothing to grow by");
        }
        windows.iter().for_each(ReceiveWindow::end);
        windows.iter().for_each(ReceiveWindow::end);
        assert_eq!(pool.free.load(Ordering::Relaxed), whole, "and only once");
    }

    #[test]
    fn grows_no_further_than_it_may() {
        let mut state = state(None);
        state.grow(100 * MIB);
        assert_eq!(state.window(), 24 * MIB);
        state.grow(MIB);
        assert_eq!(state.window(), 24 * MIB, "never smaller");
    }

    #[test]
    fn tells_what_lies_unread_from_headers_and_duplicates() {
        let mut state = state(None);
        state.seen(MIB + MIB / 10, MIB);
        assert_eq!(state.unread, 0, "a tenth more is no data");
        state.seen(2 * MIB + MIB / 10, MIB);
        assert_eq!(state.unread, MIB);
        state.seen(2 * MIB + MIB / 10, MIB + MIB / 2);
        assert_eq!(state.unread, MIB / 2, "half of it was read");
        state.seen(100 * MIB, 2 * MIB);
        assert_eq!(
            state.unread,
            state.window(),
            "more than fits cannot lie there"
        );
    }
}
