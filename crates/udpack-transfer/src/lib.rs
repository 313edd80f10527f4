//! Verified file transfer on [`udpack`] channels.
//!
//! A [`Receiver`] serves the files of a [`Store`], or of any other [`Sink`]. An [`Uploader`] sends files to it and a [`Downloader`] gets
//! them, a [`Fetch`] reads one into memory or any writer, over a `Socket` or over a [`Link`] that survives the loss of one; a [`Remote`] asks what is there and
//! watches what is transferred. All use the public interface of `udpack` only. The messages are in
//! `docs/PROTOCOL.md`, section 11.
//!
//! ```text
//! C> file      S> ready (only if asked)      C> chunk …      S> ack …      C> finish      S> done | error
//! C> get       S> file      S> chunk …       S> finish | error             C> done
//! ```
//!
//! # Guarantees
//! After `done` the file is whole (size and BLAKE3 agree on both sides), durable (file and directories are
//! synced, unless [`SyncPolicy::Never`] was chosen) and replaced nothing, unless that was asked for and granted.
//! Before `done`, nothing of it is visible under its name, whatever happens to either side. An interrupted file is
//! resumed by offering it again, without state at the client.
//!
//! # Non-goals
//! Compression.
#![cfg_attr(
    not(test),
    warn(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)
)]

mod base;
mod client;
mod local;
mod server;
mod staging;
mod store;
pub mod wire;

/// Tests for sinks of your own; with the feature `testing`.
#[cfg(any(test, feature = "testing"))]
pub mod testing {
    pub use crate::store::sink::conformance::sink_conforms;
}

/// The bytes of a file, as a [`Sink`] gets them.
pub use bytes::Bytes;

pub use base::code::{Code, ErrorKind};
pub use base::glob::{Exclude, Pattern, PatternError};
pub use base::mapping::{Mapping, escape_name, unescape_name};
pub use base::names;
pub use base::path::{PathError, PathRule, RelPath};
pub use base::phase::Phase;
pub use base::size::{format_size, parse_size};
pub use client::downloader::{Download, Downloader, Wanted, apply_entry};
pub use client::fetch::{Fetch, FetchError, Fetched};
pub use client::link::{Link, LinkEvent, LinkEvents, PathProgress, Retry};
pub use client::progress::{Event, FileProgress, LostXattrs, Moving, Outcome, Progress, Watch};
pub use client::remote::{
    Job, JobKind, JobState, Jobs, JobsEvent, Listing, Remote, Rights, ShareEntry, ShareWish,
    Shared, StatsWatch,
};
pub use client::uploader::{Delta, Upload, Uploader};
pub use local::error::TransferError;
pub use local::limiter::Limiter;
pub use local::source::Source;
pub use local::walk::{Found, Walk, What};
pub use server::control::Control;
pub use server::hook::{
    Accepted, Access, Answer, Hook, HookAccess, HookOffer, HookStored, HookWhole,
};
pub use server::jobs::{Transfer, TransferWatch};
pub use server::receiver::{Receiver, ReceiverConfig};
pub use server::scope::{Scope, ScopeError};
pub use store::{
    Abilities, BadXattrs, Begin, Begun, Change, Changes, Checkpoint, Complete, DiskUpload, Durable,
    Entry, Existing, Expected, IfExists, Kind, Left, List, Memory, MemoryUpload, MemoryWhole, Meta,
    Names, NewDir, NewFile, NewLink, NewUpload, OtherTime, Overwrite, Page, Partial, Placed,
    Published, Range, ReadAt, Removed, Sink, Space, Store, StoreConfig, StoreError, Stored,
    Suspended, SyncPolicy, Synced, Tenant, Time, Usage, Xattr, XattrList, Xattrs, purge, uploads,
};
pub use wire::lane::{Action, Lane, Refusal};
pub use wire::stats::{
    ClusterStats, JobCounts, NodeStats, PushFailureStats, PushStats, PushingStats, QuotaStats,
    RoomStats, ServerStats, SocketStats,
};
pub use wire::{CHANNEL, JOBS_CHANNEL, STATS_CHANNEL};
