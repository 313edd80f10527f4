//! The protocol's own messages: what is in them, how they are written, what is refused.
//!
//! Everything here is read with the strict reader ([`Fields`](crate::Fields)), never with serde: exact types, no duplicate
//! and no unknown keys. Reserved for growth is the key `ext` in `$hello` and `$welcome`.

use bytes::{Bytes, BytesMut};
use serde::Serialize;

use crate::code::{CloseCode, CloseReason, printable};
use crate::config::{Limits, TOKEN_BYTES, Timeouts};
use crate::message::{self, EncodeError, Message, check_name};
use crate::msgpack::{FieldError, MAX_DEPTH, MAX_ELEMENTS};
use crate::session::cut;

/// The version this library speaks; also named by the ALPN.
pub(crate) const VERSION: u64 = 1;

pub(crate) const HELLO: &str = "$hello";
pub(crate) const WELCOME: &str = "$welcome";
pub(crate) const OPEN: &str = "$open";
pub(crate) const CLOSE: &str = "$close";
pub(crate) const GOAWAY: &str = "$goaway";
pub(crate) const REPLY: &str = "$reply";
pub(crate) const FAULT: &str = "$fault";
pub(crate) const CANCEL: &str = "$cancel";

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
) -> Result<crate::msgpack::Fields<'a>, ControlError> {
    if message.event() != event {
        return Err(ControlError::Unexpected { expected: event });
    }
    if message.id().is_some() {
        return Err(ControlError::Value {
            event,
            rule: "takes no id",
        });
    }
    let fields = message
        .fields()
        .map_err(|source| ControlError::Field { event, source })?;
    // The version comes first: the other keys mean nothing before it is known.
    if matches!(event, HELLO | WELCOME) {
        let version = fields
            .u64("v")
            .map_err(|source| ControlError::Field { event, source })?;
        if version != VERSION {
            return Err(ControlError::Version(version));
        }
    }
    fields
        .only(allowed)
        .map_err(|source| ControlError::Field { event, source })?;
    Ok(fields)
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
    fields.opt_bin("resume").map_err(field)?;
    fields.opt_map("ext").map_err(field)?;
    let frame = match fields.opt_map("limits").map_err(field)? {
        Some(limits) => {
            limits.only(&["frame", "channels"]).map_err(field)?;
            limits.opt_u64("channels").map_err(field)?;
            limits.opt_u64("frame").map_err(field)?
        }
        None => None,
    };
    Ok(HelloMessage {
        token: token.to_owned(),
        agent: printable(agent, 128),
        frame,
    })
}

#[derive(Serialize)]
struct HelloFields<'a> {
    v: u64,
    token: &'a str,
    agent: &'a str,
    limits: HelloLimits,
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
) -> Result<Bytes, EncodeError> {
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
        &["v", "session", "agent", "limits", "resumed", "ext"],
    )?;
    let session = fields.str("session").map_err(field)?;
    if session.len() != 32 || !session.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(ControlError::Value {
            event: WELCOME,
            rule: "session is not 32 hexadecimal digits",
        });
    }
    let agent = fields.str("agent").map_err(field)?;
    fields.opt_bool("resumed").map_err(field)?;
    fields.opt_map("ext").map_err(field)?;
    let limits = fields.map("limits").map_err(field)?;
    let frame = limits.u64("frame").map_err(field)?;
    if frame == 0 {
        return Err(ControlError::Value {
            event: WELCOME,
            rule: "the frame limit is zero",
        });
    }
    Ok(Welcome {
        session: session.to_owned(),
        agent: printable(agent, 128),
        frame,
        channels: limits.u64("channels").map_err(field)?,
    })
}

#[derive(Serialize)]
struct WelcomeFields<'a> {
    v: u64,
    session: &'a str,
    agent: &'a str,
    limits: AnnouncedLimits,
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
    let ms = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let limits = AnnouncedLimits {
        frame: welcome.frame,
        event: message::MAX_NAME as u64,
        depth: MAX_DEPTH as u64,
        elements: MAX_ELEMENTS as u64,
        channels: welcome.channels,
        channel_rate: u64::from(limits.channel_rate),
        idle_ms: ms(timeouts.idle),
        keep_alive_ms: ms(timeouts.keep_alive),
        frame_ms: ms(timeouts.frame),
        slow_peer_ms: ms(timeouts.slow_peer),
    };
    let fields = WelcomeFields {
        v: VERSION,
        session: &welcome.session,
        agent: &welcome.agent,
        limits,
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
}

/// Reads an `$open`.
///
/// # Errors
/// When it is another message, has a missing, unknown, doubled or wrongly typed field, or a name that breaks
/// the rules for names.
pub fn decode_open(message: &Message) -> Result<Open, ControlError> {
    let field = |source| ControlError::Field {
        event: OPEN,
        source,
    };
    let fields = fields(message, OPEN, &["id", "name", "meta"])?;
    let id = fields.u64("id").map_err(field)?;
    let name = fields.str("name").map_err(field)?;
    if check_name(name).is_err() || name.starts_with('$') {
        return Err(ControlError::Value {
            event: OPEN,
            rule: "a channel name is 1 to 128 bytes without control characters and does not start with $",
        });
    }
    let meta = fields.raw("meta").map(Bytes::copy_from_slice);
    Ok(Open {
        id,
        name: name.to_owned(),
        meta,
    })
}

#[derive(Serialize)]
struct OpenFields<'a, T: ?Sized> {
    id: u64,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    meta: Option<&'a T>,
}

pub(crate) fn encode_open<T: Serialize + ?Sized>(
    id: u64,
    name: &str,
    meta: Option<&T>,
    limit: usize,
) -> Result<Bytes, EncodeError> {
    protocol_within(OPEN, &OpenFields { id, name, meta }, None, limit)
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
    pub retry_after: std::time::Duration,
    /// Spread over this long, so that not all clients come at once.
    pub window: std::time::Duration,
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
        text: printable(fields.str("text").map_err(field)?, 256),
        retry_after: std::time::Duration::from_millis(fields.u64("retry_after_ms").map_err(field)?),
        window: std::time::Duration::from_millis(fields.u64("window_ms").map_err(field)?),
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
    let ms = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let fields = GoAwayFields {
        code: goaway.code.value(),
        text: cut(&goaway.text, 256),
        retry_after_ms: ms(goaway.retry_after),
        window_ms: ms(goaway.window),
    };
    protocol(GOAWAY, &fields, None).ok()
}

/// A `$fault`'s code and message, read strictly; `data` is left alone.
pub(crate) fn decode_fault(message: &Message) -> Result<crate::Fault, ControlError> {
    let field = |source| ControlError::Field {
        event: FAULT,
        source,
    };
    let fields = message.fields().map_err(field)?;
    let code = printable(fields.str("code").map_err(field)?, 128);
    let text = printable(fields.str("message").map_err(field)?, 1024);
    Ok(crate::Fault::new(code, text))
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
