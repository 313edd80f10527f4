//! Receiving files, of either direction: what a file's bytes go through until it has its name.

pub(crate) mod target;
