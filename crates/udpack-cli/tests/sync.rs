//! `sync`: a directory becomes what another one is, in both directions, whatever was there, whoever writes meanwhile.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use common::{
    Exited, Running, Server, age, bytes, client, events, exited, named, odd_tree, result, staged,
    tree, try_tree, until, workdir, write,
};
use serde_json::Value;

/// A server, and a token that may do everything with its files.
struct Site {
    server: Server,
    url: String,
}

impl Site {
    fn client(&self, dir: &Path, args: &[&str]) -> Exited {
        exited(client(dir).env("UDPACK_URL", &self.url).args(args))
    }

    fn uploads(&self) -> PathBuf {
        self.server.uploads()
    }
}

fn start() -> Site {
    let server = Server::start_in(workdir(), &["--overwrite", "always"]);
    let url = server.new_token(&["mirror", "--scope", "read,write,delete"]);
    let site = Site { server, url };
    until("the token is known", || {
        site.client(Path::new("/"), &["ls"]).code == 0
    });
    site
}

/// Runs it and expects success.
fn synced(server: &Site, dir: &Path, args: &[&str]) -> Exited {
    let mut all = vec!["sync", "--json"];
    all.extend(args);
    let out = server.client(dir, &all);
    assert_eq!(out.code, 0, "{args:?}: {out:?}");
    out
}

/// What a run did, or would do: names of what it stores, and of what it deletes.
fn deeds(out: &Exited, status: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let all = events(&out.stdout);
    let names = |event: &str| {
        named(&all, event)
            .into_iter()
            .filter(|event| event["status"] == status)
            .map(|event| event["path"].as_str().expect("a path").to_owned())
            .collect()
    };
    (names("file"), names("delete"))
}

fn count(out: &Exited, what: &str) -> u64 {
    result(&out.stdout)[what].as_u64().expect(what)
}

#[test]
fn a_copy_becomes_what_its_source_is_in_both_directions() {
    let server = start();
    let dir = workdir();
    let local = dir.path().join("tree");
    fs::create_dir(&local).expect("mkdir");
    odd_tree(&local);
    symlink("plain", local.join("link")).expect("a link");
    let there = server.uploads().join("backup/copy");
    let up = ["--links", "--delete", "tree", ":backup/copy"];

    let out = synced(&server, dir.path(), &up);
    assert_eq!(tree(&there), tree(&local));
    assert!(count(&out, "sent") > 0);

    let out = synced(&server, dir.path(), &up);
    assert_eq!((count(&out, "files"), count(&out, "sent")), (0, 0));
    assert_eq!(count(&out, "unchanged"), tree(&local).len() as u64);
    assert_eq!(deeds(&out, "ok"), Default::default(), "nothing is done");

    // New, changed, gone, of another kind.
    write(&local.join("new/one"), b"new");
    write(&local.join("plain"), b"shorter");
    fs::remove_file(local.join("UPPER")).expect("rm");
    fs::remove_dir_all(local.join("\u{e9}t\u{e9}")).expect("rm -r");
    fs::remove_file(local.join("upper")).expect("rm");
    write(&local.join("upper/in it"), b"a directory now");
    fs::remove_dir_all(local.join("dir")).expect("rm -r");
    write(&local.join("dir"), b"a file now");
    fs::remove_file(local.join("link")).expect("rm");
    symlink("dir", local.join("link")).expect("a link");
    age(&local.join("nothing in here"), 0o711, 99, 0);
    let planned = synced(&server, dir.path(), &[&["-n"][..], &up].concat());
    let before = tree(&there);
    assert_ne!(before, tree(&local));
    let out = synced(&server, dir.path(), &up);
    assert_eq!(tree(&there), tree(&local));
    assert_eq!(deeds(&planned, "planned"), deeds(&out, "ok"));
    assert!(count(&out, "deleted") >= 6, "{out:?}");

    // The other way, over something else that is there.
    let back = dir.path().join("back");
    write(&back.join("old/file"), b"old");
    write(&back.join("new"), b"no directory");
    let down = ["--delete", ":backup/copy", "back"];
    let planned = synced(&server, dir.path(), &[&["-n"][..], &down].concat());
    assert_eq!(
        fs::read(back.join("new")).expect("it stays"),
        b"no directory"
    );
    let out = synced(&server, dir.path(), &down);
    assert_eq!(tree(&back), tree(&local));
    assert_eq!(deeds(&planned, "planned"), deeds(&out, "ok"));
    let out = synced(&server, dir.path(), &down);
    assert_eq!((count(&out, "files"), count(&out, "sent")), (0, 0));
    assert!(!back.join(".udpack").exists(), "nothing is left behind");
    assert_eq!(staged(&server.uploads()), 0);
}

#[test]
fn only_what_may_be_deleted_is() {
    let server = start();
    let dir = workdir();
    let local = dir.path().join("tree");
    write(&local.join("kept"), b"1");
    for name in ["a", "b", "d/c", "d/x.log", "e/f"] {
        write(&server.uploads().join(name), b"2");
    }
    let all = || tree(&server.uploads()).into_keys().collect::<Vec<_>>();
    let whole = ["a", "b", "d", "d/c", "d/x.log", "e", "e/f", "kept"];

    // Without --delete nothing goes.
    synced(&server, dir.path(), &["tree", ":"]);
    assert_eq!(all(), whole);

    // Too much: nothing goes, in a dry run too.
    for dry in [&["-n"][..], &[]] {
        let args = ["sync", "--delete", "--max-delete", "5", "tree", ":"];
        let out = server.client(dir.path(), &[&args[..], dry].concat());
        assert_eq!(out.code, 6, "{out:?}");
        assert!(out.stderr.contains("--max-delete 5"), "{out:?}");
        assert_eq!(all(), whole);
    }

    // Something did not arrive: nothing goes.
    symlink("../out of it", local.join("bad")).expect("a link");
    let out = server.client(dir.path(), &["sync", "--links", "--delete", "tree", ":"]);
    assert_ne!(out.code, 0, "{out:?}");
    assert!(out.stderr.contains("nothing is deleted"), "{out:?}");
    assert_eq!(all(), whole);
    fs::remove_file(local.join("bad")).expect("rm");

    // What is left out stays, and so does the directory it is in.
    let args = [
        "--delete",
        "--max-delete",
        "5",
        "--exclude",
        "*.log",
        "tree",
        ":",
    ];
    let out = synced(&server, dir.path(), &args);
    assert_eq!(all(), ["d", "d/x.log", "kept"]);
    assert_eq!(count(&out, "deleted"), 5);

    // Another kind of thing is in the way, and may not be deleted.
    write(&server.uploads().join("n/in it"), b"3");
    write(&local.join("n"), b"4");
    let out = server.client(dir.path(), &["sync", "tree", ":"]);
    assert_ne!(out.code, 0, "{out:?}");
    assert!(server.uploads().join("n/in it").exists());
}

#[test]
fn a_checksum_finds_what_size_and_time_do_not() {
    let server = start();
    let dir = workdir();
    let local = dir.path().join("tree");
    write(&local.join("a"), b"one");
    write(&local.join("b"), b"two");
    synced(&server, dir.path(), &["tree", ":copy"]);
    let there = server.uploads().join("copy");
    write(&local.join("a"), b"eno");
    for file in [local.join("a"), there.join("a")] {
        age(&file, 0o644, 1_000_000, 0);
    }
    let out = synced(&server, dir.path(), &["tree", ":copy"]);
    assert_eq!(count(&out, "files"), 0);
    assert_eq!(fs::read(there.join("a")).expect("read"), b"one");
    let out = synced(&server, dir.path(), &["-c", "tree", ":copy"]);
    assert_eq!(count(&out, "files"), 1);
    assert_eq!(count(&out, "unchanged"), 1);
    assert_eq!(tree(&there), tree(&local));

    write(&there.join("b"), b"owt");
    for file in [local.join("b"), there.join("b")] {
        age(&file, 0o644, 1_000_000, 0);
    }
    synced(&server, dir.path(), &["-c", ":copy", "tree"]);
    assert_eq!(fs::read(local.join("b")).expect("read"), b"owt");
}

#[test]
fn a_tree_that_was_moved_is_not_sent_again() {
    let server = start();
    let dir = workdir();
    let local = dir.path().join("tree");
    let mut all = 0;
    for (number, len) in (0..40).zip([100, 3_000, 70_000, 400_000, 1_200_000].into_iter().cycle()) {
        let path = local.join(format!("old/d{}/f{number}", number % 3));
        write(&path, &bytes(len, number));
        age(&path, 0o644, 1_000_000 + u64::from(number), 5);
        all += len as u64;
    }
    synced(&server, dir.path(), &["tree", ":copy"]);
    fs::create_dir_all(local.join("new/place")).expect("mkdir");
    fs::rename(local.join("old"), local.join("new/place/it")).expect("rename");
    // One of them is another one by now, of the same size and time; one is longer.
    let moved = local.join("new/place/it");
    write(&moved.join("d1/f1"), &bytes(3_000, 77));
    age(&moved.join("d1/f1"), 0o644, 1_000_001, 5);
    let longer = [bytes(600_000, 78), bytes(400_000, 3), bytes(9, 79)].concat();
    write(&moved.join("d0/f3"), &longer);
    let args = ["--delta", "always", "--delete", "tree", ":copy"];
    let out = synced(&server, dir.path(), &args);
    let there = server.uploads().join("copy");
    assert_eq!(tree(&there), tree(&local));
    // All but what is new in these two, and the chunks around it.
    let sent = count(&out, "sent") - 3_000 - 600_009;
    assert!(sent * 100 <= all, "{sent} of {all} sent");
    assert!(count(&out, "copied") * 100 >= all * 98, "{out:?}");
    // A version with something inserted.
    let new = [&longer[..500_000], b"in between", &longer[500_000..]].concat();
    write(&moved.join("d0/f3"), &new);
    let out = synced(&server, dir.path(), &args);
    assert!(count(&out, "sent") < 100_000, "{out:?}");
    let args = [
        "put",
        "--json",
        "--if-exists",
        "overwrite",
        "--delta",
        "always",
    ];
    let out = server.client(
        &moved,
        &[&args[..], &["d0", "--as", "copy/new/place/it/"]].concat(),
    );
    assert_eq!(
        (out.code, count(&out, "sent") < 200_000),
        (0, true),
        "{out:?}"
    );
    assert_eq!(
        fs::read(there.join("new/place/it/d0/f3")).expect("read"),
        new
    );
}

#[test]
fn a_mirror_that_watches_follows_changes_and_outlives_its_server() {
    let site = start();
    let dir = workdir();
    let local = dir.path().join("tree");
    write(&local.join("a"), b"1");
    let args = [
        "sync",
        "--watch",
        "--json",
        "--delete",
        "--retries",
        "1",
        "tree",
        ":copy",
    ];
    let command = &mut client(dir.path());
    let mut running = Running::spawn(command.env("UDPACK_URL", &site.url).args(args));
    let equal = |site: &Site, what: &str| {
        let there = site.uploads().join("copy");
        until(what, || {
            try_tree(&there).is_ok_and(|there| there == tree(&local))
        });
    };
    equal(&site, "the first run");
    write(&local.join("new/deep/b"), b"2");
    equal(&site, "a new directory");
    write(&local.join("new/deep/c"), &bytes(300_000, 3));
    equal(&site, "a file in it");
    fs::remove_file(local.join("a")).expect("rm");
    fs::rename(local.join("new"), local.join("other")).expect("rename");
    equal(&site, "what is gone");

    // A single entry that cannot be sent ends nothing.
    symlink("nowhere", local.join("link")).expect("a link");
    running.told("waiting for the next change");
    fs::remove_file(local.join("link")).expect("rm");
    write(&local.join("after it"), b"3");
    equal(&site, "what came after one that failed");

    // The server is away for a while, and something changes meanwhile.
    let Site { server, url } = site;
    let listen = server.value("listening").to_owned();
    let kept = server.stop();
    write(&local.join("while away"), b"4");
    running.told("trying again");
    let server = Server::start_at(&listen, kept, &["--overwrite", "always"]);
    let site = Site { server, url };
    equal(&site, "what changed meanwhile");
    running.signal("INT");
    assert_eq!(running.exited().code, 130);
}

#[test]
fn wrong_sides_are_told() {
    let server = start();
    let dir = workdir();
    write(&dir.path().join("file"), b"1");
    for (args, code) in [
        (&["a", "b"][..], 2),
        (&[":a", ":b"], 2),
        (&["file", ":b"], 3),
        (&["missing", ":b"], 3),
        (&[":missing", "b"], 12),
        (&[".", ":x/../y"], 6),
        (&["--max-delete", "3", ".", ":"], 2),
        (&["--watch", ":", "b"], 2),
        (&["--watch", "-n", ".", ":"], 2),
    ] {
        let out = server.client(dir.path(), &[&["sync"][..], args].concat());
        assert_eq!(out.code, code, "{args:?}: {out:?}");
        assert_eq!(out.stdout, "", "{args:?}");
    }
    assert!(!dir.path().join("b").exists());
}

/// A generator of the same numbers each time.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % most
    }
}

/// Does something to a tree: writes, removes or moves a file or a directory, or makes one of the other.
fn edit(random: &mut Random, root: &Path) {
    let name = |random: &mut Random| {
        let dir = ["", "a/", "b/", "a/b/", "c d/"][random.below(5) as usize];
        format!(
            "{dir}{}",
            ["x", "y", "z", "a", "b"][random.below(5) as usize]
        )
    };
    let path = root.join(name(random));
    match random.below(10) {
        0 => drop(fs::remove_dir_all(&path)),
        1 | 2 => drop(fs::remove_file(&path)),
        3 => drop(fs::rename(&path, root.join(name(random)))),
        4 => drop(fs::create_dir_all(&path)),
        _ => {
            if let Some(dir) = path.parent() {
                let _ = fs::create_dir_all(dir);
            }
            let len = [0, 3, 5_000, 300_000][random.below(4) as usize];
            let seed = u8::try_from(random.below(250)).expect("small");
            if fs::write(&path, bytes(len, seed)).is_ok() {
                // Two versions of one size that were written within a tick of the clock could not be told apart.
                let time = UNIX_EPOCH + Duration::from_secs(1_000_000_000 + random.0 % (1 << 29));
                let file = fs::File::options().write(true).open(&path);
                let dated = file.and_then(|file| file.set_modified(time));
                dated.expect("a time of its own");
            }
        }
    }
}

#[test]
fn random_trees_become_equal_after_random_edits_at_both_sides() {
    let server = start();
    let dir = workdir();
    let (local, there) = (dir.path().join("tree"), server.uploads().join("copy"));
    fs::create_dir_all(&local).expect("mkdir");
    let mut random = Random(0x5eed_0001);
    for round in 0..8 {
        for _ in 0..30 {
            edit(&mut random, &local);
        }
        if round % 2 == 1 {
            for _ in 0..10 {
                edit(&mut random, &there);
            }
        }
        let up = ["--delete", "tree", ":copy"];
        let planned = synced(&server, dir.path(), &[&["-n"][..], &up].concat());
        let out = synced(&server, dir.path(), &up);
        assert_eq!(tree(&there), tree(&local), "round {round}");
        assert_eq!(
            deeds(&planned, "planned"),
            deeds(&out, "ok"),
            "round {round}"
        );
        let out = synced(&server, dir.path(), &["--delete", ":copy", "back"]);
        assert_eq!(
            tree(&dir.path().join("back")),
            tree(&local),
            "round {round}"
        );
        assert_eq!(count(&out, "failed"), 0);
    }
}

/// Set when this is dropped, whatever happens.
struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn edits_during_a_run_leave_nothing_that_never_was() {
    let server = start();
    let dir = workdir();
    let (local, there) = (dir.path().join("tree"), server.uploads().join("copy"));
    // Each version of a file is of one byte, repeated: a mixture of two shows.
    let versions = |number: u64, version: u8| vec![version; 200_000 + number as usize];
    for number in 0..20 {
        write(&local.join(format!("f{number}")), &versions(number, 0));
    }
    synced(&server, dir.path(), &["tree", ":copy"]);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(0x5eed_0002);
            let mut version = 0u8;
            while !over.load(Ordering::Relaxed) {
                version = version.wrapping_add(1);
                let number = random.below(20);
                let path = local.join(format!("f{number}"));
                match random.below(4) {
                    0 => drop(fs::remove_file(&path)),
                    1 => write(&path, &versions(number, version)),
                    _ => {
                        let new = local.join(".new");
                        write(&new, &versions(number, version));
                        fs::rename(new, path).expect("rename");
                    }
                }
            }
        });
        let _ended = Raised(&over);
        for _ in 0..5 {
            let out = server.client(dir.path(), &["sync", "--json", "--delete", "tree", ":copy"]);
            // What did not keep still is told apart from all else.
            assert!([0, 13].contains(&out.code), "{out:?}");
            for (name, (content, ..)) in tree(&there) {
                let first = content.first();
                assert!(
                    content.iter().all(|byte| Some(byte) == first),
                    "{name} is torn"
                );
            }
        }
    });
    synced(&server, dir.path(), &["--delete", "tree", ":copy"]);
    assert_eq!(tree(&there), tree(&local));
}

#[test]
fn a_run_that_is_killed_leaves_each_file_old_or_new_and_the_next_one_completes_it() {
    let server = start();
    let dir = workdir();
    let (local, there) = (dir.path().join("tree"), server.uploads().join("copy"));
    let content = |round: u8, number: u8| bytes(400_000, round ^ (number << 3));
    let mut known: BTreeMap<String, BTreeSet<Vec<u8>>> = BTreeMap::new();
    for round in 0..4u8 {
        fs::remove_dir_all(&local).unwrap_or_default();
        for number in 0..12 {
            let name = format!("d{}/f{}", number % 3, u64::from(number) + u64::from(round));
            let bytes = content(round, number);
            write(&local.join(&name), &bytes);
            known.entry(name).or_default().insert(bytes);
        }
        let args = [
            "sync",
            "--delete",
            "--json",
            "--bwlimit",
            "4M",
            "tree",
            ":copy",
        ];
        let mut running =
            Running::spawn(client(dir.path()).env("UDPACK_URL", &server.url).args(args));
        // Some files have arrived.
        for _ in 0..3 + round {
            running.line();
        }
        running.signal("KILL");
        running.exited();
        for (name, (content, ..)) in tree(&there) {
            let sound = content == b"dir" || known[&name].contains(&content);
            assert!(sound, "round {round}: {name} is neither old nor new");
        }
    }
    synced(&server, dir.path(), &["--delete", "tree", ":copy"]);
    assert_eq!(tree(&there), tree(&local));
}

#[test]
fn a_token_without_the_right_to_delete_deletes_nothing() {
    let server = Server::start_in(workdir(), &["--overwrite", "always", "--allow-read"]);
    let dir = workdir();
    write(&dir.path().join("a"), b"1");
    for dry in [&["-n"][..], &[]] {
        let args = ["sync", "--json", "--delete", ".", ":"];
        let out = server.client(dir.path(), &[&args[..], dry].concat());
        assert_eq!(out.code, 6, "{out:?}");
        assert!(out.stderr.contains("no right to delete"), "{out:?}");
        assert!(!server.uploads().join("a").exists(), "nothing was sent");
    }
    let server = Server::start_in(workdir(), &["--overwrite", "always"]);
    let out = server.client(dir.path(), &["sync", "--json", "--delete", ".", ":"]);
    // It may not even see what is there.
    assert_eq!(out.code, 6, "{out:?}");
    let error: Value = result(&out.stdout);
    assert_eq!(error["error_kind"], "policy");
}

#[test]
fn what_is_left_out_or_missing_is_told_as_what_it_is() {
    let site = start();
    let dir = workdir();
    write(&dir.path().join("d/plain"), b"1");
    let fifo = dir.path().join("d/fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.is_ok_and(|made| made.success()));
    write(&dir.path().join("d/.udpack/part"), b"2");
    let out = synced(&site, dir.path(), &["d", ":d"]);
    let files = deeds(&out, "left_out").0;
    assert_eq!(files, [".udpack", "fifo"].map(str::to_owned).into());
    assert_eq!(count(&out, "left_out"), 2);
    let out = site.client(dir.path(), &["sync", "d", ":d"]);
    assert!(out.stderr.contains("2 left out"), "{out:?}");
    // A link that leads nowhere is there: it has not vanished.
    symlink("nowhere", dir.path().join("d/link")).expect("a link");
    write(&site.uploads().join("d/only there"), b"2");
    let out = site.client(dir.path(), &["sync", "--delete", "--json", "d", ":d"]);
    assert_eq!(out.code, 3, "{out:?}");
    assert_eq!((count(&out, "vanished"), count(&out, "failed")), (0, 1));
    assert!(out.stderr.contains("d/link"), "{out:?}");
    assert!(out.stderr.contains("nothing is deleted"), "{out:?}");
    assert!(site.uploads().join("d/only there").exists());
}

/// A file of the server that is removed before its turn comes.
#[test]
fn a_file_that_vanishes_at_the_server_is_passed_over_or_a_failure() {
    for (vanished, code) in [("skip", 0), ("fail", 13)] {
        let site = start();
        let dir = workdir();
        write(&site.uploads().join("d/large"), &bytes(3_000_000, 1));
        write(&site.uploads().join("d/small"), b"2");
        let args = ["sync", ":d", "back", "--json", "-j", "1"];
        let mut command = client(dir.path());
        command.env("UDPACK_URL", &site.url).args(args);
        command.args(["--bwlimit", "1M", "--vanished", vanished]);
        let mut running = Running::spawn(&mut command);
        loop {
            let event = events(&running.line()).remove(0);
            if event["event"] == "progress" && event["bytes"].as_u64() > Some(0) {
                break;
            }
        }
        fs::remove_file(site.uploads().join("d/small")).expect("rm");
        let out = running.exited();
        assert_eq!(out.code, code, "{out:?}");
        assert_eq!((count(&out, "files"), count(&out, "vanished")), (1, 1));
        assert!(dir.path().join("back/large").exists());
    }
}
