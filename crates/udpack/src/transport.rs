//! What carries a session: connections and their streams, the endpoints that make and accept them, the UDP socket
//! below, windows, pacing and congestion control. The only place that knows QUIC.

pub(crate) mod carriers;
pub(crate) mod congestion;
pub(crate) mod connection;
pub(crate) mod dialer;
pub(crate) mod endpoint;
mod gather;
pub(crate) mod listener;
pub(crate) mod lookup;
#[cfg(feature = "testing")]
pub(crate) mod memory;
pub(crate) mod mux;
pub(crate) mod path_activity;
pub mod probe;
pub(crate) mod proxy;
pub(crate) mod qlog;
pub(crate) mod quic;
mod timer;
pub(crate) mod udp;
pub(crate) mod web;
pub(crate) mod websocket;
pub(crate) mod windows;

pub(crate) use connection::{
    Connection, ConnectionError, ConnectionStats, DatagramError, Endpoint, RecvStream, SendStream,
    StreamError, Written,
};

use std::time::Duration;

/// The time for some round trips, of which each takes so long. Bounded, because a peer can make a path look as long as it
/// likes.
pub(crate) fn trips(rtt: Duration) -> Duration {
    rtt.saturating_mul(4).min(Duration::from_secs(60))
}

/// The time that a peer on this path has for what it must do within `limit`: a message, what is sent again because it was
/// lost, and its answer take some round trips, however quick the peer is.
pub(crate) fn on_path(limit: Duration, conn: &Connection) -> Duration {
    limit.saturating_add(trips(conn.rtt()))
}
