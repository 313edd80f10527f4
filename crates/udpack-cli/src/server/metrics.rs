//! `--metrics`: the server's counters over HTTP, in the text format of Prometheus.
//!
//! One page, read only: `GET /metrics`. A connection serves one request, and there are few at once.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use udpack::{Pool, Server};
use udpack_transfer::Receiver;

use crate::exit::{Failure, Kind};

/// Connections served at once; further ones are closed.
const CONNECTIONS: usize = 16;
/// From the first byte of a request to the last of its head.
const HEAD: Duration = Duration::from_secs(5);
/// A whole connection.
const WHOLE: Duration = Duration::from_secs(10);
/// The largest head of a request, in bytes; hyper allows no less.
const HEAD_BYTES: usize = 8 << 10;

/// The port that scrapers ask.
#[derive(Debug)]
pub(super) struct Scrapes {
    listener: TcpListener,
    address: SocketAddr,
}

impl Scrapes {
    pub(super) async fn bind(address: &str) -> anyhow::Result<Self> {
        let bound = async {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            Ok::<_, std::io::Error>(Self { listener, address })
        };
        bound.await.map_err(|error| {
            let text = format!("cannot serve metrics at {address}: {error}");
            Failure::new(Kind::Other, text)
                .hint("choose another address with --metrics, such as 127.0.0.1:9645")
                .into()
        })
    }

    /// The address with its real port.
    pub(super) fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Answers scrapers until it is dropped, which drops their connections.
    pub(super) async fn serve(self, text: impl Fn() -> String + Send + Sync + 'static) {
        let text = Arc::new(text);
        let mut connections = JoinSet::new();
        loop {
            let stream = tokio::select! {
                Some(_) = connections.join_next() => continue,
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::debug!(%error, "no connection for metrics");
                        // For example, no file descriptors are left; this is temporary.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            if connections.len() >= CONNECTIONS {
                continue;
            }
            let text = text.clone();
            connections.spawn(async move {
                let service = service_fn(move |request| {
                    let answer = answer(&request, &*text);
                    async move { Ok::<_, Infallible>(answer) }
                });
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD)
                    .max_buf_size(HEAD_BYTES)
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), service);
                if let Ok(Err(error)) = tokio::time::timeout(WHOLE, connection).await {
                    tracing::debug!(%error, "metrics not served");
                }
            });
        }
    }
}

fn answer(request: &Request<Incoming>, text: &dyn Fn() -> String) -> Response<Full<Bytes>> {
    let plain = |status: StatusCode, body: String, kind: &'static str| {
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = status;
        let kind = HeaderValue::from_static(kind);
        response.headers_mut().insert(CONTENT_TYPE, kind);
        response
    };
    if request.uri().path() != "/metrics" {
        let body = "the counters are under /metrics\n".to_owned();
        return plain(StatusCode::NOT_FOUND, body, "text/plain; charset=utf-8");
    }
    if request.method() != Method::GET {
        let body = "use GET\n".to_owned();
        let mut response = plain(
            StatusCode::METHOD_NOT_ALLOWED,
            body,
            "text/plain; charset=utf-8",
        );
        let allowed = HeaderValue::from_static("GET");
        response.headers_mut().insert(ALLOW, allowed);
        return response;
    }
    plain(
        StatusCode::OK,
        text(),
        "text/plain; version=0.0.4; charset=utf-8",
    )
}

/// The counters of the sockets, of the store and of what the clients share.
pub(super) fn text(server: &Server, receiver: &Receiver) -> String {
    let mut text = server.metrics().prometheus();
    let ((files, bytes), usage) = receiver
        .store()
        .map_or_else(Default::default, |store| (store.stored(), store.usage()));
    for (name, kind, help, value) in [
        (
            "udpack_files_stored_total",
            "counter",
            "Files stored since the start.",
            files,
        ),
        (
            "udpack_files_stored_bytes_total",
            "counter",
            "Bytes of the files stored since the start.",
            bytes,
        ),
        (
            "udpack_uploads_open",
            "gauge",
            "Uploads under way.",
            usage.open as u64,
        ),
        (
            "udpack_uploads_suspended_bytes",
            "gauge",
            "Bytes held by interrupted uploads.",
            usage.suspended,
        ),
    ] {
        text.push_str(&format!(
            "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"
        ));
    }
    type Read = fn(&Pool) -> u64;
    let kinds: [(&str, &str, &str, Read); 3] = [
        (
            "udpack_places_used",
            "gauge",
            "Places for the work of clients that are taken.",
            |pool| pool.used() as u64,
        ),
        (
            "udpack_places_waiting",
            "gauge",
            "Those who wait for a place.",
            |pool| pool.waiting() as u64,
        ),
        (
            "udpack_places_refused_total",
            "counter",
            "Refusals because there was no place and no room to wait for one.",
            Pool::refused,
        ),
    ];
    for (name, kind, help, read) in kinds {
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        for (pool, places) in receiver.pools() {
            text.push_str(&format!("{name}{{pool=\"{pool}\"}} {}\n", read(places)));
        }
    }
    text
}
