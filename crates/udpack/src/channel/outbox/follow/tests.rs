//! A queue that follows a room against a model of the room: whatever is sent, drained, left and joined again, the peer
//! can account for every message.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::channel::history::{Archive, History};
use crate::channel::outbox::Work;
use crate::metrics::Counts;
use crate::metrics::speed::Counters;
use crate::wire::config::Priority;
use crate::wire::control::Decode;
use crate::wire::frame::FrameDecoder;
use crate::wire::message::{Encoded, Message};

const ME: &str = "me";
const LIMIT: usize = 200;

#[derive(Debug, Clone)]
enum Act {
    /// So many bytes; not for this member.
    Send(usize, bool),
    /// So many batches go to the peer.
    Drain(usize),
    Leave,
    /// From this many messages before the head, or behind it.
    Join(i64),
    JoinOldest,
    Policy(u8),
    Bounds(usize, usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        8 => (0..60_usize, prop::bool::weighted(0.1)).prop_map(|(size, mine)| Act::Send(size, mine)),
        // Larger than the peer takes.
        1 => Just(Act::Send(LIMIT + 1, false)),
        4 => (1..4_usize).prop_map(Act::Drain),
        1 => Just(Act::Leave),
        2 => (-3..40_i64).prop_map(Act::Join),
        1 => Just(Act::JoinOldest),
        1 => (0..6_u8).prop_map(Act::Policy),
        1 => (0..30_usize, 0..4000_usize).prop_map(|(messages, bytes)| Act::Bounds(messages, bytes)),
    ];
    prop::collection::vec(act, 1..150)
}

fn policy(number: u8) -> Overflow {
    match number {
        0 => Overflow::DropNewest,
        1 => Overflow::LatestOnly,
        2 => Overflow::DropOldest { messages: 5 },
        _ => Overflow::Recover,
    }
}

/// The member's side: what it reads, checked against what was sent.
struct Reader {
    decoder: FrameDecoder,
    epoch: u64,
    number: u64,
    /// Where it is, once it was told.
    position: Option<u64>,
    /// Where it must be told to begin, of each joining that the queue has not told yet.
    begins: std::collections::VecDeque<Begin>,
    next: Option<u64>,
    /// Messages that are not for it.
    excluded: BTreeSet<u64>,
    lost: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begin {
    At(u64),
    Foreign,
    /// At or behind this.
    Oldest,
}

impl Reader {
    /// Nothing but what was not for it lies from there to there, both left out.
    fn nothing_between(&self, from: u64, to: u64) {
        for offset in from + 1..to {
            assert!(self.excluded.contains(&offset), "{offset} is missing");
        }
    }

    fn at(&self) -> u64 {
        self.position.expect("told before")
    }

    fn read(&mut self, bytes: Bytes) {
        self.decoder.push(bytes);
        while let Some(body) = self.decoder.next_frame().expect("sound") {
            let message = Message::decode(body).expect("sound");
            if let Ok(room) = RoomAt::decode(&message) {
                self.entered(&room);
            } else if let Ok(At(number, offset)) = At::decode(&message) {
                assert_eq!((number, self.next), (self.number, None));
                self.next = Some(offset);
            } else if let Ok(gap) = Gap::decode(&message) {
                self.missed(&gap);
            } else {
                let offset = self.next.take().expect("announced");
                let (said, _): (u64, String) = message.data().expect("a number");
                assert_eq!(said, offset, "announced as another");
                assert!(!self.excluded.contains(&offset), "not for it");
                assert!(offset > self.at(), "doubled");
                self.nothing_between(self.at(), offset);
                self.position = Some(offset);
            }
        }
    }

    fn entered(&mut self, room: &RoomAt) {
        assert_eq!((room.epoch, room.number), (self.epoch, self.number));
        assert_eq!(self.next, None);
        match self.begins.pop_front() {
            Some(Begin::At(offset)) => assert_eq!(room.offset, offset, "begins elsewhere"),
            Some(Begin::Foreign) => panic!("the gap comes first"),
            Some(Begin::Oldest) => {}
            // Behind what was not for it.
            None => {
                assert!(room.offset > self.at());
                self.nothing_between(self.at(), room.offset + 1);
            }
        }
        self.position = Some(room.offset);
    }

    fn missed(&mut self, gap: &Gap) {
        assert_eq!(self.next, None);
        let missing = gap.missing.expect("it knows positions");
        let Missing { from, to, why, .. } = missing;
        if why == Why::Epoch {
            assert_eq!(self.begins.pop_front(), Some(Begin::Foreign));
            assert_eq!((from, gap.lost), (1, to));
            self.begins.push_front(Begin::At(to));
        } else {
            self.nothing_between(self.at(), from);
            let mine = (from..=to).filter(|offset| !self.excluded.contains(offset));
            assert!(gap.lost >= mine.count() as u64, "more is missing than told");
            self.lost += gap.lost;
        }
        self.position = Some(to);
    }
}

struct World {
    outbox: Arc<Outbox>,
    record: Arc<Record>,
    policy: Overflow,
    member: bool,
    reader: Reader,
}

impl World {
    fn new() -> Self {
        let record = Record::new(
            "hall".into(),
            7,
            3,
            History::default(),
            Archive::new(1 << 20),
            false,
        );
        Self {
            outbox: Outbox::new(
                600,
                8,
                Priority::Normal,
                None,
                Counters::root(),
                Counts::root(),
            ),
            reader: Reader {
                decoder: FrameDecoder::new(1 << 20),
                epoch: record.epoch,
                number: record.number,
                position: None,
                begins: std::collections::VecDeque::new(),
                next: None,
                excluded: BTreeSet::new(),
                lost: 0,
            },
            record,
            policy: Overflow::Recover,
            member: false,
        }
    }

    fn follows(&self) -> bool {
        lock(&self.outbox.state).stream(&self.record).is_some()
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Send(size, excluded) => self.send(size, excluded),
            Act::Drain(batches) => {
                for _ in 0..batches {
                    self.drain();
                }
            }
            Act::Leave => {
                self.member = false;
                self.outbox.unfollow(&self.record);
            }
            Act::Join(back) => {
                let offset = self.record.head().saturating_add_signed(-back);
                let since = Position {
                    epoch: self.record.epoch,
                    offset,
                };
                let begin = match offset <= self.record.head() {
                    true => Begin::At(offset),
                    false => Begin::Foreign,
                };
                self.join(Since::Position(since), begin);
            }
            Act::JoinOldest => self.join(Since::Oldest, Begin::Oldest),
            Act::Policy(number) => self.policy = policy(number),
            Act::Bounds(messages, bytes) => self.record.set_bounds(History {
                messages,
                bytes,
                ..History::default()
            }),
        }
    }

    fn join(&mut self, since: Since, begin: Begin) {
        if !self.follows() {
            // What it is told next is where it begins.
            while self.drain() {}
            // What this channel had before does not come again.
            let begin = match begin {
                Begin::At(offset) => Begin::At(offset.max(self.reader.position.unwrap_or(0))),
                begin => begin,
            };
            self.reader.begins.push_back(begin);
        }
        self.member = true;
        let follower = Follower {
            session: ME.into(),
            positions: true,
            limit: LIMIT,
            since,
        };
        self.outbox.follow(&self.record, follower);
        self.outbox.catch_up_now();
    }

    fn send(&mut self, size: usize, excluded: bool) {
        let offset = self.record.head() + 1;
        let message = Encoded::new("n", &(offset, "x".repeat(size))).expect("sound");
        let except: &[&str] = if excluded { &[ME] } else { &[] };
        if excluded {
            self.reader.excluded.insert(offset);
        }
        assert_eq!(self.record.push(message.bytes(), except), offset);
        if self.member {
            let message = Followed {
                record: &self.record,
                offset,
                frame: message.bytes(),
                policy: self.policy,
                direct: false,
            };
            self.outbox.push_followed(message, LIMIT, excluded);
        }
    }

    /// One batch goes to the peer; says whether there was one.
    fn drain(&mut self) -> bool {
        let mut batch = Vec::new();
        let taken = self.outbox.take(0, &mut None, &mut batch);
        let Work::Batch {
            bytes, messages, ..
        } = taken
        else {
            return false;
        };
        for bytes in batch {
            self.reader.read(bytes);
        }
        self.outbox.written(bytes, messages);
        true
    }
}

#[test]
fn a_member_that_joins_again_before_it_has_read_all_gets_nothing_twice() {
    let mut world = World::new();
    world.act(Act::Join(0));
    for _ in 0..3 {
        world.act(Act::Send(10, false));
    }
    // All three are in the queue, and none is read: the program is at the beginning, and comes back from there.
    world.act(Act::Leave);
    assert!(!world.follows());
    let follower = Follower {
        session: ME.into(),
        positions: true,
        limit: LIMIT,
        since: Since::Position(Position {
            epoch: world.record.epoch,
            offset: 0,
        }),
    };
    world.reader.begins.extend([Begin::At(3)]);
    world.outbox.follow(&world.record, follower);
    world.outbox.catch_up_now();
    world.member = true;
    world.act(Act::Send(10, false));
    while world.drain() {}
    assert_eq!(world.reader.at(), 4);
}

proptest! {
    #[test]
    fn every_message_is_given_once_in_order_or_told_to_be_missing(acts in acts()) {
        let mut world = World::new();
        for act in acts {
            world.act(act);
        }
        while world.drain() {}
        let reader = &world.reader;
        prop_assert_eq!(&reader.next, &None);
        prop_assert!(reader.begins.is_empty());
        if world.member {
            // It is told where it is, also behind messages that were not for it.
            prop_assert_eq!(reader.position, Some(world.record.head()));
        }
    }

    #[test]
    fn a_slow_member_loses_nothing_that_is_kept(acts in acts()) {
        let mut world = World::new();
        world.act(Act::Join(0));
        for act in acts {
            match act {
                // Within what is kept, and no larger than the peer takes.
                Act::Send(size, excluded) => world.act(Act::Send(size.min(60), excluded)),
                Act::Drain(_) | Act::Leave => world.act(act),
                Act::Join(back) => world.act(Act::Join(back.max(0))),
                _ => {}
            }
        }
        while world.drain() {}
        prop_assert_eq!(world.reader.lost, 0);
    }
}
