//! WebTransport: sessions of browsers over HTTP/3, on the port that serves QUIC as well.
//!
//! A connection carries one session. This module reads and writes the parts that HTTP/3 and WebTransport add to QUIC:
//! SETTINGS, the request that opens the session, the header of each stream, the capsule that closes the session. It
//! passes a stream on only after the header, so channels read and write the streams of both transports in the same
//! way.

mod handover;
mod read;
pub(crate) mod wire;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use quinn::{RecvStream, SendStream};
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use self::handover::Handover;
use self::read::{Event, Frames, Reading, Shared};
use self::wire::{Fault, code, frame, uni};
use crate::base::lock;
use crate::base::text::{cut, printable_within};
use crate::transport::connection::ConnectionError;
use crate::transport::quic::varint;
use crate::transport::trips;
use crate::trust::origin::{Transport, Web};
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::PREAUTH_BYTES;

/// Unidirectional streams that a client needs for HTTP/3 itself, as long as the connection lives: one for control, two for
/// QPACK. Firefox closes a connection that permits fewer in the handshake.
pub(crate) const OWN_UNI: u32 = 3;
/// Bidirectional streams that a client needs for HTTP/3 itself: the one of the request.
pub(crate) const OWN_BI: u32 = 1;

/// How many streams to permit so that a browser can have `streams` open at any time.
///
/// quinn announces new credit only when more than an eighth of the permitted streams have ended, and the last
/// acknowledgements of some streams are still under way. A browser without credit fails at once instead of waiting.
pub(crate) fn permitted(streams: u32) -> u32 {
    streams.saturating_add(streams / 4).saturating_add(1)
}

/// The most streams of a session that may precede its request; further ones are refused.
const EARLY: usize = 2;
/// The most bytes that a client may send on the control stream and the request stream of a session, mostly GREASE.
const SPARE: u64 = 64 << 10;
/// Bytes that are read and dropped on a stream without a reader, before the peer gets STOP_SENDING.
const DRAINED: usize = 256 << 10;
/// The most unidirectional streams that wait to be accepted.
const UNI_QUEUE: usize = 4;
/// Shortest and longest time to wait until the client has received a close.
const FAREWELL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long to wait for the end of the session after a stream has ended with a code of HTTP/3.
const ENDING: Duration = Duration::from_secs(3);

/// A session. The handles and streams of its connection hold it; it ends when the last of them is dropped.
#[derive(Debug)]
pub(crate) struct Session {
    state: Arc<State>,
    /// Kept because a stream may be dropped outside of the runtime.
    runtime: tokio::runtime::Handle,
    conn: quinn::Connection,
}

/// State that the session's task and its handles share.
#[derive(Debug)]
struct State {
    /// The stream of the request.
    id: u64,
    transport: Transport,
    /// Streams of the client that are not accepted yet.
    bi: Handover<(SendStream, RecvStream)>,
    uni: Handover<RecvStream>,
    end: OnceLock<End>,
    ended: Notify,
    farewells: TaskTracker,
    /// While a close is under way.
    farewell: Mutex<Option<TaskTrackerToken>>,
}

/// How a session ended.
#[derive(Debug)]
enum End {
    /// This side closed it, with this code and text.
    Local(CloseCode, String),
    /// The client closed it, or broke HTTP/3.
    Over(ConnectionError),
}

impl State {
    /// Records the end; later calls have no effect.
    fn end(&self, end: End) {
        let mut farewell = lock(&self.farewell);
        if self.end.set(end).is_ok() {
            *farewell = Some(self.farewells.token());
            // Ends `accept_bi` and `accept_uni` before the close is sent.
            self.bi.close();
            self.uni.close();
            self.ended.notify_one();
        }
    }

    /// Records that the close was sent, if that was possible.
    fn told(&self) {
        lock(&self.farewell).take();
    }
}

impl Session {
    /// The transport of the connection.
    pub(super) fn transport(&self) -> Transport {
        self.state.transport.clone()
    }

    /// The stream id in the session's datagrams.
    pub(super) fn id(&self) -> u64 {
        self.state.id
    }

    /// The next bidirectional stream of the client; `None` once the session has ended.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn accept_bi(&self) -> Option<(SendStream, RecvStream)> {
        self.state.bi.take().await
    }

    /// The next unidirectional stream of the client; `None` once the session has ended.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn accept_uni(&self) -> Option<RecvStream> {
        self.state.uni.take().await
    }

    /// Writes the header of a new bidirectional stream.
    ///
    /// # Cancel safety
    /// A dropped future has given the stream up.
    pub(super) async fn begin_bi(&self, stream: SendStream) -> Result<SendStream, ConnectionError> {
        self.begin(stream, frame::WEBTRANSPORT).await
    }

    /// Writes the header of a new unidirectional stream, as [`begin_bi`](Self::begin_bi).
    pub(super) async fn begin_uni(
        &self,
        stream: SendStream,
    ) -> Result<SendStream, ConnectionError> {
        self.begin(stream, uni::WEBTRANSPORT).await
    }

    async fn begin(&self, stream: SendStream, kind: u64) -> Result<SendStream, ConnectionError> {
        /// Resets a stream whose header is not written, because the client cannot use it.
        struct Unsaid(Option<SendStream>);
        impl Drop for Unsaid {
            fn drop(&mut self) {
                if let Some(stream) = &mut self.0 {
                    let _ = stream.reset(varint(wire::to_http3(CloseCode::CANCELLED)));
                }
            }
        }
        let mut unsaid = Unsaid(Some(stream));
        let header = wire::stream_header(kind, self.state.id);
        if let Some(stream) = &mut unsaid.0
            && let Err(quinn::WriteError::ConnectionLost(error)) = stream.write_chunk(header).await
        {
            return Err(self.over(error));
        }
        // A stream that the client has stopped reports that to its writer.
        unsaid.0.take().ok_or(ConnectionError::Local)
    }

    /// Ends the session: the client gets the code and at most 1,024 bytes of text, then the connection is closed.
    pub(super) fn close(&self, code: CloseCode, text: &str) {
        let text = cut(text, wire::CLOSE_TEXT).to_owned();
        self.state.end(End::Local(code, text));
    }

    /// How the session ended, if it has.
    pub(super) fn ended(&self) -> Option<ConnectionError> {
        self.state.end.get().map(|end| match end {
            End::Local(..) => ConnectionError::Local,
            End::Over(error) => error.clone(),
        })
    }

    /// The reason of the session's end, after one of its streams has ended with a code of HTTP/3: a browser that ends
    /// a session first ends every stream. `None` if the session continues.
    pub(super) async fn ending(&self) -> Option<ConnectionError> {
        let over = tokio::time::timeout(ENDING, self.conn.closed()).await;
        over.ok().map(|error| self.over(error))
    }

    /// The reason of the connection's end.
    pub(super) fn over(&self, error: quinn::ConnectionError) -> ConnectionError {
        self.ended().unwrap_or_else(|| lost(error))
    }

    /// Reads the rest of a stream and drops it. STOP_SENDING would make Firefox discard data that it has received on
    /// the stream and not read yet. A client that sends more than 256 KiB gets STOP_SENDING anyway.
    pub(super) fn drain(&self, mut stream: RecvStream, code: CloseCode) {
        if self.state.end.get().is_some() {
            return;
        }
        self.runtime.spawn(async move {
            let mut left = DRAINED;
            while let Ok(Some(chunk)) = stream.read_chunk(left, true).await {
                left -= chunk.bytes.len();
                if left == 0 {
                    let _ = stream.stop(varint(wire::to_http3(code)));
                    return;
                }
            }
        });
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.state.end(End::Local(CloseCode::NORMAL, String::new()));
    }
}

/// The error of a connection that ended without a close of its session, as when the browser freezes a tab or is killed.
fn lost(error: quinn::ConnectionError) -> ConnectionError {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => {
            let said = printable_within(&String::from_utf8_lossy(&close.reason), 128);
            let code = close.error_code.into_inner();
            let text = format!("the browser ended the connection: {code:#x} {said}");
            let code = CloseCode::CONNECTION_LOST;
            ConnectionError::Transport(CloseReason::new(code, text.trim_end(), Side::Transport))
        }
        error => error.into(),
    }
}

/// The settings of a server for new sessions.
pub(super) struct Terms<'a> {
    pub(super) web: &'a Web,
    /// The time within which a stream must send its header.
    pub(super) header: Duration,
    /// How many bidirectional streams a client may have open.
    pub(super) streams: u32,
    /// Closes in progress.
    pub(super) farewells: &'a TaskTracker,
}

/// Performs the session's part of a handshake: SETTINGS of both sides, the request and its answer.
///
/// # Cancel safety
/// A dropped future gives the connection up.
pub(super) async fn establish(
    conn: quinn::Connection,
    handshake: quinn::ZeroRttAccepted,
    terms: Terms<'_>,
) -> Result<Arc<Session>, ConnectionError> {
    let shared = Arc::new(Shared::new(PREAUTH_BYTES.into(), terms.header));
    let mut layer = Layer::new(conn.clone(), shared);
    // Sent before the handshake is complete (0.5-RTT), because browsers wait for it before they send their request.
    let control = async {
        let mut stream = conn.open_uni().await?;
        let _ = stream.set_priority(i32::MAX);
        let written = stream.write_chunk(wire::settings()).await;
        written.map(|()| stream).map_err(|_| {
            let closed = conn.close_reason();
            closed.unwrap_or(quinn::ConnectionError::LocallyClosed)
        })
    };
    let control = control.await.map_err(lost)?;
    handshake.await;
    let asked = match layer.asked(terms.web).await {
        Ok(asked) => asked,
        Err(Unasked::Lost(error)) => return Err(lost(error)),
        Err(Unasked::Fault(fault)) => return Err(fail(&conn, &fault)),
        Err(Unasked::Refused(stream, status)) => {
            refuse(&conn, stream, status).await;
            let text = format!("a request for a session was answered with the status {status}");
            return Err(ConnectionError::Transport(CloseReason::new(
                CloseCode::TRANSPORT_ERROR,
                text,
                Side::Local,
            )));
        }
    };
    let Asked {
        mut request,
        frames,
        id,
        origin,
        early,
        early_uni,
    } = asked;
    let _ = request.set_priority(i32::MAX);
    if request.write_chunk(wire::answer(200)).await.is_err() {
        return Err(fail(&conn, &GONE));
    }
    layer.shared.budget.add(SPARE);
    layer.in_turn = early.is_empty();
    layer.reading.push(Box::pin(frames.capsules()));
    let state = Arc::new(State {
        id,
        transport: Transport::WebTransport { origin },
        bi: Handover::new((terms.streams as usize).saturating_add(EARLY)),
        uni: Handover::new(UNI_QUEUE),
        end: OnceLock::new(),
        ended: Notify::new(),
        farewells: terms.farewells.clone(),
        farewell: Mutex::default(),
    });
    let session = Arc::new(Session {
        state: state.clone(),
        runtime: tokio::runtime::Handle::current(),
        conn: layer.conn.clone(),
    });
    let task = Task {
        layer,
        state,
        request,
        _control: control,
    };
    for (id, streams) in early {
        task.push_bi(id, streams);
    }
    for (id, stream) in early_uni {
        task.push_uni(id, stream);
    }
    tokio::spawn(task.run());
    Ok(session)
}

const GONE: Fault = wire::fault(
    code::REQUEST_INCOMPLETE,
    "the request was given up before its answer",
);

/// Ends a connection because of a fault of the client.
fn fail(conn: &quinn::Connection, fault: &Fault) -> ConnectionError {
    conn.close(varint(fault.code), fault.text.as_bytes());
    let text = format!("WebTransport: {} ({:#x})", fault.text, fault.code);
    ConnectionError::Transport(CloseReason::new(
        CloseCode::TRANSPORT_ERROR,
        text,
        Side::Local,
    ))
}

/// Answers a request with a status, and ends the connection once that has arrived.
async fn refuse(conn: &quinn::Connection, mut stream: SendStream, status: u16) {
    let said = async {
        if stream.write_chunk(wire::answer(status)).await.is_ok() && stream.finish().is_ok() {
            let _ = stream.stopped().await;
        }
    };
    let _ = tokio::time::timeout(farewell_time(conn), said).await;
    conn.close(varint(code::NO_ERROR), b"");
}

/// How long to wait until the client has received a close.
fn farewell_time(conn: &quinn::Connection) -> Duration {
    trips(conn.rtt()).clamp(FAREWELL.0, FAREWELL.1)
}

/// Why a connection has no session.
enum Unasked {
    Lost(quinn::ConnectionError),
    Fault(Fault),
    Refused(SendStream, u16),
}

/// An accepted request for a session, with the streams that preceded it.
struct Asked {
    request: SendStream,
    frames: Frames,
    /// The request's stream.
    id: u64,
    origin: Option<Arc<str>>,
    early: Vec<(u64, (SendStream, RecvStream))>,
    early_uni: Vec<(u64, RecvStream)>,
}

/// A connection whose streams are read until their kind is known.
struct Layer {
    conn: quinn::Connection,
    shared: Arc<Shared>,
    reading: FuturesUnordered<Reading>,
    /// Whether bidirectional streams are read one by one, so that the first one of a session is known: the control
    /// stream.
    in_turn: bool,
    /// Whether one of them is being read.
    turn: bool,
}

impl Layer {
    fn new(conn: quinn::Connection, shared: Arc<Shared>) -> Self {
        Self {
            conn,
            shared,
            reading: FuturesUnordered::new(),
            in_turn: true,
            turn: false,
        }
    }

    /// Waits for the next event of the client.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn next(&mut self) -> Result<Event, quinn::ConnectionError> {
        loop {
            let next = tokio::select! {
                Some(event) = self.reading.next() => {
                    if event.is_of_both() {
                        self.turn = false;
                    }
                    return Ok(event);
                }
                streams = self.conn.accept_bi(), if !(self.in_turn && self.turn) => {
                    self.turn = true;
                    let (send, recv) = streams?;
                    self.shared.clone().both(send, recv)
                }
                stream = self.conn.accept_uni() => self.shared.clone().uni(stream?),
            };
            self.reading.push(next);
        }
    }

    /// Waits for SETTINGS and for the request, in any order, and decides.
    async fn asked(&mut self, web: &Web) -> Result<Asked, Unasked> {
        let (mut settings, mut asked) = (false, None);
        let (mut early, mut early_uni) = (Vec::new(), Vec::new());
        loop {
            match self.next().await.map_err(Unasked::Lost)? {
                Event::Settings(frames) => {
                    settings = true;
                    self.reading.push(Box::pin(frames.control()));
                }
                Event::Request(request, _, Err(status)) if asked.is_none() => {
                    return Err(Unasked::Refused(request, status));
                }
                Event::Request(request, frames, Ok(said)) if asked.is_none() => {
                    asked = Some((request, frames, said));
                }
                Event::Request(request, frames, _) => refuse_second(request, frames),
                Event::Both(id, streams) if early.len() < EARLY => early.push((id, streams)),
                Event::Both(_, streams) => reject(streams),
                Event::Uni(id, stream) if early_uni.is_empty() => early_uni.push((id, stream)),
                Event::Uni(_, mut stream) => {
                    let _ = stream.stop(varint(code::BUFFERED_STREAM_REJECTED));
                }
                Event::Then(reading) => self.reading.push(reading),
                Event::Unsaid | Event::Nothing => {}
                Event::Fault(fault) => return Err(Unasked::Fault(fault)),
                Event::Closed(..) | Event::Gone => return Err(Unasked::Fault(GONE)),
            }
            if settings && let Some((request, frames, said)) = asked.take() {
                if !web.is_at(&said.path) {
                    return Err(Unasked::Refused(request, wire::NOT_FOUND));
                }
                let origin = said.origin.as_deref();
                if !web.allows(origin, &said.host) {
                    return Err(Unasked::Refused(request, wire::FORBIDDEN));
                }
                let origin = origin.map(|origin| printable_within(origin, 256).into());
                return Ok(Asked {
                    id: u64::from(request.id()),
                    request,
                    frames,
                    origin,
                    early,
                    early_uni,
                });
            }
        }
    }
}

/// Refuses an unexpected stream.
fn reject((mut send, mut recv): (SendStream, RecvStream)) {
    let _ = send.reset(varint(code::BUFFERED_STREAM_REJECTED));
    let _ = recv.stop(varint(code::BUFFERED_STREAM_REJECTED));
}

/// Refuses a further request: a connection has one session, and the server serves nothing else.
fn refuse_second(mut request: SendStream, frames: Frames) {
    let _ = request.reset(varint(code::REQUEST_REJECTED));
    frames.stop(code::REQUEST_REJECTED);
}

/// The task of a session, from the answer to the end.
struct Task {
    layer: Layer,
    state: Arc<State>,
    request: SendStream,
    _control: SendStream,
}

impl Task {
    async fn run(mut self) {
        let state = self.state.clone();
        loop {
            let event = tokio::select! {
                () = state.ended.notified() => break self.leave().await,
                event = self.layer.next() => event,
            };
            match event {
                Ok(event) => self.take(event),
                Err(error) => break state.end(End::Over(lost(error))),
            }
        }
        state.told();
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Both(id, streams) => {
                self.layer.in_turn &= id != self.state.id;
                self.push_bi(id, streams);
            }
            Event::Uni(id, stream) => self.push_uni(id, stream),
            Event::Request(request, frames, _) => refuse_second(request, frames),
            Event::Closed(code, text) => {
                let reason = CloseReason::peer(CloseCode::new(code.into()), &text);
                self.state.end(End::Over(ConnectionError::Peer(reason)));
            }
            Event::Gone => {
                let text = "the browser gave the session up";
                let reason = CloseReason::new(CloseCode::CONNECTION_LOST, text, Side::Transport);
                self.state
                    .end(End::Over(ConnectionError::Transport(reason)));
            }
            Event::Fault(fault) => {
                let error = fail(&self.layer.conn, &fault);
                self.state.end(End::Over(error));
            }
            Event::Then(reading) => self.layer.reading.push(reading),
            // SETTINGS of the control stream.
            Event::Settings(_) | Event::Unsaid | Event::Nothing => {}
        }
    }

    fn push_bi(&self, id: u64, streams: (SendStream, RecvStream)) {
        if id == self.state.id {
            if let Err(streams) = self.state.bi.push(streams) {
                reject(streams);
            }
        } else {
            reject(streams);
        }
    }

    fn push_uni(&self, id: u64, stream: RecvStream) {
        let left = match id == self.state.id {
            true => self.state.uni.push(stream).err(),
            false => Some(stream),
        };
        if let Some(mut stream) = left {
            let _ = stream.stop(varint(code::BUFFERED_STREAM_REJECTED));
        }
    }

    /// Sends the close of the session, and ends the connection when the client has received it.
    async fn leave(self) {
        let Self {
            layer,
            state,
            mut request,
            _control,
        } = self;
        let conn = &layer.conn;
        let said = async {
            if let Some(End::Local(code, text)) = state.end.get() {
                let capsule: Bytes = wire::close_capsule(wire::code_u32(*code), text);
                if request.write_chunk(capsule).await.is_err() {
                    return;
                }
            }
            let _ = request.finish();
            // The client closes the connection when it has read the close.
            conn.closed().await;
        };
        let _ = tokio::time::timeout(farewell_time(conn), said).await;
        conn.close(varint(code::NO_ERROR), b"");
        // Dropped last: it holds the receiving half of the request, and dropping that sends STOP_SENDING, on which Firefox
        // would discard the close.
        drop(layer);
    }
}
