//! Power cuts: the uploads lie on an ext4 of their own, whose shutdown call throws away all that is not on
//! its disk yet, the journal's unwritten part included; mounting it again replays what is.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;

use crate::ledger::leftovers;
use crate::load::{Load, Must, PATIENCE, Running};
use crate::rig::{self, Rig};
use crate::rng::Rng;

/// What to do, and how often.
#[derive(Clone, Debug, Args)]
pub(crate) struct PowerArgs {
    /// How often the power is cut.
    #[arg(long, default_value_t = 200)]
    cycles: u64,

    /// Size of the file system, in MiB.
    #[arg(long, default_value_t = 512)]
    image: u64,

    /// In every so-manieth cycle all that was interrupted must finish before the cut.
    #[arg(long, default_value_t = 10)]
    finish_every: u64,

    /// Its mounts are its own already.
    #[arg(long, hide = true)]
    inside: bool,
}

/// Starts this program anew where its mounts are its own, if that can be done: then none outlives it, however it
/// ends.
pub(crate) fn isolate(args: &PowerArgs) -> anyhow::Result<()> {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "--"]);
        command
    };
    let possible = || {
        let status = unshare().arg("true").stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    if args.inside || !rustix::process::geteuid().is_root() || !possible() {
        return Ok(());
    }
    let error = unshare()
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .arg("--inside")
        .exec();
    Err(error).context("cannot run unshare")
}

/// Runs the cycles; true when nothing was wrong, or when this machine cannot do it.
pub(crate) fn run(args: &PowerArgs, rig: &Rig, mut rng: Rng) -> anyhow::Result<bool> {
    if let Some(reason) = missing() {
        println!("SKIPPED: {reason}");
        fs::remove_dir_all(rig.work())?;
        return Ok(true);
    }
    let mut disk = Disk::new(rig.work(), args.image << 20)?;
    if let Err(error) = disk.mount("ordered") {
        println!("SKIPPED: cannot mount an image: {error:#}");
        fs::remove_dir_all(rig.work())?;
        return Ok(true);
    }
    disk.unmount()?;

    const M: u64 = 1 << 20;
    let uploads = disk.point.join("uploads");
    let port = rig::free_port(&mut rng)?;
    let mut load = Load::new(rig, port, rng, &[5 * M + 3, 8 * M, 20 * M])?;
    let began = Instant::now();
    let mut cycle = 0;
    while cycle < args.cycles && load.ledger.tally.bad() < ENOUGH {
        cycle += 1;
        // `writeback` does not order data before the journal: only what was synced can be relied on.
        disk.mount(if load.rng.chance(50) {
            "ordered"
        } else {
            "writeback"
        })?;
        load.ledger.check(&uploads, true)?;
        load.edit_some(&uploads)?;
        let finishing = cycle % args.finish_every.max(1) == 0 || cycle == args.cycles;
        if disk.used()? > if finishing { 20 } else { 40 } {
            load.clear(&uploads)?;
        }
        let mut server = rig.server(port, &uploads)?;
        let clients = 2 + load.rng.index(2);
        let mut running = load.start(clients)?;
        if finishing {
            load.settle(running, Must::Always)?;
            load.finish()?;
            running = Vec::new();
            if server.ended()?.is_some() {
                load.ledger.tally.wrong("the server ended by itself");
            }
        } else {
            // At any instant, or at once when a file is reported as stored.
            let instant = Duration::from_millis(load.rng.range(5, 300));
            let acks = match load.rng.range(0, 2) {
                0 => usize::MAX,
                more => usize::try_from(more)?,
            };
            wait(&running, instant, acks);
        }
        disk.cut()?;
        for running in &mut running {
            running.put.kill();
        }
        server.kill();
        load.settle(running, Must::Not)?;
        disk.unmount()?;
        if cycle % TELL_EVERY == 0 {
            let tally = load.ledger.tally;
            println!(
                "cycle {cycle}: {} acked, {} bad, {} interrupted, {:.3} s a cycle",
                tally.acked,
                tally.bad(),
                load.pending(),
                began.elapsed().as_secs_f64() / cycle as f64
            );
        }
    }

    disk.mount("ordered")?;
    load.ledger.check(&uploads, true)?;
    rig.server(port, &uploads)?.terminate()?;
    rig.server(port, &uploads)?.kill();
    if load.pending() == 0 {
        for name in leftovers(&uploads)? {
            load.ledger.tally.wrong(&format!("left over: {name}"));
        }
    }
    disk.unmount()?;
    for line in rig::panics(&rig.log()) {
        load.ledger.tally.wrong(&line);
    }
    let tally = load.ledger.tally;
    tally.print(cycle, began.elapsed());
    if tally.bad() == 0 {
        drop(disk);
        fs::remove_dir_all(rig.work())?;
    }
    Ok(tally.bad() == 0)
}

/// Waits for so many acks of all, `instant` without them.
fn wait(running: &[Running], instant: Duration, acks: usize) {
    let limit = if acks == usize::MAX {
        instant
    } else {
        PATIENCE.min(Duration::from_secs(2))
    };
    let began = Instant::now();
    while began.elapsed() < limit
        && running
            .iter()
            .map(|running| running.put.acks())
            .sum::<usize>()
            < acks
    {
        thread::sleep(Duration::from_micros(200));
    }
}

/// Why this machine cannot cut power.
fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".to_owned());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some("no loop devices".to_owned());
    }
    for (program, argument) in [
        ("mkfs.ext4", "-V"),
        ("xfs_io", "-V"),
        ("mount", "--version"),
    ] {
        let known = Command::new(program)
            .arg(argument)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !known {
            return Some(format!("no {program}: scripts/install-test-tools"));
        }
    }
    None
}

/// A file system in a file. Unmounted on drop.
#[derive(Debug)]
struct Disk {
    image: PathBuf,
    point: PathBuf,
    mounted: bool,
}

impl Disk {
    fn new(work: &Path, size: u64) -> anyhow::Result<Self> {
        let disk = Self {
            image: work.join("disk.img"),
            point: work.join("disk"),
            mounted: false,
        };
        fs::create_dir_all(&disk.point)?;
        File::create(&disk.image)?.set_len(size)?;
        call(
            Command::new("mkfs.ext4")
                .args(["-q", "-F"])
                .arg(&disk.image),
        )?;
        Ok(disk)
    }

    /// Mounts it, replaying its journal. No automatic help for programs that forget to sync.
    fn mount(&mut self, data: &str) -> anyhow::Result<()> {
        call(
            Command::new("mount")
                .args(["-o", &format!("loop,noauto_da_alloc,data={data}")])
                .arg(&self.image)
                .arg(&self.point),
        )?;
        self.mounted = true;
        Ok(())
    }

    /// From now on nothing reaches the disk any more, not even what was written before.
    fn cut(&self) -> anyhow::Result<()> {
        call(
            Command::new("xfs_io")
                .args(["-x", "-c", "shutdown"])
                .arg(&self.point),
        )
    }

    fn unmount(&mut self) -> anyhow::Result<()> {
        let mut tries = 0;
        loop {
            match call(Command::new("umount").arg(&self.point)) {
                Ok(()) => break,
                Err(error) if tries >= 100 => return Err(error),
                // A killed process's descriptors may still be on their way out.
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
            tries += 1;
        }
        self.mounted = false;
        Ok(())
    }

    /// How full it is, in percent.
    fn used(&self) -> anyhow::Result<u64> {
        let stat = rustix::fs::statvfs(&self.point)?;
        Ok(100 - stat.f_bavail.min(stat.f_blocks) * 100 / stat.f_blocks.max(1))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            let _ = call(Command::new("umount").arg("-l").arg(&self.point));
        }
    }
}

fn call(command: &mut Command) -> anyhow::Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!(
            "{name}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// After so many findings the run ends: the first ones tell.
const ENOUGH: u64 = 20;
const TELL_EVERY: u64 = 50;
