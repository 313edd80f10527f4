//! The servers that were last reached over TCP because no UDP passed, remembered for a day: the next run tries both at once
//! and loses no time.
//!
//! A file of lines `HOST:PORT SECONDS` below the user's state directory, which only the user can read. Whatever is wrong with it, the
//! program does without.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::held;

/// How long a server is remembered, in seconds.
const DAY: u64 = 24 * 60 * 60;
/// A server that was noted so many seconds ago need not be noted again.
const FRESH: u64 = 60 * 60;
/// Servers that are remembered; of more, the oldest are forgotten.
const SERVERS: usize = 64;
/// How long another process that notes a server may take. Nothing else goes on meanwhile.
const PATIENCE: Duration = Duration::from_millis(500);
/// Bytes of the file that are read.
const MOST: u64 = 64 << 10;

/// The file, where there is a place for it.
#[derive(Debug, Clone)]
pub(crate) struct Remembered(Option<PathBuf>);

impl Remembered {
    /// The user's: `udpack/tcp` below `XDG_STATE_HOME`, or else below `~/.local/state`.
    pub(crate) fn of_user() -> Self {
        Self(place(env::var_os("XDG_STATE_HOME"), env::var_os("HOME")))
    }

    /// One that remembers nothing.
    pub(crate) fn nothing() -> Self {
        Self(None)
    }

    /// Whether this server was last reached over TCP, less than a day ago.
    pub(crate) fn has(&self, server: &str) -> bool {
        let Some(path) = &self.0 else { return false };
        let known = read(path).unwrap_or_else(|error| {
            tracing::debug!(path = %path.display(), %error, "not read");
            BTreeMap::new()
        });
        known
            .get(server)
            .is_some_and(|at| is_within(*at, now(), DAY))
    }

    /// Remembers over what this server was reached.
    pub(crate) fn note(&self, server: &str, over_tcp: bool) {
        let Some(path) = &self.0 else { return };
        if let Err(error) = note(path, server, over_tcp, now()) {
            tracing::debug!(path = %path.display(), %error, "not written");
        }
    }
}

fn place(state: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    // A relative path says nothing, as the specification of these variables has it.
    let absolute =
        |path: Option<OsString>| path.map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute(state).or_else(|| Some(absolute(home)?.join(".local/state")))?;
    Some(state.join("udpack/tcp"))
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn is_within(at: u64, now: u64, seconds: u64) -> bool {
    now.checked_sub(at).is_some_and(|age| age < seconds)
}

/// The servers of the file, and when each was noted. What is no line of it is passed over.
fn read(path: &Path) -> io::Result<BTreeMap<String, u64>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    file.take(MOST).read_to_string(&mut text)?;
    let lines = text.lines().filter_map(|line| {
        let (server, at) = line.split_once(' ')?;
        Some((server.to_owned(), at.parse().ok()?))
    });
    Ok(lines.collect())
}

fn note(path: &Path, server: &str, over_tcp: bool, now: u64) -> io::Result<()> {
    // One that cannot be read is made anew.
    let known = || read(path).unwrap_or_default();
    let stays = match (known().get(server), over_tcp) {
        (Some(at), true) => is_within(*at, now, FRESH),
        (None, false) => true,
        _ => false,
    };
    let Some(dir) = path.parent().filter(|_| !stays) else {
        return Ok(());
    };
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let _held = held::hold(dir, PATIENCE)?;
    let mut known = known();
    known.retain(|_, at| is_within(*at, now, DAY));
    known.remove(server);
    if over_tcp {
        while known.len() >= SERVERS {
            let oldest = known.iter().min_by_key(|(_, at)| **at);
            let Some(oldest) = oldest.map(|(server, _)| server.clone()) else {
                break;
            };
            known.remove(&oldest);
        }
        known.insert(server.to_owned(), now);
    }
    replace(path, dir, &known)
}

/// Writes the whole file beside the old one, for its owner alone, and puts it in its place.
fn replace(path: &Path, dir: &Path, known: &BTreeMap<String, u64>) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    for (server, at) in known {
        writeln!(file, "{server} {at}")?;
    }
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const NOW: u64 = 1_000_000_000;

    #[test]
    fn what_many_note_at_once_is_all_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/udpack/tcp");
        let barrier = std::sync::Barrier::new(32);
        std::thread::scope(|scope| {
            for n in 0..32 {
                let (path, barrier) = (&path, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    note(path, &format!("host-{n}:1"), true, NOW).unwrap();
                });
            }
        });
        assert_eq!(read(&path).unwrap().len(), 32);
        let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(left, 1, "nothing lies beside it");
    }

    #[test]
    fn the_file_is_private_and_says_what_was_noted_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/udpack/tcp");
        let text = || fs::read_to_string(&path).unwrap();
        note(&path, "a:1", true, NOW).unwrap();
        note(&path, "b:2", true, NOW + 1).unwrap();
        assert_eq!(text(), format!("a:1 {NOW}\nb:2 {}\n", NOW + 1));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        note(&path, "a:1", true, NOW + 60).unwrap();
        assert!(text().contains(&format!("a:1 {NOW}\n")), "it is fresh");
        note(&path, "a:1", true, NOW + FRESH).unwrap();
        assert!(text().contains(&format!("a:1 {}\n", NOW + FRESH)));
        note(&path, "a:1", false, NOW + FRESH).unwrap();
        assert_eq!(text(), format!("b:2 {}\n", NOW + 1));
        note(&path, "c:3", true, NOW + DAY + 1).unwrap();
        assert_eq!(text(), format!("c:3 {}\n", NOW + DAY + 1), "b is a day old");
        let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(left, 1, "nothing lies beside it");
    }

    #[test]
    fn of_many_servers_the_oldest_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tcp");
        for number in 0..100 {
            note(&path, &format!("s{number}:1"), true, NOW + number).unwrap();
        }
        let known = read(&path).unwrap();
        assert_eq!(known.len(), SERVERS);
        assert!(known.contains_key("s99:1") && !known.contains_key("s35:1"));
    }

    #[test]
    fn what_cannot_be_read_is_as_if_it_were_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tcp");
        let remembered = Remembered(Some(path.clone()));
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(!remembered.has("a:1"));
        fs::write(
            &path,
            format!("a:1\n\nb:2 x\nc:3 {}\nd:4 {}\n", now(), u64::MAX),
        )
        .unwrap();
        let has = |server| remembered.has(server);
        assert_eq!(
            ["a:1", "b:2", "c:3", "d:4"].map(has),
            [false, false, true, false]
        );
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(!remembered.has("c:3"));
        remembered.note("c:3", true);
        assert!(!remembered.has("c:3"));
        fs::remove_dir(&path).unwrap();
        fs::write(&path, [0xff]).unwrap();
        remembered.note("c:3", true);
        assert!(remembered.has("c:3"), "it is made anew");
        assert!(!Remembered::nothing().has("c:3"));
    }

    #[test]
    fn the_place_is_that_of_the_users_state() {
        let path = |text: &str| Some(OsString::from(text));
        let found = |state, home| place(state, home).map(|path| path.display().to_string());
        assert_eq!(
            found(path("/s"), path("/h")).as_deref(),
            Some("/s/udpack/tcp")
        );
        assert_eq!(
            found(path("s"), path("/h")).as_deref(),
            Some("/h/.local/state/udpack/tcp")
        );
        assert_eq!(found(None, path("")), None);
    }
}
