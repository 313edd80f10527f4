//! The TCP port: who may connect, how often, and for how long.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use udpack::{Pool, Server, Shares, Tenant};

use crate::rate::Rates;
use crate::site::{self, Site, Way};

/// Connections at once, of which one address gets at most a quarter.
const CONNECTIONS: Shares = Shares {
    each: 64,
    ..Shares::of(256)
};
/// For the TLS handshake, and from the end of an answer to the last byte of the next request's head.
const HEAD: Duration = Duration::from_secs(10);
/// The largest head of a request, in bytes, and the most headers in it; hyper allows no less.
const HEAD_BYTES: usize = 8 << 10;
const HEADERS: usize = 64;
/// After this a connection takes no further request.
const LIFE: Duration = Duration::from_secs(60);
/// How long the last answer may take to be read.
const LAST: Duration = Duration::from_secs(60);

/// A TCP port that is bound, and serves a [`Site`].
#[derive(Debug)]
pub struct HttpListener {
    listener: TcpListener,
    address: SocketAddr,
}

impl HttpListener {
    /// Binds the port; port 0 picks a free one. Connections wait in it until [`serve`](Self::serve) is called.
    ///
    /// # Errors
    /// When the address cannot be resolved or bound.
    ///
    /// # Cancel safety
    /// Dropping the future binds nothing.
    pub async fn bind(address: impl tokio::net::ToSocketAddrs) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// The address with its real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// At once, when the server's key does not do for TLS.
    ///
    /// # Cancel safety
    /// Dropping the future drops all connections and frees the port.
    pub async fn serve(self, site: Site) -> io::Result<()> {
        let port = Arc::new(Port {
            https: match server(&site) {
                Some(server) => Some(server.https().map_err(io::Error::other)?),
                None => None,
            },
            site,
            rates: Mutex::default(),
        });
        let places = Pool::new("web connections", CONNECTIONS);
        let mut connections = JoinSet::new();
        loop {
            let (stream, from) = tokio::select! {
                Some(_) = connections.join_next() => continue,
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, from)) => {
                        (stream, SocketAddr::new(from.ip().to_canonical(), from.port()))
                    }
                    Err(error) => {
                        tracing::debug!(%error, "no connection for HTTP");
                        // For example, no file descriptors are left; this is temporary.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let tenant = Tenant::address(from.ip());
            // A handshake is work as well, so a connection counts as a request.
            if !port.may_ask(&tenant) {
                continue;
            }
            let Ok(place) = places.try_take(&tenant) else {
                continue;
            };
            let port = port.clone();
            connections.spawn(async move {
                let _place = place;
                if let Err(error) = port.connection(stream, from, tenant).await {
                    tracing::debug!(peer = %from, %error, "HTTP connection ended");
                }
            });
        }
    }
}

/// What all connections share.
struct Port {
    site: Site,
    rates: Mutex<Rates>,
    https: Option<udpack::Https>,
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

impl Port {
    fn may_ask(&self, who: &Tenant) -> bool {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rates.take(who)
    }

    /// These ask for several files over one connection; a scraper asks once and then not for long.
    fn is_for_browsers(&self) -> bool {
        self.https.is_some()
    }

    async fn connection(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        tenant: Tenant,
    ) -> Result<(), Failed> {
        let way = Way {
            from,
            secure: false,
            inside: stream.local_addr()?.ip().to_canonical().is_loopback(),
        };
        // Whole answers are written; there is nothing to wait for.
        Server::prepare_tcp(&stream)?;
        if let Some(https) = &self.https {
            let mut first = [0];
            // No request begins as TLS does, and no handshake as a request.
            if timeout(HEAD, stream.peek(&mut first)).await?? == 1 && first[0] == TLS {
                let stream = timeout(HEAD, https.accept(stream)).await??;
                let way = Way {
                    secure: true,
                    ..way
                };
                return self.requests(stream, way, tenant).await;
            }
        }
        self.requests(stream, way, tenant).await
    }

    async fn requests<S>(&self, stream: S, way: Way, tenant: Tenant) -> Result<(), Failed>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let service = service_fn(|request: Request<Incoming>| {
            let answer = match self.may_ask(&tenant) {
                true => self.site.answer::<S>(request, way),
                false => site::too_often(),
            };
            async move { Ok::<_, Infallible>(answer) }
        });
        let mut connection = std::pin::pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .keep_alive(self.is_for_browsers())
                .header_read_timeout(HEAD)
                .max_buf_size(HEAD_BYTES)
                .max_headers(HEADERS)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
        );
        if let Ok(ended) = timeout(LIFE, connection.as_mut()).await {
            return Ok(ended?);
        }
        Pin::as_mut(&mut connection).graceful_shutdown();
        Ok(timeout(LAST, connection).await??)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").finish_non_exhaustive()
    }
}

/// The server whose certificates are shown.
fn server(site: &Site) -> Option<&Server> {
    #[cfg(feature = "pages")]
    if let Some(pages) = &site.pages {
        return Some(pages.server());
    }
    site.sockets.as_ref().map(|sockets| &sockets.server)
}

/// The first byte of a TLS handshake.
const TLS: u8 = 22;
