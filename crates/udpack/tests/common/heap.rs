//! What a test may hold in memory, on a network in memory: the heap is the process's, so one test at a time.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::future::Future;
use std::time::Duration;

use peak_alloc::PeakAlloc;
use udpack::Server;
use udpack::testing::Net;

use crate::bare::{self, Bare};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Runs a test while no other one does. Nothing takes longer than 600 s, of a clock that may jump.
pub(crate) async fn alone<F: Future>(test: F) -> F::Output {
    let _alone = ALONE.lock().await;
    tokio::time::timeout(Duration::from_secs(600), test)
        .await
        .expect("the test took longer than 600 s")
}

/// What was in use when the test began.
pub(crate) struct Mark(usize);

impl Mark {
    pub(crate) fn set() -> Self {
        HEAP.reset_peak_usage();
        Self(HEAP.current_usage())
    }

    /// What everybody together holds over the mark now, in bytes.
    pub(crate) fn held(&self) -> usize {
        HEAP.current_usage().saturating_sub(self.0)
    }

    /// Everybody together has never held more than this over the mark, in bytes.
    pub(crate) fn bounded(&self, most: usize, what: &str) {
        let held = HEAP.peak_usage().saturating_sub(self.0);
        assert!(held < most, "{what}: {held} bytes");
    }
}

/// A peer of bare QUIC, with a window of so many bytes for each stream.
pub(crate) async fn dial(net: &Net, server: &Server, window: u32) -> Bare {
    let endpoint = net.bare().expect("an address");
    let config = bare::quic(bare::tls(&[b"udpack/1"]), window);
    Bare::dial(&endpoint, server.local_addr(), config)
        .await
        .expect("a sound handshake")
}
