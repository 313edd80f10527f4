//! A connection to a peer and its streams, whatever carries them. Today that is QUIC.
//!
//! The rest of the crate knows only these types: codes are those of the protocol, errors say what became of the
//! connection, and nothing of the transport's own interface shows.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;

use crate::base::text::{cut, printable_within};
use crate::transport::udp::{self, MOST_PAYLOAD};
use crate::wire::code::{CloseCode, CloseReason, Side};

/// Bytes of text that travel with a close, at most.
const CLOSE_TEXT: usize = 256;

/// A connection to a peer. Cheap to clone; the connection lives as long as its last handle or stream.
#[derive(Debug, Clone)]
pub(crate) struct Connection(quinn::Connection);

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

impl Connection {
    pub(crate) fn quic(conn: quinn::Connection) -> Self {
        Self(conn)
    }

    /// Opens a stream both ways, as soon as the peer permits one more.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let (send, recv) = self.0.open_bi().await?;
        Ok((SendStream(send), RecvStream(recv)))
    }

    /// The next stream both ways that the peer opens.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let (send, recv) = self.0.accept_bi().await?;
        Ok((SendStream(send), RecvStream(recv)))
    }

    /// Opens a stream to the peer alone, as soon as the peer permits one more.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        Ok(SendStream(self.0.open_uni().await?))
    }

    /// The next stream from the peer alone.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        Ok(RecvStream(self.0.accept_uni().await?))
    }

    /// How many streams both ways the peer may have open at once.
    pub(crate) fn permit_bi(&self, streams: u32) {
        self.0.set_max_concurrent_bi_streams(streams.into());
    }

    /// How many streams to this side alone the peer may have open at once.
    pub(crate) fn permit_uni(&self, streams: u32) {
        self.0.set_max_concurrent_uni_streams(streams.into());
    }

    /// How many bytes the peer may send ahead of what is read, over all streams.
    pub(crate) fn set_receive_window(&self, bytes: u64) {
        self.0.set_receive_window(varint(bytes));
    }

    /// Largest datagram that can be sent now, in bytes; `None` where none can.
    pub(crate) fn max_datagram_size(&self) -> Option<usize> {
        self.0.max_datagram_size()
    }

    /// Sends a datagram, as soon as there is room for it. It may be lost.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future has sent nothing.
    pub(crate) async fn send_datagram(&self, datagram: Bytes) -> Result<(), DatagramError> {
        use quinn::SendDatagramError as E;
        let sent = self.0.send_datagram_wait(datagram).await;
        sent.map_err(|error| match error {
            E::ConnectionLost(_) => DatagramError::Lost,
            E::UnsupportedByPeer | E::Disabled | E::TooLarge => DatagramError::TooLarge,
        })
    }

    /// The next datagram of the peer. It is a slice of a buffer in which others came.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        Ok(self.0.read_datagram().await?)
    }

    /// Ends the connection at once; streams that are under way are lost. Of `text` the peer gets the first 256 bytes.
    pub(crate) fn close(&self, code: CloseCode, text: &str) {
        self.0
            .close(varint(code.value()), cut(text, CLOSE_TEXT).as_bytes());
    }

    /// [`close`](Self::close) for this reason.
    pub(crate) fn close_because(&self, reason: &CloseReason) {
        self.close(reason.code, &reason.text);
    }

    /// Waits until the connection is over.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn closed(&self) -> ConnectionError {
        self.0.closed().await.into()
    }

    /// Why the connection is over, if it is.
    pub(crate) fn error(&self) -> Option<ConnectionError> {
        self.0.close_reason().map(ConnectionError::from)
    }

    /// Whether the connection is over.
    pub(crate) fn is_over(&self) -> bool {
        self.0.close_reason().is_some()
    }

    /// Where the peer is now.
    pub(crate) fn remote_address(&self) -> SocketAddr {
        self.0.remote_address()
    }

    /// Smoothed round-trip time.
    pub(crate) fn rtt(&self) -> Duration {
        self.0.rtt()
    }

    /// The numbers of this moment. Takes the lock of the connection.
    pub(crate) fn stats(&self) -> ConnectionStats {
        let stats = self.0.stats();
        ConnectionStats {
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
            datagrams_sent: stats.udp_tx.datagrams,
            datagrams_received: stats.udp_rx.datagrams,
            stream_frames_sent: stats.frame_tx.stream,
            packets_sent: stats.path.sent_packets,
            packets_lost: stats.path.lost_packets,
            rtt: stats.path.rtt,
            congestion_window: stats.path.cwnd,
            mtu: stats.path.current_mtu,
        }
    }
}

/// A port of this machine with the connections over it. Cheap to clone; the port is closed with the last handle and
/// connection.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint(quinn::Endpoint);

impl Endpoint {
    pub(crate) fn quic(endpoint: quinn::Endpoint) -> Self {
        Self(endpoint)
    }

    pub(crate) fn as_quic(&self) -> &quinn::Endpoint {
        &self.0
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Ends all connections, and takes no more.
    pub(crate) fn close(&self, code: CloseCode, text: &str) {
        self.0
            .close(varint(code.value()), cut(text, CLOSE_TEXT).as_bytes());
    }

    /// Waits until no connection is left.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn wait_idle(&self) {
        self.0.wait_idle().await;
    }

    /// Goes on from another local address, with kernel buffers of so many bytes.
    pub(crate) fn rebind(&self, local: SocketAddr, buffer: usize) -> io::Result<()> {
        let bound = udp::bind(local, buffer, MOST_PAYLOAD)?;
        self.0.rebind_abstract(bound.socket)
    }
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

impl From<quinn::ConnectionError> for ConnectionError {
    fn from(error: quinn::ConnectionError) -> Self {
        use quinn::ConnectionError as E;
        let transport =
            |code, text: &str| Self::Transport(CloseReason::new(code, text, Side::Transport));
        match error {
            E::LocallyClosed => Self::Local,
            E::TimedOut => Self::TimedOut,
            E::ApplicationClosed(close) => Self::Peer(CloseReason::peer(
                CloseCode::new(close.error_code.into_inner()),
                &String::from_utf8_lossy(&close.reason),
            )),
            E::ConnectionClosed(close)
                if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED =>
            {
                Self::Transport(CloseReason::new(
                    CloseCode::SERVER_BUSY,
                    "the server accepts no connection right now",
                    Side::Peer,
                ))
            }
            E::VersionMismatch => Self::Transport(CloseReason::new(
                CloseCode::VERSION,
                "the peer speaks no common QUIC version",
                Side::Peer,
            )),
            E::Reset => transport(
                CloseCode::PEER_RESTARTED,
                "the peer no longer knows this connection",
            ),
            E::ConnectionClosed(close) => transport(
                CloseCode::TRANSPORT_ERROR,
                &printable_within(&close.to_string(), 256),
            ),
            E::TransportError(error) => transport(
                CloseCode::TRANSPORT_ERROR,
                &printable_within(&error.to_string(), 256),
            ),
            E::CidsExhausted => {
                transport(CloseCode::TRANSPORT_ERROR, "connection ids are exhausted")
            }
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

impl From<quinn::WriteError> for StreamError {
    fn from(error: quinn::WriteError) -> Self {
        use quinn::WriteError as E;
        match error {
            E::Stopped(code) => Self::Peer(CloseCode::new(code.into_inner())),
            E::ConnectionLost(error) => Self::Lost(error.into()),
            E::ClosedStream | E::ZeroRttRejected => Self::Ended,
        }
    }
}

impl From<quinn::ReadError> for StreamError {
    fn from(error: quinn::ReadError) -> Self {
        use quinn::ReadError as E;
        match error {
            E::Reset(code) => Self::Peer(CloseCode::new(code.into_inner())),
            E::ConnectionLost(error) => Self::Lost(error.into()),
            E::ClosedStream | E::IllegalOrderedRead | E::ZeroRttRejected => Self::Ended,
        }
    }
}

/// The sending side of a stream. Dropping it ends the stream as [`finish`](Self::finish) does.
#[derive(Debug)]
pub(crate) struct SendStream(quinn::SendStream);

/// What one write has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) bytes: usize,
    /// Whole buffers among them.
    pub(crate) chunks: usize,
}

impl SendStream {
    /// Which of the connection's streams goes first: the one with the larger number.
    pub(crate) fn set_priority(&self, priority: i32) {
        // Fails only on a stream that has ended, as its next writer finds.
        let _ = self.0.set_priority(priority);
    }

    /// Writes as much as the peer and this side's windows take now. What was taken is cut from the front of `chunks`.
    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Written, StreamError>> {
        // `write_chunks` is cancel safe: a future that is not ready has written nothing.
        let written = pin!(self.0.write_chunks(chunks)).poll(cx);
        written.map(|written| {
            let quinn::Written { bytes, chunks } = written?;
            Ok(Written { bytes, chunks })
        })
    }

    /// Writes all of `chunks`.
    ///
    /// # Cancel safety
    /// Not cancel safe: a dropped future may have written a part.
    pub(crate) async fn write_all(&mut self, chunks: &mut [Bytes]) -> Result<(), StreamError> {
        Ok(self.0.write_all_chunks(chunks).await?)
    }

    /// Writes this.
    ///
    /// # Cancel safety
    /// As [`write_all`](Self::write_all).
    pub(crate) async fn write(&mut self, chunk: Bytes) -> Result<(), StreamError> {
        Ok(self.0.write_chunk(chunk).await?)
    }

    /// Ends the stream behind what was written. Does nothing to one that has ended or that the peer has stopped.
    pub(crate) fn finish(&mut self) {
        let _ = self.0.finish();
    }

    /// Ends the stream at once; what the peer has not got is lost. Does nothing to one that has ended.
    pub(crate) fn reset(&mut self, code: CloseCode) {
        let _ = self.0.reset(varint(code.value()));
    }

    /// Waits until the peer has everything (`None`) or reads no more (the code).
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<CloseCode>, StreamError>> + Send + Sync + 'static {
        let stopped = self.0.stopped();
        async move {
            match stopped.await {
                Ok(code) => Ok(code.map(|code| CloseCode::new(code.into_inner()))),
                Err(quinn::StoppedError::ConnectionLost(error)) => {
                    Err(StreamError::Lost(error.into()))
                }
                Err(quinn::StoppedError::ZeroRttRejected) => Err(StreamError::Ended),
            }
        }
    }
}

/// The receiving side of a stream. Dropping it before its end tells the peer that nothing more is read.
#[derive(Debug)]
pub(crate) struct RecvStream(quinn::RecvStream);

impl RecvStream {
    /// Fills `chunks` from the front with what has arrived, in order, and says how many; `None` at the end.
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Option<usize>, StreamError>> {
        let read = pin!(self.0.read_chunks(chunks)).poll(cx);
        read.map_err(StreamError::from)
    }

    /// The next bytes, at most so many; `None` at the end.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn read(&mut self, most: usize) -> Result<Option<Bytes>, StreamError> {
        let chunk = self.0.read_chunk(most, true).await?;
        Ok(chunk.map(|chunk| chunk.bytes))
    }

    /// Reads no more, and tells the peer so. Does nothing to a stream that has ended.
    pub(crate) fn stop(&mut self, code: CloseCode) {
        let _ = self.0.stop(varint(code.value()));
    }
}

/// A number as QUIC takes it; larger ones become the largest.
pub(crate) fn varint(value: u64) -> quinn::VarInt {
    quinn::VarInt::from_u64(value).unwrap_or(quinn::VarInt::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_connection_reads_as_busy_and_may_be_retried() {
        let close = quinn::ConnectionClose {
            error_code: quinn::TransportErrorCode::CONNECTION_REFUSED,
            frame_type: None,
            reason: Bytes::new(),
        };
        let error = ConnectionError::from(quinn::ConnectionError::ConnectionClosed(close));
        let reason = error.reason();
        assert_eq!((reason.code, reason.retry), (CloseCode::SERVER_BUSY, true));
    }

    #[test]
    fn a_peer_that_lost_the_connection_has_restarted_and_one_of_another_version_has_not() {
        let of = |error| ConnectionError::from(error).reason();
        let reset = of(quinn::ConnectionError::Reset);
        let expected = (CloseCode::PEER_RESTARTED, Side::Transport, true);
        assert_eq!((reset.code, reset.by, reset.retry), expected);
        let version = of(quinn::ConnectionError::VersionMismatch);
        let expected = (CloseCode::VERSION, Side::Peer, false);
        assert_eq!((version.code, version.by, version.retry), expected);
    }
}
