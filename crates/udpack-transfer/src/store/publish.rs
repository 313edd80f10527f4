//! Publishes complete files in batches: one sync for the bytes of all, a rename for each, one sync for the
//! directories.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cap_std::fs::Dir;

use super::changes::{Changes, Noted, What};
use super::disk::below;
use super::disk::{self, Id, Made};
use super::partial::{Body, Staged};
use super::quota::charge;
use super::{IfExists, Inner, OtherTime, Reservation, StoreError, SyncPolicy};
use crate::base::path::RelPath;

/// A complete, verified file that is not published yet. Dropping it removes it.
#[derive(Debug)]
pub struct Complete(pub(super) Box<Whole>);

/// The state of a complete file, in one allocation: thousands may wait together, and are moved.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) path: RelPath,
    pub(super) size: u64,
    pub(super) hash: [u8; 32],
    pub(super) if_exists: IfExists,
    /// Modes of the directories to create.
    pub(super) dirs: Box<[u32]>,
    /// The actual modification time, if it differs from the requested one.
    pub(super) other_time: Option<OtherTime>,
    /// How many extended attributes it has been given.
    pub(super) xattrs: u32,
    /// How its bytes were synced; `None` if they are not synced yet.
    pub(super) sync: Option<Synced>,
    /// The number of failed syncs of the file system before its first byte was written.
    pub(super) losses: u64,
    // Declared before the lock, so that the file is removed while locked.
    pub(super) staged: Staged,
    /// The open file and its lock, if they are still needed.
    #[expect(dead_code, reason = "held for the lock")]
    pub(super) held: Option<Arc<Body>>,
    /// The names that it was about to get.
    pub(super) noted: Vec<Noted>,
    pub(super) reservation: Reservation,
}

/// A file is stored: verified, complete, on disk, under its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The name it has, which [`IfExists::Rename`] may have changed.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// BLAKE3 of its bytes.
    pub hash: [u8; 32],
    /// Whether a file with the same bytes had the name already and was kept.
    pub same: bool,
    /// How its bytes were synced.
    pub sync: Synced,
    /// Its modification time, where the file system cannot hold the second that was asked for. `None` of a file that was
    /// there already.
    pub other_time: Option<OtherTime>,
    /// How many of the extended attributes that came with it were stored: 0 for a file that was there already.
    pub xattrs: u32,
}

/// How a stored file's bytes were synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Synced {
    /// By a call for this file.
    File,
    /// By one call for several files.
    Batch,
    /// They were not synced explicitly.
    None,
}

impl fmt::Display for Synced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Batch => "batch",
            Self::None => "none",
        })
    }
}

impl Complete {
    /// Whether `Store::publish` need not sync its bytes.
    pub(crate) fn is_synced(&self) -> bool {
        self.0.sync.is_some()
    }

    /// The name asked for.
    pub fn path(&self) -> &RelPath {
        &self.0.path
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// The name of the file in staging.
    pub(crate) fn staged(&self) -> &str {
        &self.0.staged.name
    }
}

impl Whole {
    /// Publishes the file; returns its name, and whether an equal file had it.
    fn name(&mut self, inner: &Arc<Inner>, dir: &Dir) -> Result<(String, bool), StoreError> {
        let name = self.path.file_name().to_owned();
        let mut published = self.path.clone();
        let mut replaced = 0;
        let mut removals = 0;
        while !self.try_name(inner, dir, &name)? {
            inner.expect_taken_names();
            match self.if_exists {
                IfExists::Skip => match self.take_over(inner, dir)? {
                    true => return Ok((self.path.as_str().to_owned(), true)),
                    // It was removed meanwhile.
                    false if removals < 3 => {
                        removals += 1;
                        continue;
                    }
                    false => return Err(self.exists()),
                },
                IfExists::Same if self.is_there(inner, dir)? => {
                    return Ok((self.path.as_str().to_owned(), true));
                }
                // The file to compare with was removed meanwhile, so the name may be free now.
                IfExists::Same if removals < 3 => {
                    removals += 1;
                    continue;
                }
                IfExists::Same => return Err(self.exists()),
                IfExists::Error => return Err(self.exists()),
                IfExists::Overwrite => replaced = self.replace(inner, dir, &name)?,
                IfExists::Rename => published = self.try_numbers(inner, dir)?,
            }
            break;
        }
        self.reservation.commit(self.size, replaced);
        Ok((published.as_str().to_owned(), false))
    }

    /// Publishes under `name`; false when something has it.
    fn try_name(&mut self, inner: &Inner, dir: &Dir, name: &str) -> Result<bool, StoreError> {
        if !self.staged.is_present() {
            return Err(StoreError::Broken);
        }
        match inner.disk.publish(&self.staged.name, dir, name) {
            Ok(()) => {
                self.staged.published();
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(inner.disk.error("publish a file", &self.path, e)),
        }
    }

    /// Publishes under the first numbered name that is free.
    fn try_numbers(&mut self, inner: &Inner, dir: &Dir) -> Result<RelPath, StoreError> {
        for number in 1..=LAST_NUMBER {
            // A name beyond the limits could never be requested.
            let Ok(path) = numbered(&self.path, number).parse::<RelPath>() else {
                break;
            };
            let noted = inner.note(&path, What::Put)?;
            if noted.is_some() {
                inner.sync_changes(&path)?;
            }
            if self.try_name(inner, dir, path.file_name())? {
                self.noted.extend(noted);
                return Ok(path);
            }
            if let Some(noted) = noted {
                noted.withdraw();
            }
        }
        Err(self.exists())
    }

    /// Replaces a regular file, and returns the bytes that it counted.
    fn replace(&mut self, inner: &Inner, dir: &Dir, name: &str) -> Result<u64, StoreError> {
        let path = self.path.clone();
        let failed = |action, e| inner.disk.error(action, &path, e);
        let _replacing = inner.replacing();
        let mut there = disk::look(dir, name).map_err(|e| failed("look up a name", e))?;
        if there.is_none() {
            // The file was removed meanwhile; another upload may publish the name now.
            if self.try_name(inner, dir, name)? {
                return Ok(0);
            }
            there = disk::look(dir, name).map_err(|e| failed("look up a name", e))?;
        }
        let replaced = match there {
            Some(metadata) if !metadata.is_file() => return Err(self.exists()),
            Some(metadata) => charge(metadata.len()),
            None => 0,
        };
        let old = match replaced >= LARGE {
            true => below::hold(dir, name).ok(),
            false => None,
        };
        match inner.disk.replace(&self.staged.name, dir, name) {
            Ok(()) => {
                self.staged.published();
                if let Some(old) = old {
                    release(old);
                }
                Ok(replaced)
            }
            // A directory took the name since the check.
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => Err(self.exists()),
            Err(e) => Err(failed("replace a file", e)),
        }
    }

    /// Whether a file with the same bytes has the name; false if the name is free again, an error if the bytes
    /// differ.
    fn is_there(&self, inner: &Arc<Inner>, dir: &Dir) -> Result<bool, StoreError> {
        let Some(existing) = inner.open_existing(&self.path, dir)? else {
            return Ok(false);
        };
        if existing.len() == self.size && existing.hash(&mut |_| {})? == self.hash {
            return Ok(true);
        }
        Err(self.exists())
    }

    /// Size and hash become those of the file that has the name, for [`IfExists::Skip`]; false when none has it any
    /// more.
    fn take_over(&mut self, inner: &Arc<Inner>, dir: &Dir) -> Result<bool, StoreError> {
        let Some(existing) = inner.open_existing(&self.path, dir)? else {
            return Ok(false);
        };
        self.hash = existing.hash(&mut |_| {})?;
        self.size = existing.len();
        Ok(true)
    }

    fn exists(&self) -> StoreError {
        StoreError::Exists {
            path: self.path.clone(),
        }
    }
}

/// Gives the room of a replaced file back on another thread: of a large one that takes a while, for which its sender need not
/// wait.
fn release(old: OwnedFd) {
    // Outside of a runtime it is dropped here.
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn_blocking(move || drop(old));
    }
}

/// Publishes all of them; the outcomes in the same order.
pub(super) fn publish(
    inner: &Arc<Inner>,
    mut batch: Vec<Complete>,
) -> Vec<Result<Published, StoreError>> {
    // What is noted before a sync of the file system is on disk with it.
    let noted = note(inner, &mut batch);
    let barrier = sync_bytes(inner, &batch);
    let noted = noted.and_then(|()| match barrier {
        Bytes::Synced(_) if !batch.iter().all(Complete::is_synced) => Ok(()),
        _ => inner.changes.as_ref().map_or(Ok(()), Changes::sync),
    });
    let mut outcomes = Vec::with_capacity(batch.len());
    let mut dirs = Dirs::new(inner);
    for Complete(complete) in &mut batch {
        let sync = match (complete.sync, &barrier) {
            (Some(sync), _) => Ok(sync),
            (None, Bytes::Synced(losses)) if *losses == complete.losses => Ok(Synced::Batch),
            (None, Bytes::Synced(_)) => Err(None),
            (None, Bytes::Each) => inner
                .disk
                .sync_staged(&complete.staged.name)
                .map(|()| Synced::File)
                .map_err(Some),
            (None, Bytes::Failed(cause)) => Err(Some(again(cause))),
        };
        let synced = match &noted {
            Ok(()) => sync,
            Err(cause) => Err(Some(again(cause))),
        };
        let outcome = synced
            .map_err(|cause| {
                // A failed sync during its lifetime may have lost its bytes.
                let cause = cause.unwrap_or_else(|| rustix::io::Errno::IO.into());
                inner.disk.error("sync a file", &complete.path, cause)
            })
            .and_then(|sync| {
                let dir = dirs.of(&complete.path, &complete.dirs, &mut outcomes)?;
                let (path, same) = complete.name(inner, &dir)?;
                Ok(Published {
                    path,
                    size: complete.size,
                    hash: complete.hash,
                    same,
                    sync,
                    other_time: complete.other_time.filter(|_| !same),
                    xattrs: if same { 0 } else { complete.xattrs },
                })
            });
        if !outcome.as_ref().is_ok_and(|published| !published.same) {
            let noted = complete.noted.drain(..);
            noted.for_each(Noted::withdraw);
        }
        let renamed = |published: &Published| published.path != complete.path.as_str();
        if outcome.as_ref().is_ok_and(renamed) && !complete.noted.is_empty() {
            // The first note is of the name that was asked for.
            complete.noted.remove(0).withdraw();
        }
        outcomes.push(outcome);
    }
    dirs.flush(&mut outcomes);
    // Journals are removed only after the names are on disk.
    drop(batch);
    outcomes
}

/// Notes the names that they are about to get.
fn note(inner: &Inner, batch: &mut [Complete]) -> io::Result<()> {
    let Some(changes) = &inner.changes else {
        return Ok(());
    };
    for Complete(complete) in batch {
        let noted = changes.note(&complete.path, What::Put)?;
        complete.noted.push(noted);
    }
    Ok(())
}

/// The result of syncing the bytes of a batch.
enum Bytes {
    /// All bytes are synced; the number says how often such a sync had failed before.
    Synced(u64),
    Failed(io::Error),
    /// The files must be synced one by one.
    Each,
}

fn sync_bytes(inner: &Inner, batch: &[Complete]) -> Bytes {
    if batch.iter().all(Complete::is_synced) {
        return Bytes::Synced(0);
    }
    match inner.disk.sync_all() {
        Ok(losses) => Bytes::Synced(losses),
        Err(e) if disk::is_unsupported(&e) => Bytes::Each,
        Err(e) => Bytes::Failed(e),
    }
}

/// The directories of a batch: opened once each, synced once each.
struct Dirs<'a> {
    inner: &'a Inner,
    open: HashMap<String, Arc<Dir>>,
    /// To be synced.
    changed: Vec<Arc<Dir>>,
    made: Vec<Made>,
    /// The directories of the outcomes before this index are synced.
    settled: usize,
}

impl<'a> Dirs<'a> {
    fn new(inner: &'a Inner) -> Self {
        Self {
            inner,
            open: HashMap::new(),
            changed: Vec::new(),
            made: Vec::new(),
            settled: 0,
        }
    }

    /// The directory for this file, which will be synced.
    fn of(
        &mut self,
        path: &RelPath,
        modes: &[u32],
        outcomes: &mut [Result<Published, StoreError>],
    ) -> Result<Arc<Dir>, StoreError> {
        let parent = path.parent().unwrap_or_default();
        if let Some(dir) = self.open.get(parent) {
            return Ok(dir.clone());
        }
        if self.open.len() + self.made.len() >= OPEN_LIMIT {
            self.flush(outcomes);
        }
        let dir = Arc::new(self.inner.make_parent(path, modes, &mut self.made)?);
        self.changed.push(dir.clone());
        self.open.insert(parent.to_owned(), dir.clone());
        Ok(dir)
    }

    /// Syncs all directories; on a failure, the files in them fail.
    fn flush(&mut self, outcomes: &mut [Result<Published, StoreError>]) {
        self.open.clear();
        let changed = std::mem::take(&mut self.changed);
        let made = std::mem::take(&mut self.made);
        let synced = self.sync(&changed, &made);
        let (_, rest) = outcomes.split_at_mut(self.settled.min(outcomes.len()));
        match synced {
            Ok(()) => self
                .inner
                .disk
                .made_durable(made.iter().map(|made| made.child)),
            Err(cause) => {
                for outcome in rest.iter_mut().filter(|outcome| outcome.is_ok()) {
                    let cause = again(&cause);
                    *outcome = Err(StoreError::io("sync a directory", None, cause, || {
                        self.inner.disk.available().unwrap_or(0)
                    }));
                }
            }
        }
        self.settled = outcomes.len();
    }

    fn sync(&self, changed: &[Arc<Dir>], made: &[Made]) -> io::Result<()> {
        if self.inner.config.sync == SyncPolicy::Never {
            return Ok(());
        }
        let disk = &self.inner.disk;
        if changed.len() + made.len() > EACH_UP_TO && disk.batches() {
            let losses = disk.losses();
            match disk.sync_all() {
                Ok(now) if now == losses => return Ok(()),
                Ok(_) => return Err(rustix::io::Errno::IO.into()),
                Err(e) if !disk::is_unsupported(&e) => return Err(e),
                Err(_) => {}
            }
        }
        let mut seen: Vec<Id> = Vec::new();
        for made in made {
            let id = disk::id(&made.parent)?;
            if !seen.contains(&id) {
                disk::sync_dir(&made.parent)?;
                seen.push(id);
            }
        }
        for dir in changed {
            if seen.is_empty() || !seen.contains(&disk::id(dir)?) {
                disk::sync_dir(dir)?;
            }
        }
        Ok(())
    }
}

/// Copies the error, for another file.
fn again(error: &io::Error) -> io::Error {
    error
        .raw_os_error()
        .map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

/// `a/name.ext` with a number: `a/name (1).ext`.
pub(super) fn numbered(path: &RelPath, number: u32) -> String {
    let name = path.file_name();
    let at = path.as_str().len() - name.len()
        + name.rfind('.').filter(|at| *at > 0).unwrap_or(name.len());
    let (stem, extension) = path.as_str().split_at(at);
    format!("{stem} ({number}){extension}")
}

/// Highest number tried for a free name.
pub(super) const LAST_NUMBER: u32 = 999;
/// From this size on, the room of a replaced file is given back on another thread.
const LARGE: u64 = 16 << 20;
/// Directories of a batch that are held open before they are synced.
const OPEN_LIMIT: usize = 64;
/// Directories that are synced one by one; more are by one call for the whole file system.
const EACH_UP_TO: usize = 8;
