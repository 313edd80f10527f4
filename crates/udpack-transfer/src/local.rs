//! What is read and limited here, by both halves: sources of bytes, local trees, rates, errors.

pub(crate) mod base;
pub(crate) mod error;
pub(crate) mod limiter;
pub(crate) mod source;
pub(crate) mod spool;
pub(crate) mod walk;
