//! The sending half of a channel: a bounded queue of frames and the one task that writes them.
//!
//! A message is encoded straight into the queue, so it is either queued whole or not at all, whatever
//! happens to the future that queued it. The writer takes what has gathered and hands it to QUIC in one go:
//! many small sends share packets without any timer.
//!
//! The queue of a resumable channel keeps what was written until the peer has confirmed it, counts it against
//! the same bounds, and repeats it on the channel's next stream. Its writer ends with each connection.

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use tokio::sync::Notify;

use crate::code::{CloseCode, CloseReason};
use crate::config::Priority;
use crate::message::{self, EncodeError, Encoded};
use crate::metrics::Count;
use crate::overflow::{Overflow, Overflowing, Push, Tag};
use crate::resume::{Mismatch, Retained};
use crate::rooms::Seat;
use crate::session::{Session, lock, lost};
use crate::speed::Counters;

/// Small messages gather up to about this size before a new buffer is begun.
const SEGMENT: usize = 32 << 10;
/// Buffers handed to QUIC in one call.
const BATCH: usize = 16;
/// Bytes that one channel hands over before the others of its connection get their turn.
const TURN: usize = 64 << 10;
/// Ready-made bytes up to this size are copied into the gathering buffer; larger ones go as they are.
const COPY_LIMIT: usize = 4 << 10;

#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    /// The writer has something to do.
    work: Notify,
    /// The queue has shrunk.
    room: Notify,
    /// The writer has ended.
    ended: Notify,
    max_bytes: usize,
    max_messages: usize,
    priority: Priority,
}

#[derive(Debug)]
struct State {
    segments: VecDeque<Segment>,
    tail: BytesMut,
    tail_messages: usize,
    queued_bytes: usize,
    queued_messages: usize,
    /// Numbers of those who wait for room, drawn from `overflow`: nothing that came to it later goes before them.
    waiting: BTreeSet<u64>,
    /// Messages of rooms that found no room here.
    overflow: Overflowing,
    /// The channel's place in its rooms, given up with the channel.
    seat: Option<Seat>,
    /// The writer sleeps and wants to be woken.
    idle: bool,
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

/// What all resumable channels of one session keep, and how much that may be while there is no connection.
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

    fn exhausted(&self) -> bool {
        self.detached.load(Ordering::Relaxed) && self.bytes.load(Ordering::Relaxed) >= self.limit
    }
}

#[derive(Debug)]
struct Segment {
    bytes: Bytes,
    messages: usize,
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

enum Work {
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

/// How a writer ended.
pub(crate) enum Written {
    /// With the channel.
    Ended(Result<(), CloseReason>),
    /// With the connection; the channel may go on over another.
    Detached,
}

impl Outbox {
    /// A queue with these bounds; with a budget it keeps what is not confirmed.
    pub(crate) fn new(
        max_bytes: usize,
        max_messages: usize,
        priority: Priority,
        budget: Option<Arc<Budget>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                segments: VecDeque::new(),
                tail: BytesMut::new(),
                tail_messages: 0,
                queued_bytes: 0,
                queued_messages: 0,
                waiting: BTreeSet::new(),
                overflow: Overflowing::default(),
                seat: None,
                idle: false,
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

    /// Queues a bulk message as soon as there is room: header now, payload behind it without a copy.
    pub(crate) async fn bulk<T: Serialize + Sync + ?Sized>(
        &self,
        event: &str,
        header: &T,
        key: &str,
        payload: &Bytes,
        limit: usize,
    ) -> Result<(), PushError> {
        self.when_room(|state| {
            let size =
                message::encode_bulk(&mut state.tail, event, header, key, payload.len(), limit)?;
            state.grew(size.saturating_sub(payload.len()));
            state.cut_tail();
            state.queue(payload.len());
            state.segments.push_back(Segment {
                bytes: payload.clone(),
                messages: 0,
            });
            Ok(())
        })
        .await
    }

    /// Queues a frame that was encoded before, if there is room.
    pub(crate) fn try_encoded(&self, encoded: &Encoded, limit: usize) -> Result<bool, PushError> {
        check_size(encoded, limit).map_err(PushError::Encode)?;
        self.with_room(|state| state.encoded(encoded))
    }

    /// Queues a frame that was encoded before, as soon as there is room.
    pub(crate) async fn encoded(&self, encoded: &Encoded, limit: usize) -> Result<(), PushError> {
        check_size(encoded, limit).map_err(PushError::Encode)?;
        self.when_room(|state| state.encoded(encoded)).await
    }

    /// Queues a message of a room; where there is no room, the policy says what becomes of it. Never waits.
    pub(crate) fn push_room(
        &self,
        tag: &Arc<Tag>,
        frame: &Bytes,
        limit: usize,
        policy: Overflow,
    ) -> Push {
        let mut state = lock(&self.state);
        if state.check_open().is_err() {
            return Push::Over;
        }
        let fits = frame.len().saturating_sub(crate::frame::PREFIX) <= limit;
        let push = if !fits {
            state.overflow.lose(tag);
            Push::Lost
        } else if state.waiting.is_empty()
            && state.overflow.first().is_none()
            && self.has_room(&state)
        {
            state.append(frame);
            self.wake(&mut state);
            return Push::Queued { lost: 0 };
        } else {
            state.overflow.push(tag, frame, policy, self.max_bytes)
        };
        self.refill(&mut state);
        push
    }

    /// Keeps `seat` until this side of the channel ends; gives it back if that has happened.
    pub(crate) fn keep(&self, seat: Seat) -> Result<(), Seat> {
        let mut state = lock(&self.state);
        if state.check_open().is_err() {
            return Err(seat);
        }
        state.seat = Some(seat);
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
                .is_some_and(|keep| keep.budget.exhausted())
    }

    fn with_room(
        &self,
        push: impl FnOnce(&mut State) -> Result<(), EncodeError>,
    ) -> Result<bool, PushError> {
        let mut state = lock(&self.state);
        state.check_open()?;
        if !self.has_room(&state) || state.overflow.first().is_some() {
            return Ok(false);
        }
        push(&mut state).map_err(PushError::Encode)?;
        self.wake(&mut state);
        Ok(true)
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
                let first = state.overflow.first();
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
            && let Some(first) = state.overflow.first()
            && first_in_line.is_none_or(|waiting| first < waiting)
            && let Some(frame) = state.overflow.pop()
        {
            state.append(&frame);
            self.wake(state);
        }
        if !state.waiting.is_empty() && self.has_room(state) {
            self.room.notify_waiters();
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

    /// As [`finish`](Self::finish); who still wants to send is told why.
    pub(crate) fn finish_because(&self, reason: CloseReason) {
        self.finish_with(None, Some(reason));
    }

    fn finish_with(&self, last: Option<Bytes>, why: Option<CloseReason>) {
        let mut state = lock(&self.state);
        if matches!(state.phase, Phase::Open) {
            state.phase = Phase::Finishing(last);
            state.why = why;
            // What waits beside the queue is bounded: it goes along.
            while let Some(frame) = state.overflow.pop() {
                state.append(&frame);
            }
            self.wake(&mut state);
            self.room.notify_waiters();
            // Leaving the rooms takes their locks.
            let seat = state.seat.take();
            drop(state);
            drop(seat);
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
        state.segments = VecDeque::new();
        state.tail = BytesMut::new();
        let queued = state.queued_bytes;
        state.unqueue(queued);
        state.queued_messages = 0;
        state.left = match (&state.keep, &result) {
            (Some(keep), Err(_)) => keep.unconfirmed(),
            _ => 0,
        };
        state.keep = None;
        state.overflow = Overflowing::default();
        state.phase = Phase::Ended(result);
        let seat = state.seat.take();
        drop(state);
        drop(seat);
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

    fn is_refused(&self) -> bool {
        lock(&self.state).refused
    }

    /// Prepares the queue for another stream: what the peer has not received stands first in it again. Returns
    /// the number that the stream's writer must have, and whether the peer has received everything, the end
    /// included; writers of earlier streams stop.
    pub(crate) fn rewind(&self, received: u64) -> Result<(u64, bool), Mismatch> {
        let mut state = lock(&self.state);
        state.epoch += 1;
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
                state.segments.push_front(Segment { bytes, messages: 0 });
            }
        }
        state.idle = false;
        self.refill(&mut state);
        self.room.notify_waiters();
        self.work.notify_one();
        Ok((state.epoch, all))
    }

    /// Keeps nothing any more: the session ends with its connection, whatever becomes of it.
    pub(crate) fn forget(&self) {
        let mut state = lock(&self.state);
        if state.keep.is_some() {
            let unsent = state
                .segments
                .iter()
                .map(|segment| segment.bytes.len())
                .sum::<usize>()
                + state.tail.len();
            let kept = state.queued_bytes.saturating_sub(unsent);
            state.unqueue(kept);
            state.queued_messages = state
                .segments
                .iter()
                .map(|segment| segment.messages)
                .sum::<usize>()
                + state.tail_messages;
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
    fn stuck_at(&self) -> Option<u64> {
        let state = lock(&self.state);
        let keep = state.keep.as_ref()?;
        let waits = !state.waiting.is_empty() || state.overflow.first().is_some();
        (waits && !self.has_room(&state)).then(|| keep.retained.confirmed())
    }

    fn take(&self, epoch: u64, batch: &mut Vec<Bytes>) -> Work {
        let mut state = lock(&self.state);
        if state.epoch != epoch || matches!(state.phase, Phase::Ended(_)) {
            return Work::Gone;
        }
        let (mut bytes, mut messages) = (0, 0);
        while batch.len() < BATCH {
            if state.segments.is_empty() {
                state.cut_tail();
            }
            let Some(mut segment) = state.segments.pop_front() else {
                break;
            };
            if segment.bytes.len() > TURN {
                let rest = segment.bytes.split_off(TURN);
                // The messages in it count as sent with its last piece.
                let messages = std::mem::take(&mut segment.messages);
                state.segments.push_front(Segment {
                    bytes: rest,
                    messages,
                });
            }
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
                gaps: state.overflow.take_gaps(),
            };
        }
        // A quiet channel keeps no buffer.
        state.tail = BytesMut::new();
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
                Work::Idle
            }
        }
    }

    fn written(&self, bytes: usize, messages: usize) {
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

    /// A place behind everything that waits now.
    fn join_line(&mut self) -> u64 {
        let number = self.overflow.number();
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
        let size = message::encode(&mut self.tail, event, data, id, limit)?;
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
        self.tail_messages += 1;
        if self.tail.len() >= SEGMENT {
            self.cut_tail();
        }
    }

    fn append(&mut self, bytes: &Bytes) {
        if bytes.len() <= COPY_LIMIT {
            self.tail.extend_from_slice(bytes);
            self.grew(bytes.len());
        } else {
            self.cut_tail();
            self.count(bytes.len());
            self.segments.push_back(Segment {
                bytes: bytes.clone(),
                messages: 1,
            });
        }
    }

    fn cut_tail(&mut self) {
        if !self.tail.is_empty() {
            let bytes = self.tail.split().freeze();
            self.segments.push_back(Segment {
                bytes,
                messages: self.tail_messages,
            });
            self.tail_messages = 0;
        }
    }
}

fn check_size(encoded: &Encoded, limit: usize) -> Result<(), EncodeError> {
    match encoded.len().saturating_sub(crate::frame::PREFIX) {
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

/// Where a writer writes to.
pub(crate) struct Way {
    pub(crate) conn: Arc<quinn::Connection>,
    pub(crate) stream: quinn::SendStream,
    /// See [`Outbox::rewind`]; 0 for a channel's first stream.
    pub(crate) epoch: u64,
    /// Goes out before the queue and is not part of it.
    pub(crate) first: Option<Bytes>,
}

/// Writes the queue to a stream until the channel is over or the connection is gone, and returns how it ended.
pub(crate) async fn write_loop(
    outbox: Arc<Outbox>,
    way: Way,
    session: Arc<Session>,
    counters: Arc<Counters>,
) -> Written {
    let conn = way.conn.clone();
    let result = match drive(&outbox, way, &session, &counters).await {
        Ok(true) => Ok(()),
        Ok(false) => return Written::Detached,
        Err(_) if outbox.keeps() && conn.close_reason().is_some() => return Written::Detached,
        Err(reason) => Err(reason),
    };
    outbox.end(result.clone());
    Written::Ended(result)
}

/// Writes until there is nothing left to write: `false` says that the queue goes elsewhere or was ended.
async fn drive(
    outbox: &Outbox,
    way: Way,
    session: &Session,
    counters: &Counters,
) -> Result<bool, CloseReason> {
    let Way {
        conn,
        mut stream,
        epoch,
        first,
    } = way;
    let mut stopped = std::pin::pin!(stream.stopped());
    let mut batch = Vec::with_capacity(BATCH);
    let mut patience = Patience::default();
    if let Some(first) = first {
        batch.push(first);
        write(&mut stream, &mut batch, session, counters, outbox.priority).await?;
        batch.clear();
    }
    loop {
        match outbox.take(epoch, &mut batch) {
            Work::Batch {
                bytes,
                messages,
                gaps,
            } => {
                write(&mut stream, &mut batch, session, counters, outbox.priority).await?;
                session.tally.add(Count::MessagesSent, messages as u64);
                if gaps > 0 {
                    session.tally.add(Count::Gaps, gaps);
                }
                outbox.written(bytes, messages);
                batch.clear();
            }
            Work::Idle => {
                let watched = patience.watch(outbox, &conn);
                tokio::select! {
                    () = outbox.work.notified() => {}
                    end = &mut stopped => return Err(stop_reason(session, end)),
                    () = tokio::time::sleep(session.timeouts.slow_peer / 2), if watched => {
                        if patience.is_over(outbox, &conn) {
                            return Err(slow_peer(&mut stream, session));
                        }
                    }
                }
            }
            Work::Finish(last) => {
                if let Some(last) = last {
                    batch.push(last);
                    write(&mut stream, &mut batch, session, counters, outbox.priority).await?;
                }
                // Fails only when the peer has stopped the stream, which `stopped` then reports.
                let _ = stream.finish();
                match stopped.await {
                    Ok(None) => {}
                    end => return Err(stop_reason(session, end)),
                }
                return confirmed(outbox, &conn, session).await.map(|()| true);
            }
            Work::Gone => {
                let _ = stream.finish();
                return Ok(false);
            }
        }
    }
}

/// How long a peer that is alive has confirmed nothing while somebody waits for it to.
#[derive(Default)]
struct Patience {
    /// What was confirmed, and how much heard, when the period began.
    begun: Option<(u64, u64)>,
    /// Half periods that have passed since without a confirmation, although the peer was heard.
    strikes: u32,
}

impl Patience {
    fn watch(&mut self, outbox: &Outbox, conn: &quinn::Connection) -> bool {
        let stuck = outbox.stuck_at();
        if stuck.is_none() || stuck != self.begun.map(|(at, _)| at) {
            self.strikes = 0;
            self.begun = stuck.map(|at| (at, conn.stats().udp_rx.datagrams));
        }
        stuck.is_some()
    }

    /// Called when half a period has passed. Two are needed, so that a path that just came back is not taken
    /// for a peer that was there all the time.
    fn is_over(&mut self, outbox: &Outbox, conn: &quinn::Connection) -> bool {
        let heard = conn.stats().udp_rx.datagrams;
        if let (Some((at, before)), Some(now)) = (self.begun, outbox.stuck_at())
            && at == now
            && heard != before
        {
            self.begun = Some((at, heard));
            self.strikes += 1;
        } else {
            self.strikes = 0;
        }
        self.strikes >= 2
    }
}

/// The peer's transport has everything. Where what is written is kept, its program must have it too.
async fn confirmed(
    outbox: &Outbox,
    conn: &quinn::Connection,
    session: &Session,
) -> Result<(), CloseReason> {
    let lost = conn.closed();
    let mut lost = std::pin::pin!(lost);
    while outbox.keeps() {
        if outbox.is_refused() {
            return Err(stopped_by_peer(CloseCode::NORMAL.varint()));
        }
        tokio::select! {
            () = outbox.work.notified() => {}
            error = &mut lost => return Err(session.reason_for(&error)),
        }
    }
    Ok(())
}

async fn write(
    stream: &mut quinn::SendStream,
    batch: &mut [Bytes],
    session: &Session,
    counters: &Counters,
    priority: Priority,
) -> Result<(), CloseReason> {
    let mut rest = batch;
    while !rest.is_empty() {
        let mut turn = 0;
        let count = rest.iter().take_while(|bytes| {
            turn += bytes.len();
            turn <= TURN
        });
        let count = count.count().max(1);
        let (mut turn, later) = rest.split_at_mut(count);
        if priority == Priority::Bulk {
            bulk_room(session).await?;
            for bytes in &mut *turn {
                *bytes = session.turns.hold(std::mem::take(bytes));
            }
        }
        while !turn.is_empty() {
            let written = progress(stream, turn, session, priority).await?;
            counters.sent(written.bytes as u64);
            turn = &mut turn[written.chunks..];
            if session.live_channels() > 1 {
                tokio::task::yield_now().await;
            }
        }
        rest = later;
    }
    Ok(())
}

/// Waits until the bulk channels may have more under way, or the connection is over.
async fn bulk_room(session: &Session) -> Result<(), CloseReason> {
    let conn = session.conn();
    let window = conn.stats().path.cwnd;
    let room = session
        .turns
        .bulk_room(window, session.limits.send_window, TURN);
    tokio::select! {
        biased;
        () = room => Ok(()),
        error = conn.closed() => Err(session.reason_for(&error)),
    }
}

/// Writes some of `rest`. A peer that is alive but grants nothing for the slow-peer time loses the channel; a
/// silent path is the idle timer's business, and on a slow one each waits for its turn.
async fn progress(
    stream: &mut quinn::SendStream,
    rest: &mut [Bytes],
    session: &Session,
    priority: Priority,
) -> Result<quinn::Written, CloseReason> {
    let patience: Duration = session.timeouts.slow_peer;
    let (begun, _) = session.counters.totals();
    let mut before = begun;
    loop {
        let heard = session.conn().stats().udp_rx.datagrams;
        match tokio::time::timeout(patience, write_some(stream, rest, session, priority)).await {
            Ok(Ok(written)) => return Ok(written),
            Ok(Err(error)) => return Err(write_reason(session, error)),
            Err(_) if session.conn().stats().udp_rx.datagrams == heard => {}
            Err(_) if crowded(begun, before, session) => before = session.counters.totals().0,
            Err(_) => return Err(slow_peer(stream, session)),
        }
    }
}

fn slow_peer(stream: &mut quinn::SendStream, session: &Session) -> CloseReason {
    session.tally.one(Count::SlowPeers);
    let _ = stream.reset(CloseCode::SLOW_PEER.varint());
    let text = format!(
        "the peer took nothing off the channel for {:?}",
        session.timeouts.slow_peer
    );
    if let Some(left_out) = session.quiet.line() {
        tracing::warn!(left_out, "channel closed: {text}");
    }
    CloseReason::local(CloseCode::SLOW_PEER, text)
}

/// Whether a channel that waits has reason to wait on: the connection has sent `begun` bytes when it began to,
/// and `before` when it was last asked.
fn crowded(begun: u64, before: u64, session: &Session) -> bool {
    let (now, _) = session.counters.totals();
    slow_path(now - begun, now - before, session.live_channels())
}

/// Whether the bytes that all `channels` wrote while one of them waited, in all and of late, are too few to say
/// that it was passed over, but not none: then the path is slow, not the peer.
fn slow_path(in_all: u64, of_late: u64, channels: usize) -> bool {
    of_late > 0 && in_all / (channels.max(1) as u64) < TURN as u64
}

/// Writes as much as QUIC takes now, or waits for its turn.
async fn write_some(
    stream: &mut quinn::SendStream,
    rest: &mut [Bytes],
    session: &Session,
    priority: Priority,
) -> Result<quinn::Written, quinn::WriteError> {
    let mut waiting = None;
    let mut let_pass = None;
    std::future::poll_fn(|cx| {
        if waiting.is_some() {
            let left = let_pass.get_or_insert_with(|| session.turns.let_pass(priority));
            if *left > 0 {
                *left -= 1;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        // `write_chunks` is cancel safe: a future that is not ready has written nothing.
        let written = pin!(stream.write_chunks(rest)).poll(cx);
        if written.is_pending() {
            waiting.get_or_insert_with(|| session.turns.wait(priority));
            let_pass = None;
        }
        written
    })
    .await
}

fn write_reason(session: &Session, error: quinn::WriteError) -> CloseReason {
    match error {
        quinn::WriteError::Stopped(code) => stopped_by_peer(code),
        quinn::WriteError::ConnectionLost(error) => session.reason_for(&error),
        quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => {
            lost("the stream is closed")
        }
    }
}

fn stop_reason(
    session: &Session,
    end: Result<Option<quinn::VarInt>, quinn::StoppedError>,
) -> CloseReason {
    match end {
        Ok(Some(code)) => stopped_by_peer(code),
        Ok(None) => lost("the stream is closed"),
        Err(quinn::StoppedError::ConnectionLost(error)) => session.reason_for(&error),
        Err(quinn::StoppedError::ZeroRttRejected) => lost("early data was rejected"),
    }
}

fn stopped_by_peer(code: quinn::VarInt) -> CloseReason {
    CloseReason::peer(
        CloseCode::new(code.into_inner()),
        "the peer reads no more from this channel",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gets_as_little_as_all_others_is_not_passed_over() {
        let turn = TURN as u64;
        assert!(slow_path(1, 1, 1), "a trickle");
        assert!(slow_path(8 * turn - 1, 1, 8), "not everybody had a turn");
        assert!(!slow_path(8 * turn, turn, 8), "all others had one");
        assert!(
            !slow_path(turn, 0, 8),
            "nothing moves although the peer is alive"
        );
        assert!(!slow_path(turn, turn, 0));
    }
}
