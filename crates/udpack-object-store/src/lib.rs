//! Uploads of udpack into object stores: S3 and what speaks its protocol, Google Cloud Storage, Azure, a directory.
//!
//! [`ObjectSink`] is a [`Sink`](udpack_transfer::Sink) over the crate `object_store`. A file of more than one part is uploaded in
//! parts of equal size; a journal on this machine notes each part that the store has acknowledged, so that an upload goes on
//! where it was after a crash of the server. A smaller file is one request.
//!
//! [`Push`] carries what changes in a directory on this machine into an object store, behind the clients' backs.
//!
//! # Guarantees
//! - Bytes count as durable when the store has their part and the journal says so on disk.
//! - Nothing has a file's name before the file is whole and its BLAKE3 agrees. A file is reported as stored when the store
//!   has said so and tells its size.
//! - A name that is taken is refused, also where two uploads end at once, by a condition that the store itself checks:
//!   [`ObjectSink::is_exclusive`] says whether it does.
//! - Memory for bytes under way is bounded by [`ObjectConfig::budget`] for all uploads together, and by half of it for one peer.
//! - What a crash leaves in the store is ended when the sink is opened again, and by [`ObjectSink::sweep`].
//!
//! # Non-goals
//! Directories of their own, links, and permissions: an object store has none.
#![cfg_attr(
    not(test),
    warn(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)
)]

mod backend;
mod error;
mod journal;
mod local;
mod look;
mod publish;
mod push;
mod quota;
mod sink;
mod tree;
mod upload;

pub use error::OpenError;
pub use publish::ObjectWhole;
pub use push::{Push, PushConfig, PushError, PushFailure, PushStatus, Pushing};
pub use sink::{ObjectConfig, ObjectSink, Settings};
pub use upload::ObjectUpload;
