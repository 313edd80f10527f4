//! How often one address may ask.

use std::collections::HashMap;

use tokio::time::Instant;
use udpack::Tenant;

/// So many requests at once, and so many a second after them.
const BURST: f64 = 100.0;
const PER_SECOND: f64 = 20.0;
/// Addresses that are remembered; all others share one count.
const ADDRESSES: usize = 4096;

/// Counts for each address, and forgets those that have been quiet for so long that it makes no difference.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    by_address: HashMap<Tenant, Count>,
    others: Option<Count>,
}

#[derive(Debug, Clone, Copy)]
struct Count {
    left: f64,
    at: Instant,
}

impl Rates {
    /// Whether this address may ask once more now.
    pub(crate) fn take(&mut self, who: &Tenant) -> bool {
        let now = Instant::now();
        if !self.by_address.contains_key(who) && self.by_address.len() >= ADDRESSES {
            self.by_address.retain(|_, count| !count.is_full(now));
        }
        let full = self.by_address.len() >= ADDRESSES;
        let count = match self.by_address.get_mut(who) {
            Some(count) => count,
            None if full => self.others.get_or_insert_with(|| Count::new(now)),
            None => self
                .by_address
                .entry(who.clone())
                .or_insert_with(|| Count::new(now)),
        };
        count.take(now)
    }
}

impl Count {
    fn new(at: Instant) -> Self {
        Self { left: BURST, at }
    }

    fn now(&self, now: Instant) -> f64 {
        let gained = (now - self.at).as_secs_f64() * PER_SECOND;
        (self.left + gained).min(BURST)
    }

    fn is_full(&self, now: Instant) -> bool {
        self.now(now) >= BURST
    }

    fn take(&mut self, now: Instant) -> bool {
        (self.left, self.at) = (self.now(now), now);
        let may = self.left >= 1.0;
        if may {
            self.left -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;

    fn address(number: u32) -> Tenant {
        Tenant::address(Ipv4Addr::from_bits(0x0a00_0000 + number).into())
    }

    #[tokio::test(start_paused = true)]
    async fn one_address_is_stopped_others_are_not_and_it_may_come_again() {
        let mut rates = Rates::default();
        let taken = (0..150).filter(|_| rates.take(&address(1))).count();
        assert_eq!(taken, 100);
        assert!(rates.take(&address(2)));
        tokio::time::advance(Duration::from_millis(500)).await;
        let taken = (0..150).filter(|_| rates.take(&address(1))).count();
        assert_eq!(taken, 10);
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_addresses_are_remembered_and_quiet_ones_make_room() {
        let mut rates = Rates::default();
        for number in 0..5000 {
            rates.take(&address(number));
        }
        assert_eq!(rates.by_address.len(), ADDRESSES);
        // Those beyond have one count together.
        let taken = (5000..6000).filter(|number| rates.take(&address(*number)));
        assert!(taken.count() < 100);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(rates.take(&address(7000)));
        assert_eq!(rates.by_address.len(), 1);
    }
}
