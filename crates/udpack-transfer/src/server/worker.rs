//! One incoming file: what its target must do, in order, beside the lane.
//!
//! A file's steps queue here, bounded. What a sink must do is a task for as long as there are steps. A store on disk
//! blocks, so its steps run on the blocking pool, where the same futures are ready at once. A large file has a thread for as long as it has steps, and none while it
//! waits, so a thousand slow uploads cost a thousand small queues and a slow one nobody but itself. Small files
//! take turns on a few threads: ten thousand of them must not be a crowd that fights for the same locks. Those
//! that are complete go on to the [`Publisher`], which puts many of them on disk at once.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::Span;
use udpack::Place;

use crate::base::code::Code;
use crate::base::path::RelPath;
use crate::server::hook::{Hook, HookStored, HookWhole};
use crate::server::places::Slot;
use crate::server::writers::{Pulse, UploadKey, Writer, Writers};
use crate::staging::target::{Started, Target, TargetFile, TargetUpload, TargetWhole};
use crate::store::{Expected, IfExists, NewUpload, Published, StoreError, Synced, Tenant};
use crate::wire::{Finish, Have, Offer, RANGES};

/// Chunks of one file that may wait for the disk.
const QUEUE: usize = 8;
/// Most files that are published together.
const BATCH: usize = 1024;
/// Size from which on a file is a large one: the store puts those on disk by themselves.
const SMALL: u64 = 1 << 20;
/// Steps of one file before the next has its turn.
const SHARE: u32 = 16;
/// Threads for each core: some of them wait for the disk.
const THREADS_PER_CORE: usize = 4;
/// Waiting files for each of them: a thread more costs more than these take.
const FILES_PER_THREAD: usize = 32;
/// Small files that a lane hands over at once, at most.
const GATHERED: usize = 32;
const FEWEST_THREADS: usize = 8;
const MOST_THREADS: usize = 64;

/// What the disk found, for the lane to tell the client.
#[derive(Debug)]
pub(crate) enum Outcome {
    Ready {
        id: u64,
        have: Have,
    },
    Done {
        id: u64,
        published: Published,
    },
    Error {
        id: u64,
        code: Code,
        message: String,
        retry: bool,
    },
    /// It was cancelled by its owner or an admin.
    Cancelled {
        id: u64,
    },
    /// A download is under way, or has failed and the client was notified.
    Sent {
        id: u64,
        failed: Option<Code>,
    },
}

impl Outcome {
    pub(crate) fn failed(id: u64, error: &StoreError) -> Self {
        Self::Error {
            id,
            code: error.refusal(),
            message: error.to_string(),
            retry: error.retry(),
        }
    }

    fn broken(id: u64) -> Self {
        Self::Error {
            id,
            code: Code::Internal,
            message: "the server failed to store the file".to_owned(),
            retry: true,
        }
    }
}

/// Where the outcomes of a lane's files go.
pub(crate) type Outcomes = mpsc::UnboundedSender<Outcome>;

/// What a file is to become.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) offer: Offer,
    /// The name in the store.
    pub(crate) path: RelPath,
    /// Whose it is.
    pub(crate) owner: Arc<str>,
    pub(crate) tenant: Option<Tenant>,
    /// Names the upload within its client's run.
    pub(crate) key: Option<UploadKey>,
    /// What that run has stored under this name before: nothing else may come under it.
    pub(crate) known: Option<Published>,
    /// The right to write it, where it can be resumed.
    pub(crate) writer: Option<Writer>,
    /// All of it, where it came with the offer.
    pub(crate) whole: Option<Whole>,
    /// The socket it comes by, for the log: threads that many files share write it.
    pub(crate) span: Span,
}

/// A file that came whole.
#[derive(Debug)]
pub(crate) struct Whole {
    /// As its client says.
    pub(crate) hash: [u8; 32],
    pub(crate) bytes: Bytes,
}

/// A lane's handle on one file. Dropping it before [`finish`](Self::finish) ends the file: what can be
/// resumed is put aside, the rest is removed.
#[derive(Debug)]
pub(crate) struct Incoming {
    shared: Arc<Shared>,
    pulse: Option<Pulse>,
    finished: bool,
}

#[derive(Debug)]
struct Shared {
    target: Target,
    /// It takes turns in the pool; any other file of a store gets a thread to itself.
    pooled: bool,
    queue: Mutex<Queue>,
    room: Arc<Semaphore>,
    received: AtomicU64,
    safe: OnceLock<Arc<AtomicU64>>,
    /// Ends a step that waits.
    ended: Notify,
}

#[derive(Debug)]
struct Queue {
    steps: VecDeque<Step>,
    /// It waits in the pool, or a thread of it has the worker.
    running: bool,
    worker: Option<Worker>,
    end: Option<End>,
}

/// Whether no step of a file can take long: no large file is synced for it, and none is read.
fn is_small(offer: &Offer) -> bool {
    let asks = offer.resume || offer.if_exists == IfExists::Skip;
    !asks && offer.size.is_some_and(|size| size < SMALL)
}

/// The threads that small files take turns on.
#[derive(Debug)]
struct Pool {
    most: usize,
    ready: Mutex<Ready>,
}

#[derive(Debug, Default)]
struct Ready {
    files: VecDeque<Arc<Shared>>,
    threads: usize,
}

impl Pool {
    fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            most: (cores * THREADS_PER_CORE).clamp(FEWEST_THREADS, MOST_THREADS),
            ready: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the files' steps carried out when their turn comes.
    fn submit(self: &Arc<Self>, files: impl IntoIterator<Item = Arc<Shared>>) {
        let mut ready = self.lock();
        ready.files.extend(files);
        self.staff(ready);
    }

    /// Starts threads while there are more files than those at work soon come to.
    fn staff(self: &Arc<Self>, mut ready: MutexGuard<'_, Ready>) {
        let wanted = ready.files.len().div_ceil(FILES_PER_THREAD).min(self.most);
        let more = wanted.saturating_sub(ready.threads);
        ready.threads += more;
        drop(ready);
        for _ in 0..more {
            let pool = self.clone();
            tokio::task::spawn_blocking(move || pool.run());
        }
    }

    /// Does on a thread of the pool what may wait for the disk; another takes its place meanwhile.
    fn aside(self: &Arc<Self>, wait: impl FnOnce()) {
        /// Also after a panic.
        struct Back<'a>(&'a Pool);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                self.0.lock().threads += 1;
            }
        }
        let mut ready = self.lock();
        ready.threads = ready.threads.saturating_sub(1);
        let _back = Back(self);
        self.staff(ready);
        wait();
    }

    fn run(self: Arc<Self>) {
        loop {
            let file = {
                let mut ready = self.lock();
                let Some(file) = ready.files.pop_front() else {
                    ready.threads -= 1;
                    return;
                };
                file
            };
            let more = std::panic::catch_unwind(AssertUnwindSafe(|| file.run().now_or_never()));
            if more.ok().flatten().unwrap_or_default() {
                self.submit([file]);
            }
        }
    }
}

/// Small files of one lane that have steps, before the pool hears of them: what came in one go is handed over
/// by one call, and each file's steps are carried out in one turn. Dropping it hands them over.
#[derive(Debug)]
pub(crate) struct Gathered {
    pool: Arc<Pool>,
    files: Vec<Arc<Shared>>,
}

impl Gathered {
    pub(crate) fn new(publisher: &Publisher) -> Self {
        Self {
            pool: publisher.pool.clone(),
            files: Vec::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Lets them begin; to be called before waiting for anything.
    pub(crate) fn hand_over(&mut self) {
        if !self.files.is_empty() {
            self.pool.submit(self.files.drain(..));
        }
    }

    fn add(&mut self, file: Arc<Shared>) {
        self.files.push(file);
        if self.files.len() >= GATHERED {
            self.hand_over();
        }
    }
}

impl Drop for Gathered {
    fn drop(&mut self) {
        if tokio::runtime::Handle::try_current().is_ok() {
            self.hand_over();
        }
    }
}

/// How a file ends that gets no `finish`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Suspend,
    Discard,
}

#[derive(Debug)]
enum Step {
    /// With the place that reading what is there takes.
    Begin(Option<Place>),
    Chunk(Option<u64>, Bytes, OwnedSemaphorePermit),
    /// Some time has passed: a checkpoint may be due.
    Pause,
    Finish(Finish),
    /// All that there is to do, for one that came whole.
    Whole(Whole),
}

impl Incoming {
    /// Begins a file: the first step looks at the name and the space, and is the last of one that came whole.
    pub(crate) fn begin(
        publisher: &Publisher,
        mut task: Task,
        slot: Slot,
        outcomes: Outcomes,
        gathered: &mut Gathered,
    ) -> Self {
        let pulse = task.writer.as_ref().map(Writer::pulse);
        let target = publisher.target.clone();
        let pooled = is_small(&task.offer) && target.store().is_some();
        let whole = task.whole.take();
        let Slot { file, check } = slot;
        let worker = Worker {
            stage: Stage::New,
            task,
            publisher: publisher.clone(),
            outcomes,
            since: Instant::now(),
            file: Some(file),
        };
        let shared = Arc::new(Shared {
            target,
            pooled,
            queue: Mutex::new(Queue {
                steps: VecDeque::new(),
                running: false,
                worker: Some(worker),
                end: None,
            }),
            room: Arc::new(Semaphore::new(QUEUE)),
            received: AtomicU64::new(0),
            safe: OnceLock::new(),
            ended: Notify::new(),
        });
        let incoming = Self {
            shared,
            pulse,
            finished: whole.is_some(),
        };
        incoming.push(whole.map_or(Step::Begin(check), Step::Whole), gathered);
        incoming
    }

    /// Where a chunk must wait for its turn before it is [`write`](Self::write)n.
    pub(crate) fn room(&self) -> Arc<Semaphore> {
        self.shared.room.clone()
    }

    /// The next chunk; without an offset it follows the one before.
    pub(crate) fn write(
        &self,
        offset: Option<u64>,
        bytes: Bytes,
        room: OwnedSemaphorePermit,
        gathered: &mut Gathered,
    ) {
        self.push(Step::Chunk(offset, bytes, room), gathered);
    }

    /// Lets the file run to its end by itself; the outcome comes on the channel.
    pub(crate) fn finish(&mut self, finish: Finish, gathered: &mut Gathered) {
        self.finished = true;
        self.push(Step::Finish(finish), gathered);
    }

    /// Ends the file and removes what is there of it, also where it could be resumed.
    pub(crate) fn discard(mut self) {
        self.finished = true;
        self.end(End::Discard);
    }

    /// Bytes received and written so far, without a gap.
    pub(crate) fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// Of those, bytes that a power cut would not take.
    pub(crate) fn safe(&self) -> u64 {
        let safe = self.shared.safe.get();
        safe.map_or(0, |safe| safe.load(Ordering::Relaxed))
            .min(self.received())
    }

    /// Looks whether something should be made durable, in case nothing comes any more.
    pub(crate) fn pause(&self, gathered: &mut Gathered) {
        if self.safe() < self.received() && self.shared.lock().steps.is_empty() {
            self.push(Step::Pause, gathered);
        }
    }

    fn push(&self, step: Step, gathered: &mut Gathered) {
        let mut queue = self.shared.lock();
        queue.steps.push_back(step);
        let idle = !std::mem::replace(&mut queue.running, true);
        drop(queue);
        if idle {
            let shared = self.shared.clone();
            if shared.pooled {
                gathered.add(shared);
            } else {
                let target = shared.target.clone();
                target.run(async move { while shared.run().await {} });
            }
        }
    }

    fn end(&self, end: End) {
        if let Some(pulse) = &self.pulse {
            pulse.leave();
        }
        let worker = {
            let mut queue = self.shared.lock();
            queue.end = Some(end);
            queue.steps.clear();
            queue.worker.take()
        };
        self.shared.ended.notify_one();
        // Syncing or removing a large staging file takes time: not on this thread, where there is a choice.
        if let Some(worker) = worker
            && tokio::runtime::Handle::try_current().is_ok()
        {
            self.shared.target.run(worker.end(end));
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.finished {
            self.end(End::Suspend);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out steps; says whether there are more after a fair share.
    async fn run(&self) -> bool {
        let Some(mut worker) = self.lock().worker.take() else {
            return false;
        };
        for turn in 0..=SHARE {
            let next = {
                let mut queue = self.lock();
                match queue.end {
                    Some(end) => Err(end),
                    None => match (turn < SHARE).then(|| queue.steps.pop_front()).flatten() {
                        Some(step) => Ok(step),
                        None => {
                            queue.running = !queue.steps.is_empty();
                            queue.worker = Some(worker);
                            return queue.running;
                        }
                    },
                }
            };
            let step = match next {
                Ok(step) => step,
                Err(end) => {
                    worker.end(end).await;
                    return false;
                }
            };
            let last = matches!(step, Step::Finish(_) | Step::Whole(_));
            let (id, outcomes) = (worker.task.offer.id, worker.outcomes.clone());
            let working = AssertUnwindSafe(worker.step(step, self)).catch_unwind();
            let done = tokio::select! {
                biased;
                done = working => done,
                // What it waited for may never come, and nobody wants it any more.
                () = self.ended.notified(), if !last => Ok(()),
            };
            if done.is_err() {
                tracing::error!("storing a file panicked");
                let _ = outcomes.send(Outcome::broken(id));
                worker.stage = Stage::Ended;
            }
            if last {
                // Its place among the files that are open is free.
                return false;
            }
        }
        false
    }
}

/// What one file needs, wherever it runs.
#[derive(Debug)]
struct Worker {
    // Before the task: its writer lets go only after the staging file has been let go of.
    stage: Stage,
    task: Task,
    publisher: Publisher,
    outcomes: Outcomes,
    since: Instant,
    /// Its place among the files that are open.
    file: Option<Place>,
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "what is large is also what there are most of"
)]
enum Stage {
    New,
    Writing(TargetUpload),
    /// There is a file to be equal to: compare instead of write.
    Comparing(Box<Comparing>),
    Ended,
}

#[derive(Debug)]
struct Comparing {
    with: Compared,
    /// Its hash, once known.
    hash: Option<[u8; 32]>,
    received: blake3::Hasher,
}

/// What the bytes of an offer shall be equal to.
#[derive(Debug)]
enum Compared {
    /// The file that has the name, and the size.
    Existing(TargetFile),
    /// What the same run has stored before.
    Known(Published),
}

impl Compared {
    fn len(&self) -> u64 {
        match self {
            Self::Existing(existing) => existing.size(),
            Self::Known(published) => published.size,
        }
    }

    async fn hash(&self) -> Result<[u8; 32], StoreError> {
        match self {
            Self::Existing(existing) => existing.hash().await,
            Self::Known(published) => Ok(published.hash),
        }
    }
}

impl Worker {
    async fn end(self, end: End) {
        // Its writer lets go only after that.
        if let Stage::Writing(upload) = self.stage {
            match end {
                End::Suspend if self.task.offer.resume => upload.suspend().await,
                End::Suspend | End::Discard => upload.abort().await,
            }
        }
    }

    async fn step(&mut self, step: Step, shared: &Shared) {
        let done = match step {
            Step::Begin(_place) => self.begin(shared, false).await,
            Step::Chunk(offset, bytes, _room) => self.chunk(offset, bytes, shared).await,
            Step::Pause => self.checkpoint().await,
            Step::Whole(whole) => self.whole(whole, shared).await,
            Step::Finish(finish) => self.finish(finish).await,
        };
        let Err(error) = done else {
            return;
        };
        // What cannot be written is gone.
        if let Stage::Writing(upload) = std::mem::replace(&mut self.stage, Stage::Ended) {
            upload.abort().await;
        }
        let refused = || tracing::info!(code = error.code(), "upload refused: {error}");
        self.task.span.in_scope(refused);
        // Who hears of it may offer it again at once.
        self.task.writer = None;
        self.tell(Outcome::failed(self.task.offer.id, &error));
    }

    async fn chunk(
        &mut self,
        offset: Option<u64>,
        bytes: Bytes,
        shared: &Shared,
    ) -> Result<(), StoreError> {
        match &mut self.stage {
            Stage::Writing(upload) => {
                let offset = offset.unwrap_or_else(|| upload.position());
                upload.write(offset, bytes).await?;
                shared.received.store(upload.position(), Ordering::Relaxed);
            }
            Stage::Comparing(comparing) => {
                return take(&self.task.path, comparing, &bytes, shared);
            }
            // The file has ended; what was on its way is dropped.
            Stage::New | Stage::Ended => {}
        }
        self.checkpoint().await
    }

    async fn checkpoint(&mut self) -> Result<(), StoreError> {
        match &mut self.stage {
            Stage::Writing(upload) => upload.checkpoint().await,
            Stage::New | Stage::Comparing(_) | Stage::Ended => Ok(()),
        }
    }

    async fn begin(&mut self, shared: &Shared, whole: bool) -> Result<(), StoreError> {
        if let Some(known) = self.task.known.take() {
            return self.again(known);
        }
        let Task {
            offer,
            path,
            owner,
            tenant,
            ..
        } = &self.task;
        let id = offer.id;
        let new = NewUpload {
            path,
            peer: owner,
            size: offer.size,
            meta: offer.meta.into(),
            if_exists: offer.if_exists,
            resumable: offer.resume,
            tenant: tenant.as_ref(),
            dirs: &offer.dirs,
            whole,
        };
        let existing = match self.publisher.target.begin(&new).await? {
            Started::New(mut upload) => {
                let _ = shared.safe.set(upload.safe());
                if offer.resume {
                    let have = upload.have().await?;
                    let have = have
                        .into_iter()
                        .take(RANGES)
                        .map(|range| (range.off, range.len, range.hash))
                        .collect();
                    self.tell(Outcome::Ready { id, have });
                }
                self.stage = Stage::Writing(upload);
                return Ok(());
            }
            Started::Exists(existing) => existing,
        };
        let len = existing.size();
        if offer.if_exists == IfExists::Skip {
            let hash = existing.hash().await?;
            self.was_there(existing.path().as_str().to_owned(), len, hash);
            return Ok(());
        }
        if offer.size.is_some_and(|size| size != len) {
            return Err(StoreError::Exists { path: path.clone() });
        }
        let mut hash = None;
        if offer.resume {
            let known = existing.hash().await?;
            hash = Some(known);
            self.tell(Outcome::Ready {
                id,
                have: vec![(0, len, known)],
            });
        }
        self.stage = Stage::Comparing(Box::new(Comparing {
            with: Compared::Existing(existing),
            hash,
            received: blake3::Hasher::new(),
        }));
        Ok(())
    }

    /// The run has stored a file under this name before, and its client may not know it: is it this one?
    fn again(&mut self, known: Published) -> Result<(), StoreError> {
        let Task { offer, path, .. } = &self.task;
        if offer.size.is_some_and(|size| size != known.size) {
            return Err(StoreError::Exists { path: path.clone() });
        }
        if offer.resume {
            let (id, have) = (offer.id, vec![(0, known.size, known.hash)]);
            self.tell(Outcome::Ready { id, have });
        }
        self.stage = Stage::Comparing(Box::new(Comparing {
            hash: Some(known.hash),
            with: Compared::Known(known),
            received: blake3::Hasher::new(),
        }));
        Ok(())
    }

    /// Begins and ends a file.
    async fn whole(&mut self, whole: Whole, shared: &Shared) -> Result<(), StoreError> {
        let Whole { hash, bytes } = whole;
        let finish = Finish {
            id: self.task.offer.id,
            size: self.task.offer.size,
            hash: Some(hash),
        };
        self.begin(shared, true).await?;
        match &mut self.stage {
            Stage::Writing(upload) => {
                upload.write(0, bytes).await?;
                shared.received.store(upload.position(), Ordering::Relaxed);
            }
            Stage::Comparing(comparing) => take(&self.task.path, comparing, &bytes, shared)?,
            Stage::New | Stage::Ended => {}
        }
        self.finish(finish).await
    }

    async fn finish(&mut self, finish: Finish) -> Result<(), StoreError> {
        match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Writing(upload) => self.complete(upload, &finish).await,
            Stage::Comparing(comparing) => self.compare(*comparing, finish).await,
            Stage::New | Stage::Ended => Ok(()),
        }
    }

    /// All bytes are here: are they right?
    async fn complete(&mut self, upload: TargetUpload, finish: &Finish) -> Result<(), StoreError> {
        let expected = Expected {
            size: finish.size.or(self.task.offer.size),
            hash: finish.hash,
            meta: self.task.offer.meta.into(),
        };
        let size = expected.size.unwrap_or_else(|| upload.position());
        let publication = Publication {
            complete: upload.finish(expected).await?,
            id: self.task.offer.id,
            owner: self.task.owner.clone(),
            key: self.task.key,
            since: self.since,
            outcomes: self.outcomes.clone(),
            writer: self.task.writer.take().map(Box::new),
            span: self.task.span.clone(),
        };
        match self.publisher.hook.clone() {
            Some(hook) => {
                let whole = HookWhole {
                    path: self.task.path.as_str().to_owned(),
                    file: publication.complete.staged_at(&self.publisher.target),
                    size,
                    peer: self.task.owner.to_string(),
                };
                let place = self.file.take();
                self.publisher.verify(hook, whole, publication, place);
            }
            None => {
                let pooled = is_small(&self.task.offer);
                self.publisher.publish(publication, pooled).await;
            }
        }
        Ok(())
    }

    /// The name was taken: is what the client has the same?
    async fn compare(&mut self, comparing: Comparing, finish: Finish) -> Result<(), StoreError> {
        let Comparing {
            with,
            hash,
            received,
        } = comparing;
        let path = self.task.path.clone();
        let count = received.count();
        let size = finish.size.unwrap_or(count);
        // Not all sent, but the hash told in `ready` given back: the client has compared for itself.
        let proved = (count == 0 || count < with.len())
            && hash.is_some()
            && finish.hash == hash
            && size == with.len();
        if !proved {
            if count > 0 || hash.is_none() {
                let mut told = [self.task.offer.size, finish.size].into_iter().flatten();
                if let Some(expected) = told.find(|expected| *expected != count) {
                    return Err(StoreError::SizeMismatch {
                        expected,
                        got: count,
                    });
                }
            }
            let got = *received.finalize().as_bytes();
            if let Some(expected) = finish.hash
                && expected != got
                && (count > 0 || hash.is_none())
            {
                return Err(StoreError::HashMismatch { expected, got });
            }
            let theirs = match hash {
                Some(hash) => hash,
                None => with.hash().await?,
            };
            if size != with.len() || finish.hash.unwrap_or(got) != theirs {
                return Err(StoreError::Exists { path });
            }
        }
        let hash = match (hash, finish.hash) {
            (Some(hash), _) | (None, Some(hash)) => hash,
            (None, None) => *received.finalize().as_bytes(),
        };
        match with {
            Compared::Existing(_) => self.was_there(path.as_str().to_owned(), size, hash),
            Compared::Known(published) => self.done(published),
        }
        Ok(())
    }

    fn was_there(&mut self, path: String, size: u64, hash: [u8; 32]) {
        let told = || tracing::info!(path, bytes = size, "was there already");
        self.task.span.in_scope(told);
        self.done(Published {
            path,
            size,
            hash,
            same: true,
            sync: Synced::File,
            other_time: None,
        });
    }

    fn done(&mut self, published: Published) {
        self.task.writer = None;
        self.tell(Outcome::Done {
            id: self.task.offer.id,
            published,
        });
    }

    fn tell(&self, outcome: Outcome) {
        // Nobody listens any more once the lane is gone; the file is stored all the same.
        let _ = self.outcomes.send(outcome);
    }
}

/// Takes bytes of a file that is there already.
fn take(
    path: &RelPath,
    comparing: &mut Comparing,
    bytes: &[u8],
    shared: &Shared,
) -> Result<(), StoreError> {
    comparing.received.update(bytes);
    let count = comparing.received.count();
    shared.received.store(count, Ordering::Relaxed);
    if count > comparing.with.len() {
        // It cannot be equal any more, and what was not declared has no other end.
        return Err(StoreError::Exists { path: path.clone() });
    }
    Ok(())
}

/// Gives complete files their names. What has to be synced first waits for the others of its kind, so that
/// one sync serves all that came while the one before was running.
#[derive(Clone)]
pub(crate) struct Publisher {
    target: Target,
    writers: Writers,
    hook: Option<Arc<dyn Hook>>,
    waiting: Arc<Mutex<Waiting>>,
    pool: Arc<Pool>,
}

#[derive(Debug, Default)]
struct Waiting {
    publications: Vec<Publication>,
    /// A thread is at work and will take what is added.
    busy: bool,
}

#[derive(Debug)]
struct Publication {
    // Before the writer, which lets go only after the file has its name.
    complete: TargetWhole,
    id: u64,
    owner: Arc<str>,
    key: Option<UploadKey>,
    since: Instant,
    outcomes: Outcomes,
    writer: Option<Box<Writer>>,
    span: Span,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}

impl Publisher {
    /// Tells this hook of every file that is stored, whether or not its client still listens.
    pub(crate) fn hook(mut self, hook: Arc<dyn Hook>) -> Self {
        self.hook = Some(hook);
        self
    }

    pub(crate) fn new(target: Target, writers: Writers) -> Self {
        Self {
            target,
            writers,
            hook: None,
            waiting: Arc::default(),
            pool: Arc::new(Pool::new()),
        }
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    pub(crate) fn writers(&self) -> &Writers {
        &self.writers
    }

    /// Publishes a file when the hook agrees, beside this thread. The file keeps its place until then.
    fn verify(
        &self,
        hook: Arc<dyn Hook>,
        whole: HookWhole,
        publication: Publication,
        place: Option<Place>,
    ) {
        let publisher = self.clone();
        tokio::spawn(async move {
            let agreed = hook.verify(&whole).await;
            // Files are removed and synced there.
            publisher.target.clone().run(async move {
                let _place = place;
                let reason = match agreed {
                    Ok(()) => return publisher.publish(publication, false).await,
                    Err(reason) => reason,
                };
                let Publication {
                    complete,
                    id,
                    outcomes,
                    writer,
                    ..
                } = publication;
                complete.discard().await;
                drop(writer);
                let _ = outcomes.send(Outcome::Error {
                    id,
                    code: Code::Refused,
                    message: reason,
                    retry: false,
                });
            });
        });
    }

    /// Blocks, where a store has to sync, unless another thread is publishing already: then that one takes it along.
    /// `pooled` says that this thread is one of the pool.
    async fn publish(&self, publication: Publication, pooled: bool) {
        if !publication.complete.waits() {
            return self.run(vec![publication]).await;
        }
        if self.joins(publication) {
            return;
        }
        if pooled {
            self.pool.aside(|| self.publish_waiting());
        } else {
            self.publish_waiting();
        }
    }

    /// Adds it to those that wait; whether a thread is at work that will take it along.
    fn joins(&self, publication: Publication) -> bool {
        let mut waiting = self.waiting();
        waiting.publications.push(publication);
        std::mem::replace(&mut waiting.busy, true)
    }

    fn publish_waiting(&self) {
        let mut waiting = self.waiting();
        loop {
            let count = waiting.publications.len().min(BATCH);
            let batch: Vec<_> = waiting.publications.drain(..count).collect();
            if batch.is_empty() {
                waiting.busy = false;
                return;
            }
            drop(waiting);
            let owed: Vec<_> = batch
                .iter()
                .map(|publication| (publication.id, publication.outcomes.clone()))
                .collect();
            let done =
                std::panic::catch_unwind(AssertUnwindSafe(|| self.run(batch).now_or_never()));
            if done.is_err() {
                tracing::error!("publishing files panicked");
                for (id, outcomes) in owed {
                    let _ = outcomes.send(Outcome::broken(id));
                }
            }
            waiting = self.waiting();
        }
    }

    async fn run(&self, batch: Vec<Publication>) {
        let mut owed = Vec::with_capacity(batch.len());
        let mut files = Vec::with_capacity(batch.len());
        for Publication {
            complete,
            id,
            owner,
            key,
            since,
            outcomes,
            writer,
            span,
            ..
        } in batch
        {
            files.push(complete);
            owed.push((id, owner, key, since, outcomes, writer, span));
        }
        let published = self.target.publish(files).await;
        for ((id, owner, key, since, outcomes, writer, span), published) in
            owed.into_iter().zip(published)
        {
            let _logged = span.entered();
            let outcome = match published {
                Ok(published) => {
                    tracing::info!(
                        path = published.path,
                        bytes = published.size,
                        secs = since.elapsed().as_secs_f64(),
                        same = published.same,
                        "stored"
                    );
                    if let Some(key) = key {
                        self.writers.ended(key, &published);
                    }
                    if let Some(hook) = &self.hook
                        && !published.same
                    {
                        hook.done(HookStored {
                            file: self.target.stored_at(&published.path),
                            path: published.path.clone(),
                            size: published.size,
                            hash: published.hash,
                            peer: owner.to_string(),
                        });
                    }
                    Outcome::Done { id, published }
                }
                Err(error) => {
                    tracing::info!(code = error.code(), "upload refused: {error}");
                    Outcome::failed(id, &error)
                }
            };
            // Who waits to write it must find the outcome.
            drop(writer);
            let _ = outcomes.send(outcome);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
