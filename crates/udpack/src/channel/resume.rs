//! Resuming a channel on another connection: frames are kept until the peer has acknowledged them.
//!
//! Pure state without I/O. Each direction of a resumable channel counts its frames from 1, `$open` and `$resume` left
//! out; the end of the direction counts as one more. The receiver reports its count, and on a new stream the sender
//! repeats the frames beyond that count.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Buf, Bytes};

use crate::wire::frame::PREFIX;

/// Frames handed to a stream, from the first that the peer has not confirmed on.
#[derive(Debug, Default)]
pub(crate) struct Retained {
    chunks: VecDeque<Bytes>,
    /// Frames confirmed so far.
    confirmed: u64,
}

/// The peer says it has frames that were never sent, or fewer than it said before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mismatch;

impl Retained {
    /// Keeps bytes that are handed to the stream. Frames may begin and end anywhere in them.
    pub(crate) fn push(&mut self, bytes: Bytes) {
        self.chunks.push_back(bytes);
    }

    /// How many frames the peer has confirmed.
    pub(crate) fn confirmed(&self) -> u64 {
        self.confirmed
    }

    /// Discards the frames up to number `received` and returns how many bytes those were. A number below the last one
    /// is from a late message and has no effect.
    pub(crate) fn confirm(&mut self, received: u64) -> Result<usize, Mismatch> {
        let mut bytes = 0;
        while self.confirmed < received {
            bytes += self.forget_one()?;
            self.confirmed += 1;
        }
        Ok(bytes)
    }

    /// Takes the frames to repeat, in order.
    pub(crate) fn take(&mut self) -> VecDeque<Bytes> {
        std::mem::take(&mut self.chunks)
    }

    fn forget_one(&mut self) -> Result<usize, Mismatch> {
        let mut prefix = [0; PREFIX];
        let mut filled = 0;
        for byte in self.chunks.iter().flatten().take(PREFIX) {
            prefix[filled] = *byte;
            filled += 1;
        }
        let size = PREFIX + u32::from_be_bytes(prefix) as usize;
        if filled < PREFIX || !self.holds(size) {
            return Err(Mismatch);
        }
        let mut left = size;
        while let Some(front) = self.chunks.front_mut() {
            if front.len() > left {
                front.advance(left);
                break;
            }
            left -= front.len();
            self.chunks.pop_front();
            if left == 0 {
                break;
            }
        }
        Ok(size)
    }

    fn holds(&self, size: usize) -> bool {
        let mut left = size;
        for chunk in &self.chunks {
            if chunk.len() >= left {
                return true;
            }
            left -= chunk.len();
        }
        left == 0
    }
}

/// The numbers of the channels that the peer has opened so far. The `$open` of a channel that has ended here may come
/// again, because its opener may not know that everything was received; it must not be taken for a new channel.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// First and last of each run of numbers without a gap.
    runs: BTreeMap<u64, u64>,
}

impl Seen {
    /// The most runs that are kept. An opener increments its numbers by one, so a gap is a channel whose stream was
    /// lost.
    const RUNS: usize = 1024;

    pub(crate) fn insert(&mut self, id: u64) {
        if self.contains(id) {
            return;
        }
        let last = match id.checked_add(1).and_then(|next| self.runs.remove(&next)) {
            Some(last) => last,
            None => id,
        };
        match self.runs.range_mut(..id).next_back() {
            Some((_, before)) if before.checked_add(1) == Some(id) => *before = last,
            _ => {
                self.runs.insert(id, last);
            }
        }
        if self.runs.len() > Self::RUNS
            && let Some((first, _)) = self.runs.pop_first()
            && let Some((_, last)) = self.runs.pop_first()
        {
            self.runs.insert(first, last);
        }
    }

    pub(crate) fn contains(&self, id: u64) -> bool {
        let run = self.runs.range(..=id).next_back();
        run.is_some_and(|(_, last)| id <= *last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_seen_is_a_set(ids in proptest::collection::vec(0_u64..40, 0..60)) {
            let mut seen = Seen::default();
            for id in &ids {
                seen.insert(*id);
            }
            for id in 0..42 {
                prop_assert_eq!(seen.contains(id), ids.contains(&id));
            }
        }
    }

    #[test]
    fn what_was_seen_is_bounded() {
        let mut seen = Seen::default();
        for id in (0..10_000).step_by(2) {
            seen.insert(id);
        }
        seen.insert(u64::MAX);
        assert!(seen.runs.len() <= Seen::RUNS);
        assert!(seen.contains(u64::MAX) && seen.contains(9_998) && !seen.contains(9_999));
    }

    fn frame(number: usize, size: usize) -> Vec<u8> {
        let length = u32::try_from(size).unwrap();
        let mut frame = length.to_be_bytes().to_vec();
        frame.extend(std::iter::repeat_n(
            u8::try_from(number % 251).unwrap(),
            size,
        ));
        frame
    }

    proptest! {
        /// Against the plain idea of it: a list of frames, of which the first so many are dropped.
        #[test]
        fn what_is_repeated_is_exactly_what_was_not_confirmed(
            sizes in proptest::collection::vec(1_usize..300, 0..60),
            cuts in proptest::collection::vec(1_usize..400, 1..80),
            confirms in proptest::collection::vec(0_u64..70, 0..12),
        ) {
            let frames: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(i, size)| frame(i, *size)).collect();
            let mut stream = Bytes::from(frames.concat());
            let mut retained = Retained::default();
            for cut in cuts.iter().cycle() {
                if stream.is_empty() {
                    break;
                }
                retained.push(stream.split_to((*cut).min(stream.len())));
            }
            let mut confirmed = 0_u64;
            for received in confirms {
                let newly = received.saturating_sub(confirmed);
                let result = retained.confirm(received);
                if received > frames.len() as u64 {
                    prop_assert_eq!(result, Err(Mismatch));
                    return Ok(());
                }
                let from = usize::try_from(confirmed).unwrap();
                let until = from + usize::try_from(newly).unwrap();
                prop_assert_eq!(result, Ok(frames[from..until].iter().map(Vec::len).sum()));
                confirmed = confirmed.max(received);
                prop_assert_eq!(retained.confirmed(), confirmed);
            }
            let rest: Vec<u8> = retained.take().into_iter().flatten().collect();
            prop_assert_eq!(rest, frames[usize::try_from(confirmed).unwrap()..].concat());
        }
    }

    #[test]
    fn a_frame_that_was_only_begun_cannot_have_been_received() {
        let mut retained = Retained::default();
        retained.push(Bytes::from_static(&[0, 0, 0, 5, 1, 2]));
        assert_eq!(retained.confirm(1), Err(Mismatch));
        retained.push(Bytes::from_static(&[3, 4, 5]));
        assert_eq!(retained.confirm(1), Ok(9));
        assert_eq!(retained.confirm(2), Err(Mismatch));
    }
}
