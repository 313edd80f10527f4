//! A lock on a directory whose files several processes of these programs change: each reads a file, changes what it read and
//! puts the whole in its place, and none may do so between the two steps of another.
//!
//! The system ends the lock with its process, and no lock file stays behind.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a lock that another process holds is tried again.
const PAUSE: Duration = Duration::from_millis(5);

/// Locks this directory until the returned file is dropped. Blocks, for at most `patience`.
pub(crate) fn hold(dir: &Path, patience: Duration) -> io::Result<File> {
    let file = File::open(dir)?;
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            Err(TryLockError::WouldBlock) => {
                let text = "another program keeps its directory locked";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_holds_a_directory_and_the_others_wait_no_longer_than_they_want() {
        let dir = tempfile::tempdir().unwrap();
        let held = hold(dir.path(), Duration::ZERO).unwrap();
        let late = hold(dir.path(), Duration::from_millis(20)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        drop(held);
        hold(dir.path(), Duration::ZERO).unwrap();
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
        assert!(hold(&dir.path().join("none"), Duration::ZERO).is_err());
    }
}
