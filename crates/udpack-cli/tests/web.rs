//! `--web`, with the real binaries: what a start prints, what the port says, what outlasts a restart.
#![cfg(feature = "web")]

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Running, exited, has_program, installed, quiet, server, workdir};
use serde_json::Value;

/// A server with pages, and the link that it prints.
fn start(dir: &Path, args: &[&str]) -> (Running, String) {
    let args = ["--listen", "127.0.0.1:0", "--web", "127.0.0.1:0"]
        .iter()
        .chain(args);
    let mut running = Running::spawn(server(dir).args(args));
    let link = loop {
        let line = running.line();
        if let Some(link) = line.strip_prefix("web ") {
            break link.to_owned();
        }
    };
    (running, link)
}

/// The body of what is at this path.
fn get(link: &str, path: &str) -> String {
    let authority = link.strip_prefix("http://").expect("plain on loopback");
    let authority = authority.trim_end_matches('/');
    let mut stream = TcpStream::connect(authority).expect("somebody listens");
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).expect("a timeout");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("written");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
    let (_, body) = text.split_once("\r\n\r\n").expect("a body");
    body.to_owned()
}

fn told(link: &str) -> Value {
    serde_json::from_str(&get(link, "/.well-known/udpack.json")).expect("JSON")
}

#[test]
fn pages_are_served_and_their_hashes_outlast_a_restart() {
    let dir = workdir();
    let (mut first, link) = start(dir.path(), &[]);
    assert!(!link.contains('#'), "no token where nobody looks: {link}");
    assert!(get(&link, "/").contains("<title>udpack</title>"));
    assert!(get(&link, "/metrics").contains("udpack_sockets_admitted_total 0"));
    let before = told(&link);
    assert_eq!(before["hashes"].as_array().map(Vec::len), Some(2));
    first.signal("TERM");
    assert_eq!(first.exited().code, 0);
    let (_second, link) = start(dir.path(), &[]);
    assert_eq!(told(&link)["hashes"], before["hashes"]);
}

#[test]
fn the_link_with_its_token_is_shown_on_request_until_a_start_without_pages() {
    let dir = workdir();
    let (mut running, link) = start(dir.path(), &[]);
    let token = fs::read_to_string(dir.path().join("keys/token")).expect("a token");
    let token = token.split_whitespace().next_back().expect("a token");
    let out = exited(server(dir.path()).args(["url", "--web"]));
    assert_eq!(out.stdout, format!("{link}#t={token}\n"), "{out:?}");
    let out = exited(server(dir.path()).args(["url", "--web", "--json"]));
    let shown: Value = serde_json::from_str(&out.stdout).expect("JSON");
    assert_eq!(shown["web"], format!("{link}#t={token}"));
    running.signal("TERM");
    assert_eq!(running.exited().code, 0);
    let mut without = Running::spawn(server(dir.path()).args(["--listen", "127.0.0.1:0"]));
    assert!(without.line().starts_with("listening "));
    assert!(
        (0..2)
            .map(|_| without.line())
            .all(|line| !line.contains("web"))
    );
    let _ = without.line();
    let out = exited(server(dir.path()).args(["url", "--web"]));
    assert_eq!(out.code, 3, "{out:?}");
    assert!(out.stderr.contains("--web"), "{out:?}");
}

#[test]
fn what_cannot_be_is_told_before_anything_is_made() {
    let dir = workdir();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let web = ["--listen", "127.0.0.1:0", "--web", &address];
    let out = exited(server(dir.path()).args(web));
    assert_eq!(out.code, 1, "{out:?}");
    assert!(out.stderr.contains("--web"), "{out:?}");
    let origin = ["--web", "--web-origin", "example.com"];
    let out = exited(server(dir.path()).args(origin));
    assert_eq!(out.code, 2, "{out:?}");
    let alone = ["--web-origin", "https://example.com"];
    let out = exited(server(dir.path()).args(alone));
    assert_eq!(out.code, 2, "{out:?}");
    assert!(!dir.path().join("keys").exists());
}

#[test]
fn a_terminal_sees_the_token_and_its_picture_once() {
    if !has_program("script", "--version") {
        return;
    }
    let dir = workdir();
    let screen = dir.path().join("screen");
    let shown = || String::from_utf8_lossy(&fs::read(&screen).unwrap_or_default()).into_owned();
    let start = |columns: &str| {
        let command = format!(
            "stty cols {columns}; exec udpack-server --listen 127.0.0.1:0 --web 127.0.0.1:0"
        );
        let mut running = Running::spawn(
            quiet(Command::new("script"), dir.path())
                .env("PATH", installed())
                .args(["-qefc", &command])
                .arg(&screen),
        );
        common::until("it is started", || {
            shown().contains("udpack-client put FILE")
        });
        let seen = shown();
        running.signal("TERM");
        let _ = running.exited();
        seen
    };
    let seen = start("80");
    let link = seen.lines().find_map(|line| line.strip_prefix("web "));
    assert!(link.is_some_and(|link| link.contains("/#t=")), "{seen}");
    let picture = seen.lines().filter(|line| line.contains("\u{1b}[30;107m"));
    assert_eq!(picture.count(), 21, "{seen}");
    fs::remove_file(&screen).expect("a file");
    let seen = start("80");
    assert!(
        seen.contains("web http://") && !seen.contains("#t="),
        "{seen}"
    );
    assert!(!seen.contains("\u{1b}[30;107m"), "{seen}");
}
