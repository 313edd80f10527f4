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

/// Where the UDP sockets of a server or client come from.
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
    /// A QUIC endpoint on this socket, or one at this address, with kernel buffers of this size where there is a kernel.
    /// The transport parameters ask peers to send no larger UDP payloads than `payload` bytes, fewer where the buffers are small; at least
    /// 1,200 are taken. A `client` learns when the first datagram arrives, and why it does not trust the server.
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
                At::Address(address) => udp::bind(address, buffer, payload)?,
                At::Socket(socket) => udp::serve(socket, buffer, payload)?,
            },
            #[cfg(feature = "testing")]
            Self::Net(host) => match at {
                At::Address(address) => Bound {
                    socket: host.open(address)?,
                    payload,
                    port: Port::default(),
                },
                At::Socket(_) => return Err(io::ErrorKind::Unsupported.into()),
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

    /// Ends when the system reports that datagrams from `local` do not reach this peer, and says why. Asks it after
    /// `pause`.
    pub(crate) async fn unreachable(
        &self,
        local: SocketAddr,
        peer: SocketAddr,
        pause: Duration,
    ) -> &'static str {
        match self {
            Self::System => udp::unreachable(local, peer, pause).await,
            #[cfg(feature = "testing")]
            Self::Net(_) => std::future::pending().await,
        }
    }

    /// What the kernel knows of the way to this peer. Over loopback a server has shown that it is the whole path, by an answer to a
    /// datagram of that size, or it counts as any other way: a forwarder may listen there, behind which less gets through.
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

    /// What the kernel knows of the way to this peer; `None` where nobody knows.
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

    /// Largest UDP payload, in bytes, that a server says it takes, whatever its clients' routes.
    pub(crate) fn most_payload(&self) -> Option<u16> {
        match self {
            Self::System => Some(MOST_PAYLOAD),
            #[cfg(feature = "testing")]
            Self::Net(_) => None,
        }
    }
}

/// When the first datagram came to an endpoint: the only thing that a client can measure of its path before it is connected.
pub(crate) type FirstWord = Arc<OnceLock<Instant>>;

/// A socket that tells of the first datagram that comes.
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

/// Where an endpoint gets its socket from.
#[derive(Debug)]
pub(crate) enum At {
    /// It binds one.
    Address(SocketAddr),
    /// It is given one that is bound.
    Socket(UdpSocket),
}

/// The first link to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Route {
    /// Largest UDP payload, in bytes, that it takes and that is worth trying.
    pub(crate) payload: u16,
    /// It is the loopback interface: the whole path, unless a forwarder listens there.
    pub(crate) local: bool,
    /// A datagram of this size was answered: connections may begin with it.
    pub(crate) proved: bool,
}

/// How long a server on this machine may take to show that the way to it is whole.
const PROOF: Duration = Duration::from_millis(25);

/// Every path takes such a UDP payload (RFC 9000, section 14).
const LEAST_PAYLOAD: u16 = 1200;
/// An Ethernet's UDP payload over IPv4.
pub(crate) const ETHERNET_PAYLOAD: u16 = 1472;

/// How to find out what a path takes whose first link is this; `None` is unknown.
fn mtu_discovery(route: Option<Route>) -> MtuDiscoveryConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    if let Some(Route { payload, local, .. }) = route {
        discovery.upper_bound(payload);
        if local || payload <= ETHERNET_PAYLOAD {
            // A bisection that would end within more than half of its range begins with the bound itself: one
            // round trip where the whole path is like its first link, as most are. On loopback, where discovery is
            // for those who found that nothing large gets through, ten probes would cost ten times as much; there
            // a peer whose buffers are small takes less than the route, and that must be worth a probe, too.
            let range = payload.saturating_sub(LEAST_PAYLOAD);
            let modest = MODEST_PAYLOAD - LEAST_PAYLOAD;
            discovery.minimum_change((range / 2 + 1).min(modest));
        }
    }
    discovery
}

/// How often a peer acknowledges: every tenth packet, instead of every second, is less work for both ends. A
/// controller still gets ten samples or more a window; and what waits for fewer packets waits for 5 ms at most,
/// instead of 25.
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

/// Whose settings they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server {
        /// It serves browsers, too.
        web: bool,
    },
}

/// The QUIC settings of one side, for a path that begins with `route`. A server
/// starts small and grants more on admission; both permit a few streams until these are used.
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
            // Whether the client is a browser shows only later in the handshake.
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
