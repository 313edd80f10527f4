//! QUIC connections and their streams, including those of a browser's session.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use rustls::pki_types::CertificateDer;

use crate::base::text::{cut, printable_within};
use crate::transport::connection::{
    CLOSE_TEXT, ConnectionError, ConnectionStats, DatagramError, StreamError, Written,
};
use crate::transport::lookup::unmapped;
use crate::transport::udp::{self, MOST_PAYLOAD};
use crate::transport::web;
use crate::trust::origin::Transport;
use crate::wire::code::{CloseCode, CloseReason, Side};

/// A connection to a peer. Cheap to clone; the connection lives as long as its last handle or stream.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    quic: quinn::Connection,
    /// The WebTransport session, if the peer is a browser.
    web: Option<Arc<web::Session>>,
}

impl Connection {
    pub(crate) fn quic(conn: quinn::Connection) -> Self {
        Self {
            quic: conn,
            web: None,
        }
    }

    pub(crate) fn web(conn: quinn::Connection, session: Arc<web::Session>) -> Self {
        Self {
            quic: conn,
            web: Some(session),
        }
    }

    /// The transport below the protocol.
    pub(crate) fn transport(&self) -> Transport {
        match &self.web {
            None => Transport::Quic,
            Some(web) => web.transport(),
        }
    }

    /// Whether the peer waits when it may open no further stream. A browser fails at once.
    pub(crate) fn waits_for_streams(&self) -> bool {
        self.web.is_none()
    }

    /// Opens a bidirectional stream, as soon as the peer permits one more.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let (send, recv) = self
            .quic
            .open_bi()
            .await
            .map_err(|error| self.over(error))?;
        match &self.web {
            None => Ok((SendStream::new(send, None), RecvStream::new(recv, None))),
            Some(web) => {
                let send = Box::pin(web.begin_bi(send)).await?;
                let web = Some(web);
                Ok((SendStream::new(send, web), RecvStream::new(recv, web)))
            }
        }
    }

    /// The next bidirectional stream that the peer opens.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let (send, recv) = match &self.web {
            None => self.quic.accept_bi().await?,
            Some(web) => match Box::pin(web.accept_bi()).await {
                Some(streams) => streams,
                None => return Err(Box::pin(self.gone()).await),
            },
        };
        let web = self.web.as_ref();
        Ok((SendStream::new(send, web), RecvStream::new(recv, web)))
    }

    /// Opens a unidirectional stream, as soon as the peer permits one more.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        let stream = self
            .quic
            .open_uni()
            .await
            .map_err(|error| self.over(error))?;
        match &self.web {
            None => Ok(SendStream::new(stream, None)),
            Some(web) => Ok(SendStream::new(
                Box::pin(web.begin_uni(stream)).await?,
                Some(web),
            )),
        }
    }

    /// The next unidirectional stream of the peer.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        match &self.web {
            None => Ok(RecvStream::new(self.quic.accept_uni().await?, None)),
            Some(web) => match Box::pin(web.accept_uni()).await {
                Some(stream) => Ok(RecvStream::one_way(stream, web)),
                None => Err(Box::pin(self.gone()).await),
            },
        }
    }

    /// Refuses the unidirectional streams of a peer that is not admitted yet, until the connection has ended. A
    /// server that serves browsers must permit some from the first packet on, before it knows the kind of client.
    /// Those of a browser's session wait instead.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn refuse_early(&self) {
        while self.web.is_none()
            && let Ok(mut stream) = self.accept_uni().await
        {
            stream.stop(CloseCode::PROTOCOL_ORDER);
        }
    }

    /// Sets how many bidirectional streams the peer may have open at once.
    pub(crate) fn permit_bi(&self, streams: u32) {
        let streams = match &self.web {
            None => streams,
            Some(_) => web::permitted(streams.saturating_add(web::OWN_BI)),
        };
        self.quic.set_max_concurrent_bi_streams(streams.into());
    }

    /// Sets how many unidirectional streams the peer may have open at once.
    pub(crate) fn permit_uni(&self, streams: u32) {
        let own = self.web.as_ref().map_or(0, |_| web::OWN_UNI);
        let streams = streams.saturating_add(own);
        self.quic.set_max_concurrent_uni_streams(streams.into());
    }

    /// Sets how many unread bytes the peer may send, over all streams.
    pub(crate) fn set_receive_window(&self, bytes: u64) {
        self.quic.set_receive_window(varint(bytes));
    }

    /// Largest datagram that can be sent now, in bytes; `None` if the peer accepts none.
    pub(crate) fn max_datagram_size(&self) -> Option<usize> {
        let most = self.quic.max_datagram_size()?;
        match &self.web {
            None => Some(most),
            Some(web) => most.checked_sub(web::wire::prefix_len(web.id())),
        }
    }

    /// Sends a datagram, as soon as there is room for it. It may be lost.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future has sent nothing.
    pub(crate) async fn send_datagram(&self, datagram: Bytes) -> Result<(), DatagramError> {
        use quinn::SendDatagramError as E;
        let datagram = match &self.web {
            None => datagram,
            Some(web) => web::wire::datagram(web.id(), &datagram),
        };
        let sent = self.quic.send_datagram_wait(datagram).await;
        sent.map_err(|error| match error {
            E::ConnectionLost(_) => DatagramError::Lost,
            E::UnsupportedByPeer | E::Disabled | E::TooLarge => DatagramError::TooLarge,
        })
    }

    /// The next datagram of the peer, as a slice of a buffer with other datagrams. A datagram of an unknown session
    /// is returned empty: it carries no message, but counts as received.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        let read = self.quic.read_datagram().await;
        let datagram = read.map_err(|error| self.over(error))?;
        match &self.web {
            None => Ok(datagram),
            Some(web) => Ok(web::wire::datagram_body(web.id(), datagram).unwrap_or_default()),
        }
    }

    /// Closes the connection at once; unsent bytes of its streams are lost. The peer gets the first 256 bytes of
    /// `text`. A browser first receives the close of its session, for which it has four round trips, at most 2 s.
    pub(crate) fn close(&self, code: CloseCode, text: &str) {
        let text = cut(text, CLOSE_TEXT);
        match &self.web {
            None => self.quic.close(varint(code.value()), text.as_bytes()),
            Some(web) => web.close(code, text),
        }
    }

    /// Waits until the connection has ended, and its close has been sent.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn closed(&self) -> ConnectionError {
        let error = self.quic.closed().await;
        self.over(error)
    }

    /// Waits for the reason of the end: at once if the peer closed the connection, after the close was sent if this
    /// side did.
    async fn gone(&self) -> ConnectionError {
        match self.error() {
            Some(error) if error != ConnectionError::Local => error,
            _ => self.closed().await,
        }
    }

    /// Why the connection has ended, if it has.
    pub(crate) fn error(&self) -> Option<ConnectionError> {
        let ended = self.web.as_ref().and_then(|web| web.ended());
        ended.or_else(|| self.quic.close_reason().map(|error| self.over(error)))
    }

    fn over(&self, error: quinn::ConnectionError) -> ConnectionError {
        over(self.web.as_ref(), error)
    }

    /// The current address of the peer.
    pub(crate) fn remote_address(&self) -> SocketAddr {
        unmapped(self.quic.remote_address())
    }

    /// The certificate that the peer presented, in DER.
    pub(crate) fn certificate(&self) -> Option<Vec<u8>> {
        let shown = self.quic.peer_identity()?;
        let chain = shown.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        Some(chain.first()?.to_vec())
    }

    /// Smoothed round-trip time.
    pub(crate) fn rtt(&self) -> Duration {
        self.quic.rtt()
    }

    /// The current statistics. Takes the lock of the connection.
    pub(crate) fn stats(&self) -> ConnectionStats {
        let stats = self.quic.stats();
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

/// The reason of a connection's end; the reason of its session takes precedence.
fn over(web: Option<&Arc<web::Session>>, error: quinn::ConnectionError) -> ConnectionError {
    match web {
        None => error.into(),
        Some(web) => web.over(error),
    }
}

/// A local port with its connections. Cheap to clone; the port is closed with the last handle and connection.
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

    /// Closes all connections, and accepts no more.
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

    /// Moves to another local address, with kernel buffers of `buffer` bytes.
    pub(crate) fn rebind(&self, local: SocketAddr, buffer: usize) -> io::Result<()> {
        let bound = udp::bind(local, None, buffer, MOST_PAYLOAD)?;
        self.0.rebind_abstract(bound.socket)
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

/// Converts a code of the protocol into QUIC's code.
fn code_out(web: Option<&Arc<web::Session>>, code: CloseCode) -> quinn::VarInt {
    varint(match web {
        None => code.value(),
        Some(_) => web::wire::to_http3(code),
    })
}

/// Converts QUIC's code into a code of the protocol.
fn code_in(web: Option<&Arc<web::Session>>, code: quinn::VarInt) -> CloseCode {
    match web {
        None => CloseCode::new(code.into_inner()),
        Some(_) => web::wire::from_http3(code.into_inner()),
    }
}

#[cold]
fn write_error(web: Option<&Arc<web::Session>>, error: quinn::WriteError) -> StreamError {
    use quinn::WriteError as E;
    match error {
        E::Stopped(code) => StreamError::Peer(code_in(web, code)),
        E::ConnectionLost(error) => StreamError::Lost(over(web, error)),
        E::ClosedStream | E::ZeroRttRejected => StreamError::Ended,
    }
}

#[cold]
fn read_error(web: Option<&Arc<web::Session>>, error: quinn::ReadError) -> StreamError {
    use quinn::ReadError as E;
    match error {
        E::Reset(code) => StreamError::Peer(code_in(web, code)),
        E::ConnectionLost(error) => StreamError::Lost(over(web, error)),
        E::ClosedStream | E::IllegalOrderedRead | E::ZeroRttRejected => StreamError::Ended,
    }
}

/// The error with which a stream has ended, and whether the session's end must be awaited first: a browser that ends
/// its session first resets and stops all streams with a code of HTTP/3.
enum Ended {
    So(StreamError),
    With(Arc<web::Session>),
}

impl Ended {
    fn new(
        web: Option<&Arc<web::Session>>,
        error: StreamError,
        code: Option<quinn::VarInt>,
    ) -> Self {
        match (web, code) {
            (Some(web), Some(code)) if !web::wire::is_code(code.into_inner()) => {
                Self::With(web.clone())
            }
            _ => Self::So(error),
        }
    }

    #[cold]
    fn writing(web: Option<&Arc<web::Session>>, error: quinn::WriteError) -> Self {
        let code = match &error {
            quinn::WriteError::Stopped(code) => Some(*code),
            _ => None,
        };
        Self::new(web, write_error(web, error), code)
    }

    #[cold]
    fn reading(web: Option<&Arc<web::Session>>, error: quinn::ReadError) -> Self {
        let code = match &error {
            quinn::ReadError::Reset(code) => Some(*code),
            _ => None,
        };
        Self::new(web, read_error(web, error), code)
    }

    /// The error, when the session's end is known or does not come in time.
    async fn error(self) -> StreamError {
        match self {
            Self::So(error) => error,
            Self::With(web) => match web.ending().await {
                Some(error) => StreamError::Lost(error),
                None => StreamError::Peer(CloseCode::CANCELLED),
            },
        }
    }
}

/// How a stream has ended. QUIC reports it once.
enum Ending {
    Under(Pin<Box<dyn Future<Output = StreamError> + Send + Sync>>),
    // Boxed, because every stream has the field and few use it.
    Known(Box<StreamError>),
}

impl std::fmt::Debug for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ending")
    }
}

impl Ending {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        if let Self::Under(error) = self {
            *self = Self::Known(Box::new(std::task::ready!(error.as_mut().poll(cx))));
        }
        match self {
            Self::Known(error) => Poll::Ready(StreamError::clone(error)),
            Self::Under(_) => Poll::Pending,
        }
    }

    /// Polls the error of a stream that has ended, and keeps it in `place`.
    fn keep(place: &mut Option<Self>, ended: Ended, cx: &mut Context<'_>) -> Poll<StreamError> {
        match ended {
            Ended::So(error) => Poll::Ready(error),
            with @ Ended::With(_) => place.insert(Self::Under(Box::pin(with.error()))).poll(cx),
        }
    }
}

/// The sending side of a stream. Dropping it ends the stream as [`finish`](Self::finish) does.
#[derive(Debug)]
pub(crate) struct SendStream {
    quic: quinn::SendStream,
    /// The session whose stream it is, where it is one of a browser.
    web: Option<Arc<web::Session>>,
    ending: Option<Ending>,
}

impl SendStream {
    fn new(quic: quinn::SendStream, web: Option<&Arc<web::Session>>) -> Self {
        Self {
            quic,
            web: web.cloned(),
            ending: None,
        }
    }

    /// Sets the priority: of the connection's streams, those with larger numbers are sent first.
    pub(crate) fn set_priority(&self, priority: i32) {
        // Fails only on a stream that has ended, which the next write reports.
        let _ = self.quic.set_priority(priority);
    }

    /// Writes as much as the peer's and this side's windows permit now, and removes it from the front of `chunks`.
    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Written, StreamError>> {
        if let Some(ending) = &mut self.ending {
            return ending.poll(cx).map(Err);
        }
        // `write_chunks` is cancel safe: a future that is not ready has written nothing.
        let written = std::task::ready!(pin!(self.quic.write_chunks(chunks)).poll(cx));
        match written {
            Ok(quinn::Written { bytes, chunks }) => Poll::Ready(Ok(Written { bytes, chunks })),
            Err(error) => {
                let ended = Ended::writing(self.web.as_ref(), error);
                Ending::keep(&mut self.ending, ended, cx).map(Err)
            }
        }
    }

    /// Writes all of `chunks`.
    ///
    /// # Cancel safety
    /// Not cancel safe: a dropped future may have written a part.
    pub(crate) async fn write_all(&mut self, chunks: &mut [Bytes]) -> Result<(), StreamError> {
        match self.quic.write_all_chunks(chunks).await {
            Ok(()) => Ok(()),
            Err(error) => Err(Ended::writing(self.web.as_ref(), error).error().await),
        }
    }

    /// Writes one chunk.
    ///
    /// # Cancel safety
    /// As [`write_all`](Self::write_all).
    pub(crate) async fn write(&mut self, chunk: Bytes) -> Result<(), StreamError> {
        match self.quic.write_chunk(chunk).await {
            Ok(()) => Ok(()),
            Err(error) => Err(Ended::writing(self.web.as_ref(), error).error().await),
        }
    }

    /// Ends the stream after the written bytes. Does nothing if the stream has ended or the peer has stopped it.
    pub(crate) fn finish(&mut self) {
        let _ = self.quic.finish();
    }

    /// Ends the stream at once; bytes that the peer has not received are lost. Does nothing if the stream has ended.
    pub(crate) fn reset(&mut self, code: CloseCode) {
        let _ = self.quic.reset(code_out(self.web.as_ref(), code));
    }

    /// Waits until the peer has received everything (`None`) or has stopped the stream (the code).
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<CloseCode>, StreamError>> + Send + Sync + 'static {
        let stopped = self.quic.stopped();
        let web = self.web.clone();
        async move {
            match stopped.await {
                Ok(None) => Ok(None),
                Ok(Some(code)) => {
                    let error = StreamError::Peer(code_in(web.as_ref(), code));
                    match Ended::new(web.as_ref(), error, Some(code)).error().await {
                        StreamError::Peer(code) => Ok(Some(code)),
                        error => Err(error),
                    }
                }
                Err(quinn::StoppedError::ConnectionLost(error)) => {
                    Err(StreamError::Lost(over(web.as_ref(), error)))
                }
                Err(quinn::StoppedError::ZeroRttRejected) => Err(StreamError::Ended),
            }
        }
    }
}

/// The receiving side of a stream. Dropping it before its end stops the stream. A browser would then discard data
/// that it has received on the stream, so a browser's stream is stopped only if the browser continues to send.
#[derive(Debug)]
pub(crate) struct RecvStream {
    /// `None` after the stream was read to its end or stopped.
    quic: Option<quinn::RecvStream>,
    /// The session whose stream it is, where it is one of a browser.
    web: Option<Arc<web::Session>>,
    /// Whether the stream is bidirectional.
    half: bool,
    ending: Option<Ending>,
}

impl RecvStream {
    fn new(quic: quinn::RecvStream, web: Option<&Arc<web::Session>>) -> Self {
        Self {
            quic: Some(quic),
            web: web.cloned(),
            half: true,
            ending: None,
        }
    }

    fn one_way(quic: quinn::RecvStream, web: &Arc<web::Session>) -> Self {
        let mut stream = Self::new(quic, Some(web));
        stream.half = false;
        stream
    }

    /// Fills `chunks` from the front with the chunks that have arrived, in order, and returns how many; `None` at the
    /// end of the stream.
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Option<usize>, StreamError>> {
        if let Some(ending) = &mut self.ending {
            return ending.poll(cx).map(Err);
        }
        let Some(quic) = &mut self.quic else {
            return Poll::Ready(Err(StreamError::Ended));
        };
        let read = std::task::ready!(pin!(quic.read_chunks(chunks)).poll(cx));
        match read {
            Ok(Some(count)) => Poll::Ready(Ok(Some(count))),
            Ok(None) => {
                self.ended();
                Poll::Ready(Ok(None))
            }
            Err(error) => {
                let ended = Ended::reading(self.web.as_ref(), error);
                Ending::keep(&mut self.ending, ended, cx).map(Err)
            }
        }
    }

    /// The next bytes, at most `most`; `None` at the end of the stream.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn read(&mut self, most: usize) -> Result<Option<Bytes>, StreamError> {
        if self.ending.is_none() {
            let Some(quic) = &mut self.quic else {
                return Err(StreamError::Ended);
            };
            match quic.read_chunk(most, true).await {
                Ok(Some(chunk)) => return Ok(Some(chunk.bytes)),
                Ok(None) => {
                    self.ended();
                    return Ok(None);
                }
                Err(error) => match Ended::reading(self.web.as_ref(), error) {
                    Ended::So(error) => return Err(error),
                    with @ Ended::With(_) => {
                        self.ending = Some(Ending::Under(Box::pin(with.error())))
                    }
                },
            }
        }
        match &mut self.ending {
            Some(ending) => Err(std::future::poll_fn(|cx| ending.poll(cx)).await),
            None => Err(StreamError::Ended),
        }
    }

    /// The stream was read to its end, so dropping it need not drain it.
    fn ended(&mut self) {
        if self.web.is_some() {
            self.half = false;
        }
    }

    /// Stops the stream with this code. Does nothing if the stream has ended.
    pub(crate) fn stop(&mut self, code: CloseCode) {
        if let Some(web) = &self.web
            && self.half
        {
            if let Some(quic) = self.quic.take() {
                web.drain(quic, code);
            }
        } else if let Some(quic) = &mut self.quic {
            let _ = quic.stop(code_out(self.web.as_ref(), code));
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        if self.web.is_some() {
            self.stop(CloseCode::NORMAL);
        }
    }
}

/// A number as a QUIC variable-length integer; larger numbers become the largest one.
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
