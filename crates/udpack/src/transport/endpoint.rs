//! The QUIC settings that server and client share, and the endpoints that have them.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AckFrequencyConfig, AsyncUdpSocket, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig,
    ServerConfig, TransportConfig, UdpPoller, VarInt,
};
use tokio::time::Instant;

use crate::transport::congestion::ModelConfig;
use crate::transport::lookup;
use crate::transport::probe;
use crate::transport::quic::varint;
use crate::transport::timer::PromptRuntime;
use crate::transport::udp::{self, Bound, MODEST_PAYLOAD, MOST_PAYLOAD, Port};
use crate::transport::web::OWN_UNI;
use crate::transport::windows;
use crate::trust::tls::Attempt;
use crate::wire::config::{
    CongestionControl, DATAGRAMS_IN, DATAGRAMS_OUT, FEW_STREAMS, InvalidSetting, Limits, MIN_FRAME,
    PREAUTH_BYTES, PREAUTH_STREAMS, Timeouts, VOLATILE_STREAMS,
};

/// The source of a server's or client's UDP sockets.
#[derive(Debug, Clone, Default)]
pub(crate) enum Via {
    /// The operating system.
    #[default]
    System,
    /// A network in memory.
    #[cfg(feature = "testing")]
    Net(crate::transport::memory::Host),
}

impl Via {
    /// Opens a QUIC endpoint on this socket, or at this address, with kernel buffers of `buffer` bytes if the socket
    /// is the kernel's. The transport parameters ask peers to send no larger UDP payloads than `payload` bytes,
    /// smaller ones if the buffers are small, but at least 1,200 bytes. `client` records when the first datagram
    /// arrives, and why the server is not trusted.
    pub(crate) fn open(
        &self,
        at: At,
        buffer: usize,
        payload: Option<u16>,
        mut settings: EndpointConfig,
        server: Option<ServerConfig>,
        client: Option<(FirstWord, Attempt)>,
    ) -> io::Result<(Endpoint, Port)> {
        let payload = payload.unwrap_or(ETHERNET_PAYLOAD).max(LEAST_PAYLOAD);
        let Bound {
            socket,
            payload,
            port,
        } = match self {
            Self::System => match at {
                At::Address(address) => udp::bind(address, None, buffer, payload)?,
                At::Interface(address, name) => udp::bind(address, Some(&name), buffer, payload)?,
                At::Socket(socket) => udp::serve(socket, buffer, payload)?,
            },
            #[cfg(feature = "testing")]
            Self::Net(host) => match at {
                At::Address(address) => Bound {
                    socket: host.open(address)?,
                    payload,
                    port: Port::default(),
                },
                At::Interface(..) | At::Socket(_) => {
                    return Err(io::ErrorKind::Unsupported.into());
                }
            },
        };
        let (socket, attempt): (Arc<dyn AsyncUdpSocket>, _) = match client {
            None => (socket, None),
            Some((first, attempt)) => (Arc::new(Ear { socket, first }), Some(attempt)),
        };
        // Fails below 1,200 bytes only.
        let _ = settings.max_udp_payload_size(payload);
        let runtime = Arc::new(PromptRuntime { attempt });
        let endpoint = Endpoint::new_with_abstract_socket(settings, server, socket, runtime)?;
        Ok((endpoint, port))
    }

    /// The addresses of this name.
    pub(crate) async fn lookup(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        match self {
            Self::System => lookup::lookup(host, port).await,
            #[cfg(feature = "testing")]
            Self::Net(net) => net.lookup(host, port),
        }
    }

    /// Ends when the system reports that datagrams from `local` do not reach this peer, and returns the reason. Asks
    /// the system after `pause`.
    pub(crate) async fn unreachable(
        &self,
        local: (SocketAddr, Option<&str>),
        peer: SocketAddr,
        pause: Duration,
    ) -> &'static str {
        match self {
            Self::System => udp::unreachable(local, peer, pause).await,
            #[cfg(feature = "testing")]
            Self::Net(_) => std::future::pending().await,
        }
    }

    /// The kernel's route to this peer. A loopback route counts as the whole path only if the server has answered a
    /// datagram of that size. Otherwise a forwarder may listen at the port, with a path of a smaller MTU behind it.
    ///
    /// # Errors
    /// When nobody listens at this port of this machine.
    pub(crate) async fn proved_route_to(&self, peer: SocketAddr) -> io::Result<Option<Route>> {
        let Some(route) = self.route_to(peer) else {
            return Ok(None);
        };
        let proved = match route.local {
            true => probe::takes(peer, route.payload, PROOF).await?,
            false => false,
        };
        Ok(Some(Route { proved, ..route }))
    }

    /// The kernel's route to this peer; `None` if it is unknown.
    pub(crate) fn route_to(&self, peer: SocketAddr) -> Option<Route> {
        match self {
            Self::System => Some(Route {
                payload: udp::route_payload(peer)?,
                local: peer.ip().to_canonical().is_loopback(),
                proved: false,
            }),
            #[cfg(feature = "testing")]
            Self::Net(_) => None,
        }
    }

    /// Largest UDP payload, in bytes, that a server announces, independent of its clients' routes.
    pub(crate) fn most_payload(&self) -> Option<u16> {
        match self {
            Self::System => Some(MOST_PAYLOAD),
            #[cfg(feature = "testing")]
            Self::Net(_) => None,
        }
    }
}

/// The time at which the first datagram arrived at an endpoint. It is the only measurement of the path before a
/// client is connected.
pub(crate) type FirstWord = Arc<OnceLock<Instant>>;

/// A socket that records when the first datagram arrives.
#[derive(Debug)]
struct Ear {
    socket: Arc<dyn AsyncUdpSocket>,
    first: FirstWord,
}

impl AsyncUdpSocket for Ear {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = ready!(self.socket.poll_recv(cx, bufs, meta));
        if let Ok(1..) = received {
            self.first.get_or_init(Instant::now);
        }
        Poll::Ready(received)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

/// The socket of an endpoint.
#[derive(Debug)]
pub(crate) enum At {
    /// Bind a socket to this address.
    Address(SocketAddr),
    /// The same, for packets over this interface alone.
    Interface(SocketAddr, Arc<str>),
    /// Use this bound socket.
    Socket(UdpSocket),
}

/// The first link to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Route {
    /// Largest UDP payload, in bytes, that the link carries and that is worth trying.
    pub(crate) payload: u16,
    /// The link is the loopback interface, which is the whole path unless a forwarder listens at the port.
    pub(crate) local: bool,
    /// A datagram of this size was answered, so connections may begin with this size.
    pub(crate) proved: bool,
}

/// How long a server on this machine may take to answer such a probe.
const PROOF: Duration = Duration::from_millis(25);

/// Every path carries a UDP payload of this size (RFC 9000, section 14).
const LEAST_PAYLOAD: u16 = 1200;
/// An Ethernet's UDP payload over IPv4.
pub(crate) const ETHERNET_PAYLOAD: u16 = 1472;

/// The MTU discovery for a path whose first link is `route`; `None`: the link is unknown.
fn mtu_discovery(route: Option<Route>) -> MtuDiscoveryConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    if let Some(Route { payload, local, .. }) = route {
        discovery.upper_bound(payload);
        if local || payload <= ETHERNET_PAYLOAD {
            // A bisection that would end within more than half of its range begins with the bound itself: one round
            // trip where the whole path is like its first link, as most are. On loopback, discovery runs only if
            // large datagrams did not pass, and ten probes would cost ten times as much. A peer there with small
            // buffers accepts less than the route carries, and finding that must be worth a probe, too.
            let range = payload.saturating_sub(LEAST_PAYLOAD);
            let modest = MODEST_PAYLOAD - LEAST_PAYLOAD;
            discovery.minimum_change((range / 2 + 1).min(modest));
        }
    }
    discovery
}

/// How often a peer acknowledges: every tenth packet, instead of every second, is less work for both ends. A
/// controller still gets at least ten samples for each window. An acknowledgement of fewer packets is delayed by 5 ms
/// at most, instead of 25.
fn ack_frequency() -> AckFrequencyConfig {
    let mut frequency = AckFrequencyConfig::default();
    frequency
        .ack_eliciting_threshold(VarInt::from_u32(10))
        .max_ack_delay(Some(Duration::from_millis(5)));
    frequency
}

/// Round-trip time assumed before the first measurement: a first packet that is lost is sent again after three
/// of them. RFC 9002 recommends 333 ms, for networks slower than those with 1 Mbit/s; Chromium uses 100 ms.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// The side that uses the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server {
        /// Whether the server also serves browsers.
        web: bool,
    },
}

/// The QUIC settings of one side, for a path that begins with `route`. A server starts small and grants more on
/// admission; both permit a few streams until the peer has used these.
pub(crate) fn transport(
    limits: &Limits,
    timeouts: &Timeouts,
    congestion: CongestionControl,
    route: Option<Route>,
    side: Side,
) -> Result<TransportConfig, InvalidSetting> {
    let mut transport = TransportConfig::default();
    let idle = IdleTimeout::try_from(timeouts.idle)
        .map_err(|_| InvalidSetting("idle time is too long"))?;
    if timeouts.keep_alive >= timeouts.idle {
        return Err(InvalidSetting(
            "keep-alive interval must be below the idle time",
        ));
    }
    if limits.frame < MIN_FRAME || u32::try_from(limits.frame).is_err() {
        return Err(InvalidSetting("frame limit must be 4096 to 4294967295"));
    }
    if limits.channels == 0 || limits.outbound_bytes == 0 || limits.outbound_messages == 0 {
        return Err(InvalidSetting(
            "channels and outbound queues must be at least 1",
        ));
    }
    let factory: Arc<dyn ControllerFactory + Send + Sync> = match congestion {
        CongestionControl::Auto => Arc::new(ModelConfig),
        CongestionControl::Cubic => Arc::new(CubicConfig::default()),
        CongestionControl::Bbr => Arc::new(BbrConfig::default()),
        CongestionControl::NewReno => Arc::new(NewRenoConfig::default()),
    };
    let (window, streams, one_way) = match side {
        Side::Server { web } => {
            let streams = PREAUTH_STREAMS.min(limits.channels.saturating_add(1));
            // Whether the client is a browser is known only later in the handshake.
            let one_way = if web { OWN_UNI } else { 0 };
            (u64::from(PREAUTH_BYTES), streams, one_way)
        }
        Side::Client => {
            let streams = FEW_STREAMS.min(limits.channels);
            (windows::first(limits, 1), streams, VOLATILE_STREAMS)
        }
    };
    // A probe of 65,487 bytes is parsed byte for byte by its receiver: 0.6 ms of each handshake. quinn's own controllers begin
    // with windows that one such packet would not fit.
    if let Some(Route {
        payload,
        proved: true,
        ..
    }) = route
        && congestion == CongestionControl::Auto
    {
        transport.initial_mtu(payload);
    }
    transport
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(timeouts.keep_alive))
        .max_concurrent_bidi_streams(streams.into())
        .max_concurrent_uni_streams(one_way.into())
        .datagram_receive_buffer_size(Some(DATAGRAMS_IN))
        .datagram_send_buffer_size(DATAGRAMS_OUT)
        .stream_receive_window(limits.stream_window.into())
        .receive_window(varint(window))
        .send_window(limits.send_window)
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(mtu_discovery(route)))
        .ack_frequency_config(Some(ack_frequency()))
        .congestion_controller_factory(factory);
    Ok(transport)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_settings_that_cannot_work() {
        let fails = |limits: Limits, timeouts: Timeouts| {
            transport(
                &limits,
                &timeouts,
                CongestionControl::Auto,
                None,
                Side::Server { web: false },
            )
            .is_err()
        };
        assert!(!fails(Limits::default(), Timeouts::default()));
        assert!(fails(
            Limits {
                frame: MIN_FRAME - 1,
                ..Limits::default()
            },
            Timeouts::default()
        ));
        assert!(fails(
            Limits {
                channels: 0,
                ..Limits::default()
            },
            Timeouts::default()
        ));
        let timeouts = Timeouts {
            keep_alive: Duration::from_secs(30),
            ..Timeouts::default()
        };
        assert!(fails(Limits::default(), timeouts));
    }
}
