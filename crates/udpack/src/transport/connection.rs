//! What connections and streams of every transport share: errors, numbers.

use std::time::Duration;

pub(crate) use crate::transport::quic::{Connection, Endpoint, RecvStream, SendStream};
use crate::wire::code::{CloseCode, CloseReason, Side};

/// Bytes of text that travel with a close, at most.
pub(super) const CLOSE_TEXT: usize = 256;

/// Cumulative numbers of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionStats {
    /// UDP payload bytes sent and received.
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    /// UDP datagrams sent and received.
    pub(crate) datagrams_sent: u64,
    pub(crate) datagrams_received: u64,
    /// Frames of streams sent.
    pub(crate) stream_frames_sent: u64,
    /// Packets sent, and those of them declared lost.
    pub(crate) packets_sent: u64,
    pub(crate) packets_lost: u64,
    /// Smoothed round-trip time.
    pub(crate) rtt: Duration,
    /// Congestion window, in bytes.
    pub(crate) congestion_window: u64,
    /// Largest UDP payload that the path is known to take, in bytes.
    pub(crate) mtu: u16,
}

/// Why a connection is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ConnectionError {
    /// This side has closed it.
    Local,
    /// The peer has closed it, with a code and text of the protocol.
    Peer(CloseReason),
    /// Nothing was heard from the peer for the idle time, or nothing of a connection that was to begin.
    TimedOut,
    /// The transport has ended it, for this reason.
    Transport(CloseReason),
}

impl ConnectionError {
    /// The same in the protocol's words.
    pub(crate) fn reason(&self) -> CloseReason {
        let transport = |code, text| CloseReason::new(code, text, Side::Transport);
        match self {
            Self::Local => CloseReason::new(
                CloseCode::CONNECTION_LOST,
                "the endpoint was closed",
                Side::Local,
            ),
            Self::TimedOut => transport(
                CloseCode::TIMED_OUT,
                "nothing was heard from the peer in time",
            ),
            Self::Peer(reason) | Self::Transport(reason) => reason.clone(),
        }
    }
}

/// Why a datagram was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DatagramError {
    /// The path does not take one of this size, or the peer takes none at all.
    TooLarge,
    /// The connection is over.
    Lost,
}

/// Why a stream takes or gives nothing more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StreamError {
    /// The peer reads no more (sending) or sends no more (receiving), with a code of the protocol.
    #[error("the peer has ended the stream: {0}")]
    Peer(CloseCode),
    /// The connection is over.
    #[error("the connection is over: {}", .0.reason())]
    Lost(ConnectionError),
    /// This side has ended the stream.
    #[error("the stream has ended")]
    Ended,
}

/// What one write has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) bytes: usize,
    /// Whole buffers among them.
    pub(crate) chunks: usize,
}
