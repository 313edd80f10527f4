//! [`Places`]: the resources that the clients of one server share, each divided by token, so that no client can take
//! all of one. `docs/RESOURCES.md` has the whole table.
//!
//! Each kind of work has places of its own, so that requests never delay an upload.

use std::thread;

use udpack::{Channel, Place, Pool, PoolFull, Shares, Tenant};

use crate::base::code::Code;
use crate::server::receiver::ReceiverConfig;

/// The most callers that wait for a place of one kind; one token may have a quarter of them.
const WAITING: usize = 16_384;
/// The most directories and links that are created at once.
const STEPS: usize = 32;

/// The places of a server, by kind of work. A handle.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// Files being received.
    pub(crate) files: Pool,
    /// Directories and links being created.
    pub(crate) steps: Pool,
    /// Existing files that are hashed for an upload.
    pub(crate) checks: Pool,
    /// Runs of the operator's hook before an upload.
    pub(crate) hooks: Pool,
    /// Files being sent.
    pub(crate) downloads: Pool,
    /// Requests being answered, except hashes.
    pub(crate) requests: Pool,
    /// Files that are hashed for a request.
    pub(crate) hashes: Pool,
}

impl Places {
    pub(crate) fn new(config: &ReceiverConfig) -> Self {
        let pool =
            |what, places: usize| Pool::new(what, Shares::of(places.max(1)).with_queue(WAITING));
        Self {
            files: pool("open uploads", config.open_files),
            steps: pool("directories and links under way", STEPS),
            checks: Pool::new("files being compared", half(config.hashes)),
            hooks: pool("runs of the hook", config.hooks),
            downloads: pool("downloads under way", config.downloads),
            requests: Pool::new("requests under way", half(config.requests_in_all)),
            hashes: Pool::new("files being hashed", half(config.hashes)),
        }
    }

    /// Each kind with its name in the counters.
    pub(crate) fn all(&self) -> [(&'static str, &Pool); 7] {
        [
            ("files", &self.files),
            ("steps", &self.steps),
            ("checks", &self.checks),
            ("hooks", &self.hooks),
            ("downloads", &self.downloads),
            ("requests", &self.requests),
            ("hashes", &self.hashes),
        ]
    }
}

/// Places for work that keeps a thread busy. One token gets as many as half of the processors, because such threads
/// on all processors delay the threads that serve peers. With three concurrent listings on two processors, another
/// client's request took 19 times as long; with three files compared or hashed, its upload took 3.8 and 2.2 times as
/// long.
fn half(places: usize) -> Shares {
    let shares = Shares::of(places.max(1)).with_queue(WAITING);
    let half = thread::available_parallelism().map_or(1, usize::from) / 2;
    Shares {
        each: half.clamp(1, shares.each),
        ..shares
    }
}

/// The code for work that finds no place and no room to wait, except uploads.
pub(crate) const TOO_MANY: Code = Code::TooManyRequests;

/// The refusal for a client that finds no place.
pub(crate) fn too_many(what: &str, full: &PoolFull) -> String {
    format!("too many {what}: {full}, and as many wait as may")
}

/// The places that an open upload holds.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) file: Place,
    /// Held until existing bytes are hashed.
    pub(crate) check: Option<Place>,
}

/// The tenant of this channel's work.
pub(crate) fn tenant(channel: &Channel) -> Tenant {
    // A peer with a channel was admitted.
    channel.peer().map_or_else(
        || Tenant::address(std::net::Ipv4Addr::UNSPECIFIED.into()),
        |peer| Tenant::peer(&peer),
    )
}

/// The number of processors, but at least `least`.
pub(crate) fn cores(least: usize) -> usize {
    thread::available_parallelism()
        .map_or(1, usize::from)
        .max(least)
}
