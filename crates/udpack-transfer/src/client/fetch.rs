//! [`Fetch`]: one file of a server into memory, or into anything else that bytes can be written to.
//!
//! Nothing is stored on the way, so bytes are written before all of them are known to be right. The last ones are
//! held back until they are: a complete file is a verified one.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::time::Instant;
use udpack::{Channel, CloseCode, Priority, Socket};

use crate::base::code::Code;
use crate::base::path::RelPath;
use crate::client::downloader::{ACK, BREAKS, HASHED, SILENCE};
use crate::client::link::{Link, Loss};
use crate::client::progress::{LostXattrs, Outcome, Progress};
use crate::client::uploader::lane_end;
use crate::local::error::TransferError;
use crate::local::limiter::Limiter;
use crate::store::{Meta, StoreError};
use crate::wire::CHANNEL;
use crate::wire::{self, AckFields, Finish, GetFields, Have, IdField, Reply};

/// How to fetch a file without a store.
///
/// What it holds at a time is two messages of the server, besides the window of the connection.
#[derive(Debug, Clone)]
#[must_use = "nothing is fetched until `read` is called"]
pub struct Fetch {
    link: Link,
    limit: Limiter,
    progress: Option<watch::Sender<Progress>>,
}

/// A file that was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fetched {
    /// Its name at the server.
    pub path: String,
    /// Its size in bytes, all of which were written.
    pub size: u64,
    /// BLAKE3 of them, computed on both sides.
    pub hash: [u8; 32],
    /// Bytes that came over the network for it: as many, unless a lost connection cost some.
    pub received: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// Its modification time and permissions at the server.
    pub meta: Meta,
}

impl From<Fetched> for Outcome {
    fn from(fetched: Fetched) -> Self {
        Self {
            index: 0,
            path: fetched.path,
            size: fetched.size,
            hash: fetched.hash,
            sent: fetched.received,
            resumed: 0,
            copied: 0,
            holes: 0,
            torn: false,
            same: false,
            skipped: false,
            sync: None,
            other_time: None,
            lost_xattrs: LostXattrs::None,
            elapsed: fetched.elapsed,
        }
    }
}

/// A file that was not fetched whole.
#[derive(Debug)]
pub struct FetchError {
    /// Bytes that the writer has taken. They are the beginning of the file at best, and other bytes at worst: discard
    /// them.
    pub written: u64,
    /// Why.
    pub cause: TransferError,
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.written {
            0 => f.write_str("nothing of the file was written"),
            written => write!(
                f,
                "the file did not arrive whole, and the {written} bytes written of it must be discarded"
            ),
        }
    }
}

impl std::error::Error for FetchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

impl Fetch {
    /// Fetches over this link.
    pub fn new(link: impl Into<Link>) -> Self {
        Self {
            link: link.into(),
            limit: Limiter::unlimited(),
            progress: None,
        }
    }

    /// How fast bytes are taken from the server. Defaults to no limit.
    pub fn limit(mut self, limit: Limiter) -> Self {
        self.limit = limit;
        self
    }

    /// Stores the progress here whenever bytes have arrived. A slow watcher sees the latest value.
    pub fn progress(mut self, progress: watch::Sender<Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Writes the file to `writer` and flushes it: a `Vec<u8>`, a pipe, a program's input.
    ///
    /// The last bytes are written only when size and hash of all of them are the server's: on an error the writer
    /// never has the whole file, and on success it has nothing else. A writer that is slow slows the server down. Where the
    /// [`Link`] can be mended, a lost connection costs none of the bytes that were written: the rest follows on the next
    /// one, if the server's file still begins with them.
    ///
    /// # Errors
    /// [`FetchError`] says how many bytes were written in vain. Its cause is [`TransferError::Refused`] where the server
    /// does not send the file, and with `source_changed` where it changed; [`TransferError::Write`] where the writer
    /// fails; [`TransferError::Store`] where size or hash are not what the server said; or one of the connection.
    ///
    /// # Cancel safety
    /// Not cancel safe. Dropping it gives the file up: what was written of it stays written, and must be discarded.
    pub async fn read<W>(&self, path: &RelPath, writer: &mut W) -> Result<Fetched, FetchError>
    where
        W: AsyncWrite + Unpin + ?Sized,
    {
        let mut arriving = Arriving {
            fetch: self,
            path,
            writer,
            hasher: Box::default(),
            held: Bytes::new(),
            written: 0,
            received: 0,
            since: Instant::now(),
            file: None,
        };
        let read = arriving.run().await;
        read.map_err(|cause| FetchError {
            written: arriving.written,
            cause,
        })
    }
}

/// The only file of its lane.
const ID: u64 = 1;

/// One file on its way.
struct Arriving<'a, W: ?Sized> {
    fetch: &'a Fetch,
    path: &'a RelPath,
    writer: &'a mut W,
    /// Has taken in all that has come.
    hasher: Box<blake3::Hasher>,
    /// The last bytes that have come.
    held: Bytes,
    written: u64,
    /// Bytes that have come, those included that were not wanted.
    received: u64,
    since: Instant,
    /// What the server said of it first.
    file: Option<(u64, Meta)>,
}

impl<W: AsyncWrite + Unpin + ?Sized> Arriving<'_, W> {
    /// Lane after lane, when they are lost.
    async fn run(&mut self) -> Result<Fetched, TransferError> {
        let mut breaks = 0;
        loop {
            let before = self.hasher.count();
            let socket = self.fetch.link.eager().await?;
            let error = match self.lane(&socket).await {
                Ok(fetched) => return Ok(fetched),
                Err(error) => error,
            };
            let moved = self.hasher.count() > before;
            tracing::debug!(%error, "a lane ended");
            if breaks + 1 >= BREAKS && !moved {
                return Err(error);
            }
            match self.fetch.link.lost(&socket, error).await? {
                Loss::Lane => breaks = if moved { 1 } else { breaks + 1 },
                Loss::Admission => {}
            }
        }
    }

    async fn lane(&mut self, socket: &Socket) -> Result<Fetched, TransferError> {
        let channel = socket
            .channel(CHANNEL)
            .priority(Priority::Bulk)
            .open()
            .await?;
        let taken = self.take(socket, &channel).await;
        let (code, text) = match &taken {
            Ok(_) => (CloseCode::NORMAL, ""),
            Err(_) => (CloseCode::CANCELLED, "the lane failed"),
        };
        drop(channel.close(code, text));
        taken
    }

    async fn take(&mut self, socket: &Socket, channel: &Channel) -> Result<Fetched, TransferError> {
        let position = self.hasher.count();
        let mut have = Have::new();
        if position > 0 {
            have.push((0, position, self.hasher.finalize().into()));
        }
        let wish = GetFields {
            id: ID,
            path: self.path.as_str(),
            have: wire::ranges(&have),
            rate: self.fetch.limit.rate(),
            holes: false,
            xattrs: None,
        };
        let lost = || TransferError::Closed(lane_end(channel, socket));
        if channel.send("get", &wish).await.is_err() {
            return Err(lost());
        }
        // While it compares, the server is silent.
        let patience = SILENCE + Duration::from_secs(position / HASHED);
        let mut begun = false;
        let mut acked = Instant::now();
        loop {
            let message = tokio::time::timeout(patience, channel.recv())
                .await
                .map_err(|_| TransferError::Silent(SILENCE))??;
            let Some(message) = message else {
                return Err(lost());
            };
            let reply = wire::decode_reply(&message)
                .map_err(|error| TransferError::Protocol(error.to_string()))?;
            match reply {
                Some(Reply::File {
                    id: ID, size, meta, ..
                }) if !begun => {
                    begun = true;
                    match self.file {
                        Some((known, _)) if known != size => return Err(changed()),
                        Some(_) => {}
                        None => self.file = Some((size, meta.into())),
                    }
                    self.tell();
                }
                Some(Reply::Chunk {
                    id: ID,
                    offset,
                    bytes,
                }) if begun => {
                    self.chunk(offset, bytes, position).await?;
                    let now = Instant::now();
                    if now - acked >= ACK {
                        acked = now;
                        let recv = self.hasher.count();
                        let (id, safe) = (ID, 0);
                        if channel
                            .send("ack", &AckFields { id, recv, safe })
                            .await
                            .is_err()
                        {
                            return Err(lost());
                        }
                    }
                }
                Some(Reply::Finish(Finish {
                    id: ID,
                    size: Some(size),
                    hash: Some(hash),
                })) if begun => {
                    let fetched = self.finish(size, hash).await?;
                    // Nothing depends on it.
                    let _ = channel.send("done", &IdField { id: ID }).await;
                    return Ok(fetched);
                }
                Some(Reply::Error {
                    id: ID,
                    code,
                    why,
                    message,
                    retry,
                }) => {
                    return Err(TransferError::Refused {
                        code: Code::read(&code, why.as_deref()),
                        message,
                        retry,
                    });
                }
                Some(
                    Reply::File { .. } | Reply::Chunk { .. } | Reply::Hole(_) | Reply::Finish(_),
                ) => {
                    let text = "a download that was not asked for, or twice".to_owned();
                    return Err(TransferError::Protocol(text));
                }
                // A sign of life, or of a later version.
                Some(_) | None => {}
            }
        }
    }

    /// Takes the next bytes; `told` is how many the server knows to be here already.
    async fn chunk(&mut self, offset: u64, bytes: Bytes, told: u64) -> Result<(), TransferError> {
        let position = self.hasher.count();
        let size = self.file.map_or(0, |(size, _)| size);
        let len = bytes.len() as u64;
        self.received = self.received.saturating_add(len);
        let got = offset.saturating_add(len);
        if got > size {
            return Err(wrong(StoreError::SizeMismatch {
                expected: size,
                got,
            }));
        }
        if offset != position {
            // What was written is not its beginning any more.
            return Err(match offset < told && position == told {
                true => changed(),
                false => wrong(StoreError::BadOffset { expected: position }),
            });
        }
        self.fetch.limit.take(len).await;
        self.hasher.update(&bytes);
        let before = std::mem::replace(&mut self.held, bytes);
        self.write(&before).await?;
        self.fetch.link.progressed();
        self.tell();
        Ok(())
    }

    /// All has come: is it right?
    async fn finish(&mut self, told: u64, expected: [u8; 32]) -> Result<Fetched, TransferError> {
        let (size, meta) = self.file.unwrap_or_default();
        let got = self.hasher.count();
        if told != size || got != size {
            let got = if told == size { got } else { told };
            return Err(wrong(StoreError::SizeMismatch {
                expected: size,
                got,
            }));
        }
        let hash: [u8; 32] = self.hasher.finalize().into();
        if hash != expected {
            let got = hash;
            return Err(wrong(StoreError::HashMismatch { expected, got }));
        }
        let last = std::mem::take(&mut self.held);
        self.write(&last).await?;
        self.writer.flush().await.map_err(TransferError::Write)?;
        if let Some(progress) = &self.fetch.progress {
            progress.send_modify(|progress| {
                progress.acked = size;
                progress.files_done = 1;
            });
        }
        Ok(Fetched {
            path: self.path.as_str().to_owned(),
            size,
            hash,
            received: self.received,
            elapsed: self.since.elapsed(),
            meta,
        })
    }

    async fn write(&mut self, mut bytes: &[u8]) -> Result<(), TransferError> {
        while !bytes.is_empty() {
            match self.writer.write(bytes).await {
                Ok(0) => return Err(TransferError::Write(io::ErrorKind::WriteZero.into())),
                Ok(count) => {
                    self.written += count as u64;
                    bytes = bytes.get(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TransferError::Write(error)),
            }
        }
        Ok(())
    }

    fn tell(&self) {
        let (Some(to), Some((size, _))) = (&self.fetch.progress, self.file) else {
            return;
        };
        let came = self.hasher.count();
        to.send_replace(Progress {
            // The last byte counts only when all of them are right.
            acked: came.min(size.saturating_sub(1)),
            total: size,
            files_done: 0,
            files: 1,
            listed: true,
            sized: true,
            moved: came,
        });
    }
}

fn wrong(error: StoreError) -> TransferError {
    TransferError::Store(Arc::new(error))
}

fn changed() -> TransferError {
    TransferError::Refused {
        code: Code::SourceChanged,
        message: "the file changed at the server while it was read".to_owned(),
        retry: true,
    }
}
