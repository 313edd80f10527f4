//! Peers that lie about what they received, come back as somebody else or again and again, and misuse the parts
//! of requests: each gets its answer, memory is bounded, and the server serves on.
//!
//! Bare QUIC on a network in memory, with a paused clock.

#[allow(dead_code, reason = "this binary uses its own part")]
#[path = "hostile/bare.rs"]
mod bare;
#[path = "common/heap.rs"]
mod heap;

use std::time::Duration;

use bare::{Bare, Ended, Stream, Value, event, frame_of, map, request};
use heap::{Mark, alone, dial};
use serde_bytes::ByteBuf;
use udpack::testing::{self, Net};
use udpack::wire::{Ack, Channels, Decode, Refreshed, Resumed, Welcome};
use udpack::{
    Channel, CloseCode, CloseReason, Context, Deny, Fault, Hello, Items, Limits, Message, Peer,
    Server,
};

/// What everybody together may hold at most over what the test began with.
const MOST: usize = 6 << 20;

const CHANNELS: u32 = 4;

/// A network, a server on it, and a client that behaves.
struct Site {
    net: Net,
    server: Server,
    good: Channel,
    heap: Option<Mark>,
}

impl Site {
    async fn new() -> Self {
        let net = Net::new(0);
        let limits = Limits {
            channels: CHANNELS,
            auth_failures: 1_000_000,
            ..Limits::default()
        };
        // A token is its owner's id, then anything.
        let verify = |hello: Hello| async move {
            match hello.token().split(' ').next() {
                Some(id @ ("anna" | "bert")) => Ok(Peer::new(id)),
                _ => Err(Deny::auth_failed()),
            }
        };
        let server = testing::server()
            .auth(verify)
            .limits(limits)
            .channel("echo", |channel: Channel| async move {
                channel
                    .on(
                        "echo",
                        |n: u64, _: Context| async move { Ok::<_, Fault>(n) },
                    )
                    // Takes nothing of the stream that comes with it.
                    .on("hold", |(): (), items: Items<ByteBuf>| async move {
                        std::future::pending::<()>().await;
                        drop(items);
                    })
                    .run()
                    .await
            })
            .channel("greet", |channel: Channel| async move {
                for n in 0..3_u64 {
                    channel.send("hello", &n).await?;
                }
                channel.closed().await;
                Ok::<_, udpack::SendError>(())
            })
            // Ends at once.
            .channel("over", |_: Channel| async move {});
        let server = net.bind(server).await.expect("a free address");
        let client = testing::client(&server).token("anna");
        let socket = net.connect(client, &server).await.expect("let in");
        let good = socket.open("echo").await.expect("a channel");
        let site = Self {
            net,
            server,
            good,
            heap: None,
        };
        site.lives("nobody misbehaved yet").await;
        Self {
            heap: Some(Mark::set()),
            ..site
        }
    }

    /// The server answers others, and nobody holds more than they may.
    async fn lives(&self, what: &str) {
        let answer = self.good.request::<_, u64>("echo", &7).await;
        assert_eq!(answer.unwrap_or_else(|error| panic!("{what}: {error}")), 7);
        if let Some(heap) = &self.heap {
            heap.bounded(MOST, what);
        }
    }

    async fn dial(&self) -> Bare {
        dial(&self.net, &self.server, 1 << 20).await
    }

    /// A client that can resume, with the ticket of its session.
    async fn enter(&self) -> Guest {
        self.come("anna", map([])).await
    }

    async fn come(&self, token: &str, resume: Value) -> Guest {
        let bare = self.dial().await;
        let mut control = bare.stream().await;
        control.write(&hello(token, resume)).await;
        let welcome = control.message().await.expect("admitted");
        let welcome = Welcome::decode(&welcome).expect("a sound $welcome");
        Guest {
            bare,
            control,
            welcome,
        }
    }

    /// Until the server has so many sockets.
    async fn sockets(&self, count: usize) {
        while self.server.sockets().len() != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A peer that was let in.
struct Guest {
    bare: Bare,
    control: Stream,
    welcome: Welcome,
}

impl Guest {
    fn ticket(&self) -> Value {
        let grant = self.welcome.resume.as_ref().expect("a grant");
        ticket(&self.welcome.session, &grant.token)
    }

    /// Says which channels it still has: from then on only its newest ticket is good.
    async fn channels(&mut self, open: &[u64]) {
        let open = open.iter().map(|id| Value::Uint(*id)).collect();
        let frame = event("$channels", map([("open", Value::Array(open))]));
        self.control.write(&frame).await;
    }

    async fn ack(&mut self, channel: u64, own: bool, received: u64) {
        let fields = map([
            ("channel", channel.into()),
            ("own", flag(own)),
            ("received", received.into()),
        ]);
        self.control.write(&event("$ack", fields)).await;
    }

    /// A stream that begins with `$open` of a resumable channel; with `received` it claims to go on with one.
    async fn open(&self, id: u64, name: &str, received: Option<u64>) -> Stream {
        let mut stream = self.bare.stream().await;
        let mut fields = vec![
            ("id".into(), id.into()),
            ("name".into(), name.into()),
            ("resumable".into(), flag(true)),
        ];
        if let Some(received) = received {
            fields.push(("received".into(), received.into()));
        }
        stream.write(&event("$open", Value::Map(fields))).await;
        stream
    }

    /// How the server closed the connection.
    async fn closed(&self) -> CloseCode {
        match self.bare.conn.closed().await {
            quinn::ConnectionError::ApplicationClosed(close) => {
                CloseCode::new(close.error_code.into_inner())
            }
            other => panic!("{other}"),
        }
    }
}

fn flag(on: bool) -> Value {
    Value::Raw(vec![if on { 0xc3 } else { 0xc2 }])
}

fn ticket(session: &str, token: &[u8]) -> Value {
    map([
        ("session", session.into()),
        ("token", Value::Bin(token.to_vec())),
    ])
}

fn hello(token: &str, resume: Value) -> Vec<u8> {
    let fields = map([
        ("v", Value::Uint(1)),
        ("token", token.into()),
        ("agent", "bare".into()),
        ("resume", resume),
    ]);
    event("$hello", fields)
}

/// The server's `$close` on a channel; other messages before it are passed over.
async fn close_of(stream: &mut Stream, what: &str) -> CloseReason {
    loop {
        let message = stream.message().await;
        let message = message.unwrap_or_else(|end| panic!("{what}: {end:?} without $close"));
        if message.event() == "$close" {
            let reason = CloseReason::decode(&message).expect("a sound $close");
            assert!(!reason.text.is_empty(), "{what}: no text");
            return reason;
        }
    }
}

async fn said(stream: &mut Stream) -> Message {
    stream.message().await.expect("a message")
}

async fn resumed(stream: &mut Stream) -> Resumed {
    Resumed::decode(&said(stream).await).expect("a sound $resume")
}

async fn answers(stream: &mut Stream, what: &str) {
    let ask = request("echo", Value::Uint(5), Value::Uint(99));
    stream.write(&ask).await;
    loop {
        let message = stream.message().await;
        let message = message.unwrap_or_else(|end| panic!("{what}: {end:?}"));
        if message.id() == Some(99) {
            assert_eq!(message.event(), "$reply", "{what}");
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn only_the_right_ticket_of_the_same_identity_resumes_and_only_once() {
    alone(async {
        let site = Site::new().await;
        let mut guest = site.enter().await;
        let (session, first) = (guest.welcome.session.clone(), guest.ticket());
        for (what, token, resume, reason) in [
            (
                "a session that never was",
                "anna",
                ticket(&"0".repeat(32), &[7; 32]),
                "unknown",
            ),
            (
                "a token that was never given",
                "anna",
                ticket(&session, &[7; 32]),
                "expired",
            ),
            ("somebody else", "bert", first.clone(), "identity"),
        ] {
            let other = site.come(token, resume).await;
            assert!(!other.welcome.resumed, "{what}");
            assert_eq!(other.welcome.reason.as_deref(), Some(reason), "{what}");
            assert_ne!(other.welcome.session, session, "{what}");
        }
        // None of them has touched the session or used its ticket up.
        let mut own = guest.open(1, "echo", None).await;
        answers(&mut own, "the one they wanted").await;
        // The same owner with another token is the same identity.
        let mut back = site.come("anna again", first.clone()).await;
        assert!(back.welcome.resumed, "{:?}", back.welcome.reason);
        assert_eq!(back.welcome.session, session);
        assert_eq!(guest.closed().await, CloseCode::SUPERSEDED);
        // Its `$welcome` may have been lost: until it shows the next, it may come with this one again.
        let again = site.come("anna", first.clone()).await;
        assert!(again.welcome.resumed);
        assert_eq!(back.closed().await, CloseCode::SUPERSEDED);
        back = again;
        let sent = Channels::decode(&said(&mut back.control).await).expect("a sound $channels");
        assert!(sent.open.is_empty());
        back.channels(&[1]).await;
        let mut own = back.open(1, "echo", Some(0)).await;
        resumed(&mut own).await;
        answers(&mut own, "the channel that went on").await;
        // Now it is void.
        let used = site.come("anna", first).await;
        assert_eq!(used.welcome.reason.as_deref(), Some("expired"));
        answers(&mut own, "whose old ticket was stolen").await;
        let last = site.come("anna", back.ticket()).await;
        assert!(last.welcome.resumed);
        site.lives("tickets").await;
        let refused = site.server.metrics().resumes_refused;
        assert_eq!(
            refused.into_iter().collect::<Vec<_>>(),
            [("expired", 2), ("identity", 1), ("unknown", 1)]
        );
        guest.channels(&[]).await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn confirmations_of_what_was_never_sent_end_the_connection_and_odd_ones_nothing() {
    alone(async {
        let site = Site::new().await;
        let mut guest = site.enter().await;
        let mut stream = guest.open(1, "greet", None).await;
        for _ in 0..3 {
            assert_eq!(said(&mut stream).await.event(), "hello");
        }
        // Of no channel, of one of the server's, in the wrong order, twice.
        for (channel, own, received) in [
            (9, true, u64::MAX),
            (1, false, u64::MAX),
            (u64::MAX, true, 1),
            (1, true, 2),
            (1, true, 0),
            (1, true, 2),
            // That it takes nothing more, and then that it has more after all.
            (1, true, u64::MAX),
            (1, true, 3),
        ] {
            guest.ack(channel, own, received).await;
        }
        let mut other = guest.open(2, "echo", None).await;
        answers(&mut other, "odd confirmations").await;
        for received in [4, u64::MAX - 1] {
            let mut guest = site.enter().await;
            let mut stream = guest.open(1, "greet", None).await;
            for _ in 0..3 {
                assert_eq!(said(&mut stream).await.event(), "hello");
            }
            guest.ack(1, true, received).await;
            assert_eq!(guest.closed().await, CloseCode::RESUME_MISMATCH);
            // It was closed, not lost: nothing is left to resume.
            let back = site.come("anna", guest.ticket()).await;
            assert!(!back.welcome.resumed);
        }
        // Not what a client may say there, and not a message at all.
        for wrong in [
            event(
                "$resume",
                map([("received", 1.into()), ("done", flag(false))]),
            ),
            event("$ack", map([("channel", 1.into()), ("own", flag(true))])),
            event(
                "$ack",
                map([
                    ("channel", 1.into()),
                    ("own", 1.into()),
                    ("received", 1.into()),
                ]),
            ),
            event("$channels", map([("open", "x".into())])),
            event(
                "$channels",
                map([("open", Value::Array(vec![Value::Int(-1)]))]),
            ),
            event("$refreshed", map([])),
        ] {
            let mut guest = site.enter().await;
            guest.control.write(&wrong).await;
            let code = guest.closed().await;
            assert!(
                [CloseCode::PROTOCOL_ORDER, CloseCode::BAD_MESSAGE].contains(&code),
                "{code}"
            );
        }
        site.lives("confirmations").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_channel_goes_on_only_where_both_sides_agree() {
    alone(async {
        let site = Site::new().await;
        let mut guest = site.enter().await;
        // Kept until the connection is gone: dropping them ends the channels.
        let mut streams = Vec::new();
        for id in 1..=3 {
            let mut stream = guest.open(id, "greet", None).await;
            for _ in 0..3 {
                assert_eq!(said(&mut stream).await.event(), "hello");
            }
            streams.push(stream);
        }
        guest.ack(1, true, 3).await;
        let mut echo = guest.open(4, "echo", None).await;
        answers(&mut echo, "before").await;
        let mut guest = site.come("anna", guest.ticket()).await;
        assert!(guest.welcome.resumed);
        drop((streams, echo));
        guest.channels(&[1, 2, 3, 4]).await;
        // Fewer than were confirmed: they are gone. More than were sent.
        for (id, received) in [(1, 2), (2, 4), (3, u64::MAX)] {
            let mut stream = guest.open(id, "greet", Some(received)).await;
            let reason = close_of(&mut stream, "a wrong number").await;
            assert_eq!(reason.code, CloseCode::RESUME_MISMATCH, "{id}");
            assert_eq!(stream.message().await.expect_err("an end"), Ended::Fin);
        }
        let mut echo = guest.open(4, "echo", Some(1)).await;
        let goes_on = |received| Resumed {
            received,
            done: false,
        };
        assert_eq!(resumed(&mut echo).await, goes_on(1));
        answers(&mut echo, "the others").await;
        // A second stream for a channel that goes on already takes its place.
        let mut second = guest.open(4, "echo", Some(2)).await;
        assert_eq!(resumed(&mut second).await, goes_on(2));
        answers(&mut second, "the second stream").await;
        assert_eq!(echo.message().await.expect_err("an end"), Ended::Fin);
        // A new channel with the number of one that is there has no place.
        let mut third = guest.open(4, "echo", None).await;
        let reason = close_of(&mut third, "a number twice").await;
        assert_eq!(reason.code, CloseCode::PROTOCOL_ORDER);
        answers(&mut second, "the one that has the number").await;
        // One that never was.
        let mut unknown = guest.open(77, "echo", Some(5)).await;
        let done = Resumed {
            received: 5,
            done: true,
        };
        assert_eq!(resumed(&mut unknown).await, done);
        assert_eq!(unknown.message().await.expect_err("an end"), Ended::Fin);
        site.lives("numbers that do not fit").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn channels_are_disowned_only_by_who_comes_back() {
    alone(async {
        let site = Site::new().await;
        let guest = site.enter().await;
        // Kept until the connection is gone: dropping them ends the channels.
        let mut streams = Vec::new();
        for id in 1..=3 {
            let mut stream = guest.open(id, "echo", None).await;
            answers(&mut stream, "before").await;
            streams.push(stream);
        }
        let mut back = site.come("anna", guest.ticket()).await;
        assert!(back.welcome.resumed);
        drop(streams);
        // Those of this connection may be younger than the list.
        let mut three = back.open(3, "echo", Some(1)).await;
        assert!(!resumed(&mut three).await.done);
        let mut four = back.open(4, "echo", None).await;
        answers(&mut four, "a channel that is younger than the list").await;
        let mut many: Vec<u64> = (1_000..51_000).collect();
        many.push(2);
        back.channels(&many).await;
        let mut two = back.open(2, "echo", Some(1)).await;
        assert!(!resumed(&mut two).await.done);
        answers(&mut two, "the one that is in the list").await;
        let mut one = back.open(1, "echo", Some(1)).await;
        assert!(resumed(&mut one).await.done, "it was disowned");
        answers(&mut three, "one that is not in the list").await;
        answers(&mut four, "another that is not in the list").await;
        site.lives("a long list").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_list_of_channels_has_one_place() {
    alone(async {
        let site = Site::new().await;
        let order = CloseCode::PROTOCOL_ORDER;
        let mut new = site.enter().await;
        new.channels(&[]).await;
        assert_eq!(new.closed().await, order, "nothing was resumed");
        let mut first = site.enter().await;
        let mut early = site.come("anna", first.ticket()).await;
        assert!(early.welcome.resumed);
        early.ack(1, true, 0).await;
        assert_eq!(early.closed().await, order, "an $ack before the list");
        first = site.enter().await;
        let mut twice = site.come("anna", first.ticket()).await;
        assert!(twice.welcome.resumed);
        for _ in 0..2 {
            twice.channels(&[]).await;
        }
        assert_eq!(twice.closed().await, order, "two lists");
        // A session that was not resumed has no list either.
        let mut unknown = site.come("anna", ticket(&"0".repeat(32), &[0; 32])).await;
        assert!(!unknown.welcome.resumed);
        unknown.channels(&[]).await;
        assert_eq!(unknown.closed().await, order, "another session");
        site.lives("$channels at odd times").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_number_of_a_channel_that_goes_on_is_taken() {
    alone(async {
        let site = Site::new().await;
        let guest = site.enter().await;
        let mut echo = guest.open(4, "echo", None).await;
        answers(&mut echo, "before").await;
        let opening = |id: u64, name: &str, more: &[(&str, Value)]| {
            let mut fields = vec![("id".into(), id.into()), ("name".into(), name.into())];
            fields.extend(
                more.iter()
                    .map(|(key, value)| ((*key).into(), value.clone())),
            );
            event("$open", Value::Map(fields))
        };
        let resumable = || ("resumable", flag(true));
        let received = || ("received", Value::Uint(1));
        for (what, open) in [
            ("a plain channel", opening(4, "echo", &[])),
            ("another resumable one", opening(4, "echo", &[resumable()])),
            (
                "one of another name",
                opening(4, "greet", &[resumable(), received()]),
            ),
            (
                "one of another priority",
                opening(
                    4,
                    "echo",
                    &[resumable(), received(), ("priority", 2.into())],
                ),
            ),
        ] {
            let mut stream = guest.bare.stream().await;
            stream.write(&open).await;
            let reason = close_of(&mut stream, what).await;
            assert_eq!(reason.code, CloseCode::PROTOCOL_ORDER, "{what}");
            answers(&mut echo, what).await;
        }
        // The same `$open` once more takes its place.
        let mut again = guest.open(4, "echo", Some(5)).await;
        assert!(!resumed(&mut again).await.done);
        answers(&mut again, "the same once more").await;
        site.lives("numbers that are taken").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn channels_whose_end_is_never_confirmed_are_bounded() {
    alone(async {
        let site = Site::new().await;
        let mut guest = site.enter().await;
        let most = 2 * u64::from(CHANNELS);
        for round in 0..3_u64 {
            for id in 0..most {
                let id = round * 100 + id;
                let mut stream = guest.open(id, "over", None).await;
                if round == 0 {
                    assert_eq!(stream.message().await.expect_err("an end"), Ended::Fin);
                } else {
                    let reason = close_of(&mut stream, "one too many").await;
                    assert_eq!(reason.code, CloseCode::RATE_LIMITED, "{reason}");
                    assert!(reason.text.contains(&most.to_string()), "{reason}");
                }
            }
        }
        // Others are not concerned, and with their confirmations there is room again: of no frame, and the end.
        let mut plain = guest.bare.channel(1000, "echo").await;
        answers(&mut plain, "a plain channel").await;
        for id in 0..most {
            guest.ack(id, true, 1).await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut stream = guest.open(2000, "echo", None).await;
        answers(&mut stream, "room again").await;
        site.lives("ends that nobody confirms").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_resumptions_leaves_one_session() {
    alone(async {
        let site = Site::new().await;
        let mut guest = site.enter().await;
        let mut stream = guest.open(1, "echo", None).await;
        answers(&mut stream, "before").await;
        let session = guest.welcome.session.clone();
        for _ in 0..200 {
            let next = site.come("anna", guest.ticket()).await;
            assert!(next.welcome.resumed);
            guest = next;
        }
        site.sockets(2).await;
        for n in 0..200 {
            let other = site.come("anna", ticket(&session, &[n; 32])).await;
            assert!(!other.welcome.resumed);
        }
        guest.channels(&[1]).await;
        let mut stream = guest.open(1, "echo", Some(1)).await;
        assert_eq!(resumed(&mut stream).await.received, 1);
        answers(&mut stream, "after 200 resumptions").await;
        // Opened again and again on the same connection, each in the place of the one before: until that is too
        // fast, at the latest.
        let again = async {
            for _ in 0..1000 {
                stream = guest.open(1, "echo", Some(2)).await;
                if stream.message().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = again => {}
            code = guest.closed() => assert_eq!(code, CloseCode::RATE_LIMITED),
        }
        site.lives("a flood of resumptions").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_new_tokens_is_refused() {
    alone(async {
        let site = Site::new().await;
        let refresh = |token: &str| event("$refresh", map([("token", token.into())]));
        let mut guest = site.enter().await;
        let mut limited = 0;
        for n in 0..20 {
            let token = format!("anna {n}");
            guest.control.write(&refresh(&token)).await;
            let answer = Refreshed::decode(&said(&mut guest.control).await);
            match answer.expect("a sound $refreshed") {
                Refreshed::Accepted { expires } => assert_eq!(expires, None),
                Refreshed::Refused { code, .. } => {
                    assert_eq!(code, CloseCode::RATE_LIMITED);
                    limited += 1;
                }
            }
        }
        assert!(limited >= 17, "{limited} of 20 were refused");
        assert_eq!(site.server.metrics().refreshed, 20 - limited);
        // Somebody else's.
        tokio::time::sleep(Duration::from_secs(5)).await;
        guest.control.write(&refresh("bert")).await;
        let answer = Refreshed::decode(&said(&mut guest.control).await);
        assert!(
            matches!(answer, Ok(Refreshed::Refused { code, .. }) if code == CloseCode::FORBIDDEN)
        );
        // Without waiting for the answer.
        guest.control.write(&refresh("anna").repeat(100)).await;
        assert_eq!(guest.closed().await, CloseCode::PROTOCOL_ORDER);
        site.lives("new tokens").await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn parts_of_requests_that_do_not_fit_are_dropped_or_close_the_channel() {
    alone(async {
        let site = Site::new().await;
        let guest = site.enter().await;
        let mut stream = guest.bare.channel(1, "echo").await;
        let block = |len: usize| Value::Bin(vec![0; len]);
        // For requests that are not there: dropped, whatever they bear.
        for name in ["$push", "$item", "$reply"] {
            stream.write(&request(name, block(100_000), 4.into())).await;
        }
        // What these two say is not looked at.
        for data in [Value::Nil, 1.into(), "x".into()] {
            for name in ["$end", "$cancel"] {
                stream.write(&request(name, data.clone(), 4.into())).await;
            }
        }
        for name in ["$credit", "$want"] {
            stream
                .write(&request(name, u64::MAX.into(), 4.into()))
                .await;
        }
        answers(&mut stream, "parts of no request").await;
        // For one that is there: credit never given, an end and more behind it.
        stream.write(&request("hold", Value::Nil, 5.into())).await;
        for _ in 0..3 {
            stream
                .write(&request("$credit", u64::MAX.into(), 5.into()))
                .await;
        }
        stream
            .write(&request("$push", block(100_000), 5.into()))
            .await;
        stream.write(&request("$end", 1.into(), 5.into())).await;
        for _ in 0..20 {
            stream
                .write(&request("$push", block(100_000), 5.into()))
                .await;
        }
        stream
            .write(&request("$cancel", Value::Nil, 5.into()))
            .await;
        answers(&mut stream, "an end and more behind it").await;
        drop(stream);
        let gap = |fields| event("$gap", fields);
        let five = |id: Value| {
            let parts = vec!["echo".into(), 1.into(), id, 1.into(), 1.into()];
            frame_of(&Value::Array(parts))
        };
        let over = [
            request("hold", Value::Nil, 1.into()),
            request("$push", block(200_000), 1.into()),
            request("$push", block(100_000), 1.into()),
        ];
        let bad = CloseCode::BAD_MESSAGE;
        for (id, (what, bytes, code)) in (10..).zip([
            ("items above the credit", over.concat(), CloseCode::BACKLOG),
            (
                "credit that is text",
                request("$credit", "x".into(), 1.into()),
                bad,
            ),
            (
                "credit below nothing",
                request("$want", Value::Int(-1), 1.into()),
                bad,
            ),
            ("an item of no request", event("$item", 1.into()), bad),
            (
                "a cancellation of no request",
                event("$cancel", Value::Nil),
                bad,
            ),
            ("five elements", five(1.into()), bad),
            ("five elements without an id", five(Value::Nil), bad),
            (
                "a gap of nothing",
                gap(map([("room", "a".into()), ("lost", 0.into())])),
                bad,
            ),
            (
                "a gap of no room",
                gap(map([("room", "".into()), ("lost", 1.into())])),
                bad,
            ),
            (
                "a gap below nothing",
                gap(map([("room", "a".into()), ("lost", Value::Int(-1))])),
                bad,
            ),
            (
                "a gap without a number",
                gap(map([("room", "a".into())])),
                bad,
            ),
            (
                "a gap that asks",
                request(
                    "$gap",
                    map([("room", "a".into()), ("lost", 1.into())]),
                    1.into(),
                ),
                bad,
            ),
            (
                "a $resume",
                event(
                    "$resume",
                    map([("received", 0.into()), ("done", flag(false))]),
                ),
                CloseCode::PROTOCOL_ORDER,
            ),
            ("an $ack", event("$ack", map([])), CloseCode::PROTOCOL_ORDER),
            (
                "a $channels",
                event("$channels", map([])),
                CloseCode::PROTOCOL_ORDER,
            ),
        ]) {
            let mut stream = guest.bare.channel(id, "echo").await;
            stream.write(&bytes).await;
            let reason = close_of(&mut stream, what).await;
            assert_eq!(reason.code, code, "{what}: {reason}");
        }
        // A gap that is sound is nobody's harm.
        let mut stream = guest.bare.channel(100, "echo").await;
        let lost = map([("room", "a".into()), ("lost", u64::MAX.into())]);
        stream.write(&gap(lost)).await;
        answers(&mut stream, "a sound gap").await;
        // Its `$reply` is confirmed like any other frame.
        let mut guest = guest;
        let mut kept = guest.open(200, "echo", None).await;
        answers(&mut kept, "a resumable channel").await;
        let ack = Ack::decode(&said(&mut guest.control).await).expect("a sound $ack");
        assert_eq!((ack.channel, ack.own, ack.received), (200, false, 1));
        site.lives("parts of requests").await;
    })
    .await;
}
