//! Uploads that are interrupted and taken up again, by one client and by several, spoken by hand and word for
//! word: what the server tells it has, what may be passed over, who may write, and what is left on the disk.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use common::{Fixture, OTHER, bounded, noise};
use raw::{
    Heard, RawLane, Say, V, cancel, chunk, file, finish, keep, of_run, put, resumable, with,
};
use tempfile::TempDir;
use udpack::{CloseCode, Socket};
use udpack_transfer::{Overwrite, ReceiverConfig, StoreConfig};

const MIB: usize = 1 << 20;
const KIB: usize = 1 << 10;

fn store() -> StoreConfig {
    StoreConfig {
        overwrite: Overwrite::Always,
        ..StoreConfig::default()
    }
}

/// Nobody is replaced for being silent, unless that is what is tried.
fn receiver() -> ReceiverConfig {
    ReceiverConfig {
        takeover: Duration::from_secs(3600),
        ..ReceiverConfig::default()
    }
}

async fn lane(fixture: &Fixture) -> (Socket, RawLane) {
    let socket = fixture.connect().await;
    let lane = RawLane::open(&socket).await;
    (socket, lane)
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

/// Names in one of the server's own directories.
fn private(fixture: &Fixture, dir: &str) -> Vec<String> {
    let dir = fixture.root().join(".udpack").join(dir);
    let entries = fs::read_dir(dir).expect("a directory of the server");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("text"))
        .collect();
    names.sort();
    names
}

/// The names of an upload in the server's own directories.
fn key(peer: &str, path: &str) -> String {
    let hash = blake3::hash(format!("{peer}\0{path}").as_bytes()).to_hex();
    hash.as_str()[..32].to_owned()
}

/// Waits until an upload is put aside: its files are there, and nobody writes them.
async fn put_aside(fixture: &Fixture, path: &str) {
    let part = format!("{}.part", key("tester", path));
    let log = format!("{}.log", key("tester", path));
    until("put aside", || {
        fixture.store.usage().open == 0
            && private(fixture, "staging").contains(&part)
            && private(fixture, "journal").contains(&log)
    })
    .await;
}

/// Nothing is staged, journalled, promised or open, and a new client is served.
async fn well(fixture: &Fixture, after: &str) {
    until(after, || {
        let usage = fixture.store.usage();
        usage.open == 0
            && usage.reserved == 0
            && private(fixture, "staging").is_empty()
            && private(fixture, "journal").is_empty()
    })
    .await;
    let bytes = noise(99, 5000);
    let (_socket, mut lane) = lane(fixture).await;
    lane.say(&file(1, "honest", 5000)).await;
    lane.say(&chunk(1, 0, &bytes)).await;
    lane.say(&finish(1, &bytes)).await;
    assert_eq!(lane.hear().await.line, "done 1 honest 5000", "{after}");
    fs::remove_file(fixture.root().join("honest")).expect("a stored file");
}

/// Sends these bytes of a file in pieces.
async fn send(lane: &RawLane, id: u64, bytes: &[u8], from: usize, to: usize) {
    for start in (from..to).step_by(256 * KIB) {
        let end = (start + 256 * KIB).min(to);
        lane.say(&chunk(id, start as u64, &bytes[start..end])).await;
    }
}

/// What `ready` tells is there: right by every hash, in order, from the beginning on. Gives its end.
fn have(heard: &Heard, id: u64, bytes: &[u8]) -> usize {
    let count = heard.have.len();
    assert_eq!(heard.line, format!("ready {id} {count}"), "{heard:?}");
    let mut end = 0;
    for (off, len, hash) in &heard.have {
        let off = usize::try_from(*off).expect("small");
        let len = usize::try_from(*len).expect("small");
        assert_eq!(off, end, "no gap, no overlap");
        assert_eq!(*blake3::hash(&bytes[off..off + len]).as_bytes(), *hash);
        end = off + len;
    }
    end
}

// --------------------------------------------------------------------------------------- cut and taken up

/// How an upload is interrupted.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    LaneClosed,
    LaneFinished,
    SocketClosed,
    SocketGone,
    /// Without waiting for what was said to be received.
    Midway,
    Kept,
    Stalled,
    ServerClosed,
    /// No end of any kind: another server finds the directory as it is on the disk.
    Copied,
}

const CUTS: &[Cut] = &[
    Cut::LaneClosed,
    Cut::LaneFinished,
    Cut::SocketClosed,
    Cut::SocketGone,
    Cut::Midway,
    Cut::Kept,
    Cut::Stalled,
    Cut::ServerClosed,
    Cut::Copied,
];

#[tokio::test]
async fn what_was_received_before_a_cut_is_not_sent_again() {
    let bytes = noise(1, 3 * MIB + 7);
    let size = bytes.len() as u64;
    for cut in CUTS {
        for declared in [true, false] {
            let size = if declared { size.into() } else { V::Nil };
            bounded(cut_and_resume(*cut, &bytes, size)).await;
        }
    }
}

async fn cut_and_resume(cut: Cut, bytes: &[u8], size: V) {
    let receiver = || ReceiverConfig {
        stall: match cut {
            Cut::Stalled => Duration::from_millis(600),
            _ => Duration::from_secs(60),
        },
        ..receiver()
    };
    let mut fixture = Fixture::with(store(), receiver()).await;
    let (socket, mut first) = lane(&fixture).await;
    first.say(&resumable(1, "d/x", size.clone())).await;
    assert_eq!(first.hear().await.line, "ready 1 0");
    send(&first, 1, bytes, 0, 2 * MIB).await;
    let mut least = 2 * MIB;
    match cut {
        Cut::Midway => {
            socket.abort(CloseCode::new(0x1001), "gone");
            least = 0;
        }
        Cut::Copied => first.safe(1, 2 * MIB as u64).await,
        _ => first.acked(1, 2 * MIB as u64).await,
    }
    assert!(fixture.visible().iter().all(|name| name.ends_with('/')));
    match cut {
        Cut::LaneClosed => {
            first.channel.close(CloseCode::NORMAL, "").await;
        }
        Cut::LaneFinished => {
            first.channel.finish().await.expect("the server reads");
            assert_eq!(first.hear().await.line, "end");
        }
        Cut::SocketClosed => {
            socket.close(CloseCode::NORMAL, "").await;
        }
        Cut::SocketGone => socket.abort(CloseCode::new(0x1001), "gone"),
        Cut::Midway => {}
        Cut::Kept => {
            first.say(&keep(1)).await;
            assert_eq!(first.hear().await.line, "error 1 cancelled");
        }
        Cut::Stalled => {
            let heard = first.hear().await;
            assert_eq!(heard.line, "error 1 upload_stalled retry");
        }
        Cut::ServerClosed => fixture = fixture.reopen(store(), receiver()).await,
        Cut::Copied => {
            let copy = fixture.copy();
            drop((socket, first));
            fixture = Fixture::over(copy, store(), receiver()).await;
        }
    }
    if cut == Cut::Midway {
        until("the lane ends", || fixture.store.usage().open == 0).await;
    } else {
        put_aside(&fixture, "d/x").await;
    }
    assert!(fixture.visible().iter().all(|name| name.ends_with('/')));

    let (_socket, mut second) = lane(&fixture).await;
    second.say(&resumable(7, "d/x", size)).await;
    let held = have(&second.hear().await, 7, bytes);
    assert!((least..=2 * MIB).contains(&held), "{cut:?}: {held}");
    send(&second, 7, bytes, held, bytes.len()).await;
    second.say(&finish(7, bytes)).await;
    let heard = second.hear().await;
    assert_eq!(heard.line, format!("done 7 d/x {}", bytes.len()), "{cut:?}");
    assert_eq!(heard.hash, Some(*blake3::hash(bytes).as_bytes()));
    assert!(fixture.stored("d/x") == bytes, "{cut:?}: other bytes");
    well(&fixture, "resumed").await;
}

#[tokio::test]
async fn what_is_called_safe_is_there_after_the_power_is_cut() {
    bounded(async {
        let fixture = Fixture::with(store(), receiver()).await;
        let bytes = noise(2, 4 * MIB);
        let (_socket, mut first) = lane(&fixture).await;
        first.say(&resumable(1, "x", V::Nil)).await;
        assert_eq!(first.hear().await.line, "ready 1 0");
        // Nothing more comes, and yet it becomes safe.
        send(&first, 1, &bytes, 0, MIB).await;
        first.safe(1, MIB as u64).await;
        send(&first, 1, &bytes, MIB, 2 * MIB).await;
        first.safe(1, 2 * MIB as u64).await;
        // And then some that are only received.
        send(&first, 1, &bytes, 2 * MIB, 3 * MIB).await;
        first.acked(1, 3 * MIB as u64).await;
        let (_, safe) = first.last_ack(1);
        let copy = fixture.copy();
        // What nobody called safe is lost.
        let part = format!(".udpack/staging/{}.part", key("tester", "x"));
        let path = copy.path().join("up").join(part);
        let part = fs::File::options().write(true).open(path).expect("it");
        let lost = usize::try_from(safe).expect("small").max(2 * MIB);
        part.write_all_at(&vec![0; 3 * MIB - lost], lost as u64)
            .expect("written");
        let after = Fixture::over(copy, store(), receiver()).await;
        let (_socket, mut second) = lane(&after).await;
        second.say(&resumable(1, "x", V::Nil)).await;
        let ready = second.hear().await;
        let mut held = 0;
        for (off, len, hash) in &ready.have {
            let (off, end) = (*off as usize, (*off + *len) as usize);
            assert_eq!(off, held);
            if *blake3::hash(&bytes[off..end]).as_bytes() != *hash {
                break;
            }
            held = end;
        }
        assert!(held >= lost.min(2 * MIB), "{held} of {safe}");
        // The client may also pass over less than it could.
        send(&second, 1, &bytes, MIB, bytes.len()).await;
        second.say(&finish(1, &bytes)).await;
        let done = second.hear().await.line;
        assert_eq!(done, format!("done 1 x {}", bytes.len()));
        assert!(after.stored("x") == bytes);
        well(&after, "a power cut").await;
        // The first server knows nothing of that.
        send(&first, 1, &bytes, 3 * MIB, bytes.len()).await;
        first.say(&finish(1, &bytes)).await;
        assert_eq!(first.hear().await.line, done);
        well(&fixture, "the first").await;
    })
    .await;
}

// ------------------------------------------------------------------------------------ what may be passed over

/// A line of a journal.
fn line(body: &str) -> String {
    let check = blake3::hash(body.as_bytes()).to_hex();
    format!("{} {body}\n", &check.as_str()[..16])
}

/// A directory in which an upload of `x` was interrupted that holds these bytes in these ranges.
fn interrupted(part: &[u8], safe: &[(u64, u64)]) -> TempDir {
    let mut journal = line("upload 1 1700000000 - tester x");
    for (off, len) in safe {
        journal.push_str(&line(&format!("safe {off} {len}")));
    }
    with_journal(part, journal.as_bytes())
}

fn with_journal(part: &[u8], journal: &[u8]) -> TempDir {
    use std::io::Write as _;
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    let dir = tempfile::tempdir().expect("a temporary directory");
    let own = dir.path().join("up/.udpack");
    let key = key("tester", "x");
    for (sub, ending, bytes) in [("staging", "part", part), ("journal", "log", journal)] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(own.join(sub))
            .expect("directories");
        fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(own.join(sub).join(format!("{key}.{ending}")))
            .and_then(|mut file| file.write_all(bytes))
            .expect("a file");
    }
    dir
}

/// What is said after `ready`, and what the last word is.
type Play = (&'static str, Vec<Say>, &'static str);

#[tokio::test]
async fn exactly_what_the_server_has_may_be_passed_over() {
    let bytes = noise(3, 4000);
    // Has 0..1000 and 2000..3000; between and behind lies something else.
    let mut part = bytes.clone();
    part[1000..2000].fill(0);
    part[3000..].fill(0);
    let at = |from: usize, to: usize| chunk(1, from as u64, &bytes[from..to]);
    let end = || finish(1, &bytes);
    let done = "done 1 x 4000";
    let gap = "error 1 bad_offset";
    let plays: Vec<Play> = vec![
        ("both", vec![at(1000, 2000), at(3000, 4000), end()], done),
        ("none", vec![at(0, 4000), end()], done),
        ("the first", vec![at(1000, 4000), end()], done),
        ("the second", vec![at(0, 2000), at(3000, 4000), end()], done),
        (
            "parts of both",
            vec![at(300, 2500), at(2900, 4000), end()],
            done,
        ),
        (
            "what is left of both",
            vec![at(0, 100), at(1000, 2100), at(3000, 4000), end()],
            done,
        ),
        (
            "in small steps",
            vec![
                at(1, 2),
                at(999, 1500),
                at(1500, 2001),
                at(2002, 2003),
                at(3000, 4000),
                end(),
            ],
            done,
        ),
        ("a byte too much", vec![at(1001, 2000)], gap),
        ("the gap", vec![at(2000, 3000)], gap),
        ("all", vec![at(3000, 4000)], gap),
        (
            "a byte too much of the second",
            vec![at(1000, 2000), at(3001, 4000)],
            gap,
        ),
        (
            "a part of the gap",
            vec![at(1000, 1999), at(3000, 4000)],
            gap,
        ),
        ("back again", vec![at(1000, 2000), at(0, 1000)], gap),
        ("an overlap", vec![at(1000, 2000), at(1999, 3000)], gap),
        ("twice the same", vec![at(500, 600), at(500, 600)], gap),
        ("far beyond", vec![chunk(1, u64::MAX, b"x")], gap),
        (
            "too far to count",
            vec![chunk(1, u64::MAX - 1, b"xxxx")],
            gap,
        ),
        ("everything, untold", vec![end()], "error 1 size_mismatch"),
        (
            "everything behind the gap",
            vec![at(1000, 2000), end()],
            "error 1 size_mismatch",
        ),
        (
            "another hash",
            vec![
                at(1000, 2000),
                at(3000, 4000),
                (end().0, with(end().1, "hash", &[7; 32])),
            ],
            "error 1 hash_mismatch retry",
        ),
        (
            "given up",
            vec![at(1000, 2000), cancel(1)],
            "error 1 cancelled",
        ),
    ];
    for (name, says, answer) in plays {
        bounded(async {
            let dir = interrupted(&part, &[(0, 1000), (2000, 1000)]);
            let fixture = Fixture::over(dir, store(), receiver()).await;
            let (socket, mut lane) = lane(&fixture).await;
            lane.say(&resumable(1, "x", 4000)).await;
            let ready = lane.hear().await;
            let hash = |from: usize, to: usize| *blake3::hash(&bytes[from..to]).as_bytes();
            let has = vec![(0, 1000, hash(0, 1000)), (2000, 1000, hash(2000, 3000))];
            assert_eq!(ready.have, has, "{name}");
            for say in &says {
                lane.say(say).await;
            }
            let heard = lane.hear().await;
            assert_eq!(heard.line, answer, "{name}: {heard:?}");
            if answer == done {
                assert!(fixture.stored("x") == bytes, "{name}: other bytes");
                fs::remove_file(fixture.root().join("x")).expect("it");
            }
            assert!(fixture.visible().is_empty(), "{name}");
            // Nothing is kept of what failed.
            well(&fixture, name).await;
            let mut again = RawLane::open(&socket).await;
            again.say(&resumable(1, "x", 4000)).await;
            assert_eq!(again.hear().await.line, "ready 1 0", "{name}");
        })
        .await;
    }
}

#[tokio::test]
async fn chunks_before_the_answer_count_like_those_after_it() {
    let bytes = noise(3, 4000);
    let other = noise(33, 4000);
    let mixed = [&other[..300], &bytes[300..]].concat();
    // Has 0..1000 and 2000..3000, as above.
    let mut part = bytes.clone();
    part[1000..2000].fill(0);
    part[3000..].fill(0);
    let at = |of: &[u8], from: usize, to: usize| chunk(1, from as u64, &of[from..to]);
    // What is said before `ready` and after it, and which of them arrives.
    type Play<'a> = (&'a str, Vec<Say>, Vec<Say>, Option<&'a [u8]>);
    let plays: Vec<Play<'_>> = vec![
        (
            "a part",
            vec![at(&bytes, 0, 300)],
            vec![at(&bytes, 1000, 2000), at(&bytes, 3000, 4000)],
            Some(&bytes),
        ),
        (
            "all of a range",
            vec![at(&bytes, 0, 500), at(&bytes, 500, 1000)],
            vec![at(&bytes, 1000, 2000), at(&bytes, 3000, 4000)],
            Some(&bytes),
        ),
        (
            "beyond it",
            vec![at(&bytes, 0, 1500)],
            vec![at(&bytes, 1500, 2000), at(&bytes, 3000, 4000)],
            Some(&bytes),
        ),
        (
            "into the next",
            vec![at(&bytes, 0, 2500)],
            vec![at(&bytes, 3000, 4000)],
            Some(&bytes),
        ),
        (
            "everything",
            vec![at(&bytes, 0, 4000)],
            vec![],
            Some(&bytes),
        ),
        (
            "another file",
            vec![at(&other, 0, 300)],
            vec![at(&other, 300, 4000)],
            Some(&other),
        ),
        (
            "another beginning",
            vec![at(&other, 0, 300)],
            vec![at(&bytes, 1000, 2000), at(&bytes, 3000, 4000)],
            Some(&mixed),
        ),
        (
            "another beginning, passed off as the same",
            vec![at(&other, 0, 300)],
            vec![at(&bytes, 1000, 2000), at(&bytes, 3000, 4000)],
            None,
        ),
    ];
    for (name, before, after, arrives) in plays {
        bounded(async {
            let dir = interrupted(&part, &[(0, 1000), (2000, 1000)]);
            let fixture = Fixture::over(dir, store(), receiver()).await;
            let (_socket, mut lane) = lane(&fixture).await;
            lane.say(&resumable(1, "x", 4000)).await;
            for say in &before {
                lane.say(say).await;
            }
            // Told as it was before any of them.
            let ready = lane.hear().await;
            let hash = |from: usize, to: usize| *blake3::hash(&bytes[from..to]).as_bytes();
            let has = vec![(0, 1000, hash(0, 1000)), (2000, 1000, hash(2000, 3000))];
            assert_eq!(ready.have, has, "{name}");
            for say in &after {
                lane.say(say).await;
            }
            lane.say(&finish(1, arrives.unwrap_or(&bytes))).await;
            let heard = lane.hear().await.line;
            match arrives {
                Some(arrives) => {
                    assert_eq!(heard, "done 1 x 4000", "{name}");
                    assert!(fixture.stored("x") == arrives, "{name}: other bytes");
                    fs::remove_file(fixture.root().join("x")).expect("it");
                }
                None => assert_eq!(heard, "error 1 hash_mismatch retry", "{name}"),
            }
            assert!(fixture.visible().is_empty(), "{name}");
            well(&fixture, name).await;
        })
        .await;
    }
}

#[tokio::test]
async fn chunks_before_an_answer_that_is_no_ready_are_dropped() {
    bounded(async {
        let config = StoreConfig {
            quota: Some(20_000),
            ..store()
        };
        let fixture = Fixture::with(config, receiver()).await;
        let stored = noise(8, 5000);
        fs::write(fixture.root().join("stored"), &stored).expect("a file");
        let (_one, mut first) = lane(&fixture).await;
        let (_two, mut lane) = lane(&fixture).await;
        let bytes = noise(9, 5000);
        first.say(&of_run(1, "busy", 5000, 1)).await;
        assert_eq!(first.hear().await.line, "ready 1 0");
        first.say(&chunk(1, 0, &bytes[..1000])).await;
        first.acked(1, 1000).await;
        let policy = |(event, data): Say, word: &str| (event, with(data, "if_exists", word));
        let offers = [
            (resumable(1, "../x", 5000), "bad_name"),
            (resumable(2, "stored", 5001), "exists"),
            (policy(resumable(3, "stored", 5000), "error"), "exists"),
            (resumable(4, "large", 30_000), "quota retry"),
            (of_run(5, "busy", 5000, 2), "busy retry"),
        ];
        for (id, (offer, answer)) in (1..).zip(offers) {
            lane.say(&offer).await;
            for off in (0..3000).step_by(1000) {
                lane.say(&chunk(id, off, &[7; 1000])).await;
            }
            assert_eq!(lane.hear().await.line, format!("error {id} {answer}"));
        }
        lane.say(&policy(resumable(6, "stored", 5000), "skip"))
            .await;
        lane.say(&chunk(6, 0, &[7; 1000])).await;
        assert_eq!(lane.hear().await.line, "done 6 stored 5000 same");
        // What is being written by another is none the worse for it.
        first.say(&chunk(1, 1000, &bytes[1000..])).await;
        first.say(&finish(1, &bytes)).await;
        assert_eq!(first.hear().await.line, "done 1 busy 5000");
        assert!(fixture.stored("busy") == bytes && fixture.stored("stored") == stored);
        assert_eq!(fixture.visible(), ["busy", "stored"]);
        well(&fixture, "refused").await;
    })
    .await;
}

#[tokio::test]
async fn what_changed_on_the_disk_never_comes_out_as_right() {
    let bytes = noise(4, 200_000);
    let hash = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
    bounded(async {
        let mut part = bytes[..150_000].to_vec();
        part[70_000] ^= 1;
        let dir = || interrupted(&part, &[(0, 50_000), (50_000, 100_000)]);
        // The client is told what is there, not what was.
        let fixture = Fixture::over(dir(), store(), receiver()).await;
        let (_socket, mut honest) = lane(&fixture).await;
        honest.say(&resumable(1, "x", 200_000)).await;
        let ready = honest.hear().await;
        let mut told = 0;
        for (off, len, found) in &ready.have {
            let (off, end) = (*off as usize, (*off + *len) as usize);
            assert_eq!((off, *found), (told, hash(&part[off..end])));
            told = end;
        }
        assert_eq!(told, 150_000);
        // It sends again what is unequal, and the rest.
        honest.say(&chunk(1, 0, &bytes)).await;
        honest.say(&finish(1, &bytes)).await;
        assert_eq!(honest.hear().await.line, "done 1 x 200000");
        assert!(fixture.stored("x") == bytes);
        well(&fixture, "sent again").await;
        // One that passes over it all the same gains nothing.
        let fixture = Fixture::over(dir(), store(), receiver()).await;
        let (_socket, mut careless) = lane(&fixture).await;
        careless.say(&resumable(1, "x", 200_000)).await;
        assert!(careless.hear().await.line.starts_with("ready 1 "));
        careless.say(&chunk(1, 150_000, &bytes[150_000..])).await;
        careless.say(&finish(1, &bytes)).await;
        assert_eq!(careless.hear().await.line, "error 1 hash_mismatch retry");
        assert!(fixture.visible().is_empty());
        well(&fixture, "passed over").await;
        careless.say(&resumable(2, "x", 200_000)).await;
        assert_eq!(careless.hear().await.line, "ready 2 0");
        careless.say(&cancel(2)).await;
        assert_eq!(careless.hear().await.line, "error 2 cancelled");
        well(&fixture, "anew").await;
    })
    .await;
}

#[tokio::test]
async fn a_journal_that_lies_costs_time_and_nothing_else() {
    let bytes = noise(5, 5000);
    let head = "upload 1 1700000000 - tester x";
    let safe = |off: u64, len: u64| line(&format!("safe {off} {len}"));
    let mut garbled = safe(0, 3000).into_bytes();
    garbled[20] ^= 1;
    // What the journal is, and how much of it counts.
    let journals: Vec<(&str, Vec<u8>, usize)> = vec![
        ("sound", (line(head) + &safe(0, 3000)).into_bytes(), 3000),
        ("empty", vec![], 0),
        ("only a head", line(head).into_bytes(), 0),
        ("noise", noise(6, 4096), 0),
        ("zeros", vec![0; 4096], 0),
        ("no head", safe(0, 3000).into_bytes(), 0),
        (
            "garbled in the middle",
            [
                (line(head) + &safe(0, 1000)).into_bytes(),
                garbled,
                safe(0, 4000).into_bytes(),
            ]
            .concat(),
            1000,
        ),
        (
            "torn",
            (line(head) + &safe(0, 1000) + "0123456789abcdef safe 0 20").into_bytes(),
            1000,
        ),
        (
            "of somebody else",
            (line("upload 1 1700000000 - other x") + &safe(0, 3000)).into_bytes(),
            0,
        ),
        (
            "of another file",
            (line("upload 1 1700000000 - tester y") + &safe(0, 3000)).into_bytes(),
            0,
        ),
        (
            "of the future",
            (line("upload 2 1700000000 - tester x") + &safe(0, 3000)).into_bytes(),
            0,
        ),
        (
            "beyond the file",
            (line(head) + &safe(0, 1 << 40)).into_bytes(),
            4000,
        ),
        (
            "beyond all numbers",
            (line(head) + &safe(0, 1000) + &safe(u64::MAX, u64::MAX)).into_bytes(),
            1000,
        ),
        (
            "ranges one over the other",
            (line(head) + &safe(500, 1000) + &safe(0, 600) + &safe(900, 600) + &safe(0, 10))
                .into_bytes(),
            1500,
        ),
    ];
    for (name, journal, counts) in journals {
        bounded(async {
            let dir = with_journal(&bytes[..4000], &journal);
            let fixture = Fixture::over(dir, store(), receiver()).await;
            let (_socket, mut lane) = lane(&fixture).await;
            lane.say(&resumable(1, "x", 5000)).await;
            let held = have(&lane.hear().await, 1, &bytes);
            assert_eq!(held, counts, "{name}");
            send(&lane, 1, &bytes, held, 5000).await;
            lane.say(&finish(1, &bytes)).await;
            assert_eq!(lane.hear().await.line, "done 1 x 5000", "{name}");
            assert!(fixture.stored("x") == bytes, "{name}: other bytes");
            well(&fixture, name).await;
        })
        .await;
    }
}

#[tokio::test]
async fn another_size_is_another_file_with_the_same_beginning() {
    let bytes = noise(7, 4000);
    // The size offered, what of it is told to be there, and what must be sent.
    for (size, told) in [
        (V::Nil, 3000),
        (5000.into(), 3000),
        (3000.into(), 3000),
        (1000.into(), 1000),
        (0.into(), 0),
    ] {
        bounded(async {
            let whole = match &size {
                V::Uint(size) => noise(7, 5000)[..*size as usize].to_vec(),
                _ => bytes.clone(),
            };
            let fixture = Fixture::over(
                interrupted(&bytes[..3000], &[(0, 3000)]),
                store(),
                receiver(),
            )
            .await;
            let (_socket, mut lane) = lane(&fixture).await;
            lane.say(&resumable(1, "x", size.clone())).await;
            let held = have(&lane.hear().await, 1, &noise(7, 5000));
            assert_eq!(held, told, "{size:?}");
            send(&lane, 1, &whole, held, whole.len()).await;
            lane.say(&finish(1, &whole)).await;
            let heard = lane.hear().await;
            assert_eq!(heard.line, format!("done 1 x {}", whole.len()), "{heard:?}");
            assert!(fixture.stored("x") == whole, "{size:?}: other bytes");
            well(&fixture, "another size").await;
        })
        .await;
    }
    // What was there beyond the size may not be passed over.
    bounded(async {
        let fixture = Fixture::over(
            interrupted(&bytes[..3000], &[(0, 3000)]),
            store(),
            receiver(),
        )
        .await;
        let (_socket, mut lane) = lane(&fixture).await;
        lane.say(&resumable(1, "x", 1000)).await;
        have(&lane.hear().await, 1, &bytes);
        lane.say(&chunk(1, 2000, b"x")).await;
        let heard = lane.hear().await.line;
        assert_eq!(heard, "error 1 bad_offset");
        well(&fixture, "beyond the size").await;
    })
    .await;
}

#[tokio::test]
async fn what_is_published_already_is_told_as_a_whole() {
    bounded(async {
        let bytes = noise(8, 5000);
        let fixture = Fixture::with(store(), receiver()).await;
        fs::write(fixture.root().join("x"), &bytes).expect("a file");
        let (_socket, mut lane) = lane(&fixture).await;
        for size in [V::Nil, 5000.into()] {
            let id = if size == V::Nil { 1 } else { 2 };
            lane.say(&resumable(id, "x", size)).await;
            assert_eq!(have(&lane.hear().await, id, &bytes), 5000);
            lane.say(&finish(id, &bytes)).await;
            assert_eq!(lane.hear().await.line, format!("done {id} x 5000 same"));
        }
        // Another file of that size: found unequal, sent, and refused at its end.
        let other = noise(9, 5000);
        lane.say(&resumable(3, "x", 5000)).await;
        assert!(lane.hear().await.line.starts_with("ready 3 1"));
        lane.say(&chunk(3, 0, &other)).await;
        lane.say(&finish(3, &other)).await;
        assert_eq!(lane.hear().await.line, "error 3 exists");
        // A part that was sent before the answer is compared like all of it.
        for (id, from, to) in [(11, 0, 1), (12, 0, 4999), (13, 0, 5000)] {
            lane.say(&resumable(id, "x", 5000)).await;
            lane.say(&chunk(id, 0, &bytes[from..to])).await;
            assert_eq!(have(&lane.hear().await, id, &bytes), 5000);
            lane.say(&finish(id, &bytes)).await;
            assert_eq!(lane.hear().await.line, format!("done {id} x 5000 same"));
        }
        for (id, rest) in [(14, &other[1000..]), (15, &[][..])] {
            lane.say(&resumable(id, "x", 5000)).await;
            lane.say(&chunk(id, 0, &other[..1000])).await;
            assert!(lane.hear().await.line.starts_with(&format!("ready {id} 1")));
            if !rest.is_empty() {
                lane.say(&chunk(id, 1000, rest)).await;
            }
            lane.say(&finish(id, &other)).await;
            let heard = lane.hear().await.line;
            let code = if rest.is_empty() {
                "size_mismatch"
            } else {
                "exists"
            };
            assert_eq!(heard, format!("error {id} {code}"));
        }
        // Passing over what is unequal gains nothing, nor does adding to it.
        lane.say(&resumable(21, "x", 5000)).await;
        assert!(lane.hear().await.line.starts_with("ready 21 1"));
        lane.say(&chunk(21, 4000, &other[4000..])).await;
        lane.say(&finish(21, &other)).await;
        let heard = lane.hear().await.line;
        assert!(heard.starts_with("error 21 "), "{heard}");
        lane.say(&resumable(22, "x", V::Nil)).await;
        assert!(lane.hear().await.line.starts_with("ready 22 1"));
        lane.say(&chunk(22, 5000, b"more")).await;
        let longer = [&bytes[..], b"more"].concat();
        lane.say(&finish(22, &longer)).await;
        let heard = lane.hear().await.line;
        assert!(heard.starts_with("error 22 "), "{heard}");
        assert_eq!(fixture.stored("x"), bytes);
        assert_eq!(fixture.visible(), ["x"]);
        well(&fixture, "published").await;
    })
    .await;
}

#[tokio::test]
async fn cancelling_keeps_what_is_there_only_when_asked_to() {
    bounded(async {
        let bytes = noise(10, 300_000);
        let fixture = Fixture::with(store(), receiver()).await;
        let (_socket, mut lane) = lane(&fixture).await;
        // Resumable, keep, and what is there afterwards.
        let rows = [
            (true, true, 200_000),
            (true, false, 0),
            (false, true, 0),
            (false, false, 0),
        ];
        for (n, (resume, kept, expected)) in (1..).zip(rows) {
            let id = 10 * n;
            let path = format!("x{n}");
            let (event, data) = file(id, &path, 300_000);
            lane.say(&(event, with(data, "resume", resume))).await;
            if resume {
                assert_eq!(lane.hear().await.line, format!("ready {id} 0"));
            }
            lane.say(&chunk(id, 0, &bytes[..200_000])).await;
            lane.acked(id, 200_000).await;
            lane.say(&if kept { keep(id) } else { cancel(id) }).await;
            assert_eq!(lane.hear().await.line, format!("error {id} cancelled"));
            // What comes late changes nothing.
            lane.say(&keep(id)).await;
            lane.say(&cancel(id)).await;
            lane.say(&resumable(id + 1, &path, 300_000)).await;
            let heard = lane.hear().await;
            assert_eq!(have(&heard, id + 1, &bytes), expected, "{resume} {kept}");
            lane.say(&cancel(id + 1)).await;
            assert_eq!(
                lane.hear().await.line,
                format!("error {} cancelled", id + 1)
            );
            assert!(fixture.visible().is_empty());
            well(&fixture, "cancelled").await;
        }
    })
    .await;
}

#[tokio::test]
async fn uploads_put_aside_take_no_place() {
    bounded(async {
        let fixture = Fixture::with(
            StoreConfig {
                max_open: 4,
                ..store()
            },
            ReceiverConfig {
                open_files: 4,
                ..receiver()
            },
        )
        .await;
        let bytes = noise(11, 1000);
        let (_socket, mut lane) = lane(&fixture).await;
        for id in 1..=50 {
            lane.say(&resumable(id, &format!("f{id}"), 1000)).await;
            assert_eq!(lane.hear().await.line, format!("ready {id} 0"));
            lane.say(&chunk(id, 0, &bytes[..500])).await;
            lane.say(&keep(id)).await;
            assert_eq!(lane.hear().await.line, format!("error {id} cancelled"));
        }
        until("put aside", || fixture.store.usage().open == 0).await;
        let before = private(&fixture, "staging").len();
        for id in 1..=50 {
            let path = format!("f{id}");
            lane.say(&resumable(id + 50, &path, 1000)).await;
            let held = have(&lane.hear().await, id + 50, &bytes);
            send(&lane, id + 50, &bytes, held, 1000).await;
            lane.say(&finish(id + 50, &bytes)).await;
            let heard = lane.hear().await.line;
            assert_eq!(heard, format!("done {} {path} 1000", id + 50));
        }
        assert!(before <= 50, "{before}");
        assert_eq!(fixture.visible().len(), 50);
        well(&fixture, "put aside").await;
    })
    .await;
}

// -------------------------------------------------------------------------------------------------- writers

#[tokio::test]
async fn of_two_clients_the_second_waits_for_the_silence_of_the_first() {
    bounded(async {
        let silence = Duration::from_millis(1500);
        let receiver = ReceiverConfig {
            takeover: silence,
            ..receiver()
        };
        let fixture = Fixture::with(store(), receiver).await;
        let bytes = noise(12, 400_000);
        let (_one, mut first) = lane(&fixture).await;
        let (_two, mut second) = lane(&fixture).await;
        first.say(&of_run(1, "x", 400_000, 1)).await;
        assert_eq!(first.hear().await.line, "ready 1 0");
        // As long as it says something, nobody else gets in: another run, none at all, with and without size.
        for id in 1..=3_u64 {
            let from = (id as usize - 1) * 1000;
            first
                .say(&chunk(1, from as u64, &bytes[from..from + 1000]))
                .await;
            first.acked(1, id * 1000).await;
            let since = tokio::time::Instant::now();
            let offer = match id {
                1 => of_run(id, "x", 400_000, 2),
                2 => resumable(id, "x", V::Nil),
                _ => of_run(id, "x", 5, 3),
            };
            second.say(&offer).await;
            let heard = second.hear().await.line;
            if since.elapsed() < silence / 2 {
                assert_eq!(heard, format!("error {id} busy retry"));
            }
        }
        // What cannot be resumed has nothing to do with it, nor has another file.
        second.say(&file(10, "y", 0)).await;
        second.say(&finish(10, b"")).await;
        assert_eq!(second.hear().await.line, "done 10 y 0");
        // Then it is silent.
        let mut id = 20;
        let ready = loop {
            second.say(&of_run(id, "x", 400_000, 2)).await;
            let heard = second.hear().await;
            if heard.line != format!("error {id} busy retry") {
                break heard;
            }
            id += 1;
        };
        assert_eq!(have(&ready, id, &bytes), 3000);
        assert_eq!(first.hear().await.line, "error 1 superseded");
        // It is over for the first: what it still says is dropped, and its next offer is busy.
        first.say(&chunk(1, 3000, &[0; 1000])).await;
        first.say(&finish(1, &bytes)).await;
        first.say(&of_run(2, "x", 400_000, 1)).await;
        assert_eq!(first.hear().await.line, "error 2 busy retry");
        send(&second, id, &bytes, 3000, 400_000).await;
        second.say(&finish(id, &bytes)).await;
        assert_eq!(second.hear().await.line, format!("done {id} x 400000"));
        assert!(fixture.stored("x") == bytes);
        first.say(&of_run(3, "x", 400_000, 1)).await;
        assert_eq!(have(&first.hear().await, 3, &bytes), 400_000);
        first.say(&finish(3, &bytes)).await;
        assert_eq!(first.hear().await.line, "done 3 x 400000 same");
        well(&fixture, "two clients").await;
    })
    .await;
}

#[tokio::test]
async fn a_run_takes_its_own_upload_over_at_once() {
    bounded(async {
        let fixture = Fixture::with(store(), receiver()).await;
        let bytes = noise(13, 2 * MIB);
        let (_one, mut first) = lane(&fixture).await;
        first.say(&of_run(1, "x", 2 * MIB as u64, 1)).await;
        assert_eq!(first.hear().await.line, "ready 1 0");
        let mut held = 0;
        let mut lanes = vec![(_one, first)];
        // From connection to connection, while the one before is not known to be dead.
        for round in 1..=4 {
            let (socket, mut next) = lane(&fixture).await;
            let (_, before) = lanes.last_mut().expect("a lane");
            let to = round * 300 * KIB;
            send(before, 1, &bytes, held, to).await;
            before.acked(1, to as u64).await;
            next.say(&of_run(1, "x", 2 * MIB as u64, 1)).await;
            held = have(&next.hear().await, 1, &bytes);
            assert_eq!(held, to);
            assert_eq!(before.hear().await.line, "error 1 superseded retry");
            // Two of them never write: this is dropped.
            before.say(&chunk(1, held as u64, &[0; 1000])).await;
            lanes.push((socket, next));
        }
        let (_, last) = lanes.last_mut().expect("a lane");
        send(last, 1, &bytes, held, bytes.len()).await;
        last.say(&finish(1, &bytes)).await;
        assert_eq!(last.hear().await.line, format!("done 1 x {}", 2 * MIB));
        assert!(fixture.stored("x") == bytes);
        // Each lane before it goes on.
        for (_, lane) in &mut lanes {
            lane.say(&file(9, "next", 0)).await;
            lane.say(&finish(9, b"")).await;
            let heard = lane.hear().await.line;
            assert!(heard.starts_with("done 9 next 0"), "{heard}");
        }
        well(&fixture, "a run").await;
    })
    .await;
}

#[tokio::test]
async fn of_many_offers_at_once_one_writes() {
    bounded(async {
        let fixture = Fixture::with(store(), receiver()).await;
        let bytes = noise(14, 100_000);
        let mut lanes = Vec::new();
        for _ in 0..4 {
            let socket = fixture.connect().await;
            for _ in 0..4 {
                lanes.push((socket.clone(), RawLane::open(&socket).await));
            }
        }
        for (_, lane) in &lanes {
            lane.say(&resumable(1, "x", 100_000)).await;
        }
        let mut ready = Vec::new();
        for (n, (_, lane)) in lanes.iter_mut().enumerate() {
            match lane.hear().await.line.as_str() {
                "ready 1 0" => ready.push(n),
                "error 1 busy retry" => {}
                other => panic!("{other}"),
            }
        }
        assert_eq!(ready.len(), 1, "{ready:?}");
        let (_, winner) = &mut lanes[ready[0]];
        send(winner, 1, &bytes, 0, bytes.len()).await;
        winner.say(&finish(1, &bytes)).await;
        assert_eq!(winner.hear().await.line, "done 1 x 100000");
        assert!(fixture.stored("x") == bytes);
        well(&fixture, "many offers").await;
    })
    .await;
}

#[tokio::test]
async fn another_token_has_uploads_of_its_own_and_one_of_them_wins() {
    // The second one's bytes, and what it is told.
    for (same, answer) in [(true, "done 1 x 300000 same"), (false, "error 1 exists")] {
        bounded(async {
            let fixture = Fixture::with(store(), receiver()).await;
            let bytes = noise(15, 300_000);
            let other = if same {
                bytes.clone()
            } else {
                noise(16, 300_000)
            };
            let (_one, mut first) = lane(&fixture).await;
            let socket = fixture.connect_as(OTHER).await;
            let mut second = RawLane::open(&socket).await;
            for (lane, bytes) in [(&mut first, &bytes), (&mut second, &other)] {
                // The same run and path; another client nevertheless.
                lane.say(&of_run(1, "x", 300_000, 1)).await;
                assert_eq!(lane.hear().await.line, "ready 1 0");
                send(lane, 1, bytes, 0, 200_000).await;
                lane.acked(1, 200_000).await;
            }
            assert_eq!(private(&fixture, "staging").len(), 2);
            // Each takes up its own.
            first.say(&keep(1)).await;
            assert_eq!(first.hear().await.line, "error 1 cancelled");
            let (_again, mut first) = lane(&fixture).await;
            first.say(&of_run(1, "x", 300_000, 1)).await;
            assert_eq!(have(&first.hear().await, 1, &bytes), 200_000);
            for (lane, bytes) in [(&mut first, &bytes), (&mut second, &other)] {
                send(lane, 1, bytes, 200_000, 300_000).await;
            }
            first.say(&finish(1, &bytes)).await;
            assert_eq!(first.hear().await.line, "done 1 x 300000");
            second.say(&finish(1, &other)).await;
            assert_eq!(second.hear().await.line, answer);
            assert!(fixture.stored("x") == bytes);
            assert_eq!(fixture.visible(), ["x"]);
            well(&fixture, "two tokens").await;
        })
        .await;
    }
}

#[tokio::test]
async fn a_done_that_was_lost_is_said_again_to_the_same_run() {
    let bytes = noise(17, 5000);
    let older = noise(18, 4000);
    // What to do when the name is taken; what is there before; what the first gets; what another run gets.
    let rows = [
        ("same", false, "done 1 x 5000", "done 1 x 5000 same"),
        ("error", false, "done 1 x 5000", "error 1 exists"),
        ("skip", false, "done 1 x 5000", "done 1 x 5000 same"),
        ("overwrite", true, "done 1 x 5000", "done 1 x 5000"),
        ("rename", true, "done 1 x (1) 5000", "done 1 x (2) 5000"),
    ];
    for (policy, taken, first, another) in rows {
        for resume in [true, false] {
            bounded(async {
                let fixture = Fixture::with(store(), receiver()).await;
                if taken {
                    fs::write(fixture.root().join("x"), &older).expect("a file");
                }
                let offer = |run: u8| {
                    let (event, data) = of_run(1, "x", 5000, run);
                    let data = with(data, "resume", resume);
                    (event, with(data, "if_exists", policy))
                };
                let whole = async |run: u8| {
                    let (_socket, mut lane) = lane(&fixture).await;
                    lane.say(&offer(run)).await;
                    lane.say(&chunk(1, 0, &bytes)).await;
                    lane.say(&finish(1, &bytes)).await;
                    let mut heard = lane.hear().await;
                    if heard.line.starts_with("ready") {
                        heard = lane.hear().await;
                    }
                    if heard.line.starts_with("done") {
                        assert_eq!(heard.hash, Some(*blake3::hash(&bytes).as_bytes()));
                    }
                    // The lane goes on, whatever was dropped.
                    lane.say(&file(2, "next", 0)).await;
                    lane.say(&finish(2, b"")).await;
                    let next = lane.hear().await.line;
                    assert!(next.starts_with("done 2 next 0"), "{next}");
                    heard.line
                };
                assert_eq!(whole(1).await, first, "{policy}");
                let visible = fixture.visible();
                for _ in 0..3 {
                    assert_eq!(whole(1).await, first, "{policy}, again");
                }
                assert_eq!(fixture.visible(), visible, "{policy}");
                assert_eq!(whole(2).await, another, "{policy}, another run");
                well(&fixture, policy).await;
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_run_stores_one_content_under_a_name() {
    let bytes = noise(17, 5000);
    let other = noise(18, 5000);
    let longer = noise(17, 5001);
    for policy in ["same", "error", "overwrite", "rename", "skip"] {
        for resume in [true, false] {
            bounded(async {
                let config = StoreConfig {
                    overwrite: Overwrite::Always,
                    ..store()
                };
                let fixture = Fixture::with(config, receiver()).await;
                let in_run = |say: Say| {
                    let (event, data) = say;
                    let data = with(data, "run", &[1; 16]);
                    (event, with(data, "if_exists", policy))
                };
                let (_socket, mut lane) = lane(&fixture).await;
                let mut id = 0;
                let mut send = async |content: &[u8], whole: bool| {
                    id += 1;
                    if whole {
                        lane.say(&in_run(put(id, "x", content))).await;
                    } else {
                        let (event, data) = file(id, "x", content.len() as u64);
                        let data = with(data, "resume", resume);
                        lane.say(&in_run((event, data))).await;
                        lane.say(&chunk(id, 0, content)).await;
                        lane.say(&finish(id, content)).await;
                    }
                    let mut heard = lane.hear().await;
                    if heard.line.starts_with("ready") {
                        heard = lane.hear().await;
                    }
                    heard.line.replacen(&id.to_string(), "ID", 1)
                };
                assert_eq!(send(&bytes, true).await, "done ID x 5000", "{policy}");
                for whole in [true, false] {
                    assert_eq!(send(&bytes, whole).await, "done ID x 5000", "{policy}");
                    let answers = [send(&other, whole).await, send(&longer, whole).await];
                    match policy {
                        // What has the name counts, whatever comes.
                        "skip" => {
                            for answer in answers {
                                assert!(answer.starts_with("done ID x 5000"), "{answer}");
                            }
                        }
                        _ => assert_eq!(answers, ["error ID exists"; 2], "{policy} {whole}"),
                    }
                    assert!(fixture.stored("x") == bytes, "{policy}");
                    assert_eq!(fixture.visible(), ["x"], "{policy}");
                }
                well(&fixture, policy).await;
            })
            .await;
        }
    }
}

#[tokio::test]
async fn an_offer_that_comes_while_the_one_before_is_checked_hears_its_outcome() {
    let bytes = noise(19, 5 * MIB);
    for (right, policy) in [(true, "error"), (true, "same"), (false, "error")] {
        bounded(async {
            let fixture = Fixture::with(store(), receiver()).await;
            let (socket, first) = lane(&fixture).await;
            let offer = |id: u64| {
                let (event, data) = of_run(id, "x", bytes.len() as u64, 1);
                (event, with(data, "if_exists", policy))
            };
            first.say(&offer(1)).await;
            send(&first, 1, &bytes, 0, bytes.len()).await;
            let (event, data) = finish(1, &bytes);
            let data = match right {
                true => data,
                false => with(data, "hash", &[7; 32]),
            };
            first.say(&(event, data)).await;
            first.channel.finish().await.expect("the server has it");
            socket.abort(CloseCode::new(0x1001), "gone");
            let (_socket, mut second) = lane(&fixture).await;
            second.say(&offer(1)).await;
            let mut heard = second.hear().await;
            if heard.line.starts_with("ready") {
                // It failed, or its end was not heard any more: what is missing is sent again.
                let held = have(&heard, 1, &bytes);
                send(&second, 1, &bytes, held, bytes.len()).await;
                second.say(&finish(1, &bytes)).await;
                heard = second.hear().await;
            }
            let done = format!("done 1 x {}", bytes.len());
            assert!(heard.line.starts_with(&done), "{policy}: {heard:?}");
            assert!(fixture.stored("x") == bytes);
            well(&fixture, policy).await;
        })
        .await;
    }
}

#[tokio::test]
async fn runs_and_offers_of_the_wrong_type_are_told_by_their_id() {
    bounded(async {
        let fixture = Fixture::with(store(), receiver()).await;
        let (_socket, mut lane) = lane(&fixture).await;
        let runs = [
            V::Bin(vec![1; 15]),
            V::Bin(vec![1; 17]),
            V::Bin(vec![]),
            "0123456789abcdef".into(),
            1.into(),
            true.into(),
            V::Array(vec![1.into(); 16]),
        ];
        let mut id = 0;
        for run in runs {
            id += 1;
            let (event, data) = resumable(id, "x", 4);
            lane.say(&(event, with(data, "run", run))).await;
            assert_eq!(lane.hear().await.line, format!("error {id} bad_message"));
        }
        for keep in [V::Int(1), "yes".into(), V::Bin(vec![1])] {
            id += 1;
            lane.say(&resumable(id, "x", 4)).await;
            assert_eq!(lane.hear().await.line, format!("ready {id} 0"));
            let (event, data) = cancel(id);
            lane.say(&(event, with(data, "keep", keep))).await;
            assert_eq!(lane.hear().await.line, format!("error {id} bad_message"));
            until("it ends", || fixture.store.usage().open == 0).await;
        }
        assert!(fixture.visible().is_empty());
        well(&fixture, "wrong types").await;
    })
    .await;
}
