//! A router's open and close hooks, its clones, and the handles that lead from rooms and sessions to channels.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use tokio::sync::mpsc;
use udpack::testing::{self, Net};
use udpack::{
    Channel, CloseCode, Context, Data, Deny, Drain, Fault, Hello, Peer, Reconnect, Router, Server,
    State,
};

async fn bounded<F: Future>(test: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(600), test)
        .await
        .expect("the test took longer than 600 s")
}

/// What the hooks were told, in order.
type Told = mpsc::UnboundedReceiver<(&'static str, Vec<String>)>;

/// A router that joins two rooms when it opens and tells of what its hooks saw.
fn router() -> (Router, Told) {
    let (tell, told) = mpsc::unbounded_channel();
    let closed = tell.clone();
    let router = Router::new()
        .on("ping", |(), _: Context| async { Ok::<_, Fault>("pong") })
        .on("wait", |(), _: Context| async {
            std::future::pending::<()>().await;
            Ok::<_, Fault>(())
        })
        .on_open(move |channel: Channel| {
            let tell = tell.clone();
            async move {
                channel.join("attic")?;
                channel.join("hall")?;
                tell.send(("open", channel.rooms())).unwrap();
                Ok::<_, udpack::JoinError>(())
            }
        })
        .on_close(move |channel: Channel| {
            let tell = closed.clone();
            async move { tell.send(("close", channel.rooms())).unwrap() }
        });
    (router, told)
}

/// How a served channel may end.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Finish,
    Drop,
    Close,
    ServerCloses,
    Disconnect,
    Abort,
    SocketCloses,
    Cut,
    CutWhileResumable,
    CutWhileHandling,
    Revoke,
    Drain,
}

#[tokio::test(start_paused = true)]
async fn the_close_hook_knows_the_rooms_however_the_channel_ended() {
    for ending in [
        Ending::Finish,
        Ending::Drop,
        Ending::Close,
        Ending::ServerCloses,
        Ending::Disconnect,
        Ending::Abort,
        Ending::SocketCloses,
        Ending::Cut,
        Ending::CutWhileResumable,
        Ending::CutWhileHandling,
        Ending::Revoke,
        Ending::Drain,
    ] {
        bounded(ends(ending)).await;
    }
}

async fn ends(ending: Ending) {
    let net = Net::new(1);
    let (router, mut told) = router();
    let server = net
        .bind(testing::server().channel("chat", router))
        .await
        .unwrap();
    let builder = testing::client(&server);
    let resumable = matches!(ending, Ending::CutWhileResumable);
    let builder = if resumable {
        builder.reconnect(Reconnect::default())
    } else {
        builder
    };
    let socket = net.connect(builder, &server).await.unwrap();
    let open = socket.channel("chat");
    let open = if resumable { open.resumable() } else { open };
    let channel = open.open().await.unwrap();
    let pong: String = channel.request("ping", &()).await.unwrap();
    assert_eq!(pong, "pong");
    let rooms = vec!["attic".to_owned(), "hall".to_owned()];
    assert_eq!(told.try_recv().unwrap(), ("open", rooms.clone()));
    match ending {
        Ending::Finish => channel.finish().await.unwrap(),
        Ending::Drop => drop(channel),
        Ending::Close => drop(channel.close(CloseCode::NORMAL, "enough").await),
        Ending::ServerCloses => {
            let members = server.rooms().members("hall");
            let there = members[0].channel().unwrap();
            drop(there.close(CloseCode::REFUSED, "out").await);
        }
        Ending::Disconnect => {
            let code = CloseCode::REFUSED;
            assert_eq!(server.rooms().disconnect("hall", code, "out"), 1);
        }
        Ending::Abort => socket.abort(CloseCode::NORMAL, "gone"),
        Ending::SocketCloses => drop(socket.close(CloseCode::NORMAL, "bye").await),
        Ending::Cut | Ending::CutWhileResumable => net.cut(),
        Ending::CutWhileHandling => {
            channel.send("wait", &()).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            net.cut();
        }
        Ending::Revoke => assert_eq!(server.revoke(|_| true), 1),
        Ending::Drain => {
            let drain = Drain::within(Duration::from_secs(1));
            server.run_until(async {}, drain).await.unwrap();
        }
    }
    assert_eq!(told.recv().await.unwrap(), ("close", rooms), "{ending:?}");
    while !server.rooms().members("hall").is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(told.try_recv().is_err(), "{ending:?}: told once");
}

#[tokio::test(start_paused = true)]
async fn an_open_hook_comes_before_all_messages_and_may_refuse_the_channel() {
    bounded(async {
        let net = Net::new(2);
        let router = Router::new()
            .on("who", |(), State(name): State<String>| async move {
                Ok::<_, Fault>(name)
            })
            .state("nobody".to_owned());
        let slow = router.clone().on_open(|channel: Channel| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            channel.send("hello", &()).await
        });
        let fails = router
            .clone()
            .state("somebody".to_owned())
            .on_open(|_| async { Err::<(), _>("no") });
        let refuses = router.on_open(|channel: Channel| async move {
            drop(channel.close(CloseCode::FORBIDDEN, "not you"));
        });
        let builder = testing::server()
            .channel("slow", slow)
            .channel("fails", fails)
            .channel("refuses", refuses);
        let server = net.bind(builder).await.unwrap();
        let socket = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        let channel = socket.open("slow").await.unwrap();
        let name: String = channel.request("who", &()).await.unwrap();
        assert_eq!(name, "nobody", "a clone's state is its own");
        let first = channel.recv().await.unwrap().unwrap();
        assert_eq!(first.event(), "hello");
        for (name, code) in [
            ("fails", CloseCode::HANDLER_FAILED),
            ("refuses", CloseCode::FORBIDDEN),
        ] {
            let channel = socket.open(name).await.unwrap();
            assert_eq!(channel.closed().await.code, code);
        }
    })
    .await;
}

/// A server whose clients are known by their tokens and all in one room.
async fn lobby(net: &Net) -> Server {
    let router = Router::new().on_open(|channel: Channel| async move { channel.join("lobby") });
    let builder = testing::server()
        .auth(async |hello: Hello| Ok::<_, Deny>(Peer::new(hello.token())))
        .channel("chat", router);
    net.bind(builder).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_member_leads_to_its_channel_and_its_socket() {
    bounded(async {
        let net = Net::new(3);
        let server = lobby(&net).await;
        let mut clients = Vec::new();
        for name in ["ann", "bob"] {
            let builder = testing::client(&server).token(name);
            let socket = net.connect(builder, &server).await.unwrap();
            let channel = socket.open("chat").await.unwrap();
            let served = channel.route(
                Router::new().on("name", move |Data(()), _: Context| async move {
                    Ok::<_, Fault>(name)
                }),
            );
            clients.push((socket, tokio::spawn(served.run())));
        }
        while server.rooms().members("lobby").len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // A request to one member.
        for member in server.rooms().members("lobby") {
            assert_eq!(member.name(), "chat");
            let name: String = member
                .channel()
                .unwrap()
                .request("name", &())
                .await
                .unwrap();
            assert_eq!(member.peer().unwrap().id(), name);
        }
        let (ann, served) = clients.remove(0);
        let there = server.socket(&ann.id()).unwrap();
        assert_eq!(there.peer().id(), "ann");
        assert!(server.socket("0123").is_none());
        drop(there.close(CloseCode::FORBIDDEN, "kicked"));
        assert_eq!(ann.closed().await.code, CloseCode::FORBIDDEN);
        served.await.unwrap().unwrap();
        assert!(server.socket(&ann.id()).is_none());
        // The room without its members.
        let (bob, served) = clients.remove(0);
        assert_eq!(server.rooms().leave("lobby"), 1);
        assert!(server.rooms().names().is_empty());
        assert!(server.socket(&bob.id()).is_some());
        assert!(!served.is_finished(), "its channel lives on");
    })
    .await;
}
