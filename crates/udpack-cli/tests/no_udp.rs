//! The client without a flag, on networks that let no UDP pass: uploads, downloads and events go over TCP, also where only a
//! proxy leads out.

mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[path = "../../udpack/tests/common/namespaces.rs"]
mod namespaces;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Running, Server, bytes, exited, has_program, until, workdir};
use hosts::{on, only_by_proxy};
use namespaces::{Host, Hosts};
use serde_json::Value;

const REASON: &str = "UDP does not pass";

fn serve(hosts: &Hosts) -> Server {
    let dir = workdir();
    let program = env!("CARGO_BIN_EXE_udpack-server");
    let mut command = on(&hosts.server, program, dir.path());
    command.args(["--listen", "10.203.0.2:4433", "--allow-read"]);
    Server::started(command, dir)
}

/// The client on its host.
fn client(hosts: &Hosts, dir: &Path, url: &str, args: &[&str]) -> Command {
    let mut command = on(&hosts.client, env!("CARGO_BIN_EXE_udpack-client"), dir);
    command.env("UDPACK_URL", url).args(args);
    command
}

/// Runs the client to its end; what it printed.
fn run(command: &mut Command) -> String {
    let out = exited(command);
    assert_eq!(out.code, 0, "{out:?}");
    out.stdout
}

/// The one line about the transport among lines of JSON.
fn transport(stdout: &str) -> Value {
    let lines = stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    let mut told = lines.filter(|line: &Value| line["event"] == "transport");
    let one = told.next().unwrap_or_else(|| panic!("not told: {stdout}"));
    assert!(told.next().is_none(), "told twice: {stdout}");
    one
}

/// Sends a file there and back, and events.
fn everything_works(hosts: &Hosts, server: &Server, url: &str, set: impl Fn(&mut Command)) {
    let dir = workdir();
    let run_with = |args: &[&str]| {
        let mut command = client(hosts, dir.path(), url, args);
        set(&mut command);
        run(&mut command)
    };
    let content = bytes(3_000_001, 5);
    fs::write(dir.path().join("file"), &content).expect("written");
    let told = transport(&run_with(&["put", "--json", "file"]));
    assert_eq!(
        (&told["transport"], &told["reason"]),
        (&"wss".into(), &REASON.into())
    );
    let stored = fs::read(server.uploads().join("file")).expect("stored");
    assert!(stored == content, "{} bytes", stored.len());
    run_with(&["get", "file", "--as", "back"]);
    let back = fs::read(dir.path().join("back")).expect("fetched");
    assert!(back == content, "{} bytes", back.len());
    let mut listen = client(hosts, dir.path(), url, &["listen", "-c", "1"]);
    set(&mut listen);
    let mut listen = Running::spawn(&mut listen);
    until("the event is heard", || {
        run_with(&["send", "hello", "1"]);
        listen.has_ended()
    });
    let out = listen.exited();
    assert_eq!(out.stdout, "{\"event\":\"hello\",\"data\":1}\n", "{out:?}");
    let pinged = run_with(&["ping", "-c", "1"]);
    assert!(
        pinged.ends_with(&format!(" ms over wss: {REASON}\n")),
        "{pinged}"
    );
    // The next run need not find it out again.
    let known = dir.path().join(".state/udpack/tcp");
    let known = fs::read_to_string(known).expect("remembered");
    let (_, place) = url.rsplit_once('@').expect("a token");
    let (place, _) = place.split_once('#').expect("a key");
    assert!(known.starts_with(&format!("{place} ")), "{known}");
}

#[test]
fn everything_works_where_udp_is_dropped() {
    let Some(hosts) = Hosts::new() else { return };
    let server = serve(&hosts);
    hosts.lose("meta l4proto udp");
    everything_works(&hosts, &server, &server.url(), |_| ());
}

/// Files of a host's own below `/etc`, as `ip netns exec` has them; removed when it is dropped.
struct Etc(std::path::PathBuf);

impl Etc {
    fn of(host: &Host, hosts: &str) -> Self {
        let dir = Path::new("/etc/netns").join(host.name());
        fs::create_dir_all(&dir).expect("root may do so");
        fs::write(dir.join("hosts"), hosts).expect("written");
        Self(dir)
    }
}

impl Drop for Etc {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
        // Only if nobody else has files there.
        let _ = fs::remove_dir("/etc/netns");
    }
}

/// Nothing but the proxy is let through to, and nobody but the proxy knows the server's name.
#[test]
fn everything_works_where_only_a_proxy_leads_out() {
    if !has_program("tinyproxy", "-v") {
        return;
    }
    let Some(hosts) = Hosts::new() else { return };
    let etc = Etc::of(
        &hosts.server,
        "127.0.0.1 localhost\n10.203.0.2 files.test\n",
    );
    let server = serve(&hosts);
    let dir = workdir();
    let _proxy = only_by_proxy(&hosts, dir.path());
    let url = server.url().replace("10.203.0.2", "files.test");
    everything_works(&hosts, &server, &url, |command| {
        command.env("https_proxy", "http://anna:secret@10.203.0.2:3128");
    });
    // Without the right password it says what is wrong, and does not show the password.
    let dir = workdir();
    let wrong = [
        "ping",
        "-c",
        "1",
        "--proxy",
        "http://anna:wrong@10.203.0.2:3128",
    ];
    let out = exited(&mut client(&hosts, dir.path(), &url, &wrong));
    assert_eq!(out.code, 5, "{out:?}");
    assert!(
        out.stderr.contains("does not accept the user and password"),
        "{out:?}"
    );
    assert!(!out.stderr.contains("wrong"), "{out:?}");
    drop(etc);
}
