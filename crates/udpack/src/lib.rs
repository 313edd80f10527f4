//! Reliable UDP sessions with msgpack event channels, over QUIC.
//!
//! A [`Socket`] is a session with one peer: a QUIC connection and, where both sides resume, those that follow it.
//! A [`Channel`] of it is a bidirectional stream of msgpack `[event, data]` messages. A [`Server`] lets in clients
//! whose token its verifier accepts; a [`Client`] trusts a server by its pinned public key or by the platform's
//! CAs.
//!
//! | for | see |
//! | --- | --- |
//! | serving and draining | [`Server`], [`ServerBuilder`], [`Drain`] |
//! | authentication, token expiry, authorization of channels | [`Authenticate`], [`TokenFile`], [`Peer`], [`ServerBuilder::authorize`] |
//! | connecting and reconnecting | [`Client`], [`Reconnect`], [`Socket::states`] |
//! | messages | [`Channel`], [`Message`], [`Event`], [`Priority`] |
//! | handlers | [`Router`], [`Extract`], [`Context`] |
//! | requests and replies, streams of items | [`Request`], [`Items`], [`Streaming`], [`Fault`] |
//! | rooms and presence | [`Rooms`], [`Overflow`], [`Gap`], [`History`], [`Subscription`], [`PresenceMap`] |
//! | volatile messages | [`Socket::send_volatile`], [`Volatile`] |
//! | close codes and reasons | [`CloseReason`], [`CloseCode`] |
//! | dividing resources among peers | [`Pool`], [`Tenant`] |
//! | counters, rates, qlog | [`Metrics`], [`SpeedMeter`], [`ServerBuilder::qlog`] |
//!
//! A server and a client:
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use udpack::{Client, Context, Fault, Identity, Router, Server, TokenFile};
//!
//! let tokens = TokenFile::load_or_create("keys/token")?;
//! let token = tokens.first_token().ok_or("no plain token in the file")?;
//! let math = Router::new().on("double", |n: u64, _: Context| async move { Ok::<_, Fault>(n * 2) });
//! let server = Server::builder()
//!     .identity(Identity::load_or_create("keys")?)
//!     .auth(tokens)
//!     .channel("math", math)
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
//! Typed events and requests; messages received without a router:
//!
//! ```no_run
//! # use serde::{Deserialize, Serialize};
//! # use udpack::{Channel, Event};
//! #[derive(Serialize, Deserialize, Event)]
//! #[event(reply = u64)]
//! struct Say {
//!     text: String,
//! }
//!
//! # async fn run(channel: Channel) -> Result<(), Box<dyn std::error::Error>> {
//! let text = "hello".to_owned();
//! channel.emit(&Say { text: text.clone() }).await?;
//! let heard: u64 = channel.call(&Say { text }).await?;
//! while let Some(message) = channel.recv().await? {
//!     if message.event() == Say::NAME {
//!         println!("{}", message.data::<Say>()?.text);
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! Streams of items; the deadline travels, and dropping a request stops its handler:
//!
//! ```no_run
//! # use std::time::Duration;
//! # async fn run(channel: udpack::Channel) -> Result<(), udpack::RequestError> {
//! let mut lines = channel.request("tail", "log").timeout(Duration::from_secs(60)).items::<String>().await?;
//! while let Some(line) = lines.next().await {
//!     println!("{}", line?);
//! }
//! let numbers = futures_util::stream::iter([1_u64, 2, 3]);
//! let sum: u64 = channel.request("sum", &()).with_items(numbers).await?;
//! # Ok(()) }
//! ```
//!
//! Rooms, at a server: a message is encoded once and never waits for a slow member, which receives a gap:
//!
//! ```no_run
//! # use udpack::{Channel, Data, Fault, Rooms};
//! async fn say(Data(text): Data<String>, channel: Channel, rooms: Rooms) -> Result<u64, Fault> {
//!     channel.join("hall")?;
//!     Ok(rooms.to("hall").send("said", &text)?.delivered)
//! }
//! ```
//!
//! A channel that outlives its connection, and messages that need not arrive:
//!
//! ```no_run
//! # use udpack::{Client, ClientBuilder, Priority, Reconnect};
//! # async fn run(client: ClientBuilder) -> Result<(), Box<dyn std::error::Error>> {
//! let socket = client.reconnect(Reconnect::default()).connect("192.0.2.7").await?;
//! let orders = socket.channel("orders").resumable().priority(Priority::High).open().await?;
//! orders.send_acked("buy", &3).await?;
//! socket.send_volatile_keyed("cursor", "alice", &(120, 48))?;
//! # Ok(()) }
//! ```
//!
//! Every async method says what dropping its future does; every bound is in [`Limits`], every deadline in
//! [`Timeouts`]. `docs/GUIDE.md` is the longer introduction, `docs/PROTOCOL.md` the wire.
//!
//! # Features
//! - `derive` (on by default): `#[derive(Event)]`.
//! - `https`: `Https`, TLS over TCP for the pages that a program serves beside its server.
//! - `testing`: the module `testing`, a network in memory for tests.
//! - `bench`: for this repository's benchmarks alone.
#![warn(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod base;
#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
mod channel;
mod client;
pub mod cluster;
mod metrics;
mod serve;
mod server;
mod session;
#[cfg(feature = "testing")]
pub mod testing;
mod transport;
mod trust;
pub mod wire;

pub use base::extensions::Extensions;
pub use base::pool::{Place, Pool, PoolFull, Shares, Tenant};
pub use base::text;
pub use channel::history::History;
pub use channel::items::{Items, Streaming};
pub use channel::overflow::Overflow;
pub use channel::request::{Request, RequestError};
pub use channel::{Channel, Closed, RecvError, SendError};
pub use client::{Client, ClientBuilder, ConnectError, Handshake, TransportChoice};
pub use cluster::{Cluster, ClusterState};
pub use metrics::speed::{Speed, SpeedMeter, Stats};
pub use metrics::{Ends, Metrics};
pub use serve::asked::Asked;
pub use serve::everywhere::{Answers, ClusterMember, Whom};
pub use serve::extract::{
    ByData, ByExtract, Data, EventHandler, Extract, FromMessage, Handler, State,
};
pub use serve::handlers::{Answer, Context, Handlers, IntoAnswer};
pub use serve::history::Start;
pub use serve::node::{ClusterNode, ClusterView};
pub use serve::presence::{PresenceDiff, PresenceEntry, PresenceMap, TrackError};
pub use serve::rooms::{Broadcast, JoinError, Member, Rooms, Sent};
pub use serve::router::{ByRouter, Next, Router};
pub use server::{BindError, Server, ServerBuilder, ServerError};
pub use session::SessionId;
pub use session::lifetime::RefreshError;
pub use session::open::{OpenChannel, OpenError};
pub use session::reconnect::{
    Outage, Probes, Reconnect, SocketState, SocketStates, TransportReason,
};
pub use session::service::{ByFunction, IntoOutcome, ServeChannel, Service};
pub use session::socket::Socket;
pub use session::subscription::Subscription;
pub use session::volatile::{Volatile, VolatileError};
pub use transport::lookup::lookup;
pub use transport::probe;
pub use transport::proxy::{Proxy, ProxyError};
pub use trust::auth::{Authenticate, Deny, Hello, Peer};
pub use trust::fingerprint::{Fingerprint, FingerprintError};
#[cfg(feature = "https")]
pub use trust::https::{Https, HttpsStream};
pub use trust::identity::{Identity, IdentityError};
pub use trust::origin::{Origins, Transport, Web};
pub use trust::secret_file::SecretFileError;
pub use trust::tokens::{
    NewShare, NewToken, Share, TokenEntry, TokenFile, TokenFileError, TokenLineError,
    claimed_token, generate_token,
};
pub use trust::url::{ConnectUrl, ConnectUrlError, DEFAULT_PORT};
pub use trust::web_certificate::{WebCertificate, WebCertificateError};
#[cfg(feature = "derive")]
pub use udpack_derive::Event;
pub use wire::code::{CloseCode, CloseReason, Fault, Side};
pub use wire::config::{CongestionControl, Drain, InvalidSetting, Limits, Priority, Timeouts};
pub use wire::control::{Gap, GoAway, Missing, Position, RoomPosition, Why};
pub use wire::event::Event;
pub use wire::message::{DecodeError, EncodeError, Encoded, Message, NameError};
pub use wire::msgpack::{FieldError, Fields, Values};

/// Names for the code of the derive macro; not public API.
#[doc(hidden)]
pub mod __private {
    pub use serde::Serialize;
    pub use serde::de::DeserializeOwned;
}

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/GUIDE.md")]
struct Guide;
