//! [`Downloader`]: the client's half of a download. Asks for files on several lanes and keeps them full;
//! stores received files as a server stores uploads: staged, verified, on disk, and only then visible.

mod incoming;
mod lane;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::base::code::Code;
use crate::base::path::RelPath;
use crate::base::sums::Sums;
use crate::client::link::Link;
use crate::client::progress::{Event, Feed, LostXattrs, Outcome, Progress, Totals, Watch};
use crate::client::queue::SMALL;
use crate::client::remote::Remote;
use crate::client::uploader::{Delta, no_delta};
use crate::local::error::TransferError;
use crate::local::limiter::Limiter;
use crate::staging::file::Gathered;
use crate::staging::publisher::Staging;
use crate::staging::target::Target;
use crate::store::{
    Entry, IfExists, Kind, Meta, OtherTime, Placed, Published, Store, StoreError, Synced,
    XattrList, Xattrs,
};
use incoming::{Arriving, End, Ended, Note};
pub(crate) use lane::{ACK, BREAKS, HASHED, SILENCE};

/// The most files taken from the iterator ahead of the lanes.
const AHEAD: usize = 256;
/// The most notes of workers that are taken together.
const BATCH: usize = 256;

/// The settings of a download: the server, the store, the number of lanes.
#[derive(Debug, Clone)]
#[must_use = "a downloader does nothing until `get` is called"]
pub struct Downloader {
    link: Link,
    store: Store,
    lanes: usize,
    if_exists: IfExists,
    preserve: bool,
    umask: Option<u32>,
    delta: Delta,
    xattrs: Xattrs,
    limit: Limiter,
}

/// A file to download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its name at the server.
    pub remote: RelPath,
    /// Its name in the store.
    pub local: RelPath,
    /// Its size in bytes, if known from a listing. It is used for totals and for an early check of free space; the
    /// server's size at the time of sending is authoritative.
    pub size: Option<u64>,
}

impl Downloader {
    /// Downloads over this link, or over this socket as long as it lives: if the socket reconnects, the download
    /// continues over its next connection. The store should be opened as [`shared`](crate::StoreConfig::shared) and
    /// must grant what [`if_exists`](Self::if_exists) asks for.
    pub fn new(link: impl Into<Link>, store: Store) -> Self {
        Self {
            link: link.into(),
            store,
            lanes: 4,
            if_exists: IfExists::default(),
            preserve: false,
            umask: None,
            delta: Delta::default(),
            xattrs: Xattrs::None,
            limit: Limiter::unlimited(),
        }
    }

    /// The number of files received in parallel over each path of the link. Defaults to 4.
    pub fn lanes(mut self, lanes: usize) -> Self {
        self.lanes = lanes.max(1);
        self
    }

    /// The policy for taken local names. Defaults to [`IfExists::Same`]: an existing file with other bytes than the
    /// server's is kept, and the download of that file fails.
    pub fn if_exists(mut self, if_exists: IfExists) -> Self {
        self.if_exists = if_exists;
        self
    }

    /// Gives stored files the modification times and permissions of the server's files. Defaults to no.
    pub fn preserve(mut self, preserve: bool) -> Self {
        self.preserve = preserve;
        self
    }

    /// Without [`preserve`](Self::preserve), gives stored entries their permission bits without these bits, as `cp`
    /// does with the umask. Defaults to `None`: files are for their owner only.
    pub fn umask(mut self, umask: Option<u32>) -> Self {
        self.umask = umask;
        self
    }

    /// When to take from the file that is replaced what the new one has in common with it: with [`IfExists::Overwrite`], of
    /// files above 256 KiB. Where the server lists no chunks, all is sent. Defaults to [`Delta::Auto`].
    pub fn delta(mut self, delta: Delta) -> Self {
        self.delta = delta;
        self
    }

    /// Asks for these extended attributes of files, and gives them to the stored ones as far as
    /// [`StoreConfig::xattrs`](crate::StoreConfig::xattrs) takes them and the file system holds them:
    /// [`Outcome::lost_xattrs`](crate::Outcome::lost_xattrs) tells what is missing. A file that is there already keeps its own.
    /// Defaults to none.
    pub fn xattrs(mut self, xattrs: Xattrs) -> Self {
        self.xattrs = xattrs;
        self
    }

    /// Limits the rate at which bytes are read from the server, all lanes together. Defaults to no limit.
    ///
    /// The server may send ahead as much as the connection's windows permit.
    pub fn limit(mut self, limit: Limiter) -> Self {
        self.limit = limit;
        self
    }

    /// Starts to download. Files are begun in the given order; a file that fails does not stop the others.
    ///
    /// The iterator is read on a thread that may block, a few hundred files ahead of the lanes: the memory needed
    /// does not grow with the number of files. Larger files are resumed if an earlier download of the same local
    /// name, by this process or another, was interrupted.
    ///
    /// Must be called within a tokio runtime.
    pub fn get<I>(self, wanted: I) -> Download
    where
        I: IntoIterator<Item = Wanted>,
        I::IntoIter: Send + 'static,
    {
        let places = self
            .store
            .config()
            .max_open
            .clamp(1, Semaphore::MAX_PERMITS);
        let link_events = self.link.events();
        let paths = self.link.each();
        let context = Arc::new(Context {
            remote: Remote::new(&self.link),
            delta: self.delta,
            no_delta: AtomicBool::new(false),
            staging: Staging::new(Target::Disk(self.store)),
            if_exists: self.if_exists,
            preserve: self.preserve,
            umask: self.umask,
            xattrs: self.xattrs,
            limit: self.limit,
            queue: Queue::default(),
            room: Arc::new(Semaphore::new(AHEAD)),
            places: Arc::new(Semaphore::new(places)),
            lanes: AtomicUsize::new(self.lanes * paths.len()),
            totals: Arc::default(),
        });
        let (events, happened) = mpsc::channel(256);
        let (notes, noted) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        for _ in 0..self.lanes {
            for link in &paths {
                let (link, notes) = (link.clone(), notes.clone());
                tasks.spawn(lane::run(context.clone(), link, notes, events.clone()));
            }
        }
        tasks.spawn(settle_all(context.clone(), noted, events));
        feed(context.clone(), wanted.into_iter());
        Download {
            context,
            feed: Feed::new(tasks, happened, link_events),
        }
    }
}

/// A running download.
///
/// # Drop
/// Gives up unfinished files. Data of larger files is kept for the next download of the same name; it is not visible.
#[derive(Debug)]
pub struct Download {
    context: Arc<Context>,
    feed: Feed,
}

impl Download {
    /// The next event; `None` when every file has its `Done` or `Failed`. Progress is reported when it has changed,
    /// ten times a second at most, and once more at the end.
    ///
    /// Paths in events are names in the store. Bytes count as acknowledged when they are written here.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.feed.next(|| self.context.totals.progress()).await
    }

    /// Returns a watcher of the progress, of the whole and of each file: beside the events, and as often as asked
    /// for.
    pub fn watch(&self) -> Watch {
        self.context.totals.watch()
    }

    /// How far it is. Total and number of files grow while the iterator is read.
    pub fn progress(&self) -> Progress {
        self.context.totals.progress()
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        self.context.totals.close();
        self.context.room.close();
    }
}

/// Creates a directory or a link from a [`Listing`](crate::Listing) under this name in the store; returns whether it
/// existed. Does nothing for a file, which a [`Downloader`] stores.
///
/// `preserve` gives a directory its time and permissions: to be done after what is in it was stored, children
/// before their parents. Without it a directory that was not there gets its permissions but for those of `umask`, as
/// [`Downloader::umask`] says of files. Blocks: call it from a thread that may.
///
/// # Errors
/// [`TransferError::Store`]: among others when a link leads out of the store, or elsewhere than the one that
/// is there.
pub fn apply_entry(
    store: &Store,
    entry: &Entry,
    local: &RelPath,
    if_exists: IfExists,
    preserve: bool,
    umask: Option<u32>,
) -> Result<Placed, TransferError> {
    let meta = Meta {
        mtime: preserve.then_some(entry.mtime),
        mode: preserve.then_some(entry.mode),
    };
    let made = match (entry.kind, &entry.target) {
        (Kind::Dir, _) => {
            let new_mode = umask.map(|umask| entry.mode & 0o777 & !umask);
            store.make_dir_with(local, meta, &XattrList::default(), &[], new_mode, None)
        }
        (Kind::Link, Some(target)) => {
            let linked = store.make_link(local, target, if_exists);
            linked.map(|same| Placed {
                same,
                ..Placed::default()
            })
        }
        (Kind::Link, None) => {
            return Err(TransferError::Refused {
                code: Code::Forbidden,
                message: "the server does not say where the link leads".to_owned(),
                retry: false,
            });
        }
        (Kind::Other, _) => {
            return Err(TransferError::Refused {
                code: Code::NotAFile,
                message: "neither a file nor a directory nor a link that the server may read"
                    .to_owned(),
                retry: false,
            });
        }
        (Kind::File, _) => return Ok(Placed::default()),
    };
    made.map_err(|error| TransferError::Store(Arc::new(error)))
}

/// State that all parts of a download share.
#[derive(Debug)]
struct Context {
    /// Whom to ask for chunks, when, and whether it lists none.
    remote: Remote,
    delta: Delta,
    no_delta: AtomicBool,
    staging: Staging<Arriving>,
    if_exists: IfExists,
    preserve: bool,
    umask: Option<u32>,
    xattrs: Xattrs,
    limit: Limiter,
    queue: Queue,
    /// Limits how far the iterator is read ahead; closed when the download is dropped.
    room: Arc<Semaphore>,
    /// Limits the files that are open in the store. Permits are taken in the order in which files are requested.
    places: Arc<Semaphore>,
    /// Lanes that have not failed.
    lanes: AtomicUsize,
    totals: Arc<Totals>,
}

/// A file off the queue that has no worker yet: it goes back when it is dropped.
struct Held<'a> {
    context: &'a Context,
    job: Option<Job>,
}

impl<'a> Held<'a> {
    fn new(context: &'a Context, job: Job) -> Self {
        let job = Some(job);
        Self { context, job }
    }

    fn take(mut self) -> Option<Job> {
        self.job.take()
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(job) = self.job.take() {
            self.context.queue.put_back(job);
        }
    }
}

impl Context {
    /// The chunks of a file at the server, where one is here that it is likely to have bytes of and asking can pay.
    async fn sums(&self, job: &Job, pays: bool) -> Option<Sums> {
        let wanted = &job.wanted;
        let large = wanted.size.is_none_or(|size| size > SMALL);
        let asks = pays && large && !job.again && self.if_exists == IfExists::Overwrite;
        if !asks || self.no_delta.load(Ordering::Relaxed) {
            return None;
        }
        let target = self.staging.target().clone();
        let (looking, path) = (target.clone(), wanted.local.clone());
        let found = target.run(async move { looking.stat(Some(&path)).await });
        let Ok(Some(Ok(here))) = found.await else {
            return None;
        };
        if here.kind != Kind::File || here.size <= SMALL {
            return None;
        }
        let size = wanted.size.unwrap_or(here.size);
        let sums = async {
            let (sums, others) = self.remote.sums(&wanted.remote, size).await?;
            others.all(sums).await
        };
        match sums.await {
            Ok(sums) => Some(sums).filter(|sums| sums.end() > SMALL && !sums.is_full()),
            Err(error) => {
                if no_delta(&error) {
                    self.no_delta.store(true, Ordering::Relaxed);
                }
                tracing::debug!(%error, path = wanted.remote.as_str(), "no chunks to compare with");
                None
            }
        }
    }

    /// The collector of small files, which a download does not use.
    fn gathered(&self) -> Gathered<Arriving> {
        self.staging.gathered()
    }

    /// Corrects the file's size, in bytes.
    fn resize(&self, job: &mut Job, size: u64) {
        self.totals
            .resize(job.index, &mut job.size, job.counted, size);
    }

    /// At least this many bytes of the file are here.
    fn count(&self, job: &mut Job, bytes: u64) {
        self.totals.ack(job.index, &mut job.counted, bytes);
    }

    async fn done(&self, events: &mpsc::Sender<Event>, mut job: Job, arrived: Arrived) {
        self.resize(&mut job, arrived.size);
        let all = job.size;
        self.count(&mut job, all);
        self.totals.end(job.index, true);
        let outcome = Outcome {
            index: job.index,
            path: arrived.path,
            size: arrived.size,
            hash: arrived.hash,
            sent: job.received,
            resumed: job.resumed.saturating_sub(job.copied),
            holes: job.holes,
            torn: false,
            copied: job.copied.min(job.resumed),
            same: arrived.same,
            skipped: arrived.skipped,
            sync: arrived.sync,
            other_time: arrived.other_time,
            lost_xattrs: match job.xattrs {
                _ if arrived.same || arrived.skipped => LostXattrs::None,
                Some(told) => LostXattrs::of(told, arrived.xattrs),
                None => LostXattrs::Withheld,
            },
            elapsed: job
                .since
                .map_or_else(Default::default, |since| since.elapsed()),
        };
        let _ = events.send(Event::Done(outcome)).await;
    }

    async fn failed(&self, events: &mpsc::Sender<Event>, job: Job, error: TransferError) {
        self.totals.fail(job.index, true, (job.size, job.counted));
        let failed = Event::Failed {
            index: job.index,
            path: job.wanted.local.as_str().to_owned(),
            error,
        };
        let _ = events.send(failed).await;
    }
}

#[derive(Debug)]
struct Arrived {
    path: String,
    size: u64,
    hash: [u8; 32],
    same: bool,
    skipped: bool,
    sync: Option<Synced>,
    other_time: Option<OtherTime>,
    xattrs: u32,
}

impl From<Published> for Arrived {
    fn from(published: Published) -> Self {
        Self {
            path: published.path,
            size: published.size,
            hash: published.hash,
            same: published.same,
            skipped: false,
            sync: Some(published.sync),
            other_time: published.other_time,
            xattrs: published.xattrs,
        }
    }
}

/// A file between the iterator and its outcome.
#[derive(Debug)]
struct Job {
    index: usize,
    wanted: Wanted,
    /// Its part of the total in bytes, and the bytes of it that count as received. `counted` never exceeds `size`.
    size: u64,
    counted: u64,
    /// Bytes received over the network, and bytes that existed already.
    received: u64,
    resumed: u64,
    /// Bytes of holes, and bytes that the file which is replaced had.
    holes: u64,
    copied: u64,
    /// How many extended attributes it came with; `None` if the server withholds those that were asked for.
    xattrs: Option<u32>,
    since: Option<Instant>,
    started: bool,
    /// Whether this is the second attempt, because the first one's bytes did not match the server's hash.
    again: bool,
    /// Its place in the queue, until it is first taken.
    room: Option<OwnedSemaphorePermit>,
}

/// Files that wait for a lane.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Notify,
    /// Whether the iterator has ended.
    fed: AtomicBool,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    /// How many taken files have no outcome, and may be returned.
    open: usize,
}

impl Queue {
    fn push(&self, job: Job) {
        lock(&self.waiting).jobs.push_back(job);
        self.changed.notify_waiters();
    }

    /// Returns a taken file to the front.
    fn put_back(&self, job: Job) {
        {
            let mut waiting = lock(&self.waiting);
            waiting.jobs.push_front(job);
            waiting.open = waiting.open.saturating_sub(1);
        }
        self.changed.notify_waiters();
    }

    /// Records that a taken file has its outcome.
    fn settled(&self) {
        {
            let mut waiting = lock(&self.waiting);
            waiting.open = waiting.open.saturating_sub(1);
        }
        self.changed.notify_waiters();
    }

    fn feed_ended(&self) {
        self.fed.store(true, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// The next file; `None` when all have their outcome.
    async fn next(&self) -> Option<Job> {
        self.wait(|waiting| {
            let mut job = waiting.jobs.pop_front()?;
            waiting.open += 1;
            job.room = None;
            job.since.get_or_insert_with(Instant::now);
            Some(job)
        })
        .await
    }

    /// Waits until all have their outcome.
    async fn over(&self) {
        let _: Option<()> = self.wait(|_| None).await;
    }

    /// Waits until there is a file; false when all have their outcome.
    async fn any(&self) -> bool {
        let any = self.wait(|waiting| (!waiting.jobs.is_empty()).then_some(()));
        any.await.is_some()
    }

    async fn wait<T>(&self, mut look: impl FnMut(&mut Waiting) -> Option<T>) -> Option<T> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            // Read before the queue, so that files pushed before the flag was set are seen.
            let fed = self.fed.load(Ordering::SeqCst);
            {
                let mut waiting = lock(&self.waiting);
                if let Some(found) = look(&mut waiting) {
                    return Some(found);
                }
                if fed && waiting.open == 0 && waiting.jobs.is_empty() {
                    return None;
                }
            }
            changed.await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the iterator on a thread that may block, as far ahead as there is room.
fn feed(context: Arc<Context>, wanted: impl Iterator<Item = Wanted> + Send + 'static) {
    struct Fed(Arc<Context>);

    impl Drop for Fed {
        // Runs when the iterator panics, too.
        fn drop(&mut self) {
            self.0.totals.listed();
            self.0.queue.feed_ended();
        }
    }

    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        let fed = Fed(context);
        let context = &fed.0;
        for (index, wanted) in wanted.enumerate() {
            let room = context.room.clone().acquire_owned();
            let Ok(room) = runtime.block_on(room) else {
                return;
            };
            let size = wanted.size.unwrap_or(0);
            context.totals.list();
            context.totals.add(size, true);
            context.queue.push(Job {
                index,
                wanted,
                size,
                counted: 0,
                received: 0,
                resumed: 0,
                holes: 0,
                copied: 0,
                xattrs: Some(0),
                since: None,
                started: false,
                again: false,
                room: Some(room),
            });
        }
    });
}

/// Receives files from their workers and reports every outcome.
async fn settle_all(
    context: Arc<Context>,
    mut noted: mpsc::UnboundedReceiver<Note>,
    events: mpsc::Sender<Event>,
) {
    let mut notes = Vec::with_capacity(BATCH);
    while noted.recv_many(&mut notes, BATCH).await > 0 {
        for note in notes.drain(..) {
            match note {
                Note::Started { index, path, size } => {
                    let path = path.as_str().to_owned();
                    let _ = events.send(Event::Started { index, path, size }).await;
                }
                Note::Resumed {
                    index,
                    path,
                    bytes,
                    size,
                } => {
                    let resumed = Event::Resumed {
                        index,
                        path: path.as_str().to_owned(),
                        bytes,
                        size,
                    };
                    let _ = events.send(resumed).await;
                }
                Note::Ended(ended) => {
                    let Ended {
                        job,
                        end,
                        asked,
                        slot,
                    } = *ended;
                    drop(slot);
                    settle(&context, &events, job, asked, end).await;
                }
            }
        }
    }
}

/// Reports the outcome of a file, or queues it for another attempt.
async fn settle(
    context: &Context,
    events: &mpsc::Sender<Event>,
    mut job: Job,
    asked: lane::Asked,
    end: End,
) {
    match end {
        End::Arrived(arrived) => {
            if arrived.skipped {
                asked.given_up();
            } else {
                asked.stored();
            }
            context.done(events, job, arrived).await;
        }
        End::Suspended => {
            asked.given_up();
            return context.queue.put_back(job);
        }
        End::Failed(error) => {
            asked.given_up();
            let corrupt = match &error {
                TransferError::Store(error) => match **error {
                    StoreError::HashMismatch { .. } => true,
                    // The list of chunks was not that of this file.
                    StoreError::SizeMismatch { .. } | StoreError::BadOffset { .. } => {
                        job.copied > 0
                    }
                    _ => false,
                },
                _ => false,
            };
            if corrupt && !job.again {
                // The resumed part may have been damaged. The store has removed it: download the whole file again.
                tracing::warn!(path = %job.wanted.local, "the bytes are not the server's: once more");
                job.again = true;
                return context.queue.put_back(job);
            }
            context.failed(events, job, error).await;
        }
    }
    context.queue.settled();
}
