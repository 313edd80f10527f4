//! [`Socket`]: the handle of one admitted session, and the handlers that serve its channels by name.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};

use crate::channel::{Channel, Closed};
use crate::trust::auth::Peer;
use crate::trust::origin::Transport;
use crate::wire::code::{CloseCode, CloseReason};
use crate::wire::control::GoAway;

use crate::base::extensions::Extensions;
use crate::channel::carrier::REQUESTED;
use crate::metrics::Metrics;
use crate::metrics::speed::{SpeedMeter, Stats};
use crate::session::lifetime::{self, RefreshError};
use crate::session::reconnect::{SocketState, SocketStates, TransportReason};
use crate::session::{Lease, Session, SessionId};

/// The most channels of one socket that wait for `accept_channel`.
const CHANNEL_QUEUE: usize = 64;

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
    /// `None` if every channel is passed to a handler.
    incoming: Option<Mutex<mpsc::Receiver<Channel>>>,
    _lease: Option<Arc<Lease>>,
}

impl Socket {
    /// Creates the first handle, and the queue of `accept_channel` if `pull` is set.
    pub(crate) fn new(session: Arc<Session>, pull: bool) -> (Self, Option<mpsc::Sender<Channel>>) {
        let lease = session.client.then(|| session.new_lease());
        let (queue, incoming) = pull.then(|| mpsc::channel(CHANNEL_QUEUE)).unzip();
        let inner = Arc::new(Handle {
            session,
            incoming: incoming.map(Mutex::new),
            _lease: lease,
        });
        let _ = inner.session.handles.socket.set(Arc::downgrade(&inner));
        (Self { inner }, queue)
    }

    /// A handle of this session: a clone of the existing ones, or, if all were dropped, one that accepts no channels.
    pub(crate) fn of(session: &Arc<Session>) -> Self {
        let inner = session.handles.socket.get().and_then(Weak::upgrade);
        Self {
            inner: inner.unwrap_or_else(|| {
                Arc::new(Handle {
                    session: session.clone(),
                    incoming: None,
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

    /// The identity of the peer. On a server: the result of the verifier. On a client: the server, by its fingerprint
    /// or its name. A client's claims may change with its token, its id does not.
    pub fn peer(&self) -> Peer {
        let known = self.inner.session.peer.get();
        known.unwrap_or_else(|| Peer::new(""))
    }

    /// How long the client's token remains valid; `None` if it does not expire or the expiry is unknown. After that
    /// the server closes the socket with `auth_expired`.
    pub fn expires_in(&self) -> Option<Duration> {
        self.inner.session.life.time_left()
    }

    /// Presents a new token for the same identity, on a client. Its expiry and its rights apply from then on. Calls
    /// are answered one by one.
    ///
    /// # Errors
    /// [`RefreshError::Denied`] when the server refused it: the socket stays as it was until the old token
    /// ends. A token that is not accepted counts as a failed authentication of this address.
    ///
    /// # Cancel safety
    /// A dropped future may have presented the token; then the server's answer still takes effect.
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
            session.agent().to_owned()
        }
    }

    /// The transport of the current connection, or of the last one.
    pub fn transport(&self) -> Transport {
        self.inner.session.conn().transport()
    }

    /// Why the connection has that transport, on a client; `None` on a server. It changes with
    /// [`SocketState::Connected`].
    pub fn transport_reason(&self) -> Option<TransportReason> {
        self.inner.session.transport_reason()
    }

    /// The peer's address as of now; it may change when the peer moves.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.session.conn().remote_address()
    }

    /// Values that the application attaches to this socket.
    pub fn extensions(&self) -> &Extensions {
        &self.inner.session.extensions
    }

    /// Waits until the server has admitted this client. A socket from `connect` is admitted already; one
    /// from `connect_eager` may be used in the meantime.
    ///
    /// # Errors
    /// How the socket ended instead.
    pub async fn admitted(&self) -> Result<(), CloseReason> {
        self.inner.session.wait_admitted().await
    }

    /// The next channel that the peer opened and that has no registered handler; `None` when the socket has ended.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn accept_channel(&self) -> Option<Channel> {
        match &self.inner.incoming {
            Some(incoming) => incoming.lock().await.recv().await,
            None => {
                self.inner.session.end.wait().await;
                None
            }
        }
    }

    /// Closes gracefully: no new channels are opened, queued messages are sent and acknowledged, then the peer is
    /// told and the connection ends.
    ///
    /// The close begins at once; awaiting the result waits for the end, at most slightly longer than
    /// `Timeouts::close`. Calling it again, or when the socket is already over, changes nothing: the first reason
    /// stays.
    pub fn close(&self, code: CloseCode, text: impl Into<String>) -> Closed {
        self.inner.session.ask_close(code, text.into());
        let socket = self.clone();
        Closed {
            future: Box::pin(async move { socket.closed().await }),
        }
    }

    /// Closes at once: queued messages are lost; code and text are sent once, without retransmission.
    pub fn abort(&self, code: CloseCode, text: impl Into<String>) {
        self.inner.session.abort(CloseReason::local(code, text));
    }

    /// Waits until the socket has ended and returns the reason.
    pub async fn closed(&self) -> CloseReason {
        let session = &self.inner.session;
        let reason = session.end.wait().await;
        if let Some(endpoint) = session.endpoint() {
            // Lets the last packets be sent, for a limited time in case the network is silent.
            let _ = tokio::time::timeout(Duration::from_millis(500), async {
                tokio::select! {
                    () = session.parted() => {}
                    () = endpoint.wait_idle() => {}
                }
            })
            .await;
        }
        reason
    }

    /// How the socket ended, if it has.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.inner.session.end.get().cloned()
    }

    /// The server's `$goaway`, if it has sent one; of several, the one with the earliest time.
    pub fn goaway(&self) -> Option<GoAway> {
        let leaving = self.inner.session.departure.received()?;
        Some(leaving.goaway)
    }

    /// The states of this socket's connection: the current one, then each change.
    pub fn states(&self) -> SocketStates {
        self.inner.session.states.watch()
    }

    /// The current state of this socket's connection.
    pub fn state(&self) -> SocketState {
        self.inner.session.states.now()
    }

    /// Whether the peer is reachable: connected, admitted, and not silent.
    ///
    /// A peer that dies sends no message. It is noticed after at most `Timeouts::keep_alive`, 3 s for the answer, 4
    /// round trips, and 2 s for the interval of the check: 15 s by default. If packets arrive again before the idle
    /// time-out, nothing is lost.
    pub fn is_connected(&self) -> bool {
        self.inner.session.states.is_connected()
    }

    /// Whether this socket reconnects when it has lost its connection; see `ClientBuilder::reconnect`.
    pub fn reconnects(&self) -> bool {
        self.inner.session.reconnects()
    }

    /// Sends from another local address from now on, for example after the device has moved to another network. The
    /// connection continues, and nothing is lost. Port 0 selects a free port.
    ///
    /// # Errors
    /// When the address cannot be bound; the old one then stays in use. `Unsupported` on a server.
    pub fn rebind(&self, local: SocketAddr) -> io::Result<()> {
        let session = &self.inner.session;
        let endpoint = session.endpoint().ok_or(io::ErrorKind::Unsupported)?;
        endpoint.rebind(local, session.limits.socket_buffer)
    }

    /// Sends `$goaway`: the client finishes its work and reconnects later or to another server. Only for servers.
    pub(crate) fn send_goaway(&self, goaway: GoAway) {
        self.inner.session.departure.announce(goaway);
        self.inner.session.wake.set(REQUESTED);
    }

    /// The age of the session, over all its connections.
    pub fn age(&self) -> Duration {
        self.inner.session.age()
    }

    /// How many channels are open on this side of the socket.
    pub fn channels(&self) -> usize {
        self.inner.session.live_channels()
    }

    /// The speed of this socket, once a second.
    pub fn speed(&self) -> SpeedMeter {
        let session = self.inner.session.clone();
        SpeedMeter::new(Box::new(move || {
            let conn = session.conn();
            (!conn.is_over()).then(|| Stats::of(&conn, &session.counters))
        }))
    }

    /// The statistics so far.
    pub fn stats(&self) -> Stats {
        Stats::of(&self.inner.session.conn(), &self.inner.session.counters)
    }

    /// The metrics of this socket so far.
    pub fn metrics(&self) -> Metrics {
        self.inner.session.counts.metrics(self.stats())
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
    /// The identity of the peer; see [`Socket::peer`].
    pub fn peer(&self) -> Option<Peer> {
        self.session().peer.get()
    }

    /// The socket this channel belongs to.
    pub fn socket(&self) -> Socket {
        Socket::of(self.session())
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
