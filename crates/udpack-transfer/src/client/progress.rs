//! Events and progress of uploads and downloads.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior};
use udpack::{Transport, TransportReason};

use crate::client::link::{LinkEvent, LinkEvents};
use crate::local::error::TransferError;
use crate::store::{OtherTime, Synced};

/// The shortest time between two reports of progress.
const REPORT: Duration = Duration::from_millis(100);
/// The most events that are taken from the tasks at once.
const GATHERED: usize = 64;

/// An event of an upload or a download.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A file has been offered to the server.
    Started {
        /// The index of the source, counted from 0.
        index: usize,
        /// The name at the server.
        path: String,
        /// Its size in bytes; 0 if it is known only at the end.
        size: u64,
    },
    /// The server already has bytes of a file, from an earlier upload or connection.
    Resumed {
        /// The index of the source, counted from 0.
        index: usize,
        /// The name at the server.
        path: String,
        /// Bytes that were proved equal there and are not sent again.
        bytes: u64,
        /// The file's size in bytes; 0 for what tells only at its end.
        size: u64,
    },
    /// The progress of the whole transfer.
    Progress(Progress),
    /// A file is stored: complete and verified, and durable as [`Outcome::sync`] says.
    Done(Outcome),
    /// A file has failed.
    Failed {
        /// The index of the source, counted from 0.
        index: usize,
        /// The name that it was meant to get.
        path: String,
        /// The reason.
        error: TransferError,
    },
    /// The connection is lost; the next attempt begins after the delay.
    Reconnecting {
        /// The number of the attempt, counted from 1 since the last progress.
        attempt: u32,
        /// The time until the attempt.
        delay: Duration,
        /// The last error.
        reason: String,
    },
    /// The connection is back.
    Connected,
    /// One of several paths is lost; it is tried again after the delay, and the others go on.
    PathLost {
        /// Which one.
        path: String,
        /// How long until then.
        delay: Duration,
        /// What went wrong last.
        reason: String,
    },
    /// One of several paths is there, for the first time or again.
    PathConnected {
        /// Which one.
        path: String,
    },
    /// The connection uses another transport than the one before it, or the first connection does not use QUIC.
    TransportChanged {
        /// The new transport.
        to: Transport,
        /// The reason.
        why: TransportReason,
    },
}

/// The progress of a transfer. Acknowledged bytes and files never decrease. The bytes reach the total only with the
/// last `done`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes that the server has acknowledged, including those of files it had already.
    pub acked: u64,
    /// Bytes of all files listed so far that have not failed.
    pub total: u64,
    /// Number of files that are done or have failed.
    pub files_done: usize,
    /// Number of files listed so far.
    pub files: usize,
    /// Whether all files are listed. Then the totals grow no more, except for sources that are not
    /// [`sized`](Self::sized).
    pub listed: bool,
    /// Whether the size of every listed file is known. A source that is read to its end, such as standard input, counts
    /// in `total` only as far as it was read.
    pub sized: bool,
    /// Bytes that were transferred in this run and have arrived, including repetitions, without bytes that the other
    /// side had already. The transfer rate is the rate of these.
    pub moved: u64,
}

/// A file that is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// The index of the source, counted from 0.
    pub index: usize,
    /// The name that the server gave it.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// BLAKE3 of its bytes, computed on both sides.
    pub hash: [u8; 32],
    /// Bytes of the file that were sent, including repetitions; 0 if the server had it already.
    pub sent: u64,
    /// Bytes that were stored by an earlier upload or connection, and proved equal.
    pub resumed: u64,
    /// Bytes that the receiver copied from an older version or another file of its own: see
    /// [`Uploader::delta`](crate::Uploader::delta).
    pub copied: u64,
    /// Bytes of holes, which were told and not sent.
    pub holes: u64,
    /// Its source changed while it was read: what is stored may be none of its states. See
    /// [`Uploader::may_tear`](crate::Uploader::may_tear).
    pub torn: bool,
    /// Whether an identical file was stored already.
    pub same: bool,
    /// Whether [`IfExists::Skip`](crate::IfExists::Skip) kept a stored file: `size` and `hash` are those of that file.
    /// Its bytes differ from the source's, or could not be compared, as for a reader that is not read.
    pub skipped: bool,
    /// How it was synced to the server's disk, if the server tells.
    pub sync: Option<Synced>,
    /// Its modification time, if the file system cannot store the intended one. A loss of nanoseconds is not reported.
    pub other_time: Option<OtherTime>,
    /// Which of its extended attributes the receiver does not have: nothing of a file that was there already.
    pub lost_xattrs: LostXattrs,
    /// From the first offer to `done`.
    pub elapsed: Duration,
}

/// Extended attributes that were to be copied and were not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum LostXattrs {
    /// All were.
    #[default]
    None,
    /// So many were not stored: the receiver takes none of their kind, or its file system does not hold them.
    Some(u32),
    /// The server does not give those that were asked for. It is not known whether the file has any.
    Withheld,
}

impl LostXattrs {
    /// Of so many so few were stored.
    pub(crate) fn of(all: u32, stored: u32) -> Self {
        match all.saturating_sub(stored) {
            0 => Self::None,
            lost => Self::Some(lost),
        }
    }
}

/// The progress of one file that has begun and has no outcome yet.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileProgress {
    /// The index of the source or of the wanted file, counted from 0.
    pub index: usize,
    /// The name that it will get.
    pub path: String,
    /// Its size in bytes; if it is known only at the end, the bytes read so far.
    pub size: u64,
    /// Bytes that are acknowledged or written. The last byte counts only with the outcome.
    pub bytes: u64,
}

/// The progress of a transfer and its files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Moving {
    /// The whole transfer.
    pub whole: Progress,
    /// Each file that has begun and has no outcome, in the order of the sources; at most some hundreds.
    pub files: Vec<FileProgress>,
}

/// Watches the progress of an [`Upload`](crate::Upload) or a [`Download`](crate::Download), for a program that displays
/// it: `let mut watch = upload.watch();`, moved to the task that draws.
///
/// # Drop
/// Ends the watching; the transfer continues.
pub struct Watch {
    look: Box<dyn Fn() -> Option<Moving> + Send>,
    ticker: Interval,
    told: Option<Moving>,
    over: bool,
}

impl Watch {
    /// Must be called within a tokio runtime.
    fn new(look: impl Fn() -> Option<Moving> + Send + 'static) -> Self {
        let mut ticker = tokio::time::interval(REPORT);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            look: Box::new(look),
            ticker,
            told: None,
            over: false,
        }
    }

    /// The progress, as soon as it differs from the last one returned, at most ten times a second; values between are
    /// skipped. `None` when every file has its outcome, and when the transfer was dropped. The program must take the
    /// transfer's events meanwhile: without that the transfer does not continue.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Moving> {
        while !self.over {
            self.ticker.tick().await;
            let Some(now) = (self.look)() else {
                break;
            };
            self.over = now.whole.listed && now.whole.files_done >= now.whole.files;
            if self.told.as_ref() != Some(&now) {
                self.told = Some(now.clone());
                return Some(now);
            }
        }
        self.over = true;
        None
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("told", &self.told)
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}

/// The counters of one transfer, and its files that have begun.
///
/// The transfer keeps two numbers of each file: its size, which is its part of the total, and its acknowledged bytes,
/// which never exceed the size.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    total: AtomicU64,
    acked: AtomicU64,
    moved: AtomicU64,
    files: AtomicUsize,
    files_done: AtomicUsize,
    /// Files without an outcome whose size is known only at their end.
    unsized_files: AtomicUsize,
    listed: AtomicBool,
    over: AtomicBool,
    under_way: Mutex<BTreeMap<usize, FileProgress>>,
}

impl Totals {
    /// Counts another file, whose size follows by [`add`](Self::add).
    pub(crate) fn list(&self) {
        self.files.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds the size of a file, in bytes. `sized` tells whether it is known before the file's end.
    pub(crate) fn add(&self, size: u64, sized: bool) {
        self.total.fetch_add(size, Ordering::Relaxed);
        if !sized {
            self.unsized_files.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Called when all files are listed.
    pub(crate) fn listed(&self) {
        self.listed.store(true, Ordering::Release);
    }

    /// Called when a file has begun.
    pub(crate) fn begin(&self, index: usize, path: &str, size: u64) {
        let begun = FileProgress {
            index,
            path: path.to_owned(),
            size,
            bytes: 0,
        };
        self.lock().insert(index, begun);
    }

    /// Changes the size of a file. Progress never decreases: acknowledged bytes of a file that has shrunk remain
    /// acknowledged.
    pub(crate) fn resize(&self, index: usize, size: &mut u64, acked: u64, new: u64) {
        let new = new.max(acked);
        self.total.fetch_add(new, Ordering::Relaxed);
        self.total.fetch_sub(*size, Ordering::Relaxed);
        *size = new;
        if let Some(file) = self.lock().get_mut(&index) {
            file.size = new;
        }
    }

    /// Records that at least this many bytes of a file have arrived.
    pub(crate) fn ack(&self, index: usize, acked: &mut u64, bytes: u64) {
        if bytes > *acked {
            self.acked.fetch_add(bytes - *acked, Ordering::Relaxed);
            *acked = bytes;
            if let Some(file) = self.lock().get_mut(&index) {
                file.bytes = bytes;
            }
        }
    }

    /// Records that this many bytes were transferred, including repetitions.
    pub(crate) fn moved(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Called when a file has its outcome.
    pub(crate) fn end(&self, index: usize, sized: bool) {
        if !sized {
            self.unsized_files.fetch_sub(1, Ordering::Relaxed);
        }
        self.lock().remove(&index);
        self.files_done.fetch_add(1, Ordering::Relaxed);
    }

    /// Called when a file has failed. Its unacknowledged bytes leave the total, so that the rest can reach 100 %.
    pub(crate) fn fail(&self, index: usize, sized: bool, (size, acked): (u64, u64)) {
        self.total
            .fetch_sub(size.saturating_sub(acked), Ordering::Relaxed);
        self.end(index, sized);
    }

    /// Called when the transfer has ended early.
    pub(crate) fn close(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn progress(&self) -> Progress {
        // Read first: if it is true, the totals read after it are final.
        let listed = self.listed.load(Ordering::Acquire);
        let files_done = self.files_done.load(Ordering::Relaxed);
        let acked = self.acked.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        Progress {
            acked: acked.min(total),
            total,
            files_done,
            files: self.files.load(Ordering::Relaxed),
            listed,
            sized: self.unsized_files.load(Ordering::Relaxed) == 0,
            moved: self.moved.load(Ordering::Relaxed),
        }
    }

    /// Returns a watcher; it ends when the transfer ends or is dropped.
    pub(crate) fn watch(self: &Arc<Self>) -> Watch {
        let totals = Arc::downgrade(self);
        Watch::new(move || {
            let totals = totals.upgrade()?;
            if totals.over.load(Ordering::Relaxed) {
                return None;
            }
            let files = totals.lock().values().cloned().collect();
            let whole = totals.progress();
            Some(Moving { whole, files })
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, FileProgress>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// Whether every file has its outcome.
    fn is_complete(&self) -> bool {
        let bytes = self.total > 0 && self.acked >= self.total;
        self.listed && (bytes || self.files_done >= self.files)
    }
}

/// The events of a transfer, collected from its tasks, its link and its progress. Dropping it ends the tasks.
#[derive(Debug)]
pub(crate) struct Feed {
    tasks: JoinSet<()>,
    happened: mpsc::Receiver<Event>,
    /// Events that are collected and not reported yet, the next one last.
    gathered: Vec<Event>,
    /// `None` when no more will come.
    link_events: Option<LinkEvents>,
    ticker: Interval,
    reported: Option<Progress>,
}

impl Feed {
    pub(crate) fn new(
        tasks: JoinSet<()>,
        happened: mpsc::Receiver<Event>,
        link_events: LinkEvents,
    ) -> Self {
        let mut ticker = tokio::time::interval(REPORT);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            tasks,
            happened,
            gathered: Vec::new(),
            link_events: Some(link_events),
            ticker,
            reported: None,
        }
    }

    /// The next event. Cancel safe.
    pub(crate) async fn next(&mut self, progress: impl Fn() -> Progress) -> Option<Event> {
        if let Some(event) = self.gathered.pop() {
            return Some(event);
        }
        loop {
            tokio::select! {
                biased;
                event = link_event(&mut self.link_events) => match event {
                    Some(LinkEvent::Reconnecting { attempt, delay, reason }) => {
                        return Some(Event::Reconnecting { attempt, delay, reason });
                    }
                    Some(LinkEvent::Connected) => return Some(Event::Connected),
                    Some(LinkEvent::PathLost { path, delay, reason }) => {
                        return Some(Event::PathLost { path, delay, reason });
                    }
                    Some(LinkEvent::PathConnected { path }) => {
                        return Some(Event::PathConnected { path });
                    }
                    Some(LinkEvent::TransportChanged { to, why }) => {
                        return Some(Event::TransportChanged { to, why });
                    }
                    None => self.link_events = None,
                },
                count = self.happened.recv_many(&mut self.gathered, GATHERED) => {
                    self.gathered.reverse();
                    return match count {
                        0 => self.changed(progress()),
                        _ => self.gathered.pop(),
                    };
                }
                _ = self.ticker.tick() => {
                    let now = progress();
                    // The counters are ahead of the events: the end is reported after the last event.
                    if !now.is_complete() && let Some(event) = self.changed(now) {
                        return Some(event);
                    }
                }
                Some(ended) = self.tasks.join_next() => if let Err(error) = ended {
                    tracing::error!(%error, "a task of a transfer failed");
                },
            }
        }
    }

    fn changed(&mut self, now: Progress) -> Option<Event> {
        let before = self.reported.replace(now);
        (before != Some(now)).then_some(Event::Progress(now))
    }
}

async fn link_event(events: &mut Option<LinkEvents>) -> Option<LinkEvent> {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(happened: mpsc::Receiver<Event>) -> Feed {
        Feed {
            tasks: JoinSet::new(),
            happened,
            gathered: Vec::new(),
            link_events: None,
            ticker: tokio::time::interval(REPORT),
            reported: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn events_that_came_together_are_told_in_their_order() {
        let (events, happened) = mpsc::channel(200);
        let mut feed = feed(happened);
        for index in 0..150 {
            let path = String::new();
            let started = Event::Started {
                index,
                path,
                size: 0,
            };
            events.send(started).await.unwrap();
        }
        drop(events);
        let now = || Progress {
            acked: 0,
            total: 0,
            files_done: 0,
            files: 150,
            listed: true,
            sized: true,
            moved: 0,
        };
        for expected in 0..150 {
            match feed.next(now).await {
                Some(Event::Started { index, .. }) => assert_eq!(index, expected),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(feed.next(now).await, Some(Event::Progress(_))));
        assert!(feed.next(now).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn that_all_is_done_is_told_after_the_last_event() {
        let (events, happened) = mpsc::channel(1);
        let mut feed = feed(happened);
        let now = |acked, files_done| Progress {
            acked,
            total: 5,
            files_done,
            files: 1,
            listed: true,
            sized: true,
            moved: 0,
        };
        assert!(matches!(
            feed.next(|| now(4, 0)).await,
            Some(Event::Progress(_))
        ));
        // Both counters, and one of them, may be ahead of the event.
        for ahead in [now(5, 0), now(5, 1), now(4, 1)] {
            let next = tokio::time::timeout(REPORT * 5, feed.next(|| ahead));
            assert!(next.await.is_err(), "{ahead:?} was told too soon");
        }
        events.send(Event::Connected).await.unwrap();
        drop(events);
        let last = feed.next(|| now(5, 1)).await;
        assert!(matches!(last, Some(Event::Connected)), "{last:?}");
        let last = feed.next(|| now(5, 1)).await;
        assert!(matches!(last, Some(Event::Progress(told)) if told == now(5, 1)));
        assert!(feed.next(|| now(5, 1)).await.is_none());
    }
}
