//! A session: the state that an application shares with a peer, over any number of connections.
//!
//! `Socket` and `Channel` are handles. [`Carrier`] is the part of a session that its channels use; [`Session`] has
//! the rest. One task on each side (`driver.rs`) drives a session: it owns the control stream, accepts the peer's
//! streams, and executes requests that are left here.

pub(crate) mod driver;
pub(crate) mod lifetime;
pub(crate) mod open;
pub(crate) mod reconnect;
pub(crate) mod service;
pub(crate) mod socket;
pub(crate) mod streams;
pub(crate) mod subscription;
pub(crate) mod volatile;

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::base::Lazy;
use crate::base::extensions::Extensions;
use crate::base::lock;
use crate::channel::carrier::{Carrier, SessionConnection, lost};
use crate::channel::inbox::Inbox;
use crate::channel::resume::Seen;
use crate::channel::writer::Way;
use crate::channel::{Channel, Opened};
use crate::metrics::Counts;
use crate::metrics::speed::Counters;
use crate::session::lifetime::Life;
use crate::session::open::OpenError;
use crate::session::reconnect::{ANSWER, StateFeed, TransportReason};
use crate::session::volatile::Volatiles;
use crate::transport::{Connection, ConnectionError, Endpoint, on_path};
use crate::trust::auth::PeerCell;
use crate::wire::code::{CloseCode, CloseReason};
use crate::wire::config::{Limits, Timeouts};
use crate::wire::control::{GoAway, Welcome};

/// The name of a session: 32 hexadecimal digits, chosen by the server. Cheap to clone.
///
/// It stays the same for the lifetime of the session, over any number of connections.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(Arc<str>);

impl SessionId {
    pub(crate) fn new(id: &str) -> Self {
        Self(id.into())
    }

    pub(crate) fn shared(&self) -> Arc<str> {
        self.0.clone()
    }

    /// The digits; empty before admission.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for SessionId {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The tickets of a session: a client that resumes it must present one.
#[derive(Default)]
pub(crate) struct Tickets {
    /// The ticket that the client presented last; valid until the client has shown that it has the next one.
    current: Option<[u8; 32]>,
    /// The ticket in the last `$welcome`.
    next: Option<[u8; 32]>,
    /// When a valid one was last presented.
    shown: Option<Instant>,
}

impl Tickets {
    /// Creates the next ticket.
    pub(crate) fn issue(&mut self) -> Result<[u8; 32], aws_lc_rs::error::Unspecified> {
        let mut ticket = [0; 32];
        aws_lc_rs::rand::fill(&mut ticket)?;
        self.next = Some(ticket);
        Ok(ticket)
    }

    /// Whether the ticket is valid. If so, only it and the one issued next are valid from now on.
    pub(crate) fn redeem(&mut self, ticket: &[u8; 32]) -> bool {
        let good = self.is_good(ticket);
        if good {
            self.current = Some(*ticket);
            self.next = None;
        }
        good
    }

    /// Whether the ticket is valid, and none was presented within `pause`.
    pub(crate) fn shown(&mut self, ticket: &[u8; 32], pause: Duration) -> bool {
        let now = Instant::now();
        let early = self.shown.is_some_and(|shown| now - shown < pause);
        let good = self.is_good(ticket) && !early;
        if good {
            self.shown = Some(now);
        }
        good
    }

    fn is_good(&self, ticket: &[u8; 32]) -> bool {
        use subtle::ConstantTimeEq;
        [self.current, self.next]
            .into_iter()
            .flatten()
            .any(|known| known.ct_eq(ticket).into())
    }

    /// The client has the next ticket, so the previous one becomes invalid.
    pub(crate) fn confirm(&mut self) {
        if let Some(next) = self.next.take() {
            self.current = Some(next);
        }
    }
}

/// The `$goaway` of a server, and when this client must leave it.
#[derive(Debug, Clone)]
pub(crate) struct Leaving {
    pub(crate) goaway: GoAway,
    pub(crate) turn: Instant,
}

/// The server's part of all its sessions, which is told of their events.
pub(crate) trait Attached: Any + Send + Sync {
    /// The session continues on connection `number`.
    fn resumed(&self, session: &Arc<Session>, number: u64);
}

/// Shared state of one socket: the part that its channels use (the [`Carrier`]), and the session's own part.
pub(crate) struct Session {
    pub(crate) carrier: Arc<Carrier>,
    pub(crate) peer: PeerCell,
    pub(crate) life: Life,
    /// The span of the connection, parent of its channels'.
    pub(crate) span: tracing::Span,
    pub(crate) extensions: Extensions,
    admission: Admission,
    pub(crate) departure: Departure,
    pub(crate) numbers: ChannelNumbers,
    pub(crate) tickets: Mutex<Lazy<Tickets>>,
    reach: Reach,
    /// The states of its connections.
    pub(crate) states: StateFeed,
    /// How many datagrams the connection had sent when this side closed it.
    sent_before: AtomicU64,
    /// Waiting volatile messages, in both directions.
    pub(crate) volatiles: Volatiles,
    /// The server's rooms; never set on a client.
    pub(crate) rooms: OnceLock<Arc<dyn Attached>>,
    pub(crate) handles: Handles,
}

/// The messages of admission, and the time of the session's beginning.
struct Admission {
    begun: Instant,
    /// The server's `$welcome`, received or sent.
    welcome: RwLock<Option<Arc<Welcome>>>,
    changed: Notify,
    /// The name and version of the peer's program, on a server.
    agent: OnceLock<String>,
    /// Whether the client goes to another address when this server tells it one.
    follows: AtomicBool,
}

impl Admission {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            welcome: RwLock::default(),
            changed: Notify::new(),
            agent: OnceLock::new(),
            follows: AtomicBool::new(false),
        }
    }

    fn welcome(&self) -> Option<Arc<Welcome>> {
        let welcome = self.welcome.read();
        welcome.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, welcome: Welcome) {
        *self.welcome.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(welcome));
        self.changed.notify_waiters();
    }

    /// Waits for admission, or for the end of the session.
    async fn wait(&self, carrier: &Carrier) -> Result<(), CloseReason> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.welcome().is_some() {
                return Ok(());
            }
            // A peer that was admitted and has left counts as admitted.
            tokio::select! {
                biased;
                () = changed => {}
                reason = carrier.end.wait() => {
                    return self.welcome().map(|_| ()).ok_or(reason);
                }
            }
        }
    }
}

/// A server's `$goaway`.
#[derive(Default)]
pub(crate) struct Departure {
    /// On a server: the `$goaway` to send.
    announced: Mutex<Option<Box<GoAway>>>,
    /// On a client: the received `$goaway`.
    received: Mutex<Option<Box<Leaving>>>,
}

impl Departure {
    pub(crate) fn announce(&self, goaway: GoAway) {
        *lock(&self.announced) = Some(Box::new(goaway));
    }

    /// Takes the `$goaway` to send now.
    pub(crate) fn take_announced(&self) -> Option<Box<GoAway>> {
        lock(&self.announced).take()
    }

    /// Records a `$goaway`. Of several, the one with the earliest time applies: a further one can make a client leave
    /// sooner, not later.
    pub(crate) fn receive(&self, leaving: Leaving) {
        let mut received = lock(&self.received);
        if (received.as_ref()).is_none_or(|before| leaving.turn < before.turn) {
            *received = Some(Box::new(leaving));
        }
    }

    pub(crate) fn received(&self) -> Option<Leaving> {
        lock(&self.received).as_deref().cloned()
    }

    /// The time at which this client must leave.
    pub(crate) fn turn(&self) -> Option<Instant> {
        Some(lock(&self.received).as_ref()?.turn)
    }

    /// Removes the `$goaway` when the client has moved to the next server.
    pub(crate) fn forget(&self) -> Option<Box<Leaving>> {
        lock(&self.received).take()
    }
}

/// The numbers of a session's channels.
pub(crate) struct ChannelNumbers {
    next: AtomicU64,
    /// Which channels the peer has opened.
    pub(crate) seen: Mutex<Seen>,
}

/// The current connection of a session.
struct Reach {
    /// The number of the current connection while channels can be opened on it.
    up: Mutex<Option<u64>>,
    changed: Notify,
    /// Whether this is a client that makes another connection when one is lost.
    reconnects: bool,
    /// A client's endpoint lives as long as its connection.
    endpoint: Mutex<Option<Box<Endpoint>>>,
    /// Why a client's connection uses its transport.
    why: Mutex<Option<TransportReason>>,
}

impl Reach {
    fn set_up(&self, number: Option<u64>) {
        *lock(&self.up) = number;
        self.changed.notify_waiters();
    }

    fn is_up(&self) -> bool {
        lock(&self.up).is_some()
    }

    fn down(&self, number: u64) {
        if lock(&self.up).take_if(|up| *up == number).is_some() {
            self.changed.notify_waiters();
        }
    }
}

/// Weak references to the handles of a session.
#[derive(Default)]
pub(crate) struct Handles {
    /// On a client: the lease of the handles; dropping the last handle closes the connection.
    lease: OnceLock<Weak<Lease>>,
    /// The socket's handle, for handlers that take it.
    pub(crate) socket: OnceLock<Weak<socket::Handle>>,
}

impl Deref for Session {
    type Target = Carrier;

    fn deref(&self) -> &Carrier {
        &self.carrier
    }
}

/// A channel's reference to its session.
struct Owner {
    session: Arc<Session>,
    _lease: Option<Arc<Lease>>,
}

impl Channel {
    /// The session it belongs to.
    pub(crate) fn session(&self) -> &Arc<Session> {
        let owner: Option<&Owner> = self.owner().downcast_ref();
        &owner
            .expect("only `Session::channel` makes channels")
            .session
    }
}

/// Held by the handles of a client's socket and by its channels; the connection closes with the last one.
pub(crate) struct Lease {
    carrier: Arc<Carrier>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.carrier.ask_close(CloseCode::NORMAL, String::new());
    }
}

impl Session {
    pub(crate) fn new(
        conn: Connection,
        client: bool,
        limits: Arc<Limits>,
        timeouts: Arc<Timeouts>,
        parent: Arc<Counters>,
        counts: Arc<Counts>,
        reconnects: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            carrier: Carrier::new(conn, client, (limits, timeouts), parent, counts),
            peer: PeerCell::default(),
            life: Life::default(),
            span: tracing::Span::current(),
            extensions: Extensions::default(),
            admission: Admission::new(),
            departure: Departure::default(),
            numbers: ChannelNumbers {
                next: AtomicU64::new(1),
                seen: Mutex::default(),
            },
            tickets: Mutex::default(),
            reach: Reach {
                up: Mutex::new(Some(1)),
                changed: Notify::new(),
                reconnects,
                endpoint: Mutex::default(),
                why: Mutex::default(),
            },
            states: StateFeed::new(),
            sent_before: AtomicU64::new(0),
            volatiles: Volatiles::default(),
            rooms: OnceLock::new(),
            handles: Handles::default(),
        })
    }

    /// Creates a channel on a stream. `own`: this side opened it.
    pub(crate) fn channel(
        self: &Arc<Self>,
        opened: Opened,
        own: bool,
        (way, number): (Way, u64),
        inbox: Inbox,
        counters: Arc<Counters>,
    ) -> Channel {
        let owner = Owner {
            session: self.clone(),
            _lease: self.lease(),
        };
        let carrier = self.carrier.clone();
        Channel::start(
            carrier,
            Box::new(owner),
            opened,
            own,
            (way, number),
            inbox,
            counters,
        )
    }

    /// The age of the session.
    pub(crate) fn age(&self) -> Duration {
        self.admission.begun.elapsed()
    }

    /// Checks for unread bytes, and for a peer that does not answer. To be called with each tick of
    /// [`look`](crate::transport::windows::look).
    pub(crate) fn look(&self) {
        let conn = self.conn();
        let stats = conn.stats();
        self.receive.window.stuck(&conn, &stats);
        let patience = on_path(self.timeouts.keep_alive.saturating_add(ANSWER), &conn);
        self.states.listen(stats.datagrams_received, patience);
    }

    /// Makes the connection end with its last handle; called once, on a client.
    pub(crate) fn new_lease(self: &Arc<Self>) -> Arc<Lease> {
        let lease = Arc::new(Lease {
            carrier: self.carrier.clone(),
        });
        let _ = self.handles.lease.set(Arc::downgrade(&lease));
        lease
    }

    /// One more reference to the lease, on a client.
    pub(crate) fn lease(&self) -> Option<Arc<Lease>> {
        self.handles.lease.get()?.upgrade()
    }

    pub(crate) fn next_channel_id(&self) -> u64 {
        self.numbers.next.fetch_add(1, Ordering::Relaxed)
    }

    /// The `$welcome` of the admission.
    pub(crate) fn welcome(&self) -> Option<Arc<Welcome>> {
        self.admission.welcome()
    }

    pub(crate) fn set_welcome(&self, welcome: Welcome) {
        self.admission.set(welcome);
    }

    /// The name and version of the peer's program, on a server.
    pub(crate) fn agent(&self) -> &str {
        self.admission.agent.get().map_or("", String::as_str)
    }

    pub(crate) fn set_agent(&self, agent: String) {
        let _ = self.admission.agent.set(agent);
    }

    /// At a server: whether the client goes to another address when it is told one.
    pub(crate) fn follows(&self) -> bool {
        self.admission.follows.load(Ordering::Relaxed)
    }

    pub(crate) fn set_follows(&self) {
        self.admission.follows.store(true, Ordering::Relaxed);
    }

    pub(crate) fn id(&self) -> SessionId {
        let welcome = self.welcome();
        SessionId::new(welcome.as_ref().map_or("", |welcome| &welcome.session))
    }

    /// Keeps a client's first endpoint.
    pub(crate) fn set_endpoint(&self, endpoint: Option<Endpoint>) {
        *lock(&self.reach.endpoint) = endpoint.map(Box::new);
    }

    pub(crate) fn set_transport_reason(&self, why: Option<TransportReason>) {
        *lock(&self.reach.why) = why;
    }

    /// Why a client's connection uses its transport.
    pub(crate) fn transport_reason(&self) -> Option<TransportReason> {
        *lock(&self.reach.why)
    }

    /// Whether a client can replace its connection by a better one without losing anything: its session is resumed, and
    /// no channel ends with the connection.
    pub(crate) fn can_change(&self) -> bool {
        let resumes = self
            .welcome()
            .is_some_and(|welcome| welcome.resume.is_some());
        let stays = !self.closing() && self.departure.turn().is_none();
        resumes && stays && !self.is_tied()
    }

    /// A client's current endpoint.
    pub(crate) fn endpoint(&self) -> Option<Endpoint> {
        lock(&self.reach.endpoint).as_deref().cloned()
    }

    /// Moves to another connection and returns its number.
    pub(crate) fn move_to(&self, conn: Connection, endpoint: Option<Endpoint>) -> u64 {
        *lock(&self.reach.endpoint) = endpoint.map(Box::new);
        self.set_connection(conn)
    }

    /// Sets the connection on which channels can be opened; `None`: on none.
    pub(crate) fn set_up(&self, number: Option<u64>) {
        self.reach.set_up(number);
    }

    /// Whether this is a client that makes another connection when one is lost.
    pub(crate) fn reconnects(&self) -> bool {
        self.reach.reconnects
    }

    /// Whether there is a connection on which channels can be opened.
    pub(crate) fn is_up(&self) -> bool {
        self.reach.is_up()
    }

    /// Records that a connection is lost before its driver notices it.
    pub(crate) fn down(&self, number: u64) {
        self.reach.down(number);
    }

    /// The connection on which a channel can be opened. Waits for one if the client reconnects.
    pub(crate) async fn ready(&self) -> Result<(Arc<SessionConnection>, u64), OpenError> {
        loop {
            let mut changed = std::pin::pin!(self.reach.changed.notified());
            changed.as_mut().enable();
            if self.closing() {
                return Err(OpenError::Closed(self.closed_reason()));
            }
            if self.is_up() {
                return Ok(self.current());
            }
            if !self.reconnects() {
                return Err(match self.departure.received() {
                    Some(leaving) => OpenError::GoingAway(leaving.goaway),
                    None => OpenError::Closed(lost("the connection is lost")),
                });
            }
            tokio::select! {
                () = changed => {}
                _ = self.end.wait() => {}
            }
        }
    }

    /// Closes the connection at once; queued messages are lost.
    pub(crate) fn abort(&self, reason: CloseReason) {
        let conn = self.conn();
        let before = conn.stats().datagrams_sent;
        // If several callers end the session, the first one's close may have been sent already.
        if !conn.is_over() {
            self.sent_before.store(before, Ordering::Relaxed);
        }
        let _ = self.end.set(reason.clone());
        // Either this code finds a replacing connection, or the code that replaces it finds the end.
        let (conn, _) = self.current();
        conn.close_because(&reason);
    }

    /// Waits until a connection that ended in order needs no further packets: the peer closed it, or this side's
    /// close has been sent. After any other end it waits for ever, because QUIC repeats the close to a peer that
    /// still sends.
    pub(crate) async fn parted(&self) {
        let conn = self.conn();
        match conn.error() {
            Some(ConnectionError::Local) => {}
            Some(_) => return,
            None => return std::future::pending().await,
        }
        if self
            .end
            .get()
            .is_none_or(|end| end.code != CloseCode::NORMAL)
        {
            return std::future::pending().await;
        }
        // The transport does not report the sending of the close, but it counts datagrams.
        while conn.stats().datagrams_sent <= self.sent_before.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits for admission, or for the end of the session.
    pub(crate) async fn wait_admitted(&self) -> Result<(), CloseReason> {
        self.admission.wait(&self.carrier).await
    }
}

/// The span of a channel's tasks: the channel's own, or the connection's if the own one is below the level of the log.
/// Otherwise log lines of these tasks would not name the connection, because its span is not entered there.
pub(crate) fn or_parent(own: tracing::Span, around: tracing::Span) -> tracing::Span {
    if own.is_disabled() { around } else { own }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id())
            .field("remote", &self.conn().remote_address())
            .field("end", &self.end.get())
            .finish_non_exhaustive()
    }
}

/// The default program name and version.
pub(crate) fn default_agent() -> String {
    concat!("udpack/", env!("CARGO_PKG_VERSION")).to_owned()
}

/// Gives up a connection of a session that may continue on another one: to the peer it looks like a loss.
pub(crate) fn give_up(conn: &Connection) {
    let text = "the session goes on over another connection";
    conn.close(CloseCode::SUPERSEDED, text);
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("id", &self.id())
            .field("name", &self.name())
            .field("session", &self.session_id())
            .finish_non_exhaustive()
    }
}
