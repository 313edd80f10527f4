//! A `nats-server` for the tests, and waits for what servers hear over it.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::future::Future;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use udpack::{ClusterState, Server};

/// Everything that must happen does so in this time, on a machine with other work as well.
pub(crate) async fn bounded<F: Future>(future: F) -> F::Output {
    match tokio::time::timeout(Duration::from_secs(120), future).await {
        Ok(output) => output,
        Err(_) => panic!("the test took longer than 120 s"),
    }
}

/// A `nats-server` on a port of its own.
pub(crate) struct Broker {
    port: u16,
    config: tempfile::NamedTempFile,
    /// What it keeps, if it keeps anything.
    store: tempfile::TempDir,
    child: Child,
}

impl Broker {
    /// `None`, said aloud, where it is not installed.
    pub(crate) fn start(max_payload: &str) -> Option<Self> {
        Self::with(max_payload, false)
    }

    /// One that keeps histories, over its restarts as well.
    pub(crate) fn keeping() -> Option<Self> {
        Self::with("2MB", true)
    }

    fn with(max_payload: &str, keeps: bool) -> Option<Self> {
        let port = free_port();
        let mut config = tempfile::NamedTempFile::new().expect("a file");
        write!(
            config,
            "listen: \"127.0.0.1:{port}\"\nmax_payload: {max_payload}\n"
        )
        .expect("written");
        let store = tempfile::tempdir().expect("a directory");
        if keeps {
            let path = store.path().display();
            writeln!(config, "jetstream {{ store_dir: \"{path}\" }}").expect("written");
        }
        let child = run(&config)?;
        let broker = Self {
            port,
            config,
            store,
            child,
        };
        broker.wait();
        Some(broker)
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Until it accepts connections.
    fn wait(&self) {
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = Pid::from_child(&self.child);
        kill_process(id, signal).expect("the broker runs");
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What it keeps.
    pub(crate) fn store(&self) -> &Path {
        self.store.path()
    }

    /// With nothing left of what it knew, but for what it keeps.
    pub(crate) fn restart(&mut self) {
        self.child = run(&self.config).expect("it ran before");
        self.wait();
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that no connection from here gets by chance, as those of the system's own choice are above these.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 10_000) as u16;
    loop {
        let port = 20_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

fn run(config: &tempfile::NamedTempFile) -> Option<Child> {
    let started = Command::new("nats-server")
        .arg("-c")
        .arg(config.path())
        .env(
            "PATH",
            format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default()),
        )
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match started {
        Ok(child) => Some(child),
        Err(error) => {
            println!("SKIPPED: no nats-server ({error}): scripts/install-test-tools");
            None
        }
    }
}

/// How many other nodes a server hears.
pub(crate) fn heard(server: &Server) -> usize {
    let nodes = server.cluster().expect("a node").nodes();
    nodes.iter().filter(|node| !node.lost).count()
}

pub(crate) async fn reaches(server: &Server, state: ClusterState) {
    let mut view = server.cluster().expect("a node");
    while view.state() != state {
        view.changed().await;
    }
}
