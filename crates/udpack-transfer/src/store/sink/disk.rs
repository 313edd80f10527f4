//! A [`Store`] as a [`Sink`] for everybody: each call runs on a thread that may block.
//!
//! The server has threads of its own for a store and calls it there (`staging/target.rs`); this is for programs that put a
//! sink of theirs in front of a store, and for the tests that every sink passes.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Mutex;

use super::{
    Abilities, Begun, Durable, Expected, NewDir, NewLink, NewUpload, ReadAt, Sink, Stored,
};
use crate::base::names;
use crate::base::path::RelPath;
use crate::store::{
    Begin, Complete, Entry, Existing, List, NewFile, Page, Partial, Placed, Published, Range,
    Removed, Store, StoreError,
};

/// An upload into a [`Store`]. Dropping it suspends it, on another thread.
#[derive(Debug)]
pub struct DiskUpload {
    /// `None` once it is whole or gone; locked by the call that works on it, also when nobody waits for that any more.
    partial: Arc<Mutex<Option<Partial>>>,
    durable: Durable,
}

impl DiskUpload {
    fn new(partial: Partial) -> Self {
        Self {
            durable: Durable(partial.safe()),
            partial: Arc::new(Mutex::new(Some(partial))),
        }
    }

    /// Does this when the call before is through.
    async fn on<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Partial) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let mut partial = self.partial.clone().lock_owned().await;
        aside(move || work(partial.as_mut().ok_or(StoreError::Broken)?)).await
    }

    /// Does this with it, as the last thing.
    async fn last<T: Send + 'static>(
        self,
        work: impl FnOnce(Partial) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let mut partial = self.partial.clone().lock_owned().await;
        aside(move || work(partial.take().ok_or(StoreError::Broken)?)).await
    }
}

impl Drop for DiskUpload {
    fn drop(&mut self) {
        // A call that still works on it has it, and drops it.
        if let Ok(partial) = self.partial.clone().try_lock_owned()
            && partial.is_some()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(move || drop({ partial }.take()));
        }
    }
}

/// Works on a thread that may block, also when the future is dropped.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(StoreError::Broken))
}

impl Store {
    /// Does this with the store on a thread that may block.
    async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        aside(move || work(&store)).await
    }
}

impl Sink for Store {
    type Upload = DiskUpload;
    type Whole = Complete;

    fn abilities(&self) -> Abilities {
        Abilities::ALL
    }

    async fn begin(&self, new: &NewUpload<'_>) -> Result<Begun<DiskUpload>, StoreError> {
        let (path, peer) = (new.path.clone(), new.peer.to_owned());
        let (tenant, dirs) = (new.tenant.cloned(), new.dirs.to_owned());
        let (size, if_exists) = (new.size, new.if_exists);
        let (resumable, whole) = (new.resumable, new.whole);
        let begun = self.aside(move |store| {
            store.begin(&NewFile {
                path: &path,
                size,
                if_exists,
                owner: resumable.then_some(&*peer),
                tenant: tenant.as_ref(),
                dirs: &dirs,
                whole,
            })
        });
        Ok(match begun.await? {
            Begin::New(partial) => Begun::New(DiskUpload::new(partial)),
            Begin::Exists(existing) => Begun::Exists(existing.into()),
        })
    }

    fn durable(&self, upload: &DiskUpload) -> Durable {
        upload.durable.clone()
    }

    async fn have(&self, upload: &mut DiskUpload) -> Result<Vec<Range>, StoreError> {
        upload.on(|partial| partial.have(&mut |_| {})).await
    }

    async fn write(
        &self,
        upload: &mut DiskUpload,
        offset: u64,
        bytes: Bytes,
    ) -> Result<(), StoreError> {
        upload
            .on(move |partial| partial.write_any(offset, &bytes))
            .await
    }

    async fn checkpoint(&self, upload: &mut DiskUpload) -> Result<(), StoreError> {
        upload.on(Partial::make_durable).await
    }

    async fn finish(&self, upload: DiskUpload, expected: Expected) -> Result<Complete, StoreError> {
        let Expected { size, hash, meta } = expected;
        upload
            .last(move |partial| partial.complete(hash, size, meta))
            .await
    }

    async fn publish(&self, whole: Complete) -> Result<Published, StoreError> {
        let published = self.aside(move |store| {
            let mut published = store.publish(vec![whole]);
            published.pop().unwrap_or(Err(StoreError::Broken))
        });
        published.await
    }

    async fn suspend(&self, upload: DiskUpload) {
        let _ = upload
            .last(|partial| {
                drop(partial);
                Ok(())
            })
            .await;
    }

    async fn abort(&self, upload: DiskUpload) {
        let _ = upload
            .last(|partial| {
                partial.discard();
                Ok(())
            })
            .await;
    }

    async fn discard(&self, whole: Complete) {
        let _ = aside(move || {
            drop(whole);
            Ok(())
        })
        .await;
    }

    fn staged_at(&self, whole: &Complete) -> PathBuf {
        self.staging().join(whole.staged())
    }

    fn stored_at(&self, path: &str) -> PathBuf {
        self.root().join(&*names::os(path))
    }

    async fn stat(&self, path: Option<&RelPath>) -> Result<Entry, StoreError> {
        let path = path.cloned();
        self.aside(move |store| store.stat(path.as_ref())).await
    }

    async fn list(&self, query: &List<'_>) -> Result<Page, StoreError> {
        let (path, after) = (query.path.cloned(), query.after.map(str::to_owned));
        let (recursive, limit) = (query.recursive, query.limit);
        let page = self.aside(move |store| {
            store.list(&List {
                path: path.as_ref(),
                recursive,
                after: after.as_deref(),
                limit,
            })
        });
        page.await
    }

    async fn read(&self, path: &RelPath) -> Result<Stored, StoreError> {
        let path = path.clone();
        let existing = self.aside(move |store| store.read(&path)).await?;
        Ok(existing.into())
    }

    async fn remove(&self, path: &RelPath, recursive: bool) -> Result<Removed, StoreError> {
        let path = path.clone();
        self.aside(move |store| store.remove(&path, recursive))
            .await
    }

    async fn make_dir(&self, new: &NewDir<'_>) -> Result<Placed, StoreError> {
        let (path, meta, dirs) = (new.path.clone(), new.meta, new.dirs.to_owned());
        let (tenant, xattrs) = (new.tenant.cloned(), new.xattrs.clone());
        let placed = self.aside(move |store| {
            store.place_dir(&NewDir {
                path: &path,
                meta,
                xattrs: &xattrs,
                dirs: &dirs,
                tenant: tenant.as_ref(),
            })
        });
        placed.await
    }

    async fn make_link(&self, new: &NewLink<'_>) -> Result<Placed, StoreError> {
        let (path, target, dirs) = (new.path.clone(), new.target.to_owned(), new.dirs.to_owned());
        let (if_exists, tenant) = (new.if_exists, new.tenant.cloned());
        let placed = self.aside(move |store| {
            store.place_link(&NewLink {
                path: &path,
                target: &target,
                if_exists,
                dirs: &dirs,
                tenant: tenant.as_ref(),
            })
        });
        placed.await
    }
}

impl From<Existing> for Stored {
    fn from(existing: Existing) -> Self {
        let (path, len, meta) = (existing.path().clone(), existing.len(), existing.meta());
        Self::new(path, len, meta, OnDisk(Arc::new(existing)))
    }
}

/// A file of a store, read on threads that may block.
struct OnDisk(Arc<Existing>);

impl ReadAt for OnDisk {
    async fn read_at(&self, offset: u64, len: usize) -> Result<Bytes, StoreError> {
        let existing = self.0.clone();
        let read = move || {
            let mut bytes = vec![0; len];
            let read = existing
                .read_at(&mut bytes, offset)
                .map_err(|cause| StoreError::Io {
                    action: "read an existing file",
                    cause,
                })?;
            bytes.truncate(read);
            Ok(bytes.into())
        };
        aside(read).await
    }

    async fn hash(&self) -> Result<[u8; 32], StoreError> {
        let existing = self.0.clone();
        aside(move || existing.hash(&mut |_| {})).await
    }
}
