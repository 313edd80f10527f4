//! Reads a file that still grows, up to an end that is known.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::args::Until;
use crate::exit::Unfinished;

/// The interval at which the file is examined.
const LOOK: Duration = Duration::from_millis(100);
/// The interval at which its writers are looked for.
const ASK: Duration = Duration::from_millis(500);

/// Reads what the file has, returns `WouldBlock` if it has not grown for a moment, and ends when its last writer has
/// closed it, or as [`Until`] says.
pub(super) struct Follow {
    path: PathBuf,
    file: File,
    at: u64,
    until: Option<Until>,
    /// When it last grew.
    moved: Instant,
    asked: Option<Instant>,
    closes: Closes,
}

impl Follow {
    pub(super) fn open(path: &Path, until: Option<Until>) -> io::Result<Self> {
        // Set up before writers are looked for, so that no close is missed.
        let closes = Closes::watch(path);
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            let text = "not a regular file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            at: 0,
            until,
            moved: Instant::now(),
            asked: None,
            closes,
        })
    }

    /// Checks that it is still the same file and has not been cut.
    fn check(&self) -> io::Result<()> {
        let own = self.file.metadata()?;
        if own.len() < self.at {
            let (len, at) = (own.len(), self.at);
            let text = format!("it was cut to {len} bytes when {at} had been read");
            return Err(Unfinished::new(text).into());
        }
        match std::fs::metadata(&self.path) {
            Ok(there) if same(&there, &own) => Ok(()),
            Ok(_) => Err(Unfinished::new("it was replaced by another file").into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Unfinished::new("it was removed or renamed").into())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the file is complete, given that everything in it was read.
    fn is_over(&mut self) -> io::Result<bool> {
        match self.until {
            Some(Until::Size(size)) => Ok(self.at >= size),
            Some(Until::Idle(idle)) => Ok(self.moved.elapsed() >= idle),
            None if self.asked.is_some_and(|asked| asked.elapsed() < ASK) => Ok(false),
            None => {
                self.asked = Some(Instant::now());
                let closed = self.closes.seen();
                Ok(match writers(&self.file.metadata()?)? {
                    Writers::Some => false,
                    Writers::None => true,
                    // A process whose files are hidden may write to it; its close is noticed all the same.
                    Writers::Unknown => closed,
                })
            }
        }
    }

    fn take(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = match self.until {
            Some(Until::Size(size)) => {
                usize::try_from(size - self.at.min(size)).unwrap_or(usize::MAX)
            }
            _ => usize::MAX,
        };
        let most = buffer.len().min(room);
        let count = self.file.read(buffer.get_mut(..most).unwrap_or_default())?;
        if count > 0 {
            self.at += count as u64;
            self.moved = Instant::now();
        }
        Ok(count)
    }
}

impl Read for Follow {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.take(buffer)?;
        if count > 0 || buffer.is_empty() {
            return Ok(count);
        }
        self.check()?;
        if self.is_over()? {
            // Bytes that were written before the close and after the last read.
            return self.take(buffer);
        }
        std::thread::sleep(LOOK);
        Err(io::ErrorKind::WouldBlock.into())
    }
}

fn same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// The processes that have a file open for writing.
#[derive(Debug, PartialEq, Eq)]
enum Writers {
    Some,
    None,
    /// None of the processes whose files are visible.
    Unknown,
}

/// Searches the open files of all processes.
fn writers(of: &Metadata) -> io::Result<Writers> {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Ok(Writers::Unknown);
    };
    let mut hidden = false;
    for process in processes.flatten() {
        let name = process.file_name();
        if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let files = match std::fs::read_dir(process.path().join("fd")) {
            Ok(files) => files,
            Err(error) => {
                hidden |= error.kind() == io::ErrorKind::PermissionDenied;
                continue;
            }
        };
        for file in files.flatten() {
            let writes = || {
                let info = process.path().join("fdinfo").join(file.file_name());
                std::fs::read_to_string(info).is_ok_and(|info| may_write(&info))
            };
            // The process may have closed it meanwhile.
            if std::fs::metadata(file.path()).is_ok_and(|open| same(&open, of)) && writes() {
                return Ok(Writers::Some);
            }
        }
    }
    Ok(if hidden {
        Writers::Unknown
    } else {
        Writers::None
    })
}

/// Whether the flags of an open file, in the kernel's octal notation, permit writing.
fn may_write(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_none_or(|flags| flags & 3 != 0)
}

/// Detects that a writer has closed the file.
struct Closes {
    #[cfg(target_os = "linux")]
    events: Option<rustix::fd::OwnedFd>,
    any: bool,
}

#[cfg(target_os = "linux")]
impl Closes {
    fn watch(path: &Path) -> Self {
        use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
        let events =
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).and_then(|events| {
                inotify::add_watch(&events, path, WatchFlags::CLOSE_WRITE)?;
                Ok(events)
            });
        Self {
            events: events.ok(),
            any: false,
        }
    }

    fn seen(&mut self) -> bool {
        let mut event = [0; 4096];
        if let Some(events) = &self.events {
            self.any |= rustix::io::read(events, &mut event).is_ok_and(|read| read > 0);
        }
        self.any
    }
}

#[cfg(not(target_os = "linux"))]
impl Closes {
    fn watch(_: &Path) -> Self {
        Self { any: false }
    }

    fn seen(&mut self) -> bool {
        self.any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    /// Reads until it ends; what was read is not before it is.
    fn rest(follow: &mut Follow) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut buffer = [0; 100];
        loop {
            match follow.read(&mut buffer) {
                Ok(0) => return Ok(all),
                Ok(count) => all.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    #[test]
    fn it_ends_with_its_last_writer_and_has_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut writer = File::create(&path).unwrap();
        writer.write_all(b"one ").unwrap();
        let mut follow = Follow::open(&path, None).unwrap();
        let mut buffer = [0; 100];
        assert_eq!(follow.read(&mut buffer).unwrap(), 4);
        // It is open: there is no end, however often it is asked.
        for _ in 0..12 {
            let error = follow.read(&mut buffer).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
        writer.write_all(b"two").unwrap();
        drop(writer);
        assert_eq!(rest(&mut follow).unwrap(), b"two");
    }

    #[test]
    fn it_ends_at_a_size_or_when_nothing_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut writer = File::create(&path).unwrap();
        writer.write_all(b"0123456789").unwrap();
        let mut sized = Follow::open(&path, Some(Until::Size(7))).unwrap();
        assert_eq!(rest(&mut sized).unwrap(), b"0123456");
        let idle = Until::Idle(Duration::from_millis(1));
        let mut idle = Follow::open(&path, Some(idle)).unwrap();
        assert_eq!(rest(&mut idle).unwrap(), b"0123456789");
    }

    #[test]
    fn a_file_that_is_cut_replaced_or_removed_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let after = |change: &dyn Fn(&File)| {
            std::fs::write(&path, b"0123456789").unwrap();
            let writer = File::options().write(true).open(&path).unwrap();
            let mut follow = Follow::open(&path, None).unwrap();
            follow.read_exact(&mut [0; 10]).unwrap();
            change(&writer);
            rest(&mut follow).unwrap_err().to_string()
        };
        let cut = after(&|writer| writer.set_len(3).unwrap());
        assert_eq!(cut, "it was cut to 3 bytes when 10 had been read");
        let other = dir.path().join("g");
        let replaced = after(&|_| {
            std::fs::write(&other, b"").unwrap();
            std::fs::rename(&other, &path).unwrap();
        });
        assert_eq!(replaced, "it was replaced by another file");
        let removed = after(&|_| std::fs::remove_file(&path).unwrap());
        assert_eq!(removed, "it was removed or renamed");
    }
}
