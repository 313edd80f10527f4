//! A transfer on a network that stops to let UDP pass, and lets it pass again.

mod common;

use std::time::Duration;

use common::{memory, noise};
use udpack::testing::{self, Net};
use udpack::{Limits, Timeouts, Transport, TransportChoice, TransportReason};
use udpack_transfer::{
    Event, Limiter, Link, Receiver, ReceiverConfig, Store, StoreConfig, Uploader,
};

/// Bytes of each file.
const SIZE: usize = 200_000;

/// UDP is blocked in the middle of an upload, and passes again as soon as the upload goes on over TCP. The clock is the real one,
/// because files are written meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_over_to_tcp_and_back_with_udp_and_loses_nothing() {
    let uploaded = tokio::time::timeout(Duration::from_secs(180), upload());
    uploaded.await.expect("it ends");
}

async fn upload() {
    let net = Net::new(1).delay(Duration::from_millis(5));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let root = dir.path().join("up");
    let store = Store::open(&root, StoreConfig::default()).expect("a store");
    let timeouts = Timeouts {
        // So that a dead path is found soon.
        keep_alive: Duration::from_millis(500),
        idle: Duration::from_secs(2),
        ..Timeouts::default()
    };
    let server = testing::server().timeouts(timeouts.clone());
    let server = Receiver::new(store, ReceiverConfig::default()).attach(server);
    let server = net.bind(server).await.expect("an address");
    let client = testing::client(&server)
        .timeouts(timeouts)
        .limits(Limits {
            send_window: 1 << 20,
            ..Limits::default()
        })
        .transport(TransportChoice::Auto);
    let client = net.attach(client).build().expect("sound settings");
    let link = Link::new(client, server.local_addr().to_string());
    // As many files as it takes: one more for each that is stored, until it has been enough.
    let (more, numbers) = std::sync::mpsc::channel();
    (0..8).for_each(|number| more.send(number).expect("it listens"));
    let mut more = Some((more, 8));
    let sources = numbers
        .into_iter()
        .map(|number: u64| memory(&format!("{number}.bin"), noise(number, SIZE)));
    let uploader = Uploader::new(&link).limit(Limiter::new(2_000_000));
    let mut upload = uploader.put(sources);
    let mut changes = Vec::new();
    let mut stored = Vec::new();
    while let Some(event) = upload.next().await {
        match event {
            Event::Done(outcome) => {
                stored.push(outcome.index);
                if let Some((more, next)) = &mut more {
                    more.send(*next).expect("it listens");
                    *next += 1;
                }
                if stored.len() == 5 {
                    net.block_udp(true);
                }
            }
            Event::TransportChanged { to, why } => {
                changes.push((to, why));
                net.block_udp(false);
                if changes.len() == 2 {
                    more = None;
                }
            }
            Event::Failed { path, error, .. } => panic!("{path}: {error}"),
            _ => {}
        }
    }
    let expected = [
        (
            Transport::WebSocket { origin: None },
            TransportReason::UdpBlocked,
        ),
        (Transport::Quic, TransportReason::UdpPassesAgain),
    ];
    assert_eq!(changes, expected);
    stored.sort_unstable();
    let all: Vec<_> = (0..stored.len()).collect();
    assert_eq!(stored, all, "each is told once");
    let found = std::fs::read_dir(&root).expect("the store").flatten();
    let found = found.filter(|entry| entry.file_name().as_encoded_bytes().ends_with(b".bin"));
    assert_eq!(found.count(), stored.len(), "none twice");
    for number in stored {
        let bytes = std::fs::read(root.join(format!("{number}.bin"))).expect("it is there");
        assert!(bytes == noise(number as u64, SIZE), "{number}");
    }
    assert_eq!(
        link.live().map(|socket| socket.transport()),
        Some(Transport::Quic)
    );
}
