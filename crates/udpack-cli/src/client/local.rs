//! A directory of this machine as a place for what a server has: where files are stored, and how directories and links
//! are created there.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc;
use udpack_transfer::{
    Entry, IfExists, Kind as EntryKind, Overwrite, Placed, RelPath, Store, StoreConfig, Wanted,
    Xattrs, apply_entry,
};

use super::report::{Note, Report, Thing};
use crate::exit::{Failure, Kind};

/// How long unfinished files may take to be kept for a resume.
const CLOSING: Duration = Duration::from_secs(10);

/// Where files are stored.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) dir: PathBuf,
    /// The name in it of the only requested path.
    pub(super) name: Option<String>,
}

impl Place {
    /// Creates the directory, and the directory in it where files are staged.
    pub(super) async fn open(&self, if_exists: IfExists, xattrs: Xattrs) -> anyhow::Result<Store> {
        let config = StoreConfig {
            max_file: None,
            quota: None,
            min_free: Some(0),
            overwrite: match if_exists {
                IfExists::Overwrite => Overwrite::Always,
                IfExists::Rename => Overwrite::Rename,
                IfExists::Same | IfExists::Error | IfExists::Skip => Overwrite::Never,
            },
            xattrs,
            shared: true,
            ..StoreConfig::default()
        };
        let dir = self.dir.clone();
        let open = move || {
            // The permissions follow the umask; a directory that the store creates is for its owner only.
            match std::fs::create_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    tracing::debug!(dir = %dir.display(), %error, "cannot make the directory");
                }
                _ => {}
            }
            Store::open(dir, config)
        };
        let opened = tokio::task::spawn_blocking(open)
            .await
            .context("cannot open the directory")?;
        opened.map_err(|error| {
            Failure::new(
                Kind::LocalFile,
                format!("cannot write to {}: {error}", self.dir.display()),
            )
            .hint("choose another directory with --as DIR/")
            .into()
        })
    }

    /// Closes the store, and reports what it keeps for a resume.
    pub(super) async fn close(&self, store: Store, report: &mut Report) {
        let left = store.close(CLOSING).await;
        if left.uploads > 0 {
            report.left(&self.dir.join(".udpack"), left);
        }
    }
}

/// Creates directories and links in a store, and tells the report about them.
#[derive(Debug, Clone)]
pub(super) struct Maker {
    pub(super) store: Store,
    pub(super) if_exists: IfExists,
    pub(super) umask: u32,
    pub(super) notes: mpsc::Sender<Note>,
}

impl Maker {
    /// Creates a directory or a link of the server under this name, or passes on that a file is wanted; returns `false`
    /// when nobody takes files any more.
    pub(super) async fn place(
        &self,
        entry: &Entry,
        local: RelPath,
        size: Option<u64>,
        wanted: &mpsc::Sender<Wanted>,
    ) -> bool {
        if entry.kind != EntryKind::File {
            return self.make(entry, local, false, true).await;
        }
        let Ok(remote) = entry.path.parse::<RelPath>() else {
            return true;
        };
        let file = Wanted {
            remote,
            local,
            size,
        };
        wanted.send(file).await.is_ok()
    }

    /// Creates a directory or a link. `tell`: whether the report gets a line for it.
    pub(super) async fn make(
        &self,
        entry: &Entry,
        name: RelPath,
        preserve: bool,
        tell: bool,
    ) -> bool {
        let (store, if_exists, umask) = (self.store.clone(), self.if_exists, Some(self.umask));
        let (made, local) = (entry.clone(), name.clone());
        let made = tokio::task::spawn_blocking(move || {
            apply_entry(&store, &made, &local, if_exists, preserve, umask)
        });
        match made.await {
            Ok(Ok(Placed {
                same, other_time, ..
            })) => {
                if let Some(time) = other_time {
                    let path = name.as_str().to_owned();
                    let note = Note::OtherTime { path, time };
                    if self.notes.send(note).await.is_err() {
                        return false;
                    }
                }
                let what = match entry.kind {
                    EntryKind::Link => Thing::Link,
                    _ => Thing::Dir,
                };
                let note = Note::Made {
                    path: name.as_str().to_owned(),
                    source: entry.path.clone(),
                    what,
                    same,
                };
                !tell || self.notes.send(note).await.is_ok()
            }
            Ok(Err(error)) => self.failed(name.as_str(), &entry.path, error.into()).await,
            Err(_) => false,
        }
    }

    /// Reports that an entry has failed; returns `false` when nobody takes reports any more.
    pub(super) async fn failed(&self, path: &str, source: &str, error: anyhow::Error) -> bool {
        let note = Note::Failed {
            path: path.to_owned(),
            source: source.to_owned(),
            error,
        };
        self.notes.send(note).await.is_ok()
    }
}
