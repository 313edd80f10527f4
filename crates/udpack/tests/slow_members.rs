//! How old the messages of a room are for a member that is too slow for them, by the room's policy.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use tokio::time::Instant;
use udpack::testing::{self, Net};
use udpack::{
    Channel, Data, Fault, Limits, Overflow, Reconnect, Router, Server, ServerBuilder, Socket,
    SocketState,
};

/// Between two messages to the room.
const FRAME: Duration = Duration::from_millis(33);
/// What a slow program takes for each.
const SLOW: Duration = Duration::from_millis(500);
/// One way on the network.
const DELAY: Duration = Duration::from_millis(20);
/// Until what was read is told, the scheduling of the test, and what a packet may wait for others.
const SLACK: Duration = Duration::from_millis(40);

async fn bounded<F: Future>(test: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(600), test)
        .await
        .expect("the test took longer than 600 s")
}

/// A server whose `view` channels are in the room `cam`.
fn cinema() -> ServerBuilder {
    testing::server().channel("view", |channel: Channel| async move {
        channel.join("cam").unwrap();
        channel.send("joined", &()).await.unwrap();
        while let Ok(Some(_)) = channel.recv().await {}
    })
}

async fn joined(channel: &Channel) {
    let first = channel.recv().await.unwrap().unwrap();
    assert_eq!(first.event(), "joined");
}

/// Sends `count` messages to the room, each with its number and the time since `start`.
async fn film(server: Server, start: Instant, count: u64) {
    let mut clock = tokio::time::interval(FRAME);
    let picture = "x".repeat(20_000);
    for number in 0..count {
        clock.tick().await;
        let age = start.elapsed().as_millis() as u64;
        let sent = server
            .rooms()
            .to("cam")
            .send("frame", &(number, age, &picture));
        sent.unwrap();
    }
}

/// Number and age of a message, or how many are missing.
enum Seen {
    Frame(u64, Duration),
    Gap(u64),
}

async fn see(channel: &Channel, start: Instant) -> Seen {
    let message = channel.recv().await.unwrap().unwrap();
    match message.gap() {
        Some(gap) => Seen::Gap(gap.lost),
        None => {
            let (number, sent, _): (u64, u64, String) = message.data().unwrap();
            Seen::Frame(number, start.elapsed() - Duration::from_millis(sent))
        }
    }
}

/// The ages of what a program sees that takes `pace` for each message, for `time`; gaps must tell exactly what is
/// missing.
async fn ages(channel: &Channel, start: Instant, pace: Duration, time: Duration) -> Vec<Duration> {
    let (mut ages, mut expected) = (Vec::new(), 0);
    while start.elapsed() < time {
        match see(channel, start).await {
            Seen::Gap(lost) => expected += lost,
            Seen::Frame(number, age) => {
                assert_eq!(number, expected, "no loss without a gap");
                expected += 1;
                ages.push(age);
                tokio::time::sleep(pace).await;
            }
        }
    }
    ages
}

/// A member with these limits that takes one message in half a second: what it sees.
async fn slow_member(policy: Overflow, limits: Limits, resumable: bool) -> Vec<Duration> {
    let net = Net::new(1).delay(DELAY);
    let server = net.bind(cinema()).await.unwrap();
    server.rooms().policy("cam", policy).unwrap();
    let builder = testing::client(&server)
        .limits(limits)
        .reconnect(Reconnect::default());
    let socket = net.connect(builder, &server).await.unwrap();
    let open = socket.channel("view");
    let open = if resumable { open.resumable() } else { open };
    let channel = open.open().await.unwrap();
    joined(&channel).await;
    let start = Instant::now();
    let film = tokio::spawn(film(server.clone(), start, 600));
    let ages = ages(&channel, start, SLOW, Duration::from_secs(15)).await;
    film.abort();
    assert!(server.rooms().dropped() > 300, "the others are lost");
    ages
}

fn narrow() -> Limits {
    Limits {
        stream_window: 64 << 10,
        connection_window: 64 << 10,
        ..Limits::default()
    }
}

#[tokio::test(start_paused = true)]
async fn the_latest_is_never_older_than_the_members_own_pace_and_one_message() {
    bounded(async {
        for (limits, resumable) in [
            (Limits::default(), false),
            (narrow(), false),
            (Limits::default(), true),
        ] {
            let ages = slow_member(Overflow::LatestOnly, limits, resumable).await;
            assert!(ages.len() >= 25, "it goes on: {}", ages.len());
            let most = SLOW + FRAME + 2 * DELAY + SLACK;
            assert!(
                ages.iter().all(|age| *age <= most),
                "resumable {resumable}: {ages:?}"
            );
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_oldest_that_are_kept_are_as_many_as_the_policy_says() {
    bounded(async {
        let policy = Overflow::DropOldest { messages: 3 };
        let ages = slow_member(policy, Limits::default(), false).await;
        // Three unread, three that wait, and the one in its hands.
        let most = 7 * SLOW + FRAME + 2 * DELAY + SLACK;
        assert!(ages.iter().all(|age| *age <= most), "{ages:?}");
    })
    .await;
}

/// What a handler has not taken yet is unread, although the library has read it.
#[tokio::test(start_paused = true)]
async fn what_waits_for_a_handler_is_unread() {
    bounded(async {
        let net = Net::new(2).delay(DELAY);
        let server = net.bind(cinema()).await.unwrap();
        server.rooms().policy("cam", Overflow::LatestOnly).unwrap();
        let socket = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        let channel = socket.open("view").await.unwrap();
        joined(&channel).await;
        let start = Instant::now();
        let (seen, mut ages) = tokio::sync::mpsc::unbounded_channel();
        let router = Router::new().on_gap(|_, _| async {}).on(
            "frame",
            move |Data((_, sent, _)): Data<(u64, u64, String)>| {
                let _ = seen.send(start.elapsed() - Duration::from_millis(sent));
                async {
                    tokio::time::sleep(SLOW).await;
                    Ok::<_, Fault>(())
                }
            },
        );
        let serving = tokio::spawn(channel.route(router).run());
        film(server.clone(), start, 300).await;
        serving.abort();
        let most = SLOW + FRAME + 2 * DELAY + SLACK;
        let mut count = 0;
        while let Ok(age) = ages.try_recv() {
            assert!(age <= most, "{age:?}");
            count += 1;
        }
        assert!(count >= 15, "it goes on: {count}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_long_path_costs_a_quick_member_nothing_once_it_is_known() {
    bounded(async {
        for delay in [1, 5, 17, 50, 150] {
            let net = Net::new(3).delay(Duration::from_millis(delay));
            let server = net.bind(cinema()).await.unwrap();
            server.rooms().policy("cam", Overflow::LatestOnly).unwrap();
            let socket = net
                .connect(testing::client(&server), &server)
                .await
                .unwrap();
            let channel = socket.open("view").await.unwrap();
            joined(&channel).await;
            let start = Instant::now();
            let film = tokio::spawn(film(server.clone(), start, 1200));
            let mut late = Vec::new();
            while start.elapsed() < Duration::from_secs(30) {
                if let Seen::Gap(lost) = see(&channel, start).await
                    && start.elapsed() > Duration::from_secs(10)
                {
                    late.push(lost);
                }
            }
            film.abort();
            assert!(late.is_empty(), "{delay} ms one way: {late:?}");
        }
    })
    .await;
}

/// What the member told last may be lost with its connection.
#[tokio::test(start_paused = true)]
async fn a_resumed_member_goes_on_whenever_the_connection_was_cut() {
    for cut in 0..20 {
        bounded(async {
            let net = Net::new(4).delay(DELAY);
            let server = net.bind(cinema()).await.unwrap();
            server.rooms().policy("cam", Overflow::LatestOnly).unwrap();
            let builder = testing::client(&server).reconnect(Reconnect::default());
            let socket = net.connect(builder, &server).await.unwrap();
            let channel = socket.channel("view").resumable().open().await.unwrap();
            joined(&channel).await;
            let mut states = socket.states();
            let start = Instant::now();
            let film = tokio::spawn(film(server.clone(), start, 6000));
            let outage = async {
                tokio::time::sleep(Duration::from_millis(200 + 5 * cut)).await;
                net.cut();
                while !matches!(states.next().await, Some(SocketState::Reconnecting { .. })) {}
                net.mend();
                while !matches!(states.next().await, Some(SocketState::Connected { .. })) {}
            };
            let mut outage = std::pin::pin!(outage);
            let mut seen = 0;
            let mut back = false;
            while seen < 20 {
                tokio::select! {
                    () = &mut outage, if !back => back = true,
                    frame = see(&channel, start) => {
                        seen += u64::from(back && matches!(frame, Seen::Frame(..)));
                    }
                }
            }
            film.abort();
        })
        .await;
    }
}

/// Who speaks to one member directly waits for no program, and its message stays in order.
#[tokio::test(start_paused = true)]
async fn what_is_sent_directly_goes_on_behind_what_is_unread() {
    bounded(async {
        let net = Net::new(5).delay(DELAY);
        let (seen, mut channels) = tokio::sync::mpsc::unbounded_channel();
        let builder = testing::server().channel("view", move |channel: Channel| {
            let seen = seen.clone();
            async move {
                channel.join("cam").unwrap();
                seen.send(channel.clone()).unwrap();
                while let Ok(Some(_)) = channel.recv().await {}
            }
        });
        let server = net.bind(builder).await.unwrap();
        server.rooms().policy("cam", Overflow::LatestOnly).unwrap();
        let socket: Socket = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        let channel = socket.open("view").await.unwrap();
        let there = channels.recv().await.unwrap();
        // The first goes out, the third takes the place of the second.
        for n in 0..3 {
            server.rooms().to("cam").send("n", &n).unwrap();
        }
        let sent = tokio::time::timeout(Duration::from_secs(1), there.send("direct", &()));
        sent.await.expect("nobody reads, and nobody waits").unwrap();
        server.rooms().to("cam").send("n", &3).unwrap();
        let mut seen = Vec::new();
        while seen.last().is_none_or(|last| last != "3") {
            let message = channel.recv().await.unwrap().unwrap();
            seen.push(match (message.event(), message.gap()) {
                (_, Some(gap)) => format!("gap {}", gap.lost),
                ("n", _) => message.data::<u64>().unwrap().to_string(),
                (event, _) => event.to_owned(),
            });
        }
        assert_eq!(seen, ["0", "gap 1", "2", "direct", "3"]);
    })
    .await;
}
