//! The client's half: uploads, downloads, requests, and a server that one comes back to.

pub(crate) mod downloader;
pub(crate) mod fetch;
pub(crate) mod link;
pub(crate) mod progress;
pub(crate) mod queue;
pub(crate) mod remote;
pub(crate) mod uploader;
