//! One upload: bytes into a staging file, hashed on the way, then published or gone.

use std::fs::File;
use std::io::Write as _;

use cap_std::fs::Dir;
use rustix::fs::{Timespec, Timestamps, UTIME_OMIT};

use super::disk;
use super::{IfExists, Reservation, StoreError};
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
            broken: false,
        }
    }

    /// The name asked for.
    pub fn path(&self) -> &RelPath {
        &self.path
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Appends `bytes`, all of them or none of a valid upload: after an error of the disk only
    /// dropping is left.
    ///
    /// Refuses, before writing, what goes beyond the declared size, or, without one, beyond the
    /// limits of the store.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
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
    pub fn set_modified(&self, seconds: i64) {
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
    pub fn finish(
        mut self,
        expected: Option<[u8; 32]>,
        expected_size: Option<u64>,
    ) -> Result<Published, StoreError> {
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
        let (path, same) = self.publish(&hash)?;
        Ok(Published {
            path,
            size: got,
            hash,
            same,
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
