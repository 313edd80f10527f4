//! The protocol's own messages: what is in them, how they are written, what is refused.
//!
//! Everything here is read with the strict reader ([`Fields`]), never with serde: exact types, no duplicate
//! and no unknown keys. Reserved for growth is the key `ext` in `$hello` and `$welcome`.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;

use crate::base::text::cut;
use crate::base::text::printable_within;
use crate::wire::code::{CloseCode, CloseReason};
use crate::wire::config::{Limits, MIN_FRAME, Priority, TOKEN_BYTES, Timeouts};
use crate::wire::message::{self, EncodeError, Message, check_name};
use crate::wire::msgpack::{FieldError, Fields, Head, MAX_DEPTH, MAX_ELEMENTS, Reader};

/// The version this library speaks; also named by the ALPN.
pub(crate) const VERSION: u64 = 1;

pub(crate) const HELLO: &str = "$hello";
pub(crate) const WELCOME: &str = "$welcome";
pub(crate) const OPEN: &str = "$open";
pub(crate) const CLOSE: &str = "$close";
pub(crate) const GOAWAY: &str = "$goaway";
pub(crate) const RESUME: &str = "$resume";
pub(crate) const ACK: &str = "$ack";
pub(crate) const REFRESH: &str = "$refresh";
pub(crate) const REFRESHED: &str = "$refreshed";
pub(crate) const GAP: &str = "$gap";
pub(crate) const MARK: &str = "$mark";
pub(crate) const PASSED: &str = "$passed";
pub(crate) const REPLY: &str = "$reply";
pub(crate) const FAULT: &str = "$fault";
pub(crate) const CHANNELS: &str = "$channels";
pub(crate) const CANCEL: &str = "$cancel";
pub(crate) const PUSH: &str = "$push";
pub(crate) const END: &str = "$end";
pub(crate) const WANT: &str = "$want";
pub(crate) const ITEM: &str = "$item";
pub(crate) const CREDIT: &str = "$credit";

/// A protocol message that cannot be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Another message stands where this one must.
    #[error("expected {expected}, got another event")]
    Unexpected {
        /// The event that must stand here.
        expected: &'static str,
    },
    /// A field is missing, unknown, doubled or of the wrong type.
    #[error("{event}: {source}")]
    Field {
        /// The message.
        event: &'static str,
        /// What is wrong.
        source: FieldError,
    },
    /// A field holds a value that is not allowed.
    #[error("{event}: {rule}")]
    Value {
        /// The message.
        event: &'static str,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// The peer speaks another version.
    #[error("protocol version {0} is not spoken here, version 1 is")]
    Version(u64),
    /// The token is longer than any token may be.
    #[error("token is longer than the limit: {0} bytes, at most {TOKEN_BYTES}")]
    TokenTooLong(usize),
}

impl ControlError {
    /// The close code that tells the peer.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Unexpected { expected: HELLO } => CloseCode::AUTH_REQUIRED,
            Self::Unexpected { .. } => CloseCode::PROTOCOL_ORDER,
            Self::Field { .. } | Self::Value { .. } => CloseCode::BAD_MESSAGE,
            Self::Version(_) => CloseCode::VERSION,
            Self::TokenTooLong(_) => CloseCode::FRAME_TOO_LARGE,
        }
    }
}

fn fields<'a>(
    message: &'a Message,
    event: &'static str,
    allowed: &[&str],
) -> Result<Fields<'a>, ControlError> {
    if message.event() != event {
        return Err(ControlError::Unexpected { expected: event });
    }
    if message.id().is_some() {
        return Err(ControlError::Value {
            event,
            rule: "takes no id",
        });
    }
    let field = |source| ControlError::Field { event, source };
    // The version comes first: what else the map may hold is not known before.
    if matches!(event, HELLO | WELCOME)
        && let Some(version) = Fields::peek_u64(&message.raw(), "v")
        && version != VERSION
    {
        return Err(ControlError::Version(version));
    }
    let fields = message.fields().map_err(field)?;
    if matches!(event, HELLO | WELCOME) {
        fields.u64("v").map_err(field)?;
    }
    fields.only(allowed).map_err(field)?;
    Ok(fields)
}

/// Bytes of a resume token.
const RESUME_TOKEN: usize = 32;

fn resume_token(
    fields: &Fields<'_>,
    event: &'static str,
) -> Result<[u8; RESUME_TOKEN], ControlError> {
    let token = fields
        .bin("token")
        .map_err(|source| ControlError::Field { event, source })?;
    token.try_into().map_err(|_| ControlError::Value {
        event,
        rule: "a resume token is 32 bytes",
    })
}

fn session_id(id: &str, event: &'static str) -> Result<String, ControlError> {
    if id.len() != 32 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(ControlError::Value {
            event,
            rule: "session is not 32 hexadecimal digits",
        });
    }
    Ok(id.to_owned())
}

/// Every message of the protocol fits the frames of both sides.
fn check_frame(frame: u64, event: &'static str) -> Result<(), ControlError> {
    if frame < MIN_FRAME as u64 {
        let rule = "a frame limit is at least 4,096 bytes";
        return Err(ControlError::Value { event, rule });
    }
    Ok(())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The client's first message.
#[derive(Clone, PartialEq, Eq)]
pub struct HelloMessage {
    /// What lets the client in.
    pub token: String,
    /// Name and version of the client program, cut and escaped.
    pub agent: String,
    /// Largest frame the client takes, in bytes, when it says so.
    pub frame: Option<u64>,
    /// Present when the client can resume sessions.
    pub resume: Option<ResumeRequest>,
    /// The client answers `$mark`.
    pub marks: bool,
}

/// The client can resume: keep this session for a while when its connection is lost.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResumeRequest {
    /// The session to go on with; `None` asks for a new one that can be resumed later.
    pub session: Option<ResumeTicket>,
}

/// Names a session and proves that it is the client's. `Debug` leaves the token out.
#[derive(Clone, PartialEq, Eq)]
pub struct ResumeTicket {
    /// The session's id: 32 hexadecimal digits.
    pub session: String,
    /// The token of the last `$welcome`.
    pub token: [u8; 32],
}

impl std::fmt::Debug for ResumeTicket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResumeTicket")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for HelloMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HelloMessage")
            .field("agent", &self.agent)
            .finish_non_exhaustive()
    }
}

/// Reads a `$hello`.
///
/// # Errors
/// When it is another message, has a missing, unknown, doubled or wrongly typed field, speaks another
/// version, or carries a token over 512 bytes.
pub fn decode_hello(message: &Message) -> Result<HelloMessage, ControlError> {
    let field = |source| ControlError::Field {
        event: HELLO,
        source,
    };
    let fields = fields(
        message,
        HELLO,
        &["v", "token", "agent", "limits", "resume", "ext"],
    )?;
    let token = fields.str("token").map_err(field)?;
    if token.len() > TOKEN_BYTES {
        return Err(ControlError::TokenTooLong(token.len()));
    }
    let agent = fields.str("agent").map_err(field)?;
    let resume = match fields.opt_map("resume").map_err(field)? {
        Some(resume) => Some(resume_request(&resume)?),
        None => None,
    };
    let marks = fields.opt_map("ext").map_err(field)?.is_some_and(marks);
    let frame = match fields.opt_map("limits").map_err(field)? {
        Some(limits) => {
            limits.only(&["frame", "channels"]).map_err(field)?;
            limits.opt_u64("channels").map_err(field)?;
            limits.opt_u64("frame").map_err(field)?
        }
        None => None,
    };
    // 0 is as if it were absent.
    let frame = frame.filter(|frame| *frame > 0);
    if let Some(frame) = frame {
        check_frame(frame, HELLO)?;
    }
    Ok(HelloMessage {
        token: token.to_owned(),
        agent: printable_within(agent, 128),
        frame,
        resume,
        marks,
    })
}

/// Whether the sender offers to answer `$mark`.
fn marks(ext: Fields<'_>) -> bool {
    matches!(ext.opt_bool("mark"), Ok(Some(true)))
}

/// The extensions that this side knows.
#[derive(Serialize)]
struct Ext {
    mark: bool,
}

fn resume_request(resume: &Fields<'_>) -> Result<ResumeRequest, ControlError> {
    let field = |source| ControlError::Field {
        event: HELLO,
        source,
    };
    resume.only(&["session", "token"]).map_err(field)?;
    let session = resume.opt_str("session").map_err(field)?;
    let token = resume.opt_bin("token").map_err(field)?;
    let session = match (session, token) {
        (None, None) => None,
        (Some(session), Some(_)) => Some(ResumeTicket {
            session: session_id(session, HELLO)?,
            token: resume_token(resume, HELLO)?,
        }),
        _ => {
            return Err(ControlError::Value {
                event: HELLO,
                rule: "resume has a session and its token, or neither",
            });
        }
    };
    Ok(ResumeRequest { session })
}

#[derive(Serialize)]
struct HelloFields<'a> {
    v: u64,
    token: &'a str,
    agent: &'a str,
    limits: HelloLimits,
    #[serde(skip_serializing_if = "Option::is_none")]
    resume: Option<ResumeFields<'a>>,
    ext: Ext,
}

#[derive(Serialize)]
struct ResumeFields<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<Binary<'a>>,
}

/// Bytes that serialize as binary, not as an array of numbers.
struct Binary<'a>(&'a [u8]);

impl Serialize for Binary<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

#[derive(Serialize)]
struct HelloLimits {
    frame: u64,
    channels: u64,
}

pub(crate) fn encode_hello(
    token: &str,
    agent: &str,
    limits: &Limits,
    resume: Option<&ResumeRequest>,
) -> Result<Bytes, EncodeError> {
    let resume = resume.map(|resume| ResumeFields {
        session: resume
            .session
            .as_ref()
            .map(|ticket| ticket.session.as_str()),
        token: resume.session.as_ref().map(|ticket| Binary(&ticket.token)),
    });
    let limits = HelloLimits {
        frame: limits.frame as u64,
        channels: u64::from(limits.channels),
    };
    protocol(
        HELLO,
        &HelloFields {
            v: VERSION,
            token,
            agent: cut(agent, 128),
            limits,
            resume,
            ext: Ext { mark: true },
        },
        None,
    )
}

/// The server's answer to an accepted `$hello`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// The session's id: 32 hexadecimal digits.
    pub session: String,
    /// Name and version of the server program, cut and escaped.
    pub agent: String,
    /// Largest frame the server takes, in bytes.
    pub frame: u64,
    /// Channels the client may have open at once.
    pub channels: u64,
    /// The session that the client asked for goes on.
    pub resumed: bool,
    /// Present when this session can be resumed.
    pub resume: Option<ResumeGrant>,
    /// Why the session that the client asked for does not go on: `"unknown"`, `"expired"`, `"identity"` or
    /// `"off"`. Cut and escaped.
    pub reason: Option<String>,
    /// How long the client's token stays good; `None` for one without an end.
    pub expires: Option<Duration>,
    /// The server may send `$mark`, as the client offered.
    pub marks: bool,
}

/// What a client needs to resume a session later. `Debug` leaves the token out.
#[derive(Clone, PartialEq, Eq)]
pub struct ResumeGrant {
    /// Good for one resumption; every `$welcome` brings a new one.
    pub token: [u8; 32],
    /// How long the server keeps the session after its connection is lost.
    pub window: Duration,
}

impl std::fmt::Debug for ResumeGrant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResumeGrant")
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}

/// Reads a `$welcome`.
///
/// # Errors
/// When it is another message or has a missing, unknown, doubled or wrongly typed field.
pub fn decode_welcome(message: &Message) -> Result<Welcome, ControlError> {
    let field = |source| ControlError::Field {
        event: WELCOME,
        source,
    };
    let fields = fields(
        message,
        WELCOME,
        &[
            "v",
            "session",
            "agent",
            "limits",
            "resumed",
            "resume",
            "reason",
            "expires_ms",
            "ext",
        ],
    )?;
    let session = session_id(fields.str("session").map_err(field)?, WELCOME)?;
    let agent = fields.str("agent").map_err(field)?;
    let resumed = fields.opt_bool("resumed").map_err(field)?.unwrap_or(false);
    let resume = match fields.opt_map("resume").map_err(field)? {
        Some(resume) => {
            resume.only(&["token", "window_ms"]).map_err(field)?;
            Some(ResumeGrant {
                token: resume_token(&resume, WELCOME)?,
                window: Duration::from_millis(resume.u64("window_ms").map_err(field)?),
            })
        }
        None => None,
    };
    let reason = fields.opt_str("reason").map_err(field)?;
    if resumed && reason.is_some() {
        return Err(ControlError::Value {
            event: WELCOME,
            rule: "a resumed session has no reason why not",
        });
    }
    let expires = fields.opt_u64("expires_ms").map_err(field)?;
    let marks = fields.opt_map("ext").map_err(field)?.is_some_and(marks);
    let limits = fields.map("limits").map_err(field)?;
    let frame = limits.u64("frame").map_err(field)?;
    check_frame(frame, WELCOME)?;
    Ok(Welcome {
        session,
        agent: printable_within(agent, 128),
        frame,
        channels: limits.u64("channels").map_err(field)?,
        resumed,
        resume,
        reason: reason.map(|reason| printable_within(reason, 128)),
        expires: expires.map(Duration::from_millis),
        marks,
    })
}

#[derive(Serialize)]
struct WelcomeFields<'a> {
    v: u64,
    session: &'a str,
    agent: &'a str,
    limits: AnnouncedLimits,
    resumed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    resume: Option<GrantFields<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ext: Option<Ext>,
}

#[derive(Serialize)]
struct GrantFields<'a> {
    token: Binary<'a>,
    window_ms: u64,
}

#[derive(Serialize)]
struct AnnouncedLimits {
    frame: u64,
    event: u64,
    depth: u64,
    elements: u64,
    channels: u64,
    channel_rate: u64,
    idle_ms: u64,
    keep_alive_ms: u64,
    frame_ms: u64,
    slow_peer_ms: u64,
}

pub(crate) fn encode_welcome(
    welcome: &Welcome,
    limits: &Limits,
    timeouts: &Timeouts,
) -> Result<Bytes, EncodeError> {
    let limits = AnnouncedLimits {
        frame: welcome.frame,
        event: message::MAX_NAME as u64,
        depth: MAX_DEPTH as u64,
        elements: MAX_ELEMENTS as u64,
        channels: welcome.channels,
        channel_rate: u64::from(limits.channel_rate),
        idle_ms: millis(timeouts.idle),
        keep_alive_ms: millis(timeouts.keep_alive),
        frame_ms: millis(timeouts.frame),
        slow_peer_ms: millis(timeouts.slow_peer),
    };
    let fields = WelcomeFields {
        v: VERSION,
        session: &welcome.session,
        agent: &welcome.agent,
        limits,
        resumed: welcome.resumed,
        resume: welcome.resume.as_ref().map(|grant| GrantFields {
            token: Binary(&grant.token),
            window_ms: millis(grant.window),
        }),
        reason: welcome.reason.as_deref(),
        expires_ms: welcome.expires.map(millis),
        ext: welcome.marks.then_some(Ext { mark: true }),
    };
    protocol(WELCOME, &fields, None)
}

/// The first message on a channel's stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// The opener's number for the channel.
    pub id: u64,
    /// The name that chooses the handler.
    pub name: String,
    /// Whatever the opener wants to say first, as msgpack.
    pub meta: Option<Bytes>,
    /// Which channels go first when there is more to send than the path takes.
    pub priority: Priority,
    /// The channel survives the loss of its connection.
    pub resumable: bool,
    /// Present when the channel goes on from an earlier connection: how many frames the opener has received
    /// on it.
    pub received: Option<u64>,
}

/// Reads an `$open`.
///
/// # Errors
/// When it is another message, has a missing, unknown, doubled or wrongly typed field, a name that breaks
/// the rules for names, a priority above 2, or `received` on a channel that is not resumable.
pub fn decode_open(message: &Message) -> Result<Open, ControlError> {
    let field = |source| ControlError::Field {
        event: OPEN,
        source,
    };
    let fields = fields(
        message,
        OPEN,
        &["id", "name", "meta", "priority", "resumable", "received"],
    )?;
    let id = fields.u64("id").map_err(field)?;
    let name = fields.str("name").map_err(field)?;
    if check_name(name).is_err() || name.starts_with('$') {
        return Err(ControlError::Value {
            event: OPEN,
            rule: "a channel name is 1 to 128 bytes without control characters and does not start with $",
        });
    }
    let meta = fields.raw("meta").map(Bytes::copy_from_slice);
    let priority = match fields.opt_u64("priority").map_err(field)? {
        Some(priority) => Priority::try_from(priority).map_err(|_| ControlError::Value {
            event: OPEN,
            rule: "a priority is 0, 1 or 2",
        })?,
        None => Priority::default(),
    };
    let resumable = fields
        .opt_bool("resumable")
        .map_err(field)?
        .unwrap_or(false);
    let received = fields.opt_u64("received").map_err(field)?;
    if received.is_some() && !resumable {
        return Err(ControlError::Value {
            event: OPEN,
            rule: "only a resumable channel can go on",
        });
    }
    Ok(Open {
        id,
        name: name.to_owned(),
        meta,
        priority,
        resumable,
        received,
    })
}

/// What an `$open` says. Fields with their default value are left out.
#[derive(Serialize)]
pub(crate) struct OpenRequest<'a, T: ?Sized> {
    pub id: u64,
    pub name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meta: Option<&'a T>,
    #[serde(skip_serializing_if = "Priority::is_default")]
    pub priority: Priority,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub resumable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub received: Option<u64>,
}

pub(crate) fn encode_open<T: Serialize + ?Sized>(
    open: &OpenRequest<'_, T>,
    limit: usize,
) -> Result<Bytes, EncodeError> {
    protocol_within(OPEN, open, None, limit)
}

/// The `$open` that a resumable channel began with, once more: with the number of frames received since.
pub(crate) fn reopen(open: &Bytes, received: u64) -> Option<Bytes> {
    // What `encode_open` writes: prefix, array of two, the event, and a map of fewer than 15 fields.
    let map = crate::wire::frame::PREFIX + 2 + OPEN.len();
    let (head, rest) = (open.get(..map)?, open.get(map + 1..)?);
    let fields = open
        .get(map)
        .filter(|fields| (0x80..0x8f).contains(*fields))?;
    let mut frame = BytesMut::from(head);
    frame.put_u8(fields + 1);
    frame.put_slice(rest);
    let mut writer = frame.writer();
    rmp::encode::write_str(&mut writer, "received").ok()?;
    rmp::encode::write_uint(&mut writer, received).ok()?;
    let mut frame = writer.into_inner();
    let length = u32::try_from(frame.len() - crate::wire::frame::PREFIX).ok()?;
    frame
        .get_mut(..crate::wire::frame::PREFIX)?
        .copy_from_slice(&length.to_be_bytes());
    Some(frame.freeze())
}

/// Which of its resumable channels the sender still has: its first message on a connection that resumed the
/// session, in both directions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Channels {
    /// The ids of those that the sender opened.
    pub open: Vec<u64>,
}

/// Reads a `$channels`.
///
/// # Errors
/// When it is another message or has a missing, unknown, doubled or wrongly typed field.
pub fn decode_channels(message: &Message) -> Result<Channels, ControlError> {
    let field = |source| ControlError::Field {
        event: CHANNELS,
        source,
    };
    let fields = fields(message, CHANNELS, &["open"])?;
    let mut values = fields.array("open").map_err(field)?;
    let mut open = Vec::new();
    while values.remaining() > 0 {
        open.push(values.next_u64().map_err(field)?);
    }
    Ok(Channels { open })
}

pub(crate) fn encode_channels(open: Vec<u64>) -> Option<Bytes> {
    protocol(CHANNELS, &Channels { open }, None).ok()
}

/// The acceptor's answer to an `$open` with `received`: its first frame on the new stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Resumed {
    /// How many frames the acceptor has received on this channel.
    pub received: u64,
    /// The channel is over at the acceptor and nothing more will come.
    pub done: bool,
}

/// Reads a `$resume`.
///
/// # Errors
/// When it is another message or has a missing, unknown, doubled or wrongly typed field.
pub fn decode_resume(message: &Message) -> Result<Resumed, ControlError> {
    let field = |source| ControlError::Field {
        event: RESUME,
        source,
    };
    let fields = fields(message, RESUME, &["received", "done"])?;
    Ok(Resumed {
        received: fields.u64("received").map_err(field)?,
        done: fields.bool("done").map_err(field)?,
    })
}

pub(crate) fn encode_resume(resumed: Resumed) -> Option<Bytes> {
    protocol(RESUME, &resumed, None).ok()
}

/// Frames of one channel that need not be kept any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Ack {
    /// The channel's id.
    pub channel: u64,
    /// The sender of this message opened the channel.
    pub own: bool,
    /// How many frames the sender of this message has received on it; [`REFUSED`](Self::REFUSED) for all there
    /// will ever be.
    pub received: u64,
}

impl Ack {
    /// The sender of this message takes nothing more of the channel: nothing need be kept or repeated.
    pub const REFUSED: u64 = u64::MAX;
}

/// Reads an `$ack`.
///
/// # Errors
/// When it is another message or has a missing, unknown, doubled or wrongly typed field.
pub fn decode_ack(message: &Message) -> Result<Ack, ControlError> {
    let field = |source| ControlError::Field { event: ACK, source };
    let fields = fields(message, ACK, &["channel", "own", "received"])?;
    Ok(Ack {
        channel: fields.u64("channel").map_err(field)?,
        own: fields.bool("own").map_err(field)?,
        received: fields.u64("received").map_err(field)?,
    })
}

pub(crate) fn encode_ack(ack: Ack) -> Option<Bytes> {
    protocol(ACK, &ack, None).ok()
}

/// How far the program that reads a channel has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Passed {
    /// The channel's id.
    pub channel: u64,
    /// The sender of this message opened the channel.
    pub own: bool,
    /// The last `$mark` that its program has come to.
    pub mark: u64,
}

/// Reads a `$passed`.
///
/// # Errors
/// When it is another message or has a missing, unknown, doubled or wrongly typed field.
pub fn decode_passed(message: &Message) -> Result<Passed, ControlError> {
    let field = |source| ControlError::Field {
        event: PASSED,
        source,
    };
    let fields = fields(message, PASSED, &["channel", "own", "mark"])?;
    Ok(Passed {
        channel: fields.u64("channel").map_err(field)?,
        own: fields.bool("own").map_err(field)?,
        mark: fields.u64("mark").map_err(field)?,
    })
}

pub(crate) fn encode_passed(passed: Passed) -> Option<Bytes> {
    protocol(PASSED, &passed, None).ok()
}

/// Reads a `$mark`: its number.
///
/// # Errors
/// When it is another message, has an id, or its data is no number from 0 to 2^64 - 1.
pub fn decode_mark(message: &Message) -> Result<u64, ControlError> {
    let value = |rule| ControlError::Value { event: MARK, rule };
    if message.event() != MARK {
        return Err(ControlError::Unexpected { expected: MARK });
    }
    if message.id().is_some() {
        return Err(value("takes no id"));
    }
    match Reader::new(&message.raw()).head() {
        Ok(Head::Uint(mark)) => Ok(mark),
        _ => Err(value("is a number from 0 to 2^64 - 1")),
    }
}

/// A new token of the client in the place of the one it came with. `Debug` leaves it out.
#[derive(Clone, PartialEq, Eq)]
pub struct Refresh {
    /// The new token.
    pub token: String,
}

impl std::fmt::Debug for Refresh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refresh").finish_non_exhaustive()
    }
}

/// Reads a `$refresh`.
///
/// # Errors
/// When it is another message, has a missing, unknown, doubled or wrongly typed field, or a token over 512
/// bytes.
pub fn decode_refresh(message: &Message) -> Result<Refresh, ControlError> {
    let field = |source| ControlError::Field {
        event: REFRESH,
        source,
    };
    let fields = fields(message, REFRESH, &["token"])?;
    let token = fields.str("token").map_err(field)?;
    if token.len() > TOKEN_BYTES {
        return Err(ControlError::TokenTooLong(token.len()));
    }
    Ok(Refresh {
        token: token.to_owned(),
    })
}

#[derive(Serialize)]
struct RefreshFields<'a> {
    token: &'a str,
}

pub(crate) fn encode_refresh(token: &str) -> Result<Bytes, EncodeError> {
    protocol(REFRESH, &RefreshFields { token }, None)
}

/// The server's answer to a `$refresh`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refreshed {
    /// The new token counts from now on.
    Accepted {
        /// How long it stays good; `None` for one without an end.
        expires: Option<Duration>,
    },
    /// The new token was not accepted; the one before counts on.
    Refused {
        /// Why.
        code: CloseCode,
        /// Why, for people; cut and escaped.
        text: String,
    },
}

/// Reads a `$refreshed`.
///
/// # Errors
/// When it is another message, has an unknown, doubled or wrongly typed field, or is half an acceptance and
/// half a refusal.
pub fn decode_refreshed(message: &Message) -> Result<Refreshed, ControlError> {
    let field = |source| ControlError::Field {
        event: REFRESHED,
        source,
    };
    let fields = fields(message, REFRESHED, &["expires_ms", "code", "text"])?;
    let expires = fields.opt_u64("expires_ms").map_err(field)?;
    let code = fields.opt_u64("code").map_err(field)?;
    let text = fields.opt_str("text").map_err(field)?;
    match (expires, code, text) {
        (expires, None, None) => Ok(Refreshed::Accepted {
            expires: expires.map(Duration::from_millis),
        }),
        (None, Some(code), Some(text)) => Ok(Refreshed::Refused {
            code: CloseCode::new(code),
            text: printable_within(text, 256),
        }),
        _ => Err(ControlError::Value {
            event: REFRESHED,
            rule: "a refusal is a code and a text, and nothing else",
        }),
    }
}

#[derive(Serialize)]
struct RefreshedFields<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
}

pub(crate) fn encode_refreshed(refreshed: &Refreshed) -> Option<Bytes> {
    let fields = match refreshed {
        Refreshed::Accepted { expires } => RefreshedFields {
            expires_ms: expires.map(millis),
            code: None,
            text: None,
        },
        Refreshed::Refused { code, text } => RefreshedFields {
            expires_ms: None,
            code: Some(code.value()),
            text: Some(cut(text, 256)),
        },
    };
    protocol(REFRESHED, &fields, None).ok()
}

/// Messages of a room that this member was too slow for and will not get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The room.
    pub room: String,
    /// How many messages are missing here; at least 1.
    pub lost: u64,
}

/// Reads a `$gap`.
///
/// # Errors
/// When it is another message, has a missing, unknown, doubled or wrongly typed field, a room that breaks the
/// rules for names, or tells that nothing is missing.
pub fn decode_gap(message: &Message) -> Result<Gap, ControlError> {
    let field = |source| ControlError::Field { event: GAP, source };
    let fields = fields(message, GAP, &["room", "lost"])?;
    let room = fields.str("room").map_err(field)?;
    if check_name(room).is_err() {
        return Err(ControlError::Value {
            event: GAP,
            rule: "a room's name is 1 to 128 bytes without control characters",
        });
    }
    let lost = fields.u64("lost").map_err(field)?;
    if lost == 0 {
        return Err(ControlError::Value {
            event: GAP,
            rule: "nothing is missing",
        });
    }
    Ok(Gap {
        room: room.to_owned(),
        lost,
    })
}

#[derive(Serialize)]
struct GapFields<'a> {
    room: &'a str,
    lost: u64,
}

pub(crate) fn encode_gap(room: &str, lost: u64) -> Result<Bytes, EncodeError> {
    protocol(GAP, &GapFields { room, lost }, None)
}

/// Reads a `$close`.
///
/// # Errors
/// When it is another message or has a missing, unknown, doubled or wrongly typed field.
pub fn decode_close(message: &Message) -> Result<CloseReason, ControlError> {
    let field = |source| ControlError::Field {
        event: CLOSE,
        source,
    };
    let fields = fields(message, CLOSE, &["code", "text"])?;
    let code = CloseCode::new(fields.u64("code").map_err(field)?);
    Ok(CloseReason::peer(code, fields.str("text").map_err(field)?))
}

#[derive(Serialize)]
struct CloseFields<'a> {
    code: u64,
    text: &'a str,
}

pub(crate) fn encode_close(code: CloseCode, text: &str) -> Option<Bytes> {
    protocol(
        CLOSE,
        &CloseFields {
            code: code.value(),
            text: cut(text, 256),
        },
        None,
    )
    .ok()
}

/// The server's word that it is going down: finish what runs, come back later or elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoAway {
    /// Why.
    pub code: CloseCode,
    /// Why, for people.
    pub text: String,
    /// Do not come back sooner than this.
    pub retry_after: Duration,
    /// Spread over this long, so that not all clients come at once.
    pub window: Duration,
}

/// Reads a `$goaway`.
///
/// # Errors
/// When it is another message or has a missing, unknown, doubled or wrongly typed field.
pub fn decode_goaway(message: &Message) -> Result<GoAway, ControlError> {
    let field = |source| ControlError::Field {
        event: GOAWAY,
        source,
    };
    let fields = fields(
        message,
        GOAWAY,
        &["code", "text", "retry_after_ms", "window_ms"],
    )?;
    Ok(GoAway {
        code: CloseCode::new(fields.u64("code").map_err(field)?),
        text: printable_within(fields.str("text").map_err(field)?, 256),
        retry_after: Duration::from_millis(fields.u64("retry_after_ms").map_err(field)?),
        window: Duration::from_millis(fields.u64("window_ms").map_err(field)?),
    })
}

#[derive(Serialize)]
struct GoAwayFields<'a> {
    code: u64,
    text: &'a str,
    retry_after_ms: u64,
    window_ms: u64,
}

pub(crate) fn encode_goaway(goaway: &GoAway) -> Option<Bytes> {
    let fields = GoAwayFields {
        code: goaway.code.value(),
        text: cut(&goaway.text, 256),
        retry_after_ms: millis(goaway.retry_after),
        window_ms: millis(goaway.window),
    };
    protocol(GOAWAY, &fields, None).ok()
}

/// The most bytes that the message of a fault may have.
const FAULT_MESSAGE: usize = 1024;

/// Reads a `$fault`, its code and message strictly; `data` stays as it came, and unknown keys are passed over.
///
/// # Errors
/// When it is another message, has a missing, doubled or wrongly typed field, a code that breaks the rules for names, or
/// a message above 1,024 bytes.
pub fn decode_fault(message: &Message) -> Result<crate::wire::code::Fault, ControlError> {
    let field = |source| ControlError::Field {
        event: FAULT,
        source,
    };
    if message.event() != FAULT {
        return Err(ControlError::Unexpected { expected: FAULT });
    }
    let fields = message.fields().map_err(field)?;
    let code = fields.str("code").map_err(field)?;
    if check_name(code).is_err() {
        return Err(ControlError::Value {
            event: FAULT,
            rule: "a code is 1 to 128 bytes without control characters",
        });
    }
    let text = fields.str("message").map_err(field)?;
    if text.len() > FAULT_MESSAGE {
        return Err(ControlError::Value {
            event: FAULT,
            rule: "a message is at most 1,024 bytes",
        });
    }
    let mut fault = crate::wire::code::Fault::new(
        printable_within(code, message::MAX_NAME),
        printable_within(text, FAULT_MESSAGE),
    );
    fault.data = fields.raw("data").map(Bytes::copy_from_slice);
    Ok(fault)
}

/// A `$fault` for request `id`; without its `data` if that makes it too large for the peer.
pub(crate) fn encode_fault(
    fault: &crate::wire::code::Fault,
    id: u64,
    limit: usize,
) -> Option<Bytes> {
    let text = cut(&fault.message, FAULT_MESSAGE);
    // The peer would close the channel over a code that breaks the rule.
    let code = match check_name(&fault.code) {
        Ok(()) => fault.code.as_str(),
        Err(error) => {
            tracing::warn!(code = %printable_within(&fault.code, 64), %error, "a fault's code is none; sent as internal");
            crate::wire::code::Fault::INTERNAL
        }
    };
    let mut map = Vec::new();
    // Writing to a vector cannot fail.
    let _ = rmp::encode::write_map_len(&mut map, 2);
    for (key, value) in [("code", code), ("message", text)] {
        let _ = rmp::encode::write_str(&mut map, key);
        let _ = rmp::encode::write_str(&mut map, value);
    }
    let plain = |map: &[u8]| message::encode_raw(FAULT, map, id, limit).ok();
    let Some(data) = &fault.data else {
        return plain(&map);
    };
    let mut full = map.clone();
    if let Some(head) = full.first_mut() {
        *head += 1;
    }
    let _ = rmp::encode::write_str(&mut full, "data");
    full.extend_from_slice(data);
    plain(&full).or_else(|| plain(&map))
}

/// One whole frame with a protocol message in it.
pub(crate) fn protocol<T: Serialize + ?Sized>(
    event: &str,
    data: &T,
    id: Option<u64>,
) -> Result<Bytes, EncodeError> {
    protocol_within(event, data, id, usize::MAX >> 1)
}

pub(crate) fn protocol_within<T: Serialize + ?Sized>(
    event: &str,
    data: &T,
    id: Option<u64>,
    limit: usize,
) -> Result<Bytes, EncodeError> {
    let mut buf = BytesMut::new();
    message::encode(&mut buf, event, data, id, limit)?;
    Ok(buf.freeze())
}

#[cfg(test)]
mod tests;
