//! Which local files, under which names: what `put` sends and `verify` compares.

use std::collections::hash_map::{Entry, RandomState};
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::BuildHasher as _;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use udpack_transfer::{Exclude, Found, RelPath, TransferError, Walk, What, names, unescape_name};

use super::remote::join;
use crate::args::TreeArgs;
use crate::exit::{Failure, Kind};
use crate::output;

/// What was asked for, checked as far as that can be done without walking anything.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    roots: Vec<Root>,
    /// The name for standard input, if it is to be sent.
    pub(super) stdin: Option<RelPath>,
    /// Further paths, and the directory at the server for them.
    list: Option<(List, String)>,
    tree: TreeArgs,
    every_dir: bool,
    /// Names here are written as they can be held here.
    mapped: bool,
    /// Bytes and number of all files, where only files were named.
    pub(super) files: Option<usize>,
    pub(super) bytes: Option<u64>,
}

/// A file or directory to walk, and the name at the server for it; "" for what is in it alone.
#[derive(Debug, Clone)]
struct Root {
    local: PathBuf,
    remote: String,
}

/// A list of paths, all of which was read before anything is sent: one that ends early must not look like a short one.
#[derive(Debug, Clone)]
pub(super) struct List {
    bytes: Arc<[u8]>,
    /// NUL ends each path, and everything else is part of it.
    null: bool,
}

impl List {
    /// Reads it to its end; `-` is standard input. Blocks.
    pub(super) fn read(from: &Path, null: bool) -> Result<Self, TransferError> {
        let mut bytes = Vec::new();
        let read = if from == "-" {
            io::stdin().lock().read_to_end(&mut bytes)
        } else {
            File::open(from).and_then(|mut file| file.read_to_end(&mut bytes))
        };
        match read {
            Ok(_) => Ok(Self {
                bytes: bytes.into(),
                null,
            }),
            Err(source) => Err(TransferError::Source {
                path: from.to_owned(),
                source,
            }),
        }
    }

    /// The paths. Lines may end as on Windows, and the first may have the mark that its editors put there.
    fn paths(&self) -> impl Iterator<Item = PathBuf> + Send + use<> {
        let Self { bytes, null } = self.clone();
        let mark = if null { &b""[..] } else { b"\xef\xbb\xbf" };
        let mut at = if bytes.starts_with(mark) {
            mark.len()
        } else {
            0
        };
        let lines = std::iter::from_fn(move || {
            let rest = bytes.get(at..).filter(|rest| !rest.is_empty())?;
            let end = if null { b'\0' } else { b'\n' };
            let line = rest.split(|byte| *byte == end).next()?;
            at += line.len() + 1;
            let line = match line {
                [line @ .., b'\r'] if !null => line,
                line => line,
            };
            Some(PathBuf::from(OsStr::from_bytes(line)))
        });
        lines.filter(|path| !path.as_os_str().is_empty())
    }
}

/// What a command line says.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    pub(super) paths: &'a [PathBuf],
    pub(super) list: Option<List>,
    /// Standard input is the list.
    pub(super) list_is_stdin: bool,
    /// This is to be sent in place of standard input: what a command writes.
    pub(super) instead: Option<&'static str>,
    pub(super) name: Option<&'a str>,
    /// What to do with two files of one name is left to the server's policy.
    pub(super) clashes: bool,
    pub(super) tree: &'a TreeArgs,
    /// List every directory, not only the empty ones.
    pub(super) every_dir: bool,
    /// Names here are written as they can be held here.
    pub(super) mapped: bool,
}

impl Plan {
    /// Paths that cannot be read or named are handed to `failed`, as name at the server, local path and reason;
    /// what could never work is an error.
    pub(super) fn new(
        asked: &Asked<'_>,
        mut failed: impl FnMut(&str, &Path, anyhow::Error),
    ) -> anyhow::Result<Self> {
        if asked.name.is_some_and(|name| !name.ends_with('/'))
            && (asked.paths.len() > 1 || asked.list.is_some())
        {
            return Err(Failure::new(Kind::Usage, "--as NAME takes a single path")
                .hint("end it with a slash to name a directory for all of them")
                .into());
        }
        let mut plan = Self {
            roots: Vec::new(),
            stdin: None,
            list: asked.list.clone().map(|list| {
                let dir = asked.name.map(trimmed).unwrap_or_default();
                (list, dir.to_owned())
            }),
            tree: asked.tree.clone(),
            every_dir: asked.every_dir,
            mapped: asked.mapped,
            files: None,
            bytes: None,
        };
        let mut taken: HashMap<String, &Path> = HashMap::new();
        // Only while it is nothing but files.
        let mut sum = asked.list.is_none().then_some(0);
        if asked.instead.is_some() {
            plan.take_stdin(asked)?;
            sum = None;
        }
        for path in asked.paths {
            if path.as_os_str() == "-" {
                plan.take_stdin(asked)?;
                sum = None;
                continue;
            }
            let remote = match asked.mapped {
                true => mapped_name(path, asked.name),
                false => remote_name(path, asked.name),
            };
            if let Some(other) = taken.insert(remote.clone(), path)
                && !is_content(path)
                && !asked.clashes
            {
                let text = format!(
                    "{} and {} would both be stored as {}",
                    other.display(),
                    path.display(),
                    output::printable(&remote)
                );
                return Err(Failure::new(Kind::Usage, text)
                    .hint("send them one by one, with --as NAME")
                    .into());
            }
            match check(path, &remote, asked.tree.links) {
                Ok(size) => {
                    sum = sum.and_then(|sum: u64| sum.checked_add(size?));
                    plan.roots.push(Root {
                        local: path.clone(),
                        remote,
                    });
                }
                Err(error) => failed(&remote, path, error),
            }
        }
        plan.files = sum.map(|_| asked.paths.len());
        plan.bytes = sum;
        Ok(plan)
    }

    /// Whether nothing is left to do.
    pub(super) fn is_empty(&self) -> bool {
        self.roots.is_empty() && self.stdin.is_none() && self.list.is_none()
    }

    fn take_stdin(&mut self, asked: &Asked<'_>) -> anyhow::Result<()> {
        let unfit = |text: &str| {
            Failure::new(Kind::Usage, text)
                .hint("use `-` once, with --as NAME: it has no name of its own")
        };
        if asked.list_is_stdin || self.stdin.is_some() {
            return Err(unfit("standard input can be read only once").into());
        }
        let name = asked
            .name
            .filter(|name| !name.ends_with('/'))
            .ok_or_else(|| {
                let what = asked.instead.unwrap_or("standard input");
                unfit(&format!("{what} needs a name at the server"))
            })?;
        let name = name.parse().map_err(|error: udpack_transfer::PathError| {
            Failure::new(Kind::Policy, error.to_string()).hint("choose another name with --as")
        })?;
        self.stdin = Some(name);
        Ok(())
    }

    /// The first two different files that would be stored under one name, and that name. Walks everything where that
    /// is possible at all, and blocks meanwhile.
    pub(super) fn clash(&self) -> Option<(PathBuf, PathBuf, String)> {
        if !self.may_clash() {
            return None;
        }
        let mut names = Names::default();
        if let Some(stdin) = &self.stdin {
            names.insert(stdin.as_str(), (0, 0));
        }
        self.entries().find_map(|found| {
            if names.look(&found) != Seen::Other {
                return None;
            }
            let (remote, second) = (found.remote, found.local);
            let is_stdin = |stdin: &RelPath| stdin.as_str() == remote;
            let first = if self.stdin.as_ref().is_some_and(is_stdin) {
                PathBuf::from("-")
            } else {
                let mut named = self.entries().filter(|found| is_named(&found.what));
                named.find(|found| found.remote == remote)?.local
            };
            // It may have been replaced between the two looks.
            (first != second).then_some((first, second, remote))
        })
    }

    /// Whether something of the same name may come from two of the paths.
    fn may_clash(&self) -> bool {
        // Two names here may be ways to write one.
        if self.mapped {
            return true;
        }
        let listed = || self.listed().map(|root| root.remote);
        let named = || {
            let stdin = self.stdin.iter().map(|name| name.as_str().to_owned());
            let roots = self.roots.iter().map(|root| root.remote.clone());
            stdin.chain(roots).chain(listed())
        };
        let hasher = RandomState::new();
        let mut names = HashSet::new();
        if !named().all(|name| names.insert(hasher.hash_one(&*name))) {
            return true;
        }
        // One within the other.
        named().any(|name| {
            let above = std::iter::successors((!name.is_empty()).then_some(&*name), |path| {
                (!path.is_empty()).then(|| path.rsplit_once('/').map_or("", |(above, _)| above))
            });
            above
                .skip(1)
                .any(|above| names.contains(&hasher.hash_one(above)))
        })
    }

    fn listed(&self) -> impl Iterator<Item = Root> + Send + use<> {
        let list = self.list.clone();
        list.into_iter().flat_map(|(list, dir)| {
            let paths = list.paths();
            paths.map(move |path| listed(path, &dir))
        })
    }

    /// Every entry, one after the other; a file that is named twice counts once. Blocks while it goes on.
    pub(super) fn walk(&self) -> impl Iterator<Item = Found> + Send + use<> {
        let mut names = self.may_clash().then(Names::default);
        self.entries().filter(move |found| {
            let names = names.as_mut();
            names.is_none_or(|names| names.look(found) != Seen::Again)
        })
    }

    /// Does `work` for every entry, `jobs` of them side by side, and `done` with what comes of each, until that fails.
    pub(super) async fn each<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        self,
        jobs: u8,
        work: impl Fn(Found) -> F,
        mut done: impl FnMut(T) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let (found, mut entries) = mpsc::channel(AHEAD);
        // Ends with the receiver.
        tokio::task::spawn_blocking(move || {
            for entry in self.walk() {
                if found.blocking_send(entry).is_err() {
                    return;
                }
            }
        });
        let mut running = JoinSet::new();
        let mut more = true;
        while more || !running.is_empty() {
            let room = running.len() < usize::from(jobs);
            tokio::select! {
                entry = entries.recv(), if more && room => match entry {
                    Some(entry) => {
                        running.spawn(work(entry));
                    }
                    None => more = false,
                },
                Some(result) = running.join_next() => {
                    done(result.context("what was to be done for a file failed")?)?;
                }
            }
        }
        Ok(())
    }

    fn entries(&self) -> impl Iterator<Item = Found> + Send + use<> {
        let exclude: Exclude = self.tree.exclude.iter().cloned().collect();
        let (links, every_dir, mapped) = (self.tree.links, self.every_dir, self.mapped);
        self.roots
            .clone()
            .into_iter()
            .chain(self.listed())
            .filter({
                let exclude = exclude.clone();
                move |root| !is_left_out(root, &exclude)
            })
            .flat_map(move |root| {
                Walk::new(root.local, root.remote)
                    .exclude(exclude.clone())
                    .links(links)
                    .every_dir(every_dir)
                    .mapped(mapped)
            })
    }
}

/// The names that files and links of a walk have had so far, hashed, and which files those are.
#[derive(Debug, Default)]
struct Names {
    hasher: RandomState,
    seen: HashMap<u64, (u64, u64)>,
}

/// Whether something had the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    New,
    /// This very file.
    Again,
    Other,
}

impl Names {
    fn look(&mut self, found: &Found) -> Seen {
        let metadata = match &found.what {
            What::File { .. } => fs::metadata(&found.local),
            What::Link { .. } => fs::symlink_metadata(&found.local),
            // Directories of one name become one; what fails is told by itself.
            _ => return Seen::New,
        };
        let file = metadata.map_or((0, 0), |metadata| (metadata.dev(), metadata.ino()));
        self.insert(&found.remote, file)
    }

    /// The file that has this name is this one, by device and inode.
    fn insert(&mut self, name: &str, file: (u64, u64)) -> Seen {
        match self.seen.entry(self.hasher.hash_one(name)) {
            Entry::Vacant(entry) => {
                entry.insert(file);
                Seen::New
            }
            Entry::Occupied(known) if *known.get() == file => Seen::Again,
            Entry::Occupied(_) => Seen::Other,
        }
    }
}

fn is_named(what: &What) -> bool {
    matches!(what, What::File { .. } | What::Link { .. })
}

/// A path of a list: it is the name at the server, too.
fn listed(local: PathBuf, dir: &str) -> Root {
    let name = names::from_os(local.as_os_str());
    let mut name = name.as_ref();
    while let Some(rest) = name.strip_prefix("./") {
        name = rest;
    }
    let remote = join(dir, name.trim_end_matches('/'));
    Root { local, remote }
}

/// Patterns also leave out what was named itself, as where a shell put the names together.
fn is_left_out(root: &Root, exclude: &Exclude) -> bool {
    match root.local.file_name() {
        Some(name) if !is_content(&root.local) => {
            exclude.matches(&names::from_os(name), root.local.is_dir())
        }
        _ => false,
    }
}

/// Whether a path stands for what is in a directory, not for the directory itself: `dir/`, `.`, `dir/..`.
fn is_content(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    bytes.ends_with(b"/") || bytes.ends_with(b"/.") || bytes == b"." || path.file_name().is_none()
}

/// The path's own name, or what `--as` makes of it. Not yet known to be valid; "" is the server's root.
pub(super) fn remote_name(path: &Path, wanted: Option<&str>) -> String {
    let own = || match path.file_name() {
        Some(name) if !is_content(path) => names::from_os(name).into_owned(),
        _ => String::new(),
    };
    match wanted {
        Some(dir) if dir.ends_with('/') => join(trimmed(dir), &own()),
        Some(name) => name.to_owned(),
        None => own(),
    }
}

/// The same, where names here are written as they can be held here.
fn mapped_name(path: &Path, wanted: Option<&str>) -> String {
    match (wanted, path.file_name()) {
        (Some(name), _) if !name.ends_with('/') => name.to_owned(),
        (_, Some(name)) if !is_content(path) => {
            let own = unescape_name(&names::from_os(name));
            wanted.map_or_else(|| own.clone(), |dir| join(trimmed(dir), &own))
        }
        _ => remote_name(path, wanted),
    }
}

/// Without the slash that makes it a directory.
fn trimmed(name: &str) -> &str {
    name.strip_suffix('/').unwrap_or(name)
}

/// Finds out before dialling whether it can be sent at all. Gives a file's size.
fn check(path: &Path, remote: &str, links: bool) -> anyhow::Result<Option<u64>> {
    let unreadable = |source| TransferError::Source {
        path: path.to_owned(),
        source,
    };
    let metadata = if links {
        fs::symlink_metadata(path)
    } else {
        fs::metadata(path)
    };
    let metadata = metadata.map_err(unreadable)?;
    let is_content = metadata.is_dir() && remote.is_empty();
    if metadata.is_dir() {
        fs::read_dir(path).map_err(unreadable)?;
    } else if metadata.is_file() {
        File::open(path).map_err(unreadable)?;
    } else if !metadata.is_symlink() {
        let text = format!("not a regular file: {}", path.display());
        return Err(Failure::new(Kind::LocalFile, text)
            .hint("send what it gives: udpack-client put - --as NAME < PIPE")
            .into());
    }
    if !is_content {
        remote
            .parse::<RelPath>()
            .map_err(|error: udpack_transfer::PathError| {
                Failure::new(Kind::Policy, error.to_string()).hint("choose another name with --as")
            })?;
    }
    Ok(metadata.is_file().then_some(metadata.len()))
}

/// Entries walked ahead of what is done with them.
const AHEAD: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_at_the_server_follow_the_paths_and_as() {
        for (path, wanted, expected) in [
            ("a/b", None, "b"),
            ("a/b/", None, ""),
            (".", None, ""),
            ("./", None, ""),
            ("a/..", None, ""),
            ("/", None, ""),
            ("a/b", Some("n"), "n"),
            ("a/b", Some("n/m"), "n/m"),
            ("a/b/", Some("n"), "n"),
            ("a/b", Some("n/"), "n/b"),
            ("a/b/", Some("n/"), "n"),
            ("a/b", Some("/"), "b"),
            ("a/b", Some("../x/"), "../x/b"),
        ] {
            assert_eq!(
                remote_name(Path::new(path), wanted),
                expected,
                "{path} {wanted:?}"
            );
        }
    }

    #[test]
    fn a_list_has_a_path_on_each_line_however_it_ends() {
        let paths = |bytes: &[u8], null| -> Vec<PathBuf> {
            let bytes = bytes.into();
            List { bytes, null }.paths().collect()
        };
        let expected = [PathBuf::from("a b"), PathBuf::from("c")];
        for bytes in [
            &b"a b\nc"[..],
            b"a b\nc\n",
            b"\na b\n\n\nc\n",
            b"a b\r\nc\r\n",
            b"\xef\xbb\xbfa b\r\n\r\nc",
        ] {
            assert_eq!(paths(bytes, false), expected, "{bytes:?}");
        }
        assert_eq!(paths(b"a b\0c\0", true), expected);
        let odd = paths(b"\xef\xbb\xbfa\r\n\0\0b\r", true);
        let bytes: Vec<_> = odd.iter().map(|path| path.as_os_str().as_bytes()).collect();
        assert_eq!(bytes, [&b"\xef\xbb\xbfa\r\n"[..], b"b\r"], "word for word");
        for nothing in [
            &b""[..],
            b"\n",
            b"\r\n\r\n",
            b"\xef\xbb\xbf",
            b"\xef\xbb\xbf\r\n",
        ] {
            assert!(paths(nothing, false).is_empty(), "{nothing:?}");
        }
    }

    #[test]
    fn a_listed_path_is_its_own_name() {
        for (line, dir, expected) in [
            ("a/b", "", "a/b"),
            ("./a/b", "", "a/b"),
            ("././a", "d/e", "d/e/a"),
            ("dir/", "", "dir"),
            ("/etc/passwd", "", "/etc/passwd"),
            ("../x", "", "../x"),
        ] {
            assert_eq!(listed(line.into(), dir).remote, expected);
        }
    }
}
