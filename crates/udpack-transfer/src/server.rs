//! The server's half: lanes, the disk work of files, requests, jobs, hooks.

pub(crate) mod control;
pub(crate) mod hook;
pub(crate) mod jobs;
pub(crate) mod outgoing;
pub(crate) mod places;
pub(crate) mod queries;
pub(crate) mod receiver;
pub(crate) mod scope;
pub(crate) mod serving;
pub(crate) mod sharing;
pub(crate) mod upload;
pub(crate) mod writers;
