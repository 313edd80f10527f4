//! BLAKE3 of a file from what is known of its parts.
//!
//! BLAKE3 is a binary tree. A part whose length is a power of two, at a multiple of it, is a subtree, and its chaining value
//! stands for its bytes. So a file's hash follows from 32 bytes of each part, which outlive a crash in the journal, while the
//! bytes themselves cannot be read back before the upload is complete.

use blake3::Hash;
use blake3::Hasher;
use blake3::hazmat::{
    HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};

/// Of these bytes alone, and their chaining value at this offset. The offset is a multiple of a power of two that is at least their
/// length.
pub(crate) fn of_part(offset: u64, bytes: &[u8]) -> (Hash, Hash) {
    let mut hasher = Hasher::new();
    hasher.set_input_offset(offset).update(bytes);
    (blake3::hash(bytes), hasher.finalize_non_root().into())
}

/// Of a file of at least two parts, from their chaining values. All but the last have `part` bytes; `size` is of all together.
pub(crate) fn of_file(nodes: &[Hash], part: u64, size: u64) -> Option<Hash> {
    let (left, right) = children(nodes, part, size)?;
    Some(merge_subtrees_root(&left, &right, Mode::Hash))
}

fn children(nodes: &[Hash], part: u64, size: u64) -> Option<([u8; 32], [u8; 32])> {
    let left = left_subtree_len(size);
    let count = usize::try_from(left.checked_div(part)?).ok()?;
    let (before, behind) = nodes.split_at_checked(count)?;
    Some((
        node(before, part, left)?,
        node(behind, part, size.checked_sub(left)?)?,
    ))
}

fn node(nodes: &[Hash], part: u64, size: u64) -> Option<[u8; 32]> {
    match nodes {
        [] => None,
        [one] => Some(*one.as_bytes()),
        _ => {
            let (left, right) = children(nodes, part, size)?;
            Some(merge_subtrees_non_root(&left, &right, Mode::Hash))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_a_file_follows_from_its_parts() {
        const PART: usize = 4096;
        let bytes: Vec<u8> = (0..20 * PART).map(|at| (at * 7 / 3) as u8).collect();
        let sizes =
            (2..20).flat_map(|parts| [1, 1024, 1025, 4095, 4096].map(|s| parts * PART - PART + s));
        for size in sizes.filter(|size| *size > PART) {
            let bytes = &bytes[..size];
            let nodes: Vec<Hash> = bytes
                .chunks(PART)
                .enumerate()
                .map(|(at, part)| of_part((at * PART) as u64, part).1)
                .collect();
            let hash = of_file(&nodes, PART as u64, size as u64);
            assert_eq!(hash, Some(blake3::hash(bytes)), "{size}");
        }
    }

    #[test]
    fn too_few_parts_have_no_hash() {
        let nodes = [blake3::hash(b"a"); 2];
        assert_eq!(of_file(&nodes, 1024, 5000), None);
        assert_eq!(of_file(&[], 1024, 5000), None);
    }
}
