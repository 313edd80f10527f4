//! [`Request`]: one request on a channel and its reply.

use std::fmt;
use std::future::{IntoFuture, poll_fn};
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::channel::calls::{Calls, Reply, Role};
use crate::channel::inbox::{Ending, NoReply};
use crate::channel::items::{Items, Pump, pump};
use crate::channel::{Channel, RecvError, SendError, application_event};
use crate::metrics::{Count, Words};
use crate::wire::code::{CloseCode, CloseReason, Fault};
use crate::wire::control::{self, Decode, ProtocolEvent};
use crate::wire::event::Event;
use crate::wire::message::{self, DecodeError, Encoded, Message};

/// On a short path a deadline passes on both sides in the same tick of the clock. The requester gets the same error
/// whichever timer fires first.
const TICK: Duration = Duration::from_millis(10);

/// Initial capacity of a request's frame, in bytes.
const FRAME: usize = 128;

impl Channel {
    /// Asks the peer and waits for its answer: awaiting the returned builder gives the reply.
    ///
    /// The request is queued when the builder is first polled. Events that arrive before the reply wait for
    /// `recv`, in a backlog bounded by `Limits::backlog_messages`; when that is full the request fails with
    /// [`RequestError::Backlog`] instead of waiting for ever.
    ///
    /// To await it the answer's type must be `'static`: a function that is generic over it says
    /// `R: DeserializeOwned + 'static`.
    ///
    /// # Cancel safety
    /// Dropping it tells the peer that the answer is no longer wanted.
    pub fn request<T: Serialize + ?Sized, R: DeserializeOwned>(
        &self,
        event: &str,
        data: &T,
    ) -> Request<R> {
        self.ask(event, data, |reply| reply.data())
    }

    /// Sends a message and waits until the peer's handler has returned: a request whose reply is not decoded.
    ///
    /// Succeeds with any reply that is not a fault. Errors and the effect of dropping are those of
    /// [`request`](Self::request).
    pub fn send_acked<T: Serialize + ?Sized>(&self, event: &str, data: &T) -> Request<()> {
        self.ask(event, data, |_| Ok(()))
    }

    /// Sends a typed event; see [`send`](Self::send).
    ///
    /// # Errors
    /// As [`send`](Self::send).
    ///
    /// # Cancel safety
    /// As [`send`](Self::send).
    pub async fn emit<E: Event + Sync>(&self, event: &E) -> Result<(), SendError> {
        self.send(E::NAME, event).await
    }

    /// Asks with a typed event and waits for its reply; see [`request`](Self::request).
    pub fn call<E: Event>(&self, event: &E) -> Request<E::Reply> {
        self.request(E::NAME, event)
    }

    fn ask<T: Serialize + ?Sized, R>(
        &self,
        event: &str,
        data: &T,
        decode: fn(&Message) -> Result<R, DecodeError>,
    ) -> Request<R> {
        let id = self.inner.next_request.fetch_add(1, Ordering::Relaxed);
        let limit = self.inner.carrier.frame_limit();
        let mut frame = BytesMut::with_capacity(FRAME);
        let encoded = application_event(event).and_then(|()| {
            message::encode(&mut frame, event, data, Some(id), limit).map_err(SendError::Encode)
        });
        Request {
            channel: self.clone(),
            id,
            frame: encoded.map(|_| frame),
            timeout: None,
            pump: None,
            decode,
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

    pub(crate) fn no_answer(&self, error: NoReply) -> RequestError {
        match error {
            NoReply::Backlog { most, of } => RequestError::Backlog { most, of },
            NoReply::End(ending) => RequestError::Closed(self.no_reply(ending)),
        }
    }

    /// The error for the peer's `$fault` to a request with this deadline.
    pub(crate) fn refused(
        &self,
        fault: &Message,
        deadline: Option<(Instant, Duration)>,
    ) -> RequestError {
        let counts = &self.inner.carrier.counts;
        match Fault::decode(fault) {
            Ok(fault) => {
                counts.word(Words::FaultsReceived, &fault.code);
                match fault.code.as_str() {
                    Fault::NO_HANDLER => RequestError::NoHandler,
                    Fault::CANCELLED => RequestError::Cancelled,
                    Fault::TIMEOUT => match deadline {
                        Some((until, limit)) if until <= Instant::now() + TICK => {
                            self.too_late(limit)
                        }
                        _ => RequestError::Fault(fault),
                    },
                    _ => RequestError::Fault(fault),
                }
            }
            // The inbox has refused such a fault before.
            Err(error) => RequestError::Fault(Fault::new(Fault::INTERNAL, error.to_string())),
        }
    }

    /// The error for a reply that did not come in time.
    pub(crate) fn too_late(&self, limit: Duration) -> RequestError {
        self.inner.carrier.counts.one(Count::RequestsTimedOut);
        RequestError::Timeout(limit)
    }

    /// Reads into the bounded backlog until `look` returns a value.
    pub(crate) async fn until<T>(
        &self,
        mut look: impl FnMut(&mut Calls) -> Option<T>,
    ) -> Result<T, NoReply> {
        let inner = &*self.inner;
        poll_fn(|cx| {
            inner
                .inbox
                .poll_calls(cx, &inner.carrier, &inner.counters, &mut look)
        })
        .await
    }
}

/// A request to be sent: await it for the reply. Made by [`Channel::request`].
#[must_use = "a request is sent when it is awaited"]
pub struct Request<R> {
    channel: Channel,
    id: u64,
    frame: Result<BytesMut, SendError>,
    timeout: Option<Duration>,
    pump: Option<Pump>,
    decode: fn(&Message) -> Result<R, DecodeError>,
}

impl<R> Request<R> {
    /// Fails after this long with [`RequestError::Timeout`]; the peer is told and stops its handler. Default
    /// `Timeouts::request`; none for a request with a stream of items in either direction.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sends a stream of items behind the request: the peer's handler reads them with [`Items`].
    ///
    /// They are sent while the request (or its [`items`](Self::items)) is polled, at most 256 KiB ahead of the peer's
    /// handler. When the answer comes before the end of the stream, the rest is not sent. An item that cannot be
    /// encoded fails the request.
    pub fn with_items<S>(mut self, stream: S) -> Self
    where
        S: Stream + Send + 'static,
        S::Item: Serialize + Send,
    {
        let items = stream.map(|item| message::encode_data(&item));
        self.pump = Some(pump(self.channel.clone(), Role::Asker, self.id, items));
        self
    }

    async fn run(mut self) -> Result<R, RequestError> {
        if let Some(pump) = self.pump.take() {
            return Box::pin(self.run_with(pump)).await;
        }
        let channel = self.channel.clone();
        let limit = self
            .timeout
            .unwrap_or(channel.inner.carrier.timeouts.request);
        let deadline = Instant::now()
            .checked_add(limit)
            .map(|until| (until, limit));
        let (mut pending, mut frame) = self.begin(Some(limit), false)?;
        if !pending.try_send(&mut frame)? {
            // Boxed, because most requests find room at once and do not need this future.
            let slow = Box::pin(pending.send(frame));
            match deadline {
                None => slow.await?,
                Some((until, limit)) => tokio::time::timeout_at(until, slow)
                    .await
                    .map_err(|_| channel.too_late(limit))??,
            }
        }
        let (inner, id) = (&*channel.inner, self.id);
        let reply = poll_fn(|cx| {
            let (carrier, counters) = (&inner.carrier, &inner.counters);
            let look = |calls: &mut Calls| calls.reply(id);
            match inner.inbox.poll_calls(cx, carrier, counters, look) {
                Poll::Ready(reply) => Poll::Ready(Ok(reply)),
                Poll::Pending => match deadline {
                    None => Poll::Pending,
                    Some((until, limit)) => inner.inbox.poll_until(until).map(|()| Err(limit)),
                },
            }
        });
        let reply = reply.await.map_err(|limit| channel.too_late(limit))?;
        let reply = reply.map_err(|error| channel.no_answer(error))?;
        pending.over = matches!(reply, Reply::Message(_));
        drop(pending);
        self.decoded(reply, deadline)
    }

    /// Sends a stream of items with the request.
    async fn run_with(mut self, mut pump: Pump) -> Result<R, RequestError> {
        let channel = self.channel.clone();
        let limit = self.timeout;
        let deadline = limit.and_then(|limit| Some((Instant::now().checked_add(limit)?, limit)));
        let exchange = async {
            let _pending = self.send(limit, false).await?;
            let id = self.id;
            let mut reply = std::pin::pin!(channel.until(|calls| calls.reply(id)));
            let reply = tokio::select! {
                biased;
                reply = &mut reply => reply,
                sent = &mut pump => {
                    sent?;
                    reply.await
                }
            };
            reply.map_err(|error| channel.no_answer(error))
        };
        let reply = match limit {
            None => exchange.await?,
            Some(limit) => tokio::time::timeout(limit, exchange)
                .await
                .map_err(|_| channel.too_late(limit))??,
        };
        self.decoded(reply, deadline)
    }

    fn decoded(
        &self,
        reply: Reply,
        deadline: Option<(Instant, Duration)>,
    ) -> Result<R, RequestError> {
        match reply {
            Reply::Stream => Err(RequestError::Stream),
            Reply::Message(fault) if ProtocolEvent::Fault.is(&fault) => {
                Err(self.channel.refused(&fault, deadline))
            }
            Reply::Message(reply) => (self.decode)(&reply).map_err(RequestError::Decode),
        }
    }

    /// Registers the request, and returns its frame.
    fn begin(
        &mut self,
        limit: Option<Duration>,
        stream: bool,
    ) -> Result<(Pending, BytesMut), RequestError> {
        let frame = std::mem::replace(&mut self.frame, Err(SendError::Finished));
        let mut frame = frame.map_err(RequestError::Send)?;
        let inner = &self.channel.inner;
        if let Some(limit) = limit {
            message::add_deadline(&mut frame, limit, inner.carrier.frame_limit())
                .map_err(|error| RequestError::Send(SendError::Encode(error)))?;
        }
        inner.carrier.counts.one(Count::RequestsSent);
        inner.inbox.calls(|calls| calls.ask(self.id, stream));
        let pending = Pending {
            channel: self.channel.clone(),
            id: self.id,
            sent: false,
            over: false,
        };
        Ok((pending, frame))
    }

    /// Queues the request. Dropping the returned value tells the peer.
    async fn send(
        &mut self,
        limit: Option<Duration>,
        stream: bool,
    ) -> Result<Pending, RequestError> {
        let (mut pending, frame) = self.begin(limit, stream)?;
        pending.send(frame).await?;
        Ok(pending)
    }
}

impl Request<()> {
    /// Asks for a stream of items instead of one reply. Returns when the request is queued; the items report later
    /// errors.
    ///
    /// At most 256 KiB of the peer's items are buffered here. A [`timeout`](Self::timeout) covers the time until the
    /// last item.
    ///
    /// # Errors
    /// When the request cannot be sent.
    ///
    /// # Cancel safety
    /// Dropping the future or the items tells the peer that no more are wanted.
    pub async fn items<T: DeserializeOwned>(mut self) -> Result<Items<T>, RequestError> {
        let limit = self.timeout;
        let begun = Instant::now();
        let channel = self.channel.clone();
        let send = self.send(limit, true);
        let pending = match limit {
            None => send.await?,
            Some(limit) => tokio::time::timeout(limit, send)
                .await
                .map_err(|_| channel.too_late(limit))??,
        };
        Ok(Items::asked(
            pending,
            self.pump,
            limit.map(|limit| (begun, limit)),
        ))
    }
}

impl<R: 'static> IntoFuture for Request<R> {
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

/// A pending request. Dropping it before the answer tells the peer that the answer is no longer wanted.
pub(crate) struct Pending {
    pub(crate) channel: Channel,
    pub(crate) id: u64,
    /// Whether the request is queued, so that the peer will receive it.
    sent: bool,
    /// Whether the reply was taken, so that dropping has no effect.
    over: bool,
}

impl Pending {
    /// Queues the request if there is room. After that, dropping the value tells the peer.
    fn try_send(&mut self, frame: &mut BytesMut) -> Result<bool, RequestError> {
        let queued = self.channel.try_send_frame(frame);
        self.sent = queued.map_err(RequestError::Send)?;
        Ok(self.sent)
    }

    /// Queues the request as soon as there is room.
    async fn send(&mut self, frame: BytesMut) -> Result<(), RequestError> {
        let encoded = Encoded::from_frame(frame.freeze());
        let sent = self.channel.send_encoded(&encoded).await;
        sent.map_err(RequestError::Send)?;
        self.sent = true;
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let inner = &self.channel.inner;
        if inner.inbox.calls(|calls| calls.forget(self.id))
            && self.sent
            && let Ok(cancel) = control::frame(ProtocolEvent::Cancel, &(), Some(self.id))
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
    /// The reply does not decode into the requested type.
    #[error(transparent)]
    Decode(DecodeError),
    /// The peer's handler was stopped before it answered.
    #[error("the request was cancelled")]
    Cancelled,
    /// The answer is a stream: ask with [`Request::items`].
    #[error("the answer is a stream of items, not one reply")]
    Stream,
    /// No reply in time.
    #[error("no reply within {0:?}")]
    Timeout(Duration),
    /// More unread messages precede the reply, or the item or credit of a stream, than `Limits::backlog_messages` or
    /// `Limits::backlog_bytes` allow: read them with `recv` first.
    #[error("too many unread messages stand before the reply: {most} {of} may wait")]
    Backlog {
        /// The limit that was reached.
        most: usize,
        /// The unit of the limit: `"messages"` or `"bytes"`.
        of: &'static str,
    },
    /// The request could not be sent.
    #[error(transparent)]
    Send(SendError),
    /// The channel ended before the reply came.
    #[error("channel closed: {0}")]
    Closed(CloseReason),
}

impl RequestError {
    /// Whether the deadline passed, here or at the peer.
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::Timeout(_) => true,
            Self::Fault(fault) => fault.code == Fault::TIMEOUT,
            _ => false,
        }
    }
}
