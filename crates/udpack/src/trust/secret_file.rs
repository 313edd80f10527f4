//! Files that hold a secret: used only if nobody else can read them, created once and never overwritten.
//!
//! The rules cover two failures. A key that was copied with the wrong mode is refused. Of two processes that start
//! together for the first time, one creates the file and the other reads it.

use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// Why a secret file was not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretFileError {
    /// The system refused to read it.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The system refused to create it.
    #[error("cannot create {}", path.display())]
    Create {
        /// The file or its directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a pipe or a device.
    #[error("not a regular file: {}", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
    },
    /// Its mode gives others access.
    #[error("{}: run chmod {allowed:o} {}", open_to_others(path, *mode), path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The most permission bits that are accepted.
        allowed: u32,
    },
    /// It belongs to somebody else.
    #[error("{}: run chown {user} {}", owned_by(path, *owner), path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// The user id it belongs to.
        owner: u32,
        /// The user id of this process.
        user: u32,
    },
    /// The system refused to change it.
    #[error("cannot change {}", path.display())]
    Change {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is larger than the limit.
    #[error("{} is larger than {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit, in bytes.
        limit: u64,
    },
}

impl SecretFileError {
    /// Whether the file does not exist, as opposed to being unusable.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// The description of the problem, without the advice how to solve it.
    pub fn problem(&self) -> String {
        match self {
            Self::Mode { path, mode, .. } => open_to_others(path, *mode),
            Self::Owner { path, owner, .. } => owned_by(path, *owner),
            other => other.to_string(),
        }
    }
}

fn open_to_others(path: &Path, mode: u32) -> String {
    let path = path.display();
    format!("{path} has mode {mode:04o}, so others on this machine can use the secret in it")
}

fn owned_by(path: &Path, owner: u32) -> String {
    let path = path.display();
    format!("{path} belongs to user {owner}, who could change the secret in it")
}

/// Reads the secret file at `path`, and returns which version of it was read.
///
/// The version is taken before the first byte is read, so a file that changes meanwhile looks
/// changed afterwards.
pub(crate) fn read(path: &Path, limit: u64) -> Result<(Vec<u8>, Version), SecretFileError> {
    let user = rustix::process::geteuid().as_raw();
    let (bytes, metadata) = content(path, limit, |metadata| check(path, metadata, user))?;
    Ok((bytes, Version::of(&metadata)))
}

/// Reads at most `limit` bytes of the regular file at `path`, after `check` has accepted its metadata.
pub(crate) fn content(
    path: &Path,
    limit: u64,
    check: impl FnOnce(&Metadata) -> Result<(), SecretFileError>,
) -> Result<(Vec<u8>, Metadata), SecretFileError> {
    let failed = |source| SecretFileError::Read {
        path: path.to_owned(),
        source,
    };
    // Without NONBLOCK a named pipe in the file's place would block the start for ever.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file =
        rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let file = File::from(file);
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(SecretFileError::NotRegular {
            path: path.to_owned(),
        });
    }
    check(&metadata)?;

    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(SecretFileError::TooLarge {
            path: path.to_owned(),
            limit,
        });
    }
    Ok((bytes, metadata))
}

/// Publishes `bytes` at `path` with mode 0600, unless something has that name already.
///
/// Returns whether this call created the file. The file is on disk, whole, before the name
/// appears. A missing directory is created for its owner alone.
pub(crate) fn create(path: &Path, bytes: &[u8]) -> Result<bool, SecretFileError> {
    publish(path, bytes).map_err(|source| SecretFileError::Create {
        path: path.to_owned(),
        source,
    })
}

/// Atomically replaces the content of the secret file at `path` with `bytes`, with mode 0600: a reader gets the old
/// content or the new one, also after a power cut.
///
/// Returns `false`, and changes nothing, when the file is no longer the `version` that was read. A change by another
/// program in the last moment can still be lost; callers exclude each other with [`lock_dir`].
pub(crate) fn replace(
    path: &Path,
    bytes: &[u8],
    version: Version,
) -> Result<bool, SecretFileError> {
    let swap = || {
        let temporary = Temporary::write(path, bytes)?;
        if Version::of(&std::fs::metadata(path)?) != version {
            return Ok(false);
        }
        std::fs::rename(&temporary.path, path)?;
        temporary.gone()?.sync_all()?;
        Ok(true)
    };
    swap().map_err(|source| SecretFileError::Change {
        path: path.to_owned(),
        source,
    })
}

/// Locks the directory of `path` against other processes that change secret files in it, until the returned file is
/// dropped or the process ends. No lock file stays behind.
///
/// Blocks for at most `patience`.
pub(crate) fn lock_dir(path: &Path, patience: Duration) -> Result<File, SecretFileError> {
    let failed = |source| SecretFileError::Change {
        path: path.to_owned(),
        source,
    };
    let dir = File::open(dir_of(path)).map_err(failed)?;
    let deadline = Instant::now() + patience;
    loop {
        match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(dir),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::WOULDBLOCK) => {
                let text = "another program keeps its directory locked";
                return Err(failed(io::Error::new(io::ErrorKind::TimedOut, text)));
            }
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// Creates `dir` and its missing parents with mode 0700.
pub(crate) fn create_dir(dir: &Path) -> Result<(), SecretFileError> {
    let create = || {
        if dir.is_dir() {
            return Ok(());
        }
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(dir)?;
        // The directory must survive a power cut like the files in it.
        match dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            Some(parent) => File::open(parent)?.sync_all(),
            None => File::open(".")?.sync_all(),
        }
    };
    create().map_err(|source| SecretFileError::Create {
        path: dir.to_owned(),
        source,
    })
}

/// One version of a file's content, as far as its metadata can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// The time of the last change of content or metadata: seconds and nanoseconds.
    pub(crate) fn changed(&self) -> (i64, i64) {
        self.changed
    }
}

fn check(path: &Path, metadata: &Metadata, user: u32) -> Result<(), SecretFileError> {
    let owner = metadata.uid();
    if owner != user && owner != 0 {
        return Err(SecretFileError::Owner {
            path: path.to_owned(),
            owner,
            user,
        });
    }
    check_mode(path, metadata, 0o600)
}

/// Refuses a file that grants others than its owner more than `allowed`.
pub(crate) fn check_mode(
    path: &Path,
    metadata: &Metadata,
    allowed: u32,
) -> Result<(), SecretFileError> {
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 & !allowed != 0 {
        return Err(SecretFileError::Mode {
            path: path.to_owned(),
            mode,
            allowed,
        });
    }
    Ok(())
}

fn publish(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    let temporary = Temporary::write(path, bytes)?;
    // A link, not a rename: it fails when the name is taken.
    let created = match std::fs::hard_link(&temporary.path, path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(error),
    };
    drop(temporary);
    File::open(dir_of(path))?.sync_all()?;
    Ok(created)
}

fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// A complete, synced file beside its target; removed on drop unless it was renamed.
struct Temporary {
    path: PathBuf,
    placed: bool,
}

impl Temporary {
    fn write(path: &Path, bytes: &[u8]) -> io::Result<Self> {
        let Some(name) = path.file_name() else {
            return Err(io::Error::from(io::ErrorKind::InvalidFilename));
        };
        let mut suffix = [0; 8];
        aws_lc_rs::rand::fill(&mut suffix).map_err(|_| io::Error::other("no random bytes"))?;
        let suffix = u64::from_be_bytes(suffix);
        let temporary = dir_of(path).join(format!(".{}.{suffix:016x}.tmp", name.display()));

        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let owner_only = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::open(&temporary, flags, owner_only)?;
        let temporary = Self {
            path: temporary,
            placed: false,
        };
        // The umask may have taken bits away that the owner needs.
        rustix::fs::fchmod(&file, owner_only)?;
        let mut file = File::from(file);
        file.write_all(bytes)?;
        file.sync_all()?;
        Ok(temporary)
    }

    /// Records that the file was renamed. Returns its directory.
    fn gone(mut self) -> io::Result<File> {
        self.placed = true;
        File::open(dir_of(&self.path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.placed {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "temporary file left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn creates_once_for_the_owner_alone_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        assert!(create(&path, b"one").unwrap());
        assert!(!create(&path, b"two").unwrap());
        assert_eq!(read(&path, 100).unwrap().0, b"one");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn replaces_the_version_that_was_read_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        create(&path, b"one").unwrap();
        let (_, first) = read(&path, 100).unwrap();
        assert!(replace(&path, b"two, longer", first).unwrap());
        let (content, second) = read(&path, 100).unwrap();
        assert_eq!(content, b"two, longer");
        assert!(!replace(&path, b"three", first).unwrap());
        assert_eq!(read(&path, 100).unwrap().0, b"two, longer");
        std::fs::remove_file(&path).unwrap();
        assert!(replace(&path, b"four", second).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_locked_directory_is_waited_for_and_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let held = lock_dir(&path, Duration::ZERO).unwrap();
        let text = lock_dir(&path, Duration::from_millis(30)).unwrap_err();
        assert!(text.to_string().contains("cannot change"), "{text}");
        drop(held);
        lock_dir(&path, Duration::ZERO).unwrap();
    }

    #[test]
    fn does_not_follow_or_replace_a_dangling_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert!(!create(&path, b"one").unwrap());
        assert!(!dir.path().join("elsewhere").exists());
        assert!(read(&path, 100).unwrap_err().is_missing());
    }

    #[test]
    fn refuses_a_mode_that_lets_others_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        create(&path, b"one").unwrap();
        for mode in [0o604, 0o640, 0o601, 0o660, 0o666, 0o777] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let text = read(&path, 100).unwrap_err().to_string();
            assert!(text.contains(&format!("mode {mode:04o}")), "{text}");
            assert!(
                text.contains(&format!("chmod 600 {}", path.display())),
                "{text}"
            );
        }
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o400)).unwrap();
        read(&path, 100).unwrap();
    }

    #[test]
    fn refuses_a_strangers_file_but_not_roots() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        create(&path, b"one").unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        check(&path, &metadata, metadata.uid()).unwrap();
        if metadata.uid() == 0 {
            check(&path, &metadata, 1).unwrap();
            std::os::unix::fs::chown(&path, Some(1), None).unwrap();
        }
        let metadata = std::fs::metadata(&path).unwrap();
        let text = check(&path, &metadata, metadata.uid() + 1)
            .unwrap_err()
            .to_string();
        assert!(text.contains("chown"), "{text}");
    }

    #[test]
    fn refuses_what_is_no_file_without_waiting_for_it() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            read(dir.path(), 100),
            Err(SecretFileError::NotRegular { .. })
        ));
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        assert!(matches!(
            read(&pipe, 100),
            Err(SecretFileError::NotRegular { .. })
        ));
    }

    #[test]
    fn refuses_a_file_over_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        create(&path, &[b'x'; 101]).unwrap();
        assert!(matches!(
            read(&path, 100),
            Err(SecretFileError::TooLarge { limit: 100, .. })
        ));
        assert_eq!(read(&path, 101).unwrap().0.len(), 101);
    }
}
