//! The share of lost packets, and whether it differs significantly from a base.

/// The least number of packets for a significant share.
const FEWEST: f64 = 20.0;

/// Bytes that were acknowledged, and bytes that were lost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fate {
    pub(super) acked: f64,
    pub(super) lost: f64,
}

impl Fate {
    pub(super) fn all(&self) -> f64 {
        self.acked + self.lost
    }

    /// The share that was lost, 0 to 1.
    pub(super) fn loss(&self) -> f64 {
        self.lost / self.all().max(1.0)
    }

    pub(super) fn add(&mut self, other: Self) {
        self.acked += other.acked;
        self.lost += other.lost;
    }

    pub(super) fn halve(&mut self) {
        self.acked /= 2.0;
        self.lost /= 2.0;
    }

    /// Whether more than `base` and a `margin` was lost, and by more than two standard deviations.
    pub(super) fn is_above(&self, base: f64, margin: f64, mtu: f64) -> bool {
        self.packets(mtu) > FEWEST && self.loss() > base + margin + 2.0 * self.deviation(base, mtu)
    }

    /// Whether less than `base` was lost, by more than two standard deviations.
    pub(super) fn is_below(&self, base: f64, mtu: f64) -> bool {
        self.packets(mtu) > FEWEST && self.loss() < base - 2.0 * self.deviation(base, mtu)
    }

    fn packets(&self, mtu: f64) -> f64 {
        self.all() / mtu
    }

    /// The standard deviation of the lost share, if each packet is lost with the probability `base`.
    fn deviation(&self, base: f64, mtu: f64) -> f64 {
        let base = base.clamp(0.001, 0.999);
        (base * (1.0 - base) / self.packets(mtu).max(1.0)).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_not_taken_for_loss() {
        let fate = |acked: f64, lost: f64| Fate {
            acked: acked * 1000.0,
            lost: lost * 1000.0,
        };
        assert_eq!(Fate::default().loss(), 0.0);
        assert_eq!(fate(90.0, 10.0).loss(), 0.1);
        assert!(!fate(9.0, 9.0).is_above(0.0, 0.02, 1000.0), "too few");
        assert!(!fate(97.0, 3.0).is_above(0.01, 0.01, 1000.0), "by chance");
        assert!(fate(9700.0, 300.0).is_above(0.01, 0.01, 1000.0));
        assert!(fate(900.0, 1.0).is_below(0.05, 1000.0));
        assert!(!fate(20.0, 1.0).is_below(0.05, 1000.0));
        let mut sum = fate(10.0, 0.0);
        sum.add(fate(0.0, 10.0));
        sum.halve();
        assert_eq!((sum.all(), sum.loss()), (10_000.0, 0.5));
    }
}
