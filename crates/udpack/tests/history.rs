//! Rooms with a history: members that were away, or are slow, get what they missed once and in order, or are told
//! exactly what is gone.

mod common;
#[path = "common/seen.rs"]
mod seen;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{client, reconnect, server, timeouts};
use seen::{ROOM, Seen, next as heard, see};
use udpack::testing::Net;
use udpack::{
    Channel, Drain, History, Identity, Limits, Missing, Overflow, Position, RecvError,
    RoomPosition, Server, ServerBuilder, Socket, SocketState, Start, Subscription, Timeouts, Why,
};

const MANY: u64 = 10_000;

/// Nothing here takes longer than this, on the paused clock.
async fn bounded<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(3600), future)
        .await
        .expect("it ends")
}

/// Sessions that are soon forgotten.
fn hasty() -> Timeouts {
    Timeouts {
        resume: Duration::from_secs(1),
        ..timeouts()
    }
}

fn large() -> History {
    History {
        messages: 2 * MANY as usize,
        bytes: 64 << 20,
        age: Duration::from_secs(3600),
    }
}

/// A server whose `chat` channels join the room.
fn hall() -> ServerBuilder {
    server()
        .timeouts(hasty())
        .channel("chat", |channel: Channel| async move {
            channel.join(ROOM).expect("a sound room");
            while let Ok(Some(_)) = channel.recv().await {}
        })
}

async fn bind(net: &Net, history: History) -> Server {
    let server = net.bind(hall()).await.expect("an address");
    server.rooms().history(ROOM, history).expect("a sound room");
    server
}

/// A server with an identity that another one can have after it.
async fn known(net: &Net) -> (Server, Identity) {
    let identity = Identity::generate().expect("a key");
    let server = net.bind(hall().identity(identity.clone())).await;
    (server.expect("an address"), identity)
}

/// The server is gone at once, and another one has its address and identity.
async fn restarted(net: &Net, victim: &Server, identity: Identity) -> Server {
    let address = victim.local_addr();
    net.take_down(victim);
    let server = net.bind_at(hall().identity(identity), address).await;
    server.expect("free")
}

async fn connect(net: &Net, server: &Server) -> Socket {
    let builder = client(server).timeouts(timeouts()).reconnect(reconnect());
    net.connect(builder, server).await.expect("let in")
}

async fn subscribe(socket: &Socket) -> Subscription {
    let subscribed = socket.channel("chat").subscribe().await;
    subscribed.expect("a channel")
}

/// Sends this number to the room.
fn say(server: &Server, number: u64) {
    seen::say(server, number..number + 1);
}

/// Waits until somebody, or nobody, is in the room.
async fn members(server: &Server, count: usize) {
    while server.rooms().members(ROOM).len() != count {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn next(member: &mut Subscription) -> Seen {
    see(&member.recv().await.expect("alive").expect("a message"))
}

/// Everything up to the number `last`.
async fn until(member: &mut Subscription, last: u64) -> Vec<Seen> {
    let mut seen = Vec::new();
    while seen.last() != Some(&Seen::Number(last)) {
        seen.push(next(member).await);
    }
    seen
}

/// A member that has had the number 0.
async fn first_message(socket: &Socket, server: &Server) -> Subscription {
    let mut member = subscribe(socket).await;
    members(server, 1).await;
    say(server, 0);
    assert_eq!(next(&mut member).await, Seen::Number(0));
    member
}

fn numbers(range: std::ops::Range<u64>) -> Vec<Seen> {
    range.map(Seen::Number).collect()
}

fn at(epoch: u64, offset: u64) -> RoomPosition {
    RoomPosition {
        room: ROOM.to_owned(),
        epoch,
        offset,
    }
}

fn epoch(server: &Server) -> u64 {
    server.rooms().position(ROOM).expect("a history").epoch
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_messages_come_once_and_in_order_through_cuts_and_lost_sessions() {
    bounded(async {
        let net = Net::new(51).delay(Duration::from_millis(20)).loss(0.01);
        let server = bind(&net, large()).await;
        let socket = connect(&net, &server).await;
        let lost = Arc::new(AtomicU64::new(0));
        let mut states = socket.states();
        let count = lost.clone();
        tokio::spawn(async move {
            while let Some(state) = states.next().await {
                if matches!(state, SocketState::Connected { resumed: false, .. }) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let mut member = subscribe(&socket).await;
        members(&server, 1).await;
        let cuts = async {
            for cut in 0..12_u64 {
                tokio::time::sleep(Duration::from_millis(1700 + 130 * cut)).await;
                // Shorter and longer than the session is kept.
                let away = if cut % 3 == 0 { 5 } else { 20 };
                net.cut_client_for(&socket, Duration::from_secs(away));
                tokio::time::sleep(Duration::from_secs(away)).await;
            }
        };
        let talk = async {
            for number in 0..MANY {
                say(&server, number);
                if number % 7 == 0 {
                    tokio::time::sleep(Duration::from_millis(150)).await;
                }
            }
        };
        let (seen, (), ()) = tokio::join!(until(&mut member, MANY - 1), talk, cuts);
        assert!(lost.load(Ordering::Relaxed) > 3, "sessions were lost");
        assert!(seen == numbers(0..MANY), "each once, in order");
        assert_eq!(member.positions(), [at(epoch(&server), MANY)]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_presents_its_position_gets_what_it_missed_and_goes_on() {
    bounded(async {
        let net = Net::new(52).delay(Duration::from_millis(5));
        let server = bind(&net, large()).await;
        let socket = connect(&net, &server).await;
        let first = socket.open("chat").await.expect("a channel");
        members(&server, 1).await;
        for number in 0..10 {
            say(&server, number);
        }
        for number in 0..4 {
            assert_eq!(heard(&first).await, Seen::Number(number));
        }
        let positions = first.positions();
        assert_eq!(positions, [at(epoch(&server), 4)]);
        drop(first);
        members(&server, 0).await;
        for number in 10..20 {
            say(&server, number);
        }
        let request = socket.channel("chat").since(positions);
        let second = request.open().await.expect("a channel");
        // What was presented counts until the server has said where the member is.
        assert_eq!(second.positions(), [at(epoch(&server), 4)]);
        members(&server, 1).await;
        say(&server, 20);
        for number in 4..=20 {
            assert_eq!(heard(&second).await, Seen::Number(number));
        }
        assert_eq!(second.positions(), [at(epoch(&server), 21)]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_is_beyond_the_bounds_is_a_gap_with_first_last_and_count() {
    bounded(async {
        let by_count = History {
            messages: 100,
            ..large()
        };
        // A number has 3 bytes, its frame 7 more, its place in the log 96.
        let by_bytes = History {
            bytes: 100 * 106,
            ..large()
        };
        let by_age = History {
            age: Duration::from_millis(49_500),
            ..large()
        };
        for (history, apart) in [(by_count, 0), (by_bytes, 0), (by_age, 500)] {
            let net = Net::new(53).delay(Duration::from_millis(5));
            let server = bind(&net, history).await;
            let socket = connect(&net, &server).await;
            let mut member = subscribe(&socket).await;
            members(&server, 1).await;
            say(&server, 0);
            assert_eq!(next(&mut member).await, Seen::Number(0));
            net.cut_client(&socket);
            members(&server, 0).await;
            for number in 1..=1000 {
                say(&server, number);
                if number < 1000 {
                    tokio::time::sleep(Duration::from_millis(apart)).await;
                }
            }
            if apart > 0 {
                // Those that are too old by the time it joins are gone as well.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            net.mend_client(&socket);
            let Seen::Gap(lost, Some(missing)) = next(&mut member).await else {
                panic!("a gap first");
            };
            assert_eq!((missing.epoch, missing.from), (epoch(&server), 2));
            assert_eq!(lost, missing.to - missing.from + 1);
            assert_eq!(missing.why, Why::Gone);
            let kept = 1001 - missing.to;
            assert!(apart > 0 || kept == 100, "{history:?} keeps {kept}");
            assert!(apart == 0 || (90..100).contains(&kept), "{kept}");
            let rest = until(&mut member, 1000).await;
            assert_eq!(rest, numbers(missing.to..1001));
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn another_epoch_is_told_and_what_it_has_follows() {
    bounded(async {
        let net = Net::new(54).delay(Duration::from_millis(20));
        let (victim, identity) = known(&net).await;
        victim.rooms().history(ROOM, large()).expect("sound");
        let socket = connect(&net, &victim).await;
        let mut member = first_message(&socket, &victim).await;
        let server = restarted(&net, &victim, identity).await;
        let few = History {
            messages: 3,
            ..large()
        };
        server.rooms().history(ROOM, few).expect("sound");
        for number in 1..=5 {
            say(&server, number);
        }
        let missing = Missing {
            epoch: epoch(&server),
            from: 1,
            to: 2,
            why: Why::Epoch,
        };
        assert_eq!(next(&mut member).await, Seen::Gap(2, Some(missing)));
        members(&server, 1).await;
        say(&server, 6);
        assert_eq!(until(&mut member, 6).await, numbers(3..7));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_history_that_was_kept_elsewhere_goes_on_through_a_restart() {
    bounded(async {
        let net = Net::new(61).delay(Duration::from_millis(20));
        let (victim, identity) = known(&net).await;
        assert!(victim.rooms().kept(ROOM).is_none());
        victim.rooms().history(ROOM, large()).expect("sound");
        let socket = connect(&net, &victim).await;
        let mut member = first_message(&socket, &victim).await;
        for number in 1..5 {
            say(&victim, number);
        }
        let (last, kept) = victim.rooms().kept(ROOM).expect("a history");
        assert_eq!((last.offset, kept.len()), (5, 5));
        let server = restarted(&net, &victim, identity).await;
        let few = History {
            messages: 3,
            ..large()
        };
        for impossible in [
            Position { epoch: 0, ..last },
            Position { offset: 4, ..last },
            Position {
                offset: u64::MAX,
                ..last
            },
        ] {
            let restored = server.rooms().restore(ROOM, few, impossible, &kept);
            assert_eq!(restored, Ok(false), "{impossible:?}");
        }
        let restored = server.rooms().restore(ROOM, few, last, &kept);
        assert_eq!(restored, Ok(true));
        let again = server.rooms().restore(ROOM, few, last, &kept);
        assert_eq!(again, Ok(false), "it has one");
        say(&server, 5);
        // Whether those that were on the way when the first server died have come decides what is missing.
        let seen = until(&mut member, 5).await;
        let gap = seen
            .iter()
            .position(|seen| !matches!(seen, Seen::Number(_)));
        let first = match gap {
            Some(at) => {
                let Seen::Gap(lost, Some(missing)) = &seen[at] else {
                    panic!("a gap of positions");
                };
                assert_eq!((missing.epoch, missing.to), (last.epoch, 3));
                assert_eq!((missing.why, missing.from), (Why::Gone, 4 - lost));
                assert_eq!(seen[..at], numbers(1..missing.from - 1));
                (at, 3)
            }
            None => (0, 1),
        };
        let rest = if gap.is_some() { first.0 + 1 } else { 0 };
        assert_eq!(seen[rest..], numbers(first.1..6));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_member_that_moves_to_another_server_goes_on_where_that_has_the_messages() {
    bounded(async {
        let net = Net::new(62).delay(Duration::from_millis(20));
        let first = bind(&net, large()).await;
        let second = net.bind(hall()).await.expect("an address");
        let builder = client(&first)
            .timeouts(timeouts())
            .reconnect(reconnect())
            .fallback(second.local_addr().to_string(), Some(second.fingerprint()));
        let socket = net.connect(builder, &first).await.expect("let in");
        let mut member = subscribe(&socket).await;
        members(&first, 1).await;
        for number in 0..10 {
            say(&first, number);
        }
        let (last, kept) = first.rooms().kept(ROOM).expect("a history");
        let restored = second.rooms().restore(ROOM, large(), last, &kept);
        assert_eq!(restored, Ok(true));
        let drain = Drain::within(Duration::from_secs(20)).spread(Duration::from_secs(4));
        let drained = async {
            first.run_until(async {}, drain).await.expect("drained");
            members(&second, 1).await;
            say(&second, 10);
        };
        let (seen, ()) = tokio::join!(until(&mut member, 10), drained);
        assert_eq!(seen, numbers(0..11));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_room_without_a_history_says_that_it_has_none() {
    bounded(async {
        let net = Net::new(55);
        let server = bind(&net, large()).await;
        server.rooms().history(ROOM, None).expect("sound");
        assert_eq!(server.rooms().position(ROOM), None);
        let socket = connect(&net, &server).await;
        let request = socket.channel("chat").since([at(7, 3)]);
        let channel = request.open().await.expect("a channel");
        let missing = Missing {
            epoch: 0,
            from: 1,
            to: 0,
            why: Why::Epoch,
        };
        assert_eq!(heard(&channel).await, Seen::Gap(0, Some(missing)));
        members(&server, 1).await;
        say(&server, 1);
        assert_eq!(heard(&channel).await, Seen::Number(1));
        let raw = socket.open("chat").await.expect("a channel");
        members(&server, 2).await;
        say(&server, 2);
        assert_eq!(heard(&raw).await, Seen::Number(2));
        assert_eq!(raw.positions(), []);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn positions_that_were_never_told_are_those_of_another_history() {
    bounded(async {
        let net = Net::new(56);
        let server = bind(&net, large()).await;
        for number in 0..3 {
            say(&server, number);
        }
        let epoch = epoch(&server);
        let socket = connect(&net, &server).await;
        let missing = Missing {
            epoch,
            from: 1,
            to: 0,
            why: Why::Epoch,
        };
        for hostile in [
            at(epoch, 4),
            at(epoch, u64::MAX),
            at(epoch ^ 1, 1),
            at(u64::MAX, u64::MAX),
            at(0, 0),
        ] {
            let request = socket.channel("chat").since([hostile]);
            let channel = request.open().await.expect("a channel");
            assert_eq!(heard(&channel).await, Seen::Gap(0, Some(missing)));
            for number in 0..3 {
                assert_eq!(heard(&channel).await, Seen::Number(number));
            }
        }
        // The same room twice, and rooms that it is not taken into.
        let other = RoomPosition {
            room: "other".to_owned(),
            ..at(epoch, 1)
        };
        let request = socket.channel("chat");
        let request = request.since([at(epoch, 2), other, at(epoch, 1)]);
        let channel = request.open().await.expect("a channel");
        assert_eq!(heard(&channel).await, Seen::Number(2));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_server_may_choose_where_a_member_begins() {
    bounded(async {
        let net = Net::new(57);
        let builder = server().channel("chat", |channel: Channel| async move {
            let start = match channel.meta::<u64>() {
                Ok(Some(0)) => Start::Oldest,
                Ok(Some(offset)) => {
                    let rooms = channel.rooms_handle().expect("a server's");
                    let Position { epoch, .. } = rooms.position(ROOM).expect("a history");
                    Start::Since(Position { epoch, offset })
                }
                _ => Start::Now,
            };
            channel.join_at(ROOM, start).expect("sound");
            while let Ok(Some(_)) = channel.recv().await {}
        });
        let server = net.bind(builder).await.expect("an address");
        server.rooms().history(ROOM, large()).expect("sound");
        for number in 0..5 {
            say(&server, number);
        }
        let socket = connect(&net, &server).await;
        let since = [at(epoch(&server), 1)];
        let mut channels = Vec::new();
        for meta in [0, 3] {
            let request = socket.channel("chat").since(since.clone());
            channels.push(request.meta(&meta).open().await.expect("a channel"));
        }
        let request = socket.channel("chat").since(since);
        channels.push(request.open().await.expect("a channel"));
        members(&server, 3).await;
        say(&server, 5);
        for (channel, first) in channels.iter().zip([0, 3, 5]) {
            for number in first..=5 {
                assert_eq!(heard(channel).await, Seen::Number(number));
            }
        }
    })
    .await;
}

/// A member with a queue of a few messages that reads nothing while `MANY` are sent.
async fn slow(policy: Option<Overflow>) -> (Server, Channel, Socket) {
    let net = Net::new(58).delay(Duration::from_millis(5));
    let limits = Limits {
        outbound_messages: 64,
        stream_window: 16 << 10,
        ..Limits::default()
    };
    let server = net.bind(hall().limits(limits.clone())).await;
    let server = server.expect("an address");
    server.rooms().history(ROOM, large()).expect("sound");
    if let Some(policy) = policy {
        server.rooms().policy(ROOM, policy).expect("sound");
    }
    let socket = net.connect(client(&server).limits(limits), &server).await;
    let socket = socket.expect("let in");
    let channel = socket.open("chat").await.expect("a channel");
    members(&server, 1).await;
    for number in 0..MANY {
        say(&server, number);
        if number % 500 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    (server, channel, socket)
}

#[tokio::test(start_paused = true)]
async fn a_slow_member_gets_from_the_history_what_its_queue_had_no_room_for() {
    bounded(async {
        for policy in [None, Some(Overflow::Recover)] {
            let (server, channel, _socket) = slow(policy).await;
            for number in 0..MANY {
                assert_eq!(heard(&channel).await, Seen::Number(number));
                if number == MANY / 2 {
                    // What comes while it catches up, comes behind.
                    say(&server, MANY);
                }
            }
            assert_eq!(heard(&channel).await, Seen::Number(MANY));
            assert_eq!(server.rooms().dropped(), 0);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn other_policies_drop_in_a_room_with_a_history_as_well() {
    bounded(async {
        for policy in [
            Overflow::default(),
            Overflow::DropOldest { messages: 50 },
            Overflow::LatestOnly,
            Overflow::DropNewest,
        ] {
            let (server, channel, _socket) = slow(Some(policy)).await;
            say(&server, MANY);
            let (mut expected, mut lost_in_all) = (0, 0);
            loop {
                match heard(&channel).await {
                    Seen::Number(number) => {
                        assert_eq!(number, expected, "{policy:?}");
                        expected += 1;
                    }
                    Seen::Gap(lost, missing) => {
                        let missing = missing.expect("of positions");
                        assert_eq!(missing.from, expected + 1, "{policy:?}");
                        assert_eq!(missing.to, expected + lost, "{policy:?}");
                        assert_eq!(missing.why, Why::Slow);
                        expected += lost;
                        lost_in_all += lost;
                    }
                }
                let position = at(epoch(&server), expected);
                assert_eq!(channel.positions(), [position], "{policy:?}");
                if expected == MANY + 1 {
                    break;
                }
            }
            assert!(lost_in_all > 1000, "{policy:?} lost {lost_in_all}");
            assert_eq!(server.rooms().dropped(), lost_in_all, "{policy:?}");
        }
        let (_server, channel, _socket) = slow(Some(Overflow::Disconnect)).await;
        let end = loop {
            match channel.recv().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("closed with a code"),
                Err(RecvError::Closed(reason)) => break reason,
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(end.code, udpack::CloseCode::SLOW_PEER);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn who_is_left_out_is_left_out_when_it_catches_up_as_well() {
    bounded(async {
        let net = Net::new(59);
        let server = bind(&net, large()).await;
        let socket = connect(&net, &server).await;
        let channel = socket.open("chat").await.expect("a channel");
        members(&server, 1).await;
        let session = socket.id();
        for number in 0..4_u64 {
            let room = server.rooms().to(ROOM);
            let room = if number % 2 == 1 {
                room.except(&session)
            } else {
                room
            };
            room.send("n", &number).expect("sound");
        }
        assert_eq!(heard(&channel).await, Seen::Number(0));
        assert_eq!(heard(&channel).await, Seen::Number(2));
        let positions = channel.positions();
        let request = socket.channel("chat").since(positions);
        let second = request.open().await.expect("a channel");
        members(&server, 2).await;
        say(&server, 4);
        assert_eq!(heard(&channel).await, Seen::Number(4));
        assert_eq!(heard(&second).await, Seen::Number(4));
        assert_eq!(second.positions(), [at(epoch(&server), 5)]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_was_sent_before_it_left_still_arrives() {
    bounded(async {
        let (server, channel, _socket) = slow(None).await;
        assert_eq!(server.rooms().leave(ROOM), 1);
        say(&server, MANY);
        for number in 0..MANY {
            assert_eq!(heard(&channel).await, Seen::Number(number));
        }
        let theirs = server.rooms().to_channels("chat").send("n", &7);
        assert_eq!(theirs.expect("sound").delivered, 1);
        assert_eq!(heard(&channel).await, Seen::Number(7));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_history_that_begins_later_begins_with_the_next_message() {
    bounded(async {
        let net = Net::new(60);
        let server = net.bind(hall()).await.expect("an address");
        let socket = connect(&net, &server).await;
        let channel = socket.open("chat").await.expect("a channel");
        members(&server, 1).await;
        say(&server, 0);
        server.rooms().history(ROOM, large()).expect("sound");
        say(&server, 1);
        server.rooms().history(ROOM, None).expect("sound");
        say(&server, 2);
        assert_eq!(server.rooms().history_bytes(), 0);
        for number in 0..3 {
            assert_eq!(heard(&channel).await, Seen::Number(number));
        }
        assert_eq!(channel.positions()[0].offset, 1);
    })
    .await;
}
