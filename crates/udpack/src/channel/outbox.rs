//! The sending half of a channel: a bounded queue of frames and the one task that writes them.
//!
//! A message is encoded straight into the queue, so it is either queued whole or not at all, whatever happens to the
//! future that queued it. The writer takes all queued frames and hands them to QUIC in one call: many small messages
//! share packets without any timer. Two kinds of messages are written by their sender, which saves a wake-up of the
//! writer: an answer or request that follows something received from the peer, and a message to an idle room, where
//! it saves one wake-up for each member.
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

/// A value that is dropped when the sending side of a channel ends.
type HeldUntilEnd = Box<dyn Any + Send>;

/// Small messages are collected in one buffer up to about this size in bytes. It is large because QUIC searches all
/// unacknowledged buffers for each packet, and smaller than a turn, because a turn would cut a larger buffer in two.
const SEGMENT: usize = TURN - COPY_LIMIT;
/// Buffers handed to QUIC in one call.
pub(crate) const BATCH: usize = 16;
/// Bytes that one channel writes before the other channels of its connection get their turn.
pub(crate) const TURN: usize = 64 << 10;
/// Bytes that each resumable channel may keep even when the session's budget is exhausted.
const SHARE: usize = 64 << 10;
/// Encoded bytes up to this size are copied into the collecting buffer; larger ones are written without a copy.
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
    /// The numbers of the senders that wait for room. They share one sequence with the rooms' messages, so that no
    /// message that came later overtakes them.
    waiting: BTreeSet<u64>,
    rooms: Membership,
    /// Whether the writer sleeps and must be woken.
    idle: bool,
    /// The writer's stream while it sleeps, of the current epoch.
    stream_at_rest: Option<SendStream>,
    /// Bytes received from the peer when a sender last wrote to the stream.
    received: u64,
    phase: Phase,
    /// Why the queue accepts nothing more, if the application did not ask for it.
    why: Option<CloseReason>,
    /// The frames that a resumable channel keeps for repeating.
    keep: Option<Keep>,
    /// How many messages were unconfirmed when the queue ended without an orderly end.
    left: u64,
    /// The peer takes nothing more.
    refused: bool,
    /// The number of the stream that the queue is written to; a writer of an earlier stream stops.
    epoch: u64,
}

/// The state of the channel as a member of rooms.
#[derive(Debug, Default)]
struct Membership {
    /// Messages that found no room in the queue, or that wait until the peer has read the messages before them.
    overflow: Overflowing,
    /// How far the peer's program is behind, if the peer reports it.
    pace: Option<Box<Pace>>,
    /// Those with a history.
    streams: Vec<Stream>,
    /// How far it came in those that it has left: the room's number and an offset, the latest last.
    left: Vec<(u64, u64)>,
    /// The channel's membership, which ends with the channel.
    held: Option<HeldUntilEnd>,
}

impl Membership {
    /// Whether one more message may be sent; always true if the policy does not limit unread messages.
    fn may_send(&self, unread: Option<u64>) -> bool {
        match (&self.pace, unread) {
            (Some(pace), Some(unread)) => pace.may_send(unread),
            _ => true,
        }
    }

    /// Records that one message is sent; returns the mark to send before it, if one is due.
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

/// The bytes that all resumable channels of one session keep, and their limit.
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

    /// Whether a channel that keeps `own` bytes must wait. While there is a connection each channel may keep
    /// [`SHARE`] bytes, so that stuck channels do not stop the others.
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

/// The frames to be written, in order.
#[derive(Debug, Default)]
struct Frames {
    segments: VecDeque<Segment>,
    /// The buffer that collects small frames; it follows the segments.
    tail: BytesMut,
    tail_messages: usize,
}

impl Frames {
    /// Records one more message in the tail.
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

    /// The next bytes to write, at most one turn.
    fn piece(&mut self) -> Option<Segment> {
        if self.segments.is_empty() {
            self.cut_tail();
        }
        let mut segment = self.segments.pop_front()?;
        if segment.bytes.len() > TURN {
            let bytes = segment.bytes.split_off(TURN);
            // The messages of a segment count as sent with its last piece.
            let messages = std::mem::take(&mut segment.messages);
            self.segments.push_front(Segment { bytes, messages });
        }
        Some(segment)
    }

    /// The number of bytes and of messages.
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
    /// The queue has ended; `Ok` when the peer's transport acknowledged everything.
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
    /// The queue is written to another stream, or has ended.
    Gone,
}

impl Outbox {
    /// A queue with these bounds. With a budget it keeps frames until they are confirmed.
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

    /// Queues one message if there is room; returns `Ok(false)` if there is none.
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

    /// Queues an encoded frame if there is room; otherwise leaves it in `frame`.
    pub(crate) fn try_frame(&self, frame: &mut BytesMut, limit: usize) -> Result<bool, PushError> {
        check_size(frame.len(), limit).map_err(PushError::Encode)?;
        self.with_room(|state| {
            state.take_frame(frame);
            Ok(())
        })
    }

    /// Queues a bulk message as soon as there is room: the header, then the payload, which is not copied if it is
    /// large.
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
                // Grow by a factor of four: doubling would copy the content more often.
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

    /// Queues a message of a room; if there is no room, the policy decides. Never waits. `direct`: the message is
    /// written here if the queue is empty and the writer sleeps.
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

    /// The peer reports how far its program has read the messages of rooms, so policies can count unread messages.
    pub(crate) fn set_paced(&self) {
        lock(&self.state).rooms.pace.get_or_insert_default();
    }

    /// The peer's program has reached this mark; `round_trip` is that of the path.
    pub(crate) fn passed(&self, mark: u64, round_trip: Duration) {
        let mut state = lock(&self.state);
        if let Some(pace) = &mut state.rooms.pace {
            pace.passed(mark, round_trip);
            self.refill(&mut state);
        }
    }

    /// Keeps `held` until this side of the channel ends; returns it if this side has already ended.
    pub(crate) fn keep(&self, held: HeldUntilEnd) -> Result<(), HeldUntilEnd> {
        let mut state = lock(&self.state);
        if state.check_open().is_err() {
            return Err(held);
        }
        state.rooms.held = Some(held);
        Ok(())
    }

    /// Queues a frame of the protocol without looking at the queue's bound: the accepted requests bound replies and
    /// faults, and `$open` is the first frame.
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

    /// Writes the one small message of the queue to the sleeping writer's stream, if something was received from the
    /// peer since the last such write. Returns `false` if the writer must write the rest.
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

    /// Whether the sender may write a message of `size` bytes itself: the writer sleeps, and the queue holds nothing
    /// before the tail.
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
        // A full window and errors are left to the writer, which meets them again and has a waker.
        let mut cx = Context::from_waker(Waker::noop());
        let written = match stream.poll_write(&mut cx, &mut chunk) {
            Poll::Ready(Ok(written)) => written.bytes,
            Poll::Ready(Err(_)) | Poll::Pending => 0,
        };
        // The written bytes have been removed from it.
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

    /// Pushes as soon as there is room and all earlier senders have pushed. Dropping the future passes its turn to
    /// the next sender.
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
        // The writer detects a peer that confirms nothing.
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

    /// Moves messages of rooms that wait beside the queue into it, while there is room and no sender has waited for
    /// longer; then wakes the waiting senders.
    fn refill(&self, state: &mut State) {
        let first_in_line = state.waiting.first().copied();
        while self.has_room(state)
            && let Some((first, unread)) = state.rooms.overflow.head()
            && first_in_line.is_none_or(|waiting| first < waiting)
        {
            // A sender that waits behind it must not wait for the peer's program.
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

    /// Queues the messages of rooms that wait only until the peer has read earlier ones, because a message follows
    /// that must neither wait nor overtake them.
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

    /// Asks the peer, by a mark, when its program has read the messages that others wait for.
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

    /// Bytes that are queued and not yet taken by QUIC.
    pub(crate) fn queued(&self) -> usize {
        lock(&self.state).queued_bytes
    }

    /// Sends the queue, then `last`, then ends the stream. Later calls have no effect.
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
            // The messages that wait beside the queue are bounded, so they are sent, too.
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

    /// Whether the queue has ended, for any reason.
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

    /// The peer has received the frames up to number `received`. The end of the direction counts as one more frame.
    pub(crate) fn confirm(&self, received: u64) -> Result<(), Mismatch> {
        let mut state = lock(&self.state);
        let all = state.confirm(received)?;
        self.refill(&mut state);
        // The writer may wait for this confirmation.
        self.work.notify_one();
        drop(state);
        if all {
            self.end(Ok(()));
        }
        Ok(())
    }

    /// The peer accepts no more frames. While there is something to write, the stopped stream reports the same.
    pub(crate) fn refused(&self) {
        lock(&self.state).refused = true;
        self.work.notify_one();
    }

    pub(crate) fn is_refused(&self) -> bool {
        lock(&self.state).refused
    }

    /// Prepares the queue for another stream: puts the frames that the peer has not received back to its front.
    /// Returns the epoch for the stream's writer, and whether the peer has received everything, the end included.
    /// Writers of earlier streams stop.
    pub(crate) fn rewind(&self, received: u64) -> Result<(u64, bool), Mismatch> {
        let mut state = lock(&self.state);
        state.epoch += 1;
        // Dropping the stream ends it, as its writer would.
        state.stream_at_rest = None;
        if let Some(keep) = &state.keep
            && received < keep.retained.confirmed()
        {
            // The frames that the peer lacks were confirmed and are discarded.
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

    /// Discards the kept frames and keeps no more: the session ends with its connection.
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

    /// How many frames the peer has confirmed, if something waits for the next confirmation.
    pub(crate) fn stuck_at(&self) -> Option<u64> {
        let state = lock(&self.state);
        let keep = state.keep.as_ref()?;
        let waits = !state.waiting.is_empty()
            || !state.rooms.overflow.is_empty()
            || state.rooms.streams.iter().any(|stream| stream.behind);
        (waits && !self.has_room(&state)).then(|| keep.retained.confirmed())
    }

    /// Bytes that are queued, plus bytes that are kept until the peer confirms them.
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

    /// The next work for the writer of this epoch. While the writer sleeps, senders may use its stream.
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
        // An idle channel keeps no buffer.
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
        // The last frame of a channel is kept and was not counted.
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

    /// Sends one message of a room, after a mark if one is due.
    fn goes(&mut self, unread: Option<u64>) {
        if let Some(mark) = self.rooms.goes(unread) {
            self.mark(mark);
        }
    }

    fn mark(&mut self, mark: u64) {
        // A number can always be encoded.
        let _ = self.message(ProtocolEvent::Mark.name(), &mark, None, usize::MAX >> 1);
    }

    /// Draws a number behind all waiting senders and messages.
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

    /// Records one more message of `size` bytes in the tail.
    fn grew(&mut self, size: usize) {
        self.count(size);
        self.frames.grew();
    }

    fn copy(&mut self, frame: &[u8]) {
        self.frames.tail.extend_from_slice(frame);
        self.grew(frame.len());
    }

    /// Appends the frame to the tail. An empty tail takes over the frame's memory.
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

/// A sender's place in the line for room; dropping it leaves the line.
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
