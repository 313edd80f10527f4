//! Sessions over TCP through a proxy: what it is asked, how the client takes what it answers, and for whom it is not asked.

#[path = "common/serving.rs"]
mod serving;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serving::{LOCAL, bounded, client, serving};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use udpack::{CloseCode, ConnectError, Proxy, Socket, Timeouts, Transport, TransportChoice};

/// What a proxy does once it was asked.
#[derive(Clone, Copy)]
enum Does {
    /// Leads to the server at this address, whatever was asked for.
    Lead(SocketAddr),
    Say(&'static str),
    /// Says headers without end.
    Talk,
    /// Says nothing.
    Wait,
}

/// A proxy, and the heads of what it was asked.
struct Running {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Running {
    async fn new(does: Does) -> Self {
        let listener = TcpListener::bind(LOCAL).await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let all = asked.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, does, all.clone()));
            }
        });
        Self { address, asked }
    }

    fn url(&self, user: &str) -> Proxy {
        format!("http://{user}{}", self.address).parse().unwrap()
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn serve(mut stream: TcpStream, does: Does, asked: Arc<Mutex<Vec<String>>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    asked.lock().unwrap().push(String::from_utf8(head).unwrap());
    match does {
        Does::Lead(server) => {
            let mut server = TcpStream::connect(server).await.unwrap();
            let answer = b"HTTP/1.1 200 Connection established\r\n\r\n";
            stream.write_all(answer).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut stream, &mut server).await;
        }
        Does::Say(answer) => {
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        }
        Does::Talk => {
            let begin = b"HTTP/1.1 200 Connection established\r\n";
            stream.write_all(begin).await.unwrap();
            // The client has heard enough at some time.
            while stream.write_all(b"X-More: of the same\r\n").await.is_ok() {}
        }
        Does::Wait => std::future::pending().await,
    }
}

async fn echoes(socket: &Socket) {
    let channel = socket.open("echo").await.unwrap();
    let answer: String = channel.request("echo", "text").await.unwrap();
    assert_eq!(answer, "text");
}

#[tokio::test]
async fn a_session_goes_through_a_proxy_that_alone_knows_the_name() {
    bounded(async {
        let (server, address) = serving().await;
        let proxy = Running::new(Does::Lead(address)).await;
        let client = client(&server).proxy(proxy.url("anna:s%65cret@"));
        let socket = client.connect("server.invalid:4433").await.unwrap();
        assert_eq!(socket.transport(), Transport::WebSocket { origin: None });
        assert_eq!(socket.remote_address(), proxy.address);
        echoes(&socket).await;
        let expected = "CONNECT server.invalid:4433 HTTP/1.1\r\nHost: server.invalid:4433\r\n\
                        Proxy-Authorization: Basic YW5uYTpzZWNyZXQ=\r\n\r\n";
        assert_eq!(proxy.asked(), [expected]);
        socket.close(CloseCode::NORMAL, "").await;
    })
    .await;
}

/// A name that no resolver here knows.
const NOWHERE: &str = "[fe80::1%nothing]:4433";

#[tokio::test]
async fn who_goes_by_both_takes_the_proxy_where_udp_leads_nowhere() {
    bounded(async {
        let (server, address) = serving().await;
        let proxy = Running::new(Does::Lead(address)).await;
        let client = client(&server).transport(TransportChoice::Auto);
        let client = client.proxy(proxy.url("")).build().unwrap();
        let socket = client.connect(NOWHERE).await.unwrap();
        echoes(&socket).await;
        assert_eq!(proxy.asked().len(), 1);
        // UDP does not lead through it.
        let socket = client.connect(&server.local_addr().to_string()).await;
        assert_eq!(socket.unwrap().transport(), Transport::Quic);
        assert_eq!(proxy.asked().len(), 1);
        let quic = client.over(TransportChoice::Quic);
        let error = quic.connect(NOWHERE).await.unwrap_err();
        assert!(matches!(error, ConnectError::Resolve { .. }), "{error}");
        assert_eq!(proxy.asked().len(), 1);
    })
    .await;
}

#[tokio::test]
async fn the_proxy_is_not_asked_for_its_exceptions() {
    bounded(async {
        let (server, address) = serving().await;
        let proxy = Running::new(Does::Say("HTTP/1.1 403 No\r\n\r\n")).await;
        let through = proxy.url("").except("127.0.0.0/8,localhost");
        let client = client(&server).proxy(through);
        let socket = client.connect(&address.to_string()).await.unwrap();
        assert_eq!(socket.remote_address(), address);
        assert!(proxy.asked().is_empty());
    })
    .await;
}

#[tokio::test]
async fn what_the_proxy_answers_instead_is_told() {
    bounded(async {
        let (server, _) = serving().await;
        let timeouts = Timeouts {
            handshake: Duration::from_millis(500),
            ..Timeouts::default()
        };
        for (does, user, text, retry) in [
            (
                Does::Say("HTTP/1.1 407 x\r\n\r\n"),
                "",
                "refuses: it wants a user and a password (407)",
                false,
            ),
            (
                Does::Say("HTTP/1.1 407 x\r\n\r\n"),
                "anna:secret@",
                "refuses: it does not accept the user and password (407)",
                false,
            ),
            (
                Does::Say("HTTP/1.1 403 x\r\n\r\n"),
                "",
                "refuses: it does not let through to server.invalid:4433 (403)",
                false,
            ),
            (
                Does::Say("HTTP/1.1 502 x\r\n\r\n"),
                "",
                "does not lead to the server: it answers 502",
                true,
            ),
            (
                Does::Say("HTTP/1.1 200 x\r\n\r\nand more"),
                "",
                "does not lead to the server: it says more than its answer",
                true,
            ),
            (
                Does::Talk,
                "",
                "does not lead to the server: its answer is too long",
                true,
            ),
            (
                Does::Wait,
                "",
                "does not lead to the server: it gives no answer in time",
                true,
            ),
        ] {
            let proxy = Running::new(does).await;
            let timeouts = match does {
                Does::Wait => timeouts.clone(),
                _ => Timeouts::default(),
            };
            let client = client(&server).timeouts(timeouts).proxy(proxy.url(user));
            let error = client.connect("server.invalid:4433").await.unwrap_err();
            let expected = format!("the proxy {} {text}", proxy.address);
            assert_eq!(error.to_string(), expected);
            assert_eq!(error.retry(), retry, "{error}");
            assert!(!format!("{error:?}").contains("secret"));
        }
        let nobody = {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            listener.local_addr().unwrap()
        };
        let client = client(&server).proxy(nobody.to_string().parse().unwrap());
        let error = client.connect("server.invalid:4433").await.unwrap_err();
        let expected =
            format!("the proxy {nobody} does not lead to the server: connection refused");
        assert_eq!(error.to_string(), expected);
    })
    .await;
}
