//! Runs each example as a program of its own: it must end by itself, well, and with the line it
//! promises.
//!
//! cargo builds examples before it runs tests, but tells tests not where: they lie next to this one.

use std::env::consts::EXE_SUFFIX;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

#[test]
fn echo() {
    assert_eq!(
        last_line("echo"),
        "closed here: normal (0x00): that was all"
    );
}

#[test]
fn chat() {
    assert_eq!(
        last_line("chat"),
        "eve, who slept, heard some and knows of each that she missed"
    );
}

#[test]
fn history() {
    assert_eq!(
        last_line("history"),
        "ann has heard six seven and of 0 gone"
    );
}

#[test]
fn presence() {
    assert_eq!(last_line("presence"), "here: ann");
}

#[test]
fn rpc() {
    assert_eq!(last_line("rpc"), "ponder: no reply within 50ms");
}

#[test]
fn sink() {
    assert_eq!(
        last_line("sink"),
        "2 bodies of 20971537 bytes are in the archive"
    );
}

#[test]
fn telemetry() {
    assert_eq!(last_line("telemetry"), "all are in the harbour");
}

#[test]
fn upload() {
    assert_eq!(last_line("upload"), "20971537 bytes are stored");
}

#[test]
fn fetch() {
    assert_eq!(
        last_line("fetch"),
        "20971520 bytes of beach.jpg are in memory"
    );
}

#[test]
fn web() {
    assert_eq!(last_line("web"), "nobody is left");
}

fn last_line(example: &str) -> String {
    let mut child = Command::new(program(example))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the example is built, try `cargo build --examples`");
    let mut stdout = child.stdout.take().expect("a pipe");
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        let read = stdout.read_to_string(&mut text).map(|_| text);
        let _ = sender.send(read);
    });
    let Ok(text) = receiver.recv_timeout(Duration::from_secs(60)) else {
        child.kill().expect("it still runs");
        panic!("{example} did not end within a minute");
    };
    let text = text.expect("its output is text");
    assert!(child.wait().expect("it has ended").success(), "{text}");
    text.lines().last().unwrap_or_default().to_owned()
}

fn program(example: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let profile = test.parent().and_then(|deps| deps.parent());
    let examples = profile.expect("tests lie in `deps`").join("examples");
    examples.join(format!("{example}{EXE_SUFFIX}"))
}
