//! TLS over TCP by a server's own certificates: for the pages that a program serves beside its server.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::trust::identity::IdentityError;
use crate::trust::tls;
use crate::trust::web_certificate::Certificates;

/// TLS 1.3 for HTTP/1.1 over TCP, with the certificates that the same server presents to browsers over QUIC. Cheap to
/// clone.
///
/// Created by [`Server::https`](crate::Server::https).
#[derive(Clone)]
pub struct Https {
    acceptor: TlsAcceptor,
}

impl Https {
    pub(crate) fn new(certificates: Arc<Certificates>) -> Result<Self, IdentityError> {
        let config = tls::server_config(certificates, &[b"http/1.1"]);
        let config = config.map_err(IdentityError::crypto)?;
        Ok(Self {
            acceptor: Arc::new(config).into(),
        })
    }

    /// Performs the server's side of the handshake. It has no time-out of its own.
    ///
    /// # Errors
    /// When the connection ends, or the peer does not speak TLS 1.3.
    ///
    /// # Cancel safety
    /// Dropping the future drops the connection.
    pub async fn accept<S>(&self, stream: S) -> io::Result<HttpsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = self.acceptor.accept(stream).await?;
        Ok(HttpsStream { stream })
    }
}

impl fmt::Debug for Https {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Https").finish_non_exhaustive()
    }
}

/// A TLS connection from [`Https::accept`]. Shutting it down sends `close_notify` to the peer.
pub struct HttpsStream<S> {
    stream: TlsStream<S>,
}

impl<S> fmt::Debug for HttpsStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpsStream").finish_non_exhaustive()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for HttpsStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for HttpsStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
