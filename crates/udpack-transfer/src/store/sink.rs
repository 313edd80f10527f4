//! [`Sink`]: where received files go. A directory on disk ([`Store`](super::Store)) is one, [`Memory`] another; an object
//! store, a database or a pipe can be a third without a change to the server.
//!
//! The server decides who may upload what, and when; a sink takes the bytes, keeps them, and gives a whole file its name.
//! Nothing here knows a network. [`disk`] alone uses tokio: it moves the store's blocking calls to other threads.

#[cfg(any(test, feature = "testing"))]
pub(crate) mod conformance;
mod disk;
mod memory;

use std::fmt;
use std::future::{Future, ready};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use super::partial::{CHECKPOINT_BYTES, CHECKPOINT_EVERY};
use super::{
    Entry, IfExists, List, Meta, Page, Placed, Published, Range, Removed, StoreError, Tenant,
    XattrList,
};
use crate::base::path::RelPath;

pub use disk::DiskUpload;
pub use memory::{Memory, MemoryUpload, MemoryWhole};

/// Where received files go.
///
/// An upload [begins](Self::begin), takes [ranges](Self::write) and makes them durable at
/// [checkpoints](Self::checkpoint), is [whole](Self::finish) when size and hash agree, and is then
/// [published](Self::publish) or [discarded](Self::discard). One that is interrupted is [suspended](Self::suspend) or
/// [aborted](Self::abort).
///
/// # Rules
/// - Nothing of a file is visible under its name before [`publish`](Self::publish) gives it the name, and all of it is
///   durable when that returns.
/// - An error ends its upload, but for [`StoreError::BadOffset`]: after [`StoreError::Unavailable`] one that is `resumable` is
///   suspended, after any other it is aborted. Code and text of the error are told to the client, so the text names nothing
///   that the client must not know.
/// - A future may be dropped at any await. A dropped future has done all of its work or nothing that shows, what earlier
///   calls acknowledged is still there, and the upload can be suspended or aborted. Dropping an upload is suspending it;
///   dropping what is whole is discarding it.
/// - The server calls one method of an upload at a time, and methods of many uploads at once. It holds at most eight
///   messages of one upload that wait for [`write`](Self::write). It waits for as long as a sink takes: a sink bounds its
///   own waits.
///
/// A sink that cannot do something says so in [`abilities`](Self::abilities), and its method refuses with
/// [`StoreError::Unsupported`], as all methods do that have a body here. The feature `testing` has conformance tests for
/// all of this: `testing::sink_conforms`.
pub trait Sink: Send + Sync + 'static {
    /// An upload under way.
    type Upload: Send + Sync + 'static;
    /// A file that is whole and has no name yet.
    type Whole: Send + Sync + 'static;

    /// What this sink can do. It does not change.
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    /// Begins an upload, or takes up the one that was suspended under this peer and path. Refuses what could not be
    /// published: a name that is taken where the policy says so, a size above a limit.
    ///
    /// [`StoreError::Busy`] where the sink [keeps](Abilities::resume) uploads and another one of this peer and path that
    /// is `resumable` is under way.
    fn begin(
        &self,
        new: &NewUpload<'_>,
    ) -> impl Future<Output = Result<Begun<Self::Upload>, StoreError>> + Send;

    /// How many bytes from the beginning on are durable: what a client need not send again. Asked once, when the upload
    /// has begun; the sink raises the number whenever it likes.
    fn durable(&self, upload: &Self::Upload) -> Durable {
        let _ = upload;
        Durable::default()
    }

    /// The durable ranges of an upload that was taken up, in order, each with its hash: at most 8,192. They may be left
    /// out of what is written. Called before the first [`write`](Self::write).
    fn have(
        &self,
        upload: &mut Self::Upload,
    ) -> impl Future<Output = Result<Vec<Range>, StoreError>> + Send {
        let _ = upload;
        ready(Ok(Vec::new()))
    }

    /// Takes bytes that begin at this offset, all or none of them.
    ///
    /// With [`Abilities::any_order`] that is any place; bytes that came before need not be taken again, but may be refused
    /// with [`StoreError::BadOffset`]. Without it that is where the bytes before ended, or the end of a range of
    /// [`have`](Self::have) that begins there or before: any other is refused with [`StoreError::BadOffset`], and the
    /// upload goes on. Bytes of such a range may come once more, as a client may send its first ones before it is told what
    /// is there. What lies beyond the declared size is refused with [`StoreError::SizeMismatch`].
    fn write(
        &self,
        upload: &mut Self::Upload,
        offset: u64,
        bytes: Bytes,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes durable what was written, as far as the sink can, and raises [`durable`](Self::durable).
    fn checkpoint(
        &self,
        upload: &mut Self::Upload,
    ) -> impl Future<Output = Result<(), StoreError>> + Send {
        let _ = upload;
        ready(Ok(()))
    }

    /// Whether so many bytes, of which the first came so long ago, are worth a [`checkpoint`](Self::checkpoint). Of 64
    /// MiB or one second, unless it is implemented.
    fn is_due(&self, bytes: u64, since: Duration) -> bool {
        bytes >= CHECKPOINT_BYTES || since >= CHECKPOINT_EVERY
    }

    /// Compares size and hash with what came: [`StoreError::SizeMismatch`] or [`StoreError::HashMismatch`] where they
    /// differ or something is missing, and nothing is left of the upload. Ranges of [`have`](Self::have) may be missing
    /// at the end.
    ///
    /// A future that is dropped gives the upload up.
    fn finish(
        &self,
        upload: Self::Upload,
        expected: Expected,
    ) -> impl Future<Output = Result<Self::Whole, StoreError>> + Send;

    /// Gives a whole file its name, by the policy it was begun with, and returns when file and name are durable. Of
    /// several that are published under one name exactly one gets it, whatever the others did meanwhile.
    ///
    /// The server calls it for many files at once. A sink that stores several at the price of one gathers these calls.
    fn publish(
        &self,
        whole: Self::Whole,
    ) -> impl Future<Output = Result<Published, StoreError>> + Send;

    /// The upload is interrupted: keeps what is durable of it where it is `resumable`, and removes it elsewhere.
    fn suspend(&self, upload: Self::Upload) -> impl Future<Output = ()> + Send {
        drop(upload);
        ready(())
    }

    /// Removes all that there is of the upload, also where it could be resumed.
    fn abort(&self, upload: Self::Upload) -> impl Future<Output = ()> + Send;

    /// Removes what is whole and shall have no name.
    fn discard(&self, whole: Self::Whole) -> impl Future<Output = ()> + Send {
        drop(whole);
        ready(())
    }

    /// Where the bytes lie on this machine, for [`Hook::verify`](crate::Hook::verify); an empty path where they do not.
    fn staged_at(&self, whole: &Self::Whole) -> PathBuf {
        let _ = whole;
        PathBuf::new()
    }

    /// Where a published file lies on this machine, for [`Hook::done`](crate::Hook::done); an empty path where it does
    /// not.
    fn stored_at(&self, path: &str) -> PathBuf {
        let _ = path;
        PathBuf::new()
    }

    /// What has the name; `None` is the root. [`StoreError::NotFound`] where nothing has it.
    fn stat(
        &self,
        path: Option<&RelPath>,
    ) -> impl Future<Output = Result<Entry, StoreError>> + Send {
        let _ = path;
        ready(Err(StoreError::Unsupported { what: "stat" }))
    }

    /// One page of what is below a directory, as [`Store::list`](super::Store::list) has it.
    fn list(&self, query: &List<'_>) -> impl Future<Output = Result<Page, StoreError>> + Send {
        let _ = query;
        ready(Err(StoreError::Unsupported { what: "list" }))
    }

    /// Opens a file for reading.
    fn read(&self, path: &RelPath) -> impl Future<Output = Result<Stored, StoreError>> + Send {
        let _ = path;
        ready(Err(StoreError::Unsupported { what: "read" }))
    }

    /// Removes what has the name, and with `recursive` what is below it. It stays removed when this returns.
    fn remove(
        &self,
        path: &RelPath,
        recursive: bool,
    ) -> impl Future<Output = Result<Removed, StoreError>> + Send {
        let _ = (path, recursive);
        ready(Err(StoreError::Unsupported { what: "remove" }))
    }

    /// Makes a directory and those above it.
    fn make_dir(
        &self,
        new: &NewDir<'_>,
    ) -> impl Future<Output = Result<Placed, StoreError>> + Send {
        let _ = new;
        ready(Err(StoreError::Unsupported {
            what: "make directories",
        }))
    }

    /// Makes a symbolic link, whose target was checked.
    fn make_link(
        &self,
        new: &NewLink<'_>,
    ) -> impl Future<Output = Result<Placed, StoreError>> + Send {
        let _ = new;
        ready(Err(StoreError::Unsupported { what: "make links" }))
    }
}

/// What a [`Sink`] can do beside taking files one byte after the other. Nothing, by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// It takes the ranges of a file in any order.
    pub any_order: bool,
    /// It keeps uploads that are suspended, and tells what of them is durable.
    pub resume: bool,
    /// It keeps names: a second file of one name meets the first, and [`IfExists`] says what then.
    pub names: bool,
    /// Files can be read.
    pub read: bool,
    /// What is there can be listed, and looked at.
    pub list: bool,
    /// What is there can be removed.
    pub remove: bool,
}

impl Abilities {
    /// All of them.
    pub(crate) const ALL: Self = Self {
        any_order: true,
        resume: true,
        names: true,
        read: true,
        list: true,
        remove: true,
    };
}

/// What is to be stored.
#[derive(Clone, Copy, Debug)]
pub struct NewUpload<'a> {
    /// Its name.
    pub path: &'a RelPath,
    /// The id of the client's token; empty where there is none.
    pub peer: &'a str,
    /// Its size in bytes, if known.
    pub size: Option<u64>,
    /// Its modification time and mode, if told.
    pub meta: Meta,
    /// What to do when the name is taken.
    pub if_exists: IfExists,
    /// Whether it is to be kept when it is interrupted, to be found again under this peer and path.
    pub resumable: bool,
    /// The client's own quota.
    pub tenant: Option<&'a Tenant>,
    /// As [`NewFile::dirs`](super::NewFile::dirs).
    pub dirs: &'a [u32],
    /// All of its bytes are here already: they follow at once.
    pub whole: bool,
}

impl<'a> NewUpload<'a> {
    /// An upload of unknown size that is not resumed.
    pub fn new(path: &'a RelPath, peer: &'a str) -> Self {
        Self {
            path,
            peer,
            size: None,
            meta: Meta::default(),
            if_exists: IfExists::default(),
            resumable: false,
            tenant: None,
            dirs: &[],
            whole: false,
        }
    }
}

/// What beginning an upload led to.
#[derive(Debug)]
pub enum Begun<U> {
    /// The name can be taken: write the bytes.
    New(U),
    /// A file has the name, and the client asked for [`IfExists::Same`] or [`IfExists::Skip`]: it is compared.
    Exists(Stored),
}

/// What a file has to be when all of it is here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Its size in bytes, if known.
    pub size: Option<u64>,
    /// BLAKE3 of all its bytes, if told.
    pub hash: Option<[u8; 32]>,
    /// Its modification time and mode, if told.
    pub meta: Meta,
}

/// A directory that shall be there.
#[derive(Clone, Copy, Debug)]
pub struct NewDir<'a> {
    /// Its name.
    pub path: &'a RelPath,
    /// What it shall have, also when it is there.
    pub meta: Meta,
    /// Its extended attributes. A sink that stores none says so by [`Placed::xattrs`].
    pub xattrs: &'a XattrList,
    /// Permissions for those that must be made, the last for the directory itself.
    pub dirs: &'a [u32],
    /// The client's own quota.
    pub tenant: Option<&'a Tenant>,
}

/// A symbolic link that shall be there.
#[derive(Clone, Copy, Debug)]
pub struct NewLink<'a> {
    /// Its name.
    pub path: &'a RelPath,
    /// Where it leads.
    pub target: &'a str,
    /// What to do when the name is taken.
    pub if_exists: IfExists,
    /// Permissions for the directories that must be made.
    pub dirs: &'a [u32],
    /// The client's own quota.
    pub tenant: Option<&'a Tenant>,
}

/// A number of bytes that are durable, which only goes up. A handle: clones share the number.
#[derive(Clone, Debug, Default)]
pub struct Durable(pub(crate) Arc<AtomicU64>);

impl Durable {
    /// So many bytes from the beginning on are durable now.
    pub fn raise(&self, bytes: u64) {
        self.0.fetch_max(bytes, Ordering::AcqRel);
    }

    /// How many are.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// Bytes that can be read at any place.
pub trait ReadAt: Send + Sync + 'static {
    /// Bytes from this offset on: at most `len`, and at least one unless the file ends there.
    fn read_at(
        &self,
        offset: u64,
        len: usize,
    ) -> impl Future<Output = Result<Bytes, StoreError>> + Send;

    /// BLAKE3 of all of them. Reads them, unless it is implemented: a sink that has noted the hash need not. When it
    /// returns, the file is durable: an equal one may be reported as stored.
    fn hash(&self) -> impl Future<Output = Result<[u8; 32], StoreError>> + Send {
        async {
            let mut hasher = blake3::Hasher::new();
            loop {
                let bytes = self.read_at(hasher.count(), READ).await?;
                if bytes.is_empty() {
                    return Ok(hasher.finalize().into());
                }
                hasher.update(&bytes);
            }
        }
    }
}

impl ReadAt for Bytes {
    async fn read_at(&self, offset: u64, len: usize) -> Result<Self, StoreError> {
        let from = usize::try_from(offset).map_or(self.len(), |from| from.min(self.len()));
        Ok(self.slice(from..self.len().min(from.saturating_add(len))))
    }
}

/// A file of a sink, open for reading: what happens to its name does not change what is read.
pub struct Stored {
    path: RelPath,
    size: u64,
    meta: Meta,
    bytes: Box<dyn Readable>,
}

impl Stored {
    /// A file with this name, size in bytes, time and mode.
    pub fn new(path: RelPath, size: u64, meta: Meta, bytes: impl ReadAt) -> Self {
        Self {
            path,
            size,
            meta,
            bytes: Box::new(bytes),
        }
    }

    /// Its name.
    pub fn path(&self) -> &RelPath {
        &self.path
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its modification time and mode.
    pub fn meta(&self) -> Meta {
        self.meta
    }

    /// As [`ReadAt::read_at`]. Dropping the future reads nothing.
    pub async fn read_at(&self, offset: u64, len: usize) -> Result<Bytes, StoreError> {
        self.bytes.read_at(offset, len).await
    }

    /// As [`ReadAt::hash`]. Dropping the future changes nothing.
    pub async fn hash(&self) -> Result<[u8; 32], StoreError> {
        self.bytes.hash().await
    }
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored")
            .field("path", &self.path)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// A future of which only the result is known.
pub(crate) type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Any [`ReadAt`].
trait Readable: Send + Sync {
    fn read_at(&self, offset: u64, len: usize) -> Boxed<'_, Result<Bytes, StoreError>>;
    fn hash(&self) -> Boxed<'_, Result<[u8; 32], StoreError>>;
}

impl<R: ReadAt> Readable for R {
    fn read_at(&self, offset: u64, len: usize) -> Boxed<'_, Result<Bytes, StoreError>> {
        Box::pin(ReadAt::read_at(self, offset, len))
    }

    fn hash(&self) -> Boxed<'_, Result<[u8; 32], StoreError>> {
        Box::pin(ReadAt::hash(self))
    }
}

/// Bytes read at a time for a hash.
const READ: usize = 256 << 10;
