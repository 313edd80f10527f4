//! Interrupts: the first asks for a clean stop, the second ends the process at once. And the signals by which the
//! system says that one of its limits is reached.

use std::io;

use rustix::process::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Keeps the process alive when it reaches the system's limit for the size of a file (`ulimit -f`, systemd's
/// `LimitFSIZE`): from then on such a write fails, which ends one transfer and not the program. Programs that this
/// one starts get the system's default again.
///
/// The other signals of a limit: SIGXCPU asks for a clean stop, see [`Interrupts`]. SIGPIPE is ignored by Rust's
/// runtime. Nothing can be done about SIGKILL (the hard limit of processor time, or memory) and SIGSEGV (the stack).
///
/// Must be called on a runtime.
pub(crate) fn survive_file_size_limit() -> io::Result<()> {
    // The handler stays when this stream is dropped.
    signal(SignalKind::from_raw(Number::XFSZ.as_raw())).map(drop)
}

/// SIGINT, SIGTERM and SIGXCPU, caught from the moment this exists. The system sends SIGXCPU some time before it kills
/// a process that has used up its processor time (`ulimit -t`, systemd's `LimitCPU`). SIGHUP is ignored: a token file that changed is
/// read again by itself, and a terminal that closes does not stop a server.
#[derive(Debug)]
pub(crate) struct Interrupts {
    int: Signal,
    term: Signal,
    cpu: Signal,
    _hup: Option<Signal>,
}

impl Interrupts {
    /// Must be called on a runtime.
    pub(crate) fn catch() -> io::Result<Self> {
        Ok(Self {
            int: signal(SignalKind::interrupt())?,
            term: signal(SignalKind::terminate())?,
            cpu: signal(SignalKind::from_raw(Number::XCPU.as_raw()))?,
            _hup: None,
        })
    }

    /// As [`catch`](Self::catch), SIGHUP included.
    pub(crate) fn catch_with_hangup() -> io::Result<Self> {
        Ok(Self {
            _hup: Some(signal(SignalKind::hangup())?),
            ..Self::catch()?
        })
    }

    /// The first signal. From then on another one ends the process, but for SIGXCPU, which comes every second.
    ///
    /// Cancel safe.
    pub(crate) async fn first(&mut self) {
        tokio::select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
            _ = self.cpu.recv() => {
                tracing::error!("the limit of processor time is reached: stopping before the system ends the process");
            }
        }
        // Fresh streams: these would be as good as gone if the caller dropped them.
        if let Ok(mut again) = Self::catch() {
            tokio::spawn(async move {
                again.next().await;
                crate::client::end_commands();
                std::process::exit(i32::from(crate::exit::INTERRUPTED));
            });
        }
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
        }
    }
}
