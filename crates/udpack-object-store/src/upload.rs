//! [`ObjectUpload`]: the bytes of a file on their way into parts.
//!
//! The part that is being filled is in memory. A full one is stored by a task of its own, noted in the journal, and only then
//! counted as durable. An upload that is dropped is suspended by a task.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use object_store::PutMultipartOptions;
use object_store::path::Path;
use tokio::task::JoinSet;
use udpack_transfer::{
    Begun, Durable, Expected, IfExists, Meta, Names, NewUpload, Overwrite, Range, RelPath,
    StoreError,
};

use crate::error::{Trouble, refused, trouble};
use crate::journal::{Head, Journal, Key, Part, Record};
use crate::look::{Holder, attributes};
use crate::publish::ObjectWhole;
use crate::quota::Reserved;
use crate::sink::{Hold, Inner, Live, Promise, lock};
use crate::tree;

/// An upload into an object store. Dropping it suspends it, within a runtime.
#[derive(Debug)]
pub struct ObjectUpload {
    /// `None` once it is whole or gone.
    work: Option<Box<Work>>,
}

impl Drop for ObjectUpload {
    fn drop(&mut self) {
        if let Some(work) = self.work.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(work.suspend());
        }
    }
}

/// What an upload is made of.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) inner: Arc<Inner>,
    pub(crate) new: Wanted,
    /// The object of its parts.
    pub(crate) object: Path,
    pub(crate) nonce: String,
    /// The name that it gets, if the store refuses no other then.
    pub(crate) name: RelPath,
    #[expect(dead_code, reason = "held for the name")]
    pub(crate) promise: Option<Promise>,
    /// Its room within the quotas.
    pub(crate) room: Option<Reserved>,
    pub(crate) parts: Arc<Parts>,
    /// The store's id of it, when there is a part.
    pub(crate) id: Option<String>,
    /// The object is complete: the server fell before it could say so.
    pub(crate) complete: bool,
    position: u64,
    buffer: Vec<u8>,
    hold: Option<Hold>,
    tasks: JoinSet<Result<(), StoreError>>,
    failed: bool,
}

/// What is to be stored, as it was asked for.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) path: RelPath,
    pub(crate) peer: String,
    pub(crate) size: Option<u64>,
    pub(crate) meta: Meta,
    pub(crate) if_exists: IfExists,
    resumable: bool,
}

/// What the tasks of an upload share.
#[derive(Debug)]
pub(crate) struct Parts {
    /// Bytes of each but the last.
    pub(crate) len: u64,
    pub(crate) stored: Mutex<BTreeMap<u32, Part>>,
    pub(crate) journal: Mutex<Option<Journal>>,
    durable: Durable,
    /// The store has forgotten the upload.
    lost: AtomicBool,
    /// Released when the last task that might write the journal is gone.
    live: Live,
}

impl Parts {
    /// Bytes from the beginning on that are stored.
    fn contiguous(&self) -> u64 {
        let stored = lock(&self.stored);
        let mut end = 0;
        for (at, part) in stored.iter() {
            if u64::from(*at) * self.len != end {
                break;
            }
            end += part.len;
        }
        end
    }

    /// Whether all bytes between these places are stored.
    fn covers(&self, from: u64, to: u64) -> bool {
        let stored = lock(&self.stored);
        let mut at = from;
        while at < to {
            let number = at / self.len;
            let part = u32::try_from(number).ok().and_then(|it| stored.get(&it));
            match part.map(|part| number * self.len + part.len) {
                Some(end) if end > at => at = end,
                _ => return false,
            }
        }
        true
    }

    fn note(&self, at: u32, part: Part) -> std::io::Result<()> {
        let mut journal = lock(&self.journal);
        // One that is being ended has none any more.
        if let Some(journal) = &mut *journal {
            journal.part(at, &part)?;
            lock(&self.stored).insert(at, part);
            self.durable.raise(self.contiguous());
        }
        Ok(())
    }
}

impl ObjectUpload {
    pub(crate) async fn begin(
        inner: &Arc<Inner>,
        new: &NewUpload<'_>,
    ) -> Result<Begun<Self>, StoreError> {
        inner.admit(new)?;
        let holder = inner.holder(new.path).await?;
        let key = match new.resumable {
            true => Key::new(new.peer, new.path),
            false => Key::unique().map_err(crate::error::journal)?,
        };
        let busy = || StoreError::Busy {
            path: new.path.clone(),
        };
        let live = inner.live(key).ok_or_else(busy)?;
        let (dir, key) = (inner.dir.clone(), live.key.clone());
        let kept = Inner::aside(move || Journal::resume(&dir, &key)).await?;
        if let Some((journal, record)) = kept {
            let complete = inner.is_complete(&record, &holder, new).await?;
            if complete || record.fits(inner, new, &holder) {
                let mut work = Work::resumed(inner, new, live, journal, record, complete)?;
                work.reserve(new.size.unwrap_or(0)).await?;
                return Ok(Begun::New(Self {
                    work: Some(Box::new(work)),
                }));
            }
            inner.end(journal).await;
        }
        match (&holder, new.if_exists) {
            (Holder::Nobody, _)
            | (_, IfExists::Rename)
            | (Holder::File(_), IfExists::Overwrite) => {}
            (Holder::File(object), IfExists::Same | IfExists::Skip) => {
                return Ok(Begun::Exists(inner.stored(new.path, object.clone())));
            }
            _ => {
                return Err(StoreError::Exists {
                    path: new.path.clone(),
                });
            }
        }
        let mut work = Work::begun(inner, new, live, &holder).await?;
        work.reserve(new.size.unwrap_or(0)).await?;
        Ok(Begun::New(Self {
            work: Some(Box::new(work)),
        }))
    }

    fn work(&mut self) -> Result<&mut Work, StoreError> {
        self.work.as_deref_mut().ok_or(StoreError::Broken)
    }

    pub(crate) fn durable(&self) -> Durable {
        let work = self.work.as_ref();
        work.map_or_else(Durable::default, |work| work.parts.durable.clone())
    }

    pub(crate) fn have(&self) -> Vec<Range> {
        let Some(work) = &self.work else {
            return Vec::new();
        };
        let stored = lock(&work.parts.stored);
        let ranges = stored.iter().map(|(at, part)| Range {
            off: u64::from(*at) * work.parts.len,
            len: part.len,
            hash: part.hash.into(),
        });
        ranges.take(MOST_RANGES).collect()
    }

    pub(crate) async fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let work = self.work()?;
        let written = match work.failed {
            true => Err(StoreError::Broken),
            false => work.write(offset, bytes).await,
        };
        work.failed |= !matches!(written, Ok(()) | Err(StoreError::BadOffset { .. }));
        written
    }

    pub(crate) async fn settle(&mut self) -> Result<(), StoreError> {
        let work = self.work()?;
        let settled = work.settle(0).await;
        work.failed |= settled.is_err();
        settled
    }

    pub(crate) async fn finish(mut self, expected: Expected) -> Result<ObjectWhole, StoreError> {
        let work = self.work.take().ok_or(StoreError::Broken)?;
        // It has no half way. What is whole when nobody waits any more is dropped.
        let finishing = tokio::spawn(work.finish(expected));
        finishing.await.unwrap_or(Err(StoreError::Broken))
    }

    pub(crate) async fn suspend(mut self) {
        if let Some(work) = self.work.take() {
            let _ = tokio::spawn(work.suspend()).await;
        }
    }

    pub(crate) async fn abort(mut self) {
        if let Some(work) = self.work.take() {
            let _ = tokio::spawn(work.abort()).await;
        }
    }
}

impl Inner {
    /// Whether an upload may begin at all.
    fn admit(&self, new: &NewUpload<'_>) -> Result<(), StoreError> {
        self.key(new.path)?;
        if self.config.names == Names::Portable {
            new.path.check_portable()?;
        }
        let needs = match new.if_exists {
            IfExists::Same | IfExists::Error | IfExists::Skip => Overwrite::Never,
            IfExists::Rename => Overwrite::Rename,
            IfExists::Overwrite => Overwrite::Always,
        };
        if needs > self.config.overwrite {
            return Err(StoreError::Forbidden {
                asked: new.if_exists,
                granted: self.config.overwrite,
            });
        }
        let limit = self.largest();
        match new.size.filter(|size| *size > limit) {
            Some(size) => Err(StoreError::TooLarge { size, limit }),
            None => Ok(()),
        }
    }

    /// Most bytes of a file.
    fn largest(&self) -> u64 {
        let parts = MOST_PARTS.saturating_mul(self.largest_part());
        self.config.max_file.map_or(parts, |limit| limit.min(parts))
    }

    /// Most bytes of a part, so that four of them are within the budget.
    fn largest_part(&self) -> u64 {
        1 << (self.config.budget / 4).max(1).ilog2()
    }

    /// Bytes of the parts of a file of this size.
    fn part_of(&self, size: Option<u64>) -> u64 {
        let mut part = match size {
            Some(_) => self.config.part,
            None => self.config.part * 2,
        };
        while part.saturating_mul(MOST_PARTS) < size.unwrap_or(0) {
            part *= 2;
        }
        part.min(self.largest_part())
    }

    /// Whether the object of this record is there and complete.
    async fn is_complete(
        &self,
        record: &Record,
        holder: &Holder,
        new: &NewUpload<'_>,
    ) -> Result<bool, StoreError> {
        let made = |object: &crate::look::Object| object.nonce.as_ref() == Some(&record.head.nonce);
        if let Holder::File(object) = holder
            && record.head.name == new.path.as_str()
        {
            return Ok(made(object));
        }
        if record.head.name == new.path.as_str() || new.if_exists != IfExists::Rename {
            return Ok(false);
        }
        let Some(key) = self.backend.key(&record.head.name) else {
            return Ok(false);
        };
        let found = self.object(&key).await;
        let found = found.map_err(|cause| refused("look at a name", Some(new.path), &cause))?;
        Ok(found.as_ref().is_some_and(made))
    }
}

impl Record {
    /// Whether an upload can go on from it.
    fn fits(&self, inner: &Inner, new: &NewUpload<'_>, holder: &Holder) -> bool {
        let Head {
            object,
            name,
            size,
            part,
            ..
        } = &self.head;
        let free = match (holder, new.if_exists) {
            (Holder::Nobody, _) => name == new.path.as_str(),
            (Holder::File(_), IfExists::Overwrite) => name == new.path.as_str(),
            (_, IfExists::Rename) => !inner.conditional || name != new.path.as_str(),
            _ => false,
        };
        let key = inner.backend.key(name);
        let placed = !inner.conditional || key.is_some_and(|key| key.as_ref() == object);
        free && placed
            && self.id.is_some()
            && *size == new.size
            && part.is_power_of_two()
            && *part <= inner.largest_part()
    }
}

impl Work {
    fn new(
        inner: &Arc<Inner>,
        new: &NewUpload<'_>,
        parts: Parts,
        nonce: String,
        object: Path,
        name: RelPath,
    ) -> Self {
        Self {
            inner: inner.clone(),
            new: Wanted {
                path: new.path.clone(),
                peer: new.peer.to_owned(),
                size: new.size,
                meta: new.meta,
                if_exists: new.if_exists,
                resumable: new.resumable,
            },
            object,
            nonce,
            name,
            promise: None,
            room: Some(inner.reserved(new.path, new.tenant)),
            parts: Arc::new(parts),
            id: None,
            complete: false,
            position: 0,
            buffer: Vec::new(),
            hold: None,
            tasks: JoinSet::new(),
            failed: false,
        }
    }

    async fn begun(
        inner: &Arc<Inner>,
        new: &NewUpload<'_>,
        live: Live,
        holder: &Holder,
    ) -> Result<Self, StoreError> {
        let nonce = Key::unique()
            .map_err(crate::error::journal)?
            .as_str()
            .to_owned();
        let (mut name, mut promise) = (new.path.clone(), None);
        if new.if_exists == IfExists::Rename && inner.conditional {
            let (free, promised) = inner.free_name(new.path, holder).await?;
            (name, promise) = (free, Some(promised));
        }
        let object = match inner.conditional {
            true => inner.key(&name)?,
            false => inner.own(&format!("parts/{nonce}"))?,
        };
        let parts = Parts {
            len: inner.part_of(new.size),
            stored: Mutex::default(),
            journal: Mutex::default(),
            durable: Durable::default(),
            lost: AtomicBool::new(false),
            live,
        };
        Ok(Self {
            promise,
            ..Self::new(inner, new, parts, nonce, object, name)
        })
    }

    fn resumed(
        inner: &Arc<Inner>,
        new: &NewUpload<'_>,
        live: Live,
        journal: Journal,
        record: Record,
        complete: bool,
    ) -> Result<Self, StoreError> {
        let Record { head, id, parts } = record;
        let parts = Parts {
            len: head.part,
            stored: Mutex::new(parts),
            journal: Mutex::new(Some(journal)),
            durable: Durable::default(),
            lost: AtomicBool::new(false),
            live,
        };
        parts.durable.raise(parts.contiguous());
        let object = Path::parse(&head.object).map_err(|_| StoreError::Broken)?;
        let name = head.name.parse()?;
        let promise = inner.promise(&head.name);
        Ok(Self {
            promise,
            id,
            complete,
            ..Self::new(inner, new, parts, head.nonce, object, name)
        })
    }

    /// Room for so many bytes in all.
    async fn reserve(&mut self, size: u64) -> Result<(), StoreError> {
        match &mut self.room {
            Some(room) => room.grow(size).await,
            None => Ok(()),
        }
    }

    /// Bytes from the beginning on that are here, the part that is being filled included.
    fn covered(&self) -> u64 {
        let stored = self.parts.contiguous();
        let start = self.position.saturating_sub(self.buffer.len() as u64);
        match stored >= start {
            true => stored.max(self.position),
            false => stored,
        }
    }

    /// The file is one request, not parts.
    fn is_single(&self) -> bool {
        self.id.is_none() && self.new.size.is_some_and(|size| size <= self.parts.len)
    }

    async fn write(&mut self, offset: u64, mut bytes: &[u8]) -> Result<(), StoreError> {
        let got = offset.saturating_add(bytes.len() as u64);
        if let Some(expected) = self.new.size.filter(|size| got > *size) {
            return Err(StoreError::SizeMismatch { expected, got });
        }
        let limit = match self.new.size {
            Some(_) => u64::MAX,
            None => self
                .inner
                .largest()
                .min(MOST_PARTS.saturating_mul(self.parts.len)),
        };
        if got > limit {
            return Err(StoreError::TooLarge { size: got, limit });
        }
        if self.new.size.is_none() {
            self.reserve(got).await?;
        }
        let expected = self.position;
        if offset != expected {
            if offset < expected || !self.parts.covers(expected, offset) {
                return Err(StoreError::BadOffset { expected });
            }
            // The store has the rest of the part that was begun anew.
            (self.buffer, self.hold) = (Vec::new(), None);
            self.position = offset;
        }
        while !bytes.is_empty() {
            let within = self.position % self.parts.len;
            let room = self.parts.len - within;
            let take = usize::try_from(room).map_or(bytes.len(), |room| room.min(bytes.len()));
            let (now, later) = bytes.split_at_checked(take).unwrap_or((bytes, &[]));
            // In the middle of a part that the store has: its hash decides in the end.
            if within == 0 || !self.buffer.is_empty() {
                if self.hold.is_none() {
                    self.settle(self.inner.config.in_flight.saturating_sub(1))
                        .await?;
                    let left = self.new.size.map_or(u64::MAX, |size| size - self.position);
                    let need = left.min(self.parts.len);
                    self.hold = Some(self.inner.hold(&self.new.peer, need).await?);
                    self.buffer
                        .reserve_exact(usize::try_from(need).unwrap_or(0));
                }
                self.buffer.extend_from_slice(now);
            }
            self.position += now.len() as u64;
            bytes = later;
            if self.buffer.len() as u64 == self.parts.len && !self.is_single() {
                self.send().await?;
            }
        }
        Ok(())
    }

    /// Stores the part that was filled, beside what follows.
    async fn send(&mut self) -> Result<(), StoreError> {
        let id = match &self.id {
            Some(id) => id.clone(),
            None => {
                let id = self.create().await?;
                self.id.insert(id).clone()
            }
        };
        let bytes = Bytes::from(std::mem::take(&mut self.buffer));
        let hold = self.hold.take();
        let offset = self.position - bytes.len() as u64;
        let at = u32::try_from(offset / self.parts.len).map_err(|_| StoreError::Broken)?;
        let (inner, parts, object) = (self.inner.clone(), self.parts.clone(), self.object.clone());
        self.tasks.spawn(async move {
            let (whole, len) = (bytes.clone(), bytes.len() as u64);
            let hashing = tokio::task::spawn_blocking(move || tree::of_part(offset, &whole));
            let (hash, node) = hashing.await.map_err(|_| StoreError::Broken)?;
            // What a client sends anew before it is told what is there.
            let same = |part: &Part| part.len == len && part.hash == hash;
            if lock(&parts.stored).get(&at).is_some_and(same) {
                return Ok(());
            }
            let put = inner
                .backend
                .parts
                .put_part(&object, &id, at as usize, bytes.into());
            let tag = put.await.map_err(|cause| {
                if trouble(&cause) == Trouble::Missing {
                    parts.lost.store(true, Ordering::Relaxed);
                }
                refused("store a part", None, &cause)
            })?;
            drop(hold);
            let part = Part {
                len,
                tag: tag.content_id,
                hash,
                node,
            };
            Inner::aside(move || parts.note(at, part)).await
        });
        Ok(())
    }

    /// Begins the upload in the store, and its journal before that.
    async fn create(&mut self) -> Result<String, StoreError> {
        let head = Head {
            nonce: self.nonce.clone(),
            object: self.object.as_ref().to_owned(),
            name: self.name.as_str().to_owned(),
            size: self.new.size,
            part: self.parts.len,
            resumable: self.new.resumable,
        };
        let options = match self.inner.backend.attributes {
            true => PutMultipartOptions::from(attributes(self.new.meta, &self.nonce, None)),
            false => PutMultipartOptions::default(),
        };
        let (inner, parts, object) = (self.inner.clone(), self.parts.clone(), self.object.clone());
        // The journal learns the store's id also when nobody waits for it any more.
        let creating = tokio::spawn(async move {
            let (dir, owner) = (inner.dir.clone(), parts.clone());
            let begun = Inner::aside(move || Journal::begin(&dir, &owner.live.key, &head));
            let mut journal = begun.await?;
            let id = inner
                .backend
                .parts
                .create_multipart_opts(&object, options)
                .await;
            let id = id.map_err(|cause| refused("begin an upload", None, &cause))?;
            let noted = id.clone();
            Inner::aside(move || {
                journal.began(&noted)?;
                *lock(&parts.journal) = Some(journal);
                Ok(())
            })
            .await?;
            Ok(id)
        });
        creating.await.unwrap_or(Err(StoreError::Broken))
    }

    /// Waits until no more than so many parts are on their way.
    async fn settle(&mut self, most: usize) -> Result<(), StoreError> {
        while self.tasks.len() > most {
            if let Some(stored) = self.tasks.join_next().await {
                stored.unwrap_or(Err(StoreError::Broken))?;
            }
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>, expected: Expected) -> Result<ObjectWhole, StoreError> {
        match self.check(expected).await {
            Ok((hash, size)) => Ok(ObjectWhole::new(self, hash, size, expected)),
            // The store may be back later, with all that it has.
            Err(error @ StoreError::Unavailable { .. }) => {
                self.suspend().await;
                Err(error)
            }
            Err(error) => {
                self.abort().await;
                Err(error)
            }
        }
    }

    /// Stores what is left, and compares.
    async fn check(&mut self, expected: Expected) -> Result<(blake3::Hash, u64), StoreError> {
        if self.failed {
            return Err(StoreError::Broken);
        }
        self.settle(0).await?;
        let size = self.covered();
        let got = size;
        for expected in [self.new.size, expected.size].into_iter().flatten() {
            if expected != got {
                return Err(StoreError::SizeMismatch { expected, got });
            }
        }
        let hash = match self.id {
            None => blake3::hash(&self.buffer),
            Some(_) => {
                // A part that was begun anew, of which the store has all.
                if self.position < got {
                    (self.buffer, self.hold) = (Vec::new(), None);
                }
                if !self.buffer.is_empty() {
                    self.send().await?;
                    self.settle(0).await?;
                }
                let stored = lock(&self.parts.stored);
                // Parts behind the end are of a longer file.
                let nodes: Vec<_> = stored.values().map(|part| part.node).collect();
                match (nodes.len(), stored.get(&0)) {
                    (1, Some(only)) => only.hash,
                    _ => tree::of_file(&nodes, self.parts.len, got).ok_or(StoreError::Broken)?,
                }
            }
        };
        let got: [u8; 32] = hash.into();
        match expected.hash.filter(|expected| *expected != got) {
            Some(expected) => Err(StoreError::HashMismatch { expected, got }),
            None => Ok((hash, size)),
        }
    }

    /// Keeps what the store has of it, if it may be taken up again.
    async fn suspend(mut self: Box<Self>) {
        let kept = self.new.resumable && !self.is_lost();
        if !kept {
            return self.abort().await;
        }
        (self.buffer, self.hold) = (Vec::new(), None);
        // What is nearly there need not be sent again.
        let settling = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(GRACE, settling).await;
        self.tasks.shutdown().await;
    }

    /// Ends it in the store.
    pub(crate) async fn abort(mut self: Box<Self>) {
        self.tasks.shutdown().await;
        let journal = lock(&self.parts.journal).take();
        let journal = match journal {
            Some(journal) => Some(journal),
            None => {
                // It may have been begun while nobody waited for that any more.
                let (dir, parts) = (self.inner.dir.clone(), self.parts.clone());
                let there = Inner::aside(move || Journal::resume(&dir, &parts.live.key));
                there.await.ok().flatten().map(|(journal, _)| journal)
            }
        };
        if let Some(journal) = journal {
            self.inner.end(journal).await;
        }
    }

    /// The store has forgotten it, or wants it anew.
    pub(crate) fn is_lost(&self) -> bool {
        self.parts.lost.load(Ordering::Relaxed)
    }

    pub(crate) fn lose(&self) {
        self.parts.lost.store(true, Ordering::Relaxed);
    }

    /// The bytes of a file that is one request, and their part of the budget.
    pub(crate) fn take_single(&mut self) -> (Bytes, Option<Hold>) {
        (std::mem::take(&mut self.buffer).into(), self.hold.take())
    }
}

/// Parts of an object, at most.
const MOST_PARTS: u64 = 10_000;
/// Ranges that an upload is told of, at most.
const MOST_RANGES: usize = 8_192;
/// How long an interrupted upload waits for its parts that are on their way.
const GRACE: Duration = Duration::from_secs(5);
