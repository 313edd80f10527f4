//! Peers that mean harm or do not know better: what each gets, and that nobody else notices.

#[path = "hostile/bare.rs"]
mod bare;
#[path = "hostile/cases.rs"]
mod cases;
mod common;
#[path = "hostile/watch.rs"]
mod watch;

use std::net::SocketAddr;
use std::time::Duration;

use bare::{Bare, Ended, Stream, Value, event, frame, hello, map, open, request};
use cases::{Act, Case, Expect, noise};
use common::TOKEN;
use futures_util::FutureExt;
use proptest::strategy::{Strategy, ValueTree};
use serde_bytes::ByteBuf;
use tokio::net::UdpSocket;
use udpack::wire::{Decode, Message};
use udpack::{Channel, Client, CloseCode, CloseReason, ConnectError, Limits, Timeouts};
use watch::{ALONE, GROWTH, MARK, Site, until, within};

/// Runs one test by itself, and not for ever.
async fn alone<F: Future>(test: F) -> F::Output {
    let _alone = ALONE.lock().await;
    within(60, "the test", "all of it", test).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_hostile_act_gets_its_answer_and_nobody_else_notices() {
    alone(async {
        // Made first: they are part of the baseline.
        let cases = cases::all();
        assert!(cases.len() >= 90, "{} cases", cases.len());
        let site = Site::new(watch::builder()).await;
        for group in cases.chunks(8) {
            for case in group {
                within(10, &case.name, "the case", run(&site, case)).await;
                site.serves(&case.name).await;
            }
            let names: Vec<_> = group.iter().map(|case| case.name.as_str()).collect();
            site.check(&names.join(", ")).await;
        }
    })
    .await;
}

/// Does what the case says on a connection of its own, and checks what comes of it.
async fn run(site: &Site, case: &Case) {
    let name = &case.name;
    let bare = site.dial().await;
    let mut streams: Vec<Stream> = Vec::new();
    let (mut now, mut admitted, mut ended) = (0, false, false);
    for act in &case.acts {
        match act {
            Act::Stream | Act::Hello | Act::Open(_) => {
                streams.push(bare.stream().await);
                now = streams.len() - 1;
            }
            Act::Control => now = 0,
            _ => {}
        }
        match act {
            Act::Stream | Act::Control => {}
            Act::Hello => {
                streams[now].write(&hello(TOKEN)).await;
                let welcome = streams[now].message().await.expect("admitted");
                assert_eq!(welcome.event(), "$welcome", "{name}");
                admitted = true;
            }
            Act::Open(channel) => streams[now].write(&open(1, channel)).await,
            Act::Send(bytes) => streams[now].write(bytes).await,
            Act::Dribble(bytes) => dribble(&bare, &mut streams[now], bytes).await,
            Act::Read => drop(streams[now].message().await.expect("a message")),
            Act::Fin => {
                let _ = streams[now].send.finish();
                ended = true;
            }
            Act::Reset(code) => {
                let _ = streams[now].send.reset((*code).into());
                ended = true;
            }
            Act::Stop(code) => drop(streams[now].recv.stop((*code).into())),
        }
    }
    match &case.expect {
        Expect::Socket(code) => {
            let error = bare.conn.closed().await;
            let quinn::ConnectionError::ApplicationClosed(close) = &error else {
                panic!("{name}: expected {code}, got {error}");
            };
            let got = CloseCode::new(close.error_code.into_inner());
            assert_eq!(got, *code, "{name}: {close}");
            assert!(!close.reason.is_empty(), "{name}: no text");
            if !admitted {
                for stream in &mut streams {
                    let said = stream.recv.read_chunk(1, true).await;
                    assert!(!matches!(said, Ok(Some(_))), "{name}: something was said");
                }
            }
        }
        Expect::Channel(code) => {
            let stream = &mut streams[now];
            let (last, end) = rest(stream).await;
            assert_eq!(end, Ended::Fin, "{name}");
            let last = last.unwrap_or_else(|| panic!("{name}: no $close"));
            assert_eq!(last.event(), "$close", "{name}");
            let reason = CloseReason::decode(&last).expect("a sound $close");
            assert_eq!(reason.code, *code, "{name}: {reason}");
            assert!(!reason.text.is_empty(), "{name}: no text");
            if !ended {
                let stopped = stream.send.stopped().await;
                let stopped = stopped.expect("the connection lives").map(u64::from);
                assert_eq!(stopped, Some(code.value()), "{name}");
            }
        }
        Expect::Fin => {
            let (last, end) = rest(&mut streams[now]).await;
            assert_eq!(end, Ended::Fin, "{name}");
            assert!(last.is_none_or(|last| last.event() != "$close"), "{name}");
        }
        Expect::Reset(code) => {
            let reset = streams[now].recv.received_reset().await;
            let reset = reset.expect("the connection lives").map(u64::from);
            assert_eq!(reset, Some(*code), "{name}");
        }
        Expect::Gone => {
            // One channel is left in all: the one of the client that behaves.
            let channels = || {
                site.server
                    .sockets()
                    .iter()
                    .map(|socket| socket.channels())
                    .sum::<usize>()
            };
            until(&format!("{name}: the channel is gone"), || channels() == 1).await;
        }
        Expect::Fault(code) => {
            let fault = streams[now].message().await.expect("an answer");
            assert_eq!((fault.event(), fault.id()), ("$fault", Some(7)), "{name}");
            let fields = fault.fields().expect("a map");
            assert_eq!(fields.str("code").expect("a code"), *code, "{name}");
            assert!(
                fields.str("message").expect("a text").len() <= 1024,
                "{name}"
            );
            still_answers(&mut streams[now], name).await;
        }
        Expect::Lives => still_answers(&mut streams[now], name).await,
        Expect::Echoes(bytes) => {
            let said = streams[now].message().await.expect("the echo");
            let said = said.data::<ByteBuf>().expect("bytes");
            assert!(said == bytes[..], "{name}: the bytes came back changed");
            still_answers(&mut streams[now], name).await;
        }
        Expect::Admitted => {
            let welcome = streams[now].message().await.expect("admitted");
            assert_eq!(welcome.event(), "$welcome", "{name}");
        }
    }
    if !matches!(case.expect, Expect::Socket(_)) {
        // A hello may have asked for frames too small to answer in: an end shows that the channel works too.
        let mut channel = bare.channel(2, "sink").await;
        channel.write(&event("say", Value::Nil)).await;
        channel.send.finish().expect("not finished before");
        assert_eq!(
            channel.message().await.expect_err("an end"),
            Ended::Fin,
            "{name}"
        );
        assert_eq!(bare.conn.close_reason(), None, "{name}: the connection");
    }
    drop(streams);
    drop(bare);
}

async fn dribble(bare: &Bare, stream: &mut Stream, bytes: &[u8]) {
    for byte in bytes {
        stream.write(&[*byte]).await;
        tokio::select! {
            _ = bare.conn.closed() => return,
            _ = stream.send.stopped() => return,
            () = tokio::time::sleep(Duration::from_millis(40)) => {}
        }
    }
}

/// Reads to the end: the last message, and how it ended.
async fn rest(stream: &mut Stream) -> (Option<Message>, Ended) {
    let mut last = None;
    loop {
        match stream.message().await {
            Ok(message) => last = Some(message),
            Err(end) => return (last, end),
        }
    }
}

async fn still_answers(stream: &mut Stream, name: &str) {
    const ID: u64 = 999_999;
    stream.write(&request("ping", Value::Nil, ID.into())).await;
    loop {
        let message = stream.message().await;
        let message = message.unwrap_or_else(|end| panic!("{name}: the channel is over: {end:?}"));
        if message.id() == Some(ID) {
            assert_eq!(message.event(), "$reply", "{name}");
            return;
        }
    }
}

/// F9: where the stream is cut makes no difference.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_split_of_a_session_is_read_alike() {
    alone(async {
        let site = Site::new(watch::builder()).await;
        let control = hello(TOKEN);
        let channel = [
            open(1, "echo"),
            event("say", "hi".into()),
            request("ask", map([("n", Value::Uint(7))]), Value::Uint(7)),
        ]
        .concat();
        let whole = session(&site, &[&control], &[&channel]).await;
        assert_eq!(whole.len(), 2);
        for at in 1..control.len() {
            let (head, tail) = control.split_at(at);
            assert_eq!(
                session(&site, &[head, tail], &[&channel]).await,
                whole,
                "hello at {at}"
            );
        }
        for at in 1..channel.len() {
            let (head, tail) = channel.split_at(at);
            assert_eq!(
                session(&site, &[&control], &[head, tail]).await,
                whole,
                "channel at {at}"
            );
        }
        let bytes: Vec<_> = control.chunks(1).collect();
        let more: Vec<_> = channel.chunks(1).collect();
        assert_eq!(session(&site, &bytes, &more).await, whole, "bytes");
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        for _ in 0..40 {
            let cuts = (1..channel.len(), 1..channel.len())
                .new_tree(&mut runner)
                .expect("two places")
                .current();
            let (a, b) = (cuts.0.min(cuts.1), cuts.0.max(cuts.1));
            let parts = [&channel[..a], &channel[a..b], &channel[b..]];
            assert_eq!(
                session(&site, &[&control], &parts).await,
                whole,
                "channel at {cuts:?}"
            );
        }
        site.check("splits").await;
    })
    .await;
}

/// One session, each part of its streams in a packet of its own; returns the answers of the channel.
async fn session(
    site: &Site,
    control: &[&[u8]],
    channel: &[&[u8]],
) -> Vec<(String, Option<u64>, Vec<u8>)> {
    let bare = site.dial().await;
    let mut first = bare.stream().await;
    send_apart(&bare, &mut first, control).await;
    let welcome = first.message().await.expect("admitted");
    assert_eq!(welcome.event(), "$welcome");
    let mut stream = bare.stream().await;
    send_apart(&bare, &mut stream, channel).await;
    stream.send.finish().expect("not finished before");
    let mut answers = Vec::new();
    let end = loop {
        match stream.message().await {
            Ok(message) => answers.push((
                message.event().to_owned(),
                message.id(),
                message.raw().to_vec(),
            )),
            Err(end) => break end,
        }
    };
    assert_eq!(end, Ended::Fin);
    drop(bare);
    answers
}

/// Writes each part once the packet with the one before has left.
async fn send_apart(bare: &Bare, stream: &mut Stream, parts: &[&[u8]]) {
    for part in parts {
        let sent = bare.conn.stats().frame_tx.stream;
        stream.write(part).await;
        until("the packet has left", || {
            bare.conn.stats().frame_tx.stream > sent
        })
        .await;
    }
}

/// F6: a length is a promise; memory follows the bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn announced_frames_that_never_come_hold_nothing() {
    alone(async {
        let site = Site::new(watch::builder()).await;
        let (bare, control) = site.admitted().await;
        let mut streams = Vec::new();
        for id in 1..=60 {
            let mut stream = bare.channel(id, "echo").await;
            stream.write(&(1_u32 << 20).to_be_bytes()).await;
            streams.push(stream);
        }
        site.others_live("60 promises").await;
        assert!(
            site.grown() < GROWTH,
            "{} KiB for 60 promises",
            site.grown()
        );
        for stream in &mut streams {
            let close = stream.message().await.expect("$close");
            let reason = CloseReason::decode(&close).expect("a sound $close");
            assert_eq!(reason.code, CloseCode::FRAME_TIMEOUT);
        }
        assert!(
            site.grown() < GROWTH,
            "{} KiB after 60 promises",
            site.grown()
        );
        drop((streams, control));
        drop(bare);
        site.check("60 promises").await;
    })
    .await;
}

/// M3: what looks small on the wire stays small in memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mebibyte_of_tiny_values_is_refused_in_bounded_memory() {
    alone(async {
        let messages = [
            &b"\xc0"[..],
            b"\x91\xc0",
            b"\x91\x91\xc0",
            b"\x80",
            b"\xa1a",
            b"\x81\xc0\xc0",
        ]
        .map(|item| {
            let count = (1 << 20) / item.len();
            let mut body = b"\x92\xa3say\xdd".to_vec();
            body.extend((count as u32).to_be_bytes());
            body.extend(item.repeat(count));
            (item, frame(&body))
        });
        let site = Site::new(watch::builder()).await;
        for (item, message) in &messages {
            let (bare, control) = site.admitted().await;
            for id in 1..=16 {
                let mut stream = bare.channel(id, "echo").await;
                stream.write(message).await;
                let close = stream.message().await.expect("$close");
                let reason = CloseReason::decode(&close).expect("a sound $close");
                assert_eq!(reason.code, CloseCode::BAD_MSGPACK, "{item:?}");
            }
            assert!(site.grown() < 16 << 10, "{} KiB for {item:?}", site.grown());
            drop(control);
            drop(bare);
            site.check("tiny values").await;
        }
    })
    .await;
}

/// F8: many small frames are served, in their turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_the_smallest_frames_starves_nobody() {
    alone(async {
        const FRAMES: usize = 250_000;
        let flood = frame(b"\x92\xa1a\xc0").repeat(FRAMES);
        let site = Site::new(watch::builder()).await;
        let (bare, control) = site.admitted().await;
        let mut stream = bare.channel(1, "sink").await;
        let flooding = async {
            for part in flood.chunks(64 << 10) {
                stream.write(part).await;
            }
            stream
                .write(&request("count", Value::Nil, Value::Uint(1)))
                .await;
            stream.message().await.expect("the count")
        };
        let mut flooding = Box::pin(within(40, "the flood", "all of it", flooding));
        let mut pings = 0;
        let count = loop {
            tokio::select! {
                count = &mut flooding => break count,
                () = site.others_live("the flood") => pings += 1,
            }
        };
        assert_eq!(count.data::<usize>().expect("a number"), FRAMES);
        assert!(
            pings > 10,
            "the other client was served {pings} times meanwhile"
        );
        drop(flooding);
        drop((stream, control));
        drop(bare);
        site.check("the flood").await;
    })
    .await;
}

/// C1: no more streams than were granted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_channels_with_one_number_one_is_served() {
    alone(async {
        let server = common::server().channel("hi", |channel: Channel| async move {
            let _ = channel.send("hi", &channel.is_resumable()).await;
            channel.closed().await;
        });
        let server = common::bind(server).await;
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().expect("an address"));
        let endpoint = endpoint.expect("an endpoint");
        for _ in 0..5 {
            let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
            let bare = Bare::dial(&endpoint, server.local_addr(), config).await;
            let bare = bare.expect("sound");
            let mut control = bare.stream().await;
            let fields = map([
                ("v", 1.into()),
                ("token", TOKEN.into()),
                ("agent", "bare".into()),
                ("resume", map([])),
            ]);
            control.write(&event("$hello", fields)).await;
            control.message().await.expect("admitted");
            for id in 1..=30_u64 {
                let fields = map([
                    ("id", id.into()),
                    ("name", "hi".into()),
                    ("resumable", Value::Raw(vec![0xc3])),
                ]);
                let open = event("$open", fields);
                let (mut one, mut two) = (bare.stream().await, bare.stream().await);
                tokio::join!(one.write(&open), two.write(&open));
                let (one, two) = tokio::join!(one.message(), two.message());
                let mut events = [one, two].map(|message| {
                    let message = message.expect("a message");
                    if message.event() == "$close" {
                        let reason = CloseReason::decode(&message).expect("sound");
                        assert_eq!(reason.code, CloseCode::PROTOCOL_ORDER, "{reason}");
                    }
                    message.event().to_owned()
                });
                events.sort();
                assert_eq!(events, ["$close", "hi"], "number {id}");
            }
            bare.conn.close(0_u32.into(), b"");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channels_end_at_the_limit_and_come_back() {
    alone(async {
        let site = Site::new(watch::builder()).await;
        let (bare, control) = site.admitted().await;
        let mut streams = Vec::new();
        for id in 1..=64 {
            streams.push(bare.channel(id, "echo").await);
        }
        let mut more = Box::pin(bare.conn.open_bi());
        assert_no(&bare, more.as_mut(), &mut streams[0]).await;
        site.others_live("64 channels").await;
        // Credit comes back in lots of an eighth.
        for mut stream in streams.drain(..32) {
            stream.send.finish().expect("not finished before");
            let (_, end) = rest(&mut stream).await;
            assert_eq!(end, Ended::Fin);
        }
        drop(more.await.expect("room for one more"));
        drop((streams, control));
        drop(bare);
        site.check("64 channels").await;
    })
    .await;
}

/// `future` is not ready, and not after a round trip either.
async fn assert_no<F: Future>(bare: &Bare, mut future: std::pin::Pin<&mut F>, stream: &mut Stream) {
    assert!(futures_util::poll!(future.as_mut()).is_pending());
    still_answers(stream, "a round trip").await;
    assert!(futures_util::poll!(future.as_mut()).is_pending());
    assert_eq!(bare.conn.close_reason(), None);
}

/// C2: streams with one byte and no more are given back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channels_that_never_begin_are_given_back() {
    alone(async {
        let site = Site::new(watch::builder()).await;
        let (bare, control) = site.admitted().await;
        // quinn tells of streams that are free again once they are more than an eighth of all.
        for (round, count) in [(0, 64), (1, 64 - 64 / 8)] {
            let mut streams = Vec::new();
            for _ in 0..count {
                let opened = within(5, "one byte", "a free stream", bare.stream());
                let mut stream = opened.await;
                stream.write(&[0]).await;
                streams.push(stream);
            }
            for stream in &mut streams {
                let close = stream.message().await.expect("$close");
                let reason = CloseReason::decode(&close).expect("a sound $close");
                assert_eq!(reason.code, CloseCode::FRAME_TIMEOUT, "round {round}");
            }
        }
        drop(control);
        drop(bare);
        site.check("one byte each").await;
    })
    .await;
}

/// C3: opening and resetting as fast as the line carries it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rapid_resets_cost_the_connection() {
    alone(async {
        let site = Site::new(watch::builder()).await;
        let (bare, control) = site.admitted().await;
        let mut opened = 0;
        let error = loop {
            match bare.conn.open_bi().await {
                Ok((mut send, mut recv)) => {
                    opened += 1;
                    let _ = send.write(&open(opened, "echo")).await;
                    let _ = send.reset(0_u32.into());
                    let _ = recv.stop(0_u32.into());
                }
                Err(error) => break error,
            }
        };
        let quinn::ConnectionError::ApplicationClosed(close) = error else {
            panic!("{error}");
        };
        assert_eq!(u64::from(close.error_code), CloseCode::RATE_LIMITED.value());
        assert!(opened >= 200, "{opened} channels are within the burst");
        drop(control);
        drop(bare);
        site.check("rapid resets").await;
    })
    .await;
}

/// C5: what is not granted cannot be used: no unidirectional stream before admission, then one at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unidirectional_streams_are_granted_one_at_a_time() {
    alone(async {
        let site = Site::new(watch::builder()).await;
        let bare = site.dial().await;
        assert!(bare.conn.open_uni().now_or_never().is_none());
        let control = bare.enter(TOKEN).await;
        let mut stream = bare.channel(1, "echo").await;
        let open = bare.conn.open_uni();
        let mut first = within(5, "one stream", "it is granted", open)
            .await
            .expect("a connection");
        first.write_all(b"\x92").await.expect("room");
        let mut second = Box::pin(bare.conn.open_uni());
        assert_no(&bare, second.as_mut(), &mut stream).await;
        drop((second, first, stream, control));
        drop(bare);
        site.check("streams of other kinds").await;
    })
    .await;
}

/// C8: a channel that is gone leaves nothing behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_channels_one_after_the_other_leave_nothing() {
    alone(async {
        let limits = Limits {
            channel_rate: 1_000_000,
            ..watch::limits()
        };
        let site = Site::new(watch::builder().limits(limits)).await;
        let (bare, control) = site.admitted().await;
        for id in 0..3_000 {
            let mut stream = bare.channel(id, "echo").await;
            stream.write(&event("say", Value::Nil)).await;
            stream.send.finish().expect("not finished before");
            assert_eq!(stream.message().await.expect("the echo").event(), "say");
            assert_eq!(stream.message().await.expect_err("an end"), Ended::Fin);
        }
        assert!(
            site.grown() < GROWTH,
            "{} KiB after 3,000 channels",
            site.grown()
        );
        drop(control);
        drop(bare);
        site.check("3,000 channels").await;
    })
    .await;
}

/// A7: guessing slows the guesser down, and shuts out nobody: not even who comes from the same address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guesser_is_slowed_down_and_the_right_token_is_still_let_in() {
    alone(async {
        let limits = Limits {
            auth_failures: 3,
            ..watch::limits()
        };
        let site = Site::new(watch::builder().limits(limits)).await;
        let address = site.address().to_string();
        let guess = |token: String| {
            Client::builder()
                .pin(site.server.fingerprint())
                .token(token)
                .local_address(SocketAddr::from(([127, 0, 0, 9], 0)))
                .connect(&address)
        };
        for try_no in 1..=4 {
            let error = guess(format!("{MARK}{try_no}")).await.expect_err("a guess");
            let ConnectError::Denied(reason) = error else {
                panic!("{error}");
            };
            assert_eq!(reason.code, CloseCode::AUTH_FAILED, "try {try_no}");
            let slowed = site.server.metrics().tokens_slowed;
            assert_eq!(slowed, u64::from(try_no > 3), "try {try_no}");
        }
        let socket = guess(TOKEN.to_owned()).await.expect("let in");
        assert_eq!(site.server.metrics().tokens_slowed, 2);
        drop(socket);
        site.check("a guesser").await;
    })
    .await;
}

/// B7, B10: a peer of another protocol does not get as far as a stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_protocols_fail_in_the_handshake() {
    alone(async {
        let site = Site::new(watch::builder()).await;
        for protocols in [&[][..], &[&b"h3"[..]], &[b"udpack/2"], &[b"h3", b"hq-29"]] {
            let config = bare::quic(bare::tls(protocols), 1 << 20);
            let Err(error) = site.dial_with(config).await else {
                panic!("{protocols:?} was accepted");
            };
            let quinn::ConnectionError::ConnectionClosed(close) = &error else {
                panic!("{protocols:?}: {error}");
            };
            // 0x100 and the TLS alert no_application_protocol, 120.
            assert_eq!(u64::from(close.error_code), 0x178, "{protocols:?}: {close}");
        }
        // B10: nearly the 64 KiB that TLS can carry, four times the buffer for what comes out of order.
        let mut tls = bare::tls(&[]);
        tls.alpn_protocols = (0..240_u8).map(|n| vec![n.max(1); 250]).collect();
        let config = bare::quic(tls, 1 << 20);
        for _ in 0..10 {
            let dialled = site.dial_with(config.clone()).await;
            assert!(dialled.is_err(), "none of the protocols is ours");
        }
        let config = bare::quic(bare::tls(&[b"h3", b"udpack/1"]), 1 << 20);
        let both = site.dial_with(config).await;
        drop(both.expect("one of them is ours"));
        site.check("other protocols").await;
    })
    .await;
}

/// B9: what was captured cannot be said again in the first packet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_accepted_before_the_handshake_is_done() {
    alone(async {
        let site = Site::new(watch::builder()).await;
        let mut tls = bare::tls(&[b"udpack/1"]);
        tls.enable_early_data = true;
        let config = bare::quic(tls, 1 << 20);
        // The first connection brings the ticket that early data needs.
        let first = site.dial_with(config.clone()).await;
        let first = first.expect("the handshake is sound");
        let control = first.enter(TOKEN).await;
        let mut channel = first.channel(1, "echo").await;
        still_answers(&mut channel, "the first connection").await;
        drop((control, channel));
        drop(first);
        let connecting = site
            .peers
            .connect_with(config, site.address(), "any.name")
            .expect("settings that can dial");
        let Err(connecting) = connecting.into_0rtt() else {
            panic!("the server's ticket permits early data");
        };
        let conn = connecting.await.expect("the handshake is sound");
        drop(conn);
        site.check("early data").await;
    })
    .await;
}

/// B8, Q2: datagrams that are no QUIC, or no QUIC of ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_datagrams_are_dropped_or_told_the_version() {
    alone(async {
        let site = Site::new(watch::builder()).await;
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        socket.connect(site.address()).await.expect("loopback");
        let version = |version: u32, length: usize| {
            let mut packet = vec![0xc3];
            packet.extend(version.to_be_bytes());
            packet.push(8);
            packet.extend([7; 8]);
            packet.push(8);
            packet.extend([9; 8]);
            packet.resize(length, 0);
            packet
        };
        let mut garbage: Vec<(String, Vec<u8>)> = vec![
            ("nothing".into(), vec![]),
            ("65,507 bytes".into(), vec![0x40; 65_507]),
            (
                "another version, 100 bytes".into(),
                version(0xbaba_baba, 100),
            ),
            ("version 1, 100 bytes".into(), version(1, 100)),
            ("version 1, 1,200 bytes".into(), version(1, 1200)),
            ("version 0".into(), version(0, 1200)),
            (
                "a long connection id".into(),
                [&[0xc3, 0, 0, 0, 1, 0xff][..], &[1; 1300]].concat(),
            ),
            ("HTTP".into(), b"GET / HTTP/1.1\r\n\r\n".to_vec()),
            (
                "a DNS question".into(),
                b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01".to_vec(),
            ),
        ];
        for length in [1, 2, 5, 20, 21, 40, 1199, 1200, 1500, 9000] {
            for seed in 1..=20 {
                let mut bytes = noise(seed * 7919 + length as u64, length);
                garbage.push((format!("noise {seed} of {length} bytes"), bytes.clone()));
                bytes[0] |= 0xc0;
                garbage.push((format!("long noise {seed} of {length} bytes"), bytes));
            }
        }
        for (name, datagram) in &garbage {
            socket
                .send(datagram)
                .await
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        // The answer shows that all before it was looked at.
        socket
            .send(&version(0xbaba_baba, 1200))
            .await
            .expect("loopback");
        let mut answer = vec![0; 2048];
        let spoken = loop {
            let got = within(
                5,
                "a version nobody speaks",
                "an answer",
                socket.recv(&mut answer),
            );
            let length = got.await.expect("loopback");
            // A long header of version 0, our id for the peer, then the versions on offer.
            if answer[..5] == [answer[0] | 0x80, 0, 0, 0, 0] && answer[6..14] == [9; 8] {
                break answer[23..length].to_vec();
            }
        };
        assert!(
            spoken.chunks(4).any(|version| version == [0, 0, 0, 1]),
            "version 1 is on offer: {spoken:02x?}"
        );
        drop(socket);
        site.check("garbage datagrams").await;
    })
    .await;
}

/// F7, R4: peers that read nothing cost what the limits say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_read_nothing_hold_a_bounded_queue() {
    alone(async {
        let limits = Limits {
            outbound_bytes: 64 << 10,
            ..watch::limits()
        };
        let timeouts = Timeouts {
            slow_peer: Duration::from_secs(2),
            ..watch::timeouts()
        };
        let site = Site::new(watch::builder().limits(limits).timeouts(timeouts)).await;
        let config = bare::quic(bare::tls(&[b"udpack/1"]), 16 << 10);
        let bare = site.dial_with(config).await.expect("a sound handshake");
        let control = bare.enter(TOKEN).await;
        let mut streams = Vec::new();
        for id in 1..=20 {
            streams.push(bare.channel(id, "spam").await);
        }
        site.others_live("20 peers that do not read").await;
        // 20 channels with at most 64 KiB and one message queued, and 16 KiB in the peer's window.
        for stream in &mut streams {
            let reset = stream
                .recv
                .received_reset()
                .await
                .expect("the connection lives");
            assert_eq!(reset.map(u64::from), Some(CloseCode::SLOW_PEER.value()));
            assert!(site.grown() < GROWTH, "{} KiB", site.grown());
        }
        drop((streams, control));
        drop(bare);
        site.check("peers that do not read").await;
    })
    .await;
}
