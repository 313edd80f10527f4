//! What `--json` prints: one object a line, `result` last; of `put`, `get`, `demo` and `verify`, `start` first.

use serde::Serialize;

use crate::exit::{Explained, Kind};
use crate::output;

/// What became of one file. A field that is `None` is left out.
#[derive(Debug, Default, Serialize)]
pub(crate) struct FileLine<'a> {
    /// `ok` or `error`; from `put -n` and `sync -n` `planned` or `error`; of a file that somebody else works on
    /// `vanished` or, when it is tried again, `changed`; of what is neither file, directory nor link `left_out`; from `verify`:
    /// `same`, `differs`, `missing` or `error`.
    pub(crate) status: &'static str,
    /// The name it was given, or should have been.
    pub(crate) path: &'a str,
    /// Where it comes from.
    pub(crate) source: &'a str,
    /// `dir` or `link`, where it is no file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hash: Option<&'a str>,
    /// Bytes that had to be transferred.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sent: Option<u64>,
    /// Bytes that were there of an earlier attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) resumed: Option<u64>,
    /// Bytes that the receiving side copied from an older version or another file that it had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) copied: Option<u64>,
    /// Bytes of holes, which were told and not transferred.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) holes: Option<u64>,
    /// It changed while it was read, and what is stored may be none of its states.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) torn: Option<bool>,
    /// It was there already, with the same content.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) same: Option<bool>,
    /// `--if-exists skip` left another content, whose size and hash these are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) skipped: Option<bool>,
    /// How the server put it on disk: `file`, `batch` or `none`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sync: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) secs: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error_kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<&'a str>,
    /// What the command at the other end of a pipe exited with, where it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) command_exit: Option<i32>,
}

/// One of several paths to the server.
#[derive(Debug, Serialize)]
pub(crate) struct PathLine {
    /// The interface or local address, as `--via` names it.
    pub(crate) path: String,
    /// Bytes that have arrived over it.
    pub(crate) bytes: u64,
    /// Bytes a second: of late in `progress`, on average in `result`.
    pub(crate) rate: f64,
    /// Whether it has a connection now; in `progress`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) connected: Option<bool>,
}

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(crate) enum Line<'a> {
    /// What is about to happen.
    Start {
        /// The server, `HOST:PORT`.
        server: &'a str,
        /// Files and their bytes; null where a directory has yet to be walked.
        files: Option<usize>,
        bytes: Option<u64>,
    },
    /// How far it is: at most five a second.
    Progress {
        /// Bytes the receiving side has acknowledged.
        bytes: u64,
        /// Of all files found so far.
        total: u64,
        files_done: usize,
        files: usize,
        /// Bytes a second, of late.
        rate: f64,
        /// Each of several paths.
        #[serde(skip_serializing_if = "<[_]>::is_empty")]
        paths: &'a [PathLine],
    },
    /// A part of a file was there already and is not transferred again.
    Resumed {
        path: &'a str,
        source: &'a str,
        /// How much, proved to be equal.
        bytes: u64,
        /// Of the whole file; null where only its end tells.
        size: Option<u64>,
    },
    /// The connection is lost and tried again.
    Reconnecting {
        /// Counted from 1 since something moved last.
        attempt: u32,
        /// Seconds until then.
        delay: f64,
        reason: &'a str,
    },
    /// It is back.
    Connected {},
    /// One of several paths is lost and tried again.
    #[serde(rename = "path_lost")]
    PathLost {
        path: &'a str,
        /// Seconds until then.
        delay: f64,
        reason: &'a str,
    },
    /// One of several paths is there, for the first time or again.
    #[serde(rename = "path_connected")]
    PathConnected { path: &'a str },
    /// The connection runs over this transport, as `--transport` calls it. Told when it changes, and of the first connection if
    /// that is not QUIC.
    Transport {
        transport: &'static str,
        reason: &'a str,
    },
    /// What became of one file.
    File(FileLine<'a>),
    /// Something that the source of a mirror does not have was deleted.
    #[serde(rename = "delete")]
    Deleted {
        /// `ok`, or `planned` in a dry run.
        status: &'static str,
        path: &'a str,
        /// `dir` or `link`, where it is no file.
        #[serde(skip_serializing_if = "Option::is_none")]
        kind: Option<&'static str>,
    },
    /// A file or directory has another modification time than it should have: the file system there cannot hold that.
    #[serde(rename = "time")]
    OtherTime {
        path: &'a str,
        asked: &'a str,
        got: &'a str,
    },
    /// A file or directory lacks extended attributes that were to be copied.
    Xattrs {
        path: &'a str,
        /// How many were not stored; absent where the server does not give them.
        #[serde(skip_serializing_if = "Option::is_none")]
        lost: Option<u32>,
    },
    /// Parts of files that are kept to be resumed, of this run and of others.
    Kept {
        dir: &'a str,
        files: usize,
        bytes: u64,
    },
    /// How all of it ended; exactly one.
    Result(ResultLine<'a>),
}

/// What became of all files together. A field that is `None` is left out.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ResultLine<'a> {
    #[serde(flatten)]
    pub(crate) ended: Ended<'a>,
    /// Files that arrived.
    pub(crate) files: usize,
    pub(crate) failed: usize,
    /// Of those that failed, files that changed each time they were read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) changed: Option<usize>,
    /// Files that changed while they were read, and were stored as they were read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) torn: Option<usize>,
    /// Files, directories and links that are written under other names than they have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mapped: Option<usize>,
    /// Files that were gone by the time they were read, failures or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vanished: Option<usize>,
    /// What was left out because it is neither file, directory nor link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) left_out: Option<usize>,
    /// Entries that a mirror found to be the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unchanged: Option<usize>,
    /// Entries that a mirror deleted, or would.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) deleted: Option<usize>,
    /// Bytes of those files.
    pub(crate) bytes: u64,
    /// Bytes that had to be transferred.
    pub(crate) sent: u64,
    /// Bytes that an earlier attempt had brought.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) resumed: u64,
    /// Bytes that the receiving side copied from what it had.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) copied: u64,
    /// Bytes of holes, which were told and not transferred.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) holes: u64,
    /// Bytes of files that were there already.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) same: u64,
    /// How often the connection was lost and came back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reconnects: Option<usize>,
    pub(crate) secs: f64,
    /// Bytes a second, on average.
    pub(crate) rate: f64,
    /// Each of several paths.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub(crate) paths: &'a [PathLine],
}

/// How a run ended: in each line `result`.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Ended<'a> {
    /// `ok`, `error`, `partial` or `interrupted`.
    status: &'static str,
    /// The exit code.
    exit: u8,
    error_kind: Option<&'static str>,
    error: Option<&'a str>,
    hint: Option<&'a str>,
}

impl<'a> Ended<'a> {
    /// The end with this error, or without one.
    pub(crate) fn with(error: Option<&'a Explained>) -> Self {
        let Some(error) = error else {
            return Self {
                status: "ok",
                ..Self::default()
            };
        };
        Self {
            status: match error.kind {
                Kind::Partial => "partial",
                Kind::Interrupted => "interrupted",
                _ => "error",
            },
            exit: error.kind.code(),
            error_kind: Some(error.kind.name()),
            error: Some(&error.text),
            hint: error.hint.as_deref(),
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[derive(Serialize)]
struct Concluded<'a> {
    event: &'static str,
    #[serde(flatten)]
    ended: Ended<'a>,
    count: usize,
}

/// Ends a command that prints entries and no files: with `--json`, the one `result` line, whatever became of it.
pub(crate) fn concluded(
    json: bool,
    count: usize,
    result: anyhow::Result<()>,
) -> anyhow::Result<()> {
    if json {
        let error = result.as_ref().err().map(Explained::of);
        output::unless_gone(output::json(&Concluded {
            event: "result",
            ended: Ended::with(error.as_ref()),
            count,
        }))?;
    }
    result
}

/// With `--json`, what failed of several.
pub(crate) fn failed(json: bool, path: &str, error: &Explained) -> anyhow::Result<()> {
    if !json {
        return Ok(());
    }
    output::unless_gone(output::json(&serde_json::json!({
        "event": "error",
        "path": path,
        "error_kind": error.kind.name(),
        "error": error.text,
    })))
}
