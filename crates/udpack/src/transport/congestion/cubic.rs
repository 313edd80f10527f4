//! The congestion window of CUBIC (RFC 9438) in congestion avoidance.

use std::time::{Duration, Instant};

/// RFC 9438, section 5: segments per cubed second.
const C: f64 = 0.4;
/// RFC 9438, section 4.6: what is left of the window after a loss.
const BETA: f64 = 0.7;
const LEAST: f64 = 2.0;

/// A window in segments, as CUBIC counts.
#[derive(Debug, Clone)]
pub(super) struct Cubic {
    window: f64,
    /// The window before the last reduction.
    w_max: f64,
    /// The window of a Reno flow; CUBIC's window is never smaller.
    w_est: f64,
    alpha: f64,
    epoch: Option<Epoch>,
    reduced: Option<Instant>,
}

/// The curve since the last reduction.
#[derive(Debug, Clone, Copy)]
struct Epoch {
    start: Instant,
    k: f64,
    origin: f64,
}

impl Cubic {
    /// Starts with this window, in bytes. The Reno estimate grows by `alpha` segments in each round trip.
    pub(super) fn new(window: f64, mtu: f64, alpha: f64) -> Self {
        let window = (window / mtu).max(LEAST);
        Self {
            window,
            w_max: window,
            w_est: window,
            alpha,
            epoch: None,
            reduced: None,
        }
    }

    /// The window in bytes.
    pub(super) fn window(&self, mtu: f64) -> f64 {
        self.window * mtu
    }

    /// This many bytes were acknowledged, and the sender was not short of data.
    pub(super) fn on_ack(&mut self, now: Instant, acked: f64, mtu: f64, rtt: Duration) {
        let segments = acked / mtu;
        let (window, w_max) = (self.window, self.w_max);
        let epoch = *self.epoch.get_or_insert_with(|| Epoch {
            start: now,
            k: ((w_max - window).max(0.0) / C).cbrt(),
            origin: w_max.max(window),
        });
        let t = (now.saturating_duration_since(epoch.start) + rtt).as_secs_f64();
        let target = (epoch.origin + C * (t - epoch.k).powi(3)).clamp(window, 1.5 * window);
        self.w_est += self.alpha * segments / window;
        self.window = (window + segments * (target - window) / window).max(self.w_est);
    }

    /// Grows the window by additional bytes.
    pub(super) fn grow(&mut self, bytes: f64, mtu: f64) {
        self.window += bytes / mtu;
        self.w_max = self.w_max.max(self.window);
    }

    /// A packet sent at this time was lost. Returns whether the window was reduced: losses of one round trip count
    /// once.
    pub(super) fn on_loss(&mut self, now: Instant, sent: Instant) -> bool {
        if self.reduced.is_some_and(|reduced| sent <= reduced) {
            return false;
        }
        self.reduced = Some(now);
        // Fast convergence: a flow whose window shrank since the last reduction leaves room for new flows (section
        // 4.7).
        self.w_max = if self.window < self.w_max {
            self.window * (1.0 + BETA) / 2.0
        } else {
            self.window
        };
        self.window = (self.window * BETA).max(LEAST);
        self.w_est = self.window;
        self.epoch = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn falls_by_three_tenths_once_a_round_trip_and_climbs_back() {
        let begin = Instant::now();
        let rtt = Duration::from_millis(100);
        let mut cubic = Cubic::new(100_000.0, 1000.0, 1.0);
        let lost = begin + rtt;
        assert!(cubic.on_loss(lost, begin));
        assert!(!cubic.on_loss(lost, begin + rtt / 2), "the same round trip");
        assert!((cubic.window(1000.0) - 70_000.0).abs() < 1.0);
        // K = cbrt(30 / 0.4) = 4.2 s after which it is where it was.
        let mut now = lost;
        let mut before = cubic.window(1000.0);
        for _ in 0..43 {
            now += rtt;
            cubic.on_ack(now, before, 1000.0, rtt);
            assert!(cubic.window(1000.0) >= before);
            before = cubic.window(1000.0);
        }
        assert!((95_000.0..125_000.0).contains(&before), "{before}");
        assert!(cubic.on_loss(now + rtt, now));
    }
}
