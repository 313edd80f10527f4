//! Where the bytes of an upload come from, and the blocking task that reads and hashes them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::TransferError;
use crate::path::RelPath;
use crate::wire::CHUNK;

/// Chunks read ahead of the network.
const AHEAD: usize = 4;

/// One thing to upload: bytes from somewhere, and the name they shall have at the server.
#[derive(Debug, Clone)]
pub struct Source {
    pub(crate) remote: RelPath,
    pub(crate) bytes: From,
}

#[derive(Debug, Clone)]
pub(crate) enum From {
    File(PathBuf),
    Memory(Bytes),
}

impl Source {
    /// A local file. It is opened when its turn comes; it must not change while it is being sent.
    pub fn file(local: impl Into<PathBuf>, remote: RelPath) -> Self {
        Self {
            remote,
            bytes: From::File(local.into()),
        }
    }

    /// Bytes in memory.
    pub fn bytes(bytes: impl Into<Bytes>, remote: RelPath) -> Self {
        Self {
            remote,
            bytes: From::Memory(bytes.into()),
        }
    }

    /// The name at the server.
    pub fn remote(&self) -> &RelPath {
        &self.remote
    }

    /// The size as of now, if it can be told: for totals, before anything is sent.
    pub(crate) fn size(&self) -> Option<u64> {
        match &self.bytes {
            From::File(path) => {
                let metadata = std::fs::metadata(path).ok()?;
                metadata.is_file().then_some(metadata.len())
            }
            From::Memory(bytes) => Some(bytes.len() as u64),
        }
    }

    fn shown(&self) -> &Path {
        match &self.bytes {
            From::File(path) => path,
            From::Memory(_) => Path::new(self.remote.as_str()),
        }
    }

    /// Opens it.
    pub(crate) fn open(&self) -> Result<Opened, TransferError> {
        let failed = |source| TransferError::Source {
            path: self.shown().to_owned(),
            source,
        };
        match &self.bytes {
            From::Memory(bytes) => Ok(Opened {
                size: bytes.len() as u64,
                mtime: None,
                from: OpenedFrom::Memory(bytes.clone()),
            }),
            From::File(path) => {
                // Looked at before it is opened: opening a FIFO would wait for its other end.
                if !std::fs::metadata(path).map_err(failed)?.is_file() {
                    return Err(TransferError::NotAFile { path: path.clone() });
                }
                let file = File::open(path).map_err(failed)?;
                let metadata = file.metadata().map_err(failed)?;
                let modified = metadata.modified().ok();
                Ok(Opened {
                    size: metadata.len(),
                    mtime: modified.and_then(unix_seconds),
                    from: OpenedFrom::File {
                        path: path.clone(),
                        file,
                        modified,
                    },
                })
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) size: u64,
    pub(crate) mtime: Option<i64>,
    from: OpenedFrom,
}

#[derive(Debug)]
enum OpenedFrom {
    File {
        path: PathBuf,
        file: File,
        modified: Option<SystemTime>,
    },
    Memory(Bytes),
}

/// What a reader delivers: chunks in order, then the hash of them all, or an error.
#[derive(Debug)]
pub(crate) enum Piece {
    Chunk(Bytes),
    End { hash: [u8; 32] },
    Failed(TransferError),
}

impl Opened {
    /// Reads on the blocking pool, hashing on the way, at most a few chunks ahead of whoever takes them.
    /// Dropping the receiver ends it.
    pub(crate) fn read(self) -> mpsc::Receiver<Piece> {
        let (pieces, taken) = mpsc::channel(AHEAD);
        tokio::task::spawn_blocking(move || {
            let end = match self.pump(|chunk| pieces.blocking_send(Piece::Chunk(chunk)).is_ok()) {
                Ok(Some(hash)) => Piece::End { hash },
                Ok(None) => return,
                Err(error) => Piece::Failed(error),
            };
            let _ = pieces.blocking_send(end);
        });
        taken
    }

    /// The hash of everything, without sending anything; blocks.
    pub(crate) fn hash(self) -> Result<[u8; 32], TransferError> {
        Ok(self.pump(|_| true)?.unwrap_or_default())
    }

    /// Hands every chunk to `take` until it says no; `None` if it did.
    fn pump(self, mut take: impl FnMut(Bytes) -> bool) -> Result<Option<[u8; 32]>, TransferError> {
        let mut hasher = blake3::Hasher::new();
        match self.from {
            OpenedFrom::Memory(mut bytes) => {
                while !bytes.is_empty() {
                    let chunk = bytes.split_to(bytes.len().min(CHUNK));
                    hasher.update(&chunk);
                    if !take(chunk) {
                        return Ok(None);
                    }
                }
            }
            OpenedFrom::File {
                path,
                mut file,
                modified,
            } => {
                let mut left = self.size;
                while left > 0 {
                    let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
                    let chunk =
                        read_full(&mut file, want).map_err(|source| TransferError::Source {
                            path: path.clone(),
                            source,
                        })?;
                    if chunk.len() < want {
                        return Err(TransferError::SourceChanged { path });
                    }
                    left -= chunk.len() as u64;
                    hasher.update(&chunk);
                    if !take(chunk) {
                        return Ok(None);
                    }
                }
                let now = file.metadata().map_err(|source| TransferError::Source {
                    path: path.clone(),
                    source,
                })?;
                if now.len() != self.size || now.modified().ok() != modified {
                    return Err(TransferError::SourceChanged { path });
                }
            }
        }
        Ok(Some(*hasher.finalize().as_bytes()))
    }
}

/// `want` bytes, fewer only at the end of the file.
fn read_full(file: &mut File, want: usize) -> std::io::Result<Bytes> {
    let mut buffer = vec![0; want];
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(filled);
    Ok(Bytes::from(buffer))
}

fn unix_seconds(time: SystemTime) -> Option<i64> {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).ok(),
        Err(before) => i64::try_from(before.duration().as_secs())
            .ok()
            .map(|secs| -secs),
    }
}
