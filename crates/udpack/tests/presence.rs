//! Presence: everybody in a room learns who else is, and nobody sees a flicker.

mod common;

use common::{bind, bounded, path, server};
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use udpack::{
    Channel, Client, CloseCode, Deny, Hello, Limits, Message, Peer, PresenceDiff, PresenceMap,
    Reconnect, Server, Socket, SocketState, Timeouts, TrackError,
};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Mood {
    mood: String,
}

fn mood(mood: &str) -> Mood {
    Mood {
        mood: mood.to_owned(),
    }
}

/// A server that lets everybody in by the name in the token, and hands their `chat` channels to the test.
async fn hall(limits: Limits) -> (Server, mpsc::UnboundedReceiver<Channel>) {
    hall_with(limits, Timeouts::default()).await
}

async fn hall_with(
    limits: Limits,
    timeouts: Timeouts,
) -> (Server, mpsc::UnboundedReceiver<Channel>) {
    let (seen, channels) = mpsc::unbounded_channel();
    let builder = server()
        .auth(|hello: Hello| {
            let peer = Peer::new(hello.token());
            async move { Ok::<_, Deny>(peer) }
        })
        .limits(limits)
        .timeouts(timeouts)
        .channel("chat", move |channel: Channel| {
            let seen = seen.clone();
            async move {
                let _ = seen.send(channel.clone());
                while let Ok(Some(_)) = channel.recv().await {}
            }
        });
    (bind(builder).await, channels)
}

async fn enter(server: &Server, name: &str) -> Socket {
    let client = Client::builder().pin(server.fingerprint()).token(name);
    client
        .connect(&server.local_addr().to_string())
        .await
        .expect("let in")
}

/// A channel of this socket, and its other end.
async fn chat(socket: &Socket, there: &mut mpsc::UnboundedReceiver<Channel>) -> (Channel, Channel) {
    let channel = socket.open("chat").await.expect("a channel");
    (channel, there.recv().await.expect("its other end"))
}

async fn next(channel: &Channel) -> Message {
    channel.recv().await.expect("alive").expect("a message")
}

/// The next message, which must be about the presence.
async fn change(channel: &Channel, map: &mut PresenceMap) -> (String, PresenceDiff) {
    let message = next(channel).await;
    let diff = map.apply(&message).expect("about the presence");
    (message.event().to_owned(), diff)
}

/// Peers with their moods.
fn view(map: &PresenceMap) -> Vec<(String, Vec<String>)> {
    map.peers()
        .map(|peer| {
            let metas = map.metas::<Mood>(peer).into_iter();
            let mut moods: Vec<_> = metas.map(|meta| meta.expect("a mood").mood).collect();
            moods.sort();
            (peer.to_owned(), moods)
        })
        .collect()
}

fn entry(peer: &str, moods: &[&str]) -> (String, Vec<String>) {
    let moods = moods.iter().map(|mood| (*mood).to_owned()).collect();
    (peer.to_owned(), moods)
}

#[tokio::test]
async fn all_are_told_the_state_first_and_then_what_changes() {
    bounded(async {
        let (server, mut there) = hall(Limits::default()).await;
        let (anna, anna2, bert) = (
            enter(&server, "anna").await,
            enter(&server, "anna").await,
            enter(&server, "bert").await,
        );
        let (a, at) = chat(&anna, &mut there).await;
        let (_a2, at2) = chat(&anna2, &mut there).await;
        let (b, bt) = chat(&bert, &mut there).await;
        let (mut amap, mut bmap) = (PresenceMap::new("hall"), PresenceMap::new("hall"));

        at.track("hall", &mood("fine")).expect("tracked");
        let (event, diff) = change(&a, &mut amap).await;
        assert_eq!((event.as_str(), diff.joins.len()), ("presence_state", 1));
        assert_eq!(diff.joins[0].peer(), "anna");
        assert_eq!(diff.joins[0].session(), &*anna.id());
        assert_eq!(diff.joins[0].meta::<Mood>().expect("a mood"), mood("fine"));

        // A member that only listens, then one that is tracked.
        bt.join("hall").expect("joined");
        let (event, _) = change(&b, &mut bmap).await;
        assert_eq!(event, "presence_state");
        assert_eq!(view(&bmap), [entry("anna", &["fine"])]);
        bt.track("hall", &mood("tired")).expect("tracked");
        for (channel, map) in [(&a, &mut amap), (&b, &mut bmap)] {
            let (event, diff) = change(channel, map).await;
            assert_eq!(event, "presence_diff");
            assert_eq!((diff.joins.len(), diff.leaves.len()), (1, 0));
        }

        // The same person a second time, then in another mood.
        at2.track("hall", &mood("busy")).expect("tracked");
        change(&b, &mut bmap).await;
        let both = [entry("anna", &["busy", "fine"]), entry("bert", &["tired"])];
        assert_eq!(view(&bmap), both);
        at.track("hall", &mood("glad")).expect("tracked");
        let (_, diff) = change(&b, &mut bmap).await;
        assert_eq!((diff.joins.len(), diff.leaves.len()), (1, 1));
        assert_eq!(diff.leaves[0].meta::<Mood>().expect("a mood"), mood("fine"));
        assert_eq!(view(&bmap)[0], entry("anna", &["busy", "glad"]));

        // One way to go each: untracked, channel over, connection over.
        assert!(at.untrack("hall") && !at.untrack("hall"));
        let (_, diff) = change(&b, &mut bmap).await;
        assert_eq!((diff.joins.len(), diff.leaves.len()), (0, 1));
        assert_eq!(view(&bmap)[0], entry("anna", &["busy"]));
        anna2.abort(CloseCode::NORMAL, "gone");
        change(&b, &mut bmap).await;
        assert_eq!(view(&bmap), [entry("bert", &["tired"])]);
        bt.close(CloseCode::NORMAL, "").await;
        // Since then: one came, one changed, three went.
        for _ in 0..5 {
            change(&a, &mut amap).await;
        }
        assert!(amap.is_empty());
        at.leave("hall");
        assert!(server.rooms().names().is_empty(), "nothing is left behind");
    })
    .await;
}

#[tokio::test]
async fn the_same_again_changes_nothing() {
    bounded(async {
        let (server, mut there) = hall(Limits::default()).await;
        let (anna, bert) = (enter(&server, "anna").await, enter(&server, "bert").await);
        let (_first, first) = chat(&anna, &mut there).await;
        let (second_here, second) = chat(&anna, &mut there).await;
        let (b, bt) = chat(&bert, &mut there).await;
        let mut map = PresenceMap::new("hall");
        first.track("hall", &mood("fine")).expect("tracked");
        bt.join("hall").expect("joined");
        change(&b, &mut map).await;
        // Another channel of the same session takes the entry over, and the first goes.
        second.track("hall", &mood("fine")).expect("tracked");
        let mut own = PresenceMap::new("hall");
        change(&second_here, &mut own).await;
        assert_eq!(view(&own), [entry("anna", &["fine"])]);
        first.track("hall", &mood("fine")).expect("tracked");
        second.track("hall", &mood("fine")).expect("tracked");
        first.close(CloseCode::NORMAL, "").await;
        assert!(!second.leave("attic"));
        server.rooms().to("hall").send("mark", &()).expect("sound");
        assert_eq!(next(&b).await.event(), "mark", "nothing came before it");
        assert!(second.untrack("hall"));
        let (_, diff) = change(&b, &mut map).await;
        assert_eq!(diff.leaves.len(), 1);
    })
    .await;
}

#[tokio::test]
async fn who_was_slow_gets_the_whole_state_and_no_gap() {
    bounded(async {
        let limits = Limits {
            outbound_messages: 4,
            ..Limits::default()
        };
        let (server, mut there) = hall(limits).await;
        let narrow = Limits {
            stream_window: 16 << 10,
            connection_window: 64 << 10,
            ..Limits::default()
        };
        let slow = Client::builder()
            .pin(server.fingerprint())
            .token("slow")
            .limits(narrow)
            .connect(&server.local_addr().to_string())
            .await
            .expect("let in");
        let (slow, slow_there) = chat(&slow, &mut there).await;
        slow_there.join("hall").expect("joined");
        let anna = enter(&server, "anna").await;
        let (_a, at) = chat(&anna, &mut there).await;
        let mut map = PresenceMap::new("hall");
        at.track("hall", &mood("first")).expect("tracked");
        change(&slow, &mut map).await;
        // Its queue is full for good: what QUIC takes is less than this.
        while matches!(slow_there.try_send("noise", &"x".repeat(8 << 10)), Ok(true)) {
            tokio::task::yield_now().await;
        }
        let mut noise = 0;
        for n in 0..100 {
            at.track("hall", &mood(&n.to_string())).expect("tracked");
        }
        let mut states = 0;
        while view(&map) != [entry("anna", &["99"])] {
            let message = next(&slow).await;
            assert!(message.gap().is_none());
            match map.apply(&message) {
                Some(_) => states += 1,
                None => noise += 1,
            }
        }
        assert!(states < 10, "{states} changes for one who was away");
        assert!(noise > 0);
        at.track("hall", &mood("last")).expect("tracked");
        let message = next(&slow).await;
        map.apply(&message).expect("about the presence");
        assert_eq!(view(&map), [entry("anna", &["last"])]);
    })
    .await;
}

#[tokio::test]
async fn a_presence_is_bounded() {
    bounded(async {
        let (server, mut there) = hall(Limits::default()).await;
        let anna = enter(&server, "anna").await;
        let (a, at) = chat(&anna, &mut there).await;
        let large = "x".repeat(4 << 10);
        assert!(matches!(at.track("hall", &large), Err(TrackError::Meta(_))));
        assert!(matches!(
            at.track("", &mood("fine")),
            Err(TrackError::Join(_))
        ));
        assert!(matches!(
            a.track("hall", &mood("fine")),
            Err(TrackError::Join(_))
        ));
        assert!(server.rooms().names().is_empty());
        // Another room's presence and what is none at all.
        at.track("attic", &mood("fine")).expect("tracked");
        let message = next(&a).await;
        assert!(PresenceMap::new("hall").apply(&message).is_none());
        assert!(PresenceMap::new("attic").apply(&message).is_some());
        at.send("presence_diff", &7).await.expect("sent");
        at.send("presence_state", &mood("x")).await.expect("sent");
        for _ in 0..2 {
            assert!(PresenceMap::new("attic").apply(&next(&a).await).is_none());
        }
    })
    .await;
}

#[tokio::test]
async fn a_lost_connection_shows_nobody_leaving_unless_they_do_not_come_back_to_the_room() {
    bounded(async {
        let timeouts = Timeouts {
            idle: Duration::from_secs(1),
            keep_alive: Duration::from_millis(200),
            presence: Duration::from_secs(1),
            ..Timeouts::default()
        };
        let (server, mut there) = hall_with(Limits::default(), timeouts.clone()).await;
        let (address, cut) = path(server.local_addr()).await;
        let anna = Client::builder()
            .pin(server.fingerprint())
            .token("anna")
            .timeouts(timeouts)
            .reconnect(Reconnect {
                first: Duration::from_millis(50),
                ..Reconnect::default()
            })
            .connect(&address.to_string())
            .await
            .expect("let in");
        let bert = enter(&server, "bert").await;
        let (_a, at) = chat(&anna, &mut there).await;
        let (b, bt) = chat(&bert, &mut there).await;
        let (mut hall, mut attic) = (PresenceMap::new("hall"), PresenceMap::new("attic"));
        at.track("hall", &mood("fine")).expect("tracked");
        at.track("attic", &mood("dusty")).expect("tracked");
        bt.join("hall").expect("joined");
        bt.join("attic").expect("joined");
        change(&b, &mut hall).await;
        change(&b, &mut attic).await;

        let mut states = anna.states();
        cut.store(true, Ordering::Relaxed);
        while !matches!(states.next().await, Some(SocketState::Reconnecting { .. })) {}
        // At the server, too, the channel has ended with its connection.
        at.closed().await;
        while server.rooms().members("hall").len() > 1 {
            tokio::task::yield_now().await;
        }
        cut.store(false, Ordering::Relaxed);
        loop {
            match states.next().await.expect("not given up") {
                SocketState::Connected { resumed, .. } => {
                    assert!(resumed);
                    break;
                }
                SocketState::Connecting | SocketState::Reconnecting { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let (a, at) = chat(&anna, &mut there).await;
        at.track("hall", &mood("fine")).expect("tracked");
        let mut own = PresenceMap::new("hall");
        change(&a, &mut own).await;
        assert_eq!(view(&own), [entry("anna", &["fine"])]);

        // She has not come back to the attic; of the hall there was nothing to tell.
        let message = next(&b).await;
        assert!(hall.apply(&message).is_none());
        let diff = attic.apply(&message).expect("about the attic");
        assert_eq!((diff.joins.len(), diff.leaves.len()), (0, 1));
        assert!(attic.is_empty());
        assert_eq!(view(&hall), [entry("anna", &["fine"])]);
        anna.close(CloseCode::NORMAL, "").await;
        change(&b, &mut hall).await;
        assert!(hall.is_empty());
    })
    .await;
}
