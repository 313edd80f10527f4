//! How long a client stays let in: tokens that end, are refreshed, are withdrawn, and what channels it keeps.

#[path = "hostile/bare.rs"]
#[allow(dead_code, reason = "this test uses its own part")]
mod bare;
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bare::{Bare, event, map};
use common::{bind, bounded, client, server};
use tokio::sync::mpsc;
use tokio::time::Instant;
use udpack::testing::Net;
use udpack::{
    Channel, CloseCode, CloseReason, ConnectError, Context, Deny, Hello, Limits, NewToken, Peer,
    Reconnect, RefreshError, Server, ServerBuilder, Side, Socket, Timeouts, TokenFile,
};

const HOUR: Duration = Duration::from_secs(3600);

/// Tokens are `ID MS`, with the time they count in milliseconds (`-` for ever), then their rights.
async fn verify(hello: Hello) -> Result<Peer, Deny> {
    let mut words = hello.token().split(' ');
    let (Some(id), Some(left)) = (words.next(), words.next()) else {
        return Err(Deny::auth_failed());
    };
    let rights = words.map(|right| (right.to_owned(), String::new()));
    let peer = Peer::new(id).with_claims(rights.collect());
    match left.parse() {
        Ok(left) => Ok(peer.expires_at(SystemTime::now() + Duration::from_millis(left))),
        Err(_) => Ok(peer),
    }
}

/// A server whose channels `ping` and `rule` answer.
fn pinging() -> ServerBuilder {
    let answer = |channel: Channel| async move {
        channel
            .on("ping", |(): (), _: Context| async {})
            .run()
            .await
    };
    server()
        .auth(verify)
        .timeouts(Timeouts {
            auth_failure: Duration::from_millis(1),
            ..Timeouts::default()
        })
        .channel("ping", answer)
        .channel("rule", answer)
}

async fn enter(server: &Server, token: &str) -> Socket {
    client(server)
        .token(token)
        .connect(&server.local_addr().to_string())
        .await
        .expect("the server lets us in")
}

async fn ping(channel: &Channel) {
    channel
        .request::<_, ()>("ping", &())
        .await
        .expect("an answer");
}

async fn alive(socket: &Socket) {
    ping(&socket.open("ping").await.expect("a channel")).await;
}

fn denial(result: Result<(), RefreshError>) -> CloseCode {
    match result {
        Err(RefreshError::Denied { code, text }) => {
            assert!(!text.is_empty());
            code
        }
        other => panic!("{other:?}"),
    }
}

/// The one socket that the server has.
fn only(server: &Server) -> Socket {
    let sockets = server.sockets();
    assert_eq!(sockets.len(), 1);
    sockets.into_iter().next().expect("one")
}

fn told(reason: &CloseReason) -> (CloseCode, Side, bool) {
    (reason.code, reason.by, reason.retry)
}

#[tokio::test(start_paused = true)]
async fn a_token_that_ends_closes_the_socket_on_both_sides() {
    bounded(async {
        let net = Net::new(1).delay(Duration::from_millis(10));
        let server = net.bind(pinging()).await.expect("bound");
        let begun = Instant::now();
        let socket = client(&server).token("anna 20000");
        let socket = net.connect(socket, &server).await.expect("let in");
        let left = socket.expires_in().expect("an end");
        assert!(left <= Duration::from_secs(20), "{left:?}");
        let there = only(&server);
        alive(&socket).await;
        let reason = socket.closed().await;
        assert_eq!(
            told(&reason),
            (CloseCode::AUTH_EXPIRED, Side::Peer, false),
            "{reason}"
        );
        let taken = begun.elapsed();
        assert!((19..22).contains(&taken.as_secs()), "{taken:?}");
        let reason = there.closed().await;
        assert_eq!(reason.code, CloseCode::AUTH_EXPIRED);
        assert_eq!(reason.by, Side::Local);
    })
    .await;
}

#[tokio::test]
async fn a_token_whose_time_is_over_does_not_let_in() {
    bounded(async {
        let server = bind(pinging()).await;
        let address = server.local_addr().to_string();
        let connect = client(&server).token("anna 0").connect(&address);
        let error = connect.await.expect_err("its time is over");
        assert!(error.is_auth() && !error.retry(), "{error}");
        let ConnectError::Denied(reason) = error else {
            panic!("{error}");
        };
        assert_eq!(reason.code, CloseCode::AUTH_EXPIRED);
        assert_eq!(reason.text, "the token has expired");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_refresh_moves_the_end_and_changes_what_is_known() {
    bounded(async {
        let net = Net::new(2).delay(Duration::from_millis(10));
        let server = net.bind(pinging()).await.expect("bound");
        let socket = client(&server).token("anna 5000 writes");
        let socket = net.connect(socket, &server).await.expect("let in");
        let there = only(&server);
        assert_eq!(there.peer().claim("writes"), Some(""));
        socket.refresh("anna 3600000 reads").await.expect("hers");
        let left = socket.expires_in().expect("an end");
        assert!(left > HOUR - Duration::from_secs(30), "{left:?}");
        let left = there.expires_in().expect("an end");
        assert!(left > HOUR - Duration::from_secs(30), "{left:?}");
        assert_eq!(there.peer().claim("writes"), None);
        assert_eq!(there.peer().claim("reads"), Some(""));
        // Until after the old end, which nothing marks any more.
        let over = tokio::time::timeout(Duration::from_secs(10), socket.closed()).await;
        over.expect_err("the old end no longer counts");
        alive(&socket).await;
        socket.refresh("anna -").await.expect("hers");
        assert_eq!((socket.expires_in(), there.expires_in()), (None, None));
    })
    .await;
}

#[tokio::test]
async fn a_refused_refresh_leaves_the_socket_as_it_was() {
    bounded(async {
        let server = bind(pinging()).await;
        let socket = enter(&server, "anna 3600000").await;
        let there = only(&server);
        let ours = there.peer();
        assert_eq!(
            denial(socket.refresh("bert -").await),
            CloseCode::FORBIDDEN,
            "another identity"
        );
        assert_eq!(
            denial(socket.refresh("nonsense").await),
            CloseCode::AUTH_FAILED
        );
        assert_eq!(
            denial(socket.refresh("anna 1").await),
            CloseCode::RATE_LIMITED,
            "the third within a second, and not looked at"
        );
        assert_eq!(there.peer(), ours);
        assert!(socket.expires_in().is_some());
        alive(&socket).await;
        assert!(matches!(
            socket.refresh("x".repeat(513)).await,
            Err(RefreshError::Token(_))
        ));
        assert!(matches!(
            there.refresh("anna -").await,
            Err(RefreshError::NotClient)
        ));
        drop(socket.close(CloseCode::NORMAL, ""));
        let error = socket.refresh("anna -").await.expect_err("it is over");
        assert!(matches!(error, RefreshError::Closed(_)), "{error}");
    })
    .await;
}

#[tokio::test]
async fn tokens_that_are_not_accepted_count_as_failed_authentications() {
    bounded(async {
        let limits = Limits {
            auth_failures: 2,
            ..Limits::default()
        };
        let server = bind(pinging().limits(limits)).await;
        let socket = enter(&server, "anna -").await;
        for _ in 0..2 {
            assert_eq!(
                denial(socket.refresh("nonsense").await),
                CloseCode::AUTH_FAILED
            );
        }
        let address = server.local_addr().to_string();
        let connect = client(&server).token("anna -").connect(&address).await;
        alive(&connect.expect("let in")).await;
        assert_eq!(server.metrics().tokens_slowed, 1, "the address must wait");
        alive(&socket).await;
    })
    .await;
}

#[tokio::test]
async fn a_dropped_refresh_holds_up_nobody_and_its_answer_goes_to_nobody_else() {
    bounded(async {
        let (asked, mut asking) = mpsc::unbounded_channel();
        let verifier = move |hello: Hello| {
            let asked = asked.clone();
            async move {
                if hello.token() == "bert -" {
                    let (decide, decided) = tokio::sync::oneshot::channel::<()>();
                    let _ = asked.send(decide);
                    let _ = decided.await;
                }
                verify(hello).await
            }
        };
        let server = bind(pinging().auth(verifier)).await;
        let socket = enter(&server, "anna -").await;
        let decide = {
            let first = socket.refresh("bert -");
            tokio::pin!(first);
            tokio::select! {
                result = &mut first => panic!("{result:?}"),
                decide = asking.recv() => decide.expect("asked"),
            }
        };
        let second = socket.refresh("anna 3600000");
        let (second, ()) = tokio::join!(second, async {
            alive(&socket).await;
            let _ = decide.send(());
        });
        second.expect("the first one's refusal is not for this one");
        assert!(socket.expires_in().is_some());
    })
    .await;
}

#[tokio::test]
async fn revoked_peers_are_closed_and_others_are_not() {
    bounded(async {
        let server = bind(pinging()).await;
        let anna = enter(&server, "anna -").await;
        let bert = enter(&server, "bert -").await;
        assert_eq!(server.revoke(|peer| peer.id() == "anna"), 1);
        let reason = anna.closed().await;
        assert_eq!(
            told(&reason),
            (CloseCode::AUTH_REVOKED, Side::Peer, false),
            "{reason}"
        );
        alive(&bert).await;
        assert_eq!(server.revoke(|_| false), 0);
    })
    .await;
}

#[tokio::test]
async fn a_token_that_leaves_the_file_takes_its_sockets_with_it() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("keys/token");
        let issue = |id: &str| {
            let new = NewToken {
                id: id.to_owned(),
                ..NewToken::default()
            };
            TokenFile::issue(&path, &new).expect("a token")
        };
        let (first, second) = (issue("anna"), issue("bert"));
        let server = pinging()
            .auth(TokenFile::open(&path).expect("a sound file"))
            .timeouts(Timeouts {
                recheck: Duration::from_millis(20),
                ..Timeouts::default()
            });
        let server = bind(server).await;
        let anna = enter(&server, &first).await;
        let bert = enter(&server, &second).await;
        assert!(TokenFile::revoke(&path, "bert").expect("a sound file"));
        let reason = bert.closed().await;
        assert_eq!(
            told(&reason),
            (CloseCode::AUTH_REVOKED, Side::Peer, false),
            "{reason}"
        );
        alive(&anna).await;
    })
    .await;
}

#[tokio::test]
async fn the_file_tells_an_ended_token_from_a_wrong_one() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("token");
        let new = |id: &str, expires: &str| NewToken {
            id: id.to_owned(),
            fields: vec![("expires".to_owned(), expires.to_owned())],
        };
        let error = TokenFile::issue(&path, &new("old", "2020-01-31T12:00:00Z"));
        let error = error.expect_err("it would have ended").to_string();
        assert!(error.contains("has passed"), "{error}");
        let token = TokenFile::issue(&path, &new("anna", "2999-01-31T12:00:00Z")).expect("a token");
        let text = std::fs::read_to_string(&path).expect("a file");
        let ended = "ended-token-ended-token";
        let more = format!("{text}old {ended} expires=1500000000\n");
        std::fs::write(&path, more).expect("a file of ours");
        let server = bind(pinging().auth(TokenFile::open(&path).expect("a sound file"))).await;
        let socket = enter(&server, &token).await;
        assert!(socket.expires_in().expect("an end") > HOUR);
        assert_eq!(
            only(&server).peer().claim("expires"),
            Some("2999-01-31T12:00:00Z")
        );
        let address = server.local_addr().to_string();
        for (token, code) in [
            (ended, CloseCode::AUTH_EXPIRED),
            ("ended-token-ended-tokem", CloseCode::AUTH_FAILED),
        ] {
            let error = client(&server).token(token).connect(&address).await;
            let Err(ConnectError::Denied(reason)) = error else {
                panic!("{error:?}");
            };
            assert_eq!(reason.code, code);
        }
    })
    .await;
}

#[tokio::test]
async fn channels_are_allowed_by_rights_and_looked_at_again_after_a_refresh() {
    bounded(async {
        let allowed = |peer: &Peer, channel: &str| {
            if channel == "panics" {
                panic!("on purpose");
            }
            if channel == "rule" && peer.claim("rules").is_none() {
                return Err(Deny::forbidden("only rulers rule"));
            }
            Ok(())
        };
        let server = bind(pinging().authorize(allowed)).await;
        let socket = enter(&server, "anna - rules").await;
        let (plain, rule) = (
            socket.open("ping").await.expect("a channel"),
            socket.open("rule").await.expect("a channel"),
        );
        ping(&plain).await;
        ping(&rule).await;
        let refused = async |name: &str| {
            let channel = socket.open(name).await.expect("told later");
            channel.closed().await
        };
        assert_eq!(refused("panics").await.code, CloseCode::INTERNAL);
        socket.refresh("anna -").await.expect("hers");
        for reason in [rule.closed().await, refused("rule").await] {
            assert_eq!(
                told(&reason),
                (CloseCode::FORBIDDEN, Side::Peer, false),
                "{reason}"
            );
            assert_eq!(reason.text, "only rulers rule");
        }
        ping(&plain).await;
        socket.refresh("anna - rules").await.expect("hers");
        ping(&socket.open("rule").await.expect("a channel")).await;
        ping(&plain).await;
    })
    .await;
}

#[tokio::test]
async fn the_source_of_tokens_is_asked_at_every_connect() {
    bounded(async {
        let server = bind(pinging()).await;
        let address = server.local_addr().to_string();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let source = move || {
            let turn = count.fetch_add(1, Ordering::Relaxed);
            async move {
                match turn {
                    0 | 1 => Ok(format!("anna - turn{turn}")),
                    2 => Err("nobody is at home"),
                    3 => Ok("x".repeat(513)),
                    _ => panic!("on purpose"),
                }
            }
        };
        let client = client(&server).token_with(source).build().expect("sound");
        for turn in ["turn0", "turn1"] {
            let socket = client.connect(&address).await.expect("let in");
            let there = only(&server);
            assert!(there.peer().claim(turn).is_some(), "{turn}");
            socket.close(CloseCode::NORMAL, "").await;
            there.closed().await;
            emptied(&server).await;
        }
        let error = client.connect(&address).await.expect_err("no token");
        assert!(error.retry() && !error.is_auth(), "{error}");
        assert_eq!(error.to_string(), "no token to present: nobody is at home");
        let error = client.connect(&address).await.expect_err("too long");
        assert!(matches!(error, ConnectError::Setting(_)), "{error}");
        let error = client.connect(&address).await.expect_err("no token");
        assert!(matches!(error, ConnectError::Token(_)), "{error}");
        assert_eq!(asked.load(Ordering::Relaxed), 5);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_source_of_tokens_keeps_its_socket_alive() {
    const LIVES: Duration = Duration::from_secs(90);
    tokio::time::timeout(HOUR, async {
        let net = Net::new(3).delay(Duration::from_millis(10));
        let server = net.bind(pinging()).await.expect("bound");
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let source = move || {
            let turn = count.fetch_add(1, Ordering::Relaxed);
            async move {
                match turn {
                    // Once it is out of reach, and once what it gives is not accepted.
                    2 => Err("nobody is at home"),
                    4 => Ok("nonsense".to_owned()),
                    _ => Ok(format!("anna {}", LIVES.as_millis())),
                }
            }
        };
        let socket = client(&server).token_with(source);
        let begun = Instant::now();
        let socket = net.connect(socket, &server).await.expect("let in");
        let mut times = Vec::new();
        for turn in 2..=7 {
            while asked.load(Ordering::Relaxed) < turn {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            times.push(begun.elapsed());
        }
        // 57 to 67 % of 90 s, and after a failure of what was left of them then.
        for (at, (least, most)) in
            times
                .windows(2)
                .zip([(50, 61), (16, 27), (50, 61), (16, 27), (50, 61)])
        {
            let taken = (at[1] - at[0]).as_secs();
            assert!((least..=most).contains(&taken), "{taken}: {times:?}");
        }
        alive(&socket).await;
        assert_eq!(only(&server).close_reason(), None);
    })
    .await
    .expect("an hour is enough");
}

#[tokio::test(start_paused = true)]
async fn tokens_end_and_are_withdrawn_while_nobody_is_connected() {
    tokio::time::timeout(HOUR, async {
        let net = Net::new(4).delay(Duration::from_millis(10));
        let server = net.bind(pinging()).await.expect("bound");
        let enter = async |token: &str| {
            let builder = client(&server).token(token).reconnect(Reconnect::default());
            net.connect(builder, &server).await.expect("let in")
        };
        let idle = Timeouts::default().idle;

        let begun = Instant::now();
        let anna = enter("anna 50000").await;
        let kept = only(&server);
        net.cut();
        let reason = kept.closed().await;
        assert_eq!(reason.code, CloseCode::AUTH_EXPIRED, "{reason}");
        let taken = begun.elapsed();
        assert!(taken > idle && taken.as_secs() < 52, "{taken:?}");
        anna.abort(CloseCode::NORMAL, "");
        net.mend();
        emptied(&server).await;

        let bert = enter("bert -").await;
        let kept = only(&server);
        net.cut();
        let over = tokio::time::timeout(idle * 2, kept.closed()).await;
        over.expect_err("it may come back");
        assert_eq!(server.revoke(|peer| peer.id() == "bert"), 1);
        let reason = kept.closed().await;
        assert_eq!(reason.code, CloseCode::AUTH_REVOKED, "{reason}");
        emptied(&server).await;
        drop(bert);
    })
    .await
    .expect("an hour is enough");
}

#[tokio::test(start_paused = true)]
async fn whoever_comes_back_is_looked_at_again() {
    tokio::time::timeout(HOUR, async {
        let net = Net::new(5).delay(Duration::from_millis(10));
        // However long the pauses between the client's tries are drawn.
        let server = pinging().timeouts(Timeouts {
            resume: HOUR / 4,
            ..Timeouts::default()
        });
        let server = net.bind(server).await.expect("bound");
        let asked = AtomicUsize::new(0);
        let source = move || {
            let turn = asked.fetch_add(1, Ordering::Relaxed);
            let (left, claim) = match turn {
                0 => (900_000, "first"),
                _ => (1_800_000, "later"),
            };
            async move { Ok::<_, String>(format!("anna {left} {claim}")) }
        };
        let builder = client(&server)
            .token_with(source)
            .reconnect(Reconnect::default());
        let socket = net.connect(builder, &server).await.expect("let in");
        let there = only(&server);
        let id = there.id();
        net.cut_for(Duration::from_secs(33));
        assert!(there.peer().claim("first").is_some());
        while there.peer().claim("later").is_none() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(only(&server).id(), id, "the session is the same");
        alive(&socket).await;
        for left in [socket.expires_in(), there.expires_in()] {
            let left = left.expect("an end").as_secs();
            assert!((1790..=1800).contains(&left), "{left}");
        }
        socket.refresh("anna -").await.expect("hers");
        assert_eq!(there.expires_in(), None);
    })
    .await
    .expect("an hour is enough");
}

/// Waits until the last socket is gone from the server's list.
async fn emptied(server: &Server) {
    while !server.sockets().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn refreshes_out_of_turn_end_the_connection() {
    bounded(async {
        let never = |hello: Hello| async move {
            if hello.token() == "never -" {
                std::future::pending::<()>().await;
            }
            verify(hello).await
        };
        let server = bind(pinging().auth(never)).await;
        let peers = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a free port");
        let refresh = |token: &str| event("$refresh", map([("token", token.into())]));
        let twice = [refresh("never -"), refresh("anna -")].concat();
        let answer = event("$refreshed", map([]));
        for (bytes, code) in [
            (twice, CloseCode::PROTOCOL_ORDER),
            (answer, CloseCode::PROTOCOL_ORDER),
            (refresh(&"x".repeat(513)), CloseCode::FRAME_TOO_LARGE),
            (event("$refresh", map([])), CloseCode::BAD_MESSAGE),
        ] {
            let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
            let bare = Bare::dial(&peers, server.local_addr(), config).await;
            let bare = bare.expect("the handshake is sound");
            let mut control = bare.enter("anna -").await;
            control.write(&bytes).await;
            let error = bare.conn.closed().await;
            let quinn::ConnectionError::ApplicationClosed(close) = &error else {
                panic!("expected {code}, got {error}");
            };
            assert_eq!(CloseCode::new(close.error_code.into_inner()), code);
        }
    })
    .await;
}
