//! The receiving half of a channel: bytes from QUIC to messages, driven by the task that waits for one.
//!
//! There is no reader task: `recv` and `request` pull on the same state, so unread bytes stay in QUIC's
//! window and slow the peer down. All progress (a half-received frame, messages that arrived while a reply
//! was awaited) lives here and not in any future, so dropping a future loses nothing.

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

/// QUIC chunks taken in one call, and in the one after a call that took fewer.
const CHUNKS: usize = 32;
const FEW_CHUNKS: usize = 2;
/// Messages counted at once, at most.
const COUNTED: u64 = 64;

pub(crate) struct Inbox {
    state: Mutex<State>,
    waiters: Arc<Waiters>,
}

struct State {
    /// None while a resumable channel has no connection.
    stream: Option<RecvStream>,
    /// The channel's, where it is one.
    key: Option<ChannelKey>,
    resume: Option<Received>,
    decided: Lazy<Decided>,
    decoder: FrameDecoder,
    room: Lazy<Room>,
    unread: Unread,
    backlog: Backlog,
    /// Requests of both sides, and what came for them.
    calls: Lazy<Calls>,
    /// How far the program has come in the rooms that it is a member of.
    places: Lazy<Places>,
    end: Option<Ending>,
    progress: Progress,
    /// The earliest deadline of requests that are waited for, or one that was.
    alarm: Option<Pin<Box<Sleep>>>,
    /// Messages that are not in `counts` yet.
    uncounted: u64,
    waiters: Arc<Waiters>,
    waker: Waker,
}

/// What was taken from QUIC and is not decoded.
#[derive(Default)]
struct Unread {
    chunks: VecDeque<Bytes>,
    /// QUIC had as many as were asked for.
    more: bool,
}

/// Messages that came while somebody waited for something else, and stand before what is read next.
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

    /// Takes out the request with this id; says whether it was here.
    fn remove(&mut self, id: u64) -> bool {
        let waits = |message: &Message| message.id() == Some(id);
        let at = self.messages.iter().position(waits);
        let message = at.and_then(|at| self.messages.remove(at));
        self.bytes -= message.as_ref().map_or(0, Message::len);
        message.is_some()
    }
}

/// How an unfinished frame grows: by too little for too long is a fault of the peer.
#[derive(Default)]
struct Progress {
    timer: Option<Box<Timer>>,
    /// Bytes received in all, and how many there were when the timer was set.
    received: u64,
    mark: u64,
    /// A frame was completed since the timer was last looked at.
    completed: bool,
}

impl Progress {
    /// Ready when the frame has grown by too little for a period.
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

/// The time of an unfinished frame, in halves of a period.
struct Timer {
    sleep: Pin<Box<Sleep>>,
    half: Duration,
    activity: PathActivity,
    /// Those in a row that count.
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

    /// Ready at the end of a half; `true` when that ends a period.
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

/// Memory for a large frame that comes in pieces: all of it, before more than its beginning is read. So a frame that has
/// room can be completed, whatever others lack.
#[derive(Default)]
struct Room {
    place: Option<Place>,
    /// Waits for its turn.
    turn: Option<BoxFuture<'static, Result<Place, PoolFull>>>,
}

/// How the direction ends when its stream is lost, or finished, once that is decided from outside.
#[derive(Default)]
struct Decided {
    on_loss: Option<Ending>,
    on_finish: Option<CloseReason>,
}

/// What a resumable channel has received.
#[derive(Debug)]
struct Received {
    /// Frames since the channel began; one more when the peer has ended its direction.
    frames: u64,
    /// The count that was last sent to the peer.
    told: u64,
    /// Bytes received since then.
    bytes: usize,
    /// The peer has ended its direction.
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

    /// Tells the peer that nothing more is taken. That the stream was stopped it need not hear: its own end of
    /// the stream may come first.
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
    /// A part of a request was filed; its waiting task should look.
    Filed,
    End(Ending),
}

/// Why a reply will not come.
#[derive(Debug)]
pub(crate) enum NoReply {
    End(Ending),
    /// Too many unread messages stand before it: this limit is reached.
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
            waiters: waiters.clone(),
            waker,
        };
        Self {
            state: Mutex::new(state),
            waiters,
        }
    }

    /// The direction is this channel's. `count`: the frames that come from now on are counted, because the channel may
    /// go on over another stream.
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

    /// Gives up the present stream, if any, and tells how many frames were received.
    pub(crate) fn detach(&self) -> u64 {
        let mut state = lock(&self.state);
        state.stream = None;
        // What was not decoded is not counted: the peer sends it again.
        state.unread.chunks = VecDeque::new();
        state.forget_frame();
        state.resume.as_mut().map_or(0, |count| {
            count.told = count.frames;
            count.bytes = 0;
            count.frames
        })
    }

    /// Goes on with the stream of `next`, whose first frame has been read.
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
            // The peer may not have heard of it yet.
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

    /// Ends the direction with this once what has arrived is read.
    pub(crate) fn fail(&self, ending: Ending) {
        lock(&self.state).decided.get_or_make().on_loss = Some(ending);
        self.waiters.wake_by_ref();
    }

    /// Lets a clean end of the stream read as this reason.
    pub(crate) fn finish_as(&self, reason: CloseReason) {
        lock(&self.state).decided.get_or_make().on_finish = Some(reason);
    }

    /// Raises or lowers the frame limit for frames not yet begun.
    pub(crate) fn set_frame_limit(&self, limit: usize) {
        lock(&self.state).decoder.set_limit(limit);
    }

    /// The next application message, or the end. `serve`: a handler will answer it if it is a request, and this is told
    /// of it.
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

    /// As [`poll_recv`](Self::poll_recv), whatever comes. Not inlined: what it keeps on its stack is stored for each message.
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

    /// What is known of the requests on this channel.
    pub(crate) fn calls<T>(&self, look: impl FnOnce(&mut Calls) -> T) -> T {
        look(lock(&self.state).calls.get_or_make())
    }

    /// Waits until `look` finds what it is after. Messages that come before it wait in the backlog, which is
    /// bounded.
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
                // The program has not come to a mark before it takes what was before it.
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

    /// The first frame of a stream, whatever it is.
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

    /// Refuses everything that may still come.
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

    /// Lets go of memory that is only kept to be used again, before a time in which little comes.
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

    /// The next message, if it is of the most common form and lies whole in what was read: it is looked at where it lies
    /// and taken once, straight to the caller.
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

    /// The first message of the backlog, with the marks before it passed.
    fn next_waiting(&mut self, carrier: &Carrier) -> Option<Message> {
        while let Some(message) = self.backlog.pop() {
            if !message.is_reserved() || ProtocolEvent::Gap.is(&message) {
                return Some(message);
            }
            self.passed(&message, carrier);
        }
        None
    }

    /// A message leaves the inbox: a handler's request is kept in mind, any other is its taker's business.
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

    /// Decodes the next message and files what belongs to the protocol.
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

    /// Files a message of the protocol; `None` when it concerns nobody. Not inlined: the messages of the application, which
    /// pass by it, would be moved once more for its sake.
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

    /// Files a message that belongs to a request; `None` when it concerns nobody.
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

    /// The peer gave a request up: if nobody has taken it yet, nobody need.
    fn cancelled(&mut self, id: u64) {
        if self.backlog.remove(id) {
            self.calls.get_or_make().answered(id);
        }
    }

    /// Counts messages, a batch at a time: until none is left, or there are many.
    fn count(&mut self, carrier: &Carrier, message: bool) {
        self.uncounted += u64::from(message);
        if self.uncounted > 0 && (!message || self.uncounted >= COUNTED) {
            let messages = std::mem::take(&mut self.uncounted);
            carrier.counts.add(Count::MessagesReceived, messages);
        }
    }

    /// The next message of any kind. Most lie whole in what was read before.
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

    /// A frame with a body of so many bytes is complete.
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

    /// Reads until there is a message.
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
            // Before QUIC is asked: what comes right after it said no wakes those who are known by then.
            self.waiters.add(cx.waker());
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

    /// Ready when the frame under way may be read on. What is not read stays in QUIC's window.
    fn poll_room(&mut self, carrier: &Carrier) -> Poll<Result<(), Ending>> {
        match self.decoder.large() {
            Some(need) => self.poll_large(need, carrier),
            None => Poll::Ready(Ok(())),
        }
    }

    /// Apart, because most frames are not large: reading them would pay for what this has on its stack.
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
        // It is not the peer who is late.
        self.progress.timer = None;
        let taken = std::task::ready!(turn.as_mut().poll(&mut Context::from_waker(&self.waker)));
        room.turn = None;
        match taken {
            Ok(place) => {
                room.place = Some(place);
                Poll::Ready(Ok(()))
            }
            Err(full) => Poll::Ready(Err(violation(CloseCode::SERVER_BUSY, &full))),
        }
    }

    /// What came of the frame under way is of no use any more.
    fn forget_frame(&mut self) {
        self.decoder = FrameDecoder::new(0);
        self.room = Lazy::default();
        self.progress.timer = None;
    }

    /// Takes what QUIC has; 0 at the end of the stream.
    fn poll_read(&mut self, carrier: &Carrier) -> Poll<Result<usize, Ending>> {
        if self.unread.more {
            self.poll_chunks::<CHUNKS>(carrier)
        } else {
            self.poll_chunks::<FEW_CHUNKS>(carrier)
        }
    }

    fn poll_chunks<const N: usize>(&mut self, carrier: &Carrier) -> Poll<Result<usize, Ending>> {
        let mut cx = Context::from_waker(&self.waker);
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
                // The next connection brings another stream, or the end of the session its reason. A frame
                // that was only begun will be repeated.
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

    /// The peer has ended its direction, which counts as one more frame.
    fn count_end(&mut self, carrier: &Carrier) {
        if let Some(count) = &mut self.resume {
            count.frames += 1;
            count.over = true;
            count.tell(self.key, carrier);
        }
    }

    /// Ready when an unfinished frame has made too little progress for `period`.
    ///
    /// What may go on over another connection is not ended by a silent path: two half periods in which the
    /// peer was heard make a whole one.
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
            .poll(&mut Context::from_waker(&self.waker), carrier)
    }

    /// Ready at this time. One timer serves all who wait, and is only moved for who comes before the others: to set one
    /// for each request would take a lock that all timers of the runtime share.
    fn poll_alarm(&mut self, until: Instant) -> Poll<()> {
        let alarm = match &mut self.alarm {
            Some(alarm) if alarm.deadline() <= until && !alarm.is_elapsed() => {
                // It wakes everybody.
                return Poll::Pending;
            }
            Some(alarm) => {
                alarm.as_mut().reset(until);
                alarm
            }
            None => self.alarm.insert(Box::pin(tokio::time::sleep_until(until))),
        };
        // Whatever is left of the task's budget: it would not be asked again before it has woken.
        pin!(tokio::task::unconstrained(alarm.as_mut())).poll(&mut Context::from_waker(&self.waker))
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

/// Whether this event may come on a channel behind its first message, to a client or to a server.
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

/// Everybody who waits on this inbox. QUIC knows one waker per stream; this one wakes them all.
#[derive(Default)]
struct Waiters {
    list: Mutex<Waiting>,
}

/// Mostly there is one.
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

    /// Wakes all but the task that reads: it goes on by itself. Another future of the same task that waits has read
    /// all there was when it was last polled, so QUIC has woken the task for what is read now.
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
