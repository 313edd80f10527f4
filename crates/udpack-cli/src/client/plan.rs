//! Which local files, under which names: what `put` sends and `verify` compares.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use udpack_transfer::{Exclude, Found, RelPath, TransferError, Walk};

use crate::args::TreeArgs;
use crate::exit::{Failure, Kind};

/// What was asked for, checked as far as that can be done without walking anything.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) roots: Vec<Root>,
    /// The name for standard input, if it is to be sent.
    pub(super) stdin: Option<RelPath>,
    /// A list of further paths, and the directory at the server for them.
    list: Option<(List, String)>,
    tree: TreeArgs,
    every_dir: bool,
    /// Bytes and number of all files, where only files were named.
    pub(super) files: Option<usize>,
    pub(super) bytes: Option<u64>,
}

/// A file or directory to walk, and the name at the server for it; "" for what is in it alone.
#[derive(Debug)]
pub(super) struct Root {
    local: PathBuf,
    remote: String,
}

struct List(Box<dyn BufRead + Send>);

impl std::fmt::Debug for List {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("List")
    }
}

/// What a command line says.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    pub(super) paths: &'a [PathBuf],
    pub(super) files_from: Option<&'a Path>,
    pub(super) name: Option<&'a str>,
    pub(super) tree: &'a TreeArgs,
    /// List every directory, not only the empty ones.
    pub(super) every_dir: bool,
}

impl Plan {
    /// Paths that cannot be read or named are handed to `failed`, as name at the server, local path and reason;
    /// what could never work is an error.
    pub(super) fn new(
        asked: &Asked<'_>,
        mut failed: impl FnMut(&str, &Path, anyhow::Error),
    ) -> anyhow::Result<Self> {
        if asked.name.is_some_and(|name| !name.ends_with('/'))
            && (asked.paths.len() > 1 || asked.files_from.is_some())
        {
            return Err(Failure::new(Kind::Usage, "--as NAME takes a single path")
                .hint("end it with a slash to name a directory for all of them")
                .into());
        }
        let mut plan = Self {
            roots: Vec::new(),
            stdin: None,
            list: None,
            tree: asked.tree.clone(),
            every_dir: asked.every_dir,
            files: None,
            bytes: None,
        };
        plan.take_list(asked)?;
        let mut taken: HashMap<String, &Path> = HashMap::new();
        // Only while it is nothing but files.
        let mut sum = asked.files_from.is_none().then_some(0);
        for path in asked.paths {
            if path.as_os_str() == "-" {
                plan.take_stdin(asked)?;
                sum = None;
                continue;
            }
            let remote = remote_name(path, asked.name);
            if let Some(other) = taken.insert(remote.clone(), path)
                && !is_content(path)
            {
                let text = format!(
                    "{} and {} would both be stored as {remote}",
                    other.display(),
                    path.display()
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
        if asked.files_from.is_some_and(|list| list == "-") || self.stdin.is_some() {
            return Err(unfit("standard input can be read only once").into());
        }
        let name = asked
            .name
            .filter(|name| !name.ends_with('/'))
            .ok_or_else(|| unfit("standard input needs a name at the server"))?;
        let name = name.parse().map_err(|error: udpack_transfer::PathError| {
            Failure::new(Kind::Policy, error.to_string()).hint("choose another name with --as")
        })?;
        self.stdin = Some(name);
        Ok(())
    }

    fn take_list(&mut self, asked: &Asked<'_>) -> anyhow::Result<()> {
        let Some(from) = asked.files_from else {
            return Ok(());
        };
        let list: Box<dyn BufRead + Send> = if from == "-" {
            Box::new(BufReader::new(io::stdin()))
        } else {
            let file = File::open(from).map_err(|source| TransferError::Source {
                path: from.to_owned(),
                source,
            })?;
            Box::new(BufReader::new(file))
        };
        let dir = asked.name.map(trimmed).unwrap_or_default();
        self.list = Some((List(list), dir.to_owned()));
        Ok(())
    }

    /// Every entry, one after the other. Blocks while it goes on.
    pub(super) fn walk(self) -> impl Iterator<Item = Found> + Send + 'static {
        let exclude: Exclude = self.tree.exclude.iter().cloned().collect();
        let (links, every_dir) = (self.tree.links, self.every_dir);
        let listed = self.list.into_iter().flat_map(|(List(list), dir)| {
            list.split(b'\n')
                .map_while(Result::ok)
                .filter(|line| !line.is_empty())
                .map(move |line| listed(&line, &dir))
        });
        self.roots
            .into_iter()
            .chain(listed)
            .filter({
                let exclude = exclude.clone();
                move |root| !is_left_out(root, &exclude)
            })
            .flat_map(move |root| {
                Walk::new(root.local, root.remote)
                    .exclude(exclude.clone())
                    .links(links)
                    .every_dir(every_dir)
            })
    }
}

/// A line of a list: the path is the name at the server, too.
fn listed(line: &[u8], dir: &str) -> Root {
    let local = PathBuf::from(OsStr::from_bytes(line));
    let name = local.to_string_lossy();
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
            exclude.matches(&name.to_string_lossy(), root.local.is_dir())
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
fn remote_name(path: &Path, wanted: Option<&str>) -> String {
    let own = || match path.file_name() {
        Some(name) if !is_content(path) => name.to_string_lossy().into_owned(),
        _ => String::new(),
    };
    match wanted {
        Some(dir) if dir.ends_with('/') => join(trimmed(dir), &own()),
        Some(name) => name.to_owned(),
        None => own(),
    }
}

/// Without the slash that makes it a directory.
fn trimmed(name: &str) -> &str {
    name.strip_suffix('/').unwrap_or(name)
}

fn join(dir: &str, name: &str) -> String {
    match (dir, name) {
        ("", name) => name.to_owned(),
        (dir, "") => dir.to_owned(),
        (dir, name) => format!("{dir}/{name}"),
    }
}

/// Finds out before dialling whether it can be sent at all. Gives a file's size.
fn check(path: &Path, remote: &str, links: bool) -> anyhow::Result<Option<u64>> {
    let unreadable = |source| TransferError::Source {
        path: path.to_owned(),
        source,
    };
    let metadata = if links {
        std::fs::symlink_metadata(path)
    } else {
        std::fs::metadata(path)
    };
    let metadata = metadata.map_err(unreadable)?;
    let is_content = metadata.is_dir() && remote.is_empty();
    if metadata.is_dir() {
        std::fs::read_dir(path).map_err(unreadable)?;
    } else if metadata.is_file() {
        File::open(path).map_err(unreadable)?;
    } else if !metadata.is_symlink() {
        let text = format!("not a regular file: {}", path.display());
        return Err(Failure::new(Kind::LocalFile, text)
            .hint("send what it gives with `put - --as NAME`")
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
    fn a_listed_path_is_its_own_name() {
        for (line, dir, expected) in [
            ("a/b", "", "a/b"),
            ("./a/b", "", "a/b"),
            ("././a", "d/e", "d/e/a"),
            ("dir/", "", "dir"),
            ("/etc/passwd", "", "/etc/passwd"),
            ("../x", "", "../x"),
        ] {
            assert_eq!(listed(line.as_bytes(), dir).remote, expected);
        }
    }
}
