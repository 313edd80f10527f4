//! Tracks how far a member of rooms is behind: how many messages were sent to it, and how many its program has read.
//!
//! Pure state without I/O. Queues and windows hide how long a message stays unread, so the sender puts a numbered
//! `$mark` before some messages, and the peer's library reports when its program reaches it. A room's policy says how
//! many messages may be sent and unread; the number in transit on the path is added to that.

use std::time::Duration;

use tokio::time::Instant;

/// The counters of one member.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Messages of rooms sent so far; the number of the last.
    sent: u64,
    /// The last message before which a mark was sent.
    marked: u64,
    /// The last message that the program is known to have read.
    taken: u64,
    /// How many messages the program reads in one round trip; they may be in transit.
    travelling: u64,
    probe: Option<Probe>,
    /// When a probe was last answered, and how many messages had been read then.
    last: Option<(Instant, u64)>,
}

/// A mark whose round trip is measured.
#[derive(Debug)]
struct Probe {
    number: u64,
    at: Instant,
    /// Unread messages when the mark was sent, including the one that follows it.
    ahead: u64,
}

impl Pace {
    /// Whether one more message may be sent under a policy that permits `unread` unread messages.
    pub(crate) fn may_send(&self, unread: u64) -> bool {
        self.sent - self.taken < self.travelling.saturating_add(unread)
    }

    /// Records one more sent message. Returns the number of the mark to send before it, if one is due: marks are
    /// frequent enough that the sender receives an answer before it reaches the limit.
    pub(crate) fn send(&mut self, unread: u64) -> Option<u64> {
        self.sent += 1;
        (self.sent - self.marked >= (unread / 4).max(1)).then(|| self.mark())
    }

    /// The limit is reached. Returns the number of a mark to send now, unless a mark in transit will lift the limit.
    pub(crate) fn blocked(&mut self) -> Option<u64> {
        (self.marked <= self.taken && self.taken < self.sent).then(|| self.mark())
    }

    /// As [`blocked`](Self::blocked), after the connection was replaced: the peer's last `$passed` may be lost.
    pub(crate) fn renew(&mut self) -> Option<u64> {
        self.probe = None;
        (self.taken < self.sent).then(|| self.mark())
    }

    fn mark(&mut self) -> u64 {
        self.marked = self.sent;
        self.probe.get_or_insert_with(|| Probe {
            number: self.sent,
            at: Instant::now(),
            ahead: self.sent - self.taken,
        });
        self.sent
    }

    /// The program has reached this mark; `round_trip` is the round-trip time of the path.
    pub(crate) fn passed(&mut self, mark: u64, round_trip: Duration) {
        // A message that was never sent cannot have been read.
        if mark > self.marked {
            return;
        }
        self.taken = self.taken.max(mark);
        let Some(probe) = self.probe.take_if(|probe| probe.number <= mark) else {
            return;
        };
        let now = Instant::now();
        // Variations of a quarter are attributed to the path, not to the program.
        let round_trip = round_trip + round_trip / 4;
        let part = |time: Duration| round_trip.as_secs_f64() / time.as_secs_f64().max(1e-6);
        self.travelling = match self.last {
            // The messages that were in transit, without those that only waited; and not more than were read
            // recently, because an idle program takes the first message at once, even if it is slow.
            Some((then, taken)) => {
                let under_way = probe.ahead as f64 * part(now - probe.at).min(1.0);
                let of_late = (self.taken - taken) as f64 * part(now - then);
                under_way.min(of_late.round()) as u64
            }
            None => 0,
        };
        self.last = Some((now, self.taken));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND_TRIP: Duration = Duration::from_millis(100);

    #[test]
    fn a_mark_is_on_its_way_whenever_nothing_may_go() {
        // As many as two rooms with different policies send in turn.
        for unread in [1, 2, 3, 4, 5, 100, 1024] {
            let mut pace = Pace::default();
            let mut marks = Vec::new();
            for _ in 0..7 {
                marks.extend(pace.send(1024));
            }
            while pace.may_send(unread) {
                marks.extend(pace.send(unread));
            }
            marks.extend(pace.blocked());
            let last = *marks.last().expect("one that ends it");
            assert_eq!(pace.blocked(), None, "one is enough");
            pace.passed(last, ROUND_TRIP);
            assert!(pace.may_send(unread), "{unread}: {marks:?}");
        }
    }

    #[test]
    fn marks_are_rare_where_much_may_be_unread() {
        let mut pace = Pace::default();
        let marks = (0..1024).filter(|_| pace.send(1024).is_some()).count();
        assert_eq!(marks, 4);
        let mut pace = Pace::default();
        assert_eq!((pace.send(1), pace.send(1)), (Some(1), Some(2)));
    }

    #[test]
    fn what_was_not_sent_or_was_told_before_counts_for_nothing() {
        let mut pace = Pace::default();
        assert_eq!((pace.send(1), pace.send(1)), (Some(1), Some(2)));
        pace.passed(3, ROUND_TRIP);
        pace.passed(u64::MAX, ROUND_TRIP);
        assert!(!pace.may_send(1));
        pace.passed(2, ROUND_TRIP);
        assert!(pace.may_send(1));
        pace.passed(1, ROUND_TRIP);
        assert!(pace.may_send(1));
    }

    #[test]
    fn another_connection_is_asked_again() {
        let mut pace = Pace::default();
        assert_eq!(pace.renew(), None, "nothing is unread");
        pace.send(1);
        assert_eq!(pace.renew(), Some(1));
        pace.passed(1, ROUND_TRIP);
        assert_eq!(pace.renew(), None);
    }
}
