//! Standard output: results, line by line, and nothing else.
//!
//! A reader that went away (`| head`) is no failure of ours and never a panic.

use std::io::{self, Write};

use serde::Serialize;

/// Writes one line and flushes it, so that a reader sees each result when it is there.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Writes whole lines and flushes them.
pub(crate) fn all(lines: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(lines)?;
    out.flush()
}

/// Adds one JSON value on one line.
pub(crate) fn add_json<T: Serialize + ?Sized>(lines: &mut Vec<u8>, value: &T) -> io::Result<()> {
    let whole = lines.len();
    let written = serde_json::to_writer(&mut *lines, value);
    if written.is_err() {
        lines.truncate(whole);
    }
    written?;
    lines.push(b'\n');
    Ok(())
}

/// Writes one JSON value on one line.
pub(crate) fn json<T: Serialize + ?Sized>(value: &T) -> io::Result<()> {
    line(&serde_json::to_string(value)?)
}

/// Whether the reader of standard output is gone.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

/// Takes a closed standard output for a success: nobody wants the rest.
pub(crate) fn unless_gone(written: io::Result<()>) -> anyhow::Result<()> {
    use anyhow::Context as _;
    match written {
        Err(error) if is_gone(&error) => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// Text that may come from a peer or be a file's name, on one line and with nothing that changes a terminal.
pub(crate) fn printable(text: &str) -> String {
    udpack::text::printable(text).into_owned()
}
