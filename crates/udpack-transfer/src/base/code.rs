//! The codes of refused and failed files, in one table; see `docs/PROTOCOL.md` §11.

use std::fmt;

/// The kind of a [`Code`] or a [`TransferError`](crate::TransferError). A program's exit code and a user's next step
/// depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The local file cannot be read or written.
    LocalFile,
    /// The connection failed.
    Network,
    /// The server does not admit the client, or is not the trusted one.
    Auth,
    /// A rule of the server: name taken, quota, size, name.
    Policy,
    /// The server has no entry of that name.
    NotFound,
    /// The received bytes differ from the sent ones.
    Integrity,
    /// The server's disk failed.
    RemoteStorage,
    /// Anything else.
    Other,
}

/// The table of codes: the code, its `why` if one code has several meanings, whether to try again, the kind.
macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident = $name:literal $(($why:literal))?, $retry:literal, $kind:ident;)*) => {
        /// Why a file was refused, or failed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])* $code,)*
            /// A code that this version does not know.
            Unknown,
        }

        impl Code {
            /// All codes that this version knows.
            pub const ALL: &[Self] = &[$(Self::$code,)*];

            /// The code on the wire.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$code => $name,)*
                    Self::Unknown => "unknown",
                }
            }

            /// The meaning on the wire, if one code has several.
            pub const fn why(self) -> Option<&'static str> {
                match self {
                    $($(Self::$code => Some($why),)?)*
                    _ => None,
                }
            }

            /// Whether trying again later can help. This default applies if an `error` does not say.
            pub const fn retry(self) -> bool {
                match self {
                    $(Self::$code => $retry,)*
                    Self::Unknown => false,
                }
            }

            /// The kind of trouble.
            pub const fn kind(self) -> ErrorKind {
                match self {
                    $(Self::$code => ErrorKind::$kind,)*
                    Self::Unknown => ErrorKind::Other,
                }
            }
        }
    };
}

codes! {
    /// The path breaks a rule for names.
    BadName = "bad_name", false, Policy;
    /// The name is taken.
    Exists = "exists", false, Policy;
    /// A component above the name exists and is not a directory.
    Blocked = "exists" ("blocked"), false, Policy;
    /// No entry has the name, or no such job is running.
    NotFound = "not_found", false, NotFound;
    /// A directory has the name, where a file was asked for.
    IsDirectory = "is_directory", false, Policy;
    /// The entry is neither a file nor a directory.
    NotAFile = "not_a_file", false, Policy;
    /// A directory to be removed is not empty.
    NotEmpty = "not_empty", false, Policy;
    /// Above the server's limit for one file.
    TooLarge = "too_large", false, Policy;
    /// Above the limit that the server's system sets for one file.
    SystemLimit = "too_large" ("system"), false, Policy;
    /// Above what this server or client may store.
    Quota = "quota", true, Policy;
    /// The disk is full, or would be.
    NoSpace = "no_space", true, RemoteStorage;
    /// More or fewer bytes than announced.
    SizeMismatch = "size_mismatch", false, Integrity;
    /// A gap or an overlap.
    BadOffset = "bad_offset", false, Integrity;
    /// The received bytes differ from the sent ones.
    HashMismatch = "hash_mismatch", true, Integrity;
    /// A legal message at the wrong time.
    ProtocolOrder = "protocol_order", false, Other;
    /// A field is missing or of the wrong type.
    BadMessage = "bad_message", false, Other;
    /// Another connected client writes this file.
    Busy = "busy", true, Policy;
    /// Another writer has taken the upload over.
    Superseded = "superseded", false, Policy;
    /// Too many files are open.
    TooManyUploads = "too_many_uploads", true, Policy;
    /// Too many interrupted uploads wait to be resumed.
    TooManySuspended = "too_many_uploads" ("interrupted"), false, Policy;
    /// Too many requests or downloads are in progress.
    TooManyRequests = "too_many_requests", true, Policy;
    /// The token has as many shares as it may have.
    TooManyShares = "too_many_shares", false, Policy;
    /// No data came for too long.
    UploadStalled = "upload_stalled", true, Network;
    /// The operator's hook refused the file.
    Refused = "refused", false, Policy;
    /// The token has no right to it, or the job is another client's.
    Forbidden = "forbidden", false, Policy;
    /// The server does not grant the requested `if_exists`.
    NotGranted = "forbidden" ("if_exists"), false, Policy;
    /// The target of the link is not granted.
    BadTarget = "forbidden" ("target"), false, Policy;
    /// The server does not support it.
    Unsupported = "unsupported", false, Policy;
    /// The client, or an operator of the server, cancelled it.
    Cancelled = "cancelled", false, Policy;
    /// The file changed while it was read.
    SourceChanged = "source_changed", true, Integrity;
    /// The server's disk failed.
    Io = "io", false, RemoteStorage;
    /// The server failed.
    Internal = "internal", true, Other;
}

impl Code {
    /// Reads the fields `code` and `why` of an error. An unknown `why` is ignored.
    pub fn read(code: &str, why: Option<&str>) -> Self {
        let of = |why| {
            let found = Self::ALL.iter().copied();
            found
                .into_iter()
                .find(|known| known.as_str() == code && known.why() == why)
        };
        of(why).or_else(|| of(None)).unwrap_or(Self::Unknown)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl PartialEq<str> for Code {
    fn eq(&self, code: &str) -> bool {
        self.as_str() == code
    }
}

impl PartialEq<&str> for Code {
    fn eq(&self, code: &&str) -> bool {
        self.as_str() == *code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_read_as_itself_and_what_is_unknown_as_the_nearest() {
        for code in Code::ALL {
            assert_eq!(Code::read(code.as_str(), code.why()), *code);
        }
        assert_eq!(Code::read("exists", Some("later")), Code::Exists);
        assert_eq!(Code::read("later", None), Code::Unknown);
    }
}
