//! [`Control`]: the state of a server for its operators, and their commands: the channel `stats`.
//!
//! One task inspects the server, four times a second at most and only while a client watches; otherwise it records
//! the traffic of each second, which is two numbers. It stores the latest state in one place, and the task of each
//! watcher sends the state from there: a slow watcher skips old states. Nothing is sent while nothing changes.

mod look;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;
use udpack::{
    Channel, CloseCode, Encoded, Fault, Message, RecvError, SendError, Server, ServerBuilder, Whom,
};

use self::look::{History, Looker};
use crate::base::code::Code;
use crate::server::jobs::sound_reason;
use crate::server::receiver::Receiver;
use crate::server::scope::Scope;
use crate::wire::STATS_CHANNEL;
use crate::wire::stats::ServerStats;

/// The shortest interval between reported states.
const TICK: Duration = Duration::from_millis(250);
/// The interval with many sockets: an inspection takes some microseconds for each of them.
const SLOW_TICK: Duration = Duration::from_secs(1);
/// The interval at which traffic is recorded while nobody watches.
const SECOND: Duration = Duration::from_secs(1);
/// This number of sockets counts as many.
const MANY: u64 = 1024;
/// The text for a client whose token lacks the right.
const NO_RIGHT: &str = "this token has no right to watch";
/// How long the other nodes of a cluster have to answer.
const ELSEWHERE: Duration = Duration::from_secs(2);

/// Reports the state of a server to operators, closes sockets for them, and passes on their request to shut down.
///
/// [`attach`](Self::attach) serves the channels named [`STATS_CHANNEL`] to tokens with the right `watch` or `admin`,
/// and [`run`](Self::run), in parallel to the server, inspects it for them. A handle.
///
/// ```
/// # use udpack::{Deny, Drain, Hello, Identity, Peer, Server};
/// # use udpack_transfer::{Control, Receiver, ReceiverConfig, Store, StoreConfig};
/// # async fn serve(store: Store) -> Result<(), Box<dyn std::error::Error>> {
/// let receiver = Receiver::new(store, ReceiverConfig::default());
/// let control = Control::new(&receiver);
/// let server = Server::builder()
///     .identity(Identity::load_or_create("keys")?)
///     .auth(|hello: Hello| async move { Ok::<_, Deny>(Peer::new("anybody")) });
/// let server = control.attach(receiver.attach(server)).bind("0.0.0.0:45456").await?;
/// let stop = async {
///     control.drain_asked().await;
///     control.shutting_down();
///     receiver.shutting_down();
/// };
/// tokio::select! {
///     ended = server.run_until(stop, Drain::default()) => ended?,
///     () = control.run(&server) => {}
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Control {
    inner: Arc<Inner>,
}

struct Inner {
    receiver: Receiver,
    began: Instant,
    /// The server, while it is inspected.
    server: Mutex<Option<Server>>,
    latest: watch::Sender<Option<Arc<Snapshot>>>,
    history: Mutex<History>,
    /// Notified when a client has begun to watch and waits for the first state.
    joined: Notify,
    waits: AtomicBool,
    drain: Notify,
    draining: AtomicBool,
    /// Bytes sent on such channels. They are not counted as traffic, otherwise each report would be a change.
    told: AtomicU64,
}

/// The reported state, and its frame for most watchers.
struct Snapshot {
    stats: ServerStats,
    frame: Encoded,
}

/// Bytes sent to one socket on such channels.
#[derive(Clone, Default)]
struct BytesSent(Arc<AtomicU64>);

/// The server is inspected while this value lives.
struct Looking<'a>(&'a Inner);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        drop(lock(&self.0.server).take());
    }
}

impl Control {
    /// Creates the control of the server whose transfers this receiver serves. The server's uptime counts from now.
    pub fn new(receiver: &Receiver) -> Self {
        Self {
            inner: Arc::new(Inner {
                receiver: receiver.clone(),
                began: Instant::now(),
                server: Mutex::new(None),
                latest: watch::Sender::new(None),
                history: Mutex::default(),
                joined: Notify::new(),
                waits: AtomicBool::new(false),
                drain: Notify::new(),
                draining: AtomicBool::new(false),
                told: AtomicU64::new(0),
            }),
        }
    }

    /// Registers this for the channels named [`STATS_CHANNEL`].
    pub fn attach(&self, server: ServerBuilder) -> ServerBuilder {
        let control = self.clone();
        server.channel(STATS_CHANNEL, move |channel: Channel| {
            let control = control.clone();
            async move { control.watch(channel).await }
        })
    }

    /// Inspects the server for the watchers, and records its traffic once a second. Never ends. Only one call may run
    /// at a time.
    ///
    /// # Drop
    /// Watchers get no further states.
    pub async fn run(&self, server: &Server) {
        let inner = &*self.inner;
        *lock(&inner.server) = Some(server.clone());
        let _looking = Looking(inner);
        let mut looker = Looker::new(inner, server);
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if inner.latest.receiver_count() == 0 {
                looker.note();
                let _ = tokio::time::timeout(SECOND, inner.joined.notified()).await;
                continue;
            }
            ticker.tick().await;
            let stats = looker.look().await;
            let many = stats.sockets_in_all > MANY;
            let waits = inner.waits.swap(false, Ordering::Relaxed);
            let is_news = |told: &Arc<Snapshot>| told.stats.steady() != stats.steady();
            if waits || inner.latest.borrow().as_ref().is_none_or(is_news) {
                match Encoded::new("stats", &stats) {
                    Ok(frame) => drop(
                        inner
                            .latest
                            .send_replace(Some(Arc::new(Snapshot { stats, frame }))),
                    ),
                    Err(error) => tracing::error!(%error, "the state of the server cannot be told"),
                }
            }
            if many {
                tokio::time::sleep(SLOW_TICK - TICK).await;
            }
        }
    }

    /// Waits until an administrator asks the server to shut down. The program then does so: see
    /// [`Server::run_until`].
    ///
    /// # Cancel safety
    /// Cancel safe: the next call returns for an earlier request.
    pub async fn drain_asked(&self) {
        self.inner.drain.notified().await;
    }

    /// To be called when the server begins to shut down: watchers are told, and their channels are closed once no
    /// transfer runs, so that they do not delay the end.
    pub fn shutting_down(&self) {
        self.inner.draining.store(true, Ordering::Relaxed);
    }

    /// The state of the server as reported to watchers; `None` while [`run`](Self::run) does not run.
    pub async fn stats(&self) -> Option<ServerStats> {
        let server = lock(&self.inner.server).clone()?;
        Some(Looker::new(&self.inner, &server).look().await)
    }

    /// Closes a socket with `forbidden`, and tells its peer the reason. Returns `false` if there is no socket of this
    /// id, or [`run`](Self::run) does not run. [`kick_anywhere`](Self::kick_anywhere) looks at the other nodes of a cluster, too.
    pub fn kick(&self, id: &str, reason: Option<&str>) -> bool {
        let server = lock(&self.inner.server).clone();
        let Some(socket) = server.and_then(|server| server.socket(id)) else {
            return false;
        };
        socket.abort(CloseCode::FORBIDDEN, by_operator(reason));
        true
    }

    /// As [`kick`](Self::kick), wherever in the server's cluster the socket is. Waits for the other nodes if it is not here, for at most
    /// 2 s. Of those that did not answer in time the names are given, if no node said that it closed the socket.
    ///
    /// # Errors
    /// When nobody closed it: the names of the nodes that did not answer, which may have done so all the same.
    ///
    /// # Cancel safety
    /// Dropping the future forgets the answers; the socket may be closed.
    pub async fn kick_anywhere(&self, id: &str, reason: Option<&str>) -> Result<(), Vec<String>> {
        if self.kick(id, reason) {
            return Ok(());
        }
        let server = lock(&self.inner.server).clone();
        let Some(cluster) = server.and_then(|server| server.cluster()) else {
            return Err(Vec::new());
        };
        let (whom, text) = (Whom::Session(id), by_operator(reason));
        let closed = cluster
            .close(whom, CloseCode::FORBIDDEN, &text, ELSEWHERE)
            .await;
        match closed.value {
            0 => Err(cluster.names(&closed.missing)),
            _ => Ok(()),
        }
    }

    /// Serves one watcher until it leaves.
    async fn watch(&self, channel: Channel) -> Result<(), RecvError> {
        let inner = &*self.inner;
        let peer = channel.peer();
        let scope = match inner.receiver.scope(peer.as_ref()) {
            Ok(scope) if scope.watches() => scope,
            _ => {
                channel.close(CloseCode::REFUSED, NO_RIGHT);
                return Ok(());
            }
        };
        let changed = || {
            let now = channel.peer();
            let same = |now: Scope| (now.watches(), now.admin) == (true, scope.admin);
            now != peer && !inner.receiver.scope(now.as_ref()).is_ok_and(same)
        };
        let own: BytesSent = channel.extensions().get_or_insert_with(BytesSent::default);
        if inner.tell_history(&channel, &own).await.is_err() {
            return Ok(());
        }
        let mut latest = inner.latest.subscribe();
        inner.waits.store(true, Ordering::Relaxed);
        inner.joined.notify_one();
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !changed() {
            let told = tokio::select! {
                message = channel.recv() => match message? {
                    Some(_) if changed() => Ok(()),
                    Some(message) => self.asked(&channel, &message, &scope).await,
                    None => return Ok(()),
                },
                Ok(()) = latest.changed() => {
                    let told = latest.borrow_and_update().clone();
                    match told {
                        Some(told) => inner.tell(&channel, &told, &own).await,
                        None => Ok(()),
                    }
                }
                _ = ticker.tick() => {
                    if inner.draining.load(Ordering::Relaxed) && inner.receiver.jobs.is_over() {
                        drop(channel.close(CloseCode::SHUTTING_DOWN, "the server is shutting down"));
                        return Ok(());
                    }
                    Ok(())
                }
            };
            if told.is_err() {
                return Ok(());
            }
        }
        channel.close(CloseCode::REFUSED, "the rights of this token have changed");
        Ok(())
    }

    async fn asked(
        &self,
        channel: &Channel,
        message: &Message,
        scope: &Scope,
    ) -> Result<(), SendError> {
        let known = ["kick", "drain"].contains(&message.event());
        let done = match message.event() {
            _ if !known => Err(Fault::new(
                Fault::NO_HANDLER,
                "no such event on a channel of the server's state",
            )),
            _ if !scope.admin => {
                let (code, text) = Scope::no_right("admin");
                Err(Fault::new(code.as_str(), text))
            }
            "kick" => self.disconnect_asked(channel, message).await,
            _ => {
                let by = by(channel);
                tracing::info!(by, "the server is asked to go down");
                Ok(())
            }
        };
        match done {
            Ok(()) => {
                channel.reply(message, &()).await?;
                if message.event() == "drain" {
                    self.inner.drain.notify_one();
                }
                Ok(())
            }
            Err(fault) => channel.fault(message, &fault).await,
        }
    }

    async fn disconnect_asked(&self, channel: &Channel, message: &Message) -> Result<(), Fault> {
        let bad = |text: String| Fault::new(Fault::BAD_PAYLOAD, text);
        let fields = message.fields().map_err(|error| bad(error.to_string()))?;
        let id = fields
            .str("socket")
            .map_err(|error| bad(error.to_string()))?;
        let reason = fields
            .opt_str("reason")
            .map_err(|error| bad(error.to_string()))?;
        let reason = sound_reason(reason).map_err(bad)?;
        if let Err(silent) = self.kick_anywhere(id, reason).await {
            let mut text = "no such socket is there".to_owned();
            if !silent.is_empty() {
                text = format!(
                    "{text}, and these nodes did not answer: {}",
                    silent.join(", ")
                );
            }
            return Err(Fault::new(Code::NotFound.as_str(), text));
        }
        let by = by(channel);
        tracing::info!(socket = id, by, reason, "closed by an operator");
        Ok(())
    }
}

fn by_operator(reason: Option<&str>) -> String {
    match reason {
        Some(reason) => format!("closed by an operator: {reason}"),
        None => "closed by an operator".to_owned(),
    }
}

impl Inner {
    async fn tell(
        &self,
        channel: &Channel,
        told: &Snapshot,
        own: &BytesSent,
    ) -> Result<(), SendError> {
        let limit = channel.frame_limit();
        let mut shorter = None;
        if told.frame.len() > limit {
            let mut stats = told.stats.clone();
            while stats.halve() {
                let frame = Encoded::new("stats", &stats)?;
                if frame.len() <= limit {
                    shorter = Some(frame);
                    break;
                }
            }
        }
        let frame = shorter.as_ref().unwrap_or(&told.frame);
        self.send(channel, frame, own).await
    }

    /// Sends the recorded traffic, as much as fits into a frame of this peer.
    async fn tell_history(&self, channel: &Channel, own: &BytesSent) -> Result<(), SendError> {
        let most = channel.frame_limit() / History::BYTES;
        let frame = {
            let history = lock(&self.history);
            Encoded::new("history", &history.fields(most))?
        };
        self.send(channel, &frame, own).await
    }

    async fn send(
        &self,
        channel: &Channel,
        frame: &Encoded,
        own: &BytesSent,
    ) -> Result<(), SendError> {
        // Counted before it is sent, so that a concurrent inspection does not count it as traffic.
        let bytes = frame.len() as u64;
        self.told.fetch_add(bytes, Ordering::Relaxed);
        own.0.fetch_add(bytes, Ordering::Relaxed);
        channel.send_encoded(frame).await
    }
}

/// The requester, for the log.
fn by(channel: &Channel) -> String {
    let peer = channel.peer();
    peer.map_or_else(String::new, |peer| peer.id().to_owned())
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while the lock is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
