//! WebSockets that carry sessions, where the network between client and server lets no UDP pass.

use hyper::body::Incoming;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::http::uri::Authority;
use hyper::upgrade::{Parts, Upgraded};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use udpack::{Server, Web};

use crate::site::{Answer, Way, last, plain};

/// What is spoken in them.
const SUBPROTOCOL: &str = "qmux-02.udpack-1";

/// The WebSockets of one server.
#[derive(Debug, Clone)]
pub(crate) struct Sockets {
    pub(crate) server: Server,
    pub(crate) web: Web,
}

impl Sockets {
    /// Whether the request is for one.
    pub(crate) fn is_at<B>(&self, request: &Request<B>) -> bool {
        request.uri().path() == self.web.url_path()
    }

    /// Answers a request for one, and hands it to the server.
    pub(crate) fn answer<S>(&self, mut request: Request<Incoming>, way: Way) -> Answer
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (accept, origin) = match self.check(&request, way) {
            Ok(checked) => checked,
            Err((status, text)) => {
                let mut answer = plain(status, text);
                if status == StatusCode::UPGRADE_REQUIRED {
                    let headers = answer.headers_mut();
                    headers.insert(header::UPGRADE, WEBSOCKET);
                    headers.insert(header::SEC_WEBSOCKET_VERSION, VERSION);
                }
                return last(answer);
            }
        };
        let upgrade = hyper::upgrade::on(&mut request);
        let server = self.server.clone();
        tokio::spawn(async move {
            // It waits for no more than the answer to be written; the connection has a time limit.
            match upgrade.await.map(io_of::<S>) {
                Ok(Some(stream)) => {
                    server
                        .take_websocket(stream, way.from, origin.as_deref())
                        .await;
                }
                Ok(None) => tracing::debug!(peer = %way.from, "a WebSocket began too early"),
                Err(error) => tracing::debug!(peer = %way.from, %error, "no WebSocket"),
            }
        });
        let mut answer = Response::new(Default::default());
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = answer.headers_mut();
        for (name, value) in [
            (header::CONNECTION, HeaderValue::from_static("upgrade")),
            (header::UPGRADE, WEBSOCKET),
            (header::SEC_WEBSOCKET_ACCEPT, accept),
            (
                header::SEC_WEBSOCKET_PROTOCOL,
                HeaderValue::from_static(SUBPROTOCOL),
            ),
        ] {
            headers.insert(name, value);
        }
        answer
    }

    /// The answer to the key of a request that is as it should be, and the page that it comes from.
    fn check<B>(
        &self,
        request: &Request<B>,
        way: Way,
    ) -> Result<(HeaderValue, Option<String>), (StatusCode, &'static str)> {
        let bad = |text| Err((StatusCode::BAD_REQUEST, text));
        let headers = request.headers();
        if !way.secure && !way.inside {
            return Err((StatusCode::FORBIDDEN, "use https\n"));
        }
        if request.method() != Method::GET || request.version() != Version::HTTP_11 {
            return bad("a WebSocket begins with GET of HTTP/1.1\n");
        }
        if !has(headers, &header::UPGRADE, "websocket")
            || !has(headers, &header::CONNECTION, "upgrade")
            || headers.get(header::SEC_WEBSOCKET_VERSION) != Some(&VERSION)
        {
            return Err((StatusCode::UPGRADE_REQUIRED, "WebSockets are taken here\n"));
        }
        if !has(headers, &header::SEC_WEBSOCKET_PROTOCOL, SUBPROTOCOL) {
            return bad("offer the subprotocol qmux-02.udpack-1\n");
        }
        let Some(host) = one(headers, &header::HOST).and_then(|host| host.parse().ok()) else {
            return bad("name a host\n");
        };
        let host: Authority = host;
        let origin = match headers.contains_key(header::ORIGIN) {
            false => None,
            true => match one(headers, &header::ORIGIN) {
                Some(origin)
                    if self.web.is_host(host.host()) && self.web.is_origin(origin, host.host()) =>
                {
                    Some(origin.to_owned())
                }
                _ => return Err((StatusCode::FORBIDDEN, "this page may not connect\n")),
            },
        };
        // 16 bytes in base64.
        let key = one(headers, &header::SEC_WEBSOCKET_KEY).filter(|key| key.len() == 24);
        match key.map(|key| HeaderValue::try_from(derive_accept_key(key.as_bytes()))) {
            Some(Ok(accept)) => Ok((accept, origin)),
            _ => bad("the WebSocket's key is missing\n"),
        }
    }
}

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
const VERSION: HeaderValue = HeaderValue::from_static("13");

/// The stream itself. None where the client has sent something before it had the answer.
fn io_of<S>(upgraded: Upgraded) -> Option<S>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let parts: Parts<TokioIo<S>> = upgraded.downcast().ok()?;
    parts.read_buf.is_empty().then(|| parts.io.into_inner())
}

/// Whether one of the header's values, of which a line may have several, is this, in letters of either case.
fn has(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    let lines = headers.get_all(name).iter();
    let mut values = lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','));
    values.any(|value| value.trim().eq_ignore_ascii_case(wanted))
}

/// The header's value, if it is there once and is text.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut lines = headers.get_all(name).iter();
    match (lines.next(), lines.next()) {
        (Some(line), None) => line.to_str().ok(),
        _ => None,
    }
}
