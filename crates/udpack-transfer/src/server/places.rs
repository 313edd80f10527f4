//! [`Places`]: what the clients of one server share, each divided by token, so that no client can use up what the next
//! one needs. `docs/RESOURCES.md` has the whole table.
//!
//! Each kind of work has places of its own: what requests hold never keeps an upload waiting.

use std::thread;

use udpack::{Channel, Place, Pool, PoolFull, Shares, Tenant};

use crate::base::code::Code;
use crate::server::receiver::ReceiverConfig;

/// Those who may wait for a place of one kind; a quarter of them may be of one token.
const WAITING: usize = 16_384;
/// Directories and links that are made at once.
const STEPS: usize = 32;

/// The places of a server, by kind of work. A handle.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// Files that are received.
    pub(crate) files: Pool,
    /// Directories and links that are made.
    pub(crate) steps: Pool,
    /// Files of the server that are read for their hash because an upload asks what is there.
    pub(crate) checks: Pool,
    /// Runs of the operator's hook before an upload.
    pub(crate) hooks: Pool,
    /// Files that are sent.
    pub(crate) downloads: Pool,
    /// Requests that are answered, but for hashes.
    pub(crate) requests: Pool,
    /// Files that are read for their hash because a request wants it.
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

    /// Each kind by the name that counters have for it.
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

/// Places for work that keeps a thread busy, of which one token has as many as half of the processors: where such threads
/// had all of them, the threads that speak to peers waited. Beside three listed directories on two processors another
/// client's request took 19 times its time, and beside three files that were compared or hashed its upload 3.8 and 2.2 times.
fn half(places: usize) -> Shares {
    let shares = Shares::of(places.max(1)).with_queue(WAITING);
    let half = thread::available_parallelism().map_or(1, usize::from) / 2;
    Shares {
        each: half.clamp(1, shares.each),
        ..shares
    }
}

/// The code of what finds no place and no room to wait for one, but for uploads.
pub(crate) const TOO_MANY: Code = Code::TooManyRequests;

/// The refusal for a client that finds no place.
pub(crate) fn too_many(what: &str, full: &PoolFull) -> String {
    format!("too many {what}: {full}, and as many wait as may")
}

/// What an upload holds while it is open.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) file: Place,
    /// Until it is known what is there.
    pub(crate) check: Option<Place>,
}

/// Whose share the work of this channel counts against.
pub(crate) fn tenant(channel: &Channel) -> Tenant {
    // A peer with a channel was admitted.
    channel.peer().map_or_else(
        || Tenant::address(std::net::Ipv4Addr::UNSPECIFIED.into()),
        |peer| Tenant::peer(&peer),
    )
}

/// As many threads as can work at once, and at least some.
pub(crate) fn cores(least: usize) -> usize {
    thread::available_parallelism()
        .map_or(1, usize::from)
        .max(least)
}
