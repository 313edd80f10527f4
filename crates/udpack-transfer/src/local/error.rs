//! Errors of a transfer, by the side whose fault they are.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use udpack::{CloseCode, CloseReason, ConnectError, OpenError, RecvError, Side};

use crate::base::code::{Code, ErrorKind};
use crate::store::StoreError;

/// Why one file was not transferred.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The local file cannot be read.
    #[error("cannot read {}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The local path is not a regular file.
    #[error("not a regular file: {}", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// What a directory holds is a device, a socket or a pipe.
    #[error("neither file, directory nor link: {}", path.display())]
    Special {
        /// The path.
        path: PathBuf,
    },
    /// The local file's name is not a valid name at the server.
    #[error("cannot send {}: {reason}", path.display())]
    Name {
        /// The file.
        path: PathBuf,
        /// The rule it breaks, as a sentence without a capital.
        reason: String,
    },
    /// The local file changed while it was being sent; nothing of it was stored.
    #[error("file changed while it was being sent: {}: {change}", path.display())]
    SourceChanged {
        /// The file.
        path: PathBuf,
        /// How the change was detected, as a sentence without a capital.
        change: String,
    },
    /// The server refused the file, or failed to store it.
    #[error("{message}")]
    Refused {
        /// The code of `docs/PROTOCOL.md` §11.
        code: Code,
        /// The server's sentence.
        message: String,
        /// Whether the same again, later, makes sense.
        retry: bool,
    },
    /// The server's hash differs from this side's, although it sent `done`.
    #[error("the server stored other bytes than were sent")]
    Mismatch,
    /// The local store refused the file, or could not store it; downloads only.
    #[error(transparent)]
    Store(Arc<StoreError>),
    /// The writer of a [`Fetch`](crate::Fetch) failed.
    #[error("cannot write what arrived")]
    Write(#[source] io::Error),
    /// The connection or the lane ended first: whether the file was stored is unknown. Asking again with
    /// [`IfExists::Same`](crate::IfExists::Same) settles it.
    #[error("{}", closed(.0))]
    Closed(CloseReason),
    /// There is no connection to the server, and reconnecting does not help or was given up. All affected files share
    /// the error.
    #[error(transparent)]
    Connect(Arc<ConnectError>),
    /// The server sent nothing for this long although an answer was due.
    #[error("the server said nothing for {0:?}")]
    Silent(Duration),
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
}

impl TransferError {
    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Source { .. } | Self::NotAFile { .. } | Self::Special { .. } | Self::Write(_) => {
                ErrorKind::LocalFile
            }
            Self::Name { .. } => ErrorKind::Policy,
            Self::SourceChanged { .. } | Self::Mismatch => ErrorKind::Integrity,
            Self::Closed(_) | Self::Silent(_) => ErrorKind::Network,
            Self::Connect(error) if error.is_auth() => ErrorKind::Auth,
            Self::Connect(_) => ErrorKind::Network,
            Self::Protocol(_) => ErrorKind::Other,
            Self::Refused { code, .. } => code.kind(),
            Self::Store(error) => match error.refusal().kind() {
                ErrorKind::RemoteStorage | ErrorKind::Other => ErrorKind::LocalFile,
                ErrorKind::NotFound => ErrorKind::Policy,
                kind => kind,
            },
        }
    }

    /// Whether the same again, later, makes sense.
    pub fn retry(&self) -> bool {
        match self {
            Self::Refused { retry, .. } => *retry,
            Self::Store(error) => error.retry(),
            Self::Closed(reason) => reason.retry,
            Self::Connect(error) => error.retry(),
            Self::Silent(_) | Self::SourceChanged { .. } | Self::Mismatch => true,
            Self::Source { .. }
            | Self::NotAFile { .. }
            | Self::Special { .. }
            | Self::Name { .. }
            | Self::Write(_)
            | Self::Protocol(_) => false,
        }
    }
}

/// A server that refuses a whole channel gives its reason in the close; any other end came before an answer.
fn closed(reason: &CloseReason) -> String {
    match reason.code {
        CloseCode::REFUSED => format!("the server refused it: {}", reason.text),
        _ => format!("the connection ended before the server answered: {reason}"),
    }
}

/// Copies an error of the system.
fn same(error: &io::Error) -> io::Error {
    error
        .raw_os_error()
        .map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

impl From<RecvError> for TransferError {
    fn from(error: RecvError) -> Self {
        Self::Closed(error.reason().clone())
    }
}

impl From<OpenError> for TransferError {
    fn from(error: OpenError) -> Self {
        let reason = |code, text: String| Self::Closed(CloseReason::new(code, text, Side::Peer));
        match error {
            OpenError::Closed(reason) => Self::Closed(reason),
            OpenError::GoingAway(goaway) => reason(goaway.code, goaway.text),
            OpenError::TooManyChannels(_) => reason(CloseCode::SERVER_BUSY, error.to_string()),
            OpenError::NoConnection(_) => reason(CloseCode::TIMED_OUT, error.to_string()),
            other => Self::Protocol(other.to_string()),
        }
    }
}

impl TransferError {
    /// Copies the error, for the next affected file.
    pub(crate) fn again(&self) -> Self {
        match self {
            Self::Closed(reason) => Self::Closed(reason.clone()),
            Self::Connect(error) => Self::Connect(error.clone()),
            Self::Silent(time) => Self::Silent(*time),
            Self::NotAFile { path } => Self::NotAFile { path: path.clone() },
            Self::Special { path } => Self::Special { path: path.clone() },
            Self::Name { path, reason } => Self::Name {
                path: path.clone(),
                reason: reason.clone(),
            },
            Self::SourceChanged { path, change } => Self::SourceChanged {
                path: path.clone(),
                change: change.clone(),
            },
            Self::Source { path, source } => Self::Source {
                path: path.clone(),
                source: same(source),
            },
            Self::Write(error) => Self::Write(same(error)),
            Self::Refused {
                code,
                message,
                retry,
            } => Self::Refused {
                code: *code,
                message: message.clone(),
                retry: *retry,
            },
            Self::Store(error) => Self::Store(error.clone()),
            Self::Mismatch => Self::Mismatch,
            Self::Protocol(text) => Self::Protocol(text.clone()),
        }
    }
}
