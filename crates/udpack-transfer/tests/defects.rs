//! The defects of the protocol's ancestor in uploading, each as a test that its successor does not have it.
//!
//! The doc comment of a test says what the ancestor did.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Fixture, TOKEN, bounded, drain, memory, noise, rel};
use raw::{RawLane, V, chunk, file, finish, map, short_chunk, short_file, short_finish, with};
use serde::Serialize;
use udpack::{Channel, Client, CloseCode, Hello, Identity, Limits, Peer, Server, Socket, Timeouts};
use udpack_transfer::{
    ErrorKind, Event, Limiter, Receiver, ReceiverConfig, Source, Store, StoreConfig, TransferError,
    Uploader,
};

const MIB: usize = 1 << 20;

/// A server over this receiver that also has an echo for messages.
async fn serve(receiver: &Receiver, limits: Limits) -> Server {
    let server = Server::builder()
        .identity(Identity::generate().expect("a key"))
        .auth(|_: Hello| async { Ok(Peer::new("tester")) })
        .limits(limits)
        .channel("echo", |channel: Channel| async move {
            while let Some(message) = channel.recv().await? {
                let text: String = message.data().unwrap_or_default();
                let _ = channel.reply(&message, &text).await;
            }
            Ok::<(), udpack::RecvError>(())
        });
    let server = receiver.attach(server).bind("127.0.0.1:0").await;
    server.expect("a free port")
}

async fn connect(server: &Server, timeouts: Timeouts) -> Socket {
    Client::builder()
        .pin(server.fingerprint())
        .token(TOKEN)
        .timeouts(timeouts)
        .connect(&server.local_addr().to_string())
        .await
        .expect("the server lets us in")
}

/// Descriptors of this process that are open below a directory.
fn open_below(dir: &Path) -> usize {
    let dir = dir.canonicalize().expect("a directory");
    let links = fs::read_dir("/proc/self/fd").expect("descriptors");
    links
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.starts_with(&dir))
        .count()
}

/// Waits until something holds.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// B9: `connection` fired again after a reconnect and began the upload anew on top of the old one: the sent
/// count was not reset, the file truncated, more than 100 % shown.
#[tokio::test]
async fn b09_after_a_lost_connection_the_upload_can_be_made_again_and_is_whole() {
    bounded(async {
        let fixture = Fixture::new().await;
        let bytes = noise(9, 64 * MIB);
        let socket = fixture.connect().await;
        let mut upload = Uploader::new(&socket)
            .resume(false)
            .put(vec![memory("big", bytes.clone())]);
        let mut look = tokio::time::interval(Duration::from_millis(1));
        let staging = fixture.root().join(".udpack/staging");
        let mut lost = false;
        loop {
            tokio::select! {
                event = upload.next() => match event {
                    Some(Event::Failed { error, .. }) => {
                        assert_eq!(error.kind(), ErrorKind::Network, "{error}");
                        lost = true;
                    }
                    Some(Event::Done(_)) => panic!("the connection was cut before the end"),
                    Some(_) => {}
                    None => break,
                },
                // Cut as soon as some of it is on the disk.
                _ = look.tick() => {
                    let staged = fs::read_dir(&staging).expect("a directory").flatten();
                    let sizes = staged.filter_map(|part| Some(part.metadata().ok()?.len()));
                    if sizes.sum::<u64>() > 0 {
                        socket.abort(CloseCode::new(0x1001), "cut");
                    }
                }
            }
        }
        assert!(lost);
        fixture.settled().await;
        assert!(fixture.visible().is_empty());
        // `drain` sees to it that progress never goes down nor beyond 100 %.
        let socket = fixture.connect().await;
        let source = memory("big", bytes.clone());
        let (done, failed) = drain(Uploader::new(&socket).put(vec![source])).await;
        assert!(failed.is_empty(), "{failed:?}");
        // What the server has of it need not be sent again.
        assert!(done[0].sent <= bytes.len() as u64);
        assert!(fixture.stored("big") == bytes, "other bytes");
    })
    .await;
}

/// B11: the client's `filename` was used as a path: any file of the machine could be written.
#[tokio::test]
async fn b11_a_filename_does_not_lead_out_of_the_root() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let outside = fixture.dir.path().join("outside");
        fs::write(&outside, "as it was").expect("a file");
        let absolute = outside.to_string_lossy().into_owned();
        let mut lane = RawLane::open(&socket).await;
        for name in ["../outside", "a/../../outside", &absolute, ".", "a/.."] {
            lane.say(&short_file(name, 4)).await;
            lane.say(&short_chunk(b"evil")).await;
            lane.say(&short_finish()).await;
            assert_eq!(lane.hear().await.line, "error 0 bad_name", "{name}");
        }
        assert_eq!(fs::read(&outside).expect("it"), b"as it was");
        assert!(fixture.visible().is_empty());
        assert_eq!(fs::read_dir(fixture.dir.path()).expect("it").count(), 2);
        fixture.settled().await;
    })
    .await;
}

/// B12: the count of received bytes was one global: clients at the same time counted into each other's.
#[tokio::test]
async fn b12_clients_at_the_same_time_have_their_own_counts() {
    bounded(async {
        let fixture = Fixture::new().await;
        let mut clients = Vec::new();
        for n in 0..8_u64 {
            let socket = fixture.connect().await;
            let bytes = noise(n, 5 * (n as usize + 1) * 1000);
            let mut lane = RawLane::open(&socket).await;
            let (event, offer) = file(1, &format!("c{n}"), bytes.len() as u64);
            lane.say(&(event, with(offer, "resume", true))).await;
            assert_eq!(lane.hear().await.line, "ready 1 0");
            clients.push((socket, lane, bytes));
        }
        // In turns, a fifth each; the same id everywhere.
        for part in 0..5 {
            for (_, lane, bytes) in &clients {
                let len = bytes.len() / 5;
                let piece = &bytes[part * len..(part + 1) * len];
                lane.say(&chunk(1, (part * len) as u64, piece)).await;
            }
            for (_, lane, bytes) in &mut clients {
                lane.acked(1, ((part + 1) * (bytes.len() / 5)) as u64).await;
            }
        }
        for (n, (_, lane, bytes)) in clients.iter_mut().enumerate() {
            lane.say(&finish(1, bytes)).await;
            let expected = format!("done 1 c{n} {}", bytes.len());
            assert_eq!(lane.hear().await.line, expected);
            assert!(
                fixture.stored(&format!("c{n}")) == *bytes,
                "c{n}: other bytes"
            );
        }
    })
    .await;
}

#[derive(Serialize)]
struct At {
    id: u64,
    off: u64,
}

/// A runtime whose only thread for the disk is busy until told otherwise: a disk that has stopped.
struct StoppedDisk {
    runtime: tokio::runtime::Runtime,
}

impl StoppedDisk {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        Self { runtime }
    }

    /// Stops the disk; dropping the sender lets it go on.
    async fn stop() -> std::sync::mpsc::Sender<()> {
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let (busy, is_busy) = tokio::sync::oneshot::channel();
        tokio::task::spawn_blocking(move || {
            let _ = busy.send(());
            let _ = wait.recv();
        });
        is_busy.await.expect("the thread for the disk");
        release
    }
}

fn small_windows() -> Limits {
    Limits {
        stream_window: MIB as u32,
        connection_window: 4 * MIB as u32,
        ..Limits::default()
    }
}

/// B13: nobody waited for the disk: a slow one let received chunks pile up in memory without bound.
#[test]
fn b13_a_disk_that_has_stopped_stops_the_sender_and_nobody_else() {
    const CHUNK: usize = 256 << 10;
    const TOTAL: usize = 64 * MIB;
    // The peer's stream window, our own queue and what may lie between the two, the eight chunks and the one
    // that wait for the disk.
    const BOUND: usize = MIB + (MIB + CHUNK) + 9 * CHUNK + MIB;
    let disk = StoppedDisk::new();
    disk.runtime.block_on(bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path().join("up"), StoreConfig::default()).expect("a store");
        let receiver = Receiver::new(store, ReceiverConfig::default());
        let server = serve(&receiver, small_windows()).await;
        let timeouts = Timeouts {
            slow_peer: Duration::from_secs(60),
            ..Timeouts::default()
        };
        let socket = connect(&server, timeouts).await;
        let mut lane = RawLane::open(&socket).await;
        lane.say(&file(1, "x", TOTAL as u64)).await;
        lane.say(&chunk(1, 0, &noise(13, CHUNK))).await;
        lane.acked(1, CHUNK as u64).await;

        let release = StoppedDisk::stop().await;
        let piece = Bytes::from(noise(13, CHUNK));
        let sent = Arc::new(AtomicU64::new(CHUNK as u64));
        let sending = {
            let (channel, piece, sent) = (lane.channel.clone(), piece.clone(), sent.clone());
            tokio::spawn(async move {
                for n in 1..TOTAL / CHUNK {
                    let at = At {
                        id: 1,
                        off: (n * CHUNK) as u64,
                    };
                    channel
                        .send_bulk("chunk", &at, "chunk", piece.clone())
                        .await
                        .expect("a lane");
                    sent.fetch_add(CHUNK as u64, Ordering::Relaxed);
                }
            })
        };
        // It stops: the same count, with a full queue, for a hundred looks.
        let (mut last, mut same) = (0, 0);
        while same < 100 {
            let now = sent.load(Ordering::Relaxed);
            let full = lane.channel.queued_bytes() > 0;
            same = if now == last && full { same + 1 } else { 0 };
            last = now;
            assert!(
                !sending.is_finished(),
                "everything was taken though nothing could be stored"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(last > MIB as u64, "the windows must fill: {last}");
        assert!(
            last < BOUND as u64,
            "{last} bytes were taken, at most {BOUND} can wait"
        );
        // Messages go on beside it, on the same socket.
        let echo = socket.open("echo").await.expect("a channel");
        for n in 0..20 {
            let text = format!("message {n}");
            let back: String = echo.request("say", &text).await.expect("an answer");
            assert_eq!(back, text);
        }
        assert_eq!(sent.load(Ordering::Relaxed), last, "still stopped");

        drop(release);
        sending.await.expect("the rest is taken");
        let bytes = noise(13, CHUNK).repeat(TOTAL / CHUNK);
        lane.say(&finish(1, &bytes)).await;
        assert_eq!(lane.hear().await.line, format!("done 1 x {TOTAL}"));
        let stored = fs::read(dir.path().join("up/x")).expect("the file");
        assert!(stored == bytes, "other bytes");
    }));
}

/// B14: `done` was said before the bytes were flushed, and neither count nor content was compared.
#[tokio::test]
async fn b14_what_is_cut_short_or_altered_is_never_done() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let bytes = noise(14, 300_000);
        let mut flipped = bytes.clone();
        flipped[150_000] ^= 1;
        let mut swapped = bytes.clone();
        swapped.swap(0, 299_999);
        let cases: [(&str, &[u8], &str); 4] = [
            (
                "cut short by a byte",
                &bytes[..299_999],
                "error 1 size_mismatch",
            ),
            ("nothing", b"", "error 1 size_mismatch"),
            ("a bit flipped", &flipped, "error 1 hash_mismatch retry"),
            ("two bytes swapped", &swapped, "error 1 hash_mismatch retry"),
        ];
        for (name, sent, expected) in cases {
            let mut lane = RawLane::open(&socket).await;
            lane.say(&file(1, "x", bytes.len() as u64)).await;
            if !sent.is_empty() {
                lane.say(&chunk(1, 0, sent)).await;
            }
            lane.say(&finish(1, &bytes)).await;
            assert_eq!(lane.hear().await.line, expected, "{name}");
        }
        // Without a hash, the declared size still counts.
        let mut lane = RawLane::open(&socket).await;
        lane.say(&short_file("x", 300_000)).await;
        lane.say(&short_chunk(&bytes[..299_999])).await;
        lane.say(&short_finish()).await;
        assert_eq!(lane.hear().await.line, "error 0 size_mismatch");
        fixture.settled().await;
        assert!(fixture.visible().is_empty());
    })
    .await;
}

/// B15: `done` from any client closed the server.
#[tokio::test]
async fn b15_done_from_a_client_does_not_stop_the_server() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        let done = ("done", map([("id", 1.into())]));
        lane.say(&done).await;
        lane.say(&file(1, "x", 4)).await;
        lane.say(&done).await;
        lane.say(&("done", V::Nil)).await;
        lane.say(&chunk(1, 0, b"abcd")).await;
        lane.say(&finish(1, b"abcd")).await;
        lane.say(&done).await;
        assert_eq!(lane.hear().await.line, "done 1 x 4");
        lane.say(&done).await;
        lane.channel.finish().await.expect("the server reads on");
        assert_eq!(lane.hear().await.line, "end");
        let other = fixture.connect().await;
        let (stored, _) = drain(Uploader::new(&other).put(vec![memory("y", noise(1, 10))])).await;
        assert_eq!(stored.len(), 1, "the next client is served");
        assert!(
            socket.close_reason().is_none(),
            "and the first one still is"
        );
    })
    .await;
}

/// A small file system of its own, unmounted on drop; `None`, aloud, where that is not allowed.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(size: &str) -> Option<Self> {
        use std::io::Write as _;
        let dir = tempfile::tempdir().expect("a directory");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", size, "tmpfs"])
            .arg(dir.path())
            .stderr(Stdio::null())
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            let _ = writeln!(std::io::stderr(), "skipped: cannot mount a tmpfs here");
            return None;
        }
        Some(Self(dir))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// B16: any error of the disk closed the server, for all clients.
#[tokio::test]
async fn b16_a_full_disk_fails_that_file_and_no_other() {
    bounded(async {
        let Some(disk) = Tmpfs::mount("size=8m") else {
            return;
        };
        let root = disk.0.path().join("up");
        let config = StoreConfig {
            min_free: Some(0),
            ..StoreConfig::default()
        };
        let store = Store::open(&root, config).expect("a store");
        let receiver = Receiver::new(store.clone(), ReceiverConfig::default());
        let server = serve(&receiver, Limits::default()).await;
        let socket = connect(&server, Timeouts::default()).await;
        let echo = socket.open("echo").await.expect("a channel");
        let bytes = noise(16, MIB);
        let mut small = RawLane::open(&socket).await;
        let mut large = RawLane::open(&socket).await;
        small.say(&file(1, "small", 20_000)).await;
        small.say(&chunk(1, 0, &bytes[..20_000])).await;
        small.acked(1, 20_000).await;
        large.say(&file(1, "large", 6 * MIB as u64)).await;
        large.say(&chunk(1, 0, &bytes)).await;
        large.acked(1, MIB as u64).await;
        // Somebody else takes the space that was there when the file was accepted.
        let greedy = disk.0.path().join("greedy");
        let mut free = 6 * MIB;
        while fs::write(&greedy, vec![1; free]).is_err() {
            free -= 64 << 10;
        }
        for n in 1..6 {
            large.say(&chunk(1, (n * MIB) as u64, &bytes)).await;
        }
        assert_eq!(large.hear().await.line, "error 1 no_space retry");
        // The file of the other lane, and messages, go on.
        small.say(&finish(1, &bytes[..20_000])).await;
        assert_eq!(small.hear().await.line, "done 1 small 20000");
        let back: String = echo.request("say", "still here").await.expect("an answer");
        assert_eq!(back, "still here");
        until("the failed file is gone", || store.usage().open == 0).await;
        // And the same lane takes the same file once there is space.
        fs::remove_file(&greedy).expect("a file");
        large.say(&file(2, "large", MIB as u64)).await;
        large.say(&chunk(2, 0, &bytes)).await;
        large.say(&finish(2, &bytes)).await;
        assert_eq!(large.hear().await.line, format!("done 2 large {MIB}"));
        assert!(
            fs::read(root.join("large")).expect("it") == bytes,
            "other bytes"
        );
        assert_eq!(
            fs::read_dir(root.join(".udpack/staging"))
                .expect("it")
                .count(),
            0
        );
    })
    .await;
}

/// B17: a channel that closed in the middle of a file left its handle open and the part of the file there.
#[tokio::test]
async fn b17_a_lane_that_ends_in_the_middle_leaves_no_handle_and_no_part() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let before = open_below(fixture.dir.path());
        let mut lanes = Vec::new();
        for n in 0..8 {
            let mut lane = RawLane::open(&socket).await;
            lane.say(&file(1, &format!("f{n}"), 1000)).await;
            lane.say(&chunk(1, 0, b"abcd")).await;
            lane.acked(1, 4).await;
            lanes.push(lane);
        }
        assert_eq!(fixture.staged(), 8);
        assert!(open_below(fixture.dir.path()) >= before + 8);
        for (n, lane) in lanes.into_iter().enumerate() {
            match n % 3 {
                0 => drop(lane),
                1 => drop(lane.channel.close(CloseCode::CANCELLED, "enough")),
                _ => lane.channel.finish().await.expect("the server reads on"),
            }
        }
        fixture.settled().await;
        until("the handles are closed", || {
            open_below(fixture.dir.path()) == before
        })
        .await;
        assert!(fixture.visible().is_empty());
    })
    .await;
}

/// B17, by RESET_STREAM: a client whose lane does not move on gives it up in the middle of a frame.
#[test]
fn b17_a_lane_that_is_reset_in_the_middle_leaves_no_handle_and_no_part() {
    let disk = StoppedDisk::new();
    disk.runtime.block_on(bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().join("up");
        let store = Store::open(&root, StoreConfig::default()).expect("a store");
        let before = open_below(dir.path());
        let receiver = Receiver::new(store.clone(), ReceiverConfig::default());
        let server = serve(&receiver, small_windows()).await;
        let timeouts = Timeouts {
            slow_peer: Duration::from_millis(500),
            ..Timeouts::default()
        };
        let socket = connect(&server, timeouts).await;
        let mut lane = RawLane::open(&socket).await;
        lane.say(&file(1, "x", V::Nil)).await;
        lane.say(&chunk(1, 0, &noise(17, 1000))).await;
        lane.acked(1, 1000).await;
        let release = StoppedDisk::stop().await;
        let piece = Bytes::from(noise(17, MIB));
        let mut off = 1000;
        let error = loop {
            let at = At { id: 1, off };
            off += MIB as u64;
            let sent = lane
                .channel
                .send_bulk("chunk", &at, "chunk", piece.clone())
                .await;
            if let Err(error) = sent {
                break error;
            }
        };
        assert!(error.is_closed(), "{error}");
        assert_eq!(lane.channel.closed().await.code, CloseCode::SLOW_PEER);
        drop(release);
        until("the file is dropped", || store.usage().open == 0).await;
        until("the handles are closed", || {
            open_below(dir.path()) == before
        })
        .await;
        assert_eq!(
            fs::read_dir(root.join(".udpack/staging"))
                .expect("it")
                .count(),
            0
        );
        assert_eq!(
            fs::read_dir(&root).expect("it").count(),
            1,
            "only the store's own directory"
        );
        // The socket is none the worse.
        let (done, failed) =
            drain(Uploader::new(&socket).put(vec![memory("y", noise(1, 10))])).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done.len(), 1);
    }));
}

/// B18: a second `file` stacked another listener, so that chunks were written twice; a chunk before `file` was
/// lost without a word; types were not looked at.
#[tokio::test]
async fn b18_what_comes_out_of_order_is_an_error_and_written_once() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        lane.say(&short_chunk(b"lost")).await;
        assert_eq!(lane.hear().await.line, "error 0 protocol_order");
        lane.say(&short_file("x", 4)).await;
        lane.say(&short_file("x", 4)).await;
        assert_eq!(lane.hear().await.line, "error 0 protocol_order");
        lane.say(&short_chunk(b"once")).await;
        lane.say(&short_finish()).await;
        assert_eq!(lane.hear().await.line, "done 0 x 4");
        assert_eq!(fixture.stored("x"), b"once");
        lane.say(&("file", map([("filename", 5.into())]))).await;
        assert_eq!(lane.hear().await.line, "closed bad_message");
        fixture.settled().await;
        assert_eq!(fixture.visible(), ["x"]);
    })
    .await;
}

/// B19: there was no limit of any kind, so that whoever could connect could fill the disk.
#[tokio::test]
async fn b19_limits_are_told_before_any_data() {
    bounded(async {
        let config = StoreConfig {
            max_file: Some(1000),
            quota: Some(1500),
            ..StoreConfig::default()
        };
        let fixture = Fixture::with(config, ReceiverConfig::default()).await;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        // Only the offer is made; the answer comes without a byte of data.
        lane.say(&file(1, "a", 1001)).await;
        assert_eq!(lane.hear().await.line, "error 1 too_large");
        lane.say(&file(2, "a", 1000)).await;
        lane.say(&chunk(2, 0, &noise(2, 1000))).await;
        lane.say(&finish(2, &noise(2, 1000))).await;
        assert_eq!(lane.hear().await.line, "done 2 a 1000");
        lane.say(&file(3, "b", 501)).await;
        assert_eq!(lane.hear().await.line, "error 3 quota retry");
        lane.say(&file(4, "b", 500)).await;
        lane.say(&chunk(4, 0, &noise(4, 500))).await;
        lane.say(&finish(4, &noise(4, 500))).await;
        assert_eq!(lane.hear().await.line, "done 4 b 500");
        assert_eq!(fixture.visible(), ["a", "b"]);
    })
    .await;
}

/// B21: a file that changed while it was read arrived with the wrong size, and one that was missing threw.
#[tokio::test]
async fn b21_a_source_that_is_missing_or_changes_is_an_error_of_its_own() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let at = |name: &str| fixture.dir.path().join(name);
        fs::create_dir(at("directory")).expect("a directory");
        {
            use rustix::fs::{CWD, FileType, Mode, mknodat};
            let mode = Mode::from_raw_mode(0o600);
            mknodat(CWD, at("fifo"), FileType::Fifo, mode, 0).expect("a fifo");
        }
        std::os::unix::fs::symlink(at("nowhere"), at("dangling")).expect("a link");
        let names = ["missing", "directory", "fifo", "dangling", "missing/below"];
        // One by one and together: a file that fails here leaves nothing to wait for.
        let source = |name: &&str| Source::file(at(name), rel(name));
        let since = Instant::now();
        let mut puts: Vec<Vec<Source>> = names.iter().map(|name| vec![source(name)]).collect();
        puts.push(names.iter().map(source).collect());
        for sources in puts {
            let count = sources.len();
            let (done, failed) = drain(Uploader::new(&socket).put(sources)).await;
            assert!(done.is_empty(), "{done:?}");
            assert_eq!(failed.len(), count);
            for (name, error) in failed {
                assert_eq!(error.kind(), ErrorKind::LocalFile, "{name}: {error}");
            }
        }
        assert!(
            since.elapsed() < Duration::from_secs(20),
            "the end was waited for"
        );
        // A file that becomes shorter, and one that is overwritten with its time put back, while they are sent.
        for how in ["shrinks", "is overwritten"] {
            let file = fs::File::create(at("changing")).expect("a file");
            file.set_len(64 << 20).expect("a sparse file");
            let source = Source::file(at("changing"), rel("changing"));
            let mut upload = Uploader::new(&socket)
                .resume(false)
                .limit(Limiter::new(32 * MIB as u64))
                .put(vec![source]);
            let mut moved = false;
            let error = loop {
                match upload.next().await.expect("an outcome") {
                    // Some of it was read, and the limit keeps the rest for later.
                    Event::Progress(now) if now.acked == 0 || moved => {}
                    Event::Progress(_) if how == "shrinks" => {
                        moved = true;
                        file.set_len(1 << 20).expect("a shorter file");
                    }
                    Event::Progress(_) => {
                        moved = true;
                        use std::os::unix::fs::FileExt as _;
                        let before = file.metadata().and_then(|of| of.modified());
                        file.write_all_at(b"new", 60 << 20).expect("written");
                        file.write_all_at(b"new", 0).expect("written");
                        let times = fs::FileTimes::new().set_modified(before.expect("a time"));
                        file.set_times(times).expect("the time it had");
                    }
                    Event::Failed { error, .. } => break error,
                    Event::Done(_) => panic!("a file that {how} must not be stored"),
                    _ => {}
                }
            };
            assert!(
                matches!(error, TransferError::SourceChanged { .. }),
                "{how}: {error}"
            );
        }
        fixture.settled().await;
        assert!(fixture.visible().is_empty());
        // One of which only the time moves is the same file.
        let file = fs::File::create(at("touched")).expect("a file");
        file.set_len(64 << 20).expect("a sparse file");
        let source = Source::file(at("touched"), rel("touched"));
        let mut upload = Uploader::new(&socket)
            .resume(false)
            .limit(Limiter::new(32 * MIB as u64))
            .put(vec![source]);
        let mut moved = false;
        let outcome = loop {
            match upload.next().await.expect("an outcome") {
                Event::Progress(now) if now.acked == 0 || moved => {}
                Event::Progress(_) => {
                    moved = true;
                    let long_ago = std::time::SystemTime::UNIX_EPOCH;
                    let times = fs::FileTimes::new().set_modified(long_ago);
                    file.set_times(times).expect("another time");
                }
                Event::Failed { error, .. } => panic!("{error}"),
                Event::Done(outcome) => break outcome,
                _ => {}
            }
        };
        assert_eq!(outcome.size, 64 << 20);
        assert_eq!(fixture.visible(), ["touched"]);
    })
    .await;
}

/// B22: each mebibyte waited for the answer to the one before, so that the round trip set the speed.
///
/// The server's half: all of it is taken without an answer being read, and the answers are few.
#[tokio::test]
async fn b22_the_server_takes_everything_without_its_answers_being_read() {
    const CHUNK: usize = 256 << 10;
    const COUNT: usize = 64 * MIB / CHUNK;
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        let piece = Bytes::from(noise(22, CHUNK));
        let since = Instant::now();
        lane.say(&file(1, "x", V::Nil)).await;
        for n in 0..COUNT {
            let at = At {
                id: 1,
                off: (n * CHUNK) as u64,
            };
            let sent = lane
                .channel
                .send_bulk("chunk", &at, "chunk", piece.clone())
                .await;
            sent.expect("the lane takes it");
        }
        assert_eq!(lane.acks, 0, "nothing was read so far");
        let bytes = piece.repeat(COUNT);
        lane.say(&finish(1, &bytes)).await;
        assert_eq!(lane.hear().await.line, format!("done 1 x {}", 64 * MIB));
        let most = 4 * (since.elapsed().as_secs() as usize + 1) + 1;
        assert!(
            lane.acks <= most,
            "{} acks, at most four a second",
            lane.acks
        );
    })
    .await;
}

/// B22, the client's half: it sends all of a file though the server acknowledges nothing before it has it.
#[tokio::test]
async fn b22_the_client_sends_everything_without_waiting_for_an_ack() {
    const SIZE: usize = 32 * MIB;
    bounded(async {
        let server = Server::builder()
            .identity(Identity::generate().expect("a key"))
            .auth(|_: Hello| async { Ok(Peer::new("tester")) })
            .channel(udpack_transfer::CHANNEL, |channel: Channel| async move {
                let mut received = blake3::Hasher::new();
                while let Some(message) = channel.recv().await? {
                    let answer = match message.event() {
                        "file" => (
                            "ready",
                            map([
                                ("id", 1.into()),
                                ("have", V::Array(vec![])),
                                ("chunk", 1000.into()),
                            ]),
                        ),
                        "chunk" => {
                            received.update(&message.bulk("chunk").expect("bytes"));
                            continue;
                        }
                        _ => (
                            "done",
                            map([
                                ("id", 1.into()),
                                ("path", "x".into()),
                                ("size", received.count().into()),
                                ("hash", received.finalize().as_bytes().into()),
                            ]),
                        ),
                    };
                    let _ = channel.send(answer.0, &answer.1).await;
                }
                Ok::<(), udpack::RecvError>(())
            })
            .bind("127.0.0.1:0")
            .await
            .expect("a free port");
        let socket = connect(&server, Timeouts::default()).await;
        let source = memory("x", noise(22, SIZE));
        let (done, failed) = drain(Uploader::new(&socket).put(vec![source])).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!((done[0].sent, done[0].size), (SIZE as u64, SIZE as u64));
    })
    .await;
}
