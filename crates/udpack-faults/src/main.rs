//! Breaks the real programs on purpose and looks what became of the files: `kill` sends SIGKILL at random instants,
//! `power` cuts the power of the server's file system, `syscalls` fails single system calls of the server, `mirror` edits both
//! sides of a `sync` and kills it, `pipes` kills what writes into a `put`. `cluster` breaks several servers and the broker between
//! them, and looks what became of messages. `store` kills a server whose files go to an object store.
//!
//! Everything random follows from a seed, which is printed first. The times at which things happen are the
//! machine's, so that a seed replays what is done and not each interleaving.

mod cluster;
mod kill;
mod ledger;
mod load;
mod mirror;
mod pipes;
mod power;
mod rig;
mod rng;
mod store;
mod syscalls;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Parser, Subcommand};

use crate::rig::Rig;
use crate::rng::Rng;

/// Breaks udpack-server and udpack-client on purpose and checks that no file is lost or changed.
///
/// Ends with 0 if none was, or if the machine cannot run the test, which it says with SKIPPED.
#[derive(Debug, Parser)]
#[command(name = "udpack-faults", version)]
struct Arguments {
    #[command(subcommand)]
    fault: Fault,

    /// Repeats the run that printed this seed.
    #[arg(long, global = true)]
    seed: Option<u64>,

    /// Where udpack-server and udpack-client are. Default: where this program is.
    #[arg(long, global = true, value_name = "DIR")]
    bin_dir: Option<PathBuf>,

    /// Where to work. Default: a directory of its own among the temporary files; removed if all went well.
    #[arg(long, global = true, value_name = "DIR")]
    work: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Fault {
    /// Kill the server, clients or both at random instants of mixed uploads.
    Kill(kill::KillArgs),
    /// Cut the power of the server's file system at random instants; needs root and a loop device.
    Power(power::PowerArgs),
    /// Edit both sides of a mirror while it runs, and kill it or the server at random instants.
    Mirror(mirror::MirrorArgs),
    /// Kill commands that write into an upload, files that grow, servers and clients below them.
    Pipes(pipes::PipeArgs),
    /// Kill nodes of a cluster, pause and empty its broker, cut nodes off it; needs nats-server.
    Cluster(cluster::ClusterArgs),
    /// Kill a server whose files go to an object store, and let the store answer nothing for a while; needs moto_server.
    Store(store::StoreArgs),
    /// Fail each system call of an upload in the server; needs strace.
    Syscalls(syscalls::SyscallArgs),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(1, |now| u64::from(now.subsec_nanos()) ^ now.as_secs())
    });
    match run(&arguments, seed) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            println!("FAILED, seed {seed}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments, seed: u64) -> anyhow::Result<bool> {
    if let Fault::Power(args) = &arguments.fault {
        power::isolate(args)?;
    }
    let rig = Rig::new(arguments.bin_dir.as_deref(), arguments.work.as_deref())?;
    println!("seed {seed}, in {}", rig.work().display());
    let rng = Rng::new(seed);
    match &arguments.fault {
        Fault::Kill(args) => kill::run(args, &rig, rng),
        Fault::Power(args) => power::run(args, &rig, rng),
        Fault::Mirror(args) => mirror::run(args, &rig, rng),
        Fault::Pipes(args) => pipes::run(args, &rig, rng),
        Fault::Cluster(args) => cluster::run(args, &rig, rng),
        Fault::Store(args) => store::run(args, &rig, rng),
        Fault::Syscalls(args) => syscalls::run(args, rig, rng),
    }
}
