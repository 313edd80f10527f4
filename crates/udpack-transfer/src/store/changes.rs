//! [`Changes`]: the names below which files came or went, until somebody has carried that to another place.
//!
//! A name is noted before what happens to it can be seen, and the note is on disk before the change is reported. So no
//! change that was reported is forgotten, whenever the server ends. A note says what to look at, not what is there: whoever
//! takes it looks at the name then, so one note stands for any number of changes, and one too many does no harm.
//!
//! A note is a symbolic link in `<root>/.udpack/changes` to the name: it is there whole or not at all, and one sync of the
//! directory puts any number of them on disk. `KEY.put` says that a file came, `KEY.rm` that one was removed.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cap_std::fs::Dir;
use rustix::fs::AtFlags;
use rustix::io::Errno;
use tokio::sync::Notify;

use super::disk;
use super::journal::Key;
use crate::base::names;
use crate::base::path::RelPath;

/// What has changed in a [`Store`](super::Store) that was opened with
/// [`StoreConfig::changes`](super::StoreConfig::changes), and was not [settled](Change::settle) yet, by any run of the
/// server. A handle: clones share the list.
///
/// Changes are taken in passes: each pass gives every name that is noted once, and names that are noted meanwhile.
/// Memory does not grow with the number of notes, which the disk keeps.
#[derive(Clone, Debug)]
pub struct Changes {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: Dir,
    /// Whether notes are synced before changes are reported.
    sync: bool,
    state: Mutex<State>,
    noted: Notify,
}

#[derive(Debug)]
struct State {
    /// Names that are being changed or were taken.
    held: HashMap<Key, Held>,
    /// Names that were changed in this pass.
    fresh: VecDeque<Key>,
    /// There are more of those than that.
    missed: bool,
    /// The rest of this pass; `None` at its end.
    pass: Option<rustix::fs::Dir>,
    notes: u64,
}

#[derive(Debug, Default)]
struct Held {
    /// How many are changing it now.
    changing: u32,
    taken: bool,
    /// Counts the notes made while it is held.
    version: u64,
}

/// What a note says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Put,
    Removed,
}

impl What {
    fn suffix(self) -> &'static str {
        match self {
            Self::Put => ".put",
            Self::Removed => ".rm",
        }
    }
}

/// A name that was noted and is being changed. Dropping it says that the change is over.
#[derive(Debug)]
pub(super) struct Noted {
    shared: Arc<Shared>,
    key: Key,
    what: What,
    /// Nothing had been noted before, as of this version.
    made: Option<u64>,
}

/// A change that was taken: nobody else gets it meanwhile. Dropping it leaves it for the next pass.
#[derive(Debug)]
pub struct Change {
    shared: Arc<Shared>,
    key: Key,
    path: RelPath,
    removed: bool,
    version: u64,
}

impl Changes {
    pub(super) fn open(dir: Dir, sync: bool) -> io::Result<Self> {
        let mut notes = 0;
        for entry in rustix::fs::Dir::read_from(&dir)? {
            notes += u64::from(key_of(entry?.file_name().to_bytes()).is_some());
        }
        let pass = Some(rustix::fs::Dir::read_from(&dir)?);
        let state = State {
            held: HashMap::new(),
            fresh: VecDeque::new(),
            missed: false,
            pass,
            notes,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                dir,
                sync,
                state: Mutex::new(state),
                noted: Notify::new(),
            }),
        })
    }

    /// Notes that this is about to happen to the name. Not on disk before [`sync`](Self::sync).
    pub(super) fn note(&self, path: &RelPath, what: What) -> io::Result<Noted> {
        let shared = &self.shared;
        let mut state = shared.state();
        let key = Key::new("", path);
        let link = format!("{}{}", key.as_str(), what.suffix());
        let made = match rustix::fs::symlinkat(&*names::os(path.as_str()), &shared.dir, &link) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(errno.into()),
        };
        state.notes += u64::from(made);
        let held = state.held.entry(key.clone()).or_default();
        held.changing += 1;
        held.version += 1;
        let made = made.then_some(held.version);
        Ok(Noted {
            shared: shared.clone(),
            key,
            what,
            made,
        })
    }

    /// Puts all notes so far on disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        match self.shared.sync {
            true => disk::sync_dir(&self.shared.dir),
            false => Ok(()),
        }
    }

    /// How many notes there are, those taken included. A name may have two, of which one says that it was removed.
    pub fn notes(&self) -> u64 {
        self.shared.state().notes
    }

    /// The next change of this pass, once it is over; `None` at the end of the pass. Blocks as long as the disk takes.
    ///
    /// # Errors
    /// When the notes cannot be read.
    pub fn take(&self) -> io::Result<Option<Change>> {
        let mut state = self.shared.state();
        loop {
            let Some(key) = self.next(&mut state)? else {
                return Ok(None);
            };
            // Whoever holds it makes it fresh again, or leaves it for the next pass.
            if state.held.contains_key(&key) {
                continue;
            }
            let read = |what: What| {
                let link = format!("{}{}", key.as_str(), what.suffix());
                match rustix::fs::readlinkat(&self.shared.dir, &link, Vec::new()) {
                    Ok(target) => Ok(Some(target)),
                    Err(Errno::NOENT) => Ok(None),
                    Err(errno) => Err(io::Error::from(errno)),
                }
            };
            let (put, removed) = (read(What::Put)?, read(What::Removed)?);
            let is_removed = removed.is_some();
            let Some(target) = removed.or(put) else {
                continue;
            };
            let Ok(path) = RelPath::from_os(OsStr::from_bytes(target.to_bytes())) else {
                tracing::warn!(note = key.as_str(), "a note of a change names nothing");
                continue;
            };
            let held = state.held.entry(key.clone()).or_default();
            held.taken = true;
            let version = held.version;
            return Ok(Some(Change {
                shared: self.shared.clone(),
                key,
                path,
                removed: is_removed,
                version,
            }));
        }
    }

    fn next(&self, state: &mut State) -> io::Result<Option<Key>> {
        loop {
            if let Some(key) = state.fresh.pop_front() {
                return Ok(Some(key));
            }
            if state.pass.is_none() && std::mem::take(&mut state.missed) {
                state.pass = Some(rustix::fs::Dir::read_from(&self.shared.dir)?);
            }
            let Some(pass) = &mut state.pass else {
                return Ok(None);
            };
            match pass.next().transpose()? {
                Some(entry) => {
                    if let Some(key) = key_of(entry.file_name().to_bytes()) {
                        return Ok(Some(key));
                    }
                }
                None => state.pass = None,
            }
        }
    }

    /// Begins the next pass: what was taken and not settled comes again.
    pub fn again(&self) {
        self.shared.state().missed = true;
    }

    /// Waits until a change is there that was not there at the last call.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn changed(&self) {
        self.shared.noted.notified().await;
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change leaves the state consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unlink(&self, state: &mut State, key: &Key, what: What) -> io::Result<()> {
        let link = format!("{}{}", key.as_str(), what.suffix());
        match rustix::fs::unlinkat(&self.dir, &link, AtFlags::empty()) {
            Ok(()) => {
                state.notes = state.notes.saturating_sub(1);
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Lets go of a name that nobody holds any more. `fresh` if it is to be taken in this pass.
    fn release(&self, state: &mut State, key: &Key, fresh: bool) {
        let free = |held: &Held| held.changing == 0 && !held.taken;
        if !state.held.get(key).is_some_and(free) {
            return;
        }
        state.held.remove(key);
        if !fresh {
            return;
        }
        match state.fresh.len() < MOST_FRESH {
            true => state.fresh.push_back(key.clone()),
            false => state.missed = true,
        }
        self.noted.notify_one();
    }
}

impl Noted {
    /// Nothing has happened to the name: takes back what was noted for that.
    pub(super) fn withdraw(self) {
        let mut state = self.shared.state();
        let version = state.held.get(&self.key).map(|held| held.version);
        if self.made.is_some() && self.made == version {
            // What stays is looked at for nothing.
            let _ = self.shared.unlink(&mut state, &self.key, self.what);
        }
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(held) = state.held.get_mut(&self.key) {
            held.changing = held.changing.saturating_sub(1);
        }
        self.shared.release(&mut state, &self.key, true);
    }
}

impl Change {
    /// The name.
    pub fn path(&self) -> &RelPath {
        &self.path
    }

    /// Whether a client had a file of this name removed. One may be there again. Without this, a file came, which
    /// somebody else may have removed since.
    pub fn removed(&self) -> bool {
        self.removed
    }

    /// Whether the name was not changed again since this was taken.
    pub fn is_latest(&self) -> bool {
        let state = self.shared.state();
        let held = state.held.get(&self.key);
        held.is_some_and(|held| held.version == self.version)
    }

    /// The change is where it belongs: the note is removed, unless the name was changed again. Blocks as long as the disk
    /// takes.
    ///
    /// # Errors
    /// When the note cannot be removed: the change then comes again.
    pub fn settle(self) -> io::Result<()> {
        let mut state = self.shared.state();
        let held = state.held.get(&self.key);
        if held.is_none_or(|held| held.version != self.version) {
            return Ok(());
        }
        self.shared.unlink(&mut state, &self.key, What::Put)?;
        if self.removed {
            self.shared.unlink(&mut state, &self.key, What::Removed)?;
            drop(state);
            // One that came back after a crash could remove what was stored in the other place since.
            if self.shared.sync {
                disk::sync_dir(&self.shared.dir)?;
            }
        }
        Ok(())
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let mut changed = false;
        if let Some(held) = state.held.get_mut(&self.key) {
            held.taken = false;
            changed = held.version != self.version;
        }
        self.shared.release(&mut state, &self.key, changed);
    }
}

/// The key in a note's name.
fn key_of(name: &[u8]) -> Option<Key> {
    let name = std::str::from_utf8(name).ok()?;
    let kinds = [What::Put, What::Removed];
    kinds
        .iter()
        .find_map(|what| Key::from_name(name, what.suffix()))
}

/// Names that are remembered as changed in this pass; more are found by another.
pub(super) const MOST_FRESH: usize = 1024;
