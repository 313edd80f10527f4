//! Handlers by event name: a loop over a channel's messages.

use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::{AbortHandle, Abortable, BoxFuture};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::base::extensions::Extensions;
use crate::channel::calls::{Begun, Role};
use crate::channel::inbox::{Ending, NoReply};
use crate::channel::items::{Streaming, send_item};
use crate::channel::request::RequestError;
use crate::channel::{Channel, RecvError, SendError};
use crate::metrics::{Count, Words};
use crate::serve::extract::{EventHandler, Handler};
use crate::serve::presence::TrackError;
use crate::serve::rooms::JoinError;
use crate::serve::router::{Next, Routed, Router};
use crate::session::service::IntoOutcome;
use crate::trust::auth::Peer;
use crate::wire::code::{CloseCode, CloseReason, Fault};
use crate::wire::control::{self, Decode, Gap, ProtocolEvent};
use crate::wire::message::{self, EncodeError, Encoded, Message};

/// The context of a message, for its handler.
#[derive(Debug, Clone)]
pub struct Context {
    channel: Channel,
    message: Message,
    /// When the handler of a request began, and when its asker stops waiting.
    begun: Option<Instant>,
    deadline: Option<Instant>,
    router: Routed,
}

impl Context {
    /// The channel the message came on; use it to send back.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The identity of the sender, from authentication.
    pub fn peer(&self) -> Option<Peer> {
        self.channel.session().peer.get()
    }

    /// The message.
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// The event's name.
    pub fn event(&self) -> &str {
        self.message.event()
    }

    /// Whether the peer waits for the answer.
    pub fn is_request(&self) -> bool {
        self.message.id().is_some()
    }

    /// The time at which the handler of a request is dropped if it has not answered: the requester's deadline or the
    /// end of `Timeouts::handler`, whichever is sooner. The latter restarts with each item of the request's stream
    /// that the handler takes, and does not apply to the items of an answer. `None` for a message that is not a
    /// request: its handler has no time-out.
    pub fn deadline(&self) -> Option<Instant> {
        let (begun, id) = (self.begun?, self.message.id()?);
        let moved = self.channel.inner.inbox.calls(|calls| calls.moved(id));
        let patience = self.channel.session().timeouts.handler;
        let until = after(moved.unwrap_or(begun), patience);
        Some(self.deadline.map_or(until, |deadline| deadline.min(until)))
    }

    /// The values that were added to the router with `state`.
    pub fn state(&self) -> &Extensions {
        self.router.shared_state()
    }

    pub(crate) fn with_message(mut self, message: Message) -> Self {
        self.message = message;
        self
    }
}

/// A handler's answer: a value, a fault, or a stream of items. Middleware sees it. It is not sent if the message was
/// not a request.
pub struct Answer(Kind);

enum Kind {
    /// An encoded value.
    Value(Vec<u8>),
    Fault(Fault),
    Stream(Streaming),
}

impl Answer {
    /// An answer with this value; one that cannot be encoded is an `internal` fault.
    pub fn value<T: Serialize + ?Sized>(value: &T) -> Self {
        match message::encode_data(value) {
            Ok(data) => Self(Kind::Value(data)),
            Err(error) => Fault::unsendable("the reply", &error).into(),
        }
    }

    /// The fault, if it is one.
    pub fn fault(&self) -> Option<&Fault> {
        match &self.0 {
            Kind::Fault(fault) => Some(fault),
            Kind::Value(_) | Kind::Stream(_) => None,
        }
    }
}

impl From<Fault> for Answer {
    fn from(fault: Fault) -> Self {
        Self(Kind::Fault(fault))
    }
}

impl From<Streaming> for Answer {
    fn from(stream: Streaming) -> Self {
        Self(Kind::Stream(stream))
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Value(data) => f.debug_tuple("Value").field(&data.len()).finish(),
            Kind::Fault(fault) => f.debug_tuple("Fault").field(fault).finish(),
            Kind::Stream(_) => f.write_str("Stream"),
        }
    }
}

/// A type that a handler may return: nothing, a result whose value answers a request, [`Streaming`] or a result of
/// it, or an [`Answer`].
pub trait IntoAnswer: Send {
    /// The type of the reply, which must be a typed event's `Reply`; `()` for a stream.
    type Value;

    /// The answer, or the fault that refuses the request.
    fn into_answer(self) -> Answer;
}

impl IntoAnswer for () {
    type Value = ();

    fn into_answer(self) -> Answer {
        Answer::value(&())
    }
}

impl<T: Serialize + Send, E: Into<Fault> + Send> IntoAnswer for Result<T, E> {
    type Value = T;

    fn into_answer(self) -> Answer {
        match self {
            Ok(value) => Answer::value(&value),
            Err(error) => error.into().into(),
        }
    }
}

impl IntoAnswer for Streaming {
    type Value = ();

    fn into_answer(self) -> Answer {
        self.into()
    }
}

impl<E: Into<Fault> + Send> IntoAnswer for Result<Streaming, E> {
    type Value = ();

    fn into_answer(self) -> Answer {
        match self {
            Ok(stream) => stream.into(),
            Err(error) => error.into().into(),
        }
    }
}

impl IntoAnswer for Answer {
    type Value = Self;

    fn into_answer(self) -> Answer {
        self
    }
}

/// A channel's handlers, built with [`Channel::on`] and started with [`run`](Self::run): a [`Router`] for one
/// channel.
#[must_use = "handlers do nothing until `run` is awaited"]
pub struct Handlers {
    channel: Channel,
    router: Router,
}

impl Channel {
    /// Begins a set of handlers for this channel with one for `event`; see [`Router::on`].
    pub fn on<M, H: Handler<M>>(&self, event: impl Into<String>, handler: H) -> Handlers {
        self.route(Router::new().on(event, handler))
    }

    /// Serves this channel by a router, when [`Handlers::run`] is called.
    pub fn route(&self, router: Router) -> Handlers {
        Handlers {
            channel: self.clone(),
            router,
        }
    }
}

impl Handlers {
    fn map(mut self, change: impl FnOnce(Router) -> Router) -> Self {
        self.router = change(self.router);
        self
    }

    /// As [`Router::on`].
    pub fn on<M, H: Handler<M>>(self, event: impl Into<String>, handler: H) -> Self {
        self.map(|router| router.on(event, handler))
    }

    /// As [`Router::event`].
    pub fn event<M, H: EventHandler<M>>(self, handler: H) -> Self {
        self.map(|router| router.event(handler))
    }

    /// As [`Router::fallback`].
    pub fn fallback<M, H: Handler<M>>(self, handler: H) -> Self {
        self.map(|router| router.fallback(handler))
    }

    /// As [`Router::on_gap`].
    pub fn on_gap<F, Fut>(self, handler: F) -> Self
    where
        F: Fn(Gap, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        self.map(|router| router.on_gap(handler))
    }

    /// As [`Router::state`]. A missing value is noticed only when a handler needs it.
    pub fn state<S: Clone + Send + Sync + 'static>(self, state: S) -> Self {
        self.map(|router| router.state(state))
    }

    /// As [`Router::concurrency`].
    pub fn concurrency(self, n: usize) -> Self {
        self.map(|router| router.concurrency(n))
    }

    /// As [`Router::on_open`].
    pub fn on_open<F, Fut>(self, hook: F) -> Self
    where
        F: Fn(Channel) -> Fut + Send + Sync + 'static,
        Fut: Future + Send + 'static,
        Fut::Output: IntoOutcome,
    {
        self.map(|router| router.on_open(hook))
    }

    /// As [`Router::on_close`].
    pub fn on_close<F, Fut>(self, hook: F) -> Self
    where
        F: Fn(Channel) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        self.map(|router| router.on_close(hook))
    }

    /// As [`Router::wrap`].
    pub fn wrap<F, Fut>(self, layer: F) -> Self
    where
        F: Fn(Message, Context, Next) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Answer> + Send + 'static,
    {
        self.map(|router| router.wrap(layer))
    }

    /// Runs the handlers until the peer finishes (`Ok`) or the channel ends in another way, and the running handlers
    /// have returned. When the channel is closed or lost, handlers that answer requests are dropped.
    ///
    /// # Errors
    /// As [`Channel::recv`].
    ///
    /// # Cancel safety
    /// Dropping the future drops the running handlers; their messages are lost, later ones stay in the channel.
    pub async fn run(self) -> Result<(), RecvError> {
        let channel = self.channel.clone();
        match serve(self.channel, Arc::new(self.router)).await {
            Ok(()) => Ok(()),
            Err(Unserved::Ended(error)) => Err(error),
            Err(Unserved::Hook(error)) => {
                channel.session().counts.one(Count::HandlersFailed);
                tracing::warn!(channel = %channel.name(), %error, "an open hook failed");
                let reason =
                    CloseReason::local(CloseCode::HANDLER_FAILED, "the channel's handler failed");
                channel.close_with(reason.clone());
                Err(RecvError::Closed(reason))
            }
        }
    }
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handlers")
            .field("channel", &self.channel)
            .field("events", &self.router.events().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

/// Lets handlers use `?` on the library's errors: the requester gets `internal`.
macro_rules! internal_faults {
    ($($error:ty),*) => {$(
        impl From<$error> for Fault {
            fn from(error: $error) -> Self {
                Self::new(Self::INTERNAL, error.to_string())
            }
        }
    )*};
}

internal_faults!(EncodeError, SendError, RequestError, JoinError, TrackError);

/// One running handler; `Err` if it was stopped.
type Job = BoxFuture<'static, Result<(), (Channel, u64)>>;

/// Serves a channel until it ends, and calls the router's hooks.
pub(crate) async fn serve(channel: Channel, router: Arc<Router>) -> Result<(), Unserved> {
    // Registers the channel with the server's rooms, so that `to_channels` and `to_all` reach it.
    let _ = channel.guest();
    let closing = Closing(
        router
            .has_close_hooks()
            .then(|| (channel.clone(), router.clone())),
    );
    let served = match router.opened(&channel).await {
        Ok(()) => serve_messages(channel, router)
            .await
            .map_err(Unserved::Ended),
        Err(error) => Err(Unserved::Hook(error)),
    };
    closing.close().await;
    served
}

/// Why a router no longer serves a channel.
pub(crate) enum Unserved {
    Ended(RecvError),
    /// The error of an open hook.
    Hook(String),
}

impl fmt::Display for Unserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended(error) => error.fmt(f),
            Self::Hook(error) => f.write_str(error),
        }
    }
}

/// Runs the close hooks of a channel; if its service is dropped, in a task of their own.
struct Closing(Option<(Channel, Arc<Router>)>);

impl Closing {
    async fn close(mut self) {
        if let Some((channel, router)) = self.0.take() {
            router.closed(&channel).await;
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        if let Some((channel, router)) = self.0.take()
            && let Ok(runtime) = Handle::try_current()
        {
            let tasks = channel.session().tasks.clone();
            tasks.spawn_on(async move { router.closed(&channel).await }, &runtime);
        }
    }
}

async fn serve_messages(channel: Channel, router: Arc<Router>) -> Result<(), RecvError> {
    let at_once = router.at_once();
    let router = Routed::new(router);
    let mut running = FuturesUnordered::<Job>::new();
    // Why `read_on` stopped: nothing more is read until a handler has finished.
    let mut full = false;
    let mut end = None;
    loop {
        let free = end.is_none() && running.len() < at_once;
        tokio::select! {
            biased;
            Some(ended) = running.next(), if !running.is_empty() => {
                full = false;
                if let Err((channel, id)) = ended {
                    cancelled(&channel, id);
                }
            }
            message = next(&channel), if free => match message {
                Ok(Some((message, begun))) => {
                    let id = begun.map(|begun| begun.id);
                    let mut work = work(&channel, &router, message, begun);
                    // Most handlers finish at once and need no job.
                    if poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await.is_pending() {
                        running.push(job(&channel, work, id));
                    }
                }
                Ok(None) => end = Some(Ok(())),
                Err(error) => end = Some(Err(error)),
            },
            stop = read_on(&channel), if !free && !full && !running.is_empty() => {
                full = true;
                if let NoReply::End(Ending::Closed(_) | Ending::Violation(_)) = &stop {
                    channel.inner.inbox.calls(|calls| calls.stop());
                }
                if let NoReply::End(ending) = stop {
                    let _ = channel.ended(ending);
                }
            }
            else => return end.unwrap_or(Ok(())),
        }
    }
}

/// The next message, for a handler, with the state of the request if it is one.
pub(crate) async fn next(channel: &Channel) -> Result<Option<(Message, Option<Begun>)>, RecvError> {
    let inner = &*channel.inner;
    let mut begun = None;
    let next = poll_fn(|cx| {
        let serve = Some(&mut begun);
        inner
            .inbox
            .poll_recv(cx, &inner.carrier, &inner.counters, serve)
    });
    match next.await {
        Ok(message) => Ok(Some((message, begun))),
        Err(ending) => Ok(channel.ended(ending)?.map(|message| (message, None))),
    }
}

/// Reads into the backlog while handlers run, so that `$cancel` takes effect; returns why it stopped.
async fn read_on(channel: &Channel) -> NoReply {
    match channel.until(|_| None::<std::convert::Infallible>).await {
        Err(stop) => stop,
        Ok(never) => match never {},
    }
}

/// The peer cancelled a request and its handler was dropped: confirm that if the queue has room; nothing waits for it.
pub(crate) fn cancelled(channel: &Channel, id: u64) {
    let session = channel.session();
    let fault = Fault::new(Fault::CANCELLED, "the request was given up");
    if let Some(frame) = control::encode_fault(&fault, id, session.frame_limit())
        && let Ok(true) = channel.try_send_encoded(&Encoded::from_frame(frame))
    {
        session.counts.word(Words::FaultsSent, &fault.code);
    }
}

/// The work for one message.
fn work(
    channel: &Channel,
    router: &Routed,
    message: Message,
    begun: Option<Begun>,
) -> BoxFuture<'static, ()> {
    let channel = channel.clone();
    let router = router.clone();
    let Some(begun) = begun else {
        return Box::pin(async move { event(&channel, router, message).await });
    };
    let id = begun.id;
    let answered = Answered { channel, id };
    if begun.given_up {
        return Box::pin(async move { cancelled(&answered.channel, id) });
    }
    let deadline = message
        .deadline()
        .and_then(|limit| begun.since.checked_add(limit));
    let now = if begun.waited {
        Instant::now()
    } else {
        begun.since
    };
    let late = deadline.is_some_and(|deadline| deadline <= now);
    let asked = Asked {
        id,
        begun: now,
        deadline,
    };
    // The future is moved into its box, so a value that it holds in two places costs each request twice the memory.
    Box::pin(async move { request(&answered.channel, router, &message, &asked, late).await })
}

/// The state of a request that a handler answers.
struct Asked {
    id: u64,
    begun: Instant,
    deadline: Option<Instant>,
}

/// Runs work until it finishes or its request is cancelled.
fn job(channel: &Channel, work: BoxFuture<'static, ()>, id: Option<u64>) -> Job {
    let Some(id) = id else {
        return Box::pin(work.map(Ok));
    };
    let (stop, stopped) = AbortHandle::new_pair();
    channel.inner.inbox.calls(|calls| calls.guard(id, stop));
    let work = Abortable::new(work, stopped);
    let channel = channel.clone();
    Box::pin(async move { work.await.map_err(|_| (channel, id)) })
}

/// Removes a request of the peer when its handler has ended.
pub(crate) struct Answered {
    pub(crate) channel: Channel,
    pub(crate) id: u64,
}

impl Drop for Answered {
    fn drop(&mut self) {
        let inbox = &self.channel.inner.inbox;
        inbox.calls(|calls| calls.answered(self.id));
    }
}

/// Handles a message that is not a request.
async fn event(channel: &Channel, router: Routed, message: Message) {
    if ProtocolEvent::Gap.is(&message) {
        return gap(channel, &router, message).await;
    }
    let work = run(channel, router, message.clone(), None);
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(answer) => {
            if let Some(fault) = answer.fault() {
                log(channel, &message, fault);
            }
        }
        Err(_) => log(channel, &message, &panicked(channel)),
    }
}

/// Reports a gap in a room's messages.
async fn gap(channel: &Channel, router: &Routed, message: Message) {
    let Ok(gap) = Gap::decode(&message) else {
        return;
    };
    let Some(on_gap) = router.gap_handler() else {
        if let Some(left_out) = channel.session().log_limit.line() {
            let room = crate::base::text::printable_within(&gap.room, 128);
            tracing::warn!(%room, lost = gap.lost, left_out, "messages of a room are missing");
        }
        return;
    };
    let cx = context(channel, router, message.clone(), None);
    // Called in the future, so that a panic of the function itself is caught as well.
    let work = async { on_gap(gap, cx).await };
    if AssertUnwindSafe(work).catch_unwind().await.is_err() {
        log(channel, &message, &panicked(channel));
    }
}

/// Handles a request and sends its answer.
async fn request(
    channel: &Channel,
    router: Routed,
    message: &Message,
    asked: &Asked,
    too_late: bool,
) {
    let Asked { id, deadline, .. } = *asked;
    let answer = if too_late {
        late("the deadline has passed").into()
    } else {
        call_handler(channel, router, message, asked).await
    };
    let outcome = match answer.0 {
        Kind::Value(data) => Ok(data),
        Kind::Fault(fault) => Err(fault),
        // Rare work is boxed, because the future of each request is moved together with the memory for all its
        // states.
        Kind::Stream(stream) => match Box::pin(stream_out(channel, id, stream, deadline)).await {
            Ok(true) => Ok(vec![0xc0]),
            // The channel is closed or the requester no longer waits.
            Ok(false) => return,
            Err(fault) => Err(fault),
        },
    };
    let fault = match outcome {
        Ok(data) => match channel.answer_raw(id, &data).await {
            Err(SendError::Encode(error)) => Ok(Fault::unsendable("the reply", &error)),
            sent => Err(sent),
        },
        Err(fault) => Ok(fault),
    };
    let sent = match fault {
        Ok(fault) => {
            log(channel, message, &fault);
            Box::pin(channel.send_fault(&fault, id)).await
        }
        Err(sent) => sent,
    };
    if let Err(error) = sent {
        tracing::debug!(%error, "the answer could not be sent");
    }
}

/// Runs a request's handler within its time-out.
async fn call_handler(
    channel: &Channel,
    router: Routed,
    message: &Message,
    asked: &Asked,
) -> Answer {
    let work = run(channel, router, message.clone(), Some(asked));
    let mut work = pin!(AssertUnwindSafe(work).catch_unwind());
    // Most handlers answer at once, and need no timer.
    match poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await {
        Poll::Ready(Ok(answer)) => return answer,
        Poll::Ready(Err(_)) => return panicked(channel).into(),
        Poll::Pending => {}
    }
    Box::pin(await_slow_handler(channel, work, asked)).await
}

/// Waits for a handler that did not answer at once.
async fn await_slow_handler(
    channel: &Channel,
    mut work: Pin<&mut impl Future<Output = std::thread::Result<Answer>>>,
    asked: &Asked,
) -> Answer {
    let Asked {
        id,
        begun,
        deadline,
    } = *asked;
    let patience = channel.session().timeouts.handler;
    let mut until = after(begun, patience);
    loop {
        let wake = deadline.map_or(until, |deadline| deadline.min(until));
        match tokio::time::timeout_at(wake, &mut work).await {
            Ok(Ok(answer)) => return answer,
            Ok(Err(_)) => return panicked(channel).into(),
            Err(_) if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                return late("no answer within the request's deadline").into();
            }
            Err(_) => {
                // The time-out of a handler that reads a stream restarts with each item.
                let moved = channel.inner.inbox.calls(|calls| calls.moved(id));
                match moved.map(|moved| after(moved, patience)) {
                    Some(later) if later > until => until = later,
                    _ => return late(&format!("no answer within {patience:?}")).into(),
                }
            }
        }
    }
}

fn run(
    channel: &Channel,
    router: Routed,
    message: Message,
    asked: Option<&Asked>,
) -> impl Future<Output = Answer> + use<> {
    let cx = context(channel, &router, message, asked);
    Next::first(router).go_on(cx)
}

fn context(channel: &Channel, router: &Routed, message: Message, asked: Option<&Asked>) -> Context {
    Context {
        channel: channel.clone(),
        message,
        begun: asked.map(|asked| asked.begun),
        deadline: asked.and_then(|asked| asked.deadline),
        router: router.clone(),
    }
}

/// Sends the items of an answer; `false` when the requester no longer waits.
async fn stream_out(
    channel: &Channel,
    id: u64,
    stream: Streaming,
    deadline: Option<Instant>,
) -> Result<bool, Fault> {
    let mut items = stream.items;
    let work = async {
        while let Some(item) = items.next().await {
            match send_item(channel, Role::Answerer, id, Ok(item?)).await {
                Ok(true) => {}
                Ok(false) | Err(RequestError::Closed(_)) => return Ok(false),
                Err(RequestError::Send(SendError::Encode(error))) => {
                    return Err(Fault::unsendable("an item", &error));
                }
                Err(RequestError::Send(_)) => return Ok(false),
                Err(error) => return Err(Fault::new(Fault::INTERNAL, error.to_string())),
            }
        }
        Ok(true)
    };
    let guarded = AssertUnwindSafe(work).catch_unwind();
    let outcome = match deadline {
        None => guarded.await,
        Some(deadline) => match tokio::time::timeout_at(deadline, guarded).await {
            Ok(outcome) => outcome,
            Err(_) => return Err(late("the stream did not end within the request's deadline")),
        },
    };
    outcome.unwrap_or_else(|_| Err(panicked(channel)))
}

fn log(channel: &Channel, message: &Message, fault: &Fault) {
    channel.session().counts.not_handled(&fault.code);
    if let Some(left_out) = channel.session().log_limit.line() {
        let event = crate::base::text::printable_within(message.event(), 128);
        let reason = fault.reason().map(tracing::field::display);
        tracing::warn!(%event, code = %fault.code, reason, left_out, "message not handled: {}", fault.message);
    }
}

fn after(time: Instant, patience: Duration) -> Instant {
    // A deadline beyond the clock's range means no deadline.
    time.checked_add(patience)
        .unwrap_or_else(|| time + Duration::from_secs(1 << 30))
}

fn panicked(channel: &Channel) -> Fault {
    channel.session().counts.one(Count::HandlerPanics);
    Fault::new(Fault::INTERNAL, "the handler failed")
}

pub(crate) fn late(text: &str) -> Fault {
    Fault::new(Fault::TIMEOUT, text)
}
