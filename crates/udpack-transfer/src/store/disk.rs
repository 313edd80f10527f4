//! The file system below the store: every call is relative to a directory held open since the
//! start.
//!
//! No call here follows a symbolic link, and none takes more than one path component: with the
//! directories held as descriptors this leaves nothing for a link planted at run time to redirect.

pub(super) mod below;

use std::collections::{HashSet, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use cap_std::fs::{Dir, DirBuilder, DirBuilderExt as _, Metadata, MetadataExt as _};
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT,
};
use rustix::io::Errno;

use super::journal::Key;
use super::quota::{LEAST, charge};
use super::{Changes, Kept, OtherTime, StoreConfig, StoreError, SyncPolicy, Time};
use crate::base::names;
use crate::base::path::RelPath;

/// The store's own directory inside the root; a [`RelPath`] never begins with it.
pub(super) const PRIVATE: &str = crate::base::path::OWN;
const STAGING: &str = "staging";
const JOURNAL: &str = "journal";
const CHANGES: &str = "changes";
const LOCK: &str = "lock";
/// Ends the name of an upload's staging file.
pub(super) const PART: &str = ".part";
/// Ends the name of an upload's journal.
pub(super) const LOG: &str = ".log";
/// Ends the name of a journal that is being rewritten.
const NEW: &str = ".new";
/// Ends the name of a start-up probe in the staging directory.
const PROBE: &str = ".probe";
/// Begins the name of a start-up probe in the root.
const ROOT_PROBE: &str = ".udpack-probe-";
const DIR_MODE: u32 = 0o700;
pub(super) const FILE_MODE: u32 = 0o600;
/// Deepest directory whose files count as used; clients store only above it.
const COUNT_DEPTH: usize = RelPath::MAX_COMPONENTS + 1;
/// Directories remembered as durable before the memory is cleared.
const DURABLE_LIMIT: usize = 65_536;
/// Directories held open because names are looked up in them again and again.
const RECENT: usize = 8;
/// How often an operation is tried again when others take or remove the name at the same moment.
const TRIES: usize = 16;
/// The pause between attempts for a lock that is expected to be released soon.
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Age from which on another process's start-up probe counts as abandoned.
const STALE_PROBE: Duration = Duration::from_secs(60 * 60);

/// The held directories, and the operations between them.
#[derive(Debug)]
pub(super) struct Disk {
    root: Dir,
    staging: Dir,
    journal: Dir,
    /// Device of the staging directory: only there can a file be published.
    device: u64,
    publish: Publish,
    names: Names,
    /// Directories whose own entry is known to be on disk.
    durable: Mutex<HashSet<Id>>,
    /// The directories of recent lookups, by path, the latest first.
    recent: Mutex<VecDeque<(String, Arc<File>)>>,
    /// Whether other processes may use the directory, too.
    shared: bool,
    /// Whether one call can sync the whole file system and reports every failure.
    batches: bool,
    /// How often that call failed; held while it runs.
    losses: Mutex<u64>,
    /// Whether new files get the requested mode.
    exact: bool,
    /// The permission bits that new files in staging can get at creation.
    granted: u32,
    /// The lock file, locked while the store is open. Its modification time is that of the last check of interrupted
    /// uploads.
    lock: File,
    /// The time of the last check, by the wall clock and by the monotonic clock.
    seen: Mutex<(SystemTime, Instant)>,
}

/// Identifies a directory, also when an inode number is reused: device, inode, and birth time if the file system has
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Id(u64, u64, i64, u32);

/// A directory that must be synced because a directory was created in it.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) parent: Dir,
    pub(super) child: Id,
    /// Its path, if it is new.
    pub(super) new: Option<RelPath>,
}

/// The result of locking a staging file.
#[derive(Debug)]
pub(super) enum Lock {
    /// The file is locked, has exactly one name, and has this length in bytes.
    Mine(File, u64),
    Busy,
    Gone,
    /// Not a regular file, or one with another name beside.
    Alien,
}

/// The two directories that hold the uploads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area<'a> {
    staging: &'a Dir,
    journal: &'a Dir,
}

/// The staging directory of the store with this root.
pub(super) fn staging_of(root: &Path) -> PathBuf {
    root.join(PRIVATE).join(STAGING)
}

/// The content of the store's own directory.
#[derive(Debug, Default)]
pub(super) struct Swept {
    /// Interrupted uploads that were removed for their age.
    pub(super) expired: u64,
    /// The interrupted uploads that are left, with the bytes of each. Running ones are not included.
    pub(super) suspended: Vec<(Key, Kept)>,
}

/// The method by which a staged file gets its name without replacing another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Publish {
    Rename,
    LinkThenUnlink,
}

impl Disk {
    /// Opens and locks the directory, removes leftovers of an earlier run except resumable uploads, and checks that
    /// publishing works.
    pub(super) fn open(root: &Path, config: &StoreConfig) -> Result<(Self, Swept), StoreError> {
        create_root(root).map_err(|e| setup("create the directory", e))?;
        let root = open_root(root).map_err(|e| setup("open the directory", e.into()))?;
        let mut tries = TRIES;
        let (lock, staging, journal) = loop {
            // The last other user of a shared directory may be removing it; and a starting process briefly keeps the
            // locks of its parent.
            match private_dirs(&root, config.shared) {
                Err(StoreError::Locked) if tries > 0 => std::thread::sleep(LOCK_PAUSE),
                Err(StoreError::Io { cause, .. })
                    if config.shared && tries > 0 && cause.kind() == io::ErrorKind::NotFound => {}
                opened => break opened?,
            }
            tries -= 1;
        };
        let device = staging
            .dir_metadata()
            .map_err(|e| setup("read the staging directory", e))?
            .dev();
        let seen = lock
            .metadata()
            .and_then(|lock| lock.modified())
            .map_err(|e| setup("read the lock's time", e))?;
        let mut disk = Self {
            seen: Mutex::new((seen, Instant::now())),
            batches: can_batch(&root),
            root,
            staging,
            journal,
            device,
            publish: Publish::Rename,
            names: Names::new(),
            durable: Mutex::default(),
            recent: Mutex::default(),
            shared: config.shared,
            losses: Mutex::default(),
            exact: false,
            granted: 0,
            lock,
        };
        let swept = disk
            .sweep(config.expire, true)
            .map_err(|e| setup("clear the staging directory", e))?;
        disk.publish = disk.probe()?;
        Ok((disk, swept))
    }

    /// The directories of the uploads.
    pub(super) fn area(&self) -> Area<'_> {
        Area {
            staging: &self.staging,
            journal: &self.journal,
        }
    }

    /// The list of changes, made if need be.
    pub(super) fn changes(&self, config: &StoreConfig) -> Result<Changes, StoreError> {
        let opened = open_dir(&self.root, PRIVATE);
        let private = opened.map_err(|e| setup("open the store's own directory", e.into()))?;
        let dir = private_dir(&private, CHANGES)?;
        sync_dir(&private).map_err(|e| setup("sync the store's own directory", e))?;
        let changes = Changes::open(dir, config.sync != SyncPolicy::Never);
        changes.map_err(|e| setup("read the list of changes", e))
    }

    /// Whether one call can sync many files.
    pub(super) fn batches(&self) -> bool {
        self.batches
    }

    /// How often [`sync_all`](Self::sync_all) failed.
    pub(super) fn losses(&self) -> u64 {
        *self.losses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Syncs the whole file system; returns how often that failed before.
    ///
    /// The kernel reports a failure only to one caller, although it may affect the bytes of others. So a file that
    /// was begun when [`losses`](Self::losses) was lower than the returned number must not be reported as stored.
    pub(super) fn sync_all(&self) -> io::Result<u64> {
        let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = sync_file_system(&self.staging) {
            *losses += 1;
            return Err(error);
        }
        Ok(*losses)
    }

    /// Free bytes of the file system for this process.
    pub(super) fn available(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Bytes of the whole file system.
    pub(super) fn capacity(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root)?;
        Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
    }

    /// Creates a staging file that is never resumed. Returns it, open for reading and writing, with its name and its
    /// mode, which is `mode` if new files can get it at creation. Only the store can access its directory.
    pub(super) fn stage(&self, mode: Option<u32>) -> io::Result<(File, String, u32)> {
        let granted = |mode: &u32| mode & !self.granted == 0 && mode & FILE_MODE == FILE_MODE;
        let mode = mode.map(|mode| mode & 0o777).filter(granted);
        let exact = self.exact || mode.is_some();
        let mode = mode.unwrap_or(FILE_MODE);
        for _ in 0..TRIES {
            let name = self.names.next() + PART;
            let file = create_new(&self.staging, &name, mode, exact)?;
            // Another process may have removed it as a leftover before it was locked.
            if !self.shared || (try_lock(&file)? && rustix::fs::fstat(&file)?.st_nlink == 1) {
                return Ok((file, name, mode));
            }
            let _ = self.staging.remove_file(&name);
        }
        Err(Errno::AGAIN.into())
    }

    /// Opens or creates the staging file of this key and locks it; returns it with its length, or `None` if another
    /// upload has it.
    ///
    /// A file with a second name must not be written to, so only this name is removed.
    pub(super) fn stage_keyed(&self, key: &Key) -> io::Result<Option<(File, u64)>> {
        let name = format!("{}{PART}", key.as_str());
        for _ in 0..TRIES {
            match lock_part(&self.staging, &name, OFlags::RDWR | OFlags::CREATE)? {
                Lock::Mine(file, len) => {
                    if !self.exact {
                        file.set_permissions(std::fs::Permissions::from_mode(FILE_MODE))?;
                    }
                    return Ok(Some((file, len)));
                }
                Lock::Busy if self.shared => return Ok(None),
                // No upload holds it: a process is inspecting it, or a starting process still has its lock.
                Lock::Busy => std::thread::sleep(LOCK_PAUSE),
                Lock::Gone => {}
                Lock::Alien => {
                    tracing::warn!(name, "not a staging file, replaced");
                    remove_alien(&self.staging, &name)?;
                }
            }
        }
        Ok(None)
    }

    /// The journal of this key, open for reading and writing; created if `create` is set, otherwise `None` if it is
    /// missing. Anything else of that name is removed.
    pub(super) fn journal(&self, key: &Key, create: bool) -> io::Result<Option<File>> {
        let name = format!("{}{LOG}", key.as_str());
        let access = if create {
            OFlags::RDWR | OFlags::CREATE
        } else {
            OFlags::RDWR
        };
        for _ in 0..TRIES {
            match open_own(&self.journal, &name, access)? {
                Own::Plain(file) => return Ok(Some(file)),
                Own::Gone if !create => return Ok(None),
                Own::Gone => {}
                Own::Alien => {
                    tracing::warn!(name, "not a journal, replaced");
                    remove_alien(&self.journal, &name)?;
                }
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// Creates a journal that will replace this key's.
    pub(super) fn new_journal(&self, key: &Key) -> io::Result<File> {
        let name = format!("{}{NEW}", key.as_str());
        match self.journal.remove_file(&name) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => create_new(&self.journal, &name, FILE_MODE, self.exact),
        }
    }

    /// Replaces this key's journal by the new one.
    pub(super) fn swap_journal(&self, key: &Key) -> io::Result<()> {
        let (new, log) = (
            format!("{}{NEW}", key.as_str()),
            format!("{}{LOG}", key.as_str()),
        );
        Ok(rustix::fs::renameat(
            &self.journal,
            new,
            &self.journal,
            log,
        )?)
    }

    /// Syncs the store's own directories.
    pub(super) fn sync_area(&self) -> io::Result<()> {
        sync_dir(&self.staging)?;
        sync_dir(&self.journal)
    }

    /// Whether there is a staging file of this key.
    pub(super) fn is_staged(&self, key: &Key) -> bool {
        let name = format!("{}{PART}", key.as_str());
        rustix::fs::statat(&self.staging, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Syncs a staged file that is already closed.
    pub(super) fn sync_staged(&self, name: &str) -> io::Result<()> {
        match open_own(&self.staging, name, OFlags::RDONLY)? {
            Own::Plain(file) => file.sync_all(),
            Own::Gone | Own::Alien => Err(io::ErrorKind::NotFound.into()),
        }
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
        let name = names::os(name);
        Ok(rustix::fs::renameat(&self.staging, staged, dir, &*name)?)
    }

    /// The directory that holds `path`, or `None` when it is not there.
    pub(super) fn parent(&self, path: &RelPath) -> Result<Option<Dir>, StoreError> {
        if let Ok(dir) = resolve(&self.root, path.parent(), DIRECTORY) {
            return Ok(Some(Dir::from_std_file(dir)));
        }
        self.walk(path, None)
    }

    /// The directory that holds `path`, created if it is missing, with these modes for the last components.
    /// Directories that must be synced are added to `made`; after syncing them, call
    /// [`made_durable`](Self::made_durable).
    pub(super) fn make_parent(
        &self,
        path: &RelPath,
        modes: &[u32],
        made: &mut Vec<Made>,
    ) -> Result<Dir, StoreError> {
        if let Ok(dir) = resolve(&self.root, path.parent(), DIRECTORY)
            && let dir = Dir::from_std_file(dir)
            && let Ok(id) = id(&dir)
            && id.0 == self.device
            && self.is_durable(&id)
        {
            return Ok(dir);
        }
        let dir = self.walk(path, Some((made, modes)))?;
        dir.ok_or_else(|| self.error("create a directory", path, Errno::NOENT.into()))
    }

    /// A quick check whether the name seems free; false if a full check is needed. A directory that was moved or
    /// removed a moment ago may still be found under its old path, so the result only helps to avoid useless work.
    pub(super) fn seems_vacant(&self, path: &RelPath) -> bool {
        let within = |dir: BorrowedFd<'_>| {
            let name = names::os(path.file_name());
            rustix::fs::statat(dir, &*name, AtFlags::SYMLINK_NOFOLLOW)
        };
        let found = match path.parent() {
            None => within(self.root.as_fd()),
            Some(parent) => self.recent(parent).and_then(|dir| within(dir.as_fd())),
        };
        matches!(found, Err(Errno::NOENT))
    }

    /// The directory of this path, opened now or a moment ago.
    fn recent(&self, path: &str) -> Result<Arc<File>, Errno> {
        let known = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, dir)) = known().iter().find(|(known, _)| known == path) {
            return Ok(dir.clone());
        }
        let dir = Arc::new(resolve(&self.root, Some(path), DIRECTORY | OFlags::PATH)?);
        let mut known = known();
        known.truncate(RECENT - 1);
        known.push_front((path.to_owned(), dir.clone()));
        Ok(dir)
    }

    /// How many directories above `path` are missing; 0 if that cannot be determined, because creating them will
    /// report the error.
    pub(super) fn missing_parents(&self, path: &RelPath) -> usize {
        if resolve(&self.root, path.parent(), DIRECTORY | OFlags::PATH).is_ok() {
            return 0;
        }
        let Ok(mut dir) = self.root.try_clone() else {
            return 0;
        };
        let mut parents = path.parents();
        while let Some(component) = parents.next() {
            dir = match open_dir(&dir, component) {
                Ok(dir) => dir,
                Err(Errno::NOENT) => return 1 + parents.count(),
                Err(_) => return 0,
            };
        }
        0
    }

    /// A quick check whether the name is free; false if a full check is needed.
    pub(super) fn is_vacant(&self, path: &RelPath) -> bool {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        matches!(
            resolve(&self.root, Some(path.as_str()), flags),
            Err(Errno::NOENT)
        )
    }

    fn is_durable(&self, id: &Id) -> bool {
        self.durable
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(id)
    }

    /// Records that the entries of these directories are on disk.
    pub(super) fn made_durable(&self, ids: impl IntoIterator<Item = Id>) {
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            if durable.len() >= DURABLE_LIMIT {
                durable.clear();
            }
            durable.insert(id);
        }
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

    /// Acts as if a sync of the file system had failed.
    #[cfg(test)]
    pub(super) fn lose(&self) {
        *self.losses.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    /// Publishes as on a file system without rename-without-replace.
    #[cfg(test)]
    pub(super) fn publish_by_link(&mut self) {
        self.publish = Publish::LinkThenUnlink;
    }

    /// Opens one directory after the other, creating missing ones if `made` is given.
    fn walk(
        &self,
        path: &RelPath,
        mut made: Option<(&mut Vec<Made>, &[u32])>,
    ) -> Result<Option<Dir>, StoreError> {
        let create = made.is_some();
        let failed = |action, cause| self.error(action, path, cause);
        let mut dir = self
            .root
            .try_clone()
            .map_err(|e| failed("open the root", e))?;
        let mut reached = 0;
        let mut left = path.parents().count();
        for component in path.parents() {
            reached += component.len() + 1;
            let mut new = false;
            let child = match open_dir(&dir, component) {
                Err(Errno::NOENT) if !create => return Ok(None),
                Err(Errno::NOENT) => create_dir(&dir, component).and_then(|made| {
                    new = made;
                    open_dir(&dir, component)
                }),
                opened => opened,
            };
            let child = match child {
                Ok(child) => child,
                // Linux says ENOTDIR for a symbolic link, other systems ELOOP.
                Err(Errno::NOTDIR | Errno::LOOP | Errno::MLINK) => {
                    let parent = path.as_str().get(..reached - 1).unwrap_or_default();
                    let parent = names::shown(parent);
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
            left -= 1;
            let parent = std::mem::replace(&mut dir, child);
            if let Some((made, modes)) = &mut made {
                let mode = modes
                    .len()
                    .checked_sub(left + 1)
                    .and_then(|at| modes.get(at));
                if new && let Some(mode) = mode {
                    let mode = Mode::from_raw_mode((mode & 0o777) | DIR_MODE);
                    rustix::fs::fchmod(&dir, mode)
                        .map_err(|e| failed("set a directory's mode", e.into()))?;
                }
                // Synced even if another upload, or an earlier run, has just created it.
                let child = id(&dir).map_err(|e| failed("read a directory", e))?;
                if new || !self.is_durable(&child) {
                    let path = path.as_str().get(..reached - 1).unwrap_or_default();
                    let new = path.parse().ok().filter(|_| new);
                    made.push(Made { parent, child, new });
                }
            }
        }
        let device = dir
            .dir_metadata()
            .map_err(|e| failed("read a directory", e))?
            .dev();
        if device != self.device {
            return Err(StoreError::OtherDevice);
        }
        Ok(Some(dir))
    }

    /// Removes expired interrupted uploads and, with `start`, other leftovers of an earlier run. Reports and keeps
    /// everything else.
    ///
    /// Without `start`, or in a shared directory, uploads may be running, so locked files stay.
    pub(super) fn sweep(&self, expire: Duration, start: bool) -> io::Result<Swept> {
        self.exclude_downtime(self.unseen())?;
        let mut swept = Swept::default();
        let mut stale = 0u64;
        let alone = start && !self.shared;
        let mut keys = HashSet::new();
        for entry in self.journal.entries()? {
            let name = entry?.file_name();
            let text = name.to_str();
            if let Some(key) = text.and_then(|name| Key::from_name(name, LOG)) {
                keys.insert(key);
            } else if !text.is_some_and(|name| is_own(name, "", NEW)) {
                tracing::warn!(?name, "unknown file in the journal directory, kept");
            } else if alone
                || self
                    .age(&self.journal, &name)
                    .is_some_and(|age| age > expire)
            {
                stale += u64::from(remove(&self.journal, &name));
            }
        }
        for entry in self.staging.entries()? {
            let name = entry?.file_name();
            let text = name.to_str().unwrap_or_default();
            if let Some(key) = Key::from_name(text, PART) {
                if keys.remove(&key) {
                    if let Err(error) = self.sweep_one(key, text, expire, alone, &mut swept) {
                        tracing::warn!(name = text, %error, "cannot look at an interrupted upload");
                    }
                } else if alone {
                    stale += u64::from(remove(&self.staging, &name));
                } else if self.shared
                    && let Ok(_held @ (Lock::Mine(..) | Lock::Alien)) =
                        lock_part(&self.staging, text, OFlags::RDONLY)
                    && matches!(self.area().touched(&key), Ok(None))
                {
                    // It still has no journal, and nobody holds it.
                    stale += u64::from(remove(&self.staging, &name));
                }
            } else if is_own(text, "", PROBE) {
                if alone || self.is_stale_probe(&self.staging, &name) {
                    stale += u64::from(remove(&self.staging, &name));
                }
            } else if start {
                tracing::warn!(?name, "unknown file in the staging directory, kept");
            }
        }
        // Journals without a staging file: the upload was published, or never began to write.
        for key in keys {
            let name = format!("{}{LOG}", key.as_str());
            let old = || {
                let age = self.age(&self.journal, OsStr::new(&name));
                age.is_some_and(|age| age > expire)
            };
            if alone || old() {
                stale += u64::from(remove(&self.journal, OsStr::new(&name)));
            }
        }
        if start {
            for entry in self.root.entries()? {
                let name = entry?.file_name();
                if name
                    .to_str()
                    .is_some_and(|name| is_own(name, ROOT_PROBE, ""))
                    && (alone || self.is_stale_probe(&self.root, &name))
                {
                    remove(&self.root, &name);
                }
            }
        }
        if stale > 0 {
            tracing::info!(files = stale, "removed stale staging files");
        }
        Ok(swept)
    }

    /// How far the wall clock has advanced since the last check without a store observing it: none was open, or the
    /// clock was set. Stores that share a directory continue from the last check of any of them.
    fn unseen(&self) -> Duration {
        let (wall, at) = (SystemTime::now(), Instant::now());
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut last_wall, last_at) = std::mem::replace(&mut *seen, (wall, at));
        if self.shared
            && let Ok(looked) = self.lock.metadata().and_then(|lock| lock.modified())
        {
            last_wall = looked;
        }
        if let Err(error) = self.lock.set_modified(wall) {
            tracing::debug!(%error, "cannot set the lock's time");
        }
        let moved = wall.duration_since(last_wall).unwrap_or_default();
        moved.saturating_sub(at.duration_since(last_at))
    }

    /// Subtracts time that no server observed from the age of interrupted uploads, at most down to zero: uploads age
    /// only while a server runs, so that neither a changed clock nor a long downtime removes a resumable upload.
    fn exclude_downtime(&self, unseen: Duration) -> io::Result<()> {
        let now = SystemTime::now();
        for key in self.area().keys()? {
            let Some(touched) = self.area().touched(&key)? else {
                continue;
            };
            let younger = touched
                .checked_add(unseen)
                .map_or(now, |time| time.min(now));
            if younger == touched {
                continue;
            }
            let name = format!("{}{LOG}", key.as_str());
            if let Own::Plain(file) = open_own(&self.journal, &name, OFlags::RDWR)? {
                file.set_modified(younger)?;
            }
        }
        Ok(())
    }

    /// Checks an upload that has a staging file and a journal.
    fn sweep_one(
        &self,
        key: Key,
        name: &str,
        expire: Duration,
        alone: bool,
        swept: &mut Swept,
    ) -> io::Result<()> {
        let area = self.area();
        match lock_part(&self.staging, name, OFlags::RDONLY)? {
            Lock::Mine(_held, len) => match area.touched(&key)? {
                Some(touched) if age(touched) <= expire => {
                    if area.record(&key)?.is_none() {
                        tracing::warn!(
                            key = key.as_str(),
                            "unreadable journal, kept until it expires"
                        );
                    }
                    let kept = kept(area, &key, len)?;
                    swept.suspended.push((key, kept));
                }
                Some(touched) => {
                    let kept = kept(area, &key, len)?;
                    area.remove(&key)?;
                    tracing::info!(
                        owner = kept.owner,
                        path = kept.path.map(tracing::field::display),
                        bytes = len,
                        hours = age(touched).as_secs() / 3600,
                        "removed an interrupted upload that expired"
                    );
                    swept.expired += 1;
                }
                None => {}
            },
            // Its bytes are published already, or never were an upload's.
            Lock::Alien => {
                if let Err(error) = area.remove(&key) {
                    tracing::warn!(name, %error, "cannot remove a stale staging file");
                }
            }
            // No upload writes it, although another process reads it.
            Lock::Busy if alone => {
                if let Some(held) = area.held(&key)? {
                    let kept = kept(area, &key, held)?;
                    swept.suspended.push((key, kept));
                }
            }
            Lock::Busy | Lock::Gone => {}
        }
        Ok(())
    }

    fn is_stale_probe(&self, dir: &Dir, name: &OsStr) -> bool {
        self.age(dir, name).is_some_and(|age| age > STALE_PROBE)
    }

    /// The time since the last write.
    fn age(&self, dir: &Dir, name: &OsStr) -> Option<Duration> {
        let modified = dir.symlink_metadata(name).ok()?.modified().ok()?;
        Some(age(modified.into_std()))
    }

    /// Tries all steps of publishing once, and determines the method that this file system supports.
    fn probe(&mut self) -> Result<Publish, StoreError> {
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
        &mut self,
        way: Publish,
        staged: &str,
        second: &str,
        target: &str,
    ) -> Result<bool, StoreError> {
        let probe = |name, mode, exact| {
            let made = create_new(&self.staging, name, mode, exact).and_then(|file| {
                let made = file.metadata()?.mode() & 0o7777;
                if made != FILE_MODE {
                    file.set_permissions(std::fs::Permissions::from_mode(FILE_MODE))?;
                }
                file.sync_all()?;
                Ok(made)
            });
            made.map_err(|e| setup("write a probe file", e))
        };
        let exact = probe(staged, FILE_MODE, false)? == FILE_MODE;
        let granted = probe(second, 0o777, true)?;
        self.exact = exact;
        self.granted = if exact && granted <= 0o777 {
            granted
        } else {
            0
        };
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
        let name = &*names::os(name);
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
/// The staging directory is private and files are created exclusively, so the names only need to differ.
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

/// The metadata of `name`, without following a link; `None` if it does not exist.
pub(super) fn look(dir: &Dir, name: &str) -> io::Result<Option<Metadata>> {
    match dir.symlink_metadata(&*names::os(name)) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Opens a regular file for reading; `None` when it is something else. Never blocks on a FIFO.
pub(super) fn open_file(dir: &Dir, name: &str) -> io::Result<Option<(File, Stat)>> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(dir, &*names::os(name), flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::LOOP | Errno::MLINK | Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let stat = rustix::fs::fstat(&file)?;
    let plain = FileType::from_raw_mode(stat.st_mode).is_file();
    Ok(plain.then_some((file, stat)))
}

impl<'a> Area<'a> {
    pub(super) fn new(staging: &'a Dir, journal: &'a Dir) -> Self {
        Self { staging, journal }
    }

    /// The keys of all uploads that have a journal.
    pub(super) fn keys(self) -> io::Result<Vec<Key>> {
        let mut keys = Vec::new();
        for entry in self.journal.entries()? {
            let name = entry?.file_name();
            keys.extend(name.to_str().and_then(|name| Key::from_name(name, LOG)));
        }
        Ok(keys)
    }

    /// Locks the staging file of this key until the file is dropped.
    pub(super) fn lock(self, key: &Key) -> io::Result<Lock> {
        let name = format!("{}{PART}", key.as_str());
        lock_part(self.staging, &name, OFlags::RDONLY)
    }

    /// When the upload was last written to.
    pub(super) fn touched(self, key: &Key) -> io::Result<Option<SystemTime>> {
        let name = format!("{}{LOG}", key.as_str());
        match look(self.journal, &name)? {
            Some(metadata) => Ok(Some(metadata.modified()?.into_std())),
            None => Ok(None),
        }
    }

    /// The content of its journal; `None` if that cannot be read.
    pub(super) fn record(self, key: &Key) -> io::Result<Option<super::journal::Record>> {
        let name = format!("{}{LOG}", key.as_str());
        match open_own(self.journal, &name, OFlags::RDONLY)? {
            Own::Plain(file) => super::journal::read(&file),
            Own::Gone | Own::Alien => Ok(None),
        }
    }

    /// Bytes its staging file holds.
    pub(super) fn held(self, key: &Key) -> io::Result<Option<u64>> {
        let name = format!("{}{PART}", key.as_str());
        Ok(look(self.staging, &name)?.map(|metadata| metadata.len()))
    }

    /// Removes an upload whose staging file is locked: the journal first, because the lock on the staging file
    /// protects it.
    pub(super) fn remove(self, key: &Key) -> io::Result<()> {
        for (dir, suffix) in [(self.journal, LOG), (self.staging, PART)] {
            match dir.remove_file(format!("{}{suffix}", key.as_str())) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes the journal of an upload that is published.
    pub(super) fn forget(self, key: &Key) -> io::Result<()> {
        match self.journal.remove_file(format!("{}{LOG}", key.as_str())) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Only the last user of a shared directory gets the exclusive lock, and only empty directories are removed.
        if self.shared
            && let Ok(true) = try_lock(&self.lock)
            && let Ok(private) = open_dir(&self.root, PRIVATE)
        {
            let staging = private.remove_dir(STAGING);
            let journal = private.remove_dir(JOURNAL);
            if staging.is_ok() && journal.is_ok() && private.remove_file(LOCK).is_ok() {
                let _ = self.root.remove_dir(PRIVATE);
            }
        }
    }
}

/// The store's own directories below `root`; `None` when it never was a store.
pub(super) fn open_area(root: &Path) -> Result<Option<(Dir, Dir)>, StoreError> {
    let failed = |e: Errno| setup("open the store's own directory", e.into());
    let root = open_root(root).map_err(|e| setup("open the directory", e.into()))?;
    let private = match open_dir(&root, PRIVATE) {
        Err(Errno::NOENT) => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    match (open_dir(&private, STAGING), open_dir(&private, JOURNAL)) {
        (Err(Errno::NOENT), _) | (_, Err(Errno::NOENT)) => Ok(None),
        (staging, journal) => Ok(Some((staging.map_err(failed)?, journal.map_err(failed)?))),
    }
}

/// Removes a file of the store; returns whether that worked, and logs a failure.
fn remove(dir: &Dir, name: &OsStr) -> bool {
    match dir.remove_file(name) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            tracing::warn!(?name, %error, "cannot remove a stale staging file");
            false
        }
    }
}

/// The state of an interrupted upload with `held` bytes.
fn kept(area: Area<'_>, key: &Key, held: u64) -> io::Result<Kept> {
    let (owner, path) = match area.record(key)? {
        Some(record) => (record.head.owner, record.head.path.parse().ok()),
        None => (String::new(), None),
    };
    Ok(Kept { owner, path, held })
}

/// The time since then; zero for a time in the future.
pub(super) fn age(time: SystemTime) -> Duration {
    SystemTime::now().duration_since(time).unwrap_or_default()
}

fn is_plain(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode).is_file() && stat.st_nlink == 1
}

/// A file of the store's own.
enum Own {
    Plain(File),
    Gone,
    /// Not a regular file, or one with another name beside.
    Alien,
}

/// Opens a file of the store's own. Never blocks, follows no link.
fn open_own(dir: &Dir, name: &str, access: OFlags) -> io::Result<Own> {
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(FILE_MODE)) {
        Ok(file) if is_plain(&rustix::fs::fstat(&file)?) => Ok(Own::Plain(File::from(file))),
        Ok(_) | Err(Errno::LOOP | Errno::MLINK | Errno::NXIO | Errno::ISDIR) => Ok(Own::Alien),
        Err(Errno::NOENT) => Ok(Own::Gone),
        Err(errno) => Err(errno.into()),
    }
}

/// Removes an entry that blocks a file of the store, unless it is a directory that is not empty.
fn remove_alien(dir: &Dir, name: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => Ok(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?),
        Err(errno) => Err(errno.into()),
    }
}

/// Locks a staging file, and makes sure that it is still the one of that name when it is locked.
fn lock_part(staging: &Dir, name: &str, access: OFlags) -> io::Result<Lock> {
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(staging, name, flags, Mode::from_raw_mode(FILE_MODE)) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(Lock::Gone),
        Err(Errno::LOOP | Errno::MLINK | Errno::NXIO | Errno::ISDIR) => return Ok(Lock::Alien),
        Err(errno) => return Err(errno.into()),
    };
    if !try_lock(&file)? {
        return Ok(Lock::Busy);
    }
    let held = rustix::fs::fstat(&file)?;
    let named = match rustix::fs::statat(staging, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(named) => named,
        Err(Errno::NOENT) => return Ok(Lock::Gone),
        Err(errno) => return Err(errno.into()),
    };
    Ok(
        if (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino) {
            Lock::Gone
        } else if !is_plain(&named) {
            Lock::Alien
        } else {
            Lock::Mine(file, u64::try_from(named.st_size).unwrap_or(0))
        },
    )
}

/// False when another process holds it.
fn try_lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Opens `path` below `root` by one call that follows no link and leaves neither the root nor its file system; `None`
/// is the root itself. An error other than `NOENT` may only mean that a full check is needed.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn resolve(root: &Dir, path: Option<&str>, flags: OFlags) -> Result<File, Errno> {
    use rustix::fs::ResolveFlags;
    let within = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let path = names::os(path.unwrap_or("."));
    let file = rustix::fs::openat2(root, &*path, flags, Mode::empty(), within)?;
    Ok(File::from(file))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn resolve(_: &Dir, _: Option<&str>, _: OFlags) -> Result<File, Errno> {
    Err(Errno::NOSYS)
}

#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn id(dir: &Dir) -> io::Result<Id> {
    use rustix::fs::StatxFlags;
    let wanted = StatxFlags::INO | StatxFlags::BTIME;
    let stat = match rustix::fs::statx(dir, "", AtFlags::EMPTY_PATH, wanted) {
        Ok(stat) => stat,
        Err(Errno::NOSYS) => {
            let metadata = dir.dir_metadata()?;
            return Ok(Id(metadata.dev(), metadata.ino(), 0, 0));
        }
        Err(errno) => return Err(errno.into()),
    };
    let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    let born = stat.stx_btime;
    Ok(Id(device, stat.stx_ino, born.tv_sec, born.tv_nsec))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn id(dir: &Dir) -> io::Result<Id> {
    let metadata = dir.dir_metadata()?;
    Ok(Id(metadata.dev(), metadata.ino(), 0, 0))
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn sync_file_system(dir: &Dir) -> io::Result<()> {
    Ok(rustix::fs::syncfs(dir)?)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn sync_file_system(_: &Dir) -> io::Result<()> {
    Err(Errno::NOSYS.into())
}

/// Whether one call syncs the whole file system and reports every failed write: this needs Linux 5.8 and a local file
/// system.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn can_batch(root: &Dir) -> bool {
    // ext2/3/4, XFS, Btrfs, F2FS, bcachefs, tmpfs
    const LOCAL: [i128; 6] = [
        0xef53,
        0x5846_5342,
        0x9123_683e,
        0xf2f5_2010,
        0xca45_1a4e,
        0x0102_1994,
    ];
    let Ok(release) = std::fs::read_to_string("/proc/sys/kernel/osrelease") else {
        return false;
    };
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|number| number.parse::<u32>().ok());
    let version = (
        numbers.next().unwrap_or_default(),
        numbers.next().unwrap_or_default(),
    );
    version >= (5, 8)
        && rustix::fs::fstatfs(root).is_ok_and(|stat| LOCAL.contains(&i128::from(stat.f_type)))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn can_batch(_: &Dir) -> bool {
    false
}

/// Sets the modification time of a file or a directory; returns the actual time if that differs in its seconds. Lost
/// nanoseconds are not reported.
pub(super) fn set_modified(file: impl AsFd, path: &RelPath, asked: Time) -> Option<OtherTime> {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: asked.secs,
            tv_nsec: asked.nanos.min(999_999_999).into(),
        },
    };
    if let Err(errno) = rustix::fs::futimens(&file, &times) {
        tracing::debug!(%path, secs = asked.secs, %errno, "cannot set the modification time");
    }
    let got = super::meta(&rustix::fs::fstat(&file).ok()?).mtime?;
    (got.secs != asked.secs).then_some(OtherTime { asked, got })
}

/// Gives the room of these bytes of a file back, which are zeros from then on; `false` where the file system cannot.
pub(super) fn punch(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        use rustix::fs::FallocateFlags;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, flags, offset, len) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let _ = (file, offset, len);
        Ok(false)
    }
}

/// Syncs the entries of a directory.
pub(super) fn sync_dir(dir: &Dir) -> io::Result<()> {
    Ok(rustix::fs::fsync(dir)?)
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn rename_new(staging: &Dir, staged: &str, dir: &Dir, name: &OsStr) -> Result<(), Errno> {
    rustix::fs::renameat_with(
        staging,
        staged,
        dir,
        name,
        rustix::fs::RenameFlags::NOREPLACE,
    )
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn rename_new(_: &Dir, _: &str, _: &Dir, _: &OsStr) -> Result<(), Errno> {
    Err(Errno::NOSYS)
}

pub(super) fn is_unsupported(error: &io::Error) -> bool {
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
        Ok(_) => open_dir(parent, name),
        Err(errno) => Err(errno),
    };
    let dir = open().map_err(|e| setup("open the store's own directory", e.into()))?;
    rustix::fs::fchmod(&dir, Mode::from_raw_mode(DIR_MODE))
        .map_err(|e| setup("close the store's own directory to others", e.into()))?;
    Ok(dir)
}

fn open_root(root: &Path) -> Result<Dir, Errno> {
    let root = rustix::fs::open(root, DIRECTORY, Mode::empty())?;
    Ok(Dir::from_std_file(File::from(root)))
}

/// The lock, held, and the directories for staging files and journals.
fn private_dirs(root: &Dir, shared: bool) -> Result<(File, Dir, Dir), StoreError> {
    let private = private_dir(root, PRIVATE)?;
    let lock = create_lock(&private, shared)?;
    let staging = private_dir(&private, STAGING)?;
    let journal = private_dir(&private, JOURNAL)?;
    sync_dir(&private).map_err(|e| setup("sync the store's own directory", e))?;
    Ok((lock, staging, journal))
}

/// Locks the store's own directory: alone, or together with others who share it.
fn create_lock(private: &Dir, shared: bool) -> Result<File, StoreError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let failed = |errno: Errno| setup("open the lock", errno.into());
    let lock =
        rustix::fs::openat(private, LOCK, flags, Mode::from_raw_mode(FILE_MODE)).map_err(failed)?;
    let how = if shared {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(&lock, how) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(StoreError::Locked),
        Err(errno) => return Err(setup("lock the directory", errno.into())),
    }
    if shared {
        // Its last user may have removed it before it was locked.
        let held = rustix::fs::fstat(&lock).map_err(failed)?;
        if held.st_nlink == 0 {
            return Err(failed(Errno::NOENT));
        }
    }
    Ok(File::from(lock))
}

fn open_dir(dir: &Dir, name: &str) -> Result<Dir, Errno> {
    let flags = DIRECTORY | OFlags::NOFOLLOW;
    let dir = rustix::fs::openat(dir, &*names::os(name), flags, Mode::empty())?;
    Ok(Dir::from_std_file(File::from(dir)))
}

/// Creates a directory that only the owner can enter, whatever the umask. An existing one is not changed, and false
/// is returned.
fn create_dir(dir: &Dir, name: &str) -> Result<bool, Errno> {
    let mut builder = DirBuilder::new();
    builder.mode(DIR_MODE);
    match dir.create_dir_with(&*names::os(name), &builder) {
        Ok(()) => {
            rustix::fs::fchmod(open_dir(dir, name)?, Mode::from_raw_mode(DIR_MODE))?;
            Ok(true)
        }
        Err(e) => match Errno::from_io_error(&e) {
            Some(Errno::EXIST) => Ok(false),
            errno => Err(errno.unwrap_or(Errno::IO)),
        },
    }
}

/// Creates a file with this mode; `exact` skips the check of its actual mode.
fn create_new(dir: &Dir, name: &str, mode: u32, exact: bool) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(
        dir,
        name,
        flags,
        Mode::from_raw_mode(mode),
    )?);
    if !exact && file.metadata()?.mode() & 0o7777 != mode {
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    }
    Ok(file)
}

/// Sums up the bytes below `dir` that count against a quota, at most `depth` directories deep. Holds one descriptor
/// for each level.
fn count(dir: &Dir, depth: usize) -> io::Result<u64> {
    let mut sum = 0u64;
    let Some(depth) = depth.checked_sub(1) else {
        return Ok(sum);
    };
    let mut below = Vec::new();
    for entry in dir.entries()? {
        let name = entry?.file_name();
        let Ok(metadata) = dir.symlink_metadata(&name) else {
            continue;
        };
        if depth + 1 == COUNT_DEPTH && name == PRIVATE {
            continue;
        }
        sum = sum.saturating_add(match metadata.is_file() {
            true => charge(metadata.len()),
            false => LEAST,
        });
        if metadata.is_dir() {
            below.push(name);
        }
    }
    for name in below {
        let flags = DIRECTORY | OFlags::NOFOLLOW;
        if let Ok(child) = rustix::fs::openat(dir, Path::new(&name), flags, Mode::empty()) {
            sum = sum.saturating_add(count(&Dir::from_std_file(File::from(child)), depth)?);
        }
    }
    Ok(sum)
}

pub(super) fn is_own(name: &str, prefix: &str, suffix: &str) -> bool {
    let id = name
        .strip_prefix(prefix)
        .and_then(|name| name.strip_suffix(suffix));
    id.is_some_and(|id| {
        id.len() == NAME_LEN && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

pub(super) const NAME_LEN: usize = 32;
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
