//! Watching the transfers of a server from a client.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use udpack::Message;

use super::broken;
use super::watching::Watching;
use crate::base::path::printable;
use crate::base::phase::Phase;
use crate::client::link::Link;
use crate::local::error::TransferError;
use crate::wire::JOBS_CHANNEL;

/// A transfer at the server.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Job {
    /// The server's number for it.
    pub id: u64,
    /// Its direction.
    pub kind: JobKind,
    /// The path, as the transferring client names it; safe to print.
    pub path: String,
    /// The name of the transferring client's token; safe to print.
    pub peer: String,
    /// The file's size in bytes, if known.
    pub size: Option<u64>,
    /// What it is doing, while it runs and if the server tells.
    pub phase: Option<Phase>,
    /// Bytes per second, over about the last two seconds.
    pub rate: u64,
    /// Whether no byte has moved for a while although some should.
    pub stalled: bool,
    /// Bytes transferred.
    pub bytes: u64,
    /// How many of these survive a power cut.
    pub safe: u64,
    /// Its state.
    pub state: JobState,
    /// Why it failed: a code of `docs/PROTOCOL.md` §11.
    pub code: Option<String>,
    /// The text of a failure, or the reason given with a cancel; safe to print.
    pub text: Option<String>,
    /// How long it has been running, or ran.
    pub elapsed: Duration,
    /// In [`JobsEvent::Ended`]: how long ago it ended.
    pub ago: Option<Duration>,
}

impl Job {
    /// The remaining time at the present rate.
    pub fn eta(&self) -> Option<Duration> {
        let left = self.size?.checked_sub(self.bytes)?;
        let runs = self.state == JobState::Running && self.rate > 0;
        Duration::try_from_secs_f64(left as f64 / self.rate as f64)
            .ok()
            .filter(|_| runs)
    }
}

/// The direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum JobKind {
    /// To the server.
    Put,
    /// From the server.
    Get,
}

/// The state of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum JobState {
    /// It is running.
    Running,
    /// The file has arrived.
    Done,
    /// It has failed and will not continue by itself.
    Failed,
    /// It was cancelled.
    Cancelled,
    /// It was interrupted; the received bytes are kept.
    Suspended,
}

/// An event of [`Jobs::next`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobsEvent {
    /// All running transfers: the first event, and again after a lost connection.
    List(Vec<Job>),
    /// Transfers that ended before, the latest first, as far as the server remembers them. Follows a list.
    Ended(Vec<Job>),
    /// A transfer that is new or has changed.
    Changed(Job),
}

/// Watches the transfers of a server.
///
/// # Drop
/// Stops watching.
pub struct Jobs {
    watching: Watching,
    /// Arrived with the last list.
    ended: Option<Vec<Job>>,
    over: bool,
}

impl Jobs {
    pub(super) fn new(link: Link) -> Self {
        Self {
            watching: Watching::new(link, JOBS_CHANNEL),
            ended: None,
            over: false,
        }
    }

    /// The next event; `None` when the server sends no more. Nothing follows an error.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Result<JobsEvent, TransferError>> {
        if self.over {
            return None;
        }
        let event = self.event().await.transpose();
        self.over = !matches!(event, Some(Ok(_)));
        event
    }

    /// Cancels a transfer: one's own, or anyone's for an administrator. Its client receives the reason, a printable
    /// line of at most 256 bytes. The transfer's last state arrives as an event.
    ///
    /// [`TransferError::Refused`] with `forbidden`, `not_found`, or with an unknown code if the reason is not such a
    /// line; and those of the connection.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the request; the server may still carry it out.
    pub async fn cancel(&mut self, id: u64, reason: Option<&str>) -> Result<(), TransferError> {
        let asked = CancelFields { job: id, reason };
        self.watching.ask("cancel", &asked).await
    }

    async fn event(&mut self) -> Result<Option<JobsEvent>, TransferError> {
        if let Some(ended) = self.ended.take() {
            return Ok(Some(JobsEvent::Ended(ended)));
        }
        while let Some(message) = self.watching.next().await? {
            let event = self.decode(&message)?;
            if event.is_some() {
                return Ok(event);
            }
        }
        Ok(None)
    }

    /// Reads an event; `None` for one of a later version.
    fn decode(&mut self, message: &Message) -> Result<Option<JobsEvent>, TransferError> {
        let wrong = |error: udpack::DecodeError| broken(format!("{}: {error}", message.event()));
        let all = |raw: Vec<RawJob>| raw.into_iter().map(job).collect::<Result<Vec<_>, _>>();
        match message.event() {
            "jobs" => {
                let raw: RawJobs = message.data().map_err(wrong)?;
                let ended = raw.ended.map(all).transpose()?;
                self.ended = ended.filter(|ended| !ended.is_empty());
                Ok(Some(JobsEvent::List(all(raw.jobs)?)))
            }
            "job" => {
                let raw: RawJob = message.data().map_err(wrong)?;
                Ok(Some(JobsEvent::Changed(job(raw)?)))
            }
            _ => Ok(None),
        }
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

#[derive(Serialize)]
struct CancelFields<'a> {
    job: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

#[derive(Deserialize)]
struct RawJobs {
    jobs: Vec<RawJob>,
    #[serde(default)]
    ended: Option<Vec<RawJob>>,
}

#[derive(Deserialize)]
struct RawJob {
    id: u64,
    kind: String,
    #[serde(deserialize_with = "crate::base::names::deserialize")]
    path: String,
    peer: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    bytes: u64,
    #[serde(default)]
    safe: u64,
    state: String,
    #[serde(default)]
    phase: Option<String>,
    #[serde(default)]
    rate: u64,
    #[serde(default)]
    stalled: bool,
    #[serde(default)]
    code: Option<String>,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    secs: f64,
    #[serde(default)]
    ago: Option<f64>,
}

fn job(raw: RawJob) -> Result<Job, TransferError> {
    Ok(Job {
        id: raw.id,
        kind: match raw.kind.as_str() {
            "put" => JobKind::Put,
            "get" => JobKind::Get,
            _ => return Err(broken("a job whose kind is none of put, get")),
        },
        path: udpack::text::printable_within(&crate::base::names::shown(&raw.path), 1024),
        peer: printable(&raw.peer),
        size: raw.size,
        bytes: raw.bytes,
        safe: raw.safe.min(raw.bytes),
        state: match raw.state.as_str() {
            "running" => JobState::Running,
            "done" => JobState::Done,
            "failed" => JobState::Failed,
            "cancelled" => JobState::Cancelled,
            "suspended" => JobState::Suspended,
            _ => return Err(broken("a job whose state is not known")),
        },
        // An unknown name is one of a later version.
        phase: raw.phase.as_deref().and_then(Phase::from_word),
        rate: raw.rate,
        stalled: raw.stalled,
        code: raw.code.as_deref().map(printable),
        text: (raw.text.as_deref()).map(|text| udpack::text::printable_within(text, 1024)),
        elapsed: Duration::try_from_secs_f64(raw.secs).unwrap_or_default(),
        ago: raw
            .ago
            .and_then(|ago| Duration::try_from_secs_f64(ago).ok()),
    })
}
