//! Authentication: the verifier's interface, its input and its result, and the delay for clients that guess tokens.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::BoxFuture;

use crate::base::lock;
use crate::base::pool::{Tenant, network};
use crate::trust::origin::Transport;
use crate::trust::tokens::{Found, TokenEntry};
use crate::wire::code::CloseCode;
use crate::wire::control::HelloMessage;

/// The data that a client presents for authentication. Cheap to clone.
#[derive(Clone)]
pub struct Hello {
    inner: Arc<(HelloMessage, SocketAddr, Transport)>,
}

impl Hello {
    pub(crate) fn new(message: HelloMessage, remote: SocketAddr, transport: Transport) -> Self {
        Self {
            inner: Arc::new((message, remote, transport)),
        }
    }

    /// The token. Never log it.
    pub fn token(&self) -> &str {
        &self.inner.0.token
    }

    /// Name and version of the client program, as it calls itself; printable, at most 128 bytes.
    pub fn agent(&self) -> &str {
        &self.inner.0.agent
    }

    /// Where the client connects from. QUIC has validated the address.
    pub fn remote(&self) -> SocketAddr {
        self.inner.1
    }

    /// The transport of the client's connection, with the page's origin if the client is a web page.
    pub fn transport(&self) -> &Transport {
        &self.inner.2
    }
}

impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hello")
            .field("agent", &self.agent())
            .field("remote", &self.remote())
            .finish_non_exhaustive()
    }
}

/// The identity of the other side, as the verifier returned it. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Peer {
    id: Arc<str>,
    claims: Arc<[(String, String)]>,
    expires: Option<SystemTime>,
    /// The digest of the token with which it connected, if a token file verified it.
    pub(crate) digest: Option<[u8; 32]>,
    parent: Option<Arc<Self>>,
}

impl Peer {
    /// A peer with this id.
    pub fn new(id: impl AsRef<str>) -> Self {
        Self {
            id: id.as_ref().into(),
            claims: Arc::new([]),
            expires: None,
            digest: None,
            parent: None,
        }
    }

    /// Adds further facts that the verifier knows about the peer, as `key=value` pairs.
    #[must_use]
    pub fn with_claims(mut self, claims: Vec<(String, String)>) -> Self {
        self.claims = claims.into();
        self
    }

    /// Sets the peer's expiry. At `time` the server closes the peer's socket with `auth_expired`, unless the peer has
    /// presented a new token. If `time` has passed, the peer is refused with the same code.
    #[must_use]
    pub fn expires_at(mut self, time: SystemTime) -> Self {
        self.expires = Some(time);
        self
    }

    /// Marks the peer's token as a share that `parent` has made. The peer may do what both may do, and is admitted
    /// only while both are valid.
    #[must_use]
    pub fn with_parent(mut self, parent: Self) -> Self {
        let ends = [self.expires, parent.expires].into_iter().flatten();
        self.expires = ends.min();
        self.parent = Some(Arc::new(parent));
        self
    }

    /// The peer whose token made this peer's token.
    pub fn parent(&self) -> Option<&Self> {
        self.parent.as_deref()
    }

    /// When its token expires; `None` if never.
    pub fn expires(&self) -> Option<SystemTime> {
        self.expires
    }

    /// The time from now to the expiry.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        let left = self.expires?.duration_since(SystemTime::now());
        Some(left.unwrap_or_default())
    }

    /// Whether both have the same identity: equal ids, whatever their claims. Only the same identity can refresh a
    /// token or resume a session.
    pub(crate) fn same_identity(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// The id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The id, shared.
    pub(crate) fn shared_id(&self) -> Arc<str> {
        self.id.clone()
    }

    /// The first claim of that name.
    pub fn claim(&self, key: &str) -> Option<&str> {
        self.claims
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Peer").field(&self.id()).finish()
    }
}

/// The identity of a session; a new token of the same identity may bring other claims.
#[derive(Debug, Default)]
pub(crate) struct PeerCell(RwLock<Option<Peer>>);

impl PeerCell {
    pub(crate) fn get(&self) -> Option<Peer> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set(&self, peer: Peer) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(peer);
    }
}

/// The refusal of a verifier, or of a channel's authorization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deny {
    pub(crate) code: CloseCode,
    pub(crate) text: String,
}

impl Deny {
    /// The token is not accepted. The refusal does not say why: all such refusals look alike to the client.
    pub fn auth_failed() -> Self {
        Self {
            code: CloseCode::AUTH_FAILED,
            text: "the token was not accepted".to_owned(),
        }
    }

    /// The token is known but has expired.
    pub fn auth_expired() -> Self {
        Self {
            code: CloseCode::AUTH_EXPIRED,
            text: "the token has expired".to_owned(),
        }
    }

    /// The peer is known but may not do this. The client sees the text.
    pub fn forbidden(text: impl Into<String>) -> Self {
        Self::new(CloseCode::FORBIDDEN, text)
    }

    /// A refusal with a code and text of your choice. The client sees both.
    pub fn new(code: CloseCode, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }
}

/// Decides which clients are admitted.
///
/// Implemented for async closures that take a [`Hello`] and return `Result<Peer, Deny>`, and for
/// [`TokenFile`](crate::TokenFile). A verifier that panics or does not answer within `Timeouts::auth` admits
/// nobody.
pub trait Authenticate: Send + Sync + 'static {
    /// Checks `hello` and returns the peer's identity, or refuses.
    fn authenticate(&self, hello: Hello) -> BoxFuture<'static, Result<Peer, Deny>>;

    /// Whether an admitted peer's token is still valid; `false` closes its socket with `auth_revoked`. Asked of
    /// each socket every `Timeouts::recheck`; must not block. One that panics ends the socket. Defaults to
    /// `true`.
    fn is_valid(&self, peer: &Peer) -> bool {
        let _ = peer;
        true
    }
}

impl<F, Fut> Authenticate for F
where
    F: Fn(Hello) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Peer, Deny>> + Send + 'static,
{
    fn authenticate(&self, hello: Hello) -> BoxFuture<'static, Result<Peer, Deny>> {
        Box::pin(self(hello))
    }
}

impl Tenant {
    /// All sockets with the identity of this peer, as one tenant.
    pub fn peer(peer: &Peer) -> Self {
        Self::identity(peer.shared_id())
    }
}

impl Authenticate for crate::trust::tokens::TokenFile {
    fn authenticate(&self, hello: Hello) -> BoxFuture<'static, Result<Peer, Deny>> {
        // The expiry is checked only when the token is right, so that a guess reveals nothing about it.
        let judged = |tokens: &Self, entry: Option<TokenEntry>| {
            let peer = entry.and_then(|entry| tokens.peer(&entry));
            let peer = peer.ok_or_else(Deny::auth_failed)?;
            match peer.time_left() {
                Some(Duration::ZERO) => Err(Deny::auth_expired()),
                _ => Ok(peer),
            }
        };
        let verdict = match self.find(hello.token()) {
            None => judged(self, None),
            Some(Found::Entry(entry)) => judged(self, Some(entry)),
            Some(Found::Open(entry)) => match judged(self, Some(entry)) {
                Err(deny) => Err(deny),
                Ok(_) => {
                    let tokens = self.clone();
                    return Box::pin(async move {
                        // The file is changed, which blocks.
                        let binding = tokio::task::spawn_blocking(move || {
                            judged(&tokens, tokens.bind(hello.token()))
                        });
                        binding.await.unwrap_or_else(|_| Err(Deny::auth_failed()))
                    });
                }
            },
        };
        Box::pin(std::future::ready(verdict))
    }

    /// Whether the peer's token is still in the file, under its id, together with all tokens that it depends on.
    fn is_valid(&self, peer: &Peer) -> bool {
        self.has(peer)
    }
}

/// Slows down guessing without locking out clients with a right token.
///
/// Each wrong token adds 5 s to a timer of its address. An address whose timer exceeds `failures` × 5 s is slow: its
/// tokens are verified one by one, with a pause between them, and only a few may wait. Valid tokens wait like wrong
/// ones; otherwise a guesser would recognise a valid token by its fast answer. Only addresses that QUIC has validated
/// are counted, so packets with a forged address slow down nobody.
#[derive(Debug)]
pub(crate) struct Penalties {
    sources: Mutex<HashMap<IpAddr, Source>>,
    threshold: Duration,
    pause: Duration,
}

/// An address that presented a wrong token.
#[derive(Debug)]
struct Source {
    /// The time at which all its wrong tokens are forgotten.
    until: Instant,
    /// The time of the next free turn.
    turn: Instant,
}

const SENTENCE: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(600);
const SOURCES: usize = 65_536;
/// How many tokens of one address may wait.
const LINE: u32 = 4;

impl Penalties {
    pub(crate) fn new(failures: u32, pause: Duration) -> Self {
        Self {
            sources: Mutex::default(),
            threshold: SENTENCE * failures.max(1),
            pause,
        }
    }

    /// The time at which a token of this address may be verified, if it must wait.
    pub(crate) fn turn(&self, address: IpAddr, now: Instant) -> Result<Option<Instant>, Slow> {
        let mut sources = lock(&self.sources);
        let Some(source) = sources.get_mut(&network(address)) else {
            return Ok(None);
        };
        let left = source.until.saturating_duration_since(now);
        if left <= self.threshold - SENTENCE {
            return Ok(None);
        }
        let turn = source.turn.max(now);
        let last = now + self.pause * LINE;
        if turn > last {
            return Err(Slow {
                wrong: left.as_nanos().div_ceil(SENTENCE.as_nanos()),
                wait: turn - last,
            });
        }
        source.turn = turn + self.pause;
        Ok(Some(turn))
    }

    pub(crate) fn failed(&self, address: IpAddr, now: Instant) {
        let mut table = lock(&self.sources);
        if table.len() >= SOURCES {
            table.retain(|_, source| source.until > now);
            if table.len() >= SOURCES {
                return;
            }
        }
        let new = Source {
            until: now,
            turn: now,
        };
        let source = table.entry(network(address)).or_insert(new);
        source.until = (source.until.max(now) + SENTENCE).min(now + LONGEST);
        // The first turn is a pause after the token that made the address slow.
        source.turn = source.turn.max(now + self.pause);
    }
}

/// Too many tokens of a slow address wait already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slow {
    wrong: u128,
    wait: Duration,
}

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wrong, wait } = self;
        let plural = if *wrong == 1 { "" } else { "s" };
        let seconds = wait.as_nanos().div_ceil(1_000_000_000);
        write!(
            f,
            "{wrong} wrong token{plural} from this address, again in {seconds} s"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(1);

    #[test]
    fn after_the_third_wrong_token_an_address_waits_for_its_turns() {
        let penalties = Penalties::new(3, PAUSE);
        let slow: IpAddr = "192.0.2.7".parse().expect("an address");
        let other: IpAddr = "192.0.2.8".parse().expect("an address");
        let start = Instant::now();
        for _ in 0..3 {
            assert_eq!(penalties.turn(slow, start), Ok(None));
            penalties.failed(slow, start);
        }
        for turn in 1..=LINE {
            let at = start + PAUSE * turn;
            assert_eq!(penalties.turn(slow, start), Ok(Some(at)));
        }
        let full = penalties
            .turn(slow, start)
            .expect_err("all turns are taken");
        assert_eq!(
            full.to_string(),
            "3 wrong tokens from this address, again in 1 s"
        );
        let turn = penalties.turn(slow, start + PAUSE);
        assert_eq!(turn, Ok(Some(start + PAUSE * (LINE + 1))));
        assert_eq!(penalties.turn(other, start), Ok(None));
        assert_eq!(
            penalties.turn(slow, start + SENTENCE),
            Ok(None),
            "the first is forgotten"
        );
    }

    #[test]
    fn however_many_tokens_were_wrong_they_are_forgotten_in_time() {
        let penalties = Penalties::new(3, PAUSE);
        let slow: IpAddr = "192.0.2.7".parse().expect("an address");
        let start = Instant::now();
        for _ in 0..1000 {
            penalties.failed(slow, start);
        }
        assert_eq!(penalties.turn(slow, start), Ok(Some(start + PAUSE)));
        let later = start + LONGEST - SENTENCE * 2;
        assert_eq!(penalties.turn(slow, later), Ok(None));
    }

    #[test]
    fn the_table_of_failures_is_bounded() {
        let penalties = Penalties::new(3, PAUSE);
        let now = Instant::now();
        for i in 0..70_000_u32 {
            penalties.failed(IpAddr::V4(i.into()), now);
        }
        assert!(lock(&penalties.sources).len() <= SOURCES);
    }
}
