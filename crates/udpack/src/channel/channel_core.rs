//! [`ChannelCore`]: the part of a channel that its successive streams share, and the move from one stream to the
//! next.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tracing::Instrument;

use crate::channel::carrier::{Carrier, ChannelKey, End, SessionConnection};
use crate::channel::inbox::{Ending, Inbox};
use crate::channel::outbox::Outbox;
use crate::channel::resume::Mismatch;
use crate::channel::writer::{self, Way, Written};
use crate::metrics::Count;
use crate::metrics::speed::Counters;
use crate::transport::SendStream;
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::Priority;
use crate::wire::control::{self, ControlError, Decode, ProtocolEvent, Resumed};

/// The part of a channel that its streams share. A resumable channel has one stream after the other.
pub(crate) struct ChannelCore {
    pub(crate) key: ChannelKey,
    pub(crate) priority: Priority,
    /// The name of a resumable channel, on the side that accepted it.
    pub(crate) name: Option<Box<str>>,
    /// The `$open` of a resumable channel, on the side that opened it.
    pub(crate) open: Option<Bytes>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) end: Arc<End>,
    pub(crate) registration: u64,
    /// The number of the connection of the current stream.
    pub(crate) connection_number: AtomicU64,
}

impl ChannelCore {
    /// Whether the channel has ended in both directions.
    pub(crate) fn is_over(&self) -> bool {
        self.outbox.is_over() && self.inbox.ending().is_some()
    }

    /// Whether this `$open` has the name and the priority of this channel.
    pub(crate) fn is_of(&self, open: &control::Open) -> bool {
        self.name.as_deref() == Some(&open.name) && self.priority == open.priority
    }

    /// The number of the connection of the current stream, on the side that accepted the channel.
    pub(crate) fn connection_number(&self) -> u64 {
        self.connection_number.load(Ordering::Relaxed)
    }

    /// Ends the channel because it gets no further stream. Messages that have arrived can still be read.
    pub(crate) fn fail(&self, carrier: &Carrier, reason: &CloseReason) {
        self.end.set(reason.clone());
        self.outbox.end(Err(reason.clone()));
        self.inbox.fail(Ending::Closed(reason.clone()));
        self.unregister(carrier);
    }

    /// Removes the channel from the registry and counts its end.
    fn unregister(&self, carrier: &Carrier) {
        if carrier.unregister(self.registration) {
            let finished = || CloseReason::local(CloseCode::NORMAL, "");
            let reason = self.end.get().cloned().unwrap_or_else(finished);
            carrier.counts.less(Count::Channels);
            carrier.counts.channel_closed(&reason);
        }
    }

    /// Sends the queue, then ends the sending direction.
    pub(crate) fn finish(&self) {
        self.outbox.finish(None);
    }

    /// Discards the frames kept for repeating: the session will not be resumed.
    pub(crate) fn forget(&self) {
        self.outbox.forget();
    }

    /// Sends the queue, and ends the channel with this reason when the peer has ended it, too.
    pub(crate) fn finish_because(&self, reason: &CloseReason) {
        self.inbox.finish_as(reason.clone());
        self.outbox.finish_because(reason.clone());
    }

    /// The peer accepts no more frames.
    pub(crate) fn refused(&self) {
        self.outbox.refused();
    }

    /// The peer has received this many frames.
    pub(crate) fn confirm(&self, received: u64) -> Result<(), Mismatch> {
        self.outbox.confirm(received)
    }

    /// Opens another stream for a channel that this side opened, on connection `number`, and continues on it.
    pub(crate) async fn reopen(
        self: Arc<Self>,
        carrier: Arc<Carrier>,
        conn: Arc<SessionConnection>,
        number: u64,
    ) {
        let Some(open) = &self.open else { return };
        let Some(received) = carrier.while_current(number, || self.inbox.detach()) else {
            return;
        };
        let opened = async {
            let (mut send, recv) = conn.open_bi().await.ok()?;
            send.set_priority(self.priority.quic());
            let frame = control::reopen(open, received)?;
            send.write(frame).await.ok()?;
            let inbox = Inbox::new(recv, carrier.limits.frame);
            let first = poll_fn(|cx| inbox.poll_first(cx, &carrier, &self.counters)).await;
            Some((send, inbox, first))
        };
        let Some((send, inbox, first)) = opened.await else {
            // The connection is lost again; the channel is reopened on the next one.
            return;
        };
        let answer = match &first {
            Ok(message) if ProtocolEvent::Close.is(message) => {
                CloseReason::decode(message).map(Err)
            }
            Ok(message) => Resumed::decode(message).map(Ok),
            Err(_) if conn.is_over() => return,
            Err(Ending::Violation(reason)) => {
                let reason = reason.clone();
                return self.refuse(&carrier, reason, send, Some(inbox));
            }
            Err(Ending::Closed(reason)) => Ok(Err(reason.clone())),
            Err(Ending::Finished) => Err(ControlError::Unexpected {
                expected: ProtocolEvent::Resume.name(),
            }),
        };
        match answer {
            Ok(Ok(Resumed { done: true, .. })) => {
                self.outbox.end(Ok(()));
                self.inbox.fail(Ending::Finished);
                self.unregister(&carrier);
                carrier.prune();
            }
            Ok(Ok(Resumed { received, .. })) => {
                self.go_on(&carrier, (conn, number), (send, inbox), received, None);
            }
            Ok(Err(reason)) => self.fail(&carrier, &reason),
            Err(error) => self.refuse(&carrier, error.reason(), send, Some(inbox)),
        }
    }

    /// Continues a channel that the peer opened, on the stream that the peer opened for it on connection `number`.
    /// The peer has received `received` frames.
    pub(crate) fn accept(
        self: &Arc<Self>,
        carrier: &Arc<Carrier>,
        (conn, number): (Arc<SessionConnection>, u64),
        stream: (SendStream, Inbox),
        received: u64,
    ) {
        let detached = carrier.while_current(number, || {
            self.connection_number.store(number, Ordering::Relaxed);
            self.inbox.detach()
        });
        let Some(have) = detached else { return };
        let answer = Resumed {
            received: have,
            done: false,
        };
        self.go_on(
            carrier,
            (conn, number),
            stream,
            received,
            control::encode(&answer),
        );
    }

    fn go_on(
        self: &Arc<Self>,
        carrier: &Arc<Carrier>,
        (conn, number): (Arc<SessionConnection>, u64),
        (stream, inbox): (SendStream, Inbox),
        received: u64,
        first: Option<Bytes>,
    ) {
        stream.set_priority(self.priority.quic());
        let mut inbox = Some(inbox);
        let went_on = carrier.while_current(number, || {
            let rewound = self.outbox.rewind(received)?;
            if let Some(inbox) = inbox.take() {
                self.inbox.attach(inbox, carrier);
            }
            Ok(rewound)
        });
        match went_on {
            None => {}
            Some(Ok((epoch, all))) => {
                if all {
                    self.outbox.end(Ok(()));
                }
                let way = Way {
                    conn,
                    stream,
                    epoch,
                    first,
                };
                self.spawn_writer(carrier, way);
            }
            Some(Err(Mismatch)) => {
                let text = "the two sides disagree about what was received";
                let reason = CloseReason::local(CloseCode::RESUME_MISMATCH, text);
                self.refuse(carrier, reason, stream, inbox);
            }
        }
    }

    /// Ends the channel instead of continuing it on this stream, and tells the peer why.
    fn refuse(
        &self,
        carrier: &Arc<Carrier>,
        reason: CloseReason,
        mut stream: SendStream,
        inbox: Option<Inbox>,
    ) {
        self.fail(carrier, &reason);
        if let Some(inbox) = inbox {
            inbox.stop(reason.code, Ending::Closed(reason.clone()), carrier);
        }
        let last = control::encode_close(reason.code, &reason.text);
        let within = carrier.timeouts.close;
        carrier.tasks.spawn(async move {
            if let Some(last) = last {
                let _ = tokio::time::timeout(within, stream.write(last)).await;
            }
            stream.finish();
        });
    }

    pub(crate) fn spawn_writer(self: &Arc<Self>, carrier: &Arc<Carrier>, way: Way) {
        way.stream.set_priority(self.priority.quic());
        let (core, carrier) = (self.clone(), carrier.clone());
        let tasks = carrier.tasks.clone();
        let writer = async move {
            let counters = core.counters.clone();
            let written =
                writer::write_loop(core.outbox.clone(), way, carrier.clone(), counters).await;
            if let Written::Ended(Err(mut reason)) = written {
                if reason.by == Side::Peer && !carrier.conn().is_over() {
                    reason = peer_close_reason(&core.inbox, &carrier, &core.counters)
                        .await
                        .unwrap_or(reason);
                }
                if !reason.is_normal() {
                    core.end.set(reason);
                }
            }
            if core.outbox.is_over() {
                core.unregister(&carrier);
                carrier.prune();
            }
        };
        tasks.spawn(writer.in_current_span());
    }
}

/// The peer has stopped our stream: its `$close`, which says why, may be on the way or unread.
async fn peer_close_reason(
    inbox: &Inbox,
    carrier: &Carrier,
    counters: &Counters,
) -> Option<CloseReason> {
    let end = poll_fn(|cx| inbox.poll_end(cx, carrier, counters));
    match tokio::time::timeout(Duration::from_secs(1), end).await {
        Ok(Some(Ending::Closed(reason))) => Some(reason),
        Ok(Some(Ending::Finished | Ending::Violation(_)) | None) | Err(_) => None,
    }
}
