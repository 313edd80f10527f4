//! What is answered to a request.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, header};
use tokio::io::{AsyncRead, AsyncWrite};
use udpack::{Server, Web};

use crate::sockets::Sockets;

pub(crate) type Answer = Response<Full<Bytes>>;

/// What a listener serves. Cheap to clone.
#[derive(Clone)]
pub struct Site {
    counters: Option<Arc<dyn Fn() -> String + Send + Sync>>,
    pub(crate) sockets: Option<Sockets>,
    #[cfg(feature = "pages")]
    pub(crate) pages: Option<Arc<crate::Pages>>,
}

/// How a request came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    pub(crate) from: SocketAddr,
    /// Inside TLS.
    pub(crate) secure: bool,
    /// To an address of this machine that others cannot reach.
    pub(crate) inside: bool,
}

impl Site {
    /// Counters under `/metrics`, for anybody who can reach the port, and nothing else.
    pub fn counters(text: impl Fn() -> String + Send + Sync + 'static) -> Self {
        Self {
            counters: Some(Arc::new(text)),
            sockets: None,
            #[cfg(feature = "pages")]
            pages: None,
        }
    }

    /// Nothing but WebSockets: see [`websockets`](Self::websockets).
    pub fn of(server: Server, web: Web) -> Self {
        Self {
            counters: None,
            sockets: Some(Sockets { server, web }),
            #[cfg(feature = "pages")]
            pages: None,
        }
    }

    /// WebSockets that carry sessions as well, for clients that cannot reach the server over UDP: at the path of `web`, and
    /// for the pages that it lets connect. Only inside TLS, but for programs of this machine.
    #[must_use]
    pub fn websockets(self, server: Server, web: Web) -> Self {
        Self {
            sockets: Some(Sockets { server, web }),
            ..self
        }
    }

    /// These pages as well. From then on only programs of this machine get the counters.
    #[cfg(feature = "pages")]
    #[must_use]
    pub fn pages(self, pages: crate::Pages) -> Self {
        Self {
            pages: Some(Arc::new(pages)),
            ..self
        }
    }

    pub(crate) fn answer<S>(&self, request: Request<Incoming>, way: Way) -> Answer
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut answer = match (refused(&request), &self.sockets) {
            (Some(refused), _) => refused,
            (None, Some(sockets)) if sockets.is_at(&request) => sockets.answer::<S>(request, way),
            (None, _) => self.text(&request, way),
        };
        guard(answer.headers_mut());
        answer
    }

    fn text<B>(&self, request: &Request<B>, way: Way) -> Answer {
        match () {
            #[cfg(feature = "pages")]
            () if self.pages.is_some() => self.page(request, way),
            () => self.counter(request, way),
        }
    }

    #[cfg(feature = "pages")]
    fn page<B>(&self, request: &Request<B>, way: Way) -> Answer {
        match &self.pages {
            Some(pages) => pages.answer(request, way, |request| self.counter(request, way)),
            None => self.counter(request, way),
        }
    }

    fn counter<B>(&self, request: &Request<B>, _way: Way) -> Answer {
        let Some(counters) = &self.counters else {
            return plain(StatusCode::NOT_FOUND, "there is nothing here\n");
        };
        if request.uri().path() != "/metrics" {
            return plain(StatusCode::NOT_FOUND, "the counters are under /metrics\n");
        }
        let mut answer = plain(StatusCode::OK, counters());
        let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        answer.headers_mut().insert(CONTENT_TYPE, kind);
        answer
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Site").finish_non_exhaustive()
    }
}

/// The answer to a request that is wrong whatever it asks for.
fn refused<B>(request: &Request<B>) -> Option<Answer> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut answer = plain(StatusCode::METHOD_NOT_ALLOWED, "use GET\n");
        let allowed = HeaderValue::from_static("GET, HEAD");
        answer.headers_mut().insert(ALLOW, allowed);
        return Some(last(answer));
    }
    let length = request.headers().get(header::CONTENT_LENGTH);
    let body = length.is_some_and(|length| length != "0")
        || request.headers().contains_key(header::TRANSFER_ENCODING);
    body.then(|| last(plain(StatusCode::PAYLOAD_TOO_LARGE, "no body is taken\n")))
}

/// The answer to an address that asks too often.
pub(crate) fn too_often() -> Answer {
    let mut answer = plain(StatusCode::TOO_MANY_REQUESTS, "too many requests\n");
    let second = HeaderValue::from_static("1");
    answer.headers_mut().insert(RETRY_AFTER, second);
    guard(answer.headers_mut());
    last(answer)
}

/// The connection ends with it.
pub(crate) fn last(mut answer: Answer) -> Answer {
    let close = HeaderValue::from_static("close");
    answer.headers_mut().insert(CONNECTION, close);
    answer
}

/// A line of text that nobody keeps.
pub(crate) fn plain(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(text.into()));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    headers.insert(CONTENT_TYPE, kind);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// What every answer has.
fn guard(headers: &mut HeaderMap) {
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
        .entry(header::CONTENT_SECURITY_POLICY)
        .or_insert(HeaderValue::from_static(
            "default-src 'none'; frame-ancestors 'none'",
        ));
}
