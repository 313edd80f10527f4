//! Starts the sides of each arm, in turns, and gathers what they tell.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, bail, ensure};

use crate::args::{Arm, Asked, Load, Options, Scenario};
use crate::peer::{MARK, Memory, Ready, Report};
use crate::report::{Machine, Outcome, Run};
use crate::{nats, programs};

/// Measures all of the scenarios and prints the results.
pub(crate) fn run(scenarios: &[Scenario], options: &Options) -> anyhow::Result<()> {
    let machine = Machine::here()?;
    if !options.json {
        println!("{machine}");
    }
    let mut outcomes = Vec::new();
    for &scenario in scenarios {
        let with = |sockets| Asked {
            sockets: Some(sockets),
            ..options.asked.clone()
        };
        // Where several are measured, so are both sides of those that depend on it most.
        let all = scenarios.len() > 1 && options.asked.sockets.is_none();
        let loads = match scenario {
            Scenario::Messages | Scenario::Ping if all => {
                vec![scenario.load(&with(1)), scenario.load(&with(100))]
            }
            _ => vec![scenario.load(&options.asked)],
        };
        for load in loads {
            let outcome = measure(scenario, load, options)?;
            if !options.json {
                println!("\n{outcome}");
            }
            outcomes.push(outcome);
        }
    }
    if options.json {
        let scenarios: Vec<_> = outcomes.iter().map(Outcome::json).collect();
        let result = serde_json::json!({
            "machine": machine,
            "command": env::args().collect::<Vec<_>>(),
            "rounds": options.rounds,
            "listen": options.listen,
            "server_via": options.server_via,
            "client_via": options.client_via,
            "scenarios": scenarios,
        });
        println!("{result}");
    }
    Ok(())
}

pub(crate) fn measure(
    scenario: Scenario,
    load: Load,
    options: &Options,
) -> anyhow::Result<Outcome> {
    let chosen = |arm: &Arm| {
        let chosen = options.only.is_empty() || options.only.contains(arm);
        if chosen && *arm == Arm::Nats && !nats::installed() {
            eprintln!("SKIPPED: no nats-server: scripts/install-test-tools");
            return false;
        }
        chosen
    };
    let arms: Vec<Arm> = scenario.arms().iter().copied().filter(chosen).collect();
    ensure!(
        !arms.is_empty(),
        "{} has none of these arms",
        scenario.name()
    );
    let mut runs: Vec<(Arm, Vec<Run>)> = arms.into_iter().map(|arm| (arm, Vec::new())).collect();
    let bench = Bench::new(scenario, &load, options)?;
    // Memory has nothing to warm up: its processes are new each time.
    let first = u32::from(scenario == Scenario::Idle);
    for round in first..=options.rounds {
        for (arm, runs) in &mut runs {
            let run = bench
                .run(*arm)
                .with_context(|| format!("{} by {}", scenario.name(), arm.name()))?;
            // Round 0 only warms up.
            if round > 0 {
                runs.push(run);
            }
        }
    }
    Ok(Outcome {
        scenario,
        load,
        runs,
    })
}

/// One scenario, ready to be run by any arm.
pub(crate) struct Bench<'a> {
    pub(crate) scenario: Scenario,
    pub(crate) load: &'a Load,
    pub(crate) options: &'a Options,
    /// What the arms work on and into.
    pub(crate) files: Option<programs::Files>,
    program: PathBuf,
}

impl<'a> Bench<'a> {
    fn new(scenario: Scenario, load: &'a Load, options: &'a Options) -> anyhow::Result<Self> {
        Ok(Self {
            scenario,
            load,
            options,
            files: programs::Files::of(scenario, load, options)?,
            program: env::current_exe()?,
        })
    }

    /// One turn of an arm.
    fn run(&self, arm: Arm) -> anyhow::Result<Run> {
        let before = cpu("self", Whose::Children)?;
        let told = match (self.scenario, arm) {
            (Scenario::Upload | Scenario::SmallFiles, Arm::Udpack) => programs::run(self)?,
            (Scenario::Idle, _) => {
                let counting = self.program.with_file_name("udpack-bench-heap");
                ensure!(
                    counting.exists(),
                    "{} is missing: build all of -p udpack-bench",
                    counting.display()
                );
                self.pair(arm, &counting)?
            }
            _ => self.pair(arm, &self.program)?,
        };
        for metric in self.scenario.metrics() {
            ensure!(
                told.values
                    .get(metric.name)
                    .is_some_and(|value| value.is_finite()),
                "nothing was told about {}",
                metric.name
            );
        }
        Ok(Run {
            values: told.values,
            lost: told.lost,
            cpu: cpu("self", Whose::Children)? - before,
        })
    }

    /// A server and a client of their own.
    fn pair(&self, arm: Arm, program: &Path) -> anyhow::Result<Report> {
        let target = match (self.scenario, arm, &self.files) {
            (Scenario::Interference, Arm::Udpack, Some(files)) => Some(files.target()?),
            _ => None,
        };
        let mut command = self.command(&self.options.server_via, program);
        self.common(command.arg("serve"), arm);
        command
            .arg("--listen")
            .arg(SocketAddr::new(self.options.listen, 0).to_string());
        if let Some(target) = &target {
            command.arg("--dir").arg(target.path());
        }
        let mut server = Side::start(&mut command)?;
        let ready: Ready = serde_json::from_str(&server.line()?)?;

        let mut command = self.command(&self.options.client_via, program);
        self.common(command.arg("drive"), arm);
        command.arg("--connect").arg(ready.address.to_string());
        command.arg("--key").arg(&ready.key);
        if let (Scenario::SmallFiles, Some(files)) = (self.scenario, &self.files) {
            command.arg("--dir").arg(files.source());
        }
        let mut client = Side::start(&mut command)?;
        let mut memory: Vec<Memory> = Vec::new();
        let told = loop {
            let line = client.line()?;
            if line.trim() != MARK {
                break line;
            }
            server.tell()?;
            memory.push(serde_json::from_str(&server.line()?)?);
            client.tell()?;
        };
        let mut told: Report = serde_json::from_str(&told)?;
        if let [before, after, later] = memory.as_slice() {
            let (rss, heap) = before.each(*after, self.load.sockets);
            let share = (later.cpu - after.cpu) / self.load.seconds;
            told = told.value("server RSS", rss);
            told = told.value("server idle CPU", share * 100.0);
            if let Some(heap) = heap {
                told = told.value("server heap", heap);
            }
        }
        client.end()?;
        server.end()?;
        Ok(told)
    }

    fn common(&self, command: &mut Command, arm: Arm) {
        let load = self.load;
        command.args([self.scenario.name(), arm.name()]);
        command.arg("--bytes").arg(load.bytes.to_string());
        command.arg("--sockets").arg(load.sockets.to_string());
        command.arg("--count").arg(load.count.to_string());
        command.arg("--seconds").arg(load.seconds.to_string());
        if let Some(workers) = load.workers {
            command.arg("--workers").arg(workers.to_string());
        }
    }

    /// A program, started by what it is to be started by.
    pub(crate) fn command(&self, via: &str, program: &Path) -> Command {
        let mut words = via.split_whitespace();
        match words.next() {
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(program);
                command
            }
            None => Command::new(program),
        }
    }
}

/// A process whose standard input and output are ours. Killed when dropped.
pub(crate) struct Side {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Side {
    pub(crate) fn start(command: &mut Command) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let output = child.stdout.take().context("no standard output")?;
        Ok(Self {
            input: child.stdin.take(),
            output: BufReader::new(output),
            child,
        })
    }

    /// The next line it prints.
    pub(crate) fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("ended early: {}", self.child.wait()?);
        }
        Ok(line)
    }

    /// Gives it an empty line.
    fn tell(&mut self) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("no standard input")?;
        Ok(input.write_all(b"\n")?)
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends its standard input and waits for it to end well.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.input = None;
        let status = self.child.wait()?;
        ensure!(status.success(), "ended badly: {status}");
        Ok(())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // It has ended already, unless something went wrong.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whose processor time.
#[derive(Clone, Copy)]
pub(crate) enum Whose {
    Own = 11,
    /// All children that were waited for, and theirs.
    Children = 13,
}

/// Seconds of processor time by a process's number, or `self`.
pub(crate) fn cpu(process: &str, whose: Whose) -> anyhow::Result<f64> {
    let path = format!("/proc/{process}/stat");
    let stat = fs::read_to_string(&path)?;
    // The program's name may hold anything; it ends with the last parenthesis.
    let (_, fields) = stat.rsplit_once(')').context(path)?;
    let fields = fields.split_whitespace().skip(whose as usize);
    let mut times = fields.map(str::parse::<u64>);
    let mut time = || times.next().context("no times")?.context("not a time");
    let ticks = time()? + time()?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}
