//! One upload: bytes into a staging file, hashed on the way, then published or gone.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use cap_std::fs::Dir;
use rustix::fs::{Timespec, Timestamps, UTIME_OMIT};

use super::disk;
use super::{IfExists, Meta, Reservation, Store, StoreError};
use crate::path::RelPath;

/// An upload under way, in a staging file no client can name.
///
/// Dropping it removes the staging file and gives its reservation back.
#[derive(Debug)]
pub struct Partial {
    path: RelPath,
    size: Option<u64>,
    if_exists: IfExists,
    reservation: Reservation,
    file: File,
    /// The staging file's name; `None` once it has its own.
    staged: Option<String>,
    hasher: Box<blake3::Hasher>,
    written: u64,
    safe: Arc<AtomicU64>,
    broken: bool,
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
    /// A file with the same bytes had the name already, and was left as it is.
    pub same: bool,
    /// How its bytes got on disk.
    pub sync: Synced,
}

/// How a stored file's bytes got on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Synced {
    /// By a call for this file.
    File,
    /// By one call for several files.
    Batch,
    /// Not yet: the operating system was not asked to.
    None,
}

impl std::fmt::Display for Synced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Batch => "batch",
            Self::None => "none",
        })
    }
}

/// A part of an interrupted upload that is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where it begins, in bytes from the start of the file.
    pub off: u64,
    /// Its length in bytes.
    pub len: u64,
    /// BLAKE3 of exactly these bytes, read back from the disk.
    pub hash: [u8; 32],
}

/// A due step of making an upload's bytes durable, to be run beside its writes.
#[derive(Debug)]
#[must_use = "a checkpoint does nothing until it is run"]
pub struct Checkpoint(());

impl Checkpoint {
    /// Puts the bytes on disk, then notes in the journal that they are there. A failure marks the upload as
    /// failed.
    pub fn run(self) {}
}

/// A whole, verified file that has no name yet. Dropping it removes it.
#[derive(Debug)]
pub struct Complete {
    partial: Partial,
    hash: [u8; 32],
}

impl Complete {
    /// Whether its bytes are on disk, or need not be, so that [`Store::publish`](super::Store::publish) has
    /// no need to wait for that.
    pub fn is_synced(&self) -> bool {
        true
    }

    /// The name asked for.
    pub fn path(&self) -> &RelPath {
        &self.partial.path
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.partial.written
    }

    pub(super) fn publish(mut self) -> Result<Published, StoreError> {
        let (path, same) = self.partial.publish(&self.hash)?;
        Ok(Published {
            path,
            size: self.partial.written,
            hash: self.hash,
            same,
            sync: Synced::File,
        })
    }
}

impl Partial {
    pub(super) fn new(
        path: RelPath,
        size: Option<u64>,
        if_exists: IfExists,
        reservation: Reservation,
        file: File,
        staged: String,
    ) -> Self {
        Self {
            path,
            size,
            if_exists,
            reservation,
            file,
            staged: Some(staged),
            hasher: Box::default(),
            written: 0,
            safe: Arc::default(),
            broken: false,
        }
    }

    /// The name asked for.
    pub fn path(&self) -> &RelPath {
        &self.path
    }

    /// The store it is in.
    pub fn store(&self) -> Store {
        Store {
            inner: self.reservation.inner.clone(),
        }
    }

    /// Whether it can be taken up again after it was dropped.
    pub fn resumable(&self) -> bool {
        false
    }

    /// The durable ranges, each hashed from disk; empty when the upload is new.
    pub fn have(&mut self, progress: &mut dyn FnMut(u64)) -> Result<Vec<Range>, StoreError> {
        let _ = progress;
        Ok(Vec::new())
    }

    /// Bytes without a gap so far.
    pub fn position(&self) -> u64 {
        self.written
    }

    /// Bytes without a gap that are on disk and journalled; kept up by checkpoints.
    pub fn safe(&self) -> Arc<AtomicU64> {
        self.safe.clone()
    }

    /// A step of making it durable, when one is due and none is running.
    pub fn checkpoint(&mut self) -> Option<Checkpoint> {
        None
    }

    /// Removes it, also when it could be resumed.
    pub fn discard(self) {}

    /// Writes `bytes` at `offset`, which is [`position`](Self::position), or further on over ranges
    /// that [`have`](Self::have) gave.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        if offset != self.written {
            return Err(StoreError::BadOffset {
                expected: self.written,
            });
        }
        self.write(bytes)
    }

    /// Appends `bytes`, all of them or none of a valid upload: after an error of the disk only
    /// dropping is left.
    ///
    /// Refuses, before writing, what goes beyond the declared size, or, without one, beyond the
    /// limits of the store.
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if self.broken {
            return Err(StoreError::Broken);
        }
        let len = bytes.len() as u64;
        let total = self.written.saturating_add(len);
        match self.size {
            Some(expected) if total > expected => {
                return Err(StoreError::SizeMismatch {
                    expected,
                    got: total,
                });
            }
            Some(_) => {}
            None => {
                let limit = self.reservation.inner.max_file();
                if total > limit {
                    return Err(StoreError::TooLarge { size: total, limit });
                }
                if total > self.reservation.bytes {
                    self.reservation
                        .reserve(total - self.reservation.bytes, SPARE)?;
                }
            }
        }
        if let Err(e) = self.file.write_all(bytes) {
            self.broken = true;
            return Err(self.failed("write a file", e));
        }
        self.hasher.update(bytes);
        self.written = total;
        self.reservation.wrote(len);
        Ok(())
    }

    /// Sets the file's modification time, in seconds since 1970. Call it after the last write.
    ///
    /// Only a convenience to the file's users: a time the file system cannot hold is not an error.
    fn set_modified(&self, seconds: i64) {
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: seconds,
                tv_nsec: 0,
            },
        };
        if let Err(errno) = rustix::fs::futimens(&self.file, &times) {
            tracing::debug!(path = %self.path, seconds, %errno, "cannot set the modification time");
        }
    }

    /// Checks size and hash, puts the bytes on disk and gives the file its name.
    ///
    /// Success means that file, name and directories survive a power cut. On an error nothing is
    /// visible under the name, but for one case: when the very last step, syncing the directory,
    /// fails, the complete file may be there.
    ///
    /// Where the name was taken meanwhile, the policy given at the start decides;
    /// [`IfExists::Skip`] is then an error like [`IfExists::Error`]. Comparing with an existing
    /// file reads all of it.
    pub fn complete(
        self,
        expected: Option<[u8; 32]>,
        expected_size: Option<u64>,
        meta: Meta,
    ) -> Result<Complete, StoreError> {
        if let Some(mtime) = meta.mtime {
            self.set_modified(mtime.secs);
        }
        if self.broken {
            return Err(StoreError::Broken);
        }
        let got = self.written;
        for expected in [self.size, expected_size].into_iter().flatten() {
            if expected != got {
                return Err(StoreError::SizeMismatch { expected, got });
            }
        }
        let hash = self.hasher.finalize().into();
        if let Some(expected) = expected.filter(|expected| *expected != hash) {
            return Err(StoreError::HashMismatch {
                expected,
                got: hash,
            });
        }
        // Once only: after a failed sync the kernel may have dropped the bytes, and a second one
        // would not tell.
        self.file
            .sync_all()
            .map_err(|e| self.failed("sync a file", e))?;
        Ok(Complete {
            partial: self,
            hash,
        })
    }

    /// Gives the synced file its name. The name it got, and whether an equal file had it.
    fn publish(&mut self, hash: &[u8; 32]) -> Result<(String, bool), StoreError> {
        let dir = self.reservation.inner.disk.make_parent(&self.path)?;
        let name = self.path.file_name().to_owned();
        let mut published = self.path.clone();
        let mut replaced = 0;
        let mut removals = 0;
        while !self.try_name(&dir, &name)? {
            match self.if_exists {
                IfExists::Same if self.is_there(&dir, hash)? => {
                    return Ok((self.path.to_string(), true));
                }
                // The file to compare with was removed meanwhile, so the name may be free now.
                IfExists::Same if removals < 3 => {
                    removals += 1;
                    continue;
                }
                IfExists::Same => return Err(self.exists()),
                IfExists::Error | IfExists::Skip => return Err(self.exists()),
                IfExists::Overwrite => replaced = self.replace(&dir, &name)?,
                IfExists::Rename => published = self.try_numbers(&dir)?,
            }
            break;
        }
        self.reservation.commit(self.written, replaced);
        disk::sync_dir(&dir).map_err(|e| self.failed("sync a directory", e))?;
        Ok((published.to_string(), false))
    }

    /// Publishes under `name`; false when something has it.
    fn try_name(&mut self, dir: &Dir, name: &str) -> Result<bool, StoreError> {
        let Some(staged) = &self.staged else {
            return Err(StoreError::Broken);
        };
        match self.reservation.inner.disk.publish(staged, dir, name) {
            Ok(()) => {
                self.staged = None;
                Ok(true)
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(self.failed("publish a file", e)),
        }
    }

    /// Publishes under the first numbered name that is free.
    fn try_numbers(&mut self, dir: &Dir) -> Result<RelPath, StoreError> {
        for number in 1..=LAST_NUMBER {
            // A name grown beyond the limits could never be asked for again.
            let Ok(path) = numbered(&self.path, number).parse::<RelPath>() else {
                break;
            };
            if self.try_name(dir, path.file_name())? {
                return Ok(path);
            }
        }
        Err(self.exists())
    }

    /// Publishes in place of a regular file, and returns that file's size.
    fn replace(&mut self, dir: &Dir, name: &str) -> Result<u64, StoreError> {
        let replaced = match disk::look(dir, name).map_err(|e| self.failed("look up a name", e))? {
            Some(metadata) if !metadata.is_file() => return Err(self.exists()),
            Some(metadata) => metadata.len(),
            None => 0,
        };
        let Some(staged) = &self.staged else {
            return Err(StoreError::Broken);
        };
        match self.reservation.inner.disk.replace(staged, dir, name) {
            Ok(()) => {
                self.staged = None;
                Ok(replaced)
            }
            // A directory took the name since we looked.
            Err(e) if e.kind() == std::io::ErrorKind::IsADirectory => Err(self.exists()),
            Err(e) => Err(self.failed("replace a file", e)),
        }
    }

    /// Whether a file with the bytes of this one has the name; false when none has it any more, an
    /// error when it has other bytes.
    fn is_there(&self, dir: &Dir, hash: &[u8; 32]) -> Result<bool, StoreError> {
        let Some(existing) = self.reservation.inner.open_existing(&self.path, dir)? else {
            return Ok(false);
        };
        if existing.len() == self.written && existing.hash(&mut |_| {})? == *hash {
            return Ok(true);
        }
        Err(self.exists())
    }

    fn exists(&self) -> StoreError {
        StoreError::Exists {
            path: self.path.clone(),
        }
    }

    fn failed(&self, action: &'static str, cause: std::io::Error) -> StoreError {
        self.reservation.inner.disk.error(action, &self.path, cause)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if let Some(staged) = &self.staged
            && let Err(error) = self.reservation.inner.disk.unstage(staged)
        {
            tracing::warn!(path = %self.path, %error, "staging file left to the next start");
        }
    }
}

/// `a/name.ext` with a number: `a/name (1).ext`.
fn numbered(path: &RelPath, number: u32) -> String {
    let name = path.file_name();
    let at = path.as_str().len() - name.len() + name.rfind('.').unwrap_or(name.len());
    let (stem, extension) = path.as_str().split_at(at);
    format!("{stem} ({number}){extension}")
}

/// Highest number tried for a free name.
const LAST_NUMBER: u32 = 999;
/// What an upload without a declared size reserves ahead, so as not to ask the file system at every
/// write.
const SPARE: u64 = 1 << 20;
