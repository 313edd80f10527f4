//! Routers: arguments, order, middleware, state, typed events, and what a bad message costs.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{TOKEN, bind, bounded, connect, server};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use udpack::{
    Answer, BindError, Channel, Client, ConnectError, Context, Data, Event, Fault, Items, Message,
    Next, Peer, RequestError, Router, Server, Socket, State,
};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Say {
    text: String,
    n: u64,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Seen {
    by: String,
}

impl Event for Say {
    const NAME: &'static str = "say";
    type Reply = Seen;
}

fn say() -> Say {
    Say {
        text: "hello".into(),
        n: 7,
    }
}

async fn rpc(router: Router) -> (Server, Socket, Channel) {
    let server = bind(server().channel("rpc", router)).await;
    let socket = connect(&server).await;
    let channel = socket.open("rpc").await.expect("a channel");
    (server, socket, channel)
}

#[allow(clippy::too_many_arguments, reason = "as many as there may be")]
async fn eight(
    say: Say,
    Data(again): Data<Say>,
    cx: Context,
    channel: Channel,
    socket: Socket,
    peer: Peer,
    State(greeting): State<&'static str>,
    message: Message,
) -> Result<Seen, Fault> {
    assert_eq!(say, again);
    assert_eq!((message.event(), cx.event()), ("eight", "eight"));
    assert_eq!(channel.name(), "rpc");
    assert_eq!(socket.id(), channel.session_id());
    assert!(cx.is_request());
    Ok(Seen {
        by: format!("{greeting} {}", peer.id()),
    })
}

#[tokio::test]
async fn handlers_take_up_to_eight_arguments_of_any_kind() {
    bounded(async {
        let router = Router::new()
            .on("none", || async { Ok::<_, Fault>("none") })
            .on("data", |n: u64| async move { Ok::<_, Fault>(n + 1) })
            .on("no data", |peer: Peer| async move {
                Ok::<_, Fault>(peer.id().to_owned())
            })
            .on(
                "seven",
                |a: u64,
                 _: Peer,
                 _: Context,
                 _: Channel,
                 _: Message,
                 Data(b): Data<u64>,
                 mut items: Items<u64>| async move {
                    let item = items
                        .next()
                        .await
                        .ok_or("none")?
                        .map_err(|error| error.to_string())?;
                    Ok::<_, Fault>(a + b + item)
                },
            )
            .on("eight", eight)
            .state("hello");
        let (_server, _socket, rpc) = rpc(router).await;
        assert_eq!(
            rpc.request::<_, String>("none", &7).await.expect("a reply"),
            "none"
        );
        assert_eq!(rpc.request::<_, u64>("data", &7).await.expect("a reply"), 8);
        assert_eq!(
            rpc.request::<_, String>("no data", &())
                .await
                .expect("a reply"),
            "tester"
        );
        let items = futures_util::stream::iter([100_u64]);
        let sum = rpc.request::<_, u64>("seven", &7).with_items(items).await;
        assert_eq!(sum.expect("a reply"), 114);
        let seen: Seen = rpc.request("eight", &say()).await.expect("a reply");
        assert_eq!(seen.by, "hello tester");
    })
    .await;
}

#[tokio::test]
async fn bad_data_and_unknown_events_cost_one_message_each() {
    bounded(async {
        let ran = Arc::new(AtomicUsize::new(0));
        let count = ran.clone();
        let router = Router::new().on("say", move |_: Say| {
            count.fetch_add(1, Ordering::Relaxed);
            async {}
        });
        let (_server, _socket, rpc) = rpc(router).await;
        rpc.send("say", &7).await.expect("queued");
        rpc.send("shout", &say()).await.expect("queued");
        let error = rpc.request::<_, ()>("say", &"text").await.expect_err("bad");
        assert!(
            matches!(&error, RequestError::Fault(fault) if fault.code == Fault::BAD_PAYLOAD),
            "{error}"
        );
        let error = rpc
            .request::<_, ()>("shout", &())
            .await
            .expect_err("unknown");
        assert!(matches!(error, RequestError::NoHandler), "{error}");
        assert_eq!(ran.load(Ordering::Relaxed), 0, "the handler did not run");
        rpc.send_acked("say", &say()).await.expect("served");
        assert_eq!(ran.load(Ordering::Relaxed), 1);
    })
    .await;
}

#[tokio::test]
async fn the_fallback_takes_what_nobody_else_does() {
    bounded(async {
        let router = Router::new()
            .on("known", || async { Ok::<_, Fault>("known".to_owned()) })
            .fallback(|message: Message, cx: Context| async move {
                assert_eq!(message.event(), cx.event());
                Ok::<_, Fault>(format!("not {}", message.event()))
            });
        let (_server, _socket, rpc) = rpc(router).await;
        for (event, reply) in [("known", "known"), ("other", "not other")] {
            let answer: String = rpc.request(event, &()).await.expect("a reply");
            assert_eq!(answer, reply);
        }
    })
    .await;
}

#[tokio::test]
async fn a_typed_event_is_on_the_wire_what_its_name_and_data_are() {
    bounded(async {
        let server = bind(server()).await;
        let dialled = connect(&server).await;
        let accepted = server.accept().await.expect("one socket");
        let ours = dialled.open("typed").await.expect("a channel");
        ours.emit(&say()).await.expect("queued");
        ours.send("say", &say()).await.expect("queued");
        let theirs = accepted.accept_channel().await.expect("the channel");
        let typed = theirs.recv().await.expect("open").expect("a message");
        let plain = theirs.recv().await.expect("open").expect("a message");
        assert_eq!(typed.event(), plain.event());
        assert_eq!((typed.raw(), typed.len()), (plain.raw(), plain.len()));
        let serving = theirs
            .route(Router::new().event(|say: Say, peer: Peer| async move {
                Ok::<_, Fault>(Seen {
                    by: format!("{} {}", peer.id(), say.n),
                })
            }))
            .run();
        let asking = async {
            let typed = ours.call(&say()).await.expect("a reply");
            let plain: Seen = ours.request("say", &say()).await.expect("a reply");
            assert_eq!(typed, plain);
            assert_eq!(typed.by, "tester 7");
            drop(ours);
        };
        let (served, ()) = tokio::join!(serving, asking);
        served.expect("an orderly end");
    })
    .await;
}

#[tokio::test]
async fn middleware_wraps_all_handlers_the_first_outermost() {
    bounded(async {
        let layer = |name: &'static str| {
            move |message: Message, cx: Context, next: Next| async move {
                let trail = cx.extensions_trail();
                trail.lock().expect("sound").push(format!("{name} in"));
                let answer = next.run(message, cx).await;
                let end = answer
                    .fault()
                    .map_or("out", |fault| match fault.code.as_str() {
                        Fault::NO_HANDLER => "no handler",
                        _ => "fault",
                    });
                trail.lock().expect("sound").push(format!("{name} {end}"));
                answer
            }
        };
        let trail = Trail::default();
        let router = Router::new()
            .on("ok", || async {})
            .wrap(layer("outer"))
            .wrap(|message: Message, cx: Context, next: Next| async move {
                if message.event() == "forbidden" {
                    return Answer::from(Fault::new("forbidden", "not you"));
                }
                next.run(message, cx).await
            })
            .wrap(layer("inner"))
            .state(trail.clone());
        let (_server, _socket, rpc) = rpc(router).await;
        rpc.send_acked("ok", &()).await.expect("served");
        let error = rpc.send_acked("forbidden", &()).await.expect_err("refused");
        assert!(
            matches!(&error, RequestError::Fault(fault) if fault.code == "forbidden"),
            "{error}"
        );
        let error = rpc.send_acked("nobody", &()).await.expect_err("unknown");
        assert!(matches!(error, RequestError::NoHandler), "{error}");
        assert_eq!(
            *trail.lock().expect("sound"),
            [
                "outer in",
                "inner in",
                "inner out",
                "outer out",
                "outer in",
                "outer fault",
                "outer in",
                "inner in",
                "inner no handler",
                "outer no handler"
            ]
        );
    })
    .await;
}

type Trail = Arc<std::sync::Mutex<Vec<String>>>;

trait HasTrail {
    fn extensions_trail(&self) -> Trail;
}

impl HasTrail for Context {
    fn extensions_trail(&self) -> Trail {
        self.state().get().expect("given to the router")
    }
}

#[tokio::test]
async fn handlers_run_in_order_unless_several_may_run_at_once() {
    bounded(async {
        for at_once in [1, 3] {
            let (tell, mut told) = mpsc::unbounded_channel();
            let go = Arc::new(Notify::new());
            let most = Arc::new(AtomicUsize::new(0));
            let router = {
                let (go, most, running) = (go.clone(), most.clone(), Arc::<AtomicUsize>::default());
                Router::new()
                    .on("work", move |n: u64| {
                        let (tell, go) = (tell.clone(), go.clone());
                        let (most, running) = (most.clone(), running.clone());
                        async move {
                            let now = running.fetch_add(1, Ordering::Relaxed) + 1;
                            most.fetch_max(now, Ordering::Relaxed);
                            let _ = tell.send(n);
                            go.notified().await;
                            running.fetch_sub(1, Ordering::Relaxed);
                        }
                    })
                    .concurrency(at_once)
            };
            let (_server, _socket, rpc) = rpc(router).await;
            for n in 0..6_u64 {
                rpc.send("work", &n).await.expect("queued");
            }
            for n in 0..6 {
                assert_eq!(told.recv().await, Some(n as u64), "they begin in order");
                if n + 1 >= at_once {
                    go.notify_one();
                }
            }
            assert_eq!(most.load(Ordering::Relaxed), at_once);
        }
    })
    .await;
}

#[tokio::test]
async fn a_missing_state_is_found_before_anybody_is_served() {
    let needs = || Router::new().on("say", |_: Say, State(_): State<Trail>| async {});
    let Err(error) = server().channel("chat", needs()).bind("127.0.0.1:0").await else {
        panic!("the state is missing");
    };
    assert!(
        matches!(&error, BindError::MissingState { channel, state }
            if channel == "chat" && state.contains("Mutex")),
        "{error}"
    );
    let Err(error) = Client::builder()
        .token(TOKEN)
        .channel("chat", needs())
        .build()
    else {
        panic!("the state is missing");
    };
    assert!(
        matches!(error, ConnectError::MissingState { .. }),
        "{error}"
    );
    let given = needs().state(Trail::default());
    bind(server().channel("chat", given)).await;
}

#[tokio::test]
async fn handlers_that_answer_are_dropped_with_their_channel_and_others_run_to_their_end() {
    bounded(async {
        let (tell, mut told) = mpsc::unbounded_channel();
        let go = Arc::new(Notify::new());
        let router = {
            let go = go.clone();
            Router::new()
                .on("work", move |name: String| {
                    let (tell, go) = (tell.clone(), go.clone());
                    async move {
                        let _ = tell.send(format!("{name} begun"));
                        let _guard = Leave(name, tell);
                        go.notified().await;
                    }
                })
                .concurrency(2)
        };
        let (_server, socket, rpc) = rpc(router).await;
        rpc.send("work", &"event").await.expect("queued");
        assert_eq!(told.recv().await.as_deref(), Some("event begun"));
        let asking = tokio::spawn(rpc.request::<_, ()>("work", &"request").into_future());
        assert_eq!(told.recv().await.as_deref(), Some("request begun"));
        drop(rpc.close(udpack::CloseCode::NORMAL, "enough"));
        assert_eq!(told.recv().await.as_deref(), Some("request left"));
        go.notify_one();
        assert_eq!(told.recv().await.as_deref(), Some("event left"));
        asking.await.expect("no panic").expect_err("no reply");
        drop(socket);
    })
    .await;
}

struct Leave(String, mpsc::UnboundedSender<String>);

impl Drop for Leave {
    fn drop(&mut self) {
        let _ = self.1.send(format!("{} left", self.0));
    }
}
