//! Browsers' sessions end to end, with somebody else's WebTransport client.

mod common;
#[path = "web/page.rs"]
mod page;

use std::time::Duration;

use common::{TOKEN, bind, bounded, echo, server};
use page::{Page, Stream, message};
use udpack::{Channel, CloseCode, Limits, Origins, Server, Transport, Web, WebCertificate};

/// A server that serves browsers.
async fn site(change: impl FnOnce(udpack::ServerBuilder) -> udpack::ServerBuilder) -> Server {
    bind(change(server().web(Web::new()))).await
}

/// A page that was let in, and its control stream.
async fn admitted(server: &Server) -> (Page, Stream) {
    let page = Page::connect(server).await;
    let mut control = page.hello(TOKEN).await;
    control.welcome().await;
    (page, control)
}

#[tokio::test]
async fn a_page_is_let_in_asks_and_is_answered() {
    bounded(async {
        let server = site(|server| server.channel("math", echo)).await;
        let page = Page::connect(&server).await;
        let mut control = page.hello(TOKEN).await;
        let welcome = control.welcome().await;
        assert!(welcome.contains_key("session"), "{welcome:?}");

        let mut math = page.open(1, "math").await;
        for n in 1..=20_u64 {
            math.send(&message("echo", n, Some(n))).await;
        }
        for n in 1..=20_u64 {
            let (event, data, id) = math.next::<u64>().await;
            assert_eq!((event.as_str(), data, id), ("$reply", n, Some(n)));
        }

        let socket = server.sockets().pop().expect("one socket");
        assert_eq!(socket.transport(), Transport::WebTransport { origin: None });
        assert_eq!(socket.agent(), "page");
    })
    .await;
}

#[tokio::test]
async fn all_channels_may_be_opened_at_once_and_for_each_that_ends_another() {
    bounded(async {
        let server = site(|server| server.channel("echo", echo)).await;
        let (page, _control) = admitted(&server).await;
        let mut channels = std::collections::VecDeque::new();
        // A browser does not wait for permission: it must be there.
        for id in 1..=200_u64 {
            if channels.len() == 64 {
                let mut oldest: Stream = channels.pop_front().expect("one");
                oldest.send.finish().expect("open");
                assert!(oldest.ended().await);
            }
            let stream = page.try_open(id, "echo").await;
            channels.push_back(stream.unwrap_or_else(|| panic!("channel {id} is not permitted")));
        }
        for (n, channel) in channels.iter_mut().enumerate() {
            channel.send(&message("echo", n as u64, Some(7))).await;
            let (_, data, _) = channel.next::<u64>().await;
            assert_eq!(data, n as u64);
        }
        // A quarter more at most, because QUIC's credit comes back in heaps.
        let mut more = Vec::new();
        while let Some(stream) = page.try_open(201 + more.len() as u64, "echo").await {
            more.push(stream);
        }
        assert!(more.len() <= 18, "{} more", more.len());
    })
    .await;
}

#[tokio::test]
async fn the_server_opens_channels_to_a_page() {
    bounded(async {
        let server = site(|server| server).await;
        let (page, _control) = admitted(&server).await;
        let socket = server.accept().await.expect("a socket");
        let channel = socket.open("news").await.expect("a channel");
        let asking = async { channel.request::<u64, u64>("how many", &3_u64).await };
        let answering = async {
            let mut stream = page.accept().await;
            let (event, _) = stream.control::<serde_json::Value>().await;
            assert_eq!(event, "$open");
            let (event, data, id) = stream.next::<u64>().await;
            assert_eq!((event.as_str(), data), ("how many", 3));
            stream.send(&message("$reply", 4_u64, id)).await;
            stream
        };
        let (answer, _stream) = tokio::join!(asking, answering);
        assert_eq!(answer.expect("an answer"), 4);
    })
    .await;
}

#[tokio::test]
async fn volatile_messages_go_both_ways_in_datagrams_and_streams() {
    bounded(async {
        let server = site(|server| server).await;
        let (page, _control) = admitted(&server).await;
        let socket = server.accept().await.expect("a socket");

        page.session
            .send_datagram(page::body(&("at", 5_u64)).into())
            .expect("sent");
        let message = socket.recv_volatile().await.expect("a message");
        assert_eq!(
            (message.event(), message.data::<u64>().ok()),
            ("at", Some(5))
        );
        let large = "x".repeat(5_000);
        page.send_alone(&page::body(&("large", &large))).await;
        let message = socket.recv_volatile().await.expect("a message");
        assert_eq!(message.data::<String>().ok().as_ref(), Some(&large));

        socket.send_volatile("at", &6_u64).expect("sent");
        let datagram = page.session.read_datagram().await.expect("a datagram");
        let (event, data, seq): (String, u64, u64) = page::value(&datagram);
        assert_eq!((event.as_str(), data, seq), ("at", 6, 1));
        socket.send_volatile("large", &large).expect("sent");
        let mut stream = page.session.accept_uni().await.expect("a stream");
        let body = stream.read_to_end(1 << 20).await.expect("to its end");
        let (_, data, seq): (String, String, u64) = page::value(&body);
        assert_eq!((data, seq), (large, 2));
    })
    .await;
}

#[tokio::test]
async fn a_page_hears_code_and_text_of_a_close() {
    bounded(async {
        let server = site(|server| server).await;
        let (page, _control) = admitted(&server).await;
        let socket = server.accept().await.expect("a socket");
        let text = "ü".repeat(200);
        socket.abort(CloseCode::new(0x1234), &text);
        let (code, said) = page.closed().await;
        assert_eq!((code, said.as_str()), (0x1234, &*"ü".repeat(128)));
    })
    .await;
}

#[tokio::test]
async fn a_server_hears_code_and_text_of_a_close() {
    bounded(async {
        let server = site(|server| server).await;
        let (page, _control) = admitted(&server).await;
        let socket = server.accept().await.expect("a socket");
        page.session.close(0x2001, b"that was all");
        let reason = socket.closed().await;
        assert_eq!(reason.code, CloseCode::new(0x2001));
        assert_eq!(reason.text, "that was all");
        assert_eq!(reason.by, udpack::Side::Peer);
    })
    .await;
}

#[tokio::test]
async fn a_refusal_comes_as_code_and_text_of_a_session_that_stood() {
    bounded(async {
        let server = site(|server| server).await;
        let page = Page::connect(&server).await;
        let _control = page.hello("another token").await;
        let (code, text) = page.closed().await;
        assert_eq!(CloseCode::new(code.into()), CloseCode::AUTH_FAILED);
        assert!(!text.is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_close_of_the_server_reaches_its_pages() {
    bounded(async {
        let server = site(|server| server).await;
        let (page, _control) = admitted(&server).await;
        let (closed, ()) = tokio::join!(
            page.closed(),
            server.close(CloseCode::SHUTTING_DOWN, "see you")
        );
        assert_eq!(closed, (1, "see you".to_owned()));
    })
    .await;
}

#[tokio::test]
async fn resets_and_stops_carry_the_protocols_codes_both_ways() {
    bounded(async {
        let server = site(|server| server).await;
        let (page, _control) = admitted(&server).await;
        let socket = server.accept().await.expect("a socket");

        let mut stream = page.open(1, "one").await;
        let channel = socket.accept_channel().await.expect("a channel");
        stream.send.reset(67).expect("open");
        let reason = closed(&channel).await;
        assert_eq!(reason.code, CloseCode::HANDLER_FAILED);

        let mut stream = page.open(2, "two").await;
        let channel = socket.accept_channel().await.expect("a channel");
        stream.recv.stop(0x42).expect("open");
        while channel.send("more", &()).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert_eq!(channel.closed().await.code, CloseCode::CANCELLED);

        // A volatile stream that is too large is stopped, with a code.
        let mut alone = page.session.open_uni().await.expect("a stream");
        let much = vec![0; 64 << 10];
        let error = loop {
            if let Err(error) = alone.write_all(&much).await {
                break error;
            }
        };
        let web_transport_quinn::WriteError::Stopped(code) = error else {
            panic!("{error}");
        };
        assert_eq!(CloseCode::new(code.into()), CloseCode::FRAME_TOO_LARGE);
    })
    .await;
}

async fn closed(channel: &Channel) -> udpack::CloseReason {
    loop {
        match channel.recv().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("finished"),
            Err(error) => return error.reason().clone(),
        }
    }
}

#[tokio::test]
async fn what_was_sent_last_is_read_although_the_server_wants_no_more() {
    bounded(async {
        let last = |channel: Channel| async move { channel.send("last", "word").await };
        let server = site(|server| server.channel("last", last)).await;
        let (page, _control) = admitted(&server).await;
        let mut stream = page.open(1, "last").await;
        let (event, data, _) = stream.next::<String>().await;
        assert_eq!((event.as_str(), data.as_str()), ("last", "word"));
        assert!(stream.ended().await);
        // The handler is gone, and with it the reader. Nobody says stop, for a browser would throw away what it has.
        let stopped = tokio::time::timeout(Duration::from_millis(200), stream.send.stopped());
        assert!(stopped.await.is_err());
        // Who goes on all the same is stopped in the end.
        let much = vec![0; 64 << 10];
        let stopped = async { while stream.send.write_all(&much).await.is_ok() {} };
        stopped.await;
        // And who ends is let go, so that others may come.
        for id in 2..=200_u64 {
            let mut stream = page.open(id, "last").await;
            stream.next::<String>().await;
            stream.send.finish().expect("open");
        }
    })
    .await;
}

#[tokio::test]
async fn a_page_of_another_host_or_at_another_path_is_refused_by_status() {
    bounded(async {
        let only = Origins::only(["https://a.example"]);
        let strict = site(|server| server.web(Web::new().origins(only))).await;
        let same = site(|server| server).await;
        let any = site(|server| server.web(Web::new().path("/here").origins(Origins::Any))).await;
        for (server, path, origin, status) in [
            (&strict, "/udpack", Some("https://a.example"), 200),
            (&strict, "/udpack?x=1", None, 200),
            (&strict, "/udpack", Some("https://b.example"), 403),
            (&strict, "/", Some("https://a.example"), 404),
            (&strict, "/udpack/", None, 404),
            (&same, "/udpack", Some("https://127.0.0.1"), 200),
            (&same, "/udpack", Some("http://127.0.0.1:8080"), 200),
            (&same, "/udpack", Some("https://localhost"), 403),
            (&same, "/udpack", Some("null"), 403),
            (&any, "/here", Some("null"), 200),
            (&any, "/udpack", None, 404),
        ] {
            let name = format!("{path} from {origin:?}");
            match Page::at(server, path, origin).await {
                Ok(page) => {
                    assert_eq!(status, 200, "{name}");
                    let mut control = page.hello(TOKEN).await;
                    control.welcome().await;
                    let heard =
                        |socket: &udpack::Socket| socket.transport().origin().map(str::to_owned);
                    let sockets = server.sockets();
                    let heard: Vec<_> = sockets.iter().map(heard).collect();
                    assert!(
                        heard.contains(&origin.map(str::to_owned)),
                        "{name}: {heard:?}"
                    );
                }
                Err(said) => assert_eq!(said, status, "{name}"),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn other_clients_use_the_same_port() {
    bounded(async {
        let server = site(|server| server.channel("echo", echo)).await;
        let (_page, _control) = admitted(&server).await;
        let socket = common::connect(&server).await;
        assert_eq!(socket.transport(), Transport::Quic);
        let channel = socket.open("echo").await.expect("a channel");
        assert_eq!(channel.request::<u64, u64>("echo", &5).await.expect("5"), 5);
        assert_eq!(server.sockets().len(), 2);
    })
    .await;
}

#[tokio::test]
async fn without_the_option_nobody_speaks_http3() {
    bounded(async {
        let server = bind(server()).await;
        assert!(Page::at(&server, "/udpack", None).await.is_err());
    })
    .await;
}

#[tokio::test]
async fn a_page_that_knows_the_hashes_needs_no_other_trust() {
    bounded(async {
        let server = site(|server| server).await;
        let hashes = server.certificate_hashes();
        assert_eq!(hashes.len(), 2);
        let known = |hashes: Vec<[u8; 32]>| {
            let hashes = hashes.into_iter().map(Vec::from).collect();
            web_transport_quinn::ClientBuilder::new()
                .with_server_certificate_hashes(hashes)
                .expect("a client")
        };
        let url = page::url(&server, "/udpack");
        let connected = known(hashes).connect(url.clone()).await;
        connected.expect("the current one is among them");
        assert!(known(vec![[0; 32]]).connect(url).await.is_err());
    })
    .await;
}

#[tokio::test]
async fn with_a_certificate_of_an_authority_a_page_needs_no_hash_and_others_pin_as_before() {
    bounded(async {
        let key = rcgen::KeyPair::generate().expect("a key");
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let params = rcgen::CertificateParams::new(names).expect("names");
        let signed = params.self_signed(&key).expect("a certificate");
        let dir = tempfile::tempdir().expect("a directory");
        let (chain, secret) = (dir.path().join("chain.pem"), dir.path().join("key.pem"));
        std::fs::write(&chain, signed.pem()).expect("written");
        std::fs::write(&secret, key.serialize_pem()).expect("written");
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&secret, private).expect("a file of ours");
        let certificate = WebCertificate::load(&chain, &secret).expect("sound files");
        let web = Web::new().certificate(certificate);
        let server = bind(server().web(web)).await;
        assert!(server.certificate_hashes().is_empty());

        let trusting = web_transport_quinn::ClientBuilder::new()
            .with_server_certificates(vec![signed.der().clone()])
            .expect("a client");
        let url = page::url(&server, "/udpack");
        trusting.connect(url).await.expect("a session");
        let socket = common::connect(&server).await;
        assert_eq!(socket.transport(), Transport::Quic);
    })
    .await;
}

#[tokio::test]
async fn limits_hold_for_pages_as_for_others() {
    bounded(async {
        let limits = Limits {
            frame: 4096,
            channels: 1,
            ..Limits::default()
        };
        let server = site(|server| server.limits(limits).channel("echo", echo)).await;
        let page = Page::connect(&server).await;
        let mut control = page.hello(TOKEN).await;
        let welcome = control.welcome().await;
        assert_eq!(welcome["limits"]["channels"], 1);
        let mut one = page.open(1, "echo").await;
        let _two = page.try_open(2, "echo").await;
        assert!(page.try_open(3, "echo").await.is_none());
        one.send(&[0, 0, 0x20, 0]).await;
        let (event, data) = one.control::<serde_json::Value>().await;
        assert_eq!((event.as_str(), &data["code"]), ("$close", &0x11.into()));
        assert!(one.ended().await);
    })
    .await;
}

#[tokio::test]
async fn a_session_without_a_word_is_over_in_time() {
    bounded(async {
        let timeouts = udpack::Timeouts {
            auth: Duration::from_millis(200),
            ..common::timeouts()
        };
        let server = site(|server| server.timeouts(timeouts)).await;
        let page = Page::connect(&server).await;
        let (code, _) = page.closed().await;
        assert_eq!(CloseCode::new(code.into()), CloseCode::AUTH_TIMEOUT);
    })
    .await;
}
