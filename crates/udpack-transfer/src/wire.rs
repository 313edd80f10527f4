//! The messages of a lane as types. They are read strictly and written as maps. `docs/PROTOCOL.md` §11 describes them.
//!
//! Unknown keys are ignored; wrong types are errors. Nothing here does I/O or keeps state.

pub(crate) mod lane;
pub(crate) mod stats;

use std::fmt;
use std::marker::PhantomData;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use udpack::{Channel, FieldError, Fields, Message};

use crate::base::code::Code;
use crate::base::names;
use crate::base::path::RelPath;
use crate::store::{IfExists, Meta, Synced, Time, XATTR_BYTES, XATTRS, Xattr, XattrList, Xattrs};

/// The name of the channels that are lanes.
pub const CHANNEL: &str = "transfer";

/// The name of the channels on which a server's transfers are watched.
pub const JOBS_CHANNEL: &str = "transfers";

/// The name of the channels on which the state of a server is watched.
pub const STATS_CHANNEL: &str = "stats";

/// Bytes of a file in one `chunk` that this library sends, and prefers to receive.
pub const CHUNK: usize = 256 << 10;

/// The most bytes that one `copy` stands for.
pub const COPY: u64 = 16 << 20;

/// Most bytes that one `hole` stands for.
pub const HOLE: u64 = 16 << 20;

/// The most ranges in one message.
pub const RANGES: usize = 8_192;

/// Ranges that one side has: offset, length, and BLAKE3 of these bytes.
pub type Have = Vec<(u64, u64, [u8; 32])>;

/// A client's message on a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// Offers a file.
    File(Offer),
    /// Sends a whole file.
    Put(Put),
    /// Asks for a directory.
    Dir(DirOffer),
    /// Asks for a symbolic link.
    Link(LinkOffer),
    /// Requests a file.
    Get(Wish),
    /// Sends bytes of the open file.
    Chunk {
        /// The file.
        id: u64,
        /// Offset of the first byte; `None` in the short form, where it is implied.
        offset: Option<u64>,
        /// The bytes: a slice of the frame they came in.
        bytes: Bytes,
    },
    /// Takes bytes of the open file from its base.
    Copy(Copied),
    /// Bytes of the open file that are zero, and take no room at the client.
    Hole(Hole),
    /// All bytes of the open file are sent.
    Finish(Finish),
    /// Gives a file up.
    Cancel {
        /// The file.
        id: u64,
        /// Whether the server keeps its bytes for a later resume.
        keep: bool,
    },
    /// The client has received `done`, or has stored what it downloaded.
    Done {
        /// The file.
        id: u64,
    },
    /// Reports the position of a download. It is optional.
    Ack {
        /// The file.
        id: u64,
        /// Bytes received.
        recv: u64,
    },
}

impl Request {
    /// The id of the file that it is about.
    pub fn id(&self) -> u64 {
        match self {
            Self::File(offer) => offer.id,
            Self::Put(put) => put.offer.id,
            Self::Dir(offer) => offer.id,
            Self::Link(offer) => offer.id,
            Self::Get(wish) => wish.id,
            Self::Finish(finish) => finish.id,
            Self::Copy(copied) => copied.id,
            Self::Hole(hole) => hole.id,
            Self::Chunk { id, .. }
            | Self::Cancel { id, .. }
            | Self::Done { id }
            | Self::Ack { id, .. } => *id,
        }
    }
}

/// A `file` message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The client's number for the file on this lane.
    pub id: u64,
    /// The path at the server; not yet checked.
    pub path: String,
    /// Its size in bytes, if known.
    pub size: Option<u64>,
    /// Modification time and permission bits, as far as known.
    pub meta: MetaFields,
    /// The policy when the name is taken.
    pub if_exists: IfExists,
    /// Whether the client waits for `ready`, and the bytes it sends are kept when the connection is lost.
    pub resume: bool,
    /// Permission bits for directories that must be created: the last for the one that contains the file, the one
    /// before for its parent, and so on. Only the owner may use the others.
    pub dirs: Vec<u32>,
    /// The run that this offer belongs to. An offer of the same file by the same run continues the same upload.
    pub run: Option<[u8; 16]>,
    /// A file at the server that this one may share bytes with; not yet checked.
    pub base: Option<String>,
    /// Its extended attributes.
    pub xattrs: XattrList,
    /// Whether it uses the ancestor's short form: no id, no offsets, no hash.
    pub short: bool,
}

/// A `copy` message: bytes of the open file that its base has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// The file.
    pub id: u64,
    /// Offset of the first byte in that file.
    pub offset: u64,
    /// Offset of that byte in the base.
    pub from: u64,
    /// How many bytes: at least one, at most [`COPY`].
    pub len: u64,
}

/// A `hole` message: bytes of the open file that are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    /// The file.
    pub id: u64,
    /// Offset of the first byte in it.
    pub offset: u64,
    /// How many bytes: at least one, at most [`HOLE`].
    pub len: u64,
}

/// A `put` message: a small file, with what `file`, `chunk` and `finish` say of a larger one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Put {
    /// The file. Its size is the number of bytes; it cannot be resumed.
    pub offer: Offer,
    /// BLAKE3 of the bytes, as computed by the client.
    pub hash: [u8; 32],
    /// All bytes: a slice of the frame that they arrived in.
    pub bytes: Bytes,
}

/// Modification time and permission bits as sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MetaFields {
    /// Seconds since 1970.
    pub mtime: Option<i64>,
    /// Nanoseconds after that second, below 10⁹.
    pub mtime_ns: u32,
    /// Permission bits.
    pub mode: Option<u32>,
}

impl From<MetaFields> for Meta {
    fn from(fields: MetaFields) -> Self {
        Self {
            mtime: fields.mtime.map(|secs| Time {
                secs,
                nanos: fields.mtime_ns,
            }),
            mode: fields.mode,
        }
    }
}

impl From<Meta> for MetaFields {
    fn from(meta: Meta) -> Self {
        Self {
            mtime: meta.mtime.map(|time| time.secs),
            mtime_ns: meta.mtime.map_or(0, |time| time.nanos),
            mode: meta.mode,
        }
    }
}

/// A `dir` message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirOffer {
    /// The client's number for it on this lane.
    pub id: u64,
    /// Its path; not yet checked.
    pub path: String,
    /// Modification time and permission bits, as far as known.
    pub meta: MetaFields,
    /// As in an [`Offer`]; the last is for the directory itself, if it must be created.
    pub dirs: Vec<u32>,
    /// Its extended attributes.
    pub xattrs: XattrList,
}

/// A `link` message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkOffer {
    /// The client's number for it on this lane.
    pub id: u64,
    /// Its path; not yet checked.
    pub path: String,
    /// What it points to; not yet checked.
    pub target: String,
    /// As in an [`Offer`].
    pub dirs: Vec<u32>,
    /// The policy when the name is taken.
    pub if_exists: IfExists,
}

/// A `get` message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// The client's number for it on this lane.
    pub id: u64,
    /// The path of the file; not yet checked.
    pub path: String,
    /// The ranges that the client has.
    pub have: Have,
    /// The most bytes per second that the client accepts, over all its downloads.
    pub rate: Option<u64>,
    /// Whether the client takes `hole`.
    pub holes: bool,
    /// The extended attributes that it asks for.
    pub xattrs: Xattrs,
}

/// A `finish` message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finish {
    /// The file.
    pub id: u64,
    /// Its size in bytes; `None` in the short form.
    pub size: Option<u64>,
    /// BLAKE3 of all its bytes; `None` in the short form.
    pub hash: Option<[u8; 32]>,
}

/// A message of a lane that has an invalid field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event}: {text}")]
pub struct BadMessage {
    /// The event.
    pub event: &'static str,
    /// The id of the file that it is about, if that could be read.
    pub id: Option<u64>,
    /// What is wrong.
    pub text: String,
}

/// Reads a client's message; `None` for an event that does not belong to lanes.
///
/// # Errors
/// When a field is missing or of the wrong type, or the two forms are mixed.
pub fn decode(message: &Message) -> Result<Option<Request>, BadMessage> {
    let request = match message.event() {
        "put" => put(message),
        "file" => file(message),
        "chunk" => chunk(message),
        "copy" => copy(message),
        "hole" => hole(message).map(Request::Hole),
        "finish" => finish(message),
        "cancel" => read("cancel", message, |fields| {
            Ok(Request::Cancel {
                id: fields.u64("id")?,
                keep: fields.opt_bool("keep")?.unwrap_or(false),
            })
        }),
        "dir" => read("dir", message, |fields| {
            Ok(Request::Dir(DirOffer {
                id: fields.u64("id")?,
                path: names::field(fields, "path")?,
                meta: meta(fields)?,
                dirs: dirs(fields)?,
                xattrs: xattrs(fields)?,
            }))
        }),
        "link" => link(message),
        "get" => read("get", message, |fields| {
            Ok(Request::Get(Wish {
                id: fields.u64("id")?,
                path: names::field(fields, "path")?,
                have: have(fields)?,
                rate: fields.opt_u64("rate")?,
                holes: fields.opt_bool("holes")?.unwrap_or(false),
                xattrs: which(fields)?,
            }))
        }),
        // This is the short form.
        "done" if message.raw().as_ref() == [0xc0] => Ok(Request::Done { id: 0 }),
        "done" => read("done", message, |fields| {
            Ok(Request::Done {
                id: fields.u64("id")?,
            })
        }),
        "ack" => read("ack", message, |fields| {
            Ok(Request::Ack {
                id: fields.u64("id")?,
                recv: fields.u64("recv")?,
            })
        }),
        _ => return Ok(None),
    };
    request.map(Some)
}

/// Reads `mtime`, `mtime_ns` and `mode`.
fn meta(fields: &Fields<'_>) -> Result<MetaFields, FieldError> {
    let wrong = |key, expected| FieldError::WrongType { key, expected };
    let mtime_ns = fields.opt_u64("mtime_ns")?.unwrap_or(0);
    let mode = fields.opt_u64("mode")?.map(|mode| mode & 0o7777);
    Ok(MetaFields {
        mtime: fields.opt_i64("mtime")?,
        mtime_ns: u32::try_from(mtime_ns)
            .ok()
            .filter(|nanos| *nanos < 1_000_000_000)
            .ok_or_else(|| wrong("mtime_ns", "u64 below 1000000000"))?,
        mode: mode.and_then(|mode| u32::try_from(mode).ok()),
    })
}

/// Reads `xattrs`: a missing list is empty.
fn xattrs(fields: &Fields<'_>) -> Result<XattrList, FieldError> {
    Ok(opt_xattrs(fields)?.unwrap_or_default())
}

fn opt_xattrs(fields: &Fields<'_>) -> Result<Option<XattrList>, FieldError> {
    let wrong = FieldError::WrongType {
        key: "xattrs",
        expected: "array of at most 256 [name, value], 65536 bytes in all, names of 1 to 255 bytes",
    };
    let Some(mut pairs) = fields.opt_array("xattrs")? else {
        return Ok(None);
    };
    if pairs.remaining() > XATTRS {
        return Err(wrong);
    }
    let mut list = Vec::with_capacity(pairs.remaining());
    let mut bytes = 0;
    while pairs.remaining() > 0 {
        let mut pair = pairs.next_array()?;
        let (name, value) = (pair.next_bin()?, pair.next_bin()?);
        pair.finish()?;
        bytes += name.len() + value.len();
        if bytes > XATTR_BYTES {
            return Err(wrong);
        }
        list.push(Xattr {
            name: name.into(),
            value: value.into(),
        });
    }
    XattrList::new(list).map(Some).map_err(|_| wrong)
}

/// Reads which extended attributes are asked for: none where that is missing, and none of a kind that is not known here.
fn which(fields: &Fields<'_>) -> Result<Xattrs, FieldError> {
    let word = fields.opt_str("xattrs")?;
    Ok(word.and_then(Xattrs::from_word).unwrap_or_default())
}

/// Reads `dirs`: at most as many as a path has directories. A missing list is empty.
fn dirs(fields: &Fields<'_>) -> Result<Vec<u32>, FieldError> {
    let Some(mut modes) = fields.opt_array("dirs")? else {
        return Ok(Vec::new());
    };
    if modes.remaining() > RelPath::MAX_COMPONENTS {
        return Err(FieldError::WrongType {
            key: "dirs",
            expected: "array of at most 256 numbers",
        });
    }
    let mut dirs = Vec::with_capacity(modes.remaining());
    while modes.remaining() > 0 {
        dirs.push(u32::try_from(modes.next_u64()? & 0o777).unwrap_or(0));
    }
    Ok(dirs)
}

/// Reads `have`: at most [`RANGES`] ranges, in order, not empty, not overlapping. A missing list is empty.
fn have(fields: &Fields<'_>) -> Result<Have, FieldError> {
    let wrong = FieldError::WrongType {
        key: "have",
        expected: "array of [off, len, hash], in order, without overlap",
    };
    let Some(mut ranges) = fields.opt_array("have")? else {
        return Ok(Have::new());
    };
    let mut have = Have::new();
    let mut end = 0;
    while ranges.remaining() > 0 {
        let mut range = ranges.next_array()?;
        let (off, len) = (range.next_u64()?, range.next_u64()?);
        let hash = hash("have", range.next_bin()?)?;
        range.finish()?;
        // An empty file is described by one empty range.
        if off < end || have.len() >= RANGES || (len == 0 && off > 0) {
            return Err(wrong);
        }
        end = off.checked_add(len).ok_or_else(|| wrong.clone())?;
        have.push((off, len, hash));
    }
    Ok(have)
}

fn hash(key: &'static str, bytes: &[u8]) -> Result<[u8; 32], FieldError> {
    bytes.try_into().map_err(|_| FieldError::WrongType {
        key,
        expected: "bin of 32 bytes",
    })
}

fn link(message: &Message) -> Result<Request, BadMessage> {
    let (offer, word) = read("link", message, |fields| {
        let offer = LinkOffer {
            id: fields.u64("id")?,
            path: names::field(fields, "path")?,
            target: names::field(fields, "target")?,
            dirs: dirs(fields)?,
            if_exists: IfExists::default(),
        };
        Ok((offer, fields.opt_str("if_exists")?.map(str::to_owned)))
    })?;
    let if_exists = policy("link", offer.id, word.as_deref())?;
    Ok(Request::Link(LinkOffer { if_exists, ..offer }))
}

fn policy(event: &'static str, id: u64, word: Option<&str>) -> Result<IfExists, BadMessage> {
    let Some(word) = word else {
        return Ok(IfExists::default());
    };
    IfExists::from_word(word).ok_or_else(|| BadMessage {
        event,
        id: Some(id),
        text: "if_exists is none of same, error, skip, overwrite, rename".to_owned(),
    })
}

/// Parses the data as a map and reads its fields. An error contains the id if that can be read.
fn read<T>(
    event: &'static str,
    message: &Message,
    read: impl FnOnce(&Fields<'_>) -> Result<T, FieldError>,
) -> Result<T, BadMessage> {
    let fields = message.fields().map_err(|error| BadMessage {
        event,
        id: Fields::peek_u64(&message.raw(), "id"),
        text: error.to_string(),
    })?;
    read(&fields).map_err(|error| BadMessage {
        event,
        id: fields.opt_u64("id").ok().flatten(),
        text: error.to_string(),
    })
}

fn run(fields: &Fields<'_>) -> Result<Option<[u8; 16]>, FieldError> {
    let wrong = FieldError::WrongType {
        key: "run",
        expected: "bin of 16 bytes",
    };
    let run = fields.opt_bin("run")?;
    run.map(|run| run.try_into().map_err(|_| wrong)).transpose()
}

fn put(message: &Message) -> Result<Request, BadMessage> {
    let (put, word) = read("put", message, |fields| {
        let bytes = message.raw().slice_ref(fields.bin("data")?);
        let offer = Offer {
            id: fields.u64("id")?,
            path: names::field(fields, "path")?,
            size: Some(bytes.len() as u64),
            meta: meta(fields)?,
            if_exists: IfExists::default(),
            resume: false,
            dirs: dirs(fields)?,
            run: run(fields)?,
            base: None,
            xattrs: xattrs(fields)?,
            short: false,
        };
        let hash = hash("hash", fields.bin("hash")?)?;
        let word = fields.opt_str("if_exists")?.map(str::to_owned);
        Ok((Put { offer, hash, bytes }, word))
    })?;
    let if_exists = policy("put", put.offer.id, word.as_deref())?;
    let offer = Offer {
        if_exists,
        ..put.offer
    };
    Ok(Request::Put(Put { offer, ..put }))
}

fn file(message: &Message) -> Result<Request, BadMessage> {
    let (offer, words) = read("file", message, |fields| {
        let short = fields.raw("filename").is_some();
        let (path, size) = if short {
            ("filename", "filesize")
        } else {
            ("path", "size")
        };
        let offer = Offer {
            // An id beside `filename` is an error; it still tells which file the answer is about.
            id: if short {
                fields.opt_u64("id")?.unwrap_or(0)
            } else {
                fields.u64("id")?
            },
            path: names::field(fields, path)?,
            size: fields.opt_u64(size)?,
            meta: meta(fields)?,
            if_exists: IfExists::default(),
            resume: fields.opt_bool("resume")?.unwrap_or(false),
            dirs: dirs(fields)?,
            run: run(fields)?,
            base: names::opt_field(fields, "base")?.filter(|_| !short),
            xattrs: xattrs(fields)?,
            short,
        };
        let mixed = short && ["id", "path"].iter().any(|key| fields.raw(key).is_some());
        Ok((
            offer,
            (fields.opt_str("if_exists")?.map(str::to_owned), mixed),
        ))
    })?;
    let bad = |text: &str| BadMessage {
        event: "file",
        id: Some(offer.id),
        text: text.to_owned(),
    };
    let (word, mixed) = words;
    if mixed {
        return Err(bad("filename stands together with id or path"));
    }
    let if_exists = policy("file", offer.id, word.as_deref().filter(|_| !offer.short))?;
    let resume = offer.resume && !offer.short;
    Ok(Request::File(Offer {
        if_exists,
        resume,
        ..offer
    }))
}

fn chunk(message: &Message) -> Result<Request, BadMessage> {
    let (id, offset, bytes, last) = read("chunk", message, |fields| {
        let id = fields.opt_u64("id")?;
        let offset = fields.opt_u64("off")?;
        let bytes = message.raw().slice_ref(fields.bin("chunk")?);
        Ok((id, offset, bytes, fields.last_key() == Some("chunk")))
    })
    // In the short form there is no id: the message is about the channel's file.
    .map_err(|bad| BadMessage {
        id: bad.id.or_else(|| short_chunk(message)),
        ..bad
    })?;
    let text = if id.is_some() != offset.is_some() {
        "id and off stand together or not at all"
    } else if bytes.is_empty() {
        "a chunk has at least one byte"
    } else if !last {
        "chunk is not the last key"
    } else {
        return Ok(Request::Chunk {
            id: id.unwrap_or(0),
            offset,
            bytes,
        });
    };
    Err(BadMessage {
        event: "chunk",
        id: Some(id.unwrap_or(0)),
        text: text.to_owned(),
    })
}

fn copy(message: &Message) -> Result<Request, BadMessage> {
    read("copy", message, |fields| {
        let copied = Copied {
            id: fields.u64("id")?,
            offset: fields.u64("off")?,
            from: fields.u64("from")?,
            len: fields.u64("len")?,
        };
        let sound =
            (1..=COPY).contains(&copied.len) && copied.from.checked_add(copied.len).is_some();
        if sound {
            return Ok(Request::Copy(copied));
        }
        Err(FieldError::WrongType {
            key: "len",
            expected: "u64 from 1 to 16777216 that ends below 2^64 behind from",
        })
    })
}

fn hole(message: &Message) -> Result<Hole, BadMessage> {
    read("hole", message, |fields| {
        let hole = Hole {
            id: fields.u64("id")?,
            offset: fields.u64("off")?,
            len: fields.u64("len")?,
        };
        if (1..=HOLE).contains(&hole.len) {
            return Ok(hole);
        }
        Err(FieldError::WrongType {
            key: "len",
            expected: "u64 from 1 to 16777216",
        })
    })
}

/// The id of a chunk that has neither `id` nor `off`.
fn short_chunk(message: &Message) -> Option<u64> {
    let fields = message.fields().ok()?;
    let absent = |key| matches!(fields.opt_u64(key), Ok(None));
    (absent("id") && absent("off")).then_some(0)
}

fn finish(message: &Message) -> Result<Request, BadMessage> {
    if message.raw().as_ref() == [0xc0] {
        return Ok(Request::Finish(Finish {
            id: 0,
            size: None,
            hash: None,
        }));
    }
    read("finish", message, |fields| {
        let id = fields.opt_u64("id")?;
        if id.is_none() && fields.raw("size").is_none() && fields.raw("hash").is_none() {
            return Ok(Request::Finish(Finish {
                id: 0,
                size: None,
                hash: None,
            }));
        }
        let hash = hash("hash", fields.bin("hash")?)?;
        Ok(Request::Finish(Finish {
            id: fields.u64("id")?,
            size: Some(fields.u64("size")?),
            hash: Some(hash),
        }))
    })
}

/// A server's message on a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reply {
    /// The server waits for bytes.
    Ready {
        /// The file.
        id: u64,
        /// The ranges that it has already.
        have: Have,
        /// The size of the base, in bytes, if bytes of it may be copied.
        base: Option<u64>,
        /// Whether the server takes `hole`.
        holes: bool,
    },
    /// Reports the position of an upload.
    Ack {
        /// The file.
        id: u64,
        /// Bytes received without a gap.
        recv: u64,
        /// How many of these survive a power cut.
        safe: u64,
    },
    /// The file is stored: complete, verified and durable.
    Done {
        /// The file.
        id: u64,
        /// The name it has.
        path: String,
        /// Its size in bytes.
        size: u64,
        /// BLAKE3 as the server computed it.
        hash: [u8; 32],
        /// Whether it was there already.
        same: bool,
        /// How it was synced.
        sync: Option<Synced>,
        /// Its modification time, if that is not the requested one.
        mtime: Option<i64>,
        /// How many of its extended attributes were stored.
        xattrs: u32,
    },
    /// A requested file begins.
    File {
        /// The file.
        id: u64,
        /// Its name at the server.
        path: String,
        /// Its size in bytes.
        size: u64,
        /// Modification time and permission bits.
        meta: MetaFields,
        /// Its extended attributes, of the kind that was asked for; `None` if the server does not give them.
        xattrs: Option<XattrList>,
    },
    /// Bytes of a requested file.
    Chunk {
        /// The file.
        id: u64,
        /// Offset of the first byte.
        offset: u64,
        /// The bytes: a slice of the frame they came in.
        bytes: Bytes,
    },
    /// Bytes of it that are zero, and take no room at the server.
    Hole(Hole),
    /// All bytes of a requested file were sent.
    Finish(Finish),
    /// The file was refused or has failed.
    Error {
        /// The file.
        id: u64,
        /// The code of `docs/PROTOCOL.md`.
        code: String,
        /// Which of the cases of this code applies.
        why: Option<String>,
        /// A sentence.
        message: String,
        /// Whether the same request may succeed later.
        retry: bool,
    },
}

/// Reads a server's message; `None` for an event that does not belong to lanes.
///
/// # Errors
/// When a field is missing or of the wrong type.
pub fn decode_reply(message: &Message) -> Result<Option<Reply>, BadMessage> {
    let reply = match message.event() {
        "ready" => read("ready", message, |fields| {
            // A missing list would not mean an empty one.
            fields.array("have")?;
            Ok(Reply::Ready {
                id: fields.u64("id")?,
                have: have(fields)?,
                base: fields.opt_u64("base")?,
                holes: fields.opt_bool("holes")?.unwrap_or(false),
            })
        }),
        "ack" => read("ack", message, |fields| {
            Ok(Reply::Ack {
                id: fields.u64("id")?,
                recv: fields.u64("recv")?,
                safe: fields.u64("safe")?,
            })
        }),
        "done" => read("done", message, |fields| {
            Ok(Reply::Done {
                id: fields.u64("id")?,
                path: names::field(fields, "path")?,
                size: fields.u64("size")?,
                hash: hash("hash", fields.bin("hash")?)?,
                same: fields.opt_bool("same")?.unwrap_or(false),
                sync: fields.opt_str("sync")?.and_then(synced),
                mtime: fields.opt_i64("mtime")?,
                xattrs: u32::try_from(fields.opt_u64("xattrs")?.unwrap_or(0)).unwrap_or(u32::MAX),
            })
        }),
        "file" => read("file", message, |fields| {
            Ok(Reply::File {
                id: fields.u64("id")?,
                path: names::field(fields, "path")?,
                size: fields.u64("size")?,
                meta: meta(fields)?,
                xattrs: opt_xattrs(fields)?,
            })
        }),
        "chunk" => match chunk(message)? {
            Request::Chunk {
                id,
                offset: Some(offset),
                bytes,
            } => Ok(Reply::Chunk { id, offset, bytes }),
            _ => Err(without("chunk", "off")),
        },
        "hole" => Ok(Reply::Hole(hole(message)?)),
        "finish" => match finish(message)? {
            Request::Finish(finish) if finish.hash.is_some() => Ok(Reply::Finish(finish)),
            _ => Err(without("finish", "hash")),
        },
        "error" => read("error", message, |fields| {
            Ok(Reply::Error {
                id: fields.u64("id")?,
                code: crate::base::path::printable(fields.str("code")?),
                why: fields.opt_str("why")?.map(crate::base::path::printable),
                message: printable(fields.str("message")?),
                retry: fields.bool("retry")?,
            })
        }),
        _ => return Ok(None),
    };
    reply.map(Some)
}

/// Servers must not use the short form.
fn without(event: &'static str, key: &'static str) -> BadMessage {
    BadMessage {
        event,
        id: None,
        text: FieldError::Missing(key).to_string(),
    }
}

/// A sentence of the peer, safe to print.
pub(crate) fn printable(text: &str) -> String {
    udpack::text::printable_within(text, 1024)
}

#[derive(Serialize)]
pub(crate) struct FileFields<'a> {
    pub(crate) id: u64,
    #[serde(serialize_with = "names::serialize")]
    pub(crate) path: &'a str,
    pub(crate) size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mtime: Option<i64>,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) mtime_ns: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mode: Option<u32>,
    /// `None` in a server's message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) if_exists: Option<&'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) resume: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) dirs: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) run: Option<Run>,
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "names::serialize_opt"
    )]
    pub(crate) base: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) xattrs: Option<XattrFields<'a>>,
}

/// The header of a `put`; `data` follows.
#[derive(Serialize)]
pub(crate) struct PutFields<'a> {
    pub(crate) id: u64,
    #[serde(serialize_with = "names::serialize")]
    pub(crate) path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mtime: Option<i64>,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) mtime_ns: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mode: Option<u32>,
    pub(crate) if_exists: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) dirs: Vec<u32>,
    pub(crate) run: Run,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) xattrs: Option<XattrFields<'a>>,
    pub(crate) hash: Hash,
}

#[derive(Serialize)]
pub(crate) struct DirFields<'a> {
    pub(crate) id: u64,
    #[serde(serialize_with = "names::serialize")]
    pub(crate) path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mtime: Option<i64>,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) mtime_ns: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mode: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) dirs: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) xattrs: Option<XattrFields<'a>>,
}

#[derive(Serialize)]
pub(crate) struct LinkFields<'a> {
    pub(crate) id: u64,
    #[serde(serialize_with = "names::serialize")]
    pub(crate) path: &'a str,
    #[serde(serialize_with = "names::serialize")]
    pub(crate) target: &'a str,
    pub(crate) if_exists: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) dirs: Vec<u32>,
}

#[derive(Serialize)]
pub(crate) struct GetFields<'a> {
    pub(crate) id: u64,
    #[serde(serialize_with = "names::serialize")]
    pub(crate) path: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) have: Vec<(u64, u64, Hash)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rate: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) holes: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) xattrs: Option<&'a str>,
}

#[derive(Serialize)]
pub(crate) struct CancelFields {
    pub(crate) id: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) keep: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[derive(Serialize)]
pub(crate) struct CopyFields {
    pub(crate) id: u64,
    pub(crate) off: u64,
    pub(crate) from: u64,
    pub(crate) len: u64,
}

#[derive(Serialize)]
pub(crate) struct HoleFields {
    pub(crate) id: u64,
    pub(crate) off: u64,
    pub(crate) len: u64,
}

#[derive(Serialize)]
pub(crate) struct ChunkFields {
    pub(crate) id: u64,
    pub(crate) off: u64,
}

#[derive(Serialize)]
pub(crate) struct FinishFields {
    pub(crate) id: u64,
    pub(crate) size: u64,
    pub(crate) hash: Hash,
}

#[derive(Serialize)]
pub(crate) struct IdField {
    pub(crate) id: u64,
}

#[derive(Serialize)]
pub(crate) struct ReadyFields {
    pub(crate) id: u64,
    pub(crate) have: Vec<(u64, u64, Hash)>,
    pub(crate) chunk: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) base: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) holes: bool,
}

#[derive(Serialize)]
pub(crate) struct AckFields {
    pub(crate) id: u64,
    pub(crate) recv: u64,
    pub(crate) safe: u64,
}

#[derive(Serialize)]
pub(crate) struct DoneFields<'a> {
    pub(crate) id: u64,
    #[serde(serialize_with = "names::serialize")]
    pub(crate) path: &'a str,
    pub(crate) size: u64,
    pub(crate) hash: Hash,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) same: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sync: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mtime: Option<i64>,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) xattrs: u32,
}

#[derive(Serialize)]
pub(crate) struct ErrorFields<'a> {
    pub(crate) id: u64,
    pub(crate) code: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) why: Option<&'static str>,
    pub(crate) message: &'a str,
    pub(crate) retry: bool,
}

impl<'a> ErrorFields<'a> {
    /// Shortens the sentence to what fits a frame of the channel's peer.
    pub(crate) fn new(
        channel: &Channel,
        id: u64,
        code: Code,
        message: &'a str,
        retry: bool,
    ) -> Self {
        let room = channel.frame_limit() / 2;
        let cut = message.floor_char_boundary(room.min(message.len()));
        Self {
            id,
            code: code.as_str(),
            why: code.why(),
            message: message.get(..cut).unwrap_or_default(),
            retry,
        }
    }
}

/// The most ranges that fit a `ready` for this peer.
pub(crate) fn ranges_within(frame: usize) -> usize {
    // A range is an array of two numbers and a hash; the rest of the message precedes them.
    (frame.saturating_sub(64) / (1 + 9 + 9 + 34)).min(RANGES)
}

/// Bytes that travel as msgpack `bin`, in place of an array of numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bin<T>(pub(crate) T);

/// A BLAKE3 hash.
pub(crate) type Hash = Bin<[u8; 32]>;

/// One run of a client.
pub(crate) type Run = Bin<[u8; 16]>;

impl<T: AsRef<[u8]>> Serialize for Bin<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0.as_ref())
    }
}

/// Extended attributes as an array of names and values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct XattrFields<'a>(pub(crate) &'a XattrList);

impl<'a> XattrFields<'a> {
    /// These, unless there are none.
    pub(crate) fn some(xattrs: &'a XattrList) -> Option<Self> {
        (xattrs.count() > 0).then_some(Self(xattrs))
    }
}

impl Serialize for XattrFields<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let pairs = self.0.as_slice().iter();
        serializer.collect_seq(pairs.map(|one| (Bin(&one.name), Bin(&one.value))))
    }
}

impl<'de, T: for<'a> TryFrom<&'a [u8]>> Deserialize<'de> for Bin<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes<T>(PhantomData<T>);
        impl<T: for<'a> TryFrom<&'a [u8]>> serde::de::Visitor<'_> for Bytes<T> {
            type Value = Bin<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bin of the length that is due")
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Bin<T>, E> {
                let read = T::try_from(bytes);
                read.map(Bin)
                    .map_err(|_| E::invalid_length(bytes.len(), &self))
            }
        }
        deserializer.deserialize_bytes(Bytes(PhantomData))
    }
}

fn synced(word: &str) -> Option<Synced> {
    [Synced::File, Synced::Batch, Synced::None]
        .into_iter()
        .find(|way| sync_word(*way) == word)
}

/// The name of this kind of sync on the wire.
pub(crate) fn sync_word(way: Synced) -> &'static str {
    match way {
        Synced::File => "file",
        Synced::Batch => "batch",
        Synced::None => "none",
    }
}

/// Ranges in the form that serde sends.
pub(crate) fn ranges(have: &Have) -> Vec<(u64, u64, Hash)> {
    have.iter()
        .map(|(off, len, hash)| (*off, *len, Bin(*hash)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use udpack::Encoded;

    fn message<T: Serialize>(event: &str, data: &T) -> Message {
        let frame = Encoded::new(event, data).unwrap();
        Message::decode(frame.bytes().slice(udpack::wire::PREFIX..)).unwrap()
    }

    #[derive(Serialize)]
    struct Short<'a> {
        filename: &'a str,
        filesize: u64,
    }

    #[test]
    fn reads_what_it_writes() {
        let xattrs = XattrList::new(vec![Xattr {
            name: (*b"user.a\xff").into(),
            value: (*b"\0").into(),
        }])
        .unwrap();
        let file = FileFields {
            id: 7,
            path: "a/b",
            size: Some(3),
            mtime: Some(-1),
            mtime_ns: 5,
            mode: Some(0o644),
            if_exists: Some("rename"),
            resume: true,
            dirs: vec![0o750, 0o755],
            run: Some(Bin([3; 16])),
            base: Some("old"),
            xattrs: XattrFields::some(&xattrs),
        };
        assert_eq!(
            decode(&message("file", &file)).unwrap(),
            Some(Request::File(Offer {
                id: 7,
                path: "a/b".into(),
                size: Some(3),
                meta: MetaFields {
                    mtime: Some(-1),
                    mtime_ns: 5,
                    mode: Some(0o644),
                },
                if_exists: IfExists::Rename,
                resume: true,
                dirs: vec![0o750, 0o755],
                run: Some([3; 16]),
                base: Some("old".into()),
                xattrs: xattrs.clone(),
                short: false,
            }))
        );
        let finish = FinishFields {
            id: 7,
            size: 3,
            hash: Bin([9; 32]),
        };
        assert_eq!(
            decode(&message("finish", &finish)).unwrap(),
            Some(Request::Finish(Finish {
                id: 7,
                size: Some(3),
                hash: Some([9; 32])
            }))
        );
        let copied = CopyFields {
            id: 7,
            off: 1,
            from: 2,
            len: 3,
        };
        assert_eq!(
            decode(&message("copy", &copied)).unwrap(),
            Some(Request::Copy(Copied {
                id: 7,
                offset: 1,
                from: 2,
                len: 3,
            }))
        );
        let hole = HoleFields {
            id: 7,
            off: 1,
            len: HOLE,
        };
        let read = Hole {
            id: 7,
            offset: 1,
            len: HOLE,
        };
        assert_eq!(
            decode(&message("hole", &hole)).unwrap(),
            Some(Request::Hole(read))
        );
        assert_eq!(
            decode_reply(&message("hole", &hole)).unwrap(),
            Some(Reply::Hole(read))
        );
        let ready = ReadyFields {
            id: 7,
            have: vec![(0, 3, Bin([9; 32]))],
            chunk: 1,
            base: Some(5),
            holes: true,
        };
        assert_eq!(
            decode_reply(&message("ready", &ready)).unwrap(),
            Some(Reply::Ready {
                id: 7,
                have: vec![(0, 3, [9; 32])],
                base: Some(5),
                holes: true,
            })
        );
        let done = DoneFields {
            id: 7,
            path: "a/b",
            size: 3,
            hash: Bin([9; 32]),
            same: true,
            sync: Some("batch"),
            mtime: Some(-1),
            xattrs: 1,
        };
        assert_eq!(
            decode_reply(&message("done", &done)).unwrap(),
            Some(Reply::Done {
                id: 7,
                path: "a/b".into(),
                size: 3,
                hash: [9; 32],
                same: true,
                sync: Some(Synced::Batch),
                mtime: Some(-1),
                xattrs: 1,
            })
        );
        assert_eq!(decode(&message("other", &())).unwrap(), None);
    }

    #[test]
    fn reads_the_short_form() {
        let Some(Request::File(offer)) = decode(&message(
            "file",
            &Short {
                filename: "x",
                filesize: 3,
            },
        ))
        .unwrap() else {
            panic!("a file")
        };
        assert_eq!(
            (offer.id, offer.path.as_str(), offer.size, offer.short),
            (0, "x", Some(3), true)
        );
        assert_eq!(
            decode(&message("finish", &())).unwrap(),
            Some(Request::Finish(Finish {
                id: 0,
                size: None,
                hash: None
            }))
        );
    }

    #[test]
    fn tells_the_id_of_a_bad_message_when_it_can() {
        let bad = decode(&message("finish", &IdField { id: 7 })).unwrap_err();
        assert_eq!(bad.id, Some(7));
        let bad = decode(&message("file", &IdField { id: 7 })).unwrap_err();
        assert_eq!(bad.id, Some(7));
        let bad = decode(&message("file", &"text")).unwrap_err();
        assert_eq!(bad.id, None);
        let bad = decode(&message("chunk", &IdField { id: 7 })).unwrap_err();
        assert_eq!(bad.id, Some(7));
    }
}
