//! Runs of zeros, in memory that nobody has to fill.

/// Zeros that one call takes.
pub(crate) const BLOCK: usize = 256 << 10;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// So many zeros, in pieces of at most [`BLOCK`].
pub(crate) fn blocks(len: u64) -> impl Iterator<Item = &'static [u8]> {
    let mut left = len;
    std::iter::from_fn(move || {
        let next = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
        left -= next as u64;
        ZEROS.get(..next).filter(|block| !block.is_empty())
    })
}

/// Whether these are zeros.
pub(crate) fn are(bytes: &[u8]) -> bool {
    bytes
        .chunks(BLOCK)
        .all(|block| ZEROS.get(..block.len()) == Some(block))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_makes_a_difference() {
        let mut bytes = vec![0; 2 * BLOCK + 1];
        assert!(are(&bytes) && are(&[]));
        bytes[2 * BLOCK] = 1;
        assert!(!are(&bytes));
    }

    #[test]
    fn a_run_has_just_its_length() {
        for len in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK] {
            let total: usize = blocks(len as u64).map(<[u8]>::len).sum();
            assert_eq!(total, len);
        }
        assert!(blocks(u64::MAX).next().is_some());
    }
}
