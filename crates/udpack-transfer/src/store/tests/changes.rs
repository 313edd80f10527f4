//! What is noted of changes, and until when.

use std::fs;

use tempfile::TempDir;

use super::{Simple as _, begin, path};
use crate::store::changes::{Change, Changes, MOST_FRESH, What};
use crate::store::{IfExists, Overwrite, Store, StoreConfig, StoreError};

/// Stores; the name it got.
fn put(store: &Store, name: &str, bytes: &[u8], if_exists: IfExists) -> Result<String, StoreError> {
    let mut partial = begin(store, name, Some(bytes.len() as u64), if_exists)?;
    partial.write(bytes)?;
    partial.finish(None, None).map(|published| published.path)
}

fn tracked(dir: &TempDir) -> (Store, Changes) {
    let config = StoreConfig {
        changes: true,
        overwrite: Overwrite::Always,
        min_free: Some(0),
        ..StoreConfig::default()
    };
    let store = Store::open(dir.path(), config).unwrap();
    let changes = store.changes().unwrap().clone();
    (store, changes)
}

fn all(changes: &Changes) -> Vec<Change> {
    std::iter::from_fn(|| changes.take().unwrap()).collect()
}

fn names(changes: &[Change]) -> Vec<(&str, bool)> {
    let mut names: Vec<_> = changes
        .iter()
        .map(|change| (change.path().as_str(), change.removed()))
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn what_came_and_went_is_noted_until_it_is_settled_by_any_run() {
    let dir = tempfile::tempdir().unwrap();
    let (store, changes) = tracked(&dir);
    put(&store, "a", b"one", IfExists::Same).unwrap();
    put(&store, "d/b", b"two", IfExists::Same).unwrap();
    put(&store, "d/c", b"three", IfExists::Same).unwrap();
    store.remove(&path("d"), true).unwrap();
    drop((store, changes));
    // Nothing was settled: all of it comes again.
    let (store, changes) = tracked(&dir);
    assert_eq!(changes.notes(), 5);
    let taken = all(&changes);
    assert_eq!(names(&taken), [("a", false), ("d/b", true), ("d/c", true)]);
    assert!(changes.take().unwrap().is_none(), "each comes once");
    for change in taken.into_iter().filter(|change| !change.removed()) {
        change.settle().unwrap();
    }
    assert!(changes.take().unwrap().is_none(), "not in this pass");
    changes.again();
    let left = all(&changes);
    assert_eq!(names(&left), [("d/b", true), ("d/c", true)]);
    for change in left {
        change.settle().unwrap();
    }
    assert_eq!(changes.notes(), 0);
    drop(store);
    let private = dir.path().join(".udpack/changes");
    assert_eq!(fs::read_dir(private).unwrap().count(), 0);
}

#[test]
fn a_name_that_changes_while_it_is_carried_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    let (store, changes) = tracked(&dir);
    put(&store, "a", b"one", IfExists::Same).unwrap();
    let first = changes.take().unwrap().unwrap();
    assert!(first.is_latest());
    put(&store, "a", b"two", IfExists::Overwrite).unwrap();
    assert!(!first.is_latest());
    assert!(changes.take().unwrap().is_none(), "one carries it");
    first.settle().unwrap();
    let second = changes.take().unwrap().expect("what came meanwhile");
    assert!(second.is_latest());
    store.remove(&path("a"), false).unwrap();
    second.settle().unwrap();
    let third = changes.take().unwrap().expect("and then it went");
    assert!(third.removed());
    third.settle().unwrap();
    assert_eq!(
        (changes.notes(), changes.take().unwrap().is_none()),
        (0, true)
    );
}

#[test]
fn what_does_not_happen_leaves_no_note() {
    let dir = tempfile::tempdir().unwrap();
    let (store, changes) = tracked(&dir);
    put(&store, "a", b"one", IfExists::Same).unwrap();
    changes.take().unwrap().unwrap().settle().unwrap();
    // Several begin, and the later ones find the name taken.
    let begin = |if_exists| {
        let mut partial = begin(&store, "b", Some(3), if_exists).unwrap();
        partial.write(b"new").unwrap();
        partial
    };
    let (first, second, same) = (
        begin(IfExists::Error),
        begin(IfExists::Error),
        begin(IfExists::Same),
    );
    first.finish(None, None).unwrap();
    changes.take().unwrap().unwrap().settle().unwrap();
    assert!(second.finish(None, None).is_err());
    assert!(same.finish(None, None).unwrap().same);
    assert!(store.remove(&path("none"), false).is_err());
    assert_eq!(
        (changes.notes(), changes.take().unwrap().is_none()),
        (0, true)
    );
    // A numbered name is noted itself.
    let renamed = put(&store, "a", b"two", IfExists::Rename).unwrap();
    assert_eq!(renamed, "a (1)");
    assert_eq!(names(&all(&changes)), [("a (1)", false)]);
    // A link in place of a file removes the file.
    store
        .make_link(&path("b"), "a", IfExists::Overwrite)
        .unwrap();
    assert_eq!(names(&all(&changes)), [("b", true)]);
}

#[test]
fn more_changes_than_are_remembered_are_found_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (store, changes) = tracked(&dir);
    assert!(changes.take().unwrap().is_none(), "the first pass is over");
    let count = MOST_FRESH + 50;
    for number in 0..count {
        let noted = changes
            .note(&path(&format!("{number}")), What::Put)
            .unwrap();
        drop(noted);
    }
    let mut seen = std::collections::HashSet::new();
    while let Some(change) = changes.take().unwrap() {
        seen.insert(change.path().clone());
        change.settle().unwrap();
    }
    assert_eq!((seen.len(), changes.notes()), (count, 0));
    drop(store);
}
