//! Browsers that mean harm or do not know better: what each gets of HTTP/3 and WebTransport, and that nobody else notices.

#[allow(dead_code, reason = "the hostile tests of QUIC use the rest")]
#[path = "hostile/bare.rs"]
mod bare;
#[path = "web/cases.rs"]
mod cases;
mod common;
#[allow(dead_code, reason = "the hostile tests of QUIC use the rest")]
#[path = "hostile/watch.rs"]
mod watch;

use std::time::Duration;

use bare::Bare;
use bytes::Bytes;
use cases::{Act, Case, Expect, connect, datagram_of, settings, stream_of};
use common::TOKEN;
use quinn::{ConnectionError, RecvStream, SendStream};
use udpack::wire::Message;
use udpack::{CloseCode, Limits, Timeouts, Web};
use watch::{ALONE, Site, within};

/// Runs one test by itself, and not for ever.
async fn alone<F: Future>(test: F) -> F::Output {
    let _alone = ALONE.lock().await;
    within(90, "the test", "all of it", test).await
}

async fn site() -> Site {
    Site::new(watch::builder().web(Web::new())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_hostile_page_gets_its_answer_and_nobody_else_notices() {
    alone(async {
        let cases = cases::all();
        assert!(cases.len() >= 90, "{} cases", cases.len());
        let site = site().await;
        for group in cases.chunks(10) {
            for case in group {
                within(10, &case.name, "the case", run(&site, case)).await;
                site.others_live(&case.name).await;
            }
            let names: Vec<_> = group.iter().map(|case| case.name.as_str()).collect();
            site.check(&names.join(", ")).await;
        }
    })
    .await;
}

/// A connection that speaks `h3`, and the halves of its streams: what is dropped tells the server something.
struct Peer {
    conn: quinn::Connection,
    sends: Vec<Option<SendStream>>,
    recvs: Vec<Option<RecvStream>>,
    now: usize,
    /// Where the request is.
    request: Option<usize>,
    settings: bool,
}

impl Peer {
    async fn dial(site: &Site) -> Self {
        Self::dial_with(site, bare::quic(bare::tls(&[b"h3"]), 1 << 20)).await
    }

    async fn dial_with(site: &Site, config: quinn::ClientConfig) -> Self {
        let dialled = Bare::dial(&site.peers, site.address(), config).await;
        Self {
            conn: dialled.expect("the handshake is sound").conn,
            sends: Vec::new(),
            recvs: Vec::new(),
            now: 0,
            request: None,
            settings: false,
        }
    }

    /// Writes what the server still takes.
    async fn write(&mut self, bytes: &[u8]) {
        if let Some(stream) = &mut self.sends[self.now] {
            let _ = stream.write_chunk(Bytes::copy_from_slice(bytes)).await;
        }
    }

    async fn uni(&mut self, bytes: &[u8]) {
        let Ok(send) = self.conn.open_uni().await else {
            return;
        };
        self.sends.push(Some(send));
        self.recvs.push(None);
        self.now = self.sends.len() - 1;
        self.write(bytes).await;
    }

    async fn bi(&mut self, bytes: &[u8]) {
        let Ok((send, recv)) = self.conn.open_bi().await else {
            return;
        };
        self.sends.push(Some(send));
        self.recvs.push(Some(recv));
        self.now = self.sends.len() - 1;
        self.write(bytes).await;
    }

    /// The id of the session.
    fn session(&self) -> u64 {
        let stream = self.request.and_then(|at| self.sends[at].as_ref());
        stream.expect("a request").id().into()
    }

    /// Says SETTINGS and asks for a session, where that was not done, and reads the answer.
    async fn begin(&mut self, case: &str) {
        if !self.settings {
            self.settings = true;
            self.uni(&settings()).await;
        }
        if self.request.is_none() {
            self.bi(&connect()).await;
            self.request = Some(self.now);
        }
        let answer = self.read(5).await;
        assert_eq!(answer, [0x01, 0x03, 0x00, 0x00, 0xd9], "{case}: 200");
    }

    /// So many bytes of the request's answer, or fewer at its end.
    async fn read(&mut self, many: usize) -> Vec<u8> {
        let at = self.request.expect("a request");
        let stream = self.recvs[at].as_mut().expect("both ways");
        let mut bytes = Vec::new();
        while bytes.len() < many {
            match stream.read_chunk(many - bytes.len(), true).await {
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk.bytes),
                _ => break,
            }
        }
        bytes
    }

    /// With which code the connection was closed.
    async fn closed(&self, case: &str) -> u64 {
        match self.conn.closed().await {
            ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
            other => panic!("{case}: {other}"),
        }
    }

    /// With which code the server has reset its half of the present stream.
    async fn reset(&mut self) -> Option<u64> {
        let recv = self.recvs[self.now].as_mut()?;
        match recv.read_chunk(1, true).await {
            Err(quinn::ReadError::Reset(code)) => Some(code.into_inner()),
            _ => None,
        }
    }

    /// The connection serves, with a session if there is none yet.
    async fn goes_on(&mut self, case: &str) {
        if self.request.is_none() || !self.settings {
            self.begin(case).await;
        }
        self.lives(case).await;
    }

    /// The server still lets in who says what it should, on this connection.
    async fn lives(&mut self, case: &str) {
        let said = stream_of(self.session(), &bare::hello(TOKEN));
        self.bi(&said).await;
        self.welcomed(case).await;
    }

    /// What comes on the present stream is `$welcome`.
    async fn welcomed(&mut self, case: &str) {
        let recv = self.recvs[self.now].as_mut().expect("both ways");
        let mut length = [0; 4];
        let read = recv.read_exact(&mut length).await;
        read.unwrap_or_else(|error| panic!("{case}: no $welcome: {error}"));
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        recv.read_exact(&mut body).await.expect("its body");
        let welcome = Message::decode(body.into()).expect("a message");
        assert_eq!(welcome.event(), "$welcome", "{case}");
    }
}

async fn run(site: &Site, case: &Case) {
    let name = &case.name;
    let mut peer = Peer::dial(site).await;
    for act in &case.acts {
        match act {
            Act::Settings => {
                peer.settings = true;
                peer.uni(&settings()).await;
            }
            Act::Connect(bytes) => {
                peer.bi(bytes).await;
                peer.request = Some(peer.now);
            }
            Act::Session => peer.begin(name).await,
            Act::Uni(bytes) => peer.uni(bytes).await,
            Act::Bi(bytes) => peer.bi(bytes).await,
            Act::Stream(bytes) => {
                let bytes = stream_of(peer.session(), bytes);
                peer.bi(&bytes).await;
            }
            Act::Request => peer.now = peer.request.expect("a request"),
            Act::More(bytes) => peer.write(bytes).await,
            Act::Dribble(bytes) => {
                for byte in bytes {
                    peer.write(&[*byte]).await;
                    tokio::task::yield_now().await;
                }
            }
            Act::Flood(bytes, times) => {
                for _ in 0..*times {
                    peer.write(bytes).await;
                }
            }
            Act::Fin => {
                if let Some(stream) = &mut peer.sends[peer.now] {
                    let _ = stream.finish();
                }
            }
            Act::First => peer.now = 0,
            Act::Give(code) => {
                if let Some(stream) = &mut peer.sends[peer.now] {
                    let code = quinn::VarInt::from_u64(*code).expect("a code");
                    let _ = stream.reset(code);
                }
            }
            Act::Datagram(bytes) => {
                let _ = peer.conn.send_datagram(bytes.clone().into());
            }
        }
    }
    match &case.expect {
        Expect::Closed(code) => {
            let closed = peer.closed(name).await;
            assert_eq!(closed, *code, "{name}: {closed:#x}");
        }
        Expect::Status(answer) => {
            assert_eq!(peer.read(64).await, *answer, "{name}");
            assert_eq!(peer.closed(name).await, 0x100, "{name}");
        }
        Expect::Refused(code) => {
            let bytes = peer.read(1 << 12).await;
            let capsule = bytes.strip_prefix(&[0x00]).expect("a frame of DATA");
            let at = capsule.windows(2).position(|bytes| bytes == [0x68, 0x43]);
            let length = at.expect("a capsule") + 2;
            let said = &capsule[length + (1 << (capsule[length] >> 6))..];
            let got = u32::from_be_bytes(said[..4].try_into().expect("a code"));
            assert_eq!(CloseCode::new(got.into()), *code, "{name}");
            assert!(said.len() > 4, "{name}: no text");
            assert_eq!(peer.closed(name).await, 0x100, "{name}");
        }
        Expect::Stopped(code) => {
            let stream = peer.sends[peer.now].as_ref().expect("a stream");
            let stopped = stream.stopped().await.expect("the connection lives");
            assert_eq!(stopped.map(u64::from), Some(*code), "{name}");
            if peer.recvs[peer.now].is_some() {
                assert_eq!(peer.reset().await, Some(*code), "{name}");
            }
            peer.goes_on(name).await;
        }
        Expect::Reset(code) => {
            assert_eq!(peer.reset().await, Some(*code), "{name}");
            peer.goes_on(name).await;
        }
        Expect::Lives => peer.goes_on(name).await,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_streams_may_come_before_their_session_and_the_lowest_is_the_control_stream() {
    alone(async {
        let site = site().await;
        let case = "early streams";
        let mut peer = Peer::dial(&site).await;
        // The request comes on the fourth stream.
        peer.bi(&stream_of(12, &bare::hello(TOKEN))).await;
        peer.bi(&stream_of(12, &bare::open(1, "echo"))).await;
        peer.bi(&stream_of(12, b"")).await;
        let third = peer.sends[2].as_ref().expect("a stream").stopped().await;
        let third = third.expect("the connection lives").map(u64::from);
        assert_eq!(third, Some(0x3994_bd84));
        assert_eq!(peer.reset().await, Some(0x3994_bd84));
        peer.begin(case).await;
        assert_eq!(peer.session(), 12);
        peer.now = 0;
        peer.welcomed(case).await;
        peer.now = 1;
        peer.write(&bare::event("say", bare::Value::Uint(7))).await;
        let echo = peer.recvs[1].as_mut().expect("both ways");
        assert!(matches!(echo.read_chunk(64, true).await, Ok(Some(_))));
        drop(peer);
        site.check(case).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_may_come_byte_by_byte_but_must_come() {
    alone(async {
        let site = site().await;
        let case = "slow headers";
        let mut peer = Peer::dial(&site).await;
        peer.begin(case).await;
        peer.bi(&[]).await;
        for byte in stream_of(peer.session(), &bare::hello(TOKEN)) {
            peer.write(&[byte]).await;
            tokio::task::yield_now().await;
        }
        peer.welcomed(case).await;
        peer.bi(&[0x40]).await;
        let stream = peer.sends[peer.now].as_ref().expect("a stream");
        let stopped = stream.stopped().await.expect("the connection lives");
        assert_eq!(stopped.map(u64::from), Some(0x10d));
        assert_eq!(peer.reset().await, Some(0x10d));
        drop(peer);
        site.check(case).await;
    })
    .await;
}

/// QUIC settings of a client that lets the server do little.
fn tight(change: impl FnOnce(&mut quinn::TransportConfig)) -> quinn::ClientConfig {
    let mut config = bare::quic(bare::tls(&[b"h3"]), 1 << 20);
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_millis(50)));
    change(&mut transport);
    config.transport_config(std::sync::Arc::new(transport));
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gives_no_credit_is_let_go_in_time() {
    alone(async {
        let timeouts = Timeouts {
            handshake: Duration::from_secs(1),
            ..watch::timeouts()
        };
        let builder = watch::builder().web(Web::new()).timeouts(timeouts);
        let site = Site::new(builder).await;
        type Change = fn(&mut quinn::TransportConfig);
        let changes: [(&str, Change); 3] = [
            ("no stream for SETTINGS", |transport| {
                transport.max_concurrent_uni_streams(0_u32.into());
            }),
            ("no byte on a stream", |transport| {
                transport.stream_receive_window(0_u32.into());
            }),
            ("no byte at all", |transport| {
                transport.receive_window(0_u32.into());
            }),
        ];
        for (case, change) in changes {
            let mut peer = Peer::dial_with(&site, tight(change)).await;
            peer.uni(&settings()).await;
            peer.bi(&connect()).await;
            let closed = within(3, case, "the close", peer.conn.closed()).await;
            assert!(
                matches!(closed, ConnectionError::ApplicationClosed(_)),
                "{case}: {closed}"
            );
            site.others_live(case).await;
        }
        // Enough for the answer, and for nothing of the close.
        let case = "no byte for the close";
        let mut peer = Peer::dial_with(
            &site,
            tight(|transport| {
                transport.stream_receive_window(64_u32.into());
            }),
        )
        .await;
        peer.uni(&settings()).await;
        peer.bi(&connect()).await;
        peer.request = Some(peer.now);
        peer.bi(&stream_of(peer.session(), &bare::hello("s3cret")))
            .await;
        let closed = within(5, case, "the close", peer.closed(case)).await;
        assert_eq!(closed, 0x100, "{case}");
        drop(peer);
        site.check("withheld credit").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_is_let_go_in_time() {
    alone(async {
        let timeouts = Timeouts {
            handshake: Duration::from_secs(1),
            ..watch::timeouts()
        };
        let builder = watch::builder().web(Web::new()).timeouts(timeouts);
        let site = Site::new(builder).await;
        type Says = (&'static str, Vec<Vec<u8>>, Vec<Vec<u8>>);
        let says: [Says; 5] = [
            ("nothing", vec![], vec![]),
            ("settings alone", vec![settings()], vec![]),
            ("a request alone", vec![], vec![connect()]),
            (
                "half of a request",
                vec![settings()],
                vec![connect()[..20].to_vec()],
            ),
            (
                "half of the settings",
                vec![settings()[..4].to_vec()],
                vec![connect()],
            ),
        ];
        for (case, unis, bis) in says {
            let mut peer = Peer::dial(&site).await;
            for bytes in unis {
                peer.uni(&bytes).await;
            }
            for bytes in bis {
                peer.bi(&bytes).await;
            }
            let closed = within(3, case, "the close", peer.conn.closed()).await;
            assert!(
                matches!(closed, ConnectionError::ApplicationClosed(_)),
                "{case}: {closed}"
            );
        }
        site.check("silence").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_quic_gets_nothing_of_what_browsers_are_permitted() {
    alone(async {
        let site = site().await;
        let bare = site.dial().await;
        for _ in 0..3 {
            let mut early = bare.conn.open_uni().await.expect("permitted to browsers");
            let _ = early.write_all(&[0; 512]).await;
            let stopped = early.stopped().await.expect("the connection lives");
            let stopped = stopped.map(u64::from);
            assert_eq!(stopped, Some(CloseCode::PROTOCOL_ORDER.value()));
        }
        let control = bare.enter(TOKEN).await;
        drop((bare, control));
        site.check("early streams").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_before_the_session_are_dropped() {
    alone(async {
        let site = site().await;
        let mut peer = Peer::dial(&site).await;
        for n in 0..10_000_u32 {
            let _ = peer.conn.send_datagram(datagram_of(n.into(), &[0; 1000]));
            if n % 100 == 0 {
                tokio::task::yield_now().await;
            }
        }
        peer.begin("datagrams").await;
        peer.lives("datagrams").await;
        drop(peer);
        site.check("datagrams").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_half_open_sessions_is_bounded_and_goes() {
    alone(async {
        let limits = Limits {
            handshakes: 64,
            ..watch::limits()
        };
        let timeouts = Timeouts {
            handshake: Duration::from_millis(700),
            ..watch::timeouts()
        };
        let builder = watch::builder().web(Web::new());
        let site = Site::new(builder.limits(limits).timeouts(timeouts)).await;
        let mut crowd = Vec::new();
        for _ in 0..96 {
            let config = bare::quic(bare::tls(&[b"h3"]), 1 << 20);
            if let Ok(bare) = Bare::dial(&site.peers, site.address(), config).await {
                let mut request = bare.conn.open_bi().await.expect("a stream");
                let _ = request.0.write_all(&connect()[..10]).await;
                crowd.push((bare, request));
            }
        }
        let most = u64::from(u16::try_from(crowd.len()).expect("few")) * 256;
        assert!(site.grown() < most + watch::GROWTH, "{} KiB", site.grown());
        for (bare, _) in &crowd {
            within(5, "crowd", "its end", bare.conn.closed()).await;
        }
        drop(crowd);
        site.check("crowd").await;
    })
    .await;
}
