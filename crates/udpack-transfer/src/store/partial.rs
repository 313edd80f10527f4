//! One upload: writes and hashes bytes into a staging file, which is then completed, kept for later, or removed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::Mode;

use super::attributes;
use super::disk::{self, FILE_MODE, PART};
use super::journal::{self, Head, Journal, Key, REWRITE_FROM, merged};
use super::publish::{Complete, Synced, Whole};
use super::{
    IfExists, Inner, Meta, NewFile, OtherTime, Reservation, Store, StoreError, SyncPolicy,
    XattrList, Xattrs,
};
use crate::base::path::RelPath;
use crate::base::zeros;

/// A running upload, in a staging file that no client can name.
///
/// Dropping it removes the staging file and gives its reservation back; a sound [resumable](Self::resumable) one is
/// kept instead, with its last bytes synced, and resumed by the next [`Store::begin`] of the same owner and path.
#[derive(Debug)]
pub struct Partial {
    pub(super) body: Arc<Body>,
    size: Option<u64>,
    if_exists: IfExists,
    /// Permission bits that the staging file has.
    mode: u32,
    dirs: Box<[u32]>,
    /// `None` only while it is being dropped.
    reservation: Option<Reservation>,
    hasher: Box<blake3::Hasher>,
    /// The hasher's state at the end of a range that [`have`](Self::have) read, so that the range is not read twice.
    pub(super) snapshot: Option<Box<blake3::Hasher>>,
    position: u64,
    /// The end of the staging file's content, in bytes.
    end: u64,
    ranges: Ranges,
    /// The start and the end of bytes written out of order; none of them is durable.
    early: Option<Box<(u64, u64)>>,
    pub(super) unsynced: Unsynced,
    broken: bool,
    /// Whether the received bytes do not match the announcement, so that the upload is not resumable.
    doomed: bool,
}

#[derive(Debug)]
struct Ranges {
    /// Durable ranges beyond the position, from the journal at the beginning of the upload.
    ahead: Vec<(u64, u64)>,
    /// The ranges that need not be sent, merged: reported durable ranges, and bytes written out of order.
    offered: Vec<(u64, u64)>,
}

/// Bytes written since the last checkpoint was begun, and when the first of them came.
#[derive(Debug, Default)]
pub(super) struct Unsynced {
    pub(super) bytes: u64,
    since: Option<Instant>,
}

impl Unsynced {
    fn add(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.since.get_or_insert_with(Instant::now);
    }
}

/// A durable range of an interrupted upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The offset in bytes from the start of the file.
    pub off: u64,
    /// Its length in bytes: at most 64 MiB, and more only of an upload that has more than 256 GiB already.
    pub len: u64,
    /// BLAKE3 of exactly these bytes, read back from the disk.
    pub hash: [u8; 32],
}

/// A checkpoint of an upload, to be run in parallel to its writes.
///
/// Dropping it without running it is not a failure: a later checkpoint covers the same bytes.
#[derive(Debug)]
#[must_use = "a checkpoint does nothing until it is run"]
pub struct Checkpoint {
    body: Arc<Body>,
}

impl Checkpoint {
    /// Syncs the bytes, then records them in the journal, then raises [`Partial::safe`]. A failure marks the upload
    /// as failed: its next call is an error.
    pub fn run(self) {
        let mut work = self.body.work();
        if !work.closed {
            let _ = self.body.make_durable(&mut work);
        }
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        self.body.running.store(false, Ordering::Release);
    }
}

/// State that an upload and its checkpoint share. The last one to be dropped decides about the files.
#[derive(Debug)]
pub(super) struct Body {
    inner: Arc<Inner>,
    path: RelPath,
    file: File,
    /// The first line of the journal; `None` if the upload never has one.
    head: Option<Head>,
    position: AtomicU64,
    safe: Arc<AtomicU64>,
    pub(super) failed: AtomicBool,
    running: AtomicBool,
    /// [`Disk::losses`](super::disk::Disk::losses) before the first byte was written.
    losses: u64,
    work: Mutex<Work>,
    last: Mutex<Last>,
}

/// State of checkpoints; its lock is held during one.
#[derive(Debug)]
struct Work {
    journal: Option<Journal>,
    /// The durable ranges from the journal at the beginning.
    initial: Vec<(u64, u64)>,
    /// Whether this upload has started or resumed the journal.
    begun: bool,
    /// Whether the upload is complete, so that the journal must not change.
    closed: bool,
}

/// The action of the last owner.
#[derive(Debug)]
pub(super) struct Last {
    pub(super) staged: Option<Staged>,
    reservation: Option<Reservation>,
    keep: bool,
}

/// The files of an upload in the store's own directory. Dropping it removes them.
#[derive(Debug)]
pub(super) struct Staged {
    inner: Arc<Inner>,
    pub(super) name: String,
    /// The key of a resumable upload; it excludes other uploads of the key in this process.
    key: Option<Key>,
    /// Whether a journal may exist.
    journalled: bool,
    /// Whether the staging file exists.
    present: bool,
}

impl Staged {
    /// Records that the file was published.
    pub(super) fn published(&mut self) {
        self.present = false;
    }

    pub(super) fn is_present(&self) -> bool {
        self.present
    }

    /// Keeps the files.
    pub(super) fn abandon(&mut self) {
        self.present = false;
        self.journalled = false;
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let disk = &self.inner.disk;
        let removed = match &self.key {
            Some(key) if self.present && self.journalled => disk.area().remove(key),
            Some(key) if self.journalled => disk.area().forget(key),
            _ if self.present => disk.unstage(&self.name),
            _ => Ok(()),
        };
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(name = self.name, %error, "staging file left to the next start");
        }
        if let Some(key) = &self.key {
            self.inner.state().live.remove(key);
        }
    }
}

/// The kept state of an upload at its beginning.
struct Found {
    file: File,
    staged: Staged,
    /// The length of the staging file.
    held: u64,
    journal: Option<Journal>,
    head: Option<Head>,
    ranges: Vec<(u64, u64)>,
}

impl Partial {
    /// Opens the staging file; a kept one if there is one.
    pub(super) fn begin(
        new: &NewFile<'_>,
        wanted: Option<u32>,
        key: Option<Key>,
        mut reservation: Reservation,
    ) -> Result<Self, StoreError> {
        let inner = reservation.inner.clone();
        let losses = inner.disk.losses();
        let kept = reservation.held;
        if let Err(error) = reservation.begin(new.path, new.size, kept) {
            if let Some(key) = &key {
                inner.abandon(key, kept, new);
            }
            return Err(error);
        }
        let failed = |action| {
            let inner = &inner;
            move |e| inner.disk.error(action, new.path, e)
        };
        let mut mode = FILE_MODE;
        let found = match (key, new.owner) {
            (Some(key), Some(owner)) => match Self::resume(&inner, new, owner, &key) {
                Ok(Some(found)) => found,
                other => {
                    inner.abandon(&key, kept, new);
                    other.map_err(failed("open a staging file"))?;
                    return Err(StoreError::Busy {
                        path: new.path.clone(),
                    });
                }
            },
            _ => {
                let (file, name, made) = inner
                    .disk
                    .stage(wanted)
                    .map_err(failed("create a staging file"))?;
                mode = made;
                Found {
                    file,
                    staged: Staged {
                        inner: inner.clone(),
                        name,
                        key: None,
                        journalled: false,
                        present: true,
                    },
                    held: 0,
                    journal: None,
                    head: None,
                    ranges: Vec::new(),
                }
            }
        };
        reservation.is_on_disk(found.held);
        let body = Body {
            path: new.path.clone(),
            file: found.file,
            head: found.head,
            position: AtomicU64::new(0),
            safe: Arc::default(),
            failed: AtomicBool::new(false),
            running: AtomicBool::new(false),
            losses,
            work: Mutex::new(Work {
                journal: found.journal,
                initial: found.ranges.clone(),
                begun: false,
                closed: false,
            }),
            last: Mutex::new(Last {
                staged: Some(found.staged),
                reservation: None,
                keep: false,
            }),
            inner,
        };
        Ok(Self {
            body: Arc::new(body),
            size: new.size,
            if_exists: new.if_exists,
            mode,
            dirs: new.dirs.into(),
            reservation: Some(reservation),
            hasher: Box::default(),
            snapshot: None,
            position: 0,
            end: found.held,
            ranges: Ranges {
                ahead: found.ranges,
                offered: Vec::new(),
            },
            early: None,
            unsynced: Unsynced::default(),
            broken: false,
            doomed: false,
        })
    }

    /// Resumes the kept upload, or starts a new one; `None` if another writer has it.
    fn resume(
        inner: &Arc<Inner>,
        new: &NewFile<'_>,
        owner: &str,
        key: &Key,
    ) -> io::Result<Option<Found>> {
        let disk = &inner.disk;
        let Some((file, mut held)) = disk.stage_keyed(key)? else {
            return Ok(None);
        };
        let mut head = Head {
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            size: new.size,
            owner: owner.to_owned(),
            path: new.path.as_str().to_owned(),
        };
        let mut journal = None;
        let mut ranges = Vec::new();
        if held > 0
            && let Some(log) = disk.journal(key, false)?
        {
            match journal::read(&log)? {
                Some(record)
                    if record.head.owner == head.owner && record.head.path == head.path =>
                {
                    head.created = record.head.created;
                    // Nothing is durable beyond the end of the file, whatever the journal says.
                    let cut = record.ranges.iter().map(|(s, e)| (*s, (*e).min(held)));
                    ranges = merged(cut.collect());
                    if !ranges.is_empty() {
                        journal = Some(Journal::resume(log, &record)?);
                    }
                }
                _ => tracing::warn!(path = %new.path, "unreadable journal, the upload starts anew"),
            }
        }
        if ranges.is_empty() {
            // A journal without its staging file is removed, too: it would list bytes that do not exist.
            disk.area().forget(key)?;
            if held > 0 {
                file.set_len(0)?;
                held = 0;
            }
        } else if inner.config.sync != SyncPolicy::Never
            && let Err(error) = file.sync_data()
        {
            // A process that died may have overwritten ranges that the journal lists as durable. A failure here is
            // never tried again.
            disk.area().remove(key)?;
            return Err(error);
        }
        let staged = Staged {
            inner: inner.clone(),
            name: format!("{}{PART}", key.as_str()),
            key: Some(key.clone()),
            journalled: journal.is_some(),
            present: true,
        };
        Ok(Some(Found {
            file,
            staged,
            held,
            journal,
            head: Some(head),
            ranges,
        }))
    }

    /// The name asked for.
    pub fn path(&self) -> &RelPath {
        &self.body.path
    }

    /// The store it is in.
    pub fn store(&self) -> Store {
        Store {
            inner: self.body.inner.clone(),
        }
    }

    /// Whether it can be resumed after it was dropped.
    pub fn resumable(&self) -> bool {
        self.body.head.is_some()
    }

    /// Bytes without a gap so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes from the beginning to [`position`](Self::position) that are on disk and in the journal; checkpoints
    /// update the value.
    pub fn safe(&self) -> Arc<AtomicU64> {
        self.body.safe.clone()
    }

    /// The durable ranges in order, each hashed from disk; empty when the upload is new. Calls `progress` with
    /// the bytes read so far.
    ///
    /// Takes as long as reading them does. Call it before the first [`write_at`](Self::write_at).
    pub fn have(&mut self, progress: &mut dyn FnMut(u64)) -> Result<Vec<Range>, StoreError> {
        self.check()?;
        self.pass();
        let mut known = vec![(0, self.body.safe.load(Ordering::Acquire))];
        known.extend(self.ranges.ahead.iter().copied());
        self.prove(merged(known), progress)
    }

    /// Reads these bytes back, and offers them.
    fn prove(
        &mut self,
        known: Vec<(u64, u64)>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<Range>, StoreError> {
        let limit = self.size.unwrap_or(u64::MAX);
        let mut have = Vec::new();
        let mut offered = Vec::new();
        let mut total = 0;
        let all: u64 = known.iter().map(|(start, end)| end - start).sum();
        let most = longest(all);
        // Goes on with the file's own hash as long as there is no gap.
        let mut whole = (self.position == 0).then(|| self.hasher.clone());
        for (start, end) in known {
            let (mut off, end) = (start, end.min(limit));
            while off < end {
                let len = (end - off).min(most);
                let mut part = blake3::Hasher::new();
                let mut hashers = vec![&mut part];
                if let Some(whole) = whole.as_deref_mut().filter(|whole| whole.count() == off) {
                    hashers.push(whole);
                }
                let read = read(&self.body.file, off, len, &mut hashers, &mut |read| {
                    progress(total + read);
                })
                .map_err(|e| self.fail("read a staging file", e))?;
                total += read;
                if read > 0 {
                    have.push(Range {
                        off,
                        len: read,
                        hash: part.finalize().into(),
                    });
                    offered.push((off, off + read));
                }
                if read < len {
                    break;
                }
                off += len;
            }
        }
        self.snapshot = whole.filter(|whole| whole.count() > 0);
        self.ranges.offered = merged(offered);
        Ok(have)
    }

    /// Writes `bytes` at `offset`, which is [`position`](Self::position), or further on if
    /// [`have`](Self::have) gave all that lies between. All of them are written or none of a valid upload:
    /// after an error of the disk only dropping is left.
    ///
    /// Refuses another offset before writing, and bytes beyond the declared size or, without one, beyond the limits
    /// of the store.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.check()?;
        if !self.may_skip_to(offset) {
            return Err(StoreError::BadOffset {
                expected: self.position,
            });
        }
        let len = bytes.len() as u64;
        let total = offset.saturating_add(len);
        self.make_room(total)?;
        self.skip_to(offset)?;
        if !self.holds(bytes)? {
            self.put(offset, bytes)?;
        }
        self.hasher.update(bytes);
        self.position = total;
        self.body.position.store(total, Ordering::Release);
        if self.resumable() && len > 0 {
            self.unsynced.add(len);
        }
        Ok(())
    }

    /// As [`write_at`](Self::write_at) with `len` zeros, which take no room on disk where the file system can do so: what
    /// an earlier attempt left there is given back, and behind its end nothing is written.
    pub fn hole_at(&mut self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.check()?;
        if !self.may_skip_to(offset) {
            return Err(StoreError::BadOffset {
                expected: self.position,
            });
        }
        let total = offset.saturating_add(len);
        self.make_room(total)?;
        self.skip_to(offset)?;
        self.clear(offset, total)
            .map_err(|e| self.fail("make a hole", e))?;
        for zeros in zeros::blocks(len) {
            self.hasher.update(zeros);
        }
        self.position = total;
        self.body.position.store(total, Ordering::Release);
        if self.resumable() && len > 0 {
            self.unsynced.add(len);
        }
        Ok(())
    }

    /// Makes a hole of what is between. A checkpoint that comes later syncs the length, too, before the journal lists it.
    fn clear(&mut self, offset: u64, total: u64) -> io::Result<()> {
        let file = &self.body.file;
        // The snapshot may include what was there.
        self.snapshot = None;
        let held = self.end.min(total);
        if offset < held && !disk::punch(file, offset, held - offset)? {
            let mut at = offset;
            for zeros in zeros::blocks(held - offset) {
                file.write_all_at(zeros, at)?;
                at += zeros.len() as u64;
            }
        }
        if total > self.end {
            file.set_len(total)?;
            if let Some(reservation) = &mut self.reservation {
                // Nothing more will be written for these.
                reservation.wrote(total - self.end);
            }
            self.end = total;
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`, which is not before [`position`](Self::position), in any order. Bytes that come
    /// out of order are read back when the bytes before them have come, and are not durable before that.
    pub(crate) fn write_any(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        if offset < self.position || self.may_skip_to(offset) {
            return self.write_at(offset, bytes);
        }
        self.check()?;
        let end = offset.saturating_add(bytes.len() as u64);
        self.make_room(end)?;
        self.put(offset, bytes)?;
        let early = self.early.get_or_insert_with(|| Box::new((offset, end)));
        **early = (early.0.min(offset), early.1.max(end));
        self.ranges.offered.push((offset, end));
        self.ranges.offered = merged(std::mem::take(&mut self.ranges.offered));
        Ok(())
    }

    /// Puts bytes at a place that [`have`](Self::have) has not told, in a file of which nothing else was received yet. Zeros
    /// take no room. They are offered by [`filled`](Self::filled), and not durable before they are taken.
    pub(crate) fn fill(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.check()?;
        let end = offset.saturating_add(bytes.len() as u64);
        self.make_room(end)?;
        if zeros::are(bytes) {
            self.clear(offset, end)
                .map_err(|e| self.fail("make a hole", e))?;
        } else {
            self.put(offset, bytes)?;
        }
        let early = self.early.get_or_insert_with(|| Box::new((offset, end)));
        **early = (early.0.min(offset), early.1.max(end));
        self.ranges.offered.push((offset, end));
        Ok(())
    }

    /// As [`have`](Self::have), with what was [put there](Self::fill).
    pub(crate) fn filled(&mut self) -> Result<Vec<Range>, StoreError> {
        self.check()?;
        let known = merged(std::mem::take(&mut self.ranges.offered));
        self.prove(known, &mut |_| {})
    }

    /// Reserves room for a file of this size, or refuses it.
    fn make_room(&mut self, total: u64) -> Result<(), StoreError> {
        match self.size {
            Some(expected) if total > expected => {
                self.doomed = true;
                return Err(StoreError::SizeMismatch {
                    expected,
                    got: total,
                });
            }
            Some(_) => {}
            None => {
                let limit = self.body.inner.max_file();
                if total > limit {
                    self.doomed = true;
                    return Err(StoreError::TooLarge { size: total, limit });
                }
                if let Some(reservation) = &mut self.reservation {
                    reservation.grow(total, SPARE)?;
                }
            }
        }
        Ok(())
    }

    /// Writes to the staging file.
    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.body
            .file
            .write_all_at(bytes, offset)
            .map_err(|e| self.fail("write a file", e))?;
        // The snapshot may include the bytes that were just overwritten.
        self.snapshot = None;
        let end = offset.saturating_add(bytes.len() as u64);
        if end > self.end {
            if let Some(reservation) = &mut self.reservation {
                reservation.wrote(end - self.end);
            }
            self.end = end;
        }
        Ok(())
    }

    /// A checkpoint, if one is due (after 64 MiB or one second) and none is running. Never for an upload that is not
    /// [resumable](Self::resumable).
    pub fn checkpoint(&mut self) -> Option<Checkpoint> {
        let since = self.unsynced.since?;
        if self.unsynced.bytes < CHECKPOINT_BYTES && since.elapsed() < CHECKPOINT_EVERY {
            return None;
        }
        if self.check().is_err() || self.body.running.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.unsynced = Unsynced::default();
        Some(Checkpoint {
            body: self.body.clone(),
        })
    }

    /// Makes a checkpoint of all written bytes now. Does nothing for an upload that is not
    /// [resumable](Self::resumable).
    pub(crate) fn make_durable(&mut self) -> Result<(), StoreError> {
        self.check()?;
        self.unsynced = Unsynced::default();
        let mut work = self.body.work();
        let made = self.body.make_durable(&mut work);
        made.map_err(|()| StoreError::Broken)
    }

    /// Checks size and hash. The file is then complete, and [`Store::publish`](super::Store::publish) gives it its
    /// name.
    ///
    /// Ranges of [`have`](Self::have) at the end need not be sent. A large file is synced here, a small one by
    /// `publish`, together with others. On an error the upload is removed.
    pub fn complete(
        self,
        hash: Option<[u8; 32]>,
        size: Option<u64>,
        meta: Meta,
    ) -> Result<Complete, StoreError> {
        self.complete_telling(hash, size, meta, &XattrList::default(), &mut || {})
    }

    /// As [`complete`](Self::complete), with extended attributes; `syncing` is called before the bytes of a large file are
    /// synced.
    pub(crate) fn complete_telling(
        mut self,
        hash: Option<[u8; 32]>,
        size: Option<u64>,
        meta: Meta,
        xattrs: &XattrList,
        syncing: &mut dyn FnMut(),
    ) -> Result<Complete, StoreError> {
        self.check()?;
        // After any failure from here on, the upload is not resumable.
        self.doomed = true;
        for expected in [self.size, size].into_iter().flatten() {
            self.reach(expected)?;
        }
        // What came out of order may end before the last bytes.
        if let Some((_, end)) = self.early.as_deref().copied()
            && end > self.position
        {
            self.reach(end)?;
        }
        let got = self.hasher.finalize().into();
        if let Some(expected) = hash.filter(|expected| *expected != got) {
            return Err(StoreError::HashMismatch { expected, got });
        }
        let body = self.body.clone();
        // Waits for a checkpoint that runs: the kernel would report a failed write to only one of the two.
        let mut work = body.work();
        self.check()?;
        if self.end > self.position {
            body.file
                .set_len(self.position)
                .map_err(|e| self.fail("cut a file", e))?;
        }
        let xattrs = self.apply_xattrs(xattrs)?;
        let other_time = self.apply_meta(meta)?;
        let disk = &body.inner.disk;
        let sync = match body.inner.config.sync {
            SyncPolicy::Never => Some(Synced::None),
            SyncPolicy::Auto if self.position < ALONE_FROM && disk.batches() => None,
            SyncPolicy::Auto | SyncPolicy::Always => {
                syncing();
                // Once only: after a failed sync the kernel may have dropped the bytes, and a second one
                // would not tell.
                body.file
                    .sync_all()
                    .map_err(|e| self.fail("sync a file", e))?;
                Some(Synced::File)
            }
        };
        work.closed = true;
        let journalled = work.journal.is_some();
        drop(work);
        let (Some(mut staged), Some(mut reservation)) =
            (body.last().staged.take(), self.reservation.take())
        else {
            return Err(StoreError::Broken);
        };
        staged.journalled |= journalled;
        // If no other process can open the file, it is closed to save the descriptor, although that releases the
        // lock.
        let open = body.inner.config.shared || staged.journalled;
        if !open {
            reservation.leave();
        }
        Ok(Complete(Box::new(Whole {
            path: body.path.clone(),
            size: self.position,
            hash: got,
            if_exists: self.if_exists,
            dirs: std::mem::take(&mut self.dirs),
            other_time,
            xattrs,
            sync,
            losses: body.losses,
            staged,
            held: open.then_some(body),
            noted: Vec::new(),
            reservation,
        })))
    }

    /// Takes what need not come up to the end of the file, which is there.
    fn reach(&mut self, expected: u64) -> Result<(), StoreError> {
        if self.may_skip_to(expected) {
            self.skip_to(expected)?;
        }
        if expected != self.position {
            return Err(StoreError::SizeMismatch {
                expected,
                got: self.position,
            });
        }
        Ok(())
    }

    /// Removes the upload, even if it could be resumed.
    pub fn discard(mut self) {
        self.doomed = true;
    }

    /// Sets the file's time and mode. A time that the file system cannot hold is not an error; the actual time is
    /// returned.
    fn apply_meta(&mut self, meta: Meta) -> Result<Option<OtherTime>, StoreError> {
        self.set_mode(meta.mode.unwrap_or(FILE_MODE) & 0o777)?;
        let mtime = meta.mtime;
        Ok(mtime.and_then(|time| disk::set_modified(&self.body.file, &self.body.path, time)))
    }

    /// Gives the file these attributes, as far as the store takes them and the file system holds them; says how many.
    fn apply_xattrs(&mut self, xattrs: &XattrList) -> Result<u32, StoreError> {
        let which = self.body.inner.config.xattrs;
        if xattrs.count() == 0 || which == Xattrs::None {
            return Ok(0);
        }
        // Only who may write a file may set attributes of users.
        self.set_mode(self.mode | FILE_MODE)?;
        attributes::apply(&self.body.file, xattrs, which)
            .map_err(|e| self.fail("set an extended attribute", e))
    }

    fn set_mode(&mut self, mode: u32) -> Result<(), StoreError> {
        if mode != self.mode {
            rustix::fs::fchmod(&self.body.file, Mode::from_raw_mode(mode))
                .map_err(|e| self.fail("set a file's mode", e.into()))?;
            self.mode = mode;
        }
        Ok(())
    }

    /// An error when an earlier step failed.
    fn check(&self) -> Result<(), StoreError> {
        if self.broken || self.body.failed.load(Ordering::Acquire) {
            return Err(StoreError::Broken);
        }
        Ok(())
    }

    fn fail(&mut self, action: &'static str, cause: io::Error) -> StoreError {
        self.broken = true;
        self.body.inner.disk.error(action, &self.body.path, cause)
    }

    /// Whether `offset` is the next one, or all bytes up to it were reported as durable.
    fn may_skip_to(&self, offset: u64) -> bool {
        offset == self.position
            || offset > self.position
                && self
                    .ranges
                    .offered
                    .iter()
                    .any(|(start, end)| *start <= self.position && offset <= *end)
    }

    /// Whether the next bytes equal bytes that the snapshot includes, so that the snapshot stays valid: their sender
    /// did not wait for the reported ranges.
    fn holds(&mut self, bytes: &[u8]) -> Result<bool, StoreError> {
        let end = self.position.saturating_add(bytes.len() as u64);
        let inside = |snapshot: &blake3::Hasher| end <= snapshot.count();
        if !self.snapshot.as_deref().is_some_and(inside) {
            return Ok(false);
        }
        let mut held = vec![0; bytes.len()];
        match self.body.file.read_exact_at(&mut held, self.position) {
            Ok(()) => Ok(held == bytes),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(self.fail("read a staging file", e)),
        }
    }

    /// Reads the bytes before `offset` from the disk.
    fn skip_to(&mut self, offset: u64) -> Result<(), StoreError> {
        if offset == self.position {
            return Ok(());
        }
        let before = self.position;
        if let Some(snapshot) = self
            .snapshot
            .take_if(|snapshot| (before + 1..=offset).contains(&snapshot.count()))
        {
            self.position = snapshot.count();
            self.hasher = snapshot;
        }
        let len = offset - self.position;
        let read = read(
            &self.body.file,
            self.position,
            len,
            &mut [&mut self.hasher],
            &mut |_| {},
        )
        .and_then(|read| match read == len {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        });
        read.map_err(|e| self.fail("read a staging file", e))?;
        self.position = offset;
        self.body.position.store(offset, Ordering::Release);
        if self.early.as_ref().is_some_and(|early| early.0 < offset) {
            if self.resumable() {
                self.unsynced.add(offset - before);
            }
            return Ok(());
        }
        // If no bytes waited for a sync, all bytes up to here are on disk.
        let _ =
            self.body
                .safe
                .compare_exchange(before, offset, Ordering::AcqRel, Ordering::Relaxed);
        Ok(())
    }

    /// Removes durable ranges before the position: bytes written there become durable with the next sync.
    fn pass(&mut self) {
        let position = self.position;
        self.ranges.ahead.retain_mut(|(start, end)| {
            *start = (*start).max(position);
            *start < *end
        });
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let healthy = !self.doomed && self.check().is_ok();
        let mut last = self.body.last();
        last.keep =
            healthy && self.resumable() && (self.position > 0 || !self.ranges.ahead.is_empty());
        last.reservation = self.reservation.take();
    }
}

impl Body {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Syncs all written bytes, then updates the journal, then `safe`.
    fn make_durable(&self, work: &mut Work) -> Result<(), ()> {
        let Some(head) = &self.head else {
            return Ok(());
        };
        if self.failed.load(Ordering::Acquire) {
            return Err(());
        }
        let upto = self.position.load(Ordering::Acquire);
        let from = self.safe.load(Ordering::Acquire);
        if upto <= from {
            return Ok(());
        }
        if let Err(error) = self.try_make_durable(work, head, from, upto) {
            self.failed.store(true, Ordering::Release);
            let _ = self
                .inner
                .disk
                .error("make an upload durable", &self.path, error);
            return Err(());
        }
        self.safe.fetch_max(upto, Ordering::AcqRel);
        Ok(())
    }

    fn try_make_durable(
        &self,
        work: &mut Work,
        head: &Head,
        from: u64,
        upto: u64,
    ) -> io::Result<()> {
        let disk = &self.inner.disk;
        let sync = self.inner.config.sync != SyncPolicy::Never;
        if sync {
            // Once only, as in `complete`.
            self.file.sync_data()?;
        }
        let key = Key::new(&head.owner, &self.path);
        let begun = std::mem::replace(&mut work.begun, true);
        match &mut work.journal {
            Some(journal) if journal.len() < REWRITE_FROM && journal.is_linked()? => {
                let again = (!begun).then_some(head);
                journal.append(again, &[(from, upto)])?;
                if sync {
                    journal.sync()?;
                }
                if begun {
                    return Ok(());
                }
            }
            // The journal is written in full if it is new, too long, or removed.
            existing => {
                let mut all = work.initial.clone();
                all.push((0, upto));
                let replaces = existing.is_some();
                let file = match replaces {
                    true => disk.new_journal(&key)?,
                    false => match disk.journal(&key, true)? {
                        Some(file) => file,
                        None => return Err(io::ErrorKind::NotFound.into()),
                    },
                };
                let journal = existing.insert(Journal::fresh(file)?);
                journal.append(Some(head), &merged(all))?;
                if sync {
                    journal.sync()?;
                }
                if replaces {
                    disk.swap_journal(&key)?;
                }
            }
        }
        if sync {
            disk.sync_area()?;
        }
        Ok(())
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        let mut last = self.last();
        let (staged, reservation, keep) = (last.staged.take(), last.reservation.take(), last.keep);
        drop(last);
        let Some(mut staged) = staged else {
            return;
        };
        let mut work = self.work();
        let durable = keep && self.make_durable(&mut work).is_ok();
        staged.journalled |= work.journal.is_some();
        if let Some(key) = staged.key.clone()
            && durable
            && staged.journalled
        {
            staged.abandon();
            let held = self.file.metadata().map_or(0, |metadata| metadata.len());
            if let Some(reservation) = reservation {
                reservation.suspend(key, held);
            }
        }
        // Otherwise the files are removed while the lock is still held.
        drop(staged);
    }
}

/// Feeds `len` bytes from `offset` on to the hashers; returns how many bytes the file had.
fn read(
    file: &File,
    offset: u64,
    len: u64,
    hashers: &mut [&mut blake3::Hasher],
    progress: &mut dyn FnMut(u64),
) -> io::Result<u64> {
    let mut buffer = vec![0; usize::try_from(len.min(BUFFER)).unwrap_or(0)];
    let mut done = 0;
    while done < len {
        let most = usize::try_from(len - done).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        match file.read_at(
            buffer.get_mut(..most).unwrap_or_default(),
            offset.saturating_add(done),
        ) {
            Ok(0) => break,
            Ok(read) => {
                let bytes = buffer.get(..read).unwrap_or_default();
                for hasher in &mut *hashers {
                    hasher.update(bytes);
                }
                done += read as u64;
                progress(done);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// The longest range of an upload with `held` bytes. Ranges of a small upload are short, so that one different byte
/// costs little; those of a large one are long, so that their number fits into a message.
fn longest(held: u64) -> u64 {
    RANGE.saturating_mul(held.div_ceil(RANGE * RANGES).max(1))
}

/// Longest range with a hash of its own, in bytes: the most that is sent again for one different byte.
const RANGE: u64 = 64 << 20;
/// The most ranges of an upload without gaps, half of what a message may hold; longer uploads get longer ranges.
const RANGES: u64 = 4_096;
/// Bytes after which a checkpoint is due.
pub(super) const CHECKPOINT_BYTES: u64 = 64 << 20;
pub(super) const CHECKPOINT_EVERY: Duration = Duration::from_secs(1);
/// Size in bytes from which on a file is synced by a call of its own.
const ALONE_FROM: u64 = 1 << 20;
const BUFFER: u64 = 256 << 10;
/// Bytes that an upload without a declared size reserves ahead, so that it does not query the file system at every
/// write.
const SPARE: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_short_up_to_256_gib_and_few_beyond() {
        let gib = 1 << 30;
        for (held, expected) in [
            (0, RANGE),
            (1, RANGE),
            (256 * gib, RANGE),
            (256 * gib + 1, 2 * RANGE),
            (512 * gib, 2 * RANGE),
            (1024 * gib, 4 * RANGE),
            (u64::MAX, (1 << 26) * RANGE),
        ] {
            assert_eq!(longest(held), expected, "{held}");
            assert!(held.div_ceil(longest(held)) <= RANGES, "{held}");
        }
    }
}
