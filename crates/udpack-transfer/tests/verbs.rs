//! What a lane does besides taking files: directories, links, downloads, requests, rights, the operator's hook,
//! and the channel on which all of that is watched. Word for word, with messages made by hand.
//!
//! After everything the same questions are asked: is nothing left on the server that was not asked for, and does
//! an honest client get its file stored.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Fixture, bounded, noise, token, token_file};
use raw::{
    Heard, RawLane, Say, V, cancel, chunk, dir, file, finish, get, link, map, put, ranges,
    resumable, with, without,
};
use serde::Deserialize;
use tokio::sync::Notify;
use udpack::{Channel, CloseCode, Deny, Hello, Limits, Peer, RequestError, Socket};
use udpack_transfer::wire::MetaFields;
use udpack_transfer::{
    Accepted, Answer, Hook, HookAccess, HookOffer, HookStored, HookWhole, JOBS_CHANNEL, Limiter,
    Overwrite, Receiver, ReceiverConfig, Store, StoreConfig,
};

const MIB: usize = 1 << 20;

/// Who may come in, and what they may do.
const CLIENTS: &[(&str, &str)] = &[
    ("plain", ""),
    ("all", "scope=read,write,delete"),
    ("reader", "scope=read"),
    ("writer", "scope=write"),
    ("remover", "scope=delete"),
    ("boss", "scope=read,write,delete,admin"),
    ("tenant", "scope=read,write,delete prefix=teams/a"),
    ("small", "scope=read,write prefix=small quota=10K"),
    ("lone", "scope=read,write prefix=not/there"),
    ("broken", "scope=everything"),
    ("astray", "prefix=../etc"),
    ("countless", "quota=lots"),
];

/// The token of one of them.
struct World {
    fixture: Fixture,
    files: u64,
}

impl World {
    async fn new() -> Self {
        Self::with(|receiver| receiver).await
    }

    async fn with(change: impl FnOnce(Receiver) -> Receiver) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = StoreConfig {
            overwrite: Overwrite::Always,
            ..StoreConfig::default()
        };
        let store = Store::open(dir.path().join("up"), store).expect("a store");
        let receiver = change(Receiver::new(store, ReceiverConfig::default()));
        let tokens = dir.path().join("tokens");
        let tokens = token_file(&tokens, CLIENTS);
        let fixture = Fixture::serve(dir, receiver, tokens).await;
        Self { fixture, files: 0 }
    }

    async fn socket(&self, name: &str) -> Socket {
        self.fixture.connect_as(&token(name)).await
    }

    async fn lane(&self, name: &str) -> (Socket, RawLane) {
        let socket = self.socket(name).await;
        let lane = RawLane::open(&socket).await;
        (socket, lane)
    }

    /// Puts a file into the store behind its back.
    fn put(&self, path: &str, bytes: &[u8]) {
        let path = self.fixture.root().join(path);
        fs::create_dir_all(path.parent().expect("a directory")).expect("directories");
        fs::write(path, bytes).expect("a file");
    }

    /// Makes a large file without writing it.
    fn put_large(&self, path: &str, size: usize) {
        let file = fs::File::create(self.fixture.root().join(path)).expect("a file");
        file.set_len(size as u64).expect("a hole");
    }

    /// All lanes end, nothing is staged or promised, and an honest client is served.
    async fn well(&mut self, after: &str) {
        self.lanes_are_over(after).await;
        let usage = self.fixture.store.usage();
        assert_eq!((usage.reserved, usage.open), (0, 0), "{after}");
        self.files += 1;
        let bytes = noise(self.files, 5000);
        let (_socket, mut lane) = self.lane("plain").await;
        lane.say(&file(1, "honest", 5000)).await;
        lane.say(&chunk(1, 0, &bytes)).await;
        lane.say(&finish(1, &bytes)).await;
        assert_eq!(lane.hear().await.line, "done 1 honest 5000", "{after}");
        assert_eq!(self.fixture.stored("honest"), bytes, "{after}");
        fs::remove_file(self.fixture.root().join("honest")).expect("a stored file");
    }

    async fn lanes_are_over(&self, after: &str) {
        until(after, || {
            let sockets = self.fixture.server.sockets();
            sockets.iter().map(Socket::channels).sum::<usize>() == 0
        })
        .await;
        self.fixture.settled().await;
    }
}

/// Waits until something holds.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "not in time: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Ends a lane in order.
async fn end(mut lane: RawLane) {
    lane.channel.finish().await.unwrap_or_default();
    let heard = lane.hear().await;
    assert_eq!(heard.line, "end", "{heard:?}");
}

// ---------------------------------------------------------------------------------- directories and links

fn at(base: Say, key: &str, value: impl Into<V>) -> Say {
    (base.0, with(base.1, key, value))
}

/// Path, mode and, if it was told, time of a directory.
type OnDisk = (&'static str, u32, Option<(i64, i64)>);

#[tokio::test]
async fn directories_are_made_with_their_mode_and_time() {
    bounded(async {
        let mut world = World::new().await;
        world.put("taken", b"bytes");
        let (socket, mut lane) = world.lane("plain").await;
        let root = world.fixture.root();
        let full = at(
            at(at(dir(1, "d/e"), "mode", 0o7750), "mtime", V::Int(-5)),
            "mtime_ns",
            7,
        );
        // What is said, the answer, and then mode and time on disk.
        let steps: Vec<(Say, &str, Option<OnDisk>)> = vec![
            (full, "done 1 d/e 0", Some(("d/e", 0o750, Some((-5, 7))))),
            (
                dir(2, "d/e"),
                "done 2 d/e 0 same",
                Some(("d/e", 0o750, None)),
            ),
            (
                at(dir(3, "d/e"), "mode", 0o711),
                "done 3 d/e 0 same",
                Some(("d/e", 0o711, None)),
            ),
            // Its owner is never locked out.
            (
                at(dir(4, "d/f"), "mode", 0),
                "done 4 d/f 0",
                Some(("d/f", 0o700, None)),
            ),
            (
                at(dir(5, "g"), "mtime", 1_000_000_000),
                "done 5 g 0",
                Some(("g", 0o700, Some((1_000_000_000, 0)))),
            ),
            (dir(6, "taken"), "error 6 exists", None),
            (dir(7, "taken/x"), "error 7 exists", None),
            (dir(8, "../x"), "error 8 bad_name", None),
            (dir(9, ".udpack"), "error 9 bad_name", None),
            (dir(10, ""), "error 10 bad_name", None),
            (dir(10, "again"), "error 10 protocol_order", None),
            (
                at(dir(11, "h"), "mtime_ns", 1_000_000_000),
                "error 11 bad_message",
                None,
            ),
            (
                at(dir(12, "h"), "mode", "0755"),
                "error 12 bad_message",
                None,
            ),
            (
                ("dir", map([("id", 13.into())])),
                "error 13 bad_message",
                None,
            ),
            (
                at(dir(14, "h"), "mtime", i64::MAX.unsigned_abs()),
                "done 14 h 0",
                Some(("h", 0o700, None)),
            ),
        ];
        for (said, answer, on_disk) in steps {
            lane.say(&said).await;
            let heard = lane.hear().await;
            assert_eq!(heard.line, answer, "{said:?}: {heard:?}");
            if heard.line.starts_with("done") {
                assert_eq!(heard.hash, Some(*blake3::hash(b"").as_bytes()));
                assert!(heard.sync.is_some());
            }
            if let Some((path, mode, time)) = on_disk {
                let metadata = fs::metadata(root.join(path)).expect("a directory");
                assert!(metadata.is_dir());
                assert_eq!(metadata.mode() & 0o7777, mode, "{said:?}");
                if let Some(time) = time {
                    let found = (metadata.mtime(), metadata.mtime_nsec());
                    assert_eq!(found, time, "{said:?}");
                }
            }
        }
        assert_eq!(world.fixture.stored("taken"), b"bytes");
        // Not while a file is open; that one goes on.
        lane.say(&file(20, "x", 4)).await;
        lane.say(&dir(21, "k")).await;
        assert_eq!(lane.hear().await.line, "error 21 protocol_order");
        lane.say(&link(22, "k", "x")).await;
        assert_eq!(lane.hear().await.line, "error 22 protocol_order");
        lane.say(&chunk(20, 0, b"abcd")).await;
        lane.say(&finish(20, b"abcd")).await;
        assert_eq!(lane.hear().await.line, "done 20 x 4");
        end(lane).await;
        assert_eq!(
            world.fixture.visible(),
            ["d/", "d/e/", "d/f/", "g/", "h/", "taken", "x"]
        );
        drop(socket);
        world.well("directories").await;
    })
    .await;
}

#[tokio::test]
async fn links_lead_nowhere_but_below_the_root() {
    bounded(async {
        let mut world = World::new().await;
        fs::write(world.fixture.dir.path().join("secret"), "secret").expect("a file outside");
        world.put("file", b"bytes");
        let (socket, mut lane) = world.lane("plain").await;
        let good = [
            ("l0", "file"),
            ("d/l1", "../file"),
            ("d/e/l2", "../../d/./x"),
            ("l3", "."),
            ("d/l4", ".."),
            ("l5", "not there"),
            ("l6", "a\nb"),
        ];
        let bad = [
            "",
            "..",
            "/",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a/../../x",
            "a/../..",
            "./../x",
            ".udpack/staging",
            "a/../.udpack",
            "a\0b",
        ];
        let long = "x/".repeat(4096);
        let mut id = 0;
        for (name, target) in good {
            id += 1;
            lane.say(&link(id, name, target)).await;
            assert_eq!(lane.hear().await.line, format!("done {id} {name} 0"));
            let found = fs::read_link(world.fixture.root().join(name)).expect("a link");
            assert_eq!(found.to_str(), Some(target));
            id += 1;
            lane.say(&link(id, name, target)).await;
            assert_eq!(lane.hear().await.line, format!("done {id} {name} 0 same"));
        }
        let before = world.fixture.visible();
        for target in bad.into_iter().chain([long.as_str()]) {
            for policy in ["same", "error", "skip", "overwrite", "rename"] {
                id += 1;
                lane.say(&at(link(id, "evil", target), "if_exists", policy))
                    .await;
                let heard = lane.hear().await;
                assert_eq!(heard.line, format!("error {id} forbidden"), "{target:?}");
                assert!(!heard.text.contains(char::is_control), "{:?}", heard.text);
            }
        }
        // Two levels up from one level deep, and from a depth that is enough.
        id += 1;
        lane.say(&link(id, "d/evil", "../../secret")).await;
        assert_eq!(lane.hear().await.line, format!("error {id} forbidden"));
        assert_eq!(world.fixture.visible(), before);
        // A name that is taken.
        let taken = [
            ("l0", "same", "exists"),
            ("l0", "error", "exists"),
            ("l0", "rename", "exists"),
            ("file", "same", "exists"),
            ("d", "overwrite", "exists"),
            ("../x", "same", "bad_name"),
            ("x", "destroy", "bad_message"),
        ];
        for (name, policy, code) in taken {
            id += 1;
            lane.say(&at(link(id, name, "other"), "if_exists", policy))
                .await;
            let heard = lane.hear().await;
            assert_eq!(heard.line, format!("error {id} {code}"), "{name} {policy}");
        }
        id += 1;
        lane.say(&at(link(id, "l0", "other"), "if_exists", "overwrite"))
            .await;
        assert_eq!(lane.hear().await.line, format!("done {id} l0 0"));
        // Nothing goes through a link, and it is no file.
        for name in ["l3/x", "d/l4/x"] {
            id += 1;
            lane.say(&file(id, name, 0)).await;
            assert_eq!(lane.hear().await.line, format!("error {id} exists"));
            id += 1;
            lane.say(&dir(id, name)).await;
            assert_eq!(lane.hear().await.line, format!("error {id} exists"));
            id += 1;
            lane.say(&link(id, name, "x")).await;
            assert_eq!(lane.hear().await.line, format!("error {id} exists"));
        }
        end(lane).await;
        assert_eq!(world.fixture.visible(), before);
        assert_eq!(world.fixture.stored("file"), b"bytes");
        drop(socket);
        world.well("links").await;
    })
    .await;
}

// ------------------------------------------------------------------------------------------------ downloads

/// What came of one `get`: what was told first, the bytes by offset, and the last word.
#[derive(Debug)]
struct Got {
    first: Heard,
    pieces: Vec<(u64, Vec<u8>)>,
    last: Heard,
}

impl Got {
    fn bytes(&self) -> u64 {
        self.pieces
            .iter()
            .map(|(_, bytes)| bytes.len() as u64)
            .sum()
    }

    /// What was not sent is taken from `have`.
    fn over(&self, mut have: Vec<u8>) -> Vec<u8> {
        for (offset, bytes) in &self.pieces {
            let offset = usize::try_from(*offset).expect("small");
            let end = offset + bytes.len();
            if have.len() < end {
                have.resize(end, 0);
            }
            have[offset..end].copy_from_slice(bytes);
        }
        have
    }
}

/// Hears a download to its end; `keep` says whether the bytes are kept.
async fn hear_file(lane: &mut RawLane, id: u64, keep: bool) -> Got {
    let first = lane.hear().await;
    let mut got = Got {
        last: first.clone(),
        first,
        pieces: Vec::new(),
    };
    if !got.first.line.starts_with("file") {
        return got;
    }
    let mut end = 0;
    loop {
        let heard = lane.hear().await;
        let Some(rest) = heard.line.strip_prefix(&format!("chunk {id} ")) else {
            got.last = heard;
            return got;
        };
        let offset: u64 = rest
            .split(' ')
            .next()
            .and_then(|offset| offset.parse().ok())
            .expect("an offset");
        assert!(offset >= end, "out of order");
        assert!(!heard.bytes.is_empty());
        end = offset + heard.bytes.len() as u64;
        let bytes = if keep { heard.bytes.to_vec() } else { vec![] };
        got.pieces.push((offset, bytes));
    }
}

/// What it is called, what the client has, which ranges of that it tells, how many bytes must come.
type Try<'a> = (&'static str, &'a [u8], Vec<(u64, u64)>, u64);

#[tokio::test]
async fn a_download_sends_what_the_client_does_not_have() {
    bounded(async {
        let mut world = World::new().await;
        let bytes = noise(1, MIB + 5);
        world.put("big", &bytes);
        world.put("empty", b"");
        let path = world.fixture.root().join("big");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("a file of ours");
        let metadata = fs::metadata(&path).expect("it");
        let size = bytes.len() as u64;
        let mut other = bytes.clone();
        other[700_000] ^= 1;
        let longer: Vec<u8> = bytes.iter().copied().chain([1, 2, 3]).collect();
        let all = size;
        let tries: Vec<Try<'_>> = vec![
            ("nothing", &bytes, vec![], all),
            ("all", &bytes, vec![(0, size)], 0),
            ("all in two", &bytes, vec![(0, 9), (9, size - 9)], 0),
            ("the beginning", &bytes, vec![(0, 300_000)], all - 300_000),
            ("the end", &bytes, vec![(size - 5, 5)], all - 5),
            (
                "islands",
                &bytes,
                vec![(1, 1), (3, 4), (500_000, 100_000)],
                all - 100_005,
            ),
            ("all, unequal", &other, vec![(0, size)], all),
            (
                "one part unequal",
                &other,
                vec![(0, 600_000), (600_000, 200_000), (800_000, size - 800_000)],
                200_000,
            ),
            ("more than there is", &longer, vec![(0, size + 3)], all),
            ("what begins after it", &longer, vec![(size, 3)], all),
            (
                "what reaches beyond",
                &longer,
                vec![(0, 1000), (1000, size - 997)],
                all - 1000,
            ),
        ];
        let (socket, mut lane) = world.lane("reader").await;
        let mut id = 0;
        for (name, has, parts, expected) in tries {
            id += 1;
            lane.say(&at(get(id, "big"), "have", ranges(has, &parts)))
                .await;
            let got = hear_file(&mut lane, id, true).await;
            assert_eq!(got.first.line, format!("file {id} big {size}"), "{name}");
            let told = MetaFields {
                mtime: Some(metadata.mtime()),
                mtime_ns: u32::try_from(metadata.mtime_nsec()).expect("small"),
                mode: Some(0o640),
            };
            let mut meta = got.first.meta;
            meta.mode = meta.mode.map(|mode| mode & 0o777);
            assert_eq!(meta, told, "{name}");
            assert_eq!(got.last.line, format!("finish {id} {size}"), "{name}");
            let hash = *blake3::hash(&bytes).as_bytes();
            assert_eq!(got.last.hash, Some(hash), "{name}");
            assert_eq!(got.bytes(), expected, "{name}");
            let mut all = got.over(has.to_vec());
            all.truncate(bytes.len());
            assert!(all == bytes, "{name}: other bytes");
            lane.say(&("done", map([("id", id.into())]))).await;
        }
        id += 1;
        lane.say(&get(id, "empty")).await;
        let got = hear_file(&mut lane, id, true).await;
        assert_eq!(got.first.line, format!("file {id} empty 0"));
        assert_eq!(got.last.line, format!("finish {id} 0"));
        assert_eq!(got.last.hash, Some(*blake3::hash(b"").as_bytes()));
        end(lane).await;
        drop(socket);
        fs::remove_file(path).expect("it");
        world.well("downloads").await;
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_downloaded_is_refused_and_the_next_one_comes() {
    bounded(async {
        let mut world = World::new().await;
        fs::write(world.fixture.dir.path().join("secret"), "secret").expect("a file outside");
        world.put("d/x", b"abcd");
        let root = world.fixture.root();
        symlink("d/x", root.join("link")).expect("a link");
        symlink("../secret", root.join("out")).expect("a link");
        symlink("d", root.join("dirlink")).expect("a link");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .expect("a fifo");
        let long = "x".repeat(256);
        let have = |value: V| -> V { value };
        let hash = || V::Bin(vec![7; 32]);
        let range = |off: u64, len: u64| V::Array(vec![off.into(), len.into(), hash()]);
        let refused: Vec<(&str, V, &str)> = vec![
            ("missing", V::Nil, "not_found"),
            ("missing/x", V::Nil, "not_found"),
            ("d/x/y", V::Nil, "not_found"),
            ("dirlink/x", V::Nil, "not_found"),
            ("d", V::Nil, "is_directory"),
            ("link", V::Nil, "not_a_file"),
            ("out", V::Nil, "not_a_file"),
            ("fifo", V::Nil, "not_a_file"),
            ("../secret", V::Nil, "bad_name"),
            ("/etc/passwd", V::Nil, "bad_name"),
            (".udpack/lock", V::Nil, "bad_name"),
            ("", V::Nil, "bad_name"),
            (&long, V::Nil, "bad_name"),
            ("d/x", have("all".into()), "bad_message"),
            ("d/x", V::Array(vec![1.into()]), "bad_message"),
            (
                "d/x",
                V::Array(vec![range(4, 1), range(0, 1)]),
                "bad_message",
            ),
            (
                "d/x",
                V::Array(vec![range(0, 2), range(1, 2)]),
                "bad_message",
            ),
            ("d/x", V::Array(vec![range(u64::MAX, 2)]), "bad_message"),
            ("d/x", V::Array(vec![range(1, 0)]), "bad_message"),
            (
                "d/x",
                V::Array(vec![V::Array(vec![0.into(), 4.into()])]),
                "bad_message",
            ),
            (
                "d/x",
                V::Array(vec![V::Array(vec![
                    0.into(),
                    4.into(),
                    V::Bin(vec![7; 31]),
                ])]),
                "bad_message",
            ),
            (
                "d/x",
                V::Array((0..8193).map(|n| range(2 * n, 1)).collect()),
                "bad_message",
            ),
        ];
        let (socket, mut lane) = world.lane("reader").await;
        let mut id = 0;
        for (path, have, code) in refused {
            id += 1;
            lane.say(&at(get(id, path), "have", have)).await;
            let heard = lane.hear().await;
            assert_eq!(
                heard.line,
                format!("error {id} {code}"),
                "{path}: {heard:?}"
            );
            let outside = world.fixture.dir.path().to_string_lossy().into_owned();
            assert!(!heard.text.contains(&outside), "{}", heard.text);
            id += 1;
            lane.say(&get(id, "d/x")).await;
            let got = hear_file(&mut lane, id, true).await;
            assert_eq!(got.over(vec![]), b"abcd", "after {path}");
            assert_eq!(got.last.line, format!("finish {id} 4"));
        }
        // The numbers are those of files.
        lane.say(&get(id, "d/x")).await;
        assert_eq!(lane.hear().await.line, format!("error {id} protocol_order"));
        end(lane).await;
        // Without the right to read nothing is told, not even that it is missing.
        for name in ["plain", "writer", "remover"] {
            let (_socket, mut lane) = world.lane(name).await;
            for (id, path) in [(1, "d/x"), (2, "missing"), (3, "../x")] {
                lane.say(&get(id, path)).await;
                assert_eq!(lane.hear().await.line, format!("error {id} forbidden"));
            }
            end(lane).await;
        }
        drop(socket);
        world.well("refused downloads").await;
    })
    .await;
}

#[tokio::test]
async fn a_download_may_be_given_up_in_the_middle() {
    bounded(async {
        let world = World::new().await;
        world.put_large("large", 96 * MIB);
        world.put("x", b"abcd");
        let (socket, mut lane) = world.lane("reader").await;
        // One on its way, one that waits, and one after both.
        for (id, path) in [(1, "large"), (2, "large"), (3, "x")] {
            lane.say(&get(id, path)).await;
        }
        assert_eq!(lane.hear().await.line, format!("file 1 large {}", 96 * MIB));
        // The one that waits first: once the other is over, it is on its way.
        lane.say(&cancel(2)).await;
        lane.say(&cancel(1)).await;
        let mut sent = 0;
        loop {
            let heard = lane.hear().await;
            if heard.line == "error 1 cancelled" {
                break;
            }
            sent += heard.bytes.len();
            assert!(heard.line.starts_with("chunk 1 "), "{heard:?}");
        }
        assert!(sent < 96 * MIB, "all of it came");
        assert_eq!(lane.hear().await.line, "error 2 cancelled");
        let got = hear_file(&mut lane, 3, true).await;
        assert_eq!(got.over(vec![]), b"abcd");
        // Again, and of what never was, and of what is over.
        for id in [1, 2, 3] {
            lane.say(&cancel(id)).await;
            lane.say(&("done", map([("id", id.into())]))).await;
        }
        lane.say(&cancel(9)).await;
        assert_eq!(lane.hear().await.line, "error 9 protocol_order");
        // A file goes up beside a download.
        lane.say(&get(10, "large")).await;
        assert!(lane.hear().await.line.starts_with("file 10 "));
        end_in_the_middle(world, socket, lane).await;
    })
    .await;
}

/// A download is on its way and nobody reads it.
async fn end_in_the_middle(mut world: World, socket: Socket, lane: RawLane) {
    // The lane is closed.
    lane.channel.close(CloseCode::NORMAL, "enough").await;
    world.lanes_are_over("a closed lane").await;
    // The client has said all it has to say, and is gone then.
    let lane = RawLane::open(&socket).await;
    for id in 1..=64 {
        lane.say(&get(id, "large")).await;
    }
    lane.channel.finish().await.expect("the server reads");
    socket.abort(CloseCode::new(0x1001), "gone");
    world.lanes_are_over("a socket that is gone").await;
    world.well("downloads that nobody reads").await;
}

#[tokio::test]
async fn sixty_four_downloads_may_wait_and_are_served_in_order() {
    bounded(async {
        let mut world = World::new().await;
        world.put_large("large", 24 * MIB);
        world.put("x", b"abcd");
        let (socket, mut lane) = world.lane("reader").await;
        lane.say(&get(1, "large")).await;
        assert!(lane.hear().await.line.starts_with("file 1 "));
        for id in 2..=66 {
            lane.say(&get(id, "x")).await;
        }
        // Whatever is refused is told between the others.
        let mut order = Vec::new();
        let mut refused = Vec::new();
        while order.len() < 64 {
            let heard = lane.hear().await;
            let mut words = heard.line.split(' ');
            match (words.next(), words.next()) {
                (Some("finish"), Some(id)) => order.push(id.to_owned()),
                (Some("error"), Some(_)) => refused.push(heard.line),
                _ => {}
            }
        }
        assert_eq!(
            refused,
            ["error 65 protocol_order", "error 66 protocol_order"]
        );
        let expected: Vec<_> = (1..=64_u64).map(|id| id.to_string()).collect();
        assert_eq!(order, expected);
        // There is room again.
        lane.say(&get(67, "x")).await;
        let got = hear_file(&mut lane, 67, true).await;
        assert_eq!(got.last.line, "finish 67 4");
        end(lane).await;
        drop(socket);
        world.well("65 downloads").await;
    })
    .await;
}

#[tokio::test]
async fn a_file_that_changes_while_it_is_sent_is_not_finished() {
    bounded(async {
        let mut world = World::new().await;
        let path = world.fixture.root().join("large");
        type Change = fn(&std::path::Path);
        let changes: &[(&str, Change, Option<&str>)] = &[
            (
                "grows",
                |path| {
                    let file = fs::File::options().write(true).open(path).expect("it");
                    file.set_len(40 << 20).expect("a hole");
                },
                Some("error 1 source_changed retry"),
            ),
            (
                "shrinks",
                |path| {
                    let file = fs::File::options().write(true).open(path).expect("it");
                    file.set_len(1 << 20).expect("fewer");
                },
                Some("error 1 source_changed retry"),
            ),
            (
                "other bytes",
                |path| {
                    let file = fs::File::options().write(true).open(path).expect("it");
                    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0).expect("written");
                },
                Some("error 1 source_changed retry"),
            ),
            // What was opened is sent whole.
            (
                "another file of that name",
                |path| {
                    let beside = path.with_extension("new");
                    fs::write(&beside, "new").expect("a file");
                    fs::rename(beside, path).expect("a rename");
                },
                None,
            ),
            ("is gone", |path| fs::remove_file(path).expect("it"), None),
        ];
        for (name, change, outcome) in changes {
            world.put_large("large", 32 * MIB);
            let (socket, mut lane) = world.lane("reader").await;
            lane.say(&get(1, "large")).await;
            // It cannot be sent as a whole before somebody reads.
            assert!(lane.hear().await.line.starts_with("file 1 "));
            // What changes before it is read is sent as it is then.
            assert!(lane.hear().await.line.starts_with("chunk 1 0 "));
            change(&path);
            let last = loop {
                let heard = lane.hear().await;
                if !heard.line.starts_with("chunk") {
                    break heard.line;
                }
            };
            let whole = format!("finish 1 {}", 32 * MIB);
            assert_eq!(last, outcome.unwrap_or(&whole), "{name}");
            end(lane).await;
            drop(socket);
            let _ = fs::remove_file(&path);
            world.well(name).await;
        }
    })
    .await;
}

// ------------------------------------------------------------------------------------------------- requests

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Entry {
    path: String,
    kind: String,
    size: u64,
    mtime: i64,
    mtime_ns: u32,
    mode: u32,
    target: Option<String>,
    #[serde(default)]
    unread: bool,
}

#[derive(Debug, Deserialize)]
struct Page {
    entries: Vec<Entry>,
    more: bool,
}

impl Page {
    fn paths(&self) -> Vec<&str> {
        self.entries
            .iter()
            .map(|entry| entry.path.as_str())
            .collect()
    }
}

/// A page in rows.
#[derive(Debug, Deserialize)]
struct Rows {
    dirs: Vec<(String, Vec<Row>)>,
    more: bool,
}

/// Name, kind, size, mtime, mtime_ns, mode, target, unread.
#[derive(Debug, Deserialize)]
struct Row(
    String,
    String,
    u64,
    i64,
    u32,
    u32,
    #[serde(default)] Option<String>,
    #[serde(default)] bool,
);

impl Rows {
    /// The entries that they stand for.
    fn entries(self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for (dir, rows) in self.dirs {
            for Row(name, kind, size, mtime, mtime_ns, mode, target, unread) in rows {
                let path = match &*dir {
                    "" => name,
                    dir => format!("{dir}/{name}"),
                };
                entries.push(Entry {
                    path,
                    kind,
                    size,
                    mtime,
                    mtime_ns,
                    mode,
                    target,
                    unread,
                });
            }
        }
        entries
    }
}

#[derive(Debug, PartialEq, Deserialize)]
struct Removed {
    files: u64,
    bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Hashed {
    size: u64,
    #[serde(deserialize_with = "hash")]
    hash: [u8; 32],
}

fn hash<'de, D: serde::Deserializer<'de>>(from: D) -> Result<[u8; 32], D::Error> {
    struct Bytes;
    impl serde::de::Visitor<'_> for Bytes {
        type Value = [u8; 32];
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("32 bytes")
        }
        fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<[u8; 32], E> {
            bytes.try_into().map_err(E::custom)
        }
    }
    from.deserialize_bytes(Bytes)
}

fn of(event: &'static str, path: &str) -> Say {
    (event, map([("path", path.into())]))
}

/// The code of the fault that a request gets, or `reply`.
async fn code(lane: &RawLane, say: &Say) -> String {
    match lane.request::<serde::de::IgnoredAny>(say).await {
        Ok(_) => "reply".to_owned(),
        Err((code, message)) => {
            assert!(!message.contains(char::is_control), "{message:?}");
            code
        }
    }
}

#[tokio::test]
async fn requests_say_what_is_there_and_remove_it() {
    bounded(async {
        let mut world = World::new().await;
        world.put("d/x", b"abcd");
        world.put("d/e/y", b"abc");
        world.put("d-z", b"");
        world.put(".hidden", b"hidden");
        let root = world.fixture.root();
        symlink("d/x", root.join("link")).expect("a link");
        symlink("/etc/passwd", root.join("out")).expect("a link");
        fs::set_permissions(root.join("d/x"), fs::Permissions::from_mode(0o604)).expect("ours");
        let (socket, lane) = world.lane("all").await;

        let entry: Entry = lane.request(&of("stat", "d/x")).await.expect("it");
        let metadata = fs::metadata(root.join("d/x")).expect("it");
        let expected = Entry {
            path: "d/x".to_owned(),
            kind: "file".to_owned(),
            size: 4,
            mtime: metadata.mtime(),
            mtime_ns: u32::try_from(metadata.mtime_nsec()).expect("small"),
            mode: 0o604,
            target: None,
            unread: false,
        };
        assert_eq!(entry, expected);
        for (path, kind, target) in [
            ("d", "dir", None),
            ("", "dir", None),
            ("link", "link", Some("d/x")),
            // Where it leads on the server is nobody's business.
            ("out", "link", None),
        ] {
            let entry: Entry = lane.request(&of("stat", path)).await.expect("it");
            assert_eq!((&*entry.path, &*entry.kind, entry.size), (path, kind, 0));
            assert_eq!(entry.target.as_deref(), target);
        }
        let entry: Entry = lane.request(&("stat", map([]))).await.expect("the root");
        assert_eq!((&*entry.path, &*entry.kind), ("", "dir"));

        let list = |path: &str, recursive: bool| at(of("list", path), "recursive", recursive);
        for (path, recursive, expected) in [
            ("", false, vec![".hidden", "d", "d-z", "link", "out"]),
            (
                "",
                true,
                vec![".hidden", "d", "d/e", "d/e/y", "d/x", "d-z", "link", "out"],
            ),
            ("d", false, vec!["d/e", "d/x"]),
            ("d", true, vec!["d/e", "d/e/y", "d/x"]),
            ("d/x", false, vec!["d/x"]),
            ("link", true, vec!["link"]),
        ] {
            let page: Page = lane.request(&list(path, recursive)).await.expect("it");
            assert_eq!(page.paths(), expected, "{path:?}");
            assert!(!page.more);
            let query = at(list(path, recursive), "rows", true);
            let rows: Rows = lane.request(&query).await.expect("it");
            assert!(!rows.more);
            assert_eq!(rows.entries(), page.entries, "{path:?}");
            // In pages of every size.
            for limit in 1..=expected.len() as u64 {
                let (mut found, mut after) = (Vec::new(), V::Nil);
                loop {
                    let query = at(list(path, recursive), "limit", limit);
                    let query = at(query, "after", after);
                    let page: Page = lane.request(&query).await.expect("it");
                    assert!(page.entries.len() as u64 <= limit);
                    let Some(last) = page.entries.last() else {
                        assert!(!page.more);
                        break;
                    };
                    after = last.path.as_str().into();
                    found.extend(page.entries.iter().map(|entry| entry.path.clone()));
                    if !page.more {
                        break;
                    }
                }
                assert_eq!(found, expected, "{path:?} in pages of {limit}");
            }
        }

        let hashed: Hashed = lane.request(&of("hash", "d/x")).await.expect("it");
        assert_eq!(hashed.size, 4);
        assert_eq!(hashed.hash, *blake3::hash(b"abcd").as_bytes());

        let faults: Vec<(Say, &str)> = vec![
            (of("stat", "missing"), "not_found"),
            (of("stat", "../x"), "bad_name"),
            (of("stat", ".hidden/x"), "not_found"),
            (of("stat", ".udpack"), "bad_name"),
            (of("stat", "link/x"), "not_found"),
            (of("list", "missing"), "not_found"),
            (of("list", "/"), "bad_name"),
            (at(of("list", ""), "after", "../x"), "bad_name"),
            (of("hash", "d"), "is_directory"),
            (of("hash", "link"), "not_a_file"),
            (of("hash", "missing"), "not_found"),
            (of("hash", ""), "bad_name"),
            (of("remove", "missing"), "not_found"),
            (of("remove", "d"), "not_empty"),
            (of("remove", ""), "bad_name"),
            (of("remove", ".."), "bad_name"),
            (of("remove", ".udpack"), "bad_name"),
            (of("remove", "link/x"), "not_found"),
            // The wrong types.
            (("hash", map([])), "bad_payload"),
            (("remove", map([])), "bad_payload"),
            (("remove", map([("path", V::Nil)])), "bad_payload"),
            (("stat", V::Nil), "bad_payload"),
            (("stat", "d".into()), "bad_payload"),
            (("stat", V::Array(vec![])), "bad_payload"),
            (("stat", map([("path", 1.into())])), "bad_payload"),
            (("stat", map([("path", b"d".into())])), "bad_payload"),
            (at(of("list", ""), "limit", V::Int(-1)), "bad_payload"),
            (at(of("list", ""), "limit", "all"), "bad_payload"),
            (at(of("list", ""), "recursive", 1), "bad_payload"),
            (at(of("list", ""), "after", 1), "bad_payload"),
            (at(of("remove", "d"), "recursive", "yes"), "bad_payload"),
            // No such requests, though some are events.
            (of("read", "d/x"), "no_handler"),
            (get(1, "d/x"), "no_handler"),
            (file(1, "x", 0), "no_handler"),
            (of("STAT", "d/x"), "no_handler"),
            (("what", V::Nil), "no_handler"),
            // Whatever is asked for is bounded.
            (at(of("list", ""), "limit", u64::MAX), "reply"),
            (at(of("list", ""), "limit", 0), "reply"),
            (at(of("list", ""), "unknown", 1), "reply"),
        ];
        let before = world.fixture.visible();
        for (say, expected) in faults {
            assert_eq!(code(&lane, &say).await, expected, "{say:?}");
        }
        assert_eq!(world.fixture.visible(), before);

        let remove = |path: &str, recursive: bool| at(of("remove", path), "recursive", recursive);
        for (path, recursive, files, bytes) in [
            // The link, not what it leads to.
            ("link", true, 1, 0),
            ("d/x", false, 1, 4),
            ("d", true, 1, 3),
            ("out", false, 1, 0),
        ] {
            let removed: Removed = lane.request(&remove(path, recursive)).await.expect("it");
            assert_eq!(removed, Removed { files, bytes }, "{path}");
        }
        assert_eq!(world.fixture.visible(), [".hidden", "d-z"]);
        drop((socket, lane));
        world.well("requests").await;
    })
    .await;
}

/// What each client may do.
#[tokio::test]
async fn every_verb_needs_its_right() {
    bounded(async {
        let mut world = World::new().await;
        let table: &[(&str, &str)] = &[
            ("plain", "write"),
            ("all", "read write delete"),
            ("reader", "read"),
            ("writer", "write"),
            ("remover", "delete"),
            ("boss", "read write delete"),
        ];
        for (name, rights) in table {
            world.put("x", b"abcd");
            let (socket, mut lane) = world.lane(name).await;
            let may = |right: &str| rights.split(' ').any(|own| own == right);
            let verbs: Vec<(Say, &str)> = vec![
                (of("stat", "x"), "read"),
                (of("stat", ""), "read"),
                (of("list", ""), "read"),
                (of("hash", "x"), "read"),
                (of("stat", "missing"), "read"),
                (of("remove", "x"), "delete"),
            ];
            for (say, right) in verbs {
                let answer = code(&lane, &say).await;
                let expected = match say.1 == of("", "missing").1 {
                    true if may(right) => "not_found",
                    _ if may(right) => "reply",
                    _ => "forbidden",
                };
                assert_eq!(answer, expected, "{name}: {say:?}");
            }
            world.put("x", b"abcd");
            let events: Vec<(Say, &str)> = vec![
                (dir(1, "d"), "write"),
                (link(2, "l", "x"), "write"),
                (get(3, "missing"), "read"),
                (file(4, "new", 0), "write"),
            ];
            for (say, right) in events {
                lane.say(&say).await;
                if say.0 == "file" {
                    lane.say(&finish(4, b"")).await;
                }
                let heard = lane.hear().await.line;
                let forbidden = heard.ends_with(" forbidden");
                assert_eq!(!forbidden, may(right), "{name}: {say:?}: {heard}");
            }
            if !may("write") {
                assert_eq!(world.fixture.visible(), ["x"], "{name}");
            }
            end(lane).await;
            drop(socket);
            for entry in world.fixture.visible() {
                let path = world.fixture.root().join(&entry);
                if entry.ends_with('/') {
                    fs::remove_dir(path).expect("it");
                } else {
                    fs::remove_file(path).expect("it");
                }
            }
            world.well(name).await;
        }
        // Whoever has an entry that makes no sense does nothing at all.
        for name in ["broken", "astray", "countless"] {
            let socket = world.socket(name).await;
            for channel in ["transfer", JOBS_CHANNEL] {
                let channel = socket.open(channel).await.expect("a channel");
                let mut lane = RawLane::over(channel);
                lane.say(&file(1, "x", 0)).await;
                assert_eq!(lane.hear().await.line, "closed refused", "{name}");
            }
            drop(socket);
            world.well(name).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_token_brings_its_rights_to_the_lanes_that_are_open() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path().join("up"), StoreConfig::default()).expect("a store");
        let receiver = Receiver::new(store, ReceiverConfig::default());
        // The token says itself what it allows.
        let auth = |hello: Hello| async move {
            let claims = hello
                .token()
                .split(' ')
                .filter_map(|claim| claim.split_once('='));
            let claims = claims.map(|(key, value)| (key.to_owned(), value.to_owned()));
            Ok::<_, Deny>(Peer::new("tester").with_claims(claims.collect()))
        };
        let fixture = Fixture::serve(dir, receiver, auth).await;
        let socket = fixture.connect_as("scope=write").await;
        let mut lane = RawLane::open(&socket).await;
        let bytes = noise(1, 5000);
        lane.say(&file(1, "begun", 5000)).await;
        lane.say(&chunk(1, 0, &bytes)).await;
        lane.acked(1, 5000).await;
        lane.say(&get(2, "begun")).await;
        assert_eq!(lane.hear().await.line, "error 2 forbidden");

        let watcher = Watcher::open(&socket).await;
        socket.refresh("scope=read").await.expect("the same client");
        lane.say(&finish(1, &bytes)).await;
        assert_eq!(
            lane.hear().await.line,
            "done 1 begun 5000",
            "it had begun before"
        );
        lane.say(&file(3, "more", 5000)).await;
        assert_eq!(lane.hear().await.line, "error 3 forbidden");
        let watched = loop {
            if let Err(error) = watcher.channel.recv().await {
                break error.reason().code;
            }
        };
        assert_eq!(watched, CloseCode::REFUSED);
        let entry = lane.request::<Hashed>(&of("hash", "begun")).await;
        entry.expect("reading is allowed now");

        socket
            .refresh("scope=read prefix=a")
            .await
            .expect("the same client");
        lane.say(&get(4, "begun")).await;
        let heard = lane.hear().await;
        let reason = lane.channel.close_reason().expect("a reason");
        assert_eq!(reason.code, CloseCode::REFUSED, "{heard:?}");
        let mut lane = RawLane::open(&socket).await;
        lane.say(&get(1, "begun")).await;
        assert_eq!(lane.hear().await.line, "error 1 not_found");
    })
    .await;
}

#[tokio::test]
async fn a_prefix_is_all_there_is() {
    bounded(async {
        let mut world = World::new().await;
        world.put("teams/a/x", b"abcd");
        world.put("teams/a/teams/a/deep", b"deep");
        world.put("teams/ab/secret", b"secret");
        world.put("teams/b/secret", b"secret");
        world.put("secret", b"secret");
        symlink("../b/secret", world.fixture.root().join("teams/a/out")).expect("a link");
        symlink("x", world.fixture.root().join("teams/a/in")).expect("a link");
        let (socket, mut lane) = world.lane("tenant").await;
        let entry: Entry = lane.request(&("stat", map([]))).await.expect("the root");
        assert_eq!((&*entry.path, &*entry.kind), ("", "dir"));
        let list = at(of("list", ""), "recursive", true);
        let page: Page = lane.request(&list).await.expect("it");
        let all = ["in", "out", "teams", "teams/a", "teams/a/deep", "x"];
        assert_eq!(page.paths(), all);
        let targets: Vec<_> = page.entries.iter().map(|entry| &entry.target).collect();
        assert_eq!(targets[0].as_deref(), Some("x"));
        assert_eq!(targets[1].as_deref(), None, "leads out of its root");
        for (n, path) in all.iter().enumerate() {
            let query = at(list.clone(), "after", *path);
            let page: Page = lane.request(&query).await.expect("it");
            assert_eq!(page.paths(), all[n + 1..], "after {path}");
        }
        // What is beside cannot be named, by any of the ways of naming.
        let before = world.fixture.visible();
        let mut id = 0;
        for path in [
            "secret",
            "../b/secret",
            "../ab/secret",
            "b/secret",
            "teams/b/secret",
            "/teams/b/secret",
            "../../secret",
            "x/../../b/secret",
            "out",
            "out/secret",
            "..",
        ] {
            for event in ["stat", "list", "hash", "remove"] {
                if path == "out" && event != "hash" {
                    continue;
                }
                match lane
                    .request::<serde::de::IgnoredAny>(&of(event, path))
                    .await
                {
                    Ok(_) => panic!("{event} {path} was answered"),
                    Err((code, message)) => {
                        let codes = ["bad_name", "not_found", "not_a_file"];
                        assert!(codes.contains(&&*code), "{event} {path}: {code}");
                        let told = message.contains("teams/a") || message.contains("secret\"");
                        assert!(!told || message.contains(path), "{message}");
                    }
                }
            }
            id += 1;
            lane.say(&get(id, path)).await;
            let heard = lane.hear().await;
            assert!(heard.line.starts_with("error"), "{path}: {heard:?}");
        }
        for target in ["../b/secret", "..", "../../x", "teams/../../b"] {
            id += 1;
            lane.say(&link(id, "evil", target)).await;
            assert_eq!(lane.hear().await.line, format!("error {id} forbidden"));
        }
        assert_eq!(world.fixture.visible(), before);
        // Sentences name what the client named.
        let (_, message) = lane
            .request::<Hashed>(&of("hash", "none"))
            .await
            .expect_err("it is not there");
        assert_eq!(message, "not found: none");
        id += 1;
        let (event, data) = file(id, "x", 4);
        lane.say(&(event, with(data, "if_exists", "error"))).await;
        let heard = lane.hear().await;
        assert_eq!(heard.text, "the name is taken: x");
        // Everything it makes lies below.
        id += 1;
        lane.say(&dir(id, "new")).await;
        assert_eq!(lane.hear().await.line, format!("done {id} new 0"));
        id += 1;
        lane.say(&link(id, "new/l", "../x")).await;
        assert_eq!(lane.hear().await.line, format!("done {id} new/l 0"));
        id += 1;
        let (event, data) = file(id, "x", 4);
        lane.say(&(event, with(data, "if_exists", "rename"))).await;
        lane.say(&chunk(id, 0, b"efgh")).await;
        lane.say(&finish(id, b"efgh")).await;
        assert_eq!(lane.hear().await.line, format!("done {id} x (1) 4"));
        id += 1;
        lane.say(&get(id, "x (1)")).await;
        let got = hear_file(&mut lane, id, true).await;
        assert_eq!(got.first.line, format!("file {id} x (1) 4"));
        assert_eq!(got.over(vec![]), b"efgh");
        assert_eq!(world.fixture.stored("teams/a/x (1)"), b"efgh");
        let removed: Removed = lane
            .request(&at(of("remove", "teams"), "recursive", true))
            .await
            .expect("its own");
        assert_eq!(removed, Removed { files: 1, bytes: 4 });
        assert!(world.fixture.root().join("teams/b/secret").exists());
        end(lane).await;
        // A root that nobody has written to yet is empty, not missing.
        let (other, mut lane) = world.lane("lone").await;
        let page: Page = lane.request(&of("list", "")).await.expect("a root");
        assert!(page.entries.is_empty() && !page.more);
        assert_eq!(code(&lane, &of("list", "x")).await, "not_found");
        lane.say(&file(1, "first", 0)).await;
        lane.say(&finish(1, b"")).await;
        assert_eq!(lane.hear().await.line, "done 1 first 0");
        assert!(world.fixture.root().join("not/there/first").exists());
        end(lane).await;
        drop((socket, other));
        world.well("a prefix").await;
    })
    .await;
}

#[tokio::test]
async fn a_token_has_a_quota_of_its_own() {
    bounded(async {
        let mut world = World::new().await;
        world.put("small/old", &[0; 4096]);
        world.put("beside", &[0; 40960]);
        let (socket, mut lane) = world.lane("small").await;
        let (_second, mut beside) = world.lane("small").await;
        // 10 KiB, of which 4 are used.
        lane.say(&file(1, "a", 6145)).await;
        let heard = lane.hear().await;
        assert_eq!(heard.line, "error 1 quota retry");
        assert!(heard.text.contains("10"), "{}", heard.text);
        lane.say(&file(2, "a", 6144)).await;
        lane.say(&chunk(2, 0, &[1; 100])).await;
        lane.acked(2, 100).await;
        // What is promised counts, on every lane of that token.
        beside.say(&file(1, "b", 1)).await;
        assert_eq!(beside.hear().await.line, "error 1 quota retry");
        beside.say(&dir(2, "d")).await;
        assert_eq!(beside.hear().await.line, "error 2 quota retry");
        // Nobody else is concerned.
        let (_third, mut plain) = world.lane("plain").await;
        plain.say(&file(1, "c", 100_000)).await;
        plain.say(&chunk(1, 0, &[1; 100_000])).await;
        plain.say(&finish(1, &[1; 100_000])).await;
        assert_eq!(plain.hear().await.line, "done 1 c 100000");
        end(plain).await;
        lane.say(&cancel(2)).await;
        assert_eq!(lane.hear().await.line, "error 2 cancelled");
        world.fixture_settled_but(0).await;
        // Sizes that are not told are counted as they come.
        beside.say(&file(3, "b", V::Nil)).await;
        beside.say(&chunk(3, 0, &[1; 6144])).await;
        beside.say(&chunk(3, 6144, &[1; 1])).await;
        assert_eq!(beside.hear().await.line, "error 3 quota retry");
        beside.say(&file(4, "b", 6144)).await;
        beside.say(&chunk(4, 0, &[1; 6144])).await;
        beside.say(&finish(4, &[1; 6144])).await;
        assert_eq!(beside.hear().await.line, "done 4 b 6144");
        lane.say(&file(5, "full", 1)).await;
        assert_eq!(lane.hear().await.line, "error 5 quota retry");
        end(lane).await;
        end(beside).await;
        drop(socket);
        assert_eq!(
            world.fixture.visible(),
            ["beside", "c", "small/", "small/b", "small/old"]
        );
        world.well("a quota").await;
    })
    .await;
}

impl World {
    /// Waits until so many uploads are open.
    async fn fixture_settled_but(&self, open: usize) {
        until("uploads end", || self.fixture.store.usage().open == open).await;
    }
}

#[tokio::test]
async fn a_thousand_requests_at_once_are_all_answered() {
    bounded(async {
        let mut world = World::new().await;
        world.put("x", b"abcd");
        let (socket, mut lane) = world.lane("reader").await;
        let mut asked = tokio::task::JoinSet::new();
        for n in 0..1000_u64 {
            let channel = lane.channel.clone();
            asked.spawn(async move {
                let (event, data) = match n % 4 {
                    0 => of("stat", "x"),
                    1 => of("hash", "x"),
                    2 => of("list", ""),
                    _ => of("stat", "missing"),
                };
                let answer = channel.request::<_, serde::de::IgnoredAny>(event, &data);
                match answer.timeout(Duration::from_secs(40)).await {
                    Ok(_) => n % 4 < 3,
                    Err(RequestError::Fault(fault)) => n % 4 == 3 && fault.code == "not_found",
                    Err(error) => panic!("{error}"),
                }
            });
        }
        let mut answers = 0;
        while let Some(answer) = asked.join_next().await {
            assert!(answer.expect("no panic"));
            answers += 1;
        }
        assert_eq!(answers, 1000);
        // The lane goes on.
        lane.say(&get(1, "x")).await;
        let got = hear_file(&mut lane, 1, true).await;
        assert_eq!(got.last.line, "finish 1 4");
        end(lane).await;
        drop(socket);
        world.well("a thousand requests").await;
    })
    .await;
}

// ----------------------------------------------------------------------------------------------------- jobs

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Job {
    id: u64,
    kind: String,
    path: String,
    peer: String,
    size: Option<u64>,
    bytes: u64,
    safe: u64,
    state: String,
    code: Option<String>,
    secs: f64,
}

#[derive(Debug, Deserialize)]
struct Jobs {
    jobs: Vec<Job>,
}

/// One who watches: checks what every watcher may rely on.
struct Watcher {
    channel: Channel,
    list: Vec<Job>,
    last: BTreeMap<u64, Job>,
    /// Changes heard of each job.
    changes: BTreeMap<u64, usize>,
}

impl Watcher {
    async fn open(socket: &Socket) -> Self {
        let channel = socket.open(JOBS_CHANNEL).await.expect("a channel");
        let message = channel.recv().await.expect("a list").expect("a list");
        assert_eq!(message.event(), "jobs");
        let list: Jobs = message.data().expect("a list");
        Self {
            channel,
            last: list.jobs.iter().map(|job| (job.id, job.clone())).collect(),
            list: list.jobs,
            changes: BTreeMap::new(),
        }
    }

    /// The next change.
    async fn next(&mut self) -> Job {
        let message = tokio::time::timeout(Duration::from_secs(20), self.channel.recv());
        let message = message
            .await
            .expect("in time")
            .expect("open")
            .expect("open");
        assert_eq!(message.event(), "job");
        let job: Job = message.data().expect("a job");
        if let Some(before) = self.last.insert(job.id, job.clone()) {
            assert_eq!(before.state, "running", "after its end: {job:?}");
            assert!(before.bytes <= job.bytes && before.safe <= job.safe);
            assert!(before.secs <= job.secs);
            assert_eq!(
                (before.kind, before.path),
                (job.kind.clone(), job.path.clone())
            );
        }
        assert!(job.safe <= job.bytes, "{job:?}");
        *self.changes.entry(job.id).or_default() += 1;
        job
    }

    /// Waits for the end of what has this path.
    async fn end_of(&mut self, path: &str) -> Job {
        loop {
            let job = self.next().await;
            if job.path == path && job.state != "running" {
                return job;
            }
        }
    }

    /// Waits until it is known, and gives its id.
    async fn find(&mut self, path: &str) -> u64 {
        if let Some(job) = self.last.values().find(|job| job.path == path) {
            return job.id;
        }
        loop {
            let job = self.next().await;
            if job.path == path {
                return job.id;
            }
        }
    }

    async fn cancel(&self, job: impl Into<V>) -> String {
        let answer = self
            .channel
            .request::<_, ()>("cancel", &map([("job", job.into())]))
            .await;
        match answer {
            Ok(()) => "reply".to_owned(),
            Err(RequestError::Fault(fault)) => fault.code,
            Err(other) => panic!("{other}"),
        }
    }
}

/// A name, what is said, the answer, and the state and code that a watcher is told.
type JobEnds = (
    &'static str,
    Vec<Say>,
    &'static str,
    &'static str,
    Option<&'static str>,
);

#[tokio::test]
async fn jobs_are_listed_told_and_always_ended() {
    bounded(async {
        let mut world = World::new().await;
        world.put_large("large", 24 * MIB);
        let (socket, mut lane) = world.lane("all").await;
        // One that is there before anybody watches.
        lane.say(&file(1, "first", 8)).await;
        lane.say(&chunk(1, 0, b"abcd")).await;
        lane.acked(1, 4).await;
        let mut watcher = Watcher::open(&socket).await;
        assert_eq!(watcher.list.len(), 1);
        let job = watcher.list[0].clone();
        assert_eq!(
            (&*job.kind, &*job.path, &*job.peer, &*job.state),
            ("put", "first", "all", "running")
        );
        assert_eq!((job.size, job.bytes, job.code), (Some(8), 4, None));
        // It ends well.
        lane.say(&chunk(1, 4, b"efgh")).await;
        lane.say(&finish(1, b"abcdefgh")).await;
        assert_eq!(lane.hear().await.line, "done 1 first 8");
        let ended = watcher.end_of("first").await;
        assert_eq!((ended.state.as_str(), ended.bytes), ("done", 8));
        assert_eq!(ended.id, job.id);
        // The ways to end, with what is told to the client and to the watcher.
        let ends: Vec<JobEnds> = vec![
            (
                "wrong hash",
                vec![chunk(2, 0, b"abcd"), finish(2, b"efgh")],
                "error 2 hash_mismatch retry",
                "failed",
                Some("hash_mismatch"),
            ),
            (
                "a gap",
                vec![chunk(2, 1, b"abc")],
                "error 2 bad_offset",
                "failed",
                Some("bad_offset"),
            ),
            (
                "given up",
                vec![cancel(2)],
                "error 2 cancelled",
                "cancelled",
                None,
            ),
            (
                "put aside",
                vec![raw::keep(2)],
                "error 2 cancelled",
                "suspended",
                None,
            ),
            (
                "malformed",
                vec![("chunk", without(chunk(2, 0, b"a").1, "off"))],
                "error 2 bad_message",
                "failed",
                Some("bad_message"),
            ),
        ];
        for (name, says, answer, state, code) in ends {
            let mut lane = RawLane::open(&socket).await;
            lane.say(&file(2, name, 4)).await;
            // It is begun, whatever comes next.
            watcher.find(name).await;
            for say in &says {
                lane.say(say).await;
            }
            assert_eq!(lane.hear().await.line, answer, "{name}");
            let ended = watcher.end_of(name).await;
            assert_eq!((ended.state.as_str(), ended.code.as_deref()), (state, code));
            end(lane).await;
        }
        // A lane that ends, a socket that is gone.
        let cut = RawLane::open(&socket).await;
        cut.say(&file(1, "cut", 4)).await;
        watcher.find("cut").await;
        cut.channel.close(CloseCode::NORMAL, "");
        assert_eq!(watcher.end_of("cut").await.state, "suspended");
        let (gone, away) = world.lane("all").await;
        away.say(&file(1, "gone", 4)).await;
        watcher.find("gone").await;
        gone.abort(CloseCode::new(0x1001), "gone");
        assert_eq!(watcher.end_of("gone").await.state, "suspended");
        // A download.
        lane.say(&get(10, "large")).await;
        let got = hear_file(&mut lane, 10, false).await;
        assert_eq!(got.last.line, format!("finish 10 {}", 24 * MIB));
        let ended = watcher.end_of("large").await;
        assert_eq!((ended.kind.as_str(), ended.state.as_str()), ("get", "done"));
        assert_eq!(ended.bytes, 24 * MIB as u64);
        lane.say(&get(11, "missing")).await;
        assert_eq!(lane.hear().await.line, "error 11 not_found");
        let ended = watcher.end_of("missing").await;
        assert_eq!(ended.code.as_deref(), Some("not_found"));
        assert_eq!(ended.state, "failed");
        // Of each job a few changes a second at most, and one end.
        for (job, changes) in &watcher.changes {
            let secs = watcher.last[job].secs;
            assert!(
                *changes as f64 <= 3.0 + 4.0 * (secs + 0.5),
                "{changes} in {secs} s"
            );
            assert_ne!(watcher.last[job].state, "running");
        }
        end(lane).await;
        drop((socket, watcher));
        fs::remove_file(world.fixture.root().join("large")).expect("it");
        world.well("jobs").await;
    })
    .await;
}

#[tokio::test]
async fn a_job_is_cancelled_by_its_owner_or_an_admin_and_nobody_else() {
    bounded(async {
        let mut world = World::new().await;
        world.put_large("large", 64 * MIB);
        let (owner, mut lane) = world.lane("tenant").await;
        let (stranger, admin) = (world.socket("all").await, world.socket("boss").await);
        lane.say(&resumable(1, "mine", 8)).await;
        assert_eq!(lane.hear().await.line, "ready 1 0");
        let mut own = Watcher::open(&owner).await;
        let theirs = Watcher::open(&stranger).await;
        let mut all = Watcher::open(&admin).await;
        let id = own.find("mine").await;
        // An admin sees the name in the store, a stranger nothing at all.
        assert_eq!(all.find("teams/a/mine").await, id);
        assert_eq!(all.last[&id].peer, "tenant");
        assert_eq!(theirs.list.len(), 0);
        assert_eq!(theirs.cancel(id).await, "forbidden");
        assert_eq!(theirs.cancel(id + 1000).await, "not_found");
        for nonsense in [V::Nil, V::Int(-1), "1".into(), true.into()] {
            assert_eq!(theirs.cancel(nonsense).await, "bad_payload");
        }
        let answer = theirs.channel.request::<_, ()>("pause", &V::Nil).await;
        assert!(matches!(answer, Err(RequestError::NoHandler)), "{answer:?}");
        lane.say(&chunk(1, 0, b"abcd")).await;
        lane.acked(1, 4).await;
        assert_eq!(own.cancel(id).await, "reply");
        let heard = lane.hear().await;
        assert_eq!(heard.line, "error 1 cancelled");
        assert_eq!(own.end_of("mine").await.state, "cancelled");
        assert_eq!(all.end_of("teams/a/mine").await.state, "cancelled");
        assert_eq!(own.cancel(id).await, "not_found", "it is over");
        // Nothing of it is kept; what was on its way is dropped.
        lane.say(&chunk(1, 4, b"efgh")).await;
        lane.say(&finish(1, b"abcdefgh")).await;
        world.fixture.settled().await;
        // The same by the admin, and the lane goes on each time.
        lane.say(&resumable(2, "mine", 8)).await;
        assert_eq!(lane.hear().await.line, "ready 2 0");
        let id = all.find("teams/a/mine").await;
        let mut newest = id;
        while all.last[&newest].state != "running" {
            newest = all.next().await.id;
        }
        assert_eq!(all.cancel(newest).await, "reply");
        assert_eq!(lane.hear().await.line, "error 2 cancelled");
        lane.say(&file(3, "next", 0)).await;
        lane.say(&finish(3, b"")).await;
        assert_eq!(lane.hear().await.line, "done 3 next 0");
        // A download is a job like others.
        let (_reader, mut down) = world.lane("boss").await;
        down.say(&get(1, "large")).await;
        assert!(down.hear().await.line.starts_with("file 1 "));
        let id = all.find("large").await;
        assert_eq!(theirs.cancel(id).await, "forbidden");
        assert_eq!(all.cancel(id).await, "reply");
        loop {
            let heard = down.hear().await;
            if heard.line == "error 1 cancelled" {
                break;
            }
            assert!(heard.line.starts_with("chunk 1 "), "{heard:?}");
        }
        assert_eq!(all.end_of("large").await.state, "cancelled");
        drop((
            lane, down, own, theirs, all, owner, stranger, admin, _reader,
        ));
        fs::remove_file(world.fixture.root().join("large")).expect("it");
        world.well("cancelled jobs").await;
    })
    .await;
}

#[tokio::test]
async fn watchers_of_a_server_that_ends_hear_the_last_job_out_and_go() {
    bounded(async {
        let mut handle = None;
        let world = World::with(|receiver| {
            handle = Some(receiver.clone());
            receiver
        })
        .await;
        let receiver = handle.expect("a receiver");
        let (socket, mut lane) = world.lane("all").await;
        let idle = Watcher::open(&world.socket("reader").await).await;
        let mut watcher = Watcher::open(&socket).await;
        lane.say(&file(1, "last", 4)).await;
        watcher.find("last").await;
        receiver.shutting_down();
        let gone = async |watcher: &Watcher| {
            let recv = tokio::time::timeout(Duration::from_secs(20), watcher.channel.recv());
            match recv.await.expect("in time") {
                Err(error) => error.reason().code,
                Ok(None) => watcher.channel.close_reason().expect("a reason").code,
                Ok(Some(message)) => panic!("{message:?}"),
            }
        };
        assert_eq!(gone(&idle).await, CloseCode::SHUTTING_DOWN, "sees nothing");
        lane.say(&chunk(1, 0, b"abcd")).await;
        lane.say(&finish(1, b"abcd")).await;
        assert_eq!(lane.hear().await.line, "done 1 last 4");
        assert_eq!(watcher.end_of("last").await.state, "done");
        assert_eq!(gone(&watcher).await, CloseCode::SHUTTING_DOWN);
    })
    .await;
}

#[tokio::test]
async fn a_watcher_that_never_reads_harms_nobody() {
    /// Enough, with names this long, to fill every window on the way, and what the server keeps for it.
    const ROUNDS: u64 = 30;
    const ROUND: u64 = 1000;
    bounded(async {
        let mut world = World::new().await;
        let (admin, other) = (world.socket("boss").await, world.socket("boss").await);
        let mute = other.open(JOBS_CHANNEL).await.expect("a channel");
        let mut watcher = Watcher::open(&admin).await;
        let (socket, mut lane) = world.lane("all").await;
        let long = "n".repeat(200);
        let name = [long.as_str(); 5].join("/");
        // Each begins and fails at once: its path leads through a file.
        world.put(&long, b"in the way");
        for round in 0..ROUNDS {
            let ids = round * ROUND + 1..=(round + 1) * ROUND;
            let speaker = RawLane::over(lane.channel.clone());
            let speaking = async {
                for id in ids.clone() {
                    speaker.say(&file(id, &name, 0)).await;
                    speaker.say(&cancel(id)).await;
                }
            };
            let hearing = async {
                for _ in ids.clone() {
                    let heard = lane.hear().await;
                    assert!(heard.line.starts_with("error"), "{heard:?}");
                }
            };
            let watching = async {
                let mut ended = 0;
                while ended < ROUND {
                    let job = watcher.next().await;
                    ended += u64::from(job.state != "running");
                }
            };
            tokio::join!(speaking, hearing, watching);
        }
        // It has all the others could have, and is told when it has missed something.
        let mut heard = 0;
        let reason = loop {
            let message = tokio::time::timeout(Duration::from_secs(20), mute.recv());
            match message.await.expect("in time") {
                Ok(Some(_)) => heard += 1,
                Ok(None) => panic!("all of it was kept for it: {heard}"),
                Err(error) => break error.reason().code,
            }
        };
        assert_eq!(reason, CloseCode::SLOW_PEER);
        assert!(heard < ROUNDS * ROUND, "{heard}");
        end(lane).await;
        drop((mute, other, watcher, admin, socket));
        fs::remove_file(world.fixture.root().join(&long)).expect("it");
        world.well("a mute watcher").await;
    })
    .await;
}

// ----------------------------------------------------------------------------------------------------- hook

/// What an operator says, by the name of the file; notes what is stored.
#[derive(Clone, Default)]
struct Operator {
    asked: Arc<Mutex<Vec<HookOffer>>>,
    stored: Arc<Mutex<Vec<HookStored>>>,
    go: Arc<Notify>,
}

impl Hook for Operator {
    fn accept<'a>(
        &'a self,
        offer: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>> {
        Box::pin(async move {
            self.asked.lock().expect("sound").push(offer.clone());
            match offer.path.rsplit('/').next().expect("a name") {
                "refused" => Err("not on my server".to_owned()),
                "renamed" => Ok(Some("else/where".to_owned())),
                "renamed badly" => Ok(Some("../x".to_owned())),
                "renamed to nothing" => Ok(Some(String::new())),
                "slow" => {
                    self.go.notified().await;
                    Ok(None)
                }
                _ => Ok(None),
            }
        })
    }

    fn allow<'a>(&'a self, what: &'a HookAccess) -> Answer<'a> {
        let verdict = match (what.access, what.path.as_str()) {
            (access, path) if path.ends_with("secret") => Err(format!("no {access:?} of it")),
            _ => Ok(()),
        };
        Box::pin(std::future::ready(verdict))
    }

    fn verify<'a>(&'a self, whole: &'a HookWhole) -> Answer<'a> {
        let bytes = fs::read(&whole.file).expect("the bytes are there");
        assert_eq!(bytes.len() as u64, whole.size);
        let bad = bytes.starts_with(b"virus");
        Box::pin(async move {
            tokio::task::yield_now().await;
            if bad {
                Err("infected".to_owned())
            } else {
                Ok(())
            }
        })
    }

    fn done(&self, stored: HookStored) {
        self.stored.lock().expect("sound").push(stored);
    }
}

impl Operator {
    fn stored(&self) -> Vec<HookStored> {
        self.stored.lock().expect("sound").clone()
    }
}

/// Sends a file in one go.
async fn whole(lane: &RawLane, id: u64, path: &str, bytes: &[u8]) {
    lane.say(&file(id, path, bytes.len() as u64)).await;
    if !bytes.is_empty() {
        lane.say(&chunk(id, 0, bytes)).await;
    }
    lane.say(&finish(id, bytes)).await;
}

#[tokio::test]
async fn the_operator_has_a_word_in_every_upload() {
    bounded(async {
        let operator = Operator::default();
        let mut world = World::with(|receiver| receiver.hook(operator.clone())).await;
        let (socket, mut lane) = world.lane("plain").await;
        let cases = [
            ("taken as it is", "done 1 taken as it is 4"),
            ("refused", "error 2 refused"),
            ("renamed", "done 3 else/where 4"),
            ("renamed badly", "error 4 refused"),
            ("renamed to nothing", "error 5 refused"),
            ("taken as it is", "done 6 taken as it is 4 same"),
            ("renamed", "done 7 else/where 4 same"),
            // The operator is not bothered with these.
            ("../x", "error 8 bad_name"),
        ];
        for (id, (name, answer)) in (1..).zip(cases) {
            whole(&lane, id, name, b"abcd").await;
            let heard = lane.hear().await;
            assert_eq!(heard.line, answer);
            if name == "refused" {
                assert_eq!(heard.text, "not on my server");
            }
        }
        let asked = operator.asked.lock().expect("sound").len();
        assert_eq!(asked, 7);
        let root = world.fixture.root();
        let stored = operator.stored();
        let paths: Vec<_> = stored.iter().map(|stored| &*stored.path).collect();
        assert_eq!(paths, ["taken as it is", "else/where"], "each once");
        assert_eq!(stored[1].file, root.join("else/where"));
        assert_eq!((stored[1].size, &*stored[1].peer), (4, "plain"));
        assert_eq!(stored[1].hash, *blake3::hash(b"abcd").as_bytes());
        // The names are those of the store, also for who has a root of its own.
        let (tenant, mut inner) = world.lane("tenant").await;
        whole(&inner, 1, "x", b"abcd").await;
        assert_eq!(inner.hear().await.line, "done 1 x 4");
        assert_eq!(operator.stored()[2].path, "teams/a/x");
        assert_eq!(operator.stored()[2].file, root.join("teams/a/x"));
        end(inner).await;
        drop(tenant);
        // A slow word holds up its own lane only; there the server shows that it lives.
        whole(&lane, 20, "slow", b"abcd").await;
        let mut beside = RawLane::open(&socket).await;
        whole(&beside, 1, "fast", b"abcd").await;
        assert_eq!(beside.hear().await.line, "done 1 fast 4");
        end(beside).await;
        lane.acked(20, 0).await;
        operator.go.notify_one();
        assert_eq!(lane.hear().await.line, "done 20 slow 4");
        fs::remove_file(root.join("slow")).expect("a stored file");
        // Nobody waits for it any more.
        lane.say(&file(21, "slow", 4)).await;
        lane.say(&cancel(21)).await;
        lane.channel.close(CloseCode::NORMAL, "").await;
        world
            .lanes_are_over("a lane that waits for the operator")
            .await;
        // A file is told of although its client did not wait for the outcome.
        let before = operator.stored().len();
        let (hasty, lane) = world.lane("plain").await;
        whole(&lane, 1, "hasty", &noise(1, MIB)).await;
        lane.channel.finish().await.expect("the server has it");
        hasty.abort(CloseCode::new(0x1001), "gone");
        until("it is told of", || operator.stored().len() > before).await;
        assert_eq!(operator.stored()[before].path, "hasty");
        drop(socket);
        operator.go.notify_one();
        world.well("the operator").await;
        assert_eq!(
            world.fixture.visible(),
            [
                "else/",
                "else/where",
                "fast",
                "hasty",
                "taken as it is",
                "teams/",
                "teams/a/",
                "teams/a/x"
            ]
        );
    })
    .await;
}

// --------------------------------------------------------------------------------------------------- limits

#[tokio::test]
async fn a_client_says_how_fast_it_takes_downloads() {
    bounded(async {
        let mut world = World::new().await;
        let bytes = noise(1, MIB / 2);
        world.put("down", &bytes);
        let (_socket, mut lane) = world.lane("all").await;
        let get = |id: u64, rate: u64| {
            let fields = [
                ("id", id.into()),
                ("path", "down".into()),
                ("rate", rate.into()),
            ];
            ("get", map(fields))
        };
        let since = std::time::Instant::now();
        // The second says otherwise: what was said last counts for what begins then.
        for (id, rate, largest) in [(1, MIB / 4, MIB / 32), (2, 64 * MIB, MIB / 4)] {
            lane.say(&get(id, rate as u64)).await;
            let got = hear_file(&mut lane, id, true).await;
            let longest = got.pieces.iter().map(|(_, piece)| piece.len()).max();
            assert!(longest <= Some(largest), "{longest:?} in one go");
            assert!(got.over(vec![]) == bytes);
            lane.say(&("done", map([("id", id.into())]))).await;
        }
        let took = since.elapsed();
        // Half a mebibyte at half of that a second, less what comes in one go.
        assert!(took >= Duration::from_millis(1500), "{took:?}");
        end(lane).await;
        world.well("the client's own limit").await;
    })
    .await;
}

#[tokio::test]
async fn a_limit_bounds_both_directions_of_all_lanes_together() {
    bounded(async {
        let rate = 512 * 1024;
        let limit = Limiter::new(rate);
        let mut world = World::with(|receiver| receiver.limit(limit.clone(), limit)).await;
        world.put("down", &noise(1, MIB / 2));
        let (socket, mut lane) = world.lane("all").await;
        let mut second = RawLane::open(&socket).await;
        let since = std::time::Instant::now();
        lane.say(&get(1, "down")).await;
        whole(&second, 1, "up", &noise(2, MIB / 2)).await;
        let down = async {
            let got = hear_file(&mut lane, 1, true).await;
            assert!(got.over(vec![]) == noise(1, MIB / 2));
        };
        let up = async {
            let heard = second.hear().await.line;
            assert_eq!(heard, format!("done 1 up {}", MIB / 2));
        };
        tokio::join!(down, up);
        let took = since.elapsed();
        // A mebibyte at half of that a second, less what comes in one go.
        assert!(took >= Duration::from_millis(1500), "{took:?}");
        assert!(took < Duration::from_secs(15), "{took:?}");
        end(lane).await;
        end(second).await;
        drop(socket);
        world.well("a limit").await;
    })
    .await;
}

// ------------------------------------------------------------------------------ the client's frame limit

/// Clients that take frames of this size at most, all of them below what a chunk has by default.
const FRAMES: [usize; 4] = [262_170, 262_144, 16_384, 4_096];

#[tokio::test]
async fn downloads_keep_to_the_frames_of_their_client() {
    bounded(async {
        let world = World::new().await;
        let bytes = noise(3, 2 * MIB + 17);
        world.put("dir/file", &bytes);
        for frame in FRAMES {
            let limits = Limits {
                frame,
                ..Limits::default()
            };
            let socket = world.fixture.connect_within(&token("all"), limits).await;
            let mut lane = RawLane::open(&socket).await;
            lane.say(&get(1, "dir/file")).await;
            assert_eq!(
                lane.hear().await.line,
                format!("file 1 dir/file {}", bytes.len())
            );
            let mut got = Vec::new();
            let end = loop {
                let heard = lane.hear().await;
                if !heard.line.starts_with("chunk") {
                    break heard;
                }
                got.extend_from_slice(&heard.bytes);
            };
            assert_eq!(end.line, format!("finish 1 {}", bytes.len()), "{frame}");
            assert!(got == bytes, "{frame}");
        }
    })
    .await;
}

#[tokio::test]
async fn pages_keep_to_the_frames_of_their_client() {
    bounded(async {
        let world = World::new().await;
        let names: Vec<String> = (0..300)
            .map(|n| format!("{n:03}{}", "x".repeat(150)))
            .collect();
        for name in &names {
            world.put(&format!("dir/{name}"), b"");
        }
        for frame in FRAMES {
            let limits = Limits {
                frame,
                ..Limits::default()
            };
            let socket = world.fixture.connect_within(&token("all"), limits).await;
            let lane = RawLane::open(&socket).await;
            for rows in [false, true] {
                let mut listed = Vec::new();
                loop {
                    let mut question = map([("path", "dir".into()), ("rows", rows.into())]);
                    if let Some(last) = listed.last() {
                        question = with(question, "after", String::as_str(last));
                    }
                    let question = ("list", question);
                    let (entries, more) = if rows {
                        let page: Rows = lane.request(&question).await.expect("a page");
                        let more = page.more;
                        (page.entries(), more)
                    } else {
                        let page: Page = lane.request(&question).await.expect("a page");
                        (page.entries, page.more)
                    };
                    listed.extend(entries.into_iter().map(|entry| entry.path));
                    if !more {
                        break;
                    }
                }
                let all: Vec<String> = names.iter().map(|name| format!("dir/{name}")).collect();
                assert_eq!(listed, all, "{frame}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn errors_and_jobs_keep_to_the_frames_of_their_client() {
    bounded(async {
        let world = World::new().await;
        let limits = Limits {
            frame: 4_096,
            ..Limits::default()
        };
        let socket = world.fixture.connect_within(&token("all"), limits).await;
        let mut lane = RawLane::open(&socket).await;
        // The sentence names the path, which is nearly as long as a path may be.
        let long = format!("{}x", "0123456789/".repeat(30));
        lane.say(&get(1, &long)).await;
        assert_eq!(lane.hear().await.line, "error 1 not_found");
        let watcher = socket.open(JOBS_CHANNEL).await.expect("a channel");
        let first = watcher.recv().await.expect("open").expect("a message");
        assert_eq!(first.event(), "jobs");
    })
    .await;
}

// ------------------------------------------------------------------------------ a server's program decides

#[tokio::test]
async fn the_hook_decides_on_each_file_that_is_read_listed_or_removed() {
    bounded(async {
        let world = World::with(|receiver| receiver.hook(Operator::default())).await;
        for name in ["secret", "plain", "dir/secret"] {
            world.put(name, b"hello");
        }
        let (_socket, mut lane) = world.lane("all").await;
        for (event, word) in [
            ("stat", "List"),
            ("list", "List"),
            ("hash", "Read"),
            ("remove", "Remove"),
        ] {
            let ask = async |path: &str| {
                let question = (event, map([("path", path.into())]));
                lane.request::<serde::de::IgnoredAny>(&question).await
            };
            let refused = ("forbidden".to_owned(), format!("no {word} of it"));
            for path in ["secret", "dir/secret"] {
                assert_eq!(ask(path).await.map(drop), Err(refused.clone()), "{event}");
            }
            if event != "remove" {
                assert!(ask("plain").await.is_ok(), "{event}");
            }
        }
        lane.say(&get(1, "secret")).await;
        assert_eq!(lane.hear().await.line, "error 1 forbidden");
        lane.say(&get(2, "plain")).await;
        assert_eq!(lane.hear().await.line, "file 2 plain 5");
        assert!(world.fixture.root().join("dir/secret").exists());
    })
    .await;
}

#[tokio::test]
async fn a_file_that_the_hook_does_not_verify_gets_no_name() {
    bounded(async {
        let operator = Operator::default();
        let stored = operator.stored.clone();
        let mut world = World::with(|receiver| receiver.hook(operator)).await;
        let (socket, mut lane) = world.lane("all").await;
        let cases = [(1, &b"virus"[..], false), (3, b"sound", true)];
        for (id, bytes, sound) in cases {
            let outcome = |id: u64, name: &str| match sound {
                true => format!("done {id} {name} 5"),
                false => format!("error {id} refused"),
            };
            lane.say(&put(id, "x", bytes)).await;
            assert_eq!(lane.hear().await.line, outcome(id, "x"));
            // Also one that is resumed.
            let id = id + 1;
            lane.say(&resumable(id, "resumed", 5)).await;
            assert_eq!(lane.hear().await.line, format!("ready {id} 0"));
            lane.say(&chunk(id, 0, bytes)).await;
            lane.say(&finish(id, bytes)).await;
            assert_eq!(lane.hear().await.line, outcome(id, "resumed"));
        }
        assert_eq!(world.fixture.visible(), ["resumed", "x"]);
        assert_eq!(stored.lock().expect("sound").len(), 2);
        drop(lane);
        socket.close(CloseCode::NORMAL, "").await;
        world.well("files that were not verified").await;
    })
    .await;
}

#[tokio::test]
async fn the_servers_program_sees_each_transfer_and_cancels_one() {
    bounded(async {
        let mut held = None;
        let world = World::with(|receiver| {
            held = Some(receiver.clone());
            receiver
        })
        .await;
        let receiver = held.expect("a receiver");
        let (_socket, mut lane) = world.lane("all").await;
        assert_eq!(receiver.transfers(), []);
        lane.say(&file(1, "x", 10)).await;
        lane.say(&chunk(1, 0, b"hello")).await;
        lane.acked(1, 5).await;
        let all = receiver.transfers();
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(
            (&*all[0].path, &*all[0].peer, all[0].size, all[0].bytes),
            ("x", "all", Some(10), 5)
        );
        assert!(!receiver.cancel(all[0].id + 1, None));
        assert!(receiver.cancel(all[0].id, Some("by the program")));
        assert_eq!(lane.hear().await.line, "error 1 cancelled");
        assert_eq!(receiver.transfers(), []);
    })
    .await;
}
