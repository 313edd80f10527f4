//! [`Control`]: a server as its operators see it, and what they may do with it: the channel `stats`.
//!
//! One task looks at the server, four times a second at most and only while somebody watches; else it notes the traffic of each
//! second, which is two numbers. It leaves what it sees in one place, and each watcher sends the latest from there: who is
//! slow skips what is old. Nothing is sent while nothing changes.

mod look;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;
use udpack::{
    Channel, CloseCode, Encoded, Fault, Message, RecvError, SendError, Server, ServerBuilder,
};

use self::look::{History, Looker};
use crate::base::code::Code;
use crate::server::jobs::sound_reason;
use crate::server::receiver::Receiver;
use crate::server::scope::Scope;
use crate::wire::STATS_CHANNEL;
use crate::wire::stats::ServerStats;

/// How often the state is told at most.
const TICK: Duration = Duration::from_millis(250);
/// And how often where there are many sockets: each look takes some microseconds for each of them.
const SLOW_TICK: Duration = Duration::from_secs(1);
/// How often traffic is noted while nobody watches.
const SECOND: Duration = Duration::from_secs(1);
/// So many are many.
const MANY: u64 = 1024;
/// The text for a client whose token lacks the right.
const NO_RIGHT: &str = "this token has no right to watch";

/// Tells operators how a server is, closes sockets for them, and passes on their word that it shall go down.
///
/// [`attach`](Self::attach) serves the channels named [`STATS_CHANNEL`] to tokens with the right `watch` or `admin`, and
/// [`run`](Self::run), beside the server, looks at it for them. A handle.
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
    /// The server, while it is looked at.
    server: Mutex<Option<Server>>,
    latest: watch::Sender<Option<Arc<Snapshot>>>,
    history: Mutex<History>,
    /// Somebody has begun to watch, and waits for the first that is told.
    joined: Notify,
    waits: AtomicBool,
    drain: Notify,
    draining: AtomicBool,
    /// Bytes sent on channels of this kind: they are not counted, else telling would be news.
    told: AtomicU64,
}

/// What is told, and the frame in which most get it.
struct Snapshot {
    stats: ServerStats,
    frame: Encoded,
}

/// Bytes sent to one socket on channels of this kind.
#[derive(Clone, Default)]
struct BytesSent(Arc<AtomicU64>);

/// The server is looked at for as long as this lives.
struct Looking<'a>(&'a Inner);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        drop(lock(&self.0.server).take());
    }
}

impl Control {
    /// For the server whose transfers this receiver serves. Its time begins now.
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

    /// Looks at the server for those who watch, and once a second at its traffic. Never ends. One at a time.
    ///
    /// # Drop
    /// Nobody is told anything new any more.
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

    /// Waits until an administrator asks for the server to go down. What follows is the program's: see
    /// [`Server::run_until`].
    ///
    /// # Cancel safety
    /// Cancel safe: who asked before is heard by the next call.
    pub async fn drain_asked(&self) {
        self.inner.drain.notified().await;
    }

    /// To be called when the server begins to shut down: those who watch are told, and sent away once no transfer runs any
    /// more, so that they do not hold up the end.
    pub fn shutting_down(&self) {
        self.inner.draining.store(true, Ordering::Relaxed);
    }

    /// How the server is, as those who watch it are told; `None` while [`run`](Self::run) does not look.
    pub async fn stats(&self) -> Option<ServerStats> {
        let server = lock(&self.inner.server).clone()?;
        Some(Looker::new(&self.inner, &server).look().await)
    }

    /// Closes a socket with `forbidden`, and tells its peer why. `false` where there is none of this id, or the server is
    /// not [looked at](Self::run).
    pub fn kick(&self, id: &str, reason: Option<&str>) -> bool {
        let server = lock(&self.inner.server).clone();
        let Some(socket) = server.and_then(|server| server.socket(id)) else {
            return false;
        };
        socket.abort(
            CloseCode::FORBIDDEN,
            match reason {
                Some(reason) => format!("closed by an operator: {reason}"),
                None => "closed by an operator".to_owned(),
            },
        );
        true
    }

    /// Serves one who watches until it leaves.
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
            "kick" => self.disconnect_asked(channel, message),
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

    fn disconnect_asked(&self, channel: &Channel, message: &Message) -> Result<(), Fault> {
        let bad = |text: String| Fault::new(Fault::BAD_PAYLOAD, text);
        let fields = message.fields().map_err(|error| bad(error.to_string()))?;
        let id = fields
            .str("socket")
            .map_err(|error| bad(error.to_string()))?;
        let reason = fields
            .opt_str("reason")
            .map_err(|error| bad(error.to_string()))?;
        let reason = sound_reason(reason).map_err(bad)?;
        if !self.kick(id, reason) {
            return Err(Fault::new(
                Code::NotFound.as_str(),
                "no such socket is there",
            ));
        }
        let by = by(channel);
        tracing::info!(socket = id, by, reason, "closed by an operator");
        Ok(())
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

    /// What was before, as much of it as a frame of this peer holds.
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
        // Noted before it is sent: a look meanwhile finds it sent at the latest.
        let bytes = frame.len() as u64;
        self.told.fetch_add(bytes, Ordering::Relaxed);
        own.0.fetch_add(bytes, Ordering::Relaxed);
        channel.send_encoded(frame).await
    }
}

/// Who asks, for the log.
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
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
