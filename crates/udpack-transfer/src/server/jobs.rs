//! The transfers of a server as others may watch them: the channel `transfers`.
//!
//! A watcher gets the list, then each change, coalesced: of several states of one job within a quarter of a
//! second the latest. The end of a job is always sent. Transfers never wait for a watcher.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::time::{Interval, MissedTickBehavior};
use udpack::{Channel, CloseCode, Fault, Message, RecvError, SendError};

use crate::base::code::Code;
use crate::server::scope::Scope;

/// How often a job's progress is sent at most.
const TICK: Duration = Duration::from_millis(250);
/// Ended jobs that may wait for one watcher; one that is further behind is closed.
const BACKLOG: usize = 16_384;
/// Jobs in the first list.
const LIST: usize = 512;
/// Bytes of a job in a message beside its path and peer, at most.
const JOB_BYTES: usize = 160;

/// Whether a job brings a file or takes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobKind {
    Put,
    Get,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobEnd {
    Done,
    Failed(Code),
    Cancelled,
    /// What is there of it waits to be resumed.
    Suspended,
}

/// A transfer that runs, as its server sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transfer {
    /// Never used twice while the server runs.
    pub id: u64,
    /// Whether a file is sent to a client, and not received.
    pub is_download: bool,
    /// The name in the store.
    pub path: String,
    /// The id of the client's token.
    pub peer: String,
    /// The size in bytes; `None` where it is not known, and for a download.
    pub size: Option<u64>,
    /// Bytes received without a gap, or sent.
    pub bytes: u64,
    /// Of those received, bytes that a power cut would not take.
    pub safe: u64,
    /// How long it runs.
    pub running: Duration,
}

/// Watches the transfers of a [`Receiver`](crate::Receiver).
///
/// # Drop
/// Ends nothing but the telling.
#[derive(Debug)]
pub struct TransferWatch {
    jobs: Jobs,
    ticker: Interval,
    told: Option<Vec<Transfer>>,
}

impl TransferWatch {
    /// All that run now, as soon as one has begun, moved or ended since the last call, and four times a second at
    /// most. `None` when none runs and the server shuts down ([`Receiver::shutting_down`](crate::Receiver::shutting_down)).
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Vec<Transfer>> {
        loop {
            self.ticker.tick().await;
            // Read first, so that what begins afterwards is reported.
            let over = self.jobs.inner.over.load(Ordering::Relaxed);
            let now = self.jobs.transfers();
            let state = |all: &[Transfer]| {
                let state = all.iter().map(|one| (one.id, one.bytes, one.safe));
                state.collect::<Vec<_>>()
            };
            if self.told.as_deref().map(state) != Some(state(&now)) {
                self.told = Some(now.clone());
                return Some(now);
            }
            if over && now.is_empty() {
                return None;
            }
        }
    }
}

/// All jobs of a server. A handle.
#[derive(Debug, Clone, Default)]
pub(crate) struct Jobs {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    running: Mutex<BTreeMap<u64, Arc<Running>>>,
    watchers: Mutex<HashMap<u64, Arc<Watcher>>>,
    /// Watchers go when there is nothing left to see.
    over: AtomicBool,
}

struct Running {
    id: u64,
    kind: JobKind,
    /// The name in the store.
    path: String,
    peer: String,
    size: Option<u64>,
    since: Instant,
    bytes: AtomicU64,
    safe: AtomicU64,
    cancel: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("id", &self.id)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// One job, owned by what runs it. Dropping it without [`end`](Self::end) suspends it.
#[derive(Debug)]
pub(crate) struct Job {
    jobs: Jobs,
    running: Arc<Running>,
    ended: bool,
}

#[derive(Debug)]
struct Watcher {
    peer: String,
    admin: bool,
    ended: Mutex<Ended>,
}

#[derive(Debug, Default)]
struct Ended {
    jobs: VecDeque<(Arc<Running>, JobEnd)>,
    /// More ended than the backlog holds.
    lost: bool,
}

impl Jobs {
    /// A job begins. `cancel` is called when it is cancelled, from any thread, perhaps more than once.
    pub(crate) fn start(
        &self,
        kind: JobKind,
        path: &str,
        peer: &str,
        size: Option<u64>,
        cancel: impl Fn() + Send + Sync + 'static,
    ) -> Job {
        let id = self.inner.next.fetch_add(1, Ordering::Relaxed) + 1;
        let running = Arc::new(Running {
            id,
            kind,
            path: path.to_owned(),
            peer: peer.to_owned(),
            size,
            since: Instant::now(),
            bytes: AtomicU64::new(0),
            safe: AtomicU64::new(0),
            cancel: Box::new(cancel),
        });
        lock(&self.inner.running).insert(id, running.clone());
        Job {
            jobs: self.clone(),
            running,
            ended: false,
        }
    }

    /// All that run now.
    pub(crate) fn transfers(&self) -> Vec<Transfer> {
        let all = lock(&self.inner.running);
        all.values().map(|job| job.transfer()).collect()
    }

    /// Tells of all of them. Must be called within a tokio runtime.
    pub(crate) fn told(&self) -> TransferWatch {
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        TransferWatch {
            jobs: self.clone(),
            ticker,
            told: None,
        }
    }

    /// Cancels one; `false` where there is none of this number.
    pub(crate) fn cancel(&self, id: u64) -> bool {
        let job = lock(&self.inner.running).get(&id).cloned();
        job.map(|job| (job.cancel)()).is_some()
    }

    /// Sends watchers away once they have heard of the end of all they see.
    pub(crate) fn close(&self) {
        self.inner.over.store(true, Ordering::Relaxed);
    }

    /// Serves one watcher until it leaves.
    pub(crate) async fn watch(&self, channel: Channel, default: &Scope) -> Result<(), RecvError> {
        let peer = channel.peer();
        let scope = match Scope::of(peer.as_ref(), default) {
            Ok(scope) => scope,
            Err(error) => {
                tracing::error!(%error, "the entry of a token is unusable");
                channel.close(CloseCode::REFUSED, "forbidden");
                return Ok(());
            }
        };
        let watcher = Arc::new(Watcher {
            peer: peer
                .as_ref()
                .map_or_else(String::new, |peer| peer.id().to_owned()),
            admin: scope.admin,
            ended: Mutex::default(),
        });
        let _seat = self.seat(&watcher);
        let mut told = HashMap::new();
        let mut list = Vec::new();
        let running = self.running(&watcher);
        // What does not fit into one message follows as changes.
        let mut room = channel.frame_limit().saturating_sub(JOB_BYTES);
        for job in running.iter().take(LIST) {
            let fields = fields(job, None, &scope, &watcher);
            let bytes = JOB_BYTES + fields.path.len() + fields.peer.len();
            if bytes > room {
                break;
            }
            room -= bytes;
            told.insert(job.id, job.now());
            list.push(fields);
        }
        if channel
            .send("jobs", &ListFields { jobs: list })
            .await
            .is_err()
        {
            return Ok(());
        }
        // A token that replaced the one it came with may show it more, or less.
        let changed = || {
            let now = channel.peer();
            now != peer && Scope::of(now.as_ref(), default).ok().as_ref() != Some(&scope)
        };
        let over = &self.inner.over;
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !changed() {
            tokio::select! {
                message = channel.recv() => match message? {
                    Some(_) if changed() => {}
                    Some(message) => {
                        if self.asked(&channel, &message, &watcher).await.is_err() {
                            return Ok(());
                        }
                    }
                    None => return Ok(()),
                },
                _ = ticker.tick() => match self.tell(&channel, &watcher, &scope, &mut told).await {
                    Ok(true) if over.load(Ordering::Relaxed) && self.running(&watcher).is_empty() => {
                        drop(channel.close(CloseCode::SHUTTING_DOWN, "the server is shutting down"));
                        return Ok(());
                    }
                    Ok(true) => {}
                    Ok(false) => {
                        channel.close(CloseCode::SLOW_PEER, "too many jobs ended unheard");
                        return Ok(());
                    }
                    Err(_) => return Ok(()),
                },
            }
        }
        channel.close(CloseCode::REFUSED, "the rights of this token have changed");
        Ok(())
    }

    /// Tells what changed; false when the watcher has missed the end of a job.
    async fn tell(
        &self,
        channel: &Channel,
        watcher: &Watcher,
        scope: &Scope,
        told: &mut HashMap<u64, (u64, u64)>,
    ) -> Result<bool, SendError> {
        for job in self.running(watcher) {
            let now = job.now();
            if told.insert(job.id, now) != Some(now) {
                channel
                    .send("job", &fields(&job, None, scope, watcher))
                    .await?;
            }
        }
        loop {
            let next = {
                let mut ended = lock(&watcher.ended);
                if ended.lost {
                    return Ok(false);
                }
                ended.jobs.pop_front()
            };
            let Some((job, end)) = next else {
                return Ok(true);
            };
            told.remove(&job.id);
            channel
                .send("job", &fields(&job, Some(end), scope, watcher))
                .await?;
        }
    }

    async fn asked(
        &self,
        channel: &Channel,
        message: &Message,
        watcher: &Watcher,
    ) -> Result<(), SendError> {
        if message.event() != "cancel" {
            let fault = Fault::new(Fault::NO_HANDLER, "no such event on a channel of jobs");
            return channel.fault(message, &fault).await;
        }
        let id = match message.fields().and_then(|fields| fields.u64("job")) {
            Ok(id) => id,
            Err(error) => {
                let fault = Fault::new(Fault::BAD_PAYLOAD, error.to_string());
                return channel.fault(message, &fault).await;
            }
        };
        let job = lock(&self.inner.running).get(&id).cloned();
        let fault = match job {
            // What one may not see is not there.
            Some(job) if !watcher.sees(&job) => {
                Fault::new(Code::Forbidden.as_str(), "not a job of yours")
            }
            Some(job) => {
                (job.cancel)();
                return channel.reply(message, &()).await;
            }
            None => Fault::new(Code::NotFound.as_str(), "no such job is running"),
        };
        channel.fault(message, &fault).await
    }

    fn running(&self, watcher: &Watcher) -> Vec<Arc<Running>> {
        lock(&self.inner.running)
            .values()
            .filter(|job| watcher.sees(job))
            .cloned()
            .collect()
    }

    fn seat(&self, watcher: &Arc<Watcher>) -> Seat {
        let key = self.inner.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.inner.watchers).insert(key, watcher.clone());
        Seat {
            jobs: self.clone(),
            key,
        }
    }
}

impl Watcher {
    fn sees(&self, job: &Running) -> bool {
        self.admin || self.peer == job.peer
    }
}

impl Running {
    fn transfer(&self) -> Transfer {
        let (bytes, safe) = self.now();
        Transfer {
            id: self.id,
            is_download: self.kind == JobKind::Get,
            path: self.path.clone(),
            peer: self.peer.clone(),
            size: self.size,
            bytes,
            safe,
            running: self.since.elapsed(),
        }
    }

    fn now(&self) -> (u64, u64) {
        (
            self.bytes.load(Ordering::Relaxed),
            self.safe.load(Ordering::Relaxed),
        )
    }
}

impl Job {
    /// How far it is, in bytes.
    pub(crate) fn update(&self, bytes: u64, safe: u64) {
        self.running.bytes.store(bytes, Ordering::Relaxed);
        self.running.safe.store(safe, Ordering::Relaxed);
    }

    /// It is over.
    pub(crate) fn end(mut self, end: JobEnd) {
        self.over(end);
    }

    fn over(&mut self, end: JobEnd) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let inner = &self.jobs.inner;
        lock(&inner.running).remove(&self.running.id);
        for watcher in lock(&inner.watchers).values() {
            if watcher.sees(&self.running) {
                let mut ended = lock(&watcher.ended);
                if ended.jobs.len() < BACKLOG {
                    ended.jobs.push_back((self.running.clone(), end));
                } else {
                    ended.lost = true;
                }
            }
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.over(JobEnd::Suspended);
    }
}

/// One watcher's place, given up on drop.
struct Seat {
    jobs: Jobs,
    key: u64,
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.jobs.inner.watchers).remove(&self.key);
    }
}

#[derive(Serialize)]
struct ListFields<'a> {
    jobs: Vec<JobFields<'a>>,
}

#[derive(Serialize)]
struct JobFields<'a> {
    id: u64,
    kind: &'static str,
    #[serde(serialize_with = "crate::base::names::serialize")]
    path: &'a str,
    peer: &'a str,
    size: Option<u64>,
    bytes: u64,
    safe: u64,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    secs: f64,
}

fn fields<'a>(
    job: &'a Running,
    end: Option<JobEnd>,
    scope: &Scope,
    watcher: &Watcher,
) -> JobFields<'a> {
    let (bytes, safe) = job.now();
    let (state, code) = match end {
        None => ("running", None),
        Some(JobEnd::Done) => ("done", None),
        Some(JobEnd::Failed(code)) => ("failed", Some(code.as_str())),
        Some(JobEnd::Cancelled) => ("cancelled", None),
        Some(JobEnd::Suspended) => ("suspended", None),
    };
    let own = watcher.peer == job.peer;
    JobFields {
        id: job.id,
        kind: match job.kind {
            JobKind::Put => "put",
            JobKind::Get => "get",
        },
        path: if own {
            scope.outside(&job.path)
        } else {
            &job.path
        },
        peer: &job.peer,
        size: job.size,
        bytes,
        safe,
        state,
        code,
        secs: job.since.elapsed().as_secs_f64(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
