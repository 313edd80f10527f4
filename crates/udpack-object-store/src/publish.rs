//! [`ObjectWhole`]: a file whose bytes are all here, and how it gets its name.
//!
//! Three ways. A small file is one request. Parts are completed under their name where the store can refuse that, as S3 does. Elsewhere
//! they are completed under a key of our own, and the object then gets its name by a copy or a rename that is refused where
//! something has the name.
//!
//! An answer can be lost, and a request that was repeated meets its own object. So an object carries the upload that made it, and a
//! refusal is believed only of another one.

use std::sync::Arc;

use bytes::Bytes;
use object_store::multipart::PartId;
use object_store::path::Path;
use object_store::{
    Error as Cause, ObjectStore as _, PutMode, PutOptions, RenameOptions, RenameTargetMode,
};
use udpack_transfer::{Expected, IfExists, Published, RelPath, StoreError, Synced};

use crate::error::{Trouble, refused, text, trouble};
use crate::look::{Holder, Object, attributes};
use crate::sink::{Hold, Inner, Promise, lock};
use crate::upload::Work;

/// A whole file for an object store. Dropping it discards it, within a runtime.
#[derive(Debug)]
pub struct ObjectWhole {
    file: Option<Box<Whole>>,
}

#[derive(Debug)]
struct Whole {
    work: Box<Work>,
    hash: blake3::Hash,
    size: u64,
    /// All of it, if that is one request.
    single: Option<Bytes>,
    _hold: Option<Hold>,
}

impl Drop for ObjectWhole {
    fn drop(&mut self) {
        if let Some(file) = self.file.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(file.work.abort());
        }
    }
}

impl ObjectWhole {
    pub(crate) fn new(
        mut work: Box<Work>,
        hash: blake3::Hash,
        size: u64,
        expected: Expected,
    ) -> Self {
        if expected.meta.mtime.is_some() || expected.meta.mode.is_some() {
            work.new.meta = expected.meta;
        }
        let (mut single, mut hold) = (None, None);
        if work.id.is_none() {
            let (bytes, held) = work.take_single();
            (single, hold) = (Some(bytes), held);
        }
        Self {
            file: Some(Box::new(Whole {
                work,
                hash,
                size,
                single,
                _hold: hold,
            })),
        }
    }

    pub(crate) async fn publish(mut self) -> Result<Published, StoreError> {
        let file = self.file.take().ok_or(StoreError::Broken)?;
        // It goes on when nobody waits any more.
        let publishing = tokio::spawn(file.publish());
        publishing.await.unwrap_or(Err(StoreError::Broken))
    }

    pub(crate) async fn discard(mut self) {
        if let Some(file) = self.file.take() {
            let _ = tokio::spawn(file.work.abort()).await;
        }
    }
}

/// Where the bytes come from.
#[derive(Clone, Copy)]
enum From<'a> {
    Bytes(&'a Bytes),
    /// It is renamed.
    Object(&'a Path),
}

/// What asking for a name led to.
enum Named {
    /// The file has it.
    Ours,
    Taken,
}

impl Whole {
    async fn publish(self: Box<Self>) -> Result<Published, StoreError> {
        let published = match &self.single {
            Some(bytes) => self.first_name(From::Bytes(bytes)).await,
            None if self.work.complete => Ok(self.published(&self.work.name)),
            None if self.work.inner.conditional => self.publish_here().await,
            None => self.publish_there().await,
        };
        let Self { mut work, hash, .. } = *self;
        match published {
            Ok(published) if published.same => {
                work.abort().await;
                Ok(published)
            }
            Ok(published) => {
                if let (Some(room), Ok(path)) = (work.room.take(), published.path.parse()) {
                    room.stored(&path, published.size);
                }
                if let (Some(s3), Some(_)) = (&work.inner.backend.s3, &work.id)
                    && let Some(key) = work.inner.backend.key(&published.path)
                    && let Err(cause) = s3.tag(&key, hash).await
                {
                    // Whoever asks for the hash later has it read.
                    tracing::warn!(
                        error = text(&cause),
                        "cannot note the hash of an object as its tag"
                    );
                }
                let journal = lock(&work.parts.journal).take();
                if let Some(journal) = journal {
                    // Beside the upload there may be others, of requests whose answers were lost.
                    work.inner.end(journal).await;
                }
                Ok(published)
            }
            // All that the store has of it is still there.
            Err(error @ StoreError::Unavailable { .. }) if !work.is_lost() => Err(error),
            Err(error) => {
                work.abort().await;
                Err(error)
            }
        }
    }

    fn published(&self, path: &RelPath) -> Published {
        Published {
            path: path.as_str().to_owned(),
            size: self.size,
            hash: self.hash.into(),
            same: false,
            sync: Synced::File,
            other_time: None,
            xattrs: 0,
        }
    }

    fn overwrites(&self) -> bool {
        self.work.new.if_exists == IfExists::Overwrite
    }

    /// Names to try, the one that was asked for first.
    fn names(&self) -> impl Iterator<Item = RelPath> {
        let path = self.work.new.path.clone();
        let numbered = (1..=LAST_NUMBER).map_while({
            let path = path.clone();
            move |number| numbered(&path, number)
        });
        let renames = self.work.new.if_exists == IfExists::Rename;
        std::iter::once(path).chain(numbered.filter(move |_| renames))
    }

    /// The first of the names that the file gets.
    async fn first_name(&self, from: From<'_>) -> Result<Published, StoreError> {
        for name in self.names() {
            // A directory has no object of its own that would be in the way.
            match self.work.inner.holder(&name).await? {
                Holder::Dir => continue,
                Holder::File(object) if !self.overwrites() && !self.made(&object) => continue,
                _ => {}
            }
            let key = self.work.inner.key(&name)?;
            match self.take(from, &name, &key).await? {
                Named::Ours => return Ok(self.published(&name)),
                Named::Taken => {}
            }
        }
        self.there().await
    }

    fn made(&self, object: &Object) -> bool {
        object.nonce.as_ref() == Some(&self.work.nonce)
    }

    /// Whether the object is there, whole, and ours.
    async fn is_there(&self, key: &Path) -> Result<bool, Cause> {
        let found = self.work.inner.object(key).await?;
        let told = self.work.inner.backend.attributes;
        Ok(found.is_some_and(|it| it.size == self.size && (!told || self.made(&it))))
    }

    /// Asks for a name.
    async fn take(&self, from: From<'_>, name: &RelPath, key: &Path) -> Result<Named, StoreError> {
        let backend = &self.work.inner.backend;
        let done = match from {
            From::Bytes(bytes) => {
                let mode = match self.overwrites() {
                    true => PutMode::Overwrite,
                    false => PutMode::Create,
                };
                let mut options = PutOptions::from(mode);
                if backend.attributes {
                    options.attributes =
                        attributes(self.work.new.meta, &self.work.nonce, Some(self.hash));
                }
                let put = backend.store.put_opts(key, bytes.clone().into(), options);
                put.await.map(drop)
            }
            From::Object(object) => {
                let mode = match self.overwrites() {
                    true => RenameTargetMode::Overwrite,
                    false => RenameTargetMode::Create,
                };
                let options = RenameOptions::new().with_target_mode(mode);
                backend.store.rename_opts(object, key, options).await
            }
        };
        self.named(name, key, done).await
    }

    /// What a request for a name led to, whatever was answered.
    async fn named(
        &self,
        name: &RelPath,
        key: &Path,
        done: Result<(), Cause>,
    ) -> Result<Named, StoreError> {
        let failed = |cause: &Cause| refused("store an object", Some(name), cause);
        match (done, self.is_there(key).await) {
            (Ok(()), Ok(true)) => Ok(Named::Ours),
            (Ok(()), Ok(false)) => Err(StoreError::Unavailable {
                why: "its object store has not kept the object".to_owned(),
            }),
            (Ok(()), Err(cause)) => Err(failed(&cause)),
            // Without metadata any object of this size would look like ours.
            (Err(_), Ok(true)) if self.work.inner.backend.attributes => Ok(Named::Ours),
            (Err(cause), _) if trouble(&cause) == Trouble::Taken => Ok(Named::Taken),
            (Err(cause), _) => Err(failed(&cause)),
        }
    }

    fn parts(&self) -> Vec<PartId> {
        let stored = lock(&self.work.parts.stored);
        let tags = stored.values().map(|part| part.tag.clone());
        tags.map(|content_id| PartId { content_id }).collect()
    }

    /// Completes the parts under the name.
    async fn publish_here(&self) -> Result<Published, StoreError> {
        let Work {
            inner, object, id, ..
        } = &*self.work;
        let id = id.as_ref().ok_or(StoreError::Broken)?;
        let free = inner.backend.s3.as_ref().filter(|_| !self.overwrites());
        let guard = free.map(|s3| s3.free.guard(id));
        let completing = inner
            .backend
            .parts
            .complete_multipart(object, id, self.parts());
        let done = completing.await.map(drop);
        drop(guard);
        if let Err(cause) = &done {
            tracing::debug!(error = text(cause), "an upload was not completed at once");
            // The store wants all of it anew.
            if matches!(trouble(cause), Trouble::Missing | Trouble::Conflict) {
                self.work.lose();
            }
        }
        match self.named(&self.work.name, object, done).await {
            Ok(Named::Ours) => Ok(self.published(&self.work.name)),
            Ok(Named::Taken) if self.work.new.if_exists == IfExists::Rename => {
                self.work.lose();
                Err(StoreError::Unavailable {
                    why: "another upload got the numbered name meanwhile".to_owned(),
                })
            }
            Ok(Named::Taken) => self.there().await,
            Err(StoreError::NotFound { .. }) => Err(StoreError::Unavailable {
                why: "its object store has lost the parts of the upload".to_owned(),
            }),
            Err(error) => Err(error),
        }
    }

    /// Completes the parts under a key of our own, and then gives the object its name.
    async fn publish_there(&self) -> Result<Published, StoreError> {
        let Work {
            inner, object, id, ..
        } = &*self.work;
        let id = id.as_ref().ok_or(StoreError::Broken)?;
        let completing = inner
            .backend
            .parts
            .complete_multipart(object, id, self.parts());
        if let Err(cause) = completing.await {
            // It may have been completed before, by a server that fell then.
            let there = self.is_there(object).await;
            if !there.is_ok_and(|there| there) {
                if trouble(&cause) == Trouble::Missing {
                    self.work.lose();
                    return Err(StoreError::Unavailable {
                        why: "its object store has lost the parts of the upload".to_owned(),
                    });
                }
                return Err(refused("complete an upload", None, &cause));
            }
        }
        self.first_name(From::Object(object)).await
    }

    /// The name is taken: what the client gets then.
    async fn there(&self) -> Result<Published, StoreError> {
        let path = &self.work.new.path;
        let exists = || StoreError::Exists { path: path.clone() };
        let inner = &self.work.inner;
        let Holder::File(object) = inner.holder(path).await? else {
            return Err(exists());
        };
        let policy = self.work.new.if_exists;
        let size = object.size;
        if !matches!(policy, IfExists::Same | IfExists::Skip)
            || (policy == IfExists::Same && size != self.size)
        {
            return Err(exists());
        }
        let hash = inner.stored(path, object).hash().await?;
        match policy == IfExists::Skip || hash == <[u8; 32]>::from(self.hash) {
            true => Ok(Published {
                size,
                hash,
                same: true,
                ..self.published(path)
            }),
            false => Err(exists()),
        }
    }
}

impl Inner {
    /// A name that is free, and that no other upload of this server is promised.
    pub(crate) async fn free_name(
        self: &Arc<Self>,
        path: &RelPath,
        holder: &Holder,
    ) -> Result<(RelPath, Promise), StoreError> {
        if matches!(holder, Holder::Nobody)
            && let Some(promise) = self.promise(path.as_str())
        {
            return Ok((path.clone(), promise));
        }
        for name in (1..=LAST_NUMBER).map_while(|number| numbered(path, number)) {
            let Some(promise) = self.promise(name.as_str()) else {
                continue;
            };
            if matches!(self.holder(&name).await?, Holder::Nobody) {
                return Ok((name, promise));
            }
        }
        Err(StoreError::Exists { path: path.clone() })
    }
}

/// `a/b (1).txt` of `a/b.txt`; `None` where that is no name.
fn numbered(path: &RelPath, number: u32) -> Option<RelPath> {
    let name = path.file_name();
    let at = path.as_str().len() - name.len()
        + name.rfind('.').filter(|at| *at > 0).unwrap_or(name.len());
    let (stem, extension) = path.as_str().split_at_checked(at)?;
    format!("{stem} ({number}){extension}").parse().ok()
}

/// Highest number that is tried for a free name.
const LAST_NUMBER: u32 = 999;
