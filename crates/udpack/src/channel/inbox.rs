//! The receiving half of a channel: decodes bytes from QUIC into messages. The task that waits for a message drives
//! it.
//!
//! There is no reader task: `recv` and `request` read through the same state, so unread bytes stay in QUIC's window
//! and slow the peer down. All progress (a half-received frame, messages that arrived while a reply was awaited)
//! lives here and not in any future, so dropping a future loses nothing.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, Sleep};

use crate::base::Lazy;
use crate::base::lock;
use crate::base::pool::{Place, PoolFull};
use crate::channel::calls::{Begun, Calls, Taken};
use crate::channel::carrier::{Carrier, ChannelKey, lost};
use crate::channel::places::Places;
use crate::metrics::Count;
use crate::metrics::speed::Counters;
use crate::transport::on_path;
use crate::transport::path_activity::PathActivity;
use crate::transport::{RecvStream, StreamError};
use crate::wire::code::{CloseCode, CloseReason};
use crate::wire::config::MIN_FRAME_RATE;
use crate::wire::control::{Ack, Mark, ProtocolEvent, ProtocolMessage, RoomPosition};
use crate::wire::frame::FrameDecoder;
use crate::wire::message::{Message, Parts};

/// The most QUIC chunks taken in one call.
const CHUNKS: usize = 32;
const FEW_CHUNKS: usize = 2;
/// The most messages that are added to the counters at once.
const COUNTED: u64 = 64;

pub(crate) struct Inbox {
    state: Mutex<State>,
    waiters: Arc<Waiters>,
}

struct State {
    /// `None` while a resumable channel has no connection.
    stream: Option<RecvStream>,
    /// The channel's key; `None` on a control stream.
    key: Option<ChannelKey>,
    resume: Option<Received>,
    decided: Lazy<Decided>,
    decoder: FrameDecoder,
    room: Lazy<Room>,
    unread: Unread,
    backlog: Backlog,
    /// Requests of both sides, with received replies and items.
    calls: Lazy<Calls>,
    /// How far the program has come in the rooms that it is a member of.
    places: Lazy<Places>,
    end: Option<Ending>,
    progress: Progress,
    /// A timer for the earliest deadline of the waiting requests; it may be set to an earlier time that no longer
    /// matters.
    alarm: Option<Pin<Box<Sleep>>>,
    /// How many messages are not added to `counts` yet.
    uncounted: u64,
    wake: WakeAll,
}

/// The tasks that wait on an inbox, and the waker that wakes all of them.
struct WakeAll {
    waiters: Arc<Waiters>,
    waker: Waker,
}

/// Chunks that were taken from QUIC and are not decoded yet.
#[derive(Default)]
struct Unread {
    chunks: VecDeque<Bytes>,
    /// QUIC had as many chunks as were asked for, so it may have more.
    more: bool,
}

/// Messages that arrived while a task waited for something else. They are returned before newly read ones.
#[derive(Default)]
struct Backlog {
    messages: VecDeque<Message>,
    bytes: usize,
}

impl Backlog {
    fn push(&mut self, message: Message) {
        self.bytes += message.len();
        self.messages.push_back(message);
    }

    fn pop(&mut self) -> Option<Message> {
        let message = self.messages.pop_front()?;
        self.bytes -= message.len();
        Some(message)
    }

    /// Removes the request with this id; returns whether it was here.
    fn remove(&mut self, id: u64) -> bool {
        let waits = |message: &Message| message.id() == Some(id);
        let at = self.messages.iter().position(waits);
        let message = at.and_then(|at| self.messages.remove(at));
        self.bytes -= message.as_ref().map_or(0, Message::len);
        message.is_some()
    }
}

/// Measures how fast an unfinished frame grows. Too little for too long is a fault of the peer.
#[derive(Default)]
struct Progress {
    timer: Option<Box<Timer>>,
    /// Bytes received in total, and that number when the timer was set.
    received: u64,
    mark: u64,
    /// Whether a frame was completed since the timer was last checked.
    completed: bool,
}

impl Progress {
    /// Ready when the frame has grown too little in one period.
    fn poll(&mut self, cx: &mut Context<'_>, carrier: &Carrier) -> Poll<()> {
        if std::mem::take(&mut self.completed) || self.timer.is_none() {
            self.mark = self.received;
            let conn = carrier.conn();
            let half = on_path(carrier.timeouts.frame, &conn) / 2;
            let activity = PathActivity::new(&conn);
            match &mut self.timer {
                Some(timer) => timer.restart(half, activity),
                None => self.timer = Some(Box::new(Timer::new(half, activity))),
            }
        }
        while let Some(timer) = &mut self.timer {
            if !std::task::ready!(timer.poll_period(cx, carrier)) {
                continue;
            }
            let least = MIN_FRAME_RATE.saturating_mul(carrier.timeouts.frame.as_secs().max(1));
            if self.received - self.mark < least {
                return Poll::Ready(());
            }
            self.mark = self.received;
        }
        Poll::Pending
    }
}

/// Times an unfinished frame in half periods.
struct Timer {
    sleep: Pin<Box<Sleep>>,
    half: Duration,
    activity: PathActivity,
    /// The number of counted halves in a row.
    halves: u32,
}

impl Timer {
    fn new(half: Duration, activity: PathActivity) -> Self {
        Self {
            sleep: Box::pin(tokio::time::sleep(half)),
            half,
            activity,
            halves: 0,
        }
    }

    fn restart(&mut self, half: Duration, activity: PathActivity) {
        (self.half, self.activity, self.halves) = (half, activity, 0);
        self.sleep.as_mut().reset(Instant::now() + half);
    }

    /// Ready at the end of a half; `true` when the half completes a period.
    fn poll_period(&mut self, cx: &mut Context<'_>, carrier: &Carrier) -> Poll<bool> {
        std::task::ready!(self.sleep.as_mut().poll(cx));
        self.sleep.as_mut().reset(Instant::now() + self.half);
        self.halves = match self.activity.counts(&carrier.conn()) {
            true => self.halves + 1,
            false => 0,
        };
        let over = self.halves >= 2;
        if over {
            self.halves = 0;
        }
        Poll::Ready(over)
    }
}

/// Memory for a large frame that arrives in parts. Memory for the whole frame is reserved when only its beginning is
/// read, so that such a frame can always be completed.
#[derive(Default)]
struct Room {
    place: Option<Place>,
    /// The waiting reservation.
    turn: Option<BoxFuture<'static, Result<Place, PoolFull>>>,
}

/// The end of the direction that the session has decided, for the case that the stream is lost or finished.
#[derive(Default)]
struct Decided {
    on_loss: Option<Ending>,
    on_finish: Option<CloseReason>,
}

/// Counts the received frames of a resumable channel.
#[derive(Debug)]
struct Received {
    /// Frames since the channel began, plus one when the peer has ended its direction.
    frames: u64,
    /// The count that was last sent to the peer.
    told: u64,
    /// Bytes received since then.
    bytes: usize,
    /// Whether the peer has ended its direction.
    over: bool,
}

impl Received {
    /// Received frames after which an acknowledgement is due.
    const FRAMES: u64 = 256;
    /// Received bytes after which an acknowledgement is due.
    const BYTES: usize = 128 << 10;

    fn tell(&mut self, key: Option<ChannelKey>, carrier: &Carrier) {
        if self.told != self.frames {
            self.told = self.frames;
            self.bytes = 0;
            carrier.confirm_later(key, self.frames);
        }
    }

    /// Tells the peer that this side accepts no more frames. Stopping the stream does not tell it reliably: the end
    /// of the peer's stream may come first.
    fn refuse(&self, key: Option<ChannelKey>, carrier: &Carrier) {
        if !self.over {
            carrier.confirm_later(key, Ack::REFUSED);
        }
    }
}

/// How the receiving direction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// FIN after whole frames.
    Finished,
    /// `$close`, a reset, or the end of the connection.
    Closed(CloseReason),
    /// The peer broke the protocol; the channel must be closed with this.
    Violation(CloseReason),
}

enum Step {
    Message(Message),
    /// A sound `$mark`, `$room` or `$at`, which counts when the program has come there. In a box, so that a step is no
    /// larger for it than a message is.
    Mark(Box<Message>),
    /// A reply or item was stored; the waiting task checks it.
    Filed,
    End(Ending),
}

/// Why no reply comes.
#[derive(Debug)]
pub(crate) enum NoReply {
    End(Ending),
    /// Too many unread messages precede the reply: this limit is reached.
    Backlog {
        most: usize,
        of: &'static str,
    },
}

impl Inbox {
    pub(crate) fn new(stream: RecvStream, frame_limit: usize) -> Self {
        let waiters = Arc::new(Waiters::default());
        let waker = Waker::from(waiters.clone());
        let state = State {
            stream: Some(stream),
            key: None,
            resume: None,
            decided: Lazy::default(),
            decoder: FrameDecoder::new(frame_limit),
            room: Lazy::default(),
            unread: Unread::default(),
            backlog: Backlog::default(),
            calls: Lazy::default(),
            places: Lazy::default(),
            end: None,
            progress: Progress::default(),
            alarm: None,
            uncounted: 0,
            wake: WakeAll {
                waiters: waiters.clone(),
                waker,
            },
        };
        Self {
            state: Mutex::new(state),
            waiters,
        }
    }

    /// Assigns the direction to this channel. `count`: frames are counted from now on, because the channel may
    /// continue on another stream.
    pub(crate) fn belongs_to(&self, key: ChannelKey, count: bool) {
        let mut state = lock(&self.state);
        state.key = Some(key);
        state.resume = count.then_some(Received {
            frames: 0,
            told: 0,
            bytes: 0,
            over: false,
        });
    }

    /// What the peer was told of rooms when the channel was opened.
    pub(crate) fn begin_at(&self, since: &[RoomPosition]) {
        if !since.is_empty() {
            lock(&self.state).places.get_or_make().begin(since);
        }
    }

    pub(crate) fn positions(&self) -> Vec<RoomPosition> {
        let mut state = lock(&self.state);
        state
            .places
            .get_mut()
            .map(|places| places.all())
            .unwrap_or_default()
    }

    /// Drops the current stream, if any, and returns how many frames were received.
    pub(crate) fn detach(&self) -> u64 {
        let mut state = lock(&self.state);
        state.stream = None;
        // Frames that were not decoded are not counted, so the peer sends them again.
        state.unread.chunks = VecDeque::new();
        state.forget_frame();
        state.resume.as_mut().map_or(0, |count| {
            count.told = count.frames;
            count.bytes = 0;
            count.frames
        })
    }

    /// Continues on the stream of `next`, whose first frame has been read.
    pub(crate) fn attach(&self, next: Self, carrier: &Carrier) {
        let next = next
            .state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let mut state = lock(&self.state);
        match &state.end {
            None => {
                state.decoder = next.decoder;
                state.room = next.room;
                state.unread.chunks = next.unread.chunks;
                state.stream = next.stream;
                drop(state);
                self.waiters.wake_by_ref();
            }
            Some(Ending::Finished) => {}
            // The peer may not know of it yet.
            Some(Ending::Closed(reason) | Ending::Violation(reason)) => {
                if let Some(mut stream) = next.stream {
                    stream.stop(reason.code);
                }
                if let Some(count) = &state.resume {
                    count.refuse(state.key, carrier);
                }
            }
        }
    }

    /// Ends the direction with `ending` when all messages that have arrived are read.
    pub(crate) fn fail(&self, ending: Ending) {
        lock(&self.state).decided.get_or_make().on_loss = Some(ending);
        self.waiters.wake_by_ref();
    }

    /// Makes an orderly end of the stream be reported as this reason.
    pub(crate) fn finish_as(&self, reason: CloseReason) {
        lock(&self.state).decided.get_or_make().on_finish = Some(reason);
    }

    /// Raises or lowers the frame limit for frames not yet begun.
    pub(crate) fn set_frame_limit(&self, limit: usize) {
        lock(&self.state).decoder.set_limit(limit);
    }

    /// The next application message, or the end. `serve`: a handler will answer a request; its state is stored there.
    pub(crate) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        carrier: &Carrier,
        counters: &Counters,
        serve: Option<&mut Option<Begun>>,
    ) -> Poll<Result<Message, Ending>> {
        let mut state = lock(&self.state);
        match state.next_common(carrier) {
            Some(message) => Poll::Ready(Ok(message)),
            None => self.poll_any(&mut state, cx, carrier, counters, serve),
        }
    }

    /// As [`poll_recv`](Self::poll_recv), for messages of any form. Not inlined: its stack frame would be set up for
    /// each message.
    #[inline(never)]
    fn poll_any(
        &self,
        state: &mut State,
        cx: &mut Context<'_>,
        carrier: &Carrier,
        counters: &Counters,
        serve: Option<&mut Option<Begun>>,
    ) -> Poll<Result<Message, Ending>> {
        if let Some(message) = state.next_waiting(carrier) {
            state.handed_out(&message, serve);
            return Poll::Ready(Ok(message));
        }
        loop {
            match std::task::ready!(state.poll_step(cx, carrier, counters)) {
                Step::Message(message) => {
                    state.handed_out(&message, serve);
                    return Poll::Ready(Ok(message));
                }
                Step::Mark(mark) => state.passed(&mark, carrier),
                Step::Filed => self.waiters.wake_others(cx.waker()),
                Step::End(end) => {
                    self.waiters.wake_by_ref();
                    return Poll::Ready(Err(end));
                }
            }
        }
    }

    /// Gives access to the requests of this channel.
    pub(crate) fn calls<T>(&self, look: impl FnOnce(&mut Calls) -> T) -> T {
        look(lock(&self.state).calls.get_or_make())
    }

    /// Waits until `look` returns a value. Messages that arrive before are put into the bounded backlog.
    pub(crate) fn poll_calls<T>(
        &self,
        cx: &mut Context<'_>,
        carrier: &Carrier,
        counters: &Counters,
        mut look: impl FnMut(&mut Calls) -> Option<T>,
    ) -> Poll<Result<T, NoReply>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(found) = look(state.calls.get_or_make()) {
                return Poll::Ready(Ok(found));
            }
            if let Some(full) = state.backlog_full(carrier) {
                return Poll::Ready(Err(full));
            }
            match std::task::ready!(state.poll_step(cx, carrier, counters)) {
                Step::Message(message) => {
                    state.put_back(message);
                    self.waiters.wake_others(cx.waker());
                }
                // The program has reached a mark only when it has taken all messages before it.
                Step::Mark(mark) => {
                    state.put_back(*mark);
                    self.waiters.wake_others(cx.waker());
                }
                Step::Filed => self.waiters.wake_others(cx.waker()),
                Step::End(end) => {
                    self.waiters.wake_by_ref();
                    return Poll::Ready(Err(NoReply::End(end)));
                }
            }
        }
    }

    /// Ready at this time, for a task that waits by [`poll_calls`](Self::poll_calls).
    pub(crate) fn poll_until(&self, until: Instant) -> Poll<()> {
        lock(&self.state).poll_alarm(until)
    }

    /// The first frame of a stream, of any event.
    pub(crate) fn poll_first(
        &self,
        cx: &mut Context<'_>,
        carrier: &Carrier,
        counters: &Counters,
    ) -> Poll<Result<Message, Ending>> {
        let mut state = lock(&self.state);
        state.poll_decoded(cx, carrier, counters)
    }

    /// The end of the receiving direction, for a task that does not read: messages before it wait in the
    /// backlog. `None` when that is full first.
    pub(crate) fn poll_end(
        &self,
        cx: &mut Context<'_>,
        carrier: &Carrier,
        counters: &Counters,
    ) -> Poll<Option<Ending>> {
        let nothing = |_: &mut Calls| None::<std::convert::Infallible>;
        match std::task::ready!(self.poll_calls(cx, carrier, counters, nothing)) {
            Err(NoReply::End(end)) => Poll::Ready(Some(end)),
            Err(NoReply::Backlog { .. }) => Poll::Ready(None),
            Ok(never) => match never {},
        }
    }

    /// Refuses everything that may still arrive.
    pub(crate) fn stop(&self, code: CloseCode, ending: Ending, carrier: &Carrier) {
        let mut state = lock(&self.state);
        if let Some(count) = &state.resume {
            count.refuse(state.key, carrier);
        }
        if state.end.is_none() {
            if let Some(stream) = &mut state.stream {
                stream.stop(code);
            }
            state.end = Some(ending);
            state.unread.chunks = VecDeque::new();
            state.forget_frame();
            state.alarm = None;
            drop(state);
            self.waiters.wake_by_ref();
        }
    }

    /// Frees memory that is only kept for reuse. Called when the channel becomes idle.
    pub(crate) fn rest(&self) {
        lock(&self.state).unread.chunks.shrink_to_fit();
    }

    pub(crate) fn ending(&self) -> Option<Ending> {
        lock(&self.state).end.clone()
    }
}

impl State {
    fn backlog_full(&self, carrier: &Carrier) -> Option<NoReply> {
        let full = |most, of| Some(NoReply::Backlog { most, of });
        let (messages, bytes) = (
            carrier.limits.backlog_messages,
            carrier.limits.backlog_bytes,
        );
        if self.backlog.messages.len() >= messages {
            full(messages, "messages")
        } else if self.backlog.bytes + self.calls.get().map_or(0, Calls::waiting) >= bytes {
            full(bytes, "bytes")
        } else {
            None
        }
    }

    /// Keeps a message for the next `recv`.
    fn put_back(&mut self, message: Message) {
        if let Some(id) = message.id() {
            self.calls.get_or_make().queued(id);
        }
        self.backlog.push(message);
    }

    /// The next message, if it is of the most common form and was read completely. It is decoded in place and moved
    /// once, to the caller.
    #[inline]
    fn next_common(&mut self, carrier: &Carrier) -> Option<Message> {
        if self.end.is_some() || !self.backlog.messages.is_empty() {
            return None;
        }
        let body = self.decoder.whole().ok()??;
        let (len, parts) = (body.len(), Parts::common(body)?);
        self.came(len, carrier);
        self.count(carrier, true);
        if let Some(places) = self.places.get_mut() {
            places.arrived();
        }
        Some(Message::of(self.decoder.take_whole(len), parts))
    }

    /// The first message of the backlog; marks before it are reported as passed.
    fn next_waiting(&mut self, carrier: &Carrier) -> Option<Message> {
        while let Some(message) = self.backlog.pop() {
            if !message.is_reserved() || ProtocolEvent::Gap.is(&message) {
                return Some(message);
            }
            self.passed(&message, carrier);
        }
        None
    }

    /// Records that a message leaves the inbox. A request for a handler is registered; other messages belong to the
    /// caller.
    fn handed_out(&mut self, message: &Message, serve: Option<&mut Option<Begun>>) {
        if let Some(places) = self.places.get_mut() {
            places.taken(message);
        }
        match (message.id(), serve) {
            (Some(id), Some(begun)) => *begun = Some(self.calls.get_or_make().begin(id)),
            (Some(id), None) => self.calls.get_or_make().answered(id),
            (None, _) => {}
        }
    }

    /// Decodes the next message, and processes it if it belongs to the protocol.
    fn poll_step(
        &mut self,
        cx: &mut Context<'_>,
        carrier: &Carrier,
        counters: &Counters,
    ) -> Poll<Step> {
        loop {
            let polled = self.poll_decoded(cx, carrier, counters);
            self.count(carrier, matches!(polled, Poll::Ready(Ok(_))));
            let message = match std::task::ready!(polled) {
                Ok(message) => message,
                Err(end) => return Poll::Ready(Step::End(end)),
            };
            if !message.is_reserved() {
                if message.id().is_some() {
                    carrier.counts.one(Count::RequestsReceived);
                }
                return Poll::Ready(Step::Message(message));
            }
            if let Some(step) = self.file(message, carrier) {
                return Poll::Ready(step);
            }
        }
    }

    /// Processes a message of the protocol; `None` when no task waits for it. Not inlined: inlining would move the
    /// application's messages once more.
    #[inline(never)]
    fn file(&mut self, message: Message, carrier: &Carrier) -> Option<Step> {
        let end = match ProtocolEvent::of(&message) {
            None => violation(
                CloseCode::BAD_MESSAGE,
                &"an event of the protocol that has no place on a channel",
            ),
            Some(event) if !is_admitted(event, carrier.client) => violation(
                CloseCode::PROTOCOL_ORDER,
                &"a message that has no place on a channel now",
            ),
            Some(event) => {
                if event == ProtocolEvent::Close {
                    self.count_end(carrier);
                }
                match event.read(&message) {
                    Ok(ProtocolMessage::Close(reason)) => Ending::Closed(reason),
                    Ok(ProtocolMessage::Gap(_)) => return Some(Step::Message(message)),
                    Ok(
                        ProtocolMessage::Mark(_)
                        | ProtocolMessage::At(_)
                        | ProtocolMessage::Room(_),
                    ) => return Some(Step::Mark(Box::new(message))),
                    Ok(_) => return self.file_call(event, message, carrier),
                    Err(error) => Ending::Violation(error.reason()),
                }
            }
        };
        Some(Step::End(self.ended(end)))
    }

    /// Processes a message that belongs to a request; `None` when no task waits for it.
    fn file_call(
        &mut self,
        event: ProtocolEvent,
        message: Message,
        carrier: &Carrier,
    ) -> Option<Step> {
        match self.calls.get_or_make().take(event, message) {
            Taken::Dropped => return None,
            Taken::Filed => {}
            Taken::Cancelled(id) => {
                carrier.counts.one(Count::RequestsCancelled);
                self.cancelled(id);
            }
            Taken::Violation(code, text) => {
                return Some(Step::End(self.ended(violation(code, &text))));
            }
        }
        Some(Step::Filed)
    }

    /// The program has come to this `$mark`, `$room` or `$at`.
    fn passed(&mut self, message: &Message, carrier: &Carrier) {
        match ProtocolEvent::of(message).map(|event| event.read(message)) {
            Some(Ok(ProtocolMessage::Mark(Mark(mark)))) => {
                if let Some(key) = self.key {
                    carrier.passed_later(key, mark);
                }
            }
            Some(Ok(ProtocolMessage::Room(at))) => {
                let most = carrier.limits.rooms_per_channel;
                self.places.get_or_make().enter(at, most);
            }
            Some(Ok(ProtocolMessage::At(at))) => {
                if let Some(places) = self.places.get_mut() {
                    places.announce(at);
                }
            }
            _ => {}
        }
    }

    /// Processes the peer's `$cancel`: a request that no handler has taken is removed from the backlog.
    fn cancelled(&mut self, id: u64) {
        if self.backlog.remove(id) {
            self.calls.get_or_make().answered(id);
        }
    }

    /// Adds messages to the counters in batches: when none is left to read, or when a batch is full.
    fn count(&mut self, carrier: &Carrier, message: bool) {
        self.uncounted += u64::from(message);
        if self.uncounted > 0 && (!message || self.uncounted >= COUNTED) {
            let messages = std::mem::take(&mut self.uncounted);
            carrier.counts.add(Count::MessagesReceived, messages);
        }
    }

    /// The next message of any kind. Most messages were read completely before.
    fn poll_decoded(
        &mut self,
        cx: &mut Context<'_>,
        carrier: &Carrier,
        counters: &Counters,
    ) -> Poll<Result<Message, Ending>> {
        if let Some(end) = &self.end {
            return Poll::Ready(Err(end.clone()));
        }
        match self.decode(carrier) {
            Some(decoded) => Poll::Ready(decoded),
            None => self.poll_more(cx, carrier, counters),
        }
    }

    /// The next message, if the decoder has all of it.
    fn decode(&mut self, carrier: &Carrier) -> Option<Result<Message, Ending>> {
        let body = match self.decoder.next_frame() {
            Ok(body) => body?,
            Err(error) => return Some(Err(self.broken(error.close_code(), &error))),
        };
        self.came(body.len(), carrier);
        if let Some(room) = self.room.get_mut()
            && self.decoder.is_drained()
            && self.unread.chunks.is_empty()
        {
            room.place = None;
        }
        Some(Message::decode(body).map_err(|error| self.broken(error.close_code(), &error)))
    }

    /// Records that a frame with a body of `len` bytes is complete.
    #[inline(always)]
    fn came(&mut self, len: usize, carrier: &Carrier) {
        self.progress.completed = true;
        if let Some(count) = &mut self.resume {
            count.frames += 1;
            count.bytes += len;
            if count.frames - count.told >= Received::FRAMES || count.bytes >= Received::BYTES {
                count.tell(self.key, carrier);
            }
        }
    }

    #[cold]
    fn broken(&mut self, code: CloseCode, error: &dyn std::fmt::Display) -> Ending {
        self.ended(violation(code, error))
    }

    /// Reads until a message is complete.
    fn poll_more(
        &mut self,
        cx: &mut Context<'_>,
        carrier: &Carrier,
        counters: &Counters,
    ) -> Poll<Result<Message, Ending>> {
        loop {
            if let Err(end) = std::task::ready!(self.poll_room(carrier)) {
                return Poll::Ready(Err(self.ended(end)));
            }
            if let Some(chunk) = self.unread.chunks.pop_front() {
                self.decoder.push(chunk);
                match self.decode(carrier) {
                    Some(decoded) => return Poll::Ready(decoded),
                    None => continue,
                }
            }
            // The waker is added before QUIC is polled: data that arrives right after QUIC returned `Pending` wakes
            // only the wakers that are registered by then.
            self.wake.waiters.add(cx.waker());
            match self.poll_read(carrier) {
                Poll::Ready(Ok(0)) => {
                    let decided = self.decided.get_mut();
                    let on_finish = decided.and_then(|decided| decided.on_finish.take());
                    let end = match (self.decoder.finish(), on_finish) {
                        (Ok(()), Some(reason)) => Ending::Closed(reason),
                        (Ok(()), None) => Ending::Finished,
                        (Err(error), _) => violation(error.close_code(), &error),
                    };
                    self.count_end(carrier);
                    return Poll::Ready(Err(self.ended(end)));
                }
                Poll::Ready(Ok(bytes)) => {
                    self.progress.received += bytes as u64;
                    counters.received(bytes as u64);
                    carrier.read(bytes as u64);
                }
                Poll::Ready(Err(end)) => return Poll::Ready(Err(self.ended(end))),
                Poll::Pending => {
                    if let Some(count) = &mut self.resume {
                        count.tell(self.key, carrier);
                    }
                    std::task::ready!(self.poll_timer(carrier));
                    let end = violation(
                        CloseCode::FRAME_TIMEOUT,
                        &format_args!(
                            "an unfinished frame grew by less than {MIN_FRAME_RATE} bytes a second for {:?}",
                            carrier.timeouts.frame
                        ),
                    );
                    return Poll::Ready(Err(self.ended(end)));
                }
            }
        }
    }

    /// Ready when there is room to read more of the unfinished frame. Unread bytes stay in QUIC's window.
    fn poll_room(&mut self, carrier: &Carrier) -> Poll<Result<(), Ending>> {
        match self.decoder.large() {
            Some(need) => self.poll_large(need, carrier),
            None => Poll::Ready(Ok(())),
        }
    }

    /// A function of its own, because most frames are small and would pay for its stack frame.
    #[cold]
    fn poll_large(&mut self, need: usize, carrier: &Carrier) -> Poll<Result<(), Ending>> {
        let Some(frames) = carrier.receive.frames.get() else {
            return Poll::Ready(Ok(()));
        };
        let room = self.room.get_or_make();
        if room
            .place
            .as_ref()
            .is_some_and(|place| place.amount() >= need)
        {
            return Poll::Ready(Ok(()));
        }
        room.place = None;
        if room.turn.is_none() {
            let (pool, tenant) = &**frames;
            room.place = pool.offer(tenant, need);
            if room.place.is_some() {
                return Poll::Ready(Ok(()));
            }
            let (pool, tenant) = (pool.clone(), tenant.clone());
            room.turn = Some(Box::pin(async move { pool.take_many(&tenant, need).await }));
            carrier.counts.one(Count::FramesHeldUp);
        }
        let Some(turn) = &mut room.turn else {
            return Poll::Ready(Ok(()));
        };
        // This wait is not the peer's fault.
        self.progress.timer = None;
        let taken = std::task::ready!(
            turn.as_mut()
                .poll(&mut Context::from_waker(&self.wake.waker))
        );
        room.turn = None;
        match taken {
            Ok(place) => {
                room.place = Some(place);
                Poll::Ready(Ok(()))
            }
            Err(full) => Poll::Ready(Err(violation(CloseCode::SERVER_BUSY, &full))),
        }
    }

    /// Discards the part of the unfinished frame that was received.
    fn forget_frame(&mut self) {
        self.decoder = FrameDecoder::new(0);
        self.room = Lazy::default();
        self.progress.timer = None;
    }

    /// Takes the chunks that QUIC has; 0 at the end of the stream.
    fn poll_read(&mut self, carrier: &Carrier) -> Poll<Result<usize, Ending>> {
        if self.unread.more {
            self.poll_chunks::<CHUNKS>(carrier)
        } else {
            self.poll_chunks::<FEW_CHUNKS>(carrier)
        }
    }

    fn poll_chunks<const N: usize>(&mut self, carrier: &Carrier) -> Poll<Result<usize, Ending>> {
        let mut cx = Context::from_waker(&self.wake.waker);
        let mut chunks: [Bytes; N] = std::array::from_fn(|_| Bytes::new());
        // `read_chunks` is cancel safe: a future that is not ready has taken nothing.
        let read = match &mut self.stream {
            Some(stream) => stream.poll_read(&mut cx, &mut chunks),
            None => match self
                .decided
                .get()
                .and_then(|decided| decided.on_loss.as_ref())
            {
                Some(end) => return Poll::Ready(Err(end.clone())),
                None => return Poll::Pending,
            },
        };
        self.unread.more = false;
        match std::task::ready!(read) {
            Ok(Some(count)) => {
                self.unread.more = count == N;
                let mut bytes = 0;
                for chunk in chunks.into_iter().take(count) {
                    bytes += chunk.len();
                    self.unread.chunks.push_back(chunk);
                }
                Poll::Ready(Ok(bytes))
            }
            Ok(None) => Poll::Ready(Ok(0)),
            Err(StreamError::Lost(_)) if self.resume.is_some() => {
                // The next connection brings another stream, or the session ends with a reason. The peer repeats an
                // incomplete frame.
                self.stream = None;
                self.forget_frame();
                self.poll_read(carrier)
            }
            Err(error) => {
                if matches!(error, StreamError::Lost(_)) {
                    // It would keep all that QUIC knows of the connection.
                    self.stream = None;
                }
                Poll::Ready(Err(Ending::Closed(read_reason(carrier, error))))
            }
        }
    }

    /// Counts the end of the peer's direction, which is one more frame.
    fn count_end(&mut self, carrier: &Carrier) {
        if let Some(count) = &mut self.resume {
            count.frames += 1;
            count.over = true;
            count.tell(self.key, carrier);
        }
    }

    /// Ready when an unfinished frame has made too little progress for `period`.
    ///
    /// A silent path does not end a channel that may continue on another connection: two half periods in which
    /// packets from the peer arrived make a whole one.
    fn poll_timer(&mut self, carrier: &Carrier) -> Poll<()> {
        self.decoder.rest();
        if self.decoder.held() == 0 {
            if self.room.get().is_some() {
                self.room = Lazy::default();
            }
            self.progress.timer = None;
            return Poll::Pending;
        }
        self.progress
            .poll(&mut Context::from_waker(&self.wake.waker), carrier)
    }

    /// Ready at this time. One timer serves all waiting tasks, and is moved only to an earlier time: setting a timer
    /// for each request would take a lock that all timers of the runtime share.
    fn poll_alarm(&mut self, until: Instant) -> Poll<()> {
        let alarm = match &mut self.alarm {
            Some(alarm) if alarm.deadline() <= until && !alarm.is_elapsed() => {
                // It wakes every waiter.
                return Poll::Pending;
            }
            Some(alarm) => {
                alarm.as_mut().reset(until);
                alarm
            }
            None => self.alarm.insert(Box::pin(tokio::time::sleep_until(until))),
        };
        // The task's budget does not apply: the timer would not be polled again before it has woken the task.
        pin!(tokio::task::unconstrained(alarm.as_mut()))
            .poll(&mut Context::from_waker(&self.wake.waker))
    }

    fn ended(&mut self, end: Ending) -> Ending {
        if let (Ending::Violation(reason), Some(stream)) = (&end, &mut self.stream) {
            stream.stop(reason.code);
        }
        self.progress.timer = None;
        self.alarm = None;
        self.room = Lazy::default();
        self.end.get_or_insert(end).clone()
    }
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox")
            .field("end", &self.ending())
            .finish_non_exhaustive()
    }
}

/// Whether a client or a server may receive this event on a channel after the first message.
fn is_admitted(event: ProtocolEvent, client: bool) -> bool {
    use ProtocolEvent as Event;
    match event {
        Event::Close | Event::Gap | Event::Reply | Event::Fault | Event::Cancel => true,
        Event::Push | Event::End | Event::Want | Event::Item | Event::Credit => true,
        Event::Mark | Event::At | Event::Room => client,
        Event::Hello | Event::Welcome | Event::Open | Event::Resume | Event::Channels => false,
        Event::Ack | Event::Passed | Event::Refresh | Event::Refreshed | Event::GoAway => false,
    }
}

fn violation(code: CloseCode, text: &dyn std::fmt::Display) -> Ending {
    Ending::Violation(CloseReason::local(code, text.to_string()))
}

fn read_reason(carrier: &Carrier, error: StreamError) -> CloseReason {
    match error {
        StreamError::Peer(code) => CloseReason::peer(code, "the peer gave the channel up"),
        StreamError::Lost(error) => carrier.reason_for(&error),
        StreamError::Ended => lost("the stream is closed"),
    }
}

/// All tasks that wait on this inbox. QUIC keeps one waker for each stream; this waker wakes all of them.
#[derive(Default)]
struct Waiters {
    list: Mutex<Waiting>,
}

/// Usually there is one waiter.
#[derive(Default)]
struct Waiting {
    first: Option<Waker>,
    others: Vec<Waker>,
}

impl Waiters {
    fn add(&self, waker: &Waker) {
        let Waiting { first, others } = &mut *lock(&self.list);
        let mut known = first.iter().chain(&*others);
        if known.any(|known| known.will_wake(waker)) {
            return;
        }
        match first {
            None => *first = Some(waker.clone()),
            Some(_) => others.push(waker.clone()),
        }
    }

    fn wake_by_ref(&self) {
        let Waiting { first, others } = std::mem::take(&mut *lock(&self.list));
        for waker in first.into_iter().chain(others) {
            waker.wake();
        }
    }

    /// Wakes all but the task that reads, which continues by itself. Another waiting future of the same task had read
    /// everything when it was last polled, so QUIC has woken the task for the bytes that are read now.
    fn wake_others(&self, reader: &Waker) {
        let (first, others) = {
            let Waiting { first, others } = &mut *lock(&self.list);
            let first = first.take_if(|known| !known.will_wake(reader));
            if first.is_none() && others.is_empty() {
                return;
            }
            let others = others.extract_if(.., |known| !known.will_wake(reader));
            (first, others.collect::<Vec<_>>())
        };
        for waker in first.into_iter().chain(others) {
            waker.wake();
        }
    }
}

impl Wake for Waiters {
    fn wake(self: Arc<Self>) {
        Self::wake_by_ref(&self);
    }
}
