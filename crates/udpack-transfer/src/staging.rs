//! Receiving files, in both directions: the steps from the first byte to the published file.
//!
//! The server receives uploads and the client receives downloads through the same [`Staging`](publisher::Staging). A
//! file [begins](file::Incoming::begin), takes chunks, and [finishes](file::Incoming::finish); its
//! [`Recipient`](file::Recipient) is told which bytes exist already, which were written, and the outcome.

pub(crate) mod file;
mod pool;
pub(crate) mod publisher;
pub(crate) mod target;
