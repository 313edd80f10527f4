//! Streams that the peer opens: decides whether each is a new or a resumed channel, and starts its handler.

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::sync::mpsc;

use crate::base::lock;
use crate::channel::carrier::{ChannelKey, SessionConnection};
use crate::channel::inbox::{Ending, Inbox};
use crate::channel::writer::Way;
use crate::channel::{Channel, Opened};
use crate::metrics::Count;
use crate::metrics::speed::Counters;
use crate::session::Session;
use crate::session::driver::write_small;
use crate::session::service::{ChannelHandler, Registry};
use crate::transport::{RecvStream, SendStream};
use crate::wire::code::{CloseCode, CloseReason};
use crate::wire::config::Priority;
use crate::wire::control::{self, Decode, Open, Resumed};

/// Reads a new stream's `$open` and passes the channel to the service of its name. `span` is the channel's, and gets
/// the name here; it may differ from the current span: see [`or_parent`](crate::session::or_parent).
pub(crate) async fn serve_stream(
    session: Arc<Session>,
    registry: Arc<Registry>,
    incoming: Option<mpsc::Sender<Channel>>,
    (conn, number): (Arc<SessionConnection>, u64),
    send: SendStream,
    recv: RecvStream,
    span: tracing::Span,
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
        Ok(message) => match Open::decode(&message) {
            Ok(open) => (open, None),
            Err(error) => (nameless(), Some(error.reason())),
        },
        Err(Ending::Violation(reason)) => (nameless(), Some(reason)),
        Err(Ending::Finished) => {
            let text = "the stream ended before $open";
            (
                nameless(),
                Some(CloseReason::local(CloseCode::TRUNCATED, text)),
            )
        }
        // The stream was reset or lost before `$open`: there is no one to answer.
        Err(Ending::Closed(_)) => return,
    };
    let name = open.name.clone();
    span.record("name", crate::base::text::printable_within(&name, 128))
        .record("id", open.id);
    let begun = begin(
        &session,
        open,
        refusal,
        (conn, number),
        send,
        inbox,
        counters,
    );
    let (channel, refusal) = match begun {
        Begun::Channel(channel, refusal) => (channel, refusal),
        Begun::WentOn => return,
        Begun::Over(send, received) => return decline(&session, send, received).await,
    };
    if let Some(reason) = refusal {
        session.counts.one(Count::ChannelsRefused);
        if let Some(left_out) = session.log_limit.line() {
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
                session.counts.one(Count::ChannelsRefused);
                let text = format!(
                    "no channel named {:?} is served here",
                    crate::base::text::printable_within(&name, 128)
                );
                channel.close_with(CloseReason::local(CloseCode::NO_SUCH_CHANNEL, text));
                return;
            };
            if let Err(error) = incoming.try_send(channel) {
                session.counts.one(Count::ChannelsRefused);
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

/// The kind of a stream with a valid `$open`.
enum Begun {
    /// A new channel; with a reason, it is refused.
    Channel(Channel, Option<CloseReason>),
    /// An existing channel continues on the stream.
    WentOn,
    /// The stream is of a channel that has ended here before its opener knew that.
    Over(SendStream, u64),
}

/// Determines the kind of a stream and creates or resumes its channel, one stream of a session at a time, because two
/// streams may be of one channel.
fn begin(
    session: &Arc<Session>,
    open: Open,
    refusal: Option<CloseReason>,
    (conn, number): (Arc<SessionConnection>, u64),
    send: SendStream,
    inbox: Inbox,
    counters: Arc<Counters>,
) -> Begun {
    let mut seen = lock(&session.numbers.seen);
    let key = ChannelKey {
        own: false,
        id: open.id,
    };
    let kept = match refusal {
        None => session.kept(key),
        Some(_) => None,
    };
    let mut first = None;
    match (open.received, &kept) {
        (Some(received), Some(core)) if core.is_of(&open) => {
            drop(seen);
            core.accept(&session.carrier, (conn, number), (send, inbox), received);
            return Begun::WentOn;
        }
        (Some(received), None) if received > 0 || seen.contains(open.id) => {
            return Begun::Over(send, received);
        }
        (Some(_), None) => {
            let none = Resumed {
                received: 0,
                done: false,
            };
            first = control::encode(&none);
        }
        _ => {}
    }
    // Replacing the kept channel would mean that it never ends.
    let refusal = refusal.or_else(|| {
        kept.is_some().then(|| {
            let text = match open.received {
                None => format!("resumable channel {} is open already", open.id),
                Some(_) => format!("resumable channel {} was opened otherwise", open.id),
            };
            CloseReason::local(CloseCode::PROTOCOL_ORDER, text)
        })
    });
    let most = 2 * session.limits.channels as usize;
    let crowded = open.resumable && session.kept_theirs() >= most;
    let refusal = refusal.or_else(|| {
        crowded.then(|| {
            let text =
                format!("{most} resumable channels are kept because their end was not confirmed");
            CloseReason::local(CloseCode::RATE_LIMITED, text)
        })
    });
    if refusal.is_none() {
        seen.insert(open.id);
    }
    session.counts.one(Count::ChannelsAccepted);
    session.counts.one(Count::MessagesReceived);
    let opened = Opened {
        id: open.id,
        name: open.name,
        meta: open.meta,
        priority: open.priority,
        resumable: open.resumable && refusal.is_none(),
        since: open.since,
    };
    let way = Way {
        conn,
        stream: send,
        epoch: 0,
        first,
    };
    let channel = session.channel(opened, false, (way, number), inbox, counters);
    Begun::Channel(channel, refusal)
}

/// Tells the opener of a channel that it has ended here, and that all its frames were received.
async fn decline(session: &Session, mut send: SendStream, received: u64) {
    let done = Resumed {
        received,
        done: true,
    };
    if let Some(frame) = control::encode(&done) {
        // A peer that has stopped the stream ignores the answer.
        let _ = write_small(session, &mut send, &mut [frame]).await;
        send.finish();
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
            channel.session().counts.one(Count::HandlersFailed);
            tracing::warn!(channel = %name, %error, "channel handler failed");
            channel.close_with(CloseReason::local(
                CloseCode::HANDLER_FAILED,
                "the channel's handler failed",
            ));
        }
        Err(_) => {
            channel.session().counts.one(Count::HandlerPanics);
            tracing::error!(channel = %name, "channel handler panicked");
            channel.close_with(CloseReason::local(
                CloseCode::INTERNAL,
                "the channel's handler failed",
            ));
        }
    }
}

fn nameless() -> Open {
    Open {
        id: 0,
        name: String::new(),
        meta: None,
        priority: Priority::default(),
        resumable: false,
        received: None,
        since: Vec::new(),
    }
}
