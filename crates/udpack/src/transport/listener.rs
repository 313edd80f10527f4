//! The accepting side of a transport: a UDP port on which connections arrive.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::{hkdf, hmac};
use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::task::TaskTracker;

use crate::base::lock;
use crate::transport::carriers::{self, Carriers};
use crate::transport::endpoint::{self, At, ETHERNET_PAYLOAD, Route, Side, Via};
use crate::transport::lookup::unmapped;
use crate::transport::mux::{self, Ends};
use crate::transport::qlog::Qlog;
use crate::transport::quic::Endpoint;
use crate::transport::udp::Port;
use crate::transport::web;
use crate::transport::{Connection, ConnectionError};
use crate::trust::identity::{Identity, IdentityError};
use crate::trust::origin::Web;
use crate::trust::tls::{self, ALPN};
use crate::trust::web_certificate::Certificates;
use crate::wire::code::CloseCode;
use crate::wire::config::{CongestionControl, InvalidSetting, Limits, Timeouts};

/// The most connection settings that are kept for different path sizes; a host has few.
const SETTINGS_KEPT: usize = 16;

/// A port on which connections arrive.
pub(crate) struct Listener {
    endpoint: Endpoint,
    port: Port,
    /// Connections over TCP.
    carriers: Arc<Carriers>,
    limits: Arc<Limits>,
    timeouts: Arc<Timeouts>,
    congestion: CongestionControl,
    config: quinn::ServerConfig,
    via: Via,
    qlog: Option<Qlog>,
    /// The settings for browsers, if the server serves them.
    web: Option<Web>,
    /// Closes of browsers' sessions that are in progress.
    farewells: TaskTracker,
    /// The settings of connections without a qlog file, by the route.
    made: Mutex<HashMap<Option<Route>, Arc<quinn::ServerConfig>>>,
}

/// Why a port could not be opened.
pub(crate) enum ListenError {
    Setting(InvalidSetting),
    Identity(IdentityError),
    Bind(io::Error),
}

impl Listener {
    /// Opens a port for this identity. Must be called on a runtime.
    pub(crate) fn open(
        (identity, certificates): (&Identity, &Arc<Certificates>),
        (limits, timeouts): (Arc<Limits>, Arc<Timeouts>),
        congestion: CongestionControl,
        (via, at): (Via, At),
        qlog: Option<PathBuf>,
        web: Option<Web>,
    ) -> Result<Self, ListenError> {
        let side = Side::Server { web: web.is_some() };
        let transport = endpoint::transport(&limits, &timeouts, congestion, None, side)
            .map_err(ListenError::Setting)?;
        let protocols = match &web {
            None => vec![ALPN],
            Some(_) => vec![ALPN, web::wire::ALPN],
        };
        let tls = tls::server_config(certificates.clone(), &protocols)
            .map_err(|error| ListenError::Identity(IdentityError::crypto(error)))?;
        let tls = QuicServerConfig::try_from(tls)
            .map_err(|error| ListenError::Identity(IdentityError::crypto(error)))?;
        let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]);
        let address_key = salt.extract(&identity.address_secret());
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        config
            .transport_config(Arc::new(transport))
            .token_key(Arc::new(address_key))
            .max_incoming(limits.handshakes.saturating_mul(4).max(1))
            .incoming_buffer_size(64 << 10)
            .incoming_buffer_size_total(16 << 20);
        // Keys that come from the identity let a restarted server tell its old clients at once that their connections
        // are gone (RFC 9000, section 10.3), instead of leaving them to their idle time. quinn sends at most one such
        // reset in 20 ms: of a hundred clients that send at once, most would get no reset and would retry at growing
        // intervals. The limit is not needed: a reset is shorter than the packet that it answers, and only connection
        // ids with the mark of this key are answered.
        let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &identity.reset_secret());
        let mut settings = quinn::EndpointConfig::new(Arc::new(reset_key));
        settings.min_reset_interval(Duration::ZERO);
        let cid_key = identity.cid_key();
        settings.cid_generator(move || {
            Box::new(quinn_proto::HashedConnectionIdGenerator::from_key(cid_key))
        });
        let carriers = Carriers::new(limits.clone(), timeouts.clone());
        #[cfg(feature = "testing")]
        if let (Via::Net(host), At::Address(address)) = (&via, &at) {
            host.take_streams(*address, &carriers);
        }
        let (endpoint, port) = via
            .open(
                at,
                limits.socket_buffer,
                via.most_payload(),
                settings,
                Some(config.clone()),
                None,
            )
            .map_err(ListenError::Bind)?;
        let farewells = TaskTracker::new();
        // A closed tracker lets `wait` return when no task is left.
        farewells.close();
        Ok(Self {
            endpoint: Endpoint::quic(endpoint),
            port,
            carriers,
            limits,
            timeouts,
            congestion,
            config,
            via,
            qlog: qlog.map(|dir| Qlog::new(dir, "server")),
            web,
            farewells,
            made: Mutex::default(),
        })
    }

    /// The next incoming connection attempt; `None` once the port is closed.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn accept(&self) -> Option<Incoming> {
        tokio::select! {
            incoming = self.endpoint.as_quic().accept() => Some(Incoming::Quic(incoming?)),
            conn = self.carriers.next() => Some(Incoming::Mux(conn)),
        }
    }

    /// Performs the handshake of a connection; with a browser, up to its session.
    ///
    /// # Cancel safety
    /// A dropped future gives the connection up.
    pub(crate) async fn handshake(
        &self,
        incoming: Incoming,
    ) -> Result<Connection, ConnectionError> {
        let incoming = match incoming {
            Incoming::Quic(incoming) => incoming,
            Incoming::Mux(conn) => {
                conn.begun().await?;
                return Ok(Connection::Mux(conn));
            }
        };
        let connecting = match self.settings_for(incoming.remote_address()) {
            Some(config) => incoming.accept_with(config),
            None => incoming.accept(),
        };
        let mut connecting = connecting?;
        let Some(web) = &self.web else {
            return Ok(Connection::quic(connecting.await?));
        };
        let data = connecting.handshake_data().await?;
        let data = data.downcast::<HandshakeData>().ok();
        let protocol = data.and_then(|data| data.protocol);
        if protocol.as_deref() != Some(web::wire::ALPN) {
            return Ok(Connection::quic(connecting.await?));
        }
        let (conn, handshake) = match connecting.into_0rtt() {
            Ok(begun) => begun,
            // Does not happen on a server, which may send before the client has finished its handshake.
            Err(connecting) => return Ok(Connection::quic(connecting.await?)),
        };
        let terms = web::Terms {
            web,
            header: self.timeouts.frame,
            streams: self.limits.channels,
            farewells: &self.farewells,
        };
        // Boxed, like all state that only browsers need: the tasks of other connections need no memory for it.
        let session = Box::pin(web::establish(conn.clone(), handshake, terms)).await?;
        Ok(Connection::web(conn, session))
    }

    /// Waits until browsers have received the closes in progress, 2 s at most.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn farewells(&self) {
        self.farewells.wait().await;
    }

    /// Accepts a connection over TCP, after the handshake of its WebSocket.
    pub(crate) async fn take_in<S>(&self, stream: S, ends: Ends)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.carriers.take_in(stream, ends).await;
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Closes all connections, and accepts no more.
    pub(crate) fn close(&self, code: CloseCode, text: &str) {
        self.carriers.close(code, text);
        self.endpoint.close(code, text);
    }

    /// Waits until no connection is left.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn wait_idle(&self) {
        self.endpoint.wait_idle().await;
        self.carriers.wait_idle().await;
    }

    /// Frees the port even while handles of connections exist: nothing more is sent or received.
    pub(crate) fn free_port(&self) {
        self.port.close();
    }

    /// The settings of a connection with this peer; `None`: the settings of the port.
    fn settings_for(&self, peer: SocketAddr) -> Option<Arc<quinn::ServerConfig>> {
        // quinn keeps a buffer of the largest datagram it ever tried: too much for each of many idle sockets.
        let route = self.via.route_to(peer).map(|route| Route {
            payload: route.payload.min(ETHERNET_PAYLOAD),
            ..route
        });
        let stream = self.qlog.as_ref().and_then(|qlog| qlog.stream(peer));
        if stream.is_none()
            && let Some(config) = lock(&self.made).get(&route)
        {
            return Some(config.clone());
        }
        let (limits, timeouts) = (&self.limits, &self.timeouts);
        let side = Side::Server {
            web: self.web.is_some(),
        };
        let mut transport =
            endpoint::transport(limits, timeouts, self.congestion, route, side).ok()?;
        let logged = stream.is_some();
        transport.qlog_stream(stream);
        let mut config = self.config.clone();
        config.transport_config(Arc::new(transport));
        let config = Arc::new(config);
        if !logged {
            let mut made = lock(&self.made);
            if made.len() >= SETTINGS_KEPT {
                made.clear();
            }
            made.insert(route, config.clone());
        }
        Some(config)
    }
}

/// An incoming connection attempt. Dropping it refuses it.
#[expect(
    clippy::large_enum_variant,
    reason = "it lives for a moment, and nearly all are of the large kind"
)]
pub(crate) enum Incoming {
    Quic(quinn::Incoming),
    Mux(mux::Connection),
}

impl Incoming {
    pub(crate) fn remote_address(&self) -> SocketAddr {
        unmapped(match self {
            Self::Quic(incoming) => incoming.remote_address(),
            Self::Mux(conn) => conn.remote_address(),
        })
    }

    /// Whether the peer's address is validated (RFC 9000, section 8.1). Over TCP it always is.
    pub(crate) fn is_proved(&self) -> bool {
        match self {
            Self::Quic(incoming) => incoming.remote_address_validated(),
            Self::Mux(_) => true,
        }
    }

    /// Whether the peer can be sent a Retry.
    pub(crate) fn may_retry(&self) -> bool {
        match self {
            Self::Quic(incoming) => incoming.may_retry(),
            Self::Mux(_) => false,
        }
    }

    /// Sends a Retry. If the peer has already answered one, it is refused.
    pub(crate) fn retry(self) {
        match self {
            Self::Quic(incoming) => drop(incoming.retry()),
            Self::Mux(conn) => carriers::busy(&conn),
        }
    }

    /// Tells the peer that no connection is accepted now.
    pub(crate) fn refuse(self) {
        match self {
            Self::Quic(incoming) => incoming.refuse(),
            Self::Mux(conn) => carriers::busy(&conn),
        }
    }
}
