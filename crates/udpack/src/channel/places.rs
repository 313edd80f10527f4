//! How far a member has come in the rooms with a history that one channel is in, by what its program has taken.
//!
//! Pure bookkeeping, at the client. A `$room` says where the member is, an `$at` which position the next message has; a
//! `$gap` moves the position behind what is missing.

use crate::wire::control::{At, Decode, Gap, RoomAt, RoomPosition};
use crate::wire::message::Message;

#[derive(Debug, Default)]
pub(crate) struct Places {
    rooms: Vec<Place>,
    /// Of the next message.
    next: Option<At>,
}

#[derive(Debug)]
struct Place {
    at: RoomPosition,
    /// What the server calls the room, once it has said so.
    number: Option<u64>,
}

impl Places {
    /// What was presented when the channel was opened counts until the server says otherwise.
    pub(crate) fn begin(&mut self, since: &[RoomPosition]) {
        self.rooms = since
            .iter()
            .map(|at| Place {
                at: at.clone(),
                number: None,
            })
            .collect();
    }

    pub(crate) fn all(&self) -> Vec<RoomPosition> {
        self.rooms.iter().map(|place| place.at.clone()).collect()
    }

    /// A `$room`. A server that names more rooms than `most` is not believed to have a channel in all of them.
    pub(crate) fn enter(&mut self, room: RoomAt, most: usize) {
        let RoomAt {
            room,
            number,
            epoch,
            offset,
        } = room;
        let place = Place {
            at: RoomPosition {
                room,
                epoch,
                offset,
            },
            number: Some(number),
        };
        let same = |known: &Place| known.at.room == place.at.room;
        match self.rooms.iter().position(same) {
            Some(at) => self.rooms[at] = place,
            None if self.rooms.len() < most => self.rooms.push(place),
            None => {}
        }
    }

    /// An `$at`.
    pub(crate) fn announce(&mut self, at: At) {
        self.next = Some(at);
    }

    /// The program has taken a message of the application.
    #[inline]
    pub(crate) fn arrived(&mut self) {
        if let Some(At(number, offset)) = self.next.take()
            && let Some(place) = (self.rooms.iter_mut()).find(|place| place.number == Some(number))
        {
            place.at.offset = offset;
        }
    }

    /// The program has taken a message, or a `$gap`.
    pub(crate) fn taken(&mut self, message: &Message) {
        if !message.is_reserved() {
            return self.arrived();
        }
        if let Ok(gap) = Gap::decode(message)
            && let Some(missing) = gap.missing
            && let Some(place) = (self.rooms.iter_mut()).find(|place| place.at.room == gap.room)
        {
            (place.at.epoch, place.at.offset) = (missing.epoch, missing.to);
        }
    }
}
