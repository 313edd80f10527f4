//! [`Client`]: how to reach a server, whom to trust and what to present; makes [`Socket`]s.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::Instrument;

use crate::auth::Peer;
use crate::code::{CloseCode, CloseReason};
use crate::config::{CongestionControl, Limits, TOKEN_BYTES, Timeouts};
use crate::control;
use crate::endpoint::{self, InvalidSetting};
use crate::fingerprint::Fingerprint;
use crate::inbox::Inbox;
use crate::router::ServeChannel;
use crate::server::{CHANNEL_QUEUE, default_agent};
use crate::session::Session;
use crate::socket::{Control, Registry, Socket, drive};
use crate::speed::Counters;
use crate::tls::{PinCheck, Trust, client_tls};
use crate::url::{ConnectUrl, DEFAULT_PORT};

/// A client's settings; each `connect` makes a socket of its own. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Settings>,
}

struct Settings {
    config: quinn::ClientConfig,
    pin: Option<(Fingerprint, PinCheck)>,
    token: String,
    agent: String,
    registry: Arc<Registry>,
    limits: Arc<Limits>,
    timeouts: Arc<Timeouts>,
    bind: Option<SocketAddr>,
}

impl Client {
    /// Begins a client. Without a pin the server's certificate must be vouched for by the platform's CAs.
    pub fn builder() -> ClientBuilder {
        ClientBuilder {
            pin: None,
            token: String::new(),
            agent: default_agent(),
            registry: Registry::default(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            congestion: CongestionControl::default(),
            bind: None,
        }
    }

    /// Connects to `HOST[:PORT]` and waits until the server has let us in. The default port is 45456.
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
    /// [`connect`](Self::connect): channels may be opened and messages sent behind the `$hello`. The server
    /// looks at none of it before it has accepted the token; a refusal shows as the end of the socket.
    ///
    /// # Errors
    /// See [`ConnectError`].
    ///
    /// # Cancel safety
    /// A dropped future closes what it had begun.
    pub async fn connect_eager(&self, address: &str) -> Result<Socket, ConnectError> {
        let url: ConnectUrl = address
            .parse()
            .map_err(|_| ConnectError::Address(address.to_owned()))?;
        let (host, port) = (url.host().to_owned(), url.port());
        let resolve = |source| ConnectError::Resolve {
            host: host.clone(),
            source,
        };
        let mut last = resolve(io::Error::other("the name has no address"));
        for address in tokio::net::lookup_host((host.as_str(), port))
            .await
            .map_err(resolve)?
        {
            match self.dial(address, &host).await {
                Ok(socket) => return Ok(socket),
                // The server was reached: another of its addresses would not change its mind.
                Err(error @ (ConnectError::PinMismatch { .. } | ConnectError::Denied(_))) => {
                    return Err(error);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn dial(&self, address: SocketAddr, host: &str) -> Result<Socket, ConnectError> {
        let settings = &self.inner;
        let local = settings.bind.unwrap_or_else(|| {
            let any = if address.is_ipv6() {
                IpAddr::V6(Ipv6Addr::UNSPECIFIED)
            } else {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED)
            };
            SocketAddr::new(any, 0)
        });
        let socket =
            endpoint::bind(local, settings.limits.socket_buffer).map_err(ConnectError::Local)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint =
            quinn::Endpoint::new(quinn::EndpointConfig::default(), None, socket, runtime)
                .map_err(ConnectError::Local)?;
        let connecting = endpoint
            .connect_with(settings.config.clone(), address, host)
            .map_err(|error| ConnectError::Dial {
                address,
                text: error.to_string(),
            })?;
        let patience = settings.timeouts.handshake;
        let conn = match tokio::time::timeout(patience, connecting).await {
            Ok(Ok(conn)) => conn,
            Ok(Err(error)) => return Err(self.dial_error(address, &error)),
            Err(_) => return Err(ConnectError::Unreachable { address }),
        };
        let (mut send, recv) = conn
            .open_bi()
            .await
            .map_err(|error| ConnectError::Denied(CloseReason::from_connection(&error)))?;
        let hello = control::encode_hello(&settings.token, &settings.agent, &settings.limits, None)
            .map_err(|_| ConnectError::Setting(InvalidSetting("the token cannot be sent")))?;
        let _ = send.set_priority(i32::MAX);
        send.write_chunk(hello).await.map_err(|_| {
            ConnectError::Denied(crate::session::lost("the connection ended before $hello"))
        })?;
        let session = Session::new(
            conn,
            true,
            settings.limits.clone(),
            settings.timeouts.clone(),
            Counters::root(),
            Some(endpoint),
        );
        let server = match &settings.pin {
            Some((pin, _)) => Peer::new(pin.to_string()),
            None => Peer::new(host),
        };
        let _ = session.peer.set(server);
        let (queue, incoming) = mpsc::channel(CHANNEL_QUEUE);
        let control = Control {
            send,
            inbox: Inbox::new(recv, settings.limits.frame),
        };
        let span = tracing::info_span!("conn", peer = %address);
        let socket = Socket::new(session.clone(), incoming);
        // Owned by the connection: the driver ends when the connection does, and the last handle ends that.
        tokio::spawn(drive(session, control, settings.registry.clone(), queue).instrument(span));
        Ok(socket)
    }

    fn dial_error(&self, address: SocketAddr, error: &quinn::ConnectionError) -> ConnectError {
        if let Some((expected, check)) = &self.inner.pin
            && let Some(mismatch) = check.mismatch(error)
        {
            return ConnectError::PinMismatch {
                expected: *expected,
                presented: mismatch.presented,
            };
        }
        match error {
            quinn::ConnectionError::TimedOut => ConnectError::Unreachable { address },
            quinn::ConnectionError::ApplicationClosed(_) => {
                ConnectError::Denied(CloseReason::from_connection(error))
            }
            _ => {
                let reason = CloseReason::from_connection(error);
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

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("pin", &self.inner.pin.as_ref().map(|(pin, _)| pin))
            .field("agent", &self.inner.agent)
            .finish_non_exhaustive()
    }
}

/// A client in the making; see [`Client::builder`].
#[must_use = "a builder does nothing until `connect` or `build` is called"]
pub struct ClientBuilder {
    pin: Option<Fingerprint>,
    token: String,
    agent: String,
    registry: Registry,
    limits: Limits,
    timeouts: Timeouts,
    congestion: CongestionControl,
    bind: Option<SocketAddr>,
}

impl ClientBuilder {
    /// Trusts exactly the server with this public key, whatever its name and dates. Defaults to none: then
    /// the platform's CAs decide.
    pub fn pin(mut self, pin: Fingerprint) -> Self {
        self.pin = Some(pin);
        self
    }

    /// What to present to the server, at most 512 bytes. It leaves this program only after the server has
    /// proved its key. Defaults to the empty token.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = token.into();
        self
    }

    /// What the client calls itself. Defaults to this library's name and version.
    pub fn agent(mut self, agent: impl Into<String>) -> Self {
        self.agent = agent.into();
        self
    }

    /// Serves the channels of this name that the server opens; see `ServerBuilder::channel`.
    pub fn channel<M>(mut self, name: impl Into<String>, handler: impl ServeChannel<M>) -> Self {
        self.registry.insert(name.into(), handler);
        self
    }

    /// Hands channels whose name nobody is registered for to `Socket::accept_channel` instead of refusing
    /// them. So by default when no channel handler is registered.
    pub fn accept_channels(mut self) -> Self {
        self.registry.pull = true;
        self
    }

    /// How much of everything the server may use. Defaults to `Limits::default()`.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// How long anything may take. Defaults to `Timeouts::default()`.
    pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.timeouts = timeouts;
        self
    }

    /// The congestion controller for what this client sends. Defaults to `CongestionControl::Auto`.
    pub fn congestion(mut self, congestion: CongestionControl) -> Self {
        self.congestion = congestion;
        self
    }

    /// The local address to send from. Defaults to any address and a free port.
    pub fn local_address(mut self, address: SocketAddr) -> Self {
        self.bind = Some(address);
        self
    }

    /// Finishes the settings.
    ///
    /// # Errors
    /// When a setting makes no sense or TLS cannot be set up.
    pub fn build(self) -> Result<Client, ConnectError> {
        if self.token.len() > TOKEN_BYTES {
            return Err(InvalidSetting("a token has at most 512 bytes").into());
        }
        let trust = self.pin.map_or(Trust::PlatformRoots, Trust::Pin);
        let (tls, check) =
            client_tls(trust).map_err(|error| ConnectError::Tls(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(endpoint::transport(
            &self.limits,
            &self.timeouts,
            self.congestion,
            false,
        )?);
        if let Some((channel, state)) = self.registry.missing {
            return Err(ConnectError::MissingState { channel, state });
        }
        let mut registry = self.registry;
        registry.pull |= registry.is_empty();
        Ok(Client {
            inner: Arc::new(Settings {
                config,
                pin: self.pin.map(|pin| (pin, check)),
                token: self.token,
                agent: self.agent,
                registry: Arc::new(registry),
                limits: Arc::new(self.limits),
                timeouts: Arc::new(self.timeouts),
                bind: self.bind,
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
/// What [`retry`](Self::retry) says, and so what is tried again by whatever reconnects by itself:
///
/// | error | retry | because |
/// | --- | --- | --- |
/// | `Setting` | no | it stays wrong |
/// | `Tls` | no | it stays wrong |
/// | `Address` | no | it stays wrong |
/// | `Resolve` | yes | the resolver is out of reach as often as the name is wrong |
/// | `Local` | yes | the system is short of something |
/// | `Dial` | yes | there is no route at the moment |
/// | `Unreachable` | yes | the server or the way to it is down |
/// | `PinMismatch` | no | this is not the server that was asked for |
/// | `Handshake` | no | the two speak different protocols, or nobody vouches for the server |
/// | `Denied` | as its reason | [`CloseReason::retry`]: busy, going down, restarted, lost: yes; the token: no |
///
/// The verdicts on close codes are in `docs/PROTOCOL.md`, section 9.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// A setting makes no sense.
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
    /// The address cannot be dialled.
    #[error("cannot dial {address}: {text}")]
    Dial {
        /// The server's address.
        address: SocketAddr,
        /// Why.
        text: String,
    },
    /// Nobody answered.
    #[error("no answer from {address}")]
    Unreachable {
        /// The server's address.
        address: SocketAddr,
    },
    /// The server's key is not the pinned one. The token was not sent.
    #[error("the server's key is not the pinned one: expected {expected}, got {presented}")]
    PinMismatch {
        /// The pin.
        expected: Fingerprint,
        /// What the server has.
        presented: Fingerprint,
    },
    /// The handshake failed: another protocol, a certificate nobody vouches for, and the like.
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

impl ConnectError {
    /// Whether trying again later can help.
    pub fn retry(&self) -> bool {
        match self {
            Self::Resolve { .. }
            | Self::Local(_)
            | Self::Dial { .. }
            | Self::Unreachable { .. } => true,
            Self::Denied(reason) => reason.retry,
            Self::MissingState { .. }
            | Self::Setting(_)
            | Self::Tls(_)
            | Self::Address(_)
            | Self::PinMismatch { .. }
            | Self::Handshake { .. } => false,
        }
    }

    /// Whether the server refused us or is not the one we trust, as opposed to being out of reach.
    pub fn is_auth(&self) -> bool {
        match self {
            Self::PinMismatch { .. } => true,
            Self::Denied(reason) => matches!(
                reason.code,
                CloseCode::AUTH_FAILED
                    | CloseCode::AUTH_REQUIRED
                    | CloseCode::AUTH_REVOKED
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
            ConnectError::Tls(text.clone()),
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
            ConnectError::PinMismatch {
                expected: pin,
                presented: pin,
            },
            ConnectError::Handshake { address, text },
            ConnectError::Denied(CloseReason::local(CloseCode::SERVER_BUSY, "")),
        ];
        for error in &all {
            match error {
                ConnectError::Setting(_)
                | ConnectError::Tls(_)
                | ConnectError::Address(_)
                | ConnectError::Resolve { .. }
                | ConnectError::Local(_)
                | ConnectError::Dial { .. }
                | ConnectError::Unreachable { .. }
                | ConnectError::PinMismatch { .. }
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

    #[test]
    fn a_server_that_restarts_during_the_handshake_is_tried_again() {
        let pin = crate::Identity::generate().unwrap().fingerprint();
        let client = Client::builder().pin(pin).build().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let error = client.dial_error(address, &quinn::ConnectionError::Reset);
        assert!(error.retry() && !error.is_auth(), "{error:?}");
        let error = client.dial_error(address, &quinn::ConnectionError::VersionMismatch);
        assert!(!error.retry(), "{error:?}");
    }
}
