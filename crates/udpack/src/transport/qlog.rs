//! qlog: a file for each connection, for debugging QUIC.
//!
//! quinn writes the main events of `draft-ietf-quic-qlog` as JSON-SEQ (RFC 7464): packets sent, received and lost by
//! number and size, and the recovery metrics. Payload, keys and tokens are not written.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Size limit of a file in bytes; the connection continues without a log.
const FILE_BYTES: u64 = 256 << 20;
/// Files in the lifetime of one endpoint: connection attempts alone must not fill the disk.
const FILES: u64 = 4096;
/// Events are buffered up to this size in bytes before they are written.
const BUFFER: usize = 64 << 10;

/// Makes the qlog files of one server or client.
#[derive(Debug, Clone)]
pub(crate) struct Qlog {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    side: &'static str,
    made: AtomicU64,
}

impl Qlog {
    pub(crate) fn new(dir: PathBuf, side: &'static str) -> Self {
        Self {
            inner: Arc::new(Inner {
                dir,
                side,
                made: AtomicU64::new(0),
            }),
        }
    }

    /// The qlog stream of one more connection; `None` if no file can be created, which is logged.
    pub(crate) fn stream(&self, peer: SocketAddr) -> Option<quinn::QlogStream> {
        let Inner { dir, side, made } = &*self.inner;
        let number = made.fetch_add(1, Ordering::Relaxed);
        if number >= FILES {
            if number == FILES {
                tracing::warn!(dir = %dir.display(), "no more qlog files after {FILES}");
            }
            return None;
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let millis = since.unwrap_or_default().as_millis();
        let process = std::process::id();
        let path = dir.join(format!("{millis}-{process}-{side}-{number}.sqlog"));
        let file = match create(&path) {
            Ok(file) => file,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no qlog");
                return None;
            }
        };
        let mut config = quinn::QlogConfig::default();
        config
            .writer(Box::new(Bounded {
                file: BufWriter::with_capacity(BUFFER, file),
                left: FILE_BYTES,
                path,
            }))
            .title(Some(format!("udpack {side}, peer {peer}")));
        config.into_stream()
    }
}

fn create(path: &std::path::Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// A file that ends at its size limit or at the first error. quinn is not told, because a connection must not depend
/// on its log.
struct Bounded {
    file: BufWriter<File>,
    left: u64,
    path: PathBuf,
}

impl Bounded {
    fn end(&mut self, error: &dyn std::fmt::Display) {
        self.left = 0;
        tracing::warn!(path = %self.path.display(), "the qlog ends here: {error}");
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.left > 0 {
            match self.left.checked_sub(bytes.len() as u64) {
                Some(left) => match self.file.write_all(bytes) {
                    Ok(()) => self.left = left,
                    Err(error) => self.end(&error),
                },
                None => self.end(&"it has reached its largest size"),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
