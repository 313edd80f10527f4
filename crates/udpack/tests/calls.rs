//! Requests: every way they can end, deadlines, cancelling, streams of items in both directions.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{bind, bounded, connect, server};
use futures_util::{StreamExt, stream};
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;
use udpack::{
    Answer, Channel, CloseCode, Context, Data, Fault, Items, Message, RequestError, Router, Server,
    Socket, Streaming, Timeouts,
};

/// Tells when it is dropped.
struct Tell(mpsc::UnboundedSender<&'static str>);

impl Drop for Tell {
    fn drop(&mut self) {
        let _ = self.0.send("dropped");
    }
}

/// A server with this router on `rpc`, and a channel to it.
async fn rpc(router: Router) -> (Server, Socket, Channel) {
    let server = bind(server().channel("rpc", router)).await;
    let socket = connect(&server).await;
    let channel = socket.open("rpc").await.expect("a channel");
    (server, socket, channel)
}

/// A handler that never ends and tells when it begins and when it is dropped.
fn stuck(tell: mpsc::UnboundedSender<&'static str>) -> Router {
    Router::new()
        .on("stuck", move |()| {
            let tell = tell.clone();
            async move {
                let _ = tell.send("begun");
                let _guard = Tell(tell);
                std::future::pending::<()>().await;
            }
        })
        .on("ping", || async {})
}

#[tokio::test]
async fn every_failure_of_a_request_has_its_own_kind() {
    bounded(async {
        let router = Router::new()
            .on("fault", || async {
                Err::<(), _>(Fault::new("taken", "the name is taken").with_data(&["a", "b"]))
            })
            .on("panics", || async { assert!(std::hint::black_box(false)) })
            .on("number", || async { Ok::<_, Fault>(7) })
            .on("stream", || async { Streaming::new(stream::iter(0..3)) })
            .on("leaves", |channel: Channel| async move {
                drop(channel.close(CloseCode::new(0x1234), "enough"));
                std::future::pending::<()>().await;
            });
        let (_server, _socket, rpc) = rpc(router).await;
        let error = rpc.request::<_, ()>("fault", &()).await.expect_err("fault");
        let RequestError::Fault(fault) = error else {
            panic!("{error}");
        };
        assert_eq!(
            (fault.code.as_str(), fault.message.as_str()),
            ("taken", "the name is taken")
        );
        assert_eq!(
            fault.data::<Vec<String>>().expect("texts"),
            Some(vec!["a".to_owned(), "b".to_owned()])
        );
        let error = rpc.request::<_, ()>("nobody", &()).await.expect_err("none");
        assert!(matches!(error, RequestError::NoHandler), "{error}");
        let error = rpc
            .request::<_, ()>("panics", &())
            .await
            .expect_err("panic");
        assert!(
            matches!(&error, RequestError::Fault(fault) if fault.code == Fault::INTERNAL),
            "{error}"
        );
        let error = rpc
            .request::<_, String>("number", &())
            .await
            .expect_err("no text");
        assert!(matches!(error, RequestError::Decode(_)), "{error}");
        rpc.send_acked("number", &())
            .await
            .expect("whatever it returns");
        let error = rpc
            .request::<_, ()>("stream", &())
            .await
            .expect_err("items");
        assert!(matches!(error, RequestError::Stream), "{error}");
        let mut items = rpc
            .request("number", &())
            .items::<u8>()
            .await
            .expect("sent");
        let error = items.next().await.expect("an end").expect_err("no stream");
        assert!(matches!(error, RequestError::Decode(_)), "{error}");
        assert!(items.next().await.is_none(), "nothing follows an error");
        let error = rpc
            .request::<_, ()>("$own", &())
            .await
            .expect_err("reserved");
        assert!(matches!(error, RequestError::Send(_)), "{error}");
        let error = rpc
            .request::<_, ()>("leaves", &())
            .await
            .expect_err("closed");
        assert!(
            matches!(&error, RequestError::Closed(reason) if reason.code.value() == 0x1234),
            "{error}"
        );
    })
    .await;
}

#[tokio::test]
async fn a_dropped_request_stops_its_handler_and_the_next_is_served() {
    bounded(async {
        let (tell, mut told) = mpsc::unbounded_channel();
        let (_server, _socket, rpc) = rpc(stuck(tell)).await;
        let asking = {
            let rpc = rpc.clone();
            tokio::spawn(async move { rpc.request::<_, ()>("stuck", &()).await })
        };
        assert_eq!(told.recv().await, Some("begun"));
        asking.abort();
        assert_eq!(told.recv().await, Some("dropped"));
        rpc.send_acked("ping", &()).await.expect("served");
    })
    .await;
}

#[tokio::test]
async fn the_deadline_travels_and_stops_the_handler() {
    bounded(async {
        let (tell, mut told) = mpsc::unbounded_channel();
        let router = stuck(tell).on("left", |cx: Context| async move {
            let left = cx.deadline().map(|end| end - tokio::time::Instant::now());
            Ok::<_, Fault>(left.map(|left| left.as_secs()))
        });
        let (_server, _socket, rpc) = rpc(router).await;
        let left: Option<u64> = rpc
            .request("left", &())
            .timeout(Duration::from_secs(20))
            .await
            .expect("a reply");
        assert_eq!(left, Some(19));
        let endless: Option<u64> = rpc
            .request("left", &())
            .timeout(Duration::MAX)
            .await
            .expect("a reply");
        // A handler has `Timeouts::handler` at most.
        assert_eq!(endless, Some(29));
        let error = rpc
            .request::<_, ()>("stuck", &())
            .timeout(Duration::from_millis(50))
            .await
            .expect_err("late");
        assert!(error.is_timeout(), "{error}");
        assert_eq!(told.recv().await, Some("begun"));
        assert_eq!(told.recv().await, Some("dropped"));
        rpc.send_acked("ping", &()).await.expect("served");
    })
    .await;
}

#[tokio::test]
async fn a_cancelled_request_that_nobody_has_begun_is_never_handled() {
    bounded(async {
        let (tell, mut told) = mpsc::unbounded_channel();
        let ran = Arc::new(AtomicUsize::new(0));
        let count = ran.clone();
        let router = stuck(tell).on("count", move || {
            count.fetch_add(1, Ordering::Relaxed);
            async {}
        });
        let (_server, _socket, rpc) = rpc(router).await;
        let mut first = asked(rpc.request::<_, ()>("stuck", &()));
        first.poll().await;
        assert_eq!(told.recv().await, Some("begun"));
        let mut second = asked(rpc.request::<_, ()>("count", &()));
        second.poll().await;
        drop(second);
        drop(first);
        assert_eq!(told.recv().await, Some("dropped"));
        rpc.send_acked("ping", &()).await.expect("served");
        assert_eq!(ran.load(Ordering::Relaxed), 0);
    })
    .await;
}

/// A request that has been queued and waits.
struct Asked(futures_util::future::BoxFuture<'static, Result<(), RequestError>>);

fn asked(request: udpack::Request<()>) -> Asked {
    Asked(request.into_future())
}

impl Asked {
    async fn poll(&mut self) {
        assert!(futures_util::poll!(&mut self.0).is_pending());
    }
}

#[tokio::test]
async fn both_sides_ask_with_the_same_id_at_once() {
    bounded(async {
        let server = bind(server()).await;
        let dialled = connect(&server).await;
        let accepted = server.accept().await.expect("one socket");
        let ours = dialled.open("both").await.expect("a channel");
        ours.send("hello", &()).await.expect("queued");
        let theirs = accepted.accept_channel().await.expect("the channel");
        theirs.recv().await.expect("open").expect("hello");
        let echo =
            |data: u64, message: Message| async move { Ok::<_, Fault>((data, message.id())) };
        for channel in [&ours, &theirs] {
            tokio::spawn(channel.on("echo", echo).run());
        }
        for n in 1..=100_u64 {
            let (a, b) = tokio::join!(
                ours.request::<_, (u64, u64)>("echo", &n),
                theirs.request::<_, (u64, u64)>("echo", &(n + 1000))
            );
            assert_eq!(a.expect("a reply"), (n, n));
            assert_eq!(b.expect("a reply"), (n + 1000, n));
        }
    })
    .await;
}

/// A stream of blocks that counts those it was asked for, and tells when it is dropped.
fn blocks(
    count: usize,
    size: usize,
    made: Arc<AtomicUsize>,
    guard: Option<Tell>,
) -> impl futures_util::Stream<Item = ByteBuf> + Send + 'static {
    stream::iter(0..count).map(move |_| {
        let _ = &guard;
        made.fetch_add(1, Ordering::Relaxed);
        ByteBuf::from(vec![7; size])
    })
}

#[tokio::test]
async fn the_maker_of_an_answers_items_stops_at_the_credit_and_goes_on_as_they_are_taken() {
    bounded(async {
        const COUNT: usize = 1000;
        const SIZE: usize = 8 << 10;
        let made = Arc::new(AtomicUsize::new(0));
        let count = made.clone();
        let router = Router::new()
            .on("blocks", move || {
                let count = count.clone();
                async move { Streaming::new(blocks(COUNT, SIZE, count, None)) }
            })
            .on("ping", || async {})
            .concurrency(2);
        let (_server, _socket, rpc) = rpc(router).await;
        let mut items = rpc
            .request("blocks", &())
            .items::<ByteBuf>()
            .await
            .expect("sent");
        // Round trips on the same channel: whatever the credit allows has been sent after them.
        for _ in 0..50 {
            rpc.send_acked("ping", &()).await.expect("served");
        }
        let ahead = made.load(Ordering::Relaxed);
        assert!(
            (1..=(256 << 10) / SIZE + 1).contains(&ahead),
            "{ahead} blocks were made and none taken"
        );
        let mut taken = 0;
        while let Some(block) = items.next().await {
            assert_eq!(block.expect("a block").len(), SIZE);
            taken += 1;
            let ahead = made.load(Ordering::Relaxed) - taken;
            assert!(ahead <= 2 * (256 << 10) / SIZE, "{ahead} blocks ahead");
        }
        assert_eq!(taken, COUNT);
    })
    .await;
}

#[tokio::test]
async fn items_of_any_size_get_through_in_order_both_ways() {
    bounded(async {
        let router = Router::new().on("lens", |mut items: Items<ByteBuf>| async move {
            let lens = stream::poll_fn(move |cx| items.poll_next_unpin(cx))
                .map(|item| item.map(|item| item.len()).map_err(|e| e.to_string()));
            Ok::<_, Fault>(Streaming::fallible(lens))
        });
        let (_server, _socket, rpc) = rpc(router).await;
        let sizes = [
            0,
            1,
            100_000,
            200_000,
            1 << 20,
            3,
            262_144,
            262_130,
            150_000,
            150_000,
        ];
        let sent = stream::iter(sizes).map(|size| ByteBuf::from(vec![1; size]));
        let mut lens = rpc
            .request("lens", &())
            .with_items(sent)
            .items::<usize>()
            .await
            .expect("sent");
        for size in sizes {
            assert_eq!(lens.next().await.expect("more").expect("a length"), size);
        }
        assert!(lens.next().await.is_none());
    })
    .await;
}

#[tokio::test]
async fn a_handler_sums_up_a_stream_and_answers_once() {
    bounded(async {
        let timeouts = Timeouts {
            handler: Duration::from_millis(500),
            ..Timeouts::default()
        };
        let router = Router::new()
            .on(
                "sum",
                |Data(start): Data<u64>, mut items: Items<u64>| async move {
                    let mut sum = start;
                    while let Some(n) = items.next().await {
                        sum += n.map_err(|error| error.to_string())?;
                    }
                    Ok::<_, Fault>(sum)
                },
            )
            .on("first", |mut items: Items<u64>| async move {
                let first = items.next().await;
                let first = first.ok_or("none")?.map_err(|error| error.to_string())?;
                Ok::<_, Fault>(first)
            });
        let server = bind(server().timeouts(timeouts).channel("rpc", router)).await;
        let socket = connect(&server).await;
        let rpc = socket.open("rpc").await.expect("a channel");
        let sum: u64 = rpc
            .request("sum", &1_000_000_u64)
            .with_items(stream::iter(0..20_000_u64))
            .await
            .expect("a sum");
        assert_eq!(sum, 1_000_000 + 20_000 * 19_999 / 2);
        // An answer before the stream's end ends the request.
        let first: u64 = rpc
            .request("first", &())
            .with_items(stream::iter(5..).chain(stream::pending()))
            .await
            .expect("the first");
        assert_eq!(first, 5);
        // Nothing comes and nothing ends: the handler's time is up.
        let error = rpc
            .request::<_, u64>("sum", &0_u64)
            .with_items(stream::pending::<u64>())
            .await
            .expect_err("late");
        assert!(error.is_timeout(), "{error}");
    })
    .await;
}

#[tokio::test]
async fn either_side_ends_a_stream_early() {
    bounded(async {
        let (tell, mut told) = mpsc::unbounded_channel();
        let router = Router::new()
            .on("endless", move || {
                let guard = Tell(tell.clone());
                async move { Streaming::new(blocks(usize::MAX, 100, Arc::default(), Some(guard))) }
            })
            .on("breaks", || async {
                let items = [Ok(1), Ok(2), Err(Fault::new("dry", "no more"))];
                Streaming::fallible(stream::iter(items))
            })
            .on("ping", || async {});
        let (_server, _socket, rpc) = rpc(router).await;
        let mut items = rpc
            .request("endless", &())
            .items::<ByteBuf>()
            .await
            .expect("sent");
        for _ in 0..10 {
            items.next().await.expect("more").expect("a block");
        }
        drop(items);
        assert_eq!(told.recv().await, Some("dropped"));
        rpc.send_acked("ping", &())
            .await
            .expect("the channel is free");
        let mut items = rpc
            .request("breaks", &())
            .items::<u64>()
            .await
            .expect("sent");
        assert_eq!(items.next().await.expect("more").expect("an item"), 1);
        assert_eq!(items.next().await.expect("more").expect("an item"), 2);
        let error = items.next().await.expect("a fault").expect_err("no item");
        assert!(
            matches!(&error, RequestError::Fault(fault) if fault.code == "dry"),
            "{error}"
        );
        assert!(items.next().await.is_none());
        // A deadline holds for the whole stream.
        let mut items = rpc
            .request("endless", &())
            .timeout(Duration::from_millis(100))
            .items::<ByteBuf>()
            .await
            .expect("sent");
        let error = loop {
            if let Err(error) = items.next().await.expect("no orderly end") {
                break error;
            }
        };
        assert!(error.is_timeout(), "{error}");
        assert_eq!(told.recv().await, Some("dropped"));
    })
    .await;
}

#[tokio::test]
async fn an_asker_that_leaves_ends_the_stream_it_sends() {
    bounded(async {
        let (tell, mut told) = mpsc::unbounded_channel();
        let router = Router::new().on("takes", move |mut items: Items<ByteBuf>| {
            let tell = tell.clone();
            async move {
                let _guard = Tell(tell.clone());
                while let Some(Ok(_)) = items.next().await {
                    let _ = tell.send("took");
                }
                Answer::value(&())
            }
        });
        let (_server, _socket, rpc) = rpc(router).await;
        let one = stream::iter([ByteBuf::from(vec![1; 10])]).chain(stream::pending());
        let asking = tokio::spawn(
            rpc.request::<_, ()>("takes", &())
                .with_items(one)
                .into_future(),
        );
        assert_eq!(told.recv().await, Some("took"));
        asking.abort();
        assert_eq!(told.recv().await, Some("dropped"));
    })
    .await;
}

/// Tells for how long a handler was told that it had, and for how long it had.
struct Lived(
    tokio::time::Instant,
    Option<Duration>,
    mpsc::UnboundedSender<(Option<Duration>, Duration)>,
);

impl Drop for Lived {
    fn drop(&mut self) {
        let _ = self.2.send((self.1, self.0.elapsed()));
    }
}

#[tokio::test(start_paused = true)]
async fn the_deadline_that_a_handler_sees_is_when_it_is_dropped() {
    let test = async {
        let (tell, mut told) = mpsc::unbounded_channel();
        let lived = move |cx: &Context| {
            let now = tokio::time::Instant::now();
            let told = cx.deadline().map(|deadline| deadline - now);
            Lived(now, told, tell.clone())
        };
        let reads = lived.clone();
        let router = Router::new()
            .on("work", move |Data(()), cx: Context| {
                let lived = lived(&cx);
                async move {
                    tokio::time::sleep(Duration::from_secs(100)).await;
                    drop(lived);
                }
            })
            .on(
                "read",
                move |Data(()), cx: Context, mut items: Items<u8>| {
                    let reads = reads.clone();
                    async move {
                        tokio::time::sleep(Duration::from_secs(20)).await;
                        let _ = items.next().await;
                        // Reading gave it more time.
                        let lived = reads(&cx);
                        std::future::pending::<()>().await;
                        drop(lived);
                    }
                },
            );
        let net = udpack::testing::Net::new(1);
        let builder = udpack::testing::server().channel("rpc", router);
        let server = net.bind(builder).await.expect("a server");
        let client = udpack::testing::client(&server);
        let socket = net.connect(client, &server).await.expect("let in");
        let channel = socket.open("rpc").await.expect("a channel");
        let secs = Duration::from_secs;
        for (asked, had) in [(120, 30), (10, 10), (30, 30)] {
            let asked = channel.request::<_, ()>("work", &()).timeout(secs(asked));
            assert!(asked.await.is_err());
            let (said, lived) = told.recv().await.expect("it was dropped");
            assert_eq!(said.map(|said| said.as_secs()), Some(had));
            assert_eq!(lived.as_secs(), had);
        }
        let items = stream::iter([1_u8]).chain(stream::pending());
        let asked = channel
            .request::<_, ()>("read", &())
            .with_items(items)
            .timeout(secs(120));
        assert!(asked.await.is_err());
        let (said, lived) = told.recv().await.expect("it was dropped");
        assert_eq!((said, lived.as_secs()), (Some(secs(30)), 30));
        // Nobody waits for an event to be handled.
        channel.send("work", &()).await.expect("alive");
        let (said, lived) = told.recv().await.expect("it ends");
        assert_eq!((said, lived), (None, secs(100)));
    };
    let in_time = tokio::time::timeout(Duration::from_secs(600), test);
    assert!(in_time.await.is_ok(), "in time");
}

/// A handler asks its asker, whose handler asks back on the same channel: with one handler at a time that waits for
/// itself, and ends with the deadline.
#[tokio::test(start_paused = true)]
async fn a_chain_that_comes_back_needs_a_free_handler() {
    let test = async {
        for (at_once, passes) in [(1, false), (2, true)] {
            let router = Router::new()
                .concurrency(at_once)
                .on("outer", |(), channel: Channel| async move {
                    channel.request::<_, u8>("inner", &()).await
                })
                .on("leaf", |(), _: Context| async { Ok::<_, Fault>(7_u8) });
            let net = udpack::testing::Net::new(1);
            let builder = udpack::testing::server().channel("rpc", router);
            let server = net.bind(builder).await.expect("a server");
            let client = udpack::testing::client(&server);
            let socket = net.connect(client, &server).await.expect("let in");
            let channel = socket.open("rpc").await.expect("a channel");
            let serving = channel.on("inner", |(), channel: Channel| async move {
                channel.request::<_, u8>("leaf", &()).await
            });
            let serving = tokio::spawn(serving.run());
            let asked = channel
                .request::<_, u8>("outer", &())
                .timeout(Duration::from_secs(5));
            match asked.await {
                Ok(reply) => assert_eq!((passes, reply), (true, 7)),
                Err(error) => assert!(!passes && error.is_timeout(), "{error}"),
            }
            serving.abort();
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(600), test);
    assert!(in_time.await.is_ok(), "in time");
}
