//! What changes in a directory comes to S3 (moto, a real process), whatever happens to the two meanwhile.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{Fault, Moto, PART, Proxy, settings};
use tempfile::TempDir;
use udpack_object_store::{ObjectConfig, ObjectSink, Push, PushConfig, Settings};
use udpack_transfer::{
    Begun, Expected, IfExists, NewUpload, Overwrite, RelPath, Sink, Store, StoreConfig, Stored,
};

/// How long something may take that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

fn rel(path: &str) -> RelPath {
    path.parse().expect("a valid path")
}

fn noise(seed: u64, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

fn open(dir: &Path) -> Store {
    let config = StoreConfig {
        changes: true,
        overwrite: Overwrite::Always,
        min_free: Some(0),
        ..StoreConfig::default()
    };
    Store::open(dir, config).expect("a directory")
}

fn push(store: &Store, port: u16) -> Push {
    let config = PushConfig {
        objects: ObjectConfig {
            part: PART,
            in_flight: 2,
            settings: Settings::new(settings(port)),
            ..ObjectConfig::default()
        },
        at_once: 3,
        pause: Duration::from_millis(20),
        longest_pause: Duration::from_millis(200),
    };
    Push::new(store, "s3://bucket/p", config).expect("a right address")
}

async fn put(sink: &impl Sink, path: &str, bytes: &Bytes) {
    let path = rel(path);
    let new = NewUpload {
        size: Some(bytes.len() as u64),
        if_exists: IfExists::Overwrite,
        ..NewUpload::new(&path, "tester")
    };
    let Ok(Begun::New(mut upload)) = sink.begin(&new).await else {
        panic!("{path} cannot be stored");
    };
    if !bytes.is_empty() {
        let written = sink.write(&mut upload, 0, bytes.clone()).await;
        written.expect("it is written");
    }
    let whole = sink.finish(upload, Expected::default()).await;
    let published = sink.publish(whole.expect("all of it is there")).await;
    published.expect("the name can be had");
}

async fn remove(sink: &impl Sink, path: &str, recursive: bool) {
    let removed = sink.remove(&rel(path), recursive).await;
    removed.expect("it was there");
}

async fn read(sink: &impl Sink, path: &str) -> Stored {
    sink.read(&rel(path)).await.expect("it is there")
}

/// Runs until nothing is left to be carried.
async fn finish(push: &Push) {
    tokio::select! {
        () = push.run() => unreachable!("it runs for ever"),
        idle = tokio::time::timeout(PATIENCE, push.idle()) => {
            assert!(idle.is_ok(), "it ends: {:?}", push.status());
        }
    }
}

/// The bucket has these files and nothing else.
async fn check(moto: &Moto, files: &BTreeMap<String, Bytes>) {
    let mut keys = moto.keys().await;
    keys.sort_unstable();
    let names: Vec<_> = files.keys().map(|name| format!("p/{name}")).collect();
    assert_eq!(keys, names);
    for (name, bytes) in files {
        let found = moto.get(&format!("/bucket/p/{name}")).await;
        let (found_len, len) = (found.len(), bytes.len());
        assert!(found == **bytes, "{name}: {found_len} bytes of {len}");
    }
    assert_eq!(moto.uploads().await, 0, "no upload is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_and_goes_in_the_directory_comes_and_goes_in_the_store() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(dir.path());
    let mut files = BTreeMap::new();
    let large = 5 * PART as usize + 77;
    for (seed, (name, len)) in [("a/small", 100), ("a/empty", 0), ("b", large)]
        .iter()
        .enumerate()
    {
        let bytes = noise(seed as u64, *len);
        put(&store, name, &bytes).await;
        files.insert((*name).to_owned(), bytes);
    }
    let first = push(&store, moto.port);
    assert_eq!((first.status().waiting, first.url()), (3, "s3://bucket/p"));
    finish(&first).await;
    check(&moto, &files).await;
    let status = first.status();
    assert_eq!((status.files, status.bytes), (3, large as u64 + 100));

    // Overwritten, removed, put again; one that was removed beside the server stays in the store.
    for (name, seed) in [("b", 10), ("a/small", 11)] {
        let bytes = noise(seed, large);
        put(&store, name, &bytes).await;
        files.insert(name.to_owned(), bytes);
    }
    put(&store, "c/d/e", &noise(12, 10)).await;
    remove(&store, "c", true).await;
    remove(&store, "a/small", false).await;
    let again = noise(13, 20);
    put(&store, "a/small", &again).await;
    files.insert("a/small".to_owned(), again);
    std::fs::remove_file(dir.path().join("a/empty")).expect("it is there");
    drop(first);
    let second = push(&store, moto.port);
    finish(&second).await;
    check(&moto, &files).await;

    // A file that the store has is not sent again.
    remove(&store, "a/small", false).await;
    files.remove("a/small");
    finish(&second).await;
    check(&moto, &files).await;
    assert_eq!((second.status().waiting, second.status().removed), (0, 1));
    assert_eq!(second.status().failed, []);
    // Metadata and hash are those of the file.
    let sink = ObjectConfig {
        settings: Settings::new(settings(moto.port)),
        ..ObjectConfig::default()
    };
    let journals = tempfile::tempdir().expect("a directory");
    let sink = ObjectSink::open("s3://bucket/p", journals.path().to_owned(), sink).await;
    let sink = sink.expect("moto is there");
    let (stored, local) = (read(&sink, "b").await, read(&store, "b").await);
    assert_eq!(stored.meta(), local.meta());
    assert_eq!(
        stored.hash().await.expect("noted"),
        local.hash().await.expect("read")
    );
}

/// Answers of the store that a push outlives.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_store_refuses_for_a_while_is_stored_in_the_end() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    for (case, fault) in [
        Fault::Status(503, "SlowDown"),
        Fault::Status(403, "ExpiredToken"),
        Fault::Status(403, "AccessDenied"),
        Fault::ErrorInside("InternalError"),
        Fault::Cut,
    ]
    .into_iter()
    .enumerate()
    {
        let (proxy, dir) = (
            Proxy::start(&moto).await,
            tempfile::tempdir().expect("a directory"),
        );
        let store = open(dir.path());
        let mut files = BTreeMap::new();
        for number in 0..4 {
            let bytes = noise(case as u64 * 10 + number, number as usize * 70_000);
            put(&store, &format!("{number}"), &bytes).await;
            files.insert(format!("{number}"), bytes);
        }
        let down = Arc::new(AtomicBool::new(true));
        let (seen, count) = (down.clone(), Arc::new(AtomicU64::new(0)));
        let counted = count.clone();
        proxy.fail(move |line, number| {
            counted.fetch_add(1, Ordering::Relaxed);
            // Completions alone can have an error inside of a success.
            let fits = fault != Fault::ErrorInside("InternalError")
                || line.starts_with("POST") && line.contains("uploadId");
            let failing = seen.load(Ordering::Relaxed) || number % 5 == 0;
            (failing && fits).then_some(fault)
        });
        let push = push(&store, proxy.port);
        let run = async {
            // Away at the start, then for one request of five, then there.
            let mut done = std::pin::pin!(push.idle());
            loop {
                tokio::select! {
                    () = &mut done => break,
                    () = tokio::time::sleep(Duration::from_millis(20)) => {}
                }
                let requests = count.load(Ordering::Relaxed);
                down.store(requests < 6, Ordering::Relaxed);
                if requests > 60 {
                    proxy.fail(|_, _| None);
                }
            }
        };
        tokio::select! {
            () = push.run() => unreachable!("it runs for ever"),
            ended = tokio::time::timeout(PATIENCE, run) => {
                assert!(ended.is_ok(), "{fault:?}: {:?}", push.status());
            }
        }
        drop(push);
        // An upload that the store did not end either is ended when the store is opened again.
        let last = noise(case as u64, 1000);
        put(&store, "last", &last).await;
        files.insert("last".to_owned(), last);
        finish(&self::push(&store, moto.port)).await;
        check(&moto, &files).await;
        for name in files.keys() {
            remove(&store, name, false).await;
        }
        finish(&self::push(&store, moto.port)).await;
    }
}

/// The server falls again and again, while files come, change and go.
#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_is_cut_off_again_and_again_loses_nothing() {
    let Some(moto) = Moto::start().await else {
        return;
    };
    let (proxy, dir) = (
        Proxy::start(&moto).await,
        TempDir::new().expect("a directory"),
    );
    let mut files = BTreeMap::new();
    let mut store = open(dir.path());
    let mut seen = proxy.part_bytes.clone();
    for round in 0..12_u64 {
        for number in 0..3 {
            let (name, len) = (format!("{}", (round + number) % 5), 8 * PART as usize + 7);
            match (round + number) % 7 {
                0 if files.remove(&name).is_some() => remove(&store, &name, false).await,
                _ => {
                    let bytes = noise(round * 10 + number, len);
                    put(&store, &name, &bytes).await;
                    files.insert(name, bytes);
                }
            }
        }
        let push = push(&store, proxy.port);
        let target = *seen.borrow() + PART * (1 + round * 5 % 11);
        tokio::select! {
            () = push.run() => unreachable!("it runs for ever"),
            () = push.idle() => {}
            reached = tokio::time::timeout(PATIENCE, seen.wait_for(|sent| *sent >= target)) => {
                drop(reached.expect("parts are sent").expect("the proxy is there"));
            }
        }
        drop(push);
        // Uploads that were cut off hold the journals until they are suspended.
        drop(store);
        store = open(dir.path());
    }
    finish(&push(&store, proxy.port)).await;
    check(&moto, &files).await;
}
