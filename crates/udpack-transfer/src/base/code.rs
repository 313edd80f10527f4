//! Why a file is refused or fails: the codes of `docs/PROTOCOL.md` §11, in one table.

use std::fmt;

/// What kind of trouble a [`Code`] or a [`TransferError`](crate::TransferError) is: what a program's exit code or a user's next
/// step depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The local file.
    LocalFile,
    /// The connection.
    Network,
    /// The server does not let us in, or is not the one we trust.
    Auth,
    /// The server's rules: name taken, quota, size, name.
    Policy,
    /// Nothing has the name at the server.
    NotFound,
    /// Bytes that are not those that were sent.
    Integrity,
    /// The server's disk.
    RemoteStorage,
    /// Anything else.
    Other,
}

/// The one table: code, `why` for those that stand for several things, whether to try again, the kind of trouble.
macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident = $name:literal $(($why:literal))?, $retry:literal, $kind:ident;)*) => {
        /// Why a file was refused, or failed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])* $code,)*
            /// One that this version does not know.
            Unknown,
        }

        impl Code {
            /// All that this version knows.
            pub const ALL: &[Self] = &[$(Self::$code,)*];

            /// The code on the wire.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$code => $name,)*
                    Self::Unknown => "unknown",
                }
            }

            /// Which of several things the code stands for, on the wire.
            pub const fn why(self) -> Option<&'static str> {
                match self {
                    $($(Self::$code => Some($why),)?)*
                    _ => None,
                }
            }

            /// Whether the same again, later, makes sense: the usual word, where an `error` does not say it.
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
    /// What should be a directory on the way to the name is none.
    Blocked = "exists" ("blocked"), false, Policy;
    /// Nothing has the name, or no such job is running.
    NotFound = "not_found", false, NotFound;
    /// A directory has the name, where a file was asked for.
    IsDirectory = "is_directory", false, Policy;
    /// What has the name is neither file nor directory.
    NotAFile = "not_a_file", false, Policy;
    /// A directory that is to be removed holds something.
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
    /// What arrived is not what was sent.
    HashMismatch = "hash_mismatch", true, Integrity;
    /// A legal message at the wrong time.
    ProtocolOrder = "protocol_order", false, Other;
    /// A field is missing or of the wrong type.
    BadMessage = "bad_message", false, Other;
    /// Another client that is alive writes this file.
    Busy = "busy", true, Policy;
    /// Another writer has taken the upload over.
    Superseded = "superseded", false, Policy;
    /// Too many files are open.
    TooManyUploads = "too_many_uploads", true, Policy;
    /// Too many interrupted uploads wait to be resumed.
    TooManySuspended = "too_many_uploads" ("interrupted"), false, Policy;
    /// Too many requests or downloads are under way.
    TooManyRequests = "too_many_requests", true, Policy;
    /// The token has as many shares as it may have.
    TooManyShares = "too_many_shares", false, Policy;
    /// Nothing came for too long.
    UploadStalled = "upload_stalled", true, Network;
    /// The operator does not want the file.
    Refused = "refused", false, Policy;
    /// No right to it, or another client's job.
    Forbidden = "forbidden", false, Policy;
    /// The way to treat existing files that was asked for is not granted.
    NotGranted = "forbidden" ("if_exists"), false, Policy;
    /// The target of the link is not granted.
    BadTarget = "forbidden" ("target"), false, Policy;
    /// The server does not do that.
    Unsupported = "unsupported", false, Policy;
    /// By the client, or by somebody who watches the server's transfers.
    Cancelled = "cancelled", false, Policy;
    /// The file changed while it was read.
    SourceChanged = "source_changed", true, Integrity;
    /// The server's disk failed.
    Io = "io", false, RemoteStorage;
    /// The server failed.
    Internal = "internal", true, Other;
}

impl Code {
    /// Reads what came as `code` and `why`. A `why` that is not known leaves the code as it is without one.
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
