//! The transfers of a server for watchers: the channel `transfers`.
//!
//! A watcher gets the list, then each change. Of several states of one job within a quarter of a second only the
//! latest is sent. The end of a job is always sent. Transfers never wait for a watcher.

mod pace;
mod recent;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::time::{Interval, MissedTickBehavior};
use udpack::{Channel, CloseCode, Fault, Message, RecvError, SendError};

use self::pace::Pace;
use self::recent::{Counts, Ended, Recent};
use crate::base::code::Code;
use crate::base::phase::{Phase, PhaseCell};
use crate::server::receiver::NoScope;
use crate::server::scope::Scope;

/// The shortest interval between reports of a job's progress.
const TICK: Duration = Duration::from_millis(250);
/// The most ended jobs that wait for one watcher; the channel of a slower watcher is closed.
const BACKLOG: usize = 16_384;
/// The most jobs in the first list.
const LIST: usize = 512;
/// The most bytes of a job in a message besides its path, peer and text.
const JOB_BYTES: usize = 256;
/// The most bytes of the reason of a `cancel`, and of the text of an end.
const TEXT: usize = 256;

/// The direction of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobKind {
    Put,
    Get,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum JobEnd {
    Done,
    /// It failed, with the sentence for its client.
    Failed(Code, String),
    Cancelled,
    /// It was interrupted; its data can be resumed.
    Suspended,
}

/// A running transfer, as its server sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transfer {
    /// Never used twice while the server runs.
    pub id: u64,
    /// Whether the server sends the file.
    pub is_download: bool,
    /// The name in the store.
    pub path: String,
    /// The id of the client's token.
    pub peer: String,
    /// The size in bytes; `None` if it is unknown.
    pub size: Option<u64>,
    /// The current phase.
    pub phase: Phase,
    /// Bytes per second, averaged over about the last two seconds.
    pub rate: u64,
    /// Whether no byte has moved for 5 s although some should.
    pub stalled: bool,
    /// Bytes received without a gap, or sent.
    pub bytes: u64,
    /// Received bytes that survive a power cut.
    pub safe: u64,
    /// The time since the transfer began.
    pub running: Duration,
}

/// Watches the transfers of a [`Receiver`](crate::Receiver).
///
/// # Drop
/// Stops only the watching.
#[derive(Debug)]
pub struct TransferWatch {
    jobs: Jobs,
    ticker: Interval,
    told: Option<Vec<Transfer>>,
}

impl TransferWatch {
    /// All running transfers, as soon as one has begun, moved or ended since the last call, four times a second at
    /// most. `None` when none runs and the server shuts down
    /// ([`Receiver::shutting_down`](crate::Receiver::shutting_down)).
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Vec<Transfer>> {
        loop {
            self.ticker.tick().await;
            // Read first, so that transfers that begin later are reported.
            let over = self.jobs.inner.over.load(Ordering::Relaxed);
            let now = self.jobs.transfers();
            let state = |all: &[Transfer]| {
                let state =
                    (all.iter()).map(|one| (one.id, one.bytes, one.safe, one.phase, one.stalled));
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
    recent: Recent,
    watchers: Mutex<HashMap<u64, Arc<Watcher>>>,
    /// Whether watchers are closed when no transfer is left.
    over: AtomicBool,
}

struct Running {
    id: u64,
    kind: JobKind,
    /// The name in the store.
    path: String,
    peer: String,
    size: OnceLock<u64>,
    since: Instant,
    phase: PhaseCell,
    pace: Mutex<Pace>,
    bytes: AtomicU64,
    safe: AtomicU64,
    /// `None` once it has ended.
    cancel: Mutex<Option<Cancel>>,
    /// Set when it was cancelled at the server, with the reason if one was given.
    cancelled: OnceLock<Option<String>>,
}

type Cancel = Arc<dyn Fn() + Send + Sync>;

/// The state of a running job as reported to watchers; an unchanged state is not reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    bytes: u64,
    safe: u64,
    phase: Phase,
    stalled: bool,
    rate: u64,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("id", &self.id)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// Records the phase and the progress of a job. A handle.
#[derive(Debug, Clone)]
pub(crate) struct JobNotes(Arc<Running>);

impl JobNotes {
    pub(crate) fn phase(&self, phase: Phase) {
        self.0.phase.set(phase);
    }

    pub(crate) fn bytes(&self, bytes: u64) {
        self.0.bytes.fetch_max(bytes, Ordering::Relaxed);
    }
}

/// One job, owned by the code that runs it. Dropping it without [`end`](Self::end) suspends it.
#[derive(Debug)]
pub(crate) struct Job {
    jobs: Jobs,
    running: Arc<Running>,
    ended: bool,
}

#[derive(Debug)]
struct Watcher {
    peer: String,
    watches: bool,
    admin: bool,
    ended: Mutex<Unheard>,
}

#[derive(Debug, Default)]
struct Unheard {
    jobs: VecDeque<Arc<Ended>>,
    /// Whether more jobs ended than the backlog holds.
    lost: bool,
}

impl Jobs {
    /// Begins a job. `cancel` is called when it is cancelled, from any thread, possibly more than once.
    pub(crate) fn start(
        &self,
        kind: JobKind,
        path: &str,
        peer: &str,
        size: Option<u64>,
        cancel: impl Fn() + Send + Sync + 'static,
    ) -> Job {
        let id = self.inner.next.fetch_add(1, Ordering::Relaxed) + 1;
        let since = Instant::now();
        let running = Arc::new(Running {
            id,
            kind,
            path: path.to_owned(),
            peer: peer.to_owned(),
            size: size.map_or_else(OnceLock::new, OnceLock::from),
            since,
            phase: PhaseCell::new(match kind {
                JobKind::Put => Phase::Receiving,
                JobKind::Get => Phase::Waiting,
            }),
            pace: Mutex::new(Pace::new(since)),
            bytes: AtomicU64::new(0),
            safe: AtomicU64::new(0),
            cancel: Mutex::new(Some(Arc::new(cancel))),
            cancelled: OnceLock::new(),
        });
        lock(&self.inner.running).insert(id, running.clone());
        Job {
            jobs: self.clone(),
            running,
            ended: false,
        }
    }

    /// All running transfers.
    pub(crate) fn transfers(&self) -> Vec<Transfer> {
        let all = lock(&self.inner.running);
        all.values().map(|job| job.transfer()).collect()
    }

    /// Returns a watcher of all transfers. Must be called within a tokio runtime.
    pub(crate) fn told(&self) -> TransferWatch {
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        TransferWatch {
            jobs: self.clone(),
            ticker,
            told: None,
        }
    }

    /// Cancels a job, and tells its client the reason; `false` if there is no job of this id.
    pub(crate) fn cancel(&self, id: u64, reason: Option<&str>) -> bool {
        let job = lock(&self.inner.running).get(&id).cloned();
        job.map(|job| job.cancel(reason)).is_some()
    }

    /// How many jobs run in each direction, and how many have ended, by their ends.
    pub(crate) fn counts(&self) -> (usize, usize, Counts) {
        let running = lock(&self.inner.running);
        let puts = running.values().filter(|job| job.kind == JobKind::Put);
        let puts = puts.count();
        (puts, running.len() - puts, self.inner.recent.counts())
    }

    /// Whether watchers are closed when no transfer runs, and none runs.
    pub(crate) fn is_over(&self) -> bool {
        self.inner.over.load(Ordering::Relaxed) && lock(&self.inner.running).is_empty()
    }

    /// Closes watchers when they have been sent the ends of all their jobs.
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
                channel.close(CloseCode::REFUSED, NoScope::TEXT);
                return Ok(());
            }
        };
        let watcher = Arc::new(Watcher {
            peer: peer
                .as_ref()
                .map_or_else(String::new, |peer| peer.id().to_owned()),
            watches: scope.watches(),
            admin: scope.admin,
            ended: Mutex::default(),
        });
        let _registration = self.register(&watcher);
        let mut told = HashMap::new();
        if self
            .list(&channel, &watcher, &scope, &mut told)
            .await
            .is_err()
        {
            return Ok(());
        }
        // A refreshed token may show the watcher more jobs, or fewer.
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

    /// Sends the running jobs, and those that ended recently.
    async fn list(
        &self,
        channel: &Channel,
        watcher: &Watcher,
        scope: &Scope,
        told: &mut HashMap<u64, State>,
    ) -> Result<(), SendError> {
        let running = self.running(watcher);
        let recent = self.inner.recent.all();
        let seen = recent.iter().filter(|job| watcher.sees(&job.job));
        // Jobs that do not fit into one message follow as changes.
        let mut room = channel.frame_limit().saturating_sub(JOB_BYTES);
        let mut fits = |fields: &JobFields<'_>| {
            let text = fields.text.as_ref().map_or(0, |text| text.len());
            let bytes = JOB_BYTES + fields.path.len() + fields.peer.len() + text;
            let left = room.checked_sub(bytes);
            room = left.unwrap_or(0);
            left.is_some()
        };
        let mut list = ListFields::default();
        for job in running.iter().take(LIST) {
            let now = job.now();
            let fields = fields(job, now, None, scope, watcher);
            if !fits(&fields) {
                break;
            }
            told.insert(job.id, now);
            list.jobs.push(fields);
        }
        for ended in seen {
            let now = ended.job.now();
            let mut fields = fields(&ended.job, now, Some(ended), scope, watcher);
            fields.ago = Some(ended.at.elapsed().as_secs_f64());
            if !fits(&fields) {
                break;
            }
            list.ended.push(fields);
        }
        channel.send("jobs", &list).await
    }

    /// Sends the changes; returns `false` if the watcher has missed the end of a job.
    async fn tell(
        &self,
        channel: &Channel,
        watcher: &Watcher,
        scope: &Scope,
        told: &mut HashMap<u64, State>,
    ) -> Result<bool, SendError> {
        for job in self.running(watcher) {
            let now = job.now();
            if told.insert(job.id, now) != Some(now) {
                channel
                    .send("job", &fields(&job, now, None, scope, watcher))
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
            let Some(ended) = next else {
                return Ok(true);
            };
            let job = &ended.job;
            let known = told.remove(&job.id).is_some();
            if ended.void && !known {
                continue;
            }
            channel
                .send("job", &fields(job, job.now(), Some(&ended), scope, watcher))
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
        let asked = message.fields().and_then(|fields| {
            let id = fields.u64("job")?;
            Ok((id, fields.opt_str("reason")?))
        });
        let asked = match asked {
            Ok((id, reason)) => sound_reason(reason).map(|reason| (id, reason)),
            Err(error) => Err(error.to_string()),
        };
        let (id, reason) = match asked {
            Ok(asked) => asked,
            Err(text) => {
                let fault = Fault::new(Fault::BAD_PAYLOAD, text);
                return channel.fault(message, &fault).await;
            }
        };
        let job = lock(&self.inner.running).get(&id).cloned();
        let fault = match job {
            Some(job) if !watcher.ends(&job) => {
                Fault::new(Code::Forbidden.as_str(), "not a job of yours")
            }
            Some(job) => {
                let by = watcher.peer.as_str();
                tracing::info!(job = id, path = job.path, by, reason, "cancelled");
                job.cancel(reason);
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

    fn register(&self, watcher: &Arc<Watcher>) -> Registration {
        let key = self.inner.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.inner.watchers).insert(key, watcher.clone());
        Registration {
            jobs: self.clone(),
            key,
        }
    }
}

impl Watcher {
    fn sees(&self, job: &Running) -> bool {
        self.watches || self.peer == job.peer
    }

    fn ends(&self, job: &Running) -> bool {
        self.admin || self.peer == job.peer
    }
}

impl Running {
    fn cancel(&self, reason: Option<&str>) {
        let reason = reason.map(|reason| udpack::text::printable_within(reason, TEXT));
        // Later reasons are ignored.
        let _ = self.cancelled.set(reason);
        let cancel = lock(&self.cancel).clone();
        if let Some(cancel) = cancel {
            cancel();
        }
    }

    fn transfer(&self) -> Transfer {
        let State {
            bytes,
            safe,
            phase,
            stalled,
            rate,
        } = self.now();
        Transfer {
            id: self.id,
            is_download: self.kind == JobKind::Get,
            path: self.path.clone(),
            peer: self.peer.clone(),
            size: self.size.get().copied(),
            phase,
            rate,
            stalled,
            bytes,
            safe,
            running: self.since.elapsed(),
        }
    }

    fn now(&self) -> State {
        // Read in this order, so that values written before a phase are seen with it.
        let phase = self.phase.get();
        let bytes = self.bytes.load(Ordering::Relaxed);
        let now = Instant::now();
        let mut pace = lock(&self.pace);
        pace.look(bytes, now);
        State {
            bytes,
            safe: self.safe.load(Ordering::Relaxed).min(bytes),
            phase,
            stalled: pace.is_stalled(phase, now),
            rate: if phase.moves() { pace.rate() } else { 0 },
        }
    }
}

impl Job {
    /// How far it is, in bytes.
    pub(crate) fn update(&self, bytes: u64, safe: u64) {
        self.running.bytes.fetch_max(bytes, Ordering::Relaxed);
        self.running.safe.store(safe, Ordering::Relaxed);
    }

    /// Bytes that were there before the first moved.
    pub(crate) fn skip(&self, bytes: u64) {
        lock(&self.running.pace).skip(bytes, Instant::now());
    }

    /// The size has become known.
    pub(crate) fn sized(&self, size: u64) {
        let _ = self.running.size.set(size);
    }

    /// For those who work at it.
    pub(crate) fn notes(&self) -> JobNotes {
        JobNotes(self.running.clone())
    }

    /// What its client is told when it is cancelled.
    pub(crate) fn cancelled(&self) -> String {
        match self.running.cancelled.get() {
            Some(Some(reason)) => format!("cancelled at the server: {reason}"),
            Some(None) => "cancelled at the server".to_owned(),
            None => "given up by the client".to_owned(),
        }
    }

    /// It is over.
    pub(crate) fn end(mut self, end: JobEnd) {
        self.over(end, false);
    }

    /// It turned out to be no transfer: it is neither counted nor listed, and told only to those who saw it run.
    pub(crate) fn void(mut self, end: JobEnd) {
        self.over(end, true);
    }

    fn over(&mut self, end: JobEnd, void: bool) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let inner = &self.jobs.inner;
        lock(&inner.running).remove(&self.running.id);
        drop(lock(&self.running.cancel).take());
        let ended = inner.recent.add(&self.running, end, void);
        for watcher in lock(&inner.watchers).values() {
            if watcher.sees(&self.running) {
                let mut unheard = lock(&watcher.ended);
                if unheard.jobs.len() < BACKLOG {
                    unheard.jobs.push_back(ended.clone());
                } else {
                    unheard.lost = true;
                }
            }
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.over(JobEnd::Suspended, false);
    }
}

/// One watcher's place, given up on drop.
struct Registration {
    jobs: Jobs,
    key: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.jobs.inner.watchers).remove(&self.key);
    }
}

#[derive(Default, Serialize)]
struct ListFields<'a> {
    jobs: Vec<JobFields<'a>>,
    ended: Vec<JobFields<'a>>,
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
    /// Of one that runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stalled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<Cow<'a, str>>,
    secs: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ago: Option<f64>,
}

fn fields<'a>(
    job: &'a Running,
    now: State,
    ended: Option<&'a Ended>,
    scope: &Scope,
    watcher: &Watcher,
) -> JobFields<'a> {
    let (state, code) = match ended.map(|ended| &ended.end) {
        None => ("running", None),
        Some(JobEnd::Done) => ("done", None),
        Some(JobEnd::Failed(code, _)) => ("failed", Some(code.as_str())),
        Some(JobEnd::Cancelled) => ("cancelled", None),
        Some(JobEnd::Suspended) => ("suspended", None),
    };
    let own = watcher.peer == job.peer;
    let runs = ended.is_none();
    let text = ended.and_then(Ended::text);
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
        size: job.size.get().copied(),
        bytes: now.bytes,
        safe: now.safe,
        state,
        phase: runs.then(|| now.phase.as_str()),
        rate: runs.then_some(now.rate),
        stalled: runs && now.stalled,
        code,
        text: match own {
            true => text.map(|text| scope.outside_of(text)),
            false => text.map(Cow::Borrowed),
        },
        secs: match ended {
            Some(ended) => ended.at.saturating_duration_since(job.since),
            None => job.since.elapsed(),
        }
        .as_secs_f64(),
        ago: None,
    }
}

/// A reason as it may be passed on: one line that can be printed, and not a long one. An empty one is none.
pub(crate) fn sound_reason(reason: Option<&str>) -> Result<Option<&str>, String> {
    match reason {
        Some(reason) if reason.len() > TEXT => Err(format!("reason: more than {TEXT} bytes")),
        Some(reason) if !reason.chars().all(udpack::text::is_printable) => {
            Err("reason: a character that cannot be printed".to_owned())
        }
        reason => Ok(reason.filter(|reason| !reason.is_empty())),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
