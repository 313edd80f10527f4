//! Uploads by a client that means harm: names that lead elsewhere, messages at the wrong time, of the wrong
//! type, beyond every limit, and lanes that end in the middle.
//!
//! Data-driven: a table of names and tables of scripts. A script is what the client says and, word for word,
//! everything the server answers. After each one the same questions are asked: is nothing left in staging, is
//! nothing new visible, do a new and an old honest client get their files stored, have memory and descriptors
//! come back.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use common::{Fixture, bounded, drain, memory, noise};
use raw::{
    RawLane, Say, V, cancel, chunk, file, finish, get, map, put, short_chunk, short_file,
    short_finish, twice, with, without,
};
use udpack::{CloseCode, Socket};
use udpack_transfer::{Names, Overwrite, ReceiverConfig, RelPath, Scope, StoreConfig, Uploader};

/// What the file `taken` holds, which is there in every world.
const TAKEN: &[u8] = b"0123456789";
/// One test at a time: they measure what an honest client waits.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// Tells a process of [`elsewhere`] that it is one.
const CHILD: &str = "UDPACK_TEST_CHILD";

const MIB: usize = 1 << 20;

/// Runs this test in a process of its own, and says so; false when this is that process.
///
/// The tests measure memory and descriptors: nobody else may use any meanwhile.
async fn elsewhere(test: &'static str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return false;
    }
    let _alone = ALONE.lock().await;
    let run = move || {
        Command::new(std::env::current_exe()?)
            .args(["--exact", test, "--nocapture"])
            .env(CHILD, "1")
            .output()
    };
    let output = tokio::task::spawn_blocking(run).await.expect("no panic");
    let output = output.expect("the test itself can be run");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("1 passed"), "no such test: {test}");
    // What could not be tried is said by the child.
    for line in stderr.lines().filter(|line| line.starts_with("skipped")) {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
    true
}

// ---------------------------------------------------------------------------------------------- the world

/// A server, an honest client that has been there from the start, and what is normal.
struct World {
    fixture: Fixture,
    _honest: Socket,
    lane: RawLane,
    files: u64,
    heap: usize,
    fds: usize,
    /// Whether an honest client can store 1 MiB here.
    open_to_all: bool,
}

impl World {
    async fn new(store: StoreConfig, receiver: ReceiverConfig) -> Self {
        Self::with(store, receiver, true).await
    }

    async fn with(store: StoreConfig, receiver: ReceiverConfig, open_to_all: bool) -> Self {
        let fixture = Fixture::with(store, receiver).await;
        fs::write(fixture.root().join("taken"), TAKEN).expect("a stored file");
        let honest = fixture.connect().await;
        let lane = RawLane::open(&honest).await;
        let mut world = Self {
            fixture,
            _honest: honest,
            lane,
            files: 0,
            heap: usize::MAX,
            fds: usize::MAX,
            open_to_all,
        };
        // Warm: allocator, blocking threads, caches. As much at once as any script has.
        let mut clients = Vec::new();
        for n in 0..16 {
            let socket = world.fixture.connect().await;
            let lane = RawLane::open(&socket).await;
            lane.say(&file(1, &format!("warm{n}"), V::Nil)).await;
            clients.push((socket, lane));
        }
        for n in 0..3 {
            for (_, lane) in &clients {
                let bytes = noise(n, MIB);
                lane.say(&chunk(1, n * MIB as u64, &bytes)).await;
            }
        }
        drop(clients);
        world.lanes_are_over("warming up").await;
        for _ in 0..8 {
            world.well("warming up").await;
        }
        world.this_is_normal();
        world
    }

    fn this_is_normal(&mut self) {
        self.heap = heap();
        self.fds = fds();
    }

    /// Nothing is left of what a hostile client did, and honest ones are served.
    async fn well(&mut self, after: &str) {
        self.lanes_are_over(after).await;
        let usage = self.fixture.store.usage();
        assert_eq!((usage.reserved, usage.open), (0, 0), "{after}: reserved");
        assert_eq!(self.fixture.visible(), ["taken"], "{after}: visible");
        assert_eq!(self.fixture.stored("taken"), TAKEN, "{after}: touched");
        if self.open_to_all {
            self.old_client(after).await;
            self.new_client(after).await;
            self.lanes_are_over(after).await;
        }
        self.back_to_normal(after).await;
    }

    /// Waits until the server serves no lane but that of the honest client, and no file is on its way.
    async fn lanes_are_over(&self, after: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let lanes = || {
            self.fixture
                .server
                .sockets()
                .iter()
                .map(Socket::channels)
                .sum::<usize>()
        };
        while lanes() > 1 {
            assert!(Instant::now() < deadline, "{after}: a lane does not end");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.fixture.settled().await;
    }

    async fn old_client(&mut self, after: &str) {
        self.files += 1;
        let (id, bytes) = (self.files, noise(self.files, 5000));
        self.lane.say(&file(id, "honest", 5000)).await;
        self.lane.say(&chunk(id, 0, &bytes)).await;
        self.lane.say(&finish(id, &bytes)).await;
        let heard = self.lane.hear().await;
        assert_eq!(heard.line, format!("done {id} honest 5000"), "{after}");
        assert_eq!(self.fixture.stored("honest"), bytes, "{after}");
        self.remove("honest");
    }

    async fn new_client(&self, after: &str) {
        let since = Instant::now();
        let socket = self.fixture.connect().await;
        let bytes = noise(7, MIB);
        let source = memory("new", bytes.clone());
        let (done, failed) = drain(Uploader::new(&socket).put(vec![source])).await;
        let took = since.elapsed();
        assert!(failed.is_empty(), "{after}: {failed:?}");
        assert_eq!(done.len(), 1, "{after}");
        assert!(
            took < Duration::from_secs(2),
            "{after}: 1 MiB took {took:?}"
        );
        assert!(self.fixture.stored("new") == bytes, "{after}: other bytes");
        self.remove("new");
        socket.close(CloseCode::NORMAL, "").await;
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.fixture.root().join(name)).expect("a stored file");
    }

    async fn back_to_normal(&self, after: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let most = self.heap.saturating_add(8 * MIB);
        loop {
            let (heap, fds) = (heap(), fds());
            if heap <= most && fds <= self.fds {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{after}: {heap} bytes of memory, normal are {}; {fds} descriptors, normal are {}",
                self.heap,
                self.fds
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Counts what is allocated: unlike resident memory, it does not depend on what the allocator keeps.
#[global_allocator]
static HEAP: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

/// Bytes the process has allocated.
fn heap() -> usize {
    HEAP.current_usage()
}

/// Descriptors this process has, 0 where that cannot be told.
fn fds() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Everything below a directory, with all that shows that it was touched.
fn tree(dir: &Path) -> BTreeMap<String, String> {
    fn walk(top: &Path, dir: &Path, found: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            let metadata = fs::symlink_metadata(&path).expect("metadata");
            let kind = metadata.file_type();
            let content = if kind.is_file() {
                blake3::hash(&fs::read(&path).expect("a file")).to_string()
            } else if kind.is_symlink() {
                format!("{:?}", fs::read_link(&path).expect("a link"))
            } else {
                String::new()
            };
            let text = format!(
                "{kind:?} {} {:o} {} {}.{} {content}",
                metadata.ino(),
                metadata.mode(),
                metadata.len(),
                metadata.mtime(),
                metadata.mtime_nsec()
            );
            let name = path.strip_prefix(top).expect("below the top");
            found.insert(name.to_string_lossy().into_owned(), text);
            if kind.is_dir() {
                walk(top, &path, found);
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(dir, dir, &mut found);
    found
}

/// Makes a directory look untouched for years, so that anything made or removed in it shows.
fn age(dir: &Path) {
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let times = fs::FileTimes::new().set_modified(long_ago);
    fs::File::open(dir)
        .and_then(|dir| dir.set_times(times))
        .expect("a directory of ours");
}

// ------------------------------------------------------------------------------------------------ scripts

enum Step {
    Say(Say),
    /// As a request; the answer must be this.
    Ask(Say, &'static str),
    /// The server says exactly this next.
    Hear(&'static str),
    /// As `Hear`, and its sentence holds this.
    HearText(&'static str, &'static str),
    /// The server has acknowledged so many bytes of the file.
    Acked(u64, u64),
    /// From here to the end of the script, no staging file may have been made.
    Unstaged,
}

use Step::{Acked, Ask, Hear, HearText, Unstaged};

fn say(say: Say) -> Step {
    Step::Say(say)
}

/// What is tried, by name, made afresh for each use.
type Table<T> = &'static [(&'static str, fn() -> T)];

type Script = (&'static str, Vec<Step>);

/// Plays a script; it ends with the client's FIN and the server's, unless the server has closed the lane.
/// Gives the names of the files that got `done` and were not there before.
async fn play(world: &World, name: &str, steps: &[Step]) -> Vec<String> {
    let socket = world.fixture.connect().await;
    let mut lane = RawLane::open(&socket).await;
    let (mut stored, closed) = steps_of(world, &mut lane, name, steps).await;
    if !closed {
        lane.channel.finish().await.unwrap_or_default();
        let end = lane.hear().await;
        assert_eq!(end.line, "end", "{name}: after the client's end: {end:?}");
    }
    stored.sort();
    stored
}

async fn steps_of(
    world: &World,
    lane: &mut RawLane,
    name: &str,
    steps: &[Step],
) -> (Vec<String>, bool) {
    let (mut stored, mut closed) = (Vec::new(), false);
    let mut aged = false;
    let staging = world.fixture.root().join(".udpack/staging");
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::Say(message) => lane.say(message).await,
            Ask(message, answer) => assert_eq!(lane.ask(message).await, *answer, "{name}"),
            Acked(id, bytes) => lane.acked(*id, *bytes).await,
            Unstaged => {
                age(&staging);
                aged = true;
            }
            Hear(expected) | HearText(expected, _) => {
                let heard = lane.hear().await;
                assert_eq!(heard.line, *expected, "{name}, step {number}: {heard:?}");
                if let HearText(_, text) = step {
                    assert!(heard.text.contains(text), "{name}: {}", heard.text);
                }
                fit_to_be_seen(world, name, &heard.text);
                closed |= expected.starts_with("closed");
                if let Some(rest) = heard.line.strip_prefix("done ") {
                    let path = rest.split(' ').nth(1).expect("a path").to_owned();
                    let bytes = world.fixture.stored(&path);
                    let hash = *blake3::hash(&bytes).as_bytes();
                    assert_eq!(heard.hash, Some(hash), "{name}: {path} holds other bytes");
                    if !heard.line.ends_with(" same") {
                        stored.push(path);
                    }
                }
            }
        }
    }
    if aged {
        let modified = fs::metadata(&staging)
            .expect("the staging directory")
            .mtime();
        assert_eq!(modified, 1_000_000_000, "{name}: a staging file was made");
    }
    (stored, closed)
}

/// A text of the server's tells nothing of the server and does no harm to a terminal.
fn fit_to_be_seen(world: &World, name: &str, text: &str) {
    let root = world.fixture.dir.path().to_string_lossy().into_owned();
    assert!(!text.contains(&root), "{name}: {text}");
    assert!(!text.contains(char::is_control), "{name}: {text:?}");
    assert!(text.len() <= 512, "{name}: {text}");
}

/// Plays every script in the same world and looks around after each.
async fn play_all(world: &mut World, scripts: &[Script]) {
    for (name, steps) in scripts {
        for stored in play(world, name, steps).await {
            world.remove(&stored);
        }
        world.well(name).await;
    }
}

/// A file that is sent as it should be.
fn whole(id: u64, path: &str, bytes: &[u8]) -> Vec<Step> {
    vec![
        say(file(id, path, bytes.len() as u64)),
        say(chunk(id, 0, bytes)),
        say(finish(id, bytes)),
    ]
}

/// Those steps, and then these.
fn then(mut first: Vec<Step>, second: Vec<Step>) -> Vec<Step> {
    first.extend(second);
    first
}

/// The next file on the lane is taken as if nothing had been.
fn next_file(id: u64) -> Vec<Step> {
    let done = match id {
        2 => "done 2 next 4",
        3 => "done 3 next 4",
        _ => panic!("no line for {id}"),
    };
    then(whole(id, "next", b"next"), vec![Hear(done)])
}

// --------------------------------------------------------------------------------------- 1. who comes when

fn order() -> Vec<Script> {
    let abcd = || vec![say(file(1, "x", 4)), say(chunk(1, 0, b"abcd"))];
    vec![
        (
            "chunk before file",
            vec![say(chunk(1, 0, b"a")), Hear("error 1 protocol_order")],
        ),
        (
            "finish before file",
            vec![say(finish(1, b"")), Hear("error 1 protocol_order")],
        ),
        (
            "cancel before file",
            vec![say(cancel(1)), Hear("error 1 protocol_order")],
        ),
        (
            "short chunk before file",
            vec![say(short_chunk(b"a")), Hear("error 0 protocol_order")],
        ),
        (
            "short finish before file",
            vec![say(short_finish()), Hear("error 0 protocol_order")],
        ),
        (
            "done before file",
            then(vec![say(("done", map([("id", 1.into())])))], next_file(2)),
        ),
        (
            "done of the short form",
            then(vec![say(("done", V::Nil))], next_file(2)),
        ),
        (
            "file while another is open",
            then(
                vec![
                    say(file(1, "x", 4)),
                    say(file(2, "y", 4)),
                    Hear("error 2 protocol_order"),
                    say(chunk(1, 0, b"abcd")),
                    say(finish(1, b"abcd")),
                    Hear("done 1 x 4"),
                ],
                next_file(3),
            ),
        ),
        (
            "the same file offered twice",
            vec![
                say(file(1, "x", 4)),
                say(file(1, "x", 4)),
                Hear("error 1 protocol_order"),
                say(chunk(1, 0, b"abcd")),
                say(finish(1, b"abcd")),
                Hear("done 1 x 4"),
            ],
        ),
        (
            "finish twice",
            then(
                abcd(),
                vec![
                    say(finish(1, b"abcd")),
                    Hear("done 1 x 4"),
                    say(finish(1, b"abcd")),
                    Hear("error 1 protocol_order"),
                ],
            ),
        ),
        (
            "chunk after done",
            then(
                abcd(),
                vec![
                    say(finish(1, b"abcd")),
                    Hear("done 1 x 4"),
                    say(chunk(1, 4, b"e")),
                    Hear("error 1 protocol_order"),
                ],
            ),
        ),
        (
            "cancel and done after done",
            then(
                abcd(),
                then(
                    vec![
                        say(finish(1, b"abcd")),
                        Hear("done 1 x 4"),
                        say(cancel(1)),
                        say(("done", map([("id", 1.into())]))),
                    ],
                    next_file(2),
                ),
            ),
        ),
        (
            "an id once more",
            then(
                abcd(),
                vec![
                    say(finish(1, b"abcd")),
                    Hear("done 1 x 4"),
                    say(file(1, "y", 4)),
                    Hear("error 1 protocol_order"),
                ],
            ),
        ),
        (
            "chunk, finish, cancel of a stranger",
            vec![
                say(file(5, "x", 4)),
                say(chunk(6, 0, b"a")),
                Hear("error 6 protocol_order"),
                say(finish(7, b"")),
                Hear("error 7 protocol_order"),
                say(cancel(8)),
                Hear("error 8 protocol_order"),
                say(chunk(5, 0, b"abcd")),
                say(finish(5, b"abcd")),
                Hear("done 5 x 4"),
            ],
        ),
        (
            "files behind each other without waiting",
            vec![
                say(file(1, "x", 1)),
                say(chunk(1, 0, b"a")),
                say(finish(1, b"a")),
                Hear("done 1 x 1"),
                say(file(2, "y", V::Nil)),
                say(finish(2, b"")),
                Hear("done 2 y 0"),
            ],
        ),
        (
            "what follows a refused name is dropped",
            then(
                vec![
                    say(file(1, "../x", 4)),
                    Hear("error 1 bad_name"),
                    say(chunk(1, 0, b"ab")),
                    say(chunk(1, 77, b"ab")),
                    say(finish(1, b"abcd")),
                ],
                next_file(2),
            ),
        ),
        (
            "what follows a refused name is dropped, malformed or not",
            then(
                vec![
                    say(file(1, "../x", 4)),
                    Hear("error 1 bad_name"),
                    say(chunk(1, 0, b"")),
                    say(("chunk", without(chunk(1, 0, b"a").1, "off"))),
                    say(("finish", map([("id", 1.into())]))),
                ],
                next_file(2),
            ),
        ),
        (
            "what follows a refused name is dropped until its finish",
            vec![
                say(file(1, "../x", 4)),
                Hear("error 1 bad_name"),
                say(finish(1, b"abcd")),
                say(finish(1, b"abcd")),
                Hear("error 1 protocol_order"),
            ],
        ),
        (
            "what follows a taken name is dropped",
            then(
                vec![
                    say(file(1, "taken", 4)),
                    Hear("error 1 exists"),
                    say(chunk(1, 0, b"ab")),
                    say(cancel(1)),
                ],
                next_file(2),
            ),
        ),
        (
            "a file again after its done was lost",
            then(whole(1, "taken", TAKEN), vec![Hear("done 1 taken 10 same")]),
        ),
        (
            "another file after a done that was lost",
            then(
                whole(1, "taken", b"abcdefghij"),
                vec![Hear("error 1 exists")],
            ),
        ),
    ]
}

// ------------------------------------------------------------------------------------ 2. offsets and sizes

fn offsets() -> Vec<Script> {
    let bad = |name, off: u64| -> Script {
        let steps = vec![
            say(file(1, "x", V::Nil)),
            say(chunk(1, 0, b"abcd")),
            say(chunk(1, off, b"efgh")),
            HearText("error 1 bad_offset", "expected offset 4"),
            say(chunk(1, 4, b"efgh")),
            say(finish(1, b"abcdefgh")),
        ];
        (name, then(steps, next_file(2)))
    };
    vec![
        bad("the same chunk twice", 0),
        bad("an overlap", 2),
        bad("a gap", 5),
        bad("an offset of 2^63", 1 << 63),
        bad("an offset at the end of numbers", u64::MAX),
        bad("an offset that overflows with its bytes", u64::MAX - 3),
        (
            "a first chunk that is not first",
            vec![
                say(file(1, "x", 8)),
                say(chunk(1, 4, b"efgh")),
                HearText("error 1 bad_offset", "expected offset 0"),
            ],
        ),
        (
            "out of place over a taken name",
            vec![
                say(file(1, "taken", 10)),
                say(chunk(1, 1, b"123")),
                HearText("error 1 bad_offset", "expected offset 0"),
            ],
        ),
        (
            "more bytes than declared, at once",
            then(
                vec![
                    say(file(1, "x", 4)),
                    say(chunk(1, 0, b"abcde")),
                    HearText("error 1 size_mismatch", "expected 4 bytes, got 5"),
                    say(finish(1, b"abcde")),
                ],
                next_file(2),
            ),
        ),
        (
            "more bytes than declared, at the end",
            then(
                vec![
                    say(file(1, "x", 4)),
                    say(chunk(1, 0, b"abc")),
                    say(chunk(1, 3, b"de")),
                    HearText("error 1 size_mismatch", "expected 4 bytes, got 5"),
                ],
                next_file(2),
            ),
        ),
        (
            "bytes where none were declared",
            vec![
                say(file(1, "x", 0)),
                say(chunk(1, 0, b"a")),
                HearText("error 1 size_mismatch", "expected 0 bytes, got 1"),
            ],
        ),
        (
            "finish too early",
            vec![
                say(file(1, "x", 10)),
                say(chunk(1, 0, b"abcd")),
                say(finish(1, b"abcdefghij")),
                HearText("error 1 size_mismatch", "expected 10 bytes, got 4"),
            ],
        ),
        (
            "finish too early that says so",
            vec![
                say(file(1, "x", 10)),
                say(chunk(1, 0, b"abcd")),
                say(finish(1, b"abcd")),
                HearText("error 1 size_mismatch", "expected 10 bytes, got 4"),
            ],
        ),
        (
            "finish without a byte",
            vec![
                say(file(1, "x", 10)),
                say(finish(1, b"")),
                HearText("error 1 size_mismatch", "expected 10 bytes, got 0"),
            ],
        ),
        (
            "finish with fewer than came",
            vec![
                say(file(1, "x", V::Nil)),
                say(chunk(1, 0, b"abcd")),
                say(finish(1, b"abc")),
                HearText("error 1 size_mismatch", "expected 3 bytes, got 4"),
            ],
        ),
        (
            "finish with more than came",
            vec![
                say(file(1, "x", V::Nil)),
                say(chunk(1, 0, b"abcd")),
                say(finish(1, b"abcde")),
                HearText("error 1 size_mismatch", "expected 5 bytes, got 4"),
            ],
        ),
        (
            "finish that tells 2^64-1",
            vec![
                say(file(1, "x", V::Nil)),
                say(chunk(1, 0, b"abcd")),
                say(("finish", with(finish(1, b"abcd").1, "size", u64::MAX))),
                Hear("error 1 size_mismatch"),
            ],
        ),
        (
            "finish too early over a taken name",
            vec![
                say(file(1, "taken", 10)),
                say(chunk(1, 0, b"0123")),
                say(finish(1, TAKEN)),
                HearText("error 1 size_mismatch", "expected 10 bytes, got 4"),
            ],
        ),
        (
            "finish too early that says so over a taken name",
            vec![
                say(file(1, "taken", 10)),
                say(chunk(1, 0, b"0123")),
                say(finish(1, b"0123")),
                HearText("error 1 size_mismatch", "expected 10 bytes, got 4"),
            ],
        ),
        (
            "fewer bytes than the taken name has, size not told",
            vec![
                say(file(1, "taken", V::Nil)),
                say(chunk(1, 0, b"0123")),
                say(finish(1, b"0123")),
                Hear("error 1 exists"),
            ],
        ),
        (
            "more bytes than the taken name has, size not told",
            vec![
                say(file(1, "taken", V::Nil)),
                say(chunk(1, 0, b"0123456789a")),
                say(finish(1, b"0123456789a")),
                Hear("error 1 exists"),
            ],
        ),
        (
            "an empty file",
            vec![
                say(file(1, "x", 0)),
                say(finish(1, b"")),
                Hear("done 1 x 0"),
            ],
        ),
        ("the largest chunk that a frame holds", {
            let bytes = noise(3, MIB + 65_000);
            then(
                vec![
                    say(file(1, "x", V::Nil)),
                    say(chunk(1, 0, &bytes)),
                    say(finish(1, &bytes)),
                ],
                vec![Hear("done 1 x 1113576")],
            )
        }),
        (
            "a file of 2^63 bytes",
            vec![
                Unstaged,
                say(file(1, "x", 1 << 63)),
                Hear("error 1 too_large"),
            ],
        ),
        (
            "a file of 2^64-1 bytes",
            vec![
                Unstaged,
                say(file(1, "x", u64::MAX)),
                HearText("error 1 too_large", "18446744073709551615"),
            ],
        ),
        (
            "a file that no disk has room for",
            vec![
                Unstaged,
                say(file(1, "x", (1 << 63) - 1)),
                Hear("error 1 no_space retry"),
            ],
        ),
    ]
}

// -------------------------------------------------------------------------------------- 3. types and hashes

/// A `file` whose field breaks its type: told by its id.
const FILE_FIELDS: Table<(&str, V)> = &[
    ("size negative", || ("size", V::Int(-1))),
    ("size least", || ("size", V::Int(i64::MIN))),
    ("size float", || ("size", V::Float(4.0))),
    ("size NaN", || ("size", V::Float(f64::NAN))),
    ("size str", || ("size", "4".into())),
    ("size bool", || ("size", true.into())),
    ("size bin", || ("size", b"\x04".into())),
    ("size array", || ("size", V::Array(vec![4.into()]))),
    ("size map", || ("size", V::Map(vec![]))),
    ("path bin", || ("path", b"x".into())),
    ("path nil", || ("path", V::Nil)),
    ("path int", || ("path", 1.into())),
    ("path array", || ("path", V::Array(vec!["x".into()]))),
    ("mtime str", || ("mtime", "now".into())),
    ("mtime float", || ("mtime", V::Float(1.5))),
    ("mtime beyond i64", || ("mtime", u64::MAX.into())),
    ("mode negative", || ("mode", V::Int(-1))),
    ("mode str", || ("mode", "0644".into())),
    ("if_exists unknown", || ("if_exists", "destroy".into())),
    ("if_exists empty", || ("if_exists", "".into())),
    ("if_exists in capitals", || ("if_exists", "SAME".into())),
    ("if_exists bin", || ("if_exists", b"same".into())),
    ("if_exists int", || ("if_exists", 0.into())),
    ("resume int", || ("resume", 1.into())),
    ("resume str", || ("resume", "true".into())),
];

/// A `chunk` that breaks its table, told by its id.
const CHUNK_FIELDS: Table<V> = &[
    ("chunk empty", || {
        with(chunk(1, 4, b"").1, "chunk", &b""[..])
    }),
    ("chunk str", || with(chunk(1, 4, b"").1, "chunk", "efgh")),
    ("chunk nil", || with(chunk(1, 4, b"").1, "chunk", V::Nil)),
    ("chunk missing", || without(chunk(1, 4, b"").1, "chunk")),
    ("chunk array", || {
        with(
            chunk(1, 4, b"").1,
            "chunk",
            V::Array(vec![1.into(), 2.into()]),
        )
    }),
    ("off missing", || without(chunk(1, 4, b"efgh").1, "off")),
    ("off nil", || with(chunk(1, 4, b"efgh").1, "off", V::Nil)),
    ("off negative", || {
        with(chunk(1, 4, b"efgh").1, "off", V::Int(-4))
    }),
    ("off float", || {
        with(chunk(1, 4, b"efgh").1, "off", V::Float(4.0))
    }),
    ("off str", || with(chunk(1, 4, b"efgh").1, "off", "4")),
];

/// A `finish` that breaks its table, told by its id.
const FINISH_FIELDS: Table<V> = &[
    ("hash of 31 bytes", || {
        with(finish(1, b"abcd").1, "hash", &[7; 31])
    }),
    ("hash of 33 bytes", || {
        with(finish(1, b"abcd").1, "hash", &[7; 33])
    }),
    ("hash of 64 bytes", || {
        with(finish(1, b"abcd").1, "hash", &[7; 64])
    }),
    ("hash empty", || with(finish(1, b"abcd").1, "hash", &[0; 0])),
    ("hash str", || {
        let text = blake3::hash(b"abcd").to_string();
        with(finish(1, b"abcd").1, "hash", text.as_str())
    }),
    ("hash nil", || with(finish(1, b"abcd").1, "hash", V::Nil)),
    ("hash array", || {
        with(finish(1, b"abcd").1, "hash", V::Array(vec![7.into(); 32]))
    }),
    ("hash missing", || without(finish(1, b"abcd").1, "hash")),
    ("size missing", || without(finish(1, b"abcd").1, "size")),
    ("size negative", || {
        with(finish(1, b"abcd").1, "size", V::Int(-4))
    }),
    ("size float", || {
        with(finish(1, b"abcd").1, "size", V::Float(4.0))
    }),
    ("nothing but the id", || map([("id", 1.into())])),
];

/// A message from which no id can be read: the lane closes with `bad_message`.
const NO_ID: Table<Say> = &[
    ("file without id", || {
        ("file", without(file(1, "x", 4).1, "id"))
    }),
    ("file with nil for id", || {
        ("file", with(file(1, "x", 4).1, "id", V::Nil))
    }),
    ("file with a negative id", || {
        ("file", with(file(1, "x", 4).1, "id", V::Int(-1)))
    }),
    ("file with a float for id", || {
        ("file", with(file(1, "x", 4).1, "id", V::Float(1.0)))
    }),
    ("file with a str for id", || {
        ("file", with(file(1, "x", 4).1, "id", "1"))
    }),
    ("file with a bin for id", || {
        ("file", with(file(1, "x", 4).1, "id", b"\x01"))
    }),
    ("file with two ids", || {
        ("file", twice(file(1, "x", 4).1, "id", 2))
    }),
    ("file with a bin for a key", || {
        (
            "file",
            V::Map(vec![
                (b"id".into(), V::Uint(1)),
                ("path".into(), "x".into()),
            ]),
        )
    }),
    ("file with too many keys", || {
        let keys = (0..40).map(|n| (V::Str(format!("k{n}")), V::Nil));
        ("file", V::Map(keys.collect()))
    }),
    ("file that is an array", || {
        ("file", V::Array(vec![1.into(), "x".into(), 4.into()]))
    }),
    ("file that is nil", || ("file", V::Nil)),
    ("file that is a str", || ("file", "x".into())),
    ("file that is a bin", || ("file", b"x".into())),
    ("file that is a map of nothing", || ("file", V::Map(vec![]))),
    ("chunk that is a bin", || ("chunk", b"abcd".into())),
    ("chunk that is nil", || ("chunk", V::Nil)),
    ("chunk with a str for id", || {
        ("chunk", with(chunk(1, 0, b"a").1, "id", "1"))
    }),
    ("put without id", || {
        ("put", without(put(1, "x", b"a").1, "id"))
    }),
    ("put that is nil", || ("put", V::Nil)),
    ("put that is a bin", || ("put", b"x".into())),
    ("finish without id", || {
        ("finish", without(finish(1, b"").1, "id"))
    }),
    ("finish that is an array", || ("finish", V::Array(vec![]))),
    ("finish that is a number", || ("finish", 1.into())),
    ("cancel without id", || ("cancel", V::Map(vec![]))),
    ("cancel that is nil", || ("cancel", V::Nil)),
    ("cancel with a str for id", || {
        ("cancel", map([("id", "1".into())]))
    }),
    ("short file with a number for its name", || {
        ("file", map([("filename", 1.into())]))
    }),
    ("short file with a negative size", || {
        short_file("x", V::Int(-1))
    }),
    ("short file with a str for its size", || {
        short_file("x", "4")
    }),
    ("done without id", || ("done", V::Map(vec![]))),
    ("done with a negative id", || {
        ("done", map([("id", V::Int(-1))]))
    }),
    ("done that is a bin", || ("done", b"x".into())),
    ("ack without id", || ("ack", map([("recv", 0.into())]))),
    ("ack with a negative id", || {
        ("ack", map([("id", V::Int(-1)), ("recv", 0.into())]))
    }),
    ("ack that is nil", || ("ack", V::Nil)),
];

/// What breaks its table, and tells its id all the same.
const READABLE_ID: Table<Say> = &[
    ("file with two paths", || {
        ("file", twice(file(1, "x", 4).1, "path", "y"))
    }),
    ("file with an unknown key twice", || {
        (
            "file",
            twice(twice(file(1, "x", 4).1, "color", 1), "color", 1),
        )
    }),
    ("file with a number for a key", || {
        (
            "file",
            V::Map(vec![(V::Uint(1), V::Uint(1)), ("id".into(), 1.into())]),
        )
    }),
    ("chunk with two chunks", || {
        ("chunk", twice(chunk(1, 0, b"a").1, "chunk", b"b"))
    }),
    ("put with two bodies", || {
        ("put", twice(put(1, "x", b"a").1, "data", b"b"))
    }),
    ("finish with two hashes", || {
        ("finish", twice(finish(1, b"").1, "hash", &[7; 32]))
    }),
    ("chunk with its offset last", || {
        let (event, data) = chunk(1, 0, b"a");
        (event, with(without(data, "off"), "off", 0))
    }),
    ("chunk with an unknown key last", || {
        ("chunk", with(chunk(1, 0, b"a").1, "color", V::Nil))
    }),
    ("ack without a count", || ("ack", map([("id", 1.into())]))),
    ("ack with a negative count", || {
        ("ack", map([("id", 1.into()), ("recv", V::Int(-1))]))
    }),
    ("get with two paths", || {
        ("get", twice(get(1, "x").1, "path", "y"))
    }),
    ("cancel with a number for keep", || {
        ("cancel", with(cancel(1).1, "keep", 1))
    }),
];

/// Broken fields of a `put`, each by itself.
const PUT_FIELDS: Table<V> = &[
    ("put without a hash", || {
        without(put(1, "x", b"abcd").1, "hash")
    }),
    ("put with a short hash", || {
        with(put(1, "x", b"abcd").1, "hash", &[7; 31])
    }),
    ("put without its bytes", || {
        without(put(1, "x", b"abcd").1, "data")
    }),
    ("put with text for bytes", || {
        with(put(1, "x", b"abcd").1, "data", "abcd")
    }),
    ("put without a path", || {
        without(put(1, "x", b"abcd").1, "path")
    }),
    ("put with a number for a path", || {
        with(put(1, "x", b"abcd").1, "path", 1)
    }),
    ("put with half a run", || {
        with(put(1, "x", b"abcd").1, "run", &[7; 8])
    }),
    ("put with an unknown policy", || {
        with(put(1, "x", b"abcd").1, "if_exists", "merge")
    }),
];

/// Files that come whole.
fn puts() -> Vec<Script> {
    let mut scripts: Vec<Script> = Vec::new();
    for (name, bad) in PUT_FIELDS {
        let steps = vec![
            say(("put", bad())),
            Hear("error 1 bad_message"),
            say(put(2, "x", b"abcd")),
            Hear("done 2 x 4"),
        ];
        scripts.push((name, then(steps, next_file(3))));
    }
    let policy = |id, path, bytes: &[u8], word: &str| {
        say(("put", with(put(id, path, bytes).1, "if_exists", word)))
    };
    scripts.extend([
        (
            "put, also of nothing",
            then(
                vec![
                    say(put(1, "x", b"")),
                    Hear("done 1 x 0"),
                    say(put(2, "y", b"abcd")),
                    Hear("done 2 y 4"),
                ],
                next_file(3),
            ),
        ),
        (
            "put with the hash of something else",
            then(
                vec![
                    say(("put", with(put(1, "x", b"abcd").1, "hash", &[7; 32]))),
                    Hear("error 1 hash_mismatch retry"),
                    say(chunk(1, 0, b"abcd")),
                    Hear("error 1 protocol_order"),
                    say(finish(1, b"abcd")),
                    Hear("error 1 protocol_order"),
                ],
                next_file(2),
            ),
        ),
        (
            "put where the name is taken",
            vec![
                say(put(1, "taken", TAKEN)),
                Hear("done 1 taken 10 same"),
                say(put(2, "taken", b"abcdefghij")),
                Hear("error 2 exists"),
                say(put(3, "taken", b"abc")),
                Hear("error 3 exists"),
                say(("put", with(put(4, "taken", TAKEN).1, "hash", &[7; 32]))),
                Hear("error 4 hash_mismatch retry"),
                policy(5, "taken", TAKEN, "error"),
                Hear("error 5 exists"),
                policy(6, "taken", b"abc", "skip"),
                Hear("done 6 taken 10 same"),
                policy(7, "taken", b"abc", "overwrite"),
                Hear("error 7 forbidden"),
                policy(8, "x", b"abc", "rename"),
                Hear("error 8 forbidden"),
            ],
        ),
        (
            "put with a bad name",
            then(
                vec![
                    say(put(1, "../x", b"abcd")),
                    Hear("error 1 bad_name"),
                    say(put(2, "taken/x", b"abcd")),
                    Hear("error 2 exists"),
                ],
                next_file(3),
            ),
        ),
        (
            "put twice under one id, and under a lower one",
            then(
                vec![
                    say(put(2, "x", b"abcd")),
                    Hear("done 2 x 4"),
                    say(put(2, "y", b"abcd")),
                    Hear("error 2 protocol_order"),
                    say(put(1, "y", b"abcd")),
                    Hear("error 1 protocol_order"),
                ],
                next_file(3),
            ),
        ),
        (
            "put while a file is open, which goes on",
            then(
                vec![
                    say(file(1, "x", 4)),
                    say(chunk(1, 0, b"ab")),
                    say(put(2, "y", b"abcd")),
                    Hear("error 2 protocol_order"),
                    say(chunk(1, 2, b"cd")),
                    say(finish(1, b"abcd")),
                    Hear("done 1 x 4"),
                ],
                next_file(3),
            ),
        ),
        (
            "put ends the dropping of the file before",
            vec![
                say(file(1, "x", 4)),
                say(chunk(1, 1, b"ab")),
                Hear("error 1 bad_offset"),
                say(put(2, "y", b"abcd")),
                Hear("done 2 y 4"),
                say(chunk(1, 1, b"ab")),
                Hear("error 1 protocol_order"),
            ],
        ),
        (
            "put does not resume, whatever it says, and takes its size from its bytes",
            vec![
                say((
                    "put",
                    with(with(put(1, "x", b"abcd").1, "resume", true), "size", 9),
                )),
                Hear("done 1 x 4"),
                say(cancel(1)),
                Ask(put(2, "y", b"abcd"), "no_handler"),
            ],
        ),
    ]);
    scripts
}

fn types() -> Vec<Script> {
    let mut scripts: Vec<Script> = Vec::new();
    for (name, field) in FILE_FIELDS {
        let (key, value) = field();
        let bad = ("file", with(file(1, "x", 4).1, key, value));
        let steps = vec![Unstaged, say(bad), Hear("error 1 bad_message")];
        scripts.push((name, steps));
    }
    for (name, bad) in CHUNK_FIELDS {
        let steps = vec![
            say(file(1, "x", 8)),
            say(chunk(1, 0, b"abcd")),
            say(("chunk", bad())),
            Hear("error 1 bad_message"),
            say(chunk(1, 4, b"efgh")),
            say(finish(1, b"abcdefgh")),
        ];
        scripts.push((name, then(steps, next_file(2))));
    }
    for (name, bad) in FINISH_FIELDS {
        let steps = vec![
            say(file(1, "x", 4)),
            say(chunk(1, 0, b"abcd")),
            say(("finish", bad())),
            Hear("error 1 bad_message"),
        ];
        scripts.push((name, then(steps, next_file(2))));
    }
    for (name, bad) in NO_ID {
        // With a file open as well: its bytes must go.
        let steps = vec![
            say(file(0, "x", 4)),
            say(chunk(0, 0, b"ab")),
            say(bad()),
            Hear("closed bad_message"),
        ];
        scripts.push((name, steps));
    }
    for (name, bad) in READABLE_ID {
        // The open file is another, and goes on.
        let steps = vec![
            say(file(0, "x", 4)),
            say(chunk(0, 0, b"ab")),
            say(bad()),
            Hear("error 1 bad_message"),
            say(chunk(0, 2, b"cd")),
            say(finish(0, b"abcd")),
            Hear("done 0 x 4"),
        ];
        scripts.push((name, steps));
    }
    let wrong = |bytes: &[u8]| ("finish", with(finish(1, bytes).1, "hash", &[7; 32]));
    scripts.extend([
        (
            "wrong hash",
            then(
                vec![
                    say(file(1, "x", 4)),
                    say(chunk(1, 0, b"abcd")),
                    say(wrong(b"abcd")),
                    Hear("error 1 hash_mismatch retry"),
                ],
                next_file(2),
            ),
        ),
        (
            "wrong hash of nothing",
            vec![
                say(file(1, "x", 0)),
                say(wrong(b"")),
                Hear("error 1 hash_mismatch retry"),
            ],
        ),
        (
            "wrong hash over a taken name",
            vec![
                say(file(1, "taken", 10)),
                say(chunk(1, 0, TAKEN)),
                say(wrong(TAKEN)),
                Hear("error 1 hash_mismatch retry"),
            ],
        ),
        (
            "bytes that are not those of the hash",
            vec![
                say(file(1, "x", 4)),
                say(chunk(1, 0, b"abcD")),
                say(finish(1, b"abcd")),
                Hear("error 1 hash_mismatch retry"),
            ],
        ),
        (
            "unknown keys are no offence",
            vec![
                say((
                    "file",
                    with(file(1, "x", 4).1, "color", V::Array(vec![V::Map(vec![])])),
                )),
                say((
                    "chunk",
                    map([
                        ("color", V::Nil),
                        ("id", 1.into()),
                        ("off", 0.into()),
                        ("chunk", b"abcd".into()),
                    ]),
                )),
                say(("finish", with(finish(1, b"abcd").1, "color", 1))),
                Hear("done 1 x 4"),
            ],
        ),
        (
            "a malformed file does not end the open one",
            vec![
                say(file(1, "x", 4)),
                say(("file", with(file(2, "y", 4).1, "size", "4"))),
                Hear("error 2 bad_message"),
                say(chunk(1, 0, b"abcd")),
                say(finish(1, b"abcd")),
                Hear("done 1 x 4"),
            ],
        ),
        (
            "unknown events are dropped, or refused when they ask",
            then(
                vec![
                    say(("rewind", 1.into())),
                    say(("ack", map([("id", 1.into()), ("recv", 0.into())]))),
                    say(("error", V::Nil)),
                    Ask(("rewind", V::Nil), "no_handler"),
                    Ask(("ready", V::Nil), "no_handler"),
                ],
                next_file(2),
            ),
        ),
        (
            "a file that is asked for as a request is answered, not begun",
            then(
                vec![
                    Unstaged,
                    Ask(file(1, "x", 4), "no_handler"),
                    Ask(chunk(1, 0, b"abcd"), "no_handler"),
                    Ask(finish(1, b"abcd"), "no_handler"),
                    Ask(cancel(1), "no_handler"),
                    Ask(("done", V::Nil), "no_handler"),
                ],
                vec![],
            ),
        ),
    ]);
    scripts
}

// ------------------------------------------------------------------------------ 4. cancel, the short form

fn cancels() -> Vec<Script> {
    let resumed = |path: &str, size: u64| ("file", with(file(1, path, size).1, "resume", true));
    vec![
        (
            "cancel before the first chunk",
            then(
                vec![
                    say(file(1, "x", 4)),
                    say(cancel(1)),
                    Hear("error 1 cancelled"),
                ],
                next_file(2),
            ),
        ),
        (
            "cancel in the middle",
            then(
                vec![
                    say(file(1, "x", 8)),
                    say(chunk(1, 0, b"abcd")),
                    Acked(1, 4),
                    say(cancel(1)),
                    Hear("error 1 cancelled"),
                ],
                next_file(2),
            ),
        ),
        (
            "cancel behind the last byte",
            vec![
                say(file(1, "x", 4)),
                say(chunk(1, 0, b"abcd")),
                say(cancel(1)),
                Hear("error 1 cancelled"),
            ],
        ),
        (
            "cancel twice, then a chunk and a finish",
            vec![
                say(file(1, "x", 4)),
                say(cancel(1)),
                Hear("error 1 cancelled"),
                say(cancel(1)),
                say(chunk(1, 0, b"abcd")),
                Hear("error 1 protocol_order"),
                say(finish(1, b"abcd")),
                Hear("error 1 protocol_order"),
            ],
        ),
        (
            "cancel after finish is too late",
            then(
                whole(1, "x", b"abcd"),
                vec![say(cancel(1)), Hear("done 1 x 4")],
            ),
        ),
        (
            "cancel after ready",
            then(
                vec![
                    say(resumed("x", 4)),
                    Hear("ready 1 0"),
                    say(cancel(1)),
                    Hear("error 1 cancelled"),
                ],
                next_file(2),
            ),
        ),
        (
            "cancel of a comparison",
            vec![
                say(resumed("taken", 10)),
                Hear("ready 1 1"),
                say(cancel(1)),
                Hear("error 1 cancelled"),
            ],
        ),
        (
            "cancel after an error",
            then(
                vec![
                    say(file(1, "taken", 4)),
                    Hear("error 1 exists"),
                    say(cancel(1)),
                    say(cancel(1)),
                ],
                next_file(2),
            ),
        ),
        (
            "a hash told back is proof",
            vec![
                say(resumed("taken", 10)),
                Hear("ready 1 1"),
                say(finish(1, TAKEN)),
                Hear("done 1 taken 10 same"),
            ],
        ),
        (
            "another hash is not",
            vec![
                say(resumed("taken", 10)),
                Hear("ready 1 1"),
                say(finish(1, b"abcdefghij")),
                Hear("error 1 exists"),
            ],
        ),
        (
            "the right hash with another size is not",
            vec![
                say(resumed("taken", 10)),
                Hear("ready 1 1"),
                say(("finish", with(finish(1, TAKEN).1, "size", 9))),
                Hear("error 1 exists"),
            ],
        ),
        (
            "proof without having asked is none",
            vec![
                say(file(1, "taken", 10)),
                say(finish(1, TAKEN)),
                HearText("error 1 size_mismatch", "expected 10 bytes, got 0"),
            ],
        ),
        (
            "the whole file in spite of what is there",
            vec![
                say(resumed("taken", 10)),
                Hear("ready 1 1"),
                say(chunk(1, 0, TAKEN)),
                say(finish(1, TAKEN)),
                Hear("done 1 taken 10 same"),
            ],
        ),
        (
            "skip has its answer at once, what follows is dropped",
            then(
                vec![
                    say(("file", with(file(1, "taken", 3).1, "if_exists", "skip"))),
                    Hear("done 1 taken 10 same"),
                    say(chunk(1, 0, b"abc")),
                    say(finish(1, b"abc")),
                ],
                next_file(2),
            ),
        ),
        (
            "overwrite is not granted",
            vec![
                Unstaged,
                say((
                    "file",
                    with(file(1, "taken", 3).1, "if_exists", "overwrite"),
                )),
                Hear("error 1 forbidden"),
            ],
        ),
        (
            "rename is not granted, even for a free name",
            vec![
                Unstaged,
                say(("file", with(file(1, "x", 3).1, "if_exists", "rename"))),
                Hear("error 1 forbidden"),
            ],
        ),
    ]
}

fn short_form() -> Vec<Script> {
    let start = || vec![say(short_file("x", 4)), say(short_chunk(b"ab"))];
    vec![
        (
            "the short form",
            then(
                start(),
                vec![
                    say(short_chunk(b"cd")),
                    say(short_finish()),
                    Hear("done 0 x 4"),
                    say(short_file("y", V::Nil)),
                    say(short_finish()),
                    Hear("done 0 y 0"),
                ],
            ),
        ),
        (
            "the short form without a size",
            vec![
                say(("file", map([("filename", "x".into())]))),
                say(short_chunk(b"abc")),
                say(("finish", V::Map(vec![]))),
                Hear("done 0 x 3"),
            ],
        ),
        (
            "short, finish too early",
            then(
                start(),
                vec![
                    say(short_finish()),
                    HearText("error 0 size_mismatch", "expected 4 bytes, got 2"),
                ],
            ),
        ),
        (
            "short, too much",
            then(
                start(),
                vec![
                    say(short_chunk(b"cde")),
                    HearText("error 0 size_mismatch", "expected 4 bytes, got 5"),
                    say(short_finish()),
                    say(short_file("y", 1)),
                    say(short_chunk(b"a")),
                    say(short_finish()),
                    Hear("done 0 y 1"),
                ],
            ),
        ),
        (
            "short, an empty chunk",
            then(
                start(),
                vec![say(short_chunk(b"")), Hear("error 0 bad_message")],
            ),
        ),
        (
            "short, a str for a chunk",
            then(
                start(),
                vec![
                    say(("chunk", map([("chunk", "cd".into())]))),
                    Hear("error 0 bad_message"),
                ],
            ),
        ),
        (
            "short, a file while one is open",
            then(
                start(),
                vec![
                    say(short_file("y", 1)),
                    Hear("error 0 protocol_order"),
                    say(short_chunk(b"cd")),
                    say(short_finish()),
                    Hear("done 0 x 4"),
                ],
            ),
        ),
        (
            "short, a bad name",
            vec![
                say(short_file("../x", 1)),
                Hear("error 0 bad_name"),
                say(short_chunk(b"a")),
                say(short_finish()),
            ],
        ),
        (
            "short, taken by equal bytes",
            vec![
                say(short_file("taken", 10)),
                say(short_chunk(TAKEN)),
                say(short_finish()),
                Hear("done 0 taken 10 same"),
            ],
        ),
        (
            "short, taken by other bytes",
            vec![
                say(short_file("taken", 10)),
                say(short_chunk(b"abcdefghij")),
                say(short_finish()),
                Hear("error 0 exists"),
            ],
        ),
        (
            "short, its policy is always same",
            vec![
                say(("file", with(short_file("taken", 3).1, "if_exists", "skip"))),
                Hear("error 0 exists"),
            ],
        ),
        (
            "short, too large",
            vec![
                Unstaged,
                say(short_file("x", u64::MAX)),
                Hear("error 0 too_large"),
            ],
        ),
        (
            "short, cancelled",
            then(start(), vec![say(cancel(0)), Hear("error 0 cancelled")]),
        ),
        (
            "path and filename",
            vec![
                Unstaged,
                say((
                    "file",
                    map([("path", "x".into()), ("filename", "x".into())]),
                )),
                Hear("error 0 bad_message"),
            ],
        ),
        (
            "path, filename and id",
            vec![
                Unstaged,
                say(("file", with(file(7, "x", 4).1, "filename", "x"))),
                Hear("error 7 bad_message"),
            ],
        ),
        (
            "filename and id",
            vec![
                Unstaged,
                say(("file", map([("id", 7.into()), ("filename", "x".into())]))),
                Hear("error 7 bad_message"),
            ],
        ),
        (
            "a short file with long chunks",
            then(
                start(),
                vec![
                    say(chunk(0, 2, b"cd")),
                    Hear("error 0 bad_message"),
                    say(short_finish()),
                ],
            ),
        ),
        (
            "a short file with a long finish",
            then(
                start(),
                vec![
                    say(short_chunk(b"cd")),
                    say(finish(0, b"abcd")),
                    Hear("error 0 bad_message"),
                ],
            ),
        ),
        (
            "a long file with short chunks",
            vec![
                say(file(0, "x", 4)),
                say(short_chunk(b"abcd")),
                Hear("error 0 bad_message"),
            ],
        ),
        (
            "a long file with a short finish",
            vec![
                say(file(0, "x", 4)),
                say(chunk(0, 0, b"abcd")),
                say(short_finish()),
                Hear("error 0 bad_message"),
            ],
        ),
        (
            "a short chunk beside a long file",
            vec![
                say(file(1, "x", 4)),
                say(short_chunk(b"abcd")),
                Hear("error 0 protocol_order"),
                say(chunk(1, 0, b"abcd")),
                say(finish(1, b"abcd")),
                Hear("done 1 x 4"),
            ],
        ),
        (
            "an offset without an id",
            vec![
                say(file(1, "x", 4)),
                say(("chunk", without(chunk(1, 0, b"abcd").1, "id"))),
                Hear("error 0 bad_message"),
                say(chunk(1, 0, b"abcd")),
                say(finish(1, b"abcd")),
                Hear("done 1 x 4"),
            ],
        ),
    ]
}

#[tokio::test]
async fn messages_that_break_the_order_of_a_lane_are_answered_word_for_word() {
    if elsewhere("messages_that_break_the_order_of_a_lane_are_answered_word_for_word").await {
        return;
    }
    bounded(async {
        let mut world = World::new(StoreConfig::default(), ReceiverConfig::default()).await;
        play_all(&mut world, &order()).await;
        play_all(&mut world, &cancels()).await;
    })
    .await;
}

#[tokio::test]
async fn offsets_and_sizes_that_do_not_add_up_are_answered_word_for_word() {
    if elsewhere("offsets_and_sizes_that_do_not_add_up_are_answered_word_for_word").await {
        return;
    }
    bounded(async {
        let mut world = World::new(StoreConfig::default(), ReceiverConfig::default()).await;
        play_all(&mut world, &offsets()).await;
    })
    .await;
}

#[tokio::test]
async fn fields_of_the_wrong_type_are_answered_word_for_word() {
    if elsewhere("fields_of_the_wrong_type_are_answered_word_for_word").await {
        return;
    }
    bounded(async {
        let mut world = World::new(StoreConfig::default(), ReceiverConfig::default()).await;
        play_all(&mut world, &types()).await;
    })
    .await;
}

#[tokio::test]
async fn files_that_come_whole_are_answered_word_for_word() {
    if elsewhere("files_that_come_whole_are_answered_word_for_word").await {
        return;
    }
    bounded(async {
        let mut world = World::new(StoreConfig::default(), ReceiverConfig::default()).await;
        play_all(&mut world, &puts()).await;
    })
    .await;
}

#[tokio::test]
async fn files_that_come_whole_keep_to_the_limits_of_the_store() {
    bounded(async {
        let store = StoreConfig {
            max_file: Some(8),
            quota: Some(12),
            ..StoreConfig::default()
        };
        let fixture = Fixture::with(store, ReceiverConfig::default()).await;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        for (id, path, len, expected) in [
            (1, "a", 9, "error 1 too_large"),
            (2, "a", 8, "done 2 a 8"),
            (3, "b", 5, "error 3 quota retry"),
            (4, "a", 8, "done 4 a 8 same"),
            (5, "b", 4, "done 5 b 4"),
            (6, "c", 1, "error 6 quota retry"),
        ] {
            lane.say(&put(id, path, &noise(1, len))).await;
            assert_eq!(lane.hear().await.line, expected);
        }
        assert_eq!(fixture.visible(), ["a", "b"]);
        assert_eq!((fixture.store.usage().open, fixture.staged()), (0, 0));
    })
    .await;
}

#[tokio::test]
async fn the_short_form_is_taken_and_never_mixed() {
    if elsewhere("the_short_form_is_taken_and_never_mixed").await {
        return;
    }
    bounded(async {
        let mut world = World::new(StoreConfig::default(), ReceiverConfig::default()).await;
        play_all(&mut world, &short_form()).await;
    })
    .await;
}

// -------------------------------------------------------------------------------------- 5. ends of a lane

#[derive(Debug, Clone, Copy, PartialEq)]
enum Leave {
    /// FIN, then reads to the end.
    Finish,
    /// FIN and STOP_SENDING, without a word.
    Drop,
    /// `$close` with a code.
    Close,
    /// CONNECTION_CLOSE.
    CloseSocket,
    /// CONNECTION_CLOSE with whatever is queued lost.
    Abort,
}

/// Where the client is when it leaves, and what it says and hears until then.
const STATES: Table<Vec<Step>> = &[
    ("nothing said", Vec::new),
    ("file offered", || vec![say(file(1, "x", 8))]),
    ("file begun", || {
        vec![
            say(("file", with(file(1, "x", 8).1, "resume", true))),
            Hear("ready 1 0"),
        ]
    }),
    ("first half sent", || {
        vec![say(file(1, "x", 8)), say(chunk(1, 0, b"abcd"))]
    }),
    ("first half stored", || {
        vec![say(file(1, "x", 8)), say(chunk(1, 0, b"abcd")), Acked(1, 4)]
    }),
    ("everything but finish stored", || {
        vec![say(file(1, "x", 4)), say(chunk(1, 0, b"abcd")), Acked(1, 4)]
    }),
    ("much on its way", || {
        let bytes = noise(1, MIB);
        let mut steps = vec![say(file(1, "x", V::Nil))];
        steps.extend((0..3).map(|n| say(chunk(1, n * MIB as u64, &bytes))));
        steps
    }),
    ("finish sent", || whole(1, "x", b"abcd")),
    ("finish sent, next file open", || {
        then(whole(1, "x", b"abcd"), vec![say(file(2, "y", 4))])
    }),
    ("comparing", || {
        vec![
            say(("file", with(file(1, "taken", 10).1, "resume", true))),
            Hear("ready 1 1"),
        ]
    }),
    ("ended by an error, rest on its way", || {
        vec![
            say(file(1, "taken", 4)),
            Hear("error 1 exists"),
            say(chunk(1, 0, b"ab")),
        ]
    }),
    ("done", || {
        then(whole(1, "x", b"abcd"), vec![Hear("done 1 x 4")])
    }),
];

#[tokio::test]
async fn a_lane_may_end_in_any_way_at_any_time() {
    if elsewhere("a_lane_may_end_in_any_way_at_any_time").await {
        return;
    }
    bounded(async {
        let mut world = World::new(StoreConfig::default(), ReceiverConfig::default()).await;
        for (state, steps) in STATES {
            for leave in [
                Leave::Finish,
                Leave::Drop,
                Leave::Close,
                Leave::CloseSocket,
                Leave::Abort,
            ] {
                let name = format!("{state}, then {leave:?}");
                let socket = world.fixture.connect().await;
                let mut lane = RawLane::open(&socket).await;
                steps_of(&world, &mut lane, &name, &steps()).await;
                match leave {
                    Leave::Finish => {
                        lane.channel.finish().await.expect("the server reads on");
                        let mut heard = Vec::new();
                        while heard.last().is_none_or(|line| line != "end") {
                            heard.push(lane.hear().await.line);
                        }
                        // What was due is still said; what was open is dropped without a word.
                        let due = state.starts_with("finish sent");
                        let expected = if due {
                            &["done 1 x 4", "end"][..]
                        } else {
                            &["end"][..]
                        };
                        assert_eq!(heard, expected, "{name}");
                    }
                    Leave::Drop => {
                        let channel = lane.channel.clone();
                        drop(lane);
                        drop(channel);
                    }
                    Leave::Close => drop(lane.channel.close(CloseCode::new(0x1001), "enough")),
                    Leave::CloseSocket => {
                        socket.close(CloseCode::NORMAL, "bye").await;
                    }
                    Leave::Abort => socket.abort(CloseCode::new(0x1002), "cut"),
                }
                // A file whose `finish` was on its way may be stored, whole; nothing else may.
                if state.starts_with("finish sent") || *state == "done" {
                    world.lanes_are_over(&name).await;
                    gone_or_whole(&world, &name, *state == "done" || leave == Leave::Finish);
                }
                world.well(&name).await;
                drop(socket);
            }
        }
    })
    .await;
}

/// `x` is stored whole where `done` was said, and whole or not at all elsewhere. Removes it.
fn gone_or_whole(world: &World, name: &str, certain: bool) {
    match fs::read(world.fixture.root().join("x")) {
        Ok(bytes) => {
            assert_eq!(bytes, b"abcd", "{name}");
            world.remove("x");
        }
        Err(_) => assert!(
            !certain,
            "{name}: `done` was said, and the file is not there"
        ),
    }
}

// ----------------------------------------------------------------------------------------------- 6. limits

#[tokio::test]
async fn what_is_too_large_is_refused_before_a_byte_is_stored() {
    if elsewhere("what_is_too_large_is_refused_before_a_byte_is_stored").await {
        return;
    }
    bounded(async {
        let store = StoreConfig {
            max_file: Some(2 * MIB as u64),
            ..StoreConfig::default()
        };
        let mut world = World::new(store, ReceiverConfig::default()).await;
        let zeros = vec![0; MIB];
        let endless = |next: Vec<Step>| {
            let mut steps = vec![say(file(1, "x", V::Nil))];
            steps.extend((0..3).map(|n| say(chunk(1, n * MIB as u64, &zeros))));
            steps.push(HearText("error 1 too_large", "limit 2097152"));
            steps.extend((3..6).map(|n| say(chunk(1, n * MIB as u64, &zeros))));
            then(steps, next)
        };
        let short_endless = {
            let mut steps = vec![say(("file", map([("filename", "x".into())])))];
            steps.extend((0..3).map(|_| say(short_chunk(&zeros))));
            steps.push(Hear("error 0 too_large"));
            steps
        };
        let scripts = [
            (
                "one byte too many",
                vec![
                    Unstaged,
                    say(file(1, "x", 2 * MIB as u64 + 1)),
                    HearText("error 1 too_large", "2097153 bytes, limit 2097152"),
                ],
            ),
            (
                "ten gigabytes of zeros, declared",
                then(
                    vec![
                        Unstaged,
                        say(file(1, "x", 10 << 30)),
                        say(chunk(1, 0, &zeros)),
                        say(chunk(1, MIB as u64, &zeros)),
                        Hear("error 1 too_large"),
                        say(chunk(1, 2 * MIB as u64, &zeros)),
                    ],
                    vec![],
                ),
            ),
            ("zeros without end, not declared", endless(next_file(2))),
            ("zeros without end, short form", short_endless),
            ("zeros without end over a taken name", {
                let mut steps = vec![say(file(1, "taken", V::Nil))];
                steps.extend((0..3).map(|n| say(chunk(1, n * MIB as u64, &zeros))));
                steps.push(Hear("error 1 exists"));
                then(steps, next_file(2))
            }),
            ("as large as allowed", {
                let bytes = noise(1, 2 * MIB);
                vec![
                    say(file(1, "x", 2 * MIB as u64)),
                    say(chunk(1, 0, &bytes[..MIB])),
                    say(chunk(1, MIB as u64, &bytes[MIB..])),
                    say(finish(1, &bytes)),
                    Hear("done 1 x 2097152"),
                ]
            }),
        ];
        // The scripts themselves hold megabytes.
        world.this_is_normal();
        play_all(&mut world, &scripts).await;
    })
    .await;
}

#[tokio::test]
async fn the_quota_counts_what_is_promised_and_is_given_back() {
    if elsewhere("the_quota_counts_what_is_promised_and_is_given_back").await {
        return;
    }
    bounded(async {
        // Honest uploads are removed behind the store's back and go on counting: room for all of them.
        let quota = 64 << 20;
        let store = StoreConfig {
            quota: Some(quota),
            ..StoreConfig::default()
        };
        let mut world = World::new(store, ReceiverConfig::default()).await;
        let scripts = [
            (
                "more than the quota",
                vec![
                    Unstaged,
                    say(file(1, "x", quota + 1)),
                    Hear("error 1 quota retry"),
                ],
            ),
            (
                "more than is left of it",
                vec![
                    Unstaged,
                    say(file(1, "x", quota)),
                    Hear("error 1 quota retry"),
                ],
            ),
        ];
        play_all(&mut world, &scripts).await;

        // The first time may take what is kept for good; after that nothing may be added.
        for round in 0..3 {
            a_promise(&world, quota).await;
            if round == 0 {
                world.lanes_are_over("a promise").await;
                world.this_is_normal();
            }
            world.well("a promise").await;
        }
    })
    .await;
}

/// Promises are counted, kept and given back.
async fn a_promise(world: &World, quota: u64) {
    // Half of it is promised to a file of which nothing came: it is not there for others.
    let name = "a promise";
    let greedy = world.fixture.connect().await;
    let mut promised = RawLane::open(&greedy).await;
    let resumed = |id, name, size: u64| ("file", with(file(id, name, size).1, "resume", true));
    promised.say(&resumed(1, "x", quota / 2)).await;
    assert_eq!(promised.hear().await.line, "ready 1 0");
    let mut other = RawLane::open(&greedy).await;
    other.say(&resumed(1, "z", quota / 2)).await;
    assert_eq!(other.hear().await.line, "error 1 quota retry", "{name}");
    // Bytes that were not declared are counted as they come.
    let zeros = vec![0; MIB];
    other.say(&file(2, "y", V::Nil)).await;
    for n in 0..quota / 2 / MIB as u64 {
        other.say(&chunk(2, n * MIB as u64, &zeros)).await;
    }
    assert_eq!(other.hear().await.line, "error 2 quota retry", "{name}");
    promised.say(&cancel(1)).await;
    assert_eq!(promised.hear().await.line, "error 1 cancelled");
    other.say(&resumed(3, "x", quota / 2)).await;
    assert_eq!(
        other.hear().await.line,
        "ready 3 0",
        "what was promised is free again"
    );
    drop((promised, other));
    greedy.close(CloseCode::NORMAL, "").await;
}

#[tokio::test]
async fn space_that_must_stay_free_is_refused_before_a_byte_is_stored() {
    if elsewhere("space_that_must_stay_free_is_refused_before_a_byte_is_stored").await {
        return;
    }
    bounded(async {
        let store = StoreConfig {
            min_free: Some(u64::MAX / 2),
            ..StoreConfig::default()
        };
        let mut world = World::with(store, ReceiverConfig::default(), false).await;
        let refused = "error 1 no_space retry";
        let scripts = [
            (
                "a byte",
                vec![Unstaged, say(file(1, "x", 1)), Hear(refused)],
            ),
            (
                "nothing",
                vec![Unstaged, say(file(1, "x", 0)), Hear(refused)],
            ),
            (
                "not declared",
                vec![
                    Unstaged,
                    say(file(1, "x", V::Nil)),
                    Hear(refused),
                    say(chunk(1, 0, b"a")),
                    say(finish(1, b"a")),
                ],
            ),
            (
                "a name that is taken needs no space",
                vec![
                    Unstaged,
                    say(file(1, "taken", 10)),
                    say(chunk(1, 0, TAKEN)),
                    say(finish(1, TAKEN)),
                    Hear("done 1 taken 10 same"),
                ],
            ),
        ];
        play_all(&mut world, &scripts).await;
    })
    .await;
}

#[tokio::test]
async fn a_stalled_upload_ends_and_frees_its_place() {
    if elsewhere("a_stalled_upload_ends_and_frees_its_place").await {
        return;
    }
    bounded(async {
        let receiver = ReceiverConfig {
            stall: Duration::from_secs(1),
            open_files: 16,
            ..ReceiverConfig::default()
        };
        let mut world = World::new(StoreConfig::default(), receiver).await;
        let stalled = "error 1 upload_stalled retry";
        let scripts = [
            (
                "nothing came",
                then(
                    vec![
                        say(file(1, "x", 4)),
                        Hear(stalled),
                        say(chunk(1, 0, b"abcd")),
                        say(finish(1, b"abcd")),
                    ],
                    next_file(2),
                ),
            ),
            (
                "half came",
                then(
                    vec![
                        say(file(1, "x", 4)),
                        say(chunk(1, 0, b"ab")),
                        Acked(1, 2),
                        Hear(stalled),
                        say(chunk(1, 2, b"cd")),
                        say(cancel(1)),
                    ],
                    next_file(2),
                ),
            ),
            (
                "ready, and then nothing",
                vec![
                    say(("file", with(file(1, "x", 4).1, "resume", true))),
                    Hear("ready 1 0"),
                    Hear(stalled),
                ],
            ),
            (
                "a comparison that nobody answers",
                vec![
                    say(("file", with(file(1, "taken", 10).1, "resume", true))),
                    Hear("ready 1 1"),
                    Hear(stalled),
                ],
            ),
        ];
        play_all(&mut world, &scripts).await;

        // All the places there are, and nobody sends.
        let name = "every place stalled";
        let socket = world.fixture.connect().await;
        let mut lanes = Vec::new();
        for n in 0..16 {
            let mut lane = RawLane::open(&socket).await;
            lane.say(&file(1, &format!("s{n}"), 4)).await;
            lane.say(&chunk(1, 0, b"ab")).await;
            lane.acked(1, 2).await;
            lanes.push(lane);
        }
        for lane in &mut lanes {
            assert_eq!(lane.hear().await.line, stalled, "{name}");
        }
        drop(lanes);
        socket.close(CloseCode::NORMAL, "").await;
        world.well(name).await;
    })
    .await;
}

#[tokio::test]
async fn a_thousand_offers_without_data_are_bounded_and_refused() {
    const SOCKETS: usize = 60;
    const LANES: usize = 17;
    const OPEN: usize = 8;
    if elsewhere("a_thousand_offers_without_data_are_bounded_and_refused").await {
        return;
    }
    bounded(async {
        let receiver = ReceiverConfig {
            open_files: OPEN,
            lanes_per_socket: LANES - 1,
            turn: Duration::from_millis(300),
            ..ReceiverConfig::default()
        };
        let mut world = World::new(StoreConfig::default(), receiver).await;
        // The first times take what the allocator needs for so many lanes; after that nothing may be added.
        for round in 0..3 {
            a_thousand_offers(&world, SOCKETS, LANES, OPEN).await;
            if round < 2 {
                world.lanes_are_over("a thousand offers").await;
                world.this_is_normal();
            }
            world.well("a thousand offers").await;
        }
    })
    .await;
}

async fn a_thousand_offers(world: &World, socket_count: usize, lane_count: usize, open: usize) {
    let name = "a thousand offers";
    let (mut sockets, mut lanes) = (Vec::new(), Vec::new());
    for s in 0..socket_count {
        let socket = world.fixture.connect().await;
        for l in 0..lane_count {
            let lane = RawLane::open(&socket).await;
            let (event, offer) = file(1, &format!("s{s}/{l}"), 1000);
            lane.say(&(event, with(offer, "resume", true))).await;
            lanes.push(lane);
        }
        sockets.push(socket);
    }
    let mut heard = BTreeMap::<String, usize>::new();
    for lane in &mut lanes {
        *heard.entry(lane.hear().await.line).or_default() += 1;
        assert!(world.fixture.staged() <= open, "{name}");
        assert!(world.fixture.store.usage().open <= open, "{name}");
    }
    // One place is left for another token.
    let open = open - 1;
    let expected = [
        ("closed refused", socket_count),
        (
            "error 1 too_many_uploads retry",
            socket_count * (lane_count - 1) - open,
        ),
        ("ready 1 0", open),
    ];
    assert_eq!(
        heard,
        expected
            .map(|(line, count)| (line.to_owned(), count))
            .into()
    );
    drop(lanes);
    let closing: Vec<_> = sockets
        .iter()
        .map(|socket| socket.close(CloseCode::NORMAL, ""))
        .collect();
    for closed in closing {
        closed.await;
    }
}

// ------------------------------------------------------------------------------------------------ 7. names

/// Names that are refused as such, whatever is there.
const BAD_NAMES: &[&str] = &[
    // N1: nothing, or nothing but dots and spaces.
    "",
    ".",
    "..",
    "...",
    "....",
    ". ",
    " ",
    "  ",
    ". .",
    "\u{a0}",
    "\u{3000}",
    "\u{2003}.",
    // N2: components that lead elsewhere or nowhere.
    "../x",
    "a/../../x",
    "a/..",
    "/x",
    "/etc/passwd",
    "//x",
    "./x",
    "a/",
    "a//b",
    "a/./b",
    "....//x",
    "/",
    "..//..//x",
    "a/../x",
    // N3: other systems' separators, drives, streams.
    "..\\x",
    "C:\\x",
    "C:x",
    "C:",
    "\\\\host\\share",
    "x:stream",
    "\\\\.\\COM1",
    "\\\\?\\C:\\x",
    "a\\b",
    "x::$DATA",
    "/\\x",
    // N4: what becomes one of those when someone normalises.
    "\u{ff0e}\u{ff0e}/x",
    "\u{ff0e}\u{ff0e}\u{ff0f}x",
    "a\u{ff0f}b",
    "a\u{ff3c}b",
    "C\u{ff1a}x",
    "\u{2024}",
    "\u{2024}\u{2024}",
    "\u{2025}",
    "\u{2026}",
    "a\u{ff1a}b",
    "\u{2025}\u{ff0f}x",
    "\u{2100}",
    // N6: characters that are not shown, or change what is.
    "a\0b",
    "\0",
    "a\nb",
    "a\rb",
    "a\tb",
    "a\u{1b}[2Jb",
    "a\u{7f}b",
    "a\u{80}b",
    "a\u{9b}b",
    "a\u{85}b",
    "a\u{202e}gpj.exe",
    "a\u{2066}b",
    "a\u{200b}b",
    "a\u{200d}b",
    "\u{feff}a",
    "a\u{2028}b",
    "a\u{ad}b",
    "a\u{e0041}b",
    "a\u{ffff}b",
    "a\u{fdd0}b",
    "a\u{3164}b",
    "a\u{61c}b",
    // N7: devices of another system.
    "CON",
    "con",
    "Prn",
    "AUX",
    "NUL",
    "nul.txt",
    "NUL.tar.gz",
    "COM1",
    "com9.log",
    "LPT1",
    "lpt9.a.b",
    "COM\u{b9}",
    "LPT\u{b2}.txt",
    "com\u{b3}",
    "CONIN$",
    "conout$",
    "a/NUL",
    "NUL/a",
    "CON .txt",
    "\u{ff23}\u{ff2f}\u{ff2e}",
    "NUL ",
    "NUL.",
    // N8: hidden, options, ends that some drop.
    "-rf",
    "--help",
    ".hidden",
    ".udpack",
    ".udpack/x",
    ".udpack/staging/x",
    ".udpack/lock",
    "a/.b",
    ".git/config",
    ".ssh/authorized_keys",
    "x.",
    "x ",
    " x",
    "a/-b",
    "x\u{a0}",
    "\u{3000}x",
    "a./b",
    "a /b",
    // N10: not the form in which names are compared.
    "e\u{301}",
    "A\u{30a}",
    "\u{212a}",
    "\u{212b}",
    "\u{1100}\u{1161}",
    "q\u{323}\u{307}\u{323}",
];

/// Names that look wicked and are only names: stored under exactly this name.
const GOOD_NAMES: &[&str] = &[
    "%2e%2e%2fx",
    "%252e%252e%252fx",
    "x..%c0%af",
    "&#46;&#46;",
    "a%00b",
    "~",
    "~root",
    "$HOME",
    "$(reboot)",
    "`id`",
    "a;b",
    "a|b",
    "a b",
    "a..b",
    "x.part",
    "x.meta",
    "0123456789abcdef0123456789abcdef.part",
    "udpack",
    "CONSOLE",
    "COM",
    "COM10",
    "LPT0",
    "NULL",
    "_CON",
    "a?b*",
    "\u{e9}",
    "K",
    "taken.part",
    "Taken",
    "TAKEN",
    "\u{1f600}",
    "\u{6587}\u{4ef6}",
    "a'b\"c",
    "<script>",
    "a-",
    "a\u{2215}b",
];

/// What may stand where a name should go, and how it is put there.
type Object = (&'static str, fn(&Path, &Path));

const OBJECTS: &[Object] = &[
    ("file of another size", |at, _| {
        fs::write(at, "other").expect("a file")
    }),
    ("file of the same size", |at, _| {
        fs::write(at, "0123").expect("a file")
    }),
    ("empty file", |at, _| fs::write(at, "").expect("a file")),
    ("empty directory", |at, _| {
        fs::create_dir(at).expect("a directory")
    }),
    ("directory with a file", |at, _| {
        fs::create_dir(at).expect("a directory");
        fs::write(at.join("inside"), "inside").expect("a file");
    }),
    ("fifo", |at, _| node(at, rustix::fs::FileType::Fifo, 0)),
    ("socket", |at, _| {
        drop(UnixListener::bind(at).expect("a socket"))
    }),
    ("device", |at, _| {
        node(
            at,
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::makedev(1, 3),
        );
    }),
    ("link to a file outside", |at, outside| {
        symlink(outside.join("secret"), at).expect("a link");
    }),
    ("relative link to a file outside", |at, _| {
        symlink("../outside/secret", at).expect("a link");
    }),
    ("link to a directory outside", |at, outside| {
        symlink(outside, at).expect("a link")
    }),
    ("dangling link", |at, outside| {
        symlink(outside.join("missing"), at).expect("a link");
    }),
    ("link to itself", |at, _| {
        symlink("object", at).expect("a link")
    }),
    ("link to a file inside", |at, _| {
        symlink("taken", at).expect("a link")
    }),
    ("hard link to a file outside", |at, outside| {
        fs::hard_link(outside.join("secret"), at).expect("a hard link");
    }),
];

/// Makes a special file; where that is not allowed, a directory stands in, and that is said.
fn node(at: &Path, kind: rustix::fs::FileType, device: u64) {
    use rustix::fs::{CWD, Mode, mknodat};
    if mknodat(CWD, at, kind, Mode::from_raw_mode(0o600), device).is_err() {
        let _ = writeln!(std::io::stderr(), "skipped: cannot make a {kind:?} here");
        fs::create_dir(at).expect("a directory");
    }
}

/// Offers a file of 4 bytes under this name in one go, and gives what the server answers until its end.
async fn offer(world: &World, name: &str, if_exists: &str, short: bool) -> Vec<String> {
    let socket = world.fixture.connect().await;
    let mut lane = RawLane::open(&socket).await;
    if short {
        lane.say(&short_file(name, 4)).await;
        lane.say(&short_chunk(b"abcd")).await;
        lane.say(&short_finish()).await;
    } else {
        let (event, data) = file(1, name, 4);
        lane.say(&(event, with(data, "if_exists", if_exists))).await;
        lane.say(&chunk(1, 0, b"abcd")).await;
        lane.say(&finish(1, b"abcd")).await;
    }
    lane.channel
        .finish()
        .await
        .expect("the server reads all of it");
    let mut heard = Vec::new();
    loop {
        let next = lane.hear().await;
        fit_to_be_seen(world, name, &next.text);
        heard.push(next.line);
        if heard.last().is_some_and(|line| line == "end") {
            return heard;
        }
    }
}

/// The server's directory and all around it, as it is before a name is tried.
fn before(world: &World) -> BTreeMap<String, String> {
    age(&world.fixture.root());
    age(&world.fixture.root().join(".udpack/staging"));
    age(world.fixture.dir.path());
    tree(world.fixture.dir.path())
}

#[tokio::test]
async fn names_that_break_a_rule_touch_nothing() {
    if elsewhere("names_that_break_a_rule_touch_nothing").await {
        return;
    }
    bounded(async {
        let store = StoreConfig {
            names: Names::Portable,
            overwrite: Overwrite::Always,
            ..StoreConfig::default()
        };
        let receiver = ReceiverConfig {
            default_scope: Scope {
                read: true,
                delete: true,
                ..Scope::default()
            },
            ..ReceiverConfig::default()
        };
        let mut world = World::new(store, receiver).await;
        fs::write(world.fixture.dir.path().join("x"), "outside").expect("a file beside the root");
        let mut names: Vec<String> = BAD_NAMES.iter().map(ToString::to_string).collect();
        // N9: too long, too deep.
        names.extend([
            "n".repeat(201),
            "n".repeat(256),
            "n".repeat(4096),
            "\u{1f600}".repeat(51),
            "\u{1f600}".repeat(100),
            format!("{}/{}", "d".repeat(201), "x"),
            vec!["d"; 33].join("/"),
            format!("{}x", "d/".repeat(600)),
            vec!["d".repeat(200); 6].join("/"),
            format!("{}{}", "../".repeat(40), "etc/passwd"),
        ]);
        assert!(names.len() >= 60, "{}", names.len());
        for name in &names {
            let before = before(&world);
            for policy in ["same", "error", "skip", "overwrite", "rename"] {
                let heard = offer(&world, name, policy, false).await;
                assert_eq!(heard, ["error 1 bad_name", "end"], "{name:?}, {policy}");
            }
            let heard = offer(&world, name, "", true).await;
            assert_eq!(heard, ["error 0 bad_name", "end"], "{name:?}");
            other_verbs(&world, name).await;
            assert_eq!(tree(world.fixture.dir.path()), before, "{name:?}");
            world.well(name).await;
        }
    })
    .await;
}

/// Everything else that takes a name, with one that breaks a rule.
async fn other_verbs(world: &World, name: &str) {
    let socket = world.fixture.connect().await;
    let mut lane = RawLane::open(&socket).await;
    let says = [
        raw::dir(1, name),
        raw::link(2, name, "taken"),
        get(3, name),
        raw::resumable(4, name, 4),
        raw::of_run(5, name, 4, 1),
    ];
    // One that is not portable may be asked for: it may be there all the same.
    let asked = match name.parse::<RelPath>() {
        Ok(_) => "not_found",
        Err(_) => "bad_name",
    };
    for (id, say) in (1..).zip(&says) {
        lane.say(say).await;
        let heard = lane.hear().await;
        let code = if say.0 == "get" { asked } else { "bad_name" };
        assert_eq!(
            heard.line,
            format!("error {id} {code}"),
            "{name:?}: {say:?}"
        );
        fit_to_be_seen(world, name, &heard.text);
    }
    let path = || map([("path", name.into())]);
    let mut asks = vec![("hash", path()), ("remove", path())];
    asks.push(("remove", with(path(), "recursive", true)));
    // No name at all is the root, where nothing is changed.
    if !name.is_empty() {
        let after = map([("after", name.into())]);
        asks.extend([("stat", path()), ("list", path())]);
        if asked == "bad_name" {
            asks.push(("list", after));
        }
    }
    for ask in &asks {
        match lane.request::<serde::de::IgnoredAny>(ask).await {
            Ok(_) => panic!("{name:?}: {ask:?} was answered"),
            Err((code, text)) => {
                assert_eq!(code, asked, "{name:?}: {ask:?}");
                fit_to_be_seen(world, name, &text);
            }
        }
    }
    lane.channel
        .finish()
        .await
        .expect("the server reads all of it");
    assert_eq!(lane.hear().await.line, "end", "{name:?}");
}

#[tokio::test]
async fn a_name_is_stored_as_it_was_sent() {
    if elsewhere("a_name_is_stored_as_it_was_sent").await {
        return;
    }
    bounded(async {
        let mut world = World::new(StoreConfig::default(), ReceiverConfig::default()).await;
        let mut names: Vec<String> = GOOD_NAMES.iter().map(ToString::to_string).collect();
        names.extend(["n".repeat(200), "\u{1f600}".repeat(50)]);
        for name in &names {
            let heard = offer(&world, name, "error", false).await;
            assert_eq!(heard, [format!("done 1 {name} 4").as_str(), "end"]);
            // Byte by byte: a file system that folds names would give another one back.
            let mut expected = vec!["taken".to_owned(), name.clone()];
            expected.sort();
            assert_eq!(world.fixture.visible(), expected);
            assert_eq!(world.fixture.stored(name), b"abcd");
            world.remove(name);
            world.well(name).await;
        }
        // As deep and as long as allowed.
        let deep = vec!["d"; 32].join("/");
        let long = format!("{}/{}", vec!["d".repeat(200); 5].join("/"), "x".repeat(19));
        assert_eq!(long.len(), 1024);
        for name in [&deep, &long] {
            let heard = offer(&world, name, "error", false).await;
            assert_eq!(heard, [format!("done 1 {name} 4").as_str(), "end"]);
            assert_eq!(world.fixture.stored(name), b"abcd");
            let top = name.split('/').next().expect("a component");
            fs::remove_dir_all(world.fixture.root().join(top)).expect("directories");
            world.well(name).await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_has_a_name_is_left_untouched() {
    if elsewhere("what_has_a_name_is_left_untouched").await {
        return;
    }
    bounded(async {
        let store = StoreConfig {
            overwrite: Overwrite::Always,
            ..StoreConfig::default()
        };
        let mut world = World::new(store, ReceiverConfig::default()).await;
        let outside = world.fixture.dir.path().join("outside");
        fs::create_dir(&outside).expect("a directory");
        fs::write(outside.join("secret"), "secret").expect("a file");
        let at = world.fixture.root().join("object");
        for (object, put) in OBJECTS {
            put(&at, &outside);
            let metadata = fs::symlink_metadata(&at).expect("the object");
            let (regular, directory) = (metadata.is_file(), metadata.is_dir());
            let before = before(&world);
            let mut tries = Vec::new();
            for policy in ["same", "error", "skip", "overwrite"] {
                // `skip` and `overwrite` have their way with a regular file, and only with that.
                if !(regular && matches!(policy, "skip" | "overwrite")) {
                    tries.push(("object", policy));
                }
                // Nothing leads through it. A directory is there to lead through.
                if !directory {
                    tries.push(("object/x", policy));
                    tries.push(("object/secret", policy));
                    tries.push(("object/a/b", policy));
                }
            }
            if !directory {
                tries.push(("object/x", "rename"));
            }
            for (name, policy) in tries {
                let heard = offer(&world, name, policy, false).await;
                assert_eq!(
                    heard,
                    ["error 1 exists", "end"],
                    "{object}: {name}, {policy}"
                );
            }
            let heard = offer(&world, "object", "", true).await;
            assert_eq!(heard, ["error 0 exists", "end"], "{object}");
            let after = tree(world.fixture.dir.path());
            // A file that is compared byte by byte goes through staging; it leaves nothing there.
            assert_eq!(after, before, "{object}");
            // Another name is found beside it, and what `skip` and `overwrite` may touch is inside.
            let heard = offer(&world, "object", "rename", false).await;
            assert_eq!(heard, ["done 1 object (1) 4", "end"], "{object}");
            world.remove("object (1)");
            if regular {
                let size = metadata.len();
                let heard = offer(&world, "object", "skip", false).await;
                let skipped = format!("done 1 object {size} same");
                assert_eq!(heard, [skipped.as_str(), "end"], "{object}");
                let heard = offer(&world, "object", "overwrite", false).await;
                assert_eq!(heard, ["done 1 object 4", "end"], "{object}");
                assert_eq!(world.fixture.stored("object"), b"abcd", "{object}");
            }
            assert_eq!(
                fs::read(outside.join("secret")).expect("it"),
                b"secret",
                "{object}"
            );
            assert_eq!(fs::read_dir(&outside).expect("it").count(), 1, "{object}");
            if directory {
                fs::remove_dir_all(&at).expect("the object");
            } else {
                fs::remove_file(&at).expect("the object");
            }
            world.well(object).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_root_that_is_swapped_for_a_link_is_not_followed() {
    if elsewhere("a_root_that_is_swapped_for_a_link_is_not_followed").await {
        return;
    }
    bounded(async {
        let fixture = Fixture::new().await;
        let (root, moved) = (fixture.root(), fixture.dir.path().join("moved"));
        let outside = fixture.dir.path().join("outside");
        fs::create_dir(&outside).expect("a directory");
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        lane.say(&file(1, "a", 4)).await;
        lane.say(&chunk(1, 0, b"ab")).await;
        lane.acked(1, 2).await;
        fs::rename(&root, &moved).expect("a rename");
        symlink(&outside, &root).expect("a link");
        lane.say(&chunk(1, 2, b"cd")).await;
        lane.say(&finish(1, b"abcd")).await;
        assert_eq!(lane.hear().await.line, "done 1 a 4");
        for step in whole(2, "d/b", b"abcd") {
            if let Step::Say(message) = step {
                lane.say(&message).await;
            }
        }
        assert_eq!(lane.hear().await.line, "done 2 d/b 4");
        // The store stays with the directory that it opened.
        assert_eq!(fs::read(moved.join("a")).expect("it"), b"abcd");
        assert_eq!(fs::read(moved.join("d/b")).expect("it"), b"abcd");
        assert_eq!(fs::read_dir(&outside).expect("it").count(), 0);
    })
    .await;
}

#[tokio::test]
async fn of_a_hundred_lanes_racing_for_one_name_exactly_one_wins() {
    if elsewhere("of_a_hundred_lanes_racing_for_one_name_exactly_one_wins").await {
        return;
    }
    bounded(async {
        let mut world = World::new(StoreConfig::default(), ReceiverConfig::default()).await;
        let mut sockets = Vec::new();
        let mut racers = tokio::task::JoinSet::new();
        for s in 0..20_u64 {
            let socket = world.fixture.connect().await;
            for l in 0..5_u64 {
                let mut lane = RawLane::open(&socket).await;
                let bytes = noise(1 + s * 5 + l, 20_000);
                racers.spawn(async move {
                    let (event, data) = file(1, "one", bytes.len() as u64);
                    lane.say(&(event, with(data, "if_exists", "error"))).await;
                    lane.say(&chunk(1, 0, &bytes)).await;
                    lane.say(&finish(1, &bytes)).await;
                    (lane.hear().await.line, bytes)
                });
            }
            sockets.push(socket);
        }
        let (mut winners, mut losers) = (Vec::new(), 0);
        while let Some(raced) = racers.join_next().await {
            let (line, bytes) = raced.expect("no panic");
            match line.as_str() {
                "done 1 one 20000" => winners.push(bytes),
                "error 1 exists" => losers += 1,
                other => panic!("{other}"),
            }
        }
        assert_eq!((winners.len(), losers), (1, 99));
        assert!(
            world.fixture.stored("one") == winners[0],
            "the bytes of another"
        );
        world.remove("one");
        for socket in sockets {
            socket.close(CloseCode::NORMAL, "").await;
        }
        world.well("a race").await;
    })
    .await;
}
