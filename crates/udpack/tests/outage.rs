//! What an outage of the path does to a session: what a connection lent returns with it, what is busy outlives a
//! silence as long as its connection does, and each side can see what is so.

mod common;

use std::future::Future;
use std::time::Duration;

use common::{client, server};
use serde_bytes::ByteBuf;
use udpack::testing::Net;
use udpack::{
    Channel, Limits, Priority, Reconnect, Server, ServerBuilder, Socket, SocketState, Timeouts,
};

/// Time-outs that make a lost connection show within seconds.
fn timeouts() -> Timeouts {
    Timeouts {
        idle: Duration::from_secs(5),
        keep_alive: Duration::from_secs(1),
        resume: Duration::from_secs(900),
        ..Timeouts::default()
    }
}

fn reconnect() -> Reconnect {
    Reconnect {
        first: Duration::from_millis(50),
        most: Duration::from_secs(2),
        patience: Duration::from_secs(900),
        ..Reconnect::default()
    }
}

/// Nothing here takes longer than this, on the paused clock.
async fn bounded<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(3600), future)
        .await
        .expect("it ends")
}

/// Both ends of a session on this network.
async fn ends(net: &Net, server: ServerBuilder, limits: Limits) -> (Server, Socket, Socket) {
    let server = net
        .bind(server.timeouts(timeouts()))
        .await
        .expect("an address");
    let builder = client(&server)
        .timeouts(timeouts())
        .reconnect(reconnect())
        .limits(limits);
    let (here, there) = tokio::join!(net.connect(builder, &server), server.accept());
    let (here, there) = (here.expect("let in"), there.expect("a socket"));
    (server, here, there)
}

/// A channel that `from` opens, and its other end.
async fn channel(from: &Socket, to: &Socket, priority: Priority, keep: bool) -> (Channel, Channel) {
    let opening = from.channel("c").priority(priority);
    let opening = match keep {
        true => opening.resumable(),
        false => opening,
    };
    let (here, there) = tokio::join!(opening.open(), to.accept_channel());
    (here.expect("a channel"), there.expect("its other end"))
}

/// Silence for so long that the connection is lost, then the socket is connected again.
async fn lose(net: &Net, socket: &Socket) {
    let mut states = socket.states();
    states.next().await.expect("the present state");
    net.cut_for(Duration::from_secs(12));
    loop {
        match states.next().await.expect("another state") {
            SocketState::Connected { resumed, .. } => return assert!(resumed),
            SocketState::GaveUp(reason) => panic!("gave up: {reason}"),
            _ => {}
        }
    }
}

/// Sends without end.
async fn flood(channel: Channel) {
    let block = ByteBuf::from(vec![7; 100_000]);
    while channel.send("block", &block).await.is_ok() {}
}

/// Takes everything.
async fn drink(channel: Channel) {
    while let Ok(Some(_)) = channel.recv().await {}
}

/// What was under way when a connection was lost is not waited for on the next one. Every handle of the channels that
/// ended is kept, as a program may: they keep QUIC's state of the old connections, with all bytes in it.
#[tokio::test(start_paused = true)]
async fn what_a_lost_connection_lent_is_there_again_on_the_next() {
    for (seed, (from_client, keep)) in (0..).zip([(true, false), (false, false), (true, true)]) {
        bounded(async {
            let net = Net::new(seed)
                .delay(Duration::from_millis(20))
                .rate(1_000_000);
            let (_server, here, there) = ends(&net, server(), Limits::default()).await;
            let (from, to) = match from_client {
                true => (&here, &there),
                false => (&there, &here),
            };
            let mut held = Vec::new();
            let mut tasks = tokio::task::JoinSet::new();
            // A session is kept for its channels.
            held.push(channel(&here, &there, Priority::Normal, true).await);
            for _ in 0..2 {
                for priority in [Priority::Bulk, Priority::Bulk, Priority::Normal] {
                    let (busy, other) = channel(from, to, priority, keep).await;
                    tasks.spawn(flood(busy.clone()));
                    tasks.spawn(drink(other.clone()));
                    held.push((busy, other));
                }
                tokio::time::sleep(Duration::from_secs(2)).await;
                net.cut();
                tasks.abort_all();
                lose(&net, &here).await;
                for priority in [Priority::High, Priority::Normal, Priority::Bulk] {
                    let (ours, theirs) = channel(from, to, priority, false).await;
                    // More than bulk channels may have under way together.
                    let blocks = 20;
                    let sent = async {
                        let block = ByteBuf::from(vec![7; 100_000]);
                        for _ in 0..blocks {
                            ours.send("block", &block).await.expect("alive");
                        }
                        ours.finish().await.expect("all was taken");
                    };
                    let counted = async {
                        let mut count = 0;
                        while theirs.recv().await.expect("alive").is_some() {
                            count += 1;
                        }
                        count
                    };
                    let moved = async { tokio::join!(sent, counted).1 };
                    let moved = tokio::time::timeout(Duration::from_secs(120), moved).await;
                    assert_eq!(moved, Ok(blocks), "{priority:?}, kept {keep}");
                }
            }
            drop(held);
        })
        .await;
    }
}
