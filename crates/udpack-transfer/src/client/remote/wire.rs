//! The requests of [`Remote`](super::Remote), and the raw form of their answers, before they are checked.

use std::fmt;
use std::time::Duration;

use serde::de::{Error, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::broken;
use crate::base::names;
use crate::base::path::{RelPath, printable};
use crate::local::error::TransferError;
use crate::store::{Entry, Kind, Removed, Time};
use crate::wire::{Bin, Hash};

/// Longest target of a symbolic link, in bytes: Linux allows no longer one.
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
    /// Rows are shorter than entries. A server that does not know them sends those.
    pub(super) rows: bool,
}

#[derive(Serialize)]
pub(super) struct RemoveFields<'a> {
    #[serde(serialize_with = "names::serialize")]
    pub(super) path: &'a str,
    pub(super) recursive: bool,
}

/// An entry that `stat` found; in a list, together with its path.
#[derive(Debug, Deserialize)]
pub(super) struct Found {
    #[serde(default, deserialize_with = "names::deserialize_opt")]
    path: Option<String>,
    kind: Word,
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
    /// The entry of the requested name, which the answer need not repeat.
    pub(super) fn entry(self, asked: Option<&RelPath>) -> Result<Entry, TransferError> {
        let path = asked.map_or_else(String::new, |path| path.as_str().to_owned());
        self.checked(path)
    }

    /// The entry of the name in the answer, after checking that name.
    fn listed(mut self) -> Result<Entry, TransferError> {
        let Some(path) = self.path.take() else {
            return Err(broken("an entry without a path"));
        };
        let path = listed(&path)?;
        self.checked(path)
    }

    fn checked(self, path: String) -> Result<Entry, TransferError> {
        let wrong = |what: &str| broken(format!("entry {}: {what}", printable(&path)));
        let Some(kind) = self.kind.0 else {
            return Err(wrong("its kind is none of file, dir, link, other"));
        };
        if i64::try_from(self.size).is_err() {
            return Err(wrong("its size is beyond every file"));
        }
        if self.mtime_ns >= 1_000_000_000 {
            return Err(wrong("its time has more than a second of nanoseconds"));
        }
        // Whoever creates the link checks where it leads: see `apply_entry`.
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

/// The name that was listed, after checking it.
fn listed(path: &str) -> Result<String, TransferError> {
    let path: Result<RelPath, _> = path.parse();
    path.map(String::from)
        .map_err(|error| broken(format!("an entry with a {error}")))
}

/// The kind of an entry, if its word is known.
#[derive(Debug)]
struct Word(Option<Kind>);

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfKind;

        impl Visitor<'_> for OfKind {
            type Value = Word;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the kind of an entry: str")
            }

            fn visit_str<E: Error>(self, word: &str) -> Result<Word, E> {
                Ok(Word(match word {
                    "file" => Some(Kind::File),
                    "dir" => Some(Kind::Dir),
                    "link" => Some(Kind::Link),
                    "other" => Some(Kind::Other),
                    _ => None,
                }))
            }
        }

        deserializer.deserialize_str(OfKind)
    }
}

/// A page of a list, as entries or as rows.
#[derive(Debug, Deserialize)]
pub(super) struct Page {
    #[serde(default)]
    entries: Option<Vec<Found>>,
    /// Directories, each with entries in it.
    #[serde(default)]
    dirs: Option<Vec<(Name, Vec<Row>)>>,
    #[serde(default)]
    pub(super) more: bool,
}

impl Page {
    /// Its entries, each with a checked name, in the order in which they came. `most`: how many were asked for.
    pub(super) fn listed(self, most: usize) -> Result<Vec<Entry>, TransferError> {
        let longer = || broken("a page of a list is longer than was asked for");
        let dirs = match (self.entries, self.dirs) {
            (Some(entries), None) if entries.len() > most => return Err(longer()),
            (Some(entries), None) => return entries.into_iter().map(Found::listed).collect(),
            (None, Some(dirs)) => dirs,
            _ => return Err(broken("a page of a list has no entries")),
        };
        let count = dirs.iter().map(|(_, rows)| rows.len()).sum();
        if count > most {
            return Err(longer());
        }
        let mut entries = Vec::with_capacity(count);
        for (Name(dir), rows) in dirs {
            for Row(Name(name), found) in rows {
                if name.contains('/') {
                    return Err(broken("a row of a list has a slash in its name"));
                }
                let path = match dir.as_str() {
                    "" => listed(&name)?,
                    dir => listed(&format!("{dir}/{name}"))?,
                };
                entries.push(found.checked(path)?);
            }
        }
        Ok(entries)
    }
}

/// An entry and its last name.
#[derive(Debug)]
struct Row(Name, Found);

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Row;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a row: array of name, kind, size, mtime, mtime_ns, mode, target, unread",
                )
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut row: A) -> Result<Row, A::Error> {
                fn next<'de, A, T>(row: &mut A, index: usize) -> Result<T, A::Error>
                where
                    A: SeqAccess<'de>,
                    T: Deserialize<'de>,
                {
                    let missing = || A::Error::invalid_length(index, &"a row of at least 6");
                    row.next_element()?.ok_or_else(missing)
                }
                let name = next(&mut row, 0)?;
                let found = Found {
                    path: None,
                    kind: next(&mut row, 1)?,
                    size: next(&mut row, 2)?,
                    mtime: next(&mut row, 3)?,
                    mtime_ns: next(&mut row, 4)?,
                    mode: next(&mut row, 5)?,
                    target: row
                        .next_element::<Option<Name>>()?
                        .flatten()
                        .map(|Name(target)| target),
                    unread: row.next_element()?.unwrap_or(false),
                };
                while row.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Row(name, found))
            }
        }

        deserializer.deserialize_seq(Fields)
    }
}

/// A name in its text form.
#[derive(Debug, Deserialize)]
struct Name(#[serde(deserialize_with = "names::deserialize")] String);

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
    pub(super) hash: Hash,
}

#[derive(Serialize)]
pub(super) struct ChunksFields<'a> {
    #[serde(serialize_with = "names::serialize")]
    pub(super) path: &'a str,
    pub(super) average: u64,
    pub(super) from: u64,
    pub(super) to: u64,
}

/// A page of a list of chunks.
#[derive(Debug, Deserialize)]
pub(super) struct Chunks {
    pub(super) size: u64,
    pub(super) end: u64,
    pub(super) chunks: Bin<Vec<u8>>,
}

/// The fields of a request that has none.
#[derive(Serialize)]
pub(super) struct Nothing {}

#[derive(Serialize)]
pub(super) struct NameField<'a> {
    pub(super) name: &'a str,
}

/// The properties of a new share; see [`Remote::share`](super::Remote::share).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareWish {
    /// The directory that becomes its root; `None` for this client's own.
    pub prefix: Option<RelPath>,
    /// The most bytes of all files there; `None` for what this client has left.
    pub quota: Option<u64>,
    /// Its lifetime, in whole seconds, at least one; `None` for that of this client's token.
    pub expires: Option<Duration>,
    /// Whether only the first client that presents it may use it.
    pub once: bool,
    /// Grants listing and downloading.
    pub read: bool,
    /// Grants uploading.
    pub write: bool,
}

impl Default for ShareWish {
    /// Grants uploading into this client's own root.
    fn default() -> Self {
        Self {
            prefix: None,
            quota: None,
            expires: None,
            once: false,
            read: false,
            write: true,
        }
    }
}

#[derive(Serialize)]
pub(super) struct ShareFields<'a> {
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "names::serialize_opt"
    )]
    prefix: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quota: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_s: Option<u64>,
    once: bool,
    read: bool,
    write: bool,
}

impl<'a> ShareFields<'a> {
    pub(super) fn of(wish: &'a ShareWish) -> Self {
        Self {
            prefix: wish.prefix.as_ref().map(RelPath::as_str),
            quota: wish.quota,
            expires_s: wish.expires.map(|time| time.as_secs()),
            once: wish.once,
            read: wish.read,
            write: wish.write,
        }
    }
}

/// A new share.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Shared {
    /// Its name, with which it can be revoked.
    pub name: String,
    /// Its token, which is stored nowhere else.
    pub token: String,
    /// The address of the server's pages with the token in it, if the server has pages.
    #[serde(default)]
    pub url: Option<String>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Shared").field(&self.name).finish()
    }
}

/// The rights of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rights {
    /// Grants listing and downloading.
    pub read: bool,
    /// Grants uploading.
    pub write: bool,
    /// Grants removing.
    pub delete: bool,
    /// Grants making shares.
    pub share: bool,
    /// Grants seeing and cancelling the transfers of others.
    pub admin: bool,
    /// Grants seeing the transfers of others.
    pub watch: bool,
    /// Whether only this client may use it.
    pub once: bool,
    /// Its root directory, as the server names it; `None` for the server's own root, and for a share.
    pub prefix: Option<RelPath>,
    /// The most bytes of all files below its root, and how many of them are left.
    pub quota: Option<(u64, u64)>,
    /// The time until it expires.
    pub expires_in: Option<Duration>,
}

#[derive(Deserialize)]
pub(super) struct RightsReply {
    #[serde(default)]
    read: bool,
    #[serde(default)]
    write: bool,
    #[serde(default)]
    delete: bool,
    #[serde(default)]
    share: bool,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    watch: bool,
    #[serde(default)]
    once: bool,
    #[serde(default, deserialize_with = "names::deserialize_opt")]
    prefix: Option<String>,
    #[serde(default)]
    quota: Option<u64>,
    #[serde(default)]
    quota_left: Option<u64>,
    #[serde(default)]
    expires_ms: Option<u64>,
}

impl RightsReply {
    pub(super) fn rights(self) -> Result<Rights, TransferError> {
        Ok(Rights {
            read: self.read,
            write: self.write,
            delete: self.delete,
            share: self.share,
            admin: self.admin,
            watch: self.watch,
            once: self.once,
            prefix: root(self.prefix)?,
            quota: self
                .quota
                .map(|quota| (quota, self.quota_left.unwrap_or(quota))),
            expires_in: self.expires_ms.map(Duration::from_millis),
        })
    }
}

/// A share, as reported to its maker.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShareEntry {
    /// Its name, with which it can be revoked; safe to print.
    pub name: String,
    /// Its root directory; `None` for its maker's own.
    pub prefix: Option<RelPath>,
    /// Grants listing and downloading.
    pub read: bool,
    /// Grants uploading.
    pub write: bool,
    /// Whether only one client may use it.
    pub once: bool,
    /// Whether that client has used it.
    pub used: bool,
    /// The most bytes of all files there.
    pub quota: Option<u64>,
    /// The time until it expires.
    pub expires_in: Option<Duration>,
}

#[derive(Deserialize)]
pub(super) struct Shares {
    pub(super) shares: Vec<ShareReply>,
}

#[derive(Deserialize)]
pub(super) struct ShareReply {
    name: String,
    #[serde(default, deserialize_with = "names::deserialize_opt")]
    prefix: Option<String>,
    #[serde(default)]
    read: bool,
    #[serde(default)]
    write: bool,
    #[serde(default)]
    once: bool,
    #[serde(default)]
    used: bool,
    #[serde(default)]
    quota: Option<u64>,
    #[serde(default)]
    expires_ms: Option<u64>,
}

impl ShareReply {
    pub(super) fn entry(self) -> Result<ShareEntry, TransferError> {
        Ok(ShareEntry {
            name: printable(&self.name),
            prefix: root(self.prefix)?,
            read: self.read,
            write: self.write,
            once: self.once,
            used: self.used,
            quota: self.quota,
            expires_in: self.expires_ms.map(Duration::from_millis),
        })
    }
}

/// A root directory; `None` for the receiver's own.
fn root(prefix: Option<String>) -> Result<Option<RelPath>, TransferError> {
    let prefix = prefix.filter(|prefix| !prefix.is_empty());
    let parsed = prefix.map(|prefix| prefix.parse());
    parsed
        .transpose()
        .map_err(|error| broken(format!("a prefix with a {error}")))
}
