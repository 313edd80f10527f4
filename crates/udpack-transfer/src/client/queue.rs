//! The entries that an upload has still to send: a bounded window over the sources, largest file first.
//!
//! A blocking thread lists the sources and stops while the window is full, so memory does not depend on their number.
//! Lanes take claims. Dropping a claim, for whatever reason, puts its entry back at the front, so no file is lost with
//! a lane.

use std::cmp::Reverse;
use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::BuildHasher as _;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::local::error::TransferError;
use crate::local::source::{Origin, Source};
use crate::store::Time;
use crate::wire::CHUNK;

/// Entries that are listed ahead.
pub(crate) const WINDOW: usize = 8_192;
/// Files of up to this size, in bytes, are sent in one chunk, without asking the server what it has.
pub(crate) const SMALL: u64 = CHUNK as u64;
/// Up to this many entries in all count as few.
const FEW: usize = 16;
/// For this long the first entries wait for larger ones.
const GATHER: Duration = Duration::from_millis(5);
/// Small files that a lane takes at once: at most this many, and at most this many bytes together.
const BATCH: usize = 64;
const BATCH_BYTES: u64 = 1 << 20;

/// One entry and the state of its attempts.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) index: usize,
    pub(crate) source: Source,
    /// The bytes that it contributes to the total.
    pub(crate) size: u64,
    /// How many of these count as acknowledged. Never decreases.
    pub(crate) acked: u64,
    /// Bytes sent so far, over all attempts.
    pub(crate) sent: u64,
    /// Attempts that the server refused temporarily.
    pub(crate) tries: u32,
    /// The time since which the server has answered `busy`.
    pub(crate) busy: Option<Instant>,
    /// When it was offered first.
    pub(crate) since: Option<Instant>,
    /// Size and hash of the bytes that this source gave, as sent in the last `finish`.
    pub(crate) told: Option<(u64, [u8; 32])>,
    /// The modification time that was last sent to the server.
    pub(crate) mtime: Option<Time>,
    /// How many extended attributes were sent with it.
    pub(crate) xattrs: u32,
    /// Set when its lane was lost: the server may have stored it.
    pub(crate) unsure: bool,
    /// Set when it is offered again to find out whether the stored file is this one.
    pub(crate) settle: bool,
    /// Set when it was offered with a base.
    pub(crate) based: bool,
    /// Set when it must be sent without a base from now on.
    pub(crate) plain: bool,
    /// Not offered again before this time.
    pub(crate) not_before: Option<Instant>,
}

impl Item {
    pub(crate) fn new(index: usize, source: Source, size: u64) -> Self {
        Self {
            index,
            source,
            size,
            acked: 0,
            sent: 0,
            tries: 0,
            busy: None,
            since: None,
            told: None,
            mtime: None,
            xattrs: 0,
            unsure: false,
            settle: false,
            based: false,
            plain: false,
            not_before: None,
        }
    }

    fn path(&self) -> &str {
        self.source.remote()
    }

    /// Whether its size is unknown until its end.
    pub(crate) fn is_unsized(&self) -> bool {
        matches!(self.source.origin, Origin::Reader(_) | Origin::Spooled(_))
    }

    fn is_small(&self) -> bool {
        matches!(self.source.origin, Origin::File(_) | Origin::Memory(_)) && self.size <= SMALL
    }

    pub(crate) fn is_dir(&self) -> bool {
        matches!(self.source.origin, Origin::Dir(_))
    }

    /// An entry of unknown size goes first.
    fn rank(&self) -> Reverse<u64> {
        Reverse(match self.source.origin {
            Origin::Reader(_) | Origin::Spooled(_) => u64::MAX,
            _ => self.size,
        })
    }
}

/// What a lane does next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Small files, to be read and sent together.
    Batch(Vec<Claim>),
    /// One entry; `few` says whether there are few in all.
    One { claim: Claim, few: bool },
    /// The upload has failed, and this entry with it.
    Failed(Claim, TransferError),
    /// Every entry has its outcome.
    Over,
}

#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<State>,
    /// Notified when there is more to take, or when nothing more will come.
    changed: Notify,
    /// Notified when the window has room.
    room: Condvar,
    lanes: usize,
}

/// The names of files and links without an outcome, as hashes.
#[derive(Debug, Default)]
struct Names {
    taken: HashSet<u64>,
    /// Files and links that wait for another one of the same name, in their order.
    behind: HashMap<u64, VecDeque<Item>>,
    hasher: RandomState,
}

#[derive(Debug)]
struct State {
    /// Entries that a lane gave back.
    again: VecDeque<Item>,
    /// Entries that wait for a time.
    later: Vec<(Instant, Item)>,
    ready: BTreeMap<(Reverse<u64>, usize), Item>,
    /// Directories that wait for an entry below them.
    waiting: HashMap<Box<str>, Vec<Item>>,
    /// Directories that wait for nothing any more.
    ripe: VecDeque<Item>,
    names: Names,
    /// Entries without an outcome below each path.
    below: HashMap<Box<str>, usize>,
    /// Number of entries in the collections above.
    entries: usize,
    claimed: usize,
    /// Number of entries listed so far.
    seen: usize,
    listed: bool,
    closed: bool,
    failed: Option<TransferError>,
    begun: Instant,
}

impl Queue {
    /// A queue for this many lanes.
    pub(crate) fn new(lanes: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                again: VecDeque::new(),
                later: Vec::new(),
                ready: BTreeMap::new(),
                waiting: HashMap::new(),
                ripe: VecDeque::new(),
                names: Names::default(),
                below: HashMap::new(),
                entries: 0,
                claimed: 0,
                seen: 0,
                listed: false,
                closed: false,
                failed: None,
                begun: Instant::now(),
            }),
            changed: Notify::new(),
            room: Condvar::new(),
            lanes: lanes.max(1),
        })
    }

    /// Adds an entry; blocks while the window is full. Returns `false` when the upload has ended.
    pub(crate) fn push(&self, item: Item) -> bool {
        let mut state = self.lock();
        while state.entries >= WINDOW && !state.closed {
            state = self
                .room
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return false;
        }
        state.seen += 1;
        state.add(item);
        let wake = state.gathered(Instant::now()).is_none();
        drop(state);
        if wake {
            self.changed.notify_waiters();
        }
        true
    }

    /// Called when all entries are listed.
    pub(crate) fn listed(&self) {
        self.lock().listed = true;
        self.changed.notify_waiters();
    }

    /// Called when nobody takes entries any more.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.room.notify_all();
    }

    /// Fails the upload: every entry that is taken from now on has failed.
    pub(crate) fn fail(&self, error: TransferError) {
        self.lock().failed.get_or_insert(error);
        self.changed.notify_waiters();
    }

    /// Waits for the next entry.
    ///
    /// Cancel safe.
    pub(crate) async fn take(self: &Arc<Self>) -> Next {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let wait = match self.try_take(false) {
                Ok(next) => return next,
                Err(wait) => wait,
            };
            match wait {
                Some(until) => {
                    let _ = tokio::time::timeout_at(until, changed).await;
                }
                None => changed.await,
            }
        }
    }

    /// Whether the upload was given up: what is left only has to be told.
    pub(crate) fn is_given_up(&self) -> bool {
        self.lock().failed.is_some()
    }

    /// Waits until there is nothing to do any more, or the upload is given up.
    ///
    /// Cancel safe.
    pub(crate) async fn over(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            {
                let state = self.lock();
                if state.is_over() || state.failed.is_some() {
                    return;
                }
            }
            changed.await;
        }
    }

    /// Takes more small files, if they are next.
    pub(crate) fn take_small(self: &Arc<Self>) -> Option<Vec<Claim>> {
        match self.try_take(true) {
            Ok(Next::Batch(batch)) => Some(batch),
            _ => None,
        }
    }

    /// Takes the next entry, or returns when to look again at the latest.
    fn try_take(self: &Arc<Self>, small: bool) -> Result<Next, Option<Instant>> {
        let mut state = self.lock();
        let now = Instant::now();
        if let Some(error) = &state.failed {
            let error = error.again();
            if small {
                return Err(None);
            }
            return match state.any() {
                Some(item) => {
                    let claim = self.claim(&mut state, item);
                    Ok(Next::Failed(claim, error))
                }
                None if state.is_over() => Ok(Next::Over),
                None => Err(None),
            };
        }
        if let Some(until) = state.gathered(now) {
            return Err(Some(until));
        }
        let few = state.listed && state.seen <= FEW;
        if small && (few || !state.first(now).is_some_and(Item::is_small)) {
            return Err(None);
        }
        let Some(item) = state.pop(now) else {
            if state.is_over() {
                return Ok(Next::Over);
            }
            return Err(state.later.iter().map(|(at, _)| *at).min());
        };
        if few || !item.is_small() {
            let claim = self.claim(&mut state, item);
            return Ok(Next::One { claim, few });
        }
        // Leave some entries to each of the other lanes.
        let most = (state.entries / (2 * self.lanes)).clamp(1, BATCH);
        let mut bytes = item.size;
        let mut batch = vec![self.claim(&mut state, item)];
        while batch.len() < most
            && let Some(next) = state.first(now)
            && next.is_small()
            && bytes + next.size <= BATCH_BYTES
            && let Some(item) = state.pop(now)
        {
            bytes += item.size;
            batch.push(self.claim(&mut state, item));
        }
        Ok(Next::Batch(batch))
    }

    fn claim(self: &Arc<Self>, state: &mut State, item: Item) -> Claim {
        state.entries -= 1;
        state.claimed += 1;
        if state.entries < WINDOW {
            self.room.notify_one();
        }
        Claim {
            item,
            settled: false,
            queue: self.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, item: Item) {
        self.entries += 1;
        for above in parents(item.path()) {
            match self.below.get_mut(above) {
                Some(count) => *count += 1,
                None => {
                    self.below.insert(above.into(), 1);
                }
            }
        }
        if !item.is_dir() {
            // There are two sources of one name: the policy decides about the second when the first has its outcome.
            let name = self.names.hasher.hash_one(item.path());
            if self.names.taken.insert(name) {
                self.ready.insert((item.rank(), item.index), item);
            } else {
                self.names.behind.entry(name).or_default().push_back(item);
            }
        } else if self.below.contains_key(item.path()) {
            let path = item.path().into();
            self.waiting.entry(path).or_default().push(item);
        } else {
            self.ripe.push_back(item);
        }
    }

    /// Records the outcome of an entry. Directories above it and entries of the same name may have waited for that.
    /// Returns whether there is an entry to take now.
    fn settle(&mut self, settled: &Item) -> bool {
        for above in parents(settled.path()) {
            let Some(count) = self.below.get_mut(above) else {
                continue;
            };
            *count -= 1;
            if *count == 0 {
                self.below.remove(above);
                self.ripe
                    .extend(self.waiting.remove(above).unwrap_or_default());
            }
        }
        let next = !settled.is_dir() && self.follow(settled.path());
        next || !self.ripe.is_empty()
    }

    /// Releases the next entry of this name, if there is one.
    fn follow(&mut self, path: &str) -> bool {
        let name = self.names.hasher.hash_one(path);
        let Some(items) = self.names.behind.get_mut(&name) else {
            self.names.taken.remove(&name);
            return false;
        };
        let next = items.pop_front();
        if items.is_empty() {
            self.names.behind.remove(&name);
        }
        next.is_some_and(|item| {
            self.ready.insert((item.rank(), item.index), item);
            true
        })
    }

    /// Until when the first entries wait for larger ones.
    fn gathered(&self, now: Instant) -> Option<Instant> {
        let until = self.begun + GATHER;
        (!self.listed && self.entries < WINDOW && self.claimed == 0 && now < until).then_some(until)
    }

    fn first(&self, now: Instant) -> Option<&Item> {
        let due = || self.later.iter().find(|(at, _)| *at <= now);
        self.again
            .front()
            .or_else(|| self.ripe.front())
            .or_else(|| due().map(|(_, item)| item))
            .or_else(|| self.ready.first_key_value().map(|(_, item)| item))
    }

    /// Takes the entry that [`first`](Self::first) shows.
    fn pop(&mut self, now: Instant) -> Option<Item> {
        if let Some(item) = self.again.pop_front().or_else(|| self.ripe.pop_front()) {
            return Some(item);
        }
        if let Some(due) = self.later.iter().position(|(at, _)| *at <= now) {
            return Some(self.later.remove(due).1);
        }
        self.ready.pop_first().map(|(_, item)| item)
    }

    /// Takes any entry, even one that waits.
    fn any(&mut self) -> Option<Item> {
        if let Some(item) = self.pop(Instant::now()) {
            return Some(item);
        }
        if let Some((_, item)) = self.later.pop() {
            return Some(item);
        }
        if let Some(name) = self.names.behind.keys().next().copied() {
            let mut items = self.names.behind.remove(&name)?;
            let item = items.pop_front();
            if !items.is_empty() {
                self.names.behind.insert(name, items);
            }
            return item;
        }
        let path = self.waiting.keys().next()?.clone();
        let mut items = self.waiting.remove(&path)?;
        let item = items.pop();
        if !items.is_empty() {
            self.waiting.insert(path, items);
        }
        item
    }

    fn is_over(&self) -> bool {
        self.listed && self.entries == 0 && self.claimed == 0
    }
}

/// An entry that a lane has taken. Dropping it without [`settle`](Self::settle) puts the entry back into the queue.
#[derive(Debug)]
pub(crate) struct Claim {
    item: Item,
    settled: bool,
    queue: Arc<Queue>,
}

impl Claim {
    /// Records that the entry has its outcome.
    pub(crate) fn settle(mut self) {
        self.settled = true;
    }
}

impl Deref for Claim {
    type Target = Item;

    fn deref(&self) -> &Item {
        &self.item
    }
}

impl DerefMut for Claim {
    fn deref_mut(&mut self) -> &mut Item {
        &mut self.item
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut item = std::mem::replace(&mut self.item, Item::new(0, Source::empty(), 0));
        let mut state = self.queue.lock();
        state.claimed -= 1;
        if self.settled {
            let more = state.settle(&item);
            // No task waits for this outcome.
            if !more && !state.is_over() {
                return;
            }
        } else {
            state.entries += 1;
            match item.not_before.take() {
                Some(at) => state.later.push((at, item)),
                None => state.again.push_front(item),
            }
        }
        drop(state);
        self.queue.changed.notify_waiters();
    }
}

/// The paths above this one, nearest first.
fn parents(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(path.rsplit_once('/').map(|(above, _)| above), |above| {
        above.rsplit_once('/').map(|(above, _)| above)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Meta;

    fn file(index: usize, name: &str, size: u64) -> Item {
        let source = Source::bytes("", name.parse().unwrap());
        Item::new(index, source, size)
    }

    fn dir(index: usize, name: &str) -> Item {
        let source = Source::dir(name.parse().unwrap(), Meta::default());
        Item::new(index, source, 0)
    }

    async fn one(queue: &Arc<Queue>) -> Claim {
        match queue.take().await {
            Next::One { claim, .. } => claim,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_largest_goes_first_and_equals_in_order() {
        let queue = Queue::new(1);
        for (index, size) in [5, 900_000, 7, 7, 2_000_000, 0].into_iter().enumerate() {
            queue.push(file(index, &index.to_string(), size));
        }
        queue.listed();
        let mut order = Vec::new();
        loop {
            match queue.take().await {
                Next::One { claim, few } => {
                    assert!(few);
                    order.push(claim.index);
                    claim.settle();
                }
                Next::Over => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(order, [4, 1, 2, 3, 0, 5]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_entries_wait_a_moment_for_larger_ones() {
        let queue = Queue::new(1);
        queue.push(file(0, "small", 300_000));
        let mut taking = tokio::spawn({
            let queue = queue.clone();
            async move { one(&queue).await.index }
        });
        let early = tokio::time::timeout(GATHER / 2, &mut taking).await;
        assert!(early.is_err());
        queue.push(file(1, "large", 400_000));
        assert_eq!(taking.await.unwrap(), 1);
    }

    #[tokio::test]
    async fn listing_stops_while_the_window_is_full() {
        let queue = Queue::new(1);
        let lister = {
            let queue = queue.clone();
            std::thread::spawn(move || {
                let pushed = (0..3 * WINDOW)
                    .take_while(|n| queue.push(file(*n, &n.to_string(), 300_000)))
                    .count();
                queue.listed();
                pushed
            })
        };
        let mut seen = 0;
        loop {
            assert!(queue.lock().entries <= WINDOW);
            match queue.take().await {
                Next::One { claim, .. } => {
                    seen += 1;
                    claim.settle();
                }
                Next::Over => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((seen, lister.join().unwrap()), (3 * WINDOW, 3 * WINDOW));
        // Who waits for room is let go when nobody takes any more.
        let queue = Queue::new(1);
        let lister = {
            let queue = queue.clone();
            std::thread::spawn(move || while queue.push(file(0, "x", 1)) {})
        };
        queue.close();
        lister.join().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_dropped_comes_back_first_and_what_is_put_off_later() {
        let queue = Queue::new(1);
        for index in 0..3 {
            queue.push(file(index, &index.to_string(), 900_000 - index as u64));
        }
        queue.listed();
        let mut first = one(&queue).await;
        first.acked = 17;
        drop(first);
        let mut first = one(&queue).await;
        assert_eq!((first.index, first.acked), (0, 17));
        let at = Instant::now() + Duration::from_secs(1);
        first.not_before = Some(at);
        drop(first);
        for index in 1..3 {
            let claim = one(&queue).await;
            assert_eq!(claim.index, index);
            claim.settle();
        }
        let last = one(&queue).await;
        assert_eq!(last.index, 0);
        assert!(Instant::now() >= at);
        last.settle();
        assert!(matches!(queue.take().await, Next::Over));
    }

    #[tokio::test(start_paused = true)]
    async fn a_directory_waits_for_what_is_below_it_and_for_nothing_else() {
        let queue = Queue::new(1);
        queue.push(file(0, "a/b/x", 300_000));
        queue.push(file(1, "a/y", 400_000));
        queue.push(dir(2, "a/b"));
        queue.push(dir(3, "a"));
        queue.push(dir(4, "empty"));
        queue.push(file(5, "ab", 1));
        queue.listed();
        let empty = one(&queue).await;
        assert_eq!(empty.index, 4);
        let y = one(&queue).await;
        assert_eq!(y.index, 1);
        y.settle();
        let x = one(&queue).await;
        assert_eq!(x.index, 0);
        // Given back, it still keeps its directories waiting.
        drop(x);
        let x = one(&queue).await;
        let ab = one(&queue).await;
        assert_eq!((x.index, ab.index), (0, 5));
        x.settle();
        let b = one(&queue).await;
        assert_eq!(b.index, 2);
        b.settle();
        let a = one(&queue).await;
        assert_eq!(a.index, 3);
        a.settle();
        ab.settle();
        empty.settle();
        assert!(matches!(queue.take().await, Next::Over));
        assert!(queue.lock().below.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn files_of_one_name_come_one_after_the_other_in_their_order() {
        let queue = Queue::new(1);
        queue.push(file(0, "a/x", 1));
        queue.push(file(1, "a/x", 900_000));
        queue.push(file(2, "y", 5));
        queue.push(file(3, "a/x", 7));
        queue.push(dir(4, "a"));
        queue.push(dir(5, "a"));
        queue.listed();
        let y = one(&queue).await;
        let first = one(&queue).await;
        assert_eq!((y.index, first.index), (2, 0));
        // Given back, it is still the first of its name.
        drop(first);
        let first = one(&queue).await;
        assert_eq!(first.index, 0);
        assert!(queue.try_take(false).is_err(), "the others wait");
        first.settle();
        for index in [1, 3, 4, 5] {
            let next = one(&queue).await;
            assert_eq!(next.index, index);
            next.settle();
        }
        y.settle();
        assert!(matches!(queue.take().await, Next::Over));
        let state = queue.lock();
        assert!(
            state.names.taken.is_empty() && state.names.behind.is_empty() && state.below.is_empty()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn small_files_come_in_batches_that_leave_some_for_the_other_lanes() {
        let queue = Queue::new(2);
        for index in 0..200 {
            queue.push(file(index, &index.to_string(), 4096));
        }
        queue.push(file(200, "large", 1 << 30));
        queue.listed();
        let large = one(&queue).await;
        assert_eq!(large.index, 200);
        let mut sizes = Vec::new();
        while let Some(batch) = queue.take_small() {
            sizes.push(batch.len());
            batch.into_iter().for_each(Claim::settle);
        }
        assert_eq!(sizes.iter().sum::<usize>(), 200);
        assert!(sizes[0] <= 50 && sizes[0] > 30, "{sizes:?}");
        assert!(sizes.iter().all(|size| *size <= BATCH));
        large.settle();
    }

    #[tokio::test(start_paused = true)]
    async fn when_it_is_given_up_every_entry_fails_also_those_that_wait() {
        let queue = Queue::new(1);
        queue.push(file(0, "a/x", 300_000));
        queue.push(dir(1, "a"));
        let claimed = one(&queue).await;
        queue.fail(TransferError::Silent(Duration::ZERO));
        assert!(queue.take_small().is_none());
        let mut failed = Vec::new();
        match queue.take().await {
            Next::Failed(claim, _) => {
                failed.push(claim.index);
                claim.settle();
            }
            other => panic!("{other:?}"),
        }
        drop(claimed);
        queue.push(file(2, "later", 1));
        queue.listed();
        loop {
            match queue.take().await {
                Next::Failed(claim, _) => {
                    failed.push(claim.index);
                    claim.settle();
                }
                Next::Over => break,
                other => panic!("{other:?}"),
            }
        }
        failed.sort_unstable();
        assert_eq!(failed, [0, 1, 2]);
    }
}
