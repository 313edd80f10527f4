//! The port for browsers as bytes: what it answers, and what hostile clients get. Beside each of these a good one is served.
#![cfg(feature = "pages")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use udpack::{Deny, Hello, Identity, Origins, Peer, Server, Web};
use udpack_web::{HttpListener, Pages, Site};

#[path = "../../udpack/tests/hostile/tls.rs"]
mod trusting;

/// A server and its pages.
struct Served {
    address: SocketAddr,
    server: Server,
    _task: tokio::task::JoinHandle<()>,
}

async fn admit(_: Hello) -> Result<Peer, Deny> {
    Err(Deny::auth_failed())
}

async fn serve(web: Web) -> Served {
    let server = Server::builder()
        .identity(Identity::generate().expect("a key"))
        .auth(admit)
        .web(web.clone())
        .bind("127.0.0.1:0")
        .await
        .expect("a server");
    let listener = HttpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr();
    let site = Site::counters(|| "counted 7\n".to_owned());
    let site = site.pages(Pages::new(server.clone(), web));
    let task = tokio::spawn(async move { listener.serve(site).await.expect("served") });
    Served {
        address,
        server,
        _task: task,
    }
}

async fn start() -> Served {
    serve(Web::new().hosts(["files.example.com"])).await
}

impl Served {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address)
            .await
            .expect("a connection")
    }

    /// All that comes back for these bytes until the connection ends.
    async fn said(&self, bytes: &[u8]) -> String {
        exchange(self.connect().await, bytes).await
    }

    async fn get(&self, path: &str, headers: &str) -> String {
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\n{headers}Connection: close\r\n\r\n",
            self.address
        );
        self.said(request.as_bytes()).await
    }

    /// A good client is served at once.
    async fn is_well(&self) {
        let answer = self.get("/healthz", "").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.ends_with("\r\n\r\nok\n"), "{answer}");
    }
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> String {
    // Whoever is cut off while it writes or reads sees less, or nothing.
    let _ = stream.write_all(bytes).await;
    let mut text = Vec::new();
    let read = stream.read_to_end(&mut text);
    let _ = timeout(Duration::from_secs(30), read)
        .await
        .expect("an end");
    String::from_utf8(text).expect("text")
}

fn header<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    let (head, _) = answer.split_once("\r\n\r\n")?;
    let lines = head.lines().filter_map(|line| line.split_once(": "));
    let mut found = lines.filter(|(key, _)| key.eq_ignore_ascii_case(name));
    found.next().map(|(_, value)| value)
}

/// As a user does who clicks the warning away.
fn client() -> tokio_rustls::TlsConnector {
    Arc::new(trusting::tls(&[b"h2", b"http/1.1"])).into()
}

#[tokio::test]
async fn pages_come_with_their_type_a_policy_and_a_tag() {
    let served = start().await;
    let port = served.server.local_addr().port();
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/app.js", "text/javascript; charset=utf-8"),
        ("/mux.js", "text/javascript; charset=utf-8"),
        ("/worker.js", "text/javascript; charset=utf-8"),
        ("/app.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
    ] {
        let answer = served.get(path, "").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
        assert_eq!(header(&answer, "content-type"), Some(kind));
        assert_eq!(header(&answer, "cache-control"), Some("no-cache"));
        assert_eq!(header(&answer, "x-content-type-options"), Some("nosniff"));
        assert_eq!(header(&answer, "referrer-policy"), Some("no-referrer"));
        let opener = header(&answer, "cross-origin-opener-policy");
        assert_eq!(opener, Some("same-origin"));
        let resource = header(&answer, "cross-origin-resource-policy");
        assert_eq!(resource, Some("same-origin"));
        assert_eq!(header(&answer, "strict-transport-security"), None);
        assert!(header(&answer, "permissions-policy").is_some());
        let policy = header(&answer, "content-security-policy").expect("a policy");
        for rule in [
            "default-src 'none'; ",
            "script-src 'self' 'wasm-unsafe-eval'; ",
            "style-src 'self'; ",
            "worker-src 'self'; ",
            &format!(
                "connect-src 'self' ws://{} https://127.0.0.1:{port}; ",
                served.address
            ),
            "frame-ancestors 'none'",
        ] {
            assert!(policy.contains(rule), "{rule} is not in {policy}");
        }
        let tag = header(&answer, "etag").expect("a tag").to_owned();
        let known = format!("If-None-Match: \"x\", W/{tag}\r\n");
        let again = served.get(path, &known).await;
        assert!(again.starts_with("HTTP/1.1 304 "), "{again}");
        assert_eq!(header(&again, "etag"), Some(&*tag));
        let other = served.get(path, "If-None-Match: \"x\"\r\n").await;
        assert!(other.starts_with("HTTP/1.1 200 "), "{other}");
    }
    let head = format!(
        "HEAD / HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
        served.address
    );
    let answer = served.said(head.as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn pages_learn_where_the_server_is_and_by_which_certificates() {
    let served = start().await;
    let answer = served.get("/.well-known/udpack.json", "").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(header(&answer, "cache-control"), Some("no-store"));
    assert_eq!(header(&answer, "content-type"), Some("application/json"));
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    let said: serde_json::Value = serde_json::from_str(body).expect("JSON");
    let hex = |hash: [u8; 32]| hash.map(|byte| format!("{byte:02x}")).concat();
    let hashes = served.server.certificate_hashes().into_iter().map(hex);
    let limits = served.server.limits();
    assert_eq!(
        said,
        serde_json::json!({
            "protocol": "udpack/1",
            "host": null,
            "port": served.server.local_addr().port(),
            "path": "/udpack",
            "hashes": hashes.collect::<Vec<_>>(),
            "limits": { "frame": limits.frame, "channels": limits.channels },
        })
    );
}

#[tokio::test]
async fn only_pages_that_may_connect_learn_it_from_elsewhere() {
    let listed = vec!["https://app.example.com".to_owned()];
    let web = Web::new().hosts(["app.example.com"]);
    let served = serve(web.origins(Origins::SameHostAnd(listed))).await;
    let allowed = async |origin: &str| {
        let header_of = format!("Origin: {origin}\r\n");
        let answer = served.get("/.well-known/udpack.json", &header_of).await;
        header(&answer, "access-control-allow-origin").map(str::to_owned)
    };
    let app = "https://app.example.com";
    assert_eq!(allowed(app).await.as_deref(), Some(app));
    assert_eq!(allowed("https://evil.example.com").await, None);
    assert_eq!(allowed("null").await, None);
}

#[tokio::test]
async fn https_is_spoken_on_the_same_port() {
    let served = start().await;
    let name = ServerName::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST));
    let stream = client().connect(name, served.connect().await).await;
    let stream = stream.expect("a handshake");
    let (_, session) = stream.get_ref();
    assert_eq!(
        session.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    assert_eq!(session.alpn_protocol(), Some(&b"http/1.1"[..]));
    let leaf = session.peer_certificates().expect("a certificate")[0].clone();
    let hash = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256
        .tls13()
        .expect("TLS 1.3")
        .common
        .hash_provider
        .hash(&leaf);
    let current = served.server.certificate_hashes()[0];
    assert_eq!(hash.as_ref(), current, "the certificate of WebTransport");
    let request = b"GET /healthz HTTP/1.1\r\nHost: files.example.com\r\nConnection: close\r\n\r\n";
    let answer = exchange(stream, request).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn counters_are_for_this_machine() {
    let served = start().await;
    let answer = served.get("/metrics", "").await;
    assert!(answer.ends_with("\r\n\r\ncounted 7\n"), "{answer}");
}

#[tokio::test]
async fn names_that_others_may_own_are_refused() {
    let served = start().await;
    for (host, status) in [
        ("127.0.0.1", "200"),
        ("localhost:1", "200"),
        ("[::1]:45456", "200"),
        ("files.example.com", "200"),
        ("evil.example.com", "421"),
        ("127.0.0.1.evil.net:45456", "421"),
        ("", "400"),
        ("a@127.0.0.1", "400"),
        ("a b", "400"),
        ("\u{e4}", "400"),
    ] {
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let answer = served.said(request.as_bytes()).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{host}: {answer}"
        );
    }
    let two = b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n";
    assert!(served.said(two).await.starts_with("HTTP/1.1 400 "));
    let none = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n";
    assert!(served.said(none).await.starts_with("HTTP/1.1 400 "));
    served.is_well().await;
}

#[tokio::test]
async fn nothing_but_reading_is_done_and_nothing_but_the_pages_is_read() {
    let served = start().await;
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"] {
        let request = format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n");
        let answer = served.said(request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{method}: {answer}");
        assert_eq!(header(&answer, "allow"), Some("GET, HEAD"));
        assert_eq!(header(&answer, "connection"), Some("close"));
    }
    for path in [
        "/index.html",
        "/../app.js",
        "/x/../app.js",
        "/..%2fapp.js",
        "/%61pp.js",
        "//app.js",
        "/app.js/",
        "/./app.js",
        "/etc/passwd",
        "/../../../../etc/passwd",
        "/app.js%00",
        "/.well-known/",
    ] {
        let answer = served.get(path, "").await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{path}: {answer}");
    }
    for body in ["Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"] {
        let answer = served.get("/", body).await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{body}: {answer}");
        assert_eq!(header(&answer, "connection"), Some("close"));
    }
    served.is_well().await;
}

#[tokio::test]
async fn heads_that_are_none_or_too_large_end_their_connection() {
    let served = start().await;
    let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(20_000));
    let wide = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
        "x".repeat(20_000)
    );
    let many = format!(
        "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
        "X: y\r\n".repeat(100)
    );
    for (hostile, statuses) in [
        (long.as_bytes(), &["414", "431"][..]),
        (wide.as_bytes(), &["431"]),
        (many.as_bytes(), &["431"]),
        (b"\0\0\0\0\r\n\r\n", &["400"]),
        (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", &["400"]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &["400"]),
        (
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
            &["400"],
        ),
        (b"GET / HTTP/1.1\nHost : a\n\n", &["400"]),
    ] {
        let answer = served.said(hostile).await;
        let status = answer.split(' ').nth(1).unwrap_or("none");
        // Where bytes are left unread, the system may reset the connection instead.
        let sound = answer.is_empty() || statuses.contains(&status);
        assert!(
            sound,
            "{:?}: {answer}",
            String::from_utf8_lossy(&hostile[..20.min(hostile.len())])
        );
        served.is_well().await;
    }
    let old = format!("GET /healthz HTTP/1.0\r\nHost: {}\r\n\r\n", served.address);
    let answer = served.said(old.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
}

#[tokio::test]
async fn garbage_in_place_of_tls_ends_its_connection_and_no_other() {
    let served = start().await;
    for hostile in [
        &[22; 5][..],
        &[22, 3, 1, 0xff, 0xff],
        &[22, 3, 1, 0, 5, 1, 0, 0, 1, 0, 0],
        &[22; 70_000],
    ] {
        let mut stream = served.connect().await;
        let _ = stream.write_all(hostile).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = timeout(Duration::from_secs(30), stream.read_to_end(&mut answer))
            .await
            .expect("an end");
        // An alert at most.
        assert!(answer.len() <= 7, "{answer:?}");
        served.is_well().await;
    }
}

#[tokio::test(start_paused = true)]
async fn slow_clients_are_cut_off_and_others_served() {
    let served = start().await;
    for said in [
        &b""[..],
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        &[22, 3, 1],
    ] {
        let mut slow = served.connect().await;
        slow.write_all(said).await.expect("sent");
        served.is_well().await;
        let began = tokio::time::Instant::now();
        let mut answer = Vec::new();
        let _ = slow.read_to_end(&mut answer).await;
        let waited = began.elapsed();
        assert!(answer.is_empty(), "{answer:?}");
        assert!((5..=15).contains(&waited.as_secs()), "{said:?}: {waited:?}");
    }
    // One that comes back for more has as long again each time, up to the life of a connection.
    let mut stream = served.connect().await;
    let began = tokio::time::Instant::now();
    let mut rounds = 0;
    while rounds < 100 {
        let asked = stream
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            .await;
        let mut answer = [0; 4096];
        match stream.read(&mut answer).await {
            Ok(1..) if asked.is_ok() => rounds += 1,
            _ => break,
        }
        tokio::time::sleep(Duration::from_secs(8)).await;
    }
    assert!((7..=9).contains(&rounds), "{rounds} requests");
    assert!(began.elapsed() < Duration::from_secs(75));
}

#[tokio::test]
async fn one_address_cannot_take_all_places_and_all_of_its_time() {
    let served = start().await;
    let mut idle = Vec::new();
    for _ in 0..90 {
        idle.push(served.connect().await);
    }
    // It holds as many as it may; one more is dropped without a word.
    let request = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert_eq!(served.said(request).await, "");
    // Another address is served.
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    let other = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 0));
    socket.bind(other).expect("another address of this machine");
    let stream = socket.connect(served.address).await.expect("a connection");
    let answer = exchange(stream, request).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    drop(idle);
    // The rate of one address, on one connection.
    let mut stream = loop {
        let mut stream = served.connect().await;
        let _ = stream
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            .await;
        let mut answer = [0; 4096];
        if let Ok(1..) = stream.read(&mut answer).await {
            break stream;
        }
        tokio::task::yield_now().await;
    };
    let asked = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n".repeat(150);
    let answers = exchange(&mut stream, &asked).await;
    assert!(answers.contains("HTTP/1.1 429 "), "{answers}");
    let last = answers.rsplit_once("HTTP/1.1 ").expect("answers").1;
    assert!(
        last.starts_with("429 ") && last.contains("retry-after: 1\r\n"),
        "{last}"
    );
}
