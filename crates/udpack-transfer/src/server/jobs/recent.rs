//! The jobs that ended recently, for later watchers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::{JobEnd, Running, TEXT, lock};

/// How many successful jobs are remembered, and how many others, so that thousands of small files do not displace a
/// failed one.
const KEPT: usize = 128;

/// An ended job.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) job: Arc<Running>,
    pub(super) end: JobEnd,
    pub(super) at: Instant,
    /// It was no transfer.
    pub(super) void: bool,
}

impl Ended {
    /// The text of an end that was not successful.
    pub(super) fn text(&self) -> Option<&str> {
        match &self.end {
            JobEnd::Failed(_, text) => Some(text),
            JobEnd::Cancelled => self.job.cancelled.get()?.as_deref(),
            JobEnd::Done | JobEnd::Suspended => None,
        }
    }
}

/// How many jobs have ended, by their ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) done: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
    pub(crate) suspended: u64,
}

/// The last ended jobs.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Last>);

#[derive(Debug, Default)]
struct Last {
    well: VecDeque<Arc<Ended>>,
    others: VecDeque<Arc<Ended>>,
    counts: Counts,
}

impl Recent {
    /// Adds an ended job, unless it is `void`.
    pub(super) fn add(&self, job: &Arc<Running>, end: JobEnd, void: bool) -> Arc<Ended> {
        let end = match end {
            JobEnd::Failed(code, text) => {
                JobEnd::Failed(code, udpack::text::printable_within(&text, TEXT))
            }
            end => end,
        };
        let ended = Arc::new(Ended {
            job: job.clone(),
            end,
            at: Instant::now(),
            void,
        });
        if void {
            return ended;
        }
        let mut last = lock(&self.0);
        let Last {
            well,
            others,
            counts,
        } = &mut *last;
        let (count, kept) = match &ended.end {
            JobEnd::Done => (&mut counts.done, well),
            JobEnd::Failed(..) => (&mut counts.failed, others),
            JobEnd::Cancelled => (&mut counts.cancelled, others),
            JobEnd::Suspended => (&mut counts.suspended, others),
        };
        *count += 1;
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back(ended.clone());
        ended
    }

    /// All remembered jobs, the last ended first.
    pub(super) fn all(&self) -> Vec<Arc<Ended>> {
        let mut all: Vec<_> = {
            let last = lock(&self.0);
            last.well.iter().chain(&last.others).cloned().collect()
        };
        all.sort_by_key(|ended| std::cmp::Reverse(ended.at));
        all
    }

    pub(super) fn counts(&self) -> Counts {
        lock(&self.0).counts
    }
}
