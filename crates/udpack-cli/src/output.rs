//! Standard output: results, line by line, and nothing else.
//!
//! A closed standard output (`| head`) is neither a failure nor a panic.

use std::io::{self, Write};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::Formatter;
use udpack::text::is_printable;
use udpack_transfer::names;

/// Writes one line and flushes it, so that a reader sees each result at once. Control characters are escaped, so that
/// it stays one line and cannot control a terminal.
pub(crate) fn line(text: &str) -> io::Result<()> {
    all(format!("{}\n", udpack::text::printable(text)).as_bytes())
}

/// So many of something, in words.
pub(crate) fn counted(count: u64, one: &str, more: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { more })
}

/// Writes whole lines as they are, and flushes them.
pub(crate) fn all(lines: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(lines)?;
    out.flush()
}

/// Adds one JSON value on one line.
pub(crate) fn add_json<T: Serialize + ?Sized>(lines: &mut Vec<u8>, value: &T) -> io::Result<()> {
    // Usually no name needs more than the value's own text.
    if names::holds_bytes(&serde_json::to_string(value)?) {
        let mut value = serde_json::to_value(value)?;
        spell_out(&mut value);
        add_printable(lines, &value)?;
    } else {
        add_printable(lines, value)?;
    }
    lines.push(b'\n');
    Ok(())
}

fn add_printable<T: Serialize + ?Sized>(lines: &mut Vec<u8>, value: &T) -> io::Result<()> {
    let whole = lines.len();
    let mut json = serde_json::Serializer::with_formatter(&mut *lines, Printable);
    let written = value.serialize(&mut json);
    if written.is_err() {
        lines.truncate(whole);
    }
    Ok(written?)
}

/// Shows each name that is not UTF-8 with `\xff` for each such byte, and adds a field with the suffix `_hex` that
/// holds its bytes.
fn spell_out(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let mut hex = Vec::new();
            for (key, value) in fields.iter_mut() {
                if let Value::String(name) = value
                    && names::holds_bytes(name)
                {
                    let bytes = names::bytes(name);
                    let digits = bytes.iter().map(|byte| format!("{byte:02x}"));
                    hex.push((format!("{key}_hex"), Value::String(digits.collect())));
                }
                spell_out(value);
            }
            fields.extend(hex);
        }
        Value::Array(values) => values.iter_mut().for_each(spell_out),
        Value::String(name) if names::holds_bytes(name) => *name = printable(name),
        _ => {}
    }
}

/// Writes one JSON value on one line.
pub(crate) fn json<T: Serialize + ?Sized>(value: &T) -> io::Result<()> {
    let mut lines = Vec::new();
    add_json(&mut lines, value)?;
    all(&lines)
}

/// JSON whose text is escaped as [`line()`] escapes it, by `\u` so that it means the same to a program.
struct Printable;

impl Formatter for Printable {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(|c| !is_printable(c)) {
            let (plain, behind) = rest.split_at(at);
            out.write_all(plain.as_bytes())?;
            let mut chars = behind.chars();
            if let Some(c) = chars.next() {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}")?;
                }
            }
            rest = chars.as_str();
        }
        out.write_all(rest.as_bytes())
    }
}

/// Whether the reader of standard output has closed it.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

/// Whether there is a reader for more: none, and no failure, once standard output is closed.
pub(crate) fn goes_on(written: io::Result<()>) -> anyhow::Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}

/// Treats a closed standard output as success.
pub(crate) fn unless_gone(written: io::Result<()>) -> anyhow::Result<()> {
    goes_on(written).map(drop)
}

/// Escapes text of a peer or a file's name: one line without control characters.
pub(crate) fn printable(text: &str) -> String {
    names::shown(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_shows_no_character_that_acts_on_a_terminal_and_means_the_same() {
        let text = "a\u{7f}\u{9b}31m\u{202e}b\u{1b}\n\"\u{e0001}é";
        let mut out = Vec::new();
        add_json(&mut out, &serde_json::json!({ text: [text] })).expect("written");
        let shown = String::from_utf8(out).expect("text");
        let line = shown.strip_suffix('\n').expect("a line");
        assert!(line.chars().all(is_printable), "{line}");
        assert!(
            line.contains(r#"a\u007f\u009b31m\u202eb\u001b\n\"\udb40\udc01é"#),
            "{line}"
        );
        let back: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(back[text][0], text);
    }
}
