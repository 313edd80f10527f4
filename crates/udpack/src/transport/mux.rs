//! A connection over a reliable byte stream, for networks that let no UDP pass: QMux (draft-ietf-quic-qmux-02), which is
//! QUIC's streams, credit and datagrams, over a WebSocket.
//!
//! Each connection has one task, which alone uses the WebSocket. It always reads, so that an unread stream delays no
//! other, and it builds the next record only when the socket can accept it.

mod driver;
#[cfg(feature = "testing")]
pub(crate) mod records;
mod state;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_util::task::TaskTracker;

use self::state::{BOTH, ONE, Settings, State, Wait};
use self::wire::{Parameters, RECORD};
use crate::base::lock;
use crate::transport::connection::{
    ConnectionError, ConnectionStats, DatagramError, StreamError, Written,
};
use crate::transport::windows;
use crate::trust::origin::Transport;
use crate::wire::code::CloseCode;
use crate::wire::config::{
    FEW_STREAMS, Limits, PREAUTH_BYTES, PREAUTH_STREAMS, Timeouts, VOLATILE_STREAMS,
};

/// The largest frame with a datagram that is taken, in bytes: as much as an Ethernet packet has.
const DATAGRAM: u64 = 1472;
/// Bytes that are read from the socket at once.
const READ: usize = 64 << 10;

/// A connection to a peer. Cheap to clone; it lives as long as its last handle or stream.
#[derive(Debug, Clone)]
pub(crate) struct Connection(Arc<Handle>);

/// Ends the connection when it is dropped.
#[derive(Debug)]
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.change(|state| state.close(CloseCode::NORMAL, ""));
    }
}

/// What handles, streams and the connection's task share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Those who wait for streams of the peer, for leave to open some, of each kind.
    accept: [Notify; 2],
    open: [Notify; 2],
    datagram: Notify,
    room: Notify,
    turn: Notify,
    ends: Ends,
}

/// The two ends of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Ends {
    #[cfg_attr(
        not(feature = "testing"),
        expect(dead_code, reason = "tests find a client by it")
    )]
    pub(crate) local: Option<SocketAddr>,
    pub(crate) remote: SocketAddr,
    pub(crate) transport: Transport,
}

impl Shared {
    /// Does something with the state, and tells what came of it to those who wait for it.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let (done, news) = {
            let mut state = lock(&self.state);
            let done = change(&mut state);
            (done, state.news())
        };
        for way in [BOTH, ONE] {
            if news.accept[way] {
                self.accept[way].notify_waiters();
            }
            if news.open[way] {
                self.open[way].notify_waiters();
            }
        }
        for (changed, notify) in [
            (news.datagram, &self.datagram),
            (news.room, &self.room),
            (news.turn, &self.turn),
        ] {
            if changed {
                notify.notify_waiters();
            }
        }
        done
    }

    /// Does something again after each notice, until it is done.
    async fn until<T>(
        &self,
        notify: &Notify,
        mut attempt: impl FnMut(&mut State) -> Option<T>,
    ) -> T {
        loop {
            let mut noticed = std::pin::pin!(notify.notified());
            noticed.as_mut().enable();
            if let Some(done) = self.change(&mut attempt) {
                return done;
            }
            noticed.await;
        }
    }
}

/// Which side of a connection this is, and what it permits before it knows its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

impl Connection {
    /// Begins a connection over a WebSocket whose handshake is over. `tasks` counts its task.
    pub(crate) fn begin<S>(
        stream: WebSocketStream<S>,
        side: Side,
        ends: Ends,
        (limits, timeouts): (&Limits, &Timeouts),
        tasks: &TaskTracker,
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let settings = settings(side, limits, timeouts);
        let state = State::new(settings, tokio::time::Instant::now());
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            accept: Default::default(),
            open: Default::default(),
            datagram: Notify::new(),
            room: Notify::new(),
            turn: Notify::new(),
            ends,
        });
        tasks.spawn(driver::drive(stream, shared.clone()));
        Self(Arc::new(Handle(shared)))
    }

    fn shared(&self) -> &Shared {
        &self.0.0
    }

    /// What can end the connection and does not keep it.
    pub(crate) fn closer(&self) -> Closer {
        Closer(Arc::downgrade(&self.0.0))
    }

    /// Waits until the peer has said what it permits: then streams can be opened.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn begun(&self) -> Result<(), ConnectionError> {
        let shared = self.shared();
        let begun = |state: &mut State| match state.error() {
            Some(error) => Some(Err(error.clone())),
            None => state.is_begun().then_some(Ok(())),
        };
        shared.until(&shared.turn, begun).await
    }

    pub(super) fn transport(&self) -> Transport {
        self.shared().ends.transport.clone()
    }

    pub(super) fn remote_address(&self) -> SocketAddr {
        self.shared().ends.remote
    }

    #[cfg(feature = "testing")]
    pub(super) fn local_addr(&self) -> Option<SocketAddr> {
        self.shared().ends.local
    }

    pub(super) async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let id = self.open(BOTH).await?;
        Ok((self.sending(id), self.receiving(id)))
    }

    pub(super) async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        Ok(self.sending(self.open(ONE).await?))
    }

    pub(super) async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let id = self.accept(BOTH).await?;
        Ok((self.sending(id), self.receiving(id)))
    }

    pub(super) async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        Ok(self.receiving(self.accept(ONE).await?))
    }

    fn sending(&self, id: u64) -> SendStream {
        let conn = self.0.clone();
        SendStream { conn, id }
    }

    fn receiving(&self, id: u64) -> RecvStream {
        let conn = self.0.clone();
        RecvStream { conn, id }
    }

    async fn open(&self, way: usize) -> Result<u64, ConnectionError> {
        let shared = self.shared();
        let open = |state: &mut State| ready(state.open(way));
        shared.until(&shared.open[way], open).await
    }

    async fn accept(&self, way: usize) -> Result<u64, ConnectionError> {
        let shared = self.shared();
        let accept = |state: &mut State| ready(state.accept(way));
        shared.until(&shared.accept[way], accept).await
    }

    pub(super) fn permit(&self, one_way: bool, streams: u32) {
        let way = if one_way { ONE } else { BOTH };
        self.shared().change(|state| state.permit(way, streams));
    }

    pub(super) fn set_receive_window(&self, bytes: u64) {
        let shared = self.shared();
        shared.change(|state| state.set_receive_window(bytes));
    }

    pub(super) fn max_datagram_size(&self) -> Option<usize> {
        lock(&self.shared().state).max_datagram_size()
    }

    pub(super) async fn send_datagram(&self, datagram: Bytes) -> Result<(), DatagramError> {
        let most = self.max_datagram_size().unwrap_or(0);
        if datagram.len() > most {
            return Err(DatagramError::TooLarge);
        }
        let shared = self.shared();
        let send = |state: &mut State| match state.error() {
            Some(_) => Some(Err(DatagramError::Lost)),
            None => state.send_datagram(&datagram).then_some(Ok(())),
        };
        shared.until(&shared.room, send).await
    }

    pub(super) async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        let shared = self.shared();
        let read = |state: &mut State| match state.read_datagram() {
            Some(datagram) => Some(Ok(datagram)),
            None => state.error().map(|error| Err(error.clone())),
        };
        shared.until(&shared.datagram, read).await
    }

    /// Ends the connection: the peer gets code and text behind what is in the socket already.
    pub(crate) fn close(&self, code: CloseCode, text: &str) {
        self.shared().change(|state| state.close(code, text));
    }

    pub(super) async fn closed(&self) -> ConnectionError {
        let shared = self.shared();
        let over = |state: &mut State| match state.error() {
            Some(error) if state.is_done() => Some(error.clone()),
            _ => None,
        };
        shared.until(&shared.turn, over).await
    }

    pub(super) fn error(&self) -> Option<ConnectionError> {
        lock(&self.shared().state).error().cloned()
    }

    pub(super) fn rtt(&self) -> Duration {
        self.stats().rtt
    }

    pub(super) fn stats(&self) -> ConnectionStats {
        lock(&self.shared().state).stats()
    }
}

/// See [`Connection::closer`].
#[derive(Debug)]
pub(crate) struct Closer(Weak<Shared>);

impl Closer {
    pub(crate) fn is_of_use(&self) -> bool {
        self.0.strong_count() > 0
    }

    pub(crate) fn close(&self, code: CloseCode, text: &str) {
        if let Some(shared) = self.0.upgrade() {
            shared.change(|state| state.close(code, text));
        }
    }
}

fn ready<T>(result: Result<Wait<T>, ConnectionError>) -> Option<Result<T, ConnectionError>> {
    match result {
        Ok(Wait::Done(value)) => Some(Ok(value)),
        Ok(Wait::Not) => None,
        Err(error) => Some(Err(error)),
    }
}

/// A server starts small and grants more on admission, as over QUIC.
fn settings(side: Side, limits: &Limits, timeouts: &Timeouts) -> Settings {
    let server = side == Side::Server;
    let stream = u64::from(limits.stream_window);
    let (data, streams, one_way) = match side {
        Side::Server => {
            let streams = PREAUTH_STREAMS.min(limits.channels.saturating_add(1));
            (u64::from(PREAUTH_BYTES), streams, 0)
        }
        Side::Client => {
            let streams = FEW_STREAMS.min(limits.channels);
            (windows::first(limits, 1), streams, VOLATILE_STREAMS)
        }
    };
    Settings {
        server,
        permits: Parameters {
            idle: u64::try_from(timeouts.idle.as_millis()).unwrap_or(u64::MAX),
            data,
            own_stream: stream,
            peers_stream: stream,
            one_way: stream,
            streams: [streams.into(), one_way.into()],
            datagram: DATAGRAM,
            record: RECORD as u64,
        },
        idle: timeouts.idle,
        keep_alive: timeouts.keep_alive,
        send_window: limits.send_window,
    }
}

/// What a WebSocket may take and hold that carries a connection.
pub(crate) fn socket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ)
        .write_buffer_size(0)
        .max_write_buffer_size(4 * RECORD)
        .max_message_size(Some(RECORD))
        .max_frame_size(Some(RECORD))
}

/// A WebSocket over a stream on which the handshake took place.
pub(crate) async fn upgraded<S>(stream: S, side: Side) -> WebSocketStream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let role = match side {
        Side::Client => Role::Client,
        Side::Server => Role::Server,
    };
    WebSocketStream::from_raw_socket(stream, role, Some(socket_config())).await
}

/// The sending side of a stream. Dropping it ends the stream as [`finish`](Self::finish) does.
#[derive(Debug)]
pub(crate) struct SendStream {
    conn: Arc<Handle>,
    id: u64,
}

impl SendStream {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut lock(&self.conn.0.state))
    }

    pub(super) fn set_priority(&self, priority: i32) {
        self.change(|state| state.set_priority(self.id, priority));
    }

    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Written, StreamError>> {
        self.change(|state| state.poll_write(self.id, cx, chunks))
    }

    pub(super) async fn write_all(&mut self, mut chunks: &mut [Bytes]) -> Result<(), StreamError> {
        while !chunks.is_empty() {
            let written = poll_fn(|cx| self.poll_write(cx, chunks)).await?;
            chunks = &mut std::mem::take(&mut chunks)[written.chunks..];
        }
        Ok(())
    }

    pub(super) fn finish(&mut self) {
        self.change(|state| state.finish(self.id));
    }

    pub(super) fn reset(&mut self, code: CloseCode) {
        self.change(|state| state.reset(self.id, code.value()));
    }

    pub(super) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<CloseCode>, StreamError>> + Send + Sync + 'static {
        // As a stream of QUIC does, it waits for the connection and does not hold it.
        let shared = self.conn.0.clone();
        let id = self.id;
        poll_fn(move |cx| lock(&shared.state).poll_stopped(id, cx))
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        self.change(|state| state.release_send(self.id));
    }
}

/// The receiving side of a stream. Dropping it before its end tells the peer that nothing more is read.
#[derive(Debug)]
pub(crate) struct RecvStream {
    conn: Arc<Handle>,
    id: u64,
}

impl RecvStream {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut lock(&self.conn.0.state))
    }

    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Option<usize>, StreamError>> {
        self.change(|state| state.poll_read(self.id, cx, chunks))
    }

    pub(super) async fn read(&mut self, most: usize) -> Result<Option<Bytes>, StreamError> {
        poll_fn(|cx| self.change(|state| state.poll_read_some(self.id, cx, most))).await
    }

    pub(super) fn stop(&mut self, code: CloseCode) {
        self.change(|state| state.stop(self.id, code.value()));
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        self.change(|state| state.release_recv(self.id));
    }
}
