//! The lifetime of an admission: token expiry, refresh, revocation, and the authorization of channels.
//!
//! [`Life`] is the session's part, [`Lifetime`] the driver's: all timers and all calls of verifiers while a socket
//! lives. Both belong to the session, not to one connection.

use std::fmt;
use std::future::{Future, pending};
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::time::Instant;

use crate::base::Lazy;
use crate::base::Rate;
use crate::base::lock;
use crate::base::wake::{WakeFlag, WakeFlags};
use crate::channel::{Channel, WeakChannel};
use crate::metrics::{Count, Counts};
use crate::session::Session;
use crate::trust::auth::{Authenticate, Deny, Hello, Peer, Penalties, Slow};
use crate::wire::code::{CloseCode, CloseReason};
use crate::wire::config::InvalidSetting;
use crate::wire::config::TOKEN_BYTES;
use crate::wire::control::{self, HelloMessage, Refresh, Refreshed};

/// How many new tokens a client may present each second, with a burst of twice as many.
const REFRESH_RATE: u32 = 1;
/// The shortest time between two automatic refreshes of a client.
const REFRESH_PAUSE: Duration = Duration::from_secs(1);
/// The shortest time to the next automatic refresh after a failure, so that a client's own failures never slow its
/// address down.
const FAILURE_PAUSE: Duration = Duration::from_secs(10);

/// Decides which channels a peer may open.
pub(crate) type Authorize = Arc<dyn Fn(&Peer, &str) -> Result<(), Deny> + Send + Sync>;

/// The verifier and its settings, for all sockets of a server.
pub(crate) struct Guard {
    auth: Arc<dyn Authenticate>,
    authorize: Option<Authorize>,
    penalties: Penalties,
}

impl Guard {
    pub(crate) fn new(
        auth: Arc<dyn Authenticate>,
        authorize: Option<Authorize>,
        penalties: Penalties,
    ) -> Arc<Self> {
        Arc::new(Self {
            auth,
            authorize,
            penalties,
        })
    }

    /// Waits until a token of this address may be verified. If too many wait already, the refusal is given no sooner
    /// than `failure` from now, so that a client which comes again at once costs few handshakes.
    pub(crate) async fn turn(
        &self,
        address: IpAddr,
        failure: Duration,
        counts: &Counts,
    ) -> Result<(), Slow> {
        let now = Instant::now();
        match self.penalties.turn(address, now.into_std()) {
            Ok(None) => Ok(()),
            Ok(Some(turn)) => {
                counts.one(Count::TokensSlowed);
                tokio::time::sleep_until(turn.into()).await;
                Ok(())
            }
            Err(slow) => {
                tokio::time::sleep_until(now + failure).await;
                Err(slow)
            }
        }
    }

    /// Asks the verifier. A refusal is given no sooner than `failure` from now, whatever was wrong; a token
    /// that was not accepted counts against its address. The peer that is returned has time left.
    pub(crate) async fn verify(
        &self,
        hello: Hello,
        failure: Duration,
        counts: &Counts,
    ) -> Result<Peer, Deny> {
        let begun = Instant::now();
        let source = hello.remote().ip();
        // Inside the block, because a verifier may panic before it returns a future.
        let verdict = AssertUnwindSafe(async { self.auth.authenticate(hello).await })
            .catch_unwind()
            .await;
        let deny = match verdict {
            Ok(Ok(peer)) if peer.time_left().is_none_or(|left| !left.is_zero()) => return Ok(peer),
            Ok(Ok(_)) => Deny::auth_expired(),
            Ok(Err(deny)) => deny,
            Err(_) => {
                counts.one(Count::HandlerPanics);
                tracing::error!("the verifier panicked");
                return Err(Deny::new(CloseCode::INTERNAL, "the verifier failed"));
            }
        };
        if deny.code == CloseCode::AUTH_FAILED {
            self.penalties.failed(source, Instant::now().into_std());
        }
        tokio::time::sleep_until(begun + failure).await;
        Err(deny)
    }

    /// Whether `peer` may have a channel of that name.
    fn allow(&self, peer: &Peer, channel: &str, counts: &Counts) -> Result<(), Deny> {
        let Some(authorize) = &self.authorize else {
            return Ok(());
        };
        std::panic::catch_unwind(AssertUnwindSafe(|| authorize(peer, channel))).unwrap_or_else(
            |_| {
                counts.one(Count::HandlerPanics);
                tracing::error!("the authorization of channels panicked");
                Err(Deny::new(CloseCode::INTERNAL, "the authorization failed"))
            },
        )
    }
}

/// Returns a token of the application.
pub(crate) type TokenAsk =
    Arc<dyn Fn() -> BoxFuture<'static, Result<String, String>> + Send + Sync>;

/// The source of a client's token.
#[derive(Clone)]
pub(crate) enum TokenSource {
    Fixed(String),
    Ask(TokenAsk),
}

impl TokenSource {
    pub(crate) fn ask<F, Fut, E>(ask: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<String, E>> + Send + 'static,
        E: fmt::Display,
    {
        Self::Ask(Arc::new(move || {
            let asked = ask();
            Box::pin(async move { asked.await.map_err(|error| error.to_string()) })
        }))
    }

    /// The token to present now; the source must answer within `within`.
    pub(crate) async fn token(&self, within: Duration) -> Result<String, String> {
        match self {
            Self::Fixed(token) => Ok(token.clone()),
            Self::Ask(ask) => {
                let answer = AssertUnwindSafe(async { ask().await }).catch_unwind();
                match tokio::time::timeout(within, answer).await {
                    Ok(Ok(answer)) => answer,
                    Ok(Err(_)) => Err("the source of tokens panicked".to_owned()),
                    Err(_) => Err(format!("no token within {within:?}")),
                }
            }
        }
    }
}

/// Whether a token is short enough to be sent.
pub(crate) fn check_token(token: &str) -> Result<(), InvalidSetting> {
    if token.len() > TOKEN_BYTES {
        return Err(InvalidSetting("a token has at most 512 bytes"));
    }
    Ok(())
}

/// Why a new token did not replace the old one, which remains valid.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RefreshError {
    /// The server refused it; the socket is unchanged until the old token expires.
    #[error("the server refused the new token: {code}: {text}")]
    Denied {
        /// Why: `auth_failed`, `auth_expired`, `forbidden` (another identity's token), `rate_limited` and the like.
        code: CloseCode,
        /// Why, for people; cut and escaped.
        text: String,
    },
    /// The token cannot be sent.
    #[error(transparent)]
    Token(#[from] InvalidSetting),
    /// No answer came within `Timeouts::request`. It may still come and take effect.
    #[error("the server did not answer in time")]
    Timeout,
    /// This is a server's socket; only clients present tokens.
    #[error("only a client refreshes its token")]
    NotClient,
    /// The socket has ended.
    #[error("socket closed: {0}")]
    Closed(CloseReason),
}

/// The validity of a token.
#[derive(Debug, Clone, Copy, Default)]
struct Term {
    /// `None` before admission.
    since: Option<Instant>,
    /// `None`: it does not expire.
    until: Option<Instant>,
}

/// The session's part of its token's lifetime.
#[derive(Default)]
pub(crate) struct Life {
    /// Set on a server.
    guard: OnceLock<Arc<Guard>>,
    /// Set on a client that refreshes its token automatically.
    source: OnceLock<Box<TokenSource>>,
    term: Mutex<Term>,
    /// Channels that the peer opened, to be authorized again after a refresh; ended ones are removed as the list
    /// grows.
    channels: Mutex<Vec<WeakChannel>>,
    /// On a client: held by one refresh at a time, until its answer.
    turn: OnceLock<Arc<tokio::sync::Mutex<()>>>,
    exchange: Mutex<Lazy<Exchange>>,
    /// Wakes the driver: [`RENEWED`], [`READY`] and [`ASKED`].
    wake: WakeFlags,
}

/// The token's expiry has changed.
const RENEWED: WakeFlag = WakeFlag(1);
/// There is a frame to send.
const READY: WakeFlag = WakeFlag(1 << 1);
/// There is a token to verify.
const ASKED: WakeFlag = WakeFlag(1 << 2);

/// The state of a refresh between the two sides.
#[derive(Default)]
struct Exchange {
    /// The frame that the driver sends next.
    out: Option<Bytes>,
    /// On a server: a new token.
    asked: Option<String>,
    /// On a server: whether a `$refresh` waits for its answer.
    busy: bool,
    /// The number of the connection: a refresh of an earlier one is not answered.
    round: u64,
    /// On a client: the caller that waits for the answer.
    waiting: Option<Waiting>,
}

struct Waiting {
    refresh: Refresh,
    answer: oneshot::Sender<Result<(), RefreshError>>,
    _turn: OwnedMutexGuard<()>,
}

impl Life {
    /// Sets the verifier, on a server; called once.
    pub(crate) fn set_guard(&self, guard: Arc<Guard>) {
        let _ = self.guard.set(guard);
    }

    /// Makes a client refresh its token automatically if it expires; called once.
    pub(crate) fn set_token_source(&self, source: &TokenSource) {
        if matches!(source, TokenSource::Ask(_)) {
            let _ = self.source.set(Box::new(source.clone()));
        }
    }

    /// Sets the time that the token remains valid from now; `None`: it does not expire.
    pub(crate) fn set_validity(&self, left: Option<Duration>) {
        let now = Instant::now();
        *lock(&self.term) = Term {
            since: Some(now),
            until: left.and_then(|left| now.checked_add(left)),
        };
        self.wake.set(RENEWED);
    }

    /// How long the token remains valid; `None` if it does not expire.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        let until = lock(&self.term).until?;
        Some(until.saturating_duration_since(Instant::now()))
    }

    /// A new connection carries the session: a refresh in progress on the old one starts again.
    pub(crate) fn reattached(&self) {
        let mut exchange = lock(&self.exchange);
        let exchange = exchange.get_or_make();
        exchange.round += 1;
        exchange.asked = None;
        exchange.busy = false;
        exchange.out = exchange
            .waiting
            .as_ref()
            .and_then(|waiting| control::encode(&waiting.refresh));
        self.wake.set(READY);
    }

    /// Processes a `$refresh` on a server; a returned reason ends the connection.
    pub(crate) fn on_refresh(&self, Refresh { token }: Refresh) -> Option<CloseReason> {
        let mut exchange = lock(&self.exchange);
        let exchange = exchange.get_or_make();
        if exchange.busy {
            let text = "a $refresh before the last one was answered";
            return Some(CloseReason::local(CloseCode::PROTOCOL_ORDER, text));
        }
        exchange.busy = true;
        exchange.asked = Some(token);
        self.wake.set(ASKED);
        None
    }

    /// Processes a `$refreshed` on a client; a returned reason ends the connection.
    pub(crate) fn on_refreshed(&self, refreshed: Refreshed) -> Option<CloseReason> {
        let Some(waiting) = lock(&self.exchange).get_or_make().waiting.take() else {
            let text = "a $refreshed that nobody asked for";
            return Some(CloseReason::local(CloseCode::PROTOCOL_ORDER, text));
        };
        let answer = match refreshed {
            Refreshed::Accepted { expires } => {
                self.set_validity(expires);
                Ok(())
            }
            Refreshed::Refused { code, text } => Err(RefreshError::Denied { code, text }),
        };
        let _ = waiting.answer.send(answer);
        None
    }

    /// Whether the peer may have this channel that it opened; this is checked again after a refresh.
    pub(crate) fn allow(&self, session: &Session, channel: &Channel) -> Result<(), Deny> {
        let Some(guard) = self.guard.get().filter(|guard| guard.authorize.is_some()) else {
            return Ok(());
        };
        {
            let mut channels = lock(&self.channels);
            if channels.len() == channels.capacity() {
                channels.retain(|channel| channel.upgrade().is_some());
            }
            channels.push(channel.downgrade());
        }
        // Checked after the channel is in the list: a later refresh finds it there, an earlier one has changed the
        // peer.
        match session.peer.get() {
            Some(peer) => guard.allow(&peer, channel.name(), &session.counts),
            None => Err(Deny::forbidden("nobody is known here")),
        }
    }

    /// Closes the channels that the peer may no longer have.
    fn recheck_channels(&self, guard: &Guard, peer: &Peer, counts: &Counts) {
        let channels: Vec<Channel> = lock(&self.channels)
            .iter()
            .filter_map(WeakChannel::upgrade)
            .collect();
        for channel in channels {
            if let Err(Deny { code, text }) = guard.allow(peer, channel.name(), counts) {
                channel.close_with(CloseReason::local(code, text));
            }
        }
    }

    fn turn(&self) -> Arc<tokio::sync::Mutex<()>> {
        self.turn.get_or_init(Arc::default).clone()
    }

    async fn next_frame(&self) -> Bytes {
        loop {
            {
                let mut exchange = lock(&self.exchange);
                if let Some(exchange) = exchange.get_mut()
                    && let Some(frame) = exchange.out.take()
                {
                    exchange.busy = false;
                    return frame;
                }
            }
            self.wake.wait(READY).await;
        }
    }

    async fn next_asked(&self) -> (String, u64) {
        loop {
            {
                let mut exchange = lock(&self.exchange);
                if let Some(exchange) = exchange.get_mut()
                    && let Some(token) = exchange.asked.take()
                {
                    return (token, exchange.round);
                }
            }
            self.wake.wait(ASKED).await;
        }
    }
}

/// Replaces the session's peer by one that was verified again and must have the same identity: sets its claims and
/// its expiry, and authorizes the channels again. Returns how long the token remains valid.
pub(crate) fn renew(session: &Session, peer: Peer) -> Result<Option<Duration>, Deny> {
    if session
        .peer
        .get()
        .is_none_or(|known| !known.same_identity(&peer))
    {
        return Err(Deny::forbidden("the token belongs to somebody else"));
    }
    let left = peer.time_left();
    session.peer.set(peer.clone());
    session.life.set_validity(left);
    if let Some(guard) = session.life.guard.get() {
        session.life.recheck_channels(guard, &peer, &session.counts);
    }
    Ok(left)
}

/// Presents a new token to the server; see `Socket::refresh`.
pub(crate) async fn refresh(session: &Session, token: String) -> Result<(), RefreshError> {
    if !session.client {
        return Err(RefreshError::NotClient);
    }
    check_token(&token)?;
    let refresh = Refresh { token };
    let frame = control::encode(&refresh).ok_or(RefreshError::Token(InvalidSetting(
        "the token cannot be sent",
    )))?;
    let exchange = async {
        session
            .wait_admitted()
            .await
            .map_err(RefreshError::Closed)?;
        let turn = session.life.turn().lock_owned().await;
        let (answer, answered) = oneshot::channel();
        {
            let mut exchange = lock(&session.life.exchange);
            let exchange = exchange.get_or_make();
            exchange.waiting = Some(Waiting {
                refresh,
                answer,
                _turn: turn,
            });
            exchange.out = Some(frame);
        }
        session.life.wake.set(READY);
        match answered.await {
            Ok(answer) => {
                if answer.is_ok() {
                    session.counts.one(Count::Refreshed);
                }
                answer
            }
            Err(_) => Err(RefreshError::Closed(session.end.wait().await)),
        }
    };
    tokio::select! {
        answer = tokio::time::timeout(session.timeouts.request, exchange) => {
            answer.unwrap_or(Err(RefreshError::Timeout))
        }
        reason = session.end.wait() => Err(RefreshError::Closed(reason)),
    }
}

/// The driver's part: timers and running verifications. It continues over the session's connections.
pub(crate) struct Lifetime {
    session: Arc<Session>,
    /// Never ends.
    work: BoxFuture<'static, ()>,
}

impl Lifetime {
    pub(crate) fn new(session: &Arc<Session>) -> Self {
        let held = session.clone();
        let work = async move {
            if let Some(guard) = held.life.guard.get() {
                tokio::join!(
                    end_in_time(&held),
                    recheck_peer(&held, guard),
                    verify_refreshes(&held, guard)
                );
            } else if let Some(source) = held.life.source.get() {
                Box::pin(keep_fresh(&held, source)).await;
            }
            pending().await
        };
        Self {
            session: session.clone(),
            work: Box::pin(work),
        }
    }

    /// The next frame for the control stream. Meanwhile it ends the session when the token expires.
    ///
    /// # Cancel safety
    /// Cancel safe; timers continue.
    pub(crate) async fn next(&mut self) -> Bytes {
        let session = self.session.clone();
        tokio::select! {
            frame = session.life.next_frame() => frame,
            () = self.run() => pending().await,
        }
    }

    /// While the session is detached: ends it when the token expires. Never returns.
    ///
    /// # Cancel safety
    /// As [`next`](Self::next).
    pub(crate) async fn run(&mut self) {
        (&mut self.work).await;
    }
}

/// Closes the session when its token ends.
async fn end_in_time(session: &Session) {
    let life = &session.life;
    loop {
        let until = lock(&life.term).until;
        tokio::select! {
            () = sleep_until(until) => break,
            () = life.wake.wait(RENEWED) => {}
        }
    }
    session.abort(ended());
}

fn ended() -> CloseReason {
    CloseReason::local(CloseCode::AUTH_EXPIRED, "the token's time is over")
}

/// Asks the verifier regularly whether the peer's token is still valid.
async fn recheck_peer(session: &Session, guard: &Guard) {
    loop {
        let period = session.timeouts.recheck.max(Duration::from_millis(1));
        sleep_until(Instant::now().checked_add(period)).await;
        if let Some(reason) = revocation(session, guard) {
            session.abort(reason);
            return;
        }
    }
}

/// The reason to end the session, if the peer's token is no longer valid.
pub(crate) fn revocation(session: &Session, guard: &Guard) -> Option<CloseReason> {
    let peer = session.peer.get()?;
    // A timer does not run while the machine sleeps, and ignores changes of the clock.
    if peer.time_left().is_some_and(|left| left.is_zero()) {
        return Some(ended());
    }
    let valid = std::panic::catch_unwind(AssertUnwindSafe(|| guard.auth.is_valid(&peer)));
    let (code, text) = match valid {
        Ok(true) => return None,
        Ok(false) => (CloseCode::AUTH_REVOKED, "the token was withdrawn"),
        Err(_) => {
            session.counts.one(Count::HandlerPanics);
            tracing::error!("the verifier panicked");
            (CloseCode::INTERNAL, "the verifier failed")
        }
    };
    Some(CloseReason::local(code, text))
}

/// Answers the peer's `$refresh`es, one after the other.
async fn verify_refreshes(session: &Session, guard: &Guard) {
    let mut rate = Rate::new(REFRESH_RATE);
    loop {
        let (token, round) = session.life.next_asked().await;
        // Boxed, because most sockets never need the memory.
        let verified = Box::pin(verify_refresh(session, guard, &mut rate, token));
        let refreshed = match verified.await {
            Ok(expires) => {
                session.counts.one(Count::Refreshed);
                Refreshed::Accepted { expires }
            }
            Err(Deny { code, text }) => {
                if let Some(left_out) = session.log_limit.line() {
                    tracing::warn!(%code, text, left_out, "new token refused");
                }
                Refreshed::Refused { code, text }
            }
        };
        let mut exchange = lock(&session.life.exchange);
        let exchange = exchange.get_or_make();
        if exchange.round == round {
            exchange.out = control::encode_refreshed(&refreshed);
            session.life.wake.set(READY);
        }
    }
}

async fn verify_refresh(
    session: &Session,
    guard: &Guard,
    rate: &mut Rate,
    token: String,
) -> Result<Option<Duration>, Deny> {
    let remote = session.conn().remote_address();
    let limited = |text: &str| Err(Deny::new(CloseCode::RATE_LIMITED, text));
    if !rate.take() {
        return limited("new tokens come too fast");
    }
    let failure = session.timeouts.auth_failure;
    if let Err(slow) = guard.turn(remote.ip(), failure, &session.counts).await {
        return limited(&slow.to_string());
    }
    let hello = HelloMessage {
        token,
        agent: session.agent().to_owned(),
        frame: None,
        resume: None,
        marks: false,
        history: false,
        follows: false,
    };
    let verdict = guard.verify(
        Hello::new(hello, remote, session.conn().transport()),
        failure,
        &session.counts,
    );
    let within = session.timeouts.auth;
    let peer = tokio::time::timeout(within, verdict).await.map_err(|_| {
        Deny::new(
            CloseCode::AUTH_TIMEOUT,
            format!("not authenticated within {within:?}"),
        )
    })??;
    renew(session, peer)
}

/// Presents a new token of the client's source after two thirds of the old one's time.
async fn keep_fresh(session: &Session, source: &TokenSource) {
    let life = &session.life;
    loop {
        life.wake.take(RENEWED);
        let now = *lock(&life.term);
        let (Some(since), Some(until)) = (now.since, now.until) else {
            life.wake.wait(RENEWED).await;
            continue;
        };
        let mut at = since + two_thirds(until - since).max(REFRESH_PAUSE);
        loop {
            tokio::select! {
                () = life.wake.wait(RENEWED) => break,
                () = tokio::time::sleep_until(at) => {}
            }
            let fresh = async {
                let token = source.token(session.timeouts.request).await?;
                refresh(session, token)
                    .await
                    .map_err(|error| error.to_string())
            };
            let Err(error) = fresh.await else {
                break;
            };
            let now = Instant::now();
            let left = until.saturating_duration_since(now);
            tracing::warn!(%error, ?left, "the token could not be refreshed");
            at = now + two_thirds(left).max(FAILURE_PAUSE);
        }
    }
}

/// Two thirds of `time`, minus a random part of up to a tenth of it, so that many clients do not refresh at once.
fn two_thirds(time: Duration) -> Duration {
    let mut lot = [0_u8];
    // Without random numbers there is no jitter, which is harmless.
    let _ = aws_lc_rs::rand::fill(&mut lot);
    time.mul_f64(2.0 / 3.0 - f64::from(lot[0]) / 2550.0)
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => Box::pin(tokio::time::sleep_until(at)).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::message::Message;

    fn refresh(token: &str) -> Refresh {
        let token = token.to_owned();
        Refresh { token }
    }

    fn read<T: control::Decode>(frame: &Bytes) -> T {
        let message = Message::decode(frame.slice(crate::wire::frame::PREFIX..)).unwrap();
        T::decode(&message).unwrap()
    }

    #[test]
    fn a_new_connection_begins_the_exchange_anew_on_both_sides() {
        let (client, server) = (Life::default(), Life::default());
        let frame = control::encode(&refresh("a-new-token")).unwrap();
        let (answer, mut answered) = oneshot::channel();
        lock(&client.exchange).get_or_make().waiting = Some(Waiting {
            refresh: refresh("a-new-token"),
            answer,
            _turn: client.turn().try_lock_owned().unwrap(),
        });
        assert_eq!(server.on_refresh(read(&frame)), None);
        let twice = server.on_refresh(read(&frame)).unwrap();
        assert_eq!(twice.code, CloseCode::PROTOCOL_ORDER);
        client.reattached();
        server.reattached();
        let again = client.next_frame().now_or_never().unwrap();
        assert_eq!(again, frame);
        assert_eq!(server.on_refresh(read(&again)), None);
        let (token, round) = server.next_asked().now_or_never().unwrap();
        assert_eq!((token.as_str(), round), ("a-new-token", 1));
        let yes = control::encode_refreshed(&Refreshed::Accepted { expires: None }).unwrap();
        assert_eq!(client.on_refreshed(read(&yes)), None);
        answered.try_recv().unwrap().unwrap();
        let unasked = client.on_refreshed(read(&yes)).unwrap();
        assert_eq!(unasked.code, CloseCode::PROTOCOL_ORDER);
    }

    #[test]
    fn refreshes_are_spread_over_a_tenth_before_two_thirds() {
        let hour = Duration::from_secs(3600);
        let drawn: Vec<Duration> = (0..200).map(|_| two_thirds(hour)).collect();
        assert!(
            drawn
                .iter()
                .all(|at| (hour.mul_f64(0.56)..=hour.mul_f64(0.667)).contains(at))
        );
        assert!(drawn.iter().any(|at| *at != drawn[0]));
        two_thirds(Duration::from_millis(u64::MAX));
        assert_eq!(two_thirds(Duration::ZERO), Duration::ZERO);
    }
}
