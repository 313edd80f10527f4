//! Runs the binaries in directories of their own: every wait is bounded, every process ends with its handle.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, UNIX_EPOCH};

use serde_json::Value;
use tempfile::TempDir;

/// The longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn workdir() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Without the caller's settings, which would decide what is tested.
pub(crate) fn quiet(mut command: Command, dir: &Path) -> Command {
    for (name, _) in std::env::vars_os() {
        let ours = name.to_string_lossy();
        let proxy = ours.to_lowercase().ends_with("_proxy");
        if ours.starts_with("UDPACK_") || ours == "RUST_LOG" || proxy {
            command.env_remove(&name);
        }
    }
    command.env("XDG_STATE_HOME", dir.join(".state"));
    // Nor those of a configuration.
    command.env("XDG_CONFIG_HOME", dir.join(".config"));
    command.current_dir(dir).stdin(Stdio::null());
    command
}

pub(crate) fn client(dir: &Path) -> Command {
    quiet(Command::new(env!("CARGO_BIN_EXE_udpack-client")), dir)
}

pub(crate) fn server(dir: &Path) -> Command {
    quiet(Command::new(env!("CARGO_BIN_EXE_udpack-server")), dir)
}

/// Says that something was not tested, past the test harness, which would swallow it.
pub(crate) fn skipped(what: &str) {
    let _ = writeln!(io::stderr(), "skipped: {what}");
}

/// Whether there is such a program; says so if there is none.
pub(crate) fn has_program(program: &str, version: &str) -> bool {
    let found = quiet(Command::new(program), Path::new("/"))
        .arg(version)
        .output();
    if found.is_err() {
        skipped(&format!("no program `{program}`"));
    }
    found.is_ok()
}

/// Waits for something that comes about by itself.
pub(crate) fn until(what: &str, mut come: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !come() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct Exited {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command to its end.
pub(crate) fn exited(command: &mut Command) -> Exited {
    Running::spawn(command).exited()
}

/// A process, killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
    stdout: String,
    errors: Receiver<String>,
    stderr: String,
}

impl Running {
    pub(crate) fn spawn(command: &mut Command) -> Self {
        Self::spawn_with(command.stdout(Stdio::piped()))
    }

    /// With the standard output that the command has been given.
    pub(crate) fn spawn_with(command: &mut Command) -> Self {
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let lines = lines_of(child.stdout.take());
        let errors = lines_of(child.stderr.take());
        Self {
            child,
            lines,
            stdout: String::new(),
            errors,
            stderr: String::new(),
        }
    }

    /// Waits for a line on standard error that contains this.
    pub(crate) fn told(&mut self, text: &str) -> String {
        loop {
            match self.errors.recv_timeout(PATIENCE) {
                Ok(line) => {
                    self.stderr.push_str(&line);
                    self.stderr.push('\n');
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(_) => panic!("{text:?} was not told: {}", self.stderr),
            }
        }
    }

    /// The next line on standard output.
    pub(crate) fn line(&mut self) -> String {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                self.stdout.push_str(&line);
                self.stdout.push('\n');
                line
            }
            Err(RecvTimeoutError::Timeout) => panic!("no line in time after: {}", self.stdout),
            Err(RecvTimeoutError::Disconnected) => {
                let out = self.exited();
                panic!("ended: {out:?}");
            }
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill")
            .args([&format!("-{signal}"), &self.child.id().to_string()])
            .status();
        assert!(sent.is_ok_and(|status| status.success()), "kill -{signal}");
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    /// Waits for the end; everything it wrote is in the answer.
    pub(crate) fn exited(&mut self) -> Exited {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "did not end after: {}",
                self.stdout
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        for line in self.lines.iter() {
            self.stdout.push_str(&line);
            self.stdout.push('\n');
        }
        for line in self.errors.iter() {
            self.stderr.push_str(&line);
            self.stderr.push('\n');
        }
        Exited {
            code: status.code().unwrap_or(-1),
            stdout: std::mem::take(&mut self.stdout),
            stderr: std::mem::take(&mut self.stderr),
        }
    }
}

/// What a process writes, line by line.
fn lines_of(output: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, lines) = channel();
    if let Some(output) = output {
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let line = line.map(|line| String::from_utf8_lossy(&line).into_owned());
                if line.is_ok_and(|line| sender.send(line).is_err()) {
                    break;
                }
            }
        });
    }
    lines
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server on a free loopback port, in a directory of its own.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) running: Running,
    pub(crate) dir: TempDir,
    pub(crate) lines: Vec<(String, String)>,
    /// The last line of its start, which can be pasted.
    pub(crate) paste: String,
    url: String,
}

/// The URL of a server that was started here and printed this line; empty where no token is known in plain.
pub(crate) fn url(dir: &Path, paste: &str) -> String {
    let command = paste
        .strip_prefix("UDPACK_URL=\"$(")
        .and_then(|rest| rest.strip_suffix(")\" udpack-client put FILE"))
        .expect("a line that can be pasted");
    let mut shell = quiet(Command::new("sh"), dir);
    let out = exited(shell.env("PATH", installed()).args(["-c", command]));
    out.stdout.trim_end().to_owned()
}

/// The programs under their own names, as after an installation: for `PATH`.
pub(crate) fn installed() -> String {
    let bin = Path::new(env!("CARGO_BIN_EXE_udpack-client")).parent();
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{path}", bin.expect("a directory").display())
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_in(workdir(), &[])
    }

    pub(crate) fn start_in(dir: TempDir, args: &[&str]) -> Self {
        Self::start_at("127.0.0.1:0", dir, args)
    }

    /// On this address: for a server that comes back.
    pub(crate) fn start_at(address: &str, dir: TempDir, args: &[&str]) -> Self {
        let mut program = server(dir.path());
        program.args(["--listen", address]).args(args);
        Self::started(program, dir)
    }

    /// By this command, whose directory this is.
    pub(crate) fn started(mut program: Command, dir: TempDir) -> Self {
        let mut running = Running::spawn(&mut program);
        let mut lines = Vec::new();
        let paste = loop {
            let line = running.line();
            if line.starts_with("UDPACK_URL=") {
                break line;
            }
            let (label, value) = line.split_once(' ').expect("a label and a value");
            lines.push((label.to_owned(), value.to_owned()));
        };
        let url = url(dir.path(), &paste);
        Self {
            running,
            dir,
            lines,
            paste,
            url,
        }
    }

    pub(crate) fn value(&self, label: &str) -> &str {
        let line = self.lines.iter().find(|(known, _)| known == label);
        &line.expect("the label is printed").1
    }

    pub(crate) fn url(&self) -> String {
        self.url.clone()
    }

    /// Runs a client of it, in this directory.
    pub(crate) fn client(&self, dir: &Path, args: &[&str]) -> Exited {
        exited(client(dir).env("UDPACK_URL", self.url()).args(args))
    }

    /// The URL with another token.
    pub(crate) fn url_with(&self, token: &str) -> String {
        let url = self.url();
        let (_, rest) = url.split_once('@').expect("a token");
        format!("udpack://{token}@{rest}")
    }

    /// Makes a token and gives its URL.
    pub(crate) fn new_token(&self, args: &[&str]) -> String {
        let out = exited(server(self.dir.path()).args(["token", "new"]).args(args));
        assert_eq!(out.code, 0, "{out:?}");
        let token = out
            .stdout
            .lines()
            .find_map(|line| line.strip_prefix("token "));
        self.url_with(token.expect("a token is printed"))
    }

    pub(crate) fn uploads(&self) -> PathBuf {
        self.dir.path().join(self.value("uploads"))
    }

    /// A fresh client is served.
    pub(crate) fn still_works(&self) {
        let args = ["ping", "-c", "1"];
        let out = exited(
            client(self.dir.path())
                .env("UDPACK_URL", self.url())
                .args(args),
        );
        assert_eq!(out.code, 0, "{out:?}");
    }

    /// Kills it.
    pub(crate) fn stop(self) -> TempDir {
        drop(self.running);
        self.dir
    }

    /// Asks it to end; gives its exit code.
    pub(crate) fn terminate(mut self, signal: &str) -> (i32, TempDir) {
        self.running.signal(signal);
        (self.running.exited().code, self.dir)
    }
}

/// A small file system, for filling it.
#[derive(Debug)]
pub(crate) struct Tmpfs(PathBuf);

impl Tmpfs {
    /// None where this user may not mount.
    pub(crate) fn mount(at: &Path, size: &str) -> Option<Self> {
        fs::create_dir(at).expect("mkdir");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "udpack-test"])
            .arg(at)
            .stderr(Stdio::null())
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then(|| Self(at.to_owned()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Bytes that repeat nowhere, so that a misplaced chunk shows.
pub(crate) fn bytes(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&[seed])
        .finalize_xof()
        .fill(&mut out);
    out
}

pub(crate) fn events(stdout: &str) -> Vec<Value> {
    stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

pub(crate) fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    events
        .iter()
        .filter(|event| event["event"] == name)
        .collect()
}

pub(crate) fn result(stdout: &str) -> Value {
    let events = events(stdout);
    let results = named(&events, "result");
    assert_eq!(results.len(), 1, "exactly one result: {stdout}");
    assert_eq!(events.last(), Some(results[0]), "the result comes last");
    results[0].clone()
}

pub(crate) fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("metadata").mode() & 0o777
}

pub(crate) fn is_root(dir: &Path) -> bool {
    fs::metadata(dir).expect("metadata").uid() == 0
}

/// Files below a directory, without the server's own.
pub(crate) fn visible(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("uploads");
    entries
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .filter(|name| !name.starts_with('.'))
        .collect()
}

pub(crate) fn staged(uploads: &Path) -> usize {
    fs::read_dir(uploads.join(".udpack/staging")).map_or(0, Iterator::count)
}

/// One sentence and one hint, no trace of the program's insides.
pub(crate) fn assert_error(stderr: &str) {
    let errors = stderr
        .lines()
        .filter(|line| line.starts_with("error: "))
        .count();
    let hints = stderr
        .lines()
        .filter(|line| line.starts_with("hint: "))
        .count();
    assert_eq!((errors, hints), (1, 1), "{stderr}");
    assert!(
        !stderr.contains("backtrace") && !stderr.contains("panicked"),
        "{stderr}"
    );
}

/// What there is at a path: content or target, mode, modification time.
pub(crate) type Tree = BTreeMap<String, (Vec<u8>, u32, i64, i64)>;

/// Everything below a directory, but for what udpack keeps for itself.
pub(crate) fn tree(root: &Path) -> Tree {
    try_tree(root).expect("a tree that nobody changes")
}

/// The same of a tree that may change meanwhile.
///
/// # Errors
/// When an entry is gone before it was read.
pub(crate) fn try_tree(root: &Path) -> io::Result<Tree> {
    let mut all = Tree::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.strip_prefix(root).expect("below");
            let name = udpack_transfer::names::from_os(name.as_os_str()).into_owned();
            if name == ".udpack" {
                continue;
            }
            let metadata = fs::symlink_metadata(&path)?;
            let content = if metadata.is_dir() {
                dirs.push(path);
                b"dir".to_vec()
            } else if metadata.is_symlink() {
                fs::read_link(&path)?.into_os_string().into_encoded_bytes()
            } else {
                fs::read(&path)?
            };
            // The times of a link itself do not travel.
            let time = match metadata.is_symlink() {
                true => (0, 0),
                false => (metadata.mtime(), metadata.mtime_nsec()),
            };
            let stat = (content, metadata.mode() & 0o777, time.0, time.1);
            all.insert(name, stat);
        }
    }
    Ok(all)
}

pub(crate) fn write(path: &Path, content: &[u8]) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
    fs::write(path, content).expect("write");
}

/// Gives a file or directory a mode and a time of its own.
pub(crate) fn age(path: &Path, mode: u32, secs: u64, nanos: u32) {
    let file = File::open(path).expect("open");
    file.set_modified(UNIX_EPOCH + Duration::new(secs, nanos))
        .expect("a time");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
}

/// Names that are hard on quoting, encodings and limits; empty files and directories; files of all sizes.
pub(crate) fn odd_tree(root: &Path) {
    let long = format!("{}.bin", "n".repeat(196));
    let wide = "\u{65e5}".repeat(66);
    let deep = ["deep"; 28].join("/");
    let files = [
        "plain".to_owned(),
        "with  spaces in it.txt".to_owned(),
        "it's \"quoted\" $(not run) `nor this` & that; 100 %".to_owned(),
        "\u{e9}t\u{e9}/gr\u{fc}\u{df}e/\u{65e5}\u{672c}\u{8a9e} \u{1f40c}.txt".to_owned(),
        "a*b[c]?{d}".to_owned(),
        "tilde~ #hash @at +plus =eq ,comma".to_owned(),
        format!("dir/{long}"),
        wide,
        format!("{deep}/leaf"),
        "dir/empty file".to_owned(),
        "UPPER".to_owned(),
        "upper".to_owned(),
    ];
    for (number, name) in files.iter().enumerate() {
        let len = match number {
            9 => 0,
            0 => 3 << 20,
            number => number * number * 7919,
        };
        write(
            &root.join(name),
            &bytes(len, u8::try_from(number).expect("few")),
        );
    }
    fs::create_dir_all(root.join("nothing in here/nor here")).expect("mkdir");
    for (number, name) in files.iter().enumerate() {
        let number = u32::try_from(number).expect("few");
        let mode = [0o644, 0o600, 0o755, 0o440][number as usize % 4];
        age(
            &root.join(name),
            mode,
            1_000_000_000 + u64::from(number) * 86_400,
            number * 1_000_003,
        );
    }
    for (secs, name) in [(1, "dir"), (1_234_567_890, "nothing in here"), (5, &*deep)] {
        age(&root.join(name), 0o750, secs, 500_000_000);
    }
}
