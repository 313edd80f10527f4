//! How much a peer may send ahead: windows of connections that grow as they are used, within a server's budget.
//!
//! A connection begins with a share of the budget. It grows in two cases. Where the program reads a quarter of it within
//! a round trip, the peer would soon be held up by it (Chromium and quic-go grow theirs by the same rule). And
//! where much has arrived that nobody reads, the channels that are read shall have as much room as before: what
//! is stuck in one holds up no other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::base::lock;
use crate::base::pool::Shares;
use crate::transport::{Connection, ConnectionStats};
use crate::wire::config::{Limits, MIN_WINDOW};

/// Window that a connection begins with, in bytes, where the budget permits. Not smaller, because on a slow path
/// writers fill a small one for seconds, and the control stream finds no room beside them.
const FIRST: u64 = 12 << 20;
/// How often unread bytes are looked for. Short against the time after which a peer whose channel takes
/// nothing is given up.
const LOOK: Duration = Duration::from_secs(1);
/// Of what arrives: packets' headers, and frames that carry no data of channels; in bytes a packet.
const OVERHEAD: u64 = 40;

/// Ticks when it is time to call [`ReceiveWindow::stuck`].
pub(crate) fn look() -> Interval {
    let mut interval = tokio::time::interval(LOOK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// What the windows of a server's connections may grow by, all together: a quarter of its budget. Half of it is what they
/// begin with, and the rest is for frames that come in pieces.
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

    /// Takes up to `wanted` bytes, at most half of what is left: something remains for those who come later.
    /// Nothing, where that is not worth while.
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

/// How the memory for large frames that come in pieces is divided: a quarter of the budget, in bytes. Half of that is kept
/// for one frame of each tenant. All may wait that have a channel.
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

/// The window that each of so many connections begins with, in bytes. It changes in powers of two, so that it
/// rarely does.
pub(crate) fn first(limits: &Limits, sockets: usize) -> u64 {
    let most = u64::from(limits.connection_window);
    let share = limits.receive_budget / 2 / sockets.max(1).next_power_of_two() as u64;
    share.clamp(MIN_WINDOW, FIRST).min(most)
}

/// The window of a session's connection.
#[derive(Debug)]
pub(crate) struct ReceiveWindow {
    /// Bytes that the program has read on the present connection.
    read: AtomicU64,
    /// When it has read so many, the window is looked at.
    look_at: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What the window is without having grown, and what it has grown by.
    first: u64,
    grown: u64,
    most: u64,
    stream: u64,
    /// What it grows from, at a server.
    pool: Option<Arc<Pool>>,
    /// When the window was last looked at because of what was read.
    since: Instant,
    /// Bytes that had arrived and been read at the last look for unread ones.
    arrived: u64,
    taken: u64,
    unread: u64,
}

impl ReceiveWindow {
    /// For a client, whose connections begin with it.
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

    /// Gives an admitted connection of a server the window to begin with.
    pub(crate) fn admit(&self, first: u64, pool: &Arc<Pool>, conn: &Connection) {
        lock(&self.state).pool = Some(pool.clone());
        self.resize(first, conn);
    }

    /// Changes the window that it began with; what it has grown by it keeps.
    pub(crate) fn resize(&self, first: u64, conn: &Connection) {
        let mut state = lock(&self.state);
        state.first = first;
        self.set(&state, conn);
    }

    /// Goes over to another connection of the session, which begins as the first one did.
    pub(crate) fn renew(&self, conn: &Connection) {
        let mut state = lock(&self.state);
        state.shrink();
        self.read.store(0, Ordering::Relaxed);
        (state.arrived, state.taken, state.unread) = (0, 0, 0);
        self.set(&state, conn);
    }

    /// Gives what it has grown by back to the others. The connection is over, and another may follow.
    pub(crate) fn lost(&self) {
        let mut state = lock(&self.state);
        state.shrink();
        // Nor does it grow again by what was left unread.
        state.unread = 0;
    }

    /// As [`Self::lost`]; no other follows.
    pub(crate) fn end(&self) {
        let mut state = lock(&self.state);
        state.shrink();
        // Nothing more is taken.
        state.pool = None;
        state.most = 0;
    }

    /// The program has read so many bytes. Says whether the window must be looked at: see [`Self::used`].
    pub(crate) fn read(&self, bytes: u64) -> bool {
        let read = self.read.fetch_add(bytes, Ordering::Relaxed) + bytes;
        read >= self.look_at.load(Ordering::Relaxed)
    }

    /// Grows the window if a quarter of it was read within a round trip.
    pub(crate) fn used(&self, conn: &Connection) {
        let rtt = conn.rtt();
        let mut state = lock(&self.state);
        if self.read.load(Ordering::Relaxed) < self.look_at.load(Ordering::Relaxed) {
            // Another thread has looked in the meantime.
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

    /// Gives back what it has grown by.
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

    /// Reckons what lies unread from what has arrived in all, duplicates and frames without data included, and
    /// what was read. An eighth more than was read is taken for such.
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
