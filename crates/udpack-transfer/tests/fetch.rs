//! Files read into memory and into writers: what was written is right, or said not to be.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::fs;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use common::{Fixture, TOKEN, bounded, drain, memory, noise, rel};
use raw::{Say, chunk, file, finish, with};
use tokio::io::{AsyncReadExt as _, AsyncWrite};
use tokio::sync::watch;
use udpack::{Channel, Client, CloseCode, Deny, Hello, Identity, Peer, Server};
use udpack_transfer::{
    CHANNEL, ErrorKind, Event, Fetch, FetchError, Limiter, Link, Outcome, Progress, Receiver,
    ReceiverConfig, Retry, Scope, Store, StoreConfig, TransferError, Uploader,
};

const MIB: usize = 1 << 20;

/// Everybody may read and write.
fn reading() -> ReceiverConfig {
    ReceiverConfig {
        default_scope: Scope {
            read: true,
            ..Scope::default()
        },
        ..ReceiverConfig::default()
    }
}

async fn open_server() -> Fixture {
    Fixture::with(StoreConfig::default(), reading()).await
}

fn link(server: &Server) -> Link {
    let client = Client::builder()
        .pin(server.fingerprint())
        .token(TOKEN)
        .build()
        .expect("a client");
    Link::new(client, server.local_addr().to_string()).retry(Retry {
        first: Duration::from_millis(20),
        most: Duration::from_millis(200),
        ..Retry::default()
    })
}

#[tokio::test]
async fn files_of_every_size_are_read_whole() {
    bounded(async {
        let fixture = open_server().await;
        let link = link(&fixture.server);
        for size in [0, 1, 262_144, 262_145, 5_000_000] {
            let bytes = noise(size as u64, size);
            fs::write(fixture.root().join("f"), &bytes).expect("a file");
            let (tell, progress) = watch::channel(Progress::default());
            let mut read = Vec::new();
            let fetched = Fetch::new(&link)
                .progress(tell)
                .read(&rel("f"), &mut read)
                .await
                .expect("it is read");
            assert!(read == bytes, "{size}");
            assert_eq!((fetched.size, fetched.received), (size as u64, size as u64));
            assert_eq!(fetched.hash, *blake3::hash(&bytes).as_bytes());
            assert!(fetched.meta.mtime.is_some());
            let progress = *progress.borrow();
            assert_eq!((progress.acked, progress.files_done), (size as u64, 1));
            let outcome = Outcome::from(fetched);
            assert_eq!((outcome.path.as_str(), outcome.size), ("f", size as u64));
        }
        let mut read = Vec::new();
        let error = Fetch::new(&link).read(&rel("none"), &mut read).await;
        let error = error.expect_err("there is none");
        assert_eq!(error.written, 0);
        assert!(
            matches!(&error.cause, TransferError::Refused { code, .. } if code == "not_found"),
            "{error:?}"
        );
    })
    .await;
}

/// Takes so many bytes, then fails.
struct Full(usize);

impl AsyncWrite for Full {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        Poll::Ready(match taken {
            0 => Err(io::ErrorKind::StorageFull.into()),
            taken => Ok(taken),
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_writer_that_fails_ends_it_and_a_slow_one_is_waited_for() {
    bounded(async {
        let fixture = open_server().await;
        let link = link(&fixture.server);
        let bytes = noise(1, 4 * MIB);
        fs::write(fixture.root().join("f"), &bytes).expect("a file");
        let error = Fetch::new(&link)
            .read(&rel("f"), &mut Full(1_000_000))
            .await;
        let FetchError { written, cause } = error.expect_err("it is full");
        assert_eq!(written, 1_000_000);
        assert!(matches!(cause, TransferError::Write(_)), "{cause:?}");
        assert_eq!((cause.kind(), cause.retry()), (ErrorKind::LocalFile, false));

        let (mut writer, mut reader) = tokio::io::duplex(1000);
        let path = rel("f");
        let fetch = Fetch::new(&link);
        let fetching = async {
            let fetched = fetch.read(&path, &mut writer).await;
            drop(writer);
            fetched
        };
        let mut read = Vec::new();
        let (fetched, _) = tokio::join!(fetching, reader.read_to_end(&mut read));
        fetched.expect("it is read");
        assert!(read == bytes);
    })
    .await;
}

#[tokio::test]
async fn what_is_written_goes_on_over_a_lost_connection_unless_the_file_changes() {
    bounded(async {
        let fixture = open_server().await;
        let bytes = noise(2, 12 * MIB);
        fs::write(fixture.root().join("f"), &bytes).expect("a file");
        for changes in [false, true] {
            let link = link(&fixture.server);
            let (tell, mut progress) = watch::channel(Progress::default());
            let fetch = Fetch::new(&link)
                .limit(Limiter::new(8 << 20))
                .progress(tell);
            let mut read = Vec::new();
            let path = rel("f");
            let cut = async {
                let far = |now: &Progress| now.moved > 4 * MIB as u64;
                progress.wait_for(far).await.expect("it goes on");
                if changes {
                    let mut other = bytes.clone();
                    other[7] ^= 1;
                    fs::write(fixture.root().join("f"), other).expect("a file");
                }
                for socket in fixture.server.sockets() {
                    socket.abort(CloseCode::SHUTTING_DOWN, "cut");
                }
            };
            let (fetched, ()) = tokio::join!(fetch.read(&path, &mut read), cut);
            if !changes {
                let fetched = fetched.expect("it is read");
                assert!(read == bytes);
                let spare = fetched.received - fetched.size;
                assert!(spare < MIB as u64, "{spare} bytes came twice");
                continue;
            }
            let error = fetched.expect_err("it is another file");
            assert_eq!(error.written, read.len() as u64);
            assert!(read.len() < bytes.len() && bytes.starts_with(&read));
            assert_eq!(error.cause.kind(), ErrorKind::Integrity, "{error:?}");
            assert!(error.to_string().contains("must be discarded"), "{error}");
        }
    })
    .await;
}

/// A server that answers each `get` with this.
async fn hostile(answer: impl Fn(u64) -> Vec<Say> + Send + Sync + 'static) -> Server {
    let answer = Arc::new(answer);
    let serve = move |channel: Channel| {
        let answer = answer.clone();
        async move {
            while let Ok(Some(message)) = channel.recv().await {
                if message.event() == "get" {
                    for (event, data) in answer(1) {
                        if channel.send(event, &data).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    };
    Server::builder()
        .identity(Identity::generate().expect("a key"))
        .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
        .channel(CHANNEL, serve)
        .bind("127.0.0.1:0")
        .await
        .expect("a free port")
}

fn ends(size: u64, bytes: &[u8]) -> Say {
    let (event, data) = finish(1, bytes);
    (event, with(data, "size", size))
}

#[tokio::test]
async fn no_wrong_file_is_ever_written_whole() {
    type Script = fn(u64) -> Vec<Say>;
    let scripts: [(&str, ErrorKind, &[u8], Script); 9] = [
        ("another hash", ErrorKind::Integrity, b"abcd", |id| {
            vec![
                file(id, "f", 8),
                chunk(id, 0, b"abcd"),
                chunk(id, 4, b"efgh"),
                ends(8, b"abcdefgx"),
            ]
        }),
        ("too few bytes", ErrorKind::Integrity, b"", |id| {
            vec![file(id, "f", 8), chunk(id, 0, b"abcd"), ends(8, b"abcd")]
        }),
        ("another size at the end", ErrorKind::Integrity, b"", |id| {
            vec![file(id, "f", 4), chunk(id, 0, b"abcd"), ends(5, b"abcd")]
        }),
        ("too many bytes", ErrorKind::Integrity, b"", |id| {
            vec![file(id, "f", 3), chunk(id, 0, b"abcd"), ends(3, b"abc")]
        }),
        ("a gap", ErrorKind::Integrity, b"", |id| {
            vec![
                file(id, "f", 8),
                chunk(id, 0, b"ab"),
                chunk(id, 4, b"efgh"),
                ends(8, b"abefgh"),
            ]
        }),
        ("bytes that nobody announced", ErrorKind::Other, b"", |id| {
            vec![chunk(id, 0, b"abcd")]
        }),
        ("another number", ErrorKind::Other, b"", |id| {
            vec![file(id + 1, "f", 4)]
        }),
        ("two beginnings", ErrorKind::Other, b"", |id| {
            vec![file(id, "f", 4), file(id, "f", 4)]
        }),
        (
            "an offset that no file has",
            ErrorKind::Integrity,
            b"",
            |id| vec![file(id, "f", u64::MAX), chunk(id, u64::MAX, b"ab")],
        ),
    ];
    bounded(async {
        for (name, kind, written, script) in scripts {
            let server = hostile(script).await;
            let socket = Client::builder()
                .pin(server.fingerprint())
                .connect(&server.local_addr().to_string())
                .await
                .expect("it lets us in");
            let mut read = Vec::new();
            let error = Fetch::new(&socket).read(&rel("f"), &mut read).await;
            let error = error.expect_err(name);
            assert_eq!(error.cause.kind(), kind, "{name}: {error:?}");
            assert_eq!(read, written, "{name}");
            assert_eq!(error.written, written.len() as u64, "{name}");
        }
    })
    .await;
}

/// A writer that counts, and never takes anything.
struct Stuck(Arc<AtomicUsize>);

impl AsyncWrite for Stuck {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

#[tokio::test]
async fn giving_up_ends_the_lane_and_a_stuck_writer_stops_the_server() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path().join("up"), StoreConfig::default()).expect("a store");
        let receiver = Receiver::new(store, reading());
        let let_in = |_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) };
        let fixture = Fixture::serve(dir, receiver.clone(), let_in).await;
        let size = 200 * MIB as u64;
        let stored = fs::File::create(fixture.root().join("f")).expect("a file");
        stored.set_len(size).expect("a sparse file");
        let link = link(&fixture.server);
        let polled = Arc::new(AtomicUsize::new(0));
        let (tell, mut progress) = watch::channel(Progress::default());
        let mut transfers = receiver.watch();
        {
            let fetch = Fetch::new(&link).progress(tell);
            let (path, mut writer) = (rel("f"), Stuck(polled.clone()));
            let mut fetching = std::pin::pin!(fetch.read(&path, &mut writer));
            let told = async {
                progress
                    .wait_for(|now| now.moved > 0)
                    .await
                    .expect("it begins");
                loop {
                    let running = transfers.next().await.expect("it runs");
                    if let [one] = &running[..] {
                        assert!(one.is_download && one.path == "f", "{one:?}");
                        return;
                    }
                }
            };
            tokio::select! {
                _ = &mut fetching => panic!("it cannot end"),
                () = told => {}
            }
            assert!(progress.borrow().moved < 2 * MIB as u64, "little is held");
        }
        // The future is dropped: nothing runs at the server any more.
        while transfers
            .next()
            .await
            .is_some_and(|running| !running.is_empty())
        {}
        assert!(receiver.transfers().is_empty());
        receiver.shutting_down();
        assert_eq!(transfers.next().await, None);
    })
    .await;
}

#[tokio::test]
async fn progress_is_pushed_for_each_file_and_the_whole() {
    bounded(async {
        let fixture = open_server().await;
        let link = link(&fixture.server);
        let sources = (0..3).map(|n| memory(&format!("f{n}"), noise(n, MIB)));
        let mut upload = Uploader::new(&link)
            .limit(Limiter::new(3 << 20))
            .put(Vec::from_iter(sources));
        let mut watch = upload.watch();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = seen.clone();
        let watching = tokio::spawn(async move {
            let mut last = None;
            while let Some(moving) = watch.next().await {
                assert_ne!(last.as_ref(), Some(&moving), "told twice");
                for file in &moving.files {
                    assert_eq!(file.path, format!("f{}", file.index));
                    assert_eq!(file.size, MIB as u64);
                    assert!(file.bytes <= file.size);
                }
                let sum: u64 = moving.files.iter().map(|file| file.bytes).sum();
                assert!(sum <= moving.whole.total);
                told.lock().expect("it works").push(moving.files.len());
                last = Some(moving);
            }
            last.expect("something was told").whole
        });
        while let Some(event) = upload.next().await {
            assert!(!matches!(event, Event::Failed { .. }), "{event:?}");
        }
        let whole = watching.await.expect("it ends with the upload");
        assert_eq!((whole.files_done, whole.acked), (3, 3 * MIB as u64));
        assert!(
            seen.lock()
                .expect("it works")
                .iter()
                .any(|files| *files > 0)
        );
        // A transfer that was dropped tells nothing more.
        let upload = Uploader::new(&link)
            .limit(Limiter::new(1000))
            .put(vec![memory("slow", noise(9, MIB))]);
        let mut watch = upload.watch();
        drop(upload);
        while watch.next().await.is_some() {}
        let (done, _) = drain(Uploader::new(&link).put(vec![memory("last", noise(1, 1))])).await;
        assert_eq!(done.len(), 1);
    })
    .await;
}
