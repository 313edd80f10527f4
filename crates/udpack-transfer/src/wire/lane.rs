//! The server's half of a lane as a pure state machine: which message is legal when, and what it requires.
//!
//! It does no I/O and knows neither time nor bytes: the caller carries out the [`Action`] and reports back with
//! [`Lane::ended`]. The table is `docs/PROTOCOL.md` §11, "States of one file".

use std::collections::HashSet;

use crate::base::code::Code;
use crate::wire::{Copied, DirOffer, Finish, Have, Hole, LinkOffer, Offer, Request, Wish};

/// The state of a lane.
#[derive(Debug, Default)]
pub struct Lane {
    state: State,
    /// The highest id of the long form so far: ids only increase.
    last: Option<u64>,
    /// Downloads that the client has requested and not confirmed.
    gets: HashSet<u64>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Open(Open),
    /// The file ended before its `finish` arrived: messages that were on their way are dropped.
    Dropping {
        id: u64,
    },
}

#[derive(Debug)]
struct Open {
    id: u64,
    short: bool,
    size: Option<u64>,
    /// Whether it has a base whose bytes may be copied.
    based: bool,
    next: u64,
    /// Ranges of which the client knows that the server has them, as (offset, end): it may skip them.
    have: Vec<(u64, u64)>,
}

impl Open {
    /// Whether everything from `next` to `offset` may be skipped.
    fn covered(&self, offset: u64) -> bool {
        let mut at = self.next;
        for (from, to) in &self.have {
            if at >= offset || *from > at {
                break;
            }
            at = at.max(*to);
        }
        at >= offset
    }
}

/// What the caller must do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Begin this file; it is now the open one.
    Begin(Offer),
    /// Store the file that this message contains, if it is accepted; the lane accepts the next one.
    Put,
    /// Create this directory.
    Dir(DirOffer),
    /// Create this link.
    Link(LinkOffer),
    /// Send this file.
    Send(Wish),
    /// The client has stored the download of this id, or gives it up.
    Sent {
        /// The download.
        id: u64,
        /// Whether the client has stored it.
        stored: bool,
    },
    /// Append the chunk's bytes to the open file.
    Write,
    /// Append these bytes of the base to the open file.
    Copy(Copied),
    /// Append these zeros to the open file.
    Hole(Hole),
    /// Verify and publish the open file; the lane accepts the next one.
    Finish(Finish),
    /// Drop the open file and tell the client.
    Abort(Refusal),
    /// Keep the open file for a later resume, and tell the client.
    Suspend(Refusal),
    /// Tell the client; nothing else changes.
    Refuse(Refusal),
    /// Do nothing.
    Ignore,
}

/// A file's `error`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The file.
    pub id: u64,
    /// The code of `docs/PROTOCOL.md`.
    pub code: Code,
    /// A sentence.
    pub message: String,
}

impl Lane {
    /// A lane without any message so far.
    pub fn new() -> Self {
        Self::default()
    }

    /// The id of the open file.
    pub fn open(&self) -> Option<u64> {
        match &self.state {
            State::Open(open) => Some(open.id),
            State::Idle | State::Dropping { .. } => None,
        }
    }

    /// The id of the file whose messages are dropped, because it has its outcome already.
    pub fn dropping(&self) -> Option<u64> {
        match &self.state {
            State::Dropping { id } => Some(*id),
            State::Idle | State::Open(_) => None,
        }
    }

    /// Processes one message, and returns what to do.
    pub fn on(&mut self, request: &Request) -> Action {
        match request {
            Request::File(offer) => self.file(offer),
            Request::Chunk { id, offset, bytes } => self.chunk(*id, *offset, bytes.len() as u64),
            Request::Copy(copied) => self.copy(*copied),
            Request::Hole(hole) => self.hole(*hole),
            Request::Finish(finish) => self.finish(*finish),
            Request::Cancel { id, keep } => self.cancel(*id, *keep),
            Request::Put(put) => match self.between(put.offer.id) {
                Ok(()) => Action::Put,
                Err(refusal) => Action::Refuse(refusal),
            },
            Request::Dir(offer) => match self.between(offer.id) {
                Ok(()) => Action::Dir(offer.clone()),
                Err(refusal) => Action::Refuse(refusal),
            },
            Request::Link(offer) => match self.between(offer.id) {
                Ok(()) => Action::Link(offer.clone()),
                Err(refusal) => Action::Refuse(refusal),
            },
            Request::Get(wish) => match self.number(wish.id) {
                Ok(()) => {
                    self.gets.insert(wish.id);
                    Action::Send(wish.clone())
                }
                Err(refusal) => Action::Refuse(refusal),
            },
            Request::Done { id } if self.gets.remove(id) => Action::Sent {
                id: *id,
                stored: true,
            },
            Request::Done { .. } | Request::Ack { .. } => Action::Ignore,
        }
    }

    /// The client has been told that the server has these ranges of the open file.
    pub fn told(&mut self, id: u64, have: &Have) {
        if let State::Open(open) = &mut self.state
            && open.id == id
        {
            open.have = have
                .iter()
                .map(|(off, len, _)| (*off, off.saturating_add(*len)))
                .collect();
        }
    }

    /// A download failed on this side, and the client was notified.
    pub fn unsent(&mut self, id: u64) {
        self.gets.remove(&id);
    }

    /// Downloads that the client has not confirmed yet.
    pub fn gets(&self) -> usize {
        self.gets.len()
    }

    /// Accepts a new id of the long form.
    fn number(&mut self, id: u64) -> Result<(), Refusal> {
        if self.last.is_some_and(|last| id <= last) {
            return Err(Refusal {
                id,
                code: Code::ProtocolOrder,
                message: "ids on a lane only go up".to_owned(),
            });
        }
        self.last = Some(id);
        Ok(())
    }

    /// Accepts a new id for a message that may not arrive while a file is open.
    fn between(&mut self, id: u64) -> Result<(), Refusal> {
        let open = self.open();
        self.number(id)?;
        match open {
            Some(open) => Err(Refusal {
                id,
                code: Code::ProtocolOrder,
                message: format!("file {open} is still open on this lane"),
            }),
            None => {
                self.state = State::Idle;
                Ok(())
            }
        }
    }

    /// The file got its `done` or `error` while it was open (refused, failed, skipped, stalled).
    pub fn ended(&mut self, id: u64) {
        if self.open() == Some(id) {
            self.state = State::Dropping { id };
        }
    }

    /// A message about the open file was malformed, which ends the file. Returns whether it was about the open file.
    pub fn malformed(&mut self, id: u64) -> bool {
        let open = self.open() == Some(id);
        self.ended(id);
        open
    }

    fn file(&mut self, offer: &Offer) -> Action {
        if offer.short {
            if let Some(open) = self.open() {
                let message = format!("file {open} is still open on this lane");
                return refuse(offer.id, Code::ProtocolOrder, message);
            }
        } else if let Err(refusal) = self.between(offer.id) {
            return Action::Refuse(refusal);
        }
        self.state = State::Open(Open {
            id: offer.id,
            short: offer.short,
            size: offer.size,
            based: offer.base.is_some(),
            next: 0,
            have: Vec::new(),
        });
        Action::Begin(offer.clone())
    }

    fn chunk(&mut self, id: u64, offset: Option<u64>, len: u64) -> Action {
        let open = match &mut self.state {
            State::Open(open) if open.id == id => open,
            State::Dropping { id: dropped } if *dropped == id => return Action::Ignore,
            _ => return refuse(id, Code::ProtocolOrder, "no such file is open".to_owned()),
        };
        if open.short != offset.is_none() {
            return self.abort(
                id,
                Code::BadMessage,
                "the two forms are mixed within one file".to_owned(),
            );
        }
        let expected = open.next;
        let offset = offset.unwrap_or(expected);
        if offset < expected || !open.covered(offset) {
            return self.abort(
                id,
                Code::BadOffset,
                format!("chunk out of place, expected offset {expected}"),
            );
        }
        let Some(next) = offset.checked_add(len) else {
            return self.abort(
                id,
                Code::SizeMismatch,
                "more bytes than any file has".to_owned(),
            );
        };
        if let Some(size) = open.size.filter(|size| next > *size) {
            let message = format!("size mismatch: expected {size} bytes, got {next}");
            return self.abort(id, Code::SizeMismatch, message);
        }
        open.next = next;
        Action::Write
    }

    fn copy(&mut self, copied: Copied) -> Action {
        let id = copied.id;
        if let State::Open(open) = &self.state
            && open.id == id
            && !open.based
        {
            return self.abort(
                id,
                Code::ProtocolOrder,
                "the file was offered without a base".to_owned(),
            );
        }
        match self.chunk(id, Some(copied.offset), copied.len) {
            Action::Write => Action::Copy(copied),
            action => action,
        }
    }

    fn hole(&mut self, hole: Hole) -> Action {
        match self.chunk(hole.id, Some(hole.offset), hole.len) {
            Action::Write => Action::Hole(hole),
            action => action,
        }
    }

    fn finish(&mut self, finish: Finish) -> Action {
        let id = finish.id;
        match &self.state {
            State::Open(open) if open.id == id => {
                if open.short != finish.hash.is_none() {
                    let action = self.abort(
                        id,
                        Code::BadMessage,
                        "the two forms are mixed within one file".to_owned(),
                    );
                    // After `finish` no message of this file is on its way.
                    self.state = State::Idle;
                    return action;
                }
                self.state = State::Idle;
                Action::Finish(finish)
            }
            State::Dropping { id: dropped } if *dropped == id => {
                self.state = State::Idle;
                Action::Ignore
            }
            _ => refuse(id, Code::ProtocolOrder, "no such file is open".to_owned()),
        }
    }

    fn cancel(&mut self, id: u64, keep: bool) -> Action {
        if self.gets.remove(&id) {
            return Action::Sent { id, stored: false };
        }
        match &self.state {
            State::Open(open) if open.id == id => {
                self.state = State::Idle;
                let refusal = Refusal {
                    id,
                    code: Code::Cancelled,
                    message: "given up by the client".to_owned(),
                };
                if keep {
                    Action::Suspend(refusal)
                } else {
                    Action::Abort(refusal)
                }
            }
            State::Dropping { id: dropped } if *dropped == id => {
                self.state = State::Idle;
                Action::Ignore
            }
            _ if self.last >= Some(id) => Action::Ignore,
            _ => refuse(id, Code::ProtocolOrder, "no such file is open".to_owned()),
        }
    }

    fn abort(&mut self, id: u64, code: Code, message: String) -> Action {
        self.state = State::Dropping { id };
        Action::Abort(Refusal { id, code, message })
    }
}

fn refuse(id: u64, code: Code, message: String) -> Action {
    Action::Refuse(Refusal { id, code, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{IfExists, XattrList, Xattrs};
    use crate::wire::{MetaFields, Put};
    use bytes::Bytes;

    fn offer(id: u64, size: Option<u64>) -> Request {
        Request::File(Offer {
            id,
            path: "x".into(),
            size,
            meta: MetaFields::default(),
            if_exists: IfExists::Same,
            resume: false,
            dirs: Vec::new(),
            run: None,
            base: None,
            xattrs: XattrList::default(),
            short: false,
        })
    }

    fn put(id: u64) -> Request {
        let Request::File(offer) = offer(id, Some(3)) else {
            panic!("an offer")
        };
        Request::Put(Put {
            offer,
            hash: [0; 32],
            bytes: Bytes::from_static(b"abc"),
        })
    }

    fn chunk(id: u64, offset: u64, len: usize) -> Request {
        Request::Chunk {
            id,
            offset: Some(offset),
            bytes: Bytes::from(vec![0; len]),
        }
    }

    fn finish(id: u64) -> Request {
        Request::Finish(Finish {
            id,
            size: Some(0),
            hash: Some([0; 32]),
        })
    }

    fn code(action: &Action) -> &'static str {
        match action {
            Action::Abort(refusal) | Action::Suspend(refusal) | Action::Refuse(refusal) => {
                refusal.code.as_str()
            }
            Action::Dir(_) => "dir",
            Action::Link(_) => "link",
            Action::Send(_) => "send",
            Action::Sent { .. } => "sent",
            Action::Begin(_) => "begin",
            Action::Put => "put",
            Action::Write => "write",
            Action::Copy(_) => "copy",
            Action::Hole(_) => "hole",
            Action::Finish(_) => "finish",
            Action::Ignore => "ignore",
        }
    }

    /// Runs a script and gives the code of each action.
    fn run(script: &[Request]) -> Vec<&'static str> {
        let mut lane = Lane::new();
        script
            .iter()
            .map(|request| code(&lane.on(request)))
            .collect()
    }

    #[test]
    fn files_follow_each_other() {
        let script = [
            offer(1, Some(3)),
            chunk(1, 0, 2),
            chunk(1, 2, 1),
            finish(1),
            offer(2, None),
            finish(2),
        ];
        assert_eq!(
            run(&script),
            ["begin", "write", "write", "finish", "begin", "finish"]
        );
    }

    #[test]
    fn what_comes_at_the_wrong_time_is_refused_and_the_open_file_goes_on() {
        let script = [
            chunk(1, 0, 1),
            finish(1),
            Request::Cancel { id: 1, keep: false },
            offer(5, None),
            offer(6, None),
            chunk(5, 0, 1),
            chunk(4, 0, 1),
            finish(5),
            finish(5),
            chunk(5, 1, 1),
            Request::Cancel { id: 5, keep: false },
            offer(5, None),
            offer(6, None),
            offer(7, None),
        ];
        let order = "protocol_order";
        assert_eq!(
            run(&script),
            [
                order, order, order, "begin", order, "write", order, "finish", order, order,
                "ignore", order, order, "begin"
            ]
        );
    }

    #[test]
    fn a_gap_or_an_overlap_ends_the_file_and_drops_what_was_on_its_way() {
        for bad in [chunk(1, 0, 1), chunk(1, 3, 1), chunk(1, u64::MAX, 1)] {
            let script = [
                offer(1, None),
                chunk(1, 0, 2),
                bad,
                chunk(1, 2, 1),
                finish(1),
                offer(2, None),
            ];
            assert_eq!(
                run(&script),
                ["begin", "write", "bad_offset", "ignore", "ignore", "begin"]
            );
        }
    }

    #[test]
    fn more_than_declared_is_refused_before_it_is_written() {
        let script = [
            offer(1, Some(2)),
            chunk(1, 0, 2),
            chunk(1, 2, 1),
            Request::Cancel { id: 1, keep: false },
            offer(2, None),
        ];
        assert_eq!(
            run(&script),
            ["begin", "write", "size_mismatch", "ignore", "begin"]
        );
    }

    #[test]
    fn what_the_server_has_may_be_passed_over_and_nothing_else() {
        let have = vec![(0, 10, [0; 32]), (10, 5, [0; 32]), (20, 5, [0; 32])];
        let after = |told: bool, script: &[Request]| {
            let mut lane = Lane::new();
            lane.on(&offer(1, Some(30)));
            if told {
                lane.told(1, &have);
            }
            script
                .iter()
                .map(|request| code(&lane.on(request)))
                .collect::<Vec<_>>()
        };
        assert_eq!(after(true, &[chunk(1, 15, 1)]), ["write"]);
        assert_eq!(
            after(true, &[chunk(1, 0, 4), chunk(1, 12, 3), chunk(1, 15, 5)]),
            ["write", "write", "write"]
        );
        assert_eq!(
            after(true, &[chunk(1, 15, 5), chunk(1, 25, 5), chunk(1, 24, 1)]),
            ["write", "write", "bad_offset"]
        );
        assert_eq!(after(true, &[chunk(1, 16, 1)]), ["bad_offset"]);
        assert_eq!(after(true, &[chunk(1, 20, 1)]), ["bad_offset"]);
        assert_eq!(after(false, &[chunk(1, 10, 1)]), ["bad_offset"]);
    }

    #[test]
    fn directories_links_and_downloads_come_between_files() {
        let dir = |id| {
            Request::Dir(DirOffer {
                id,
                path: "d".into(),
                dirs: Vec::new(),
                meta: MetaFields::default(),
                xattrs: XattrList::default(),
            })
        };
        let get = |id| {
            Request::Get(Wish {
                id,
                path: "x".into(),
                have: Have::new(),
                rate: None,
                holes: false,
                xattrs: Xattrs::None,
            })
        };
        let cancel = |id| Request::Cancel { id, keep: false };
        let script = [
            dir(1),
            dir(1),
            offer(2, None),
            dir(3),
            get(4),
            finish(2),
            Request::Done { id: 4 },
            Request::Done { id: 4 },
            get(5),
            cancel(5),
            cancel(5),
        ];
        let order = "protocol_order";
        assert_eq!(
            run(&script),
            [
                "dir", order, "begin", order, "send", "finish", "sent", "ignore", "send", "sent",
                "ignore"
            ]
        );
    }

    #[test]
    fn a_whole_file_comes_between_files_and_leaves_none_open() {
        let order = "protocol_order";
        let script = [
            put(1),
            put(1),
            chunk(1, 0, 1),
            finish(1),
            Request::Cancel { id: 1, keep: false },
            put(2),
            offer(3, None),
            put(4),
            chunk(3, 0, 1),
            chunk(3, 3, 1),
            put(5),
            finish(3),
            put(6),
        ];
        assert_eq!(
            run(&script),
            [
                "put",
                order,
                order,
                order,
                "ignore",
                "put",
                "begin",
                order,
                "write",
                "bad_offset",
                "put",
                order,
                "put"
            ]
        );
    }

    #[test]
    fn a_hole_is_a_chunk_of_zeros_and_may_lie_nowhere_else() {
        let hole = |id, offset, len| Request::Hole(Hole { id, offset, len });
        let script = [
            hole(1, 0, 1),
            offer(1, Some(30)),
            hole(1, 0, 10),
            chunk(1, 10, 5),
            hole(1, 15, 15),
            finish(1),
            // Overlapping, behind a gap, beyond the size, beyond all sizes.
            offer(2, Some(30)),
            chunk(2, 0, 10),
            hole(2, 9, 5),
            hole(2, 10, 5),
            offer(3, Some(30)),
            hole(3, 1, 1),
            offer(4, Some(30)),
            hole(4, 0, 31),
            offer(5, None),
            chunk(5, 0, 1),
            hole(5, 1, u64::MAX),
        ];
        assert_eq!(
            run(&script),
            [
                "protocol_order",
                "begin",
                "hole",
                "write",
                "hole",
                "finish",
                "begin",
                "write",
                "bad_offset",
                "ignore",
                "begin",
                "bad_offset",
                "begin",
                "size_mismatch",
                "begin",
                "write",
                "size_mismatch"
            ]
        );
    }

    #[test]
    fn cancel_ends_the_open_file() {
        let script = [
            offer(1, None),
            Request::Cancel { id: 1, keep: false },
            chunk(1, 0, 1),
            offer(2, None),
        ];
        assert_eq!(
            run(&script),
            ["begin", "cancelled", "protocol_order", "begin"]
        );
    }

    #[test]
    fn an_early_end_drops_the_rest_until_finish_or_the_next_file() {
        let mut lane = Lane::new();
        assert_eq!(code(&lane.on(&offer(1, None))), "begin");
        lane.ended(1);
        assert_eq!(code(&lane.on(&chunk(1, 0, 1))), "ignore");
        assert_eq!(code(&lane.on(&offer(2, None))), "begin");
        lane.ended(1);
        assert_eq!(
            lane.open(),
            Some(2),
            "the end of another file changes nothing"
        );
        assert_eq!(code(&lane.on(&chunk(1, 0, 1))), "protocol_order");
    }

    #[test]
    fn the_short_form_reuses_id_zero_and_does_not_mix() {
        let short = |size| {
            Request::File(Offer {
                id: 0,
                path: "x".into(),
                size,
                meta: MetaFields::default(),
                if_exists: IfExists::Same,
                resume: false,
                dirs: Vec::new(),
                run: None,
                base: None,
                xattrs: XattrList::default(),
                short: true,
            })
        };
        let bytes = || Request::Chunk {
            id: 0,
            offset: None,
            bytes: Bytes::from_static(b"ab"),
        };
        let end = Request::Finish(Finish {
            id: 0,
            size: None,
            hash: None,
        });
        let script = [
            short(Some(4)),
            bytes(),
            bytes(),
            end.clone(),
            short(None),
            bytes(),
            end,
        ];
        assert_eq!(
            run(&script),
            [
                "begin", "write", "write", "finish", "begin", "write", "finish"
            ]
        );
        assert_eq!(
            run(&[short(None), chunk(0, 0, 1)]),
            ["begin", "bad_message"]
        );
        assert_eq!(run(&[short(None), finish(0)]), ["begin", "bad_message"]);
        assert_eq!(run(&[offer(0, None), bytes()]), ["begin", "bad_message"]);
    }
}
