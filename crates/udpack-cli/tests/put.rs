//! What `put` makes of what it was asked for: names that meet, lists, nothing at all, and what it says beforehand.

mod common;

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use common::{
    Exited, Running, Server, assert_error, bytes, client, events, exited, named, result, visible,
    workdir,
};

fn write(path: &Path, content: &[u8]) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
    fs::write(path, content).expect("write");
}

/// Runs a client with these bytes on its standard input.
fn fed(server: &Server, dir: &Path, args: &[&str], input: &[u8]) -> Exited {
    let mut command = client(dir);
    command.env("UDPACK_URL", server.url()).args(args);
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    command.stdin(Stdio::from(reader));
    let mut running = Running::spawn(&mut command);
    drop(command);
    let input = input.to_owned();
    let feeding = std::thread::spawn(move || writer.write_all(&input));
    let out = running.exited();
    let _ = feeding.join();
    out
}

fn clear(server: &Server) {
    for name in visible(&server.uploads()) {
        let path = server.uploads().join(name);
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        removed.expect("removed");
    }
}

#[test]
fn two_sources_of_one_name_are_refused_or_both_taken_as_the_policy_says() {
    let server = Server::start_in(workdir(), &["--overwrite", "always"]);
    let dir = workdir();
    for (size, more) in [
        (0, 1),
        (100_000, 0),
        (300_000, 0),
        (2_000_000, 1),
        (8_000_000, 0),
    ] {
        let first = bytes(size, 1);
        let second = bytes(size + more, 2);
        write(&dir.path().join("cam1/IMG_1.JPG"), &first);
        write(&dir.path().join("cam2/IMG_1.JPG"), &second);
        for policy in ["same", "error", "skip", "overwrite", "rename"] {
            for jobs in ["1", "4"] {
                let what = format!("{size} {policy} {jobs}");
                clear(&server);
                let args = ["put", "cam1/", "cam2/", "--if-exists", policy, "-j", jobs];
                let out = server.client(dir.path(), &args);
                let stored = |name: &str| fs::read(server.uploads().join(name)).ok();
                match policy {
                    "overwrite" => {
                        assert_eq!(out.code, 0, "{what}: {out:?}");
                        assert!(stored("IMG_1.JPG").as_ref() == Some(&second), "{what}");
                        assert_eq!(visible(&server.uploads()).len(), 1, "{what}");
                    }
                    "rename" => {
                        assert_eq!(out.code, 0, "{what}: {out:?}");
                        assert!(stored("IMG_1.JPG").as_ref() == Some(&first), "{what}");
                        assert!(stored("IMG_1 (1).JPG").as_ref() == Some(&second), "{what}");
                    }
                    _ => {
                        assert_eq!(out.code, 2, "{what}: {out:?}");
                        assert_error(&out.stderr);
                        for name in ["cam1/IMG_1.JPG", "cam2/IMG_1.JPG"] {
                            assert!(out.stderr.contains(name), "{what}: {out:?}");
                        }
                        assert_eq!(out.stdout, "", "{what}");
                        assert!(visible(&server.uploads()).is_empty(), "{what}");
                        continue;
                    }
                }
                // Each line tells what is stored of that source.
                for (content, count) in [(&first, 1), (&second, 1)] {
                    let line = format!("{}  {}", content.len(), blake3::hash(content));
                    assert_eq!(out.stdout.matches(&line).count(), count, "{what}: {out:?}");
                }
            }
        }
    }
}

#[test]
fn names_meet_however_they_were_asked_for() {
    let server = Server::start();
    let dir = workdir();
    write(&dir.path().join("a.jpg"), b"1");
    write(&dir.path().join("dir/a.jpg"), b"2");
    write(&dir.path().join("deep/dir/a.jpg"), b"3");
    write(&dir.path().join("list"), b"a.jpg\ndir/a.jpg\n");
    write(&dir.path().join("twice"), b"dir/a.jpg\n");
    let day = dir.path().join("day");
    write(&day.join("x"), b"4");
    for (args, first, second) in [
        (&["put", "a.jpg", "dir/"][..], "a.jpg", "dir/a.jpg"),
        (&["put", "dir/", "a.jpg"], "dir/a.jpg", "a.jpg"),
        (
            &["put", "a.jpg", "dir/a.jpg", "--as", "day/"],
            "a.jpg",
            "dir/a.jpg",
        ),
        (&["put", "dir", "deep/"], "dir/a.jpg", "deep/dir/a.jpg"),
        (
            &["put", "deep/", "--files-from", "twice"],
            "deep/dir/a.jpg",
            "dir/a.jpg",
        ),
        (&["put", "-n", "a.jpg", "dir/"], "a.jpg", "dir/a.jpg"),
        (&["put", "--json", "a.jpg", "dir/"], "a.jpg", "dir/a.jpg"),
    ] {
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, 2, "{args:?}: {out:?}");
        let text = format!("{first} and {second} would both be stored as ");
        assert!(out.stderr.contains(&text), "{args:?}: {out:?}");
        assert!(visible(&server.uploads()).is_empty(), "{args:?}");
    }
    // Names that only look alike.
    let out = server.client(dir.path(), &["put", "a.jpg", "dir", "deep"]);
    assert_eq!(out.code, 0, "{out:?}");
    let out = server.client(dir.path(), &["put", "--files-from", "list", "--as", "l/"]);
    assert_eq!(out.code, 0, "{out:?}");
}

#[test]
fn a_file_that_is_named_twice_is_sent_once() {
    let server = Server::start_in(workdir(), &["--overwrite", "always"]);
    let dir = workdir();
    write(&dir.path().join("t/a"), b"1");
    write(&dir.path().join("t/s/b"), b"2");
    // What `find t` prints.
    let list = b"t\nt/a\nt/s\nt/s/b\n./t/a\n";
    for policy in ["same", "rename", "overwrite", "error"] {
        clear(&server);
        let args = ["put", "--files-from", "-", "--if-exists", policy, "--json"];
        let out = fed(&server, dir.path(), &args, list);
        assert_eq!(out.code, 0, "{policy}: {out:?}");
        assert_eq!(result(&out.stdout)["files"], 2, "{policy}");
        let names = fs::read_dir(server.uploads().join("t")).expect("stored");
        assert_eq!(names.count(), 2, "{policy}");
    }
}

#[test]
fn a_list_that_cannot_be_read_or_names_nothing_is_an_error() {
    let server = Server::start();
    let dir = workdir();
    fs::create_dir(dir.path().join("directory")).expect("mkdir");
    for (name, content) in [
        ("empty", &b""[..]),
        ("blank", b"\n\r\n"),
        ("mark", b"\xef\xbb\xbf"),
    ] {
        write(&dir.path().join(name), content);
    }
    for list in ["directory", "missing", "/proc/self/mem"] {
        for more in [&[][..], &["--allow-empty"]] {
            let args = [&["put", "--files-from", list], more].concat();
            let out = server.client(dir.path(), &args);
            assert_eq!(out.code, 3, "{list}: {out:?}");
            assert_error(&out.stderr);
            assert!(out.stderr.contains(list), "{out:?}");
        }
    }
    for list in ["empty", "blank", "mark", "-"] {
        let args = ["put", "--files-from", list];
        let out = server.client(dir.path(), &args);
        assert_eq!(out.code, 3, "{list}: {out:?}");
        assert_error(&out.stderr);
        assert!(out.stderr.contains("nothing to send"), "{out:?}");
        let out = server.client(dir.path(), &[&args[..], &["--json"]].concat());
        assert_eq!((out.code, &result(&out.stdout)["exit"]), (3, &3.into()));
        let out = server.client(dir.path(), &[&args[..], &["--allow-empty"]].concat());
        assert_eq!(out.code, 0, "{list}: {out:?}");
        let out = server.client(dir.path(), &[&args[..], &["-n"]].concat());
        assert_eq!(out.code, 3, "{list}, dry: {out:?}");
    }
}

#[test]
fn lists_of_other_systems_and_programs_are_understood() {
    let server = Server::start();
    let dir = workdir();
    for name in ["a", "b c", "d"] {
        write(&dir.path().join(name), name.as_bytes());
    }
    write(&dir.path().join("two\nlines"), b"x");
    for (list, args) in [
        (&b"a\r\nb c\r\nd\r\n"[..], &[][..]),
        (b"\xef\xbb\xbfa\r\nb c\r\nd", &[]),
        (b"\xef\xbb\xbfa\nb c\n\nd\n", &[]),
        (b"a\0b c\0d\0", &["-0"]),
        (b"a\0b c\0d", &["--null"]),
    ] {
        clear(&server);
        let args = [&["put", "--files-from", "-"], args].concat();
        let out = fed(&server, dir.path(), &args, list);
        assert_eq!(out.code, 0, "{list:?}: {out:?}");
        let mut names = visible(&server.uploads());
        names.sort();
        assert_eq!(names, ["a", "b c", "d"], "{list:?}");
    }
    // With -0 a line break is part of a name, and this file is found.
    let out = fed(
        &server,
        dir.path(),
        &["put", "-n", "-0", "--files-from", "-"],
        b"two\nlines\0",
    );
    assert!(!out.stderr.contains("cannot read"), "{out:?}");
    let out = server.client(dir.path(), &["put", "-0", "a"]);
    assert_eq!(out.code, 2, "without a list: {out:?}");
}

#[test]
fn a_run_that_finds_nothing_to_do_says_so() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    fs::create_dir(dir.path().join("hollow")).expect("mkdir");
    write(&dir.path().join("t/a.o"), b"1");
    for args in [
        &["put", "hollow/"][..],
        &["put", "t/", "--exclude", "*.o"],
        &["put", "t/a.o", "--exclude", "*.o"],
        &["put", "-n", "hollow/"],
    ] {
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, 3, "{args:?}: {out:?}");
        assert_error(&out.stderr);
        let out = server.client(dir.path(), &[args, &["--allow-empty"]].concat());
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
    }
    // The directory itself is something.
    assert_eq!(server.client(dir.path(), &["put", "hollow"]).code, 0);
    let out = server.client(dir.path(), &["verify", "hollow/"]);
    assert_eq!(out.code, 3, "{out:?}");
    assert_error(&out.stderr);
}

#[test]
fn an_empty_standard_input_is_stored_only_where_that_is_allowed() {
    let server = Server::start();
    let dir = workdir();
    let closed = |more: &[&str]| {
        let binary = env!("CARGO_BIN_EXE_udpack-client");
        let mut shell = common::quiet(std::process::Command::new("sh"), dir.path());
        shell.env("UDPACK_URL", server.url());
        let script = format!("exec {binary} put - --as x {} <&-", more.join(" "));
        exited(shell.args(["-c", &script]))
    };
    for out in [
        fed(&server, dir.path(), &["put", "-", "--as", "x"], b""),
        closed(&[]),
    ] {
        assert_eq!(out.code, 3, "{out:?}");
        assert_error(&out.stderr);
        assert!(out.stderr.contains("standard input is empty\n"), "{out:?}");
        let hint = out.stderr.lines().last().expect("a hint");
        assert!(hint.contains("--allow-empty"), "{out:?}");
        assert!(!hint.contains("permissions"), "{out:?}");
        assert!(visible(&server.uploads()).is_empty());
    }
    for out in [
        fed(
            &server,
            dir.path(),
            &["put", "-", "--as", "x", "--allow-empty"],
            b"",
        ),
        closed(&["--allow-empty"]),
    ] {
        assert_eq!(out.code, 0, "{out:?}");
        assert_eq!(fs::read(server.uploads().join("x")).expect("stored"), b"");
    }
    // An empty file is no such case.
    write(&dir.path().join("none"), b"");
    assert_eq!(server.client(dir.path(), &["put", "none"]).code, 0);
}

#[test]
#[cfg(target_os = "linux")]
fn files_that_do_not_tell_their_size_are_stored_whole() {
    let server = Server::start();
    let dir = workdir();
    // By itself, and among many small ones that are sent in batches.
    for n in 0..40 {
        write(&dir.path().join(format!("many/{n}")), b"small");
    }
    for local in [
        "/proc/version",
        "/proc/filesystems",
        "/sys/kernel/mm/transparent_hugepage/enabled",
    ] {
        let Ok(content) = fs::read(local) else {
            common::skipped(local);
            continue;
        };
        for args in [&["put", local][..], &["put", "many/", local]] {
            clear(&server);
            let out = server.client(dir.path(), args);
            assert_eq!(out.code, 0, "{args:?}: {out:?}");
            let name = local.rsplit('/').next().expect("a name");
            let stored = fs::read(server.uploads().join(name)).expect("stored");
            assert!(stored == content, "{args:?}");
            let line = format!("{name}  {}  {}\n", content.len(), blake3::hash(&content));
            assert!(out.stdout.contains(&line), "{args:?}: {out:?}");
        }
    }
    // What cannot be read is named, and not an empty file.
    let out = server.client(dir.path(), &["put", "/proc/self/mem"]);
    assert_eq!(out.code, 3, "{out:?}");
    assert_error(&out.stderr);
    assert!(out.stderr.contains("/proc/self/mem"), "{out:?}");
    assert!(fs::metadata(server.uploads().join("mem")).is_err());
}

#[test]
fn a_dry_run_lists_refuses_and_counts_what_a_real_one_does() {
    let server = Server::start();
    let dir = workdir();
    write(&dir.path().join("t/a"), b"123");
    write(&dir.path().join("t/b/c"), b"12345");
    fs::create_dir(dir.path().join("t/hollow")).expect("mkdir");
    std::os::unix::fs::symlink("nowhere", dir.path().join("t/broken")).expect("symlink");
    let pipe = std::process::Command::new("mkfifo")
        .arg(dir.path().join("t/pipe"))
        .status();
    assert!(pipe.is_ok_and(|status| status.success()));
    for args in [
        &["put", "t"][..],
        &["put", "t", "--links"],
        &["put", "t", "--exclude", "broken", "--exclude", "pipe"],
        &["put", "t/a", "missing"],
        &["put", "t/a", "--as", "x/"],
    ] {
        clear(&server);
        let dry = server.client(dir.path(), &[args, &["-n", "--json"]].concat());
        assert!(visible(&server.uploads()).is_empty(), "{args:?}");
        let real = server.client(dir.path(), &[args, &["--json"]].concat());
        let told = |out: &Exited| {
            let all = events(&out.stdout);
            let mut files: Vec<_> = named(&all, "file")
                .into_iter()
                .map(|file| {
                    let failed = file["status"] == "error";
                    let field = |name: &str| file[name].to_string();
                    (
                        field("path"),
                        field("source"),
                        field("kind"),
                        field("bytes"),
                        failed,
                        field("error"),
                    )
                })
                .collect();
            files.sort();
            files
        };
        assert_eq!(told(&dry), told(&real), "{args:?}");
        let (dry_end, real_end) = (result(&dry.stdout), result(&real.stdout));
        for field in ["exit", "files", "failed", "bytes", "error_kind", "error"] {
            assert_eq!(dry_end[field], real_end[field], "{args:?} {field}");
        }
        assert_eq!(dry.code, real.code, "{args:?}");
        assert_eq!(dry_end["sent"], 0);
    }
    let out = server.client(
        dir.path(),
        &[
            "put",
            "-n",
            "t/",
            "--exclude",
            "broken",
            "--exclude",
            "pipe",
        ],
    );
    assert_eq!(out.code, 0, "{out:?}");
    assert!(out.stderr.contains("2 files, 8 B would be sent"), "{out:?}");
    let mut lines: Vec<&str> = out.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["a  3  -", "b/c  5  -", "hollow/  -  -"]);
}

#[test]
fn a_dry_run_asks_the_server_what_has_the_names() {
    let server = Server::start_in(workdir(), &["--allow-read", "--overwrite", "always"]);
    let dir = workdir();
    write(&dir.path().join("t/same"), b"123");
    write(&dir.path().join("t/other"), b"123");
    write(&dir.path().join("t/longer"), b"12345");
    write(&dir.path().join("t/new"), b"1");
    write(&dir.path().join("t/dir"), b"1");
    for (link, target) in [("link", "same"), ("turned", "new")] {
        std::os::unix::fs::symlink(target, dir.path().join("t").join(link)).expect("symlink");
    }
    let there = || {
        clear(&server);
        write(&server.uploads().join("t/same"), b"123");
        write(&server.uploads().join("t/other"), b"456");
        write(&server.uploads().join("t/longer"), b"1");
        fs::create_dir(server.uploads().join("t/dir")).expect("mkdir");
        for (link, target) in [("link", "same"), ("turned", "same")] {
            std::os::unix::fs::symlink(target, server.uploads().join("t").join(link))
                .expect("symlink");
        }
    };
    for policy in ["same", "error", "skip", "overwrite", "rename"] {
        there();
        let args = ["put", "t", "--links", "--json", "--if-exists", policy];
        let dry = server.client(dir.path(), &[&args[..], &["-n"]].concat());
        assert!(fs::metadata(server.uploads().join("t/new")).is_err());
        let real = server.client(dir.path(), &args);
        assert_eq!(dry.code, real.code, "{policy}: {dry:?} {real:?}");
        let failed = |out: &Exited| {
            let all = events(&out.stdout);
            let mut files: Vec<_> = named(&all, "file")
                .into_iter()
                .map(|file| {
                    let failed = file["status"] == "error";
                    let field = |name: &str| file[name].to_string();
                    // A name that the server chooses shows only in a real run.
                    (field("source"), failed, field("error"))
                })
                .collect();
            files.sort();
            files
        };
        assert_eq!(failed(&dry), failed(&real), "{policy}");
        let (dry_end, real_end) = (result(&dry.stdout), result(&real.stdout));
        for field in ["exit", "failed", "files", "error_kind", "error"] {
            assert_eq!(dry_end[field], real_end[field], "{policy} {field}");
        }
    }
    there();
    let args = ["put", "-n", "--links", "t/same", "t/new", "t/link"];
    let out = server.client(dir.path(), &[&args[..], &["--as", "t/"]].concat());
    assert_eq!((out.code, &*out.stdout), (0, "t/new  1  -\n"), "{out:?}");
    assert!(
        out.stderr
            .contains("1 file, 1 B would be sent, 1 already there"),
        "{out:?}"
    );
    // Who may not read is told that.
    let server = Server::start();
    write(&server.uploads().join("t/new"), b"2");
    let out = server.client(dir.path(), &["put", "-n", "t/new"]);
    assert_eq!((out.code, &*out.stdout), (0, "new  1  -\n"), "{out:?}");
    assert!(out.stderr.contains("this token may not read"), "{out:?}");
    // As in a real run, there must be a server.
    let out = exited(client(dir.path()).args([
        "put",
        "-n",
        "t/new",
        "--to",
        "127.0.0.1:1",
        "--connect-timeout",
        "0.2",
        "--retries",
        "0",
    ]));
    assert_eq!((out.code, &*out.stdout), (5, ""), "{out:?}");
}

#[test]
fn what_is_there_already_has_no_speed() {
    let server = Server::start();
    let dir = workdir();
    for (name, size) in [("large", 3_000_000), ("small", 300)] {
        write(&dir.path().join(name), &bytes(size, 4));
        let first = server.client(dir.path(), &["put", name]);
        assert!(first.stderr.contains("/s"), "{first:?}");
        let second = server.client(dir.path(), &["put", name]);
        assert!(second.stderr.contains("1 already there"), "{second:?}");
        assert!(!second.stderr.contains("/s"), "{second:?}");
        let third = server.client(dir.path(), &["put", name, "--json"]);
        assert_eq!(result(&third.stdout)["rate"], 0.0, "{third:?}");
    }
}

#[test]
fn a_server_that_falls_silent_is_told_of_as_that() {
    let server = Server::start();
    let dir = workdir();
    write(&dir.path().join("large"), &bytes(8 << 20, 4));
    let mut running = Running::spawn(client(dir.path()).env("UDPACK_URL", server.url()).args([
        "put",
        "large",
        "--bwlimit",
        "2M",
        "--progress",
        "plain",
        "--json",
    ]));
    while !running.line().contains("\"progress\"") {}
    server.running.signal("STOP");
    let line = running.told("stalled");
    assert!(!line.contains("eta"), "{line}");
    server.running.signal("CONT");
    let out = running.exited();
    assert_eq!(out.code, 0, "{out:?}");
}

#[test]
fn devices_sockets_and_pipes_are_named_counted_and_left_out() {
    let server = Server::start();
    let dir = workdir();
    write(&dir.path().join("t/a"), b"123");
    let pipe = std::process::Command::new("mkfifo")
        .arg(dir.path().join("t/pipe"))
        .status();
    assert!(pipe.is_ok_and(|status| status.success()));
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("t/socket"));
    for args in [&["put", "t"][..], &["put", "t", "--links"]] {
        clear(&server);
        let out = server.client(dir.path(), &[args, &["--json"]].concat());
        assert_eq!(out.code, 0, "{out:?}");
        let end = result(&out.stdout);
        let counts = [&end["files"], &end["failed"], &end["left_out"]];
        assert_eq!(counts, [1, 0, 2], "{end}");
        let lines = events(&out.stdout);
        let mut special: Vec<_> = named(&lines, "file")
            .into_iter()
            .filter(|file| file["status"] == "left_out")
            .map(|file| file["source"].to_string())
            .collect();
        special.sort();
        assert_eq!(special, ["\"t/pipe\"", "\"t/socket\""]);
        assert_eq!(visible(&server.uploads()), ["t"]);
    }
    clear(&server);
    let out = server.client(dir.path(), &["put", "t"]);
    assert_eq!(out.code, 0, "{out:?}");
    for text in ["t/pipe", "t/socket", "1 file, 3 B in", ", 2 left out"] {
        assert!(out.stderr.contains(text), "{text}: {out:?}");
    }
    // One that was asked for by its name is missed.
    let out = server.client(dir.path(), &["put", "t/pipe"]);
    assert_eq!(out.code, 3, "{out:?}");
    assert_error(&out.stderr);
}

#[test]
fn a_file_that_changes_while_it_is_read_fails_or_is_told_to_be_torn() {
    let server = Server::start();
    let dir = workdir();
    let content = bytes(4 << 20, 7);
    for (changed, code, status) in [("fail", 7, "error"), ("warn", 13, "error")] {
        clear(&server);
        let file = dir.path().join("f");
        write(&file, &content);
        let mut command = client(dir.path());
        command.env("UDPACK_URL", server.url()).args([
            "put",
            "f",
            "--json",
            "--no-resume",
            "--bwlimit",
            "2M",
            "--changed",
            changed,
        ]);
        let mut running = Running::spawn(&mut command);
        // Once something is there, the first bytes were read.
        common::until("bytes arrive", || common::staged(&server.uploads()) > 0);
        fs::File::options()
            .write(true)
            .open(&file)
            .and_then(|mut file| file.write_all(b"torn"))
            .expect("write");
        let out = running.exited();
        assert_eq!(out.code, code, "{out:?}");
        let end = result(&out.stdout);
        assert_eq!(end["status"], status);
        let stored = fs::read(server.uploads().join("f"));
        if changed == "fail" {
            assert!(stored.is_err());
            assert_eq!([&end["changed"], &end["failed"]], [1, 1], "{end}");
            continue;
        }
        assert_eq!([&end["files"], &end["failed"], &end["torn"]], [1, 0, 1]);
        let lines = events(&out.stdout);
        let file = named(&lines, "file")[0];
        assert_eq!(file["torn"], true);
        // As it was read: its hash is that of what is stored.
        let stored = stored.expect("stored");
        assert_eq!(file["hash"], blake3::hash(&stored).to_string());
        assert_eq!(stored.len(), content.len());
    }
}

#[test]
fn what_was_not_transferred_is_told_in_text_and_json() {
    let server = Server::start_in(workdir(), &["--allow-read", "--overwrite", "always"]);
    let dir = workdir();
    let sparse = fs::File::create(dir.path().join("disk")).expect("create");
    sparse.set_len(16 << 20).expect("a length");
    std::os::unix::fs::FileExt::write_all_at(&sparse, &bytes(100_000, 8), 8 << 20).expect("write");
    sparse.sync_all().expect("sync");
    drop(sparse);
    write(&dir.path().join("known"), &bytes(1000, 9));
    let out = server.client(dir.path(), &["put", "known"]);
    assert_eq!(out.code, 0, "{out:?}");
    let out = server.client(dir.path(), &["put", "--json", "disk", "known"]);
    assert_eq!(out.code, 0, "{out:?}");
    let end = result(&out.stdout);
    let number = |name: &str| end[name].as_u64().unwrap_or(0);
    assert_eq!(number("bytes"), (16 << 20) + 1000);
    // A small file that is there already is sent before that is known.
    assert_eq!(number("same"), 1000);
    if number("holes") > 0 {
        assert!(number("sent") < 300_000, "{end}");
        assert!(number("holes") > 15 << 20, "{end}");
        fs::remove_file(server.uploads().join("disk")).expect("remove");
        let out = server.client(dir.path(), &["put", "disk"]);
        for text in ["1 file, 16.0 MiB in", " transferred", " MiB of holes"] {
            assert!(out.stderr.contains(text), "{text}: {out:?}");
        }
        let out = server.client(dir.path(), &["get", "disk", "--as", "back", "--json"]);
        let end = result(&out.stdout);
        assert!(end["holes"].as_u64().unwrap_or(0) > 15 << 20, "{end}");
    }
}
