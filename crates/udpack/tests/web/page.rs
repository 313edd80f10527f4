//! A page: somebody else's WebTransport, and the protocol's frames by hand.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::FutureExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use udpack::Server;
use web_transport_quinn::proto::ConnectRequest;
use web_transport_quinn::proto::http::{HeaderName, HeaderValue};
use web_transport_quinn::{
    ClientBuilder, RecvStream, SendStream, Session, SessionError, WebTransportError,
};

/// A session with a server.
pub(crate) struct Page {
    pub(crate) session: Session,
}

/// A stream of it.
pub(crate) struct Stream {
    pub(crate) send: SendStream,
    pub(crate) recv: RecvStream,
}

pub(crate) use url::Url;

/// Where a page connects to.
pub(crate) fn url(server: &Server, path: &str) -> Url {
    let url = format!("https://{}{path}", server.local_addr());
    url.parse().expect("a URL")
}

/// The bytes of a value.
pub(crate) fn body<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    rmp_serde::to_vec(value).expect("a value")
}

/// The frame of a message.
pub(crate) fn message<T: Serialize>(event: &str, data: T, id: Option<u64>) -> Vec<u8> {
    let body = match id {
        Some(id) => body(&(event, data, id)),
        None => body(&(event, data)),
    };
    let length = u32::try_from(body.len()).expect("a small one");
    [&length.to_be_bytes()[..], &body].concat()
}

/// The value of these bytes.
pub(crate) fn value<T: DeserializeOwned>(bytes: &[u8]) -> T {
    rmp_serde::from_slice(bytes).expect("such a value")
}

impl Page {
    pub(crate) async fn connect(server: &Server) -> Self {
        let page = Self::at(server, "/udpack", None).await;
        page.unwrap_or_else(|status| panic!("no session: {status}"))
    }

    /// Fails with the status, or 0 where there is none.
    pub(crate) async fn at(server: &Server, path: &str, origin: Option<&str>) -> Result<Self, u16> {
        let mut request = ConnectRequest::new(url(server, path));
        if let Some(origin) = origin {
            let origin = HeaderValue::from_str(origin).expect("a sound header");
            request = request.with_header(HeaderName::from_static("origin"), origin);
        }
        let client = ClientBuilder::new().dangerous();
        let client = client.with_no_certificate_verification().expect("a client");
        match client.connect(request).await {
            Ok(session) => Ok(Self { session }),
            Err(error) => Err(status(&error)),
        }
    }

    /// Says hello on the session's first stream.
    pub(crate) async fn hello(&self, token: &str) -> Stream {
        let hello = Value::from_iter([
            ("v", Value::from(1)),
            ("token", token.into()),
            ("agent", "page".into()),
        ]);
        let stream = self.session.open_bi().await.expect("a stream");
        let mut stream = Stream::of(stream);
        stream.send(&message("$hello", hello, None)).await;
        stream
    }

    /// Opens a channel, as soon as it may.
    pub(crate) async fn open(&self, id: u64, name: &str) -> Stream {
        let stream = self.session.open_bi().await.expect("a stream");
        Stream::of(stream).begin(id, name).await
    }

    /// Opens a channel, if it may at once.
    pub(crate) async fn try_open(&self, id: u64, name: &str) -> Option<Stream> {
        let stream = self.session.open_bi().now_or_never()?;
        Some(Stream::of(stream.expect("a stream")).begin(id, name).await)
    }

    /// The next channel that the server opens.
    pub(crate) async fn accept(&self) -> Stream {
        Stream::of(self.session.accept_bi().await.expect("a stream"))
    }

    /// Sends these bytes on a stream of their own.
    pub(crate) async fn send_alone(&self, bytes: &[u8]) {
        let mut stream = self.session.open_uni().await.expect("a stream");
        stream.write_all(bytes).await.expect("sent");
        stream.finish().expect("open");
    }

    /// With what code and text the server has closed the session.
    pub(crate) async fn closed(&self) -> (u32, String) {
        let closed = tokio::time::timeout(Duration::from_secs(10), self.session.closed());
        said(closed.await.expect("closed in time"))
    }
}

fn status(error: &web_transport_quinn::ClientError) -> u16 {
    use web_transport_quinn::ClientError as E;
    use web_transport_quinn::proto::ConnectError as P;
    match error {
        E::HttpError(web_transport_quinn::ConnectError::ProtoError(P::WrongStatus(Some(
            status,
        )))) => status.as_u16(),
        _ => 0,
    }
}

impl Stream {
    fn of((send, recv): (SendStream, RecvStream)) -> Self {
        Self { send, recv }
    }

    async fn begin(mut self, id: u64, name: &str) -> Self {
        let open = Value::from_iter([("id", Value::from(id)), ("name", name.into())]);
        self.send(&message("$open", open, None)).await;
        self
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.send.write_all(bytes).await.expect("sent");
    }

    async fn frame(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.recv.read_exact(&mut length).await.expect("a frame");
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        self.recv.read_exact(&mut body).await.expect("its body");
        body
    }

    /// The next message: event, data and id.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> (String, T, Option<u64>) {
        let body = self.frame().await;
        // An array of two, three or four: the last is a deadline.
        match body[0] {
            0x92 => {
                let (event, data) = value(&body);
                (event, data, None)
            }
            0x93 => {
                let (event, data, id) = value(&body);
                (event, data, Some(id))
            }
            _ => {
                let (event, data, id, _): (_, _, _, u64) = value(&body);
                (event, data, Some(id))
            }
        }
    }

    /// The next message of the protocol.
    pub(crate) async fn control<T: DeserializeOwned>(&mut self) -> (String, T) {
        value(&self.frame().await)
    }

    pub(crate) async fn welcome(&mut self) -> BTreeMap<String, Value> {
        let (event, welcome) = self.control().await;
        assert_eq!(event, "$welcome");
        welcome
    }

    /// Whether nothing follows.
    pub(crate) async fn ended(&mut self) -> bool {
        matches!(self.recv.read_chunk(1, true).await, Ok(None))
    }
}

/// Of the session's errors, what the server has said.
pub(crate) fn said(error: SessionError) -> (u32, String) {
    match error {
        SessionError::WebTransportError(WebTransportError::Closed(code, text)) => (code, text),
        error => panic!("no close: {error}"),
    }
}
