//! The recipient of a downloaded file: updates its counters, tells its lane, and reports its outcome.
//!
//! A file belongs to its worker from the moment it is taken off the queue until its outcome is reported, so that a lane
//! may end at any time without losing one.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::lane::Asked;
use super::{Arrived, Context, Job};
use crate::base::path::RelPath;
use crate::base::sums::Sums;
use crate::local::error::TransferError;
use crate::staging::file::{First, Gathered, Incoming, Plan, Recipient};
use crate::staging::publisher::Staging;
use crate::staging::target::TargetWhole;
use crate::store::{Meta, Published, StoreError, XattrList};
use crate::wire::Have;

/// The owner of a download's files in the local store.
const OWNER: &str = "download";
/// Files from this size on are kept when they are interrupted, to be resumed.
const RESUMED: u64 = 1 << 20;

/// The permission bits that most files have at a server, before the umask.
const USUAL_MODE: u32 = 0o644;

/// Events of a file's worker.
#[derive(Debug)]
pub(super) enum Note {
    /// The server has begun to send it.
    Started {
        index: usize,
        path: RelPath,
        size: u64,
    },
    /// A part of it existed here and equals the server's.
    Resumed {
        index: usize,
        path: RelPath,
        bytes: u64,
        size: u64,
    },
    /// The worker has ended.
    Ended(Box<Ended>),
}

/// A file that has left its worker.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) job: Job,
    pub(super) end: End,
    pub(super) asked: Asked,
    /// Its place among the open files, returned when its outcome is reported.
    pub(super) slot: OwnedSemaphorePermit,
}

#[derive(Debug)]
pub(super) enum End {
    /// The file is stored, or an existing one was kept.
    Arrived(Arrived),
    /// The connection was lost; the data of larger files is kept.
    Suspended,
    Failed(TransferError),
}

/// The request to send to the server.
#[derive(Debug)]
pub(super) struct Wish {
    pub(super) remote: RelPath,
    pub(super) have: Have,
}

/// Begins a file: checks the name, the space, and existing data. The second value receives the request to send to the
/// server; nothing if none is needed.
pub(super) fn prepare(
    context: &Arc<Context>,
    job: Job,
    slot: OwnedSemaphorePermit,
    asked: Asked,
    notes: mpsc::UnboundedSender<Note>,
    sums: Option<Sums>,
    gathered: &mut Gathered<Arriving>,
) -> (Incoming<Arriving>, oneshot::Receiver<Wish>) {
    let mut job = job;
    job.copied = 0;
    if let Some(sums) = &sums {
        // The size of what is put together, unless the server says another one when it begins to send.
        job.wanted.size = Some(sums.end());
    }
    let (tell, wish) = oneshot::channel();
    let plan = Plan {
        path: job.wanted.local.clone(),
        peer: OWNER.into(),
        size: job.wanted.size,
        // The usual metadata; the server sends the file's own when it begins to send.
        meta: Meta {
            mtime: None,
            mode: context.umask.map(|umask| USUAL_MODE & !umask),
        },
        if_exists: context.if_exists,
        resume: job.wanted.size.is_none_or(is_resumed),
        tenant: None,
        dirs: Vec::new(),
        xattrs: XattrList::default(),
        known: None,
        base: None,
        sums,
        small: false,
        leaving: None,
    };
    let arriving = Arriving {
        context: context.clone(),
        notes,
        size: 0,
        tell: Some(tell),
        work: Some((job, slot, asked)),
    };
    let first = First::Look(None);
    let incoming = Incoming::begin(&context.staging, plan, arriving, first, gathered);
    (incoming, wish)
}

/// Whether a file of this size is kept when it is interrupted.
pub(super) fn is_resumed(size: u64) -> bool {
    size >= RESUMED
}

/// One file that is being stored.
#[derive(Debug)]
pub(super) struct Arriving {
    context: Arc<Context>,
    notes: mpsc::UnboundedSender<Note>,
    /// The size that the server reported, in bytes.
    size: u64,
    tell: Option<oneshot::Sender<Wish>>,
    /// `None` once the file has ended.
    work: Option<(Job, OwnedSemaphorePermit, Asked)>,
}

impl Recipient for Arriving {
    const DOWNLOADS: bool = true;

    fn opened(&mut self, size: u64, xattrs: Option<u32>) {
        self.size = size;
        let Some((job, ..)) = &mut self.work else {
            return;
        };
        job.xattrs = xattrs;
        if !job.started {
            job.started = true;
            let name = job.wanted.local.as_str();
            self.context.totals.begin(job.index, name, size);
            let _ = self.notes.send(Note::Started {
                index: job.index,
                path: job.wanted.local.clone(),
                size,
            });
        }
        self.context.resize(job, size);
    }

    fn ready(&mut self, have: Have, _base: Option<u64>) {
        if let (Some(tell), Some((job, ..))) = (self.tell.take(), &self.work) {
            let remote = job.wanted.remote.clone();
            // If the lane has ended, it ends the file next.
            let _ = tell.send(Wish { remote, have });
        }
    }

    fn wrote(&mut self, skipped: u64, len: u64, position: u64) {
        if let Some((job, ..)) = &mut self.work {
            job.received = job.received.saturating_add(len);
            self.context.totals.moved(len);
            // The last byte counts only when the file is stored.
            let last = self.size.saturating_sub(1);
            self.context.count(job, position.min(last));
        }
        self.skip(skipped);
    }

    fn filled(&mut self, bytes: u64) {
        if let Some((job, ..)) = &mut self.work {
            job.copied = bytes;
        }
    }

    fn hole(&mut self, skipped: u64, len: u64, position: u64) {
        if let Some((job, ..)) = &mut self.work {
            job.holes = job.holes.saturating_add(len);
        }
        self.wrote(skipped, 0, position);
    }

    fn was_there(self, file: Published) {
        let skipped = !file.same;
        self.ended(End::Arrived(Arrived {
            skipped,
            sync: None,
            ..file.into()
        }));
    }

    async fn complete(
        mut self,
        staging: &Staging<Self>,
        complete: TargetWhole,
        _size: u64,
        skipped: u64,
    ) {
        self.skip(skipped);
        staging.publish(complete, self, false).await;
    }

    fn stored(self, stored: Result<Published, StoreError>) {
        self.ended(match stored {
            Ok(published) => End::Arrived(published.into()),
            Err(error) => End::Failed(TransferError::Store(Arc::new(error))),
        });
    }

    fn broken(mut self) {
        self.fail();
    }
}

impl Arriving {
    /// Reports the file's end.
    pub(super) fn ended(mut self, end: End) {
        self.end(end);
    }

    fn end(&mut self, end: End) {
        self.tell = None;
        if let Some((job, slot, asked)) = self.work.take() {
            let _ = self.notes.send(Note::Ended(Box::new(Ended {
                job,
                end,
                asked,
                slot,
            })));
        }
    }

    fn fail(&mut self) {
        let error = TransferError::Protocol("storing the file failed".to_owned());
        self.end(End::Failed(error));
    }

    /// The server skipped the ranges that are here.
    fn skip(&mut self, bytes: u64) {
        let Some((job, ..)) = &mut self.work else {
            return;
        };
        if bytes > 0 && job.resumed == 0 && job.copied == 0 {
            let _ = self.notes.send(Note::Resumed {
                index: job.index,
                path: job.wanted.local.clone(),
                bytes,
                size: self.size,
            });
        }
        job.resumed = job.resumed.saturating_add(bytes);
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail();
        }
    }
}
