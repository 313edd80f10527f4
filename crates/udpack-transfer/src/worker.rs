//! One incoming file on the blocking pool: what the disk must do, in order, off the async threads.
//!
//! A file owns no thread. Its steps queue here, bounded; a blocking job runs while there are steps and ends
//! when there are none, so a thousand slow uploads cost a thousand small queues and no idle threads.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::path::RelPath;
use crate::store::{Begin, Existing, IfExists, Meta, NewFile, Partial, Store, StoreError, Time};
use crate::wire::{Finish, Offer};

/// Chunks of one file that may wait for the disk.
const QUEUE: usize = 8;

/// What the disk found, for the lane to tell the client.
#[derive(Debug)]
pub(crate) enum Outcome {
    Ready {
        id: u64,
        have: Vec<(u64, u64, [u8; 32])>,
    },
    Done {
        id: u64,
        path: String,
        size: u64,
        hash: [u8; 32],
        same: bool,
    },
    Error {
        id: u64,
        code: &'static str,
        message: String,
        retry: bool,
    },
}

impl Outcome {
    pub(crate) fn failed(id: u64, error: &StoreError) -> Self {
        Self::Error {
            id,
            code: error.code(),
            message: error.to_string(),
            retry: error.retry(),
        }
    }
}

/// A lane's handle on one file. Dropping it before [`finish`](Self::finish) drops the file.
#[derive(Debug)]
pub(crate) struct Incoming {
    shared: Arc<Shared>,
    finished: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    room: Arc<Semaphore>,
    received: AtomicU64,
}

#[derive(Debug)]
struct Queue {
    steps: VecDeque<Step>,
    /// A blocking job is at work, and has the worker.
    running: bool,
    worker: Option<Worker>,
    dropped: bool,
}

#[derive(Debug)]
enum Step {
    Begin,
    Chunk(Bytes, OwnedSemaphorePermit),
    Finish(Finish),
}

impl Incoming {
    /// Begins a file: the first step looks at the name and the space.
    pub(crate) fn begin(
        store: Store,
        offer: Offer,
        path: RelPath,
        slot: OwnedSemaphorePermit,
        outcomes: mpsc::UnboundedSender<Outcome>,
    ) -> Self {
        let worker = Worker {
            id: offer.id,
            stage: Stage::New { store, path },
            offer,
            outcomes,
            since: Instant::now(),
            _slot: slot,
        };
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                steps: VecDeque::new(),
                running: false,
                worker: Some(worker),
                dropped: false,
            }),
            room: Arc::new(Semaphore::new(QUEUE)),
            received: AtomicU64::new(0),
        });
        let incoming = Self {
            shared,
            finished: false,
        };
        incoming.push(Step::Begin);
        incoming
    }

    /// Where a chunk must wait for its turn before it is [`write`](Self::write)n.
    pub(crate) fn room(&self) -> Arc<Semaphore> {
        self.shared.room.clone()
    }

    pub(crate) fn write(&self, bytes: Bytes, room: OwnedSemaphorePermit) {
        self.push(Step::Chunk(bytes, room));
    }

    /// Lets the file run to its end by itself; the outcome comes on the channel.
    pub(crate) fn finish(&mut self, finish: Finish) {
        self.finished = true;
        self.push(Step::Finish(finish));
    }

    /// Bytes received and written so far.
    pub(crate) fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
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
        if self.finished {
            return;
        }
        let worker = {
            let mut queue = self.shared.lock();
            queue.dropped = true;
            queue.steps.clear();
            queue.worker.take()
        };
        // Removing a large staging file takes time: not on this thread, where there is a choice.
        if let Some(worker) = worker
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(move || drop(worker));
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut worker: Worker) {
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
            let (id, outcomes) = (worker.id, worker.outcomes.clone());
            let done =
                std::panic::catch_unwind(AssertUnwindSafe(|| worker.step(step, &self.received)));
            if done.is_err() {
                tracing::error!("storing a file panicked");
                let message = "the server failed to store the file".to_owned();
                let _ = outcomes.send(Outcome::Error {
                    id,
                    code: "internal",
                    message,
                    retry: true,
                });
                worker.stage = Stage::Ended;
            }
        }
    }
}

/// What one file needs, wherever it runs.
#[derive(Debug)]
struct Worker {
    id: u64,
    offer: Offer,
    stage: Stage,
    outcomes: mpsc::UnboundedSender<Outcome>,
    since: Instant,
    _slot: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Stage {
    New {
        store: Store,
        path: RelPath,
    },
    Writing(Partial),
    /// A file of that name and size is there: compare instead of write.
    Comparing(Box<Comparing>),
    Ended,
}

#[derive(Debug)]
struct Comparing {
    existing: Existing,
    /// Its hash, once known.
    hash: Option<[u8; 32]>,
    received: blake3::Hasher,
}

impl Worker {
    fn step(&mut self, step: Step, received: &AtomicU64) {
        let stage = std::mem::replace(&mut self.stage, Stage::Ended);
        let next = match (step, stage) {
            (Step::Begin, Stage::New { store, path }) => self.begin(&store, &path),
            (Step::Chunk(bytes, _room), Stage::Writing(mut partial)) => {
                partial.write_at(partial.position(), &bytes).map(|()| {
                    received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    Stage::Writing(partial)
                })
            }
            (Step::Chunk(bytes, _room), Stage::Comparing(mut comparing)) => {
                comparing.received.update(&bytes);
                received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                if comparing.received.count() > comparing.existing.len() {
                    // It cannot be equal any more, and what was not declared has no other end.
                    let path = comparing.existing.path().clone();
                    Err(StoreError::Exists { path })
                } else {
                    Ok(Stage::Comparing(comparing))
                }
            }
            (Step::Finish(finish), Stage::Writing(partial)) => self.publish(partial, &finish),
            (Step::Finish(finish), Stage::Comparing(comparing)) => self.compare(*comparing, finish),
            // The file has ended; what was on its way is dropped.
            (Step::Begin | Step::Chunk(..) | Step::Finish(_), _) => return,
        };
        match next {
            Ok(stage) => self.stage = stage,
            Err(error) => {
                tracing::info!(code = error.code(), "upload refused: {error}");
                self.tell(Outcome::failed(self.id, &error));
            }
        }
    }

    fn begin(&self, store: &Store, path: &RelPath) -> Result<Stage, StoreError> {
        let existing = match store.begin(&NewFile {
            path,
            size: self.offer.size,
            if_exists: self.offer.if_exists,
            owner: None,
            tenant: None,
        })? {
            Begin::New(partial) => {
                if self.offer.resume {
                    self.tell(Outcome::Ready {
                        id: self.id,
                        have: Vec::new(),
                    });
                }
                return Ok(Stage::Writing(partial));
            }
            Begin::Exists(existing) => existing,
        };
        let len = existing.len();
        if self.offer.if_exists == IfExists::Skip {
            let hash = existing.hash(&mut |_| {})?;
            return Ok(self.done(existing.path().to_string(), len, hash, true));
        }
        if self.offer.size.is_some_and(|size| size != len) {
            return Err(StoreError::Exists { path: path.clone() });
        }
        let mut hash = None;
        if self.offer.resume {
            let known = existing.hash(&mut |_| {})?;
            hash = Some(known);
            self.tell(Outcome::Ready {
                id: self.id,
                have: vec![(0, len, known)],
            });
        }
        let received = blake3::Hasher::new();
        Ok(Stage::Comparing(Box::new(Comparing {
            existing,
            hash,
            received,
        })))
    }

    fn publish(&self, partial: Partial, finish: &Finish) -> Result<Stage, StoreError> {
        let meta = Meta {
            mtime: self.offer.meta.mtime.map(|secs| Time { secs, nanos: 0 }),
            mode: None,
        };
        let store = partial.store();
        let complete = partial.complete(finish.hash, finish.size.or(self.offer.size), meta)?;
        match store.publish(vec![complete]).pop() {
            Some(published) => published.map(|published| {
                self.done(
                    published.path,
                    published.size,
                    published.hash,
                    published.same,
                )
            }),
            None => Err(StoreError::Broken),
        }
    }

    /// The name was taken: is what the client has the same?
    fn compare(&self, comparing: Comparing, finish: Finish) -> Result<Stage, StoreError> {
        let Comparing {
            existing,
            hash,
            received,
        } = comparing;
        let path = existing.path().clone();
        let count = received.count();
        let size = finish.size.unwrap_or(count);
        // Nothing sent, but the hash told in `ready` given back: the client has compared for itself.
        let proved = count == 0 && hash.is_some() && finish.hash == hash && size == existing.len();
        if !proved {
            if count > 0 || hash.is_none() {
                let mut told = [self.offer.size, finish.size].into_iter().flatten();
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
                None => existing.hash(&mut |_| {})?,
            };
            if size != existing.len() || finish.hash.unwrap_or(got) != theirs {
                return Err(StoreError::Exists { path });
            }
        }
        let hash = match (hash, finish.hash) {
            (Some(hash), _) | (None, Some(hash)) => hash,
            (None, None) => *received.finalize().as_bytes(),
        };
        Ok(self.done(path.to_string(), size, hash, true))
    }

    fn done(&self, path: String, size: u64, hash: [u8; 32], same: bool) -> Stage {
        let secs = self.since.elapsed().as_secs_f64();
        tracing::info!(%path, bytes = size, secs, same, "stored");
        self.tell(Outcome::Done {
            id: self.id,
            path,
            size,
            hash,
            same,
        });
        Stage::Ended
    }

    fn tell(&self, outcome: Outcome) {
        // Nobody listens any more once the lane is gone; the file is stored all the same.
        let _ = self.outcomes.send(outcome);
    }
}
