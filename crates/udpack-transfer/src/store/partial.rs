//! One upload: bytes into a staging file, hashed on the way, then complete, kept for later or gone.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::Mode;

use super::disk::{self, FILE_MODE, PART};
use super::journal::{self, Head, Journal, Key, REWRITE_FROM, merged};
use super::publish::{Complete, Synced, Whole};
use super::{
    IfExists, Inner, Meta, NewFile, OtherTime, Reservation, Store, StoreError, SyncPolicy,
};
use crate::base::path::RelPath;

/// An upload under way, in a staging file no client can name.
///
/// Dropping it removes the staging file and gives its reservation back; a [resumable](Self::resumable) one
/// that nothing is wrong with is kept instead, its last bytes put on disk, to be found by the next
/// [`Store::begin`] of the same owner and path.
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
    /// The hash's state at an end of what [`have`](Self::have) read, so that it need not be read twice.
    pub(super) snapshot: Option<Box<blake3::Hasher>>,
    position: u64,
    /// Bytes from which on the staging file has nothing yet.
    end: u64,
    /// Durable ranges beyond `position`, as the journal knew them when the upload was begun.
    ahead: Vec<(u64, u64)>,
    /// Those of them that were given out, and what was written ahead of its turn, joined: what may be left out.
    offered: Vec<(u64, u64)>,
    /// Where what was written ahead of its turn begins and ends; nothing of it is durable.
    early: Option<Box<(u64, u64)>>,
    /// Bytes written since the last checkpoint was begun, and when the first of them came.
    pub(super) unsynced: u64,
    since: Option<Instant>,
    broken: bool,
    /// What was received is not what was announced: nothing to come back to.
    doomed: bool,
}

/// A part of an interrupted upload that is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where it begins, in bytes from the start of the file.
    pub off: u64,
    /// Its length in bytes: at most 64 MiB, and more only of an upload that has more than 256 GiB already.
    pub len: u64,
    /// BLAKE3 of exactly these bytes, read back from the disk.
    pub hash: [u8; 32],
}

/// A due step of making an upload's bytes durable, to be run beside its writes.
///
/// Dropping it without running it is no failure: the same bytes are due again later.
#[derive(Debug)]
#[must_use = "a checkpoint does nothing until it is run"]
pub struct Checkpoint {
    body: Arc<Body>,
}

impl Checkpoint {
    /// Puts the bytes on disk, then notes in the journal that they are there, then raises
    /// [`Partial::safe`]. A failure marks the upload as failed: its next call is an error.
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

/// What an upload and its checkpoint share. The last of them to go decides about the files.
#[derive(Debug)]
pub(super) struct Body {
    inner: Arc<Inner>,
    path: RelPath,
    file: File,
    /// What the journal begins with; `None` when there is none, ever.
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

/// Held while bytes are made durable.
#[derive(Debug)]
struct Work {
    journal: Option<Journal>,
    /// What is on disk by what the journal said at the beginning.
    initial: Vec<(u64, u64)>,
    /// The journal was started, or taken up, by this upload.
    begun: bool,
    /// The upload is complete: the journal must not be touched any more.
    closed: bool,
}

/// What the last owner does.
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
    /// Of a resumable one; nobody else in this process may begin it meanwhile.
    key: Option<Key>,
    /// There may be a journal.
    journalled: bool,
    /// The staging file is there.
    present: bool,
}

impl Staged {
    /// It was given its name.
    pub(super) fn published(&mut self) {
        self.present = false;
    }

    pub(super) fn is_present(&self) -> bool {
        self.present
    }

    /// Leaves the files as they are.
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

/// What is found when an upload is begun.
struct Found {
    file: File,
    staged: Staged,
    /// Bytes the staging file holds.
    held: u64,
    journal: Option<Journal>,
    head: Option<Head>,
    ranges: Vec<(u64, u64)>,
}

impl Partial {
    /// Opens the staging file, a kept one where there is one.
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
            ahead: found.ranges,
            offered: Vec::new(),
            early: None,
            unsynced: 0,
            since: None,
            broken: false,
            doomed: false,
        })
    }

    /// Takes up what was kept of this upload, or starts it; `None` when another writes it.
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
            // Also one left without its staging file: it would speak of bytes that are not there yet.
            disk.area().forget(key)?;
            if held > 0 {
                file.set_len(0)?;
                held = 0;
            }
        } else if inner.config.sync != SyncPolicy::Never
            && let Err(error) = file.sync_data()
        {
            // A process that died may have overwritten what the journal calls durable. What fails here
            // is never tried again.
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

    /// Whether it can be taken up again after it was dropped.
    pub fn resumable(&self) -> bool {
        self.body.head.is_some()
    }

    /// Bytes without a gap so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes from the beginning to [`position`](Self::position) that are on disk and journalled; kept up by
    /// checkpoints.
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
        let limit = self.size.unwrap_or(u64::MAX);
        let mut known = vec![(0, self.body.safe.load(Ordering::Acquire))];
        known.extend(self.ahead.iter().copied());
        let known = merged(known);
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
        self.offered = merged(offered);
        Ok(have)
    }

    /// Writes `bytes` at `offset`, which is [`position`](Self::position), or further on if
    /// [`have`](Self::have) gave all that lies between. All of them are written or none of a valid upload:
    /// after an error of the disk only dropping is left.
    ///
    /// Refuses, before writing, another offset, and what goes beyond the declared size, or, without one, beyond
    /// the limits of the store.
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
            self.unsynced = self.unsynced.saturating_add(len);
            self.since.get_or_insert_with(Instant::now);
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`, which is not before [`position`](Self::position), in any order. What comes ahead of
    /// its turn is read back when its turn has come, and is not durable before that.
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
        self.offered.push((offset, end));
        self.offered = merged(std::mem::take(&mut self.offered));
        Ok(())
    }

    /// Refuses a file of this size, or has room for it.
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
        // It may have taken in what was just overwritten.
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

    /// A step of making it durable, when one is due (64 MiB or a second of bytes) and none is under way. Never
    /// for an upload that is not [resumable](Self::resumable).
    pub fn checkpoint(&mut self) -> Option<Checkpoint> {
        let since = self.since?;
        if self.unsynced < CHECKPOINT_BYTES && since.elapsed() < CHECKPOINT_EVERY {
            return None;
        }
        if self.check().is_err() || self.body.running.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.unsynced = 0;
        self.since = None;
        Some(Checkpoint {
            body: self.body.clone(),
        })
    }

    /// Makes all that was written durable, now. Nothing to do for an upload that is not
    /// [resumable](Self::resumable).
    pub(crate) fn make_durable(&mut self) -> Result<(), StoreError> {
        self.check()?;
        self.unsynced = 0;
        self.since = None;
        let mut work = self.body.work();
        let made = self.body.make_durable(&mut work);
        made.map_err(|()| StoreError::Broken)
    }

    /// Checks size and hash: it is whole then, and needs only its name, which
    /// [`Store::publish`](super::Store::publish) gives it.
    ///
    /// What [`have`](Self::have) gave may be left out at the end, too. A large file is put on disk here, a small
    /// one by `publish`, together with others. On an error nothing of it is left.
    pub fn complete(
        self,
        hash: Option<[u8; 32]>,
        size: Option<u64>,
        meta: Meta,
    ) -> Result<Complete, StoreError> {
        self.complete_telling(hash, size, meta, &mut || {})
    }

    /// As [`complete`](Self::complete); `syncing` is called before the bytes of a large file are put on disk.
    pub(crate) fn complete_telling(
        mut self,
        hash: Option<[u8; 32]>,
        size: Option<u64>,
        meta: Meta,
        syncing: &mut dyn FnMut(),
    ) -> Result<Complete, StoreError> {
        self.check()?;
        // Whatever goes wrong from here on, there is nothing to come back to.
        self.doomed = true;
        let early = self.early.as_ref().map(|early| early.1);
        for expected in [self.size, size, early].into_iter().flatten() {
            if self.may_skip_to(expected) {
                self.skip_to(expected)?;
            }
            if expected != self.position {
                return Err(StoreError::SizeMismatch {
                    expected,
                    got: self.position,
                });
            }
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
        // Its descriptor is worth more than the lock on it, where nobody else can come for the file.
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
            sync,
            losses: body.losses,
            staged,
            held: open.then_some(body),
            reservation,
        })))
    }

    /// Removes it, also when it could be resumed.
    pub fn discard(mut self) {
        self.doomed = true;
    }

    /// Gives the file the time and mode it is to have. A time the file system cannot hold is not an error: it says so.
    fn apply_meta(&mut self, meta: Meta) -> Result<Option<OtherTime>, StoreError> {
        let mode = meta.mode.unwrap_or(FILE_MODE) & 0o777;
        if mode != self.mode {
            rustix::fs::fchmod(&self.body.file, Mode::from_raw_mode(mode))
                .map_err(|e| self.fail("set a file's mode", e.into()))?;
        }
        let mtime = meta.mtime;
        Ok(mtime.and_then(|time| disk::set_modified(&self.body.file, &self.body.path, time)))
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

    /// Whether `offset` is the next, or all up to it was given out as durable.
    fn may_skip_to(&self, offset: u64) -> bool {
        offset == self.position
            || offset > self.position
                && self
                    .offered
                    .iter()
                    .any(|(start, end)| *start <= self.position && offset <= *end)
    }

    /// Whether the bytes that come next are there, in what the snapshot has taken in, which then stays good: who
    /// sends them did not wait to be told of them.
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

    /// Takes what lies before `offset` from the disk.
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
                self.unsynced = self.unsynced.saturating_add(offset - before);
                self.since.get_or_insert_with(Instant::now);
            }
            return Ok(());
        }
        // Where nothing waited to be synced, all up to here is on disk.
        let _ =
            self.body
                .safe
                .compare_exchange(before, offset, Ordering::AcqRel, Ordering::Relaxed);
        Ok(())
    }

    /// Forgets durable ranges that were passed: what was written there is durable when it is synced.
    fn pass(&mut self) {
        let position = self.position;
        self.ahead.retain_mut(|(start, end)| {
            *start = (*start).max(position);
            *start < *end
        });
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let healthy = !self.doomed && self.check().is_ok();
        let mut last = self.body.last();
        last.keep = healthy && self.resumable() && (self.position > 0 || !self.ahead.is_empty());
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

    /// Puts all that is written on disk, then says so in the journal, then in `safe`.
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
            // To be written in full: it is new, too long, or gone.
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
        // Otherwise removes what there is, while the lock is still held.
        drop(staged);
    }
}

/// Feeds `len` bytes from `offset` on to the hashers; how many there were before the file ended.
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

/// The longest range of an upload that has so many bytes: those of a small one are short, so that one byte that differs
/// costs little, and those of a large one so long that their number fits into a message.
fn longest(held: u64) -> u64 {
    RANGE.saturating_mul(held.div_ceil(RANGE * RANGES).max(1))
}

/// Longest range with a hash of its own: the most that is sent again when one byte of it differs.
const RANGE: u64 = 64 << 20;
/// Ranges that an upload without gaps gives at most, half of what a message may hold; beyond, they get longer.
const RANGES: u64 = 4_096;
/// Bytes after which, and time after which, what was written is made durable.
pub(super) const CHECKPOINT_BYTES: u64 = 64 << 20;
pub(super) const CHECKPOINT_EVERY: Duration = Duration::from_secs(1);
/// Size from which on a file is put on disk by a call of its own.
const ALONE_FROM: u64 = 1 << 20;
const BUFFER: u64 = 256 << 10;
/// What an upload without a declared size reserves ahead, so as not to ask the file system at every
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
