//! Close codes, close reasons and faults: the one table of how a socket, a channel or a request can end.
//!
//! The numbers are wire format (`docs/PROTOCOL.md`, "Close codes"); the texts are for people.

use std::fmt;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::base::text::printable_within;
use crate::wire::message::{DecodeError, EncodeError};

/// Why a socket or a channel was closed, as a number both sides agree on.
///
/// The same code is used as QUIC application error code, in `STOP_SENDING` and `RESET_STREAM`, and in a
/// `$close` message. Codes from [`CloseCode::APPLICATION`] up belong to the application.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CloseCode(u64);

macro_rules! codes {
    ($($(#[$doc:meta])* $const:ident = $value:literal, $name:literal, $retry:literal;)*) => {
        impl CloseCode {
            $($(#[$doc])* pub const $const: Self = Self($value);)*

            /// Every code this version defines, in ascending order.
            pub const ALL: &'static [Self] = &[$(Self::$const),*];

            /// The code's name as the documentation spells it; `"application"` for the application's own
            /// codes, `"unknown"` for a code this version does not define.
            pub const fn name(self) -> &'static str {
                match self.0 {
                    $($value => $name,)*
                    value if value >= Self::APPLICATION => "application",
                    _ => "unknown",
                }
            }

            /// Whether trying again later can help.
            pub fn retry(self) -> bool {
                match self.0 {
                    $($value => $retry,)*
                    _ => false,
                }
            }
        }
    };
}

codes! {
    /// The work is done.
    NORMAL = 0x00, "normal", false;
    /// The closing side is shutting down; come back later or elsewhere.
    SHUTTING_DOWN = 0x01, "shutting_down", true;
    /// The closing side failed; not the peer's fault.
    INTERNAL = 0x02, "internal", false;
    /// Bytes that are no frame: a length of zero.
    BAD_FRAME = 0x10, "bad_frame", false;
    /// A frame longer than the announced limit.
    FRAME_TOO_LARGE = 0x11, "frame_too_large", false;
    /// The stream ended inside a frame.
    TRUNCATED = 0x12, "truncated", false;
    /// An unfinished frame arrived too slowly. The path may be the cause as well as the peer.
    FRAME_TIMEOUT = 0x13, "frame_timeout", true;
    /// The bytes are not acceptable msgpack.
    BAD_MSGPACK = 0x14, "bad_msgpack", false;
    /// Valid msgpack that is not a message, or a protocol message with wrong fields.
    BAD_MESSAGE = 0x15, "bad_message", false;
    /// A valid message at a moment when the protocol does not allow it.
    PROTOCOL_ORDER = 0x16, "protocol_order", false;
    /// The closing side does not support the protocol version.
    VERSION = 0x17, "version", false;
    /// The two sides disagree about what was received on a resumed channel.
    RESUME_MISMATCH = 0x18, "resume_mismatch", false;
    /// Something other than `$hello` came first.
    AUTH_REQUIRED = 0x20, "auth_required", false;
    /// The token was not accepted.
    AUTH_FAILED = 0x21, "auth_failed", false;
    /// No `$hello` arrived in time.
    AUTH_TIMEOUT = 0x22, "auth_timeout", true;
    /// The token was withdrawn while connected.
    AUTH_REVOKED = 0x23, "auth_revoked", false;
    /// The peer is authenticated but has no right to do this.
    FORBIDDEN = 0x24, "forbidden", false;
    /// The token expired and the client sent no new one.
    AUTH_EXPIRED = 0x25, "auth_expired", false;
    /// The server has no room for another socket now.
    SERVER_BUSY = 0x30, "server_busy", true;
    /// Channels or messages came faster than allowed.
    RATE_LIMITED = 0x31, "rate_limited", true;
    /// The peer did not read what was sent to it in time.
    SLOW_PEER = 0x32, "slow_peer", true;
    /// Nothing happened for too long.
    IDLE = 0x33, "idle", true;
    /// A queue of unread messages is full.
    BACKLOG = 0x34, "backlog", false;
    /// The session could not be resumed; what was not acknowledged may be lost.
    NOT_RESUMED = 0x35, "not_resumed", true;
    /// The session continues on another connection.
    SUPERSEDED = 0x36, "superseded", false;
    /// The client moved to another server; open the channel again.
    MOVED = 0x37, "moved", true;
    /// The session is on another node of the server's cluster; the text is that node's address, `HOST:PORT`, and nothing else.
    ELSEWHERE = 0x38, "elsewhere", true;
    /// Nobody serves a channel of that name.
    NO_SUCH_CHANNEL = 0x40, "no_such_channel", false;
    /// The application refused the channel.
    REFUSED = 0x41, "refused", false;
    /// The application no longer wants the channel.
    CANCELLED = 0x42, "cancelled", false;
    /// The channel's handler ended with an error.
    HANDLER_FAILED = 0x43, "handler_failed", false;
    /// Local only: the connection is gone and no better reason is known.
    CONNECTION_LOST = 0xf0, "connection_lost", true;
    /// Local only: nothing was heard from the peer for the idle time.
    TIMED_OUT = 0xf1, "timed_out", true;
    /// Local only: the peer has lost this connection's state, most likely by a restart.
    PEER_RESTARTED = 0xf2, "peer_restarted", true;
    /// Local only: the QUIC layer ended the connection.
    TRANSPORT_ERROR = 0xf3, "transport_error", false;
}

impl CloseCode {
    /// The lowest of the application's own codes.
    pub const APPLICATION: u64 = 0x1000;

    /// The code with this number.
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The number.
    pub const fn value(self) -> u64 {
        self.0
    }
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (0x{:02x})", self.name(), self.0)
    }
}

impl fmt::Debug for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The side that ended a socket or a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// This program.
    Local,
    /// The program at the other end.
    Peer,
    /// The QUIC layer: time-out, loss of the peer, protocol failure.
    Transport,
}

/// How a socket or a channel ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloseReason {
    /// The code, see [`CloseCode`].
    pub code: CloseCode,
    /// A sentence for people; from the peer it is cut to 256 bytes and free of control characters.
    pub text: String,
    /// The side that ended it.
    pub by: Side,
    /// Whether trying again later can help.
    pub retry: bool,
}

impl CloseReason {
    /// A reason with the code's own verdict on retrying.
    pub fn new(code: CloseCode, text: impl Into<String>, by: Side) -> Self {
        Self {
            code,
            text: text.into(),
            by,
            retry: code.retry(),
        }
    }

    pub(crate) fn local(code: CloseCode, text: impl Into<String>) -> Self {
        Self::new(code, text, Side::Local)
    }

    /// A reason whose text came from the peer: escaped and cut, so that it is safe to print.
    pub(crate) fn peer(code: CloseCode, text: &str) -> Self {
        let mut reason = Self::new(code, printable_within(text, 256), Side::Peer);
        // The local-only codes mean nothing when a peer sends them.
        reason.retry &= code < CloseCode::CONNECTION_LOST;
        reason
    }

    /// Whether this is an orderly end: [`CloseCode::NORMAL`].
    pub fn is_normal(&self) -> bool {
        self.code == CloseCode::NORMAL
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = match self.by {
            Side::Local => "closed here",
            Side::Peer => "closed by the peer",
            Side::Transport => "connection ended",
        };
        write!(f, "{by}: {}", self.code)?;
        if !self.text.is_empty() {
            write!(f, ": {}", self.text)?;
        }
        Ok(())
    }
}

/// A typed refusal of one request: `["$fault", {code, message, data?}, id]` on the wire.
///
/// The code is for programs, the message for people. Return one from a handler to refuse a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Fault {
    /// The code for programs: one of the constants here or the application's own.
    pub code: String,
    /// The text for people.
    pub message: String,
    /// Data of the application, encoded in MessagePack.
    pub(crate) data: Option<Bytes>,
}

impl Fault {
    /// No handler for that event.
    pub const NO_HANDLER: &'static str = "no_handler";
    /// The data does not fit the handler's type.
    pub const BAD_PAYLOAD: &'static str = "bad_payload";
    /// The handler failed.
    pub const INTERNAL: &'static str = "internal";
    /// The request was given up before it was answered.
    pub const CANCELLED: &'static str = "cancelled";
    /// The handler did not answer in time.
    pub const TIMEOUT: &'static str = "timeout";
    /// The reply, or an item of it, exceeds the requester's frame limit. The data is `{limit, size}`, in bytes.
    pub const REPLY_TOO_LARGE: &'static str = "reply_too_large";

    /// A fault with a code of the table above or one of the application's own.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            message: message.into(),
            data: None,
        }
    }

    /// Adds data for programs. Data that cannot be encoded, or that is too large for the peer, is left out.
    #[must_use]
    pub fn with_data<T: Serialize + ?Sized>(mut self, data: &T) -> Self {
        self.data = crate::wire::message::encode_data(data)
            .ok()
            .map(Bytes::from);
        self
    }

    /// The data that the peer's application added, if any.
    ///
    /// # Errors
    /// When it does not fit `T`.
    pub fn data<T: DeserializeOwned>(&self) -> Result<Option<T>, DecodeError> {
        self.data
            .as_deref()
            .map(crate::wire::message::decode_data)
            .transpose()
    }
}

impl Fault {
    /// serde's error, if the fault is that data did not decode or encode, for example "missing field `a`". Safe to
    /// print.
    pub fn reason(&self) -> Option<String> {
        let said = self.data::<Reason<String>>().ok()??;
        Some(printable_within(&said.reason, REASON))
    }

    fn because(self, reason: &dyn fmt::Display) -> Self {
        let reason = printable_within(&reason.to_string(), REASON);
        self.with_data(&Reason { reason })
    }

    /// The fault for a reply, or an item of one, that cannot be sent.
    pub(crate) fn unsendable(what: &str, error: &EncodeError) -> Self {
        match error {
            EncodeError::TooLarge { size, limit } => {
                let text = format!("{what} of {size} bytes is above the asker's limit: {limit}");
                let size = TooLarge {
                    limit: *limit as u64,
                    size: *size as u64,
                };
                Self::new(Self::REPLY_TOO_LARGE, text).with_data(&size)
            }
            error => {
                let text = format!("{what} could not be encoded");
                let source = std::error::Error::source(error);
                Self::new(Self::INTERNAL, text).because(&said(error, source))
            }
        }
    }
}

/// The text of an error's source, or of the error itself if it has none.
fn said(error: &dyn fmt::Display, source: Option<&(dyn std::error::Error + 'static)>) -> String {
    source.map_or_else(|| error.to_string(), ToString::to_string)
}

/// The most bytes of serde's text that a fault carries.
const REASON: usize = 256;

#[derive(Serialize, Deserialize)]
struct Reason<T> {
    reason: T,
}

#[derive(Serialize)]
struct TooLarge {
    limit: u64,
    size: u64,
}

/// The fault for data that does not decode into the handler's type, with serde's text.
impl From<DecodeError> for Fault {
    fn from(error: DecodeError) -> Self {
        let fault = Self::new(Self::BAD_PAYLOAD, error.to_string());
        match std::error::Error::source(&error) {
            Some(source) => fault.because(&source),
            None => fault,
        }
    }
}

impl From<&str> for Fault {
    fn from(message: &str) -> Self {
        Self::new(Self::INTERNAL, message)
    }
}

impl From<String> for Fault {
    fn from(message: String) -> Self {
        Self::new(Self::INTERNAL, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_own_number_and_name() {
        let mut names: Vec<_> = CloseCode::ALL.iter().map(|code| code.name()).collect();
        assert!(
            CloseCode::ALL.windows(2).all(|pair| pair[0] < pair[1]),
            "ascending and distinct"
        );
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CloseCode::ALL.len());
        assert_eq!(CloseCode::new(0x1000).name(), "application");
        assert_eq!(CloseCode::new(0x99).name(), "unknown");
    }
}
