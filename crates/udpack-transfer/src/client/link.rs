//! [`Link`]: a server to which a transfer reconnects.
//!
//! A link has one socket at a time. Each task that needs the socket asks the link for it. The first task that finds it
//! lost reconnects while the others wait. What reconnecting cannot mend (a refused token, another key, another version)
//! is final. A link of several paths is one link for each path; transfers spread their lanes over them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::future;
use tokio::sync::{Mutex, broadcast};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use udpack::{
    Client, CloseCode, CloseReason, ConnectError, GoAway, Outage, Probes, Side, Socket,
    SocketState, Transport, TransportChoice, TransportReason,
};

use crate::local::error::TransferError;

/// How a [`Link`] reconnects. Attempts and the time without progress count from the last progress of the transfer
/// ([`Link::progressed`]); a connection alone does not reset them.
pub use udpack::Reconnect as Retry;

/// Events that wait for a slow watcher; when there are more, it misses the oldest.
const EVENTS: usize = 32;
/// How long one of several paths may bring nothing while the server owes something: it gives a sign of life each second.
const QUIET: Duration = Duration::from_millis(1500);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long a path of several rests that could not be reached.
const REST: Duration = Duration::from_secs(5);

/// An event of a [`Link`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkEvent {
    /// The connection is lost; the next attempt begins after the delay.
    Reconnecting {
        /// The number of the attempt, counted from 1 since the last progress.
        attempt: u32,
        /// The time until the attempt.
        delay: Duration,
        /// The last error.
        reason: String,
    },
    /// The connection is back.
    Connected,
    /// One of several paths is gone; it is tried again after the delay, and the others go on.
    PathLost {
        /// Which one.
        path: String,
        /// How long until then.
        delay: Duration,
        /// What went wrong last.
        reason: String,
    },
    /// One of several paths is there, for the first time or again.
    PathConnected {
        /// Which one.
        path: String,
    },
    /// The connection uses another transport than the one before it, or the first connection does not use QUIC.
    TransportChanged {
        /// The new transport.
        to: Transport,
        /// The reason.
        why: TransportReason,
    },
}

/// A server to which lanes reconnect. A handle: clones share one socket.
#[derive(Debug, Clone)]
pub struct Link {
    way: Way,
    retry: Retry,
    shared: Arc<Shared>,
    /// What this one is among several.
    path: Option<Path>,
    /// The paths of a link that has several, this one among them.
    all: Arc<[Self]>,
}

/// One of several paths.
#[derive(Debug, Clone)]
struct Path {
    name: Arc<str>,
    moved: Arc<AtomicU64>,
    /// Whether it was told that it is there.
    told: Arc<AtomicBool>,
    /// When any of them last brought something on.
    progress: Arc<StdMutex<Instant>>,
}

/// What one of several paths has carried: see [`Link::paths`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PathProgress {
    /// Its name, as given to [`Link::of_paths`].
    pub path: String,
    /// Bytes of files that have arrived over it, repetitions included.
    pub moved: u64,
    /// Whether it has a connection now.
    pub connected: bool,
}

#[derive(Debug, Clone)]
enum Way {
    /// A socket of the caller, which may reconnect by itself. The link ends with the socket.
    Given(Socket),
    Dial {
        client: Client,
        address: Arc<str>,
    },
}

#[derive(Debug)]
struct Shared {
    /// Held while connecting: one reconnect at a time.
    state: Mutex<State>,
    /// The time without progress.
    outage: StdMutex<Outage>,
    events: broadcast::Sender<LinkEvent>,
}

/// What was lost and can be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    /// A lane, or its socket. The task that opens the next lane counts these losses.
    Lane,
    /// A socket that was never admitted. The link counts these losses, and waits.
    Admission,
}

#[derive(Debug, Default)]
struct State {
    socket: Option<Socket>,
    /// Why there will be no other socket.
    over: Option<TransferError>,
    /// When the socket was connected.
    since: Option<Instant>,
    /// When to probe UDP while the socket runs over TCP, and the task that does.
    probes: Arc<StdMutex<Probes>>,
    looking: Option<Looking>,
}

/// A task that probes UDP. Dropping it ends the task.
#[derive(Debug)]
struct Looking(AbortHandle);

impl Drop for Looking {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Link {
    /// Connects with `client` to `HOST[:PORT]` when a socket is first needed, and again when it is lost.
    pub fn new(client: Client, address: impl Into<String>) -> Self {
        let address = Arc::from(address.into());
        Self::over(Way::Dial { client, address }, None)
    }

    /// Like [`new`](Self::new), beginning with a socket that is connected already.
    pub fn connected(client: Client, address: impl Into<String>, socket: &Socket) -> Self {
        let address = Arc::from(address.into());
        Self::over(Way::Dial { client, address }, Some(socket.clone()))
    }

    fn over(way: Way, socket: Option<Socket>) -> Self {
        Self {
            way,
            retry: Retry::default(),
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    socket,
                    ..State::default()
                }),
                outage: StdMutex::default(),
                events: broadcast::Sender::new(EVENTS),
            }),
            path: None,
            all: Arc::default(),
        }
    }

    /// One link over several paths to the same server, each with its name and a connection of its own: clients with other
    /// [local addresses](udpack::ClientBuilder::local_address) or [interfaces](udpack::ClientBuilder::interface), and the same
    /// token. Uploads and downloads spread their lanes over them; whoever needs one socket gets one of whichever path has one.
    /// A path that is lost or silent gives back what it had under way, and is tried again as long as another one moves. `None`
    /// without a path.
    pub fn of_paths(paths: impl IntoIterator<Item = (String, Self)>) -> Option<Self> {
        let progress = Arc::new(StdMutex::new(Instant::now()));
        let named = paths.into_iter().map(|(name, link)| Self {
            path: Some(Path {
                name: name.into(),
                moved: Arc::default(),
                told: Arc::default(),
                progress: progress.clone(),
            }),
            ..link
        });
        let all: Arc<[Self]> = named.collect();
        let first = all.first()?.clone();
        Some(Self { all, ..first })
    }

    /// What each of several paths has carried so far; nothing where there is only one.
    pub fn paths(&self) -> Vec<PathProgress> {
        let paths = self.all.iter().filter_map(|link| {
            let path = link.path.as_ref()?;
            Some(PathProgress {
                path: path.name.to_string(),
                moved: path.moved.load(Ordering::Relaxed),
                connected: link.live().is_some(),
            })
        });
        paths.collect()
    }

    /// A link for each path: this one where there is only one.
    pub(crate) fn each(&self) -> Vec<Self> {
        match self.all.is_empty() {
            true => vec![self.clone()],
            false => self.all.to_vec(),
        }
    }

    /// Whether it is one of several paths.
    pub(crate) fn is_path(&self) -> bool {
        self.path.is_some() && self.all.is_empty()
    }

    /// So many bytes of files have arrived over this path.
    pub(crate) fn moved(&self, bytes: u64) {
        if let Some(path) = &self.path {
            path.moved.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Ends when nothing has come from this socket for a while although `owed` says that something should, and ends the socket:
    /// other paths shall go on with what it had under way. Never ends where there is only one path. `probe` sends something that
    /// the server's QUIC answers, where its program may have nothing to say.
    ///
    /// Cancel safe.
    pub(crate) async fn silent(&self, socket: &Socket, owed: impl Fn() -> bool, probe: impl Fn()) {
        if !self.is_path() {
            return future::pending().await;
        }
        let mut heard = (socket.stats().wire_received, Instant::now());
        loop {
            tokio::time::sleep(LOOK).await;
            let stats = socket.stats();
            if stats.wire_received != heard.0 || !owed() {
                heard = (stats.wire_received, Instant::now());
            } else if heard.1.elapsed() >= QUIET.max(3 * stats.rtt) {
                let text = "nothing was heard over this path";
                // Whether or not there is anything left to connect again for.
                self.tell_lost(0, Duration::ZERO, text.to_owned());
                socket.abort(CloseCode::CONNECTION_LOST, text);
                return;
            } else if heard.1.elapsed() >= QUIET / 3 {
                probe();
            }
        }
    }

    /// Whether another path moves, after this one could not be reached: it is worth trying again, after a rest.
    ///
    /// Cancel safe.
    pub(crate) async fn rests(&self, error: &TransferError) -> bool {
        let Some(path) = self.path.as_ref().filter(|_| error.retry()) else {
            return false;
        };
        let last = *path.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= self.retry.patience.min(Retry::default().patience) {
            return false;
        }
        tokio::time::sleep(REST).await;
        true
    }

    /// How to reconnect; applies to this handle and to later clones of it.
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.all = self
            .all
            .iter()
            .map(|link| Self {
                retry,
                ..link.clone()
            })
            .collect();
        self.retry = retry;
        self
    }

    /// The live socket, or a new one. Waits through as many reconnects as [`Retry`] grants.
    ///
    /// # Errors
    /// Why there is no socket and will be none. Each later call returns the same error.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future ends the connect that it had begun, and the next caller begins another.
    pub async fn socket(&self) -> Result<Socket, TransferError> {
        loop {
            let socket = self.eager().await?;
            if socket.admitted().await.is_ok() {
                return Ok(socket);
            }
            if let Way::Given(_) = &self.way {
                return Ok(socket);
            }
        }
    }

    /// Like [`socket`](Self::socket), one round trip earlier: the server has proved its key, and reads what is sent
    /// once it has admitted this client. A refusal ends the socket; the next call handles it.
    ///
    /// # Errors
    /// As for [`socket`](Self::socket).
    ///
    /// # Cancel safety
    /// As for [`socket`](Self::socket).
    pub async fn eager(&self) -> Result<Socket, TransferError> {
        if self.all.is_empty() {
            return self.eager_over_path().await;
        }
        let stays = |socket: &Socket| socket.goaway().is_none();
        if let Some(socket) = self.live().filter(stays) {
            return Ok(socket);
        }
        let dials = self.all.iter().map(|link| Box::pin(link.eager_over_path()));
        future::select_ok(dials).await.map(|(socket, _)| socket)
    }

    async fn eager_over_path(&self) -> Result<Socket, TransferError> {
        let (client, address) = match &self.way {
            Way::Given(socket) => return self.given(socket).await,
            Way::Dial { client, address } => (client, address),
        };
        let mut state = self.shared.state.lock().await;
        if let Some(error) = &state.over {
            return Err(error.again());
        }
        let lost = match &state.socket {
            Some(socket) => Some(Lost::of(socket).await),
            None => None,
        };
        let first = lost.is_none();
        let mut lost = match lost {
            Some(None) => {
                return state
                    .socket
                    .clone()
                    .ok_or_else(|| TransferError::Protocol("no socket".to_owned()));
            }
            Some(Some(lost)) => Some(lost),
            None => None,
        };
        // The address that worked last is tried first.
        let client = match &state.socket {
            Some(socket) => &client.beginning_with(socket.remote_address()),
            None => client,
        };
        let mut again = false;
        loop {
            if let Some(Lost { error, wait }) = lost {
                // An answer shows that the address is right, even if it is a temporary refusal.
                let answered = matches!(&error, TransferError::Connect(error) if matches!(&**error, ConnectError::Denied(_)));
                if !error.retry() || (first && !self.retry.first_too && !answered) {
                    return Err(self.give_up(&mut state, error));
                }
                let Some((attempt, delay)) = self.next_attempt() else {
                    return Err(self.give_up(&mut state, error));
                };
                let delay = delay.max(wait);
                let reason = error.to_string();
                tracing::info!(attempt, ?delay, reason, "reconnecting");
                self.tell_lost(attempt, delay, reason);
                // If the caller is dropped here, the next caller examines the old socket again; it must not look alive.
                tokio::time::sleep(delay).await;
                again = true;
            }
            match client.connect_eager(address).await {
                Ok(socket) => {
                    self.tell_connected(again);
                    state.take(socket.clone(), &self.shared.events);
                    self.look_for_udp(&mut state);
                    return Ok(socket);
                }
                Err(error) => lost = Some(Lost::from(error)),
            }
        }
    }

    fn tell_lost(&self, attempt: u32, delay: Duration, reason: String) {
        let event = match &self.path {
            None => LinkEvent::Reconnecting {
                attempt,
                delay,
                reason,
            },
            Some(path) => {
                path.told.store(false, Ordering::Relaxed);
                LinkEvent::PathLost {
                    path: path.name.to_string(),
                    delay,
                    reason,
                }
            }
        };
        let _ = self.shared.events.send(event);
    }

    fn tell_connected(&self, again: bool) {
        let event = match &self.path {
            None if again => LinkEvent::Connected,
            Some(path) if !path.told.swap(true, Ordering::Relaxed) => LinkEvent::PathConnected {
                path: path.name.to_string(),
            },
            None | Some(_) => return,
        };
        let _ = self.shared.events.send(event);
    }

    fn give_up(&self, state: &mut State, error: TransferError) -> TransferError {
        tracing::info!(%error, "not reconnecting");
        state.socket = None;
        if self.path.is_some() && error.retry() {
            // It is tried again as long as another path moves.
            self.tell_lost(0, REST, error.to_string());
            *self.outage() = Outage::default();
            return error;
        }
        state.over.insert(error).again()
    }

    /// Probes UDP beside a socket that runs over TCP, if the client uses both.
    fn look_for_udp(&self, state: &mut State) {
        let (Way::Dial { client, address }, Some(socket)) = (&self.way, &state.socket) else {
            return;
        };
        let over_tcp = matches!(socket.transport(), Transport::WebSocket { .. });
        if client.transport() == TransportChoice::Auto && over_tcp {
            let client = client.over(TransportChoice::Quic);
            let client = client.beginning_with(socket.remote_address());
            let task = tokio::spawn(go_over(
                Arc::downgrade(&self.shared),
                (client, address.clone()),
                socket.clone(),
                state.probes.clone(),
            ));
            state.looking = Some(Looking(task.abort_handle()));
        }
    }

    /// The caller's socket, once it has a connection. Waits for a socket that reconnects.
    async fn given(&self, socket: &Socket) -> Result<Socket, TransferError> {
        let over = || match socket.close_reason() {
            Some(reason) => Err(TransferError::Closed(reason)),
            None => Ok(socket.clone()),
        };
        let lost = || {
            matches!(
                socket.state(),
                SocketState::Reconnecting { .. } | SocketState::GoingAway(_)
            )
        };
        if !lost() {
            return over();
        }
        // One task waits and reports; the others wait for it.
        let _state = self.shared.state.lock().await;
        if !lost() {
            return over();
        }
        let mut states = socket.states();
        loop {
            let state = tokio::select! {
                biased;
                reason = socket.closed() => return Err(TransferError::Closed(reason)),
                state = states.next() => state,
            };
            match state {
                Some(SocketState::Reconnecting { attempt, delay, .. }) => {
                    let _ = self.shared.events.send(LinkEvent::Reconnecting {
                        attempt,
                        delay,
                        reason: "the connection was lost".to_owned(),
                    });
                }
                Some(SocketState::Connected { .. }) => {
                    let _ = self.shared.events.send(LinkEvent::Connected);
                    return over();
                }
                Some(SocketState::Closed(reason)) => return Err(TransferError::Closed(reason)),
                Some(_) => {}
                None => return over(),
            }
        }
    }

    /// The socket as it is, if it is alive, for an orderly close.
    pub fn live(&self) -> Option<Socket> {
        if !self.all.is_empty() {
            return self.all.iter().find_map(Self::live);
        }
        let socket = match &self.way {
            Way::Given(socket) => Some(socket.clone()),
            // A task that holds the lock is connecting.
            Way::Dial { .. } => self.shared.state.try_lock().ok()?.socket.clone(),
        };
        socket.filter(|socket| socket.close_reason().is_none())
    }

    /// Records progress of the transfer: attempts and time without progress count from now.
    pub fn progressed(&self) {
        if let Some(path) = &self.path {
            *path.progress.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
        *self.outage() = Outage::default();
    }

    /// The events from now on.
    pub fn events(&self) -> LinkEvents {
        let each = self.each();
        let events = each.iter().map(|link| link.shared.events.subscribe());
        LinkEvents(events.collect())
    }

    /// Ends the socket of each path without a round trip, for a caller that has every answer it wants. The server
    /// is told once, in a packet that may be lost. Queued messages are not sent.
    ///
    /// # Cancel safety
    /// A dropped future may or may not have told the server.
    pub async fn leave(&self) {
        self.end(CloseCode::NORMAL, "done").await;
    }

    /// As [`leave`](Self::leave), and says why.
    ///
    /// # Cancel safety
    /// As for [`leave`](Self::leave).
    pub async fn end(&self, code: CloseCode, text: &str) {
        let each = self.each();
        let ends = each.iter().map(|link| async move {
            if let Some(socket) = link.live()
                // An answer may arrive before `$welcome`.
                && socket.admitted().await.is_ok()
            {
                socket.abort(code, text);
                socket.closed().await;
            }
        });
        future::join_all(ends).await;
    }

    /// Judges the end of a lane, or of a request that was sent right behind the `$hello` of this socket.
    ///
    /// # Errors
    /// Why trying again is useless.
    pub(crate) async fn lost(
        &self,
        socket: &Socket,
        error: TransferError,
    ) -> Result<Loss, TransferError> {
        if socket.admitted().await.is_err() {
            // Finds out whether there is another socket.
            self.eager().await?;
            return Ok(Loss::Admission);
        }
        if self.mends(&error) {
            Ok(Loss::Lane)
        } else {
            Err(error)
        }
    }

    /// Whether another lane, on this socket or the next, can help after this error.
    pub(crate) fn mends(&self, error: &TransferError) -> bool {
        let network = matches!(error, TransferError::Closed(_) | TransferError::Silent(_));
        let comes_back = match &self.way {
            Way::Dial { .. } => true,
            Way::Given(socket) => socket.reconnects() && socket.close_reason().is_none(),
        };
        comes_back && network && error.retry()
    }

    /// The pause before the `attempt`th lane in a row is opened on a live socket.
    pub(crate) fn pause(&self, attempt: u32) -> Duration {
        self.retry.delay(attempt)
    }

    /// The number of the next attempt and the time until it; `None` when the link gives up.
    pub(crate) fn next_attempt(&self) -> Option<(u32, Duration)> {
        self.outage().next(&self.retry)
    }

    fn outage(&self) -> MutexGuard<'_, Outage> {
        self.shared
            .outage
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<&Socket> for Link {
    /// A link over this socket for as long as it lives. It waits while the socket reconnects, and never connects by
    /// itself.
    fn from(socket: &Socket) -> Self {
        Self::over(Way::Given(socket.clone()), None)
    }
}

impl From<Socket> for Link {
    /// A link over this socket for as long as it lives. It waits while the socket reconnects, and never connects by
    /// itself.
    fn from(socket: Socket) -> Self {
        Self::over(Way::Given(socket), None)
    }
}

impl From<&Self> for Link {
    fn from(link: &Self) -> Self {
        link.clone()
    }
}

/// The events of a [`Link`], in order. A watcher that falls behind misses the oldest.
#[derive(Debug)]
pub struct LinkEvents(Vec<broadcast::Receiver<LinkEvent>>);

impl LinkEvents {
    /// The next event; `None` when the link is gone.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<LinkEvent> {
        while !self.0.is_empty() {
            let each = self.0.iter_mut().map(|events| Box::pin(events.recv()));
            let (event, at, _) = future::select_all(each).await;
            match event {
                Ok(event) => return Some(event),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => drop(self.0.swap_remove(at)),
            }
        }
        None
    }
}

impl State {
    /// Installs the next socket, and reports if it uses another transport.
    fn take(&mut self, socket: Socket, events: &broadcast::Sender<LinkEvent>) {
        let before = self.socket.as_ref().map(Socket::transport);
        let before = before.unwrap_or(Transport::Quic);
        let lasted = self
            .since
            .is_some_and(|since| since.elapsed() >= Probes::LASTING);
        if before == Transport::Quic && lasted {
            *self.probes.lock().unwrap_or_else(PoisonError::into_inner) = Probes::default();
        }
        self.since = Some(Instant::now());
        self.looking = None;
        let to = socket.transport();
        if let Some(why) = socket.transport_reason().filter(|_| before != to) {
            tracing::info!(?to, %why, "the transport has changed");
            let _ = events.send(LinkEvent::TransportChanged { to, why });
        }
        self.socket = Some(socket);
    }
}

/// Connects over QUIC beside a socket that runs over TCP, as soon as UDP works. Then it closes the old socket: its
/// lanes are opened again on the new one, and offer their unfinished files with the same run.
async fn go_over(
    shared: Weak<Shared>,
    (client, address): (Client, Arc<str>),
    old: Socket,
    probes: Arc<StdMutex<Probes>>,
) {
    loop {
        let wait = probes.lock().unwrap_or_else(PoisonError::into_inner).wait();
        tokio::time::sleep(wait).await;
        // A task that has lost this socket, or must leave it, reconnects anyway.
        if old.close_reason().is_some() || old.goaway().is_some() {
            return;
        }
        let better = match client.connect(&address).await {
            Ok(better) => better,
            Err(error) => {
                tracing::debug!(%error, "UDP does not pass yet");
                continue;
            }
        };
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let mut state = shared.state.lock().await;
        let stays = old.close_reason().is_none() && old.goaway().is_none();
        if stays && state.over.is_none() {
            // `take` aborts this very task at its next await.
            state.take(better, &shared.events);
            drop(state);
            let text = "the transfer goes on over another transport";
            old.abort(CloseCode::MOVED, text);
        }
        return;
    }
}

/// A connection that was lost.
struct Lost {
    error: TransferError,
    /// The server asked not to be contacted sooner.
    wait: Duration,
}

impl Lost {
    /// `None` for a socket that is alive and stays.
    async fn of(socket: &Socket) -> Option<Self> {
        let goaway = socket.goaway();
        let wait = goaway.as_ref().map_or(Duration::ZERO, GoAway::wait);
        let told = goaway.map(|goaway| CloseReason::new(goaway.code, goaway.text, Side::Peer));
        // A `$goaway` says more than how the socket then ended.
        let reason = told
            .filter(|reason| reason.retry)
            .or_else(|| socket.close_reason())?;
        // The socket has ended, so it is known whether it was ever admitted.
        if socket.close_reason().is_some()
            && let Err(reason) = socket.admitted().await
        {
            return Some(ConnectError::Denied(reason).into());
        }
        Some(Self {
            error: TransferError::Closed(reason),
            wait,
        })
    }
}

impl From<ConnectError> for Lost {
    fn from(error: ConnectError) -> Self {
        Self {
            error: TransferError::Connect(Arc::new(error)),
            wait: Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use udpack::{Deny, Hello, Identity, Peer, Server, Timeouts};

    async fn server(identity: Identity, address: &str, token: &'static str) -> Server {
        Server::builder()
            .identity(identity)
            .auth(move |hello: Hello| async move {
                if hello.token() == token {
                    Ok(Peer::new("tester"))
                } else {
                    Err(Deny::auth_failed())
                }
            })
            .channel("x", |channel: udpack::Channel| async move {
                while let Ok(Some(_)) = channel.recv().await {}
            })
            .bind(address)
            .await
            .unwrap()
    }

    fn client(server: &Server) -> Client {
        Client::builder()
            .pin(server.fingerprint())
            .token("good")
            .timeouts(Timeouts {
                handshake: Duration::from_millis(500),
                ..Timeouts::default()
            })
            .build()
            .unwrap()
    }

    fn quick() -> Retry {
        Retry {
            first: Duration::from_millis(10),
            most: Duration::from_millis(50),
            ..Retry::default()
        }
    }

    async fn bounded<F: Future>(future: F) -> F::Output {
        tokio::time::timeout(Duration::from_secs(30), future)
            .await
            .expect("in time")
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_and_patience_are_spent_and_come_back_with_progress() {
        let make = || Client::builder().build().unwrap();
        let link = Link::new(make(), "127.0.0.1:1").retry(Retry {
            attempts: Some(2),
            ..Retry::default()
        });
        assert_eq!(link.next_attempt().unwrap().0, 1);
        assert_eq!(link.next_attempt().unwrap().0, 2);
        assert_eq!(link.next_attempt(), None);
        link.progressed();
        assert_eq!(link.next_attempt().unwrap().0, 1);

        let link = Link::new(make(), "127.0.0.1:1");
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert!(
            link.next_attempt().is_some(),
            "patience begins with the loss"
        );
        tokio::time::advance(Duration::from_secs(299)).await;
        let (_, delay) = link.next_attempt().unwrap();
        assert!(delay <= Duration::from_secs(1), "not beyond the end");
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(link.next_attempt(), None);
    }

    #[tokio::test]
    async fn a_lost_socket_is_replaced_once_for_all_who_ask() {
        bounded(async {
            let server = server(Identity::generate().unwrap(), "127.0.0.1:0", "good").await;
            let link = Link::new(client(&server), server.local_addr().to_string()).retry(quick());
            let mut events = link.events();
            let first = link.socket().await.unwrap();
            assert_eq!(link.socket().await.unwrap().id(), first.id(), "one socket");
            for socket in server.sockets() {
                socket.abort(CloseCode::SHUTTING_DOWN, "restart");
            }
            first.closed().await;
            let ids = Arc::new(StdMutex::new(Vec::new()));
            let mut tasks = tokio::task::JoinSet::new();
            for _ in 0..8 {
                let (link, ids) = (link.clone(), ids.clone());
                tasks.spawn(async move {
                    let socket = link.socket().await.unwrap();
                    ids.lock().unwrap().push(socket.id());
                });
            }
            while let Some(ended) = tasks.join_next().await {
                ended.unwrap();
            }
            let mut ids = Arc::try_unwrap(ids).unwrap().into_inner().unwrap();
            ids.sort();
            ids.dedup();
            assert_eq!(ids.len(), 1, "one new socket for all");
            assert_ne!(ids[0], first.id());
            assert!(matches!(
                events.next().await,
                Some(LinkEvent::Reconnecting { attempt: 1, .. })
            ));
            assert_eq!(events.next().await, Some(LinkEvent::Connected));
        })
        .await;
    }

    #[tokio::test]
    async fn a_server_that_is_started_again_is_found_again() {
        bounded(async {
            let dir = tempfile::tempdir().unwrap();
            let identity = || Identity::load_or_create(dir.path().join("keys")).unwrap();
            let old = server(identity(), "127.0.0.1:0", "good").await;
            let address = old.local_addr();
            let link = Link::new(client(&old), address.to_string()).retry(quick());
            let mut events = link.events();
            let first = link.socket().await.unwrap();
            old.close(CloseCode::SHUTTING_DOWN, "restart").await;
            drop(old);
            first.closed().await;
            let asked = {
                let link = link.clone();
                tokio::spawn(async move { link.socket().await })
            };
            // At least one attempt has failed before the server is back.
            while !matches!(
                events.next().await,
                Some(LinkEvent::Reconnecting { attempt: 2, .. })
            ) {}
            let _new = server(identity(), &address.to_string(), "good").await;
            let second = asked.await.unwrap().unwrap();
            assert_ne!(second.id(), first.id());
        })
        .await;
    }

    #[tokio::test]
    async fn a_refused_token_and_another_key_are_final() {
        bounded(async {
            let count = Arc::new(AtomicUsize::new(0));
            let counted = count.clone();
            let server = Server::builder()
                .identity(Identity::generate().unwrap())
                .auth(move |_: Hello| {
                    let first = counted.fetch_add(1, Ordering::Relaxed) == 0;
                    async move {
                        if first {
                            Ok(Peer::new("tester"))
                        } else {
                            Err(Deny::auth_failed())
                        }
                    }
                })
                .bind("127.0.0.1:0")
                .await
                .unwrap();
            let retry = Retry {
                first_too: true,
                ..quick()
            };
            let link = Link::new(client(&server), server.local_addr().to_string()).retry(retry);
            let socket = link.socket().await.unwrap();
            for socket in server.sockets() {
                socket.abort(CloseCode::SHUTTING_DOWN, "restart");
            }
            socket.closed().await;
            for _ in 0..2 {
                let error = link.socket().await.unwrap_err();
                assert!(
                    matches!(&error, TransferError::Connect(error) if error.is_auth()),
                    "{error}"
                );
            }
            assert_eq!(
                count.load(Ordering::Relaxed),
                2,
                "asked once more, not again"
            );

            let other = Client::builder()
                .pin(Identity::generate().unwrap().fingerprint())
                .build()
                .unwrap();
            let link = Link::new(other, server.local_addr().to_string()).retry(retry);
            let error = link.socket().await.unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Auth, "{error}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_first_connect_fails_at_once_unless_asked_to_go_on() {
        bounded(async {
            let server = server(Identity::generate().unwrap(), "127.0.0.1:0", "good").await;
            let client = client(&server);
            let address = server.local_addr().to_string();
            server.close(CloseCode::NORMAL, "").await;
            drop(server);
            let first = Link::new(client.clone(), &address).retry(quick());
            let mut events = first.events();
            let error = first.socket().await.unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Network, "{error}");
            let link = Link::new(client, &address).retry(Retry {
                first_too: true,
                attempts: Some(2),
                ..quick()
            });
            let mut again = link.events();
            assert!(link.socket().await.is_err());
            for attempt in [1, 2] {
                let event = again.next().await;
                assert!(
                    matches!(event, Some(LinkEvent::Reconnecting { attempt: n, .. }) if n == attempt)
                );
            }
            drop(link);
            assert_eq!(again.next().await, None);
            drop(first);
            assert_eq!(events.next().await, None, "there was nothing to tell");
        })
        .await;
    }

    #[tokio::test]
    async fn a_link_over_a_given_socket_ends_with_it() {
        bounded(async {
            let server = server(Identity::generate().unwrap(), "127.0.0.1:0", "good").await;
            let socket = client(&server)
                .connect(&server.local_addr().to_string())
                .await
                .unwrap();
            let link = Link::from(&socket);
            assert_eq!(link.socket().await.unwrap().id(), socket.id());
            socket.abort(CloseCode::IDLE, "");
            socket.closed().await;
            let error = link.socket().await.unwrap_err();
            assert!(
                matches!(&error, TransferError::Closed(reason) if reason.code == CloseCode::IDLE)
            );
            assert!(!link.mends(&error));
        })
        .await;
    }
}
