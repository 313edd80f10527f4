//! Rooms: the same bytes to everybody, nobody waits for the slowest, and who lost something is told what.

#[allow(dead_code, reason = "the hostile tests use the rest")]
#[path = "hostile/bare.rs"]
mod bare;
mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bare::{Bare, Ended, Stream, Value, event, map};
use common::{TOKEN, bind, bounded, client, connect, path, server};
use tokio::sync::{Notify, mpsc};
use udpack::wire::{Decode, Mark, Welcome};
use udpack::{
    Channel, CloseCode, JoinError, Limits, Message, Overflow, Reconnect, Sent, Server,
    ServerBuilder, Socket, SocketState, Timeouts,
};

/// A server whose `chat` channels join the room `hall` and are handed to the test.
async fn hall(builder: ServerBuilder) -> (Server, mpsc::UnboundedReceiver<Channel>) {
    let (seen, channels) = mpsc::unbounded_channel();
    let builder = builder.channel("chat", move |channel: Channel| {
        let seen = seen.clone();
        async move {
            channel.join("hall").expect("a sound room");
            let _ = seen.send(channel.clone());
            let _ = channel.send("joined", &()).await;
            // Until the peer finishes, or for good.
            while let Ok(Some(_)) = channel.recv().await {}
        }
    });
    (bind(builder).await, channels)
}

/// Opens a channel and waits until it has joined.
async fn join(socket: &Socket) -> Channel {
    let channel = socket.open("chat").await.expect("a channel");
    let joined = channel.recv().await.expect("alive").expect("a message");
    assert_eq!(joined.event(), "joined");
    channel
}

async fn next(channel: &Channel) -> Message {
    channel.recv().await.expect("alive").expect("a message")
}

fn number(message: &Message) -> u64 {
    message.data::<(u64, &str)>().expect("a number").0
}

/// Whose queues are full soon.
fn shallow() -> Limits {
    Limits {
        outbound_messages: 16,
        replay_messages: 16,
        ..Limits::default()
    }
}

/// A peer that takes little unless it reads.
async fn narrow(server: &Server) -> Socket {
    let limits = Limits {
        stream_window: 64 << 10,
        connection_window: 64 << 10,
        ..Limits::default()
    };
    client(server)
        .limits(limits)
        .connect(&server.local_addr().to_string())
        .await
        .expect("let in")
}

#[tokio::test]
async fn all_members_of_a_large_room_hear_everything_in_order() {
    let (server, _channels) = hall(server()).await;
    let mut members = Vec::new();
    for _ in 0..40 {
        let socket = connect(&server).await;
        members.push((join(&socket).await, socket));
    }
    for nth in 0..10_u64 {
        let sent = server.rooms().to("hall").send("say", &(nth, ""));
        assert_eq!(sent.expect("a sound event").delivered, 40);
    }
    for (channel, _socket) in &members {
        for nth in 0..10 {
            assert_eq!(number(&bounded(next(channel)).await), nth);
        }
    }
}

/// Sends `count` numbered messages of 16 KiB to the room.
fn burst(server: &Server, count: u64) -> Sent {
    let text = "x".repeat(16 << 10);
    let mut all = Sent::default();
    for n in 0..count {
        let sent = server.rooms().to("hall").send("line", &(n, &text));
        let sent = sent.expect("a sound message");
        all.delivered += sent.delivered;
        all.dropped += sent.dropped;
    }
    all
}

/// Reads numbered messages until `last` has come or the room's `total` are accounted for; gaps must fill what is
/// missing exactly. Gives the numbers and the gaps, each gap with the number that should have come there.
async fn account(channel: &Channel, total: u64) -> (Vec<u64>, Vec<(u64, u64)>) {
    let (mut got, mut gaps, mut expected) = (Vec::new(), Vec::new(), 0);
    while expected < total {
        let message = next(channel).await;
        if let Some(gap) = message.gap() {
            assert_eq!(gap.room, "hall");
            gaps.push((expected, gap.lost));
            expected += gap.lost;
        } else {
            assert_eq!(number(&message), expected, "no loss without a gap");
            got.push(expected);
            expected += 1;
        }
    }
    assert_eq!(expected, total, "no gap tells too much");
    (got, gaps)
}

#[tokio::test]
async fn every_member_gets_the_same_bytes_except_who_is_left_out() {
    bounded(async {
        let (server, mut _channels) = hall(server()).await;
        let sockets = [
            connect(&server).await,
            connect(&server).await,
            connect(&server).await,
        ];
        let mut channels = Vec::new();
        for socket in &sockets {
            channels.push(join(socket).await);
            channels.push(join(socket).await);
        }
        let rooms = server.rooms();
        let mut members: Vec<_> = rooms.members("hall").into_iter().collect();
        assert_eq!(members.len(), 6);
        let member = members.pop().expect("six");
        assert_eq!(member.name(), "chat");
        assert_eq!(
            member.peer().map(|peer| peer.id().to_owned()),
            Some("tester".to_owned())
        );
        let data = ("a line", 7_u8);
        let sent = rooms
            .to("hall")
            .except(&sockets[1].id())
            .send("line", &data);
        let expected = Sent {
            delivered: 4,
            dropped: 0,
        };
        assert_eq!(sent.expect("sound"), expected);
        let sent = rooms.to("hall").send("end", &()).expect("sound");
        assert_eq!(sent.delivered, 6);
        let mut raw = Vec::new();
        for (i, channel) in channels.iter().enumerate() {
            let mut message = next(channel).await;
            if i / 2 != 1 {
                assert_eq!(message.event(), "line");
                raw.push(message.raw());
                message = next(channel).await;
            }
            assert_eq!(message.event(), "end");
        }
        assert!(raw.windows(2).all(|two| two[0] == two[1]));
        assert_eq!(
            rooms.to("nobody").send("x", &()).expect("sound").delivered,
            0
        );
        assert!(rooms.to("hall").send("$gap", &()).is_err());
        assert_eq!(
            rooms
                .to_channels("chat")
                .send("x", &())
                .expect("sound")
                .delivered,
            6
        );
        assert_eq!(
            rooms
                .to_channels("other")
                .send("x", &())
                .expect("sound")
                .delivered,
            0
        );
        assert_eq!(rooms.to_all().send("x", &()).expect("sound").delivered, 6);
    })
    .await;
}

/// What comes alone is written by who sends it to the room, what comes in a row by the channel's writer.
#[tokio::test]
async fn what_comes_alone_and_what_comes_in_a_row_keep_their_order() {
    bounded(async {
        let (server, mut _channels) = hall(server()).await;
        let sockets = [connect(&server).await, connect(&server).await];
        let mut channels = [join(&sockets[0]).await, join(&sockets[1]).await];
        let (mut sent, mut got) = (0, 0);
        for row in [1, 1, 40, 1, 300, 2, 1, 7, 1] {
            for _ in 0..row {
                let message = (sent, "a line");
                let all = server.rooms().to("hall").send("line", &message);
                assert_eq!(all.expect("sound").delivered, 2);
                sent += 1;
            }
            // Until the writers have nothing to do.
            while got < sent {
                for channel in &mut channels {
                    assert_eq!(number(&next(channel).await), got);
                }
                got += 1;
            }
        }
        let counted = server.metrics();
        assert_eq!(counted.room_sent, 2 * sent);
    })
    .await;
}

#[tokio::test]
async fn the_oldest_give_way_and_the_gap_says_how_many() {
    bounded(async {
        let (server, _channels) = hall(server().limits(shallow())).await;
        let channel = join(&narrow(&server).await).await;
        let policy = Overflow::DropOldest { messages: 5 };
        server.rooms().policy("hall", policy).expect("a room");
        let sent = burst(&server, 200);
        assert_eq!(sent.delivered, 200, "each was on its way once");
        let (got, gaps) = account(&channel, 200).await;
        assert_eq!(gaps, [(195 - sent.dropped, sent.dropped)], "one gap");
        assert!(got.ends_with(&[195, 196, 197, 198, 199]));
        assert_eq!(server.rooms().dropped(), sent.dropped);
        assert!(sent.dropped > 100);
    })
    .await;
}

#[tokio::test]
async fn the_newest_are_lost_and_the_gap_comes_without_another_message() {
    bounded(async {
        let (server, _channels) = hall(server().limits(shallow())).await;
        let channel = join(&narrow(&server).await).await;
        server
            .rooms()
            .policy("hall", Overflow::DropNewest)
            .expect("a room");
        let sent = burst(&server, 200);
        assert_eq!(sent.delivered + sent.dropped, 200);
        let (got, gaps) = account(&channel, 200).await;
        assert_eq!(got.len() as u64, sent.delivered);
        assert_eq!(gaps, [(sent.delivered, sent.dropped)]);
    })
    .await;
}

#[tokio::test]
async fn only_the_latest_waits() {
    bounded(async {
        let (server, _channels) = hall(server().limits(shallow())).await;
        let channel = join(&narrow(&server).await).await;
        server
            .rooms()
            .policy("hall", Overflow::LatestOnly)
            .expect("a room");
        let sent = burst(&server, 200);
        let (got, gaps) = account(&channel, 200).await;
        assert_eq!(gaps, [(199 - sent.dropped, sent.dropped)]);
        assert_eq!(got.last(), Some(&199));
    })
    .await;
}

#[tokio::test]
async fn who_is_too_slow_is_closed_if_the_room_says_so() {
    bounded(async {
        let (server, mut channels) = hall(server().limits(shallow())).await;
        let socket = narrow(&server).await;
        let channel = join(&socket).await;
        let there = channels.recv().await.expect("a channel");
        server
            .rooms()
            .policy("hall", Overflow::Disconnect)
            .expect("a room");
        let sent = burst(&server, 200);
        assert_eq!(sent.dropped, 1, "the one that found no room");
        assert_eq!(
            there.close_reason().expect("closed").code,
            CloseCode::SLOW_PEER
        );
        assert!(server.rooms().members("hall").is_empty());
        let reason = loop {
            match channel.recv().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("closed without a reason"),
                Err(error) => break error.reason().clone(),
            }
        };
        assert_eq!(reason.code, CloseCode::SLOW_PEER);
    })
    .await;
}

#[tokio::test]
async fn a_message_too_large_for_one_member_is_that_members_gap() {
    bounded(async {
        let (server, _channels) = hall(server()).await;
        let limits = Limits {
            frame: 4 << 10,
            ..Limits::default()
        };
        let small = client(&server).limits(limits);
        let small = small.connect(&server.local_addr().to_string()).await;
        let small = join(&small.expect("let in")).await;
        let large = join(&connect(&server).await).await;
        let sent = burst(&server, 1);
        assert_eq!((sent.delivered, sent.dropped), (1, 1));
        let (got, gaps) = account(&small, 1).await;
        assert_eq!((got, gaps), (vec![], vec![(0, 1)]));
        assert_eq!(account(&large, 1).await.0, [0]);
    })
    .await;
}

#[tokio::test]
async fn what_is_sent_directly_neither_overtakes_nor_starves() {
    bounded(async {
        let (server, mut channels) = hall(server().limits(shallow())).await;
        let channel = join(&narrow(&server).await).await;
        let there = channels.recv().await.expect("a channel");
        let policy = Overflow::DropOldest { messages: 4 };
        server.rooms().policy("hall", policy).expect("a room");
        let text = "x".repeat(8 << 10);
        let flood = async {
            let rooms = server.rooms();
            loop {
                rooms.to("hall").send("noise", &text).expect("sound");
                tokio::task::yield_now().await;
            }
        };
        let direct = async {
            for n in 0..300_u64 {
                if n % 10 == 0 {
                    there.send("line", &(n, "direct")).await.expect("alive");
                } else {
                    let sent = server.rooms().to("hall").send("line", &(n, &text));
                    sent.expect("sound");
                }
            }
        };
        let read = async {
            let (mut last, mut direct) = (None, 0);
            while direct < 30 {
                let message = next(&channel).await;
                if message.event() == "line" {
                    let (n, what) = message.data::<(u64, &str)>().expect("a line");
                    assert!(last.is_none_or(|last| last < n), "{n} after {last:?}");
                    last = Some(n);
                    direct += u64::from(what == "direct");
                }
            }
        };
        tokio::select! {
            () = flood => {}
            ((), ()) = async { tokio::join!(direct, read) } => {}
        }
    })
    .await;
}

#[tokio::test]
async fn members_come_and_go_with_their_channels() {
    bounded(async {
        let (server, mut channels) = hall(server()).await;
        let rooms = server.rooms();
        let socket = connect(&server).await;
        let (a, b) = (join(&socket).await, join(&socket).await);
        let (there_a, there_b) = (channels.recv().await, channels.recv().await);
        let (there_a, there_b) = (there_a.expect("a channel"), there_b.expect("a channel"));
        assert_eq!(there_a.rooms(), ["hall"]);
        there_a.join("hall").expect("twice is once");
        there_a.join("attic").expect("a second room");
        assert_eq!(there_a.rooms(), ["attic", "hall"]);
        assert!(there_a.leave("hall"));
        assert!(!there_a.leave("hall"));
        assert_eq!(rooms.members("hall").len(), 1);
        assert_eq!(rooms.to("hall").send("x", &()).expect("sound").delivered, 1);
        assert_eq!(
            rooms.to("attic").send("y", &()).expect("sound").delivered,
            1
        );
        assert_eq!(next(&a).await.event(), "y");
        assert_eq!(next(&b).await.event(), "x");

        // The last handle at the server goes, then the other peer's.
        there_a.close(CloseCode::NORMAL, "").await;
        assert_eq!(there_a.join("hall"), Err(JoinError::Closed));
        assert!(rooms.members("attic").is_empty());
        assert_eq!(rooms.names(), ["hall"]);
        drop(there_b);
        drop(b);
        while !rooms.members("hall").is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(rooms.names().is_empty());
        assert_eq!(rooms.to_all().send("x", &()).expect("sound").delivered, 0);
        assert_eq!(a.join("hall"), Err(JoinError::Client));
        assert!(a.rooms_handle().is_none() && a.rooms().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_lost_connection_takes_its_members_along() {
    bounded(async {
        let (server, _channels) = hall(server()).await;
        let socket = connect(&server).await;
        let _channel = join(&socket).await;
        socket.abort(CloseCode::NORMAL, "gone");
        while !server.rooms().names().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn rooms_are_bounded() {
    bounded(async {
        let limits = Limits {
            rooms: 3,
            rooms_per_channel: 2,
            ..Limits::default()
        };
        let (server, mut channels) = hall(server().limits(limits)).await;
        let socket = connect(&server).await;
        let (_a, _b) = (join(&socket).await, join(&socket).await);
        let (a, b) = (channels.recv().await, channels.recv().await);
        let (a, b) = (a.expect("a channel"), b.expect("a channel"));
        a.join("1").expect("the second");
        assert_eq!(a.join("2"), Err(JoinError::TooManyJoined(2)));
        assert_eq!(
            a.join("2").expect_err("full").to_string(),
            "the channel is in 2 rooms already"
        );
        b.join("3").expect("the third of all");
        assert!(b.leave("hall"));
        assert_eq!(b.join("4"), Err(JoinError::TooManyRooms(3)));
        assert_eq!(
            server.rooms().policy("4", Overflow::LatestOnly),
            Err(JoinError::TooManyRooms(3))
        );
        assert!(b.leave("3"));
        b.join("4").expect("an empty room is gone");
        assert!(matches!(b.join(""), Err(JoinError::Name(_))));
        // A room with a policy of its own stays until it has none.
        server
            .rooms()
            .policy("4", Overflow::LatestOnly)
            .expect("there");
        b.leave("4");
        assert_eq!(server.rooms().names().len(), 3);
        server
            .rooms()
            .policy("4", Overflow::default())
            .expect("there");
        assert_eq!(server.rooms().names().len(), 2);
    })
    .await;
}

#[tokio::test]
async fn a_resumable_member_stays_and_gets_what_it_missed_or_is_told() {
    bounded(async {
        let timeouts = Timeouts {
            idle: Duration::from_secs(1),
            keep_alive: Duration::from_millis(200),
            ..Timeouts::default()
        };
        let builder = server().limits(shallow()).timeouts(timeouts.clone());
        let (server, _channels) = hall(builder).await;
        let policy = Overflow::DropOldest { messages: 8 };
        server.rooms().policy("hall", policy).expect("a room");
        let (address, cut) = path(server.local_addr()).await;
        let socket = client(&server)
            .timeouts(timeouts)
            .reconnect(Reconnect {
                first: Duration::from_millis(50),
                ..Reconnect::default()
            })
            .connect(&address.to_string())
            .await
            .expect("let in");
        let channel = socket.channel("chat").resumable().open().await;
        let channel = channel.expect("a channel");
        assert_eq!(next(&channel).await.event(), "joined");
        let mut states = socket.states();
        // As many as its queue has room for; then more.
        let mut first = 0;
        for count in [10, 100] {
            cut.store(true, Ordering::Relaxed);
            while !matches!(states.next().await, Some(SocketState::Reconnecting { .. })) {}
            let (mut dropped, mut lost, end) = (0, 0, first + count);
            for n in first..end {
                let sent = server.rooms().to("hall").send("line", &(n, "x"));
                let sent = sent.expect("sound");
                assert_eq!(sent.delivered, 1, "it is still a member");
                dropped += sent.dropped;
            }
            cut.store(false, Ordering::Relaxed);
            while first < end {
                let message = next(&channel).await;
                match message.gap() {
                    Some(gap) => {
                        lost += gap.lost;
                        first += gap.lost;
                    }
                    None => {
                        assert_eq!(number(&message), first);
                        first += 1;
                    }
                }
            }
            assert_eq!(lost, dropped);
            assert_eq!(lost > 0, count > 16);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_stuck_member_of_a_thousand_is_nobody_elses_business() {
    const SOCKETS: usize = 20;
    const EACH: usize = 50;
    const ROUNDS: u64 = 10;
    const ROUND: u64 = 20;
    let test = async {
        let limits = Limits {
            outbound_messages: 32,
            channel_rate: 1000,
            ..Limits::default()
        };
        let (server, mut channels) = hall(server().limits(limits)).await;
        let policy = Overflow::DropOldest { messages: 24 };
        server.rooms().policy("hall", policy).expect("a room");
        let (heard, round) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let mut readers = tokio::task::JoinSet::new();
        let mut sockets = Vec::new();
        for _ in 0..SOCKETS {
            let socket = connect(&server).await;
            for _ in 0..EACH {
                let channel = join(&socket).await;
                channels.recv().await.expect("its other end");
                let (heard, round) = (heard.clone(), round.clone());
                readers.spawn(async move {
                    for n in 0..ROUNDS * ROUND {
                        assert_eq!(number(&next(&channel).await), n);
                        if (n + 1) % ROUND == 0
                            && (heard.fetch_add(1, Ordering::AcqRel) + 1) % (SOCKETS * EACH) == 0
                        {
                            round.notify_one();
                        }
                    }
                });
            }
            sockets.push(socket);
        }
        let socket = narrow(&server).await;
        let stuck = join(&socket).await;
        let there = channels.recv().await.expect("its other end");
        assert_eq!(server.rooms().members("hall").len(), SOCKETS * EACH + 1);
        let text = "x".repeat(1 << 10);
        let mut dropped = 0;
        for r in 0..ROUNDS {
            for n in 0..ROUND {
                let line = (r * ROUND + n, &text);
                let sent = server
                    .rooms()
                    .to("hall")
                    .send("line", &line)
                    .expect("sound");
                assert_eq!(sent.delivered, (SOCKETS * EACH) as u64 + 1);
                dropped += sent.dropped;
                assert!(there.queued_bytes() <= 34 << 10, "one full queue");
            }
            round.notified().await;
        }
        while let Some(read) = readers.join_next().await {
            read.expect("everything, in order");
        }
        assert!(dropped > 0, "the stuck one lost something");
        let (got, gaps) = account(&stuck, ROUNDS * ROUND).await;
        let lost: u64 = gaps.iter().map(|(_, lost)| lost).sum();
        assert_eq!(lost, dropped, "and was told how much");
        assert!(got.ends_with(&[198, 199]));
        drop(sockets);
    };
    let in_time = tokio::time::timeout(Duration::from_secs(120), test);
    assert!(in_time.await.is_ok(), "in time");
}

/// A client that is written from the document alone, on a channel in the room `hall`; `marks`: it offers to answer them.
async fn bare_member(server: &Server, marks: bool) -> (quinn::Endpoint, Stream, Stream) {
    let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0)));
    let endpoint = endpoint.expect("a free loopback port");
    let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
    let bare = Bare::dial(&endpoint, server.local_addr(), config);
    let bare = bare.await.expect("the handshake is sound");
    let mut control = bare.stream().await;
    let hello = map([
        ("v", Value::Uint(1)),
        ("token", TOKEN.into()),
        ("agent", "bare".into()),
        (
            "ext",
            map([("mark", Value::Raw(vec![if marks { 0xc3 } else { 0xc2 }]))]),
        ),
    ]);
    control.write(&event("$hello", hello)).await;
    let welcome = control.message().await.expect("admitted");
    let welcome = Welcome::decode(&welcome).expect("a welcome");
    assert_eq!(welcome.marks, marks);
    let mut channel = bare.channel(1, "chat").await;
    let joined = channel.message().await.expect("a message");
    assert_eq!(joined.event(), "joined");
    (endpoint, control, channel)
}

fn passed(mark: u64) -> Vec<u8> {
    let fields = map([
        ("channel", Value::Uint(1)),
        ("own", Value::Raw(vec![0xc3])),
        ("mark", Value::Uint(mark)),
    ]);
    event("$passed", fields)
}

#[tokio::test]
async fn who_answers_marks_gets_the_latest_and_who_does_not_gets_all_and_no_mark() {
    bounded(async {
        let (server, _channels) = hall(server()).await;
        let policy = Overflow::LatestOnly;
        server.rooms().policy("hall", policy).expect("a room");
        let (_plain, _control, mut plain) = bare_member(&server, false).await;
        let (_answers, mut control, mut answers) = bare_member(&server, true).await;
        burst(&server, 5);
        for n in 0..5 {
            assert_eq!(number(&plain.message().await.expect("alive")), n);
        }
        let mark = answers.message().await.expect("alive");
        assert_eq!(Mark::decode(&mark), Ok(Mark(1)));
        assert_eq!(number(&answers.message().await.expect("alive")), 0);
        // Numbers that no mark had are not looked at.
        control.write(&passed(0)).await;
        control.write(&passed(2)).await;
        control.write(&passed(u64::MAX)).await;
        control.write(&passed(1)).await;
        let gap = answers.message().await.expect("alive");
        assert_eq!(gap.gap().expect("a gap").lost, 3);
        let mark = answers.message().await.expect("alive");
        assert_eq!(Mark::decode(&mark), Ok(Mark(2)));
        assert_eq!(number(&answers.message().await.expect("alive")), 4);
        // What breaks the table ends the connection.
        control.write(&event("$passed", Value::Nil)).await;
        let Err(Ended::Connection(quinn::ConnectionError::ApplicationClosed(close))) =
            control.message().await
        else {
            panic!("closed with a code");
        };
        assert_eq!(
            close.error_code.into_inner(),
            CloseCode::BAD_MESSAGE.value()
        );
    })
    .await;
}

#[tokio::test]
async fn a_mark_from_a_client_has_no_place() {
    bounded(async {
        let (server, mut channels) = hall(server()).await;
        let (_endpoint, _control, mut channel) = bare_member(&server, true).await;
        channel.write(&event("$mark", Value::Uint(1))).await;
        let there = channels.recv().await.expect("a channel");
        assert_eq!(there.closed().await.code, CloseCode::PROTOCOL_ORDER);
    })
    .await;
}
