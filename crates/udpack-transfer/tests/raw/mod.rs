//! A client that obeys nobody: hand-made messages on a lane, and what the server says to them, word for word.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::ser::{SerializeMap as _, SerializeSeq as _};
use serde::{Serialize, Serializer};
use udpack::{Channel, RequestError, Socket};
use udpack_transfer::wire::{self, Have, MetaFields, Reply};
use udpack_transfer::{CHANNEL, Synced};

/// Any msgpack value: keys may repeat, types may be wrong.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum V {
    Nil,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Str(String),
    Bin(Vec<u8>),
    Array(Vec<Self>),
    Map(Vec<(Self, Self)>),
}

impl Serialize for V {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nil => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
            Self::Uint(value) => serializer.serialize_u64(*value),
            Self::Float(value) => serializer.serialize_f64(*value),
            Self::Str(value) => serializer.serialize_str(value),
            Self::Bin(value) => serializer.serialize_bytes(value),
            Self::Array(values) => {
                let mut seq = serializer.serialize_seq(Some(values.len()))?;
                for value in values {
                    seq.serialize_element(value)?;
                }
                seq.end()
            }
            Self::Map(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (key, value) in entries {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
        }
    }
}

impl From<u64> for V {
    fn from(value: u64) -> Self {
        Self::Uint(value)
    }
}

impl From<bool> for V {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for V {
    fn from(value: &str) -> Self {
        Self::Str(value.to_owned())
    }
}

impl From<&[u8]> for V {
    fn from(value: &[u8]) -> Self {
        Self::Bin(value.to_owned())
    }
}

impl<const N: usize> From<&[u8; N]> for V {
    fn from(value: &[u8; N]) -> Self {
        Self::Bin(value.to_vec())
    }
}

/// A map of these fields.
pub(crate) fn map<const N: usize>(fields: [(&str, V); N]) -> V {
    V::Map(
        fields
            .into_iter()
            .map(|(key, value)| (key.into(), value))
            .collect(),
    )
}

/// The same map with one more field, or with this value for a field it has.
pub(crate) fn with(base: V, key: &str, value: impl Into<V>) -> V {
    let V::Map(mut fields) = base else {
        panic!("not a map")
    };
    let value = value.into();
    match fields.iter_mut().find(|(known, _)| *known == key.into()) {
        Some(field) => field.1 = value,
        None => fields.push((key.into(), value)),
    }
    V::Map(fields)
}

/// The same map with a field taken out.
pub(crate) fn without(base: V, key: &str) -> V {
    let V::Map(mut fields) = base else {
        panic!("not a map")
    };
    fields.retain(|(known, _)| *known != key.into());
    V::Map(fields)
}

/// The same map with a field once more.
pub(crate) fn twice(base: V, key: &str, value: impl Into<V>) -> V {
    let V::Map(mut fields) = base else {
        panic!("not a map")
    };
    fields.push((key.into(), value.into()));
    V::Map(fields)
}

/// A message of the long form.
pub(crate) type Say = (&'static str, V);

pub(crate) fn file(id: u64, path: &str, size: impl Into<V>) -> Say {
    (
        "file",
        map([
            ("id", id.into()),
            ("path", path.into()),
            ("size", size.into()),
        ]),
    )
}

pub(crate) fn chunk(id: u64, off: u64, bytes: &[u8]) -> Say {
    (
        "chunk",
        map([
            ("id", id.into()),
            ("off", off.into()),
            ("chunk", bytes.into()),
        ]),
    )
}

/// The `finish` of a file with these bytes.
pub(crate) fn finish(id: u64, bytes: &[u8]) -> Say {
    let hash = blake3::hash(bytes);
    (
        "finish",
        map([
            ("id", id.into()),
            ("size", (bytes.len() as u64).into()),
            ("hash", hash.as_bytes().into()),
        ]),
    )
}

/// A file with these bytes, whole.
pub(crate) fn put(id: u64, path: &str, bytes: &[u8]) -> Say {
    (
        "put",
        map([
            ("id", id.into()),
            ("path", path.into()),
            ("hash", blake3::hash(bytes).as_bytes().into()),
            ("data", bytes.into()),
        ]),
    )
}

pub(crate) fn cancel(id: u64) -> Say {
    ("cancel", map([("id", id.into())]))
}

/// A file of the ancestor's form.
pub(crate) fn short_file(name: &str, size: impl Into<V>) -> Say {
    (
        "file",
        map([("filename", name.into()), ("filesize", size.into())]),
    )
}

pub(crate) fn short_chunk(bytes: &[u8]) -> Say {
    ("chunk", map([("chunk", bytes.into())]))
}

pub(crate) fn short_finish() -> Say {
    ("finish", V::Nil)
}

/// A file that shall outlive the connection.
pub(crate) fn resumable(id: u64, path: &str, size: impl Into<V>) -> Say {
    let (event, data) = file(id, path, size);
    (event, with(data, "resume", true))
}

/// The same as part of one run of a client.
pub(crate) fn of_run(id: u64, path: &str, size: impl Into<V>, run: u8) -> Say {
    let (event, data) = resumable(id, path, size);
    (event, with(data, "run", &[run; 16]))
}

pub(crate) fn keep(id: u64) -> Say {
    ("cancel", with(cancel(id).1, "keep", true))
}

pub(crate) fn dir(id: u64, path: &str) -> Say {
    ("dir", map([("id", id.into()), ("path", path.into())]))
}

pub(crate) fn link(id: u64, path: &str, target: &str) -> Say {
    let data = map([
        ("id", id.into()),
        ("path", path.into()),
        ("target", target.into()),
    ]);
    ("link", data)
}

pub(crate) fn get(id: u64, path: &str) -> Say {
    ("get", map([("id", id.into()), ("path", path.into())]))
}

/// Ranges of these bytes, as a side that has them tells it.
pub(crate) fn ranges(bytes: &[u8], ranges: &[(u64, u64)]) -> V {
    let range = |(off, len): &(u64, u64)| {
        let from = usize::try_from(*off).expect("small");
        let to = usize::try_from(off + len).expect("small");
        let hash = blake3::hash(bytes.get(from..to).expect("within the bytes"));
        V::Array(vec![(*off).into(), (*len).into(), hash.as_bytes().into()])
    };
    V::Array(ranges.iter().map(range).collect())
}

/// What the server said.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Heard {
    /// `ready 1 0`, `done 1 name 5`, `done 1 name 5 same`, `error 1 exists`, `error 1 quota retry`, `file 1 name 5`,
    /// `chunk 1 0 5`, `finish 1 5`, `end`, `closed bad_message`.
    pub(crate) line: String,
    /// The sentence of an `error`, the text of a close.
    pub(crate) text: String,
    /// The hash of a `done` or `finish`, the first of a `ready`.
    pub(crate) hash: Option<[u8; 32]>,
    /// The ranges of a `ready`.
    pub(crate) have: Have,
    /// The bytes of a `chunk`.
    pub(crate) bytes: Bytes,
    /// What a `file` tells of the file.
    pub(crate) meta: MetaFields,
    /// How what is `done` was put on disk.
    pub(crate) sync: Option<Synced>,
}

/// One lane, spoken to by hand.
#[derive(Debug)]
pub(crate) struct RawLane {
    pub(crate) channel: Channel,
    /// The last acknowledgement of each file: received, safe.
    acked: HashMap<u64, (u64, u64)>,
    /// Acknowledgements heard.
    pub(crate) acks: usize,
}

impl RawLane {
    pub(crate) async fn open(socket: &Socket) -> Self {
        Self::over(socket.open(CHANNEL).await.expect("a channel"))
    }

    /// The same lane once more, to speak while another listens.
    pub(crate) fn over(channel: Channel) -> Self {
        Self {
            channel,
            acked: HashMap::new(),
            acks: 0,
        }
    }

    /// Sends a message as it is. A lane that the server has closed meanwhile takes nothing; that is no failure
    /// here, the next [`hear`](Self::hear) tells.
    pub(crate) async fn say(&self, (event, data): &Say) {
        match self.channel.send(event, data).await {
            Ok(()) => {}
            Err(error) => assert!(error.is_closed(), "{event}: {error}"),
        }
    }

    /// Sends a message as a request; what the answer is.
    pub(crate) async fn ask(&self, (event, data): &Say) -> String {
        match self.channel.request::<_, ()>(event, data).await {
            Ok(()) => "reply".to_owned(),
            Err(RequestError::NoHandler) => "no_handler".to_owned(),
            Err(other) => other.to_string(),
        }
    }

    /// Sends a message as a request; the answer, or the fault's code and sentence.
    pub(crate) async fn request<R: DeserializeOwned + 'static>(
        &self,
        (event, data): &Say,
    ) -> Result<R, (String, String)> {
        let answer = self.channel.request::<_, R>(event, data);
        match answer.timeout(Duration::from_secs(20)).await {
            Ok(answer) => Ok(answer),
            Err(RequestError::Fault(fault)) => Err((fault.code, fault.message)),
            Err(RequestError::NoHandler) => Err(("no_handler".to_owned(), String::new())),
            Err(other) => panic!("{event}: {other}"),
        }
    }

    /// The next thing the server says, acknowledgements aside; those are checked and counted.
    pub(crate) async fn hear(&mut self) -> Heard {
        loop {
            if let Some(heard) = self.next().await {
                return heard;
            }
        }
    }

    /// Waits until the server has acknowledged this much.
    pub(crate) async fn acked(&mut self, id: u64, bytes: u64) {
        while self.last_ack(id).0 < bytes {
            if let Some(heard) = self.next().await {
                panic!("{heard:?} instead of an ack of {bytes}");
            }
        }
    }

    /// Waits until the server has said that this much is safe.
    pub(crate) async fn safe(&mut self, id: u64, bytes: u64) {
        while self.last_ack(id).1 < bytes {
            if let Some(heard) = self.next().await {
                panic!("{heard:?} before {bytes} bytes were safe");
            }
        }
    }

    /// What was acknowledged last: received, safe.
    pub(crate) fn last_ack(&self, id: u64) -> (u64, u64) {
        self.acked.get(&id).copied().unwrap_or_default()
    }

    async fn next(&mut self) -> Option<Heard> {
        let received = tokio::time::timeout(Duration::from_secs(20), self.channel.recv()).await;
        let message = match received.expect("the server must not fall silent") {
            Ok(Some(message)) => message,
            Ok(None) => {
                return Some(Heard {
                    line: "end".to_owned(),
                    ..Heard::default()
                });
            }
            Err(error) => {
                let reason = error.reason();
                return Some(Heard {
                    line: format!("closed {}", reason.code.name()),
                    text: reason.text.clone(),
                    ..Heard::default()
                });
            }
        };
        let reply = wire::decode_reply(&message).expect("a sound reply");
        let heard = match reply.unwrap_or_else(|| panic!("unknown reply {:?}", message.event())) {
            Reply::Ack { id, recv, safe } => {
                assert!(safe <= recv, "more is safe than received");
                let before = self.acked.insert(id, (recv, safe)).unwrap_or_default();
                assert!(id == 0 || before.0 <= recv, "recv went down");
                assert!(id == 0 || before.1 <= safe, "safe went down");
                self.acks += 1;
                return None;
            }
            Reply::Ready { id, have, .. } => Heard {
                line: format!("ready {id} {}", have.len()),
                hash: have.first().map(|(_, _, hash)| *hash),
                have,
                ..Heard::default()
            },
            Reply::Done {
                id,
                path,
                size,
                hash,
                same,
                sync,
                ..
            } => Heard {
                line: format!("done {id} {path} {size}{}", if same { " same" } else { "" }),
                hash: Some(hash),
                sync,
                ..Heard::default()
            },
            Reply::Error {
                id,
                code,
                why: _,
                message,
                retry,
            } => Heard {
                line: format!("error {id} {code}{}", if retry { " retry" } else { "" }),
                text: message,
                ..Heard::default()
            },
            Reply::File {
                id,
                path,
                size,
                meta,
                ..
            } => Heard {
                line: format!("file {id} {path} {size}"),
                meta,
                ..Heard::default()
            },
            Reply::Chunk { id, offset, bytes } => Heard {
                line: format!("chunk {id} {offset} {}", bytes.len()),
                bytes,
                ..Heard::default()
            },
            Reply::Hole(hole) => Heard {
                line: format!("hole {} {} {}", hole.id, hole.offset, hole.len),
                ..Heard::default()
            },
            Reply::Finish(finish) => Heard {
                line: format!("finish {} {}", finish.id, finish.size.expect("a size")),
                hash: finish.hash,
                ..Heard::default()
            },
            _ => panic!("unknown reply"),
        };
        Some(heard)
    }
}
