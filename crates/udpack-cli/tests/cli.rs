//! The real binaries, as a user and a script see them: output lines, files, exit codes.

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{
    Running, Server, assert_error, bytes, client, events, exited, installed, is_root, mode, named,
    quiet, result, server, skipped, staged, until, visible, workdir,
};
use serde_json::Value;

#[test]
fn first_start_makes_private_keys_and_says_how_to_send() {
    let server = Server::start();
    let labels: Vec<&str> = server
        .lines
        .iter()
        .map(|(label, _)| label.as_str())
        .collect();
    assert_eq!(labels, ["listening", "fingerprint", "uploads"]);
    assert!(!server.value("listening").ends_with(":0"), "the real port");
    assert_eq!(server.value("fingerprint").len(), "sha256:".len() + 64);
    for file in ["prikey.pem", "token"] {
        assert_eq!(
            mode(&server.dir.path().join("keys").join(file)),
            0o600,
            "{file}"
        );
    }
    let url = server.url();
    assert!(
        url.starts_with("udpack://") && url.ends_with(server.value("fingerprint")),
        "{url}"
    );
    assert!(server.paste.ends_with(" udpack-client put FILE"));
}

#[test]
fn the_token_is_shown_on_a_terminal_at_the_first_start_and_else_on_request() {
    let found = quiet(Command::new("script"), Path::new("/"))
        .arg("--version")
        .output();
    if found.is_err() {
        skipped("the token on a terminal: no program `script`");
        return;
    }
    let on_a_terminal = |dir: &Path, flags: &str| {
        let started = format!("echo $$; exec udpack-server --listen 127.0.0.1:0 {flags}");
        let mut running = Running::spawn(
            quiet(Command::new("script"), dir)
                .env("PATH", installed())
                .args(["-qefc", &started, "/dev/null"]),
        );
        let id = running.line();
        let mut all = String::new();
        while !all.contains("udpack-client put FILE") {
            all.push_str(&running.line());
            all.push('\n');
        }
        let killed = Command::new("kill").arg(id.trim()).status();
        assert!(killed.is_ok_and(|status| status.success()));
        running.exited();
        all
    };
    let dir = workdir();
    let first = on_a_terminal(dir.path(), "");
    let token = fs::read_to_string(dir.path().join("keys/token")).expect("a token");
    let token = token.split_whitespace().last().expect("a token").to_owned();
    let out = exited(server(dir.path()).arg("url"));
    let url = out.stdout.trim_end();
    assert!(url.contains(&token), "{url}");
    let last = first.lines().last().expect("a line").trim_end();
    assert_eq!(last, format!("UDPACK_URL='{url}' udpack-client put FILE"));
    assert!(
        !on_a_terminal(dir.path(), "").contains(&token),
        "a second start"
    );
    let other = workdir();
    let hushed = on_a_terminal(other.path(), "-q");
    assert!(!hushed.contains("udpack://"), "{hushed}");

    for args in [&[][..], &["-q"], &["--json"]] {
        let dir = workdir();
        let log = dir.path().join("log");
        let file = fs::File::create(&log).expect("a file");
        let mut command = server(dir.path());
        command
            .args(["--listen", "127.0.0.1:0"])
            .args(args)
            .stdout(file);
        let running = Running::spawn_with(&mut command);
        let text = || fs::read_to_string(&log).expect("text");
        until("the last line", || text().contains("put FILE"));
        drop(running);
        assert!(!text().contains("udpack://"), "{args:?}: {}", text());
    }
}

#[test]
fn a_terminal_shows_the_lines_of_few_files_and_colours_unless_they_are_unwanted() {
    let found = quiet(Command::new("script"), Path::new("/"))
        .arg("--version")
        .output();
    if found.is_err() {
        skipped("what a terminal shows: no program `script`");
        return;
    }
    let server = Server::start();
    let dir = workdir();
    fs::create_dir(dir.path().join("many")).expect("mkdir");
    for number in 0..60 {
        fs::write(dir.path().join(format!("many/{number}")), "content").expect("write");
    }
    let shown = |command: &str, no_colour: &str| {
        let out = exited(
            quiet(Command::new("script"), dir.path())
                .env("PATH", installed())
                .env("UDPACK_URL", server.url())
                .env("TERM", "xterm")
                .env("NO_COLOR", no_colour)
                .args(["-qec", command, "/dev/null"]),
        );
        out.stdout
    };
    let hash = blake3::hash(b"content").to_string();
    let few = shown("udpack-client put --progress none many", "");
    assert_eq!(few.matches(&hash).count(), 20, "{few}");
    assert!(
        few.contains("-v lists each") && few.contains("60 files"),
        "{few}"
    );
    let each = shown("udpack-client put --progress none -v many", "");
    assert_eq!(each.matches(&hash).count(), 60, "{each}");
    let missing = |no_colour| shown("udpack-client put missing", no_colour);
    assert!(
        missing("").contains("\u{1b}[1;31merror:\u{1b}[0m "),
        "{}",
        missing("")
    );
    assert!(!missing("1").contains('\u{1b}'), "{}", missing("1"));
}

#[test]
fn url_needs_a_server_that_has_started_and_a_token_in_plain() {
    let dir = workdir();
    let out = exited(server(dir.path()).arg("url"));
    assert_eq!((out.code, out.stdout.as_str()), (3, ""), "{out:?}");
    assert_error(&out.stderr);
    let running = Server::start_in(dir, &["--public-host", "files.example.org"]);
    let dir = running.dir.path();
    let port = running
        .value("listening")
        .rsplit(':')
        .next()
        .expect("a port");
    let url = running.url();
    assert!(
        url.contains(&format!("@files.example.org:{port}#sha256:")),
        "{url}"
    );
    let out = exited(server(dir).args(["url", "--json", "--public-host", "::1"]));
    let shown: Value = serde_json::from_str(&out.stdout).expect("JSON");
    assert!(
        shown["url"]
            .as_str()
            .is_some_and(|url| url.contains("@[::1]:"))
    );
    let out = exited(server(dir).args(["token", "new", "guest"]));
    let made = out.stdout.lines().last().expect("a line");
    assert!(made.starts_with("UDPACK_URL='udpack://"), "{made}");
    assert!(made.contains("@files.example.org:"), "{made}");
    let digests = dir.join("digests");
    let guest = fs::read_to_string(dir.join("keys/token")).expect("tokens");
    fs::write(&digests, guest.lines().last().expect("a digest")).expect("write");
    fs::set_permissions(&digests, fs::Permissions::from_mode(0o600)).expect("chmod");
    let out = exited(server(dir).args(["url", "--token-file"]).arg(&digests));
    assert_eq!((out.code, out.stdout.as_str()), (3, ""), "{out:?}");
    assert_error(&out.stderr);
}

#[test]
fn a_restart_keeps_key_and_token() {
    let first = Server::start();
    let (before, url) = (first.value("fingerprint").to_owned(), first.url());
    let dir = first.stop();
    let second = Server::start_in(dir, &[]);
    assert_eq!(second.value("fingerprint"), before);
    let token = |url: &str| url.split('@').next().map(str::to_owned);
    assert_eq!(token(&second.url()), token(&url));
}

#[test]
fn first_lines_as_json() {
    let dir = workdir();
    let mut running =
        Running::spawn(server(dir.path()).args(["--listen", "127.0.0.1:0", "--json"]));
    let mut keys = Vec::new();
    for _ in 0..4 {
        let line = running.line();
        assert!(!line.contains("udpack://"), "{line}");
        let line: Value = serde_json::from_str(&line).expect("json");
        keys.extend(line.as_object().expect("an object").keys().cloned());
    }
    assert_eq!(keys, ["listening", "fingerprint", "uploads", "send"]);
}

#[test]
fn stored_bytes_are_the_bytes_sent_and_stdout_holds_only_results() {
    let server = Server::start();
    let dir = workdir();
    let files = [("empty", 0), ("one", 1), ("five.bin", 5 << 20)];
    for (name, len) in files {
        let content = bytes(len, 1);
        fs::write(dir.path().join(name), &content).expect("write");
        let out = exited(
            client(dir.path())
                .env("UDPACK_URL", server.url())
                .args(["put", name]),
        );
        assert_eq!(out.code, 0, "{out:?}");
        let hash = blake3::hash(&content);
        assert_eq!(out.stdout, format!("{name}  {len}  {hash}\n"));
        assert_eq!(
            fs::read(server.uploads().join(name)).expect("stored"),
            content
        );
        assert_eq!(
            mode(&server.uploads().join(name)),
            mode(&dir.path().join(name))
        );
    }
    let out = server.client(dir.path(), &["put", "-q", "one", "--as", "quiet"]);
    assert_eq!(
        (out.code, &*out.stdout, &*out.stderr),
        (0, "", ""),
        "{out:?}"
    );
    let names: Vec<String> = (0..20).map(|i| format!("many{i}")).collect();
    for (i, name) in names.iter().enumerate() {
        fs::write(dir.path().join(name), bytes(i * 10_000, 2)).expect("write");
    }
    let out = exited(
        client(dir.path())
            .env("UDPACK_URL", server.url())
            .args(["put", "-j", "3", "--as", "sub/dir/"])
            .args(&names),
    );
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(out.stdout.lines().count(), names.len());
    for name in &names {
        let sent = fs::read(dir.path().join(name)).expect("local");
        assert_eq!(
            fs::read(server.uploads().join("sub/dir").join(name)).expect("stored"),
            sent
        );
    }
    assert_eq!(staged(&server.uploads()), 0);
}

#[test]
fn json_progress_never_goes_back_and_is_complete_only_after_done() {
    let server = Server::start();
    let dir = workdir();
    for (name, len) in [("a", 9 << 20), ("b", 3 << 20), ("c", 0)] {
        fs::write(dir.path().join(name), bytes(len, 3)).expect("write");
    }
    let total = 12 << 20;
    let out = exited(
        client(dir.path())
            .env("UDPACK_URL", server.url())
            .args(["put", "--json", "a", "b", "c"]),
    );
    assert_eq!(out.code, 0, "{out:?}");
    let events = events(&out.stdout);
    assert_eq!(events[0]["event"], "start");
    assert_eq!(events[0]["bytes"], total);
    let files = named(&events, "file");
    assert_eq!(files.len(), 3);
    assert!(
        files
            .iter()
            .all(|file| file["status"] == "ok" && file["same"] == false)
    );
    let mut last = 0;
    let mut done = 0;
    for event in &events {
        if event["event"] == "file" {
            done += 1;
        }
        if event["event"] == "progress" {
            let now = event["bytes"].as_u64().expect("bytes");
            assert!(now >= last, "{}", out.stdout);
            assert!(
                now < total || done == 3,
                "complete before done: {}",
                out.stdout
            );
            last = now;
        }
    }
    assert_eq!(last, total, "ends at the total");
    let result = result(&out.stdout);
    assert_eq!(result["status"], "ok");
    assert_eq!(result["exit"], 0);
    assert_eq!(result["bytes"], total);
    assert_eq!(result["error_kind"], Value::Null);
}

#[test]
fn the_checkout_needs_no_flags_but_the_address() {
    let server = Server::start();
    let dir = server.dir.path();
    fs::write(dir.join("file"), "content").expect("write");
    let out = exited(client(dir).args(["put", "file", "--to", server.value("listening")]));
    assert_eq!(out.code, 0, "{out:?}");
}

#[test]
fn the_pasted_url_works_elsewhere_and_a_token_in_an_argument_is_warned_of() {
    let server = Server::start();
    let dir = workdir();
    fs::write(dir.path().join("FILE"), "content").expect("write");
    fs::write(server.dir.path().join("FILE"), "content").expect("write");
    let made = exited(common::server(server.dir.path()).args(["token", "new", "guest"]));
    let guest = made.stdout.lines().last().expect("a line").to_owned();
    for (at, pasted) in [
        (server.dir.path(), server.paste.clone()),
        (dir.path(), guest),
    ] {
        let out = exited(
            quiet(Command::new("sh"), at)
                .env("PATH", installed())
                .args(["-c", &pasted]),
        );
        assert_eq!(out.code, 0, "{pasted}: {out:?}");
        assert!(!out.stderr.contains("UDPACK_URL"), "{out:?}");
    }
    let args = ["put", "FILE", "--to"];
    let out = exited(client(dir.path()).args(args).arg(server.url()));
    assert_eq!(out.code, 0, "{out:?}");
    assert!(out.stderr.contains("UDPACK_URL"), "{out:?}");
    let token = server
        .url()
        .split(['/', '@'])
        .nth(2)
        .expect("a token")
        .to_owned();
    assert!(!out.stderr.contains(&token), "no token in a log");
}

#[test]
fn token_comes_from_file_or_environment() {
    let server = Server::start();
    let dir = workdir();
    fs::write(dir.path().join("file"), "content").expect("write");
    let url = server.url();
    let (token, rest) = url
        .strip_prefix("udpack://")
        .and_then(|url| url.split_once('@'))
        .expect("a url");
    let pin = server.value("fingerprint");
    let address = rest.split('#').next().expect("an address");
    let args = ["put", "file", "--to", address, "--fingerprint", pin];
    let out = exited(client(dir.path()).env("UDPACK_TOKEN", token).args(args));
    assert_eq!(out.code, 0, "{out:?}");
    let file = server.dir.path().join("keys/token");
    let out = exited(client(dir.path()).args(args).arg("--token-file").arg(file));
    assert_eq!(out.code, 0, "{out:?}");
    let out = exited(client(dir.path()).args(args));
    assert_eq!(out.code, 4, "no token at all: {out:?}");
    let looked_at = dir.path().join("keys/token");
    assert!(
        out.stderr.contains(&*looked_at.to_string_lossy()),
        "{out:?}"
    );
    let out = exited(
        client(dir.path())
            .env("UDPACK_TOKEN", token)
            .args(["ping", "--to", address]),
    );
    assert_eq!(out.code, 4, "no key: {out:?}");
    let looked_at = dir.path().join("keys/pubkey.pem");
    assert!(
        out.stderr.contains(&*looked_at.to_string_lossy()),
        "{out:?}"
    );
    assert_error(&out.stderr);
    let digest = dir.path().join("digest");
    fs::write(&digest, format!("me sha256:{}\n", "0".repeat(64))).expect("write");
    fs::set_permissions(&digest, fs::Permissions::from_mode(0o600)).expect("chmod");
    let out = exited(
        client(dir.path())
            .args(args)
            .arg("--token-file")
            .arg(digest),
    );
    assert_eq!(out.code, 3, "a digest lets nobody in: {out:?}");
    assert_error(&out.stderr);
}

#[test]
fn wrong_token_wrong_key_and_unknown_authority_are_4() {
    let server = Server::start();
    let dir = workdir();
    fs::write(dir.path().join("file"), "content").expect("write");
    let address = server.value("listening");
    let pin = server.value("fingerprint");
    let wrong = "x".repeat(43);
    let other = format!("sha256:{}", "0".repeat(64));
    for (what, args) in [
        ("token", vec!["--to", address, "--fingerprint", pin]),
        ("key", vec!["--to", address, "--fingerprint", &other]),
        ("authority", vec!["--to", address]),
    ] {
        let out = exited(
            client(dir.path())
                .env("UDPACK_TOKEN", &wrong)
                .args(["put", "file", "--json"])
                .args(args),
        );
        assert_eq!(out.code, 4, "{what}: {out:?}");
        assert_eq!(result(&out.stdout)["error_kind"], "auth", "{what}");
        assert_error(&out.stderr);
    }
    assert!(visible(&server.uploads()).is_empty());
    server.still_works();
}

#[test]
fn no_server_is_5() {
    let dir = workdir();
    fs::write(dir.path().join("file"), "content").expect("write");
    // Bound and silent, so that nobody else can be there.
    let silent = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address").to_string();
    let out = exited(client(dir.path()).args([
        "put",
        "file",
        "--connect-timeout",
        "0.5",
        "--to",
        &address,
    ]));
    assert_eq!(out.code, 5, "{out:?}");
    assert_error(&out.stderr);
    assert_eq!(out.stdout, "");
}

#[test]
fn a_taken_name_is_6_unless_the_content_is_the_same() {
    let server = Server::start();
    let dir = workdir();
    let file = dir.path().join("file");
    let put = |args: &[&str]| {
        exited(
            client(dir.path())
                .env("UDPACK_URL", server.url())
                .args(["put", "file", "--json"])
                .args(args),
        )
    };
    fs::write(&file, bytes(3_000_000, 4)).expect("write");
    assert_eq!(put(&[]).code, 0);
    let again = put(&[]);
    assert_eq!(again.code, 0, "{again:?}");
    let sent = result(&again.stdout)["sent"].as_u64().expect("bytes");
    assert!(sent <= 64 << 10, "{sent}: more than before the answer");
    fs::write(&file, bytes(3_000_000, 5)).expect("write");
    for args in [
        &[][..],
        &["--if-exists", "error"],
        &["--if-exists", "overwrite"],
    ] {
        let out = put(args);
        assert_eq!(out.code, 6, "{args:?} {out:?}");
        assert_eq!(result(&out.stdout)["error_kind"], "policy");
        assert_error(&out.stderr);
    }
    assert_eq!(put(&["--if-exists", "skip"]).code, 0);
    assert_eq!(
        fs::read(server.uploads().join("file")).expect("stored"),
        bytes(3_000_000, 4)
    );
    assert_eq!(put(&["--as", "other"]).code, 0);
    server.still_works();
}

#[test]
fn overwriting_needs_the_servers_consent() {
    let server = Server::start_in(workdir(), &["--overwrite", "always"]);
    let dir = workdir();
    for content in ["first", "second"] {
        fs::write(dir.path().join("file"), content).expect("write");
        let out = exited(client(dir.path()).env("UDPACK_URL", server.url()).args([
            "put",
            "file",
            "--if-exists",
            "overwrite",
        ]));
        assert_eq!(out.code, 0, "{out:?}");
        assert_eq!(
            fs::read_to_string(server.uploads().join("file")).expect("stored"),
            content
        );
    }
}

#[test]
fn too_large_and_over_quota_are_6() {
    let server = Server::start_in(workdir(), &["--max-file", "100K", "--quota", "150K"]);
    let dir = workdir();
    fs::write(dir.path().join("large"), bytes(100 * 1024 + 1, 6)).expect("write");
    fs::write(dir.path().join("fits"), bytes(100 * 1024, 6)).expect("write");
    fs::write(dir.path().join("over"), bytes(60 * 1024, 7)).expect("write");
    for (name, code) in [("large", 6), ("fits", 0), ("over", 6)] {
        let out = exited(
            client(dir.path())
                .env("UDPACK_URL", server.url())
                .args(["put", name]),
        );
        assert_eq!(out.code, code, "{name}: {out:?}");
    }
    assert_eq!(visible(&server.uploads()), ["fits"]);
    server.still_works();
}

#[test]
fn a_bad_name_is_6_and_as_helps() {
    let server = Server::start();
    let dir = workdir();
    fs::write(dir.path().join(".hidden"), "content").expect("write");
    let put = |args: &[&str]| {
        exited(
            client(dir.path())
                .env("UDPACK_URL", server.url())
                .args(["put", ".hidden"])
                .args(args),
        )
    };
    for args in [
        &["--as", ".udpack/x"][..],
        &["--as", "../up"],
        &["--as", "/etc/passwd"],
        &["--as", "a/../../b"],
    ] {
        let out = put(args);
        assert_eq!(out.code, 6, "{args:?}: {out:?}");
        assert_error(&out.stderr);
    }
    assert_eq!(put(&["--as", "shown"]).code, 0);
    assert_eq!(visible(&server.uploads()), ["shown"]);
}

#[test]
fn local_files_that_cannot_be_sent_are_3() {
    let server = Server::start();
    let dir = workdir();
    fs::create_dir(dir.path().join("folder")).expect("mkdir");
    let put = |names: &[&str]| {
        exited(
            client(dir.path())
                .env("UDPACK_URL", server.url())
                .args(["put", "--json"])
                .args(names),
        )
    };
    for name in ["missing", "/dev/null", "folder/missing"] {
        let out = put(&[name]);
        assert_eq!(out.code, 3, "{name}: {out:?}");
        assert_eq!(result(&out.stdout)["error_kind"], "local_file");
        assert_error(&out.stderr);
    }
    if is_root(dir.path()) {
        skipped("an unreadable file: root can read everything");
    } else {
        fs::write(dir.path().join("secret"), "x").expect("write");
        fs::set_permissions(dir.path().join("secret"), fs::Permissions::from_mode(0o000))
            .expect("chmod");
        assert_eq!(put(&["secret"]).code, 3);
    }
    assert_eq!(
        put(&["missing", "/dev/null"]).code,
        3,
        "all for the same reason"
    );
    fs::write(dir.path().join("good"), "content").expect("write");
    let out = put(&["missing", "good"]);
    assert_eq!(out.code, 10, "some of several: {out:?}");
    let result = result(&out.stdout);
    assert_eq!(
        (&result["status"], &result["files"], &result["failed"]),
        (&"partial".into(), &1.into(), &1.into())
    );
    assert_eq!(visible(&server.uploads()), ["good"]);
}

#[test]
fn usage_errors_are_2() {
    let dir = workdir();
    for name in ["a", "sub"] {
        fs::create_dir(dir.path().join(name)).expect("mkdir");
        fs::write(dir.path().join(name).join("same"), "x").expect("write");
    }
    for args in [
        &[][..],
        &["nonsense"],
        &["put"],
        &["put", "a/same", "-j", "0"],
        &["put", "a/same", "-q", "-v"],
        &["put", "a/same", "--fingerprint", "12"],
        &["put", "a/same", "sub/same"],
        &["put", "a/same", "sub/same", "--as", "name"],
        &["put", "a/same", "--to", "http://host"],
        &["put", "a/same", "--to", "token@host"],
        &["send", "event", "{not json"],
        &["send", "event", "{\"$bin\":\"zz\"}"],
        &["ping", "--interval", "never"],
    ] {
        let out = exited(client(dir.path()).args(args));
        assert_eq!(out.code, 2, "{args:?}: {out:?}");
        assert_eq!(out.stdout, "", "{args:?}");
        assert_ne!(out.stderr, "", "{args:?}");
    }
    for args in [
        &["--max-file", "1X"][..],
        &["--cc", "fast"],
        &["extra"],
        &["--listen", "nowhere"],
    ] {
        let out = exited(server(dir.path()).args(args));
        assert_eq!(out.code, 2, "{args:?}: {out:?}");
    }
    let out = exited(
        client(dir.path())
            .env("UDPACK_URL", "udpack://sEcReT@@x")
            .args(["ping"]),
    );
    assert_eq!(out.code, 2);
    assert!(!out.stderr.contains("sEcReT"), "{out:?}");
}

#[test]
fn a_full_disk_is_8_and_the_server_goes_on() {
    let dir = workdir();
    let Some(disk) = common::Tmpfs::mount(&dir.path().join("disk"), "8m") else {
        skipped("a full disk: mounting a tmpfs needs root");
        return;
    };
    let uploads = disk.path().join("uploads");
    let uploads = uploads.to_str().expect("utf-8");
    let server = Server::start_in(workdir(), &["--dir", uploads, "--min-free", "0"]);
    let dir = workdir();
    fs::write(dir.path().join("large"), bytes(12 << 20, 8)).expect("write");
    fs::write(dir.path().join("small"), bytes(1 << 20, 9)).expect("write");
    for (name, code) in [("large", 8), ("small", 0)] {
        let out = exited(
            client(dir.path())
                .env("UDPACK_URL", server.url())
                .args(["put", name]),
        );
        assert_eq!(out.code, code, "{name}: {out:?}");
        if code != 0 {
            assert_error(&out.stderr);
        }
    }
    assert_eq!(visible(Path::new(uploads)), ["small"]);
    assert_eq!(staged(Path::new(uploads)), 0);
}

/// A program under a limit that the shell sets.
fn limited(limit: &str, program: Command) -> Command {
    let mut shell = quiet(
        Command::new("sh"),
        program.get_current_dir().expect("a directory"),
    );
    shell
        .args(["-c", &format!("{limit}; exec \"$0\" \"$@\"")])
        .arg(program.get_program())
        .args(program.get_args());
    shell
}

#[test]
fn the_systems_limit_for_file_sizes_ends_one_upload_and_not_the_server() {
    let dir = workdir();
    let mut program = server(dir.path());
    program.args(["--listen", "127.0.0.1:0"]);
    let server = Server::started(limited("ulimit -f 2048", program), dir);
    let dir = workdir();
    fs::write(dir.path().join("large"), bytes(3 << 20, 1)).expect("write");
    fs::write(dir.path().join("small"), bytes(1000, 2)).expect("write");
    let out = server.client(dir.path(), &["put", "large"]);
    assert_eq!(out.code, 6, "{out:?}");
    assert!(out.stderr.contains("too large"), "{out:?}");
    let out = server.client(dir.path(), &["put", "small"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(visible(&server.uploads()), ["small"]);
}

#[test]
fn the_systems_limit_for_file_sizes_ends_a_download_in_order() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    fs::write(server.uploads().join("large"), bytes(3 << 20, 1)).expect("write");
    let dir = workdir();
    let mut program = client(dir.path());
    program.args(["get", "large"]);
    let mut program = limited("ulimit -f 2048", program);
    let out = exited(program.env("UDPACK_URL", server.url()));
    // Not ended by a signal, which has no code.
    assert!(out.code > 0, "{out:?}");
    assert_error(&out.stderr);
    assert!(!dir.path().join("large").exists());
}

#[test]
fn a_server_whose_processor_time_is_used_up_stops_in_order() {
    let server = Server::start();
    assert_eq!(server.terminate("XCPU").0, 0);
}

#[test]
fn a_second_server_on_the_same_directory_or_port_is_refused() {
    let first = Server::start();
    let dir = first.dir.path();
    let out = exited(server(dir).args(["--listen", "127.0.0.1:0"]));
    assert_eq!(out.code, 3, "{out:?}");
    assert_error(&out.stderr);
    let out = exited(server(dir).args(["--dir", "other", "--listen", first.value("listening")]));
    assert_eq!(out.code, 1, "{out:?}");
    assert_error(&out.stderr);
    assert_eq!(out.stdout, "", "nothing is announced that does not work");
    first.still_works();
}

#[test]
fn what_is_wrong_with_the_arguments_is_found_before_keys_are_made() {
    let taken = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    for args in [
        &["--listen", "nonsense"][..],
        &["--listen", "host.invalid:1"],
        &["--listen", &taken],
        &["--listen", "127.0.0.1:0", "--hook", "/nonexistent"],
        &["--listen", "127.0.0.1:0", "--metrics", "nonsense"],
    ] {
        let dir = workdir();
        let _held = UdpSocket::bind(&taken);
        let out = exited(server(dir.path()).args(args));
        assert!(out.code > 0, "{args:?}: {out:?}");
        assert_error(&out.stderr);
        let made = fs::read_dir(dir.path()).expect("a directory").count();
        assert_eq!(made, 0, "{args:?}");
    }
}

#[test]
fn a_socket_that_was_passed_is_served() {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("an address").to_string();
    let dir = workdir();
    let mut program = server(dir.path());
    // Would fail if it were used.
    program.args(["--listen", "host.invalid:1"]);
    let mut program = limited(
        "export LISTEN_FDS=1 LISTEN_PID=$$; exec 3<&0 </dev/null",
        program,
    );
    program.stdin(std::os::fd::OwnedFd::from(socket));
    let server = Server::started(program, dir);
    assert_eq!(server.value("listening"), address);
    server.still_works();
}

#[test]
fn a_socket_of_another_kind_is_refused() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let dir = workdir();
    let mut program = limited(
        "export LISTEN_FDS=1 LISTEN_PID=$$; exec 3<&0 </dev/null",
        server(dir.path()),
    );
    let out = exited(program.stdin(std::os::fd::OwnedFd::from(socket)));
    assert_eq!(out.code, 2, "{out:?}");
    assert_error(&out.stderr);
    assert!(out.stderr.contains("LISTEN_FDS"), "{out:?}");
}

#[test]
fn whoever_started_the_server_is_told_when_it_is_ready_and_when_it_stops() {
    let dir = workdir();
    let path = dir.path().join("notify");
    let watcher = UnixDatagram::bind(&path).expect("a socket");
    let patience = std::time::Duration::from_secs(30);
    watcher.set_read_timeout(Some(patience)).expect("a timeout");
    let heard = || {
        let mut buffer = [0; 256];
        let count = watcher.recv(&mut buffer).expect("a word in time");
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    };
    let mut program = server(dir.path());
    program.args(["--listen", "127.0.0.1:0"]);
    program.env("NOTIFY_SOCKET", &path);
    let server = Server::started(program, dir);
    assert_eq!(heard(), "READY=1");
    let (code, _dir) = server.terminate("TERM");
    assert_eq!((code, &*heard()), (0, "STOPPING=1"));
}

#[test]
fn secret_files_that_others_can_read_are_refused() {
    let server_dir = Server::start().stop();
    for name in ["prikey.pem", "token"] {
        let file = server_dir.path().join("keys").join(name);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
        let out = exited(server(server_dir.path()).args(["--listen", "127.0.0.1:0"]));
        assert_eq!(out.code, 3, "{name}: {out:?}");
        assert!(out.stderr.contains("hint: run chmod 600"), "{out:?}");
        assert_error(&out.stderr);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
    }
    let missing =
        exited(server(server_dir.path()).args(["--token-file", "none", "--listen", "127.0.0.1:0"]));
    assert_eq!(
        missing.code, 3,
        "a named token file is never made: {missing:?}"
    );
}

#[test]
fn interrupting_an_upload_without_resuming_leaves_nothing_behind() {
    let server = Server::start_in(workdir(), &["--max-file", "none", "--min-free", "0"]);
    let dir = workdir();
    let mut running = upload_for_long(&server, dir.path());
    running.signal("INT");
    let out = running.exited();
    assert_eq!(out.code, 130, "{out:?}");
    let last = out.stdout.lines().last().expect("a result");
    assert!(last.contains("\"status\":\"interrupted\""), "{last}");
    assert_error(&out.stderr);
    until("the staging area is empty", || {
        staged(&server.uploads()) == 0
    });
    assert!(visible(&server.uploads()).is_empty());
    server.still_works();
}

#[test]
fn the_server_drains_on_sigterm_although_somebody_listens() {
    let server = Server::start();
    let dir = workdir();
    let mut listening = Running::spawn(client(dir.path()).env("UDPACK_URL", server.url()).args([
        "listen",
        "--retries",
        "0",
    ]));
    until("somebody listens", || delivered(&server) == 1);
    let (code, dir_back) = server.terminate("TERM");
    assert_eq!(code, 0);
    let out = listening.exited();
    assert_eq!(out.code, 5, "the listener is told: {out:?}");
    assert_eq!(Server::start_in(dir_back, &[]).terminate("INT").0, 0);
}

#[test]
fn a_second_signal_ends_the_server_at_once() {
    let mut server = Server::start_in(workdir(), &["--max-file", "none", "--min-free", "0"]);
    let dir = workdir();
    let mut running = upload_for_long(&server, dir.path());
    until("the server has ended", || {
        server.running.signal("TERM");
        server.running.has_ended()
    });
    assert_eq!(server.running.exited().code, 130);
    running.signal("INT");
    assert_eq!(running.exited().code, 130);
}

/// An upload that is well under way and far from done: its rate is limited, so that a disk that is nearly full has room.
fn upload_for_long(server: &Server, dir: &Path) -> Running {
    let file = fs::File::create(dir.join("huge")).expect("create");
    file.set_len(512 << 20).expect("a sparse file");
    let mut running = Running::spawn(client(dir).env("UDPACK_URL", server.url()).args([
        "put",
        "--json",
        "--no-resume",
        "--bwlimit",
        "8M",
        "huge",
    ]));
    until("bytes are acknowledged", || {
        let line: Value = serde_json::from_str(&running.line()).expect("json");
        line["event"] == "progress" && line["bytes"].as_u64().is_some_and(|bytes| bytes > 0)
    });
    running
}

fn delivered(server: &Server) -> u64 {
    let out = exited(
        client(server.dir.path())
            .env("UDPACK_URL", server.url())
            .args([
                "send",
                "hello",
                "{\"n\":[1,null,-2.5],\"raw\":{\"$bin\":\"00ff\"}}",
            ]),
    );
    assert_eq!(out.code, 0, "{out:?}");
    let reply: Value = serde_json::from_str(&out.stdout).expect("json");
    reply["delivered"].as_u64().expect("a number")
}

#[test]
fn events_reach_every_other_client_as_they_were_sent() {
    let server = Server::start();
    let dir = workdir();
    let listen = || {
        Running::spawn(
            client(dir.path())
                .env("UDPACK_URL", server.url())
                .args(["listen", "-c", "1"]),
        )
    };
    let mut listeners = [listen(), listen()];
    // One that was there early stops after its event; the other hears a later copy.
    until("both have heard one", || {
        delivered(&server);
        listeners.iter_mut().all(Running::has_ended)
    });
    for listener in &mut listeners {
        let out = listener.exited();
        assert_eq!(out.code, 0, "{out:?}");
        let expected =
            "{\"event\":\"hello\",\"data\":{\"n\":[1,null,-2.5],\"raw\":{\"$bin\":\"00ff\"}}}\n";
        assert_eq!(out.stdout, expected);
    }
}

#[test]
fn ping_shows_each_round_trip_and_a_summary() {
    let server = Server::start();
    let dir = workdir();
    let ping = |args: &[&str]| {
        let out = exited(
            client(dir.path())
                .env("UDPACK_URL", server.url())
                .args(["ping", "-c", "3", "--interval", "0.01"])
                .args(args),
        );
        assert_eq!(out.code, 0, "{out:?}");
        out.stdout
    };
    let plain = ping(&[]);
    let lines: Vec<&str> = plain.lines().collect();
    assert_eq!(lines.len(), 4, "{plain}");
    assert!(lines[3].starts_with("min/avg/max  "), "{plain}");
    assert!(lines[3].ends_with(" ms over quic: UDP passes"), "{plain}");
    let events = events(&ping(&["--json", "--transport", "wss"]));
    assert_eq!(named(&events, "pong").len(), 3);
    assert_eq!(events[3]["count"], 3);
    assert_eq!(events[3]["transport"], "wss");
    assert_eq!(events[3]["transport_reason"], "chosen by this client");
}

#[test]
fn an_unknown_channel_is_told() {
    let server = Server::start();
    let out = exited(
        client(server.dir.path())
            .env("UDPACK_URL", server.url())
            .args(["send", "hello", "1", "--channel", "nobody"]),
    );
    assert_eq!(out.code, 11, "{out:?}");
    assert_error(&out.stderr);
}

#[test]
fn demo_uploads_and_verifies() {
    let dir = workdir();
    let out = exited(client(dir.path()).arg("demo"));
    assert_eq!(out.code, 0, "{out:?}");
    assert!(out.stdout.starts_with("demo.bin  67108864  "), "{out:?}");
    let content = bytes(1_000_001, 10);
    fs::write(dir.path().join("mine"), &content).expect("write");
    let out = exited(client(dir.path()).args(["demo", "mine"]));
    assert_eq!(out.code, 0, "{out:?}");
    let hash = blake3::hash(&content);
    let lines: Vec<&str> = out.stdout.lines().collect();
    assert_eq!(lines[0], format!("mine  1000001  {hash}"));
    assert!(
        lines[1].starts_with(&format!("verified  {hash}")),
        "{out:?}"
    );
    assert_eq!(exited(client(dir.path()).args(["demo", "missing"])).code, 3);
    let json = exited(client(dir.path()).args(["demo", "mine", "--json"]));
    assert_eq!(result(&json.stdout)["status"], "ok");
    let left = fs::read_dir(dir.path()).expect("dir").count();
    assert_eq!(left, 1, "nothing is left behind");
}

#[test]
fn completions_and_man_pages() {
    let dir = workdir();
    for (what, mut command) in [
        ("udpack-server", server(dir.path())),
        ("udpack-client", client(dir.path())),
    ] {
        let script = exited(command.args(["completions", "bash"]));
        assert_eq!(script.code, 0);
        assert!(script.stdout.contains(what), "{what}");
    }
    for mut command in [server(dir.path()), client(dir.path())] {
        let page = exited(command.arg("man"));
        assert_eq!(page.code, 0);
        assert!(page.stdout.contains(".SH NAME"));
    }
    assert_eq!(
        fs::read_dir(dir.path()).expect("dir").count(),
        0,
        "no keys are made for it"
    );
}

#[test]
fn a_closed_stdout_is_no_panic() {
    let server_one = Server::start();
    let dir = workdir();
    fs::write(dir.path().join("file"), "content").expect("write");
    let url = server_one.url();
    for args in [
        &["put", "file"][..],
        &["put", "file", "--json"],
        &["ping", "-c", "2", "--interval", "0.01"],
        &["send", "hello", "1"],
        &["man"],
        &["completions", "zsh"],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = client(dir.path());
        command
            .env("UDPACK_URL", &url)
            .args(args)
            .stdout(Stdio::from(writer));
        let out = Running::spawn_with(&mut command).exited();
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
        assert!(!out.stderr.contains("panicked"), "{args:?}: {out:?}");
    }
    assert_eq!(
        visible(&server_one.uploads()),
        ["file"],
        "the work is done all the same"
    );
}

#[test]
fn log_files_are_written_and_hold_no_token() {
    let server = Server::start_in(workdir(), &["--log-dir", "logs", "-q"]);
    let dir = workdir();
    fs::write(dir.path().join("file"), "content").expect("write");
    let out = exited(client(dir.path()).env("UDPACK_URL", server.url()).args([
        "put",
        "file",
        "--log-dir",
        "logs",
        "-vv",
    ]));
    assert_eq!(out.code, 0, "{out:?}");
    let token = server
        .url()
        .split(['/', '@'])
        .nth(2)
        .expect("a token")
        .to_owned();
    assert!(!out.stderr.contains(&token));
    let (code, server_dir) = server.terminate("TERM");
    assert_eq!(code, 0);
    for (dir, name) in [(&server_dir, "server.log"), (&dir, "client.log")] {
        let mut text = String::new();
        let mut file = fs::File::open(dir.path().join("logs").join(name)).expect(name);
        file.read_to_string(&mut text).expect("text");
        assert!(!text.is_empty() && !text.contains(&token), "{name}");
    }
}

#[test]
fn plain_progress_off_a_terminal_stays_on_stderr() {
    let server = Server::start();
    let dir = workdir();
    let mut file = fs::File::create(dir.path().join("file")).expect("create");
    file.write_all(&bytes(1 << 20, 11)).expect("write");
    for style in ["auto", "plain", "none", "bar"] {
        let out = exited(client(dir.path()).env("UDPACK_URL", server.url()).args([
            "put",
            "file",
            "--progress",
            style,
        ]));
        assert_eq!(out.code, 0, "{out:?}");
        assert_eq!(out.stdout.lines().count(), 1, "{out:?}");
        assert!(
            !out.stderr.contains('\u{1b}'),
            "no control sequences: {out:?}"
        );
    }
    let out = exited(
        client(dir.path())
            .env("UDPACK_URL", server.url())
            .args(["put", "file", "-q"]),
    );
    assert_eq!((out.code, out.stderr.as_str()), (0, ""));
}
