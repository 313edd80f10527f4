//! Whole trees and single files, to the server and back, by the real binaries: bytes, names, times, modes,
//! rights, and what a crash leaves.

mod common;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{
    Running, Server, age, assert_error, bytes, client, events, exited, named, odd_tree, result,
    server, skipped, staged, tree, until, workdir, write,
};
use serde_json::Value;

fn names(root: &Path) -> Vec<String> {
    tree(root).into_keys().collect()
}

#[test]
fn an_odd_tree_comes_back_as_it_was() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    let local = dir.path().join("tree");
    fs::create_dir(&local).expect("mkdir");
    odd_tree(&local);
    age(&local, 0o755, 777, 0);
    let before = tree(&local);
    let files = before
        .values()
        .filter(|(content, ..)| content != b"dir")
        .count();

    let out = server.client(dir.path(), &["put", "-p", "--json", "tree"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(result(&out.stdout)["files"], files);
    assert_eq!(
        tree(&server.uploads().join("tree")),
        before,
        "at the server"
    );
    assert_eq!(staged(&server.uploads()), 0);

    let out = server.client(dir.path(), &["verify", "tree"]);
    assert_eq!((out.code, &*out.stdout), (0, ""), "{out:?}");

    let out = server.client(
        dir.path(),
        &["get", "-p", "--json", "tree", "--as", "back/"],
    );
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(result(&out.stdout)["files"], files);
    assert_eq!(tree(&dir.path().join("back/tree")), before, "back again");
    assert_eq!(names(&dir.path().join("back")).len(), before.len() + 1);
    assert!(
        !dir.path().join("back/.udpack").exists(),
        "nothing is left behind"
    );
    let top = fs::metadata(dir.path().join("back/tree")).expect("metadata");
    assert_eq!(top.mtime(), 777);

    // All of it once more is no work.
    for args in [
        &["put", "-p", "--json", "tree"][..],
        &["get", "-p", "--json", "tree", "--as", "back/"],
    ] {
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, 0, "{out:?}");
        let result = result(&out.stdout);
        assert_eq!(
            (&result["files"], &result["failed"]),
            (&files.into(), &0.into())
        );
    }
    assert_eq!(tree(&dir.path().join("back/tree")), before);
}

/// One file for each name that shells, terminals, archives and other systems find hard, and many more that are made of
/// such parts.
fn hardest_names() -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> = [
        &b".env"[..],
        b".git/config",
        b"Screenshot 12:30:45.png",
        b"a\\b",
        b"aux.c",
        b"CON",
        b"-x",
        b"--help",
        b"caf\xe9.txt",
        b"\xff",
        b"\x80\x81/\xfe",
        b" ",
        b"ends with space ",
        b"dot.",
        b"...",
        b"new\nline",
        b"\x1b[31mred",
        b"tab\there",
        b"\x7f",
        b"%41",
        b"a/.udpack/x",
        "e\u{301}".as_bytes(),
        "\u{e9}".as_bytes(),
        "\u{202e}gpj.exe".as_bytes(),
        "\u{fffd}".as_bytes(),
        "\u{10ffe9}".as_bytes(),
        "\u{65e5}".repeat(81).as_bytes(),
    ]
    .iter()
    .map(|name| name.to_vec())
    .collect();
    names.push(vec![b'n'; 255]);
    names.push(
        [&b"deep/"[..]; 41]
            .concat()
            .into_iter()
            .chain(*b"leaf")
            .collect(),
    );
    // Every byte that a name can hold, alone and between letters.
    for byte in (1..=255u8).filter(|byte| *byte != b'/') {
        names.push([b"bytes/", &[b'a', byte, b'z'][..]].concat());
        if byte != b'.' {
            names.push([b"alone/", &[byte][..]].concat());
        }
    }
    let mut number = 0u32;
    while names.len() < 2000 {
        number += 1;
        let part =
            [&b"\xe9"[..], b":", b"\\", b"\xc3", b"\n", b"'", b".", b" "][number as usize % 8];
        names.push(
            [
                format!("many/{}/", number % 17).as_bytes(),
                part,
                number.to_string().as_bytes(),
            ]
            .concat(),
        );
    }
    names
}

#[test]
fn two_thousand_hard_names_come_back_as_they_were() {
    use std::os::unix::ffi::OsStrExt as _;
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    let local = dir.path().join("tree");
    for (number, name) in hardest_names().iter().enumerate() {
        write(
            &local.join(std::ffi::OsStr::from_bytes(name)),
            number.to_string().as_bytes(),
        );
    }
    symlink(
        std::ffi::OsStr::from_bytes(b"caf\xe9.txt"),
        local.join("link"),
    )
    .expect("symlink");
    let before = tree(&local);
    let files = hardest_names().len();

    let out = server.client(dir.path(), &["put", "--links", "-p", "--json", "tree"]);
    assert_eq!(out.code, 0, "{}", out.stderr);
    assert_eq!(result(&out.stdout)["files"], files);
    assert_eq!(
        tree(&server.uploads().join("tree")),
        before,
        "at the server"
    );
    let latin = events(&out.stdout);
    let latin = latin
        .iter()
        .find(|line| line["path"] == "tree/caf\\xe9.txt")
        .expect("its line");
    assert_eq!(latin["path_hex"], "747265652f636166e92e747874");

    let out = server.client(dir.path(), &["verify", "--links", "tree"]);
    assert_eq!((out.code, &*out.stdout), (0, ""), "{out:?}");
    let out = server.client(
        dir.path(),
        &["get", "-p", "--json", "tree", "--as", "back/"],
    );
    assert_eq!(out.code, 0, "{}", out.stderr);
    assert_eq!(tree(&dir.path().join("back/tree")), before, "back again");

    let out = server.client(dir.path(), &["ls", "-R", "tree"]);
    assert_eq!((out.code, out.stdout.lines().count()), (0, before.len()));
    assert!(!out.stdout.chars().any(|c| c.is_control() && c != '\n'));
    // One by one, by its bytes.
    let raw = |text: &[u8]| std::ffi::OsStr::from_bytes(text).to_owned();
    let url = server.new_token(&["cleaner", "--scope", "read,delete"]);
    let mut rm = client(dir.path());
    rm.env("UDPACK_URL", &url)
        .arg("rm")
        .arg(raw(b"tree/caf\xe9.txt"));
    assert_eq!(exited(&mut rm).stdout, "removed tree/caf\\xe9.txt  1  1\n");
    // What was listed is all there is.
    let mut rm = client(dir.path());
    rm.env("UDPACK_URL", &url).args(["rm", "-r", "tree"]);
    let out = exited(&mut rm);
    assert_eq!(out.code, 0, "{out:?}");
    assert!(
        out.stdout.starts_with(&format!("removed tree  {files}  ")),
        "{out:?}"
    );
    assert_eq!(names(&server.uploads()), [""; 0]);
}

#[test]
fn get_writes_to_what_is_no_file() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    let content = bytes(300_000, 7);
    write(&dir.path().join("f"), &content);
    assert_eq!(server.client(dir.path(), &["put", "f"]).code, 0);
    for sink in ["-", "/dev/stdout"] {
        let mut get = client(dir.path());
        get.env("UDPACK_URL", server.url())
            .args(["get", "f", "--as", sink]);
        let out = get.output().expect("it runs");
        assert!(out.status.success(), "{sink}");
        assert!(out.stdout == content, "{sink}: nothing but the file");
    }
    assert_eq!(
        server
            .client(dir.path(), &["get", "f", "--as", "/dev/null"])
            .code,
        0
    );
    // Standard output under other names, a file or a pipe; another descriptor.
    let shell = |script: &str| {
        let mut shell = std::process::Command::new("sh");
        shell
            .current_dir(dir.path())
            .env("UDPACK_URL", server.url())
            .args(["-c", script])
            .arg(client(dir.path()).get_program());
        shell.output().expect("it runs")
    };
    for script in [
        "\"$0\" get f --as /dev/fd/1",
        "\"$0\" get f --as /proc/self/fd/1",
        "\"$0\" get f --as /dev/fd/1 > to && cat to",
        "\"$0\" get f --as /dev/fd/3 3> to > /dev/null && cat to",
        "\"$0\" get f --as - | cat",
    ] {
        let out = shell(script);
        assert!(out.status.success(), "{script}: {out:?}");
        assert!(out.stdout == content, "{script}: nothing but the file");
    }
    // Who has enough is no failure; where nothing is staged, no room is needed for it.
    let out = shell("TMPDIR=/nowhere \"$0\" get f --as - | head -c 5");
    assert!(out.stdout == content[..5] && !String::from_utf8_lossy(&out.stderr).contains("error"));
    let out = shell("\"$0\" get f --as /dev/full; echo $?");
    assert_eq!(out.stdout, b"3\n", "{out:?}");
    let fifo = dir.path().join("fifo");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo")
            .success()
    );
    let reader = std::thread::spawn(move || fs::read(fifo).expect("read"));
    assert_eq!(
        server
            .client(dir.path(), &["get", "f", "--as", "fifo"])
            .code,
        0
    );
    assert!(reader.join().expect("read") == content);
    // A directory has no bytes, and nothing is made of what is not there.
    write(&server.uploads().join("d/x"), b"x");
    let out = server.client(dir.path(), &["get", "d", "--as", "-"]);
    assert_eq!((out.code, &*out.stdout), (2, ""), "{out:?}");
    let out = server.client(dir.path(), &["get", "f", "--as", "no/such/x"]);
    assert_eq!(out.code, 3, "{out:?}");
    assert!(!dir.path().join("no").exists());
    assert!(!dir.path().join(".udpack").exists());
    // A directory is made where one is named, and none above it.
    let out = server.client(dir.path(), &["get", "f", "--as", "no/such/"]);
    assert_eq!(out.code, 3, "{out:?}");
    assert!(!dir.path().join("no").exists());
    let out = server.client(dir.path(), &["get", "f", "--as", "new/"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert!(dir.path().join("new/f").exists());
}

#[test]
fn modes_travel_as_cp_takes_them() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    for (name, mode) in [
        ("t/run", 0o775),
        ("t/text", 0o664),
        ("t/own", 0o600),
        ("t/open/dir/x", 0o600),
        ("t/closed/dir/x", 0o600),
    ] {
        write(&dir.path().join(name), name.as_bytes());
        age(&dir.path().join(name), mode, 1_000_000_000, 0);
    }
    fs::create_dir(dir.path().join("t/empty")).expect("mkdir");
    fs::create_dir(dir.path().join("t/there")).expect("mkdir");
    let dirs = [
        ("t/there", 0o777),
        ("t/open/dir", 0o755),
        ("t/open", 0o775),
        ("t/closed/dir", 0o755),
        ("t/closed", 0o700),
        ("t/empty", 0o777),
        ("t", 0o755),
    ];
    for (name, mode) in dirs {
        age(&dir.path().join(name), mode, 1_000_000_000, 0);
    }
    // One that is there keeps what it has.
    for root in [server.uploads(), dir.path().join("back")] {
        fs::create_dir_all(root.join("t/there")).expect("mkdir");
        age(&root.join("t/there"), 0o701, 1, 0);
        age(&root.join("t"), 0o711, 1, 0);
    }
    let masked = |command: &mut std::process::Command, args: &str| {
        let bin = command.get_program().to_owned();
        let mut shell = std::process::Command::new("sh");
        let script = format!("umask 027; exec \"$0\" {args}");
        shell
            .current_dir(dir.path())
            .env("UDPACK_URL", server.url());
        exited(shell.arg("-c").arg(script).arg(bin)).code
    };
    assert_eq!(masked(&mut client(dir.path()), "put t"), 0);
    assert_eq!(masked(&mut client(dir.path()), "get t --as back/"), 0);
    for root in [server.uploads().join("t"), dir.path().join("back/t")] {
        let mode = |name: &str| fs::metadata(root.join(name)).expect(name).mode() & 0o777;
        assert_eq!(
            (mode("run"), mode("text"), mode("own")),
            (0o750, 0o640, 0o600)
        );
        let modes = ["open", "open/dir", "closed", "closed/dir", "empty"].map(mode);
        assert_eq!(modes, [0o750, 0o750, 0o700, 0o750, 0o750]);
        assert_eq!((mode("there"), mode(".")), (0o701, 0o711));
        let time = fs::metadata(root.join("run")).expect("run").mtime();
        assert_ne!(time, 1_000_000_000, "times are kept with -p");
    }
    let mode_at =
        |path: std::path::PathBuf| fs::metadata(path).expect("it is there").mode() & 0o777;
    // What only the name asks for is made as any directory is.
    for (args, made) in [
        ("put t/text --as new/er/x", "new/er"),
        ("put - --as std/in < t/text", "std"),
    ] {
        assert_eq!(masked(&mut client(dir.path()), args), 0, "{args}");
        assert_eq!(mode_at(server.uploads().join(made)), 0o750, "{args}");
    }
}

/// The year 2500, which ext4 cannot hold.
const FAR: u64 = 16_725_225_600;

/// The time of a new file in this directory that was to have that of the year 2500.
fn far_in(dir: &Path) -> i64 {
    let probe = dir.join("probe");
    write(&probe, b"");
    age(&probe, 0o600, FAR, 0);
    fs::metadata(&probe).expect("a file").mtime()
}

#[test]
fn times_that_a_file_system_cannot_hold_are_told() {
    let near = workdir();
    let cut = far_in(near.path());
    let Some(wide) = tempfile::tempdir_in("/dev/shm")
        .ok()
        .filter(|dir| cut != FAR.cast_signed() && far_in(dir.path()) == FAR.cast_signed())
    else {
        return skipped("it takes a file system that holds the year 2500 and one that does not");
    };
    let file = wide.path().join("far");
    write(&file, b"1");
    age(&file, 0o600, FAR, 0);
    write(&wide.path().join("today"), b"2");
    age(&wide.path().join("today"), 0o600, 1_700_000_000, 5);
    let narrow = Server::start_in(workdir(), &["--allow-read"]);
    let told = |stderr: &str| {
        let lines = stderr.lines();
        let warnings = lines.filter(|line| line.starts_with("warning: "));
        Vec::from_iter(warnings.map(str::to_owned))
    };
    let put = narrow.client(wide.path(), &["put", "-p", "far", "today"]);
    assert_eq!(put.code, 0, "{put:?}");
    let warnings = told(&put.stderr);
    assert_eq!(warnings.len(), 1, "{put:?}");
    let parts = [
        "warning: far:",
        "2500-01-01T00:00:00Z",
        "2446-05-10T22:38:55Z",
    ];
    for part in parts {
        assert!(warnings[0].contains(part), "{warnings:?}");
    }
    let put = narrow.client(wide.path(), &["put", "-p", "--json", "--as", "b", "far"]);
    let events = events(&put.stdout);
    let time = named(&events, "time");
    assert_eq!(time.len(), 1, "{put:?}");
    assert_eq!(
        (&time[0]["path"], &time[0]["asked"], &time[0]["got"]),
        (
            &"b".into(),
            &"2500-01-01T00:00:00Z".into(),
            &"2446-05-10T22:38:55Z".into()
        )
    );
    // Without -p nobody asked for a time.
    let put = narrow.client(wide.path(), &["put", "--as", "c", "far"]);
    assert_eq!((put.code, told(&put.stderr).len()), (0, 0), "{put:?}");
    narrow.stop();

    // The other way: the server holds it, and this side does not.
    fs::create_dir(wide.path().join("d")).expect("mkdir");
    age(&wide.path().join("d"), 0o700, FAR, 0);
    let roomy = Server::start_in(
        tempfile::tempdir_in("/dev/shm").expect("a directory"),
        &["--allow-read"],
    );
    let put = roomy.client(wide.path(), &["put", "-p", "far", "d"]);
    assert_eq!((put.code, told(&put.stderr).len()), (0, 0), "{put:?}");
    let get = roomy.client(near.path(), &["get", "-p", "far", "d"]);
    assert_eq!(get.code, 0, "{get:?}");
    let mut warnings = told(&get.stderr);
    warnings.sort();
    assert_eq!(warnings.len(), 2, "{get:?}");
    assert!(warnings[0].starts_with("warning: d:"), "{warnings:?}");
    assert!(warnings[1].starts_with("warning: far:"), "{warnings:?}");
    roomy.stop();
}

#[test]
fn files_of_any_size_are_taken_by_default() {
    // The quota is asked after the limit of a file's size, and no gigabyte travels.
    let server = Server::start_in(workdir(), &["--quota", "1M"]);
    let dir = workdir();
    let big = File::create(dir.path().join("big")).expect("create");
    big.set_len((1 << 30) + 1).expect("a sparse file");
    let out = server.client(dir.path(), &["put", "big", "-q"]);
    assert_eq!(out.code, 6, "{out:?}");
    assert!(out.stderr.contains("1.0 MiB of 1.0 MiB left"), "{out:?}");
    // Where there is a limit, it is what refuses.
    let server = Server::start_in(workdir(), &["--quota", "1M", "--max-file", "1G"]);
    let out = server.client(dir.path(), &["put", "big", "-q"]);
    assert_eq!(out.code, 6, "{out:?}");
    assert!(!out.stderr.contains("left"), "{out:?}");
}

#[test]
fn links_that_lead_out_through_others_are_not_stored() {
    let server = Server::start();
    let dir = workdir();
    write(&dir.path().join("secret.txt"), b"outside");
    fs::create_dir_all(dir.path().join("t/a/b")).expect("mkdir");
    symlink("../..", dir.path().join("t/a/b/up")).expect("symlink");
    symlink("a/b/up/../secret.txt", dir.path().join("t/leak")).expect("symlink");
    let out = server.client(dir.path(), &["put", "t/", "--links"]);
    assert_eq!(out.code, 10, "{out:?}");
    assert_eq!(names(&server.uploads()), ["a", "a/b", "a/b/up"]);
}

#[test]
fn what_cannot_be_fetched_is_told() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    write(&server.uploads().join("d/file"), b"x");
    let fifo = server.uploads().join("d/fifo");
    let made = std::process::Command::new("mkfifo")
        .arg(&fifo)
        .status()
        .expect("mkfifo");
    assert!(made.success());
    let out = server.client(dir.path(), &["ls", "-R", "d"]);
    assert_eq!((out.code, &*out.stdout), (0, "d/fifo\nd/file\n"));
    let out = server.client(dir.path(), &["get", "d"]);
    assert_eq!(out.code, 10, "{out:?}");
    assert!(out.stderr.contains("d/fifo"), "{out:?}");
    assert_eq!(names(&dir.path().join("d")), ["file"]);
}

#[test]
fn verify_tells_what_differs_and_what_is_missing() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    for name in ["t/same", "t/changed", "t/sub/gone"] {
        write(&dir.path().join(name), name.as_bytes());
    }
    assert_eq!(server.client(dir.path(), &["put", "t"]).code, 0);
    assert_eq!(server.client(dir.path(), &["verify", "t"]).code, 0);
    write(&server.uploads().join("t/changed"), b"t/CHANGED");
    fs::remove_file(server.uploads().join("t/sub/gone")).expect("rm");
    fs::create_dir(dir.path().join("t/new dir")).expect("mkdir");
    let out = server.client(dir.path(), &["verify", "t"]);
    assert_eq!(out.code, 7, "{out:?}");
    let mut lines: Vec<&str> = out.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "differs  t/changed",
            "missing  t/new dir",
            "missing  t/sub/gone"
        ]
    );
    assert_error(&out.stderr);
    let out = server.client(dir.path(), &["verify", "--json", "t"]);
    assert_eq!(out.code, 7);
    let lines = events(&out.stdout);
    let of = |status: &str| {
        named(&lines, "file")
            .iter()
            .filter(|line| line["status"] == status)
            .count()
    };
    assert_eq!((of("differs"), of("missing")), (1, 2), "{}", out.stdout);
    assert_eq!(result(&out.stdout)["error_kind"], "integrity");
    // One by one, and under another name.
    assert_eq!(
        server
            .client(dir.path(), &["verify", "t/same", "--as", "t/"])
            .code,
        0
    );
    assert_eq!(
        server
            .client(dir.path(), &["verify", "t/same", "--as", "t/changed"])
            .code,
        7
    );
    assert_eq!(server.client(dir.path(), &["verify", "missing"]).code, 3);
}

#[test]
fn names_follow_slashes_and_as() {
    let dir = workdir();
    write(&dir.path().join("src/a"), b"a");
    write(&dir.path().join("src/sub/b"), b"b");
    write(&dir.path().join("one"), b"1");
    for (args, expected) in [
        (
            &["put", "src"][..],
            &["src", "src/a", "src/sub", "src/sub/b"][..],
        ),
        (&["put", "src/"], &["a", "sub", "sub/b"]),
        (&["put", "src/."], &["a", "sub", "sub/b"]),
        (
            &["put", "src", "--as", "dst"],
            &["dst", "dst/a", "dst/sub", "dst/sub/b"],
        ),
        (
            &["put", "src", "--as", "x/"],
            &["x", "x/src", "x/src/a", "x/src/sub", "x/src/sub/b"],
        ),
        (
            &["put", "src/", "--as", "x/"],
            &["x", "x/a", "x/sub", "x/sub/b"],
        ),
        (
            &["put", "one", "src/sub", "--as", "x/"],
            &["x", "x/one", "x/sub", "x/sub/b"],
        ),
        (&["put", "one", "--as", "x/y"], &["x", "x/y"]),
    ] {
        let server = Server::start();
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
        assert_eq!(names(&server.uploads()), expected, "{args:?}");
    }
    let server = Server::start();
    let out = server.client(&dir.path().join("src"), &["put", "."]);
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(names(&server.uploads()), ["a", "sub", "sub/b"]);
}

#[test]
fn names_of_downloads_follow_slashes_and_as() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    write(&dir.path().join("src/a"), b"a");
    write(&dir.path().join("src/sub/b"), b"b");
    fs::create_dir(dir.path().join("src/empty")).expect("mkdir");
    assert_eq!(server.client(dir.path(), &["put", "src"]).code, 0);
    for (args, expected) in [
        (
            &["get", "src"][..],
            &["src", "src/a", "src/empty", "src/sub", "src/sub/b"][..],
        ),
        (&["get", "src/"], &["a", "empty", "sub", "sub/b"]),
        (
            &["get", "/"],
            &["src", "src/a", "src/empty", "src/sub", "src/sub/b"],
        ),
        (&["get", "src/sub"], &["sub", "sub/b"]),
        (&["get", "src/a"], &["a"]),
        (&["get", "src/a", "--as", "c"], &["c"]),
        (
            &["get", "src/a", "src/sub/b", "--as", "d/"],
            &["d", "d/a", "d/b"],
        ),
        (&["get", "src/sub", "--as", "e"], &["e", "e/b"]),
        (
            &["get", "src", "--exclude", "b", "--exclude", "empty/"],
            &["src", "src/a", "src/sub"],
        ),
    ] {
        let to = workdir();
        let out = server.client(to.path(), args);
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
        assert_eq!(names(to.path()), expected, "{args:?}");
        assert!(!to.path().join(".udpack").exists(), "{args:?}");
    }
    let to = workdir();
    for (args, code) in [
        (&["get", "nothing"][..], 12),
        (&["get", "src/a/"], 6),
        (&["get", "../src"], 6),
        (&["get", "src/a", "src/a"], 2),
        (&["get", "src", "src/a", "--as", "name"], 2),
        (&["get"], 2),
    ] {
        let out = server.client(to.path(), args);
        assert_eq!(out.code, code, "{args:?}: {out:?}");
        if code != 2 {
            assert_error(&out.stderr);
        }
    }
    assert_eq!(names(to.path()), Vec::<String>::new());
    // Some of several.
    let out = server.client(to.path(), &["get", "--json", "src/a", "nothing"]);
    assert_eq!(out.code, 10, "{out:?}");
    assert_eq!(result(&out.stdout)["failed"], 1);
}

#[test]
fn downloads_replace_nothing_unless_asked() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    let content = bytes(2_000_000, 1);
    write(&dir.path().join("file"), &content);
    assert_eq!(server.client(dir.path(), &["put", "file"]).code, 0);
    write(&dir.path().join("file"), b"mine");
    for (args, code, file) in [
        (&["get", "file"][..], 6, &b"mine"[..]),
        (&["get", "file", "--if-exists", "error"], 6, b"mine"),
        (&["get", "file", "--if-exists", "skip"], 0, b"mine"),
        (&["get", "file", "--if-exists", "rename"], 0, b"mine"),
        (&["get", "file", "--if-exists", "overwrite"], 0, &content),
        (&["get", "file"], 0, &content),
    ] {
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, code, "{args:?}: {out:?}");
        assert!(
            fs::read(dir.path().join("file")).expect("a file") == file,
            "{args:?}"
        );
    }
    assert_eq!(names(dir.path()).len(), 2, "the renamed one");
}

#[test]
fn excluded_files_stay_where_they_are() {
    let dir = workdir();
    for name in [
        "t/a.o",
        "t/a.c",
        "t/build/x",
        "t/sub/build",
        "t/sub/b.o",
        "t/doc/x.html",
    ] {
        write(&dir.path().join(name), b"x");
    }
    let server = Server::start();
    let out = server.client(
        dir.path(),
        &[
            "put",
            "t",
            "--exclude",
            "*.o",
            "--exclude",
            "build/",
            "--exclude",
            "/doc/*.html",
        ],
    );
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(
        names(&server.uploads()),
        ["t", "t/a.c", "t/doc", "t/sub", "t/sub/build"]
    );
    let out = server.client(
        dir.path(),
        &["put", "t/a.o", "t/a.c", "--as", "x/", "--exclude", "*.o"],
    );
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(names(&server.uploads().join("x")), ["a.c"]);
    let out = server.client(dir.path(), &["put", "t", "--exclude", "[a"]);
    assert_eq!(out.code, 2, "{out:?}");
}

#[test]
fn lists_and_standard_input() {
    let server = Server::start();
    let dir = workdir();
    for name in ["a/b/one", "a/two", "three", "d/four"] {
        write(&dir.path().join(name), name.as_bytes());
    }
    write(&dir.path().join("list"), b"a/b/one\n./three\n\nd");
    let out = server.client(dir.path(), &["put", "--files-from", "list"]);
    assert_eq!(out.code, 0, "{out:?}");
    let expected = ["a", "a/b", "a/b/one", "d", "d/four", "three"];
    assert_eq!(names(&server.uploads()), expected);

    let with_input = |args: &[&str], input: &[u8]| {
        let mut command = client(dir.path());
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
    };
    let out = with_input(
        &["put", "--files-from", "-", "--as", "x/"],
        b"a/two\nthree\n",
    );
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(names(&server.uploads().join("x")), ["a", "a/two", "three"]);

    let content = bytes(3_000_001, 5);
    let out = with_input(&["put", "-", "--as", "piped"], &content);
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(
        out.stdout,
        format!("piped  3000001  {}\n", blake3::hash(&content))
    );
    assert!(fs::read(server.uploads().join("piped")).expect("stored") == content);

    for args in [
        &["put", "-"][..],
        &["put", "-", "--as", "x/"],
        &["put", "-", "--files-from", "-", "--as", "x"],
        &["put", "--files-from", "list", "--as", "x"],
        &["verify", "-"],
    ] {
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, 2, "{args:?}: {out:?}");
    }
    let out = server.client(dir.path(), &["put", "--files-from", "missing"]);
    assert_eq!(out.code, 3, "{out:?}");
    write(
        &dir.path().join("list"),
        b"three\n/etc/hostname\nmissing\n../up\n",
    );
    let out = server.client(dir.path(), &["put", "--files-from", "list", "--json"]);
    assert_eq!(out.code, 10, "{out:?}");
    assert_eq!(result(&out.stdout)["failed"], 3);
}

#[test]
fn links_are_followed_or_kept() {
    let dir = workdir();
    write(&dir.path().join("t/file"), b"x");
    symlink("file", dir.path().join("t/link")).expect("symlink");
    let server = Server::start_in(workdir(), &["--allow-read"]);
    assert_eq!(server.client(dir.path(), &["put", "t"]).code, 0);
    let stored = server.uploads().join("t/link");
    assert!(fs::symlink_metadata(&stored).expect("metadata").is_file());
    assert_eq!(
        server
            .client(dir.path(), &["put", "t", "--links", "--as", "kept"])
            .code,
        0
    );
    let stored = server.uploads().join("kept/link");
    assert_eq!(fs::read_link(&stored).expect("a link"), Path::new("file"));
    assert_eq!(
        server
            .client(dir.path(), &["verify", "t", "--links", "--as", "kept"])
            .code,
        0
    );
    assert_eq!(server.client(dir.path(), &["get", "kept"]).code, 0);
    let back = dir.path().join("kept/link");
    assert_eq!(fs::read_link(&back).expect("a link"), Path::new("file"));
    // One that leads out, and a circle.
    symlink("/etc", dir.path().join("t/out")).expect("symlink");
    let out = server.client(dir.path(), &["put", "t", "--links", "--as", "kept"]);
    assert_eq!(out.code, 10, "{out:?}");
    assert!(!server.uploads().join("kept/out").exists());
    fs::remove_file(dir.path().join("t/out")).expect("rm");
    symlink(".", dir.path().join("t/circle")).expect("symlink");
    let out = server.client(dir.path(), &["put", "t", "--as", "again"]);
    assert_eq!(out.code, 10, "{out:?}");
    assert_eq!(names(&server.uploads().join("again")), ["file", "link"]);
}

#[test]
fn one_bad_file_does_not_stop_the_others() {
    let server = Server::start_in(workdir(), &["--names", "portable"]);
    let dir = workdir();
    for name in ["t/good", "t/.hidden", "t/e\u{301}", "t/sub/good"] {
        write(&dir.path().join(name), b"x");
    }
    let out = server.client(dir.path(), &["put", "t", "--json"]);
    assert_eq!(out.code, 10, "{out:?}");
    let result = result(&out.stdout);
    assert_eq!(
        (&result["status"], &result["files"], &result["failed"]),
        (&"partial".into(), &2.into(), &2.into())
    );
    let lines = events(&out.stdout);
    assert!(
        named(&lines, "file")
            .iter()
            .all(|line| line["status"] == "ok" || line["error_kind"] == "policy")
    );
    assert_eq!(
        names(&server.uploads()),
        ["t", "t/good", "t/sub", "t/sub/good"]
    );
    // Nothing but a bad one: its own code, told once.
    let out = server.client(
        dir.path(),
        &[
            "put",
            "t",
            "--exclude",
            "good",
            "--exclude",
            "sub",
            "--exclude",
            ".*",
        ],
    );
    assert_eq!(out.code, 6, "{out:?}");
    assert_error(&out.stderr);
}

#[test]
fn ls_stat_and_rm() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    write(&dir.path().join("t/a b"), b"12345");
    write(&dir.path().join("t/sub/c"), b"");
    age(&dir.path().join("t/a b"), 0o640, 1_700_000_000, 0);
    assert_eq!(server.client(dir.path(), &["put", "-p", "t"]).code, 0);
    let ls = |args: &[&str]| {
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, 0, "{args:?} {out:?}");
        out.stdout
    };
    assert_eq!(ls(&["ls"]), "t/\n");
    assert_eq!(ls(&["ls", "t/"]), "t/a b\nt/sub/\n");
    assert_eq!(ls(&["ls", "-R"]), "t/\nt/a b\nt/sub/\nt/sub/c\n");
    assert_eq!(
        ls(&["ls", "-l", "t/a b"]),
        "-rw-r-----             5  2023-11-14T22:13:20Z  t/a b\n"
    );
    let line: Value = serde_json::from_str(
        ls(&["ls", "--json", "t/a b"])
            .lines()
            .next()
            .expect("a line"),
    )
    .expect("json");
    assert_eq!(
        (&line["path"], &line["size"], &line["mode"]),
        (&"t/a b".into(), &5.into(), &0o640.into())
    );
    assert_eq!(
        ls(&["stat", "t/a b"]),
        "path t/a b\nkind file\nsize 5\nmodified 2023-11-14T22:13:20Z\nmode 0640\n"
    );
    let out = server.client(dir.path(), &["stat", "t", "missing", "--json"]);
    assert_eq!(out.code, 10, "{out:?}");
    let told = events(&out.stdout);
    let kinds: Vec<_> = told.iter().map(|line| line["event"].clone()).collect();
    assert_eq!(kinds, ["entry", "error", "result"]);
    assert_eq!(
        (&told[1]["path"], &told[1]["error_kind"]),
        (&"missing".into(), &"not_found".into())
    );
    assert_eq!(
        (&told[2]["exit"], &told[2]["count"]),
        (&10.into(), &1.into())
    );
    assert_eq!(server.client(dir.path(), &["stat", "missing"]).code, 12);
    for args in [
        &["ls", "missing"][..],
        &["stat", "missing"],
        &["rm", "t/a b"],
        &["jobs", "--cancel", "7"],
    ] {
        let out = server.client(dir.path(), &[args, &["--json"]].concat());
        let told = result(&out.stdout);
        assert_eq!(told["exit"], out.code, "{args:?}: {out:?}");
        assert_ne!(out.code, 0, "{args:?}");
        assert!(told["error"].is_string(), "{args:?}: {out:?}");
        let without = ["--to", "127.0.0.1:9", "--connect-timeout", "0.2", "--json"];
        let out = server.client(dir.path(), &[args, &without].concat());
        assert_eq!(
            out.code,
            result(&out.stdout)["exit"],
            "no server: {args:?}: {out:?}"
        );
    }
    assert_eq!(server.client(dir.path(), &["ls", "missing"]).code, 12);

    // The owner's token says nothing of rights: removing takes one that does.
    let out = server.client(dir.path(), &["rm", "t/a b"]);
    assert_eq!(out.code, 6, "{out:?}");
    assert_error(&out.stderr);
    let url = server.new_token(&["cleaner", "--scope", "read,delete"]);
    let rm = |args: &[&str]| exited(client(dir.path()).env("UDPACK_URL", &url).args(args));
    let out = rm(&["rm", "t/a b"]);
    assert_eq!(
        (out.code, &*out.stdout),
        (0, "removed t/a b  1  5\n"),
        "{out:?}"
    );
    assert_eq!(rm(&["rm", "t"]).code, 6, "not empty");
    assert_eq!(rm(&["rm", "missing"]).code, 12);
    assert_eq!(rm(&["rm", "/"]).code, 2);
    assert_eq!(rm(&["rm", "-r", "t"]).code, 0);
    assert_eq!(names(&server.uploads()), Vec::<String>::new());
}

#[test]
fn tokens_allow_what_their_scope_says() {
    let server = Server::start();
    let dir = workdir();
    write(&dir.path().join("file"), b"content");
    let at =
        |url: &str, args: &[&str]| exited(client(dir.path()).env("UDPACK_URL", url).args(args));
    let reader = server.new_token(&["reader", "--scope", "read"]);
    let writer = server.new_token(&["writer", "--scope", "write", "--quota", "10"]);
    let boxed = server.new_token(&[
        "boxed",
        "--scope",
        "read,write,delete",
        "--prefix",
        "teams/red",
    ]);
    let out = at(&reader, &["put", "file"]);
    assert_eq!(out.code, 6, "{out:?}");
    assert_error(&out.stderr);
    assert_eq!(at(&writer, &["put", "file"]).code, 0);
    assert_eq!(at(&writer, &["get", "file", "--as", "x"]).code, 6);
    assert_eq!(at(&writer, &["ls"]).code, 6);
    assert_eq!(at(&writer, &["verify", "file"]).code, 6);
    assert_eq!(
        at(&writer, &["put", "file", "--as", "second"]).code,
        6,
        "its quota"
    );
    assert_eq!(at(&reader, &["get", "file", "--as", "x"]).code, 0);
    assert_eq!(at(&reader, &["rm", "file"]).code, 6);
    // Its directory is the root for a confined one.
    assert_eq!(at(&boxed, &["put", "file"]).code, 0);
    assert_eq!(
        fs::read(server.uploads().join("teams/red/file")).expect("stored"),
        b"content"
    );
    assert_eq!(at(&boxed, &["ls", "-R"]).stdout, "file\n");
    assert_eq!(at(&boxed, &["stat", "../file"]).code, 6);
    assert_eq!(at(&boxed, &["rm", "file"]).code, 0);
    assert!(server.uploads().join("file").exists());
    // What every token allows that says nothing of it.
    assert_eq!(server.client(dir.path(), &["put", "file"]).code, 0);
    assert_eq!(server.client(dir.path(), &["ls"]).code, 6);
    server.still_works();
}

#[test]
fn a_read_only_server_takes_nothing_from_anybody() {
    let server = Server::start_in(workdir(), &["--read-only"]);
    let dir = workdir();
    write(&dir.path().join("file"), b"content");
    write(&server.uploads().join("there"), b"there");
    let all = server.new_token(&["all", "--scope", "read,write,delete"]);
    for url in [server.url(), all] {
        let at = |args: &[&str]| exited(client(dir.path()).env("UDPACK_URL", &url).args(args));
        assert_eq!(at(&["put", "file"]).code, 6);
        assert_eq!(at(&["rm", "there"]).code, 6);
        assert_eq!(at(&["get", "there"]).code, 0);
    }
    assert_eq!(names(&server.uploads()), ["there"]);
    let out = exited(common::server(dir.path()).args(["--read-only", "--allow-read"]));
    assert_eq!(out.code, 2, "{out:?}");
}

#[test]
fn tokens_are_made_listed_and_withdrawn_while_the_server_runs() {
    let server_one = Server::start();
    let dir = server_one.dir.path();
    let token = |args: &[&str]| exited(server(dir).arg("token").args(args));
    let url = server_one.new_token(&[
        "bob", "--scope", "read", "--scope", "write", "--prefix", "b/", "--quota", "1G",
    ]);
    let listed = token(&["list"]);
    assert_eq!(listed.code, 0, "{listed:?}");
    let line = listed.stdout.lines().find(|line| line.starts_with("bob"));
    assert_eq!(line, Some("bob  scope=read,write  prefix=b  quota=1.0GiB"));
    let secret = url.split(['/', '@']).nth(2).expect("a token");
    assert!(!listed.stdout.contains(secret), "lists show no secrets");
    let json = token(&["list", "--json"]);
    let lines = events(&json.stdout);
    assert_eq!(lines.len(), 2);
    assert!(
        lines
            .iter()
            .any(|line| line["name"] == "bob" && line["prefix"] == "b")
    );
    let ping = || {
        exited(
            client(dir)
                .env("UDPACK_URL", &url)
                .args(["ping", "-c", "1"]),
        )
        .code
    };
    until("the new token lets in", || ping() == 0);
    let mut listener =
        Running::spawn(
            client(dir)
                .env("UDPACK_URL", &url)
                .args(["listen", "--retries", "0"]),
        );
    listener.told("listening on ");
    // Before each socket looks for itself, every 30 s.
    let soon = Instant::now() + Duration::from_secs(20);
    let revoked = token(&["revoke", "bob"]);
    assert_eq!((revoked.code, &*revoked.stdout), (0, "revoked bob\n"));
    let out = listener.exited();
    assert_eq!(out.code, 4, "{out:?}");
    assert!(Instant::now() < soon, "who is connected is cut off, too");
    until("it does no more", || ping() == 4);
    for (args, code) in [
        (&["revoke", "bob"][..], 2),
        (&["new", "with space"], 2),
        (&["new", "x", "--prefix", "../up"], 2),
        (&["new", "x", "--scope", "everything"], 2),
        (&["new", "x", "--expires", "soon"], 2),
        (&["new", "x", "--expires", "2020-01-31"], 2),
        (&["list", "--token-file", "missing"], 3),
    ] {
        let out = token(args);
        assert_eq!(out.code, code, "{args:?}: {out:?}");
        assert_ne!(out.stderr, "");
    }
    let guest = token(&["new", "guest", "--expires", "2999-01-31"]);
    assert_eq!(guest.code, 0, "{guest:?}");
    let listed = token(&["list"]).stdout;
    let ends = "guest  expires=2999-01-31T00:00:00Z";
    assert!(listed.lines().any(|line| line == ends), "{listed}");
    assert_eq!(token(&["new", "twice"]).code, 0);
    assert_eq!(token(&["new", "twice"]).code, 2);
    let unnamed = token(&["new", "--json"]);
    let line: Value = serde_json::from_str(&unnamed.stdout).expect("json");
    assert!(
        line["name"]
            .as_str()
            .is_some_and(|name| name.starts_with("t-"))
    );
    server_one.still_works();
    // Before the first start: the owner's token is made, too.
    let fresh = workdir();
    let out = exited(server(fresh.path()).args(["token", "new", "first"]));
    assert_eq!(out.code, 0, "{out:?}");
    Server::start_in(fresh, &[]).still_works();
}

/// A hook that writes down what it is told.
fn hook(dir: &Path, text: &str) -> String {
    let path = dir.join("hook.sh");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    path.display().to_string()
}

#[test]
fn a_hook_refuses_renames_and_is_told() {
    let dir = workdir();
    let log = dir.path().join("log");
    let path = hook(
        dir.path(),
        &format!(
            "case \"$1:$UDPACK_PATH\" in
                accept:bad*) echo 'no bad files' >&2; exit 1;;
                accept:old*) echo \"new/${{UDPACK_PATH#old}}\";;
                done:*) echo \"$UDPACK_PATH|$UDPACK_SIZE|$UDPACK_PEER|$UDPACK_FILE|$UDPACK_HASH\" >> '{}';;
            esac",
            log.display()
        ),
    );
    let server = Server::start_in(workdir(), &["--hook", &path]);
    for name in ["bad file", "oldname", "plain $(x) 'q'"] {
        write(&dir.path().join(name), name.as_bytes());
    }
    let out = server.client(dir.path(), &["put", "bad file"]);
    assert_eq!(out.code, 6, "{out:?}");
    assert!(out.stderr.contains("no bad files"), "{out:?}");
    assert_error(&out.stderr);
    let out = server.client(dir.path(), &["put", "oldname"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert!(out.stdout.starts_with("new/name  7  "), "{out:?}");
    let out = server.client(dir.path(), &["put", "plain $(x) 'q'"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(
        names(&server.uploads()),
        ["new", "new/name", "plain $(x) 'q'"]
    );
    until("both were told", || {
        fs::read_to_string(&log).is_ok_and(|text| text.lines().count() == 2)
    });
    let text = fs::read_to_string(&log).expect("a log");
    let line = text
        .lines()
        .find(|line| line.starts_with("plain"))
        .expect("the plain one");
    let fields: Vec<&str> = line.split('|').collect();
    assert_eq!(fields[..2], ["plain $(x) 'q'", "14"]);
    assert!(fs::read(fields[3]).expect("the stored file") == b"plain $(x) 'q'");
    assert_eq!(fields[4], blake3::hash(b"plain $(x) 'q'").to_string());
    let out = exited(common::server(dir.path()).args([
        "--hook",
        "/nonexistent",
        "--listen",
        "127.0.0.1:0",
    ]));
    assert_eq!(out.code, 3, "{out:?}");
    assert_error(&out.stderr);
}

#[test]
fn a_hook_that_does_not_answer_in_its_time_refuses() {
    let dir = workdir();
    let path = hook(dir.path(), "exec sleep 1000");
    let server = Server::start_in(workdir(), &["--hook", &path, "--hook-timeout", "1s"]);
    write(&dir.path().join("file"), b"content");
    let out = server.client(dir.path(), &["put", "file"]);
    assert_eq!(out.code, 6, "{out:?}");
    assert!(out.stderr.contains("hook"), "{out:?}");
    assert_eq!(names(&server.uploads()), Vec::<String>::new());
}

#[test]
fn a_bandwidth_limit_is_kept() {
    let server = Server::start_in(workdir(), &["--allow-read", "--bwlimit", "none:1M"]);
    let dir = workdir();
    write(&dir.path().join("file"), &bytes(1 << 20, 3));
    let began = Instant::now();
    let out = server.client(dir.path(), &["put", "file", "--bwlimit", "500K:none"]);
    assert_eq!(out.code, 0, "{out:?}");
    // A burst of an eighth of a second goes first.
    assert!(
        began.elapsed() > Duration::from_millis(1500),
        "{:?}",
        began.elapsed()
    );
    let began = Instant::now();
    let out = server.client(dir.path(), &["get", "file", "--as", "back"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert!(
        began.elapsed() > Duration::from_millis(500),
        "{:?}",
        began.elapsed()
    );
    let out = server.client(dir.path(), &["put", "file", "--bwlimit", "fast"]);
    assert_eq!(out.code, 2, "{out:?}");
}

/// An upload that goes slowly, until so many bytes are acknowledged.
fn slow_upload(server: &Server, dir: &Path, rate: &str, until_bytes: u64) -> Running {
    let mut running = Running::spawn(client(dir).env("UDPACK_URL", server.url()).args([
        "put",
        "--json",
        "--bwlimit",
        rate,
        "file",
    ]));
    until("bytes are acknowledged", || {
        let line: Value = serde_json::from_str(&running.line()).expect("json");
        line["event"] == "progress"
            && line["bytes"]
                .as_u64()
                .is_some_and(|bytes| bytes > until_bytes)
    });
    running
}

#[test]
fn a_killed_client_goes_on_where_it_was() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    let size: u64 = 40 << 20;
    let content = bytes(40 << 20, 4);
    write(&dir.path().join("file"), &content);
    let mut running = slow_upload(&server, dir.path(), "8M", 24 << 20);
    running.signal("KILL");
    running.exited();
    // Its lane ends when the server notices; a later run takes over meanwhile.
    let out = server.client(dir.path(), &["put", "--json", "file"]);
    assert_eq!(out.code, 0, "{out:?}");
    let lines = events(&out.stdout);
    assert_eq!(named(&lines, "resumed").len(), 1, "{}", out.stdout);
    assert!(out.stderr.contains("resumed from "), "{out:?}");
    let sent = result(&out.stdout)["sent"].as_u64().expect("bytes");
    // Of 24 MiB, those of the last second or two at 8 MiB/s may be lost.
    assert!(sent <= size - (6 << 20), "{sent} of {size}");
    assert!(fs::read(server.uploads().join("file")).expect("stored") == content);
    assert_eq!(staged(&server.uploads()), 0);
}

#[test]
fn a_killed_download_goes_on_where_it_was() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let size: u64 = 40 << 20;
    let content = bytes(40 << 20, 9);
    write(&server.uploads().join("dir/file"), &content);
    let dir = workdir();
    let mut running = Running::spawn(client(dir.path()).env("UDPACK_URL", server.url()).args([
        "get",
        "--json",
        "--bwlimit",
        "none:8M",
        "dir",
    ]));
    until("bytes arrive", || {
        let line: Value = serde_json::from_str(&running.line()).expect("json");
        line["event"] == "progress" && line["bytes"].as_u64().is_some_and(|now| now > 24 << 20)
    });
    running.signal("KILL");
    running.exited();
    assert_eq!(
        names(&dir.path().join("dir")),
        Vec::<String>::new(),
        "nothing is visible"
    );
    let out = server.client(dir.path(), &["get", "--json", "dir"]);
    assert_eq!(out.code, 0, "{out:?}");
    let sent = result(&out.stdout)["sent"].as_u64().expect("bytes");
    assert!(sent <= size - (6 << 20), "{sent} of {size}");
    assert_eq!(
        named(&events(&out.stdout), "resumed").len(),
        1,
        "{}",
        out.stdout
    );
    assert!(fs::read(dir.path().join("dir/file")).expect("a file") == content);
    assert_eq!(names(dir.path()), ["dir", "dir/file"]);
    assert!(!dir.path().join(".udpack").exists());
}

#[test]
fn an_interrupted_download_says_where_its_part_is_kept() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    write(&server.uploads().join("file"), &bytes(40 << 20, 9));
    let dir = workdir();
    let interrupted = |from: u64| {
        let mut running =
            Running::spawn(client(dir.path()).env("UDPACK_URL", server.url()).args([
                "get",
                "--json",
                "--bwlimit",
                "none:8M",
                "file",
            ]));
        until("it goes on", || {
            let line: Value = serde_json::from_str(&running.line()).expect("json");
            let bytes = line["bytes"].as_u64();
            from == 0 && line["event"] == "start"
                || line["event"] == "progress" && bytes.is_some_and(|now| now > from)
        });
        running.signal("INT");
        running.exited()
    };
    let out = interrupted(16 << 20);
    assert_eq!(out.code, 130, "{out:?}");
    let told = out.stderr.lines().find(|line| line.contains("./.udpack"));
    let told = told.unwrap_or_else(|| panic!("{out:?}"));
    assert!(told.contains("to be resumed"), "{told}");
    assert!(told.ends_with("rm -r ./.udpack"), "{told}");
    let events = events(&out.stdout);
    let kept = named(&events, "kept");
    assert_eq!(
        (&kept[0]["dir"], &kept[0]["files"]),
        (&"./.udpack".into(), &1.into())
    );
    assert!(
        kept[0]["bytes"]
            .as_u64()
            .is_some_and(|bytes| bytes > 15 << 20)
    );
    assert!(dir.path().join(".udpack").exists());
    assert_eq!(names(dir.path()), Vec::<String>::new());
    // What is said works, and where nothing is kept nothing stays.
    fs::remove_dir_all(dir.path().join(".udpack")).expect("it is removed");
    write(&server.uploads().join("file"), &bytes(1000, 9));
    let out = server.client(dir.path(), &["get", "file"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert!(!out.stderr.contains(".udpack"), "{out:?}");
    assert!(!dir.path().join(".udpack").exists());
    // Small files are not kept.
    for n in 0..50 {
        write(
            &server.uploads().join(format!("many/{n}")),
            &bytes(500_000, n),
        );
    }
    let mut running = Running::spawn(client(dir.path()).env("UDPACK_URL", server.url()).args([
        "get",
        "--json",
        "--bwlimit",
        "none:1M",
        "many",
    ]));
    until("it goes on", || running.line().contains("\"progress\""));
    running.signal("INT");
    let out = running.exited();
    assert_eq!(out.code, 130, "{out:?}");
    assert!(!out.stderr.contains(".udpack"), "{out:?}");
    assert!(
        !dir.path().join(".udpack").exists(),
        "nothing is kept in it"
    );
}

#[test]
fn a_client_outlives_its_server() {
    let dir = workdir();
    let content = bytes(30 << 20, 6);
    write(&dir.path().join("file"), &content);
    let first = Server::start();
    let address = first.value("listening").to_owned();
    let mut running = slow_upload(&first, dir.path(), "8M", 16 << 20);
    // Killed in the middle, and back on the same port.
    first.running.signal("KILL");
    let second = Server::start_at(&address, first.stop(), &[]);
    let out = running.exited();
    assert_eq!(out.code, 0, "{out:?}");
    let lines = events(&out.stdout);
    assert!(!named(&lines, "reconnecting").is_empty(), "{}", out.stdout);
    assert!(
        out.stderr.contains("reconnecting (attempt 1, in "),
        "{out:?}"
    );
    assert_eq!(result(&out.stdout)["status"], "ok");
    assert!(fs::read(second.uploads().join("file")).expect("stored") == content);
    assert_eq!(staged(&second.uploads()), 0);
}

#[test]
fn without_retries_a_lost_server_is_5() {
    let dir = workdir();
    write(&dir.path().join("file"), &bytes(30 << 20, 6));
    let server = Server::start();
    let mut running = Running::spawn(client(dir.path()).env("UDPACK_URL", server.url()).args([
        "put",
        "--json",
        "--bwlimit",
        "1M",
        "--retries",
        "0",
        "file",
    ]));
    until("bytes are acknowledged", || {
        let line: Value = serde_json::from_str(&running.line()).expect("json");
        line["event"] == "progress" && line["bytes"].as_u64().is_some_and(|bytes| bytes > 0)
    });
    assert_eq!(server.terminate("TERM").0, 0);
    let out = running.exited();
    assert_eq!(out.code, 5, "{out:?}");
    assert_error(&out.stderr);
}

#[test]
fn interrupted_uploads_are_listed_and_purged() {
    let server_one = Server::start();
    let dir = workdir();
    write(&dir.path().join("file"), &bytes(40 << 20, 7));
    let uploads = |args: &[&str]| {
        let out = exited(server(server_one.dir.path()).arg("uploads").args(args));
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
        out.stdout
    };
    assert_eq!(uploads(&["list"]), "");
    let mut running = slow_upload(&server_one, dir.path(), "8M", 16 << 20);
    let line: Value = serde_json::from_str(uploads(&["list", "--json"]).trim()).expect("json");
    assert_eq!(
        (&line["path"], &line["live"]),
        (&"file".into(), &true.into()),
        "{line}"
    );
    assert_eq!(
        uploads(&["purge", "--older-than", "0s"]),
        "removed 0\n",
        "it is being written"
    );
    running.signal("INT");
    let out = running.exited();
    assert_eq!(out.code, 130, "{out:?}");
    assert_error(&out.stderr);
    until("it is put aside", || {
        uploads(&["list"]).contains("  idle  ")
    });
    let line: Value = serde_json::from_str(uploads(&["list", "--json"]).trim()).expect("json");
    assert_eq!(line["size"], 40 << 20);
    assert!(
        line["held"].as_u64().is_some_and(|held| held > 8 << 20),
        "{line}"
    );
    assert_eq!(uploads(&["purge"]), "removed 0\n", "it is not a day old");
    assert_eq!(uploads(&["purge", "--older-than", "0s"]), "removed 1\n");
    assert_eq!(uploads(&["list"]), "");
    assert_eq!(staged(&server_one.uploads()), 0);
    let out = exited(server(dir.path()).args(["uploads", "list", "--dir", "missing"]));
    assert_eq!(out.code, 3, "{out:?}");
    server_one.still_works();
}

#[test]
fn jobs_are_listed_watched_and_ended() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    write(&dir.path().join("file"), &bytes(60 << 20, 8));
    assert_eq!(server.client(dir.path(), &["jobs"]).stdout, "");
    let mut running = slow_upload(&server, dir.path(), "4M", 1 << 20);
    let admin = server.new_token(&["boss", "--scope", "admin"]);
    let jobs = |url: &str, args: &[&str]| {
        exited(
            client(dir.path())
                .env("UDPACK_URL", url)
                .arg("jobs")
                .args(args),
        )
    };
    let out = jobs(&server.url(), &["--json"]);
    assert_eq!(out.code, 0, "{out:?}");
    let told = events(&out.stdout);
    let job = &told[0];
    assert_eq!(
        (told.len(), &told[1]["event"]),
        (2, &"result".into()),
        "one job: {out:?}"
    );
    assert_eq!(
        (&job["kind"], &job["path"], &job["state"]),
        (&"put".into(), &"file".into(), &"running".into())
    );
    let id = job["id"].to_string();
    let shown = jobs(&server.url(), &[]).stdout;
    assert!(shown.contains("  put  receiving  "), "{shown}");
    let mut watching = Running::spawn(
        client(dir.path())
            .env("UDPACK_URL", &admin)
            .args(["jobs", "--watch", "--json"]),
    );
    watching.line();
    assert_eq!(jobs(&admin, &["--cancel", "999999"]).code, 12);
    let out = jobs(&admin, &["--cancel", &id, "--reason", "two\nlines"]);
    assert_ne!(out.code, 0, "{out:?}");
    let out = jobs(
        &admin,
        &["--cancel", &id, "--reason", "too large for today"],
    );
    assert_eq!(out.code, 0, "{out:?}");
    let out = running.exited();
    assert_ne!(out.code, 0, "{out:?}");
    let told = "cancelled at the server: too large for today";
    assert!(out.stderr.contains(told), "{out:?}");
    until("the watcher hears of the end", || {
        let job: Value = serde_json::from_str(&watching.line()).expect("json");
        job["state"] == "cancelled"
    });
    watching.signal("INT");
    assert_eq!(watching.exited().code, 0);
    let shown = jobs(&admin, &["--ended"]).stdout;
    assert!(
        shown.contains("  put  cancelled (too large for today)  "),
        "{shown}"
    );
    server.still_works();
}

#[test]
fn the_state_of_the_server_is_shown_and_an_admin_acts_on_it() {
    let mut server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    write(&dir.path().join("file"), &bytes(60 << 20, 8));
    let mut running = slow_upload(&server, dir.path(), "4M", 1 << 20);
    let guard = server.new_token(&["guard", "--scope", "watch"]);
    let admin = server.new_token(&["boss", "--scope", "admin"]);
    let stats = |url: &str, args: &[&str]| {
        exited(
            client(dir.path())
                .env("UDPACK_URL", url)
                .arg("stats")
                .args(args),
        )
    };
    let out = stats(&server.url(), &[]);
    assert_eq!((out.code, out.stdout.as_str()), (6, ""), "{out:?}");
    assert_eq!(
        out.stderr,
        "error: the server refused it: this token has no right to watch\n\
         hint: ask the server's owner what this token may do\n"
    );
    let out = stats(&guard, &["--json"]);
    assert_eq!(out.code, 0, "{out:?}");
    let told = &events(&out.stdout)[0];
    assert_eq!(
        (&told["jobs"]["puts"], &told["sockets_in_all"]),
        (&1.into(), &2.into())
    );
    let sockets = told["sockets"].as_array().expect("a list");
    let sender = sockets.iter().find(|socket| socket["peer"] == "default");
    let id = sender.expect("the sender")["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let shown = stats(&guard, &[]).stdout;
    for part in [
        "running 1 upload, 0 downloads",
        "connections 2",
        &format!("  {id}  default  quic  "),
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    for act in [&["--kick", &id][..], &["--drain"]] {
        let out = stats(&guard, act);
        assert_eq!(out.code, 6, "{out:?}");
    }
    assert_eq!(stats(&admin, &["--kick", "nobody"]).code, 12);
    let out = stats(&admin, &["--kick", &id, "--reason", "maintenance"]);
    assert_eq!(out.code, 0, "{out:?}");
    let out = running.exited();
    assert_ne!(out.code, 0, "{out:?}");
    assert!(
        out.stderr.contains("closed by an operator: maintenance"),
        "{out:?}"
    );
    let out = stats(&admin, &["--drain"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(server.running.exited().code, 0);
}

#[test]
fn odd_names_are_written_with_escapes_and_sent_back_as_they_were() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    let local = dir.path().join("tree");
    fs::create_dir(&local).expect("mkdir");
    odd_tree(&local);
    for name in [
        "a:b",
        "a?",
        "A?",
        "100 %",
        "%41",
        "end.",
        "end ",
        "Con.txt",
        "sub:dir/x*y",
        "n\nl",
    ] {
        write(&local.join(name), name.as_bytes());
    }
    write(
        &local.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff\xfe")),
        b"raw",
    );
    let before = tree(&local);
    let out = server.client(dir.path(), &["put", "-p", "--links", "tree"]);
    assert_eq!(out.code, 0, "{out:?}");

    let mapped = ["--names", "mapped", "-p", "--json"];
    let out = server.client(
        dir.path(),
        &[&["get", "tree", "--as", "stick/"][..], &mapped].concat(),
    );
    assert_eq!(out.code, 0, "{out:?}");
    let end = result(&out.stdout);
    assert!(end["mapped"].as_u64().unwrap_or(0) >= 11, "{end}");
    for path in names(&dir.path().join("stick/tree")) {
        for name in path.split('/') {
            let held = !name.contains(['<', '>', ':', '"', '\\', '|', '?', '*'])
                && !name.chars().any(char::is_control)
                && !name.ends_with(['.', ' ']);
            assert!(held, "{name:?}");
        }
    }
    let out = server.client(
        dir.path(),
        &[
            &["put", "--links", "stick/tree", "--as", "again"][..],
            &mapped,
        ]
        .concat(),
    );
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(
        tree(&server.uploads().join("again")),
        before,
        "at the server"
    );
}

#[test]
fn two_ways_to_write_one_name_are_found_before_anything_is_sent() {
    let server = Server::start();
    let dir = workdir();
    write(&dir.path().join("t/a b"), b"1");
    write(&dir.path().join("t/a%20b"), b"2");
    let out = server.client(dir.path(), &["put", "t", "--names", "mapped"]);
    assert_eq!(out.code, 2, "{out:?}");
    assert_error(&out.stderr);
    assert!(out.stderr.contains("would both be stored"), "{out:?}");
    assert!(names(&server.uploads()).is_empty(), "{out:?}");
}

/// Sets an attribute; false on a file system that holds none.
#[cfg(target_os = "linux")]
fn mark(path: &Path, value: &[u8]) -> bool {
    let file = File::open(path).expect("open");
    rustix::fs::fsetxattr(&file, "user.mark", value, rustix::fs::XattrFlags::empty()).is_ok()
}

#[cfg(target_os = "linux")]
fn marked(path: &Path) -> Option<Vec<u8>> {
    let file = File::open(path).expect("open");
    let mut value = vec![0; 64];
    let filled = rustix::fs::fgetxattr(&file, "user.mark", &mut *value).ok()?;
    value.truncate(filled);
    Some(value)
}

#[cfg(target_os = "linux")]
#[test]
fn extended_attributes_are_copied_where_both_sides_take_them_and_told_once_where_not() {
    let server = Server::start_in(workdir(), &["--allow-read", "--overwrite", "always"]);
    let dir = workdir();
    let files = ["tree/a", "tree/b"];
    for file in files {
        let path = dir.path().join(file);
        write(&path, file.as_bytes());
        if !mark(&path, file.as_bytes()) {
            return skipped("a file system with extended attributes");
        }
    }
    let warnings = |stderr: &str| {
        let lines = stderr.lines();
        lines
            .filter(|line| line.contains("extended attribute"))
            .count()
    };
    let out = server.client(dir.path(), &["put", "tree", "--xattrs"]);
    assert_eq!((out.code, warnings(&out.stderr)), (0, 1), "{out:?}");
    assert_eq!(marked(&server.uploads().join("tree/a")), None);
    let out = server.client(dir.path(), &["get", "tree", "--as", "none/", "--xattrs"]);
    assert_eq!((out.code, warnings(&out.stderr)), (0, 1), "{out:?}");

    let args = ["--allow-read", "--overwrite", "always", "--xattrs", "user"];
    let server = Server::start_in(server.stop(), &args);
    let again = ["put", "tree", "--xattrs", "--if-exists", "overwrite"];
    let out = server.client(dir.path(), &again);
    assert_eq!((out.code, warnings(&out.stderr)), (0, 0), "{out:?}");
    let out = server.client(dir.path(), &["sync", "tree", ":mirror", "--xattrs=user"]);
    assert_eq!((out.code, warnings(&out.stderr)), (0, 0), "{out:?}");
    let out = server.client(dir.path(), &["get", "tree", "--as", "got/", "--xattrs"]);
    assert_eq!((out.code, warnings(&out.stderr)), (0, 0), "{out:?}");
    let out = server.client(dir.path(), &["sync", ":mirror", "back", "--xattrs"]);
    assert_eq!((out.code, warnings(&out.stderr)), (0, 0), "{out:?}");
    for file in files {
        let name = Path::new(file).file_name().expect("a name");
        for copy in [
            server.uploads().join(file),
            server.uploads().join("mirror").join(name),
            dir.path().join("got").join(file),
            dir.path().join("back").join(name),
        ] {
            assert_eq!(marked(&copy).as_deref(), Some(file.as_bytes()), "{copy:?}");
        }
    }

    // As JSON it is told of each file.
    let out = server.client(
        dir.path(),
        &["get", "tree", "--as", "all/", "--xattrs=all", "--json"],
    );
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(named(&events(&out.stdout), "xattrs").len(), 2);
}
