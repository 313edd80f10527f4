//! What a member of a room is told beside the room's messages: what is missing, and which positions they have.

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

use super::{Bad, Read, check, map};
use crate::wire::message::{Message, check_name};
use crate::wire::msgpack::{Fields, Head, Reader};

const NAME: &str = "a room's name is 1 to 128 bytes without control characters";
/// Positions in one `$open`, at most.
pub(crate) const MOST_POSITIONS: usize = 256;

/// A place in the order of a room's messages, as the room's history counts them.
///
/// A member that has this position has been given, or was told that it misses, every message up to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Which history: another one began from the first message again. Never 0.
    pub epoch: u64,
    /// The number of the last message; the first has 1, and 0 is before it.
    pub offset: u64,
}

/// How far a member has come in a room: what it presents when it joins again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RoomPosition {
    /// The room.
    pub room: String,
    /// Which history.
    pub epoch: u64,
    /// The number of the last message that it has, or was told that it misses.
    pub offset: u64,
}

impl RoomPosition {
    /// The position alone.
    pub fn position(&self) -> Position {
        Position {
            epoch: self.epoch,
            offset: self.offset,
        }
    }

    pub(super) fn read(fields: &Fields<'_>) -> Result<Self, Bad> {
        fields.only(&["room", "epoch", "offset"])?;
        Ok(Self {
            room: room(fields)?,
            epoch: fields.u64("epoch")?,
            offset: fields.u64("offset")?,
        })
    }
}

fn room(fields: &Fields<'_>) -> Result<String, Bad> {
    let room = fields.str("room")?;
    check(check_name(room).is_ok(), NAME)?;
    Ok(room.to_owned())
}

/// Messages of a room that this member will not get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The room.
    pub room: String,
    /// How many messages are missing here; at least 1, unless [`Missing::why`] says that nobody knows.
    pub lost: u64,
    /// Which ones, where the room has a history and both sides know of positions.
    pub missing: Option<Missing>,
}

/// The messages that a [`Gap`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// Of which history.
    pub epoch: u64,
    /// The number of the first.
    pub from: u64,
    /// The number of the last; one below `from` where none of this epoch is missing.
    pub to: u64,
    /// Why they are.
    pub why: Why,
}

/// Why messages are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// The member was too slow for the room's policy, or takes no message as large.
    Slow,
    /// The room's history does not hold them any more.
    Gone,
    /// The member came from a position of another history: the server was restarted, or the history begun anew. How
    /// many messages it missed there nobody knows; `lost` counts those of this history alone.
    Epoch,
}

impl Why {
    fn name(self) -> &'static str {
        match self {
            Self::Slow => "slow",
            Self::Gone => "gone",
            Self::Epoch => "epoch",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Slow, Self::Gone, Self::Epoch]
            .into_iter()
            .find(|why| why.name() == name)
    }
}

impl Read for Gap {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = map(message, &["room", "lost", "epoch", "from", "to", "why"])?;
        let room = room(&fields)?;
        let lost = fields.u64("lost")?;
        let (epoch, from) = (fields.opt_u64("epoch")?, fields.opt_u64("from")?);
        let (to, why) = (fields.opt_u64("to")?, fields.opt_str("why")?);
        let missing = match (epoch, from, to, why) {
            (None, None, None, None) => None,
            (Some(epoch), Some(from), Some(to), Some(why)) => {
                let why = Why::named(why).ok_or("why is \"slow\", \"gone\" or \"epoch\"")?;
                let all = to.checked_sub(from.saturating_sub(1));
                let all = all.filter(|_| from > 0);
                check(
                    all.is_some_and(|all| lost <= all),
                    "more is lost than from there to there",
                )?;
                Some(Missing {
                    epoch,
                    from,
                    to,
                    why,
                })
            }
            _ => return Err("epoch, from, to and why come together".into()),
        };
        let unknown = missing.is_some_and(|missing| missing.why == Why::Epoch);
        check(lost > 0 || unknown, "nothing is missing")?;
        Ok(Self {
            room,
            lost,
            missing,
        })
    }
}

impl Serialize for Gap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let len = if self.missing.is_some() { 6 } else { 2 };
        let mut map = serializer.serialize_map(Some(len))?;
        map.serialize_entry("room", &self.room)?;
        map.serialize_entry("lost", &self.lost)?;
        if let Some(missing) = &self.missing {
            map.serialize_entry("epoch", &missing.epoch)?;
            map.serialize_entry("from", &missing.from)?;
            map.serialize_entry("to", &missing.to)?;
            map.serialize_entry("why", missing.why.name())?;
        }
        map.end()
    }
}

/// Tells a member its position in a room, and the number by which `$at` calls the room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RoomAt {
    /// The room.
    pub room: String,
    /// What stands for its name in [`At`].
    pub number: u64,
    /// Which history.
    pub epoch: u64,
    /// The number of the last message that the member has, or was told that it misses.
    pub offset: u64,
}

impl Read for RoomAt {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = map(message, &["room", "number", "epoch", "offset"])?;
        Ok(Self {
            room: room(&fields)?,
            number: fields.u64("number")?,
            epoch: fields.u64("epoch")?,
            offset: fields.u64("offset")?,
        })
    }
}

/// The position of the message that follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct At(
    /// The room, by its number in [`RoomAt`].
    pub u64,
    /// The message's offset.
    pub u64,
);

impl Read for At {
    fn read(message: &Message) -> Result<Self, Bad> {
        check(message.id().is_none(), "takes no id")?;
        let raw = message.raw();
        let mut reader = Reader::new(&raw);
        match (reader.head(), reader.head(), reader.head()) {
            (Ok(Head::Array(2)), Ok(Head::Uint(room)), Ok(Head::Uint(offset))) => {
                Ok(Self(room, offset))
            }
            _ => Err("is a room's number and an offset".into()),
        }
    }
}
