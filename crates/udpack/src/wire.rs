//! The pieces of the wire format, for programs that look at it from outside: proxies, test tools, fuzzers.
//!
//! Pure functions over bytes, and the limits that they enforce; see `docs/PROTOCOL.md`. This floor uses neither tokio
//! nor QUIC.

pub(crate) mod code;
pub(crate) mod config;
pub(crate) mod control;
pub(crate) mod event;
pub(crate) mod frame;
pub(crate) mod message;
pub(crate) mod msgpack;

pub use control::{
    Ack, At, Channels, ControlError, Decode, HelloMessage, Mark, Open, Passed, Refresh, Refreshed,
    ResumeGrant, ResumeRequest, ResumeTicket, Resumed, RoomAt, Welcome,
};
pub use frame::{FrameDecoder, FrameError, PREFIX};
pub use message::{Message, MessageError};
pub use msgpack::{MAX_DEPTH, MAX_ELEMENTS, MsgpackError, validate};
