//! What is there: looking at names, listing, reading, removing.
//!
//! A key is a name with slashes in it. A directory is there for as long as a key lies below it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{try_join, try_join_all};
use futures_util::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, Error as Cause, GetOptions, ObjectMeta, ObjectStore as _,
    ObjectStoreExt as _,
};
use udpack_transfer::{
    Entry, Kind, List, Meta, Page, ReadAt, RelPath, Removed, StoreError, Stored, Time,
};

use crate::error::{Trouble, refused, trouble};
use crate::sink::{Inner, lock};

/// An object, with what is noted about it.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) key: Path,
    pub(crate) size: u64,
    pub(crate) tag: Option<String>,
    pub(crate) meta: Meta,
    /// The upload that made it.
    pub(crate) nonce: Option<String>,
    hash: Option<blake3::Hash>,
}

/// What has a name.
#[derive(Debug)]
pub(crate) enum Holder {
    Nobody,
    File(Object),
    Dir,
}

/// What an object carries beside its bytes.
pub(crate) fn attributes(meta: Meta, nonce: &str, hash: Option<blake3::Hash>) -> Attributes {
    let mut attributes = Attributes::new();
    let mut add = |name: &'static str, value: String| {
        attributes.insert(Attribute::Metadata(Cow::Borrowed(name)), value.into());
    };
    add(UPLOAD, nonce.to_owned());
    if let Some(mtime) = meta.mtime {
        add(MTIME, format!("{}.{:09}", mtime.secs, mtime.nanos));
    }
    if let Some(mode) = meta.mode {
        add(MODE, format!("{:03o}", mode & 0o777));
    }
    if let Some(hash) = hash {
        add(HASH, hash.to_string());
    }
    attributes
}

fn object(found: &ObjectMeta, attributes: &Attributes) -> Object {
    let told = |name: &'static str| {
        let value = attributes.get(&Attribute::Metadata(Cow::Borrowed(name)));
        value.map(|value| value.as_ref())
    };
    let mtime = told(MTIME).and_then(|text| {
        let (secs, nanos) = text.split_once('.')?;
        Some(Time {
            secs: secs.parse().ok()?,
            nanos: nanos.parse().ok().filter(|nanos| *nanos < 1_000_000_000)?,
        })
    });
    let mode = told(MODE).and_then(|text| u32::from_str_radix(text, 8).ok());
    Object {
        key: found.location.clone(),
        size: found.size,
        tag: found.e_tag.clone(),
        meta: Meta {
            mtime: Some(mtime.unwrap_or_else(|| modified(found))),
            mode: Some(mode.unwrap_or(0o600) & 0o777),
        },
        nonce: told(UPLOAD).map(str::to_owned),
        hash: told(HASH).and_then(|text| blake3::Hash::from_hex(text).ok()),
    }
}

fn modified(found: &ObjectMeta) -> Time {
    std::time::SystemTime::from(found.last_modified).into()
}

fn entry(path: &str, size: u64, meta: Meta) -> Entry {
    Entry {
        path: path.to_owned(),
        kind: Kind::File,
        size,
        mtime: meta.mtime.unwrap_or_default(),
        mode: meta.mode.unwrap_or(0o600),
        target: None,
        unread: false,
    }
}

fn dir(path: &str) -> Entry {
    Entry {
        kind: Kind::Dir,
        mode: 0o700,
        ..entry(path, 0, Meta::default())
    }
}

impl Inner {
    /// The object that has this key.
    pub(crate) async fn object(&self, key: &Path) -> Result<Option<Object>, Cause> {
        let options = GetOptions {
            head: true,
            ..GetOptions::default()
        };
        match self.backend.store.get_opts(key, options).await {
            Ok(found) => Ok(Some(object(&found.meta, &found.attributes))),
            Err(cause) if trouble(&cause) == Trouble::Missing => Ok(None),
            Err(cause) => Err(cause),
        }
    }

    /// The hash that is noted beside the object, if one is.
    pub(crate) async fn noted_hash(&self, object: &Object) -> Option<blake3::Hash> {
        match (object.hash, &self.backend.s3) {
            (None, Some(s3)) => s3.tagged(&object.key).await.ok().flatten(),
            (hash, _) => hash,
        }
    }

    /// What has the name. [`StoreError::Blocked`] where a file is in the way.
    pub(crate) async fn holder(&self, path: &RelPath) -> Result<Holder, StoreError> {
        let key = self.key(path)?;
        let failed = |cause| refused("look at a name", Some(path), &cause);
        let here = async { self.object(&key).await.map_err(failed) };
        let (here, ()) = try_join(here, self.unblocked(path)).await?;
        if let Some(object) = here {
            return Ok(Holder::File(object));
        }
        let mut below = self.backend.store.list(Some(&key));
        match below.try_next().await {
            Ok(Some(_)) => Ok(Holder::Dir),
            Ok(None) => Ok(Holder::Nobody),
            Err(cause) if trouble(&cause) == Trouble::Missing => Ok(Holder::Nobody),
            Err(cause) => Err(failed(cause)),
        }
    }

    /// Whether no part of the way to the name is a file. What was seen is believed for a while.
    async fn unblocked(&self, path: &RelPath) -> Result<(), StoreError> {
        let name = path.as_str();
        let parents = name.match_indices('/').filter_map(|(at, _)| name.get(..at));
        let unseen: Vec<&str> = {
            let mut seen = lock(&self.passable);
            seen.retain(|_, since| since.elapsed() < BELIEVED);
            parents
                .filter(|parent| !seen.contains_key(*parent))
                .collect()
        };
        let looks = unseen.iter().map(|parent| async {
            let Some(key) = self.backend.key(parent) else {
                return Ok(());
            };
            match self.object(&key).await {
                Ok(None) => Ok(()),
                Ok(Some(_)) => Err(StoreError::Blocked {
                    path: path.clone(),
                    parent: (*parent).to_owned(),
                }),
                Err(cause) => Err(refused("look at a name", Some(path), &cause)),
            }
        });
        try_join_all(looks).await?;
        let mut seen = lock(&self.passable);
        for parent in unseen {
            if seen.len() < MOST_SEEN {
                seen.insert(parent.to_owned(), Instant::now());
            }
        }
        Ok(())
    }

    pub(crate) async fn stat(&self, path: Option<&RelPath>) -> Result<Entry, StoreError> {
        let Some(path) = path else {
            return Ok(dir(""));
        };
        match self.holder(path).await {
            Ok(Holder::File(object)) => Ok(entry(path.as_str(), object.size, object.meta)),
            Ok(Holder::Dir) => Ok(dir(path.as_str())),
            Ok(Holder::Nobody)
            | Err(StoreError::Blocked { .. } | StoreError::Unstorable { .. }) => {
                Err(StoreError::NotFound { path: path.clone() })
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn list(&self, query: &List<'_>) -> Result<Page, StoreError> {
        if let Some(path) = query.path {
            let found = self.stat(Some(path)).await?;
            if found.kind == Kind::File {
                let entries = match query.after.is_some_and(|after| after >= path.as_str()) {
                    true => Vec::new(),
                    false => vec![found],
                };
                return Ok(Page {
                    entries,
                    more: false,
                });
            }
        }
        let base = query.path.map_or("", RelPath::as_str);
        let mut nearest = Nearest::new(base, query);
        let listed = match query.recursive {
            true => self.walk(base, query, &mut nearest).await,
            false => self.level(base, &mut nearest).await,
        };
        listed.map_err(|cause| refused("list what is there", query.path, &cause))?;
        Ok(nearest.page())
    }

    /// Everything below.
    async fn walk(&self, base: &str, query: &List<'_>, nearest: &mut Nearest) -> Result<(), Cause> {
        let prefix = self.base(base);
        let after = query.after.filter(|after| !after.is_empty());
        // What follows in the order of components has a key that follows this one.
        let skip = after.and_then(|after| {
            let below = after.strip_prefix(base)?.trim_start_matches('/');
            let first = below.split('/').next()?;
            let name = match base {
                "" => first.to_owned(),
                base => format!("{base}/{first}"),
            };
            self.backend.key(&name)
        });
        let store = &self.backend.store;
        let mut objects: BoxStream<'_, _> = match &skip {
            Some(skip) if self.backend.sorted => store.list_with_offset(prefix.as_ref(), skip),
            _ => store.list(prefix.as_ref()),
        };
        // The offset is exclusive, and may be a file itself, which came before then.
        while let Some(found) = objects.next().await {
            let found = found?;
            let Some(name) = self.backend.name(&found.location) else {
                continue;
            };
            if self.backend.sorted && nearest.is_past(name) {
                break;
            }
            nearest.add_file(name, &found);
        }
        Ok(())
    }

    /// What is directly below.
    async fn level(&self, base: &str, nearest: &mut Nearest) -> Result<(), Cause> {
        let prefix = self.base(base);
        let found = self
            .backend
            .store
            .list_with_delimiter(prefix.as_ref())
            .await?;
        for key in &found.common_prefixes {
            if let Some(name) = self.backend.name(key) {
                nearest.add(name, || dir(name));
            }
        }
        for object in &found.objects {
            if let Some(name) = self.backend.name(&object.location) {
                nearest.add(name, || listed(name, object));
            }
        }
        Ok(())
    }

    /// The prefix of the keys below a directory.
    pub(crate) fn base(&self, base: &str) -> Option<Path> {
        match base {
            "" if self.backend.prefix.is_empty() => None,
            "" => Path::parse(&self.backend.prefix).ok(),
            base => self.backend.key(base),
        }
    }

    pub(crate) async fn open(self: &Arc<Self>, path: &RelPath) -> Result<Stored, StoreError> {
        match self.holder(path).await {
            Ok(Holder::File(object)) => Ok(self.stored(path, object)),
            Ok(Holder::Dir) => Err(StoreError::IsDirectory { path: path.clone() }),
            Ok(Holder::Nobody)
            | Err(StoreError::Blocked { .. } | StoreError::Unstorable { .. }) => {
                Err(StoreError::NotFound { path: path.clone() })
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) fn stored(self: &Arc<Self>, path: &RelPath, object: Object) -> Stored {
        let (size, meta) = (object.size, object.meta);
        let reader = Reader {
            inner: self.clone(),
            path: path.clone(),
            object,
            block: Mutex::default(),
        };
        Stored::new(path.clone(), size, meta, reader)
    }

    pub(crate) async fn remove(
        &self,
        path: &RelPath,
        recursive: bool,
    ) -> Result<Removed, StoreError> {
        let failed = |cause: Cause| refused("remove an object", Some(path), &cause);
        let mut removed = Removed::default();
        match self.holder(path).await {
            Ok(Holder::File(object)) => {
                self.backend
                    .store
                    .delete(&object.key)
                    .await
                    .map_err(failed)?;
                removed.files = 1;
                removed.bytes = object.size;
                lock(&self.accounts).removed(path, object.size);
                Ok(removed)
            }
            Ok(Holder::Dir) if recursive => {
                let key = self.key(path)?;
                let mut below = self.backend.store.list(Some(&key)).chunks(BATCH);
                while let Some(batch) = below.next().await {
                    let batch: Result<Vec<_>, _> = batch.into_iter().collect();
                    let batch = batch.map_err(failed)?;
                    for object in &batch {
                        removed.files += 1;
                        removed.bytes = removed.bytes.saturating_add(object.size);
                    }
                    let keys = batch.into_iter().map(|object| Ok(object.location));
                    let keys = futures_util::stream::iter(keys).boxed();
                    let deleted = self.backend.store.delete_stream(keys);
                    let done: Result<Vec<_>, _> = deleted.try_collect().await;
                    done.map_err(failed)?;
                }
                lock(&self.accounts).removed(path, removed.bytes);
                Ok(removed)
            }
            Ok(Holder::Dir) => Err(StoreError::NotEmpty { path: path.clone() }),
            Ok(Holder::Nobody)
            | Err(StoreError::Blocked { .. } | StoreError::Unstorable { .. }) => {
                Err(StoreError::NotFound { path: path.clone() })
            }
            Err(error) => Err(error),
        }
    }
}

fn listed(name: &str, found: &ObjectMeta) -> Entry {
    let meta = Meta {
        mtime: Some(modified(found)),
        mode: None,
    };
    entry(name, found.size, meta)
}

/// The first entries behind a place, in the order of components, of what comes in another order.
struct Nearest {
    /// Components below the base of the last entry of the page before.
    after: Option<Vec<String>>,
    base: String,
    limit: usize,
    found: BTreeMap<Vec<String>, Entry>,
}

impl Nearest {
    fn new(base: &str, query: &List<'_>) -> Self {
        let after = query.after.filter(|after| !after.is_empty());
        Self {
            after: after.map(components),
            base: base.to_owned(),
            limit: query.limit.clamp(1, MOST_LISTED),
            found: BTreeMap::new(),
        }
    }

    fn add(&mut self, name: &str, entry: impl FnOnce() -> Entry) {
        // What is ours is no name, nor is what other programs have stored under keys that are none.
        if name.parse::<RelPath>().is_err() || name == self.base {
            return;
        }
        let key = components(name);
        if self.after.as_ref().is_some_and(|after| key <= *after) {
            return;
        }
        self.found.entry(key).or_insert_with(entry);
        // One more says that there are more.
        while self.found.len() > self.limit + 1 {
            self.found.pop_last();
        }
    }

    /// A file, and the directories between it and the base.
    fn add_file(&mut self, name: &str, found: &ObjectMeta) {
        let from = self.base.len() + usize::from(!self.base.is_empty());
        for (at, _) in name.match_indices('/').filter(|(at, _)| *at >= from) {
            if let Some(parent) = name.get(..at) {
                self.add(parent, || dir(parent));
            }
        }
        self.add(name, || listed(name, found));
    }

    /// Whether nothing that is nearer than what was found has a key behind this one.
    fn is_past(&self, name: &str) -> bool {
        if self.found.len() <= self.limit {
            return false;
        }
        let Some((last, _)) = self.found.last_key_value() else {
            return false;
        };
        let last = last.join("/");
        // A slash is the least of all in the order of components. So what is nearer and has a greater key has a slash where the last one
        // has something less than that.
        let mut bytes = last.bytes().enumerate().skip(self.base.len());
        let differs = bytes.find(|(_, byte)| *byte < b'/').map(|(at, _)| at);
        let bound = match differs.and_then(|at| last.get(..at)) {
            Some(same) => format!("{same}0"),
            None => last,
        };
        name > bound.as_str()
    }

    fn page(mut self) -> Page {
        let more = self.found.len() > self.limit;
        if more {
            self.found.pop_last();
        }
        Page {
            entries: self.found.into_values().collect(),
            more,
        }
    }
}

fn components(path: &str) -> Vec<String> {
    path.split('/').map(str::to_owned).collect()
}

/// An object, open for reading.
struct Reader {
    inner: Arc<Inner>,
    path: RelPath,
    object: Object,
    /// What was read last, and where it begins: a request for each chunk of a download would wait for the network each time.
    block: Mutex<(u64, Bytes)>,
}

impl ReadAt for Reader {
    async fn read_at(&self, offset: u64, len: usize) -> Result<Bytes, StoreError> {
        if let Some(bytes) = self.held(offset, len) {
            return Ok(bytes);
        }
        let bytes = self.fetch(offset, len.max(BLOCK)).await?;
        *lock(&self.block) = (offset, bytes.clone());
        Ok(bytes.slice(..len.min(bytes.len())))
    }

    async fn hash(&self) -> Result<[u8; 32], StoreError> {
        if let Some(hash) = self.inner.noted_hash(&self.object).await {
            return Ok(hash.into());
        }
        let mut hasher = blake3::Hasher::new();
        while hasher.count() < self.object.size {
            let bytes = self.fetch(hasher.count(), READ).await?;
            if bytes.is_empty() {
                return Err(StoreError::Broken);
            }
            hasher.update(&bytes);
        }
        Ok(hasher.finalize().into())
    }
}

impl Reader {
    /// Bytes of the block, if it has some at this place.
    fn held(&self, offset: u64, len: usize) -> Option<Bytes> {
        let block = lock(&self.block);
        let from = usize::try_from(offset.checked_sub(block.0)?).ok()?;
        let bytes = block.1.get(from..)?;
        (!bytes.is_empty()).then(|| block.1.slice(from..from + len.min(bytes.len())))
    }

    async fn fetch(&self, offset: u64, len: usize) -> Result<Bytes, StoreError> {
        let end = offset.saturating_add(len as u64).min(self.object.size);
        if offset >= end {
            return Ok(Bytes::new());
        }
        let options = GetOptions {
            range: Some((offset..end).into()),
            // Not those of another object that got the name meanwhile.
            if_match: self.object.tag.clone(),
            ..GetOptions::default()
        };
        let reading = async {
            let found = self.inner.backend.store.get_opts(&self.object.key, options);
            found.await?.bytes().await
        };
        reading.await.map_err(|cause| match trouble(&cause) {
            Trouble::Taken | Trouble::Missing => StoreError::Unavailable {
                why: "the object was replaced or removed while it was read".to_owned(),
            },
            _ => refused("read an object", Some(&self.path), &cause),
        })
    }
}

/// What an object's metadata calls the upload that made it, its time, its permissions and its hash.
const UPLOAD: &str = "udpack-upload";
const MTIME: &str = "udpack-mtime";
const MODE: &str = "udpack-mode";
const HASH: &str = "udpack-blake3";
/// How long a directory is believed to be none a file.
const BELIEVED: Duration = Duration::from_secs(10);
/// Directories that are remembered, at most.
const MOST_SEEN: usize = 4096;
/// Entries of a page, at most.
const MOST_LISTED: usize = 10_000;
/// Objects that are removed by one request.
const BATCH: usize = 1000;
/// Bytes read at a time for a hash.
const READ: usize = 4 << 20;
/// Bytes read at a time for a download, which holds them.
const BLOCK: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_entries_are_found_whatever_bytes_are_less_than_a_slash() {
        let mut names = vec![
            "a", "a b/c", "a!", "a/x", "a/y-z", "a/y/q", "a-b", "b", "b+/c", "b/c/d", "c",
        ];
        names.retain(|name| *name != "a" && *name != "b");
        let mut sorted = names.clone();
        sorted.sort_unstable();
        let mut all = Vec::new();
        for name in &names {
            let parts: Vec<_> = name.split('/').collect();
            all.extend((1..=parts.len()).map(|depth| components(&parts[..depth].join("/"))));
        }
        all.sort();
        all.dedup();
        for limit in 1..all.len() + 1 {
            let mut after: Option<String> = None;
            let mut paged = Vec::new();
            loop {
                let query = List {
                    recursive: true,
                    after: after.as_deref(),
                    limit,
                    ..List::default()
                };
                let mut nearest = Nearest::new("", &query);
                for name in &sorted {
                    if nearest.is_past(name) {
                        break;
                    }
                    let found = ObjectMeta {
                        location: Path::parse(name).unwrap(),
                        last_modified: std::time::SystemTime::UNIX_EPOCH.into(),
                        size: 1,
                        e_tag: None,
                        version: None,
                    };
                    nearest.add_file(name, &found);
                }
                let page = nearest.page();
                paged.extend(page.entries.iter().map(|entry| components(&entry.path)));
                if !page.more {
                    break;
                }
                after = page.entries.last().map(|entry| entry.path.clone());
            }
            assert_eq!(paged, all, "{limit}");
        }
    }
}
