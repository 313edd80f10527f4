//! What `put` and `demo` print with `--json`: one object a line, `start` first and `result` last.

use serde::Serialize;

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(crate) enum Line<'a> {
    /// What is about to happen.
    Start {
        /// The server, `HOST:PORT`.
        server: &'a str,
        files: usize,
        bytes: u64,
    },
    /// How far it is: at most five a second.
    Progress {
        /// Bytes the server has acknowledged.
        bytes: u64,
        total: u64,
        files_done: usize,
        files: usize,
        /// Bytes a second, of late.
        rate: f64,
    },
    /// What became of one file.
    File {
        /// `ok` or `error`.
        status: &'static str,
        /// The name at the server.
        path: &'a str,
        /// The local path.
        source: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        hash: Option<&'a str>,
        /// Bytes that had to be sent.
        #[serde(skip_serializing_if = "Option::is_none")]
        sent: Option<u64>,
        /// The server had it already.
        #[serde(skip_serializing_if = "Option::is_none")]
        same: Option<bool>,
        #[serde(skip_serializing_if = "Option::is_none")]
        secs: Option<f64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error_kind: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a str>,
    },
    /// How all of it ended; exactly one.
    Result {
        /// `ok`, `error`, `partial` or `interrupted`.
        status: &'static str,
        /// The exit code.
        exit: u8,
        /// Files at the server.
        files: usize,
        failed: usize,
        /// Bytes of those files.
        bytes: u64,
        /// Bytes that had to be sent.
        sent: u64,
        secs: f64,
        /// Bytes a second, on average.
        rate: f64,
        error_kind: Option<&'static str>,
        error: Option<&'a str>,
        hint: Option<&'a str>,
    },
}
