//! The task of a session: it serves one connection after the other. It is called the driver.
//!
//! The driver owns everything that belongs to the connection as a whole: it takes the streams the peer opens, reads
//! and writes the control stream, and executes a close. It ends with the session, and its channel tasks end with it.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval};
use tracing::Instrument;
use tracing::field::Empty;

use crate::base::Rate;
use crate::base::lock;
use crate::channel::Channel;
use crate::channel::carrier::{CONFIRM, ChannelKey, REQUESTED, SessionConnection};
use crate::channel::inbox::{Ending, Inbox};
use crate::channel::resume::{Mismatch, Seen};
use crate::metrics::{Count, Counts, Words};
use crate::session::lifetime::Lifetime;
use crate::session::reconnect::{SocketState, TransportReason};
use crate::session::service::Registry;
use crate::session::streams::serve_stream;
use crate::session::{Leaving, Session, give_up, or_parent};
use crate::transport::on_path;
use crate::transport::windows;
use crate::transport::{Connection, Endpoint, RecvStream, SendStream, StreamError};
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::USED_STREAMS;
use crate::wire::control::{
    self, Ack, Channels, GoAway, Passed, ProtocolEvent, ProtocolMessage, Welcome,
};
use crate::wire::message::Message;

/// The control stream, which the driver owns.
pub(crate) struct Control {
    pub(crate) send: SendStream,
    pub(crate) inbox: Inbox,
    /// Set when the peer has stopped reading the stream: until when its `$close`, or the end of the connection, is
    /// awaited.
    stopped: Option<Instant>,
}

impl Control {
    /// The first of all that waits to be sent.
    pub(crate) fn new(send: SendStream, inbox: Inbox) -> Self {
        send.set_priority(i32::MAX);
        Self {
            send,
            inbox,
            stopped: None,
        }
    }

    /// Writes small frames. If the peer does not accept them within the close time, the connection is given up.
    async fn write(&mut self, session: &Session, frames: &mut [Bytes]) {
        let written = write_small(session, &mut self.send, frames).await;
        if let Err(StreamError::Peer(_)) = written {
            let within = on_path(session.timeouts.close / 5, &session.conn());
            self.stopped.get_or_insert_with(|| Instant::now() + within);
        }
    }
}

/// An authenticated connection, on which a session continues or begins.
pub(crate) struct Established {
    pub(crate) conn: Connection,
    /// The client's endpoint; `None` on a server.
    pub(crate) endpoint: Option<Endpoint>,
    pub(crate) control: Box<Control>,
    /// On a client, the server's `$welcome`.
    pub(crate) welcome: Option<Welcome>,
    /// On a client, why the connection has this transport.
    pub(crate) why: Option<TransportReason>,
}

/// A new connection of a client, before `$hello`, and the endpoint, which must live as long.
pub(crate) type Reached = (Connection, Endpoint);

/// Why a session left a connection.
pub(crate) enum Left {
    /// The connection was lost.
    Lost,
    /// The server announced its shutdown; it is tried last.
    Moved,
    /// The session moves to this connection.
    For(Box<Reached>),
}

/// The source of a session's next connection.
pub(crate) enum Comeback {
    /// None: the session ends with its connection.
    Never,
    /// The client reconnects.
    Awaited(Awaited),
    /// This side reconnects.
    Dialled(Box<dyn Redial>),
}

/// Makes the next connection of a client's session.
pub(crate) trait Redial: Send {
    /// The longest time that the client waits when a server asks it to.
    fn patience(&self) -> Duration;

    /// Makes the next connection, for as long as the policy allows.
    fn next<'a>(
        &'a mut self,
        session: &'a Arc<Session>,
        reason: CloseReason,
        left: Left,
    ) -> BoxFuture<'a, Result<Established, CloseReason>>;

    /// Tries to connect over a better transport than the current one. Ready with the connection; the next poll starts
    /// another attempt.
    fn poll_better(&mut self, cx: &mut Context<'_>, session: &Arc<Session>) -> Poll<Box<Reached>>;
}

/// How a server waits for a client that may reconnect.
pub(crate) struct Awaited {
    pub(crate) next_connections: mpsc::Receiver<Box<Established>>,
    /// How long the server waits.
    pub(crate) window: Duration,
    /// How many sessions are detached; the server limits that number.
    pub(crate) detached: Arc<AtomicUsize>,
    pub(crate) most: usize,
}

impl Awaited {
    async fn next(&mut self, reason: CloseReason) -> Result<Box<Established>, CloseReason> {
        struct Waiting(Arc<AtomicUsize>);
        impl Drop for Waiting {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let before = self.detached.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(self.detached.clone());
        if before >= self.most {
            tracing::warn!(%reason, most = self.most, "connection lost; no room to keep its session");
            return Err(reason);
        }
        tracing::info!(%reason, window = ?self.window, "connection lost; its session waits for the client");
        match tokio::time::timeout(self.window, self.next_connections.recv()).await {
            Ok(Some(established)) => Ok(established),
            Ok(None) | Err(_) => Err(reason),
        }
    }

    /// Refuses clients that already wait to resume. The admission task refuses later ones.
    fn turn_away(&mut self, reason: &CloseReason) {
        self.next_connections.close();
        while let Ok(established) = self.next_connections.try_recv() {
            established.conn.close_because(reason);
        }
    }
}

/// How the service of one connection ended.
enum Outcome {
    /// The session has ended, too.
    Over(CloseReason),
    /// The connection was lost; the session may continue on another.
    Lost(CloseReason),
    /// The client has reconnected with this connection.
    Replaced(Box<Established>),
    /// The server shuts down and this side's channels have ended: the session moves to the next server.
    Moved(CloseReason),
    /// A better connection than the current one is ready.
    Better(Box<Reached>),
}

/// Serves a session until it ends, over any number of connections.
pub(crate) async fn live(
    session: Arc<Session>,
    mut control: Box<Control>,
    registry: Arc<Registry>,
    incoming: Option<mpsc::Sender<Channel>>,
    mut comeback: Comeback,
) -> CloseReason {
    let mut channels = JoinSet::new();
    let mut driver = Driver {
        session: session.clone(),
        registry,
        incoming,
        rate: Rate::new(session.limits.channel_rate),
        lifetime: Lifetime::new(&session),
        resumed: false,
        stage: Stage::Open,
    };
    let reason = loop {
        let next = match driver
            .drive(&mut control, &mut channels, &mut comeback)
            .await
        {
            Outcome::Over(reason) => break reason,
            Outcome::Replaced(established) => Ok(established),
            // Rare work is boxed, so that the task needs no memory for it otherwise.
            Outcome::Lost(reason) => {
                Box::pin(comeback.next(&session, &mut driver.lifetime, reason, Left::Lost)).await
            }
            Outcome::Moved(reason) => {
                Box::pin(comeback.next(&session, &mut driver.lifetime, reason, Left::Moved)).await
            }
            Outcome::Better(reached) => {
                let left = Left::For(reached);
                Box::pin(comeback.next(&session, &mut driver.lifetime, given_up(), left)).await
            }
        };
        match next {
            // An end of the session takes precedence over a new connection, whichever was noticed first.
            Ok(established) => match session.end.get() {
                Some(reason) => {
                    established.conn.close_because(reason);
                    break reason.clone();
                }
                None => control = driver.change(*established, &mut channels),
            },
            Err(reason) => break reason,
        }
    };
    session.end.set(reason);
    let reason = session.end.wait().await;
    if let Comeback::Awaited(awaited) = &mut comeback {
        awaited.turn_away(&reason);
    }
    session.set_up(None);
    session.fail_resumable(&reason);
    if session.welcome().is_some() {
        session.counts.less(Count::Sockets);
        session.counts.closed(&reason);
    }
    session.states.set(SocketState::Closed(reason.clone()));
    // Handlers see the end in their next `recv`; those that wait for it get some time to return.
    let grace = async { while channels.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(session.timeouts.close, grace).await;
    session.tasks.close();
    reason
}

impl Comeback {
    /// Returns the next connection, or the reason why there is none.
    async fn next(
        &mut self,
        session: &Arc<Session>,
        lifetime: &mut Lifetime,
        reason: CloseReason,
        left: Left,
    ) -> Result<Box<Established>, CloseReason> {
        /// Counts one detached session while the value lives.
        struct Detached<'a>(&'a Counts);
        impl Drop for Detached<'_> {
            fn drop(&mut self) {
                self.0.less(Count::Detached);
            }
        }
        session.set_up(None);
        session.receive.budget.set_detached(true);
        session.receive.window.lost();
        session.counts.one(Count::Detached);
        let _detached = Detached(&session.counts);
        let next = async {
            match self {
                Self::Never => Err(reason),
                Self::Awaited(awaited) => {
                    let since = Instant::now().into_std();
                    session.states.set(SocketState::Detached { since });
                    awaited.next(reason).await
                }
                Self::Dialled(dialler) => dialler.next(session, reason, left).await.map(Box::new),
            }
        };
        let closed = async {
            loop {
                if let Some(reason) = session.asked_close() {
                    return reason;
                }
                session.wake.wait(REQUESTED).await;
            }
        };
        tokio::select! {
            biased;
            // The session has ended, for example because its token expired, so no client can resume it.
            reason = session.end.wait() => Err(reason),
            reason = closed => Err(reason),
            () = lifetime.run() => std::future::pending().await,
            established = next => established,
        }
    }

    /// Whether the session can continue on another connection after a connection ended for this reason.
    fn survives(&self, reason: &CloseReason) -> bool {
        match self {
            Self::Never => false,
            // Either side closed the session, or the path was lost, or the client gave this connection up.
            Self::Awaited(_) => {
                reason.by == Side::Transport
                    || (reason.by == Side::Peer && reason.code == CloseCode::SUPERSEDED)
            }
            Self::Dialled(_) => reason.retry && reason.by != Side::Local,
        }
    }

    /// The outcome for the session when a connection ends for this reason.
    fn after(&self, reason: CloseReason) -> Outcome {
        match self.survives(&reason) {
            true => Outcome::Lost(reason),
            false => Outcome::Over(reason),
        }
    }

    /// How long a client waits at most when a server asks it to.
    fn patience(&self) -> Duration {
        match self {
            Self::Dialled(dialler) => dialler.patience(),
            // This side does not dial again: the time is only displayed.
            Self::Never | Self::Awaited(_) => Duration::from_secs(86_400),
        }
    }

    /// Waits for another connection while the current one lives or seems to live.
    fn poll_other(&mut self, cx: &mut Context<'_>, session: &Arc<Session>) -> Poll<Outcome> {
        match self {
            Self::Never => Poll::Pending,
            Self::Awaited(awaited) => match awaited.next_connections.poll_recv(cx) {
                Poll::Ready(Some(established)) => Poll::Ready(Outcome::Replaced(established)),
                Poll::Ready(None) | Poll::Pending => Poll::Pending,
            },
            Self::Dialled(dialler) => dialler.poll_better(cx, session).map(Outcome::Better),
        }
    }
}

/// Serves the connections of one session, one after the other.
struct Driver {
    session: Arc<Session>,
    registry: Arc<Registry>,
    /// The queue of `accept_channel`, if the program uses it.
    incoming: Option<mpsc::Sender<Channel>>,
    rate: Rate,
    lifetime: Lifetime,
    /// Whether the current connection resumed the session.
    resumed: bool,
    /// The stage of the current connection.
    stage: Stage,
}

/// Waits for the next tick; without an interval, for ever.
async fn tick(interval: &mut Option<Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

/// The driver's reaction to an event; an outcome ends the service of the connection.
enum Act<'a> {
    /// Wait for the next event.
    Wait,
    Over(Outcome),
    /// Boxed, because it is rare: the task needs no memory for it otherwise.
    Work(Pin<Box<dyn Future<Output = Option<Outcome>> + Send + 'a>>),
}

impl<'a> Act<'a> {
    fn work(work: impl Future<Output = Option<Outcome>> + Send + 'a) -> Self {
        Self::Work(Box::pin(work))
    }
}

/// The driver's state of the current connection.
struct Present {
    /// How long a client waits at most when a server asks it to.
    patience: Duration,
    /// How many streams the peer has opened, up to the number that shows that it needs all.
    opened: u32,
    /// When the collected acknowledgements are sent.
    confirm_at: Option<Instant>,
    /// When the session moves to the next server.
    move_at: Option<Instant>,
}

impl Present {
    fn begin(session: &Session, conn: &Connection, comeback: &Comeback) -> Self {
        // The control stream counts as one stream of the server.
        let mut opened = u32::from(!session.client);
        if session.kept_theirs() > 0 {
            // All channels are reopened at once.
            opened = USED_STREAMS;
            permit_all(session, conn);
        }
        Self {
            patience: comeback.patience(),
            opened,
            confirm_at: None,
            move_at: None,
        }
    }

    /// Called after the server's `$goaway`, if one came. Channels continue until this session moves; new channels
    /// wait for the next server.
    fn prepare_to_move(&mut self, session: &Session) {
        if self.move_at != session.departure.turn()
            && let Some(leaving) = session.departure.received()
        {
            self.move_at = Some(leaving.turn);
            session.set_up(None);
            session.states.set(SocketState::GoingAway(leaving.goaway));
        }
    }
}

/// How long acknowledgements are collected before they are sent.
const CONFIRM_DELAY: Duration = Duration::from_millis(5);

impl Driver {
    /// Moves the session to another connection.
    fn change(&mut self, established: Established, channels: &mut JoinSet<()>) -> Box<Control> {
        let session = &self.session;
        give_up(&session.conn());
        session.departure.forget();
        session.prune();
        // All the peer's channels are reopened at once.
        self.rate.grant(session.limits.channels);
        let granted = session
            .welcome()
            .is_none_or(|welcome| welcome.resume.is_some());
        let mut reason = None;
        self.resumed = true;
        if let Some(welcome) = established.welcome {
            self.resumed = welcome.resumed;
            session
                .receive
                .peer_frame
                .store(welcome.frame, Ordering::Relaxed);
            if !welcome.resumed {
                let words = welcome
                    .reason
                    .clone()
                    .unwrap_or_else(|| if granted { "unknown" } else { "off" }.to_owned());
                let text = format!("the session could not be resumed: {words}");
                session.counts.word(Words::ResumesRefused, &words);
                session.fail_resumable(&CloseReason::new(
                    CloseCode::NOT_RESUMED,
                    text,
                    Side::Transport,
                ));
                reason = Some(words);
                // A new session numbers its channels from the beginning.
                *lock(&session.numbers.seen) = Seen::default();
            }
            session.life.set_validity(welcome.expires);
            session.set_welcome(welcome);
        }
        session.life.reattached();
        let before = session.conn().transport();
        let number = session.move_to(established.conn, established.endpoint);
        session.set_transport_reason(established.why);
        session.receive.budget.set_detached(false);
        let conn = session.conn();
        session.receive.window.renew(&conn);
        for core in session.kept_own() {
            channels.spawn(core.reopen(session.carrier.clone(), conn.clone(), number));
        }
        session.set_up(Some(number));
        if self.resumed {
            session.counts.one(Count::Resumed);
        }
        if session.client {
            session.counts.one(Count::Reconnects);
        }
        if let Some(rooms) = session.rooms.get() {
            rooms.resumed(session, number);
        }
        tracing::info!(session = %session.id(), resumed = self.resumed, "connected again");
        let now = conn.transport();
        if let Some(why) = established.why
            && std::mem::discriminant(&before) != std::mem::discriminant(&now)
        {
            tracing::info!(from = ?before, to = ?now, %why, "the transport has changed");
            session.states.set(SocketState::TransportChanged {
                from: before,
                to: now,
                why,
            });
        }
        session.states.set(SocketState::Connected {
            resumed: self.resumed,
            reason,
        });
        established.control
    }

    /// Serves one connection until it ends, or until the session moves to another one.
    async fn drive(
        &mut self,
        control: &mut Control,
        channels: &mut JoinSet<()>,
        comeback: &mut Comeback,
    ) -> Outcome {
        let session = self.session.clone();
        let (conn, number) = session.current();
        if let Some(reason) = session.end.get() {
            conn.close_because(reason);
            return Outcome::Over(reason.clone());
        }
        self.begin(control).await;
        let mut present = Present::begin(&session, &conn, comeback);
        control.inbox.rest();
        let mut volatile = pin!(crate::session::volatile::serve(&session, &conn));
        // A server checks all its connections in one task.
        let mut look = session.client.then(windows::look);
        loop {
            let work = {
                let act = tokio::select! {
                    never = &mut volatile => match never {},
                    () = tick(&mut look) => {
                        session.look();
                        Act::Wait
                    }
                    stream = conn.accept_bi() => match stream {
                        Ok(stream) => {
                            self.accept((&conn, number), stream, &mut present, channels);
                            Act::Wait
                        }
                        Err(error) => Act::Over(comeback.after(session.reason_for(&error))),
                    },
                    message = poll_fn(|cx| control.inbox.poll_first(cx, &session, &session.counters)) => {
                        self.hear((&session, &conn), message, &mut present, comeback)
                    }
                    () = session.wake.wait(REQUESTED) => Act::work(execute_requests(&session, &conn, control)),
                    () = session.wake.wait(CONFIRM) => {
                        let soon = || Instant::now() + CONFIRM_DELAY;
                        present.confirm_at.get_or_insert_with(soon);
                        Act::Wait
                    },
                    () = at(present.confirm_at) => {
                        present.confirm_at = None;
                        Act::work(async {
                            confirm(&session, control).await;
                            None
                        })
                    },
                    () = at(control.stopped) => {
                        control.stopped = None;
                        session.abort(unread());
                        Act::Wait
                    }
                    outcome = poll_fn(|cx| comeback.poll_other(cx, &session)) => match outcome {
                        Outcome::Better(reached) => match move_to_better(&session, number, &reached) {
                            true => Act::Over(Outcome::Better(reached)),
                            false => Act::Wait,
                        },
                        outcome => Act::Over(outcome),
                    },
                    () = at(present.move_at) => Act::work(async {
                        Some(self.leave(control, channels, present.patience).await)
                    }),
                    frame = self.lifetime.next() => Act::work(async {
                        control.write(&session, &mut [frame]).await;
                        None
                    }),
                    Some(ended) = channels.join_next() => {
                        reap(&session, ended);
                        Act::Wait
                    }
                };
                match act {
                    Act::Wait => continue,
                    Act::Over(outcome) => return outcome,
                    Act::Work(work) => work,
                }
            };
            if let Some(outcome) = work.await {
                return outcome;
            }
        }
    }

    /// Determines the first message expected on the control stream of a connection, and sends this side's first
    /// message.
    async fn begin(&mut self, control: &mut Control) {
        let session = &self.session;
        self.stage = match session.welcome() {
            None if session.client => Stage::Greeting,
            _ if self.resumed => Stage::Listing,
            _ => Stage::Open,
        };
        if self.resumed {
            let open = session.kept_own().iter().map(|core| core.key.id).collect();
            if let Some(frame) = control::encode(&Channels { open }) {
                Box::pin(control.write(session, &mut [frame])).await;
            }
        }
    }

    /// Takes a stream that the peer has opened.
    fn accept(
        &mut self,
        (conn, number): (&Arc<SessionConnection>, u64),
        (send, recv): (SendStream, RecvStream),
        present: &mut Present,
        channels: &mut JoinSet<()>,
    ) {
        let session = &self.session;
        // QUIC returns streams that arrived before the end.
        if session.end.get().is_some() {
            return;
        }
        if !self.rate.take() {
            let most = session.limits.channel_rate;
            let text = format!("more than {most} channels a second");
            session.abort(CloseReason::local(CloseCode::RATE_LIMITED, text));
            return;
        }
        present.opened = present.opened.saturating_add(1);
        if present.opened == USED_STREAMS {
            permit_all(session, conn);
        }
        let span = tracing::debug_span!("channel", name = Empty, id = Empty);
        let serve = serve_stream(
            session.clone(),
            self.registry.clone(),
            self.incoming.clone(),
            (conn.clone(), number),
            send,
            recv,
            span.clone(),
        );
        let span = or_parent(span, tracing::Span::current());
        channels.spawn(serve.instrument(span));
    }

    /// Processes a message of the control stream, or the stream's end.
    fn hear<'a>(
        &mut self,
        (session, conn): (&'a Session, &'a Connection),
        message: Result<Message, Ending>,
        present: &mut Present,
        comeback: &Comeback,
    ) -> Act<'a> {
        match on_control(session, &mut self.stage, present.patience, message) {
            None => {
                if let Comeback::Dialled(_) = comeback {
                    present.prepare_to_move(session);
                }
                Act::Wait
            }
            // The control stream may tell of a lost connection before the connection does.
            Some(reason) if reason.by != Side::Local && comeback.survives(&reason) => {
                // This server will not admit the session, but another may.
                conn.close_because(&reason);
                Act::Over(Outcome::Lost(reason))
            }
            Some(reason) => {
                Act::work(async move { Some(close_after_peer(session, conn, reason).await) })
            }
        }
    }

    /// Ends the channels of a connection, serves it until they have ended, and closes it.
    async fn leave(
        &mut self,
        control: &mut Control,
        channels: &mut JoinSet<()>,
        patience: Duration,
    ) -> Outcome {
        let session = &self.session.clone();
        let conn = session.conn();
        let reason = CloseReason::new(
            CloseCode::MOVED,
            "the server goes away; open the channel again",
            Side::Transport,
        );
        session.finish_channels_because(&reason);
        let ended = session.all_channels_done();
        let mut ended = std::pin::pin!(ended);
        loop {
            tokio::select! {
                () = &mut ended => break,
                _ = conn.closed() => return Outcome::Moved(reason),
                message = poll_fn(|cx| control.inbox.poll_first(cx, session, &session.counters)) => {
                    if on_control(session, &mut self.stage, patience, message).is_some() {
                        // The peer's time-out ended before this side's.
                        conn.close(CloseCode::NORMAL, "");
                        return Outcome::Moved(reason);
                    }
                },
                () = session.wake.wait(CONFIRM) => {
                    tokio::time::sleep(CONFIRM_DELAY).await;
                    confirm(session, control).await;
                },
                () = session.wake.wait(REQUESTED) => {
                    let close = session.asked_close();
                    if let Some(reason) = close {
                        close_gracefully(session, control, reason).await;
                        let error = conn.closed().await;
                        return Outcome::Over(session.reason_for(&error));
                    }
                },
                frame = self.lifetime.next() => control.write(session, &mut [frame]).await,
                () = at(control.stopped) => {
                    session.abort(unread());
                    return Outcome::Over(session.closed_reason());
                },
                Some(ended) = channels.join_next() => reap(session, ended),
            }
        }
        if let Some(frame) = control::encode_close(CloseCode::NORMAL, "") {
            control.write(session, &mut [frame]).await;
            control.send.finish();
        }
        let within = on_path(session.timeouts.close, &conn);
        let _ = tokio::time::timeout(within, conn.closed()).await;
        conn.close(CloseCode::NORMAL, "");
        Outcome::Moved(reason)
    }
}

/// Gives up the current connection, number `number`, for an established better one, unless something would be lost
/// with it. Returns whether it did.
fn move_to_better(session: &Session, number: u64, (better, _): &Reached) -> bool {
    // From now on no channel is opened that would end with the connection.
    session.set_up(None);
    if !session.can_change() || better.is_over() {
        better.close(CloseCode::NORMAL, "not now");
        if session.departure.turn().is_none() {
            session.set_up(Some(number));
        }
        return false;
    }
    // The server would also end the old connection when it sees the client on the better one, but its close would end
    // the session.
    give_up(&session.conn());
    true
}

/// The reason shown between two transports.
fn given_up() -> CloseReason {
    let text = "the session goes on over another transport";
    CloseReason::new(CloseCode::SUPERSEDED, text, Side::Local)
}

/// Executes what the application requested: a close, or a message to the peer.
async fn execute_requests(
    session: &Session,
    conn: &Connection,
    control: &mut Control,
) -> Option<Outcome> {
    let close = session.asked_close();
    let goaway = session.departure.take_announced();
    if let Some(frame) = goaway.as_deref().and_then(control::encode_goaway) {
        control.write(session, &mut [frame]).await;
    }
    let reason = close?;
    close_gracefully(session, control, reason).await;
    let error = conn.closed().await;
    Some(Outcome::Over(session.reason_for(&error)))
}

/// Permits the peer all the streams that its channels may need.
fn permit_all(session: &Session, conn: &Connection) {
    // The control stream is one of the client's streams.
    let most = session.limits.channels;
    let most = most.saturating_add(u32::from(!session.client));
    conn.permit_bi(most);
}

/// Ends a connection because of a message on the control stream.
async fn close_after_peer(session: &Session, conn: &Connection, reason: CloseReason) -> Outcome {
    if reason.by == Side::Peer {
        // The peer has flushed its channels and waits for this side to close the connection. This side's queues are
        // sent, too, within a time limit in case the peer no longer reads.
        session.finish_channels();
        let within = on_path(session.timeouts.close / 5, conn);
        session.channels_done(within).await;
        session.end.set(reason.clone());
        conn.close_because(&reason);
    } else {
        session.abort(reason);
    }
    let error = conn.closed().await;
    Outcome::Over(session.reason_for(&error))
}

/// Sends the collected acknowledgements and passed marks.
async fn confirm(session: &Session, control: &mut Control) {
    let mut frames = Vec::new();
    for (key, confirm) in session.take_confirms() {
        let (channel, own) = (key.id, key.own);
        frames.extend(confirm.received.and_then(|received| {
            control::encode(&Ack {
                channel,
                own,
                received,
            })
        }));
        frames.extend(
            (confirm.mark).and_then(|mark| control::encode(&Passed { channel, own, mark })),
        );
    }
    control.write(session, &mut frames).await;
}

fn reap(session: &Session, ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        session.counts.one(Count::HandlerPanics);
        tracing::error!("a channel task panicked");
    }
}

/// Waits until `time`, or for ever.
async fn at(time: Option<Instant>) {
    match time {
        // Boxed, because usually there is nothing to wait for.
        Some(time) => Box::pin(tokio::time::sleep_until(time)).await,
        None => std::future::pending().await,
    }
}

/// The stage of a connection's control stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// On a client: `$welcome` is expected next.
    Greeting,
    /// The session was resumed: the peer's `$channels` is expected next.
    Listing,
    Open,
}

impl Stage {
    /// Whether a client or a server may receive this event now. `$close` is permitted at every stage after the first
    /// message.
    fn admits(self, event: ProtocolEvent, client: bool) -> bool {
        use ProtocolEvent as Event;
        match event {
            Event::Close => true,
            Event::Welcome => self == Self::Greeting && client,
            Event::Channels => self == Self::Listing,
            Event::Ack => self == Self::Open,
            Event::GoAway | Event::Refreshed => self == Self::Open && client,
            Event::Passed | Event::Refresh => self == Self::Open && !client,
            _ => false,
        }
    }
}

/// Processes a message of the control stream; a returned reason ends the connection.
fn on_control(
    session: &Session,
    stage: &mut Stage,
    patience: Duration,
    message: Result<Message, Ending>,
) -> Option<CloseReason> {
    let order = |text: &str| Some(CloseReason::local(CloseCode::PROTOCOL_ORDER, text));
    let message = match message {
        Ok(message) => message,
        Err(Ending::Finished) => return order("the control stream ended without $close"),
        Err(Ending::Closed(reason)) if session.conn().is_over() => return Some(reason),
        Err(Ending::Closed(_)) => return order("the control stream was reset"),
        Err(Ending::Violation(reason)) => return Some(reason),
    };
    let event = ProtocolEvent::of(&message).filter(|event| stage.admits(*event, session.client));
    let Some(event) = event else {
        return order("a message that has no place on the control stream now");
    };
    match event.read(&message) {
        Err(error) => return Some(error.reason()),
        Ok(ProtocolMessage::Close(reason)) => return Some(reason),
        Ok(ProtocolMessage::GoAway(goaway)) => on_goaway(session, goaway, patience),
        Ok(ProtocolMessage::Welcome(welcome)) => {
            *stage = Stage::Open;
            on_welcome(session, welcome);
        }
        Ok(ProtocolMessage::Ack(ack)) => return on_ack(session, ack),
        Ok(ProtocolMessage::Passed(passed)) => on_passed(session, passed),
        Ok(ProtocolMessage::Channels(Channels { open })) => {
            *stage = Stage::Open;
            lock(&session.tickets).get_or_make().confirm();
            session.retain_theirs(&open);
        }
        Ok(ProtocolMessage::Refresh(refresh)) => return session.life.on_refresh(refresh),
        Ok(ProtocolMessage::Refreshed(refreshed)) => return session.life.on_refreshed(refreshed),
        // No other event is permitted.
        Ok(_) => {}
    }
    None
}

fn on_goaway(session: &Session, goaway: GoAway, patience: Duration) {
    tracing::info!(text = %goaway.text, "the server is going away");
    let turn = Instant::now() + goaway.wait().min(patience);
    session.departure.receive(Leaving { goaway, turn });
    if !session.reconnects() {
        session.set_up(None);
    }
}

fn on_welcome(session: &Session, welcome: Welcome) {
    let peer_frame = &session.receive.peer_frame;
    peer_frame.store(welcome.frame, Ordering::Relaxed);
    tracing::Span::current().record("session", &*welcome.session);
    session.counts.one(Count::Admitted);
    session.counts.one(Count::Sockets);
    session.life.set_validity(welcome.expires);
    let admitted = || session.set_welcome(welcome);
    let connected = SocketState::Connected {
        resumed: false,
        reason: None,
    };
    session.states.set_with(connected, admitted);
}

fn on_passed(session: &Session, passed: Passed) {
    let key = ChannelKey {
        own: !passed.own,
        id: passed.channel,
    };
    // The peer may still report on a channel that has ended here.
    if let Some(core) = session.live(key) {
        // The time that the peer's library collects acknowledgements is not the program's delay.
        let round_trip = session.conn().rtt() + CONFIRM_DELAY;
        core.outbox.passed(passed.mark, round_trip);
    }
}

fn on_ack(session: &Session, ack: Ack) -> Option<CloseReason> {
    // A channel that the peer opened is not this side's own, and the other way round.
    let key = ChannelKey {
        own: !ack.own,
        id: ack.channel,
    };
    // A channel that has ended here may still be acknowledged.
    let core = session.kept(key)?;
    if ack.received == Ack::REFUSED {
        core.refused();
        return None;
    }
    let text = format!(
        "message {} of channel {} is confirmed and was never sent",
        ack.received, ack.channel
    );
    core.confirm(ack.received)
        .err()
        .map(|Mismatch| CloseReason::local(CloseCode::RESUME_MISMATCH, text))
}

/// Flushes the channels, sends `$close`, and lets the peer close the connection; all within the close time.
async fn close_gracefully(session: &Session, control: &mut Control, reason: CloseReason) {
    let within = on_path(session.timeouts.close, &session.conn());
    let deadline = Instant::now() + within;
    session.finish_channels();
    session.channels_done(within).await;
    if let Some(frame) = control::encode_close(reason.code, &reason.text) {
        let frames = &mut [frame];
        let written = control.write(session, frames);
        let _ = tokio::time::timeout(within, written).await;
        control.send.finish();
    }
    // If both sides close at once, each would wait for the other to close the connection: so the peer's `$close`
    // counts as the end. Other messages on the control stream are ignored.
    let peer_closes = async {
        while let Ok(message) =
            poll_fn(|cx| control.inbox.poll_first(cx, session, &session.counters)).await
        {
            if ProtocolEvent::Close.is(&message) {
                return;
            }
        }
        session.conn().closed().await;
    };
    let _ = tokio::time::timeout_at(deadline, peer_closes).await;
    session.abort(reason);
}

/// The reason of a connection that ends because the peer stopped its control stream.
fn unread() -> CloseReason {
    CloseReason::local(CloseCode::PROTOCOL_ORDER, "the control stream was stopped")
}

/// Writes small frames to a stream of the protocol. If the peer does not accept even those within the close time, the
/// connection is given up.
///
/// # Errors
/// If the stream accepts no more bytes.
pub(crate) async fn write_small(
    session: &Session,
    send: &mut SendStream,
    frames: &mut [Bytes],
) -> Result<(), StreamError> {
    let mut writing = std::pin::pin!(send.write_all(frames));
    loop {
        let conn = session.conn();
        let heard = conn.stats().datagrams_received;
        let within = on_path(session.timeouts.close, &conn);
        match tokio::time::timeout(within, &mut writing).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => {
                tracing::debug!(%error, "control stream not writable");
                return Err(error);
            }
            // The idle timer handles a silent path.
            Err(_) if conn.stats().datagrams_received == heard => {}
            Err(_) => {
                session.abort(CloseReason::local(
                    CloseCode::SLOW_PEER,
                    "the peer does not read the control stream",
                ));
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of `docs/PROTOCOL.md`, row by row: event, at a client, at a server.
    #[test]
    fn each_message_has_its_place_on_the_control_stream() {
        use Stage::{Greeting, Listing, Open};
        let all = [Greeting, Listing, Open].as_slice();
        for (event, client, server) in [
            ("$close", all, all),
            ("$welcome", &[Greeting], &[]),
            ("$channels", &[Listing], &[Listing]),
            ("$ack", &[Open], &[Open]),
            ("$passed", &[], &[Open]),
            ("$refresh", &[], &[Open]),
            ("$refreshed", &[Open], &[]),
            ("$goaway", &[Open], &[]),
            ("$hello", &[], &[]),
            ("$open", &[], &[]),
            ("$resume", &[], &[]),
            ("$gap", &[], &[]),
            ("$mark", &[], &[]),
            ("$reply", &[], &[]),
            ("say", &[], &[]),
            ("$nonsense", &[], &[]),
        ] {
            let admitted = |stage: Stage, is_client| {
                ProtocolEvent::named(event).is_some_and(|event| stage.admits(event, is_client))
            };
            for stage in all {
                for (is_client, may) in [(true, client), (false, server)] {
                    assert_eq!(
                        admitted(*stage, is_client),
                        may.contains(stage),
                        "{event} at {stage:?}, client: {is_client}"
                    );
                }
            }
        }
    }
}
