//! The rate of a job.

use std::time::{Duration, Instant};

use crate::base::phase::Phase;

/// A job whose bytes should move and do not for this long is reported as stalled.
pub(super) const STALL: Duration = Duration::from_secs(5);
/// The time over which the rate is averaged.
const OVER: Duration = Duration::from_secs(2);
/// The shortest interval between measurements.
const LOOK: Duration = Duration::from_millis(200);

/// The rate of bytes, smoothed over about two seconds, and the time since which none move.
#[derive(Debug)]
pub(super) struct Pace {
    looked: Instant,
    bytes: u64,
    /// Bytes per second; `None` before the first measurement.
    rate: Option<f64>,
    moved: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            looked: now,
            bytes: 0,
            rate: None,
            moved: now,
        }
    }

    /// Adds bytes that existed before the transfer; they do not count as moved.
    pub(super) fn skip(&mut self, bytes: u64, now: Instant) {
        self.bytes = self.bytes.max(bytes);
        self.moved = now;
    }

    /// There are so many bytes now.
    pub(super) fn look(&mut self, bytes: u64, now: Instant) {
        let since = now.saturating_duration_since(self.looked);
        if since < LOOK {
            return;
        }
        let new = bytes.saturating_sub(self.bytes);
        let measured = new as f64 / since.as_secs_f64();
        let share = 1.0 - (-since.as_secs_f64() / OVER.as_secs_f64()).exp();
        let rate = match self.rate {
            Some(rate) => rate + share * (measured - rate),
            None => measured,
        };
        if new > 0 {
            (self.bytes, self.moved) = (bytes, now);
        }
        let rests = now.saturating_duration_since(self.moved) >= OVER;
        self.rate = Some(if rests { 0.0 } else { rate });
        self.looked = now;
    }

    /// Bytes a second.
    pub(super) fn rate(&self) -> u64 {
        self.rate.map_or(0, |rate| rate as u64)
    }

    /// Whether bytes should move and have not for [`STALL`].
    pub(super) fn is_stalled(&self, phase: Phase, now: Instant) -> bool {
        phase.moves() && now.saturating_duration_since(self.moved) >= STALL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_follows_the_bytes_and_not_those_that_were_there() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::new(start);
        pace.skip(1 << 30, at(0));
        pace.look((1 << 30) + 500_000, at(500));
        assert_eq!(pace.rate(), 1_000_000);
        // Too soon to look again.
        pace.look((1 << 30) + 9_000_000, at(600));
        assert_eq!(pace.rate(), 1_000_000);
        for second in 1..=20 {
            pace.look(
                (1 << 30) + 500_000 + second * 2_000_000,
                at(500 + second * 1000),
            );
        }
        assert!((1_990_000..=2_000_000).contains(&pace.rate()), "{pace:?}");
        for second in 21..=22 {
            pace.look((1 << 30) + 40_500_000, at(500 + second * 1000));
        }
        assert_eq!(pace.rate(), 0);
    }

    #[test]
    fn what_should_move_and_does_not_is_stalled() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert!(!pace.is_stalled(Phase::Receiving, start + STALL / 2));
        assert!(pace.is_stalled(Phase::Receiving, start + STALL));
        assert!(pace.is_stalled(Phase::Sending, start + STALL));
        for phase in [
            Phase::Waiting,
            Phase::Checking,
            Phase::Syncing,
            Phase::Storing,
        ] {
            assert!(!pace.is_stalled(phase, start + 9 * STALL), "{phase:?}");
        }
        pace.look(1, start + STALL);
        assert!(!pace.is_stalled(Phase::Receiving, start + STALL));
    }
}
