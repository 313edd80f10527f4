//! Messages of rooms that wait beside a channel's full queue, and the count of the dropped ones.
//!
//! Pure state without I/O. Each room has its own short list for each member, so that its policy drops only its own
//! messages; numbers drawn on arrival keep the order across rooms. Where messages of a room are missing, a `$gap`
//! precedes the next message.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use crate::wire::control::{self, Gap};

/// Messages that may be unread, and may wait, unless a room's policy says otherwise.
const DEFAULT: usize = 1024;

/// What happens to a room's messages for a member that is too slow for them.
///
/// Sending never waits for such a member. A [`Gap`] reports what it lost, at the place where the
/// messages are missing.
///
/// [`DropOldest`](Self::DropOldest) and [`LatestOnly`](Self::LatestOnly) take effect at a number of messages that are
/// sent and not yet read by the member's program, the other policies when the channel's queue is full. A message that
/// the server's program sends directly on the channel first releases the waiting messages of rooms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overflow {
    /// Messages that come while the queue is full are lost.
    DropNewest,
    /// This many messages may be sent and unread, at least one, in addition to those that are in transit on the path.
    /// As many more wait behind them, within the bytes of the channel's queue (`Limits::outbound_bytes`,
    /// `Limits::replay_bytes`); the oldest waiting messages are lost first.
    DropOldest {
        /// How many messages may be unread, and how many may wait.
        messages: usize,
    },
    /// One message may be sent and unread, and only the latest waits behind it. Even a slow member lags by no more
    /// than the time that it needs for one message.
    LatestOnly,
    /// The channel is closed with `slow_peer`.
    Disconnect,
    /// In a room with a history, and what such a room does unless it is told otherwise: what finds no room in the queue
    /// stays in the history, and follows as the member reads. It loses what the history does not hold until then. In a
    /// room without a history as the default.
    Recover,
}

impl Default for Overflow {
    /// `DropOldest` with 1,024 messages.
    fn default() -> Self {
        Self::DropOldest { messages: DEFAULT }
    }
}

impl Overflow {
    /// How many messages may be sent and unread; `None` if only the queue's bound applies.
    pub(crate) fn unread(self) -> Option<u64> {
        match self {
            Self::DropOldest { messages } => Some(messages.max(1) as u64),
            Self::LatestOnly => Some(1),
            Self::DropNewest | Self::Disconnect | Self::Recover => None,
        }
    }
}

/// The room of a message.
#[derive(Debug)]
pub(crate) struct Tag {
    pub(crate) id: u64,
    pub(crate) name: Arc<str>,
    /// Whether a newer message replaces the older one, so that the older one does not count as lost.
    pub(crate) replaces: bool,
}

/// The result of queueing one message of a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Push {
    /// The message is queued; this many older ones were dropped for it.
    Queued { lost: u64 },
    /// The message is dropped.
    Lost,
    /// The policy requires that the channel is closed.
    TooSlow,
    /// The channel accepts no more messages.
    Over,
}

/// Everything that waits beside one channel's queue.
#[derive(Debug, Default)]
pub(crate) struct Overflowing {
    /// One entry for each room with a waiting message or a gap; removed when empty.
    lots: Vec<Lot>,
    next: u64,
    gaps: u64,
}

/// A frame that leaves a channel's overflow.
#[derive(Debug)]
pub(crate) struct Out {
    pub(crate) frame: Bytes,
    /// For a room's message: how many messages may be unread, if the policy limits that.
    pub(crate) unread: Option<u64>,
}

#[derive(Debug)]
struct Lot {
    tag: Arc<Tag>,
    entries: VecDeque<Entry>,
    bytes: usize,
    /// The limit of unread messages in the room's latest policy.
    unread: Option<u64>,
    /// How many messages were lost after the last entry, and the number of the first of them.
    lost: u64,
    lost_at: u64,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    /// How many messages were lost right before this one.
    lost: u64,
    frame: Bytes,
}

impl Overflowing {
    /// The next number in the order of arrival.
    pub(crate) fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.lots.is_empty()
    }

    /// The number of the next frame.
    pub(crate) fn first(&self) -> Option<u64> {
        self.lots.iter().map(Lot::first).min()
    }

    /// The number of the next frame, and how many messages may be unread when it is sent, if the policy limits that.
    pub(crate) fn head(&self) -> Option<(u64, Option<u64>)> {
        let lot = self.lots.iter().min_by_key(|lot| lot.first())?;
        Some((lot.first(), lot.unread.filter(|_| !lot.entries.is_empty())))
    }

    /// How many gaps were returned since the last call.
    pub(crate) fn take_gaps(&mut self) -> u64 {
        std::mem::take(&mut self.gaps)
    }

    /// Adds one message as the policy says; `max_bytes` bounds the waiting bytes of each room. `unread`: see [`Out`].
    pub(crate) fn push(
        &mut self,
        tag: &Arc<Tag>,
        frame: &Bytes,
        policy: Overflow,
        unread: Option<u64>,
        max_bytes: usize,
    ) -> Push {
        let messages = match policy {
            Overflow::Disconnect => return Push::TooSlow,
            Overflow::DropNewest => {
                self.lose(tag, 1);
                return Push::Lost;
            }
            Overflow::DropOldest { messages } => messages.max(1),
            Overflow::LatestOnly => 1,
            Overflow::Recover => DEFAULT,
        };
        let number = self.number();
        let lot = self.lot(tag);
        let entry = Entry {
            number,
            lost: std::mem::take(&mut lot.lost),
            frame: frame.clone(),
        };
        lot.unread = unread;
        lot.bytes += frame.len();
        lot.entries.push_back(entry);
        let mut lost = 0;
        while lot.entries.len() > 1 && (lot.entries.len() > messages || lot.bytes > max_bytes) {
            lost += u64::from(lot.drop_oldest());
        }
        Push::Queued { lost }
    }

    /// Notes that so many messages of this room are lost here.
    pub(crate) fn lose(&mut self, tag: &Arc<Tag>, lost: u64) {
        if tag.replaces {
            return;
        }
        let number = self.number();
        let lot = self.lot(tag);
        if lot.lost == 0 {
            lot.lost_at = number;
        }
        lot.lost = lot.lost.saturating_add(lost);
    }

    /// The next frame in order: a message, or the `$gap` that belongs before it.
    pub(crate) fn pop(&mut self) -> Option<Out> {
        let (at, lot) = self
            .lots
            .iter_mut()
            .enumerate()
            .min_by_key(|(_, lot)| lot.first())?;
        let lost = match lot.entries.front_mut() {
            Some(entry) => std::mem::take(&mut entry.lost),
            None => std::mem::take(&mut lot.lost),
        };
        // A valid room name always makes a valid gap.
        let gap = (lost > 0)
            .then(|| {
                let room = lot.tag.name.to_string();
                control::encode(&Gap {
                    room,
                    lost,
                    missing: None,
                })
            })
            .flatten();
        self.gaps += u64::from(gap.is_some());
        let out = match gap {
            Some(frame) => Some(Out {
                frame,
                unread: None,
            }),
            None => lot.entries.pop_front().map(|entry| {
                lot.bytes -= entry.frame.len();
                Out {
                    frame: entry.frame,
                    unread: lot.unread,
                }
            }),
        };
        if lot.entries.is_empty() && lot.lost == 0 {
            self.lots.swap_remove(at);
        }
        out
    }

    fn lot(&mut self, tag: &Arc<Tag>) -> &mut Lot {
        let at = self
            .lots
            .iter()
            .position(|lot| lot.tag.id == tag.id)
            .unwrap_or_else(|| {
                self.lots.push(Lot {
                    tag: tag.clone(),
                    entries: VecDeque::new(),
                    bytes: 0,
                    unread: None,
                    lost: 0,
                    lost_at: 0,
                });
                self.lots.len() - 1
            });
        &mut self.lots[at]
    }
}

impl Lot {
    fn first(&self) -> u64 {
        self.entries
            .front()
            .map_or(self.lost_at, |entry| entry.number)
    }

    /// Drops the oldest message; returns whether that counts as a loss.
    fn drop_oldest(&mut self) -> bool {
        let Some(oldest) = self.entries.pop_front() else {
            return false;
        };
        self.bytes -= oldest.frame.len();
        if self.tag.replaces {
            return false;
        }
        let lost = oldest.lost.saturating_add(1);
        match self.entries.front_mut() {
            Some(next) => next.lost = next.lost.saturating_add(lost),
            None => self.lost = self.lost.saturating_add(lost),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::control::Decode;
    use crate::wire::frame::PREFIX;
    use crate::wire::message::Message;

    fn tag(id: u64, name: &str) -> Arc<Tag> {
        Arc::new(Tag {
            id,
            name: name.into(),
            replaces: false,
        })
    }

    fn frame(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    /// Everything that comes out: texts as they are, gaps as `room-lost`.
    fn drain(overflowing: &mut Overflowing) -> Vec<String> {
        std::iter::from_fn(|| overflowing.pop())
            .map(|out| out.frame)
            .map(
                |frame| match Message::decode(frame.slice(PREFIX.min(frame.len())..)) {
                    Ok(message) => {
                        let gap = Gap::decode(&message).unwrap();
                        format!("{}-{}", gap.room, gap.lost)
                    }
                    Err(_) => String::from_utf8(frame.to_vec()).unwrap(),
                },
            )
            .collect()
    }

    fn push(overflowing: &mut Overflowing, tag: &Arc<Tag>, text: &'static str, policy: Overflow) {
        overflowing.push(tag, &frame(text), policy, None, 100);
    }

    #[test]
    fn the_oldest_of_each_room_go_and_a_gap_stands_where_they_were() {
        let (a, b) = (tag(1, "a"), tag(2, "b"));
        let policy = Overflow::DropOldest { messages: 2 };
        let mut all = Overflowing::default();
        for (tag, text) in [(&a, "a1"), (&b, "b1"), (&a, "a2"), (&a, "a3"), (&a, "a4")] {
            push(&mut all, tag, text, policy);
        }
        assert_eq!(all.first(), Some(1), "b1 is the oldest that is left");
        assert_eq!(drain(&mut all), ["b1", "a-2", "a3", "a4"]);
        assert_eq!(all.first(), None);
    }

    #[test]
    fn the_newest_go_and_the_gap_comes_after_what_was_kept() {
        let a = tag(1, "a");
        let mut all = Overflowing::default();
        push(&mut all, &a, "a1", Overflow::default());
        push(&mut all, &a, "a2", Overflow::DropNewest);
        push(&mut all, &a, "a3", Overflow::DropNewest);
        push(&mut all, &a, "a4", Overflow::default());
        push(&mut all, &a, "a5", Overflow::DropNewest);
        assert_eq!(drain(&mut all), ["a1", "a-2", "a4", "a-1"]);
    }

    #[test]
    fn bytes_bound_a_room_too_but_the_newest_stays() {
        let a = tag(1, "a");
        let mut all = Overflowing::default();
        let large = Bytes::from(vec![b'x'; 99]);
        for _ in 0..3 {
            all.push(&a, &large, Overflow::default(), None, 100);
        }
        assert_eq!(drain(&mut all), ["a-2".to_owned(), "x".repeat(99)]);
        all.push(&a, &large, Overflow::default(), None, 10);
        assert_eq!(drain(&mut all).len(), 1);
    }

    #[test]
    fn what_is_merely_replaced_is_no_loss() {
        let state = Arc::new(Tag {
            id: 7,
            name: "a".into(),
            replaces: true,
        });
        let mut all = Overflowing::default();
        push(&mut all, &state, "old", Overflow::LatestOnly);
        push(&mut all, &state, "new", Overflow::LatestOnly);
        all.lose(&state, 1);
        assert_eq!(drain(&mut all), ["new"]);
    }

    proptest! {
        /// Whatever comes and goes: of each room, messages and gaps account for every number, in order, and what
        /// was reported lost is what the gaps say.
        #[test]
        fn every_message_is_there_or_in_a_gap(
            acts in prop::collection::vec((0..3_u64, 0..5_u8, any::<bool>()), 1..200),
        ) {
            let tags: Vec<_> = (0..3).map(|id| tag(id, &format!("room {id}"))).collect();
            let mut all = Overflowing::default();
            let (mut sent, mut seen, mut reported) = ([0_u64; 3], [0_u64; 3], 0);
            let mut gaps = 0;
            let mut check = |frame: Bytes, seen: &mut [u64; 3]| {
                match Message::decode(frame.slice(PREFIX.min(frame.len())..)) {
                    Ok(message) => {
                        let gap = Gap::decode(&message).unwrap();
                        let room = tags.iter().position(|tag| *tag.name == *gap.room).unwrap();
                        seen[room] += gap.lost;
                        gaps += gap.lost;
                    }
                    Err(_) => {
                        let text = String::from_utf8(frame.to_vec()).unwrap();
                        let (room, number) = text.split_once(':').unwrap();
                        let room: usize = room.parse().unwrap();
                        assert_eq!(number.parse::<u64>().unwrap(), seen[room]);
                        seen[room] += 1;
                    }
                }
            };
            for (room, policy, pop) in acts {
                let at = room as usize;
                let policy = match policy {
                    0 => Overflow::DropNewest,
                    1 => Overflow::LatestOnly,
                    n => Overflow::DropOldest { messages: n.into() },
                };
                let frame = Bytes::from(format!("{room}:{}", sent[at]));
                sent[at] += 1;
                match all.push(&tags[at], &frame, policy, None, 30) {
                    Push::Queued { lost } => reported += lost,
                    other => {
                        prop_assert_eq!(other, Push::Lost);
                        reported += 1;
                    }
                }
                if pop {
                    check(all.pop().unwrap().frame, &mut seen);
                }
            }
            while let Some(out) = all.pop() {
                check(out.frame, &mut seen);
            }
            prop_assert_eq!(seen, sent);
            prop_assert_eq!(gaps, reported);
            prop_assert!(all.first().is_none() && all.lots.is_empty());
        }
    }
}
