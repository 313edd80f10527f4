//! [`Channel`]: ordered messages both ways on one bidirectional QUIC stream.

pub(crate) mod calls;
pub(crate) mod carrier;
pub(crate) mod channel_core;
pub(crate) mod history;
pub(crate) mod inbox;
pub(crate) mod items;
pub(crate) mod outbox;
pub(crate) mod overflow;
pub(crate) mod pace;
pub(crate) mod places;
pub(crate) mod request;
pub(crate) mod resume;
pub(crate) mod write_scheduler;
pub(crate) mod writer;

use std::any::Any;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::channel::carrier::{Carrier, ChannelKey, End, SessionConnection, lost};
use crate::channel::channel_core::ChannelCore;
use crate::channel::inbox::{Ending, Inbox};
use crate::channel::outbox::{Outbox, PushError};
use crate::channel::writer::Way;
use crate::metrics::speed::{Counters, SpeedMeter, Stats};
use crate::metrics::{Count, Words};
use crate::wire::code::{CloseCode, CloseReason, Fault};
use crate::wire::config::Priority;
use crate::wire::control::{self, ProtocolEvent, RoomPosition};
use crate::wire::message::{DecodeError, EncodeError, Encoded, Message};

/// A named, ordered, bidirectional exchange of `[event, data]` messages with one peer.
///
/// A handle: clones share one channel. Messages arrive in the order they were sent, without gaps and
/// without duplicates, for as long as the connection lives. Channels do not hold each other up.
///
/// # Drop
/// When the last clone is dropped, queued messages are still sent, then the sending direction ends in order (the
/// peer's `recv` returns `Ok(None)`), and messages that still arrive are refused. To know that everything arrived,
/// call [`finish`](Self::finish) first.
#[derive(Clone)]
pub struct Channel {
    pub(crate) inner: Arc<Inner>,
}

/// The settings of a channel that both sides know from its `$open`.
pub(crate) struct Opened {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) meta: Option<Bytes>,
    pub(crate) priority: Priority,
    pub(crate) resumable: bool,
    /// How far its opener had come in rooms, as it said.
    pub(crate) since: Vec<RoomPosition>,
}

pub(crate) struct Inner {
    pub(crate) carrier: Arc<Carrier>,
    /// A value that the session attaches to its channel.
    owner: Box<dyn Any + Send + Sync>,
    /// The connection on which the channel began. The reference is weak: a handle in a program must not keep the
    /// unsent data of a lost connection.
    conn: Weak<SessionConnection>,
    opened: Opened,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) end: Arc<End>,
    pub(crate) next_request: AtomicU64,
    /// The channel's membership in rooms, created with the first room; only on a server.
    member: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.outbox.finish(None);
        let end = Ending::Closed(CloseReason::local(
            CloseCode::NORMAL,
            "the channel was dropped",
        ));
        self.inbox.stop(CloseCode::NORMAL, end, &self.carrier);
        self.carrier.prune();
    }
}

/// A weak handle: it does not keep the channel open.
pub(crate) struct WeakChannel(Weak<Inner>);

impl WeakChannel {
    pub(crate) fn upgrade(&self) -> Option<Channel> {
        self.0.upgrade().map(|inner| Channel { inner })
    }
}

impl Channel {
    pub(crate) fn downgrade(&self) -> WeakChannel {
        WeakChannel(Arc::downgrade(&self.inner))
    }

    /// Puts a channel over a stream; its writer runs until the channel or the connection ends. `own` says that
    /// this side opened it.
    pub(crate) fn start(
        carrier: Arc<Carrier>,
        owner: Box<dyn Any + Send + Sync>,
        opened: Opened,
        own: bool,
        (way, number): (Way, u64),
        inbox: Inbox,
        counters: Arc<Counters>,
    ) -> Self {
        let key = ChannelKey { own, id: opened.id };
        let limits = &carrier.limits;
        let (bytes, messages, budget) = if opened.resumable {
            let budget = carrier.receive.budget.clone();
            (limits.replay_bytes, limits.replay_messages, Some(budget))
        } else {
            (limits.outbound_bytes, limits.outbound_messages, None)
        };
        let outbox = Outbox::new(
            bytes,
            messages,
            opened.priority,
            budget,
            counters.clone(),
            carrier.counts.clone(),
        );
        let inbox = Arc::new(inbox);
        let end = Arc::new(End::default());
        let core = Arc::new(ChannelCore {
            key,
            priority: opened.priority,
            name: (!own && opened.resumable).then(|| opened.name.as_str().into()),
            open: way.first.clone().filter(|_| own && opened.resumable),
            outbox: outbox.clone(),
            inbox: inbox.clone(),
            counters: counters.clone(),
            end: end.clone(),
            registration: carrier.next_registration(),
            connection_number: AtomicU64::new(number),
        });
        if own {
            inbox.begin_at(&opened.since);
        }
        carrier.register(core.registration, &core);
        carrier.counts.one(Count::Channels);
        let first = way.conn.clone();
        core.spawn_writer(&carrier, way);
        inbox.belongs_to(key, opened.resumable);
        if carrier.client && !opened.resumable {
            carrier.tie(&outbox, &inbox);
        }
        if opened.resumable {
            carrier.keep(&core);
            // The kept channels have ended before this.
            if let Some(reason) = carrier.end.get() {
                core.fail(&carrier, reason);
            }
            let (conn, now) = carrier.current();
            if own && now != number {
                // The connection was replaced in the meantime, when this channel was not yet kept.
                carrier.tasks.spawn(core.reopen(carrier.clone(), conn, now));
            }
        }
        Self {
            inner: Arc::new(Inner {
                carrier,
                owner,
                conn: Arc::downgrade(&first),
                opened,
                outbox,
                inbox,
                counters,
                end,
                next_request: AtomicU64::new(1),
                member: OnceLock::new(),
            }),
        }
    }

    /// The name it was opened with.
    pub fn name(&self) -> &str {
        &self.inner.opened.name
    }

    /// The number that the opener gave the channel.
    pub fn id(&self) -> u64 {
        self.inner.opened.id
    }

    /// The data that the opener sent in `$open`, if any.
    ///
    /// # Errors
    /// When the data does not decode into `T`.
    pub fn meta<T: DeserializeOwned>(&self) -> Result<Option<T>, DecodeError> {
        self.inner
            .opened
            .meta
            .as_deref()
            .map(crate::wire::message::decode_data)
            .transpose()
    }

    /// How far this side has come in the rooms with a history that the channel is in, as of the message that was taken
    /// last: what the next channel is opened with ([`OpenChannel::since`](crate::OpenChannel::since)) so that it goes on
    /// right behind it. Empty at a server, and where the server keeps no history.
    pub fn positions(&self) -> Vec<RoomPosition> {
        self.inner.inbox.positions()
    }

    /// The priority that the opener chose; it applies to both directions.
    pub fn priority(&self) -> Priority {
        self.inner.opened.priority
    }

    pub(crate) fn carrier(&self) -> &Arc<Carrier> {
        &self.inner.carrier
    }

    pub(crate) fn owner(&self) -> &(dyn Any + Send + Sync) {
        &*self.inner.owner
    }

    pub(crate) fn outbox(&self) -> &Arc<Outbox> {
        &self.inner.outbox
    }

    /// How far its opener had come in rooms, as it said.
    pub(crate) fn presented(&self) -> &[RoomPosition] {
        &self.inner.opened.since
    }

    pub(crate) fn member(&self) -> &OnceLock<Box<dyn Any + Send + Sync>> {
        &self.inner.member
    }

    /// Sends one message. Structs are encoded as maps.
    ///
    /// Returns when the message is queued; waits while the queue is full (`Limits::outbound_bytes`,
    /// `Limits::outbound_messages`) because the peer or the link is slow.
    ///
    /// # Errors
    /// When the channel is over, or the message cannot be sent at all: reserved or invalid event name, too large for
    /// the peer's frame limit, data that cannot be encoded.
    ///
    /// # Cancel safety
    /// A dropped future has either queued the whole message or nothing.
    pub async fn send<T: Serialize + Sync + ?Sized>(
        &self,
        event: &str,
        data: &T,
    ) -> Result<(), SendError> {
        application_event(event)?;
        let Inner {
            outbox, carrier, ..
        } = &*self.inner;
        let limit = carrier.frame_limit();
        let queued = match outbox.try_message(event, data, None, limit) {
            Ok(true) => return Ok(()),
            // Boxed, so that the future of a message that finds room stays small: moving it costs more than
            // the message.
            Ok(false) => Box::pin(outbox.message(event, data, None, limit)).await,
            Err(error) => Err(error),
        };
        queued.map_err(|error| self.send_error(error))
    }

    /// Sends one message if the queue has room now; returns `Ok(false)` if it has none.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn try_send<T: Serialize + ?Sized>(
        &self,
        event: &str,
        data: &T,
    ) -> Result<bool, SendError> {
        application_event(event)?;
        let limit = self.inner.carrier.frame_limit();
        self.inner
            .outbox
            .try_message(event, data, None, limit)
            .map_err(|error| self.send_error(error))
    }

    /// Sends a message that was encoded once for many channels.
    ///
    /// # Errors
    /// When the channel is over or the message is too large for this peer.
    ///
    /// # Cancel safety
    /// As [`send`](Self::send).
    pub async fn send_encoded(&self, message: &Encoded) -> Result<(), SendError> {
        let limit = self.inner.carrier.frame_limit();
        let queued = self.inner.outbox.encoded(message, limit).await;
        queued.map_err(|error| self.send_error(error))
    }

    /// Sends an encoded message if the queue has room now; returns `Ok(false)` if it has none.
    ///
    /// # Errors
    /// As [`send_encoded`](Self::send_encoded).
    pub fn try_send_encoded(&self, message: &Encoded) -> Result<bool, SendError> {
        let limit = self.inner.carrier.frame_limit();
        self.inner
            .outbox
            .try_encoded(message, limit)
            .map_err(|error| self.send_error(error))
    }

    /// Sends `header` with `payload` added as a binary value under `key`, without serde and, where it is longer
    /// than 4 KiB, without a copy of the payload. The peer reads it with [`Message::bulk`].
    ///
    /// # Errors
    /// As [`send`](Self::send); `header` must encode to a map.
    ///
    /// # Cancel safety
    /// As [`send`](Self::send).
    pub async fn send_bulk<T: Serialize + Sync + ?Sized>(
        &self,
        event: &str,
        header: &T,
        key: &str,
        payload: Bytes,
    ) -> Result<(), SendError> {
        application_event(event)?;
        let limit = self.inner.carrier.frame_limit();
        let outbox = &self.inner.outbox;
        let queued = outbox.bulk(event, header, key, &payload, limit).await;
        queued.map_err(|error| self.send_error(error))
    }

    /// The largest message that the peer accepts, in bytes without the prefix of its frame. Sending a larger one
    /// fails.
    pub fn frame_limit(&self) -> usize {
        self.inner.carrier.frame_limit()
    }

    /// The next message; `Ok(None)` after the peer has finished or closed with `normal`.
    ///
    /// Several clones may wait at once; each message goes to one of them. Replies are not returned here.
    ///
    /// # Errors
    /// When the channel ended in any other way: closed with a code, reset, connection lost, or the peer broke the
    /// protocol (then the channel is closed with the code of that fault).
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future loses no byte and no message.
    pub async fn recv(&self) -> Result<Option<Message>, RecvError> {
        let inner = &*self.inner;
        match poll_fn(|cx| {
            inner
                .inbox
                .poll_recv(cx, &inner.carrier, &inner.counters, None)
        })
        .await
        {
            Ok(message) => Ok(Some(message)),
            Err(ending) => self.ended(ending),
        }
    }

    /// Answers a request received with [`recv`](Self::recv). For a message that is no request: does nothing.
    ///
    /// # Errors
    /// As [`send`](Self::send). When the answer itself cannot be encoded, the peer gets a fault.
    pub async fn reply<T: Serialize + Sync + ?Sized>(
        &self,
        request: &Message,
        data: &T,
    ) -> Result<(), SendError> {
        match request.id() {
            Some(id) => self.answer(id, data).await,
            None => Ok(()),
        }
    }

    /// Refuses a request received with [`recv`](Self::recv). For a message that is no request: does nothing.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub async fn fault(&self, request: &Message, fault: &Fault) -> Result<(), SendError> {
        match request.id() {
            Some(id) => self.send_fault(fault, id).await,
            None => Ok(()),
        }
    }

    /// As [`try_send_encoded`](Self::try_send_encoded), of a frame that is taken if it is queued.
    pub(crate) fn try_send_frame(&self, frame: &mut BytesMut) -> Result<bool, SendError> {
        let limit = self.inner.carrier.frame_limit();
        let queued = self.inner.outbox.try_frame(frame, limit);
        queued.map_err(|error| self.send_error(error))
    }

    /// Queues a whole frame of the protocol; waits for room as [`send`](Self::send) does.
    pub(crate) async fn send_frame(&self, frame: Bytes) -> Result<(), SendError> {
        self.send_encoded(&Encoded::from_frame(frame)).await
    }

    /// Answers a request with data that is encoded already; waits for room as [`send`](Self::send) does.
    pub(crate) async fn answer_raw(&self, id: u64, data: &[u8]) -> Result<(), SendError> {
        let limit = self.inner.carrier.frame_limit();
        let queued = self
            .inner
            .outbox
            .raw(ProtocolEvent::Reply.name(), data, id, limit)
            .await;
        queued.map_err(|error| self.send_error(error))
    }

    async fn answer<T: Serialize + Sync + ?Sized>(
        &self,
        id: u64,
        data: &T,
    ) -> Result<(), SendError> {
        let limit = self.inner.carrier.frame_limit();
        let queued = self
            .inner
            .outbox
            .message(ProtocolEvent::Reply.name(), data, Some(id), limit)
            .await;
        match queued.map_err(|error| self.send_error(error)) {
            Err(SendError::Encode(error)) => {
                let fault = Fault::unsendable("the reply", &error);
                self.send_fault(&fault, id).await?;
                Err(SendError::Encode(error))
            }
            other => other,
        }
    }

    pub(crate) async fn send_fault(&self, fault: &Fault, id: u64) -> Result<(), SendError> {
        let carrier = &self.inner.carrier;
        carrier.counts.word(Words::FaultsSent, &fault.code);
        match control::encode_fault(fault, id, carrier.frame_limit()) {
            Some(frame) => self.send_frame(frame).await,
            None => Ok(()),
        }
    }

    /// Ends the sending direction and waits until the peer's transport has acknowledged everything sent; on a
    /// resumable channel, until the peer's library has acknowledged it; the library acknowledges what its program has
    /// read.
    ///
    /// That the bytes arrived does not mean that the peer's program has handled them; for that use a request.
    ///
    /// # Errors
    /// When the channel ended before everything was acknowledged.
    ///
    /// # Cancel safety
    /// The end is announced at once; dropping the future only stops the waiting.
    pub async fn finish(&self) -> Result<(), SendError> {
        self.inner.outbox.finish(None);
        self.inner
            .outbox
            .wait_ended()
            .await
            .map_err(SendError::Closed)
    }

    /// Closes both directions: queued messages are still sent, then code and text.
    ///
    /// The close begins at once; awaiting the result waits until the writer has ended. Calling it again, or on a
    /// channel that is already over, changes nothing: the first reason stays.
    pub fn close(&self, code: CloseCode, text: impl Into<String>) -> Closed {
        self.close_with(CloseReason::local(code, text));
        let channel = self.clone();
        Closed {
            future: Box::pin(async move {
                let _ = channel.inner.outbox.wait_ended().await;
                channel.closed().await
            }),
        }
    }

    pub(crate) fn close_with(&self, reason: CloseReason) {
        let last = control::encode_close(reason.code, &reason.text);
        self.inner.outbox.finish(last);
        self.inner.inbox.stop(
            reason.code,
            Ending::Closed(reason.clone()),
            &self.inner.carrier,
        );
        self.inner.end.set(reason);
    }

    /// Waits until the channel has ended and returns how: closed by either side, or broken.
    ///
    /// A channel whose two directions were merely finished is over when both are: then the code is `normal`.
    pub async fn closed(&self) -> CloseReason {
        let both_done = async {
            let _ = self.inner.outbox.wait_ended().await;
            // A reader learns of the end of the other direction, every task of the end of the socket.
            if self.is_resumable() {
                self.inner.carrier.end.wait().await
            } else {
                match self.inner.conn.upgrade() {
                    Some(conn) => self.inner.carrier.reason_for(&conn.closed().await),
                    None => lost("the connection is lost"),
                }
            }
        };
        tokio::select! {
            biased;
            reason = self.inner.end.wait() => reason,
            reason = both_done => {
                self.inner.end.set(reason);
                self.inner.end.wait().await
            }
        }
    }

    /// How the channel ended, if it has.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.inner.end.get().cloned()
    }

    /// Whether the channel continues on the next connection: the opener asked for it, and the session can be resumed.
    pub fn is_resumable(&self) -> bool {
        self.inner.opened.resumable
    }

    /// How many messages of a resumable channel the peer's library has not confirmed; replies and other protocol
    /// messages count, too. When such a channel ends with `not_resumed`, the unconfirmed messages may or may not have
    /// arrived. 0 for other channels, and after this side's direction has ended in order.
    pub fn unconfirmed(&self) -> u64 {
        self.inner.outbox.unconfirmed()
    }

    /// Bytes queued here and not yet taken over by QUIC; for a resumable channel, not yet confirmed.
    pub fn queued_bytes(&self) -> usize {
        self.inner.outbox.queued()
    }

    /// The statistics so far: bytes of this channel; packets, round-trip time and window of its socket.
    pub fn stats(&self) -> Stats {
        Stats::of(&self.inner.carrier.conn(), &self.inner.counters)
    }

    /// The speed of this channel, once a second. Round-trip time, loss and window are those of the socket.
    pub fn speed(&self) -> SpeedMeter {
        let carrier = self.inner.carrier.clone();
        let counters = self.inner.counters.clone();
        let end = self.inner.end.clone();
        SpeedMeter::new(Box::new(move || {
            (end.get().is_none()).then(|| Stats::of(&carrier.conn(), &counters))
        }))
    }

    pub(crate) fn ended(&self, ending: Ending) -> Result<Option<Message>, RecvError> {
        match ending {
            Ending::Finished => {
                if self.inner.outbox.is_ended() {
                    self.inner
                        .end
                        .set(CloseReason::local(CloseCode::NORMAL, "both sides finished"));
                }
                Ok(None)
            }
            Ending::Closed(reason) => {
                self.inner.end.set(reason.clone());
                self.inner.outbox.finish(None);
                if reason.is_normal() {
                    Ok(None)
                } else {
                    Err(RecvError::Closed(reason))
                }
            }
            Ending::Violation(reason) => {
                self.close_with(reason.clone());
                Err(RecvError::Protocol(reason))
            }
        }
    }

    fn send_error(&self, error: PushError) -> SendError {
        match error {
            PushError::Encode(error) => SendError::Encode(error),
            PushError::Finished => SendError::Finished,
            PushError::Ended(reason) => {
                SendError::Closed(self.inner.end.get().cloned().unwrap_or(reason))
            }
        }
    }
}

pub(crate) fn application_event(event: &str) -> Result<(), SendError> {
    if event.as_bytes().first() == Some(&b'$') {
        return Err(SendError::Encode(EncodeError::Reserved(event.to_owned())));
    }
    Ok(())
}

/// A future that waits until a close is complete and returns the effective reason. Dropping it does not stop the
/// close.
pub struct Closed {
    pub(crate) future: BoxFuture<'static, CloseReason>,
}

impl Future for Closed {
    type Output = CloseReason;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<CloseReason> {
        self.future.as_mut().poll(cx)
    }
}

impl fmt::Debug for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Closed").finish_non_exhaustive()
    }
}

/// Why a message could not be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The message itself cannot be sent; the channel is unharmed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// This side has already finished or closed the channel.
    #[error("this side has finished the channel")]
    Finished,
    /// The channel is over.
    #[error("channel closed: {0}")]
    Closed(CloseReason),
}

impl SendError {
    /// Whether the channel has ended, as opposed to one message that cannot be sent.
    pub fn is_closed(&self) -> bool {
        !matches!(self, Self::Encode(_))
    }
}

/// Why there will be no more messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// The peer broke the protocol; the channel was closed with this reason.
    #[error("the peer broke the protocol: {}: {}", .0.code, .0.text)]
    Protocol(CloseReason),
    /// The channel or the connection ended, other than by an orderly finish.
    #[error("channel closed: {0}")]
    Closed(CloseReason),
}

impl RecvError {
    /// How the channel ended.
    pub fn reason(&self) -> &CloseReason {
        match self {
            Self::Protocol(reason) | Self::Closed(reason) => reason,
        }
    }
}
