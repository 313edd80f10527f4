//! [`Pace`]: how often one address may begin a handshake that leads to no session.
//!
//! A handshake costs a server about a millisecond of one processor, whatever comes of it. One whose token is accepted is
//! forgiven, so clients that come back all at once, from behind one address, wait for nobody.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::base::lock;
use crate::base::pool::network;

/// An address may begin as many handshakes at once as it gains in this time.
const BURST: Duration = Duration::from_secs(8);
/// Addresses that are remembered, each for at most [`BURST`] and the time of those that wait. Handshakes of further
/// ones are not counted.
const SOURCES: usize = 65_536;

pub(super) struct Pace {
    /// The time in which an address gains one handshake.
    each: Duration,
    /// By address: when all its handshakes are forgotten.
    sources: Mutex<HashMap<IpAddr, Instant>>,
}

impl Pace {
    pub(super) fn new(per_second: u32) -> Self {
        Self {
            each: Duration::from_secs(1) / per_second.max(1),
            sources: Mutex::default(),
        }
    }

    /// Whether the next handshake of this address waits.
    pub(super) fn is_slow(&self, address: IpAddr, now: Instant) -> bool {
        let sources = lock(&self.sources);
        let until = sources.get(&network(address));
        until.is_some_and(|until| *until + self.each > now + BURST)
    }

    /// Counts a handshake of this address. Returns the time at which it may begin, if that is within `longest`; otherwise it
    /// is not counted.
    pub(super) fn turn(&self, address: IpAddr, now: Instant, longest: Duration) -> Option<Instant> {
        let mut sources = lock(&self.sources);
        if sources.len() >= SOURCES {
            sources.retain(|_, until| *until > now);
        }
        let address = network(address);
        let known = sources.get(&address).copied();
        if known.is_none() && sources.len() >= SOURCES {
            return Some(now);
        }
        let until = known.map_or(now, |until| until.max(now)) + self.each;
        let turn = until.checked_sub(BURST).map_or(now, |turn| turn.max(now));
        if turn > now + longest {
            return None;
        }
        sources.insert(address, until);
        Some(turn)
    }

    /// Takes back one [`turn`](Self::turn) of this address: its handshake led to a session.
    pub(super) fn forgive(&self, address: IpAddr, now: Instant) {
        let mut sources = lock(&self.sources);
        let address = network(address);
        if let Some(until) = sources.get_mut(&address) {
            match until.checked_sub(self.each) {
                Some(less) if less > now => *until = less,
                _ => drop(sources.remove(&address)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(10);

    fn address(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_waits_for_its_turn_after_a_burst_and_others_do_not() {
        let (pace, now) = (Pace::new(4), Instant::now());
        let each = Duration::from_millis(250);
        for _ in 0..32 {
            assert!(!pace.is_slow(address(1), now));
            assert_eq!(pace.turn(address(1), now, LONGEST), Some(now));
        }
        assert!(pace.is_slow(address(1), now));
        for n in 1..=40 {
            let turn = pace.turn(address(1), now, LONGEST);
            assert_eq!(turn, Some(now + each * n));
        }
        assert_eq!(
            pace.turn(address(1), now, LONGEST),
            None,
            "its client is gone by then"
        );
        assert_eq!(pace.turn(address(2), now, LONGEST), Some(now));
        let later = now + LONGEST + each;
        assert!(!pace.is_slow(address(1), later));
        assert_eq!(pace.turn(address(1), later, LONGEST), Some(later));
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_that_lead_to_sessions_are_forgiven() {
        let (pace, now) = (Pace::new(1), Instant::now());
        for _ in 0..1000 {
            for _ in 0..8 {
                assert_eq!(pace.turn(address(1), now, LONGEST), Some(now));
            }
            assert!(pace.is_slow(address(1), now));
            for _ in 0..8 {
                pace.forgive(address(1), now);
            }
        }
        assert!(lock(&pace.sources).is_empty());
        pace.forgive(address(1), now);
        assert_eq!(pace.turn(address(1), now, LONGEST), Some(now));
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_of_addresses_is_bounded() {
        let (pace, now) = (Pace::new(1), Instant::now());
        for n in 0..70_000 {
            assert_eq!(pace.turn(address(n), now, LONGEST), Some(now));
        }
        assert_eq!(lock(&pace.sources).len(), SOURCES);
    }
}
