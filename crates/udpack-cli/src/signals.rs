//! Interrupts: the first asks for a clean stop, the second ends the process at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT and SIGTERM, caught from the moment this exists. SIGHUP is ignored: a token file that changed is
/// read again by itself, and a terminal that closes does not stop a server.
#[derive(Debug)]
pub(crate) struct Interrupts {
    int: Signal,
    term: Signal,
    _hup: Option<Signal>,
}

impl Interrupts {
    /// Must be called on a runtime.
    pub(crate) fn catch() -> io::Result<Self> {
        Ok(Self {
            int: signal(SignalKind::interrupt())?,
            term: signal(SignalKind::terminate())?,
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

    /// The first signal. From then on another one ends the process.
    ///
    /// Cancel safe.
    pub(crate) async fn first(&mut self) {
        self.next().await;
        // Fresh streams: these would be as good as gone if the caller dropped them.
        if let Ok(mut again) = Self::catch() {
            tokio::spawn(async move {
                again.next().await;
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
