//! What a socket and its channels share: the connection, the limits, the counters and how it all ends.
//!
//! `Socket` and `Channel` are handles over this; the driver task of a socket (`socket.rs`) acts on the
//! wishes left here.

pub(crate) mod driver;
pub(crate) mod lifetime;
pub(crate) mod open;
pub(crate) mod reconnect;
pub(crate) mod service;
pub(crate) mod socket;
pub(crate) mod streams;

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::base::Lazy;
use crate::base::LogLimit;
use crate::base::extensions::Extensions;
use crate::base::lock;
use crate::base::pool::{Pool, Tenant};
use crate::base::wake::{WakeFlag, WakeFlags};
use crate::channel::outbox::Budget;
use crate::channel::pipe::Pipe;
use crate::channel::resume::Seen;
use crate::channel::turns::Turns;
use crate::channel::volatile::Volatiles;
use crate::metrics::Tally;
use crate::metrics::speed::Counters;
use crate::session::lifetime::Life;
use crate::session::open::OpenError;
use crate::session::reconnect::{ANSWER, StateFeed};
use crate::transport::windows::ReceiveWindow;
use crate::transport::{Connection, ConnectionError, Endpoint, on_path};
use crate::trust::auth::PeerCell;
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::{Limits, Timeouts};
use crate::wire::control::{GoAway, Welcome};

/// A reason that is set once and can be awaited.
#[derive(Debug, Default)]
pub(crate) struct End {
    reason: OnceLock<Box<CloseReason>>,
    set: Notify,
}

impl End {
    /// Sets the reason unless one is set already; says whether it did.
    pub(crate) fn set(&self, reason: CloseReason) -> bool {
        let first = self.reason.set(Box::new(reason)).is_ok();
        if first {
            self.set.notify_waiters();
        }
        first
    }

    pub(crate) fn get(&self) -> Option<&CloseReason> {
        self.reason.get().map(|reason| &**reason)
    }

    pub(crate) async fn wait(&self) -> CloseReason {
        loop {
            let mut notified = std::pin::pin!(self.set.notified());
            notified.as_mut().enable();
            if let Some(reason) = self.get() {
                return reason.clone();
            }
            notified.await;
        }
    }
}

/// The name of a session: 32 hexadecimal digits, chosen by the server. Cheap to clone.
///
/// It stays the same for as long as the session does, over however many connections.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(Arc<str>);

impl SessionId {
    pub(crate) fn new(id: &str) -> Self {
        Self(id.into())
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

/// Names a channel in its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ChannelKey {
    /// This side opened it.
    pub(crate) own: bool,
    /// The opener's number for it.
    pub(crate) id: u64,
}

/// What proves that somebody who wants to resume a session was in it.
#[derive(Default)]
pub(crate) struct Tickets {
    /// The one the client came with last; good until it has shown that it has the next.
    current: Option<[u8; 32]>,
    /// The one in the last `$welcome`.
    next: Option<[u8; 32]>,
    /// When somebody last came with a good one.
    shown: Option<Instant>,
}

impl Tickets {
    /// Makes the next one.
    pub(crate) fn issue(&mut self) -> Result<[u8; 32], aws_lc_rs::error::Unspecified> {
        let mut ticket = [0; 32];
        aws_lc_rs::rand::fill(&mut ticket)?;
        self.next = Some(ticket);
        Ok(ticket)
    }

    /// Whether this one is good. If so, no other but it and the one issued next is from now on.
    pub(crate) fn redeem(&mut self, ticket: &[u8; 32]) -> bool {
        let good = self.is_good(ticket);
        if good {
            self.current = Some(*ticket);
            self.next = None;
        }
        good
    }

    /// Whether this one is good, and none was shown within `pause`.
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

    /// The client has the next one: the one before is used up.
    pub(crate) fn confirm(&mut self) {
        if let Some(next) = self.next.take() {
            self.current = Some(next);
        }
    }
}

/// The application has left a wish.
pub(crate) const WISHED: WakeFlag = WakeFlag(1);
/// There is something to confirm.
pub(crate) const CONFIRM: WakeFlag = WakeFlag(1 << 1);
/// A volatile message waits to be sent.
pub(crate) const SMALL: WakeFlag = WakeFlag(1 << 2);
/// A volatile message waits that is too large for a datagram.
pub(crate) const LARGE: WakeFlag = WakeFlag(1 << 3);

/// How far this side has come with one of the channels, as the peer is to be told.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Confirm {
    /// Frames that it need not keep.
    pub(crate) received: Option<u64>,
    /// The last of its marks.
    pub(crate) mark: Option<u64>,
}

/// What a server that goes away has said, and when it is this client's turn to leave it.
#[derive(Debug, Clone)]
pub(crate) struct Leaving {
    pub(crate) goaway: GoAway,
    pub(crate) turn: Instant,
}

/// What the application asked the driver to do.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    /// Close gracefully for this reason.
    pub(crate) close: Option<CloseReason>,
    /// Tell the peer to go away.
    pub(crate) goaway: Option<GoAway>,
}

/// One connection of a session, with everything that it lends to those who use it. All of that returns together, because
/// the session's next connection has a `Line` of its own: nothing need be handed back by whoever held it last.
pub(crate) struct Line {
    conn: Connection,
    /// Whose turn it is to write, and how much bulk is under way.
    pub(crate) turns: Turns,
}

impl Line {
    fn new(conn: Connection) -> Arc<Self> {
        Arc::new(Self {
            conn,
            turns: Turns::default(),
        })
    }
}

impl Deref for Line {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.conn
    }
}

/// What a server has for all its sessions, and what hears of them.
pub(crate) trait Attached: Any + Send + Sync {
    /// The session goes on over connection number `link`.
    fn resumed(&self, session: &Arc<Session>, link: u64);
}

/// Shared state of one socket.
pub(crate) struct Session {
    conn: RwLock<Arc<Line>>,
    /// Whether this side dialled.
    pub(crate) client: bool,
    pub(crate) peer: PeerCell,
    pub(crate) life: Life,
    pub(crate) limits: Arc<Limits>,
    pub(crate) timeouts: Arc<Timeouts>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) tally: Arc<Tally>,
    /// The span of the connection, parent of its channels'.
    pub(crate) span: tracing::Span,
    pub(crate) extensions: Extensions,
    /// What the server announced (at the client) or has announced (at the server); set on admission.
    welcome: RwLock<Option<Arc<Welcome>>>,
    pub(crate) admitted: Notify,
    /// The peer's agent text, set at the server.
    pub(crate) agent: OnceLock<String>,
    /// Largest frame the peer takes.
    pub(crate) peer_frame: AtomicU64,
    pub(crate) end: End,
    /// Bounds what this peer's misbehaviour puts into the log.
    pub(crate) log_limit: LogLimit,
    pub(crate) wishes: Mutex<Lazy<Wishes>>,
    /// What wakes the driver: [`WISHED`], [`CONFIRM`], [`SMALL`] and [`LARGE`].
    pub(crate) wake: WakeFlags,
    pub(crate) received_goaway: Mutex<Option<Box<Leaving>>>,
    /// The live channels, so that a close can flush them.
    pipes: Mutex<Lazy<HashMap<u64, Weak<Pipe>>>>,
    /// Those that can go on over another connection.
    resumable: Mutex<Lazy<HashMap<ChannelKey, Arc<Pipe>>>>,
    /// Which channels the peer has opened in this session.
    pub(crate) seen: Mutex<Seen>,
    /// What the peer is to be told of what was read.
    confirms: Mutex<Lazy<HashMap<ChannelKey, Confirm>>>,
    /// What resumable channels keep.
    pub(crate) budget: Arc<Budget>,
    pub(crate) tickets: Mutex<Lazy<Tickets>>,
    /// The number of the present connection, counted from 1.
    link: Mutex<u64>,
    /// That number while channels can be opened on it.
    up: Mutex<Option<u64>>,
    up_changed: Notify,
    /// A client that makes another connection when one is lost.
    pub(crate) reconnects: bool,
    /// What becomes of its connections.
    pub(crate) states: StateFeed,
    pub(crate) channel_ended: Notify,
    next_key: AtomicU64,
    /// Datagrams that the connection had sent when this side ended it.
    sent_before: AtomicU64,
    /// Volatile messages that wait, both ways.
    pub(crate) volatiles: Volatiles,
    /// How much the peer may send ahead.
    pub(crate) window: ReceiveWindow,
    /// At a server: bytes for frames that come in pieces, and whose share the peer takes.
    pub(crate) frames: OnceLock<Box<(Pool, Tenant)>>,
    next_channel: AtomicU64,
    /// The server's rooms; never set at a client.
    pub(crate) rooms: OnceLock<Arc<dyn Attached>>,
    /// Writer tasks; each ends with its channel or with the connection.
    pub(crate) tasks: TaskTracker,
    /// A client's endpoint lives as long as its connection.
    endpoint: Mutex<Option<Box<Endpoint>>>,
    /// At a client: what its handles hold, so that the last one to go closes the connection.
    lease: OnceLock<Weak<Lease>>,
    /// The socket's handle, for handlers that ask for it.
    pub(crate) handle: OnceLock<Weak<socket::Handle>>,
}

/// Held by the handles of a client's socket and by its channels; the connection closes with the last one.
pub(crate) struct Lease {
    session: Arc<Session>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.session.wish_close(CloseCode::NORMAL, String::new());
    }
}

impl Session {
    pub(crate) fn new(
        conn: Connection,
        client: bool,
        limits: Arc<Limits>,
        timeouts: Arc<Timeouts>,
        parent: Arc<Counters>,
        tally: Arc<Tally>,
        reconnects: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            conn: RwLock::new(Line::new(conn)),
            client,
            peer: PeerCell::default(),
            life: Life::default(),
            peer_frame: AtomicU64::new(limits.frame as u64),
            budget: Arc::new(Budget::new(limits.resume_bytes)),
            window: ReceiveWindow::new(&limits),
            frames: OnceLock::new(),
            limits,
            timeouts,
            counters: Counters::child(parent),
            tally,
            span: tracing::Span::current(),
            extensions: Extensions::default(),
            welcome: RwLock::default(),
            admitted: Notify::new(),
            agent: OnceLock::new(),
            end: End::default(),
            log_limit: LogLimit::default(),
            wishes: Mutex::default(),
            wake: WakeFlags::default(),
            received_goaway: Mutex::default(),
            pipes: Mutex::default(),
            resumable: Mutex::default(),
            seen: Mutex::default(),
            confirms: Mutex::default(),
            tickets: Mutex::default(),
            link: Mutex::new(1),
            up: Mutex::new(Some(1)),
            up_changed: Notify::new(),
            reconnects,
            states: StateFeed::new(),
            channel_ended: Notify::new(),
            next_key: AtomicU64::new(0),
            sent_before: AtomicU64::new(0),
            volatiles: Volatiles::default(),
            next_channel: AtomicU64::new(1),
            rooms: OnceLock::new(),
            tasks: TaskTracker::new(),
            endpoint: Mutex::default(),
            lease: OnceLock::new(),
            handle: OnceLock::new(),
        })
    }

    /// The connection of this moment.
    pub(crate) fn conn(&self) -> Arc<Line> {
        self.conn
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Counts bytes that a channel has taken from QUIC, and grows the connection's window with them.
    pub(crate) fn read(&self, bytes: u64) {
        if self.window.read(bytes) {
            self.window.used(&self.conn());
        }
    }

    /// Looks after what nobody tells: bytes that nobody reads, and a peer that does not answer. To be called with each
    /// tick of [`look`](crate::transport::windows::look).
    pub(crate) fn look(&self) {
        let conn = self.conn();
        let stats = conn.stats();
        self.window.stuck(&conn, &stats);
        let patience = on_path(self.timeouts.keep_alive.saturating_add(ANSWER), &conn);
        self.states.listen(stats.datagrams_received, patience);
    }

    /// Makes the connection end with its last handle; called once, at a client.
    pub(crate) fn lend(self: &Arc<Self>) -> Arc<Lease> {
        let lease = Arc::new(Lease {
            session: self.clone(),
        });
        let _ = self.lease.set(Arc::downgrade(&lease));
        lease
    }

    /// One more holder of the lease, at a client.
    pub(crate) fn lease(&self) -> Option<Arc<Lease>> {
        self.lease.get()?.upgrade()
    }

    /// Largest frame this side may send, in bytes.
    pub(crate) fn frame_limit(&self) -> usize {
        usize::try_from(self.peer_frame.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    pub(crate) fn next_channel_id(&self) -> u64 {
        self.next_channel.fetch_add(1, Ordering::Relaxed)
    }

    /// What was announced on admission.
    pub(crate) fn welcome(&self) -> Option<Arc<Welcome>> {
        self.welcome
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_welcome(&self, welcome: Welcome) {
        *self.welcome.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(welcome));
        self.admitted.notify_waiters();
    }

    pub(crate) fn id(&self) -> SessionId {
        let welcome = self.welcome();
        SessionId::new(welcome.as_ref().map_or("", |welcome| &welcome.session))
    }

    /// Keeps a client's first endpoint.
    pub(crate) fn set_endpoint(&self, endpoint: Option<Endpoint>) {
        *lock(&self.endpoint) = endpoint.map(Box::new);
    }

    /// A client's endpoint of this moment.
    pub(crate) fn endpoint(&self) -> Option<Endpoint> {
        lock(&self.endpoint).as_deref().cloned()
    }

    /// Goes over to another connection and returns its number. Streams of earlier ones belong to nobody now, and what
    /// an earlier one has given out counts no more.
    pub(crate) fn set_link(&self, conn: Connection, endpoint: Option<Endpoint>) -> u64 {
        let mut link = lock(&self.link);
        *self.conn.write().unwrap_or_else(PoisonError::into_inner) = Line::new(conn);
        *lock(&self.endpoint) = endpoint.map(Box::new);
        *link += 1;
        lock(&self.confirms).take();
        // Who ended the session in the meantime has closed the connection before.
        if let Some(reason) = self.end.get() {
            self.conn().close_because(reason);
        }
        *link
    }

    /// The connection of this moment with its number.
    pub(crate) fn link(&self) -> (Arc<Line>, u64) {
        let link = lock(&self.link);
        (self.conn(), *link)
    }

    /// Does something while connection number `link` is the present one, and nothing if it is no longer.
    pub(crate) fn on_link<T>(&self, link: u64, act: impl FnOnce() -> T) -> Option<T> {
        let present = lock(&self.link);
        (*present == link).then(act)
    }

    /// Channels can be opened on this connection; on none, as long as it says `None`.
    pub(crate) fn set_up(&self, link: Option<u64>) {
        *lock(&self.up) = link;
        self.up_changed.notify_waiters();
    }

    /// Whether there is a connection on which channels can be opened.
    pub(crate) fn is_up(&self) -> bool {
        lock(&self.up).is_some()
    }

    /// This connection is found lost before its driver has.
    pub(crate) fn down(&self, link: u64) {
        if lock(&self.up).take_if(|up| *up == link).is_some() {
            self.up_changed.notify_waiters();
        }
    }

    /// The connection on which a channel can be opened. Waits for one where the client reconnects.
    pub(crate) async fn ready(&self) -> Result<(Arc<Line>, u64), OpenError> {
        loop {
            let mut changed = std::pin::pin!(self.up_changed.notified());
            changed.as_mut().enable();
            if self.closing() {
                return Err(OpenError::Closed(self.closed_reason()));
            }
            if self.is_up() {
                return Ok(self.link());
            }
            if !self.reconnects {
                let leaving = lock(&self.received_goaway).clone();
                return Err(match leaving {
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

    pub(crate) fn closed_reason(&self) -> CloseReason {
        self.end
            .get()
            .cloned()
            .or_else(|| self.wished_close())
            .unwrap_or_else(|| lost("the socket is over"))
    }

    /// Keeps a channel for the next connection.
    pub(crate) fn keep(&self, pipe: &Arc<Pipe>) {
        lock(&self.resumable)
            .get_or_make()
            .insert(pipe.key, pipe.clone());
    }

    /// A channel kept for the next connection.
    pub(crate) fn kept(&self, key: ChannelKey) -> Option<Arc<Pipe>> {
        lock(&self.resumable).get()?.get(&key).cloned()
    }

    /// A live channel.
    pub(crate) fn live(&self, key: ChannelKey) -> Option<Arc<Pipe>> {
        self.kept(key).or_else(|| {
            let pipes = lock(&self.pipes);
            let mut pipes = pipes.get()?.values().filter_map(Weak::upgrade);
            pipes.find(|pipe| pipe.key == key)
        })
    }

    /// The channels that this side opened and keeps for the next connection.
    pub(crate) fn kept_own(&self) -> Vec<Arc<Pipe>> {
        lock(&self.resumable)
            .get()
            .into_iter()
            .flat_map(HashMap::values)
            .filter(|pipe| pipe.key.own)
            .cloned()
            .collect()
    }

    /// How many channels that the peer opened are kept.
    pub(crate) fn kept_theirs(&self) -> usize {
        lock(&self.resumable)
            .get()
            .into_iter()
            .flat_map(HashMap::keys)
            .filter(|key| !key.own)
            .count()
    }

    /// Forgets channels of which nothing can come any more.
    pub(crate) fn prune(&self) {
        if let Some(resumable) = lock(&self.resumable).get_mut() {
            resumable.retain(|_, pipe| !pipe.is_over());
        }
    }

    /// The peer keeps these of the channels that it opened; the others are over, but for those that it has
    /// opened on this connection: their streams may overtake the list.
    pub(crate) fn retain_theirs(&self, open: &[u64]) {
        let open: HashSet<_> = open.iter().collect();
        let (_, link) = self.link();
        let gone: Vec<_> = lock(&self.resumable)
            .get_or_make()
            .extract_if(|key, pipe| !key.own && pipe.link() < link && !open.contains(&key.id))
            .collect();
        for (_, pipe) in gone {
            pipe.fail(
                self,
                &CloseReason::peer(CloseCode::NORMAL, "the peer has ended the channel"),
            );
        }
    }

    /// Ends all channels that waited for another connection.
    pub(crate) fn fail_resumable(&self, reason: &CloseReason) {
        let pipes = lock(&self.resumable).take();
        for pipe in pipes.into_values() {
            pipe.fail(self, reason);
        }
    }

    /// The peer will be told that it need not keep the first `frames` of this channel.
    pub(crate) fn confirm_later(&self, key: Option<ChannelKey>, frames: u64) {
        if let Some(key) = key {
            self.tell_later(key, |confirm| confirm.received = Some(frames));
        }
    }

    /// The peer will be told that the program has come to this mark of the channel.
    pub(crate) fn passed_later(&self, key: ChannelKey, mark: u64) {
        self.tell_later(key, |confirm| confirm.mark = Some(mark));
    }

    fn tell_later(&self, key: ChannelKey, what: impl FnOnce(&mut Confirm)) {
        let mut confirms = lock(&self.confirms);
        let confirms = confirms.get_or_make();
        if confirms.is_empty() {
            self.wake.set(CONFIRM);
        }
        what(confirms.entry(key).or_default());
    }

    /// What the peer is to be told now.
    pub(crate) fn take_confirms(&self) -> HashMap<ChannelKey, Confirm> {
        lock(&self.confirms).take()
    }

    /// Why the connection ended, in the best words known: a reason given here or by the peer's `$close` beats
    /// what QUIC reports.
    pub(crate) fn reason_for(&self, error: &ConnectionError) -> CloseReason {
        if let Some(reason) = self.end.get() {
            return reason.clone();
        }
        if *error == ConnectionError::Local
            && let Some(reason) = self.wished_close()
        {
            return reason;
        }
        error.reason()
    }

    /// Leaves the wish to close; the first one counts.
    pub(crate) fn wish_close(&self, code: CloseCode, text: String) {
        let mut wishes = lock(&self.wishes);
        let wishes = wishes.get_or_make();
        if wishes.close.is_none() {
            wishes.close = Some(CloseReason::local(code, text));
            self.wake.set(WISHED);
        }
    }

    /// Why the application wants to close, if it does.
    pub(crate) fn wished_close(&self) -> Option<CloseReason> {
        lock(&self.wishes).get()?.close.clone()
    }

    pub(crate) fn closing(&self) -> bool {
        self.end.get().is_some()
            || lock(&self.wishes)
                .get()
                .is_some_and(|wishes| wishes.close.is_some())
    }

    /// Ends the connection at once; what is queued is lost.
    pub(crate) fn abort(&self, reason: CloseReason) {
        let before = self.conn().stats().datagrams_sent;
        self.sent_before.store(before, Ordering::Relaxed);
        let _ = self.end.set(reason.clone());
        // Either this finds the connection that takes the place of another, or who exchanges them finds the end.
        let (conn, _) = self.link();
        conn.close_because(&reason);
    }

    /// Waits until nothing is left to be said on a connection that ended in order: the last word was the peer's,
    /// or ours has been given to the network. Any other end is worth repeating to a peer that still sends: for
    /// ever.
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
        // The transport does not tell, but counts.
        while conn.stats().datagrams_sent <= self.sent_before.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub(crate) fn next_registration(&self) -> u64 {
        self.next_key.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn register(&self, registration: u64, pipe: &Arc<Pipe>) {
        lock(&self.pipes)
            .get_or_make()
            .insert(registration, Arc::downgrade(pipe));
    }

    /// Says whether it was there.
    pub(crate) fn unregister(&self, registration: u64) -> bool {
        let was_there = lock(&self.pipes)
            .get_mut()
            .is_some_and(|pipes| pipes.remove(&registration).is_some());
        if was_there {
            self.channel_ended.notify_waiters();
        }
        was_there
    }

    fn live_pipes(&self) -> Vec<Arc<Pipe>> {
        lock(&self.pipes)
            .get()
            .into_iter()
            .flat_map(HashMap::values)
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// Channels whose writer has not ended yet.
    pub(crate) fn live_channels(&self) -> usize {
        lock(&self.pipes).get().map_or(0, HashMap::len)
    }

    /// Lets every channel send what is queued and then end, for good: nothing is kept any more.
    pub(crate) fn finish_channels(&self) {
        for pipe in self.live_pipes() {
            pipe.forget();
            pipe.finish();
        }
    }

    /// Lets every channel send what is queued and then end for this reason.
    pub(crate) fn finish_channels_because(&self, reason: &CloseReason) {
        for pipe in self.live_pipes() {
            pipe.finish_because(reason);
        }
    }

    /// Waits until no channel is live.
    pub(crate) async fn all_channels_done(&self) {
        loop {
            let mut ended = std::pin::pin!(self.channel_ended.notified());
            ended.as_mut().enable();
            if self.live_channels() == 0 {
                return;
            }
            ended.await;
        }
    }

    /// Waits until no channel is live, at most `within`.
    pub(crate) async fn channels_done(&self, within: Duration) -> bool {
        let conn = self.conn();
        tokio::select! {
            () = self.all_channels_done() => true,
            _ = conn.closed() => true,
            () = tokio::time::sleep(within) => false,
        }
    }

    /// Waits for admission, or for the end that came instead.
    pub(crate) async fn wait_admitted(&self) -> Result<(), CloseReason> {
        loop {
            let mut admitted = std::pin::pin!(self.admitted.notified());
            admitted.as_mut().enable();
            if self.welcome().is_some() {
                return Ok(());
            }
            // Who was let in and has left since was let in.
            tokio::select! {
                biased;
                () = admitted => {}
                reason = self.end.wait() => {
                    return self.welcome().map(|_| ()).ok_or(reason);
                }
            }
        }
    }
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

/// What a side calls itself unless the program says otherwise.
pub(crate) fn default_agent() -> String {
    concat!("udpack/", env!("CARGO_PKG_VERSION")).to_owned()
}

/// Gives up a connection of a session that may go on over another: the peer takes it for a loss.
pub(crate) fn give_up(conn: &Connection) {
    let text = "the session goes on over another connection";
    conn.close(CloseCode::SUPERSEDED, text);
}

/// The reason for a connection that ended while a channel still needed it.
pub(crate) fn lost(text: &str) -> CloseReason {
    CloseReason::new(CloseCode::CONNECTION_LOST, text, Side::Transport)
}
