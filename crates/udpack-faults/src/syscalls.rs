//! One failing system call at a time: strace lets the N-th call of a kind fail in the server, or kills the server at
//! it, while files are uploaded.
//!
//! strace attaches after the start, so that calls count from the first byte of an upload. A first, undisturbed
//! trace tells which calls an upload makes on the files, how often, and which of them the runtime makes as well;
//! those are failed by path only, for a runtime whose own wake-up fails may well stop.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use rustix::process::Signal;

use crate::ledger::{Ledger, Source, leftovers, make_sources};
use crate::load::MANY;
use crate::rig::{self, PutReport, Rig, Server};
use crate::rng::Rng;
use crate::trace::{self, Call};

/// What to do, and how often.
#[derive(Clone, Debug, Args)]
pub(crate) struct SyscallArgs {
    /// How many runs in which a call was failed. Less than there are faults leaves some out, more repeats none.
    #[arg(long, default_value_t = 300)]
    runs: usize,

    /// Runs side by side.
    #[arg(long, default_value_t = 3)]
    jobs: usize,

    /// Only this call.
    #[arg(long)]
    only: Option<String>,
}

/// Runs the faults; true when nothing was wrong, or when this machine cannot do it.
pub(crate) fn run(args: &SyscallArgs, mut rig: Rig, mut rng: Rng) -> anyhow::Result<bool> {
    if let Err(reason) = can_trace() {
        println!("SKIPPED: {reason}");
        fs::remove_dir_all(rig.work())?;
        return Ok(true);
    }
    // A client that gives up early saves time; one that does not is as good.
    rig.put_args_if_known(&["--retries", "2"])?;
    // The first start makes the keys that all runs share.
    rig.server(rig::free_port(&mut rng)?, &rig.work().join("first"))?
        .terminate()?;

    let mut faults = Vec::new();
    let profiles = profiles(&rig, &mut rng)?;
    for profile in &profiles {
        let calls = profile.learn(&mut rng)?;
        println!("{}: {}", profile.name, told(&calls));
        for (name, known) in calls {
            if args.only.as_ref().is_none_or(|only| *only == name) {
                faults.extend(known.faults(profile, &name));
            }
        }
    }
    // Every call and error once, then the later and the lasting ones.
    rng.shuffle(&mut faults);
    faults.sort_by_key(|fault| fault.round);

    let state = Mutex::new(State {
        queue: faults.into(),
        wanted: args.runs,
        ..State::default()
    });
    let began = Instant::now();
    let results: Vec<anyhow::Result<()>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..args.jobs.max(1))
            .map(|_| {
                let rng = Rng::new(rng.next());
                scope.spawn(|| work(&state, rng))
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| bail!("a worker ended early"))
            })
            .collect()
    });
    results.into_iter().collect::<anyhow::Result<()>>()?;
    let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);

    for (call, (runs, acked)) in &state.by_call {
        println!("{call}: {runs} runs, in {acked} of them all files were stored at once");
    }
    println!(
        "{:.3} s a run, {} faults were not met",
        began.elapsed().as_secs_f64() / state.runs.max(1) as f64,
        state.missed
    );
    println!("runs {} / wrong {}", state.runs, state.wrong);
    if state.wrong == 0 {
        fs::remove_dir_all(rig.work())?;
    }
    Ok(state.wrong == 0)
}

/// What the workers share.
#[derive(Debug, Default)]
struct State<'a> {
    queue: VecDeque<Fault<'a>>,
    wanted: usize,
    taken: usize,
    runs: usize,
    missed: usize,
    wrong: usize,
    by_call: BTreeMap<String, (usize, usize)>,
}

fn work(state: &Mutex<State<'_>>, mut rng: Rng) -> anyhow::Result<()> {
    let lock = || state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let (number, mut fault) = {
            let mut state = lock();
            if state.runs + state.missed + state.wrong > 0
                && (state.runs >= state.wanted || state.wrong >= ENOUGH)
            {
                return Ok(());
            }
            let Some(fault) = state.queue.pop_front() else {
                return Ok(());
            };
            state.taken += 1;
            (state.taken, fault)
        };
        let told = fault.to_string();
        let verdict = fault.run(number, &mut rng).with_context(|| told.clone())?;
        let mut state = lock();
        if !verdict.met {
            fault.missed += 1;
            if fault.missed < TRIES {
                state.queue.push_back(fault);
            } else {
                state.missed += 1;
            }
        } else {
            state.runs += 1;
            let (runs, stored) = state.by_call.entry(fault.call.clone()).or_default();
            *runs += 1;
            *stored += usize::from(verdict.stored);
            if state.runs % TELL_EVERY == 0 {
                println!("run {}: {} wrong", state.runs, state.wrong);
            }
        }
        if !verdict.wrong.is_empty() {
            state.wrong += 1;
            println!("WRONG: run {number}, {told}");
            for what in &verdict.wrong {
                println!("  {what}");
            }
        }
    }
}

/// A kind of upload.
#[derive(Debug)]
struct Profile {
    name: &'static str,
    rig: Rig,
    sources: Vec<Source>,
    /// What the upload directory is like before.
    template: Option<PathBuf>,
}

/// An upload of a few files; one of many small ones; one of files that are there already; one that lasts long enough for
/// a checkpoint; one that is resumed.
fn profiles(rig: &Rig, rng: &mut Rng) -> anyhow::Result<Vec<Profile>> {
    const K: u64 = 1 << 10;
    let plain = rig.below("plain")?;
    let sources = make_sources(&plain.work().join("files"), &[700 * K, 1600 * K, 0], rng)?;
    let mut profiles = vec![Profile {
        name: "plain",
        rig: plain,
        sources,
        template: None,
    }];

    let many = rig.below("many")?;
    let sizes: Vec<u64> = (0..MANY).map(|nth| 200 * nth).collect();
    let sources = make_sources(&many.work().join("files"), &sizes, rng)?;
    profiles.push(Profile {
        name: "many",
        rig: many,
        sources,
        template: None,
    });

    let again = rig.below("again")?;
    let sources = make_sources(&again.work().join("files"), &[700 * K, 1600 * K], rng)?;
    let template = again.work().join("template");
    let server = again.server(rig::free_port(rng)?, &template)?;
    let told = again
        .put(server.port(), &paths(&sources), Some(DIR))?
        .finish(PATIENCE)?;
    server.terminate()?;
    if !told.success {
        bail!("an undisturbed upload failed: {:?}", told.errors);
    }
    profiles.push(Profile {
        name: "again",
        rig: again,
        sources,
        template: Some(template),
    });

    let mut slow = rig.below("slow")?;
    if !slow.put_args_if_known(&["--bwlimit", "1M"])? {
        println!("SKIPPED: checkpoints and resuming: the client knows no --bwlimit");
        return Ok(profiles);
    }
    let sources = make_sources(&slow.work().join("files"), &[1600 * K], rng)?;
    profiles.push(Profile {
        name: "checkpoint",
        rig: slow,
        sources,
        template: None,
    });

    let resumed = rig.below("resumed")?;
    let mut slow = resumed.clone();
    slow.put_args_if_known(&["--bwlimit", "1M"])?;
    let sources = make_sources(&resumed.work().join("files"), &[3000 * K], rng)?;
    let template = resumed.work().join("template");
    let server = slow.server(rig::free_port(rng)?, &template)?;
    let put = slow.put(server.port(), &paths(&sources), Some(DIR))?;
    let journals =
        || leftovers(&template).map(|left| left.iter().any(|n| n.starts_with("journal")));
    let deadline = Instant::now() + Duration::from_secs(5);
    while !journals()? && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    server.kill();
    drop(put);
    if journals()? {
        profiles.push(Profile {
            name: "resumed",
            rig: resumed,
            sources,
            template: Some(template),
        });
    } else {
        println!("SKIPPED: resuming: the server writes no journal");
    }
    Ok(profiles)
}

/// How an upload uses one system call.
#[derive(Clone, Debug, Default)]
struct Known {
    /// Most calls on the files by one thread: strace counts by thread.
    most: usize,
    /// The runtime makes it as well.
    shared: bool,
    /// Paths below the upload directory that it was made on, in every trace.
    paths: BTreeSet<String>,
}

impl Profile {
    /// Traces uploads that nothing disturbs.
    fn learn(&self, rng: &mut Rng) -> anyhow::Result<BTreeMap<String, Known>> {
        let mut all: BTreeMap<String, Known> = BTreeMap::new();
        for number in 0..LESSONS {
            let mut stage = Stage::new(self, &format!("learn-{number}"), rng)?;
            stage.attach(&[])?;
            let told = stage.put(&self.sources)?;
            if !told.success {
                bail!("an undisturbed upload failed: {:?}", told.errors);
            }
            let root = stage.uploads.to_string_lossy().into_owned();
            let calls = stage.end_trace()?;
            let mut lesson: BTreeMap<String, Known> = BTreeMap::new();
            let mut counts: BTreeMap<(String, u32), usize> = BTreeMap::new();
            for call in calls.iter().filter(|call| !SPARED.contains(&&*call.name)) {
                let known = lesson.entry(call.name.clone()).or_default();
                if call.text.contains(&root) {
                    *counts.entry((call.name.clone(), call.thread)).or_default() += 1;
                    known.paths.extend(call.paths_below(&root));
                } else {
                    known.shared = true;
                }
            }
            for ((name, _), count) in counts {
                if let Some(known) = lesson.get_mut(&name) {
                    known.most = known.most.max(count);
                }
            }
            for (name, known) in lesson.into_iter().filter(|(_, known)| known.most > 0) {
                let before = all.entry(name).or_insert_with(|| Known {
                    paths: known.paths.clone(),
                    ..Known::default()
                });
                before.most = before.most.max(known.most);
                before.shared |= known.shared;
                before.paths.retain(|path| known.paths.contains(path));
            }
            stage.clean()?;
        }
        all.retain(|name, known| {
            let told_apart = !known.shared || !known.paths.is_empty();
            if !told_apart {
                println!(
                    "{}: {name} cannot be told from the runtime's own",
                    self.name
                );
            }
            told_apart
        });
        Ok(all)
    }
}

fn told(calls: &BTreeMap<String, Known>) -> String {
    let each = calls.iter().map(|(name, known)| {
        let mark = if known.shared { "*" } else { "" };
        format!("{name}{mark} {}", known.most)
    });
    format!(
        "most calls by one thread (*: by path): {}",
        each.collect::<Vec<_>>().join(", ")
    )
}

impl Known {
    /// Each error, and the kill, at the first call; from then on; at later ones.
    fn faults<'a>(&self, profile: &'a Profile, call: &str) -> Vec<Fault<'a>> {
        let last = self.most;
        let places = [
            (1, false),
            (1, true),
            (last, false),
            (2, false),
            (2, true),
            (3, false),
            (last / 2, false),
            (4, false),
            (3, true),
            (last, true),
        ];
        let mut faults = Vec::new();
        let mut seen = BTreeSet::new();
        for (round, (at, lasting)) in places.into_iter().enumerate() {
            if at < 1 || at > last || !seen.insert((at, lasting)) {
                continue;
            }
            for action in ACTIONS {
                if lasting && action == KILL {
                    continue;
                }
                faults.push(Fault {
                    profile,
                    call: call.to_owned(),
                    action,
                    at,
                    lasting,
                    paths: if self.shared {
                        self.paths.iter().cloned().collect()
                    } else {
                        Vec::new()
                    },
                    round,
                    missed: 0,
                });
            }
        }
        faults
    }
}

/// What is to happen at one call.
#[derive(Debug)]
struct Fault<'a> {
    profile: &'a Profile,
    call: String,
    /// An error's name, or [`KILL`].
    action: &'static str,
    /// The call of a thread, from 1.
    at: usize,
    /// This and all that follow.
    lasting: bool,
    /// Only calls on these, below the upload directory; on anything when empty.
    paths: Vec<String>,
    round: usize,
    /// Runs in which the call was not made: which thread makes how many is chance.
    missed: usize,
}

impl std::fmt::Display for Fault<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let more = if self.lasting {
            " and all later ones"
        } else {
            ""
        };
        write!(
            f,
            "{}: {} at {} {}{more}",
            self.profile.name, self.action, self.call, self.at
        )
    }
}

/// What a run showed.
#[derive(Debug, Default)]
struct Verdict {
    /// The call was made, so that the fault happened.
    met: bool,
    /// All files were stored at once.
    stored: bool,
    wrong: Vec<String>,
}

impl Fault<'_> {
    fn run(&self, number: usize, rng: &mut Rng) -> anyhow::Result<Verdict> {
        let mut verdict = Verdict::default();
        let sources = &self.profile.sources;
        let mut stage = Stage::new(self.profile, &format!("run-{number}"), rng)?;
        let mut ledger = Ledger::new(sources.clone());
        for source in 0..sources.len() {
            ledger.mean(&name(DIR, source), source);
            ledger.mean(&name(LATER, source), source);
        }
        let kills = self.action == KILL;
        let action = if kills { "signal" } else { "error" };
        let more = if self.lasting { "+" } else { "" };
        let mut arguments = vec![
            "-e".to_owned(),
            format!(
                "inject={}:{action}={}:when={}{more}",
                self.call, self.action, self.at
            ),
        ];
        for path in &self.paths {
            arguments.push("-P".to_owned());
            arguments.push(stage.uploads.join(path).to_string_lossy().into_owned());
        }
        arguments.push("-e".to_owned());
        // Without a path to look at, what follows a failed sync is looked at as well.
        let syncs = !kills && self.paths.is_empty() && SYNCS.contains(&&*self.call);
        arguments.push(if syncs {
            format!("trace={},{FOLLOWED}", SYNCS.join(","))
        } else {
            format!("trace={}", self.call)
        });
        stage.attach(&arguments)?;

        // The first upload: some of it may be stored, all of that must be right.
        let told = stage.put_unless_killed(sources, kills)?;
        let ended = stage.server()?.ended()?;
        if ended.is_some() && !kills {
            verdict.wrong.push(format!("the server ended: {ended:?}"));
        }
        let calls = stage.end_trace()?;
        verdict.met = if kills {
            ended.is_some()
        } else {
            calls.iter().any(|call| call.injected)
        };
        verdict.stored = told.success;
        if told.stuck {
            verdict.wrong.push("the client did not end".to_owned());
        }
        note(&mut ledger, &told, DIR);
        if syncs {
            verdict.wrong.extend(trace::published_unsynced(&calls));
        }
        ledger.check(&stage.uploads, false)?;

        // The fault is over: the server goes on as if nothing had been.
        if ended.is_none() {
            let told = stage.put_to(LATER, sources)?;
            if !told.success {
                let what = format!("an upload after the fault failed: {:?}", told.errors);
                verdict.wrong.push(what);
            }
            note(&mut ledger, &told, LATER);
        }
        stage.restart(rng)?;
        let told = stage.put(sources)?;
        if !told.success {
            let what = format!("the same upload after a restart failed: {:?}", told.errors);
            verdict.wrong.push(what);
        }
        note(&mut ledger, &told, DIR);
        ledger.check(&stage.uploads, true)?;
        let left = stage.left()?;
        if !left.is_empty() {
            verdict.wrong.push(format!("left over: {left:?}"));
        }
        verdict.wrong.extend(rig::panics(&stage.rig.log()));
        if ledger.tally.bad() > 0 {
            verdict.wrong.push(format!("{:?}", ledger.tally));
        }
        if verdict.wrong.is_empty() {
            stage.clean()?;
        }
        Ok(verdict)
    }
}

fn note(ledger: &mut Ledger, told: &PutReport, dir: &str) {
    for (path, hash) in &told.acked {
        let source = (0..ledger.sources.len()).find(|&source| *path == name(dir, source));
        match source {
            Some(source) => ledger.ack(path, source, hash),
            None => ledger
                .tally
                .wrong(&format!("stored under a name not asked for: {path}")),
        }
    }
}

/// One run's directory, server and strace.
#[derive(Debug)]
struct Stage {
    rig: Rig,
    uploads: PathBuf,
    server: Option<Server>,
    port: u16,
    strace: Option<Child>,
    trace: PathBuf,
}

impl Stage {
    fn new(profile: &Profile, name: &str, rng: &mut Rng) -> anyhow::Result<Self> {
        let rig = profile.rig.below(name)?;
        let uploads = rig.work().join("uploads");
        if let Some(template) = &profile.template {
            copy(template, &uploads)?;
        }
        let trace = rig.work().join("trace");
        let mut stage = Self {
            rig,
            uploads,
            server: None,
            port: 0,
            strace: None,
            trace,
        };
        stage.restart(rng)?;
        Ok(stage)
    }

    fn server(&mut self) -> anyhow::Result<&mut Server> {
        self.server.as_mut().context("no server")
    }

    /// Kills the server, if there is one, and starts one that nothing disturbs.
    fn restart(&mut self, rng: &mut Rng) -> anyhow::Result<()> {
        self.server = None;
        // Another run may take the port between the look and the start.
        let mut tries = 0;
        self.server = loop {
            self.port = rig::free_port(rng)?;
            match self.rig.server(self.port, &self.uploads) {
                Ok(server) => break Some(server),
                Err(error) if tries >= 3 => return Err(error),
                Err(_) => tries += 1,
            }
        };
        Ok(())
    }

    /// Attaches strace to the server and waits until it is there.
    fn attach(&mut self, arguments: &[String]) -> anyhow::Result<()> {
        let mut strace = Command::new("strace")
            .args(["-f", "-y", "-s", "4096", "-o"])
            .arg(&self.trace)
            .args(["-p", &self.server()?.id().to_string()])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start strace")?;
        let stderr = strace.stderr.take().context("no standard error")?;
        let mut lines = BufReader::new(stderr).lines();
        let mut told = String::new();
        let attached = loop {
            match lines.next() {
                Some(Ok(line)) if line.contains(" attached") => break true,
                Some(Ok(line)) => told.push_str(&line),
                _ => break false,
            }
        };
        if !attached {
            let _ = strace.kill();
            strace.wait()?;
            bail!("strace did not attach: {told}");
        }
        // It goes on telling of threads; a full pipe would stop it, and so the server.
        thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        self.strace = Some(strace);
        Ok(())
    }

    /// Lets strace detach; what it saw.
    fn end_trace(&mut self) -> anyhow::Result<Vec<Call>> {
        if let Some(mut strace) = self.strace.take() {
            if strace.try_wait()?.is_none() {
                rig::signal(&strace, Signal::TERM)?;
            }
            if rig::wait(&mut strace, Duration::from_secs(10))?.is_none() {
                strace.kill()?;
                strace.wait()?;
                bail!("strace did not detach");
            }
        }
        Ok(trace::parse(&fs::read_to_string(&self.trace)?))
    }

    fn put(&self, sources: &[Source]) -> anyhow::Result<PutReport> {
        self.put_to(DIR, sources)
    }

    fn put_to(&self, dir: &str, sources: &[Source]) -> anyhow::Result<PutReport> {
        let put = self.rig.put(self.port, &paths(sources), Some(dir))?;
        put.finish(PATIENCE)
    }

    /// An upload that ends with its server, if that is to be killed.
    fn put_unless_killed(&mut self, sources: &[Source], kills: bool) -> anyhow::Result<PutReport> {
        let mut put = self.rig.put(self.port, &paths(sources), Some(DIR))?;
        let deadline = Instant::now() + PATIENCE;
        while kills && !put.ended()? && Instant::now() < deadline {
            if self.server()?.ended()?.is_some() {
                put.kill();
            }
            thread::sleep(Duration::from_millis(2));
        }
        put.finish(PATIENCE)
    }

    /// What stays in the server's own directory; a file that was told to be stored may still be tidied up after.
    fn left(&self) -> anyhow::Result<Vec<String>> {
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            let left = leftovers(&self.uploads)?;
            if left.is_empty() || Instant::now() >= deadline {
                return Ok(left);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn clean(self) -> anyhow::Result<()> {
        let work = self.rig.work().to_owned();
        drop(self);
        fs::remove_dir_all(work)?;
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(strace) = &mut self.strace {
            let _ = strace.kill();
            let _ = strace.wait();
        }
    }
}

/// The name at the server.
fn name(dir: &str, source: usize) -> String {
    format!("{dir}/source-{source}")
}

fn paths(sources: &[Source]) -> Vec<PathBuf> {
    sources.iter().map(|source| source.path.clone()).collect()
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status()?;
    if !status.success() {
        bail!("cp: {status}");
    }
    Ok(())
}

/// Why nothing can be traced here.
fn can_trace() -> Result<(), String> {
    let output = Command::new("strace")
        .args(["-o", "/dev/null", "-e", "inject=fsync:error=EIO", "true"])
        .output()
        .map_err(|_| "no strace: scripts/install-test-tools".to_owned())?;
    if output.status.success() {
        return Ok(());
    }
    let told = String::from_utf8_lossy(&output.stderr);
    Err(format!("strace cannot trace: {}", told.trim()))
}

const DIR: &str = "d";
const LATER: &str = "later";
const KILL: &str = "SIGKILL";
const ACTIONS: [&str; 5] = ["EIO", "ENOSPC", "EACCES", "EMFILE", KILL];
/// Calls that put data on the disk.
const SYNCS: [&str; 3] = ["fsync", "fdatasync", "syncfs"];
/// What is looked at after one of them failed.
const FOLLOWED: &str = "openat,openat2,unlinkat,unlink,renameat,renameat2,linkat";
/// Calls that are left alone: one that fails to close leaves the descriptor open, which no kernel does.
const SPARED: [&str; 3] = ["close", "mmap", "munmap"];
/// Undisturbed traces of each kind of upload.
const LESSONS: usize = 3;
/// Longest time for a client to end, whatever happens to its server.
const PATIENCE: Duration = Duration::from_secs(60);
/// After so many findings the run ends: the first ones tell.
const ENOUGH: usize = 20;
const TELL_EVERY: usize = 50;
/// How often a fault is tried before it counts as not met.
const TRIES: usize = 3;
