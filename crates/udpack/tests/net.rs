//! The network in memory of `udpack::testing`: time, luck, cuts and moves.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use tokio::time::Instant;
use udpack::testing::{self, Net, Path};
use udpack::{Channel, CloseCode, Context, Fault, Server, Timeouts};

/// No test takes longer than this, by the clock of the test, which is mostly a paused one.
async fn bounded<F: Future>(test: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(600), test)
        .await
        .expect("the test took longer than 600 s")
}

/// A server that answers `echo` with what it was asked.
async fn echo(net: &Net) -> Server {
    let builder = testing::server().channel("echo", common::echo);
    net.bind(builder).await.unwrap()
}

/// Asks `count` times and expects as many answers.
async fn ask(channel: &Channel, count: u64) {
    for n in 0..count {
        let answer: u64 = channel.request("echo", &n).await.unwrap();
        assert_eq!(answer, n);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pair_talks_both_ways() {
    bounded(async {
        let (server, client) = testing::pair().await;
        let here = client.open("up").await.unwrap();
        here.send("hello", &1).await.unwrap();
        let there = server.accept_channel().await.unwrap();
        let first = there.recv().await.unwrap().unwrap();
        assert_eq!(first.data::<u64>().unwrap(), 1);
        let back = server.open("down").await.unwrap();
        back.send("hello", &2).await.unwrap();
        let down = client.accept_channel().await.unwrap();
        let first = down.recv().await.unwrap().unwrap();
        assert_eq!(first.data::<u64>().unwrap(), 2);
        let _ = client.close(CloseCode::NORMAL, "done").await;
        assert_eq!(server.closed().await.code, CloseCode::NORMAL);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_time_passes_without_waiting() {
    bounded(async {
        let (wall, clock) = (std::time::Instant::now(), Instant::now());
        let net = Net::new(1);
        let server = net.bind(testing::server()).await.unwrap();
        let idle = Duration::from_secs(40);
        let timeouts = Timeouts {
            idle,
            ..Timeouts::default()
        };
        let socket = net
            .connect(testing::client(&server).timeouts(timeouts), &server)
            .await
            .unwrap();
        // Two minutes of silence are nothing to a client that keeps itself alive.
        tokio::time::sleep(Duration::from_secs(120)).await;
        assert_eq!(socket.close_reason(), None);
        let begun = Instant::now();
        net.cut();
        let reason = socket.closed().await;
        assert_eq!(reason.code, CloseCode::TIMED_OUT);
        // The server's idle time of 30 s is the smaller one and counts for both.
        let took = begun.elapsed();
        assert!(took > Duration::from_secs(19), "{took:?}");
        assert!(took < Duration::from_secs(31), "{took:?}");
        assert!(clock.elapsed() > Duration::from_secs(139));
        assert!(wall.elapsed() < Duration::from_secs(10));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_path_loses_doubles_and_reorders_its_share() {
    bounded(async {
        let net = Net::new(2)
            .loss(0.05)
            .duplicate(0.05)
            .reorder(0.05)
            .delay(Duration::from_millis(10))
            .jitter(Duration::from_millis(3));
        let server = echo(&net).await;
        let socket = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        ask(&socket.open("echo").await.unwrap(), 1000).await;
        let traffic = net.traffic();
        assert!(traffic.sent > 2000, "{traffic:?}");
        for count in [traffic.lost, traffic.duplicated, traffic.reordered] {
            let share = count as f64 / traffic.sent as f64;
            assert!((0.035..0.065).contains(&share), "{share} {traffic:?}");
        }
        assert_eq!(
            traffic.dropped + traffic.astray + traffic.cut,
            0,
            "{traffic:?}"
        );
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_delay_is_what_a_round_trip_takes() {
    bounded(async {
        let net = Net::new(3).delay(Duration::from_millis(50));
        let server = echo(&net).await;
        let socket = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        let channel = socket.open("echo").await.unwrap();
        ask(&channel, 1).await;
        let begun = Instant::now();
        ask(&channel, 1).await;
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(100), "{took:?}");
        assert!(took < Duration::from_millis(110), "{took:?}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_rate_is_kept() {
    bounded(async {
        let net = Net::new(4).rate(1_000_000);
        let (server, client) = net.pair().await;
        let begun = Instant::now();
        let channel = client.open("bulk").await.unwrap();
        let sending = async {
            for _ in 0..60 {
                channel
                    .send("bytes", &[0_u8; 50_000].as_slice())
                    .await
                    .unwrap();
            }
            let _ = channel.finish().await;
        };
        let receiving = async {
            let channel = server.accept_channel().await.unwrap();
            let mut count = 0;
            while let Ok(Some(message)) = channel.recv().await {
                count += message.len();
            }
            count
        };
        let ((), received) = tokio::join!(sending, receiving);
        let took = begun.elapsed().as_secs_f64();
        let rate = received as f64 / took;
        assert!((600_000.0..1_000_000.0).contains(&rate), "{rate}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_is_cut_waits_and_what_is_mended_goes_on() {
    bounded(async {
        let net = Net::new(5);
        let server = echo(&net).await;
        let first = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        let second = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        let (a, b) = (
            first.open("echo").await.unwrap(),
            second.open("echo").await.unwrap(),
        );
        ask(&a, 1).await;
        ask(&b, 1).await;

        // The whole network, for a time.
        let begun = Instant::now();
        net.cut_for(Duration::from_secs(8));
        ask(&a, 1).await;
        assert!(begun.elapsed() >= Duration::from_secs(8));
        ask(&b, 1).await;

        // One client, until it is mended.
        net.cut_client(&first);
        let request = async { a.request::<_, u64>("echo", &7).await.unwrap() };
        let mut request = std::pin::pin!(request);
        tokio::select! {
            _ = &mut request => panic!("a packet went through a cut"),
            () = tokio::time::sleep(Duration::from_secs(5)) => {}
        }
        ask(&b, 10).await;
        net.mend_client(&first);
        assert_eq!(request.await, 7);

        // The whole network, until it is mended.
        net.cut();
        let request = async { b.request::<_, u64>("echo", &8).await.unwrap() };
        let mut request = std::pin::pin!(request);
        tokio::select! {
            _ = &mut request => panic!("a packet went through a cut"),
            () = tokio::time::sleep(Duration::from_secs(5)) => {}
        }
        net.mend();
        assert_eq!(request.await, 8);
        assert!(net.traffic().cut > 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_moves_stays_connected() {
    bounded(async {
        let net = Net::new(6).delay(Duration::from_millis(20));
        let server = net
            .bind(
                testing::server().channel("slow", |channel: Channel| async move {
                    channel
                        .on("echo", |n: u64, _: Context| async move {
                            tokio::time::sleep(Duration::from_secs(1)).await;
                            Ok::<_, Fault>(n)
                        })
                        .run()
                        .await
                }),
            )
            .await
            .unwrap();
        let socket = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        let id = socket.id().to_string();
        let channel = socket.open("slow").await.unwrap();
        ask(&channel, 1).await;
        let there = server.sockets().pop().unwrap();
        let old = there.remote_address();
        let request = async { channel.request::<_, u64>("echo", &9).await.unwrap() };
        let mut request = std::pin::pin!(request);
        tokio::select! {
            _ = &mut request => panic!("the answer takes a second"),
            () = tokio::time::sleep(Duration::from_millis(300)) => {}
        }
        let moved = net.move_client(&socket).unwrap();
        assert_ne!(moved, old.ip());
        // The client says something from its new address; until then the server cannot know.
        socket
            .open("slow")
            .await
            .unwrap()
            .send("hello", &())
            .await
            .unwrap();
        assert_eq!(request.await, 9);
        assert_eq!(there.remote_address().ip(), moved);
        assert_eq!((server.sockets().len(), there.id().to_string()), (1, id));
        ask(&channel, 2).await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_loses_power_is_replaced_at_its_address() {
    bounded(async {
        let net = Net::new(7);
        let server = echo(&net).await;
        let address = server.local_addr();
        let socket = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        let taken = net.bind_at(testing::server(), address).await;
        assert!(matches!(taken, Err(udpack::BindError::Bind { .. })));
        net.take_down(&server);
        drop(server);
        let again = net.bind_at(testing::server(), address).await.unwrap();
        assert_eq!(again.local_addr(), address);
        // Another key: it cannot say that it knows nothing of the old connection.
        assert_eq!(socket.closed().await.code, CloseCode::TIMED_OUT);
        let socket = net.connect(testing::client(&again), &again).await.unwrap();
        assert_eq!(socket.close_reason(), None);
    })
    .await;
}

#[tokio::test]
async fn it_works_in_real_time_too() {
    bounded(async {
        let net = Net::new(8).loss(0.01);
        net.set_path(Path {
            loss: 0.0,
            ..net.path()
        });
        let server = echo(&net).await;
        let socket = net
            .connect(testing::client(&server), &server)
            .await
            .unwrap();
        ask(&socket.open("echo").await.unwrap(), 10).await;
    })
    .await;
}
