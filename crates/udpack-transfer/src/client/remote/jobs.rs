//! The transfers that run at a server, watched from a client.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use udpack::{Channel, Message};

use super::{LOSSES, PATIENCE, broken, failed};
use crate::base::path::printable;
use crate::client::link::Link;
use crate::local::error::TransferError;

/// The name of the channels that show transfers.
const CHANNEL: &str = "transfers";

/// A transfer at the server.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Job {
    /// The server's number for it.
    pub id: u64,
    /// Which way it goes.
    pub kind: JobKind,
    /// The file, as the client who transfers it calls it; safe to print.
    pub path: String,
    /// Who transfers it; safe to print.
    pub peer: String,
    /// The file's size in bytes, if known.
    pub size: Option<u64>,
    /// Bytes transferred.
    pub bytes: u64,
    /// Of those, bytes that a power cut would not take.
    pub safe: u64,
    /// How it stands.
    pub state: JobState,
    /// Why it failed: a code of `docs/PROTOCOL.md` §11.
    pub code: Option<String>,
    /// How long it has been running, or ran.
    pub elapsed: Duration,
}

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum JobKind {
    /// To the server.
    Put,
    /// From the server.
    Get,
}

/// How a transfer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum JobState {
    /// It runs.
    Running,
    /// The file has arrived.
    Done,
    /// It has not, and will not by itself.
    Failed,
    /// It was cancelled.
    Cancelled,
    /// It was interrupted, and what has arrived is kept.
    Suspended,
}

/// What [`Jobs::next`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobsEvent {
    /// All there are: first of all, and again after the connection was lost.
    List(Vec<Job>),
    /// One that is new or has changed.
    Changed(Job),
}

/// The transfers at a server.
///
/// # Drop
/// Stops watching.
pub struct Jobs {
    link: Link,
    channel: Option<Channel>,
    losses: u32,
    over: bool,
}

impl Jobs {
    pub(super) fn new(link: Link) -> Self {
        Self {
            link,
            channel: None,
            losses: 0,
            over: false,
        }
    }

    /// What happened next; `None` when the server shows no more. An error is the last that comes.
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

    /// Gives a transfer up: one's own, or anyone's for an administrator. Its last state comes as an event.
    ///
    /// # Errors
    /// [`TransferError::Refused`] with `forbidden` or `not_found`, and those of the connection.
    ///
    /// # Cancel safety
    /// Dropping it gives the request up; the server may follow it all the same.
    pub async fn cancel(&mut self, id: u64) -> Result<(), TransferError> {
        let channel = self.channel().await?;
        let asked = CancelFields { job: id };
        let request = channel.request::<_, ()>("cancel", &asked);
        let answer = request.timeout(PATIENCE).await;
        answer.map_err(|error| failed(error, PATIENCE))
    }

    async fn channel(&mut self) -> Result<Channel, TransferError> {
        if let Some(channel) = &self.channel {
            return Ok(channel.clone());
        }
        let socket = self.link.socket().await?;
        let channel = socket.open(CHANNEL).await?;
        self.channel = Some(channel.clone());
        Ok(channel)
    }

    async fn event(&mut self) -> Result<Option<JobsEvent>, TransferError> {
        loop {
            let channel = self.channel().await?;
            match channel.recv().await {
                Ok(Some(message)) => {
                    let event = decode(&message)?;
                    self.losses = 0;
                    self.link.progressed();
                    if event.is_some() {
                        return Ok(event);
                    }
                }
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.channel = None;
                    self.losses += 1;
                    let error = error.into();
                    if !self.link.mends(&error) || self.losses >= LOSSES {
                        return Err(error);
                    }
                }
            }
        }
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

#[derive(Serialize)]
struct CancelFields {
    job: u64,
}

#[derive(Deserialize)]
struct RawJobs {
    jobs: Vec<RawJob>,
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
    code: Option<String>,
    #[serde(default)]
    secs: f64,
}

/// Reads an event; `None` for one of a later version.
fn decode(message: &Message) -> Result<Option<JobsEvent>, TransferError> {
    let wrong = |error: udpack::DecodeError| broken(format!("{}: {error}", message.event()));
    match message.event() {
        "jobs" => {
            let raw: RawJobs = message.data().map_err(wrong)?;
            let jobs = raw.jobs.into_iter().map(job).collect::<Result<_, _>>()?;
            Ok(Some(JobsEvent::List(jobs)))
        }
        "job" => {
            let raw: RawJob = message.data().map_err(wrong)?;
            Ok(Some(JobsEvent::Changed(job(raw)?)))
        }
        _ => Ok(None),
    }
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
        code: raw.code.as_deref().map(printable),
        elapsed: Duration::try_from_secs_f64(raw.secs).unwrap_or_default(),
    })
}
