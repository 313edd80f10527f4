//! How a connection becomes a socket: from its first packet through the handshake, `$hello` and the verifier to admission.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::Instrument;
use tracing::field::Empty;

use crate::base::Rate;
use crate::base::lock;
use crate::base::pool::{self, PoolFull, Shares, Tenant};
use crate::base::text::printable_within;
use crate::channel::Channel;
use crate::channel::inbox::{Ending, Inbox};
use crate::metrics::speed::Stats;
use crate::metrics::{Count, Counts, Words};
use crate::serve::node::Node;
use crate::session::driver::{Control, Established, live};
use crate::session::lifetime;
use crate::session::reconnect::SocketState;
use crate::session::socket::Socket;
use crate::session::{Session, SessionId};
use crate::transport::listener::Incoming;
use crate::transport::on_path;
use crate::transport::windows;
use crate::transport::{Connection, SendStream, StreamError};
use crate::trust::auth::{Deny, Hello, Peer};
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::{FEW_STREAMS, Limits, PREAUTH_BYTES, VOLATILE_STREAMS};
use crate::wire::control::{self, Decode, HelloMessage, ResumeGrant, ResumeRequest, Welcome};

use super::{SHUTTING_DOWN, Shared, shutting_down};

pub(super) async fn accept_loop(shared: Arc<Shared>) {
    let mut look = windows::look();
    let mut farewells = Rate::new(FAREWELL_RATE);
    loop {
        let incoming = tokio::select! {
            incoming = shared.listener.accept() => incoming,
            _ = look.tick() => {
                shared.look();
                continue;
            }
        };
        let Some(incoming) = incoming else {
            return;
        };
        let address = incoming.remote_address();
        let proved = incoming.is_proved();
        let must_prove = !proved
            && (shared.places.handshakes.used() >= shared.limits.retry_from
                || shared.pace.is_slow(address.ip(), Instant::now()));
        let tenant = match proved {
            true => Tenant::address(address.ip()),
            false => Tenant::unproved(),
        };
        if shared.draining.load(Ordering::Relaxed) {
            shared.counts.word(Words::Knocks, "draining");
            incoming.refuse();
        } else if must_prove && incoming.may_retry() {
            shared.counts.one(Count::Retries);
            incoming.retry();
        } else {
            match shared.places.handshakes.try_take(&tenant) {
                Ok(handshake) => {
                    let span =
                        tracing::info_span!("conn", peer = %address, session = Empty, id = Empty);
                    // Boxed, because the task needs the memory only during admission.
                    let entering = Box::pin(admit_connection(shared.clone(), incoming, handshake));
                    shared
                        .tasks
                        .spawn(serve(shared.clone(), entering).instrument(span));
                }
                Err(_) if !proved && incoming.may_retry() => {
                    // The pool of its own address may have places left.
                    shared.counts.one(Count::Retries);
                    incoming.retry();
                }
                Err(full) => {
                    shared.counts.word(Words::Knocks, "busy");
                    match shared.places.farewells.try_take(&tenant) {
                        Ok(place) if proved && farewells.take() => {
                            let told = refuse_with_text(shared.clone(), incoming, full, place);
                            shared.tasks.spawn(told);
                        }
                        _ => incoming.refuse(),
                    }
                }
            }
        }
    }
}

/// Concurrent refusals with a text, and how many a second. QUIC refuses a handshake with a number and without text.
/// To send a text the server must complete the handshake, which is work that refused clients could cause at will.
pub(super) const FAREWELLS: usize = 16;
const FAREWELL_RATE: u32 = 16;

/// Completes a handshake only to tell the client why there is no place.
async fn refuse_with_text(
    shared: Arc<Shared>,
    incoming: Incoming,
    full: PoolFull,
    _place: pool::Place,
) {
    let handshaking = shared.listener.handshake(incoming);
    if let Ok(Ok(conn)) = tokio::time::timeout(shared.timeouts.handshake, handshaking).await {
        let text = format!("{full}; try again in a few seconds");
        conn.close(CloseCode::SERVER_BUSY, &text);
    }
}

/// Reserves half for the first few handshakes of each address, and gives one address at most the other half, so that
/// a few addresses cannot occupy all places.
pub(super) fn handshake_shares(places: usize) -> Shares {
    let shares = Shares::of(places);
    match places {
        0..4 => shares,
        _ => Shares {
            each: places / 2,
            reserve: places / 2,
            ..shares
        },
    }
}

/// Gives one address as many places as the limits say; if that is fewer than all, a quarter is reserved for the first
/// socket of each address.
pub(super) fn socket_shares(limits: &Limits) -> Shares {
    let (places, each) = (limits.sockets, limits.sockets_per_address);
    Shares {
        each,
        minimum: 1,
        reserve: places.saturating_sub(each).min(places / 4),
        ..Shares::of(places)
    }
}

/// One connection from its first packet to its end.
async fn serve(shared: Arc<Shared>, entering: Pin<Box<impl Future<Output = Option<Entered>>>>) {
    let Some(entered) = entering.await else {
        return;
    };
    let Entered {
        session,
        control,
        queue,
        place,
        key,
    } = entered;
    let comeback = shared.keep(&session);
    let registry = shared.service.registry.clone();
    let reason = live(session.clone(), control, registry, queue, comeback).await;
    lock(&shared.sessions.kept).remove(session.id().as_str());
    tracing::info!(%reason, "disconnected");
    place.leave(key, &session);
}

/// An admitted socket, with the state that its task needs.
struct Entered {
    session: Arc<Session>,
    control: Box<Control>,
    queue: Option<mpsc::Sender<Channel>>,
    place: Place,
    key: u64,
}

/// Takes a connection from its first packet to admission. Returns `None` if it is not admitted, or if it resumes an
/// existing session.
async fn admit_connection(
    shared: Arc<Shared>,
    incoming: Incoming,
    handshake: pool::Place,
) -> Option<Entered> {
    let address = incoming.remote_address().ip();
    let conn = paced_handshake(&shared, incoming).await?;
    let session = Session::new(
        conn.clone(),
        false,
        shared.limits.clone(),
        shared.timeouts.clone(),
        shared.counters.clone(),
        Counts::child(shared.counts.clone()),
        false,
    );
    let place = match Place::take(&shared, conn.remote_address()) {
        Ok(place) => place,
        Err(full) => {
            let reason = CloseReason::local(CloseCode::SERVER_BUSY, full.to_string());
            refuse(&shared, &session, reason).await;
            return None;
        }
    };
    let admission = async {
        tokio::select! {
            control = admit(&shared, &session) => control,
            never = crate::session::volatile::discard(&conn) => match never {},
        }
    };
    let admitted = admission.await;
    // Where a session is, is told only to those whose token was accepted.
    let accepted = admitted
        .as_ref()
        .map_or_else(|reason| reason.code == CloseCode::ELSEWHERE, |_| true);
    if accepted {
        shared.pace.forgive(address, Instant::now());
    }
    let control = match admitted {
        Ok(Admitted::New(control)) => control,
        Ok(Admitted::Back(control, kept, next_connections)) => {
            hand_over(conn, control, &kept, next_connections);
            return None;
        }
        Err(reason) => {
            refuse(&shared, &session, reason).await;
            return None;
        }
    };
    drop(handshake);
    session.states.set(SocketState::Connected {
        resumed: false,
        reason: None,
    });
    let _ = session.rooms.set(shared.service.attached.clone());
    let (socket, queue) = Socket::new(session.clone(), shared.service.registry.pull);
    let (key, late) = place.enter(socket.clone());
    if late {
        socket.send_goaway(shutting_down(Duration::ZERO, Duration::ZERO, None));
        drop(socket.close(CloseCode::SHUTTING_DOWN, SHUTTING_DOWN));
    }
    // The token may have been revoked after the verifier accepted it and before the revocation could find the socket.
    if let Some(reason) = lifetime::revocation(&session, &shared.guard) {
        session.abort(reason);
    }
    session.counts.one(Count::Admitted);
    session.counts.one(Count::Sockets);
    tracing::Span::current()
        .record("session", tracing::field::display(session.id()))
        .record("id", printable_within(socket.peer().id(), 128));
    tracing::info!(agent = socket.agent(), "connected");
    if shared.service.pull.load(Ordering::Relaxed)
        && shared
            .service
            .accept_queue
            .try_send(socket.clone())
            .is_err()
    {
        let text = "too many sockets wait to be accepted";
        session.abort(CloseReason::local(CloseCode::SERVER_BUSY, text));
    }
    run_socket_handler(&shared, socket);
    Some(Entered {
        session,
        control,
        queue,
        place,
        key,
    })
}

/// Completes the handshake when its address has a turn. A handshake whose address is not validated, and may be forged,
/// has no turn, and counts against the address that it validates. Returns `None` if no connection came of it.
async fn paced_handshake(shared: &Shared, incoming: Incoming) -> Option<Connection> {
    let address = incoming.remote_address().ip();
    let longest = shared.timeouts.handshake;
    if !incoming.is_proved() {
        let conn = complete_handshake(shared, incoming).await?;
        let _ = shared.pace.turn(address, Instant::now(), longest);
        return Some(conn);
    }
    let now = Instant::now();
    let Some(turn) = shared.pace.turn(address, now, longest) else {
        shared.counts.word(Words::Knocks, "busy");
        incoming.refuse();
        return None;
    };
    if turn > now {
        shared.counts.one(Count::HandshakesPaced);
        tokio::time::sleep_until(turn).await;
    }
    complete_handshake(shared, incoming).await
}

/// Completes the handshake. Returns `None`, and counts it, if the handshake failed or took too long.
async fn complete_handshake(shared: &Shared, incoming: Incoming) -> Option<Connection> {
    let handshaking = shared.listener.handshake(incoming);
    let why = match tokio::time::timeout(shared.timeouts.handshake, handshaking).await {
        Ok(Ok(conn)) => return Some(conn),
        Ok(Err(error)) => error.reason().to_string(),
        Err(_) => "it took too long".to_owned(),
    };
    shared.counts.one(Count::HandshakesFailed);
    tracing::debug!(why, "handshake failed");
    None
}

/// Hands a connection to the session that its client resumes. From now on that session's task owns it.
fn hand_over(
    conn: Connection,
    control: Box<Control>,
    kept: &Session,
    next_connections: mpsc::OwnedPermit<Box<Established>>,
) {
    next_connections.send(Box::new(Established {
        conn: conn.clone(),
        endpoint: None,
        control,
        welcome: None,
        why: None,
    }));
    // The session may have ended before it could take the connection.
    if let Some(reason) = kept.end.get() {
        conn.close_because(reason);
    }
}

/// Runs the program's handler of sockets, if there is one, until the handler or the socket ends.
fn run_socket_handler(shared: &Shared, socket: Socket) {
    let Some(handler) = shared.service.on_socket.clone() else {
        return;
    };
    let session = socket.session().clone();
    // Inside the block, because a handler may panic before it returns a future.
    let handler = std::panic::AssertUnwindSafe(async move { handler(socket).await }).catch_unwind();
    let run = async move {
        tokio::select! {
            outcome = handler => if outcome.is_err() {
                session.counts.one(Count::HandlerPanics);
                tracing::error!("the socket's handler panicked");
            },
            _ = session.end.wait() => {}
        }
    };
    shared.tasks.spawn(run.in_current_span());
}

/// An admitted connection.
enum Admitted {
    /// With a new session.
    New(Box<Control>),
    /// For an existing session.
    Back(
        Box<Control>,
        Arc<Session>,
        mpsc::OwnedPermit<Box<Established>>,
    ),
}

/// Reads `$hello` and processes it when the client's address has its turn. The authentication time-out is paused
/// during the wait.
async fn admit(shared: &Shared, session: &Arc<Session>) -> Result<Admitted, CloseReason> {
    let within = on_path(shared.timeouts.auth, &session.conn());
    let late = |_| {
        let text = format!("not authenticated within {within:?}");
        CloseReason::local(CloseCode::AUTH_TIMEOUT, text)
    };
    let begun = Instant::now();
    let first = tokio::time::timeout(within, first_message(session));
    let first = first.await.map_err(late)??;
    let left = within.saturating_sub(begun.elapsed());
    // A client that resumes a session does not wait for other clients of its address, but it is subject to the same
    // rate.
    if !shared.was_in(&first.hello) {
        let address = session.conn().remote_address().ip();
        let failure = shared.timeouts.auth_failure;
        let turn = shared.guard.turn(address, failure, &session.counts).await;
        turn.map_err(|slow| CloseReason::local(CloseCode::SERVER_BUSY, slow.to_string()))?;
    }
    let entered = tokio::time::timeout(left, enter(shared, session, first));
    entered.await.map_err(late)?
}

/// The control stream of a connection and the `$hello` on it.
struct First {
    send: SendStream,
    inbox: Inbox,
    hello: HelloMessage,
}

async fn first_message(session: &Arc<Session>) -> Result<First, CloseReason> {
    let conn = &session.conn();
    let (send, recv) = conn
        .accept_bi()
        .await
        .map_err(|error| session.reason_for(&error))?;
    let inbox = Inbox::new(recv, PREAUTH_BYTES as usize);
    let first = std::future::poll_fn(|cx| inbox.poll_first(cx, session, &session.counters)).await;
    match first {
        Ok(message) => match HelloMessage::decode(&message) {
            Ok(hello) => Ok(First { send, inbox, hello }),
            Err(error) => Err(error.reason()),
        },
        Err(Ending::Violation(reason)) => Err(reason),
        Err(Ending::Closed(reason)) if conn.is_over() => Err(reason),
        // The peer chose the code of the reset, so it is not sent back.
        Err(Ending::Finished | Ending::Closed(_)) => Err(CloseReason::local(
            CloseCode::TRUNCATED,
            "the control stream ended before $hello",
        )),
    }
}

/// Asks the verifier, resumes the client's session or creates one, and sends `$welcome`.
async fn enter(
    shared: &Shared,
    session: &Arc<Session>,
    First { send, inbox, hello }: First,
) -> Result<Admitted, CloseReason> {
    let conn = &session.conn();
    let (frame, resume) = (hello.frame, hello.resume.clone());
    let (marks, history) = (hello.marks, hello.history);
    let follows = hello.follows;
    let hello = Hello::new(hello, conn.remote_address(), conn.transport());
    let agent = hello.agent().to_owned();
    let peer = shared
        .guard
        .verify(hello, shared.timeouts.auth_failure, &shared.counts)
        .await
        .map_err(denied)?;
    if shared.draining.load(Ordering::Relaxed) {
        return Err(CloseReason::local(CloseCode::SHUTTING_DOWN, SHUTTING_DOWN));
    }
    let Found {
        session,
        permit,
        refused,
    } = find(shared, session, resume.as_ref(), &peer, follows).await?;
    if follows {
        session.set_follows();
    }
    let (resume, reason) = match resume {
        Some(_) if shared.timeouts.resume.is_zero() => (None, Some("off".to_owned())),
        Some(_) => (Some(grant(shared, &session)?), refused),
        None => (None, refused),
    };
    let back = permit.is_some();
    let id = match back {
        true => session.id(),
        false => new_session_id(shared.service.rooms.node()).map_err(no_random)?,
    };
    let expires = match back {
        true => lifetime::renew(&session, peer).map_err(denied)?,
        false => belong(shared, &session, peer),
    };
    let welcome = Welcome {
        session: id.to_string(),
        agent: shared.agent.clone(),
        frame: shared.limits.frame as u64,
        channels: u64::from(shared.limits.channels),
        resumed: back,
        resume,
        reason,
        expires,
        marks,
        history,
    };
    let bytes = control::encode_welcome(&welcome, &shared.limits, &shared.timeouts)
        .map_err(|error| CloseReason::local(CloseCode::INTERNAL, error.to_string()))?;
    if let Some(frame) = frame {
        let peer_frame = &session.receive.peer_frame;
        peer_frame.store(frame.min(u64::from(u32::MAX)), Ordering::Relaxed);
    }
    session.set_agent(agent);
    session.set_welcome(welcome);
    inbox.set_frame_limit(shared.limits.frame);
    // The control stream is one of the streams.
    let all = shared.limits.channels.saturating_add(1);
    conn.permit_bi(match conn.waits_for_streams() {
        true => FEW_STREAMS.min(all),
        false => all,
    });
    conn.permit_uni(VOLATILE_STREAMS);
    let mut control = Box::new(Control::new(send, inbox));
    let sent = control.send.write(bytes).await;
    sent.map_err(|error| match error {
        StreamError::Lost(error) => session.reason_for(&error),
        StreamError::Peer(_) | StreamError::Ended => CloseReason::local(
            CloseCode::PROTOCOL_ORDER,
            "the control stream was stopped before $welcome",
        ),
    })?;
    Ok(match permit {
        Some(permit) => Admitted::Back(control, session, permit),
        None => Admitted::New(control),
    })
}

/// The session of an admitted client.
struct Found {
    session: Arc<Session>,
    /// The permit to hand over the connection, if the session is resumed.
    permit: Option<mpsc::OwnedPermit<Box<Established>>>,
    /// Why the session is not resumed, if the client asked for it.
    refused: Option<String>,
}

/// Finds the session that the client resumes; `fresh` if there is none.
///
/// # Errors
/// Also when another node has it, and the client goes there when it is told: the token is good by then, so nobody else learns
/// where nodes are.
async fn find(
    shared: &Shared,
    fresh: &Arc<Session>,
    resume: Option<&ResumeRequest>,
    peer: &Peer,
    follows: bool,
) -> Result<Found, CloseReason> {
    let mut found = Found {
        session: fresh.clone(),
        permit: None,
        refused: None,
    };
    if let Some(ticket) = resume.and_then(|resume| resume.session.as_ref()) {
        match shared.come_back(ticket, peer).await? {
            Ok((kept, permit)) => (found.session, found.permit) = (kept, Some(permit)),
            Err(reason) => {
                let node = shared.service.rooms.node().filter(|_| follows);
                if let Some(address) = node.and_then(|node| node.home_of(&ticket.session)) {
                    return Err(CloseReason::local(CloseCode::ELSEWHERE, address));
                }
                fresh.counts.word(Words::ResumesRefused, reason);
                found.refused = Some(reason.to_owned());
            }
        }
    }
    Ok(found)
}

/// The ticket with which the client can resume the session later.
fn grant(shared: &Shared, session: &Session) -> Result<ResumeGrant, CloseReason> {
    let token = lock(&session.tickets).get_or_make().issue();
    Ok(ResumeGrant {
        token: token.map_err(no_random)?,
        window: shared.timeouts.resume,
    })
}

/// Assigns a new session to this peer; returns how long the token remains valid.
fn belong(shared: &Shared, session: &Session, peer: Peer) -> Option<Duration> {
    let expires = peer.time_left();
    let tenant = Tenant::peer(&peer);
    let frames = &session.receive.frames;
    let _ = frames.set(Box::new((shared.places.frames.clone(), tenant)));
    session.peer.set(peer);
    session.life.set_guard(shared.guard.clone());
    session.life.set_validity(expires);
    expires
}

fn denied(Deny { code, text }: Deny) -> CloseReason {
    CloseReason::local(code, text)
}

fn no_random(_: aws_lc_rs::error::Unspecified) -> CloseReason {
    CloseReason::local(CloseCode::INTERNAL, "no random numbers")
}

/// A random session id: 32 hexadecimal digits. That of a node's session ends with the node's id, so that each node knows whose
/// session it is.
fn new_session_id(node: Option<&Arc<Node>>) -> Result<SessionId, aws_lc_rs::error::Unspecified> {
    let mut id = [0_u8; 16];
    aws_lc_rs::rand::fill(&mut id)?;
    if let Some(node) = node {
        id[8..].copy_from_slice(&node.id.0);
    }
    let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(SessionId::new(&digits))
}

async fn refuse(shared: &Shared, session: &Session, reason: CloseReason) {
    // A client that tries several addresses closes all connections but one before it sends `$hello`.
    if reason.by == Side::Peer && reason.code == CloseCode::NORMAL {
        tracing::debug!(%reason, "left before $hello");
        return;
    }
    session.counts.refused(reason.code);
    if reason.code == CloseCode::ELSEWHERE {
        tracing::info!(address = reason.text, "its session is on another node");
    } else if let Some(left_out) = shared.log_limit.line() {
        tracing::warn!(%reason, left_out, "refused");
    }
    session.abort(reason);
    session.conn().closed().await;
}

/// A place among the sockets, taken before authentication, so that the limits cannot be exceeded.
struct Place {
    shared: Arc<Shared>,
    _place: pool::Place,
}

impl Place {
    fn take(shared: &Arc<Shared>, address: SocketAddr) -> Result<Self, PoolFull> {
        let place = shared
            .places
            .sockets
            .try_take(&Tenant::address(address.ip()))?;
        Ok(Self {
            shared: shared.clone(),
            _place: place,
        })
    }

    /// Registers a socket. Returns its key, and whether a drain has already sent its `$goaway` to the others.
    fn enter(&self, socket: Socket) -> (u64, bool) {
        let mut sockets = lock(&self.shared.sockets.now);
        let late = self.shared.draining.load(Ordering::Relaxed);
        let key = sockets.next;
        sockets.next += 1;
        sockets.admitted.insert(key, socket.clone());
        let first = sockets.share(&self.shared.limits);
        let session = socket.session();
        session
            .receive
            .window
            .admit(first, &self.shared.places.windows, &session.conn());
        (key, late)
    }

    fn leave(&self, key: u64, session: &Session) {
        let last = Stats::of(&session.conn(), &session.counters);
        lock(&self.shared.sockets.past).add_wire(&Stats { cwnd: 0, ..last });
        let mut sockets = lock(&self.shared.sockets.now);
        sockets.admitted.remove(&key);
        sockets.share(&self.shared.limits);
        session.receive.window.end();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.sockets.ended.notify_waiters();
    }
}
