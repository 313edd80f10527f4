//! What each end of a socket knows of the other: connected, silent, detached, over. On the paused clock.

use std::time::Duration;

use tokio::time::Instant;
use udpack::testing::{self, Net};
use udpack::{Channel, CloseCode, Reconnect, Server, Socket, SocketState, SocketStates, Timeouts};

/// A peer that is gone is missed within this, by default.
const MISSED: Duration = Duration::from_secs(15);
/// A round trip of the test's network is below this.
const TRIP: Duration = Duration::from_millis(100);

/// A server whose channels join a room, and both ends of a socket that may resume, or not.
async fn ends(net: &Net, resume: bool) -> (Server, Socket, Socket) {
    let server = testing::server()
        .channel("hall", |channel: Channel| async move {
            let _ = channel.join("hall");
            while let Ok(Some(_)) = channel.recv().await {}
        })
        .accept_channels();
    let server = net.bind(server).await.expect("an address");
    let client = testing::client(&server);
    let client = match resume {
        true => client.reconnect(Reconnect::default()),
        false => client,
    };
    let (here, there) = tokio::join!(net.connect(client, &server), server.accept());
    let (here, there) = (here.expect("let in"), there.expect("a socket"));
    (server, here, there)
}

/// The next state, and how long it took.
async fn next(states: &mut SocketStates) -> (Option<SocketState>, Duration) {
    let begun = Instant::now();
    let state = tokio::time::timeout(Duration::from_secs(600), states.next());
    let state = state.await.expect("a state within ten minutes");
    (state, begun.elapsed())
}

fn connected(resumed: bool) -> Option<SocketState> {
    Some(SocketState::Connected {
        resumed,
        reason: None,
    })
}

/// Whenever it happens, and on both sides.
#[tokio::test(start_paused = true)]
async fn a_peer_that_is_gone_is_missed_within_fifteen_seconds() {
    for resume in [false, true] {
        for quiet in (500..12_000).step_by(790).map(Duration::from_millis) {
            let net = Net::new(1).delay(TRIP / 2);
            let (server, here, there) = ends(&net, resume).await;
            let hall = here.open("hall").await.expect("a channel");
            hall.send("hello", &()).await.expect("sent");
            tokio::time::sleep(quiet).await;
            let mut watched = [here.states(), there.states()];
            for states in &mut watched {
                assert_eq!(next(states).await.0, connected(false));
            }
            assert_eq!(
                server
                    .sockets()
                    .into_iter()
                    .filter(Socket::is_connected)
                    .count(),
                1
            );
            net.cut();
            let cut = Instant::now();
            for states in &mut watched {
                let state = states.next().await;
                let Some(SocketState::Silent { since }) = state else {
                    panic!("{state:?}, after {quiet:?}");
                };
                assert!(
                    cut.elapsed() <= MISSED,
                    "{:?}, after {quiet:?}",
                    cut.elapsed()
                );
                let told = Instant::now().into_std() - since;
                assert!(
                    told <= MISSED && told >= Timeouts::default().keep_alive,
                    "{told:?}"
                );
            }
            assert!(!here.is_connected() && !there.is_connected());
            assert_eq!(
                server
                    .sockets()
                    .into_iter()
                    .filter(Socket::is_connected)
                    .count(),
                0
            );
            let members = server.rooms().members("hall");
            assert!(!members.is_empty() && !members.iter().any(udpack::Member::is_connected));
            // It was only out of reach: nothing was closed, nothing lost.
            net.mend();
            for states in &mut watched {
                assert_eq!(next(states).await.0, connected(true), "after {quiet:?}");
            }
            assert!(here.is_connected() && there.is_connected());
            assert!(
                server
                    .rooms()
                    .members("hall")
                    .iter()
                    .all(udpack::Member::is_connected)
            );
        }
    }
}

/// The formula of `Socket::is_connected`, with other times.
#[tokio::test(start_paused = true)]
async fn the_time_of_a_silence_follows_the_keep_alive_and_the_path() {
    for (keep_alive, delay) in [(1, 20), (1, 2_600), (5, 300), (20, 20)] {
        let (keep_alive, delay) = (
            Duration::from_secs(keep_alive),
            Duration::from_millis(delay),
        );
        let times = Timeouts {
            keep_alive,
            idle: Duration::from_secs(120),
            ..Timeouts::default()
        };
        let net = Net::new(1).delay(delay);
        let server = net.bind(testing::server().timeouts(times.clone())).await;
        let server = server.expect("an address");
        let client = testing::client(&server).timeouts(times);
        let (here, there) = tokio::join!(net.connect(client, &server), server.accept());
        let (_here, there) = (here.expect("let in"), there.expect("a socket"));
        // A living peer is not silent, however long its path is.
        let mut states = there.states();
        next(&mut states).await;
        let quiet = tokio::time::timeout(Duration::from_secs(300), states.next()).await;
        assert!(quiet.is_err(), "{quiet:?}");
        net.cut();
        let took = next(&mut states).await.1;
        let due = keep_alive + Duration::from_secs(3) + 2 * delay * 4;
        let trip = there.stats().rtt;
        let due = due.max(keep_alive + Duration::from_secs(3) + trip * 4);
        assert!(took <= due + Duration::from_secs(2), "{took:?}, {delay:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lossy_path_is_not_a_silent_one() {
    for seed in 0..8 {
        let net = Net::new(seed).delay(Duration::from_millis(150)).loss(0.1);
        let (_server, here, there) = ends(&net, true).await;
        for mut states in [here.states(), there.states()] {
            next(&mut states).await;
            let hour = tokio::time::timeout(Duration::from_secs(3600), states.next());
            let changed = hour.await;
            assert!(changed.is_err(), "seed {seed}: {changed:?}");
        }
    }
}

/// Every step of a peer that dies, as its server sees it.
#[tokio::test(start_paused = true)]
async fn a_server_sees_a_session_go_silent_detached_and_over() {
    let times = Timeouts::default();
    for resume in [false, true] {
        let net = Net::new(1).delay(TRIP / 2);
        let (server, _here, there) = ends(&net, resume).await;
        let mut states = there.states();
        next(&mut states).await;
        net.cut();
        let cut = Instant::now();
        let (state, _) = next(&mut states).await;
        assert!(
            matches!(state, Some(SocketState::Silent { .. })),
            "{state:?}"
        );
        if resume {
            let (state, _) = next(&mut states).await;
            let Some(SocketState::Detached { since }) = state else {
                panic!("{state:?}");
            };
            assert_eq!(since, Instant::now().into_std());
            assert!(
                cut.elapsed() <= times.keep_alive + times.idle,
                "{:?}",
                cut.elapsed()
            );
            assert!(!there.is_connected());
            assert_eq!(server.sockets().len(), 1, "its session is kept");
        }
        let (state, took) = next(&mut states).await;
        let Some(SocketState::Closed(reason)) = state else {
            panic!("{state:?}");
        };
        assert_eq!(reason.code, CloseCode::TIMED_OUT);
        if resume {
            assert!(took <= times.resume, "{took:?}");
        } else {
            assert!(
                cut.elapsed() <= times.keep_alive + times.idle,
                "{:?}",
                cut.elapsed()
            );
        }
        assert_eq!(next(&mut states).await.0, None, "there is no other");
        assert_eq!(there.state(), SocketState::Closed(reason));
    }
}

#[tokio::test(start_paused = true)]
async fn both_ends_see_a_session_come_back() {
    let net = Net::new(1).delay(TRIP / 2);
    let (_server, here, there) = ends(&net, true).await;
    let (mut ours, mut theirs) = (here.states(), there.states());
    for states in [&mut ours, &mut theirs] {
        assert_eq!(next(states).await.0, connected(false));
    }
    net.cut_for(Duration::from_secs(50));
    let mut seen = Vec::new();
    loop {
        match next(&mut theirs).await.0 {
            Some(SocketState::Connected { resumed, .. }) => {
                assert!(resumed);
                break;
            }
            Some(state) => seen.push(state),
            None => panic!("over"),
        }
    }
    assert!(
        matches!(
            *seen,
            [SocketState::Silent { .. }, SocketState::Detached { .. }]
        ),
        "{seen:?}"
    );
    let mut since = None;
    loop {
        match next(&mut ours).await.0 {
            Some(SocketState::Connected { resumed, .. }) => {
                assert!(resumed);
                break;
            }
            Some(SocketState::Reconnecting { since: lost, .. }) => {
                assert_eq!(*since.get_or_insert(lost), lost, "it was lost once");
            }
            Some(SocketState::Silent { .. }) => assert_eq!(since, None),
            state => panic!("{state:?}"),
        }
    }
    assert!(since.is_some());
    assert!(here.is_connected() && there.is_connected() && here.reconnects());
    here.close(CloseCode::NORMAL, "enough").await;
    for states in [&mut ours, &mut theirs] {
        let (state, _) = next(states).await;
        assert!(
            matches!(&state, Some(SocketState::Closed(reason)) if reason.code == CloseCode::NORMAL),
            "{state:?}"
        );
    }
}
