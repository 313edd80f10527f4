//! What the tree verbs promise, on real directories.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, Mode};
use tempfile::TempDir;

use super::super::{Begin, Names, NewFile, Overwrite, Partial, StoreConfig};
use super::*;

#[test]
fn stat_tells_what_is_there() {
    let (dir, store) = tree();
    symlink("../a/file", dir.path().join("b/inside")).unwrap();
    symlink("/etc/passwd", dir.path().join("b/absolute")).unwrap();
    symlink("../../x", dir.path().join("b/outside")).unwrap();
    symlink("../.udpack/lock", dir.path().join("b/private")).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    let file = fs::File::options()
        .write(true)
        .open(dir.path().join("a/file"))
        .unwrap();
    file.set_modified(time).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o4640))
        .unwrap();
    assert_eq!(
        store.stat(Some(&path("a/file"))).unwrap(),
        Entry {
            path: "a/file".to_owned(),
            kind: Kind::File,
            size: 4,
            mtime: Time {
                secs: 1_700_000_000,
                nanos: 123_456_789
            },
            mode: 0o640,
            target: None,
            unread: false,
        }
    );
    let root = store.stat(None).unwrap();
    assert_eq!(
        (root.path.as_str(), root.kind, root.size),
        ("", Kind::Dir, 0)
    );
    assert_eq!(store.stat(Some(&path("a"))).unwrap().kind, Kind::Dir);
    for (name, target) in [
        ("b/inside", Some("../a/file")),
        ("b/absolute", None),
        ("b/outside", None),
        ("b/private", None),
    ] {
        let entry = store.stat(Some(&path(name))).unwrap();
        assert_eq!((entry.kind, entry.size), (Kind::Link, 0), "{name}");
        assert_eq!(entry.target.as_deref(), target, "{name}");
    }
    fifo(&dir.path().join("fifo"));
    assert_eq!(store.stat(Some(&path("fifo"))).unwrap().kind, Kind::Other);
    for name in ["nothing", "nothing/x", "a/file/x"] {
        let error = store.stat(Some(&path(name))).unwrap_err();
        assert_eq!(
            (error.code(), error.retry()),
            ("not_found", false),
            "{name}"
        );
        assert_eq!(error.to_string(), format!("not found: {name}"));
    }
}

#[test]
fn planted_links_are_never_followed() {
    let outside = TempDir::new().unwrap();
    fs::create_dir(outside.path().join("dir")).unwrap();
    fs::write(outside.path().join("dir/secret"), "secret").unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let (dir, store) = tree();
    symlink(outside.path(), dir.path().join("out")).unwrap();
    symlink(outside.path().join("secret"), dir.path().join("leak")).unwrap();
    let before = describe(outside.path());
    for name in ["out/secret", "out/dir", "out/dir/secret"] {
        let name = path(name);
        assert_eq!(code(store.stat(Some(&name))), "not_found");
        assert_eq!(code(store.read(&name)), "not_found");
        assert_eq!(code(store.remove(&name, true)), "not_found");
        assert_eq!(code(store.list(&below(&name))), "not_found");
        assert_eq!(code(store.make_dir(&name, Meta::default(), None)), "exists");
        assert_eq!(code(store.make_link(&name, "x", IfExists::Same)), "exists");
    }
    for name in ["out", "leak"] {
        assert_eq!(code(store.read(&path(name))), "not_a_file");
        assert_eq!(
            code(store.make_dir(&path(name), Meta::default(), None)),
            "exists"
        );
        // Listed as the link it is, in the tree and by itself.
        let listed = store.list(&below(&path(name))).unwrap().entries;
        assert_eq!(
            listed
                .iter()
                .map(|e| (e.path.as_str(), e.kind))
                .collect::<Vec<_>>(),
            [(name, Kind::Link)]
        );
    }
    assert!(all(&store).iter().all(|name| !name.starts_with("out/")));
    // A tree with links in it: the links go, what they lead to stays.
    symlink(outside.path(), dir.path().join("a/out")).unwrap();
    symlink(outside.path().join("secret"), dir.path().join("a/leak")).unwrap();
    let removed = store.remove(&path("a"), true).unwrap();
    assert_eq!(
        removed,
        Removed {
            files: 5,
            bytes: 12
        }
    );
    assert_eq!(
        store.remove(&path("out"), true).unwrap(),
        Removed { files: 1, bytes: 0 }
    );
    assert_eq!(describe(outside.path()), before);
}

#[test]
fn pages_of_every_size_are_the_whole_listing() {
    let (dir, store) = tree();
    let expected = [
        "B",
        "a",
        "a/deep",
        "a/deep/er",
        "a/deep/er/x",
        "a/deep/y",
        "a/file",
        "a-",
        "a.txt",
        "a.txt/z",
        "aa",
        "b",
        "b/empty",
        "ä",
    ];
    for name in ["B", "a-", "aa", "ä"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    fs::create_dir(dir.path().join("a.txt")).unwrap();
    fs::write(dir.path().join("a.txt/z"), "").unwrap();
    for limit in 0..=expected.len() + 2 {
        assert_eq!(listed(&store, None, true, limit), expected, "{limit}");
        assert_eq!(
            listed(&store, None, false, limit),
            ["B", "a", "a-", "a.txt", "aa", "b", "ä"],
            "{limit}"
        );
        assert_eq!(
            listed(&store, Some("a"), true, limit),
            ["a/deep", "a/deep/er", "a/deep/er/x", "a/deep/y", "a/file"],
            "{limit}"
        );
        assert_eq!(listed(&store, Some("b/empty"), true, limit), [""; 0]);
        assert_eq!(listed(&store, Some("a/file"), true, limit), ["a/file"]);
    }
    assert_eq!(code(store.list(&below(&path("none")))), "not_found");
    let bad = List {
        after: Some("../x"),
        ..List::default()
    };
    assert_eq!(code(store.list(&bad)), "bad_name");
}

#[test]
fn a_cursor_needs_nothing_to_be_there() {
    let (dir, store) = tree();
    // a, a/deep, a/deep/er, a/deep/er/x, a/deep/y, a/file, b, b/empty
    let after = |base: Option<&RelPath>, after: &str, recursive| {
        let page = store
            .list(&List {
                path: base,
                recursive,
                after: Some(after),
                limit: 100,
            })
            .unwrap();
        assert!(!page.more);
        paths(&page)
    };
    for (cursor, rest) in [
        (
            "a/deep/er/w",
            &["a/deep/er/x", "a/deep/y", "a/file", "b", "b/empty"][..],
        ),
        ("a/deep/er/x/1/2", &["a/deep/y", "a/file", "b", "b/empty"]),
        ("a/deep/f", &["a/deep/y", "a/file", "b", "b/empty"]),
        ("a/deep/f/g/h", &["a/deep/y", "a/file", "b", "b/empty"]),
        ("a/file/x", &["b", "b/empty"]),
        ("a/zzz", &["b", "b/empty"]),
        ("aa/x", &["b", "b/empty"]),
        ("b/empty", &[]),
        ("c", &[]),
    ] {
        assert_eq!(after(None, cursor, true), rest, "{cursor}");
    }
    assert_eq!(after(None, "a/deep", false), ["b"]);
    let base = path("a/deep");
    for (cursor, rest) in [
        ("Z", &["a/deep/er", "a/deep/er/x", "a/deep/y"][..]),
        ("a", &["a/deep/er", "a/deep/er/x", "a/deep/y"]),
        ("a/deep", &["a/deep/er", "a/deep/er/x", "a/deep/y"]),
        ("a/deep/er", &["a/deep/er/x", "a/deep/y"]),
        ("a/e", &[]),
        ("b", &[]),
    ] {
        assert_eq!(after(Some(&base), cursor, true), rest, "{cursor}");
    }
    // Each entry is removed as soon as it was listed, files and directories alike.
    let mut seen: Vec<String> = Vec::new();
    loop {
        let page = store
            .list(&List {
                recursive: true,
                after: seen.last().map(String::as_str),
                limit: 1,
                ..List::default()
            })
            .unwrap();
        let Some(entry) = page.entries.first() else {
            break;
        };
        seen.push(entry.path.clone());
        if entry.kind == Kind::File || entry.path == "a/deep" {
            store.remove(&path(&entry.path), true).unwrap();
        }
    }
    assert_eq!(seen, ["a", "a/deep", "a/file", "b", "b/empty"]);
    assert!(!dir.path().join("a/deep").exists());
}

#[test]
fn every_name_is_listed_in_the_order_of_its_bytes() {
    use std::ffi::OsStr;
    let (dir, store) = open(StoreConfig::default());
    let mut odd: Vec<&[u8]> = vec![
        b".hidden",
        b"-rf",
        b"a\\b",
        b"a:b",
        b"new\nline",
        b"\x80",
        b"\xff\xfe",
        b"caf\xe9",
        b"con",
        b"dot.",
        b" space",
        "e\u{301}".as_bytes(),
        "\u{10ffe9}".as_bytes(),
        "z\u{20ac}".as_bytes(),
        &[b'x'; 255],
    ];
    for name in &odd {
        fs::write(dir.path().join(OsStr::from_bytes(name)), "x").unwrap();
    }
    odd.sort_unstable();
    for limit in [1, 3, 1000] {
        let listed = listed(&store, None, true, limit);
        let names: Vec<Vec<u8>> = listed
            .iter()
            .map(|name| names::bytes(name).into_owned())
            .collect();
        assert_eq!(names, odd);
        for name in &listed {
            let path: RelPath = name.parse().unwrap();
            assert_eq!(store.read(&path).unwrap().len(), 1, "{path}");
        }
    }
    for name in listed(&store, None, true, 1000) {
        store.remove(&path(&name), false).unwrap();
    }
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "the store's own is left"
    );
}

#[test]
fn what_a_list_lacks_is_told_by_the_directory_above() {
    let (dir, store) = open(StoreConfig::default());
    // As deep as a path can be, and one more.
    fs::create_dir_all(dir.path().join(["d"; RelPath::MAX_COMPONENTS].join("/"))).unwrap();
    let unread = |store: &Store| {
        let all = store
            .list(&List {
                recursive: true,
                limit: 1000,
                ..List::default()
            })
            .unwrap();
        let unread = all.entries.iter().filter(|entry| entry.unread);
        unread
            .map(|entry| entry.path.split('/').count())
            .collect::<Vec<_>>()
    };
    assert_eq!(unread(&store), [0; 0]);
    let beyond = ["d"; RelPath::MAX_COMPONENTS + 1].join("/");
    fs::create_dir(dir.path().join(&beyond)).unwrap();
    assert_eq!(unread(&store), [RelPath::MAX_COMPONENTS]);
    assert_eq!(code(store.remove(&path("d"), true)), "not_empty");
    fs::remove_dir(dir.path().join(&beyond)).unwrap();
    assert_eq!(store.remove(&path("d"), true).unwrap(), Removed::default());
    assert_eq!(all(&store), [""; 0]);
}

#[test]
fn a_store_below_is_listed_and_removed_like_anything_else() {
    let (dir, store) = open(StoreConfig::default());
    fs::create_dir_all(dir.path().join("a/.udpack/staging")).unwrap();
    assert_eq!(all(&store), ["a", "a/.udpack", "a/.udpack/staging"]);
    assert_eq!(store.remove(&path("a"), true).unwrap(), Removed::default());
    assert_eq!(all(&store), [""; 0]);
    assert!(dir.path().join(".udpack/staging").is_dir());
}

#[test]
fn a_portable_store_takes_portable_names_and_gives_what_it_has() {
    let (dir, store) = open(StoreConfig {
        names: Names::Portable,
        ..StoreConfig::default()
    });
    fs::write(dir.path().join(".env"), "x").unwrap();
    let (odd, fine) = (path("a:b"), path("ab"));
    assert_eq!(
        code(store.make_dir(&odd, Meta::default(), None)),
        "bad_name"
    );
    assert_eq!(
        code(store.make_link(&odd, "ab", IfExists::Same)),
        "bad_name"
    );
    store.make_dir(&fine, Meta::default(), None).unwrap();
    assert_eq!(all(&store), [".env", "ab"]);
    assert_eq!(store.read(&path(".env")).unwrap().len(), 1);
}

#[test]
fn a_directory_of_odd_names_costs_no_empty_pages() {
    let (dir, store) = tree();
    for n in 0..50 {
        fifo(&dir.path().join(format!("B{n}")));
        fs::write(dir.path().join(format!(".{n}")), "").unwrap();
    }
    let page = store
        .list(&List {
            limit: 1,
            ..List::default()
        })
        .unwrap();
    assert_eq!((paths(&page), page.more), (vec![".0".to_owned()], true));
}

#[test]
fn pages_are_bounded() {
    let (dir, store) = open(StoreConfig::default());
    fs::create_dir(dir.path().join("many")).unwrap();
    for n in 0..MAX_ENTRIES + 5 {
        fs::File::create(dir.path().join(format!("many/{n:05}"))).unwrap();
    }
    let page = store
        .list(&List {
            recursive: true,
            limit: usize::MAX,
            ..List::default()
        })
        .unwrap();
    assert_eq!((page.entries.len(), page.more), (MAX_ENTRIES, true));
    assert_eq!(listed(&store, None, true, 3_999).len(), MAX_ENTRIES + 6);
    fs::create_dir_all(dir.path().join("long").join("d".repeat(200))).unwrap();
    for n in 0..1500 {
        let name = format!("long/{}/{n:0>200}", "d".repeat(200));
        fs::File::create(dir.path().join(name)).unwrap();
    }
    let long = path("long");
    let page = store.list(&below(&long)).unwrap();
    let bytes: usize = page.entries.iter().map(|entry| entry.path.len()).sum();
    assert!(
        page.more && bytes <= MAX_NAME_BYTES && bytes > MAX_NAME_BYTES / 2,
        "{bytes}"
    );
    assert_eq!(listed(&store, Some("long"), true, 4_000).len(), 1501);
}

#[test]
fn listing_and_removing_go_on_while_the_tree_changes() {
    let (dir, store) = open(StoreConfig::default());
    for n in 0..40 {
        fs::create_dir(dir.path().join(format!("keep{n:02}"))).unwrap();
        fs::write(dir.path().join(format!("keep{n:02}/file")), "x").unwrap();
    }
    let start = Barrier::new(3);
    thread::scope(|scope| {
        let churn = scope.spawn(|| {
            start.wait();
            for n in 0..300 {
                let name = dir.path().join(format!("gone{:02}", n % 7));
                fs::create_dir_all(name.join("x/y")).unwrap();
                fs::write(name.join("x/y/z"), "z").unwrap();
                fs::remove_dir_all(name).unwrap();
            }
        });
        let make = scope.spawn(|| {
            start.wait();
            for n in 0..100 {
                let name = path(&format!("mine{}/a/b", n % 3));
                store.make_dir(&name, Meta::default(), None).unwrap();
                store
                    .remove(&path(&format!("mine{}", n % 3)), true)
                    .unwrap();
            }
        });
        start.wait();
        for limit in (1..60).cycle().take(120) {
            let listed = listed(&store, None, true, limit);
            let kept = listed.iter().filter(|name| name.starts_with("keep"));
            assert_eq!(kept.count(), 80, "{limit}");
            assert!(listed.is_sorted_by_key(|name| {
                name.split('/').map(str::to_owned).collect::<Vec<_>>()
            }));
        }
        churn.join().unwrap();
        make.join().unwrap();
    });
}

#[test]
fn of_many_removals_of_a_tree_none_fails_oddly() {
    let (dir, store) = open(StoreConfig::default());
    for round in 0..10 {
        for n in 0..600 {
            let sub = dir.path().join(format!("t/{}", n % 3));
            fs::create_dir_all(&sub).unwrap();
            fs::write(sub.join(n.to_string()), "12").unwrap();
        }
        let start = Barrier::new(4);
        let counts: Vec<u64> = thread::scope(|scope| {
            let racers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        match store.remove(&path("t"), true) {
                            Ok(removed) => {
                                assert_eq!(removed.bytes, 2 * removed.files);
                                removed.files
                            }
                            Err(error) => {
                                assert_eq!(error.code(), "not_found", "{round}");
                                0
                            }
                        }
                    })
                })
                .collect();
            racers
                .into_iter()
                .map(|racer| racer.join().unwrap())
                .collect()
        });
        assert!(counts.iter().sum::<u64>() <= 600);
        assert!(!dir.path().join("t").exists());
    }
}

#[test]
fn removes_what_was_asked_for_and_nothing_else() {
    let (dir, store) = tree();
    symlink("file", dir.path().join("a/link")).unwrap();
    let error = store.remove(&path("a"), false).unwrap_err();
    assert_eq!(
        (error.code(), error.to_string().as_str()),
        ("not_empty", "not empty: a")
    );
    assert_eq!(
        store.remove(&path("a/link"), false).unwrap(),
        Removed { files: 1, bytes: 0 }
    );
    assert_eq!(
        store.remove(&path("a/file"), false).unwrap(),
        Removed { files: 1, bytes: 4 }
    );
    assert_eq!(
        store.remove(&path("b/empty"), false).unwrap(),
        Removed::default()
    );
    assert_eq!(code(store.remove(&path("a/file"), true)), "not_found");
    assert_eq!(code(store.remove(&path("b/x/y"), true)), "not_found");
    // Everything goes with its directory, special files too.
    fs::write(dir.path().join("a/.hidden"), "123").unwrap();
    fifo(&dir.path().join("a/deep/fifo"));
    assert_eq!(
        store.remove(&path("a"), true).unwrap(),
        Removed {
            files: 4,
            bytes: 11
        }
    );
    assert_eq!(all(&store), ["b"]);
    assert!(dir.path().join(".udpack/staging").is_dir());
    // More than are read at a time.
    for n in 0..3 * BATCH {
        fs::write(dir.path().join(format!("b/{n}")), "1").unwrap();
    }
    let many = 3 * BATCH as u64;
    assert_eq!(
        store.remove(&path("b"), true).unwrap(),
        Removed {
            files: many,
            bytes: many
        }
    );
    assert_eq!(all(&store), [""; 0]);
}

#[test]
fn reads_regular_files_only() {
    let (dir, store) = tree();
    symlink("file", dir.path().join("a/link")).unwrap();
    fifo(&dir.path().join("fifo"));
    let file = store.read(&path("a/file")).unwrap();
    assert_eq!((file.path().as_str(), file.len()), ("a/file", 4));
    let mut buf = [0; 9];
    assert_eq!(file.read_at(&mut buf, 1).unwrap(), 3);
    assert_eq!(&buf[..3], b"ile");
    for (name, code) in [
        ("a", "is_directory"),
        ("a/link", "not_a_file"),
        ("fifo", "not_a_file"),
        ("none", "not_found"),
        ("a/file/x", "not_found"),
    ] {
        let error = store.read(&path(name)).unwrap_err();
        assert_eq!((error.code(), error.retry()), (code, false), "{name}");
    }
    // What happens to the name does not change what is read.
    store.remove(&path("a/file"), false).unwrap();
    assert_eq!(file.read_at(&mut buf, 0).unwrap(), 4);
}

#[test]
fn makes_directories_with_mode_and_time() {
    let (dir, store) = open(StoreConfig::default());
    let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().mode() & 0o7777;
    assert!(
        !store
            .make_dir(&path("x/y"), Meta::default(), None)
            .unwrap()
            .same
    );
    assert_eq!((mode("x"), mode("x/y")), (0o700, 0o700));
    let meta = Meta {
        mtime: Some(Time { secs: -5, nanos: 7 }),
        mode: Some(0o6055),
    };
    assert!(store.make_dir(&path("x"), meta, None).unwrap().same);
    assert_eq!(mode("x"), 0o755);
    let entry = store.stat(Some(&path("x"))).unwrap();
    assert_eq!((entry.mode, Some(entry.mtime)), (0o755, meta.mtime));
    assert!(
        store
            .make_dir(&path("x"), Meta::default(), None)
            .unwrap()
            .same
    );
    assert_eq!(mode("x"), 0o755);
    fs::write(dir.path().join("file"), "").unwrap();
    assert_eq!(
        code(store.make_dir(&path("file"), Meta::default(), None)),
        "exists"
    );
    assert_eq!(
        code(store.make_dir(&path("file/x"), Meta::default(), None)),
        "exists"
    );
}

#[test]
fn makes_links_by_policy() {
    let (dir, store) = open(StoreConfig {
        overwrite: Overwrite::Always,
        ..StoreConfig::default()
    });
    let link = |name: &str, target: &str, policy| store.make_link(&path(name), target, policy);
    let leads = |name: &str| fs::read_link(dir.path().join(name)).unwrap();
    assert!(!link("a/l", "../f", IfExists::Same).unwrap());
    assert_eq!(leads("a/l"), Path::new("../f"));
    for policy in [
        IfExists::Same,
        IfExists::Skip,
        IfExists::Overwrite,
        IfExists::Rename,
    ] {
        assert!(link("a/l", "../f", policy).unwrap(), "{policy}");
    }
    for (policy, target) in [
        (IfExists::Error, "../f"),
        (IfExists::Error, "g"),
        (IfExists::Same, "g"),
        (IfExists::Skip, "g"),
        (IfExists::Rename, "g"),
    ] {
        assert_eq!(code(link("a/l", target, policy)), "exists", "{policy}");
        assert_eq!(leads("a/l"), Path::new("../f"));
    }
    assert!(!link("a/l", "g", IfExists::Overwrite).unwrap());
    assert_eq!(leads("a/l"), Path::new("g"));
    fs::write(dir.path().join("file"), "f").unwrap();
    fs::create_dir(dir.path().join("dir")).unwrap();
    fifo(&dir.path().join("fifo"));
    assert_eq!(code(link("file", "g", IfExists::Same)), "exists");
    assert!(!link("file", "g", IfExists::Overwrite).unwrap());
    assert_eq!(leads("file"), Path::new("g"));
    assert_eq!(code(link("dir", "g", IfExists::Overwrite)), "exists");
    assert_eq!(code(link("fifo", "g", IfExists::Overwrite)), "exists");
    let staging = fs::read_dir(dir.path().join(".udpack/staging")).unwrap();
    assert_eq!(staging.count(), 0);
    let (_dir, strict) = open(StoreConfig::default());
    assert_eq!(
        code(strict.make_link(&path("l"), "g", IfExists::Overwrite)),
        "forbidden"
    );
}

#[test]
fn links_lead_nowhere_outside() {
    let (dir, store) = open(StoreConfig::default());
    let long = "x/".repeat(2049);
    for target in [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../../x",
        "x/../../../y",
        "../../root/x",
        "a\0b",
        "../.udpack",
        "../.UDPACK/lock",
        "x/.udpack/lock",
        // What a name leads to may be a link, now or later.
        "x/..",
        "e/../f",
        "../d/x/../y",
        &long,
    ] {
        // One level down, so that one `..` stays inside.
        let (name, target) = match target {
            ".." => ("l", target),
            _ => ("d/l", target),
        };
        let error = store
            .make_link(&path(name), target, IfExists::Same)
            .unwrap_err();
        assert_eq!(
            (error.code(), error.retry()),
            ("forbidden", false),
            "{target:?}"
        );
        assert!(!error.to_string().contains(char::is_control));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    for (n, target) in [
        "..",
        "../x",
        ".",
        "./a//b/",
        ".././d/f",
        "-x",
        ".h",
        "a\nb",
        "caf\u{10ffe9}",
    ]
    .into_iter()
    .enumerate()
    {
        let name = path(&format!("d/{n}"));
        assert!(!store.make_link(&name, target, IfExists::Same).unwrap());
        let entry = store.stat(Some(&name)).unwrap();
        assert_eq!(entry.target.as_deref(), Some(target));
    }
}

#[test]
fn of_many_links_of_one_name_exactly_one_wins() {
    let (dir, store) = open(StoreConfig::default());
    let start = Barrier::new(8);
    let won: usize = thread::scope(|scope| {
        let racers: Vec<_> = (0..8)
            .map(|n| {
                let (store, start) = (&store, &start);
                scope.spawn(move || {
                    start.wait();
                    match store.make_link(&path("d/l"), &n.to_string(), IfExists::Same) {
                        Ok(same) => usize::from(!same),
                        Err(error) => {
                            assert_eq!(error.code(), "exists");
                            0
                        }
                    }
                })
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).sum()
    });
    assert_eq!(won, 1);
    assert!(dir.path().join("d/l").is_symlink());
}

#[test]
fn a_tenant_has_a_quota_of_its_own() {
    let (dir, store) = open(StoreConfig {
        overwrite: Overwrite::Always,
        ..StoreConfig::default()
    });
    fs::create_dir_all(dir.path().join("t/old")).unwrap();
    fs::write(dir.path().join("t/old/file"), [0; 100]).unwrap();
    fs::write(dir.path().join("tt"), [0; 5000]).unwrap();
    // The directory in it counts 1,024 of these.
    let (tenant, elsewhere) = (tenant("t", 2024), tenant("u", 9));
    // Opened before the tenant was first seen, by somebody else.
    let other = begin(&store, "t/other", 50, None).unwrap();
    let _away = begin(&store, "u", 5000, None).unwrap();
    let first = begin(&store, "t/a", 600, Some(&tenant)).unwrap();
    let error = begin(&store, "t/b", 251, Some(&tenant)).unwrap_err();
    assert_eq!((error.code(), error.retry()), ("quota", true));
    assert_eq!(
        error.to_string(),
        "quota: needs 251 B, 250 B of 1.9 KiB left"
    );
    drop((first, other));
    put(&store, "t/c", 800, Some(&tenant));
    put(&store, "t/d", 100, None);
    assert_eq!(code(begin(&store, "t/e", 1, Some(&tenant))), "quota");
    assert_eq!(
        code(store.make_dir(&path("t/dir"), Meta::default(), Some(&tenant))),
        "quota"
    );
    // Who has none, and who has one elsewhere, goes on.
    drop(begin(&store, "t/e", 1, None).unwrap());
    drop(begin(&store, "u/e", 9, Some(&elsewhere)).unwrap());
    assert!(
        store
            .make_dir(&path("t"), Meta::default(), None)
            .unwrap()
            .same
    );
    // What is removed is free at once.
    store.remove(&path("t/c"), false).unwrap();
    drop(begin(&store, "t/e", 800, Some(&tenant)).unwrap());
    assert_eq!(code(begin(&store, "t/e", 801, Some(&tenant))), "quota");
    store
        .make_link(&path("t/d"), "x", IfExists::Overwrite)
        .unwrap();
    // A link takes more room than the tenant has.
    assert_eq!(code(begin(&store, "t/e", 1, Some(&tenant))), "quota");
    store.remove(&path("t/d"), false).unwrap();
    drop(begin(&store, "t/e", 900, Some(&tenant)).unwrap());
    // Also when it goes with more than the tenant's.
    put(&store, "t/c", 900, Some(&tenant));
    store.remove(&path("t"), true).unwrap();
    drop(begin(&store, "t/e", 2024, Some(&tenant)).unwrap());
    assert_eq!(code(begin(&store, "t/e", 2025, Some(&tenant))), "quota");
}

#[test]
fn a_tenant_of_the_root_and_the_store_s_quota_both_hold() {
    let (dir, store) = open(StoreConfig {
        quota: Some(3000),
        ..StoreConfig::default()
    });
    let (small, large) = (root_tenant(500), root_tenant(5000));
    put(&store, "a", 400, None);
    assert_eq!(code(begin(&store, "b", 101, Some(&small))), "quota");
    assert_eq!(code(begin(&store, "b", 2601, Some(&large))), "quota");
    drop(begin(&store, "b", 100, Some(&small)).unwrap());
    drop(begin(&store, "b", 2600, Some(&large)).unwrap());
    store.remove(&path("a"), false).unwrap();
    assert_eq!(store.usage().used, 0);
    // Removed behind our back: found at the next count.
    put(&store, "c/d", 300, None);
    let own = tenant("c", 300);
    assert_eq!(code(begin(&store, "c/e", 1, Some(&own))), "quota");
    fs::remove_file(dir.path().join("c/d")).unwrap();
    assert_eq!(code(begin(&store, "c/e", 1, Some(&own))), "quota");
    if store.inner.state().accounts.age() {
        drop(begin(&store, "c/e", 300, Some(&own)).unwrap());
    }
}

#[test]
fn a_tenant_s_upload_of_unknown_size_stops_at_its_quota() {
    let (_dir, store) = open(StoreConfig::default());
    let own = tenant("t", 10);
    let name = path("t/a");
    let begun = store.begin(&NewFile {
        path: &name,
        size: None,
        if_exists: IfExists::Same,
        owner: None,
        tenant: Some(&own),
        dirs: &[],
        whole: false,
    });
    let Begin::New(mut partial) = begun.unwrap() else {
        panic!("it is there");
    };
    partial.write_at(0, &[1; 10]).unwrap();
    assert_eq!(code(partial.write_at(10, &[1])), "quota");
}

/// a/deep/er/x, a/deep/y, a/file, b/empty/
fn tree() -> (TempDir, Store) {
    let (dir, store) = open(StoreConfig::default());
    fs::create_dir_all(dir.path().join("a/deep/er")).unwrap();
    fs::create_dir_all(dir.path().join("b/empty")).unwrap();
    for name in ["a/deep/er/x", "a/deep/y", "a/file"] {
        fs::write(dir.path().join(name), "file").unwrap();
    }
    (dir, store)
}

fn open(config: StoreConfig) -> (TempDir, Store) {
    let dir = TempDir::new().unwrap();
    let config = StoreConfig {
        min_free: Some(0),
        ..config
    };
    let store = Store::open(dir.path(), config).unwrap();
    (dir, store)
}

fn path(name: &str) -> RelPath {
    name.parse().unwrap()
}

fn below(path: &RelPath) -> List<'_> {
    List {
        path: Some(path),
        recursive: true,
        after: None,
        limit: 4_000,
    }
}

fn paths(page: &Page) -> Vec<String> {
    page.entries.iter().map(|e| e.path.clone()).collect()
}

/// The listing, page by page.
fn listed(store: &Store, base: Option<&str>, recursive: bool, limit: usize) -> Vec<String> {
    let base = base.map(path);
    let mut found: Vec<String> = Vec::new();
    loop {
        let page = store
            .list(&List {
                path: base.as_ref(),
                recursive,
                after: found.last().map(String::as_str),
                limit,
            })
            .unwrap();
        assert!(page.entries.len() <= limit.max(1));
        assert!(!page.more || !page.entries.is_empty());
        found.extend(paths(&page));
        if !page.more {
            return found;
        }
    }
}

fn all(store: &Store) -> Vec<String> {
    listed(store, None, true, 4_000)
}

fn tenant(prefix: &str, quota: u64) -> Tenant {
    Tenant {
        prefix: Some(path(prefix)),
        quota,
        outer: None,
    }
}

fn root_tenant(quota: u64) -> Tenant {
    Tenant {
        prefix: None,
        quota,
        outer: None,
    }
}

fn begin(
    store: &Store,
    name: &str,
    size: u64,
    tenant: Option<&Tenant>,
) -> Result<Partial, StoreError> {
    let begun = store.begin(&NewFile {
        path: &path(name),
        size: Some(size),
        if_exists: IfExists::Same,
        owner: None,
        tenant,
        dirs: &[],
        whole: false,
    })?;
    match begun {
        Begin::New(partial) => Ok(partial),
        Begin::Exists(existing) => panic!("{} is there", existing.path()),
    }
}

fn put(store: &Store, name: &str, size: usize, tenant: Option<&Tenant>) {
    let mut partial = begin(store, name, size as u64, tenant).unwrap();
    partial.write_at(0, &vec![7; size]).unwrap();
    let complete = partial.complete(None, None, Meta::default()).unwrap();
    for published in store.publish(vec![complete]) {
        published.unwrap();
    }
}

fn code<T>(result: Result<T, StoreError>) -> &'static str {
    match result {
        Ok(_) => "ok",
        Err(error) => error.code(),
    }
}

/// Everything below a directory outside of a store, with its content.
fn describe(dir: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = entry.path().display().to_string();
        if entry.file_type().unwrap().is_dir() {
            found.extend(describe(&entry.path()));
        } else {
            found.push((name, fs::read_to_string(entry.path()).unwrap()));
        }
    }
    found.sort();
    found
}

fn fifo(target: &Path) {
    rustix::fs::mknodat(
        CWD,
        target,
        rustix::fs::FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
}
