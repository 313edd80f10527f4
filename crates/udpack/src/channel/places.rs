//! The positions of a member in the rooms with a history that one channel is in, as far as its program has read.
//!
//! Pure state without I/O, on the client. A `$room` gives the member's position, an `$at` the position of the next
//! message; a `$gap` moves the position past the missing messages.

use crate::wire::control::{At, Decode, Gap, RoomAt, RoomPosition};
use crate::wire::message::Message;

#[derive(Debug, Default)]
pub(crate) struct Places {
    rooms: Vec<Place>,
    /// The position of the next message.
    next: Option<At>,
}

#[derive(Debug)]
struct Place {
    at: RoomPosition,
    /// The number that the server uses for the room, once it is known.
    number: Option<u64>,
}

impl Places {
    /// Begins with the positions that were presented when the channel was opened; they count until the server sends
    /// others.
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

    /// Handles `$room`. Ignores a server that names more rooms than the `most` that a channel can be in.
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

    /// Handles `$at`.
    pub(crate) fn announce(&mut self, at: At) {
        self.next = Some(at);
    }

    /// The program has read a message of the application.
    #[inline]
    pub(crate) fn arrived(&mut self) {
        if let Some(At(number, offset)) = self.next.take()
            && let Some(place) = (self.rooms.iter_mut()).find(|place| place.number == Some(number))
        {
            place.at.offset = offset;
        }
    }

    /// The program has read a message or a `$gap`.
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
