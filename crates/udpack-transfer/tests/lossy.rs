//! Uploads over a network that loses, delays, swaps and repeats datagrams, goes away for a while, or changes
//! the client's address: every file arrives whole, and is reported once.

mod common;
#[path = "common/relay.rs"]
mod relay;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{TOKEN, bounded, memory, noise};
use relay::{Faults, Relay, Way};
use tempfile::TempDir;
use tokio::time::Instant;
use udpack::{
    Client, Deny, Hello, Identity, Limits, Peer, Reconnect, Server, Socket, SocketState, Timeouts,
};
use udpack_transfer::{
    Downloader, Event, Link, Receiver, ReceiverConfig, Remote, Scope, Source, Store, StoreConfig,
    Upload, Uploader, Wanted,
};

/// A free port of this machine.
const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

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
        self.serve_at(ANY).await
    }

    async fn serve_at(&self, address: SocketAddr) -> Server {
        self.serve_with(address, ReceiverConfig::default()).await
    }

    async fn serve_with(&self, address: SocketAddr, config: ReceiverConfig) -> Server {
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
        Receiver::new(store, config)
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

    /// An uploader that comes back.
    fn uploader(&self, relay: &Relay) -> Uploader {
        Uploader::new(Link::new(self.client(), relay.addr()))
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

    /// Writes them below this directory.
    fn put_into(&self, root: &Path) {
        for (path, bytes) in &self.0 {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
            std::fs::write(path, bytes).expect("a file");
        }
    }

    fn sources(&self) -> Vec<Source> {
        self.0
            .iter()
            .map(|(path, bytes)| memory(path, bytes.clone()))
            .collect()
    }

    /// Runs an upload of them to its end: each is done, once.
    async fn arrive(&self, mut upload: Upload) -> Seen {
        self.rest(&mut upload, Seen::default()).await
    }

    /// The same for an upload that is under way, some of which has been seen.
    async fn rest(&self, upload: &mut Upload, mut seen: Seen) -> Seen {
        while let Some(event) = upload.next().await {
            self.note(event, &mut seen);
        }
        assert!(seen.done.values().all(|times| *times == 1), "{seen:?}");
        assert_eq!(seen.done.len(), self.0.len(), "{seen:?}");
        let progress = upload.progress();
        assert_eq!(progress.acked, progress.total, "{progress:?}");
        assert_eq!(progress.files_done, progress.files, "{progress:?}");
        seen
    }

    /// Waits until some, but far from all bytes have arrived.
    async fn under_way(&self, upload: &mut Upload) -> Seen {
        let mut seen = Seen::default();
        while upload.progress().acked < 512 << 10 {
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
                seen.resumed += outcome.resumed;
                *seen.done.entry(outcome.path).or_insert(0) += 1;
            }
            Event::Failed { path, error, .. } => panic!("{path}: {error}"),
            Event::Reconnecting { .. } => seen.reconnecting += 1,
            Event::Connected => seen.connected += 1,
            _ => {}
        }
    }
}

/// What an upload has told.
#[derive(Debug, Default)]
struct Seen {
    /// How often each file was reported done.
    done: BTreeMap<String, u32>,
    /// Bytes that were not sent again.
    resumed: u64,
    reconnecting: u32,
    connected: u32,
}

impl Seen {
    /// Whether all of it went over one connection.
    fn undisturbed(&self) -> bool {
        (self.reconnecting, self.connected) == (0, 0)
    }
}

/// One cell of the matrix.
async fn cell(seed: u64, way: Way, sizes: &[usize]) {
    let site = Site::new(patient());
    let server = site.serve().await;
    let relay = Relay::start(server.local_addr(), Faults::both(seed, way)).await;
    let files = Files::new(seed, sizes);
    let upload = site.uploader(&relay).lanes(3).put(files.sources());
    let seen = files.arrive(upload).await;
    site.check(&files);
    assert!(seen.undisturbed(), "{seen:?}");
    let tally = relay.tally();
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

/// A way on which the files below take two seconds, without loss.
fn slow() -> Way {
    Way {
        delay: Duration::from_millis(20),
        rate: 4 << 20,
        ..Way::default()
    }
}

fn a_few(seed: u64) -> Files {
    Files::new(seed, &[0, 1, 7 * MIB, MIB, 64 * KIB])
}

#[tokio::test]
async fn two_seconds_of_nothing_are_survived_on_the_same_connection() {
    bounded(async {
        let site = Site::new(Timeouts::default());
        let server = site.serve().await;
        let relay = Relay::start(server.local_addr(), Faults::both(5, slow())).await;
        let files = a_few(5);
        let mut upload = site.uploader(&relay).put(files.sources());
        let seen = files.under_way(&mut upload).await;
        relay.blackhole_for(Duration::from_secs(2)).await;
        assert!(relay.tally().swallowed > 0, "nothing was on its way");
        let seen = files.rest(&mut upload, seen).await;
        site.check(&files);
        assert!(seen.undisturbed(), "{seen:?}");
        assert_eq!(relay.clients(), 1);
    })
    .await;
}

/// Cuts the way for longer than the idle time: the upload comes back over a new connection and goes on where
/// it was.
async fn longer_than_idle(timeouts: Timeouts, cut: Duration) {
    let site = Site::new(timeouts);
    let server = site.serve().await;
    let relay = Relay::start(server.local_addr(), Faults::both(6, slow())).await;
    let files = a_few(6);
    let mut upload = site.uploader(&relay).put(files.sources());
    let seen = files.under_way(&mut upload).await;
    let cut = relay.blackhole_for(cut);
    let (seen, ()) = tokio::join!(files.rest(&mut upload, seen), cut);
    site.check(&files);
    assert!(seen.reconnecting > 0 && seen.connected > 0, "{seen:?}");
    assert!(seen.resumed > 0, "{seen:?}");
    assert!(relay.clients() > 1);
}

#[tokio::test]
async fn a_cut_longer_than_the_idle_time_is_made_good() {
    let timeouts = Timeouts {
        idle: Duration::from_secs(3),
        keep_alive: Duration::from_secs(1),
        handshake: Duration::from_secs(2),
        ..Timeouts::default()
    };
    bounded(longer_than_idle(timeouts, Duration::from_secs(4))).await;
}

#[tokio::test]
async fn a_cut_of_35_seconds_is_made_good() {
    let cut = longer_than_idle(Timeouts::default(), Duration::from_secs(35));
    tokio::time::timeout(Duration::from_secs(120), cut)
        .await
        .expect("the test takes at most 120 s");
}

#[tokio::test]
async fn a_new_address_of_the_client_keeps_the_connection() {
    bounded(async {
        let site = Site::new(Timeouts::default());
        let server = site.serve().await;
        let relay = Relay::start(server.local_addr(), Faults::both(7, slow())).await;
        let files = a_few(7);
        let mut upload = site.uploader(&relay).put(files.sources());
        let seen = files.under_way(&mut upload).await;
        let before = server.sockets()[0].remote_address();
        relay.rebind();
        let seen = files.rest(&mut upload, seen).await;
        site.check(&files);
        assert!(seen.undisturbed(), "{seen:?}");
        let sockets = server.sockets();
        assert_eq!(sockets.len(), 1, "one client, one socket");
        assert_ne!(sockets[0].remote_address(), before, "the address changed");
        assert_eq!(relay.clients(), 1);
    })
    .await;
}

/// A server in a thread and a runtime of its own, so that it can end without a word to its clients.
struct Victim {
    kill: tokio::sync::oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
    address: SocketAddr,
}

impl Victim {
    fn start(site: &Arc<Site>, address: SocketAddr) -> Self {
        let (tell, told) = std::sync::mpsc::channel();
        let (kill, killed) = tokio::sync::oneshot::channel::<()>();
        let site = site.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let server = runtime.block_on(async {
                let server = site.serve_at(address).await;
                tell.send(server.local_addr()).expect("the test waits");
                let _ = killed.await;
                server
            });
            // Everything that could still send a packet goes first.
            drop(runtime);
            drop(server);
        });
        let address = told.recv().expect("the server starts");
        Self {
            kill,
            thread,
            address,
        }
    }

    fn kill(self) {
        self.kill.send(()).expect("the server runs");
        self.thread.join().expect("the server's thread");
    }
}

#[tokio::test]
async fn a_restart_of_the_server_is_made_good() {
    bounded(async {
        let site = Arc::new(Site::new(Timeouts::default()));
        let victim = Victim::start(&site, ANY);
        let relay = Relay::start(victim.address, Faults::both(8, slow())).await;
        let files = a_few(8);
        let mut upload = site.uploader(&relay).put(files.sources());
        let seen = files.under_way(&mut upload).await;
        let (address, begun) = (victim.address, Instant::now());
        victim.kill();
        let _server = site.serve_at(address).await;
        let seen = files.rest(&mut upload, seen).await;
        site.check(&files);
        assert!(seen.reconnecting > 0 && seen.connected > 0, "{seen:?}");
        assert!(seen.resumed > 0, "{seen:?}");
        // Two seconds is what the files take; the idle time would add thirty.
        assert!(begun.elapsed() < Duration::from_secs(15), "{begun:?}");
    })
    .await;
}

/// So slow a way that a lane gets less than the least a frame must grow by: chunks must get small, or nothing
/// would ever arrive.
#[tokio::test]
async fn half_a_kilobyte_a_second_for_each_lane_is_enough() {
    let site = Site::new(Timeouts::default());
    let server = site.serve().await;
    let way = Way {
        delay: Duration::from_millis(20),
        rate: 4 << 10,
        ..Way::default()
    };
    let relay = Relay::start(server.local_addr(), Faults::both(9, way)).await;
    let files = Files::new(9, &[24 * KIB; 6]);
    let upload = site.uploader(&relay).lanes(6).put(files.sources());
    let seen = tokio::time::timeout(Duration::from_secs(120), files.arrive(upload))
        .await
        .expect("the test takes at most 120 s");
    site.check(&files);
    assert!(seen.undisturbed(), "{seen:?}");
}

/// The first link, loopback, takes far larger datagrams than the way behind it. That becomes narrower still, down
/// to what QUIC counts on, and wider than it ever was.
#[tokio::test]
async fn the_way_may_be_narrower_than_its_first_link_and_change() {
    let site = Site::new(Timeouts::default());
    let server = site.serve().await;
    let way = Way {
        delay: Duration::from_millis(5),
        ..Way::default()
    };
    let relay = Relay::start(server.local_addr(), Faults::both(10, way)).await;
    for (seed, widest) in [(10, 1472), (11, 1200), (12, 9000)] {
        relay.narrow(widest);
        let files = Files::new(seed, &[3000 * KIB + seed as usize; 2]);
        let upload = site.uploader(&relay).lanes(2).put(files.sources());
        let seen = tokio::time::timeout(Duration::from_secs(60), files.arrive(upload))
            .await
            .expect("the test takes at most 60 s");
        site.check(&files);
        assert!(seen.undisturbed(), "{seen:?}");
    }
    assert!(relay.tally().large > 0, "{:?}", relay.tally());
}

/// A socket that reconnects.
async fn reconnecting(site: &Site, relay: &Relay) -> Socket {
    Client::builder()
        .pin(site.identity.fingerprint())
        .token(TOKEN)
        .timeouts(site.timeouts.clone())
        .limits(Limits {
            send_window: 1 << 20,
            ..Limits::default()
        })
        .reconnect(Reconnect::default())
        .connect(&relay.addr())
        .await
        .expect("it is let in")
}

/// Nothing passes until this socket has noticed.
async fn cut(relay: &Relay, socket: &Socket) {
    let mut states = socket.states();
    relay.blackhole(true);
    while !matches!(states.next().await, Some(SocketState::Reconnecting { .. })) {}
    relay.blackhole(false);
}

/// A socket that reconnects takes its uploads and questions along.
#[tokio::test]
async fn transfers_over_a_socket_go_on_when_it_reconnects() {
    bounded(async {
        let site = Site::new(Timeouts {
            idle: Duration::from_secs(2),
            keep_alive: Duration::from_millis(500),
            ..Timeouts::default()
        });
        let server = site.serve().await;
        let way = Way {
            rate: 4 << 20,
            ..Way::default()
        };
        let relay = Relay::start(server.local_addr(), Faults::both(7, way)).await;
        let socket = reconnecting(&site, &relay).await;
        let cut = async |socket: &Socket| cut(&relay, socket).await;
        let files = Files::new(7, &[5 * MIB, 5 * MIB, 300_000, 1000, 0]);
        let mut upload = Uploader::new(&socket).lanes(2).put(files.sources());
        let seen = files.under_way(&mut upload).await;
        let (seen, ()) = tokio::join!(files.rest(&mut upload, seen), cut(&socket));
        site.check(&files);
        assert!(seen.resumed > 0, "{seen:?}");
        assert_eq!(socket.close_reason(), None);

        // What is begun afterwards, and what is begun while there is no connection.
        let files = Files::new(8, &[2 * MIB, 2 * MIB, 1000]);
        files
            .arrive(Uploader::new(&socket).put(files.sources()))
            .await;
        let files = Files::new(9, &[MIB, 1000]);
        let begun = async {
            let mut states = socket.states();
            while !matches!(states.next().await, Some(SocketState::Reconnecting { .. })) {}
            files
                .arrive(Uploader::new(&socket).put(files.sources()))
                .await
        };
        tokio::join!(begun, cut(&socket));
        site.check(&files);

        let remote = Remote::new(&socket);
        let path = common::rel("d0/0-1048576.bin");
        let (entry, ()) = tokio::join!(remote.stat(Some(&path)), cut(&socket));
        // The answer to a token without the right: it was asked, and has been heard.
        let refused = entry.expect_err("no right to read").to_string();
        assert!(refused.contains("no right to read"), "{refused}");
        server.close(udpack::CloseCode::NORMAL, "").await;
        let over = Uploader::new(&socket).put(files.sources());
        let (done, failed) = common::drain(over).await;
        assert!(done.is_empty(), "{done:?}");
        assert_eq!(failed.len(), 2, "the socket is over, and says so");
    })
    .await;
}

/// And its downloads.
#[tokio::test]
async fn downloads_over_a_socket_go_on_when_it_reconnects() {
    bounded(async {
        let site = Site::new(Timeouts {
            idle: Duration::from_secs(2),
            keep_alive: Duration::from_millis(500),
            ..Timeouts::default()
        });
        let readable = ReceiverConfig {
            default_scope: Scope {
                read: true,
                ..Scope::default()
            },
            ..ReceiverConfig::default()
        };
        let server = site.serve_with(ANY, readable).await;
        let way = Way {
            rate: 4 << 20,
            ..Way::default()
        };
        let relay = Relay::start(server.local_addr(), Faults::both(11, way)).await;
        let socket = reconnecting(&site, &relay).await;
        let here = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(here.path(), StoreConfig::default()).expect("a store");
        let wanted = |files: &Files| -> Vec<Wanted> {
            let one = |(path, bytes): (&String, &Vec<u8>)| Wanted {
                remote: common::rel(path),
                local: common::rel(path),
                size: Some(bytes.len() as u64),
            };
            files.0.iter().map(one).collect()
        };
        let check = |files: &Files, seen: &Seen| {
            assert!(seen.done.values().all(|times| *times == 1), "{seen:?}");
            assert_eq!(seen.done.len(), files.0.len(), "{seen:?}");
            for (path, bytes) in &files.0 {
                let stored = std::fs::read(here.path().join(path)).expect("the file is there");
                assert!(stored == *bytes, "{path} differs");
            }
        };

        let files = Files::new(20, &[5 * MIB, 5 * MIB, 300_000, 1000, 0]);
        files.put_into(&site.root());
        let downloader = Downloader::new(&socket, store.clone()).lanes(2);
        let mut download = downloader.get(wanted(&files));
        let mut seen = Seen::default();
        while download.progress().acked < 512 << 10 {
            let event = download.next().await.expect("more is to come");
            files.note(event, &mut seen);
        }
        let progress = download.progress();
        assert!(progress.acked < progress.total / 2, "{progress:?}");
        let rest = async {
            while let Some(event) = download.next().await {
                files.note(event, &mut seen);
            }
        };
        tokio::join!(rest, cut(&relay, &socket));
        check(&files, &seen);
        assert!(seen.resumed > 0, "{seen:?}");
        assert_eq!(socket.close_reason(), None);

        // What is begun while there is no connection.
        let files = Files::new(30, &[MIB, 1000]);
        files.put_into(&site.root());
        let mut seen = Seen::default();
        let begun = async {
            let mut states = socket.states();
            while !matches!(states.next().await, Some(SocketState::Reconnecting { .. })) {}
            let mut download = Downloader::new(&socket, store.clone()).get(wanted(&files));
            while let Some(event) = download.next().await {
                files.note(event, &mut seen);
            }
        };
        tokio::join!(begun, cut(&relay, &socket));
        check(&files, &seen);
    })
    .await;
}
