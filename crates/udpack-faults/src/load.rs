//! Mixed uploads: new names, names again, names with other bytes, and what was interrupted until it is done.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::ledger::{Ledger, make_sources, make_sparse};
use crate::rig::{Put, PutReport, Rig};
use crate::rng::Rng;

/// Longest time for a command that nothing disturbs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
/// Clients side by side in a round that must finish.
const AT_ONCE: usize = 4;

/// One command line: some files into one directory of the server.
#[derive(Debug)]
struct Task {
    /// Its files' links lie here, under the names they have at the server.
    links: PathBuf,
    dir: Option<String>,
    files: Vec<(String, usize)>,
    /// Its name is taken by other bytes: it must fail.
    hopeless: bool,
}

impl Task {
    fn name(&self, file: &str) -> String {
        match &self.dir {
            Some(dir) => format!("{dir}/{file}"),
            None => file.to_owned(),
        }
    }
}

/// A command that runs.
#[derive(Debug)]
pub(crate) struct Running {
    task: Task,
    pub(crate) put: Put,
}

/// Makes the commands, and keeps those that were interrupted.
#[derive(Debug)]
pub(crate) struct Load {
    rig: Rig,
    port: u16,
    pub(crate) rng: Rng,
    pub(crate) ledger: Ledger,
    /// Sources by weight: mostly small ones.
    small: usize,
    medium: usize,
    pending: Vec<Task>,
    made: u64,
}

/// Which commands have to succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Must {
    /// None: they were disturbed.
    Not,
    /// Those that had met the server before it was killed.
    OnceMet,
    /// All of them.
    Always,
}

impl Load {
    /// Makes the sources: of all kinds of sizes, below and above what is special to the server, and some with holes.
    pub(crate) fn new(rig: &Rig, port: u16, mut rng: Rng, large: &[u64]) -> anyhow::Result<Self> {
        const K: u64 = 1 << 10;
        const M: u64 = 1 << 20;
        let mut sizes = vec![0, 1, 100, 4 * K - 1, 4 * K, 64 * K, 256 * K - 1, 256 * K];
        sizes.push(rng.range(1, 256 * K));
        let small = sizes.len();
        sizes.extend([256 * K + 1, M - 1, M, M + 17, 2 * M]);
        sizes.push(rng.range(M, 3 * M));
        let dir = |name| rig.work().join(name);
        let mut sources = make_sources(&dir("sources"), &sizes, &mut rng)?;
        sources.extend(make_sparse(&dir("sparse"), SPARSE, &mut rng)?);
        let medium = sources.len();
        sources.extend(make_sources(&dir("large"), large, &mut rng)?);
        Ok(Self {
            rig: rig.clone(),
            port,
            rng,
            ledger: Ledger::new(sources),
            small,
            medium,
            pending: Vec::new(),
            made: 0,
        })
    }

    /// Commands that were interrupted and are to be run again.
    pub(crate) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Starts some commands: interrupted ones again, and new ones.
    pub(crate) fn start(&mut self, count: usize) -> anyhow::Result<Vec<Running>> {
        let mut running = Vec::with_capacity(count);
        for _ in 0..count {
            let again = self.pending.len() >= MOST_PENDING
                || (!self.pending.is_empty() && self.rng.chance(50));
            let task = if again {
                let at = self.rng.index(self.pending.len());
                self.pending.swap_remove(at)
            } else {
                self.make()?
            };
            running.push(self.run(task)?);
        }
        Ok(running)
    }

    /// Waits for commands that were killed or that nothing disturbs any more, and takes down what they told.
    ///
    /// With `must`, each has to succeed. Returns whether all did.
    pub(crate) fn settle(&mut self, running: Vec<Running>, must: Must) -> anyhow::Result<bool> {
        let mut all = true;
        for Running { task, put } in running {
            let told = put.finish(PATIENCE)?;
            let must = match must {
                Must::Not => false,
                Must::OnceMet => !told.unmet,
                Must::Always => true,
            };
            all &= self.take(task, &told, must)?;
        }
        Ok(all)
    }

    /// Runs all interrupted commands to their end; each must succeed.
    pub(crate) fn finish(&mut self) -> anyhow::Result<()> {
        let mut tasks = std::mem::take(&mut self.pending);
        while !tasks.is_empty() {
            let rest = tasks.split_off(tasks.len().min(AT_ONCE));
            let running = tasks
                .into_iter()
                .map(|task| self.run(task))
                .collect::<anyhow::Result<Vec<_>>>()?;
            self.settle(running, Must::Always)?;
            tasks = rest;
        }
        Ok(())
    }

    /// Removes all that is stored, for room. No client may be running.
    pub(crate) fn clear(&mut self, uploads: &Path) -> anyhow::Result<()> {
        self.ledger.clear(uploads)?;
        for task in &self.pending {
            for (file, source) in &task.files {
                self.ledger.mean(&task.name(file), *source);
            }
        }
        Ok(())
    }

    /// Some of the interrupted files change before their command runs again. Only while no server runs, so
    /// that it is known which of them are not stored.
    pub(crate) fn edit_some(&mut self, uploads: &Path) -> anyhow::Result<()> {
        for at in 0..self.pending.len() {
            if !self.rng.chance(10) {
                continue;
            }
            let source = self.any_source();
            let Some(task) = self.pending.get_mut(at) else {
                break;
            };
            let free = task
                .files
                .iter()
                .map(|(file, _)| uploads.join(task.name(file)))
                .position(|path| !path.exists());
            let Some(file) = free else { continue };
            if let Some((file, old)) = task.files.get_mut(file) {
                *old = source;
                let link = task.links.join(&*file);
                fs::remove_file(&link)?;
                if let Some(source) = self.ledger.sources.get(source) {
                    fs::hard_link(&source.path, &link)?;
                }
                let file = file.clone();
                self.ledger.mean(&task.name(&file), source);
            }
        }
        Ok(())
    }

    fn run(&mut self, task: Task) -> anyhow::Result<Running> {
        let files: Vec<PathBuf> = task
            .files
            .iter()
            .map(|(file, _)| task.links.join(file))
            .collect();
        let put = self.rig.put(self.port, &files, task.dir.as_deref())?;
        Ok(Running { task, put })
    }

    fn take(&mut self, task: Task, told: &PutReport, must: bool) -> anyhow::Result<bool> {
        for (name, hash) in &told.acked {
            let sent = task.files.iter().find(|(file, _)| task.name(file) == *name);
            match sent {
                Some((_, source)) => self.ledger.ack(name, *source, hash),
                None => self
                    .ledger
                    .tally
                    .wrong(&format!("a file that was not sent is reported: {name}")),
            }
        }
        if told.stuck {
            let what = format!("a client did not end in {PATIENCE:?}: {:?}", task.files);
            self.ledger.tally.wrong(&what);
        }
        let stored =
            |(file, source): &(String, usize)| self.ledger.acked(&task.name(file)) == Some(*source);
        let done = task.hopeless || task.files.iter().all(stored);
        if done {
            fs::remove_dir_all(&task.links)?;
        } else {
            if must {
                let what = format!("a command that must succeed failed: {:?}", told.errors);
                self.ledger.tally.wrong(&what);
            }
            self.pending.push(task);
        }
        Ok(done)
    }

    fn make(&mut self) -> anyhow::Result<Task> {
        self.made += 1;
        let links = self.rig.work().join(format!("send/{}", self.made));
        fs::create_dir_all(&links)?;
        let dir = self
            .rng
            .chance(40)
            .then(|| format!("dir {}/sub", self.rng.range(1, 9)));
        let mut task = Task {
            links,
            dir,
            files: Vec::new(),
            hopeless: false,
        };
        if self.rng.chance(15)
            && let Some((name, source)) = self.ledger.any_acked(&mut self.rng)
        {
            // A name again: with the same bytes, which is fine, or with others, which is refused.
            let (dir, file) = match name.rsplit_once('/') {
                Some((dir, file)) => (Some(dir.to_owned()), file),
                None => (None, name.as_str()),
            };
            task.dir = dir;
            let other = self.any_source();
            task.hopeless = other != source && self.rng.chance(50);
            let source = if task.hopeless { other } else { source };
            task.files.push((file.to_owned(), source));
        } else {
            let many = self.rng.chance(20);
            let (least, most) = if many { (MANY, 2 * MANY) } else { (1, 6) };
            for number in 0..self.rng.range(least, most) {
                let source = if many {
                    self.rng.index(self.small)
                } else {
                    self.any_source()
                };
                task.files
                    .push((format!("{} {number}.bin", self.made), source));
            }
        }
        for (file, source) in &task.files {
            if let Some(source) = self.ledger.sources.get(*source) {
                fs::hard_link(&source.path, task.links.join(file))?;
            }
            if !task.hopeless {
                self.ledger.mean(&task.name(file), *source);
            }
        }
        Ok(task)
    }

    fn any_source(&mut self) -> usize {
        let (from, to) = match self.rng.range(0, 99) {
            0..60 => (0, self.small),
            60..90 => (self.small, self.medium),
            _ => (self.medium, self.ledger.sources.len()),
        };
        from + self.rng.index(to.saturating_sub(from))
    }
}

/// Files with holes among those of medium size, beside one that is all hole.
const SPARSE: u64 = 3;
/// So many small files a client sends without asking first what the server has of them.
pub(crate) const MANY: u64 = 20;
/// With so many interrupted commands no new ones are made.
const MOST_PENDING: usize = 8;
