//! The server's side of a lane: however a client mixes messages, only bytes that belong in their
//! place are written, to the one open file, and a file that ended is never touched again.
//!
//! Input: an even byte, then the frames of a lane as they would come; or an odd byte, then a script
//! of four bytes a step, which reaches deep states sooner.
#![no_main]

use std::collections::BTreeSet;

use bytes::Bytes;
use libfuzzer_sys::{Corpus, fuzz_target};
use serde::Serialize;
use udpack::Encoded;
use udpack::wire::{FrameDecoder, Message, PREFIX};
use udpack_fuzz::{assert_printable, within};

use udpack_transfer::wire::{BadMessage, COPY, HOLE, Request, decode, decode_reply};
use udpack_transfer::{Action, Lane, Refusal, RelPath};

fuzz_target!(|input: &[u8]| -> Corpus {
    match input.split_first() {
        Some((mode, frames)) if mode % 2 == 0 => {
            within(64 * 1024 + 32 * frames.len(), || run_frames(frames));
        }
        Some((_, script)) => within(64 * 1024, || run_script(script)),
        None => return Corpus::Reject,
    }
    Corpus::Keep
});

fn run_frames(stream: &[u8]) {
    let mut decoder = FrameDecoder::new(1 << 20);
    decoder.push(Bytes::copy_from_slice(stream));
    let mut lane = Checked::default();
    while let Ok(Some(frame)) = decoder.next_frame() {
        let Ok(message) = Message::decode(frame) else {
            break;
        };
        if lane.on(&message).is_err() {
            break;
        }
    }
}

fn run_script(script: &[u8]) {
    let mut lane = Checked::default();
    for &[step, id, offset, size] in script.as_chunks().0 {
        // Few ids, so that they meet again; the top half stands for the largest there are.
        let id = if id < 128 {
            u64::from(id % 8)
        } else {
            u64::MAX - u64::from(id % 8)
        };
        let off = match offset {
            0..128 => lane.open.as_ref().map_or(0, |open| open.next),
            128..192 => u64::from(offset % 16),
            192.. => u64::MAX - u64::from(offset % 16),
        };
        let size = (size < 128).then_some(u64::from(size % 32));
        let (path, hash) = ("x", ByteArray(&[7; 32]));
        let chunk = ByteArray(&[7; 16][..usize::from(offset % 16) + 1]);
        let message = match step % 16 {
            0 => message("file", &File { id, path, size }),
            1 => {
                let base = "old";
                message(
                    "file",
                    &BasedFile {
                        id,
                        path,
                        size,
                        base,
                    },
                )
            }
            2 => message(
                "file",
                &ShortFile {
                    filename: path,
                    filesize: size,
                },
            ),
            3 | 4 => message("chunk", &Chunk { id, off, chunk }),
            5 => {
                let (from, len) = (u64::from(offset % 32), size.unwrap_or(u64::MAX));
                message("copy", &Copy { id, off, from, len })
            }
            6 => message("chunk", &ShortChunk { chunk }),
            7 => message(
                "finish",
                &Finish {
                    id,
                    size: size.unwrap_or(off),
                    hash,
                },
            ),
            8 => message("finish", &()),
            9 => message(
                "cancel",
                &Cancel {
                    id,
                    keep: offset % 2 == 0,
                },
            ),
            10 => message("chunk", &Id { id }),
            11 => message("dir", &Place { id, path }),
            12 => message("get", &Place { id, path }),
            13 if size.is_some() => message(
                "put",
                &Put {
                    id,
                    path,
                    hash,
                    data: chunk,
                },
            ),
            13 => message("done", &Id { id }),
            14 => {
                let (from, len) = (u64::from(offset % 32), size.unwrap_or(u64::MAX));
                lane.told(id, &[(from, len), (from.saturating_add(len), 3)]);
                continue;
            }
            _ => {
                lane.end(id);
                continue;
            }
        };
        // A message about no file closes the channel; what comes after is never read.
        if lane.on(&message).is_err() {
            return;
        }
    }
}

/// A lane and what is known about it without looking into it.
#[derive(Default)]
struct Checked {
    lane: Lane,
    open: Option<Open>,
    /// The highest id so far; the short form has none.
    last: Option<u64>,
    /// Downloads that were asked for and neither confirmed nor given up.
    gets: BTreeSet<u64>,
}

struct Open {
    id: u64,
    short: bool,
    size: Option<u64>,
    based: bool,
    /// Where the last chunk ended.
    next: u64,
    /// What the client may pass over, as offset and length.
    have: Vec<(u64, u64)>,
}

impl Open {
    /// Whether a chunk may begin at `offset`: nothing that is missing lies before it.
    fn may_begin_at(&self, offset: u64) -> bool {
        let mut at = self.next;
        for _ in 0..=self.have.len() {
            for (from, len) in &self.have {
                if *from <= at {
                    at = at.max(from.saturating_add(*len));
                }
            }
        }
        offset >= self.next && offset <= at
    }
}

impl Checked {
    /// The server has these ranges of the file.
    fn told(&mut self, id: u64, have: &[(u64, u64)]) {
        let ranges = have
            .iter()
            .map(|(off, len)| (*off, *len, [0; 32]))
            .collect();
        self.lane.told(id, &ranges);
        if let Some(open) = self.open.as_mut().filter(|open| open.id == id) {
            open.have = have.to_vec();
        }
    }

    /// Whether an id is free for something new.
    fn is_new(&self, id: u64) -> bool {
        self.last < Some(id)
    }

    /// Reads a message as the server does; an error is one that closes the channel.
    fn on(&mut self, message: &Message) -> Result<(), BadMessage> {
        let _ = decode_reply(message);
        match decode(message) {
            Ok(Some(request)) => {
                let before = self.open_id();
                self.apply(&request);
                assert_eq!(
                    self.lane.open(),
                    self.open_id(),
                    "was {before:?}, then {request:?}"
                );
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(bad) => {
                assert_printable(&bad.to_string());
                let Some(id) = bad.id else {
                    return Err(bad);
                };
                assert_eq!(self.lane.malformed(id), self.open_id() == Some(id));
                self.open = self.open.take().filter(|open| open.id != id);
                assert_eq!(self.lane.open(), self.open_id());
                Ok(())
            }
        }
    }

    fn apply(&mut self, request: &Request) {
        let action = self.lane.on(request);
        let fits = |id: u64| self.open.as_ref().filter(|open| open.id == id);
        match (request, action) {
            (Request::File(offer), Action::Begin(begun)) => {
                assert_eq!(*offer, begun);
                assert!(self.open.is_none(), "two open files");
                assert!(offer.short || self.last < Some(offer.id), "an id again");
                let _ = offer.path.parse::<RelPath>();
                self.open = Some(Open {
                    id: offer.id,
                    short: offer.short,
                    size: offer.size,
                    based: offer.base.is_some(),
                    next: 0,
                    have: Vec::new(),
                });
            }
            (Request::File(offer), Action::Refuse(refusal)) => {
                assert!(self.open.is_some() || (!offer.short && self.last >= Some(offer.id)));
                check_refusal(&refusal, offer.id);
            }
            (Request::Chunk { id, offset, bytes }, Action::Write) => {
                let open = self.open.as_mut().expect("an open file");
                assert_eq!(open.id, *id);
                assert_eq!(offset.is_none(), open.short);
                let offset = offset.unwrap_or(open.next);
                assert!(open.may_begin_at(offset), "a gap or an overlap");
                assert!(!bytes.is_empty());
                open.next = offset + bytes.len() as u64;
                assert!(
                    open.size.is_none_or(|size| open.next <= size),
                    "more than declared"
                );
            }
            (Request::Chunk { id, offset, bytes }, Action::Abort(refusal)) => {
                let open = fits(*id).expect("only the open file can be aborted");
                let at = offset.unwrap_or(open.next);
                let end = at.checked_add(bytes.len() as u64);
                let right = offset.is_none() == open.short
                    && open.may_begin_at(at)
                    && end.is_some_and(|end| open.size.is_none_or(|size| end <= size));
                assert!(!right, "a chunk that fits was refused");
                check_refusal(&refusal, *id);
                self.open = None;
            }
            (Request::Copy(copied), Action::Copy(told)) => {
                assert_eq!(*copied, told);
                let open = self.open.as_mut().expect("an open file");
                assert_eq!(open.id, copied.id);
                assert!(open.based && !open.short, "a copy of nothing");
                assert!(open.may_begin_at(copied.offset), "a gap or an overlap");
                assert!((1..=COPY).contains(&copied.len));
                open.next = copied.offset + copied.len;
                assert!(
                    open.size.is_none_or(|size| open.next <= size),
                    "more than declared"
                );
            }
            (Request::Copy(copied), Action::Abort(refusal)) => {
                let open = fits(copied.id).expect("only the open file can be aborted");
                let end = copied.offset.checked_add(copied.len);
                let right = open.based
                    && !open.short
                    && open.may_begin_at(copied.offset)
                    && end.is_some_and(|end| open.size.is_none_or(|size| end <= size));
                assert!(!right, "a copy that fits was refused");
                check_refusal(&refusal, copied.id);
                self.open = None;
            }
            (Request::Hole(hole), Action::Hole(told)) => {
                assert_eq!(*hole, told);
                let open = self.open.as_mut().expect("an open file");
                assert_eq!(open.id, hole.id);
                assert!(!open.short, "a hole in the short form");
                assert!(open.may_begin_at(hole.offset), "a gap or an overlap");
                assert!((1..=HOLE).contains(&hole.len));
                open.next = hole.offset + hole.len;
                assert!(
                    open.size.is_none_or(|size| open.next <= size),
                    "more than declared"
                );
            }
            (Request::Hole(hole), Action::Abort(refusal)) => {
                let open = fits(hole.id).expect("only the open file can be aborted");
                let end = hole.offset.checked_add(hole.len);
                let right = !open.short
                    && open.may_begin_at(hole.offset)
                    && end.is_some_and(|end| open.size.is_none_or(|size| end <= size));
                assert!(!right, "a hole that fits was refused");
                check_refusal(&refusal, hole.id);
                self.open = None;
            }
            (Request::Finish(finish), Action::Finish(finished)) => {
                assert_eq!(*finish, finished);
                let open = fits(finish.id).expect("only the open file can be finished");
                assert_eq!(open.short, finish.hash.is_none());
                self.open = None;
            }
            (Request::Finish(finish), Action::Abort(refusal)) => {
                let open = fits(finish.id).expect("only the open file can be aborted");
                assert_ne!(
                    open.short,
                    finish.hash.is_none(),
                    "a finish that fits was refused"
                );
                check_refusal(&refusal, finish.id);
                self.open = None;
            }
            (Request::Cancel { id, keep }, action @ (Action::Abort(_) | Action::Suspend(_))) => {
                assert!(fits(*id).is_some(), "only the open file can be aborted");
                assert_eq!(*keep, matches!(action, Action::Suspend(_)));
                let (Action::Abort(refusal) | Action::Suspend(refusal)) = action else {
                    unreachable!("matched above");
                };
                assert_eq!(refusal.code, "cancelled");
                check_refusal(&refusal, *id);
                self.open = None;
            }
            (Request::Cancel { id, .. }, Action::Sent { id: sent, stored }) => {
                assert_eq!((sent, stored), (*id, false));
                assert!(self.gets.remove(id), "no such download");
            }
            (Request::Done { id }, Action::Sent { id: sent, stored }) => {
                assert_eq!((sent, stored), (*id, true));
                assert!(self.gets.remove(id), "no such download");
            }
            (Request::Put(put), Action::Put) => {
                assert!(self.open.is_none() && self.is_new(put.offer.id));
                assert_eq!(put.offer.size, Some(put.bytes.len() as u64));
                assert!(!put.offer.resume && !put.offer.short);
                let _ = put.offer.path.parse::<RelPath>();
            }
            (Request::Put(put), Action::Refuse(refusal)) => {
                assert!(self.open.is_some() || !self.is_new(put.offer.id));
                check_refusal(&refusal, put.offer.id);
            }
            (Request::Dir(offer), Action::Dir(_)) => {
                assert!(self.open.is_none() && self.is_new(offer.id));
            }
            (Request::Link(offer), Action::Link(_)) => {
                assert!(self.open.is_none() && self.is_new(offer.id));
            }
            (Request::Get(wish), Action::Send(sent)) => {
                assert_eq!(*wish, sent);
                assert!(self.is_new(wish.id));
                self.gets.insert(wish.id);
            }
            (
                Request::Dir(udpack_transfer::wire::DirOffer { id, .. })
                | Request::Link(udpack_transfer::wire::LinkOffer { id, .. }),
                Action::Refuse(refusal),
            ) => {
                assert!(self.open.is_some() || !self.is_new(*id));
                check_refusal(&refusal, *id);
            }
            (Request::Get(wish), Action::Refuse(refusal)) => {
                assert!(!self.is_new(wish.id));
                check_refusal(&refusal, wish.id);
            }
            (
                Request::Chunk { id, .. }
                | Request::Copy(udpack_transfer::wire::Copied { id, .. })
                | Request::Hole(udpack_transfer::wire::Hole { id, .. })
                | Request::Cancel { id, .. }
                | Request::Finish(udpack_transfer::wire::Finish { id, .. }),
                action @ (Action::Refuse(_) | Action::Ignore),
            ) => {
                assert!(fits(*id).is_none(), "the open file was passed over");
                if let Action::Refuse(refusal) = action {
                    assert_eq!(refusal.code, "protocol_order");
                    check_refusal(&refusal, *id);
                }
            }
            (Request::Done { .. } | Request::Ack { .. }, Action::Ignore) => {}
            (request, action) => panic!("{request:?} led to {action:?}"),
        }
        let number = match request {
            Request::File(offer) if !offer.short => Some(offer.id),
            Request::Put(put) => Some(put.offer.id),
            Request::Dir(offer) => Some(offer.id),
            Request::Link(offer) => Some(offer.id),
            Request::Get(wish) => Some(wish.id),
            _ => None,
        };
        self.last = self.last.max(number);
    }

    /// The file got its answer while it was open.
    fn end(&mut self, id: u64) {
        self.lane.ended(id);
        self.open = self.open.take().filter(|open| open.id != id);
        assert_eq!(self.lane.open(), self.open_id());
    }

    fn open_id(&self) -> Option<u64> {
        self.open.as_ref().map(|open| open.id)
    }
}

fn check_refusal(refusal: &Refusal, id: u64) {
    assert_eq!(refusal.id, id);
    assert_printable(&refusal.message);
}

fn message<T: Serialize>(event: &str, data: &T) -> Message {
    let frame = Encoded::new(event, data).expect("a sound message");
    Message::decode(frame.bytes().slice(PREFIX..)).expect("its own message")
}

#[derive(Serialize)]
struct File<'a> {
    id: u64,
    path: &'a str,
    size: Option<u64>,
}

#[derive(Serialize)]
struct BasedFile<'a> {
    id: u64,
    path: &'a str,
    size: Option<u64>,
    base: &'a str,
}

#[derive(Serialize)]
struct Place<'a> {
    id: u64,
    path: &'a str,
}

#[derive(Serialize)]
struct Cancel {
    id: u64,
    keep: bool,
}

#[derive(Serialize)]
struct ShortFile<'a> {
    filename: &'a str,
    filesize: Option<u64>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: u64,
    off: u64,
    chunk: ByteArray<'a>,
}

#[derive(Serialize)]
struct Copy {
    id: u64,
    off: u64,
    from: u64,
    len: u64,
}

#[derive(Serialize)]
struct ShortChunk<'a> {
    chunk: ByteArray<'a>,
}

#[derive(Serialize)]
struct Finish<'a> {
    id: u64,
    size: u64,
    hash: ByteArray<'a>,
}

#[derive(Serialize)]
struct Put<'a> {
    id: u64,
    path: &'a str,
    hash: ByteArray<'a>,
    data: ByteArray<'a>,
}

#[derive(Serialize)]
struct Id {
    id: u64,
}

struct ByteArray<'a>(&'a [u8]);

impl Serialize for ByteArray<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}
