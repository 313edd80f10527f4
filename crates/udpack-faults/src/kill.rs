//! SIGKILL of the server, of clients, or of both, at random instants of mixed uploads.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use crate::ledger::leftovers;
use crate::load::{Load, Must, Running};
use crate::rig::{self, Rig};
use crate::rng::Rng;

/// What to do, and how often.
#[derive(Clone, Debug, Args)]
pub(crate) struct KillArgs {
    /// How often something is killed.
    #[arg(long, default_value_t = 500)]
    cycles: u64,

    /// Whether a client that outlives its server must finish by itself once it is back.
    #[arg(long, value_enum, default_value_t = Recovery::On)]
    recovery: Recovery,

    /// In every so-manieth cycle nothing is killed, and all that was interrupted must finish.
    #[arg(long, default_value_t = 10)]
    finish_every: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Recovery {
    On,
    Off,
}

/// Whom a cycle kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Nobody,
    Both,
    Clients,
    Server,
}

/// Runs the cycles; true when nothing was wrong.
pub(crate) fn run(args: &KillArgs, rig: &Rig, mut rng: Rng) -> anyhow::Result<bool> {
    const M: u64 = 1 << 20;
    let uploads = rig.work().join("uploads");
    let port = rig::free_port(&mut rng)?;
    let mut load = Load::new(rig, port, rng, &[5 * M + 3, 8 * M, 24 * M, 70 * M])?;
    let mut server = rig.server(port, &uploads)?;
    let began = Instant::now();
    let mut cycle = 0;
    let mut times: BTreeMap<Victim, (u32, Duration)> = BTreeMap::new();
    while cycle < args.cycles && load.ledger.tally.bad() < ENOUGH {
        cycle += 1;
        let victim = match load.rng.range(0, 99) {
            _ if cycle % args.finish_every.max(1) == 0 || cycle == args.cycles => Victim::Nobody,
            0..50 => Victim::Both,
            50..75 => Victim::Clients,
            75..95 if args.recovery == Recovery::On => Victim::Server,
            98.. => Victim::Server,
            _ => Victim::Both,
        };
        let clients = 2 + load.rng.index(2);
        let started = Instant::now();
        let mut running = load.start(clients)?;
        let instant = Duration::from_millis(load.rng.range(5, 300));
        match victim {
            Victim::Nobody => {
                load.settle(running, Must::Always)?;
                load.finish()?;
                load.ledger.check(&uploads, false)?;
                if cycle % CLEAR_EVERY < args.finish_every && cycle != args.cycles {
                    load.clear(&uploads)?;
                }
            }
            Victim::Both => {
                thread::sleep(instant);
                // Either may be the first to be gone.
                if load.rng.chance(50) {
                    kill_all(&mut running);
                    server.kill();
                } else {
                    server.kill();
                    kill_all(&mut running);
                }
                load.settle(running, Must::Not)?;
                load.ledger.check(&uploads, false)?;
                load.edit_some(&uploads)?;
                server = rig.server(port, &uploads)?;
            }
            Victim::Clients => {
                thread::sleep(instant);
                if load.rng.chance(50) {
                    kill_all(&mut running);
                } else if let Some(first) = running.first_mut() {
                    first.put.kill();
                }
                load.settle(running, Must::Not)?;
                load.ledger.check(&uploads, false)?;
            }
            Victim::Server => {
                thread::sleep(instant);
                server.kill();
                thread::sleep(Duration::from_millis(load.rng.range(0, 40)));
                server = rig.server(port, &uploads)?;
                let must = match args.recovery {
                    Recovery::On => Must::OnceMet,
                    Recovery::Off => Must::Not,
                };
                load.settle(running, must)?;
                load.ledger.check(&uploads, false)?;
            }
        }
        let (count, time) = times.entry(victim).or_default();
        *count += 1;
        *time += started.elapsed();
        if server.ended()?.is_some() {
            load.ledger.tally.wrong("the server ended by itself");
            server = rig.server(port, &uploads)?;
        }
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

    if let Err(error) = server.terminate() {
        load.ledger.tally.wrong(&format!("{error:#}"));
    }
    server = rig.server(port, &uploads)?;
    load.ledger.check(&uploads, true)?;
    if load.pending() == 0 {
        for name in leftovers(&uploads)? {
            load.ledger.tally.wrong(&format!("left over: {name}"));
        }
    }
    server.kill();
    for line in rig::panics(&rig.log()) {
        load.ledger.tally.wrong(&line);
    }
    for (victim, (count, time)) in &times {
        let each = time.as_secs_f64() / f64::from(*count);
        println!("killed {victim:?}: {count} cycles, {each:.3} s each");
    }
    let tally = load.ledger.tally;
    tally.print(cycle, began.elapsed());
    if tally.bad() == 0 {
        fs::remove_dir_all(rig.work())?;
    }
    Ok(tally.bad() == 0)
}

fn kill_all(running: &mut [Running]) {
    for running in running {
        running.put.kill();
    }
}

/// After so many findings the run ends: the first ones tell.
const ENOUGH: u64 = 20;
const TELL_EVERY: u64 = 50;
/// So many cycles' files may pile up.
const CLEAR_EVERY: u64 = 50;
