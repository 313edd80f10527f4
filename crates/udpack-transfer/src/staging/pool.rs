//! The threads on which small files of a store take turns. With a thread for each, ten thousand files would contend for
//! the same locks.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt as _;

use super::file::{Recipient, Shared};

/// Threads for each core: some of them wait for the disk.
const THREADS_PER_CORE: usize = 4;
/// The number of waiting files for which one more thread pays.
const FILES_PER_THREAD: usize = 32;
/// The most small files that a lane submits at once.
const GATHERED: usize = 32;
const FEWEST_THREADS: usize = 8;
const MOST_THREADS: usize = 64;

/// The threads on which small files take turns.
#[derive(Debug)]
pub(super) struct Pool<R> {
    most: usize,
    ready: Mutex<Ready<R>>,
}

#[derive(Debug)]
struct Ready<R> {
    files: VecDeque<Arc<Shared<R>>>,
    threads: usize,
}

impl<R: Recipient> Pool<R> {
    pub(super) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            most: (cores * THREADS_PER_CORE).clamp(FEWEST_THREADS, MOST_THREADS),
            ready: Mutex::new(Ready {
                files: VecDeque::new(),
                threads: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ready<R>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues files, whose steps are executed in turn.
    fn submit(self: &Arc<Self>, files: impl IntoIterator<Item = Arc<Shared<R>>>) {
        let mut ready = self.lock();
        ready.files.extend(files);
        self.start_threads(ready);
    }

    /// Starts threads while there are more waiting files than the running threads can soon process.
    fn start_threads(self: &Arc<Self>, mut ready: MutexGuard<'_, Ready<R>>) {
        let wanted = ready.files.len().div_ceil(FILES_PER_THREAD).min(self.most);
        let more = wanted.saturating_sub(ready.threads);
        ready.threads += more;
        drop(ready);
        for _ in 0..more {
            let pool = self.clone();
            tokio::task::spawn_blocking(move || pool.run());
        }
    }

    /// Runs work that may wait for the disk on a thread of the pool. Another thread takes its place meanwhile.
    pub(super) fn aside(self: &Arc<Self>, wait: impl FnOnce()) {
        /// Runs after a panic, too.
        struct Back<'a, R: Recipient>(&'a Pool<R>);
        impl<R: Recipient> Drop for Back<'_, R> {
            fn drop(&mut self) {
                self.0.lock().threads += 1;
            }
        }
        let mut ready = self.lock();
        ready.threads = ready.threads.saturating_sub(1);
        let _back = Back(self);
        self.start_threads(ready);
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

/// Small files of one lane that have steps and are not submitted yet. Files that arrived together are submitted in one
/// call, and each file's steps are executed in one turn. Dropping the value submits them.
#[derive(Debug)]
pub(crate) struct Gathered<R: Recipient> {
    pool: Arc<Pool<R>>,
    files: Vec<Arc<Shared<R>>>,
}

impl<R: Recipient> Gathered<R> {
    pub(super) fn new(pool: &Arc<Pool<R>>) -> Self {
        Self {
            pool: pool.clone(),
            files: Vec::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Submits the files. Must be called before waiting for anything.
    pub(crate) fn hand_over(&mut self) {
        if !self.files.is_empty() {
            self.pool.submit(self.files.drain(..));
        }
    }

    pub(super) fn add(&mut self, file: Arc<Shared<R>>) {
        self.files.push(file);
        if self.files.len() >= GATHERED {
            self.hand_over();
        }
    }
}

impl<R: Recipient> Drop for Gathered<R> {
    fn drop(&mut self) {
        if tokio::runtime::Handle::try_current().is_ok() {
            self.hand_over();
        }
    }
}
