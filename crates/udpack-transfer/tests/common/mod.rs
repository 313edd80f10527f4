//! What the tests share: a server with a store in a temporary directory, and clients that are let in.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use udpack::{
    Authenticate, Client, CloseCode, Deny, Hello, Identity, Limits, Peer, Server, ServerBuilder,
    Socket, TokenFile,
};
use udpack_transfer::{
    Downloader, Event, Outcome, Overwrite, Receiver, ReceiverConfig, RelPath, Scope, Source, Store,
    StoreConfig, StoreError, TransferError, Upload, Wanted,
};

/// The token that the test server accepts.
pub(crate) const TOKEN: &str = "a-token-that-only-tests-know";

/// Another one, of somebody else.
pub(crate) const OTHER: &str = "a-token-that-only-others-know";

/// Lets in whoever has one of these tokens.
pub(crate) async fn known(hello: Hello) -> Result<Peer, Deny> {
    match hello.token() {
        TOKEN => Ok(Peer::new("tester")),
        OTHER => Ok(Peer::new("other")),
        _ => Err(Deny::auth_failed()),
    }
}

/// A store that replaces what is there.
pub(crate) fn stores() -> StoreConfig {
    StoreConfig {
        overwrite: Overwrite::Always,
        ..StoreConfig::default()
    }
}

/// Every token may read.
pub(crate) fn readable() -> ReceiverConfig {
    ReceiverConfig {
        default_scope: Scope {
            read: true,
            ..Scope::default()
        },
        ..ReceiverConfig::default()
    }
}

/// Nothing in a test takes longer than this.
pub(crate) async fn bounded<F: Future>(future: F) -> F::Output {
    match tokio::time::timeout(Duration::from_secs(60), future).await {
        Ok(output) => output,
        Err(_) => panic!("the test took longer than 60 s"),
    }
}

/// A server that takes uploads.
pub(crate) struct Fixture {
    pub(crate) server: Server,
    pub(crate) store: Store,
    pub(crate) dir: TempDir,
}

impl Fixture {
    pub(crate) async fn new() -> Self {
        Self::with(StoreConfig::default(), ReceiverConfig::default()).await
    }

    pub(crate) async fn with(store: StoreConfig, receiver: ReceiverConfig) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        Self::over(dir, store, receiver).await
    }

    /// A server over what is in this directory.
    pub(crate) async fn over(dir: TempDir, store: StoreConfig, receiver: ReceiverConfig) -> Self {
        let store = Store::open(dir.path().join("up"), store).expect("a store");
        let receiver = Receiver::new(store, receiver);
        Self::serve(dir, receiver, known).await
    }

    /// A server of this receiver, which lets in whom it is told to.
    pub(crate) async fn serve(dir: TempDir, receiver: Receiver, auth: impl Authenticate) -> Self {
        Self::serve_more(dir, receiver, auth, |server| server).await
    }

    /// As [`serve`](Self::serve), with more channels.
    pub(crate) async fn serve_more(
        dir: TempDir,
        receiver: Receiver,
        auth: impl Authenticate,
        more: impl FnOnce(ServerBuilder) -> ServerBuilder,
    ) -> Self {
        let server = Server::builder()
            .identity(Identity::generate().expect("a key"))
            .auth(auth);
        let server = more(receiver.attach(server))
            .bind("127.0.0.1:0")
            .await
            .expect("a free port");
        let store = receiver.store().expect("a store").clone();
        Self { server, store, dir }
    }

    /// Ends the server in order, and starts another over the same directory.
    pub(crate) async fn reopen(self, config: StoreConfig, receiver: ReceiverConfig) -> Self {
        let Self { server, store, dir } = self;
        server.close(CloseCode::NORMAL, "").await;
        drop((server, store));
        let root = dir.path().join("up");
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            match Store::open(&root, config.clone()) {
                Ok(_) => break,
                Err(StoreError::Locked) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(tokio::time::Instant::now() < deadline, "still locked");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self::over(dir, config, receiver).await
    }

    /// All that is in the directory now, as a server finds it that was cut off at this moment.
    pub(crate) fn copy(&self) -> TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        copy(self.dir.path(), dir.path());
        dir
    }

    pub(crate) async fn connect(&self) -> Socket {
        self.connect_as(TOKEN).await
    }

    pub(crate) async fn connect_as(&self, token: &str) -> Socket {
        self.connect_within(token, Limits::default()).await
    }

    /// A client with limits of its own.
    pub(crate) async fn connect_within(&self, token: &str, limits: Limits) -> Socket {
        Client::builder()
            .pin(self.server.fingerprint())
            .token(token)
            .limits(limits)
            .connect(&self.server.local_addr().to_string())
            .await
            .expect("the server lets us in")
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("up")
    }

    pub(crate) fn stored(&self, path: &str) -> Vec<u8> {
        std::fs::read(self.root().join(path)).expect("the file is there")
    }

    /// Names visible in the root, sorted; directories end with `/`.
    pub(crate) fn visible(&self) -> Vec<String> {
        let mut names = Vec::new();
        walk(&self.root(), &self.root(), &mut names);
        names.sort();
        names
    }

    /// Files in staging, but for those with a journal: they wait to be resumed.
    pub(crate) fn staged(&self) -> usize {
        let journals = self.root().join(".udpack/journal");
        std::fs::read_dir(self.root().join(".udpack/staging"))
            .expect("the staging directory")
            .filter(|entry| {
                let name = entry.as_ref().expect("an entry").file_name();
                let journal = Path::new(&name).with_extension("log");
                !journals.join(journal).exists()
            })
            .count()
    }

    /// Waits until nothing is open, and staging is empty but for what can be resumed.
    pub(crate) async fn settled(&self) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while self.staged() > 0 || self.store.usage().open > 0 {
            assert!(
                tokio::time::Instant::now() < deadline,
                "staging is not cleaned up"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn walk(root: &Path, dir: &Path, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let entry = entry.expect("an entry");
        let path = entry.path();
        let name = path
            .strip_prefix(root)
            .expect("below the root")
            .to_string_lossy()
            .into_owned();
        if name == ".udpack" {
            continue;
        }
        if entry.file_type().expect("a type").is_dir() {
            names.push(format!("{name}/"));
            walk(root, &path, names);
        } else {
            names.push(name);
        }
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().expect("a type").is_dir() {
            std::fs::create_dir(&to).expect("a directory");
            let permissions = std::fs::metadata(&from).expect("a directory").permissions();
            std::fs::set_permissions(&to, permissions).expect("a directory");
            copy(&from, &to);
        } else {
            // With permissions; not with times, which only sweeping looks at.
            std::fs::copy(&from, &to).expect("a file");
        }
    }
}

/// Bytes that look random and depend on `seed` only.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut reader = blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof();
    reader.fill(&mut bytes);
    bytes
}

pub(crate) fn rel(path: &str) -> RelPath {
    path.parse().expect("a sound path")
}

pub(crate) fn memory(path: &str, bytes: Vec<u8>) -> Source {
    Source::bytes(bytes, rel(path))
}

/// Runs an upload to its end: what arrived, and what failed.
/// One file, wanted under the name that it has at the server.
pub(crate) fn wanted(path: &str) -> Wanted {
    Wanted {
        remote: rel(path),
        local: rel(path),
        size: None,
    }
}

/// Downloads one file; its outcome, or why there is none.
pub(crate) async fn fetch(downloader: Downloader, path: &str) -> Result<Outcome, TransferError> {
    let mut download = downloader.get([wanted(path)]);
    loop {
        match download.next().await.expect("an outcome") {
            Event::Done(outcome) => return Ok(outcome),
            Event::Failed { error, .. } => return Err(error),
            _ => {}
        }
    }
}

pub(crate) async fn drain(mut upload: Upload) -> (Vec<Outcome>, Vec<(String, TransferError)>) {
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    let mut last = 0;
    while let Some(event) = upload.next().await {
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
    let progress = upload.progress();
    assert_eq!(progress.acked, progress.total, "100 % at the end");
    assert_eq!(progress.files_done, progress.files);
    done.sort_by_key(|outcome| outcome.index);
    (done, failed)
}

/// The token of the client with this name.
pub(crate) fn token(name: &str) -> String {
    format!("{name}-has-a-token-that-only-tests-know")
}

/// A token file at this path, with an entry for each client: its name and its fields.
pub(crate) fn token_file(path: &Path, clients: &[(&str, &str)]) -> TokenFile {
    use std::os::unix::fs::PermissionsExt as _;
    let lines: String = clients
        .iter()
        .map(|(name, fields)| format!("{name} {} {fields}\n", token(name)))
        .collect();
    std::fs::write(path, lines).expect("a file");
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, private).expect("a file of ours");
    TokenFile::open(path).expect("sound entries")
}
