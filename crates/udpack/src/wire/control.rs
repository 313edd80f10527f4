//! The protocol's own messages: their fields, their encoding, and what makes one invalid.
//!
//! Everything here is read with the strict reader ([`Fields`]), never with serde: exact types, no duplicate and no
//! unknown keys. The key `ext` of `$hello` and `$welcome` is reserved for extensions.

mod rooms;

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;

use crate::base::text::cut;
use crate::base::text::printable_within;
use crate::wire::code::{CloseCode, CloseReason, Fault};
use crate::wire::config::{Limits, MIN_FRAME, Priority, TOKEN_BYTES, Timeouts};
use crate::wire::message::{self, EncodeError, Message, check_name};
use crate::wire::msgpack::{FieldError, Fields, Head, MAX_DEPTH, MAX_ELEMENTS, Reader, Values};

pub(crate) use rooms::MOST_POSITIONS;
pub use rooms::{At, RoomAt};
pub use rooms::{Gap, Missing, Position, RoomPosition, Why};

/// The protocol version of this library; the ALPN names it, too.
pub(crate) const VERSION: u64 = 1;

/// The table of the protocol's events: the name of each, and the type it is decoded into, if any.
macro_rules! events {
    ($($event:ident = $name:literal $(is $of:ty)?,)*) => {
        /// An event of the protocol, by its name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum ProtocolEvent {
            $($event,)*
        }

        impl ProtocolEvent {
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$event,)*];

            /// The name, as it stands in a message.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$event => $name,)*
                }
            }

            /// The event of this name; `None` for one that the protocol does not know.
            pub(crate) fn named(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$event),)*
                    _ => None,
                }
            }

            /// Reads a message of this event.
            pub(crate) fn read(self, message: &Message) -> Result<ProtocolMessage, ControlError> {
                Ok(match self {
                    $(Self::$event => ProtocolMessage::$event$((<$of>::decode(message)?))?,)*
                })
            }
        }

        /// A decoded message of the protocol.
        #[expect(dead_code, reason = "what begins a stream is read by its type, as are gaps, marks and faults")]
        pub(crate) enum ProtocolMessage {
            $($event$(($of))?,)*
        }

        $($(impl Named for $of {
            const EVENT: ProtocolEvent = ProtocolEvent::$event;
        })?)*
    };
}

events! {
    // The frequent ones first: names are compared in this order. On channels, about a request. They carry its id; the
    // code that handles the request decodes their data.
    Reply = "$reply",
    Fault = "$fault" is Fault,
    Cancel = "$cancel",
    Push = "$push",
    End = "$end",
    Want = "$want",
    Item = "$item",
    Credit = "$credit",
    // The first message of a stream.
    Hello = "$hello" is HelloMessage,
    Welcome = "$welcome" is Welcome,
    Open = "$open" is Open,
    Resume = "$resume" is Resumed,
    // On the control stream.
    Channels = "$channels" is Channels,
    Ack = "$ack" is Ack,
    Passed = "$passed" is Passed,
    Refresh = "$refresh" is Refresh,
    Refreshed = "$refreshed" is Refreshed,
    GoAway = "$goaway" is GoAway,
    // On the control stream and on channels.
    Close = "$close" is CloseReason,
    // On channels.
    Gap = "$gap" is Gap,
    At = "$at" is At,
    Room = "$room" is RoomAt,
    Mark = "$mark" is Mark,
}

impl ProtocolEvent {
    /// The event of a message; `None` for the application's, and for what the protocol does not know.
    pub(crate) fn of(message: &Message) -> Option<Self> {
        Self::named(message.event())
    }

    /// Whether the message is one of this event.
    pub(crate) fn is(self, message: &Message) -> bool {
        message.event() == self.name()
    }
}

/// A type that an event of the table is decoded into.
pub(crate) trait Named {
    const EVENT: ProtocolEvent;
}

/// A type that a message of the protocol is decoded into.
pub trait Decode: Sized {
    /// Reads a message.
    ///
    /// # Errors
    /// When it is another message, has an id although it answers no request, or breaks the table of its event in
    /// `docs/PROTOCOL.md`: a field that is missing, unknown, doubled or of another type, or a value that is not allowed.
    fn decode(message: &Message) -> Result<Self, ControlError>;
}

impl<T: Named + Read> Decode for T {
    fn decode(message: &Message) -> Result<Self, ControlError> {
        let event = T::EVENT.name();
        if !T::EVENT.is(message) {
            return Err(ControlError::Unexpected { expected: event });
        }
        T::read(message).map_err(|bad| match bad {
            Bad::Field(source) => ControlError::Field { event, source },
            Bad::Rule(rule) => ControlError::Value { event, rule },
            Bad::Other(error) => error,
        })
    }
}

/// Decodes the content of a message whose event is already checked.
trait Read: Sized {
    fn read(message: &Message) -> Result<Self, Bad>;
}

/// What is wrong with a message, without its event.
enum Bad {
    Field(FieldError),
    Rule(&'static str),
    Other(ControlError),
}

impl From<FieldError> for Bad {
    fn from(error: FieldError) -> Self {
        Self::Field(error)
    }
}

impl From<&'static str> for Bad {
    fn from(rule: &'static str) -> Self {
        Self::Rule(rule)
    }
}

/// A protocol message that cannot be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Another message came in place of the expected one.
    #[error("expected {expected}, got another event")]
    Unexpected {
        /// The expected event.
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
    /// The reason with which the stream of the message is closed.
    pub(crate) fn reason(&self) -> CloseReason {
        CloseReason::local(self.close_code(), self.to_string())
    }

    /// The close code that tells the peer.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Unexpected { expected } if *expected == ProtocolEvent::Hello.name() => {
                CloseCode::AUTH_REQUIRED
            }
            Self::Unexpected { .. } => CloseCode::PROTOCOL_ORDER,
            Self::Field { .. } | Self::Value { .. } => CloseCode::BAD_MESSAGE,
            Self::Version(_) => CloseCode::VERSION,
            Self::TokenTooLong(_) => CloseCode::FRAME_TOO_LARGE,
        }
    }
}

fn check(sound: bool, rule: &'static str) -> Result<(), Bad> {
    if sound { Ok(()) } else { Err(Bad::Rule(rule)) }
}

/// The data of a message that answers no request: a map with these keys.
fn map<'a>(message: &'a Message, keys: &[&str]) -> Result<Fields<'a>, Bad> {
    check(message.id().is_none(), "takes no id")?;
    let fields = message.fields()?;
    fields.only(keys)?;
    Ok(fields)
}

/// As [`map`], for `$hello` and `$welcome`. The version is checked first, because another version may allow other
/// keys.
fn versioned<'a>(message: &'a Message, keys: &[&str]) -> Result<Fields<'a>, Bad> {
    check(message.id().is_none(), "takes no id")?;
    if let Some(version) = Fields::peek_u64(&message.raw(), "v")
        && version != VERSION
    {
        return Err(Bad::Other(ControlError::Version(version)));
    }
    let fields = message.fields()?;
    fields.u64("v")?;
    fields.only(keys)?;
    Ok(fields)
}

fn resume_token(fields: &Fields<'_>) -> Result<[u8; 32], Bad> {
    let token = fields.bin("token")?.try_into();
    token.map_err(|_| Bad::Rule("a resume token is 32 bytes"))
}

fn session_id(id: &str) -> Result<String, Bad> {
    let sound = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit());
    check(sound, "session is not 32 hexadecimal digits")?;
    Ok(id.to_owned())
}

fn client_token(token: &str) -> Result<String, Bad> {
    match token.len() {
        ..=TOKEN_BYTES => Ok(token.to_owned()),
        len => Err(Bad::Other(ControlError::TokenTooLong(len))),
    }
}

/// Every message of the protocol fits the frames of both sides.
fn check_frame(frame: u64) -> Result<(), Bad> {
    check(
        frame >= MIN_FRAME as u64,
        "a frame limit is at least 4,096 bytes",
    )
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The client's first message.
#[derive(Clone, PartialEq, Eq)]
pub struct HelloMessage {
    /// The client's token.
    pub token: String,
    /// Name and version of the client program, cut and escaped.
    pub agent: String,
    /// Largest frame the client takes, in bytes, when it says so.
    pub frame: Option<u64>,
    /// Present when the client can resume sessions.
    pub resume: Option<ResumeRequest>,
    /// The client answers `$mark`.
    pub marks: bool,
    /// The client knows `$room` and `$at`.
    pub history: bool,
    /// The client goes to another address of the cluster when it is told one.
    pub follows: bool,
}

/// The client asks the server to keep its session for a while when the connection is lost.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResumeRequest {
    /// The session to resume; `None` asks for a new session that can be resumed later.
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

impl Read for HelloMessage {
    fn read(message: &Message) -> Result<Self, Bad> {
        let keys = ["v", "token", "agent", "limits", "resume", "ext"];
        let fields = versioned(message, &keys)?;
        let token = client_token(fields.str("token")?)?;
        let agent = fields.str("agent")?;
        let resume = match fields.opt_map("resume")? {
            Some(resume) => Some(resume_request(&resume)?),
            None => None,
        };
        let ext = ext(&fields)?;
        let frame = match fields.opt_map("limits")? {
            Some(limits) => {
                limits.only(&["frame", "channels"])?;
                limits.opt_u64("channels")?;
                limits.opt_u64("frame")?
            }
            None => None,
        };
        // The value 0 means the same as no value.
        let frame = frame.filter(|frame| *frame > 0);
        frame.map_or(Ok(()), check_frame)?;
        Ok(Self {
            token,
            agent: printable_within(agent, 128),
            frame,
            resume,
            marks: ext.mark,
            history: ext.history,
            follows: ext.address,
        })
    }
}

/// What the sender offers, or agrees to, of the extensions that this side knows.
fn ext(fields: &Fields<'_>) -> Result<Ext, Bad> {
    let ext = fields.opt_map("ext")?;
    let has = |key| {
        let value = ext.as_ref().map(|ext| ext.opt_bool(key));
        matches!(value, Some(Ok(Some(true))))
    };
    Ok(Ext {
        mark: has("mark"),
        history: has("history"),
        address: has("address"),
    })
}

/// The extensions that this side knows.
#[derive(Clone, Copy, Serialize)]
struct Ext {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    mark: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    history: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    address: bool,
}

fn resume_request(resume: &Fields<'_>) -> Result<ResumeRequest, Bad> {
    resume.only(&["session", "token"])?;
    let session = match (resume.opt_str("session")?, resume.opt_bin("token")?) {
        (None, None) => None,
        (Some(session), Some(_)) => Some(ResumeTicket {
            session: session_id(session)?,
            token: resume_token(resume)?,
        }),
        _ => return Err("resume has a session and its token, or neither".into()),
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
    follows: bool,
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
    frame(
        ProtocolEvent::Hello,
        &HelloFields {
            v: VERSION,
            token,
            agent: cut(agent, 128),
            limits,
            resume,
            ext: Ext {
                mark: true,
                history: true,
                address: follows,
            },
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
    /// Whether the server resumed the session that the client asked for.
    pub resumed: bool,
    /// Present when this session can be resumed.
    pub resume: Option<ResumeGrant>,
    /// Why the session that the client asked for was not resumed: `"unknown"`, `"expired"`, `"identity"` or `"off"`.
    /// Cut and escaped.
    pub reason: Option<String>,
    /// How long the client's token remains valid; `None` if it does not expire.
    pub expires: Option<Duration>,
    /// Whether the server may send `$mark`, as the client offered.
    pub marks: bool,
    /// The server may send `$room` and `$at`, and the client `since` in `$open`, as the client offered.
    pub history: bool,
}

/// What a client needs to resume a session later. `Debug` leaves the token out.
#[derive(Clone, PartialEq, Eq)]
pub struct ResumeGrant {
    /// The secret for one resumption; every `$welcome` brings a new one.
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

impl Read for Welcome {
    fn read(message: &Message) -> Result<Self, Bad> {
        let keys = [
            "v",
            "session",
            "agent",
            "limits",
            "resumed",
            "resume",
            "reason",
            "expires_ms",
            "ext",
        ];
        let fields = versioned(message, &keys)?;
        let session = session_id(fields.str("session")?)?;
        let agent = fields.str("agent")?;
        let resumed = fields.opt_bool("resumed")?.unwrap_or(false);
        let resume = match fields.opt_map("resume")? {
            Some(resume) => {
                resume.only(&["token", "window_ms"])?;
                Some(ResumeGrant {
                    token: resume_token(&resume)?,
                    window: Duration::from_millis(resume.u64("window_ms")?),
                })
            }
            None => None,
        };
        let reason = fields.opt_str("reason")?;
        check(
            !resumed || reason.is_none(),
            "a resumed session has no reason why not",
        )?;
        let expires = fields.opt_u64("expires_ms")?;
        let ext = ext(&fields)?;
        let limits = fields.map("limits")?;
        let frame = limits.u64("frame")?;
        check_frame(frame)?;
        Ok(Self {
            session,
            agent: printable_within(agent, 128),
            frame,
            channels: limits.u64("channels")?,
            resumed,
            resume,
            reason: reason.map(|reason| printable_within(reason, 128)),
            expires: expires.map(Duration::from_millis),
            marks: ext.mark,
            history: ext.history,
        })
    }
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
        ext: (welcome.marks || welcome.history).then_some(Ext {
            mark: welcome.marks,
            history: welcome.history,
            address: false,
        }),
    };
    frame(ProtocolEvent::Welcome, &fields, None)
}

/// The first message on a channel's stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// The opener's number for the channel.
    pub id: u64,
    /// The name that chooses the handler.
    pub name: String,
    /// Data of the opener's application, as msgpack.
    pub meta: Option<Bytes>,
    /// Which channels go first when there is more to send than the path takes.
    pub priority: Priority,
    /// Whether the channel continues when its connection is lost.
    pub resumable: bool,
    /// How many frames the opener has received on the channel. Present when the channel continues from an earlier
    /// connection.
    pub received: Option<u64>,
    /// How far the opener had come in rooms that it will be in again.
    pub since: Vec<RoomPosition>,
}

impl Read for Open {
    fn read(message: &Message) -> Result<Self, Bad> {
        let keys = [
            "id",
            "name",
            "meta",
            "priority",
            "resumable",
            "received",
            "since",
        ];
        let fields = map(message, &keys)?;
        let id = fields.u64("id")?;
        let name = fields.str("name")?;
        check(
            check_name(name).is_ok() && !name.starts_with('$'),
            "a channel name is 1 to 128 bytes without control characters and does not start with $",
        )?;
        let meta = fields.raw("meta").map(Bytes::copy_from_slice);
        let priority = match fields.opt_u64("priority")? {
            Some(priority) => {
                Priority::try_from(priority).map_err(|_| Bad::Rule("a priority is 0, 1 or 2"))?
            }
            None => Priority::default(),
        };
        let resumable = fields.opt_bool("resumable")?.unwrap_or(false);
        let received = fields.opt_u64("received")?;
        check(
            received.is_none() || resumable,
            "only a resumable channel can go on",
        )?;
        let since = match fields.opt_array("since")? {
            Some(places) => positions(places)?,
            None => Vec::new(),
        };
        Ok(Self {
            id,
            name: name.to_owned(),
            meta,
            priority,
            resumable,
            received,
            since,
        })
    }
}

fn positions(mut places: Values<'_>) -> Result<Vec<RoomPosition>, Bad> {
    check(
        places.remaining() <= MOST_POSITIONS,
        "at most 256 rooms are joined again",
    )?;
    let mut since = Vec::with_capacity(places.remaining());
    while places.remaining() > 0 {
        since.push(RoomPosition::read(&places.next_map()?)?);
    }
    Ok(since)
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
    #[serde(skip_serializing_if = "<[RoomPosition]>::is_empty")]
    pub since: &'a [RoomPosition],
}

pub(crate) fn encode_open<T: Serialize + ?Sized>(
    open: &OpenRequest<'_, T>,
    limit: usize,
) -> Result<Bytes, EncodeError> {
    frame_within(ProtocolEvent::Open, open, None, limit)
}

/// Encodes again the `$open` that a resumable channel began with, and adds the number of frames received since.
pub(crate) fn reopen(open: &Bytes, received: u64) -> Option<Bytes> {
    // The layout that `encode_open` writes: prefix, array of two, the event, and a map of fewer than 15 fields.
    let map = crate::wire::frame::PREFIX + 2 + ProtocolEvent::Open.name().len();
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

/// Lists the resumable channels that the sender still has. Both sides send it first on a connection that resumed the
/// session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Channels {
    /// The ids of the channels that the sender opened.
    pub open: Vec<u64>,
}

impl Read for Channels {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = map(message, &["open"])?;
        let mut values = fields.array("open")?;
        let mut open = Vec::new();
        while values.remaining() > 0 {
            open.push(values.next_u64()?);
        }
        Ok(Self { open })
    }
}

/// The acceptor's answer to an `$open` with `received`: its first frame on the new stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Resumed {
    /// How many frames the acceptor has received on this channel.
    pub received: u64,
    /// Whether the channel has ended at the acceptor, so that it sends nothing more.
    pub done: bool,
}

impl Read for Resumed {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = map(message, &["received", "done"])?;
        Ok(Self {
            received: fields.u64("received")?,
            done: fields.bool("done")?,
        })
    }
}

/// Confirms frames of one channel, which the other side may then discard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Ack {
    /// The channel's id.
    pub channel: u64,
    /// The sender of this message opened the channel.
    pub own: bool,
    /// How many frames the sender of this message has received on the channel, or [`REFUSED`](Self::REFUSED).
    pub received: u64,
}

impl Ack {
    /// The sender of this message accepts no more frames of the channel; the other side need not keep or repeat any.
    pub const REFUSED: u64 = u64::MAX;
}

impl Read for Ack {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = map(message, &["channel", "own", "received"])?;
        Ok(Self {
            channel: fields.u64("channel")?,
            own: fields.bool("own")?,
            received: fields.u64("received")?,
        })
    }
}

/// Reports how far the program that reads a channel has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Passed {
    /// The channel's id.
    pub channel: u64,
    /// The sender of this message opened the channel.
    pub own: bool,
    /// The last `$mark` that the program has reached.
    pub mark: u64,
}

impl Read for Passed {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = map(message, &["channel", "own", "mark"])?;
        Ok(Self {
            channel: fields.u64("channel")?,
            own: fields.bool("own")?,
            mark: fields.u64("mark")?,
        })
    }
}

/// Marks a place in a channel's messages. The receiver answers with [`Passed`] when its program has read up to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Mark(pub u64);

impl Read for Mark {
    fn read(message: &Message) -> Result<Self, Bad> {
        check(message.id().is_none(), "takes no id")?;
        match Reader::new(&message.raw()).head() {
            Ok(Head::Uint(mark)) => Ok(Self(mark)),
            _ => Err("is a number from 0 to 2^64 - 1".into()),
        }
    }
}

/// A new token that replaces the client's earlier one. `Debug` leaves it out.
#[derive(Clone, PartialEq, Eq, Serialize)]
pub struct Refresh {
    /// The new token.
    pub token: String,
}

impl std::fmt::Debug for Refresh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refresh").finish_non_exhaustive()
    }
}

impl Read for Refresh {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = map(message, &["token"])?;
        let token = client_token(fields.str("token")?)?;
        Ok(Self { token })
    }
}

/// The server's answer to a `$refresh`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refreshed {
    /// The new token is valid from now on.
    Accepted {
        /// How long the new token remains valid; `None` if it does not expire.
        expires: Option<Duration>,
    },
    /// The new token was not accepted; the earlier one remains valid.
    Refused {
        /// Why.
        code: CloseCode,
        /// Why, for people; cut and escaped.
        text: String,
    },
}

impl Read for Refreshed {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = map(message, &["expires_ms", "code", "text"])?;
        let expires = fields.opt_u64("expires_ms")?;
        match (expires, fields.opt_u64("code")?, fields.opt_str("text")?) {
            (expires, None, None) => Ok(Self::Accepted {
                expires: expires.map(Duration::from_millis),
            }),
            (None, Some(code), Some(text)) => Ok(Self::Refused {
                code: CloseCode::new(code),
                text: printable_within(text, 256),
            }),
            _ => Err("a refusal is a code and a text, and nothing else".into()),
        }
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
    frame(ProtocolEvent::Refreshed, &fields, None).ok()
}

impl Read for CloseReason {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = map(message, &["code", "text"])?;
        let code = CloseCode::new(fields.u64("code")?);
        Ok(Self::peer(code, fields.str("text")?))
    }
}

#[derive(Serialize)]
struct CloseFields<'a> {
    code: u64,
    text: &'a str,
}

pub(crate) fn encode_close(code: CloseCode, text: &str) -> Option<Bytes> {
    let (code, text) = (code.value(), cut(text, 256));
    frame(ProtocolEvent::Close, &CloseFields { code, text }, None).ok()
}

/// The server announces its shutdown: clients finish their work and reconnect later or to another server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoAway {
    /// Why.
    pub code: CloseCode,
    /// Why, for people.
    pub text: String,
    /// The shortest time to wait before reconnecting.
    pub retry_after: Duration,
    /// The time over which clients spread their reconnecting.
    pub window: Duration,
    /// Where to connect next, as `HOST:PORT`, if the server names another node of its cluster. Cut and escaped. It is a place and
    /// no proof: whoever is there shows the same key or name as this server, or is one that the client knows itself.
    pub address: Option<String>,
}

/// Most bytes of an address of a node.
pub(crate) const ADDRESS_BYTES: usize = 256;

impl Read for GoAway {
    fn read(message: &Message) -> Result<Self, Bad> {
        let keys = ["code", "text", "retry_after_ms", "window_ms", "address"];
        let fields = map(message, &keys)?;
        let address = fields.opt_str("address")?;
        Ok(Self {
            code: CloseCode::new(fields.u64("code")?),
            text: printable_within(fields.str("text")?, 256),
            retry_after: Duration::from_millis(fields.u64("retry_after_ms")?),
            window: Duration::from_millis(fields.u64("window_ms")?),
            address: address.map(|address| printable_within(address, ADDRESS_BYTES)),
        })
    }
}

#[derive(Serialize)]
struct GoAwayFields<'a> {
    code: u64,
    text: &'a str,
    retry_after_ms: u64,
    window_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<&'a str>,
}

pub(crate) fn encode_goaway(goaway: &GoAway) -> Option<Bytes> {
    let fields = GoAwayFields {
        code: goaway.code.value(),
        text: cut(&goaway.text, 256),
        retry_after_ms: millis(goaway.retry_after),
        window_ms: millis(goaway.window),
        address: goaway.address.as_deref(),
    };
    frame(ProtocolEvent::GoAway, &fields, None).ok()
}

/// The most bytes that the message of a fault may have.
const FAULT_MESSAGE: usize = 1024;

/// Decodes code and message strictly; keeps `data` encoded, and ignores unknown keys.
impl Read for Fault {
    fn read(message: &Message) -> Result<Self, Bad> {
        let fields = message.fields()?;
        let code = fields.str("code")?;
        check(
            check_name(code).is_ok(),
            "a code is 1 to 128 bytes without control characters",
        )?;
        let text = fields.str("message")?;
        check(
            text.len() <= FAULT_MESSAGE,
            "a message is at most 1,024 bytes",
        )?;
        let mut fault = Self::new(
            printable_within(code, message::MAX_NAME),
            printable_within(text, FAULT_MESSAGE),
        );
        fault.data = fields.raw("data").map(Bytes::copy_from_slice);
        Ok(fault)
    }
}

/// Encodes a `$fault` for request `id`; leaves `data` out if the frame would be too large for the peer.
pub(crate) fn encode_fault(fault: &Fault, id: u64, limit: usize) -> Option<Bytes> {
    let text = cut(&fault.message, FAULT_MESSAGE);
    // The peer would close the channel over a code that breaks the rule.
    let code = match check_name(&fault.code) {
        Ok(()) => fault.code.as_str(),
        Err(error) => {
            tracing::warn!(code = %printable_within(&fault.code, 64), %error, "a fault's code is none; sent as internal");
            Fault::INTERNAL
        }
    };
    let mut map = Vec::new();
    // Writing to a vector cannot fail.
    let _ = rmp::encode::write_map_len(&mut map, 2);
    for (key, value) in [("code", code), ("message", text)] {
        let _ = rmp::encode::write_str(&mut map, key);
        let _ = rmp::encode::write_str(&mut map, value);
    }
    let plain = |map: &[u8]| message::encode_raw(ProtocolEvent::Fault.name(), map, id, limit).ok();
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

/// Encodes a message into one whole frame.
pub(crate) fn encode<T: Named + Serialize>(message: &T) -> Option<Bytes> {
    frame(T::EVENT, message, None).ok()
}

/// One whole frame with a protocol message in it.
pub(crate) fn frame<T: Serialize + ?Sized>(
    event: ProtocolEvent,
    data: &T,
    id: Option<u64>,
) -> Result<Bytes, EncodeError> {
    frame_within(event, data, id, usize::MAX >> 1)
}

fn frame_within<T: Serialize + ?Sized>(
    event: ProtocolEvent,
    data: &T,
    id: Option<u64>,
    limit: usize,
) -> Result<Bytes, EncodeError> {
    let mut buf = BytesMut::new();
    message::encode(&mut buf, event.name(), data, id, limit)?;
    Ok(buf.freeze())
}

#[cfg(test)]
mod tests;
