//! Downloads and queries end to end: bytes, names taken, resuming, lost connections, lists, jobs.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Fixture, TOKEN, bounded, noise, rel};
use tempfile::TempDir;
use udpack::{Client, CloseCode, Limits};
use udpack_transfer::{
    Download, Downloader, Entry, ErrorKind, Event, IfExists, JobKind, JobState, JobsEvent, Kind,
    Limiter, Link, Outcome, Overwrite, ReceiverConfig, Remote, Retry, Scope, Store, StoreConfig,
    TransferError, Wanted, apply_entry,
};

const MIB: usize = 1 << 20;

/// A server whose clients may do everything.
async fn open_server() -> Fixture {
    let receiver = ReceiverConfig {
        default_scope: Scope {
            read: true,
            write: true,
            delete: true,
            watch: true,
            admin: true,
            ..Scope::default()
        },
        ..ReceiverConfig::default()
    };
    Fixture::with(StoreConfig::default(), receiver).await
}

/// Where downloads go.
struct Here {
    dir: TempDir,
}

impl Here {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        Self { dir }
    }

    fn store(&self) -> Store {
        let config = StoreConfig {
            overwrite: Overwrite::Always,
            shared: true,
            ..StoreConfig::default()
        };
        Store::open(self.dir.path(), config).expect("a store")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("the file is there")
    }

    /// Names of files visible here.
    fn visible(&self) -> Vec<String> {
        let mut names = Vec::new();
        walk(self.dir.path(), self.dir.path(), &mut names);
        names.sort();
        names
    }
}

fn walk(root: &Path, dir: &Path, names: &mut Vec<String>) {
    for entry in fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        let name = path
            .strip_prefix(root)
            .expect("below")
            .display()
            .to_string();
        if name == ".udpack" {
            continue;
        }
        if path.is_dir() {
            walk(root, &path, names);
        } else {
            names.push(name);
        }
    }
}

fn put(fixture: &Fixture, name: &str, bytes: &[u8]) {
    let path = fixture.root().join(name);
    fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
    fs::write(path, bytes).expect("a stored file");
}

fn wanted(name: &str, size: Option<u64>) -> Wanted {
    Wanted {
        remote: rel(name),
        local: rel(name),
        size,
    }
}

type Failed = Vec<(String, TransferError)>;

/// Runs a download to its end: what arrived, and what failed.
async fn drain(mut download: Download) -> (Vec<Outcome>, Failed) {
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    let mut last = 0;
    while let Some(event) = download.next().await {
        match event {
            Event::Done(outcome) => done.push(outcome),
            Event::Failed { path, error, .. } => failed.push((path, error)),
            Event::Progress(progress) => {
                assert!(progress.acked >= last, "progress went down");
                assert!(progress.acked <= progress.total);
                last = progress.acked;
            }
            _ => {}
        }
    }
    let progress = download.progress();
    assert_eq!(progress.acked, progress.total, "100 % at the end");
    assert_eq!(progress.files_done, progress.files);
    assert!(progress.listed);
    done.sort_by_key(|outcome| outcome.index);
    (done, failed)
}

#[tokio::test]
async fn files_of_every_size_arrive_whole() {
    bounded(async {
        let fixture = open_server().await;
        let here = Here::new();
        let sizes = [0, 1, 255, 262_143, 262_144, 262_145, 1_048_576, 5_000_000];
        for size in sizes {
            put(&fixture, &format!("d/f{size}"), &noise(size as u64, size));
        }
        let socket = fixture.connect().await;
        // Some sizes are known, some are not, some are wrong.
        let files = sizes.map(|size| {
            let told = match size % 3 {
                0 => Some(size as u64),
                1 => None,
                _ => Some(77),
            };
            wanted(&format!("d/f{size}"), told)
        });
        let download = Downloader::new(&socket, here.store()).get(files);
        let (done, failed) = drain(download).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done.len(), sizes.len());
        for (outcome, size) in done.iter().zip(sizes) {
            let bytes = noise(size as u64, size);
            assert_eq!(outcome.path, format!("d/f{size}"));
            assert_eq!(here.read(&outcome.path), bytes);
            assert_eq!(outcome.hash, *blake3::hash(&bytes).as_bytes());
            assert_eq!(
                (outcome.size, outcome.sent, outcome.same),
                (size as u64, size as u64, false)
            );
        }
    })
    .await;
}

#[tokio::test]
async fn many_small_files_share_few_places() {
    bounded(async {
        let fixture = open_server().await;
        let here = Here::new();
        for n in 0..600 {
            put(&fixture, &format!("n{n}"), &noise(n, 100));
        }
        let socket = fixture.connect().await;
        let config = StoreConfig {
            shared: true,
            max_open: 3,
            ..StoreConfig::default()
        };
        let store = Store::open(here.dir.path(), config).expect("a store");
        let files = (0..600).map(|n| wanted(&format!("n{n}"), Some(100)));
        let (done, failed) = drain(Downloader::new(&socket, store).lanes(6).get(files)).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done.len(), 600);
        for n in 0..600 {
            assert_eq!(here.read(&format!("n{n}")), noise(n, 100));
        }
    })
    .await;
}

#[tokio::test]
async fn time_and_permissions_come_along_when_asked() {
    bounded(async {
        let fixture = open_server().await;
        let here = Here::new();
        put(&fixture, "a", b"bytes");
        let stored = fixture.root().join("a");
        let time = std::time::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        fs::File::options()
            .write(true)
            .open(&stored)
            .and_then(|file| file.set_modified(time))
            .expect("a time");
        fs::set_permissions(&stored, fs::Permissions::from_mode(0o751)).expect("a mode");
        let socket = fixture.connect().await;
        let downloader = Downloader::new(&socket, here.store()).preserve(true);
        let (_, failed) = drain(downloader.get([wanted("a", None)])).await;
        assert!(failed.is_empty(), "{failed:?}");
        let metadata = fs::metadata(here.path("a")).expect("it is there");
        assert_eq!(metadata.mode() & 0o777, 0o751);
        assert_eq!(metadata.modified().expect("a time"), time);
    })
    .await;
}

#[tokio::test]
async fn a_name_that_is_taken_is_dealt_with_as_asked() {
    bounded(async {
        let fixture = open_server().await;
        put(&fixture, "f", b"server");
        let socket = fixture.connect().await;
        // Policy, what is here, and: error, same, what is here then, what is beside it then.
        type Row = (
            IfExists,
            &'static [u8],
            Option<ErrorKind>,
            bool,
            &'static [u8],
            &'static [&'static str],
        );
        let rows: [Row; 9] = [
            (IfExists::Same, b"server", None, true, b"server", &["f"]),
            (
                IfExists::Same,
                b"native",
                Some(ErrorKind::Policy),
                false,
                b"native",
                &["f"],
            ),
            (
                IfExists::Same,
                b"longer here",
                Some(ErrorKind::Policy),
                false,
                b"longer here",
                &["f"],
            ),
            (
                IfExists::Error,
                b"server",
                Some(ErrorKind::Policy),
                false,
                b"server",
                &["f"],
            ),
            (IfExists::Skip, b"native", None, false, b"native", &["f"]),
            (
                IfExists::Skip,
                b"longer than it",
                None,
                false,
                b"longer than it",
                &["f"],
            ),
            (IfExists::Skip, b"server", None, true, b"server", &["f"]),
            (
                IfExists::Overwrite,
                b"native",
                None,
                false,
                b"server",
                &["f"],
            ),
            (
                IfExists::Rename,
                b"native",
                None,
                false,
                b"native",
                &["f", "f (1)"],
            ),
        ];
        for (policy, before, error, same, after, names) in rows {
            for size in [None, Some(6)] {
                let here = Here::new();
                fs::write(here.path("f"), before).expect("a local file");
                let downloader = Downloader::new(&socket, here.store()).if_exists(policy);
                let (done, failed) = drain(downloader.get([wanted("f", size)])).await;
                let what = format!("{policy} {before:?} {size:?}");
                let kinds: Vec<_> = failed.iter().map(|(_, error)| error.kind()).collect();
                assert_eq!(kinds, Vec::from_iter(error), "{what}: {failed:?}");
                assert_eq!(done.iter().any(|done| done.same), same, "{what}");
                let skips = policy == IfExists::Skip && before != b"server";
                assert_eq!(done.iter().any(|done| done.skipped), skips, "{what}");
                if same || skips {
                    let there = *blake3::hash(before).as_bytes();
                    let told = (done[0].sent, done[0].size, done[0].hash);
                    assert_eq!(told, (0, before.len() as u64, there), "{what}");
                }
                assert_eq!(here.read("f"), after, "{what}");
                assert_eq!(here.visible(), names, "{what}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn what_the_server_refuses_fails_and_nothing_else() {
    bounded(async {
        let fixture = open_server().await;
        let here = Here::new();
        put(&fixture, "a", b"1");
        put(&fixture, "dir/b", b"2");
        let socket = fixture.connect().await;
        let files = ["a", "missing", "dir", "dir/b"].map(|name| wanted(name, None));
        let (done, failed) = drain(Downloader::new(&socket, here.store()).get(files)).await;
        assert_eq!(done.len(), 2);
        let codes: BTreeMap<_, _> = failed
            .iter()
            .map(|(path, error)| match error {
                TransferError::Refused { code, .. } => (path.as_str(), code.as_str()),
                other => panic!("{other}"),
            })
            .collect();
        assert_eq!(
            codes,
            BTreeMap::from([("dir", "is_directory"), ("missing", "not_found")])
        );
        assert_eq!(here.visible(), ["a", "dir/b"]);

        let deaf = Fixture::new().await;
        let socket = deaf.connect().await;
        let (_, failed) =
            drain(Downloader::new(&socket, here.store()).get([wanted("z", None)])).await;
        assert!(
            matches!(&failed[0].1, TransferError::Refused { code, .. } if code == "forbidden"),
            "{failed:?}"
        );
    })
    .await;
}

/// A client's link to the server. Little is under way at a time: what has arrived is used even when the
/// connection is gone.
fn link(fixture: &Fixture) -> Link {
    let client = Client::builder()
        .pin(fixture.server.fingerprint())
        .token(TOKEN)
        .limits(Limits {
            stream_window: 256 << 10,
            connection_window: 512 << 10,
            ..Limits::default()
        })
        .build()
        .expect("a client");
    Link::new(client, fixture.server.local_addr().to_string()).retry(Retry {
        first: Duration::from_millis(10),
        ..Retry::default()
    })
}

#[tokio::test]
async fn a_lost_connection_is_made_again_and_nothing_is_lost() {
    bounded(async {
        let fixture = open_server().await;
        let here = Here::new();
        let size = 4 * MIB;
        for n in 0..6 {
            put(&fixture, &format!("f{n}"), &noise(n, size));
        }
        let files = (0..6).map(move |n| wanted(&format!("f{n}"), Some(size as u64)));
        // Slow enough to be cut in the middle.
        let mut download = Downloader::new(link(&fixture), here.store())
            .limit(Limiter::new(10 << 20))
            .get(files);
        let (mut cuts, mut done, mut back) = (0, 0, 0);
        let mut cut = BTreeSet::new();
        while let Some(event) = download.next().await {
            match event {
                Event::Progress(progress) => {
                    let far = progress.acked > (cuts + 1) * 4 * MIB as u64;
                    if far && cuts == back && cuts < 3 {
                        for socket in fixture.server.sockets() {
                            if cut.insert(socket.id().to_owned()) {
                                cuts += 1;
                                socket.abort(CloseCode::SHUTTING_DOWN, "cut");
                            }
                        }
                    }
                }
                Event::Done(_) => done += 1,
                Event::Connected => back += 1,
                Event::Failed { path, error, .. } => panic!("{path}: {error}"),
                _ => {}
            }
        }
        assert_eq!((cuts, back, done), (3, 3, 6));
        for n in 0..6 {
            assert_eq!(here.read(&format!("f{n}")), noise(n, size));
        }
    })
    .await;
}

#[tokio::test]
async fn a_download_that_was_dropped_is_resumed() {
    bounded(async {
        let fixture = open_server().await;
        let here = Here::new();
        let bytes = noise(1, 24 * MIB);
        put(&fixture, "big", &bytes);
        let socket = fixture.connect().await;
        let size = Some(bytes.len() as u64);
        let mut download = Downloader::new(&socket, here.store())
            .limit(Limiter::new(40 << 20))
            .get([wanted("big", size)]);
        loop {
            match download.next().await {
                Some(Event::Progress(progress)) if progress.acked > 8 * MIB as u64 => break,
                Some(Event::Done(_)) | None => panic!("too fast to be dropped"),
                Some(_) => {}
            }
        }
        drop(download);
        assert!(
            here.visible().is_empty(),
            "nothing is visible before the end"
        );
        // The old one lets go of the file when its last write is done.
        let done = loop {
            let mut download = Downloader::new(&socket, here.store()).get([wanted("big", size)]);
            let (mut resumed, mut done, mut busy) = (0, None, false);
            while let Some(event) = download.next().await {
                match event {
                    Event::Resumed { bytes, .. } => resumed = bytes,
                    Event::Done(outcome) => done = Some(outcome),
                    Event::Failed { error, .. } => {
                        assert!(error.retry(), "{error}");
                        busy = true;
                    }
                    _ => {}
                }
            }
            if let Some(done) = done {
                assert_eq!(done.resumed, resumed);
                break done;
            }
            assert!(busy);
            tokio::task::yield_now().await;
        };
        assert!(done.resumed > 4 * MIB as u64, "resumed {}", done.resumed);
        assert_eq!(done.sent + done.resumed, done.size);
        assert_eq!(here.read("big"), bytes);
    })
    .await;
}

async fn all(remote: &Remote, path: Option<&str>, recursive: bool) -> Vec<Entry> {
    let path = path.map(rel);
    let mut listing = remote.list(path.as_ref(), recursive);
    let mut entries = Vec::new();
    while let Some(entry) = listing.next().await {
        entries.push(entry.expect("a sound entry"));
    }
    entries
}

#[tokio::test]
async fn a_tree_is_listed_in_order_page_by_page() {
    bounded(async {
        let fixture = open_server().await;
        for n in 0..1_300 {
            put(&fixture, &format!("many/n{n}"), b"x");
        }
        put(&fixture, "a/b/c", b"123");
        fs::create_dir(fixture.root().join("empty")).expect("a directory");
        std::os::unix::fs::symlink("b/c", fixture.root().join("a/link")).expect("a link");
        let remote = Remote::new(&fixture.connect().await);

        let tree = all(&remote, None, true).await;
        let names: Vec<_> = tree.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(names[..6], ["a", "a/b", "a/b/c", "a/link", "empty", "many"]);
        assert_eq!(names.len(), 1_306);
        let kinds: Vec<_> = tree[..5].iter().map(|entry| entry.kind).collect();
        assert_eq!(
            kinds,
            [Kind::Dir, Kind::Dir, Kind::File, Kind::Link, Kind::Dir]
        );
        assert_eq!(tree[3].target.as_deref(), Some("b/c"));

        let top = all(&remote, None, false).await;
        let names: Vec<_> = top.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(names, ["a", "empty", "many"]);
        assert_eq!(all(&remote, Some("many"), false).await.len(), 1_300);
        let one = all(&remote, Some("a/b/c"), true).await;
        assert_eq!((one.len(), one[0].size), (1, 3));

        // What a list gives can be made here.
        let here = Here::new();
        let store = here.store();
        for entry in &tree[..5] {
            let made = apply_entry(&store, entry, &rel(&entry.path), IfExists::Same, true, None);
            assert!(!made.expect("it can be made").same, "{entry:?}");
        }
        assert!(here.path("empty").is_dir());
        assert_eq!(
            fs::read_link(here.path("a/link")).expect("a link"),
            Path::new("b/c")
        );
    })
    .await;
}

#[tokio::test]
async fn files_are_looked_at_hashed_and_removed() {
    bounded(async {
        let fixture = open_server().await;
        put(&fixture, "a/b", b"12345");
        let remote = Remote::new(link(&fixture));
        let entry = remote.stat(Some(&rel("a/b"))).await.expect("it is there");
        assert_eq!(
            (entry.path.as_str(), entry.kind, entry.size),
            ("a/b", Kind::File, 5)
        );
        assert_eq!(remote.stat(None).await.expect("the root").kind, Kind::Dir);
        let (size, hash) = remote.hash(&rel("a/b")).await.expect("a hash");
        assert_eq!((size, hash), (5, *blake3::hash(b"12345").as_bytes()));

        let code = |result: Result<_, TransferError>| match result {
            Err(TransferError::Refused { code, .. }) => code,
            Err(other) => panic!("{other}"),
            Ok(()) => panic!("it was granted"),
        };
        let gone = remote.stat(Some(&rel("gone"))).await.map(|_| ());
        assert_eq!(code(gone), "not_found");
        let full = remote.remove(&rel("a"), false).await.map(|_| ());
        assert_eq!(code(full), "not_empty");

        // Requests outlive their connection.
        for socket in fixture.server.sockets() {
            socket.abort(CloseCode::SHUTTING_DOWN, "cut");
        }
        let removed = remote.remove(&rel("a"), true).await.expect("it is removed");
        assert_eq!((removed.files, removed.bytes), (1, 5));
        assert_eq!(fixture.visible(), Vec::<String>::new());
    })
    .await;
}

#[tokio::test]
async fn transfers_are_watched_and_cancelled() {
    bounded(async {
        let fixture = open_server().await;
        let here = Here::new();
        // More than fits into what is under way.
        put(&fixture, "big", &vec![0; 64 * MIB]);
        let socket = fixture.connect().await;
        let mut jobs = Remote::new(&socket).jobs();
        let first = jobs.next().await.expect("a list").expect("a sound list");
        assert_eq!(first, JobsEvent::List(Vec::new()));
        let download = Downloader::new(&socket, here.store())
            .limit(Limiter::new(8 << 20))
            .get([wanted("big", None)]);
        let (failed, job) = tokio::join!(async { drain(download).await.1 }, async {
            loop {
                match jobs.next().await {
                    Some(Ok(JobsEvent::Changed(job))) if job.state == JobState::Running => {
                        jobs.cancel(job.id, None)
                            .await
                            .expect("it may be cancelled");
                    }
                    Some(Ok(JobsEvent::Changed(job))) => break job,
                    Some(Ok(_)) => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        assert_eq!((job.kind, job.path.as_str()), (JobKind::Get, "big"));
        assert_eq!(job.state, JobState::Cancelled);
        assert!(
            matches!(&failed[0].1, TransferError::Refused { code, .. } if code == "cancelled"),
            "{failed:?}"
        );
        let unknown = jobs.cancel(u64::MAX, None).await;
        assert!(
            matches!(&unknown, Err(TransferError::Refused { code, .. }) if code == "not_found"),
            "{unknown:?}"
        );
    })
    .await;
}
