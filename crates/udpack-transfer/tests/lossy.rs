//! Uploads over a network that loses, delays, swaps and repeats datagrams, goes away for a while, or changes
//! the client's address: every file arrives whole, and is reported once.

mod common;
#[path = "common/relay.rs"]
mod relay;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use common::{TOKEN, bounded, memory, noise};
use relay::{Faults, Relay, Way};
use tempfile::TempDir;
use tokio::time::Instant;
use udpack::{Client, CloseCode, Deny, Hello, Identity, Limits, Peer, Server, Socket, Timeouts};
use udpack_transfer::{
    ErrorKind, Event, Receiver, ReceiverConfig, Source, Store, StoreConfig, TransferError, Upload,
    Uploader,
};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// A handshake needs luck where one datagram in five is lost, each way.
fn patient() -> Timeouts {
    Timeouts {
        handshake: Duration::from_secs(30),
        auth: Duration::from_secs(30),
        ..Timeouts::default()
    }
}

/// A server that takes uploads and can be started again at the same place.
struct Site {
    identity: Identity,
    timeouts: Timeouts,
    dir: TempDir,
}

impl Site {
    fn new(timeouts: Timeouts) -> Self {
        Self {
            identity: Identity::generate().expect("a key"),
            timeouts,
            dir: tempfile::tempdir().expect("a temporary directory"),
        }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("up")
    }

    async fn serve(&self) -> Server {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let store = Store::open(self.root(), StoreConfig::default()).expect("a store");
        let server = Server::builder()
            .identity(self.identity.clone())
            .timeouts(self.timeouts.clone())
            .auth(|hello: Hello| async move {
                if hello.token() == TOKEN {
                    Ok(Peer::new("tester"))
                } else {
                    Err(Deny::auth_failed())
                }
            });
        Receiver::new(store, ReceiverConfig::default())
            .attach(server)
            .bind(address)
            .await
            .expect("the port is free")
    }

    /// A client; it buffers little, so that what it reports is near to what has arrived.
    fn client(&self) -> Client {
        Client::builder()
            .pin(self.identity.fingerprint())
            .token(TOKEN)
            .timeouts(self.timeouts.clone())
            .limits(Limits {
                send_window: 1 << 20,
                ..Limits::default()
            })
            .build()
            .expect("sound settings")
    }

    async fn connect(&self, relay: &Relay) -> Socket {
        let connected = self.client().connect(&relay.addr()).await;
        connected.expect("the server lets us in")
    }

    /// Asserts that what is stored under these names is what was sent.
    fn check(&self, files: &Files) {
        for (path, bytes) in &files.0 {
            let stored = std::fs::read(self.root().join(path)).expect("the file is there");
            assert!(stored == *bytes, "{path} differs");
        }
    }
}

/// Files to be sent, by name.
struct Files(BTreeMap<String, Vec<u8>>);

impl Files {
    fn new(seed: u64, sizes: &[usize]) -> Self {
        let file = |(n, size): (usize, &usize)| {
            let bytes = noise(seed + n as u64, *size);
            (format!("d{}/{n}-{size}.bin", n % 3), bytes)
        };
        Self(sizes.iter().enumerate().map(file).collect())
    }

    fn sources(&self) -> Vec<Source> {
        self.0
            .iter()
            .map(|(path, bytes)| memory(path, bytes.clone()))
            .collect()
    }

    /// Runs an upload of them to its end: each is done, once.
    async fn arrive(&self, mut upload: Upload) {
        self.rest(&mut upload, Seen::new()).await;
    }

    /// The same for an upload that is under way, some of whose files have been seen.
    async fn rest(&self, upload: &mut Upload, mut seen: Seen) {
        while let Some(event) = upload.next().await {
            self.note(event, &mut seen);
        }
        assert!(seen.values().all(|times| *times == 1), "{seen:?}");
        assert_eq!(seen.len(), self.0.len(), "{seen:?}");
    }

    /// Waits until some, but far from all bytes have arrived.
    async fn under_way(&self, upload: &mut Upload) -> Seen {
        let mut seen = Seen::new();
        while upload.progress().acked < 128 << 10 {
            let event = upload.next().await.expect("more is to come");
            self.note(event, &mut seen);
        }
        let progress = upload.progress();
        assert!(progress.acked < progress.total / 2, "{progress:?}");
        seen
    }

    fn note(&self, event: Event, seen: &mut Seen) {
        match event {
            Event::Done(outcome) => {
                let bytes = &self.0[&outcome.path];
                assert_eq!(outcome.size, bytes.len() as u64);
                assert_eq!(outcome.hash, *blake3::hash(bytes).as_bytes());
                *seen.entry(outcome.path).or_insert(0) += 1;
            }
            Event::Failed { path, error, .. } => panic!("{path}: {error}"),
            _ => {}
        }
    }
}

/// How often each file was reported done.
type Seen = BTreeMap<String, u32>;

/// One cell of the matrix.
async fn cell(seed: u64, way: Way, sizes: &[usize]) {
    let site = Site::new(patient());
    let server = site.serve().await;
    let relay = Relay::start(server.local_addr(), Faults::both(seed, way)).await;
    let begun = Instant::now();
    let socket = site.connect(&relay).await;
    let files = Files::new(seed, sizes);
    let upload = Uploader::new(&socket).lanes(3).put(files.sources());
    files.arrive(upload).await;
    site.check(&files);
    let tally = relay.tally();
    eprintln!("{way:?}: {:?}, {tally:?}", begun.elapsed());
    assert_eq!(tally.lost > 0, way.loss > 0.0, "{tally:?}");
    assert_eq!(tally.repeated > 0, way.duplicate > 0.0, "{tally:?}");
    assert_eq!(tally.held > 0, way.reorder > 0.0, "{tally:?}");
    assert_eq!(relay.clients(), 1, "nobody had to reconnect");
}

/// One row of the matrix: this loss on three kinds of way. What overtakes other datagrams looks like loss to the
/// congestion controller, so the last kind is slow and gets less to carry.
async fn row(seed: u64, loss: f64, sizes: &[usize]) {
    let near = Way {
        loss,
        ..Way::default()
    };
    let jittery = Way {
        delay: Duration::from_millis(10),
        jitter: Duration::from_millis(5),
        ..near
    };
    let far = Way {
        delay: Duration::from_millis(50),
        jitter: Duration::from_millis(10),
        duplicate: 0.05,
        reorder: 0.02,
        ..near
    };
    let small: Vec<_> = sizes.iter().map(|size| *size.min(&(128 * KIB))).collect();
    bounded(async {
        tokio::join!(
            cell(seed, near, sizes),
            cell(seed + 100, jittery, sizes),
            cell(seed + 200, far, &small),
        );
    })
    .await;
}

#[tokio::test]
async fn no_loss() {
    let sizes = [0, 1, 4 * KIB, 64 * KIB, 64 * KIB + 1, MIB, 3 * MIB];
    row(1, 0.0, &sizes).await;
}

#[tokio::test]
async fn one_percent_loss() {
    let sizes = [0, 1, 4 * KIB, 64 * KIB, 64 * KIB + 1, MIB, 3 * MIB];
    row(2, 0.01, &sizes).await;
}

#[tokio::test]
async fn five_percent_loss() {
    let sizes = [0, 1, 4 * KIB, 64 * KIB, 64 * KIB + 1, MIB];
    row(3, 0.05, &sizes).await;
}

#[tokio::test]
async fn twenty_percent_loss() {
    let sizes = [0, 1, 4 * KIB, 64 * KIB, 64 * KIB + 1];
    row(4, 0.2, &sizes).await;
}

/// A way on which a few MiB take a while, without loss.
fn slow() -> Way {
    Way {
        delay: Duration::from_millis(30),
        ..Way::default()
    }
}

#[tokio::test]
async fn two_seconds_of_nothing_are_survived_on_the_same_connection() {
    bounded(async {
        let site = Site::new(Timeouts::default());
        let server = site.serve().await;
        let relay = Relay::start(server.local_addr(), Faults::both(5, slow())).await;
        let socket = site.connect(&relay).await;
        let files = Files::new(5, &[0, 8 * MIB, MIB, 64 * KIB]);
        let mut upload = Uploader::new(&socket).put(files.sources());
        let seen = files.under_way(&mut upload).await;
        relay.blackhole_for(Duration::from_secs(2)).await;
        assert!(relay.tally().swallowed > 0, "nothing was on its way");
        files.rest(&mut upload, seen).await;
        site.check(&files);
        assert_eq!(relay.clients(), 1);
    })
    .await;
}

/// Cuts the way for longer than the idle time: both sides notice, files fail with a reason that says to try
/// again, and trying again brings them.
async fn longer_than_idle(timeouts: Timeouts, cut: Duration) {
    let idle = timeouts.idle;
    let site = Site::new(timeouts);
    let server = site.serve().await;
    let relay = Relay::start(server.local_addr(), Faults::both(6, slow())).await;
    let socket = site.connect(&relay).await;
    let files = Files::new(6, &[0, 8 * MIB, MIB, 64 * KIB]);
    let mut upload = Uploader::new(&socket).put(files.sources());
    let _ = files.under_way(&mut upload).await;
    let begun = Instant::now();
    let failing = async {
        let mut failed = 0;
        while let Some(event) = upload.next().await {
            if let Event::Failed { error, .. } = event {
                assert!(
                    matches!(&error, TransferError::Closed(reason)
                        if reason.code == CloseCode::TIMED_OUT && reason.retry),
                    "{error}"
                );
                assert_eq!((error.kind(), error.retry()), (ErrorKind::Network, true));
                failed += 1;
            }
        }
        assert!(failed > 0);
        begun.elapsed()
    };
    let (noticed, ()) = tokio::join!(failing, relay.blackhole_for(cut));
    assert!(noticed < idle + idle / 2, "{noticed:?}");
    let socket = site.connect(&relay).await;
    let upload = Uploader::new(&socket).put(files.sources());
    files.arrive(upload).await;
    site.check(&files);
    assert_eq!(relay.clients(), 2);
}

#[tokio::test]
async fn a_cut_longer_than_the_idle_time_is_noticed_and_made_good() {
    let timeouts = Timeouts {
        idle: Duration::from_secs(3),
        keep_alive: Duration::from_secs(1),
        ..Timeouts::default()
    };
    bounded(longer_than_idle(timeouts, Duration::from_secs(4))).await;
}

#[tokio::test]
#[ignore = "35 s"]
async fn a_cut_of_35_seconds_is_noticed_and_made_good() {
    bounded(longer_than_idle(
        Timeouts::default(),
        Duration::from_secs(35),
    ))
    .await;
}

#[tokio::test]
async fn a_new_address_of_the_client_keeps_the_connection() {
    bounded(async {
        let site = Site::new(Timeouts::default());
        let server = site.serve().await;
        let relay = Relay::start(server.local_addr(), Faults::both(7, slow())).await;
        let socket = site.connect(&relay).await;
        let before = server.sockets()[0].remote_address();
        let files = Files::new(7, &[0, 8 * MIB, MIB, 64 * KIB]);
        let mut upload = Uploader::new(&socket).put(files.sources());
        let seen = files.under_way(&mut upload).await;
        relay.rebind();
        files.rest(&mut upload, seen).await;
        site.check(&files);
        let sockets = server.sockets();
        assert_eq!(sockets.len(), 1, "one client, one socket");
        assert_ne!(sockets[0].remote_address(), before, "the address changed");
        assert_eq!((relay.clients(), socket.close_reason()), (1, None));
    })
    .await;
}
