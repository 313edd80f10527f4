//! Reconnecting: the policy of attempts, and the states of a connection as the application sees them.

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

/// The policy for reconnecting after a lost connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reconnect {
    /// The most attempts without success before giving up; 0: never reconnect. Defaults to no bound.
    pub attempts: Option<u32>,
    /// Time without success before giving up. Defaults to 5 minutes.
    pub patience: Duration,
    /// The upper bound of the random wait before the first attempt. Defaults to 250 ms; doubles with each attempt.
    pub first: Duration,
    /// The largest upper bound of the wait. Defaults to 30 s.
    pub most: Duration,
    /// Whether the very first connect is also tried again when the server does not answer. Defaults to no, so that a
    /// wrong address is reported at once.
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
    /// A random wait before attempt `attempt`, counted from 1. It is random over the whole range ("full jitter"), so
    /// that clients that lost a server together do not reconnect together.
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
    /// Starts with the waits that follow `before` attempts, because the last connections did not last.
    pub(crate) fn after(before: u32) -> Self {
        Self {
            before,
            ..Self::default()
        }
    }

    /// The number of the next attempt, counted from 1, and the wait before it; `None` when it is time to give up. The
    /// time counts from the first call.
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

/// When a client whose connection runs over TCP probes UDP again: first after 5 s, then after twice as long each time,
/// at most 5 minutes. A random part of up to a quarter is added to each wait. A client begins anew when a connection
/// over UDP has lasted for a minute.
#[derive(Debug)]
pub struct Probes {
    next: Duration,
}

impl Probes {
    const FIRST: Duration = Duration::from_secs(5);
    const MOST: Duration = Duration::from_secs(300);
    /// A connection over UDP that is lost sooner suggests a network that passes little more than a handshake.
    pub const LASTING: Duration = Duration::from_secs(60);

    /// The wait before the next probe.
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

/// Why a client's connection uses its transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TransportReason {
    /// The client permits only this transport.
    Chosen,
    /// UDP works, and is preferred.
    UdpPasses,
    /// No answer came over UDP in time.
    UdpBlocked,
    /// UDP did not work before, and works now.
    UdpPassesAgain,
}

impl fmt::Display for TransportReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chosen => "chosen by this client",
            Self::UdpPasses => "UDP passes",
            Self::UdpBlocked => "UDP does not pass",
            Self::UdpPassesAgain => "UDP passes again",
        })
    }
}

impl GoAway {
    /// How long to wait before reconnecting: the time that the server asked for, plus a random part of its window.
    pub fn wait(&self) -> Duration {
        self.retry_after.saturating_add(part(self.window))
    }
}

/// A random part of a time.
fn part(whole: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8) >> 11;
    whole.mul_f64(random as f64 / (1_u64 << 53) as f64)
}

/// The state of a socket's connection, on both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SocketState {
    /// The first connection is being made.
    Connecting,
    /// Connected and admitted.
    Connected {
        /// Whether the session was resumed, so that resumable channels lost nothing. False for the first connection
        /// of a socket.
        resumed: bool,
        /// Why an existing session was not resumed: resumable channels have ended with `not_resumed`.
        reason: Option<String>,
    },
    /// On a client that reconnects: the next connection exists and uses another transport than the one before.
    /// `Connected` follows at once.
    TransportChanged {
        /// The transport of the last connection.
        from: Transport,
        /// The transport of this one.
        to: Transport,
        /// Why.
        why: TransportReason,
    },
    /// On a client that reconnects: the server is shutting down; the client moves when its time has come.
    GoingAway(GoAway),
    /// The peer does not answer: it is dead, asleep or out of reach. When packets arrive again, the state is
    /// `Connected` with `resumed`, or `GoingAway`; otherwise the connection is lost after the idle time-out.
    Silent {
        /// When the last packet arrived, to within a second.
        since: Instant,
    },
    /// On a server: the connection is lost; the session waits for its client, at most for `Timeouts::resume`.
    Detached {
        /// When it was found lost.
        since: Instant,
    },
    /// On a client that reconnects: the connection is lost; the client reconnects after the delay.
    Reconnecting {
        /// The number of the attempt, counted from 1 since the last success.
        attempt: u32,
        /// The wait before the attempt.
        delay: Duration,
        /// When the connection was found lost.
        since: Instant,
    },
    /// There will be no other connection; the socket has ended.
    Closed(CloseReason),
}

impl SocketState {
    /// Whether the peer is connected: `Connected` or `GoingAway`.
    pub fn is_connected(&self) -> bool {
        matches!(self, Self::Connected { .. } | Self::GoingAway(_))
    }
}

/// How long an answer may take, in addition to the round trips of [`on_path`], until the peer counts as silent. QUIC
/// sends a probe after `Timeouts::keep_alive` without a packet from the peer, and repeats it in this time.
///
/// [`on_path`]: crate::session::on_path
pub(crate) const ANSWER: Duration = Duration::from_secs(3);

/// The current state and its watchers.
pub(crate) struct StateFeed(Mutex<Feed>);

struct Feed {
    now: SocketState,
    /// The state to return to when a silent peer answers again.
    before: Option<SocketState>,
    /// How many datagrams the current connection has received, and when the last one was noticed.
    datagrams: u64,
    heard: tokio::time::Instant,
    /// Created for the first watcher, because few sockets are watched.
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

    /// Sets the state and calls `change` under one lock, so that nobody sees one without the other.
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

    /// Reports how many datagrams the current connection has received. Without a new one for `patience` the peer is
    /// silent.
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

/// A stream of the states of a socket's connection: the current one first, then each change. A watcher that lags by
/// more than 32 changes misses the oldest. Ends after [`SocketState::Closed`].
pub struct SocketStates(BoxStream<'static, SocketState>);

impl SocketStates {
    /// The next state; `None` after the last one.
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
