//! One side of a mirror: the entries below a root in order, each directory before its entries.

use std::cmp::Ordering;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;
use udpack_transfer::{
    Entry, Exclude, Kind as EntryKind, Listing, RelPath, Remote, Time, TransferError, names,
};

use crate::client::get::UNREAD;
use crate::client::remote::{below, join};
use crate::exit::{Failure, Kind};

/// Entries that the walk hands over at once: one at a time would wake the comparison for each.
const BATCH: usize = 256;
/// Such batches that are read ahead of the comparison.
const AHEAD: usize = 4;
/// The outermost directories of a walk that are kept open, so that what is in them is found without their whole path.
const HELD: usize = 64;
/// Permissions of directories that exist only in the name of the root.
const MADE: u32 = 0o777;

/// One entry of a tree.
#[derive(Debug, Clone)]
pub(super) struct Item {
    /// The path below the root.
    pub(super) rel: String,
    /// The entry. Its path is the one on its own side.
    pub(super) entry: Entry,
    /// Permissions of the directories above it, including the root, if they are known.
    pub(super) dirs: Arc<[u32]>,
}

/// The next item of a side.
#[derive(Debug)]
pub(super) enum Next {
    Item(Item),
    /// An excluded entry; its content is excluded, too.
    Excluded(String),
    /// The directory in which `get` and `sync` keep interrupted files.
    Kept(String),
    /// An entry that was removed meanwhile.
    Vanished(String),
    /// An entry that cannot be read. Nothing is known about its content.
    Failed(String, anyhow::Error),
}

/// A tree, entry by entry.
#[derive(Debug)]
pub(super) enum Side {
    /// The directory does not exist yet.
    Empty,
    Local {
        batches: mpsc::Receiver<Vec<Next>>,
        ready: std::vec::IntoIter<Next>,
    },
    Remote {
        listing: Listing,
        root: String,
        exclude: Exclude,
    },
}

impl Side {
    /// A local directory. `follow`: links count as what they point to. Dropping it ends the walk.
    pub(super) fn local(dir: &Path, depth: usize, exclude: &Exclude, follow: bool) -> Self {
        let (found, batches) = mpsc::channel(AHEAD);
        let (dir, exclude) = (dir.to_owned(), exclude.clone());
        tokio::task::spawn_blocking(move || {
            let mut walker = Walker {
                exclude,
                follow,
                found,
                batch: Vec::new(),
                above: Vec::new(),
            };
            // Nobody wants the rest otherwise.
            if walker.root(dir, depth).is_ok() {
                let _ = walker.flush();
            }
        });
        Self::Local {
            batches,
            ready: Vec::new().into_iter(),
        }
    }

    /// A directory of the server; `None` is its root.
    pub(super) fn remote(remote: &Remote, path: Option<&RelPath>, exclude: &Exclude) -> Self {
        Self::Remote {
            listing: remote.list(path, true),
            root: path.map_or_else(String::new, |path| path.as_str().to_owned()),
            exclude: exclude.clone(),
        }
    }

    /// The next entry; `None` after the last one. Nothing follows an error.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Next>> {
        let (listing, root, exclude) = match self {
            Self::Empty => return Ok(None),
            Self::Local { batches, ready } => loop {
                if let Some(next) = ready.next() {
                    return Ok(Some(next));
                }
                match batches.recv().await {
                    Some(batch) => *ready = batch.into_iter(),
                    None => return Ok(None),
                }
            },
            Self::Remote {
                listing,
                root,
                exclude,
            } => (listing, root, exclude),
        };
        let Some(entry) = listing.next().await else {
            return Ok(None);
        };
        let entry = entry?;
        let rel = below(root, &entry.path).to_owned();
        if exclude.covers(&rel, entry.kind == EntryKind::Dir) {
            return Ok(Some(Next::Excluded(rel)));
        }
        if entry.unread {
            let error = Failure::new(Kind::RemoteStorage, UNREAD);
            return Ok(Some(Next::Failed(rel, error.into())));
        }
        let dirs = Arc::default();
        Ok(Some(Next::Item(Item { rel, entry, dirs })))
    }
}

/// The order of entries: paths are compared component by component, as bytes.
pub(super) fn order(a: &str, b: &str) -> Ordering {
    let (a, b) = (names::bytes(a), names::bytes(b));
    // The end of a name sorts before all bytes. No name contains NUL.
    let key = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    a.iter().map(key).cmp(b.iter().map(key))
}

/// The directory that contains it; "" is the root.
pub(super) fn parent(rel: &str) -> &str {
    rel.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// Walks a local tree in order; blocks. It holds the names of one directory for each level.
struct Walker {
    exclude: Exclude,
    follow: bool,
    found: mpsc::Sender<Vec<Next>>,
    /// What was found and is not handed over yet.
    batch: Vec<Next>,
    above: Vec<Level>,
}

/// Nobody wants the entries any more.
struct Unwanted;

/// A directory that is being read.
struct Level {
    local: PathBuf,
    /// The directory itself, if it is kept open.
    held: Option<File>,
    rel: String,
    names: std::vec::IntoIter<OsString>,
    modes: Arc<[u32]>,
    /// Device and inode, to detect a link to a directory above it.
    id: (u64, u64),
}

impl Walker {
    /// Walks the whole tree. `depth`: how many directories the root's name on the other side has.
    fn root(&mut self, dir: PathBuf, depth: usize) -> Result<(), Unwanted> {
        let entered = fs::metadata(&dir).and_then(|metadata| {
            let seen = Seen::from(&metadata);
            let mut modes = vec![MADE; depth.saturating_sub(1)];
            modes.extend((depth > 0).then_some(seen.mode & 0o777));
            self.enter(dir.clone(), String::new(), &seen, modes.into())
        });
        if let Err(source) = entered {
            let error = TransferError::Source { path: dir, source };
            return self.tell(Next::Failed(String::new(), error.into()));
        }
        while let Some(level) = self.above.last_mut() {
            let Some(name) = level.names.next() else {
                self.above.pop();
                continue;
            };
            let rel = join(&level.rel, &names::from_os(&name));
            if rel == ".udpack" {
                // The store's own files.
                self.tell(Next::Kept(rel))?;
                continue;
            }
            if let Some(next) = self.look(&name, rel) {
                self.tell(next)?;
            }
        }
        Ok(())
    }

    fn tell(&mut self, next: Next) -> Result<(), Unwanted> {
        self.batch.push(next);
        match self.batch.len() < BATCH {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Hands over what was found.
    fn flush(&mut self) -> Result<(), Unwanted> {
        let batch = std::mem::replace(&mut self.batch, Vec::with_capacity(BATCH));
        self.found.blocking_send(batch).map_err(|_| Unwanted)
    }

    /// Examines one entry of the innermost directory. A directory is entered after it was reported.
    fn look(&mut self, name: &OsStr, rel: String) -> Option<Next> {
        let level = self.above.last()?;
        let local = || level.local.join(name);
        let failed = |source| {
            let path = local();
            TransferError::Source { path, source }
        };
        let dirs = level.modes.clone();
        let seen = match see(level, name, self.follow) {
            Ok(seen) => seen,
            Err(_) if self.exclude.matches(&rel, false) => return Some(Next::Excluded(rel)),
            Err(error) if is_gone(&error) && fs::symlink_metadata(local()).is_err() => {
                return Some(Next::Vanished(rel));
            }
            Err(error) => return Some(Next::Failed(rel, failed(error).into())),
        };
        if self.exclude.matches(&rel, seen.kind == EntryKind::Dir) {
            return Some(Next::Excluded(rel));
        }
        let mut target = None;
        if seen.kind == EntryKind::Link {
            match fs::read_link(local()) {
                Ok(link) => target = Some(names::from_os(link.as_os_str()).into_owned()),
                Err(error) if is_gone(&error) => return Some(Next::Vanished(rel)),
                Err(error) => return Some(Next::Failed(rel, failed(error).into())),
            }
        }
        let item = Item {
            entry: Entry {
                path: rel.clone(),
                kind: seen.kind,
                size: match seen.kind {
                    EntryKind::File => seen.size,
                    EntryKind::Dir | EntryKind::Link | EntryKind::Other => 0,
                },
                mtime: seen.mtime,
                mode: seen.mode & 0o7777,
                target,
                unread: false,
            },
            rel,
            dirs,
        };
        if seen.kind != EntryKind::Dir {
            return Some(Next::Item(item));
        }
        if self.above.iter().any(|level| level.id == seen.id) {
            let circle = io::Error::other("the link leads back to a directory it is in");
            return Some(Next::Failed(item.rel, failed(circle).into()));
        }
        let own = [seen.mode & 0o777];
        let modes = item.dirs.iter().copied().chain(own).collect();
        let local = local();
        match self.enter(local.clone(), item.rel.clone(), &seen, modes) {
            Ok(()) => Some(Next::Item(item)),
            Err(error) if is_gone(&error) => Some(Next::Vanished(item.rel)),
            Err(source) => {
                let error = TransferError::Source {
                    path: local,
                    source,
                };
                Some(Next::Failed(item.rel, error.into()))
            }
        }
    }

    /// Reads the names of a directory, which follow.
    fn enter(
        &mut self,
        local: PathBuf,
        rel: String,
        seen: &Seen,
        modes: Arc<[u32]>,
    ) -> io::Result<()> {
        let mut names = fs::read_dir(&local)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        // It may be another directory by now; then its entries are looked for by their paths.
        let held = match self.above.len() < HELD {
            true => File::open(&local).ok(),
            false => None,
        };
        let same = |file: &File| {
            let now = file.metadata();
            now.is_ok_and(|now| (now.dev(), now.ino()) == seen.id)
        };
        self.above.push(Level {
            held: held.filter(same),
            local,
            rel,
            names: names.into_iter(),
            modes,
            id: seen.id,
        });
        Ok(())
    }
}

/// What is known of an entry beside its name.
struct Seen {
    kind: EntryKind,
    size: u64,
    mtime: Time,
    mode: u32,
    /// Device and inode.
    id: (u64, u64),
}

impl From<&Metadata> for Seen {
    fn from(metadata: &Metadata) -> Self {
        Self {
            kind: if metadata.is_dir() {
                EntryKind::Dir
            } else if metadata.is_file() {
                EntryKind::File
            } else if metadata.is_symlink() {
                EntryKind::Link
            } else {
                EntryKind::Other
            },
            size: metadata.len(),
            mtime: Time {
                secs: metadata.mtime(),
                nanos: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
            },
            mode: metadata.mode(),
            id: (metadata.dev(), metadata.ino()),
        }
    }
}

/// Looks at an entry of a directory. `follow`: a link counts as what it points to.
fn see(level: &Level, name: &OsStr, follow: bool) -> io::Result<Seen> {
    #[cfg(target_os = "linux")]
    if let Some(dir) = &level.held {
        match see_in(dir, name, follow) {
            // A kernel or a sandbox without this call.
            Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {}
            seen => return Ok(seen?),
        }
    }
    let local = level.local.join(name);
    let metadata = match follow {
        true => fs::metadata(local),
        false => fs::symlink_metadata(local),
    };
    metadata.map(|metadata| Seen::from(&metadata))
}

#[cfg(target_os = "linux")]
fn see_in(dir: &File, name: &OsStr, follow: bool) -> rustix::io::Result<Seen> {
    use rustix::fs::{AtFlags, FileType, StatxFlags, makedev, statx};
    let flags = match follow {
        true => AtFlags::empty(),
        false => AtFlags::SYMLINK_NOFOLLOW,
    };
    let seen = statx(dir, name, flags, StatxFlags::BASIC_STATS)?;
    let mode = u32::from(seen.stx_mode);
    Ok(Seen {
        kind: match FileType::from_raw_mode(mode) {
            FileType::Directory => EntryKind::Dir,
            FileType::RegularFile => EntryKind::File,
            FileType::Symlink => EntryKind::Link,
            _ => EntryKind::Other,
        },
        size: seen.stx_size,
        mtime: Time {
            secs: seen.stx_mtime.tv_sec,
            nanos: seen.stx_mtime.tv_nsec,
        },
        mode,
        id: (
            makedev(seen.stx_dev_major, seen.stx_dev_minor),
            seen.stx_ino,
        ),
    })
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::remote::is_in;

    #[test]
    fn a_directory_comes_before_what_is_in_it_and_that_before_the_next_name() {
        let sorted = ["a", "a/b", "a/b/c", "a/d", "a b", "a.", "b"];
        for pair in sorted.windows(2) {
            assert_eq!(order(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(order(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(order("a/b", "a/b"), Ordering::Equal);
    }

    #[test]
    fn paths_know_their_directories() {
        assert_eq!(below("", "a/b"), "a/b");
        assert_eq!(below("a", "a/b/c"), "b/c");
        assert_eq!((parent("a/b/c"), parent("a")), ("a/b", ""));
        assert!(is_in("a/b", "a") && is_in("a", ""));
        assert!(!is_in("ab", "a") && !is_in("a", "a"));
    }
}
