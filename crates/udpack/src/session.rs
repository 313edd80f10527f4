//! What a socket and its channels share: the connection, the limits, the counters and how it all ends.
//!
//! `Socket` and `Channel` are handles over this; the driver task of a socket (`socket.rs`) acts on the
//! wishes left here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use crate::auth::Peer;
use crate::code::{CloseCode, CloseReason, Side, printable};
use crate::config::{Limits, Timeouts};
use crate::control::{GoAway, Welcome};
use crate::extensions::Extensions;
use crate::outbox::Outbox;
use crate::quiet::Quiet;
use crate::speed::Counters;
use crate::turns::Turns;

/// Locks a mutex whose data stays sound when a holder panics.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A reason that is set once and can be awaited.
#[derive(Debug, Default)]
pub(crate) struct End {
    reason: OnceLock<CloseReason>,
    set: Notify,
}

impl End {
    /// Sets the reason unless one is set already; says whether it did.
    pub(crate) fn set(&self, reason: CloseReason) -> bool {
        let first = self.reason.set(reason).is_ok();
        if first {
            self.set.notify_waiters();
        }
        first
    }

    pub(crate) fn get(&self) -> Option<&CloseReason> {
        self.reason.get()
    }

    pub(crate) async fn wait(&self) -> CloseReason {
        loop {
            let mut notified = std::pin::pin!(self.set.notified());
            notified.as_mut().enable();
            if let Some(reason) = self.reason.get() {
                return reason.clone();
            }
            notified.await;
        }
    }
}

/// What the application asked the driver to do.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    /// Close gracefully for this reason.
    pub(crate) close: Option<CloseReason>,
    /// Tell the peer to go away.
    pub(crate) goaway: Option<GoAway>,
}

/// Shared state of one socket.
pub(crate) struct Session {
    conn: RwLock<Arc<quinn::Connection>>,
    /// Whether this side dialled.
    pub(crate) client: bool,
    pub(crate) peer: OnceLock<Peer>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) timeouts: Arc<Timeouts>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) extensions: Extensions,
    /// What the server announced (at the client) or has announced (at the server); set on admission.
    pub(crate) welcome: OnceLock<Welcome>,
    pub(crate) admitted: Notify,
    /// The peer's agent text, set at the server.
    pub(crate) agent: OnceLock<String>,
    /// Largest frame the peer takes.
    pub(crate) peer_frame: AtomicU64,
    pub(crate) end: End,
    /// Bounds what this peer's misbehaviour puts into the log.
    pub(crate) quiet: Quiet,
    pub(crate) wishes: Mutex<Wishes>,
    pub(crate) wished: Notify,
    pub(crate) received_goaway: OnceLock<GoAway>,
    /// Writers of the live channels, so that a close can flush them.
    outboxes: Mutex<HashMap<u64, Weak<Outbox>>>,
    pub(crate) channel_ended: Notify,
    next_key: AtomicU64,
    /// Whose turn it is to write.
    pub(crate) turns: Turns,
    next_channel: AtomicU64,
    /// Writer tasks; each ends with its channel or with the connection.
    pub(crate) tasks: TaskTracker,
    /// A client's endpoint lives as long as its socket.
    pub(crate) endpoint: Option<quinn::Endpoint>,
    /// At a client: what its handles hold, so that the last one to go closes the connection.
    lease: OnceLock<Weak<Lease>>,
    /// The socket's handle, for handlers that ask for it.
    pub(crate) handle: OnceLock<Weak<crate::socket::Handle>>,
}

/// Held by the handles of a client's socket and by its channels; the connection closes with the last one.
pub(crate) struct Lease {
    session: Arc<Session>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.session.wish_close(CloseCode::NORMAL, String::new());
    }
}

impl Session {
    pub(crate) fn new(
        conn: quinn::Connection,
        client: bool,
        limits: Arc<Limits>,
        timeouts: Arc<Timeouts>,
        parent: Arc<Counters>,
        endpoint: Option<quinn::Endpoint>,
    ) -> Arc<Self> {
        Arc::new(Self {
            conn: RwLock::new(Arc::new(conn)),
            client,
            peer: OnceLock::new(),
            peer_frame: AtomicU64::new(limits.frame as u64),
            limits,
            timeouts,
            counters: Counters::child(parent),
            extensions: Extensions::default(),
            welcome: OnceLock::new(),
            admitted: Notify::new(),
            agent: OnceLock::new(),
            end: End::default(),
            quiet: Quiet::default(),
            wishes: Mutex::default(),
            wished: Notify::new(),
            received_goaway: OnceLock::new(),
            outboxes: Mutex::default(),
            channel_ended: Notify::new(),
            next_key: AtomicU64::new(0),
            turns: Turns::default(),
            next_channel: AtomicU64::new(1),
            tasks: TaskTracker::new(),
            endpoint,
            lease: OnceLock::new(),
            handle: OnceLock::new(),
        })
    }

    /// The connection of this moment.
    pub(crate) fn conn(&self) -> Arc<quinn::Connection> {
        self.conn
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Makes the connection end with its last handle; called once, at a client.
    pub(crate) fn lend(self: &Arc<Self>) -> Arc<Lease> {
        let lease = Arc::new(Lease {
            session: self.clone(),
        });
        let _ = self.lease.set(Arc::downgrade(&lease));
        lease
    }

    /// One more holder of the lease, at a client.
    pub(crate) fn lease(&self) -> Option<Arc<Lease>> {
        self.lease.get()?.upgrade()
    }

    /// Largest frame this side may send, in bytes.
    pub(crate) fn frame_limit(&self) -> usize {
        usize::try_from(self.peer_frame.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    pub(crate) fn next_channel_id(&self) -> u64 {
        self.next_channel.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn id(&self) -> &str {
        self.welcome
            .get()
            .map_or("", |welcome| welcome.session.as_str())
    }

    /// Why the connection ended, in the best words known: a reason given here or by the peer's `$close` beats
    /// what QUIC reports.
    pub(crate) fn reason_for(&self, error: &quinn::ConnectionError) -> CloseReason {
        if let Some(reason) = self.end.get() {
            return reason.clone();
        }
        if matches!(error, quinn::ConnectionError::LocallyClosed)
            && let Some(reason) = lock(&self.wishes).close.clone()
        {
            return reason;
        }
        CloseReason::from_connection(error)
    }

    /// Leaves the wish to close; the first one counts.
    pub(crate) fn wish_close(&self, code: CloseCode, text: String) {
        let mut wishes = lock(&self.wishes);
        if wishes.close.is_none() {
            wishes.close = Some(CloseReason::local(code, text));
            self.wished.notify_one();
        }
    }

    pub(crate) fn closing(&self) -> bool {
        self.end.get().is_some() || lock(&self.wishes).close.is_some()
    }

    /// Ends the connection at once; what is queued is lost.
    pub(crate) fn abort(&self, reason: CloseReason) {
        let code = reason.code.varint();
        let text = reason.text.clone();
        let _ = self.end.set(reason);
        self.conn().close(code, cut(&text, 256).as_bytes());
    }

    pub(crate) fn register(&self, outbox: &Arc<Outbox>) -> u64 {
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        lock(&self.outboxes).insert(key, Arc::downgrade(outbox));
        key
    }

    pub(crate) fn unregister(&self, key: u64) {
        lock(&self.outboxes).remove(&key);
        self.channel_ended.notify_waiters();
    }

    /// Channels whose writer has not ended yet.
    pub(crate) fn live_channels(&self) -> usize {
        lock(&self.outboxes).len()
    }

    /// Lets every channel send what is queued and then end.
    pub(crate) fn finish_channels(&self) {
        let outboxes: Vec<_> = lock(&self.outboxes)
            .values()
            .filter_map(Weak::upgrade)
            .collect();
        for outbox in outboxes {
            outbox.finish(None);
        }
    }

    /// Waits until no channel is live, at most `within`.
    pub(crate) async fn channels_done(&self, within: Duration) -> bool {
        let wait = async {
            loop {
                let mut ended = std::pin::pin!(self.channel_ended.notified());
                ended.as_mut().enable();
                if self.live_channels() == 0 {
                    return;
                }
                ended.await;
            }
        };
        let conn = self.conn();
        tokio::select! {
            () = wait => true,
            _ = conn.closed() => true,
            () = tokio::time::sleep(within) => false,
        }
    }

    /// Waits for admission, or for the end that came instead.
    pub(crate) async fn wait_admitted(&self) -> Result<(), CloseReason> {
        loop {
            let mut admitted = std::pin::pin!(self.admitted.notified());
            admitted.as_mut().enable();
            if self.welcome.get().is_some() {
                return Ok(());
            }
            tokio::select! {
                () = admitted => {}
                reason = self.end.wait() => return Err(reason),
            }
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id())
            .field("remote", &self.conn().remote_address())
            .field("end", &self.end.get())
            .finish_non_exhaustive()
    }
}

/// The longest prefix of `text` with at most `limit` bytes.
pub(crate) fn cut(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The reason for a connection that ended while a channel still needed it.
pub(crate) fn lost(text: &str) -> CloseReason {
    CloseReason::new(CloseCode::CONNECTION_LOST, text, Side::Transport)
}

impl CloseCode {
    pub(crate) fn varint(self) -> quinn::VarInt {
        quinn::VarInt::from_u64(self.value()).unwrap_or(quinn::VarInt::MAX)
    }
}

impl CloseReason {
    /// What QUIC reports, in this library's words.
    pub(crate) fn from_connection(error: &quinn::ConnectionError) -> Self {
        use quinn::ConnectionError as E;
        match error {
            E::ApplicationClosed(close) => Self::peer(
                CloseCode::new(close.error_code.into_inner()),
                &String::from_utf8_lossy(&close.reason),
            ),
            E::ConnectionClosed(close)
                if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED =>
            {
                Self::new(
                    CloseCode::SERVER_BUSY,
                    "the server accepts no connection right now",
                    Side::Peer,
                )
            }
            E::ConnectionClosed(close) => Self::new(
                CloseCode::TRANSPORT_ERROR,
                printable(&close.to_string(), 256),
                Side::Transport,
            ),
            E::TimedOut => Self::new(
                CloseCode::TIMED_OUT,
                "nothing was heard from the peer in time",
                Side::Transport,
            ),
            E::Reset => Self::new(
                CloseCode::PEER_RESTARTED,
                "the peer no longer knows this connection",
                Side::Transport,
            ),
            E::VersionMismatch => Self::new(
                CloseCode::VERSION,
                "the peer speaks no common QUIC version",
                Side::Peer,
            ),
            E::LocallyClosed => Self::new(
                CloseCode::CONNECTION_LOST,
                "the endpoint was closed",
                Side::Local,
            ),
            E::TransportError(e) => Self::new(
                CloseCode::TRANSPORT_ERROR,
                printable(&e.to_string(), 256),
                Side::Transport,
            ),
            E::CidsExhausted => Self::new(
                CloseCode::TRANSPORT_ERROR,
                "connection ids are exhausted",
                Side::Transport,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_connection_reads_as_busy_and_may_be_retried() {
        let close = quinn::ConnectionClose {
            error_code: quinn::TransportErrorCode::CONNECTION_REFUSED,
            frame_type: None,
            reason: bytes::Bytes::new(),
        };
        let reason = CloseReason::from_connection(&quinn::ConnectionError::ConnectionClosed(close));
        assert_eq!((reason.code, reason.retry), (CloseCode::SERVER_BUSY, true));
    }
}
