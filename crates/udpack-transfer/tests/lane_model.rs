//! Random sequences of messages: the pure state machine against a model of its table, and whole lanes against
//! what they must leave on the disk.
//!
//! The first is fast and shrinks; the second goes through sockets, store and disk.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use common::{Fixture, bounded, noise};
use proptest::prelude::*;
use raw::{RawLane, cancel, chunk, file, finish, put, with};
use udpack_transfer::wire::{
    Copied, DirOffer, Finish, Hole, LinkOffer, MetaFields, Offer, Put, Request, Wish,
};
use udpack_transfer::{Action, IfExists, Lane, Refusal, XattrList, Xattrs};

// ---------------------------------------------------------------------------------------- the pure machine

/// What can happen to a lane. Ids are few, so that they meet.
#[derive(Debug, Clone)]
enum Happens {
    File {
        id: u64,
        size: Option<u64>,
        short: bool,
    },
    Chunk {
        id: u64,
        off: Offset,
        len: usize,
    },
    Hole {
        id: u64,
        off: Offset,
        len: u64,
    },
    Copy {
        id: u64,
        off: Offset,
        len: u64,
    },
    Finish {
        id: u64,
        short: bool,
    },
    Cancel {
        id: u64,
        keep: bool,
    },
    Done {
        id: u64,
    },
    Put {
        id: u64,
    },
    Dir {
        id: u64,
    },
    Link {
        id: u64,
    },
    Get {
        id: u64,
    },
    /// A download failed on our side.
    Unsent {
        id: u64,
    },
    /// The client was told that we have these bytes of the file.
    Told {
        id: u64,
        have: Vec<(u64, u64)>,
    },
    /// The file got its outcome from elsewhere: the disk, the clock.
    Ended {
        id: u64,
    },
    Malformed {
        id: u64,
    },
}

#[derive(Debug, Clone)]
enum Offset {
    /// Where the last chunk of the open file ended.
    Next,
    Short,
    At(u64),
}

fn happens() -> impl Strategy<Value = Happens> {
    let id = 0..5_u64;
    let size = prop_oneof![Just(None), (0..12_u64).prop_map(Some), Just(Some(u64::MAX))];
    let off = prop_oneof![
        6 => Just(Offset::Next),
        2 => Just(Offset::Short),
        1 => (0..12_u64).prop_map(Offset::At),
        1 => Just(Offset::At(u64::MAX)),
    ];
    prop_oneof![
        4 => (id.clone(), size, prop::bool::weighted(0.2)).prop_map(|(id, size, short)| {
            Happens::File { id: if short { 0 } else { id }, size, short }
        }),
        3 => (id.clone(), off.clone(), 1..6_u64).prop_map(|(id, off, len)| {
            Happens::Hole { id, off, len }
        }),
        3 => (id.clone(), off.clone(), 1..6_u64).prop_map(|(id, off, len)| {
            Happens::Copy { id, off, len }
        }),
        6 => (id.clone(), off, 1..6_usize).prop_map(|(id, off, len)| {
            let id = if matches!(off, Offset::Short) { 0 } else { id };
            Happens::Chunk { id, off, len }
        }),
        3 => (id.clone(), prop::bool::weighted(0.2)).prop_map(|(id, short)| {
            Happens::Finish { id: if short { 0 } else { id }, short }
        }),
        2 => (id.clone(), any::<bool>()).prop_map(|(id, keep)| Happens::Cancel { id, keep }),
        1 => id.clone().prop_map(|id| Happens::Done { id }),
        2 => id.clone().prop_map(|id| Happens::Put { id }),
        1 => id.clone().prop_map(|id| Happens::Dir { id }),
        1 => id.clone().prop_map(|id| Happens::Link { id }),
        2 => id.clone().prop_map(|id| Happens::Get { id }),
        1 => id.clone().prop_map(|id| Happens::Unsent { id }),
        3 => (id.clone(), have()).prop_map(|(id, have)| Happens::Told { id, have }),
        1 => id.clone().prop_map(|id| Happens::Ended { id }),
        1 => id.prop_map(|id| Happens::Malformed { id }),
    ]
}

/// Ranges in order, none over another; some touch, one may reach to the end of all numbers.
fn have() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let gaps = prop::collection::vec((0..3_u64, 1..5_u64), 0..4);
    (gaps, prop::bool::weighted(0.05)).prop_map(|(gaps, endless)| {
        let mut end = 0;
        let mut have = Vec::new();
        for (gap, len) in gaps {
            have.push((end + gap, len));
            end += gap + len;
        }
        if endless {
            have.push((end, u64::MAX - end));
        }
        have
    })
}

/// What one id has been through.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Open {
        short: bool,
        size: Option<u64>,
        next: u64,
    },
    /// Ended before its `finish` came: what was on its way is dropped.
    Dropping,
    /// Its `finish` or `cancel` came, or another file has begun since.
    Over,
}

/// Files of these ids are offered with a base.
fn has_base(id: u64) -> bool {
    id.is_multiple_of(2)
}

/// The table of `docs/PROTOCOL.md` §11, by id instead of by lane.
#[derive(Debug, Default)]
struct Model {
    fates: BTreeMap<u64, Fate>,
    /// Downloads that the client has neither confirmed nor given up.
    gets: BTreeSet<u64>,
    /// What the client was told of the open file.
    have: Vec<(u64, u64)>,
    /// The highest id offered in the long form.
    highest: Option<u64>,
}

impl Model {
    fn open(&self) -> Option<u64> {
        let mut open = self
            .fates
            .iter()
            .filter(|(_, fate)| matches!(fate, Fate::Open { .. }));
        let first = open.next().map(|(id, _)| *id);
        assert!(open.next().is_none(), "two files open on one lane");
        first
    }

    fn dropping(&self) -> Option<u64> {
        let mut dropping = self
            .fates
            .iter()
            .filter(|(_, fate)| matches!(fate, Fate::Dropping));
        dropping.next().map(|(id, _)| *id)
    }

    fn fate(&self, id: u64) -> Option<Fate> {
        self.fates.get(&id).copied()
    }

    /// The word for what the lane must do.
    fn on(&mut self, request: &Request) -> &'static str {
        match request {
            Request::File(offer) => {
                let used = !offer.short && self.highest >= Some(offer.id);
                if !offer.short {
                    self.highest = self.highest.max(Some(offer.id));
                }
                if self.open().is_some() || used {
                    return "protocol_order";
                }
                for fate in self.fates.values_mut() {
                    *fate = Fate::Over;
                }
                self.have.clear();
                let (short, size) = (offer.short, offer.size);
                self.fates.insert(
                    offer.id,
                    Fate::Open {
                        short,
                        size,
                        next: 0,
                    },
                );
                "begin"
            }
            Request::Chunk { id, offset, bytes } => {
                let Some(Fate::Open { short, size, next }) = self.fate(*id) else {
                    return self.late(*id);
                };
                let len = bytes.len() as u64;
                let verdict = if short != offset.is_none() {
                    "bad_message"
                } else if offset.is_some_and(|offset| !self.may_pass(next, offset)) {
                    "bad_offset"
                } else if let Some(end) = offset.unwrap_or(next).checked_add(len)
                    && size.is_none_or(|size| end <= size)
                {
                    let next = end;
                    self.fates.insert(*id, Fate::Open { short, size, next });
                    return "write";
                } else {
                    "size_mismatch"
                };
                self.fates.insert(*id, Fate::Dropping);
                verdict
            }
            Request::Hole(hole) => {
                let Some(Fate::Open { short, size, next }) = self.fate(hole.id) else {
                    return self.late(hole.id);
                };
                let end = hole.offset.checked_add(hole.len);
                let verdict = if short {
                    "bad_message"
                } else if !self.may_pass(next, hole.offset) {
                    "bad_offset"
                } else if let Some(next) = end
                    && size.is_none_or(|size| next <= size)
                {
                    self.fates.insert(hole.id, Fate::Open { short, size, next });
                    return "hole";
                } else {
                    "size_mismatch"
                };
                self.fates.insert(hole.id, Fate::Dropping);
                verdict
            }
            Request::Copy(copied) => {
                let id = copied.id;
                let Some(Fate::Open { short, size, next }) = self.fate(id) else {
                    return self.late(id);
                };
                let verdict = if short || !has_base(id) {
                    "protocol_order"
                } else if !self.may_pass(next, copied.offset) {
                    "bad_offset"
                } else if let Some(end) = copied.offset.checked_add(copied.len)
                    && size.is_none_or(|size| end <= size)
                {
                    let next = end;
                    self.fates.insert(id, Fate::Open { short, size, next });
                    return "copy";
                } else {
                    "size_mismatch"
                };
                self.fates.insert(id, Fate::Dropping);
                verdict
            }
            Request::Finish(finish) => {
                let Some(Fate::Open { short, .. }) = self.fate(finish.id) else {
                    let verdict = self.late(finish.id);
                    if verdict == "ignore" {
                        self.fates.insert(finish.id, Fate::Over);
                    }
                    return verdict;
                };
                self.fates.insert(finish.id, Fate::Over);
                if short != finish.hash.is_none() {
                    "bad_message"
                } else {
                    "finish"
                }
            }
            Request::Cancel { id, .. } if self.gets.remove(id) => "not stored",
            Request::Cancel { id, keep } => match self.fate(*id) {
                Some(Fate::Open { .. }) => {
                    self.fates.insert(*id, Fate::Over);
                    if *keep { "kept" } else { "cancelled" }
                }
                Some(Fate::Dropping) => {
                    self.fates.insert(*id, Fate::Over);
                    "ignore"
                }
                // Too late is no offence, whatever became of the file.
                _ if self.highest >= Some(*id) => "ignore",
                _ => "protocol_order",
            },
            Request::Put(Put {
                offer: Offer { id, .. },
                ..
            })
            | Request::Dir(DirOffer { id, .. })
            | Request::Link(LinkOffer { id, .. }) => {
                if !self.number(*id) || self.open().is_some() {
                    return "protocol_order";
                }
                for fate in self.fates.values_mut() {
                    *fate = Fate::Over;
                }
                match request {
                    Request::Put(_) => "put",
                    _ => "make",
                }
            }
            Request::Get(wish) => {
                if !self.number(wish.id) {
                    return "protocol_order";
                }
                self.gets.insert(wish.id);
                "send"
            }
            Request::Done { id } if self.gets.remove(id) => "stored",
            _ => "ignore",
        }
    }

    /// Takes a new id.
    fn number(&mut self, id: u64) -> bool {
        let new = self.highest < Some(id);
        self.highest = self.highest.max(Some(id));
        new
    }

    /// Byte by byte: whether the client was told of each that it leaves out.
    fn may_pass(&self, next: u64, offset: u64) -> bool {
        let told = |byte| {
            self.have
                .iter()
                .any(|(from, len)| *from <= byte && byte - from < *len)
        };
        // Nothing here has more bytes than that, but for the range that has no end.
        let end = offset.min(64);
        next <= offset && (next..end).all(told) && (end == offset || told(offset - 1))
    }

    fn late(&self, id: u64) -> &'static str {
        match self.fate(id) {
            Some(Fate::Dropping) => "ignore",
            _ => "protocol_order",
        }
    }

    fn ended(&mut self, id: u64) -> bool {
        let open = self.open() == Some(id);
        if open {
            self.fates.insert(id, Fate::Dropping);
        }
        open
    }
}

fn word(action: &Action) -> &'static str {
    match action {
        Action::Begin(_) => "begin",
        Action::Write => "write",
        Action::Copy(_) => "copy",
        Action::Hole(_) => "hole",
        Action::Finish(_) => "finish",
        Action::Abort(Refusal { code, .. }) | Action::Refuse(Refusal { code, .. }) => code.as_str(),
        Action::Suspend(Refusal { code, .. }) => {
            assert_eq!(*code, "cancelled");
            "kept"
        }
        Action::Put => "put",
        Action::Dir(_) | Action::Link(_) => "make",
        Action::Send(_) => "send",
        Action::Sent { stored: true, .. } => "stored",
        Action::Sent { stored: false, .. } => "not stored",
        Action::Ignore => "ignore",
        _ => panic!("an action the model does not know"),
    }
}

/// An `Abort` is for the file that was open, a `Refuse` for any other.
fn names_the_right_file(action: &Action, request: &Request, open: Option<u64>) -> bool {
    let about = match request {
        Request::File(offer) | Request::Put(Put { offer, .. }) => offer.id,
        Request::Chunk { id, .. } | Request::Cancel { id, .. } => *id,
        Request::Finish(finish) => finish.id,
        Request::Copy(copied) => copied.id,
        Request::Hole(hole) => hole.id,
        Request::Dir(DirOffer { id, .. }) | Request::Link(LinkOffer { id, .. }) => *id,
        Request::Get(wish) => wish.id,
        Request::Done { id } => *id,
        _ => return matches!(action, Action::Ignore),
    };
    match action {
        Action::Abort(refusal) | Action::Suspend(refusal) => {
            refusal.id == about && open == Some(about)
        }
        Action::Put => open.is_none(),
        Action::Dir(offer) => open.is_none() && offer.id == about,
        Action::Link(offer) => open.is_none() && offer.id == about,
        Action::Send(wish) => wish.id == about,
        Action::Sent { id, .. } => *id == about,
        Action::Refuse(refusal) => {
            let offered = !matches!(
                request,
                Request::Chunk { .. }
                    | Request::Copy(_)
                    | Request::Hole(_)
                    | Request::Finish(_)
                    | Request::Cancel { .. }
            );
            refusal.id == about && (open != Some(about) || offered)
        }
        Action::Write | Action::Copy(_) | Action::Hole(_) | Action::Finish(_) => {
            open == Some(about)
        }
        Action::Begin(offer) => open.is_none() && offer.id == about,
        _ => true,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, ..ProptestConfig::default() })]

    #[test]
    fn a_lane_does_what_its_table_says(sequence in prop::collection::vec(happens(), 0..60)) {
        let (mut lane, mut model) = (Lane::new(), Model::default());
        // Bytes written to each file: never more than it declared.
        let mut written: HashMap<u64, u64> = HashMap::new();
        let mut declared: HashMap<u64, Option<u64>> = HashMap::new();
        for step in sequence {
            let request = match step {
                Happens::Ended { id } => {
                    lane.ended(id);
                    model.ended(id);
                    prop_assert_eq!(lane.open(), model.open());
                    prop_assert_eq!(lane.dropping(), model.dropping());
                    continue;
                }
                Happens::Malformed { id } => {
                    prop_assert_eq!(lane.malformed(id), model.ended(id));
                    prop_assert_eq!(lane.open(), model.open());
                    prop_assert_eq!(lane.dropping(), model.dropping());
                    continue;
                }
                Happens::Unsent { id } => {
                    lane.unsent(id);
                    model.gets.remove(&id);
                    prop_assert_eq!(lane.gets(), model.gets.len());
                    continue;
                }
                Happens::Told { id, have } => {
                    let told = have.iter().map(|(off, len)| (*off, *len, [0; 32])).collect();
                    lane.told(id, &told);
                    if model.open() == Some(id) {
                        model.have = have;
                    }
                    continue;
                }
                Happens::Put { id } => Request::Put(Put {
                    offer: Offer {
                        xattrs: XattrList::default(),
                        id,
                        path: "x".to_owned(),
                        size: Some(1),
                        meta: MetaFields::default(),
                        if_exists: IfExists::Same,
                        resume: false,
                        dirs: Vec::new(),
                        run: None,
                        base: None,
                        short: false,
                    },
                    hash: [0; 32],
                    bytes: Bytes::from_static(b"a"),
                }),
                Happens::Dir { id } => Request::Dir(DirOffer {
                    xattrs: XattrList::default(),
                    id,
                    path: "x".to_owned(),
                    dirs: Vec::new(),
                    meta: MetaFields::default(),
                }),
                Happens::Link { id } => Request::Link(LinkOffer {
                    id,
                    path: "x".to_owned(),
                    dirs: Vec::new(),
                    target: "y".to_owned(),
                    if_exists: IfExists::Same,
                }),
                Happens::Get { id } => Request::Get(Wish {
                    xattrs: Xattrs::None,
                    id,
                    path: "x".to_owned(),
                    have: Vec::new(),
                    rate: None,
                    holes: true,
                }),
                Happens::File { id, size, short } => Request::File(Offer {
                    xattrs: XattrList::default(),
                    id,
                    path: "x".to_owned(),
                    size,
                    meta: MetaFields::default(),
                    if_exists: IfExists::Same,
                    resume: false,
                    dirs: Vec::new(),
                    run: None,
                    base: (!short && has_base(id)).then(|| "old".to_owned()),
                    short,
                }),
                Happens::Chunk { id, off, len } => {
                    let next = match model.fate(id) {
                        Some(Fate::Open { next, .. }) => next,
                        _ => 0,
                    };
                    let offset = match off {
                        Offset::Next => Some(next),
                        Offset::Short => None,
                        Offset::At(at) => Some(at),
                    };
                    Request::Chunk { id, offset, bytes: Bytes::from(vec![0; len]) }
                }
                Happens::Hole { id, off, len } => {
                    let next = match model.fate(id) {
                        Some(Fate::Open { next, .. }) => next,
                        _ => 0,
                    };
                    let offset = match off {
                        Offset::At(at) => at,
                        Offset::Next | Offset::Short => next,
                    };
                    Request::Hole(Hole { id, offset, len })
                }
                Happens::Copy { id, off, len } => {
                    let next = match model.fate(id) {
                        Some(Fate::Open { next, .. }) => next,
                        _ => 0,
                    };
                    let offset = match off {
                        Offset::At(at) => at,
                        Offset::Next | Offset::Short => next,
                    };
                    Request::Copy(Copied { id, offset, from: 0, len })
                }
                Happens::Finish { id, short } => Request::Finish(Finish {
                    id,
                    size: (!short).then_some(0),
                    hash: (!short).then_some([0; 32]),
                }),
                Happens::Cancel { id, keep } => Request::Cancel { id, keep },
                Happens::Done { id } => Request::Done { id },
            };
            let open = lane.open();
            let action = lane.on(&request);
            prop_assert_eq!(word(&action), model.on(&request), "{:?}", request);
            prop_assert!(names_the_right_file(&action, &request, open), "{:?}: {:?}", request, action);
            prop_assert_eq!(lane.open(), model.open());
            prop_assert_eq!(lane.dropping(), model.dropping());
            prop_assert_eq!(lane.gets(), model.gets.len());
            match (&action, &request) {
                (Action::Begin(offer), _) => {
                    written.insert(offer.id, 0);
                    declared.insert(offer.id, offer.size);
                }
                (Action::Hole(hole), _) => {
                    let count = written.entry(hole.id).or_default();
                    *count += hole.len;
                    let most = declared.get(&hole.id).copied().flatten();
                    prop_assert!(most.is_none_or(|most| *count <= most));
                }
                (Action::Copy(copied), _) => {
                    let count = written.entry(copied.id).or_default();
                    *count += copied.len;
                    let most = declared.get(&copied.id).copied().flatten();
                    prop_assert!(most.is_none_or(|most| *count <= most));
                }
                (Action::Write, Request::Chunk { id, bytes, .. }) => {
                    let count = written.entry(*id).or_default();
                    *count += bytes.len() as u64;
                    let most = declared.get(id).copied().flatten();
                    prop_assert!(most.is_none_or(|most| *count <= most));
                }
                _ => {}
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------- with a disk

/// One file as a client sends it; everything about it is told here, so that its outcome can be foretold.
#[derive(Debug, Clone)]
struct Plan {
    /// Which of a few names: they meet, on one lane and between the two.
    name: usize,
    /// Which of a few contents.
    content: usize,
    declared: bool,
    /// Sizes of the chunks, as shares.
    pieces: usize,
    flaw: Flaw,
    resume: bool,
    /// In one message, where its flaw can be said so.
    whole: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Flaw {
    None,
    BadName,
    Gap,
    Twice,
    TooMuch,
    TooLittle,
    WrongHash,
    WrongType,
    Cancel,
    /// `finish` never comes; only as the last on its lane, before its end.
    Unfinished,
}

const NAMES: [&str; 4] = ["a", "b", "d/a", "d/e/b"];
const SIZES: [usize; 5] = [0, 1, 1000, 70_000, 300_000];

fn content(index: usize) -> Vec<u8> {
    noise(index as u64, SIZES[index])
}

fn plan() -> impl Strategy<Value = Plan> {
    let flaw = prop_oneof![
        6 => Just(Flaw::None),
        1 => Just(Flaw::BadName),
        1 => Just(Flaw::Gap),
        1 => Just(Flaw::Twice),
        1 => Just(Flaw::TooMuch),
        1 => Just(Flaw::TooLittle),
        1 => Just(Flaw::WrongHash),
        1 => Just(Flaw::WrongType),
        1 => Just(Flaw::Cancel),
    ];
    (
        0..NAMES.len(),
        0..SIZES.len(),
        any::<bool>(),
        1..5_usize,
        flaw,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            |(name, content, declared, pieces, flaw, resume, whole)| Plan {
                name,
                content,
                declared,
                pieces,
                flaw,
                resume,
                whole,
            },
        )
}

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    (prop::collection::vec(plan(), 0..8), any::<bool>()).prop_map(|(mut plans, open)| {
        if open && let Some(last) = plans.last_mut() {
            last.flaw = Flaw::Unfinished;
        }
        plans
    })
}

/// Sends a file with its flaw, without waiting for anything.
async fn send(lane: &RawLane, id: u64, plan: &Plan) {
    let bytes = content(plan.content);
    let name = if plan.flaw == Flaw::BadName {
        "../a"
    } else {
        NAMES[plan.name]
    };
    if plan.whole && !plan.resume {
        let (event, all) = put(id, name, &bytes);
        let all = match plan.flaw {
            Flaw::None | Flaw::BadName => Some(all),
            Flaw::WrongHash => Some(with(all, "hash", &[7; 32])),
            Flaw::WrongType => Some(with(all, "hash", "none")),
            _ => None,
        };
        if let Some(all) = all {
            return lane.say(&(event, all)).await;
        }
    }
    let (event, mut offer) = file(id, name, bytes.len() as u64);
    if !plan.declared {
        offer = raw::without(offer, "size");
    }
    lane.say(&(event, with(offer, "resume", plan.resume))).await;
    let mut off = 0;
    let size = bytes.len().div_ceil(plan.pieces).max(1);
    let short = match plan.flaw {
        Flaw::TooLittle | Flaw::Unfinished => bytes.len().saturating_sub(1),
        _ => bytes.len(),
    };
    for piece in bytes[..short].chunks(size) {
        lane.say(&chunk(id, off, piece)).await;
        off += piece.len() as u64;
    }
    match plan.flaw {
        Flaw::Gap => lane.say(&chunk(id, off + 1, b"x")).await,
        Flaw::Twice => lane.say(&chunk(id, off.wrapping_sub(1), b"x")).await,
        Flaw::TooMuch => lane.say(&chunk(id, off, b"x")).await,
        Flaw::Cancel => return lane.say(&cancel(id)).await,
        Flaw::Unfinished => return,
        _ => {}
    }
    let (event, end) = finish(id, &bytes);
    match plan.flaw {
        Flaw::WrongHash => lane.say(&(event, with(end, "hash", &[7; 32]))).await,
        Flaw::WrongType => lane.say(&(event, with(end, "hash", "none"))).await,
        // Nothing is left out of nothing: then the announced size is the flaw.
        Flaw::TooLittle if bytes.is_empty() => lane.say(&(event, with(end, "size", 1))).await,
        _ => lane.say(&(event, end)).await,
    }
}

/// Sends all files, ends the lane, and gives what was said about each.
async fn run_lane(mut lane: RawLane, plans: Vec<Plan>) -> HashMap<u64, Vec<raw::Heard>> {
    let channel = lane.channel.clone();
    let hearing = tokio::spawn(async move {
        let mut heard: HashMap<u64, Vec<raw::Heard>> = HashMap::new();
        loop {
            let next = lane.hear().await;
            if next.line == "end" {
                return heard;
            }
            let id = next.line.split(' ').nth(1).and_then(|id| id.parse().ok());
            let id = id.unwrap_or_else(|| panic!("not about a file: {next:?}"));
            if !next.line.starts_with("ready") {
                heard.entry(id).or_default().push(next);
            }
        }
    });
    let lane = RawLane::over(channel);
    for (id, plan) in (1..).zip(&plans) {
        send(&lane, id, plan).await;
    }
    lane.channel
        .finish()
        .await
        .expect("the server reads all of it");
    hearing.await.expect("no panic")
}

async fn two_lanes(first: Vec<Plan>, second: Vec<Plan>) {
    let fixture = Fixture::new().await;
    let socket = fixture.connect().await;
    let lanes = (RawLane::open(&socket).await, RawLane::open(&socket).await);
    let plans = [first, second];
    let (one, two) = tokio::join!(
        run_lane(lanes.0, plans[0].clone()),
        run_lane(lanes.1, plans[1].clone())
    );
    fixture.settled().await;
    let mut stored: BTreeMap<&str, usize> = BTreeMap::new();
    for (plans, heard) in plans.iter().zip([&one, &two]) {
        for (id, plan) in (1..).zip(plans) {
            let told = heard.get(&id).map_or(&[][..], Vec::as_slice);
            if plan.flaw == Flaw::Unfinished {
                // The lane ended first; it may have been refused before.
                assert!(told.len() <= 1, "{plan:?}: {told:?}");
                assert!(
                    told.iter().all(|told| told.line.starts_with("error")),
                    "{told:?}"
                );
                continue;
            }
            assert_eq!(told.len(), 1, "exactly one answer: {plan:?}: {told:?}");
            let line = told[0].line.as_str();
            let done = line.starts_with("done");
            assert!(done || line.starts_with("error"), "{line}");
            // A byte was left out, but the hash that `ready` told was given back: that is proof.
            let proof = plan.flaw == Flaw::TooLittle
                && SIZES[plan.content] > 0
                && plan.resume
                && line.ends_with(" same");
            // Everything else that is flawed never is `done`.
            assert!(
                !done || plan.flaw == Flaw::None || proof,
                "{plan:?}: {line}"
            );
            if done {
                let before = stored.insert(NAMES[plan.name], plan.content);
                assert!(
                    before.is_none_or(|content| content == plan.content),
                    "two winners"
                );
                let hash = *blake3::hash(&content(plan.content)).as_bytes();
                assert_eq!(told[0].hash, Some(hash));
            } else if plan.resume && line == format!("error {id} busy retry") {
                // The other lane writes it at this moment.
            } else if plan.flaw == Flaw::None {
                // A sound file fails for one reason only: another has the name.
                assert_eq!(line, format!("error {id} exists"), "{plan:?}");
                assert!(
                    fixture.root().join(NAMES[plan.name]).is_file(),
                    "{plan:?}: nothing is there"
                );
            }
        }
    }
    // Visible is what was `done`, with exactly those bytes, and nothing else.
    let visible = fixture.visible();
    let files: Vec<_> = visible.iter().filter(|name| !name.ends_with('/')).collect();
    assert_eq!(files, stored.keys().collect::<Vec<_>>());
    for (name, index) in stored {
        assert!(
            fixture.stored(name) == content(index),
            "{name} has other bytes"
        );
    }
    assert_eq!(fixture.staged(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        // A case goes through sockets and syncs: few steps of shrinking, in bounded time.
        max_shrink_iters: 64,
        max_shrink_time: 10_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_is_visible_is_what_was_done(first in plans(), second in plans()) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(bounded(two_lanes(first, second)));
    }
}
