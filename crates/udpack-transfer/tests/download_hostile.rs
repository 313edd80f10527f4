//! Downloads from a server that means harm: bytes that are not the file's, messages at the wrong time, lists
//! that lead elsewhere or never end. Nothing becomes visible, nothing hangs, and the error says what it was.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{bounded, noise, rel, stores};
use raw::{Say, V, chunk, file, finish, map, with, without};
use tempfile::TempDir;
use udpack::{Channel, Client, Deny, Hello, Identity, Peer, Server, Socket};
use udpack_transfer::{
    CHANNEL, Delta, Downloader, ErrorKind, Event, IfExists, JobsEvent, Kind, Remote, Store,
    StoreConfig, TransferError, Wanted,
};

/// A server that says, on lanes, what it is told to.
struct Hostile {
    server: Server,
    /// Files asked for.
    gets: Arc<AtomicUsize>,
}

impl Hostile {
    /// Answers each `get` with this, and each request with that; nothing means silence.
    async fn new(
        answer: impl Fn(u64) -> Vec<Say> + Send + Sync + 'static,
        reply: impl Fn(&str, usize) -> Option<V> + Send + Sync + 'static,
    ) -> Self {
        let gets = Arc::new(AtomicUsize::new(0));
        let (answer, reply, count) = (Arc::new(answer), Arc::new(reply), gets.clone());
        let serve = move |channel: Channel| {
            let (answer, reply, count) = (answer.clone(), reply.clone(), count.clone());
            async move {
                let mut asked = 0;
                while let Ok(Some(message)) = channel.recv().await {
                    if message.id().is_some() {
                        if let Some(data) = reply(message.event(), asked) {
                            let _ = channel.reply(&message, &data).await;
                        }
                        asked += 1;
                    } else if message.event() == "get" {
                        count.fetch_add(1, Ordering::Relaxed);
                        let id = message.fields().and_then(|fields| fields.u64("id"));
                        for (event, data) in answer(id.expect("an id")) {
                            if channel.send(event, &data).await.is_err() {
                                return;
                            }
                        }
                    }
                }
            }
        };
        let jobs = |channel: Channel| async move {
            let _ = channel.send("jobs", &map([("jobs", V::Nil)])).await;
            while let Ok(Some(_)) = channel.recv().await {}
        };
        let server = Server::builder()
            .identity(Identity::generate().expect("a key"))
            .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
            .channel(CHANNEL, serve)
            .channel("transfers", jobs)
            .bind("127.0.0.1:0")
            .await
            .expect("a free port");
        Self { server, gets }
    }

    async fn connect(&self) -> Socket {
        Client::builder()
            .pin(self.server.fingerprint())
            .connect(&self.server.local_addr().to_string())
            .await
            .expect("it lets us in")
    }
}

fn shared(dir: &TempDir) -> Store {
    let config = StoreConfig {
        shared: true,
        ..StoreConfig::default()
    };
    Store::open(dir.path(), config).expect("a store")
}

/// What is visible in a directory.
fn visible(dir: &TempDir) -> Vec<String> {
    fs::read_dir(dir.path())
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| name != ".udpack")
        .collect()
}

/// A `finish` that tells a size and the hash of something.
fn ends(id: u64, size: u64, bytes: &[u8]) -> Say {
    let (event, data) = finish(id, bytes);
    (event, with(data, "size", size))
}

type Script = fn(u64) -> Vec<Say>;

#[tokio::test]
async fn bytes_that_are_not_the_files_are_never_visible() {
    bounded(async {
        let scripts: [(&str, ErrorKind, usize, Script); 18] = [
            ("a gap", ErrorKind::Integrity, 1, |id| {
                vec![
                    file(id, "f", 8),
                    chunk(id, 4, b"wxyz"),
                    ends(id, 8, b"wxyz"),
                ]
            }),
            ("out of order", ErrorKind::Integrity, 1, |id| {
                vec![
                    file(id, "f", 8),
                    chunk(id, 0, b"abcd"),
                    chunk(id, 0, b"abcd"),
                    ends(id, 8, b"abcdabcd"),
                ]
            }),
            ("too many", ErrorKind::Integrity, 1, |id| {
                vec![file(id, "f", 3), chunk(id, 0, b"abcd"), ends(id, 3, b"abc")]
            }),
            ("too few", ErrorKind::Integrity, 1, |id| {
                vec![
                    file(id, "f", 5),
                    chunk(id, 0, b"abcd"),
                    ends(id, 5, b"abcd"),
                ]
            }),
            ("another size at the end", ErrorKind::Integrity, 1, |id| {
                vec![
                    file(id, "f", 4),
                    chunk(id, 0, b"abcd"),
                    ends(id, 5, b"abcd"),
                ]
            }),
            // Once more from the start, then no more.
            ("another hash", ErrorKind::Integrity, 2, |id| {
                vec![
                    file(id, "f", 4),
                    chunk(id, 0, b"abcd"),
                    ends(id, 4, b"dcba"),
                ]
            }),
            ("nothing but a hash", ErrorKind::Integrity, 1, |id| {
                vec![file(id, "f", 4), ends(id, 4, b"abcd")]
            }),
            (
                "an offset at the end of all numbers",
                ErrorKind::Integrity,
                1,
                |id| vec![file(id, "f", u64::MAX), chunk(id, u64::MAX, b"a")],
            ),
            ("a chunk before the file", ErrorKind::Other, 1, |id| {
                vec![chunk(id, 0, b"abcd"), file(id, "f", 4), finish(id, b"abcd")]
            }),
            ("the end before the file", ErrorKind::Other, 1, |id| {
                vec![finish(id, b"")]
            }),
            ("a file twice", ErrorKind::Other, 1, |id| {
                vec![file(id, "f", 4), file(id, "f", 4), chunk(id, 0, b"abcd")]
            }),
            ("a file nobody asked for", ErrorKind::Other, 1, |id| {
                vec![file(id + 7, "f", 4), chunk(id + 7, 0, b"abcd")]
            }),
            ("a chunk nobody asked for", ErrorKind::Other, 1, |id| {
                vec![chunk(id + 7, 0, b"abcd")]
            }),
            ("a file without a size", ErrorKind::Other, 1, |id| {
                vec![
                    file(id, "f", V::Nil),
                    chunk(id, 0, b"abcd"),
                    finish(id, b"abcd"),
                ]
            }),
            ("a hash that is none", ErrorKind::Other, 1, |id| {
                let (event, data) = finish(id, b"abcd");
                let data = with(data, "hash", &b"short"[..]);
                vec![file(id, "f", 4), chunk(id, 0, b"abcd"), (event, data)]
            }),
            ("no hash", ErrorKind::Other, 1, |id| {
                let (event, data) = finish(id, b"abcd");
                vec![
                    file(id, "f", 4),
                    chunk(id, 0, b"abcd"),
                    (event, without(data, "hash")),
                ]
            }),
            ("an end in the short form", ErrorKind::Other, 1, |id| {
                vec![file(id, "f", 4), chunk(id, 0, b"abcd"), ("finish", V::Nil)]
            }),
            (
                "a failure in the middle",
                ErrorKind::RemoteStorage,
                1,
                |id| {
                    let error = map([
                        ("id", id.into()),
                        ("code", "io".into()),
                        ("message", "a\u{1b}[31mred".into()),
                        ("retry", false.into()),
                    ]);
                    vec![file(id, "f", 8), chunk(id, 0, b"abcd"), ("error", error)]
                },
            ),
        ];
        for (what, kind, gets, script) in scripts {
            let hostile = Hostile::new(script, |_, _| None).await;
            let socket = hostile.connect().await;
            let dir = tempfile::tempdir().expect("a temporary directory");
            let store = shared(&dir);
            let wanted = Wanted {
                remote: rel("f"),
                local: rel("here"),
                size: None,
            };
            let mut download = Downloader::new(&socket, store.clone()).get([wanted]);
            let mut failed = Vec::new();
            while let Some(event) = download.next().await {
                match event {
                    Event::Failed { error, .. } => failed.push(error),
                    Event::Done(_) => panic!("{what}: done"),
                    _ => {}
                }
            }
            assert_eq!(failed.len(), 1, "{what}");
            assert_eq!(failed[0].kind(), kind, "{what}: {}", failed[0]);
            assert!(!failed[0].to_string().contains('\u{1b}'), "{what}");
            assert_eq!(hostile.gets.load(Ordering::Relaxed), gets, "{what}: asked");
            assert_eq!(visible(&dir), Vec::<String>::new(), "{what}: visible");
            drop(download);
            let usage = store.usage();
            assert_eq!((usage.open, usage.reserved), (0, 0), "{what}: left open");
        }
    })
    .await;
}

/// A list of so many chunks of this length.
fn list_of(count: usize, len: u32) -> Vec<u8> {
    [&len.to_be_bytes()[..], &[7; 16]].concat().repeat(count)
}

#[tokio::test]
async fn a_list_of_chunks_that_cannot_be_is_asked_for_once_and_all_is_sent() {
    bounded(async {
        const SIZE: u64 = 300_000;
        let lists: [(&str, u64, u64, Vec<u8>); 8] = [
            ("more chunks than fit", SIZE, 10_000, list_of(10_000, 1)),
            ("ends elsewhere", SIZE, SIZE, list_of(1, 8_192)),
            ("ends beyond the file", SIZE, 303_104, list_of(37, 8_192)),
            ("empty, with more", SIZE, 0, Vec::new()),
            (
                "within a chunk",
                SIZE,
                8_192,
                list_of(1, 8_192)[..19].to_vec(),
            ),
            ("a chunk without bytes", SIZE, 0, list_of(1, 0)),
            ("a long chunk", SIZE, 1 << 20, list_of(1, 1 << 20)),
            ("of no file", 0, 8_192, list_of(1, 8_192)),
        ];
        for (what, size, end, list) in lists {
            let asked = Arc::new(AtomicUsize::new(0));
            let count = asked.clone();
            let hostile = Hostile::new(
                |id| {
                    let bytes = noise(5, 300_000);
                    let (first, second) = bytes.split_at(150_000);
                    let chunks = [chunk(id, 0, first), chunk(id, 150_000, second)];
                    let mut say = vec![file(id, "f", SIZE)];
                    say.extend(chunks);
                    say.push(finish(id, &bytes));
                    say
                },
                move |event, _| {
                    count.fetch_add(1, Ordering::Relaxed);
                    let told = map([
                        ("size", size.into()),
                        ("end", end.into()),
                        ("chunks", (&list[..]).into()),
                    ]);
                    (event == "chunks").then_some(told)
                },
            )
            .await;
            let socket = hostile.connect().await;
            let dir = tempfile::tempdir().expect("a temporary directory");
            fs::write(dir.path().join("f"), noise(6, 300_000)).expect("write");
            let store = Store::open(dir.path(), stores()).expect("a store");
            let downloader = Downloader::new(&socket, store)
                .if_exists(IfExists::Overwrite)
                .delta(Delta::Always);
            let mut download = downloader.get([Wanted {
                remote: rel("f"),
                local: rel("f"),
                size: Some(SIZE),
            }]);
            let sent = loop {
                match download.next().await {
                    Some(Event::Done(outcome)) => break outcome.sent,
                    Some(Event::Failed { error, .. }) => panic!("{what}: {error}"),
                    Some(_) => {}
                    None => panic!("{what}: no outcome"),
                }
            };
            assert_eq!(sent, SIZE, "{what}");
            assert!(fs::read(dir.path().join("f")).expect("it") == noise(5, 300_000));
            assert_eq!(asked.load(Ordering::Relaxed), 1, "{what}: asked");
        }
    })
    .await;
}

#[tokio::test]
async fn one_bad_file_does_not_spoil_the_next() {
    bounded(async {
        // Every other file has too many bytes, and more come after it was given up.
        let hostile = Hostile::new(
            |id| {
                let bytes = noise(id, 1_000);
                let mut say = vec![file(id, "f", 1_000), chunk(id, 0, &bytes)];
                if id % 2 == 0 {
                    say.extend((1..20).map(|n| chunk(id, n * 1_000, &bytes)));
                }
                say.push(finish(id, &bytes));
                say
            },
            |_, _| None,
        )
        .await;
        let socket = hostile.connect().await;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let files = (0..100).map(|n| Wanted {
            remote: rel("f"),
            local: rel(&format!("n{n}")),
            size: Some(1_000),
        });
        let mut download = Downloader::new(&socket, shared(&dir)).lanes(1).get(files);
        let (mut done, mut failed) = (0, 0);
        while let Some(event) = download.next().await {
            match event {
                Event::Done(_) => done += 1,
                Event::Failed { error, .. } => {
                    assert_eq!(error.kind(), ErrorKind::Integrity, "{error}");
                    failed += 1;
                }
                _ => {}
            }
        }
        assert_eq!((done, failed), (50, 50));
        assert_eq!(visible(&dir).len(), 50);
    })
    .await;
}

fn entry(path: &str, kind: &str) -> V {
    map([
        ("path", path.into()),
        ("kind", kind.into()),
        ("size", 0_u64.into()),
        ("mtime", 0_u64.into()),
        ("mtime_ns", 0_u64.into()),
        ("mode", 0o644_u64.into()),
    ])
}

fn page(entries: Vec<V>, more: bool) -> V {
    map([("entries", V::Array(entries)), ("more", more.into())])
}

/// An entry as a row, with more behind it than this version knows.
fn row(name: &str, kind: &str) -> V {
    let numbers = [0, 0, 0, 0o644].map(V::Uint);
    let mut row = vec![name.into(), kind.into()];
    row.extend(numbers);
    row.extend([V::Nil, false.into(), map([("later", true.into())])]);
    V::Array(row)
}

fn dirs(dirs: Vec<(&str, Vec<V>)>) -> V {
    let dir = |(dir, rows): (&str, Vec<V>)| V::Array(vec![dir.into(), V::Array(rows)]);
    V::Array(dirs.into_iter().map(dir).collect())
}

#[tokio::test]
async fn rows_are_read_as_the_entries_that_they_stand_for() {
    bounded(async {
        let hostile = Hostile::new(
            |_| Vec::new(),
            |_, _| {
                let inner = vec![row("x", "link"), row("y", "other")];
                let all = vec![
                    ("d", vec![row("a", "dir")]),
                    ("d/a", inner),
                    ("d", vec![row("b", "file")]),
                ];
                Some(map([("dirs", dirs(all)), ("more", false.into())]))
            },
        )
        .await;
        let remote = Remote::new(&hostile.connect().await);
        let mut listing = remote.list(Some(&rel("d")), true);
        let mut listed = Vec::new();
        while let Some(entry) = listing.next().await {
            let entry = entry.expect("a sound entry");
            listed.push((entry.path, entry.kind, entry.mode));
        }
        let kinds = [
            ("d/a", Kind::Dir),
            ("d/a/x", Kind::Link),
            ("d/a/y", Kind::Other),
            ("d/b", Kind::File),
        ];
        assert_eq!(
            listed,
            kinds.map(|(path, kind)| (path.to_owned(), kind, 0o644))
        );
    })
    .await;
}

#[tokio::test]
async fn lists_that_lead_elsewhere_or_never_end_are_refused() {
    bounded(async {
        type Pages = fn(usize) -> V;
        let scripts: [(&str, Pages); 26] = [
            ("above", |_| page(vec![entry("d/../x", "file")], false)),
            ("above the root", |_| {
                page(vec![entry("../x", "file")], false)
            }),
            ("absolute", |_| {
                page(vec![entry("/etc/passwd", "file")], false)
            }),
            ("a nul", |_| page(vec![entry("d/a\0b", "file")], false)),
            ("an empty component", |_| {
                page(vec![entry("d//b", "file")], false)
            }),
            ("no name", |_| page(vec![entry("", "file")], false)),
            ("beside", |_| page(vec![entry("e", "file")], false)),
            ("itself", |_| page(vec![entry("d", "dir")], false)),
            ("below a link", |_| {
                page(vec![entry("d/a", "link"), entry("d/a/b", "file")], false)
            }),
            ("below a file", |_| {
                page(vec![entry("d/a", "file"), entry("d/a/b", "file")], false)
            }),
            ("below nothing", |_| {
                page(vec![entry("d/a/b", "file")], false)
            }),
            ("backwards", |_| {
                page(vec![entry("d/b", "file"), entry("d/a", "file")], false)
            }),
            ("the same page for ever", |_| {
                page(vec![entry("d/a", "file")], true)
            }),
            ("empty pages for ever", |_| page(Vec::new(), true)),
            ("a page longer than asked for", |_| {
                page(
                    (0..600)
                        .map(|n| entry(&format!("d/{n:04}"), "file"))
                        .collect(),
                    false,
                )
            }),
            ("a device", |_| page(vec![entry("d/a", "device")], false)),
            ("a size beyond all files", |_| {
                page(vec![with(entry("d/a", "file"), "size", u64::MAX)], false)
            }),
            ("no list at all", |_| map([("entries", "none".into())])),
            ("neither entries nor rows", |_| {
                map([("more", false.into())])
            }),
            ("both", |_| {
                let both = page(vec![entry("d/a", "file")], false);
                with(both, "dirs", dirs(vec![("d", vec![row("b", "file")])]))
            }),
            ("rows above", |_| {
                map([("dirs", dirs(vec![("d/..", vec![row("x", "file")])]))])
            }),
            ("rows beside", |_| {
                map([("dirs", dirs(vec![("e", vec![row("x", "file")])]))])
            }),
            ("a row that leads elsewhere", |_| {
                map([("dirs", dirs(vec![("d", vec![row("../x", "file")])]))])
            }),
            ("a row of two names", |_| {
                let rows = vec![row("a", "dir"), row("a/b", "file")];
                map([("dirs", dirs(vec![("d", rows)]))])
            }),
            ("a row that is too short", |_| {
                let short = V::Array(vec!["a".into(), "file".into()]);
                map([("dirs", dirs(vec![("d", vec![short])]))])
            }),
            ("more rows than asked for", |_| {
                let some = |from: u64| (from..from + 300).map(|n| row(&format!("{n:04}"), "file"));
                let two = vec![("d", some(0).collect()), ("d", some(300).collect())];
                map([("dirs", dirs(two))])
            }),
        ];
        for (what, pages) in scripts {
            let hostile = Hostile::new(|_| Vec::new(), move |_, asked| Some(pages(asked))).await;
            let remote = Remote::new(&hostile.connect().await);
            let mut listing = remote.list(Some(&rel("d")), true);
            let mut sound = 0;
            let error = loop {
                match listing.next().await {
                    Some(Ok(_)) => sound += 1,
                    Some(Err(error)) => break error,
                    None => panic!("{what}: taken"),
                }
            };
            assert!(
                matches!(error, TransferError::Protocol(_)),
                "{what}: {error}"
            );
            assert!(sound <= 1, "{what}: {sound}");
            assert!(
                listing.next().await.is_none(),
                "{what}: an error is the last"
            );
        }
    })
    .await;
}

#[tokio::test]
async fn a_long_list_is_read_as_far_as_somebody_reads() {
    bounded(async {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        // Ever new names: as long as it is read, it is a large directory.
        let hostile = Hostile::new(
            |_| Vec::new(),
            move |_, asked| {
                count.fetch_add(1, Ordering::Relaxed);
                let entries = (0..100).map(|n| entry(&format!("{asked:08}-{n:03}"), "file"));
                Some(page(entries.collect(), true))
            },
        )
        .await;
        let remote = Remote::new(&hostile.connect().await);
        let mut listing = remote.list(None, true);
        for _ in 0..1_000 {
            let entry = listing.next().await.expect("more").expect("a sound entry");
            assert!(!entry.path.is_empty());
        }
        drop(listing);
        let asked = asked.load(Ordering::Relaxed);
        assert!(asked <= 12, "{asked} pages for 10");
    })
    .await;
}

#[tokio::test]
async fn answers_without_sense_are_errors() {
    bounded(async {
        let hostile = Hostile::new(
            |_| Vec::new(),
            |event, _| {
                Some(match event {
                    "stat" => entry("x", "socket"),
                    "hash" => map([("size", 1_u64.into()), ("hash", (&[0; 31]).into())]),
                    _ => V::Array(vec![V::Str("x".to_owned())]),
                })
            },
        )
        .await;
        let remote = Remote::new(&hostile.connect().await);
        let protocol = |error| matches!(error, TransferError::Protocol(_));
        assert!(protocol(remote.stat(None).await.expect_err("nonsense")));
        assert!(protocol(
            remote.hash(&rel("f")).await.expect_err("nonsense")
        ));
        assert!(protocol(
            remote.remove(&rel("f"), true).await.expect_err("nonsense")
        ));
        let mut jobs = remote.jobs();
        let first: Option<Result<JobsEvent, _>> = jobs.next().await;
        assert!(matches!(first, Some(Err(TransferError::Protocol(_)))));
        assert!(jobs.next().await.is_none());
    })
    .await;
}
