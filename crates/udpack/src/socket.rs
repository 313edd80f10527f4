//! [`Socket`]: one admitted connection, and the task that serves it.
//!
//! The driver owns everything that belongs to the connection as a whole: it takes the streams the peer
//! opens, reads and writes the control stream, and carries out a close. It ends with the connection, and
//! with it every channel task it started.

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument;

use crate::auth::Peer;
use crate::channel::{Channel, Closed, Opened};
use crate::code::{CloseCode, CloseReason};
use crate::config::Priority;
use crate::control::{self, GoAway};
use crate::extensions::Extensions;
use crate::inbox::{Ending, Inbox};
use crate::router::ServeChannel;
use crate::session::{Lease, Session, lock};
use crate::speed::{Counters, SpeedMeter, Stats};

/// One connection to one peer: open channels on it, accept the peer's, close it.
///
/// A handle: clones share one connection, which lives until either side closes it, also when every handle
/// is dropped at the server. At a client, dropping the last handle and the last channel closes it.
#[derive(Clone)]
pub struct Socket {
    inner: Arc<Handle>,
}

pub(crate) struct Handle {
    session: Arc<Session>,
    incoming: Mutex<mpsc::Receiver<Channel>>,
    _lease: Option<Arc<Lease>>,
}

impl Socket {
    pub(crate) fn new(session: Arc<Session>, incoming: mpsc::Receiver<Channel>) -> Self {
        let lease = session.client.then(|| session.lend());
        let inner = Arc::new(Handle {
            session,
            incoming: Mutex::new(incoming),
            _lease: lease,
        });
        let _ = inner.session.handle.set(Arc::downgrade(&inner));
        Self { inner }
    }

    /// A handle of this session: one more of those there are, or one that accepts no channels when all are gone.
    pub(crate) fn of(session: &Arc<Session>) -> Self {
        let inner = session.handle.get().and_then(Weak::upgrade);
        Self {
            inner: inner.unwrap_or_else(|| {
                Arc::new(Handle {
                    session: session.clone(),
                    incoming: Mutex::new(mpsc::channel(1).1),
                    _lease: session.lease(),
                })
            }),
        }
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.inner.session
    }

    /// The session's id, chosen by the server: 32 hexadecimal digits; empty before admission.
    pub fn id(&self) -> &str {
        self.inner.session.id()
    }

    /// Who the peer is. At a server: what the verifier said. At a client: the server, by its fingerprint or
    /// its name.
    pub fn peer(&self) -> &Peer {
        static UNKNOWN: std::sync::LazyLock<Peer> = std::sync::LazyLock::new(|| Peer::new(""));
        self.inner.session.peer.get().unwrap_or(&UNKNOWN)
    }

    /// Name and version of the peer's program, as it calls itself; printable, at most 128 bytes.
    pub fn agent(&self) -> &str {
        let session = &self.inner.session;
        if session.client {
            session
                .welcome
                .get()
                .map_or("", |welcome| welcome.agent.as_str())
        } else {
            session.agent.get().map_or("", String::as_str)
        }
    }

    /// The peer's address as of now; it may change when the peer moves.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.session.conn().remote_address()
    }

    /// Values of the application's own that belong to this socket.
    pub fn extensions(&self) -> &Extensions {
        &self.inner.session.extensions
    }

    /// Waits until the server has let this client in. A socket from `connect` has been let in already; one
    /// from `connect_eager` may be used in the meantime.
    ///
    /// # Errors
    /// How the socket ended instead.
    pub async fn admitted(&self) -> Result<(), CloseReason> {
        self.inner.session.wait_admitted().await
    }

    /// The next channel that the peer opened and no registered handler took; `None` when the socket is over.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn accept_channel(&self) -> Option<Channel> {
        self.inner.incoming.lock().await.recv().await
    }

    /// Closes gracefully: no new channels, what is queued goes out and is acknowledged, then the peer is
    /// told and the connection ends.
    ///
    /// Acts at once; awaiting the result waits for the end, at most `Timeouts::close` and a little. Calling
    /// it again, or when the socket is already over, changes nothing: the first reason stays.
    pub fn close(&self, code: CloseCode, text: impl Into<String>) -> Closed {
        self.inner.session.wish_close(code, text.into());
        let socket = self.clone();
        Closed {
            future: Box::pin(async move { socket.closed().await }),
        }
    }

    /// Closes now: what is queued is lost, the peer is told code and text if the path carries it.
    pub fn abort(&self, code: CloseCode, text: impl Into<String>) {
        self.inner.session.abort(CloseReason::local(code, text));
    }

    /// Waits until the socket is over and says how.
    pub async fn closed(&self) -> CloseReason {
        let session = &self.inner.session;
        let error = session.conn().closed().await;
        let reason = session.reason_for(&error);
        session.end.set(reason);
        if let Some(endpoint) = &session.endpoint {
            // Let the last packets out; a silent network must not hold us up.
            let _ = tokio::time::timeout(Duration::from_millis(500), endpoint.wait_idle()).await;
        }
        session.end.wait().await
    }

    /// How the socket ended, if it has.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.inner.session.end.get().cloned()
    }

    /// The server's word that it is going down, if it has sent one.
    pub fn goaway(&self) -> Option<GoAway> {
        self.inner.session.received_goaway.get().cloned()
    }

    /// Tells the peer to finish what runs and come back later or elsewhere. Only a server says so.
    pub(crate) fn send_goaway(&self, goaway: GoAway) {
        lock(&self.inner.session.wishes).goaway = Some(goaway);
        self.inner.session.wished.notify_one();
    }

    /// Channels that are open on this socket at this side.
    pub fn channels(&self) -> usize {
        self.inner.session.live_channels()
    }

    /// What moves on this socket, each second.
    pub fn speed(&self) -> SpeedMeter {
        let session = self.inner.session.clone();
        SpeedMeter::new(Box::new(move || {
            session
                .conn()
                .close_reason()
                .is_none()
                .then(|| Stats::of(&session.conn(), &session.counters))
        }))
    }

    /// The numbers so far.
    pub fn stats(&self) -> Stats {
        Stats::of(&self.inner.session.conn(), &self.inner.session.counters)
    }

    pub(crate) fn closed_reason(&self) -> CloseReason {
        let session = &self.inner.session;
        let wished = || lock(&session.wishes).close.clone();
        session
            .end
            .get()
            .cloned()
            .or_else(wished)
            .unwrap_or_else(|| crate::session::lost("the socket is over"))
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket")
            .field("id", &self.id())
            .field("peer", self.peer())
            .field("remote", &self.remote_address())
            .finish_non_exhaustive()
    }
}

impl Channel {
    /// Who the peer is; see [`Socket::peer`].
    pub fn peer(&self) -> Option<&Peer> {
        self.session().peer.get()
    }

    /// The id of the socket this channel belongs to.
    pub fn session_id(&self) -> &str {
        self.session().id()
    }

    /// The application's values that belong to this channel's socket.
    pub fn extensions(&self) -> &Extensions {
        &self.session().extensions
    }
}

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

pub(crate) type ChannelHandler =
    Arc<dyn Fn(Channel) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// The handlers of a server or client, by channel name.
#[derive(Clone, Default)]
pub(crate) struct Registry {
    handlers: HashMap<String, ChannelHandler>,
    /// Channels nobody is registered for go to `accept_channel`; otherwise they are refused.
    pub(crate) pull: bool,
    /// A channel whose handlers need a state that nobody gave, and the state's type.
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

/// The control stream, in the driver's hands.
pub(crate) struct Control {
    pub(crate) send: quinn::SendStream,
    pub(crate) inbox: Inbox,
}

/// Serves one connection until it ends.
pub(crate) async fn drive(
    session: Arc<Session>,
    mut control: Control,
    registry: Arc<Registry>,
    incoming: mpsc::Sender<Channel>,
) -> CloseReason {
    let mut channels = JoinSet::new();
    let mut rate = Rate::new(session.limits.channel_rate);
    let conn = session.conn();
    let reason = loop {
        tokio::select! {
            stream = conn.accept_bi() => match stream {
                Ok((send, recv)) => {
                    if !rate.take() {
                        let text = format!("more than {} channels a second", session.limits.channel_rate);
                        session.abort(CloseReason::local(CloseCode::RATE_LIMITED, text));
                        continue;
                    }
                    let span = tracing::debug_span!("channel", stream = send.id().index());
                    let serve = serve_stream(session.clone(), registry.clone(), incoming.clone(), send, recv);
                    channels.spawn(serve.instrument(span));
                }
                Err(error) => break session.reason_for(&error),
            },
            message = poll_fn(|cx| control.inbox.poll_first(cx, &session, &session.counters)) => {
                if let Some(reason) = on_control(&session, message) {
                    if reason.by == crate::code::Side::Peer {
                        // The peer has flushed its channels and leaves the last word to us. What we have
                        // queued gets a moment too; a peer that no longer reads cannot hold us up.
                        session.finish_channels();
                        session.channels_done(session.timeouts.close / 5).await;
                        let (code, text) = (reason.code.varint(), reason.text.clone());
                        session.end.set(reason);
                        session.conn().close(code, text.as_bytes());
                    } else {
                        session.abort(reason);
                    }
                    let error = session.conn().closed().await;
                    break session.reason_for(&error);
                }
            },
            () = session.wished.notified() => {
                let (close, goaway) = {
                    let mut wishes = lock(&session.wishes);
                    (wishes.close.clone(), wishes.goaway.take())
                };
                if let Some(frame) = goaway.as_ref().and_then(control::encode_goaway) {
                    write_control(&session, &mut control.send, frame).await;
                }
                if let Some(reason) = close {
                    close_gracefully(&session, &mut control, reason).await;
                    let error = session.conn().closed().await;
                    break session.reason_for(&error);
                }
            },
            Some(ended) = channels.join_next() => {
                if let Err(error) = ended && error.is_panic() {
                    tracing::error!("a channel task panicked");
                }
            }
        }
    };
    session.end.set(reason);
    let reason = session.end.wait().await;
    // Handlers see the end in their next `recv`; give those that only wait for it the time to leave.
    let grace = async { while channels.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(session.timeouts.close, grace).await;
    session.tasks.close();
    reason
}

/// Acts on a message of the control stream; a reason says that the connection must end.
fn on_control(session: &Session, message: Result<crate::Message, Ending>) -> Option<CloseReason> {
    let order = |text: &str| Some(CloseReason::local(CloseCode::PROTOCOL_ORDER, text));
    match message {
        Ok(message) => match message.event() {
            control::CLOSE => match control::decode_close(&message) {
                Ok(reason) => Some(reason),
                Err(error) => Some(CloseReason::local(error.close_code(), error.to_string())),
            },
            control::GOAWAY if session.client => match control::decode_goaway(&message) {
                Ok(goaway) => {
                    tracing::info!(text = %goaway.text, "the server is going away");
                    let _ = session.received_goaway.set(goaway);
                    None
                }
                Err(error) => Some(CloseReason::local(error.close_code(), error.to_string())),
            },
            control::WELCOME if session.client && session.welcome.get().is_none() => {
                match control::decode_welcome(&message) {
                    Ok(welcome) => {
                        session
                            .peer_frame
                            .store(welcome.frame, std::sync::atomic::Ordering::Relaxed);
                        let _ = session.welcome.set(welcome);
                        session.admitted.notify_waiters();
                        None
                    }
                    Err(error) => Some(CloseReason::local(error.close_code(), error.to_string())),
                }
            }
            _ => order("a message that has no place on the control stream now"),
        },
        Err(Ending::Finished) => order("the control stream ended without $close"),
        Err(Ending::Closed(reason)) if session.conn().close_reason().is_some() => Some(reason),
        Err(Ending::Closed(_)) => order("the control stream was reset"),
        Err(Ending::Violation(reason)) => Some(reason),
    }
}

/// Flushes the channels, tells the peer, and leaves the last word to it; all within the close time.
async fn close_gracefully(session: &Session, control: &mut Control, reason: CloseReason) {
    let within = session.timeouts.close;
    let deadline = Instant::now() + within;
    session.finish_channels();
    session.channels_done(within).await;
    if let Some(frame) = control::encode_close(reason.code, &reason.text) {
        write_control(session, &mut control.send, frame).await;
        let _ = control.send.finish();
    }
    // When both sides close at once, neither would wait for the other's last word: a `$close` from the peer
    // is as good as the end. Anything else on the control stream no longer matters.
    let peer_closes = async {
        while let Ok(message) =
            poll_fn(|cx| control.inbox.poll_first(cx, session, &session.counters)).await
        {
            if message.event() == control::CLOSE {
                return;
            }
        }
        session.conn().closed().await;
    };
    let _ = tokio::time::timeout_at(deadline, peer_closes).await;
    session.abort(reason);
}

/// Writes one small frame; a peer that does not even take that within the close time is given up.
async fn write_control(session: &Session, send: &mut quinn::SendStream, frame: Bytes) {
    match tokio::time::timeout(session.timeouts.close, send.write_chunk(frame)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "control stream not writable"),
        Err(_) => session.abort(CloseReason::local(
            CloseCode::SLOW_PEER,
            "the peer does not read the control stream",
        )),
    }
}

/// Reads a new stream's `$open` and hands the channel to whoever serves its name.
async fn serve_stream(
    session: Arc<Session>,
    registry: Arc<Registry>,
    incoming: mpsc::Sender<Channel>,
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
    let name = open.name.clone();
    let opened = Opened {
        id: open.id,
        name: open.name,
        meta: open.meta,
        priority: open.priority,
        resumable: open.resumable,
    };
    let channel = Channel::start(session.clone(), opened, send, inbox, counters);
    if let Some(reason) = refusal {
        if let Some(left_out) = session.quiet.line() {
            tracing::warn!(%reason, left_out, "channel refused");
        }
        channel.close_with(reason);
        return;
    }
    match registry.handlers.get(&name) {
        Some(handler) => run_handler(handler, channel).await,
        None if registry.pull => {
            if let Err(error) = incoming.try_send(channel) {
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
        None => {
            let text = format!(
                "no channel named {:?} is served here",
                crate::code::printable(&name, 128)
            );
            channel.close_with(CloseReason::local(CloseCode::NO_SUCH_CHANNEL, text));
        }
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
            tracing::warn!(channel = %name, %error, "channel handler failed");
            channel.close_with(CloseReason::local(
                CloseCode::HANDLER_FAILED,
                "the channel's handler failed",
            ));
        }
        Err(_) => {
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

/// Channel opens: `per_second`, with a burst of twice as many.
struct Rate {
    per_second: f64,
    left: f64,
    at: Instant,
}

impl Rate {
    fn new(per_second: u32) -> Self {
        let per_second = f64::from(per_second.max(1));
        Self {
            per_second,
            left: per_second * 2.0,
            at: Instant::now(),
        }
    }

    fn take(&mut self) -> bool {
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
