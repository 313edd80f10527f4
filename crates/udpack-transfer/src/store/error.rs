//! Refusals of the store and failures below it, with the code that a client receives.
//!
//! Every text can be sent to a peer: it contains the peer's own relative name and numbers, never a path of the
//! server.

use std::fmt;
use std::io;

use rustix::io::Errno;

use super::{IfExists, Overwrite};
use crate::base::code::Code;
use crate::base::path::{PathError, RelPath};
use crate::base::size::format_size;

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The name breaks a rule of [`RelPath`].
    #[error(transparent)]
    Name(#[from] PathError),
    /// The name is valid, but the server's file system has no place for it.
    #[error("bad name \"{path}\": the file system cannot hold it")]
    Unstorable {
        /// The name asked for.
        path: RelPath,
    },
    /// An entry has the name and is kept.
    #[error("the name is taken: {path}")]
    Exists {
        /// The name asked for.
        path: RelPath,
    },
    /// A component above the name exists and is not a directory.
    #[error("{parent} is in the way of {path} and is not a directory")]
    Blocked {
        /// The name asked for.
        path: RelPath,
        /// The component that is not a directory.
        parent: String,
    },
    /// The client asked for a way to treat existing files that the server does not grant.
    #[error(
        "forbidden: if_exists {asked} is not allowed here, the server grants at most: {granted}"
    )]
    Forbidden {
        /// What the client asked for.
        asked: IfExists,
        /// What the server grants.
        granted: Overwrite,
    },
    /// The file is larger than one file may be.
    #[error("too large: {size} bytes, limit {limit}")]
    TooLarge {
        /// Declared size, or the bytes that would have been stored.
        size: u64,
        /// [`StoreConfig::max_file`](super::StoreConfig::max_file), or what a file can hold at all.
        limit: u64,
    },
    /// The store's quota, or the client's own, has no room for it.
    #[error("quota: needs {}, {} of {} left", Bytes(*need), Bytes(*left), Bytes(*quota))]
    Quota {
        /// Bytes asked for.
        need: u64,
        /// Bytes neither used nor reserved.
        left: u64,
        /// [`StoreConfig::quota`](super::StoreConfig::quota) or [`Tenant::quota`](super::Tenant::quota).
        quota: u64,
    },
    /// The file system has no room for it beside what must stay free.
    #[error(
        "no space: {} free on the disk{}, and this needs {}",
        Bytes(*free), kept(*keep), Bytes(*need)
    )]
    NoSpace {
        /// Bytes available and not promised to other uploads.
        free: u64,
        /// Bytes that the store keeps free.
        keep: u64,
        /// Bytes asked for.
        need: u64,
    },
    /// The file system ran full in the middle of an operation.
    #[error("no space: the disk ran out of space, {} free", Bytes(*free))]
    DiskFull {
        /// Bytes available when it happened.
        free: u64,
    },
    /// The operating system's quota for the server's account is used up.
    #[error(
        "no space: the disk quota of the account is used up, the disk has {} free",
        Bytes(*free)
    )]
    DiskQuota {
        /// Bytes available when it happened.
        free: u64,
    },
    /// The operating system's limit for the size of one file is reached.
    #[error("too large: the system sets a limit for the size of a file, and it is reached")]
    SystemLimit,
    /// Too many uploads are open on this store.
    #[error("too many uploads: limit {limit}")]
    TooManyUploads {
        /// [`StoreConfig::max_open`](super::StoreConfig::max_open).
        limit: usize,
    },
    /// Too many interrupted uploads of this owner wait to be resumed.
    #[error(
        "too many uploads: {limit} interrupted ones wait to be resumed; resume or remove them, or send without resuming"
    )]
    TooManySuspended {
        /// [`StoreConfig::max_suspended`](super::StoreConfig::max_suspended).
        limit: usize,
    },
    /// The bytes received are more or fewer than announced.
    #[error("size mismatch: expected {expected} bytes, got {got}")]
    SizeMismatch {
        /// Bytes announced.
        expected: u64,
        /// Bytes received, counting those just refused.
        got: u64,
    },
    /// The bytes received are not the bytes sent.
    #[error("hash mismatch: expected {}, got {}", Hex(expected), Hex(got))]
    HashMismatch {
        /// BLAKE3 as sent by the sender.
        expected: [u8; 32],
        /// BLAKE3 of what was received.
        got: [u8; 32],
    },
    /// No entry has the name, or a component above it is not a directory.
    #[error("not found: {path}")]
    NotFound {
        /// The name asked for.
        path: RelPath,
    },
    /// A directory has the name, where a file was asked for.
    #[error("is a directory: {path}")]
    IsDirectory {
        /// The name asked for.
        path: RelPath,
    },
    /// The entry is neither a regular file nor a directory.
    #[error("not a file: {path}")]
    NotAFile {
        /// The name asked for.
        path: RelPath,
    },
    /// The directory, or one below it, is not empty.
    #[error("not empty: {path}")]
    NotEmpty {
        /// The name asked for.
        path: RelPath,
    },
    /// The target of the link is not permitted.
    #[error("forbidden: the target of the link {path} {why}")]
    BadTarget {
        /// The name asked for.
        path: RelPath,
        /// What is wrong with the target.
        why: &'static str,
    },
    /// Another upload writes this file now.
    #[error("busy: another upload of {path} is under way")]
    Busy {
        /// The name asked for.
        path: RelPath,
    },
    /// Bytes came at another offset than the next one, and no known range fills the gap.
    #[error("bad offset: expected {expected}")]
    BadOffset {
        /// The expected offset, in bytes.
        expected: u64,
    },
    /// The sink does not support the operation.
    #[error("the server's sink cannot {what}")]
    Unsupported {
        /// The operation, as in "cannot list".
        what: &'static str,
    },
    /// The sink cannot do it now, and may be able to later.
    #[error("the server's sink failed: {why}")]
    Unavailable {
        /// The text for the client.
        why: String,
    },
    /// An earlier write of this upload failed, so that it can only be dropped.
    #[error("an earlier write of this upload failed")]
    Broken,
    /// The directory is in use by another store.
    #[error("another server uses this directory")]
    Locked,
    /// A directory lies on another file system than the staging area, so that publishing could not
    /// be atomic.
    #[error("a directory on the way is on another file system than the staging area")]
    OtherDevice,
    /// The file system can neither rename without replacing nor make hard links.
    #[error("this file system cannot publish a file without risk of replacing another")]
    NoAtomicPublish,
    /// The operating system refused.
    #[error("cannot {action}: {cause}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What the operating system said; part of the text, hence not its source.
        cause: io::Error,
    },
}

impl StoreError {
    /// The error's code on the wire.
    pub fn code(&self) -> &'static str {
        self.refusal().as_str()
    }

    /// The code for the client.
    pub fn refusal(&self) -> Code {
        match self {
            Self::Name(_) | Self::Unstorable { .. } => Code::BadName,
            Self::Exists { .. } => Code::Exists,
            Self::Blocked { .. } => Code::Blocked,
            Self::Forbidden { .. } => Code::NotGranted,
            Self::BadTarget { .. } => Code::BadTarget,
            Self::NotFound { .. } => Code::NotFound,
            Self::IsDirectory { .. } => Code::IsDirectory,
            Self::NotAFile { .. } => Code::NotAFile,
            Self::NotEmpty { .. } => Code::NotEmpty,
            Self::TooLarge { .. } => Code::TooLarge,
            Self::SystemLimit => Code::SystemLimit,
            Self::Quota { .. } => Code::Quota,
            Self::NoSpace { .. } | Self::DiskFull { .. } | Self::DiskQuota { .. } => Code::NoSpace,
            Self::TooManyUploads { .. } => Code::TooManyUploads,
            Self::TooManySuspended { .. } => Code::TooManySuspended,
            Self::SizeMismatch { .. } => Code::SizeMismatch,
            Self::HashMismatch { .. } => Code::HashMismatch,
            Self::Busy { .. } => Code::Busy,
            Self::BadOffset { .. } => Code::BadOffset,
            Self::OtherDevice | Self::Io { .. } => Code::Io,
            Self::Unsupported { .. } => Code::Unsupported,
            Self::Unavailable { .. } | Self::Broken | Self::Locked | Self::NoAtomicPublish => {
                Code::Internal
            }
        }
    }

    /// Whether the same request may succeed later, or when the bytes are sent again.
    pub fn retry(&self) -> bool {
        match self {
            Self::Quota { .. }
            | Self::NoSpace { .. }
            | Self::DiskFull { .. }
            | Self::DiskQuota { .. }
            | Self::TooManyUploads { .. }
            | Self::HashMismatch { .. }
            | Self::Busy { .. }
            | Self::Unavailable { .. }
            | Self::Broken
            | Self::Locked => true,
            Self::Io { cause, .. } => matches!(
                Errno::from_io_error(cause),
                Some(
                    Errno::MFILE
                        | Errno::NFILE
                        | Errno::NOMEM
                        | Errno::AGAIN
                        | Errno::INTR
                        | Errno::BUSY
                )
            ),
            Self::Name(_)
            | Self::Unstorable { .. }
            | Self::Exists { .. }
            | Self::Blocked { .. }
            | Self::Forbidden { .. }
            | Self::NotFound { .. }
            | Self::IsDirectory { .. }
            | Self::NotAFile { .. }
            | Self::NotEmpty { .. }
            | Self::Unsupported { .. }
            | Self::BadTarget { .. }
            | Self::TooLarge { .. }
            | Self::SystemLimit
            | Self::SizeMismatch { .. }
            | Self::BadOffset { .. }
            | Self::TooManySuspended { .. }
            | Self::OtherDevice
            | Self::NoAtomicPublish => false,
        }
    }

    /// Converts an error of the operating system into a `StoreError` and logs it. All such errors are logged here.
    ///
    /// `free` is asked only when the disk is full.
    pub(super) fn io(
        action: &'static str,
        path: Option<&RelPath>,
        cause: io::Error,
        free: impl FnOnce() -> u64,
    ) -> Self {
        let errno = Errno::from_io_error(&cause);
        tracing::warn!(
            action,
            path = path.map(tracing::field::display),
            errno = cause.raw_os_error(),
            error = %cause,
            "store operation failed"
        );
        match (errno, path) {
            (Some(Errno::NOSPC), _) => Self::DiskFull { free: free() },
            (Some(Errno::DQUOT), _) => Self::DiskQuota { free: free() },
            (Some(Errno::FBIG), _) => Self::SystemLimit,
            (Some(Errno::XDEV), _) => Self::OtherDevice,
            (Some(Errno::NAMETOOLONG | Errno::ILSEQ), Some(path)) => {
                Self::Unstorable { path: path.clone() }
            }
            _ => Self::Io { action, cause },
        }
    }
}

/// A size for people.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format_size(self.0))
    }
}

/// What of the free space stays free, in words.
fn kept(keep: u64) -> String {
    match keep {
        0 => String::new(),
        keep => format!(", {} of it stay free", Bytes(keep)),
    }
}

struct Hex<'a>(&'a [u8; 32]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(*self.0).to_hex().as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_and_names_have_their_own_codes() {
        let path: RelPath = "a".parse().unwrap();
        let code = |errno: Errno| StoreError::io("write", Some(&path), errno.into(), || 7).code();
        assert_eq!(code(Errno::NOSPC), "no_space");
        assert_eq!(code(Errno::DQUOT), "no_space");
        assert_eq!(code(Errno::FBIG), "too_large");
        assert_eq!(code(Errno::NAMETOOLONG), "bad_name");
        assert_eq!(code(Errno::IO), "io");
        assert_eq!(code(Errno::ROFS), "io");
        assert_eq!(
            StoreError::io("write", None, Errno::NOSPC.into(), || 7_000).to_string(),
            "no space: the disk ran out of space, 6.8 KiB free"
        );
    }
}
