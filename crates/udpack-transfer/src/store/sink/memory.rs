//! A [`Sink`] that keeps files in memory, for tests of programs that take uploads.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::{Abilities, Begun, Durable, Expected, NewUpload, Sink, Stored};
use crate::base::path::RelPath;
use crate::store::journal::merged;
use crate::store::publish::{LAST_NUMBER, numbered};
use crate::store::quota::charge;
use crate::store::tree::MAX_ENTRIES;
use crate::store::{
    Entry, IfExists, Kind, List, Meta, Overwrite, Page, Published, Range, Removed, StoreError,
    Synced,
};

/// Files in memory: all that a [`Sink`] can do but for directories and links, which it does not keep. A handle: clones
/// share the files. They are gone with the last of them, and what counts as durable lasts no longer.
///
/// A future of it is ready at once, so none can be dropped half way.
///
/// ```
/// use udpack_transfer::{Memory, Receiver, ReceiverConfig};
///
/// let files = Memory::new(64 << 20);
/// let receiver = Receiver::into_sink(files.clone(), ReceiverConfig::default());
/// // After an upload of `notes.txt`: `files.get("notes.txt")`.
/// # let _ = receiver;
/// assert_eq!(files.get("notes.txt"), None);
/// ```
#[derive(Clone, Debug)]
pub struct Memory {
    state: Arc<Mutex<State>>,
    used: Arc<AtomicU64>,
    limit: u64,
    overwrite: Overwrite,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, File>,
    /// Resumable uploads under way, by peer and path.
    live: HashSet<Key>,
    suspended: HashMap<Key, Body>,
}

type Key = (String, RelPath);

#[derive(Debug)]
struct File {
    bytes: Bytes,
    hash: [u8; 32],
    meta: Meta,
    _room: Room,
}

/// The bytes of an upload.
#[derive(Debug)]
struct Body {
    bytes: Vec<u8>,
    /// Beginnings and ends of what was written, in order and without overlap.
    written: Vec<(u64, u64)>,
    room: Room,
}

/// What something counts against the limit. Dropping it gives that back.
#[derive(Debug)]
struct Room {
    used: Arc<AtomicU64>,
    limit: u64,
    bytes: u64,
}

impl Room {
    /// Counts as a file of this size from now on.
    fn grow(&mut self, size: u64) -> Result<(), StoreError> {
        let Some(more) = charge(size).checked_sub(self.bytes) else {
            return Ok(());
        };
        let add = |used: u64| used.checked_add(more).filter(|used| *used <= self.limit);
        let added = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        added.map_err(|used| StoreError::Quota {
            need: more,
            left: self.limit.saturating_sub(used),
            quota: self.limit,
        })?;
        self.bytes += more;
        Ok(())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// An upload into a [`Memory`]. Dropping it suspends it.
#[derive(Debug)]
pub struct MemoryUpload {
    memory: Memory,
    path: RelPath,
    size: Option<u64>,
    if_exists: IfExists,
    /// Of a resumable one.
    key: Option<Key>,
    /// `None` once it is whole or gone.
    body: Option<Body>,
    durable: Durable,
    /// Nothing of it is to be kept.
    doomed: bool,
}

/// A whole file for a [`Memory`]. Dropping it discards it.
#[derive(Debug)]
pub struct MemoryWhole {
    path: RelPath,
    if_exists: IfExists,
    file: File,
}

impl Drop for MemoryUpload {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else {
            return;
        };
        let mut state = self.memory.state();
        state.live.remove(&key);
        if let Some(body) = self.body.take()
            && !self.doomed
            && !body.written.is_empty()
        {
            state.suspended.insert(key, body);
        }
    }
}

/// What has a name.
enum Holder<'a> {
    Nobody,
    File(&'a File),
    Dir,
}

impl State {
    fn holder(&self, path: &RelPath) -> Result<Holder<'_>, StoreError> {
        let name = path.as_str();
        let mut parents = name.match_indices('/').filter_map(|(at, _)| name.get(..at));
        let parent = parents.find(|parent| self.files.contains_key(*parent));
        if let Some(parent) = parent {
            return Err(StoreError::Blocked {
                path: path.clone(),
                parent: parent.to_string(),
            });
        }
        Ok(match self.files.get(path.as_str()) {
            Some(file) => Holder::File(file),
            None if self.below(path).next().is_some() => Holder::Dir,
            None => Holder::Nobody,
        })
    }

    /// The names of the files below a directory.
    fn below(&self, path: &RelPath) -> impl Iterator<Item = &String> {
        let prefix = format!("{path}/");
        let names = self.files.range(prefix.clone()..).map(|(name, _)| name);
        names.take_while(move |name| name.starts_with(&prefix))
    }

    fn stat(&self, path: &RelPath) -> Result<Entry, StoreError> {
        match self.holder(path) {
            Ok(Holder::File(file)) => Ok(file.entry(path.as_str())),
            Ok(Holder::Dir) => Ok(dir(path.as_str())),
            _ => Err(StoreError::NotFound { path: path.clone() }),
        }
    }

    fn list(&self, query: &List<'_>) -> Result<Page, StoreError> {
        let parts = |path: &str| path.split('/').map(str::to_owned).collect::<Vec<_>>();
        let base = query
            .path
            .map_or_else(Vec::new, |path| parts(path.as_str()));
        let after = query.after.filter(|after| !after.is_empty()).map(parts);
        let mut found = BTreeMap::new();
        for (name, file) in &self.files {
            let path = parts(name);
            if path == base {
                found.insert(path, file.entry(name));
                continue;
            }
            if !path.starts_with(&base) {
                continue;
            }
            let most = match query.recursive {
                true => path.len(),
                false => base.len() + 1,
            };
            for depth in base.len() + 1..=most.min(path.len()) {
                let path = path.get(..depth).unwrap_or_default().to_vec();
                let name = path.join("/");
                let entry = match self.files.get(&name) {
                    Some(file) => file.entry(&name),
                    None => dir(&name),
                };
                found.insert(path, entry);
            }
        }
        if let Some(path) = query.path
            && found.is_empty()
        {
            return Err(StoreError::NotFound { path: path.clone() });
        }
        let mut entries = found
            .into_iter()
            .filter(|(path, _)| after.as_ref().is_none_or(|after| path > after));
        let limit = query.limit.clamp(1, MAX_ENTRIES);
        Ok(Page {
            entries: entries
                .by_ref()
                .take(limit)
                .map(|(_, entry)| entry)
                .collect(),
            more: entries.next().is_some(),
        })
    }

    fn remove(&mut self, path: &RelPath, recursive: bool) -> Result<Removed, StoreError> {
        let names: Vec<String> = match self.holder(path) {
            Ok(Holder::File(_)) => vec![path.as_str().to_owned()],
            Ok(Holder::Dir) if recursive => self.below(path).cloned().collect(),
            Ok(Holder::Dir) => return Err(StoreError::NotEmpty { path: path.clone() }),
            _ => return Err(StoreError::NotFound { path: path.clone() }),
        };
        let mut removed = Removed::default();
        for file in names.iter().filter_map(|name| self.files.remove(name)) {
            removed.files += 1;
            removed.bytes += file.bytes.len() as u64;
        }
        Ok(removed)
    }

    fn publish(&mut self, whole: MemoryWhole) -> Result<Published, StoreError> {
        let MemoryWhole {
            path,
            if_exists,
            file,
        } = whole;
        let exists = || StoreError::Exists { path: path.clone() };
        let mut name = path.as_str().to_owned();
        match (self.holder(&path)?, if_exists) {
            (Holder::Nobody, _) | (Holder::File(_), IfExists::Overwrite) => {}
            (Holder::File(there), IfExists::Skip) => return Ok(there.published(name, true)),
            (Holder::File(there), IfExists::Same) if there.hash == file.hash => {
                return Ok(there.published(name, true));
            }
            (_, IfExists::Rename) => {
                let free = |name: &String| {
                    let path = name.parse::<RelPath>();
                    path.is_ok_and(|path| matches!(self.holder(&path), Ok(Holder::Nobody)))
                };
                let mut numbers = (1..=LAST_NUMBER).map(|number| numbered(&path, number));
                name = numbers.find(free).ok_or_else(exists)?;
            }
            _ => return Err(exists()),
        }
        let published = file.published(name.clone(), false);
        self.files.insert(name, file);
        Ok(published)
    }
}

impl File {
    fn entry(&self, path: &str) -> Entry {
        Entry {
            kind: Kind::File,
            size: self.bytes.len() as u64,
            mtime: self.meta.mtime.unwrap_or_default(),
            mode: self.meta.mode.unwrap_or(0o600) & 0o777,
            ..dir(path)
        }
    }

    fn published(&self, path: String, same: bool) -> Published {
        Published {
            path,
            size: self.bytes.len() as u64,
            hash: self.hash,
            same,
            sync: Synced::None,
            other_time: None,
            xattrs: 0,
        }
    }
}

fn dir(path: &str) -> Entry {
    Entry {
        path: path.to_owned(),
        kind: Kind::Dir,
        size: 0,
        mtime: crate::store::Time::default(),
        mode: 0o700,
        target: None,
        unread: false,
    }
}

impl Memory {
    /// Takes so many bytes, what is suspended included. An empty file counts 1,024.
    pub fn new(limit: u64) -> Self {
        Self {
            state: Arc::default(),
            used: Arc::default(),
            limit,
            overwrite: Overwrite::Never,
        }
    }

    /// Grants clients this, at most, where a name is taken. [`Overwrite::Never`] otherwise.
    #[must_use]
    pub fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// The bytes of the file that has this name.
    pub fn get(&self, path: &str) -> Option<Bytes> {
        let state = self.state();
        state.files.get(path).map(|file| file.bytes.clone())
    }

    /// The names of all files, in the order of their bytes.
    pub fn names(&self) -> Vec<String> {
        self.state().files.keys().cloned().collect()
    }

    /// Bytes of the limit that are taken.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change leaves the state consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begun(&self, new: &NewUpload<'_>) -> Result<Begun<MemoryUpload>, StoreError> {
        let path = new.path;
        if new.if_exists.needs() > self.overwrite {
            return Err(StoreError::Forbidden {
                asked: new.if_exists,
                granted: self.overwrite,
            });
        }
        if let Some(size) = new.size.filter(|size| *size > self.limit) {
            let limit = self.limit;
            return Err(StoreError::TooLarge { size, limit });
        }
        let mut state = self.state();
        match (state.holder(path)?, new.if_exists) {
            (Holder::Nobody, _)
            | (_, IfExists::Rename)
            | (Holder::File(_), IfExists::Overwrite) => {}
            (Holder::File(file), IfExists::Same | IfExists::Skip) => {
                return Ok(Begun::Exists(file.stored(path)));
            }
            _ => return Err(StoreError::Exists { path: path.clone() }),
        }
        let key = (new.peer.to_owned(), path.clone());
        let mut kept = None;
        if new.resumable {
            if state.live.contains(&key) {
                return Err(StoreError::Busy { path: path.clone() });
            }
            kept = state.suspended.remove(&key);
        }
        let room = Room {
            used: self.used.clone(),
            limit: self.limit,
            bytes: 0,
        };
        let mut body = kept.unwrap_or(Body {
            bytes: Vec::new(),
            written: Vec::new(),
            room,
        });
        if let Err(error) = body.room.grow(new.size.unwrap_or(0)) {
            if !body.written.is_empty() {
                state.suspended.insert(key, body);
            }
            return Err(error);
        }
        let key = new.resumable.then_some(key);
        state.live.extend(key.clone());
        let upload = MemoryUpload {
            memory: self.clone(),
            path: path.clone(),
            size: new.size,
            if_exists: new.if_exists,
            key,
            durable: Durable::default(),
            body: Some(body),
            doomed: false,
        };
        upload.settle();
        Ok(Begun::New(upload))
    }
}

impl File {
    fn stored(&self, path: &RelPath) -> Stored {
        let size = self.bytes.len() as u64;
        Stored::new(path.clone(), size, self.meta, self.bytes.clone())
    }
}

impl MemoryUpload {
    /// What is written is as durable as it gets.
    fn settle(&self) {
        let first = self.body.as_ref().and_then(|body| body.written.first());
        if let Some((0, end)) = first
            && self.key.is_some()
        {
            self.durable.raise(*end);
        }
    }

    fn have(&self) -> Vec<Range> {
        let body = self.body.iter().filter(|_| self.key.is_some());
        body.flat_map(|body| {
            body.written.iter().map(|(start, end)| Range {
                off: *start,
                len: end - start,
                hash: blake3::hash(slice(&body.bytes, *start, *end)).into(),
            })
        })
        .take(MOST_RANGES)
        .collect()
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let end = offset.saturating_add(bytes.len() as u64);
        let limit = self.memory.limit;
        let written = match (self.size, &mut self.body) {
            (Some(expected), _) if end > expected => {
                Err(StoreError::SizeMismatch { expected, got: end })
            }
            (_, Some(body)) if end <= limit => body.write(offset, bytes),
            (_, Some(_)) => Err(StoreError::TooLarge { size: end, limit }),
            (_, None) => Err(StoreError::Broken),
        };
        self.doomed |= written.is_err();
        written
    }

    fn finish(mut self, expected: Expected) -> Result<MemoryWhole, StoreError> {
        self.doomed = true;
        let body = self.body.take().ok_or(StoreError::Broken)?;
        let got = match body.written[..] {
            [] => 0,
            // What lies beyond a gap is no part of the file.
            [(0, end), ..] => end,
            _ => 0,
        };
        let all = body.bytes.len() as u64;
        for expected in [self.size, expected.size, Some(all)].into_iter().flatten() {
            if expected != got {
                return Err(StoreError::SizeMismatch { expected, got });
            }
        }
        let hash = blake3::hash(&body.bytes).into();
        if let Some(expected) = expected.hash.filter(|expected| *expected != hash) {
            let got = hash;
            return Err(StoreError::HashMismatch { expected, got });
        }
        Ok(MemoryWhole {
            path: self.path.clone(),
            if_exists: self.if_exists,
            file: File {
                bytes: body.bytes.into(),
                hash,
                meta: expected.meta,
                _room: body.room,
            },
        })
    }
}

impl Body {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let end = offset.saturating_add(bytes.len() as u64);
        self.room.grow(end)?;
        let too_large = |_| StoreError::TooLarge {
            size: end,
            limit: usize::MAX as u64,
        };
        let from = usize::try_from(offset).map_err(too_large)?;
        let to = usize::try_from(end).map_err(too_large)?;
        if self.bytes.len() < to {
            self.bytes.resize(to, 0);
        }
        if let Some(room) = self.bytes.get_mut(from..to) {
            room.copy_from_slice(bytes);
        }
        self.written.push((offset, end));
        self.written = merged(std::mem::take(&mut self.written));
        match self.written.len() > MOST_RANGES {
            true => Err(StoreError::Unavailable {
                why: format!("more than {MOST_RANGES} ranges with gaps between them"),
            }),
            false => Ok(()),
        }
    }
}

fn slice(bytes: &[u8], start: u64, end: u64) -> &[u8] {
    let at = |offset| usize::try_from(offset).unwrap_or(usize::MAX);
    bytes.get(at(start)..at(end)).unwrap_or_default()
}

impl Sink for Memory {
    type Upload = MemoryUpload;
    type Whole = MemoryWhole;

    fn abilities(&self) -> Abilities {
        Abilities::ALL
    }

    async fn begin(&self, new: &NewUpload<'_>) -> Result<Begun<MemoryUpload>, StoreError> {
        self.begun(new)
    }

    fn durable(&self, upload: &MemoryUpload) -> Durable {
        upload.durable.clone()
    }

    async fn have(&self, upload: &mut MemoryUpload) -> Result<Vec<Range>, StoreError> {
        Ok(upload.have())
    }

    async fn write(
        &self,
        upload: &mut MemoryUpload,
        offset: u64,
        bytes: Bytes,
    ) -> Result<(), StoreError> {
        upload.write(offset, &bytes)
    }

    async fn checkpoint(&self, upload: &mut MemoryUpload) -> Result<(), StoreError> {
        upload.settle();
        Ok(())
    }

    async fn finish(
        &self,
        upload: MemoryUpload,
        expected: Expected,
    ) -> Result<MemoryWhole, StoreError> {
        upload.finish(expected)
    }

    async fn publish(&self, whole: MemoryWhole) -> Result<Published, StoreError> {
        self.state().publish(whole)
    }

    async fn abort(&self, mut upload: MemoryUpload) {
        upload.doomed = true;
        drop(upload);
    }

    async fn stat(&self, path: Option<&RelPath>) -> Result<Entry, StoreError> {
        path.map_or_else(|| Ok(dir("")), |path| self.state().stat(path))
    }

    async fn list(&self, query: &List<'_>) -> Result<Page, StoreError> {
        self.state().list(query)
    }

    async fn read(&self, path: &RelPath) -> Result<Stored, StoreError> {
        match self.state().holder(path) {
            Ok(Holder::File(file)) => Ok(file.stored(path)),
            Ok(Holder::Dir) => Err(StoreError::IsDirectory { path: path.clone() }),
            _ => Err(StoreError::NotFound { path: path.clone() }),
        }
    }

    async fn remove(&self, path: &RelPath, recursive: bool) -> Result<Removed, StoreError> {
        self.state().remove(path, recursive)
    }
}

/// Ranges that an upload is told of, at most.
const MOST_RANGES: usize = 8_192;
