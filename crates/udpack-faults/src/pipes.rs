//! What is read once: commands whose output is sent, and files that still grow. A command that fails publishes nothing,
//! whichever byte it dies at; a server that is killed costs nothing; a client that is killed leaves the whole or nothing.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

use crate::ledger::{Source, Tally, hash, leftovers, make_sources};
use crate::load::PATIENCE;
use crate::rig::{self, Put, Rig, Server};
use crate::rng::Rng;

/// How often.
#[derive(Clone, Debug, Args)]
pub(crate) struct PipeArgs {
    /// How often a command is killed at a random byte.
    #[arg(long, default_value_t = 100)]
    producers: u64,

    /// How often the server is killed below a command, the same below a file that grows, and a client.
    #[arg(long, default_value_t = 10)]
    cycles: u64,
}

/// How fast what must last is sent: the largest takes about 2 s.
const RATE: &str = "6M";

struct Run<'a> {
    rig: &'a Rig,
    rng: Rng,
    port: u16,
    uploads: PathBuf,
    sources: Vec<Source>,
    tally: Tally,
    made: u64,
}

/// Runs the cycles; true when nothing was wrong.
pub(crate) fn run(args: &PipeArgs, rig: &Rig, mut rng: Rng) -> anyhow::Result<bool> {
    const M: u64 = 1 << 20;
    let uploads = rig.work().join("uploads");
    let port = rig::free_port(&mut rng)?;
    let sizes = [1, 70_000, 300_000, 2 * M + 5, 5 * M, 12 * M + 1];
    let sources = make_sources(&rig.work().join("sources"), &sizes, &mut rng)?;
    let mut run = Run {
        rig,
        rng,
        port,
        uploads,
        sources,
        tally: Tally::default(),
        made: 0,
    };
    let began = Instant::now();
    let mut server = rig.server(port, &run.uploads)?;
    for _ in 0..args.producers {
        run.producer_dies()?;
    }
    println!("{} commands were killed at a random byte", args.producers);
    for _ in 0..args.cycles {
        server = run.server_dies_below_a_command(server)?;
        server = run.server_dies_below_a_growing_file(server)?;
        run.client_dies()?;
    }
    println!(
        "the server was killed {} times below a command and below a growing file, a client as often",
        args.cycles
    );
    if let Err(error) = server.terminate() {
        run.tally.wrong(&format!("{error:#}"));
    }
    // A client that was killed leaves what a later one could take up; a command that failed leaves nothing.
    for name in leftovers(&run.uploads)? {
        println!("kept: {name}");
    }
    for line in rig::panics(&rig.log()) {
        run.tally.wrong(&line);
    }
    run.tally
        .print(args.producers + 3 * args.cycles, began.elapsed());
    if run.tally.bad() == 0 {
        fs::remove_dir_all(rig.work())?;
    }
    Ok(run.tally.bad() == 0)
}

impl Run<'_> {
    /// Any source, of at least so many bytes.
    fn source(&mut self, least: u64) -> Source {
        let fit: Vec<_> = self.sources.iter().filter(|s| s.size >= least).collect();
        let at = self.rng.index(fit.len());
        fit[at].clone()
    }

    fn name(&mut self) -> String {
        self.made += 1;
        format!("out {}", self.made)
    }

    fn put(&self, from: &[&str], name: &str) -> anyhow::Result<Put> {
        let arguments = [&["put"], from, &["--as", name, "--bwlimit", RATE]].concat();
        self.rig.client(self.port, self.rig.work(), &arguments)
    }

    /// Nothing may have this name, not even for a moment.
    fn must_not_be(&mut self, name: &str, when: &str) {
        if self.uploads.join(name).exists() {
            self.tally.partial += 1;
            println!("PARTIAL: {name} is visible {when}");
        }
    }

    /// The file of this name is all of the source.
    fn must_be(&mut self, name: &str, source: &Source) -> anyhow::Result<()> {
        let path = self.uploads.join(name);
        if !path.exists() {
            self.tally.lost += 1;
            println!("LOST: {name} was reported as stored and is not there");
        } else if hash(&path)? != source.hash {
            self.tally.corrupt += 1;
            println!("CORRUPT: {name} is not what was sent");
        }
        Ok(())
    }

    fn producer_dies(&mut self) -> anyhow::Result<()> {
        let source = self.source(0);
        let name = self.name();
        let at = self.rng.range(0, source.size);
        // The shell itself dies, as a dump that runs out of memory does, or the command ends with a code.
        let end = match self.rng.index(3) {
            0 => "exit 3",
            1 => "kill -TERM $$",
            _ => "kill -KILL $$",
        };
        let line = format!("head -c {at} '{}'; {end}", source.path.display());
        let mut put = self.put(&["--from-command", &line], &name)?;
        let deadline = Instant::now() + PATIENCE;
        while !put.ended()? && Instant::now() < deadline {
            self.must_not_be(&name, "while its command runs");
            thread::sleep(Duration::from_millis(2));
        }
        let told = put.finish(PATIENCE)?;
        if told.success || !told.acked.is_empty() {
            self.tally
                .wrong(&format!("{name} is reported as stored, after `{line}`"));
        }
        if told.stuck {
            self.tally.wrong(&format!("a client did not end: {line}"));
        }
        self.must_not_be(&name, "after its command has failed");
        Ok(())
    }

    fn server_dies_below_a_command(&mut self, server: Server) -> anyhow::Result<Server> {
        let source = self.source(1 << 20);
        let name = self.name();
        let line = format!("cat '{}'", source.path.display());
        let put = self.put(&["--from-command", &line], &name)?;
        let server = self.kill_some(server)?;
        let told = put.finish(PATIENCE)?;
        if told.unmet {
            self.must_not_be(&name, "though nobody was met");
            return Ok(server);
        }
        self.finished(&name, &source, told.success, &told.errors)?;
        Ok(server)
    }

    fn server_dies_below_a_growing_file(&mut self, server: Server) -> anyhow::Result<Server> {
        let source = self.source(1 << 20);
        let name = self.name();
        let grown = self.rig.work().join("grown");
        let writer = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .open(&grown)?;
        let put = self.put(&["--follow", &grown.display().to_string()], &name)?;
        let pause = Duration::from_millis(self.rng.range(1, 20));
        let writing = thread::spawn({
            let path = source.path.clone();
            move || grow(&path, writer, pause)
        });
        let server = self.kill_some(server)?;
        let grown = writing.join();
        let told = put.finish(PATIENCE)?;
        if !matches!(grown, Ok(Ok(()))) {
            anyhow::bail!("the file could not be written: {grown:?}");
        }
        if told.unmet {
            return Ok(server);
        }
        self.finished(&name, &source, told.success, &told.errors)?;
        Ok(server)
    }

    /// What was disturbed at the server only must have arrived.
    fn finished(
        &mut self,
        name: &str,
        source: &Source,
        success: bool,
        errors: &[String],
    ) -> anyhow::Result<()> {
        if !success {
            self.tally
                .wrong(&format!("{name} must arrive, and did not: {errors:?}"));
            return Ok(());
        }
        self.tally.acked += 1;
        self.must_be(name, source)
    }

    fn client_dies(&mut self) -> anyhow::Result<()> {
        let source = self.source(1 << 20);
        let name = self.name();
        let line = format!("cat '{}'", source.path.display());
        let mut put = self.put(&["--from-command", &line], &name)?;
        thread::sleep(Duration::from_millis(self.rng.range(5, 2500)));
        put.kill();
        let told = put.finish(PATIENCE)?;
        let path = self.uploads.join(&name);
        if told.success || path.exists() {
            self.tally.acked += u64::from(told.success);
            self.must_be(&name, &source)?;
        }
        Ok(())
    }

    /// Kills the server once or twice while something is sent, and starts it again.
    fn kill_some(&mut self, mut server: Server) -> anyhow::Result<Server> {
        for _ in 0..self.rng.range(1, 2) {
            thread::sleep(Duration::from_millis(self.rng.range(50, 900)));
            server.kill();
            thread::sleep(Duration::from_millis(self.rng.range(0, 40)));
            server = self.rig.server(self.port, &self.uploads)?;
        }
        Ok(server)
    }
}

/// Writes a file piece by piece, and closes it.
fn grow(from: &Path, mut to: File, pause: Duration) -> std::io::Result<()> {
    let mut from = File::open(from)?;
    from.seek(SeekFrom::Start(0))?;
    let mut piece = vec![0; 150_001];
    loop {
        let len = from.read(&mut piece)?;
        if len == 0 {
            return Ok(());
        }
        to.write_all(piece.get(..len).unwrap_or_default())?;
        thread::sleep(pause);
    }
}
