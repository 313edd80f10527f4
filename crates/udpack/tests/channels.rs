//! Channels end to end: order, both openers, requests, handlers, backpressure, cancellation, ends.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{bind, bounded, client, connect, server};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use udpack::{
    Channel, CloseCode, Context, Encoded, Fault, Limits, OpenError, RecvError, RequestError,
    SendError, Server, Side, Timeouts,
};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Say {
    text: String,
    n: u64,
}

/// A server that sends every message of an `echo` channel back.
async fn echo_server() -> Server {
    bind(server().channel("echo", |channel: Channel| async move {
        while let Some(message) = channel.recv().await? {
            let data: Say = message.data().expect("the client sends `Say`");
            channel
                .send(message.event(), &data)
                .await
                .expect("the client still listens");
        }
        Ok::<_, RecvError>(())
    }))
    .await
}

/// What follows upon a message that came may be written by its sender, the rest of a burst by the writer, and
/// either finds the stream's window full now and then.
#[tokio::test]
async fn answers_and_bursts_keep_their_order() {
    bounded(async {
        let limits = || Limits {
            stream_window: 16 << 10,
            connection_window: 64 << 10,
            ..Limits::default()
        };
        let burst = |channel: Channel| async move {
            let mut n: u64 = 0;
            while let Some(message) = channel.recv().await? {
                let (count, size): (u64, usize) = message.data().expect("a burst");
                for _ in 0..count {
                    let say = (n, "x".repeat(size));
                    channel.send("say", &say).await.expect("still open");
                    n += 1;
                }
            }
            Ok::<_, RecvError>(())
        };
        let server = bind(server().limits(limits()).channel("burst", burst)).await;
        for resumable in [false, true] {
            let client = client(&server)
                .limits(limits())
                .reconnect(udpack::Reconnect::default());
            let address = server.local_addr().to_string();
            let socket = client.connect(&address).await.expect("let in");
            let channel = socket.channel("burst");
            let channel = if resumable {
                channel.resumable()
            } else {
                channel
            };
            let channel = channel.open().await.expect("a channel");
            let mut n = 0;
            for round in 0..200_u64 {
                let count = [1, 1, 2, 40][round as usize % 4];
                let size = [10, 3_000, 4_000, 9_000][round as usize / 4 % 4];
                channel.send("go", &(count, size)).await.expect("open");
                for _ in 0..count {
                    let said = channel.recv().await.expect("sound").expect("more");
                    let (number, text): (u64, String) = said.data().expect("as sent");
                    assert_eq!((number, text.len()), (n, size));
                    n += 1;
                }
            }
            channel.finish().await.expect("all acknowledged");
            assert!(channel.recv().await.expect("sound").is_none());
            assert_eq!(channel.queued_bytes(), 0);
            assert_eq!(channel.unconfirmed(), 0);
            let sent = socket.metrics().messages_sent;
            assert_eq!(sent, 200, "each counted once");
        }
    })
    .await;
}

#[tokio::test]
async fn messages_come_back_in_order() {
    bounded(async {
        let server = echo_server().await;
        let socket = connect(&server).await;
        let channel = socket.open("echo").await.expect("a channel");
        let sender = channel.clone();
        let sending = tokio::spawn(async move {
            for n in 0..10_000 {
                sender
                    .send(
                        "say",
                        &Say {
                            text: format!("no {n}"),
                            n,
                        },
                    )
                    .await
                    .expect("queued");
            }
        });
        for n in 0..10_000 {
            let message = channel.recv().await.expect("open").expect("not finished");
            assert_eq!(message.event(), "say");
            assert_eq!(
                message.data::<Say>().expect("a Say"),
                Say {
                    text: format!("no {n}"),
                    n
                }
            );
        }
        sending.await.expect("all were queued");
        channel.finish().await.expect("all arrived");
        assert!(channel.recv().await.expect("an orderly end").is_none());
        let reason = socket.close(CloseCode::NORMAL, "done").await;
        assert_eq!(reason.code, CloseCode::NORMAL);
    })
    .await;
}

#[tokio::test]
async fn the_server_opens_channels_too() {
    bounded(async {
        let server = bind(server()).await;
        let dialled = connect(&server).await;
        let accepted = server.accept().await.expect("one socket");
        assert_eq!(accepted.peer().id(), "tester");
        assert_eq!(accepted.id(), dialled.id());
        assert_eq!(dialled.id().len(), 32);
        let out = accepted
            .channel("news")
            .meta(&Say {
                text: "first".into(),
                n: 1,
            })
            .open()
            .await
            .expect("a channel");
        out.send("item", &"one").await.expect("queued");
        let news = dialled
            .accept_channel()
            .await
            .expect("the server's channel");
        assert_eq!(news.name(), "news");
        assert_eq!(
            news.meta::<Say>().expect("a Say"),
            Some(Say {
                text: "first".into(),
                n: 1
            })
        );
        let item = news.recv().await.expect("open").expect("a message");
        assert_eq!(item.data::<String>().expect("text"), "one");
        news.send("thanks", &()).await.expect("queued");
        assert_eq!(
            out.recv().await.expect("open").expect("a message").event(),
            "thanks"
        );
    })
    .await;
}

#[tokio::test]
async fn a_request_gets_its_reply_or_its_typed_failure() {
    bounded(async {
        let server = bind(server().channel("rpc", |channel: Channel| async move {
            channel
                .on("double", |n: u64, _: Context| async move {
                    n.checked_mul(2)
                        .ok_or_else(|| Fault::new("overflow", "too large to double"))
                })
                .on("panics", |(): (), _: Context| async move {
                    if true {
                        panic!("on purpose");
                    }
                })
                .on("sleeps", |(): (), _: Context| std::future::pending::<()>())
                .run()
                .await
        }))
        .await;
        let socket = connect(&server).await;
        let rpc = socket.open("rpc").await.expect("a channel");
        let doubled: u64 = rpc.request("double", &21_u64).await.expect("a reply");
        assert_eq!(doubled, 42);
        let fault = rpc
            .request::<_, u64>("double", &u64::MAX)
            .await
            .expect_err("a fault");
        assert!(
            matches!(&fault, RequestError::Fault(fault) if fault.code == "overflow"),
            "{fault}"
        );
        let fault = rpc
            .request::<_, u64>("double", &"text")
            .await
            .expect_err("a fault");
        assert!(
            matches!(&fault, RequestError::Fault(fault) if fault.code == Fault::BAD_PAYLOAD),
            "{fault}"
        );
        let fault = rpc
            .request::<_, ()>("nobody", &())
            .await
            .expect_err("no handler");
        assert!(matches!(fault, RequestError::NoHandler), "{fault}");
        let fault = rpc
            .request::<_, ()>("panics", &())
            .await
            .expect_err("a fault");
        assert!(
            matches!(&fault, RequestError::Fault(fault) if fault.code == Fault::INTERNAL),
            "{fault}"
        );
        let decode = rpc
            .request::<_, String>("double", &1_u64)
            .await
            .expect_err("a number is no string");
        assert!(matches!(decode, RequestError::Decode(_)), "{decode}");
        let late = rpc
            .request::<_, ()>("sleeps", &())
            .timeout(Duration::from_millis(50))
            .await;
        assert!(late.expect_err("no reply").is_timeout());
    })
    .await;
}

#[tokio::test]
async fn a_handler_that_answers_too_late_faults_its_request_and_the_next_one_is_served() {
    bounded(async {
        let timeouts = Timeouts {
            handler: Duration::from_millis(50),
            ..Timeouts::default()
        };
        let server = bind(server().timeouts(timeouts).channel(
            "rpc",
            |channel: Channel| async move {
                channel
                    .on("never", |(): (), _: Context| std::future::pending::<()>())
                    .on(
                        "now",
                        |(): (), _: Context| async move { Ok::<_, Fault>("here") },
                    )
                    .run()
                    .await
            },
        ))
        .await;
        let socket = connect(&server).await;
        let rpc = socket.open("rpc").await.expect("a channel");
        let fault = rpc
            .request::<_, ()>("never", &())
            .await
            .expect_err("a fault");
        assert!(
            matches!(&fault, RequestError::Fault(fault) if fault.code == Fault::TIMEOUT),
            "{fault}"
        );
        assert_eq!(
            rpc.request::<_, String>("now", &()).await.expect("a reply"),
            "here"
        );
    })
    .await;
}

#[tokio::test]
async fn a_request_waits_behind_events_without_losing_them_and_not_for_ever() {
    bounded(async {
        let server = bind(server().channel("noisy", |channel: Channel| async move {
            while let Some(message) = channel.recv().await? {
                let events: u64 = message.data().expect("a number");
                for n in 0..events {
                    channel.send("event", &n).await.expect("queued");
                }
                channel.reply(&message, &"done").await.expect("queued");
            }
            Ok::<_, RecvError>(())
        }))
        .await;
        let limits = Limits {
            backlog_messages: 100,
            ..Limits::default()
        };
        let socket = client(&server)
            .limits(limits)
            .connect(&server.local_addr().to_string())
            .await
            .expect("in");
        let channel = socket.open("noisy").await.expect("a channel");
        assert_eq!(
            channel
                .request::<_, String>("go", &50_u64)
                .await
                .expect("a reply"),
            "done"
        );
        for n in 0..50_u64 {
            let event = channel.recv().await.expect("open").expect("an event");
            assert_eq!(event.data::<u64>().expect("a number"), n);
        }
        let full = channel
            .request::<_, String>("go", &101_u64)
            .await
            .expect_err("too many events first");
        assert!(matches!(full, RequestError::Backlog { .. }), "{full}");
        for n in 0..101_u64 {
            let event = channel.recv().await.expect("open").expect("an event");
            assert_eq!(
                event.data::<u64>().expect("a number"),
                n,
                "a failed request loses no event"
            );
        }
    })
    .await;
}

#[tokio::test]
async fn a_handlers_panic_or_error_costs_only_its_own_message() {
    bounded(async {
        let seen = Arc::new(AtomicUsize::new(0));
        let count = seen.clone();
        let server = bind(server().channel("work", move |channel: Channel| {
            let count = count.clone();
            async move {
                channel
                    .on("task", move |n: u64, cx: Context| {
                        let count = count.clone();
                        async move {
                            assert!(n != 3, "on purpose");
                            if n == 5 {
                                return Err(Fault::new("refused", "not five"));
                            }
                            count.fetch_add(1, Ordering::Relaxed);
                            cx.channel()
                                .send("ran", &n)
                                .await
                                .map_err(|error| Fault::from(error.to_string()))
                        }
                    })
                    .run()
                    .await
            }
        }))
        .await;
        let socket = connect(&server).await;
        let work = socket.open("work").await.expect("a channel");
        for n in 0..8_u64 {
            work.send("task", &n).await.expect("queued");
        }
        for n in [0, 1, 2, 4, 6, 7_u64] {
            let ran = work.recv().await.expect("open").expect("a message");
            assert_eq!(ran.data::<u64>().expect("a number"), n);
        }
        assert_eq!(seen.load(Ordering::Relaxed), 6);
    })
    .await;
}

#[tokio::test]
async fn a_stuck_reader_holds_up_its_own_sender_and_nobody_else() {
    bounded(async {
        let (stuck, mut released) = mpsc::channel::<Channel>(1);
        let limits = Limits {
            stream_window: 64 << 10,
            outbound_bytes: 64 << 10,
            ..Limits::default()
        };
        let server = bind(
            server()
                .limits(limits.clone())
                .channel("stuck", move |channel: Channel| {
                    let stuck = stuck.clone();
                    async move {
                        let _ = stuck.send(channel.clone()).await;
                        channel.closed().await;
                    }
                })
                .channel("free", |channel: Channel| async move {
                    while let Some(message) = channel.recv().await? {
                        channel.reply(&message, &()).await.expect("queued");
                    }
                    Ok::<_, RecvError>(())
                }),
        )
        .await;
        let socket = client(&server)
            .limits(limits)
            .connect(&server.local_addr().to_string())
            .await
            .expect("in");
        let stuck = socket.open("stuck").await.expect("a channel");
        let free = socket.open("free").await.expect("a channel");
        let block = serde_bytes::ByteBuf::from(vec![7; 16 << 10]);
        let mut queued = 0;
        while stuck.try_send("block", &block).expect("open") || {
            // The writer may still be moving bytes into the window: wait for it to stall.
            free.request::<_, ()>("ping", &())
                .await
                .expect("the other channel works");
            stuck.queued_bytes() < 64 << 10
        } {
            queued += 1;
            assert!(queued < 1000, "the queue and the window are bounded");
        }
        assert!(!stuck.try_send("block", &block).expect("open"), "full");
        for _ in 0..10 {
            free.request::<_, ()>("ping", &())
                .await
                .expect("the other channel still works");
        }
        // Reading again lets the sender go on.
        let reader = released.recv().await.expect("the stuck channel");
        let waiting = stuck.send("last", &());
        let reading = async {
            loop {
                let message = reader.recv().await.expect("open").expect("a message");
                if message.event() == "last" {
                    return;
                }
            }
        };
        let (sent, ()) = tokio::join!(waiting, reading);
        sent.expect("queued");
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_reads_nothing_loses_the_channel_but_not_the_socket() {
    bounded(async {
        let limits = Limits {
            stream_window: 16 << 10,
            outbound_bytes: 16 << 10,
            ..Limits::default()
        };
        let server = bind(
            server()
                .limits(limits.clone())
                .channel("stuck", |channel: Channel| async move {
                    channel.closed().await;
                })
                .channel("ping", |channel: Channel| async move {
                    channel
                        .on("ping", |(): (), _: Context| async {})
                        .run()
                        .await
                }),
        )
        .await;
        let timeouts = Timeouts {
            slow_peer: Duration::from_millis(200),
            keep_alive: Duration::from_millis(50),
            ..Timeouts::default()
        };
        let socket = client(&server)
            .limits(limits)
            .timeouts(timeouts)
            .connect(&server.local_addr().to_string())
            .await
            .expect("in");
        let stuck = socket.open("stuck").await.expect("a channel");
        let block = serde_bytes::ByteBuf::from(vec![7; 8 << 10]);
        let error = loop {
            if let Err(error) = stuck.send("block", &block).await {
                break error;
            }
        };
        assert!(
            matches!(&error, SendError::Closed(reason) if reason.code == CloseCode::SLOW_PEER),
            "{error}"
        );
        let ping = socket.open("ping").await.expect("a channel");
        ping.request::<_, ()>("ping", &())
            .await
            .expect("the socket lives");
    })
    .await;
}

#[tokio::test]
async fn dropping_a_recv_in_the_middle_of_a_frame_loses_nothing() {
    bounded(async {
        let server = bind(server().channel("big", |channel: Channel| async move {
            for n in 0..20_u8 {
                let block = Bytes::from(vec![n; 200_000]);
                channel
                    .send_bulk("block", &Numbered { n }, "block", block)
                    .await
                    .expect("queued");
            }
            channel.finish().await
        }))
        .await;
        let socket = connect(&server).await;
        let channel = socket.open("big").await.expect("a channel");
        let (mut received, mut dropped) = (0, 0_u64);
        while received < 20_u8 {
            // Poll once and drop: whatever part of a frame has arrived must stay.
            let once = futures_util::FutureExt::now_or_never(channel.recv());
            match once {
                None => {
                    dropped += 1;
                    tokio::task::yield_now().await;
                }
                Some(message) => {
                    let message = message.expect("open").expect("a block");
                    let block = message.bulk("block").expect("a bin");
                    assert_eq!(block.len(), 200_000);
                    assert!(block.iter().all(|byte| *byte == received));
                    received += 1;
                }
            }
        }
        assert!(
            dropped > 0,
            "at least one future was dropped while it waited"
        );
        assert!(channel.recv().await.expect("an orderly end").is_none());
    })
    .await;
}

#[derive(Serialize)]
struct Numbered {
    n: u8,
}

#[tokio::test]
async fn closing_is_idempotent_from_either_side_and_any_state() {
    bounded(async {
        let server = bind(server()).await;
        let dialled = connect(&server).await;
        let accepted = server.accept().await.expect("one socket");
        let ours = dialled.open("x").await.expect("a channel");
        ours.send("hello", &()).await.expect("queued");
        let theirs = accepted.accept_channel().await.expect("the channel");
        assert_eq!(
            theirs
                .recv()
                .await
                .expect("open")
                .expect("a message")
                .event(),
            "hello"
        );
        let first = theirs.close(CloseCode::new(0x1234), "enough").await;
        assert_eq!((first.code.value(), first.by), (0x1234, Side::Local));
        let again = theirs.close(CloseCode::NORMAL, "again").await;
        assert_eq!(again.code.value(), 0x1234, "the first reason stays");
        let seen = ours.recv().await.expect_err("closed");
        assert_eq!(
            (seen.reason().code.value(), seen.reason().by),
            (0x1234, Side::Peer)
        );
        assert_eq!(seen.reason().text, "enough");
        assert_eq!(ours.closed().await.code.value(), 0x1234);
        assert_eq!(
            ours.close(CloseCode::NORMAL, "me too").await.code.value(),
            0x1234
        );
        assert!(matches!(
            theirs.send("late", &()).await,
            Err(SendError::Finished | SendError::Closed(_))
        ));
        assert!(ours.send("late", &()).await.expect_err("over").is_closed());

        let (a, b) = tokio::join!(
            dialled.close(CloseCode::new(0x2000), "bye"),
            accepted.close(CloseCode::new(0x2001), "bye too")
        );
        assert!([0x2000, 0x2001].contains(&a.code.value()), "{a}");
        assert!([0x2000, 0x2001].contains(&b.code.value()), "{b}");
        assert_eq!(dialled.close(CloseCode::NORMAL, "").await, a);
        assert!(matches!(dialled.open("y").await, Err(OpenError::Closed(_))));
        assert!(accepted.accept_channel().await.is_none());
    })
    .await;
}

#[tokio::test]
async fn a_graceful_close_delivers_what_was_sent() {
    bounded(async {
        let (tell, mut told) = mpsc::channel(1);
        let server = bind(server().channel("log", move |channel: Channel| {
            let tell = tell.clone();
            async move {
                let mut count = 0_u64;
                while let Ok(Some(_)) = channel.recv().await {
                    count += 1;
                }
                let _ = tell.send(count).await;
            }
        }))
        .await;
        let socket = connect(&server).await;
        let log = socket.open("log").await.expect("a channel");
        for n in 0..5_000_u64 {
            log.send("line", &n).await.expect("queued");
        }
        let reason = socket.close(CloseCode::NORMAL, "").await;
        assert_eq!(reason.code, CloseCode::NORMAL);
        assert_eq!(told.recv().await, Some(5_000));
    })
    .await;
}

#[tokio::test]
async fn dropping_the_last_handle_of_a_client_closes_but_not_while_a_channel_lives() {
    bounded(async {
        let server = echo_server().await;
        let channel = {
            let socket = connect(&server).await;
            socket.open("echo").await.expect("a channel")
        };
        let say = Say {
            text: "still here".into(),
            n: 1,
        };
        channel.send("say", &say).await.expect("queued");
        let back = channel.recv().await.expect("open").expect("a message");
        assert_eq!(back.data::<Say>().expect("a Say"), say);
        let accepted = server.sockets().pop().expect("one socket");
        drop(channel);
        let reason = accepted.closed().await;
        assert_eq!((reason.code, reason.by), (CloseCode::NORMAL, Side::Peer));
    })
    .await;
}

#[tokio::test]
async fn unknown_channels_are_refused_with_a_reason() {
    bounded(async {
        let server = echo_server().await;
        let socket = connect(&server).await;
        let channel = socket
            .open("nowhere")
            .await
            .expect("opening costs no round trip");
        let error = channel.recv().await.expect_err("refused");
        assert_eq!(error.reason().code, CloseCode::NO_SUCH_CHANNEL);
        assert!(
            error.reason().text.contains("nowhere"),
            "{}",
            error.reason().text
        );
        let echo = socket.open("echo").await.expect("the socket lives");
        echo.send(
            "say",
            &Say {
                text: String::new(),
                n: 0,
            },
        )
        .await
        .expect("queued");
        assert!(echo.recv().await.expect("open").is_some());
    })
    .await;
}

#[tokio::test]
async fn a_channel_handlers_failure_closes_that_channel_only() {
    bounded(async {
        let server = bind(
            server()
                .channel("fails", |_: Channel| async {
                    Err::<(), _>("a secret detail")
                })
                .channel("panics", |channel: Channel| async move {
                    assert_eq!(channel.name(), "on purpose");
                })
                .channel("works", |channel: Channel| async move {
                    channel
                        .on("ping", |(): (), _: Context| async {})
                        .run()
                        .await
                }),
        )
        .await;
        let socket = connect(&server).await;
        let works = socket.open("works").await.expect("a channel");
        for (name, code) in [
            ("fails", CloseCode::HANDLER_FAILED),
            ("panics", CloseCode::INTERNAL),
        ] {
            let channel = socket.open(name).await.expect("a channel");
            let error = channel.recv().await.expect_err("closed");
            assert_eq!(error.reason().code, code);
            assert!(
                !error.reason().text.contains("secret"),
                "the detail stays in the log"
            );
            works
                .request::<_, ()>("ping", &())
                .await
                .expect("the other channel works");
        }
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_sent_is_refused_here_and_harms_nothing() {
    bounded(async {
        let server = echo_server().await;
        let socket = connect(&server).await;
        let channel = socket.open("echo").await.expect("a channel");
        let big = serde_bytes::ByteBuf::from(vec![0; 2 << 20]);
        assert!(matches!(
            channel.send("say", &big).await,
            Err(SendError::Encode(_))
        ));
        assert!(matches!(
            channel.send("$close", &()).await,
            Err(SendError::Encode(_))
        ));
        assert!(matches!(
            channel.send("", &()).await,
            Err(SendError::Encode(_))
        ));
        assert!(matches!(
            channel.send("a\nb", &()).await,
            Err(SendError::Encode(_))
        ));
        assert!(matches!(
            channel.request::<_, ()>("$x", &()).await,
            Err(RequestError::Send(SendError::Encode(_)))
        ));
        assert!(matches!(
            socket.open("$control").await,
            Err(OpenError::Encode(_))
        ));
        assert!(Encoded::new("$reply", &()).is_err());
        let say = Say {
            text: "fine".into(),
            n: 1,
        };
        channel
            .send_encoded(&Encoded::new("say", &say).expect("sound"))
            .await
            .expect("queued");
        assert_eq!(
            channel
                .recv()
                .await
                .expect("open")
                .expect("a message")
                .data::<Say>()
                .expect("a Say"),
            say
        );
    })
    .await;
}

#[tokio::test]
async fn speed_is_measured_for_channel_socket_and_server() {
    bounded(async {
        let server = bind(server().channel("sink", |channel: Channel| async move {
            while let Some(message) = channel.recv().await? {
                channel.reply(&message, &()).await.expect("queued");
            }
            Ok::<_, RecvError>(())
        }))
        .await;
        let socket = connect(&server).await;
        let sink = socket.open("sink").await.expect("a channel");
        let period = Duration::from_millis(50);
        let (mut of_channel, mut of_socket, mut of_server) = (
            sink.speed().every(period),
            socket.speed().every(period),
            server.speed().every(period),
        );
        sink.send_bulk(
            "block",
            &Numbered { n: 0 },
            "block",
            Bytes::from(vec![1; 500_000]),
        )
        .await
        .expect("queued");
        sink.request::<_, ()>("ping", &()).await.expect("a reply");
        let (channel, socket, server) = (
            of_channel.next().await.expect("a period"),
            of_socket.next().await.expect("a period"),
            of_server.next().await.expect("a period"),
        );
        assert!(
            channel.total.sent > 500_000 && channel.total.sent < 501_000,
            "{:?}",
            channel.total
        );
        assert!(socket.total.sent >= channel.total.sent);
        assert!(
            socket.total.wire_sent > socket.total.sent,
            "headers and encryption cost something"
        );
        assert!(server.total.received > 500_000, "{:?}", server.total);
        assert!(socket.rtt > Duration::ZERO && socket.cwnd > 0);
        assert!(channel.send > 0.0);
    })
    .await;
}

#[tokio::test]
async fn whoever_does_not_read_still_learns_why_the_peer_closed() {
    bounded(async {
        let server = bind(server()).await;
        let dialled = connect(&server).await;
        let accepted = server.accept().await.expect("one socket");
        for round in 0..20 {
            let ours = dialled.open("x").await.expect("a channel");
            ours.send("hello", &()).await.expect("queued");
            let theirs = accepted.accept_channel().await.expect("the channel");
            for n in 0..round {
                theirs.send("event", &n).await.expect("queued");
            }
            theirs.close(CloseCode::new(0x1234), "enough");
            let reason = ours.closed().await;
            assert_eq!(
                (reason.code.value(), reason.text.as_str()),
                (0x1234, "enough")
            );
            for n in 0..round {
                let event = ours
                    .recv()
                    .await
                    .expect("what came before")
                    .expect("an event");
                assert_eq!(event.data::<u64>().expect("a number"), n);
            }
            assert_eq!(ours.recv().await.expect_err("closed").reason(), &reason);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channels_that_share_a_full_window_all_get_their_turn() {
    bounded(async {
        const BLOCKS: usize = 300;
        let limits = Limits {
            connection_window: 256 << 10,
            stream_window: 256 << 10,
            ..Limits::default()
        };
        let server = bind(
            server()
                .limits(limits)
                .channel("sink", |channel: Channel| async move {
                    while channel.recv().await?.is_some() {}
                    Ok::<_, RecvError>(())
                }),
        )
        .await;
        let socket = connect(&server).await;
        let sent: Arc<[AtomicUsize; 6]> = Arc::default();
        let mut senders = tokio::task::JoinSet::new();
        for number in 0..sent.len() {
            let sink = socket.open("sink").await.expect("a channel");
            let sent = sent.clone();
            senders.spawn(async move {
                let block = Bytes::from(vec![7; 256 << 10]);
                for _ in 0..BLOCKS {
                    sink.send_bulk("block", &Numbered { n: 0 }, "block", block.clone())
                        .await
                        .expect("queued");
                    sent[number].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        senders
            .join_next()
            .await
            .expect("six senders")
            .expect("no panic");
        let sent = sent.each_ref().map(|sent| sent.load(Ordering::Relaxed));
        assert!(
            sent.iter().all(|blocks| *blocks >= BLOCKS / 4),
            "when the first was through, the six had sent {sent:?}"
        );
    })
    .await;
}
