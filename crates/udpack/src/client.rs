//! [`Client`]: the address of a server, the trust in it and the token for it; makes [`Socket`]s.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tracing::Instrument;
use tracing::field::Empty;

use crate::base::lock;
use crate::channel::inbox::Inbox;
use crate::client::beside::{HeadStart, beside};
use crate::metrics::Counts;
use crate::metrics::speed::Counters;
use crate::session::default_agent;
use crate::session::driver::{Comeback, Control, Established, Left, Reached, Redial, live};
use crate::session::lifetime::{TokenSource, check_token};
use crate::session::reconnect::{Outage, Probes, Reconnect, SocketState, TransportReason};
use crate::session::service::{Registry, ServeChannel};
use crate::session::socket::Socket;
use crate::session::{Session, give_up};
use crate::transport::dialer::{DialError, Dialer, DialerError, Local};
use crate::transport::endpoint::Via;
use crate::transport::on_path;
use crate::transport::proxy::Proxy;
use crate::transport::{Connection, ConnectionError, StreamError};
use crate::trust::auth::Peer;
use crate::trust::certificate::dates;
use crate::trust::fingerprint::Fingerprint;
use crate::trust::origin::Transport;
use crate::trust::tls::PinMismatch;
use crate::trust::url::{ConnectUrl, DEFAULT_PORT};
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::InvalidSetting;
use crate::wire::config::{CongestionControl, Limits, Timeouts};
use crate::wire::control::{self, Decode, ResumeRequest, ResumeTicket, Welcome};

mod beside;
mod race;
mod takeover;
mod through_proxy;

/// A client's settings; each `connect` makes a socket of its own. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Settings>,
    /// The address to try first.
    first: Option<SocketAddr>,
    /// The transport to dial.
    over: TransportChoice,
}

struct Settings {
    dialer: Dialer,
    pin: Option<Fingerprint>,
    token: TokenSource,
    agent: String,
    registry: Arc<Registry>,
    limits: Arc<Limits>,
    timeouts: Arc<Timeouts>,
    reconnect: Option<Reconnect>,
    /// Servers to use when the requested one cannot be reached.
    fallbacks: Vec<(ConnectUrl, Client)>,
    /// The transports that won earlier races.
    won: Won,
    /// Where the way over TCP leads through.
    proxy: Option<Proxy>,
}

impl Client {
    /// Starts building a client. Without a pin, a CA that the platform trusts must have signed the server's
    /// certificate.
    pub fn builder() -> ClientBuilder {
        ClientBuilder {
            pin: None,
            token: TokenSource::Fixed(String::new()),
            agent: default_agent(),
            registry: Registry::default(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            congestion: CongestionControl::default(),
            bind: Local::default(),
            reconnect: None,
            fallbacks: Vec::new(),
            over: TransportChoice::default(),
            proxy: None,
            via: Via::default(),
            qlog: None,
        }
    }

    /// Connects to `HOST[:PORT]` and waits until the server has admitted this client. The default port is 45456.
    ///
    /// With [`ClientBuilder::reconnect`] the socket reconnects by itself when its connection is lost.
    ///
    /// All addresses of the name are tried, IPv6 and IPv4 in turn, each 250 ms after the one before it or as soon as
    /// an earlier one has failed (RFC 8305). The client sends `$hello` with its token to the first server that proves
    /// its key, and to no other; that server's answer is final. At most 32 addresses are tried.
    ///
    /// # Errors
    /// See [`ConnectError`].
    ///
    /// # Cancel safety
    /// A dropped future closes what it had begun.
    pub async fn connect(&self, address: &str) -> Result<Socket, ConnectError> {
        let socket = self.connect_eager(address).await?;
        match socket.admitted().await {
            Ok(()) => Ok(socket),
            Err(reason) => Err(ConnectError::Denied(reason)),
        }
    }

    /// Connects and returns as soon as the server has proved its key, one round trip earlier than
    /// [`connect`](Self::connect): channels may be opened and messages sent behind the `$hello`. The server processes
    /// none of it before it has accepted the token; a refusal ends the socket.
    ///
    /// # Errors
    /// See [`ConnectError`].
    ///
    /// # Cancel safety
    /// A dropped future closes what it had begun.
    pub async fn connect_eager(&self, address: &str) -> Result<Socket, ConnectError> {
        let settings = &self.inner;
        let url: ConnectUrl = address
            .parse()
            .map_err(|_| ConnectError::Address(address.to_owned()))?;
        let mut outage = Outage::default();
        let (first, serving) = loop {
            let error = match self.reach_any(&url).await {
                Ok(reached) => break reached,
                Err(error) => error,
            };
            match settings.reconnect {
                Some(policy) if policy.first_too && error.retry() => match outage.next(&policy) {
                    Some((_, delay)) => tokio::time::sleep(delay).await,
                    None => return Err(error),
                },
                _ => return Err(error),
            }
        };
        let remote = first.conn.remote_address();
        let span = tracing::info_span!("conn", peer = %remote, session = Empty);
        let session = span.in_scope(|| {
            Session::new(
                first.conn,
                true,
                settings.limits.clone(),
                settings.timeouts.clone(),
                Counters::root(),
                Counts::root(),
                settings.reconnect.is_some(),
            )
        });
        session.set_endpoint(first.endpoint);
        session.set_transport_reason(first.why);
        let server = match &settings.pin {
            Some(pin) => Peer::new(pin.to_string()),
            None => Peer::new(url.host()),
        };
        session.peer.set(server);
        session.life.set_token_source(&settings.token);
        let (socket, queue) = Socket::new(session.clone(), settings.registry.pull);
        let comeback = match settings.reconnect {
            Some(policy) => Comeback::Dialled(Box::new(Dialler {
                client: self.clone(),
                url,
                policy,
                serving,
                won: BTreeMap::from([(serving, remote)]),
                told: None,
                since: Instant::now(),
                flaps: 0,
                probes: Probes::default(),
                probing: None,
            })),
            None => Comeback::Never,
        };
        let registry = settings.registry.clone();
        // The connection owns the task: the driver ends with the session, and dropping the last handle ends the
        // session.
        tokio::spawn(live(session, first.control, registry, queue, comeback).instrument(span));
        Ok(socket)
    }

    /// The same client, which tries this address first if a name has it. For programs that reconnect by themselves:
    /// with the address that worked last, [`Socket::remote_address`], they do not wait for addresses that do not
    /// work. Sockets with [`ClientBuilder::reconnect`] do this anyway.
    pub fn beginning_with(&self, address: SocketAddr) -> Self {
        Self {
            first: Some(address),
            ..self.clone()
        }
    }

    /// The same client, which connects over this transport.
    pub fn over(&self, transport: TransportChoice) -> Self {
        Self {
            over: transport,
            ..self.clone()
        }
    }

    /// Tells the client that this server, `HOST[:PORT]`, was reached over TCP before, because no UDP passed: it tries both
    /// at once there for the next day, as it does after it has found so itself. Text that is no server is passed over.
    pub fn expect_tcp(&self, server: &str) {
        if let Ok(url) = server.parse::<ConnectUrl>() {
            self.inner.won.websocket(url.authority());
        }
    }

    /// The transport that the client connects over.
    pub fn transport(&self) -> TransportChoice {
        self.over
    }

    /// Makes a handshake with one address of a server, over a WebSocket or else over QUIC, and closes it again. The
    /// client sends no `$hello`, so no token is needed, and the server's program does not learn of it. For diagnosis;
    /// `host` is the server's name.
    ///
    /// # Errors
    /// See [`ConnectError`].
    ///
    /// # Cancel safety
    /// A dropped future closes what it had begun.
    pub async fn handshake(
        &self,
        address: SocketAddr,
        host: &str,
        over: TransportChoice,
    ) -> Result<Handshake, ConnectError> {
        let url = ConnectUrl::new(host, DEFAULT_PORT)
            .map_err(|_| ConnectError::Address(host.to_owned()))?;
        let begun = Instant::now();
        let name = url.server_name();
        let reached = match over == TransportChoice::WebSocket {
            true => self.dial_tcp(address, name, HeadStart::none()).await?,
            false => self.dial_quic(address, name).await?,
        };
        Ok(leave(begun, reached).await)
    }

    /// The same over a WebSocket through the client's proxy, which resolves the name. `None`: there is no proxy for this
    /// server. It ends when the proxy or the server does not answer within [`Timeouts::handshake`].
    ///
    /// # Errors
    /// See [`ConnectError`].
    ///
    /// # Cancel safety
    /// A dropped future closes what it had begun.
    pub async fn handshake_through_proxy(
        &self,
        host: &str,
        port: u16,
    ) -> Option<Result<Handshake, ConnectError>> {
        let proxy = self.inner.proxy.as_ref();
        let proxy = proxy.filter(|proxy| proxy.is_for(host))?;
        let Ok(url) = ConnectUrl::new(host, port) else {
            return Some(Err(ConnectError::Address(host.to_owned())));
        };
        let begun = Instant::now();
        let reached = self.dial_through(Goal::of(&url), proxy, HeadStart::none());
        Some(match reached.await {
            Ok(reached) => Ok(leave(begun, reached).await),
            Err(error) => Err(error),
        })
    }

    /// The requested server, then the fallbacks.
    fn servers<'a>(
        &'a self,
        url: &'a ConnectUrl,
    ) -> impl Iterator<Item = (&'a ConnectUrl, &'a Self)> {
        let fallbacks = self.inner.fallbacks.iter();
        std::iter::once((url, self)).chain(fallbacks.map(|(url, client)| (url, client)))
    }

    /// Connects to the first of the servers that can be reached, and returns its index.
    async fn reach_any(&self, url: &ConnectUrl) -> Result<(Established, usize), ConnectError> {
        let mut errors = Vec::new();
        for (at, (url, client)) in self.servers(url).enumerate() {
            match client.reach(Goal::of(url), None, (None, true)).await {
                Ok(established) => return Ok((established, at)),
                Err(error) => errors.push((url.authority(), error)),
            }
        }
        match errors.pop() {
            Some((_, only)) if errors.is_empty() => Err(only),
            last => {
                errors.extend(last);
                Err(ConnectError::EachServer { errors })
            }
        }
    }

    /// Connects to the address of the server that answers first, and sends `$hello` there. The address `last` is
    /// tried first. `follows`: the server may tell where the session is.
    async fn reach(
        &self,
        goal: Goal<'_>,
        ticket: Option<ResumeTicket>,
        (last, follows): (Option<SocketAddr>, bool),
    ) -> Result<Established, ConnectError> {
        let url = goal.at;
        let token = self.new_token().await?;
        let last = last.or(self.first);
        let proxy = self.inner.proxy.as_ref();
        let proxy = proxy.filter(|proxy| proxy.is_for(url.host()));
        let (conn, endpoint) = match proxy {
            Some(proxy) if self.over != TransportChoice::Quic => {
                self.dial_beside_proxy(goal, last, proxy).await?
            }
            _ => {
                let found = self.lookup(url).await?;
                let order = race::in_turn(found, last);
                self.dial_any(goal, order, self.over).await?
            }
        };
        let why = self.inner.won.note(url, self.over, &conn);
        self.introduce((conn, endpoint), why, &token, (ticket, follows))
            .await
    }

    /// The addresses of a server.
    async fn lookup(&self, url: &ConnectUrl) -> Result<Vec<SocketAddr>, ConnectError> {
        let found = self.inner.dialer.lookup(url.host(), url.port()).await;
        found.map_err(|source| ConnectError::Resolve {
            host: url.host().to_owned(),
            source,
        })
    }

    /// The token to present now.
    async fn new_token(&self) -> Result<String, ConnectError> {
        let token = self.inner.token.token(self.inner.timeouts.request).await;
        let token = token.map_err(ConnectError::Token)?;
        check_token(&token)?;
        Ok(token)
    }

    /// Tries these addresses until one leads to the server. A server with another key, or one without a place, ends
    /// only its own attempt. After a success the other attempts are dropped before they send `$hello`.
    async fn dial_any(
        &self,
        Goal { name, at: url }: Goal<'_>,
        addresses: Vec<SocketAddr>,
        over: TransportChoice,
    ) -> Result<Reached, ConnectError> {
        let at_once = self.inner.won.was_websocket(url);
        let raced = race::race(addresses, |address| {
            self.dial(address, name.server_name(), (over, at_once))
        });
        let errors = match raced.await {
            Ok(reached) => return Ok(reached),
            Err(errors) => errors.into_iter(),
        };
        let each = |(address, errors): (SocketAddr, Vec<_>)| {
            let errors = errors.into_iter();
            errors.map(move |error| (address, error))
        };
        let host = url.host().to_owned();
        let mut errors: Vec<_> = errors.flat_map(each).collect();
        match errors.pop() {
            None => Err(ConnectError::Resolve {
                host,
                source: io::Error::other("the name has no address"),
            }),
            Some((_, only)) if errors.is_empty() => Err(only),
            Some(last) => {
                errors.push(last);
                Err(ConnectError::EachAddress { host, errors })
            }
        }
    }

    /// Connects to one address, `at_once` by both transports if it goes by both. On success the server has proved its
    /// key, and has received no `$hello`.
    async fn dial(
        &self,
        address: SocketAddr,
        host: &str,
        (over, at_once): (TransportChoice, bool),
    ) -> Result<Reached, Vec<ConnectError>> {
        let quic = self.dial_quic(address, host);
        let tcp = |head_start| self.dial_tcp(address, host, head_start);
        match over {
            TransportChoice::Quic => quic.await.map_err(|error| vec![error]),
            TransportChoice::WebSocket => {
                let reached = tcp(HeadStart::none()).await;
                reached.map_err(|error| vec![error])
            }
            TransportChoice::Auto => beside(at_once, quic, tcp).await.map_err(without_repeat),
        }
    }

    async fn dial_quic(&self, address: SocketAddr, host: &str) -> Result<Reached, ConnectError> {
        let dialled = self.inner.dialer.dial(address, host).await;
        dialled.map_err(|error| self.dial_error(address, error))
    }

    async fn dial_tcp(
        &self,
        address: SocketAddr,
        host: &str,
        head_start: HeadStart,
    ) -> Result<Reached, ConnectError> {
        let dialer = &self.inner.dialer;
        let dialled = dialer.dial_websocket(address, host, head_start.may_speak());
        let dialled = dialled.await;
        dialled.map_err(|error| self.dial_error(address, error))
    }

    /// Sends `$hello` on a new connection.
    async fn introduce(
        &self,
        (conn, endpoint): Reached,
        why: TransportReason,
        token: &str,
        (ticket, follows): (Option<ResumeTicket>, bool),
    ) -> Result<Established, ConnectError> {
        let settings = &self.inner;
        let opened = conn.open_bi().await;
        let (mut send, recv) = opened.map_err(|error| ConnectError::Denied(error.reason()))?;
        let resume = (settings.reconnect.is_some() || ticket.is_some())
            .then_some(ResumeRequest { session: ticket });
        let (agent, limits) = (&settings.agent, &settings.limits);
        let hello = control::encode_hello(token, agent, limits, resume.as_ref(), follows)
            .map_err(|_| ConnectError::Setting(InvalidSetting("the token cannot be sent")))?;
        send.set_priority(i32::MAX);
        send.write(hello).await.map_err(|error| {
            ConnectError::Denied(match error {
                StreamError::Lost(error) => error.reason(),
                StreamError::Peer(_) | StreamError::Ended => CloseReason::local(
                    CloseCode::PROTOCOL_ORDER,
                    "the control stream was stopped before $hello",
                ),
            })
        })?;
        Ok(Established {
            conn,
            endpoint: Some(endpoint),
            control: Box::new(Control::new(send, Inbox::new(recv, settings.limits.frame))),
            welcome: None,
            why: Some(why),
        })
    }

    fn dial_error(&self, address: SocketAddr, error: DialError) -> ConnectError {
        match error {
            DialError::Local(error) => ConnectError::Local(error),
            DialError::Setting(setting) => ConnectError::Setting(setting),
            DialError::Refused(text) => ConnectError::Dial { address, text },
            DialError::Silent => ConnectError::Unreachable { address },
            DialError::Proxy { text, retry } => {
                let proxy = self.inner.proxy.as_ref().map(Proxy::to_string);
                let proxy = proxy.unwrap_or_default();
                match retry {
                    true => ConnectError::Proxy { proxy, text },
                    false => ConnectError::ProxyRefused { proxy, text },
                }
            }
            DialError::Pin(PinMismatch {
                expected,
                presented,
            }) => ConnectError::PinMismatch {
                expected,
                presented,
            },
            DialError::Untrusted { text, dates } => ConnectError::Untrusted {
                address,
                text,
                dates,
            },
            DialError::Handshake(ConnectionError::Peer(reason)) => ConnectError::Denied(reason),
            DialError::Handshake(error) => {
                let reason = error.reason();
                // Busy; or it was restarted between the first packet and the last of the handshake.
                if reason.retry {
                    ConnectError::Denied(reason)
                } else {
                    ConnectError::Handshake {
                        address,
                        text: reason.text,
                    }
                }
            }
        }
    }
}

/// The result of [`Client::handshake`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handshake {
    /// From the first packet to the proof that the server has its key.
    pub took: Duration,
    /// Round-trip time.
    pub rtt: Duration,
    /// The times between which the server's certificate is valid, in seconds since 1970; `None` over a WebSocket.
    /// They do not matter to a pin.
    pub valid: Option<(i64, i64)>,
}

/// How long sending the close of a handshake may take.
const FAREWELL: Duration = Duration::from_millis(200);

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("pin", &self.inner.pin)
            .field("agent", &self.inner.agent)
            .finish_non_exhaustive()
    }
}

/// The errors of QUIC and TCP at one address, without that of TCP if it repeats QUIC's, or only says that nobody listens.
fn without_repeat([quic, tcp]: [ConnectError; 2]) -> Vec<ConnectError> {
    let nobody = matches!(
        tcp,
        ConnectError::Dial { .. } | ConnectError::Unreachable { .. } | ConnectError::Local(_)
    );
    let same = std::mem::discriminant(&quic) == std::mem::discriminant(&tcp);
    match nobody || same {
        true => vec![quic],
        false => vec![quic, tcp],
    }
}

/// Where to go, and who must be there.
#[derive(Clone, Copy)]
struct Goal<'a> {
    /// Whom the certificate must name, if not the pin decides.
    name: &'a ConnectUrl,
    /// Where to go.
    at: &'a ConnectUrl,
}

impl<'a> Goal<'a> {
    /// A server that the client was told of by its own program.
    fn of(url: &'a ConnectUrl) -> Self {
        Self { name: url, at: url }
    }
}

/// The servers that were reached by a WebSocket, and when.
#[derive(Default)]
struct Won(Mutex<HashMap<String, Instant>>);

/// How long it is remembered that a WebSocket won.
const REMEMBERED: Duration = Duration::from_secs(24 * 60 * 60);
/// Servers that are remembered.
const SERVERS: usize = 64;

impl Won {
    fn was_websocket(&self, url: &ConnectUrl) -> bool {
        let won = lock(&self.0);
        won.get(&url.authority())
            .is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    /// A server was reached by a WebSocket.
    fn websocket(&self, server: String) {
        let mut won = lock(&self.0);
        if won.len() >= SERVERS {
            won.clear();
        }
        won.insert(server, Instant::now());
    }

    /// Records which transport won, and returns why it is used.
    fn note(&self, url: &ConnectUrl, over: TransportChoice, conn: &Connection) -> TransportReason {
        let mut won = lock(&self.0);
        let server = url.authority();
        match conn.transport() {
            Transport::WebSocket { .. } => {
                if over == TransportChoice::Auto && !won.contains_key(&server) {
                    tracing::warn!(server, "connected over TCP: nothing was heard over UDP");
                }
                drop(won);
                self.websocket(server);
                match over {
                    TransportChoice::Auto => TransportReason::UdpBlocked,
                    _ => TransportReason::Chosen,
                }
            }
            _ if won.remove(&server).is_some() => {
                tracing::warn!(server, "connected over UDP again");
                TransportReason::UdpPassesAgain
            }
            _ if over == TransportChoice::Auto => TransportReason::UdpPasses,
            _ => TransportReason::Chosen,
        }
    }
}

/// The transport that a client connects over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum TransportChoice {
    /// QUIC, and a WebSocket as well if QUIC is not connected soon: TCP connects after 100 ms, and TLS begins on it after
    /// 250 ms, or as soon as QUIC has failed. The client uses the first whose server has proved its key. If the
    /// WebSocket won, both start at once next time. Each reconnect chooses again: a session continues over TCP when
    /// UDP no longer passes. A socket that reconnects and runs over TCP looks for UDP again, as [`Probes`] says, and
    /// its session goes over to QUIC without loss: as soon as UDP passes and no channel is open that would end with
    /// the connection.
    Auto,
    /// Only QUIC.
    #[default]
    Quic,
    /// Only a WebSocket over TCP, at the same port number: for networks that block UDP. All features work as over
    /// QUIC, but a lost packet delays all channels, and a change of address ends the connection.
    WebSocket,
}

/// Reconnects a client's socket when its connection is lost.
pub(crate) struct Dialler {
    client: Client,
    url: ConnectUrl,
    policy: Reconnect,
    /// The index of the server that it was connected to last.
    serving: usize,
    /// The address at which each server answered last.
    won: BTreeMap<usize, SocketAddr>,
    /// The address that a server has told, while the session is there.
    told: Option<ConnectUrl>,
    /// When the connection began, and how many connections in a row did not last.
    since: Instant,
    flaps: u32,
    /// The times of the probes for UDP while a connection runs over TCP, and the running probe.
    probes: Probes,
    probing: Option<BoxFuture<'static, Option<Box<Reached>>>>,
}

/// The reason why no server can be reached: the last reason, and the texts of all if several were tried.
fn of_all(mut reason: CloseReason, said: BTreeMap<usize, (String, String)>) -> CloseReason {
    if said.len() > 1 {
        let said = said.into_values();
        let said = said.map(|(server, text)| format!("{server}: {text}"));
        reason.text = said.collect::<Vec<_>>().join("; ");
    }
    reason
}

/// The close reason of a socket that cannot reconnect because of this error.
fn broken(error: &ConnectError) -> CloseReason {
    match error {
        ConnectError::Denied(reason) => reason.clone(),
        ConnectError::PinMismatch { .. } => {
            CloseReason::new(CloseCode::AUTH_FAILED, error.to_string(), Side::Local)
        }
        _ => CloseReason::new(
            CloseCode::CONNECTION_LOST,
            error.to_string(),
            Side::Transport,
        ),
    }
}

/// A connection that is lost sooner did not last: the waits continue to grow, as if it had not been made.
const LASTING: Duration = Duration::from_secs(10);

impl Redial for Dialler {
    fn patience(&self) -> Duration {
        self.policy.patience
    }

    fn next<'a>(
        &'a mut self,
        session: &'a Arc<Session>,
        reason: CloseReason,
        left: Left,
    ) -> BoxFuture<'a, Result<Established, CloseReason>> {
        Box::pin(self.dial_again(session, reason, left))
    }

    fn poll_better(&mut self, cx: &mut Context<'_>, session: &Arc<Session>) -> Poll<Box<Reached>> {
        self.poll_udp(cx, session)
    }
}

impl Dialler {
    async fn dial_again(
        &mut self,
        session: &Arc<Session>,
        mut reason: CloseReason,
        left: Left,
    ) -> Result<Established, CloseReason> {
        let lost = Instant::now().into_std();
        self.stop_probing(session);
        let moved = matches!(left, Left::Moved);
        if let Left::For(reached) = left {
            match self.move_to_quic(session, *reached).await {
                Ok(established) => return Ok(established),
                Err(error) => reason = broken(&error),
            }
        }
        let mut tour = Tour::from(self.serving);
        let mut wait = Duration::ZERO;
        if let Some(leaving) = session.departure.forget() {
            tour.begin += 1;
            // The session ends with its server, and another may not have heard of that yet.
            tour.detours = 1;
            self.told = leaving.goaway.address.as_deref().and_then(ConnectUrl::bare);
            // A client that has left has waited until its turn already.
            if !moved {
                wait = leaving.turn.saturating_duration_since(Instant::now());
            }
        }
        self.flaps = if self.since.elapsed() < LASTING {
            self.flaps.saturating_add(1)
        } else {
            0
        };
        let mut outage = Outage::after(self.flaps);
        // The result of the last attempt at each place.
        let mut said = BTreeMap::new();
        loop {
            let Some((attempt, delay)) = outage.next(&self.policy) else {
                return Err(of_all(reason, said));
            };
            let delay = if moved && attempt == 1 {
                Duration::ZERO
            } else {
                delay.max(wait)
            };
            wait = Duration::ZERO;
            tracing::info!(attempt, ?delay, %reason, "reconnecting");
            session.states.set(SocketState::Reconnecting {
                attempt,
                delay,
                since: lost,
            });
            tokio::time::sleep(delay.min(outage.left(&self.policy))).await;
            let (came, server) = self.attempt(session, &mut tour).await;
            let error = match came {
                Ok(established) => {
                    if let Some(at) = server {
                        self.won.insert(at, established.conn.remote_address());
                        self.serving = at;
                    }
                    self.since = Instant::now();
                    return Ok(established);
                }
                Err(error) => error,
            };
            let now = broken(&error);
            if now.code == CloseCode::ELSEWHERE {
                // That was no place, or another one than the server before had told.
                (self.told, tour.detours) = (None, 0);
            } else if !error.retry() {
                match server {
                    Some(_) => return Err(now),
                    // Somebody else is there: the servers that the program knows decide.
                    None => (self.told, tour.detours) = (None, 0),
                }
            }
            let known = server.and_then(|at| self.client.servers(&self.url).nth(at));
            let name = known.map_or_else(
                || "the address that it was told".to_owned(),
                |(url, _)| url.authority(),
            );
            said.insert(server.unwrap_or(usize::MAX), (name, now.text.clone()));
            reason = now;
        }
    }

    /// Connects once: first twice where a server has told the client to go, then twice to each server, beginning with the one
    /// that has this session. A server that knows where the session is sends the client on. With the result comes which
    /// server that was, or `None` for an address that was told.
    async fn attempt(
        &mut self,
        session: &Session,
        tour: &mut Tour,
    ) -> (Result<Established, ConnectError>, Option<usize>) {
        let follows = tour.detours > 0;
        let told = self.told.take_if(|_| tour.told >= TOLD_TRIES);
        if let Some(gone) = told {
            let address = gone.authority();
            tracing::info!(address, "not found where it was told to be");
        }
        if let Some(node) = self.told.clone() {
            tour.told += 1;
            return (self.come_to(session, &node, follows).await, None);
        }
        let servers = 1 + self.client.inner.fallbacks.len();
        let at = (tour.begin + tour.known / 2) % servers;
        tour.known += 1;
        let came = self.come_back(session, at, follows).await;
        let node = match &came {
            Err(error) => elsewhere(error),
            Ok(_) => None,
        };
        let Some(node) = node else {
            return (came, Some(at));
        };
        tour.detours = tour.detours.saturating_sub(1);
        tracing::info!(address = node.authority(), "the session is there");
        let came = self.come_to(session, &node, true).await;
        self.told = Some(node);
        (came, None)
    }

    /// Connects to a server that the program knows.
    async fn come_back(
        &mut self,
        session: &Session,
        at: usize,
        follows: bool,
    ) -> Result<Established, ConnectError> {
        let server = self.client.servers(&self.url).nth(at);
        let (url, client) = server.unwrap_or((&self.url, &self.client));
        let last = self.won.get(&at).copied();
        client
            .come_back(session, Goal::of(url), (last, follows))
            .await
    }

    /// Connects to the address that a server has told. Who is there must be a server that the program knows at this address, or
    /// prove to be the one that the client was connected to.
    async fn come_to(
        &mut self,
        session: &Session,
        node: &ConnectUrl,
        follows: bool,
    ) -> Result<Established, ConnectError> {
        let (name, client) = self.whom(node);
        let goal = Goal { name, at: node };
        client.come_back(session, goal, (None, follows)).await
    }

    /// Who must be at this address, and the settings to connect to it.
    fn whom(&self, node: &ConnectUrl) -> (&ConnectUrl, &Client) {
        let mut servers = self.client.servers(&self.url);
        let known = servers.find(|(url, _)| url.authority() == node.authority());
        let known = known.or_else(|| self.client.servers(&self.url).nth(self.serving));
        known.unwrap_or((&self.url, &self.client))
    }

    /// Where the session is, who must be there, and the settings to connect to it.
    fn here(&self) -> (Goal<'_>, &Client) {
        let server = self.client.servers(&self.url).nth(self.serving);
        let (url, client) = server.unwrap_or((&self.url, &self.client));
        match &self.told {
            Some(node) => {
                let (name, client) = self.whom(node);
                (Goal { name, at: node }, client)
            }
            None => (Goal::of(url), client),
        }
    }
}

/// The attempts of one outage.
struct Tour {
    /// The server to begin with.
    begin: usize,
    /// Attempts at servers that the program knows.
    known: usize,
    /// Attempts at an address that was told.
    told: u32,
    /// How often the client still asks where its session is.
    detours: u32,
}

impl Tour {
    fn from(begin: usize) -> Self {
        Self {
            begin,
            known: 0,
            told: 0,
            detours: DETOURS,
        }
    }
}

/// How often a client goes to an address that it was told, before it asks elsewhere.
const TOLD_TRIES: u32 = 2;
/// How often a client that comes back asks where its session is, and goes there.
const DETOURS: u32 = 3;

/// Where the session is instead, if the server said so.
fn elsewhere(error: &ConnectError) -> Option<ConnectUrl> {
    match error {
        ConnectError::Denied(reason)
            if reason.code == CloseCode::ELSEWHERE && reason.by == Side::Peer =>
        {
            ConnectUrl::bare(&reason.text)
        }
        _ => None,
    }
}

impl Client {
    /// Connects, presents the session's ticket, and waits for the server's answer.
    async fn come_back(
        &self,
        session: &Session,
        goal: Goal<'_>,
        last: (Option<SocketAddr>, bool),
    ) -> Result<Established, ConnectError> {
        let established = self.reach(goal, ticket(session), last).await?;
        welcomed(session, established).await
    }
}

/// The ticket of this client's session.
fn ticket(session: &Session) -> Option<ResumeTicket> {
    let welcome = session.welcome()?;
    Some(ResumeTicket {
        session: welcome.session.clone(),
        token: welcome.resume.as_ref()?.token,
    })
}

/// What was seen of a connection that was made for that alone, and closes it.
async fn leave(begun: Instant, (conn, endpoint): Reached) -> Handshake {
    let shaken = Handshake {
        took: begun.elapsed(),
        rtt: conn.rtt(),
        valid: conn.certificate().and_then(|der| dates(&der)),
    };
    conn.close(CloseCode::NORMAL, "only a handshake");
    let _ = tokio::time::timeout(FAREWELL, endpoint.wait_idle()).await;
    shaken
}

/// Waits for the server's answer to a client that resumes.
async fn welcomed(
    session: &Session,
    mut established: Established,
) -> Result<Established, ConnectError> {
    let (conn, inbox) = (&established.conn, &established.control.inbox);
    let denied = |reason| Err(ConnectError::Denied(reason));
    let first = std::future::poll_fn(|cx| inbox.poll_first(cx, session, &session.counters));
    // The server may wait for the turn of this client's address, and for its verifier.
    let within = on_path(session.timeouts.auth.saturating_mul(3), conn);
    let Ok(first) = tokio::time::timeout(within, first).await else {
        // The server may have admitted the client, and closing this connection in order would end the session.
        give_up(conn);
        let text = format!("no $welcome within {within:?}");
        return denied(crate::channel::carrier::lost(&text));
    };
    match first {
        Ok(message) => match Welcome::decode(&message) {
            Ok(welcome) => {
                established.welcome = Some(welcome);
                Ok(established)
            }
            Err(error) => {
                conn.close(error.close_code(), "");
                denied(error.reason())
            }
        },
        Err(_) => {
            // The reason comes with the end of the connection, which may follow the end of the stream.
            let within = on_path(session.timeouts.auth, conn);
            let error = tokio::time::timeout(within, conn.closed()).await;
            denied(match error {
                Ok(error) => error.reason(),
                Err(_) => crate::channel::carrier::lost("the control stream ended before $welcome"),
            })
        }
    }
}

/// Builds a client; see [`Client::builder`].
#[derive(Clone)]
#[must_use = "a builder does nothing until `connect` or `build` is called"]
pub struct ClientBuilder {
    pin: Option<Fingerprint>,
    token: TokenSource,
    agent: String,
    registry: Registry,
    limits: Limits,
    timeouts: Timeouts,
    congestion: CongestionControl,
    bind: Local,
    reconnect: Option<Reconnect>,
    fallbacks: Vec<(String, Option<Fingerprint>)>,
    over: TransportChoice,
    proxy: Option<Proxy>,
    via: Via,
    qlog: Option<PathBuf>,
}

impl ClientBuilder {
    /// Trusts exactly the server with this public key, whatever its name and dates. Defaults to none: then the
    /// platform's CAs are trusted.
    pub fn pin(mut self, pin: Fingerprint) -> Self {
        self.pin = Some(pin);
        self
    }

    /// Sets the token, at most 512 bytes. It is sent only after the server has proved its key. Defaults to the empty
    /// token.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = TokenSource::Fixed(token.into());
        self
    }

    /// Asks `source` for the token at every connect, in place of [`token`](Self::token). If the token expires,
    /// `source` is asked again after about two thirds of the time left, as long as the socket lives, and its token is
    /// presented as by [`Socket::refresh`].
    ///
    /// `source` must answer within `Timeouts::request`. Connecting without a token fails with
    /// [`ConnectError::Token`]; a failed refresh is logged and tried again while the old token is valid.
    pub fn token_with<F, Fut, E>(mut self, source: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<String, E>> + Send + 'static,
        E: fmt::Display,
    {
        self.token = TokenSource::ask(source);
        self
    }

    /// Sets the program name and version in `$hello`. Defaults to this library's name and version.
    pub fn agent(mut self, agent: impl Into<String>) -> Self {
        self.agent = agent.into();
        self
    }

    /// Serves the channels of this name that the server opens; see `ServerBuilder::channel`.
    pub fn channel<M>(mut self, name: impl Into<String>, handler: impl ServeChannel<M>) -> Self {
        self.registry.insert(name.into(), handler);
        self
    }

    /// Passes channels without a registered handler to `Socket::accept_channel` instead of refusing them. This is the
    /// default if no channel handler is registered.
    pub fn accept_channels(mut self) -> Self {
        self.registry.pull = true;
        self
    }

    /// Sets the limits of the server's resources. Defaults to `Limits::default()`.
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

    /// Sets the local address to send from. Defaults to any address and a free port.
    pub fn local_address(mut self, address: SocketAddr) -> Self {
        self.bind.address = Some(address);
        self
    }

    /// Sets the network interface to send and receive over, by its name, as `eth0`: whatever the system's routes say. On Linux,
    /// which permits it to everybody; elsewhere each connect fails with [`ConnectError::Local`]. Defaults to what the routes say.
    pub fn interface(mut self, name: impl Into<String>) -> Self {
        self.bind.interface = Some(name.into().into());
        self
    }

    /// Makes sockets reconnect by themselves when their connection is lost, and resume their session if the server
    /// still has it: resumable channels continue without loss, others end with the connection. By default a socket
    /// ends with its connection.
    ///
    /// [`ConnectError::retry`] says which errors are tried again.
    pub fn reconnect(mut self, reconnect: Reconnect) -> Self {
        self.reconnect = Some(reconnect);
        self
    }

    /// Adds a server to use when the requested one, and those added before, cannot be reached or shut down:
    /// `HOST[:PORT]`, and its key if it differs (otherwise the client's pin, or the platform's CAs). A session does
    /// not move between servers: another server creates a new one, or tells where the session is if both are nodes of a cluster.
    /// The client goes there, to any address, if the server there has the key or the name of the one it was connected to, or is
    /// one of those added here.
    pub fn fallback(mut self, address: impl Into<String>, pin: Option<Fingerprint>) -> Self {
        self.fallbacks.push((address.into(), pin));
        self
    }

    /// Sets the transport. Defaults to [`TransportChoice::Quic`].
    pub fn transport(mut self, over: TransportChoice) -> Self {
        self.over = over;
        self
    }

    /// Goes through this proxy wherever it goes over TCP, but to the servers that the proxy is [not for](Proxy::except). The
    /// proxy resolves the server's name. Over QUIC the way leads through no proxy. Defaults to none; the library does not look at
    /// the environment.
    pub fn proxy(mut self, proxy: Proxy) -> Self {
        self.proxy = Some(proxy);
        self
    }

    #[cfg(feature = "testing")]
    pub(crate) fn via(mut self, via: Via) -> Self {
        self.via = via;
        self
    }

    /// Writes a qlog file for each connection into this directory; see `ServerBuilder::qlog`. Off by default.
    pub fn qlog(mut self, dir: impl Into<PathBuf>) -> Self {
        self.qlog = Some(dir.into());
        self
    }

    /// Finishes the settings.
    ///
    /// # Errors
    /// When a setting is invalid or TLS cannot be set up.
    pub fn build(mut self) -> Result<Client, ConnectError> {
        let mut fallbacks = Vec::new();
        for (address, pin) in std::mem::take(&mut self.fallbacks) {
            let Ok(url) = address.parse() else {
                return Err(ConnectError::Address(address));
            };
            let builder = Self {
                pin: pin.or(self.pin),
                ..self.clone()
            };
            fallbacks.push((url, builder.build()?));
        }
        if let TokenSource::Fixed(token) = &self.token {
            check_token(token)?;
        }
        let (limits, timeouts) = (Arc::new(self.limits), Arc::new(self.timeouts));
        let dialer = Dialer::new(
            self.pin,
            (limits.clone(), timeouts.clone()),
            self.congestion,
            (self.via, self.bind),
            self.qlog,
        )
        .map_err(|error| match error {
            DialerError::Setting(setting) => ConnectError::Setting(setting),
            DialerError::Tls(text) => ConnectError::Tls(text),
        })?;
        if let Some((channel, state)) = self.registry.missing {
            return Err(ConnectError::MissingState { channel, state });
        }
        let mut registry = self.registry;
        registry.pull |= registry.is_empty();
        Ok(Client {
            first: None,
            over: self.over,
            inner: Arc::new(Settings {
                dialer,
                pin: self.pin,
                token: self.token,
                agent: self.agent,
                registry: Arc::new(registry),
                limits,
                timeouts,
                reconnect: self.reconnect,
                fallbacks,
                won: Won::default(),
                proxy: self.proxy,
            }),
        })
    }

    /// [`build`](Self::build) and [`Client::connect`] in one.
    ///
    /// # Errors
    /// As both.
    ///
    /// # Cancel safety
    /// As [`Client::connect`].
    pub async fn connect(self, address: &str) -> Result<Socket, ConnectError> {
        self.build()?.connect(address).await
    }
}

impl fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("pin", &self.pin)
            .field("agent", &self.agent)
            .finish_non_exhaustive()
    }
}

/// Why there is no connection.
///
/// The result of [`retry`](Self::retry), which decides what sockets that reconnect try again:
///
/// | error | retry | because |
/// | --- | --- | --- |
/// | `Setting` | no | it stays wrong |
/// | `MissingState` | no | it stays wrong |
/// | `Tls` | no | it stays wrong |
/// | `Token` | yes | whoever gives the tokens is out of reach |
/// | `Address` | no | it stays wrong |
/// | `Resolve` | yes | the resolver is out of reach as often as the name is wrong |
/// | `Local` | yes | the system is short of something |
/// | `Dial` | yes | there is no route at the moment, or no server at the port |
/// | `Unreachable` | yes | the server or the way to it is down |
/// | `Proxy` | yes | the proxy is out of reach, or does not reach the server at the moment |
/// | `ProxyRefused` | no | the proxy wants other credentials, or does not let through to this server |
/// | `EachAddress` | yes | where one of its errors is worth it |
/// | `EachServer` | yes | where one of its errors is worth it |
/// | `PinMismatch` | no | this is not the server that was asked for |
/// | `Untrusted` | no | nobody vouches for the server |
/// | `Handshake` | no | the two speak different protocols |
/// | `Denied` | as its reason | [`CloseReason::retry`]: busy, going down, restarted, lost: yes; the token: no |
///
/// The verdicts on close codes are in `docs/PROTOCOL.md`, section 9.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// A setting is invalid.
    #[error(transparent)]
    Setting(#[from] InvalidSetting),
    /// A handler takes a state that its router was not given.
    #[error("the handlers of channel {channel:?} need a state of type {state}")]
    MissingState {
        /// The channel's name.
        channel: String,
        /// The state's type.
        state: &'static str,
    },
    /// TLS could not be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
    /// The source of tokens gave none; see [`ClientBuilder::token_with`].
    #[error("no token to present: {0}")]
    Token(String),
    /// The address is not `HOST[:PORT]`.
    #[error("not an address: {0:?}, expected HOST[:PORT] (default port {DEFAULT_PORT})")]
    Address(String),
    /// The host name could not be resolved.
    #[error("cannot resolve {host}")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver says.
        source: io::Error,
    },
    /// No local UDP socket could be made.
    #[error("cannot open a local UDP socket")]
    Local(#[source] io::Error),
    /// The address cannot be dialled, or the system reports that packets do not arrive there.
    #[error("cannot dial {address}: {text}")]
    Dial {
        /// The server's address.
        address: SocketAddr,
        /// Why.
        text: String,
    },
    /// The server did not answer.
    #[error("no answer from {address}")]
    Unreachable {
        /// The server's address.
        address: SocketAddr,
    },
    /// The proxy is out of reach, or the server is for the proxy.
    #[error("the proxy {proxy} does not lead to the server: {text}")]
    Proxy {
        /// The proxy, as `HOST:PORT`.
        proxy: String,
        /// Why.
        text: String,
    },
    /// The proxy wants another user or password, or does not let through to this server.
    #[error("the proxy {proxy} refuses: {text}")]
    ProxyRefused {
        /// The proxy, as `HOST:PORT`.
        proxy: String,
        /// Why.
        text: String,
    },
    /// The name has several addresses, and none of them leads to the server.
    #[error("no address of {host} works: {}", one_by_one(.errors))]
    EachAddress {
        /// The name.
        host: String,
        /// Each address and why, in the order in which they were tried.
        errors: Vec<(SocketAddr, Self)>,
    },
    /// There are several servers, and none of them can be reached.
    #[error("no server can be reached: {}", server_by_server(.errors))]
    EachServer {
        /// Each server as `HOST:PORT`, and why, in the order in which they were tried: the one that was asked for, then those
        /// of [`ClientBuilder::fallback`].
        errors: Vec<(String, Self)>,
    },
    /// The server's key is not the pinned one. The token was not sent.
    #[error("the server's key is not the pinned one: expected {expected}, got {presented}")]
    PinMismatch {
        /// The pin.
        expected: Fingerprint,
        /// What the server has.
        presented: Fingerprint,
    },
    /// No authority that the platform trusts has signed the server's certificate, or the certificate is for another
    /// name or another time.
    #[error("handshake with {address} failed: {text}")]
    Untrusted {
        /// The server's address.
        address: SocketAddr,
        /// What is wrong with its certificate.
        text: String,
        /// Whether the certificate has expired or is not valid yet, by this machine's clock.
        dates: bool,
    },
    /// The handshake failed: another protocol, and the like.
    #[error("handshake with {address} failed: {text}")]
    Handshake {
        /// The server's address.
        address: SocketAddr,
        /// Why.
        text: String,
    },
    /// The server refused: wrong token, busy, shutting down.
    #[error("the server refused the connection: {}", .0.text)]
    Denied(CloseReason),
}

fn server_by_server(errors: &[(String, ConnectError)]) -> String {
    let errors = errors
        .iter()
        .map(|(server, error)| format!("{server}: {error}"));
    errors.collect::<Vec<_>>().join("; ")
}

fn one_by_one(errors: &[(SocketAddr, ConnectError)]) -> String {
    let errors = errors.iter().map(|(address, error)| match error {
        // The text of these errors names the address.
        ConnectError::Dial { .. }
        | ConnectError::Unreachable { .. }
        | ConnectError::Proxy { .. }
        | ConnectError::ProxyRefused { .. }
        | ConnectError::Untrusted { .. }
        | ConnectError::Handshake { .. } => error.to_string(),
        ConnectError::Local(source) => format!("{address}: {error}: {source}"),
        _ => format!("{address}: {error}"),
    });
    errors.collect::<Vec<_>>().join("; ")
}

impl ConnectError {
    /// Whether trying again later can help.
    pub fn retry(&self) -> bool {
        match self {
            Self::Token(_)
            | Self::Resolve { .. }
            | Self::Local(_)
            | Self::Dial { .. }
            | Self::Proxy { .. }
            | Self::Unreachable { .. } => true,
            Self::Denied(reason) => reason.retry,
            Self::EachAddress { errors, .. } => errors.iter().any(|(_, error)| error.retry()),
            Self::EachServer { errors } => errors.iter().any(|(_, error)| error.retry()),
            Self::MissingState { .. }
            | Self::Setting(_)
            | Self::Tls(_)
            | Self::Address(_)
            | Self::PinMismatch { .. }
            | Self::ProxyRefused { .. }
            | Self::Untrusted { .. }
            | Self::Handshake { .. } => false,
        }
    }

    /// Whether the server refused this client or is not the trusted one, as opposed to being out of reach.
    pub fn is_auth(&self) -> bool {
        match self {
            Self::PinMismatch { .. } => true,
            Self::EachAddress { errors, .. } => errors.iter().any(|(_, error)| error.is_auth()),
            Self::EachServer { errors } => errors.iter().any(|(_, error)| error.is_auth()),
            Self::Denied(reason) => matches!(
                reason.code,
                CloseCode::AUTH_FAILED
                    | CloseCode::AUTH_REQUIRED
                    | CloseCode::AUTH_REVOKED
                    | CloseCode::AUTH_EXPIRED
                    | CloseCode::FORBIDDEN
                    | CloseCode::AUTH_TIMEOUT
            ),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each; the compiler says when one is missing.
    fn samples() -> Vec<ConnectError> {
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let text = String::new();
        let pin = crate::Identity::generate().unwrap().fingerprint();
        let all = vec![
            ConnectError::Setting(InvalidSetting("")),
            ConnectError::MissingState {
                channel: text.clone(),
                state: "",
            },
            ConnectError::Tls(text.clone()),
            ConnectError::Token(text.clone()),
            ConnectError::Address(text.clone()),
            ConnectError::Resolve {
                host: text.clone(),
                source: io::Error::other(""),
            },
            ConnectError::Local(io::Error::other("")),
            ConnectError::Dial {
                address,
                text: text.clone(),
            },
            ConnectError::Unreachable { address },
            ConnectError::Proxy {
                proxy: text.clone(),
                text: text.clone(),
            },
            ConnectError::ProxyRefused {
                proxy: text.clone(),
                text: text.clone(),
            },
            ConnectError::EachAddress {
                host: text.clone(),
                errors: vec![(address, ConnectError::Unreachable { address })],
            },
            ConnectError::EachServer {
                errors: vec![(text.clone(), ConnectError::Unreachable { address })],
            },
            ConnectError::PinMismatch {
                expected: pin,
                presented: pin,
            },
            ConnectError::Untrusted {
                address,
                text: text.clone(),
                dates: false,
            },
            ConnectError::Handshake { address, text },
            ConnectError::Denied(CloseReason::local(CloseCode::SERVER_BUSY, "")),
        ];
        for error in &all {
            match error {
                ConnectError::Setting(_)
                | ConnectError::MissingState { .. }
                | ConnectError::Tls(_)
                | ConnectError::Token(_)
                | ConnectError::Address(_)
                | ConnectError::Resolve { .. }
                | ConnectError::Local(_)
                | ConnectError::Dial { .. }
                | ConnectError::Unreachable { .. }
                | ConnectError::Proxy { .. }
                | ConnectError::ProxyRefused { .. }
                | ConnectError::EachAddress { .. }
                | ConnectError::EachServer { .. }
                | ConnectError::PinMismatch { .. }
                | ConnectError::Untrusted { .. }
                | ConnectError::Handshake { .. }
                | ConnectError::Denied(_) => {}
            }
        }
        all
    }

    #[test]
    fn the_table_says_what_is_retried() {
        let rows: Vec<(&str, &str)> = include_str!("client.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("/// | `"))
            .filter_map(|row| {
                let (name, rest) = row.split_once("` | ")?;
                Some((name, rest.split_once(" | ")?.0))
            })
            .collect();
        let errors = samples();
        assert_eq!(rows.len(), errors.len());
        for ((name, verdict), error) in rows.into_iter().zip(errors) {
            assert!(format!("{error:?}").starts_with(name), "{name}: {error:?}");
            match error {
                ConnectError::Denied(_) => {
                    assert_eq!(verdict, "as its reason");
                    for code in CloseCode::ALL {
                        let reason = CloseReason::peer(*code, "");
                        let retry = reason.retry;
                        assert_eq!(ConnectError::Denied(reason).retry(), retry, "{code}");
                    }
                }
                error => assert_eq!(error.retry(), verdict == "yes", "{name}"),
            }
        }
    }

    #[tokio::test]
    async fn the_error_names_every_address_with_its_reason() {
        let pin = crate::Identity::generate().unwrap().fingerprint();
        let timeouts = Timeouts {
            handshake: Duration::from_millis(50),
            ..Timeouts::default()
        };
        let client = Client::builder().pin(pin).timeouts(timeouts);
        let client = client.build().unwrap();
        let mute = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let muted = mute.local_addr().unwrap();
        let unbound = {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.local_addr().unwrap()
        };
        let url = ConnectUrl::new("name", 1).unwrap();
        let addresses = vec![muted, unbound];
        let reached = client.dial_any(Goal::of(&url), addresses, TransportChoice::Quic);
        let reached = reached.await;
        let error = reached.expect_err("nobody is there");
        let text = format!(
            "no address of name works: no answer from {muted}; cannot dial {unbound}: connection refused"
        );
        assert_eq!(error.to_string(), text);
        assert!(error.retry() && !error.is_auth());
    }

    /// What the system's resolver makes of a zone goes into the address; TLS is told the address alone.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_zone_is_the_scope_of_the_address() {
        let url: ConnectUrl = "[fe80::1%lo]:9".parse().unwrap();
        let mut found = tokio::net::lookup_host((url.host(), url.port()))
            .await
            .unwrap();
        match found.next() {
            Some(SocketAddr::V6(address)) => assert_ne!(address.scope_id(), 0),
            other => panic!("{other:?}"),
        }
        let pin = crate::Identity::generate().unwrap().fingerprint();
        let timeouts = Timeouts {
            handshake: Duration::from_millis(50),
            ..Timeouts::default()
        };
        let client = Client::builder()
            .pin(pin)
            .timeouts(timeouts)
            .build()
            .unwrap();
        let error = client.connect("[fe80::1%lo]:9").await.err().unwrap();
        let text = error.to_string();
        // Nobody is there; what it is called is no fault.
        assert!(error.retry() && !text.contains("name"), "{text}");
        let error = client.connect("[fe80::1%nothing]:9").await.err().unwrap();
        assert_eq!(error.to_string(), "cannot resolve fe80::1%nothing");
    }

    #[test]
    fn who_gives_up_tells_what_each_server_said_last() {
        let last = CloseReason::local(CloseCode::TIMED_OUT, "no answer");
        let said = |server: &str, text: &str| (server.to_owned(), text.to_owned());
        let one = BTreeMap::from([(0, said("a:1", "no answer"))]);
        assert_eq!(of_all(last.clone(), one), last);
        let two = [(1, said("b:1", "busy")), (0, said("a:1", "no answer"))];
        let reason = of_all(last.clone(), BTreeMap::from(two));
        assert_eq!(reason.text, "a:1: no answer; b:1: busy");
        assert_eq!((reason.code, reason.retry), (last.code, last.retry));
    }

    #[tokio::test]
    async fn the_error_names_every_server_with_its_reason() {
        let pin = crate::Identity::generate().unwrap().fingerprint();
        let timeouts = Timeouts {
            handshake: Duration::from_millis(50),
            ..Timeouts::default()
        };
        let mute = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let muted = mute.local_addr().unwrap();
        let unbound = {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.local_addr().unwrap()
        };
        let client = Client::builder().pin(pin).timeouts(timeouts);
        let client = client.fallback(unbound.to_string(), None).build().unwrap();
        let error = client.connect(&muted.to_string()).await.err().unwrap();
        let text = format!(
            "no server can be reached: {muted}: no answer from {muted}; \
             {unbound}: cannot dial {unbound}: connection refused"
        );
        assert_eq!(error.to_string(), text);
        assert!(error.retry() && !error.is_auth());
    }

    #[test]
    fn a_server_that_restarts_during_the_handshake_is_tried_again() {
        let pin = crate::Identity::generate().unwrap().fingerprint();
        let client = Client::builder().pin(pin).build().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let ended = |code, by| {
            let reason = CloseReason::new(code, "", by);
            DialError::Handshake(ConnectionError::Transport(reason))
        };
        let reset = ended(CloseCode::PEER_RESTARTED, Side::Transport);
        let error = client.dial_error(address, reset);
        assert!(error.retry() && !error.is_auth(), "{error:?}");
        let error = client.dial_error(address, ended(CloseCode::VERSION, Side::Peer));
        assert!(!error.retry(), "{error:?}");
    }
}
