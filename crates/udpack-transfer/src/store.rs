//! The store of received files: they are staged in private, and visible only when complete, verified and on disk.
//!
//! A file is written under a random name in `<root>/.udpack/staging` and gets its own name in one atomic step that
//! never replaces another file unless the server grants it. If several uploads have one name, exactly one wins. All
//! work is done below directory handles that are held since [`Store::open`], and no symbolic link is followed.
//!
//! An upload that may be resumed is written under a name made from its owner and path, so that it is found again, and
//! has a journal of what is durable in `<root>/.udpack/journal`. One upload at a time may write such a file: it holds
//! a lock on it. The store never writes to a file that has a second name.
//!
//! The order of durability: the bytes are synced, then recorded in the journal, which is synced, then reported as
//! safe. A complete file is synced, then published, then its directory is synced, then it is reported as stored, then
//! its journal is removed. A failed sync is never tried again: the upload fails.
//!
//! All functions block: call them from a thread that may block. This module knows neither clients nor messages.

mod attributes;
mod changes;
mod disk;
mod error;
mod journal;
mod partial;
mod publish;
mod quota;
pub(crate) mod sink;
mod suspended;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cap_std::fs::Dir;

use crate::base::path::RelPath;
use changes::{Noted, What};
use disk::{Disk, Made};
use journal::Key;
use quota::{Accounts, LEAST, charge};
use rustix::fs::Stat;

pub use attributes::{BadXattrs, Xattr, XattrList, Xattrs};
pub(crate) use attributes::{XATTR_BYTES, XATTRS, read as read_xattrs};
pub use changes::{Change, Changes};
pub use error::StoreError;
pub use partial::{Checkpoint, Partial, Range};
pub use publish::{Complete, Published, Synced};
pub use sink::{
    Abilities, Begun, DiskUpload, Durable, Expected, Memory, MemoryUpload, MemoryWhole, NewDir,
    NewLink, NewUpload, ReadAt, Sink, Stored,
};
pub use suspended::{Suspended, purge, uploads};
pub(crate) use tree::check_target;
pub use tree::{Entry, Kind, List, Page, Placed, Removed};

/// A moment of a file's clock, as seconds and nanoseconds since 1970; before that, `secs` is negative and
/// `nanos` still counts forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Whole seconds since 1970-01-01T00:00:00Z.
    pub secs: i64,
    /// Nanoseconds beyond them, below 1,000,000,000.
    pub nanos: u32,
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Self {
                secs: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                nanos: since.subsec_nanos(),
            },
            Err(before) => {
                let before = before.duration();
                let secs = i64::try_from(before.as_secs()).map_or(i64::MIN, |secs| -secs);
                match before.subsec_nanos() {
                    0 => Self { secs, nanos: 0 },
                    nanos => Self {
                        secs: secs.saturating_sub(1),
                        nanos: 1_000_000_000 - nanos,
                    },
                }
            }
        }
    }
}

/// A modification time that a file system could not hold, and the one that the file has instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OtherTime {
    /// What it should be.
    pub asked: Time,
    /// The time that the file has.
    pub got: Time,
}

/// What a file carries beside its bytes and its name; `None` leaves the store's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// When its bytes were last modified.
    pub mtime: Option<Time>,
    /// Who may do what with it: the lowest nine bits, `0o777`, the others are dropped.
    pub mode: Option<u32>,
}

impl Meta {
    /// What of it a copy gets: all, or without the time the permissions that the mask leaves, or nothing.
    pub(crate) fn kept(self, preserve: bool, umask: Option<u32>) -> Self {
        if preserve {
            return self;
        }
        let mode = self.mode.zip(umask);
        Self {
            mtime: None,
            mode: mode.map(|(mode, umask)| mode & 0o777 & !umask),
        }
    }
}

/// A quota of its own for what one client may store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Where its files lie; `None` for the root.
    pub prefix: Option<RelPath>,
    /// Most bytes of all that is there, counted as for [`StoreConfig::quota`].
    pub quota: u64,
    /// The quota of the client that has let this one in, which counts too.
    pub outer: Option<Box<Self>>,
}

impl Tenant {
    /// Its quota and those that count with it, each with the directory it is for.
    fn quotas(tenant: Option<&Self>) -> impl Iterator<Item = (&Option<RelPath>, u64)> + Clone {
        let all = std::iter::successors(tenant, |one| one.outer.as_deref());
        all.map(|one| (&one.prefix, one.quota))
    }
}

/// What is to be stored.
#[derive(Clone, Copy, Debug)]
pub struct NewFile<'a> {
    /// Its name.
    pub path: &'a RelPath,
    /// The declared size, which is reserved at once; `None` reserves while bytes arrive.
    pub size: Option<u64>,
    /// What to do when the name is taken.
    pub if_exists: IfExists,
    /// Whose upload it is, to be found again after an interruption under this owner and path; `None` for one
    /// that is never resumed.
    pub owner: Option<&'a str>,
    /// The quota it counts against beside the store's own.
    pub tenant: Option<&'a Tenant>,
    /// Permissions for the directories that must be made on the way, the last for the one that holds the file; those
    /// without are their owner's alone. Their owner's own access is never taken.
    pub dirs: &'a [u32],
    /// All of its bytes are here already: a name that turns out to be taken in the end costs no more than that.
    pub whole: bool,
}

/// What a store takes, and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// Largest file, in bytes. Defaults to `None`: the quota and the disk are the limit.
    pub max_file: Option<u64>,
    /// Most bytes of all files below the root together, uploads under way included. A link, a directory and an
    /// empty file count 1,024 bytes each. Defaults to `None`: the disk is the limit.
    ///
    /// Counted when the store is opened and again, at most every half minute, before an upload is
    /// refused for it.
    pub quota: Option<u64>,
    /// Bytes of the file system that uploads leave free. Defaults to `None`: a twentieth of the
    /// file system, or 1 GiB if that is less.
    pub min_free: Option<u64>,
    /// Which names may be stored. Defaults to [`Names::Any`].
    pub names: Names,
    /// What a client may ask for, at most, when the name is taken. Defaults to
    /// [`Overwrite::Never`].
    pub overwrite: Overwrite,
    /// Most interrupted uploads kept of one owner: what is beyond must not be resumable, or wait until some are
    /// resumed, removed or expired. Defaults to 1,024.
    pub max_suspended: usize,
    /// Most uploads open at a time. Defaults to 256; each holds one file descriptor.
    pub max_open: usize,
    /// How long an interrupted upload is kept after its last write, in time during which a store was open here.
    /// Defaults to 24 hours.
    pub expire: Duration,
    /// What is put on disk before a file counts as stored. Defaults to [`SyncPolicy::Auto`].
    pub sync: SyncPolicy,
    /// Which extended attributes files and directories get that come with some. Defaults to [`Xattrs::None`]. No quota
    /// counts the room that they take on the disk.
    pub xattrs: Xattrs,
    /// Whether several processes may use the directory at once, each for itself, as for downloads: then it
    /// is not locked, and the store's own directory goes away with the last of them if nothing is in it.
    /// Defaults to false.
    pub shared: bool,
    /// Whether to keep a list of what has changed, for somebody who carries it elsewhere: [`Store::changes`]. Defaults to
    /// false. Not for a directory that several use.
    pub changes: bool,
}

/// When stored bytes are put on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SyncPolicy {
    /// Before a file is reported as stored; small files in batches, all of a batch by one call.
    #[default]
    Auto,
    /// Before a file is reported as stored, every file by itself.
    Always,
    /// Whenever the operating system chooses: a power cut may cost what was reported as stored.
    Never,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            max_file: None,
            quota: None,
            min_free: None,
            names: Names::Any,
            overwrite: Overwrite::Never,
            max_suspended: 1024,
            max_open: 256,
            expire: Duration::from_secs(24 * 60 * 60),
            sync: SyncPolicy::Auto,
            xattrs: Xattrs::None,
            shared: false,
            changes: false,
        }
    }
}

/// Which names a store takes for what is stored in it. What lies there already is listed, read and removed whatever it
/// is called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Names {
    /// Every [`RelPath`] that the file system can hold.
    #[default]
    Any,
    /// Those that every operating system can hold: see [`RelPath::check_portable`].
    Portable,
}

/// What a server grants to clients whose file's name is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Overwrite {
    /// What is there stays, and the upload is refused.
    #[default]
    Never,
    /// What is there stays, and the upload may get another name.
    Rename,
    /// A client may also replace a file.
    Always,
}

impl fmt::Display for Overwrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Never => "never",
            Self::Rename => "rename",
            Self::Always => "always",
        })
    }
}

/// What a client wants when its file's name is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IfExists {
    /// Success if the file there has the same bytes, an error otherwise.
    #[default]
    Same,
    /// An error.
    Error,
    /// Leave the file there and do not upload.
    Skip,
    /// Replace the file there. Only a regular file is ever replaced.
    Overwrite,
    /// Store under `name (1).ext`, or the first such number that is free.
    Rename,
}

impl IfExists {
    /// The policy with this name on the wire and the command line.
    pub fn from_word(word: &str) -> Option<Self> {
        [
            Self::Same,
            Self::Error,
            Self::Skip,
            Self::Overwrite,
            Self::Rename,
        ]
        .into_iter()
        .find(|policy| policy.to_string() == word)
    }

    /// What a server must grant for this.
    fn needs(self) -> Overwrite {
        match self {
            Self::Same | Self::Error | Self::Skip => Overwrite::Never,
            Self::Rename => Overwrite::Rename,
            Self::Overwrite => Overwrite::Always,
        }
    }
}

impl fmt::Display for IfExists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Same => "same",
            Self::Error => "error",
            Self::Skip => "skip",
            Self::Overwrite => "overwrite",
            Self::Rename => "rename",
        })
    }
}

/// A directory that takes uploads. A cheap clone of one handle.
///
/// The directory is locked until the last clone and the last [`Partial`] are dropped.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

/// What beginning an upload led to.
#[derive(Debug)]
pub enum Begin {
    /// The name can be taken: write the bytes.
    New(Partial),
    /// A regular file has the name, and the client asked for [`IfExists::Same`] or
    /// [`IfExists::Skip`].
    Exists(Existing),
}

/// How full a store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// What is published, as a quota counts it. Counts what was there before only where a quota is set.
    pub used: u64,
    /// Bytes promised to open uploads, written or not.
    pub reserved: u64,
    /// Uploads open.
    pub open: usize,
    /// Bytes of interrupted uploads that are kept to be resumed.
    pub suspended: u64,
}

/// What the file system of a store has, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// For this process to take.
    pub free: u64,
    /// In all.
    pub total: u64,
}

/// What a store keeps when it is closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Interrupted uploads that can be resumed.
    pub uploads: usize,
    /// Bytes that they hold.
    pub bytes: u64,
}

impl Store {
    /// Opens a directory for uploads, making it if it is missing, and removes what uploads cut off
    /// by a crash left in its staging area, but for what can be resumed.
    ///
    /// Fails with [`StoreError::Locked`] when another store uses the directory, and with
    /// [`StoreError::NoAtomicPublish`] or [`StoreError::OtherDevice`] when a trial shows that its
    /// file system cannot keep what a store promises.
    pub fn open(root: impl AsRef<Path>, config: StoreConfig) -> Result<Self, StoreError> {
        let root = root.as_ref();
        let (disk, found) = Disk::open(root, &config)?;
        let setup = |action| move |e| StoreError::io(action, None, e, || 0);
        let min_free = match config.min_free {
            Some(bytes) => bytes,
            None => GIB.min(
                disk.capacity()
                    .map_err(setup("read the size of the file system"))?
                    / 20,
            ),
        };
        let used = match config.quota {
            Some(_) => Some(disk.used_below(None).map_err(setup("count the files"))?),
            None => None,
        };
        let noted = match &config.changes {
            true => Some(disk.changes(&config)?),
            false => None,
        };
        let state = Mutex::new(State {
            accounts: Accounts::new(used),
            unwritten: 0,
            open: 0,
            live: HashSet::new(),
            suspended: found.suspended.into_iter().collect(),
        });
        Ok(Self {
            inner: Arc::new(Inner {
                disk,
                changes: noted,
                config,
                min_free,
                root: root.to_owned(),
                state,
                replacing: Mutex::new(()),
                taken: AtomicU32::new(0),
                files: AtomicU64::new(0),
                bytes: AtomicU64::new(0),
            }),
        })
    }

    /// The directory as it was given to [`Store::open`], for showing. It may since have been moved;
    /// the store stays with it.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Where its staging files lie.
    pub(crate) fn staging(&self) -> PathBuf {
        disk::staging_of(&self.inner.root)
    }

    /// What the store was opened with.
    pub fn config(&self) -> &StoreConfig {
        &self.inner.config
    }

    /// What has changed, if [`StoreConfig::changes`] asks for that.
    pub fn changes(&self) -> Option<&Changes> {
        self.inner.changes.as_ref()
    }

    /// Removes interrupted uploads that were not resumed in [`StoreConfig::expire`], and says how many.
    ///
    /// Call it every now and then; opening the store does the same once.
    pub fn sweep(&self) -> io::Result<u64> {
        let swept = self.inner.disk.sweep(self.inner.config.expire, false)?;
        if swept.expired > 0 {
            tracing::info!(
                files = swept.expired,
                "removed interrupted uploads that expired"
            );
        }
        self.inner.recount_suspended();
        Ok(swept.expired)
    }

    /// Checks that a file may be stored and opens its staging file, or takes up the one that an interrupted
    /// upload of the same owner and path left. Nothing is written before every check has passed.
    ///
    /// The checks, in this order: the server grants `if_exists`; the size is within the limit; not
    /// too many uploads are open; the name is free, or the policy says what then; no other upload of this owner
    /// writes the file ([`StoreError::Busy`]); the quota and the disk have room. For an upload without an owner the
    /// name may be looked up in a directory that was replaced a moment ago: then the end finds it taken.
    pub fn begin(&self, new: &NewFile<'_>) -> Result<Begin, StoreError> {
        self.begin_with(new, None)
    }

    /// As [`begin`](Self::begin), of a file that most likely gets this mode in the end: one that is never resumed has it from
    /// the beginning, where that costs no call.
    pub(crate) fn begin_with(
        &self,
        new: &NewFile<'_>,
        mode: Option<u32>,
    ) -> Result<Begin, StoreError> {
        let inner = &self.inner;
        let NewFile {
            path,
            size,
            if_exists,
            owner,
            ..
        } = *new;
        inner.check_name(path)?;
        inner.check_policy(if_exists)?;
        let limit = inner.max_file();
        if let Some(size) = size.filter(|size| *size > limit) {
            return Err(StoreError::TooLarge { size, limit });
        }
        let mut reservation = Reservation::open(inner, new)?;
        // What is always sent whole loses nothing when only its end finds the name taken.
        let decided_late = owner.is_none() && if_exists != IfExists::Skip;
        let unlooked = decided_late && new.whole && !inner.expects_taken();
        if !(unlooked || decided_late && inner.disk.seems_vacant(path))
            && let Some(existing) = inner.occupant(path, if_exists)?
        {
            inner.expect_taken_names();
            return Ok(Begin::Exists(existing));
        }
        if if_exists == IfExists::Overwrite
            && let Some(size) = inner.replaceable(path)
        {
            reservation.replaces(charge(size));
        }
        let key = owner.map(|owner| Key::new(owner, path));
        if let (Some(owner), Some(key)) = (owner, &key) {
            let (state, limit) = (inner.state(), inner.config.max_suspended);
            if !state.suspended.contains_key(key) && state.keeps(owner, limit) {
                return Err(StoreError::TooManySuspended { limit });
            }
        }
        if let Some(key) = &key
            && !reservation.adopt(key)
        {
            return Err(StoreError::Busy { path: path.clone() });
        }
        match Partial::begin(new, mode, key, reservation) {
            // What is there needs no room.
            Err(error) if unlooked => match inner.occupant(path, if_exists)? {
                Some(existing) => Ok(Begin::Exists(existing)),
                None => Err(error),
            },
            begun => Ok(Begin::New(begun?)),
        }
    }

    /// Gives whole files their names and puts them on disk together: the outcomes in the order of `batch`.
    ///
    /// Success means that file, name and directories survive a power cut, as far as
    /// [`StoreConfig::sync`] asks for that. On an error nothing is visible under the name, but for one case:
    /// when the very last step, syncing the directory, fails, the complete file may be there.
    ///
    /// Where the name was taken meanwhile, the policy given at the start decides; after [`IfExists::Skip`]
    /// size and hash are those of the file that has it. Looking at an existing file reads all of it.
    pub fn publish(&self, batch: Vec<Complete>) -> Vec<Result<Published, StoreError>> {
        let outcomes = publish::publish(&self.inner, batch);
        for published in outcomes
            .iter()
            .flatten()
            .filter(|published| !published.same)
        {
            self.inner.files.fetch_add(1, Ordering::Relaxed);
            self.inner
                .bytes
                .fetch_add(published.size, Ordering::Relaxed);
        }
        outcomes
    }

    /// Files and bytes that were stored since the store was opened, but for those that were there already.
    pub fn stored(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (count(&self.inner.files), count(&self.inner.bytes))
    }

    /// What of this quota is taken: by files, uploads under way and interrupted ones. `None` before the files were counted,
    /// which the first upload under the quota does.
    pub fn used(&self, tenant: &Tenant) -> Option<u64> {
        let state = self.inner.state();
        let prefix = &tenant.prefix;
        let files = state.accounts.counted(prefix)?;
        let promised = state.accounts.reserved(prefix);
        Some(
            files
                .saturating_add(promised)
                .saturating_add(state.suspended(prefix)),
        )
    }

    /// What its file system has. Blocks as long as that takes to answer.
    ///
    /// # Errors
    /// When the file system does not say.
    pub fn space(&self) -> io::Result<Space> {
        let disk = &self.inner.disk;
        Ok(Space {
            free: disk.available()?,
            total: disk.capacity()?,
        })
    }

    /// Waits until nothing else holds this store, at most so long, then lets go of its directory, and says what is kept
    /// there for later: for a program that ends, as what is dropped of its transfers is put aside beside it.
    ///
    /// # Drop
    /// Dropping the future lets go without waiting.
    pub async fn close(self, within: Duration) -> Left {
        let deadline = Instant::now() + within;
        while Arc::strong_count(&self.inner) > 1 && Instant::now() < deadline {
            tokio::time::sleep(CLOSE_LOOKS).await;
        }
        let state = self.inner.state();
        Left {
            uploads: state.suspended.len(),
            bytes: state.suspended(&None),
        }
    }

    /// Bytes that a client of this quota, and of those that count with it, may still store. The space on the disk is another
    /// matter. Blocks: files are counted where that was not done lately.
    ///
    /// # Errors
    /// When the files cannot be counted.
    pub fn left(&self, tenant: &Tenant) -> Result<u64, StoreError> {
        self.inner.left(tenant)
    }

    /// How full the store is now.
    pub fn usage(&self) -> Usage {
        let state = self.inner.state();
        Usage {
            used: state.accounts.used(&None),
            reserved: state.accounts.reserved(&None),
            open: state.open,
            suspended: state.suspended(&None),
        }
    }
}

/// A published file that has the name an upload asked for, held open: what happens to the name does
/// not change what is read.
#[derive(Debug)]
pub struct Existing {
    inner: Arc<Inner>,
    path: RelPath,
    dir: Dir,
    file: File,
    len: u64,
    meta: Meta,
}

impl Existing {
    /// The file itself, open for reading.
    pub(crate) fn into_file(self) -> File {
        self.file
    }

    /// Its name.
    pub fn path(&self) -> &RelPath {
        &self.path
    }

    /// Its size in bytes, when it was opened.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a file's size, not a collection's"
    )]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Its modification time and mode, when it was opened.
    pub fn meta(&self) -> Meta {
        self.meta
    }

    /// BLAKE3 of its bytes, which are only read. Calls `progress` with the bytes read so far, after every
    /// read.
    pub fn fingerprint(&self, progress: &mut dyn FnMut(u64)) -> Result<[u8; 32], StoreError> {
        hash_file(&self.file, progress).map_err(|e| {
            self.inner
                .disk
                .error("read an existing file", &self.path, e)
        })
    }

    /// Reads into `buf` from `offset` on; 0 at the end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    /// Whether size, modification time and mode are still those it was opened with.
    pub fn unchanged(&self) -> bool {
        rustix::fs::fstat(&self.file)
            .is_ok_and(|stat| size(&stat) == self.len && meta(&stat) == self.meta)
    }

    /// BLAKE3 of its bytes. Calls `progress` with the bytes read so far, after every read.
    ///
    /// When this returns, the file and its name are on disk, also if whoever put it there did not
    /// see to that: an equal file may be reported as stored.
    pub fn hash(&self, progress: &mut dyn FnMut(u64)) -> Result<[u8; 32], StoreError> {
        let failed = |action| move |e| self.inner.disk.error(action, &self.path, e);
        let hash = hash_file(&self.file, progress).map_err(failed("read an existing file"))?;
        if self.inner.config.sync != SyncPolicy::Never {
            self.file
                .sync_all()
                .map_err(failed("sync an existing file"))?;
            disk::sync_dir(&self.dir).map_err(failed("sync a directory"))?;
        }
        Ok(hash)
    }
}

/// What all clones and open uploads share.
#[derive(Debug)]
struct Inner {
    disk: Disk,
    /// Where changes are noted.
    changes: Option<Changes>,
    config: StoreConfig,
    min_free: u64,
    root: PathBuf,
    state: Mutex<State>,
    /// Held from the look at what has a name until it is replaced or removed, so that each file is counted out once.
    replacing: Mutex<()>,
    /// Files for which it still pays to look whether their names are taken before they are written.
    taken: AtomicU32,
    files: AtomicU64,
    bytes: AtomicU64,
}

#[derive(Debug)]
struct State {
    accounts: Accounts,
    /// The part of what is promised to uploads that the file system does not yet count as taken.
    unwritten: u64,
    open: usize,
    /// Resumable uploads under way, which nobody else may begin.
    live: HashSet<Key>,
    /// Interrupted uploads.
    suspended: HashMap<Key, Kept>,
}

/// An interrupted upload.
#[derive(Debug)]
struct Kept {
    /// Whose it is; empty when its journal cannot be read.
    owner: String,
    /// Where it is to go; `None` when its journal cannot be read.
    path: Option<RelPath>,
    /// Bytes it holds.
    held: u64,
}

impl State {
    /// Bytes held by interrupted uploads to below the prefix.
    fn suspended(&self, prefix: &Option<RelPath>) -> u64 {
        let below = self.suspended.values().filter(|kept| match &kept.path {
            Some(path) => quota::is_below(path, prefix),
            None => prefix.is_none(),
        });
        below.fold(0, |sum, kept| sum.saturating_add(kept.held))
    }

    /// Whether this owner has this many interrupted uploads.
    fn keeps(&self, owner: &str, limit: usize) -> bool {
        self.suspended.len() >= limit
            && self
                .suspended
                .values()
                .filter(|kept| kept.owner == owner)
                .count()
                >= limit
    }
}

impl Inner {
    /// Notes, where changes are noted, that this is about to happen to the name; durable with the next
    /// [`sync_changes`](Self::sync_changes).
    fn note(&self, path: &RelPath, what: What) -> Result<Option<Noted>, StoreError> {
        let noted = self.changes.as_ref().map(|it| it.note(path, what));
        let failed = |e| self.disk.error("note a change", path, e);
        noted.transpose().map_err(failed)
    }

    /// Puts what was noted on disk, before it happens.
    fn sync_changes(&self, path: &RelPath) -> Result<(), StoreError> {
        let synced = self.changes.as_ref().map_or(Ok(()), Changes::sync);
        synced.map_err(|e| self.disk.error("note a change", path, e))
    }

    fn replacing(&self) -> MutexGuard<'_, ()> {
        self.replacing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock, and each change leaves the numbers consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name was taken; others will be.
    fn expect_taken_names(&self) {
        self.taken.store(LOOKS, Ordering::Relaxed);
    }

    /// Whether names were taken lately; counts the files that are looked up for it.
    fn expects_taken(&self) -> bool {
        let one_less = |left: u32| left.checked_sub(1);
        self.taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
            .is_ok()
    }

    fn max_file(&self) -> u64 {
        const OFFSET_MAX: u64 = i64::MAX.unsigned_abs();
        self.config.max_file.unwrap_or(OFFSET_MAX).min(OFFSET_MAX)
    }

    fn check_name(&self, path: &RelPath) -> Result<(), StoreError> {
        match self.config.names {
            Names::Any => Ok(()),
            Names::Portable => Ok(path.check_portable()?),
        }
    }

    fn check_policy(&self, asked: IfExists) -> Result<(), StoreError> {
        let granted = self.config.overwrite;
        if asked.needs() > granted {
            return Err(StoreError::Forbidden { asked, granted });
        }
        Ok(())
    }

    /// Checks that `need` more bytes may be stored, of which `held` are on the disk already, and says
    /// how many may be, with the lock held so that they can be taken. `credit` are bytes that take no room of a quota:
    /// those of a file that goes for them.
    fn room(
        &self,
        need: u64,
        held: u64,
        credit: u64,
        tenant: Option<&Tenant>,
    ) -> Result<(MutexGuard<'_, State>, u64), StoreError> {
        let store = self.config.quota.map(|quota| (&None, quota));
        let quotas = store.into_iter().chain(Tenant::quotas(tenant));
        self.count(quotas.clone(), need.saturating_sub(credit))?;
        let state = self.state();
        let mut room = u64::MAX;
        for (prefix, quota) in quotas {
            let left = state
                .accounts
                .left(prefix, quota.saturating_sub(state.suspended(prefix)))
                .saturating_add(credit);
            if left < need {
                return Err(StoreError::Quota { need, left, quota });
            }
            room = room.min(left);
        }
        let available = self
            .disk
            .available()
            .map_err(|e| StoreError::io("read the free space", None, e, || 0))?;
        let free = available.saturating_sub(state.unwritten);
        let keep = self.min_free;
        let need = need - held;
        if free < keep.saturating_add(need) {
            return Err(StoreError::NoSpace { free, keep, need });
        }
        Ok((state, room.min((free - keep).saturating_add(held))))
    }

    /// Counts the files that these quotas are for, where that must be before `need` more bytes are refused.
    fn count<'a>(
        &self,
        quotas: impl Iterator<Item = (&'a Option<RelPath>, u64)>,
        need: u64,
    ) -> Result<(), StoreError> {
        for (prefix, quota) in quotas {
            let mut state = self.state();
            let quota = quota.saturating_sub(state.suspended(prefix));
            let Some(before) = state.accounts.begin_count(prefix, quota, need) else {
                continue;
            };
            drop(state);
            // Files may have been removed behind our back. The walk takes its time, so others go
            // on meanwhile.
            let counted = self
                .disk
                .used_below(prefix.as_ref())
                .map_err(|e| StoreError::io("count the files", None, e, || 0))?;
            self.recount_suspended();
            self.state().accounts.end_count(prefix, before, counted);
        }
        Ok(())
    }

    /// Bytes that a client of these quotas may still store.
    fn left(&self, tenant: &Tenant) -> Result<u64, StoreError> {
        let quotas = Tenant::quotas(Some(tenant));
        self.count(quotas.clone(), 1)?;
        let state = self.state();
        let left = quotas.map(|(prefix, quota)| {
            let quota = quota.saturating_sub(state.suspended(prefix));
            state.accounts.left(prefix, quota)
        });
        Ok(left.min().unwrap_or(u64::MAX))
    }

    /// What had this name, and what was in it, is gone: it counted `bytes`.
    fn removed(&self, path: &RelPath, bytes: u64) {
        self.state().accounts.removed(path, bytes);
    }

    /// The directory that is to hold `path`, made if need be, and counted.
    fn make_parent(
        &self,
        path: &RelPath,
        modes: &[u32],
        made: &mut Vec<Made>,
    ) -> Result<Dir, StoreError> {
        let before = made.len();
        let dir = self.disk.make_parent(path, modes, made);
        let new = made
            .iter()
            .skip(before)
            .filter_map(|made| made.new.as_ref());
        let mut new = new.peekable();
        if new.peek().is_some() {
            let mut state = self.state();
            new.for_each(|new| state.accounts.added(new, LEAST));
        }
        dir
    }

    /// What the directories count that must be made for this name; 0 where no quota counts them.
    fn parents_charge(&self, path: &RelPath, tenant: Option<&Tenant>) -> u64 {
        if self.config.quota.is_none() && tenant.is_none() {
            return 0;
        }
        // The directory of the tenant itself is not below it.
        let prefix = tenant.and_then(|tenant| tenant.prefix.as_ref());
        let above = prefix.map_or(0, |prefix| prefix.components().count());
        let most = path.parents().count().saturating_sub(above);
        LEAST.saturating_mul(self.disk.missing_parents(path).min(most) as u64)
    }

    /// The upload of this key could not be taken up: what it holds stays as it was.
    fn abandon(&self, key: &Key, held: u64, new: &NewFile<'_>) {
        let mut state = self.state();
        state.live.remove(key);
        if held > 0 {
            let kept = Kept {
                owner: new.owner.unwrap_or_default().to_owned(),
                path: Some(new.path.clone()),
                held,
            };
            state.suspended.insert(key.clone(), kept);
        }
    }

    /// The size of the regular file that has the name, if one has.
    fn replaceable(&self, path: &RelPath) -> Option<u64> {
        let dir = self.disk.parent(path).ok()??;
        let there = disk::look(&dir, path.file_name()).ok()??;
        there.is_file().then(|| there.len())
    }

    /// Forgets interrupted uploads that another process removed.
    fn recount_suspended(&self) {
        let known: Vec<Key> = self.state().suspended.keys().cloned().collect();
        let gone = known.iter().filter(|key| !self.disk.is_staged(key));
        let gone: Vec<&Key> = gone.collect();
        let mut state = self.state();
        for key in gone {
            // One that came back meanwhile is counted when it is interrupted again.
            state.suspended.remove(key);
        }
    }

    /// What stands in the way of an upload: `None` when nothing does, or nothing the policy cannot
    /// deal with at the end.
    fn occupant(
        self: &Arc<Self>,
        path: &RelPath,
        if_exists: IfExists,
    ) -> Result<Option<Existing>, StoreError> {
        if self.disk.is_vacant(path) {
            return Ok(None);
        }
        let Some(dir) = self.disk.parent(path)? else {
            return Ok(None);
        };
        let Some(metadata) = disk::look(&dir, path.file_name())
            .map_err(|e| self.disk.error("look up a name", path, e))?
        else {
            return Ok(None);
        };
        match if_exists {
            IfExists::Rename => return Ok(None),
            IfExists::Overwrite if metadata.is_file() => return Ok(None),
            IfExists::Same | IfExists::Skip if metadata.is_file() => {}
            IfExists::Same | IfExists::Skip | IfExists::Overwrite | IfExists::Error => {
                return Err(StoreError::Exists { path: path.clone() });
            }
        }
        self.open_existing(path, &dir)
    }

    /// Opens the regular file that has the name; `None` when it is gone by now.
    fn open_existing(
        self: &Arc<Self>,
        path: &RelPath,
        dir: &Dir,
    ) -> Result<Option<Existing>, StoreError> {
        let failed = |e| self.disk.error("open an existing file", path, e);
        match disk::open_file(dir, path.file_name()) {
            Ok(Some((file, stat))) => {
                let dir = dir.try_clone().map_err(failed)?;
                Ok(Some(Existing {
                    inner: Arc::clone(self),
                    path: path.clone(),
                    dir,
                    file,
                    len: size(&stat),
                    meta: meta(&stat),
                }))
            }
            Ok(None) => Err(StoreError::Exists { path: path.clone() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            // It cannot be compared, yet it is there.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                Err(StoreError::Exists { path: path.clone() })
            }
            Err(e) => Err(failed(e)),
        }
    }
}

/// One upload's share of the store's room and of its places. Gives both back on drop.
#[derive(Debug)]
struct Reservation {
    inner: Arc<Inner>,
    tenant: Option<Tenant>,
    /// Whose upload it is, when it can be resumed.
    owner: Option<Box<str>>,
    /// Its number in the accounts.
    upload: u64,
    bytes: u64,
    /// Of those, what the directories count that must be made for it.
    parents: u64,
    unwritten: u64,
    /// It counts as open.
    open: bool,
    /// Bytes that an interrupted upload held, which this one takes up: they are on disk already.
    held: u64,
}

impl Reservation {
    fn open(inner: &Arc<Inner>, new: &NewFile<'_>) -> Result<Self, StoreError> {
        let limit = inner.config.max_open;
        let mut state = inner.state();
        if state.open >= limit {
            return Err(StoreError::TooManyUploads { limit });
        }
        state.open += 1;
        Ok(Self {
            inner: Arc::clone(inner),
            tenant: new.tenant.cloned(),
            owner: new.owner.map(Into::into),
            upload: state.accounts.open(new.path),
            bytes: 0,
            parents: 0,
            unwritten: 0,
            open: true,
            held: 0,
        })
    }

    /// Takes over what an interrupted upload holds; false when one of this key is under way.
    fn adopt(&mut self, key: &Key) -> bool {
        let mut state = self.inner.state();
        let free = state.live.insert(key.clone());
        if free {
            self.held = state.suspended.remove(key).map_or(0, |kept| kept.held);
        }
        free
    }

    /// The upload is interrupted: what it holds counts as that from now on.
    fn suspend(self, key: Key, held: u64) {
        let mut state = self.inner.state();
        let kept = Kept {
            owner: self.owner.as_deref().unwrap_or_default().to_owned(),
            path: state.accounts.path(self.upload),
            held,
        };
        state.suspended.insert(key, kept);
    }

    /// The upload is to replace a file of this size.
    fn replaces(&self, size: u64) {
        self.inner.state().accounts.replaces(self.upload, size);
    }

    /// Gives the place among the open uploads back before the bytes.
    fn leave(&mut self) {
        if std::mem::take(&mut self.open) {
            let mut state = self.inner.state();
            state.open = state.open.saturating_sub(1);
        }
    }

    /// Reserves what a file of this size counts, and the directories that must be made for it. Of one of unknown size,
    /// what was there before, and something in any case: a full quota takes no file at all.
    fn begin(&mut self, path: &RelPath, size: Option<u64>, kept: u64) -> Result<(), StoreError> {
        self.parents = self.inner.parents_charge(path, self.tenant.as_ref());
        let need = size.map_or_else(|| kept.max(1), charge);
        self.reserve(need.saturating_add(self.parents), 0)
    }

    /// Reserves for a file that has grown to so many bytes, and `spare` beyond them if there is room.
    fn grow(&mut self, size: u64, spare: u64) -> Result<(), StoreError> {
        let need = size.saturating_add(self.parents);
        match need.checked_sub(self.bytes) {
            Some(more) if more > 0 => self.reserve(more, spare),
            _ => Ok(()),
        }
    }

    /// Reserves `need` more bytes, and `spare` beyond them if there is room.
    fn reserve(&mut self, need: u64, spare: u64) -> Result<(), StoreError> {
        let held = std::mem::take(&mut self.held).min(need);
        let credit = self.inner.state().accounts.credit(self.upload);
        let tenant = self.tenant.as_ref();
        let (mut state, room) = self.inner.room(need, held, credit, tenant)?;
        let taken = need.saturating_add(spare).min(room);
        state.accounts.promise(self.upload, taken);
        state.unwritten = state.unwritten.saturating_add(taken);
        self.bytes += taken;
        self.unwritten += taken;
        Ok(())
    }

    /// `held` of the reserved bytes are on the file system already.
    fn is_on_disk(&mut self, held: u64) {
        let mut state = self.inner.state();
        let unwritten = self.bytes.saturating_sub(held);
        state.unwritten = state
            .unwritten
            .saturating_sub(self.unwritten)
            .saturating_add(unwritten);
        self.unwritten = unwritten;
    }

    /// `len` of the reserved bytes are on the file system now.
    fn wrote(&mut self, len: u64) {
        let len = len.min(self.unwritten);
        self.unwritten -= len;
        let mut state = self.inner.state();
        state.unwritten = state.unwritten.saturating_sub(len);
    }

    /// The upload's `size` bytes are published; what went for it counted `replaced`.
    fn commit(&self, size: u64, replaced: u64) {
        let mut state = self.inner.state();
        state
            .accounts
            .published(self.upload, charge(size), replaced);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.leave();
        let mut state = self.inner.state();
        state.accounts.close(self.upload);
        state.unwritten = state.unwritten.saturating_sub(self.unwritten);
    }
}

fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn meta(stat: &Stat) -> Meta {
    Meta {
        mtime: Some(Time {
            secs: stat.st_mtime,
            nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        }),
        mode: Some(stat.st_mode & 0o777),
    }
}

pub(crate) fn hash_file(file: &File, progress: &mut dyn FnMut(u64)) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut offset = 0;
    loop {
        match file.read_at(&mut buffer, offset) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(len) => {
                hasher.update(buffer.get(..len).unwrap_or_default());
                offset += len as u64;
                progress(offset);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Files that are looked up before they are written once a name was taken: what is sent again comes in thousands.
const LOOKS: u32 = 1_024;
const GIB: u64 = 1 << 30;
/// How often a store that is closed looks whether it is still in use.
const CLOSE_LOOKS: Duration = Duration::from_millis(5);
