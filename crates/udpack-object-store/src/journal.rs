//! The journal of an upload of several parts: which of them the object store has.
//!
//! One file for each upload, of lines `CHECK JSON\n`, where `CHECK` is the first 16 hexadecimal digits of BLAKE3 of the
//! rest. The first line says what is uploaded and is synced before the store is asked for an upload, so that one whose id
//! was lost in a crash is known to be there. The second has that id. Each further line is a part that the store has
//! acknowledged. A line that is torn, garbled or unknown ends the reading; what was read before it counts.
//!
//! Everything here blocks. Whether somebody else writes the same journal is the caller's matter.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use udpack_transfer::RelPath;

/// What names the journal of a peer's upload to a path: 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key(String);

impl Key {
    pub(crate) fn new(peer: &str, path: &RelPath) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(peer.as_bytes());
        hasher.update(&[0]);
        hasher.update(path.as_str().as_bytes());
        Self(hasher.finalize().to_hex().chars().take(32).collect())
    }

    /// A name that no other upload has, for one that is not taken up again.
    pub(crate) fn unique() -> io::Result<Self> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(hex(&bytes)))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn file(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}{LIVE}", self.0))
    }

    fn gone(nonce: &str, dir: &Path) -> PathBuf {
        dir.join(format!("{nonce}{GONE}"))
    }
}

/// What a journal begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    /// Names this upload and no other one: also in the metadata of its object.
    pub(crate) nonce: String,
    /// The key of the object that the parts become.
    pub(crate) object: String,
    /// The name that the file gets.
    pub(crate) name: String,
    /// The size that was declared.
    pub(crate) size: Option<u64>,
    /// Bytes of each part but the last.
    pub(crate) part: u64,
    /// It may be taken up again.
    pub(crate) resumable: bool,
}

/// A part that the store has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) len: u64,
    /// What the store calls it.
    pub(crate) tag: String,
    /// BLAKE3 of its bytes alone.
    #[serde(with = "hexadecimal")]
    pub(crate) hash: blake3::Hash,
    /// The chaining value of its bytes at their place in the file.
    #[serde(with = "hexadecimal")]
    pub(crate) node: blake3::Hash,
}

/// A hash as text.
mod hexadecimal {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(hash: &blake3::Hash, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&hash.to_hex())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<blake3::Hash, D::Error> {
        let text = String::deserialize(from)?;
        blake3::Hash::from_hex(text).map_err(D::Error::custom)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Upload(Head),
    Began { id: String },
    Part { at: u32, part: Part },
}

/// What could be read of a journal.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) head: Head,
    pub(crate) id: Option<String>,
    pub(crate) parts: BTreeMap<u32, Part>,
}

/// A journal that is open for more lines.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    path: PathBuf,
    nonce: String,
}

impl Journal {
    /// Begins one in place of any that is there.
    pub(crate) fn begin(dir: &Path, key: &Key, head: &Head) -> io::Result<Self> {
        let path = key.file(dir);
        let file = File::create(&path)?;
        let mut journal = Self {
            file,
            path,
            nonce: head.nonce.clone(),
        };
        journal.add(&Line::Upload(head.clone()))?;
        File::open(dir)?.sync_all()?;
        Ok(journal)
    }

    /// Takes up one that is there, without what cannot be read of it; `None` where there is none, or nothing of use.
    pub(crate) fn resume(dir: &Path, key: &Key) -> io::Result<Option<(Self, Record)>> {
        let path = key.file(dir);
        let mut file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let Some((record, valid)) = read(&mut file)? else {
            return Ok(None);
        };
        file.set_len(valid)?;
        file.seek(io::SeekFrom::End(0))?;
        let nonce = record.head.nonce.clone();
        Ok(Some((Self { file, path, nonce }, record)))
    }

    /// Notes the store's id of the upload.
    pub(crate) fn began(&mut self, id: &str) -> io::Result<()> {
        self.add(&Line::Began { id: id.to_owned() })
    }

    /// Notes a part that the store has.
    pub(crate) fn part(&mut self, at: u32, part: &Part) -> io::Result<()> {
        self.add(&Line::Part {
            at,
            part: part.clone(),
        })
    }

    /// Adds a line, on disk when it returns.
    fn add(&mut self, line: &Line) -> io::Result<()> {
        let body = serde_json::to_string(line)?;
        let line = format!("{} {body}\n", check(&body));
        self.file.write_all(line.as_bytes())?;
        self.file.sync_data()
    }

    /// Marks the upload as one to be ended. Its journal is found by [`gone`] until it is removed.
    pub(crate) fn doom(self, dir: &Path) -> io::Result<PathBuf> {
        let gone = Key::gone(&self.nonce, dir);
        std::fs::rename(&self.path, &gone)?;
        File::open(dir)?.sync_all()?;
        Ok(gone)
    }
}

/// What is left of an upload that was to be ended.
pub(crate) fn gone(path: &Path) -> io::Result<Option<Record>> {
    Ok(read(&mut File::open(path)?)?.map(|(record, _)| record))
}

/// A journal in the directory of them.
#[derive(Debug)]
pub(crate) enum Found {
    /// Of an upload that can be taken up, or could before it grew old.
    Kept { key: Key, age: Duration },
    /// Of one that is to be ended.
    Gone(PathBuf),
}

/// All that is in the directory.
pub(crate) fn all(dir: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            continue;
        };
        if name.ends_with(GONE) {
            found.push(Found::Gone(entry.path()));
        } else if let Some(key) = name.strip_suffix(LIVE) {
            let modified = entry.metadata()?.modified()?;
            let age = SystemTime::now()
                .duration_since(modified)
                .unwrap_or_default();
            let key = Key(key.to_owned());
            found.push(Found::Kept { key, age });
        }
    }
    Ok(found)
}

/// Reads as far as it can be understood, and how many bytes that is.
fn read(file: &mut File) -> io::Result<Option<(Record, u64)>> {
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text)?;
    let mut record: Option<Record> = None;
    let mut valid = 0;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let Some(parsed) = parse(line) else {
            break;
        };
        match (&mut record, parsed) {
            (None, Line::Upload(head)) => {
                record = Some(Record {
                    head,
                    id: None,
                    parts: BTreeMap::new(),
                });
            }
            (Some(record), Line::Began { id }) if record.id.is_none() => record.id = Some(id),
            (Some(record), Line::Part { at, part }) if record.id.is_some() => {
                record.parts.insert(at, part);
            }
            _ => break,
        }
        valid += line.len() as u64;
    }
    Ok(record.map(|record| (record, valid)))
}

fn parse(line: &[u8]) -> Option<Line> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (sum, body) = line.split_once(' ')?;
    (sum == check(body)).then(|| serde_json::from_str(body).ok())?
}

fn check(body: &str) -> String {
    let hash = blake3::hash(body.as_bytes()).to_hex();
    hash.chars().take(CHECK).collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const LIVE: &str = ".journal";
const GONE: &str = ".gone";
/// Digits of a line's check.
const CHECK: usize = 16;
/// Most bytes that are read of a journal: 10,000 parts whose tags have 1 KiB, and their hashes.
const LONGEST: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            nonce: "n".into(),
            object: "p/a".into(),
            name: "a".into(),
            size: None,
            part: 8,
            resumable: true,
        }
    }

    fn part(tag: &str) -> Part {
        let hash = blake3::hash(tag.as_bytes());
        Part {
            len: 8,
            tag: tag.into(),
            hash,
            node: hash,
        }
    }

    #[test]
    fn a_torn_or_garbled_line_ends_the_reading_and_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::new("peer", &"a".parse().unwrap());
        let mut journal = Journal::begin(dir.path(), &key, &head()).unwrap();
        journal.began("id").unwrap();
        journal.part(0, &part("x")).unwrap();
        journal.part(1, &part("y")).unwrap();
        let whole = std::fs::read(key.file(dir.path())).unwrap();
        let second = whole.len()
            - whole
                .split_inclusive(|b| *b == b'\n')
                .next_back()
                .unwrap()
                .len();
        for cut in second..whole.len() {
            let mut torn = whole[..cut].to_vec();
            if cut > second + 20 {
                torn[second + 18] ^= 1;
                torn.push(b'\n');
            }
            std::fs::write(key.file(dir.path()), &torn).unwrap();
            let (mut journal, record) = Journal::resume(dir.path(), &key).unwrap().unwrap();
            assert_eq!(record.id.as_deref(), Some("id"));
            assert_eq!(record.parts, BTreeMap::from([(0, part("x"))]), "{cut}");
            journal.part(2, &part("z")).unwrap();
            let (_, record) = Journal::resume(dir.path(), &key).unwrap().unwrap();
            let parts = BTreeMap::from([(0, part("x")), (2, part("z"))]);
            assert_eq!(record.parts, parts, "{cut}");
        }
    }

    #[test]
    fn a_journal_without_a_head_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::new("peer", &"a".parse().unwrap());
        for text in ["", "garbage\n", "0123456789abcdef {}\n"] {
            std::fs::write(key.file(dir.path()), text).unwrap();
            assert!(Journal::resume(dir.path(), &key).unwrap().is_none());
        }
    }
}
