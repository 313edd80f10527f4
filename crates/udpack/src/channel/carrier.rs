//! [`Carrier`]: the state that the channels of a session share.
//!
//! A channel knows its carrier and nothing else of its session. The carrier holds the current connection, the limits,
//! the counters, the live channels and the reason of the end. The session (`session.rs`) owns it and replaces its
//! connection. Channels leave two requests here for the session: a close, and acknowledgements to send.
//!
//! # Locks
//! In this order, none across an `.await`: the number of the connection (`number`), the connection, the channels kept,
//! an outbox or inbox, the counts to confirm, the close that is asked for.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use crate::base::pool::{Pool, Tenant};
use crate::base::wake::{WakeFlag, WakeFlags};
use crate::base::{Lazy, LogLimit, lock};
use crate::channel::channel_core::ChannelCore;
use crate::channel::inbox::Inbox;
use crate::channel::outbox::{Budget, Outbox};
use crate::channel::write_scheduler::WriteScheduler;
use crate::metrics::Counts;
use crate::metrics::speed::Counters;
use crate::transport::windows::ReceiveWindow;
use crate::transport::{Connection, ConnectionError};
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::{Limits, Timeouts};

/// A reason that is set once and can be awaited.
#[derive(Debug, Default)]
pub(crate) struct End {
    reason: OnceLock<Box<CloseReason>>,
    set: Notify,
}

impl End {
    /// Sets the reason unless one is set already; returns whether it did.
    pub(crate) fn set(&self, reason: CloseReason) -> bool {
        let first = self.reason.set(Box::new(reason)).is_ok();
        if first {
            self.set.notify_waiters();
        }
        first
    }

    pub(crate) fn get(&self) -> Option<&CloseReason> {
        self.reason.get().map(|reason| &**reason)
    }

    pub(crate) async fn wait(&self) -> CloseReason {
        loop {
            let mut notified = std::pin::pin!(self.set.notified());
            notified.as_mut().enable();
            if let Some(reason) = self.get() {
                return reason.clone();
            }
            notified.await;
        }
    }
}

/// Identifies a channel in its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ChannelKey {
    /// This side opened it.
    pub(crate) own: bool,
    /// The opener's number for it.
    pub(crate) id: u64,
}

/// The application wants to close, or to send the peer a message on the control stream.
pub(crate) const REQUESTED: WakeFlag = WakeFlag(1);
/// There is something to confirm.
pub(crate) const CONFIRM: WakeFlag = WakeFlag(1 << 1);
/// How far this side has read one of the channels, to be sent to the peer.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Confirm {
    /// How many frames the peer may discard.
    pub(crate) received: Option<u64>,
    /// The last mark that the program has reached.
    pub(crate) mark: Option<u64>,
}

/// One connection of a session, with the scheduler of its writers. The session's next connection has a scheduler of
/// its own, so that bulk data of the lost connection does not count.
pub(crate) struct SessionConnection {
    conn: Connection,
    /// Decides which channel writes next, and limits the bulk data in flight.
    pub(crate) scheduler: WriteScheduler,
}

impl SessionConnection {
    fn new(conn: Connection) -> Arc<Self> {
        Arc::new(Self {
            conn,
            scheduler: WriteScheduler::default(),
        })
    }
}

impl Deref for SessionConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.conn
    }
}

/// The state that the channels of a session share. See the [module](self).
pub(crate) struct Carrier {
    conn: RwLock<Arc<SessionConnection>>,
    /// The number of the present connection, counted from 1.
    number: Mutex<u64>,
    /// Whether this side dialled.
    pub(crate) client: bool,
    pub(crate) limits: Arc<Limits>,
    pub(crate) timeouts: Arc<Timeouts>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) counts: Arc<Counts>,
    /// Limits the log lines that this peer can cause.
    pub(crate) log_limit: LogLimit,
    pub(crate) end: End,
    /// The reason with which the application wants to close, if it does.
    close: Mutex<Option<Box<CloseReason>>>,
    /// Wakes the session's task.
    pub(crate) wake: WakeFlags,
    pub(crate) registry: Registry,
    /// Acknowledgements and passed marks that are not sent yet.
    confirms: Mutex<Lazy<HashMap<ChannelKey, Confirm>>>,
    pub(crate) receive: Receive,
    /// Writer tasks; each ends with its channel or with the connection.
    pub(crate) tasks: TaskTracker,
}

/// The channels of a session.
#[derive(Default)]
pub(crate) struct Registry {
    /// The live channels, so that a close can flush them.
    cores: Mutex<Lazy<HashMap<u64, Weak<ChannelCore>>>>,
    /// The channels that can continue on another connection.
    resumable: Mutex<Lazy<HashMap<ChannelKey, Arc<ChannelCore>>>>,
    /// On a client: the channels that end with the connection.
    tied: Mutex<Tied>,
    /// Notified when a channel ends.
    ended: Notify,
    next_key: AtomicU64,
}

/// Channels that end with their connection.
#[derive(Default)]
struct Tied {
    channels: Vec<(Weak<Outbox>, Weak<Inbox>)>,
    /// At this number of entries, the ended ones are removed.
    tidy_at: usize,
}

impl Tied {
    fn tidy(&mut self) {
        self.channels.retain(|(outbox, inbox)| {
            let sends = outbox.upgrade().is_some_and(|outbox| !outbox.is_over());
            sends
                || inbox
                    .upgrade()
                    .is_some_and(|inbox| inbox.ending().is_none())
        });
        self.tidy_at = 2 * self.channels.len() + 16;
    }
}

/// The limits of receiving and sending.
pub(crate) struct Receive {
    /// Largest frame that the peer accepts, in bytes.
    pub(crate) peer_frame: AtomicU64,
    /// The connection's receive window.
    pub(crate) window: ReceiveWindow,
    /// On a server: the pool of memory for frames that arrive in parts, and the peer's tenant.
    pub(crate) frames: OnceLock<Box<(Pool, Tenant)>>,
    /// The memory budget of resumable channels.
    pub(crate) budget: Arc<Budget>,
}

impl Carrier {
    pub(crate) fn new(
        conn: Connection,
        client: bool,
        (limits, timeouts): (Arc<Limits>, Arc<Timeouts>),
        parent: Arc<Counters>,
        counts: Arc<Counts>,
    ) -> Arc<Self> {
        Arc::new(Self {
            conn: RwLock::new(SessionConnection::new(conn)),
            number: Mutex::new(1),
            client,
            receive: Receive {
                peer_frame: AtomicU64::new(limits.frame as u64),
                window: ReceiveWindow::new(&limits),
                frames: OnceLock::new(),
                budget: Arc::new(Budget::new(limits.resume_bytes)),
            },
            limits,
            timeouts,
            counters: Counters::child(parent),
            counts,
            log_limit: LogLimit::default(),
            end: End::default(),
            close: Mutex::default(),
            wake: WakeFlags::default(),
            registry: Registry::default(),
            confirms: Mutex::default(),
            tasks: TaskTracker::new(),
        })
    }

    /// Registers a channel of a client that ends with its connection.
    pub(crate) fn tie(&self, outbox: &Arc<Outbox>, inbox: &Arc<Inbox>) {
        let mut tied = lock(&self.registry.tied);
        if tied.channels.len() >= tied.tidy_at {
            tied.tidy();
        }
        let channel = (Arc::downgrade(outbox), Arc::downgrade(inbox));
        tied.channels.push(channel);
    }

    /// Whether a client has a channel that ends with the connection.
    pub(crate) fn is_tied(&self) -> bool {
        let mut tied = lock(&self.registry.tied);
        tied.tidy();
        !tied.channels.is_empty()
    }

    /// Replaces the connection and returns the number of the new one. Streams of earlier connections are orphaned,
    /// and receive windows of an earlier connection no longer count.
    pub(crate) fn set_connection(&self, conn: Connection) -> u64 {
        let mut number = lock(&self.number);
        *self.conn.write().unwrap_or_else(PoisonError::into_inner) = SessionConnection::new(conn);
        *number += 1;
        lock(&self.confirms).take();
        // Code that ended the session in the meantime has closed the earlier connection.
        if let Some(reason) = self.end.get() {
            self.conn().close_because(reason);
        }
        *number
    }

    /// The current connection.
    pub(crate) fn conn(&self) -> Arc<SessionConnection> {
        self.conn
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Counts bytes that a channel has taken from QUIC, and grows the connection's window with them.
    pub(crate) fn read(&self, bytes: u64) {
        if self.receive.window.read(bytes) {
            self.receive.window.used(&self.conn());
        }
    }

    /// Largest frame this side may send, in bytes.
    pub(crate) fn frame_limit(&self) -> usize {
        usize::try_from(self.receive.peer_frame.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    /// The current connection with its number.
    pub(crate) fn current(&self) -> (Arc<SessionConnection>, u64) {
        let number = lock(&self.number);
        (self.conn(), *number)
    }

    /// Calls `act` while connection `number` is the current one; does nothing and returns `None` if it is not.
    pub(crate) fn while_current<T>(&self, number: u64, act: impl FnOnce() -> T) -> Option<T> {
        let present = lock(&self.number);
        (*present == number).then(act)
    }

    pub(crate) fn closed_reason(&self) -> CloseReason {
        self.end
            .get()
            .cloned()
            .or_else(|| self.asked_close())
            .unwrap_or_else(|| lost("the socket is over"))
    }

    /// Keeps a channel for the next connection.
    pub(crate) fn keep(&self, core: &Arc<ChannelCore>) {
        lock(&self.registry.resumable)
            .get_or_make()
            .insert(core.key, core.clone());
    }

    /// A channel kept for the next connection.
    pub(crate) fn kept(&self, key: ChannelKey) -> Option<Arc<ChannelCore>> {
        lock(&self.registry.resumable).get()?.get(&key).cloned()
    }

    /// A live channel.
    pub(crate) fn live(&self, key: ChannelKey) -> Option<Arc<ChannelCore>> {
        self.kept(key).or_else(|| {
            let cores = lock(&self.registry.cores);
            let mut cores = cores.get()?.values().filter_map(Weak::upgrade);
            cores.find(|core| core.key == key)
        })
    }

    /// The channels that this side opened and keeps for the next connection.
    pub(crate) fn kept_own(&self) -> Vec<Arc<ChannelCore>> {
        lock(&self.registry.resumable)
            .get()
            .into_iter()
            .flat_map(HashMap::values)
            .filter(|core| core.key.own)
            .cloned()
            .collect()
    }

    /// How many channels that the peer opened are kept.
    pub(crate) fn kept_theirs(&self) -> usize {
        lock(&self.registry.resumable)
            .get()
            .into_iter()
            .flat_map(HashMap::keys)
            .filter(|key| !key.own)
            .count()
    }

    /// Removes the channels that have ended in both directions.
    pub(crate) fn prune(&self) {
        if let Some(resumable) = lock(&self.registry.resumable).get_mut() {
            resumable.retain(|_, core| !core.is_over());
        }
    }

    /// Ends the channels that the peer opened and no longer lists. Channels that the peer has opened on this
    /// connection are excepted, because their streams may overtake the list.
    pub(crate) fn retain_theirs(&self, open: &[u64]) {
        let open: HashSet<_> = open.iter().collect();
        let (_, number) = self.current();
        let gone: Vec<_> = lock(&self.registry.resumable)
            .get_or_make()
            .extract_if(|key, core| {
                !key.own && core.connection_number() < number && !open.contains(&key.id)
            })
            .collect();
        for (_, core) in gone {
            core.fail(
                self,
                &CloseReason::peer(CloseCode::NORMAL, "the peer has ended the channel"),
            );
        }
    }

    /// Ends all channels that waited for another connection.
    pub(crate) fn fail_resumable(&self, reason: &CloseReason) {
        let cores = lock(&self.registry.resumable).take();
        for core in cores.into_values() {
            core.fail(self, reason);
        }
    }

    /// Queues an acknowledgement: the peer need not keep the first `frames` of this channel.
    pub(crate) fn confirm_later(&self, key: Option<ChannelKey>, frames: u64) {
        if let Some(key) = key {
            self.queue_confirm(key, |confirm| confirm.received = Some(frames));
        }
    }

    /// Queues `$passed`: the program has read up to this mark of the channel.
    pub(crate) fn passed_later(&self, key: ChannelKey, mark: u64) {
        self.queue_confirm(key, |confirm| confirm.mark = Some(mark));
    }

    fn queue_confirm(&self, key: ChannelKey, what: impl FnOnce(&mut Confirm)) {
        let mut confirms = lock(&self.confirms);
        let confirms = confirms.get_or_make();
        if confirms.is_empty() {
            self.wake.set(CONFIRM);
        }
        what(confirms.entry(key).or_default());
    }

    /// The acknowledgements and passed marks to send now.
    pub(crate) fn take_confirms(&self) -> HashMap<ChannelKey, Confirm> {
        lock(&self.confirms).take()
    }

    /// The most specific reason for the end of the connection: a reason of this side or of the peer's `$close` takes
    /// precedence over QUIC's.
    pub(crate) fn reason_for(&self, error: &ConnectionError) -> CloseReason {
        if let Some(reason) = self.end.get() {
            return reason.clone();
        }
        if *error == ConnectionError::Local
            && let Some(reason) = self.asked_close()
        {
            return reason;
        }
        error.reason()
    }

    /// Asks for a close; the first reason counts.
    pub(crate) fn ask_close(&self, code: CloseCode, text: String) {
        let mut close = lock(&self.close);
        if close.is_none() {
            *close = Some(Box::new(CloseReason::local(code, text)));
            self.wake.set(REQUESTED);
        }
    }

    /// Why the application wants to close, if it does.
    pub(crate) fn asked_close(&self) -> Option<CloseReason> {
        lock(&self.close).as_deref().cloned()
    }

    /// Whether the session is over, or the application wants to close.
    pub(crate) fn closing(&self) -> bool {
        self.end.get().is_some() || lock(&self.close).is_some()
    }

    pub(crate) fn next_registration(&self) -> u64 {
        self.registry.next_key.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn register(&self, registration: u64, core: &Arc<ChannelCore>) {
        lock(&self.registry.cores)
            .get_or_make()
            .insert(registration, Arc::downgrade(core));
    }

    /// Removes a channel; returns whether it was registered.
    pub(crate) fn unregister(&self, registration: u64) -> bool {
        let was_there = lock(&self.registry.cores)
            .get_mut()
            .is_some_and(|cores| cores.remove(&registration).is_some());
        if was_there {
            self.registry.ended.notify_waiters();
        }
        was_there
    }

    fn live_cores(&self) -> Vec<Arc<ChannelCore>> {
        lock(&self.registry.cores)
            .get()
            .into_iter()
            .flat_map(HashMap::values)
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// Channels whose writer has not ended yet.
    pub(crate) fn live_channels(&self) -> usize {
        lock(&self.registry.cores).get().map_or(0, HashMap::len)
    }

    /// Makes every channel send its queue and then end; no channel is kept for resuming.
    pub(crate) fn finish_channels(&self) {
        for core in self.live_cores() {
            core.forget();
            core.finish();
        }
    }

    /// Makes every channel send its queue and then end with this reason.
    pub(crate) fn finish_channels_because(&self, reason: &CloseReason) {
        for core in self.live_cores() {
            core.finish_because(reason);
        }
    }

    /// Waits until no channel is live.
    pub(crate) async fn all_channels_done(&self) {
        loop {
            let mut ended = std::pin::pin!(self.registry.ended.notified());
            ended.as_mut().enable();
            if self.live_channels() == 0 {
                return;
            }
            ended.await;
        }
    }

    /// Waits until no channel is live, at most `within`.
    pub(crate) async fn channels_done(&self, within: Duration) -> bool {
        let conn = self.conn();
        tokio::select! {
            () = self.all_channels_done() => true,
            _ = conn.closed() => true,
            () = tokio::time::sleep(within) => false,
        }
    }
}

/// The reason for a connection that ended while a channel still needed it.
pub(crate) fn lost(text: &str) -> CloseReason {
    CloseReason::new(CloseCode::CONNECTION_LOST, text, Side::Transport)
}

impl fmt::Debug for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Carrier")
            .field("remote", &self.conn().remote_address())
            .field("end", &self.end.get())
            .finish_non_exhaustive()
    }
}
