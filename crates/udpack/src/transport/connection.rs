//! A connection to a peer and its streams, over any transport: QUIC itself, WebTransport over it, or TCP.
//!
//! The rest of the crate uses only these types. Codes are those of the protocol, errors say how the connection ended,
//! and no type of a transport's own interface is visible.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::Either;

use crate::base::text::cut;
use crate::transport::{mux, quic, web};
use crate::trust::origin::Transport;
use crate::wire::code::{CloseCode, CloseReason, Side};

/// The most bytes of text in a close.
pub(super) const CLOSE_TEXT: usize = 256;

/// A connection to a peer. Cheap to clone; the connection lives as long as its last handle or stream.
#[derive(Debug, Clone)]
pub(crate) enum Connection {
    Quic(quic::Connection),
    Mux(mux::Connection),
}

impl Connection {
    pub(crate) fn quic(conn: quinn::Connection) -> Self {
        Self::Quic(quic::Connection::quic(conn))
    }

    pub(crate) fn web(conn: quinn::Connection, session: Arc<web::Session>) -> Self {
        Self::Quic(quic::Connection::web(conn, session))
    }

    /// The transport below the protocol.
    pub(crate) fn transport(&self) -> Transport {
        match self {
            Self::Quic(conn) => conn.transport(),
            Self::Mux(conn) => conn.transport(),
        }
    }

    /// Whether the peer waits when it may open no further stream. A browser fails at once.
    pub(crate) fn waits_for_streams(&self) -> bool {
        match self {
            Self::Quic(conn) => conn.waits_for_streams(),
            Self::Mux(_) => true,
        }
    }

    /// Opens a bidirectional stream, as soon as the peer permits one more.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        match self {
            Self::Quic(conn) => both(conn.open_bi().await?, SendStream::Quic, RecvStream::Quic),
            Self::Mux(conn) => both(conn.open_bi().await?, SendStream::Mux, RecvStream::Mux),
        }
    }

    /// The next bidirectional stream that the peer opens.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        match self {
            Self::Quic(conn) => both(conn.accept_bi().await?, SendStream::Quic, RecvStream::Quic),
            Self::Mux(conn) => both(conn.accept_bi().await?, SendStream::Mux, RecvStream::Mux),
        }
    }

    /// Opens a unidirectional stream, as soon as the peer permits one more.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        match self {
            Self::Quic(conn) => conn.open_uni().await.map(SendStream::Quic),
            Self::Mux(conn) => conn.open_uni().await.map(SendStream::Mux),
        }
    }

    /// The next unidirectional stream of the peer.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        match self {
            Self::Quic(conn) => conn.accept_uni().await.map(RecvStream::Quic),
            Self::Mux(conn) => conn.accept_uni().await.map(RecvStream::Mux),
        }
    }

    /// Refuses the unidirectional streams of a peer that is not admitted yet, until the connection has ended. A
    /// server that serves browsers must permit some from the first packet on, before it knows the kind of client.
    /// Those of a browser's session wait instead; over TCP none is permitted.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn refuse_early(&self) {
        match self {
            Self::Quic(conn) => conn.refuse_early().await,
            Self::Mux(_) => {}
        }
    }

    /// Sets how many bidirectional streams the peer may have open at once.
    pub(crate) fn permit_bi(&self, streams: u32) {
        match self {
            Self::Quic(conn) => conn.permit_bi(streams),
            Self::Mux(conn) => conn.permit(false, streams),
        }
    }

    /// Sets how many unidirectional streams the peer may have open at once.
    pub(crate) fn permit_uni(&self, streams: u32) {
        match self {
            Self::Quic(conn) => conn.permit_uni(streams),
            Self::Mux(conn) => conn.permit(true, streams),
        }
    }

    /// Sets how many unread bytes the peer may send, over all streams.
    pub(crate) fn set_receive_window(&self, bytes: u64) {
        match self {
            Self::Quic(conn) => conn.set_receive_window(bytes),
            Self::Mux(conn) => conn.set_receive_window(bytes),
        }
    }

    /// Largest datagram that can be sent now, in bytes; `None` if the peer accepts none.
    pub(crate) fn max_datagram_size(&self) -> Option<usize> {
        match self {
            Self::Quic(conn) => conn.max_datagram_size(),
            Self::Mux(conn) => conn.max_datagram_size(),
        }
    }

    /// Sends a datagram, as soon as there is room for it. It may be lost.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future has sent nothing.
    pub(crate) async fn send_datagram(&self, datagram: Bytes) -> Result<(), DatagramError> {
        match self {
            Self::Quic(conn) => conn.send_datagram(datagram).await,
            Self::Mux(conn) => conn.send_datagram(datagram).await,
        }
    }

    /// The next datagram of the peer, as a slice of a buffer with other datagrams. A datagram of an unknown session
    /// is returned empty: it carries no message, but counts as received.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        match self {
            Self::Quic(conn) => conn.read_datagram().await,
            Self::Mux(conn) => conn.read_datagram().await,
        }
    }

    /// Closes the connection at once; unsent bytes of its streams are lost. The peer gets the first 256 bytes of
    /// `text`. A browser first receives the close of its session, for which it has four round trips, at most 2 s.
    pub(crate) fn close(&self, code: CloseCode, text: &str) {
        match self {
            Self::Quic(conn) => conn.close(code, text),
            Self::Mux(conn) => conn.close(code, cut(text, CLOSE_TEXT)),
        }
    }

    /// [`close`](Self::close) for this reason.
    pub(crate) fn close_because(&self, reason: &CloseReason) {
        self.close(reason.code, &reason.text);
    }

    /// Waits until the connection has ended, and its close has been sent.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn closed(&self) -> ConnectionError {
        match self {
            Self::Quic(conn) => conn.closed().await,
            Self::Mux(conn) => conn.closed().await,
        }
    }

    /// Why the connection has ended, if it has.
    pub(crate) fn error(&self) -> Option<ConnectionError> {
        match self {
            Self::Quic(conn) => conn.error(),
            Self::Mux(conn) => conn.error(),
        }
    }

    /// Whether the connection has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.error().is_some()
    }

    /// The current address of the peer.
    pub(crate) fn remote_address(&self) -> SocketAddr {
        match self {
            Self::Quic(conn) => conn.remote_address(),
            Self::Mux(conn) => conn.remote_address(),
        }
    }

    /// The certificate that a server presented over QUIC, in DER.
    pub(crate) fn certificate(&self) -> Option<Vec<u8>> {
        match self {
            Self::Quic(conn) => conn.certificate(),
            Self::Mux(_) => None,
        }
    }

    /// Smoothed round-trip time.
    pub(crate) fn rtt(&self) -> Duration {
        match self {
            Self::Quic(conn) => conn.rtt(),
            Self::Mux(conn) => conn.rtt(),
        }
    }

    /// The current statistics. Takes the lock of the connection.
    pub(crate) fn stats(&self) -> ConnectionStats {
        match self {
            Self::Quic(conn) => conn.stats(),
            Self::Mux(conn) => conn.stats(),
        }
    }
}

fn both<S, R, E>(
    (send, recv): (S, R),
    as_send: impl Fn(S) -> SendStream,
    as_recv: impl Fn(R) -> RecvStream,
) -> Result<(SendStream, RecvStream), E> {
    Ok((as_send(send), as_recv(recv)))
}

/// A local port with its connections. Cheap to clone; the port is closed with the last handle and connection.
#[derive(Debug, Clone)]
pub(crate) enum Endpoint {
    Quic(quic::Endpoint),
    /// The one connection over a TCP port.
    Mux(mux::Connection),
}

impl Endpoint {
    #[cfg(feature = "testing")]
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Quic(endpoint) => endpoint.local_addr(),
            Self::Mux(conn) => conn
                .local_addr()
                .ok_or_else(|| io::ErrorKind::Unsupported.into()),
        }
    }

    /// Waits until no connection is left.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn wait_idle(&self) {
        match self {
            Self::Quic(endpoint) => endpoint.wait_idle().await,
            Self::Mux(conn) => drop(conn.closed().await),
        }
    }

    /// Moves to another local address, with kernel buffers of `buffer` bytes. A TCP connection keeps its address.
    pub(crate) fn rebind(&self, local: SocketAddr, buffer: usize) -> io::Result<()> {
        match self {
            Self::Quic(endpoint) => endpoint.rebind(local, buffer),
            Self::Mux(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// The sending side of a stream. Dropping it ends the stream as [`finish`](Self::finish) does.
#[derive(Debug)]
pub(crate) enum SendStream {
    Quic(quic::SendStream),
    Mux(mux::SendStream),
}

impl SendStream {
    /// Sets the priority: of the connection's streams, those with larger numbers are sent first.
    pub(crate) fn set_priority(&self, priority: i32) {
        match self {
            Self::Quic(stream) => stream.set_priority(priority),
            Self::Mux(stream) => stream.set_priority(priority),
        }
    }

    /// Writes as much as the peer's and this side's windows permit now, and removes it from the front of `chunks`.
    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Written, StreamError>> {
        match self {
            Self::Quic(stream) => stream.poll_write(cx, chunks),
            Self::Mux(stream) => stream.poll_write(cx, chunks),
        }
    }

    /// Writes all of `chunks`.
    ///
    /// # Cancel safety
    /// Not cancel safe: a dropped future may have written a part.
    pub(crate) async fn write_all(&mut self, chunks: &mut [Bytes]) -> Result<(), StreamError> {
        match self {
            Self::Quic(stream) => stream.write_all(chunks).await,
            Self::Mux(stream) => stream.write_all(chunks).await,
        }
    }

    /// Writes one chunk.
    ///
    /// # Cancel safety
    /// As [`write_all`](Self::write_all).
    pub(crate) async fn write(&mut self, chunk: Bytes) -> Result<(), StreamError> {
        match self {
            Self::Quic(stream) => stream.write(chunk).await,
            Self::Mux(stream) => stream.write_all(&mut [chunk]).await,
        }
    }

    /// Ends the stream after the written bytes. Does nothing if the stream has ended or the peer has stopped it.
    pub(crate) fn finish(&mut self) {
        match self {
            Self::Quic(stream) => stream.finish(),
            Self::Mux(stream) => stream.finish(),
        }
    }

    /// Ends the stream at once; bytes that the peer has not received are lost. Does nothing if the stream has ended.
    pub(crate) fn reset(&mut self, code: CloseCode) {
        match self {
            Self::Quic(stream) => stream.reset(code),
            Self::Mux(stream) => stream.reset(code),
        }
    }

    /// Waits until the peer has received everything (`None`) or has stopped the stream (the code).
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<CloseCode>, StreamError>> + Send + Sync + 'static {
        match self {
            Self::Quic(stream) => Either::Left(stream.stopped()),
            Self::Mux(stream) => Either::Right(stream.stopped()),
        }
    }
}

/// The receiving side of a stream. Dropping it before its end stops the stream. A browser would then discard data
/// that it has received on the stream, so a browser's stream is stopped only if the browser continues to send.
#[derive(Debug)]
pub(crate) enum RecvStream {
    Quic(quic::RecvStream),
    Mux(mux::RecvStream),
}

impl RecvStream {
    /// Fills `chunks` from the front with the chunks that have arrived, in order, and returns how many; `None` at the
    /// end of the stream.
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Option<usize>, StreamError>> {
        match self {
            Self::Quic(stream) => stream.poll_read(cx, chunks),
            Self::Mux(stream) => stream.poll_read(cx, chunks),
        }
    }

    /// The next bytes, at most `most`; `None` at the end of the stream.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn read(&mut self, most: usize) -> Result<Option<Bytes>, StreamError> {
        match self {
            Self::Quic(stream) => stream.read(most).await,
            Self::Mux(stream) => stream.read(most).await,
        }
    }

    /// Stops the stream with this code. Does nothing if the stream has ended.
    pub(crate) fn stop(&mut self, code: CloseCode) {
        match self {
            Self::Quic(stream) => stream.stop(code),
            Self::Mux(stream) => stream.stop(code),
        }
    }
}

/// Cumulative statistics of a connection.
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
    /// Packets sent, and packets declared lost.
    pub(crate) packets_sent: u64,
    pub(crate) packets_lost: u64,
    /// Smoothed round-trip time.
    pub(crate) rtt: Duration,
    /// Congestion window, in bytes.
    pub(crate) congestion_window: u64,
    /// Largest UDP payload that is known to pass the path, in bytes.
    pub(crate) mtu: u16,
}

/// Why a connection has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ConnectionError {
    /// This side has closed it.
    Local,
    /// The peer has closed it, with a code and text of the protocol.
    Peer(CloseReason),
    /// No packet arrived from the peer for the idle time, or within the handshake time-out.
    TimedOut,
    /// The transport has ended it, for this reason.
    Transport(CloseReason),
}

impl ConnectionError {
    /// The error as a close reason of the protocol.
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
    /// The datagram is too large for the path, or the peer accepts no datagrams.
    TooLarge,
    /// The connection is over.
    Lost,
}

/// Why a stream accepts or returns no more bytes.
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

/// The result of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) bytes: usize,
    /// How many whole buffers were written.
    pub(crate) chunks: usize,
}
