//! The rooms with a history that a channel is in: the peer's position in each, and what is queued next.
//!
//! Messages for which the queue has no room wait in the room's log only. Messages that are sent directly do not wait
//! for them.

use std::sync::Arc;

use bytes::Bytes;

use super::{Membership, Outbox, State};
use crate::base::lock;
use crate::channel::history::{Entry, Record};
use crate::channel::overflow::{Overflow, Push};
use crate::metrics::Count;
use crate::wire::control::{self, At, Gap, Missing, Position, ProtocolEvent, RoomAt, Why};
use crate::wire::frame::PREFIX;

/// Messages of one room that are queued before the next room's turn.
const TURN: usize = 64;
/// Rooms that a channel has left and whose last offset is remembered, at most.
const MOST_LEFT: usize = 64;
/// Messages that a channel still sends when it ends.
const LAST: usize = 1024;

/// A member that follows a room.
#[derive(Debug)]
pub(crate) struct Follower {
    pub(crate) session: Arc<str>,
    /// Whether the peer supports positions.
    pub(crate) positions: bool,
    /// The largest frame that the peer accepts.
    pub(crate) limit: usize,
    pub(crate) since: Since,
}

/// The place in a log at which a member begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Since {
    /// With the next message.
    Now,
    /// With the oldest kept message.
    Oldest,
    /// After this position.
    Position(Position),
}

/// A message on its way into a room's log and to its members.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Followed<'a> {
    pub(crate) record: &'a Arc<Record>,
    pub(crate) offset: u64,
    pub(crate) frame: &'a Bytes,
    pub(crate) policy: Overflow,
    /// As in [`Outbox::push_room`].
    pub(crate) direct: bool,
}

/// A member's progress in one room.
#[derive(Debug)]
pub(super) struct Stream {
    record: Arc<Record>,
    follower: Follower,
    policy: Overflow,
    /// The last offset that was sent, skipped or reported as lost.
    cursor: u64,
    /// The room's last offset when it joined. No policy drops the messages up to there, which it had missed before.
    base: u64,
    /// Set if its position belonged to another history: it must be told so first.
    foreign: bool,
    /// Set while its position is one that this node does not have yet: the question to the cluster whether it has come
    /// that far. 0: not asked yet.
    ahead: Option<u64>,
    /// Set if it must be told its position and the room's number.
    begins: bool,
    /// Set if the last messages were not for it and it does not know that its position is after them.
    skipped: bool,
    /// The offset before which it was last told of messages without an offset.
    told: Option<u64>,
    missing: Option<Loss>,
    /// Messages that were lost because it was too slow, not counted yet.
    dropped: u64,
    /// The last offset before it left the room.
    until: Option<u64>,
    /// Whether the log contains more.
    pub(super) behind: bool,
}

/// Adjacent messages that will not be sent; the last one is at the cursor.
#[derive(Debug)]
struct Loss {
    from: u64,
    lost: u64,
    why: Why,
}

enum Next {
    Protocol(Option<Bytes>),
    Message(Bytes),
}

impl Stream {
    fn new(record: Arc<Record>, follower: Follower) -> Self {
        let head = record.head();
        let before_first = || record.before_first();
        let (cursor, foreign, ahead) = match follower.since {
            Since::Now => (head, false, None),
            Since::Oldest => (before_first(), false, None),
            Since::Position(position) => match record.find(position) {
                Some(offset) => (offset, false, None),
                // Another node was told of messages that are still on their way to this one.
                None if record.copy && position.epoch == record.epoch => {
                    (position.offset, false, Some(0))
                }
                None => (before_first(), true, None),
            },
        };
        Self {
            record,
            policy: Overflow::Recover,
            cursor,
            base: head,
            foreign,
            ahead,
            begins: true,
            skipped: false,
            told: None,
            missing: None,
            dropped: 0,
            until: None,
            behind: true,
            follower,
        }
    }

    /// This channel has had what is up to this offset before: whoever asks for what is behind an earlier one had not read
    /// all of that yet. Asking for the oldest is asking for it again.
    fn pass_over(&mut self, last: u64) {
        if matches!(self.follower.since, Since::Position(_)) && !self.foreign {
            self.cursor = self.cursor.max(last);
        }
    }

    /// How many messages may wait in the log.
    fn window(&self) -> Option<u64> {
        (self.cursor >= self.base).then(|| self.policy.unread())?
    }

    /// Records that the messages up to `to`, `lost` of them for this member, will not be sent.
    fn lose(&mut self, lost: u64, to: u64, why: Why) {
        let from = self.cursor + 1;
        let loss = self.missing.get_or_insert(Loss { from, lost: 0, why });
        loss.lost += lost;
        loss.why = why;
        if self.cursor >= self.base {
            self.dropped += lost;
            self.record.lose(lost);
        }
        self.cursor = to;
    }

    /// Drops the oldest messages if more wait than may.
    fn narrow(&mut self, end: u64) {
        if let Some(most) = self.window()
            && let Some(to) = end.checked_sub(most).filter(|to| *to > self.cursor)
        {
            self.lose(to - self.cursor, to, Why::Slow);
        }
    }

    fn end(&self) -> u64 {
        self.until.unwrap_or_else(|| self.record.head())
    }

    /// The cluster's log ends before its position: that belongs to another history.
    fn is_beyond(&mut self) {
        self.ahead = None;
        self.foreign = true;
        self.base = self.record.head();
        self.cursor = self.record.before_first();
    }

    /// Whether it has to wait for what the cluster keeps.
    fn waits(&mut self) -> bool {
        if self.ahead.is_some() && self.record.head() >= self.cursor {
            self.ahead = None;
        }
        self.record.is_pending() || self.ahead.is_some()
    }

    /// What is sent to the member next.
    fn next(&mut self) -> Option<Next> {
        if self.waits() {
            return None;
        }
        if std::mem::take(&mut self.foreign) {
            return Some(self.gap(1, self.cursor, Why::Epoch));
        }
        if std::mem::take(&mut self.begins) {
            return Some(self.place());
        }
        let end = self.end();
        self.narrow(end);
        while self.cursor < end {
            match self.record.after(self.cursor, &self.follower.session) {
                Entry::End => break,
                Entry::Gone(to) => {
                    let to = to.min(end);
                    self.lose(to - self.cursor, to, Why::Gone);
                }
                Entry::Message { lost, .. } if lost > 0 && self.told != Some(self.cursor) => {
                    if let Some(gap) = self.take_missing() {
                        return Some(gap);
                    }
                    self.told = Some(self.cursor);
                    return Some(self.gap_between(lost));
                }
                Entry::Message { frame: None, .. } => {
                    self.cursor += 1;
                    self.skipped = true;
                }
                Entry::Message {
                    frame: Some(frame), ..
                } if self.is_too_large(&frame) => {
                    self.lose(1, self.cursor + 1, Why::Slow);
                }
                Entry::Message {
                    frame: Some(frame), ..
                } => {
                    if let Some(gap) = self.take_missing() {
                        return Some(gap);
                    }
                    self.cursor += 1;
                    self.skipped = false;
                    return Some(Next::Message(frame));
                }
            }
        }
        let gap = self.take_missing();
        gap.or_else(|| std::mem::take(&mut self.skipped).then(|| self.place()))
    }

    fn is_too_large(&self, frame: &Bytes) -> bool {
        frame.len().saturating_sub(PREFIX) > self.follower.limit
    }

    fn take_missing(&mut self) -> Option<Next> {
        let Loss { from, lost, why } = self.missing.take()?;
        self.skipped = false;
        Some(self.gap(from, lost, why))
    }

    /// A `$gap` that ends at the cursor.
    fn gap(&self, from: u64, lost: u64, why: Why) -> Next {
        let missing = Missing {
            epoch: self.record.epoch,
            from,
            to: self.cursor,
            why,
        };
        let gap = Gap {
            room: self.record.room.to_string(),
            lost,
            missing: self.follower.positions.then_some(missing),
        };
        // A peer without support for positions cannot be told about another epoch.
        Next::Protocol(match gap.missing.is_some() || lost > 0 {
            true => control::encode(&gap),
            false => None,
        })
    }

    /// A `$gap` for messages that never got an offset.
    fn gap_between(&self, lost: u64) -> Next {
        Next::Protocol(control::encode(&Gap {
            room: self.record.room.to_string(),
            lost,
            missing: None,
        }))
    }

    /// A `$room` with the cursor's position.
    fn place(&self) -> Next {
        let place = RoomAt {
            room: self.record.room.to_string(),
            number: self.record.number,
            epoch: self.record.epoch,
            offset: self.cursor,
        };
        Next::Protocol(match self.follower.positions {
            true => control::encode(&place),
            false => None,
        })
    }
}

impl Outbox {
    /// Begins to follow a room, or continues to. Returns whether the member's position is one that this node does not
    /// have yet.
    pub(crate) fn follow(&self, record: &Arc<Record>, follower: Follower) -> bool {
        let mut state = lock(&self.state);
        if state.check_open().is_err() {
            return false;
        }
        match state.stream(record) {
            Some(at) => {
                state.rooms.streams[at].until = None;
                false
            }
            None => {
                let mut stream = Stream::new(record.clone(), follower);
                if let Some(last) = state.rooms.came_back(record.number) {
                    stream.pass_over(last);
                }
                let ahead = stream.ahead.is_some();
                state.rooms.streams.push(stream);
                ahead
            }
        }
    }

    /// Goes on in another log of the room, which took the place of this one. Returns whether the member's position is
    /// one that this node does not have yet.
    pub(crate) fn follow_instead(&self, old: &Arc<Record>, new: &Arc<Record>) -> bool {
        let mut state = lock(&self.state);
        let Some(at) = state.stream(old).filter(|_| state.check_open().is_ok()) else {
            return false;
        };
        let before = state.rooms.streams.remove(at);
        if before.until.is_some() {
            // The channel has left the room; nobody knows what it would have got.
            return false;
        }
        let since = match old.is_pending() {
            true => before.follower.since,
            false => Since::Position(Position {
                epoch: old.epoch,
                offset: before.cursor,
            }),
        };
        let follower = Follower {
            since,
            ..before.follower
        };
        let stream = Stream {
            policy: before.policy,
            dropped: before.dropped,
            ..Stream::new(new.clone(), follower)
        };
        let ahead = stream.ahead.is_some();
        state.rooms.streams.push(stream);
        self.catch_up(&mut state);
        ahead
    }

    /// The cluster is asked with this number how far its log goes.
    pub(crate) fn asked(&self, record: &Arc<Record>, number: u64) {
        let mut state = lock(&self.state);
        if let Some(at) = state.stream(record)
            && let Some(ahead) = &mut state.rooms.streams[at].ahead
        {
            *ahead = number;
        }
    }

    /// The cluster has answered this question, and those with lower numbers: all that it keeps is in the log.
    pub(crate) fn answered(&self, record: &Arc<Record>, number: u64) {
        let mut state = lock(&self.state);
        if let Some(at) = state.stream(record) {
            let stream = &mut state.rooms.streams[at];
            if stream.waits()
                && stream
                    .ahead
                    .is_some_and(|asked| (1..=number).contains(&asked))
            {
                stream.is_beyond();
            }
            stream.behind = true;
            self.catch_up(&mut state);
        }
    }

    /// Follows a room up to its present end only.
    pub(crate) fn unfollow(&self, record: &Arc<Record>) {
        let mut state = lock(&self.state);
        if let Some(at) = state.stream(record) {
            let stream = &mut state.rooms.streams[at];
            stream.until = Some(record.head());
            stream.behind = true;
            self.catch_up(&mut state);
        }
    }

    /// Queues what a new member has missed, as far as there is room.
    pub(crate) fn catch_up_now(&self) {
        self.catch_up(&mut lock(&self.state));
    }

    /// Queues a message of a room with a history, or leaves it in the room's log while there is no room. Never waits.
    pub(crate) fn push_followed(
        &self,
        message: Followed<'_>,
        limit: usize,
        excluded: bool,
    ) -> Push {
        let mut state = lock(&self.state);
        if state.check_open().is_err() {
            return Push::Over;
        }
        let Some(at) = state.stream(message.record) else {
            return Push::Over;
        };
        let unread = state.unread(message.policy);
        let free =
            state.waiting.is_empty() && self.has_room(&state) && state.rooms.may_send(unread);
        let stream = &mut state.rooms.streams[at];
        (stream.policy, stream.follower.limit) = (message.policy, limit);
        if stream.cursor >= message.offset {
            return Push::Queued { lost: 0 };
        }
        let in_step = stream.cursor + 1 == message.offset && !stream.behind && !stream.begins;
        if in_step && excluded {
            stream.cursor = message.offset;
            stream.skipped = true;
        } else if in_step && free && !stream.is_too_large(message.frame) {
            stream.cursor = message.offset;
            stream.skipped = false;
            self.pass(&mut state, at, message, unread);
            return Push::Queued { lost: 0 };
        }
        self.wait(&mut state, at, message.offset)
    }

    /// Queues the message that is next, preceded by its position.
    fn pass(&self, state: &mut State, at: usize, message: Followed<'_>, unread: Option<u64>) {
        let size = message.frame.len();
        let direct = message.direct && self.may_write(state, size) && state.frames.tail.is_empty();
        state.goes(unread);
        state.at(at, message.offset);
        state.append(message.frame);
        self.counts.one(Count::RoomSent);
        if direct {
            let messages = std::mem::take(&mut state.frames.tail_messages);
            let frames = std::mem::take(&mut state.frames.tail).freeze();
            if self.write_messages(state, frames, messages) {
                return;
            }
        }
        self.wake(state);
    }

    /// The log counts messages that never arrived: tells the member.
    pub(crate) fn follow_skip(&self, record: &Arc<Record>) {
        let mut state = lock(&self.state);
        if state.check_open().is_ok()
            && let Some(at) = state.stream(record)
        {
            state.rooms.streams[at].behind = true;
            self.catch_up(&mut state);
        }
    }

    /// A message cannot be sent at once: the room's policy decides.
    fn wait(&self, state: &mut State, at: usize, offset: u64) -> Push {
        state.rooms.streams[at].behind = true;
        let record = state.rooms.streams[at].record.clone();
        self.catch_up(state);
        // Its index may have changed, but it exists: nobody has left.
        let Some(stream) = state.stream(&record).map(|at| &mut state.rooms.streams[at]) else {
            return Push::Queued { lost: 0 };
        };
        let slow = stream.cursor < offset && stream.cursor >= stream.base;
        let push = match stream.policy {
            Overflow::Disconnect if slow => Push::TooSlow,
            Overflow::DropNewest if slow => {
                stream.lose(offset - stream.cursor, offset, Why::Slow);
                Push::Lost
            }
            _ => {
                let before = stream.cursor;
                if slow {
                    stream.narrow(offset);
                }
                let lost = stream.cursor - before;
                Push::Queued { lost }
            }
        };
        self.count_dropped(stream);
        push
    }

    fn count_dropped(&self, stream: &mut Stream) {
        let dropped = std::mem::take(&mut stream.dropped);
        if dropped > 0 {
            self.counts.add(Count::RoomDropped, dropped);
        }
    }

    /// Moves waiting messages from the logs into the queue, as far as there is room: some of each room in turn, and at
    /// most one message before waiting senders.
    pub(super) fn catch_up(&self, state: &mut State) {
        let turn = if state.waiting.is_empty() { TURN } else { 1 };
        if !state.rooms.streams.iter().any(|stream| stream.behind) {
            return;
        }
        let mut quiet = 0;
        while quiet < state.rooms.streams.len() && self.has_room(state) {
            let mut stream = state.rooms.streams.remove(0);
            let moved = stream.behind && self.take_turn(state, &mut stream, turn);
            quiet = if moved { 0 } else { quiet + 1 };
            if stream.behind || stream.until.is_none() {
                state.rooms.streams.push(stream);
            } else {
                state.rooms.has_left(&stream);
                quiet = 0;
            }
            if moved && turn == 1 {
                break;
            }
        }
    }

    /// Queues some of a stream's messages; returns whether there were any.
    fn take_turn(&self, state: &mut State, stream: &mut Stream, turn: usize) -> bool {
        let unread = state.unread(stream.policy);
        let mut moved = false;
        for _ in 0..turn {
            if !self.has_room(state) {
                break;
            }
            if !state.rooms.may_send(unread) {
                self.ask(state);
                break;
            }
            let Some(next) = stream.next() else {
                stream.behind = false;
                break;
            };
            moved = true;
            self.queue_next(state, stream, next, unread);
        }
        self.count_dropped(stream);
        if moved {
            self.wake(state);
        }
        moved
    }

    fn queue_next(&self, state: &mut State, stream: &Stream, next: Next, unread: Option<u64>) {
        match next {
            Next::Protocol(frame) => {
                if let Some(frame) = frame {
                    state.append(&frame);
                }
            }
            Next::Message(frame) => {
                state.goes(unread);
                state.position(stream, stream.cursor);
                state.append(&frame);
                self.counts.one(Count::RoomSent);
            }
        }
    }

    /// The channel ends: sends a bounded part of the waiting messages, and reports the others as lost.
    pub(super) fn take_along(&self, state: &mut State) {
        for mut stream in std::mem::take(&mut state.rooms.streams) {
            let mut left = LAST;
            let mut bytes = self.max_bytes;
            while stream.behind && left > 0 && bytes > 0 {
                let Some(next) = stream.next() else {
                    stream.behind = false;
                    break;
                };
                if let Next::Message(frame) = &next {
                    bytes = bytes.saturating_sub(frame.len());
                }
                left -= 1;
                self.queue_next(state, &stream, next, None);
            }
            let end = stream.end();
            if stream.behind && stream.cursor < end {
                stream.lose(end - stream.cursor, end, Why::Slow);
                if let Some(gap) = stream.take_missing() {
                    self.queue_next(state, &stream, gap, None);
                }
            }
            self.count_dropped(&mut stream);
        }
    }
}

impl Membership {
    fn has_left(&mut self, stream: &Stream) {
        if self.left.len() == MOST_LEFT {
            self.left.remove(0);
        }
        self.left.push((stream.record.number, stream.cursor));
    }

    fn came_back(&mut self, number: u64) -> Option<u64> {
        let at = self.left.iter().position(|(left, _)| *left == number)?;
        Some(self.left.remove(at).1)
    }
}

impl State {
    fn stream(&self, record: &Arc<Record>) -> Option<usize> {
        let mut streams = self.rooms.streams.iter();
        streams.position(|stream| Arc::ptr_eq(&stream.record, record))
    }

    /// How many messages may be unread under this policy, if the peer reports what it has read.
    fn unread(&self, policy: Overflow) -> Option<u64> {
        policy.unread().filter(|_| self.rooms.pace.is_some())
    }

    /// The message that follows is this one, of the stream at index `at`.
    fn at(&mut self, at: usize, offset: u64) {
        let stream = &self.rooms.streams[at];
        if stream.follower.positions {
            let number = stream.record.number;
            self.announce(number, offset);
        }
    }

    fn position(&mut self, stream: &Stream, offset: u64) {
        if stream.follower.positions {
            self.announce(stream.record.number, offset);
        }
    }

    fn announce(&mut self, number: u64, offset: u64) {
        // Two numbers can always be encoded.
        let at = At(number, offset);
        let _ = self.message(ProtocolEvent::At.name(), &at, None, usize::MAX >> 1);
    }
}

#[cfg(test)]
mod tests;
