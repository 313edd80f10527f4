//! What comes out of pipes and goes into them: stored only if it is whole, and given on only with an end that counts.

mod common;

use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{
    Exited, Running, Server, assert_error, bytes, client, events, exited, named, result, staged,
    until, visible, workdir,
};

/// Nothing of an upload is left at the server, seen or unseen.
fn nothing_is_left(server: &Server) {
    assert!(visible(&server.uploads()).is_empty());
    // The server removes what was cancelled after it has answered.
    until("staging is empty", || staged(&server.uploads()) == 0);
}

#[test]
fn a_command_is_stored_only_if_it_succeeds() {
    let server = Server::start();
    let dir = workdir();
    let content = bytes(3_000_000, 1);
    fs::write(dir.path().join("in"), &content).expect("write");
    let put = |line: &str, more: &[&str]| {
        let mut args = vec!["put", "--from-command", line, "--as", "dir/db.sql"];
        args.extend(more);
        server.client(dir.path(), &args)
    };
    // Killed after any number of bytes, and failing after all of them.
    for cut in [0, 1, 70_000, 1_048_576, 2_999_999, 3_000_000] {
        for end in ["kill -9 $$", "exit 3"] {
            let out = put(&format!("head -c {cut} in; {end}"), &[]);
            assert_eq!(out.code, 14, "{cut} {end}: {out:?}");
            assert_error(&out.stderr);
            assert!(visible(&server.uploads()).is_empty(), "{cut} {end}");
        }
    }
    nothing_is_left(&server);
    let out = put("cat in; exit 7", &["--json"]);
    assert_eq!(
        (out.code, &result(&out.stdout)["error_kind"]),
        (14, &"command".into())
    );
    let lines = events(&out.stdout);
    let files = named(&lines, "file");
    assert_eq!(files.len(), 1, "{out:?}");
    assert_eq!(files[0]["command_exit"], 7);
    let text = files[0]["error"].as_str().expect("a sentence");
    assert_eq!(text, "the command `cat in; exit 7` exited with 7");
    nothing_is_left(&server);
    let out = put("true", &[]);
    assert_eq!(out.code, 14, "{out:?}");
    let out = put("cat in", &[]);
    assert_eq!(out.code, 0, "{out:?}");
    let stored = fs::read(server.uploads().join("dir/db.sql")).expect("it is stored");
    assert!(stored == content);
    // A name it must have, and nothing else may come with it.
    for args in [
        &["put", "--from-command", "true"][..],
        &["put", "--from-command", "true", "--as", "x", "in"],
        &["put", "in", "--size", "3"],
        &["put", "in", "--until", "3"],
        &["jobs", "--watch", "--reason", "x"],
        &["stats", "--drain", "--reason", "x"],
        &["jobs", "--cancel", "1", "--reason", "a\nb"],
        &["share", "x", "--expires", "0s"],
        &["share", "x", "--quota", "0"],
    ] {
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, 2, "{args:?}: {out:?}");
    }
}

/// Runs a client with these bytes on its standard input.
fn fed(server: &Server, args: &[&str], input: &[u8]) -> Exited {
    let dir = workdir();
    let mut command = client(dir.path());
    command.env("UDPACK_URL", server.url()).args(args);
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    command.stdin(Stdio::from(reader));
    let mut running = Running::spawn(&mut command);
    drop(command);
    // A client that refuses it leaves.
    let _ = writer.write_all(input);
    drop(writer);
    running.exited()
}

#[test]
fn standard_input_must_have_the_size_and_the_end_that_were_named() {
    let server = Server::start();
    let sized = |size: &str| {
        fed(
            &server,
            &["put", "-", "--as", "a", "--size", size],
            b"12345",
        )
    };
    for wrong in ["4", "6", "1G"] {
        let out = sized(wrong);
        assert_eq!(out.code, 14, "{wrong}: {out:?}");
        assert!(out.stderr.contains("--size says"), "{out:?}");
    }
    let marked = |input: &[u8]| {
        let args = ["put", "-", "--as", "b", "--require-eof-marker", "-- done"];
        fed(&server, &args, input)
    };
    let out = marked(b"select 1;\n-- don");
    assert_eq!(out.code, 14, "{out:?}");
    nothing_is_left(&server);
    assert_eq!(sized("5").code, 0);
    assert_eq!(marked(b"select 1;\n-- done\n").code, 0);
    let stored = fs::read(server.uploads().join("b")).expect("it is stored");
    assert_eq!(stored, b"select 1;\n-- done\n");
}

/// A server that is killed twice takes nothing with it: what it had on disk it has still, and the rest is in the spool.
#[test]
fn standard_input_outlives_a_killed_server() {
    let mut server = Server::start();
    let address = server.value("listening").to_owned();
    let dir = workdir();
    let content = bytes(24 << 20, 3);
    let mut command = client(dir.path());
    command
        .env("UDPACK_URL", server.url())
        .args(["put", "-", "--as", "stream", "--json", "--spool", "20M"]);
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    command.stdin(Stdio::from(reader));
    let mut running = Running::spawn(&mut command);
    drop(command);
    for part in content.chunks(8 << 20) {
        writer.write_all(part).expect("it is read");
        // So much of it must have come that there is something to lose.
        loop {
            let line = running.line();
            let event = events(&line).remove(0);
            if event["event"] == "progress" && event["bytes"].as_u64() > Some(1 << 20) {
                break;
            }
        }
        server = Server::start_at(&address, server.stop(), &[]);
    }
    drop(writer);
    let out = running.exited();
    assert_eq!(out.code, 0, "{out:?}");
    assert!(
        !named(&events(&out.stdout), "reconnecting").is_empty(),
        "{out:?}"
    );
    let stored = fs::read(server.uploads().join("stream")).expect("it is stored");
    assert!(stored == content);
    // A shorter one under the name of one that was given up has nothing of it.
    let out = fed(
        &server,
        &["put", "-", "--as", "short"],
        &content[..5_000_000],
    );
    assert_eq!(out.code, 0, "{out:?}");
}

#[test]
fn a_command_that_reads_a_file_has_the_last_word() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    let content = bytes(2_000_000, 4);
    fs::write(server.uploads().join("f"), &content).expect("write");
    fs::write(server.uploads().join("empty"), b"").expect("write");
    let get =
        |file: &str, line: &str| server.client(dir.path(), &["get", file, "--to-command", line]);
    let out = get("f", "cat > out");
    assert_eq!((out.code, out.stdout.as_str()), (0, ""), "{out:?}");
    assert!(fs::read(dir.path().join("out")).expect("read") == content);
    let out = get("empty", "cat > out");
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(fs::read(dir.path().join("out")).expect("read"), b"");
    for (line, why) in [
        ("cat > /dev/null; exit 4", "exited with 4"),
        ("exit 5", "exited with 5"),
        ("head -c 10 > /dev/null; kill -9 $$", "signal 9"),
        (
            "head -c 10 > /dev/null",
            "before it had read the whole file",
        ),
    ] {
        let out = get("f", line);
        assert_eq!(out.code, 14, "{line}: {out:?}");
        assert_error(&out.stderr);
        assert!(out.stderr.contains(why), "{line}: {out:?}");
    }
    // No command begins for what is not there.
    let out = get("none", "touch begun");
    assert_eq!(out.code, 12, "{out:?}");
    assert!(!dir.path().join("begun").exists());
    let mut command = Command::new(client(dir.path()).get_program());
    let out = command
        .current_dir(dir.path())
        .env("UDPACK_URL", server.url())
        .args(["get", "f", "-"])
        .output()
        .expect("it runs");
    assert!(
        out.status.success() && out.stdout == content,
        "{:?}",
        out.stderr
    );
}

/// What a client that was killed has left is no part of what is sent next under the name.
#[test]
fn a_shorter_stream_has_nothing_of_a_longer_one_before_it() {
    let server = Server::start();
    let dir = workdir();
    let content = bytes(6 << 20, 5);
    let mut command = client(dir.path());
    command
        .env("UDPACK_URL", server.url())
        .args(["put", "-", "--as", "stream", "--json"]);
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    command.stdin(Stdio::from(reader));
    let mut running = Running::spawn(&mut command);
    drop(command);
    writer.write_all(&content).expect("it is read");
    loop {
        let event = events(&running.line()).remove(0);
        if event["event"] == "progress" && event["bytes"].as_u64() > Some(1 << 20) {
            break;
        }
    }
    running.signal("KILL");
    running.exited();
    assert!(visible(&server.uploads()).is_empty());
    // Until the server knows that the first one is gone, it has the name.
    let mut last = None;
    until("the server lets go of the name", || {
        let out = fed(
            &server,
            &["put", "-", "--as", "stream"],
            &content[1..2_000_000],
        );
        let done = out.code == 0;
        last = Some(out);
        done
    });
    let stored = fs::read(server.uploads().join("stream")).expect("it is stored");
    assert!(stored == content[1..2_000_000], "{last:?}");
}

#[test]
fn a_growing_file_is_sent_as_it_grows_and_stored_when_it_is_closed() {
    let server = Server::start();
    let dir = workdir();
    let content = bytes(6 << 20, 6);
    let path = dir.path().join("log");
    let mut log = fs::File::create(&path).expect("create");
    let mut command = client(dir.path());
    command
        .env("UDPACK_URL", server.url())
        .args(["put", "--follow", "log", "--as", "logs/", "--json"]);
    let mut running = Running::spawn(&mut command);
    for part in content.chunks(3 << 20) {
        log.write_all(part).expect("write");
        let len = log.metadata().expect("metadata").len();
        // What has been written arrives although the file is not at its end, and is not seen there.
        loop {
            let event = events(&running.line()).remove(0);
            if event["event"] == "progress" && event["bytes"].as_u64() >= Some(len - 1) {
                break;
            }
        }
        assert!(visible(&server.uploads()).is_empty());
        assert_eq!(staged(&server.uploads()), 1);
    }
    drop(log);
    let out = running.exited();
    assert_eq!(out.code, 0, "{out:?}");
    let stored = fs::read(server.uploads().join("logs/log")).expect("it is stored");
    assert!(stored == content);
    // One that is cut is not stored.
    let log = fs::File::options().write(true).open(&path).expect("open");
    let args = ["put", "--follow", "log", "--as", "cut", "--json"];
    let mut command = client(dir.path());
    command.env("UDPACK_URL", server.url()).args(args);
    let mut running = Running::spawn(&mut command);
    loop {
        let event = events(&running.line()).remove(0);
        if event["event"] == "progress" && event["bytes"].as_u64() >= Some(content.len() as u64 - 1)
        {
            break;
        }
    }
    log.set_len(1000).expect("cut");
    let out = running.exited();
    assert_eq!(out.code, 14, "{out:?}");
    let text = result(&out.stdout)["error"].as_str().map(str::to_owned);
    assert!(
        text.as_ref()
            .is_some_and(|text| text.starts_with("it was cut to 1000 bytes")),
        "{text:?}"
    );
    assert_eq!(visible(&server.uploads()), ["logs"]);
    // Where the end is said beforehand, nobody needs to close it.
    let args = ["put", "--follow", "log", "--until", "500", "--as", "part"];
    let out = server.client(dir.path(), &args);
    assert_eq!(out.code, 0, "{out:?}");
    let stored = fs::read(server.uploads().join("part")).expect("it is stored");
    assert!(stored == content[..500]);
}

/// What of a file the server has on disk, as far as it tells from outside.
fn held(server: &Server) -> u64 {
    let args = ["uploads", "list", "--json"];
    let out = exited(common::server(server.dir.path()).args(args));
    assert_eq!(out.code, 0, "{out:?}");
    let held = |line: &str| events(line)[0]["held"].as_u64();
    out.stdout.lines().next().and_then(held).unwrap_or(0)
}

/// A client that is killed costs nothing of what the server had on disk: the same command goes on from there, if it is
/// still the same file.
#[test]
fn a_followed_file_goes_on_after_its_client_was_killed() {
    let server = Server::start();
    let dir = workdir();
    let content = bytes(9 << 20, 7);
    let path = dir.path().join("log");
    let args = ["put", "--follow", "log", "--json"];
    let follow = || {
        let mut command = client(dir.path());
        Running::spawn(command.env("UDPACK_URL", server.url()).args(args))
    };
    let begun = 5 << 20;
    let left = || {
        let mut log = fs::File::create(&path).expect("create");
        log.write_all(&content[..begun]).expect("write");
        let mut running = follow();
        until("the server has it", || held(&server) == begun as u64);
        running.signal("KILL");
        running.exited();
        log
    };
    let sum = |out: &Exited, field: &str| {
        let lines = events(&out.stdout);
        let lines = named(&lines, "file");
        assert_eq!(lines.len(), 1, "{out:?}");
        lines[0][field].as_u64().expect("a number")
    };
    let mut log = left();
    let mut running = follow();
    log.write_all(&content[begun..]).expect("write");
    drop(log);
    let out = running.exited();
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(sum(&out, "resumed"), begun as u64, "{out:?}");
    assert_eq!(sum(&out, "sent"), (content.len() - begun) as u64, "{out:?}");
    let lines = events(&out.stdout);
    let resumed = named(&lines, "resumed");
    assert_eq!(resumed.len(), 1, "{out:?}");
    assert_eq!(resumed[0]["bytes"].as_u64(), Some(begun as u64));
    assert!(resumed[0]["size"].is_null(), "{out:?}");
    let stored = server.uploads().join("log");
    assert!(fs::read(&stored).expect("it is stored") == content);

    // One that begins otherwise has nothing of it, and one that is shorter does not wait for more.
    for other in [bytes(9 << 20, 8), content[..1_000_000].to_vec()] {
        fs::remove_file(&stored).expect("remove");
        drop(left());
        fs::write(&path, &other).expect("write");
        let out = follow().exited();
        assert_eq!(out.code, 0, "{out:?}");
        assert_eq!(sum(&out, "sent"), other.len() as u64, "{out:?}");
        assert!(fs::read(&stored).expect("it is stored") == other);
    }
}

/// Whether no process works in this directory. One that has ended and was not waited for does not.
fn are_gone(dir: &Path) -> bool {
    let mut processes = fs::read_dir("/proc").expect("a process table").flatten();
    processes
        .all(|process| fs::read_link(process.path().join("cwd")).map_or(true, |cwd| cwd != dir))
}

/// A command must not take the end of an interrupted client for the end of its input, nor outlive it.
#[test]
fn an_interrupt_ends_the_commands() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    fs::write(server.uploads().join("f"), bytes(6 << 20, 9)).expect("write");
    let made = Command::new("mkfifo").arg(dir.path().join("fifo")).status();
    assert!(made.is_ok_and(|made| made.success()));
    let told = dir.path().join("told");
    for (args, does) in [
        (&["get", "f", "--bwlimit", "1M", "--to-command"][..], "cat"),
        // Nobody ever writes to it.
        (&["put", "--as", "g", "--from-command"][..], "read x < fifo"),
        (
            &["get", "f", "--bwlimit", "1M", "--to-command"],
            "{ cat; touch done; } | { cat; touch done; }",
        ),
        (
            &["put", "--as", "g", "--from-command"],
            "{ read x < fifo; touch done; } | { cat; touch done; }",
        ),
    ] {
        for signal in ["INT", "TERM"] {
            let mut command = client(dir.path());
            command.env("UDPACK_URL", server.url()).args(args);
            command.arg(format!("echo $$ > told; {does} > got; touch done"));
            // Not in the foreground of a terminal, where a signal goes to all processes of the group.
            command.process_group(0);
            let mut running = Running::spawn(&mut command);
            let pid = || fs::read_to_string(&told).unwrap_or_default();
            until("the command runs", || pid().ends_with('\n'));
            running.signal(signal);
            let out = running.exited();
            assert_eq!(out.code, 130, "{out:?}");
            let process = format!("/proc/{}/cmdline", pid().trim());
            until("the shell has ended", || {
                fs::read(&process).map_or(true, |line| line.is_empty())
            });
            until("nothing of it runs", || are_gone(dir.path()));
            assert!(!dir.path().join("done").exists(), "{args:?}");
            fs::remove_file(&told).expect("rm");
        }
    }
}
