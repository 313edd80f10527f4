//! [`Target`]: where the files of a receiver go, a store on disk or any other [`Sink`].
//!
//! A store is called on the caller's thread, which must be one that may block; its futures are ready at once. Any other
//! sink is driven by tasks. [`Target::run`] starts work in the right place; the work itself is the same for both.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::task::JoinHandle;

use crate::base::names;
use crate::base::path::RelPath;
use crate::base::zeros;
use crate::local::source::Opened;
use crate::store::sink::Boxed;
use crate::store::{
    Abilities, Begin, Begun, Complete, Durable, Entry, Existing, Expected, List, NewDir, NewFile,
    NewLink, NewUpload, Page, Partial, Placed, Published, Range, Removed, Sink, Store, StoreError,
    Stored, XattrList,
};

/// Where files go. A handle.
#[derive(Clone)]
pub(crate) enum Target {
    Disk(Store),
    Sink(Arc<dyn AnySink>),
}

/// The result of beginning an upload.
#[derive(Debug)]
pub(crate) enum Started {
    New(TargetUpload),
    Exists(TargetFile),
}

/// An upload that is being written.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "what is large is also what there are most of"
)]
pub(crate) enum TargetUpload {
    Disk(Partial),
    Sink(Box<Guided>),
}

/// A file that is complete and has no name yet.
#[derive(Debug)]
pub(crate) enum TargetWhole {
    Disk(Complete),
    Sink(Box<dyn AnyWhole>),
}

/// A stored file.
#[derive(Debug)]
pub(crate) enum TargetFile {
    Disk(Existing),
    Sink(Stored),
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Disk(_) => "Disk",
            Self::Sink(_) => "Sink",
        })
    }
}

impl Target {
    pub(crate) fn new(sink: impl Sink) -> Self {
        Self::Sink(Arc::new(Held(Arc::new(sink))))
    }

    /// The store, if the target is one.
    pub(crate) fn store(&self) -> Option<&Store> {
        match self {
            Self::Disk(store) => Some(store),
            Self::Sink(_) => None,
        }
    }

    /// Starts work that calls this target, on a thread that may block if it is a store. The work must wait for nothing but
    /// the target: the result is `None` where it waits for anything else on such a thread. It continues when the handle
    /// is dropped. Must be called within a runtime.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<Option<T>> {
        match self {
            Self::Disk(_) => tokio::task::spawn_blocking(move || work.now_or_never()),
            Self::Sink(_) => tokio::spawn(work.map(Some)),
        }
    }

    pub(crate) async fn begin(&self, new: &NewUpload<'_>) -> Result<Started, StoreError> {
        Ok(match self {
            Self::Disk(store) => {
                let file = NewFile {
                    path: new.path,
                    size: new.size,
                    if_exists: new.if_exists,
                    owner: new.resumable.then_some(new.peer),
                    tenant: new.tenant,
                    dirs: new.dirs,
                    whole: new.whole,
                };
                let begun = store.begin_with(&file, new.meta.mode)?;
                match begun {
                    Begin::New(partial) => Started::New(TargetUpload::Disk(partial)),
                    Begin::Exists(existing) => Started::Exists(TargetFile::Disk(existing)),
                }
            }
            Self::Sink(sink) => {
                let new = NewUpload {
                    resumable: new.resumable && sink.abilities().resume,
                    ..*new
                };
                match sink.begin(&new).await? {
                    Begun::New(upload) => {
                        Started::New(TargetUpload::Sink(Box::new(Guided::new(upload))))
                    }
                    Begun::Exists(stored) => Started::Exists(TargetFile::Sink(stored)),
                }
            }
        })
    }

    /// Gives files their names, and returns the outcomes in the same order. A store syncs all of them together.
    pub(crate) async fn publish(
        &self,
        files: Vec<TargetWhole>,
    ) -> Vec<Result<Published, StoreError>> {
        let mut complete = Vec::new();
        let mut published = Vec::new();
        for file in files {
            match file {
                TargetWhole::Disk(file) => complete.push(file),
                TargetWhole::Sink(file) => published.push(file.publish().await),
            }
        }
        if let Self::Disk(store) = self {
            published = store.publish(complete);
        }
        published
    }

    pub(crate) fn stored_at(&self, path: &str) -> PathBuf {
        match self {
            Self::Disk(store) => store.root().join(&*names::os(path)),
            Self::Sink(sink) => sink.stored_at(path),
        }
    }

    pub(crate) async fn stat(&self, path: Option<&RelPath>) -> Result<Entry, StoreError> {
        match self {
            Self::Disk(store) => store.stat(path),
            Self::Sink(sink) => sink.stat(path).await,
        }
    }

    pub(crate) async fn list(&self, query: &List<'_>) -> Result<Page, StoreError> {
        match self {
            Self::Disk(store) => store.list(query),
            Self::Sink(sink) => sink.list(query).await,
        }
    }

    pub(crate) async fn read(&self, path: &RelPath) -> Result<TargetFile, StoreError> {
        match self {
            Self::Disk(store) => store.read(path).map(TargetFile::Disk),
            Self::Sink(sink) => sink.read(path).await.map(TargetFile::Sink),
        }
    }

    pub(crate) async fn remove(
        &self,
        path: &RelPath,
        recursive: bool,
    ) -> Result<Removed, StoreError> {
        match self {
            Self::Disk(store) => store.remove(path, recursive),
            Self::Sink(sink) => sink.remove(path, recursive).await,
        }
    }

    pub(crate) async fn make_dir(&self, new: &NewDir<'_>) -> Result<Placed, StoreError> {
        match self {
            Self::Disk(store) => store.place_dir(new),
            Self::Sink(sink) => sink.make_dir(new).await,
        }
    }

    pub(crate) async fn make_link(&self, new: &NewLink<'_>) -> Result<Placed, StoreError> {
        match self {
            Self::Disk(store) => store.place_link(new),
            Self::Sink(sink) => sink.make_link(new).await,
        }
    }
}

impl TargetUpload {
    /// The position: bytes so far, without a gap.
    pub(crate) fn position(&self) -> u64 {
        match self {
            Self::Disk(partial) => partial.position(),
            Self::Sink(upload) => upload.position,
        }
    }

    /// How many of these are durable, kept up to date.
    pub(crate) fn safe(&self) -> Arc<AtomicU64> {
        match self {
            Self::Disk(partial) => partial.safe(),
            Self::Sink(upload) => upload.upload.durable().0,
        }
    }

    pub(crate) async fn have(&mut self) -> Result<Vec<Range>, StoreError> {
        match self {
            Self::Disk(partial) => partial.have(&mut |_| {}),
            Self::Sink(upload) => upload.have().await,
        }
    }

    pub(crate) async fn write(&mut self, offset: u64, bytes: Bytes) -> Result<(), StoreError> {
        match self {
            Self::Disk(partial) => partial.write_at(offset, &bytes),
            Self::Sink(upload) => upload.write(offset, bytes).await,
        }
    }

    /// As [`write`](Self::write), of bytes that the caller keeps.
    pub(crate) async fn write_copy(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        match self {
            Self::Disk(partial) => partial.write_at(offset, bytes),
            Self::Sink(upload) => upload.write(offset, Bytes::copy_from_slice(bytes)).await,
        }
    }

    /// Zeros, which take no room on a disk that can do so. A sink gets them as bytes.
    pub(crate) async fn hole(&mut self, offset: u64, len: u64) -> Result<(), StoreError> {
        match self {
            Self::Disk(partial) => partial.hole_at(offset, len),
            Self::Sink(upload) => {
                let mut at = offset;
                for zeros in zeros::blocks(len) {
                    upload.write(at, Bytes::from_static(zeros)).await?;
                    at = at.saturating_add(zeros.len() as u64);
                }
                Ok(())
            }
        }
    }

    /// Makes bytes durable if a checkpoint is due. A store does so beside the writes that follow.
    pub(crate) async fn checkpoint(&mut self) -> Result<(), StoreError> {
        match self {
            Self::Disk(partial) => {
                if let Some(checkpoint) = partial.checkpoint() {
                    tokio::task::spawn_blocking(move || checkpoint.run());
                }
                Ok(())
            }
            Self::Sink(upload) => upload.checkpoint().await,
        }
    }

    /// All bytes have arrived. `syncing` is called when their hash is right and they go to disk. A sink stores no extended
    /// attributes.
    pub(crate) async fn finish(
        self,
        expected: Expected,
        xattrs: &XattrList,
        syncing: &mut (dyn FnMut() + Send),
    ) -> Result<TargetWhole, StoreError> {
        match self {
            Self::Disk(partial) => {
                let Expected { size, hash, meta } = expected;
                let complete = partial.complete_telling(hash, size, meta, xattrs, syncing)?;
                Ok(TargetWhole::Disk(complete))
            }
            Self::Sink(upload) => upload.upload.finish(expected).await.map(TargetWhole::Sink),
        }
    }

    pub(crate) async fn suspend(self) {
        match self {
            Self::Disk(partial) => drop(partial),
            Self::Sink(upload) => upload.upload.suspend().await,
        }
    }

    pub(crate) async fn abort(self) {
        match self {
            Self::Disk(partial) => partial.discard(),
            Self::Sink(upload) => upload.upload.abort().await,
        }
    }
}

impl TargetWhole {
    /// Whether waiting for other files pays, so that one sync serves all of them.
    pub(crate) fn waits(&self) -> bool {
        matches!(self, Self::Disk(complete) if !complete.is_synced())
    }

    /// The path of its bytes on this machine, if they are on it.
    pub(crate) fn staged_at(&self, target: &Target) -> PathBuf {
        match (self, target) {
            (Self::Disk(complete), Target::Disk(store)) => store.staging().join(complete.staged()),
            (Self::Sink(whole), _) => whole.staged_at(),
            (Self::Disk(_), Target::Sink(_)) => PathBuf::new(),
        }
    }

    pub(crate) async fn discard(self) {
        match self {
            Self::Disk(complete) => drop(complete),
            Self::Sink(whole) => whole.discard().await,
        }
    }
}

impl TargetFile {
    pub(crate) fn path(&self) -> &RelPath {
        match self {
            Self::Disk(existing) => existing.path(),
            Self::Sink(stored) => stored.path(),
        }
    }

    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Disk(existing) => existing.len(),
            Self::Sink(stored) => stored.size(),
        }
    }

    /// Its hash, for reporting it as stored.
    pub(crate) async fn hash(&self) -> Result<[u8; 32], StoreError> {
        match self {
            Self::Disk(existing) => existing.hash(&mut |_| {}),
            Self::Sink(stored) => stored.hash().await,
        }
    }

    /// Its hash alone.
    pub(crate) async fn fingerprint(&self) -> Result<[u8; 32], StoreError> {
        match self {
            Self::Disk(existing) => existing.fingerprint(&mut |_| {}),
            Self::Sink(stored) => stored.hash().await,
        }
    }

    /// Fills this room with bytes from this offset on, and says how many: none only at its end, or at the end it had when
    /// it was opened, and fewer than there is room for also elsewhere.
    pub(crate) async fn read_into(
        &self,
        offset: u64,
        room: &mut [u8],
    ) -> Result<usize, StoreError> {
        let left = self.size().saturating_sub(offset);
        let len = usize::try_from(left).map_or(room.len(), |left| left.min(room.len()));
        let room = room.get_mut(..len).unwrap_or_default();
        // Systems refuse offsets beyond every file.
        if room.is_empty() {
            return Ok(0);
        }
        let failed = |cause| StoreError::Io {
            action: "read a file",
            cause,
        };
        match self {
            Self::Disk(existing) => existing.read_at(room, offset).map_err(failed),
            Self::Sink(stored) => {
                let bytes = stored.read_at(offset, len).await?;
                let Some(room) = room.get_mut(..bytes.len()) else {
                    let cause = std::io::Error::other("a sink gave more than it was asked for");
                    return Err(failed(cause));
                };
                room.copy_from_slice(&bytes);
                Ok(bytes.len())
            }
        }
    }

    /// Opens it for sending.
    pub(crate) fn open(self) -> std::io::Result<Opened> {
        match self {
            Self::Disk(existing) => Opened::stored(existing),
            Self::Sink(stored) => Ok(Opened::kept(stored)),
        }
    }
}

/// An upload into a sink. It enforces the protocol's order of bytes and triggers checkpoints.
#[derive(Debug)]
pub(crate) struct Guided {
    upload: Box<dyn AnyUpload>,
    position: u64,
    /// The ranges that need not be sent, joined.
    offered: Vec<(u64, u64)>,
    /// Bytes since the last checkpoint, and when the first of them arrived.
    unsynced: u64,
    since: Option<Instant>,
}

impl Guided {
    fn new(upload: Box<dyn AnyUpload>) -> Self {
        Self {
            upload,
            position: 0,
            offered: Vec::new(),
            unsynced: 0,
            since: None,
        }
    }

    async fn have(&mut self) -> Result<Vec<Range>, StoreError> {
        let have = self.upload.have().await?;
        for Range { off, len, .. } in &have {
            let end = off.saturating_add(*len);
            match self.offered.last_mut() {
                Some((_, last)) if *last == *off => *last = end,
                _ => self.offered.push((*off, end)),
            }
        }
        Ok(have)
    }

    async fn write(&mut self, offset: u64, bytes: Bytes) -> Result<(), StoreError> {
        let expected = self.position;
        let passes = |(start, end): &(u64, u64)| *start <= expected && offset <= *end;
        if offset != expected && (offset < expected || !self.offered.iter().any(passes)) {
            return Err(StoreError::BadOffset { expected });
        }
        let len = bytes.len() as u64;
        self.upload.write(offset, bytes).await?;
        self.position = offset.saturating_add(len);
        self.unsynced = self.unsynced.saturating_add(len);
        self.since.get_or_insert_with(Instant::now);
        Ok(())
    }

    async fn checkpoint(&mut self) -> Result<(), StoreError> {
        let Some(since) = self.since else {
            return Ok(());
        };
        if self.upload.is_due(self.unsynced, since) {
            self.upload.checkpoint().await?;
            self.unsynced = 0;
            self.since = None;
        }
        Ok(())
    }
}

/// Any [`Sink`], as an object.
pub(crate) trait AnySink: Send + Sync {
    fn abilities(&self) -> Abilities;
    fn begin<'a>(
        &'a self,
        new: &'a NewUpload<'a>,
    ) -> Boxed<'a, Result<Begun<Box<dyn AnyUpload>>, StoreError>>;
    fn stored_at(&self, path: &str) -> PathBuf;
    fn stat<'a>(&'a self, path: Option<&'a RelPath>) -> Boxed<'a, Result<Entry, StoreError>>;
    fn list<'a>(&'a self, query: &'a List<'a>) -> Boxed<'a, Result<Page, StoreError>>;
    fn read<'a>(&'a self, path: &'a RelPath) -> Boxed<'a, Result<Stored, StoreError>>;
    fn remove<'a>(
        &'a self,
        path: &'a RelPath,
        recursive: bool,
    ) -> Boxed<'a, Result<Removed, StoreError>>;
    fn make_dir<'a>(&'a self, new: &'a NewDir<'a>) -> Boxed<'a, Result<Placed, StoreError>>;
    fn make_link<'a>(&'a self, new: &'a NewLink<'a>) -> Boxed<'a, Result<Placed, StoreError>>;
}

/// An upload of any [`Sink`].
pub(crate) trait AnyUpload: Send + Sync {
    fn durable(&self) -> Durable;
    fn have(&mut self) -> Boxed<'_, Result<Vec<Range>, StoreError>>;
    fn write(&mut self, offset: u64, bytes: Bytes) -> Boxed<'_, Result<(), StoreError>>;
    fn checkpoint(&mut self) -> Boxed<'_, Result<(), StoreError>>;
    fn is_due(&self, bytes: u64, since: Instant) -> bool;
    fn finish(
        self: Box<Self>,
        expected: Expected,
    ) -> Boxed<'static, Result<Box<dyn AnyWhole>, StoreError>>;
    fn suspend(self: Box<Self>) -> Boxed<'static, ()>;
    fn abort(self: Box<Self>) -> Boxed<'static, ()>;
}

/// A complete file of any [`Sink`].
pub(crate) trait AnyWhole: Send + Sync {
    fn publish(self: Box<Self>) -> Boxed<'static, Result<Published, StoreError>>;
    fn discard(self: Box<Self>) -> Boxed<'static, ()>;
    fn staged_at(&self) -> PathBuf;
}

impl std::fmt::Debug for dyn AnyUpload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AnyUpload")
    }
}

impl std::fmt::Debug for dyn AnyWhole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AnyWhole")
    }
}

struct Held<S>(Arc<S>);

struct HeldUpload<S: Sink>(Arc<S>, S::Upload);

struct HeldWhole<S: Sink>(Arc<S>, S::Whole);

impl<S: Sink> AnySink for Held<S> {
    fn abilities(&self) -> Abilities {
        self.0.abilities()
    }

    fn begin<'a>(
        &'a self,
        new: &'a NewUpload<'a>,
    ) -> Boxed<'a, Result<Begun<Box<dyn AnyUpload>>, StoreError>> {
        Box::pin(async move {
            Ok(match self.0.begin(new).await? {
                Begun::New(upload) => {
                    Begun::New(Box::new(HeldUpload(self.0.clone(), upload)) as Box<dyn AnyUpload>)
                }
                Begun::Exists(stored) => Begun::Exists(stored),
            })
        })
    }

    fn stored_at(&self, path: &str) -> PathBuf {
        self.0.stored_at(path)
    }

    fn stat<'a>(&'a self, path: Option<&'a RelPath>) -> Boxed<'a, Result<Entry, StoreError>> {
        Box::pin(self.0.stat(path))
    }

    fn list<'a>(&'a self, query: &'a List<'a>) -> Boxed<'a, Result<Page, StoreError>> {
        Box::pin(self.0.list(query))
    }

    fn read<'a>(&'a self, path: &'a RelPath) -> Boxed<'a, Result<Stored, StoreError>> {
        Box::pin(self.0.read(path))
    }

    fn remove<'a>(
        &'a self,
        path: &'a RelPath,
        recursive: bool,
    ) -> Boxed<'a, Result<Removed, StoreError>> {
        Box::pin(self.0.remove(path, recursive))
    }

    fn make_dir<'a>(&'a self, new: &'a NewDir<'a>) -> Boxed<'a, Result<Placed, StoreError>> {
        Box::pin(self.0.make_dir(new))
    }

    fn make_link<'a>(&'a self, new: &'a NewLink<'a>) -> Boxed<'a, Result<Placed, StoreError>> {
        Box::pin(self.0.make_link(new))
    }
}

impl<S: Sink> AnyUpload for HeldUpload<S> {
    fn durable(&self) -> Durable {
        self.0.durable(&self.1)
    }

    fn have(&mut self) -> Boxed<'_, Result<Vec<Range>, StoreError>> {
        Box::pin(self.0.have(&mut self.1))
    }

    fn write(&mut self, offset: u64, bytes: Bytes) -> Boxed<'_, Result<(), StoreError>> {
        Box::pin(self.0.write(&mut self.1, offset, bytes))
    }

    fn checkpoint(&mut self) -> Boxed<'_, Result<(), StoreError>> {
        Box::pin(self.0.checkpoint(&mut self.1))
    }

    fn is_due(&self, bytes: u64, since: Instant) -> bool {
        self.0.is_due(bytes, since.elapsed())
    }

    fn finish(
        self: Box<Self>,
        expected: Expected,
    ) -> Boxed<'static, Result<Box<dyn AnyWhole>, StoreError>> {
        let Self(sink, upload) = *self;
        Box::pin(async move {
            let whole = sink.finish(upload, expected).await?;
            Ok(Box::new(HeldWhole(sink, whole)) as Box<dyn AnyWhole>)
        })
    }

    fn suspend(self: Box<Self>) -> Boxed<'static, ()> {
        let Self(sink, upload) = *self;
        Box::pin(async move { sink.suspend(upload).await })
    }

    fn abort(self: Box<Self>) -> Boxed<'static, ()> {
        let Self(sink, upload) = *self;
        Box::pin(async move { sink.abort(upload).await })
    }
}

impl<S: Sink> AnyWhole for HeldWhole<S> {
    fn publish(self: Box<Self>) -> Boxed<'static, Result<Published, StoreError>> {
        let Self(sink, whole) = *self;
        Box::pin(async move { sink.publish(whole).await })
    }

    fn discard(self: Box<Self>) -> Boxed<'static, ()> {
        let Self(sink, whole) = *self;
        Box::pin(async move { sink.discard(whole).await })
    }

    fn staged_at(&self) -> PathBuf {
        self.0.staged_at(&self.1)
    }
}
