//! What resumable channels promise: numbered messages both ways through everything that happens to a
//! connection, none lost, none doubled, none out of order; and an honest word where that is not possible.

mod common;

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{client, server};
use tokio::sync::mpsc;
use udpack::testing::Net;
use udpack::{Channel, Reconnect, RecvError, SendError, Server, Socket, SocketState, Timeouts};

/// Messages each way.
const MANY: u64 = 10_000;

/// Time-outs that make a lost connection show within seconds.
fn timeouts() -> Timeouts {
    Timeouts {
        idle: Duration::from_secs(5),
        keep_alive: Duration::from_secs(1),
        ..Timeouts::default()
    }
}

fn reconnect() -> Reconnect {
    Reconnect {
        first: Duration::from_millis(50),
        most: Duration::from_secs(2),
        ..Reconnect::default()
    }
}

/// Nothing here takes longer than this, on the paused clock.
async fn bounded<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(1200), future)
        .await
        .expect("it ends")
}

/// Sends the numbers at a pace, then finishes.
async fn count_up(
    channel: &Channel,
    numbers: std::ops::Range<u64>,
    pace: Duration,
) -> Result<(), SendError> {
    for number in numbers {
        channel.send("n", &number).await?;
        if number % 10 == 9 && !pace.is_zero() {
            tokio::time::sleep(pace).await;
        }
    }
    channel.finish().await
}

/// Everything that comes, until the peer finishes.
async fn listen(channel: &Channel) -> Result<Vec<u64>, RecvError> {
    let mut heard = Vec::new();
    while let Some(message) = channel.recv().await? {
        heard.push(message.data().expect("a number"));
    }
    Ok(heard)
}

/// A server that counts up on each `numbers` channel and tells what it heard there.
async fn counting_server(net: &Net, pace: Duration) -> (Server, mpsc::UnboundedReceiver<Vec<u64>>) {
    let (tell, heard) = mpsc::unbounded_channel();
    let builder = server()
        .timeouts(timeouts())
        .channel("numbers", move |channel: Channel| {
            let tell = tell.clone();
            async move {
                let (sent, heard) =
                    tokio::join!(count_up(&channel, 0..MANY, pace), listen(&channel));
                sent.expect("everything was sent");
                let _ = tell.send(heard.expect("the client finishes"));
            }
        });
    (net.bind(builder).await.expect("an address"), heard)
}

async fn resumable(net: &Net, server: &Server) -> (Socket, Channel) {
    let builder = client(server).timeouts(timeouts()).reconnect(reconnect());
    let socket = net
        .connect(builder, server)
        .await
        .expect("the server lets us in");
    let channel = socket
        .channel("numbers")
        .resumable()
        .open()
        .await
        .expect("a channel");
    (socket, channel)
}

fn all() -> Vec<u64> {
    (0..MANY).collect()
}

/// How often the socket has connected, and whether the session went on each time.
fn connections(socket: &Socket) -> Arc<Mutex<Vec<bool>>> {
    let seen: Arc<Mutex<Vec<bool>>> = Arc::default();
    let mut states = socket.states();
    let list = seen.clone();
    tokio::spawn(async move {
        while let Some(state) = states.next().await {
            if let SocketState::Connected { resumed, .. } = state {
                list.lock().expect("sound").push(resumed);
            }
        }
    });
    seen
}

/// Counts both ways while `trouble` happens; returns whether each connection resumed the session.
async fn through<F: Future<Output = ()>>(
    net: &Net,
    pace: Duration,
    trouble: impl FnOnce(Socket) -> F,
) -> Vec<bool> {
    bounded(async {
        let (server, mut heard) = counting_server(net, pace).await;
        let (socket, channel) = resumable(net, &server).await;
        let connections = connections(&socket);
        let counting = async {
            let (sent, ours) = tokio::join!(count_up(&channel, 0..MANY, pace), listen(&channel));
            sent.expect("everything was sent");
            let ours = ours.expect("the server finishes");
            let theirs = heard.recv().await.expect("the server tells");
            assert!(ours == all(), "to the client: {} messages", ours.len());
            assert!(theirs == all(), "to the server: {} messages", theirs.len());
        };
        let trouble = trouble(socket.clone());
        tokio::select! {
            () = counting => {}
            () = async { trouble.await; std::future::pending().await } => {}
        }
        let connections = connections.lock().expect("sound").clone();
        connections
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn two_seconds_of_silence_every_ten_do_not_even_reconnect() {
    let net = Net::new(1).delay(Duration::from_millis(20));
    let cuts = net.clone();
    // 10,000 messages over a minute: six cuts.
    let connections = through(&net, Duration::from_millis(60), |_| async move {
        loop {
            tokio::time::sleep(Duration::from_secs(8)).await;
            cuts.cut_for(Duration::from_secs(2));
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    })
    .await;
    assert_eq!(connections, [false], "one connection all the time");
}

#[tokio::test(start_paused = true)]
async fn a_silence_longer_than_the_idle_time_resumes_the_session_any_number_of_times() {
    let net = Net::new(2).delay(Duration::from_millis(20)).loss(0.01);
    let cuts = net.clone();
    let connections = through(&net, Duration::from_millis(60), |_| async move {
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_secs(6)).await;
            cuts.cut_for(Duration::from_secs(12));
            tokio::time::sleep(Duration::from_secs(12)).await;
        }
    })
    .await;
    assert!(connections.len() >= 5, "{connections:?}");
    assert!(
        connections[1..].iter().all(|resumed| *resumed),
        "{connections:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_change_of_address_does_not_reconnect() {
    let net = Net::new(3).delay(Duration::from_millis(20));
    let moves = net.clone();
    let connections = through(&net, Duration::from_millis(10), |socket| async move {
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            moves
                .move_client(&socket)
                .expect("a client of this network");
        }
    })
    .await;
    assert_eq!(connections, [false], "one connection all the time");
}
