//! Sparse files: holes are told instead of sent, and stay holes, in both directions. What a peer says of holes is held to the
//! size and the order of the file as its bytes are.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use common::{Fixture, bounded, drain, fetch, noise, readable, rel, stores};
use raw::{RawLane, Say, V, chunk, file, finish, map, resumable, with};
use udpack::{Channel, Client, Deny, Hello, Identity, Peer, Server, Socket};
use udpack_transfer::{
    CHANNEL, Delta, Downloader, IfExists, Memory, Outcome, Receiver, Source, Store, TransferError,
    Uploader,
};

const MIB: u64 = 1 << 20;

/// A file of this size, with data at these places.
fn sparse(path: &Path, size: u64, data: &[(u64, &[u8])]) {
    let file = File::create(path).expect("create");
    file.set_len(size).expect("a length");
    for (at, bytes) in data {
        file.write_all_at(bytes, *at).expect("write");
    }
    file.sync_all().expect("sync");
}

/// Bytes on disk.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).expect("there").blocks() * 512
}

/// Whether the file system of the tests keeps holes; where it does not, nothing can be said of room.
fn keeps_holes(dir: &Path) -> bool {
    let path = dir.join("probe");
    sparse(&path, 16 * MIB, &[]);
    let keeps = allocated(&path) < MIB;
    fs::remove_file(path).expect("remove");
    keeps
}

async fn put(socket: &Socket, source: Source, uploader: impl Fn(Uploader) -> Uploader) -> Outcome {
    let uploader = uploader(Uploader::new(socket).if_exists(IfExists::Overwrite));
    let (mut done, failed) = drain(uploader.put([source])).await;
    assert!(failed.is_empty(), "{failed:?}");
    done.remove(0)
}

async fn get(socket: &Socket, store: &Store, path: &str) -> Result<Outcome, TransferError> {
    fetch(Downloader::new(socket, store.clone()), path).await
}

#[tokio::test]
async fn holes_are_neither_sent_nor_stored_in_both_directions() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let dir = tempfile::tempdir().expect("a directory");
        let local = dir.path().join("disk");
        let (first, second) = (noise(1, 700_000), noise(2, 300_001));
        // Data in the beginning, in the middle and at the end; and a file that is nothing but a hole.
        type Case<'a> = (u64, Vec<(u64, &'a [u8])>);
        let cases: [Case<'_>; 4] = [
            (40 * MIB, vec![(0, &first), (20 * MIB, &second)]),
            (
                20 * MIB + 300_001,
                vec![(3 * MIB, &first), (20 * MIB, &second)],
            ),
            (16 * MIB, vec![]),
            (16 * MIB + 1, vec![(16 * MIB, b"x")]),
        ];
        let keeps = keeps_holes(dir.path());
        let socket = fixture.connect().await;
        for (size, data) in cases {
            sparse(&local, size, &data);
            let bytes: u64 = data.iter().map(|(_, bytes)| bytes.len() as u64).sum();
            let whole = fs::read(&local).expect("read");
            // A hole begins where a block of the file system does.
            let most = bytes + 4 * 65_536;

            let source = Source::file(&local, rel("disk"));
            let outcome = put(&socket, source, |up| up.delta(Delta::Never)).await;
            assert!(fixture.stored("disk") == whole);
            assert_eq!(outcome.hash, *blake3::hash(&whole).as_bytes());
            let at_server = fixture.root().join("disk");
            if keeps {
                assert!(outcome.sent <= most, "{} sent", outcome.sent);
                assert_eq!(outcome.sent + outcome.holes, size);
                assert!(allocated(&at_server) <= most, "{size}");
            }

            let store = Store::open(dir.path().join("down"), stores()).expect("a store");
            let outcome = get(&socket, &store, "disk").await.expect("it arrives");
            let back = dir.path().join("down/disk");
            assert!(fs::read(&back).expect("read") == whole);
            if keeps {
                assert!(outcome.sent <= most, "{} sent", outcome.sent);
                assert_eq!(outcome.sent + outcome.holes, size);
                assert!(allocated(&back) <= most, "{size}");
            }
            fs::remove_file(back).expect("remove");
        }
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn a_new_version_keeps_its_holes_and_copies_what_is_known() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let dir = tempfile::tempdir().expect("a directory");
        let local = dir.path().join("disk");
        let data = noise(3, 2_000_000);
        sparse(&local, 32 * MIB, &[(8 * MIB, &data)]);
        let keeps = keeps_holes(dir.path());
        let socket = fixture.connect().await;
        let source = || Source::file(&local, rel("disk"));
        put(&socket, source(), |up| up).await;
        sparse(&local, 48 * MIB, &[(24 * MIB, &data), (40 * MIB, b"new")]);
        let whole = fs::read(&local).expect("read");
        let outcome = put(&socket, source(), |up| up.delta(Delta::Always)).await;
        assert!(fixture.stored("disk") == whole);
        assert!(outcome.sent <= 300_000, "{} sent", outcome.sent);
        if keeps {
            assert!(outcome.holes > 40 * MIB, "{} holes", outcome.holes);
            assert!(allocated(&fixture.root().join("disk")) <= 3 * MIB);
        }
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn a_sink_and_a_client_that_does_not_ask_get_zeros() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let local = dir.path().join("disk");
        let data = noise(4, 300_000);
        sparse(&local, 4 * MIB, &[(2 * MIB, &data)]);
        let whole = fs::read(&local).expect("read");
        let receiver = Receiver::into_sink(Memory::new(64 << 20), readable());
        let server = receiver
            .attach(Server::builder())
            .identity(Identity::generate().expect("a key"))
            .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
            .bind("127.0.0.1:0")
            .await
            .expect("a free port");
        let socket = connect(&server).await;
        let new = |up: Uploader| up.if_exists(IfExists::Error);
        let outcome = put(&socket, Source::file(&local, rel("disk")), new).await;
        assert_eq!(outcome.hash, *blake3::hash(&whole).as_bytes());

        // Offered without asking what is there, and asked for without the word.
        let outcome = put(&socket, Source::file(&local, rel("plain")), |up| {
            new(up).resume(false)
        })
        .await;
        assert_eq!((outcome.sent, outcome.holes), (4 * MIB, 0));
        let mut lane = RawLane::open(&socket).await;
        let wish = map([("id", V::Uint(1)), ("path", "disk".into())]);
        lane.say(&("get", wish)).await;
        let mut bytes = Vec::new();
        loop {
            let heard = lane.hear().await;
            assert!(!heard.line.starts_with("hole"), "{}", heard.line);
            bytes.extend_from_slice(&heard.bytes);
            if heard.line.starts_with("finish") {
                break;
            }
        }
        assert!(bytes == whole);
    })
    .await;
}

fn hole(id: u64, off: u64, len: u64) -> Say {
    let data = map([("id", id.into()), ("off", off.into()), ("len", len.into())]);
    ("hole", data)
}

#[tokio::test]
async fn holes_that_cannot_be_are_refused_and_nothing_is_stored() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        let negative = map([("id", 6.into()), ("off", 0.into()), ("len", V::Int(-1))]);
        for (id, said, code) in [
            (1, vec![hole(1, 0, 2 * MIB + 1)], "size_mismatch"),
            (2, vec![chunk(2, 0, b"abc"), hole(2, 2, 5)], "bad_offset"),
            (3, vec![hole(3, 1, 5)], "bad_offset"),
            (4, vec![hole(4, 0, 0)], "bad_message"),
            (5, vec![hole(5, 0, 16 * MIB + 1)], "bad_message"),
            (6, vec![("hole", negative)], "bad_message"),
            (7, vec![hole(7, 0, 5), hole(7, 0, 5)], "bad_offset"),
            (8, vec![hole(8, u64::MAX, 16 * MIB)], "bad_offset"),
            // Zeros that are not what the hash says, or too few.
            (
                9,
                vec![hole(9, 0, 2 * MIB), with_size(finish(9, b"abc"), 2 * MIB)],
                "hash_mismatch retry",
            ),
            (
                10,
                vec![hole(10, 0, MIB), finish(10, &[0; 1 << 20])],
                "size_mismatch",
            ),
        ] {
            lane.say(&resumable(id, "x", 2 * MIB)).await;
            assert_eq!(lane.hear().await.line, format!("ready {id} 0"));
            for say in &said {
                lane.say(say).await;
            }
            assert_eq!(lane.hear().await.line, format!("error {id} {code}"));
        }
        assert!(fixture.visible().is_empty());

        // Of a file without a size no more than the disk has room for.
        let (event, data) = resumable(11, "x", 0);
        lane.say(&(event, raw::without(data, "size"))).await;
        assert_eq!(lane.hear().await.line, "ready 11 0");
        lane.say(&hole(11, 0, MIB)).await;
        lane.say(&finish(11, &[0; 1 << 20])).await;
        assert_eq!(lane.hear().await.line, format!("done 11 x {MIB}"));
        assert!(fixture.stored("x") == [0; 1 << 20]);
        fixture.settled().await;
    })
    .await;
}

fn with_size((event, data): Say, size: u64) -> Say {
    (event, with(data, "size", size))
}

#[tokio::test]
async fn what_an_earlier_attempt_wrote_is_given_back_where_a_hole_comes() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let keeps = keeps_holes(fixture.dir.path());
        let size = 8 * MIB;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        lane.say(&resumable(1, "x", size)).await;
        assert_eq!(lane.hear().await.line, "ready 1 0");
        let old = noise(5, 1 << 18);
        for part in 0..16 {
            lane.say(&chunk(1, part << 18, &old)).await;
        }
        lane.safe(1, 4 * MIB).await;
        lane.say(&("cancel", map([("id", 1.into()), ("keep", true.into())])))
            .await;
        assert_eq!(lane.hear().await.line, "error 1 cancelled");

        lane.say(&resumable(2, "x", size)).await;
        assert_eq!(lane.hear().await.line, "ready 2 1");
        lane.say(&hole(2, 0, size - 3)).await;
        lane.say(&chunk(2, size - 3, b"end")).await;
        let mut whole = vec![0; 8 << 20];
        whole[(8 << 20) - 3..].copy_from_slice(b"end");
        lane.say(&finish(2, &whole)).await;
        assert_eq!(lane.hear().await.line, format!("done 2 x {size}"));
        assert!(fixture.stored("x") == whole);
        if keeps {
            assert!(allocated(&fixture.root().join("x")) <= 65_536);
        }
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn an_interrupted_hole_is_durable_and_resumed() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let size = 40 * MIB;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        lane.say(&resumable(1, "x", size)).await;
        assert_eq!(lane.hear().await.line, "ready 1 0");
        lane.say(&chunk(1, 0, b"begin")).await;
        lane.say(&hole(1, 5, 16 * MIB)).await;
        lane.say(&hole(1, 5 + 16 * MIB, 16 * MIB)).await;
        lane.safe(1, 5 + 32 * MIB).await;
        drop(lane);
        drop(socket);
        let fixture = fixture.reopen(stores(), readable()).await;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        let mut whole = vec![0; 40 << 20];
        whole[..5].copy_from_slice(b"begin");
        lane.say(&resumable(1, "x", size)).await;
        let ready = lane.hear().await;
        let held = 5 + (32 << 20);
        let hash = *blake3::hash(&whole[..held]).as_bytes();
        assert_eq!(ready.have, [(0, held as u64, hash)]);
        lane.say(&hole(1, held as u64, size - held as u64)).await;
        lane.say(&finish(1, &whole)).await;
        assert_eq!(lane.hear().await.line, format!("done 1 x {size}"));
        assert!(fixture.stored("x") == whole);
    })
    .await;
}

async fn connect(server: &Server) -> Socket {
    Client::builder()
        .pin(server.fingerprint())
        .connect(&server.local_addr().to_string())
        .await
        .expect("it lets us in")
}

/// A server that answers each `get` with this.
async fn hostile(answer: fn(u64) -> Vec<Say>) -> (Server, Socket) {
    let serve = move |channel: Channel| async move {
        while let Ok(Some(message)) = channel.recv().await {
            if message.event() == "get" {
                let id = message.fields().and_then(|fields| fields.u64("id"));
                for (event, data) in answer(id.expect("an id")) {
                    if channel.send(event, &data).await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    let server = Server::builder()
        .identity(Identity::generate().expect("a key"))
        .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
        .channel(CHANNEL, serve)
        .bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let socket = connect(&server).await;
    (server, socket)
}

#[tokio::test]
async fn a_server_that_lies_about_holes_leaves_nothing() {
    bounded(async {
        let scripts: [fn(u64) -> Vec<Say>; 5] = [
            |id| vec![file(id, "f", 8), hole(id, 0, 9), finish(id, &[0; 9])],
            |id| vec![file(id, "f", 8), hole(id, 4, 4), finish(id, &[0; 8])],
            |id| {
                vec![
                    file(id, "f", 8),
                    chunk(id, 0, b"abcd"),
                    hole(id, 3, 5),
                    finish(id, b"abcd\0\0\0\0"),
                ]
            },
            |id| vec![file(id, "f", 8), hole(id, 0, 8), finish(id, b"abcdefgh")],
            |id| vec![file(id, "f", 8), hole(id, 0, u64::MAX), finish(id, &[0; 8])],
        ];
        for (number, script) in scripts.into_iter().enumerate() {
            let (_server, socket) = hostile(script).await;
            let dir = tempfile::tempdir().expect("a directory");
            let store = Store::open(dir.path().join("down"), stores()).expect("a store");
            let got = get(&socket, &store, "f").await;
            assert!(got.is_err(), "{number}");
            assert!(!dir.path().join("down/f").exists(), "{number}");
        }
    })
    .await;
}
