//! The defects of this protocol's ancestor, as far as sessions and channels go: none of them is here.

mod common;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{bind, bounded, client, connect, server};
use futures_util::FutureExt;
use serde::Serialize;
use tokio::sync::mpsc;
use udpack::wire::{FrameDecoder, FrameError, Message, MessageError, PREFIX};
use udpack::{
    Channel, CloseCode, Context, Fault, Limits, RecvError, RequestError, SendError, Side, Timeouts,
};

/// A server that hands over each channel as it comes.
async fn handing_over() -> (udpack::Server, mpsc::UnboundedReceiver<Channel>) {
    let (give, channels) = mpsc::unbounded_channel();
    let server = bind(server().channel("x", move |channel: Channel| {
        let give = give.clone();
        async move {
            let _ = give.send(channel.clone());
            channel.closed().await;
        }
    }))
    .await;
    (server, channels)
}

/// B1: closing threw when the channel or socket was closed already, by this side or by the other.
#[tokio::test]
async fn b01_close_twice_is_harmless() {
    bounded(async {
        let (server, mut channels) = handing_over().await;
        let socket = connect(&server).await;
        let ours = socket.open("x").await.expect("a channel");
        let theirs = channels.recv().await.expect("the channel");
        let first = theirs.close(CloseCode::new(0x1001), "first").await;
        for text in ["again", "and again"] {
            assert_eq!(theirs.close(CloseCode::NORMAL, text).await, first);
        }
        let seen = ours.closed().await;
        assert_eq!((seen.code, seen.by), (CloseCode::new(0x1001), Side::Peer));
        assert_eq!(ours.close(CloseCode::NORMAL, "late").await, seen);
        // In the other order: this side first, and the peer's own close after it.
        let ours = socket.open("x").await.expect("a channel");
        let theirs = channels.recv().await.expect("the channel");
        let (a, b) = tokio::join!(
            ours.close(CloseCode::new(0x1002), "ours"),
            theirs.close(CloseCode::new(0x1003), "theirs")
        );
        for reason in [&a, &b] {
            assert!([0x1002, 0x1003].contains(&reason.code.value()), "{reason}");
        }
        let first = socket.close(CloseCode::new(0x1004), "bye").await;
        assert_eq!(socket.close(CloseCode::NORMAL, "again").await, first);
        socket.abort(CloseCode::NORMAL, "and again");
        assert_eq!(socket.closed().await, first);
        assert_eq!(first.code, CloseCode::new(0x1004));
    })
    .await;
}

/// B2: sending on a closed channel threw at the caller instead of telling it.
#[tokio::test]
async fn b02_send_after_close_is_an_error_of_its_own() {
    bounded(async {
        let (server, mut channels) = handing_over().await;
        let socket = connect(&server).await;
        let ours = socket.open("x").await.expect("a channel");
        let theirs = channels.recv().await.expect("the channel");
        ours.close(CloseCode::new(0x1001), "enough").await;
        let error = ours.send("say", &1).await.expect_err("closed");
        assert!(error.is_closed(), "{error}");
        assert!(ours.try_send("say", &1).expect_err("closed").is_closed());
        let error = ours.request::<_, ()>("ask", &1).await;
        assert!(matches!(
            error,
            Err(RequestError::Send(_) | RequestError::Closed(_))
        ));
        // The side that was closed: typed as well, and with the reason.
        let error = theirs.recv().await.expect_err("closed");
        assert_eq!(error.reason().code, CloseCode::new(0x1001));
        assert!(
            theirs
                .send("say", &1)
                .await
                .expect_err("closed")
                .is_closed()
        );
        // The socket under it is gone.
        let ours = socket.open("x").await.expect("a channel");
        channels.recv().await.expect("the channel");
        socket.abort(CloseCode::new(0x1002), "gone");
        socket.closed().await;
        ours.closed().await;
        assert!(ours.send("say", &1).await.expect_err("gone").is_closed());
        assert!(matches!(ours.finish().await, Err(SendError::Closed(_))));
    })
    .await;
}

/// B3: event names went to the same emitter as the channel's own life: a peer could fake `close`, and `error`
/// without a listener threw.
#[tokio::test]
async fn b03_event_names_of_a_peer_are_only_names() {
    bounded(async {
        let (server, mut channels) = handing_over().await;
        let socket = connect(&server).await;
        let ours = socket.open("x").await.expect("a channel");
        let theirs = channels.recv().await.expect("the channel");
        let names = [
            "close",
            "error",
            "end",
            "open",
            "constructor",
            "__proto__",
            "drain",
        ];
        for name in names {
            ours.send(name, &"fake").await.expect("queued");
        }
        for name in names {
            let message = theirs.recv().await.expect("open").expect("a message");
            assert_eq!(message.event(), name);
        }
        assert_eq!(theirs.close_reason(), None);
        // The protocol's own names cannot be sent at all.
        for name in ["$close", "$reply", "$open", "$anything"] {
            let error = ours.send(name, &1).await.expect_err("reserved");
            assert!(!error.is_closed(), "{error}");
        }
        theirs.send("still", &"here").await.expect("queued");
        assert!(ours.recv().await.expect("open").is_some());
    })
    .await;
}

/// B4: an exception of the application's was taken for a message that could not be decoded.
#[tokio::test]
async fn b04_a_handlers_failure_is_its_own_and_told_from_bad_data() {
    bounded(async {
        let server = bind(server().channel("rpc", |channel: Channel| async move {
            channel
                .on("panics", |_: u64, _: Context| async {
                    if true {
                        panic!("on purpose");
                    }
                })
                .on("fails", |_: u64, _: Context| async {
                    Err::<(), _>(Fault::new("mine", "no"))
                })
                .on(
                    "works",
                    |n: u64, _: Context| async move { Ok::<_, Fault>(n) },
                )
                .run()
                .await
        }))
        .await;
        let socket = connect(&server).await;
        let rpc = socket.open("rpc").await.expect("a channel");
        for (event, code) in [("panics", Fault::INTERNAL), ("fails", "mine")] {
            let error = rpc.request::<_, ()>(event, &1_u64).await;
            let Err(RequestError::Fault(fault)) = error else {
                panic!("{event}: {error:?}");
            };
            assert_eq!(fault.code, code, "{event}");
            let error = rpc.request::<_, ()>(event, &"text").await;
            let Err(RequestError::Fault(fault)) = error else {
                panic!("{event}: {error:?}");
            };
            assert_eq!(fault.code, Fault::BAD_PAYLOAD, "{event}");
        }
        let works = rpc.request::<_, u64>("works", &7_u64).await;
        assert_eq!(works.expect("no message was lost"), 7);
    })
    .await;
}

/// B5: whatever could be taken apart was a message: a string of two letters was an event and its data.
#[test]
fn b05_what_is_no_message_is_refused() {
    let refused = |body: &'static [u8]| {
        let error = Message::decode(Bytes::from_static(body)).expect_err("no message");
        error.close_code()
    };
    for body in [
        &b"\xa2ab"[..],
        b"\xc0",
        b"\x07",
        b"\x90",
        b"\x91\xa1a",
        b"\x82\xa1a\xc0\xa1b\xc0",
    ] {
        assert_eq!(refused(body), CloseCode::BAD_MESSAGE, "{body:02x?}");
    }
    for body in [
        &b"\xc1"[..],
        b"\x92\xa1a",
        b"\x92\xa1a\xc0\xc0",
        b"\x92\xa1a\xa1\xff",
    ] {
        assert_eq!(refused(body), CloseCode::BAD_MSGPACK, "{body:02x?}");
    }
    let error = Message::decode(Bytes::from_static(b"\xa2ab")).expect_err("no message");
    assert_eq!(error, MessageError::Shape { arity: None });
}

/// B6: nothing was bounded: neither the size of a message nor its depth.
#[test]
fn b06_limits_are_looked_at_before_memory_is() {
    let mut decoder = FrameDecoder::new(1 << 20);
    decoder.push(Bytes::from_static(&[0xff, 0xff, 0xff, 0xff]));
    let error = decoder.next_frame().expect_err("4 GiB");
    let (len, limit) = (u64::from(u32::MAX), 1 << 20);
    assert_eq!(error, FrameError::TooLarge { len, limit });
    // A million levels, on the stack of a test thread.
    let deep = [b"\x92\xa1a".to_vec(), vec![0x91; 1_000_000], vec![0xc0]].concat();
    let error = Message::decode(deep.into()).expect_err("too deep");
    assert_eq!(error.close_code(), CloseCode::BAD_MSGPACK);
    let many = [&b"\x92\xa1a\xdd\x00\x10\x00\x00"[..], &[0xc0; 1 << 20]].concat();
    let error = Message::decode(many.into()).expect_err("too many");
    assert_eq!(error.close_code(), CloseCode::BAD_MSGPACK);
}

/// B7: messages were as long as whatever one read returned.
#[test]
fn b07_messages_do_not_depend_on_how_their_bytes_arrive() {
    let bodies: [&[u8]; 3] = [
        b"\x92\xa1a\xc0",
        b"\x93\xa1b\xa3two\x02",
        b"\x92\xa1c\xc4\x03\x00\x00\x00",
    ];
    let stream: Vec<u8> = bodies
        .iter()
        .flat_map(|body| [&[0, 0, 0, body.len() as u8], *body].concat())
        .collect();
    let cut = |places: &[usize]| {
        let mut decoder = FrameDecoder::new(1024);
        let mut out: Vec<Bytes> = Vec::new();
        let mut from = 0;
        for to in places.iter().copied().chain([stream.len()]) {
            decoder.push(Bytes::copy_from_slice(&stream[from..to]));
            while let Some(body) = decoder.next_frame().expect("sound frames") {
                out.push(body);
            }
            from = to;
        }
        decoder.finish().expect("whole frames");
        out
    };
    let every: Vec<usize> = (1..stream.len()).collect();
    assert_eq!(cut(&every), bodies);
    for first in 1..stream.len() {
        assert_eq!(cut(&[first]), bodies, "cut at {first}");
        for second in first..stream.len() {
            assert_eq!(cut(&[first, second]), bodies, "cut at {first} and {second}");
        }
    }
    assert_eq!(PREFIX, 4);
}

/// B8: a connection that ended was dialled again at once, without end, and even after a close on purpose.
#[tokio::test]
async fn b08_nobody_dials_again_behind_the_applications_back() {
    bounded(async {
        let admitted = Arc::new(AtomicUsize::new(0));
        let count = admitted.clone();
        let server = bind(server().connection(move |socket| {
            count.fetch_add(1, Ordering::Relaxed);
            async move {
                socket.closed().await;
            }
        }))
        .await;
        let socket = connect(&server).await;
        let reason = socket.close(CloseCode::NORMAL, "").await;
        assert!(!reason.retry, "{reason}");
        // Told to come back later: a fact for the application, not an order to the library.
        let socket = connect(&server).await;
        while server.sockets().len() != 1 {
            tokio::task::yield_now().await;
        }
        let accepted = server.sockets().pop().expect("one socket");
        accepted.abort(CloseCode::SHUTTING_DOWN, "restarting");
        let reason = socket.closed().await;
        assert_eq!(
            (reason.code, reason.retry),
            (CloseCode::SHUTTING_DOWN, true)
        );
        assert!(socket.open("x").await.is_err());
        let last = connect(&server).await;
        last.close(CloseCode::NORMAL, "").await;
        assert_eq!(
            admitted.load(Ordering::Relaxed),
            3,
            "one for each call of connect"
        );
    })
    .await;
}

/// B10: each call of connect added its listeners to those of the calls before, so that everything came twice.
#[tokio::test]
async fn b10_each_connect_is_a_socket_of_its_own() {
    bounded(async {
        let (heard, mut hearing) = mpsc::unbounded_channel::<(String, u64)>();
        let server = bind(server().channel("log", move |channel: Channel| {
            let heard = heard.clone();
            async move {
                while let Some(message) = channel.recv().await? {
                    let session = channel.session_id().to_owned();
                    let _ = heard.send((session.to_string(), message.data().expect("a number")));
                    let _ = channel.reply(&message, &()).await;
                }
                Ok::<_, RecvError>(())
            }
        }))
        .await;
        let client = client(&server).build().expect("sound");
        let address = server.local_addr().to_string();
        let mut sockets = Vec::new();
        for _ in 0..3 {
            sockets.push(client.connect(&address).await.expect("let in"));
        }
        let ids: HashSet<_> = sockets.iter().map(|socket| socket.id()).collect();
        assert_eq!(ids.len(), 3);
        for (n, socket) in (0_u64..).zip(&sockets) {
            let log = socket.open("log").await.expect("a channel");
            log.request::<_, ()>("line", &n).await.expect("an answer");
            let one = hearing.recv().await.expect("the line");
            assert_eq!(one, (socket.id().to_string(), n));
            assert!(hearing.try_recv().is_err(), "once, not {n} times more");
        }
        sockets[0].close(CloseCode::NORMAL, "").await;
        let log = sockets[1].open("log").await.expect("the others live");
        log.request::<_, ()>("line", &9_u64)
            .await
            .expect("an answer");
    })
    .await;
}

/// B13: what a slow receiver had not taken yet was kept in memory, however much it was.
#[tokio::test]
async fn b13_a_slow_receiver_holds_the_sender_up_and_not_the_memory() {
    bounded(async {
        const BLOCK: usize = 32 << 10;
        let limits = Limits {
            stream_window: 256 << 10,
            outbound_bytes: 256 << 10,
            ..Limits::default()
        };
        let (give, mut channels) = mpsc::unbounded_channel();
        let server = bind(
            server()
                .limits(limits.clone())
                .channel("x", move |channel: Channel| {
                    let give = give.clone();
                    async move {
                        let _ = give.send(channel.clone());
                        channel.closed().await;
                    }
                }),
        )
        .await;
        let socket = client(&server)
            .limits(limits)
            .connect(&server.local_addr().to_string())
            .await
            .expect("let in");
        let ours = socket.open("x").await.expect("a channel");
        let theirs = channels.recv().await.expect("the channel");
        let (done, mut sent) = tokio::sync::watch::channel(0_usize);
        let sender = ours.clone();
        let sending = tokio::spawn(async move {
            let block = Bytes::from(vec![7; BLOCK]);
            for n in 0..200_u64 {
                let header = Header { n };
                let queued = sender.send_bulk("block", &header, "block", block.clone());
                queued.await.expect("the channel lives");
                done.send_replace(n as usize + 1);
            }
        });
        // The reader has not begun: the queue fills up and stays so.
        while ours.queued_bytes() < 256 << 10 {
            tokio::task::yield_now().await;
        }
        // The window, the queue, what the reader has taken and not returned, and a message on each edge.
        let most = (2 * (256 << 10) + (64 << 10)) / BLOCK + 2;
        for n in 0..200_u64 {
            let message = theirs.recv().await.expect("open").expect("a block");
            assert_eq!(
                message.fields().expect("a map").u64("n").expect("a number"),
                n
            );
            let ahead = (*sent.borrow_and_update()).saturating_sub(n as usize + 1);
            assert!(ahead <= most, "{ahead} blocks ahead of the reader at {n}");
            assert!(ours.queued_bytes() <= (256 << 10) + 2 * BLOCK);
        }
        sending.await.expect("all were sent");
    })
    .await;
}

#[derive(Serialize)]
struct Header {
    n: u64,
}

/// B20: the last exchange had no deadline: a peer that kept silent was waited for without end.
#[tokio::test]
async fn b20_every_wait_for_the_peer_ends() {
    bounded(async {
        let timeouts = Timeouts {
            request: Duration::from_millis(100),
            close: Duration::from_millis(300),
            ..Timeouts::default()
        };
        // Takes everything, answers nothing, finishes nothing.
        let (server, mut channels) = handing_over().await;
        let socket = client(&server)
            .timeouts(timeouts)
            .connect(&server.local_addr().to_string())
            .await
            .expect("let in");
        let mute = socket.open("x").await.expect("a channel");
        let theirs = channels.recv().await.expect("the channel");
        let begun = Instant::now();
        let error = mute
            .request::<_, ()>("finish", &())
            .await
            .expect_err("no answer");
        assert!(error.is_timeout(), "{error}");
        assert!(
            begun.elapsed() < Duration::from_secs(2),
            "{:?}",
            begun.elapsed()
        );
        // The peer is told that nobody waits any more, and the channel still works.
        mute.send("still", &"here").await.expect("queued");
        let request = theirs.recv().await.expect("open").expect("the request");
        assert_eq!(request.event(), "finish");
        assert_eq!(
            theirs
                .recv()
                .await
                .expect("open")
                .expect("a message")
                .event(),
            "still"
        );
        let begun = Instant::now();
        let reason = socket.close(CloseCode::NORMAL, "").await;
        assert_eq!(reason.code, CloseCode::NORMAL);
        assert!(
            begun.elapsed() < Duration::from_secs(3),
            "{:?}",
            begun.elapsed()
        );
    })
    .await;
}

/// B23: one encoder was shared by all, and every message was copied once more than need be.
#[tokio::test]
async fn b23_bulk_bytes_are_not_copied_and_nothing_is_shared() {
    bounded(async {
        let (server, mut channels) = handing_over().await;
        let socket = connect(&server).await;
        let ours = socket.open("x").await.expect("a channel");
        let theirs = channels.recv().await.expect("the channel");
        let block = Bytes::from(vec![7; 1 << 20]);
        let mut sending =
            Box::pin(ours.send_bulk("block", &Header { n: 1 }, "block", block.clone()));
        assert!(
            (&mut sending)
                .now_or_never()
                .expect("there is room")
                .is_ok()
        );
        drop(sending);
        assert!(!block.is_unique(), "the queue holds the block itself");
        let message = theirs.recv().await.expect("open").expect("the block");
        let (whole, bulk) = (message.raw(), message.bulk("block").expect("bytes"));
        assert_eq!(bulk, block);
        let (start, end) = (
            whole.as_ptr() as usize,
            whole.as_ptr() as usize + whole.len(),
        );
        assert!(
            (start..end).contains(&(bulk.as_ptr() as usize)),
            "a slice of the message"
        );
        // A value that fails half way leaves nothing in anybody's encoder.
        assert!(ours.send("bad", &FailsHalfWay).await.is_err());
        let other = socket.open("x").await.expect("a channel");
        let far = channels.recv().await.expect("the channel");
        assert!(other.send("bad", &FailsHalfWay).await.is_err());
        let (a, b) = tokio::join!(ours.send("good", &1_u64), other.send("good", &2_u64));
        a.expect("queued");
        b.expect("queued");
        for (channel, n) in [(&theirs, 1_u64), (&far, 2)] {
            let message = channel.recv().await.expect("open").expect("a message");
            assert_eq!(
                (message.event(), message.data::<u64>().expect("a number")),
                ("good", n)
            );
        }
    })
    .await;
}

struct FailsHalfWay;

impl Serialize for FailsHalfWay {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::{Error, SerializeSeq};
        let mut items = serializer.serialize_seq(Some(2))?;
        items.serialize_element(&"half")?;
        Err(S::Error::custom("on purpose"))
    }
}
