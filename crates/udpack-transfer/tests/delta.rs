//! Only what differs is sent: of a new version, of a file that was moved. What a client says of a base is believed as
//! little as the base itself, and nobody learns of a file that it may not read.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::fs;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Fixture, bounded, drain, fetch, noise, readable, rel, stores, token, token_file};
use raw::{RawLane, Say, V, chunk, finish, map, resumable, with};
use serde::Deserialize;
use udpack::Socket;
use udpack_transfer::{
    Accepted, Access, Answer, Delta, Downloader, Hook, HookAccess, HookOffer, HookStored, IfExists,
    Outcome, Receiver, ReceiverConfig, Source, Store, Uploader,
};

fn keep(fixture: &Fixture, path: &str, bytes: &[u8]) {
    let path = fixture.root().join(path);
    fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
    fs::write(path, bytes).expect("write");
}

/// Uploads one source with this policy.
async fn put(socket: &Socket, source: Source, delta: Delta) -> Outcome {
    let uploader = Uploader::new(socket)
        .if_exists(IfExists::Overwrite)
        .delta(delta);
    let (mut done, failed) = drain(uploader.put([source])).await;
    assert!(failed.is_empty(), "{failed:?}");
    done.remove(0)
}

fn local(dir: &Path, bytes: &[u8]) -> std::path::PathBuf {
    let path = dir.join("local");
    fs::write(&path, bytes).expect("write");
    path
}

/// With so many pieces of these bytes inserted, at places far from each other.
fn inserted(old: &[u8], pieces: usize, each: usize) -> Vec<u8> {
    let mut new = Vec::with_capacity(old.len() + pieces * each);
    for (number, part) in old.chunks(old.len().div_ceil(pieces)).enumerate() {
        let (head, tail) = part.split_at(part.len() / 3);
        new.extend_from_slice(head);
        new.extend(noise(1000 + number as u64, each));
        new.extend_from_slice(tail);
    }
    new
}

#[tokio::test]
async fn one_percent_of_insertions_sends_no_more_than_three_percent() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let old = noise(1, 64 << 20);
        let new = inserted(&old, 16, 40 << 10);
        keep(&fixture, "d/big", &old);
        let dir = tempfile::tempdir().expect("a directory");
        let file = local(dir.path(), &new);
        let socket = fixture.connect().await;
        let source = || Source::file(&file, rel("d/big"));

        let outcome = put(&socket, source(), Delta::Always).await;
        assert!(fixture.stored("d/big") == new);
        assert_eq!(outcome.hash, *blake3::hash(&new).as_bytes());
        assert_eq!(outcome.sent + outcome.copied, new.len() as u64);
        let most = new.len() as u64 * 3 / 100;
        assert!(outcome.sent <= most, "{} of {most} sent", outcome.sent);

        // The same once more sends nothing at all.
        let outcome = put(&socket, source(), Delta::Always).await;
        assert_eq!((outcome.sent, outcome.copied), (0, new.len() as u64));
        let outcome = put(&socket, source(), Delta::Never).await;
        assert_eq!((outcome.sent, outcome.copied), (new.len() as u64, 0));
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn what_was_moved_or_cut_is_not_sent_again() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let old = noise(2, 3_000_000);
        keep(&fixture, "before", &old);
        let dir = tempfile::tempdir().expect("a directory");
        let socket = fixture.connect().await;
        for (new, sent) in [
            (old.clone(), 0),
            // Some of it gone, in another order, twice.
            (
                [&old[2_000_000..], &old[..1_500_000], &old[..]].concat(),
                200_000,
            ),
            (noise(3, 1_000_000), 1_000_000),
        ] {
            let file = local(dir.path(), &new);
            let source = Source::file(&file, rel("after/it")).base(rel("before"));
            let outcome = put(&socket, source, Delta::Always).await;
            assert!(fixture.stored("after/it") == new);
            assert!(outcome.sent <= sent, "{} of {sent} sent", outcome.sent);
            assert_eq!(outcome.sent + outcome.copied, new.len() as u64);
        }
        // There is no such file, or it is none.
        for base in ["nothing", "after"] {
            let file = local(dir.path(), &old);
            let source = Source::file(&file, rel("again")).base(rel(base));
            let outcome = put(&socket, source, Delta::Always).await;
            assert_eq!(outcome.sent, old.len() as u64);
            assert!(fixture.stored("again") == old);
        }
        assert_eq!(fixture.stored("before"), old);
    })
    .await;
}

#[tokio::test]
async fn a_client_that_may_not_read_sends_everything() {
    bounded(async {
        let fixture = Fixture::with(stores(), ReceiverConfig::default()).await;
        let old = noise(4, 1_000_000);
        keep(&fixture, "x", &old);
        let dir = tempfile::tempdir().expect("a directory");
        let file = local(dir.path(), &old);
        let socket = fixture.connect().await;
        let outcome = put(&socket, Source::file(&file, rel("x")), Delta::Always).await;
        assert_eq!((outcome.sent, outcome.copied), (old.len() as u64, 0));
    })
    .await;
}

/// Replaces a file by another of its size once its chunks have been listed.
struct Swaps {
    file: std::path::PathBuf,
    /// Which read that happens before, counted from 0, and how long the other one is.
    at: usize,
    len: usize,
    reads: AtomicUsize,
}

impl Hook for Swaps {
    fn accept<'a>(
        &'a self,
        _: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    fn allow<'a>(&'a self, what: &'a HookAccess) -> Answer<'a> {
        if what.access == Access::Read && self.reads.fetch_add(1, Ordering::Relaxed) == self.at {
            fs::write(&self.file, noise(6, self.len)).expect("write");
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn verify<'a>(&'a self, _: &'a udpack_transfer::HookWhole) -> Answer<'a> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn done(&self, _: HookStored) {}
}

#[tokio::test]
async fn a_list_of_chunks_that_is_false_costs_time_and_nothing_else() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path().join("up"), stores()).expect("a store");
        let swaps = Swaps {
            file: dir.path().join("up/x"),
            at: 1,
            len: 1_000_000,
            reads: AtomicUsize::new(0),
        };
        let receiver = Receiver::new(store, readable()).hook(swaps);
        let tokens = token_file(&dir.path().join("tokens"), &[("anna", "")]);
        let fixture = Fixture::serve(dir, receiver, tokens).await;
        let old = noise(5, 1_000_000);
        keep(&fixture, "x", &old);
        let here = tempfile::tempdir().expect("a directory");
        let file = local(here.path(), &old);
        let socket = fixture.connect_as(&token("anna")).await;
        let outcome = put(&socket, Source::file(&file, rel("x")), Delta::Always).await;
        // First it was put together wrongly, which the hash has shown.
        assert_eq!(outcome.sent, old.len() as u64);
        assert!(fixture.stored("x") == old);
        fixture.settled().await;
    })
    .await;
}

fn based(id: u64, path: &str, size: u64, base: &str) -> Say {
    let (event, data) = resumable(id, path, size);
    (
        event,
        with(with(data, "if_exists", "overwrite"), "base", base),
    )
}

fn copy(id: u64, off: u64, from: u64, len: u64) -> Say {
    let data = map([
        ("id", id.into()),
        ("off", off.into()),
        ("from", from.into()),
        ("len", len.into()),
    ]);
    ("copy", data)
}

/// Says these, the rest of a file when the server is ready for it, and gives what is heard until the file has its outcome.
async fn told(lane: &mut RawLane, script: &[Say]) -> Vec<String> {
    let mut lines = Vec::new();
    for say in script {
        lane.say(say).await;
        if say.0 == "file" {
            lines.push(lane.hear().await.line);
        }
    }
    loop {
        let heard = lane.hear().await;
        let over = !heard.line.starts_with("ready");
        lines.push(heard.line);
        if over {
            return lines;
        }
    }
}

#[tokio::test]
async fn copies_that_cannot_be_are_refused_and_nothing_is_stored() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let old = noise(7, 1000);
        keep(&fixture, "old", &old);
        fs::write(fixture.dir.path().join("outside"), &old).expect("write");
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        let plain = resumable(1, "x", 1000);
        let script = [plain, copy(1, 0, 0, 1000)];
        assert_eq!(
            told(&mut lane, &script).await,
            ["ready 1 0", "error 1 protocol_order"]
        );
        for (id, base, bad, outcome) in [
            (2, "old", copy(2, 0, 1, 1000), "size_mismatch"),
            (3, "old", copy(3, 0, u64::MAX - 5, 5), "size_mismatch"),
            (4, "old", copy(4, 0, u64::MAX, 5), "bad_message"),
            (5, "old", copy(5, 0, 0, 0), "bad_message"),
            (6, "old", copy(6, 0, 0, (16 << 20) + 1), "bad_message"),
            (7, "old", copy(7, 5, 0, 5), "bad_offset"),
            (8, "old", copy(8, 0, 0, 1001), "size_mismatch"),
            // What has no name here, or lies elsewhere, is no base.
            (9, "missing", copy(9, 0, 0, 1000), "not_found"),
            (10, "../outside", copy(10, 0, 0, 1000), "not_found"),
            (11, ".udpack/lock", copy(11, 0, 0, 1), "not_found"),
        ] {
            let lines = told(&mut lane, &[based(id, "x", 1000, base), bad]).await;
            assert_eq!(
                lines,
                [format!("ready {id} 0"), format!("error {id} {outcome}")]
            );
        }
        // In its place, but not what the hash says.
        let script = [
            based(12, "x", 1000, "old"),
            copy(12, 0, 0, 500),
            copy(12, 500, 0, 500),
            finish(12, &old),
        ];
        let lines = told(&mut lane, &script).await;
        assert_eq!(lines, ["ready 12 0", "error 12 hash_mismatch retry"]);
        assert_eq!(fixture.visible(), ["old"]);

        // Copies and chunks in any order, from any place.
        let new = [&old[300..], b"new", &old[..600]].concat();
        let script = [
            based(13, "x", 1303, "old"),
            copy(13, 0, 300, 700),
            chunk(13, 700, b"new"),
            copy(13, 703, 0, 600),
            finish(13, &new),
        ];
        let lines = told(&mut lane, &script).await;
        assert_eq!(lines, ["ready 13 0", "done 13 x 1303"]);
        assert_eq!(fixture.stored("x"), new);
        fixture.settled().await;
    })
    .await;
}

/// Downloads one file over what is in the store.
async fn get(socket: &Socket, store: &Store, path: &str, delta: Delta) -> Outcome {
    let downloader = Downloader::new(socket, store.clone())
        .if_exists(IfExists::Overwrite)
        .delta(delta);
    fetch(downloader, path).await.expect("it arrives")
}

#[tokio::test]
async fn a_download_gets_what_the_file_that_it_replaces_has_not() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path(), stores()).expect("a store");
        let here = dir.path().join("x");
        let socket = fixture.connect().await;
        let old = noise(11, 16 << 20);
        let zeros = vec![0; 2 << 20];
        let cases = [
            // The new version, the old one, and how much of it may come.
            (inserted(&old, 8, 10 << 10), old.clone(), 16 << 20 >> 5),
            (old.clone(), old.clone(), 0),
            // Some of it gone, in another order, several times.
            (
                [
                    &old[9_000_000..],
                    &old[..9_000_000],
                    &old[5_000_000..6_000_000],
                ]
                .concat(),
                old.clone(),
                300_000,
            ),
            // In the old one several times.
            (
                old[..3_000_000].to_vec(),
                old[..3_000_000].repeat(2),
                100_000,
            ),
            (
                [&zeros[..], &old[..1_000_000], &zeros[..]].concat(),
                [&old[..1_000_000], &zeros[..]].concat(),
                300_000,
            ),
            (noise(12, 1_000_000), old.clone(), 1_000_000),
            // Nothing to compare with.
            (noise(13, 1_000_000), noise(13, 1000), 1_000_000),
        ];
        for (number, (new, before, most)) in cases.into_iter().enumerate() {
            keep(&fixture, "x", &new);
            fs::write(&here, &before).expect("write");
            let outcome = get(&socket, &store, "x", Delta::Always).await;
            assert!(fs::read(&here).expect("read") == new, "{number}");
            assert_eq!(outcome.hash, *blake3::hash(&new).as_bytes());
            assert!(outcome.sent <= most, "{number}: {} sent", outcome.sent);
            let all = outcome.sent + outcome.copied + outcome.holes;
            assert_eq!((all, outcome.resumed), (new.len() as u64, 0), "{number}");
        }
        fs::write(&here, &old).expect("write");
        keep(&fixture, "x", &old);
        let outcome = get(&socket, &store, "x", Delta::Never).await;
        assert_eq!((outcome.sent, outcome.copied), (old.len() as u64, 0));
        // Nothing is here.
        fs::remove_file(&here).expect("remove");
        let outcome = get(&socket, &store, "x", Delta::Always).await;
        assert_eq!((outcome.sent, outcome.copied), (old.len() as u64, 0));
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn a_file_that_changes_behind_its_list_is_still_downloaded_as_it_is() {
    for len in [1_000_000, 999_999, 1_500_000] {
        bounded(async {
            let dir = tempfile::tempdir().expect("a directory");
            let store = Store::open(dir.path().join("up"), stores()).expect("a store");
            let swaps = Swaps {
                file: dir.path().join("up/x"),
                at: 1,
                len,
                reads: AtomicUsize::new(0),
            };
            let receiver = Receiver::new(store, readable()).hook(swaps);
            let tokens = token_file(&dir.path().join("tokens"), &[("anna", "")]);
            let fixture = Fixture::serve(dir, receiver, tokens).await;
            let old = noise(5, 1_000_000);
            keep(&fixture, "x", &old);
            let here = tempfile::tempdir().expect("a directory");
            fs::write(here.path().join("x"), &old).expect("write");
            let store = Store::open(here.path(), stores()).expect("a store");
            let socket = fixture.connect_as(&token("anna")).await;
            let outcome = get(&socket, &store, "x", Delta::Always).await;
            assert_eq!(outcome.size, len as u64);
            assert!(fs::read(here.path().join("x")).expect("read") == noise(6, len));
        })
        .await;
    }
}

#[derive(Deserialize)]
struct Chunks {
    size: u64,
    end: u64,
    #[serde(deserialize_with = "list")]
    chunks: Vec<u8>,
}

/// What is `bin`.
fn list<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    struct Bin;

    impl serde::de::Visitor<'_> for Bin {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("bin")
        }

        fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }
    }

    from.deserialize_bytes(Bin)
}

#[tokio::test]
async fn parts_that_overlap_are_those_of_the_whole_list() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        keep(&fixture, "x", &noise(21, 1_000_000));
        let socket = fixture.connect().await;
        let lane = RawLane::open(&socket).await;
        let ask = async |from: u64, to: u64| {
            let (event, data) = chunks("x", 4096, from);
            let found: Chunks = lane
                .request(&(event, with(data, "to", to)))
                .await
                .expect("a list");
            // Where each chunk ends, and its hash.
            let mut end = from;
            let ends = found.chunks.chunks_exact(20).map(|chunk| {
                let (len, hash) = chunk.split_at(4);
                end += u64::from(u32::from_be_bytes(len.try_into().expect("4 bytes")));
                (end, hash.to_vec())
            });
            let ends: Vec<_> = ends.collect();
            assert_eq!(ends.last().map_or(from, |(end, _)| *end), found.end);
            ends
        };
        let whole = ask(0, u64::MAX).await;
        assert_eq!(whole.last().map(|(end, _)| *end), Some(1_000_000));
        // It ends with the chunk that goes beyond what was asked for.
        let first = ask(0, 500_000).await;
        assert_eq!(whole[..first.len()], first[..]);
        assert!(first[first.len() - 2].0 < 500_000 && first[first.len() - 1].0 >= 500_000);
        // From the middle on it is the same list after a few chunks.
        let rest = ask(400_000, u64::MAX).await;
        let again = rest.iter().position(|chunk| whole.contains(chunk));
        let again = again.expect("a chunk of the whole list");
        assert!(again < 10, "{again} other chunks");
        assert_eq!(whole[whole.len() - (rest.len() - again)..], rest[again..]);
        for (from, to) in [(0, 0), (5, 5), (5, 3), (u64::MAX, 0)] {
            assert!(ask(from, to).await.is_empty(), "{from} {to}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_base_of_many_parts_is_found_whole() {
    bounded(async {
        // As long as several parts, which are cut at the same time.
        let fixture = Fixture::with(stores(), readable()).await;
        let old = noise(22, 70 << 20);
        let new = [&old[40 << 20..], b"between", &old[..40 << 20]].concat();
        keep(&fixture, "x", &old);
        let dir = tempfile::tempdir().expect("a directory");
        let file = local(dir.path(), &new);
        let socket = fixture.connect().await;
        let outcome = put(&socket, Source::file(&file, rel("x")), Delta::Always).await;
        assert!(fixture.stored("x") == new);
        // The share that may be sent before the last part is known, and what is around the borders.
        let most = (new.len() / 64).max(1 << 20) + (300 << 10);
        assert!(outcome.sent <= most as u64, "{} sent", outcome.sent);
        assert_eq!(outcome.sent + outcome.copied, new.len() as u64);
        fixture.settled().await;
    })
    .await;
}

fn chunks(path: &str, average: u64, from: u64) -> Say {
    let data = map([
        ("path", path.into()),
        ("average", average.into()),
        ("from", from.into()),
    ]);
    ("chunks", data)
}

#[tokio::test]
async fn only_what_may_be_read_has_its_chunks_listed() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path().join("up"), stores()).expect("a store");
        let receiver = Receiver::new(store, ReceiverConfig::default());
        let clients = [
            ("anna", "scope=read,write prefix=anna"),
            ("otto", "scope=write"),
        ];
        let tokens = token_file(&dir.path().join("tokens"), &clients);
        let fixture = Fixture::serve(dir, receiver, tokens).await;
        keep(&fixture, "anna/own", &noise(8, 100_000));
        keep(&fixture, "secret", &noise(9, 100_000));
        let anna = fixture.connect_as(&token("anna")).await;
        let lane = RawLane::open(&anna).await;
        let found: Chunks = lane.request(&chunks("own", 8192, 0)).await.expect("a list");
        assert_eq!((found.size, found.end), (100_000, 100_000));
        for from in [100_000, 100_001, u64::MAX] {
            let found: Chunks = lane
                .request(&chunks("own", 8192, from))
                .await
                .expect("a list");
            assert_eq!((found.size, found.end), (100_000, from));
        }
        for (path, average, code) in [
            ("secret", 8192, "not_found"),
            ("../secret", 8192, "bad_name"),
            ("", 8192, "bad_name"),
            ("own", 0, "$bad_payload"),
            ("own", 8193, "$bad_payload"),
            ("own", 1 << 40, "$bad_payload"),
        ] {
            let refused = lane.request::<Chunks>(&chunks(path, average, 0)).await;
            let (code_found, _) = refused.err().expect(path);
            assert_eq!(
                code_found.trim_start_matches('$'),
                code.trim_start_matches('$'),
                "{path}"
            );
        }
        // To whom reading is not granted, what is there and what is not look alike.
        let otto = fixture.connect_as(&token("otto")).await;
        let mut lane = RawLane::open(&otto).await;
        for path in ["secret", "missing"] {
            let refused = lane.request::<Chunks>(&chunks(path, 8192, 0)).await;
            assert_eq!(refused.err().expect(path).0, "forbidden");
        }
        for (id, base) in [(1, "secret"), (2, "missing")] {
            let script = [based(id, "mine", 100_000, base), copy(id, 0, 0, 100_000)];
            let lines = told(&mut lane, &script).await;
            assert_eq!(
                lines,
                [format!("ready {id} 0"), format!("error {id} not_found")]
            );
        }
        let _: V = map([("x", 1.into())]);
    })
    .await;
}
