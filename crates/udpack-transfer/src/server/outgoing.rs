//! The downloads of one lane: files read from the store and sent, one after the other, in the order asked.

use std::time::Instant;

use tokio::sync::mpsc;
use udpack::{Channel, CloseCode, Place, SendError, Tenant};

use crate::base::code::Code;
use crate::base::path::RelPath;
use crate::base::phase::Phase;
use crate::local::error::TransferError;
use crate::local::limiter::{Limiter, Pace};
use crate::local::source::{Buffers, Known, Opened, Piece};
use crate::server::hook::{Access, HookAccess};
use crate::server::jobs::{Job, JobEnd};
use crate::server::places;
use crate::server::receiver::Receiver;
use crate::server::upload::{Outcome, Outcomes};
use crate::staging::target::TargetFile;
use crate::store::{BadXattrs, StoreError, XattrList, Xattrs};
use crate::wire::{
    Bin, ChunkFields, ErrorFields, FileFields, FinishFields, Have, HoleFields, MetaFields,
    XattrFields,
};

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
    /// The client takes holes.
    pub(crate) holes: bool,
    /// The extended attributes that it asks for.
    pub(crate) xattrs: Xattrs,
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

/// Why a file is not sent, or not to its end.
enum Failed {
    Refused {
        code: Code,
        text: String,
        retry: bool,
    },
    /// The lane takes no more.
    Lane(SendError),
}

impl Failed {
    fn refused(code: Code, text: impl Into<String>, retry: bool) -> Self {
        let text = text.into();
        Self::Refused { code, text, retry }
    }

    fn given_up(wanted: &Wanted) -> Self {
        Self::refused(Code::Cancelled, wanted.job.cancelled(), false)
    }

    fn unread() -> Self {
        Self::refused(Code::Internal, "the server failed to read", true)
    }
}

impl From<SendError> for Failed {
    fn from(error: SendError) -> Self {
        Self::Lane(error)
    }
}

/// Sends one file; the code if it failed.
async fn send(
    receiver: &Receiver,
    channel: &Channel,
    tenant: &Tenant,
    mut wanted: Wanted,
) -> Result<Option<Code>, SendError> {
    let have = std::mem::take(&mut wanted.have);
    match try_send(receiver, channel, tenant, &wanted, have).await {
        Ok(()) => {
            wanted.job.end(JobEnd::Done);
            Ok(None)
        }
        Err(Failed::Lane(error)) => Err(error),
        Err(Failed::Refused { code, text, retry }) => {
            match code {
                Code::Cancelled => wanted.job.end(JobEnd::Cancelled),
                // A client may ask so whether it is a file.
                Code::IsDirectory => wanted.job.void(JobEnd::Failed(code, text.clone())),
                code => wanted.job.end(JobEnd::Failed(code, text.clone())),
            }
            refuse(channel, wanted.id, code, &text, retry).await
        }
    }
}

async fn try_send(
    receiver: &Receiver,
    channel: &Channel,
    tenant: &Tenant,
    wanted: &Wanted,
    have: Have,
) -> Result<(), Failed> {
    let began = Instant::now();
    if wanted.unwanted.is_cancelled() {
        return Err(Failed::given_up(wanted));
    }
    allow(receiver, channel, &wanted.path).await?;
    let place = place(receiver, tenant, wanted).await?;
    let (opened, xattrs) = open(receiver, wanted).await?;
    if let Some(size) = opened.size {
        wanted.job.sized(size);
    }
    wanted.job.notes().phase(Phase::Sending);
    announce(channel, wanted, &opened, xattrs.as_ref()).await?;
    let (limit, taken) = (&receiver.limit_out, &wanted.taken);
    let slower = if taken.chunk() < limit.chunk() {
        taken
    } else {
        limit
    };
    let pace = Pace::new(slower, LANES, channel.frame_limit());
    pace.adapt(&channel.stats());
    let known = Known {
        have,
        base: None,
        holes: wanted.holes,
        may_tear: false,
    };
    let pieces = opened.read(known, pace.clone(), Buffers::default(), Some(place));
    let bytes = send_pieces(channel, wanted, limit, &pace, pieces).await?;
    let secs = began.elapsed().as_secs_f64();
    tracing::info!(path = wanted.shown, bytes, secs, "sent");
    Ok(())
}

/// Asks the hook, if there is one.
async fn allow(receiver: &Receiver, channel: &Channel, path: &RelPath) -> Result<(), Failed> {
    let Some(hook) = &receiver.hook else {
        return Ok(());
    };
    let peer = channel.peer();
    let what = HookAccess {
        path: path.as_str().to_owned(),
        access: Access::Read,
        peer: peer.map_or_else(String::new, |peer| peer.id().to_owned()),
    };
    let allowed = hook.allow(&what).await;
    allowed.map_err(|reason| Failed::refused(Code::Forbidden, reason, false))
}

/// A place among the downloads. The thread that reads has it until it is through.
async fn place(receiver: &Receiver, tenant: &Tenant, wanted: &Wanted) -> Result<Place, Failed> {
    let taking = receiver.places.downloads.take(tenant);
    let place = tokio::select! {
        place = tokio::time::timeout(receiver.config.turn, taking) => place,
        () = wanted.unwanted.cancelled() => return Err(Failed::given_up(wanted)),
    };
    let text = match place {
        Ok(Ok(place)) => return Ok(place),
        Ok(Err(full)) => places::too_many("downloads", &full),
        Err(_) => "too many downloads are under way, and none ended in time".to_owned(),
    };
    Err(Failed::refused(places::TOO_MANY, text, true))
}

/// Opens a file, with the extended attributes that are asked for if this server gives such ones.
async fn open(receiver: &Receiver, wanted: &Wanted) -> Result<(Opened, Option<XattrList>), Failed> {
    let target = receiver.target().clone();
    let (reading, path) = (target.clone(), wanted.path.clone());
    let granted = target
        .store()
        .map_or(Xattrs::None, |store| store.config().xattrs);
    let which = wanted.xattrs;
    let gives = which != Xattrs::None && which <= granted;
    let opening = target.run(async move {
        let file: TargetFile = reading.read(&path).await?;
        Ok::<_, StoreError>(file.open().and_then(|opened| {
            let xattrs = gives.then(|| opened.xattrs(which)).transpose()?;
            Ok((opened, xattrs))
        }))
    });
    match opening.await {
        Ok(Some(Ok(Ok(opened)))) => Ok(opened),
        Ok(Some(Ok(Err(error)))) if BadXattrs::caused(&error) => {
            Err(Failed::refused(Code::TooLarge, error.to_string(), false))
        }
        Ok(Some(Err(error))) => {
            let (code, retry) = (error.refusal(), error.retry());
            Err(Failed::refused(code, error.to_string(), retry))
        }
        Ok(Some(Ok(Err(_))) | None) | Err(_) => Err(Failed::unread()),
    }
}

/// Says what comes.
async fn announce(
    channel: &Channel,
    wanted: &Wanted,
    opened: &Opened,
    xattrs: Option<&XattrList>,
) -> Result<(), SendError> {
    let meta = MetaFields::from(opened.meta);
    let fields = FileFields {
        id: wanted.id,
        path: &wanted.shown,
        size: opened.size,
        mtime: meta.mtime,
        mtime_ns: meta.mtime_ns,
        mode: meta.mode,
        if_exists: None,
        resume: false,
        dirs: Vec::new(),
        run: None,
        base: None,
        xattrs: xattrs.map(XattrFields),
    };
    channel.send("file", &fields).await
}

/// Sends what is read until its end; returns its size.
async fn send_pieces(
    channel: &Channel,
    wanted: &Wanted,
    limit: &Limiter,
    pace: &Pace,
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<u64, Failed> {
    let (id, job) = (wanted.id, &wanted.job);
    loop {
        pace.adapt(&channel.stats());
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            () = wanted.unwanted.cancelled() => return Err(Failed::given_up(wanted)),
        };
        match piece {
            Some(Piece::Chunk { offset, bytes }) => {
                let len = bytes.len() as u64;
                limit.take(len).await;
                wanted.taken.take(len).await;
                let fields = ChunkFields { id, off: offset };
                channel.send_bulk("chunk", &fields, "chunk", bytes).await?;
                job.update(offset + len, 0);
            }
            // Without chunks of a base nothing is found in one.
            Some(Piece::Copy { offset, len, .. } | Piece::Same { offset, len }) => {
                job.update(offset + len, 0);
                job.skip(offset + len);
            }
            Some(Piece::Hole { offset, len }) => {
                let off = offset;
                channel.send("hole", &HoleFields { id, off, len }).await?;
                job.update(offset + len, 0);
                job.skip(offset + len);
            }
            Some(Piece::End { size, hash, .. }) => {
                let hash = Bin(hash);
                channel
                    .send("finish", &FinishFields { id, size, hash })
                    .await?;
                return Ok(size);
            }
            Some(Piece::Failed(error)) => {
                tracing::warn!(path = wanted.shown, %error, "cannot send a file");
                return Err(if matches!(error, TransferError::SourceChanged { .. }) {
                    let text = "the file changed while it was being sent";
                    Failed::refused(Code::SourceChanged, text, true)
                } else {
                    Failed::refused(Code::Io, "the server cannot read the file", false)
                });
            }
            None => return Err(Failed::unread()),
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
