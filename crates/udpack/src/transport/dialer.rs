//! The dialling side of a transport.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use tokio::time::{Instant, timeout_at};

use crate::base::lock;
use crate::transport::endpoint::{self, At, FirstWord, Route, Side, Via};
use crate::transport::proxy::Proxy;
use crate::transport::qlog::Qlog;
use crate::transport::{Connection, ConnectionError, Endpoint, quic, trips, websocket};
use crate::trust::fingerprint::Fingerprint;
use crate::trust::tls::{ALPN, Attempt, Distrust, PinMismatch, Trust, client_config};
use crate::wire::config::{CongestionControl, InvalidSetting, Limits, Timeouts};
#[cfg(feature = "testing")]
use crate::{transport::mux, trust::origin::Transport};

/// Makes connections to servers, each from a port of its own.
pub(crate) struct Dialer {
    config: quinn::ClientConfig,
    /// The same trust for TCP.
    tls: Arc<rustls::ClientConfig>,
    limits: Arc<Limits>,
    timeouts: Arc<Timeouts>,
    congestion: CongestionControl,
    via: Via,
    local: Local,
    qlog: Option<Qlog>,
    /// The last local address for which a probe passed with a payload size, that size in bytes, and the time.
    proved: Mutex<Option<(SocketAddr, u16, Instant)>>,
}

/// What of this machine to dial from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Local {
    pub(crate) address: Option<SocketAddr>,
    /// The name of the interface that everything goes over, whatever the routes say.
    pub(crate) interface: Option<Arc<str>>,
}

/// How long such a probe remains valid. A forwarder that takes over the port in the meantime is detected by its
/// losses.
const PROVED_FOR: Duration = Duration::from_secs(60);

/// Why a [`Dialer`] could not be made.
pub(crate) enum DialerError {
    Setting(InvalidSetting),
    Tls(String),
}

/// Why a server could not be reached.
#[derive(Debug)]
pub(crate) enum DialError {
    /// No port could be opened here.
    Local(io::Error),
    Setting(InvalidSetting),
    /// This address cannot be dialled, or the system says that it is not reachable; with the reason.
    Refused(String),
    /// The server did not answer in time.
    Silent,
    /// The server has another key than the pinned one.
    Pin(PinMismatch),
    /// The server's certificate is not trusted. `dates`: because of its dates.
    Untrusted {
        text: String,
        dates: bool,
    },
    /// The handshake failed.
    Handshake(ConnectionError),
    /// The proxy, which is not the server, is out of reach or does not lead there; with the reason, and whether it may do so later.
    Proxy {
        text: String,
        retry: bool,
    },
}

/// After this time without an answer, a dial asks the system whether the address is reachable. Most handshakes are
/// complete by then, and asking takes a socket of its own.
const UNANSWERED: Duration = Duration::from_millis(100);

impl Dialer {
    /// Creates a dialer for servers with this key, or with a certificate of a CA that the platform trusts. `local` is
    /// what to dial from.
    pub(crate) fn new(
        pin: Option<Fingerprint>,
        (limits, timeouts): (Arc<Limits>, Arc<Timeouts>),
        congestion: CongestionControl,
        (via, local): (Via, Local),
        qlog: Option<PathBuf>,
    ) -> Result<Self, DialerError> {
        // Invalid settings are reported now, not at the first connection.
        endpoint::transport(&limits, &timeouts, congestion, None, Side::Client)
            .map_err(DialerError::Setting)?;
        let trust = pin.map_or(Trust::PlatformRoots, Trust::Pin);
        let tls = client_config(trust).map_err(|error| DialerError::Tls(error.to_string()))?;
        let mut over_tcp = tls.clone();
        over_tcp.alpn_protocols = vec![b"http/1.1".to_vec()];
        if pin.is_some() {
            // A server with another certificate for browsers presents its own certificate to clients that offer this
            // protocol.
            over_tcp.alpn_protocols.push(ALPN.to_vec());
        }
        let tls =
            QuicClientConfig::try_from(tls).map_err(|error| DialerError::Tls(error.to_string()))?;
        Ok(Self {
            config: quinn::ClientConfig::new(Arc::new(tls)),
            tls: Arc::new(over_tcp),
            limits,
            timeouts,
            congestion,
            via,
            local,
            qlog: qlog.map(|dir| Qlog::new(dir, "client")),
            proved: Mutex::new(None),
        })
    }

    /// The addresses of this name, in the order in which the system would try them.
    pub(crate) async fn lookup(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        self.via.lookup(host, port).await
    }

    /// Connects to this address of the server `host`. The endpoint must live as long as the connection.
    ///
    /// # Cancel safety
    /// A dropped future gives the connection up.
    pub(crate) async fn dial(
        &self,
        address: SocketAddr,
        host: &str,
    ) -> Result<(Connection, Endpoint), DialError> {
        let local = self.local.address.unwrap_or_else(|| {
            let any = match address {
                SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
                SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            };
            SocketAddr::new(any, 0)
        });
        let interface = self.local.interface.as_ref();
        let at = match interface {
            Some(name) => At::Interface(local, name.clone()),
            None => At::Address(local),
        };
        let route = self.proved_route_to(address).await;
        let route = route.map_err(|_| DialError::Refused("connection refused".to_owned()))?;
        let (heard, attempt) = (FirstWord::default(), Attempt::default());
        let (endpoint, _) = self
            .via
            .open(
                at,
                self.limits.socket_buffer,
                route.map(|route| route.payload),
                quinn::EndpointConfig::default(),
                None,
                Some((heard.clone(), attempt.clone())),
            )
            .map_err(DialError::Local)?;
        let config = self.config(address, route).map_err(DialError::Setting)?;
        let connecting = endpoint
            .connect_with(config, address, host)
            .map_err(|error| DialError::Refused(error.to_string()))?;
        let pause = UNANSWERED.min(self.timeouts.handshake / 4);
        let local = (local, interface.map(|name| &**name));
        let connected = tokio::select! {
            connected = connecting => connected,
            () = patience(self.timeouts.handshake, &heard) => return Err(DialError::Silent),
            error = self.via.unreachable(local, address, pause) => {
                return Err(DialError::Refused(error.to_owned()));
            }
        };
        match connected {
            Ok(conn) => {
                let endpoint = Endpoint::Quic(quic::Endpoint::quic(endpoint));
                Ok((Connection::quic(conn), endpoint))
            }
            Err(error) => Err(failed(error, attempt.distrust())),
        }
    }

    /// Connects to this address of the server `host` over TCP. TLS begins no sooner than `hold` has ended.
    ///
    /// # Cancel safety
    /// A dropped future gives the connection up.
    pub(crate) async fn dial_websocket(
        &self,
        address: SocketAddr,
        host: &str,
        hold: impl Future<Output = ()>,
    ) -> Result<(Connection, Endpoint), DialError> {
        let conn = match &self.via {
            Via::System => self.way().dial(address, host, hold).await?,
            #[cfg(feature = "testing")]
            Via::Net(net) => {
                // This network has no TLS, and its servers hear of a connection as soon as it is there.
                hold.await;
                let (stream, local) = net.connect(address).await.map_err(DialError::Local)?;
                let socket = mux::upgraded(stream, mux::Side::Client).await;
                let ends = mux::Ends {
                    local: Some(local),
                    remote: address,
                    transport: Transport::WebSocket { origin: None },
                };
                websocket::begin(socket, ends, &self.limits, &self.timeouts).await?
            }
        };
        Ok((Connection::Mux(conn.clone()), Endpoint::Mux(conn)))
    }

    /// Connects to the server `host`, which is called `name`, over TCP and through a proxy. TLS begins no sooner than `hold` has
    /// ended. An error comes with the proxy's address, as far as that is known.
    ///
    /// # Cancel safety
    /// A dropped future gives the connection up.
    pub(crate) async fn dial_through(
        &self,
        proxy: &Proxy,
        (host, port): (&str, u16),
        name: &str,
        hold: impl Future<Output = ()>,
    ) -> Result<(Connection, Endpoint), (Option<SocketAddr>, DialError)> {
        let silent = |text: &str| DialError::Proxy {
            text: text.to_owned(),
            retry: true,
        };
        let found = self.lookup(proxy.host(), proxy.port()).await;
        let found = found.map_err(|_| (None, silent("its name cannot be resolved")))?;
        let way = self.way();
        let deadline = Instant::now() + self.timeouts.handshake;
        let mut last = (None, silent("its name has no address"));
        for address in found {
            let led = way.lead(proxy, address, (host, port), deadline).await;
            let stream = match led {
                Ok(stream) => stream,
                // The next address is the same proxy, where this one leads to none.
                Err((error, false)) => {
                    last = (Some(address), error);
                    continue;
                }
                Err((error, true)) => return Err((Some(address), error)),
            };
            let held = Instant::now();
            hold.await;
            let deadline = deadline + held.elapsed();
            let rest = timeout_at(deadline, way.over(stream, address, name, port)).await;
            let rest = rest.map_err(|_| silent("nothing comes from the server through it"));
            let conn = rest.flatten().map_err(|error| (Some(address), error))?;
            return Ok((Connection::Mux(conn.clone()), Endpoint::Mux(conn)));
        }
        Err(last)
    }

    fn way(&self) -> websocket::Way<'_> {
        websocket::Way {
            tls: &self.tls,
            limits: &self.limits,
            timeouts: &self.timeouts,
            local: &self.local,
        }
    }

    /// As [`Via::proved_route_to`], with the result of the last probe if it is recent: a probe costs as much as a
    /// handshake.
    async fn proved_route_to(&self, address: SocketAddr) -> io::Result<Option<Route>> {
        let last = *lock(&self.proved);
        if let Some((at, payload, when)) = last
            && at == address
            && when.elapsed() < PROVED_FOR
            && let Some(route) = self.via.route_to(address)
            && route.payload == payload
        {
            return Ok(Some(Route {
                proved: true,
                ..route
            }));
        }
        let route = self.via.proved_route_to(address).await?;
        if let Some(route) = route.filter(|route| route.proved) {
            *lock(&self.proved) = Some((address, route.payload, Instant::now()));
        }
        Ok(route)
    }

    /// The settings of one more connection, to this address by this route.
    fn config(
        &self,
        address: SocketAddr,
        route: Option<Route>,
    ) -> Result<quinn::ClientConfig, InvalidSetting> {
        let (limits, timeouts) = (&self.limits, &self.timeouts);
        let mut transport =
            endpoint::transport(limits, timeouts, self.congestion, route, Side::Client)?;
        if let Some(qlog) = &self.qlog
            && let Some(stream) = qlog.stream(address)
        {
            transport.qlog_stream(Some(stream));
        }
        let mut config = self.config.clone();
        config.transport_config(Arc::new(transport));
        Ok(config)
    }
}

impl DialError {
    pub(super) fn untrusted(why: Distrust, text: String) -> Self {
        match why {
            Distrust::Key(mismatch) => Self::Pin(mismatch),
            Distrust::Dates => Self::Untrusted { text, dates: true },
            Distrust::Certificate => Self::Untrusted { text, dates: false },
        }
    }
}

fn failed(error: quinn::ConnectionError, distrust: Option<Distrust>) -> DialError {
    let alert = match &error {
        quinn::ConnectionError::TransportError(error) => {
            is_about_certificate(u64::from(error.code)).then_some(Distrust::Certificate)
        }
        _ => None,
    };
    match (distrust.or(alert), ConnectionError::from(error)) {
        (_, ConnectionError::TimedOut) => DialError::Silent,
        (Some(why), error) => DialError::untrusted(why, error.reason().text),
        (None, error) => DialError::Handshake(error),
    }
}

/// Whether this QUIC code is a TLS alert about the server's certificate.
fn is_about_certificate(code: u64) -> bool {
    // `bad_certificate` to `certificate_unknown`, `unknown_ca`, `access_denied`, `decrypt_error` of a signature, and
    // `bad_certificate_status_response`.
    matches!(code.checked_sub(0x100), Some(42..=46 | 48 | 49 | 51 | 113))
}

/// Ends when a handshake that begins now has taken too long: after `limit`, extended by a multiple of the time until
/// the server's first datagram, if one came.
async fn patience(limit: Duration, heard: &FirstWord) {
    let begun = Instant::now();
    tokio::time::sleep_until(begun + limit).await;
    if let Some(first) = heard.get() {
        tokio::time::sleep_until(begun + limit + trips(*first - begun)).await;
    }
}
