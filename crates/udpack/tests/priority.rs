//! Priorities end to end: both sides know them, and small messages find room beside a bulk channel.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{bind, bounded, client, connect, server};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use udpack::{Channel, Context, Fault, Limits, Priority, RecvError};

/// Bytes that a client with this send window may have under way on its bulk channels: half of it, and one turn
/// of writing that had begun.
const SEND_WINDOW: u64 = 4 << 20;
const UNDER_WAY: u64 = SEND_WINDOW / 2 + (64 << 10);

/// Passes datagrams on between one client and a server, while it is not cut.
struct Relay {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    _tasks: JoinSet<()>,
}

impl Relay {
    async fn to(server: SocketAddr) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let back = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        back.connect(server).await.expect("loopback");
        let address = front.local_addr().expect("bound");
        let cut = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        let is_cut = cut.clone();
        tasks.spawn(async move {
            let (mut there, mut here) = (vec![0; 65_536], vec![0; 65_536]);
            let mut client = None;
            loop {
                tokio::select! {
                    Ok((len, from)) = front.recv_from(&mut there) => {
                        client = Some(from);
                        if !is_cut.load(Ordering::Relaxed) {
                            let _ = back.send(&there[..len]).await;
                        }
                    }
                    Ok(len) = back.recv(&mut here) => {
                        if let Some(client) = client && !is_cut.load(Ordering::Relaxed) {
                            let _ = front.send_to(&here[..len], client).await;
                        }
                    }
                }
            }
        });
        Self {
            address,
            cut,
            _tasks: tasks,
        }
    }
}

/// Looks again and again until `done`.
async fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn both_ends_know_what_the_opener_chose() {
    bounded(async {
        let server = bind(server()).await;
        let socket = connect(&server).await;
        let accepted = server.accept().await.expect("one socket");
        for priority in [Priority::Bulk, Priority::Normal, Priority::High] {
            let opened = socket
                .channel("any")
                .priority(priority)
                .meta(&7_u8)
                .open()
                .await
                .expect("a channel");
            assert_eq!(opened.priority(), priority);
            let taken = accepted.accept_channel().await.expect("the channel");
            assert_eq!((taken.name(), taken.priority()), ("any", priority));
            assert_eq!(taken.meta::<u8>().expect("a number"), Some(7));
        }
        let plain = socket.open("any").await.expect("a channel");
        assert_eq!(plain.priority(), Priority::Normal);
        let taken = accepted.accept_channel().await.expect("the channel");
        assert_eq!(taken.priority(), Priority::Normal);
        assert_eq!(taken.meta::<u8>().expect("nothing"), None);
    })
    .await;
}

#[tokio::test]
async fn small_messages_find_room_beside_a_saturating_bulk_channel() {
    bounded(async {
        let received = Arc::new(AtomicU64::new(0));
        let (count, look) = (received.clone(), received.clone());
        let builder = server()
            .channel("bulk", move |channel: Channel| {
                let count = count.clone();
                async move {
                    while let Some(message) = channel.recv().await? {
                        count.fetch_add(message.len() as u64, Ordering::Relaxed);
                    }
                    Ok::<_, RecvError>(())
                }
            })
            .channel("high", move |channel: Channel| {
                let look = look.clone();
                async move {
                    channel
                        .on("ask", move |(): (), _: Context| {
                            let seen = look.load(Ordering::Relaxed);
                            async move { Ok::<_, Fault>(seen) }
                        })
                        .run()
                        .await
                }
            });
        let server = bind(builder).await;
        let relay = Relay::to(server.local_addr()).await;
        let socket = client(&server)
            .limits(Limits {
                send_window: SEND_WINDOW,
                ..Limits::default()
            })
            .connect(&relay.address.to_string())
            .await
            .expect("the server lets us in");
        let high = socket
            .channel("high")
            .priority(Priority::High)
            .open()
            .await
            .expect("a channel");
        let bulk = socket
            .channel("bulk")
            .priority(Priority::Bulk)
            .open()
            .await
            .expect("a channel");
        let mut sending = JoinSet::new();
        let sender = bulk.clone();
        sending.spawn(async move {
            let block = Bytes::from(vec![7; 64 << 10]);
            let header = std::collections::BTreeMap::<String, u8>::new();
            while sender
                .send_bulk("block", &header, "bytes", block.clone())
                .await
                .is_ok()
            {}
        });
        until(|| received.load(Ordering::Relaxed) > UNDER_WAY).await;

        for _ in 0..50 {
            let before = received.load(Ordering::Relaxed);
            let seen: u64 = high.request("ask", &()).await.expect("an answer");
            let passed = seen - before;
            assert!(passed <= 2 * UNDER_WAY, "{passed} bulk bytes went first");
        }
        let moved = received.load(Ordering::Relaxed);
        until(|| received.load(Ordering::Relaxed) > moved).await;

        // Nothing is acknowledged any more: the bulk channel comes to a halt and leaves room.
        relay.cut.store(true, Ordering::Relaxed);
        let (mut halted, mut last) = (0, 0);
        while halted < 20 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let now = bulk.stats().sent + received.load(Ordering::Relaxed);
            halted = if now == last { halted + 1 } else { 0 };
            last = now;
        }
        let (sent, before) = (bulk.stats().sent, received.load(Ordering::Relaxed));
        assert!(bulk.queued_bytes() > 0, "the bulk channel has more to send");
        let under_way = sent - before;
        assert!(under_way <= UNDER_WAY, "{under_way} bytes are under way");
        let request = high.request::<_, u64>("ask", &());
        let asking = tokio::spawn(async move { request.await });
        let asked = high.stats().sent;
        until(|| high.stats().sent > asked && high.queued_bytes() == 0).await;
        assert_eq!(bulk.stats().sent, sent, "no bulk byte was taken before it");

        relay.cut.store(false, Ordering::Relaxed);
        let seen = asking.await.expect("no panic").expect("an answer");
        let passed = seen - before;
        assert!(passed <= UNDER_WAY, "{passed} bulk bytes went first");
        until(|| received.load(Ordering::Relaxed) > sent).await;
        sending.shutdown().await;
    })
    .await;
}
