//! The sending half of a channel: a bounded queue of frames and the one task that writes them.
//!
//! A message is encoded straight into the queue, so it is either queued whole or not at all, whatever
//! happens to the future that queued it. The writer takes what has gathered and hands it to QUIC in one go:
//! many small sends share packets without any timer. Only what follows upon something received from the peer, an
//! answer or the next question, its sender writes itself: the peer waits for it, and it saves a task's wake-up. So does
//! who sends to a quiet room: it saves one for each member.
//!
//! The queue of a resumable channel keeps what was written until the peer has confirmed it, counts it against
//! the same bounds, and repeats it on the channel's next stream. Its writer ends with each connection.

pub(crate) mod follow;

use std::any::Any;
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use tokio::sync::Notify;

use crate::base::lock;
use crate::channel::outbox::follow::Stream;
use crate::channel::overflow::{Overflow, Overflowing, Push, Tag};
use crate::channel::pace::Pace;
use crate::channel::resume::{Mismatch, Retained};
use crate::metrics::speed::Counters;
use crate::metrics::{Count, Counts};
use crate::transport::SendStream;
use crate::wire::code::CloseReason;
use crate::wire::config::Priority;
use crate::wire::control::ProtocolEvent;
use crate::wire::message::{self, EncodeError, Encoded};

/// What is dropped when the sending side of a channel ends.
type HeldUntilEnd = Box<dyn Any + Send>;

/// Small messages gather up to about this size before a new buffer is begun: large, because QUIC looks through
/// all buffers that are not acknowledged for each packet; less than a turn, which would be cut in two.
const SEGMENT: usize = TURN - COPY_LIMIT;
/// Buffers handed to QUIC in one call.
pub(crate) const BATCH: usize = 16;
/// Bytes that one channel hands over before the others of its connection get their turn.
pub(crate) const TURN: usize = 64 << 10;
/// What each resumable channel may keep however much the others of its session do.
const SHARE: usize = 64 << 10;
/// Ready-made bytes up to this size are copied into the gathering buffer; larger ones go as they are.
pub(crate) const COPY_LIMIT: usize = 4 << 10;

#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    /// The writer has something to do.
    pub(crate) work: Notify,
    /// The queue has shrunk.
    room: Notify,
    /// The writer has ended.
    ended: Notify,
    max_bytes: usize,
    max_messages: usize,
    pub(crate) priority: Priority,
    counters: Arc<Counters>,
    counts: Arc<Counts>,
}

#[derive(Debug)]
struct State {
    frames: Frames,
    queued_bytes: usize,
    queued_messages: usize,
    /// Numbers of those who wait for room, drawn from those of the rooms: nothing that came to it later goes before them.
    waiting: BTreeSet<u64>,
    rooms: Membership,
    /// The writer sleeps and wants to be woken.
    idle: bool,
    /// Its stream meanwhile, of the present epoch.
    stream_at_rest: Option<SendStream>,
    /// Bytes that had come from the peer when a sender last wrote to it.
    received: u64,
    phase: Phase,
    /// Why nothing more is taken, where the application did not ask for it.
    why: Option<CloseReason>,
    /// What a resumable channel keeps to repeat.
    keep: Option<Keep>,
    /// Messages that were not confirmed when the queue ended otherwise than in order.
    left: u64,
    /// The peer takes nothing more.
    refused: bool,
    /// Which stream the queue goes to; a writer of an earlier one stops.
    epoch: u64,
}

/// What the channel is for its rooms.
#[derive(Debug, Default)]
struct Membership {
    /// Messages that found no room in the queue, or wait until the peer has read those before them.
    overflow: Overflowing,
    /// How far the peer is behind with them, where it tells.
    pace: Option<Box<Pace>>,
    /// Those with a history.
    streams: Vec<Stream>,
    /// The channel's place in them, given up with the channel.
    held: Option<HeldUntilEnd>,
}

impl Membership {
    /// Whether one more message may go; always where it does not count what is unread.
    fn may_send(&self, unread: Option<u64>) -> bool {
        match (&self.pace, unread) {
            (Some(pace), Some(unread)) => pace.may_send(unread),
            _ => true,
        }
    }

    /// One message goes now; behind this mark, if it is time for one.
    fn goes(&mut self, unread: Option<u64>) -> Option<u64> {
        self.pace.as_mut()?.send(unread?)
    }
}

#[derive(Debug)]
struct Keep {
    retained: Retained,
    /// Frames queued so far, since the channel began.
    frames: u64,
    budget: Arc<Budget>,
}

impl Keep {
    fn unconfirmed(&self) -> u64 {
        self.frames.saturating_sub(self.retained.confirmed())
    }
}

/// What all resumable channels of one session keep, and how much that may be.
#[derive(Debug)]
pub(crate) struct Budget {
    detached: AtomicBool,
    bytes: AtomicUsize,
    limit: usize,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            detached: AtomicBool::new(false),
            bytes: AtomicUsize::new(0),
            limit,
        }
    }

    pub(crate) fn set_detached(&self, detached: bool) {
        self.detached.store(detached, Ordering::Relaxed);
    }

    /// Whether a channel that keeps so many bytes itself must wait. While there is a connection a little is
    /// always permitted, so that channels that are stuck do not stop the others.
    fn exhausted(&self, own: usize) -> bool {
        self.bytes.load(Ordering::Relaxed) >= self.limit
            && (own >= SHARE || self.detached.load(Ordering::Relaxed))
    }
}

#[derive(Debug)]
struct Segment {
    bytes: Bytes,
    messages: usize,
}

/// Frames that are to be written, in their order.
#[derive(Debug, Default)]
struct Frames {
    segments: VecDeque<Segment>,
    /// Where small ones gather, behind the segments.
    tail: BytesMut,
    tail_messages: usize,
}

impl Frames {
    /// One more message stands in the tail.
    fn grew(&mut self) {
        self.tail_messages += 1;
        if self.tail.len() >= SEGMENT {
            self.cut_tail();
        }
    }

    fn cut_tail(&mut self) {
        if !self.tail.is_empty() {
            let bytes = self.tail.split().freeze();
            let messages = std::mem::take(&mut self.tail_messages);
            self.push(bytes, messages);
        }
    }

    fn push(&mut self, bytes: Bytes, messages: usize) {
        self.segments.push_back(Segment { bytes, messages });
    }

    /// The next piece to be written, no longer than a turn.
    fn piece(&mut self) -> Option<Segment> {
        if self.segments.is_empty() {
            self.cut_tail();
        }
        let mut segment = self.segments.pop_front()?;
        if segment.bytes.len() > TURN {
            let bytes = segment.bytes.split_off(TURN);
            // The messages in it count as sent with its last piece.
            let messages = std::mem::take(&mut segment.messages);
            self.segments.push_front(Segment { bytes, messages });
        }
        Some(segment)
    }

    /// Bytes and messages.
    fn size(&self) -> (usize, usize) {
        let tail = (self.tail.len(), self.tail_messages);
        self.segments
            .iter()
            .fold(tail, |(bytes, messages), segment| {
                (bytes + segment.bytes.len(), messages + segment.messages)
            })
    }
}

#[derive(Debug)]
enum Phase {
    Open,
    /// Send what is queued, then this last frame if any, then FIN.
    Finishing(Option<Bytes>),
    /// Over: `Ok` when the peer's transport acknowledged everything.
    Ended(Result<(), CloseReason>),
}

/// Why a message could not be queued.
#[derive(Debug)]
pub(crate) enum PushError {
    Encode(EncodeError),
    /// This side has already finished the channel.
    Finished,
    Ended(CloseReason),
}

pub(crate) enum Work {
    Idle,
    Batch {
        bytes: usize,
        messages: usize,
        gaps: u64,
    },
    Finish(Option<Bytes>),
    /// The queue goes to another stream by now, or is over.
    Gone,
}

impl Outbox {
    /// A queue with these bounds; with a budget it keeps what is not confirmed.
    pub(crate) fn new(
        max_bytes: usize,
        max_messages: usize,
        priority: Priority,
        budget: Option<Arc<Budget>>,
        counters: Arc<Counters>,
        counts: Arc<Counts>,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                frames: Frames::default(),
                queued_bytes: 0,
                queued_messages: 0,
                waiting: BTreeSet::new(),
                rooms: Membership::default(),
                idle: false,
                stream_at_rest: None,
                received: 0,
                phase: Phase::Open,
                why: None,
                keep: budget.map(|budget| Keep {
                    retained: Retained::default(),
                    frames: 0,
                    budget,
                }),
                left: 0,
                refused: false,
                epoch: 0,
            }),
            work: Notify::new(),
            room: Notify::new(),
            ended: Notify::new(),
            max_bytes,
            max_messages,
            priority,
            counters,
            counts,
        })
    }

    /// Queues one message if there is room; `Ok(false)` when there is none.
    pub(crate) fn try_message<T: Serialize + ?Sized>(
        &self,
        event: &str,
        data: &T,
        id: Option<u64>,
        limit: usize,
    ) -> Result<bool, PushError> {
        self.with_room(|state| state.message(event, data, id, limit))
    }

    /// Queues one message, as soon as there is room.
    pub(crate) async fn message<T: Serialize + Sync + ?Sized>(
        &self,
        event: &str,
        data: &T,
        id: Option<u64>,
        limit: usize,
    ) -> Result<(), PushError> {
        self.when_room(|state| state.message(event, data, id, limit))
            .await
    }

    /// Queues one message, of data that is encoded already, as soon as there is room.
    pub(crate) async fn raw(
        &self,
        event: &str,
        data: &[u8],
        id: u64,
        limit: usize,
    ) -> Result<(), PushError> {
        if self.with_room(|state| state.raw(event, data, id, limit))? {
            return Ok(());
        }
        // Boxed, because the future of most needs no room for it.
        Box::pin(self.when_room(|state| state.raw(event, data, id, limit))).await
    }

    /// Takes a frame that was encoded before, if there is room; else it stays as it is.
    pub(crate) fn try_frame(&self, frame: &mut BytesMut, limit: usize) -> Result<bool, PushError> {
        check_size(frame.len(), limit).map_err(PushError::Encode)?;
        self.with_room(|state| {
            state.take_frame(frame);
            Ok(())
        })
    }

    /// Queues a bulk message as soon as there is room: header now, payload behind it, without a copy where it is large.
    pub(crate) async fn bulk<T: Serialize + Sync + ?Sized>(
        &self,
        event: &str,
        header: &T,
        key: &str,
        payload: &Bytes,
        limit: usize,
    ) -> Result<(), PushError> {
        self.when_room(|state| {
            let tail = &mut state.frames.tail;
            let size = message::encode_bulk(tail, event, header, key, payload.len(), limit)?;
            if payload.len() <= COPY_LIMIT {
                // Four times as much at once: to double it copies what is there more often.
                let room = tail.capacity() - tail.len();
                if room < payload.len() && tail.len() >= COPY_LIMIT {
                    tail.reserve((3 * tail.len()).min(TURN));
                }
                tail.extend_from_slice(payload);
                state.grew(size);
                return Ok(());
            }
            state.grew(size.saturating_sub(payload.len()));
            state.frames.cut_tail();
            state.queue(payload.len());
            state.frames.push(payload.clone(), 0);
            Ok(())
        })
        .await
    }

    /// Queues a frame that was encoded before, if there is room.
    pub(crate) fn try_encoded(&self, encoded: &Encoded, limit: usize) -> Result<bool, PushError> {
        check_size(encoded.len(), limit).map_err(PushError::Encode)?;
        self.with_room(|state| state.encoded(encoded))
    }

    /// Queues a frame that was encoded before, as soon as there is room.
    pub(crate) async fn encoded(&self, encoded: &Encoded, limit: usize) -> Result<(), PushError> {
        if self.try_encoded(encoded, limit)? {
            return Ok(());
        }
        // Boxed, because the future of most needs no room for it.
        Box::pin(self.when_room(|state| state.encoded(encoded))).await
    }

    /// Queues a message of a room; where there is no room, the policy says what becomes of it. Never waits. `direct`:
    /// where the queue is empty and the writer sleeps, it is written right here.
    pub(crate) fn push_room(
        &self,
        tag: &Arc<Tag>,
        frame: &Bytes,
        limit: usize,
        policy: Overflow,
        direct: bool,
    ) -> Push {
        let mut state = lock(&self.state);
        if state.check_open().is_err() {
            return Push::Over;
        }
        let paced = state.rooms.pace.is_some() && !tag.replaces;
        let unread = policy.unread().filter(|_| paced);
        if unread.is_none() {
            self.release(&mut state);
        }
        let fits = frame.len().saturating_sub(crate::wire::frame::PREFIX) <= limit;
        let push = if !fits {
            state.rooms.overflow.lose(tag, 1);
            Push::Lost
        } else if state.waiting.is_empty()
            && state.rooms.overflow.is_empty()
            && self.has_room(&state)
            && state.rooms.may_send(unread)
        {
            state.goes(unread);
            if direct && self.may_write(&state, frame.len()) && state.frames.tail.is_empty() {
                state.count(frame.len());
                if self.write_messages(&mut state, frame.clone(), 1) {
                    return Push::Queued { lost: 0 };
                }
            } else {
                state.append(frame);
            }
            self.wake(&mut state);
            return Push::Queued { lost: 0 };
        } else {
            state
                .rooms
                .overflow
                .push(tag, frame, policy, unread, self.max_bytes)
        };
        self.refill(&mut state);
        push
    }

    /// Tells the member that messages of a room were lost on their way here.
    pub(crate) fn lose_room(&self, tag: &Arc<Tag>, lost: u64) {
        let mut state = lock(&self.state);
        if state.check_open().is_ok() {
            state.rooms.overflow.lose(tag, lost);
            self.refill(&mut state);
        }
    }

    /// The peer tells how far its program has come with the messages of rooms, so that their policies may go by it.
    pub(crate) fn set_paced(&self) {
        lock(&self.state).rooms.pace.get_or_insert_default();
    }

    /// The peer's program has come to this mark, over a path with this round trip.
    pub(crate) fn passed(&self, mark: u64, round_trip: Duration) {
        let mut state = lock(&self.state);
        if let Some(pace) = &mut state.rooms.pace {
            pace.passed(mark, round_trip);
            self.refill(&mut state);
        }
    }

    /// Keeps `held` until this side of the channel ends; gives it back if that has happened.
    pub(crate) fn keep(&self, held: HeldUntilEnd) -> Result<(), HeldUntilEnd> {
        let mut state = lock(&self.state);
        if state.check_open().is_err() {
            return Err(held);
        }
        state.rooms.held = Some(held);
        Ok(())
    }

    /// Queues a frame of the protocol itself whatever the queue's length: replies and faults are bounded by
    /// the requests that were accepted, `$open` comes first.
    pub(crate) fn force(&self, frame: &Bytes) -> Result<(), PushError> {
        let mut state = lock(&self.state);
        state.check_open()?;
        state.append(frame);
        self.wake(&mut state);
        Ok(())
    }

    /// Whether there is room for one more message.
    fn has_room(&self, state: &State) -> bool {
        state.queued_bytes < self.max_bytes
            && state.queued_messages < self.max_messages
            && !state
                .keep
                .as_ref()
                .is_some_and(|keep| keep.budget.exhausted(state.queued_bytes))
    }

    fn with_room(
        &self,
        push: impl FnOnce(&mut State) -> Result<(), EncodeError>,
    ) -> Result<bool, PushError> {
        let mut state = lock(&self.state);
        state.check_open()?;
        self.release(&mut state);
        if !self.has_room(&state) || !state.rooms.overflow.is_empty() {
            return Ok(false);
        }
        push(&mut state).map_err(PushError::Encode)?;
        if !self.write_now(&mut state) {
            self.wake(&mut state);
        }
        Ok(true)
    }

    /// Writes the one small message in the queue to the sleeping writer's stream, if something was received from the
    /// peer since this was last done. `false`: what is left is the writer's.
    fn write_now(&self, state: &mut State) -> bool {
        let (_, received) = self.counters.totals();
        if received == state.received
            || state.frames.tail_messages != 1
            || !self.may_write(state, state.frames.tail.len())
        {
            return false;
        }
        state.received = received;
        state.frames.tail_messages = 0;
        let message = std::mem::take(&mut state.frames.tail).freeze();
        self.write_messages(state, message, 1)
    }

    /// Whether a message of `size` bytes, with nothing before it but what stands in the tail, may be written by its
    /// sender: the writer sleeps.
    fn may_write(&self, state: &State, size: usize) -> bool {
        state.stream_at_rest.is_some()
            && self.priority != Priority::Bulk
            && size <= COPY_LIMIT
            && state.frames.segments.is_empty()
    }

    /// Writes messages, mostly one, which are counted already and stand nowhere, to the stream of the sleeping writer.
    /// `false`: what is left of them is queued, for the writer.
    fn write_messages(&self, state: &mut State, message: Bytes, messages: usize) -> bool {
        let Some(stream) = &mut state.stream_at_rest else {
            state.frames.push(message, messages);
            return false;
        };
        let copy = state.keep.is_some().then(|| message.clone());
        let mut chunk = [message];
        // No room and errors are left to the writer, which finds them again and has a waker.
        let mut cx = Context::from_waker(Waker::noop());
        let written = match stream.poll_write(&mut cx, &mut chunk) {
            Poll::Ready(Ok(written)) => written.bytes,
            Poll::Ready(Err(_)) | Poll::Pending => 0,
        };
        // What was written is gone from it.
        let [bytes] = chunk;
        let whole = if bytes.is_empty() { messages } else { 0 };
        self.counters.sent(written as u64);
        self.counts.add(Count::MessagesSent, whole as u64);
        match (&mut state.keep, copy) {
            (Some(keep), Some(mut copy)) => {
                copy.truncate(written);
                if !copy.is_empty() {
                    keep.retained.push(copy);
                }
            }
            _ => {
                state.queued_bytes = state.queued_bytes.saturating_sub(written);
                state.queued_messages = state.queued_messages.saturating_sub(whole);
            }
        }
        if bytes.is_empty() {
            return true;
        }
        state.frames.push(bytes, messages);
        false
    }

    /// Pushes as soon as there is room and everything is queued that came before. Dropping the future gives its
    /// turn to those behind it.
    async fn when_room(
        &self,
        mut push: impl FnMut(&mut State) -> Result<(), EncodeError>,
    ) -> Result<(), PushError> {
        if self.with_room(&mut push)? {
            return Ok(());
        }
        let turn = Turn {
            number: lock(&self.state).join_line(),
            outbox: self,
        };
        // The writer looks after a peer that confirms nothing.
        self.work.notify_one();
        loop {
            let mut room = std::pin::pin!(self.room.notified());
            room.as_mut().enable();
            {
                let mut state = lock(&self.state);
                state.check_open()?;
                let first = state.rooms.overflow.first();
                if self.has_room(&state) && first.is_none_or(|first| turn.number < first) {
                    push(&mut state).map_err(PushError::Encode)?;
                    self.wake(&mut state);
                    return Ok(());
                }
            }
            room.await;
        }
    }

    /// Moves what waits beside the queue into it, as far as there is room and nobody has waited for longer;
    /// then it is their turn.
    fn refill(&self, state: &mut State) {
        let first_in_line = state.waiting.first().copied();
        while self.has_room(state)
            && let Some((first, unread)) = state.rooms.overflow.head()
            && first_in_line.is_none_or(|waiting| first < waiting)
        {
            // Who waits in line behind it is not to wait for the peer's program.
            if first_in_line.is_none() && !state.rooms.may_send(unread) {
                self.ask(state);
                break;
            }
            self.take_over(state);
        }
        self.catch_up(state);
        if !state.waiting.is_empty() && self.has_room(state) {
            self.room.notify_waiters();
        }
    }

    /// Lets what waits only until the peer has read what was before it go: something follows that shall neither wait
    /// nor overtake it.
    fn release(&self, state: &mut State) {
        if state.waiting.is_empty() {
            while !state.rooms.overflow.is_empty() && self.has_room(state) {
                self.take_over(state);
            }
        }
    }

    fn take_over(&self, state: &mut State) {
        if let Some(out) = state.rooms.overflow.pop() {
            state.goes(out.unread);
            state.append(&out.frame);
            self.wake(state);
        }
    }

    /// Messages wait until the peer has read others: it must tell when.
    fn ask(&self, state: &mut State) {
        if let Some(mark) = state.rooms.pace.as_mut().and_then(|pace| pace.blocked()) {
            state.mark(mark);
            self.wake(state);
        }
    }

    fn wake(&self, state: &mut State) {
        if state.idle {
            state.idle = false;
            self.work.notify_one();
        }
    }

    /// Bytes queued and not yet taken by QUIC.
    pub(crate) fn queued(&self) -> usize {
        lock(&self.state).queued_bytes
    }

    /// Lets what is queued go out, then `last`, then ends the stream. The first call counts.
    pub(crate) fn finish(&self, last: Option<Bytes>) {
        self.finish_with(last, None);
    }

    /// As [`finish`](Self::finish); later senders get the reason.
    pub(crate) fn finish_because(&self, reason: CloseReason) {
        self.finish_with(None, Some(reason));
    }

    fn finish_with(&self, last: Option<Bytes>, why: Option<CloseReason>) {
        let mut state = lock(&self.state);
        if matches!(state.phase, Phase::Open) {
            state.phase = Phase::Finishing(last);
            state.why = why;
            // What waits beside the queue is bounded: it goes along.
            while let Some(out) = state.rooms.overflow.pop() {
                state.append(&out.frame);
            }
            self.take_along(&mut state);
            self.wake(&mut state);
            self.room.notify_waiters();
            // Leaving the rooms takes their locks.
            let held = state.rooms.held.take();
            drop(state);
            drop(held);
        }
    }

    /// Waits until the writer has ended: `Ok` when the peer's transport acknowledged every byte.
    pub(crate) async fn wait_ended(&self) -> Result<(), CloseReason> {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            ended.as_mut().enable();
            if let Phase::Ended(result) = &lock(&self.state).phase {
                return result.clone();
            }
            ended.await;
        }
    }

    /// Whether the writer has ended with everything acknowledged.
    pub(crate) fn is_ended(&self) -> bool {
        matches!(lock(&self.state).phase, Phase::Ended(Ok(())))
    }

    /// Whether the queue is over, however.
    pub(crate) fn is_over(&self) -> bool {
        matches!(lock(&self.state).phase, Phase::Ended(_))
    }

    /// Ends the queue, unless it has ended.
    pub(crate) fn end(&self, result: Result<(), CloseReason>) {
        let mut state = lock(&self.state);
        if matches!(state.phase, Phase::Ended(_)) {
            return;
        }
        state.frames = Frames::default();
        let queued = state.queued_bytes;
        state.unqueue(queued);
        state.queued_messages = 0;
        state.left = match (&state.keep, &result) {
            (Some(keep), Err(_)) => keep.unconfirmed(),
            _ => 0,
        };
        state.keep = None;
        let rooms = std::mem::take(&mut state.rooms);
        state.phase = Phase::Ended(result);
        let stream_at_rest = state.stream_at_rest.take();
        drop(state);
        drop((stream_at_rest, rooms));
        self.room.notify_waiters();
        self.ended.notify_waiters();
        self.work.notify_one();
    }

    /// The peer has the frames up to number `received`; one more than there are is the end.
    pub(crate) fn confirm(&self, received: u64) -> Result<(), Mismatch> {
        let mut state = lock(&self.state);
        let all = state.confirm(received)?;
        self.refill(&mut state);
        // The writer may wait for exactly that.
        self.work.notify_one();
        drop(state);
        if all {
            self.end(Ok(()));
        }
        Ok(())
    }

    /// The peer takes nothing more. While there is something to write, its stream tells so by itself.
    pub(crate) fn refused(&self) {
        lock(&self.state).refused = true;
        self.work.notify_one();
    }

    pub(crate) fn is_refused(&self) -> bool {
        lock(&self.state).refused
    }

    /// Prepares the queue for another stream: what the peer has not received stands first in it again. Returns
    /// the number that the stream's writer must have, and whether the peer has received everything, the end
    /// included; writers of earlier streams stop.
    pub(crate) fn rewind(&self, received: u64) -> Result<(u64, bool), Mismatch> {
        let mut state = lock(&self.state);
        state.epoch += 1;
        // Dropping it ends it, as its writer would.
        state.stream_at_rest = None;
        if let Some(keep) = &state.keep
            && received < keep.retained.confirmed()
        {
            // What it lacks by its own count is gone.
            return Err(Mismatch);
        }
        let all = state.confirm(received)?;
        if let Some(keep) = &mut state.keep {
            let again = keep.retained.take();
            for bytes in again.into_iter().rev() {
                let messages = 0;
                state
                    .frames
                    .segments
                    .push_front(Segment { bytes, messages });
            }
        }
        state.idle = false;
        if matches!(state.phase, Phase::Open)
            && let Some(mark) = state.rooms.pace.as_mut().and_then(|pace| pace.renew())
        {
            state.mark(mark);
        }
        self.refill(&mut state);
        self.room.notify_waiters();
        self.work.notify_one();
        Ok((state.epoch, all))
    }

    /// Keeps nothing any more: the session ends with its connection, whatever becomes of it.
    pub(crate) fn forget(&self) {
        let mut state = lock(&self.state);
        if state.keep.is_some() {
            let (bytes, messages) = state.frames.size();
            let kept = state.queued_bytes.saturating_sub(bytes);
            state.unqueue(kept);
            state.queued_messages = messages;
            state.keep = None;
            self.refill(&mut state);
            self.room.notify_waiters();
            self.work.notify_one();
        }
    }

    /// Whether the queue keeps what it has written.
    pub(crate) fn keeps(&self) -> bool {
        lock(&self.state).keep.is_some()
    }

    /// Messages that the peer has not confirmed, sent or not; 0 where nothing was kept.
    pub(crate) fn unconfirmed(&self) -> u64 {
        let state = lock(&self.state);
        state.keep.as_ref().map_or(state.left, Keep::unconfirmed)
    }

    /// How far the peer has confirmed, when something waits for it to go on.
    pub(crate) fn stuck_at(&self) -> Option<u64> {
        let state = lock(&self.state);
        let keep = state.keep.as_ref()?;
        let waits = !state.waiting.is_empty()
            || !state.rooms.overflow.is_empty()
            || state.rooms.streams.iter().any(|stream| stream.behind);
        (waits && !self.has_room(&state)).then(|| keep.retained.confirmed())
    }

    /// Bytes of what is queued, and of what is kept until the peer confirms it.
    pub(crate) fn unconfirmed_bytes(&self) -> u64 {
        lock(&self.state).queued_bytes as u64
    }

    /// The stream of this epoch, while its writer sleeps.
    pub(crate) fn take_back(&self, epoch: u64) -> Option<SendStream> {
        let mut state = lock(&self.state);
        (state.epoch == epoch)
            .then(|| state.stream_at_rest.take())
            .flatten()
    }

    /// What the writer of this epoch must do next. While it sleeps, senders may use its stream.
    pub(crate) fn take(
        &self,
        epoch: u64,
        stream: &mut Option<SendStream>,
        batch: &mut Vec<Bytes>,
    ) -> Work {
        let mut state = lock(&self.state);
        if state.epoch != epoch || matches!(state.phase, Phase::Ended(_)) {
            return Work::Gone;
        }
        if stream.is_none() {
            *stream = state.stream_at_rest.take();
        }
        let (mut bytes, mut messages) = (0, 0);
        while batch.len() < BATCH {
            let Some(segment) = state.frames.piece() else {
                break;
            };
            bytes += segment.bytes.len();
            messages += segment.messages;
            batch.push(segment.bytes);
        }
        if !batch.is_empty() {
            if let Some(keep) = &mut state.keep {
                for bytes in batch.iter() {
                    keep.retained.push(bytes.clone());
                }
            }
            return Work::Batch {
                bytes,
                messages,
                gaps: state.rooms.overflow.take_gaps(),
            };
        }
        // A quiet channel keeps no buffer.
        state.frames.tail = BytesMut::new();
        match &mut state.phase {
            Phase::Finishing(last) => {
                let last = last.take();
                if let (Some(keep), Some(last)) = (&mut state.keep, &last) {
                    keep.retained.push(last.clone());
                    keep.frames += 1;
                }
                Work::Finish(last)
            }
            Phase::Open | Phase::Ended(_) => {
                state.idle = true;
                state.stream_at_rest = stream.take();
                Work::Idle
            }
        }
    }

    pub(crate) fn written(&self, bytes: usize, messages: usize) {
        let mut state = lock(&self.state);
        if state.keep.is_some() {
            return;
        }
        state.queued_bytes = state.queued_bytes.saturating_sub(bytes);
        state.queued_messages = state.queued_messages.saturating_sub(messages);
        self.refill(&mut state);
    }
}

impl State {
    fn check_open(&self) -> Result<(), PushError> {
        match &self.phase {
            Phase::Open => Ok(()),
            Phase::Finishing(_) | Phase::Ended(Ok(())) => Err(match &self.why {
                Some(reason) => PushError::Ended(reason.clone()),
                None => PushError::Finished,
            }),
            Phase::Ended(Err(reason)) => Err(PushError::Ended(reason.clone())),
        }
    }

    fn confirm(&mut self, received: u64) -> Result<bool, Mismatch> {
        let finished = matches!(self.phase, Phase::Finishing(None));
        let Some(keep) = &mut self.keep else {
            return Ok(false);
        };
        let all = finished && received == keep.frames + 1;
        let before = keep.retained.confirmed();
        let bytes = keep.retained.confirm(received - u64::from(all))?;
        let messages = keep.retained.confirmed() - before;
        self.unqueue(bytes);
        self.queued_messages = self
            .queued_messages
            .saturating_sub(usize::try_from(messages).unwrap_or(usize::MAX));
        Ok(all)
    }

    fn queue(&mut self, bytes: usize) {
        self.queued_bytes += bytes;
        if let Some(keep) = &self.keep {
            keep.budget.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    fn unqueue(&mut self, bytes: usize) {
        // The last frame of a channel is kept without having been counted.
        let bytes = bytes.min(self.queued_bytes);
        self.queued_bytes -= bytes;
        if let Some(keep) = &self.keep {
            keep.budget.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    fn count(&mut self, size: usize) {
        self.queue(size);
        self.queued_messages += 1;
        if let Some(keep) = &mut self.keep {
            keep.frames += 1;
        }
    }

    /// One message of a room goes now, behind a mark if it is time for one.
    fn goes(&mut self, unread: Option<u64>) {
        if let Some(mark) = self.rooms.goes(unread) {
            self.mark(mark);
        }
    }

    fn mark(&mut self, mark: u64) {
        // A number can always be encoded.
        let _ = self.message(ProtocolEvent::Mark.name(), &mark, None, usize::MAX >> 1);
    }

    /// A place behind everything that waits now.
    fn join_line(&mut self) -> u64 {
        let number = self.rooms.overflow.number();
        self.waiting.insert(number);
        number
    }

    fn message<T: Serialize + ?Sized>(
        &mut self,
        event: &str,
        data: &T,
        id: Option<u64>,
        limit: usize,
    ) -> Result<(), EncodeError> {
        let size = message::encode(&mut self.frames.tail, event, data, id, limit)?;
        self.grew(size);
        Ok(())
    }

    fn raw(&mut self, event: &str, data: &[u8], id: u64, limit: usize) -> Result<(), EncodeError> {
        let size = message::append_raw(&mut self.frames.tail, event, data, id, limit)?;
        self.grew(size);
        Ok(())
    }

    fn encoded(&mut self, encoded: &Encoded) -> Result<(), EncodeError> {
        self.append(encoded.bytes());
        Ok(())
    }

    /// One more message of `size` bytes stands in the tail.
    fn grew(&mut self, size: usize) {
        self.count(size);
        self.frames.grew();
    }

    fn copy(&mut self, frame: &[u8]) {
        self.frames.tail.extend_from_slice(frame);
        self.grew(frame.len());
    }

    /// Its memory is the tail's where that has none: a quiet channel's.
    fn take_frame(&mut self, frame: &mut BytesMut) {
        if self.frames.tail.capacity() > 0 {
            return self.copy(frame);
        }
        let size = frame.len();
        self.frames.tail = std::mem::take(frame);
        self.grew(size);
    }

    fn append(&mut self, bytes: &Bytes) {
        if bytes.len() <= COPY_LIMIT {
            self.copy(bytes);
        } else {
            self.frames.cut_tail();
            self.count(bytes.len());
            self.frames.push(bytes.clone(), 1);
        }
    }
}

fn check_size(frame: usize, limit: usize) -> Result<(), EncodeError> {
    match frame.saturating_sub(crate::wire::frame::PREFIX) {
        size if size > limit => Err(EncodeError::TooLarge { size, limit }),
        _ => Ok(()),
    }
}

/// A place in the line for room, given up on drop.
struct Turn<'a> {
    number: u64,
    outbox: &'a Outbox,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.outbox.state);
        state.waiting.remove(&self.number);
        self.outbox.refill(&mut state);
    }
}
