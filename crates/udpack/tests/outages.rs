//! A path that is silent for a while: what it costs is bounded by the idle time, and what a lost connection had
//! under way does not burden the next one.

use std::time::Duration;

use serde_bytes::ByteBuf;
use tokio::time::{sleep, timeout};
use udpack::testing::{self, Net};
use udpack::{Channel, Context, Fault, Priority, Reconnect, Router, Server, Socket, SocketState};

const MINUTE: Duration = Duration::from_secs(60);

/// 1 MB/s and 20 ms: windows are full within a second.
fn slow_net() -> Net {
    Net::new(3).delay(Duration::from_millis(20)).rate(1_000_000)
}

/// `sink` reads what comes, `source` sends without an end, `echo` answers, `hall` joins a room.
async fn serve(net: &Net) -> Server {
    let builder = testing::server()
        .channel("sink", |channel: Channel| async move {
            while let Ok(Some(_)) = channel.recv().await {}
        })
        .channel("source", |channel: Channel| async move {
            while channel.send("blob", &blob()).await.is_ok() {}
        })
        .channel("hall", |channel: Channel| async move {
            let _ = channel.join("hall");
            while let Ok(Some(_)) = channel.recv().await {}
        })
        .channel(
            "echo",
            Router::new().on("say", |said: String, _: Context| async move {
                Ok::<_, Fault>(said)
            }),
        );
    net.bind(builder).await.expect("a server")
}

async fn connect(net: &Net, server: &Server) -> Socket {
    let client = testing::client(server).reconnect(Reconnect::default());
    net.connect(client, server).await.expect("let in")
}

fn blob() -> ByteBuf {
    ByteBuf::from(vec![0; 100_000])
}

async fn open(socket: &Socket, name: &str, priority: Priority, resumable: bool) -> Channel {
    let opener = socket.channel(name).priority(priority);
    let opener = if resumable {
        opener.resumable()
    } else {
        opener
    };
    opener.open().await.expect("a channel")
}

/// Waits until the socket is connected again.
async fn comes_back(socket: &Socket) {
    let mut states = socket.states();
    while !matches!(socket.state(), Some(SocketState::Connected { .. })) {
        timeout(3 * MINUTE, states.next()).await.expect("in time");
    }
}

async fn answers(channel: &Channel) -> bool {
    let reply = channel.request::<_, String>("say", "hello");
    reply
        .timeout(MINUTE)
        .await
        .is_ok_and(|said| said == "hello")
}

/// Every priority sends on a socket that has lost a connection with much under way, in both directions.
#[tokio::test(start_paused = true)]
async fn what_was_under_way_at_a_loss_burdens_no_later_connection() {
    for (name, priority, resumable) in [
        ("sink", Priority::Normal, false),
        ("sink", Priority::Bulk, false),
        ("sink", Priority::Bulk, true),
        ("source", Priority::Bulk, false),
        ("source", Priority::Bulk, true),
    ] {
        let net = slow_net();
        let server = serve(&net).await;
        let socket = connect(&net, &server).await;
        // The handle outlives the connection, as a program may keep it.
        let busy = open(&socket, name, priority, resumable).await;
        let worker = tokio::spawn({
            let busy = busy.clone();
            async move {
                match name {
                    "sink" => while busy.send("blob", &blob()).await.is_ok() {},
                    _ => while let Ok(Some(_)) = busy.recv().await {},
                }
            }
        });
        for lost in 1..=2 {
            sleep(Duration::from_secs(3)).await;
            net.cut_for(Duration::from_secs(45));
            sleep(Duration::from_secs(46)).await;
            comes_back(&socket).await;
            for priority in [Priority::High, Priority::Normal, Priority::Bulk] {
                let echo = open(&socket, "echo", priority, false).await;
                assert!(
                    answers(&echo).await,
                    "{name} {priority:?} resumable {resumable}, connection {lost} lost"
                );
            }
        }
        worker.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_cut_below_the_idle_time_costs_no_busy_channel() {
    for (priority, resumable) in [
        (Priority::Normal, false),
        (Priority::Normal, true),
        (Priority::Bulk, false),
        (Priority::Bulk, true),
    ] {
        for seconds in [8, 25] {
            let net = slow_net();
            let server = serve(&net).await;
            let socket = connect(&net, &server).await;
            let busy = open(&socket, "sink", priority, resumable).await;
            let sender = tokio::spawn({
                let busy = busy.clone();
                async move { while busy.send("blob", &blob()).await.is_ok() {} }
            });
            sleep(Duration::from_secs(3)).await;
            net.cut_for(Duration::from_secs(seconds));
            let ended = timeout(MINUTE, busy.closed()).await;
            assert!(
                ended.is_err(),
                "{priority:?} resumable {resumable}, silent for {seconds} s: {ended:?}"
            );
            assert_eq!(socket.metrics().slow_peers, 0);
            sender.abort();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_cut_below_the_idle_time_costs_no_quiet_channel_and_no_member_of_a_room() {
    for seconds in [8, 25] {
        for resumable in [false, true] {
            let net = Net::new(3).delay(Duration::from_millis(20));
            let server = serve(&net).await;
            let socket = connect(&net, &server).await;
            let echo = open(&socket, "echo", Priority::Normal, resumable).await;
            let hall = open(&socket, "hall", Priority::Normal, resumable).await;
            assert!(answers(&echo).await);
            net.cut_for(Duration::from_secs(seconds));
            for number in 0..60_u32 {
                server.rooms().to("hall").send("n", &number).expect("sent");
                echo.send("say", "once a second")
                    .await
                    .expect("the channel lives");
                sleep(Duration::from_secs(1)).await;
            }
            assert!(answers(&echo).await, "silent for {seconds} s");
            for number in 0..60_u32 {
                let message = timeout(MINUTE, hall.recv()).await.expect("in time");
                let message = message.expect("the channel lives").expect("a message");
                assert_eq!(message.data::<u32>().expect("a number"), number);
            }
        }
    }
}
