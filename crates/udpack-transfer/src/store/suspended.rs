//! Lists and removes interrupted uploads, also while a store has the directory open.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::StoreError;
use super::disk::{self, Area, Lock};

/// A resumable upload, running or interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspended {
    /// Its key: 32 hexadecimal digits.
    pub key: String,
    /// The owner; empty if its journal cannot be read.
    pub owner: String,
    /// Its future name; empty if its journal cannot be read.
    pub path: String,
    /// The declared size in bytes.
    pub size: Option<u64>,
    /// Bytes it holds in the staging area.
    pub held: u64,
    /// When it was last written to.
    pub touched: SystemTime,
    /// Whether an upload is writing it now.
    pub live: bool,
}

/// All resumable uploads of the store in `root` that have a journal, oldest first, also while a server has it open.
/// Changes nothing; an upload that begins at the moment of the check may fail with [`StoreError::Busy`].
pub fn uploads(root: &Path) -> Result<Vec<Suspended>, StoreError> {
    let Some((staging, journal)) = disk::open_area(root)? else {
        return Ok(Vec::new());
    };
    let area = Area::new(&staging, &journal);
    let failed = |e| StoreError::io("look at the uploads", None, e, || 0);
    let mut found = Vec::new();
    for key in area.keys().map_err(failed)? {
        let (Some(held), Some(touched)) = (
            area.held(&key).map_err(failed)?,
            area.touched(&key).map_err(failed)?,
        ) else {
            // It ended meanwhile.
            continue;
        };
        let live = matches!(area.lock(&key).map_err(failed)?, Lock::Busy);
        let record = area.record(&key).map_err(failed)?;
        let (owner, path, size) = record
            .map(|record| (record.head.owner, record.head.path, record.head.size))
            .unwrap_or_default();
        found.push(Suspended {
            key: key.as_str().to_owned(),
            owner,
            path,
            size,
            held,
            touched,
            live,
        });
    }
    found.sort_by(|a, b| (a.touched, &a.key).cmp(&(b.touched, &b.key)));
    Ok(found)
}

/// Removes uploads last written to at least `older_than` ago, except those being written now, and returns how many.
/// Works beside a server that has the store open.
pub fn purge(root: &Path, older_than: Duration) -> Result<u64, StoreError> {
    let Some((staging, journal)) = disk::open_area(root)? else {
        return Ok(0);
    };
    let area = Area::new(&staging, &journal);
    let failed = |e| StoreError::io("remove an upload", None, e, || 0);
    let mut removed = 0;
    for key in area.keys().map_err(failed)? {
        if let Lock::Mine(_held, _) = area.lock(&key).map_err(failed)?
            // Read only now, when it cannot change any more.
            && let Some(touched) = area.touched(&key).map_err(failed)?
            && disk::age(touched) >= older_than
        {
            area.remove(&key).map_err(failed)?;
            removed += 1;
        }
    }
    Ok(removed)
}
