//! Handlers by event name: a thin, ordered loop over a channel's messages.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::auth::Peer;
use crate::channel::{Channel, RecvError, SendError};
use crate::code::Fault;
use crate::message::Message;
use crate::metrics::Count;

/// What a handler knows besides its data.
#[derive(Debug, Clone)]
pub struct Context {
    channel: Channel,
    event: String,
    request: bool,
}

impl Context {
    /// The channel the message came on; use it to send back.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Who sent it: the identity found at authentication.
    pub fn peer(&self) -> Option<Peer> {
        self.channel.session().peer.get()
    }

    /// The event's name.
    pub fn event(&self) -> &str {
        &self.event
    }

    /// Whether the peer waits for the answer.
    pub fn is_request(&self) -> bool {
        self.request
    }
}

/// What a handler may return: nothing, or a result whose value answers a request.
pub trait IntoAnswer: Send {
    /// The value that answers a request.
    type Value: Serialize + Send + Sync;

    /// The answer, or the fault that refuses the request.
    ///
    /// # Errors
    /// The handler's own error, as a [`Fault`].
    fn into_answer(self) -> Result<Self::Value, Fault>;
}

impl IntoAnswer for () {
    type Value = ();

    fn into_answer(self) -> Result<(), Fault> {
        Ok(())
    }
}

impl<T: Serialize + Send + Sync, E: Into<Fault> + Send> IntoAnswer for Result<T, E> {
    type Value = T;

    fn into_answer(self) -> Result<T, Fault> {
        self.map_err(Into::into)
    }
}

type Handler = Box<dyn Fn(Message, Context) -> BoxFuture<'static, Verdict> + Send + Sync>;

/// What became of one message.
enum Verdict {
    Done,
    Fault(Fault),
    /// The channel no longer takes answers.
    Gone(SendError),
}

/// A channel's handlers, built with [`Channel::on`] and started with [`run`](Self::run).
#[must_use = "handlers do nothing until `run` is awaited"]
pub struct Handlers {
    channel: Channel,
    table: HashMap<String, Handler>,
    fallback: Option<Handler>,
}

impl Channel {
    /// Begins a set of handlers for this channel with one for `event`; see [`Handlers::on`].
    pub fn on<T, F, Fut, A>(&self, event: impl Into<String>, handler: F) -> Handlers
    where
        T: DeserializeOwned + Send + 'static,
        F: Fn(T, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = A> + Send + 'static,
        A: IntoAnswer + 'static,
    {
        Handlers {
            channel: self.clone(),
            table: HashMap::new(),
            fallback: None,
        }
        .on(event, handler)
    }
}

impl Handlers {
    /// Calls `handler` for each message of this event, with its data decoded.
    ///
    /// Handlers run one after the other, in the order of the messages. Data that does not fit becomes a
    /// `bad_payload` fault for a request and a warning in the log otherwise; so do a handler's error and its
    /// panic (`internal`), which end neither the channel nor the loop. A handler that answers a request has
    /// `Timeouts::handler` to do so.
    pub fn on<T, F, Fut, A>(mut self, event: impl Into<String>, handler: F) -> Self
    where
        T: DeserializeOwned + Send + 'static,
        F: Fn(T, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = A> + Send + 'static,
        A: IntoAnswer + 'static,
    {
        let handler: Handler = Box::new(move |message, context| match message.data::<T>() {
            Ok(data) => conclude(handler(data, context.clone()), message, context),
            Err(error) => {
                let fault = Fault::new(Fault::BAD_PAYLOAD, error.to_string());
                Box::pin(std::future::ready(Verdict::Fault(fault)))
            }
        });
        self.table.insert(event.into(), handler);
        self
    }

    /// Calls `handler` with every message that no other handler takes. Without a fallback a request gets a
    /// `no_handler` fault and any other message a warning in the log.
    pub fn fallback<F, Fut, A>(mut self, handler: F) -> Self
    where
        F: Fn(Message, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = A> + Send + 'static,
        A: IntoAnswer + 'static,
    {
        self.fallback = Some(Box::new(move |message, context| {
            conclude(handler(message.clone(), context.clone()), message, context)
        }));
        self
    }

    /// Runs the handlers until the peer finishes (`Ok`) or the channel ends in any other way.
    ///
    /// While a handler runs, nothing more is read: a slow handler slows its own peer down and nobody else.
    ///
    /// # Errors
    /// As [`Channel::recv`].
    ///
    /// # Cancel safety
    /// Dropping the future drops the handler that runs; the message it had is gone, later ones stay.
    pub async fn run(self) -> Result<(), RecvError> {
        while let Some(message) = self.channel.recv().await? {
            let context = Context {
                channel: self.channel.clone(),
                event: message.event().to_owned(),
                request: message.id().is_some(),
            };
            let verdict = match self.table.get(message.event()).or(self.fallback.as_ref()) {
                Some(handler) => handler(message.clone(), context).await,
                None => Verdict::Fault(Fault::new(Fault::NO_HANDLER, "no handler for this event")),
            };
            match verdict {
                Verdict::Done => {}
                Verdict::Fault(fault) => {
                    self.channel.session().tally.not_handled(&fault.code);
                    if let Some(left_out) = self.channel.session().quiet.line() {
                        let event = crate::code::printable(message.event(), 128);
                        tracing::warn!(%event, code = %fault.code, left_out, "message not handled: {}", fault.message);
                    }
                    let _ = self.channel.fault(&message, &fault).await;
                }
                Verdict::Gone(error) => tracing::debug!(%error, "the answer could not be sent"),
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handlers")
            .field("channel", &self.channel)
            .field("events", &self.table.keys())
            .finish_non_exhaustive()
    }
}

/// Runs the user's future, apart from the rest of the program, and sends its answer.
fn conclude<Fut, A>(handler: Fut, message: Message, context: Context) -> BoxFuture<'static, Verdict>
where
    Fut: Future<Output = A> + Send + 'static,
    A: IntoAnswer + 'static,
{
    Box::pin(async move {
        let guarded = AssertUnwindSafe(handler).catch_unwind();
        let outcome = if message.id().is_some() {
            let deadline = context.channel.session().timeouts.handler;
            match tokio::time::timeout(deadline, guarded).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    return Verdict::Fault(Fault::new(
                        Fault::TIMEOUT,
                        format!("no answer within {deadline:?}"),
                    ));
                }
            }
        } else {
            guarded.await
        };
        match outcome {
            Err(_) => {
                context.channel.session().tally.one(Count::HandlerPanics);
                Verdict::Fault(Fault::new(Fault::INTERNAL, "the handler failed"))
            }
            Ok(answer) => match answer.into_answer() {
                Err(fault) => Verdict::Fault(fault),
                Ok(value) => match context.channel.reply(&message, &value).await {
                    Ok(()) => Verdict::Done,
                    Err(error) => Verdict::Gone(error),
                },
            },
        }
    })
}
