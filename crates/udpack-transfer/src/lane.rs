//! The server's half of a lane as a pure state machine: which message may come when, and what it asks for.
//!
//! No I/O, no time, no bytes: the caller carries out the [`Action`] and reports back with
//! [`Lane::ended`]. The table is `docs/PROTOCOL.md` §11, "States of one file".

use crate::wire::{Finish, Offer, Request};

/// Where a lane stands.
#[derive(Debug, Default)]
pub struct Lane {
    state: State,
    /// The highest id of the long form so far: ids only go up.
    last: Option<u64>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Open(Open),
    /// The file ended before its `finish` came: what was on its way is dropped.
    Dropping {
        id: u64,
    },
}

#[derive(Debug)]
struct Open {
    id: u64,
    short: bool,
    size: Option<u64>,
    next: u64,
}

/// What the caller must do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Begin this file; it is now the open one.
    Begin(Offer),
    /// Append the chunk's bytes to the open file.
    Write,
    /// Check and publish the open file; the lane takes the next one.
    Finish(Finish),
    /// Drop the open file and tell the client.
    Abort(Refusal),
    /// Tell the client; nothing else changes.
    Refuse(Refusal),
    /// Nothing.
    Ignore,
}

/// A file's `error`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The file.
    pub id: u64,
    /// The code of `docs/PROTOCOL.md`.
    pub code: &'static str,
    /// A sentence.
    pub message: String,
}

impl Lane {
    /// A lane on which nothing was said yet.
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

    /// The id of the file whose messages are dropped: it has its outcome already.
    pub fn dropping(&self) -> Option<u64> {
        match &self.state {
            State::Dropping { id } => Some(*id),
            State::Idle | State::Open(_) => None,
        }
    }

    /// Takes one message and says what to do.
    pub fn on(&mut self, request: &Request) -> Action {
        match request {
            Request::File(offer) => self.file(offer),
            Request::Chunk { id, offset, bytes } => self.chunk(*id, *offset, bytes.len() as u64),
            Request::Finish(finish) => self.finish(*finish),
            Request::Cancel { id } => self.cancel(*id),
            Request::Done => Action::Ignore,
        }
    }

    /// The file got its `done` or `error` while it was open (refused, failed, skipped, stalled).
    pub fn ended(&mut self, id: u64) {
        if self.open() == Some(id) {
            self.state = State::Dropping { id };
        }
    }

    /// A message about the open file was malformed: it ends. Says whether that was the open file.
    pub fn malformed(&mut self, id: u64) -> bool {
        let open = self.open() == Some(id);
        self.ended(id);
        open
    }

    fn file(&mut self, offer: &Offer) -> Action {
        if let State::Open(open) = &self.state {
            let message = format!("file {} is still open on this lane", open.id);
            if !offer.short && self.last < Some(offer.id) {
                self.last = Some(offer.id);
            }
            return refuse(offer.id, "protocol_order", message);
        }
        if !offer.short {
            if self.last.is_some_and(|last| offer.id <= last) {
                let message = "ids on a lane only go up".to_owned();
                return refuse(offer.id, "protocol_order", message);
            }
            self.last = Some(offer.id);
        }
        self.state = State::Open(Open {
            id: offer.id,
            short: offer.short,
            size: offer.size,
            next: 0,
        });
        Action::Begin(offer.clone())
    }

    fn chunk(&mut self, id: u64, offset: Option<u64>, len: u64) -> Action {
        let open = match &mut self.state {
            State::Open(open) if open.id == id => open,
            State::Dropping { id: dropped } if *dropped == id => return Action::Ignore,
            _ => return refuse(id, "protocol_order", "no such file is open".to_owned()),
        };
        if open.short != offset.is_none() {
            return self.abort(
                id,
                "bad_message",
                "the two forms are mixed within one file".to_owned(),
            );
        }
        let expected = open.next;
        if offset.is_some_and(|offset| offset != expected) {
            return self.abort(
                id,
                "bad_offset",
                format!("chunk out of place, expected offset {expected}"),
            );
        }
        let Some(next) = expected.checked_add(len) else {
            return self.abort(
                id,
                "size_mismatch",
                "more bytes than any file has".to_owned(),
            );
        };
        if let Some(size) = open.size.filter(|size| next > *size) {
            let message = format!("size mismatch: expected {size} bytes, got {next}");
            return self.abort(id, "size_mismatch", message);
        }
        open.next = next;
        Action::Write
    }

    fn finish(&mut self, finish: Finish) -> Action {
        let id = finish.id;
        match &self.state {
            State::Open(open) if open.id == id => {
                if open.short != finish.hash.is_none() {
                    let action = self.abort(
                        id,
                        "bad_message",
                        "the two forms are mixed within one file".to_owned(),
                    );
                    // Its `finish` has come: nothing more is on its way.
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
            _ => refuse(id, "protocol_order", "no such file is open".to_owned()),
        }
    }

    fn cancel(&mut self, id: u64) -> Action {
        match &self.state {
            State::Open(open) if open.id == id => {
                self.state = State::Idle;
                Action::Abort(Refusal {
                    id,
                    code: "cancelled",
                    message: "given up by the client".to_owned(),
                })
            }
            State::Dropping { id: dropped } if *dropped == id => {
                self.state = State::Idle;
                Action::Ignore
            }
            _ if self.last >= Some(id) => Action::Ignore,
            _ => refuse(id, "protocol_order", "no such file is open".to_owned()),
        }
    }

    fn abort(&mut self, id: u64, code: &'static str, message: String) -> Action {
        self.state = State::Dropping { id };
        Action::Abort(Refusal { id, code, message })
    }
}

fn refuse(id: u64, code: &'static str, message: String) -> Action {
    Action::Refuse(Refusal { id, code, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::IfExists;
    use bytes::Bytes;

    fn offer(id: u64, size: Option<u64>) -> Request {
        Request::File(Offer {
            id,
            path: "x".into(),
            size,
            mtime: None,
            if_exists: IfExists::Same,
            resume: false,
            short: false,
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
            Action::Abort(refusal) | Action::Refuse(refusal) => refusal.code,
            Action::Begin(_) => "begin",
            Action::Write => "write",
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
            Request::Cancel { id: 1 },
            offer(5, None),
            offer(6, None),
            chunk(5, 0, 1),
            chunk(4, 0, 1),
            finish(5),
            finish(5),
            chunk(5, 1, 1),
            Request::Cancel { id: 5 },
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
            Request::Cancel { id: 1 },
            offer(2, None),
        ];
        assert_eq!(
            run(&script),
            ["begin", "write", "size_mismatch", "ignore", "begin"]
        );
    }

    #[test]
    fn cancel_ends_the_open_file() {
        let script = [
            offer(1, None),
            Request::Cancel { id: 1 },
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
                mtime: None,
                if_exists: IfExists::Same,
                resume: false,
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
