//! The progress bar on a terminal: lost connections, terminals that change their width.

mod common;

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Running, Server, bytes, exited, has_program, installed, quiet, until, workdir};
use tempfile::TempDir;

#[test]
fn the_bar_says_that_it_reconnects_and_goes_on() {
    if !has_program("script", "--version") {
        return;
    }
    let first = Server::start();
    let address = first.value("listening").to_owned();
    let dir = workdir();
    let content = bytes(8 << 20, 6);
    fs::write(dir.path().join("file"), &content).expect("write");
    let screen = dir.path().join("screen");
    let shown = || {
        let shown = fs::read(&screen).unwrap_or_default();
        String::from_utf8_lossy(&shown).into_owned()
    };
    let command = "stty cols 20; exec udpack-client put file --bwlimit 2M";
    let mut running = Running::spawn(
        quiet(Command::new("script"), dir.path())
            .env("PATH", installed())
            .env("TERM", "xterm")
            .env("UDPACK_URL", first.url())
            .args(["-qefc", command])
            .arg(&screen),
    );
    until("bytes arrive", || shown().contains("MiB/s"));
    let second = Server::start_at(&address, first.stop(), &[]);
    let out = running.exited();
    assert_eq!(out.code, 0, "{out:?}");
    let shown = shown();
    let (_, after) = shown
        .split_once(" % reconnecting\u{1b}[J\r")
        .unwrap_or_else(|| panic!("the bar does not say it: {shown:?}"));
    let (_, after) = after
        .split_once("connected again\r\n")
        .unwrap_or_else(|| panic!("it does not end: {after:?}"));
    assert!(!after.contains(" % reconnecting"), "{after:?}");
    assert!(after.contains("B/s\u{1b}[J\r"), "{after:?}");
    assert!(fs::read(second.uploads().join("file")).expect("stored") == content);
}

#[test]
fn a_command_may_ask_at_the_terminal() {
    if !has_program("script", "--version") {
        return;
    }
    let server = Server::start();
    let dir = workdir();
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let command =
        "exec udpack-client put --as asked --from-command 'read word </dev/tty; echo $word'";
    let mut running = Running::spawn(
        quiet(Command::new("script"), dir.path())
            .env("PATH", installed())
            .env("TERM", "xterm")
            .env("UDPACK_URL", server.url())
            .args(["-qefc", command, "screen"])
            .stdin(Stdio::from(reader)),
    );
    writer.write_all(b"secret\n").expect("it reads");
    let out = running.exited();
    assert_eq!(out.code, 0, "{out:?}");
    let stored = fs::read(server.uploads().join("asked")).expect("stored");
    assert_eq!(stored, b"secret\n");
}

/// A terminal of a size of its own, ended when this is dropped.
struct Terminal {
    socket: TempDir,
}

impl Terminal {
    fn tmux(&self, args: &[&str]) -> String {
        let mut tmux = quiet(Command::new("tmux"), self.socket.path());
        tmux.env_remove("TMUX").env("PATH", installed());
        let out = exited(tmux.args(["-f", "/dev/null", "-S", "socket"]).args(args));
        assert_eq!(out.code, 0, "tmux {args:?}: {out:?}");
        out.stdout
    }

    fn start(columns: &str, dir: &Path, url: &str, command: &str) -> Self {
        let terminal = Self { socket: workdir() };
        let dir = dir.to_str().expect("utf-8");
        let url = format!("UDPACK_URL={url}");
        let size = ["-d", "-x", columns, "-y", "12", "-c", dir, "-e", &url];
        terminal.tmux(&[&["new-session"], &size[..], &[command]].concat());
        terminal
    }

    /// The lines that are not empty, those that have left the screen included.
    fn lines(&self) -> Vec<String> {
        let shown = self.tmux(&["capture-pane", "-p", "-S", "-"]);
        let lines = shown.lines().map(str::trim_end);
        lines
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let mut tmux = quiet(Command::new("tmux"), self.socket.path());
        let _ = tmux.args(["-S", "socket", "kill-server"]).output();
    }
}

#[test]
fn a_terminal_that_changes_its_width_keeps_no_remains_of_the_bar() {
    if !has_program("tmux", "-V") {
        return;
    }
    let server = Server::start();
    let dir = workdir();
    let name = "a-long-name-of-a-file-東京の写真.bin";
    fs::write(dir.path().join(name), bytes(60 << 20, 6)).expect("write");
    // On a screen that is not full yet, tmux moves the cursor to another line.
    let command = format!("seq 20; exec udpack-client put --bwlimit 1M {name}");
    let before: Vec<String> = (1..=20).map(|n| n.to_string()).collect();
    let terminal = Terminal::start("120", dir.path(), &server.url(), &command);
    for (columns, has, lacks) in [
        (120, "写真.bin", "\u{1b}"),
        (40, "eta", "["),
        (20, "/s", "eta"),
        (120, "写真.bin", "\u{1b}"),
        (20, "/s", "eta"),
        (60, "写真.bin", "["),
    ] {
        terminal.tmux(&["resize-window", "-x", &columns.to_string()]);
        until(&format!("one line on {columns} columns"), || {
            let lines = terminal.lines();
            let Some((bar, others)) = lines.split_last() else {
                return false;
            };
            let fits = bar.chars().count() < columns;
            others == before && fits && bar.contains(has) && !bar.contains(lacks)
        });
    }
}
