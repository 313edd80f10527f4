//! Named servers and defaults of options.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

use common::{Exited, Running, Server, assert_error, client, exited, mode, visible, workdir};

/// Stores the server under a name, with its URL on standard input.
fn login(url: &str, dir: &Path, name: &str) -> Exited {
    let mut command = client(dir);
    command.args(["login", "-", name]);
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    command.stdin(Stdio::from(reader));
    let mut running = Running::spawn(&mut command);
    drop(command);
    std::io::Write::write_all(&mut writer, url.as_bytes()).expect("it reads");
    drop(writer);
    running.exited()
}

#[test]
fn a_server_that_was_logged_in_to_is_known_by_its_name_to_every_command() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    let run = |args: &[&str]| exited(client(dir.path()).args(args));
    let out = login(&server.url(), dir.path(), "work");
    assert_eq!(out.code, 0, "{out:?}");
    assert!(out.stdout.starts_with("work  127.0.0.1:"), "{out:?}");
    let token = server.url();
    assert!(
        !format!("{out:?}").contains(&token),
        "the token is not shown"
    );
    let stored = dir.path().join(".config/udpack/servers.toml");
    assert_eq!(mode(&stored), 0o600);
    fs::write(dir.path().join("a"), b"1").expect("write");
    fs::write(dir.path().join("b"), b"2").expect("write");
    for (args, stdout) in [
        (&["put", "a", "work:"][..], "a  1  "),
        (&["put", "a", "b", "work:dir/"], ""),
        (&["put", "a", "--as", "work:c"], "c  1  "),
        (&["ls", "work:"], "a\nc\ndir/\n"),
        (&["ls", "work:dir"], "dir/a\ndir/b\n"),
        (&["stat", "work:a", "work:c"], "path a\n"),
        (&["verify", "a", "work:"], ""),
        (&["get", "work:dir/b", "--as", "got"], "got  1  "),
        (&["get", "work:a", "-"], "1"),
        (&["ls", "--to", "work"], "a\n"),
        (&["ping", "-c", "1", "--to", "work"], "pong 1"),
        (&["sync", "-n", "work:dir", "copy"], ""),
    ] {
        let out = run(args);
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
        assert!(out.stdout.starts_with(stdout), "{args:?}: {out:?}");
        assert!(!out.stderr.contains("token"), "{args:?}: {out:?}");
    }
    assert_eq!(fs::read(dir.path().join("got")).expect("read"), b"2");
    // A file that has such a name is a file; two servers in one command are one too many.
    fs::write(dir.path().join("work:"), b"3").expect("write");
    let mut command = client(dir.path());
    let out = exited(
        command
            .env("UDPACK_URL", server.url())
            .args(["put", "work:"]),
    );
    // The server takes no colon in a name; what it was told is the file.
    assert!(
        out.stdout.contains("work:") || out.stderr.contains("work:"),
        "{out:?}"
    );
    for args in [
        &["get", "work:a", "c"][..],
        &["get", "work:a", "--to", "other"],
        &["login", "nonsense://x", "more"],
        &["login", &server.url(), "no name"],
    ] {
        let out = run(args);
        assert_eq!(out.code, 2, "{args:?}: {out:?}");
        assert!(
            !format!("{out:?}").contains(&token),
            "the token is not shown"
        );
    }
    // A token that the server refuses is not stored.
    let refused = server.url_with("a-token-that-nobody-has-ever-made");
    let before = fs::read(&stored).expect("read");
    assert_eq!(run(&["login", &refused, "other"]).code, 4);
    assert_eq!(fs::read(&stored).expect("read"), before);
    fs::set_permissions(&stored, fs::Permissions::from_mode(0o644)).expect("chmod");
    let out = run(&["ls", "work:"]);
    assert_eq!(out.code, 3, "{out:?}");
    assert_error(&out.stderr);
    assert!(visible(&server.uploads()).contains(&"dir".to_owned()));
}

#[test]
fn defaults_give_way_to_flags_and_nonsense_is_told_with_its_line() {
    let server = Server::start_in(workdir(), &["--overwrite", "always"]);
    let dir = workdir();
    let file = dir.path().join(".config/udpack/config.toml");
    fs::create_dir_all(file.parent().expect("a parent")).expect("mkdir");
    fs::write(dir.path().join("a"), b"1").expect("write");
    let run = |config: &str, args: &[&str]| {
        fs::write(&file, config).expect("write");
        server.client(dir.path(), args)
    };
    let config = "# mine\n[client]\nif-exists = \"error\"\n[put]\nas = 'default'\njson = true\n";
    let out = run(config, &["put", "a"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert!(out.stdout.contains("\"path\":\"default\""), "{out:?}");
    // `error` of the configuration, then `overwrite` of the command line.
    assert_eq!(run(config, &["put", "a"]).code, 6);
    let out = run(config, &["put", "a", "--if-exists", "overwrite"]);
    assert_eq!(out.code, 0, "{out:?}");
    // A list over several lines.
    let config = "[put]\nexclude = [\n  'a', # this one\n]\nallow-empty = true\n";
    let out = run(config, &["put", ".", "--as", "all/"]);
    assert_eq!(out.code, 0, "{out:?}");
    assert!(!out.stdout.contains("all/a"), "{out:?}");
    for (config, told) in [
        (
            "[put]\n\nnonsense = 1\n",
            "config.toml:3: no such option: nonsense",
        ),
        (
            "[nonsense]\n",
            "config.toml:1: no such table or command: nonsense",
        ),
        ("jobs = 1\n", "config.toml:1: `jobs` is in no table"),
        ("[put]\njson = 1\n", "config.toml:2: json is true or false"),
        (
            "[client]\ntransport = \"tcp\"\n",
            "[possible values: auto, quic, wss]",
        ),
        ("[put]\njobs = 99\n", "config.toml:2: invalid value '99'"),
        (
            "[put]\njobs = true\n",
            "config.toml:2: invalid value 'true'",
        ),
        (
            "[put]\njobs = many\n",
            "config.toml:2: string values must be quoted",
        ),
        (
            "[put]\njobs = 1\njobs = 2\n",
            "config.toml:3: duplicate key",
        ),
        ("[put]\njobs = { a = 1 }\n", "config.toml:2: a value is"),
        ("[put]\nexclude = [\n 1,\n]\n", "config.toml:2: a value is"),
        (
            "[servers]\nx = \"nonsense://\"\n",
            "config.toml:2: x is not a server",
        ),
    ] {
        let out = run(config, &["put", "a"]);
        assert_eq!(out.code, 2, "{config}: {out:?}");
        assert!(out.stderr.contains(told), "{config}: {out:?}");
        assert_error(&out.stderr);
    }
}

/// The default server gives way to a name in a path, and so does each default to an option that it does not go with.
#[test]
fn a_default_server_gives_way_to_a_name_and_two_names_are_too_many() {
    let work = Server::start_in(workdir(), &["--allow-read", "--overwrite", "always"]);
    let lab = Server::start_in(workdir(), &["--allow-read", "--overwrite", "always"]);
    let dir = workdir();
    let file = dir.path().join(".config/udpack/config.toml");
    fs::create_dir_all(file.parent().expect("a parent")).expect("mkdir");
    let config = format!(
        "[client]\nto = \"work\"\nquiet = true\n[servers]\nwork = \"{}\"\nlab = \"{}\"\n",
        work.url(),
        lab.url()
    );
    fs::write(&file, config).expect("write");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
    fs::create_dir(dir.path().join("d")).expect("mkdir");
    fs::write(dir.path().join("d/a"), b"1").expect("write");
    let run = |args: &[&str]| exited(client(dir.path()).args(args));
    for args in [
        &["put", "d/a"][..],
        &["put", "d/a", "lab:x/"],
        &["put", "d/a", "--as", "lab:y"],
        &["put", "d/a", "--to", "lab", "--as", "lab:z", "-v"],
        &["sync", "d", "lab:s"],
        &["get", "lab:y", "--as", "got"],
        &["ls", "lab:"],
        &["doctor"],
        &["doctor", "lab"],
        &["doctor", "--to", "lab"],
    ] {
        let out = run(args);
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
    }
    assert_eq!(visible(&work.uploads()), ["a"]);
    let mut there = visible(&lab.uploads());
    there.sort();
    assert_eq!(there, ["s", "x", "y", "z"]);
    for args in [
        &["put", "d/a", "--to", "work", "--as", "lab:x"][..],
        &["put", "d/a", "lab:x", "--to", "work"],
        &["put", "d/a", "lab:x", "--as", "x"],
        &["sync", "--to", "work", "d", "lab:s"],
        &["ls", "--to", "work", "lab:"],
    ] {
        let out = run(args);
        assert_eq!(out.code, 2, "{args:?}: {out:?}");
        assert_error(&out.stderr);
    }
    // A directory here that has such a name is one.
    fs::create_dir(dir.path().join("lab:d")).expect("mkdir");
    let out = run(&["sync", "lab:d", "work:empty"]);
    assert_eq!(out.code, 0, "{out:?}");
}

#[test]
fn servers_that_many_store_at_once_are_all_known() {
    const MANY: usize = 16;
    let server = Server::start();
    let (url, dir) = (server.url(), workdir());
    let barrier = std::sync::Barrier::new(MANY);
    std::thread::scope(|scope| {
        for n in 0..MANY {
            let (url, dir, barrier) = (&url, dir.path(), &barrier);
            scope.spawn(move || {
                barrier.wait();
                let out = login(url, dir, &format!("s{n}"));
                assert_eq!(out.code, 0, "{out:?}");
            });
        }
    });
    let config = dir.path().join(".config/udpack");
    let stored = fs::read_to_string(config.join("servers.toml")).expect("read");
    for n in 0..MANY {
        assert!(stored.contains(&format!("\ns{n} = ")), "s{n}: {stored}");
    }
    assert_eq!(config.read_dir().expect("read").count(), 1);
}
