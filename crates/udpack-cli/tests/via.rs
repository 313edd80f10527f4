//! `--via`: a transfer over two cables at once, one of which is cut.

mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[path = "../../udpack/tests/common/namespaces.rs"]
mod namespaces;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Running, Server, bytes, client, exited, named, result, workdir};
use hosts::on;
use namespaces::Hosts;
use serde_json::Value;

/// Where the server is, whichever cable leads there.
const SERVER: &str = "10.205.0.1";

/// A second cable, `eth1` at each end, and a default route over each. The server has an address of its own.
fn two_cables() -> Option<Hosts> {
    let hosts = Hosts::new()?;
    let (c, s) = (&hosts.client, &hosts.server);
    let done = c
        .ip(&format!(
            "link add eth1 type veth peer name eth1 netns {}",
            s.name()
        ))
        .and_then(|_| {
            for (host, number) in [(c, 1), (s, 2)] {
                host.ip("link set eth1 gso_max_segs 1")?;
                host.ip(&format!("address add 10.204.0.{number}/24 dev eth1"))?;
                host.ip("link set eth1 up")?;
            }
            s.ip(&format!("address add {SERVER}/32 dev lo"))?;
            c.ip("route add default via 10.203.0.2 dev eth0 metric 100")?;
            c.ip("route add default via 10.204.0.2 dev eth1 metric 200")
        });
    done.expect("root may do so");
    Some(hosts)
}

fn serve(hosts: &Hosts) -> Server {
    let dir = workdir();
    let program = env!("CARGO_BIN_EXE_udpack-server");
    let mut command = on(&hosts.server, program, dir.path());
    command.args(["--listen", &format!("{SERVER}:4433"), "--allow-read"]);
    Server::started(command, dir)
}

fn on_client(hosts: &Hosts, server: &Server, dir: &Path, args: &[&str]) -> Command {
    let mut command = on(&hosts.client, env!("CARGO_BIN_EXE_udpack-client"), dir);
    command.env("UDPACK_URL", server.url()).args(args);
    command
}

fn make(dir: &Path, count: u8, size: usize) {
    fs::create_dir(dir).expect("a directory");
    for n in 0..count {
        fs::write(dir.join(n.to_string()), bytes(size, n)).expect("written");
    }
}

/// Bytes by path, as the last line of JSON tells.
fn by_path(result: &Value) -> Vec<(String, u64)> {
    let paths = result["paths"].as_array().expect("several paths");
    let path = |path: &Value| {
        (
            path["path"].as_str().expect("a name").to_owned(),
            path["bytes"].as_u64().expect("a number"),
        )
    };
    paths.iter().map(path).collect()
}

fn same(one: &Path, other: &Path, count: u8) {
    for n in 0..count {
        let name = n.to_string();
        let (one, other) = (fs::read(one.join(&name)), fs::read(other.join(&name)));
        assert!(
            one.expect("there") == other.expect("there"),
            "{name} differs"
        );
    }
}

#[test]
fn a_transfer_goes_over_both_cables_and_on_when_one_is_cut() {
    let Some(hosts) = two_cables() else { return };
    let server = serve(&hosts);
    let dir = workdir();
    make(&dir.path().join("tree"), 40, 500_000);
    let stored = server.uploads().join("tree");

    let put = ["put", "tree", "--json", "--via"];
    // By the interfaces' names, by their addresses, and by those that have a default route.
    let ways = ["eth0,eth1", "10.203.0.1,10.204.0.1", "auto"];
    for (n, via) in ways.into_iter().enumerate() {
        let name = format!("{n}");
        let args = [&put[..], &[via, "--bwlimit", "8M", "--as", &name]].concat();
        let out = exited(&mut on_client(&hosts, &server, dir.path(), &args));
        assert_eq!(out.code, 0, "{out:?}");
        let paths = by_path(&result(&out.stdout));
        assert_eq!(paths.len(), 2, "{paths:?}");
        assert!(
            paths.iter().all(|(_, bytes)| *bytes > 1_000_000),
            "{paths:?}"
        );
        same(&dir.path().join("tree"), &server.uploads().join(&name), 40);
    }

    // One is cut once something has come over it.
    let args = [&put[..], &["eth0,eth1", "--bwlimit", "4M"]].concat();
    let mut running = Running::spawn(&mut on_client(&hosts, &server, dir.path(), &args));
    loop {
        let line = running.line();
        let line: Value = serde_json::from_str(&line).expect("JSON");
        let moved = |path: &Value| path["path"] == "eth1" && path["bytes"].as_u64() > Some(0);
        if line["event"] == "progress"
            && line["paths"]
                .as_array()
                .is_some_and(|paths| paths.iter().any(moved))
        {
            break;
        }
        assert_ne!(line["event"], "result", "{line}");
    }
    for host in [&hosts.client, &hosts.server] {
        host.ip("link set eth1 down").expect("root may do so");
    }
    let out = running.exited();
    assert_eq!(out.code, 0, "{out:?}");
    same(&dir.path().join("tree"), &stored, 40);
    let events = common::events(&out.stdout);
    let lost = named(&events, "path_lost");
    assert!(!lost.is_empty(), "{out:?}");
    assert!(lost.iter().all(|lost| lost["path"] == "eth1"), "{lost:?}");

    // Back again, over what is left.
    let get = ["get", "tree", "--as", "back", "--via", "eth0,eth1"];
    let out = exited(&mut on_client(&hosts, &server, dir.path(), &get));
    assert_eq!(out.code, 0, "{out:?}");
    same(&dir.path().join("back"), &stored, 40);
}

#[test]
fn paths_that_cannot_be_are_told_before_anything_is_sent() {
    let dir = workdir();
    fs::write(dir.path().join("file"), "x").expect("written");
    for (via, text) in [
        ("eth0,eth0", "named twice"),
        ("a/b", "neither an interface nor a local address"),
        ("nosuch0", "this machine has no interface nosuch0"),
    ] {
        let out = exited(client(dir.path()).args(["put", "file", "--via", via]));
        assert_eq!(out.code, 2, "{out:?}");
        assert!(out.stderr.contains(text), "{out:?}");
    }
}
