//! Channels: messages, requests, streams of items, and a server's rooms.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt as _, Stream};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use udpack::{
    Channel, CloseCode, CloseReason, EncodeError, Encoded, Fault, Items, Message, Position,
    PresenceDiff, PresenceEntry, PresenceMap, Priority, RecvError, Request, RequestError,
    SendError, Start, Why,
};

use crate::error::{Failure, side};
use crate::op::{Op, nothing, output};
use crate::runtime::{Held, enter, runtime};
use crate::socket::PySocket;
use crate::value::{self, Data, Names, Value};

/// Messages that cross the GIL together at most, and their bytes.
const BATCH: usize = 512;
const BATCH_BYTES: usize = 256 << 10;
/// Items that wait between Python and a stream.
const ITEMS: usize = 64;

pub(crate) fn priority(name: &str) -> PyResult<Priority> {
    match name {
        "bulk" => Ok(Priority::Bulk),
        "normal" => Ok(Priority::Normal),
        "high" => Ok(Priority::High),
        other => Err(PyValueError::new_err(format!(
            "a priority is 'bulk', 'normal' or 'high', not {other:?}"
        ))),
    }
}

pub(crate) fn seconds(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| PyValueError::new_err("a time is a number of seconds from 0 up"))
}

/// `[event, data]` as a frame.
pub(crate) fn encode(py: Python<'_>, event: &str, data: &Bound<'_, PyAny>) -> PyResult<Encoded> {
    let encoded = Encoded::new(event, &Data::new(data));
    encoded.map_err(|error: EncodeError| Failure::from(error).raise(py))
}

/// A close reason as a dict.
pub(crate) fn reason<'py>(py: Python<'py>, reason: &CloseReason) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("number", reason.code.value())?;
    dict.set_item("code", reason.code.name())?;
    dict.set_item("text", &reason.text)?;
    dict.set_item("by", side(reason.by))?;
    dict.set_item("retry", reason.retry)?;
    Ok(dict)
}

/// How a channel's messages ended.
type Ending = Option<RecvError>;

/// What one `recv` gives: messages, and how they ended if they did.
struct Batch {
    messages: Vec<Message>,
    ending: Option<Ending>,
}

async fn receive(channel: &Channel) -> Batch {
    let mut batch = Batch {
        messages: Vec::new(),
        ending: None,
    };
    let mut bytes = 0;
    let mut next = channel.recv().await;
    loop {
        match next {
            Ok(Some(message)) => {
                bytes += message.len();
                batch.messages.push(message);
            }
            Ok(None) => batch.ending = Some(None),
            Err(error) => batch.ending = Some(Some(error)),
        }
        if batch.ending.is_some() || batch.messages.len() >= BATCH || bytes >= BATCH_BYTES {
            return batch;
        }
        match channel.recv().now_or_never() {
            Some(more) => next = more,
            None => return batch,
        }
    }
}

/// A channel.
#[pyclass(name = "Channel", module = "udpack._udpack", frozen)]
pub(crate) struct PyChannel {
    pub(crate) inner: Held<Channel>,
    /// How the messages ended, once the last of them was handed out.
    ended: Arc<Mutex<Option<Ending>>>,
}

impl PyChannel {
    pub(crate) fn new(channel: Channel) -> Self {
        Self {
            inner: Held::new(channel),
            ended: Arc::default(),
        }
    }

    pub(crate) fn object(py: Python<'_>, channel: Channel) -> PyResult<Py<PyAny>> {
        Ok(Py::new(py, Self::new(channel))?.into_any())
    }

    fn ask<R: DeserializeOwned>(
        &self,
        py: Python<'_>,
        event: &str,
        data: &Bound<'_, PyAny>,
        timeout: Option<f64>,
        items: Option<&ItemSender>,
    ) -> PyResult<Request<R>> {
        let _entered = enter()?;
        // The errors of encoding are known at once.
        encode(py, event, data)?;
        let mut request = self.inner.request::<_, R>(event, &Data::new(data));
        if let Some(timeout) = timeout {
            request = request.timeout(seconds(timeout)?);
        }
        if let Some(items) = items.and_then(ItemSender::receiver) {
            request = request.with_items(values(items));
        }
        Ok(request)
    }
}

#[pymethods]
impl PyChannel {
    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }

    #[getter]
    fn id(&self) -> u64 {
        self.inner.id()
    }

    #[getter]
    fn resumable(&self) -> bool {
        self.inner.is_resumable()
    }

    #[getter]
    fn unconfirmed(&self) -> u64 {
        self.inner.unconfirmed()
    }

    #[getter]
    fn queued_bytes(&self) -> usize {
        self.inner.queued_bytes()
    }

    #[getter]
    fn peer(&self) -> Option<String> {
        self.inner.peer().map(|peer| peer.id().to_owned())
    }

    fn claim(&self, key: &str) -> Option<String> {
        self.inner.peer()?.claim(key).map(str::to_owned)
    }

    #[getter]
    fn session_id(&self) -> String {
        self.inner.session_id().to_string()
    }

    #[getter]
    fn meta(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let meta = self.inner.meta::<Value>().ok().flatten();
        let meta = meta.map(|meta| value::to_python(py, &meta)).transpose()?;
        Ok(meta.map(Bound::unbind))
    }

    fn socket(&self) -> PySocket {
        PySocket::new(self.inner.socket())
    }

    /// Queues a message; `None`, or an operation that waits for room.
    fn send(&self, py: Python<'_>, event: &str, data: &Bound<'_, PyAny>) -> PyResult<Option<Op>> {
        runtime()?;
        let message = encode(py, event, data)?;
        match self.inner.try_send_encoded(&message) {
            Ok(true) => Ok(None),
            Ok(false) => {
                let channel = self.inner.clone();
                Op::new(async move { channel.send_encoded(&message).await }, nothing).map(Some)
            }
            Err(error) => Err(Failure::from(error).raise(py)),
        }
    }

    /// Queues messages, pairs of event and data, as long as there is room. `None`, or how many were queued and an
    /// operation that waits for room for one more and queues it.
    fn send_many(
        &self,
        py: Python<'_>,
        messages: Vec<(PyBackedStr, Bound<'_, PyAny>)>,
    ) -> PyResult<Option<(usize, Op)>> {
        for (index, (event, data)) in messages.iter().enumerate() {
            if let Some(waiting) = self.send(py, event, data)? {
                return Ok(Some((index + 1, waiting)));
            }
        }
        Ok(None)
    }

    /// Queues a message if there is room; says whether there was.
    fn try_send(&self, py: Python<'_>, event: &str, data: &Bound<'_, PyAny>) -> PyResult<bool> {
        runtime()?;
        let message = encode(py, event, data)?;
        let sent = self.inner.try_send_encoded(&message);
        sent.map_err(|error| Failure::from(error).raise(py))
    }

    /// The next messages as a list: `(event, data)` of each, or with `whole` a `Message`. `None` after the last.
    fn recv(&self, whole: bool) -> PyResult<Op> {
        let (channel, ended) = (self.inner.clone(), self.ended.clone());
        Op::with(async move {
            let over = ended.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let batch = match over {
                Some(ending) => Batch {
                    messages: Vec::new(),
                    ending: Some(ending),
                },
                None => receive(&channel).await,
            };
            if batch.ending.is_some() {
                *ended.lock().unwrap_or_else(PoisonError::into_inner) = batch.ending.clone();
            }
            output(move |py| match (batch.messages.is_empty(), batch.ending) {
                (true, Some(Some(error))) => Err(Failure::from(error).raise(py)),
                (true, _) => Ok(py.None()),
                _ if whole => wholes(py, &channel, batch.messages),
                _ => pairs(py, &channel, &batch.messages),
            })
        })
    }

    /// Asks the peer; gives the reply.
    #[pyo3(signature = (event, data, timeout=None, items=None))]
    fn request(
        &self,
        py: Python<'_>,
        event: &str,
        data: &Bound<'_, PyAny>,
        timeout: Option<f64>,
        items: Option<&ItemSender>,
    ) -> PyResult<Op> {
        let request = self.ask::<Value>(py, event, data, timeout, items)?;
        Op::new(request.into_future(), |py, reply: Value| {
            Ok(value::to_python(py, &reply)?.unbind())
        })
    }

    /// Asks the peer for a stream; gives an `ItemReader`.
    #[pyo3(signature = (event, data, timeout=None, items=None))]
    fn request_items(
        &self,
        py: Python<'_>,
        event: &str,
        data: &Bound<'_, PyAny>,
        timeout: Option<f64>,
        items: Option<&ItemSender>,
    ) -> PyResult<Op> {
        let request = self.ask::<()>(py, event, data, timeout, items)?;
        Op::new(request.items::<Value>(), |py, items: Items<Value>| {
            ItemReader::new(items).into_py_any(py)
        })
    }

    /// Ends the sending direction; waits until the peer's transport has everything.
    fn finish(&self) -> PyResult<Op> {
        let channel = self.inner.clone();
        Op::new(async move { channel.finish().await }, nothing)
    }

    /// Closes both directions; gives the reason that counts.
    #[pyo3(signature = (number=0, text=""))]
    fn close(&self, number: u64, text: &str) -> PyResult<Op> {
        let closed = {
            let _entered = enter()?;
            self.inner.close(CloseCode::new(number), text)
        };
        Op::with(async move {
            let why = closed.await;
            output(move |py| Ok(reason(py, &why)?.into_any().unbind()))
        })
    }

    /// Waits until the channel is over; gives the reason.
    fn closed(&self) -> PyResult<Op> {
        let channel = self.inner.clone();
        Op::with(async move {
            let why = channel.closed().await;
            output(move |py| Ok(reason(py, &why)?.into_any().unbind()))
        })
    }

    #[getter]
    fn close_reason<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let why = self.inner.close_reason();
        why.map(|why| reason(py, &why)).transpose()
    }

    /// How far this side has come in rooms with a history: `(room, epoch, offset)` of each.
    #[getter]
    fn positions(&self) -> Vec<(String, u64, u64)> {
        let positions = self.inner.positions().into_iter();
        positions
            .map(|place| (place.room, place.epoch, place.offset))
            .collect()
    }

    /// `start`: `None` where the opener was, `"now"`, `"oldest"`, or an epoch and an offset.
    #[pyo3(signature = (room, start=None))]
    fn join(&self, py: Python<'_>, room: &str, start: Option<Begin>) -> PyResult<()> {
        let _entered = enter()?;
        let joined = match start {
            None => self.inner.join(room),
            Some(Begin::Position(epoch, offset)) => {
                let since = Start::Since(Position { epoch, offset });
                self.inner.join_at(room, since)
            }
            Some(Begin::Name(name)) => {
                let start = match name.as_str() {
                    "now" => Start::Now,
                    "oldest" => Start::Oldest,
                    other => {
                        return Err(PyValueError::new_err(format!(
                            "start is 'now', 'oldest' or an epoch and an offset, not {other:?}"
                        )));
                    }
                };
                self.inner.join_at(room, start)
            }
        };
        joined.map_err(|error| Failure::from(error).raise(py))
    }

    fn leave(&self, room: &str) -> PyResult<bool> {
        let _entered = enter()?;
        Ok(self.inner.leave(room))
    }

    #[getter]
    fn rooms(&self) -> Vec<String> {
        self.inner.rooms()
    }

    fn track(&self, py: Python<'_>, room: &str, meta: &Bound<'_, PyAny>) -> PyResult<()> {
        let _entered = enter()?;
        let meta = value::from_python(meta)?;
        self.inner
            .track(room, &meta)
            .map_err(|error| Failure::from(error).raise(py))
    }

    fn untrack(&self, room: &str) -> PyResult<bool> {
        let _entered = enter()?;
        Ok(self.inner.untrack(room))
    }
}

/// Where a member begins.
#[derive(FromPyObject)]
enum Begin {
    Name(String),
    Position(u64, u64),
}

fn data<'py>(py: Python<'py>, message: &Message) -> PyResult<Bound<'py, PyAny>> {
    match message.gap() {
        Some(gap) => {
            let class = py.import("udpack.errors")?.getattr("Gap")?;
            let Some(missing) = gap.missing else {
                return class.call1((gap.room, gap.lost));
            };
            let why = match missing.why {
                Why::Slow => "slow",
                Why::Gone => "gone",
                Why::Epoch => "epoch",
                _ => "other",
            };
            class.call1((
                gap.room,
                gap.lost,
                missing.epoch,
                missing.from,
                missing.to,
                why,
            ))
        }
        None => value::decode(py, &message.raw()),
    }
}

fn pairs(py: Python<'_>, channel: &Channel, messages: &[Message]) -> PyResult<Py<PyAny>> {
    let list = PyList::empty(py);
    let mut names = Names::default();
    for message in messages {
        if message.id().is_some() {
            refuse(channel, message.clone())?;
        }
        let name = names.object(py, message.event());
        let data = match message.event().as_bytes().first() {
            Some(b'$') => data(py, message)?,
            _ => names.decode(py, &message.raw())?,
        };
        list.append(PyTuple::new(py, [name.into_any(), data])?)?;
    }
    Ok(list.into_any().unbind())
}

/// Tells the asker that nobody here answers: who reads pairs cannot.
fn refuse(channel: &Channel, message: Message) -> PyResult<()> {
    let channel = channel.clone();
    let fault = Fault::new(
        Fault::NO_HANDLER,
        "this program reads events and answers no requests",
    );
    runtime()?.spawn(async move {
        let _ = channel.fault(&message, &fault).await;
    });
    Ok(())
}

fn wholes(py: Python<'_>, channel: &Channel, messages: Vec<Message>) -> PyResult<Py<PyAny>> {
    let list = PyList::empty(py);
    for message in messages {
        let channel = Held::new(channel.clone());
        list.append(Py::new(py, PyMessage { channel, message })?)?;
    }
    Ok(list.into_any().unbind())
}

/// A received message: an event, or a request to be answered.
#[pyclass(name = "Message", module = "udpack._udpack", frozen)]
pub(crate) struct PyMessage {
    channel: Held<Channel>,
    message: Message,
}

#[pymethods]
impl PyMessage {
    #[getter]
    fn event(&self) -> &str {
        self.message.event()
    }

    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        data(py, &self.message)
    }

    #[getter]
    fn is_request(&self) -> bool {
        self.message.id().is_some()
    }

    #[getter]
    fn deadline(&self) -> Option<f64> {
        self.message
            .deadline()
            .map(|deadline| deadline.as_secs_f64())
    }

    fn reply(&self, data: &Bound<'_, PyAny>) -> PyResult<Op> {
        let data = value::from_python(data)?;
        let (channel, message) = (self.channel.clone(), self.message.clone());
        Op::new(async move { channel.reply(&message, &data).await }, nothing)
    }

    #[pyo3(signature = (code, text, data=None))]
    fn fault(&self, code: &str, text: &str, data: Option<&Bound<'_, PyAny>>) -> PyResult<Op> {
        let fault = fault(code, text, data)?;
        let (channel, message) = (self.channel.clone(), self.message.clone());
        Op::new(
            async move { channel.fault(&message, &fault).await },
            nothing,
        )
    }

    /// The MessagePack of the data.
    fn raw<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.message.raw())
    }
}

pub(crate) fn fault(code: &str, text: &str, data: Option<&Bound<'_, PyAny>>) -> PyResult<Fault> {
    let fault = Fault::new(code, text);
    match data {
        Some(data) => Ok(fault.with_data(&value::from_python(data)?)),
        None => Ok(fault),
    }
}

/// An item of a stream, or the fault that ends it.
type Item = Result<Value, Fault>;

/// Where Python puts the items of a stream: at most 64 wait.
#[pyclass(module = "udpack._udpack", frozen)]
pub(crate) struct ItemSender {
    sender: Mutex<Option<mpsc::Sender<Item>>>,
    receiver: Mutex<Option<mpsc::Receiver<Item>>>,
}

impl ItemSender {
    fn receiver(&self) -> Option<mpsc::Receiver<Item>> {
        let mut receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        receiver.take()
    }

    /// The items as a stream that may fail.
    pub(crate) fn stream(&self) -> Option<impl Stream<Item = Item> + Send + 'static> {
        let receiver = self.receiver()?;
        Some(futures_util::stream::unfold(
            receiver,
            async |mut receiver| receiver.recv().await.map(|item| (item, receiver)),
        ))
    }
}

/// The items until the first fault.
fn values(receiver: mpsc::Receiver<Item>) -> impl Stream<Item = Value> + Send + 'static {
    futures_util::stream::unfold(receiver, async |mut receiver| match receiver.recv().await {
        Some(Ok(value)) => Some((value, receiver)),
        Some(Err(_)) | None => None,
    })
}

#[pymethods]
impl ItemSender {
    #[new]
    fn new() -> Self {
        let (sender, receiver) = mpsc::channel(ITEMS);
        Self {
            sender: Mutex::new(Some(sender)),
            receiver: Mutex::new(Some(receiver)),
        }
    }

    /// Adds an item. `True`, or an operation that waits for room and gives whether the stream goes on.
    fn push(&self, py: Python<'_>, item: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        self.put(py, Ok(value::from_python(item)?))
    }

    /// Ends the stream with a fault.
    #[pyo3(signature = (code, text, data=None))]
    fn fail(
        &self,
        py: Python<'_>,
        code: &str,
        text: &str,
        data: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        self.put(py, Err(fault(code, text, data)?))
    }

    /// Ends the stream.
    fn end(&self) {
        self.sender
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}

impl ItemSender {
    fn put(&self, py: Python<'_>, item: Item) -> PyResult<Py<PyAny>> {
        let sender = self
            .sender
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let Some(sender) = sender else {
            return false.into_py_any(py);
        };
        match sender.try_send(item) {
            Ok(()) => true.into_py_any(py),
            Err(mpsc::error::TrySendError::Closed(_)) => false.into_py_any(py),
            Err(mpsc::error::TrySendError::Full(item)) => Op::with(async move {
                let sent = sender.send(item).await.is_ok();
                output(move |py| sent.into_py_any(py))
            })?
            .into_py_any(py),
        }
    }
}

/// A stream of items that arrives.
#[pyclass(module = "udpack._udpack", frozen)]
pub(crate) struct ItemReader {
    items: Held<Arc<tokio::sync::Mutex<Option<Items<Value>>>>>,
}

impl ItemReader {
    pub(crate) fn new(items: Items<Value>) -> Self {
        Self {
            items: Held::new(Arc::new(tokio::sync::Mutex::new(Some(items)))),
        }
    }
}

impl ItemReader {
    pub(crate) fn held(items: Held<Items<Value>>) -> Self {
        Self::new(items.into_inner())
    }
}

#[pymethods]
impl ItemReader {
    /// The next items as a list; `None` after the last.
    fn next(&self) -> PyResult<Op> {
        let items = self.items.clone();
        Op::with(async move {
            let mut guard = items.lock().await;
            let Some(items) = guard.as_mut() else {
                return output(|py| Ok(py.None()));
            };
            let mut batch = Vec::new();
            let mut failed: Option<RequestError> = None;
            let mut next = items.next().await;
            loop {
                match next {
                    Some(Ok(item)) => batch.push(item),
                    Some(Err(error)) => {
                        failed = Some(error);
                        break;
                    }
                    None => break,
                }
                if batch.len() >= BATCH {
                    break;
                }
                match items.next().now_or_never() {
                    Some(more) => next = more,
                    None => break,
                }
            }
            drop(guard);
            // Items in front of a failure are handed out with it, so that none is lost.
            output(move |py| match (batch.is_empty(), failed) {
                (true, None) => Ok(py.None()),
                (_, failed) => {
                    let list = PyList::empty(py);
                    for item in &batch {
                        list.append(value::to_python(py, item)?)?;
                    }
                    if let Some(failed) = failed {
                        list.append(Failure::from(failed).object(py)?)?;
                    }
                    Ok(list.into_any().unbind())
                }
            })
        })
    }

    /// Wants no more: at the asker it cancels the request.
    fn stop(&self) -> PyResult<()> {
        let _entered = enter()?;
        if let Ok(mut items) = self.items.try_lock() {
            items.take();
        }
        Ok(())
    }
}

/// Who is present in one room.
#[pyclass(name = "PresenceMap", module = "udpack._udpack")]
pub(crate) struct PyPresence {
    map: PresenceMap,
}

#[pymethods]
impl PyPresence {
    #[new]
    fn new(room: &str) -> Self {
        Self {
            map: PresenceMap::new(room),
        }
    }

    /// Takes an event in; `(joins, leaves, why)`, lists of `(peer, session, meta)` and a word, or `None` if it is about something else.
    fn apply(
        &mut self,
        py: Python<'_>,
        event: &str,
        data: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Py<PyAny>>> {
        if !matches!(event, "presence_state" | "presence_diff") {
            return Ok(None);
        }
        let frame: Bytes = encode(py, event, data)?.bytes().clone();
        let Ok(message) = Message::decode(frame.slice(udpack::wire::PREFIX..)) else {
            return Ok(None);
        };
        let Some(PresenceDiff {
            joins, leaves, why, ..
        }) = self.map.apply(&message)
        else {
            return Ok(None);
        };
        let change = (entries(py, &joins)?, entries(py, &leaves)?, why);
        Ok(Some(change.into_pyobject(py)?.into_any().unbind()))
    }

    #[getter]
    fn peers(&self) -> Vec<String> {
        self.map.peers().map(str::to_owned).collect()
    }

    fn metas(&self, py: Python<'_>, peer: &str) -> PyResult<Vec<Py<PyAny>>> {
        let metas = self.map.metas::<Value>(peer).into_iter().flatten();
        let metas = metas.map(|meta| Ok(value::to_python(py, &meta)?.unbind()));
        metas.collect()
    }

    fn __len__(&self) -> usize {
        self.map.len()
    }
}

fn entries<'py>(py: Python<'py>, entries: &[PresenceEntry]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for entry in entries {
        let meta = entry.meta::<Value>().unwrap_or(Value::Nil);
        let meta = value::to_python(py, &meta)?;
        list.append((entry.peer(), entry.session(), meta))?;
    }
    Ok(list)
}

/// The error of something that is sent at once.
pub(crate) fn sent(py: Python<'_>, result: Result<(), SendError>) -> PyResult<()> {
    result.map_err(|error| Failure::from(error).raise(py))
}

/// The body of a message, as it travels.
#[pyfunction]
pub(crate) fn pack<'py>(
    py: Python<'py>,
    event: &str,
    data: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyBytes>> {
    let message = encode(py, event, data)?;
    let frame = message.bytes();
    Ok(PyBytes::new(py, &frame[udpack::wire::PREFIX..]))
}

/// Event, data and id of a message's body.
#[pyfunction]
pub(crate) fn unpack<'py>(
    py: Python<'py>,
    body: &[u8],
) -> PyResult<(String, Bound<'py, PyAny>, Option<u64>)> {
    let message = Message::decode(Bytes::copy_from_slice(body)).map_err(|error| {
        Failure::new(
            "ProtocolError",
            error.close_code().name(),
            error.to_string(),
        )
        .raise(py)
    })?;
    let data = value::decode(py, &message.raw())?;
    Ok((message.event().to_owned(), data, message.id()))
}
