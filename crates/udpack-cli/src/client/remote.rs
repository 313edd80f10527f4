//! `ls`, `stat` and `rm`: the server's files, without transferring any.

use serde_json::{Value, json};
use udpack_transfer::{Entry, Kind as EntryKind, RelPath, Remote};

use super::failures::Failures;
use super::get::UNREAD;
use crate::args::{LsArgs, RmArgs, StatArgs};
use crate::exit::{Explained, Failure, Kind};
use crate::json::{concluded, failed};
use crate::logging::Console;
use crate::output;
use crate::signals::Interrupts;
use crate::target::{Target, retry};
use crate::when;

/// What of `path` lies below `root`; both are paths of the server.
pub(super) fn below<'a>(root: &str, path: &'a str) -> &'a str {
    match root {
        "" => path,
        root => path
            .strip_prefix(root)
            .and_then(|rest| rest.strip_prefix('/'))
            .unwrap_or_default(),
    }
}

/// Whether `rel` is below this directory, at any depth.
pub(super) fn is_in(rel: &str, dir: &str) -> bool {
    dir.is_empty()
        || rel
            .strip_prefix(dir)
            .is_some_and(|rest| rest.starts_with('/'))
}

/// The path of an entry of this name in a directory; "" is the root, on either side.
pub(super) fn join(dir: &str, name: &str) -> String {
    match (dir, name) {
        ("", name) => name.to_owned(),
        (dir, "") => dir.to_owned(),
        (dir, name) => format!("{dir}/{name}"),
    }
}

/// A path at the server as it was typed: `None` is the root. A slash at the end changes nothing.
pub(super) fn remote_path(path: &str) -> anyhow::Result<Option<RelPath>> {
    let path = path.strip_prefix("./").unwrap_or(path);
    let path = path.strip_suffix("/.").unwrap_or(path);
    match path.strip_suffix('/').unwrap_or(path) {
        "" | "." => Ok(None),
        path => path
            .parse()
            .map(Some)
            .map_err(|error: udpack_transfer::PathError| {
                Failure::new(Kind::Policy, error.to_string())
                    .hint("name it as `udpack-client ls` shows it")
                    .into()
            }),
    }
}

pub(super) async fn ls(args: LsArgs, interrupts: Interrupts) -> anyhow::Result<()> {
    let mut count = 0;
    let result = list(&args, interrupts, &mut count).await;
    concluded(args.json, count, result)
}

async fn list(args: &LsArgs, mut interrupts: Interrupts, count: &mut usize) -> anyhow::Result<()> {
    let path = remote_path(args.path.as_deref().unwrap_or_default())?;
    let target = Target::find(&args.connect)?;
    target
        .run_link_aloud(retry(None), &mut interrupts, async |link| {
            let remote = Remote::new(&link);
            let mut listing = remote.list(path.as_ref(), args.recursive);
            let mut unread = None;
            while let Some(entry) = listing.next().await {
                let entry = entry?;
                if entry.unread {
                    let (_, count) = unread.get_or_insert_with(|| (entry.path.clone(), 0u64));
                    *count += 1;
                }
                let written = show(&entry, args);
                *count += 1;
                if !output::goes_on(written)? {
                    break;
                }
            }
            match unread {
                None => Ok(()),
                Some((first, count)) => {
                    let first = output::printable(&first);
                    let text = match count {
                        1 => format!("{first}: {UNREAD}"),
                        _ => format!("{first} and {} more: {UNREAD}", count - 1),
                    };
                    Err(Failure::new(Kind::RemoteStorage, text).into())
                }
            }
        })
        .await
}

fn show(entry: &Entry, args: &LsArgs) -> std::io::Result<()> {
    if args.json {
        return output::json(&shown(entry));
    }
    let path = output::printable(&entry.path);
    let name = match (entry.kind, &entry.target) {
        (EntryKind::Dir, _) => format!("{path}/"),
        (EntryKind::Link, Some(target)) if args.long => {
            format!("{path} -> {}", output::printable(target))
        }
        _ => path,
    };
    if !args.long {
        return output::line(&name);
    }
    output::line(&format!(
        "{}  {:>12}  {}  {name}",
        mode(entry),
        entry.size,
        when::utc(entry.mtime.secs)
    ))
}

fn shown(entry: &Entry) -> Value {
    let mut shown = json!({
        "event": "entry",
        "path": entry.path,
        "kind": kind(entry.kind),
        "size": entry.size,
        "mtime": entry.mtime.secs,
        "mtime_ns": entry.mtime.nanos,
        "mode": entry.mode,
    });
    if let (Some(target), Some(shown)) = (&entry.target, shown.as_object_mut()) {
        shown.insert("target".to_owned(), target.clone().into());
    }
    if let (true, Some(shown)) = (entry.unread, shown.as_object_mut()) {
        shown.insert("unread".to_owned(), true.into());
    }
    shown
}

fn kind(kind: EntryKind) -> &'static str {
    match kind {
        EntryKind::File => "file",
        EntryKind::Dir => "dir",
        EntryKind::Link => "link",
        EntryKind::Other => "other",
    }
}

/// As `ls -l` shows it: `drwxr-x---`.
fn mode(entry: &Entry) -> String {
    let mut text = String::from(match entry.kind {
        EntryKind::File => '-',
        EntryKind::Dir => 'd',
        EntryKind::Link => 'l',
        EntryKind::Other => '?',
    });
    for (bit, letter) in (0..9).rev().zip("rwxrwxrwx".chars()) {
        let set = entry.mode >> bit & 1 == 1;
        text.push(if set { letter } else { '-' });
    }
    text
}

pub(super) async fn stat(
    args: StatArgs,
    console: &Console,
    interrupts: Interrupts,
) -> anyhow::Result<()> {
    let mut count = 0;
    let result = describe_all(&args, console, interrupts, &mut count).await;
    concluded(args.json, count, result)
}

async fn describe_all(
    args: &StatArgs,
    console: &Console,
    mut interrupts: Interrupts,
    count: &mut usize,
) -> anyhow::Result<()> {
    let target = Target::find(&args.connect)?;
    target
        .run_link_aloud(retry(None), &mut interrupts, async |link| {
            let remote = Remote::new(&link);
            let mut failures = Failures::new(console);
            for path in &args.paths {
                let found = match remote_path(path) {
                    Ok(name) => remote.stat(name.as_ref()).await.map_err(Into::into),
                    Err(error) => Err(error),
                };
                match found {
                    Ok(entry) => {
                        failures.tell();
                        *count += 1;
                        let written = if args.json {
                            output::json(&shown(&entry))
                        } else {
                            describe(&entry)
                        };
                        if !output::goes_on(written)? {
                            break;
                        }
                    }
                    Err(error) => {
                        let explained = Explained::of(&error);
                        failed(args.json, path, &explained)?;
                        failures.add(path, explained, args.paths.len() == 1);
                    }
                }
            }
            failures.verdict(args.paths.len(), "found", None)
        })
        .await
}

/// A label and a value a line.
fn describe(entry: &Entry) -> std::io::Result<()> {
    let path = if entry.path.is_empty() {
        "/"
    } else {
        &entry.path
    };
    output::line(&format!("path {}", output::printable(path)))?;
    output::line(&format!("kind {}", kind(entry.kind)))?;
    output::line(&format!("size {}", entry.size))?;
    output::line(&format!("modified {}", when::utc(entry.mtime.secs)))?;
    output::line(&format!("mode {:04o}", entry.mode))?;
    match &entry.target {
        Some(target) => output::line(&format!("target {}", output::printable(target))),
        None => Ok(()),
    }
}

pub(super) async fn rm(
    args: RmArgs,
    console: &Console,
    interrupts: Interrupts,
) -> anyhow::Result<()> {
    let mut count = 0;
    let result = remove(&args, console, interrupts, &mut count).await;
    concluded(args.json, count, result)
}

async fn remove(
    args: &RmArgs,
    console: &Console,
    mut interrupts: Interrupts,
    count: &mut usize,
) -> anyhow::Result<()> {
    let mut paths = Vec::new();
    for path in &args.paths {
        let Some(name) = remote_path(path)? else {
            return Err(Failure::new(Kind::Usage, "the root cannot be removed")
                .hint("name what is in it")
                .into());
        };
        paths.push(name);
    }
    let target = Target::find(&args.connect)?;
    target
        .run_link_aloud(retry(None), &mut interrupts, async |link| {
            let remote = Remote::new(&link);
            let mut failures = Failures::new(console);
            for path in &paths {
                match remote.remove(path, args.recursive).await {
                    Ok(removed) => {
                        failures.tell();
                        *count += 1;
                        let (files, bytes) = (removed.files, removed.bytes);
                        // The removal is done even if standard output is closed.
                        output::unless_gone(if args.json {
                            output::json(&json!({
                                "event": "removed", "removed": path.as_str(), "files": files, "bytes": bytes
                            }))
                        } else {
                            let path = output::printable(path.as_str());
                            output::line(&format!("removed {path}  {files}  {bytes}"))
                        })?;
                    }
                    Err(error) => {
                        let explained = Explained::of(&error.into());
                        failed(args.json, path.as_str(), &explained)?;
                        failures.add(path.as_str(), explained, paths.len() == 1);
                    }
                }
            }
            failures.verdict(paths.len(), "removed", None)
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use udpack_transfer::Time;

    #[test]
    fn the_root_has_many_names() {
        for root in ["", ".", "/", "./", "./."] {
            assert_eq!(remote_path(root).expect(root), None, "{root:?}");
        }
        for (path, name) in [("a", "a"), ("a/", "a"), ("./a/b", "a/b"), ("a/.", "a")] {
            let found = remote_path(path).expect(path).expect(path);
            assert_eq!(found.as_str(), name);
        }
        for bad in ["/a", "..", "a//b", "a/../b"] {
            remote_path(bad).expect_err(bad);
        }
    }

    #[test]
    fn modes_look_as_usual() {
        let entry = |kind, mode| Entry {
            path: "a".to_owned(),
            kind,
            size: 0,
            mtime: Time { secs: 0, nanos: 0 },
            mode,
            target: None,
            unread: false,
        };
        assert_eq!(mode(&entry(EntryKind::Dir, 0o750)), "drwxr-x---");
        assert_eq!(mode(&entry(EntryKind::File, 0o604)), "-rw----r--");
        assert_eq!(mode(&entry(EntryKind::Link, 0o777)), "lrwxrwxrwx");
    }
}
