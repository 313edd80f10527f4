//! [`Uploader`]: the client's half of a transfer. Spreads files over lanes and keeps the lanes full.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use udpack::{Channel, CloseCode, CloseReason, Side, Socket};

use crate::CHANNEL;
use crate::error::TransferError;
use crate::source::{Opened, Piece, Source};
use crate::store::IfExists;
use crate::wire::{self, CHUNK, ChunkFields, FileFields, FinishFields, Hash, IdField, Reply};

/// Files of one lane that may wait for their `done`.
const WINDOW: usize = 64;
/// Up to this many files each may ask first whether the server has it; beyond, only larger ones do.
const FEW: usize = 16;
/// Silence of the server while it owes an answer; it gives a sign of life each second.
const SILENCE: Duration = Duration::from_secs(60);
/// How often [`Upload::next`] reports progress at most.
const REPORT: Duration = Duration::from_millis(100);

/// How to upload: over which socket, on how many lanes, what to do with names that are taken.
#[derive(Debug, Clone)]
#[must_use = "an uploader does nothing until `put` is called"]
pub struct Uploader {
    socket: Socket,
    lanes: usize,
    if_exists: IfExists,
    keep_mtime: bool,
}

impl Uploader {
    /// Uploads over this socket.
    pub fn new(socket: &Socket) -> Self {
        Self {
            socket: socket.clone(),
            lanes: 4,
            if_exists: IfExists::default(),
            keep_mtime: false,
        }
    }

    /// Files sent side by side. Defaults to 4; never more than there are files.
    pub fn lanes(mut self, lanes: usize) -> Self {
        self.lanes = lanes.max(1);
        self
    }

    /// What the server shall do when a name is taken. Defaults to [`IfExists::Same`].
    pub fn if_exists(mut self, if_exists: IfExists) -> Self {
        self.if_exists = if_exists;
        self
    }

    /// Gives the stored files the modification times of the local ones. Defaults to no.
    pub fn keep_mtime(mut self, keep: bool) -> Self {
        self.keep_mtime = keep;
        self
    }

    /// Starts to upload. Files are begun in the given order; one that fails does not stop the others.
    pub fn put(self, sources: Vec<Source>) -> Upload {
        let total = sources.iter().filter_map(Source::size).sum();
        let files = sources.len();
        let few = files <= FEW;
        let lanes = self.lanes.min(files);
        let queue: VecDeque<_> = sources.into_iter().enumerate().collect();
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            total: AtomicU64::new(total),
            acked: AtomicU64::new(0),
            files_done: AtomicUsize::new(0),
            files,
            lanes: AtomicUsize::new(lanes),
        });
        let (events, happened) = mpsc::channel(256);
        let mut tasks = JoinSet::new();
        for _ in 0..lanes {
            tasks.spawn(lane(self.clone(), few, shared.clone(), events.clone()));
        }
        let mut ticker = tokio::time::interval(REPORT);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Upload {
            tasks,
            shared,
            happened,
            ticker,
            reported: None,
        }
    }
}

/// What happens during an upload.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A file has been offered to the server.
    Started {
        /// Which of the sources, counted from 0.
        index: usize,
        /// The name at the server.
        path: String,
        /// Its size in bytes.
        size: u64,
    },
    /// How far everything together is.
    Progress(Progress),
    /// A file is at the server: whole, verified, durable.
    Done(Outcome),
    /// A file is not.
    Failed {
        /// Which of the sources, counted from 0.
        index: usize,
        /// The name it should have had.
        path: String,
        /// Why.
        error: TransferError,
    },
}

/// How far an upload is. Never goes down; reaches the total only with the last `done`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes that the server has acknowledged, those of files it had already included.
    pub acked: u64,
    /// Bytes of all files that have not failed.
    pub total: u64,
    /// Files done or failed.
    pub files_done: usize,
    /// Files in all.
    pub files: usize,
}

/// One file that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// Which of the sources, counted from 0.
    pub index: usize,
    /// The name the server gave it.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// BLAKE3 of its bytes, computed on both sides.
    pub hash: [u8; 32],
    /// Bytes of file that were sent; 0 when the server had it already.
    pub sent: u64,
    /// The server had it already.
    pub same: bool,
    /// From the offer to `done`.
    pub elapsed: Duration,
}

/// An upload under way.
///
/// # Drop
/// Gives up what is unfinished: the server drops it, nothing of it becomes visible. Files whose last byte
/// was sent may still be stored.
#[derive(Debug)]
pub struct Upload {
    tasks: JoinSet<()>,
    shared: Arc<Shared>,
    happened: mpsc::Receiver<Event>,
    ticker: Interval,
    reported: Option<Progress>,
}

impl Upload {
    /// What happened next; `None` when every file has its `Done` or `Failed`. Progress comes when it changed,
    /// ten times a second at most, and once more at the end.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            tokio::select! {
                biased;
                event = self.happened.recv() => return match event {
                    Some(event) => Some(event),
                    None => self.changed().map(Event::Progress),
                },
                _ = self.ticker.tick() => if let Some(progress) = self.changed() {
                    return Some(Event::Progress(progress));
                },
                Some(ended) = self.tasks.join_next() => if let Err(error) = ended {
                    tracing::error!(%error, "a lane failed");
                },
            }
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    fn changed(&mut self) -> Option<Progress> {
        let now = self.shared.progress();
        if self.reported == Some(now) {
            return None;
        }
        self.reported = Some(now);
        Some(now)
    }
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<VecDeque<(usize, Source)>>,
    total: AtomicU64,
    acked: AtomicU64,
    files_done: AtomicUsize,
    files: usize,
    /// Lanes that have not failed.
    lanes: AtomicUsize,
}

impl Shared {
    fn next(&self) -> Option<(usize, Source)> {
        lock(&self.queue).pop_front()
    }

    /// A lane can do no more. The others go on with the queue; with the last one, what is left fails.
    async fn lane_failed(&self, error: &TransferError, events: &mpsc::Sender<Event>) {
        if self.lanes.fetch_sub(1, Ordering::Relaxed) > 1 {
            return;
        }
        while let Some((index, source)) = self.next() {
            let size = source.size().unwrap_or(0);
            self.failed(
                events,
                index,
                source.remote.to_string(),
                size,
                error.again(),
            )
            .await;
        }
    }

    /// Reports a file that did not arrive. What was not acknowledged leaves the total, so that the rest can
    /// still reach 100 % and nothing ever goes down.
    async fn failed(
        &self,
        events: &mpsc::Sender<Event>,
        index: usize,
        path: String,
        missing: u64,
        error: TransferError,
    ) {
        self.total.fetch_sub(missing, Ordering::Relaxed);
        self.files_done.fetch_add(1, Ordering::Relaxed);
        let _ = events.send(Event::Failed { index, path, error }).await;
    }

    fn progress(&self) -> Progress {
        let files_done = self.files_done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        let acked = self.acked.load(Ordering::Relaxed).min(total);
        Progress {
            acked,
            total,
            files_done,
            files: self.files,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file that waits for its outcome.
#[derive(Debug)]
struct Sent {
    index: usize,
    path: String,
    size: u64,
    /// Counted into the shared progress so far.
    acked: u64,
    sent: u64,
    hash: Option<[u8; 32]>,
    since: Instant,
    ready: Option<oneshot::Sender<Have>>,
}

/// Ranges that the server has: offset, length, BLAKE3.
type Have = Vec<(u64, u64, [u8; 32])>;

/// What the two halves of a lane share.
#[derive(Debug)]
struct InFlight {
    files: Mutex<HashMap<u64, Sent>>,
    /// Files that were given up here and whose `error` is awaited: why.
    given_up: Mutex<HashMap<u64, TransferError>>,
    changed: Notify,
    /// The sending half will add no more.
    complete: AtomicBool,
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
        lock(&self.files).insert(id, sent);
        self.changed.notify_waiters();
    }

    /// Changes what is known of a file; `false` when it has its outcome already.
    fn with(&self, id: u64, change: impl FnOnce(&mut Sent)) -> bool {
        lock(&self.files).get_mut(&id).map(change).is_some()
    }

    fn path(&self, id: u64) -> String {
        lock(&self.files)
            .get(&id)
            .map_or_else(String::new, |sent| sent.path.clone())
    }

    /// Takes a file that has its outcome.
    fn take(&self, id: u64) -> Option<Sent> {
        let sent = lock(&self.files).remove(&id);
        self.changed.notify_waiters();
        sent
    }

    /// Tells the server that a file will not be completed; its answer ends it.
    async fn give_up(
        &self,
        channel: &Channel,
        id: u64,
        error: TransferError,
    ) -> Result<(), LaneOver> {
        lock(&self.given_up).insert(id, error);
        channel
            .send("cancel", &IdField { id })
            .await
            .map_err(|_| LaneOver)
    }
}

/// One lane: takes files off the queue until there are none, or the lane is over.
async fn lane(uploader: Uploader, few: bool, shared: Arc<Shared>, events: mpsc::Sender<Event>) {
    let channel = match uploader.socket.open(CHANNEL).await {
        Ok(channel) => channel,
        Err(error) => {
            shared
                .lane_failed(&TransferError::from(error), &events)
                .await;
            return;
        }
    };
    let flight = InFlight {
        files: Mutex::default(),
        given_up: Mutex::default(),
        changed: Notify::new(),
        complete: AtomicBool::new(false),
    };
    let sending = async {
        let result = send_files(&uploader, few, &channel, &shared, &flight, &events).await;
        flight.complete.store(true, Ordering::Relaxed);
        flight.changed.notify_waiters();
        result
    };
    let receiving = receive(&uploader.socket, &channel, &shared, &flight, &events);
    // The receiving half ends last, or first when the lane breaks: then sending must not wait for it.
    let error = {
        let mut sending = std::pin::pin!(sending);
        let mut receiving = std::pin::pin!(receiving);
        tokio::select! {
            biased;
            received = &mut receiving => received.err(),
            () = &mut sending => receiving.await.err(),
        }
    };
    let Some(error) = error else {
        // Everything has its outcome: end the lane in order, without waiting for the last acknowledgement.
        drop(channel.close(CloseCode::NORMAL, ""));
        return;
    };
    drop(channel.close(CloseCode::CANCELLED, "the lane failed"));
    let left: Vec<_> = lock(&flight.files).drain().map(|(_, sent)| sent).collect();
    for sent in left {
        let error = error.again();
        fail(&shared, &events, Some(sent), error).await;
    }
    shared.lane_failed(&error, &events).await;
}

/// Sends file after file; a file that fails here has its event sent here.
async fn send_files(
    uploader: &Uploader,
    few: bool,
    channel: &Channel,
    shared: &Shared,
    flight: &InFlight,
    events: &mpsc::Sender<Event>,
) {
    let mut id = 0;
    loop {
        flight.below(WINDOW).await;
        let Some((index, source)) = shared.next() else {
            return;
        };
        id += 1;
        let path = source.remote.to_string();
        let size = source.size().unwrap_or(0);
        let (tell, ready) = oneshot::channel();
        // In flight from here on: whatever ends the lane reports it.
        let sent = Sent {
            index,
            path: path.clone(),
            size,
            acked: 0,
            sent: 0,
            hash: None,
            since: Instant::now(),
            ready: Some(tell),
        };
        flight.add(id, sent);
        let opened = {
            let source = source.clone();
            tokio::task::spawn_blocking(move || source.open()).await
        };
        let opened = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => {
                fail(shared, events, flight.take(id), error).await;
                continue;
            }
            Err(_) => {
                let error = TransferError::Protocol("the reader failed".to_owned());
                fail(shared, events, flight.take(id), error).await;
                continue;
            }
        };
        // The file may have grown or shrunk since the total was added up.
        shared.total.fetch_add(opened.size, Ordering::Relaxed);
        shared.total.fetch_sub(size, Ordering::Relaxed);
        flight.with(id, |sent| sent.size = opened.size);
        let started = Event::Started {
            index,
            path: path.clone(),
            size: opened.size,
        };
        let _ = events.send(started).await;
        let file = Sending {
            id,
            path,
            source,
            opened,
            ready,
        };
        if file.send(uploader, few, channel, flight).await.is_err() {
            // The receiving half reports how the lane ended.
            return;
        }
    }
}

/// The lane takes no more.
struct LaneOver;

/// One file on its way out.
struct Sending {
    id: u64,
    path: String,
    source: Source,
    opened: Opened,
    ready: oneshot::Receiver<Have>,
}

impl Sending {
    async fn send(
        self,
        uploader: &Uploader,
        few: bool,
        channel: &Channel,
        flight: &InFlight,
    ) -> Result<(), LaneOver> {
        let Self {
            id,
            path,
            source,
            opened,
            ready,
        } = self;
        let size = opened.size;
        let resume = uploader.if_exists == IfExists::Same && (few || size > CHUNK as u64);
        let fields = FileFields {
            id,
            path: &path,
            size: Some(size),
            mtime: opened.mtime.filter(|_| uploader.keep_mtime),
            mtime_ns: 0,
            mode: None,
            if_exists: Some(&uploader.if_exists.to_string()),
            resume,
            run: None,
        };
        channel.send("file", &fields).await.map_err(|_| LaneOver)?;
        if resume {
            // An error of the receiver means that the file has its outcome already.
            let Ok(have) = ready.await else { return Ok(()) };
            if let Some((0, len, theirs)) = have.first().copied()
                && len == size
            {
                return prove(channel, flight, id, size, theirs, source).await;
            }
        }
        let mut pieces = opened.read();
        let mut offset = 0;
        while let Some(piece) = pieces.recv().await {
            match piece {
                Piece::Chunk(bytes) => {
                    let len = bytes.len() as u64;
                    if !flight.with(id, |sent| sent.sent += len) {
                        // It has its outcome; what was on its way is dropped there.
                        return Ok(());
                    }
                    let fields = ChunkFields { id, off: offset };
                    channel
                        .send_bulk("chunk", &fields, "chunk", bytes)
                        .await
                        .map_err(|_| LaneOver)?;
                    offset += len;
                }
                Piece::End { hash } => {
                    flight.with(id, |sent| sent.hash = Some(hash));
                    let fields = FinishFields {
                        id,
                        size,
                        hash: Hash(hash),
                    };
                    channel
                        .send("finish", &fields)
                        .await
                        .map_err(|_| LaneOver)?;
                }
                Piece::Failed(error) => return flight.give_up(channel, id, error).await,
            }
        }
        Ok(())
    }
}

/// The server has a file of this name and size: is it this one?
async fn prove(
    channel: &Channel,
    flight: &InFlight,
    id: u64,
    size: u64,
    theirs: [u8; 32],
    source: Source,
) -> Result<(), LaneOver> {
    let hashed = tokio::task::spawn_blocking(move || source.open()?.hash()).await;
    match hashed {
        Ok(Ok(hash)) if hash == theirs => {
            flight.with(id, |sent| sent.hash = Some(hash));
            let fields = FinishFields {
                id,
                size,
                hash: Hash(hash),
            };
            channel.send("finish", &fields).await.map_err(|_| LaneOver)
        }
        Ok(Ok(_)) => {
            let error = TransferError::Refused {
                code: "exists".to_owned(),
                message: format!(
                    "a different file of the same size is stored as {}",
                    flight.path(id)
                ),
                retry: false,
            };
            flight.give_up(channel, id, error).await
        }
        Ok(Err(error)) => flight.give_up(channel, id, error).await,
        Err(_) => {
            let error = TransferError::Protocol("the reader failed".to_owned());
            flight.give_up(channel, id, error).await
        }
    }
}

/// Takes the server's answers until every file of this lane has its outcome.
async fn receive(
    socket: &Socket,
    channel: &Channel,
    shared: &Shared,
    flight: &InFlight,
    events: &mpsc::Sender<Event>,
) -> Result<(), TransferError> {
    // Since when the server has owed an answer and said nothing.
    let mut since = Instant::now();
    loop {
        let mut changed = std::pin::pin!(flight.changed.notified());
        changed.as_mut().enable();
        let owed = flight.len() > 0;
        if !owed {
            if flight.complete.load(Ordering::Relaxed) {
                return Ok(());
            }
            since = Instant::now();
        }
        tokio::select! {
            // A file may have failed on this side: then nothing is owed for it any more.
            () = changed => {}
            message = channel.recv() => {
                take(message, channel, socket, shared, flight, events).await?;
                since = Instant::now();
            }
            () = tokio::time::sleep_until(since + SILENCE), if owed => {
                return Err(TransferError::Silent(SILENCE));
            }
        }
    }
}

async fn take(
    message: Result<Option<udpack::Message>, udpack::RecvError>,
    channel: &Channel,
    socket: &Socket,
    shared: &Shared,
    flight: &InFlight,
    events: &mpsc::Sender<Event>,
) -> Result<(), TransferError> {
    let Some(message) = message? else {
        return Err(TransferError::Closed(lane_end(channel, socket)));
    };
    let reply =
        wire::decode_reply(&message).map_err(|error| TransferError::Protocol(error.to_string()))?;
    match reply {
        // An event of a later version, or what only a download gets.
        None | Some(Reply::File { .. } | Reply::Chunk { .. } | Reply::Finish(_)) => {}
        Some(Reply::Ready { id, have }) => {
            if let Some(tell) = lock(&flight.files)
                .get_mut(&id)
                .and_then(|sent| sent.ready.take())
            {
                let _ = tell.send(have);
            }
        }
        Some(Reply::Ack { id, recv, .. }) => {
            if let Some(sent) = lock(&flight.files).get_mut(&id) {
                // The last byte counts only with `done`.
                let acked = recv
                    .min(sent.sent)
                    .min(sent.size.saturating_sub(1))
                    .max(sent.acked);
                shared
                    .acked
                    .fetch_add(acked - sent.acked, Ordering::Relaxed);
                sent.acked = acked;
            }
        }
        Some(Reply::Done {
            id,
            path,
            size,
            hash,
            same,
            ..
        }) => {
            let Some(sent) = flight.take(id) else {
                return Ok(());
            };
            // After `skip` what is there may be anything.
            if !same && sent.hash.is_some_and(|ours| ours != hash) {
                fail(shared, events, Some(sent), TransferError::Mismatch).await;
                return Ok(());
            }
            shared
                .acked
                .fetch_add(sent.size - sent.acked, Ordering::Relaxed);
            shared.files_done.fetch_add(1, Ordering::Relaxed);
            let outcome = Outcome {
                index: sent.index,
                path,
                size,
                hash,
                sent: sent.sent,
                same,
                elapsed: sent.since.elapsed(),
            };
            let _ = events.send(Event::Done(outcome)).await;
        }
        Some(Reply::Error {
            id,
            code,
            message,
            retry,
        }) => {
            let Some(sent) = flight.take(id) else {
                return Ok(());
            };
            let own = lock(&flight.given_up).remove(&id);
            let error = own.unwrap_or(TransferError::Refused {
                code,
                message,
                retry,
            });
            fail(shared, events, Some(sent), error).await;
        }
    }
    Ok(())
}

/// Why the server ended a lane in order although files on it have no outcome.
fn lane_end(channel: &Channel, socket: &Socket) -> CloseReason {
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

/// Reports a file that was in flight and did not arrive; one that has its outcome already is left alone.
async fn fail(
    shared: &Shared,
    events: &mpsc::Sender<Event>,
    sent: Option<Sent>,
    error: TransferError,
) {
    if let Some(Sent {
        index,
        path,
        size,
        acked,
        ..
    }) = sent
    {
        shared
            .failed(events, index, path, size - acked, error)
            .await;
    }
}
