//! Speed: bytes and packets of the last period.
//!
//! Counting costs a few atomic additions per batch of messages; no other code runs until a caller reads them. A
//! [`SpeedMeter`] computes the difference between two readings itself, so there is no sampling task.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::base::sharded::Numbers;
use crate::transport::Connection;

/// Application bytes of an endpoint, a socket or a channel: whole frames, both ways.
#[derive(Debug)]
pub(crate) struct Counters {
    numbers: Numbers<2>,
    parent: Option<Arc<Self>>,
}

const SENT: usize = 0;
const RECEIVED: usize = 1;

impl Counters {
    /// Counters of one socket.
    pub(crate) fn root() -> Arc<Self> {
        Self::make(Numbers::plain(), None)
    }

    /// Counters that many sockets share.
    pub(crate) fn shared() -> Arc<Self> {
        Self::make(Numbers::spread(), None)
    }

    pub(crate) fn child(parent: Arc<Self>) -> Arc<Self> {
        Self::make(Numbers::plain(), Some(parent))
    }

    fn make(numbers: Numbers<2>, parent: Option<Arc<Self>>) -> Arc<Self> {
        Arc::new(Self { numbers, parent })
    }

    pub(crate) fn sent(&self, bytes: u64) {
        self.add(SENT, bytes);
    }

    pub(crate) fn received(&self, bytes: u64) {
        self.add(RECEIVED, bytes);
    }

    fn add(&self, which: usize, bytes: u64) {
        for counters in std::iter::successors(Some(self), |counters| counters.parent.as_deref()) {
            counters.numbers.add(which, bytes);
        }
    }

    /// The bytes sent and the bytes received.
    pub(crate) fn totals(&self) -> (u64, u64) {
        (self.numbers.get(SENT), self.numbers.get(RECEIVED))
    }
}

/// Cumulative numbers of one connection, or of all connections of an endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Application bytes handed to QUIC for sending (frames with their prefixes).
    pub sent: u64,
    /// Application bytes taken from QUIC.
    pub received: u64,
    /// UDP payload bytes sent, acknowledgements and retransmissions included.
    pub wire_sent: u64,
    /// UDP payload bytes received.
    pub wire_received: u64,
    /// Packets sent.
    pub packets_sent: u64,
    /// Packets declared lost.
    pub packets_lost: u64,
    /// Smoothed round-trip time; zero for an endpoint.
    pub rtt: Duration,
    /// Congestion window, in bytes; the sum for an endpoint.
    pub cwnd: u64,
    /// Largest UDP payload the path is known to take, in bytes; zero for an endpoint.
    pub mtu: u16,
}

impl Stats {
    pub(crate) fn of(conn: &Connection, counters: &Counters) -> Self {
        let stats = conn.stats();
        let (sent, received) = counters.totals();
        Self {
            sent,
            received,
            wire_sent: stats.bytes_sent,
            wire_received: stats.bytes_received,
            packets_sent: stats.packets_sent,
            packets_lost: stats.packets_lost,
            rtt: stats.rtt,
            cwnd: stats.congestion_window,
            mtu: stats.mtu,
        }
    }

    /// Adds the wire numbers of another connection.
    pub(crate) fn add_wire(&mut self, other: &Self) {
        self.wire_sent += other.wire_sent;
        self.wire_received += other.wire_received;
        self.packets_sent += other.packets_sent;
        self.packets_lost += other.packets_lost;
        self.cwnd += other.cwnd;
    }
}

/// The speed during one period.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Speed {
    /// Application bytes sent, per second.
    pub send: f64,
    /// Application bytes received, per second.
    pub recv: f64,
    /// UDP payload bytes sent, per second; for a channel those of its socket.
    pub wire_send: f64,
    /// UDP payload bytes received, per second; for a channel those of its socket.
    pub wire_recv: f64,
    /// Share of the packets sent in the period that were declared lost in it, 0 to 1.
    pub loss: f64,
    /// Smoothed round-trip time at the end of the period; zero for an endpoint.
    pub rtt: Duration,
    /// Congestion window at the end of the period, in bytes.
    pub cwnd: u64,
    /// How long the period was.
    pub period: Duration,
    /// The cumulative numbers at its end.
    pub total: Stats,
}

impl Speed {
    fn between(before: &Stats, now: Stats, period: Duration) -> Self {
        let secs = period.as_secs_f64().max(f64::EPSILON);
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / secs;
        let packets = now.packets_sent.saturating_sub(before.packets_sent);
        let lost = now.packets_lost.saturating_sub(before.packets_lost);
        Self {
            send: rate(now.sent, before.sent),
            recv: rate(now.received, before.received),
            wire_send: rate(now.wire_sent, before.wire_sent),
            wire_recv: rate(now.wire_received, before.wire_received),
            loss: if packets == 0 {
                0.0
            } else {
                (lost as f64 / packets as f64).min(1.0)
            },
            rtt: now.rtt,
            cwnd: now.cwnd,
            period,
            total: now,
        }
    }
}

/// Returns the current counters, or `None` once the source has ended.
pub(crate) type Source = Box<dyn Fn() -> Option<Stats> + Send + Sync>;

/// A [`Stream`] of [`Speed`], one item each period, by default each second.
///
/// It ends after the source has ended. Dropping it stops nothing else; a late reader gets one longer period, not a
/// burst of old ones.
pub struct SpeedMeter {
    source: Source,
    interval: Interval,
    before: Stats,
    at: Instant,
}

impl SpeedMeter {
    pub(crate) fn new(source: Source) -> Self {
        let before = source().unwrap_or_default();
        Self {
            source,
            interval: ticks(Duration::from_secs(1)),
            before,
            at: Instant::now(),
        }
    }

    /// Changes the period; at least 10 ms.
    #[must_use]
    pub fn every(mut self, period: Duration) -> Self {
        self.interval = ticks(period.max(Duration::from_millis(10)));
        self
    }

    /// The next period's speed; `None` once the source has ended.
    ///
    /// Cancel safe: a period that was not delivered is part of the next one.
    pub async fn next(&mut self) -> Option<Speed> {
        std::future::poll_fn(|cx| self.poll_speed(cx)).await
    }

    fn poll_speed(&mut self, cx: &mut Context<'_>) -> Poll<Option<Speed>> {
        std::task::ready!(self.interval.poll_tick(cx));
        let Some(now) = (self.source)() else {
            return Poll::Ready(None);
        };
        let at = Instant::now();
        let speed = Speed::between(&self.before, now, at - self.at);
        self.before = now;
        self.at = at;
        Poll::Ready(Some(speed))
    }
}

impl Stream for SpeedMeter {
    type Item = Speed;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Speed>> {
        self.poll_speed(cx)
    }
}

impl fmt::Debug for SpeedMeter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpeedMeter")
            .field("period", &self.interval.period())
            .finish_non_exhaustive()
    }
}

fn ticks(period: Duration) -> Interval {
    let mut interval = tokio::time::interval_at(Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_period_holds_what_moved_in_it() {
        let root = Counters::shared();
        let child = Counters::child(root.clone());
        let source = root.clone();
        let mut meter = SpeedMeter::new(Box::new(move || {
            let (sent, received) = source.totals();
            Some(Stats {
                sent,
                received,
                ..Stats::default()
            })
        }));
        child.sent(3_000);
        child.received(500);
        let speed = meter.next().await.expect("the source goes on");
        assert_eq!((speed.send, speed.recv), (3_000.0, 500.0));
        assert_eq!(speed.period, Duration::from_secs(1));
        let speed = meter.next().await.expect("the source goes on");
        assert_eq!((speed.send, speed.recv), (0.0, 0.0));
        assert_eq!(speed.total.sent, 3_000);
    }

    #[tokio::test(start_paused = true)]
    async fn ends_with_its_source() {
        let mut meter = SpeedMeter::new(Box::new(|| None)).every(Duration::from_millis(100));
        assert_eq!(meter.next().await, None);
    }
}
