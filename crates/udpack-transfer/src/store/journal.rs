//! The journal of a resumable upload: which of its bytes are on disk.
//!
//! Lines of text, `CHECK body\n`, where `CHECK` is the first 16 hexadecimal digits of BLAKE3 of the body:
//!
//! ```text
//! upload 1 CREATED SIZE OWNER PATH      first; again when the size changes; SIZE is `-` when it is not known
//! safe OFF LEN                          these bytes of the staging file are on disk
//! ```
//!
//! A line that is torn, garbled or unknown ends the reading; what was read before it counts. The journal only says
//! *where* durable bytes are. Their content is read from the staging file, so a wrong journal can cost time but never
//! cause a wrong byte.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::Arc;

use crate::base::names;
use crate::base::path::RelPath;

/// Longest journal that is read; it is rewritten long before.
const READ_LIMIT: u64 = 1 << 20;
/// Length from which on a journal is rewritten with the fewest possible lines.
pub(super) const REWRITE_FROM: u64 = 64 << 10;
/// Longest line: a path whose every byte is escaped, an owner, and some numbers.
const LINE_LIMIT: usize = 24 << 10;
/// Digits of a line's check.
const CHECK: usize = 16;

/// The name of an upload's files in the store's own directory: 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key(Arc<str>);

impl Key {
    /// The key of this owner's upload to this path.
    pub(super) fn new(owner: &str, path: &RelPath) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(owner.as_bytes());
        hasher.update(&[0]);
        hasher.update(&path.to_bytes());
        let hex = hasher.finalize().to_hex();
        Self(hex.get(..super::disk::NAME_LEN).unwrap_or_default().into())
    }

    /// The key in a name of the form key and `suffix`.
    pub(super) fn from_name(name: &str, suffix: &str) -> Option<Self> {
        super::disk::is_own(name, "", suffix)
            .then(|| name.strip_suffix(suffix).map(|key| Self(key.into())))
            .flatten()
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The first line of a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// When the upload was begun, in seconds since 1970.
    pub(super) created: u64,
    pub(super) size: Option<u64>,
    pub(super) owner: String,
    pub(super) path: String,
}

impl Head {
    fn body(&self) -> String {
        let size = self
            .size
            .map_or_else(|| "-".to_owned(), |size| size.to_string());
        let (owner, path) = (
            escape(self.owner.as_bytes()),
            escape(&names::bytes(&self.path)),
        );
        format!("upload 1 {} {size} {owner} {path}", self.created)
    }
}

/// The readable content of a journal.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) head: Head,
    /// Start and end of the durable ranges: in order, not touching, none empty.
    pub(super) ranges: Vec<(u64, u64)>,
    /// Bytes of the journal up to the end of the last good line.
    pub(super) valid: u64,
}

/// A journal that is open for appending. The caller ensures that there is one writer.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    len: u64,
}

impl Journal {
    /// Starts an empty journal in this file, which is truncated.
    pub(super) fn fresh(file: File) -> io::Result<Self> {
        if file.metadata()?.len() > 0 {
            file.set_len(0)?;
        }
        Ok(Self { file, len: 0 })
    }

    /// Continues a journal that was [`read`], without its unreadable rest.
    pub(super) fn resume(file: File, record: &Record) -> io::Result<Self> {
        if file.metadata()?.len() != record.valid {
            file.set_len(record.valid)?;
        }
        Ok(Self {
            file,
            len: record.valid,
        })
    }

    /// Its length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether it still has a name.
    pub(super) fn is_linked(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.nlink() > 0)
    }

    /// Adds lines with one write; on disk only after [`sync`](Self::sync).
    pub(super) fn append(&mut self, head: Option<&Head>, ranges: &[(u64, u64)]) -> io::Result<()> {
        let mut text = String::new();
        if let Some(head) = head {
            push(&mut text, &head.body());
        }
        for (start, end) in ranges {
            push(
                &mut text,
                &format!("safe {start} {}", end.saturating_sub(*start)),
            );
        }
        self.file.write_all_at(text.as_bytes(), self.len)?;
        self.len += text.len() as u64;
        Ok(())
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Reads a journal as far as it can be understood; `None` when its first line cannot.
pub(super) fn read(file: &File) -> io::Result<Option<Record>> {
    let len = file.metadata()?.len().min(READ_LIMIT);
    let mut text = vec![0; usize::try_from(len).unwrap_or(0)];
    let mut filled = 0;
    while let Some(rest) = text.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    text.truncate(filled);
    Ok(parse(&text))
}

fn parse(text: &[u8]) -> Option<Record> {
    let mut record: Option<Record> = None;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let Some(body) = checked(line) else { break };
        let mut words = body.split(' ');
        match (words.next(), &mut record) {
            (Some("upload"), _) => {
                let Some(head) = head(&mut words) else { break };
                match &mut record {
                    None => {
                        record = Some(Record {
                            head,
                            ranges: Vec::new(),
                            valid: 0,
                        });
                    }
                    Some(record) => record.head = head,
                }
            }
            (Some("safe"), Some(record)) => {
                let (Some(Ok(off)), Some(Ok(len)), None) = (
                    words.next().map(str::parse::<u64>),
                    words.next().map(str::parse::<u64>),
                    words.next(),
                ) else {
                    break;
                };
                let Some(end) = off.checked_add(len) else {
                    break;
                };
                record.ranges.push((off, end));
            }
            _ => break,
        }
        if let Some(record) = &mut record {
            record.valid += line.len() as u64;
        }
    }
    if let Some(record) = &mut record {
        record.ranges = merged(std::mem::take(&mut record.ranges));
    }
    record
}

/// The body of a whole line whose check is right.
fn checked(line: &[u8]) -> Option<&str> {
    let line = line.strip_suffix(b"\n")?;
    if line.len() > LINE_LIMIT {
        return None;
    }
    let (check, body) = std::str::from_utf8(line).ok()?.split_at_checked(CHECK)?;
    let body = body.strip_prefix(' ')?;
    (blake3::hash(body.as_bytes()).to_hex().get(..CHECK)? == check).then_some(body)
}

fn head<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Head> {
    if words.next()? != "1" {
        return None;
    }
    let created = words.next()?.parse().ok()?;
    let size = match words.next()? {
        "-" => None,
        size => Some(size.parse().ok()?),
    };
    let owner = String::from_utf8(unescape(words.next()?)?).ok()?;
    let path = names::from_bytes(&unescape(words.next()?)?).into_owned();
    words.next().is_none().then_some(Head {
        created,
        size,
        owner,
        path,
    })
}

fn push(text: &mut String, body: &str) {
    let check = blake3::hash(body.as_bytes()).to_hex();
    text.push_str(check.get(..CHECK).unwrap_or_default());
    text.push(' ');
    text.push_str(body);
    text.push('\n');
}

/// The same ranges in order, with touching ones merged and empty ones removed.
pub(super) fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.retain(|(start, end)| start < end);
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

/// `%` and two digits for what is not printable ASCII, and for `%` itself.
fn escape(text: &[u8]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for &byte in text {
        match byte {
            b'!'..=b'~' if byte != b'%' => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("%{byte:02x}")),
        }
    }
    escaped
}

fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('%') {
        bytes.extend_from_slice(before.as_bytes());
        let (digits, after) = after.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = after;
    }
    bytes.extend_from_slice(rest.as_bytes());
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> (Head, Journal) {
        let head = Head {
            created: 1_700_000_000,
            size: Some(1000),
            owner: "a b\n%".to_owned(),
            path: "häus/b c%20d\u{10ffe9}".to_owned(),
        };
        let mut journal = Journal::fresh(tempfile::tempfile().unwrap()).unwrap();
        journal
            .append(Some(&head), &[(0, 100), (200, 300)])
            .unwrap();
        journal.append(None, &[(100, 150), (150, 150)]).unwrap();
        (head, journal)
    }

    fn text(journal: &Journal) -> Vec<u8> {
        let mut text = vec![0; usize::try_from(journal.len()).unwrap()];
        journal.file.read_exact_at(&mut text, 0).unwrap();
        text
    }

    #[test]
    fn reads_what_was_written() {
        let (head, journal) = sample();
        let record = read(&journal.file).unwrap().unwrap();
        assert_eq!(record.head, head);
        assert_eq!(record.ranges, [(0, 150), (200, 300)]);
        assert_eq!(record.valid, journal.len());
        let text = String::from_utf8(text(&journal)).unwrap();
        let body = " upload 1 1700000000 1000 a%20b%0a%25 h%c3%a4us/b%20c%2520d%e9";
        assert!(text.lines().next().unwrap().ends_with(body), "{text}");
    }

    #[test]
    fn a_torn_or_garbled_line_ends_the_reading() {
        let (_, journal) = sample();
        let whole = text(&journal);
        let lines: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] == b'\n').collect();
        for cut in 0..=whole.len() {
            let complete = lines.iter().filter(|end| **end < cut).count();
            let valid = lines[..complete].last().map_or(0, |end| end + 1);
            match parse(&whole[..cut]) {
                None => assert_eq!(complete, 0),
                Some(record) => assert_eq!(record.valid, valid as u64),
            }
            if cut < whole.len() {
                let mut garbled = whole.clone();
                garbled[cut] ^= 1;
                let read = parse(&garbled).map_or(0, |record| record.valid);
                assert!(read as usize <= cut, "{cut}");
            }
        }
    }

    #[test]
    fn an_unknown_version_or_word_is_not_guessed_at() {
        let mut text = String::new();
        push(&mut text, "upload 2 0 - a b");
        push(&mut text, "safe 0 10");
        assert_eq!(parse(text.as_bytes()), None);
        let mut text = String::new();
        for body in ["upload 1 0 - a b", "safe 0 10", "torn 0 10", "safe 10 10"] {
            push(&mut text, body);
        }
        assert_eq!(parse(text.as_bytes()).unwrap().ranges, [(0, 10)]);
        let too_far = format!("safe 1 {}", u64::MAX);
        for body in ["safe 1", "safe 1 x", "safe 1 2 3", "safe -1 5", &too_far] {
            let mut text = String::new();
            push(&mut text, "upload 1 0 - a b");
            push(&mut text, body);
            assert_eq!(parse(text.as_bytes()).unwrap().ranges, [], "{body}");
        }
    }

    proptest! {
        #[test]
        fn escapes_come_back(text in prop::collection::vec(any::<u8>(), 0..40)) {
            let escaped = escape(&text);
            prop_assert!(escaped.bytes().all(|b| b.is_ascii_graphic()));
            prop_assert_eq!(unescape(&escaped), Some(text));
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
            let _ = unescape(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn merging_keeps_the_bytes(ranges in prop::collection::vec((0u64..64, 0u64..64), 0..12)) {
            let has = |ranges: &[(u64, u64)], at| ranges.iter().any(|(s, e)| *s <= at && at < *e);
            let joined = merged(ranges.clone());
            prop_assert!((0..64).all(|at| has(&ranges, at) == has(&joined, at)));
            prop_assert!(joined.is_sorted_by(|a, b| a.1 < b.0));
        }
    }
}
