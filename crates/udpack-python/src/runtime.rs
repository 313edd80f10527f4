//! The tokio runtime of the module, and what becomes of it in a forked child.
//!
//! The runtime's threads run QUIC, timers and file transfers. They never take the GIL, but for reading a file object of
//! Python. A forked child has none of these threads, and locks that they held stay locked there: the child gets an error
//! from every call, and drops nothing.

use std::ops::Deref;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::prelude::*;
use tokio::runtime::{Builder, EnterGuard, Runtime};

use crate::error::Failure;

/// Threads that run QUIC and timers.
const WORKERS: usize = 2;
/// Threads that may block: reading, hashing and writing files.
const BLOCKING: usize = 64;

static RUNTIME: OnceLock<Runtime> = OnceLock::new();
static FORKED: AtomicBool = AtomicBool::new(false);

/// Called in a child right after `fork`.
#[pyfunction]
pub(crate) fn forked() {
    if RUNTIME.get().is_some() {
        FORKED.store(true, Ordering::Relaxed);
    }
}

fn is_forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

/// The runtime, started by the first call.
pub(crate) fn runtime() -> Result<&'static Runtime, Failure> {
    if is_forked() {
        return Err(Failure::new(
            "ForkedError",
            "forked",
            "this process was forked after udpack was used: use udpack only after a fork, or start processes with `spawn`",
        ));
    }
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let built = Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING)
        .thread_name("udpack")
        .enable_all()
        .build()
        .map_err(|error| Failure::new("UdpackError", "internal", error.to_string()))?;
    Ok(RUNTIME.get_or_init(|| built))
}

/// Makes the runtime the one of this thread, until the guard is dropped.
pub(crate) fn enter() -> Result<EnterGuard<'static>, Failure> {
    Ok(runtime()?.enter())
}

/// Something whose drop needs the runtime. In a forked child it is leaked.
pub(crate) struct Held<T>(Option<T>);

impl<T> Held<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }

    pub(crate) fn into_inner(mut self) -> T {
        self.0
            .take()
            .expect("only `drop` takes the value, and this")
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0
            .as_ref()
            .expect("nobody has it once the value is taken")
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        let value = self.0.take();
        match enter() {
            Ok(_entered) => drop(value),
            Err(_) => std::mem::forget(value),
        }
    }
}
