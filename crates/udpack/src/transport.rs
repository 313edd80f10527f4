//! What carries a session: connections and their streams, the endpoints that make and accept them, the UDP socket
//! below, windows, pacing and congestion control. The only place that knows QUIC.

pub(crate) mod congestion;
pub(crate) mod endpoint;
mod gather;
pub(crate) mod heard;
pub(crate) mod qlog;
mod timer;
pub(crate) mod udp;
pub(crate) mod windows;
