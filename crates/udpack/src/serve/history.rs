//! Rooms with a history: turning it on and off, joining from a position, sending.
//!
//! A send puts the message into the room's log first and then reads the list of members. A join makes the channel a
//! member first and then reads the log. So each message reaches the member on one of the two ways or on both, and the
//! member's position removes duplicates.

use std::sync::Arc;

use bytes::Bytes;

use crate::base::lock;
use crate::channel::Channel;
use crate::channel::history::{History, Record};
use crate::channel::outbox::follow::{Followed, Follower, Since};
use crate::channel::overflow::{Overflow, Push};
use crate::serve::rooms::{Broadcast, Directory, Guest, JoinError, Room, Rooms, Sent};
use crate::wire::control::{self, Gap, Missing, Position, Why};
use crate::wire::message::{Encoded, check_name};

/// The epoch of a copy of which nothing is known yet.
const PENDING: u64 = 0;

/// The position at which a channel begins in a room that it joins; see [`Channel::join_at`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// With the next message, even if the channel's opener presented a position.
    Now,
    /// With the oldest message in the room's history.
    Oldest,
    /// After this position.
    Since(Position),
}

impl Rooms {
    /// Makes the room keep its messages within these bounds, so that members that were away or are slow miss none of
    /// them. `None` turns the history off and drops its messages. From now on, members get each message with its
    /// position, if their library supports positions.
    ///
    /// Such a room applies [`Overflow::Recover`] to members whose queues are full, unless it has its own policy. It
    /// stays when it is empty. Changed bounds apply from now on. A history that was turned off and on again begins
    /// anew; a member that presents an earlier position is told so.
    ///
    /// In a cluster whose broker keeps histories, all nodes share one, which survives them: see `docs/CLUSTER.md`. It must be
    /// turned on at every node, with the same bounds. Turning it off ends this node's part in it.
    ///
    /// All histories of a server together keep at most `Limits::history_bytes`; beyond that the oldest messages are
    /// dropped first, whichever room they belong to.
    ///
    /// # Errors
    /// If the name is invalid, if there are `Limits::rooms` already, or if the system provides no random number for the
    /// epoch ([`JoinError::NoRandom`]).
    pub fn history(&self, room: &str, bounds: impl Into<Option<History>>) -> Result<(), JoinError> {
        check_name(room)?;
        let directory = self.directory();
        // Nobody can join while the table is locked: earlier members follow the history from here on, later ones begin
        // by themselves.
        let mut table = lock(&directory.table);
        let Some(bounds) = bounds.into() else {
            if let Some(room) = table.rooms.get(room).cloned() {
                let record = lock(&room.sending).history.take();
                if record.as_ref().is_some_and(|record| record.copy) {
                    directory.share(&room, |node, shared| node.forget(shared));
                }
                for guest in room.guests().iter() {
                    if let Some(record) = &record {
                        guest.outbox.unfollow(record);
                    }
                }
                directory.sweep_in(&mut table, &room);
            }
            return Ok(());
        };
        let room = directory.room(&mut table, room)?;
        let known = lock(&room.sending).history.clone();
        if let Some(record) = known {
            record.set_bounds(bounds);
            if record.copy {
                directory.share(&room, |node, shared| node.keep(shared, bounds));
            }
            return Ok(());
        }
        if directory.node().is_some_and(|node| node.keeps()) {
            directory.attach(&room, directory.copy(&room, PENDING, bounds));
            directory.share(&room, |node, shared| node.keep(shared, bounds));
            return Ok(());
        }
        let Some(epoch) = Record::new_epoch() else {
            directory.sweep_in(&mut table, &room);
            return Err(JoinError::NoRandom);
        };
        directory.attach(&room, directory.record(&room, epoch, bounds));
        Ok(())
    }

    /// Like [`history`](Self::history), but with messages from elsewhere, for a room that has no history on this
    /// server. `last` is the position of the last of `messages`; the messages before it have the offsets before that. A
    /// program that stores [`kept`](Self::kept), or the messages it sends, can so let members continue after a restart.
    /// The messages count as sent now. Returns false and does nothing if the room has a history already, or for an
    /// impossible position (epoch 0, or an offset below the number of messages), or if the cluster keeps histories.
    ///
    /// # Errors
    /// As for [`history`](Self::history).
    pub fn restore(
        &self,
        room: &str,
        bounds: History,
        last: Position,
        messages: &[Encoded],
    ) -> Result<bool, JoinError> {
        check_name(room)?;
        let directory = self.directory();
        let mut table = lock(&directory.table);
        let known = table.rooms.get(room);
        let has = known.is_some_and(|room| lock(&room.sending).history.is_some());
        let before = last.offset.checked_sub(messages.len() as u64);
        let kept = directory.node().is_some_and(|node| node.keeps());
        let possible = !has && !kept && last.epoch > 0 && last.offset < u64::MAX;
        let Some(before) = before.filter(|_| possible) else {
            return Ok(false);
        };
        let room = directory.room(&mut table, room)?;
        let record = directory.record(&room, last.epoch, bounds);
        record.begin_behind(before);
        for message in messages {
            record.push(message.bytes(), &[]);
        }
        directory.attach(&room, record);
        Ok(true)
    }

    /// The messages in a room's history, with the position of the last message, even if that one is not kept any more;
    /// `None` for a room without a history, or one of which the cluster has not told yet what it keeps.
    pub fn kept(&self, room: &str) -> Option<(Position, Vec<Encoded>)> {
        let room = self.directory().existing(room)?;
        let record = lock(&room.sending).history.clone()?;
        if record.is_pending() {
            return None;
        }
        let (offset, frames) = record.kept();
        let last = Position {
            epoch: record.epoch,
            offset,
        };
        Some((last, frames.into_iter().map(Encoded::from_frame).collect()))
    }

    /// The position of a room's last message; `None` as for [`kept`](Self::kept).
    pub fn position(&self, room: &str) -> Option<Position> {
        let room = self.directory().existing(room)?;
        let record = lock(&room.sending).history.clone()?;
        (!record.is_pending()).then(|| Position {
            epoch: record.epoch,
            offset: record.head(),
        })
    }

    /// The bytes that the histories of all rooms hold, as `Limits::history_bytes` counts them.
    pub fn history_bytes(&self) -> usize {
        self.directory().archive.used()
    }
}

impl Channel {
    /// Joins a room as [`join`](Self::join) does, but at `start` in its history and not at the position that the
    /// channel's opener presented. In a room without a history, `start` has no effect. A channel that was in the room
    /// before and begins [`Since`](Start::Since) a position does not get again what it was sent then.
    ///
    /// # Errors
    /// As for [`join`](Self::join).
    pub fn join_at(&self, room: &str, start: Start) -> Result<(), JoinError> {
        self.enter(room, Some(start)).map(drop)
    }
}

impl Guest {
    fn follower(&self, since: Since) -> Follower {
        let welcome = self.session.welcome();
        Follower {
            session: self.session_id.shared(),
            positions: welcome.is_some_and(|welcome| welcome.history),
            limit: self.session.frame_limit(),
            since,
        }
    }

    /// The position that the opener presented for this room; returned once.
    fn presented(&self, room: &str) -> Option<Position> {
        let mut since = lock(&self.since);
        let at = since.iter().position(|place| place.room == room)?;
        Some(since.swap_remove(at).position())
    }

    /// Begins to follow a room, right before the channel becomes a member.
    pub(super) fn follow(&self, directory: &Directory, room: &Room, start: Option<Start>) {
        let presented = self.presented(&room.tag.name);
        let since = match start {
            Some(Start::Now) => Since::Now,
            Some(Start::Oldest) => Since::Oldest,
            Some(Start::Since(position)) => Since::Position(position),
            None => presented.map_or(Since::Now, Since::Position),
        };
        let record = lock(&room.sending).history.clone();
        match (record, since) {
            (Some(record), since) => {
                if self.outbox.follow(&record, self.follower(since)) {
                    directory.share(room, |node, shared| {
                        node.ask_how_far(directory, shared, (self, &record));
                    });
                }
            }
            // The peer presented a position of a history that does not exist any more.
            (None, Since::Position(_)) => self.tell_nothing_kept(&room.tag.name),
            (None, _) => {}
        }
    }

    fn tell_nothing_kept(&self, room: &str) {
        let missing = Missing {
            epoch: 0,
            from: 1,
            to: 0,
            why: Why::Epoch,
        };
        let gap = Gap {
            room: room.to_owned(),
            lost: 0,
            missing: Some(missing),
        };
        let knows = self
            .session
            .welcome()
            .is_some_and(|welcome| welcome.history);
        if let Some(frame) = control::encode(&gap).filter(|_| knows) {
            // There is at most one for each position in its `$open`. A channel that has ended needs none.
            let _ = self.outbox.force(&frame);
        }
    }
}

impl Broadcast<'_> {
    /// Sends a message by the log that the cluster keeps of the room, if it does.
    pub(super) fn append(&self, message: &Encoded) -> Option<Sent> {
        let (room, shared) = (self.room.as_ref()?, self.shared.as_ref()?);
        let node = self.directory.node().filter(|node| node.keeps())?;
        let copy = lock(&room.sending).history.as_ref()?.copy;
        if !copy {
            return None;
        }
        let whom = |guest: &&Arc<Guest>| !self.except.contains(&&*guest.session_id);
        let members = room.guests().iter().filter(whom).count() as u64;
        Some(match node.append(shared, &self.except, message.bytes()) {
            true => Sent {
                delivered: members,
                dropped: 0,
            },
            false => Sent {
                delivered: 0,
                dropped: members,
            },
        })
    }
}

impl Room {
    /// Puts a frame into the room's history, and queues it for the members on this node.
    pub(super) fn deliver_kept(
        &self,
        record: &Arc<Record>,
        frame: &Bytes,
        except: &[&str],
        (policy, direct): (Option<Overflow>, bool),
    ) -> Sent {
        let offset = record.push(frame, except);
        self.hand_on(record, (offset, frame), except, (policy, direct))
    }

    /// Queues for the members on this node what was put into the room's history.
    fn hand_on(
        &self,
        record: &Arc<Record>,
        (offset, frame): (u64, &Bytes),
        except: &[&str],
        (policy, direct): (Option<Overflow>, bool),
    ) -> Sent {
        let message = Followed {
            record,
            offset,
            frame,
            policy: policy.unwrap_or(Overflow::Recover),
            direct,
        };
        let mut sent = Sent::default();
        for guest in self.guests().iter() {
            let excluded = except.contains(&&*guest.session_id);
            let limit = guest.session.frame_limit();
            let push = guest.outbox.push_followed(message, limit, excluded);
            if !(excluded && matches!(push, Push::Queued { .. })) {
                sent.count(push, guest);
            }
        }
        sent
    }
}

impl Directory {
    fn record(&self, room: &Room, epoch: u64, bounds: History) -> Arc<Record> {
        let (name, number) = (room.tag.name.clone(), self.next());
        Record::new(name, number, epoch, bounds, self.archive.clone(), false)
    }

    /// A copy of what the cluster keeps of a room.
    pub(super) fn copy(&self, room: &Room, epoch: u64, bounds: History) -> Arc<Record> {
        let (name, number) = (room.tag.name.clone(), self.next());
        Record::new(name, number, epoch, bounds, self.archive.clone(), true)
    }

    /// From now on the members read this copy of what the cluster keeps. Returns those whose positions it does not have
    /// yet.
    pub(super) fn follow_copy(&self, room: &Room, record: &Arc<Record>) -> Vec<Arc<Guest>> {
        // Nobody can join while the table is locked.
        let _table = lock(&self.table);
        let before = match &mut lock(&room.sending).history {
            Some(history) if history.copy => std::mem::replace(history, record.clone()),
            _ => return Vec::new(),
        };
        let guests = room.guests();
        let guests = guests.iter().cloned();
        guests
            .filter(|guest| guest.outbox.follow_instead(&before, record))
            .collect()
    }

    /// Queues for the members on this node what was put into the copy at this offset. `frame`: a message that follows
    /// directly on the one before it; without it, the members look into the copy.
    pub(super) fn deliver_copied(
        &self,
        room: &Room,
        record: &Arc<Record>,
        (offset, frame, except): (u64, Option<&Bytes>, &[&str]),
    ) {
        let (policy, idle) = {
            let mut sending = lock(&room.sending);
            (sending.policy, sending.begin())
        };
        match frame {
            Some(frame) => {
                room.hand_on(record, (offset, frame), except, (policy, idle));
            }
            None => {
                for guest in room.guests().iter() {
                    guest.outbox.follow_skip(record);
                }
            }
        }
    }

    /// Must be called with the table locked.
    fn attach(&self, room: &Room, record: Arc<Record>) {
        for guest in room.guests().iter() {
            // A member that begins now has no position yet.
            let _ = guest.outbox.follow(&record, guest.follower(Since::Now));
            guest.outbox.catch_up_now();
        }
        lock(&room.sending).history = Some(record);
    }

    /// How many messages of histories were lost because members were too slow.
    pub(super) fn lost_from_history(&self) -> u64 {
        self.archive.lost()
    }
}
