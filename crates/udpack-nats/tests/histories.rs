//! Rooms with a history whose messages a real `nats-server` keeps: nothing within the bounds is missed, whoever of nodes and
//! broker begins anew.

mod common;
#[path = "../../udpack/tests/common/seen.rs"]
mod seen;

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Broker, bounded, reaches};
use rustix::process::Signal;
use seen::{ROOM, Seen, hear, next, say};
use udpack::{
    Channel, Client, ClusterState, Deny, Hello, History, Identity, Peer, RoomPosition, Server,
    Socket, Why,
};
use udpack_nats::{Nats, NatsError};

const MANY: u64 = 10_000;

fn bounds() -> History {
    History {
        messages: 2 * MANY as usize,
        bytes: 64 << 20,
        age: Duration::from_secs(3600),
    }
}

async fn node(broker: &Broker, bounds: History) -> Server {
    let nats = Nats::options().keep_histories(1);
    let nats = nats.connect(&broker.url()).await.expect("a broker");
    let server = Server::builder()
        .identity(Identity::generate().expect("a fresh key"))
        .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
        .channel("chat", |channel: Channel| async move {
            channel.join(ROOM).expect("a sound room");
            while let Ok(Some(_)) = channel.recv().await {}
        })
        .cluster(nats);
    let server = server.bind("127.0.0.1:0").await.expect("a free port");
    server.rooms().history(ROOM, bounds).expect("a sound room");
    server
}

/// A member, who has the room's messages from now on or behind these positions.
async fn join(server: &Server, since: &[RoomPosition]) -> (Socket, Channel) {
    let socket = Client::builder()
        .pin(server.fingerprint())
        .connect(&server.local_addr().to_string())
        .await
        .expect("let in");
    let channel = socket.channel("chat").since(since.to_vec()).open().await;
    (socket, channel.expect("a channel"))
}

/// Waits until a server has read so many messages of the room.
async fn read(server: &Server, count: u64) {
    let head = || server.rooms().position(ROOM).map(|at| at.offset);
    while head() != Some(count) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A member of a node that knows what was kept, so that it has all that is sent from now on.
async fn member(server: &Server) -> (Socket, Channel) {
    let (socket, channel) = join(server, &[]).await;
    while server.rooms().position(ROOM).is_none() || server.rooms().members(ROOM).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (socket, channel)
}

/// How far a member of a node has come that heard these numbers of another node, or of the same, and left.
async fn left(server: &Server, speaker: &Server, numbers: Range<u64>) -> Vec<RoomPosition> {
    let (_socket, channel) = member(server).await;
    say(speaker, numbers.clone());
    hear(&channel, numbers).await;
    channel.positions()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_moves_to_another_node_misses_nothing() {
    let Some(broker) = Broker::keeping() else {
        return;
    };
    bounded(async {
        let (one, two) = (node(&broker, bounds()).await, node(&broker, bounds()).await);
        let (socket, channel) = member(&one).await;
        let (_stays, other) = member(&two).await;
        say(&one, 0..100);
        hear(&channel, 0..50).await;
        let at = channel.positions();
        drop((socket, channel));
        hear(&other, 0..100).await;
        say(&two, 100..200);
        hear(&other, 100..200).await;
        let (_socket, channel) = join(&two, &at).await;
        say(&one, 200..210);
        hear(&channel, 50..210).await;
        hear(&other, 200..210).await;
        assert_eq!(channel.positions(), other.positions());
    })
    .await;
}

/// Both, at the same time, and the broker as well.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_everything_an_old_member_gets_what_it_missed() {
    let Some(mut broker) = Broker::keeping() else {
        return;
    };
    bounded(async {
        let (one, two) = (node(&broker, bounds()).await, node(&broker, bounds()).await);
        let at = left(&one, &two, 0..10).await;
        say(&one, 10..1000);
        read(&two, 1000).await;
        drop((one, two));
        broker.kill();
        broker.restart();
        let (one, two) = (node(&broker, bounds()).await, node(&broker, bounds()).await);
        for (server, last) in [(&one, 1001), (&two, 1002)] {
            // It is let in before or after the node has read the log.
            let (_socket, channel) = join(server, &at).await;
            hear(&channel, 10..1000).await;
            say(server, last - 1..last);
            hear(&channel, 1000..last).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_beyond_the_bounds_is_a_gap_with_first_last_and_count() {
    let Some(broker) = Broker::keeping() else {
        return;
    };
    bounded(async {
        // More than the least that a stream keeps, so that it is the stream that drops.
        let few = History {
            messages: 1100,
            ..bounds()
        };
        let one = node(&broker, few).await;
        let at = left(&one, &one, 0..1).await;
        say(&one, 1..3000);
        read(&one, 3000).await;
        let two = node(&broker, few).await;
        for server in [&one, &two] {
            let (_socket, channel) = join(server, &at).await;
            let Seen::Gap(lost, Some(missing)) = next(&channel).await else {
                panic!("a gap first");
            };
            assert_eq!((lost, missing.from, missing.to), (1899, 2, 1900));
            assert_eq!(missing.why, Why::Gone);
            hear(&channel, 1900..3000).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_while_the_broker_pauses_or_restarts_comes_afterwards() {
    let Some(mut broker) = Broker::keeping() else {
        return;
    };
    bounded(async {
        let (one, two) = (node(&broker, bounds()).await, node(&broker, bounds()).await);
        let (_here, here) = member(&one).await;
        let (_there, there) = member(&two).await;
        let mut said = 0;
        for restart in [false, true, true] {
            say(&one, said..said + 300);
            match restart {
                false => broker.signal(Signal::STOP),
                true => broker.kill(),
            }
            say(&one, said + 300..said + 600);
            reaches(&one, ClusterState::Degraded).await;
            say(&one, said + 600..said + 900);
            match restart {
                false => broker.signal(Signal::CONT),
                true => broker.restart(),
            }
            hear(&here, said..said + 900).await;
            hear(&there, said..said + 900).await;
            reaches(&one, ClusterState::Connected).await;
            said += 900;
        }
        assert_eq!(here.positions(), there.positions());
        assert_eq!(one.metrics().cluster_lost, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_place_in_the_queue_is_a_gap_of_so_many() {
    let Some(mut broker) = Broker::keeping() else {
        return;
    };
    bounded(async {
        let (one, two) = (node(&broker, bounds()).await, node(&broker, bounds()).await);
        let (_here, here) = member(&one).await;
        let (_there, there) = member(&two).await;
        say(&one, 0..1);
        hear(&here, 0..1).await;
        hear(&there, 0..1).await;
        broker.kill();
        reaches(&one, ClusterState::Degraded).await;
        let (mut queued, mut lost) = (0, 0);
        for number in 1..9001 {
            let sent = one.rooms().to(ROOM).send("n", &number).expect("sound");
            queued += sent.delivered;
            lost += sent.dropped;
        }
        assert_eq!((queued, lost), (8192, 808));
        broker.restart();
        for channel in [&here, &there] {
            hear(channel, 1..8193).await;
            assert_eq!(next(channel).await, Seen::Gap(808, None));
        }
        say(&one, 9001..9002);
        hear(&there, 9001..9002).await;
    })
    .await;
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for entry in fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        match entry.file_type().expect("known").is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).expect("copied")),
        }
    }
}

/// A broker that comes back with less than it had acknowledged, or with nothing, is not taken for one that kept it.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_lost_what_it_had_begins_a_new_epoch() {
    let Some(mut broker) = Broker::keeping() else {
        return;
    };
    bounded(async {
        let one = node(&broker, bounds()).await;
        let (_socket, channel) = member(&one).await;
        let epoch = || one.rooms().position(ROOM).expect("a history").epoch;
        let mut said = 0;
        for nothing in [false, true] {
            say(&one, said..said + 10);
            hear(&channel, said..said + 10).await;
            let before = epoch();
            broker.kill();
            let old = tempfile::tempdir().expect("a directory");
            if !nothing {
                copy(broker.store(), old.path());
            }
            broker.restart();
            say(&one, said + 10..said + 20);
            hear(&channel, said + 10..said + 20).await;
            let at = channel.positions();
            broker.kill();
            fs::remove_dir_all(broker.store()).expect("removed");
            copy(old.path(), broker.store());
            broker.restart();
            let Seen::Gap(0, Some(missing)) = next(&channel).await else {
                panic!("a gap first");
            };
            assert_eq!((missing.why, missing.epoch), (Why::Epoch, epoch()));
            assert_ne!(missing.epoch, before);
            say(&one, said + 20..said + 21);
            hear(&channel, said + 20..said + 21).await;
            let (_late, late) = join(&one, &at).await;
            assert!(matches!(next(&late).await, Seen::Gap(0, Some(missing)) if missing.why == Why::Epoch));
            hear(&late, said + 20..said + 21).await;
            said += 21;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_missed_messages_come_from_a_node_that_began_anew() {
    let Some(broker) = Broker::keeping() else {
        return;
    };
    bounded(async {
        let one = node(&broker, bounds()).await;
        let at = left(&one, &one, 0..1).await;
        for part in 0..MANY / 1000 {
            say(&one, 1 + 1000 * part..1 + 1000 * (part + 1));
            read(&one, 1 + 1000 * (part + 1)).await;
        }
        drop(one);
        let begun = Instant::now();
        let two = node(&broker, bounds()).await;
        let (_socket, channel) = join(&two, &at).await;
        hear(&channel, 1..MANY + 1).await;
        let cold = begun.elapsed();
        let begun = Instant::now();
        let (_socket, channel) = join(&two, &at).await;
        hear(&channel, 1..MANY + 1).await;
        let warm = begun.elapsed();
        println!("{MANY} missed messages: {cold:?} from the broker, {warm:?} from the node's copy");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_jetstream_is_refused_at_start() {
    let Some(broker) = Broker::start("2MB") else {
        return;
    };
    bounded(async {
        let nats = Nats::options().keep_histories(1);
        let error = nats.connect(&broker.url()).await.expect_err("no JetStream");
        assert!(matches!(error, NatsError::JetStream(_)), "{error:?}");
    })
    .await;
}
