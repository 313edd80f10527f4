//! Files: uploads, downloads and what is there, whole in Rust.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use tokio::sync::Mutex;
use udpack_transfer::{
    Download, Downloader, Entry, Event, Fetch, IfExists, Limiter, Link, Outcome, Overwrite,
    Progress, RelPath, Remote, Source, Store, StoreConfig, Upload, Uploader, Walk, Wanted,
};

use crate::error::Failure;
use crate::op::{Op, output};
use crate::runtime::{Held, enter};
use crate::socket::{Dial, PySocket, dial};

/// Bytes that are read of a Python file object at once.
const CHUNK: usize = 1 << 20;
/// How long the end of a download may take.
const CLOSING: Duration = Duration::from_secs(5);
/// Events that cross the GIL together at most.
const EVENTS: usize = 256;

/// Over what files travel: a socket, or an address that is connected to as often as needed.
#[pyclass(name = "Link", module = "udpack._udpack", frozen)]
pub(crate) struct PyLink {
    link: Held<Link>,
}

#[pymethods]
impl PyLink {
    /// Of a `Socket`, or of a URL and settings.
    #[new]
    #[pyo3(signature = (to, settings=None))]
    fn new(to: &Bound<'_, PyAny>, settings: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let _entered = enter()?;
        let link = match to.cast::<PySocket>() {
            Ok(socket) => Link::from(&*socket.get().inner),
            Err(_) => {
                let none = PyDict::new(to.py());
                let Dial { client, address } = dial(to.extract()?, settings.unwrap_or(&none))?;
                Link::new(client, address)
            }
        };
        Ok(Self {
            link: Held::new(link),
        })
    }

    /// Closes its socket in order, if it has one that it made itself.
    fn close(&self) -> PyResult<Op> {
        let link = self.link.clone();
        Op::with(async move {
            if let Some(socket) = link.live() {
                socket.close(udpack::CloseCode::NORMAL, "done").await;
            }
            output(|py| Ok(py.None()))
        })
    }

    /// What is there under a name, or below it; a list of dicts.
    #[pyo3(signature = (path=None, recursive=false, list=true))]
    fn entries(&self, path: Option<&str>, recursive: bool, list: bool) -> PyResult<Op> {
        let path = path.map(rel_path).transpose()?;
        let remote = Remote::new(&*self.link);
        Op::new(
            async move {
                let mut entries = Vec::new();
                if list {
                    let mut listing = remote.list(path.as_ref(), recursive);
                    while let Some(entry) = listing.next().await {
                        entries.push(entry?);
                    }
                } else {
                    entries.push(remote.stat(path.as_ref()).await?);
                }
                Ok::<_, udpack_transfer::TransferError>(entries)
            },
            |py, entries| {
                let list = PyList::empty(py);
                for found in &entries {
                    list.append(entry(py, found)?)?;
                }
                Ok(list.into_any().unbind())
            },
        )
    }

    /// Removes what is there; gives how many files and bytes.
    #[pyo3(signature = (path, recursive=false))]
    fn remove(&self, path: &str, recursive: bool) -> PyResult<Op> {
        let path = rel_path(path)?;
        let remote = Remote::new(&*self.link);
        Op::new(
            async move { remote.remove(&path, recursive).await },
            |py, removed| (removed.files, removed.bytes).into_py_any(py),
        )
    }

    /// Begins to upload `sources`: `("path", local, remote)`, `("bytes", bytes, remote)` or `("reader", file, remote)`.
    fn upload(
        &self,
        sources: Vec<(String, Bound<'_, PyAny>, String)>,
        settings: &Bound<'_, PyDict>,
    ) -> PyResult<Transfer> {
        let _entered = enter()?;
        let mut parts: Vec<Box<dyn Iterator<Item = Source> + Send>> = Vec::new();
        for (kind, what, remote) in sources {
            parts.push(source(&kind, &what, remote)?);
        }
        let mut uploader = Uploader::new(&*self.link);
        if let Some(lanes) = get(settings, "lanes")? {
            uploader = uploader.lanes(lanes);
        }
        if let Some(name) = get::<String>(settings, "if_exists")? {
            uploader = uploader.if_exists(if_exists(&name)?);
        }
        if let Some(preserve) = get(settings, "preserve")? {
            uploader = uploader.preserve(preserve);
        }
        if let Some(resume) = get(settings, "resume")? {
            uploader = uploader.resume(resume);
        }
        if let Some(rate) = get(settings, "limit")? {
            uploader = uploader.limit(Limiter::new(rate));
        }
        let upload = uploader.put(parts.into_iter().flatten());
        Ok(Transfer::new(Moving::Up(upload), None))
    }

    /// Begins to download `wanted`, pairs of names at the server and below `dir`.
    fn download(
        &self,
        wanted: Vec<(String, String, Option<u64>)>,
        dir: PathBuf,
        settings: &Bound<'_, PyDict>,
    ) -> PyResult<Transfer> {
        let _entered = enter()?;
        let exists = match get::<String>(settings, "if_exists")? {
            Some(name) => if_exists(&name)?,
            None => IfExists::default(),
        };
        let overwrite = match exists {
            IfExists::Overwrite => Overwrite::Always,
            IfExists::Rename => Overwrite::Rename,
            IfExists::Same | IfExists::Error | IfExists::Skip => Overwrite::Never,
        };
        let config = StoreConfig {
            shared: true,
            overwrite,
            ..StoreConfig::default()
        };
        let py = settings.py();
        let store = py.detach(|| Store::open(&dir, config));
        let store = store.map_err(|error| {
            PyErr::from(Failure::new(
                "TransferError",
                "local_file",
                error.to_string(),
            ))
        })?;
        let mut files = Vec::with_capacity(wanted.len());
        for (remote, local, size) in wanted {
            files.push(Wanted {
                remote: rel_path(&remote)?,
                local: rel_path(&local)?,
                size,
            });
        }
        let mut downloader = Downloader::new(&*self.link, store.clone())
            .if_exists(exists)
            .umask(Some(0o022));
        if let Some(lanes) = get(settings, "lanes")? {
            downloader = downloader.lanes(lanes);
        }
        if let Some(preserve) = get(settings, "preserve")? {
            downloader = downloader.preserve(preserve);
        }
        if let Some(rate) = get(settings, "limit")? {
            downloader = downloader.limit(Limiter::new(rate));
        }
        let download = Moving::Down(downloader.get(files));
        Ok(Transfer::new(download, Some(store)))
    }

    /// Reads a file into memory; gives `(bytes, outcome)`.
    fn fetch(&self, path: &str) -> PyResult<Op> {
        let path = rel_path(path)?;
        let fetch = Fetch::new(&*self.link);
        Op::new(
            async move {
                let mut bytes = Vec::new();
                let fetched = fetch.read(&path, &mut bytes).await?;
                Ok::<_, udpack_transfer::FetchError>((bytes, Outcome::from(fetched)))
            },
            |py, (bytes, done)| (PyBytes::new(py, &bytes), outcome(py, &done)?).into_py_any(py),
        )
    }
}

fn get<'py, T: FromPyObjectOwned<'py>>(
    settings: &Bound<'py, PyDict>,
    name: &str,
) -> PyResult<Option<T>> {
    match settings.get_item(name)? {
        Some(value) if !value.is_none() => value.extract::<T>().map(Some).map_err(Into::into),
        _ => Ok(None),
    }
}

fn rel_path(path: &str) -> PyResult<RelPath> {
    path.parse().map_err(|error| {
        PyErr::from(Failure::new(
            "TransferError",
            "policy",
            format!("{path:?}: {error}"),
        ))
    })
}

fn if_exists(name: &str) -> PyResult<IfExists> {
    Ok(match name {
        "same" => IfExists::Same,
        "error" => IfExists::Error,
        "skip" => IfExists::Skip,
        "overwrite" => IfExists::Overwrite,
        "rename" => IfExists::Rename,
        other => {
            return Err(PyValueError::new_err(format!(
                "if_exists is 'same', 'error', 'skip', 'overwrite' or 'rename', not {other:?}"
            )));
        }
    })
}

fn source(
    kind: &str,
    what: &Bound<'_, PyAny>,
    remote: String,
) -> PyResult<Box<dyn Iterator<Item = Source> + Send>> {
    match kind {
        "path" => Ok(Box::new(
            Walk::new(what.extract::<PathBuf>()?, remote).map(Source::from),
        )),
        "bytes" => {
            let bytes = what.cast::<PyBytes>()?.as_bytes().to_vec();
            Ok(Box::new(std::iter::once(Source::bytes(
                bytes,
                rel_path(&remote)?,
            ))))
        }
        _ => {
            let file = FileObject {
                file: what.clone().unbind(),
                rest: Vec::new(),
                at: 0,
            };
            Ok(Box::new(std::iter::once(Source::reader(
                file,
                rel_path(&remote)?,
            ))))
        }
    }
}

/// A file object of Python, read on a thread that may block, with the GIL.
struct FileObject {
    file: Py<PyAny>,
    rest: Vec<u8>,
    at: usize,
}

impl Read for FileObject {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.at == self.rest.len() {
            let read = Python::try_attach(|py| {
                let bytes = self.file.bind(py).call_method1("read", (CHUNK,))?;
                let bytes = bytes.cast_into::<PyBytes>()?;
                Ok::<_, PyErr>(bytes.as_bytes().to_vec())
            });
            self.rest = match read {
                Some(Ok(bytes)) => bytes,
                Some(Err(error)) => return Err(io::Error::other(error.to_string())),
                None => return Err(io::Error::other("Python has ended")),
            };
            self.at = 0;
        }
        let len = to.len().min(self.rest.len() - self.at);
        to[..len].copy_from_slice(&self.rest[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

enum Moving {
    Up(Upload),
    Down(Download),
}

impl Moving {
    async fn next(&mut self) -> Option<Event> {
        match self {
            Self::Up(upload) => upload.next().await,
            Self::Down(download) => download.next().await,
        }
    }
}

/// An upload or a download under way. Dropping it gives up what is unfinished.
#[pyclass(module = "udpack._udpack", frozen)]
pub(crate) struct Transfer {
    moving: Held<Arc<Mutex<Option<Moving>>>>,
    /// Where a download puts its files.
    store: Held<Option<Store>>,
}

impl Transfer {
    fn new(moving: Moving, store: Option<Store>) -> Self {
        Self {
            moving: Held::new(Arc::new(Mutex::new(Some(moving)))),
            store: Held::new(store),
        }
    }
}

#[pymethods]
impl Transfer {
    /// Gives up what is unfinished, and lets go of the directory of a download.
    fn close(&self) -> PyResult<Op> {
        let (moving, store) = (self.moving.clone(), self.store.clone());
        Op::with(async move {
            moving.lock().await.take();
            if let Some(store) = store {
                store.close(CLOSING).await;
            }
            output(|py| Ok(py.None()))
        })
    }

    /// What happened, as a list of dicts; `None` when every file has its outcome.
    fn next(&self) -> PyResult<Op> {
        let moving = self.moving.clone();
        Op::with(async move {
            let mut moving = moving.lock().await;
            let Some(moving) = moving.as_mut() else {
                return output(|py| Ok(py.None()));
            };
            let mut events: Vec<Event> = Vec::new();
            events.extend(moving.next().await);
            while !events.is_empty() && events.len() < EVENTS {
                match futures_util::FutureExt::now_or_never(moving.next()) {
                    Some(Some(event)) => events.push(event),
                    Some(None) | None => break,
                }
            }
            output(move |py| {
                if events.is_empty() {
                    return Ok(py.None());
                }
                let list = PyList::empty(py);
                for event in events {
                    list.append(happened(py, event)?)?;
                }
                Ok(list.into_any().unbind())
            })
        })
    }
}

fn happened<'py>(py: Python<'py>, event: Event) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let kind = match event {
        Event::Started { path, size, .. } => {
            dict.set_item("path", path)?;
            dict.set_item("size", size)?;
            "started"
        }
        Event::Resumed {
            path, bytes, size, ..
        } => {
            dict.set_item("path", path)?;
            dict.set_item("bytes", bytes)?;
            dict.set_item("size", size)?;
            "resumed"
        }
        Event::Progress(now) => {
            progress(&dict, &now)?;
            "progress"
        }
        Event::Done(done) => {
            dict.set_item("outcome", outcome(py, &done)?)?;
            "done"
        }
        Event::Failed { path, error, .. } => {
            dict.set_item("path", path)?;
            dict.set_item("error", Failure::from(error).object(py)?)?;
            "failed"
        }
        Event::Reconnecting {
            attempt,
            delay,
            reason,
        } => {
            dict.set_item("attempt", attempt)?;
            dict.set_item("delay", delay.as_secs_f64())?;
            dict.set_item("reason", reason)?;
            "reconnecting"
        }
        Event::Connected => "connected",
        _ => "unknown",
    };
    dict.set_item("kind", kind)?;
    Ok(dict)
}

fn progress(dict: &Bound<'_, PyDict>, now: &Progress) -> PyResult<()> {
    dict.set_item("bytes", now.acked)?;
    dict.set_item("total", now.total)?;
    dict.set_item("files_done", now.files_done)?;
    dict.set_item("files", now.files)?;
    dict.set_item("listed", now.listed)?;
    dict.set_item("moved", now.moved)
}

fn outcome<'py>(py: Python<'py>, done: &Outcome) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("path", &done.path)?;
    dict.set_item("size", done.size)?;
    dict.set_item("hash", PyBytes::new(py, &done.hash))?;
    dict.set_item("sent", done.sent)?;
    dict.set_item("resumed", done.resumed)?;
    dict.set_item("same", done.same)?;
    dict.set_item("skipped", done.skipped)?;
    dict.set_item("elapsed", done.elapsed.as_secs_f64())?;
    Ok(dict)
}

fn entry<'py>(py: Python<'py>, entry: &Entry) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("path", &entry.path)?;
    dict.set_item("kind", format!("{:?}", entry.kind).to_lowercase())?;
    dict.set_item("size", entry.size)?;
    Ok(dict)
}
