//! A token bucket: limits how often something may happen.

use tokio::time::Instant;

/// Permits `per_second` events each second, with a burst of twice that number.
pub(crate) struct Rate {
    per_second: f64,
    left: f64,
    at: Instant,
    granted: u32,
}

impl Rate {
    pub(crate) fn new(per_second: u32) -> Self {
        let per_second = f64::from(per_second.max(1));
        Self {
            per_second,
            left: per_second * 2.0,
            at: Instant::now(),
            granted: 0,
        }
    }

    /// Permits `more` events beyond the rate.
    pub(crate) fn grant(&mut self, more: u32) {
        self.granted = more;
    }

    pub(crate) fn take(&mut self) -> bool {
        if self.granted > 0 {
            self.granted -= 1;
            return true;
        }
        let now = Instant::now();
        let gained = (now - self.at).as_secs_f64() * self.per_second;
        self.left = (self.left + gained).min(self.per_second * 2.0);
        self.at = now;
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}
