//! Checks the order of a list: each entry is below the listed directory and sorts after the previous one.
//!
//! So every list ends, and no entry is below a file or a link.

use super::broken;
use crate::base::names;
use crate::base::path::{RelPath, printable};
use crate::local::error::TransferError;
use crate::store::{Entry, Kind};

/// Checks one list, entry by entry. It keeps only the last path and the directories above it.
#[derive(Debug)]
pub(super) struct Order {
    /// The requested directory; empty for the root.
    root: String,
    recursive: bool,
    last: Option<String>,
    /// The directories listed on the way to the last entry, outermost first.
    open: Vec<String>,
}

impl Order {
    pub(super) fn new(root: Option<&RelPath>, recursive: bool) -> Self {
        Self {
            root: root.map_or_else(String::new, |path| path.as_str().to_owned()),
            recursive,
            last: None,
            open: Vec::new(),
        }
    }

    /// Checks the next entry, whose path has been parsed.
    pub(super) fn check(&mut self, entry: &Entry) -> Result<(), TransferError> {
        let path = entry.path.as_str();
        let wrong = |what: &str| Err(broken(format!("entry {}: {what}", printable(path))));
        if let Some(last) = &self.last
            && !comes_before(last, path)
        {
            return wrong("it does not come after the one before");
        }
        if self.last.as_ref() == Some(&self.root) {
            return wrong("what was listed is no directory");
        }
        if path == self.root && entry.kind != Kind::Dir {
            // The requested name is no directory, and is listed as itself.
            self.last = Some(path.to_owned());
            return Ok(());
        }
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        while self.open.last().is_some_and(|dir| dir != parent) {
            self.open.pop();
        }
        if self.open.is_empty() && parent != self.root {
            return wrong("it is not in a directory that was listed");
        }
        if self.recursive && entry.kind == Kind::Dir {
            self.open.push(path.to_owned());
        }
        self.last = Some(path.to_owned());
        Ok(())
    }
}

/// Whether a list has `a` before `b`: the paths are compared component by component, as bytes.
fn comes_before(a: &str, b: &str) -> bool {
    let (a, b) = (names::bytes(a), names::bytes(b));
    let slash = |byte: &u8| *byte == b'/';
    a.split(slash).lt(b.split(slash))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Time;

    fn all(root: Option<&str>, recursive: bool, entries: &[&str]) -> Result<(), String> {
        let root = root.map(|root| root.parse::<RelPath>().unwrap());
        let mut order = Order::new(root.as_ref(), recursive);
        for path in entries {
            let (path, kind) = match (path.strip_suffix('/'), path.strip_suffix('@')) {
                (Some(dir), _) => (dir, Kind::Dir),
                (_, Some(link)) => (link, Kind::Link),
                _ => (*path, Kind::File),
            };
            let entry = Entry {
                path: path.to_owned(),
                kind,
                size: 0,
                mtime: Time { secs: 0, nanos: 0 },
                mode: 0o644,
                target: None,
                unread: false,
            };
            order.check(&entry).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    #[test]
    fn takes_what_a_server_sends() {
        let tree = ["a/", "a/b/", "a/b/c", "a/d", "a b", "b@", "c"];
        all(None, true, &tree).unwrap();
        all(None, false, &["a/", "a b", "c"]).unwrap();
        all(Some("x/y"), true, &["x/y/a/", "x/y/a/b", "x/y/c"]).unwrap();
        all(Some("x/y"), true, &["x/y"]).unwrap();
        all(None, true, &[]).unwrap();
    }

    #[test]
    fn refuses_what_lies_elsewhere_or_comes_again() {
        for (root, recursive, entries) in [
            (None, true, &["a", "a"][..]),
            (None, true, &["b", "a"]),
            (None, true, &["a", "a/b"]),
            (None, true, &["a@", "a/b"]),
            (None, true, &["a/b"]),
            (None, true, &["a/", "a/b", "b", "a/c"]),
            (None, true, &["a/", "a/b/c"]),
            (None, false, &["a/", "a/b"]),
            (Some("x"), true, &["x/"]),
            (Some("x"), true, &["x", "x/a"]),
            (Some("x"), true, &["y"]),
            (Some("x"), true, &["xy/a"]),
            (Some("x/y"), true, &["x/z"]),
        ] {
            assert!(
                all(root, recursive, entries).is_err(),
                "{root:?} {entries:?}"
            );
        }
    }
}
