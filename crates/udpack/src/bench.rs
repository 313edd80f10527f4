//! This library's QUIC settings for benchmarks that run raw quinn with them; not public API.

use std::io;
use std::net::SocketAddr;

use quinn::{Endpoint, EndpointConfig, ServerConfig, TransportConfig};

use crate::transport::endpoint::{self, At, Side, Via};
use crate::wire::config::InvalidSetting;
use crate::wire::config::{CongestionControl, Limits, Timeouts, VOLATILE_STREAMS};

/// An endpoint on a UDP socket as servers and clients of this library open it.
///
/// # Errors
/// When the address cannot be bound.
pub fn endpoint(address: SocketAddr, server: Option<ServerConfig>) -> io::Result<Endpoint> {
    let buffer = Limits::default().socket_buffer;
    let payload = Via::System.most_payload();
    let (endpoint, _) = Via::System.open(
        At::Address(address),
        buffer,
        payload,
        EndpointConfig::default(),
        server,
        None,
    )?;
    Ok(endpoint)
}

/// The settings of an admitted connection. They are the same on both sides except for the route to the peer, if that
/// is known.
///
/// # Errors
/// None, with the defaults.
pub fn transport(peer: Option<SocketAddr>) -> Result<TransportConfig, InvalidSetting> {
    let (limits, timeouts) = (Limits::default(), Timeouts::default());
    let congestion = CongestionControl::default();
    let route = peer.and_then(|peer| Via::System.route_to(peer));
    let mut transport = endpoint::transport(&limits, &timeouts, congestion, route, Side::Client)?;
    transport
        .receive_window(limits.connection_window.into())
        .max_concurrent_bidi_streams(limits.channels.into())
        .max_concurrent_uni_streams(VOLATILE_STREAMS.into());
    Ok(transport)
}
