//! Receiving files, of either direction: what a file's bytes go through until it has its name.
//!
//! The server receives uploads and the client receives downloads through the same [`Staging`](publisher::Staging). A file
//! [begins](file::Incoming::begin), takes chunks, and [finishes](file::Incoming::finish); its [`Recipient`](file::Recipient)
//! is told what is there already, what was written, and what became of it.

pub(crate) mod file;
mod pool;
pub(crate) mod publisher;
pub(crate) mod target;
