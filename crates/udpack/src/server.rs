//! [`Server`]: one UDP port, one identity, many sockets.

mod admission;
mod pace;

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use self::admission::{FAREWELLS, accept_loop, handshake_shares, socket_shares};
use self::pace::Pace;
use crate::base::LogLimit;
use crate::base::lock;
use crate::base::pool::{Pool, Shares};
use crate::base::text::printable_within;
use crate::cluster::Cluster;
use crate::cluster::wire::AROUND;
use crate::metrics::speed::{Counters, SpeedMeter, Stats};
use crate::metrics::{Counts, Metrics};
use crate::serve::everywhere::Sockets as AllSockets;
use crate::serve::node::{About, ClusterView, Node, Spread};
use crate::serve::rooms::Rooms;
use crate::session::driver::{Awaited, Comeback, Established};
use crate::session::lifetime::{Authorize, Guard};
use crate::session::service::{Registry, ServeChannel};
use crate::session::socket::Socket;
use crate::session::{Attached, Session, default_agent};
use crate::transport::endpoint::{At, Via};
use crate::transport::listener::{ListenError, Listener};
use crate::transport::lookup::unmapped;
use crate::transport::mux::Ends;
use crate::transport::trips;
use crate::transport::windows;
use crate::trust::auth::{Authenticate, Deny, Peer, Penalties};
use crate::trust::fingerprint::Fingerprint;
#[cfg(feature = "https")]
use crate::trust::https::Https;
use crate::trust::identity::{Identity, IdentityError};
use crate::trust::origin::{Transport, Web};
use crate::trust::web_certificate::Certificates;
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::InvalidSetting;
use crate::wire::config::{CongestionControl, Drain, Limits, Timeouts};
use crate::wire::control::{GoAway, HelloMessage, ResumeTicket};

/// The most sockets that wait for `accept`.
const ACCEPT_QUEUE: usize = 128;
/// A client with a channel on its way when the server drains may take this long, beside the round trips, to hear of it.
const ARRIVING: Duration = Duration::from_millis(25);
/// The close text when the server drains.
const SHUTTING_DOWN: &str = "the server is shutting down";

/// A bound server. A handle: clones share one server; when the last is dropped, the server closes at once.
///
/// Serve by handlers (registered on the [builder](ServerBuilder)) or by [`accept`](Self::accept), or both.
#[derive(Clone)]
pub struct Server {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    accepting: Mutex<Option<JoinHandle<()>>>,
    accepted: tokio::sync::Mutex<mpsc::Receiver<Socket>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared
            .listener
            .close(CloseCode::SHUTTING_DOWN, "the server is gone");
        if let Some(task) = lock(&self.accepting).take() {
            task.abort();
        }
    }
}

/// State that the accept loop and the connection tasks share.
struct Shared {
    listener: Listener,
    key: PublicKey,
    guard: Arc<Guard>,
    service: Service,
    limits: Arc<Limits>,
    timeouts: Arc<Timeouts>,
    agent: String,
    counters: Arc<Counters>,
    sessions: Sessions,
    counts: Arc<Counts>,
    sockets: Roster,
    places: Places,
    pace: Pace,
    log_limit: LogLimit,
    draining: AtomicBool,
    tasks: TaskTracker,
}

/// What clients know the server by.
struct PublicKey {
    fingerprint: Fingerprint,
    certificates: Arc<Certificates>,
}

/// The parts of a program that receive an admitted socket.
struct Service {
    registry: Arc<Registry>,
    on_socket: Option<SocketHandler>,
    rooms: Rooms,
    /// The same, as each session has it.
    attached: Arc<dyn Attached>,
    accept_queue: mpsc::Sender<Socket>,
    /// Whether the program calls `accept`.
    pull: AtomicBool,
}

/// Sessions that a client may resume.
#[derive(Default)]
struct Sessions {
    /// By id.
    kept: Mutex<HashMap<String, Kept>>,
    /// How many of them are detached.
    detached: Arc<AtomicUsize>,
}

/// The pools of places that connections occupy.
struct Places {
    /// Places for sockets, divided by address.
    sockets: Pool,
    /// Places for peers that are not admitted yet, divided by address.
    handshakes: Pool,
    /// Places for refusals with a text.
    farewells: Pool,
    /// Bytes for large frames that arrive in parts, divided by token.
    frames: Pool,
    /// The budget from which the sockets' windows grow.
    windows: Arc<windows::Pool>,
}

/// The current sockets, and the totals of past ones.
#[derive(Default)]
struct Roster {
    now: Mutex<Sockets>,
    /// Wire statistics of past sockets.
    past: Mutex<Stats>,
    ended: Notify,
}

/// A session to resume, with the permit to hand it a connection; otherwise the reason, a word of PROTOCOL.md.
type ComeBack = Result<(Arc<Session>, mpsc::OwnedPermit<Box<Established>>), &'static str>;

/// A session that a client may resume.
struct Kept {
    session: Arc<Session>,
    next_connections: mpsc::Sender<Box<Established>>,
}

type SocketHandler = Arc<dyn Fn(Socket) -> BoxFuture<'static, ()> + Send + Sync>;

#[derive(Default)]
struct Sockets {
    admitted: HashMap<u64, Socket>,
    next: u64,
    /// The initial window of the sockets, in bytes.
    first: u64,
}

impl Server {
    /// Starts building a server: an identity and a verifier are required, the rest has defaults.
    pub fn builder() -> ServerBuilder {
        ServerBuilder {
            identity: None,
            auth: None,
            authorize: None,
            registry: Registry::default(),
            on_socket: None,
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            congestion: CongestionControl::default(),
            agent: default_agent(),
            via: Via::default(),
            qlog: None,
            web: None,
            cluster: None,
            about: About::default(),
        }
    }

    /// Binds a UDP socket as [`ServerBuilder::bind`] does, for [`ServerBuilder::bind_to`]. It lets a program check
    /// that the address is free before it does anything else.
    ///
    /// # Errors
    /// When the address cannot be resolved or bound.
    pub async fn listen(address: impl ToSocketAddrs) -> Result<UdpSocket, BindError> {
        let address = resolve(address).await?;
        crate::transport::udp::bound(address).map_err(|source| BindError::Bind { address, source })
    }

    /// The address that the server listens on, with the actual port.
    pub fn local_addr(&self) -> SocketAddr {
        // Cannot fail on a bound socket; the fallback is the unspecified address.
        self.inner
            .shared
            .listener
            .local_addr()
            .unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)))
    }

    /// The fingerprint that clients pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.inner.shared.key.fingerprint
    }

    /// The hashes that a page passes to the browser as `serverCertificateHashes`, so that it needs no certificate
    /// authority: the SHA-256 of the current certificate and of its successor. Empty if browsers get an authority's
    /// certificate ([`Web::certificate`]), if the certificate was given with the key, or if the key is not ECDSA
    /// P-256, which browsers require.
    ///
    /// Each certificate is served for 6.5 days at most, so a page asks for the hashes before each attempt to connect. With
    /// [`ServerBuilder::web`] and an identity of [`Identity::load_or_create`] both are kept beside the key, in
    /// `webcert.pem`, and a restart changes neither.
    pub fn certificate_hashes(&self) -> Vec<[u8; 32]> {
        self.inner.shared.key.certificates.hashes()
    }

    /// TLS for pages that are served to browsers over TCP, with the same certificates.
    ///
    /// # Errors
    /// When the cryptographic library refuses the key.
    #[cfg(feature = "https")]
    pub fn https(&self) -> Result<Https, IdentityError> {
        Https::new(self.inner.shared.key.certificates.clone())
    }

    /// Takes in a client over TCP: `stream` is a WebSocket whose HTTP handshake is over, at the path `/udpack` and
    /// with the subprotocol `qmux-02.udpack-1`. The caller has handled TLS and HTTP and has checked the page's
    /// origin. `from` is the client's address, `origin` the page's origin, if any. The same limits and the same
    /// verifier apply as to any other client.
    ///
    /// # Cancel safety
    /// Dropping the future drops the connection.
    pub async fn take_websocket<S>(&self, stream: S, from: SocketAddr, origin: Option<&str>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let origin = origin.map(|origin| printable_within(origin, 256).into());
        let ends = Ends {
            local: None,
            remote: unmapped(from),
            transport: Transport::WebSocket { origin },
        };
        self.inner.shared.listener.take_in(stream, ends).await;
    }

    /// Configures a TCP connection that may carry a session: small records are sent at once, and the kernel's queue
    /// of unsent bytes is short, so that urgent messages wait behind few bytes.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn prepare_tcp(stream: &TcpStream) -> io::Result<()> {
        crate::transport::websocket::prepare(stream)
    }

    /// The limits of the server.
    pub fn limits(&self) -> &Limits {
        &self.inner.shared.limits
    }

    /// The next admitted socket; `None` once the server is closed.
    ///
    /// Sockets are queued here only if no handler is registered, or after the first call. At most 128 wait; further
    /// clients are refused with `server_busy`.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn accept(&self) -> Option<Socket> {
        self.inner
            .shared
            .service
            .pull
            .store(true, Ordering::Relaxed);
        let mut accepted = self.inner.accepted.lock().await;
        tokio::select! {
            socket = accepted.recv() => socket,
            () = self.inner.shared.tasks.wait() => None,
        }
    }

    /// The currently admitted sockets, including those whose client is out of reach; `filter(Socket::is_connected)`
    /// removes these.
    pub fn sockets(&self) -> Vec<Socket> {
        lock(&self.inner.shared.sockets.now).all()
    }

    /// The socket of this session, if the server has it: the id is that of [`Socket::id`] and
    /// [`Channel::session_id`](crate::Channel::session_id). Searches all sockets; to reach a client often, keep a
    /// handle or a room.
    pub fn socket(&self, id: &str) -> Option<Socket> {
        let mut sockets = self.sockets().into_iter();
        sockets.find(|socket| *socket.id() == *id)
    }

    /// The rooms of this server: to send to their members and to list them.
    pub fn rooms(&self) -> &Rooms {
        &self.inner.shared.service.rooms
    }

    /// The cluster that this server is a node of, if it is.
    pub fn cluster(&self) -> Option<ClusterView> {
        let rooms = self.rooms();
        rooms.node().map(|node| ClusterView::new(node, rooms))
    }

    /// Closes the sockets of all peers that `whom` selects, at once and with `auth_revoked`. Returns how many.
    ///
    /// This does not reach a client that is being admitted: revoke its token first, so that the verifier's `is_valid`
    /// refuses it.
    pub fn revoke(&self, whom: impl Fn(&Peer) -> bool) -> usize {
        let revoked = self.sockets().into_iter();
        let revoked = revoked.filter(|socket| whom(&socket.peer()));
        let close =
            |socket: Socket| socket.abort(CloseCode::AUTH_REVOKED, "the token was withdrawn");
        revoked.map(close).count()
    }

    /// The number of connections refused so far, for any reason.
    pub fn refused(&self) -> u64 {
        self.inner.shared.counts.all_refused()
    }

    /// The speed of this server, once a second, all sockets together.
    pub fn speed(&self) -> SpeedMeter {
        let shared = self.inner.shared.clone();
        SpeedMeter::new(Box::new(move || {
            (!shared.tasks.is_closed()).then(|| shared.stats())
        }))
    }

    /// Application bytes received and sent so far, all sockets together, past ones included: the same numbers as in
    /// [`stats`](Self::stats), at a cost that does not depend on the number of sockets.
    pub fn traffic(&self) -> (u64, u64) {
        let (sent, received) = self.inner.shared.counters.totals();
        (received, sent)
    }

    /// The statistics so far, all sockets together, past ones included.
    pub fn stats(&self) -> Stats {
        self.inner.shared.stats()
    }

    /// The metrics so far, all sockets together, past ones included.
    pub fn metrics(&self) -> Metrics {
        let shared = &self.inner.shared;
        shared.counts.metrics(shared.stats())
    }

    /// Serves until `signal` is ready, then drains: refuses new sockets, tells the clients to go away, lets
    /// running channels finish within the drain time, and closes each socket with `shutting_down` when its channels have
    /// ended, at the latest at the end of that time. When this returns, the UDP port is free.
    ///
    /// # Errors
    /// When the server stopped by itself: its accept loop failed. A process should exit then.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the server as it is: serving, or with the drain begun.
    pub async fn run_until<S: Future>(&self, signal: S, drain: Drain) -> Result<(), ServerError> {
        let task = lock(&self.inner.accepting).take();
        let Some(mut task) = task else {
            return Err(ServerError::Stopped);
        };
        tokio::select! {
            _ = signal => {}
            _ = &mut task => return Err(ServerError::Stopped),
        }
        let shared = &self.inner.shared;
        if let Some(node) = shared.service.rooms.node() {
            node.drain();
        }
        let sockets = {
            let sockets = lock(&shared.sockets.now);
            shared.draining.store(true, Ordering::Relaxed);
            sockets.all()
        };
        let slot = drain.spread / u32::try_from(sockets.len().max(1)).unwrap_or(u32::MAX);
        let mut nodes = shared.service.rooms.node().map(|node| node.spread());
        for (turn, socket) in (0..).zip(&sockets) {
            let follows = socket.session().follows();
            let address = nodes.as_mut().filter(|_| follows).and_then(Spread::next);
            socket.send_goaway(shutting_down(slot.saturating_mul(turn), slot, address));
        }
        for socket in sockets.iter().filter(|socket| !socket.session().is_up()) {
            // Its client could not reconnect to receive a later close.
            drop(socket.close(CloseCode::SHUTTING_DOWN, SHUTTING_DOWN));
        }
        // Each socket closes when its own channels have ended: a channel that does not end delays no other socket.
        let mut idle: FuturesUnordered<_> = self
            .sockets()
            .into_iter()
            .map(|socket| async move {
                let session = socket.session();
                // What the client opened before it heard of the drain may be on its way.
                let arriving = ARRIVING + trips(session.conn().rtt());
                let _ = tokio::time::timeout(arriving, session.end.wait()).await;
                session.channels_done(drain.within).await;
                drop(socket.close(CloseCode::SHUTTING_DOWN, SHUTTING_DOWN));
            })
            .collect();
        let idle = async { while idle.next().await.is_some() {} };
        let _ = tokio::time::timeout(drain.within, idle).await;
        for socket in self.sockets() {
            drop(socket.close(CloseCode::SHUTTING_DOWN, SHUTTING_DOWN));
        }
        let longest = self
            .sockets()
            .iter()
            .map(|socket| socket.session().conn().rtt())
            .max();
        let within = shared.timeouts.close + trips(longest.unwrap_or_default());
        let gone = async {
            loop {
                let mut ended = std::pin::pin!(shared.sockets.ended.notified());
                ended.as_mut().enable();
                if lock(&shared.sockets.now).admitted.is_empty() {
                    break;
                }
                ended.await;
            }
        };
        let _ = tokio::time::timeout(within + Duration::from_secs(1), gone).await;
        shared.listener.farewells().await;
        shared
            .listener
            .close(CloseCode::SHUTTING_DOWN, SHUTTING_DOWN);
        let _ = tokio::time::timeout(Duration::from_secs(1), shared.listener.wait_idle()).await;
        task.abort();
        if let Some(node) = shared.service.rooms.node() {
            node.bye();
        }
        shared.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(1), shared.tasks.wait()).await;
        shared.listener.free_port();
        Ok(())
    }

    /// Closes every socket at once and stops listening: when it returns, the UDP port is free. Queued messages are
    /// lost; see [`run_until`](Self::run_until) for the graceful way.
    pub async fn close(&self, code: CloseCode, text: &str) {
        let shared = &self.inner.shared;
        shared.draining.store(true, Ordering::Relaxed);
        for socket in self.sockets() {
            socket.abort(code, text);
        }
        shared.listener.farewells().await;
        shared.listener.close(code, text);
        if let Some(node) = shared.service.rooms.node() {
            node.bye();
        }
        shared.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(1), shared.listener.wait_idle()).await;
        shared.listener.free_port();
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("local_addr", &self.local_addr())
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

/// Builds a server; see [`Server::builder`].
#[must_use = "a builder does nothing until `bind` is awaited"]
pub struct ServerBuilder {
    identity: Option<Identity>,
    auth: Option<Arc<dyn Authenticate>>,
    authorize: Option<Authorize>,
    registry: Registry,
    on_socket: Option<SocketHandler>,
    limits: Limits,
    timeouts: Timeouts,
    congestion: CongestionControl,
    agent: String,
    via: Via,
    qlog: Option<PathBuf>,
    web: Option<Web>,
    cluster: Option<Arc<dyn Cluster>>,
    about: About,
}

impl ServerBuilder {
    /// Sets the key and the certificates of the server. Required.
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Sets the verifier, which decides which clients are admitted. Required: there is no default that would admit
    /// everybody.
    pub fn auth(mut self, auth: impl Authenticate) -> Self {
        self.auth = Some(Arc::new(auth));
        self
    }

    /// Decides which channels a peer may open: asked before a channel's handler begins, and again for each of the
    /// peer's channels after its token was refreshed. A refused channel closes with the refusal's code and text; see
    /// [`Deny::forbidden`]. A panic refuses the channel. Must not block. Defaults to allowing all.
    pub fn authorize<F>(mut self, authorize: F) -> Self
    where
        F: Fn(&Peer, &str) -> Result<(), Deny> + Send + Sync + 'static,
    {
        self.authorize = Some(Arc::new(authorize));
        self
    }

    /// Serves the channels of this name: `handler` runs as a task of its own for each, and the channel is finished
    /// when it returns and no clone is left. An error closes the channel with `handler_failed`, a panic with
    /// `internal`; neither affects another channel. A [`Router`](crate::Router) can be the handler.
    pub fn channel<M>(mut self, name: impl Into<String>, handler: impl ServeChannel<M>) -> Self {
        self.registry.insert(name.into(), handler);
        self
    }

    /// Calls `handler` with each admitted socket, as a task of its own that ends with the socket.
    pub fn connection<F, Fut>(mut self, handler: F) -> Self
    where
        F: Fn(Socket) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        self.on_socket = Some(Arc::new(move |socket| Box::pin(handler(socket))));
        self
    }

    /// Passes channels without a registered handler to `Socket::accept_channel` instead of refusing them. This is the
    /// default if no channel handler is registered.
    pub fn accept_channels(mut self) -> Self {
        self.registry.pull = true;
        self
    }

    /// Sets the limits of a peer's resources. Defaults to `Limits::default()`.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets the time-outs. Defaults to `Timeouts::default()`.
    pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.timeouts = timeouts;
        self
    }

    /// Sets the congestion controller of the sending direction. Defaults to `CongestionControl::Auto`.
    pub fn congestion(mut self, congestion: CongestionControl) -> Self {
        self.congestion = congestion;
        self
    }

    /// Sets the program name and version in `$welcome`. Defaults to this library's name and version.
    pub fn agent(mut self, agent: impl Into<String>) -> Self {
        self.agent = agent.into();
        self
    }

    /// Serves browsers as well, on the same UDP port, by WebTransport: the same channels and the same limits. Defaults to
    /// serving none.
    ///
    /// A page connects to `https://HOST:PORT/udpack`. It needs the hashes of
    /// [`Server::certificate_hashes`], or a certificate that the browser trusts.
    pub fn web(mut self, web: Web) -> Self {
        self.web = Some(web);
        self
    }

    /// Makes the server one node of several that share their rooms: what is sent [to a room](Rooms::to) on one of them goes to
    /// its members on all. Sending never waits for the broker; what a member misses it is told as a [`Gap`](crate::Gap).
    /// Defaults to a server of its own.
    ///
    /// `docs/CLUSTER.md` says what is promised.
    pub fn cluster(mut self, cluster: impl Cluster) -> Self {
        self.cluster = Some(Arc::new(cluster));
        self
    }

    /// How other nodes of the cluster show this server, and where clients reach it, and it alone (`HOST:PORT`). At most 256 bytes
    /// each. Both default to nothing.
    ///
    /// With an address, clients that come back to another node are told to go to this one when it has their session, and those of
    /// a node that [drains](Server::run_until) are spread over the nodes that have one. What is no `HOST:PORT` is shown and told to
    /// nobody.
    pub fn advertise(mut self, name: impl Into<String>, address: impl Into<String>) -> Self {
        self.about = About {
            name: name.into(),
            address: address.into(),
        };
        self
    }

    #[cfg(feature = "testing")]
    pub(crate) fn via(mut self, via: Via) -> Self {
        self.via = via;
        self
    }

    /// Writes a [qlog] file for each connection into this directory, which is created if it is missing. A file has at
    /// most 256 MiB and holds no payload, keys or tokens; at most 4,096 files are written. Meant for debugging: it
    /// costs time and disk space. Off by default.
    ///
    /// [qlog]: https://datatracker.ietf.org/doc/draft-ietf-quic-qlog-main-schema/
    pub fn qlog(mut self, dir: impl Into<PathBuf>) -> Self {
        self.qlog = Some(dir.into());
        self
    }

    /// Binds the UDP port and starts serving. `[::]:PORT` is all addresses of the machine, of IPv6 and IPv4; where
    /// the system has no IPv6, those of IPv4, and the log says so. Answers are sent from the address that the client
    /// used.
    ///
    /// # Errors
    /// When a required part is missing, a setting is invalid, the address cannot be resolved or bound, or the
    /// identity cannot be used.
    pub async fn bind(self, address: impl ToSocketAddrs) -> Result<Server, BindError> {
        let address = resolve(address).await?;
        self.serve_at(address, At::Address(address))
    }

    /// Starts serving on a bound UDP socket: one from [`Server::listen`], or an inherited one.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub async fn bind_to(self, socket: UdpSocket) -> Result<Server, BindError> {
        let address = socket.local_addr().map_err(BindError::Address)?;
        self.serve_at(address, At::Socket(socket))
    }

    /// Must be called on a runtime.
    fn serve_at(self, address: SocketAddr, at: At) -> Result<Server, BindError> {
        let identity = self.identity.ok_or(BindError::NoIdentity)?;
        let auth = self.auth.ok_or(BindError::NoAuth)?;
        if let Some((channel, state)) = self.registry.missing {
            return Err(BindError::MissingState { channel, state });
        }
        let (limits, timeouts) = (Arc::new(self.limits), Arc::new(self.timeouts));
        let web_certificate = self.web.as_ref().and_then(Web::web_certificate);
        if self.web.is_some() && web_certificate.is_none() {
            identity.keep_certificates();
        }
        let certificates = Arc::new(identity.certificates(web_certificate.cloned()));
        let listener = Listener::open(
            (&identity, &certificates),
            (limits.clone(), timeouts.clone()),
            self.congestion,
            (self.via, at),
            self.qlog,
            self.web,
        )
        .map_err(|error| match error {
            ListenError::Setting(setting) => BindError::Setting(setting),
            ListenError::Identity(error) => BindError::Identity(error),
            ListenError::Bind(source) => BindError::Bind { address, source },
        })?;
        let mut registry = self.registry;
        let handlers = !registry.is_empty() || self.on_socket.is_some();
        registry.pull |= registry.is_empty();
        let (accept_queue, accepted) = mpsc::channel(ACCEPT_QUEUE);
        let rooms = Rooms::new(
            limits.rooms,
            limits.history_bytes,
            tokio::runtime::Handle::current(),
        );
        let counts = Counts::shared();
        if let Some(cluster) = self.cluster {
            join(&rooms, cluster, self.about, limits.frame, &counts)?;
        }
        let pool = windows::Pool::new(&limits);
        let frames = Pool::new("bytes of unfinished frames", windows::frame_shares(&limits));
        let service = Service {
            registry: Arc::new(registry),
            on_socket: self.on_socket,
            attached: Arc::new(rooms.clone()),
            rooms,
            accept_queue,
            pull: AtomicBool::new(!handlers),
        };
        let places = Places {
            sockets: Pool::new("sockets", socket_shares(&limits)),
            handshakes: Pool::new("handshakes", handshake_shares(limits.handshakes)),
            farewells: Pool::new("farewells", Shares::of(FAREWELLS)),
            frames,
            windows: pool,
        };
        let shared = Arc::new(Shared {
            pace: Pace::new(limits.handshake_rate),
            listener,
            key: PublicKey {
                fingerprint: identity.fingerprint(),
                certificates,
            },
            guard: Guard::new(
                auth,
                self.authorize,
                Penalties::new(limits.auth_failures, timeouts.auth_pause),
            ),
            service,
            limits,
            timeouts,
            agent: self.agent,
            counters: Counters::shared(),
            sessions: Sessions::default(),
            counts,
            sockets: Roster::default(),
            places,
            log_limit: LogLimit::default(),
            draining: AtomicBool::new(false),
            tasks: TaskTracker::new(),
        });
        if let Some(node) = shared.service.rooms.node() {
            let sockets: Weak<Shared> = Arc::downgrade(&shared);
            node.questions.answered_by(sockets);
        }
        let accepting = tokio::spawn(accept_loop(shared.clone()));
        Ok(Server {
            inner: Arc::new(Inner {
                shared,
                accepting: Mutex::new(Some(accepting)),
                accepted: tokio::sync::Mutex::new(accepted),
            }),
        })
    }
}

impl fmt::Debug for ServerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerBuilder")
            .field("channels", &self.registry)
            .finish_non_exhaustive()
    }
}

/// Makes the server a node of this cluster.
fn join(
    rooms: &Rooms,
    cluster: Arc<dyn Cluster>,
    about: About,
    frame: usize,
    counts: &Arc<Counts>,
) -> Result<(), BindError> {
    let (most, needed) = (cluster.max_message(), frame + AROUND);
    if (1..needed).contains(&most) {
        return Err(BindError::ClusterMessages { most, needed });
    }
    let node = Node::new(cluster, about, frame, counts.clone()).map_err(IdentityError::crypto)?;
    rooms.cluster(&node);
    Ok(())
}

async fn resolve(address: impl ToSocketAddrs) -> Result<SocketAddr, BindError> {
    tokio::net::lookup_host(address)
        .await
        .map_err(BindError::Address)?
        .next()
        .ok_or_else(|| BindError::Address(io::Error::other("the name has no address")))
}

/// The message of a drain: a client reconnects after this time plus a random part of the window.
fn shutting_down(retry_after: Duration, window: Duration, address: Option<String>) -> GoAway {
    GoAway {
        code: CloseCode::SHUTTING_DOWN,
        text: SHUTTING_DOWN.to_owned(),
        retry_after,
        window,
        address,
    }
}

impl Sockets {
    fn all(&self) -> Vec<Socket> {
        self.admitted.values().cloned().collect()
    }

    /// The initial window of each socket, in bytes.
    fn share(&mut self, limits: &Limits) -> u64 {
        let first = windows::first(limits, self.admitted.len());
        if first != self.first {
            self.first = first;
            for socket in self.admitted.values() {
                let session = socket.session();
                session.receive.window.resize(first, &session.conn());
            }
        }
        first
    }
}

impl AllSockets for Shared {
    fn all(&self) -> Vec<Socket> {
        lock(&self.sockets.now).all()
    }
}

impl Shared {
    /// Registers a session for resuming, if its client has asked for that; returns the source of its next connection.
    fn keep(&self, session: &Arc<Session>) -> Comeback {
        let grant = session.welcome().and_then(|welcome| welcome.resume.clone());
        let Some(grant) = grant else {
            return Comeback::Never;
        };
        let (next_connections, awaited) = mpsc::channel(1);
        let kept = Kept {
            session: session.clone(),
            next_connections,
        };
        lock(&self.sessions.kept).insert(session.id().to_string(), kept);
        Comeback::Awaited(Awaited {
            next_connections: awaited,
            window: grant.window,
            detached: self.sessions.detached.clone(),
            most: self.limits.detached_sockets,
        })
    }

    /// Whether the client presents a valid ticket of a session that the server still has.
    fn was_in(&self, hello: &HelloMessage) -> bool {
        let ticket = hello
            .resume
            .as_ref()
            .and_then(|resume| resume.session.as_ref());
        let session = ticket.and_then(|ticket| {
            let kept = lock(&self.sessions.kept);
            kept.get(&ticket.session)
                .map(|kept| (ticket, kept.session.clone()))
        });
        session.is_some_and(|(ticket, session)| {
            let pause = self.timeouts.auth_pause;
            lock(&session.tickets)
                .get_or_make()
                .shown(&ticket.token, pause)
        })
    }

    /// The session that a client wants to resume, and the permit to hand it a connection; otherwise the reason why
    /// not.
    ///
    /// # Errors
    /// The reason with which this side ended the session while its client reconnected; the client gets no new session
    /// instead.
    async fn come_back(&self, ticket: &ResumeTicket, peer: &Peer) -> Result<ComeBack, CloseReason> {
        let kept = lock(&self.sessions.kept)
            .get(&ticket.session)
            .map(|kept| (kept.session.clone(), kept.next_connections.clone()));
        let Some((session, next_connections)) = kept else {
            return Ok(Err("unknown"));
        };
        if session
            .peer
            .get()
            .is_none_or(|known| !known.same_identity(peer))
        {
            return Ok(Err("identity"));
        }
        if !lock(&session.tickets).get_or_make().redeem(&ticket.token) {
            return Ok(Err("expired"));
        }
        let permit = next_connections.reserve_owned().await;
        match (session.end.get(), permit) {
            (Some(end), _) if end.by == Side::Local => Err(end.clone()),
            (None, Ok(permit)) => Ok(Ok((session, permit))),
            (Some(_), _) | (None, Err(_)) => Ok(Err("expired")),
        }
    }

    /// Checks all sockets once for each tick.
    fn look(&self) {
        for socket in lock(&self.sockets.now).admitted.values() {
            socket.session().look();
        }
    }

    fn stats(&self) -> Stats {
        let (sent, received) = self.counters.totals();
        let mut stats = *lock(&self.sockets.past);
        stats.sent = sent;
        stats.received = received;
        let sockets = lock(&self.sockets.now).all();
        for socket in sockets {
            stats.add_wire(&socket.stats());
        }
        stats
    }
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// No identity was given.
    #[error("a server needs an identity")]
    NoIdentity,
    /// A handler takes a state that its router was not given.
    #[error("the handlers of channel {channel:?} need a state of type {state}")]
    MissingState {
        /// The channel's name.
        channel: String,
        /// The state's type.
        state: &'static str,
    },
    /// No verifier was given.
    #[error("a server needs a verifier")]
    NoAuth,
    /// A setting is invalid.
    #[error(transparent)]
    Setting(#[from] InvalidSetting),
    /// The address could not be resolved.
    #[error("cannot resolve the address to listen on")]
    Address(#[source] io::Error),
    /// The address could not be bound.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The identity cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The broker of the cluster takes no messages as large as this server's frames.
    #[error(
        "the cluster's broker takes messages of up to {most} bytes, and this server's may have {needed}: raise the \
         broker's limit (`max_payload` of NATS), or lower `Limits::frame`"
    )]
    ClusterMessages {
        /// Most bytes that the broker takes.
        most: usize,
        /// What it would have to take.
        needed: usize,
    },
}

/// Why a server ended by itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The accept loop has failed; the server accepts no connections.
    #[error("the server has stopped accepting")]
    Stopped,
}
