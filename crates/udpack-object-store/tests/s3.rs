//! Uploads into a server that speaks S3, which fails, is killed and loses answers. Without moto these tests say that they are skipped.

mod common;
#[path = "common/stored.rs"]
mod stored;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use udpack::{Client, Hello, Identity, Peer, Server};
use udpack_object_store::{ObjectConfig, ObjectSink, Settings};
use udpack_transfer::testing::sink_conforms;
use udpack_transfer::{
    Begun, Event, Expected, IfExists, NewUpload, Overwrite, Published, Receiver, ReceiverConfig,
    RelPath, Scope, Sink, Source, StoreError, Uploader,
};

use common::{Fault, Moto, PART, Proxy, settings};
use stored::read;

const PEER: &str = "tester";

fn config(port: u16) -> ObjectConfig {
    ObjectConfig {
        part: PART,
        in_flight: 2,
        budget: 4 << 20,
        overwrite: Overwrite::Always,
        settings: Settings::new(settings(port)),
        ..ObjectConfig::default()
    }
}

async fn open(port: u16, prefix: &str, dir: &Path) -> ObjectSink {
    let url = format!("s3://bucket/{prefix}");
    let sink = ObjectSink::open(&url, dir.to_owned(), config(port)).await;
    sink.unwrap_or_else(|error| panic!("{error}: {error:?}"))
}

fn rel(path: &str) -> RelPath {
    path.parse().expect("a path")
}

fn noise(seed: u8, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&[seed])
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

fn resumable<'a>(path: &'a RelPath, bytes: &Bytes, if_exists: IfExists) -> NewUpload<'a> {
    NewUpload {
        size: Some(bytes.len() as u64),
        resumable: true,
        if_exists,
        ..NewUpload::new(path, PEER)
    }
}

/// Uploads what the sink does not have yet: what became of it, and how much was there.
async fn upload(
    sink: &ObjectSink,
    path: &str,
    bytes: &Bytes,
    if_exists: IfExists,
) -> Result<(Published, u64), StoreError> {
    let path = rel(path);
    let mut upload = match sink.begin(&resumable(&path, bytes, if_exists)).await? {
        Begun::New(upload) => upload,
        Begun::Exists(_) => return Err(StoreError::Exists { path }),
    };
    let have = sink.have(&mut upload).await?;
    let (mut at, mut had) = (0, 0);
    for range in &have {
        let (from, to) = (range.off as usize, (range.off + range.len) as usize);
        assert_eq!(range.hash, <[u8; 32]>::from(blake3::hash(&bytes[from..to])));
        if at < from {
            sink.write(&mut upload, at as u64, bytes.slice(at..from))
                .await?;
        }
        (at, had) = (to, had + range.len);
    }
    while at < bytes.len() {
        let to = bytes.len().min(at + 50_000);
        if let Err(error) = sink
            .write(&mut upload, at as u64, bytes.slice(at..to))
            .await
        {
            sink.suspend(upload).await;
            return Err(error);
        }
        at = to;
    }
    let expected = Expected {
        size: Some(bytes.len() as u64),
        hash: Some(blake3::hash(bytes).into()),
        ..Expected::default()
    };
    let whole = sink.finish(upload, expected).await?;
    Ok((sink.publish(whole).await?, had))
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_keeps_the_rules() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let dirs = tempfile::tempdir().expect("a directory");
    let made = AtomicU64::new(0);
    let make = async || {
        let name = made.fetch_add(1, Ordering::Relaxed).to_string();
        let sink = open(moto.port, &name, &dirs.path().join(&name)).await;
        assert!(sink.is_exclusive());
        sink
    };
    sink_conforms(make, read).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_store_fails_to_do_is_done_again_or_refused() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let proxy = Proxy::start(&moto).await;
    let dir = tempfile::tempdir().expect("a directory");
    let sink = open(proxy.port, "p", dir.path()).await;
    let faults = [
        Fault::Status(503, "SlowDown"),
        Fault::Status(500, "InternalError"),
        Fault::Lost,
        Fault::Cut,
    ];
    for (number, fault) in faults.into_iter().enumerate() {
        // Of one request for each path and method, the first.
        let seen = std::sync::Mutex::new(std::collections::HashSet::new());
        proxy.fail(move |line, _| {
            let fails =
                !line.contains("tagging") && seen.lock().expect("sound").insert(line.to_owned());
            fails.then_some(fault)
        });
        for (size, name) in [(300_000, "large"), (1_000, "small")] {
            let (path, bytes) = (format!("{name}-{number}"), noise(number as u8, size));
            // What could not be done is kept.
            let mut tries = 0;
            let published = loop {
                match upload(&sink, &path, &bytes, IfExists::Error).await {
                    Ok((published, _)) => break published,
                    Err(error @ StoreError::Unavailable { .. }) if tries < 5 => {
                        eprintln!("{fault:?}, {path}: {error}");
                        tries += 1;
                    }
                    Err(error) => panic!("{fault:?}, {path}: {error}"),
                }
            };
            assert_eq!(published.path, path, "{fault:?}");
            assert_eq!(read(&sink, &rel(&path)).await, Some(bytes), "{fault:?}");
        }
    }
    proxy.fail(|_, _| None);
    assert!(
        proxy.faults.load(Ordering::Relaxed) > 20,
        "faults were injected"
    );
    assert_eq!(moto.keys().await.len(), 8);
    sink.sweep().await.expect("swept");
    assert_eq!(moto.uploads().await, 0, "nothing is left in the store");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_inside_a_success_is_an_error() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let proxy = Proxy::start(&moto).await;
    let dir = tempfile::tempdir().expect("a directory");
    let sink = open(proxy.port, "p", dir.path()).await;
    let bytes = noise(1, 300_000);
    proxy.fail(|line, _| {
        let completes = line.starts_with("POST") && line.contains("uploadId=");
        completes.then_some(Fault::ErrorInside("NotToday"))
    });
    let failed = upload(&sink, "a", &bytes, IfExists::Error).await;
    assert!(
        matches!(failed, Err(StoreError::Unavailable { .. })),
        "{failed:?}"
    );
    assert_eq!(
        moto.keys().await,
        Vec::<String>::new(),
        "nothing partial is seen"
    );
    proxy.fail(|_, _| None);
    let before = *proxy.part_bytes.borrow();
    let (_, had) = upload(&sink, "a", &bytes, IfExists::Error)
        .await
        .expect("the second time");
    assert_eq!(had, 300_000, "all parts were kept");
    assert_eq!(*proxy.part_bytes.borrow(), before, "and none sent again");
    assert_eq!(read(&sink, &rel("a")).await, Some(bytes));
    assert_eq!(moto.uploads().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_completed_before_a_crash_is_not_completed_again() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let proxy = Proxy::start(&moto).await;
    let dir = tempfile::tempdir().expect("a directory");
    let bytes = noise(2, 300_000);
    for policy in [
        IfExists::Error,
        IfExists::Same,
        IfExists::Overwrite,
        IfExists::Rename,
    ] {
        let name = format!("a-{policy}");
        let sink = open(proxy.port, "p", dir.path()).await;
        // The answer to the completion is lost, and the store is away from then on.
        let gone = std::sync::atomic::AtomicBool::new(false);
        proxy.fail(move |line, _| {
            if gone.load(Ordering::Relaxed) {
                return Some(Fault::Status(400, "ExpiredToken"));
            }
            let completes = line.starts_with("POST") && line.contains("uploadId=");
            gone.store(completes, Ordering::Relaxed);
            completes.then_some(Fault::Lost)
        });
        let failed = upload(&sink, &name, &bytes, policy).await;
        assert!(failed.is_err(), "{policy}: {failed:?}");
        proxy.fail(|_, _| None);
        assert!(moto.keys().await.contains(&format!("p/{name}")), "{policy}");
        // As after a crash: another process takes the journals.
        drop(sink);
        let sink = open(proxy.port, "p", dir.path()).await;
        let again = upload(&sink, &name, &bytes, policy).await;
        let (published, had) = again.unwrap_or_else(|error| panic!("{policy}: {error}"));
        assert_eq!((published.path, had), (name.clone(), 300_000), "{policy}");
        assert_eq!(
            read(&sink, &rel(&name)).await.as_ref(),
            Some(&bytes),
            "{policy}"
        );
        assert_eq!(moto.uploads().await, 0, "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_expire_cost_no_part_that_is_stored() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let proxy = Proxy::start(&moto).await;
    let dir = tempfile::tempdir().expect("a directory");
    let sink = open(proxy.port, "p", dir.path()).await;
    let bytes = noise(3, 600_000);
    let parts = AtomicU64::new(0);
    proxy.fail(move |line, _| {
        let part = line.contains("partNumber") && parts.fetch_add(1, Ordering::Relaxed) >= 4;
        part.then_some(Fault::Status(400, "ExpiredToken"))
    });
    let failed = upload(&sink, "a", &bytes, IfExists::Error).await;
    let Err(error) = failed else {
        panic!("it has expired");
    };
    assert!(error.retry() && error.code() == "internal", "{error}");
    assert!(!error.to_string().contains("Token"), "{error}");
    proxy.fail(|_, _| None);
    let (_, had) = upload(&sink, "a", &bytes, IfExists::Error)
        .await
        .expect("with new ones");
    assert_eq!(had, 4 * PART, "what was stored was kept");
    assert_eq!(read(&sink, &rel("a")).await, Some(bytes));

    proxy.fail(|line, _| {
        line.starts_with("PUT")
            .then_some(Fault::Status(403, "AccessDenied"))
    });
    let denied = upload(&sink, "b", &noise(4, 10), IfExists::Error).await;
    let denied = denied.expect_err("it is denied");
    assert_eq!((denied.code(), denied.retry()), ("io", false), "{denied}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_not_there_is_told_at_the_start() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let dir = tempfile::tempdir().expect("a directory");
    let opened = ObjectSink::open("s3://none/p", dir.path().to_owned(), config(moto.port)).await;
    let error = opened.expect_err("there is no such bucket");
    assert!(error.to_string().contains("s3://none/p"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_whose_id_was_lost_is_ended() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let proxy = Proxy::start(&moto).await;
    let dir = tempfile::tempdir().expect("a directory");
    let sink = open(proxy.port, "p", dir.path()).await;
    // An upload is begun, and its answer is lost for ever.
    let begun = std::sync::atomic::AtomicBool::new(false);
    proxy.fail(move |line, _| {
        let begins = line.starts_with("POST") && line.contains("?uploads");
        begins.then(|| match begun.swap(true, Ordering::Relaxed) {
            false => Fault::Lost,
            true => Fault::Status(400, "ExpiredToken"),
        })
    });
    let failed = upload(&sink, "a", &noise(5, 300_000), IfExists::Error).await;
    assert!(
        matches!(failed, Err(StoreError::Unavailable { .. })),
        "{failed:?}"
    );
    proxy.fail(|_, _| None);
    assert!(moto.uploads().await > 0, "they are there");
    drop(sink);
    let sink = open(proxy.port, "p", dir.path()).await;
    assert_eq!(moto.uploads().await, 0, "the sweep at the start ends them");
    drop(sink);
}

/// Not a test: the server of the test below, in a process that can be killed.
#[test]
fn a_server_of_its_own() {
    let Ok(port) = std::env::var("UDPACK_TEST_STORE") else {
        return;
    };
    let dir = PathBuf::from(std::env::var_os("UDPACK_TEST_DIR").expect("a directory"));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let sink = open(port.parse().expect("a port"), "p", &dir).await;
        let config = ReceiverConfig {
            default_scope: Scope {
                read: true,
                ..Scope::default()
            },
            ..ReceiverConfig::default()
        };
        let server = Receiver::into_sink(sink, config)
            .attach(Server::builder())
            .identity(Identity::load_or_create(dir.join("keys")).expect("a key"))
            .auth(async |_: Hello| Ok(Peer::new(PEER)))
            .bind("127.0.0.1:0")
            .await
            .expect("it binds");
        println!("serves {} {}", server.local_addr(), server.fingerprint());
        std::future::pending::<()>().await;
    });
}

struct Serving {
    child: Child,
    address: String,
    fingerprint: String,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn serve(port: u16, dir: &TempDir) -> Serving {
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "a_server_of_its_own", "--nocapture"])
        .env("UDPACK_TEST_STORE", port.to_string())
        .env("UDPACK_TEST_DIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut serving = Serving {
        child,
        address: String::new(),
        fingerprint: String::new(),
    };
    let stdout = serving.child.stdout.take().expect("piped");
    let stdout = tokio::process::ChildStdout::from_std(stdout).expect("a pipe");
    let mut lines = BufReader::new(stdout).lines();
    loop {
        let line = lines.next_line().await.expect("a line").expect("it serves");
        if let Some((_, told)) = line.split_once("serves ") {
            let (address, fingerprint) = told.split_once(' ').expect("both");
            serving.address = address.to_owned();
            serving.fingerprint = fingerprint.to_owned();
            return serving;
        }
    }
}

/// Sends the file until all is done or the connection is lost; whether it is stored.
async fn put(serving: &Serving, bytes: &Bytes) -> bool {
    let fingerprint = serving.fingerprint.parse().expect("a fingerprint");
    let client = Client::builder().pin(fingerprint);
    let Ok(socket) = client.connect(&serving.address).await else {
        return false;
    };
    let source = Source::bytes(bytes.to_vec(), rel("file"));
    let mut upload = Uploader::new(&socket).resume(true).put([source]);
    let mut done = false;
    while let Some(event) = upload.next().await {
        match event {
            Event::Done(_) => done = true,
            Event::Failed { error, .. } => eprintln!("{error}"),
            _ => {}
        }
    }
    done
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_again_and_again_loses_nothing() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let kills = std::env::var("STORE_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok());
    let kills: u64 = kills.unwrap_or(5);
    let proxy = Proxy::start(&moto).await;
    let dir = tempfile::tempdir().expect("a directory");
    let size = (kills + 3) * 10 * PART + 777;
    let bytes = noise(6, size as usize);
    let mut seen = proxy.part_bytes.clone();
    for kill in 0..kills {
        let serving = serve(proxy.port, &dir).await;
        // Somewhere within the next parts, another place each time.
        let target = *seen.borrow() + PART * (2 + (kill * 7) % 9) - (kill * 13_001) % PART;
        tokio::select! {
            done = put(&serving, &bytes) => panic!("kill {kill}: done is {done} before the kill"),
            reached = tokio::time::timeout(PATIENCE, seen.wait_for(|sent| *sent >= target)) => {
                drop(reached.expect("parts are sent").expect("the proxy is there"));
            }
        }
        drop(serving);
        assert_eq!(
            moto.keys().await,
            Vec::<String>::new(),
            "nothing partial is seen"
        );
        assert!(moto.uploads().await <= 1, "one upload is under way");
    }
    let serving = serve(proxy.port, &dir).await;
    let done = tokio::time::timeout(PATIENCE, put(&serving, &bytes)).await;
    assert!(done.expect("it ends"), "the file is stored in the end");
    drop(serving);
    assert_eq!(
        moto.get("/bucket/p/file").await,
        bytes,
        "the object is the file"
    );
    let sent = *proxy.part_bytes.borrow();
    // What is sent again is no more than what was under way: two parts.
    assert!(sent <= size + kills * 2 * PART, "{sent} bytes for {size}");
    let sink = open(proxy.port, "p", dir.path()).await;
    assert_eq!(moto.uploads().await, 0, "nothing is left in the store");
    assert_eq!(moto.keys().await, ["p/file"]);
    let listed = sink.stat(Some(&rel("file"))).await.expect("it is there");
    assert_eq!(listed.size, size);
    let hash = sink.read(&rel("file")).await.expect("a file").hash().await;
    assert_eq!(
        hash.expect("its hash"),
        <[u8; 32]>::from(blake3::hash(&bytes))
    );
    eprintln!(
        "{kills} kills, {sent} bytes sent for {size}: 0 acknowledged lost, 0 partial visible, 0 left in the store"
    );
}

/// How long something may take that must happen.
const PATIENCE: Duration = Duration::from_secs(60);
