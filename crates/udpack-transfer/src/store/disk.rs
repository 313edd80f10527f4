//! The file system below the store: every call is relative to a directory held open since the
//! start.
//!
//! No call here follows a symbolic link, and none takes more than one path component: with the
//! directories held as descriptors this leaves nothing for a link planted at run time to redirect.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use cap_std::fs::{
    Dir, DirBuilder, DirBuilderExt as _, Metadata, MetadataExt as _, OpenOptions,
    OpenOptionsExt as _,
};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::StoreError;
use crate::path::RelPath;

/// The store's own directory inside the root; no client's name can begin with a dot.
pub(super) const PRIVATE: &str = ".udpack";
const STAGING: &str = "staging";
const JOURNAL: &str = "journal";
const LOCK: &str = "lock";
/// Ends the name of an upload's staging file.
const PART: &str = ".part";
/// Ends the name of a start-up probe in the staging directory.
const PROBE: &str = ".probe";
/// Begins the name of a start-up probe in the root.
const ROOT_PROBE: &str = ".udpack-probe-";
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// Deepest directory whose files count as used; what clients store lies far above it.
const COUNT_DEPTH: usize = 64;
/// Directories remembered as durable before the memory is cleared.
const DURABLE_LIMIT: usize = 65_536;

/// The held directories, and how files get from one to the other.
#[derive(Debug)]
pub(super) struct Disk {
    root: Dir,
    staging: Dir,
    /// Device of the staging directory: only there can a file be published.
    device: u64,
    publish: Publish,
    names: Names,
    /// Device and inode of directories whose own entry is known to be on disk.
    durable: Mutex<HashSet<(u64, u64)>>,
    /// Held for as long as the store is open.
    _lock: File,
}

/// How a staged file gets its name without ever replacing another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Publish {
    Rename,
    LinkThenUnlink,
}

impl Disk {
    /// Opens and locks the directory, proves that it can publish, and clears what an earlier run
    /// left.
    pub(super) fn open(root: &Path) -> Result<Self, StoreError> {
        create_root(root).map_err(|e| setup("create the directory", e))?;
        let root = rustix::fs::open(root, DIRECTORY, Mode::empty())
            .map_err(|e| setup("open the directory", e.into()))?;
        let root = Dir::from_std_file(File::from(root));
        let private = private_dir(&root, PRIVATE)?;
        let lock = create_lock(&private)?;
        let staging = private_dir(&private, STAGING)?;
        private_dir(&private, JOURNAL)?;
        let device = staging
            .dir_metadata()
            .map_err(|e| setup("read the staging directory", e))?
            .dev();
        let mut disk = Self {
            root,
            staging,
            device,
            publish: Publish::Rename,
            names: Names::new(),
            durable: Mutex::default(),
            _lock: lock,
        };
        disk.sweep()
            .map_err(|e| setup("clear the staging directory", e))?;
        disk.publish = disk.probe()?;
        Ok(disk)
    }

    /// Bytes the file system has for this process.
    pub(super) fn available(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Bytes of the whole file system.
    pub(super) fn capacity(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root)?;
        Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
    }

    /// Bytes of all regular files below a directory, or the root, the store's own directory left
    /// out; 0 where no such directory is.
    pub(super) fn used(&self, below: Option<&RelPath>) -> io::Result<u64> {
        let mut dir = self.root()?;
        for component in below.iter().flat_map(|below| below.components()) {
            dir = match open_dir(&dir, component) {
                Ok(dir) => dir,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::MLINK) => return Ok(0),
                Err(errno) => return Err(errno.into()),
            };
        }
        count(&dir, COUNT_DEPTH)
    }

    /// The root.
    pub(super) fn root(&self) -> io::Result<Dir> {
        self.root.try_clone()
    }

    /// A new symbolic link in the staging directory: its name.
    pub(super) fn stage_link(&self, target: &str) -> io::Result<String> {
        let name = self.names.next() + PART;
        rustix::fs::symlinkat(target, &self.staging, &name)?;
        Ok(name)
    }

    /// Removes an empty directory and forgets that its entry is on disk: the next one may get its
    /// inode.
    pub(super) fn remove_dir(&self, dir: &Dir, name: &OsStr, child: &Dir) -> Result<(), Errno> {
        let metadata = child.dir_metadata().map_err(errno)?;
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?;
        durable.remove(&(metadata.dev(), metadata.ino()));
        Ok(())
    }

    /// Fails where a directory is on another file system than the staging area.
    pub(super) fn check_device(&self, dir: &Dir, path: &RelPath) -> Result<(), StoreError> {
        let metadata = dir
            .dir_metadata()
            .map_err(|e| self.error("read a directory", path, e))?;
        if metadata.dev() != self.device {
            return Err(StoreError::OtherDevice);
        }
        Ok(())
    }

    /// A new staging file, open for reading and writing, and its name.
    pub(super) fn stage(&self) -> io::Result<(File, String)> {
        let name = self.names.next() + PART;
        Ok((create_new(&self.staging, &name)?, name))
    }

    /// Removes a staging file.
    pub(super) fn unstage(&self, name: &str) -> io::Result<()> {
        self.staging.remove_file(name)
    }

    /// Moves a staging file to `name` unless something has that name: then an error of kind
    /// `AlreadyExists`.
    pub(super) fn publish(&self, staged: &str, dir: &Dir, name: &str) -> io::Result<()> {
        self.publish.run(&self.staging, staged, dir, name)
    }

    /// Moves a staging file to `name`, replacing a file of that name.
    pub(super) fn replace(&self, staged: &str, dir: &Dir, name: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.staging, staged, dir, name)?)
    }

    /// The directory that holds `path`, or `None` when it is not there.
    pub(super) fn parent(&self, path: &RelPath) -> Result<Option<Dir>, StoreError> {
        self.walk(path, false)
    }

    /// The directory that holds `path`, made if need be, every directory on the way durable.
    pub(super) fn make_parent(&self, path: &RelPath) -> Result<Dir, StoreError> {
        let dir = self.walk(path, true)?;
        dir.ok_or_else(|| self.error("create a directory", path, Errno::NOENT.into()))
    }

    /// An error of the operating system about `path`.
    pub(super) fn error(
        &self,
        action: &'static str,
        path: &RelPath,
        cause: io::Error,
    ) -> StoreError {
        StoreError::io(action, Some(path), cause, || self.available().unwrap_or(0))
    }

    /// Publishes as on a file system without rename-without-replace.
    #[cfg(test)]
    pub(super) fn publish_by_link(&mut self) {
        self.publish = Publish::LinkThenUnlink;
    }

    /// Whether the entry of the directory with this device and inode is known to be on disk.
    #[cfg(test)]
    pub(super) fn is_durable(&self, id: (u64, u64)) -> bool {
        let durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        durable.contains(&id)
    }

    fn walk(&self, path: &RelPath, create: bool) -> Result<Option<Dir>, StoreError> {
        let failed = |action, cause| self.error(action, path, cause);
        let mut dir = self
            .root
            .try_clone()
            .map_err(|e| failed("open the root", e))?;
        let mut reached = 0;
        for component in path.parents() {
            reached += component.len() + 1;
            let child = match open_dir(&dir, component) {
                Err(Errno::NOENT) if !create => return Ok(None),
                Err(Errno::NOENT) => {
                    create_dir(&dir, component).and_then(|()| open_dir(&dir, component))
                }
                opened => opened,
            };
            let child = match child {
                Ok(child) => child,
                // Linux says ENOTDIR for a symbolic link, other systems ELOOP.
                Err(Errno::NOTDIR | Errno::LOOP | Errno::MLINK) => {
                    let parent = path
                        .as_str()
                        .get(..reached - 1)
                        .unwrap_or_default()
                        .to_owned();
                    return Err(StoreError::Blocked {
                        path: path.clone(),
                        parent,
                    });
                }
                Err(errno) => {
                    return Err(failed(
                        if create {
                            "make a directory"
                        } else {
                            "open a directory"
                        },
                        errno.into(),
                    ));
                }
            };
            if create {
                self.make_durable(&dir, &child)
                    .map_err(|e| failed("sync a directory", e))?;
            }
            dir = child;
        }
        self.check_device(&dir, path)?;
        Ok(Some(dir))
    }

    /// Sees to it that `child`'s entry in `dir` survives a power cut, also when another upload, or
    /// an earlier run, made it an instant ago.
    pub(super) fn make_durable(&self, dir: &Dir, child: &Dir) -> io::Result<()> {
        let metadata = child.dir_metadata()?;
        let id = (metadata.dev(), metadata.ino());
        let durable = || self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        if durable().contains(&id) {
            return Ok(());
        }
        sync_dir(dir)?;
        let mut durable = durable();
        if child.dir_metadata()?.nlink() == 0 {
            // Removed meanwhile: another directory may get its number.
            return Ok(());
        }
        if durable.len() >= DURABLE_LIMIT {
            durable.clear();
        }
        durable.insert(id);
        Ok(())
    }

    /// Removes what an earlier run left under names of ours; keeps and reports everything else.
    ///
    /// Safe at any moment of a start, because the lock is held: nothing in the staging directory
    /// can be in use.
    fn sweep(&self) -> io::Result<()> {
        let mut swept = 0u64;
        for entry in self.staging.entries()? {
            let name = entry?.file_name();
            let own = name
                .to_str()
                .is_some_and(|name| is_own(name, "", PART) || is_own(name, "", PROBE));
            match own.then(|| self.staging.remove_file(&name)) {
                Some(Ok(())) => swept += 1,
                Some(Err(error)) => {
                    tracing::warn!(?name, %error, "cannot remove a stale staging file")
                }
                None => tracing::warn!(?name, "unknown file in the staging directory, kept"),
            }
        }
        for entry in self.root.entries()? {
            let name = entry?.file_name();
            if name
                .to_str()
                .is_some_and(|name| is_own(name, ROOT_PROBE, ""))
                && let Err(error) = self.root.remove_file(&name)
            {
                tracing::warn!(?name, %error, "cannot remove a stale probe");
            }
        }
        if swept > 0 {
            tracing::info!(files = swept, "removed stale staging files");
        }
        Ok(())
    }

    /// Goes once through all that publishing needs, and finds the way this file system supports.
    fn probe(&self) -> Result<Publish, StoreError> {
        for way in [Publish::Rename, Publish::LinkThenUnlink] {
            let id = self.names.next();
            let (staged, second, target) = (
                format!("{id}{PROBE}"),
                format!("{}{PROBE}", self.names.next()),
                format!("{ROOT_PROBE}{id}"),
            );
            let outcome = self.try_publish(way, &staged, &second, &target);
            for (dir, name) in [
                (&self.staging, &staged),
                (&self.staging, &second),
                (&self.root, &target),
            ] {
                match dir.remove_file(name) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        return Err(setup("remove a probe file", e));
                    }
                    _ => {}
                }
            }
            if outcome? {
                return Ok(way);
            }
        }
        Err(StoreError::NoAtomicPublish)
    }

    /// Whether `way` publishes one file and refuses to replace it by a second.
    fn try_publish(
        &self,
        way: Publish,
        staged: &str,
        second: &str,
        target: &str,
    ) -> Result<bool, StoreError> {
        for name in [staged, second] {
            create_new(&self.staging, name)
                .and_then(|file| file.sync_all())
                .map_err(|e| setup("write a probe file", e))?;
        }
        match way.run(&self.staging, staged, &self.root, target) {
            Ok(()) => {}
            Err(e) if is_unsupported(&e) => return Ok(false),
            Err(e) => return Err(setup("publish a probe file", e)),
        }
        sync_dir(&self.root).map_err(|e| setup("sync the directory", e))?;
        Ok(way
            .run(&self.staging, second, &self.root, target)
            .is_err_and(|e| e.kind() == io::ErrorKind::AlreadyExists))
    }
}

impl Publish {
    fn run(self, staging: &Dir, staged: &str, dir: &Dir, name: &str) -> io::Result<()> {
        match self {
            Self::Rename => Ok(rename_new(staging, staged, dir, name)?),
            Self::LinkThenUnlink => {
                rustix::fs::linkat(staging, staged, dir, name, AtFlags::empty())?;
                // The file is published; a second name for it in the staging directory is swept at
                // the next start.
                if let Err(error) = staging.remove_file(staged) {
                    tracing::warn!(%error, "cannot remove a published file's staging name");
                }
                Ok(())
            }
        }
    }
}

/// Unguessable names of 32 hexadecimal digits.
///
/// The staging directory is private and files are created exclusively, so that nothing rests on the
/// names but that they differ.
#[derive(Debug)]
struct Names {
    key: [u8; 32],
    count: AtomicU64,
}

impl Names {
    fn new() -> Self {
        // std seeds each state from the operating system's random source.
        let mut hasher = blake3::Hasher::new();
        for n in 0..4u64 {
            hasher.update(&RandomState::new().hash_one(n).to_le_bytes());
        }
        hasher.update(&std::process::id().to_le_bytes());
        Self {
            key: hasher.finalize().into(),
            count: AtomicU64::new(0),
        }
    }

    fn next(&self) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let mut name = blake3::keyed_hash(&self.key, &count.to_le_bytes())
            .to_hex()
            .to_string();
        name.truncate(NAME_LEN);
        name
    }
}

/// What stands at `name`, not following it; `None` when nothing does.
pub(super) fn look(dir: &Dir, name: impl AsRef<Path>) -> io::Result<Option<Metadata>> {
    match dir.symlink_metadata(name) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Opens a regular file for reading; `None` when it is something else. Never blocks on a FIFO.
pub(super) fn open_file(dir: &Dir, name: &str) -> io::Result<Option<(File, u64)>> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::LOOP | Errno::MLINK | Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then_some((file, metadata.len())))
}

/// Puts the entries of a directory on disk.
pub(super) fn sync_dir(dir: &Dir) -> io::Result<()> {
    Ok(rustix::fs::fsync(dir)?)
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn rename_new(staging: &Dir, staged: &str, dir: &Dir, name: &str) -> Result<(), Errno> {
    rustix::fs::renameat_with(
        staging,
        staged,
        dir,
        name,
        rustix::fs::RenameFlags::NOREPLACE,
    )
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn rename_new(_: &Dir, _: &str, _: &Dir, _: &str) -> Result<(), Errno> {
    Err(Errno::NOSYS)
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM | Errno::MLINK)
    )
}

/// An error while the store is being opened; the caller knows the directory.
fn setup(action: &'static str, cause: io::Error) -> StoreError {
    StoreError::io(action, None, cause, || 0)
}

/// Creates the root where it is missing, so that its own entry is on disk too.
fn create_root(root: &Path) -> io::Result<()> {
    if root.is_dir() {
        return Ok(());
    }
    let missing = root
        .ancestors()
        .take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists())
        .count();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(DIR_MODE)
        .create(root)?;
    for dir in root.ancestors().skip(1).take(missing) {
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

/// Opens a directory of the store's own, made if need be, closed to everybody else.
fn private_dir(parent: &Dir, name: &str) -> Result<Dir, StoreError> {
    let open = || match create_dir(parent, name) {
        Ok(()) => open_dir(parent, name),
        Err(errno) => Err(errno),
    };
    let dir = open().map_err(|e| setup("open the store's own directory", e.into()))?;
    rustix::fs::fchmod(&dir, Mode::from_raw_mode(DIR_MODE))
        .map_err(|e| setup("close the store's own directory to others", e.into()))?;
    Ok(dir)
}

fn create_lock(private: &Dir) -> Result<File, StoreError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let lock = rustix::fs::openat(private, LOCK, flags, Mode::from_raw_mode(FILE_MODE))
        .map_err(|e| setup("open the lock", e.into()))?;
    let lock = File::from(lock);
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => Err(StoreError::Locked),
        Err(std::fs::TryLockError::Error(e)) => Err(setup("lock the directory", e)),
    }
}

/// Opens a directory; `NOTDIR`, or on some systems `LOOP`, when it is a symbolic link.
pub(super) fn open_dir(dir: &Dir, name: impl rustix::path::Arg) -> Result<Dir, Errno> {
    let dir = rustix::fs::openat(dir, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    Ok(Dir::from_std_file(File::from(dir)))
}

/// Makes a directory that only we can enter, whatever the umask; one that is there already stays as
/// it is.
pub(super) fn create_dir(dir: &Dir, name: &str) -> Result<(), Errno> {
    let mut builder = DirBuilder::new();
    builder.mode(DIR_MODE);
    match dir.create_dir_with(name, &builder) {
        Ok(()) => rustix::fs::fchmod(open_dir(dir, name)?, Mode::from_raw_mode(DIR_MODE)),
        Err(e) => match Errno::from_io_error(&e) {
            Some(Errno::EXIST) => Ok(()),
            errno => Err(errno.unwrap_or(Errno::IO)),
        },
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn create_new(dir: &Dir, name: &str) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create_new(true)
        .mode(FILE_MODE);
    let file = dir.open_with(name, &options)?.into_std();
    if file.metadata()?.mode() & 0o7777 != FILE_MODE {
        file.set_permissions(std::fs::Permissions::from_mode(FILE_MODE))?;
    }
    Ok(file)
}

fn count(dir: &Dir, depth: usize) -> io::Result<u64> {
    let mut sum = 0u64;
    for entry in dir.entries()? {
        let name = entry?.file_name();
        let (Some(depth), Ok(metadata)) = (depth.checked_sub(1), dir.symlink_metadata(&name))
        else {
            continue;
        };
        if metadata.is_file() {
            sum = sum.saturating_add(metadata.len());
        } else if metadata.is_dir()
            && !(depth + 1 == COUNT_DEPTH && name == PRIVATE)
            && let Ok(child) = open_dir(dir, &*name)
        {
            sum = sum.saturating_add(count(&child, depth)?);
        }
    }
    Ok(sum)
}

fn is_own(name: &str, prefix: &str, suffix: &str) -> bool {
    let id = name
        .strip_prefix(prefix)
        .and_then(|name| name.strip_suffix(suffix));
    id.is_some_and(|id| {
        id.len() == NAME_LEN && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

const NAME_LEN: usize = 32;
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
