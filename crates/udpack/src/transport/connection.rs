//! A connection to a peer and its streams, whatever carries them: QUIC itself, WebTransport over it, or TCP.
//!
//! The rest of the crate knows only these types: codes are those of the protocol, errors say what became of the
//! connection, and nothing of the transport's own interface shows.

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

/// Bytes of text that travel with a close, at most.
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

    /// What it speaks below the protocol.
    pub(crate) fn transport(&self) -> Transport {
        match self {
            Self::Quic(conn) => conn.transport(),
            Self::Mux(conn) => conn.transport(),
        }
    }

    /// Whether the peer's program waits when it may open no further stream. A browser fails at once.
    pub(crate) fn waits_for_streams(&self) -> bool {
        match self {
            Self::Quic(conn) => conn.waits_for_streams(),
            Self::Mux(_) => true,
        }
    }

    /// Opens a stream both ways, as soon as the peer permits one more.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        match self {
            Self::Quic(conn) => both(conn.open_bi().await?, SendStream::Quic, RecvStream::Quic),
            Self::Mux(conn) => both(conn.open_bi().await?, SendStream::Mux, RecvStream::Mux),
        }
    }

    /// The next stream both ways that the peer opens.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        match self {
            Self::Quic(conn) => both(conn.accept_bi().await?, SendStream::Quic, RecvStream::Quic),
            Self::Mux(conn) => both(conn.accept_bi().await?, SendStream::Mux, RecvStream::Mux),
        }
    }

    /// Opens a stream to the peer alone, as soon as the peer permits one more.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        match self {
            Self::Quic(conn) => conn.open_uni().await.map(SendStream::Quic),
            Self::Mux(conn) => conn.open_uni().await.map(SendStream::Mux),
        }
    }

    /// The next stream from the peer alone.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        match self {
            Self::Quic(conn) => conn.accept_uni().await.map(RecvStream::Quic),
            Self::Mux(conn) => conn.accept_uni().await.map(RecvStream::Mux),
        }
    }

    /// Refuses the streams to this side alone that come from a peer which was not let in yet, until the connection is over.
    /// A server that serves browsers must permit some from the first packet on, before it knows who comes. Those of a
    /// browser's session wait instead; over TCP none is permitted.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn refuse_early(&self) {
        match self {
            Self::Quic(conn) => conn.refuse_early().await,
            Self::Mux(_) => {}
        }
    }

    /// How many streams both ways the peer may have open at once.
    pub(crate) fn permit_bi(&self, streams: u32) {
        match self {
            Self::Quic(conn) => conn.permit_bi(streams),
            Self::Mux(conn) => conn.permit(false, streams),
        }
    }

    /// How many streams to this side alone the peer may have open at once.
    pub(crate) fn permit_uni(&self, streams: u32) {
        match self {
            Self::Quic(conn) => conn.permit_uni(streams),
            Self::Mux(conn) => conn.permit(true, streams),
        }
    }

    /// How many bytes the peer may send ahead of what is read, over all streams.
    pub(crate) fn set_receive_window(&self, bytes: u64) {
        match self {
            Self::Quic(conn) => conn.set_receive_window(bytes),
            Self::Mux(conn) => conn.set_receive_window(bytes),
        }
    }

    /// Largest datagram that can be sent now, in bytes; `None` where none can.
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

    /// The next datagram of the peer. It is a slice of a buffer in which others came. One that is of no session here is
    /// empty: it carries no message, but counts.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        match self {
            Self::Quic(conn) => conn.read_datagram().await,
            Self::Mux(conn) => conn.read_datagram().await,
        }
    }

    /// Ends the connection at once; streams that are under way are lost. Of `text` the peer gets the first 256 bytes.
    /// A browser hears it first, for which it has four round trips or 2 s.
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

    /// Waits until the connection is over, and what was to be said with it.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn closed(&self) -> ConnectionError {
        match self {
            Self::Quic(conn) => conn.closed().await,
            Self::Mux(conn) => conn.closed().await,
        }
    }

    /// Why the connection is over, if it is.
    pub(crate) fn error(&self) -> Option<ConnectionError> {
        match self {
            Self::Quic(conn) => conn.error(),
            Self::Mux(conn) => conn.error(),
        }
    }

    /// Whether the connection is over.
    pub(crate) fn is_over(&self) -> bool {
        self.error().is_some()
    }

    /// Where the peer is now.
    pub(crate) fn remote_address(&self) -> SocketAddr {
        match self {
            Self::Quic(conn) => conn.remote_address(),
            Self::Mux(conn) => conn.remote_address(),
        }
    }

    /// The certificate that a server has shown by QUIC, in DER.
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

    /// The numbers of this moment. Takes the lock of the connection.
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

/// A port of this machine with the connections over it. Cheap to clone; the port is closed with the last handle and
/// connection.
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

    /// Goes on from another local address, with kernel buffers of so many bytes. A TCP connection has the address that it began
    /// with.
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
    /// Which of the connection's streams goes first: the one with the larger number.
    pub(crate) fn set_priority(&self, priority: i32) {
        match self {
            Self::Quic(stream) => stream.set_priority(priority),
            Self::Mux(stream) => stream.set_priority(priority),
        }
    }

    /// Writes as much as the peer and this side's windows take now. What was taken is cut from the front of `chunks`.
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

    /// Writes this.
    ///
    /// # Cancel safety
    /// As [`write_all`](Self::write_all).
    pub(crate) async fn write(&mut self, chunk: Bytes) -> Result<(), StreamError> {
        match self {
            Self::Quic(stream) => stream.write(chunk).await,
            Self::Mux(stream) => stream.write_all(&mut [chunk]).await,
        }
    }

    /// Ends the stream behind what was written. Does nothing to one that has ended or that the peer has stopped.
    pub(crate) fn finish(&mut self) {
        match self {
            Self::Quic(stream) => stream.finish(),
            Self::Mux(stream) => stream.finish(),
        }
    }

    /// Ends the stream at once; what the peer has not got is lost. Does nothing to one that has ended.
    pub(crate) fn reset(&mut self, code: CloseCode) {
        match self {
            Self::Quic(stream) => stream.reset(code),
            Self::Mux(stream) => stream.reset(code),
        }
    }

    /// Waits until the peer has everything (`None`) or reads no more (the code).
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

/// The receiving side of a stream. Dropping it before its end tells the peer that nothing more is read; a browser, which
/// would throw away what it has received on the stream, is told only when it goes on all the same.
#[derive(Debug)]
pub(crate) enum RecvStream {
    Quic(quic::RecvStream),
    Mux(mux::RecvStream),
}

impl RecvStream {
    /// Fills `chunks` from the front with what has arrived, in order, and says how many; `None` at the end.
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

    /// The next bytes, at most so many; `None` at the end.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn read(&mut self, most: usize) -> Result<Option<Bytes>, StreamError> {
        match self {
            Self::Quic(stream) => stream.read(most).await,
            Self::Mux(stream) => stream.read(most).await,
        }
    }

    /// Reads no more, and tells the peer so. Does nothing to a stream that has ended.
    pub(crate) fn stop(&mut self, code: CloseCode) {
        match self {
            Self::Quic(stream) => stream.stop(code),
            Self::Mux(stream) => stream.stop(code),
        }
    }
}

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
