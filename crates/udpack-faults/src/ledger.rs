//! What was meant for each name, what was promised, and whether the directory agrees: the one judge of all loops.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use crate::rng::Rng;

/// A file to send.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) size: u64,
    pub(crate) hash: blake3::Hash,
}

/// Makes a file of each size; their bytes depend on the seed.
pub(crate) fn make_sources(
    dir: &Path,
    sizes: &[u64],
    rng: &mut Rng,
) -> anyhow::Result<Vec<Source>> {
    fs::create_dir_all(dir)?;
    let mut sources = Vec::with_capacity(sizes.len());
    for (number, &size) in sizes.iter().enumerate() {
        let path = dir.join(format!("source-{number}"));
        let mut file = File::create(&path)?;
        write_noise(&mut file, size, rng)
            .with_context(|| format!("cannot write {}", path.display()))?;
        let hash = hash(&path)?;
        sources.push(Source { path, size, hash });
    }
    Ok(sources)
}

/// Makes so many files with holes between a few stretches of data, and one that is nothing but a hole; their places and
/// bytes depend on the seed.
pub(crate) fn make_sparse(dir: &Path, count: u64, rng: &mut Rng) -> anyhow::Result<Vec<Source>> {
    const BLOCK: u64 = 4096;
    fs::create_dir_all(dir)?;
    let mut sources = Vec::new();
    for number in 0..=count {
        let path = dir.join(format!("sparse-{number}"));
        let size = rng.range(256, 4096) * BLOCK + rng.range(0, 1) * rng.range(1, BLOCK - 1);
        let mut file = File::create(&path)?;
        file.set_len(size)?;
        let stretches = if number == 0 { 0 } else { rng.range(1, 4) };
        for _ in 0..stretches {
            let at = rng.range(0, size / BLOCK - 1) * BLOCK;
            let len = rng.range(1, (size - at).min(80 * BLOCK));
            file.seek(SeekFrom::Start(at))?;
            write_noise(&mut file, len, rng)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        let hash = hash(&path)?;
        sources.push(Source { path, size, hash });
    }
    Ok(sources)
}

fn write_noise(file: &mut File, len: u64, rng: &mut Rng) -> io::Result<()> {
    let mut stream = blake3::Hasher::new();
    stream.update(&rng.next().to_le_bytes());
    io::copy(&mut stream.finalize_xof().take(len), file).map(|_| ())
}

/// What went wrong, counted. Each is told when it is found.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Files reported as stored.
    pub(crate) acked: u64,
    /// Visible, and not what was sent.
    pub(crate) corrupt: u64,
    /// Reported as stored, and not there.
    pub(crate) lost: u64,
    /// Visible, and only the beginning of what was sent.
    pub(crate) partial: u64,
    /// Anything else: a command that does not finish, a panic, a leak.
    pub(crate) other: u64,
}

impl Tally {
    /// All that must be zero.
    pub(crate) fn bad(&self) -> u64 {
        self.corrupt + self.lost + self.partial + self.other
    }

    /// The last lines of a loop: how long it took, and what came of it.
    pub(crate) fn print(&self, cycles: u64, took: Duration) {
        println!(
            "{:.3} s a cycle, {} wrong in other ways",
            took.as_secs_f64() / cycles.max(1) as f64,
            self.other
        );
        println!(
            "cycles {cycles} / acked {} / corrupt {} / lost {} / visible-partial {}",
            self.acked, self.corrupt, self.lost, self.partial
        );
    }

    /// Counts and tells what none of the names fits.
    pub(crate) fn wrong(&mut self, what: &str) {
        self.other += 1;
        println!("WRONG: {what}");
    }
}

/// Names and what is known of them.
#[derive(Debug)]
pub(crate) struct Ledger {
    pub(crate) sources: Vec<Source>,
    /// The sources that may be found under a name.
    meant: BTreeMap<String, Vec<usize>>,
    /// The source that was reported as stored under a name.
    acked: BTreeMap<String, usize>,
    /// Files that were found right, as long as they stay untouched.
    seen: HashMap<String, Stamp>,
    pub(crate) tally: Tally,
}

/// Changes whenever a file's bytes do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Ledger {
    pub(crate) fn new(sources: Vec<Source>) -> Self {
        Self {
            sources,
            meant: BTreeMap::new(),
            acked: BTreeMap::new(),
            seen: HashMap::new(),
            tally: Tally::default(),
        }
    }

    /// A command will send this source under this name.
    pub(crate) fn mean(&mut self, name: &str, source: usize) {
        let meant = self.meant.entry(name.to_owned()).or_default();
        if !meant.contains(&source) {
            meant.push(source);
        }
    }

    /// The source that is promised to be under this name.
    pub(crate) fn acked(&self, name: &str) -> Option<usize> {
        self.acked.get(name).copied()
    }

    /// A name that is promised, any of them.
    pub(crate) fn any_acked(&self, rng: &mut Rng) -> Option<(String, usize)> {
        let at = rng.index(self.acked.len());
        self.acked
            .iter()
            .nth(at)
            .map(|(name, source)| (name.clone(), *source))
    }

    /// A client said that `source` is stored under `name`, with this hash.
    pub(crate) fn ack(&mut self, name: &str, source: usize, hash: &str) {
        self.tally.acked += 1;
        let right = self.sources.get(source).map(|source| source.hash.to_hex());
        if right.is_none_or(|right| right.as_str() != hash) {
            self.tally.corrupt += 1;
            println!("CORRUPT: {name} was reported as stored with a wrong hash: {hash}");
        }
        if let Some(before) = self.acked.insert(name.to_owned(), source)
            && before != source
        {
            self.tally.lost += 1;
            println!("LOST: {name} was reported as stored twice, with different bytes");
        }
    }

    /// Compares the directory with what was meant and promised. With `anew`, also files that were found right
    /// before are read again.
    pub(crate) fn check(&mut self, root: &Path, anew: bool) -> anyhow::Result<()> {
        let mut there = BTreeMap::new();
        if root.exists() {
            walk(root, "", &mut there)?;
        }
        for (name, found) in &there {
            let Some(stamp) = found else {
                self.tally.corrupt += 1;
                println!("CORRUPT: {name} is not a file");
                continue;
            };
            if !anew && self.seen.get(name) == Some(stamp) {
                continue;
            }
            self.judge(root, name, *stamp)?;
        }
        let tally = &mut self.tally;
        self.acked.retain(|name, _| {
            let kept = there.contains_key(name);
            if !kept {
                tally.lost += 1;
                println!("LOST: {name} was reported as stored and is not there");
            }
            kept
        });
        Ok(())
    }

    fn judge(&mut self, root: &Path, name: &str, stamp: Stamp) -> anyhow::Result<()> {
        let path = root.join(name);
        // What is promised is all that may be there.
        let allowed = match self.acked.get(name) {
            Some(source) => vec![*source],
            None => self.meant.get(name).cloned().unwrap_or_default(),
        };
        let sources = || {
            allowed
                .iter()
                .filter_map(|&source| self.sources.get(source))
        };
        let found = hash(&path)?;
        if sources().any(|source| source.size == stamp.size && source.hash == found) {
            self.seen.insert(name.to_owned(), stamp);
            return Ok(());
        }
        let expected: Vec<u64> = sources().map(|source| source.size).collect();
        let partial = sources().any(|source| {
            stamp.size < source.size
                && begins_with(&source.path, stamp.size).is_ok_and(|hash| hash == found)
        });
        let size = stamp.size;
        if partial {
            self.tally.partial += 1;
            println!("PARTIAL: {name} has {size} bytes, the beginning of {expected:?}");
        } else {
            self.tally.corrupt += 1;
            println!("CORRUPT: {name} has {size} bytes {found}, expected {expected:?}");
        }
        Ok(())
    }

    /// Removes all files and forgets them. No client may be running.
    pub(crate) fn clear(&mut self, root: &Path) -> anyhow::Result<()> {
        for entry in fs::read_dir(root)? {
            let entry = entry?;
            if entry.file_name() == PRIVATE {
                continue;
            }
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        // A power cut must not bring them back.
        rustix::fs::syncfs(File::open(root)?)?;
        self.meant.clear();
        self.acked.clear();
        self.seen.clear();
        Ok(())
    }
}

/// Regular files below `dir`, and other things as `None`; the server's own directory left out.
fn walk(dir: &Path, prefix: &str, into: &mut BTreeMap<String, Option<Stamp>>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if prefix.is_empty() && name == PRIVATE {
            continue;
        }
        let name = format!("{prefix}{}", name.to_string_lossy());
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            // A probe of the server's start.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if metadata.is_dir() {
            walk(&entry.path(), &format!("{name}/"), into)?;
        } else if name.starts_with(PROBE) {
            // Empty, hidden, and removed by the next start.
        } else {
            let stamp = metadata.is_file().then(|| Stamp {
                inode: metadata.ino(),
                size: metadata.len(),
                changed: (metadata.ctime(), metadata.ctime_nsec()),
            });
            into.insert(name, stamp);
        }
    }
    Ok(())
}

/// What the server left in its own directory: staging files and journals.
pub(crate) fn leftovers(root: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for part in ["staging", "journal"] {
        let entries = match fs::read_dir(root.join(PRIVATE).join(part)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            names.push(format!("{part}/{}", entry?.file_name().to_string_lossy()));
        }
    }
    Ok(names)
}

/// The hash of a file.
pub(crate) fn hash(path: &Path) -> anyhow::Result<blake3::Hash> {
    let failed = || format!("cannot read {}", path.display());
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(File::open(path).with_context(failed)?)
        .with_context(failed)?;
    Ok(hasher.finalize())
}

fn begins_with(path: &Path, len: u64) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?.take(len))?;
    Ok(hasher.finalize())
}

/// The server's own directory in the root.
pub(crate) const PRIVATE: &str = ".udpack";
/// Begins the name of a file by which a starting server tries the file system out.
const PROBE: &str = ".udpack-probe-";
