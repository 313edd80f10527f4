//! Coming back after a lost connection: how often and how soon, and what the application sees of it.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::BoxStream;
use tokio::sync::broadcast;
use tokio::time::Instant;

use crate::base::lock;
use crate::wire::code::CloseReason;
use crate::wire::control::GoAway;

/// SocketState changes that wait for a slow watcher; it misses the oldest.
const STATES: usize = 32;

/// How to come back after a lost connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reconnect {
    /// Tries without success before giving up; 0 never reconnects. Defaults to no bound.
    pub attempts: Option<u32>,
    /// Time without success before giving up. Defaults to 5 minutes.
    pub patience: Duration,
    /// The wait before the first try is drawn from 0 to this. Defaults to 250 ms; doubles each time.
    pub first: Duration,
    /// The longest that the wait becomes. Defaults to 30 s.
    pub most: Duration,
    /// Whether the very first connect is tried again, too, when nobody answers. Defaults to no: a wrong
    /// address shows at once.
    pub first_too: bool,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self {
            attempts: None,
            patience: Duration::from_secs(300),
            first: Duration::from_millis(250),
            most: Duration::from_secs(30),
            first_too: false,
        }
    }
}

impl Reconnect {
    /// A random wait before try number `attempt`, counted from 1. Random over all of it ("full jitter"), so
    /// that clients that lost a server together do not come back together.
    pub fn delay(&self, attempt: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(attempt.saturating_sub(1).min(31));
        part(self.first.saturating_mul(doubled).min(self.most))
    }
}

/// The time without success, measured against a [`Reconnect`] policy. A new one begins with each success.
#[derive(Debug, Default)]
pub struct Outage {
    since: Option<Instant>,
    attempts: u32,
    /// Waits that have grown already.
    before: u32,
}

impl Outage {
    /// One whose waits begin as long as after `before` tries, because the last successes did not last.
    pub(crate) fn after(before: u32) -> Self {
        Self {
            before,
            ..Self::default()
        }
    }

    /// The number of the next try, counted from 1, and how long to wait for it; `None` when it is time to give
    /// up. The time counts from the first call.
    pub fn next(&mut self, policy: &Reconnect) -> Option<(u32, Duration)> {
        let since = *self.since.get_or_insert_with(Instant::now);
        let left = policy.patience.checked_sub(since.elapsed())?;
        let spent = policy.attempts.is_some_and(|most| self.attempts >= most);
        if left.is_zero() || spent {
            return None;
        }
        self.attempts = self.attempts.saturating_add(1);
        let delay = policy.delay(self.attempts.saturating_add(self.before));
        Some((self.attempts, delay.min(left)))
    }

    /// How much patience is left.
    pub(crate) fn left(&self, policy: &Reconnect) -> Duration {
        let spent = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        policy.patience.saturating_sub(spent)
    }
}

impl GoAway {
    /// How long to wait before connecting again: what the server asked for, and a random part of its window.
    pub fn wait(&self) -> Duration {
        self.retry_after.saturating_add(part(self.window))
    }
}

/// A random part of a time.
fn part(whole: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8) >> 11;
    whole.mul_f64(random as f64 / (1_u64 << 53) as f64)
}

/// What the connection of a client that reconnects is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SocketState {
    /// The first connection is being made.
    Connecting,
    /// Connected and let in.
    Connected {
        /// The session goes on: resumable channels lost nothing. The first connection of a socket resumes
        /// nothing.
        resumed: bool,
        /// Why the session could not go on, where there was one: resumable channels have ended with
        /// `not_resumed`.
        reason: Option<String>,
    },
    /// The server is going away; the client moves when its turn has come.
    GoingAway(GoAway),
    /// The connection is lost; it is made again after the delay.
    Reconnecting {
        /// Which try, counted from 1 since the last success.
        attempt: u32,
        /// How long until then.
        delay: Duration,
    },
    /// There will be no other connection; the socket is over.
    GaveUp(CloseReason),
}

/// The present state and everybody who watches it.
pub(crate) struct StateFeed {
    now: Mutex<SocketState>,
    changes: broadcast::Sender<SocketState>,
}

impl StateFeed {
    pub(crate) fn new() -> Self {
        Self {
            now: Mutex::new(SocketState::Connecting),
            changes: broadcast::Sender::new(STATES),
        }
    }

    pub(crate) fn set(&self, state: SocketState) {
        self.set_with(state, || ());
    }

    /// Changes to `state` together with what `change` does: nobody finds the one without the other.
    pub(crate) fn set_with(&self, state: SocketState, change: impl FnOnce()) {
        let mut now = lock(&self.now);
        change();
        now.clone_from(&state);
        let _ = self.changes.send(state);
    }

    pub(crate) fn now(&self) -> SocketState {
        lock(&self.now).clone()
    }

    pub(crate) fn watch(&self) -> SocketStates {
        let now = lock(&self.now);
        let changes = self.changes.subscribe();
        let first = futures_util::stream::iter([now.clone()]);
        let rest = futures_util::stream::unfold(changes, async |mut changes| {
            loop {
                match changes.recv().await {
                    Ok(state) => return Some((state, changes)),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        });
        SocketStates(Box::pin(futures_util::StreamExt::chain(first, rest)))
    }
}

/// The state of a client's connection: the present one first, then each change. A watcher that lags by more
/// than 32 changes misses the oldest. Ends when the socket is gone.
pub struct SocketStates(BoxStream<'static, SocketState>);

impl SocketStates {
    pub(crate) fn none() -> Self {
        Self(Box::pin(futures_util::stream::empty()))
    }

    /// The next state; `None` when there will be no other.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<SocketState> {
        futures_util::StreamExt::next(&mut self.0).await
    }
}

impl Stream for SocketStates {
    type Item = SocketState;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<SocketState>> {
        self.0.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for SocketStates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketStates").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_random_and_grow_to_a_bound() {
        let policy = Reconnect::default();
        for attempt in [1, 2, 8, 100] {
            let bound = Duration::from_millis(250)
                .saturating_mul(2_u32.saturating_pow((attempt - 1).min(31)))
                .min(Duration::from_secs(30));
            let drawn: Vec<_> = (0..64).map(|_| policy.delay(attempt)).collect();
            assert!(drawn.iter().all(|delay| *delay <= bound), "{drawn:?}");
            assert!(drawn.iter().any(|delay| *delay > bound / 4), "{drawn:?}");
            assert!(
                drawn.iter().any(|delay| *delay < bound * 3 / 4),
                "{drawn:?}"
            );
        }
    }
}
