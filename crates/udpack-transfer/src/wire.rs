//! The messages of a lane, as types: read strictly, written as maps. `docs/PROTOCOL.md` §11 is the text.
//!
//! Unknown keys are ignored, wrong types are not. Nothing here does I/O or keeps state.

use bytes::Bytes;
use serde::Serialize;
use udpack::{FieldError, Fields, Message};

use crate::store::IfExists;

/// Bytes of file in one `chunk` that this library sends and likes to get.
pub const CHUNK: usize = 256 << 10;

/// What a client says on a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// A file is offered.
    File(Offer),
    /// Bytes of the open file.
    Chunk {
        /// The file.
        id: u64,
        /// Offset of the first byte; `None` in the short form, where it is implied.
        offset: Option<u64>,
        /// The bytes: a slice of the frame they came in.
        bytes: Bytes,
    },
    /// All bytes are sent.
    Finish(Finish),
    /// The client gives the file up.
    Cancel {
        /// The file.
        id: u64,
    },
    /// The client has seen `done`.
    Done,
}

/// A `file` message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The client's number for the file on this lane.
    pub id: u64,
    /// Where it wants to store it; not yet checked.
    pub path: String,
    /// Its size in bytes, if known.
    pub size: Option<u64>,
    /// Modification time, in seconds since 1970.
    pub mtime: Option<i64>,
    /// What to do when the name is taken.
    pub if_exists: IfExists,
    /// Whether the client waits for `ready`.
    pub resume: bool,
    /// Whether this is the ancestor's short form: no id, no offsets, no hash.
    pub short: bool,
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

/// A message of a lane whose fields are not as they must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event}: {text}")]
pub struct BadMessage {
    /// The event.
    pub event: &'static str,
    /// The file it is about, if that could be read.
    pub id: Option<u64>,
    /// What is wrong.
    pub text: String,
}

/// Reads a client's message; `None` for an event that is none of a lane's.
///
/// # Errors
/// When a field is missing or of the wrong type, or the two forms are mixed.
pub fn decode(message: &Message) -> Result<Option<Request>, BadMessage> {
    let request = match message.event() {
        "file" => file(message),
        "chunk" => chunk(message),
        "finish" => finish(message),
        "cancel" => read("cancel", message, |fields| {
            Ok(Request::Cancel {
                id: fields.u64("id")?,
            })
        }),
        "done" => Ok(Request::Done),
        _ => return Ok(None),
    };
    request.map(Some)
}

/// Parses the data as a map and reads it; on failure tells the id if that much can be read.
fn read<T>(
    event: &'static str,
    message: &Message,
    read: impl FnOnce(&Fields<'_>) -> Result<T, FieldError>,
) -> Result<T, BadMessage> {
    let fields = message.fields().map_err(|error| BadMessage {
        event,
        id: None,
        text: error.to_string(),
    })?;
    read(&fields).map_err(|error| BadMessage {
        event,
        id: fields.opt_u64("id").ok().flatten(),
        text: error.to_string(),
    })
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
            // An id beside `filename` is an offence; it still says who waits for the answer.
            id: if short {
                fields.opt_u64("id")?.unwrap_or(0)
            } else {
                fields.u64("id")?
            },
            path: fields.str(path)?.to_owned(),
            size: fields.opt_u64(size)?,
            mtime: fields.opt_i64("mtime")?,
            if_exists: IfExists::default(),
            resume: fields.opt_bool("resume")?.unwrap_or(false),
            short,
        };
        fields.opt_u64("mode")?;
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
    let if_exists = match word.as_deref().filter(|_| !offer.short) {
        None => IfExists::default(),
        Some(word) => IfExists::from_word(word)
            .ok_or_else(|| bad("if_exists is none of same, error, skip, overwrite, rename"))?,
    };
    let resume = offer.resume && !offer.short;
    Ok(Request::File(Offer {
        if_exists,
        resume,
        ..offer
    }))
}

fn chunk(message: &Message) -> Result<Request, BadMessage> {
    let (id, offset) = read("chunk", message, |fields| {
        let id = fields.opt_u64("id")?;
        let offset = fields.opt_u64("off")?;
        Ok((id, offset))
    })?;
    let bad = |text: String| BadMessage {
        event: "chunk",
        id: Some(id.unwrap_or(0)),
        text,
    };
    if id.is_some() != offset.is_some() {
        return Err(bad("id and off stand together or not at all".to_owned()));
    }
    let bytes = message
        .bulk("chunk")
        .map_err(|error| bad(error.to_string()))?;
    if bytes.is_empty() {
        return Err(bad("a chunk has at least one byte".to_owned()));
    }
    Ok(Request::Chunk {
        id: id.unwrap_or(0),
        offset,
        bytes,
    })
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
        let hash = fields.bin("hash")?;
        let hash = hash.try_into().map_err(|_| FieldError::WrongType {
            key: "hash",
            expected: "bin of 32 bytes",
        })?;
        Ok(Request::Finish(Finish {
            id: fields.u64("id")?,
            size: Some(fields.u64("size")?),
            hash: Some(hash),
        }))
    })
}

/// What a server says on a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reply {
    /// The server waits for bytes.
    Ready {
        /// The file.
        id: u64,
        /// What it holds already: offset, length, BLAKE3.
        have: Vec<(u64, u64, [u8; 32])>,
    },
    /// How far the server is.
    Ack {
        /// The file.
        id: u64,
        /// Bytes received without a gap.
        recv: u64,
        /// Of those, bytes that a power cut would not take.
        safe: u64,
    },
    /// The file is there, whole, verified and durable.
    Done {
        /// The file.
        id: u64,
        /// The name it has.
        path: String,
        /// Its size in bytes.
        size: u64,
        /// BLAKE3 as the server computed it.
        hash: [u8; 32],
        /// It was there already.
        same: bool,
    },
    /// The file is refused or failed.
    Error {
        /// The file.
        id: u64,
        /// The code of `docs/PROTOCOL.md`.
        code: String,
        /// A sentence.
        message: String,
        /// Whether the same again, later, makes sense.
        retry: bool,
    },
}

/// Reads a server's message; `None` for an event that is none of a lane's.
///
/// # Errors
/// When a field is missing or of the wrong type.
pub fn decode_reply(message: &Message) -> Result<Option<Reply>, BadMessage> {
    let hash = |bytes: &[u8]| {
        <[u8; 32]>::try_from(bytes).map_err(|_| FieldError::WrongType {
            key: "hash",
            expected: "bin of 32 bytes",
        })
    };
    let reply = match message.event() {
        "ready" => read("ready", message, |fields| {
            let mut ranges = fields.array("have")?;
            let mut have = Vec::new();
            while ranges.remaining() > 0 {
                let mut range = ranges.next_array()?;
                have.push((
                    range.next_u64()?,
                    range.next_u64()?,
                    hash(range.next_bin()?)?,
                ));
                range.finish()?;
            }
            Ok(Reply::Ready {
                id: fields.u64("id")?,
                have,
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
                path: fields.str("path")?.to_owned(),
                size: fields.u64("size")?,
                hash: hash(fields.bin("hash")?)?,
                same: fields.opt_bool("same")?.unwrap_or(false),
            })
        }),
        "error" => read("error", message, |fields| {
            Ok(Reply::Error {
                id: fields.u64("id")?,
                code: crate::path::printable(fields.str("code")?),
                message: printable(fields.str("message")?),
                retry: fields.bool("retry")?,
            })
        }),
        _ => return Ok(None),
    };
    reply.map(Some)
}

/// A sentence of the peer's, safe to print.
fn printable(text: &str) -> String {
    text.chars()
        .take(512)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[derive(Serialize)]
pub(crate) struct FileFields<'a> {
    pub(crate) id: u64,
    pub(crate) path: &'a str,
    pub(crate) size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mtime: Option<i64>,
    pub(crate) if_exists: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) resume: bool,
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
    pub(crate) path: &'a str,
    pub(crate) size: u64,
    pub(crate) hash: Hash,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) same: bool,
}

#[derive(Serialize)]
pub(crate) struct ErrorFields<'a> {
    pub(crate) id: u64,
    pub(crate) code: &'a str,
    pub(crate) message: &'a str,
    pub(crate) retry: bool,
}

/// 32 bytes that travel as msgpack `bin`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hash(pub(crate) [u8; 32]);

impl Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
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
        let file = FileFields {
            id: 7,
            path: "a/b",
            size: Some(3),
            mtime: Some(-1),
            if_exists: "rename",
            resume: true,
        };
        assert_eq!(
            decode(&message("file", &file)).unwrap(),
            Some(Request::File(Offer {
                id: 7,
                path: "a/b".into(),
                size: Some(3),
                mtime: Some(-1),
                if_exists: IfExists::Rename,
                resume: true,
                short: false,
            }))
        );
        let finish = FinishFields {
            id: 7,
            size: 3,
            hash: Hash([9; 32]),
        };
        assert_eq!(
            decode(&message("finish", &finish)).unwrap(),
            Some(Request::Finish(Finish {
                id: 7,
                size: Some(3),
                hash: Some([9; 32])
            }))
        );
        let ready = ReadyFields {
            id: 7,
            have: vec![(0, 3, Hash([9; 32]))],
            chunk: 1,
        };
        assert_eq!(
            decode_reply(&message("ready", &ready)).unwrap(),
            Some(Reply::Ready {
                id: 7,
                have: vec![(0, 3, [9; 32])]
            })
        );
        let done = DoneFields {
            id: 7,
            path: "a/b",
            size: 3,
            hash: Hash([9; 32]),
            same: true,
        };
        assert_eq!(
            decode_reply(&message("done", &done)).unwrap(),
            Some(Reply::Done {
                id: 7,
                path: "a/b".into(),
                size: 3,
                hash: [9; 32],
                same: true
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
