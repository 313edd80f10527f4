//! The requests of [`Remote`](super::Remote) and the raw shapes of their answers, before they are checked.

use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::broken;
use crate::base::names;
use crate::base::path::{RelPath, printable};
use crate::local::error::TransferError;
use crate::store::{Entry, Kind, Removed, Time};

/// Longest target of a symbolic link, in bytes: what Linux can hold.
const MAX_TARGET: usize = 4095;

#[derive(Serialize)]
pub(super) struct PathField<'a> {
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "names::serialize_opt"
    )]
    path: Option<&'a str>,
}

impl<'a> PathField<'a> {
    pub(super) fn new(path: Option<&'a RelPath>) -> Self {
        Self {
            path: path.map(RelPath::as_str),
        }
    }
}

#[derive(Serialize)]
pub(super) struct ListFields<'a> {
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "names::serialize_opt"
    )]
    pub(super) path: Option<&'a str>,
    pub(super) recursive: bool,
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "names::serialize_opt"
    )]
    pub(super) after: Option<&'a str>,
    pub(super) limit: u64,
}

#[derive(Serialize)]
pub(super) struct RemoveFields<'a> {
    #[serde(serialize_with = "names::serialize")]
    pub(super) path: &'a str,
    pub(super) recursive: bool,
}

/// What `stat` found; in a list, together with its path.
#[derive(Debug, Deserialize)]
pub(super) struct Found {
    #[serde(default, deserialize_with = "names::deserialize_opt")]
    path: Option<String>,
    kind: String,
    size: u64,
    mtime: i64,
    #[serde(default)]
    mtime_ns: u32,
    mode: u32,
    #[serde(default, deserialize_with = "names::deserialize_opt")]
    target: Option<String>,
    #[serde(default)]
    unread: bool,
}

impl Found {
    /// The entry under the name that was asked for, which the answer need not repeat.
    pub(super) fn entry(self, asked: Option<&RelPath>) -> Result<Entry, TransferError> {
        let path = asked.map_or_else(String::new, |path| path.as_str().to_owned());
        self.checked(path)
    }

    /// The entry under the name in the answer, which is sound then.
    pub(super) fn listed(mut self) -> Result<Entry, TransferError> {
        let Some(path) = self.path.take() else {
            return Err(broken("an entry without a path"));
        };
        let path: RelPath = path
            .parse()
            .map_err(|error| broken(format!("an entry with a {error}")))?;
        self.checked(path.as_str().to_owned())
    }

    fn checked(self, path: String) -> Result<Entry, TransferError> {
        let wrong = |what: &str| broken(format!("entry {}: {what}", printable(&path)));
        let kind = match self.kind.as_str() {
            "file" => Kind::File,
            "dir" => Kind::Dir,
            "link" => Kind::Link,
            "other" => Kind::Other,
            _ => return Err(wrong("its kind is none of file, dir, link, other")),
        };
        if i64::try_from(self.size).is_err() {
            return Err(wrong("its size is beyond every file"));
        }
        if self.mtime_ns >= 1_000_000_000 {
            return Err(wrong("its time has more than a second of nanoseconds"));
        }
        // Where a link leads is judged by who makes one: see `apply_entry`.
        let target = self.target.filter(|_| kind == Kind::Link);
        if target
            .as_ref()
            .is_some_and(|target| names::bytes(target).len() > MAX_TARGET)
        {
            return Err(wrong("its target is longer than any"));
        }
        Ok(Entry {
            kind,
            size: self.size,
            mtime: Time {
                secs: self.mtime,
                nanos: self.mtime_ns,
            },
            mode: self.mode & 0o7777,
            target,
            unread: self.unread && kind == Kind::Dir,
            path,
        })
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Page {
    pub(super) entries: Vec<Found>,
    #[serde(default)]
    pub(super) more: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct Gone {
    files: u64,
    bytes: u64,
}

impl Gone {
    pub(super) fn removed(&self) -> Removed {
        Removed {
            files: self.files,
            bytes: self.bytes,
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Hashed {
    pub(super) size: u64,
    pub(super) hash: Digest,
}

/// A BLAKE3 hash: `bin` of 32 bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Digest(pub(super) [u8; 32]);

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;

        impl<'de> Visitor<'de> for Bytes {
            type Value = Digest;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bin of 32 bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Digest, E> {
                bytes
                    .try_into()
                    .map(Digest)
                    .map_err(|_| E::invalid_length(bytes.len(), &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Digest, A::Error> {
                Err(A::Error::invalid_type(serde::de::Unexpected::Seq, &self))
            }
        }

        deserializer.deserialize_bytes(Bytes)
    }
}
