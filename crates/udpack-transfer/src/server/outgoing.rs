//! The downloads of one lane: files read from the store and sent, one after the other, in the order asked.

use tokio::sync::mpsc;
use udpack::{Channel, CloseCode, SendError, Tenant};

use crate::base::code::Code;
use crate::base::path::RelPath;
use crate::local::limiter::{Limiter, Pace};
use crate::local::source::{Buffers, Piece};
use crate::server::hook::{Access, HookAccess};
use crate::server::jobs::{Job, JobEnd};
use crate::server::places;
use crate::server::receiver::Receiver;
use crate::server::target::TargetFile;
use crate::server::worker::{Outcome, Outcomes};
use crate::wire::{ChunkFields, ErrorFields, FileFields, FinishFields, Hash, Have};

/// How many lanes a client most likely has; the server does not know.
const LANES: usize = 4;

/// A file to send.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) id: u64,
    /// The name in the store.
    pub(crate) path: RelPath,
    /// The name as the client knows it.
    pub(crate) shown: String,
    /// What the client has of it.
    pub(crate) have: Have,
    /// How fast the client takes downloads.
    pub(crate) taken: Limiter,
    pub(crate) job: Job,
    /// Dropped or true when nobody wants it any more.
    pub(crate) unwanted: tokio_util::sync::CancellationToken,
}

/// Sends what is wanted until the queue is closed or the channel takes no more.
pub(crate) async fn send_files(
    receiver: Receiver,
    channel: Channel,
    tenant: Tenant,
    mut queue: mpsc::Receiver<Wanted>,
    outcomes: Outcomes,
) {
    while let Some(wanted) = queue.recv().await {
        let id = wanted.id;
        let sent = match send(&receiver, &channel, &tenant, wanted).await {
            Err(error @ SendError::Encode(_)) => {
                tracing::debug!(%error, "a download does not fit the frames of its client");
                let text = "a message of this download is above the client's limit for frames";
                refuse(&channel, id, Code::Unsupported, text, false).await
            }
            sent => sent,
        };
        let failed = match sent {
            Ok(failed) => failed,
            Err(error) => {
                // A client to which the outcome cannot be sent learns it from the end of the lane.
                if !error.is_closed() {
                    channel.close(CloseCode::FRAME_TOO_LARGE, error.to_string());
                }
                // The lane ends; its other half finds out why.
                return;
            }
        };
        let _ = outcomes.send(Outcome::Sent { id, failed });
    }
}

/// Sends one file; the code if it failed.
async fn send(
    receiver: &Receiver,
    channel: &Channel,
    tenant: &Tenant,
    wanted: Wanted,
) -> Result<Option<Code>, SendError> {
    let Wanted {
        id,
        path,
        shown,
        have,
        taken,
        job,
        unwanted,
    } = wanted;
    let began = std::time::Instant::now();
    if unwanted.is_cancelled() {
        job.end(JobEnd::Cancelled);
        return refuse(
            channel,
            id,
            Code::Cancelled,
            "given up by the client",
            false,
        )
        .await;
    }
    let limit = &receiver.limit_out;
    if let Some(hook) = &receiver.hook {
        let what = HookAccess {
            path: path.as_str().to_owned(),
            access: Access::Read,
            peer: channel
                .peer()
                .map_or_else(String::new, |peer| peer.id().to_owned()),
        };
        if let Err(reason) = hook.allow(&what).await {
            job.end(JobEnd::Failed(Code::Forbidden));
            return refuse(channel, id, Code::Forbidden, &reason, false).await;
        }
    }
    // The thread that reads has it until it is through.
    let place = tokio::select! {
        place = tokio::time::timeout(receiver.config.turn, receiver.places.downloads.take(tenant)) => place,
        () = unwanted.cancelled() => {
            job.end(JobEnd::Cancelled);
            return refuse(channel, id, Code::Cancelled, "given up by the client", false).await;
        }
    };
    let place = match place {
        Ok(Ok(place)) => place,
        full => {
            let text = match full {
                Ok(Err(full)) => places::too_many("downloads", &full),
                _ => "too many downloads are under way, and none ended in time".to_owned(),
            };
            job.end(JobEnd::Failed(places::TOO_MANY));
            return refuse(channel, id, places::TOO_MANY, &text, true).await;
        }
    };
    let opening = {
        let target = receiver.target().clone();
        let reading = target.clone();
        target.run(async move { reading.read(&path).await.map(TargetFile::open) })
    };
    let opened = match opening.await {
        Ok(Some(Ok(Ok(opened)))) => opened,
        Ok(Some(Err(error))) => {
            job.end(JobEnd::Failed(error.refusal()));
            return refuse(
                channel,
                id,
                error.refusal(),
                &error.to_string(),
                error.retry(),
            )
            .await;
        }
        Ok(Some(Ok(Err(_))) | None) | Err(_) => {
            job.end(JobEnd::Failed(Code::Internal));
            return refuse(
                channel,
                id,
                Code::Internal,
                "the server failed to read",
                true,
            )
            .await;
        }
    };
    let meta = crate::wire::MetaFields::from(opened.meta);
    let fields = FileFields {
        id,
        path: &shown,
        size: opened.size,
        mtime: meta.mtime,
        mtime_ns: meta.mtime_ns,
        mode: meta.mode,
        if_exists: None,
        resume: false,
        dirs: Vec::new(),
        run: None,
    };
    channel.send("file", &fields).await?;
    let slower = if taken.chunk() < limit.chunk() {
        &taken
    } else {
        limit
    };
    let pace = Pace::new(slower, LANES, channel.frame_limit());
    pace.adapt(&channel.stats());
    let mut pieces = opened.read(have, pace.clone(), Buffers::default(), Some(place));
    loop {
        pace.adapt(&channel.stats());
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            () = unwanted.cancelled() => {
                job.end(JobEnd::Cancelled);
                return refuse(channel, id, Code::Cancelled, "given up by the client", false).await;
            }
        };
        match piece {
            Some(Piece::Chunk { offset, bytes }) => {
                let end = offset + bytes.len() as u64;
                limit.take(bytes.len() as u64).await;
                taken.take(bytes.len() as u64).await;
                channel
                    .send_bulk("chunk", &ChunkFields { id, off: offset }, "chunk", bytes)
                    .await?;
                job.update(end, 0);
            }
            Some(Piece::Same { offset, len }) => job.update(offset + len, 0),
            Some(Piece::End { size, hash }) => {
                let fields = FinishFields {
                    id,
                    size,
                    hash: Hash(hash),
                };
                channel.send("finish", &fields).await?;
                tracing::info!(
                    path = shown,
                    bytes = size,
                    secs = began.elapsed().as_secs_f64(),
                    "sent"
                );
                job.end(JobEnd::Done);
                return Ok(None);
            }
            Some(Piece::Failed(error)) => {
                tracing::warn!(path = shown, %error, "cannot send a file");
                let changed = matches!(
                    error,
                    crate::local::error::TransferError::SourceChanged { .. }
                );
                let (code, text) = if changed {
                    (
                        Code::SourceChanged,
                        "the file changed while it was being sent",
                    )
                } else {
                    (Code::Io, "the server cannot read the file")
                };
                job.end(JobEnd::Failed(code));
                return refuse(channel, id, code, text, changed).await;
            }
            None => {
                job.end(JobEnd::Failed(Code::Internal));
                return refuse(
                    channel,
                    id,
                    Code::Internal,
                    "the server failed to read",
                    true,
                )
                .await;
            }
        }
    }
}

async fn refuse(
    channel: &Channel,
    id: u64,
    code: Code,
    message: &str,
    retry: bool,
) -> Result<Option<Code>, SendError> {
    let fields = ErrorFields::new(channel, id, code, message, retry);
    channel.send("error", &fields).await?;
    Ok(Some(code))
}
