//! Transports of a session: connections and their streams, the endpoints that make and accept them, the UDP socket
//! below, windows, pacing and congestion control. The only code that uses QUIC.

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

/// The time that is granted for round trips of this length. Bounded, because a peer can make its path look as long as
/// it wants.
pub(crate) fn trips(rtt: Duration) -> Duration {
    rtt.saturating_mul(4).min(Duration::from_secs(60))
}

/// The time-out for a peer on this path: `limit` plus some round trips. A message, its retransmissions and its answer
/// take some round trips, even if the peer is fast.
pub(crate) fn on_path(limit: Duration, conn: &Connection) -> Duration {
    limit.saturating_add(trips(conn.rtt()))
}
