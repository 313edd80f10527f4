//! Sinks: those of this crate pass the tests for all, and a server serves files from one that is no directory.

mod common;

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use udpack::{Client, CloseCode, Hello, Identity, Peer, Server, Socket};
use udpack_transfer::testing::sink_conforms;
use udpack_transfer::{
    Abilities, Accepted, Answer, Begun, Durable, Expected, Fetch, Hook, HookOffer, HookStored,
    HookWhole, Memory, MemoryUpload, MemoryWhole, Meta, NewUpload, Overwrite, Published, Range,
    Receiver, ReceiverConfig, RelPath, Remote, Scope, Sink, Source, Store, StoreConfig, StoreError,
    TransferError, Uploader,
};

use common::{bounded, drain, memory, noise, rel};

#[tokio::test]
async fn memory_conforms() {
    let make = async || Memory::new(64 << 20).overwrite(Overwrite::Always);
    sink_conforms(make, async |files, path| files.get(path.as_str())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_conforms() {
    let dirs = tempfile::tempdir().expect("a temporary directory");
    let made = AtomicU32::new(0);
    let make = async || {
        let number = made.fetch_add(1, Ordering::Relaxed);
        let config = StoreConfig {
            overwrite: Overwrite::Always,
            min_free: Some(0),
            ..StoreConfig::default()
        };
        Store::open(dirs.path().join(number.to_string()), config).expect("a store")
    };
    let bytes = async |store: &Store, path: &RelPath| {
        let bytes = std::fs::read(store.root().join(path.as_str())).ok();
        bytes.map(Bytes::from)
    };
    sink_conforms(make, bytes).await;
    for number in 0..made.into_inner() {
        let staging = dirs.path().join(format!("{number}/.udpack/staging"));
        // What two tests leave suspended on purpose is all that there is.
        let left = std::fs::read_dir(staging).expect("a directory").count();
        assert!(left <= 1, "store {number} holds {left}");
    }
}

/// Files in memory, where a write may wait for ever, and a name may be refused.
#[derive(Clone)]
struct Gate {
    files: Memory,
    resume: bool,
    /// Writes from this offset on wait.
    closed_at: Arc<AtomicU64>,
    /// Bytes that were taken.
    taken: Arc<AtomicU64>,
    reached: Arc<Notify>,
    ended: Arc<Notify>,
}

struct GateUpload {
    inner: Option<MemoryUpload>,
    ended: Arc<Notify>,
}

impl Drop for GateUpload {
    fn drop(&mut self) {
        drop(self.inner.take());
        self.ended.notify_one();
    }
}

impl Gate {
    fn new() -> Self {
        Self {
            files: Memory::new(64 << 20),
            resume: true,
            closed_at: Arc::new(AtomicU64::new(u64::MAX)),
            taken: Arc::default(),
            reached: Arc::default(),
            ended: Arc::default(),
        }
    }
}

fn gone<T>(inner: Option<T>) -> Result<T, StoreError> {
    inner.ok_or(StoreError::Broken)
}

impl Sink for Gate {
    type Upload = GateUpload;
    type Whole = MemoryWhole;

    fn abilities(&self) -> Abilities {
        Abilities {
            resume: self.resume,
            ..Abilities::default()
        }
    }

    async fn begin(&self, new: &NewUpload<'_>) -> Result<Begun<GateUpload>, StoreError> {
        assert!(self.resume || !new.resumable, "it was not asked for more");
        Ok(match self.files.begin(new).await? {
            Begun::New(inner) => Begun::New(GateUpload {
                inner: Some(inner),
                ended: self.ended.clone(),
            }),
            Begun::Exists(stored) => Begun::Exists(stored),
        })
    }

    fn durable(&self, upload: &GateUpload) -> Durable {
        let inner = upload.inner.as_ref();
        inner.map_or_else(Durable::default, |inner| self.files.durable(inner))
    }

    async fn have(&self, upload: &mut GateUpload) -> Result<Vec<Range>, StoreError> {
        self.files.have(gone(upload.inner.as_mut())?).await
    }

    async fn write(
        &self,
        upload: &mut GateUpload,
        offset: u64,
        bytes: Bytes,
    ) -> Result<(), StoreError> {
        if offset >= self.closed_at.load(Ordering::Relaxed) {
            self.reached.notify_one();
            std::future::pending::<()>().await;
        }
        self.taken.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let upload = gone(upload.inner.as_mut())?;
        self.files.write(upload, offset, bytes).await
    }

    async fn checkpoint(&self, upload: &mut GateUpload) -> Result<(), StoreError> {
        self.files.checkpoint(gone(upload.inner.as_mut())?).await
    }

    fn is_due(&self, _: u64, _: Duration) -> bool {
        true
    }

    async fn finish(
        &self,
        mut upload: GateUpload,
        expected: Expected,
    ) -> Result<MemoryWhole, StoreError> {
        self.files
            .finish(gone(upload.inner.take())?, expected)
            .await
    }

    async fn publish(&self, whole: MemoryWhole) -> Result<Published, StoreError> {
        self.files.publish(whole).await
    }

    async fn abort(&self, mut upload: GateUpload) {
        if let Some(inner) = upload.inner.take() {
            self.files.abort(inner).await;
        }
    }
}

/// A server whose files go into this sink, and that lets everybody do everything.
async fn serve(sink: impl Sink, hook: Option<Refuses>) -> Server {
    let config = ReceiverConfig {
        default_scope: Scope {
            read: true,
            delete: true,
            ..Scope::default()
        },
        ..ReceiverConfig::default()
    };
    let mut receiver = Receiver::into_sink(sink, config);
    if let Some(hook) = hook {
        receiver = receiver.hook(hook);
    }
    assert!(receiver.store().is_none());
    receiver
        .attach(Server::builder())
        .identity(Identity::generate().expect("a key"))
        .auth(async |_: Hello| Ok(Peer::new("tester")))
        .bind("127.0.0.1:0")
        .await
        .expect("a free port")
}

async fn connect(server: &Server) -> Socket {
    let client = Client::builder().pin(server.fingerprint());
    let addr = server.local_addr().to_string();
    client.connect(&addr).await.expect("it lets everybody in")
}

#[tokio::test]
async fn a_server_serves_files_that_are_in_memory() {
    let files = Memory::new(64 << 20);
    let server = serve(files.clone(), None).await;
    let socket = connect(&server).await;
    let large = noise(1, 3 << 20);
    let sources = || {
        vec![
            memory("a/large", large.clone()),
            memory("a/small", noise(2, 100)),
            memory("empty", Vec::new()),
        ]
    };
    for same in [false, true] {
        let (done, failed) = bounded(drain(Uploader::new(&socket).put(sources()))).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done.len(), 3);
        assert!(done.iter().all(|outcome| outcome.same == same));
    }
    assert_eq!(files.names(), ["a/large", "a/small", "empty"]);
    assert_eq!(files.get("a/large").expect("it is stored"), large);
    assert_eq!(files.get("a/small").expect("it is stored"), noise(2, 100));
    assert_eq!(files.used(), (3 << 20) + 100 + 1024);

    let mut arrived = Vec::new();
    let fetch = Fetch::new(&socket);
    bounded(fetch.read(&rel("a/large"), &mut arrived))
        .await
        .expect("it is there");
    assert!(arrived == large, "what is read is what was sent");

    let remote = Remote::new(&socket);
    let (size, hash) = bounded(remote.hash(&rel("a/large"))).await.expect("a hash");
    assert_eq!((size, hash), (3 << 20, *blake3::hash(&large).as_bytes()));
    let mut listing = remote.list(None, true);
    let mut names = Vec::new();
    while let Some(entry) = bounded(listing.next()).await {
        names.push(entry.expect("an entry").path);
    }
    assert_eq!(names, ["a", "a/large", "a/small", "empty"]);
    let removed = bounded(remote.remove(&rel("a"), true))
        .await
        .expect("it is removed");
    assert_eq!((removed.files, removed.bytes), (2, (3 << 20) + 100));
    assert_eq!(files.names(), ["empty"]);

    let dir = Source::dir(rel("d"), Meta::default());
    let (_, failed) = bounded(drain(Uploader::new(&socket).put([dir]))).await;
    assert_eq!(code(&failed[0].1), "unsupported");
}

fn code(error: &TransferError) -> &str {
    match error {
        TransferError::Refused { code, .. } => code.as_str(),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn what_a_sink_cannot_do_is_refused() {
    let gate = Gate::new();
    let server = serve(gate.clone(), None).await;
    let socket = connect(&server).await;
    let remote = Remote::new(&socket);
    let listed = bounded(remote.list(None, true).next())
        .await
        .expect("an answer");
    assert_eq!(code(&listed.expect_err("it lists nothing")), "unsupported");
    let hash = bounded(remote.hash(&rel("x"))).await;
    assert_eq!(code(&hash.expect_err("it reads nothing")), "unsupported");
    let removed = bounded(remote.remove(&rel("x"), false)).await;
    assert_eq!(
        code(&removed.expect_err("it removes nothing")),
        "unsupported"
    );
    let fetched = bounded(Fetch::new(&socket).read(&rel("x"), &mut Vec::new())).await;
    assert_eq!(
        code(&fetched.expect_err("it reads nothing").cause),
        "unsupported"
    );
}

#[tokio::test]
async fn an_upload_that_a_sink_keeps_is_taken_up_again() {
    for resume in [true, false] {
        let gate = Gate {
            resume,
            ..Gate::new()
        };
        let server = serve(gate.clone(), None).await;
        // More than waits for the sink, so that its end is not here yet.
        let all = noise(3, 8 << 20);
        gate.closed_at.store(2 << 20, Ordering::Relaxed);
        let socket = connect(&server).await;
        let upload = Uploader::new(&socket).put([memory("big", all.clone())]);
        let uploading = tokio::spawn(drain(upload));
        bounded(gate.reached.notified()).await;
        // 64 KiB with the offer, then messages of 256 KiB.
        let before = gate.taken.load(Ordering::Relaxed);
        assert_eq!(before, (2 << 20) + (64 << 10));
        // The write that waits is given up with its lane.
        uploading.abort();
        socket.close(CloseCode::NORMAL, "").await;
        bounded(gate.ended.notified()).await;
        assert_eq!(gate.files.get("big"), None);

        gate.closed_at.store(u64::MAX, Ordering::Relaxed);
        let socket = connect(&server).await;
        let again = Uploader::new(&socket).put([memory("big", all.clone())]);
        let (done, failed) = bounded(drain(again)).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done.len(), 1);
        assert_eq!(gate.files.get("big").expect("it is stored"), all);
        let taken = gate.taken.load(Ordering::Relaxed);
        if resume {
            // The first bytes of a run come before it is told what is there.
            assert!(taken <= (8 << 20) + (64 << 10), "{taken}");
        } else {
            assert_eq!(taken, before + (8 << 20));
        }
    }
}

/// Agrees to no file, and notes where it lies.
struct Refuses(Arc<Mutex<Vec<HookWhole>>>);

impl Hook for Refuses {
    fn accept<'a>(
        &'a self,
        _: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    fn verify<'a>(&'a self, whole: &'a HookWhole) -> Answer<'a> {
        self.0.lock().expect("no panic").push(whole.clone());
        Box::pin(std::future::ready(Err("not this one".to_owned())))
    }

    fn done(&self, stored: HookStored) {
        panic!("{stored:?}");
    }
}

#[tokio::test]
async fn a_file_that_the_hook_refuses_leaves_nothing_in_a_sink() {
    let files = Memory::new(64 << 20);
    let seen = Arc::default();
    let server = serve(files.clone(), Some(Refuses(Arc::clone(&seen)))).await;
    let socket = connect(&server).await;
    let sources = [
        memory("small", noise(4, 10)),
        memory("large", noise(4, 1 << 20)),
    ];
    let (_, failed) = bounded(drain(Uploader::new(&socket).put(sources))).await;
    let codes: Vec<_> = failed.iter().map(|(_, error)| code(error)).collect();
    assert_eq!(codes, ["refused", "refused"]);
    assert_eq!((files.names().len(), files.used()), (0, 0));
    let mut seen = std::mem::take(&mut *seen.lock().expect("no panic"));
    seen.sort_by_key(|whole| whole.size);
    let seen: Vec<_> = seen
        .iter()
        .map(|whole| (&*whole.path, whole.size))
        .collect();
    assert_eq!(seen, [("small", 10), ("large", 1 << 20)]);
}
