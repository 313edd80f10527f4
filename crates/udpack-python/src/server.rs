//! Servers: what Python's handlers are asked, and rooms.
//!
//! The Rust server admits clients and serves channels. For each channel, message and token that Python has to decide
//! about it puts a question into one bounded queue, which Python empties in batches. A handler that the server has given
//! up is told so by its number.

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use udpack::{
    Answer, Channel, CloseCode, Context, Deny, Drain, Fault, Hello, History, Identity, Items,
    Overflow, Peer, Router, Server, ServerBuilder, Streaming, TokenFile, Web,
};
use udpack_transfer::{Overwrite, Receiver, ReceiverConfig, Scope, Store, StoreConfig};
use udpack_web::{HttpListener, Site};

use crate::channel::{ItemReader, ItemSender, PyChannel, encode, fault, seconds};
use crate::error::Failure;
use crate::op::{Op, output};
use crate::runtime::{Held, enter};
use crate::settings;
use crate::socket::PySocket;
use crate::value::{self, Value};

/// Questions that wait for Python, and that it takes together at most.
const QUESTIONS: usize = 256;

/// How long the end of a store may take, when its server has ended.
const CLOSING: Duration = Duration::from_secs(5);

/// What Python is asked.
enum Question {
    /// To serve a channel until the answer.
    Channel(Channel, oneshot::Sender<Result<(), String>>),
    /// To handle a message.
    Message(Context, Items<Value>, oneshot::Sender<Answer>),
    /// To judge a token.
    Token(Hello, oneshot::Sender<Result<Peer, Deny>>),
}

/// The asking side.
#[derive(Clone)]
struct Asker {
    questions: mpsc::Sender<(u64, Question)>,
    /// The numbers of questions that were given up: at most as many as there are handlers.
    given_up: mpsc::UnboundedSender<u64>,
    next: Arc<AtomicU64>,
}

/// Tells Python when its answer is no longer wanted.
struct Waiting<'a> {
    asker: &'a Asker,
    number: u64,
    answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.answered {
            let _ = self.asker.given_up.send(self.number);
        }
    }
}

impl Asker {
    /// Asks, and waits for the answer; `None` when Python forgot the question or is gone.
    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Option<T> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.questions.send((number, question(answer))).await.ok()?;
        let mut waiting = Waiting {
            asker: self,
            number,
            answered: false,
        };
        let answer = answered.await.ok();
        waiting.answered = true;
        answer
    }
}

/// The answering side.
struct Inbox {
    questions: mpsc::Receiver<(u64, Question)>,
    given_up: mpsc::UnboundedReceiver<u64>,
}

/// What Python gets: a question with its number, or the number of one that was given up.
enum News {
    Question(u64, Box<Question>),
    GivenUp(u64),
}

impl Inbox {
    async fn next(&mut self) -> Option<News> {
        tokio::select! {
            biased;
            question = self.questions.recv() => question.map(|(number, question)| News::Question(number, Box::new(question))),
            Some(number) = self.given_up.recv() => Some(News::GivenUp(number)),
        }
    }
}

fn failed() -> Fault {
    Fault::new(Fault::INTERNAL, "the handler failed")
}

fn router(asker: Asker, concurrency: usize) -> Router {
    Router::new()
        .concurrency(concurrency)
        .fallback(move |cx: Context, items: Items<Value>| {
            let asker = asker.clone();
            async move {
                let answer = asker
                    .ask(|answer| Question::Message(cx, items, answer))
                    .await;
                answer.unwrap_or_else(|| failed().into())
            }
        })
}

fn whole(
    asker: Asker,
) -> impl Fn(Channel) -> std::pin::Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync
{
    move |channel| {
        let asker = asker.clone();
        Box::pin(async move {
            let served = asker.ask(|answer| Question::Channel(channel, answer)).await;
            served.unwrap_or_else(|| Err("the program serves no more".to_owned()))
        })
    }
}

/// Whom tokens are for.
enum Tokens {
    File(TokenFile),
    Known(HashMap<String, String>),
    Asked,
}

fn auth(builder: ServerBuilder, tokens: Tokens, asker: Asker) -> ServerBuilder {
    match tokens {
        Tokens::File(file) => builder.auth(file),
        Tokens::Known(known) => builder.auth(move |hello: Hello| {
            let peer = known.get(hello.token()).map(Peer::new);
            async move { peer.ok_or_else(Deny::auth_failed) }
        }),
        Tokens::Asked => builder.auth(move |hello: Hello| {
            let asker = asker.clone();
            async move {
                let judged = asker.ask(|answer| Question::Token(hello, answer)).await;
                judged.unwrap_or_else(|| Err(Deny::auth_failed()))
            }
        }),
    }
}

/// Files that a server takes and gives.
fn receiver(dir: PathBuf, settings: &Bound<'_, PyDict>) -> PyResult<(Store, Receiver)> {
    let flag = |name: &str| -> PyResult<bool> {
        let value = settings.get_item(name)?;
        Ok(value
            .map(|value| value.extract())
            .transpose()?
            .unwrap_or(false))
    };
    let overwrite = if flag("allow_overwrite")? {
        Overwrite::Always
    } else {
        Overwrite::Never
    };
    let store = Store::open(
        &dir,
        StoreConfig {
            overwrite,
            ..StoreConfig::default()
        },
    );
    let store = store
        .map_err(|error| PyErr::from(Failure::new("BindError", "uploads", error.to_string())))?;
    let scope = Scope {
        read: flag("allow_read")?,
        delete: flag("allow_delete")?,
        ..Scope::default()
    };
    let config = ReceiverConfig {
        default_scope: scope,
        ..ReceiverConfig::default()
    };
    Ok((store.clone(), Receiver::new(store, config)))
}

/// The TCP port of a server, and what serves it until it is dropped.
type Tcp = (SocketAddr, JoinSet<()>);

/// Takes sessions over TCP as well, at the number of the UDP port; `Err`: that cannot be bound.
async fn listen_tcp(server: &Server) -> std::io::Result<Tcp> {
    let listener = HttpListener::bind(server.local_addr()).await?;
    let address = listener.local_addr();
    let site = Site::of(server.clone(), Web::new());
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        // It ends only where a key does not do for TLS, and one that QUIC takes does.
        let _ = listener.serve(site).await;
    });
    Ok((address, serving))
}

/// Starts a server; gives a `Server`.
///
/// `tcp` says whether it listens on TCP, too; `None`: if it can.
#[pyfunction]
pub(crate) fn bind(
    py: Python<'_>,
    address: String,
    channels: Vec<String>,
    routes: Vec<(String, usize)>,
    settings: &Bound<'_, PyDict>,
    tcp: Option<bool>,
) -> PyResult<Op> {
    let _entered = enter()?;
    let setting = |name: &str| -> PyResult<Option<Bound<'_, PyAny>>> {
        Ok(settings.get_item(name)?.filter(|value| !value.is_none()))
    };
    let problem = |error: String| PyErr::from(Failure::new("BindError", "setting", error));
    let (questions, asked) = mpsc::channel(QUESTIONS);
    let (given_up, news) = mpsc::unbounded_channel();
    let asker = Asker {
        questions,
        given_up,
        next: Arc::default(),
    };
    let identity = match setting("keys")? {
        Some(dir) => {
            let dir: PathBuf = dir.extract()?;
            py.detach(|| Identity::load_or_create(dir))
        }
        None => Identity::generate(),
    };
    let identity = identity.map_err(|error| problem(error.to_string()))?;
    let tokens = match setting("tokens")? {
        None => Tokens::Asked,
        Some(tokens) => match tokens.cast::<PyDict>() {
            Ok(known) => Tokens::Known(known.extract()?),
            Err(_) => {
                let path: PathBuf = tokens.extract()?;
                let file = py.detach(|| TokenFile::load_or_create(path));
                Tokens::File(file.map_err(|error| problem(error.to_string()))?)
            }
        },
    };
    let dict = |name: &str| -> PyResult<Option<Bound<'_, PyDict>>> {
        setting(name)?
            .map(|value| Ok(value.cast_into::<PyDict>()?))
            .transpose()
    };
    let mut builder = Server::builder()
        .identity(identity)
        .agent(concat!("udpack-python/", env!("CARGO_PKG_VERSION")))
        .timeouts(settings::timeouts(dict("timeouts")?.as_ref())?)
        .limits(settings::limits(dict("limits")?.as_ref())?);
    builder = auth(builder, tokens, asker.clone());
    for (name, concurrency) in routes {
        builder = builder.channel(name, router(asker.clone(), concurrency));
    }
    for name in channels {
        builder = builder.channel(name, whole(asker.clone()));
    }
    let mut store = None;
    if let Some(dir) = setting("uploads")? {
        let (opened, receiver) = receiver(dir.extract()?, settings)?;
        builder = receiver.attach(builder);
        store = Some(opened);
    }
    let inbox = Inbox {
        questions: asked,
        given_up: news,
    };
    Op::new(
        async move {
            let server = builder.bind(address.as_str()).await?;
            let carried = match tcp {
                Some(false) => Ok(None),
                _ => listen_tcp(&server).await.map(Some),
            };
            match (carried, tcp) {
                (Err(error), Some(true)) => {
                    let address = server.local_addr();
                    let text = format!("cannot listen on TCP at {address}: {error}");
                    server.close(CloseCode::NORMAL, "").await;
                    Err(Failure::new("BindError", "tcp", text))
                }
                (carried, _) => Ok((server, carried)),
            }
        },
        move |py, (server, carried)| {
            let inbox = Arc::new(tokio::sync::Mutex::new(inbox));
            let (carried, no_tcp) = match carried {
                Ok(carried) => (carried, None),
                Err(error) => (None, Some(error.to_string())),
            };
            PyServer {
                inner: Held::new(Mutex::new(Some(server))),
                tcp: Held::new(Mutex::new(carried)),
                no_tcp,
                store: Held::new(Mutex::new(store)),
                inbox: Held::new(inbox),
            }
            .into_py_any(py)
        },
    )
}

/// A server that runs.
#[pyclass(name = "Server", module = "udpack._udpack", frozen)]
pub(crate) struct PyServer {
    /// Until it is closed.
    inner: Held<Mutex<Option<Server>>>,
    /// Until it is closed, if it listens on TCP.
    tcp: Held<Mutex<Option<Tcp>>>,
    /// Why it does not, though it was to.
    no_tcp: Option<String>,
    /// Where uploads go.
    store: Held<Mutex<Option<Store>>>,
    inbox: Held<Arc<tokio::sync::Mutex<Inbox>>>,
}

impl PyServer {
    fn server(&self) -> PyResult<Server> {
        let server = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        server
            .clone()
            .ok_or_else(|| Failure::new("UdpackError", "stopped", "the server is closed").into())
    }
}

#[pymethods]
impl PyServer {
    #[getter]
    fn address(&self) -> PyResult<(String, u16)> {
        let address = self.server()?.local_addr();
        Ok((address.ip().to_string(), address.port()))
    }

    #[getter]
    fn tcp_address(&self) -> Option<(String, u16)> {
        let tcp = self.tcp.lock().unwrap_or_else(PoisonError::into_inner);
        tcp.as_ref()
            .map(|(address, _)| (address.ip().to_string(), address.port()))
    }

    #[getter]
    fn no_tcp(&self) -> Option<String> {
        self.no_tcp.clone()
    }

    #[getter]
    fn key(&self) -> PyResult<String> {
        Ok(self.server()?.fingerprint().to_string())
    }

    /// The next questions: `("channel", number, Served)`, `("message", number, Call)`, `("token", number, Judged)`, or
    /// `("given_up", number, None)`. `None` when there will be no more.
    fn questions(&self) -> PyResult<Op> {
        let inbox = self.inbox.clone();
        Op::with(async move {
            let mut inbox = inbox.lock().await;
            let mut batch = Vec::new();
            batch.extend(inbox.next().await);
            while batch.len() < QUESTIONS {
                match inbox.next().now_or_never() {
                    Some(Some(news)) => batch.push(news),
                    Some(None) | None => break,
                }
            }
            output(move |py| {
                if batch.is_empty() {
                    return Ok(py.None());
                }
                let list = PyList::empty(py);
                for news in batch {
                    match news {
                        News::GivenUp(number) => list.append(("given_up", number, py.None()))?,
                        News::Question(number, question) => {
                            let (kind, object) = asked(py, *question)?;
                            list.append((kind, number, object))?;
                        }
                    }
                }
                Ok(list.into_any().unbind())
            })
        })
    }

    /// Sends to the channels in a room; `(delivered, dropped)`.
    #[pyo3(signature = (room, event, data, except_session=None))]
    fn broadcast(
        &self,
        py: Python<'_>,
        room: &str,
        event: &str,
        data: &Bound<'_, PyAny>,
        except_session: Option<&str>,
    ) -> PyResult<(u64, u64)> {
        let _entered = enter()?;
        let message = encode(py, event, data)?;
        let mut to = self.server()?.rooms().to(room);
        if let Some(session) = except_session {
            to = to.except(session);
        }
        let sent = to.send_encoded(&message);
        Ok((sent.delivered, sent.dropped))
    }

    /// Sends a volatile message to the sockets of a room's members; `(delivered, dropped)`.
    #[pyo3(signature = (room, event, data, key=None, except_session=None))]
    fn broadcast_volatile(
        &self,
        room: &str,
        event: &str,
        data: &Bound<'_, PyAny>,
        key: Option<&str>,
        except_session: Option<&str>,
    ) -> PyResult<(u64, u64)> {
        let _entered = enter()?;
        let data = value::from_python(data)?;
        let mut to = self.server()?.rooms().to(room);
        if let Some(session) = except_session {
            to = to.except(session);
        }
        let sent = match key {
            Some(key) => to.send_volatile_keyed(event, key, &data),
            None => to.send_volatile(event, &data),
        };
        let sent = sent.map_err(|error| PyErr::from(Failure::from(error)))?;
        Ok((sent.delivered, sent.dropped))
    }

    /// The members of a room: `(peer, session, channel name)` of each.
    fn members(&self, room: &str) -> PyResult<Vec<(Option<String>, String, String)>> {
        let members = self.server()?.rooms().members(room);
        let one = |member: udpack::Member| {
            let peer = member.peer().map(|peer| peer.id().to_owned());
            (peer, member.session().to_string(), member.name().to_owned())
        };
        Ok(members.into_iter().map(one).collect())
    }

    #[getter]
    fn room_names(&self) -> PyResult<Vec<String>> {
        Ok(self.server()?.rooms().names())
    }

    /// What becomes of a member that is slow.
    #[pyo3(signature = (room, overflow, messages=1024))]
    fn policy(&self, room: &str, overflow: &str, messages: usize) -> PyResult<()> {
        let overflow = match overflow {
            "drop_newest" => Overflow::DropNewest,
            "drop_oldest" => Overflow::DropOldest { messages },
            "latest_only" => Overflow::LatestOnly,
            "disconnect" => Overflow::Disconnect,
            "recover" => Overflow::Recover,
            other => {
                return Err(PyValueError::new_err(format!(
                    "overflow is 'drop_newest', 'drop_oldest', 'latest_only', 'disconnect' or 'recover', not {other:?}"
                )));
            }
        };
        let set = self.server()?.rooms().policy(room, overflow);
        set.map_err(|error| PyErr::from(Failure::from(error)))
    }

    /// What a room keeps of its messages; nothing without bounds.
    #[pyo3(signature = (room, bounds))]
    fn history(&self, room: &str, bounds: Option<(usize, usize, f64)>) -> PyResult<()> {
        let bounds = match bounds {
            Some((messages, bytes, age)) => Some(History {
                messages,
                bytes,
                age: seconds(age)?,
            }),
            None => None,
        };
        let set = self.server()?.rooms().history(room, bounds);
        set.map_err(|error| PyErr::from(Failure::from(error)))
    }

    /// Where a room's history is: epoch and offset.
    fn position(&self, room: &str) -> PyResult<Option<(u64, u64)>> {
        let position = self.server()?.rooms().position(room);
        Ok(position.map(|position| (position.epoch, position.offset)))
    }

    fn sockets(&self, py: Python<'_>) -> PyResult<Vec<Py<PySocket>>> {
        let sockets = self.server()?.sockets().into_iter();
        sockets
            .map(|socket| Py::new(py, PySocket::new(socket)))
            .collect()
    }

    /// Closes at once the sockets of a peer; gives how many.
    fn revoke(&self, peer: &str) -> PyResult<usize> {
        let _entered = enter()?;
        Ok(self.server()?.revoke(|known| known.id() == peer))
    }

    /// Closes everything.
    #[pyo3(signature = (number=1, text="the server shuts down"))]
    fn close(&self, number: u64, text: &str) -> PyResult<Op> {
        let text = text.to_owned();
        let server = self
            .inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let store = self
            .store
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let tcp = self
            .tcp
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        Op::with(async move {
            if let Some(server) = server {
                server.close(CloseCode::new(number), &text).await;
            }
            // Its connections carried the close.
            if let Some((_, mut serving)) = tcp {
                serving.shutdown().await;
            }
            if let Some(store) = store {
                store.close(CLOSING).await;
            }
            output(|py| Ok(py.None()))
        })
    }

    /// Sends the clients away, and lets what runs finish within some seconds.
    fn drain(&self, within: f64) -> PyResult<Op> {
        let server = self.server()?;
        let drain = Drain::within(seconds(within)?);
        Op::new(
            async move { server.run_until(std::future::ready(()), drain).await },
            crate::op::nothing,
        )
    }
}

fn asked(py: Python<'_>, question: Question) -> PyResult<(&'static str, Py<PyAny>)> {
    Ok(match question {
        Question::Channel(channel, answer) => {
            let channel = PyChannel::new(channel);
            (
                "channel",
                Served {
                    channel: Py::new(py, channel)?,
                    answer: Once::new(answer),
                }
                .into_py_any(py)?,
            )
        }
        Question::Message(cx, items, answer) => {
            let call = Call {
                cx: Held::new(cx),
                items: Mutex::new(Some(Held::new(items))),
                answer: Once::new(answer),
            };
            ("message", call.into_py_any(py)?)
        }
        Question::Token(hello, answer) => (
            "token",
            Judged {
                hello,
                answer: Once::new(answer),
            }
            .into_py_any(py)?,
        ),
    })
}

/// An answer that is given once.
struct Once<T>(Mutex<Option<oneshot::Sender<T>>>);

impl<T> Once<T> {
    fn new(sender: oneshot::Sender<T>) -> Self {
        Self(Mutex::new(Some(sender)))
    }

    /// Says whether somebody still waited for it.
    fn give(&self, answer: T) -> PyResult<bool> {
        let _entered = enter()?;
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(sender.is_some_and(|sender| sender.send(answer).is_ok()))
    }
}

/// A channel to be served.
#[pyclass(module = "udpack._udpack", frozen)]
pub(crate) struct Served {
    #[pyo3(get)]
    channel: Py<PyChannel>,
    answer: Once<Result<(), String>>,
}

#[pymethods]
impl Served {
    /// The channel was served: this direction ends, whoever still has a handle. `error` closes it with `handler_failed`.
    #[pyo3(signature = (error=None))]
    fn done(&self, error: Option<String>) -> PyResult<bool> {
        if error.is_none() {
            let _entered = enter()?;
            // Polled once, it announces the end.
            let _ = self.channel.get().inner.finish().now_or_never();
        }
        self.answer.give(error.map_or(Ok(()), Err))
    }
}

/// A message to be handled.
#[pyclass(module = "udpack._udpack", frozen)]
pub(crate) struct Call {
    cx: Held<Context>,
    items: Mutex<Option<Held<Items<Value>>>>,
    answer: Once<Answer>,
}

#[pymethods]
impl Call {
    #[getter]
    fn event(&self) -> &str {
        self.cx.event()
    }

    #[getter]
    fn is_request(&self) -> bool {
        self.cx.is_request()
    }

    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        value::decode(py, &self.cx.message().raw())
    }

    #[getter]
    fn channel(&self) -> PyChannel {
        PyChannel::new(self.cx.channel().clone())
    }

    #[getter]
    fn channel_name(&self) -> &str {
        self.cx.channel().name()
    }

    /// The items behind the request, once.
    fn items(&self) -> Option<ItemReader> {
        let items = self
            .items
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        items.map(ItemReader::held)
    }

    fn reply(&self, data: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.answer.give(Answer::value(&value::from_python(data)?))
    }

    #[pyo3(signature = (code, text, data=None))]
    fn fault(&self, code: &str, text: &str, data: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        self.answer.give(fault(code, text, data)?.into())
    }

    /// Answers with a stream.
    fn stream(&self, items: &ItemSender) -> PyResult<bool> {
        match items.stream() {
            Some(stream) => self.answer.give(Streaming::fallible(stream).into()),
            None => Ok(false),
        }
    }
}

/// A token to be judged.
#[pyclass(module = "udpack._udpack", frozen)]
pub(crate) struct Judged {
    hello: Hello,
    answer: Once<Result<Peer, Deny>>,
}

#[pymethods]
impl Judged {
    #[getter]
    fn token(&self) -> &str {
        self.hello.token()
    }

    #[getter]
    fn agent(&self) -> &str {
        self.hello.agent()
    }

    #[getter]
    fn remote(&self) -> (String, u16) {
        let remote = self.hello.remote();
        (remote.ip().to_string(), remote.port())
    }

    /// Lets the client in as this peer.
    #[pyo3(signature = (peer, claims=None))]
    fn admit(&self, peer: &str, claims: Option<HashMap<String, String>>) -> PyResult<bool> {
        let claims = claims.unwrap_or_default().into_iter().collect();
        self.answer.give(Ok(Peer::new(peer).with_claims(claims)))
    }

    fn deny(&self) -> PyResult<bool> {
        self.answer.give(Err(Deny::auth_failed()))
    }
}
