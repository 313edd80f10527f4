//! What a udpack server gives over HTTP, on a TCP port: the pages for browsers, where these find the server over
//! UDP, whether it is well, its counters, and WebSockets for clients that cannot reach it over UDP.
//!
//! No file and no message travels by HTTP itself. A request has no body, and each answer is a file inside the program, a
//! few lines about the server, or the beginning of a WebSocket, which this crate hands to the server.
#![warn(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(feature = "pages")]
mod assets;
mod listener;
#[cfg(feature = "pages")]
mod pages;
mod rate;
mod site;
mod sockets;

pub use listener::HttpListener;
#[cfg(feature = "pages")]
pub use pages::Pages;
pub use site::Site;
