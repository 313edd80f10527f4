//! The types that a handler may take as arguments.

use std::future::Future;

use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;

use crate::base::extensions::Extensions;
use crate::channel::Channel;
use crate::channel::items::Items;
use crate::serve::handlers::{Answer, Context, IntoAnswer};
use crate::serve::rooms::Rooms;
use crate::session::socket::Socket;
use crate::trust::auth::Peer;
use crate::wire::code::Fault;
use crate::wire::event::Event;
use crate::wire::message::Message;

/// Something that a handler may take as any of its arguments.
pub trait Extract: Sized + Send {
    /// Extracts the value from the message and its context.
    ///
    /// # Errors
    /// A fault if the value is missing: the handler does not run, and a request is refused with the fault.
    fn extract(cx: &Context) -> Result<Self, Fault>;

    /// The name of the type that this needs from the router's state and that the state does not have.
    fn missing(state: &Extensions) -> Option<&'static str> {
        let _ = state;
        None
    }
}

/// Something that a handler may take as its first argument: an [`Extract`], or the message's data as any type that
/// serde reads. `M` distinguishes the two; the compiler infers it.
pub trait FromMessage<M>: Sized + Send {
    /// Extracts the value from the message.
    ///
    /// # Errors
    /// As [`Extract::extract`]; `bad_payload` if the data does not decode.
    fn from_message(cx: &Context) -> Result<Self, Fault>;

    /// As [`Extract::missing`].
    fn missing(state: &Extensions) -> Option<&'static str> {
        let _ = state;
        None
    }
}

/// The first argument is the message's data.
#[derive(Debug)]
pub enum ByData {}

/// The first argument is an [`Extract`], like the others.
#[derive(Debug)]
pub enum ByExtract {}

impl<T: DeserializeOwned + Send> FromMessage<ByData> for T {
    fn from_message(cx: &Context) -> Result<Self, Fault> {
        cx.message().data().map_err(Fault::from)
    }
}

impl<T: Extract> FromMessage<ByExtract> for T {
    fn from_message(cx: &Context) -> Result<Self, Fault> {
        T::extract(cx)
    }

    fn missing(state: &Extensions) -> Option<&'static str> {
        T::missing(state)
    }
}

/// The message's data, at any position among the arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data<T>(pub T);

impl<T: DeserializeOwned + Send> Extract for Data<T> {
    fn extract(cx: &Context) -> Result<Self, Fault> {
        <T as FromMessage<ByData>>::from_message(cx).map(Self)
    }
}

/// A clone of the value of this type that was added to the router with `state`. A server or client whose router lacks
/// it does not start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State<S>(pub S);

impl<S: Clone + Send + Sync + 'static> Extract for State<S> {
    fn extract(cx: &Context) -> Result<Self, Fault> {
        cx.state().get().map(Self).ok_or_else(|| {
            let text = format!(
                "the router has no state of type {}",
                std::any::type_name::<S>()
            );
            tracing::error!("{text}");
            Fault::new(Fault::INTERNAL, "the handler failed")
        })
    }

    fn missing(state: &Extensions) -> Option<&'static str> {
        (state.get::<S>().is_none()).then(std::any::type_name::<S>)
    }
}

impl Extract for Context {
    fn extract(cx: &Context) -> Result<Self, Fault> {
        Ok(cx.clone())
    }
}

impl Extract for Message {
    fn extract(cx: &Context) -> Result<Self, Fault> {
        Ok(cx.message().clone())
    }
}

impl Extract for Channel {
    fn extract(cx: &Context) -> Result<Self, Fault> {
        Ok(cx.channel().clone())
    }
}

impl Extract for Socket {
    fn extract(cx: &Context) -> Result<Self, Fault> {
        Ok(Self::of(cx.channel().session()))
    }
}

impl Extract for Peer {
    fn extract(cx: &Context) -> Result<Self, Fault> {
        let peer = cx.peer();
        peer.ok_or_else(|| Fault::new(Fault::INTERNAL, "the peer is not known yet"))
    }
}

impl Extract for Rooms {
    fn extract(cx: &Context) -> Result<Self, Fault> {
        let rooms = cx.channel().rooms_handle();
        rooms.ok_or_else(|| Fault::new(Fault::INTERNAL, "a client has no rooms"))
    }
}

impl<T: DeserializeOwned> Extract for Items<T> {
    fn extract(cx: &Context) -> Result<Self, Fault> {
        Ok(Self::answering(cx.channel().clone(), cx.message().id()))
    }
}

/// An async function or closure of up to eight arguments that can handle messages: the first a [`FromMessage`], all
/// others [`Extract`]. The compiler infers `M`.
pub trait Handler<M>: Send + Sync + 'static {
    /// The type of the answer.
    type Answer: IntoAnswer;

    /// Extracts the arguments and runs the handler.
    fn call(&self, cx: &Context) -> BoxFuture<'static, Answer>;

    /// The name of a type that the arguments need and the router's state lacks.
    fn missing(state: &Extensions) -> Option<&'static str>;
}

/// A [`Handler`] whose first argument is an [`Event`], which gives the event's name and the type of the
/// reply.
pub trait EventHandler<M>: Handler<M> {
    /// The event it handles.
    type Event: Event;
}

impl<F, Fut, A> Handler<()> for F
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
    A: IntoAnswer + 'static,
{
    type Answer = A;

    fn call(&self, _: &Context) -> BoxFuture<'static, Answer> {
        let future = self();
        Box::pin(async move { future.await.into_answer() })
    }

    fn missing(_: &Extensions) -> Option<&'static str> {
        None
    }
}

macro_rules! handlers {
    ($first:ident $($other:ident)*) => {
        impl<F, Fut, A, M, $first, $($other),*> Handler<(M, ($first, $($other),*))> for F
        where
            F: Fn($first, $($other),*) -> Fut + Send + Sync + 'static,
            Fut: Future<Output = A> + Send + 'static,
            A: IntoAnswer + 'static,
            $first: FromMessage<M>,
            $($other: Extract,)*
        {
            type Answer = A;

            fn call(&self, cx: &Context) -> BoxFuture<'static, Answer> {
                let future = $first::from_message(cx)
                    .and_then(|first| Ok(self(first, $($other::extract(cx)?),*)));
                match future {
                    Ok(future) => Box::pin(async move { future.await.into_answer() }),
                    Err(fault) => Box::pin(std::future::ready(fault.into())),
                }
            }

            fn missing(state: &Extensions) -> Option<&'static str> {
                $first::missing(state)$(.or_else(|| $other::missing(state)))*
            }
        }

        impl<F, Fut, A, $first, $($other),*> EventHandler<(ByData, ($first, $($other),*))> for F
        where
            F: Fn($first, $($other),*) -> Fut + Send + Sync + 'static,
            Fut: Future<Output = A> + Send + 'static,
            A: IntoAnswer<Value = $first::Reply> + 'static,
            $first: Event + Send,
            $($other: Extract,)*
        {
            type Event = $first;
        }
    };
}

handlers!(T1);
handlers!(T1 T2);
handlers!(T1 T2 T3);
handlers!(T1 T2 T3 T4);
handlers!(T1 T2 T3 T4 T5);
handlers!(T1 T2 T3 T4 T5 T6);
handlers!(T1 T2 T3 T4 T5 T6 T7);
handlers!(T1 T2 T3 T4 T5 T6 T7 T8);
