//! One incoming file: the steps that its target must carry out, in order, while its lane continues.
//!
//! A file's steps queue here, bounded. For a sink, a task carries them out for as long as there are steps. A store on
//! disk blocks, so its steps run on the blocking pool; there the same futures are ready at once. A large file occupies
//! a thread for as long as it has steps, and none while it waits for bytes. So a thousand slow uploads cost a thousand
//! small queues, and a slow upload delays no other. Small files of a store take turns on a few threads
//! ([`pool`](super::pool)). Complete files go on to [`Staging::publish`], which syncs many of them at once.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use udpack::Place;

pub(crate) use super::pool::Gathered;
use super::publisher::Staging;
use super::target::{Started, Target, TargetFile, TargetUpload, TargetWhole};
use crate::base::path::RelPath;
use crate::base::phase::Phase;
use crate::base::sums::{Cutting, Sums};
use crate::base::zeros;
use crate::store::{
    Expected, IfExists, Meta, NewUpload, Published, StoreError, Synced, Tenant, XattrList,
};
use crate::wire::{Copied, Have, Hole, RANGES};

/// Chunks of one file that may wait for the disk.
const QUEUE: usize = 8;
/// Bytes of a base that are read in one call: they stay in the processor's cache until they are hashed and written.
const BLOCK: usize = 256 << 10;
/// Steps that one file carries out before the next file has its turn.
const SHARE: u32 = 16;

/// The one for whom a file is received: an upload's lane at the server, or a download at the client. It learns what is
/// durable, what was written, and the outcome. When the lane gives the file up, the recipient is dropped without an
/// outcome. If a panic drops it, its `Drop` must report that the file failed.
pub(crate) trait Recipient: fmt::Debug + Send + Sized + 'static {
    /// Whether it downloads. A download learns which file has the name, and its sender compares that one, where the
    /// receiver of an upload compares the bytes that arrive. Skipping may then leave a different file in place, and a
    /// file that failed for lack of space is kept.
    const DOWNLOADS: bool;

    /// Called when what is being done with the file changes.
    fn phase(&self, _phase: Phase) {}

    /// Called when the sender has told the size of the file, and how many extended attributes it has, if it tells: for
    /// downloads only.
    fn opened(&mut self, _size: u64, _xattrs: Option<u32>) {}

    /// Called with the bytes that need not be sent, if the file can be resumed or is a download. `base`: the size of
    /// the plan's base, if that could be opened.
    fn ready(&mut self, have: Have, base: Option<u64>);

    /// Called when `len` bytes up to this position were written, after `skipped` bytes that were there.
    fn wrote(&mut self, _skipped: u64, _len: u64, _position: u64) {}

    /// So many bytes came from a file that was here: of a download only.
    fn filled(&mut self, _bytes: u64) {}

    /// As [`wrote`](Self::wrote), with zeros of which none was sent.
    fn hole(&mut self, skipped: u64, _len: u64, position: u64) {
        self.wrote(skipped, 0, position);
    }

    /// Called when a stored file is kept. [`Published::same`] tells whether it is identical.
    fn was_there(self, file: Published);

    /// Called when all bytes have arrived and their hash is right; the last `skipped` of them were there before. The
    /// file must then be [published](Staging::publish).
    fn complete(
        self,
        staging: &Staging<Self>,
        complete: TargetWhole,
        size: u64,
        skipped: u64,
    ) -> impl Future<Output = ()> + Send;

    /// Called when the file has its name, or has failed.
    fn stored(self, stored: Result<Published, StoreError>);

    /// Called when storing it panicked.
    fn broken(self);
}

/// What is to be received, and where it goes.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Its name in the target.
    pub(crate) path: RelPath,
    /// The owner: the name of the token.
    pub(crate) peer: Arc<str>,
    /// Its size in bytes, if known.
    pub(crate) size: Option<u64>,
    pub(crate) meta: Meta,
    pub(crate) xattrs: XattrList,
    pub(crate) if_exists: IfExists,
    /// Whether an interrupted file is kept, and a kept one is continued.
    pub(crate) resume: bool,
    pub(crate) tenant: Option<Tenant>,
    /// Permission bits of directories that must be created.
    pub(crate) dirs: Vec<u32>,
    /// The file that this run has already stored under the name: only an identical one may arrive.
    pub(crate) known: Option<Published>,
    /// A file that this one may share bytes with, and that its sender may read.
    pub(crate) base: Option<RelPath>,
    /// The chunks of this file at its sender, of which the one that has its name here may have some: of a download only.
    pub(crate) sums: Option<Sums>,
    /// Whether its steps are short and take turns with those of other small files.
    pub(crate) small: bool,
    /// Set when the file was given up and only has to be removed.
    pub(crate) leaving: Option<Arc<AtomicBool>>,
}

/// A file that arrived in one message.
#[derive(Debug)]
pub(crate) struct Whole {
    /// The hash that its sender sent.
    pub(crate) hash: [u8; 32],
    pub(crate) bytes: Bytes,
}

/// A file's first step.
#[derive(Debug)]
pub(crate) enum First {
    /// Examines the name and the space, with the place in the pool that reading existing bytes takes.
    Look(Option<Place>),
    /// All steps at once, for a file that arrived in one message.
    Whole(Whole),
}

/// A lane's handle of one file. Dropping it before [`finish`](Self::finish) ends the file: what can be resumed is kept,
/// the rest is removed.
#[derive(Debug)]
pub(crate) struct Incoming<R: Recipient> {
    shared: Arc<Shared<R>>,
    leaving: Option<Arc<AtomicBool>>,
    finished: bool,
}

#[derive(Debug)]
pub(super) struct Shared<R> {
    target: Target,
    /// Whether it takes turns in the pool. Any other file of a store has a thread to itself.
    pooled: bool,
    queue: Mutex<Queue<R>>,
    room: Arc<Semaphore>,
    received: AtomicU64,
    safe: OnceLock<Arc<AtomicU64>>,
    /// Ends a step that waits.
    ended: Notify,
}

#[derive(Debug)]
struct Queue<R> {
    steps: VecDeque<Step>,
    /// Whether it waits in the pool, or one of the pool's threads runs its worker.
    running: bool,
    worker: Option<Worker<R>>,
    end: Option<End<R>>,
}

/// How a file ends that gets no `finish`.
struct End<R> {
    /// Whether to remove its bytes even if they could be resumed.
    discard: bool,
    /// Called when the file has ended.
    tell: Box<dyn FnOnce(R) + Send>,
}

impl<R> fmt::Debug for End<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("End")
            .field("discard", &self.discard)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Step {
    First(First),
    Open {
        size: u64,
        meta: Meta,
        xattrs: Option<XattrList>,
        resume: bool,
    },
    Chunk(Option<u64>, Bytes, OwnedSemaphorePermit),
    Copy(Copied, OwnedSemaphorePermit),
    Hole(Hole, OwnedSemaphorePermit),
    /// Time has passed: a checkpoint may be due.
    Pause,
    Finish {
        size: Option<u64>,
        hash: Option<[u8; 32]>,
    },
}

impl<R: Recipient> Incoming<R> {
    /// Begins a file, or continues an interrupted one.
    pub(crate) fn begin(
        staging: &Staging<R>,
        plan: Plan,
        recipient: R,
        first: First,
        gathered: &mut Gathered<R>,
    ) -> Self {
        let target = staging.target.clone();
        let incoming = Self {
            leaving: plan.leaving.clone(),
            finished: matches!(first, First::Whole(_)),
            shared: Arc::new(Shared {
                pooled: plan.small && target.store().is_some(),
                target,
                queue: Mutex::new(Queue {
                    steps: VecDeque::new(),
                    running: false,
                    worker: Some(Worker {
                        stage: Stage::New,
                        plan,
                        base: None,
                        opened: None,
                        filled: false,
                        staging: staging.clone(),
                        recipient: Some(recipient),
                    }),
                    end: None,
                }),
                room: Arc::new(Semaphore::new(QUEUE)),
                received: AtomicU64::new(0),
                safe: OnceLock::new(),
                ended: Notify::new(),
            }),
        };
        incoming.push(Step::First(first), gathered);
        incoming
    }

    /// Tells the size and the metadata that the sender gives the file, and whether a file of that size is kept when it is
    /// interrupted.
    pub(crate) fn open(
        &self,
        size: u64,
        meta: Meta,
        xattrs: Option<XattrList>,
        resume: bool,
        gathered: &mut Gathered<R>,
    ) {
        let open = Step::Open {
            size,
            meta,
            xattrs,
            resume,
        };
        self.push(open, gathered);
    }

    /// A chunk needs a permit of this semaphore before it is passed to [`write`](Self::write).
    pub(crate) fn room(&self) -> Arc<Semaphore> {
        self.shared.room.clone()
    }

    /// Writes the next chunk. Without an offset it follows the previous one.
    pub(crate) fn write(
        &self,
        offset: Option<u64>,
        bytes: Bytes,
        room: OwnedSemaphorePermit,
        gathered: &mut Gathered<R>,
    ) {
        self.push(Step::Chunk(offset, bytes, room), gathered);
    }

    /// Like [`write`](Self::write), with bytes of the base.
    pub(crate) fn copy(
        &self,
        copied: Copied,
        room: OwnedSemaphorePermit,
        gathered: &mut Gathered<R>,
    ) {
        self.push(Step::Copy(copied, room), gathered);
    }

    /// As [`write`](Self::write), with zeros.
    pub(crate) fn hole(&self, hole: Hole, room: OwnedSemaphorePermit, gathered: &mut Gathered<R>) {
        self.push(Step::Hole(hole, room), gathered);
    }

    /// Verifies and publishes the file in the background; the recipient gets the outcome.
    pub(crate) fn finish(
        &mut self,
        size: Option<u64>,
        hash: Option<[u8; 32]>,
        gathered: &mut Gathered<R>,
    ) {
        self.finished = true;
        self.push(Step::Finish { size, hash }, gathered);
    }

    /// Ends the file without its unwritten bytes, and then passes the recipient to `tell`, unless the recipient has its
    /// outcome already. `discard` removes its bytes even if they could be resumed.
    pub(crate) fn end(mut self, discard: bool, tell: impl FnOnce(R) + Send + 'static) {
        self.finished = true;
        let tell = Box::new(tell);
        self.give_up(End { discard, tell });
    }

    /// Bytes received and written so far, without a gap.
    pub(crate) fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// How many of these survive a power cut.
    pub(crate) fn safe(&self) -> u64 {
        let safe = self.shared.safe.get();
        safe.map_or(0, |safe| safe.load(Ordering::Relaxed))
            .min(self.received())
    }

    /// Makes bytes durable if a checkpoint is due, even if no more bytes arrive.
    pub(crate) fn pause(&self, gathered: &mut Gathered<R>) {
        if self.safe() < self.received() && self.shared.lock().steps.is_empty() {
            self.push(Step::Pause, gathered);
        }
    }

    fn push(&self, step: Step, gathered: &mut Gathered<R>) {
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

    fn give_up(&self, end: End<R>) {
        if let Some(leaving) = &self.leaving {
            leaving.store(true, Ordering::Release);
        }
        let idle = {
            let mut queue = self.shared.lock();
            queue.steps.clear();
            match queue.worker.take() {
                Some(worker) => Some((worker, end)),
                None => {
                    queue.end = Some(end);
                    None
                }
            }
        };
        self.shared.ended.notify_one();
        // Syncing or removing a large staging file takes time: keep it off this thread where possible.
        if let Some((worker, end)) = idle
            && tokio::runtime::Handle::try_current().is_ok()
        {
            self.shared.target.run(worker.end(end));
        }
    }
}

impl<R: Recipient> Drop for Incoming<R> {
    fn drop(&mut self) {
        if !self.finished {
            self.give_up(End {
                discard: false,
                tell: Box::new(drop),
            });
        }
    }
}

impl<R> Shared<R> {
    fn lock(&self) -> MutexGuard<'_, Queue<R>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<R: Recipient> Shared<R> {
    /// Carries out steps. Returns whether more remain after a fair share.
    pub(super) async fn run(&self) -> bool {
        let Some(mut worker) = self.lock().worker.take() else {
            return false;
        };
        for turn in 0..=SHARE {
            let next = {
                let mut queue = self.lock();
                match queue.end.take() {
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
            let last = matches!(step, Step::Finish { .. } | Step::First(First::Whole(_)));
            let working = AssertUnwindSafe(worker.step(step, self)).catch_unwind();
            let done = tokio::select! {
                biased;
                done = working => done,
                // The step may wait for ever, and nobody wants its outcome any more.
                () = self.ended.notified(), if !last => Ok(()),
            };
            if done.is_err() {
                tracing::error!("storing a file panicked");
                worker.stage = Stage::Ended;
                if let Some(recipient) = worker.recipient.take() {
                    recipient.broken();
                }
            }
            if last {
                // The file no longer counts as an open one.
                return false;
            }
        }
        false
    }
}

/// The state of one file, wherever its steps run.
#[derive(Debug)]
struct Worker<R> {
    // Declared before the recipient: the staging file is released first, and the recipient releases the upload after
    // it.
    stage: Stage,
    plan: Plan,
    /// The plan's base, as it was when the file began.
    base: Option<TargetFile>,
    /// The size that [`Step::Open`] gave.
    opened: Option<u64>,
    /// Some of it came from the file that is replaced.
    filled: bool,
    staging: Staging<R>,
    /// `None` once it has the outcome.
    recipient: Option<R>,
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "what is large is also what there are most of"
)]
enum Stage {
    New,
    Writing(TargetUpload),
    /// A file must be equal to a stored one: compare instead of writing.
    Comparing(Box<Comparing>),
    Ended,
}

/// Bytes of a file, sent by the other side or read from the base.
enum Content<'a> {
    Sent(Bytes),
    Copied(&'a [u8]),
}

impl AsRef<[u8]> for Content<'_> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Sent(bytes) => bytes,
            Self::Copied(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Comparing {
    with: Compared,
    /// Its hash, once known.
    hash: Option<[u8; 32]>,
    received: blake3::Hasher,
}

/// What the bytes of an offer must be equal to.
#[derive(Debug)]
enum Compared {
    /// The file that has the name, and its size.
    Existing(TargetFile),
    /// The file that the same run has stored before.
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

impl<R: Recipient> Worker<R> {
    async fn end(mut self, End { discard, tell }: End<R>) {
        // An offer that is given up before its first step has continued nothing. The bytes of an earlier offer are
        // removed all the same.
        if discard
            && self.plan.resume
            && matches!(self.stage, Stage::New)
            && let Ok(Started::New(upload)) = self.take_up(false).await
        {
            self.stage = Stage::Writing(upload);
        }
        // The recipient is released, and told, only after that.
        if let Stage::Writing(upload) = std::mem::replace(&mut self.stage, Stage::Ended) {
            put_aside(upload, self.plan.resume && !discard).await;
        }
        if let Some(recipient) = self.recipient {
            tell(recipient);
        }
    }

    fn phase(&self, phase: Phase) {
        if let Some(recipient) = &self.recipient {
            recipient.phase(phase);
        }
    }

    /// Whether the first step may have to read a whole file: a stored one, or the part of this one that is kept.
    fn looks(&self) -> bool {
        self.plan.resume || self.plan.if_exists == IfExists::Skip
    }

    async fn step(&mut self, step: Step, shared: &Shared<R>) {
        let done = match step {
            Step::First(First::Look(_place)) => self.begin(shared, false).await,
            Step::First(First::Whole(whole)) => self.whole(whole, shared).await,
            Step::Open {
                size,
                meta,
                xattrs,
                resume,
            } => {
                if let Some(recipient) = &mut self.recipient {
                    recipient.opened(size, xattrs.as_ref().map(XattrList::count));
                }
                (self.plan.meta, self.plan.xattrs) = (meta, xattrs.unwrap_or_default());
                self.open(size, resume, shared).await
            }
            Step::Chunk(offset, bytes, _room) => {
                self.chunk(offset, Content::Sent(bytes), shared).await
            }
            Step::Copy(copied, _room) => self.copy(copied, shared).await,
            Step::Hole(hole, _room) => self.hole(hole, shared).await,
            Step::Pause => self.checkpoint().await,
            Step::Finish { size, hash } => self.finish(size, hash).await,
        };
        let Err(error) = done else {
            return;
        };
        if let Stage::Writing(upload) = std::mem::replace(&mut self.stage, Stage::Ended) {
            // Bytes that a server could not write are lost, except where a sink may accept them later.
            let later = self.plan.resume && matches!(error, StoreError::Unavailable { .. });
            put_aside(upload, later || R::DOWNLOADS && error.retry()).await;
        }
        if let Some(recipient) = self.recipient.take() {
            recipient.stored(Err(error));
        }
    }

    async fn chunk(
        &mut self,
        offset: Option<u64>,
        bytes: Content<'_>,
        shared: &Shared<R>,
    ) -> Result<(), StoreError> {
        match &mut self.stage {
            Stage::Writing(upload) => {
                let (before, len) = (upload.position(), bytes.as_ref().len() as u64);
                let offset = offset.unwrap_or(before);
                fits(self.opened, offset.saturating_add(len))?;
                match bytes {
                    Content::Sent(bytes) => upload.write(offset, bytes).await?,
                    Content::Copied(bytes) => upload.write_copy(offset, bytes).await?,
                }
                let position = upload.position();
                shared.received.store(position, Ordering::Relaxed);
                if let Some(recipient) = &mut self.recipient {
                    recipient.wrote(offset.saturating_sub(before), len, position);
                }
            }
            // The sender would have sent no bytes of an identical file.
            Stage::Comparing(_) if R::DOWNLOADS => return self.other(),
            Stage::Comparing(comparing) => {
                return take(&self.plan.path, comparing, bytes.as_ref(), shared);
            }
            // The file has ended; chunks that were on their way are dropped.
            Stage::New | Stage::Ended => {}
        }
        self.checkpoint().await
    }

    /// Writes bytes of the base as if they had been sent. The base is trusted no more than the sender: the hash of the
    /// whole file decides.
    async fn copy(&mut self, copied: Copied, shared: &Shared<R>) -> Result<(), StoreError> {
        if matches!(self.stage, Stage::New | Stage::Ended) {
            return Ok(());
        }
        let (mut from, mut offset) = (copied.from, copied.offset);
        let end = offset.saturating_add(copied.len);
        let part = |left: u64| usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
        let mut block = vec![0; part(copied.len)];
        while offset < end {
            let Some(base) = &self.base else {
                let path = self.plan.base.as_ref().unwrap_or(&self.plan.path).clone();
                return Err(StoreError::NotFound { path });
            };
            block.truncate(part(end - offset));
            let count = base.read_into(from, &mut block).await?;
            let bytes = block.get(..count).unwrap_or_default();
            if bytes.is_empty() {
                let expected = base.size();
                let got = copied.from.saturating_add(copied.len);
                return Err(StoreError::SizeMismatch { expected, got });
            }
            let at = offset;
            from = from.saturating_add(bytes.len() as u64);
            offset = offset.saturating_add(bytes.len() as u64);
            self.chunk(Some(at), Content::Copied(bytes), shared).await?;
        }
        Ok(())
    }

    /// Zeros come as if they had been sent. Written, they take no room where the target can do so.
    async fn hole(&mut self, hole: Hole, shared: &Shared<R>) -> Result<(), StoreError> {
        let Hole { offset, len, .. } = hole;
        match &mut self.stage {
            Stage::Writing(upload) => {
                let before = upload.position();
                fits(self.opened, offset.saturating_add(len))?;
                upload.hole(offset, len).await?;
                let position = upload.position();
                shared.received.store(position, Ordering::Relaxed);
                if let Some(recipient) = &mut self.recipient {
                    recipient.hole(offset.saturating_sub(before), len, position);
                }
            }
            Stage::Comparing(_) if R::DOWNLOADS => return self.other(),
            Stage::Comparing(comparing) => {
                for zeros in zeros::blocks(len) {
                    take(&self.plan.path, comparing, zeros, shared)?;
                }
                return Ok(());
            }
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

    /// Begins or continues the upload in the target.
    async fn take_up(&mut self, whole: bool) -> Result<Started, StoreError> {
        let plan = &self.plan;
        let new = NewUpload {
            path: &plan.path,
            peer: &plan.peer,
            size: plan.size,
            meta: plan.meta,
            if_exists: plan.if_exists,
            resumable: plan.resume,
            tenant: plan.tenant.as_ref(),
            dirs: &plan.dirs,
            whole,
        };
        self.staging.target.begin(&new).await
    }

    /// Begins the upload in the target, and reports which of its bytes are durable.
    async fn start(
        &mut self,
        shared: &Shared<R>,
        whole: bool,
    ) -> Result<(Started, Have), StoreError> {
        let mut started = self.take_up(whole).await?;
        let mut have = Have::new();
        if let Started::New(upload) = &mut started {
            let _ = shared.safe.set(upload.safe());
            if self.plan.resume {
                let ranges = upload.have().await?.into_iter().take(RANGES);
                have.extend(ranges.map(|range| (range.off, range.len, range.hash)));
            }
        }
        Ok((started, have))
    }

    async fn begin(&mut self, shared: &Shared<R>, whole: bool) -> Result<(), StoreError> {
        if self.looks() {
            self.phase(Phase::Checking);
        }
        let begun = self.look(shared, whole).await;
        self.phase(Phase::Receiving);
        begun
    }

    async fn look(&mut self, shared: &Shared<R>, whole: bool) -> Result<(), StoreError> {
        if let Some(known) = self.plan.known.take() {
            return self.again(known);
        }
        let existing = match self.start(shared, whole).await? {
            (Started::New(upload), mut have) => {
                self.stage = Stage::Writing(upload);
                if let Some(sums) = self.plan.sums.take() {
                    have = self.fill(sums, have, shared).await?;
                }
                if let Some(base) = &self.plan.base {
                    // The base is optional: without it everything is sent.
                    self.base = self.staging.target.read(base).await.ok();
                }
                self.ready(have);
                return Ok(());
            }
            (Started::Exists(existing), _) => existing,
        };
        let len = existing.size();
        let other_size = self.plan.size.is_some_and(|size| size != len);
        if self.plan.if_exists != IfExists::Skip {
            if other_size {
                return Err(self.exists());
            }
        } else if !R::DOWNLOADS || other_size {
            let hash = existing.hash().await?;
            self.was_there(
                existing.path().as_str().to_owned(),
                len,
                hash,
                !R::DOWNLOADS,
            );
            return Ok(());
        }
        let mut hash = None;
        if self.plan.resume || R::DOWNLOADS {
            let known = existing.hash().await?;
            hash = Some(known);
            self.ready(vec![(0, len, known)]);
        }
        self.compare_with(Compared::Existing(existing), hash);
        Ok(())
    }

    /// Puts together what the file that is to be replaced has of the new one. The sender compares it as it compares what an
    /// earlier attempt has left.
    async fn fill(
        &mut self,
        mut sums: Sums,
        have: Have,
        shared: &Shared<R>,
    ) -> Result<Have, StoreError> {
        let Stage::Writing(TargetUpload::Disk(partial)) = &mut self.stage else {
            return Ok(have);
        };
        // It is a hint: without it everything is sent.
        let Ok(old) = self.staging.target.read(&self.plan.path).await else {
            return Ok(have);
        };
        let known = |from: u64, to: u64| {
            let over = |(off, len, _): &(u64, u64, _)| *off < to && from < off.saturating_add(*len);
            have.iter().any(over)
        };
        let mut cutting = Cutting::new(sums.cutter());
        let (mut read, mut filled) = (0_u64, 0_u64);
        loop {
            while cutting.needs() {
                let reading = old.read_into(read, cutting.room(BLOCK)).await;
                let count = reading.unwrap_or(0);
                read = read.saturating_add(count as u64);
                if count == 0 || shared.lock().end.is_some() {
                    cutting.end();
                } else {
                    cutting.add(count);
                }
            }
            let Some(chunk) = cutting.next() else { break };
            let len = chunk.len() as u64;
            for at in sums.take(chunk) {
                if !known(at, at.saturating_add(len)) {
                    partial.fill(at, chunk)?;
                    filled = filled.saturating_add(len);
                }
            }
        }
        if filled == 0 {
            return Ok(have);
        }
        self.filled = true;
        if let Some(recipient) = &mut self.recipient {
            recipient.filled(filled);
        }
        let ranges = partial.filled()?.into_iter().take(RANGES);
        Ok(ranges
            .map(|range| (range.off, range.len, range.hash))
            .collect())
    }

    /// The run has stored a file under this name before, and its client may not know that. Decides whether the offer is
    /// that file.
    fn again(&mut self, known: Published) -> Result<(), StoreError> {
        if self.plan.size.is_some_and(|size| size != known.size) {
            return Err(self.exists());
        }
        self.ready(vec![(0, known.size, known.hash)]);
        let hash = known.hash;
        self.compare_with(Compared::Known(known), Some(hash));
        Ok(())
    }

    fn compare_with(&mut self, with: Compared, hash: Option<[u8; 32]>) {
        self.stage = Stage::Comparing(Box::new(Comparing {
            with,
            hash,
            received: blake3::Hasher::new(),
        }));
    }

    fn ready(&mut self, have: Have) {
        if (self.plan.resume || R::DOWNLOADS)
            && let Some(recipient) = &mut self.recipient
        {
            recipient.ready(have, self.base.as_ref().map(TargetFile::size));
        }
    }

    /// The sender announces a file of this size.
    async fn open(
        &mut self,
        size: u64,
        resume: bool,
        shared: &Shared<R>,
    ) -> Result<(), StoreError> {
        self.opened = Some(size);
        let expected = self.plan.size.replace(size);
        match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Comparing(comparing) if comparing.with.len() != size => {
                self.stage = Stage::Comparing(comparing);
                return self.other();
            }
            // It has changed since its chunks were listed, and what it passes over may be something else.
            Stage::Writing(upload) if self.filled && expected != Some(size) => {
                put_aside(upload, false).await;
                let expected = expected.unwrap_or(0);
                return Err(StoreError::SizeMismatch {
                    expected,
                    got: size,
                });
            }
            // The reserved space and the durable bytes must be determined again.
            Stage::Writing(upload) if expected.is_some_and(|expected| expected != size) => {
                put_aside(upload, self.plan.resume).await;
                self.plan.resume = resume;
                match self.start(shared, false).await? {
                    (Started::New(upload), _) => self.stage = Stage::Writing(upload),
                    (Started::Exists(_), _) => return Err(self.exists()),
                }
            }
            stage => self.stage = stage,
        }
        Ok(())
    }

    /// Receives a file that arrived in one message.
    async fn whole(&mut self, whole: Whole, shared: &Shared<R>) -> Result<(), StoreError> {
        let Whole { hash, bytes } = whole;
        self.begin(shared, true).await?;
        match &mut self.stage {
            Stage::Writing(upload) => {
                upload.write(0, bytes).await?;
                shared.received.store(upload.position(), Ordering::Relaxed);
            }
            Stage::Comparing(comparing) => take(&self.plan.path, comparing, &bytes, shared)?,
            Stage::New | Stage::Ended => {}
        }
        self.finish(self.plan.size, Some(hash)).await
    }

    async fn finish(
        &mut self,
        size: Option<u64>,
        hash: Option<[u8; 32]>,
    ) -> Result<(), StoreError> {
        self.phase(Phase::Checking);
        match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Writing(upload) => self.complete(upload, size, hash).await,
            Stage::Comparing(comparing) => self.compare(*comparing, size, hash).await,
            Stage::New | Stage::Ended => Ok(()),
        }
    }

    /// All bytes have arrived: checks their size and hash.
    async fn complete(
        &mut self,
        upload: TargetUpload,
        size: Option<u64>,
        hash: Option<[u8; 32]>,
    ) -> Result<(), StoreError> {
        if let (Some(expected), Some(got)) = (self.opened, size)
            && expected != got
        {
            put_aside(upload, false).await;
            return Err(StoreError::SizeMismatch { expected, got });
        }
        let expected = Expected {
            size: size.or(self.plan.size),
            hash,
            meta: self.plan.meta,
        };
        let position = upload.position();
        let size = expected.size.unwrap_or(position);
        let recipient = self.recipient.as_mut();
        let mut syncing = move || {
            if let Some(recipient) = &recipient {
                recipient.phase(Phase::Syncing);
            }
        };
        let xattrs = std::mem::take(&mut self.plan.xattrs);
        let complete = upload.finish(expected, &xattrs, &mut syncing).await?;
        if let Some(recipient) = self.recipient.take() {
            let skipped = size.saturating_sub(position);
            recipient
                .complete(&self.staging, complete, size, skipped)
                .await;
        }
        Ok(())
    }

    /// The name is taken: checks whether the sender's file is the same.
    async fn compare(
        &mut self,
        comparing: Comparing,
        told: Option<u64>,
        their_hash: Option<[u8; 32]>,
    ) -> Result<(), StoreError> {
        let Comparing {
            with,
            hash,
            received,
        } = comparing;
        let count = received.count();
        let size = told.unwrap_or(count);
        // The sender sent part of the file and the hash from `ready`: it has compared the file itself.
        let proved = (count == 0 || count < with.len())
            && hash.is_some()
            && their_hash == hash
            && size == with.len();
        if !proved {
            if count > 0 || hash.is_none() {
                let mut told = [self.plan.size, told].into_iter().flatten();
                if let Some(expected) = told.find(|expected| *expected != count) {
                    return Err(StoreError::SizeMismatch {
                        expected,
                        got: count,
                    });
                }
            }
            let got = *received.finalize().as_bytes();
            if let Some(expected) = their_hash
                && expected != got
                && (count > 0 || hash.is_none())
            {
                return Err(StoreError::HashMismatch { expected, got });
            }
            let theirs = match hash {
                Some(hash) => hash,
                None => with.hash().await?,
            };
            if size != with.len() || their_hash.unwrap_or(got) != theirs {
                self.compare_with(with, hash);
                return self.other();
            }
        }
        let hash = match (hash, their_hash) {
            (Some(hash), _) | (None, Some(hash)) => hash,
            (None, None) => *received.finalize().as_bytes(),
        };
        match with {
            Compared::Existing(_) => {
                self.was_there(self.plan.path.as_str().to_owned(), size, hash, true);
            }
            Compared::Known(published) => self.stays(published),
        }
        Ok(())
    }

    /// A different file has the name. A download skips it, if its policy says so.
    fn other(&mut self) -> Result<(), StoreError> {
        if R::DOWNLOADS
            && self.plan.if_exists == IfExists::Skip
            && let Stage::Comparing(comparing) = std::mem::replace(&mut self.stage, Stage::Ended)
            && let (Compared::Existing(existing), Some(hash)) = (comparing.with, comparing.hash)
        {
            let path = existing.path().as_str().to_owned();
            self.was_there(path, existing.size(), hash, false);
            return Ok(());
        }
        Err(self.exists())
    }

    fn exists(&self) -> StoreError {
        StoreError::Exists {
            path: self.plan.path.clone(),
        }
    }

    fn was_there(&mut self, path: String, size: u64, hash: [u8; 32], same: bool) {
        self.stays(Published {
            path,
            size,
            hash,
            same,
            sync: Synced::File,
            other_time: None,
            xattrs: 0,
        });
    }

    fn stays(&mut self, published: Published) {
        if let Some(recipient) = self.recipient.take() {
            recipient.was_there(published);
        }
    }
}

/// What is sent of a file ends within the size that was told.
fn fits(size: Option<u64>, got: u64) -> Result<(), StoreError> {
    match size {
        Some(expected) if got > expected => Err(StoreError::SizeMismatch { expected, got }),
        _ => Ok(()),
    }
}

async fn put_aside(upload: TargetUpload, keep: bool) {
    match keep {
        true => upload.suspend().await,
        false => upload.abort().await,
    }
}

/// Compares bytes with those of a stored file.
fn take<R>(
    path: &RelPath,
    comparing: &mut Comparing,
    bytes: &[u8],
    shared: &Shared<R>,
) -> Result<(), StoreError> {
    comparing.received.update(bytes);
    let count = comparing.received.count();
    shared.received.store(count, Ordering::Relaxed);
    if count > comparing.with.len() {
        // The files differ. The size was not declared, so there is no later point at which to report it.
        return Err(StoreError::Exists { path: path.clone() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::store::{Memory, Store, StoreConfig};

    /// Hears of everything and does nothing.
    #[derive(Debug)]
    struct Nobody;

    impl Recipient for Nobody {
        const DOWNLOADS: bool = false;

        fn ready(&mut self, _have: Have, _base: Option<u64>) {}

        fn was_there(self, _file: Published) {}

        async fn complete(
            self,
            _staging: &Staging<Self>,
            _complete: TargetWhole,
            _size: u64,
            _skipped: u64,
        ) {
        }

        fn stored(self, _stored: Result<Published, StoreError>) {}

        fn broken(self) {}
    }

    fn offer(staging: &Staging<Nobody>) -> Incoming<Nobody> {
        let plan = Plan {
            path: "x".parse().expect("a path"),
            peer: "peer".into(),
            size: Some(300_000),
            meta: Meta::default(),
            xattrs: XattrList::default(),
            if_exists: IfExists::Error,
            resume: true,
            tenant: None,
            dirs: Vec::new(),
            known: None,
            base: None,
            sums: None,
            small: false,
            leaving: None,
        };
        let first = First::Look(None);
        Incoming::begin(staging, plan, Nobody, first, &mut staging.gathered())
    }

    async fn ended(incoming: Incoming<Nobody>, discard: bool) {
        let (tell, told) = oneshot::channel();
        incoming.end(discard, move |_| tell.send(()).expect("it waits"));
        told.await.expect("told");
    }

    /// An offer with 200,000 bytes is put aside, and another ends before its first step.
    async fn leave_and_give_up(target: Target) {
        let staging = Staging::new(target);
        let incoming = offer(&staging);
        let room = incoming.room().acquire_owned().await.expect("room");
        let gathered = &mut staging.gathered();
        incoming.write(Some(0), vec![7; 200_000].into(), room, gathered);
        // The step gives its room back when the bytes are written.
        let most = u32::try_from(QUEUE).expect("few");
        drop(incoming.room().acquire_many_owned(most).await);
        ended(incoming, false).await;
        ended(offer(&staging), true).await;
    }

    #[tokio::test]
    async fn what_is_given_up_before_its_first_step_leaves_nothing_of_an_earlier_offer() {
        let memory = Memory::new(1 << 20);
        leave_and_give_up(Target::new(memory.clone())).await;
        assert_eq!(memory.used(), 0);

        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path(), StoreConfig::default()).expect("a store");
        leave_and_give_up(Target::Disk(store)).await;
        assert_eq!(crate::store::uploads(dir.path()).expect("a list"), []);
    }

    /// Notes what it is told, and publishes what is whole.
    #[derive(Debug)]
    struct Noting {
        phases: Arc<Mutex<Vec<Phase>>>,
        stored: Option<oneshot::Sender<Result<Published, StoreError>>>,
    }

    impl Recipient for Noting {
        const DOWNLOADS: bool = false;

        fn phase(&self, phase: Phase) {
            self.phases.lock().expect("sound").push(phase);
        }

        fn ready(&mut self, _have: Have, _base: Option<u64>) {}

        fn was_there(self, file: Published) {
            self.stored(Ok(file));
        }

        async fn complete(
            self,
            staging: &Staging<Self>,
            complete: TargetWhole,
            _size: u64,
            _skipped: u64,
        ) {
            staging.publish(complete, self, false).await;
        }

        fn stored(mut self, stored: Result<Published, StoreError>) {
            if let Some(tell) = self.stored.take() {
                tell.send(stored).expect("it waits");
            }
        }

        fn broken(self) {}
    }

    /// The phases of a file of this size that is received whole.
    async fn phases_of(size: usize, resume: bool) -> Vec<Phase> {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path(), StoreConfig::default()).expect("a store");
        let staging = Staging::new(Target::Disk(store));
        let (tell, told) = oneshot::channel();
        let phases = Arc::<Mutex<Vec<Phase>>>::default();
        let noting = Noting {
            phases: phases.clone(),
            stored: Some(tell),
        };
        let plan = Plan {
            path: "x".parse().expect("a path"),
            peer: "peer".into(),
            size: Some(size as u64),
            meta: Meta::default(),
            xattrs: XattrList::default(),
            if_exists: IfExists::Error,
            resume,
            tenant: None,
            dirs: Vec::new(),
            known: None,
            base: None,
            sums: None,
            small: false,
            leaving: None,
        };
        let bytes = vec![7; size];
        let hash = *blake3::hash(&bytes).as_bytes();
        let gathered = &mut staging.gathered();
        let mut incoming = Incoming::begin(&staging, plan, noting, First::Look(None), gathered);
        let room = incoming.room().acquire_owned().await.expect("room");
        incoming.write(Some(0), bytes.into(), room, gathered);
        incoming.finish(Some(size as u64), Some(hash), gathered);
        told.await.expect("told").expect("stored");
        let phases = phases.lock().expect("sound");
        phases.clone()
    }

    #[tokio::test]
    async fn a_file_is_received_then_checked_then_synced_then_stored() {
        use Phase::{Checking, Receiving, Storing, Syncing};
        // A large one is synced by itself, small ones by those that give them their names.
        let large = phases_of(4 << 20, false).await;
        assert_eq!(large, [Receiving, Checking, Syncing, Storing]);
        let resumable = phases_of(4 << 20, true).await;
        assert_eq!(resumable, [Checking, Receiving, Checking, Syncing, Storing]);
        let small = phases_of(1000, false).await;
        assert_eq!(small[..2], [Receiving, Checking]);
        assert!(
            [Syncing, Storing].contains(small.last().expect("more")),
            "{small:?}"
        );
    }
}
