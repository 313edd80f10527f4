//! [`Socket`]: one admitted connection, and the task that serves it.
//!
//! The driver owns everything that belongs to the connection as a whole: it takes the streams the peer
//! opens, reads and writes the control stream, and carries out a close. It ends with the connection, and
//! with it every channel task it started.

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument;
use tracing::field::Empty;

use crate::auth::Peer;
use crate::channel::{Channel, Closed, Opened};
use crate::client::Dialler;
use crate::code::{CloseCode, CloseReason, Side};
use crate::config::Priority;
use crate::control::{self, Ack, Channels, ControlError, GoAway, Resumed, Welcome};
use crate::endpoint;
use crate::extensions::Extensions;
use crate::inbox::{Ending, Inbox};
use crate::lifetime::{self, Lifetime, RefreshError};
use crate::metrics::{Count, Metrics, Tally, Words};
use crate::outbox::Way;
use crate::reconnect::{SocketState, SocketStates, StateFeed};
use crate::resume::{Mismatch, Seen};
use crate::router::ServeChannel;
use crate::session::{ChannelKey, Lease, Session, SessionId, lock};
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

    /// The session's id, chosen by the server; empty before admission. It changes only when a client has
    /// reconnected and the session could not be resumed.
    pub fn id(&self) -> SessionId {
        self.inner.session.id()
    }

    /// Who the peer is. At a server: what the verifier said. At a client: the server, by its fingerprint or
    /// its name. What is known of a client may change with its token, its id does not.
    pub fn peer(&self) -> Peer {
        let known = self.inner.session.peer.get();
        known.unwrap_or_else(|| Peer::new(""))
    }

    /// How long the client's token still counts; `None` when it has no end or none is known. When it has
    /// ended, the server closes the socket with `auth_expired`.
    pub fn expires_in(&self) -> Option<Duration> {
        self.inner.session.life.time_left()
    }

    /// Presents a new token for the same identity, at a client: its end and its rights count from then on.
    /// One at a time; a further call waits for the answer to the one before.
    ///
    /// # Errors
    /// [`RefreshError::Denied`] when the server refused it: the socket stays as it was until the old token
    /// ends. A token that is not accepted counts as a failed authentication of this address.
    ///
    /// # Cancel safety
    /// A dropped future has presented the token or not; if so, the server's answer still counts.
    pub async fn refresh(&self, token: impl Into<String>) -> Result<(), RefreshError> {
        lifetime::refresh(&self.inner.session, token.into()).await
    }

    /// Name and version of the peer's program, as it calls itself; printable, at most 128 bytes.
    pub fn agent(&self) -> String {
        let session = &self.inner.session;
        if session.client {
            session
                .welcome()
                .map_or_else(String::new, |welcome| welcome.agent.clone())
        } else {
            session.agent.get().cloned().unwrap_or_default()
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
        let reason = session.end.wait().await;
        if let Some(endpoint) = session.endpoint() {
            // Let the last packets out; a silent network must not hold us up.
            let _ = tokio::time::timeout(Duration::from_millis(500), endpoint.wait_idle()).await;
        }
        reason
    }

    /// How the socket ended, if it has.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.inner.session.end.get().cloned()
    }

    /// The server's word that it is going down, if it has sent one.
    pub fn goaway(&self) -> Option<GoAway> {
        lock(&self.inner.session.received_goaway).clone()
    }

    /// What becomes of the connection of a client that reconnects (`ClientBuilder::reconnect`): the present
    /// state, then each change. Empty for other sockets.
    pub fn states(&self) -> SocketStates {
        match &self.inner.session.states {
            Some(states) => states.watch(),
            None => SocketStates::none(),
        }
    }

    /// The present state of a client that reconnects; `None` for other sockets.
    pub fn state(&self) -> Option<SocketState> {
        self.inner.session.states.as_ref().map(StateFeed::now)
    }

    /// Sends from another local address from now on, as when the device has moved to another network. The
    /// connection goes on: nothing is lost, nothing reconnects. Port 0 takes a free one.
    ///
    /// # Errors
    /// When the address cannot be bound; then the old one stays. `Unsupported` at a server.
    pub fn rebind(&self, local: SocketAddr) -> io::Result<()> {
        let session = &self.inner.session;
        let endpoint = session.endpoint().ok_or(io::ErrorKind::Unsupported)?;
        endpoint.rebind(endpoint::bind(local, session.limits.socket_buffer)?)
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

    /// What happened so far on this socket.
    pub fn metrics(&self) -> Metrics {
        self.inner.session.tally.metrics(self.stats())
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket")
            .field("id", &self.id())
            .field("peer", &self.peer())
            .field("remote", &self.remote_address())
            .finish_non_exhaustive()
    }
}

impl Channel {
    /// Who the peer is; see [`Socket::peer`].
    pub fn peer(&self) -> Option<Peer> {
        self.session().peer.get()
    }

    /// The id of the socket this channel belongs to.
    pub fn session_id(&self) -> SessionId {
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

/// A connection on which a session goes on, or another begins.
pub(crate) struct Link {
    pub(crate) conn: quinn::Connection,
    /// A client's.
    pub(crate) endpoint: Option<quinn::Endpoint>,
    pub(crate) control: Control,
    /// At a client, what the server has said.
    pub(crate) welcome: Option<Welcome>,
}

/// Where a session's next connection comes from.
pub(crate) enum Comeback {
    /// From nowhere: it ends with its connection.
    Never,
    /// From the client.
    Awaited(Awaited),
    /// From us.
    Dialled(Box<Dialler>),
}

/// What a server does about a client that may come back.
pub(crate) struct Awaited {
    pub(crate) links: mpsc::Receiver<Link>,
    /// How long it waits.
    pub(crate) window: Duration,
    /// How many sessions wait, of how many that may.
    pub(crate) detached: Arc<AtomicUsize>,
    pub(crate) most: usize,
}

impl Awaited {
    async fn next(&mut self, reason: CloseReason) -> Result<Link, CloseReason> {
        struct Waiting(Arc<AtomicUsize>);
        impl Drop for Waiting {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let before = self.detached.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(self.detached.clone());
        if before >= self.most {
            tracing::warn!(%reason, most = self.most, "connection lost; no room to keep its session");
            return Err(reason);
        }
        tracing::info!(%reason, window = ?self.window, "connection lost; its session waits for the client");
        match tokio::time::timeout(self.window, self.links.recv()).await {
            Ok(Some(link)) => Ok(link),
            Ok(None) | Err(_) => Err(reason),
        }
    }
}

/// How the service of one connection ended.
enum Outcome {
    /// And the session with it.
    Over(CloseReason),
    /// The session may go on over another.
    Lost(CloseReason),
    /// The client has come back over this one.
    Replaced(Box<Link>),
    /// The server goes away and our channels have ended: to the next.
    Moved(CloseReason),
}

/// Serves a session until it ends, over however many connections.
pub(crate) async fn live(
    session: Arc<Session>,
    mut control: Control,
    registry: Arc<Registry>,
    incoming: mpsc::Sender<Channel>,
    mut comeback: Comeback,
) -> CloseReason {
    let mut channels = JoinSet::new();
    let mut driver = Driver {
        session: session.clone(),
        registry,
        incoming,
        rate: Rate::new(session.limits.channel_rate),
        lifetime: Lifetime::new(&session),
        resumed: false,
    };
    let reason = loop {
        let next = match driver
            .drive(&mut control, &mut channels, &mut comeback)
            .await
        {
            Outcome::Over(reason) => break reason,
            Outcome::Replaced(link) => Ok(*link),
            Outcome::Lost(reason) => {
                comeback
                    .next(&session, &mut driver.lifetime, reason, false)
                    .await
            }
            Outcome::Moved(reason) => {
                comeback
                    .next(&session, &mut driver.lifetime, reason, true)
                    .await
            }
        };
        match next {
            Ok(link) => control = driver.change(link, &mut channels),
            Err(reason) => break reason,
        }
    };
    session.end.set(reason);
    let reason = session.end.wait().await;
    session.set_up(None);
    session.fail_resumable(&reason);
    if session.welcome().is_some() {
        session.tally.less(Count::Sockets);
        session.tally.closed(&reason);
    }
    if let Some(states) = &session.states {
        states.set(SocketState::GaveUp(reason.clone()));
    }
    // Handlers see the end in their next `recv`; give those that only wait for it the time to leave.
    let grace = async { while channels.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(session.timeouts.close, grace).await;
    session.tasks.close();
    reason
}

impl Comeback {
    /// The next connection; why there is none, otherwise.
    async fn next(
        &mut self,
        session: &Arc<Session>,
        lifetime: &mut Lifetime,
        reason: CloseReason,
        moved: bool,
    ) -> Result<Link, CloseReason> {
        /// Counts one session for as long as it has no connection.
        struct Detached<'a>(&'a Tally);
        impl Drop for Detached<'_> {
            fn drop(&mut self) {
                self.0.less(Count::Detached);
            }
        }
        session.set_up(None);
        session.budget.set_detached(true);
        session.tally.one(Count::Detached);
        let _detached = Detached(&session.tally);
        let next = async {
            match self {
                Self::Never => Err(reason),
                Self::Awaited(awaited) => awaited.next(reason).await,
                Self::Dialled(dialler) => dialler.next(session, reason, moved).await,
            }
        };
        let closed = async {
            loop {
                let mut wished = std::pin::pin!(session.wished.notified());
                wished.as_mut().enable();
                if let Some(reason) = lock(&session.wishes).close.clone() {
                    return reason;
                }
                wished.await;
            }
        };
        tokio::select! {
            link = next => link,
            reason = closed => Err(reason),
            // Its token has ended, say: nobody need come back.
            reason = session.end.wait() => Err(reason),
            () = lifetime.run() => std::future::pending().await,
        }
    }

    /// Whether the end of a connection for this reason may be followed by another connection.
    fn survives(&self, reason: &CloseReason) -> bool {
        match self {
            Self::Never => false,
            // The client said goodbye, or we did; or the path is gone.
            Self::Awaited(_) => reason.by == Side::Transport,
            Self::Dialled(_) => reason.retry && reason.by != Side::Local,
        }
    }

    /// The client, back over another connection while the present one still seems to live.
    async fn replaced(&mut self) -> Link {
        if let Self::Awaited(awaited) = self
            && let Some(link) = awaited.links.recv().await
        {
            return link;
        }
        std::future::pending().await
    }
}

/// Serves the connections of one session, one after the other.
struct Driver {
    session: Arc<Session>,
    registry: Arc<Registry>,
    incoming: mpsc::Sender<Channel>,
    rate: Rate,
    lifetime: Lifetime,
    /// The present connection resumed the session.
    resumed: bool,
}

/// How long confirmations gather before they are sent.
const CONFIRM_DELAY: Duration = Duration::from_millis(5);

impl Driver {
    /// Goes over to another connection.
    fn change(&mut self, link: Link, channels: &mut JoinSet<()>) -> Control {
        let session = &self.session;
        session.conn().close(
            CloseCode::SUPERSEDED.varint(),
            b"the session goes on over another connection",
        );
        lock(&session.received_goaway).take();
        session.prune();
        // The peer's channels come back all at once.
        self.rate.grant(session.limits.channels);
        let granted = session
            .welcome()
            .is_none_or(|welcome| welcome.resume.is_some());
        let mut reason = None;
        self.resumed = true;
        if let Some(welcome) = link.welcome {
            self.resumed = welcome.resumed;
            session.peer_frame.store(welcome.frame, Ordering::Relaxed);
            if !welcome.resumed {
                let words = welcome
                    .reason
                    .clone()
                    .unwrap_or_else(|| if granted { "unknown" } else { "off" }.to_owned());
                let text = format!("the session could not be resumed: {words}");
                session.tally.word(Words::ResumesRefused, &words);
                session.fail_resumable(&CloseReason::new(
                    CloseCode::NOT_RESUMED,
                    text,
                    Side::Transport,
                ));
                reason = Some(words);
                // Another session counts its channels from the beginning.
                *lock(&session.seen) = Seen::default();
            }
            session.life.counts_for(welcome.expires);
            session.set_welcome(welcome);
        }
        session.life.reattached();
        let number = session.set_link(link.conn, link.endpoint);
        session.budget.set_detached(false);
        let conn = session.conn();
        for pipe in session.kept_own() {
            channels.spawn(pipe.reopen(session.clone(), conn.clone(), number));
        }
        session.set_up(Some(number));
        if self.resumed {
            session.tally.one(Count::Resumed);
        }
        if session.client {
            session.tally.one(Count::Reconnects);
        }
        if let Some(rooms) = session.rooms.get() {
            rooms.resumed(session, number);
        }
        tracing::info!(session = %session.id(), resumed = self.resumed, "connected again");
        if let Some(states) = &session.states {
            states.set(SocketState::Connected {
                resumed: self.resumed,
                reason,
            });
        }
        link.control
    }

    /// Serves one connection until it ends, or the session goes over to another.
    async fn drive(
        &mut self,
        control: &mut Control,
        channels: &mut JoinSet<()>,
        comeback: &mut Comeback,
    ) -> Outcome {
        let session = self.session.clone();
        let (conn, link) = session.link();
        if self.resumed {
            let open = session.kept_own().iter().map(|pipe| pipe.key.id).collect();
            if let Some(frame) = control::encode_channels(open) {
                write_control(&session, &mut control.send, frame).await;
            }
        }
        let mut confirm_at = None;
        let mut move_at: Option<Instant> = None;
        let mut volatile = pin!(crate::volatile::serve(&session, &conn));
        loop {
            tokio::select! {
                never = &mut volatile => match never {},
                stream = conn.accept_bi() => match stream {
                    Ok((send, recv)) => {
                        if !self.rate.take() {
                            let text = format!("more than {} channels a second", session.limits.channel_rate);
                            session.abort(CloseReason::local(CloseCode::RATE_LIMITED, text));
                            continue;
                        }
                        let span = tracing::debug_span!("channel", name = Empty, id = Empty);
                        let serve = serve_stream(
                            session.clone(),
                            self.registry.clone(),
                            self.incoming.clone(),
                            (conn.clone(), link),
                            send,
                            recv,
                        );
                        channels.spawn(serve.instrument(span));
                    }
                    Err(error) => {
                        let reason = session.reason_for(&error);
                        return if comeback.survives(&reason) {
                            Outcome::Lost(reason)
                        } else {
                            Outcome::Over(reason)
                        };
                    }
                },
                message = poll_fn(|cx| control.inbox.poll_first(cx, &session, &session.counters)) => {
                    match on_control(&session, message) {
                        None => {
                            if move_at.is_none()
                                && matches!(comeback, Comeback::Dialled(_))
                                && let Some(goaway) = &*lock(&session.received_goaway)
                            {
                                // Until then channels go on; new ones wait for the next server.
                                move_at = Some(Instant::now() + goaway.wait());
                                session.set_up(None);
                                if let Some(states) = &session.states {
                                    states.set(SocketState::GoingAway(goaway.clone()));
                                }
                            }
                        }
                        // The control stream may tell of a lost connection before the connection does.
                        Some(reason) if reason.by != Side::Local && comeback.survives(&reason) => {
                            // It will not be there for us, but perhaps another is.
                            conn.close(reason.code.varint(), reason.text.as_bytes());
                            return Outcome::Lost(reason);
                        }
                        Some(reason) => {
                            if reason.by == Side::Peer {
                                // The peer has flushed its channels and leaves the last word to us. What we
                                // have queued gets a moment too; a peer that no longer reads cannot hold us up.
                                session.finish_channels();
                                session.channels_done(session.timeouts.close / 5).await;
                                let (code, text) = (reason.code.varint(), reason.text.clone());
                                session.end.set(reason);
                                conn.close(code, text.as_bytes());
                            } else {
                                session.abort(reason);
                            }
                            let error = conn.closed().await;
                            return Outcome::Over(session.reason_for(&error));
                        }
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
                        close_gracefully(&session, control, reason).await;
                        let error = conn.closed().await;
                        return Outcome::Over(session.reason_for(&error));
                    }
                },
                () = session.confirm_due.notified() => {
                    confirm_at.get_or_insert_with(|| Instant::now() + CONFIRM_DELAY);
                },
                () = at(confirm_at) => {
                    confirm_at = None;
                    confirm(&session, &mut control.send).await;
                },
                link = comeback.replaced() => return Outcome::Replaced(Box::new(link)),
                () = at(move_at) => {
                    let reason = CloseReason::new(
                        CloseCode::MOVED,
                        "the server goes away; open the channel again",
                        Side::Transport,
                    );
                    session.finish_channels_because(&reason);
                    return self.leave(control, channels, reason).await;
                },
                frame = self.lifetime.next() => write_control(&session, &mut control.send, frame).await,
                Some(ended) = channels.join_next() => reap(&session, ended),
            }
        }
    }

    /// Serves a connection whose channels are ending, until they have ended, and takes leave of it.
    async fn leave(
        &mut self,
        control: &mut Control,
        channels: &mut JoinSet<()>,
        reason: CloseReason,
    ) -> Outcome {
        let session = &self.session.clone();
        let conn = session.conn();
        let ended = session.all_channels_done();
        let mut ended = std::pin::pin!(ended);
        loop {
            tokio::select! {
                () = &mut ended => break,
                _ = conn.closed() => return Outcome::Moved(reason),
                message = poll_fn(|cx| control.inbox.poll_first(cx, session, &session.counters)) => {
                    if on_control(session, message).is_some() {
                        // Its patience has ended before ours.
                        conn.close(CloseCode::NORMAL.varint(), b"");
                        return Outcome::Moved(reason);
                    }
                },
                () = session.confirm_due.notified() => {
                    tokio::time::sleep(CONFIRM_DELAY).await;
                    confirm(session, &mut control.send).await;
                },
                () = session.wished.notified() => {
                    let close = lock(&session.wishes).close.clone();
                    if let Some(reason) = close {
                        close_gracefully(session, control, reason).await;
                        let error = conn.closed().await;
                        return Outcome::Over(session.reason_for(&error));
                    }
                },
                frame = self.lifetime.next() => write_control(session, &mut control.send, frame).await,
                Some(ended) = channels.join_next() => reap(session, ended),
            }
        }
        if let Some(frame) = control::encode_close(CloseCode::NORMAL, "") {
            write_control(session, &mut control.send, frame).await;
            let _ = control.send.finish();
        }
        let _ = tokio::time::timeout(session.timeouts.close, conn.closed()).await;
        conn.close(CloseCode::NORMAL.varint(), b"");
        Outcome::Moved(reason)
    }
}

/// Tells the peer what it need not keep any more.
async fn confirm(session: &Session, send: &mut quinn::SendStream) {
    let confirms = session.take_confirms();
    let acks = confirms.into_iter().map(|(key, received)| Ack {
        channel: key.id,
        own: key.own,
        received,
    });
    let mut frames: Vec<_> = acks.filter_map(control::encode_ack).collect();
    write_control_all(session, send, &mut frames).await;
}

fn reap(session: &Session, ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        session.tally.one(Count::HandlerPanics);
        tracing::error!("a channel task panicked");
    }
}

/// Waits for a point in time, or for ever.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Acts on a message of the control stream; a reason says that the connection must end.
fn on_control(session: &Session, message: Result<crate::Message, Ending>) -> Option<CloseReason> {
    let order = |text: &str| Some(CloseReason::local(CloseCode::PROTOCOL_ORDER, text));
    let refused =
        |error: ControlError| Some(CloseReason::local(error.close_code(), error.to_string()));
    match message {
        Ok(message) => match message.event() {
            control::CLOSE => match control::decode_close(&message) {
                Ok(reason) => Some(reason),
                Err(error) => refused(error),
            },
            control::GOAWAY if session.client => match control::decode_goaway(&message) {
                Ok(goaway) => {
                    tracing::info!(text = %goaway.text, "the server is going away");
                    lock(&session.received_goaway).get_or_insert(goaway);
                    if session.states.is_none() {
                        session.set_up(None);
                    }
                    None
                }
                Err(error) => refused(error),
            },
            control::WELCOME if session.client && session.welcome().is_none() => {
                match control::decode_welcome(&message) {
                    Ok(welcome) => {
                        session.peer_frame.store(welcome.frame, Ordering::Relaxed);
                        tracing::Span::current().record("session", &*welcome.session);
                        session.tally.one(Count::Admitted);
                        session.tally.one(Count::Sockets);
                        session.life.counts_for(welcome.expires);
                        session.set_welcome(welcome);
                        if let Some(states) = &session.states {
                            states.set(SocketState::Connected {
                                resumed: false,
                                reason: None,
                            });
                        }
                        None
                    }
                    Err(error) => refused(error),
                }
            }
            control::ACK => match control::decode_ack(&message) {
                Ok(ack) => on_ack(session, ack),
                Err(error) => refused(error),
            },
            control::CHANNELS => match control::decode_channels(&message) {
                Ok(Channels { open }) => {
                    lock(&session.tickets).confirm();
                    session.retain_theirs(&open);
                    None
                }
                Err(error) => refused(error),
            },
            control::REFRESH if !session.client => session.life.on_refresh(&message),
            control::REFRESHED if session.client => session.life.on_refreshed(&message),
            _ => order("a message that has no place on the control stream now"),
        },
        Err(Ending::Finished) => order("the control stream ended without $close"),
        Err(Ending::Closed(reason)) if session.conn().close_reason().is_some() => Some(reason),
        Err(Ending::Closed(_)) => order("the control stream was reset"),
        Err(Ending::Violation(reason)) => Some(reason),
    }
}

fn on_ack(session: &Session, ack: Ack) -> Option<CloseReason> {
    // What the peer opened is ours to accept, and the other way round.
    let key = ChannelKey {
        own: !ack.own,
        id: ack.channel,
    };
    // One that is over here may still be confirmed.
    let pipe = session.kept(key)?;
    if ack.received == Ack::REFUSED {
        pipe.refused();
        return None;
    }
    let text = format!(
        "message {} of channel {} is confirmed and was never sent",
        ack.received, ack.channel
    );
    pipe.confirm(ack.received)
        .err()
        .map(|Mismatch| CloseReason::local(CloseCode::RESUME_MISMATCH, text))
}

/// Flushes the channels, tells the peer, and leaves the last word to it; all within the close time.
async fn close_gracefully(session: &Session, control: &mut Control, reason: CloseReason) {
    let within = session.timeouts.close;
    let deadline = Instant::now() + within;
    session.finish_channels();
    session.channels_done(within).await;
    if let Some(frame) = control::encode_close(reason.code, &reason.text) {
        let written = write_control(session, &mut control.send, frame);
        let _ = tokio::time::timeout(within, written).await;
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
    write_control_all(session, send, &mut [frame]).await;
}

/// Writes small frames, as [`write_control`] does one.
async fn write_control_all(session: &Session, send: &mut quinn::SendStream, frames: &mut [Bytes]) {
    let mut writing = std::pin::pin!(send.write_all_chunks(frames));
    loop {
        let conn = session.conn();
        let heard = conn.stats().udp_rx.datagrams;
        match tokio::time::timeout(session.timeouts.close, &mut writing).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => {
                tracing::debug!(%error, "control stream not writable");
                return;
            }
            // A path that is silent is the idle timer's business.
            Err(_) if conn.stats().udp_rx.datagrams == heard => {}
            Err(_) => {
                session.abort(CloseReason::local(
                    CloseCode::SLOW_PEER,
                    "the peer does not read the control stream",
                ));
                return;
            }
        }
    }
}

/// Reads a new stream's `$open` and hands the channel to whoever serves its name.
async fn serve_stream(
    session: Arc<Session>,
    registry: Arc<Registry>,
    incoming: mpsc::Sender<Channel>,
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
        .record("name", crate::code::printable(&name, 128))
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
        None if registry.pull => {
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
        None => {
            session.tally.one(Count::ChannelsRefused);
            let text = format!(
                "no channel named {:?} is served here",
                crate::code::printable(&name, 128)
            );
            channel.close_with(CloseReason::local(CloseCode::NO_SUCH_CHANNEL, text));
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
    fn grant(&mut self, more: u32) {
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
