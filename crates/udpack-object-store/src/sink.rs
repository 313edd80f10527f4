//! [`ObjectSink`]: the sink itself. What it opens, what it counts, and what it cleans up.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use object_store::path::Path;
use object_store::{Error as Cause, ObjectStoreExt as _, PutMode, PutOptions};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use udpack_transfer::{
    Abilities, Begun, Durable, Entry, Expected, List, Names, NewDir, NewUpload, Overwrite, Page,
    Placed, Published, Range, RelPath, Removed, Sink, StoreError, Stored, names,
};

use crate::backend::Backend;
use crate::error::{self, OpenError, Trouble, trouble};
use crate::journal::{self, Found, Journal, Key, Record};
use crate::publish::ObjectWhole;
use crate::quota::Accounts;
use crate::upload::ObjectUpload;

/// What an [`ObjectSink`] takes, and how much it has under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectConfig {
    /// Bytes of a part: a power of two. Defaults to 8 MiB. The parts of a file are larger where it would have more than 10,000 of them. A file of
    /// unknown size has parts of twice this.
    pub part: u64,
    /// Parts of one upload that are on their way at once. Defaults to 4.
    pub in_flight: usize,
    /// Bytes that wait for the store or are on their way, all uploads together. Defaults to 256 MiB. One peer has at most half of it.
    pub budget: u64,
    /// Largest file, in bytes. Defaults to `None`: 10,000 parts of a quarter of the budget.
    pub max_file: Option<u64>,
    /// Most bytes of all files together, uploads under way included; an empty one counts 1,024. Defaults to `None`. Counted by listing.
    pub quota: Option<u64>,
    /// Which names may be stored. Defaults to [`Names::Any`].
    pub names: Names,
    /// What a client may ask for, at most, when the name is taken. Defaults to [`Overwrite::Never`].
    pub overwrite: Overwrite,
    /// How long an interrupted upload is kept after its last part. Defaults to 24 hours.
    pub expire: Duration,
    /// Settings that the environment does not have. Defaults to none.
    pub settings: Settings,
}

/// Settings of a store, such as `aws_endpoint`, which count more than those of the environment. `Debug` shows no value.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Settings(Vec<(String, String)>);

impl Settings {
    /// Pairs of a name, as the crate `object_store` has it, and a value.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(pairs.into_iter().collect())
    }

    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.pairs().map(|(name, _)| name))
            .finish()
    }
}

impl Default for ObjectConfig {
    fn default() -> Self {
        Self {
            part: 8 << 20,
            in_flight: 4,
            budget: 256 << 20,
            max_file: None,
            quota: None,
            names: Names::Any,
            overwrite: Overwrite::Never,
            expire: Duration::from_secs(24 * 60 * 60),
            settings: Settings::default(),
        }
    }
}

/// Files in an object store. A handle: clones share the store, the journals and the budget.
///
/// Must be used within a tokio runtime.
#[derive(Clone, Debug)]
pub struct ObjectSink {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) backend: Backend,
    pub(crate) config: ObjectConfig,
    /// Where the journals are.
    pub(crate) dir: PathBuf,
    /// Completing an upload of several parts can be refused by the store itself.
    pub(crate) conditional: bool,
    exclusive: bool,
    budget: Arc<Semaphore>,
    shares: Mutex<HashMap<String, Weak<Semaphore>>>,
    live: Mutex<HashSet<Key>>,
    /// Numbered names that uploads under way shall get.
    promised: Mutex<HashSet<String>>,
    /// Directories that were seen to be none a file, and when.
    pub(crate) passable: Mutex<HashMap<String, Instant>>,
    pub(crate) accounts: Mutex<Accounts>,
    /// Held for its lock.
    _lock: File,
}

/// A part of the budget.
#[derive(Debug)]
pub(crate) struct Hold {
    _share: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

/// Nobody else works on this upload.
#[derive(Debug)]
pub(crate) struct Live {
    inner: Arc<Inner>,
    pub(crate) key: Key,
}

impl Drop for Live {
    fn drop(&mut self) {
        lock(&self.inner.live).remove(&self.key);
    }
}

/// No other upload of this server is promised the name.
#[derive(Debug)]
pub(crate) struct Promise {
    inner: Arc<Inner>,
    name: String,
}

impl Drop for Promise {
    fn drop(&mut self) {
        lock(&self.inner.promised).remove(&self.name);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change leaves the state consistent.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    pub(crate) fn live(self: &Arc<Self>, key: Key) -> Option<Live> {
        let free = lock(&self.live).insert(key.clone());
        let inner = self.clone();
        free.then_some(Live { inner, key })
    }

    pub(crate) fn promise(self: &Arc<Self>, name: &str) -> Option<Promise> {
        let (inner, name) = (self.clone(), name.to_owned());
        let free = lock(&self.promised).insert(name.clone());
        free.then_some(Promise { inner, name })
    }

    /// A part of the budget; waits for it, but not for ever.
    pub(crate) async fn hold(&self, peer: &str, bytes: u64) -> Result<Hold, StoreError> {
        let share = {
            let mut shares = lock(&self.shares);
            shares.retain(|_, share| share.strong_count() > 0);
            let held = shares.get(peer).and_then(Weak::upgrade);
            held.unwrap_or_else(|| {
                let share = Arc::new(Semaphore::new(permits(self.config.budget / 2)));
                shares.insert(peer.to_owned(), Arc::downgrade(&share));
                share
            })
        };
        let permits = u32::try_from(permits(bytes)).unwrap_or(u32::MAX);
        let taking = async {
            Ok::<_, tokio::sync::AcquireError>(Hold {
                _share: share.acquire_many_owned(permits).await?,
                _all: self.budget.clone().acquire_many_owned(permits).await?,
            })
        };
        match tokio::time::timeout(TURN, taking).await {
            Ok(Ok(hold)) => Ok(hold),
            _ => Err(StoreError::Unavailable {
                why: "too many bytes wait for its object store".to_owned(),
            }),
        }
    }

    /// The key of a name.
    pub(crate) fn key(&self, path: &RelPath) -> Result<Path, StoreError> {
        let unstorable = || StoreError::Unstorable { path: path.clone() };
        if names::holds_bytes(path.as_str()) {
            return Err(unstorable());
        }
        self.backend.key(path.as_str()).ok_or_else(unstorable)
    }

    /// A key of our own, which no client can name.
    pub(crate) fn own(&self, name: &str) -> Result<Path, StoreError> {
        let key = self.backend.key(&format!("{OWN}/{name}"));
        key.ok_or(StoreError::Broken)
    }

    /// Blocking work on the journals, which goes on when the future is dropped.
    pub(crate) async fn aside<T: Send + 'static>(
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|_| StoreError::Broken)?
            .map_err(error::journal)
    }

    /// Ends an upload in the store and forgets it. What fails is tried again by a sweep.
    pub(crate) async fn end(self: &Arc<Self>, journal: Journal) {
        let dir = self.dir.clone();
        if let Ok(gone) = Self::aside(move || journal.doom(&dir)).await {
            self.end_gone(gone).await;
        }
    }

    /// Whether nothing is left of it.
    async fn end_gone(self: &Arc<Self>, gone: PathBuf) -> bool {
        let path = gone.clone();
        let Ok(record) = Self::aside(move || journal::gone(&path)).await else {
            return false;
        };
        if let Some(record) = record
            && let Err(cause) = self.end_in_store(&record).await
        {
            tracing::warn!(
                error = error::text(&cause),
                "cannot end an upload in the object store"
            );
            return false;
        }
        Self::aside(move || std::fs::remove_file(gone))
            .await
            .is_ok()
    }

    async fn end_in_store(&self, record: &Record) -> Result<(), Cause> {
        let object = Path::parse(&record.head.object)?;
        let mut ids: Vec<String> = record.id.clone().into_iter().collect();
        // The store's answer may have been lost, in a crash or before it was asked again.
        ids.extend(self.unknown(&object).await?);
        for id in &ids {
            missing_is_done(self.backend.parts.abort_multipart(&object, id).await)?;
        }
        if self.is_own(&object) {
            missing_is_done(self.backend.store.delete(&object).await)?;
        }
        Ok(())
    }

    /// Uploads of this key in S3 that no journal here knows.
    async fn unknown(&self, object: &Path) -> Result<Vec<String>, Cause> {
        let Some(s3) = &self.backend.s3 else {
            return Ok(Vec::new());
        };
        let mut ids = s3.uploads(object).await?;
        if !ids.is_empty() {
            let known = self.known();
            ids.retain(|id| !known.contains(id));
        }
        Ok(ids)
    }

    fn is_own(&self, key: &Path) -> bool {
        let name = self.backend.name(key);
        name.is_some_and(|name| name.split('/').next() == Some(OWN))
    }

    /// Ids that journals have.
    fn known(&self) -> HashSet<String> {
        let found = journal::all(&self.dir).unwrap_or_default();
        let kept = found.into_iter().filter_map(|found| match found {
            Found::Kept { key, .. } => journal::gone(&key.file(&self.dir)).ok()?,
            Found::Gone(path) => journal::gone(&path).ok()?,
        });
        kept.filter_map(|record| record.id).collect()
    }

    async fn sweep(self: &Arc<Self>) -> Result<usize, StoreError> {
        let dir = self.dir.clone();
        let found = Self::aside(move || journal::all(&dir)).await?;
        let mut ended = 0;
        for found in found {
            match found {
                Found::Gone(gone) => ended += usize::from(self.end_gone(gone).await),
                Found::Kept { key, age } => {
                    let Some(live) = self.live(key) else {
                        continue;
                    };
                    let (dir, key) = (self.dir.clone(), live.key.clone());
                    let record = Self::aside(move || {
                        let resumed = Journal::resume(&dir, &key)?;
                        if resumed.is_none() {
                            // Not even what it was for was on disk, so the store was not asked.
                            std::fs::remove_file(key.file(&dir))?;
                        }
                        Ok(resumed)
                    });
                    if let Some((journal, record)) = record.await?
                        && (!record.head.resumable
                            || record.id.is_none()
                            || age >= self.config.expire)
                    {
                        self.end(journal).await;
                        ended += 1;
                    }
                }
            }
        }
        self.sweep_parts().await?;
        Ok(ended)
    }

    /// Parts on this machine that no journal knows.
    async fn sweep_parts(self: &Arc<Self>) -> Result<(), StoreError> {
        if self.backend.sorted {
            return Ok(());
        }
        let inner = self.clone();
        Self::aside(move || {
            let parts = inner.dir.join("parts");
            let there = crate::local::uploads(&parts)?;
            // The journal of one that began meanwhile has it by now, or it is younger than this.
            let known = inner.known();
            for id in there.iter().filter(|id| !known.contains(*id)) {
                let dir = parts.join(id);
                let age = dir.metadata()?.modified()?.elapsed().unwrap_or_default();
                if age >= YOUNG {
                    std::fs::remove_dir_all(dir)?;
                }
            }
            Ok(())
        })
        .await
    }
}

fn missing_is_done(done: Result<(), Cause>) -> Result<(), Cause> {
    match done {
        Err(cause) if trouble(&cause) == Trouble::Missing => Ok(()),
        done => done,
    }
}

/// What a number of bytes takes of the budget, which is counted in KiB.
fn permits(bytes: u64) -> usize {
    let permits = bytes.div_ceil(1 << 10).max(1);
    usize::try_from(permits).map_or(Semaphore::MAX_PERMITS, |it| it.min(Semaphore::MAX_PERMITS))
}

impl ObjectSink {
    /// Opens the store at an address such as `s3://bucket/prefix`, with the credentials and settings that the environment has, in the
    /// variables that the crate `object_store` reads. Journals are kept in a directory of this machine, which is made if it is missing.
    ///
    /// Tries whether the store takes an object and refuses one whose key is taken, under a key of its own, and ends what uploads cut off by
    /// a crash left in the store.
    ///
    /// # Errors
    /// When the address, the settings, the store or the directory cannot be used.
    pub async fn open(
        url: &str,
        journals: PathBuf,
        config: ObjectConfig,
    ) -> Result<Self, OpenError> {
        let dir = Self::journals(&journals)?;
        let backend = Backend::open(url, &config.settings, &dir)?;
        Self::over(backend, dir, config).await
    }

    /// The directory of the journals, made if need be.
    pub(crate) fn journals(root: &FilePath) -> Result<PathBuf, OpenError> {
        let dir = root.join(OWN).join("objects");
        match std::fs::create_dir_all(&dir) {
            Ok(()) => Ok(dir),
            Err(cause) => Err(OpenError::Journals { dir, cause }),
        }
    }

    /// One whose objects are in memory, for tests; the journals are on disk.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub async fn memory(journals: PathBuf, config: ObjectConfig) -> Result<Self, OpenError> {
        Self::over(Backend::memory(), journals, config).await
    }

    async fn over(backend: Backend, dir: PathBuf, config: ObjectConfig) -> Result<Self, OpenError> {
        let ObjectConfig { part, budget, .. } = config;
        if !part.is_power_of_two() || part < 1024 || part > budget / 4 {
            return Err(OpenError::Parts { part, budget });
        }
        let lock = File::create(dir.join("lock")).map_err(|cause| OpenError::Journals {
            dir: dir.clone(),
            cause,
        })?;
        let locked = rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        locked.map_err(|_| OpenError::Locked { dir: dir.clone() })?;
        let mut inner = Inner {
            conditional: backend.s3.is_some(),
            exclusive: true,
            budget: Arc::new(Semaphore::new(permits(budget))),
            shares: Mutex::default(),
            live: Mutex::default(),
            promised: Mutex::default(),
            passable: Mutex::default(),
            accounts: Mutex::default(),
            backend,
            config,
            dir,
            _lock: lock,
        };
        inner.exclusive = inner.probe().await?;
        let sink = Self {
            inner: Arc::new(inner),
        };
        if let Err(error) = sink.sweep().await {
            tracing::warn!(%error, "cannot look for what a crash left in the object store");
        }
        Ok(sink)
    }

    /// Whether the store itself refuses a name that is taken, so that of two uploads which end at once one gets it.
    pub fn is_exclusive(&self) -> bool {
        self.inner.exclusive
    }

    /// The address of the store.
    pub fn url(&self) -> &str {
        &self.inner.backend.url
    }

    /// Ends, in the store as well, what is interrupted for longer than [`ObjectConfig::expire`] or cannot be resumed: how many uploads
    /// that were. To be called from time to time.
    ///
    /// # Errors
    /// When the journals cannot be read. What the store refuses to end stays for the next time.
    pub async fn sweep(&self) -> Result<usize, StoreError> {
        self.inner.sweep().await
    }
}

impl Inner {
    /// Whether the store refuses what is there, by a single request and by the completion of parts.
    async fn probe(&self) -> Result<bool, OpenError> {
        let refused = |action| {
            let url = self.backend.url.clone();
            move |cause| OpenError::Refused {
                url,
                action,
                cause: Box::new(cause),
            }
        };
        let Ok(key) = self.own("probe") else {
            return Err(OpenError::Address {
                url: self.backend.url.clone(),
            });
        };
        let put = async || {
            let options = PutOptions::from(PutMode::Create);
            let put =
                self.backend
                    .store
                    .put_opts(&key, Bytes::from_static(b"udpack").into(), options);
            match put.await {
                Err(cause) if trouble(&cause) == Trouble::Taken => Ok(false),
                Err(cause) => Err(refused("storing an object")(cause)),
                Ok(_) => Ok(true),
            }
        };
        put().await?;
        let mut exclusive = !put().await?;
        if let Some(s3) = &self.backend.s3 {
            let parts = &self.backend.parts;
            let id = parts.create_multipart(&key).await;
            let id = id.map_err(refused("beginning an upload of several parts"))?;
            let part = parts.put_part(&key, &id, 0, Bytes::from_static(b"udpack").into());
            let part = part.await.map_err(refused("storing a part"))?;
            let guard = s3.free.guard(&id);
            let completed = parts.complete_multipart(&key, &id, vec![part]).await;
            drop(guard);
            exclusive &= completed.is_err();
            if completed.is_err() {
                let aborted = parts.abort_multipart(&key, &id).await;
                missing_is_done(aborted).map_err(refused("ending an upload of several parts"))?;
            }
        }
        Ok(exclusive)
    }
}

impl Sink for ObjectSink {
    type Upload = ObjectUpload;
    type Whole = ObjectWhole;

    fn abilities(&self) -> Abilities {
        Abilities {
            any_order: false,
            resume: true,
            names: true,
            read: true,
            list: true,
            remove: true,
        }
    }

    async fn begin(&self, new: &NewUpload<'_>) -> Result<Begun<ObjectUpload>, StoreError> {
        ObjectUpload::begin(&self.inner, new).await
    }

    fn durable(&self, upload: &ObjectUpload) -> Durable {
        upload.durable()
    }

    async fn have(&self, upload: &mut ObjectUpload) -> Result<Vec<Range>, StoreError> {
        Ok(upload.have())
    }

    async fn write(
        &self,
        upload: &mut ObjectUpload,
        offset: u64,
        bytes: Bytes,
    ) -> Result<(), StoreError> {
        upload.write(offset, &bytes).await
    }

    async fn checkpoint(&self, upload: &mut ObjectUpload) -> Result<(), StoreError> {
        upload.settle().await
    }

    /// A part is durable when it is stored, which nobody has to wait for.
    fn is_due(&self, _: u64, _: Duration) -> bool {
        false
    }

    async fn finish(
        &self,
        upload: ObjectUpload,
        expected: Expected,
    ) -> Result<ObjectWhole, StoreError> {
        upload.finish(expected).await
    }

    async fn publish(&self, whole: ObjectWhole) -> Result<Published, StoreError> {
        whole.publish().await
    }

    async fn suspend(&self, upload: ObjectUpload) {
        upload.suspend().await;
    }

    async fn abort(&self, upload: ObjectUpload) {
        upload.abort().await;
    }

    async fn discard(&self, whole: ObjectWhole) {
        whole.discard().await;
    }

    async fn stat(&self, path: Option<&RelPath>) -> Result<Entry, StoreError> {
        self.inner.stat(path).await
    }

    async fn list(&self, query: &List<'_>) -> Result<Page, StoreError> {
        self.inner.list(query).await
    }

    async fn read(&self, path: &RelPath) -> Result<Stored, StoreError> {
        self.inner.open(path).await
    }

    async fn remove(&self, path: &RelPath, recursive: bool) -> Result<Removed, StoreError> {
        self.inner.remove(path, recursive).await
    }

    /// There are no directories to be made: those on the way to an object are there with it.
    async fn make_dir(&self, new: &NewDir<'_>) -> Result<Placed, StoreError> {
        self.inner.key(new.path)?;
        Ok(Placed::default())
    }
}

/// What begins the keys of our own and names the directory of journals; no client can name it.
const OWN: &str = ".udpack";
/// How long an upload waits for its part of the budget.
const TURN: Duration = Duration::from_secs(60);
/// Parts of this age have a journal, or never get one.
const YOUNG: Duration = Duration::from_secs(60);
