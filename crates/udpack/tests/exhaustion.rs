//! One peer takes all it can get of something, and another one beside it connects and is answered.
//!
//! `docs/RESOURCES.md` lists what a peer can use up; each row of [`hogs`] takes one of these to its bound.

#[allow(dead_code, reason = "this binary uses its own part")]
#[path = "hostile/bare.rs"]
mod bare;
mod common;

use std::any::Any;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bare::Bare;
use serde_bytes::ByteBuf;
use tokio::net::UdpSocket;
use udpack::testing::{self, Net};
use udpack::{
    Channel, ClientBuilder, CloseCode, ConnectError, Context, Deny, Fault, Hello, Limits, Peer,
    Reconnect, Server, Socket,
};

/// A server and the network around it, and a client that was there before.
struct Site {
    net: Net,
    server: Server,
    early: Socket,
}

impl Site {
    async fn new(limits: Limits) -> Self {
        let net = Net::new(0);
        let verifier = |hello: Hello| async move {
            match hello.token() {
                "wrong" => Err(Deny::auth_failed()),
                name => Ok(Peer::new(name)),
            }
        };
        let server = testing::server()
            .auth(verifier)
            .limits(limits)
            .channel("echo", common::echo)
            .channel("deaf", |channel: Channel| async move {
                channel.closed().await;
            })
            .channel("size", |channel: Channel| async move {
                let size = |bytes: ByteBuf, _: Context| async move { Ok::<_, Fault>(bytes.len()) };
                channel.on("size", size).run().await
            });
        let server = net.bind(server).await.expect("an address");
        let good = testing::client(&server).token("good");
        let early = net.connect(good, &server).await.expect("let in");
        Self { net, server, early }
    }

    /// Somebody whom nobody is beside yet.
    fn hostile(&self) -> ClientBuilder {
        self.net.attach(testing::client(&self.server).token("bad"))
    }

    async fn dial(&self, endpoint: &quinn::Endpoint) -> Result<Bare, quinn::ConnectionError> {
        let config = bare::quic(bare::tls(&[b"udpack/1"]), 64 << 10);
        Bare::dial(endpoint, self.server.local_addr(), config).await
    }

    /// Who was there is answered, and who comes now is let in and answered.
    async fn others_live(&self, what: &str) {
        let good = testing::client(&self.server).token("good");
        let late = self.net.connect(good, &self.server).await;
        let late = late.unwrap_or_else(|error| panic!("{what}: a newcomer: {error}"));
        for (who, socket) in [("who was there", &self.early), ("a newcomer", &late)] {
            let channel = socket.open("echo").await;
            let channel = channel.unwrap_or_else(|error| panic!("{what}: {who}: {error}"));
            let answer = channel.request::<_, u64>("echo", &7).await;
            let answer = answer.unwrap_or_else(|error| panic!("{what}: {who}: {error}"));
            assert_eq!(answer, 7, "{what}: {who}");
            let channel = socket.open("size").await;
            let channel = channel.unwrap_or_else(|error| panic!("{what}: {who}: {error}"));
            let large = ByteBuf::from(vec![0; 1 << 20]);
            let answer = channel.request::<_, usize>("size", &large).await;
            let answer = answer.unwrap_or_else(|error| panic!("{what}: {who}: {error}"));
            assert_eq!(answer, 1 << 20, "{what}: {who}");
        }
    }
}

/// What keeps a resource taken while it lives.
type Held = Box<dyn Any>;
type Hogging<'a> = Pin<Box<dyn Future<Output = Held> + 'a>>;

/// One resource: its name, the limits that bound it, and how one peer takes all it can get.
struct Hog {
    what: &'static str,
    limits: Limits,
    take: fn(&Site) -> Hogging<'_>,
}

/// More sockets for one address than handshakes.
fn many_sockets(retry_from: usize) -> Limits {
    Limits {
        sockets_per_address: 1024,
        retry_from,
        ..Limits::default()
    }
}

fn small_budget() -> Limits {
    Limits {
        receive_budget: 32 << 20,
        ..Limits::default()
    }
}

fn hogs() -> Vec<Hog> {
    let hog = |what, limits, take| Hog { what, limits, take };
    vec![
        hog("handshakes", many_sockets(64), |site| {
            Box::pin(silent(site))
        }),
        hog("handshakes of proved addresses", many_sockets(0), |site| {
            Box::pin(silent(site))
        }),
        hog("handshakes begun and left", Limits::default(), |site| {
            Box::pin(leaving(site))
        }),
        hog("sockets of an address", Limits::default(), |site| {
            Box::pin(sockets(site))
        }),
        hog("wrong tokens", Limits::default(), |site| {
            Box::pin(guesses(site))
        }),
        hog("unfinished frames", small_budget(), |site| {
            Box::pin(unfinished(site))
        }),
        hog("windows", small_budget(), |site| Box::pin(unread(site))),
    ]
}

#[tokio::test(start_paused = true)]
async fn nobody_takes_what_others_need() {
    for Hog { what, limits, take } in hogs() {
        let site = Site::new(limits).await;
        let all = async {
            let held = take(&site).await;
            site.others_live(what).await;
            drop(held);
        };
        let within = Duration::from_secs(600);
        let done = tokio::time::timeout(within, all).await;
        done.unwrap_or_else(|_| panic!("{what}: somebody waits for ever"));
    }
}

/// Shakes hands until it is refused, and says nothing then.
async fn silent(site: &Site) -> Held {
    let endpoint = site.net.bare().expect("an address");
    let mut held = Vec::new();
    // The last one is told why, and closed.
    while !site.server.metrics().knocks_refused.contains_key("busy") {
        held.push(site.dial(&endpoint).await.expect("a sound handshake"));
        assert!(held.len() <= 256, "nobody refuses it");
    }
    assert_eq!(site.server.metrics().knocks_refused["busy"], 1);
    Box::new((endpoint, held))
}

/// Shakes hands and leaves, over and over, until that is slowed; goes on with it.
async fn leaving(site: &Site) -> Held {
    let leaving = Leaving::begin(site);
    while site.server.metrics().handshakes_paced == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Box::new(leaving)
}

/// Eight at one address that shake hands and leave, over and over.
struct Leaving {
    _tasks: tokio::task::JoinSet<()>,
    /// How often they did.
    times: Arc<AtomicU64>,
}

impl Leaving {
    fn begin(site: &Site) -> Self {
        let endpoint = site.net.bare().expect("an address");
        let address = site.server.local_addr();
        let times = Arc::<AtomicU64>::default();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (endpoint, times) = (endpoint.clone(), times.clone());
            tasks.spawn(async move {
                loop {
                    let config = bare::quic(bare::tls(&[b"udpack/1"]), 64 << 10);
                    let bare = Bare::dial(&endpoint, address, config).await;
                    bare.expect("its turn comes").conn.close(0_u32.into(), b"");
                    times.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self {
            _tasks: tasks,
            times,
        }
    }
}

async fn sockets(site: &Site) -> Held {
    let client = site.hostile().build().expect("sound");
    let address = site.server.local_addr().to_string();
    let mut held = Vec::new();
    loop {
        match client.connect(&address).await {
            Ok(socket) => held.push(socket),
            Err(ConnectError::Denied(reason)) => {
                assert_eq!(reason.code, CloseCode::SERVER_BUSY);
                let text = "64 sockets of this address are in use, its share";
                assert_eq!(reason.text, text);
                return Box::new(held);
            }
            Err(error) => panic!("{error}"),
        }
    }
}

async fn guesses(site: &Site) -> Held {
    let client = site.hostile().token("wrong").build().expect("sound");
    let address = site.server.local_addr().to_string();
    let tries = (0..100).map(|_| client.connect(&address));
    let tries = futures_util::future::join_all(tries).await;
    assert!(tries.iter().all(Result::is_err));
    Box::new(client)
}

/// Begins the largest frame on every channel of four sockets, and sends all of it but the last byte.
async fn unfinished(site: &Site) -> Held {
    let frame = Limits::default().frame;
    let mut bytes = u32::try_from(frame).expect("fits").to_be_bytes().to_vec();
    bytes.resize(4 + frame - 1, 0x5a);
    let bytes = Arc::new(bytes);
    let mut held = Vec::new();
    for _ in 0..4 {
        let endpoint = site.net.bare().expect("an address");
        let bare = Arc::new(site.dial(&endpoint).await.expect("a sound handshake"));
        let control = bare.enter("bad").await;
        let mut writers = tokio::task::JoinSet::new();
        for id in 0..60 {
            let (bare, bytes) = (bare.clone(), bytes.clone());
            writers.spawn(async move {
                let mut stream = bare.channel(id, "size").await;
                stream.write(&bytes).await;
                std::future::pending::<()>().await;
            });
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        held.push((endpoint, bare, control, writers));
    }
    assert!(site.server.metrics().frames_held_up > 0);
    Box::new(held)
}

/// Sends without an end on channels that nobody reads.
async fn unread(site: &Site) -> Held {
    let mut held = Vec::new();
    for _ in 0..4 {
        let client = site.hostile().build().expect("sound");
        let address = site.server.local_addr().to_string();
        let socket = client.connect(&address).await.expect("let in");
        let mut writers = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let channel = socket.open("deaf").await.expect("open");
            writers.spawn(async move {
                let block = ByteBuf::from(vec![0; 64 << 10]);
                while channel.send("block", &block).await.is_ok() {}
            });
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        held.push((socket, writers));
    }
    Box::new(held)
}

/// Passes on first packets and `Retry`, and nothing else: every handshake begins and none goes on.
async fn stalling_path(server: SocketAddr) -> SocketAddr {
    let front = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let back = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let address = front.local_addr().expect("bound");
    let kind = |packet: &[u8]| (packet[0] & 0x80 != 0).then_some((packet[0] >> 4) & 3);
    tokio::spawn(async move {
        let (mut here, mut there) = (vec![0; 65_536], vec![0; 65_536]);
        let mut client = None;
        loop {
            tokio::select! {
                Ok((len, from)) = front.recv_from(&mut here) => {
                    client = Some(from);
                    if kind(&here[..len]) == Some(0) {
                        let _ = back.send_to(&here[..len], server).await;
                    }
                }
                Ok((len, _)) = back.recv_from(&mut there) => {
                    if kind(&there[..len]) == Some(3)
                        && let Some(client) = client
                    {
                        let _ = front.send_to(&there[..len], client).await;
                    }
                }
            }
        }
    });
    address
}

#[tokio::test]
async fn stalled_handshakes_of_one_address_keep_no_other_out() {
    common::bounded(async {
        let limits = Limits {
            handshakes: 8,
            retry_from: 0,
            ..Limits::default()
        };
        let server = common::bind(common::server().limits(limits)).await;
        let through = stalling_path(server.local_addr()).await;
        let here = SocketAddr::from(([127, 0, 0, 1], 0));
        let endpoint = quinn::Endpoint::client(here).expect("an endpoint");
        let mut stalled = tokio::task::JoinSet::new();
        // Half of the handshakes, and then none more.
        while !server.metrics().knocks_refused.contains_key("busy") {
            let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
            let connecting = endpoint.connect_with(config, through, "any.name");
            let connecting = connecting.expect("settings");
            stalled.spawn(async move { drop(connecting.await) });
            tokio::task::yield_now().await;
        }
        for _ in 0..10 {
            let elsewhere = SocketAddr::from(([127, 0, 0, 2], 0));
            let client = common::client(&server).local_address(elsewhere);
            let socket = client.connect(&server.local_addr().to_string()).await;
            socket.expect("let in");
        }
        assert!(!stalled.is_empty());
    })
    .await;
}

/// Who guesses at an address, without an end, holds up nobody of that address who was in before.
#[tokio::test(start_paused = true)]
async fn a_session_comes_back_past_those_who_guess_beside_it() {
    let all = async {
        let site = Site::new(Limits::default()).await;
        let builder = site.hostile();
        let address = site.server.local_addr().to_string();
        let socket = builder
            .clone()
            .token("good")
            .reconnect(Reconnect::default())
            .connect(&address)
            .await
            .expect("let in");
        let channel = socket.channel("echo").resumable().open().await;
        let channel = channel.expect("open");
        let echoed = channel.request::<_, u64>("echo", &1).await;
        assert_eq!(echoed.expect("answered"), 1);
        let client = Arc::new(builder.token("wrong").build().expect("sound"));
        let mut guessers = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (client, address) = (client.clone(), address.clone());
            guessers.spawn(async move {
                loop {
                    drop(client.connect(&address).await);
                }
            });
        }
        site.net.cut_client_for(&socket, Duration::from_secs(40));
        let echoed = channel.request::<_, u64>("echo", &2);
        let echoed = echoed.timeout(Duration::from_secs(300)).await;
        assert_eq!(echoed.expect("answered"), 2);
        assert_eq!(site.server.metrics().resumed, 1);
        guessers.shutdown().await;
    };
    let within = Duration::from_secs(600);
    tokio::time::timeout(within, all).await.expect("in time");
}

/// A flood of handshakes costs the server as many a second as its limit says. Those that lead to sessions do not count.
#[tokio::test(start_paused = true)]
async fn handshakes_that_lead_nowhere_are_slowed_and_those_of_sessions_are_not() {
    let all = async {
        let site = Site::new(Limits {
            handshake_rate: 2,
            ..Limits::default()
        })
        .await;
        let address = site.server.local_addr().to_string();
        let client = site.hostile().build().expect("sound");
        // Four times as many as one address may begin at once.
        for _ in 0..4 {
            let all = (0..16).map(|_| client.connect(&address));
            for socket in futures_util::future::join_all(all).await {
                socket.expect("let in").close(CloseCode::NORMAL, "").await;
            }
        }
        assert_eq!(site.server.metrics().handshakes_paced, 0);
        let leaving = Leaving::begin(&site);
        tokio::time::sleep(Duration::from_secs(30)).await;
        let before = leaving.times.load(Ordering::Relaxed);
        assert!(before < 16 + 8 + 60 + 8, "{before} in 30 s");
        tokio::time::sleep(Duration::from_secs(60)).await;
        let during = leaving.times.load(Ordering::Relaxed) - before;
        assert!((112..=128).contains(&during), "{during} in 60 s");
        site.others_live("a flood").await;
        assert!(site.server.metrics().handshakes_paced > 100);
    };
    let within = Duration::from_secs(600);
    tokio::time::timeout(within, all).await.expect("in time");
}

/// Words are for those who come now and then: of a flood most get the number alone.
#[tokio::test(start_paused = true)]
async fn who_finds_no_place_is_told_why_and_a_flood_is_not() {
    let site = Site::new(Limits {
        handshakes: 4,
        ..Limits::default()
    })
    .await;
    let endpoint = site.net.bare().expect("an address");
    let address = site.server.local_addr();
    let settings = || bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
    let mut held = Vec::new();
    while !site.server.metrics().knocks_refused.contains_key("busy") {
        let bare = Bare::dial(&endpoint, address, settings()).await;
        held.push(bare.expect("a sound handshake"));
        assert!(held.len() <= 5, "nobody refuses it");
    }
    let why = |error: quinn::ConnectionError| match error {
        quinn::ConnectionError::ApplicationClosed(close) => {
            let text = String::from_utf8(close.reason.to_vec()).expect("text");
            let code = CloseCode::new(close.error_code.into_inner());
            assert_eq!(code, CloseCode::SERVER_BUSY, "{text}");
            text
        }
        quinn::ConnectionError::ConnectionClosed(close) => {
            let refused = quinn::TransportErrorCode::CONNECTION_REFUSED;
            assert_eq!(close.error_code, refused);
            String::new()
        }
        other => panic!("{other}"),
    };
    let last = held.pop().expect("at least one was refused");
    let words = why(last.conn.closed().await);
    assert!(
        words.ends_with(" of this address are in use, its share; try again in a few seconds"),
        "{words}"
    );
    let begun = tokio::time::Instant::now();
    let mut told = 0;
    for _ in 0..60 {
        let text = match Bare::dial(&endpoint, address, settings()).await {
            Ok(bare) => why(bare.conn.closed().await),
            Err(error) => why(error),
        };
        assert!(text == words || text.is_empty(), "{text}");
        told += usize::from(text == words);
    }
    let most = 32 + 16 * (begun.elapsed().as_secs() as usize + 1);
    assert!(
        told > 0 && told <= most && told < 60,
        "{told} of 60 were told"
    );
    drop(held);
}
