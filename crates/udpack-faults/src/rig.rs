//! The programs under test as child processes: started, killed, listened to.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::UdpSocket;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::rng::Rng;

/// Longest start of a server.
const START: Duration = Duration::from_secs(20);
/// How often a wait for a child looks.
const POLL: Duration = Duration::from_micros(500);

/// The programs, and what all runs of them have in common. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Rig {
    bins: PathBuf,
    /// Everything that is written lies here, uploads on another file system aside.
    work: PathBuf,
    /// Arguments for every `put`.
    put_args: Vec<String>,
    /// Set for every program.
    env: Vec<(String, String)>,
}

impl Rig {
    /// Finds the programs and makes the directory for a run.
    pub(crate) fn new(bins: Option<&Path>, work: Option<&Path>) -> anyhow::Result<Self> {
        let bins = match bins {
            Some(bins) => bins.to_owned(),
            None => {
                let own = std::env::current_exe().context("cannot find this program")?;
                own.parent().unwrap_or_else(|| Path::new(".")).to_owned()
            }
        };
        for name in [SERVER, CLIENT] {
            ensure!(
                bins.join(name).is_file(),
                "no {name} in {}: build it (cargo build --release) or say --bin-dir",
                bins.display()
            );
        }
        let work = match work {
            Some(work) => work.to_owned(),
            None => std::env::temp_dir().join(format!("udpack-faults-{}", std::process::id())),
        };
        fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
        Ok(Self {
            bins: fs::canonicalize(bins)?,
            work: fs::canonicalize(work)?,
            put_args: Vec::new(),
            env: Vec::new(),
        })
    }

    /// Where the programs are.
    pub(crate) fn bins(&self) -> &Path {
        &self.bins
    }

    /// Where this run's files lie.
    pub(crate) fn work(&self) -> &Path {
        &self.work
    }

    /// Where the keys and the token lie.
    pub(crate) fn keys(&self) -> PathBuf {
        self.work.join(KEYS)
    }

    /// Where this run's servers leave their log.
    pub(crate) fn log(&self) -> PathBuf {
        self.work.join("server.log")
    }

    /// The same with another directory for what is written, below this one. The key and the token are shared.
    pub(crate) fn below(&self, name: &str) -> anyhow::Result<Self> {
        let work = self.work.join(name);
        fs::create_dir_all(&work)?;
        let keys = work.join(KEYS);
        if !keys.exists() {
            std::os::unix::fs::symlink(self.work.join(KEYS), keys)?;
        }
        Ok(Self {
            work,
            ..self.clone()
        })
    }

    /// The same with these variables set for every program.
    pub(crate) fn with_env(mut self, variables: &[(&str, &str)]) -> Self {
        let pairs = variables.iter();
        let pairs = pairs.map(|&(name, value)| (name.to_owned(), value.to_owned()));
        self.env.extend(pairs);
        self
    }

    /// Whether the server has this flag.
    pub(crate) fn server_knows(&self, flag: &str) -> anyhow::Result<bool> {
        let help = self.command(SERVER).arg("--help").output()?;
        Ok(String::from_utf8_lossy(&help.stdout).contains(flag))
    }

    /// Adds arguments to every `put`, if the client knows the first of them; whether it does.
    pub(crate) fn put_args_if_known(&mut self, args: &[&str]) -> anyhow::Result<bool> {
        let help = Command::new(self.bins.join(CLIENT))
            .args(["put", "--help"])
            .output()?;
        let help = String::from_utf8_lossy(&help.stdout);
        let known = args.first().is_some_and(|flag| help.contains(flag));
        if known {
            self.put_args.extend(args.iter().map(|&arg| arg.to_owned()));
        }
        Ok(known)
    }

    /// Starts a server and waits until it listens.
    pub(crate) fn server(&self, port: u16, uploads: &Path) -> anyhow::Result<Server> {
        self.server_with(port, uploads, &[])
    }

    /// As [`server`](Self::server), with more arguments.
    pub(crate) fn server_with(
        &self,
        port: u16,
        uploads: &Path,
        arguments: &[&str],
    ) -> anyhow::Result<Server> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())?;
        let mut child = self
            .command(SERVER)
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .args(["--max-file", "none", "--json"])
            // The disk has no say in what an object store takes.
            .args(match arguments.contains(&"--store") {
                true => &[][..],
                false => &["--min-free", "0"],
            })
            .arg("--dir")
            .arg(uploads)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot start the server")?;
        let (lines, _) = follow(child.stdout.take())?;
        match lines.recv_timeout(START) {
            Ok(line) if line.get("listening").is_some() => Ok(Server { child, port }),
            other => {
                stop(&mut child);
                bail!(
                    "the server did not start: {other:?}; its log: {}",
                    self.log().display()
                )
            }
        }
    }

    /// Starts an upload of `files` into the directory `to` at the server.
    pub(crate) fn put(
        &self,
        port: u16,
        files: &[PathBuf],
        to: Option<&str>,
    ) -> anyhow::Result<Put> {
        let mut command = self.command(CLIENT);
        command
            .args(["put", "--json", "--progress", "none"])
            .args(["--to", &format!("127.0.0.1:{port}")])
            .args(&self.put_args);
        if let Some(to) = to {
            command.args(["--as", &format!("{to}/")]);
        }
        command.args(files);
        self.start(command)
    }

    /// Starts any command of the client that moves files, with these arguments, in this directory.
    pub(crate) fn client(&self, port: u16, dir: &Path, arguments: &[&str]) -> anyhow::Result<Put> {
        let mut command = self.command(CLIENT);
        let (name, arguments) = arguments.split_first().context("no command")?;
        command
            .args([*name, "--json", "--progress", "none"])
            .args(["--to", &format!("127.0.0.1:{port}")])
            .args(arguments);
        let token = self.work.join(TOKEN);
        if token.exists() {
            command.arg("--token-file").arg(token);
        }
        command.current_dir(dir);
        self.start(command)
    }

    /// Starts a client; what it has to say goes into one log.
    fn start(&self, mut command: Command) -> anyhow::Result<Put> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.work.join("client.log"))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot start a client")?;
        let (lines, acks) = follow(child.stdout.take())?;
        Ok(Put { child, lines, acks })
    }

    /// Makes a token that may do everything with files, for [`client`](Self::client).
    pub(crate) fn token(&self) -> anyhow::Result<()> {
        let made = self
            .command(SERVER)
            .args(["token", "new", "faults", "--scope", "read,write,delete"])
            .output()?;
        let told = String::from_utf8_lossy(&made.stdout);
        let token = told.lines().find_map(|line| line.strip_prefix("token "));
        let token = token.with_context(|| format!("no token was made: {made:?}"))?;
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(self.work.join(TOKEN))?;
        Ok(file.write_all(token.as_bytes())?)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.bins.join(name));
        for (variable, _) in std::env::vars_os() {
            if variable
                .to_str()
                .is_some_and(|name| name.starts_with("UDPACK_") || name == "RUST_LOG")
            {
                command.env_remove(variable);
            }
        }
        command.env("UDPACK_KEYS", self.work.join(KEYS));
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }
}

/// A free port that no client's socket takes while the server is away: below the ephemeral ones.
pub(crate) fn free_port(rng: &mut Rng) -> anyhow::Result<u16> {
    for _ in 0..1000 {
        let port = u16::try_from(rng.range(15_000, 30_000))?;
        if UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free UDP port from 15000 to 30000")
}

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Where it listens.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and the end of it.
    pub(crate) fn kill(mut self) {
        stop(&mut self.child);
    }

    /// Whether it ended by itself.
    pub(crate) fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// SIGTERM; an error unless it then ends with success.
    pub(crate) fn terminate(mut self) -> anyhow::Result<()> {
        signal(&self.child, Signal::TERM)?;
        match wait(&mut self.child, START)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the server ended with {status} after SIGTERM"),
            None => {
                stop(&mut self.child);
                bail!("the server did not end after SIGTERM")
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        stop(&mut self.child);
    }
}

/// A running `udpack-client put`.
#[derive(Debug)]
pub(crate) struct Put {
    child: Child,
    lines: Receiver<Value>,
    acks: Arc<AtomicUsize>,
}

/// What a client told, up to its end.
#[derive(Debug, Default)]
pub(crate) struct PutReport {
    /// Name and hash of each file it said is stored.
    pub(crate) acked: Vec<(String, String)>,
    /// Why others are not, in its words.
    pub(crate) errors: Vec<String>,
    /// Whether it ended by itself and with success.
    pub(crate) success: bool,
    /// It had to be killed because it did not end in time.
    pub(crate) stuck: bool,
    /// It ended over the network before it sent a byte: nobody was there when it came, which it does not try again.
    pub(crate) unmet: bool,
}

impl Put {
    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Whether it ended.
    pub(crate) fn ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Files it said are stored, so far.
    pub(crate) fn acks(&self) -> usize {
        self.acks.load(Ordering::Acquire)
    }

    /// Listens to it until it ends; kills it if that takes longer than `patience`.
    pub(crate) fn finish(mut self, patience: Duration) -> anyhow::Result<PutReport> {
        let deadline = Instant::now() + patience;
        let mut told = PutReport::default();
        loop {
            match self
                .lines
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) => told.take(&line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    told.stuck = true;
                    self.kill();
                    for line in self.lines.iter() {
                        told.take(&line);
                    }
                    break;
                }
            }
        }
        told.success = self.child.wait()?.success();
        Ok(told)
    }
}

impl Drop for Put {
    fn drop(&mut self) {
        stop(&mut self.child);
    }
}

impl PutReport {
    fn take(&mut self, line: &Value) {
        let text = |key: &str| line.get(key).and_then(Value::as_str);
        if is_ack(line) {
            let (name, hash) = (text("path"), text("hash"));
            self.acked.push((
                name.unwrap_or_default().to_owned(),
                hash.unwrap_or_default().to_owned(),
            ));
        } else if let Some(error) = text("error") {
            let path = text("path").unwrap_or("all");
            self.errors.push(format!("{path}: {error}"));
            let none = |key: &str| line.get(key).and_then(Value::as_u64) == Some(0);
            self.unmet = text("error_kind") == Some("network") && none("sent") && none("failed");
        }
    }
}

fn is_ack(line: &Value) -> bool {
    line.get("event").is_some_and(|event| event == "file")
        && line.get("status").is_some_and(|status| status == "ok")
}

/// Reads JSON lines on a thread of their own, so that nothing a child tells is lost when it dies.
fn follow(stdout: Option<ChildStdout>) -> anyhow::Result<(Receiver<Value>, Arc<AtomicUsize>)> {
    let stdout = stdout.context("no standard output")?;
    let (sender, receiver) = channel();
    let acks = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&acks);
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            // A line cut off by a kill tells nothing.
            let Ok(line) = serde_json::from_slice::<Value>(&line) else {
                continue;
            };
            let ack = is_ack(&line);
            let _ = sender.send(line);
            if ack {
                counted.fetch_add(1, Ordering::Release);
            }
        }
    });
    Ok((receiver, acks))
}

/// Waits for a child for so long.
pub(crate) fn wait(child: &mut Child, patience: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// Sends a signal to a child that was not waited for yet.
pub(crate) fn signal(child: &Child, signal: Signal) -> anyhow::Result<()> {
    let pid = Pid::from_raw(i32::try_from(child.id())?).context("no process")?;
    Ok(kill_process(pid, signal)?)
}

fn stop(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Lines of the servers' log that tell of a panic.
pub(crate) fn panics(log: &Path) -> Vec<String> {
    let text = fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter(|line| line.contains("panicked at"))
        .map(str::to_owned)
        .collect()
}

const SERVER: &str = "udpack-server";
const CLIENT: &str = "udpack-client";
const KEYS: &str = "keys";
const TOKEN: &str = "token";
