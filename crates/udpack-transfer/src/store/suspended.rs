//! Interrupted uploads, seen from outside: works beside a store that has the directory open.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::StoreError;
use super::disk::{self, Area, Lock};

/// An upload that is under way or waits to be resumed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspended {
    /// Its key: 32 hexadecimal digits.
    pub key: String,
    /// Whose it is; empty when its journal cannot be read.
    pub owner: String,
    /// The name it is to get; empty when its journal cannot be read.
    pub path: String,
    /// The size it was declared with.
    pub size: Option<u64>,
    /// Bytes it holds in the staging area.
    pub held: u64,
    /// When it was last written to.
    pub touched: SystemTime,
    /// An upload is writing it now.
    pub live: bool,
}

/// All resumable uploads of the store in `root` that have come to their first journal entry, oldest first, also
/// while a server has it open. Changes nothing; an upload begun at the very moment it is looked at may be told
/// [`StoreError::Busy`].
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

/// Removes uploads last written to at least `older_than` ago, but for those being written now, and says
/// how many. Works beside a server that has the store open.
pub fn purge(root: &Path, older_than: Duration) -> Result<u64, StoreError> {
    let Some((staging, journal)) = disk::open_area(root)? else {
        return Ok(0);
    };
    let area = Area::new(&staging, &journal);
    let failed = |e| StoreError::io("remove an upload", None, e, || 0);
    let mut removed = 0;
    for key in area.keys().map_err(failed)? {
        if let Lock::Mine(_held, _) = area.lock(&key).map_err(failed)?
            // Looked at only now that it cannot change any more.
            && let Some(touched) = area.touched(&key).map_err(failed)?
            && disk::age(touched) >= older_than
        {
            area.remove(&key).map_err(failed)?;
            removed += 1;
        }
    }
    Ok(removed)
}
