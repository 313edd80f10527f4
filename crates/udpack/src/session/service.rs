//! Handlers of a socket's channels, by channel name.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::channel::Channel;

/// What a channel handler may return.
pub trait IntoOutcome: Send {
    /// `Err` closes the channel with `handler_failed`; the text goes to the log, not to the peer.
    ///
    /// # Errors
    /// The handler's own error, as text.
    fn into_outcome(self) -> Result<(), String>;
}

impl IntoOutcome for () {
    fn into_outcome(self) -> Result<(), String> {
        Ok(())
    }
}

impl<E: fmt::Display + Send> IntoOutcome for Result<(), E> {
    fn into_outcome(self) -> Result<(), String> {
        self.map_err(|error| error.to_string())
    }
}

/// A handler of channels: an async function that takes the channel, or a [`Router`](crate::Router). The compiler
/// infers `M`.
pub trait ServeChannel<M> {
    #[doc(hidden)]
    fn into_service(self) -> Service;
}

/// A handler of channels, ready for use.
pub struct Service {
    pub(crate) handler: ChannelHandler,
    /// The type of a state that the handlers need and the router does not have.
    pub(crate) missing: Option<&'static str>,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").finish_non_exhaustive()
    }
}

/// Marks handlers that are functions.
#[derive(Debug)]
pub enum ByFunction {}

impl<F, Fut, O> ServeChannel<ByFunction> for F
where
    F: Fn(Channel) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = O> + Send + 'static,
    O: IntoOutcome + 'static,
{
    fn into_service(self) -> Service {
        Service {
            handler: Arc::new(move |channel| {
                let future = self(channel);
                Box::pin(async move { future.await.into_outcome() })
            }),
            missing: None,
        }
    }
}

pub(crate) type ChannelHandler =
    Arc<dyn Fn(Channel) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// The handlers of a server or client, by channel name.
#[derive(Clone, Default)]
pub(crate) struct Registry {
    pub(crate) handlers: HashMap<String, ChannelHandler>,
    /// Whether channels without a handler are passed to `accept_channel`; otherwise they are refused.
    pub(crate) pull: bool,
    /// A channel whose handlers need a state that its router does not have, and the state's type.
    pub(crate) missing: Option<(String, &'static str)>,
}

impl Registry {
    pub(crate) fn insert<M>(&mut self, name: String, handler: impl ServeChannel<M>) {
        let service = handler.into_service();
        if let (None, Some(state)) = (&self.missing, service.missing) {
            self.missing = Some((name.clone(), state));
        }
        self.handlers.insert(name, service.handler);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.handlers.is_empty()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.handlers.keys()).finish()
    }
}
