//! Rooms whose messages the cluster keeps: this node appends to their logs, and reads them in the one order that they have.
//!
//! A member gets such a message when it comes back from the log, also on the node that sent it. So all nodes agree on
//! the order and on the offsets, and a position means the same on each of them. What this node reads is copied into a
//! [`Record`], from which the members take it. A copy becomes the room's when it holds what the cluster had kept; until
//! then members wait.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use crate::base::lock;
use crate::channel::history::{Entered, History, Record};
use crate::cluster::sequence::Origins;
use crate::cluster::wire::{self, Body, Head};
use crate::cluster::{Kept, Topic};
use crate::metrics::Count;
use crate::serve::node::{FULL, Node, Out, Shared};
use crate::serve::rooms::{Directory, Guest, Room};

/// How far this node has read one log.
pub(super) struct Reading {
    bounds: History,
    copy: Option<LogCopy>,
    origins: Origins,
}

struct LogCopy {
    record: Arc<Record>,
    /// The log's end when the reading began, until the copy has come that far and is the room's.
    until: Option<u64>,
}

impl Node {
    /// Whether the cluster keeps the messages of rooms with a history.
    pub(crate) fn keeps(&self) -> bool {
        self.cluster.keeps()
    }

    /// Lets the cluster keep a room's messages from now on, within these bounds.
    pub(crate) fn keep(&self, shared: &Shared, bounds: History) {
        {
            let mut reading = lock(&shared.reading);
            let new = || Reading {
                bounds,
                copy: None,
                origins: Origins::default(),
            };
            reading.get_or_insert_with(new).bounds = bounds;
        }
        self.cluster.keep(shared.topic, bounds);
    }

    /// Ends the reading of a log. The cluster keeps it within the bounds.
    pub(crate) fn forget(&self, shared: &Shared) {
        *lock(&shared.reading) = None;
        self.cluster.forget(shared.topic);
    }

    /// Sends a frame to a room by its log. Returns whether it has a place in the queue to the broker; if not, the
    /// members of all nodes are told before the next message.
    pub(crate) fn append(&self, shared: &Shared, except: &[&str], frame: &[u8]) -> bool {
        let mut out = lock(&shared.out);
        let queued = !self.gone.load(Ordering::Relaxed)
            && self.tell_unsent(shared, &mut out)
            && self.enter_log(shared, &mut out, |at| wire::room(at, except, frame));
        out.unsent += u64::from(!queued);
        drop(out);
        if queued {
            self.counts.one(Count::ClusterPublished);
        } else {
            self.counts.one(Count::ClusterDropped);
            self.health.full.store(FULL, Ordering::Relaxed);
            self.degrade();
        }
        queued
    }

    /// Tells the members of messages that had no place in the queue, if there are any; returns whether they are told.
    pub(super) fn tell_unsent(&self, shared: &Shared, out: &mut Out) -> bool {
        let unsent = out.unsent;
        if unsent == 0 {
            return true;
        }
        let room = shared.room_id();
        let told = self.enter_log(shared, out, |at| wire::mark(at, &room, unsent));
        if told {
            out.unsent = 0;
        }
        told
    }

    fn enter_log(
        &self,
        shared: &Shared,
        out: &mut Out,
        entry: impl FnOnce(&Head) -> Bytes,
    ) -> bool {
        let entry = entry(&self.head(out.epoch, out.appended + 1));
        let queued = self.cluster.append(shared.topic, entry).is_ok();
        out.appended += u64::from(queued);
        queued
    }

    /// Asks how far the log goes, for a member with a position that this node does not have yet.
    pub(crate) fn confirm(&self, shared: &Shared, number: u64) {
        self.cluster.confirm(shared.topic, number);
    }

    /// Takes what comes from a log.
    pub(super) fn kept(&self, directory: &Directory, topic: Topic, kept: Kept) {
        let Some(shared) = lock(&self.topics).get(&topic).cloned() else {
            return;
        };
        let Some(room) = lock(&shared.seen).room.upgrade() else {
            return;
        };
        match kept {
            Kept::Begin { epoch, first, last } => {
                self.begin(directory, &shared, &room, (epoch, first, last));
            }
            Kept::Message {
                offset,
                age,
                message,
            } => self.take(directory, &shared, &room, (offset, age, &message)),
            Kept::End { offset, number } => self.end(directory, &shared, &room, (offset, number)),
        }
    }

    fn begin(
        &self,
        directory: &Directory,
        shared: &Shared,
        room: &Arc<Room>,
        (epoch, first, last): (u64, u64, u64),
    ) {
        {
            let mut reading = lock(&shared.reading);
            let Some(reading) = &mut *reading else {
                return;
            };
            let known = |copy: &LogCopy| copy.record.epoch == epoch;
            if epoch == 0 || first == 0 || reading.copy.as_ref().is_some_and(known) {
                return;
            }
            let record = directory.copy(room, epoch, reading.bounds);
            record.begin_behind(first - 1);
            reading.origins = Origins::default();
            reading.copy = Some(LogCopy {
                record,
                until: Some(last),
            });
        }
        self.take_over(directory, shared, room);
    }

    fn take(
        &self,
        directory: &Directory,
        shared: &Shared,
        room: &Arc<Room>,
        (offset, age, message): (u64, Duration, &Bytes),
    ) {
        let body = wire::decode(message, self.frame);
        let (record, new, (here, adjacent)) = {
            let mut reading = lock(&shared.reading);
            let Some(reading) = &mut *reading else {
                return;
            };
            let Some(copy) = &reading.copy else {
                return;
            };
            let record = copy.record.clone();
            let head = record.head();
            if offset <= head {
                return;
            }
            if offset > head + 1 {
                // The cluster has dropped them before this node has read them.
                record.skip(offset - head - 1);
            }
            let new = |(head, _): &(Head, Body)| reading.origins.is_new(head, offset);
            let new = body.as_ref().is_ok_and(new);
            (record, new, (copy.until.is_none(), offset == head + 1))
        };
        let (mut except, mut frame, mut lost) = (Vec::new(), None, 0);
        match &body {
            Ok((
                head,
                Body::Room {
                    except: sessions,
                    frame: bytes,
                },
            )) if new => {
                except.extend(sessions.iter().map(String::as_str));
                frame = Some(bytes);
                if head.node != self.id {
                    self.counts.one(Count::ClusterReceived);
                }
            }
            // In a log it says how many messages of its node had no place.
            Ok((_, Body::Mark { version, .. })) if new => lost = *version,
            Ok((_, Body::Room { .. } | Body::Mark { .. })) => {
                self.ignored(&"an entry that was there before");
            }
            Ok(_) => self.ignored(&"an entry of a log that is no message"),
            Err(bad) => self.ignored(bad),
        }
        self.counts.add(Count::ClusterLost, lost);
        let entered = Entered {
            message: frame.map(|frame| (frame, &except[..])),
            lost,
            age,
        };
        record.enter(&entered);
        if here {
            let whole = frame.filter(|_| lost == 0 && adjacent);
            directory.deliver_copied(room, &record, (offset, whole, &except));
        } else {
            self.take_over(directory, shared, room);
        }
    }

    fn end(
        &self,
        directory: &Directory,
        shared: &Shared,
        room: &Arc<Room>,
        (offset, number): (u64, u64),
    ) {
        let Some(record) = shared.copied() else {
            return;
        };
        let head = record.head();
        if head < offset {
            record.skip(offset - head);
        }
        self.take_over(directory, shared, room);
        for guest in room.guests().iter() {
            guest.outbox.answered(&record, number);
        }
    }

    /// Makes the copy the room's history when it has come as far as the log was.
    fn take_over(&self, directory: &Directory, shared: &Shared, room: &Arc<Room>) {
        let record = {
            let mut reading = lock(&shared.reading);
            let copy = reading.as_mut().and_then(|reading| reading.copy.as_mut());
            let Some(copy) = copy else {
                return;
            };
            let head = copy.record.head();
            if copy.until.take_if(|until| head >= *until).is_none() {
                return;
            }
            copy.record.clone()
        };
        for guest in directory.follow_copy(room, &record) {
            self.ask_how_far(directory, shared, (&guest, &record));
        }
    }

    /// A member has a position that this node does not have yet.
    pub(crate) fn ask_how_far(
        &self,
        directory: &Directory,
        shared: &Shared,
        (guest, record): (&Guest, &Arc<Record>),
    ) {
        let number = directory.next();
        guest.outbox.asked(record, number);
        self.confirm(shared, number);
    }
}

impl Shared {
    fn copied(&self) -> Option<Arc<Record>> {
        let reading = lock(&self.reading);
        let copy = reading.as_ref()?.copy.as_ref()?;
        Some(copy.record.clone())
    }
}
