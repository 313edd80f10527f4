//! Dials a server over TCP: TLS 1.3 with the same trust as over QUIC, then a WebSocket.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::client::ClientRequestBuilder;
use tokio_tungstenite::tungstenite::http::Uri;
use tokio_tungstenite::{client_async_with_config, tungstenite};
use tokio_util::task::TaskTracker;

use crate::base::text::printable_within;
use crate::transport::connection::ConnectionError;
use crate::transport::dialer::{DialError, Local};
use crate::transport::mux::{self, Ends, Side};
use crate::transport::proxy::Proxy;
use crate::transport::trips;
use crate::transport::udp::keep_to;
use crate::trust::origin::Transport;
use crate::trust::tls::Distrust;
use crate::wire::code::{self, CloseCode, CloseReason};
use crate::wire::config::{Limits, Timeouts};

/// The path at which a server accepts WebSockets.
pub(crate) const PATH: &str = "/udpack";
/// The WebSocket subprotocol: draft 02 of QMux, which carries this protocol.
pub(crate) const SUBPROTOCOL: &str = "qmux-02.udpack-1";
/// The most unsent bytes in the kernel's buffer. Urgent messages wait behind them.
const UNSENT: u32 = 128 << 10;

/// Configures a TCP socket for a connection: small records are sent at once, and few bytes wait in the kernel.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    // Without this option urgent messages only wait longer.
    let _ = SockRef::from(stream).set_tcp_notsent_lowat(UNSENT);
    Ok(())
}

/// The settings of a dial over TCP.
pub(super) struct Way<'a> {
    pub(super) tls: &'a Arc<rustls::ClientConfig>,
    pub(super) limits: &'a Limits,
    pub(super) timeouts: &'a Timeouts,
    pub(super) local: &'a Local,
}

impl Way<'_> {
    /// Connects to this address of the server `host`. TLS begins no sooner than `hold` has ended.
    ///
    /// # Cancel safety
    /// A dropped future gives the connection up.
    pub(super) async fn dial(
        &self,
        address: SocketAddr,
        host: &str,
        hold: impl Future<Output = ()>,
    ) -> Result<mux::Connection, DialError> {
        let begun = Instant::now();
        let limit = self.timeouts.handshake;
        let stream = timeout_at(begun + limit, self.tcp(address));
        let stream = stream.await.map_err(|_| DialError::Silent)??;
        let trip = begun.elapsed();
        hold.await;
        // Extended by the measured round trip.
        let limit = limit.saturating_sub(trip) + trips(trip);
        let rest = timeout(limit, self.over(stream, address, host, address.port()));
        rest.await.map_err(|_| DialError::Silent)?
    }

    /// Has the proxy at this address lead to the server `host`. An error comes with whether the proxy was there.
    ///
    /// # Cancel safety
    /// A dropped future gives the connection up.
    pub(super) async fn lead(
        &self,
        proxy: &Proxy,
        address: SocketAddr,
        server: (&str, u16),
        deadline: Instant,
    ) -> Result<TcpStream, (DialError, bool)> {
        let of_proxy = |text: &str| DialError::Proxy {
            text: text.to_owned(),
            retry: true,
        };
        let connected = timeout_at(deadline, self.tcp(address)).await;
        let mut stream = match connected {
            Ok(Ok(stream)) => stream,
            Ok(Err(DialError::Refused(text))) => return Err((of_proxy(&text), false)),
            Ok(Err(error)) => return Err((error, false)),
            Err(_) => return Err((of_proxy("it cannot be reached in time"), false)),
        };
        let led = timeout_at(deadline, proxy.connect(&mut stream, server)).await;
        match led {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(error)) => Err((error, true)),
            Err(_) => Err((of_proxy("it gives no answer in time"), true)),
        }
    }

    async fn tcp(&self, address: SocketAddr) -> Result<TcpStream, DialError> {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        };
        let socket = socket.map_err(DialError::Local)?;
        if let Some(interface) = &self.local.interface {
            keep_to(&socket, interface).map_err(DialError::Local)?;
        }
        if let Some(local) = self.local.address {
            // The given port is for UDP.
            let local = SocketAddr::new(local.ip(), 0);
            socket.bind(local).map_err(DialError::Local)?;
        }
        let stream = socket.connect(address).await;
        let stream = stream.map_err(|error| DialError::Refused(said(&error)))?;
        prepare(&stream).map_err(DialError::Local)?;
        Ok(stream)
    }

    /// Begins TLS and a WebSocket over this stream, which leads to the server `host`.
    pub(super) async fn over(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        host: &str,
        port: u16,
    ) -> Result<mux::Connection, DialError> {
        let local = stream.local_addr().ok();
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| DialError::Refused(error.to_string()))?;
        let connector = TlsConnector::from(self.tls.clone());
        let stream = connector.connect(name, stream).await;
        let stream = stream.map_err(|error| failed(&error))?;
        let socket = handshake(stream, host, port).await?;
        let ends = Ends {
            local,
            remote: address,
            transport: Transport::WebSocket { origin: None },
        };
        begin(socket, ends, self.limits, self.timeouts).await
    }
}

fn failed(error: &io::Error) -> DialError {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
    let text = printable_within(&error.to_string(), 256);
    match (tls, tls.and_then(Distrust::of)) {
        (_, Some(why)) => DialError::untrusted(why, text),
        (Some(_), None) => ended(CloseCode::TRANSPORT_ERROR, text),
        (None, None) => ended(CloseCode::CONNECTION_LOST, text),
    }
}

type Socket<S> = tokio_tungstenite::WebSocketStream<S>;

/// Performs the WebSocket handshake.
async fn handshake<S>(stream: S, host: &str, port: u16) -> Result<Socket<S>, DialError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let authority = match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    let uri: Uri = format!("wss://{authority}{PATH}")
        .parse()
        .map_err(|_| DialError::Refused("the name has no place in a URL".to_owned()))?;
    let request = ClientRequestBuilder::new(uri).with_sub_protocol(SUBPROTOCOL);
    let config = Some(mux::socket_config());
    match client_async_with_config(request, stream, config).await {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::Error::Http(answer)) => {
            let text = format!("the server answers {} to a WebSocket", answer.status());
            Err(ended(CloseCode::TRANSPORT_ERROR, text))
        }
        Err(tungstenite::Error::Io(error)) => Err(ended(CloseCode::CONNECTION_LOST, said(&error))),
        Err(error) => {
            let text = printable_within(&error.to_string(), 256);
            Err(ended(CloseCode::TRANSPORT_ERROR, text))
        }
    }
}

/// Begins a connection of a client over a WebSocket.
pub(super) async fn begin<S>(
    socket: Socket<S>,
    ends: Ends,
    limits: &Limits,
    timeouts: &Timeouts,
) -> Result<mux::Connection, DialError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let tasks = TaskTracker::new();
    let conn = mux::Connection::begin(socket, Side::Client, ends, (limits, timeouts), &tasks);
    let begun = timeout(timeouts.handshake, conn.begun()).await;
    match begun {
        Ok(Ok(())) => Ok(conn),
        Ok(Err(error)) => Err(DialError::Handshake(error)),
        Err(_) => Err(DialError::Silent),
    }
}

fn ended(code: CloseCode, text: String) -> DialError {
    let reason = CloseReason::new(code, text, code::Side::Transport);
    DialError::Handshake(ConnectionError::Transport(reason))
}

/// The system's text of an error, without its number.
fn said(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    printable_within(&text.to_lowercase(), 256)
}
