//! Reliable UDP sessions with msgpack event channels, over QUIC.
//!
//! A QUIC connection is a [`Socket`], a bidirectional QUIC stream is a [`Channel`] that carries msgpack
//! `[event, data]` messages. A [`Server`] lets in clients whose token its verifier accepts; a [`Client`]
//! trusts a server by its pinned public key or by the platform's CAs.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use udpack::{Channel, Client, Context, Fault, Identity, Server, TokenFile};
//!
//! let tokens = TokenFile::load_or_create("keys/token")?;
//! let token = tokens.first_token().ok_or("no plain token in the file")?;
//! let server = Server::builder()
//!     .identity(Identity::load_or_create("keys")?)
//!     .auth(tokens)
//!     .channel("math", |channel: Channel| async move {
//!         channel.on("double", |n: u64, _: Context| async move { Ok::<_, Fault>(n * 2) }).run().await
//!     })
//!     .bind("127.0.0.1:0")
//!     .await?;
//!
//! let socket = Client::builder()
//!     .pin(server.fingerprint())
//!     .token(token)
//!     .connect(&server.local_addr().to_string())
//!     .await?;
//! let math = socket.open("math").await?;
//! let doubled: u64 = math.request("double", &21).await?;
//! # Ok(()) }
//! ```
//!
//! Every async method says what dropping its future does. The wire is in `docs/PROTOCOL.md`; every bound is in
//! [`Limits`], every deadline in [`Timeouts`].
#![warn(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod auth;
mod calls;
mod channel;
mod client;
mod code;
mod config;
mod control;
mod endpoint;
mod event;
mod extensions;
pub mod extract;
mod fingerprint;
mod frame;
mod handlers;
mod identity;
mod inbox;
mod items;
mod lifetime;
mod message;
mod metrics;
mod msgpack;
mod open;
mod outbox;
mod overflow;
mod presence;
mod qlog;
mod quiet;
mod reconnect;
mod request;
mod resume;
mod rooms;
mod router;
mod secret_file;
mod server;
mod session;
mod socket;
mod speed;
#[cfg(feature = "testing")]
pub mod testing;
mod tls;
mod tokens;
mod turns;
mod url;
mod volatile;

pub use auth::{Authenticate, Deny, Hello, Peer};
pub use channel::{Channel, Closed, RecvError, SendError};
pub use client::{Client, ClientBuilder, ConnectError};
pub use code::{CloseCode, CloseReason, Fault, Side};
pub use config::{CongestionControl, Drain, Limits, Priority, Timeouts};
pub use control::{Gap, GoAway};
pub use endpoint::InvalidSetting;
pub use event::Event;
pub use extensions::Extensions;
pub use extract::{ByData, ByExtract, Data, EventHandler, Extract, FromMessage, Handler};
pub use fingerprint::{Fingerprint, FingerprintError};
pub use handlers::{Answer, Context, Handlers, IntoAnswer};
pub use identity::{Identity, IdentityError};
pub use items::{Items, Streaming};
pub use lifetime::RefreshError;
pub use message::{DecodeError, EncodeError, Encoded, Message, NameError};
pub use metrics::{Ends, Metrics};
pub use msgpack::{FieldError, Fields, Values};
pub use open::{OpenChannel, OpenError};
pub use overflow::Overflow;
pub use presence::{PresenceDiff, PresenceEntry, PresenceMap, TrackError};
pub use reconnect::{Reconnect, State, States};
pub use request::{Request, RequestError};
pub use rooms::{Broadcast, JoinError, Member, Rooms, Sent};
pub use router::{ByFunction, ByRouter, Next, Router, ServeChannel, Service};
pub use secret_file::SecretFileError;
pub use server::{BindError, Server, ServerBuilder, ServerError};
pub use session::SessionId;
pub use socket::{IntoOutcome, Socket};
pub use speed::{Speed, SpeedMeter, Stats};
pub use tokens::{NewToken, TokenEntry, TokenFile, TokenFileError, TokenLineError, generate_token};
#[cfg(feature = "derive")]
pub use udpack_derive::Event;
pub use url::{ConnectUrl, ConnectUrlError, DEFAULT_PORT};
pub use volatile::{Volatile, VolatileError};

/// What the derive macro's code names; not for anyone else.
#[doc(hidden)]
pub mod __private {
    pub use serde::Serialize;
    pub use serde::de::DeserializeOwned;
}

/// The pieces of the wire format, for programs that look at it from outside: proxies, test tools, fuzzers.
///
/// Pure functions over bytes; see `docs/PROTOCOL.md`.
pub mod wire {
    pub use crate::control::{
        Ack, Channels, ControlError, HelloMessage, Open, Refresh, Refreshed, ResumeGrant,
        ResumeRequest, ResumeTicket, Resumed, Welcome, decode_ack, decode_channels, decode_close,
        decode_gap, decode_goaway, decode_hello, decode_open, decode_refresh, decode_refreshed,
        decode_resume, decode_welcome,
    };
    pub use crate::frame::{FrameDecoder, FrameError, PREFIX};
    pub use crate::message::{Message, MessageError};
    pub use crate::msgpack::{MAX_DEPTH, MAX_ELEMENTS, MsgpackError, validate};
}

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
