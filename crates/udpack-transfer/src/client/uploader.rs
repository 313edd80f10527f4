//! [`Uploader`]: the client's half of an upload. It spreads files over lanes, keeps the lanes full, and continues over
//! the next connection what a lost one interrupted.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use udpack::{Channel, CloseCode, CloseReason, Priority, SendError, Side, Socket};

use crate::base::code::Code;
use crate::base::path::RelPath;
use crate::base::sums::Sums;
use crate::client::link::Link;
use crate::client::progress::{Event, Feed, LostXattrs, Outcome, Progress, Totals, Watch};
use crate::client::queue::{Claim, Item, Next, Queue, SMALL};
use crate::client::remote::{Others, Remote};
use crate::local::base::Base;
use crate::local::error::TransferError;
use crate::local::limiter::{Limiter, Pace, SMALLEST};
use crate::local::source::{self, Buffers, Known, Opened, Origin, Piece, Source, Whole};
use crate::store::{IfExists, Meta, OtherTime, Time, XattrList, Xattrs};
use crate::wire::CHANNEL;
use crate::wire::{
    self, AckFields, Bin, CancelFields, ChunkFields, CopyFields, DirFields, FileFields,
    FinishFields, Have, HoleFields, LinkFields, MetaFields, PutFields, Reply, Run, XattrFields,
};

/// Files of one lane that may wait for their `done`.
const IN_FLIGHT: usize = 256;
/// For this long the server may be silent while it owes an answer. It sends a sign of life each second.
const SILENCE: Duration = Duration::from_secs(60);
/// After this long without a message on an open file, this side sends a sign of life.
const ALIVE: Duration = Duration::from_secs(5);
/// Pages of a list of chunks that wait to be compared.
const PAGES: usize = 2;
/// The longest range that the server proves of an unfinished file. A longer range means that the file is finished.
const RANGE: u64 = 64 << 20;
/// Bytes that a run may send, over all lanes, before the server has answered what it has of their files. The path is
/// idle until then. Congestion control permits 38 KB in the first round trip of a connection.
const EARLY: u64 = 64 << 10;
/// The longest chunk of such bytes: nothing is known about the path yet.
const EARLY_CHUNK: usize = 16 << 10;
/// For this long, at this interval, a file that another client is writing is offered again.
const BUSY: Duration = Duration::from_secs(20);
const BUSY_PAUSE: Duration = Duration::from_secs(1);
/// A file that the server failed to store is sent again this many times. The first pause is this long.
const TRIES: u32 = 3;
const TRY_PAUSE: Duration = Duration::from_millis(500);
/// What a message has besides a file's bytes and its attributes: paths and permissions above all.
const HEADER: usize = 16 << 10;
/// From this round-trip time on, a file is compared with what the other side has of it.
const FAR: Duration = Duration::from_millis(2);
/// Below the first rate comparing pays on any path, and above the second on none, in bytes a second.
const SLOW: f64 = 16e6;
const FAST: f64 = 400e6;
/// A rate is known after this time and this many bytes.
const MEASURED: (Duration, u64) = (Duration::from_secs(1), 4 << 20);
/// An upload fails after this many lanes in a row that end without progress on a live socket.
const SETBACKS: u32 = 10;

/// How to upload: to which server, on how many lanes, what to do with names that are taken.
#[derive(Debug, Clone)]
#[must_use = "an uploader does nothing until `put` is called"]
pub struct Uploader {
    link: Link,
    lanes: usize,
    if_exists: IfExists,
    preserve: bool,
    umask: Option<u32>,
    resume: bool,
    delta: Delta,
    may_tear: bool,
    xattrs: Xattrs,
    limiter: Limiter,
}

/// When to send only the differences from a file that the receiver has: from the old version, or from the
/// [`base`](Source::base) of a source. The server lists the chunks of its file; their borders depend on its content. The
/// receiver copies the chunks that both files have. The stored file is verified as a whole in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Delta {
    /// Where sending bytes takes longer than reading them twice: with a [`limit`](Uploader::limit), at less than 16 MB/s so
    /// far, and on a path with a round trip of 2 ms or more unless it carried more than 400 MB/s so far.
    #[default]
    Auto,
    /// For every file above 256 KiB, and for each smaller one that has a [`base`](Source::base), which must then be
    /// identical.
    Always,
    /// Never.
    Never,
}

impl Delta {
    /// Whether comparing pays on a path like this, of which this rate is known.
    pub(crate) fn pays(self, rtt: Duration, limited: bool, rate: Option<f64>) -> bool {
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::Auto if limited => true,
            Self::Auto => match rate {
                Some(rate) if rate < SLOW => true,
                Some(rate) if rate > FAST => false,
                _ => rtt >= FAR,
            },
        }
    }
}

/// How fast a connection was since a lane began on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measure {
    since: Instant,
    before: u64,
}

impl Measure {
    /// Begins with so many bytes.
    pub(crate) fn new(before: u64) -> Self {
        let since = Instant::now();
        Self { since, before }
    }

    /// Bytes a second until now, where there are so many; `None` where that says little yet.
    pub(crate) fn rate(&self, now: u64) -> Option<f64> {
        let (passed, bytes) = (self.since.elapsed(), now.saturating_sub(self.before));
        let enough = passed >= MEASURED.0 && bytes >= MEASURED.1;
        enough.then(|| bytes as f64 / passed.as_secs_f64())
    }
}

/// Whether a server lists no chunks for this client, of whichever file.
pub(crate) fn no_delta(error: &TransferError) -> bool {
    matches!(
        error,
        TransferError::Refused {
            code: Code::Unsupported | Code::Forbidden,
            ..
        }
    )
}

impl Uploader {
    /// Uploads over this link, or over this socket as long as it lives. When the socket reconnects, the upload
    /// continues on its next connection.
    pub fn new(link: impl Into<Link>) -> Self {
        Self {
            link: link.into(),
            lanes: 4,
            if_exists: IfExists::default(),
            preserve: false,
            umask: None,
            resume: true,
            delta: Delta::default(),
            may_tear: false,
            xattrs: Xattrs::None,
            limiter: Limiter::unlimited(),
        }
    }

    /// How many files are sent in parallel over each path of the link. Defaults to 4; there are never more lanes than files.
    pub fn lanes(mut self, lanes: usize) -> Self {
        self.lanes = lanes.max(1);
        self
    }

    /// What the server does when a name is taken. Defaults to [`IfExists::Same`].
    pub fn if_exists(mut self, if_exists: IfExists) -> Self {
        self.if_exists = if_exists;
        self
    }

    /// Whether the server's copy gets the modification time and the permission bits of the local file. Defaults to no.
    pub fn preserve(mut self, preserve: bool) -> Self {
        self.preserve = preserve;
        self
    }

    /// Without [`preserve`](Self::preserve), gives the server's copy the local permission bits except these, as `cp`
    /// does with the umask. Defaults to `None`: only the owner may use the files.
    pub fn umask(mut self, umask: Option<u32>) -> Self {
        self.umask = umask;
        self
    }

    /// Whether an interrupted upload of the same file is continued, and whether this one can be continued later. Bytes
    /// that the server proves to have are not sent again. Defaults to yes. A file of one chunk is always sent whole,
    /// and so are the first 64 KiB of a run.
    pub fn resume(mut self, resume: bool) -> Self {
        self.resume = resume;
        self
    }

    /// When to send only the differences from a file that the server has. This concerns files that replace another by
    /// [`IfExists::Overwrite`], and files with a [`base`](Source::base). It needs [`resume`](Self::resume), a token
    /// that may read, and a file above 256 KiB or a base. If the server does not list chunks, the file is sent whole.
    /// Defaults to [`Delta::Auto`].
    pub fn delta(mut self, delta: Delta) -> Self {
        self.delta = delta;
        self
    }

    /// Stores a file that changes while it is read as it was read, from its beginning to its end, instead of failing it:
    /// [`Outcome::torn`](crate::Outcome::torn) says so. Its hash is that of what was read. One that gets shorter fails all the
    /// same. Defaults to no.
    pub fn may_tear(mut self, may_tear: bool) -> Self {
        self.may_tear = may_tear;
        self
    }

    /// Sends these extended attributes of files and directories along. The server stores those that it takes and that its
    /// file system holds: [`Outcome::lost_xattrs`](crate::Outcome::lost_xattrs) tells what is missing. A file with more than
    /// 256, or with more than 64 KiB of them, fails. A file that is there already keeps its own. Defaults to none.
    pub fn xattrs(mut self, xattrs: Xattrs) -> Self {
        self.xattrs = xattrs;
        self
    }

    /// How fast to send: bytes of files, over all lanes. Defaults to no limit.
    pub fn limit(mut self, limiter: Limiter) -> Self {
        self.limiter = limiter;
        self
    }

    /// Starts the upload. A blocking thread lists the sources, some thousands ahead; the lanes take the largest of
    /// these first. A source that fails does not stop the others.
    ///
    /// Two sources of the same name are sent one after the other, in their order. The policy decides about the second:
    /// [`IfExists::Rename`] keeps both, [`IfExists::Overwrite`] keeps the later one.
    ///
    /// Must be called within a tokio runtime.
    pub fn put(
        self,
        sources: impl IntoIterator<Item = Source, IntoIter: Send + 'static>,
    ) -> Upload {
        let link_events = self.link.events();
        let paths = self.link.each();
        let of_each = self.lanes;
        let lanes = of_each * paths.len();
        let shared = Arc::new(Shared {
            if_exists: self.if_exists.to_string(),
            remote: Remote::new(&self.link),
            no_delta: AtomicBool::new(false),
            uploader: self,
            queue: Queue::new(lanes),
            buffers: Buffers::default(),
            run: new_run(),
            early: AtomicU64::new(EARLY),
            totals: Arc::default(),
            lanes: AtomicUsize::new(lanes),
        });
        let (events, happened) = mpsc::channel(256);
        let mut tasks = JoinSet::new();
        let (sources, lister, told) = (sources.into_iter(), shared.clone(), events.clone());
        tasks.spawn_blocking(move || list(sources, &lister, &told));
        for _ in 0..of_each {
            for link in &paths {
                tasks.spawn(lane(shared.clone(), link.clone(), events.clone()));
            }
        }
        Upload {
            shared,
            feed: Feed::new(tasks, happened, link_events),
        }
    }
}

/// An upload that is running.
///
/// # Drop
/// Ends the upload; no unfinished file becomes visible. Unless resuming is turned off, the server keeps the bytes of
/// unfinished files for a while. A file whose last byte was sent may still be stored.
#[derive(Debug)]
pub struct Upload {
    shared: Arc<Shared>,
    feed: Feed,
}

impl Upload {
    /// The next event; `None` when every file has its `Done` or `Failed`. Progress is reported when it changed, at most
    /// ten times a second, and once more at the end.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.feed.next(|| self.shared.totals.progress()).await
    }

    /// The progress so far.
    pub fn progress(&self) -> Progress {
        self.shared.totals.progress()
    }

    /// Returns a watcher of the progress, of the whole and of each file. It is independent of the events and can be
    /// asked at any rate.
    pub fn watch(&self) -> Watch {
        self.shared.totals.watch()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.shared.totals.close();
        self.shared.queue.close();
    }
}

/// A random number for this run.
fn new_run() -> [u8; 16] {
    let hash = blake3::hash(udpack::generate_token().as_bytes());
    let mut run = [0; 16];
    for (to, from) in run.iter_mut().zip(hash.as_bytes()) {
        *to = *from;
    }
    run
}

#[derive(Debug)]
struct Shared {
    uploader: Uploader,
    /// The policy's name on the wire.
    if_exists: String,
    /// Requests the chunks of a base.
    remote: Remote,
    /// Set when the server lists no chunks for this client.
    no_delta: AtomicBool,
    queue: Arc<Queue>,
    buffers: Buffers,
    run: [u8; 16],
    /// What is left of [`EARLY`].
    early: AtomicU64,
    totals: Arc<Totals>,
    /// Lanes that have not failed.
    lanes: AtomicUsize,
}

impl Shared {
    /// The run of one source: 16 bytes that stay the same over all its offers and that no other source has.
    fn run(&self, index: usize) -> Run {
        let mut run = self.run;
        for (byte, index) in run.iter_mut().zip((index as u64).to_le_bytes()) {
            *byte ^= index;
        }
        Bin(run)
    }

    /// Corrects the size of a file, in bytes.
    fn resize(&self, item: &mut Item, size: u64) {
        self.totals
            .resize(item.index, &mut item.size, item.acked, size);
    }

    /// How many bytes of a file may be sent before the server has said what it has of it, on a path with this
    /// congestion window. Bytes beyond the window would leave only after the answer and delay what follows.
    fn early(&self, item: &Item, window: u64) -> usize {
        // The server most likely has what was sent before.
        if !self.uploader.resume || item.sent > 0 {
            return 0;
        }
        // With a rate limit, no more than it releases without a pause.
        let most = EARLY.min(self.uploader.limiter.chunk() as u64).min(window);
        let want = item.size.min(most);
        let take = |left: u64| Some(left.saturating_sub(want));
        let left = self
            .early
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        usize::try_from(left.unwrap_or(0).min(want)).unwrap_or(0)
    }

    /// The server has at least this much of a file.
    fn acked(&self, item: &mut Item, acked: u64) {
        self.totals.ack(item.index, &mut item.acked, acked);
    }

    /// Reports a file that was not stored.
    async fn failed(&self, events: &mpsc::Sender<Event>, claim: Claim, error: TransferError) {
        self.totals
            .fail(claim.index, !claim.is_unsized(), (claim.size, claim.acked));
        let (index, path) = (claim.index, claim.source.remote().to_owned());
        claim.settle();
        let _ = events.send(Event::Failed { index, path, error }).await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lists the sources until there are no more, or until the upload has ended.
fn list(sources: impl Iterator<Item = Source>, shared: &Shared, events: &mpsc::Sender<Event>) {
    /// Runs on a panic of the iterator, too: otherwise the lanes would wait for more entries for ever.
    struct Listed<'a>(&'a Shared);
    impl Drop for Listed<'_> {
        fn drop(&mut self) {
            self.0.totals.listed();
            self.0.queue.listed();
        }
    }
    let _listed = Listed(shared);
    for (index, source) in sources.enumerate() {
        shared.totals.list();
        match source.size() {
            Ok(size) => {
                let size = size.unwrap_or(0);
                let item = Item::new(index, source, size);
                shared.totals.add(size, !item.is_unsized());
                if !shared.queue.push(item) {
                    return;
                }
            }
            Err(error) => {
                shared.totals.end(index, true);
                let path = source.remote().to_owned();
                let failed = Event::Failed { index, path, error };
                if events.blocking_send(failed).is_err() {
                    return;
                }
            }
        }
    }
}

/// A file that waits for its outcome.
#[derive(Debug)]
struct Sent {
    claim: Claim,
    /// The position of this attempt: bytes sent or skipped.
    position: u64,
    /// Bytes skipped because the server has them.
    skipped: u64,
    /// The skipped ranges beyond `arrived`: begin and end.
    ahead: VecDeque<(u64, u64)>,
    /// The position up to which the server has received.
    arrived: u64,
    /// Bytes that the server copied from the base.
    copied: u64,
    /// Bytes of holes.
    holes: u64,
    /// The source changed while it was read.
    torn: bool,
    /// Whether nothing was sent in this attempt yet.
    untouched: bool,
    ready: Option<oneshot::Sender<Ready>>,
}

impl Sent {
    fn new(claim: Claim) -> Self {
        Self {
            claim,
            position: 0,
            skipped: 0,
            ahead: VecDeque::new(),
            arrived: 0,
            copied: 0,
            holes: 0,
            torn: false,
            untouched: true,
            ready: None,
        }
    }
}

/// What the server has of a file, the size of the base if bytes of it may be copied, and whether it takes holes.
#[derive(Debug)]
struct Ready {
    have: Have,
    base: Option<u64>,
    holes: bool,
}

impl Sent {
    /// Skips bytes that the server has.
    fn pass(&mut self, offset: u64, len: u64) {
        self.skipped += len;
        self.unsent(offset, len);
    }

    /// Skips bytes that the server gets from elsewhere.
    fn unsent(&mut self, offset: u64, len: u64) {
        self.position = offset + len;
        match self.ahead.back_mut() {
            Some((_, end)) if *end == offset => *end += len,
            _ => self.ahead.push_back((offset, offset + len)),
        }
    }

    /// Records the server's position. Returns how many of the newly received bytes were sent in this attempt.
    fn arrived(&mut self, recv: u64) -> u64 {
        let recv = recv.min(self.position);
        let mut sent = recv.saturating_sub(self.arrived);
        while let Some((from, end)) = self.ahead.front_mut()
            && *from < recv
        {
            let upto = (*end).min(recv);
            sent = sent.saturating_sub(upto - *from);
            *from = upto;
            if *from < *end {
                break;
            }
            self.ahead.pop_front();
        }
        self.arrived = self.arrived.max(recv);
        sent
    }
}

/// What the sending and the receiving half of a lane share.
#[derive(Debug, Default)]
struct InFlight {
    files: Mutex<HashMap<u64, Sent>>,
    /// Files that this side gave up and whose `error` has not arrived yet, with the reason.
    given_up: Mutex<HashMap<u64, TransferError>>,
    changed: Notify,
    /// Set when the sending half will add no more files.
    complete: AtomicBool,
    /// Set when the server has received or finished something.
    moved: AtomicBool,
}

impl InFlight {
    /// Waits until fewer than `most` files wait for their outcome.
    async fn below(&self, most: usize) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.len() < most {
                return;
            }
            changed.await;
        }
    }

    fn len(&self) -> usize {
        lock(&self.files).len()
    }

    fn add(&self, id: u64, sent: Sent) {
        let first = {
            let mut files = lock(&self.files);
            files.insert(id, sent);
            files.len() == 1
        };
        if first {
            // From now on the server owes an answer.
            self.changed.notify_waiters();
        }
    }

    /// Changes the state of a file; `None` when it has its outcome already.
    fn with<T>(&self, id: u64, change: impl FnOnce(&mut Sent) -> T) -> Option<T> {
        lock(&self.files).get_mut(&id).map(change)
    }

    /// Removes a file that has its outcome.
    fn take(&self, id: u64) -> Option<Sent> {
        let sent = lock(&self.files).remove(&id);
        self.changed.notify_waiters();
        sent
    }
}

/// Sends entries over one lane after the other, until there are no more entries or the lanes keep failing.
async fn lane(shared: Arc<Shared>, link: Link, events: mpsc::Sender<Event>) {
    let link = &link;
    let mut setbacks = 0;
    loop {
        // Over one of several paths nothing waits that another could take.
        let connected = match link.is_path() && !shared.queue.is_given_up() {
            true => match path_socket(&shared, link).await {
                Some(connected) => Some(connected),
                None => return,
            },
            false => None,
        };
        // Connect only when there is something to send.
        let next = match shared.queue.take().await {
            Next::Over => return,
            Next::Failed(claim, error) => {
                shared.failed(&events, claim, error).await;
                continue;
            }
            next => next,
        };
        let connected = match connected {
            Some(connected) => connected,
            None => link.eager().await,
        };
        let socket = match connected {
            Ok(socket) => socket,
            Err(error) => {
                shared.queue.fail(error);
                continue;
            }
        };
        let flight = InFlight::default();
        let Err(error) = serve(&shared, (link, &socket), next, &flight, &events).await else {
            return;
        };
        // The link handles a socket that was not admitted.
        let admitted = socket.admitted().await.is_ok();
        let left: Vec<_> = lock(&flight.files).drain().collect();
        let mends = link.mends(&error);
        let refused = matches!(
            &error,
            TransferError::Closed(reason) if reason.code == CloseCode::REFUSED
        );
        for (id, Sent { mut claim, .. }) in left {
            let own = lock(&flight.given_up).remove(&id);
            if let Some(own) = own {
                shared.failed(&events, claim, own).await;
            } else if (mends || refused || !admitted) && !claim.source.is_spent() {
                // Dropping the claim puts the entry back into the queue. The server may have stored the file even if
                // its `$welcome` was lost.
                claim.unsure |= claim.told.is_some();
            } else {
                shared.failed(&events, claim, error.again()).await;
            }
        }
        if !admitted {
            continue;
        }
        if flight.moved.load(Ordering::Relaxed) {
            setbacks = 0;
        }
        let lives = socket.close_reason().is_none() && socket.goaway().is_none();
        if mends && (!lives || setbacks < SETBACKS) {
            tracing::debug!(%error, setbacks, "a lane is opened again");
            if lives {
                // This loop alone limits how often, and with which pauses, a lane is opened again.
                setbacks += 1;
                tokio::time::sleep(link.pause(setbacks)).await;
            }
            continue;
        }
        if shared.lanes.fetch_sub(1, Ordering::Relaxed) > 1 {
            // The other lanes continue with the queue.
            return;
        }
        shared.queue.fail(error);
    }
}

/// The socket of one of several paths, or why there is none and no other path goes on; `None` when there is nothing to do for it.
async fn path_socket(shared: &Shared, link: &Link) -> Option<Result<Socket, TransferError>> {
    loop {
        let connected = tokio::select! {
            biased;
            () = shared.queue.over() => return None,
            connected = link.eager() => connected,
        };
        let Err(error) = connected else {
            return Some(connected);
        };
        let rested = tokio::select! {
            biased;
            () = shared.queue.over() => return None,
            rested = link.rests(&error) => rested,
        };
        if rested {
            continue;
        }
        // The others go on with the queue.
        let others = shared.lanes.fetch_sub(1, Ordering::Relaxed) > 1;
        return (!others).then_some(Err(error));
    }
}

/// Sends over one channel until there is nothing to send or the channel has ended. Files without an outcome stay in
/// `flight`.
async fn serve(
    shared: &Arc<Shared>,
    (link, socket): (&Link, &Socket),
    next: Next,
    flight: &InFlight,
    events: &mpsc::Sender<Event>,
) -> Result<(), TransferError> {
    let channel = socket
        .channel(CHANNEL)
        .priority(Priority::Bulk)
        .open()
        .await?;
    let pace = Pace::new(
        &shared.uploader.limiter,
        shared.uploader.lanes,
        channel.frame_limit(),
    );
    let lane = Lane {
        shared,
        link,
        channel: &channel,
        flight,
        events,
        pace: &pace,
        measure: Measure::new(channel.stats().wire_sent),
    };
    let sending = async {
        let result = lane.send_all(next).await;
        flight.complete.store(true, Ordering::Relaxed);
        flight.changed.notify_waiters();
        result
    };
    // The receiving half usually ends last. When the lane breaks it ends first, and the sending half must not wait for
    // it.
    let result = {
        let mut sending = std::pin::pin!(sending);
        let mut receiving = std::pin::pin!(lane.receive(socket));
        let owed = || flight.len() > 0;
        tokio::select! {
            biased;
            received = &mut receiving => received,
            // The server says each second of each file that it is there.
            () = link.silent(socket, owed, || ()) => Err(TransferError::Closed(lane_end(&channel, socket))),
            sent = &mut sending => match (sent, receiving.await) {
                (Err(LaneOver), Ok(())) => Err(TransferError::Closed(lane_end(&channel, socket))),
                (_, received) => received,
            },
        }
    };
    match &result {
        // Every file has its outcome: close the lane without waiting for the last acknowledgement.
        Ok(()) => drop(channel.close(CloseCode::NORMAL, "")),
        Err(_) => drop(channel.close(CloseCode::CANCELLED, "the lane failed")),
    }
    result
}

/// The lane has ended. The receiving half knows the reason.
struct LaneOver;

impl From<SendError> for LaneOver {
    fn from(_: SendError) -> Self {
        Self
    }
}

/// One channel of an upload, with the receiver of its events.
#[derive(Clone, Copy)]
struct Lane<'a> {
    shared: &'a Arc<Shared>,
    link: &'a Link,
    channel: &'a Channel,
    flight: &'a InFlight,
    events: &'a mpsc::Sender<Event>,
    pace: &'a Pace,
    measure: Measure,
}

/// A small file, read and hashed; `None` when it is not small any more.
struct Loaded {
    claim: Claim,
    read: Result<Option<Whole>, TransferError>,
}

/// Reads small files; blocks.
fn load(claims: Vec<Claim>, which: Xattrs, buffers: &Buffers) -> Vec<Loaded> {
    let most = usize::try_from(SMALL).unwrap_or(usize::MAX);
    let sources = claims.iter().map(|claim| &claim.source);
    let read = source::read_small(sources, most, which, buffers);
    claims
        .into_iter()
        .zip(read)
        .map(|(claim, read)| Loaded { claim, read })
        .collect()
}

/// Opens a source and reads its extended attributes, and up to `early` bytes of it.
async fn open(
    source: Source,
    early: usize,
    which: Xattrs,
) -> Result<(Opened, XattrList, Bytes), TransferError> {
    blocking(move || {
        let mut opened = source.open()?;
        let xattrs = opened.own_xattrs(which)?;
        opened.head(early).map(|head| (opened, xattrs, head))
    })
    .await
}

/// Reads on a thread that may block.
async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, TransferError> + Send + 'static,
) -> Result<T, TransferError> {
    let read = tokio::task::spawn_blocking(read);
    read.await.unwrap_or_else(|_| Err(reader_failed()))
}

fn reader_failed() -> TransferError {
    TransferError::Protocol("the reader failed".to_owned())
}

/// A file whose first bytes have been sent.
struct Sending {
    id: u64,
    source: Source,
    size: Option<u64>,
    /// Bytes that were sent before the server's answer.
    early: u64,
    /// The end of the ranges that the server has.
    known: u64,
    /// Set when the server has a finished file of this size.
    stored: bool,
    position: u64,
    skipped: u64,
    /// Set when all of the server's ranges have been compared.
    told: bool,
}

impl Sending {
    fn new(id: u64, source: Source, size: Option<u64>, early: u64, have: &Have) -> Self {
        let whole = |(off, len, _): &(u64, u64, _)| *off == 0 && *len > RANGE && Some(*len) == size;
        let known = have
            .last()
            .map_or(0, |(off, len, _)| off.saturating_add(*len));
        Self {
            id,
            source,
            size,
            early,
            known,
            stored: have.first().is_some_and(whole),
            position: early,
            skipped: 0,
            told: known == 0,
        }
    }

    /// Records whether this piece is the first one beyond the server's ranges. Returns how many bytes were skipped, if
    /// any.
    fn passes(&mut self, piece: &Piece) -> Option<u64> {
        let at = match piece {
            Piece::Chunk { offset, .. }
            | Piece::Same { offset, .. }
            | Piece::Copy { offset, .. }
            | Piece::Hole { offset, .. } => *offset,
            Piece::End { size, .. } => *size,
            Piece::Failed(_) => self.position,
        };
        if self.told || at < self.known {
            return None;
        }
        self.told = true;
        let rest = self
            .size
            .is_none_or(|size| self.early + self.skipped < size);
        (rest && self.skipped > 0).then_some(self.skipped)
    }

    /// The error for a different file of this size that is stored.
    fn exists(&self) -> TransferError {
        TransferError::Refused {
            code: Code::Exists,
            message: format!(
                "a different file of the same size is stored as {}",
                self.source.remote()
            ),
            retry: false,
        }
    }
}

impl Lane<'_> {
    /// Sends one entry after the other. Reports those that fail on this side.
    async fn send_all(self, first: Next) -> Result<(), LaneOver> {
        let mut next = Some(first);
        let mut ids = 1..;
        loop {
            let batch = match next.take() {
                Some(Next::Batch(batch)) => batch,
                Some(Next::One { claim, few }) => {
                    self.send_one(&mut ids, claim, few).await?;
                    next = Some(self.shared.queue.take().await);
                    continue;
                }
                Some(Next::Failed(claim, error)) => {
                    self.shared.failed(self.events, claim, error).await;
                    next = Some(self.shared.queue.take().await);
                    continue;
                }
                Some(Next::Over) | None => return Ok(()),
            };
            // The next batch is read while this one is being sent.
            let start = |batch| {
                let buffers = self.shared.buffers.clone();
                let which = self.shared.uploader.xattrs;
                tokio::task::spawn_blocking(move || load(batch, which, &buffers))
            };
            let mut reading = Some(start(batch));
            while let Some(read) = reading.take() {
                let loaded = read.await.unwrap_or_default();
                reading = self.shared.queue.take_small().map(start);
                for file in loaded {
                    self.send_small(&mut ids, file).await?;
                }
            }
            next = Some(self.shared.queue.take().await);
        }
    }

    /// Sends one small file without waiting for an answer.
    async fn send_small(
        self,
        ids: &mut impl Iterator<Item = u64>,
        file: Loaded,
    ) -> Result<(), LaneOver> {
        let Loaded { mut claim, read } = file;
        let read = read.and_then(|whole| {
            let xattrs = whole.as_ref().map(|whole| &whole.xattrs);
            self.check_xattrs(xattrs)?;
            Ok(whole)
        });
        let Whole {
            meta,
            xattrs,
            bytes,
            hash,
        } = match read {
            Ok(Some(whole)) => whole,
            Ok(None) => return self.send_one(ids, claim, false).await,
            Err(error) => {
                self.shared.failed(self.events, claim, error).await;
                return Ok(());
            }
        };
        self.flight.below(IN_FLIGHT).await;
        let size = bytes.len() as u64;
        let id = ids.next().unwrap_or_default();
        if size > 0 && !claim.plain && claim.source.base_path().is_some() && self.pays() {
            return self
                .send_moved(id, claim, meta, &xattrs, (size, hash))
                .await;
        }
        self.shared.uploader.limiter.take(size).await;
        let source = self.start(&mut claim, Some(size)).await;
        let settle = claim.settle;
        let run = self.shared.run(claim.index);
        claim.sent += size;
        claim.told = Some((size, hash));
        claim.mtime = self.kept(meta).mtime;
        claim.xattrs = xattrs.count();
        let mut sent = Sent::new(claim);
        sent.position = size;
        sent.untouched = false;
        self.flight.add(id, sent);
        // The smallest chunk is right at every rate, and reading the path's statistics takes the connection's lock.
        let most = if bytes.len() <= SMALLEST {
            bytes.len()
        } else {
            self.pace.adapt(&self.channel.stats());
            self.pace.chunk()
        };
        if bytes.len() <= most && self.fits(bytes.len(), &xattrs) {
            let meta = MetaFields::from(self.kept(meta));
            let fields = PutFields {
                id,
                path: source.remote(),
                mtime: meta.mtime,
                mtime_ns: meta.mtime_ns,
                mode: meta.mode,
                if_exists: self.policy(settle),
                dirs: self.dirs(&source),
                run,
                xattrs: XattrFields::some(&xattrs),
                hash: Bin(hash),
            };
            let sent = self.channel.send_bulk("put", &fields, "data", bytes).await;
            return Ok(sent?);
        }
        let mut offer = self.offer(settle, id, &source, Some(size), meta, false, run);
        offer.xattrs = XattrFields::some(&xattrs);
        self.channel.send("file", &offer).await?;
        let mut rest = bytes;
        let mut off = 0;
        while !rest.is_empty() {
            self.pace.adapt(&self.channel.stats());
            let bytes = rest.split_to(self.pace.chunk().min(rest.len()));
            let fields = ChunkFields { id, off };
            off += bytes.len() as u64;
            self.channel
                .send_bulk("chunk", &fields, "chunk", bytes)
                .await?;
        }
        self.finish(id, size, hash).await
    }

    /// Lets the server build a small file from its base alone. If the base has changed, the file is sent on the next
    /// attempt.
    async fn send_moved(
        self,
        id: u64,
        mut claim: Claim,
        meta: Meta,
        xattrs: &XattrList,
        (size, hash): (u64, [u8; 32]),
    ) -> Result<(), LaneOver> {
        let source = self.start(&mut claim, Some(size)).await;
        let run = self.shared.run(claim.index);
        let mut offer = self.offer(claim.settle, id, &source, Some(size), meta, false, run);
        offer.base = source.base_path().map(RelPath::as_str);
        offer.xattrs = XattrFields::some(xattrs);
        claim.xattrs = xattrs.count();
        claim.based = true;
        claim.told = Some((size, hash));
        claim.mtime = self.kept(meta).mtime;
        let mut sent = Sent::new(claim);
        sent.untouched = false;
        sent.copied = size;
        sent.unsent(0, size);
        self.flight.add(id, sent);
        self.channel.send("file", &offer).await?;
        let fields = CopyFields {
            id,
            off: 0,
            from: 0,
            len: size,
        };
        self.channel.send("copy", &fields).await?;
        self.finish(id, size, hash).await
    }

    /// Sends one entry of any kind.
    async fn send_one(
        self,
        ids: &mut impl Iterator<Item = u64>,
        mut claim: Claim,
        few: bool,
    ) -> Result<(), LaneOver> {
        self.flight.below(IN_FLIGHT).await;
        let id = ids.next().unwrap_or_default();
        let meta = match &claim.source.origin {
            Origin::Dir(meta) => *meta,
            Origin::Link(_) => Meta::default(),
            _ => return self.send_file(id, claim, few).await,
        };
        let (dir, which) = (claim.source.clone(), self.shared.uploader.xattrs);
        let read = blocking(move || dir.dir_xattrs(which)).await;
        let xattrs = match read.and_then(|xattrs| self.check_xattrs(Some(&xattrs)).map(|()| xattrs))
        {
            Ok(xattrs) => xattrs,
            Err(error) => {
                self.shared.failed(self.events, claim, error).await;
                return Ok(());
            }
        };
        claim.xattrs = xattrs.count();
        let source = self.start(&mut claim, Some(0)).await;
        let path = source.remote();
        let settle = claim.settle;
        claim.told = Some((0, *blake3::hash(b"").as_bytes()));
        claim.mtime = self.kept(meta).mtime;
        self.flight.add(id, Sent::new(claim));
        if let Origin::Link(target) = &source.origin {
            let if_exists = self.policy(settle);
            let fields = LinkFields {
                id,
                path,
                target,
                if_exists,
                dirs: self.dirs(&source),
            };
            self.channel.send("link", &fields).await?;
        } else {
            // Permissions that are not preserved apply to directories that must be created.
            let mut dirs = self.dirs(&source);
            if let Some(umask) = self.shared.uploader.umask {
                dirs.push(meta.mode.unwrap_or(0) & 0o777 & !umask);
            }
            let meta = MetaFields::from(meta.kept(self.shared.uploader.preserve, None));
            let fields = DirFields {
                id,
                path,
                mtime: meta.mtime,
                mtime_ns: meta.mtime_ns,
                mode: meta.mode,
                dirs,
                xattrs: XattrFields::some(&xattrs),
            };
            self.channel.send("dir", &fields).await?;
        }
        Ok(())
    }

    async fn send_file(self, id: u64, claim: Claim, few: bool) -> Result<(), LaneOver> {
        let Some((sums, others)) = self.sums(&claim).await else {
            return self.send_based(id, claim, few, None).await;
        };
        // The server cuts the rest of its file while this one is offered and compared.
        let (pages, taken) = mpsc::channel(PAGES);
        let base = Base::new(sums, taken, claim.size);
        let mut sending = Box::pin(self.send_based(id, claim, few, Some(base)));
        tokio::select! {
            sent = &mut sending => sent,
            () = others.give(pages) => sending.await,
        }
    }

    /// Sends a file, and of its base only where that has bytes, if these are its chunks.
    async fn send_based(
        self,
        id: u64,
        mut claim: Claim,
        few: bool,
        chunks: Option<Base>,
    ) -> Result<(), LaneOver> {
        let base = chunks.as_ref().and_then(|_| base_of(&claim.source));
        claim.based |= base.is_some();
        let early = match base {
            Some(_) => 0,
            None => self.shared.early(&claim, self.channel.stats().cwnd),
        };
        let which = self.shared.uploader.xattrs;
        let opened = open(claim.source.clone(), early, which).await;
        let opened = opened.and_then(|opened| self.check_xattrs(Some(&opened.1)).map(|()| opened));
        let (opened, xattrs, head) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.shared.failed(self.events, claim, error).await;
                return Ok(());
            }
        };
        let Opened { size, meta, .. } = opened;
        let source = self.start(&mut claim, size).await;
        // For a large file it pays to ask what the server has; when there are few files, for each of them.
        let uploader = &self.shared.uploader;
        let same = few && uploader.if_exists == IfExists::Same;
        let early = head.len() as u64;
        let spool = source.spool();
        let asks = |size: u64| (size > SMALL || same) && size > early;
        let ask = uploader.resume && (spool.is_some() || size.is_some_and(asks));
        // What the server has of an earlier run cannot be compared with bytes that differ in each run.
        let waits = ask && !spool.is_some_and(|spool| spool.is_fresh() && !spool.compares());
        let run = self.shared.run(claim.index);
        let mut offer = self.offer(claim.settle, id, &source, size, meta, ask, run);
        offer.base = base.as_ref().map(RelPath::as_str);
        offer.xattrs = XattrFields::some(&xattrs);
        claim.xattrs = xattrs.count();
        let (tell, ready) = oneshot::channel();
        claim.mtime = self.kept(meta).mtime;
        let mut sent = Sent::new(claim);
        sent.ready = waits.then_some(tell);
        self.flight.add(id, sent);
        self.channel.send("file", &offer).await?;
        if !self.send_head(id, size, head).await? {
            return Ok(());
        }
        let may_tear = uploader.may_tear;
        let known = if waits {
            match ready.await {
                Ok(Ready { have, base, holes }) => Known {
                    have,
                    base: chunks.filter(|_| base.is_some()),
                    holes,
                    may_tear,
                },
                // The file has its outcome already.
                Err(_) => return Ok(()),
            }
        } else {
            Known {
                may_tear,
                ..Known::default()
            }
        };
        if let Some((0, len, _)) = known.have.first()
            && *len >= early
        {
            // What an earlier attempt sent is part of the file, or the comparison will show that it is not.
            self.flight.with(id, |sent| sent.untouched = true);
        }
        let sending = Sending::new(id, source, size, early, &known.have);
        self.pace.adapt(&self.channel.stats());
        let buffers = self.shared.buffers.clone();
        let pieces = opened.read(known, self.pace.clone(), buffers, None);
        self.send_pieces(sending, pieces).await
    }

    /// Sends the first bytes of a file; `false` when the file has its outcome already.
    async fn send_head(
        self,
        id: u64,
        size: Option<u64>,
        mut head: Bytes,
    ) -> Result<bool, LaneOver> {
        let mut position = 0;
        while !head.is_empty() {
            self.pace.adapt(&self.channel.stats());
            let len = head.len().min(self.pace.chunk()).min(EARLY_CHUNK);
            let bytes = head.split_to(len);
            if !self.send_chunk(id, size, position, bytes).await? {
                return Ok(false);
            }
            position += len as u64;
        }
        Ok(true)
    }

    /// Sends the rest of a file as it is read, and its `finish`.
    async fn send_pieces(
        self,
        mut sending: Sending,
        mut pieces: mpsc::Receiver<Piece>,
    ) -> Result<(), LaneOver> {
        let id = sending.id;
        while let Some(piece) = self.next_piece(&sending, &mut pieces).await? {
            if sending.stored && matches!(piece, Piece::Chunk { .. } | Piece::Hole { .. }) {
                // A range longer than that means a finished file, and it is a different one.
                return self.give_up(id, sending.exists()).await;
            }
            if let Some(skipped) = sending.passes(&piece) {
                self.resumed(id, &sending.source, skipped).await;
            }
            match piece {
                Piece::Same { offset, len } => {
                    sending.position = offset + len;
                    sending.skipped += len;
                    if !self.pass(id, sending.size, offset, len) {
                        return Ok(());
                    }
                }
                Piece::Copy { offset, from, len } => {
                    sending.position = offset + len;
                    let known = self.flight.with(id, |sent| {
                        sent.untouched = false;
                        sent.copied += len;
                        sent.unsent(offset, len);
                    });
                    if known.is_none() {
                        return Ok(());
                    }
                    let off = offset;
                    let fields = CopyFields { id, off, from, len };
                    self.channel.send("copy", &fields).await?;
                }
                Piece::Hole { offset, len } => {
                    sending.position = offset + len;
                    let known = self.flight.with(id, |sent| {
                        sent.untouched = false;
                        sent.holes += len;
                        sent.unsent(offset, len);
                    });
                    if known.is_none() {
                        return Ok(());
                    }
                    let fields = HoleFields {
                        id,
                        off: offset,
                        len,
                    };
                    self.channel.send("hole", &fields).await?;
                }
                Piece::Chunk { offset, bytes } => {
                    sending.position = offset + bytes.len() as u64;
                    if !self.send_chunk(id, sending.size, offset, bytes).await? {
                        return Ok(());
                    }
                }
                Piece::End { size, hash, torn } => {
                    self.flight.with(id, |sent| {
                        sent.torn = torn;
                        sent.claim.told = Some((size, hash));
                    });
                    return self.finish(id, size, hash).await;
                }
                Piece::Failed(error) => return self.give_up(id, error).await,
            }
        }
        Ok(())
    }

    /// The next piece of a file; `None` when the file has its outcome already.
    async fn next_piece(
        self,
        sending: &Sending,
        pieces: &mut mpsc::Receiver<Piece>,
    ) -> Result<Option<Piece>, LaneOver> {
        loop {
            self.pace.adapt(&self.channel.stats());
            if let Ok(piece) = tokio::time::timeout(ALIVE, pieces.recv()).await {
                return Ok(Some(
                    piece.unwrap_or_else(|| Piece::Failed(reader_failed())),
                ));
            }
            // The source is slow or the comparison long: the server must not take this side for dead.
            if self.flight.with(sending.id, |_| ()).is_none() {
                return Ok(None);
            }
            let alive = AckFields {
                id: sending.id,
                recv: sending.position,
                safe: 0,
            };
            self.channel.send("ack", &alive).await?;
        }
    }

    /// Skips bytes that the server has of a file of this size, where that is known; `false` when the file has its outcome
    /// already.
    fn pass(self, id: u64, size: Option<u64>, offset: u64, len: u64) -> bool {
        let known = self.flight.with(id, |sent| {
            sent.pass(offset, len);
            if size.is_none() {
                self.shared.resize(&mut sent.claim, offset + len);
            }
            if sent.untouched {
                // The server has everything up to here. The last byte counts only with `done`.
                let acked = (offset + len).min(sent.claim.size.saturating_sub(1));
                self.shared.acked(&mut sent.claim, acked);
            }
        });
        known.is_some()
    }

    /// Sends bytes of a file, with its size if that is known; `false` when the file has its outcome already. The server
    /// drops what was on its way.
    async fn send_chunk(
        self,
        id: u64,
        size: Option<u64>,
        offset: u64,
        bytes: Bytes,
    ) -> Result<bool, LaneOver> {
        let len = bytes.len() as u64;
        self.shared.uploader.limiter.take(len).await;
        let known = self.flight.with(id, |sent| {
            sent.position = offset + len;
            sent.untouched = false;
            sent.claim.sent += len;
            if size.is_none() {
                self.shared.resize(&mut sent.claim, offset + len);
            }
        });
        if known.is_none() {
            return Ok(false);
        }
        let fields = ChunkFields { id, off: offset };
        self.channel
            .send_bulk("chunk", &fields, "chunk", bytes)
            .await?;
        Ok(true)
    }

    /// Reports, once, that an entry is about to be offered.
    async fn start(self, claim: &mut Claim, size: Option<u64>) -> Source {
        // The file may have another size than when it was listed.
        if let Some(size) = size {
            self.shared.resize(claim, size);
        }
        if claim.since.is_none() {
            claim.since = Some(Instant::now());
            let (index, name) = (claim.index, claim.source.remote());
            self.shared.totals.begin(index, name, size.unwrap_or(0));
            let started = Event::Started {
                index: claim.index,
                path: claim.source.remote().to_owned(),
                size: size.unwrap_or(0),
            };
            let _ = self.events.send(started).await;
        }
        claim.source.clone()
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    fn offer<'a>(
        &'a self,
        settle: bool,
        id: u64,
        source: &'a Source,
        size: Option<u64>,
        meta: Meta,
        resume: bool,
        run: Run,
    ) -> FileFields<'a> {
        let meta = MetaFields::from(self.kept(meta));
        FileFields {
            id,
            path: source.remote(),
            size,
            mtime: meta.mtime,
            mtime_ns: meta.mtime_ns,
            mode: meta.mode,
            if_exists: Some(self.policy(settle)),
            resume,
            dirs: self.dirs(source),
            run: Some(run),
            base: None,
            xattrs: None,
        }
    }

    /// Whether a message has room for so many bytes of a file and its attributes.
    fn fits(self, bytes: usize, xattrs: &XattrList) -> bool {
        let most = self.channel.frame_limit().saturating_sub(HEADER);
        xattrs.count() == 0 || bytes.saturating_add(xattrs.wire_len()) <= most
    }

    fn check_xattrs(self, xattrs: Option<&XattrList>) -> Result<(), TransferError> {
        match xattrs {
            Some(xattrs) if !self.fits(0, xattrs) => Err(TransferError::Refused {
                code: Code::TooLarge,
                message: "its extended attributes do not fit a message to this server".to_owned(),
                retry: false,
            }),
            _ => Ok(()),
        }
    }

    /// Whether asking the server what it has can pay off.
    fn pays(self) -> bool {
        let uploader = &self.shared.uploader;
        let stats = self.channel.stats();
        let rate = self.measure.rate(stats.wire_sent);
        let limited = uploader.limiter.rate().is_some();
        let pays = uploader.delta.pays(stats.rtt, limited, rate);
        pays && !self.shared.no_delta.load(Ordering::Relaxed)
    }

    /// The chunks of the base of this file, where asking for them can pay off.
    async fn sums(self, claim: &Claim) -> Option<(Sums, Others)> {
        let uploader = &self.shared.uploader;
        let replaces = uploader.if_exists == IfExists::Overwrite;
        let wanted = self.pays()
            && uploader.resume
            && !claim.plain
            && claim.size > SMALL
            && matches!(claim.source.origin, Origin::File(_))
            && (replaces || claim.source.base_path().is_some());
        let base = base_of(&claim.source).filter(|_| wanted)?;
        match self.shared.remote.sums(&base, claim.size).await {
            Ok(sums) => Some(sums),
            Err(error) => {
                if no_delta(&error) {
                    self.shared.no_delta.store(true, Ordering::Relaxed);
                }
                tracing::debug!(%error, path = claim.source.remote(), "no chunks to compare with");
                None
            }
        }
    }

    /// The name of the policy that applies.
    fn policy(&self, settle: bool) -> &str {
        if settle {
            "same"
        } else {
            &self.shared.if_exists
        }
    }

    /// The permissions of the directories that must be created for it.
    fn dirs(&self, source: &Source) -> Vec<u32> {
        let Some(umask) = self.shared.uploader.umask else {
            return Vec::new();
        };
        let modes = source.dir_modes().iter();
        modes.map(|mode| mode & 0o777 & !umask).collect()
    }

    /// The metadata that is preserved.
    fn kept(&self, meta: Meta) -> Meta {
        meta.kept(self.shared.uploader.preserve, self.shared.uploader.umask)
    }

    async fn resumed(self, id: u64, source: &Source, bytes: u64) {
        let known = self.flight.with(id, |sent| {
            let size = match sent.claim.is_unsized() {
                true => 0,
                false => sent.claim.size,
            };
            (sent.claim.index, size)
        });
        if let Some((index, size)) = known {
            let path = source.remote().to_owned();
            let resumed = Event::Resumed {
                index,
                path,
                bytes,
                size,
            };
            let _ = self.events.send(resumed).await;
        }
    }

    async fn finish(self, id: u64, size: u64, hash: [u8; 32]) -> Result<(), LaneOver> {
        let hash = Bin(hash);
        let fields = FinishFields { id, size, hash };
        Ok(self.channel.send("finish", &fields).await?)
    }

    /// Tells the server that this file will not be completed now; the server's answer ends it. A later upload may use
    /// what the server has, after comparing each byte.
    async fn give_up(self, id: u64, error: TransferError) -> Result<(), LaneOver> {
        lock(&self.flight.given_up).insert(id, error);
        // A source that can be read only once may fail differently the next time.
        let once = |sent: &mut Sent| sent.claim.source.spool().is_some();
        let once = self.flight.with(id, once).unwrap_or_default();
        let keep = self.shared.uploader.resume && !once;
        Ok(self
            .channel
            .send("cancel", &CancelFields { id, keep })
            .await?)
    }

    /// Takes the server's answers until every file of this lane has its outcome.
    async fn receive(self, socket: &Socket) -> Result<(), TransferError> {
        // The time since which the server has owed an answer and sent nothing.
        let mut since = Instant::now();
        loop {
            let mut changed = std::pin::pin!(self.flight.changed.notified());
            changed.as_mut().enable();
            let owed = self.flight.len() > 0;
            if !owed {
                if self.flight.complete.load(Ordering::Relaxed) {
                    return Ok(());
                }
                since = Instant::now();
            }
            tokio::select! {
                // A file may have failed on this side; then the server owes nothing for it.
                () = changed => {}
                message = self.channel.recv() => {
                    let Some(message) = message? else {
                        return Err(TransferError::Closed(lane_end(self.channel, socket)));
                    };
                    let reply = wire::decode_reply(&message)
                        .map_err(|error| TransferError::Protocol(error.to_string()))?;
                    // Other messages are those of a later version.
                    if let Some(reply) = reply {
                        self.take(reply).await;
                    }
                    since = Instant::now();
                }
                () = tokio::time::sleep_until(since + SILENCE), if owed => {
                    return Err(TransferError::Silent(SILENCE));
                }
            }
        }
    }

    async fn take(self, reply: Reply) {
        match reply {
            // These belong to downloads.
            Reply::File { .. } | Reply::Chunk { .. } | Reply::Hole(_) | Reply::Finish(_) => {}
            Reply::Ready {
                id,
                have,
                base,
                holes,
            } => {
                let tell = self.flight.with(id, |sent| sent.ready.take()).flatten();
                if let Some(tell) = tell {
                    let _ = tell.send(Ready { have, base, holes });
                }
            }
            Reply::Ack { id, recv, safe } => {
                let moved = self.flight.with(id, |sent| {
                    if let Some(spool) = sent.claim.source.spool() {
                        spool.durable(safe.min(sent.position));
                    }
                    let arrived = sent.arrived(recv);
                    self.arrived(arrived);
                    // The last byte counts only with `done`.
                    let acked = recv
                        .min(sent.position)
                        .min(sent.claim.size.saturating_sub(1));
                    let moved = acked > sent.claim.acked;
                    self.shared.acked(&mut sent.claim, acked);
                    moved
                });
                if moved == Some(true) {
                    self.moved();
                }
            }
            done @ Reply::Done { .. } => self.done(done).await,
            error @ Reply::Error { .. } => self.refused(error).await,
        }
    }

    /// Handles `done`: the server has stored a file.
    async fn done(self, reply: Reply) {
        let Reply::Done {
            id,
            path,
            size,
            hash,
            same,
            sync,
            mtime,
            xattrs,
        } = reply
        else {
            return;
        };
        let Some(mut sent) = self.flight.take(id) else {
            return;
        };
        self.moved();
        if !same {
            let arrived = sent.arrived(sent.position);
            self.arrived(arrived);
        }
        if let Err(error) = self.check_done(&sent.claim, size, &hash, same) {
            self.shared.failed(self.events, sent.claim, error).await;
            return;
        }
        let mut claim = sent.claim;
        let own = claim.size;
        self.shared.acked(&mut claim, own);
        self.shared.totals.end(claim.index, !claim.is_unsized());
        // A file that an earlier offer of this run has stored does not count as one that was there before.
        let there = same && !claim.unsure;
        let same = there && is_source(&claim, size, hash).await;
        let other_time = claim.mtime.zip(mtime).map(|(asked, secs)| OtherTime {
            asked,
            got: Time { secs, nanos: 0 },
        });
        let outcome = Outcome {
            index: claim.index,
            path,
            size,
            hash,
            sent: claim.sent,
            resumed: if there { 0 } else { sent.skipped },
            copied: sent.copied,
            holes: if same { 0 } else { sent.holes },
            torn: sent.torn,
            same,
            skipped: there && !same,
            sync,
            other_time,
            // A directory gets them in any case.
            lost_xattrs: match there && !claim.is_dir() {
                true => LostXattrs::None,
                false => LostXattrs::of(claim.xattrs, xattrs),
            },
            elapsed: claim.since.map_or(Duration::ZERO, |since| since.elapsed()),
        };
        claim.settle();
        let _ = self.events.send(Event::Done(outcome)).await;
    }

    /// Handles `error`: the server has refused a file, or this side has given it up.
    async fn refused(self, reply: Reply) {
        let Reply::Error {
            id,
            code,
            why,
            message,
            retry,
        } = reply
        else {
            return;
        };
        let code = Code::read(&code, why.as_deref());
        let Some(sent) = self.flight.take(id) else {
            return;
        };
        let mut claim = sent.claim;
        let error = match lock(&self.flight.given_up).remove(&id) {
            Some(own) => own,
            None => {
                if self.again(&mut claim, code, retry) {
                    tracing::debug!(%code, message, "offered again");
                    return;
                }
                TransferError::Refused {
                    code,
                    message,
                    retry,
                }
            }
        };
        self.shared.failed(self.events, claim, error).await;
    }

    /// Accepts `done` only if size and hash are those of the bytes that this source gave. After `skip` any file may be
    /// stored.
    fn check_done(
        self,
        claim: &Claim,
        size: u64,
        hash: &[u8; 32],
        same: bool,
    ) -> Result<(), TransferError> {
        let skipped = same && !claim.settle && self.shared.uploader.if_exists == IfExists::Skip;
        match &claim.told {
            Some((our_size, our_hash)) if *our_size == size && our_hash == hash => Ok(()),
            _ if skipped => Ok(()),
            Some(_) => Err(TransferError::Mismatch),
            None => Err(TransferError::Protocol(
                "`done` for a file that was not sent to its end".to_owned(),
            )),
        }
    }

    /// Whether a refused file is offered again, and when.
    fn again(self, claim: &mut Claim, code: Code, retry: bool) -> bool {
        if claim.source.is_spent() {
            return false;
        }
        let now = Instant::now();
        if claim.based && !claim.plain && !matches!(code, Code::Busy | Code::Superseded) {
            // The base may have changed, or may not contain what its list of chunks says.
            claim.plain = true;
            return retry
                || matches!(
                    code,
                    Code::NotFound | Code::SizeMismatch | Code::ProtocolOrder
                );
        }
        match code {
            Code::Exists | Code::Blocked if claim.unsure && !claim.settle => {
                // The stored file may be ours: the answer to an earlier offer may have been lost.
                claim.settle = self.shared.uploader.if_exists == IfExists::Error;
                claim.settle
            }
            Code::Busy => {
                let since = *claim.busy.get_or_insert(now);
                claim.not_before = Some(now + BUSY_PAUSE);
                now + BUSY_PAUSE <= since + BUSY
            }
            // A full disk or quota does not change within seconds.
            Code::Quota | Code::NoSpace => false,
            _ if retry && claim.tries < TRIES => {
                claim.not_before = Some(now + TRY_PAUSE * 2_u32.pow(claim.tries));
                claim.tries += 1;
                true
            }
            _ => false,
        }
    }

    /// So many bytes have come to the server over this path.
    fn arrived(self, bytes: u64) {
        self.shared.totals.moved(bytes);
        self.link.moved(bytes);
    }

    fn moved(self) {
        self.flight.moved.store(true, Ordering::Relaxed);
        self.link.progressed();
    }
}

/// The base of a source: the file it names, or the one that has its own name.
fn base_of(source: &Source) -> Option<RelPath> {
    match source.base_path() {
        Some(base) => Some(base.clone()),
        None => source.remote().parse().ok(),
    }
}

/// Whether the stored file of this name is identical to the source. If no hash was sent to the server, this side
/// computes it.
async fn is_source(claim: &Claim, size: u64, hash: [u8; 32]) -> bool {
    if let Some(told) = claim.told {
        return told == (size, hash);
    }
    let source = claim.source.clone();
    let compare = move || match source.fingerprint(size) {
        Ok(ours) => ours == Some(hash),
        Err(error) => {
            tracing::debug!(%error, "cannot compare a file that was skipped");
            false
        }
    };
    tokio::task::spawn_blocking(compare)
        .await
        .unwrap_or_default()
}

/// The reason when the server closes a lane normally although files on it have no outcome.
pub(crate) fn lane_end(channel: &Channel, socket: &Socket) -> CloseReason {
    if let Some(reason) = channel.close_reason().or_else(|| socket.close_reason()) {
        return reason;
    }
    let (code, text) = match socket.goaway() {
        Some(goaway) => (goaway.code, goaway.text),
        None => (
            CloseCode::CONNECTION_LOST,
            "the server ended the lane with files unanswered".to_owned(),
        ),
    };
    CloseReason::new(code, text, Side::Peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparing_pays_where_bytes_come_slowly() {
        let (near, far) = (Duration::from_micros(200), Duration::from_millis(50));
        for (rtt, limited, rate, pays) in [
            (near, false, None, false),
            (far, false, None, true),
            (near, true, None, true),
            (near, false, Some(11e6), true),
            (near, false, Some(110e6), false),
            (far, false, Some(110e6), true),
            (far, false, Some(900e6), false),
            (far, true, Some(900e6), true),
        ] {
            assert_eq!(
                Delta::Auto.pays(rtt, limited, rate),
                pays,
                "{rtt:?} {limited} {rate:?}"
            );
        }
        assert!(Delta::Always.pays(near, false, Some(900e6)));
        assert!(!Delta::Never.pays(far, true, Some(1e6)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_told_once_enough_has_come() {
        let measure = Measure::new(1000);
        assert_eq!(measure.rate(1000 + (8 << 20)), None);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(measure.rate(1000 + (1 << 20)), None);
        assert_eq!(measure.rate(1000 + (8 << 20)), Some(f64::from(4 << 20)));
    }
}
