//! Transfers over several paths at once: they add up, and one that is cut costs what was under way on it.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{TOKEN, known, memory, noise, readable};
use tempfile::TempDir;
use tokio::time::Instant;
use udpack::testing::Net;
use udpack::{Client, Identity, Server};
use udpack_transfer::{Downloader, Event, Link, Receiver, Store, StoreConfig, Uploader, Wanted};

/// Bytes a second of each path.
const RATE: u64 = 1_000_000;
/// No transfer here takes longer by the network's clock.
const PATIENCE: Duration = Duration::from_secs(600);

/// A server on a network on which each client has a path of its own.
struct Site {
    net: Net,
    server: Server,
    dir: TempDir,
}

impl Site {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path().join("up"), StoreConfig::default()).expect("a store");
        let net = Net::new(7).delay(Duration::from_millis(20)).rate(RATE);
        let builder = Server::builder()
            .identity(Identity::generate().expect("a key"))
            .auth(known);
        let server = net
            .bind(Receiver::new(store, readable()).attach(builder))
            .await
            .expect("an address");
        Self { net, server, dir }
    }

    /// A link by a path of its own.
    fn path(&self) -> Link {
        let builder = Client::builder()
            .pin(self.server.fingerprint())
            .token(TOKEN);
        let client = self.net.attach(builder).build().expect("a client");
        Link::new(client, self.server.local_addr().to_string())
    }
}

fn of(paths: &[&Link]) -> Link {
    let names = ["one", "two"].iter().map(|name| (*name).to_owned());
    let paths = names.zip(paths.iter().map(|link| (*link).clone()));
    Link::of_paths(paths).expect("a path")
}

fn files(seed: u64, count: usize, size: usize) -> BTreeMap<String, Vec<u8>> {
    (0..count)
        .map(|n| (format!("{seed}/{n}"), noise(seed + n as u64, size)))
        .collect()
}

/// What was seen of a transfer.
#[derive(Debug, Default)]
struct Seen {
    done: BTreeMap<String, usize>,
    lost: Vec<String>,
    /// The longest time in which nothing arrived.
    pause: Duration,
    took: Duration,
}

/// Follows a transfer to its end; once half of it has arrived, `half` is called.
macro_rules! follow {
    ($transfer:expr, $half:expr) => {{
        let mut transfer = $transfer;
        let began = Instant::now();
        let (mut last, mut acked, mut half) = (began, 0, Some($half));
        let mut seen = Seen::default();
        let all = async {
            while let Some(event) = transfer.next().await {
                match event {
                    Event::Done(outcome) => *seen.done.entry(outcome.path).or_default() += 1,
                    Event::Failed { path, error, .. } => panic!("{path}: {error}"),
                    Event::PathLost { path, .. } => seen.lost.push(path),
                    _ => {}
                }
                let progress = transfer.progress();
                if progress.acked > acked {
                    seen.pause = seen.pause.max(last.elapsed());
                    (last, acked) = (Instant::now(), progress.acked);
                }
                if progress.listed
                    && progress.acked >= progress.total / 2
                    && let Some(half) = half.take()
                {
                    half();
                }
            }
        };
        tokio::time::timeout(PATIENCE, all).await.expect("in time");
        seen.took = began.elapsed();
        seen
    }};
}

fn check(seen: &Seen, files: &BTreeMap<String, Vec<u8>>, root: &std::path::Path) {
    assert!(seen.done.values().all(|times| *times == 1), "{seen:?}");
    assert_eq!(seen.done.len(), files.len());
    for (path, bytes) in files {
        let stored = std::fs::read(root.join(path)).expect("the file is there");
        assert!(stored == *bytes, "{path} differs");
    }
}

#[tokio::test(start_paused = true)]
async fn two_paths_carry_nearly_twice_as_much() {
    let site = Site::new().await;
    let send = async |seed, link: &Link| {
        let files = files(seed, 80, 300_000);
        let sources: Vec<_> = files
            .iter()
            .map(|(path, bytes)| memory(path, bytes.clone()))
            .collect();
        let seen = follow!(Uploader::new(link).put(sources), || ());
        check(&seen, &files, &site.dir.path().join("up"));
        seen.took
    };
    let one = send(1, &site.path()).await;
    let (first, second) = (site.path(), site.path());
    let both = of(&[&first, &second]);
    let two = send(100, &both).await;
    assert!(two.mul_f64(1.5) < one, "{one:?} by one, {two:?} by two");
    for path in both.paths() {
        assert!(path.moved > 8_000_000, "{path:?}");
    }

    let files = files(1, 80, 300_000);
    let get = async |link: &Link, dir: &TempDir| {
        let store = Store::open(
            dir.path(),
            StoreConfig {
                shared: true,
                ..StoreConfig::default()
            },
        );
        let wanted: Vec<_> = files.keys().map(|path| wanted(path)).collect();
        let download = Downloader::new(link, store.expect("a store")).get(wanted);
        let seen = follow!(download, || ());
        check(&seen, &files, dir.path());
        seen.took
    };
    let (here, there) = (
        tempfile::tempdir().expect("a directory"),
        tempfile::tempdir().expect("a directory"),
    );
    let one = get(&site.path(), &here).await;
    let two = get(&both, &there).await;
    assert!(two.mul_f64(1.5) < one, "{one:?} by one, {two:?} by two");
}

fn wanted(path: &str) -> Wanted {
    Wanted {
        remote: path.parse().expect("a path"),
        local: path.parse().expect("a path"),
        size: Some(300_000),
    }
}

#[tokio::test(start_paused = true)]
async fn a_path_that_is_cut_costs_what_was_under_way_on_it() {
    let site = Site::new().await;
    let files = files(1, 80, 300_000);
    let sources: Vec<_> = files
        .iter()
        .map(|(path, bytes)| memory(path, bytes.clone()))
        .collect();
    let (first, second) = (site.path(), site.path());
    let both = of(&[&first, &second]);
    let cut = || {
        let socket = second.live().expect("a connection");
        site.net.cut_client(&socket);
    };
    let seen = follow!(Uploader::new(&both).put(sources), cut);
    check(&seen, &files, &site.dir.path().join("up"));
    assert!(seen.lost.iter().any(|path| path == "two"), "{seen:?}");
    assert!(seen.lost.iter().all(|path| path == "two"), "{seen:?}");
    assert!(seen.pause < Duration::from_secs(2), "{seen:?}");
    // What was under way there is at most a window, and the rest went over the other path.
    let moved: u64 = both.paths().iter().map(|path| path.moved).sum();
    assert!(moved < 80 * 300_000 + 2_000_000, "{:?}", both.paths());

    // The other direction.
    let here = tempfile::tempdir().expect("a directory");
    let store = Store::open(
        here.path(),
        StoreConfig {
            shared: true,
            ..StoreConfig::default()
        },
    );
    let (third, fourth) = (site.path(), site.path());
    let both = of(&[&third, &fourth]);
    let cut = || {
        let socket = fourth.live().expect("a connection");
        site.net.cut_client(&socket);
    };
    let wanted: Vec<_> = files.keys().map(|path| wanted(path)).collect();
    let download = Downloader::new(&both, store.expect("a store")).get(wanted);
    let seen = follow!(download, cut);
    check(&seen, &files, here.path());
    assert!(seen.lost.iter().any(|path| path == "two"), "{seen:?}");
    assert!(seen.pause < Duration::from_secs(2), "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn without_a_path_that_leads_there_every_file_fails() {
    let site = Site::new().await;
    let (first, second) = (site.path(), site.path());
    let both = of(&[&first, &second]);
    site.net.take_down(&site.server);
    let files = files(1, 5, 300_000);
    let sources: Vec<_> = files
        .iter()
        .map(|(path, bytes)| memory(path, bytes.clone()))
        .collect();
    let mut upload = Uploader::new(&both).put(sources);
    let mut failed = Vec::new();
    let all = async {
        while let Some(event) = upload.next().await {
            match event {
                Event::Failed { path, .. } => failed.push(path),
                Event::Done(outcome) => panic!("{outcome:?}"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(2 * PATIENCE, all)
        .await
        .expect("in time");
    failed.sort();
    assert_eq!(failed, files.into_keys().collect::<Vec<_>>());
    assert!(both.eager().await.is_err());
}
