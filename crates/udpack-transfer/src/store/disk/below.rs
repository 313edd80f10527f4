//! What the tree verbs need of the file system beside what uploads need.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use cap_std::fs::{Dir, Metadata, MetadataExt as _};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{COUNT_DEPTH, DIRECTORY, Disk, PART};
use crate::base::names;
use crate::base::path::RelPath;
use crate::store::StoreError;

impl Disk {
    /// The root.
    pub(in crate::store) fn root(&self) -> io::Result<Dir> {
        self.root.try_clone()
    }

    /// What all that is below a directory, or the root, counts against a quota, the store's own directory left
    /// out; 0 where no such directory is.
    pub(in crate::store) fn used_below(&self, prefix: Option<&RelPath>) -> io::Result<u64> {
        let mut dir = self.root()?;
        for component in prefix.iter().flat_map(|prefix| prefix.components()) {
            dir = match enter(&dir, &*names::os(component)) {
                Ok(dir) => dir,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::MLINK) => return Ok(0),
                Err(errno) => return Err(errno.into()),
            };
        }
        super::count(&dir, COUNT_DEPTH)
    }

    /// A new symbolic link in the staging directory: its name.
    pub(in crate::store) fn stage_link(&self, target: &str) -> io::Result<String> {
        let name = self.names.next() + PART;
        rustix::fs::symlinkat(&*names::os(target), &self.staging, &name)?;
        Ok(name)
    }

    /// Fails where a directory is on another file system than the staging area.
    pub(in crate::store) fn check_device(
        &self,
        dir: &Dir,
        path: &RelPath,
    ) -> Result<(), StoreError> {
        let metadata = dir
            .dir_metadata()
            .map_err(|e| self.error("read a directory", path, e))?;
        if metadata.dev() != self.device {
            return Err(StoreError::OtherDevice);
        }
        Ok(())
    }
}

/// Opens a directory in `dir`; `NOTDIR`, or on some systems `LOOP`, when it is a symbolic link.
pub(in crate::store) fn enter(dir: &Dir, name: impl rustix::path::Arg) -> Result<Dir, Errno> {
    let dir = rustix::fs::openat(dir, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    Ok(Dir::from_std_file(File::from(dir)))
}

/// Keeps what has this name while it loses the name. Opens nothing for reading.
pub(in crate::store) fn hold(dir: &Dir, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, &*names::os(name), flags, Mode::empty())
}

/// Makes a directory that only we can enter. One that is there already stays as it is, and the answer is false.
pub(in crate::store) fn make(dir: &Dir, name: &str) -> Result<bool, Errno> {
    super::create_dir(dir, name)
}

/// What stands at any `name`, not following it; `None` when nothing does.
pub(in crate::store) fn see(dir: &Dir, name: impl AsRef<Path>) -> io::Result<Option<Metadata>> {
    match dir.symlink_metadata(name) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Removes a file or a link.
pub(in crate::store) fn unlink(dir: &Dir, name: &OsStr) -> Result<(), Errno> {
    rustix::fs::unlinkat(dir, name, AtFlags::empty())
}

/// Removes an empty directory.
pub(in crate::store) fn remove_dir(dir: &Dir, name: &OsStr) -> Result<(), Errno> {
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)
}
