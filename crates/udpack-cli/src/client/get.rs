//! `get`: downloads files and directories.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{self, Poll};

use futures_util::{StreamExt as _, stream};
use tokio::io::AsyncWrite;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use udpack_transfer::{
    Download, Downloader, Entry, Exclude, Fetch, FetchError, Fetched, Kind as EntryKind, Link,
    Mapping, Progress, RelPath, Remote, Store, TransferError, Wanted, names,
};

use super::local::{Maker, Place};
use super::producer::Spawned;
use super::remote::{below, is_in, join, remote_path};
use super::report::{Beside, Note, Origin, Origins, Report, Thing, Transfer};
use super::umask;
use crate::args::{GetArgs, WrittenArg};
use crate::exit::{Failure, Kind, Unfinished};
use crate::logging::Console;
use crate::output;
use crate::progress::Meter;
use crate::signals::Interrupts;
use crate::target::{Target, retry};

pub(super) async fn run(
    mut args: GetArgs,
    console: &Console,
    interrupts: Interrupts,
) -> anyhow::Result<()> {
    // `get FILE -` names the target last, as `cp FILE DIR` does. A file of this name is `./-`.
    if let [_, last] = &args.paths[..]
        && last == "-"
        && args.name.is_none()
        && args.to_command.is_none()
    {
        args.paths.pop();
        args.name = Some(PathBuf::from("-"));
    }
    let mut report = Report::new(console, args.show.json, &args.connect.log);
    let result = get(&args, console, interrupts, &mut report).await;
    report.finish(result)
}

/// One of the requested paths, which exists at the server.
#[derive(Debug, Clone)]
struct Root {
    entry: Entry,
    /// Its name in the store; empty if only its entries are stored.
    local: String,
}

async fn get(
    args: &GetArgs,
    console: &Console,
    mut interrupts: Interrupts,
    report: &mut Report,
) -> anyhow::Result<()> {
    let sink = match &args.to_command {
        Some(line) => Some(Sink::Command(line.clone())),
        None => args.name.as_deref().and_then(Sink::of),
    };
    if let Some(sink) = &sink {
        sink.check(args, report)?;
    }
    let place = match sink {
        // A dry run stores nothing.
        Some(_) => Place {
            dir: PathBuf::new(),
            name: None,
        },
        None => Place::new(args)?,
    };
    let mut names = names(args, &place)?;
    if args.names == WrittenArg::Mapped && place.name.is_none() {
        // What was asked for by several names has one directory to be in.
        let mut mapping = Mapping::new(true);
        names = names.iter().map(|name| mapping.path(name)).collect();
    }
    let target = Target::find(&args.connect)?.via(&args.transfer.paths)?;
    let mut opened = None;
    let result = target
        .run_link(
            retry(args.transfer.pace.retries),
            &mut interrupts,
            async |link| {
                let remote = Remote::new(&link);
                report.expect(Some(args.paths.len()));
                let early = early(args, &link, sink.as_ref(), &place, &names, &mut opened).await?;
                let roots = look_up(args, &remote, names, sink.is_some(), report).await;
                let files = roots
                    .iter()
                    .all(|root| root.entry.kind == EntryKind::File)
                    .then_some(args.paths.len());
                let bytes = files.map(|_| roots.iter().map(|root| root.entry.size).sum());
                report.expect(files);
                if roots.is_empty() {
                    return Ok(());
                }
                report.start(&target.address(), bytes);
                match (early, &roots[..]) {
                    (Early::Poured(pouring), [root]) => {
                        pouring.follow(args, console, &link, root, report).await;
                        return Ok(());
                    }
                    (Early::Stored(download), [root]) if root.entry.kind == EntryKind::File => {
                        let origins = Origins::default();
                        let shown = root.entry.path.clone();
                        let what = Thing::File;
                        origins.insert(0, Origin { shown, what });
                        let mut meter = Meter::new(args.show.progress, console);
                        report.connected(&link, &mut meter);
                        let transfer = Transfer::Down(download);
                        report.follow(transfer, None, &origins, &mut meter).await;
                        return Ok(());
                    }
                    _ => {}
                }
                let store = match &opened {
                    Some(store) => store.clone(),
                    None => {
                        let transfer = &args.transfer;
                        place
                            .open(transfer.if_exists.into(), transfer.keep.xattrs())
                            .await?
                    }
                };
                opened = Some(store.clone());
                fetch(args, console, &link, &remote, store, roots, report).await
            },
        )
        .await;
    if let Some(store) = opened {
        place.close(store, report).await;
    }
    result
}

/// A file that is requested before the server has said that it is one. That saves a round trip.
enum Early {
    Poured(Pouring),
    Stored(Download),
    No,
}

/// Requests the only path as a file, if it may be one. Leaves the store that this needed in `opened`.
async fn early(
    args: &GetArgs,
    link: &Link,
    sink: Option<&Sink>,
    place: &Place,
    names: &[String],
    opened: &mut Option<Store>,
) -> anyhow::Result<Early> {
    let ([path], [local]) = (&args.paths[..], names) else {
        return Ok(Early::No);
    };
    let content = path.ends_with('/') || path.ends_with("/.");
    let Some(remote) = remote_path(path).ok().flatten().filter(|_| !content) else {
        return Ok(Early::No);
    };
    if let Some(sink) = sink {
        let pouring = Pouring::begin(args, link, sink.clone(), remote);
        return Ok(Early::Poured(pouring));
    }
    let Some(local) = local.parse().ok().filter(|_| place.dir.is_dir()) else {
        return Ok(Early::No);
    };
    let transfer = &args.transfer;
    let opening = place.open(transfer.if_exists.into(), transfer.keep.xattrs());
    let store = opening.await?;
    *opened = Some(store.clone());
    let size = None;
    let wanted = Wanted {
        remote,
        local,
        size,
    };
    let download = downloader(args, link, store).get([wanted]);
    Ok(Early::Stored(download))
}

/// Looks up all paths, several in parallel. Those that fail go into the report.
async fn look_up(
    args: &GetArgs,
    remote: &Remote,
    names: Vec<String>,
    pours: bool,
    report: &mut Report,
) -> Vec<Root> {
    let found = args.paths.iter().zip(names);
    let found = found.map(|(path, local)| async move { (path, find(remote, path, local).await) });
    let mut found = stream::iter(found).buffered(LOOKUPS);
    let mut roots = Vec::new();
    while let Some((path, found)) = found.next().await {
        match found {
            Ok(root) if pours && root.entry.kind != EntryKind::File => {
                let text = format!("{} is no file", output::printable(path));
                let error = Failure::new(Kind::Usage, text).hint(
                    "only a single file can be written there; --as DIR/ gets whole directories",
                );
                report.failed(path, path, &error.into());
            }
            Ok(root) => roots.push(root),
            Err(error) => report.failed(path, path, &error),
        }
    }
    roots
}

fn downloader(args: &GetArgs, link: &Link, store: Store) -> Downloader {
    let transfer = &args.transfer;
    let downloader = transfer.pace.downloader(link, store);
    downloader
        .if_exists(transfer.if_exists.into())
        .preserve(transfer.preserve)
        .xattrs(transfer.keep.xattrs())
        .delta(args.delta.into())
}

async fn fetch(
    args: &GetArgs,
    console: &Console,
    link: &Link,
    remote: &Remote,
    store: Store,
    roots: Vec<Root>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let origins = Origins::default();
    let (wanted, listed) = mpsc::channel::<Wanted>(AHEAD);
    let (notes, noted) = mpsc::channel(AHEAD);
    let lister = Lister {
        remote: remote.clone(),
        exclude: args.exclude.iter().cloned().collect(),
        mapping: mapping(args, &store).await,
        maker: Maker {
            store: store.clone(),
            if_exists: args.transfer.if_exists.into(),
            umask: umask(),
            notes,
        },
    };
    // Ends when the receivers of its results are gone.
    let listing = tokio::spawn({
        let lister = lister.clone();
        let roots = roots.clone();
        async move {
            for root in &roots {
                lister.list(root, &wanted).await;
            }
        }
    });
    let downloader = downloader(args, link, store.clone());
    let mut meter = Meter::new(args.show.progress, console);
    report.connected(link, &mut meter);
    let download = downloader.get(origins.of_downloads(listed));
    let preserve = args.transfer.preserve;
    let finisher = lister.clone();
    drop(lister);
    // Notes arrive until the last sender is gone: while files arrive, that is the lister.
    let (done, after) = oneshot::channel();
    let finishing = tokio::spawn(async move {
        // The times of directories are set last, because storing a file changes that of its directory.
        if after.await.is_ok() && preserve {
            for root in &roots {
                finisher.finish(root).await;
            }
        }
    });
    let beside = Beside {
        notes: noted,
        over: done,
    };
    report
        .follow(Transfer::Down(download), Some(beside), &origins, &mut meter)
        .await;
    let _ = tokio::join!(listing, finishing);
    drop(store);
    Ok(())
}

/// Lists the requested paths, and creates the directories and links in them.
#[derive(Debug, Clone)]
struct Lister {
    remote: Remote,
    exclude: Exclude,
    /// How names are written here, if not as they are.
    mapping: Option<Arc<Mutex<Mapping>>>,
    maker: Maker,
}

/// How names are written below a store, if not as they are.
async fn mapping(args: &GetArgs, store: &Store) -> Option<Arc<Mutex<Mapping>>> {
    if args.names != WrittenArg::Mapped {
        return None;
    }
    // The store has made a directory of its own there: is it there by another name, too?
    let other = store.root().join(".UDPACK");
    let folds = tokio::task::spawn_blocking(move || other.exists()).await;
    let mapping = Mapping::new(folds.unwrap_or(true));
    Some(Arc::new(Mutex::new(mapping)))
}

impl Lister {
    /// Sends every file below a root to `wanted`. Failures become notes.
    async fn list(&self, root: &Root, wanted: &mpsc::Sender<Wanted>) {
        match root.entry.kind {
            EntryKind::File | EntryKind::Link | EntryKind::Other => {
                self.one(&root.entry, &root.local, wanted).await;
                return;
            }
            EntryKind::Dir => {}
        }
        if !root.local.is_empty() {
            self.one(&root.entry, &root.local, wanted).await;
        }
        let path = root.entry.path.parse::<RelPath>().ok();
        let mut listing = self.remote.list(path.as_ref(), true);
        while let Some(entry) = listing.next().await {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    self.maker
                        .failed(&root.local, &root.entry.path, error.into())
                        .await;
                    return;
                }
            };
            let relative = below(&root.entry.path, &entry.path);
            if self.exclude.covers(relative, entry.kind == EntryKind::Dir) {
                continue;
            }
            let written = self.written(relative);
            let local = join(&root.local, &written);
            if written != relative && !self.mapped(&local, &entry.path).await {
                return;
            }
            if !self.one(&entry, &local, wanted).await {
                return;
            }
            if entry.unread {
                let error = Failure::new(Kind::RemoteStorage, UNREAD);
                self.maker.failed(&local, &entry.path, error.into()).await;
            }
        }
    }

    /// Handles one entry; returns `false` when nobody takes files any more.
    async fn one(&self, entry: &Entry, local: &str, wanted: &mpsc::Sender<Wanted>) -> bool {
        let name = match local.parse::<RelPath>() {
            Ok(name) => name,
            Err(error) => {
                let error = Failure::new(Kind::Policy, error.to_string())
                    .hint("choose another name with --as");
                return self.maker.failed(local, &entry.path, error.into()).await;
            }
        };
        let size = Some(entry.size);
        self.maker.place(entry, name, size, wanted).await
    }

    /// The path below a root as it is written here.
    fn written(&self, relative: &str) -> String {
        match &self.mapping {
            Some(mapping) => mapping
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .path(relative),
            None => relative.to_owned(),
        }
    }

    /// Says that something is written under another name.
    async fn mapped(&self, path: &str, source: &str) -> bool {
        let note = Note::Mapped {
            path: path.to_owned(),
            source: source.to_owned(),
        };
        self.maker.notes.send(note).await.is_ok()
    }

    /// Sets the times and modes of a root's directories, children before their parents.
    async fn finish(&self, root: &Root) {
        if root.entry.kind != EntryKind::Dir {
            return;
        }
        let path = root.entry.path.parse::<RelPath>().ok();
        let mut open: Vec<Entry> = Vec::new();
        if !root.local.is_empty() {
            open.push(root.entry.clone());
        }
        let mut listing = self.remote.list(path.as_ref(), true);
        while let Some(entry) = listing.next().await {
            // If it cannot be listed now, it could be before: its files have arrived.
            let Ok(entry) = entry else { return };
            while let Some(dir) = open.pop_if(|dir| !is_in(&entry.path, &dir.path)) {
                self.settle(root, &dir).await;
            }
            let relative = below(&root.entry.path, &entry.path);
            if entry.kind == EntryKind::Dir && !self.exclude.covers(relative, true) {
                open.push(entry);
            }
        }
        while let Some(dir) = open.pop() {
            self.settle(root, &dir).await;
        }
    }

    async fn settle(&self, root: &Root, dir: &Entry) {
        let written = self.written(below(&root.entry.path, &dir.path));
        let local = join(&root.local, &written);
        if let Ok(name) = local.parse() {
            self.maker.make(dir, name, true, false).await;
        }
    }
}

/// A target that is no regular file: standard output, a named pipe, a device.
#[derive(Debug, Clone)]
enum Sink {
    Stdout,
    Path(PathBuf),
    /// The standard input of a shell command.
    Command(String),
}

impl Sink {
    fn of(name: &Path) -> Option<Self> {
        if name == Path::new("-") || name == Path::new("/dev/stdout") {
            return Some(Self::Stdout);
        }
        let metadata = std::fs::metadata(name).ok()?;
        if is_stdout(&metadata) {
            return Some(Self::Stdout);
        }
        let is_fd = name.starts_with("/dev/fd") || name.starts_with("/proc/self/fd");
        let is_file = metadata.is_file() && !is_fd;
        (!is_file && !metadata.is_dir()).then(|| Self::Path(name.to_owned()))
    }

    /// Checks that a single file is requested, and reserves standard output for it.
    fn check(&self, args: &GetArgs, report: &mut Report) -> anyhow::Result<()> {
        if args.paths.len() > 1 {
            let text = match self {
                Self::Command(_) => "--to-command takes a single path",
                _ => "--as NAME takes a single path",
            };
            return Err(Failure::new(Kind::Usage, text)
                .hint(
                    "get them one by one, or name a directory after --as, with a slash at its end",
                )
                .into());
        }
        if matches!(self, Self::Stdout) {
            if args.show.json {
                let text = "standard output cannot have both the file and --json";
                return Err(Failure::new(Kind::Usage, text)
                    .hint("leave out --json, or name a file after --as")
                    .into());
            }
            report.mute();
        }
        // The report must not mix with what the command prints.
        if matches!(self, Self::Command(_)) && !args.show.json {
            report.mute();
        }
        Ok(())
    }

    /// Opens it. For a named pipe this waits for a reader. Blocks.
    fn open(&self) -> io::Result<Box<dyn Open>> {
        Ok(match self {
            Self::Stdout => Box::new(Plain(io::stdout())),
            Self::Command(line) => Box::new(Spawned::new(line)),
            Self::Path(path) => {
                let opened = File::options().write(true).open(path);
                Box::new(Plain(opened.map_err(|error| {
                    let text = format!("cannot write to {}: {error}", path.display());
                    io::Error::new(error.kind(), text)
                })?))
            }
        })
    }
}

/// Whether this is the file that standard output goes to, under any name.
fn is_stdout(metadata: &Metadata) -> bool {
    let stdout = io::stdout().as_fd().try_clone_to_owned();
    let stdout = stdout.and_then(|stdout| File::from(stdout).metadata());
    stdout.is_ok_and(|stdout| (stdout.dev(), stdout.ino()) == (metadata.dev(), metadata.ino()))
}

/// An open target.
trait Open: Send {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Called when everything is written.
    fn end(&mut self) -> io::Result<()>;
}

/// A target that need not be ended.
struct Plain<W>(W);

impl<W: io::Write + Send> Open for Plain<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn end(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Open for Spawned {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let wrote = match &mut self.consumer()?.stdin {
            Some(stdin) => io::Write::write(stdin, bytes),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        match wrote {
            // The command's exit status says more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.end()?;
                let text = "the command exited with 0 before it had read the whole file";
                Err(Unfinished::new(text).into())
            }
            wrote => wrote,
        }
    }

    fn end(&mut self) -> io::Result<()> {
        drop(self.consumer()?.stdin.take());
        self.succeeded()
    }
}

/// Makes a blocking target usable from async code. The runtime moves the other tasks of the thread to another one
/// meanwhile.
struct Writer {
    sink: Sink,
    /// Opened with the first bytes, or at the end.
    open: Option<Box<dyn Open>>,
}

impl Writer {
    fn with<T>(
        &mut self,
        work: impl FnOnce(&mut dyn Open) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        Poll::Ready(tokio::task::block_in_place(|| {
            let writer = match &mut self.open {
                Some(writer) => writer,
                none => none.insert(self.sink.open()?),
            };
            work(&mut **writer)
        }))
    }
}

impl AsyncWrite for Writer {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut task::Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.with(|writer| writer.write(bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        self.with(|writer| writer.end())
    }

    fn poll_shutdown(
        self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_flush(context)
    }
}

/// A file that is written to a target as it arrives. The bytes are known to be right only when this has succeeded; the
/// last bytes are written only then.
struct Pouring {
    /// A task of its own, because writing blocks while nobody reads.
    fetching: JoinSet<Result<Fetched, FetchError>>,
    progress: watch::Receiver<Progress>,
}

impl Pouring {
    fn begin(args: &GetArgs, link: &Link, sink: Sink, path: RelPath) -> Self {
        let (tell, progress) = watch::channel(Progress::default());
        let limit = args.transfer.pace.bwlimit.limit_down();
        let fetch = Fetch::new(link).progress(tell).limit(limit);
        let mut writer = Writer { sink, open: None };
        let mut fetching = JoinSet::new();
        fetching.spawn(async move { fetch.read(&path, &mut writer).await });
        Self { fetching, progress }
    }

    async fn follow(
        mut self,
        args: &GetArgs,
        console: &Console,
        link: &Link,
        root: &Root,
        report: &mut Report,
    ) {
        let name = match (&args.name, &args.to_command) {
            (None, Some(line)) => line.clone(),
            (Some(name), _) => names::from_os(name.as_os_str()).into_owned(),
            (None, None) => String::new(),
        };
        let mut meter = Meter::new(args.show.progress, console);
        report.connected(link, &mut meter);
        let fetched = async {
            match self.fetching.join_next().await {
                Some(Ok(fetched)) => fetched,
                _ => Err(FetchError {
                    written: 0,
                    cause: TransferError::Protocol("writing the file failed".to_owned()),
                }),
            }
        };
        let (links, shown) = (link.events(), &root.entry.path);
        report
            .follow_fetch(fetched, self.progress, links, &name, shown, &mut meter)
            .await;
    }
}

impl Place {
    fn new(args: &GetArgs) -> anyhow::Result<Self> {
        let Some(wanted) = &args.name else {
            return Ok(Self {
                dir: PathBuf::from("."),
                name: None,
            });
        };
        let is_dir =
            wanted.as_os_str().as_encoded_bytes().ends_with(b"/") || wanted.file_name().is_none();
        if is_dir {
            let above = wanted.parent().filter(|above| *above != Path::new(""));
            if !wanted.is_dir()
                && let Some(above) = above
                && !above.is_dir()
            {
                return Err(no_dir(above));
            }
            return Ok(Self {
                dir: wanted.clone(),
                name: None,
            });
        }
        if args.paths.len() > 1 {
            return Err(Failure::new(Kind::Usage, "--as NAME takes a single path")
                .hint("end it with a slash to name a directory for all of them")
                .into());
        }
        let name = wanted.file_name().unwrap_or_default();
        let name = names::from_os(name);
        let dir = match wanted.parent() {
            Some(dir) if dir != Path::new("") => dir.to_owned(),
            _ => PathBuf::from("."),
        };
        if !dir.is_dir() {
            return Err(no_dir(&dir));
        }
        Ok(Self {
            dir,
            name: Some(name.into_owned()),
        })
    }
}

fn no_dir(dir: &Path) -> anyhow::Error {
    let text = format!("cannot write to {}: no such directory", dir.display());
    Failure::new(Kind::LocalFile, text)
        .hint("make it; --as DIR/ makes DIR alone")
        .into()
}

/// The name in the store of each requested path.
fn names(args: &GetArgs, place: &Place) -> anyhow::Result<Vec<String>> {
    let mut taken: HashMap<String, &str> = HashMap::new();
    let mut names = Vec::new();
    for path in &args.paths {
        let content = path.is_empty() || path == "." || path.ends_with('/');
        let own = match path.rsplit('/').next() {
            Some(name) if !content => name.to_owned(),
            _ => String::new(),
        };
        let name = place.name.clone().unwrap_or(own);
        if let Some(other) = taken.insert(name.clone(), path)
            && !name.is_empty()
        {
            let text = format!("{other} and {path} would both be stored as {name}");
            let text = output::printable(&text);
            return Err(Failure::new(Kind::Usage, text)
                .hint("get them one by one, with --as NAME")
                .into());
        }
        names.push(name);
    }
    Ok(names)
}

/// Looks a path up at the server.
async fn find(remote: &Remote, path: &str, local: String) -> anyhow::Result<Root> {
    let name = remote_path(path)?;
    let entry = remote.stat(name.as_ref()).await?;
    let local = match (entry.kind, &name) {
        // A trailing slash requests a directory.
        (EntryKind::File, Some(name)) if local.is_empty() => {
            return Err(Failure::new(Kind::Policy, format!("{name} is a file"))
                .hint("name it without the slash at its end")
                .into());
        }
        _ => local,
    };
    Ok(Root { entry, local })
}

/// The error for a directory that could not be listed completely.
pub(super) const UNREAD: &str = "the server cannot list all that is in it";
/// Paths that are looked up in parallel.
const LOOKUPS: usize = 16;
/// Entries that are listed ahead of the download.
const AHEAD: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_below_a_directory() {
        assert_eq!(below("", "a/b"), "a/b");
        assert_eq!(below("a", "a/b/c"), "b/c");
        assert_eq!(below("a", "a"), "");
        assert!(is_in("a/b", "a"));
        assert!(!is_in("ab", "a"));
        assert!(!is_in("a", "a"));
    }
}
