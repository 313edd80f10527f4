//! What a udpack server gives over HTTP, on a TCP port of its own: the pages for browsers, where these find the server over
//! UDP, whether it is well, and its counters.
//!
//! There is nothing else here: no file and no message travels by HTTP. A request has no body, and each answer is either a file
//! inside the program or a few lines about the server.
#![warn(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(feature = "pages")]
mod assets;
mod listener;
#[cfg(feature = "pages")]
mod pages;
mod rate;
mod site;

pub use listener::HttpListener;
#[cfg(feature = "pages")]
pub use pages::Pages;
pub use site::Site;
