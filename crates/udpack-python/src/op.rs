//! [`Op`]: an operation that waits, for asyncio and for threads. [`Bridge`]: how it wakes an event loop.
//!
//! A future of the Rust libraries is polled by the Python thread that waits for it. When it can go on, its waker
//! writes its number into the loop's bridge, and one byte into a socket which the loop watches, if none is there
//! already. So no thread of tokio ever needs the GIL, a wake of the loop takes all operations that are ready, and a loop
//! that is closed or an interpreter that ends leaves nobody waiting for it. Dropping an `Op` drops the future.

use std::future::Future;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyTimeoutError;
use pyo3::prelude::*;

use crate::error::Failure;
use crate::runtime::{Held, enter};

/// How often a waiting thread looks for signals, such as that of Ctrl-C.
const SIGNALS: Duration = Duration::from_millis(100);

/// Makes the result of an operation, when Python takes it.
pub(crate) type Output = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;
type Work = Pin<Box<dyn Future<Output = Output> + Send>>;

enum State {
    Running(Held<Mutex<Work>>),
    Done(Mutex<Output>),
    Over,
}

/// An operation that was begun and may have to wait.
#[pyclass(module = "udpack._udpack")]
pub(crate) struct Op {
    id: u64,
    state: State,
    waker: Option<Arc<Knock>>,
}

/// Puts an operation into its loop's bridge.
struct Knock {
    id: u64,
    signal: Arc<Signal>,
    waiting: AtomicBool,
}

impl Wake for Knock {
    fn wake(self: Arc<Self>) {
        if self.waiting.swap(false, Ordering::AcqRel) {
            self.signal.ring(self.id);
        }
    }
}

struct Signal {
    woken: Mutex<Vec<u64>>,
    sender: UnixStream,
}

impl Signal {
    fn ring(&self, id: u64) {
        let first = {
            let mut woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
            woken.push(id);
            woken.len() == 1
        };
        if first {
            // A full socket wakes the loop as well, and one that is closed has no loop.
            let _ = (&self.sender).write(&[1]);
        }
    }
}

/// What an event loop watches: readable when operations can go on.
#[pyclass(module = "udpack._udpack", frozen)]
pub(crate) struct Bridge {
    signal: Arc<Signal>,
    receiver: UnixStream,
}

#[pymethods]
impl Bridge {
    #[new]
    fn new() -> PyResult<Self> {
        let (sender, receiver) = UnixStream::pair()?;
        sender.set_nonblocking(true)?;
        receiver.set_nonblocking(true)?;
        let signal = Arc::new(Signal {
            woken: Mutex::default(),
            sender,
        });
        Ok(Self { signal, receiver })
    }

    fn fileno(&self) -> i32 {
        self.receiver.as_raw_fd()
    }

    /// The numbers of the operations that can go on; each once.
    fn woken(&self) -> Vec<u64> {
        let mut bytes = [0; 64];
        while matches!((&self.receiver).read(&mut bytes), Ok(64)) {}
        let mut woken = self
            .signal
            .woken
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *woken)
    }
}

impl Op {
    /// An operation whose result is made by a closure.
    pub(crate) fn with<F>(future: F) -> PyResult<Self>
    where
        F: Future<Output = Output> + Send + 'static,
    {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let _entered = enter()?;
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            state: State::Running(Held::new(Mutex::new(Box::pin(future)))),
            waker: None,
        })
    }

    /// An operation whose result is made of what the future gives.
    pub(crate) fn new<F, T, E, M>(future: F, make: M) -> PyResult<Self>
    where
        F: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: Into<Failure>,
        M: FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    {
        Self::with(async move {
            let result = future.await.map_err(Into::<Failure>::into);
            output(move |py| match result {
                Ok(value) => make(py, value),
                Err(failure) => Err(failure.raise(py)),
            })
        })
    }

    fn poll_with(&mut self, waker: &Waker) -> Result<bool, Failure> {
        let State::Running(work) = &self.state else {
            return Ok(true);
        };
        let polled = {
            let _entered = enter()?;
            let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
            work.as_mut().poll(&mut Context::from_waker(waker))
        };
        match polled {
            Poll::Ready(output) => {
                self.state = State::Done(Mutex::new(output));
                Ok(true)
            }
            Poll::Pending => Ok(false),
        }
    }
}

/// A result that is made when Python takes it.
pub(crate) fn output(
    make: impl FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send + 'static,
) -> Output {
    Box::new(make)
}

/// For operations that give nothing.
pub(crate) fn nothing<T>(py: Python<'_>, _: T) -> PyResult<Py<PyAny>> {
    Ok(py.None())
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[pymethods]
impl Op {
    /// Its number, as its bridge gives it.
    #[getter]
    fn id(&self) -> u64 {
        self.id
    }

    /// Goes on as far as it can; says whether it is over. If not, the bridge will have its number.
    fn poll(&mut self, bridge: &Bridge) -> PyResult<bool> {
        let knock = match &self.waker {
            Some(knock) if Arc::ptr_eq(&knock.signal, &bridge.signal) => knock.clone(),
            _ => Arc::new(Knock {
                id: self.id,
                signal: bridge.signal.clone(),
                waiting: AtomicBool::new(false),
            }),
        };
        knock.waiting.store(true, Ordering::Release);
        self.waker = Some(knock.clone());
        Ok(self.poll_with(&Waker::from(knock))?)
    }

    /// The result; once, when `poll` has said that it is over.
    fn take(&mut self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Done(output) => output.into_inner().unwrap_or_else(PoisonError::into_inner)(py),
            State::Running(_) | State::Over => {
                Err(
                    Failure::new("UdpackError", "internal", "the operation has no result")
                        .raise(py),
                )
            }
        }
    }

    /// Waits on this thread, at most this many seconds; says whether it is over.
    fn ready(slf: Bound<'_, Self>, timeout: f64) -> PyResult<bool> {
        let until = crate::channel::seconds(timeout)?;
        await_on_thread(&slf, Instant::now().checked_add(until))
    }

    /// Waits for the result on this thread, at most this many seconds.
    #[pyo3(signature = (timeout=None))]
    fn wait(slf: Bound<'_, Self>, timeout: Option<f64>) -> PyResult<Py<PyAny>> {
        let until = timeout.map(crate::channel::seconds).transpose()?;
        let until = until.and_then(|limit| Instant::now().checked_add(limit));
        if await_on_thread(&slf, until)? {
            return slf.borrow_mut().take(slf.py());
        }
        slf.borrow_mut().cancel();
        Err(PyTimeoutError::new_err("not done in time"))
    }

    /// Gives the operation up, as dropping its future does.
    fn cancel(&mut self) {
        self.state = State::Over;
    }
}

/// Polls on this thread until the operation is over, or until then. A signal's exception gives the operation up.
fn await_on_thread(op: &Bound<'_, Op>, until: Option<Instant>) -> PyResult<bool> {
    let py = op.py();
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        if op.borrow_mut().poll_with(&waker)? {
            return Ok(true);
        }
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(false);
        }
        py.detach(|| thread::park_timeout(left.map_or(SIGNALS, |left| left.min(SIGNALS))));
        py.check_signals()
            .inspect_err(|_| op.borrow_mut().cancel())?;
    }
}
