//! What the server and its clients may store: counted by listing, then kept up to date for a while.
//!
//! A store has no count of its own. So what lies below a prefix is listed when it is first asked for, and again when an upload would
//! be refused by a count that is old.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use udpack_transfer::{RelPath, StoreError, Tenant};

use crate::error::refused;
use crate::sink::{Inner, lock};

/// What was counted below each prefix, and what uploads under way add to that.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    counted: HashMap<Prefix, (u64, Instant)>,
    /// Bytes promised to uploads, by the number of each.
    promised: HashMap<u64, (RelPath, u64)>,
    next: u64,
}

type Prefix = Option<RelPath>;

/// Bytes that are promised to an upload. Gives them back on drop.
#[derive(Debug)]
pub(crate) struct Reserved {
    inner: Arc<Inner>,
    number: u64,
    quotas: Vec<(Prefix, u64)>,
    bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        lock(&self.inner.accounts).promised.remove(&self.number);
    }
}

fn is_below(path: &RelPath, prefix: &Prefix) -> bool {
    let Some(prefix) = prefix else {
        return true;
    };
    let below = path.as_str().strip_prefix(prefix.as_str());
    below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
}

/// What a file of this size counts: an empty one takes room, too.
fn charge(size: u64) -> u64 {
    match size {
        0 => 1024,
        size => size,
    }
}

impl Accounts {
    fn taken(&self, prefix: &Prefix, used: u64) -> u64 {
        let below = self
            .promised
            .values()
            .filter(|(path, _)| is_below(path, prefix));
        below.fold(used, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    fn add(&mut self, path: &RelPath, bytes: u64) {
        for (prefix, (used, _)) in &mut self.counted {
            if is_below(path, prefix) {
                *used = used.saturating_add(bytes);
            }
        }
    }

    /// What has this name, or lies below it, is gone.
    pub(crate) fn removed(&mut self, path: &RelPath, bytes: u64) {
        for (prefix, (used, _)) in &mut self.counted {
            if is_below(path, prefix) {
                *used = used.saturating_sub(bytes);
            }
        }
    }
}

impl Inner {
    /// Nothing yet, for an upload that counts against the server's quota and these.
    pub(crate) fn reserved(self: &Arc<Self>, path: &RelPath, tenant: Option<&Tenant>) -> Reserved {
        let tenants = std::iter::successors(tenant, |one| one.outer.as_deref());
        let quotas = tenants.map(|one| (one.prefix.clone(), one.quota));
        let own = self.config.quota.map(|quota| (None, quota));
        let mut accounts = lock(&self.accounts);
        accounts.next += 1;
        let number = accounts.next;
        accounts.promised.insert(number, (path.clone(), 0));
        Reserved {
            inner: self.clone(),
            number,
            quotas: quotas.chain(own).collect(),
            bytes: 0,
        }
    }

    /// Bytes of the objects below a prefix, counted no longer ago than this.
    async fn used(&self, prefix: &Prefix, within: Duration) -> Result<u64, StoreError> {
        if let Some((used, at)) = lock(&self.accounts).counted.get(prefix)
            && at.elapsed() < within
        {
            return Ok(*used);
        }
        let base = match prefix {
            Some(prefix) => Some(self.key(prefix)?),
            None => self.base(""),
        };
        let count = async {
            let mut used = 0_u64;
            let mut objects = self.backend.store.list(base.as_ref());
            while let Some(object) = objects.try_next().await? {
                let name = self.backend.name(&object.location).unwrap_or_default();
                if name.parse::<RelPath>().is_ok() {
                    used = used.saturating_add(charge(object.size));
                }
            }
            Ok(used)
        };
        let used = count.await;
        let used = used.map_err(|cause| refused("count what is stored", None, &cause))?;
        let mut accounts = lock(&self.accounts);
        if accounts.counted.len() >= MOST_COUNTED {
            accounts.counted.clear();
        }
        accounts
            .counted
            .insert(prefix.clone(), (used, Instant::now()));
        Ok(used)
    }
}

impl Reserved {
    /// Promises room for a file that has so many bytes in all.
    pub(crate) async fn grow(&mut self, size: u64) -> Result<(), StoreError> {
        let size = charge(size);
        if size <= self.bytes {
            return Ok(());
        }
        for within in [OLD, FRESH] {
            let mut used = Vec::new();
            for (prefix, _) in &self.quotas {
                used.push(self.inner.used(prefix, within).await?);
            }
            let mut accounts = lock(&self.inner.accounts);
            let mut refusal = None;
            for ((prefix, quota), used) in self.quotas.iter().zip(used) {
                let taken = accounts.taken(prefix, used).saturating_sub(self.bytes);
                let left = quota.saturating_sub(taken);
                if size > left {
                    refusal = Some(StoreError::Quota {
                        need: size,
                        left,
                        quota: *quota,
                    });
                }
            }
            match refusal {
                None => {
                    if let Some((_, promised)) = accounts.promised.get_mut(&self.number) {
                        *promised = size;
                    }
                    self.bytes = size;
                    return Ok(());
                }
                // Others may have removed objects since the count.
                Some(_) if within == OLD => {}
                Some(refusal) => return Err(refusal),
            }
        }
        Ok(())
    }

    /// The file is stored under this name.
    pub(crate) fn stored(self, path: &RelPath, size: u64) {
        lock(&self.inner.accounts).add(path, charge(size));
    }
}

/// How long a count is believed, and before an upload is refused for it.
const OLD: Duration = Duration::from_secs(300);
const FRESH: Duration = Duration::from_secs(5);
/// Prefixes whose counts are kept, at most.
const MOST_COUNTED: usize = 1024;
