//! What goes wrong in an object store, as the errors that clients are told.
//!
//! The text for a client names neither bucket nor key nor what the store says: that goes to the log.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use object_store::Error as Cause;
use udpack_transfer::{RelPath, StoreError};

/// Why an object store cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The address is none that is known.
    #[error(
        "cannot use {url}: an object store is s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///DIRECTORY"
    )]
    Address {
        /// The address.
        url: String,
    },
    /// Settings of the environment are missing or wrong.
    #[error("cannot use {url}")]
    Settings {
        /// The address.
        url: String,
        /// What the crate `object_store` says.
        #[source]
        cause: Box<Cause>,
    },
    /// The store does not do what an upload needs: a wrong bucket, no right to it, no connection.
    #[error("cannot use {url}: {action} failed")]
    Refused {
        /// The address.
        url: String,
        /// What was tried.
        action: &'static str,
        /// What the store said.
        #[source]
        cause: Box<Cause>,
    },
    /// A part size that no upload can have.
    #[error(
        "parts of {part} bytes: a power of two from 1,024 on, no more than a quarter of the {budget} bytes in flight"
    )]
    Parts {
        /// [`ObjectConfig::part`](crate::ObjectConfig::part).
        part: u64,
        /// [`ObjectConfig::budget`](crate::ObjectConfig::budget).
        budget: u64,
    },
    /// The directory for journals cannot be used.
    #[error("cannot keep journals in {}", dir.display())]
    Journals {
        /// The directory.
        dir: PathBuf,
        /// What the operating system said.
        #[source]
        cause: io::Error,
    },
    /// Another server keeps its journals there.
    #[error("another server uses {}", dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
}

/// What kind of trouble an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Nothing has the key, or there is no such upload.
    Missing,
    NoBucket,
    /// Something has the key.
    Taken,
    /// Two requests met: the upload must be made anew.
    Conflict,
    Denied,
    /// The credentials are no longer valid.
    Expired,
    Full,
    BadName,
    /// Too much at once, no connection, an error of the store.
    Passing,
}

/// An error and all below it, as text.
pub(crate) fn text(error: &Cause) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = cause.source();
    }
    text
}

pub(crate) fn trouble(error: &Cause) -> Trouble {
    let said = text(error);
    // As the services write it. Names and addresses, which are in the text too, hold such words by chance only.
    let has = |codes: &[&str]| {
        codes
            .iter()
            .any(|code| said.contains(&format!("<Code>{code}")))
    };
    // What the store says is more exact than its status.
    if has(&["NoSuchBucket", "ContainerNotFound"]) {
        return Trouble::NoBucket;
    }
    if has(&[
        "ExpiredToken",
        "TokenRefreshRequired",
        "InvalidToken",
        "RequestTimeTooSkewed",
    ]) {
        return Trouble::Expired;
    }
    if has(&["QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"]) {
        return Trouble::Full;
    }
    if has(&["ConditionalRequestConflict"]) {
        return Trouble::Conflict;
    }
    match error {
        Cause::NotFound { .. } => Trouble::Missing,
        Cause::AlreadyExists { .. } | Cause::Precondition { .. } | Cause::NotModified { .. } => {
            Trouble::Taken
        }
        Cause::PermissionDenied { .. } => Trouble::Denied,
        Cause::Unauthenticated { .. } => Trouble::Expired,
        Cause::InvalidPath { .. } => Trouble::BadName,
        _ if has(&["NoSuchUpload", "InvalidPart"]) => Trouble::Missing,
        _ if has(&["PreconditionFailed"]) => Trouble::Taken,
        _ if has(&["KeyTooLong"]) || said.contains("File name too long") => Trouble::BadName,
        _ if has(&[
            "AccessDenied",
            "SignatureDoesNotMatch",
            "InvalidAccessKeyId",
        ]) =>
        {
            Trouble::Denied
        }
        _ => Trouble::Passing,
    }
}

/// The error for a client; the log has the rest.
pub(crate) fn refused(action: &'static str, path: Option<&RelPath>, cause: &Cause) -> StoreError {
    let trouble = trouble(cause);
    if let (Trouble::Missing, Some(path)) = (trouble, path) {
        return StoreError::NotFound { path: path.clone() };
    }
    tracing::warn!(
        action,
        path = path.map(tracing::field::display),
        error = text(cause),
        "the object store failed"
    );
    let lasting = |kind: io::ErrorKind, why: &str| StoreError::Io {
        action,
        cause: io::Error::new(kind, why),
    };
    let passing = |why: &str| StoreError::Unavailable {
        why: format!("it cannot {action}: {why}"),
    };
    match (trouble, path) {
        (Trouble::BadName, Some(path)) => StoreError::Unstorable { path: path.clone() },
        (Trouble::Taken, Some(path)) => StoreError::Exists { path: path.clone() },
        (Trouble::NoBucket, _) => lasting(
            io::ErrorKind::NotFound,
            "the server's bucket does not exist",
        ),
        (Trouble::Denied, _) => lasting(
            io::ErrorKind::PermissionDenied,
            "the server's object store denies it",
        ),
        (Trouble::Full, _) => StoreError::DiskFull { free: 0 },
        (Trouble::Expired, _) => {
            passing("the server's credentials for its object store are no longer valid")
        }
        _ => passing("the server's object store does not answer as it should"),
    }
}

/// The error for a client when the journal fails.
pub(crate) fn journal(cause: io::Error) -> StoreError {
    tracing::warn!(error = %cause, "the journal of an upload failed");
    match cause.kind() {
        io::ErrorKind::StorageFull => StoreError::DiskFull { free: 0 },
        _ => StoreError::Io {
            action: "write the journal of the upload",
            cause,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> Cause {
        Cause::Generic {
            store: "S3",
            source: text.into(),
        }
    }

    #[test]
    fn errors_of_the_store_get_the_codes_of_the_protocol() {
        let path: RelPath = "a".parse().unwrap();
        let denied = Cause::PermissionDenied {
            path: "p".into(),
            source: "<Code>AccessDenied</Code>".into(),
        };
        let bucket = Cause::NotFound {
            path: "p".into(),
            source: "<Code>NoSuchBucket</Code>".into(),
        };
        let expired = Cause::PermissionDenied {
            path: "p".into(),
            source: "<Code>ExpiredToken</Code>".into(),
        };
        let missing = Cause::NotFound {
            path: "QuotaExceeded/507".into(),
            source: "<Code>NoSuchKey</Code>".into(),
        };
        let taken = Cause::AlreadyExists {
            path: "p".into(),
            source: "412".into(),
        };
        for (cause, code, retry) in [
            (generic("503 <Code>SlowDown</Code>"), "internal", true),
            (generic("500 <Code>InternalError</Code>"), "internal", true),
            (expired, "internal", true),
            (denied, "io", false),
            (bucket, "io", false),
            (generic("<Code>QuotaExceeded</Code>"), "no_space", true),
            (generic("<Code>KeyTooLongError</Code>"), "bad_name", false),
            (missing, "not_found", false),
            (taken, "exists", false),
        ] {
            let error = refused("store a part", Some(&path), &cause);
            assert_eq!((error.code(), error.retry()), (code, retry), "{cause}");
            let text = error.to_string();
            assert!(!text.contains("Code"), "{text}");
        }
    }
}
