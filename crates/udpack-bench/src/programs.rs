//! The arm of the real programs: `udpack-client put` to a running `udpack-server`, from its start to its exit.

use std::env;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tempfile::TempDir;

use crate::args::{Load, Options, Scenario};
use crate::driver::{Bench, Side};
use crate::peer::Report;

/// Files in one directory of a tree.
const FANOUT: u64 = 100;
/// Where there is memory to keep files in.
const MEMORY: &str = "/dev/shm";

/// What is sent, and where to.
pub(crate) struct Files {
    dir: TempDir,
}

impl Files {
    /// Makes what a scenario sends, if it sends files.
    pub(crate) fn of(
        scenario: Scenario,
        load: &Load,
        options: &Options,
    ) -> anyhow::Result<Option<Self>> {
        let parent = match &options.dir {
            Some(dir) => dir.clone(),
            None if Path::new(MEMORY).is_dir() => MEMORY.into(),
            None => env::temp_dir(),
        };
        let files = Self {
            dir: TempDir::with_prefix_in("udpack-bench.", parent)?,
        };
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
        match scenario {
            Scenario::Upload => noise.write(&files.source(), load.bytes)?,
            Scenario::SmallFiles => {
                for nth in 0..load.count {
                    let dir = files.source().join(format!("dir-{:04}", nth / FANOUT));
                    if nth % FANOUT == 0 {
                        fs::create_dir_all(&dir)?;
                    }
                    noise.write(&dir.join(format!("file-{nth:06}")), load.bytes)?;
                }
            }
            Scenario::Interference => {}
            _ => return Ok(None),
        }
        Ok(Some(files))
    }

    /// The file or tree to send.
    pub(crate) fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    /// Has the system hold as much free memory as this twice over. What is free, a hypervisor may have taken back, and
    /// who asks for it first would pay for that: 0.3 to 2.5 s for 1 GiB.
    fn touch_memory(&self, bytes: u64) -> anyhow::Result<()> {
        if self.dir.path().starts_with(MEMORY) {
            let path = self.dir.path().join("touched");
            let mut file = File::create(&path)?;
            std::io::copy(&mut std::io::repeat(0).take(2 * bytes), &mut file)?;
            fs::remove_file(path)?;
        }
        Ok(())
    }

    /// An empty directory to receive into.
    pub(crate) fn target(&self) -> anyhow::Result<TempDir> {
        Ok(TempDir::new_in(self.dir.path())?)
    }
}

/// Bytes that no two files share: xorshift64 (Marsaglia, 2003).
struct Noise(u64);

impl Noise {
    fn write(&mut self, path: &Path, size: u64) -> anyhow::Result<()> {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        let mut left = size;
        while left > 0 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let word = self.0.to_le_bytes();
            let step = left.min(word.len() as u64);
            file.write_all(word.get(..step as usize).unwrap_or(&word))?;
            left -= step;
        }
        Ok(file.flush()?)
    }
}

/// Starts a server, sends the files to it, and compares what has arrived with what was sent.
pub(crate) fn run(bench: &Bench<'_>) -> anyhow::Result<Report> {
    let files = bench.files.as_ref().context("there is nothing to send")?;
    let target = files.target()?;
    let all = match bench.scenario {
        Scenario::SmallFiles => bench.load.bytes.saturating_mul(bench.load.count),
        _ => bench.load.bytes,
    };
    files.touch_memory(all)?;
    let (uploads, keys) = (target.path().join("uploads"), target.path().join("keys"));

    let server = program("udpack-server")?;
    let mut server = clean(bench.command(&bench.options.server_via, &server));
    server.arg("--listen").arg(format!(
        "{}:0",
        match bench.options.listen {
            std::net::IpAddr::V4(address) => address.to_string(),
            std::net::IpAddr::V6(address) => format!("[{address}]"),
        }
    ));
    server.arg("--dir").arg(&uploads).arg("--keys").arg(&keys);
    server.args(["--min-free", "0", "--json", "-q"]);
    let mut server = Side::start(&mut server)?;
    let Listening { listening } = serde_json::from_str(&server.line()?)?;

    let client = program("udpack-client")?;
    let mut client = clean(bench.command(&bench.options.client_via, &client));
    client.arg("put").arg(files.source());
    client.args(["--to", &listening, "--progress", "none", "-q"]);
    client.arg("--keys").arg(&keys);
    client.stdin(Stdio::null()).stdout(Stdio::null());
    let begun = Instant::now();
    let status = client.status().context("cannot start udpack-client")?;
    let took = begun.elapsed().as_secs_f64();
    ensure!(status.success(), "udpack-client: {status}");

    if let Some(pid) = i32::try_from(server.id()).ok().and_then(Pid::from_raw) {
        kill_process(pid, Signal::TERM)?;
    }
    server.end()?;
    let count = compare(&files.source(), &uploads.join("source"))?;
    let rate = match bench.scenario {
        Scenario::Upload => bench.load.bytes as f64 / took / 1e6,
        _ => {
            ensure!(count == bench.load.count, "{count} files have arrived");
            count as f64 / took
        }
    };
    Ok(Report::default().value("rate", rate))
}

#[derive(Deserialize)]
struct Listening {
    listening: String,
}

/// A program of this repository that lies beside this one.
fn program(name: &str) -> anyhow::Result<PathBuf> {
    let path = env::current_exe()?.with_file_name(name);
    ensure!(
        path.exists(),
        "{} is missing: cargo build --release --locked -p udpack-cli -p udpack-bench",
        path.display()
    );
    Ok(path)
}

/// Without the settings of whoever runs this.
fn clean(mut command: Command) -> Command {
    for (name, _) in env::vars_os() {
        let ours = name
            .to_str()
            .is_some_and(|name| name.starts_with("UDPACK_"));
        if ours || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command
}

/// Compares a file or a tree with what has become of it, and says how many files it has.
fn compare(sent: &Path, got: &Path) -> anyhow::Result<u64> {
    if !sent.is_dir() {
        let open = |path: &Path| {
            let file =
                File::open(path).with_context(|| format!("{} is missing", path.display()))?;
            anyhow::Ok(BufReader::with_capacity(1 << 20, file))
        };
        ensure!(
            equal(open(sent)?, open(got)?)?,
            "{} differs from what was sent",
            got.display()
        );
        return Ok(1);
    }
    let mut count = 0;
    for entry in fs::read_dir(sent)? {
        let name = entry?.file_name();
        count += compare(&sent.join(&name), &got.join(&name))?;
    }
    Ok(count)
}

fn equal(mut sent: impl Read, mut got: impl Read) -> anyhow::Result<bool> {
    let (mut expected, mut found) = (Vec::new(), Vec::new());
    loop {
        expected.clear();
        found.clear();
        let piece = 1 << 20;
        let size = sent.by_ref().take(piece).read_to_end(&mut expected)?;
        got.by_ref().take(piece).read_to_end(&mut found)?;
        if expected != found {
            return Ok(false);
        }
        if size == 0 {
            return Ok(true);
        }
    }
}

/// All files below a directory, in no order.
pub(crate) fn walk(dir: &Path, found: &mut impl FnMut(&Path) -> bool) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, found)?;
        } else if !found(&path) {
            bail!("nobody wants the files any more");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_what_differs() {
        let dir = TempDir::new().expect("a directory");
        let (sent, got) = (dir.path().join("sent"), dir.path().join("got"));
        for tree in [&sent, &got] {
            fs::create_dir_all(tree.join("below")).expect("a directory");
            fs::write(tree.join("one"), "1").expect("a file");
            fs::write(tree.join("below/two"), "22").expect("a file");
        }
        assert_eq!(compare(&sent, &got).expect("both are there"), 2);
        fs::write(got.join("below/two"), "23").expect("a file");
        assert!(compare(&sent, &got).is_err());
        fs::write(got.join("below/two"), "2").expect("a file");
        assert!(compare(&sent, &got).is_err());
        fs::remove_file(got.join("below/two")).expect("a file");
        assert!(compare(&sent, &got).is_err());
    }

    #[test]
    fn noise_has_the_size_that_is_asked_for() {
        let dir = TempDir::new().expect("a directory");
        let path = dir.path().join("noise");
        for size in [0, 1, 8, 4097] {
            Noise(1).write(&path, size).expect("written");
            assert_eq!(fs::metadata(&path).expect("a file").len(), size);
        }
    }
}
