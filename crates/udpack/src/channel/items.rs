//! Streams of items: sent with a request, as its answer, or both.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, Sleep};

use crate::channel::calls::{Next, Role};
use crate::channel::request::{Pending, RequestError};
use crate::channel::{Channel, SendError};
use crate::wire::code::Fault;
use crate::wire::control::{self, ProtocolEvent};
use crate::wire::message::{self, EncodeError, Encoded};

/// A stream of items that belongs to a request.
///
/// On the requester's side it is the answer, from [`Request::items`](crate::Request::items). It ends when the
/// handler's stream ends; a fault, the deadline and the channel's end are errors, and nothing follows an error. A
/// handler takes it as an argument: the items that the requester sends with
/// [`with_items`](crate::Request::with_items). It ends with the requester's stream. For a request without a stream it
/// stays pending until the request is answered, cancelled or timed out.
///
/// At most 256 KiB of unread items are buffered here; then their sender waits.
///
/// # Drop
/// On the requester's side dropping it cancels the request. In a handler dropping it only stops the reading.
pub struct Items<T> {
    channel: Channel,
    role: Role,
    id: u64,
    /// Set on the requester's side.
    pending: Option<Pending>,
    pump: Option<Pump>,
    deadline: Option<(Pin<Box<Sleep>>, Duration)>,
    /// Credit that waits for room in the outbox.
    granting: Option<BoxFuture<'static, ()>>,
    done: bool,
    item: PhantomData<fn() -> T>,
}

/// A future that sends the items of a stream.
pub(crate) type Pump = BoxFuture<'static, Result<(), RequestError>>;

/// Sends encoded `items` of a request as the other side returns credit; the requester then sends the end of the
/// stream. Ready when all are queued or the request is over.
pub(crate) fn pump<S>(channel: Channel, role: Role, id: u64, items: S) -> Pump
where
    S: Stream<Item = Result<Vec<u8>, EncodeError>> + Send + 'static,
{
    Box::pin(async move {
        let mut items = pin!(items);
        while let Some(item) = items.next().await {
            if !send_item(&channel, role, id, item).await? {
                return Ok(());
            }
        }
        if role == Role::Asker
            && let Ok(end) = control::frame(ProtocolEvent::End, &(), Some(id))
        {
            let sent = channel.send_frame(end).await;
            sent.map_err(RequestError::Send)?;
        }
        Ok(())
    })
}

/// Sends one item; waits for credit and for room in the queue. Returns `false` if the request is over.
pub(crate) async fn send_item(
    channel: &Channel,
    role: Role,
    id: u64,
    item: Result<Vec<u8>, EncodeError>,
) -> Result<bool, RequestError> {
    let limit = channel.carrier().frame_limit();
    let frame = item
        .and_then(|data| message::encode_raw(role.item().name(), &data, id, limit))
        .map_err(|error| RequestError::Send(SendError::Encode(error)))?;
    let spend = channel.until(|calls| calls.spend(role, id, frame.len()));
    if !spend.await.map_err(|error| channel.no_answer(error))? {
        return Ok(false);
    }
    let sent = channel.send_frame(frame).await;
    sent.map_err(RequestError::Send)?;
    Ok(true)
}

impl<T> Items<T> {
    pub(crate) fn asked(
        pending: Pending,
        pump: Option<Pump>,
        deadline: Option<(Instant, Duration)>,
    ) -> Self {
        let sleep = |(begun, limit): (Instant, Duration)| {
            let end = begun.checked_add(limit)?;
            Some((Box::pin(tokio::time::sleep_until(end)), limit))
        };
        Self {
            channel: pending.channel.clone(),
            role: Role::Asker,
            id: pending.id,
            pending: Some(pending),
            pump,
            deadline: deadline.and_then(sleep),
            granting: None,
            done: false,
            item: PhantomData,
        }
    }

    /// The stream that was sent with a request, for its handler; an empty stream for any other message.
    pub(crate) fn answering(channel: Channel, id: Option<u64>) -> Self {
        Self {
            channel,
            role: Role::Answerer,
            id: id.unwrap_or_default(),
            pending: None,
            pump: None,
            deadline: None,
            granting: None,
            done: id.is_none(),
            item: PhantomData,
        }
    }

    /// Returns credit for taken items, as far as the outbox has room.
    fn poll_grant(&mut self, cx: &mut Context<'_>, all: bool) {
        let inner = &self.channel.inner;
        loop {
            if let Some(granting) = &mut self.granting {
                if granting.as_mut().poll(cx).is_pending() {
                    return;
                }
                self.granting = None;
            }
            let (role, id) = (self.role, self.id);
            let Some(bytes) = inner.inbox.calls(|calls| calls.grant(role, id, all)) else {
                return;
            };
            let Ok(frame) = control::frame(role.grant(), &bytes, Some(id)) else {
                return;
            };
            let limit = inner.carrier.frame_limit();
            let frame = Encoded::from_frame(frame);
            match inner.outbox.try_encoded(&frame, limit) {
                Ok(true) => {}
                Ok(false) => {
                    let outbox = inner.outbox.clone();
                    self.granting = Some(Box::pin(async move {
                        // Reading reports a channel that has ended.
                        let _ = outbox.encoded(&frame, limit).await;
                    }));
                }
                // The channel has ended; reading reports it.
                Err(_) => return,
            }
        }
    }

    fn over(&mut self) {
        self.done = true;
        self.pump = None;
        self.pending = None;
    }

    fn failed(&mut self, error: RequestError) -> Poll<Option<Result<T, RequestError>>> {
        self.over();
        Poll::Ready(Some(Err(error)))
    }
}

impl<T: DeserializeOwned> Items<T> {
    /// The next item; `None` after the last.
    ///
    /// # Errors
    /// The errors of a request; nothing follows an error.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future loses no item.
    pub async fn next(&mut self) -> Option<Result<T, RequestError>> {
        StreamExt::next(self).await
    }
}

impl<T: DeserializeOwned> Stream for Items<T> {
    type Item = Result<T, RequestError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.done {
            return Poll::Ready(None);
        }
        if let Some(pump) = &mut this.pump {
            match pump.as_mut().poll(cx) {
                Poll::Ready(Ok(())) => this.pump = None,
                Poll::Ready(Err(error)) => return this.failed(error),
                Poll::Pending => {}
            }
        }
        let inner = this.channel.inner.clone();
        let (role, id) = (this.role, this.id);
        let next = inner
            .inbox
            .poll_calls(cx, &inner.carrier, &inner.counters, |calls| {
                calls.next(role, id)
            });
        match next {
            Poll::Ready(Ok(Next::Item(item))) => {
                this.poll_grant(cx, false);
                match item.data() {
                    Ok(item) => Poll::Ready(Some(Ok(item))),
                    Err(error) => this.failed(RequestError::Decode(error)),
                }
            }
            Poll::Ready(Ok(Next::Last(last))) => {
                if ProtocolEvent::Fault.is(&last) {
                    let deadline = this.deadline.as_ref();
                    let deadline = deadline.map(|(sleep, limit)| (sleep.deadline(), *limit));
                    let error = this.channel.refused(&last, deadline);
                    return this.failed(error);
                }
                match last.data::<()>() {
                    Ok(()) => {
                        this.over();
                        Poll::Ready(None)
                    }
                    Err(error) => this.failed(RequestError::Decode(error)),
                }
            }
            Poll::Ready(Ok(Next::End)) => {
                this.over();
                Poll::Ready(None)
            }
            Poll::Ready(Err(error)) => {
                let error = this.channel.no_answer(error);
                this.failed(error)
            }
            Poll::Pending => {
                this.poll_grant(cx, true);
                let Some((sleep, limit)) = &mut this.deadline else {
                    return Poll::Pending;
                };
                let limit = *limit;
                std::task::ready!(sleep.as_mut().poll(cx));
                let error = this.channel.too_late(limit);
                this.failed(error)
            }
        }
    }
}

impl<T> fmt::Debug for Items<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Items")
            .field("role", &self.role)
            .field("id", &self.id)
            .field("done", &self.done)
            .finish_non_exhaustive()
    }
}

/// A handler's answer that consists of many items, to be read with [`Request::items`](crate::Request::items).
///
/// The stream is polled as the requester takes items, at most 256 KiB ahead of it; the end of the stream ends the
/// answer. When the requester cancels, or its deadline passes, the stream is dropped. `Timeouts::handler` applies
/// until the handler returns this value, not to the stream.
#[must_use = "a stream is sent when the handler returns it"]
pub struct Streaming {
    pub(crate) items: Pin<Box<dyn Stream<Item = Result<Vec<u8>, Fault>> + Send>>,
}

impl Streaming {
    /// An answer with the items of this stream. An item that cannot be encoded ends the answer with a fault.
    pub fn new<S>(items: S) -> Self
    where
        S: Stream + Send + 'static,
        S::Item: Serialize + Send,
    {
        Self::fallible(items.map(Ok::<_, Fault>))
    }

    /// An answer with the items of a stream that may fail: its first error is the request's fault.
    pub fn fallible<S, T, E>(items: S) -> Self
    where
        S: Stream<Item = Result<T, E>> + Send + 'static,
        T: Serialize,
        E: Into<Fault>,
    {
        let encode = |item: T| {
            message::encode_data(&item).map_err(|error| Fault::unsendable("an item", &error))
        };
        Self {
            items: Box::pin(items.map(move |item| item.map_err(Into::into).and_then(encode))),
        }
    }
}

impl fmt::Debug for Streaming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streaming").finish_non_exhaustive()
    }
}
