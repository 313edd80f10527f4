//! Coming back after a lost connection: how often and how soon, and what the application sees of a connection.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::Stream;
use futures_util::stream::BoxStream;
use tokio::sync::broadcast;

use crate::base::lock;
use crate::trust::origin::Transport;
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
    since: Option<tokio::time::Instant>,
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
        let since = *self.since.get_or_insert_with(tokio::time::Instant::now);
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

/// When a client whose connection runs over TCP looks whether UDP passes again: first after 5 s, then after twice as long each
/// time and at most 5 minutes, each wait longer by a random part of up to a quarter of it. A new one begins when a
/// connection over UDP has lasted for a minute.
#[derive(Debug)]
pub struct Probes {
    next: Duration,
}

impl Probes {
    const FIRST: Duration = Duration::from_secs(5);
    const MOST: Duration = Duration::from_secs(300);
    /// A connection over UDP that is lost sooner shows a network that lets a handshake pass and not much more.
    pub const LASTING: Duration = Duration::from_secs(60);

    /// How long to wait before the next look.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next;
        self.next = wait.saturating_mul(2).min(Self::MOST);
        wait + part(wait / 4)
    }
}

impl Default for Probes {
    fn default() -> Self {
        Self { next: Self::FIRST }
    }
}

/// Why a client's connection runs over the transport it runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TransportReason {
    /// The client allows no other.
    Chosen,
    /// UDP passes, and goes first.
    UdpPasses,
    /// Nothing was heard over UDP in time.
    UdpBlocked,
    /// Nothing was heard over UDP before, and now it passes.
    UdpPassesAgain,
}

impl fmt::Display for TransportReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chosen => "no other is allowed",
            Self::UdpPasses => "UDP passes",
            Self::UdpBlocked => "UDP does not pass",
            Self::UdpPassesAgain => "UDP passes again",
        })
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

/// What the connection of a socket is doing. The same at both ends, but for who makes the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SocketState {
    /// The first connection is being made.
    Connecting,
    /// Connected and admitted.
    Connected {
        /// The session goes on: resumable channels lost nothing. The first connection of a socket resumes
        /// nothing.
        resumed: bool,
        /// Why the session could not go on, where there was one: resumable channels have ended with
        /// `not_resumed`.
        reason: Option<String>,
    },
    /// At a client that reconnects: the next connection, which is there, runs over another transport than the one before.
    /// `Connected` follows at once.
    TransportChanged {
        /// What the last connection spoke.
        from: Transport,
        /// What this one speaks.
        to: Transport,
        /// Why.
        why: TransportReason,
    },
    /// At a client that reconnects: the server is going away; the client moves when its turn has come.
    GoingAway(GoAway),
    /// The connection stands, but the peer does not answer: it is dead, asleep or out of reach. When it is heard again,
    /// the state is `Connected` with `resumed`, or `GoingAway`; else the connection is lost after its idle time.
    Silent {
        /// When it was last heard, to within a second.
        since: Instant,
    },
    /// At a server: the connection is lost; the session waits for its client, at most for `Timeouts::resume`.
    Detached {
        /// When it was found lost.
        since: Instant,
    },
    /// At a client that reconnects: the connection is lost; it is made again after the delay.
    Reconnecting {
        /// Which try, counted from 1 since the last success.
        attempt: u32,
        /// How long until then.
        delay: Duration,
        /// When the connection was found lost.
        since: Instant,
    },
    /// There will be no other connection; the socket is over.
    Closed(CloseReason),
}

impl SocketState {
    /// Whether the peer is there: `Connected` or `GoingAway`.
    pub fn is_connected(&self) -> bool {
        matches!(self, Self::Connected { .. } | Self::GoingAway(_))
    }
}

/// How long an answer may take, beside the round trips of [`on_path`], until the peer counts as silent. QUIC asks after
/// `Timeouts::keep_alive` without a word from the peer, and asks again and again in this time.
///
/// [`on_path`]: crate::session::on_path
pub(crate) const ANSWER: Duration = Duration::from_secs(3);

/// The present state and everybody who watches it.
pub(crate) struct StateFeed(Mutex<Feed>);

struct Feed {
    now: SocketState,
    /// The state that returns when a silent peer is heard again.
    before: Option<SocketState>,
    /// Datagrams that the present connection has received, and when the last was found.
    datagrams: u64,
    heard: tokio::time::Instant,
    /// Made for the first who watches: few sockets are watched.
    changes: Option<broadcast::Sender<SocketState>>,
}

impl Feed {
    fn change(&mut self, state: SocketState) {
        self.now.clone_from(&state);
        if let Some(changes) = &self.changes {
            let _ = changes.send(state);
        }
    }
}

impl StateFeed {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Feed {
            now: SocketState::Connecting,
            before: None,
            datagrams: 0,
            heard: tokio::time::Instant::now(),
            changes: None,
        }))
    }

    pub(crate) fn set(&self, state: SocketState) {
        self.set_with(state, || ());
    }

    /// Changes to `state` together with what `change` does: nobody finds the one without the other.
    pub(crate) fn set_with(&self, state: SocketState, change: impl FnOnce()) {
        let mut feed = lock(&self.0);
        change();
        feed.before = None;
        if let SocketState::Connected { .. } = state {
            feed.datagrams = 0;
            feed.heard = tokio::time::Instant::now();
        }
        feed.change(state);
    }

    /// The present connection has received so many datagrams. Without a new one for `patience` the peer is silent.
    pub(crate) fn listen(&self, datagrams: u64, patience: Duration) {
        let mut feed = lock(&self.0);
        if datagrams != feed.datagrams {
            feed.datagrams = datagrams;
            feed.heard = tokio::time::Instant::now();
            if let Some(before) = feed.before.take() {
                feed.change(before);
            }
        } else if feed.now.is_connected() && feed.heard.elapsed() >= patience {
            let since = feed.heard.into_std();
            feed.before = Some(match &feed.now {
                SocketState::Connected { .. } => SocketState::Connected {
                    resumed: true,
                    reason: None,
                },
                other => other.clone(),
            });
            feed.change(SocketState::Silent { since });
        }
    }

    pub(crate) fn now(&self) -> SocketState {
        lock(&self.0).now.clone()
    }

    pub(crate) fn is_connected(&self) -> bool {
        lock(&self.0).now.is_connected()
    }

    pub(crate) fn watch(&self) -> SocketStates {
        let mut feed = lock(&self.0);
        let changes = feed
            .changes
            .get_or_insert_with(|| broadcast::Sender::new(STATES))
            .subscribe();
        let states = futures_util::stream::unfold(
            (Some(feed.now.clone()), Some(changes)),
            async |(first, changes)| {
                let mut changes = changes?;
                let state = match first {
                    Some(state) => state,
                    None => loop {
                        match changes.recv().await {
                            Ok(state) => break state,
                            Err(broadcast::error::RecvError::Lagged(_)) => {}
                            Err(broadcast::error::RecvError::Closed) => return None,
                        }
                    },
                };
                let over = matches!(state, SocketState::Closed(_));
                Some((state, (None, (!over).then_some(changes))))
            },
        );
        SocketStates(Box::pin(states))
    }
}

/// The state of a socket's connection: the present one first, then each change. A watcher that lags by more
/// than 32 changes misses the oldest. Ends behind [`SocketState::Closed`].
pub struct SocketStates(BoxStream<'static, SocketState>);

impl SocketStates {
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
    fn looks_for_udp_become_rare() {
        let mut probes = Probes::default();
        for expected in [5, 10, 20, 40, 80, 160, 300, 300] {
            let (least, wait) = (Duration::from_secs(expected), probes.wait());
            assert!((least..=least * 5 / 4).contains(&wait), "{wait:?}");
        }
    }

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
