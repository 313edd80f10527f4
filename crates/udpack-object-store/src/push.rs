//! [`Push`]: carries what changes in a directory into an object store, behind the clients' backs.
//!
//! The directory stays what it is: a file is stored when it is on the disk, and its client is told so then. [`Changes`] has
//! what is still to be carried, on the disk as well. A file is sent as any upload into a store is, so it goes on from its
//! last part after a crash. What fails is tried again, later and later; what is newest counts, however often that happens.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::Notify;
use tokio::time::Instant;
use udpack_transfer::{
    Begun, Change, Changes, Expected, IfExists, NewUpload, Overwrite, Range, RelPath, Sink as _,
    Store, StoreError, Stored,
};

use crate::backend::Backend;
use crate::error::OpenError;
use crate::look::Holder;
use crate::sink::{Inner, ObjectConfig, ObjectSink, lock};
use crate::upload::ObjectUpload;

/// How a [`Push`] goes about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushConfig {
    /// Parts and budget. What it says of names, sizes, quotas and taken names is not used: the directory decides.
    pub objects: ObjectConfig,
    /// Files that are on their way at once. Defaults to 4.
    pub at_once: usize,
    /// The pause after the first failure; each further one has a pause twice as long, of which a random half is left out.
    /// Defaults to one second.
    pub pause: Duration,
    /// The longest pause. Defaults to 5 minutes.
    pub longest_pause: Duration,
}

impl Default for PushConfig {
    fn default() -> Self {
        Self {
            objects: ObjectConfig::default(),
            at_once: 4,
            pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(5 * 60),
        }
    }
}

/// Carries what changes in a [`Store`] into an object store. A handle: clones share the work.
#[derive(Clone, Debug)]
pub struct Push {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    changes: Changes,
    url: String,
    journals: PathBuf,
    config: PushConfig,
    state: Mutex<State>,
    /// A change was carried, or could not be.
    carried: Notify,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    moving: BTreeMap<u64, Pushing>,
    failed: VecDeque<PushFailure>,
    files: u64,
    bytes: u64,
    removed: u64,
    failures: u64,
    /// Why nothing is tried, and until when.
    trouble: Option<(String, Instant)>,
}

/// A file on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushing {
    /// Its name.
    pub path: RelPath,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes that the object store has, those of an earlier attempt included.
    pub bytes: u64,
}

/// A change that could not be carried, and is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushFailure {
    /// The name.
    pub path: RelPath,
    /// What is wrong.
    pub why: String,
}

/// How far a [`Push`] is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PushStatus {
    /// Changes that are not yet in the object store, those on their way included.
    pub waiting: u64,
    /// The files that are on their way now.
    pub pushing: Vec<Pushing>,
    /// The latest changes that failed and are tried again: 64 at most.
    pub failed: Vec<PushFailure>,
    /// Files stored since the start.
    pub files: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Objects removed since the start.
    pub removed: u64,
    /// Attempts that failed since the start.
    pub failures: u64,
    /// Why nothing is on its way although something waits, and for how long that stays so.
    pub trouble: Option<(String, Duration)>,
}

/// Why nothing can be pushed at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// The address or the settings are wrong.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The store was opened without [`StoreConfig::changes`](udpack_transfer::StoreConfig::changes).
    #[error("{} keeps no list of what changes", dir.display())]
    NoChanges {
        /// Its directory.
        dir: PathBuf,
    },
}

impl Push {
    /// Prepares to carry what changes in this directory, and what has changed before, to the object store at this address.
    /// Nothing is asked of the object store before [`run`](Self::run): it may be away.
    ///
    /// # Errors
    /// When the directory keeps no list of its changes, or address or settings of the object store are wrong.
    pub fn new(store: &Store, url: &str, config: PushConfig) -> Result<Self, PushError> {
        let root = store.root().to_owned();
        let Some(changes) = store.changes().cloned() else {
            return Err(PushError::NoChanges { dir: root });
        };
        let dir = ObjectSink::journals(&root)?;
        Backend::open(url, &config.objects.settings, &dir)?;
        Ok(Self {
            shared: Arc::new(Shared {
                store: store.clone(),
                changes,
                url: url.to_owned(),
                journals: root,
                config,
                state: Mutex::default(),
                carried: Notify::new(),
            }),
        })
    }

    /// The address of the object store.
    pub fn url(&self) -> &str {
        &self.shared.url
    }

    /// How far it is.
    pub fn status(&self) -> PushStatus {
        let waiting = self.shared.changes.notes();
        let state = lock(&self.shared.state);
        let now = Instant::now();
        PushStatus {
            waiting,
            pushing: state.moving.values().cloned().collect(),
            failed: state.failed.iter().cloned().collect(),
            files: state.files,
            bytes: state.bytes,
            removed: state.removed,
            failures: state.failures,
            trouble: state
                .trouble
                .as_ref()
                .map(|(why, until)| (why.clone(), until.saturating_duration_since(now))),
        }
    }

    /// Waits until nothing is left to be carried, while [`run`](Self::run) is under way.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn idle(&self) {
        loop {
            let mut carried = std::pin::pin!(self.shared.carried.notified());
            carried.as_mut().enable();
            if self.shared.changes.notes() == 0 {
                return;
            }
            carried.await;
        }
    }

    /// Carries what has changed and what changes, for ever. One call at a time.
    ///
    /// # Drop
    /// Dropping the future interrupts what is on its way; the next run goes on with it.
    pub async fn run(&self) {
        let shared = &self.shared;
        let mut pauses = Pauses::new(&shared.config);
        let sink = self.opened(&mut pauses).await;
        let mut moving = FuturesUnordered::new();
        let mut sweep = Instant::now() + SWEEP;
        // Nothing begins before this.
        let mut resume: Option<Instant> = None;
        // Something failed in this pass.
        let mut left = false;
        loop {
            let mut ended = false;
            while resume.is_none() && moving.len() < shared.config.at_once.max(1) {
                match self.take().await {
                    Some(change) => moving.push(self.carry(&sink, change)),
                    None => {
                        ended = true;
                        break;
                    }
                }
            }
            if ended && left && moving.is_empty() {
                left = false;
                shared.changes.again();
                resume = Some(Instant::now() + pauses.next());
            }
            let at = resume.map_or(sweep, |at| at.min(sweep));
            tokio::select! {
                Some(carried) = moving.next() => match carried {
                    Ok(()) => {
                        pauses.reset();
                        lock(&shared.state).trouble = None;
                    }
                    Err(error) => {
                        left = true;
                        if resume.is_none() && !is_of_name(&error) {
                            let at = Instant::now() + pauses.next();
                            resume = Some(at);
                            lock(&shared.state).trouble = Some((error.to_string(), at));
                        }
                    }
                },
                () = shared.changes.changed(), if ended && resume.is_none() => {}
                () = tokio::time::sleep_until(at) => {
                    let now = Instant::now();
                    if resume.is_some_and(|at| at <= now) {
                        resume = None;
                        lock(&shared.state).trouble = None;
                    }
                    if sweep <= now {
                        sweep = now + SWEEP;
                        if let Err(error) = sink.sweep().await {
                            tracing::warn!(%error, "cannot look for uploads that a crash left in the object store");
                        }
                    }
                }
            }
        }
    }

    /// The object store, as soon as it is there.
    async fn opened(&self, pauses: &mut Pauses) -> ObjectSink {
        let shared = &self.shared;
        let config = ObjectConfig {
            max_file: None,
            quota: None,
            names: udpack_transfer::Names::Any,
            overwrite: Overwrite::Always,
            ..shared.config.objects.clone()
        };
        loop {
            let journals = shared.journals.clone();
            match ObjectSink::open(&shared.url, journals, config.clone()).await {
                Ok(sink) => {
                    pauses.reset();
                    lock(&shared.state).trouble = None;
                    return sink;
                }
                Err(error) => {
                    let why = told(&error);
                    tracing::warn!(error = why, "cannot push to the object store yet");
                    let at = Instant::now() + pauses.next();
                    shared.is_away(why, at);
                    tokio::time::sleep_until(at).await;
                }
            }
        }
    }

    async fn take(&self) -> Option<Change> {
        let changes = self.shared.changes.clone();
        let taken = tokio::task::spawn_blocking(move || changes.take()).await;
        match taken.ok()? {
            Ok(change) => change,
            Err(error) => {
                tracing::warn!(%error, "cannot read what is to be pushed");
                None
            }
        }
    }

    /// Makes the object store have what the directory has under a name.
    async fn carry(&self, sink: &ObjectSink, change: Change) -> Result<(), StoreError> {
        let path = change.path().clone();
        let carried = self.carried(sink, change).await;
        let mut state = lock(&self.shared.state);
        state.failed.retain(|failure| failure.path != path);
        if let Err(error) = &carried {
            tracing::warn!(%path, %error, "a file is not in the object store yet");
            state.failures += 1;
            if state.failed.len() == MOST_FAILED {
                state.failed.pop_front();
            }
            let why = error.to_string();
            state.failed.push_back(PushFailure { path, why });
        }
        drop(state);
        self.shared.carried.notify_waiters();
        carried
    }

    async fn carried(&self, sink: &ObjectSink, change: Change) -> Result<(), StoreError> {
        let path = change.path().clone();
        match udpack_transfer::Sink::read(&self.shared.store, &path).await {
            Ok(file) => {
                let moving = Moving::begin(&self.shared, &path, file.size());
                if !self.store(sink, &change, &file, &moving).await? {
                    // It changed meanwhile, and comes again at once.
                    return Ok(());
                }
            }
            Err(
                StoreError::NotFound { .. }
                | StoreError::IsDirectory { .. }
                | StoreError::NotAFile { .. },
            ) if change.removed() => match sink.remove(&path, false).await {
                Ok(_) => lock(&self.shared.state).removed += 1,
                Err(StoreError::NotFound { .. } | StoreError::NotEmpty { .. }) => {}
                Err(error) => return Err(error),
            },
            // Somebody removed it beside the server: what the object store has of it stays.
            Err(
                StoreError::NotFound { .. }
                | StoreError::IsDirectory { .. }
                | StoreError::NotAFile { .. },
            ) => {}
            Err(error) => return Err(error),
        }
        let settled = Inner::aside(move || change.settle());
        settled.await
    }

    /// Whether the object is the file now; not where the name has changed meanwhile.
    async fn store(
        &self,
        sink: &ObjectSink,
        change: &Change,
        file: &Stored,
        moving: &Moving,
    ) -> Result<bool, StoreError> {
        let path = change.path();
        if is_there(sink, path, file).await? {
            return Ok(true);
        }
        // An upload that was interrupted may be of what the name had then: that is seen by the hashes of its parts.
        for _ in 0..2 {
            let new = NewUpload {
                size: Some(file.size()),
                meta: file.meta(),
                if_exists: IfExists::Overwrite,
                resumable: true,
                ..NewUpload::new(path, PEER)
            };
            let Begun::New(upload) = sink.begin(&new).await? else {
                return Err(StoreError::Broken);
            };
            match send(sink, upload, change, file, moving).await? {
                Sent::Stored => {
                    let mut state = lock(&self.shared.state);
                    state.files += 1;
                    state.bytes += file.size();
                    return Ok(true);
                }
                Sent::Outdated => return Ok(false),
                Sent::Differs => moving.at(0),
            }
        }
        Err(StoreError::Broken)
    }
}

impl Shared {
    fn is_away(&self, why: String, until: Instant) {
        let mut state = lock(&self.state);
        state.failures += 1;
        state.trouble = Some((why, until));
    }
}

/// Whether the object store has this very file, as far as it has noted that.
async fn is_there(sink: &ObjectSink, path: &RelPath, file: &Stored) -> Result<bool, StoreError> {
    let Holder::File(object) = sink.inner.holder(path).await? else {
        return Ok(false);
    };
    if object.size != file.size() || object.meta != file.meta() {
        return Ok(false);
    }
    match sink.inner.noted_hash(&object).await {
        Some(hash) => Ok(<[u8; 32]>::from(hash) == file.hash().await?),
        None => Ok(false),
    }
}

enum Sent {
    Stored,
    /// The name was changed meanwhile.
    Outdated,
    /// What the store had of it was of another file.
    Differs,
}

async fn send(
    sink: &ObjectSink,
    mut upload: ObjectUpload,
    change: &Change,
    file: &Stored,
    moving: &Moving,
) -> Result<Sent, StoreError> {
    let sent = fill(sink, &mut upload, change, file, moving).await;
    let hash = match sent {
        Ok(Some(hash)) => hash,
        Ok(None) => {
            sink.abort(upload).await;
            return Ok(match change.is_latest() {
                true => Sent::Differs,
                false => Sent::Outdated,
            });
        }
        Err(error) => {
            match error.retry() {
                true => sink.suspend(upload).await,
                false => sink.abort(upload).await,
            }
            return Err(error);
        }
    };
    let expected = Expected {
        size: Some(file.size()),
        hash: Some(hash.into()),
        meta: file.meta(),
    };
    let whole = match sink.finish(upload, expected).await {
        Ok(whole) => whole,
        // A part of the journal was of another file, and of the same size.
        Err(StoreError::HashMismatch { .. }) => return Ok(Sent::Differs),
        Err(error) => return Err(error),
    };
    if !change.is_latest() {
        sink.discard(whole).await;
        return Ok(Sent::Outdated);
    }
    sink.publish(whole).await?;
    Ok(Sent::Stored)
}

/// Sends what the store has not; the hash of all. `None` where what it has differs, or the name has changed.
async fn fill(
    sink: &ObjectSink,
    upload: &mut ObjectUpload,
    change: &Change,
    file: &Stored,
    moving: &Moving,
) -> Result<Option<blake3::Hash>, StoreError> {
    let have = sink.have(upload).await?;
    let mut have = have.iter().peekable();
    let mut all = blake3::Hasher::new();
    while all.count() < file.size() {
        let at = all.count();
        // Everything of a range at once: it is as large as a part.
        if let Some(Range { len, hash, .. }) = have.next_if(|range| range.off == at) {
            let mut range = blake3::Hasher::new();
            while range.count() < *len {
                let left = usize::try_from(*len - range.count()).map_or(READ, |it| it.min(READ));
                let bytes = some(file.read_at(at + range.count(), left).await?)?;
                range.update(&bytes);
                all.update(&bytes);
            }
            if range.finalize().as_bytes() != hash {
                return Ok(None);
            }
        } else {
            let next = have.peek().map_or(u64::MAX, |range| range.off);
            let left = usize::try_from(next.saturating_sub(at)).map_or(READ, |it| it.min(READ));
            let bytes = some(file.read_at(at, left).await?)?;
            all.update(&bytes);
            sink.write(upload, at, bytes).await?;
        }
        moving.at(all.count());
        if !change.is_latest() {
            return Ok(None);
        }
    }
    Ok(Some(all.finalize()))
}

/// Bytes that a file must have.
fn some(bytes: bytes::Bytes) -> Result<bytes::Bytes, StoreError> {
    match bytes.is_empty() {
        // Somebody cut it beside the server.
        true => Err(StoreError::Unavailable {
            why: "the file became shorter while it was read".to_owned(),
        }),
        false => Ok(bytes),
    }
}

/// Shows a file as on its way for as long as it lives.
struct Moving {
    shared: Arc<Shared>,
    id: u64,
}

impl Moving {
    fn begin(shared: &Arc<Shared>, path: &RelPath, size: u64) -> Self {
        let mut state = lock(&shared.state);
        let id = state.next;
        state.next += 1;
        let path = path.clone();
        let bytes = 0;
        state.moving.insert(id, Pushing { path, size, bytes });
        Self {
            shared: shared.clone(),
            id,
        }
    }

    fn at(&self, bytes: u64) {
        if let Some(moving) = lock(&self.shared.state).moving.get_mut(&self.id) {
            moving.bytes = bytes;
        }
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        lock(&self.shared.state).moving.remove(&self.id);
    }
}

/// The pauses between attempts.
struct Pauses {
    first: Duration,
    longest: Duration,
    next: Duration,
    random: RandomState,
    count: u64,
}

impl Pauses {
    fn new(config: &PushConfig) -> Self {
        Self {
            first: config.pause,
            longest: config.longest_pause,
            next: config.pause,
            random: RandomState::new(),
            count: 0,
        }
    }

    fn reset(&mut self) {
        self.next = self.first;
    }

    /// Half of it is left to chance, so that many servers do not come back at once.
    fn next(&mut self) -> Duration {
        let pause = self.next.min(self.longest);
        self.next = pause.saturating_mul(2);
        self.count += 1;
        let chance = self.random.hash_one(self.count) as u32;
        pause / 2 + (pause / 2).mul_f64(f64::from(chance) / f64::from(u32::MAX))
    }
}

/// Whether another name may well be stored now: the object store itself is not in trouble.
fn is_of_name(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Name(_)
            | StoreError::Unstorable { .. }
            | StoreError::Blocked { .. }
            | StoreError::Exists { .. }
            | StoreError::TooLarge { .. }
    )
}

/// An error and what is below it.
fn told(error: &OpenError) -> String {
    let mut text = error.to_string();
    if let OpenError::Refused { cause, .. } = error {
        text = format!("{text}: {}", crate::error::text(cause));
    }
    text
}

impl fmt::Display for Push {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url())
    }
}

/// Whose uploads these are, in the journal. No token has such an id.
const PEER: &str = "\u{1}push";
/// Bytes read at a time.
const READ: usize = 1 << 20;
/// Failures that are shown, at most.
const MOST_FAILED: usize = 64;
/// How often uploads that a crash left are looked for.
const SWEEP: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_begin_anew_after_a_success() {
        let config = PushConfig {
            pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(10),
            ..PushConfig::default()
        };
        let mut pauses = Pauses::new(&config);
        for longest in [1, 2, 4, 8, 10, 10] {
            let (pause, longest) = (pauses.next(), Duration::from_secs(longest));
            assert!(pause >= longest / 2 && pause <= longest, "{pause:?}");
        }
        pauses.reset();
        assert!(pauses.next() <= Duration::from_secs(1));
    }
}
