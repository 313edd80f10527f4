//! Sessions over WebSockets, through TLS and HTTP on loopback: as a client of good will has them, and what is refused.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use udpack::{Client, ConnectError, Identity, Server, Transport, TransportChoice, Web};
use udpack_web::{HttpListener, Site};

#[path = "common/serving.rs"]
mod serving;
#[path = "../../udpack/tests/hostile/tls.rs"]
mod trusting;

use serving::{bounded, client, serving};

#[tokio::test]
async fn a_session_goes_over_a_websocket() {
    bounded(async {
        let (server, address) = serving().await;
        let socket = client(&server).connect(&address.to_string()).await.unwrap();
        assert_eq!(socket.transport(), Transport::WebSocket { origin: None });
        assert_eq!(socket.remote_address(), address);
        let channel = socket.open("echo").await.unwrap();
        let long = "x".repeat(1 << 20);
        let answer: String = channel.request("echo", &long).await.unwrap();
        assert!(answer == long);
        let there = server.sockets();
        assert_eq!(there.len(), 1);
        assert!(there[0].remote_address().ip().is_loopback());
        socket.close(udpack::CloseCode::NORMAL, "").await;
    })
    .await;
}

#[tokio::test]
async fn trust_and_tokens_are_as_over_udp() {
    bounded(async {
        let (server, address) = serving().await;
        let address = address.to_string();
        let other = Identity::generate().unwrap().fingerprint();
        let error = client(&server).pin(other).connect(&address).await;
        assert!(matches!(error, Err(ConnectError::PinMismatch { .. })));
        let error = client(&server).token("wrong").connect(&address).await;
        match error {
            Err(ConnectError::Denied(reason)) => {
                assert_eq!(reason.code, udpack::CloseCode::AUTH_FAILED);
            }
            other => panic!("{other:?}"),
        }
        let without = Client::builder().token("right");
        let without = without.transport(TransportChoice::WebSocket);
        assert!(without.connect(&address).await.is_err());
    })
    .await;
}

/// Nothing answers over UDP at the port, as behind a firewall.
#[tokio::test]
async fn tcp_is_taken_where_udp_is_silent() {
    bounded(async {
        let (server, address) = serving().await;
        let _mute = std::net::UdpSocket::bind(address).unwrap();
        let client = client(&server).transport(TransportChoice::Auto);
        let client = client.build().unwrap();
        for _ in 0..2 {
            let socket = client.connect(&address.to_string()).await.unwrap();
            assert_eq!(socket.transport(), Transport::WebSocket { origin: None });
        }
        // And UDP where both answer.
        let udp = server.local_addr();
        let listener = HttpListener::bind(udp).await.unwrap();
        tokio::spawn(listener.serve(Site::of(server.clone(), Web::new())));
        let socket = client.connect(&udp.to_string()).await.unwrap();
        assert_eq!(socket.transport(), Transport::Quic);
    })
    .await;
}

/// The status of the answer to these bytes inside TLS; `None` where there is none.
async fn answer(server: &Server, address: SocketAddr, request: &str) -> Option<u16> {
    let certificates = server.certificate_hashes();
    assert!(!certificates.is_empty());
    let config = trusting::tls(&[b"http/1.1"]);
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = "localhost".try_into().unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(name, tcp).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = Vec::new();
    let mut some = [0; 1024];
    // An upgraded connection does not end by itself.
    while !text.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut some).await {
            Ok(count @ 1..) => text.extend_from_slice(&some[..count]),
            _ => break,
        }
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    text.split(' ').nth(1)?.parse().ok()
}

#[tokio::test]
async fn what_asks_for_no_websocket_as_it_should_gets_a_status() {
    bounded(async {
        let (server, address) = serving().await;
        let sound = [
            "GET /udpack HTTP/1.1",
            "host: localhost",
            "connection: keep-alive, Upgrade",
            "upgrade: WebSocket",
            "sec-websocket-version: 13",
            "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
            "sec-websocket-protocol: other, qmux-02.udpack-1",
        ];
        let with = |at: usize, line: &str| {
            let mut lines = sound.to_vec();
            lines[at] = line;
            lines.retain(|line| !line.is_empty());
            format!("{}\r\n\r\n", lines.join("\r\n"))
        };
        let cases = [
            (with(0, sound[0]), 101),
            (with(0, "GET /udpack?x HTTP/1.1"), 101),
            (with(1, "host: localhost\r\norigin: https://localhost"), 101),
            (with(0, "GET /other HTTP/1.1"), 404),
            (with(0, "GET / HTTP/1.1"), 404),
            (with(0, "GET /metrics HTTP/1.1"), 404),
            (with(0, "POST /udpack HTTP/1.1"), 405),
            (with(0, "HEAD /udpack HTTP/1.1"), 400),
            (with(0, "GET /udpack HTTP/1.0"), 400),
            (with(0, "BREW"), 400),
            (with(2, ""), 426),
            (with(2, "connection: close"), 426),
            (with(3, ""), 426),
            (with(3, "upgrade: h2c"), 426),
            (with(4, ""), 426),
            (with(4, "sec-websocket-version: 8"), 426),
            (with(5, ""), 400),
            (with(5, "sec-websocket-key: short"), 400),
            (with(6, ""), 400),
            (with(6, "sec-websocket-protocol: qmux-01.udpack-1"), 400),
            (
                with(1, "host: localhost\r\norigin: https://evil.example"),
                403,
            ),
            (with(1, "host: localhost\r\norigin: null"), 403),
            (with(1, "host: localhost\r\norigin: a\r\norigin: b"), 403),
            (with(1, "host: localhost\r\ncontent-length: 5"), 413),
        ];
        for (request, status) in cases {
            let got = answer(&server, address, &request).await;
            assert_eq!(got, Some(status), "{request}");
        }
        let socket = client(&server).connect(&address.to_string()).await;
        assert!(socket.is_ok());
    })
    .await;
}
