//! Medians, ranks and ratios.

/// The value below which `share` (0 to 1) of the values lie, by nearest rank; of none: not a number.
pub(crate) fn rank(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (share * sorted.len() as f64).ceil() as usize;
    let at = place.clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// The middle value, or the mean of the two in the middle; of none: not a number.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle).copied();
    let lower = middle.checked_sub(1).and_then(|at| sorted.get(at)).copied();
    match (lower, upper) {
        (Some(lower), Some(upper)) if sorted.len().is_multiple_of(2) => f64::midpoint(lower, upper),
        (_, Some(upper)) => upper,
        (_, None) => f64::NAN,
    }
}

/// The median of what each round's value is to that of the same round in `base`.
pub(crate) fn ratio(values: &[f64], base: &[f64]) -> f64 {
    let pairs = values.iter().zip(base);
    median(&pairs.map(|(value, base)| value / base).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn ranks_are_values_that_occurred() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(rank(&hundred, 0.5), 50.0);
        assert_eq!(rank(&hundred, 0.99), 99.0);
        assert_eq!(rank(&hundred, 0.999), 100.0);
        assert_eq!(rank(&hundred, 0.0), 1.0);
        assert_eq!(rank(&[5.0], 0.99), 5.0);
        assert!(rank(&[], 0.5).is_nan());
    }

    #[test]
    fn ratios_compare_within_a_round() {
        // The machine was twice as fast in the second round, for both.
        assert_eq!(ratio(&[150.0, 300.0, 150.0], &[100.0, 200.0, 50.0]), 1.5);
        assert!(ratio(&[], &[]).is_nan());
    }
}
