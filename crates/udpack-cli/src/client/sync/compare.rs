//! Compares two trees entry by entry, and computes the steps that make the second equal to the first.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as Atomic};

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use udpack_transfer::{Entry, Kind as EntryKind, RelPath, Remote, Time};

use super::tree::{Item, Next, Side, order, parent};
use crate::client::remote::{is_in, join};
use crate::client::report::Note;
use crate::client::verify::{existing, hash};

/// The most entries that one run deletes. Their names are kept until everything has arrived.
const DELETES: usize = 1 << 20;
/// The most files that are remembered as possible sources of moves.
const MOVED: usize = 1 << 16;
/// From this size on, a moved file may have changed. A smaller one must be identical.
const LARGE: u64 = 256 << 10;
/// Files that are hashed in parallel.
const HASHES: usize = 4;

/// One step.
#[derive(Debug)]
pub(super) enum Step {
    /// Transfer a file. The path is that of a file in the second tree from which it was probably moved.
    File(Item, Option<String>),
    /// Create a directory or a link.
    Other(Item),
}

/// What the comparison leaves for the end.
#[derive(Debug, Default)]
pub(super) struct Planned {
    /// Entries that only the second tree has, each directory before its entries.
    pub(super) deletes: Vec<Item>,
    /// Whether there are more of these than one run may delete.
    pub(super) too_many: bool,
    /// Steps that are possible only after something in their way was deleted.
    pub(super) late: Vec<Step>,
    /// Directories whose time or mode differs or will be changed, each directory before its entries.
    pub(super) touches: Vec<Item>,
    pub(super) unchanged: usize,
    /// Whether a part of the trees could not be read.
    pub(super) failed: bool,
}

/// Files that only the second tree has, as far as they are remembered.
#[derive(Debug, Default)]
struct Moved {
    /// By size and time.
    same: HashMap<(u64, Time), String>,
    /// By their last name.
    named: HashMap<String, String>,
}

impl Moved {
    fn note(&mut self, item: &Item) {
        let Item { rel, entry, .. } = item;
        if entry.kind == EntryKind::File && entry.size > 0 && self.same.len() < MOVED {
            self.same.insert((entry.size, entry.mtime), rel.clone());
            if entry.size > LARGE {
                self.named.insert(name(rel).to_owned(), rel.clone());
            }
        }
    }

    /// The path from which a file was probably moved.
    fn find(&self, item: &Item) -> Option<String> {
        let Item { rel, entry, .. } = item;
        let same = self.same.get(&(entry.size, entry.mtime));
        let alike = || self.named.get(name(rel)).filter(|_| entry.size > LARGE);
        same.or_else(alike).cloned()
    }
}

/// The last part of a path.
fn name(rel: &str) -> &str {
    rel.rsplit_once('/').map_or(rel, |(_, name)| name)
}

/// The settings of a comparison.
#[derive(Debug)]
pub(super) struct Comparison {
    pub(super) steps: mpsc::Sender<Step>,
    pub(super) notes: mpsc::Sender<Note>,
    pub(super) delete: bool,
    /// Whether moved files are looked for.
    pub(super) moves: bool,
    /// How to read files of the same size on both sides. If it is not set, size and time decide whether files are the
    /// same.
    pub(super) checksum: Option<Checksum>,
    /// How paths of the first tree are displayed.
    pub(super) source: Shown,
}

/// How paths of a tree are displayed.
#[derive(Debug, Clone)]
pub(super) enum Shown {
    Local(PathBuf),
    Remote(String),
}

impl Shown {
    pub(super) fn of(&self, rel: &str) -> String {
        match self {
            Self::Local(dir) => dir
                .join(udpack_transfer::names::os(rel))
                .display()
                .to_string(),
            Self::Remote(root) => join(root, rel),
        }
    }
}

/// Reads the bytes of both sides.
#[derive(Debug, Clone)]
pub(super) struct Checksum {
    pub(super) remote: Remote,
    pub(super) root: String,
    pub(super) local: PathBuf,
}

impl Checksum {
    /// Whether both sides have the same bytes under this name; `None` if one has no such file any more.
    async fn same(&self, rel: &str) -> anyhow::Result<bool> {
        let local = self.local.join(udpack_transfer::names::os(rel));
        let path: RelPath = join(&self.root, rel).parse()?;
        let ours = tokio::task::spawn_blocking(move || hash(&local));
        let (ours, theirs) = tokio::join!(ours, self.remote.hash(&path));
        // An error of reading here is reported by the transfer.
        let ours = ours.ok().and_then(Result::ok);
        Ok(ours.is_some() && existing(theirs)? == ours)
    }
}

/// The state of a comparison.
struct Run {
    comparison: Comparison,
    planned: Planned,
    /// The directories of the first tree above the current entry, and whether something in each changes.
    open: Vec<(Item, bool)>,
    /// The directories of the second tree above the current entry that will be deleted: their indices in the list.
    doomed: Vec<usize>,
    /// The path below which only a deletion makes room.
    blocked: Option<String>,
    /// Files of only the first tree, until all files of only the second tree are known, from which they may have been
    /// moved.
    late: Vec<Item>,
    moved: Moved,
    hashing: JoinSet<bool>,
    turns: Arc<Semaphore>,
    unchanged: Arc<AtomicUsize>,
}

impl Comparison {
    /// Compares both trees completely. Memory grows with the entries to delete and the directories that change, not
    /// with the size of the trees.
    pub(super) async fn run(self, first: Side, second: Side) -> Planned {
        let mut run = Run {
            comparison: self,
            planned: Planned::default(),
            open: Vec::new(),
            doomed: Vec::new(),
            blocked: None,
            late: Vec::new(),
            moved: Moved::default(),
            hashing: JoinSet::new(),
            turns: Arc::new(Semaphore::new(HASHES)),
            unchanged: Arc::default(),
        };
        if let Err(error) = run.all(first, second).await {
            run.fail("", error).await;
        }
        for item in std::mem::take(&mut run.late) {
            let base = run.moved.find(&item);
            let step = Step::File(item, base);
            run.planned.failed |= run.comparison.steps.send(step).await.is_err();
        }
        while let Some(done) = run.hashing.join_next().await {
            run.planned.failed |= !done.unwrap_or(false);
        }
        while let Some((dir, touched)) = run.open.pop() {
            run.planned.touches.extend(touched.then_some(dir));
        }
        run.planned.unchanged = run.unchanged.load(Atomic::Relaxed);
        run.planned
    }
}

impl Run {
    async fn all(&mut self, mut first: Side, mut second: Side) -> anyhow::Result<()> {
        let mut theirs = self.theirs(&mut second).await?;
        while let Some(next) = first.next().await? {
            let (ours, failed) = match next {
                Next::Item(item) => (Some(item), String::new()),
                Next::Excluded(_) => continue,
                Next::Kept(rel) => {
                    let source = self.comparison.source.of(&rel);
                    let why = "interrupted files are kept in it";
                    let path = rel;
                    let note = Note::LeftOut { path, source, why };
                    let _ = self.comparison.notes.send(note).await;
                    continue;
                }
                Next::Vanished(rel) => {
                    self.vanished(&rel).await;
                    continue;
                }
                Next::Failed(rel, error) => {
                    self.fail(&rel, error).await;
                    // Nothing will be deleted any more.
                    (None, rel)
                }
            };
            let rel = ours.as_ref().map_or(&failed, |item| &item.rel);
            while let Some(item) = &theirs
                && item.rel != *rel
                && order(&item.rel, rel) == Ordering::Less
            {
                self.gone(theirs.take());
                theirs = self.theirs(&mut second).await?;
            }
            let same_name = theirs.as_ref().is_some_and(|item| item.rel == *rel);
            let other = if same_name { theirs.take() } else { None };
            if let Some(ours) = ours
                && !self.pair(ours, other).await
            {
                // Nobody takes steps any more.
                self.planned.failed = true;
                return Ok(());
            }
            if same_name {
                theirs = self.theirs(&mut second).await?;
            }
        }
        while theirs.is_some() {
            self.gone(theirs.take());
            theirs = self.theirs(&mut second).await?;
        }
        Ok(())
    }

    /// The next entry of the second tree.
    async fn theirs(&mut self, second: &mut Side) -> anyhow::Result<Option<Item>> {
        while let Some(next) = second.next().await? {
            match next {
                Next::Item(item) => return Ok(Some(item)),
                Next::Excluded(rel) => self.keep_above(&rel),
                Next::Kept(_) | Next::Vanished(_) => {}
                Next::Failed(rel, error) => self.fail(&rel, error).await,
            }
        }
        Ok(None)
    }

    /// Keeps the directories above an entry that stays.
    fn keep_above(&mut self, rel: &str) {
        let above = |at: &usize| {
            let dir = self.planned.deletes.get(*at);
            dir.is_some_and(|dir| is_in(rel, &dir.rel))
        };
        let kept: Vec<usize> = self.doomed.iter().copied().filter(above).collect();
        // In reverse order, so that the other indices remain valid.
        for at in kept.into_iter().rev() {
            self.planned.deletes.remove(at);
        }
        self.doomed.clear();
    }

    async fn fail(&mut self, rel: &str, error: anyhow::Error) {
        self.planned.failed = true;
        let note = Note::Failed {
            path: rel.to_owned(),
            source: self.comparison.source.of(rel),
            error,
        };
        let _ = self.comparison.notes.send(note).await;
    }

    async fn vanished(&self, rel: &str) {
        let note = Note::Vanished {
            path: rel.to_owned(),
            source: self.comparison.source.of(rel),
        };
        let _ = self.comparison.notes.send(note).await;
    }

    /// Handles an entry that only the second tree has.
    fn gone(&mut self, item: Option<Item>) {
        let Some(item) = item else {
            return;
        };
        self.moved.note(&item);
        if !self.comparison.delete {
            return;
        }
        self.enter(&item.rel);
        if self.planned.deletes.len() >= DELETES {
            self.planned.too_many = true;
            return;
        }
        self.changes(&item.rel);
        let deletes = &mut self.planned.deletes;
        self.doomed.retain(|at| {
            deletes
                .get(*at)
                .is_some_and(|dir| is_in(&item.rel, &dir.rel))
        });
        if item.entry.kind == EntryKind::Dir {
            self.doomed.push(deletes.len());
        }
        deletes.push(item);
    }

    /// Leaves the directories that do not contain this entry.
    fn enter(&mut self, rel: &str) {
        while let Some((dir, touched)) = self.open.pop_if(|(dir, _)| !is_in(rel, &dir.rel)) {
            self.planned.touches.extend(touched.then_some(dir));
        }
    }

    /// Records that an entry changes, and with it the time of its directory.
    fn changes(&mut self, rel: &str) {
        if let Some((dir, touched)) = self.open.last_mut()
            && dir.rel == parent(rel)
        {
            *touched = true;
        }
    }

    /// Handles the entries of one name in both trees; returns `false` when nobody takes steps any more.
    async fn pair(&mut self, ours: Item, theirs: Option<Item>) -> bool {
        self.enter(&ours.rel);
        let is_dir = ours.entry.kind == EntryKind::Dir;
        let left = |dir: &String| !is_in(&ours.rel, dir);
        if self.blocked.as_ref().is_some_and(left) {
            self.blocked = None;
        }
        let theirs = match theirs {
            Some(theirs) if theirs.entry.kind != ours.entry.kind => {
                if ours.entry.kind == EntryKind::Other {
                    return self.special(&ours.rel).await;
                }
                if !self.comparison.delete {
                    let text = format!(
                        "{} is of another kind there: --delete replaces it",
                        crate::output::printable(&theirs.entry.path)
                    );
                    let failure = crate::exit::Failure::new(crate::exit::Kind::Policy, text);
                    self.fail(&ours.rel, failure.into()).await;
                    self.blocked = Some(ours.rel);
                    return true;
                }
                self.blocked = Some(ours.rel.clone());
                self.gone(Some(theirs));
                None
            }
            theirs => theirs,
        };
        let step = match (ours.entry.kind, theirs) {
            (EntryKind::Other, _) => return self.special(&ours.rel).await,
            (EntryKind::File, Some(theirs)) if !self.differs(&ours, &theirs.entry) => return true,
            (EntryKind::File, None) if self.may_be_moved(&ours) => {
                self.changes(&ours.rel);
                self.late.push(ours);
                return true;
            }
            (EntryKind::File, _) => Step::File(ours, None),
            (EntryKind::Link, Some(theirs)) if theirs.entry.target == ours.entry.target => {
                self.unchanged.fetch_add(1, Atomic::Relaxed);
                return true;
            }
            (EntryKind::Link, _) => Step::Other(ours),
            (EntryKind::Dir, Some(theirs)) => {
                let moved = !same_time(&ours.entry, &theirs.entry)
                    || (ours.entry.mode ^ theirs.entry.mode) & 0o777 != 0;
                self.open.push((ours, moved));
                self.unchanged.fetch_add(1, Atomic::Relaxed);
                return true;
            }
            (EntryKind::Dir, None) => Step::Other(ours),
        };
        let (Step::File(item, _) | Step::Other(item)) = &step;
        self.changes(&item.rel);
        if let (true, Step::Other(dir)) = (is_dir, &step) {
            self.open.push((dir.clone(), true));
        }
        if self.blocked.is_some() {
            if self.comparison.delete {
                self.planned.late.push(step);
            }
            return true;
        }
        self.comparison.steps.send(step).await.is_ok()
    }

    /// Whether a file waits for the end of both trees because it may have been moved.
    fn may_be_moved(&self, ours: &Item) -> bool {
        self.comparison.moves
            && self.blocked.is_none()
            && ours.entry.size > 0
            && self.late.len() < MOVED
    }

    /// Handles an entry that is no file, directory or link: it is left out.
    async fn special(&self, rel: &str) -> bool {
        let note = Note::LeftOut {
            why: "no file, directory or link",
            path: rel.to_owned(),
            source: self.comparison.source.of(rel),
        };
        self.comparison.notes.send(note).await.is_ok()
    }

    /// Whether a file must be transferred. With `--checksum` the answer may come later; then the step comes with it.
    fn differs(&mut self, ours: &Item, theirs: &Entry) -> bool {
        // Its time must be changed, whatever its bytes are.
        if ours.entry.size != theirs.size || !same_time(&ours.entry, theirs) {
            return true;
        }
        let Some(checksum) = &self.comparison.checksum else {
            self.unchanged.fetch_add(1, Atomic::Relaxed);
            return false;
        };
        let (checksum, ours) = (checksum.clone(), ours.clone());
        let (steps, notes) = (self.comparison.steps.clone(), self.comparison.notes.clone());
        let (turns, unchanged) = (self.turns.clone(), self.unchanged.clone());
        let source = self.comparison.source.of(&ours.rel);
        self.changes(&ours.rel);
        self.hashing.spawn(async move {
            let _turn = turns.acquire().await;
            match checksum.same(&ours.rel).await {
                Ok(true) => {
                    unchanged.fetch_add(1, Atomic::Relaxed);
                    true
                }
                Ok(false) => steps.send(Step::File(ours, None)).await.is_ok(),
                Err(error) => {
                    let path = ours.rel;
                    let failed = Note::Failed {
                        path,
                        source,
                        error,
                    };
                    let _ = notes.send(failed).await;
                    false
                }
            }
        });
        false
    }
}

/// Whether both have the same modification time. A file system without nanoseconds reports 0 of them.
fn same_time(ours: &Entry, theirs: &Entry) -> bool {
    ours.mtime.secs == theirs.mtime.secs
        && (ours.mtime.nanos == theirs.mtime.nanos || theirs.mtime.nanos == 0)
}
