//! Verified file transfer on [`udpack`] channels.
//!
//! A [`Receiver`] serves the files of a [`Store`]. An [`Uploader`] sends files to it and a [`Downloader`] gets
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
//! Deltas between versions of a file, and compression.
#![cfg_attr(
    not(test),
    warn(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)
)]

mod downloader;
mod error;
mod fetch;
mod glob;
mod hook;
mod jobs;
mod lane;
mod limiter;
mod link;
pub mod names;
mod outgoing;
mod path;
mod places;
mod progress;
mod queries;
mod queue;
mod receiver;
mod remote;
mod scope;
mod serving;
mod size;
mod source;
mod store;
mod uploader;
mod walk;
pub mod wire;
mod worker;
mod writers;

pub use downloader::{Download, Downloader, Wanted, apply_entry};
pub use error::{ErrorKind, TransferError};
pub use fetch::{Fetch, FetchError, Fetched};
pub use glob::{Exclude, Pattern, PatternError};
pub use hook::{Accepted, Access, Answer, Hook, HookAccess, HookOffer, HookStored, HookWhole};
pub use jobs::{Transfer, TransferWatch};
pub use lane::{Action, Lane, Refusal};
pub use limiter::Limiter;
pub use link::{Link, LinkEvent, LinkEvents, Retry};
pub use path::{PathError, PathRule, RelPath};
pub use progress::{Event, FileProgress, Moving, Outcome, Progress, Watch};
pub use receiver::{Receiver, ReceiverConfig};
pub use remote::{Job, JobKind, JobState, Jobs, JobsEvent, Listing, Remote};
pub use scope::{Scope, ScopeError};
pub use size::{format_size, parse_size};
pub use source::Source;
pub use store::{
    Begin, Checkpoint, Complete, Entry, Existing, IfExists, Kind, Left, List, Meta, Names, NewFile,
    OtherTime, Overwrite, Page, Partial, Placed, Published, Range, Removed, Store, StoreConfig,
    StoreError, Suspended, SyncPolicy, Synced, Tenant, Time, Usage, check_target, purge, uploads,
};
pub use uploader::{Upload, Uploader};
pub use walk::{Found, Walk, What};

/// The name of the channels that are lanes.
pub const CHANNEL: &str = "transfer";

/// The name of the channels on which a server's transfers are watched.
pub const JOBS_CHANNEL: &str = "transfers";
