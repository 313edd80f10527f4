//! Reads what strace writes (`-f -y -o FILE`).

use std::collections::{BTreeMap, BTreeSet};

/// One system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) thread: u32,
    pub(crate) name: String,
    /// Arguments and result, descriptors with their paths.
    pub(crate) text: String,
    pub(crate) injected: bool,
}

impl Call {
    /// The paths of its descriptors that are `root` or lie below it, relative to it.
    pub(crate) fn paths_below(&self, root: &str) -> Vec<String> {
        self.text
            .split('<')
            .skip(1)
            .filter_map(|rest| rest.split('>').next())
            .filter_map(|path| path.strip_prefix(root))
            .filter(|path| path.is_empty() || path.starts_with('/'))
            .map(|path| path.trim_start_matches('/').to_owned())
            .collect()
    }

    fn succeeded(&self) -> bool {
        self.text
            .rsplit_once(" = ")
            .is_some_and(|(_, result)| !result.starts_with('-') && !result.starts_with('?'))
    }

    /// The names of staging files in it: in quotes, or at the end of a descriptor's path.
    fn parts(&self) -> Vec<&str> {
        let names = self.text.split(['"', '<', '>', '/', ' ']);
        names.filter(|name| name.ends_with(".part")).collect()
    }
}

/// The calls in the order in which they ended, joined where another thread's came between.
pub(crate) fn parse(text: &str) -> Vec<Call> {
    let mut begun: BTreeMap<u32, (String, String)> = BTreeMap::new();
    let mut calls = Vec::new();
    for line in text.lines() {
        let Some((thread, rest)) = line.split_once(' ') else {
            continue;
        };
        let Ok(thread) = thread.parse() else { continue };
        let rest = rest.trim_start();
        let (name, text) = if let Some(rest) = rest.strip_prefix("<... ") {
            let Some((name, end)) = rest.split_once(" resumed>") else {
                continue;
            };
            match begun.remove(&thread) {
                Some((before, start)) if before == name => (before, start + end),
                _ => (name.to_owned(), end.to_owned()),
            }
        } else {
            let Some((name, text)) = rest.split_once('(') else {
                continue;
            };
            if let Some(start) = text.strip_suffix("<unfinished ...>") {
                begun.insert(thread, (name.to_owned(), start.to_owned()));
                continue;
            }
            (name.to_owned(), text.to_owned())
        };
        calls.push(Call {
            thread,
            injected: text.ends_with("(INJECTED)"),
            name,
            text,
        });
    }
    // What never ended was begun all the same.
    calls.extend(begun.into_iter().map(|(thread, (name, text))| Call {
        thread,
        name,
        text,
        injected: false,
    }));
    calls
}

/// Staging files that were synced again or got a name after a sync of theirs failed: the kernel may have dropped
/// what it could not write, and says so only once.
///
/// A failed `syncfs` may have been about any of them. It leaves each file's own error to the file's own `fsync`,
/// which reports what happened since the file was opened, so one that succeeds settles that: after it, or before it,
/// since it is the last that is done to a file (`fdatasync` is for what goes on).
pub(crate) fn published_unsynced(calls: &[Call]) -> Vec<String> {
    let mut staged = BTreeSet::new();
    let mut failed = BTreeSet::new();
    let mut in_doubt: BTreeSet<String> = BTreeSet::new();
    let mut settled = BTreeSet::new();
    let mut wrong = Vec::new();
    for call in calls {
        let parts = || call.parts().into_iter().map(str::to_owned);
        match call.name.as_str() {
            "fsync" | "fdatasync" => {
                for part in parts() {
                    if failed.contains(&part) {
                        wrong.push(format!("{part} was synced again after that failed"));
                    } else if call.injected {
                        failed.insert(part);
                    } else if call.succeeded() {
                        in_doubt.remove(&part);
                        if call.name == "fsync" {
                            settled.insert(part);
                        }
                    }
                }
            }
            "syncfs" if call.injected => in_doubt.extend(staged.difference(&settled).cloned()),
            "openat" | "openat2" if call.text.contains("O_CREAT") && call.succeeded() => {
                staged.extend(parts());
            }
            "unlink" | "unlinkat" if call.succeeded() => {
                for part in parts() {
                    staged.remove(&part);
                    settled.remove(&part);
                    failed.remove(&part);
                    in_doubt.remove(&part);
                }
            }
            "renameat" | "renameat2" | "linkat" if call.succeeded() => {
                for part in parts() {
                    staged.remove(&part);
                    settled.remove(&part);
                    if failed.remove(&part) | in_doubt.remove(&part) {
                        wrong.push(format!("{part} was published after its sync failed"));
                    }
                }
            }
            _ => {}
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
12 openat(5</up/.udpack/staging>, \"a.part\", O_RDWR|O_CREAT|O_EXCL|O_CLOEXEC, 0600) = 9</up/.udpack/staging/a.part>
12 write(9</up/.udpack/staging/a.part>, \"\\1\", 1 <unfinished ...>
13 write(4<anon_inode:[eventfd]>, \"\\1\", 8) = 8
12 <... write resumed>) = 1
12 fsync(9</up/.udpack/staging/a.part>) = -1 EIO (Input/output error) (INJECTED)
13 +++ exited with 0 +++
12 renameat2(5</up/.udpack/staging>, \"a.part\", 3</up>, \"a\", RENAME_NOREPLACE <unfinished ...>
";

    #[test]
    fn joins_what_another_thread_interrupted() {
        let calls = parse(TRACE);
        let names: Vec<_> = calls
            .iter()
            .map(|call| (call.thread, &*call.name))
            .collect();
        assert_eq!(
            names,
            [
                (12, "openat"),
                (13, "write"),
                (12, "write"),
                (12, "fsync"),
                (12, "renameat2")
            ]
        );
        assert!(calls.iter().any(|call| call.text.ends_with("\", 1 ) = 1")));
        assert!(
            calls
                .iter()
                .filter(|call| call.injected)
                .all(|call| call.name == "fsync")
        );
    }

    #[test]
    fn finds_the_paths_of_descriptors() {
        let calls = parse(TRACE);
        let paths: Vec<_> = calls.iter().map(|call| call.paths_below("/up")).collect();
        assert_eq!(
            paths.first().map(Vec::as_slice),
            Some(
                &[
                    ".udpack/staging".to_owned(),
                    ".udpack/staging/a.part".to_owned()
                ][..]
            )
        );
        assert_eq!(paths.get(1).map(Vec::len), Some(0));
    }

    #[test]
    fn tells_of_files_published_after_a_failed_sync() {
        assert_eq!(published_unsynced(&parse(TRACE)), Vec::<String>::new());
        let done = TRACE.replace("NOREPLACE <unfinished ...>", "NOREPLACE) = 0");
        assert_eq!(
            published_unsynced(&parse(&done)),
            ["a.part was published after its sync failed"]
        );
        let again = format!("{TRACE}12 fsync(9</up/.udpack/staging/a.part>) = 0\n");
        assert_eq!(
            published_unsynced(&parse(&again)),
            ["a.part was synced again after that failed"]
        );
        let whole = done.replace(
            "12 fsync(9</up/.udpack/staging/a.part>)",
            "12 syncfs(5</up/.udpack/staging>)",
        );
        assert_eq!(
            published_unsynced(&parse(&whole)),
            ["a.part was published after its sync failed"]
        );
        let settled = "12 fsync(9</up/.udpack/staging/a.part>) = 0\n12 renameat2";
        let settled = whole.replace("12 renameat2", settled);
        assert_eq!(published_unsynced(&parse(&settled)), Vec::<String>::new());
        let before = "12 fsync(9</up/.udpack/staging/a.part>) = 0\n12 syncfs";
        let before = whole.replace("12 syncfs", before);
        assert_eq!(published_unsynced(&parse(&before)), Vec::<String>::new());
        assert_eq!(
            published_unsynced(&parse(&before.replace("fsync", "fdatasync"))),
            ["a.part was published after its sync failed"]
        );
        let anew = "12 unlinkat(5</up/.udpack/staging>, \"a.part\", 0) = 0\n";
        let fixed = done.replace("12 renameat2", &format!("{anew}12 renameat2"));
        assert_eq!(published_unsynced(&parse(&fixed)), Vec::<String>::new());
    }
}
