//! Where the bytes of an upload come from, and the blocking task that reads and hashes them.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, IoSliceMut, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustix::fs::OFlags;
use tokio::sync::mpsc;
use udpack::Place;

use crate::base::path::RelPath;
use crate::base::sums::{Cutting, Place as At};
use crate::base::zeros;
use crate::local::base::Base;
use crate::local::error::TransferError;
use crate::local::limiter::Pace;
use crate::local::spool::{Compared, Next, Spool};
use crate::store::{Existing, Meta, Stored, Time, XattrList, Xattrs, hash_file, read_xattrs};
use crate::wire::{CHUNK, COPY, HOLE, Have};

/// Chunks read ahead of the network.
const AHEAD: usize = 4;
/// Buffers kept for reuse: as many as half of the default send window holds.
const SPARE: usize = 32;
/// Bytes per read where the bytes are only hashed.
const BLOCK: usize = 1 << 20;
/// Bytes that are read at once to be cut into chunks: they stay in the processor's cache.
const PART: usize = 256 << 10;
/// How often the size of a file is asked for again if the file changes between two looks.
const LOOKS: usize = 3;
/// Bytes of each [`Samples`].
const SAMPLE: usize = 4096;

/// One thing to upload: bytes from somewhere, a directory or a link, and the name that it gets at the server. Clones
/// stand for the same thing.
#[derive(Debug, Clone)]
pub struct Source {
    remote: Box<str>,
    /// Size of a file in bytes, if the listing has it.
    listed: Option<u64>,
    dirs: Arc<[u32]>,
    /// The file at the server that most likely shares bytes with this one.
    base: Option<RelPath>,
    /// Where a directory lies, for its extended attributes.
    local: Option<Arc<Path>>,
    pub(crate) origin: Origin,
}

#[derive(Debug, Clone)]
pub(crate) enum Origin {
    File(PathBuf),
    Memory(Bytes),
    Reader(Reader),
    Spooled(Arc<Spool>),
    Dir(Meta),
    Link(String),
    Failed(Arc<TransferError>),
}

impl Source {
    /// A local file. It is opened right before it is sent. It should not change while it is sent: a change that is
    /// detected fails it. A file that reports no size or a false one, as under `/proc` and `/sys`, is read to its end.
    pub fn file(local: impl Into<PathBuf>, remote: RelPath) -> Self {
        Self::new(remote.as_str(), Origin::File(local.into()))
    }

    /// Bytes in memory.
    pub fn bytes(bytes: impl Into<Bytes>, remote: RelPath) -> Self {
        Self::new(remote.as_str(), Origin::Memory(bytes.into()))
    }

    /// The bytes that a reader delivers until its end, such as standard input. It is read once, on the blocking pool:
    /// if the connection is lost after reading has begun, the file fails.
    pub fn reader(reader: impl Read + Send + 'static, remote: RelPath) -> Self {
        let reader = Reader(Arc::new(Mutex::new(Some(Box::new(reader)))));
        Self::new(remote.as_str(), Origin::Reader(reader))
    }

    /// Like [`reader`](Self::reader), but what was read is kept until the server has it on disk, so a lost connection
    /// or a restarted server does not fail the file. It keeps up to `spool` bytes: 16 MiB of them in memory, the rest
    /// in a private file in the directory for temporary files. If the spool stays full for 10 s, or its file cannot be
    /// written, the source continues as a plain reader. A reader may return `WouldBlock` when it has no bytes yet; it
    /// is called again at once.
    pub fn spooled(reader: impl Read + Send + 'static, spool: u64, remote: RelPath) -> Self {
        let spool = Spool::new(Box::new(reader), spool, false);
        Self::new(remote.as_str(), Origin::Spooled(Arc::new(spool)))
    }

    /// As [`spooled`](Self::spooled), of a reader that gives the same bytes again in a later run of the program, as a file
    /// does that only grows: what the server has of an earlier run is compared with them, and not sent again where it is equal.
    /// A reader that has no more for now says `WouldBlock`, so that nobody waits for bytes to compare.
    pub fn growing(reader: impl Read + Send + 'static, spool: u64, remote: RelPath) -> Self {
        let spool = Spool::new(Box::new(reader), spool, true);
        Self::new(remote.as_str(), Origin::Spooled(Arc::new(spool)))
    }

    /// A directory. Storing a file changes the time of its directory, so a directory is created, and gets its preserved
    /// times and mode, when every earlier entry below it is done. Other entries continue meanwhile.
    pub fn dir(remote: RelPath, meta: Meta) -> Self {
        Self::new(remote.as_str(), Origin::Dir(meta))
    }

    /// Names the directory of this machine that has the extended attributes of a [`dir`](Self::dir). Without it the server's
    /// gets none.
    pub fn local(mut self, dir: impl Into<Arc<Path>>) -> Self {
        self.local = Some(dir.into());
        self
    }

    /// A symbolic link to `target`, which is relative and stays within the server's root.
    pub fn link(remote: RelPath, target: impl Into<String>) -> Self {
        Self::new(remote.as_str(), Origin::Link(target.into()))
    }

    /// An entry that cannot be sent. It is reported in its place, under a name that need not be valid.
    pub fn failed(remote: impl Into<String>, error: TransferError) -> Self {
        Self::new(&remote.into(), Origin::Failed(Arc::new(error)))
    }

    fn new(remote: &str, origin: Origin) -> Self {
        Self {
            remote: remote.into(),
            listed: None,
            dirs: Arc::default(),
            base: None,
            local: None,
            origin,
        }
    }

    /// Names the file at the server that most likely shares bytes with this one: the one that it was copied or moved
    /// from. [`Uploader::delta`](crate::Uploader::delta) says when it is used. Whatever that file contains, what is
    /// stored is this source. Defaults to the file of the same name.
    pub fn base(mut self, base: RelPath) -> Self {
        self.base = Some(base);
        self
    }

    /// That file, if one was named.
    pub(crate) fn base_path(&self) -> Option<&RelPath> {
        self.base.as_ref()
    }

    /// Permissions for the directories that the server must create for it: the last for the directory that contains it,
    /// the one before for its parent, and so on. They apply where [`Uploader::umask`](crate::Uploader::umask) is set,
    /// less its bits; only the owner may use other directories. Defaults to none.
    pub fn dirs(mut self, modes: impl Into<Arc<[u32]>>) -> Self {
        self.dirs = modes.into();
        self
    }

    /// Those permissions.
    pub(crate) fn dir_modes(&self) -> &[u32] {
        &self.dirs
    }

    /// A regular file that had this size a moment ago.
    pub(crate) fn listed(local: PathBuf, remote: &RelPath, size: u64) -> Self {
        Self {
            listed: Some(size),
            ..Self::new(remote.as_str(), Origin::File(local))
        }
    }

    /// An empty source without a name, as a placeholder.
    pub(crate) fn empty() -> Self {
        Self::new("", Origin::Memory(Bytes::new()))
    }

    /// The name at the server; a valid path unless this is a [`failed`](Self::failed) one.
    pub fn remote(&self) -> &str {
        &self.remote
    }

    /// The size as of now, in bytes, for totals and order; `None` if it is known only at the end. Returns an error for
    /// what cannot be sent.
    pub(crate) fn size(&self) -> Result<Option<u64>, TransferError> {
        match &self.origin {
            Origin::File(_) if self.listed.is_some() => Ok(self.listed),
            Origin::File(path) => {
                let metadata = std::fs::metadata(path).map_err(|error| self.unreadable(error))?;
                if !metadata.is_file() {
                    return Err(TransferError::NotAFile { path: path.clone() });
                }
                Ok(Some(metadata.len()))
            }
            Origin::Memory(bytes) => Ok(Some(bytes.len() as u64)),
            Origin::Reader(_) | Origin::Spooled(_) => Ok(None),
            Origin::Dir(_) | Origin::Link(_) => Ok(Some(0)),
            Origin::Failed(error) => Err(error.again()),
        }
    }

    /// The extended attributes of a directory, as of now. Blocks.
    pub(crate) fn dir_xattrs(&self, which: Xattrs) -> Result<XattrList, TransferError> {
        let Some(path) = self.local.as_ref().filter(|_| which != Xattrs::None) else {
            return Ok(XattrList::default());
        };
        let dir = File::open(path).and_then(|dir| read_xattrs(&dir, which));
        dir.map_err(|source| TransferError::Source {
            path: path.to_path_buf(),
            source,
        })
    }

    /// Whether its bytes are gone: it is a reader that was read from.
    pub(crate) fn is_spent(&self) -> bool {
        match &self.origin {
            Origin::Reader(reader) => reader.lock().is_none(),
            Origin::Spooled(spool) => spool.is_spent(),
            _ => false,
        }
    }

    /// The kept bytes of a source that can be read only once.
    pub(crate) fn spool(&self) -> Option<&Spool> {
        match &self.origin {
            Origin::Spooled(spool) => Some(spool),
            _ => None,
        }
    }

    fn shown(&self) -> &Path {
        match &self.origin {
            Origin::File(path) => path,
            _ => Path::new(&*self.remote),
        }
    }

    fn unreadable(&self, source: io::Error) -> TransferError {
        TransferError::Source {
            path: self.shown().to_owned(),
            source,
        }
    }

    /// Opens it, and checks that a file has the size that it reports. Blocks.
    pub(crate) fn open(&self) -> Result<Opened, TransferError> {
        let mut opened = self.open_unchecked()?;
        if let OpenedFrom::File { file, metadata } = &mut opened.from {
            opened.size = true_size(file, metadata).map_err(|error| self.unreadable(error))?;
            opened.meta = meta(metadata);
        }
        Ok(opened)
    }

    /// BLAKE3 of its bytes, if it can be read again and has this size. Blocks.
    pub(crate) fn fingerprint(&self, size: u64) -> Result<Option<[u8; 32]>, TransferError> {
        let opened = self.open()?;
        if opened.size != Some(size) {
            return Ok(None);
        }
        match opened.from {
            OpenedFrom::Memory(bytes) => Ok(Some(*blake3::hash(&bytes).as_bytes())),
            OpenedFrom::File { file, .. } => hash_file(&file, &mut |_| {})
                .map(Some)
                .map_err(|error| self.unreadable(error)),
            OpenedFrom::Reader(_) | OpenedFrom::Spooled(_) | OpenedFrom::Kept(_) => Ok(None),
        }
    }

    /// Opens it without checking the size that a file reports. Blocks.
    fn open_unchecked(&self) -> Result<Opened, TransferError> {
        let from = match &self.origin {
            Origin::Memory(bytes) => OpenedFrom::Memory(bytes.clone()),
            Origin::Reader(reader) => OpenedFrom::Reader(reader.clone()),
            Origin::Spooled(spool) => OpenedFrom::Spooled(spool.clone()),
            Origin::File(path) => {
                let failed = |error| self.unreadable(error);
                // Without O_NONBLOCK opening a FIFO would wait for its other end.
                let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
                let file = File::options()
                    .read(true)
                    .custom_flags(nonblocking)
                    .open(path)
                    .map_err(failed)?;
                let metadata = file.metadata().map_err(failed)?;
                if !metadata.is_file() {
                    return Err(TransferError::NotAFile { path: path.clone() });
                }
                OpenedFrom::File { file, metadata }
            }
            Origin::Dir(_) | Origin::Link(_) | Origin::Failed(_) => {
                return Err(TransferError::NotAFile {
                    path: self.shown().to_owned(),
                });
            }
        };
        let (size, meta) = match &from {
            OpenedFrom::Memory(bytes) => (Some(bytes.len() as u64), Meta::default()),
            OpenedFrom::Reader(_) | OpenedFrom::Spooled(_) | OpenedFrom::Kept(_) => {
                (None, Meta::default())
            }
            OpenedFrom::File { metadata, .. } => (Some(metadata.len()), meta(metadata)),
        };
        Ok(Opened {
            path: self.shown().to_owned(),
            size,
            meta,
            from,
            hasher: Box::default(),
            samples: Samples::default(),
        })
    }
}

/// The size of a file that has exactly as many bytes as `metadata` says; `None` if not, and the size is known only at
/// its end.
fn true_size(file: &File, metadata: &mut Metadata) -> io::Result<Option<u64>> {
    for _ in 0..LOOKS {
        let size = metadata.len();
        let mut byte = [0];
        // An error is reported when the file is read.
        let more = file.read_at(&mut byte, size).unwrap_or(1);
        let last = match size.checked_sub(1) {
            // A larger file is no pseudo file, and a seek to its end would cost time on a disk.
            Some(last) if size <= CHUNK as u64 => file.read_at(&mut byte, last).unwrap_or(0),
            _ => 1,
        };
        if more == 0 && last == 1 {
            return Ok(Some(size));
        }
        // The file may have grown or shrunk between the two looks.
        let now = file.metadata()?;
        let moved = now.len() != size;
        *metadata = now;
        if !moved {
            break;
        }
    }
    Ok(None)
}

/// A reader that can be taken once.
#[derive(Clone)]
pub(crate) struct Reader(Arc<Mutex<Option<Box<dyn Read + Send>>>>);

impl Reader {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Box<dyn Read + Send>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reader").finish()
    }
}

#[derive(Debug)]
pub(crate) struct Opened {
    path: PathBuf,
    /// `None` for a reader.
    pub(crate) size: Option<u64>,
    pub(crate) meta: Meta,
    from: OpenedFrom,
    /// The hash of the bytes that [`head`](Self::head) returned.
    hasher: Box<blake3::Hasher>,
    samples: Samples,
}

/// Reads a file of a sink. It is used on a thread that may block.
#[derive(Debug)]
struct KeptReader {
    stored: Stored,
    at: u64,
}

impl Read for KeptReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let reading = self.stored.read_at(self.at, buffer.len());
        let bytes = tokio::runtime::Handle::current()
            .block_on(reading)
            .map_err(io::Error::other)?;
        let (Some(room), true) = (buffer.get_mut(..bytes.len()), self.at <= self.stored.size())
        else {
            return Err(io::Error::other("a sink gave more than it was asked for"));
        };
        room.copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}

/// The bytes at a few offsets of a file, the first of them at 0. A program that writes through a mapping need not
/// change the file's times; then only its bytes show the change.
#[derive(Debug, Default)]
struct Samples {
    /// Number of blocks read.
    count: u64,
    taken: Vec<(u64, Box<[u8]>)>,
}

impl Samples {
    /// Keeps a block that was read at this offset, if it is one of the first or its number is a power of two.
    fn note(&mut self, offset: u64, bytes: &[u8]) {
        self.count += 1;
        if self.count.is_power_of_two() {
            let sample = bytes.get(..SAMPLE).unwrap_or(bytes);
            self.taken.push((offset, sample.into()));
        }
    }

    /// Whether the file still has these bytes.
    fn hold(&self, file: &File) -> io::Result<bool> {
        let mut now = [0; SAMPLE];
        for (offset, bytes) in &self.taken {
            let room = now.get_mut(..bytes.len()).unwrap_or_default();
            match file.read_exact_at(room, *offset) {
                Ok(()) if *room == **bytes => {}
                Ok(()) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

#[derive(Debug)]
enum OpenedFrom {
    File { file: File, metadata: Metadata },
    Memory(Bytes),
    Reader(Reader),
    Spooled(Arc<Spool>),
    Kept(KeptReader),
}

/// What a reader delivers: in order, chunks and ranges that the server has; then the hash of everything, or an error.
#[derive(Debug)]
pub(crate) enum Piece {
    Chunk {
        offset: u64,
        bytes: Bytes,
    },
    /// The server has these bytes.
    Same {
        offset: u64,
        len: u64,
    },
    /// The server has these bytes in the base, at another offset.
    Copy {
        offset: u64,
        from: u64,
        len: u64,
    },
    /// These bytes are zero, and take no room here.
    Hole {
        offset: u64,
        len: u64,
    },
    End {
        size: u64,
        hash: [u8; 32],
        /// It changed while it was read.
        torn: bool,
    },
    Failed(TransferError),
}

/// What is known before a file is read.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// What it has of the file.
    pub(crate) have: Have,
    /// The chunks of its base.
    pub(crate) base: Option<Base>,
    /// It takes holes.
    pub(crate) holes: bool,
    /// What was read is sent to its end also where the file has changed meanwhile.
    pub(crate) may_tear: bool,
}

impl Opened {
    /// A file of a store, which is sent as it was when it was opened.
    pub(crate) fn stored(existing: Existing) -> io::Result<Self> {
        let path = existing.path().as_str().into();
        let file = existing.into_file();
        let metadata = file.metadata()?;
        Ok(Self {
            path,
            size: Some(metadata.len()),
            meta: meta(&metadata),
            from: OpenedFrom::File { file, metadata },
            hasher: Box::default(),
            samples: Samples::default(),
        })
    }

    /// A file of a sink. It must be read within a runtime.
    pub(crate) fn kept(stored: Stored) -> Self {
        let (path, size, meta) = (stored.path().as_str().into(), stored.size(), stored.meta());
        Self {
            path,
            size: Some(size),
            meta,
            from: OpenedFrom::Kept(KeptReader { stored, at: 0 }),
            hasher: Box::default(),
            samples: Samples::default(),
        }
    }

    /// Its extended attributes. Blocks.
    pub(crate) fn xattrs(&self, which: Xattrs) -> io::Result<XattrList> {
        match &self.from {
            OpenedFrom::File { file, .. } => read_xattrs(file, which),
            _ => Ok(XattrList::default()),
        }
    }

    /// Its extended attributes, of a source. Blocks.
    pub(crate) fn own_xattrs(&self, which: Xattrs) -> Result<XattrList, TransferError> {
        self.xattrs(which).map_err(|source| TransferError::Source {
            path: self.path.clone(),
            source,
        })
    }

    /// The first bytes, at most this many; none of a reader. Reading afterwards begins behind them. Blocks.
    pub(crate) fn head(&mut self, most: usize) -> Result<Bytes, TransferError> {
        let want = least(self.size.unwrap_or(0), most);
        let head = match &mut self.from {
            OpenedFrom::Reader(_) | OpenedFrom::Spooled(_) | OpenedFrom::Kept(_) => Bytes::new(),
            OpenedFrom::Memory(bytes) => slice(bytes, 0, want as u64),
            // It may begin with a hole.
            OpenedFrom::File { metadata, .. } if is_sparse(metadata) => Bytes::new(),
            OpenedFrom::File { file, .. } => {
                let mut head = vec![0; want];
                let filled =
                    read_full(file, &mut head).map_err(|source| TransferError::Source {
                        path: self.path.clone(),
                        source,
                    })?;
                // If the file has shrunk, reading the rest fails.
                head.truncate(filled);
                if !head.is_empty() {
                    self.samples.note(0, &head);
                }
                head.into()
            }
        };
        self.hasher.update(&head);
        Ok(head)
    }

    /// Reads and hashes on the blocking pool, at most a few chunks ahead of the receiver. Dropping the receiver ends
    /// it. It holds its place in the pool for as long as it uses the thread.
    ///
    /// Ranges of `have` that are equal here are skipped. Everything is read once, except ranges that differ: these are
    /// read again to be sent, and only the second read counts. Bytes in no range are looked for among the chunks of
    /// the base. Holes are not read if the other side takes them.
    pub(crate) fn read(
        self,
        known: Known,
        pace: Pace,
        buffers: Buffers,
        place: Option<Place>,
    ) -> mpsc::Receiver<Piece> {
        let (pieces, taken) = mpsc::channel(AHEAD);
        tokio::task::spawn_blocking(move || {
            let _place = place;
            let mut take = |piece| pieces.blocking_send(piece).is_ok();
            let unwanted = || pieces.is_closed();
            match self.pump(known, &buffers, &|| pace.chunk(), &mut take, &unwanted) {
                Ok(()) => {}
                Err(Stop::Unwanted) => {}
                Err(Stop::Failed(error)) => {
                    let _ = pieces.blocking_send(Piece::Failed(error));
                }
            }
        });
        taken
    }

    /// Reads all of it into `room`, which has its size. Returns the hash, or `None` if it is longer or shorter or
    /// changed while it was read. Blocks.
    fn fill(self, room: &mut [u8]) -> Result<Option<[u8; 32]>, TransferError> {
        let Self { path, from, .. } = self;
        let failed = |source| TransferError::Source {
            path: path.clone(),
            source,
        };
        match from {
            OpenedFrom::File { mut file, metadata } => {
                let as_told = read_just(&mut file, room).map_err(failed)?;
                if !as_told || has_moved(&file, &metadata).map_err(failed)? {
                    return Ok(None);
                }
            }
            OpenedFrom::Memory(bytes) if bytes.len() == room.len() => room.copy_from_slice(&bytes),
            OpenedFrom::Memory(_)
            | OpenedFrom::Reader(_)
            | OpenedFrom::Spooled(_)
            | OpenedFrom::Kept(_) => {
                return Err(TransferError::NotAFile { path });
            }
        }
        Ok(Some(*blake3::hash(room).as_bytes()))
    }

    fn pump(
        self,
        known: Known,
        buffers: &Buffers,
        chunk: &dyn Fn() -> usize,
        take: &mut dyn FnMut(Piece) -> bool,
        unwanted: &dyn Fn() -> bool,
    ) -> Result<(), Stop> {
        let Self {
            path,
            size,
            from,
            hasher,
            samples,
            ..
        } = self;
        let Known {
            have,
            base,
            holes,
            may_tear,
        } = known;
        let have = &have;
        let sparse = match &from {
            OpenedFrom::File { metadata, .. } => holes && is_sparse(metadata),
            _ => false,
        };
        let mut pump = Pump {
            path: &path,
            sparse,
            at: hasher.count(),
            hasher: *hasher,
            samples: matches!(from, OpenedFrom::File { .. }).then_some(samples),
            buffers,
            chunk,
            take,
            unwanted,
        };
        let mut torn = false;
        match (from, size) {
            (OpenedFrom::Spooled(spool), _) => return pump.unspool(&spool, have),
            (OpenedFrom::Reader(reader), _) => {
                let Some(mut reader) = reader.lock().take() else {
                    return Err(pump.failed(io::Error::other("it was read before")));
                };
                while pump.send_chunk(&mut reader, chunk())? {}
            }
            (OpenedFrom::Memory(bytes), _) => {
                let size = bytes.len() as u64;
                for (off, end, theirs) in ranges(have, pump.at, size) {
                    pump.send_slice(&bytes, off)?;
                    if blake3::hash(&slice(&bytes, off, end)) == theirs {
                        pump.hasher.update(&slice(&bytes, pump.at, end));
                        pump.same(end)?;
                    }
                }
                pump.send_slice(&bytes, size)?;
            }
            (OpenedFrom::Kept(mut kept), size) => {
                let size = size.unwrap_or_default();
                for (off, end, theirs) in ranges(have, pump.at, size) {
                    pump.send_kept(&mut kept, off)?;
                    let hasher = pump.hasher.clone();
                    if pump.hash(&mut kept, off, end)? == Some(theirs) {
                        pump.same(end)?;
                    } else {
                        (pump.hasher, kept.at) = (hasher, pump.at);
                        pump.send_kept(&mut kept, end)?;
                    }
                }
                pump.send_kept(&mut kept, size)?;
            }
            // Its times and size say nothing about its bytes.
            (OpenedFrom::File { mut file, .. }, None) => {
                while pump.send_chunk(&mut file, chunk())? {}
            }
            (
                OpenedFrom::File {
                    mut file,
                    metadata: before,
                },
                Some(size),
            ) => {
                for (off, end, theirs) in ranges(have, pump.at, size) {
                    pump.send_to(&mut file, off)?;
                    let hasher = pump.hasher.clone();
                    if pump.hash_file(&mut file, off, end)? == theirs {
                        pump.same(end)?;
                    } else {
                        pump.hasher = hasher;
                        file.seek(SeekFrom::Start(pump.at))
                            .map_err(|error| pump.failed(error))?;
                        pump.send_to(&mut file, end)?;
                    }
                }
                match base {
                    Some(mut base) => pump.send_changed(&mut file, size, &mut base)?,
                    None => pump.send_to(&mut file, size)?,
                }
                match pump.change(&mut file, &before)? {
                    None => {}
                    Some(_) if may_tear => torn = true,
                    Some(change) => return Err(pump.changed(change)),
                }
            }
        }
        let end = Piece::End {
            size: pump.at,
            hash: *pump.hasher.finalize().as_bytes(),
            torn,
        };
        pump.give(end)
    }
}

/// Whether a file seems to have holes: it takes less room than it has bytes.
fn is_sparse(metadata: &Metadata) -> bool {
    metadata.blocks().saturating_mul(512) < metadata.len()
}

/// Where data comes next, from this offset on; `None` where none does. Moves the position.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn next_data(file: &File, at: u64) -> Option<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => Some(data),
        Err(rustix::io::Errno::NXIO) => None,
        // A file system that cannot tell; what else may be wrong, reading tells.
        Err(_) => Some(at),
    }
}

/// Where this data ends. Moves the position.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn next_hole(file: &File, at: u64) -> u64 {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(at)).unwrap_or(u64::MAX)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn next_data(_: &File, at: u64) -> Option<u64> {
    Some(at)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn next_hole(_: &File, _: u64) -> u64 {
    u64::MAX
}

/// Whether a file was changed since it was opened, its content or its metadata. A program that restores the
/// modification time cannot restore the change time.
fn has_moved(file: &File, before: &Metadata) -> io::Result<bool> {
    let stamp = |of: &Metadata| {
        (
            (of.dev(), of.ino(), of.len()),
            (of.mtime(), of.mtime_nsec()),
            (of.ctime(), of.ctime_nsec()),
        )
    };
    Ok(stamp(&file.metadata()?) != stamp(before))
}

/// The bytes and the hash of a small file.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) meta: Meta,
    pub(crate) xattrs: XattrList,
    pub(crate) bytes: Bytes,
    pub(crate) hash: [u8; 32],
}

/// Reads small files. `None` for one that is larger than `most`, which is at most a chunk, for one whose size is not
/// the reported one, and for one that changes meanwhile. The files share reused memory: bytes that are sent a moment
/// later are still in the processor's cache. Blocks.
pub(crate) fn read_small<'a>(
    sources: impl Iterator<Item = &'a Source>,
    most: usize,
    which: Xattrs,
    buffers: &Buffers,
) -> Vec<Result<Option<Whole>, TransferError>> {
    /// Several files in one buffer.
    struct Pack {
        buffer: Buffer,
        used: usize,
        /// The index of each file, and the offset of its end.
        files: Vec<(usize, usize)>,
    }
    let mut all = Vec::new();
    let mut packs: Vec<Pack> = Vec::new();
    for source in sources {
        let read = source.open_unchecked().and_then(|opened| {
            let size = match opened.size.map(usize::try_from) {
                Some(Ok(size)) if size <= most => size,
                _ => return Ok(None),
            };
            let has_room = |pack: &Pack| pack.buffer.memory.len() - pack.used >= size;
            if !packs.last().is_some_and(has_room) {
                packs.push(Pack {
                    buffer: buffers.take(CHUNK.max(size)),
                    used: 0,
                    files: Vec::new(),
                });
            }
            let Some(pack) = packs.last_mut() else {
                return Ok(None);
            };
            let end = pack.used + size;
            let room = pack.buffer.memory.get_mut(pack.used..end);
            let meta = opened.meta;
            let xattrs = opened.own_xattrs(which)?;
            let Some(hash) = opened.fill(room.unwrap_or_default())? else {
                return Ok(None);
            };
            pack.used = end;
            pack.files.push((all.len(), end));
            let bytes = Bytes::new();
            Ok(Some(Whole {
                meta,
                xattrs,
                bytes,
                hash,
            }))
        });
        all.push(read);
    }
    for Pack {
        buffer,
        used,
        files,
    } in packs
    {
        let mut bytes = buffer.filled(used);
        let mut at = 0;
        for (index, end) in files {
            if let Some(Ok(Some(whole))) = all.get_mut(index) {
                whole.bytes = bytes.split_to(end - at);
            }
            at = end;
        }
    }
    all
}

/// Buffers that files are read into. They are reused once QUIC has released them: the kernel would have to clear
/// freshly allocated pages. Clones share the buffers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// Takes a buffer of this many bytes.
    fn take(&self, want: usize) -> Buffer {
        // A small chunk must not hold on to the memory of a large one.
        let pool = (want > CHUNK / 2).then(|| self.clone());
        let spare = pool.as_ref().and_then(|pool| pool.lock().pop());
        let mut memory = spare.unwrap_or_default();
        if memory.len() < want {
            memory = vec![0; want];
        }
        Buffer {
            memory,
            filled: 0,
            pool,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer that returns to its pool when it is dropped.
struct Buffer {
    memory: Vec<u8>,
    filled: usize,
    pool: Option<Buffers>,
}

impl Buffer {
    fn room(&mut self, want: usize) -> &mut [u8] {
        self.memory.get_mut(..want).unwrap_or_default()
    }

    /// The bytes that were read, without a copy.
    fn filled(mut self, filled: usize) -> Bytes {
        self.filled = filled;
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.get(..self.filled).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            let mut spare = pool.lock();
            if spare.len() < SPARE {
                spare.push(std::mem::take(&mut self.memory));
            }
        }
    }
}

/// Why reading ended early.
enum Stop {
    /// The receiver of the chunks is gone.
    Unwanted,
    Failed(TransferError),
}

/// One pass over the bytes of a source.
struct Pump<'a> {
    path: &'a Path,
    /// The hash of everything up to `at`.
    hasher: blake3::Hasher,
    at: u64,
    /// Holes are looked for.
    sparse: bool,
    /// Set when the source is a file.
    samples: Option<Samples>,
    buffers: &'a Buffers,
    chunk: &'a dyn Fn() -> usize,
    take: &'a mut dyn FnMut(Piece) -> bool,
    unwanted: &'a dyn Fn() -> bool,
}

impl Pump<'_> {
    fn give(&mut self, piece: Piece) -> Result<(), Stop> {
        if (self.take)(piece) {
            Ok(())
        } else {
            Err(Stop::Unwanted)
        }
    }

    fn failed(&self, source: io::Error) -> Stop {
        Stop::Failed(TransferError::Source {
            path: self.path.to_owned(),
            source,
        })
    }

    /// Sends what a spool has and what its reader delivers, beginning where the server's ranges and the spool meet.
    fn unspool(&mut self, spool: &Spool, have: &Have) -> Result<(), Stop> {
        if let Some((size, hash)) = spool.whole()
            && have.as_slice() == [(0, size, hash)]
        {
            let (offset, len) = (0, size);
            self.give(Piece::Same { offset, len })?;
            let torn = false;
            return self.give(Piece::End { size, hash, torn });
        }
        let mut offset = spool.begin(have).map_err(|error| self.failed(error))?;
        if offset > 0 {
            let (offset, len) = (0, offset);
            self.give(Piece::Same { offset, len })?;
        }
        for range in have.iter().filter(|_| spool.compares()) {
            let (off, len, _) = *range;
            if off < offset || len == 0 {
                continue;
            }
            if off > offset {
                break;
            }
            let compared = spool.compare(*range, self.unwanted);
            match compared.map_err(|error| self.failed(error))? {
                Compared::Same => {
                    self.give(Piece::Same { offset, len })?;
                    offset += len;
                    // It is on the server's disk.
                    spool.durable(offset);
                }
                Compared::Other => break,
                Compared::Unwanted => return Err(Stop::Unwanted),
            }
        }
        loop {
            let next = spool.next(offset, self.chunk, self.unwanted);
            match next.map_err(|error| self.failed(error))? {
                Next::Chunk(bytes) => {
                    let len = bytes.len() as u64;
                    self.give(Piece::Chunk { offset, bytes })?;
                    offset += len;
                }
                Next::End { size, hash } => {
                    let torn = false;
                    return self.give(Piece::End { size, hash, torn });
                }
                Next::Unwanted => return Err(Stop::Unwanted),
            }
        }
    }

    fn changed(&self, change: String) -> Stop {
        Stop::Failed(TransferError::SourceChanged {
            path: self.path.to_owned(),
            change,
        })
    }

    /// The error for a file that ends before the size it had when it was opened.
    fn ended(&self, file: &File) -> Stop {
        match file.metadata() {
            Ok(now) if now.len() > self.at => {
                let (has, at) = (now.len(), self.at);
                self.changed(format!("it says {has} bytes, and ends soon after {at}"))
            }
            Ok(now) => self.changed(format!("only {} bytes are left of it", now.len())),
            Err(error) => self.failed(error),
        }
    }

    /// Called when all of a file was read. Tells how the file changed meanwhile, as far as a change can be detected. If
    /// only its times have changed, it is read once more.
    fn change(&mut self, file: &mut File, before: &Metadata) -> Result<Option<String>, Stop> {
        let failed = |error| {
            Stop::Failed(TransferError::Source {
                path: self.path.to_owned(),
                source: error,
            })
        };
        let now = file.metadata().map_err(failed)?;
        if now.len() != before.len() {
            let (had, has) = (before.len(), now.len());
            return Ok(Some(format!("it had {had} bytes and has {has} now")));
        }
        let samples = self.samples.take().unwrap_or_default();
        if !samples.hold(file).map_err(failed)? {
            return Ok(Some("its content is another one now".to_owned()));
        }
        if !has_moved(file, before).map_err(failed)? {
            return Ok(None);
        }
        let read = self.hasher.finalize();
        let size = std::mem::take(&mut self.at);
        let hasher = std::mem::take(&mut self.hasher);
        file.rewind().map_err(failed)?;
        let again = self.hash_file(file, 0, size)?;
        (self.at, self.hasher) = (size, hasher);
        Ok((again != read).then(|| "its content is another one now".to_owned()))
    }

    fn give_chunk(&mut self, bytes: Bytes) -> Result<(), Stop> {
        self.hasher.update(&bytes);
        let offset = self.at;
        self.at += bytes.len() as u64;
        self.give(Piece::Chunk { offset, bytes })
    }

    /// The server has the bytes before `end`, which are hashed already.
    fn same(&mut self, end: u64) -> Result<(), Stop> {
        let offset = std::mem::replace(&mut self.at, end);
        let len = end - offset;
        self.give(Piece::Same { offset, len })
    }

    /// Reads and sends up to `want` bytes; `false` at the end.
    fn send_chunk(&mut self, from: &mut dyn Read, want: usize) -> Result<bool, Stop> {
        let mut buffer = self.buffers.take(want);
        let filled = read_full(from, buffer.room(want)).map_err(|error| self.failed(error))?;
        if filled > 0 {
            let bytes = buffer.filled(filled);
            if let Some(samples) = &mut self.samples {
                samples.note(self.at, &bytes);
            }
            self.give_chunk(bytes)?;
        }
        Ok(filled == want)
    }

    /// Reads and sends up to the offset `to`; a file must reach it.
    fn send_to(&mut self, file: &mut File, to: u64) -> Result<(), Stop> {
        while self.at < to {
            let end = self.give_holes(file, to)?;
            while self.at < end {
                let want = least(end - self.at, (self.chunk)());
                if !self.send_chunk(file, want)? {
                    return Err(self.ended(file));
                }
            }
        }
        Ok(())
    }

    /// As [`send_to`](Self::send_to), but for chunks that the base has.
    fn send_changed(&mut self, file: &mut File, to: u64, base: &mut Base) -> Result<(), Stop> {
        while self.at < to {
            let end = self.give_holes(file, to)?;
            if self.at < end {
                self.send_delta(file, end, base)?;
            }
        }
        Ok(())
    }

    /// Sends up to the offset `to`, which a file of a sink must reach.
    fn send_kept(&mut self, kept: &mut KeptReader, to: u64) -> Result<(), Stop> {
        while self.at < to {
            let want = least(to - self.at, (self.chunk)());
            if !self.send_chunk(kept, want)? {
                return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok(())
    }

    /// Tells of a hole that begins here, up to `to` at most; where the data behind it ends. A hole that is written to
    /// meanwhile moves the times of its file, which is then [read again](Self::change).
    fn give_holes(&mut self, file: &mut File, to: u64) -> Result<u64, Stop> {
        if !self.sparse {
            return Ok(to);
        }
        let data = next_data(file, self.at).unwrap_or(to).clamp(self.at, to);
        while self.at < data {
            if (self.unwanted)() {
                return Err(Stop::Unwanted);
            }
            let (offset, len) = (self.at, (data - self.at).min(HOLE));
            for zeros in zeros::blocks(len) {
                self.hasher.update(zeros);
            }
            self.at += len;
            self.give(Piece::Hole { offset, len })?;
        }
        let end = match data < to {
            true => next_hole(file, data).clamp(data, to),
            false => to,
        };
        file.seek(SeekFrom::Start(data))
            .map_err(|error| self.failed(error))?;
        Ok(end)
    }

    /// Sends up to the offset `to`, which a file must reach, except the chunks that the base has.
    fn send_delta(&mut self, file: &mut File, to: u64, base: &mut Base) -> Result<(), Stop> {
        let mut cutting = Cutting::new(base.cutter());
        let mut read = self.at;
        let mut fresh = Vec::new();
        // Offset in the base, and length.
        let mut known: Option<(u64, u64)> = None;
        let mut last: Option<At> = None;
        // Where the next chunk begins.
        let mut at = self.at;
        loop {
            while cutting.needs() {
                if (self.unwanted)() {
                    return Err(Stop::Unwanted);
                }
                let want = least(to - read, PART);
                if want == 0 {
                    cutting.end();
                    break;
                }
                let block = cutting.room(want);
                let filled = read_full(file, block).map_err(|error| self.failed(error))?;
                if filled < want {
                    return Err(self.ended(file));
                }
                if let Some(samples) = &mut self.samples {
                    samples.note(read, block);
                }
                self.hasher.update(block);
                read += filled as u64;
                cutting.add(filled);
            }
            let goes_on = last.and_then(|last| base.goes_on(last, cutting.rest()));
            let chunk = match goes_on {
                Some((_, len)) => cutting.take(len),
                None => match cutting.next() {
                    Some(chunk) => chunk,
                    None => break,
                },
            };
            last = match goes_on {
                Some((place, _)) => Some(place),
                None => base.find(at, chunk),
            };
            let len = chunk.len() as u64;
            at += len;
            match (last.map(|last| last.from), &mut known) {
                (Some(from), Some((start, run))) if *start + *run == from && *run + len <= COPY => {
                    *run += len;
                }
                (Some(from), _) => {
                    self.give_fresh(&mut fresh, 1)?;
                    self.give_known(known.replace((from, len)))?;
                }
                (None, _) => {
                    self.give_known(known.take())?;
                    fresh.extend_from_slice(chunk);
                    self.give_fresh(&mut fresh, (self.chunk)())?;
                }
            }
        }
        self.give_fresh(&mut fresh, 1)?;
        self.give_known(known)
    }

    /// Sends these bytes, which are hashed already, while there are at least so many.
    fn give_fresh(&mut self, fresh: &mut Vec<u8>, least: usize) -> Result<(), Stop> {
        while fresh.len() >= least.max(1) {
            let rest = fresh.split_off(fresh.len().min((self.chunk)().max(1)));
            let bytes = Bytes::from(std::mem::replace(fresh, rest));
            let offset = self.at;
            self.at += bytes.len() as u64;
            self.give(Piece::Chunk { offset, bytes })?;
        }
        Ok(())
    }

    /// Reports that the base has the next bytes, which are hashed already.
    fn give_known(&mut self, known: Option<(u64, u64)>) -> Result<(), Stop> {
        let Some((from, len)) = known else {
            return Ok(());
        };
        let offset = self.at;
        self.at += len;
        self.give(Piece::Copy { offset, from, len })
    }

    /// Sends up to the offset `to`.
    fn send_slice(&mut self, bytes: &Bytes, to: u64) -> Result<(), Stop> {
        while self.at < to {
            let end = self.at + least(to - self.at, (self.chunk)()) as u64;
            self.give_chunk(slice(bytes, self.at, end))?;
        }
        Ok(())
    }

    /// As [`hash`](Self::hash), of a file, which must have all of the range.
    fn hash_file(&mut self, file: &mut File, off: u64, end: u64) -> Result<blake3::Hash, Stop> {
        let hash = self.hash(file, off, end)?;
        hash.ok_or_else(|| self.ended(file))
    }

    /// Hashes one of the [`ranges`] by itself and as part of everything; the position stays. `None` if the file ends before.
    fn hash(
        &mut self,
        file: &mut dyn Read,
        off: u64,
        end: u64,
    ) -> Result<Option<blake3::Hash>, Stop> {
        // For a range at offset 0 one hash is both.
        let mut own = (off > 0).then(blake3::Hasher::new);
        let mut left = end - self.at;
        let mut buffer = vec![0; least(left, BLOCK)];
        while left > 0 {
            if (self.unwanted)() {
                return Err(Stop::Unwanted);
            }
            buffer.truncate(least(left, BLOCK));
            let filled = read_full(file, &mut buffer).map_err(|error| self.failed(error))?;
            if filled < buffer.len() {
                return Ok(None);
            }
            if let Some(samples) = &mut self.samples {
                samples.note(end - left, &buffer);
            }
            self.hasher.update(&buffer);
            if let Some(own) = &mut own {
                own.update(&buffer);
            }
            left -= filled as u64;
        }
        Ok(Some(own.as_ref().unwrap_or(&self.hasher).finalize()))
    }
}

/// Begin, end and hash of the ranges beyond `at` that can be equal in a file of this size. A range that begins before
/// `at` begins at 0.
fn ranges(have: &Have, at: u64, size: u64) -> impl Iterator<Item = (u64, u64, blake3::Hash)> {
    have.iter().filter_map(move |(off, len, hash)| {
        let end = off.checked_add(*len)?;
        let sound = end <= size && end > at.max(*off) && (*off == 0 || *off >= at);
        sound.then(|| (*off, end, blake3::Hash::from_bytes(*hash)))
    })
}

fn slice(bytes: &Bytes, from: u64, to: u64) -> Bytes {
    let at = |offset| usize::try_from(offset).map_or(bytes.len(), |at| at.min(bytes.len()));
    bytes.slice(at(from)..at(to).max(at(from)))
}

fn least(bytes: u64, most: usize) -> usize {
    usize::try_from(bytes).unwrap_or(most).min(most)
}

/// Fills the buffer; returns fewer bytes only at the end.
fn read_full(from: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Fills the buffer. Returns whether the file had exactly this many bytes.
fn read_just(from: &mut File, buffer: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    let mut beyond = [0];
    loop {
        let rest = buffer.get_mut(filled..).unwrap_or_default();
        let mut room = [IoSliceMut::new(rest), IoSliceMut::new(&mut beyond)];
        match from.read_vectored(&mut room) {
            Ok(0) => return Ok(filled == buffer.len()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if filled >= buffer.len() {
            // A read that returned all bytes has also asked for the next one.
            return Ok(filled == buffer.len());
        }
    }
}

/// Modification time and mode of a local file.
pub(crate) fn meta(metadata: &Metadata) -> Meta {
    Meta {
        mtime: metadata.modified().ok().map(Time::from),
        mode: Some(metadata.permissions().mode() & 0o777),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rel(path: &str) -> RelPath {
        path.parse().unwrap()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new()
            .update(b"noise")
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    fn hash(bytes: &[u8]) -> [u8; 32] {
        *blake3::hash(bytes).as_bytes()
    }

    fn known(have: &Have) -> Known {
        Known {
            have: have.clone(),
            ..Known::default()
        }
    }

    /// Bytes sent, by offset; bytes passed over; the hash at the end.
    type Run = (Vec<(u64, Vec<u8>)>, u64, [u8; 32]);

    /// What would be at the server: which bytes were sent at which offset, what was passed over, the end.
    fn run(source: &Source, have: &Have, chunk: usize) -> Run {
        run_behind(0, source, have, chunk)
    }

    /// The same, where so many bytes of it are sent before it is known what is at the server.
    fn run_behind(head: usize, source: &Source, have: &Have, chunk: usize) -> Run {
        run_opened(head, source.open().unwrap(), have, chunk)
    }

    fn run_opened(head: usize, mut opened: Opened, have: &Have, chunk: usize) -> Run {
        let head = opened.head(head).unwrap();
        let (mut same, mut at, mut end) = (0, head.len() as u64, None);
        let mut sent: Vec<(u64, Vec<u8>)> = Vec::new();
        if !head.is_empty() {
            sent.push((0, head.to_vec()));
        }
        let pumped = opened.pump(
            known(have),
            &Buffers::default(),
            &|| chunk,
            &mut |piece| {
                match piece {
                    Piece::Chunk { offset, bytes } => {
                        assert_eq!(offset, at);
                        assert!(!bytes.is_empty() && bytes.len() <= chunk);
                        at += bytes.len() as u64;
                        match sent.last_mut() {
                            Some((from, last)) if *from + last.len() as u64 == offset => {
                                last.extend_from_slice(&bytes);
                            }
                            _ => sent.push((offset, bytes.to_vec())),
                        }
                    }
                    Piece::Same { offset, len } => {
                        assert_eq!(offset, at);
                        at += len;
                        same += len;
                    }
                    Piece::End { size, hash, torn } => {
                        assert!(!torn);
                        assert_eq!(size, at);
                        end = Some(hash);
                    }
                    Piece::Copy { .. } | Piece::Hole { .. } => panic!("there is no base"),
                    Piece::Failed(error) => panic!("{error}"),
                }
                true
            },
            &|| false,
        );
        assert!(pumped.is_ok());
        (sent, same, end.unwrap())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_a_file_of_a_sink_only_what_the_other_side_lacks_is_sent() {
        let all = noise(1_000_000);
        let sound = |from: usize, to: usize| {
            let (off, len) = (from as u64, (to - from) as u64);
            (off, len, hash(&all[from..to]))
        };
        let wrong = |from: usize, to: usize| (from as u64, (to - from) as u64, hash(b"other"));
        for (have, sent) in [
            (vec![], vec![(0, 1_000_000)]),
            (vec![sound(0, 600_000)], vec![(600_000, 1_000_000)]),
            (vec![sound(0, 1_000_000)], vec![]),
            (vec![wrong(0, 600_000)], vec![(0, 1_000_000)]),
            (
                vec![
                    sound(0, 100),
                    wrong(200_000, 300_000),
                    sound(500_000, 900_000),
                ],
                vec![(100, 500_000), (900_000, 1_000_000)],
            ),
            (vec![sound(300_000, 1_000_000)], vec![(0, 300_000)]),
        ] {
            let bytes = Bytes::from(all.clone());
            let stored = Stored::new(rel("a"), 1_000_000, Meta::default(), bytes);
            let case = have.clone();
            let reading = tokio::task::spawn_blocking(move || {
                run_opened(0, Opened::kept(stored), &have, 70_000)
            });
            let (chunks, same, end) = reading.await.unwrap();
            let ranges: Vec<_> = chunks
                .iter()
                .map(|(at, bytes)| (*at as usize, *at as usize + bytes.len()))
                .collect();
            assert_eq!(ranges, sent, "{case:?}");
            for (at, bytes) in chunks {
                assert!(bytes == all[at as usize..][..bytes.len()]);
            }
            let left: usize = sent.iter().map(|(from, to)| to - from).sum();
            assert_eq!((same as usize, end), (1_000_000 - left, hash(&all)));
        }
        // One that is shorter than it says.
        let bytes = Bytes::from(all[..500].to_vec());
        let stored = Stored::new(rel("a"), 1_000, Meta::default(), bytes);
        let pace = Pace::new(&crate::local::limiter::Limiter::unlimited(), 1, 1 << 20);
        let mut pieces =
            Opened::kept(stored).read(Known::default(), pace, Buffers::default(), None);
        let failed = async {
            loop {
                match pieces.recv().await {
                    Some(Piece::Failed(error)) => return error,
                    Some(Piece::Chunk { .. }) => {}
                    other => panic!("{other:?}"),
                }
            }
        };
        assert!(matches!(failed.await, TransferError::Source { .. }));
    }

    #[test]
    fn buffers_are_used_again_once_nobody_has_their_bytes() {
        let buffers = Buffers::default();
        let read = |byte: u8| {
            let mut buffer = buffers.take(CHUNK);
            buffer.room(CHUNK).fill(byte);
            buffer.filled(CHUNK - 1)
        };
        let first = read(1);
        let slice = first.slice(10..20);
        drop(first);
        let second = read(2);
        assert_eq!(slice, [1; 10].as_slice(), "a part is still in use");
        assert_eq!(second, vec![2; CHUNK - 1]);
        let at = slice.as_ptr() as usize - 10;
        drop(slice);
        let third = read(3);
        assert_eq!(third.as_ptr() as usize, at);
        assert_eq!(second, vec![2; CHUNK - 1]);
        drop((second, third));
        assert_eq!(buffers.lock().len(), 2);
        drop(buffers.take(CHUNK / 2).filled(CHUNK / 2));
        assert_eq!(buffers.lock().len(), 2, "a small one has memory of its own");
        let many: Vec<_> = (0..SPARE + 5).map(|_| buffers.take(CHUNK)).collect();
        drop(many);
        assert_eq!(buffers.lock().len(), SPARE);
    }

    #[test]
    fn equal_ranges_are_passed_over_and_others_are_sent() {
        let bytes = noise(3_000_000);
        let dir = tempfile::tempdir().unwrap();
        let local = dir.path().join("x");
        std::fs::write(&local, &bytes).unwrap();
        let range =
            |from: usize, to: usize| (from as u64, (to - from) as u64, hash(&bytes[from..to]));
        let wrong = |from: usize, to: usize| (from as u64, (to - from) as u64, [7; 32]);
        let all = bytes.len();
        type Case = (Have, Vec<(usize, usize)>);
        let cases: [Case; 8] = [
            (vec![], vec![(0, all)]),
            (vec![range(0, all)], vec![]),
            (vec![wrong(0, all)], vec![(0, all)]),
            (vec![range(0, 1_500_001)], vec![(1_500_001, all)]),
            (
                vec![range(0, 10), range(10, 1_200_000)],
                vec![(1_200_000, all)],
            ),
            (
                vec![range(5, 100), range(2_000_000, all)],
                vec![(0, 5), (100, 2_000_000)],
            ),
            (
                vec![
                    range(0, 10),
                    wrong(10, 1_100_000),
                    range(1_100_000, 1_100_001),
                ],
                vec![(10, 1_100_000), (1_100_001, all)],
            ),
            (vec![range(0, 10), (20, u64::MAX, [0; 32])], vec![(10, all)]),
        ];
        for source in [
            Source::file(&local, rel("x")),
            Source::bytes(bytes.clone(), rel("x")),
        ] {
            for (have, expected) in &cases {
                let (sent, same, end) = run(&source, have, 100_000);
                let expected: Vec<_> = expected
                    .iter()
                    .map(|(from, to)| (*from as u64, bytes[*from..*to].to_vec()))
                    .collect();
                assert!(sent == expected, "{have:?}");
                let count: usize = sent.iter().map(|(_, bytes)| bytes.len()).sum();
                assert_eq!(same, (all - count) as u64);
                assert_eq!(end, hash(&bytes));
            }
        }
    }

    #[test]
    fn behind_what_was_sent_before_ranges_are_passed_over_as_well() {
        let bytes = noise(300_000);
        let all = bytes.len();
        let dir = tempfile::tempdir().unwrap();
        let local = dir.path().join("x");
        std::fs::write(&local, &bytes).unwrap();
        let range =
            |from: usize, to: usize| (from as u64, (to - from) as u64, hash(&bytes[from..to]));
        let wrong = (0, 200_000, [7; 32]);
        type Case = (usize, Have, Vec<(usize, usize)>);
        let cases: [Case; 10] = [
            (100, vec![], vec![(0, all)]),
            (100, vec![range(0, all)], vec![(0, 100)]),
            (100, vec![range(0, 99)], vec![(0, all)]),
            (100, vec![range(0, 100)], vec![(0, all)]),
            (100, vec![range(0, 101)], vec![(0, 100), (101, all)]),
            (100, vec![wrong], vec![(0, all)]),
            (100, vec![wrong, range(200_000, all)], vec![(0, 200_000)]),
            (
                100,
                vec![range(0, 50), range(100, 200), range(300, all)],
                vec![(0, 100), (200, 300)],
            ),
            // A file that was begun in the middle cannot be compared any more.
            (
                100,
                vec![range(0, 50), range(50, 200), range(300, all)],
                vec![(0, 300)],
            ),
            (usize::MAX, vec![range(0, all)], vec![(0, all)]),
        ];
        for (head, have, expected) in &cases {
            let expected: Vec<_> = expected
                .iter()
                .map(|(from, to)| (*from as u64, bytes[*from..*to].to_vec()))
                .collect();
            let missing: usize = expected.iter().map(|(_, bytes)| bytes.len()).sum();
            let file = Source::file(&local, rel("x"));
            let (sent, same, end) = run_behind(*head, &file, have, 10_000);
            assert!(sent == expected, "{head} {have:?}");
            assert_eq!((same, end), ((all - missing) as u64, hash(&bytes)));
            let memory = Source::bytes(bytes.clone(), rel("x"));
            let (sent, _, end) = run_behind(*head, &memory, have, 10_000);
            assert!(sent == expected, "{head} {have:?}");
            assert_eq!(end, hash(&bytes));
        }
        let source = Source::file(&local, rel("x"));
        let mut opened = source.open().unwrap();
        assert_eq!(opened.head(1000).unwrap(), bytes[..1000]);
        std::fs::write(&local, &bytes[..500]).unwrap();
        let pumped = opened.pump(
            Known::default(),
            &Buffers::default(),
            &|| 1000,
            &mut |_| true,
            &|| false,
        );
        let Err(Stop::Failed(error)) = pumped else {
            panic!("it has shrunk");
        };
        assert!(matches!(error, TransferError::SourceChanged { .. }));
        let mut reader = Source::reader(io::Cursor::new(bytes), rel("x"))
            .open()
            .unwrap();
        assert!(reader.head(1000).unwrap().is_empty(), "it has no size");
    }

    #[test]
    fn a_reader_is_read_to_its_end_and_only_once() {
        let bytes = noise(1_000_001);
        // Gives little at a time, as a pipe does.
        struct Dribble(io::Cursor<Vec<u8>>);
        impl Read for Dribble {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let most = buffer.len().min(1000);
                self.0.read(&mut buffer[..most])
            }
        }
        let source = Source::reader(Dribble(io::Cursor::new(bytes.clone())), rel("x"));
        assert_eq!(source.size().unwrap(), None);
        let same = source.clone();
        let opened = source.open().unwrap();
        assert!(
            !same.is_spent(),
            "opened and not read: it can be offered again"
        );
        drop(opened);
        let (sent, _, end) = run(&source, &Have::new(), 4096);
        assert!(sent == [(0, bytes.clone())]);
        assert_eq!(end, hash(&bytes));
        assert!(source.is_spent() && same.is_spent());
        let again = source.open().unwrap().pump(
            Known::default(),
            &Buffers::default(),
            &|| 10,
            &mut |_| true,
            &|| false,
        );
        assert!(matches!(again, Err(Stop::Failed(_))));
    }

    /// Reads a file to its end, doing this at the first chunk.
    fn read_while(local: &Path, chunk: usize, act: impl Fn()) -> Result<[u8; 32], String> {
        let (hash, torn) = read_torn(local, chunk, act, false)?;
        assert!(!torn);
        Ok(hash)
    }

    /// The same; where what was read may be none of its states, whether it is.
    fn read_torn(
        local: &Path,
        chunk: usize,
        act: impl Fn(),
        may_tear: bool,
    ) -> Result<([u8; 32], bool), String> {
        let opened = Source::file(local, rel("x")).open().unwrap();
        let (mut acted, mut end) = (false, None);
        let mut take = |piece| {
            if !std::mem::replace(&mut acted, true) {
                act();
            }
            if let Piece::End { hash, torn, .. } = piece {
                end = Some((hash, torn));
            }
            true
        };
        let known = Known {
            may_tear,
            ..Known::default()
        };
        match opened.pump(known, &Buffers::default(), &|| chunk, &mut take, &|| false) {
            Ok(()) => Ok(end.unwrap()),
            Err(Stop::Failed(TransferError::SourceChanged { change, .. })) => Err(change),
            Err(Stop::Failed(other)) => panic!("{other}"),
            Err(Stop::Unwanted) => panic!("it is wanted"),
        }
    }

    #[test]
    fn a_change_is_found_where_its_times_are_put_back_and_a_moved_time_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let local = dir.path().join("x");
        let bytes = noise(100_000);
        let write = |at: u64, with: &[u8]| {
            let file = File::options().write(true).open(&local).unwrap();
            let before = file.metadata().unwrap().modified().unwrap();
            file.write_all_at(with, at).unwrap();
            file.set_modified(before).unwrap();
        };
        type Act<'a> = (&'a dyn Fn(), Result<[u8; 32], &'a str>);
        let touch = || {
            let file = File::options().write(true).open(&local).unwrap();
            file.set_modified(std::time::UNIX_EPOCH).unwrap();
        };
        let mode = || {
            let mode = std::fs::Permissions::from_mode(0o640);
            std::fs::set_permissions(&local, mode).unwrap();
        };
        let replace = || {
            let other = dir.path().join("other");
            std::fs::write(&other, b"other").unwrap();
            std::fs::rename(&other, &local).unwrap();
        };
        let resize = |size: u64| {
            let file = File::options().write(true).open(&local).unwrap();
            file.set_len(size).unwrap();
        };
        let whole = hash(&bytes);
        let cases: [Act<'_>; 8] = [
            (&|| {}, Ok(whole)),
            (&touch, Ok(whole)),
            (&mode, Ok(whole)),
            // What was opened is read, whatever has its name.
            (&replace, Ok(whole)),
            (&|| write(0, b"new"), Err("content")),
            // No sample lies there.
            (&|| write(4_097, b"new"), Err("content")),
            (&|| resize(100_001), Err("had 100000 bytes and has 100001")),
            (&|| resize(99_999), Err("only 99999 bytes")),
        ];
        for (n, (act, expected)) in cases.iter().enumerate() {
            std::fs::write(&local, &bytes).unwrap();
            let read = read_while(&local, 10_000, act);
            match (expected, &read) {
                (Ok(hash), Ok(read)) => assert_eq!(hash, read, "{n}"),
                (Err(text), Err(change)) => assert!(change.contains(text), "{n}: {change}"),
                _ => panic!("{n}: {read:?}"),
            }
        }
    }

    #[test]
    fn what_may_be_torn_is_told_so_and_is_just_what_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let local = dir.path().join("x");
        let bytes = noise(100_000);
        let write = |at: u64, with: &[u8]| {
            let file = File::options().write(true).open(&local).unwrap();
            file.write_all_at(with, at).unwrap();
        };
        let resize = |size: u64| {
            let file = File::options().write(true).open(&local).unwrap();
            file.set_len(size).unwrap();
        };
        let mut late = bytes.clone();
        late[90_000..90_003].copy_from_slice(b"new");
        type Act<'a> = (&'a dyn Fn(), [u8; 32], bool);
        let cases: [Act<'_>; 5] = [
            (&|| {}, hash(&bytes), false),
            (&|| write(5, &bytes[5..10]), hash(&bytes), false),
            // Behind what was read already, and before it.
            (&|| write(5, b"new"), hash(&bytes), true),
            (&|| write(90_000, b"new"), hash(&late), false),
            (&|| resize(100_001), hash(&bytes), true),
        ];
        for (n, (act, expected, torn)) in cases.iter().enumerate() {
            std::fs::write(&local, &bytes).unwrap();
            let read = read_torn(&local, 10_000, act, true).unwrap();
            assert_eq!(read, (*expected, *torn), "{n}");
        }
        // What is not there cannot be read.
        std::fs::write(&local, &bytes).unwrap();
        read_torn(&local, 10_000, || resize(50_000), true).unwrap_err();
    }

    #[test]
    fn holes_are_told_and_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let local = dir.path().join("x");
        let file = File::create(&local).unwrap();
        file.set_len(40 << 20).unwrap();
        file.write_all_at(b"data", 20 << 20).unwrap();
        file.sync_all().unwrap();
        if !is_sparse(&file.metadata().unwrap()) {
            return;
        }
        let whole = hash(&std::fs::read(&local).unwrap());
        for (have, same) in [(0, 0), (30 << 20, 30 << 20)] {
            let bytes = std::fs::read(&local).unwrap();
            let have: Have = match have {
                0 => Have::new(),
                len => vec![(0, len as u64, hash(&bytes[..len]))],
            };
            let known = Known {
                have,
                holes: true,
                ..Known::default()
            };
            let mut opened = Source::file(&local, rel("x")).open().unwrap();
            assert!(
                opened.head(1000).unwrap().is_empty(),
                "it begins with a hole"
            );
            let (mut at, mut holes, mut sent, mut passed, mut end) = (0, 0, 0, 0, None);
            let mut take = |piece| {
                let (from, len) = match piece {
                    Piece::Chunk { offset, bytes } => {
                        sent += bytes.len();
                        (offset, bytes.len() as u64)
                    }
                    Piece::Hole { offset, len } => {
                        assert!((1..=HOLE).contains(&len));
                        holes += len;
                        (offset, len)
                    }
                    Piece::Same { offset, len } => {
                        passed += len;
                        (offset, len)
                    }
                    Piece::End { hash, .. } => {
                        end = Some(hash);
                        (at, 0)
                    }
                    other => panic!("{other:?}"),
                };
                assert_eq!(from, at);
                at += len;
                true
            };
            let buffers = Buffers::default();
            let pumped = opened.pump(known, &buffers, &|| 100_000, &mut take, &|| false);
            assert!(pumped.is_ok());
            assert_eq!((at, passed), (40 << 20, same));
            assert_eq!(end, Some(whole));
            assert_eq!(holes + sent as u64 + passed, 40 << 20);
            assert!(sent <= 65_536, "{sent} sent");
        }
    }

    #[test]
    fn samples_show_what_was_written_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        let local = dir.path().join("x");
        let bytes = noise(20 * SAMPLE);
        let mut samples = Samples::default();
        for (n, block) in bytes.chunks(2 * SAMPLE).enumerate() {
            samples.note((n * 2 * SAMPLE) as u64, block);
        }
        assert_eq!(samples.taken.len(), 4);
        // The beginning, one in the middle, and what is in none.
        for (at, seen) in [
            (0, true),
            (7, true),
            (6 * SAMPLE + 1, true),
            (SAMPLE, false),
        ] {
            let mut other = bytes.clone();
            other[at] ^= 1;
            std::fs::write(&local, &other).unwrap();
            let file = File::open(&local).unwrap();
            assert_eq!(samples.hold(&file).unwrap(), !seen, "{at}");
        }
        std::fs::write(&local, &bytes[..SAMPLE]).unwrap();
        assert!(!samples.hold(&File::open(&local).unwrap()).unwrap());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_does_not_tell_its_size_is_read_to_its_end() {
        let pseudo = [
            "/proc/version",
            "/proc/cpuinfo",
            "/sys/kernel/mm/transparent_hugepage/enabled",
        ];
        for local in pseudo {
            let Ok(content) = std::fs::read(local) else {
                continue;
            };
            assert!(!content.is_empty());
            let source = Source::file(local, rel("x"));
            let small = read_small(
                [&source].into_iter(),
                CHUNK,
                Xattrs::None,
                &Buffers::default(),
            );
            assert!(matches!(small[..], [Ok(None)]), "{local}: {small:?}");
            assert_eq!(source.open().unwrap().size, None, "{local}");
            let (sent, _, _) = run(&source, &Have::new(), 4096);
            // Some of them differ from one moment to the next, but not in their beginning.
            assert!(!sent[0].1.is_empty(), "{local}");
            assert_eq!(sent[0].1[..10], content[..10], "{local}");
        }
        let dir = tempfile::tempdir().unwrap();
        let local = dir.path().join("x");
        for len in [0, 1, 4096, 300_000] {
            std::fs::write(&local, noise(len)).unwrap();
            let opened = Source::file(&local, rel("x")).open().unwrap();
            assert_eq!(opened.size, Some(len as u64));
        }
    }

    #[test]
    fn small_files_are_read_whole_into_shared_memory() {
        let dir = tempfile::tempdir().unwrap();
        let lens = [0, 1, 4096, 4097, CHUNK, 5, CHUNK - 1, 7];
        let mut sources: Vec<_> = lens
            .iter()
            .map(|len| {
                let local = dir.path().join(len.to_string());
                std::fs::write(&local, noise(*len)).unwrap();
                Source::file(&local, rel("x"))
            })
            .collect();
        let large = dir.path().join("large");
        std::fs::write(&large, noise(CHUNK + 1)).unwrap();
        sources.insert(3, Source::file(&large, rel("x")));
        sources.insert(5, Source::file(dir.path().join("none"), rel("x")));
        sources.push(Source::bytes(noise(9), rel("x")));
        let buffers = Buffers::default();
        let mut read = read_small(sources.iter(), CHUNK, Xattrs::None, &buffers);
        assert!(matches!(read.remove(5), Err(TransferError::Source { .. })));
        assert!(matches!(read.remove(3), Ok(None)));
        assert_eq!(read.len(), lens.len() + 1);
        for (len, read) in lens.iter().chain(&[9]).zip(&read) {
            let whole = read.as_ref().unwrap().as_ref().unwrap();
            assert!(whole.bytes == noise(*len), "{len}");
            assert_eq!(whole.hash, hash(&noise(*len)));
        }
        drop(read);
        let used = buffers.lock().len();
        assert_eq!(used, 5);
        drop(read_small(sources.iter(), CHUNK, Xattrs::None, &buffers));
        assert_eq!(buffers.lock().len(), used, "it is used again");
    }
}
