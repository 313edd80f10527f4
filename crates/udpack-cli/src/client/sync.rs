//! `sync`: makes one directory a copy of another, in either direction.
//!
//! Both trees are listed in the same order and compared entry by entry, while differing files are already being
//! transferred. Entries that only the copy has are deleted when everything has arrived. If something has failed,
//! nothing is deleted.

mod compare;
mod tree;
#[cfg(target_os = "linux")]
mod watch;

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
#[cfg(target_os = "linux")]
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use udpack_transfer::{
    Code, Entry, Event, Exclude, Found, IfExists, Kind as EntryKind, Link, RelPath, Remote, Source,
    Store, Time, TransferError, Uploader, Wanted, What, apply_entry, names,
};

use self::compare::{Checksum, Comparison, Planned, Shown, Step};
use self::tree::{Item, Side};
use super::local::{Maker, Place};
use super::remote::{join, remote_path};
use super::report::{Beside, Fate, Note, Origin, Origins, Report, Thing, Transfer};
use super::umask;
use super::verify::existing;
use crate::args::{ChangedArg, DeltaArg, SyncArgs, VanishedArg};
use crate::exit::{Explained, Failure, Kind};
use crate::logging::Console;
use crate::output;
use crate::progress::Meter;
use crate::signals::Interrupts;
use crate::target::{Target, retry};

/// How often a file is sent that changes each time it is read.
const TRIES: usize = 3;
/// Entries that are deleted in parallel.
const DELETES: usize = 16;
/// Steps that are computed ahead of the transfer.
const AHEAD: usize = 256;
/// The pause before a watching mirror tries again what failed.
#[cfg(target_os = "linux")]
const AGAIN: Duration = Duration::from_secs(5);

pub(super) async fn run(
    args: SyncArgs,
    console: &Console,
    mut interrupts: Interrupts,
) -> anyhow::Result<()> {
    #[cfg(target_os = "linux")]
    if args.watch {
        return keep(&args, console, &mut interrupts).await;
    }
    once(&args, console, &mut interrupts).await.0
}

/// Mirrors a local directory whenever something in it has changed, until it is interrupted or cannot succeed.
#[cfg(target_os = "linux")]
async fn keep(
    args: &SyncArgs,
    console: &Console,
    interrupts: &mut Interrupts,
) -> anyhow::Result<()> {
    let way = Way::of(args)?;
    if !way.up {
        let text = "only a directory here can be watched";
        return Err(Failure::new(Kind::Usage, text)
            .hint("run it where the files are written")
            .into());
    }
    loop {
        let (dir, follow) = (way.dir.clone(), !args.tree.links);
        let exclude: Exclude = args.tree.exclude.iter().cloned().collect();
        let watching =
            tokio::task::spawn_blocking(move || watch::Watcher::new(&dir, &exclude, follow));
        let watcher = watching.await.context("watching failed")?;
        let watcher = watcher.map_err(|error| {
            let text = format!("cannot watch {}: {error}", way.dir.display());
            Failure::new(Kind::LocalFile, text)
                .hint("see that it is there, and raise fs.inotify.max_user_watches if it is large")
        })?;
        let (done, went_through) = once(args, console, interrupts).await;
        let again = match done {
            Ok(()) => None,
            Err(error) => match Explained::of(&error).kind {
                // What the next change does not mend, the next attempt may.
                Kind::Network | Kind::Moving | Kind::Partial | Kind::RemoteStorage => {
                    let text = Explained::of(&error).text;
                    console.line(&format!("{text}; trying again in {} s", AGAIN.as_secs()));
                    Some(AGAIN)
                }
                // A single entry failed, and will again until somebody changes it.
                _ if went_through => {
                    Explained::of(&error).print(console);
                    console.line("waiting for the next change");
                    None
                }
                _ => return Err(error),
            },
        };
        let pause = async {
            match again {
                Some(again) => tokio::time::sleep(again).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = watcher.changed() => changed.context("watching failed")?,
            () = pause => {}
            () = interrupts.first() => return Err(Failure::interrupted().into()),
        }
    }
}

/// One run, and whether it came to its end: then only entries can have failed.
async fn once(
    args: &SyncArgs,
    console: &Console,
    interrupts: &mut Interrupts,
) -> (anyhow::Result<()>, bool) {
    let mut report = Report::new(console, args.show.json, &args.connect.log);
    report.mirrored();
    report.living(
        args.vanished == VanishedArg::Skip,
        args.changed != ChangedArg::Fail,
    );
    let result = sync(args, console, interrupts, &mut report).await;
    let went_through = result.is_ok();
    (report.finish(result), went_through)
}

/// Source and copy of a mirror.
#[derive(Debug)]
struct Way {
    up: bool,
    /// The local directory.
    dir: PathBuf,
    /// The directory at the server; `None` is its root.
    root: Option<RelPath>,
}

impl Way {
    fn of(args: &SyncArgs) -> anyhow::Result<Self> {
        let at_server = |path: &Path| {
            let path = path.as_os_str().as_bytes().strip_prefix(b":")?;
            Some(names::from_bytes(path).into_owned())
        };
        let (up, dir, root) = match (at_server(&args.source), at_server(&args.copy)) {
            (None, Some(root)) => (true, &args.source, root),
            (Some(root), None) => (false, &args.copy, root),
            (Some(_), Some(_)) | (None, None) => {
                let text = "one of FROM and TO is at the server, and only one";
                return Err(Failure::new(Kind::Usage, text)
                    .hint("name that one with a colon before it: sync work :backup/work")
                    .into());
            }
        };
        let (dir, root) = (dir.clone(), remote_path(&root)?);
        if up && !dir.is_dir() {
            let text = format!("not a directory: {}", dir.display());
            return Err(Failure::new(Kind::LocalFile, text)
                .hint("a single file is sent with `put --if-exists overwrite`")
                .into());
        }
        Ok(Self { up, dir, root })
    }

    /// The directory at the server, as a prefix of names.
    fn prefix(&self) -> &str {
        self.root.as_ref().map_or("", RelPath::as_str)
    }
}

async fn sync(
    args: &SyncArgs,
    console: &Console,
    interrupts: &mut Interrupts,
    report: &mut Report,
) -> anyhow::Result<()> {
    let way = Way::of(args)?;
    if !way.up {
        report.fetches();
    }
    let target = Target::find(&args.connect)?.via(&args.paths)?;
    let tries = retry(args.pace.retries);
    if args.dry_run {
        report.dry();
        let work = async |link: Link| dry(args, console, &link, &way, report).await;
        return target.run_link_aloud(tries, interrupts, work).await;
    }
    report.start(&target.address(), None);
    let place = Place {
        dir: way.dir.clone(),
        name: None,
    };
    let mut opened = None;
    let result = target
        .run_link(tries, interrupts, async |link| {
            let comparing = Comparing::start(args, &Remote::new(&link), &way).await?;
            if !way.up {
                opened = Some(place.open(IfExists::Overwrite, args.keep.xattrs()).await?);
            }
            let mirror = Mirror {
                args,
                console,
                link,
                way: &way,
                store: opened.clone(),
            };
            mirror.run(comparing, report).await
        })
        .await;
    if let Some(store) = opened {
        place.close(store, report).await;
    }
    result
}

/// A comparison of two trees that is running.
#[derive(Debug)]
struct Comparing {
    steps: mpsc::Receiver<Step>,
    notes: mpsc::Receiver<Note>,
    task: JoinSet<Planned>,
}

impl Comparing {
    async fn start(args: &SyncArgs, remote: &Remote, way: &Way) -> anyhow::Result<Self> {
        let there = match existing(remote.stat(way.root.as_ref()).await)? {
            Some(entry) if entry.kind != EntryKind::Dir => {
                let text = format!("{} is no directory at the server", way.prefix());
                return Err(Failure::new(Kind::Policy, text)
                    .hint("name a directory, or remove or rename what is there first")
                    .into());
            }
            there => there.is_some(),
        };
        if !there && !way.up {
            let text = format!("no such directory at the server: {}", way.prefix());
            return Err(Failure::new(Kind::NotFound, text)
                .hint("see what is there with `udpack-client ls`")
                .into());
        }
        // Nothing is sent if the mirror cannot be completed.
        if way.up
            && args.delete
            && let Ok(rights) = remote.rights().await
            && !rights.delete
        {
            let text = "this token has no right to delete, which --delete takes";
            return Err(Failure::new(Kind::Policy, text)
                .hint("ask the server's owner for a token whose scope has it")
                .into());
        }
        let exclude: Exclude = args.tree.exclude.iter().cloned().collect();
        let depth = way.prefix().split('/').filter(|name| !name.is_empty());
        let depth = if way.up { depth.count() } else { 0 };
        let follow = way.up && !args.tree.links;
        let here = match way.up || way.dir.exists() {
            true => Side::local(&way.dir, depth, &exclude, follow),
            false => Side::Empty,
        };
        let there_is = there;
        let there = match there {
            true => Side::remote(remote, way.root.as_ref(), &exclude),
            false => Side::Empty,
        };
        let (first, second) = if way.up { (here, there) } else { (there, here) };
        let (steps, taken) = mpsc::channel(AHEAD);
        let (notes, noted) = mpsc::channel(AHEAD);
        let comparison = Comparison {
            steps,
            notes,
            delete: args.delete,
            moves: way.up && there_is && args.delta != DeltaArg::Never,
            checksum: args.checksum.then(|| Checksum {
                remote: remote.clone(),
                root: way.prefix().to_owned(),
                local: way.dir.clone(),
            }),
            source: match way.up {
                true => Shown::Local(way.dir.clone()),
                false => Shown::Remote(way.prefix().to_owned()),
            },
        };
        let mut task = JoinSet::new();
        task.spawn(comparison.run(first, second));
        Ok(Self {
            steps: taken,
            notes: noted,
            task,
        })
    }
}

async fn planned(mut task: JoinSet<Planned>) -> anyhow::Result<Planned> {
    let planned = task.join_next().await;
    planned
        .and_then(Result::ok)
        .context("comparing the directories failed")
}

/// Whether entries that only the copy has may be deleted; an error if there are more than allowed.
fn may_delete(
    args: &SyncArgs,
    console: &Console,
    planned: &Planned,
    report: &Report,
) -> anyhow::Result<bool> {
    let count = planned.deletes.len();
    if count == 0 {
        return Ok(true);
    }
    if planned.failed || !report.all_stored() {
        console.line("nothing is deleted, because not everything was read and stored");
        return Ok(false);
    }
    let most = args.max_delete.unwrap_or(usize::MAX);
    if planned.too_many || count > most {
        let text = match planned.too_many {
            true => format!("more than {count} entries would be deleted: nothing was"),
            false => format!(
                "{} would be deleted, more than --max-delete {most}: nothing was",
                output::counted(count as u64, "entry", "entries")
            ),
        };
        return Err(Failure::new(Kind::Policy, text)
            .hint("list them with -n, without --max-delete")
            .into());
    }
    Ok(true)
}

/// Lists what a run would do.
async fn dry(
    args: &SyncArgs,
    console: &Console,
    link: &Link,
    way: &Way,
    report: &mut Report,
) -> anyhow::Result<()> {
    let comparing = Comparing::start(args, &Remote::new(link), way).await?;
    let Comparing {
        mut steps,
        mut notes,
        task,
    } = comparing;
    let (mut more_steps, mut more_notes) = (true, true);
    while more_steps || more_notes {
        tokio::select! {
            step = steps.recv(), if more_steps => match step {
                Some(step) => tell(way, report, &step),
                None => more_steps = false,
            },
            note = notes.recv(), if more_notes => match note {
                Some(note) => report.note(note),
                None => more_notes = false,
            },
        }
    }
    let planned = planned(task).await?;
    report.mirrored().unchanged = planned.unchanged;
    let verdict = may_delete(args, console, &planned, report);
    if let Ok(true) = verdict {
        for item in in_order(planned.deletes).into_iter().flatten() {
            let path = copy_name(way, &item.rel);
            report.deleted(&path, thing(&item.entry));
        }
        for step in &planned.late {
            tell(way, report, step);
        }
    }
    verdict.map(drop)
}

fn tell(way: &Way, report: &mut Report, step: &Step) {
    let (Step::File(item, _) | Step::Other(item)) = step;
    let size = match item.entry.kind {
        EntryKind::File => Some(item.entry.size),
        _ => None,
    };
    let (path, source) = (copy_name(way, &item.rel), source_name(way, &item.rel));
    report.planned(&path, &source, thing(&item.entry), size, Ok(Fate::Send));
}

/// The name of an entry in the copy.
fn copy_name(way: &Way, rel: &str) -> String {
    match way.up {
        true => join(way.prefix(), rel),
        false => rel.to_owned(),
    }
}

/// The name of an entry in the source.
fn source_name(way: &Way, rel: &str) -> String {
    match way.up {
        true => way.dir.join(names::os(rel)).display().to_string(),
        false => join(way.prefix(), rel),
    }
}

fn thing(entry: &Entry) -> Thing {
    match entry.kind {
        EntryKind::Dir => Thing::Dir,
        EntryKind::Link => Thing::Link,
        EntryKind::File | EntryKind::Other => Thing::File,
    }
}

/// The entries to delete, in groups: first everything but directories, then directories, deepest first.
fn in_order(deletes: Vec<Item>) -> Vec<Vec<Item>> {
    let (dirs, others): (Vec<_>, Vec<_>) = deletes
        .into_iter()
        .partition(|item| item.entry.kind == EntryKind::Dir);
    let mut groups = vec![others];
    let mut levels: Vec<Vec<Item>> = Vec::new();
    for dir in dirs {
        let depth = dir.rel.matches('/').count();
        if levels.len() <= depth {
            levels.resize_with(depth + 1, Vec::new);
        }
        if let Some(level) = levels.get_mut(depth) {
            level.push(dir);
        }
    }
    groups.extend(levels.into_iter().rev());
    groups
}

/// One run that changes something.
struct Mirror<'a> {
    args: &'a SyncArgs,
    console: &'a Console,
    link: Link,
    way: &'a Way,
    /// The store of the local directory, if that is the copy.
    store: Option<Store>,
}

impl Mirror<'_> {
    async fn run(&self, comparing: Comparing, report: &mut Report) -> anyhow::Result<()> {
        let Comparing { steps, notes, task } = comparing;
        self.transfer(steps, Some(notes), report).await;
        for round in 1..TRIES {
            let again = report.take_changed(round + 1 < TRIES);
            if again.is_empty() {
                break;
            }
            let again = again.iter().map(|(path, _)| self.again(path)).collect();
            self.transfer(each(again), None, report).await;
        }
        let mut planned = planned(task).await?;
        report.mirrored().unchanged = planned.unchanged;
        let verdict = may_delete(self.args, self.console, &planned, report);
        if let Ok(true) = verdict {
            for group in in_order(std::mem::take(&mut planned.deletes)) {
                self.delete(group, report).await;
            }
            let late = std::mem::take(&mut planned.late);
            if !late.is_empty() {
                self.transfer(each(late), None, report).await;
            }
        }
        self.touch(planned.touches, report).await;
        verdict.map(drop)
    }

    /// Sends a file again, by its name in the copy.
    fn again(&self, path: &str) -> Step {
        let rel = match (self.way.up, self.way.prefix()) {
            (true, prefix) if !prefix.is_empty() => {
                path.get(prefix.len() + 1..).unwrap_or_default()
            }
            _ => path,
        };
        let local = self.way.dir.join(names::os(rel));
        let size = match self.way.up {
            true => std::fs::metadata(local).map_or(0, |metadata| metadata.len()),
            false => 0,
        };
        let entry = Entry {
            path: match self.way.up {
                true => rel.to_owned(),
                false => join(self.way.prefix(), rel),
            },
            kind: EntryKind::File,
            size,
            mtime: Time { secs: 0, nanos: 0 },
            mode: 0,
            target: None,
            unread: false,
        };
        let item = Item {
            rel: rel.to_owned(),
            entry,
            dirs: Arc::default(),
        };
        Step::File(item, None)
    }

    /// Carries out steps until there are no more, and reports each outcome.
    async fn transfer(
        &self,
        steps: mpsc::Receiver<Step>,
        notes: Option<mpsc::Receiver<Note>>,
        report: &mut Report,
    ) {
        let mut meter = Meter::new(self.args.show.progress, self.console);
        let origins = Origins::default();
        match &self.store {
            None => {
                let transfer = Transfer::Up(self.uploader().put(self.sources(steps, &origins)));
                let beside = notes.map(|notes| Beside {
                    notes,
                    over: oneshot::channel().0,
                });
                report.follow(transfer, beside, &origins, &mut meter).await;
            }
            Some(store) => {
                let (tell, told) = mpsc::channel(AHEAD);
                let (wanted, listed) = mpsc::channel(AHEAD);
                let root = self.way.prefix().to_owned();
                let mut making = JoinSet::new();
                if let Some(notes) = notes {
                    making.spawn(pass_on(notes, tell.clone()));
                }
                let maker = Maker {
                    store: store.clone(),
                    if_exists: IfExists::Overwrite,
                    umask: umask(),
                    notes: tell,
                };
                making.spawn(make(maker, root, steps, wanted));
                let downloader = self.args.pace.downloader(&self.link, store.clone());
                let downloader = downloader
                    .if_exists(IfExists::Overwrite)
                    .delta(self.args.delta.into())
                    .preserve(true)
                    .xattrs(self.args.keep.xattrs());
                let transfer = Transfer::Down(downloader.get(origins.of_downloads(listed)));
                let beside = Some(Beside {
                    notes: told,
                    over: oneshot::channel().0,
                });
                report.follow(transfer, beside, &origins, &mut meter).await;
            }
        }
    }

    fn uploader(&self) -> Uploader {
        let uploader = self.args.pace.uploader(&self.link);
        uploader
            .if_exists(IfExists::Overwrite)
            .delta(self.args.delta.into())
            .may_tear(self.args.changed == ChangedArg::Warn)
            .preserve(true)
            .xattrs(self.args.keep.xattrs())
    }

    /// The sources to send, step by step.
    fn sources(
        &self,
        mut steps: mpsc::Receiver<Step>,
        origins: &Origins,
    ) -> impl Iterator<Item = Source> + Send + use<> {
        let (dir, prefix) = (self.way.dir.clone(), self.way.prefix().to_owned());
        let steps = std::iter::from_fn(move || steps.blocking_recv());
        origins.of(steps.map(move |step| {
            let (item, base) = match step {
                Step::File(item, base) => (item, base),
                Step::Other(item) => (item, None),
            };
            let what = thing(&item.entry);
            let found = found(&dir, &prefix, item);
            let shown = found.local.display().to_string();
            let base = base.and_then(|base| join(&prefix, &base).parse().ok());
            let source = match base {
                Some(base) => Source::from(found).base(base),
                None => Source::from(found),
            };
            (source, Origin { shown, what })
        }))
    }

    /// Deletes entries of the copy, several in parallel.
    async fn delete(&self, group: Vec<Item>, report: &mut Report) {
        let remote = Remote::new(&self.link);
        let mut left = group.into_iter();
        let mut running = JoinSet::new();
        loop {
            while running.len() < DELETES
                && let Some(item) = left.next()
            {
                let path = copy_name(self.way, &item.rel);
                let (remote, store) = (remote.clone(), self.store.clone());
                running.spawn(async move {
                    let removed = remove(&remote, store, &path).await;
                    (item, path, removed)
                });
            }
            let Some(done) = running.join_next().await else {
                return;
            };
            let Ok((item, path, removed)) = done else {
                continue;
            };
            match removed {
                Ok(true) => report.deleted(&path, thing(&item.entry)),
                Ok(false) => {}
                Err(error) => report.failed(&path, &path, &error),
            }
        }
    }

    /// Sets the times and modes of directories, which storing and deleting has changed.
    async fn touch(&self, touches: Vec<Item>, report: &mut Report) {
        if touches.is_empty() {
            return;
        }
        if let Some(store) = self.store.clone() {
            let root = self.way.prefix().to_owned();
            let failed = tokio::task::spawn_blocking(move || {
                let mut failed = Vec::new();
                for Item { rel, entry, .. } in touches {
                    let Ok(local) = rel.parse::<RelPath>() else {
                        continue;
                    };
                    let policy = IfExists::Overwrite;
                    if let Err(error) = apply_entry(&store, &entry, &local, policy, true, None) {
                        let source = join(&root, &rel);
                        let (path, error) = (rel, error.into());
                        failed.push(Note::Failed {
                            path,
                            source,
                            error,
                        });
                    }
                }
                failed
            });
            for note in failed.await.unwrap_or_default() {
                report.note(note);
            }
            return;
        }
        let (dir, prefix) = (self.way.dir.clone(), self.way.prefix().to_owned());
        let sources = touches
            .into_iter()
            .map(move |item| Source::from(found(&dir, &prefix, item)));
        let mut upload = self.uploader().put(sources);
        while let Some(event) = upload.next().await {
            if let Event::Failed { path, error, .. } = event {
                let (source, error) = (path.clone(), error.into());
                report.note(Note::Failed {
                    path,
                    source,
                    error,
                });
            }
        }
    }
}

/// A local entry as something to send.
fn found(dir: &Path, prefix: &str, item: Item) -> Found {
    let Item { rel, entry, dirs } = item;
    let (local, remote) = (dir.join(names::os(&rel)), join(prefix, &rel));
    let what = match (remote.parse::<RelPath>(), entry.kind, entry.target) {
        (Ok(remote), EntryKind::Dir, _) => What::Dir { remote },
        (Ok(remote), EntryKind::Link, Some(target)) => What::Link { remote, target },
        (Ok(remote), ..) => What::File {
            remote,
            size: entry.size,
        },
        (Err(error), ..) => What::Failed(TransferError::Name {
            path: local.clone(),
            reason: error.to_string(),
        }),
    };
    Found {
        local,
        remote,
        what,
        dirs,
    }
}

/// These steps, one after the other.
fn each(steps: Vec<Step>) -> mpsc::Receiver<Step> {
    let (send, taken) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        for step in steps {
            if send.send(step).await.is_err() {
                return;
            }
        }
    });
    taken
}

async fn pass_on(mut notes: mpsc::Receiver<Note>, tell: mpsc::Sender<Note>) {
    while let Some(note) = notes.recv().await {
        if tell.send(note).await.is_err() {
            return;
        }
    }
}

/// Creates directories and links here, and passes on the wanted files.
async fn make(
    maker: Maker,
    root: String,
    mut steps: mpsc::Receiver<Step>,
    wanted: mpsc::Sender<Wanted>,
) {
    while let Some(step) = steps.recv().await {
        let (Step::File(item, _) | Step::Other(item)) = step;
        let goes_on = match item.rel.parse::<RelPath>() {
            Ok(local) => {
                let size = Some(item.entry.size).filter(|size| *size > 0);
                maker.place(&item.entry, local, size, &wanted).await
            }
            Err(error) => {
                let source = join(&root, &item.rel);
                maker.failed(&item.rel, &source, error.into()).await
            }
        };
        if !goes_on {
            return;
        }
    }
}

/// Removes one entry of the copy; `false` if it is gone already, or is a directory that still contains something.
async fn remove(remote: &Remote, store: Option<Store>, path: &str) -> anyhow::Result<bool> {
    let name: RelPath = path.parse()?;
    let removed = match store {
        None => remote.remove(&name, false).await.map(drop),
        Some(store) => tokio::task::spawn_blocking(move || store.remove(&name, false))
            .await
            .context("deleting failed")?
            .map(drop)
            .map_err(|error| TransferError::Store(Arc::new(error))),
    };
    let code = match &removed {
        Ok(()) => return Ok(true),
        Err(TransferError::Refused { code, .. }) => Some(*code),
        Err(TransferError::Store(error)) => Some(error.refusal()),
        Err(_) => None,
    };
    match code {
        Some(Code::NotFound) => Ok(false),
        Some(Code::NotEmpty) => {
            tracing::info!(path, "something is in it that stays");
            Ok(false)
        }
        _ => removed.map(|()| true).map_err(Into::into),
    }
}
