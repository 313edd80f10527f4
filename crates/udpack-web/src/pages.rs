//! The pages for browsers, and where these find the server.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::http::uri::Authority;
use hyper::{HeaderMap, Request, Response, StatusCode};
use serde_json::json;
use udpack::{Server, Web};

use crate::assets;
use crate::site::{Answer, Way, last, plain};

/// The pages of one server.
#[derive(Debug)]
pub struct Pages {
    server: Server,
    web: Web,
    host: Option<String>,
}

impl Pages {
    /// Pages that connect to this server, which was built with `web`.
    pub fn new(server: Server, web: Web) -> Self {
        Self {
            server,
            web,
            host: None,
        }
    }

    /// The name under which pages reach the server, for pages that come from elsewhere. Without it they take the name that they
    /// were loaded from.
    #[must_use]
    pub fn host(self, host: Option<String>) -> Self {
        Self { host, ..self }
    }

    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    pub(crate) fn answer<B>(
        &self,
        request: &Request<B>,
        way: Way,
        counters: impl FnOnce(&Request<B>) -> Answer,
    ) -> Answer {
        let Some(host) = host(request) else {
            return last(plain(StatusCode::BAD_REQUEST, "name a host\n"));
        };
        if !self.web.is_host(host.host()) {
            return last(plain(StatusCode::MISDIRECTED_REQUEST, UNKNOWN));
        }
        let path = request.uri().path();
        if !way.secure && !way.inside {
            return elsewhere(&format!("https://{host}{path}"));
        }
        let mut answer = match path {
            "/.well-known/udpack.json" => self.address(request.headers(), host.host()),
            "/healthz" => plain(StatusCode::OK, "ok\n"),
            "/metrics" if way.from.ip().to_canonical().is_loopback() => counters(request),
            "/metrics" => plain(
                StatusCode::FORBIDDEN,
                "only this machine gets the counters\n",
            ),
            path => match assets::at(path) {
                Some((asset, tag)) => file(request.headers(), asset, tag),
                None => plain(StatusCode::NOT_FOUND, "no such page\n"),
            },
        };
        self.guard(answer.headers_mut(), &host, way);
        answer
    }

    /// Where the server is, and by which certificates it is known.
    fn address(&self, asked: &HeaderMap, host: &str) -> Answer {
        let hex = |hash: [u8; 32]| hash.map(|byte| format!("{byte:02x}")).concat();
        let hashes = self.server.certificate_hashes().into_iter().map(hex);
        let limits = self.server.limits();
        let text = json!({
            "protocol": "udpack/1",
            "host": self.host,
            "port": self.server.local_addr().port(),
            "path": self.web.url_path(),
            "hashes": hashes.collect::<Vec<_>>(),
            "limits": { "frame": limits.frame, "channels": limits.channels },
        });
        let mut answer = plain(StatusCode::OK, format!("{text}\n"));
        let headers = answer.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
        // Pages of other servers ask, too, where the operator lets them connect.
        if let Some(origin) = asked.get(header::ORIGIN)
            && let Ok(text) = origin.to_str()
            && self.web.is_origin(text, host)
        {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        }
        answer
    }

    /// Keeps a page to what it needs: its own files, and the server.
    fn guard(&self, headers: &mut HeaderMap, host: &Authority, way: Way) {
        let port = self.server.local_addr().port();
        // A policy has no words for an IPv6 address.
        let own = match host.host().starts_with('[') {
            true => "*",
            false => host.host(),
        };
        // WebSockets are taken where the page comes from.
        let sockets = match (way.secure, host.port_u16()) {
            (true, Some(port)) => format!("wss://{own}:{port}"),
            (true, None) => format!("wss://{own}"),
            (false, Some(port)) => format!("ws://{own}:{port}"),
            (false, None) => format!("ws://{own}"),
        };
        let also = self
            .host
            .iter()
            .map(|host| format!(" https://{host}:{port}"));
        let policy = format!(
            "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; \
             img-src 'self' blob:; media-src 'self' blob:; font-src 'self'; worker-src 'self'; manifest-src 'self'; \
             connect-src 'self' {sockets} https://{own}:{port}{}; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            also.collect::<String>(),
        );
        if let Ok(policy) = HeaderValue::try_from(policy) {
            headers.insert(header::CONTENT_SECURITY_POLICY, policy);
        }
        for (name, value) in [
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
            (
                "permissions-policy",
                "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
            ),
        ] {
            let name = HeaderName::from_static(name);
            headers.insert(name, HeaderValue::from_static(value));
        }
    }
}

/// The host that was asked for, with its port if it has one.
fn host<B>(request: &Request<B>) -> Option<Authority> {
    let mut said = request.headers().get_all(header::HOST).iter();
    let (one, None) = (said.next()?, said.next()) else {
        return None;
    };
    let host: Authority = one.to_str().ok()?.parse().ok()?;
    (!host.host().is_empty() && !host.as_str().contains('@')).then_some(host)
}

/// A file, or that the browser has it already. It asks each time, so that all files are of one release.
fn file(asked: &HeaderMap, asset: &'static assets::Asset, tag: &'static str) -> Answer {
    let known = asked.get_all(header::IF_NONE_MATCH).iter();
    let known = known.filter_map(|tags| tags.to_str().ok());
    let mut known = known.flat_map(|tags| tags.split(','));
    let is_known = known.any(|one| one.trim().trim_start_matches("W/") == tag);
    let mut answer = Response::new(match is_known {
        true => Full::default(),
        false => Full::new(Bytes::from_static(asset.bytes)),
    });
    if is_known {
        *answer.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(asset.kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(header::ETAG, HeaderValue::from_static(tag));
    answer
}

/// Sends who came without TLS to where it is spoken.
fn elsewhere(to: &str) -> Answer {
    let mut answer = plain(StatusCode::TEMPORARY_REDIRECT, "use https\n");
    match HeaderValue::try_from(to) {
        Ok(to) => answer.headers_mut().insert(header::LOCATION, to),
        Err(_) => return last(plain(StatusCode::BAD_REQUEST, "use https\n")),
    };
    last(answer)
}

const UNKNOWN: &str = "this server is not known by that name: ask for it by its address, \
                       or name it with --public-host or --web-origin at its start\n";
