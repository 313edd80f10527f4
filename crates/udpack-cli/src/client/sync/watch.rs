//! `sync --watch`: waits until something below a directory changes.
//!
//! All directories are watched before they are compared, so that no change is missed. Changes that follow each other
//! closely count as one.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::time::Instant;
use udpack_transfer::{Exclude, names};

use crate::client::remote::join;

/// The interval at which events are read.
const LOOK: Duration = Duration::from_millis(100);
/// A change is complete after this long without an event, or after the second time at the latest.
const QUIET: Duration = Duration::from_millis(300);
const MOST: Duration = Duration::from_secs(3);

/// A tree that is being watched.
#[derive(Debug)]
pub(super) struct Watcher {
    events: OwnedFd,
}

impl Watcher {
    /// Watches a directory and those below it that are not excluded. `follow`: also those that links point to. Blocks.
    pub(super) fn new(dir: &Path, exclude: &Exclude, follow: bool) -> io::Result<Self> {
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let mut seen = HashSet::new();
        let mut left = vec![(dir.to_owned(), String::new())];
        while let Some((dir, rel)) = left.pop() {
            let added = inotify::add_watch(&events, &dir, changes());
            match added {
                Ok(_) => {}
                // It was replaced or removed: the directory above it reports that.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) if !rel.is_empty() => continue,
                Err(error) => return Err(error.into()),
            }
            // A directory that cannot be read is reported by the comparison.
            if let Ok(entries) = fs::read_dir(&dir) {
                for entry in entries.flatten() {
                    let rel = join(&rel, &names::from_os(&entry.file_name()));
                    if let Some(path) = below(&entry.path(), &rel, exclude, follow, &mut seen) {
                        left.push((path, rel));
                    }
                }
            }
        }
        Ok(Self { events })
    }

    /// Waits until something has changed, and the changes have paused.
    ///
    /// Cancel safe: a change that was seen is not reported again.
    pub(super) async fn changed(&self) -> io::Result<()> {
        self.some().await?;
        let end = Instant::now() + MOST;
        while let Ok(more) = tokio::time::timeout(QUIET, self.some()).await {
            more?;
            if Instant::now() >= end {
                break;
            }
        }
        Ok(())
    }

    /// Waits for events, and reads all of them.
    async fn some(&self) -> io::Result<()> {
        // Waiting for a descriptor would take unsafe code or a thread.
        while !self.take()? {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Reads the waiting events; returns whether there was one.
    fn take(&self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        let mut any = false;
        loop {
            match rustix::io::read(&self.events, &mut buffer) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(any),
                Ok(_) => any = true,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn changes() -> WatchFlags {
    WatchFlags::ATTRIB
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::DELETE_SELF
        | WatchFlags::MODIFY
        | WatchFlags::MOVE
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR
}

/// Adds a directory that is not watched yet.
fn below(
    path: &Path,
    rel: &str,
    exclude: &Exclude,
    follow: bool,
    seen: &mut HashSet<(u64, u64)>,
) -> Option<PathBuf> {
    let metadata = match follow {
        true => fs::metadata(path),
        false => fs::symlink_metadata(path),
    };
    let metadata = metadata.ok().filter(fs::Metadata::is_dir)?;
    let wanted = !exclude.matches(rel, true) && seen.insert((metadata.dev(), metadata.ino()));
    wanted.then(|| path.to_owned())
}
