//! The messages that rooms keep: positions, bounds, and the budget of all rooms together. No I/O.
//!
//! A room's log holds the encoded frames that were sent; it shares them with the queues. A member of such a room has no
//! separate queue for it: the member has a position and takes the messages after it from the log. So a member that was
//! away or is slow continues at its position, and messages that the log has dropped become a gap with exact bounds.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::base::lock;
use crate::wire::control::Position;

/// The cost of a message beside its bytes.
const ENTRY: usize = 96;
/// Epochs are below this number, so that a JavaScript number represents them exactly.
const EPOCHS: u64 = 1 << 53;

/// How many of its messages a room keeps for members that were away or are slow. When any of the bounds is exceeded,
/// the oldest messages are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct History {
    /// The most messages. Default 1,000.
    pub messages: usize,
    /// The most bytes of encoded messages, plus 96 for each. Default 1 MiB.
    pub bytes: usize,
    /// The age up to which messages are kept. Default 5 minutes. Older messages are not sent. Their memory is freed
    /// with the next message to the room, or when the server needs it for another room.
    pub age: Duration,
}

impl Default for History {
    fn default() -> Self {
        Self {
            messages: 1000,
            bytes: 1 << 20,
            age: Duration::from_secs(300),
        }
    }
}

/// The kept messages of one room.
#[derive(Debug)]
pub(crate) struct Log {
    bounds: History,
    kept: VecDeque<Kept>,
    /// The offset of the next message.
    next: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Kept {
    /// The message; `None` if there is none at this offset.
    frame: Option<Bytes>,
    /// The sessions that were excluded.
    except: Option<Box<[Box<str>]>>,
    /// How many messages without an offset were lost before this one.
    lost: u64,
    at: Instant,
}

impl Kept {
    fn size(&self) -> usize {
        self.frame.as_ref().map_or(0, Bytes::len) + ENTRY
    }

    fn is_for(&self, session: &str) -> bool {
        let mut except = self.except.iter().flatten();
        !except.any(|name| **name == *session)
    }
}

/// What a log of the cluster has at one offset.
#[derive(Debug, Default)]
pub(crate) struct Entered<'a> {
    /// The message and the sessions that it is not for; `None` if there is nothing for the members.
    pub(crate) message: Option<(&'a Bytes, &'a [&'a str])>,
    /// How many messages without an offset were lost before it.
    pub(crate) lost: u64,
    /// How long ago it was sent.
    pub(crate) age: Duration,
}

/// What a log contains after an offset.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// No message.
    End,
    /// Messages up to this offset, which are not kept any more.
    Gone(u64),
    /// The next message; `None` if there is none for this session at this offset.
    Message {
        /// How many messages without an offset were lost before it.
        lost: u64,
        frame: Option<Bytes>,
    },
}

impl Log {
    pub(crate) fn new(bounds: History) -> Self {
        Self {
            bounds,
            kept: VecDeque::new(),
            next: 1,
            bytes: 0,
        }
    }

    /// The offset of the last message; 0 before the first.
    pub(crate) fn head(&self) -> u64 {
        self.next - 1
    }

    /// The offset of the oldest kept message; that of the next message if none is kept.
    pub(crate) fn first(&self) -> u64 {
        self.next - self.kept.len() as u64
    }

    fn oldest(&self) -> Option<Instant> {
        self.kept.front().map(|kept| kept.at)
    }

    /// Appends one message and returns its offset.
    pub(crate) fn push(&mut self, frame: Bytes, except: &[&str], now: Instant) -> u64 {
        self.keep(
            Kept {
                frame: Some(frame),
                except: names(except),
                lost: 0,
                at: now,
            },
            now,
        )
    }

    /// Appends what a log of the cluster has next.
    fn enter(&mut self, entered: &Entered<'_>, now: Instant) -> u64 {
        let sent = now.checked_sub(entered.age).unwrap_or(now);
        // The clocks of brokers do not always go forward.
        let last = self.kept.back().map_or(sent, |kept| kept.at);
        self.keep(
            Kept {
                frame: entered.message.map(|(frame, _)| frame.clone()),
                except: entered.message.and_then(|(_, except)| names(except)),
                lost: entered.lost,
                at: sent.max(last),
            },
            now,
        )
    }

    fn keep(&mut self, kept: Kept, now: Instant) -> u64 {
        self.bytes += kept.size();
        self.kept.push_back(kept);
        let offset = self.next;
        self.next += 1;
        self.settle(now);
        offset
    }

    /// Counts messages that never arrived here. Drops the messages before them, so that no member skips the hole
    /// unnoticed.
    pub(crate) fn skip(&mut self, messages: u64) {
        while !self.kept.is_empty() {
            self.drop_oldest();
        }
        self.next = self.next.saturating_add(messages);
    }

    /// Drops messages beyond the bounds.
    fn settle(&mut self, now: Instant) {
        while let Some(oldest) = self.kept.front()
            && (self.kept.len() > self.bounds.messages
                || self.bytes > self.bounds.bytes
                || now.saturating_duration_since(oldest.at) > self.bounds.age)
        {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.kept.pop_front() {
            self.bytes -= oldest.size();
        }
    }

    /// What follows after this offset, for this session.
    pub(crate) fn after(&mut self, offset: u64, session: &str, now: Instant) -> Entry {
        if offset >= self.head() {
            return Entry::End;
        }
        self.settle(now);
        let first = self.first();
        if offset + 1 < first {
            return Entry::Gone(first - 1);
        }
        let at = usize::try_from(offset + 1 - first).unwrap_or(usize::MAX);
        match self.kept.get(at) {
            Some(kept) => Entry::Message {
                lost: kept.lost,
                frame: kept.frame.clone().filter(|_| kept.is_for(session)),
            },
            None => Entry::End,
        }
    }
}

fn names(except: &[&str]) -> Option<Box<[Box<str>]>> {
    (!except.is_empty()).then(|| except.iter().map(|&name| name.into()).collect())
}

/// The logs of a server, which share one budget.
#[derive(Debug)]
pub(crate) struct Archive {
    limit: usize,
    used: AtomicUsize,
    /// Messages that were lost because members were too slow.
    lost: AtomicU64,
    /// The logs with messages, by the time of their oldest message when they were entered. That message may be gone by
    /// now.
    by_age: Mutex<BTreeMap<(Instant, u64), Weak<Record>>>,
}

/// A log as its room and the members share it.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) room: Arc<str>,
    /// The number that represents the room's name on the wire.
    pub(crate) number: u64,
    /// 0: the cluster has not told yet what is kept, and this log stays empty.
    pub(crate) epoch: u64,
    /// Whether the cluster keeps the messages and chooses their offsets; this is then a copy.
    pub(crate) copy: bool,
    archive: Arc<Archive>,
    /// Lock order: this lock, then `by_age`.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    log: Log,
    /// Whether it is in `by_age`, or being examined by the task that took it from there.
    listed: bool,
}

impl Archive {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
            by_age: Mutex::default(),
        })
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Bytes that all logs hold.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Drops the oldest messages of all logs until the rest is within the budget.
    fn settle(&self) {
        while self.used() > self.limit {
            let Some((key, record)) = lock(&self.by_age).pop_first() else {
                // Other tasks that do the same hold the remaining logs.
                return;
            };
            if let Some(record) = record.upgrade() {
                record.give_up(key.0);
            }
        }
    }
}

impl Record {
    pub(crate) fn new(
        room: Arc<str>,
        number: u64,
        epoch: u64,
        bounds: History,
        archive: Arc<Archive>,
        copy: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            room,
            number,
            epoch,
            copy,
            archive,
            state: Mutex::new(State {
                log: Log::new(bounds),
                listed: false,
            }),
        })
    }

    /// A new epoch, of which nobody can have a position.
    pub(crate) fn new_epoch() -> Option<u64> {
        let mut bytes = [0; 8];
        aws_lc_rs::rand::fill(&mut bytes).ok()?;
        Some((u64::from_le_bytes(bytes) % EPOCHS).max(1))
    }

    /// Whether nothing is known yet of what the cluster keeps.
    pub(crate) fn is_pending(&self) -> bool {
        self.epoch == 0
    }

    pub(crate) fn push(self: &Arc<Self>, frame: &Bytes, except: &[&str]) -> u64 {
        let now = Instant::now();
        self.append(|log| log.push(frame.clone(), except, now))
    }

    /// Appends what the cluster keeps next.
    pub(crate) fn enter(self: &Arc<Self>, entered: &Entered<'_>) -> u64 {
        let now = Instant::now();
        self.append(|log| log.enter(entered, now))
    }

    fn append(self: &Arc<Self>, append: impl FnOnce(&mut Log) -> u64) -> u64 {
        let offset = {
            let mut state = lock(&self.state);
            let offset = self.change(&mut state, append);
            if !state.listed
                && let Some(oldest) = state.log.oldest()
            {
                state.listed = true;
                self.list(oldest);
            }
            offset
        };
        self.archive.settle();
        offset
    }

    /// See [`Log::skip`].
    pub(crate) fn skip(&self, messages: u64) {
        self.change(&mut lock(&self.state), |log| log.skip(messages));
    }

    /// Applies other bounds from now on.
    pub(crate) fn set_bounds(&self, bounds: History) {
        let mut state = lock(&self.state);
        self.change(&mut state, |log| {
            log.bounds = bounds;
            log.settle(Instant::now());
        });
    }

    pub(crate) fn after(&self, offset: u64, session: &str) -> Entry {
        let mut state = lock(&self.state);
        self.change(&mut state, |log| log.after(offset, session, Instant::now()))
    }

    pub(crate) fn head(&self) -> u64 {
        lock(&self.state).log.head()
    }

    /// Gives the first message the offset after this one.
    pub(crate) fn begin_behind(&self, offset: u64) {
        let mut state = lock(&self.state);
        if state.log.kept.is_empty() {
            state.log.next = offset + 1;
        }
    }

    /// The offset of the last message, and all kept messages.
    pub(crate) fn kept(&self) -> (u64, Vec<Bytes>) {
        let mut state = lock(&self.state);
        self.change(&mut state, |log| {
            log.settle(Instant::now());
            let frames = log.kept.iter().filter_map(|kept| kept.frame.clone());
            (log.head(), frames.collect())
        })
    }

    /// The offset at which a member with this position continues; `None` if the position is not one of this log's.
    pub(crate) fn find(&self, position: Position) -> Option<u64> {
        let known = position.epoch == self.epoch && position.offset <= self.head();
        known.then_some(position.offset)
    }

    /// The last offset before the kept messages.
    pub(crate) fn before_first(&self) -> u64 {
        let mut state = lock(&self.state);
        self.change(&mut state, |log| {
            log.settle(Instant::now());
            log.first() - 1
        })
    }

    pub(crate) fn lose(&self, messages: u64) {
        self.archive.lost.fetch_add(messages, Ordering::Relaxed);
    }

    fn change<T>(&self, state: &mut State, change: impl FnOnce(&mut Log) -> T) -> T {
        let before = state.log.bytes;
        let result = change(&mut state.log);
        let after = state.log.bytes;
        let used = &self.archive.used;
        if after > before {
            used.fetch_add(after - before, Ordering::Relaxed);
        } else if after < before {
            used.fetch_sub(before - after, Ordering::Relaxed);
        }
        result
    }

    fn list(self: &Arc<Self>, oldest: Instant) {
        lock(&self.archive.by_age).insert((oldest, self.number), Arc::downgrade(self));
    }

    /// Drops the oldest message, of this time, if it is still there. Called for the log with the oldest message of all.
    fn give_up(self: &Arc<Self>, known: Instant) {
        let mut state = lock(&self.state);
        if state.log.oldest().is_some_and(|oldest| oldest <= known) {
            self.change(&mut state, Log::drop_oldest);
        }
        match state.log.oldest() {
            Some(oldest) => self.list(oldest),
            None => state.listed = false,
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let bytes = lock(&self.state).log.bytes;
        self.archive.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Act {
        Push(usize, bool),
        /// Milliseconds.
        Pass(u64),
        /// So many offsets before the head.
        Read(u64),
        Bounds(usize, usize, u64),
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let act = prop_oneof![
            6 => (0..300_usize, any::<bool>()).prop_map(|(size, except)| Act::Push(size, except)),
            2 => (0..50_u64).prop_map(Act::Pass),
            4 => (0..40_u64).prop_map(Act::Read),
            1 => (0..20_usize, 0..4000_usize, 0..200_u64)
                .prop_map(|(messages, bytes, age)| Act::Bounds(messages, bytes, age)),
        ];
        prop::collection::vec(act, 1..200)
    }

    /// All messages ever sent, and the first that is still kept.
    struct Model {
        sent: Vec<(usize, bool, Instant)>,
        first: usize,
        bounds: History,
    }

    impl Model {
        /// The longest tail that all bounds allow.
        fn settle(&mut self, now: Instant) {
            let sound = |tail: &[(usize, bool, Instant)]| {
                let bytes: usize = tail.iter().map(|(size, ..)| size + ENTRY).sum();
                let young = tail
                    .first()
                    .is_none_or(|(_, _, at)| now - *at <= self.bounds.age);
                tail.len() <= self.bounds.messages && bytes <= self.bounds.bytes && young
            };
            let len = self.sent.len();
            let first = (self.first..=len).find(|first| sound(&self.sent[*first..]));
            self.first = first.expect("nothing is always sound");
        }

        fn after(&mut self, offset: usize, now: Instant) -> Entry {
            if offset >= self.sent.len() {
                return Entry::End;
            }
            self.settle(now);
            match self.sent.get(offset) {
                _ if offset < self.first => Entry::Gone(self.first as u64),
                Some((size, except, _)) => {
                    let frame = (!except).then(|| Bytes::from(vec![offset as u8; *size]));
                    Entry::Message { lost: 0, frame }
                }
                None => Entry::End,
            }
        }
    }

    proptest! {
        #[test]
        fn a_log_holds_the_longest_tail_within_its_bounds(acts in acts()) {
            let mut now = Instant::now();
            let bounds = History { messages: 10, bytes: 2000, age: Duration::from_millis(100) };
            let mut log = Log::new(bounds);
            let mut model = Model { sent: Vec::new(), first: 0, bounds };
            for act in acts {
                match act {
                    Act::Push(size, except) => {
                        let offset = model.sent.len();
                        let frame = Bytes::from(vec![offset as u8; size]);
                        let names: &[&str] = if except { &["other", "me"] } else { &["other"] };
                        prop_assert_eq!(log.push(frame, names, now), offset as u64 + 1);
                        model.sent.push((size, except, now));
                        model.settle(now);
                    }
                    Act::Pass(ms) => now += Duration::from_millis(ms),
                    Act::Read(back) => {
                        let offset = log.head().saturating_sub(back);
                        let expected = model.after(offset as usize, now);
                        prop_assert_eq!(log.after(offset, "me", now), expected);
                    }
                    Act::Bounds(messages, bytes, age) => {
                        let age = Duration::from_millis(age);
                        let bounds = History { messages, bytes, age };
                        (log.bounds, model.bounds) = (bounds, bounds);
                        log.settle(now);
                        model.settle(now);
                    }
                }
                prop_assert_eq!(log.first(), model.first as u64 + 1);
                prop_assert_eq!(log.head(), model.sent.len() as u64);
                let bytes: usize = model.sent[model.first..].iter().map(|(size, ..)| size + ENTRY).sum();
                prop_assert_eq!(log.bytes, bytes);
            }
            for hostile in [log.head() + 1, u64::MAX] {
                prop_assert_eq!(log.after(hostile, "me", now), Entry::End);
            }
        }

        #[test]
        fn beyond_the_budget_the_oldest_of_all_go(
            pushes in prop::collection::vec((0..4_usize, 0..200_usize), 1..150),
            limit in 0..5000_usize,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_time().start_paused(true).build().expect("a runtime");
            runtime.block_on(async {
                let archive = Archive::new(limit);
                let bounds = History { messages: 1000, bytes: 1 << 20, age: Duration::from_secs(100) };
                let records: Vec<_> = (0..4_u64)
                    .map(|n| Record::new("hall".into(), n, 1, bounds, archive.clone(), false))
                    .collect();
                let mut sent: Vec<(usize, usize)> = Vec::new();
                for (room, size) in pushes {
                    tokio::time::advance(Duration::from_millis(1)).await;
                    records[room].push(&Bytes::from(vec![0; size]), &[]);
                    sent.push((room, size + ENTRY));
                    let kept = (0..=sent.len())
                        .map(|from| &sent[from..])
                        .find(|tail| tail.iter().map(|(_, size)| size).sum::<usize>() <= limit);
                    let kept = kept.expect("nothing is within any limit");
                    assert_eq!(archive.used(), kept.iter().map(|(_, size)| size).sum::<usize>());
                    for (n, record) in records.iter().enumerate() {
                        let here = kept.iter().filter(|(room, _)| *room == n).count() as u64;
                        assert_eq!(record.head() - record.before_first(), here);
                    }
                }
                drop(records);
                assert_eq!(archive.used(), 0);
            });
        }
    }
}
