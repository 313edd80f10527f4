//! The store's promises, on real directories: what is there stays, what is promised is there, and
//! nothing else is left.

mod changes;
mod model;
mod resume;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;

use rustix::fs::{CWD, FileType, Mode};
use tempfile::TempDir;

use super::*;

#[test]
fn the_end_finds_names_taken_for_what_came_whole_until_it_has_found_one() {
    let whole = |store: &Store, name: &str, bytes: &[u8], if_exists| {
        let name = path(name);
        let begun = store.begin(&NewFile {
            dirs: &[],
            whole: true,
            ..new(&name, Some(bytes.len() as u64), if_exists)
        })?;
        let Begin::New(mut partial) = begun else {
            return Ok(None);
        };
        partial.write(bytes)?;
        partial.finish(None, None).map(Some)
    };
    for if_exists in [IfExists::Same, IfExists::Error] {
        let (dir, store) = open(StoreConfig::default());
        let first = whole(&store, "d/a", b"abcd", if_exists).unwrap().unwrap();
        assert!(!first.same);
        let again = whole(&store, "d/a", b"abcd", if_exists);
        match if_exists {
            IfExists::Same => assert!(again.unwrap().unwrap().same),
            _ => assert!(matches!(again, Err(StoreError::Exists { .. }))),
        }
        store.inner.taken.store(0, Ordering::Relaxed);
        let other = whole(&store, "d/a", b"abce", if_exists);
        assert!(matches!(other, Err(StoreError::Exists { .. })));
        // From now on it looks first.
        let looked = whole(&store, "d/a", b"abce", if_exists);
        match if_exists {
            IfExists::Same => assert!(matches!(looked, Ok(None))),
            _ => assert!(matches!(looked, Err(StoreError::Exists { .. }))),
        }
        assert!(whole(&store, "d/b", b"efgh", if_exists).unwrap().is_some());
        assert_eq!(fs::read(dir.path().join("d/a")).unwrap(), b"abcd");
        assert_eq!(staging(&dir), 0);
        assert_eq!((store.usage().reserved, store.usage().open), (0, 0));
    }

    // What is there already needs no room.
    let (_dir, store) = open(StoreConfig {
        quota: Some(6),
        ..StoreConfig::default()
    });
    let stored = whole(&store, "a", b"abcd", IfExists::Same);
    assert!(stored.unwrap().is_some());
    let there = whole(&store, "a", b"abcd", IfExists::Same);
    assert!(there.unwrap().is_none());
    store.inner.taken.store(0, Ordering::Relaxed);
    let other = whole(&store, "b", b"abcd", IfExists::Same);
    assert!(matches!(other, Err(StoreError::Quota { .. })));
    assert_eq!((store.usage().reserved, store.usage().open), (0, 0));
}

#[test]
fn publishes_the_bytes_under_the_name() {
    let (dir, store) = open(StoreConfig::default());
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    for (name, bytes) in [
        ("a.bin", &bytes[..]),
        ("b/c/d.bin", &bytes[..7]),
        ("empty", &[]),
    ] {
        let hash = *blake3::hash(bytes).as_bytes();
        let mut partial = begin(&store, name, Some(bytes.len() as u64), IfExists::Same).unwrap();
        for chunk in bytes.chunks(100_000) {
            partial.write(chunk).unwrap();
        }
        assert_eq!(partial.position(), bytes.len() as u64);
        let published = partial
            .finish(Some(hash), Some(bytes.len() as u64))
            .unwrap();
        assert_eq!(
            published,
            Published {
                path: name.to_owned(),
                size: bytes.len() as u64,
                hash,
                same: false,
                sync: match bytes.len() {
                    3_000_000 => Synced::File,
                    _ => Synced::Batch,
                },
                other_time: None,
                xattrs: 0,
            }
        );
        assert_eq!(fs::read(dir.path().join(name)).unwrap(), bytes);
    }
    assert_eq!(staging(&dir), 0);
    assert_eq!(
        store.usage(),
        Usage {
            used: 3_000_007 + 3 * 1024,
            reserved: 0,
            open: 0,
            suspended: 0,
        },
        "an empty file and two directories"
    );
}

#[test]
fn nothing_is_visible_before_the_end() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = begin(&store, "sub/a", Some(4), IfExists::Same).unwrap();
    assert_eq!(visible(&dir), [""; 0]);
    partial.write(b"abcd").unwrap();
    assert_eq!(visible(&dir), [""; 0]);
    assert_eq!(staging(&dir), 1);
    partial.finish(None, None).unwrap();
    assert_eq!(visible(&dir), ["sub/a"]);
}

#[test]
fn dropping_an_upload_leaves_nothing() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = begin(&store, "sub/a", Some(4), IfExists::Same).unwrap();
    partial.write(b"ab").unwrap();
    assert_eq!(
        store.usage(),
        Usage {
            used: 0,
            reserved: 4,
            open: 1,
            suspended: 0,
        }
    );
    drop(partial);
    assert_eq!(store.usage(), Usage::default());
    assert_eq!((visible(&dir).len(), staging(&dir)), (0, 0));
    assert!(!dir.path().join("sub").exists());
}

#[test]
fn modes_are_private() {
    let (dir, store) = open(StoreConfig::default());
    let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().mode() & 0o7777;
    let mut partial = begin(&store, "sub/deep/a", None, IfExists::Same).unwrap();
    partial.write(b"a").unwrap();
    let staged = fs::read_dir(dir.path().join(".udpack/staging"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    assert_eq!(staged.metadata().unwrap().mode() & 0o7777, 0o600);
    partial.finish(None, None).unwrap();
    assert_eq!(mode("sub/deep/a"), 0o600);
    for private in [
        "sub",
        "sub/deep",
        ".udpack",
        ".udpack/staging",
        ".udpack/journal",
    ] {
        assert_eq!(mode(private), 0o700, "{private}");
    }
    assert_eq!(mode(".udpack/lock"), 0o600);
}

#[test]
fn makes_a_missing_root_and_closes_a_loose_private_directory() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("new/root");
    fs::create_dir_all(dir.path().join("old/.udpack")).unwrap();
    fs::set_permissions(
        dir.path().join("old/.udpack"),
        fs::Permissions::from_mode(0o777),
    )
    .unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    let store = Store::open(&root, StoreConfig::default()).unwrap();
    assert_eq!((store.root(), mode(&root)), (root.as_path(), 0o700));
    let _old = Store::open(dir.path().join("old"), StoreConfig::default()).unwrap();
    assert_eq!(mode(&dir.path().join("old/.udpack")), 0o700);
}

#[test]
fn sizes_must_match() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = begin(&store, "a", Some(4), IfExists::Same).unwrap();
    partial.write(b"abc").unwrap();
    let error = partial.write(b"de").unwrap_err();
    assert_eq!(
        (error.code(), error.to_string().as_str()),
        ("size_mismatch", "size mismatch: expected 4 bytes, got 5")
    );
    assert_eq!(partial.position(), 3);
    let error = partial.finish(None, None).unwrap_err();
    assert_eq!(error.to_string(), "size mismatch: expected 4 bytes, got 3");
    let mut partial = begin(&store, "a", None, IfExists::Same).unwrap();
    partial.write(b"abc").unwrap();
    assert_eq!(
        partial.finish(None, Some(9)).unwrap_err().to_string(),
        "size mismatch: expected 9 bytes, got 3"
    );
    assert_eq!((visible(&dir).len(), staging(&dir)), (0, 0));
}

#[test]
fn hashes_must_match() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = begin(&store, "a", Some(3), IfExists::Same).unwrap();
    partial.write(b"abc").unwrap();
    let error = partial.finish(Some([7; 32]), Some(3)).unwrap_err();
    assert_eq!((error.code(), error.retry()), ("hash_mismatch", true));
    assert_eq!(
        (visible(&dir).len(), staging(&dir), store.usage()),
        (0, 0, Usage::default())
    );
}

#[test]
fn whatever_has_the_name_is_left_untouched() {
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    for (name, make) in OCCUPANTS {
        for policy in [
            IfExists::Same,
            IfExists::Error,
            IfExists::Skip,
            IfExists::Overwrite,
        ] {
            let (dir, store) = open(StoreConfig {
                overwrite: Overwrite::Always,
                ..StoreConfig::default()
            });
            let target = dir.path().join("name");
            // At the beginning of the upload, and between its beginning and its end.
            let mut late = begin(&store, "name", Some(4), policy).unwrap();
            late.write(b"mine").unwrap();
            make(&target, outside.path());
            let before = describe(&target);
            match store.begin(&new(&path("name"), Some(4), policy)) {
                Err(error) => assert_eq!(error.code(), "exists", "{name} {policy}"),
                Ok(Begin::Exists(existing)) => {
                    assert!(
                        matches!(policy, IfExists::Same | IfExists::Skip) && before.1,
                        "{name} {policy}"
                    );
                    assert_eq!(existing.len(), fs::metadata(&target).unwrap().len());
                }
                Ok(Begin::New(_)) => {
                    assert!(policy == IfExists::Overwrite && before.1, "{name} {policy}")
                }
            }
            let end = late.finish(None, None);
            if policy == IfExists::Overwrite && before.1 {
                assert!(!end.unwrap().same);
                assert_eq!(fs::read(&target).unwrap(), b"mine");
            } else if policy == IfExists::Skip && before.1 {
                assert!(end.unwrap().same, "{name}");
                assert_eq!(describe(&target), before, "{name} {policy}");
            } else {
                assert_eq!(end.unwrap_err().code(), "exists", "{name} {policy}");
                assert_eq!(describe(&target), before, "{name} {policy}");
            }
            assert_eq!(
                fs::read(outside.path().join("secret")).unwrap(),
                b"secret",
                "{name} {policy}"
            );
            assert_eq!(
                fs::read_dir(outside.path()).unwrap().count(),
                1,
                "{name} {policy}"
            );
            assert_eq!(staging(&dir), 0);
        }
    }
}

#[test]
fn a_directory_that_was_replaced_hides_nothing_from_the_end() {
    let (dir, store) = open(StoreConfig::default());
    let d = dir.path().join("d");
    put(&store, "d/known", b"1", IfExists::Same).unwrap();
    // From here on names are looked up in a directory that is held open.
    put(&store, "d/other", b"2", IfExists::Same).unwrap();
    fs::rename(&d, dir.path().join("old")).unwrap();
    fs::create_dir(&d).unwrap();
    fs::write(d.join("name"), b"3").unwrap();
    assert!(put(&store, "d/name", b"3", IfExists::Same).unwrap().same);
    for policy in [IfExists::Same, IfExists::Error] {
        let refused = put(&store, "d/name", b"4", policy).unwrap_err();
        assert_eq!(refused.code(), "exists", "{policy}");
    }
    assert!(matches!(
        store.begin(&new(&path("d/name"), Some(1), IfExists::Skip)),
        Ok(Begin::Exists(_))
    ));
    assert!(!put(&store, "d/known", b"5", IfExists::Same).unwrap().same);
    assert_eq!(fs::read(d.join("name")).unwrap(), b"3");
    assert_eq!(fs::read(d.join("known")).unwrap(), b"5");
    assert_eq!(fs::read(dir.path().join("old/known")).unwrap(), b"1");
    fs::remove_dir_all(&d).unwrap();
    assert!(!put(&store, "d/name", b"6", IfExists::Error).unwrap().same);
    assert_eq!(fs::read(d.join("name")).unwrap(), b"6");
    assert_eq!(staging(&dir), 0);
}

#[test]
fn an_existing_file_can_be_compared() {
    let (dir, store) = open(StoreConfig::default());
    let bytes = vec![5; 600_000];
    fs::write(dir.path().join("a"), &bytes).unwrap();
    let Begin::Exists(existing) = store
        .begin(&new(&path("a"), Some(600_000), IfExists::Same))
        .unwrap()
    else {
        panic!("a file is there");
    };
    // Removing or replacing the name does not change what is read.
    fs::remove_file(dir.path().join("a")).unwrap();
    let mut seen = Vec::new();
    assert_eq!(
        existing.hash(&mut |read| seen.push(read)).unwrap(),
        *blake3::hash(&bytes).as_bytes()
    );
    assert_eq!((existing.len(), existing.path().as_str()), (600_000, "a"));
    assert!(seen.is_sorted() && seen.last() == Some(&600_000));
    assert_eq!(store.usage(), Usage::default());
}

#[test]
fn a_file_that_came_first_counts_as_the_policy_says() {
    let (dir, store) = open(StoreConfig::default());
    for (policy, theirs, outcome) in [
        (IfExists::Same, "mine", Ok(true)),
        (IfExists::Same, "else", Err("exists")),
        (IfExists::Same, "longer", Err("exists")),
        (IfExists::Error, "mine", Err("exists")),
        (IfExists::Skip, "mine", Ok(true)),
        (IfExists::Skip, "longer", Ok(true)),
    ] {
        let mut partial = begin(&store, "a", Some(4), policy).unwrap();
        partial.write(b"mine").unwrap();
        fs::write(dir.path().join("a"), theirs).unwrap();
        let end = partial
            .finish(None, None)
            .map(|published| {
                let size = theirs.len() as u64;
                let hash = *blake3::hash(theirs.as_bytes()).as_bytes();
                assert_eq!(
                    (published.size, published.hash),
                    (size, hash),
                    "what is there"
                );
                published.same
            })
            .map_err(|error| error.code());
        assert_eq!(end, outcome, "{policy} {theirs}");
        assert_eq!(
            (
                fs::read_to_string(dir.path().join("a")).unwrap().as_str(),
                staging(&dir)
            ),
            (theirs, 0)
        );
        fs::remove_file(dir.path().join("a")).unwrap();
    }
    assert_eq!(store.usage(), Usage::default());
}

#[test]
fn a_link_to_an_equal_file_is_not_that_file() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = begin(&store, "a", Some(4), IfExists::Same).unwrap();
    partial.write(b"mine").unwrap();
    fs::write(dir.path().join("equal"), "mine").unwrap();
    symlink("equal", dir.path().join("a")).unwrap();
    assert_eq!(partial.finish(None, None).unwrap_err().code(), "exists");
}

#[test]
fn of_many_uploads_of_one_name_exactly_one_wins() {
    for by_link in [false, true] {
        let (dir, mut store) = open(StoreConfig::default());
        if by_link {
            Arc::get_mut(&mut store.inner)
                .unwrap()
                .disk
                .publish_by_link();
        }
        let barrier = Barrier::new(50);
        let outcomes: Vec<_> = thread::scope(|scope| {
            let racer = |n: u8| {
                let (store, barrier) = (&store, &barrier);
                scope.spawn(move || {
                    let mut partial = begin(store, "sub/name", Some(1000), IfExists::Same).unwrap();
                    partial.write(&[n; 1000]).unwrap();
                    barrier.wait();
                    partial
                        .finish(None, None)
                        .map(|_| n)
                        .map_err(|error| error.code())
                })
            };
            let racers: Vec<_> = (0..50).map(racer).collect();
            racers
                .into_iter()
                .map(|racer| racer.join().unwrap())
                .collect()
        });
        let winners: Vec<u8> = outcomes
            .iter()
            .filter_map(|outcome| outcome.as_ref().ok().copied())
            .collect();
        assert_eq!(winners.len(), 1, "{outcomes:?}");
        assert!(
            outcomes
                .iter()
                .all(|outcome| matches!(outcome, Ok(_) | Err("exists"))),
            "{outcomes:?}"
        );
        assert_eq!(
            fs::read(dir.path().join("sub/name")).unwrap(),
            [winners[0]; 1000]
        );
        assert_eq!(
            (visible(&dir), staging(&dir)),
            (vec!["sub/name".to_owned()], 0)
        );
        assert_eq!(
            store.usage(),
            Usage {
                used: 1000 + 1024,
                reserved: 0,
                open: 0,
                suspended: 0,
            },
            "the file and its directory"
        );
    }
}

#[test]
fn what_many_make_replace_and_remove_at_once_is_counted_once() {
    const RACERS: u64 = 8;
    for round in 0..50 {
        let (_dir, store) = open(StoreConfig {
            overwrite: Overwrite::Always,
            ..StoreConfig::default()
        });
        let barrier = Barrier::new(RACERS as usize);
        thread::scope(|scope| {
            for n in 0..RACERS {
                let (store, barrier) = (&store, &barrier);
                scope.spawn(move || {
                    let bytes = vec![0; 100 * (n as usize + 1)];
                    barrier.wait();
                    put(store, "new/way/name", &bytes, IfExists::Overwrite).unwrap();
                    store
                        .make_dir(&path("other/dir"), Meta::default(), None)
                        .unwrap();
                    // Of all, one finds it; some find what a later one put there.
                    let _ = store.remove(&path("new/way/name"), false);
                });
            }
        });
        let used = store.usage().used;
        assert_eq!(used, 4 * 1024, "round {round}: four directories, no file");
    }
}

#[test]
fn what_others_put_there_is_not_credited_when_it_goes() {
    let (dir, store) = open(StoreConfig::default());
    fs::write(dir.path().join("theirs"), vec![0; 5000]).unwrap();
    store.remove(&path("theirs"), false).unwrap();
    put(&store, "ours", b"ten bytes!", IfExists::Error).unwrap();
    assert_eq!(store.usage().used, 10);
}

#[test]
fn the_link_fallback_replaces_nothing_either() {
    let (dir, mut store) = open(StoreConfig::default());
    Arc::get_mut(&mut store.inner)
        .unwrap()
        .disk
        .publish_by_link();
    put(&store, "a", b"first", IfExists::Error).unwrap();
    let mut late = begin(&store, "b", None, IfExists::Error).unwrap();
    late.write(b"mine").unwrap();
    symlink("a", dir.path().join("b")).unwrap();
    assert_eq!(late.finish(None, None).unwrap_err().code(), "exists");
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"first");
    assert_eq!(fs::metadata(dir.path().join("a")).unwrap().nlink(), 1);
    assert_eq!(staging(&dir), 0);
}

#[test]
fn many_uploads_make_the_same_directories_at_once() {
    let (dir, store) = open(StoreConfig::default());
    thread::scope(|scope| {
        for n in 0..20 {
            let store = &store;
            scope
                .spawn(move || put(store, &format!("a/b/c/d/{n}"), &[n], IfExists::Error).unwrap());
        }
    });
    assert_eq!(visible(&dir).len(), 20);
}

#[test]
fn a_client_gets_no_more_than_the_server_grants() {
    use IfExists as Ask;
    for (granted, refused) in [
        (Overwrite::Never, &[Ask::Overwrite, Ask::Rename][..]),
        (Overwrite::Rename, &[Ask::Overwrite]),
        (Overwrite::Always, &[]),
    ] {
        let (_dir, store) = open(StoreConfig {
            overwrite: granted,
            ..StoreConfig::default()
        });
        for ask in [
            Ask::Same,
            Ask::Error,
            Ask::Skip,
            Ask::Overwrite,
            Ask::Rename,
        ] {
            let code = store
                .begin(&new(&path("a"), Some(1), ask))
                .err()
                .map(|error| error.code());
            assert_eq!(
                code,
                refused.contains(&ask).then_some("forbidden"),
                "{granted} {ask}"
            );
        }
    }
}

#[test]
fn overwriting_swaps_the_file_in_one_step() {
    let (dir, store) = open(StoreConfig {
        overwrite: Overwrite::Always,
        quota: Some(1000),
        ..StoreConfig::default()
    });
    put(&store, "a", b"first", IfExists::Error).unwrap();
    fs::hard_link(dir.path().join("a"), dir.path().join("link")).unwrap();
    put(&store, "a", b"new", IfExists::Overwrite).unwrap();
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"new");
    assert_eq!(fs::read(dir.path().join("link")).unwrap(), b"first");
    assert_eq!(store.usage().used, 3);
    assert_eq!(
        put(&store, "fresh", b"x", IfExists::Overwrite)
            .unwrap()
            .path,
        "fresh"
    );
}

#[test]
fn renaming_finds_the_first_free_number() {
    let (dir, store) = open(StoreConfig {
        overwrite: Overwrite::Rename,
        ..StoreConfig::default()
    });
    let mut names = Vec::new();
    for name in [
        "sub.d/a.tar.gz",
        "sub.d/a.tar.gz",
        "sub.d/a.tar.gz",
        "sub.d/plain",
        "sub.d/plain",
    ] {
        names.push(
            put(&store, name, name.as_bytes(), IfExists::Rename)
                .unwrap()
                .path,
        );
    }
    assert_eq!(
        names,
        [
            "sub.d/a.tar.gz",
            "sub.d/a.tar (1).gz",
            "sub.d/a.tar (2).gz",
            "sub.d/plain",
            "sub.d/plain (1)"
        ]
    );
    assert_eq!(visible(&dir).len(), 5);
    // A directory counts as taken; a name with no room for a number cannot be renamed.
    fs::create_dir(dir.path().join("dir")).unwrap();
    assert_eq!(
        put(&store, "dir", b"", IfExists::Rename).unwrap().path,
        "dir (1)"
    );
    let long = "x".repeat(255);
    put(&store, &long, b"", IfExists::Rename).unwrap();
    assert_eq!(
        put(&store, &long, b"", IfExists::Rename)
            .unwrap_err()
            .code(),
        "exists"
    );
    let paths: BTreeSet<String> = thread::scope(|scope| {
        let racers: Vec<_> = (0..20)
            .map(|_| scope.spawn(|| put(&store, "r", b"", IfExists::Rename).unwrap().path))
            .collect();
        racers
            .into_iter()
            .map(|racer| racer.join().unwrap())
            .collect()
    });
    assert_eq!(paths.len(), 20);
}

#[test]
fn the_quota_counts_files_and_reservations() {
    // Two links, whatever they lead to, and two directories.
    const NAMES: u64 = 4 * 1024;
    let dir = TempDir::new().unwrap();
    fs::create_dir_all(dir.path().join("old/deep")).unwrap();
    fs::write(dir.path().join("old/deep/file"), [0; 100]).unwrap();
    symlink("/etc/passwd", dir.path().join("link")).unwrap();
    symlink("/usr", dir.path().join("dirlink")).unwrap();
    let store = Store::open(
        dir.path(),
        StoreConfig {
            quota: Some(1000 + NAMES),
            ..StoreConfig::default()
        },
    )
    .unwrap();
    assert_eq!(store.usage().used, 100 + NAMES);
    let first = begin(&store, "a", Some(600), IfExists::Same).unwrap();
    let error = begin(&store, "b", Some(301), IfExists::Same).unwrap_err();
    assert_eq!((error.code(), error.retry()), ("quota", true));
    assert_eq!(
        error.to_string(),
        "quota: needs 301 B, 300 B of 4.9 KiB left"
    );
    assert_eq!(staging(&dir), 1);
    let second = begin(&store, "b", Some(300), IfExists::Same).unwrap();
    assert_eq!(
        store.usage(),
        Usage {
            used: 100 + NAMES,
            reserved: 900,
            open: 2,
            suspended: 0,
        }
    );
    drop((first, second));
    put(&store, "c", &[1; 900], IfExists::Same).unwrap();
    assert_eq!(
        begin(&store, "d", Some(1), IfExists::Same)
            .unwrap_err()
            .code(),
        "quota"
    );
    assert_eq!(
        store.usage(),
        Usage {
            used: 1000 + NAMES,
            reserved: 0,
            open: 0,
            suspended: 0,
        }
    );
}

#[test]
fn space_freed_behind_our_back_is_found_before_refusing() {
    let (dir, store) = open(StoreConfig {
        quota: Some(1000),
        ..StoreConfig::default()
    });
    put(&store, "a", &[1; 1000], IfExists::Same).unwrap();
    fs::remove_file(dir.path().join("a")).unwrap();
    assert_eq!(
        begin(&store, "b", Some(1), IfExists::Same)
            .unwrap_err()
            .code(),
        "quota"
    );
    if !store.inner.state().accounts.age() {
        return skipped("the machine started less than half a minute ago");
    }
    begin(&store, "b", Some(1000), IfExists::Same).unwrap();
}

#[test]
fn too_large_is_refused_before_the_disk_is_touched() {
    let (dir, store) = open(StoreConfig {
        max_file: Some(1000),
        ..StoreConfig::default()
    });
    for size in [1001, 1 << 63, u64::MAX] {
        let error = begin(&store, "a", Some(size), IfExists::Same).unwrap_err();
        assert_eq!((error.code(), error.retry()), ("too_large", false));
        assert_eq!(
            error.to_string(),
            format!("too large: {size} bytes, limit 1000")
        );
    }
    begin(&store, "a", Some(1000), IfExists::Same).unwrap();
    let (_other, unlimited) = open(StoreConfig {
        max_file: None,
        ..StoreConfig::default()
    });
    assert_eq!(
        begin(&unlimited, "a", Some(1 << 63), IfExists::Same)
            .unwrap_err()
            .code(),
        "too_large"
    );
    assert_eq!(
        begin(&unlimited, "a", Some((1 << 63) - 1), IfExists::Same)
            .unwrap_err()
            .code(),
        "no_space"
    );
    assert_eq!((staging(&dir), store.usage()), (0, Usage::default()));
}

#[test]
fn without_a_declared_size_limits_hold_as_bytes_arrive() {
    let (dir, store) = open(StoreConfig {
        max_file: Some(1000),
        quota: Some(1500),
        ..StoreConfig::default()
    });
    let mut first = begin(&store, "a", None, IfExists::Same).unwrap();
    first.write(&[0; 1000]).unwrap();
    let error = first.write(&[0]).unwrap_err();
    assert_eq!(error.to_string(), "too large: 1001 bytes, limit 1000");
    first.finish(None, Some(1000)).unwrap();
    let mut second = begin(&store, "b", None, IfExists::Same).unwrap();
    second.write(&[0; 500]).unwrap();
    assert_eq!(second.write(&[0]).unwrap_err().code(), "quota");
    // A refusal is not a failure: what was written before may still be finished.
    assert_eq!(second.finish(None, None).unwrap().size, 500);
    assert_eq!(visible(&dir), ["a", "b"]);
    assert_eq!(
        store.usage(),
        Usage {
            used: 1500,
            reserved: 0,
            open: 0,
            suspended: 0,
        }
    );
}

#[test]
fn what_must_stay_free_stays_free() {
    let (dir, store) = open(StoreConfig {
        min_free: Some(u64::MAX / 2),
        ..StoreConfig::default()
    });
    let error = begin(&store, "a", Some(1), IfExists::Same).unwrap_err();
    assert_eq!((error.code(), error.retry()), ("no_space", true));
    let text = error.to_string();
    let (_, rest) = text
        .split_once(" free on the disk, ")
        .expect("what is free");
    assert!(text.starts_with("no space: "), "{text}");
    assert!(rest.contains(" of it stay free, and this needs "), "{text}");
    assert_eq!(
        begin(&store, "a", None, IfExists::Same).unwrap_err().code(),
        "no_space"
    );
    assert_eq!((staging(&dir), store.usage()), (0, Usage::default()));
}

#[test]
fn open_uploads_are_limited() {
    let (_dir, store) = open(StoreConfig {
        max_open: 2,
        ..StoreConfig::default()
    });
    let first = begin(&store, "a", Some(1), IfExists::Same).unwrap();
    let _second = begin(&store, "b", Some(1), IfExists::Same).unwrap();
    let error = begin(&store, "c", Some(1), IfExists::Same).unwrap_err();
    assert_eq!(
        (error.code(), error.to_string().as_str()),
        ("too_many_uploads", "too many uploads: limit 2")
    );
    drop(first);
    begin(&store, "c", Some(1), IfExists::Same).unwrap();
}

#[test]
fn a_directory_serves_one_store_at_a_time() {
    let (dir, store) = open(StoreConfig::default());
    let again = || Store::open(dir.path(), StoreConfig::default());
    assert!(matches!(again().unwrap_err(), StoreError::Locked));
    // An upload keeps the lock, since its staging file must not be swept.
    let partial = begin(&store, "a", Some(1), IfExists::Same).unwrap();
    drop(store);
    assert!(matches!(again().unwrap_err(), StoreError::Locked));
    drop(partial);
    again().unwrap();
}

#[test]
fn stale_staging_is_swept_and_strangers_are_kept() {
    let (dir, store) = open(StoreConfig::default());
    let staging = dir.path().join(".udpack/staging");
    let id = "0123456789abcdef0123456789abcdef";
    drop(store);
    let own = [format!("{id}.part"), format!("{id}.probe")];
    let strangers = [
        format!("{id}.part.bak"),
        format!("{}.part", id.to_uppercase()),
        format!("x{id}.part"),
        "notes".to_owned(),
        ".part".to_owned(),
    ];
    for name in own.iter().chain(&strangers) {
        fs::write(staging.join(name), "x").unwrap();
    }
    fs::create_dir(staging.join(format!("{}.part", id.replace('0', "f")))).unwrap();
    fs::write(dir.path().join(format!(".udpack-probe-{id}")), "").unwrap();
    fs::write(dir.path().join(".udpack-probe-mine"), "").unwrap();
    let _store = Store::open(dir.path(), StoreConfig::default()).unwrap();
    assert!(own.iter().all(|name| !staging.join(name).exists()));
    assert!(strangers.iter().all(|name| staging.join(name).exists()));
    assert_eq!(fs::read_dir(&staging).unwrap().count(), strangers.len() + 1);
    assert_eq!(visible(&dir), [".udpack-probe-mine"]);
}

#[test]
fn a_root_replaced_by_a_symlink_redirects_nothing() {
    let dir = TempDir::new().unwrap();
    let (root, moved, outside) = (
        dir.path().join("root"),
        dir.path().join("moved"),
        dir.path().join("outside"),
    );
    fs::create_dir(&outside).unwrap();
    let store = Store::open(&root, StoreConfig::default()).unwrap();
    let mut partial = begin(&store, "sub/a", Some(1), IfExists::Same).unwrap();
    fs::rename(&root, &moved).unwrap();
    symlink(&outside, &root).unwrap();
    partial.write(b"a").unwrap();
    partial.finish(None, None).unwrap();
    put(&store, "b", b"b", IfExists::Same).unwrap();
    assert_eq!(
        (moved.join("sub/a").is_file(), moved.join("b").is_file()),
        (true, true)
    );
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn a_removed_root_fails_uploads_and_is_not_made_again() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    let store = Store::open(&root, StoreConfig::default()).unwrap();
    let mut partial = begin(&store, "sub/a", Some(1), IfExists::Same).unwrap();
    partial.write(b"a").unwrap();
    fs::remove_dir_all(&root).unwrap();
    assert_eq!(partial.finish(None, None).unwrap_err().code(), "io");
    let error = begin(&store, "b", Some(1), IfExists::Same).unwrap_err();
    assert_eq!(error.code(), "io");
    assert!(
        !error.to_string().contains(&*root.to_string_lossy()),
        "{error}"
    );
    assert!(!root.exists());
    assert_eq!(store.usage(), Usage::default());
}

#[test]
fn parents_that_are_no_directories_are_refused() {
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    fs::create_dir(outside.path().join("inner")).unwrap();
    for (name, make) in [
        (
            "link to a directory outside",
            (|target, outside| symlink(outside, target).unwrap()) as Make,
        ),
        ("link to a directory inside", |target, _| {
            fs::create_dir(target.with_file_name("real")).unwrap();
            symlink("real", target).unwrap();
        }),
        ("dangling link", |target, outside| {
            symlink(outside.join("missing"), target).unwrap()
        }),
        ("file", |target, _| fs::write(target, "x").unwrap()),
        ("fifo", |target, _| fifo(target)),
    ] {
        let (dir, store) = open(StoreConfig {
            overwrite: Overwrite::Always,
            ..StoreConfig::default()
        });
        let mut late = begin(&store, "a/b/c", Some(1), IfExists::Overwrite).unwrap();
        late.write(b"x").unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        make(&dir.path().join("a/b"), outside.path());
        let early = begin(&store, "a/b/c", Some(1), IfExists::Overwrite).unwrap_err();
        assert_eq!(
            early.to_string(),
            "a/b is in the way of a/b/c and is not a directory",
            "{name}"
        );
        assert_eq!(
            late.finish(None, None).unwrap_err().code(),
            "exists",
            "{name}"
        );
        assert_eq!(
            begin(&store, "a/b/inner/c", Some(1), IfExists::Same)
                .unwrap_err()
                .code(),
            "exists",
            "{name}"
        );
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 2, "{name}");
        assert_eq!(
            fs::read_dir(outside.path().join("inner")).unwrap().count(),
            0,
            "{name}"
        );
        assert_eq!(staging(&dir), 0);
    }
}

#[test]
fn a_private_directory_that_is_a_symlink_is_refused() {
    let (dir, outside) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    symlink(outside.path(), dir.path().join(".udpack")).unwrap();
    assert_eq!(
        Store::open(dir.path(), StoreConfig::default())
            .unwrap_err()
            .code(),
        "io"
    );
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn sets_the_modification_time() {
    let (dir, store) = open(StoreConfig::default());
    for (n, seconds) in [0, 1_700_000_000, -1, i64::MAX, i64::MIN]
        .into_iter()
        .enumerate()
    {
        let mut partial = begin(&store, &n.to_string(), Some(1), IfExists::Same).unwrap();
        partial.write(b"a").unwrap();
        let meta = Meta {
            mtime: Some(Time {
                secs: seconds,
                nanos: 5,
            }),
            mode: None,
        };
        publish(partial.complete(None, None, meta).unwrap()).unwrap();
    }
    let metadata = fs::metadata(dir.path().join("1")).unwrap();
    assert_eq!(
        (metadata.mtime(), metadata.mtime_nsec()),
        (1_700_000_000, 5)
    );
}

#[test]
fn a_full_disk_fails_the_upload_and_nothing_else() {
    let Some(mount) = Tmpfs::mount("size=1m") else {
        return;
    };
    let store = Store::open(
        mount.path(),
        StoreConfig {
            min_free: Some(0),
            ..StoreConfig::default()
        },
    )
    .unwrap();
    let mut partial = begin(&store, "a", Some(500_000), IfExists::Same).unwrap();
    partial.write(&[1; 100_000]).unwrap();
    // Somebody else takes the rest.
    let filler = mount.path().join("filler");
    fs::write(&filler, vec![0; 2 << 20]).unwrap_err();
    let error = partial.write(&[1; 300_000]).unwrap_err();
    assert_eq!((error.code(), error.retry()), ("no_space", true));
    assert!(
        error
            .to_string()
            .starts_with("no space: the disk ran out of space, "),
        "{error}"
    );
    // It cannot be written on, nor finished: what lies on the disk is not what was hashed.
    assert!(matches!(
        partial.write(b"x").unwrap_err(),
        StoreError::Broken
    ));
    assert!(matches!(
        partial.finish(None, None).unwrap_err(),
        StoreError::Broken
    ));
    assert_eq!((staging(&mount.0), store.usage()), (0, Usage::default()));
    assert_eq!(
        begin(&store, "b", Some(500_000), IfExists::Same)
            .unwrap_err()
            .code(),
        "no_space"
    );
    assert_eq!(staging(&mount.0), 0);
    fs::remove_file(filler).unwrap();
    put(&store, "a", &[1; 500_000], IfExists::Same).unwrap();
    assert_eq!(visible(&mount.0), ["a"]);
}

#[test]
fn an_upload_of_unknown_size_stops_at_what_must_stay_free() {
    let Some(mount) = Tmpfs::mount("size=1m") else {
        return;
    };
    let store = Store::open(
        mount.path(),
        StoreConfig {
            min_free: Some(512 << 10),
            ..StoreConfig::default()
        },
    )
    .unwrap();
    let mut partial = begin(&store, "a", None, IfExists::Same).unwrap();
    let error = (0..1024)
        .find_map(|_| partial.write(&[0; 4096]).err())
        .unwrap();
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
    let stat = rustix::fs::statvfs(mount.path()).unwrap();
    assert!(stat.f_bavail * stat.f_frsize >= 512 << 10);
    drop(partial);
    assert_eq!((staging(&mount.0), store.usage()), (0, Usage::default()));
}

#[test]
fn reservations_are_subtracted_from_the_free_space_once() {
    let Some(mount) = Tmpfs::mount("size=1m") else {
        return;
    };
    let store = Store::open(
        mount.path(),
        StoreConfig {
            min_free: Some(0),
            ..StoreConfig::default()
        },
    )
    .unwrap();
    let mut first = begin(&store, "a", Some(600_000), IfExists::Same).unwrap();
    assert_eq!(
        begin(&store, "b", Some(600_000), IfExists::Same)
            .unwrap_err()
            .code(),
        "no_space"
    );
    // Half written: still 600,000 in all, not 900,000.
    first.write(&[0; 300_000]).unwrap();
    let second = begin(&store, "b", Some(400_000), IfExists::Same).unwrap();
    assert_eq!(
        begin(&store, "c", Some(100_000), IfExists::Same)
            .unwrap_err()
            .code(),
        "no_space"
    );
    drop(second);
    drop(begin(&store, "b", Some(400_000), IfExists::Same).unwrap());
    first.write(&[0; 300_000]).unwrap();
    first.finish(None, None).unwrap();
}

#[test]
fn running_out_of_inodes_is_no_space() {
    let Some(mount) = Tmpfs::mount("size=1m,nr_inodes=12") else {
        return;
    };
    let store = Store::open(
        mount.path(),
        StoreConfig {
            min_free: Some(0),
            ..StoreConfig::default()
        },
    )
    .unwrap();
    let mut open = Vec::new();
    let error = (0..12)
        .find_map(|n| {
            begin(&store, &n.to_string(), Some(1), IfExists::Same)
                .map(|partial| open.push(partial))
                .err()
        })
        .unwrap();
    assert_eq!(error.code(), "no_space");
    assert_eq!(store.usage().open, open.len());
    drop(open);
    put(&store, "a", b"a", IfExists::Same).unwrap();
}

#[test]
fn other_file_systems_below_the_root_are_refused() {
    let dir = TempDir::new().unwrap();
    fs::create_dir_all(dir.path().join(".udpack/staging")).unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    let Some(staging) = Tmpfs::mount_at(dir.path().join(".udpack/staging"), "size=1m") else {
        return;
    };
    assert!(matches!(
        Store::open(dir.path(), StoreConfig::default()).unwrap_err(),
        StoreError::OtherDevice
    ));
    drop(staging);
    let Some(_sub) = Tmpfs::mount_at(dir.path().join("sub"), "size=1m") else {
        return;
    };
    let store = Store::open(dir.path(), StoreConfig::default()).unwrap();
    assert_eq!(
        begin(&store, "sub/a", Some(1), IfExists::Same)
            .unwrap_err()
            .code(),
        "io"
    );
    put(&store, "a", b"a", IfExists::Same).unwrap();
    assert_eq!(visible(&dir), ["a"]);
}

type Make = fn(&Path, &Path);

/// Things that can have a name, made at the first path; the second is a directory outside the root
/// that holds `secret`.
const OCCUPANTS: [(&str, Make); 8] = [
    ("file", |target, _| fs::write(target, "theirs").unwrap()),
    ("directory", |target, _| fs::create_dir(target).unwrap()),
    ("fifo", |target, _| fifo(target)),
    ("link to a file outside", |target, outside| {
        symlink(outside.join("secret"), target).unwrap()
    }),
    ("link to a directory outside", |target, outside| {
        symlink(outside, target).unwrap()
    }),
    ("dangling link", |target, outside| {
        symlink(outside.join("missing"), target).unwrap()
    }),
    ("link to itself", |target, _| {
        symlink("name", target).unwrap()
    }),
    ("hard link to a file outside", |target, outside| {
        // Another file system has no hard links to here: a plain file is the next best.
        if fs::hard_link(outside.join("secret"), target).is_err() {
            fs::write(target, "secret").unwrap();
        }
    }),
];

fn open(config: StoreConfig) -> (TempDir, Store) {
    let dir = TempDir::new().unwrap();
    // Tests must not depend on how full the machine is.
    let config = StoreConfig {
        min_free: config.min_free.or(Some(0)),
        ..config
    };
    let store = Store::open(dir.path(), config).unwrap();
    (dir, store)
}

/// Most tests write from the beginning to the end and publish one file.
trait Simple: Sized {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError>;
    fn finish(self, hash: Option<[u8; 32]>, size: Option<u64>) -> Result<Published, StoreError>;
}

impl Simple for Partial {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.write_at(self.position(), bytes)
    }

    fn finish(self, hash: Option<[u8; 32]>, size: Option<u64>) -> Result<Published, StoreError> {
        publish(self.complete(hash, size, Meta::default())?)
    }
}

fn publish(complete: Complete) -> Result<Published, StoreError> {
    let store = Store {
        inner: complete.0.reservation.inner.clone(),
    };
    let mut outcomes = store.publish(vec![complete]);
    assert_eq!(outcomes.len(), 1);
    outcomes.remove(0)
}

fn new(path: &RelPath, size: Option<u64>, if_exists: IfExists) -> NewFile<'_> {
    NewFile {
        path,
        size,
        if_exists,
        owner: None,
        tenant: None,
        dirs: &[],
        whole: false,
    }
}

fn path(name: &str) -> RelPath {
    name.parse().unwrap()
}

fn begin(
    store: &Store,
    name: &str,
    size: Option<u64>,
    if_exists: IfExists,
) -> Result<Partial, StoreError> {
    match store.begin(&new(&path(name), size, if_exists))? {
        Begin::New(partial) => Ok(partial),
        Begin::Exists(existing) => panic!("{} is there", existing.path()),
    }
}

fn put(
    store: &Store,
    name: &str,
    bytes: &[u8],
    if_exists: IfExists,
) -> Result<Published, StoreError> {
    let mut partial = begin(store, name, Some(bytes.len() as u64), if_exists)?;
    partial.write(bytes)?;
    partial.finish(
        Some(*blake3::hash(bytes).as_bytes()),
        Some(bytes.len() as u64),
    )
}

/// Everything below the root but directories and the store's own.
fn visible(dir: &TempDir) -> Vec<String> {
    fn walk(dir: &Path, prefix: &str, found: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            match entry.file_type().unwrap().is_dir() {
                true if name == ".udpack" => {}
                true => walk(&entry.path(), &format!("{name}/"), found),
                false => found.push(name),
            }
        }
    }
    let mut found = Vec::new();
    walk(dir.path(), "", &mut found);
    found.sort();
    found
}

/// How many files the staging area holds.
fn staging(dir: &TempDir) -> usize {
    fs::read_dir(dir.path().join(".udpack/staging"))
        .unwrap()
        .count()
}

/// What shows that something was touched, and whether it is a regular file.
fn describe(target: &Path) -> (String, bool) {
    let metadata = fs::symlink_metadata(target).unwrap();
    let kind = metadata.file_type();
    let content = if kind.is_file() {
        fs::read_to_string(target).unwrap()
    } else {
        String::new()
    };
    let text = format!(
        "{} {} {} {} {} {content}",
        metadata.ino(),
        metadata.mode(),
        metadata.len(),
        metadata.mtime_nsec(),
        kind.is_fifo()
    );
    (text, kind.is_file())
}

fn fifo(target: &Path) {
    rustix::fs::mknodat(CWD, target, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}

/// A small file system of its own, unmounted on drop.
struct Tmpfs(TempDir, PathBuf);

impl Tmpfs {
    fn mount(options: &str) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let at = dir.path().to_owned();
        mount(&at, options).then(|| Self(dir, at))
    }

    fn mount_at(at: PathBuf, options: &str) -> Option<Self> {
        mount(&at, options).then(|| Self(TempDir::new().unwrap(), at))
    }

    fn path(&self) -> &Path {
        &self.1
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a failed test may still hold files on it.
        let _ = Command::new("umount").arg("-l").arg(&self.1).status();
    }
}

fn mount(at: &Path, options: &str) -> bool {
    let mut command = Command::new("mount");
    command
        .args(["-t", "tmpfs", "-o", options, "tmpfs"])
        .arg(at)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mounted = command.status().is_ok_and(|status| status.success());
    if !mounted {
        skipped("cannot mount a tmpfs here");
    }
    mounted
}

/// Says so on the real standard error, which the test runner does not swallow.
fn skipped(why: &str) {
    let _ = writeln!(io::stderr(), "skipped: {why}");
}

#[test]
fn a_file_is_made_with_the_mode_that_it_gets_and_ends_with_the_one_asked_for() {
    let (_dir, store) = open(StoreConfig::default());
    let path: RelPath = "x".parse().unwrap();
    // The test may run under any umask: what that takes is set at the end only.
    for (made, asked) in [
        (Some(0o644), Some(0o644)),
        (Some(0o700), Some(0o700)),
        (Some(0o644), Some(0o640)),
        (Some(0o777), Some(0o777)),
        (Some(0o444), Some(0o444)),
        (Some(0o644), None),
        (None, Some(0o666)),
    ] {
        let new = NewFile {
            path: &path,
            size: Some(1),
            if_exists: IfExists::Error,
            owner: None,
            tenant: None,
            dirs: &[],
            whole: false,
        };
        let Begin::New(mut partial) = store.begin_with(&new, made).unwrap() else {
            panic!("nothing has the name");
        };
        partial.write_at(0, b"x").unwrap();
        let staged: Vec<_> = fs::read_dir(store.staging())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap())
            .filter(|metadata| metadata.len() == 1)
            .map(|metadata| metadata.permissions().mode() & 0o7777)
            .collect();
        let usable = made.filter(|mode| mode & 0o600 == 0o600).unwrap_or(0o600);
        assert!(
            staged == [usable] || staged == [0o600],
            "{made:?}: {staged:?}"
        );
        if usable == 0o700 {
            assert_eq!(staged, [0o700], "no umask takes the owner's");
        }
        let meta = Meta {
            mtime: None,
            mode: asked,
        };
        let complete = partial.complete(None, None, meta).unwrap();
        store.publish(vec![complete]).pop().unwrap().unwrap();
        let file = store.root().join("x");
        let mode = fs::metadata(&file).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, asked.unwrap_or(0o600), "{made:?}");
        fs::remove_file(file).unwrap();
    }
}
