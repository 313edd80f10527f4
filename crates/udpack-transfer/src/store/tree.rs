//! The tree of a store: stat, list in pages, read, remove, and the creation of directories and links.
//!
//! As everywhere in a store, no symbolic link is followed: a name below one does not exist. All entries except the
//! store's own are listed, so that everything that is removed with its directory was visible before. Entries that are
//! neither file, directory nor link are [`Kind::Other`], and a directory whose content cannot be listed is
//! [`unread`](Entry::unread).

use std::collections::BinaryHeap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;

use cap_std::fs::{Dir, Metadata, MetadataExt as _};
use rustix::io::Errno;

use super::changes::{Noted, What};
use super::disk::below;
use super::disk::{self, PRIVATE};
use super::quota::{LEAST, charge};
use super::{
    Existing, IfExists, Inner, Meta, NewDir, NewLink, OtherTime, Store, StoreError, Tenant, Time,
    XattrList, attributes,
};
use crate::base::names;
use crate::base::path::{PathRule, RelPath};

/// An entry of a store, at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its path from the store's root, in its [text form](crate::base::names); empty for the root itself.
    pub path: String,
    /// The kind of the entry.
    pub kind: Kind,
    /// Bytes of a file; 0 for everything else.
    pub size: u64,
    /// When its content changed last.
    pub mtime: Time,
    /// Its permission bits, those of 0o777.
    pub mode: u32,
    /// The target of a link. `None` for a link that [`Store::make_link`] would not create: its target on the server
    /// is not revealed.
    pub target: Option<String>,
    /// Whether a list lacks entries of this directory: the server may not read it, or they are too deep to have a
    /// path.
    pub unread: bool,
}

/// The kind of an entry in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
    /// A device, a socket, a named pipe, or an entry that the server may not stat. It can only be listed and removed.
    Other,
}

/// Which entries to list.
#[derive(Clone, Copy, Debug, Default)]
pub struct List<'a> {
    /// The directory; `None` is the root. A file or a link is listed as itself.
    pub path: Option<&'a RelPath>,
    /// Whether entries of the directories below are listed, too.
    pub recursive: bool,
    /// The path of the last entry of the previous page. The entry need not exist any more.
    pub after: Option<&'a str>,
    /// The most entries in the page; values are limited to 1 to 4,000.
    pub limit: usize,
}

/// Some entries: depth first, each directory before what is in it, the names in a directory in the
/// order of their bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// The entries; empty only on the last page.
    pub entries: Vec<Entry>,
    /// Whether more entries may follow.
    pub more: bool,
}

/// The result of creating a directory or a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Whether it existed already.
    pub same: bool,
    /// Its actual modification time, if the file system cannot hold the requested second.
    pub other_time: Option<OtherTime>,
    /// How many of the extended attributes that came with a directory were stored.
    pub xattrs: u32,
}

/// The number of removed entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Entries other than directories.
    pub files: u64,
    /// Bytes of the regular files among them.
    pub bytes: u64,
}

impl Store {
    /// The entry of this name; `None` is the root.
    ///
    /// Fails with [`StoreError::NotFound`].
    pub fn stat(&self, path: Option<&RelPath>) -> Result<Entry, StoreError> {
        let inner = &self.inner;
        let Some(path) = path else {
            let root = inner.disk.root().and_then(|root| root.dir_metadata());
            let root = root.map_err(|e| StoreError::io("read the root", None, e, || 0))?;
            return Ok(Entry::new(String::new(), Kind::Dir, &root, None));
        };
        Ok(inner.find(path)?.1)
    }

    /// One page of the entries below a directory.
    ///
    /// Costs one reading of each directory on the way to [`List::after`] and of each one in the
    /// page, and memory for one page. What appears or vanishes between two pages may be missed or
    /// not; nothing is listed twice. A directory below that the server may not read is listed
    /// without content, as [`unread`](Entry::unread).
    pub fn list(&self, query: &List<'_>) -> Result<Page, StoreError> {
        let inner = &self.inner;
        let after = query.after.filter(|after| !after.is_empty());
        let after: Option<RelPath> = after.map(str::parse).transpose()?;
        let mut start = Start::new(query.path, after.as_ref());
        let dir = match query.path {
            None => inner.disk.root(),
            Some(path) => {
                let (dir, entry) = inner.find(path)?;
                if entry.kind != Kind::Dir {
                    return Ok(match start {
                        Start::Before => Page {
                            entries: vec![entry],
                            more: false,
                        },
                        Start::Base | Start::After(_) | Start::Behind => Page::default(),
                    });
                }
                below::enter(&dir, &*names::os(path.file_name())).map_err(io::Error::from)
            }
        };
        let dir = dir.map_err(|e| inner.read_failed("open a directory", query.path, e))?;
        let limit = query.limit.clamp(1, MAX_ENTRIES);
        for _ in 0..MAX_PASSES {
            let cursor = match start {
                Start::Behind => return Ok(Page::default()),
                Start::Before | Start::Base => Vec::new(),
                Start::After(names) => names,
            };
            let mut lister = Lister {
                query,
                inner,
                limit,
                cursor: cursor.into_iter(),
                frames: Vec::new(),
                last: None,
            };
            let page = lister.page(&dir)?;
            match lister.last {
                // All that was read vanished before it was looked at, and there is more.
                Some(last) if page.more && page.entries.is_empty() => {
                    start = Start::After(last);
                }
                _ => return Ok(page),
            }
        }
        let cause = io::Error::from(Errno::AGAIN);
        Err(inner.read_failed("list a directory that keeps changing", query.path, cause))
    }

    /// Removes a file, a link or an empty directory, or, `recursive`, a directory with all that is in it. The removal
    /// is durable when this returns.
    ///
    /// An error in the middle leaves what was not yet removed. Fails with
    /// [`StoreError::NotEmpty`] where something is left in a directory: without `recursive`, when
    /// something was put there meanwhile, and when it lies too deep to have a path.
    pub fn remove(&self, path: &RelPath, recursive: bool) -> Result<Removed, StoreError> {
        let inner = &self.inner;
        let not_found = || StoreError::NotFound { path: path.clone() };
        let dir = match inner.disk.parent(path) {
            Ok(dir) => dir.ok_or_else(not_found)?,
            Err(StoreError::Blocked { .. }) => return Err(not_found()),
            Err(e) => return Err(e),
        };
        let mut removal = Removal {
            inner,
            path,
            recursive,
            removed: Removed::default(),
            counted: 0,
            at: path.parent().unwrap_or_default().to_owned(),
        };
        let name = &*names::os(path.file_name());
        let noted = removal.note(&dir, std::slice::from_ref(&name))?;
        let found = removal.entry(&dir, name, path.components().count());
        if !matches!(found, Ok(true)) {
            noted.into_iter().for_each(Noted::withdraw);
        }
        // Also after a failure in the middle.
        inner.removed(path, removal.counted);
        if !found? {
            return Err(not_found());
        }
        disk::sync_dir(&dir).map_err(|e| inner.disk.error("sync a directory", path, e))?;
        Ok(removal.removed)
    }

    /// Opens a regular file for reading.
    ///
    /// Fails with [`StoreError::NotFound`], [`StoreError::IsDirectory`] and, for links, devices
    /// and the like, [`StoreError::NotAFile`].
    pub fn read(&self, path: &RelPath) -> Result<Existing, StoreError> {
        let inner = &self.inner;
        let (dir, entry) = inner.find(path)?;
        match entry.kind {
            Kind::File => {}
            Kind::Dir => return Err(StoreError::IsDirectory { path: path.clone() }),
            Kind::Link | Kind::Other => return Err(StoreError::NotAFile { path: path.clone() }),
        }
        match inner.open_existing(path, &dir) {
            Ok(Some(existing)) => Ok(existing),
            Ok(None) => Err(StoreError::NotFound { path: path.clone() }),
            // It is something else by now, or there is no permission.
            Err(StoreError::Exists { .. }) => match inner.find(path)?.1.kind {
                Kind::File => Err(inner.disk.error("open a file", path, Errno::ACCESS.into())),
                Kind::Dir => Err(StoreError::IsDirectory { path: path.clone() }),
                Kind::Link | Kind::Other => Err(StoreError::NotAFile { path: path.clone() }),
            },
            Err(e) => Err(e),
        }
    }

    /// Creates a directory and those above it; returns whether it existed, and its actual time if that differs from
    /// the requested one. It is durable when this returns.
    ///
    /// It gets the mode (without removing its owner's access) and the time of `meta` even if it existed: directories
    /// come after the files in them. Without a mode, a new one is for its owner only.
    pub fn make_dir(
        &self,
        path: &RelPath,
        meta: Meta,
        tenant: Option<&Tenant>,
    ) -> Result<Placed, StoreError> {
        self.make_dir_with(path, meta, &XattrList::default(), &[], None, tenant)
    }

    /// As [`make_dir`](Self::make_dir), with modes for the directories above that must be made, as in
    /// [`NewFile::dirs`](super::NewFile::dirs), and one for the directory if it was not there, and with extended attributes.
    pub(crate) fn make_dir_with(
        &self,
        path: &RelPath,
        meta: Meta,
        xattrs: &XattrList,
        dirs: &[u32],
        new_mode: Option<u32>,
        tenant: Option<&Tenant>,
    ) -> Result<Placed, StoreError> {
        let inner = &self.inner;
        let failed = |action| move |e: io::Error| inner.disk.error(action, path, e);
        inner.check_name(path)?;
        if inner.disk.is_vacant(path) {
            inner.room_for_name(path, tenant)?;
        }
        let parent = inner.parent_for(path, dirs)?;
        let name = &*names::os(path.file_name());
        let there = below::see(&parent, name).map_err(failed("look up a name"))?;
        let made = there.is_none()
            && below::make(&parent, path.file_name())
                .map_err(|e| failed("make a directory")(e.into()))?;
        if made {
            inner.state().accounts.added(path, LEAST);
        }
        let dir = match below::enter(&parent, name) {
            Ok(dir) => dir,
            Err(Errno::NOTDIR | Errno::LOOP | Errno::MLINK) => {
                return Err(StoreError::Exists { path: path.clone() });
            }
            Err(e) => return Err(failed("open a directory")(e.into())),
        };
        inner.disk.check_device(&dir, path)?;
        let new_mode = new_mode.filter(|_| made);
        let meta = Meta {
            mode: meta.mode.or(new_mode),
            ..meta
        };
        let xattrs = attributes::apply(&dir, xattrs, inner.config.xattrs)
            .map_err(failed("set an extended attribute"))?;
        let other_time = set_meta(&dir, path, meta);
        for dir in [&dir, &parent] {
            disk::sync_dir(dir).map_err(failed("sync a directory"))?;
        }
        Ok(Placed {
            same: !made,
            other_time,
            xattrs,
        })
    }

    /// As [`make_dir`](Self::make_dir), for a [`Sink`](super::Sink).
    pub(crate) fn place_dir(&self, new: &NewDir<'_>) -> Result<Placed, StoreError> {
        let (own, above) = match new.dirs.split_last() {
            Some((own, above)) => (Some(*own), above),
            None => (None, new.dirs),
        };
        self.make_dir_with(new.path, new.meta, new.xattrs, above, own, new.tenant)
    }

    /// As [`make_link`](Self::make_link), for a [`Sink`](super::Sink).
    pub(crate) fn place_link(&self, new: &NewLink<'_>) -> Result<Placed, StoreError> {
        let NewLink {
            path,
            target,
            if_exists,
            dirs,
            tenant,
        } = *new;
        Ok(Placed {
            same: self.make_link_for(path, target, if_exists, dirs, tenant)?,
            other_time: None,
            xattrs: 0,
        })
    }

    /// Creates a symbolic link in one step; returns whether an equal one existed. It is durable when this returns;
    /// the store never follows it.
    ///
    /// Refuses a `target` that `check_target` refuses. Where something else has the name,
    /// [`IfExists::Overwrite`] replaces a file or a link, and every other policy is an error: a
    /// link is stored under its own name or not at all.
    pub fn make_link(
        &self,
        path: &RelPath,
        target: &str,
        if_exists: IfExists,
    ) -> Result<bool, StoreError> {
        self.make_link_for(path, target, if_exists, &[], None)
    }

    /// As [`make_link`](Self::make_link), with modes for the directories that must be made, as in
    /// [`NewFile::dirs`](super::NewFile::dirs), and counted against this quota, too.
    fn make_link_for(
        &self,
        path: &RelPath,
        target: &str,
        if_exists: IfExists,
        dirs: &[u32],
        tenant: Option<&Tenant>,
    ) -> Result<bool, StoreError> {
        let inner = &self.inner;
        let failed = |action| move |e: io::Error| inner.disk.error(action, path, e);
        let exists = || StoreError::Exists { path: path.clone() };
        inner.check_name(path)?;
        inner.check_policy(if_exists)?;
        check_target(path, target)?;
        inner.room_for_name(path, tenant)?;
        let name = path.file_name();
        let mut outcome = exists();
        // Entries may appear or vanish between a check and the next step.
        for _ in 0..MAX_TRIES {
            let dir = inner.parent_for(path, dirs)?;
            let replacing = inner.replacing();
            let there = below::see(&dir, &*names::os(name)).map_err(failed("look up a name"))?;
            let equal = there.as_ref().is_some_and(Metadata::is_symlink)
                && raw_target(&dir, &names::os(name))
                    .is_some_and(|there| there == *names::bytes(target));
            if equal && if_exists != IfExists::Error {
                drop(replacing);
                disk::sync_dir(&dir).map_err(failed("sync a directory"))?;
                return Ok(true);
            }
            let replaced = match &there {
                None => 0,
                Some(_) if if_exists != IfExists::Overwrite => return Err(exists()),
                Some(there) if there.is_file() => charge(there.len()),
                Some(there) if there.is_symlink() => LEAST,
                Some(_) => return Err(exists()),
            };
            let disk = &inner.disk;
            let staged = disk.stage_link(target).map_err(failed("create a link"))?;
            let noted = match there.as_ref().is_some_and(Metadata::is_file) {
                true => inner.note(path, What::Removed)?,
                false => None,
            };
            if noted.is_some() {
                inner.sync_changes(path)?;
            }
            let placed = match there {
                Some(_) => disk.replace(&staged, &dir, name),
                None => disk.publish(&staged, &dir, name),
            };
            drop(replacing);
            let Err(error) = placed else {
                let mut state = inner.state();
                state.accounts.removed(path, replaced);
                state.accounts.added(path, LEAST);
                drop(state);
                disk::sync_dir(&dir).map_err(failed("sync a directory"))?;
                return Ok(false);
            };
            if let Err(error) = disk.unstage(&staged) {
                tracing::debug!(%path, %error, "staged link left to the next start");
            }
            outcome = match error.kind() {
                io::ErrorKind::AlreadyExists | io::ErrorKind::IsADirectory => exists(),
                // The directory was removed since it was made.
                io::ErrorKind::NotFound => failed("publish a link")(error),
                _ => return Err(failed("publish a link")(error)),
            };
        }
        Err(outcome)
    }
}

/// Whether a link called `path` may lead to `target`: a relative path that, read from the link's directory, names
/// something below the root or the root itself, and nothing in the store's own directory.
///
/// `..` may stand only before the first name. A name may be a link, also one that is made later, and what is above the
/// place it leads to is not what is above the name. With nothing but the link's own directories to go up by, which are
/// no links and stay where they are, every target stays below the root, whichever links it passes and in whichever
/// order they were made.
///
/// For a client whose root is not the store's, `path` is what the client calls the link.
pub(crate) fn check_target(path: &RelPath, target: &str) -> Result<(), StoreError> {
    let refuse = |why| {
        Err(StoreError::BadTarget {
            path: path.clone(),
            why,
        })
    };
    if target.is_empty() {
        return refuse("is empty");
    }
    if names::bytes(target).len() > MAX_TARGET {
        return refuse("is longer than 4095 bytes");
    }
    if target.contains('\0') {
        return refuse("holds a nul");
    }
    if target.starts_with('/') {
        return refuse("is not relative");
    }
    let mut above = path.parents().count();
    let mut named = false;
    for component in target.split('/') {
        match component {
            "" | "." => {}
            ".." if named => return refuse("goes up from a name that may be a link"),
            ".." if above == 0 => return refuse("leads out of the root"),
            ".." => above -= 1,
            name if name.eq_ignore_ascii_case(PRIVATE) => {
                return refuse("leads to the server's own files");
            }
            _ => named = true,
        }
    }
    Ok(())
}

impl Entry {
    fn new(path: String, kind: Kind, metadata: &Metadata, target: Option<String>) -> Self {
        let size = match kind {
            Kind::File => metadata.len(),
            Kind::Dir | Kind::Link | Kind::Other => 0,
        };
        Self {
            path,
            kind,
            size,
            mtime: Time {
                secs: metadata.mtime(),
                nanos: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
            },
            mode: metadata.mode() & 0o777,
            target,
            unread: false,
        }
    }

    /// An entry of which only the name is known.
    fn unseen(path: String) -> Self {
        Self {
            path,
            kind: Kind::Other,
            size: 0,
            mtime: Time::default(),
            mode: 0,
            target: None,
            unread: false,
        }
    }
}

impl Kind {
    fn of(metadata: &Metadata) -> Self {
        let kind = metadata.file_type();
        if kind.is_file() {
            Self::File
        } else if kind.is_dir() {
            Self::Dir
        } else if kind.is_symlink() {
            Self::Link
        } else {
            Self::Other
        }
    }
}

impl Inner {
    /// The entry of this name, and its directory.
    fn find(&self, path: &RelPath) -> Result<(Dir, Entry), StoreError> {
        let failed = |e| self.read_failed("look up a name", Some(path), e);
        let mut dir = self.disk.root().map_err(failed)?;
        for component in path.parents() {
            dir = below::enter(&dir, &*names::os(component)).map_err(|e| failed(e.into()))?;
        }
        let name = &*names::os(path.file_name());
        let metadata = below::see(&dir, name).map_err(failed)?;
        let Some(metadata) = metadata else {
            return Err(StoreError::NotFound { path: path.clone() });
        };
        let kind = Kind::of(&metadata);
        let target = match kind {
            Kind::Link => target(&dir, name, path),
            Kind::File | Kind::Dir | Kind::Other => None,
        };
        let entry = Entry::new(path.as_str().to_owned(), kind, &metadata, target);
        Ok((dir, entry))
    }

    /// The directory of `path`, created and durable.
    fn parent_for(&self, path: &RelPath, dirs: &[u32]) -> Result<Dir, StoreError> {
        let mut made = Vec::new();
        let dir = self.make_parent(path, dirs, &mut made)?;
        for made in &made {
            disk::sync_dir(&made.parent)
                .map_err(|e| self.disk.error("sync a directory", path, e))?;
        }
        self.disk.made_durable(made.iter().map(|made| made.child));
        Ok(dir)
    }

    /// Checks that there is room for an entry without bytes, and for the directories above it.
    fn room_for_name(&self, path: &RelPath, tenant: Option<&Tenant>) -> Result<(), StoreError> {
        let need = LEAST.saturating_add(self.parents_charge(path, tenant));
        self.room(need, 0, 0, tenant).map(drop)
    }

    /// An error while an entry is looked up. A component that is not a directory means that the entry does not exist.
    fn read_failed(
        &self,
        action: &'static str,
        path: Option<&RelPath>,
        cause: io::Error,
    ) -> StoreError {
        match (Errno::from_io_error(&cause), path) {
            (Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::MLINK), Some(path)) => {
                StoreError::NotFound { path: path.clone() }
            }
            _ => StoreError::io(action, path, cause, || 0),
        }
    }
}

/// The start of a page, relative to the listed directory.
enum Start {
    /// Before the directory itself.
    Before,
    /// The directory itself is the last one listed.
    Base,
    /// After the entry with these names below the directory.
    After(Vec<Vec<u8>>),
    /// After all its entries.
    Behind,
}

impl Start {
    fn new(base: Option<&RelPath>, after: Option<&RelPath>) -> Self {
        let Some(after) = after else {
            return Self::Before;
        };
        let after = after.to_bytes();
        let base = base.map(RelPath::to_bytes);
        let slash = |byte: &u8| *byte == b'/';
        let mut names = after.split(slash);
        for component in base.iter().flat_map(|base| base.split(slash)) {
            match names.next().map(|name| name.cmp(component)) {
                None | Some(std::cmp::Ordering::Less) => return Self::Before,
                Some(std::cmp::Ordering::Greater) => return Self::Behind,
                Some(std::cmp::Ordering::Equal) => {}
            }
        }
        let rest: Vec<Vec<u8>> = names.map(<[u8]>::to_vec).collect();
        if rest.is_empty() {
            Self::Base
        } else {
            Self::After(rest)
        }
    }
}

/// Makes one page.
struct Lister<'a> {
    inner: &'a Inner,
    query: &'a List<'a>,
    limit: usize,
    /// The rest of the cursor, below the top directory of `frames`.
    cursor: std::vec::IntoIter<Vec<u8>>,
    /// The directories from the listed one down to the current position.
    frames: Vec<Frame>,
    /// The names of the last examined entry, below the listed directory, while the page is empty.
    last: Option<Vec<Vec<u8>>>,
}

/// A directory that is being listed.
struct Frame {
    dir: Dir,
    /// The prefix of its entries' paths in text form: empty, or ending in `/`.
    prefix: String,
    /// Its own name; empty for the directory that is listed.
    name: Vec<u8>,
    /// Components of its path.
    depth: usize,
    /// Names left, the next one at the end.
    names: Vec<Vec<u8>>,
    /// More names follow that are not in `names`.
    cut: bool,
    /// The name of an entry on an earlier page whose content may not be listed completely.
    passed: Option<Vec<u8>>,
    /// Whether an entry in it has no path.
    unread: bool,
}

impl Lister<'_> {
    fn page(&mut self, base: &Dir) -> Result<Page, StoreError> {
        let failed = |e| {
            self.inner
                .read_failed("read a directory", self.query.path, e)
        };
        let dir = base.try_clone().map_err(failed)?;
        let (prefix, depth) = match self.query.path {
            None => (String::new(), 0),
            Some(path) => (format!("{}/", path.as_str()), path.components().count()),
        };
        let mut page = Page::default();
        let mut bytes = 0;
        let base = Frame::new(dir, prefix, Vec::new(), depth, self.cursor.next());
        let whole = self.enter(base, self.limit).map_err(failed)?;
        if !whole {
            return Err(failed(Errno::NAMETOOLONG.into()));
        }
        while let Some(frame) = self.frames.last_mut() {
            let Some(name) = frame.names.pop() else {
                if frame.cut {
                    page.more = true;
                    break;
                }
                self.frames.pop();
                continue;
            };
            let passed = frame.passed.take().is_some_and(|passed| passed == name);
            if !passed {
                self.cursor = Vec::new().into_iter();
                if page.entries.len() >= self.limit {
                    page.more = true;
                    break;
                }
            }
            let found = match look(&frame.dir, OsStr::from_bytes(&name), &frame.prefix) {
                Ok(found) => found,
                // The directory may be read, and what is in it not be looked at.
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                    Some(Entry::unseen(below_prefix(&frame.prefix, &name)))
                }
                Err(e) => return Err(StoreError::io("look at a file", self.query.path, e, || 0)),
            };
            let Some(entry) = found else {
                if page.entries.is_empty() {
                    self.remember(&name);
                }
                continue;
            };
            if !passed {
                bytes += entry.path.len() + entry.target.as_ref().map_or(0, String::len);
                if bytes > MAX_NAME_BYTES && !page.entries.is_empty() {
                    page.more = true;
                    break;
                }
            }
            if page.entries.is_empty() {
                self.remember(&name);
            }
            let below = (entry.kind == Kind::Dir && self.query.recursive)
                .then(|| format!("{}/", entry.path));
            if !passed {
                page.entries.push(entry);
            }
            if let Some(prefix) = below
                && !self.descend(name, prefix, self.limit - page.entries.len())?
                && !passed
                && let Some(entry) = page.entries.last_mut()
            {
                entry.unread = true;
            }
        }
        Ok(page)
    }

    /// Continues with the entries of the directory `name`, whose paths begin with `prefix`; false if not all of them can
    /// be listed.
    fn descend(&mut self, name: Vec<u8>, prefix: String, left: usize) -> Result<bool, StoreError> {
        let Some(frame) = self.frames.last() else {
            return Ok(true);
        };
        let depth = frame.depth + 1;
        let shown = names::shown(&prefix);
        let entered = match below::enter(&frame.dir, OsStr::from_bytes(&name)) {
            Ok(dir) => {
                let next = self.cursor.next();
                self.enter(Frame::new(dir, prefix, name, depth, next), left)
            }
            Err(errno) => Err(errno.into()),
        };
        match entered {
            Ok(whole) => Ok(whole),
            Err(e) => match Errno::from_io_error(&e) {
                // It is gone, or something else by now.
                Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::MLINK) => Ok(true),
                Some(Errno::ACCESS | Errno::PERM) => {
                    tracing::warn!(path = shown, "no permission to list a directory");
                    Ok(false)
                }
                _ => Err(StoreError::io("read a directory", self.query.path, e, || 0)),
            },
        }
    }

    /// Reads a directory's names and puts it on top. Keeps no more names, those of the
    /// directories below included, than a page can use. False when something in it has no path.
    fn enter(&mut self, mut frame: Frame, left: usize) -> io::Result<bool> {
        // One to see that there are more, and one that an earlier page had.
        let keep = left + 2;
        frame.read(keep)?;
        if !self.query.recursive
            && let Some(passed) = frame.passed.take()
            && frame.names.last() == Some(&passed)
        {
            frame.names.pop();
        }
        let whole = !frame.unread;
        self.frames.push(frame);
        let total: usize = self.frames.iter().map(|frame| frame.names.len()).sum();
        let mut excess = total.saturating_sub(keep);
        for frame in &mut self.frames {
            let cut = excess.min(frame.names.len());
            frame.names.drain(..cut);
            frame.cut |= cut > 0;
            excess -= cut;
        }
        Ok(whole)
    }

    fn remember(&mut self, name: &[u8]) {
        let names = self.frames.iter().skip(1).map(|frame| &frame.name[..]);
        self.last = Some(names.chain([name]).map(<[u8]>::to_vec).collect());
    }
}

impl Frame {
    fn new(dir: Dir, prefix: String, name: Vec<u8>, depth: usize, passed: Option<Vec<u8>>) -> Self {
        Self {
            dir,
            prefix,
            name,
            depth,
            names: Vec::new(),
            cut: false,
            passed,
            unread: false,
        }
    }

    /// Reads the first `keep` names, from the cursor on.
    fn read(&mut self, keep: usize) -> io::Result<()> {
        let mut first = BinaryHeap::new();
        let above = names::bytes(&self.prefix).len();
        for entry in rustix::fs::Dir::read_from(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") || self.depth == 0 && is_own(name) {
                continue;
            }
            if above + name.len() > RelPath::MAX_BYTES || self.depth >= RelPath::MAX_COMPONENTS {
                self.unread = true;
                continue;
            }
            if self.passed.as_deref().is_some_and(|passed| name < passed) {
                continue;
            }
            if first.len() < keep {
                first.push(name.to_owned());
                continue;
            }
            self.cut = true;
            if let Some(mut last) = first.peek_mut()
                && name < &last[..]
            {
                *last = name.to_owned();
            }
        }
        self.names = first.into_sorted_vec();
        self.names.reverse();
        Ok(())
    }
}

/// Whether this is a name in the root that no client may use.
fn is_own(name: &[u8]) -> bool {
    let path = names::from_bytes(name).parse::<RelPath>();
    path.is_err_and(|error| error.rule() == PathRule::Own)
}

/// The entry of this name in the directory whose paths begin with `prefix`; `None` if it was removed meanwhile.
fn look(dir: &Dir, name: &OsStr, prefix: &str) -> io::Result<Option<Entry>> {
    let Some(metadata) = below::see(dir, name)? else {
        return Ok(None);
    };
    let (kind, path) = (Kind::of(&metadata), below_prefix(prefix, name.as_bytes()));
    let target = match kind {
        Kind::Link => path.parse().ok().and_then(|at| target(dir, name, &at)),
        Kind::File | Kind::Dir | Kind::Other => None,
    };
    Ok(Some(Entry::new(path, kind, &metadata, target)))
}

/// The path of this name, in text form.
fn below_prefix(prefix: &str, name: &[u8]) -> String {
    let name = names::from_bytes(name);
    let mut path = String::with_capacity(prefix.len() + name.len());
    path.push_str(prefix);
    path.push_str(&name);
    path
}

/// The link's target, if the client may see it.
fn target(dir: &Dir, name: &OsStr, path: &RelPath) -> Option<String> {
    let target = names::from_bytes(&raw_target(dir, name)?).into_owned();
    check_target(path, &target).ok().map(|()| target)
}

fn raw_target(dir: &Dir, name: &OsStr) -> Option<Vec<u8>> {
    let target = rustix::fs::readlinkat(dir, name, Vec::new()).ok()?;
    Some(target.into_bytes())
}

/// Sets mode and time of a directory. A value that the file system cannot hold is not an error; an actual time that
/// differs is returned.
fn set_meta(dir: &Dir, path: &RelPath, meta: Meta) -> Option<OtherTime> {
    if let Some(mode) = meta.mode {
        let mode = rustix::fs::Mode::from_raw_mode((mode & 0o777) | 0o700);
        if let Err(errno) = rustix::fs::fchmod(dir, mode) {
            tracing::debug!(%path, %errno, "cannot set a directory's mode");
        }
    }
    let mtime = meta.mtime;
    mtime.and_then(|time| disk::set_modified(dir, path, time))
}

/// Removes one entry and counts the removed ones.
struct Removal<'a> {
    inner: &'a Inner,
    path: &'a RelPath,
    recursive: bool,
    removed: Removed,
    /// The bytes that they counted against a quota.
    counted: u64,
    /// The path of the directory that is being emptied; empty for the root.
    at: String,
}

impl Removal<'_> {
    /// Notes which files of these names are about to be removed, where changes are noted.
    fn note(&self, dir: &Dir, names: &[impl AsRef<OsStr>]) -> Result<Vec<Noted>, StoreError> {
        let mut noted = Vec::new();
        if self.inner.changes.is_none() {
            return Ok(noted);
        }
        for name in names {
            let name = name.as_ref();
            let seen = below::see(dir, name).map_err(|e| self.failed("look up a name", e))?;
            // What has no path was never carried anywhere.
            if seen.is_some_and(|it| it.is_file())
                && let Ok(path) = self.below(name).parse()
            {
                noted.extend(self.inner.note(&path, What::Removed)?);
            }
        }
        if !noted.is_empty() {
            self.inner.sync_changes(self.path)?;
        }
        Ok(noted)
    }

    /// The path of a name in the directory that is being emptied.
    fn below(&self, name: &OsStr) -> String {
        let name = names::from_os(name);
        match &*self.at {
            "" => name.into_owned(),
            at => format!("{at}/{name}"),
        }
    }

    /// Removes the entry of this name; false if there was none.
    fn entry(&mut self, dir: &Dir, name: &OsStr, depth: usize) -> Result<bool, StoreError> {
        let failed = |e| self.failed("look up a name", e);
        let replacing = self.inner.replacing();
        let Some(metadata) = below::see(dir, name).map_err(failed)? else {
            return Ok(false);
        };
        if metadata.is_dir() {
            drop(replacing);
            return self.dir(dir, name, depth);
        }
        match below::unlink(dir, name) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(self.failed("remove a file", e.into())),
        }
        drop(replacing);
        self.removed.files += 1;
        let mut counted = LEAST;
        if metadata.is_file() {
            self.removed.bytes = self.removed.bytes.saturating_add(metadata.len());
            counted = charge(metadata.len());
        }
        self.counted = self.counted.saturating_add(counted);
        Ok(true)
    }

    fn dir(&mut self, dir: &Dir, name: &OsStr, depth: usize) -> Result<bool, StoreError> {
        let child = match below::enter(dir, name) {
            Ok(child) => child,
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(self.failed("open a directory", e.into())),
        };
        if self.recursive {
            self.inner.disk.check_device(&child, self.path)?;
            let at = self.below(name);
            let above = std::mem::replace(&mut self.at, at);
            self.clear(&child, depth)?;
            self.at = above;
        }
        match below::remove_dir(dir, name) {
            Ok(()) => {
                self.counted = self.counted.saturating_add(LEAST);
                Ok(true)
            }
            Err(Errno::NOENT) => Ok(false),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Err(self.not_empty()),
            Err(e) => Err(self.failed("remove a directory", e.into())),
        }
    }

    /// Empties a directory whose path has `depth` components. Entries that are too deep to have a path stay, and the
    /// directory's removal then fails.
    fn clear(&mut self, dir: &Dir, depth: usize) -> Result<(), StoreError> {
        if depth >= RelPath::MAX_COMPONENTS {
            return Ok(());
        }
        loop {
            let names = batch(dir).map_err(|e| self.failed("read a directory", e))?;
            let _noted = self.note(dir, &names)?;
            for name in &names {
                self.entry(dir, name, depth + 1)?;
            }
            // If entries were added after a complete reading, the directory's removal fails.
            if names.len() < BATCH {
                return Ok(());
            }
        }
    }

    fn not_empty(&self) -> StoreError {
        StoreError::NotEmpty {
            path: self.path.clone(),
        }
    }

    fn failed(&self, action: &'static str, cause: io::Error) -> StoreError {
        self.inner.disk.error(action, self.path, cause)
    }
}

/// Some names of a directory, read before any of them is removed.
fn batch(dir: &Dir) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
        if names.len() == BATCH {
            break;
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests;

/// Most entries in a page.
pub(super) const MAX_ENTRIES: usize = 4_000;
/// Most bytes of paths and targets in a page of more than one entry.
const MAX_NAME_BYTES: usize = 256 * 1024;
/// Times a page is begun anew because all that was read vanished meanwhile.
const MAX_PASSES: usize = 16;
/// Times a link is put in place anew because something came or went meanwhile.
const MAX_TRIES: usize = 4;
/// Longest target of a link, in bytes.
const MAX_TARGET: usize = 4095;
/// Names read at a time from a directory that is being emptied.
const BATCH: usize = 256;
