//! One side of a mirror: the entries below a root in order, each directory before its entries.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;
use udpack_transfer::{
    Entry, Exclude, Kind as EntryKind, Listing, RelPath, Remote, Time, TransferError, names,
};

use crate::client::get::UNREAD;
use crate::client::remote::below;
use crate::exit::{Failure, Kind};

/// Entries that are read ahead of the comparison.
const AHEAD: usize = 512;
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
    Local(mpsc::Receiver<Next>),
    Remote {
        listing: Listing,
        root: String,
        exclude: Exclude,
    },
}

impl Side {
    /// A local directory. `follow`: links count as what they point to. Dropping it ends the walk.
    pub(super) fn local(dir: &Path, depth: usize, exclude: &Exclude, follow: bool) -> Self {
        let (found, entries) = mpsc::channel(AHEAD);
        let (dir, exclude) = (dir.to_owned(), exclude.clone());
        tokio::task::spawn_blocking(move || {
            let mut walker = Walker {
                exclude,
                follow,
                found,
                above: Vec::new(),
            };
            walker.root(dir, depth);
        });
        Self::Local(entries)
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
            Self::Local(entries) => return Ok(entries.recv().await),
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

/// Whether `rel` is below this directory, at any depth.
pub(super) fn is_in(rel: &str, dir: &str) -> bool {
    dir.is_empty()
        || rel
            .strip_prefix(dir)
            .is_some_and(|rest| rest.starts_with('/'))
}

pub(super) fn join(dir: &str, name: &str) -> String {
    match (dir, name) {
        ("", name) => name.to_owned(),
        (dir, "") => dir.to_owned(),
        (dir, name) => format!("{dir}/{name}"),
    }
}

/// Walks a local tree in order; blocks. It holds the names of one directory for each level.
struct Walker {
    exclude: Exclude,
    follow: bool,
    found: mpsc::Sender<Next>,
    above: Vec<Level>,
}

/// A directory that is being read.
struct Level {
    local: PathBuf,
    rel: String,
    names: std::vec::IntoIter<OsString>,
    modes: Arc<[u32]>,
    /// Device and inode, to detect a link to a directory above it.
    id: (u64, u64),
}

impl Walker {
    /// Walks the whole tree. `depth`: how many directories the root's name on the other side has.
    fn root(&mut self, dir: PathBuf, depth: usize) {
        let entered = fs::metadata(&dir).and_then(|metadata| {
            let mut modes = vec![MADE; depth.saturating_sub(1)];
            modes.extend((depth > 0).then(|| metadata.mode() & 0o777));
            self.enter(dir.clone(), String::new(), &metadata, modes.into())
        });
        if let Err(source) = entered {
            let error = TransferError::Source { path: dir, source };
            let _ = self.tell(Next::Failed(String::new(), error.into()));
            return;
        }
        while let Some(level) = self.above.last_mut() {
            let Some(name) = level.names.next() else {
                self.above.pop();
                continue;
            };
            let rel = join(&level.rel, &names::from_os(&name));
            if rel == ".udpack" {
                // The store's own files.
                if self.tell(Next::Kept(rel)).is_err() {
                    return;
                }
                continue;
            }
            let local = level.local.join(&name);
            let dirs = level.modes.clone();
            let Some(next) = self.look(local, rel, dirs) else {
                continue;
            };
            if self.tell(next).is_err() {
                return;
            }
        }
    }

    fn tell(&self, next: Next) -> Result<(), ()> {
        self.found.blocking_send(next).map_err(drop)
    }

    /// Examines one entry. A directory is entered after it was reported.
    fn look(&mut self, local: PathBuf, rel: String, dirs: Arc<[u32]>) -> Option<Next> {
        let failed = |source| TransferError::Source {
            path: local.clone(),
            source,
        };
        let metadata = match self.follow {
            true => fs::metadata(&local),
            false => fs::symlink_metadata(&local),
        };
        let metadata = match metadata {
            Ok(metadata) => metadata,
            Err(_) if self.exclude.matches(&rel, false) => return Some(Next::Excluded(rel)),
            Err(error) if is_gone(&error) && fs::symlink_metadata(&local).is_err() => {
                return Some(Next::Vanished(rel));
            }
            Err(error) => return Some(Next::Failed(rel, failed(error).into())),
        };
        if self.exclude.matches(&rel, metadata.is_dir()) {
            return Some(Next::Excluded(rel));
        }
        let (kind, target) = if metadata.is_dir() {
            (EntryKind::Dir, None)
        } else if metadata.is_file() {
            (EntryKind::File, None)
        } else if metadata.is_symlink() {
            match fs::read_link(&local) {
                Ok(target) => {
                    let target = names::from_os(target.as_os_str()).into_owned();
                    (EntryKind::Link, Some(target))
                }
                Err(error) if is_gone(&error) => return Some(Next::Vanished(rel)),
                Err(error) => return Some(Next::Failed(rel, failed(error).into())),
            }
        } else {
            (EntryKind::Other, None)
        };
        let item = Item {
            entry: Entry {
                path: rel.clone(),
                kind,
                size: if metadata.is_file() {
                    metadata.len()
                } else {
                    0
                },
                mtime: Time {
                    secs: metadata.mtime(),
                    nanos: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
                },
                mode: metadata.mode() & 0o7777,
                target,
                unread: false,
            },
            rel: rel.clone(),
            dirs: dirs.clone(),
        };
        if !metadata.is_dir() {
            return Some(Next::Item(item));
        }
        let id = (metadata.dev(), metadata.ino());
        if self.above.iter().any(|level| level.id == id) {
            let circle = io::Error::other("the link leads back to a directory it is in");
            return Some(Next::Failed(rel, failed(circle).into()));
        }
        let modes = dirs
            .iter()
            .copied()
            .chain([metadata.mode() & 0o777])
            .collect();
        match self.enter(local.clone(), rel.clone(), &metadata, modes) {
            Ok(()) => Some(Next::Item(item)),
            Err(error) if is_gone(&error) => Some(Next::Vanished(rel)),
            Err(error) => Some(Next::Failed(rel, failed(error).into())),
        }
    }

    /// Reads the names of a directory, which follow.
    fn enter(
        &mut self,
        local: PathBuf,
        rel: String,
        metadata: &Metadata,
        modes: Arc<[u32]>,
    ) -> io::Result<()> {
        let mut names = fs::read_dir(&local)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        self.above.push(Level {
            local,
            rel,
            names: names.into_iter(),
            modes,
            id: (metadata.dev(), metadata.ino()),
        });
        Ok(())
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

#[cfg(test)]
mod tests {
    use super::*;

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
