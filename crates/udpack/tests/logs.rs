//! Rooms whose messages the cluster keeps: all members on all nodes hear them in one order, and a position means the same
//! on each node, also after all of them have begun anew.

mod common;
#[path = "common/seen.rs"]
mod seen;

use std::time::Duration;

use common::bounded;
use seen::{ROOM, Seen, hear, next, say};
use udpack::cluster::{Memory, MemoryLink};
use udpack::testing::{self, Net};
use udpack::{Channel, ClusterState, History, RoomPosition, Server, Socket, Why};

fn bounds() -> History {
    History {
        messages: 1000,
        bytes: 1 << 20,
        age: Duration::from_secs(3600),
    }
}

/// A server whose `chat` channels join the room.
async fn plain(net: &Net, memory: &Memory) -> (Server, MemoryLink) {
    let node = memory.node();
    let link = node.link();
    let builder = testing::server().cluster(node);
    let builder = builder.channel("chat", |channel: Channel| async move {
        channel.join(ROOM).expect("a sound room");
        while let Ok(Some(_)) = channel.recv().await {}
    });
    (net.bind(builder).await.expect("an address"), link)
}

async fn node(net: &Net, memory: &Memory, bounds: History) -> (Server, MemoryLink) {
    let (server, link) = plain(net, memory).await;
    server.rooms().history(ROOM, bounds).expect("a sound room");
    (server, link)
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A member, who has the room's messages from now on or behind these positions.
async fn join(net: &Net, server: &Server, since: &[RoomPosition]) -> (Socket, Channel) {
    let client = testing::client(server);
    let socket = net.connect(client, server).await.expect("let in");
    let channel = socket.channel("chat").since(since.to_vec()).open().await;
    let id = socket.id();
    let here = || server.rooms().members(ROOM);
    until(|| here().iter().any(|member| **member.session() == *id)).await;
    (socket, channel.expect("a channel"))
}

fn head(server: &Server) -> u64 {
    server.rooms().position(ROOM).map_or(0, |at| at.offset)
}

/// The reason, the first and the last of what a gap says is missing.
fn gone(seen: &Seen) -> (u64, Why, u64, u64) {
    match seen {
        Seen::Gap(lost, Some(missing)) => (*lost, missing.why, missing.from, missing.to),
        other => panic!("no gap with positions: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn all_members_hear_all_nodes_in_one_order() {
    bounded(async {
        let (net, memory) = (Net::new(1), Memory::keeping());
        let (one, _) = node(&net, &memory, bounds()).await;
        let (two, _) = node(&net, &memory, bounds()).await;
        let here = join(&net, &one, &[]).await;
        let there = join(&net, &two, &[]).await;
        for round in 0..50 {
            let (from, other) = if round % 3 == 0 {
                (&two, &one)
            } else {
                (&one, &two)
            };
            say(from, 4 * round..4 * round + 3);
            say(other, 4 * round + 3..4 * round + 4);
        }
        hear(&here.1, 0..200).await;
        hear(&there.1, 0..200).await;
        assert_eq!(here.1.positions(), there.1.positions());
        let except = here.0.id();
        let to = two.rooms().to(ROOM).except(&except);
        let sent = to.send("n", &200_u64).expect("sound");
        assert_eq!((sent.delivered, sent.dropped), (1, 0));
        say(&one, 201..202);
        hear(&here.1, 201..202).await;
        hear(&there.1, 200..202).await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_member_that_moves_to_another_node_gets_exactly_what_it_missed() {
    bounded(async {
        let (net, memory) = (Net::new(2), Memory::keeping());
        let (one, _) = node(&net, &memory, bounds()).await;
        let (two, link) = node(&net, &memory, bounds()).await;
        let (socket, channel) = join(&net, &one, &[]).await;
        say(&one, 0..10);
        hear(&channel, 0..10).await;
        let at = channel.positions();
        drop((socket, channel));
        say(&one, 10..15);
        say(&two, 15..20);
        let (socket, channel) = join(&net, &two, &at).await;
        say(&one, 20..21);
        hear(&channel, 10..21).await;
        drop((socket, channel));

        // The other way, to a node that has not read yet what the member has had.
        link.hold_logs(true);
        let (socket, channel) = join(&net, &one, &at).await;
        say(&one, 21..30);
        hear(&channel, 10..30).await;
        let at = channel.positions();
        drop((socket, channel));
        let (_socket, channel) = join(&net, &two, &at).await;
        say(&one, 30..33);
        link.hold_logs(false);
        hear(&channel, 30..33).await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn nodes_that_all_began_anew_have_what_an_old_member_missed() {
    bounded(async {
        let (net, memory) = (Net::new(3), Memory::keeping());
        let (one, _) = node(&net, &memory, bounds()).await;
        let (two, _) = node(&net, &memory, bounds()).await;
        let (socket, channel) = join(&net, &one, &[]).await;
        say(&two, 0..3);
        hear(&channel, 0..3).await;
        let at = channel.positions();
        drop((socket, channel));
        say(&one, 3..50);
        until(|| head(&one) == 50).await;
        net.take_down(&one);
        net.take_down(&two);
        drop((one, two));

        let (net, (three, link)) = {
            let net = Net::new(4);
            let (server, link) = plain(&net, &memory).await;
            (net, (server, link))
        };
        // The member is there before the node knows what was kept.
        link.hold_logs(true);
        three.rooms().history(ROOM, bounds()).expect("sound");
        assert_eq!(three.rooms().position(ROOM), None);
        assert!(three.rooms().kept(ROOM).is_none());
        let (_socket, old) = join(&net, &three, &at).await;
        let (_other, new) = join(&net, &three, &[]).await;
        say(&three, 50..51);
        link.hold_logs(false);
        hear(&old, 3..51).await;
        until(|| head(&three) == 51).await;
        say(&three, 51..52);
        hear(&old, 51..52).await;
        loop {
            if next(&new).await == Seen::Number(51) {
                break;
            }
        }
        assert_eq!(old.positions(), new.positions());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_is_beyond_the_bounds_is_a_gap_on_every_node() {
    bounded(async {
        let (net, memory) = (Net::new(5), Memory::keeping());
        let few = History {
            messages: 10,
            ..bounds()
        };
        let (one, _) = node(&net, &memory, few).await;
        let (socket, channel) = join(&net, &one, &[]).await;
        say(&one, 0..1);
        hear(&channel, 0..1).await;
        let at = channel.positions();
        drop((socket, channel));
        say(&one, 1..40);
        until(|| head(&one) == 40).await;
        let (two, _) = node(&net, &memory, few).await;
        for server in [&one, &two] {
            let (_socket, channel) = join(&net, server, &at).await;
            assert_eq!(gone(&next(&channel).await), (29, Why::Gone, 2, 30));
            hear(&channel, 30..40).await;
        }
    })
    .await;
}

/// A node that is so late that the cluster has dropped what it had not read.
#[tokio::test(start_paused = true)]
async fn what_is_dropped_before_a_node_has_read_it_is_told_with_its_positions() {
    bounded(async {
        let (net, memory) = (Net::new(6), Memory::keeping());
        let (one, _) = node(&net, &memory, bounds()).await;
        let (two, link) = node(&net, &memory, bounds()).await;
        let (_socket, channel) = join(&net, &two, &[]).await;
        say(&one, 0..2);
        hear(&channel, 0..2).await;
        link.hold_logs(true);
        say(&one, 2..9);
        memory.drop_oldest(ROOM, 5);
        link.hold_logs(false);
        assert_eq!(gone(&next(&channel).await), (3, Why::Gone, 3, 5));
        hear(&channel, 5..9).await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_the_broker_comes_late_and_what_has_no_place_is_told() {
    bounded(async {
        let (net, memory) = (Net::new(7), Memory::keeping());
        let (one, link) = node(&net, &memory, bounds()).await;
        let (two, _) = node(&net, &memory, bounds()).await;
        let here = join(&net, &one, &[]).await;
        let there = join(&net, &two, &[]).await;
        link.cut();
        say(&one, 0..30);
        link.mend();
        hear(&here.1, 0..30).await;
        hear(&there.1, 0..30).await;

        // 64 have a place.
        link.cut();
        say(&one, 30..100);
        let sent = one.rooms().to(ROOM).send("n", &100_u64).expect("sound");
        assert_eq!((sent.delivered, sent.dropped), (0, 1));
        let view = one.cluster().expect("a node");
        assert_eq!(view.state(), ClusterState::Degraded);
        link.mend();
        say(&two, 200..201);
        for channel in [&here.1, &there.1] {
            hear(channel, 30..94).await;
            hear(channel, 200..201).await;
            // Nothing follows from that node: it says so by itself.
            assert_eq!(next(channel).await, Seen::Gap(7, None));
        }
        say(&one, 101..102);
        for channel in [&here.1, &there.1] {
            hear(channel, 101..102).await;
        }
        // Those that come later are told at the same place.
        let at = RoomPosition {
            offset: 94,
            ..here.1.positions().remove(0)
        };
        let (_socket, late) = join(&net, &two, &[at]).await;
        hear(&late, 200..201).await;
        assert_eq!(next(&late).await, Seen::Gap(7, None));
        hear(&late, 101..102).await;
        assert_eq!(two.metrics().cluster_lost, 7);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_log_that_the_broker_lost_begins_a_new_epoch() {
    bounded(async {
        let (net, memory) = (Net::new(8), Memory::keeping());
        let (one, _) = node(&net, &memory, bounds()).await;
        let (_socket, channel) = join(&net, &one, &[]).await;
        say(&one, 0..5);
        hear(&channel, 0..5).await;
        let old = channel.positions().remove(0);
        memory.lose_log(ROOM);
        assert_eq!(gone(&next(&channel).await), (0, Why::Epoch, 1, 0));
        say(&one, 5..8);
        hear(&channel, 5..8).await;
        let new = channel.positions().remove(0);
        assert!(new.epoch != old.epoch && new.offset == 3);
        let (_socket, late) = join(&net, &one, &[old]).await;
        assert_eq!(gone(&next(&late).await), (0, Why::Epoch, 1, 0));
        hear(&late, 5..8).await;
        // Beyond the end of the log: that cannot be a position of this one.
        for offset in [100, u64::MAX] {
            let beyond = RoomPosition {
                offset,
                ..new.clone()
            };
            let (_socket, late) = join(&net, &one, &[beyond]).await;
            assert_eq!(gone(&next(&late).await), (0, Why::Epoch, 1, 0));
            hear(&late, 5..8).await;
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_keeps_no_history_of_the_room_sends_past_it() {
    bounded(async {
        let (net, memory) = (Net::new(9), Memory::keeping());
        let (one, _) = node(&net, &memory, bounds()).await;
        let (other, _) = plain(&net, &memory).await;
        let others = || other.cluster().expect("a node").nodes().len();
        until(|| others() == 1).await;
        let (_socket, channel) = join(&net, &one, &[]).await;
        say(&one, 0..1);
        hear(&channel, 0..1).await;
        let at = channel.positions();
        say(&other, 1..2);
        hear(&channel, 1..2).await;
        assert_eq!(channel.positions(), at);
        assert_eq!(head(&one), 1);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_history_that_was_off_and_on_again_has_what_was_kept() {
    bounded(async {
        let (net, memory) = (Net::new(10), Memory::keeping());
        let (one, _) = node(&net, &memory, bounds()).await;
        let (_socket, channel) = join(&net, &one, &[]).await;
        say(&one, 0..3);
        hear(&channel, 0..2).await;
        let at = channel.positions();
        hear(&channel, 2..3).await;
        one.rooms().history(ROOM, None).expect("sound");
        assert_eq!(one.rooms().position(ROOM), None);
        say(&one, 3..4);
        hear(&channel, 3..4).await;
        one.rooms().history(ROOM, bounds()).expect("sound");
        until(|| head(&one) == 3).await;
        say(&one, 4..5);
        hear(&channel, 4..5).await;
        let (_socket, late) = join(&net, &one, &at).await;
        hear(&late, 2..3).await;
        hear(&late, 4..5).await;
    })
    .await;
}
