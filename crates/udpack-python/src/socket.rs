//! Connecting, and the sockets of clients and servers.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};
use tokio::sync::Mutex;
use udpack::{
    Client, CloseCode, ConnectUrl, Fingerprint, RoomPosition, Socket, SocketState, SocketStates,
    Transport, Volatile,
};

use crate::channel::{PyChannel, encode, priority as by_name, reason, sent};
use crate::error::Failure;
use crate::op::{Op, nothing, output};
use crate::runtime::{Held, enter};
use crate::settings;
use crate::value::{self, Value};

/// Volatile messages that cross the GIL together at most.
const BATCH: usize = 256;

/// What a client is made of: where to connect, and how.
pub(crate) struct Dial {
    pub(crate) client: Client,
    pub(crate) address: String,
}

/// Reads the arguments of `connect`.
pub(crate) fn dial(url: &str, settings: &Bound<'_, PyDict>) -> PyResult<Dial> {
    let _entered = enter()?;
    let bad = |error: String| PyErr::from(Failure::new("ConnectError", "address", error));
    let parsed: ConnectUrl = url.parse().map_err(|error| bad(format!("{error}")))?;
    let mut builder = Client::builder().agent(concat!("udpack-python/", env!("CARGO_PKG_VERSION")));
    let text = |name: &str| -> PyResult<Option<String>> {
        settings
            .get_item(name)?
            .map(|value| value.extract())
            .transpose()
    };
    let pin = match text("key")? {
        Some(key) => Some(
            key.parse::<Fingerprint>()
                .map_err(|error| PyValueError::new_err(format!("key: {error}")))?,
        ),
        None => parsed.pin(),
    };
    if let Some(pin) = pin {
        builder = builder.pin(pin);
    }
    if let Some(token) = text("token")?.or_else(|| parsed.token().map(str::to_owned)) {
        builder = builder.token(token);
    }
    if let Some(agent) = text("agent")? {
        builder = builder.agent(agent);
    }
    let dict = |name: &str| -> PyResult<Option<Bound<'_, PyDict>>> {
        let value = settings.get_item(name)?;
        value
            .map(|value| Ok(value.cast_into::<PyDict>()?))
            .transpose()
    };
    builder = builder
        .timeouts(settings::timeouts(dict("timeouts")?.as_ref())?)
        .limits(settings::limits(dict("limits")?.as_ref())?)
        .accept_channels();
    if let Some(value) = settings.get_item("reconnect")?
        && let Some(reconnect) = settings::reconnect(&value)?
    {
        builder = builder.reconnect(reconnect);
    }
    if let Some(over) = text("transport")? {
        builder = builder.transport(settings::transport(&over)?);
    }
    if let Some(local) = text("local_address")? {
        let local = local
            .parse()
            .map_err(|error| PyValueError::new_err(format!("local_address: {error}")))?;
        builder = builder.local_address(local);
    }
    if let Some(value) = settings.get_item("proxy")?
        && let Some(proxy) = settings::proxy(&value)?
    {
        builder = builder.proxy(proxy);
    }
    let client = builder
        .build()
        .map_err(|error| PyErr::from(Failure::from(error)))?;
    let host = parsed.host();
    let address = match host.contains(':') {
        true => format!("[{host}]:{}", parsed.port()),
        false => format!("{host}:{}", parsed.port()),
    };
    Ok(Dial { client, address })
}

/// Connects; gives a `Socket`.
#[pyfunction]
pub(crate) fn connect(url: &str, settings: &Bound<'_, PyDict>) -> PyResult<Op> {
    let Dial { client, address } = dial(url, settings)?;
    Op::new(
        async move { client.connect(&address).await },
        |py, socket| PySocket::new(socket).into_py_any(py),
    )
}

/// A session with one peer.
#[pyclass(name = "Socket", module = "udpack._udpack", frozen)]
pub(crate) struct PySocket {
    pub(crate) inner: Held<Socket>,
}

impl PySocket {
    pub(crate) fn new(socket: Socket) -> Self {
        Self {
            inner: Held::new(socket),
        }
    }
}

#[pymethods]
impl PySocket {
    #[getter]
    fn id(&self) -> String {
        self.inner.id().to_string()
    }

    #[getter]
    fn agent(&self) -> String {
        self.inner.agent()
    }

    #[getter]
    fn peer(&self) -> String {
        self.inner.peer().id().to_owned()
    }

    #[getter]
    fn remote_address(&self) -> (String, u16) {
        let address = self.inner.remote_address();
        (address.ip().to_string(), address.port())
    }

    #[getter]
    fn is_connected(&self) -> bool {
        self.inner.is_connected()
    }

    #[getter]
    fn transport(&self) -> &'static str {
        match self.inner.transport() {
            Transport::Quic => "quic",
            Transport::WebTransport { .. } => "webtransport",
            Transport::WebSocket { .. } => "wss",
            _ => "other",
        }
    }

    #[getter]
    fn expires_in(&self) -> Option<f64> {
        self.inner.expires_in().map(|left| left.as_secs_f64())
    }

    #[getter]
    fn close_reason<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let why = self.inner.close_reason();
        why.map(|why| reason(py, &why)).transpose()
    }

    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        state(py, &self.inner.state())
    }

    /// Bytes, packets and round-trip time so far.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.inner.stats();
        let dict = PyDict::new(py);
        dict.set_item("sent", stats.sent)?;
        dict.set_item("received", stats.received)?;
        dict.set_item("wire_sent", stats.wire_sent)?;
        dict.set_item("wire_received", stats.wire_received)?;
        dict.set_item("packets_sent", stats.packets_sent)?;
        dict.set_item("packets_lost", stats.packets_lost)?;
        dict.set_item("rtt", stats.rtt.as_secs_f64())?;
        Ok(dict)
    }

    /// Opens a channel; gives a `Channel`.
    #[pyo3(signature = (name, meta=None, resumable=false, priority="normal", since=Vec::new()))]
    fn open(
        &self,
        name: String,
        meta: Option<&Bound<'_, PyAny>>,
        resumable: bool,
        priority: &str,
        since: Vec<(String, u64, u64)>,
    ) -> PyResult<Op> {
        let priority = by_name(priority)?;
        let since = since.into_iter().map(|(room, epoch, offset)| RoomPosition {
            room,
            epoch,
            offset,
        });
        let since: Vec<_> = since.collect();
        let meta = meta.map(value::from_python).transpose()?;
        let socket = self.inner.clone();
        Op::new(
            async move {
                let mut channel = socket.channel(&name).priority(priority).since(since);
                if resumable {
                    channel = channel.resumable();
                }
                match &meta {
                    Some(meta) => channel.meta::<Value>(meta).open().await,
                    None => channel.open().await,
                }
            },
            PyChannel::object,
        )
    }

    /// The next channel that the peer opens; gives a `Channel`, or `None` when the socket is over.
    fn accept_channel(&self) -> PyResult<Op> {
        let socket = self.inner.clone();
        Op::with(async move {
            let channel = socket.accept_channel().await;
            output(move |py| match channel {
                Some(channel) => PyChannel::object(py, channel),
                None => Ok(py.None()),
            })
        })
    }

    /// Sends a message of which only the newest counts.
    #[pyo3(signature = (event, data, key=None))]
    fn send_volatile(
        &self,
        py: Python<'_>,
        event: &str,
        data: &Bound<'_, PyAny>,
        key: Option<&str>,
    ) -> PyResult<()> {
        let _entered = enter()?;
        let message = encode(py, event, data)?;
        sent(py, self.inner.send_volatile_encoded(key, &message))
    }

    /// The next volatile messages as a list of `(event, data, key)`; `None` when the socket is over.
    fn recv_volatile(&self) -> PyResult<Op> {
        let socket = self.inner.clone();
        Op::with(async move {
            let mut batch: Vec<Volatile> = Vec::new();
            batch.extend(socket.recv_volatile().await);
            while !batch.is_empty() && batch.len() < BATCH {
                match socket.recv_volatile().now_or_never() {
                    Some(Some(message)) => batch.push(message),
                    Some(None) | None => break,
                }
            }
            output(move |py| {
                if batch.is_empty() {
                    return Ok(py.None());
                }
                let list = PyList::empty(py);
                for message in &batch {
                    let data = value::decode(py, &message.raw())?;
                    list.append((message.event(), data, message.key()))?;
                }
                Ok(list.into_any().unbind())
            })
        })
    }

    /// The state of the connection, and each change of it.
    fn states(&self) -> PyResult<States> {
        let _entered = enter()?;
        let states = self.inner.states();
        Ok(States {
            states: Held::new(Arc::new(Mutex::new(states))),
        })
    }

    /// Presents a new token.
    fn refresh(&self, token: String) -> PyResult<Op> {
        let socket = self.inner.clone();
        Op::new(async move { socket.refresh(token).await }, nothing)
    }

    /// Closes in order; gives the reason that counts.
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

    /// Closes now.
    #[pyo3(signature = (number=0, text=""))]
    fn abort(&self, number: u64, text: &str) -> PyResult<()> {
        let _entered = enter()?;
        self.inner.abort(CloseCode::new(number), text);
        Ok(())
    }

    /// Waits until the socket is over; gives the reason.
    fn closed(&self) -> PyResult<Op> {
        let socket = self.inner.clone();
        Op::with(async move {
            let why = socket.closed().await;
            output(move |py| Ok(reason(py, &why)?.into_any().unbind()))
        })
    }
}

/// What watches a socket's connection.
#[pyclass(module = "udpack._udpack", frozen)]
pub(crate) struct States {
    states: Held<Arc<Mutex<SocketStates>>>,
}

#[pymethods]
impl States {
    /// The next state as a dict; `None` after the last.
    fn next(&self) -> PyResult<Op> {
        let states = self.states.clone();
        Op::with(async move {
            let next = states.lock().await.next().await;
            output(move |py| match next {
                Some(next) => Ok(state(py, &next)?.into_any().unbind()),
                None => Ok(py.None()),
            })
        })
    }
}

fn state<'py>(py: Python<'py>, state: &SocketState) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let seconds = |time: &Duration| time.as_secs_f64();
    let name = match state {
        SocketState::Connecting => "connecting",
        SocketState::Connected { resumed, reason } => {
            dict.set_item("resumed", resumed)?;
            dict.set_item("reason", reason)?;
            "connected"
        }
        SocketState::TransportChanged { why, .. } => {
            dict.set_item("reason", why.to_string())?;
            "transport_changed"
        }
        SocketState::GoingAway(goaway) => {
            dict.set_item("text", &goaway.text)?;
            dict.set_item("retry_after", seconds(&goaway.retry_after))?;
            dict.set_item("address", &goaway.address)?;
            "going_away"
        }
        SocketState::Silent { .. } => "silent",
        SocketState::Detached { .. } => "detached",
        SocketState::Reconnecting { attempt, delay, .. } => {
            dict.set_item("attempt", attempt)?;
            dict.set_item("delay", seconds(delay))?;
            "reconnecting"
        }
        SocketState::Closed(why) => {
            dict.set_item("reason", reason(py, why)?)?;
            "closed"
        }
        _ => "unknown",
    };
    dict.set_item("name", name)?;
    Ok(dict)
}

/// The number, name and retry advice of each close code of the protocol.
#[pyfunction]
pub(crate) fn close_codes(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let codes = CloseCode::ALL.iter().map(|code| {
        PyTuple::new(
            py,
            [
                code.value().into_py_any(py)?,
                code.name().into_py_any(py)?,
                code.retry().into_py_any(py)?,
            ],
        )
    });
    PyList::new(py, codes.collect::<PyResult<Vec<_>>>()?)
}
