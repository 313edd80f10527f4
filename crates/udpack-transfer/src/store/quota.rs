//! The usage of quotas: the store's own and those of its tenants.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::base::path::RelPath;

/// The bytes that a directory, a link and an empty file count: they take room on disk.
pub(super) const LEAST: u64 = 1024;

/// The bytes that a file of this size counts.
pub(super) fn charge(size: u64) -> u64 {
    match size {
        0 => LEAST,
        size => size,
    }
}

/// The usage below the root and below every prefix with a quota, and the reservations of open uploads.
#[derive(Debug)]
pub(super) struct Accounts {
    /// By prefix; `None` is the root, which always has one.
    accounts: HashMap<Option<RelPath>, Account>,
    /// Open uploads. There are few.
    uploads: HashMap<u64, Open>,
    next: u64,
}

/// A running upload.
#[derive(Debug)]
struct Open {
    /// Its path.
    path: RelPath,
    /// The bytes reserved for it.
    bytes: u64,
    /// Bytes of the file that it will replace: as many of its own bytes take no additional room.
    credit: u64,
}

impl Open {
    fn charged(&self) -> u64 {
        self.bytes.saturating_sub(self.credit)
    }
}

#[derive(Debug, Default)]
struct Account {
    /// May be negative for a moment: threads count after they have changed the disk, so a removal may be counted
    /// before the addition.
    used: i128,
    /// Bytes published since the account was created. A running count uses it to correct for files that it may have
    /// missed.
    published: u64,
    /// When the files were last counted; `None` if `used` is not valid.
    counted: Option<Instant>,
}

impl Account {
    fn used(&self) -> u64 {
        u64::try_from(self.used.max(0)).unwrap_or(u64::MAX)
    }
}

impl Accounts {
    /// `used`: the bytes below the root, if they were counted.
    pub(super) fn new(used: Option<u64>) -> Self {
        let root = Account {
            used: used.unwrap_or(0).into(),
            published: 0,
            counted: used.map(|_| Instant::now()),
        };
        Self {
            accounts: HashMap::from([(None, root)]),
            uploads: HashMap::new(),
            next: 0,
        }
    }

    /// Bytes of the files below the prefix, as far as they were counted.
    pub(super) fn used(&self, prefix: &Option<RelPath>) -> u64 {
        self.accounts.get(prefix).map_or(0, Account::used)
    }

    /// The same; `None` if they were not counted.
    pub(super) fn counted(&self, prefix: &Option<RelPath>) -> Option<u64> {
        let account = self.accounts.get(prefix)?;
        account.counted.map(|_| account.used())
    }

    /// Bytes promised to open uploads below the prefix.
    pub(super) fn reserved(&self, prefix: &Option<RelPath>) -> u64 {
        let below = self
            .uploads
            .values()
            .filter(|open| is_below(&open.path, prefix));
        below.fold(0, |sum, open| sum.saturating_add(open.charged()))
    }

    /// Bytes of the quota that are neither used nor reserved.
    pub(super) fn left(&self, prefix: &Option<RelPath>, quota: u64) -> u64 {
        quota
            .saturating_sub(self.used(prefix))
            .saturating_sub(self.reserved(prefix))
    }

    /// Begins a count of the files below the prefix, if one is needed before `need` more bytes are refused or, the
    /// first time, granted. Returns a token for [`end_count`](Self::end_count).
    pub(super) fn begin_count(
        &mut self,
        prefix: &Option<RelPath>,
        quota: u64,
        need: u64,
    ) -> Option<u64> {
        let left = self.left(prefix, quota);
        let account = self.accounts.entry(prefix.clone()).or_default();
        let due = match account.counted {
            None => true,
            Some(counted) => left < need && counted.elapsed() >= RECOUNT_AFTER,
        };
        if !due {
            return None;
        }
        // Other uploads use the old number meanwhile, if there is one.
        account.counted = account.counted.map(|_| Instant::now());
        Some(account.published)
    }

    /// Ends the count that returned `before`.
    pub(super) fn end_count(&mut self, prefix: &Option<RelPath>, before: u64, counted: u64) {
        let account = self.accounts.entry(prefix.clone()).or_default();
        account.used = counted
            .saturating_add(account.published.saturating_sub(before))
            .into();
        account.counted = Some(Instant::now());
    }

    /// Registers an upload; returns its number.
    pub(super) fn open(&mut self, path: &RelPath) -> u64 {
        let upload = self.next;
        self.next += 1;
        let open = Open {
            path: path.clone(),
            bytes: 0,
            credit: 0,
        };
        self.uploads.insert(upload, open);
        upload
    }

    /// Records that an upload will replace a file of this size. Of several such uploads only one is credited.
    pub(super) fn replaces(&mut self, upload: u64, size: u64) {
        let Some(path) = self.uploads.get(&upload).map(|open| open.path.clone()) else {
            return;
        };
        let taken = |open: &Open| open.path == path && open.credit > 0;
        if !self.uploads.values().any(taken)
            && let Some(open) = self.uploads.get_mut(&upload)
        {
            open.credit = size;
        }
    }

    /// Bytes that can still be reserved for an upload without additional room.
    pub(super) fn credit(&self, upload: u64) -> u64 {
        let left = |open: &Open| open.credit.saturating_sub(open.bytes);
        self.uploads.get(&upload).map_or(0, left)
    }

    /// The path of an open upload.
    pub(super) fn path(&self, upload: u64) -> Option<RelPath> {
        self.uploads.get(&upload).map(|open| open.path.clone())
    }

    /// Counts a new entry of `bytes` that was not an upload.
    pub(super) fn added(&mut self, path: &RelPath, bytes: u64) {
        for (prefix, account) in &mut self.accounts {
            if is_below(path, prefix) {
                account.used += i128::from(bytes);
                account.published = account.published.saturating_add(bytes);
            }
        }
    }

    /// Reserves more bytes for an upload.
    pub(super) fn promise(&mut self, upload: u64, more: u64) {
        if let Some(open) = self.uploads.get_mut(&upload) {
            open.bytes = open.bytes.saturating_add(more);
        }
    }

    /// Removes an upload and its reservation.
    pub(super) fn close(&mut self, upload: u64) {
        self.uploads.remove(&upload);
        self.settle();
    }

    /// Resets negative numbers when no upload runs: they come from files that others had added and that were removed
    /// without being counted.
    fn settle(&mut self) {
        if self.uploads.is_empty() {
            for account in self.accounts.values_mut() {
                account.used = account.used.max(0);
            }
        }
    }

    /// Counts a published upload of `size` bytes, which replaced a file of `replaced` bytes.
    pub(super) fn published(&mut self, upload: u64, size: u64, replaced: u64) {
        let Some(Open { path, .. }) = self.uploads.get(&upload) else {
            return;
        };
        for (prefix, account) in &mut self.accounts {
            if is_below(path, prefix) {
                account.used += i128::from(size) - i128::from(replaced);
                account.published = account.published.saturating_add(size);
            }
        }
    }

    /// Counts the removal of an entry with its content, of `bytes` bytes.
    pub(super) fn removed(&mut self, path: &RelPath, bytes: u64) {
        for (prefix, account) in &mut self.accounts {
            let inside = prefix
                .as_ref()
                .is_some_and(|prefix| prefix == path || is_below(prefix, &Some(path.clone())));
            if inside {
                account.counted = None;
            } else if is_below(path, prefix) {
                account.used -= i128::from(bytes);
            }
        }
        self.settle();
    }

    /// For tests: makes the last counts old; false if the clock does not reach that far back.
    #[cfg(test)]
    pub(super) fn age(&mut self) -> bool {
        let long_ago = Instant::now().checked_sub(RECOUNT_AFTER);
        for account in self.accounts.values_mut() {
            account.counted = account.counted.and(long_ago);
        }
        long_ago.is_some()
    }
}

pub(super) fn is_below(path: &RelPath, prefix: &Option<RelPath>) -> bool {
    prefix.as_ref().is_none_or(|prefix| {
        let rest = path.as_str().strip_prefix(prefix.as_str());
        rest.is_some_and(|rest| rest.starts_with('/'))
    })
}

/// Shortest time between two counts of the files, which may take long.
const RECOUNT_AFTER: Duration = Duration::from_secs(30);
