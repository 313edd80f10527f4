//! Messages between nodes: a header of 22 bytes and the fields of their kind. PROTOCOL.md has the layout.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::cluster::NodeId;
use crate::wire::frame::PREFIX;
use crate::wire::message::Message;

/// The version of this layout. Messages of other versions are ignored.
pub(crate) const VERSION: u8 = 1;
/// Bytes of the header.
pub(crate) const HEADER: usize = 22;
/// The most bytes that are added to a frame, if no more than a few sessions are left out.
pub(crate) const AROUND: usize = 512;
/// Bytes of a room's id.
const ROOM_ID: usize = 16;
/// The most sessions that one message may leave out, and the longest session id in bytes.
const EXCEPT: usize = 255;

/// The publisher of a message, and the message's place in that node's sequence for the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) node: NodeId,
    /// Counts how often the node has begun its sequence for this topic.
    pub(crate) epoch: u32,
    /// The number of a message to a room, from 1. In any other message, the number of the last message to the room
    /// before it, or 0.
    pub(crate) sequence: u64,
}

/// The content of a message between nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    /// A frame for the members of a room, without the channels of these sessions.
    Room { except: Vec<String>, frame: Bytes },
    /// The last number for this room, and the version of the node's presence there.
    Mark { room: [u8; ROOM_ID], version: u64 },
    /// The node has its first members in this room and asks for marks and presence.
    Ask([u8; ROOM_ID]),
    /// A session is present in a room, or has changed its metadata: `{peer, session, meta}`. The header's number is the
    /// version after the change.
    Join(Bytes),
    /// A session has left the room. `moving`: it may connect to another node.
    Leave { session: String, moving: bool },
    /// A question to all nodes: a map, and the frame that it is about. The header's number is the question's.
    Question { question: Bytes, frame: Bytes },
    /// A node's answer to the question with the header's number.
    Answer(Bytes),
    /// All sessions that are present in a room on this node, each as in `Join`. The header's number is the version.
    Present {
        room: [u8; ROOM_ID],
        entries: Vec<Bytes>,
    },
    /// The node is alive.
    Beat(Bytes),
    /// The node leaves. Its sequences end at the last marks.
    Bye,
}

/// Why bytes from the broker are no valid message between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Bad {
    #[error("shorter than its parts")]
    Short,
    #[error("not version {VERSION}")]
    Version,
    #[error("of a kind that this version has not")]
    Kind,
    #[error("a message without a number")]
    Number,
    #[error("a session's id that is not text")]
    Session,
    #[error("not a frame that an application can send")]
    Frame,
}

const ROOM: u8 = 1;
const MARK: u8 = 2;
const ASK: u8 = 3;
const BEAT: u8 = 4;
const BYE: u8 = 5;
const JOIN: u8 = 6;
const LEAVE: u8 = 7;
const PRESENT: u8 = 8;
const QUESTION: u8 = 9;
const ANSWER: u8 = 10;

fn head(kind: u8, head: &Head, body: usize) -> BytesMut {
    let mut buf = BytesMut::with_capacity(HEADER + body);
    buf.put_u8(VERSION);
    buf.put_u8(kind);
    buf.put_slice(&head.node.0);
    buf.put_u32(head.epoch);
    buf.put_u64(head.sequence);
    buf
}

/// A message to a room. Ids that no session can have are left out.
pub(crate) fn room(at: &Head, except: &[&str], frame: &[u8]) -> Bytes {
    let except = except.iter().filter(|id| id.len() <= EXCEPT).take(EXCEPT);
    let except: Vec<&str> = except.copied().collect();
    let ids: usize = except.iter().map(|id| 1 + id.len()).sum();
    let mut buf = head(ROOM, at, 1 + ids + frame.len());
    buf.put_u8(except.len() as u8);
    for id in except {
        buf.put_u8(id.len() as u8);
        buf.put_slice(id.as_bytes());
    }
    buf.put_slice(frame);
    buf.freeze()
}

/// The last number for a room. It may be published to one node alone.
pub(crate) fn mark(at: &Head, room: &[u8; ROOM_ID], version: u64) -> Bytes {
    let mut buf = head(MARK, at, room.len() + 8);
    buf.put_slice(room);
    buf.put_u64(version);
    buf.freeze()
}

pub(crate) fn ask(at: &Head, room: &[u8; ROOM_ID]) -> Bytes {
    let mut buf = head(ASK, at, room.len());
    buf.put_slice(room);
    buf.freeze()
}

pub(crate) fn join(at: &Head, entry: &[u8]) -> Bytes {
    let mut buf = head(JOIN, at, entry.len());
    buf.put_slice(entry);
    buf.freeze()
}

pub(crate) fn leave(at: &Head, session: &str, moving: bool) -> Bytes {
    let mut buf = head(LEAVE, at, 1 + session.len());
    buf.put_u8(u8::from(moving));
    buf.put_slice(session.as_bytes());
    buf.freeze()
}

pub(crate) fn question(at: &Head, question: &[u8], frame: &[u8]) -> Bytes {
    let mut buf = head(QUESTION, at, 4 + question.len() + frame.len());
    // Names and texts are short.
    buf.put_u32(question.len() as u32);
    buf.put_slice(question);
    buf.put_slice(frame);
    buf.freeze()
}

pub(crate) fn answer(at: &Head, answer: &[u8]) -> Bytes {
    let mut buf = head(ANSWER, at, answer.len());
    buf.put_slice(answer);
    buf.freeze()
}

pub(crate) fn present(at: &Head, room: &[u8; ROOM_ID], entries: &[Bytes]) -> Bytes {
    let size: usize = entries.iter().map(|entry| 4 + entry.len()).sum();
    let mut buf = head(PRESENT, at, room.len() + size);
    buf.put_slice(room);
    for entry in entries {
        // An entry has at most a few KiB.
        buf.put_u32(entry.len() as u32);
        buf.put_slice(entry);
    }
    buf.freeze()
}

pub(crate) fn beat(at: &Head, body: &[u8]) -> Bytes {
    let mut buf = head(BEAT, at, body.len());
    buf.put_slice(body);
    buf.freeze()
}

pub(crate) fn bye(at: &Head) -> Bytes {
    head(BYE, at, 0).freeze()
}

/// Decodes bytes from the broker. `frame` is the largest frame, without its prefix.
pub(crate) fn decode(bytes: &Bytes, frame: usize) -> Result<(Head, Body), Bad> {
    let (&[version, kind, ..], true) = (&bytes[..], bytes.len() >= HEADER) else {
        return Err(Bad::Short);
    };
    if version != VERSION {
        return Err(Bad::Version);
    }
    let mut node = NodeId([0; 8]);
    node.0.copy_from_slice(&bytes[2..10]);
    let mut epoch = [0; 4];
    epoch.copy_from_slice(&bytes[10..14]);
    let mut sequence = [0; 8];
    sequence.copy_from_slice(&bytes[14..22]);
    let head = Head {
        node,
        epoch: u32::from_be_bytes(epoch),
        sequence: u64::from_be_bytes(sequence),
    };
    let body = match kind {
        ROOM if head.sequence == 0 => return Err(Bad::Number),
        ROOM => {
            let (except, at) = except(&bytes[HEADER..])?;
            let bytes = bytes.slice(HEADER + at..);
            check_frame(&bytes, frame)?;
            Body::Room {
                except,
                frame: bytes,
            }
        }
        MARK => {
            let (room, rest) = room_id(bytes)?;
            let version = rest.try_into().map_err(|_| Bad::Short)?;
            Body::Mark {
                room,
                version: u64::from_be_bytes(version),
            }
        }
        ASK => Body::Ask(room_id(bytes)?.0),
        JOIN => Body::Join(bytes.slice(HEADER..)),
        LEAVE => {
            let (moving, session) = bytes[HEADER..].split_first().ok_or(Bad::Short)?;
            let session = str::from_utf8(session).map_err(|_| Bad::Session)?;
            Body::Leave {
                session: session.to_owned(),
                moving: *moving != 0,
            }
        }
        PRESENT => Body::Present {
            room: room_id(bytes)?.0,
            entries: entries(bytes.slice(HEADER + ROOM_ID..))?,
        },
        QUESTION => {
            let mut body = bytes.slice(HEADER..);
            let len = *body.first_chunk::<4>().ok_or(Bad::Short)?;
            body.advance(4);
            let len = u32::from_be_bytes(len) as usize;
            if len > body.len() {
                return Err(Bad::Short);
            }
            let question = body.split_to(len);
            if !body.is_empty() {
                check_frame(&body, frame)?;
            }
            Body::Question {
                question,
                frame: body,
            }
        }
        ANSWER => Body::Answer(bytes.slice(HEADER..)),
        BEAT => Body::Beat(bytes.slice(HEADER..)),
        BYE => Body::Bye,
        _ => return Err(Bad::Kind),
    };
    Ok((head, body))
}

fn room_id(bytes: &Bytes) -> Result<([u8; ROOM_ID], &[u8]), Bad> {
    let (room, rest) = bytes[HEADER..].split_first_chunk().ok_or(Bad::Short)?;
    Ok((*room, rest))
}

fn entries(mut bytes: Bytes) -> Result<Vec<Bytes>, Bad> {
    let mut entries = Vec::new();
    while let Some((len, rest)) = bytes.split_first_chunk::<4>() {
        let len = u32::from_be_bytes(*len) as usize;
        if len > rest.len() {
            return Err(Bad::Short);
        }
        bytes.advance(4);
        entries.push(bytes.split_to(len));
    }
    bytes.is_empty().then_some(entries).ok_or(Bad::Short)
}

/// The list of sessions at the beginning of these bytes, and its length.
fn except(bytes: &[u8]) -> Result<(Vec<String>, usize), Bad> {
    let (count, mut rest) = bytes.split_first().ok_or(Bad::Short)?;
    let mut except = Vec::new();
    for _ in 0..*count {
        let (len, after) = rest.split_first().ok_or(Bad::Short)?;
        let id = after.get(..usize::from(*len)).ok_or(Bad::Short)?;
        rest = &after[id.len()..];
        let id = str::from_utf8(id).map_err(|_| Bad::Session)?;
        except.push(id.to_owned());
    }
    Ok((except, bytes.len() - rest.len()))
}

/// A member would close its connection if it received any other frame.
fn check_frame(frame: &Bytes, limit: usize) -> Result<(), Bad> {
    let (prefix, body) = frame.split_first_chunk::<PREFIX>().ok_or(Bad::Frame)?;
    if u32::from_be_bytes(*prefix) as usize != body.len() || body.len() > limit {
        return Err(Bad::Frame);
    }
    let message = Message::decode(frame.slice(PREFIX..)).map_err(|_| Bad::Frame)?;
    match message.is_reserved() || message.id().is_some() {
        true => Err(Bad::Frame),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::message::Encoded;

    const LIMIT: usize = 1 << 16;

    fn at(sequence: u64) -> Head {
        Head {
            node: NodeId(*b"12345678"),
            epoch: 7,
            sequence,
        }
    }

    fn frame(text: &str) -> Bytes {
        Encoded::new("line", text).unwrap().bytes().clone()
    }

    #[test]
    fn a_message_has_exactly_these_bytes() {
        let bytes = room(&at(0x0102), &["ab"], &frame("x"));
        let mut expected = b"\x01\x0112345678\0\0\0\x07\0\0\0\0\0\0\x01\x02\x01\x02ab".to_vec();
        expected.extend_from_slice(b"\0\0\0\x08\x92\xa4line\xa1x");
        assert_eq!(bytes, expected);
        let body = Body::Room {
            except: vec!["ab".into()],
            frame: frame("x"),
        };
        assert_eq!(decode(&bytes, LIMIT), Ok((at(0x0102), body)));
        assert_eq!(
            mark(&at(3), b"0123456789abcdef", 5),
            b"\x01\x0212345678\0\0\0\x07\0\0\0\0\0\0\0\x030123456789abcdef\0\0\0\0\0\0\0\x05"[..]
        );
    }

    #[test]
    fn everything_else_comes_back() {
        let room = [7; ROOM_ID];
        let entries: Vec<Bytes> = vec![b"one"[..].into(), b"two two"[..].into()];
        let leave_body = Body::Leave {
            session: "s".into(),
            moving: true,
        };
        for (bytes, body) in [
            (mark(&at(3), &room, 9), Body::Mark { room, version: 9 }),
            (ask(&at(0), &room), Body::Ask(room)),
            (beat(&at(0), b"..."), Body::Beat(b"..."[..].into())),
            (bye(&at(0)), Body::Bye),
            (
                question(&at(1), b"who?", &frame("x")),
                Body::Question {
                    question: b"who?"[..].into(),
                    frame: frame("x"),
                },
            ),
            (answer(&at(1), b"I"), Body::Answer(b"I"[..].into())),
            (join(&at(1), b"entry"), Body::Join(b"entry"[..].into())),
            (leave(&at(1), "s", true), leave_body),
            (
                present(&at(1), &room, &entries),
                Body::Present { room, entries },
            ),
        ] {
            assert_eq!(decode(&bytes, LIMIT).map(|(_, body)| body), Ok(body));
        }
        let mut cut = present(&at(1), &room, &[b"one"[..].into()]).to_vec();
        cut.pop();
        assert_eq!(decode(&cut.into(), LIMIT), Err(Bad::Short));
        let mut cut = question(&at(1), b"who?", b"").to_vec();
        cut.pop();
        assert_eq!(decode(&cut.into(), LIMIT), Err(Bad::Short));
        let bad = question(&at(1), b"who?", b"no frame");
        assert_eq!(decode(&bad, LIMIT), Err(Bad::Frame));
    }

    #[test]
    fn what_members_would_end_their_connection_over_is_refused() {
        let bad = |frame: &[u8]| decode(&room(&at(1), &[], frame), LIMIT).unwrap_err();
        assert_eq!(bad(b""), Bad::Frame);
        assert_eq!(bad(b"\0\0\0\x09\x92\xa4line\xa1x"), Bad::Frame, "length");
        assert_eq!(bad(b"\0\0\0\x02\x92\xa4"), Bad::Frame, "cut");
        assert_eq!(bad(b"\0\0\0\x07\x92\xa4$gap\x80"), Bad::Frame, "reserved");
        assert_eq!(
            bad(b"\0\0\0\x09\x93\xa4line\xa1x\x01"),
            Bad::Frame,
            "request"
        );
        let large = frame(&"x".repeat(LIMIT));
        assert_eq!(bad(&large), Bad::Frame, "oversize");
        assert_eq!(
            decode(&room(&at(0), &[], &frame("x")), LIMIT),
            Err(Bad::Number)
        );
    }

    #[test]
    fn other_versions_and_kinds_are_told_apart() {
        let with = |place: usize, byte: u8| {
            let mut bytes = mark(&at(1), &[0; 16], 0).to_vec();
            bytes[place] = byte;
            decode(&bytes.into(), LIMIT).unwrap_err()
        };
        assert_eq!(with(0, 2), Bad::Version);
        assert_eq!(with(1, 0), Bad::Kind);
        assert_eq!(with(1, 200), Bad::Kind);
        assert_eq!(decode(&Bytes::new(), LIMIT), Err(Bad::Short));
        assert_eq!(decode(&vec![1, 1].into(), LIMIT), Err(Bad::Short));
        let mut bytes = room(&at(1), &["ab"], &[]).to_vec();
        let id = bytes.len() - 2;
        bytes[id] = 0xff;
        assert_eq!(decode(&bytes.into(), LIMIT), Err(Bad::Session));
    }

    proptest! {
        /// Whatever the broker brings, cut or changed: an answer, never a panic, never more memory than came.
        #[test]
        fn garbage_is_refused_or_read(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            cut in 0..60_usize,
            change in any::<(usize, u8)>(),
        ) {
            let _ = decode(&bytes.into(), LIMIT);
            let mut bytes = room(&at(9), &["one", "two"], &frame("text")).to_vec();
            let len = bytes.len();
            bytes[change.0 % len] = change.1;
            bytes.truncate(len.saturating_sub(cut));
            if let Ok((_, Body::Room { except, .. })) = decode(&bytes.into(), LIMIT) {
                prop_assert!(except.len() <= EXCEPT);
            }
        }
    }
}
