//! `udpack-server --store`: the client's commands over an object store, here a directory.
#![cfg(feature = "store")]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Server, bytes, client, exited, server, workdir};

#[test]
fn the_commands_work_over_an_object_store() {
    let (dir, objects) = (workdir(), workdir());
    let store = format!("file://{}", objects.path().display());
    let server = Server::start_in(workdir(), &["--store", &store, "--allow-read"]);
    assert_eq!(server.value("uploads"), store);
    let (large, small) = (bytes(20_000_000, 1), bytes(1_000, 2));
    fs::create_dir_all(dir.path().join("tree/sub")).expect("mkdir");
    fs::write(dir.path().join("tree/large"), &large).expect("write");
    fs::write(dir.path().join("tree/sub/small"), &small).expect("write");
    let run = |args: &[&str]| {
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
        out.stdout
    };
    run(&["put", "tree"]);
    assert_eq!(
        fs::read(objects.path().join("tree/large")).expect("there"),
        large
    );
    let listed = run(&["ls", "-R"]);
    assert!(
        listed.contains("tree/large") && listed.contains("tree/sub/small"),
        "{listed}"
    );
    assert!(run(&["stat", "tree/large"]).contains("20000000"));
    run(&["get", "tree/large", "--as", "back"]);
    assert_eq!(fs::read(dir.path().join("back")).expect("got"), large);
    run(&["verify", "tree"]);
    // The same again is no upload, and another of the name is refused.
    run(&["put", "tree"]);
    fs::write(dir.path().join("tree/sub/small"), b"another").expect("write");
    let refused = server.client(dir.path(), &["put", "tree"]);
    assert!(
        refused.code == 10 && refused.stderr.contains("the name is taken"),
        "{refused:?}"
    );
    assert_eq!(
        fs::read(objects.path().join("tree/sub/small")).expect("there"),
        small
    );
    // A token is kept to its prefix, rights and quota.
    let url = server.new_token(&[
        "anna",
        "--scope",
        "read,write",
        "--prefix",
        "anna",
        "--quota",
        "2K",
    ]);
    let as_anna = |args: &[&str]| {
        let mut command = client(dir.path());
        exited(command.env("UDPACK_URL", &url).args(args))
    };
    let put = as_anna(&["put", "tree/sub/small", "--as", "hers"]);
    assert_eq!(put.code, 0, "{put:?}");
    assert!(objects.path().join("anna/hers").is_file());
    assert_eq!(
        as_anna(&["stat", "tree/large"]).code,
        12,
        "it is not below her prefix"
    );
    assert_ne!(as_anna(&["rm", "hers"]).code, 0, "she may not remove");
    let full = as_anna(&["put", "tree/large", "--as", "large"]);
    assert!(full.code == 6 && full.stderr.contains("quota"), "{full:?}");
}

#[test]
fn what_is_wrong_with_a_store_is_told_at_the_start() {
    let dir = workdir();
    let mut command = server(dir.path());
    let out = exited(command.args(["--listen", "127.0.0.1:0", "--store", "ftp://a/b"]));
    assert_eq!(out.code, 8, "{out:?}");
    assert!(out.stderr.contains("an object store is s3://"), "{out:?}");
    assert!(!dir.path().join("keys").exists(), "keys come last");
}

#[test]
fn what_is_in_the_directory_comes_to_the_object_store_behind_it() {
    let (dir, objects) = (workdir(), workdir());
    let store = format!("file://{}", objects.path().display());
    let more = ["--push", &store, "--allow-read", "--overwrite", "always"];
    let server = Server::start_in(workdir(), &more);
    assert_eq!(server.value("push"), store);
    let (large, small) = (bytes(20_000_000, 1), bytes(1_000, 2));
    fs::create_dir_all(dir.path().join("tree/sub")).expect("mkdir");
    fs::write(dir.path().join("tree/large"), &large).expect("write");
    fs::write(dir.path().join("tree/sub/small"), &small).expect("write");
    let url = server.new_token(&["op", "--scope", "read,write,delete,watch"]);
    let run = |args: &[&str]| {
        let mut command = client(dir.path());
        let out = exited(command.env("UDPACK_URL", &url).args(args));
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
        out.stdout
    };
    let pushed = || {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let stats = run(&["stats"]);
            if stats.contains("push 0 waiting") {
                return stats;
            }
            assert!(Instant::now() < deadline, "{stats}");
        }
    };
    run(&["put", "tree"]);
    let stats = pushed();
    assert!(
        stats.contains("2 pushed") && stats.contains("0 attempts failed"),
        "{stats}"
    );
    let there = |name: &str| fs::read(objects.path().join(name)).ok();
    assert!(there("tree/large") == Some(large));
    assert!(there("tree/sub/small") == Some(small));
    fs::write(dir.path().join("tree/sub/small"), b"newer").expect("write");
    run(&["put", "--if-exists", "overwrite", "tree"]);
    run(&["rm", "tree/large"]);
    pushed();
    assert_eq!(
        there("tree/sub/small").as_deref(),
        Some(b"newer".as_slice())
    );
    assert_eq!(there("tree/large"), None);
    // It needs one or the other.
    let mut command = common::server(dir.path());
    let out = exited(command.args([
        "--listen",
        "127.0.0.1:0",
        "--push",
        &store,
        "--store",
        &store,
    ]));
    assert_eq!(out.code, 2, "{out:?}");
    let mut command = common::server(dir.path());
    let out = exited(command.args(["--listen", "127.0.0.1:0", "--push", "ftp://a/b"]));
    assert!(
        out.code == 8 && out.stderr.contains("an object store is s3://"),
        "{out:?}"
    );
}
