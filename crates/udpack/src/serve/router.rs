//! [`Router`]: handlers of a channel's messages, by event.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::base::extensions::Extensions;
use crate::channel::Channel;
use crate::metrics::Count;
use crate::serve::extract::{EventHandler, Handler};
use crate::serve::handlers::{Answer, Context, serve};
use crate::session::service::{IntoOutcome, ServeChannel, Service};
use crate::wire::code::Fault;
use crate::wire::control::Gap;
use crate::wire::event::Event;
use crate::wire::message::Message;

type Route = Arc<dyn Fn(&Context) -> BoxFuture<'static, Answer> + Send + Sync>;
type Layer = Arc<dyn Fn(Message, Context, Next) -> BoxFuture<'static, Answer> + Send + Sync>;
type OnGap = Arc<dyn Fn(Gap, Context) -> BoxFuture<'static, ()> + Send + Sync>;
type OnOpen = Arc<dyn Fn(Channel) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;
type OnClose = Arc<dyn Fn(Channel) -> BoxFuture<'static, ()> + Send + Sync>;
/// Adds one value to a router's state.
type Give = Arc<dyn Fn(&Extensions) + Send + Sync>;

/// Handlers by event, with the state and the middleware they share. Give it to `ServerBuilder::channel` or
/// `ClientBuilder::channel`; for one channel at hand see [`Channel::on`].
///
/// Handlers run one after the other, in the order of the messages, unless [`concurrency`](Self::concurrency) says
/// otherwise. While they run, the router reads the channel into its bounded backlog, so the cancellation or the
/// deadline of a request takes effect at once: its handler's future is dropped. When the backlog is full the router
/// stops reading, so a slow handler slows down only its own peer.
///
/// A clone has the same handlers, hooks and state; later additions to one do not affect the other.
#[must_use = "a router does nothing until a channel is served with it"]
#[derive(Default)]
pub struct Router {
    table: BTreeMap<String, Route>,
    fallback: Option<Route>,
    on_gap: Option<OnGap>,
    layers: Vec<Layer>,
    open: Vec<OnOpen>,
    close: Vec<OnClose>,
    state: Extensions,
    given: Vec<Give>,
    needs: Vec<fn(&Extensions) -> Option<&'static str>>,
    concurrency: usize,
}

impl Clone for Router {
    fn clone(&self) -> Self {
        let state = Extensions::default();
        for give in &self.given {
            give(&state);
        }
        Self {
            table: self.table.clone(),
            fallback: self.fallback.clone(),
            on_gap: self.on_gap.clone(),
            layers: self.layers.clone(),
            open: self.open.clone(),
            close: self.close.clone(),
            state,
            given: self.given.clone(),
            needs: self.needs.clone(),
            concurrency: self.concurrency,
        }
    }
}

impl Router {
    /// A router without handlers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `handler` for each message of this event: an async function or closure of up to eight arguments,
    /// the first the message's data or any [`Extract`](crate::Extract), the others [`Extract`](crate::Extract).
    ///
    /// The returned value answers a request; see [`IntoAnswer`](crate::IntoAnswer). Data that does not decode becomes
    /// a `bad_payload` fault for a request and a warning in the log otherwise; so do a handler's error and its panic
    /// (`internal`), which end neither the channel nor the other messages. A request's handler must answer within
    /// `Timeouts::handler`, which restarts with each item of the request's stream that it takes, and within the
    /// requester's deadline.
    pub fn on<M, H: Handler<M>>(mut self, event: impl Into<String>, handler: H) -> Self {
        self.needs.push(H::missing);
        self.table.insert(event.into(), route(handler));
        self
    }

    /// Calls `handler` for each message of the event that is the type of its first argument; see [`on`](Self::on).
    pub fn event<M, H: EventHandler<M>>(self, handler: H) -> Self {
        self.on(H::Event::NAME, handler)
    }

    /// Calls `handler` with every message that has no other handler. Without a fallback a request gets a `no_handler`
    /// fault and any other message a warning in the log.
    pub fn fallback<M, H: Handler<M>>(mut self, handler: H) -> Self {
        self.needs.push(H::missing);
        self.fallback = Some(route(handler));
        self
    }

    /// Calls `handler` when messages of a room were dropped for this member, at their place among the messages.
    /// Without it a gap is logged as a warning.
    pub fn on_gap<F, Fut>(mut self, handler: F) -> Self
    where
        F: Fn(Gap, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        self.on_gap = Some(Arc::new(move |gap, cx| Box::pin(handler(gap, cx))));
        self
    }

    /// Adds a value for the handlers, which they take as [`State`](crate::State): one value of each type.
    pub fn state<S: Clone + Send + Sync + 'static>(mut self, state: S) -> Self {
        let give = move |to: &Extensions| drop(to.insert(state.clone()));
        give(&self.state);
        self.given.push(Arc::new(give));
        self
    }

    /// Calls `hook` with each channel before its first message is handled: to join rooms, to send a greeting, to
    /// check the peer. An `Err` closes the channel with `handler_failed`; to refuse it with a code of your own, close
    /// it here. Of several, each runs after the one before.
    pub fn on_open<F, Fut>(mut self, hook: F) -> Self
    where
        F: Fn(Channel) -> Fut + Send + Sync + 'static,
        Fut: Future + Send + 'static,
        Fut::Output: IntoOutcome,
    {
        self.open.push(Arc::new(move |channel| {
            let future = hook(channel);
            Box::pin(async move { future.await.into_outcome() })
        }));
        self
    }

    /// Calls `hook` with each channel once it is served no more, however that came: the peer finished or closed it, its
    /// connection or session is over, an open hook failed, or the service was stopped. [`Channel::rooms`] gives the rooms
    /// that it is or was in, [`Channel::close_reason`] why it is over, if it is. Of several, each runs after the one
    /// before.
    ///
    /// When the session is over it has `Timeouts::close` together with the handlers.
    pub fn on_close<F, Fut>(mut self, hook: F) -> Self
    where
        F: Fn(Channel) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let hook: OnClose = Arc::new(move |channel| Box::pin(hook(channel)));
        self.close.push(hook);
        self
    }

    /// Lets up to `n` handlers of one channel run at once. They begin in the order of the messages; nothing
    /// else about their order is sure then. Default 1; 0 counts as 1.
    pub fn concurrency(mut self, n: usize) -> Self {
        self.concurrency = n;
        self
    }

    /// Puts a function around all handlers, the fallback included. It sees the message before them and their
    /// answer after them, may change both, and need not call `next` at all. Of several the first is outermost.
    pub fn wrap<F, Fut>(mut self, layer: F) -> Self
    where
        F: Fn(Message, Context, Next) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Answer> + Send + 'static,
    {
        self.layers.push(Arc::new(move |message, cx, next| {
            Box::pin(layer(message, cx, next))
        }));
        self
    }

    pub(crate) fn shared_state(&self) -> &Extensions {
        &self.state
    }

    pub(crate) fn at_once(&self) -> usize {
        self.concurrency.max(1)
    }

    pub(crate) fn gap_handler(&self) -> Option<&OnGap> {
        self.on_gap.as_ref()
    }

    pub(crate) fn events(&self) -> impl Iterator<Item = &String> {
        self.table.keys()
    }

    /// The name of a state type that a handler needs and that is missing.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        self.needs.iter().find_map(|missing| missing(&self.state))
    }

    pub(crate) async fn opened(&self, channel: &Channel) -> Result<(), String> {
        for hook in &self.open {
            hook(channel.clone()).await?;
        }
        Ok(())
    }

    pub(crate) fn has_close_hooks(&self) -> bool {
        !self.close.is_empty()
    }

    /// Runs the close hooks; a panic of one does not stop the others.
    pub(crate) async fn closed(&self, channel: &Channel) {
        for hook in &self.close {
            // Called in the future, so that a panic of the function itself is caught as well.
            let run = async { hook(channel.clone()).await };
            if AssertUnwindSafe(run).catch_unwind().await.is_err() {
                channel.session().counts.one(Count::HandlerPanics);
                tracing::error!(channel = %channel.name(), "a close hook panicked");
            }
        }
    }

    fn answer(&self, cx: &Context) -> BoxFuture<'static, Answer> {
        match self.table.get(cx.event()).or(self.fallback.as_ref()) {
            Some(route) => route(cx),
            None => {
                let fault = Fault::new(Fault::NO_HANDLER, "no handler for this event");
                Box::pin(std::future::ready(fault.into()))
            }
        }
    }
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router")
            .field("events", &self.table.keys())
            .field("concurrency", &self.at_once())
            .finish_non_exhaustive()
    }
}

fn route<M, H: Handler<M>>(handler: H) -> Route {
    Arc::new(move |cx| handler.call(cx))
}

/// One channel's reference to a router. Each message holds a clone: with one `Arc` for each channel, threads that
/// serve different channels do not contend for one reference count.
pub(crate) type Routed = Arc<Arc<Router>>;

/// The next middleware or the handler. See [`Router::wrap`].
pub struct Next {
    router: Routed,
    at: usize,
}

impl Next {
    pub(crate) fn first(router: Routed) -> Self {
        Self { router, at: 0 }
    }

    /// Continues with this message.
    pub async fn run(self, message: Message, cx: Context) -> Answer {
        self.go_on(cx.with_message(message)).await
    }

    /// Continues with the message of `cx`.
    pub(crate) async fn go_on(self, cx: Context) -> Answer {
        let Self { router, at } = self;
        match router.layers.get(at) {
            Some(layer) => {
                let next = Self {
                    router: router.clone(),
                    at: at + 1,
                };
                layer(cx.message().clone(), cx, next).await
            }
            None => router.answer(&cx).await,
        }
    }
}

impl fmt::Debug for Next {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Next")
            .field("router", &self.router)
            .field("at", &self.at)
            .finish()
    }
}

/// Marks handlers that are routers.
#[derive(Debug)]
pub enum ByRouter {}

impl ServeChannel<ByRouter> for Router {
    fn into_service(self) -> Service {
        let missing = self.missing();
        let router = Arc::new(self);
        Service {
            handler: Arc::new(move |channel| {
                let router = router.clone();
                Box::pin(async move {
                    serve(channel, router)
                        .await
                        .map_err(|error| error.to_string())
                })
            }),
            missing,
        }
    }
}
