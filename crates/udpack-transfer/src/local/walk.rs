//! A local tree, entry by entry, as it is going to be uploaded or compared.
//!
//! Nothing is collected: a walk holds one open directory for each level, so its memory does not grow with the number
//! of files. Entries that cannot be sent are returned, too, with the reason.

use std::fs::{self, Metadata, ReadDir};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::base::glob::Exclude;
use crate::base::mapping::unescape_name;
use crate::base::names;
use crate::base::path::RelPath;
use crate::local::error::TransferError;
use crate::local::source::{self, Source};

/// Walks a file or a directory, depth first; the entries of a directory come before the directory itself.
///
/// The order of the entries in a directory is the file system's. Blocks.
#[derive(Debug)]
pub struct Walk {
    /// Entries still to be visited; the root at first.
    root: Option<(PathBuf, String)>,
    above: Vec<Level>,
    options: Options,
}

#[derive(Debug, Default)]
struct Options {
    exclude: Exclude,
    links: bool,
    every_dir: bool,
    mapped: bool,
}

/// A directory that is being read.
#[derive(Debug)]
struct Level {
    local: PathBuf,
    /// The name at the server; empty for the server's root.
    remote: String,
    /// The path from the walk's root; empty for that itself.
    relative: String,
    entries: ReadDir,
    /// Permissions of the directories above its entries, itself included, as far as they have names at the server.
    modes: Arc<[u32]>,
    /// Device and inode, to detect links that lead in a circle.
    id: (u64, u64),
    empty: bool,
}

/// One entry of a tree.
#[derive(Debug)]
pub struct Found {
    /// The local path of the entry.
    pub local: PathBuf,
    /// The name at the server. Valid, unless the entry failed.
    pub remote: String,
    /// The kind of the entry.
    pub what: What,
    /// Permissions for the directories that the server must create for it: see [`Source::dirs`].
    pub dirs: Arc<[u32]>,
}

/// The kind of an entry, with its checked name at the server.
#[derive(Debug)]
#[non_exhaustive]
pub enum What {
    /// A regular file.
    File {
        /// Its name at the server.
        remote: RelPath,
        /// Its size as of now, in bytes.
        size: u64,
    },
    /// A directory to create: an empty one, or any if all are listed.
    Dir {
        /// Its name at the server.
        remote: RelPath,
    },
    /// A symbolic link that is kept as one.
    Link {
        /// Its name at the server.
        remote: RelPath,
        /// Its target, byte for byte.
        target: String,
    },
    /// The entry cannot be sent.
    Failed(TransferError),
}

impl From<Found> for Source {
    /// Converts an entry into a source. A directory's time and mode are read now.
    fn from(found: Found) -> Self {
        let source = match found.what {
            What::File { remote, size } => Self::listed(found.local, &remote, size),
            What::Dir { remote } => match fs::metadata(&found.local) {
                Ok(metadata) => Self::dir(remote, source::meta(&metadata)).local(found.local),
                Err(source) => {
                    let path = found.local;
                    Self::failed(remote.as_str(), TransferError::Source { path, source })
                }
            },
            What::Link { remote, target } => Self::link(remote, target),
            What::Failed(error) => Self::failed(found.remote, error),
        };
        source.dirs(found.dirs)
    }
}

impl Walk {
    /// Walks `root`, whose content is named below `remote` at the server; "" is the server's root. A file gets the
    /// name `remote` itself. Nothing is read before the first call of `next`.
    pub fn new(root: impl Into<PathBuf>, remote: impl Into<String>) -> Self {
        Self {
            root: Some((root.into(), remote.into())),
            above: Vec::new(),
            options: Options::default(),
        }
    }

    /// Excludes these entries, matched against the path from the root, with everything in them. Defaults to none.
    pub fn exclude(mut self, exclude: Exclude) -> Self {
        self.options.exclude = exclude;
        self
    }

    /// Keeps symbolic links as links instead of following them. Defaults to no.
    pub fn links(mut self, links: bool) -> Self {
        self.options.links = links;
        self
    }

    /// Lists every directory, after its content, not only empty ones. Defaults to no.
    pub fn every_dir(mut self, every: bool) -> Self {
        self.options.every_dir = every;
        self
    }

    /// Reads the names of what is in a directory as [`escape_name`](crate::escape_name) writes them. Defaults to no.
    pub fn mapped(mut self, mapped: bool) -> Self {
        self.options.mapped = mapped;
        self
    }

    /// Examines one entry: `None` for a directory, which is entered, and for an excluded entry.
    fn look(&mut self, local: PathBuf, remote: String, relative: &str) -> Option<Found> {
        let dirs = self.dirs(&remote);
        let what = match self.what(&local, &remote, relative, &dirs) {
            Ok(what) => what?,
            Err(error) => What::Failed(error),
        };
        Some(Found {
            local,
            remote,
            what,
            dirs,
        })
    }

    /// The permissions for the directories above this name.
    fn dirs(&self, remote: &str) -> Arc<[u32]> {
        match self.above.last() {
            Some(level) => level.modes.clone(),
            // Directories that exist only in the name get the usual permissions.
            None => vec![MADE; remote.matches('/').count()].into(),
        }
    }

    fn what(
        &mut self,
        local: &Path,
        remote: &str,
        relative: &str,
        dirs: &Arc<[u32]>,
    ) -> Result<Option<What>, TransferError> {
        let unreadable = |source| TransferError::Source {
            path: local.to_owned(),
            source,
        };
        let metadata = match self.metadata(local) {
            Ok(metadata) => metadata,
            // Excluded by its name, regardless of its kind.
            Err(_) if self.left_out(relative, false) => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        };
        if self.left_out(relative, metadata.is_dir()) {
            return Ok(None);
        }
        if metadata.is_dir() {
            // The server's root needs no name.
            if !remote.is_empty() {
                checked(local, remote)?;
            }
            let id = (metadata.dev(), metadata.ino());
            if self.above.iter().any(|level| level.id == id) {
                let circle = io::Error::other("the link leads back to a directory it is in");
                return Err(unreadable(circle));
            }
            self.above.push(Level {
                entries: fs::read_dir(local).map_err(unreadable)?,
                local: local.to_owned(),
                remote: remote.to_owned(),
                relative: relative.to_owned(),
                modes: match remote {
                    "" => dirs.clone(),
                    _ => dirs
                        .iter()
                        .copied()
                        .chain([metadata.mode() & 0o777])
                        .collect(),
                },
                id,
                empty: true,
            });
            return Ok(None);
        }
        let name = checked(local, remote)?;
        if metadata.is_symlink() {
            let target = fs::read_link(local).map_err(unreadable)?;
            return Ok(Some(What::Link {
                remote: name,
                target: names::from_os(target.as_os_str()).into_owned(),
            }));
        }
        if !metadata.is_file() {
            let path = local.to_owned();
            return Err(match relative {
                "" => TransferError::NotAFile { path },
                _ => TransferError::Special { path },
            });
        }
        Ok(Some(What::File {
            remote: name,
            size: metadata.len(),
        }))
    }

    /// Whether an entry is excluded. The root itself never is.
    fn left_out(&self, relative: &str, is_dir: bool) -> bool {
        !relative.is_empty() && self.options.exclude.matches(relative, is_dir)
    }

    fn metadata(&self, local: &Path) -> io::Result<Metadata> {
        if self.options.links {
            fs::symlink_metadata(local)
        } else {
            fs::metadata(local)
        }
    }

    /// The end of the directory that was read last.
    fn leave(&mut self) -> Option<Found> {
        let level = self.above.pop()?;
        if level.remote.is_empty() || !(level.empty || self.options.every_dir) {
            return None;
        }
        let what = match checked(&level.local, &level.remote) {
            Ok(remote) => What::Dir { remote },
            Err(error) => What::Failed(error),
        };
        let dirs = self.dirs(&level.remote);
        Some(Found {
            local: level.local,
            remote: level.remote,
            what,
            dirs,
        })
    }
}

impl Iterator for Walk {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        loop {
            let depth = self.above.len();
            let found = if let Some((local, remote)) = self.root.take() {
                self.look(local, remote, "")
            } else {
                let level = self.above.last_mut()?;
                match level.entries.next() {
                    None => self.leave(),
                    Some(Err(source)) => {
                        // Reading further may return the same error for ever.
                        let level = self.above.pop()?;
                        Some(Found {
                            remote: level.remote,
                            what: What::Failed(TransferError::Source {
                                path: level.local.clone(),
                                source,
                            }),
                            local: level.local,
                            dirs: Arc::default(),
                        })
                    }
                    Some(Ok(entry)) => {
                        let file_name = entry.file_name();
                        let name = names::from_os(&file_name);
                        let local = entry.path();
                        let remote = match self.options.mapped {
                            true => join(&level.remote, &unescape_name(&name)),
                            false => join(&level.remote, &name),
                        };
                        let relative = join(&level.relative, &name);
                        self.look(local, remote, &relative)
                    }
                }
            };
            // An entry that was found or entered makes its directory non-empty.
            let entered = self.above.len() > depth;
            let parent = match (found.is_some(), entered) {
                (_, true) => depth.checked_sub(1),
                (true, false) => self.above.len().checked_sub(1),
                (false, false) => None,
            };
            if let Some(level) = parent.and_then(|at| self.above.get_mut(at)) {
                level.empty = false;
            }
            if found.is_some() {
                return found;
            }
        }
    }
}

/// Permissions of a directory that does not exist here.
const MADE: u32 = 0o777;

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() {
        name.to_owned()
    } else {
        format!("{dir}/{name}")
    }
}

/// The name at the server, if it can be one.
fn checked(local: &Path, remote: &str) -> Result<RelPath, TransferError> {
    let refused = |reason: String| TransferError::Name {
        path: local.to_owned(),
        reason,
    };
    let parsed = remote.parse::<RelPath>();
    parsed.map_err(|error| refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// Every entry as one word and its name, in an order of its own.
    fn walked(walk: Walk) -> Vec<String> {
        let mut all: Vec<String> = walk
            .map(|found| match &found.what {
                What::File { remote, size } => format!("file {remote} {size}"),
                What::Dir { remote } => format!("dir {remote}"),
                What::Link { remote, target } => format!("link {remote} {target}"),
                What::Failed(error) => format!("{:?} {}", error.kind(), found.remote),
            })
            .collect();
        all.sort();
        all
    }

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        for sub in ["a/b/c", "empty", "x/build", "x/src"] {
            fs::create_dir_all(root.join(sub)).expect("mkdir");
        }
        for (file, content) in [
            ("top", "1"),
            ("a/b/c/deep", "12"),
            ("a/none", ""),
            ("x/build/out.o", "123"),
            ("x/src/main.c", "1234"),
            ("x/src/main.o", "12345"),
        ] {
            fs::write(root.join(file), content).expect("write");
        }
        dir
    }

    fn exclude(patterns: &[&str]) -> Exclude {
        patterns
            .iter()
            .map(|text| text.parse().expect("a pattern"))
            .collect()
    }

    #[test]
    fn a_tree_is_walked_to_its_leaves() {
        let dir = tree();
        assert_eq!(
            walked(Walk::new(dir.path(), "t")),
            [
                "dir t/empty",
                "file t/a/b/c/deep 2",
                "file t/a/none 0",
                "file t/top 1",
                "file t/x/build/out.o 3",
                "file t/x/src/main.c 4",
                "file t/x/src/main.o 5",
            ]
        );
        assert_eq!(
            walked(Walk::new(dir.path().join("x/src"), "")),
            ["file main.c 4", "file main.o 5"]
        );
        assert_eq!(walked(Walk::new(dir.path().join("top"), "n")), ["file n 1"]);
    }

    #[test]
    fn a_directory_follows_what_is_in_it() {
        let dir = tree();
        let order: Vec<String> = Walk::new(dir.path().join("a"), "a")
            .every_dir(true)
            .map(|found| found.remote)
            .collect();
        let at = |name: &str| order.iter().position(|known| known == name).expect(name);
        assert_eq!(order.len(), 5);
        assert!(at("a/b/c/deep") < at("a/b/c"));
        assert!(at("a/b/c") < at("a/b"));
        assert_eq!(at("a"), 4, "the top is the last");
        assert!(
            !walked(Walk::new(dir.path(), "").every_dir(true)).contains(&"dir ".to_owned()),
            "the server's root is not made"
        );
    }

    #[test]
    fn what_is_excluded_is_not_entered() {
        let dir = tree();
        let walk = |patterns: &[&str]| walked(Walk::new(dir.path(), "").exclude(exclude(patterns)));
        assert_eq!(
            walk(&["*.o", "/a/b", "empty/"]),
            [
                "dir x/build",
                "file a/none 0",
                "file top 1",
                "file x/src/main.c 4"
            ]
        );
        assert_eq!(walk(&["build/", "src", "a/**", "top"]).len(), 3);
        assert_eq!(walk(&["*"]), Vec::<String>::new());
    }

    #[test]
    fn links_are_followed_but_not_in_circles() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        fs::create_dir_all(root.join("a/b")).expect("mkdir");
        fs::write(root.join("a/file"), "x").expect("write");
        symlink("../..", root.join("a/b/up")).expect("symlink");
        symlink("a/file", root.join("direct")).expect("symlink");
        symlink("nowhere", root.join("broken")).expect("symlink");
        assert_eq!(
            walked(Walk::new(root, "")),
            [
                "LocalFile a/b/up",
                "LocalFile broken",
                "file a/file 1",
                "file direct 1"
            ]
        );
        assert_eq!(
            walked(Walk::new(root, "").links(true)),
            [
                "file a/file 1",
                "link a/b/up ../..",
                "link broken nowhere",
                "link direct a/file"
            ]
        );
    }

    #[test]
    fn what_cannot_be_sent_says_so_and_stops_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        for name in [".hidden", ".udpack", "e\u{301}", "good", "back\\slash"] {
            fs::write(root.join(name), "x").expect("write");
        }
        let raw = std::os::unix::ffi::OsStrExt::from_bytes(b"raw\xff");
        fs::write(root.join::<&std::ffi::OsStr>(raw), "x").expect("write");
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).expect("bind");
        assert_eq!(
            walked(Walk::new(root, "")),
            [
                "LocalFile socket",
                "Policy .udpack",
                "file .hidden 1",
                "file back\\slash 1",
                "file e\u{301} 1",
                "file good 1",
                "file raw\\xff 1",
            ]
        );
        assert_eq!(
            walked(Walk::new(root.join("missing"), "m")),
            ["LocalFile m"]
        );
        let closed = root.join("closed");
        fs::create_dir(&closed).expect("mkdir");
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).expect("chmod");
        if fs::read_dir(&closed).is_err() {
            assert_eq!(walked(Walk::new(&closed, "c")), ["LocalFile c"]);
        }
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).expect("chmod");
    }

    #[test]
    fn a_tree_deeper_than_names_may_be_ends_in_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let deep = ["d"; RelPath::MAX_COMPONENTS + 7].join("/");
        fs::create_dir_all(dir.path().join(deep)).expect("mkdir");
        assert_eq!(
            walked(Walk::new(dir.path(), "")),
            [format!(
                "Policy {}",
                ["d"; RelPath::MAX_COMPONENTS + 1].join("/")
            )]
        );
    }
}
