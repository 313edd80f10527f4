//! [`Staging`]: receives the files of one server or one download, and publishes them in batches.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt as _;

use super::file::Recipient;
use super::pool::{Gathered, Pool};
use super::target::{Target, TargetWhole};
use crate::base::phase::Phase;

/// The most files that are published together.
const BATCH: usize = 1024;

/// Receives files into one target, and publishes complete ones. Files that must be synced are collected, so that one
/// sync serves all files that arrived during the previous one. A handle.
#[derive(Debug)]
pub(crate) struct Staging<R> {
    pub(super) target: Target,
    waiting: Arc<Mutex<Waiting<R>>>,
    pub(super) pool: Arc<Pool<R>>,
}

impl<R> Clone for Staging<R> {
    fn clone(&self) -> Self {
        Self {
            target: self.target.clone(),
            waiting: self.waiting.clone(),
            pool: self.pool.clone(),
        }
    }
}

#[derive(Debug)]
struct Waiting<R> {
    publications: Vec<Publication<R>>,
    /// Whether a thread is publishing and will take added files.
    busy: bool,
}

#[derive(Debug)]
struct Publication<R> {
    // Declared before the recipient, so that the recipient is dropped only after the file is published.
    complete: TargetWhole,
    recipient: R,
}

impl<R: Recipient> Staging<R> {
    pub(crate) fn new(target: Target) -> Self {
        Self {
            target,
            waiting: Arc::new(Mutex::new(Waiting {
                publications: Vec::new(),
                busy: false,
            })),
            pool: Arc::new(Pool::new()),
        }
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Collects small files of one lane, to submit them together.
    pub(crate) fn gathered(&self) -> Gathered<R> {
        Gathered::new(&self.pool)
    }

    /// Publishes a file and tells its recipient. Blocks while a store syncs, unless another thread is publishing and
    /// takes this file as well. `pooled` tells whether this thread belongs to the pool.
    pub(crate) async fn publish(&self, complete: TargetWhole, recipient: R, pooled: bool) {
        let waits = complete.waits();
        recipient.phase(match waits {
            true => Phase::Syncing,
            false => Phase::Storing,
        });
        let publication = Publication {
            complete,
            recipient,
        };
        if !waits {
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

    /// Adds a file to the waiting ones; returns whether a running thread will publish it.
    fn joins(&self, publication: Publication<R>) -> bool {
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
            let publishing = AssertUnwindSafe(|| self.run(batch).now_or_never());
            if std::panic::catch_unwind(publishing).is_err() {
                tracing::error!("publishing files panicked");
            }
            waiting = self.waiting();
        }
    }

    async fn run(&self, batch: Vec<Publication<R>>) {
        let (files, recipients): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .map(|publication| (publication.complete, publication.recipient))
            .unzip();
        let published = self.target.publish(files).await;
        for (recipient, published) in recipients.into_iter().zip(published) {
            recipient.stored(published);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting<R>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
