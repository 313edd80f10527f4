//! Limits how many log lines a peer can cause each second, and counts those left out.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::base::lock;

/// Log lines that one source may cause in one second.
const LINES: u32 = 5;

/// A limiter for log lines.
#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl LogLimit {
    /// Returns the number of lines left out since the last one if a line may be written now, else `None`.
    pub(crate) fn line(&self) -> Option<u64> {
        self.line_at(Instant::now())
    }

    fn line_at(&self, now: Instant) -> Option<u64> {
        let mut state = lock(&self.state);
        if state
            .since
            .is_none_or(|since| now - since >= Duration::from_secs(1))
        {
            state.since = Some(now);
            state.lines = 0;
        }
        if state.lines >= LINES {
            state.left_out += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_a_few_lines_and_a_count() {
        let log_limit = LogLimit::default();
        let now = Instant::now();
        let written = (0..1000)
            .filter_map(|_| log_limit.line_at(now))
            .collect::<Vec<_>>();
        assert_eq!(written, vec![0; LINES as usize]);
        assert_eq!(
            log_limit.line_at(now + Duration::from_secs(1)),
            Some(1000 - u64::from(LINES))
        );
        assert_eq!(log_limit.line_at(now + Duration::from_secs(1)), Some(0));
    }
}
