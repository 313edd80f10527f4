//! One file on its way into the local store: what the disk must do, in order, off the async threads.
//!
//! As at the server, a file owns no thread: its steps queue here, bounded, and a blocking job runs while there
//! are any. A file belongs to its worker from the moment it is taken off the queue until its outcome is
//! reported, so that a lane may end at any time without losing one.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::lane::Asked;
use super::{Context, Job, lock};
use crate::base::path::RelPath;
use crate::local::error::TransferError;
use crate::store::{Begin, Complete, IfExists, Meta, NewFile, Partial, StoreError};
use crate::wire::{Have, RANGES};

/// Chunks of one file that may wait for the disk.
const QUEUE: usize = 8;
/// Whose uploads into the local store these are.
const OWNER: &str = "download";
/// Files from this size on are kept when they are interrupted, to be resumed.
const RESUMED: u64 = 1 << 20;

/// Events of a file's worker.
#[derive(Debug)]
pub(super) enum Note {
    /// The server has begun to send it.
    Started {
        index: usize,
        path: RelPath,
        size: u64,
    },
    /// Something of it was there, and is the server's.
    Resumed {
        index: usize,
        path: RelPath,
        bytes: u64,
        size: u64,
    },
    /// Nothing more happens here.
    Ended(Box<Ended>),
}

/// A file that has left its worker.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) job: Job,
    pub(super) end: End,
    pub(super) asked: Asked,
    /// Its place among the open files, given back when it is published or given up.
    pub(super) _slot: OwnedSemaphorePermit,
}

#[derive(Debug)]
pub(super) enum End {
    /// Whole and verified; it needs its name.
    Complete(Complete),
    /// The name was taken, by the `same` bytes or, with `skip`, by others.
    There {
        path: String,
        size: u64,
        hash: [u8; 32],
        same: bool,
    },
    /// The connection was lost; what there is of it is kept where that pays.
    Suspended,
    Failed(TransferError),
}

/// What to ask the server.
#[derive(Debug)]
pub(super) struct Wish {
    pub(super) remote: RelPath,
    pub(super) have: Have,
}

/// A lane's handle on one file. Dropping it before [`finish`](Self::finish) or [`end`](Self::end) drops the
/// file, as when the whole download is dropped.
#[derive(Debug)]
pub(super) struct Incoming {
    shared: Arc<Shared>,
    released: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    room: Arc<Semaphore>,
}

#[derive(Debug)]
struct Queue {
    steps: VecDeque<Step>,
    /// A blocking job is at work, and has the worker.
    running: bool,
    worker: Option<Box<Worker>>,
    dropped: bool,
}

#[derive(Debug)]
enum Step {
    Prepare(oneshot::Sender<Wish>),
    Open {
        size: u64,
        meta: Meta,
    },
    Chunk {
        offset: u64,
        bytes: Bytes,
        _room: OwnedSemaphorePermit,
    },
    Finish {
        size: u64,
        hash: [u8; 32],
    },
    End(End),
}

impl Incoming {
    /// Begins a file: looks at the name, the space, and what is there already. What to ask the server comes on
    /// the second value; nothing comes when there is nothing to ask.
    pub(super) fn prepare(
        context: Arc<Context>,
        job: Job,
        slot: OwnedSemaphorePermit,
        asked: Asked,
        notes: mpsc::UnboundedSender<Note>,
    ) -> (Self, oneshot::Receiver<Wish>) {
        let (tell, wish) = oneshot::channel();
        let worker = Worker {
            context,
            notes,
            stage: Stage::New,
            work: Some((job, slot, asked)),
        };
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                steps: VecDeque::new(),
                running: false,
                worker: Some(Box::new(worker)),
                dropped: false,
            }),
            room: Arc::new(Semaphore::new(QUEUE)),
        });
        let incoming = Self {
            shared,
            released: false,
        };
        incoming.push(Step::Prepare(tell));
        (incoming, wish)
    }

    /// The server begins to send.
    pub(super) fn open(&self, size: u64, meta: Meta) {
        self.push(Step::Open { size, meta });
    }

    /// Where a chunk must wait for its turn before it is [`write`](Self::write)n.
    pub(super) fn room(&self) -> Arc<Semaphore> {
        self.shared.room.clone()
    }

    pub(super) fn write(&self, offset: u64, bytes: Bytes, room: OwnedSemaphorePermit) {
        self.push(Step::Chunk {
            offset,
            bytes,
            _room: room,
        });
    }

    /// Lets the file run to its end by itself.
    pub(super) fn finish(mut self, size: u64, hash: [u8; 32]) {
        self.released = true;
        self.push(Step::Finish { size, hash });
    }

    /// Ends the file with this result and drops unwritten bytes.
    pub(super) fn end(mut self, end: End) {
        self.released = true;
        self.shared.lock().steps.clear();
        self.push(Step::End(end));
    }

    fn push(&self, step: Step) {
        let mut queue = self.shared.lock();
        queue.steps.push_back(step);
        if !queue.running
            && let Some(worker) = queue.worker.take()
        {
            queue.running = true;
            let shared = self.shared.clone();
            tokio::task::spawn_blocking(move || shared.run(worker));
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let worker = {
            let mut queue = self.shared.lock();
            queue.dropped = true;
            queue.steps.clear();
            queue.worker.take()
        };
        // Suspending or removing a file takes time: not on this thread, where there is a choice.
        if let Some(worker) = worker
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(move || drop(worker));
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    fn run(&self, mut worker: Box<Worker>) {
        loop {
            let step = {
                let mut queue = self.lock();
                if queue.dropped {
                    break;
                }
                match queue.steps.pop_front() {
                    Some(step) => step,
                    None => {
                        queue.running = false;
                        queue.worker = Some(worker);
                        return;
                    }
                }
            };
            let done = std::panic::catch_unwind(AssertUnwindSafe(|| worker.step(step)));
            if done.is_err() {
                tracing::error!("storing a file panicked");
                let error = TransferError::Protocol("storing the file failed".to_owned());
                worker.stage = Stage::Ended;
                worker.ended(End::Failed(error));
            }
        }
    }
}

/// What one file needs, wherever it runs.
#[derive(Debug)]
struct Worker {
    context: Arc<Context>,
    notes: mpsc::UnboundedSender<Note>,
    stage: Stage,
    /// `None` once the file has left.
    work: Option<(Job, OwnedSemaphorePermit, Asked)>,
}

#[derive(Debug)]
enum Stage {
    New,
    /// Requested, with the ranges that are here.
    Waiting(Partial),
    /// A file has the name: is it the same?
    Proving {
        path: String,
        len: u64,
        hash: [u8; 32],
    },
    Writing {
        partial: Partial,
        size: u64,
        meta: Meta,
    },
    Ended,
}

impl Worker {
    fn step(&mut self, step: Step) {
        let stage = std::mem::replace(&mut self.stage, Stage::Ended);
        if let Step::End(end) = step {
            // A healthy partial that is dropped is kept where it can be resumed. First that, then the news: the
            // file may be begun again at once.
            match (stage, &end) {
                (Stage::Waiting(partial) | Stage::Writing { partial, .. }, End::Failed(error))
                    if !error.retry() =>
                {
                    partial.discard()
                }
                (stage, _) => drop(stage),
            }
            return self.ended(end);
        }
        let Some((job, _, _)) = &mut self.work else {
            // It has its outcome; chunks under way are dropped.
            return;
        };
        let next = match (step, stage) {
            (Step::Prepare(tell), Stage::New) => prepare(&self.context, job, tell),
            (Step::Open { size, meta }, stage) => {
                if !job.started {
                    job.started = true;
                    let name = job.wanted.local.as_str();
                    self.context.under_way.begin(job.index, name, size);
                    let _ = self.notes.send(Note::Started {
                        index: job.index,
                        path: job.wanted.local.clone(),
                        size,
                    });
                }
                self.context.resize(job, size);
                open(&self.context, job, stage, size, meta)
            }
            (
                Step::Chunk { offset, bytes, .. },
                Stage::Writing {
                    partial,
                    size,
                    meta,
                },
            ) => {
                let skipped = offset.saturating_sub(partial.position());
                write(&self.context, job, partial, size, offset, &bytes).map(|partial| {
                    skip(&self.notes, job, skipped, size);
                    Next::Stage(Stage::Writing {
                        partial,
                        size,
                        meta,
                    })
                })
            }
            // It would have come without bytes if it were the same.
            (Step::Chunk { .. }, Stage::Proving { path, len, hash }) => {
                differs(&self.context, job, path, len, hash)
            }
            (
                Step::Finish { size: told, hash },
                Stage::Writing {
                    partial,
                    size,
                    meta,
                },
            ) => {
                let skipped = size.saturating_sub(partial.position());
                complete(partial, size, told, hash, meta).inspect(|_| {
                    skip(&self.notes, job, skipped, size);
                })
            }
            (Step::Finish { hash: theirs, .. }, Stage::Proving { path, len, hash }) => {
                if theirs == hash {
                    Ok(Next::End(End::There {
                        path,
                        size: len,
                        hash,
                        same: true,
                    }))
                } else {
                    differs(&self.context, job, path, len, hash)
                }
            }
            (Step::Prepare(_) | Step::Chunk { .. } | Step::Finish { .. } | Step::End(_), stage) => {
                Ok(Next::Stage(stage))
            }
        };
        match next {
            Ok(Next::Stage(stage)) => self.stage = stage,
            Ok(Next::End(end)) => self.ended(end),
            Err(error) => self.ended(End::Failed(TransferError::Store(Arc::new(error)))),
        }
    }

    /// Reports the file's end, once.
    fn ended(&mut self, end: End) {
        if let Some((job, slot, asked)) = self.work.take() {
            let _ = self.notes.send(Note::Ended(Box::new(Ended {
                job,
                end,
                asked,
                _slot: slot,
            })));
        }
    }
}

/// The server skipped the ranges that are here.
fn skip(notes: &mpsc::UnboundedSender<Note>, job: &mut Job, bytes: u64, size: u64) {
    if bytes > 0 && job.resumed == 0 {
        let _ = notes.send(Note::Resumed {
            index: job.index,
            path: job.wanted.local.clone(),
            bytes,
            size,
        });
    }
    job.resumed = job.resumed.saturating_add(bytes);
}

#[allow(
    clippy::large_enum_variant,
    reason = "it is taken apart where it is made"
)]
enum Next {
    Stage(Stage),
    End(End),
}

fn begin(context: &Context, job: &Job, size: Option<u64>) -> Result<Begin, StoreError> {
    let resumed = size.is_none_or(|size| size >= RESUMED);
    context.store.begin(&NewFile {
        path: &job.wanted.local,
        size,
        if_exists: context.if_exists,
        owner: resumed.then_some(OWNER),
        tenant: None,
        dirs: &[],
        whole: false,
    })
}

/// What the partial holds, as sent to the server.
fn have(partial: &mut Partial) -> Result<Have, StoreError> {
    if !partial.resumable() {
        return Ok(Have::new());
    }
    let ranges = partial.have(&mut |_| {})?;
    let ranges = ranges.iter().take(RANGES);
    Ok(ranges
        .map(|range| (range.off, range.len, range.hash))
        .collect())
}

fn prepare(context: &Context, job: &Job, tell: oneshot::Sender<Wish>) -> Result<Next, StoreError> {
    let (stage, have) = match begin(context, job, job.wanted.size)? {
        Begin::New(mut partial) => {
            let have = have(&mut partial)?;
            (Stage::Waiting(partial), have)
        }
        Begin::Exists(existing) => {
            let len = existing.len();
            let path = existing.path().as_str().to_owned();
            let other_size = job.wanted.size.is_some_and(|size| size != len);
            if other_size && context.if_exists != IfExists::Skip {
                return Err(exists(job));
            }
            let hash = existing.hash(&mut |_| {})?;
            if other_size {
                return differs(context, job, path, len, hash);
            }
            (Stage::Proving { path, len, hash }, vec![(0, len, hash)])
        }
    };
    let remote = job.wanted.remote.clone();
    // The lane is gone: its end arrives as the next step.
    let _ = tell.send(Wish { remote, have });
    Ok(Next::Stage(stage))
}

fn open(
    context: &Context,
    job: &Job,
    stage: Stage,
    size: u64,
    meta: Meta,
) -> Result<Next, StoreError> {
    let partial = match stage {
        Stage::Waiting(partial) => partial,
        Stage::Proving { path, len, hash } if len != size => {
            return differs(context, job, path, len, hash);
        }
        stage => return Ok(Next::Stage(stage)),
    };
    let meta = meta.kept(context.preserve, context.umask);
    if job.wanted.size.is_none_or(|wanted| wanted == size) {
        return Ok(Next::Stage(Stage::Writing {
            partial,
            size,
            meta,
        }));
    }
    // It is not as large as it was listed: what is reserved, and what there is of it, must be looked at anew.
    drop(partial);
    match begin(context, job, Some(size))? {
        Begin::New(mut partial) => {
            have(&mut partial)?;
            Ok(Next::Stage(Stage::Writing {
                partial,
                size,
                meta,
            }))
        }
        Begin::Exists(_) => Err(exists(job)),
    }
}

fn write(
    context: &Context,
    job: &mut Job,
    mut partial: Partial,
    size: u64,
    offset: u64,
    bytes: &[u8],
) -> Result<Partial, StoreError> {
    let len = bytes.len() as u64;
    let got = offset.saturating_add(len);
    if got > size {
        partial.discard();
        return Err(StoreError::SizeMismatch {
            expected: size,
            got,
        });
    }
    if let Err(error) = partial.write_at(offset, bytes) {
        if matches!(error, StoreError::BadOffset { .. }) {
            partial.discard();
        }
        return Err(error);
    }
    job.received = job.received.saturating_add(len);
    context.moved.fetch_add(len, Ordering::Relaxed);
    // The last byte counts only when the file is stored.
    context.count(job, partial.position().min(size.saturating_sub(1)));
    if let Some(checkpoint) = partial.checkpoint() {
        tokio::task::spawn_blocking(move || checkpoint.run());
    }
    Ok(partial)
}

fn complete(
    partial: Partial,
    size: u64,
    told: u64,
    hash: [u8; 32],
    meta: Meta,
) -> Result<Next, StoreError> {
    if told != size {
        partial.discard();
        return Err(StoreError::SizeMismatch {
            expected: size,
            got: told,
        });
    }
    let complete = partial.complete(Some(hash), Some(size), meta)?;
    Ok(Next::End(End::Complete(complete)))
}

/// Another file has the name: with `skip` it stays, and that is all.
fn differs(
    context: &Context,
    job: &Job,
    path: String,
    size: u64,
    hash: [u8; 32],
) -> Result<Next, StoreError> {
    match context.if_exists {
        IfExists::Skip => Ok(Next::End(End::There {
            path,
            size,
            hash,
            same: false,
        })),
        _ => Err(exists(job)),
    }
}

fn exists(job: &Job) -> StoreError {
    StoreError::Exists {
        path: job.wanted.local.clone(),
    }
}
