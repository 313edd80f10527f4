//! Streams that the peer opens: which channel each is, new or come again, and who serves it.

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::channel::{Channel, Opened};
use crate::code::{CloseCode, CloseReason};
use crate::config::Priority;
use crate::control::{self, Resumed};
use crate::driver::write_control;
use crate::inbox::{Ending, Inbox};
use crate::metrics::Count;
use crate::session::{ChannelKey, Session, lock};
use crate::socket::{ChannelHandler, Registry};
use crate::speed::Counters;
use crate::writer::Way;

/// Reads a new stream's `$open` and hands the channel to whoever serves its name.
pub(crate) async fn serve_stream(
    session: Arc<Session>,
    registry: Arc<Registry>,
    incoming: Option<mpsc::Sender<Channel>>,
    (conn, link): (Arc<quinn::Connection>, u64),
    send: quinn::SendStream,
    recv: quinn::RecvStream,
) {
    let inbox = Inbox::new(recv, session.limits.frame);
    let counters = Counters::child(session.counters.clone());
    let first = poll_fn(|cx| inbox.poll_first(cx, &session, &counters));
    let first = match tokio::time::timeout(session.timeouts.frame, first).await {
        Ok(first) => first,
        Err(_) => Err(Ending::Violation(CloseReason::local(
            CloseCode::FRAME_TIMEOUT,
            format!("no $open within {:?}", session.timeouts.frame),
        ))),
    };
    let (open, refusal) = match first {
        Ok(message) => match control::decode_open(&message) {
            Ok(open) => (open, None),
            Err(error) => (
                nameless(),
                Some(CloseReason::local(error.close_code(), error.to_string())),
            ),
        },
        Err(Ending::Violation(reason)) => (nameless(), Some(reason)),
        Err(Ending::Finished) => {
            let text = "the stream ended before $open";
            (
                nameless(),
                Some(CloseReason::local(CloseCode::TRUNCATED, text)),
            )
        }
        // Reset or lost before it began: nobody to tell.
        Err(Ending::Closed(_)) => return,
    };
    let mut first = None;
    if let Some(received) = open.received {
        let key = ChannelKey {
            own: false,
            id: open.id,
        };
        match session.kept(key) {
            Some(pipe) => return pipe.accept(&session, (conn, link), (send, inbox), received),
            // It had reached its end here before the opener knew.
            None if received > 0 || lock(&session.seen).contains(open.id) => {
                return decline(&session, send, received).await;
            }
            None => {
                let none = Resumed {
                    received: 0,
                    done: false,
                };
                first = control::encode_resume(none);
            }
        }
    }
    let known = open.resumable
        && session
            .kept(ChannelKey {
                own: false,
                id: open.id,
            })
            .is_some();
    let crowded = open.resumable && session.kept_theirs() >= 2 * session.limits.channels as usize;
    if !crowded {
        lock(&session.seen).insert(open.id);
    }
    let name = open.name.clone();
    session.tally.one(Count::ChannelsAccepted);
    session.tally.one(Count::MessagesReceived);
    tracing::Span::current()
        .record("name", crate::text::printable_within(&name, 128))
        .record("id", open.id);
    let opened = Opened {
        id: open.id,
        name: open.name,
        meta: open.meta,
        priority: open.priority,
        resumable: open.resumable && !crowded && !known,
    };
    let way = Way {
        conn,
        stream: send,
        epoch: 0,
        first,
    };
    let channel = Channel::start(session.clone(), opened, false, way, link, inbox, counters);
    let refusal = refusal.or_else(|| {
        // In the place of the one that is kept, that one would never end.
        known.then(|| {
            let text = format!("resumable channel {} is open already", open.id);
            CloseReason::local(CloseCode::PROTOCOL_ORDER, text)
        })
    });
    let refusal = refusal.or_else(|| {
        crowded.then(|| {
            let text = format!(
                "{} resumable channels are kept because their end was not confirmed",
                2 * session.limits.channels
            );
            CloseReason::local(CloseCode::RATE_LIMITED, text)
        })
    });
    if let Some(reason) = refusal {
        session.tally.one(Count::ChannelsRefused);
        if let Some(left_out) = session.quiet.line() {
            tracing::warn!(%reason, left_out, "channel refused");
        }
        channel.close_with(reason);
        return;
    }
    if let Err(deny) = session.life.allow(&session, &channel) {
        channel.close_with(CloseReason::local(deny.code, deny.text));
        return;
    }
    match registry.handlers.get(&name) {
        Some(handler) => run_handler(handler, channel).await,
        None => {
            let Some(incoming) = incoming else {
                session.tally.one(Count::ChannelsRefused);
                let text = format!(
                    "no channel named {:?} is served here",
                    crate::text::printable_within(&name, 128)
                );
                channel.close_with(CloseReason::local(CloseCode::NO_SUCH_CHANNEL, text));
                return;
            };
            if let Err(error) = incoming.try_send(channel) {
                session.tally.one(Count::ChannelsRefused);
                let channel = match error {
                    mpsc::error::TrySendError::Full(channel)
                    | mpsc::error::TrySendError::Closed(channel) => channel,
                };
                channel.close_with(CloseReason::local(
                    CloseCode::REFUSED,
                    "channels are not being accepted",
                ));
            }
        }
    }
}

/// Tells the opener of a channel that it is over here, and that all it sent was received.
async fn decline(session: &Session, mut send: quinn::SendStream, received: u64) {
    let done = Resumed {
        received,
        done: true,
    };
    if let Some(frame) = control::encode_resume(done) {
        write_control(session, &mut send, frame).await;
        let _ = send.finish();
    }
}

async fn run_handler(handler: &ChannelHandler, channel: Channel) {
    let name = channel.name().to_owned();
    // The closure's own body may panic before it gives a future.
    let future = match std::panic::catch_unwind(AssertUnwindSafe(|| handler(channel.clone()))) {
        Ok(future) => AssertUnwindSafe(future).catch_unwind().await,
        Err(panic) => Err(panic),
    };
    match future {
        Ok(Ok(())) => {}
        Ok(Err(_)) if channel.close_reason().is_some() => {}
        Ok(Err(error)) => {
            channel.session().tally.one(Count::HandlersFailed);
            tracing::warn!(channel = %name, %error, "channel handler failed");
            channel.close_with(CloseReason::local(
                CloseCode::HANDLER_FAILED,
                "the channel's handler failed",
            ));
        }
        Err(_) => {
            channel.session().tally.one(Count::HandlerPanics);
            tracing::error!(channel = %name, "channel handler panicked");
            channel.close_with(CloseReason::local(
                CloseCode::INTERNAL,
                "the channel's handler failed",
            ));
        }
    }
}

fn nameless() -> control::Open {
    control::Open {
        id: 0,
        name: String::new(),
        meta: None,
        priority: Priority::default(),
        resumable: false,
        received: None,
    }
}

/// So many `per_second`, with a burst of twice as many.
pub(crate) struct Rate {
    per_second: f64,
    left: f64,
    at: Instant,
    granted: u32,
}

impl Rate {
    pub(crate) fn new(per_second: u32) -> Self {
        let per_second = f64::from(per_second.max(1));
        Self {
            per_second,
            left: per_second * 2.0,
            at: Instant::now(),
            granted: 0,
        }
    }

    /// So many are permitted beyond the rate.
    pub(crate) fn grant(&mut self, more: u32) {
        self.granted = more;
    }

    pub(crate) fn take(&mut self) -> bool {
        if self.granted > 0 {
            self.granted -= 1;
            return true;
        }
        let now = Instant::now();
        let gained = (now - self.at).as_secs_f64() * self.per_second;
        self.left = (self.left + gained).min(self.per_second * 2.0);
        self.at = now;
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}
