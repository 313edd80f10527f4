//! Volatile messages end to end: the newest arrives, by datagram or stream, and nobody can do harm with them.

#[allow(dead_code, reason = "the hostile tests use the rest")]
#[path = "hostile/bare.rs"]
mod bare;
mod common;

use std::net::SocketAddr;
use std::time::Duration;

use bare::{Bare, Value};
use bytes::Bytes;
use common::{TOKEN, bind, bounded, client, connect, server};
use futures_util::FutureExt;
use serde_bytes::ByteBuf;
use udpack::{
    Channel, CloseCode, EncodeError, Encoded, Limits, SendError, Server, Socket, Timeouts,
};

/// Looks again and again until `done`.
async fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A client, and its socket at the server.
async fn pair(server: &Server) -> (Socket, Socket) {
    let dialled = connect(server).await;
    let accepted = server.accept().await.expect("one socket");
    (dialled, accepted)
}

/// Connects bare QUIC, without being let in.
async fn dial(server: &Server) -> (quinn::Endpoint, Bare) {
    let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0)))
        .expect("a free loopback port");
    let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
    let bare = Bare::dial(&endpoint, server.local_addr(), config)
        .await
        .expect("the handshake is sound");
    (endpoint, bare)
}

fn bytes_of(values: Vec<Value>) -> Bytes {
    let mut bytes = Vec::new();
    Value::Array(values).write(&mut bytes);
    bytes.into()
}

async fn next(socket: &Socket) -> udpack::Volatile {
    socket.recv_volatile().await.expect("the socket lives")
}

#[tokio::test]
async fn small_ones_arrive_both_ways() {
    bounded(async {
        let server = bind(server()).await;
        let (dialled, accepted) = pair(&server).await;
        for n in 0..20_u32 {
            let key = format!("key {n}");
            dialled.send_volatile_keyed("at", &key, &n).expect("sent");
            accepted.send_volatile_keyed("at", &key, &n).expect("sent");
        }
        for socket in [&accepted, &dialled] {
            for n in 0..20_u32 {
                let message = next(socket).await;
                assert_eq!(message.event(), "at");
                assert_eq!(message.key(), Some(&*format!("key {n}")));
                assert_eq!(message.seq(), Some(u64::from(n) + 1));
                assert_eq!(message.data::<u32>().expect("a number"), n);
            }
            assert_eq!(socket.metrics().volatile_received, 20);
            assert_eq!(socket.metrics().volatile_sent, 20);
        }
    })
    .await;
}

#[tokio::test]
async fn the_newest_of_each_key_waits_for_a_stalled_receiver() {
    bounded(async {
        let server = bind(server()).await;
        let (dialled, accepted) = pair(&server).await;
        for n in 0..300_u32 {
            dialled.send_volatile("at", &n).expect("sent");
            dialled.send_volatile_keyed("at", "a", &n).expect("sent");
            dialled.send_volatile_keyed("to", "a", &n).expect("sent");
            // Not all at once: most shall travel.
            tokio::task::yield_now().await;
        }
        until(|| {
            let dropped_there = dialled.metrics().volatile_dropped;
            accepted.metrics().volatile_received + dropped_there == 900
        })
        .await;
        assert!(accepted.metrics().volatile_received > 3, "some travelled");
        let mut got = Vec::new();
        while let Some(Some(message)) = accepted.recv_volatile().now_or_never() {
            let n = message.data::<u32>().expect("a number");
            got.push((
                message.event().to_owned(),
                message.key().map(str::to_owned),
                n,
            ));
        }
        let newest = |event: &str, key: Option<&str>| (event.into(), key.map(str::to_owned), 299);
        assert_eq!(
            got,
            [
                newest("at", None),
                newest("at", Some("a")),
                newest("to", Some("a"))
            ]
        );
        assert_eq!(
            accepted.metrics().volatile_received - accepted.metrics().volatile_dropped,
            3
        );
    })
    .await;
}

#[tokio::test]
async fn large_ones_take_a_stream_and_the_newest_of_those_that_wait_wins() {
    bounded(async {
        let server = bind(server()).await;
        let (dialled, accepted) = pair(&server).await;
        let data = |n: u8, len: usize| ByteBuf::from(vec![n; len]);
        // The driver has no turn in between: only the last of them is sent.
        for n in 0..50 {
            dialled
                .send_volatile("state", &data(n, 300_000))
                .expect("sent");
        }
        let message = next(&accepted).await;
        assert_eq!(message.seq(), Some(50));
        assert_eq!(message.data::<ByteBuf>().expect("bytes"), data(49, 300_000));
        assert_eq!(dialled.metrics().volatile_dropped, 49);
        assert_eq!(dialled.metrics().volatile_sent, 1);
        // One after the other, and small ones beside them.
        for n in 0..5_u8 {
            let key = n.to_string();
            let large = data(n, (1 << 20) - 100);
            accepted
                .send_volatile_keyed("state", &key, &large)
                .expect("sent");
            accepted
                .send_volatile_keyed("level", &key, &n)
                .expect("sent");
            let mut events = [next(&dialled).await, next(&dialled).await];
            events.sort_by(|a, b| a.event().cmp(b.event()));
            assert_eq!(events[0].data::<u8>().expect("a number"), n);
            assert_eq!(events[1].data::<ByteBuf>().expect("bytes"), large);
        }
        let text = "x".repeat(1200);
        dialled.send_volatile("text", &text).expect("sent");
        assert_eq!(next(&accepted).await.data::<&str>().expect("text"), text);
    })
    .await;
}

#[tokio::test]
async fn what_waits_is_bounded_at_both_ends() {
    bounded(async {
        let limits = |keys: usize| Limits {
            volatile_keys: keys,
            ..Limits::default()
        };
        let server = bind(server().limits(limits(4))).await;
        let dialled = client(&server)
            .limits(limits(8))
            .connect(&server.local_addr().to_string())
            .await
            .expect("let in");
        let accepted = server.accept().await.expect("one socket");
        for n in 0..100_u8 {
            dialled
                .send_volatile_keyed("at", &n.to_string(), &n)
                .expect("sent");
        }
        assert_eq!(dialled.metrics().volatile_dropped, 92);
        until(|| accepted.metrics().volatile_received == 8).await;
        assert_eq!(accepted.metrics().volatile_dropped, 4);
        for n in 96..100_u8 {
            assert_eq!(next(&accepted).await.data::<u8>().expect("a number"), n);
        }
        assert!(accepted.recv_volatile().now_or_never().is_none());
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_sent_is_an_error_and_the_end_ends_it() {
    bounded(async {
        let server = bind(server()).await;
        let (dialled, accepted) = pair(&server).await;
        let refused = |sent: Result<(), SendError>| match sent {
            Err(SendError::Encode(error)) => error,
            other => panic!("{other:?}"),
        };
        assert!(matches!(
            refused(dialled.send_volatile("$open", &1)),
            EncodeError::Reserved(_)
        ));
        assert!(matches!(
            refused(dialled.send_volatile("", &1)),
            EncodeError::Name(_)
        ));
        assert!(matches!(
            refused(dialled.send_volatile_keyed("at", "a\nb", &1)),
            EncodeError::Name(_)
        ));
        let large = "x".repeat(1 << 20);
        assert!(matches!(
            refused(dialled.send_volatile("at", &large)),
            EncodeError::TooLarge { .. }
        ));
        dialled.send_volatile("at", &1_u8).expect("sent");
        until(|| accepted.metrics().volatile_received == 1).await;
        dialled.close(CloseCode::NORMAL, "done").await;
        assert!(matches!(
            dialled.send_volatile("at", &2_u8),
            Err(SendError::Closed(_))
        ));
        assert!(dialled.recv_volatile().await.is_none());
        accepted.closed().await;
        assert_eq!(next(&accepted).await.data::<u8>().expect("a number"), 1);
        assert!(accepted.recv_volatile().await.is_none());
    })
    .await;
}

#[tokio::test]
async fn the_bytes_are_as_specified() {
    bounded(async {
        let server = bind(server()).await;
        let (_endpoint, bare) = dial(&server).await;
        let _control = bare.enter(TOKEN).await;
        let accepted = server.accept().await.expect("one socket");
        accepted.send_volatile("at", &7_u8).expect("sent");
        accepted
            .send_volatile_keyed("at", "x", &7_u8)
            .expect("sent");
        let first = bare.conn.read_datagram().await.expect("a datagram");
        assert_eq!(first[..], *b"\x93\xa2at\x07\x01");
        let second = bare.conn.read_datagram().await.expect("a datagram");
        assert_eq!(second[..], *b"\x94\xa2at\x07\x02\xa1x");
        let text = "x".repeat(5000);
        accepted.send_volatile("text", &text).expect("sent");
        let mut stream = bare.conn.accept_uni().await.expect("a stream");
        let read = stream.read_to_end(1 << 20).await.expect("all of it");
        let wanted = bytes_of(vec!["text".into(), Value::Str(text), Value::Uint(3)]);
        assert_eq!(read, wanted);
    })
    .await;
}

#[tokio::test]
async fn malformed_ones_are_counted_and_dropped() {
    bounded(async {
        let server = bind(server()).await;
        let (_endpoint, bare) = dial(&server).await;
        // Not let in yet: dropped, up to the moment of admission.
        for _ in 0..100 {
            let early = bytes_of(vec!["early".into(), Value::Uint(1)]);
            bare.conn.send_datagram(early).expect("sent");
        }
        let control = bare.enter(TOKEN).await;
        let accepted = server.accept().await.expect("one socket");
        let name = "n".repeat(129);
        let bad = [
            Bytes::new(),
            Bytes::from_static(b"\xc1"),
            Bytes::from_static(b"\x92\xa2at"),
            Bytes::from_static(b"\x92\xa2at\x07\x00"),
            Bytes::from_static(b"\xdd\xff\xff\xff\xff\xa2at"),
            Bytes::from(vec![0x91; 1000]),
            bytes_of(vec!["at".into()]),
            bytes_of(vec!["at".into(), Value::Nil, Value::Int(-1)]),
            bytes_of(vec!["at".into(), Value::Nil, Value::Nil]),
            bytes_of(vec!["at".into(), Value::Nil, Value::Uint(1), Value::Nil]),
            bytes_of(vec!["at".into(), Value::Nil, Value::Uint(1), "".into()]),
            bytes_of(vec![
                "at".into(),
                Value::Nil,
                Value::Uint(1),
                "k".into(),
                Value::Nil,
            ]),
            bytes_of(vec!["$open".into(), Value::Nil]),
            bytes_of(vec![Value::Str(name), Value::Nil]),
            bytes_of(vec![Value::Uint(1), Value::Nil]),
        ];
        for datagram in &bad {
            bare.conn.send_datagram(datagram.clone()).expect("sent");
        }
        // The same on a stream.
        let mut stream = bare.conn.open_uni().await.expect("one is granted");
        stream.write_all(b"\x92\xa2at").await.expect("room");
        stream.finish().expect("open");
        stream.stopped().await.expect("alive");
        until(|| accepted.metrics().volatile_malformed == bad.len() as u64 + 1).await;

        // Without a number, with one, older, and the same again.
        let at = |n: u64, seq: u64| bytes_of(vec!["at".into(), Value::Uint(n), Value::Uint(seq)]);
        let plain = |name: &str| bytes_of(vec![name.into(), Value::Nil]);
        let (first, again) = (at(1, u64::MAX - 1), at(3, u64::MAX - 1));
        for datagram in [plain("plain"), first, at(2, 5), again, plain("end")] {
            bare.conn.send_datagram(datagram).expect("sent");
        }
        let (mut got, mut last) = (Vec::new(), String::new());
        while last != "end" {
            let message = next(&accepted).await;
            last = message.event().to_owned();
            if last != "early" {
                let n = message.data::<Option<u64>>().expect("a number or nothing");
                got.push((last.clone(), message.seq(), n));
            }
        }
        assert_eq!(
            got,
            [
                ("plain".into(), None, None),
                ("at".into(), Some(u64::MAX - 1), Some(1)),
                ("end".into(), None, None)
            ]
        );
        assert_eq!(accepted.close_reason(), None);
        drop(control);
    })
    .await;
}

#[tokio::test]
async fn a_stream_that_is_too_long_or_never_ends_is_stopped() {
    bounded(async {
        let limits = Limits {
            frame: 100_000,
            ..Limits::default()
        };
        let timeouts = Timeouts {
            frame: Duration::from_millis(300),
            ..Timeouts::default()
        };
        let server = bind(server().limits(limits).timeouts(timeouts)).await;
        let (_endpoint, bare) = dial(&server).await;
        assert!(
            bare.conn.open_uni().now_or_never().is_none(),
            "none is granted before admission"
        );
        let _control = bare.enter(TOKEN).await;
        let accepted = server.accept().await.expect("one socket");

        let mut long = bare.conn.open_uni().await.expect("one is granted");
        let _ = long.write_all(&vec![0; 100_001]).await;
        let code = long.stopped().await.expect("alive").expect("stopped");
        assert_eq!(code.into_inner(), CloseCode::FRAME_TOO_LARGE.value());
        let _ = long.reset(0_u32.into());

        let mut endless = bare.conn.open_uni().await.expect("the next one");
        endless.write_all(b"\x92\xa2at").await.expect("room");
        assert!(
            bare.conn.open_uni().now_or_never().is_none(),
            "one at a time"
        );
        let code = endless.stopped().await.expect("alive").expect("stopped");
        assert_eq!(code.into_inner(), CloseCode::FRAME_TIMEOUT.value());
        let _ = endless.reset(0_u32.into());
        assert_eq!(accepted.metrics().volatile_dropped, 2);

        // One that its sender gives up does no harm, and the next one is taken.
        let mut given_up = bare.conn.open_uni().await.expect("the next one");
        given_up.write_all(b"\x92\xa2at").await.expect("room");
        given_up.reset(0_u32.into()).expect("open");
        let mut sound = bare.conn.open_uni().await.expect("the next one");
        sound.write_all(b"\x92\xa2at\x07").await.expect("room");
        sound.finish().expect("open");
        assert_eq!(next(&accepted).await.data::<u8>().expect("a number"), 7);
        assert_eq!(accepted.close_reason(), None);
    })
    .await;
}

/// A picture relay: what one client sends goes to all others in the room, not decoded, small or large, once for each socket.
#[tokio::test]
async fn a_room_passes_volatile_messages_on_without_decoding() {
    bounded(async {
        let server = server().channel("view", |channel: Channel| async move {
            channel.join("cam").expect("a sound room");
            channel.send("joined", &()).await.expect("alive");
            let (socket, session) = (channel.socket(), channel.session_id());
            let rooms = channel.rooms_handle().expect("a server's");
            while let Some(message) = socket.recv_volatile().await {
                let sent = rooms.to("cam").except(&session).relay_volatile(&message);
                channel
                    .send("relayed", &sent.delivered)
                    .await
                    .expect("alive");
            }
        });
        let server = bind(server).await;
        let mut clients = Vec::new();
        for channels in [1, 1, 3] {
            let socket = connect(&server).await;
            let mut own = Vec::new();
            for _ in 0..channels {
                let channel = socket.open("view").await.expect("a channel");
                let joined = channel.recv().await.expect("alive").expect("a message");
                assert_eq!(joined.event(), "joined");
                own.push(channel);
            }
            clients.push((socket, own));
        }
        let (sender, own) = &clients[0];
        for (n, size) in [(1_u64, 100), (2, 100_000)] {
            let picture = ByteBuf::from(vec![7; size]);
            let sent = (n, picture);
            let encoded = Encoded::new("frame", &sent).expect("sound");
            sender
                .send_volatile_encoded(Some("left"), &encoded)
                .expect("sent");
            let relayed = own[0].recv().await.expect("alive").expect("a message");
            assert_eq!(relayed.data::<u64>().expect("a number"), 2, "sockets");
            for (socket, _) in &clients[1..] {
                let message = next(socket).await;
                assert_eq!((message.event(), message.key()), ("frame", Some("left")));
                assert_eq!(message.seq(), Some(n), "the server's own count");
                assert_eq!(message.data::<(u64, ByteBuf)>().expect("a picture"), sent);
            }
        }
        // From the server, by name and to all; nobody gets it twice.
        let sent = server.rooms().to("cam").send_volatile("level", &3);
        assert_eq!(sent.expect("sound").delivered, 3);
        let sent = server
            .rooms()
            .to_channels("view")
            .send_volatile_keyed("level", "x", &4);
        assert_eq!(sent.expect("sound").delivered, 3);
        for (socket, _) in &clients {
            for level in [3, 4] {
                assert_eq!(next(socket).await.data::<u8>().expect("a level"), level);
            }
            assert!(socket.recv_volatile().now_or_never().is_none());
        }
        assert!(server.rooms().to("cam").send_volatile("$gap", &()).is_err());
        assert_eq!(
            server
                .rooms()
                .to("nobody")
                .send_volatile("x", &())
                .expect("sound")
                .delivered,
            0
        );
    })
    .await;
}
