//! Content-defined chunks of a file: where they end depends on their bytes alone, so that what is inserted or removed
//! moves the others and changes none of them.
//!
//! Both sides cut with FastCDC (`docs/PROTOCOL.md` §11). A list of chunks is a hint: what is put together by it is believed
//! only when the hash of the whole file is right.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use fastcdc::v2020::FastCDC;

/// The average sizes of chunks that may be asked for: powers of two from the first to the last.
const AVERAGES: (u64, u64) = (4 << 10, 4 << 20);
/// Chunks of one file that are looked at, at most.
pub(crate) const MOST: usize = 1 << 18;
/// Bytes of a chunk in a list: its length, and the beginning of its hash.
pub(crate) const ENTRY: usize = 4 + SUM;
const SUM: usize = 16;

/// How a file is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cutter {
    average: usize,
}

impl Cutter {
    /// With chunks of this size on average; `None` where that is none of the sizes.
    pub(crate) fn new(average: u64) -> Option<Self> {
        let sound = average.is_power_of_two() && (AVERAGES.0..=AVERAGES.1).contains(&average);
        let average = usize::try_from(average).ok()?;
        sound.then_some(Self { average })
    }

    /// As fits a file of this size: some ten thousand chunks, and no list longer than one in some hundred bytes.
    pub(crate) fn fit(size: u64) -> Self {
        let average = (size >> 17).next_power_of_two();
        let average = average.clamp(8 << 10, AVERAGES.1);
        Self {
            average: usize::try_from(average).unwrap_or(8 << 10),
        }
    }

    pub(crate) fn average(self) -> u64 {
        self.average as u64
    }

    /// The longest chunk.
    pub(crate) fn longest(self) -> usize {
        self.average * 4
    }

    /// The shortest chunk, but for the last one of a file.
    pub(crate) fn shortest(self) -> usize {
        self.average / 4
    }

    /// The length of the first chunk of these bytes, which are at least [`longest`](Self::longest) or end with the file.
    fn cut(self, bytes: &[u8]) -> usize {
        let cdc = FastCDC::new(bytes, self.shortest(), self.average, self.longest());
        let (_, end) = cdc.cut(0, bytes.len());
        end.clamp(bytes.len().min(1), bytes.len())
    }
}

/// Cuts what it is given, piece by piece, into chunks.
#[derive(Debug)]
pub(crate) struct Cutting {
    cutter: Cutter,
    bytes: Vec<u8>,
    /// Where the next chunk begins in them, and where what was given ends.
    start: usize,
    filled: usize,
    ended: bool,
}

impl Cutting {
    pub(crate) fn new(cutter: Cutter) -> Self {
        Self {
            cutter,
            bytes: Vec::new(),
            start: 0,
            filled: 0,
            ended: false,
        }
    }

    /// Whether more has to come before the next chunk is known.
    pub(crate) fn needs(&self) -> bool {
        !self.ended && self.filled - self.start < self.cutter.longest()
    }

    /// Room for the next bytes. Of these, [`add`](Self::add) tells how many there are.
    pub(crate) fn room(&mut self, len: usize) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.filled, 0);
        self.filled -= self.start;
        self.start = 0;
        let end = self.filled + len;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes.get_mut(self.filled..end).unwrap_or_default()
    }

    /// So many bytes are in the room.
    pub(crate) fn add(&mut self, len: usize) {
        self.filled = (self.filled + len).min(self.bytes.len());
    }

    /// Nothing more comes.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }

    /// What was given and belongs to no chunk yet.
    pub(crate) fn rest(&self) -> &[u8] {
        self.bytes.get(self.start..self.filled).unwrap_or_default()
    }

    /// The next chunk; `None` where more has to come, or all is cut.
    pub(crate) fn next(&mut self) -> Option<&[u8]> {
        if self.needs() || self.rest().is_empty() {
            return None;
        }
        let len = self.cutter.cut(self.rest());
        Some(self.take(len))
    }

    /// The next chunk, whose length is known.
    pub(crate) fn take(&mut self, len: usize) -> &[u8] {
        let from = self.start;
        self.start = (from + len).min(self.filled);
        self.bytes.get(from..self.start).unwrap_or_default()
    }
}

fn sum(chunk: &[u8]) -> [u8; SUM] {
    let hash = blake3::hash(chunk);
    let mut sum = [0; SUM];
    for (to, from) in sum.iter_mut().zip(hash.as_bytes()) {
        *to = *from;
    }
    sum
}

/// Adds a chunk to a list.
pub(crate) fn write(list: &mut Vec<u8>, chunk: &[u8]) {
    let len = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
    list.extend_from_slice(&len.to_be_bytes());
    list.extend_from_slice(&sum(chunk));
}

/// The chunks of a file at the other side, as it says.
#[derive(Debug)]
pub(crate) struct Sums {
    cutter: Cutter,
    /// In the order of their places, which do not overlap.
    chunks: Vec<Chunk>,
    /// The index of the first chunk with this hash.
    first: HashMap<[u8; SUM], usize>,
    /// Where those are again that are there several times.
    repeated: HashMap<[u8; SUM], Vec<u64>>,
    /// Where the list so far ends.
    end: u64,
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    at: u64,
    len: usize,
    sum: [u8; SUM],
}

/// A chunk that was found: its offset at the other side, and the number of the one behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) from: u64,
    next: usize,
}

impl Sums {
    pub(crate) fn new(cutter: Cutter) -> Self {
        Self {
            cutter,
            chunks: Vec::new(),
            first: HashMap::new(),
            repeated: HashMap::new(),
            end: 0,
        }
    }

    pub(crate) fn cutter(&self) -> Cutter {
        self.cutter
    }

    /// Where the list so far ends.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Whether no more chunks are taken.
    pub(crate) fn is_full(&self) -> bool {
        self.chunks.len() >= MOST
    }

    /// Takes a page of the list, which begins at the offset `from`; returns where it ends, or why it is none. Chunks that
    /// begin before the end of the page before are passed over.
    pub(crate) fn read(&mut self, from: u64, page: &[u8]) -> Result<u64, &'static str> {
        if !page.len().is_multiple_of(ENTRY) {
            return Err("a list of chunks ends within one");
        }
        let mut at = from;
        for entry in page.chunks_exact(ENTRY) {
            let (len, sum) = entry.split_at(4);
            let len = u32::from_be_bytes(len.try_into().unwrap_or_default());
            let bytes = len as usize;
            if len == 0 || bytes > self.cutter.longest() {
                return Err("a chunk is longer than was asked for, or empty");
            }
            let end = at.checked_add(len.into());
            let end = end.ok_or("a list of chunks is longer than any file")?;
            if at >= self.end {
                if self.is_full() {
                    return Err("a list of chunks is too long");
                }
                self.note(Chunk {
                    at,
                    len: bytes,
                    sum: sum.try_into().unwrap_or_default(),
                });
                self.end = end;
            }
            at = end;
        }
        Ok(at)
    }

    fn note(&mut self, chunk: Chunk) {
        let index = self.chunks.len();
        match self.first.entry(chunk.sum) {
            Entry::Vacant(place) => {
                place.insert(index);
            }
            Entry::Occupied(first) => {
                let first = self.chunks.get(*first.get());
                if first.is_some_and(|first| first.len == chunk.len) {
                    self.repeated.entry(chunk.sum).or_default().push(chunk.at);
                }
            }
        }
        self.chunks.push(chunk);
    }

    /// Where the other side has these bytes.
    pub(crate) fn find(&self, chunk: &[u8]) -> Option<Place> {
        let index = *self.first.get(&sum(chunk))?;
        let found = self.chunks.get(index)?;
        (found.len == chunk.len()).then_some(Place {
            from: found.at,
            next: index + 1,
        })
    }

    /// Whether these bytes begin with the chunk behind this one; if so, its place and length. It is the next one that cutting
    /// would find, and finding out takes less.
    pub(crate) fn goes_on(&self, place: Place, bytes: &[u8]) -> Option<(Place, usize)> {
        let next = self.chunks.get(place.next)?;
        let chunk = bytes.get(..next.len)?;
        let place = Place {
            from: next.at,
            next: place.next + 1,
        };
        (sum(chunk) == next.sum).then_some((place, next.len))
    }

    /// All places where the other side has these bytes, told once.
    pub(crate) fn take(&mut self, chunk: &[u8]) -> Vec<u64> {
        let sum = sum(chunk);
        let first = self.first.get(&sum).and_then(|at| self.chunks.get(*at));
        match first.copied() {
            Some(first) if first.len == chunk.len() => {
                let mut all = self.repeated.remove(&sum).unwrap_or_default();
                all.push(first.at);
                self.first.remove(&sum);
                all
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(len: usize, seed: u8) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new()
            .update(&[seed])
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    /// The chunks, given in pieces of this size.
    fn chunks(bytes: &[u8], cutter: Cutter, piece: usize) -> Vec<Vec<u8>> {
        let mut cutting = Cutting::new(cutter);
        let mut pieces = bytes.chunks(piece);
        let mut all = Vec::new();
        loop {
            while cutting.needs() {
                match pieces.next() {
                    Some(piece) => {
                        cutting.room(piece.len()).copy_from_slice(piece);
                        cutting.add(piece.len());
                    }
                    None => cutting.end(),
                }
            }
            match cutting.next() {
                Some(chunk) => all.push(chunk.to_vec()),
                None => return all,
            }
        }
    }

    #[test]
    fn the_same_bytes_give_the_same_chunks_however_they_come() {
        let cutter = Cutter::fit(1);
        let bytes = random(1_000_000, 1);
        let whole = chunks(&bytes, cutter, 1_000_000);
        assert_eq!(whole.concat(), bytes);
        assert!(whole.len() > 50, "{} chunks", whole.len());
        assert!(whole.iter().all(|chunk| chunk.len() <= cutter.longest()));
        for piece in [1_000, 65_536, 100_001] {
            assert_eq!(chunks(&bytes, cutter, piece), whole, "{piece}");
        }
        // And so does cutting that begins where a chunk begins.
        let skip: usize = whole.iter().take(7).map(Vec::len).sum();
        assert_eq!(chunks(&bytes[skip..], cutter, 65_536), whole[7..]);
        assert!(chunks(&[], cutter, 1).is_empty());
    }

    #[test]
    fn an_insertion_changes_the_chunks_around_it_alone() {
        let cutter = Cutter::fit(1);
        let old = random(1_000_000, 1);
        let mut list = Vec::new();
        for chunk in chunks(&old, cutter, 1 << 20) {
            write(&mut list, &chunk);
        }
        let mut sums = Sums::new(cutter);
        assert_eq!(sums.read(0, &list), Ok(1_000_000));
        assert_eq!(sums.end(), 1_000_000);
        let new = [&old[..500_000], b"in between", &old[500_000..]].concat();
        let (mut found, mut fresh) = (0, 0);
        for chunk in chunks(&new, cutter, 1 << 20) {
            match sums.find(&chunk) {
                Some(Place { from, .. }) => {
                    let from = usize::try_from(from).expect("small");
                    assert_eq!(old[from..from + chunk.len()], chunk[..]);
                    found += chunk.len();
                }
                None => fresh += chunk.len(),
            }
        }
        assert!(found > 900_000 && fresh < 80_000, "{found} {fresh}");
    }

    #[test]
    fn each_place_of_a_chunk_is_told_once() {
        let mut list = Vec::new();
        for chunk in [&b"one"[..], b"two", b"one", b"three", b"one"] {
            write(&mut list, chunk);
        }
        let mut sums = Sums::new(Cutter::fit(1));
        sums.read(0, &list).expect("a list");
        let mut all = sums.take(b"one");
        all.sort_unstable();
        assert_eq!(all, [0, 6, 14]);
        assert_eq!(sums.take(b"two"), [3]);
        for told in [&b"one"[..], b"two", b"four"] {
            assert!(sums.take(told).is_empty());
        }
        assert_eq!(sums.find(b"three").map(|place| place.from), Some(9));
    }

    #[test]
    fn pages_that_overlap_make_the_list_that_one_page_would_be() {
        let cutter = Cutter::fit(1);
        let bytes = random(1_000_000, 2);
        let list = |from: usize, to: usize| {
            let (mut list, mut end) = (Vec::new(), from);
            for chunk in chunks(&bytes[from..], cutter, 1 << 20) {
                if end >= to {
                    break;
                }
                end += chunk.len();
                write(&mut list, &chunk);
            }
            (list, end as u64)
        };
        let (whole, end) = list(0, bytes.len());
        let mut one = Sums::new(cutter);
        assert_eq!(one.read(0, &whole), Ok(end));
        let mut two = Sums::new(cutter);
        let ((first, first_end), (second, _)) = (list(0, 700_000), list(500_000, bytes.len()));
        assert_eq!(two.read(0, &first), Ok(first_end));
        assert_eq!(two.read(500_000, &second), Ok(1_000_000));
        let places = |sums: &Sums| -> Vec<_> {
            let chunks = sums.chunks.iter();
            chunks.map(|chunk| (chunk.at, chunk.len)).collect()
        };
        assert_eq!(places(&one), places(&two));
    }

    #[test]
    fn the_chunk_behind_one_that_was_found_is_known_by_its_hash_alone() {
        let cutter = Cutter::fit(1);
        let bytes = random(200_000, 3);
        let all = chunks(&bytes, cutter, 1 << 20);
        let mut list = Vec::new();
        for chunk in &all {
            write(&mut list, chunk);
        }
        let mut sums = Sums::new(cutter);
        sums.read(0, &list).expect("a list");
        let mut place = sums.find(&all[0]).expect("the first");
        let mut at = all[0].len();
        for chunk in &all[1..] {
            let (next, len) = sums.goes_on(place, &bytes[at..]).expect("the next");
            assert_eq!((next.from, len), (at as u64, chunk.len()));
            (place, at) = (next, at + len);
        }
        assert_eq!(sums.goes_on(place, &bytes), None, "there is no other");
        let first = sums.find(&all[0]).expect("the first");
        assert_eq!(sums.goes_on(first, &bytes), None, "other bytes");
        assert_eq!(sums.goes_on(first, &all[1][1..]), None, "too few");
    }

    #[test]
    fn a_list_that_cannot_be_one_is_refused() {
        let cutter = Cutter::fit(1);
        let entry = |len: u32| [&len.to_be_bytes()[..], &[7; 16]].concat();
        let read = |list: &[u8]| Sums::new(cutter).read(0, list);
        read(&entry(1)).expect("a chunk");
        read(&[]).expect("no chunk");
        read(&entry(1)[..19]).expect_err("cut off");
        read(&entry(0)).expect_err("empty");
        read(&entry(u32::MAX)).expect_err("longer than asked for");
        read(&entry(1).repeat(MOST + 1)).expect_err("too many");
        let beyond = Sums::new(cutter).read(u64::MAX, &entry(1));
        beyond.expect_err("longer than any file");
    }

    #[test]
    fn sizes_of_chunks_are_few() {
        for wrong in [0, 1, 4095, 4097, 6 << 10, 8 << 20, u64::MAX] {
            assert_eq!(Cutter::new(wrong), None, "{wrong}");
        }
        for size in [0, 1 << 20, 1 << 30, 1 << 40, u64::MAX] {
            let cutter = Cutter::fit(size);
            assert_eq!(Cutter::new(cutter.average()), Some(cutter), "{size}");
        }
        assert_eq!(Cutter::fit(1 << 30).average(), 8 << 10);
        assert_eq!(Cutter::fit(1 << 31).average(), 16 << 10);
        assert_eq!(Cutter::fit(1 << 40).average(), 4 << 20);
    }
}
