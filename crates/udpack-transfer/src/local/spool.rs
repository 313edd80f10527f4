//! [`Spool`]: what was read of a source that can be read only once, kept until the server has it on disk. So a lost
//! connection or a restarted server costs nothing: what is kept is sent again.
//!
//! Small spools are in memory; what is beyond that goes into a private file without a name, which is used in a circle.
//!
//! A reader may give the same bytes in each run of the program, as a file does that only grows: then what the server has of
//! an earlier run is compared with what is read, and kept until that is known.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::wire::Have;

/// Bytes that are kept in memory.
const MEMORY: u64 = 16 << 20;
/// How long a full spool waits for the server to put something on disk, before it lets go of the oldest bytes.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a chunk gathers what comes in small pieces.
const GATHER: Duration = Duration::from_millis(20);
/// How often a wait looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(200);
/// Bytes read at once where they are compared.
const COMPARED: usize = 1 << 18;
/// Names tried for the file.
const NAMES: u32 = 16;

/// A reader, and what was read of it and is not durable at the server. Blocks, but for [`durable`](Self::durable) and
/// [`is_spent`](Self::is_spent).
pub(crate) struct Spool {
    most: u64,
    /// The reader gives in each run what it gave in those before, and more.
    again: bool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// `None` while a thread reads, and at the end.
    intake: Option<Box<Intake>>,
    /// What is kept, from `base` to `end` without a gap.
    parts: VecDeque<Part>,
    base: u64,
    end: u64,
    /// Of what is kept, bytes in memory.
    memory: u64,
    file: Option<Arc<File>>,
    /// How the reader ended: the hash of it all.
    over: Option<Result<[u8; 32], io::Error>>,
    /// Something was let go that the server had not on disk.
    spent: bool,
}

/// What only the thread has that reads.
struct Intake {
    reader: Box<dyn Read + Send>,
    hasher: blake3::Hasher,
}

struct Part {
    offset: u64,
    len: u64,
    /// `None` for what is in the file, at `offset` modulo the size of the spool.
    bytes: Option<Bytes>,
}

/// What comes next.
#[derive(Debug)]
pub(crate) enum Next {
    Chunk(Bytes),
    End {
        size: u64,
        hash: [u8; 32],
    },
    /// Nobody wants more.
    Unwanted,
}

/// Whether the server has what the reader gives.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    Same,
    /// It has other bytes there, or the reader has not so many yet.
    Other,
    /// Nobody wants to know.
    Unwanted,
}

/// Where something is kept.
enum Stowed {
    Memory,
    File(Arc<File>),
}

/// What one look at the reader gave.
enum Look {
    Bytes(Bytes),
    /// Nothing for now.
    Nothing,
    End,
}

impl Spool {
    pub(crate) fn new(reader: Box<dyn Read + Send>, most: u64, again: bool) -> Self {
        Self {
            most: most.max(1),
            again,
            state: Mutex::new(State {
                intake: Some(Box::new(Intake {
                    reader,
                    hasher: blake3::Hasher::new(),
                })),
                parts: VecDeque::new(),
                base: 0,
                end: 0,
                memory: 0,
                file: None,
                over: None,
                spent: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Where sending begins when the server has these ranges.
    ///
    /// # Errors
    /// When bytes are gone at both sides.
    pub(crate) fn begin(&self, have: &Have) -> io::Result<u64> {
        let state = self.lock();
        let held = have
            .iter()
            .fold(0, |held, (off, len, _)| match *off <= held {
                true => held.max(off.saturating_add(*len)),
                false => held,
            });
        if state.base > held {
            let text = format!(
                "the server has lost {} bytes that it had on disk, and they cannot be read again",
                state.base - held
            );
            return Err(io::Error::other(text));
        }
        Ok(state.base)
    }

    /// Whether what the server has of an earlier run is worth asking for, and comparing.
    pub(crate) fn compares(&self) -> bool {
        self.again
    }

    /// Compares a range that the server has with what is read. It is kept: if it differs, it is sent.
    ///
    /// # Errors
    /// Those of the reader.
    pub(crate) fn compare(
        &self,
        (off, len, theirs): (u64, u64, [u8; 32]),
        unwanted: &dyn Fn() -> bool,
    ) -> io::Result<Compared> {
        let base = self.lock().base;
        // What is longer would push its own beginning out of the spool.
        let fits = |end: &u64| self.again && base <= off && *end - base <= self.most;
        let Some(end) = off.checked_add(len).filter(fits) else {
            return Ok(Compared::Other);
        };
        let mut hasher = blake3::Hasher::new();
        let mut at = off;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let part = || left.min(COMPARED);
            match self.look(at, &part, unwanted, false)? {
                Some(Next::Chunk(bytes)) => {
                    // What was read before may go on behind the range.
                    let bytes = bytes.get(..bytes.len().min(left)).unwrap_or_default();
                    hasher.update(bytes);
                    at += bytes.len() as u64;
                }
                Some(Next::Unwanted) => return Ok(Compared::Unwanted),
                Some(Next::End { .. }) | None => return Ok(Compared::Other),
            }
        }
        Ok(match *hasher.finalize().as_bytes() == theirs {
            true => Compared::Same,
            false => Compared::Other,
        })
    }

    /// Size and hash, once all of it was read.
    pub(crate) fn whole(&self) -> Option<(u64, [u8; 32])> {
        let state = self.lock();
        match &state.over {
            Some(Ok(hash)) => Some((state.end, *hash)),
            _ => None,
        }
    }

    /// Whether nothing was read yet.
    pub(crate) fn is_fresh(&self) -> bool {
        let state = self.lock();
        state.end == 0 && state.over.is_none()
    }

    /// Whether it can no longer be sent from its beginning.
    pub(crate) fn is_spent(&self) -> bool {
        self.lock().spent
    }

    /// The server has so many bytes on disk.
    pub(crate) fn durable(&self, safe: u64) {
        let mut state = self.lock();
        while let Some(part) = state.parts.front()
            && part.offset + part.len <= safe
        {
            state.forget();
        }
        self.changed.notify_all();
    }

    /// What is at this offset, `chunk` bytes at most; read now if it was not before. Waits for the reader.
    ///
    /// # Errors
    /// Those of the reader.
    pub(crate) fn next(
        &self,
        at: u64,
        chunk: &dyn Fn() -> usize,
        unwanted: &dyn Fn() -> bool,
    ) -> io::Result<Next> {
        let next = self.look(at, chunk, unwanted, true)?;
        Ok(next.unwrap_or(Next::Unwanted))
    }

    /// As [`next`](Self::next); `None` where the reader has nothing for now and this is not to wait.
    fn look(
        &self,
        at: u64,
        chunk: &dyn Fn() -> usize,
        unwanted: &dyn Fn() -> bool,
        wait: bool,
    ) -> io::Result<Option<Next>> {
        let mut state = self.lock();
        let mut full = None;
        loop {
            if at < state.base {
                return Err(io::Error::other("what was read of it is gone"));
            }
            if at < state.end {
                let (bytes, file) = state.find(at)?;
                drop(state);
                return match (bytes, file) {
                    (Some(bytes), _) => Ok(Some(Next::Chunk(bytes))),
                    (None, Some((file, len))) => {
                        self.load(&file, at, len.min(chunk() as u64)).map(Some)
                    }
                    (None, None) => Err(io::Error::other("what was read of it is gone")),
                };
            }
            match &state.over {
                Some(Ok(hash)) => {
                    let (size, hash) = (state.end, *hash);
                    return Ok(Some(Next::End { size, hash }));
                }
                Some(Err(error)) => return Err(io::Error::new(error.kind(), error.to_string())),
                None => {}
            }
            if unwanted() {
                return Ok(Some(Next::Unwanted));
            }
            if !state.spent && state.end - state.base >= self.most {
                let since = *full.get_or_insert_with(Instant::now);
                if since.elapsed() < PATIENCE {
                    state = self.wait(state);
                    continue;
                }
                tracing::debug!("the spool is full: a lost connection costs the file from now on");
                state.let_go();
            }
            // Another thread still waits for the reader, for a lane that is lost.
            let Some(mut intake) = state.intake.take() else {
                state = self.wait(state);
                continue;
            };
            drop(state);
            let read = intake.read(chunk());
            let stowed = match &read {
                Ok(Look::Bytes(bytes)) => Some(self.stow(bytes)),
                _ => None,
            };
            state = self.lock();
            match read {
                Ok(Look::Bytes(bytes)) => {
                    let offset = state.end;
                    state.keep(&bytes, stowed);
                    state.intake = Some(intake);
                    self.changed.notify_all();
                    if offset == at {
                        return Ok(Some(Next::Chunk(bytes)));
                    }
                }
                Ok(Look::Nothing) => {
                    state.intake = Some(intake);
                    if !wait {
                        return Ok(None);
                    }
                }
                Ok(Look::End) => {
                    state.over = Some(Ok(*intake.hasher.finalize().as_bytes()));
                    self.changed.notify_all();
                }
                Err(error) => {
                    // The first to hear of it hears it whole.
                    let told = io::Error::new(error.kind(), error.to_string());
                    state.over = Some(Err(told));
                    self.changed.notify_all();
                    return Err(error);
                }
            }
        }
    }

    /// Finds a place for what was read, which only the thread that reads does. The lock is not held while this writes.
    fn stow(&self, bytes: &Bytes) -> io::Result<Stowed> {
        let (offset, file) = {
            let state = self.lock();
            if state.spent || state.memory + bytes.len() as u64 <= MEMORY {
                return Ok(Stowed::Memory);
            }
            (state.end, state.file.clone())
        };
        let file = match file {
            Some(file) => file,
            None => Arc::new(unnamed()?),
        };
        let (place, room) = self.place(offset);
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let (first, rest) = bytes.split_at(bytes.len().min(room));
        file.write_all_at(first, place)?;
        file.write_all_at(rest, 0)?;
        Ok(Stowed::File(file))
    }

    /// The place of an offset in the file, and how many bytes follow there.
    fn place(&self, offset: u64) -> (u64, u64) {
        // A part may begin where the spool is full but for a byte.
        let circle = self.most + (1 << 20);
        (offset % circle, circle - offset % circle)
    }

    fn load(&self, file: &File, at: u64, len: u64) -> io::Result<Next> {
        let (place, room) = self.place(at);
        let mut bytes = vec![0; usize::try_from(len.min(room)).unwrap_or(0)];
        file.read_exact_at(&mut bytes, place)?;
        Ok(Next::Chunk(bytes.into()))
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, TICK);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes in memory, or a file and how many it has.
type Found = (Option<Bytes>, Option<(Arc<File>, u64)>);

impl State {
    /// What is kept from this offset on, of one part.
    fn find(&self, at: u64) -> io::Result<Found> {
        let index = self
            .parts
            .partition_point(|part| part.offset + part.len <= at);
        let Some(part) = self.parts.get(index) else {
            return Err(io::Error::other("what was read of it is gone"));
        };
        let into = at - part.offset;
        let bytes = part.bytes.as_ref().map(|bytes| {
            let from = usize::try_from(into).unwrap_or(usize::MAX).min(bytes.len());
            bytes.slice(from..)
        });
        let file = self.file.clone().map(|file| (file, part.len - into));
        Ok((bytes, file))
    }

    /// Adds what was read.
    fn keep(&mut self, bytes: &Bytes, stowed: Option<io::Result<Stowed>>) {
        let (offset, len) = (self.end, bytes.len() as u64);
        self.end += len;
        let bytes = match stowed {
            Some(Ok(Stowed::File(file))) => {
                self.file = Some(file);
                None
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "cannot write to the spool: a lost connection costs the file from now on");
                return self.let_go();
            }
            _ => Some(bytes.clone()),
        };
        if self.spent {
            self.base = self.end;
            return;
        }
        if bytes.is_some() {
            self.memory += len;
        }
        self.parts.push_back(Part { offset, len, bytes });
    }

    /// Drops the oldest part.
    fn forget(&mut self) {
        if let Some(part) = self.parts.pop_front() {
            self.base = part.offset + part.len;
            if part.bytes.is_some() {
                self.memory -= part.len;
            }
        }
    }

    /// Keeps nothing any more.
    fn let_go(&mut self) {
        self.spent = true;
        self.parts.clear();
        (self.memory, self.base, self.file) = (0, self.end, None);
    }
}

impl Intake {
    /// Reads a chunk, or what comes within a moment.
    fn read(&mut self, chunk: usize) -> io::Result<Look> {
        let mut buffer = vec![0; chunk.max(1)];
        let mut filled = 0;
        let mut since = None;
        while let Some(room) = buffer.get_mut(filled..)
            && !room.is_empty()
        {
            match self.reader.read(room) {
                Ok(0) if filled == 0 => return Ok(Look::End),
                Ok(0) => break,
                Ok(count) => {
                    filled += count;
                    if since.get_or_insert_with(Instant::now).elapsed() > GATHER {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && filled > 0 => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Look::Nothing);
                }
                Err(error) => return Err(error),
            }
        }
        buffer.truncate(filled);
        if filled < chunk / 2 {
            buffer.shrink_to_fit();
        }
        self.hasher.update(&buffer);
        Ok(Look::Bytes(buffer.into()))
    }
}

/// A file for this process alone, which is gone when it is closed.
fn unnamed() -> io::Result<File> {
    let dir = std::env::temp_dir();
    for number in 0..NAMES {
        let name = format!(".udpack-spool-{}-{number}", std::process::id());
        let path = dir.join(name);
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        match options.open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

impl fmt::Debug for Spool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spool").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives these bytes, at most so many at a time.
    struct Source(Bytes, usize);

    impl Read for Source {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len().min(self.1).min(self.0.len());
            buffer[..count].copy_from_slice(&self.0.split_to(count));
            Ok(count)
        }
    }

    fn take(spool: &Spool, at: u64) -> Option<Bytes> {
        match spool.next(at, &|| 1 << 18, &|| false).unwrap() {
            Next::Chunk(bytes) => Some(bytes),
            Next::End { .. } => None,
            Next::Unwanted => panic!("it is wanted"),
        }
    }

    #[test]
    fn what_is_not_durable_is_read_again_from_memory_and_from_the_file() {
        const SIZE: u64 = 90 << 20;
        let mut whole = vec![0; usize::try_from(SIZE).unwrap()];
        let hash = *blake3::hash(b"").as_bytes();
        for (number, block) in whole.chunks_mut(64).enumerate() {
            block[..8].copy_from_slice(&number.to_le_bytes());
        }
        let whole = Bytes::from(whole);
        let is_right = |at: u64, bytes: &[u8]| {
            let at = usize::try_from(at).unwrap();
            whole[at..at + bytes.len()] == *bytes
        };
        let spool = Spool::new(Box::new(Source(whole.clone(), 100_000)), 40 << 20, false);
        let mut at = 0;
        let mut round = 0;
        while let Some(bytes) = take(&spool, at) {
            assert!(is_right(at, &bytes), "at {at}");
            at += bytes.len() as u64;
            round += 1;
            if round % 40 != 0 {
                continue;
            }
            // The connection is lost; the server has all but 20 MiB, and one byte.
            let safe = at.saturating_sub((20 << 20) + 1);
            spool.durable(safe);
            let mut again = spool.begin(&vec![(0, safe, hash)]).unwrap();
            assert!(again <= safe && !spool.is_spent());
            while again < at {
                let bytes = take(&spool, again).unwrap();
                assert!(is_right(again, &bytes), "again at {again}");
                again += bytes.len() as u64;
            }
        }
        assert_eq!(at, SIZE);
        assert_eq!(
            spool.whole(),
            Some((SIZE, *blake3::hash(&whole).as_bytes()))
        );
        // A server that has less than it said cannot be helped, nor one whose ranges have a gap.
        spool.begin(&vec![(0, 1 << 20, hash)]).unwrap_err();
        let gap = vec![(0, 10, hash), (11, SIZE, hash)];
        spool.begin(&gap).unwrap_err();
    }

    #[test]
    fn an_error_of_the_reader_is_told_to_each_who_asks() {
        struct Broken(bool);
        impl Read for Broken {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                if std::mem::replace(&mut self.0, true) {
                    return Err(io::Error::other("broken"));
                }
                buffer[..3].copy_from_slice(b"abc");
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
        let spool = Spool::new(Box::new(Broken(false)), 1 << 20, false);
        for _ in 0..2 {
            let error = spool.next(0, &|| 10, &|| false).unwrap_err();
            assert_eq!(error.to_string(), "broken");
        }
        assert_eq!(spool.whole(), None);
    }

    /// Says that there is nothing for now where another reader would end.
    struct Growing(Source);

    impl Read for Growing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                count => Ok(count),
            }
        }
    }

    #[test]
    fn what_an_earlier_run_brought_is_compared_and_kept_where_it_differs() {
        let whole: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
        let whole = Bytes::from(whole);
        let hash = |from: usize, to: usize| *blake3::hash(&whole[from..to]).as_bytes();
        let of = |most: u64, again: bool| {
            let growing = Growing(Source(whole.clone(), 100_000));
            Spool::new(Box::new(growing), most, again)
        };
        let compare = |spool: &Spool, range| spool.compare(range, &|| false).unwrap();
        let spool = of(16 << 20, true);
        let (first, second) = ((0, 1_000_001, hash(0, 1_000_001)), 1_000_001);
        assert_eq!(compare(&spool, first), Compared::Same);
        spool.durable(1_000_001);
        let other = (second, 1_000_000, hash(0, 1_000_000));
        assert_eq!(compare(&spool, other), Compared::Other);
        // Nothing of what differs is lost.
        let mut at = spool.begin(&vec![first, other]).unwrap();
        assert!(at <= second, "{at}");
        while at < 3_000_000 {
            let bytes = take(&spool, at).unwrap();
            let from = usize::try_from(at).unwrap();
            assert!(bytes == whole[from..from + bytes.len()], "at {at}");
            at += bytes.len() as u64;
        }
        // The server has more than the file has so far: nobody waits for it to grow.
        let spool = of(16 << 20, true);
        let more = (0, 3_000_001, hash(0, 3_000_000));
        assert_eq!(compare(&spool, more), Compared::Other);
        assert_eq!(take(&spool, 0).unwrap()[..9], whole[..9]);
        // A range that does not fit into the spool, and a reader that is another one in each run.
        for spool in [of(1_000_000, true), of(16 << 20, false)] {
            assert_eq!(compare(&spool, first), Compared::Other);
            assert!(spool.is_fresh());
        }
        let spool = of(16 << 20, true);
        assert_eq!(spool.compare(first, &|| true).unwrap(), Compared::Unwanted);
    }
}
