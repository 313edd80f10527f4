//! How far behind a member of rooms is: what it was sent of their messages, and what its program has taken.
//!
//! Pure bookkeeping. A queue and a window hide for how long a message lies unread, so the sender puts a `$mark` with a
//! number before a message now and then, and the peer's library tells when its program has come there. A room's policy
//! says how many messages may be on their way unread; as many more may be as the path itself holds.

use std::time::Duration;

use tokio::time::Instant;

/// One member's account.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Messages of rooms sent so far; the number of the last.
    sent: u64,
    /// The last one that a mark was sent for.
    marked: u64,
    /// The last one that the program is known to have taken.
    taken: u64,
    /// As many as a round trip accounts for, at the speed at which the program takes them.
    travelling: u64,
    probe: Option<Probe>,
    /// When a probe last came through, and what had been taken then.
    last: Option<(Instant, u64)>,
}

/// A mark whose time is measured.
#[derive(Debug)]
struct Probe {
    number: u64,
    at: Instant,
    /// Messages on their way when it was sent, the one behind it included.
    ahead: u64,
}

impl Pace {
    /// Whether one more message may go, where the policy lets so many be unread.
    pub(crate) fn may_send(&self, unread: u64) -> bool {
        self.sent - self.taken < self.travelling.saturating_add(unread)
    }

    /// One more message goes. Gives the number of the mark that must go before it, if one must: often enough that the
    /// sender hears of it before it may send no more.
    pub(crate) fn send(&mut self, unread: u64) -> Option<u64> {
        self.sent += 1;
        (self.sent - self.marked >= (unread / 4).max(1)).then(|| self.mark())
    }

    /// Nothing may go at present. Gives the number of a mark that must go now, if none is on its way that would end it.
    pub(crate) fn blocked(&mut self) -> Option<u64> {
        (self.marked <= self.taken && self.taken < self.sent).then(|| self.mark())
    }

    /// The connection was replaced: the peer's last `$passed` may be lost. As [`blocked`](Self::blocked).
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

    /// The program has come to this mark; `round_trip` is the time that the path alone takes there and back.
    pub(crate) fn passed(&mut self, mark: u64, round_trip: Duration) {
        // What was never sent cannot have been taken.
        if mark > self.marked {
            return;
        }
        self.taken = self.taken.max(mark);
        let Some(probe) = self.probe.take_if(|probe| probe.number <= mark) else {
            return;
        };
        let now = Instant::now();
        // A path that wavers by a fourth is no slow program.
        let round_trip = round_trip + round_trip / 4;
        let part = |time: Duration| round_trip.as_secs_f64() / time.as_secs_f64().max(1e-6);
        self.travelling = match self.last {
            // Of what was under way, without what merely lay there; and not more than was taken of late, for a program
            // that waits takes the first message at once, however slow it is with it.
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
