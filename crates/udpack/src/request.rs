//! [`Request`]: one question on a channel and its answer.

use std::fmt;
use std::future::{IntoFuture, poll_fn};
use std::marker::PhantomData;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::channel::{Channel, RecvError, SendError, application_event};
use crate::code::{CloseCode, CloseReason, Fault};
use crate::control::{self, CANCEL, FAULT};
use crate::inbox::{Ending, NoReply};
use crate::message::{DecodeError, Encoded};
use crate::metrics::{Count, Words};

impl Channel {
    /// Asks the peer and waits for its answer: awaiting the returned builder gives the reply.
    ///
    /// The request is queued when the builder is first polled. Events that arrive before the reply wait for
    /// `recv`, in a backlog bounded by `Limits::backlog_messages`; when that is full the request fails with
    /// [`RequestError::Backlog`] instead of waiting for ever.
    ///
    /// # Cancel safety
    /// Dropping it tells the peer that the answer is no longer wanted.
    pub fn request<T: Serialize + ?Sized, R: DeserializeOwned>(
        &self,
        event: &str,
        data: &T,
    ) -> Request<R> {
        let id = self.inner.next_request.fetch_add(1, Ordering::Relaxed);
        let limit = self.inner.session.frame_limit();
        let frame = application_event(event).and_then(|()| {
            control::protocol_within(event, data, Some(id), limit).map_err(SendError::Encode)
        });
        Request {
            channel: self.clone(),
            id,
            frame,
            timeout: self.inner.session.timeouts.request,
            reply: PhantomData,
        }
    }

    fn no_reply(&self, ending: Ending) -> CloseReason {
        match self.ended(ending) {
            Err(RecvError::Closed(reason) | RecvError::Protocol(reason)) => reason,
            Ok(_) => self.inner.end.get().cloned().unwrap_or_else(|| {
                CloseReason::peer(CloseCode::NORMAL, "the peer finished without an answer")
            }),
        }
    }
}

/// A request to be sent: await it for the reply. Made by [`Channel::request`].
#[must_use = "a request is sent when it is awaited"]
pub struct Request<R> {
    channel: Channel,
    id: u64,
    frame: Result<Bytes, SendError>,
    timeout: Duration,
    reply: PhantomData<fn() -> R>,
}

impl<R> Request<R> {
    /// Gives up after this long with [`RequestError::Timeout`]. Default `Timeouts::request`.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

impl<R: DeserializeOwned> Request<R> {
    async fn run(self) -> Result<R, RequestError> {
        let frame = self.frame.map_err(RequestError::Send)?;
        let inner = &*self.channel.inner;
        inner.inbox.expect_reply(self.id);
        // From here on dropping this future tells the peer.
        let pending = Pending {
            channel: &self.channel,
            id: self.id,
        };
        let encoded = Encoded::from_frame(frame);
        let exchange = async {
            inner.session.tally.one(Count::RequestsSent);
            self.channel
                .send_encoded(&encoded)
                .await
                .map_err(RequestError::Send)?;
            poll_fn(|cx| {
                inner
                    .inbox
                    .poll_reply(cx, self.id, &inner.session, &inner.counters)
            })
            .await
            .map_err(|error| match error {
                NoReply::Backlog => RequestError::Backlog,
                NoReply::End(ending) => RequestError::Closed(self.channel.no_reply(ending)),
            })
        };
        let reply = tokio::time::timeout(self.timeout, exchange)
            .await
            .map_err(|_| {
                inner.session.tally.one(Count::RequestsTimedOut);
                RequestError::Timeout(self.timeout)
            })??;
        drop(pending);
        if reply.event() == FAULT {
            let fault = control::decode_fault(&reply);
            let code = fault.as_ref().map_or("", |fault| fault.code.as_str());
            inner.session.tally.word(Words::FaultsReceived, code);
            return Err(match fault {
                Ok(fault) if fault.code == Fault::NO_HANDLER => RequestError::NoHandler,
                Ok(fault) => RequestError::Fault(fault),
                Err(_) => RequestError::Fault(Fault::new(
                    Fault::INTERNAL,
                    "the peer sent a fault without sense",
                )),
            });
        }
        reply.data().map_err(RequestError::Decode)
    }
}

impl<R: DeserializeOwned + 'static> IntoFuture for Request<R> {
    type Output = Result<R, RequestError>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

impl<R> fmt::Debug for Request<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("id", &self.id)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Forgets a reply that is no longer awaited and tells the peer, if it has not come.
struct Pending<'a> {
    channel: &'a Channel,
    id: u64,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let inner = &self.channel.inner;
        if inner.inbox.forget_reply(self.id)
            && let Ok(cancel) = control::protocol(CANCEL, &(), Some(self.id))
        {
            let _ = inner.outbox.force(&cancel);
        }
    }
}

/// Why a request has no reply.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The peer has no handler for the event.
    #[error("the peer has no handler for this event")]
    NoHandler,
    /// The peer's handler refused or failed.
    #[error("the peer refused: {0}")]
    Fault(Fault),
    /// The reply does not fit the type asked for.
    #[error(transparent)]
    Decode(DecodeError),
    /// No reply in time.
    #[error("no reply within {0:?}")]
    Timeout(Duration),
    /// More unread messages stand before the reply than `Limits::backlog_messages` or
    /// `Limits::backlog_bytes` allow: read them with `recv` first.
    #[error("too many unread messages stand before the reply")]
    Backlog,
    /// The request could not be sent.
    #[error(transparent)]
    Send(SendError),
    /// The channel ended before the reply came.
    #[error("channel closed: {0}")]
    Closed(CloseReason),
}

impl RequestError {
    /// Whether the deadline passed.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout(_))
    }
}
