//! Getting in and being kept out: caps, deadlines, verifiers, tokens that change, restarts and shutdowns.

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{TOKEN, bind, bounded, client, connect, server};
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};
use udpack::{
    Authenticate, Channel, Client, CloseCode, CloseReason, ConnectError, Context, Deny, Drain,
    Hello, Identity, Limits, OpenError, Peer, Reconnect, RecvError, Server, ServerBuilder, Side,
    Socket, SocketState, Timeouts, TokenFile,
};

/// A server whose channel `ping` answers.
fn pinging(builder: ServerBuilder) -> ServerBuilder {
    builder.channel("ping", |channel: Channel| async move {
        channel
            .on("ping", |(): (), _: Context| async {})
            .run()
            .await
    })
}

async fn ping(socket: &Socket) {
    let channel = socket.open("ping").await.expect("a channel");
    channel
        .request::<_, ()>("ping", &())
        .await
        .expect("an answer");
}

fn denied(result: Result<Socket, ConnectError>) -> CloseReason {
    match result {
        Ok(socket) => panic!("{socket:?} was let in"),
        Err(ConnectError::Denied(reason)) => reason,
        Err(error) => panic!("{error}"),
    }
}

/// Lets everybody in, the agent `waits` when it is told to.
fn asking() -> (
    impl Authenticate,
    mpsc::UnboundedReceiver<oneshot::Sender<()>>,
) {
    let (asked, asking) = mpsc::unbounded_channel();
    let verifier = move |hello: Hello| {
        let asked = asked.clone();
        async move {
            if hello.agent() == "waits" {
                let (decide, decided) = oneshot::channel();
                let _ = asked.send(decide);
                let _ = decided.await;
            }
            Ok::<_, Deny>(Peer::new("tester"))
        }
    };
    (verifier, asking)
}

/// Looks again and again, for at most 5 s.
async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is() {
        assert!(Instant::now() < deadline, "not within 5 s: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Connects as soon as there is room again.
async fn once_there_is_room(server: &Server) -> Socket {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let address = server.local_addr().to_string();
        match client(server).connect(&address).await {
            Ok(socket) => return socket,
            Err(error) => assert!(error.retry() && Instant::now() < deadline, "{error}"),
        }
    }
}

async fn full_at_two(limits: Limits, more: &str) {
    let server = bind(pinging(server().limits(limits))).await;
    let address = server.local_addr().to_string();
    let first = connect(&server).await;
    let second = connect(&server).await;
    let reason = denied(client(&server).connect(&address).await);
    assert_eq!(
        (reason.code, reason.retry, reason.by),
        (CloseCode::SERVER_BUSY, true, Side::Peer)
    );
    assert!(reason.text.contains(more), "{}", reason.text);
    ping(&first).await;
    ping(&second).await;
    assert_eq!(server.sockets().len(), 2);
    second.close(CloseCode::NORMAL, "").await;
    let third = once_there_is_room(&server).await;
    ping(&third).await;
    ping(&first).await;
    assert_eq!(first.close_reason(), None);
}

#[tokio::test]
async fn sockets_are_capped_and_a_place_is_free_again_when_one_leaves() {
    let limits = Limits {
        sockets: 2,
        ..Limits::default()
    };
    bounded(full_at_two(limits, "all 2 sockets")).await;
}

#[tokio::test]
async fn sockets_of_one_address_are_capped_and_other_addresses_are_not() {
    bounded(async {
        let limits = Limits {
            sockets_per_address: 2,
            ..Limits::default()
        };
        full_at_two(limits.clone(), "2 sockets of this address").await;
        let server = bind(pinging(server().limits(limits))).await;
        let address = server.local_addr().to_string();
        let _first = connect(&server).await;
        let _second = connect(&server).await;
        denied(client(&server).connect(&address).await);
        let elsewhere = client(&server)
            .local_address(SocketAddr::from(([127, 0, 0, 2], 0)))
            .connect(&address)
            .await
            .expect("another address has places of its own");
        ping(&elsewhere).await;
    })
    .await;
}

#[tokio::test]
async fn handshakes_are_capped_until_one_of_them_is_decided() {
    bounded(async {
        let (verifier, mut asking) = asking();
        let limits = Limits {
            handshakes: 2,
            ..Limits::default()
        };
        let server = bind(pinging(server().limits(limits).auth(verifier))).await;
        let address = server.local_addr().to_string();
        let mut waiting = Vec::new();
        let mut undecided = Vec::new();
        for _ in 0..2 {
            let client = client(&server).agent("waits").build().expect("sound");
            let address = address.clone();
            waiting.push(tokio::spawn(async move { client.connect(&address).await }));
            undecided.push(asking.recv().await.expect("the verifier was asked"));
        }
        let reason = denied(client(&server).connect(&address).await);
        assert_eq!((reason.code, reason.retry), (CloseCode::SERVER_BUSY, true));
        for decide in undecided {
            decide.send(()).expect("the verifier waits");
        }
        for client in waiting {
            let socket = client.await.expect("no panic").expect("let in");
            ping(&socket).await;
        }
        ping(&connect(&server).await).await;
    })
    .await;
}

#[tokio::test]
async fn a_verifier_that_never_answers_admits_nobody() {
    bounded(async {
        let timeouts = Timeouts {
            auth: Duration::from_millis(300),
            ..Timeouts::default()
        };
        let verifier = |hello: Hello| async move {
            if hello.token() != TOKEN {
                std::future::pending::<()>().await;
            }
            Ok(Peer::new("tester"))
        };
        let server = bind(pinging(server().timeouts(timeouts).auth(verifier))).await;
        let address = server.local_addr().to_string();
        let reason = denied(client(&server).token("stuck").connect(&address).await);
        assert_eq!((reason.code, reason.retry), (CloseCode::AUTH_TIMEOUT, true));
        ping(&connect(&server).await).await;
        until("the places are free", || server.sockets().is_empty()).await;
    })
    .await;
}

/// Panics before it gives a future, or in it.
struct Panics;

impl Authenticate for Panics {
    fn authenticate(&self, hello: Hello) -> BoxFuture<'static, Result<Peer, Deny>> {
        assert_ne!(hello.token(), "at once", "on purpose");
        Box::pin(async move {
            assert_ne!(hello.token(), "later", "on purpose");
            Ok(Peer::new("tester"))
        })
    }
}

#[tokio::test]
async fn a_verifier_that_panics_admits_nobody_and_says_whose_fault_it_is() {
    bounded(async {
        let server = bind(pinging(server().auth(Panics))).await;
        let address = server.local_addr().to_string();
        for token in ["at once", "later"] {
            let reason = denied(client(&server).token(token).connect(&address).await);
            assert_eq!(reason.code, CloseCode::INTERNAL, "{token}: {reason}");
            assert!(!reason.text.contains("purpose"), "{}", reason.text);
        }
        ping(&connect(&server).await).await;
    })
    .await;
}

#[tokio::test]
async fn a_connection_handler_that_panics_leaves_the_socket_served_and_counted() {
    bounded(async {
        let calls = Arc::new(AtomicUsize::new(0));
        let count = calls.clone();
        let server = bind(pinging(server()).connection(move |socket: Socket| {
            assert!(count.fetch_add(1, Ordering::Relaxed) > 0, "on purpose");
            async move { drop(socket) }
        }))
        .await;
        let first = connect(&server).await;
        ping(&first).await;
        first.close(CloseCode::NORMAL, "").await;
        until("nothing is left of it", || server.sockets().is_empty()).await;
        ping(&connect(&server).await).await;
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    })
    .await;
}

#[tokio::test]
async fn a_verifier_refuses_with_its_own_code_and_text() {
    bounded(async {
        let banned = CloseCode::new(0x1001);
        let verifier = move |hello: Hello| async move {
            match hello.token() {
                "banned" => Err(Deny::new(banned, "until tomorrow")),
                "guest" => Err(Deny::new(CloseCode::FORBIDDEN, "members only")),
                _ => Ok(Peer::new("tester")),
            }
        };
        let server = bind(pinging(server().auth(verifier))).await;
        let address = server.local_addr().to_string();
        // More often than a wrong token may be tried: these are no guesses.
        for _ in 0..5 {
            let reason = denied(client(&server).token("banned").connect(&address).await);
            assert_eq!(
                (reason.code, reason.text.as_str()),
                (banned, "until tomorrow")
            );
        }
        let error = client(&server).token("guest").connect(&address).await;
        let error = error.expect_err("refused");
        assert!(error.is_auth() && !error.retry(), "{error}");
        let reason = denied(Err(error));
        assert_eq!(
            (reason.code, reason.text.as_str()),
            (CloseCode::FORBIDDEN, "members only")
        );
        ping(&connect(&server).await).await;
    })
    .await;
}

/// Writes the whole file at once, readable by its owner alone.
fn write_tokens(path: &Path, content: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let fresh = path.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = file.open(&fresh).expect("a writable directory");
    file.write_all(content.as_bytes())
        .expect("room on the disk");
    std::fs::rename(&fresh, path).expect("the same directory");
}

const ALICE: &str = "alice-has-a-token-of-her-own";
const BOB: &str = "bob-has-a-token-of-his-own-too";
const CAROL: &str = "carol-came-later-than-the-rest";

#[tokio::test]
async fn all_wrong_tokens_look_alike_and_take_their_time() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tokens");
        write_tokens(&path, &format!("alice {ALICE}\nbob {BOB}\n"));
        let tokens = TokenFile::open(&path).expect("a sound file");
        let limits = Limits {
            auth_failures: 1000,
            ..Limits::default()
        };
        let server = bind(pinging(server().limits(limits).auth(tokens))).await;
        let address = server.local_addr().to_string();
        let mut seen = Vec::new();
        for token in [
            String::new(),
            "nobody-knows-this-token-at-all".to_owned(),
            format!("{ALICE}x"),
            ALICE[..ALICE.len() - 1].to_owned(),
            ALICE.to_uppercase(),
            format!("alice {ALICE}"),
            format!("alice {BOB}"),
            "alice".to_owned(),
            format!("{ALICE}\n"),
            "x".repeat(512),
        ] {
            let begun = Instant::now();
            let error = client(&server).token(token).connect(&address).await;
            let error = error.expect_err("refused");
            assert!(begun.elapsed() >= Duration::from_millis(100));
            assert!(error.is_auth() && !error.retry(), "{error}");
            let reason = denied(Err(error));
            assert_eq!(reason.code, CloseCode::AUTH_FAILED);
            seen.push(reason);
        }
        assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{seen:?}");
        for token in [ALICE, BOB] {
            let socket = client(&server).token(token).connect(&address).await;
            ping(&socket.expect("let in")).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_changed_token_file_counts_at_once_and_a_broken_one_does_not() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tokens");
        write_tokens(&path, &format!("alice {ALICE}\n"));
        let tokens = TokenFile::open(&path).expect("a sound file");
        let limits = Limits {
            auth_failures: 1000,
            ..Limits::default()
        };
        let server = bind(pinging(server().limits(limits).auth(tokens.clone()))).await;
        let address = server.local_addr().to_string();
        let try_with = |token: &'static str| client(&server).token(token).connect(&address);
        let alice = try_with(ALICE).await.expect("let in");
        assert_eq!(denied(try_with(BOB).await).code, CloseCode::AUTH_FAILED);
        write_tokens(&path, &format!("bob {BOB}\n"));
        assert_eq!(denied(try_with(ALICE).await).code, CloseCode::AUTH_FAILED);
        let bob = try_with(BOB).await.expect("let in");
        for broken in [
            format!("bob {BOB}\nbob {CAROL}\n"),
            format!("bob {BOB}\n!! {CAROL} ??\n"),
            String::new(),
        ] {
            write_tokens(&path, &broken);
            drop(try_with(BOB).await.expect("the last good set stays"));
            assert_eq!(denied(try_with(CAROL).await).code, CloseCode::AUTH_FAILED);
        }
        std::fs::remove_file(&path).expect("it was there");
        drop(try_with(BOB).await.expect("the last good set stays"));
        write_tokens(&path, &format!("carol {CAROL}\n"));
        drop(try_with(CAROL).await.expect("a good file again"));
        assert_eq!(denied(try_with(BOB).await).code, CloseCode::AUTH_FAILED);
        // Who is in stays in; to have them out is the application's decision.
        ping(&alice).await;
        ping(&bob).await;
    })
    .await;
}

#[tokio::test]
async fn another_key_is_told_apart_before_the_token_leaves() {
    bounded(async {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let server = bind(server().auth(move |_: Hello| {
            count.fetch_add(1, Ordering::Relaxed);
            async { Ok(Peer::new("tester")) }
        }))
        .await;
        let pin = Identity::generate().expect("a fresh key").fingerprint();
        let error = Client::builder()
            .pin(pin)
            .token(TOKEN)
            .connect(&server.local_addr().to_string())
            .await
            .expect_err("another key");
        assert!(error.is_auth() && !error.retry(), "{error}");
        let text = error.to_string();
        assert!(text.contains(&pin.to_string()), "{text}");
        assert!(text.contains(&server.fingerprint().to_string()), "{text}");
        let ConnectError::PinMismatch {
            expected,
            presented,
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((expected, presented), (pin, server.fingerprint()));
        drop(connect(&server).await);
        assert_eq!(
            asked.load(Ordering::Relaxed),
            1,
            "the other key saw no token"
        );
    })
    .await;
}

#[tokio::test]
async fn where_nobody_listens_the_client_gives_up_in_time() {
    bounded(async {
        // Bound and mute: nobody else gets the port, and nobody answers.
        let mute = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        let address = mute.local_addr().expect("bound");
        let handshake = Duration::from_millis(300);
        let timeouts = Timeouts {
            handshake,
            ..Timeouts::default()
        };
        let begun = Instant::now();
        let error = Client::builder()
            .pin(Identity::generate().expect("a fresh key").fingerprint())
            .timeouts(timeouts)
            .connect(&address.to_string())
            .await
            .expect_err("nobody is there");
        assert!(matches!(error, ConnectError::Unreachable { address: at } if at == address));
        assert!(error.retry() && !error.is_auth(), "{error}");
        let took = begun.elapsed();
        assert!(took >= handshake && took < handshake * 5, "{took:?}");
    })
    .await;
}

#[tokio::test]
async fn where_the_system_knows_that_nobody_listens_the_attempt_ends_at_once() {
    bounded(async {
        let unbound = {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
            socket.local_addr().expect("bound")
        };
        let timeouts = Timeouts {
            handshake: Duration::from_secs(3600),
            ..Timeouts::default()
        };
        let error = Client::builder()
            .pin(Identity::generate().expect("a fresh key").fingerprint())
            .timeouts(timeouts)
            .connect(&unbound.to_string())
            .await
            .expect_err("nobody is there");
        let text = format!("cannot dial {unbound}: connection refused");
        assert_eq!(error.to_string(), text);
        assert!(error.retry() && !error.is_auth(), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_drained_or_closed_server_leaves_its_port_free_at_once() {
    bounded(async {
        let identity = Identity::generate().expect("a fresh key");
        let builder = || pinging(server().identity(identity.clone()));
        let mut server = bind(builder()).await;
        let address = server.local_addr();
        for drained in [true, true, false] {
            // Both sides keep what they have of it.
            let client = client(&server).connect(&address.to_string()).await;
            let client = client.expect("let in");
            ping(&client).await;
            let sockets = server.sockets();
            if drained {
                let drain = Drain::within(Duration::from_millis(100));
                let ended = server.run_until(async {}, drain).await;
                ended.expect("it served until then");
            } else {
                server.close(CloseCode::SHUTTING_DOWN, "").await;
            }
            let again = builder().bind(address).await;
            server = again.expect("the port is free");
            drop((client, sockets));
        }
        ping(&connect(&server).await).await;
    })
    .await;
}

/// A server that is gone at once, without a word: its threads stop where they stand.
struct Mortal {
    runtime: tokio::runtime::Runtime,
    server: Server,
}

impl Mortal {
    fn new(identity: Identity, address: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("threads");
        let server = runtime
            .block_on(pinging(server().identity(identity)).bind(address))
            .expect("a free port");
        Self { runtime, server }
    }

    fn die(self) {
        self.runtime.shutdown_timeout(Duration::from_secs(5));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_server_is_noticed_at_once() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let identity = || Identity::load_or_create(dir.path()).expect("a key");
        let spawn = |address: SocketAddr| {
            let identity = identity();
            tokio::task::spawn_blocking(move || Mortal::new(identity, address))
        };
        let old = spawn(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .expect("no panic");
        let timeouts = Timeouts {
            keep_alive: Duration::from_millis(200),
            ..Timeouts::default()
        };
        let address = old.server.local_addr();
        let socket = client(&old.server)
            .timeouts(timeouts)
            .connect(&address.to_string())
            .await
            .expect("let in");
        ping(&socket).await;
        tokio::task::spawn_blocking(move || old.die())
            .await
            .expect("no panic");
        assert_eq!(socket.close_reason(), None, "it died without a word");
        let new = spawn(address).await.expect("no panic");
        let begun = Instant::now();
        let reason = socket.closed().await;
        assert_eq!(
            (reason.code, reason.retry, reason.by),
            (CloseCode::PEER_RESTARTED, true, Side::Transport)
        );
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "{:?}",
            begun.elapsed()
        );
        let again = client(&new.server).connect(&address.to_string()).await;
        ping(&again.expect("the same key")).await;
        tokio::task::spawn_blocking(move || new.die())
            .await
            .expect("no panic");
    })
    .await;
}

#[tokio::test]
async fn a_drain_lets_running_channels_finish_and_nobody_new_in() {
    bounded(async {
        let server = bind(
            pinging(server()).channel("work", |channel: Channel| async move {
                while let Some(message) = channel.recv().await? {
                    let _ = channel.reply(&message, &()).await;
                }
                Ok::<_, RecvError>(())
            }),
        )
        .await;
        let socket = connect(&server).await;
        let work = socket.open("work").await.expect("a channel");
        work.request::<_, ()>("step", &()).await.expect("an answer");
        let (stop, stopped) = oneshot::channel::<()>();
        let running = {
            let server = server.clone();
            tokio::spawn(async move {
                server
                    .run_until(stopped, Drain::within(Duration::from_secs(10)))
                    .await
            })
        };
        stop.send(()).expect("it runs");
        until("the server says that it goes", || socket.goaway().is_some()).await;
        let goaway = socket.goaway().expect("just seen");
        assert_eq!(goaway.code, CloseCode::SHUTTING_DOWN);
        assert!(goaway.window > Duration::ZERO, "{goaway:?}");
        // What runs goes on.
        work.request::<_, ()>("step", &()).await.expect("an answer");
        // What is new does not begin.
        assert!(matches!(
            socket.open("ping").await,
            Err(OpenError::GoingAway(_))
        ));
        let reason = denied(
            client(&server)
                .connect(&server.local_addr().to_string())
                .await,
        );
        assert_eq!((reason.code, reason.retry), (CloseCode::SERVER_BUSY, true));
        assert!(!running.is_finished(), "it waits for the channel");
        let begun = Instant::now();
        work.finish().await.expect("all arrived");
        assert!(work.recv().await.expect("an orderly end").is_none());
        drop(work);
        let reason = socket.closed().await;
        assert_eq!(
            (reason.code, reason.retry, reason.by),
            (CloseCode::SHUTTING_DOWN, true, Side::Peer)
        );
        running.await.expect("no panic").expect("a signal ended it");
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "{:?}",
            begun.elapsed()
        );
    })
    .await;
}

#[tokio::test]
async fn a_channel_that_does_not_end_holds_no_other_socket_for_the_drain() {
    bounded(async {
        let server = bind(
            pinging(server()).channel("work", |channel: Channel| async move {
                while let Some(message) = channel.recv().await? {
                    let _ = channel.reply(&message, &()).await;
                }
                Ok::<_, RecvError>(())
            }),
        )
        .await;
        let (one, busy, other) = (
            connect(&server).await,
            connect(&server).await,
            connect(&server).await,
        );
        let work = busy.open("work").await.expect("a channel");
        work.request::<_, ()>("step", &()).await.expect("an answer");
        for idle in [&one, &other] {
            ping(idle).await;
        }
        let drain = Drain::within(Duration::from_secs(600));
        let draining = server.run_until(std::future::ready(()), drain);
        let leaving = async {
            for idle in [&one, &other] {
                assert_eq!(idle.closed().await.code, CloseCode::SHUTTING_DOWN);
            }
            // The drain has not ended.
            work.request::<_, ()>("step", &()).await.expect("an answer");
            work.finish().await.expect("all arrived");
            drop(work);
        };
        let (drained, ()) = tokio::join!(draining, leaving);
        drained.expect("a signal ended it");
    })
    .await;
}

#[tokio::test]
async fn who_is_still_being_verified_when_a_drain_begins_is_not_let_in() {
    bounded(async {
        let (verifier, mut asking) = asking();
        let server = bind(
            server()
                .auth(verifier)
                .channel("work", |channel: Channel| async move {
                    drop(channel.recv().await);
                }),
        )
        .await;
        let socket = connect(&server).await;
        let work = socket.open("work").await.expect("a channel");
        let late = client(&server)
            .agent("waits")
            .build()
            .expect("sound")
            .connect_eager(&server.local_addr().to_string())
            .await
            .expect("the key is right");
        let decide = asking.recv().await.expect("the verifier was asked");
        let drain = Drain::within(Duration::from_secs(60));
        let draining = server.run_until(std::future::ready(()), drain);
        let refused = async {
            until("the drain has begun", || socket.goaway().is_some()).await;
            decide.send(()).expect("the verifier waits");
            let reason = late.admitted().await.expect_err("refused");
            work.finish().await.expect("all arrived");
            reason
        };
        let (drained, reason) = tokio::join!(draining, refused);
        drained.expect("a signal ended it");
        assert_eq!(
            (reason.code, reason.retry, reason.by),
            (CloseCode::SHUTTING_DOWN, true, Side::Peer)
        );
    })
    .await;
}

#[tokio::test]
async fn a_drain_does_not_wait_longer_than_it_was_told() {
    bounded(async {
        let server = bind(server().channel("stuck", |channel: Channel| async move {
            let _ = channel.send("hello", &()).await;
            channel.closed().await;
        }))
        .await;
        let socket = connect(&server).await;
        let stuck = socket.open("stuck").await.expect("a channel");
        assert!(stuck.recv().await.expect("open").is_some());
        let begun = Instant::now();
        let drain = Drain::within(Duration::from_millis(200));
        server.run_until(async {}, drain).await.expect("a signal");
        let took = begun.elapsed();
        assert!(
            took >= Duration::from_millis(200) && took < Duration::from_secs(10),
            "{took:?}"
        );
        assert_eq!(socket.closed().await.code, CloseCode::SHUTTING_DOWN);
        let end = stuck
            .recv()
            .await
            .expect("its direction was finished in order");
        assert!(end.is_none());
    })
    .await;
}

#[tokio::test]
async fn dropping_the_server_closes_its_sockets() {
    bounded(async {
        let server = bind(pinging(server())).await;
        let address = server.local_addr();
        let socket = connect(&server).await;
        ping(&socket).await;
        let clone = server.clone();
        drop(server);
        ping(&socket).await;
        drop(clone);
        let reason = socket.closed().await;
        assert_eq!(
            (reason.code, reason.by),
            (CloseCode::SHUTTING_DOWN, Side::Peer)
        );
        // The port is free again, soon.
        let deadline = Instant::now() + Duration::from_secs(5);
        while std::net::UdpSocket::bind(address).is_err() {
            assert!(Instant::now() < deadline, "the port is still taken");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_said_before_admission_arrives_after_it() {
    bounded(async {
        let (verifier, mut asking) = asking();
        let (heard, mut hearing) = mpsc::unbounded_channel::<String>();
        let server = bind(
            server()
                .auth(verifier)
                .channel("log", move |channel: Channel| {
                    let heard = heard.clone();
                    async move {
                        while let Some(message) = channel.recv().await? {
                            let _ = heard.send(message.data().expect("text"));
                        }
                        Ok::<_, RecvError>(())
                    }
                }),
        )
        .await;
        let client = client(&server).agent("waits").build().expect("sound");
        let socket = client
            .connect_eager(&server.local_addr().to_string())
            .await
            .expect("the key is right");
        let log = socket.open("log").await.expect("a channel");
        log.send("line", &"early").await.expect("queued");
        let decide = asking.recv().await.expect("the verifier was asked");
        assert_eq!(&*socket.id(), "", "not admitted yet");
        assert!(hearing.try_recv().is_err());
        decide.send(()).expect("the verifier waits");
        assert_eq!(hearing.recv().await.as_deref(), Some("early"));
        socket.admitted().await.expect("let in");
        assert_eq!(socket.id().len(), 32);
        log.send("line", &"late").await.expect("queued");
        assert_eq!(hearing.recv().await.as_deref(), Some("late"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_let_in_finds_itself_connected() {
    bounded(async {
        let server = bind(pinging(server())).await;
        let address = server.local_addr().to_string();
        for _ in 0..100 {
            let client = client(&server).reconnect(Reconnect::default());
            let client = client.build().expect("sound");
            let socket = client.connect(&address).await.expect("let in");
            let connected = SocketState::Connected {
                resumed: false,
                reason: None,
            };
            assert_eq!(socket.state(), connected);
            socket.close(CloseCode::NORMAL, "").await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_said_with_a_wrong_token_is_never_looked_at() {
    bounded(async {
        let runs = Arc::new(AtomicUsize::new(0));
        let count = runs.clone();
        let server = bind(server().channel("log", move |channel: Channel| {
            count.fetch_add(1, Ordering::Relaxed);
            async move { drop(channel.recv().await) }
        }))
        .await;
        let client = Client::builder()
            .pin(server.fingerprint())
            .token("wrong")
            .build()
            .expect("sound");
        let socket = client
            .connect_eager(&server.local_addr().to_string())
            .await
            .expect("the key is right");
        let log = socket.open("log").await.expect("a channel");
        log.send("line", &"early").await.expect("queued");
        let error = log.recv().await.expect_err("refused");
        assert_eq!(error.reason().code, CloseCode::AUTH_FAILED);
        let reason = socket.admitted().await.expect_err("refused");
        assert_eq!(
            (reason.code, reason.by),
            (CloseCode::AUTH_FAILED, Side::Peer)
        );
        assert!(log.send("line", &"late").await.is_err());
        // A whole session later the handler has still not run.
        let other = connect(&server).await;
        let log = other.open("log").await.expect("a channel");
        log.send("line", &"here").await.expect("queued");
        assert!(log.recv().await.expect("an orderly end").is_none());
        assert_eq!(runs.load(Ordering::Relaxed), 1, "for the right token only");
    })
    .await;
}

/// Passes datagrams between one client and `server`, and keeps the first byte of the server's first answer.
async fn relay(server: SocketAddr) -> (SocketAddr, Arc<Mutex<Option<u8>>>) {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let address = socket.local_addr().expect("bound");
    let first = Arc::new(Mutex::new(None));
    let seen = first.clone();
    tokio::spawn(async move {
        let mut client = None;
        let mut buffer = vec![0; 65_536];
        while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
            let to = if from == server {
                // A client on loopback first asks for the versions; that is answered by one without a version.
                if buffer[1..5] != [0; 4] {
                    seen.lock().expect("no panic").get_or_insert(buffer[0]);
                }
                client
            } else {
                client = Some(from);
                Some(server)
            };
            if let Some(to) = to {
                let _ = socket.send_to(&buffer[..len], to).await;
            }
        }
    });
    (address, first)
}

#[tokio::test]
async fn under_load_an_address_must_prove_itself_first() {
    bounded(async {
        // Bits 4 and 5 of a long header say what it is (RFC 9000, section 17.2): 3 is Retry, 0 Initial.
        for (retry_from, packet) in [(0, 3), (64, 0)] {
            let limits = Limits {
                retry_from,
                ..Limits::default()
            };
            let server = bind(server().limits(limits)).await;
            let (through, first) = relay(server.local_addr()).await;
            let socket = client(&server)
                .connect(&through.to_string())
                .await
                .expect("the client takes the extra round trip");
            let byte = first.lock().expect("no panic").expect("an answer");
            assert_eq!((byte >> 4) & 3, packet, "first byte {byte:#x}");
            drop(socket);
        }
    })
    .await;
}
