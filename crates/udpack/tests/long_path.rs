//! A path on which each round trip takes longer than what a limit was made for.

use std::time::Duration;

use tokio::time::Instant;
use udpack::testing::{self, Net};
use udpack::{Channel, CloseCode, Limits, Reconnect, Server, Socket};

/// A network of this delay each way, and a client that connects over it. Its address must be proved first, which is one round
/// trip more.
async fn far(delay: Duration) -> (Net, Server, Socket) {
    let net = Net::new(0).delay(delay);
    let limits = Limits {
        retry_from: 0,
        ..Limits::default()
    };
    let server = testing::server().limits(limits).accept_channels();
    let server = net.bind(server).await.expect("an address");
    let client = testing::client(&server).reconnect(Reconnect::default());
    let socket = net.connect(client, &server).await;
    (net, server, socket.expect("let in, however far it is"))
}

#[tokio::test(start_paused = true)]
async fn a_client_connects_over_a_path_of_seconds() {
    for delay in [20, 1_000, 2_600, 4_500] {
        let delay = Duration::from_millis(delay);
        let begun = Instant::now();
        let (_net, _server, socket) = far(delay).await;
        // Retry, handshake, hello.
        let took = begun.elapsed();
        assert!(
            took >= delay * 6 && took < delay * 10 + Duration::from_secs(1),
            "{took:?}"
        );
        assert!(socket.is_connected());
    }
}

/// Nobody answers: that shows in the time that was set.
#[tokio::test(start_paused = true)]
async fn a_path_on_which_nothing_comes_is_given_up_in_its_time() {
    let net = Net::new(0);
    let server = net.bind(testing::server()).await.expect("an address");
    net.cut();
    let begun = Instant::now();
    let error = net.connect(testing::client(&server), &server).await.err();
    let error = error.expect("nobody answers").to_string();
    assert_eq!(begun.elapsed(), Duration::from_secs(10), "{error}");
}

/// Everything that was sent before a close arrives, and the close is one in order on both sides.
#[tokio::test(start_paused = true)]
async fn a_close_over_a_path_of_seconds_loses_nothing() {
    for (delay, resumable) in [(2_600, false), (2_600, true), (4_500, false), (4_500, true)] {
        let (_net, server, here) = far(Duration::from_millis(delay)).await;
        let there = server.accept().await.expect("a socket");
        let opener = here.channel("c");
        let opener = if resumable {
            opener.resumable()
        } else {
            opener
        };
        let (ours, theirs) = tokio::join!(opener.open(), there.accept_channel());
        let (ours, theirs): (Channel, Channel) = (ours.expect("one"), theirs.expect("its end"));
        let reader = tokio::spawn(async move {
            let mut count = 0_u64;
            while let Ok(Some(_)) = theirs.recv().await {
                count += 1;
            }
            (count, theirs.closed().await)
        });
        for number in 0..200_u64 {
            ours.send("n", &(number, "x".repeat(1000)))
                .await
                .expect("alive");
        }
        let reason = here.close(CloseCode::NORMAL, "enough").await;
        assert_eq!(reason.code, CloseCode::NORMAL, "{reason}");
        let (count, ended) = reader.await.expect("no panic");
        assert_eq!(count, 200, "{delay} ms, resumable {resumable}: {ended}");
        assert_eq!(there.closed().await.code, CloseCode::NORMAL);
    }
}

/// A reader that is as slow as its path is not slow, also where a message takes the path longer than a reader may.
#[tokio::test(start_paused = true)]
async fn nobody_is_slow_on_a_path_of_seconds() {
    for (block, count) in [(64 << 10, 160), (1 << 20, 10)] {
        blocks_arrive(block, count).await;
    }
}

async fn blocks_arrive(block: usize, count: usize) {
    let (_net, server, here) = far(Duration::from_millis(4_500)).await;
    let there = server.accept().await.expect("a socket");
    let (ours, theirs) = tokio::join!(here.channel("c").resumable().open(), there.accept_channel());
    let (ours, theirs) = (ours.expect("one"), theirs.expect("its end"));
    let reader = tokio::spawn(async move {
        let mut bytes = 0;
        while let Ok(Some(message)) = theirs.recv().await {
            bytes += message.len();
        }
        bytes
    });
    // More than what may be unconfirmed, several times.
    let bytes = serde_bytes::ByteBuf::from(vec![7; block]);
    for _ in 0..count {
        ours.send("block", &bytes).await.expect("alive");
    }
    ours.finish().await.expect("all was taken");
    assert!(reader.await.expect("no panic") >= count * block);
    assert_eq!(here.metrics().slow_peers, 0);
}
