//! The UDP socket and the QUIC settings that server and client share.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn::{
    Endpoint, EndpointConfig, IdleTimeout, ServerConfig, TokioRuntime, TransportConfig, VarInt,
};
use socket2::{Domain, Protocol, Socket as RawSocket, Type};

use crate::config::{
    CongestionControl, DATAGRAMS_IN, DATAGRAMS_OUT, FEW_STREAMS, Limits, PREAUTH_BYTES,
    PREAUTH_STREAMS, Timeouts, VOLATILE_STREAMS,
};
use crate::congestion::ModelConfig;

/// Binds a UDP socket with large kernel buffers; says in the log what to do when the kernel gives less.
pub(crate) fn bind(address: SocketAddr, buffer: usize) -> io::Result<UdpSocket> {
    let socket = RawSocket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    grow_buffers(&socket, buffer);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn grow_buffers(socket: &RawSocket, wanted: usize) {
    use rustix::net::sockopt;
    // With the right to do so, past the system's limit; else as far as it goes.
    if sockopt::set_socket_recv_buffer_size_force(socket, wanted).is_err() {
        let _ = socket.set_recv_buffer_size(wanted);
    }
    if sockopt::set_socket_send_buffer_size_force(socket, wanted).is_err() {
        let _ = socket.set_send_buffer_size(wanted);
    }
    // Linux reports twice what it grants.
    let granted = |size: io::Result<usize>| size.map_or(0, |size| size / 2);
    let receive = granted(socket.recv_buffer_size());
    let send = granted(socket.send_buffer_size());
    if receive < wanted || send < wanted {
        tracing::warn!(
            wanted,
            receive,
            send,
            "the kernel gives smaller UDP buffers than asked for, which costs speed; \
             to allow them: sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted}"
        );
    }
}

/// Where the UDP sockets of a server or client come from.
#[derive(Debug, Clone, Default)]
pub(crate) enum Via {
    /// The operating system.
    #[default]
    System,
    /// A network in memory.
    #[cfg(feature = "testing")]
    Net(crate::testing::Host),
}

impl Via {
    /// A QUIC endpoint on a socket at this address, with kernel buffers of this size where there is a kernel.
    pub(crate) fn open(
        &self,
        address: SocketAddr,
        buffer: usize,
        settings: EndpointConfig,
        server: Option<ServerConfig>,
    ) -> io::Result<Endpoint> {
        let runtime = Arc::new(TokioRuntime);
        match self {
            Self::System => Endpoint::new(settings, server, bind(address, buffer)?, runtime),
            #[cfg(feature = "testing")]
            Self::Net(host) => {
                Endpoint::new_with_abstract_socket(settings, server, host.open(address)?, runtime)
            }
        }
    }
}

/// The QUIC settings of one side. A server starts small and grants more on admission; both permit a few streams
/// until these are used.
pub(crate) fn transport(
    limits: &Limits,
    timeouts: &Timeouts,
    congestion: CongestionControl,
    server: bool,
) -> Result<TransportConfig, InvalidSetting> {
    let mut transport = TransportConfig::default();
    let idle = IdleTimeout::try_from(timeouts.idle)
        .map_err(|_| InvalidSetting("idle time is too long"))?;
    if timeouts.keep_alive >= timeouts.idle {
        return Err(InvalidSetting(
            "keep-alive interval must be below the idle time",
        ));
    }
    if limits.frame == 0 || u32::try_from(limits.frame).is_err() {
        return Err(InvalidSetting("frame limit must be 1 to 4294967295"));
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
    let (window, streams, volatile) = if server {
        let streams = PREAUTH_STREAMS.min(limits.channels.saturating_add(1));
        (PREAUTH_BYTES, streams, 0)
    } else {
        let streams = FEW_STREAMS.min(limits.channels);
        (limits.connection_window, streams, VOLATILE_STREAMS)
    };
    transport
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(timeouts.keep_alive))
        .max_concurrent_bidi_streams(streams.into())
        .max_concurrent_uni_streams(volatile.into())
        .datagram_receive_buffer_size(Some(DATAGRAMS_IN))
        .datagram_send_buffer_size(DATAGRAMS_OUT)
        .stream_receive_window(limits.stream_window.into())
        .receive_window(window.into())
        .send_window(limits.send_window)
        .congestion_controller_factory(factory);
    Ok(transport)
}

/// A number as QUIC takes it; larger ones become the largest.
pub(crate) fn varint(value: u64) -> VarInt {
    VarInt::from_u64(value).unwrap_or(VarInt::MAX)
}

/// A limit or time that cannot be used; the text says which and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid setting: {0}")]
pub struct InvalidSetting(pub(crate) &'static str);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_settings_that_cannot_work() {
        let fails = |limits: Limits, timeouts: Timeouts| {
            transport(&limits, &timeouts, CongestionControl::Auto, true).is_err()
        };
        assert!(!fails(Limits::default(), Timeouts::default()));
        assert!(fails(
            Limits {
                frame: 0,
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
            keep_alive: std::time::Duration::from_secs(30),
            ..Timeouts::default()
        };
        assert!(fails(Limits::default(), timeouts));
    }

    #[test]
    fn binds_with_the_buffers_it_can_get() {
        let socket = bind("127.0.0.1:0".parse().expect("an address"), 1 << 20).expect("loopback");
        let size = RawSocket::from(socket).recv_buffer_size().expect("a size");
        assert!(size >= 128 << 10, "{size}");
    }
}
