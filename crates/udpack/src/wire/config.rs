//! Every bound and every deadline, with its default and the reason for it.
//!
//! [`Limits`] bounds amounts, [`Timeouts`] bounds times. Each side enforces its own; the server announces some of its
//! own in `$welcome`.

use std::time::Duration;

use serde::Serialize;

/// How much of each resource a peer may use. All bounds are enforced. At some the sender waits; a breach of the others
/// has a close code.
///
/// Start from `Limits::default()` and change what you must:
/// `Limits { channels: 8, ..Limits::default() }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Largest frame, in bytes without its 4-byte prefix; at least 4,096. Default 1 MiB + 64 KiB: a 1 MiB chunk and its
    /// header.
    pub frame: usize,
    /// Channels open at once on one socket, counted for each opener. Default 64. quinn keeps state for each
    /// permitted stream, so a peer may open a few at first, and all of them once it has opened 3.
    pub channels: u32,
    /// Sockets in all. Default 4,096.
    pub sockets: usize,
    /// Sockets from one address (IPv4 address or IPv6 /64). Default 64. If that is fewer than `sockets`, up to a
    /// quarter of `sockets` is reserved for the first socket of each address.
    pub sockets_per_address: usize,
    /// Handshakes and unauthenticated peers at once. Default 256; more are refused. From 4 on, one address
    /// may hold half of them, and the other half is reserved for the first few of each address: a 64th of all, at least
    /// one.
    pub handshakes: usize,
    /// Handshakes of one address that lead to no session, each second, with a burst of eight times as many. Further ones
    /// of that address wait for their turn. One whose token is accepted does not count. Default 32.
    pub handshake_rate: u32,
    /// From this many concurrent handshakes on, QUIC must validate a new address with a Retry first. Default 64;
    /// 0 always requires it.
    pub retry_from: usize,
    /// Channels a peer may open each second, with a burst of twice as many. Default 100.
    pub channel_rate: u32,
    /// Bytes queued for sending on one channel before `send` waits. Default 1 MiB.
    pub outbound_bytes: usize,
    /// Messages queued for sending on one channel before `send` waits. Default 1,024.
    pub outbound_messages: usize,
    /// Bytes of a resumable channel that the peer has not confirmed, sent or not, before `send` waits. Default
    /// 4 MiB: it bounds what one round trip can carry.
    pub replay_bytes: usize,
    /// Messages of a resumable channel that the peer has not confirmed before `send` waits. Default 65,536.
    /// The peer collects confirmations for 5 ms. With 16,384 messages, the former default, a channel was so limited to
    /// 2.0 million small messages a second, half of the rate of a channel that is not resumable.
    pub replay_messages: usize,
    /// Bytes that all resumable channels of a session together may keep before `send` waits; while there is a
    /// connection, each of them may keep 64 KiB in any case. Default 16 MiB.
    pub resume_bytes: usize,
    /// Detached sessions that a server keeps. Default 1,024; a session beyond that ends when its connection is lost.
    pub detached_sockets: usize,
    /// Messages that may wait unread while a request on the same channel waits for its reply. Default 1,024.
    pub backlog_messages: usize,
    /// Bytes of these messages. Default 1 MiB.
    pub backlog_bytes: usize,
    /// Rooms of one server. Default 65,536.
    pub rooms: usize,
    /// Rooms one channel may be in. Default 64.
    pub rooms_per_channel: usize,
    /// Bytes that the histories of all rooms of a server hold together; each message counts 96 bytes more. Default
    /// 64 MiB. Beyond that the oldest messages are dropped first, whichever room they belong to.
    pub history_bytes: usize,
    /// QUIC flow-control window of one stream, in bytes. Default 8 MiB: 1 Gbit/s at 64 ms. It is smaller than
    /// `connection_window`, so that one channel that nobody reads leaves room for the others. If the reader is too
    /// slow, quinn buffers a full window and uses about three times its size in memory.
    pub stream_window: u32,
    /// Largest QUIC flow-control window of one admitted connection, in bytes. Default 24 MiB: three stream windows. The
    /// window starts at 12 MiB or less. It doubles when the program reads a quarter of it within one round trip, and
    /// grows when more than half of it is unread.
    pub connection_window: u32,
    /// Bytes that quinn may hold unacknowledged for sending, for each connection. Default 16 MiB.
    pub send_window: u64,
    /// Received bytes that a server holds before its program reads them, over all connections. Default 512 MiB. Half of
    /// it is for the initial connection windows: each is an equal share for the number of sockets rounded up to a power
    /// of two, but at least 64 KiB. Windows grow into another quarter. The last quarter, at least four times `frame`,
    /// holds frames of 64 KiB and more that have arrived in part: room for the whole frame is reserved before more of
    /// it is read. Half of that room is reserved for one frame of each token. A channel that finds no room waits.
    pub receive_budget: u64,
    /// From this many wrong tokens on, an address is slowed down: all its tokens, even valid ones, are then verified
    /// one by one, [`Timeouts::auth_pause`] apart. A wrong token is forgotten after 5 s. Default 3.
    pub auth_failures: u32,
    /// Pairs of event and key for which a socket keeps the newest volatile message, in each direction. Default 1,024.
    pub volatile_keys: usize,
    /// Bytes of these messages in each direction; also the size limit of one message. Default 1 MiB.
    pub volatile_bytes: usize,
    /// Kernel buffer requested for each UDP socket, in bytes, for each direction. Default 8 MiB.
    pub socket_buffer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frame: (1 << 20) + (64 << 10),
            channels: 64,
            sockets: 4096,
            sockets_per_address: 64,
            handshakes: 256,
            handshake_rate: 32,
            retry_from: 64,
            channel_rate: 100,
            outbound_bytes: 1 << 20,
            outbound_messages: 1024,
            replay_bytes: 4 << 20,
            replay_messages: 65_536,
            resume_bytes: 16 << 20,
            detached_sockets: 1024,
            backlog_messages: 1024,
            backlog_bytes: 1 << 20,
            rooms: 65_536,
            rooms_per_channel: 64,
            history_bytes: 64 << 20,
            stream_window: 8 << 20,
            connection_window: 24 << 20,
            send_window: 16 << 20,
            receive_budget: 512 << 20,
            auth_failures: 3,
            volatile_keys: 1024,
            volatile_bytes: 1 << 20,
            socket_buffer: 8 << 20,
        }
    }
}

/// How long each step may take. The time-outs of what a peer must send or read (`auth`, `frame`, `slow_peer`, `close`)
/// are extended by 4 round trips as QUIC measures them, by 60 s at most. The `handshake` of a client over QUIC is
/// extended by 4 times the time until the server's first packet, by 60 s at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// QUIC handshake. Default 10 s (quinn itself has none).
    pub handshake: Duration,
    /// From the end of the handshake to a verified `$hello`. Default 5 s; a client has one try. The time during which
    /// the server delays an address with wrong tokens does not count. A client that resumes waits three times as long.
    pub auth: Duration,
    /// The shortest time until a failed authentication is answered, so that the time does not reveal the cause, and a
    /// client that tries again at once costs few handshakes. Default 100 ms.
    pub auth_failure: Duration,
    /// The pause between the verification of two tokens of an address that has sent too many wrong ones. Default 1 s.
    /// Four tokens may wait; further ones are refused.
    pub auth_pause: Duration,
    /// In each period of this length an unfinished frame must be completed or receive at least 1 KiB for each second.
    /// Half periods in which QUIC waited for an acknowledgement do not count. Default 30 s. A new stream must bring its
    /// `$open` within this time, and a volatile message on a stream of its own must grow as fast as a frame; for these
    /// two there is neither an extension nor an exception.
    pub frame: Duration,
    /// A channel is closed when the peer is alive but reads nothing from it for this long while messages are queued.
    /// Quarter periods in which QUIC waited for an acknowledgement do not count: the idle timer handles a silent
    /// path. Default 10 s.
    pub slow_peer: Duration,
    /// The connection is lost when no packet arrives from the peer for this long; of two different settings the shorter
    /// one applies to both sides. The timer restarts with the first packet that is sent after the last one that
    /// arrived, so a dead peer is detected after `idle` to `idle` + `keep_alive`. A shorter silence has no effect.
    /// Default 30 s.
    pub idle: Duration,
    /// When no packet arrives from the peer for this long, QUIC sends a packet that the peer must acknowledge. It must
    /// be below `idle`, and should be well below. An idle socket sends and receives one packet in this time. A peer
    /// that has gone is reported as [`SocketState::Silent`] after at most this time plus 5 s and 4 round trips. Half of
    /// this time would cost twice as many packets, and battery on a mobile. Default 10 s.
    ///
    /// [`SocketState::Silent`]: crate::SocketState::Silent
    pub keep_alive: Duration,
    /// How long a server keeps a session whose connection is lost, if its client asked for that. Default 60 s; with 0
    /// it keeps none.
    pub resume: Duration,
    /// A graceful close waits this long for queued messages to be sent and for the peer to close, too. Default 5 s.
    pub close: Duration,
    /// The deadline of a request that sets none, unless it has a stream of items. It also bounds the wait for a channel
    /// to open, for a token of the application, and for the answer to a refresh. Default 30 s.
    pub request: Duration,
    /// A request handler must answer within this time. It begins anew with each item of the request's stream that the
    /// handler takes, and does not apply to the items of an answer. Default 30 s.
    pub handler: Duration,
    /// The interval at which a server asks its verifier again about each admitted peer. Default 30 s.
    pub recheck: Duration,
    /// After a session is resumed, presence that was tracked on a channel which ended with the old connection must be
    /// tracked again within this time. Otherwise its entry is removed. Default 10 s.
    pub presence: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            auth: Duration::from_secs(5),
            auth_failure: Duration::from_millis(100),
            auth_pause: Duration::from_secs(1),
            frame: Duration::from_secs(30),
            slow_peer: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
            resume: Duration::from_secs(60),
            close: Duration::from_secs(5),
            request: Duration::from_secs(30),
            handler: Duration::from_secs(30),
            recheck: Duration::from_secs(30),
            presence: Duration::from_secs(10),
        }
    }
}

/// Which channels of a socket go first when there is more to send than the path takes; both directions.
///
/// Priorities are strict: while a channel of higher priority has something to send, lower ones wait. They apply to
/// sending only and do not change the order in which the peer's program reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
#[serde(into = "u64")]
pub enum Priority {
    /// After all others: files, archives. The bytes in flight of such channels are limited, so that they do not delay
    /// the others.
    Bulk,
    /// As the others.
    #[default]
    Normal,
    /// Before all others: what a user waits for.
    High,
}

impl Priority {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde asks")]
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// quinn's priority number; the control stream has a higher one than all channels.
    pub(crate) fn quic(self) -> i32 {
        match self {
            Self::Bulk => -1,
            Self::Normal => 0,
            Self::High => 1,
        }
    }
}

impl From<Priority> for u64 {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Bulk => 0,
            Priority::Normal => 1,
            Priority::High => 2,
        }
    }
}

impl TryFrom<u64> for Priority {
    type Error = InvalidSetting;

    fn try_from(value: u64) -> Result<Self, InvalidSetting> {
        match value {
            0 => Ok(Self::Bulk),
            1 => Ok(Self::Normal),
            2 => Ok(Self::High),
            _ => Err(InvalidSetting("a priority is 0, 1 or 2")),
        }
    }
}

/// The congestion controller of this side's sending direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CongestionControl {
    /// This library's own controller. Like BBR it models the path: random loss does not slow it down, and it keeps its
    /// queue short. It shares a link with CUBIC flows as they share it with each other.
    #[default]
    Auto,
    /// CUBIC (RFC 9438): fair, but slow on links that lose packets at random.
    Cubic,
    /// quinn's BBR, which is experimental: fast on lossy links, but it sends far more than the link can carry.
    Bbr,
    /// NewReno (RFC 9002, section 7).
    NewReno,
}

/// How a server shuts down: see `Server::run_until`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    pub(crate) within: Duration,
    pub(crate) spread: Duration,
}

impl Drain {
    /// Refuses new sockets and channels, lets running channels finish for at most `within`, then closes. Clients that
    /// reconnect by themselves are asked to leave one after the other during the first half of that time.
    pub fn within(within: Duration) -> Self {
        Self {
            within,
            spread: within / 2,
        }
    }

    /// Asks the clients to leave one by one over this time, so that they do not all reach their next servers at once.
    #[must_use]
    pub fn spread(mut self, spread: Duration) -> Self {
        self.spread = spread;
        self
    }
}

impl Default for Drain {
    /// 10 seconds.
    fn default() -> Self {
        Self::within(Duration::from_secs(10))
    }
}

/// The smallest frame limit that either side may have: every message of the protocol fits.
pub(crate) const MIN_FRAME: usize = 4096;
/// Bytes an unauthenticated peer may send in all (also its largest frame).
pub(crate) const PREAUTH_BYTES: u32 = 16 << 10;
/// Streams an unauthenticated peer may open: control, and a few channels pipelined behind it.
pub(crate) const PREAUTH_STREAMS: u32 = 4;
/// Streams an admitted peer may open until it has opened [`USED_STREAMS`]. quinn keeps 41 bytes in tables for each
/// permitted stream, in powers of two: these and a unidirectional one fit in the smallest table, 0.4 kB instead of
/// 5.1 kB for 65 streams.
pub(crate) const FEW_STREAMS: u32 = 6;
/// A peer that has opened this many streams on a connection is permitted to open all. The remaining few streams last
/// for the round trip until the peer learns of it.
pub(crate) const USED_STREAMS: u32 = 3;
/// Unidirectional streams an admitted peer may have open: volatile messages that are too large for a datagram.
pub(crate) const VOLATILE_STREAMS: u32 = 1;
/// Bytes of datagrams that may wait in QUIC to be read; the driver reads them at once.
pub(crate) const DATAGRAMS_IN: usize = 64 << 10;
/// Bytes of datagrams that may wait in QUIC to be sent. The number is small because a message that waits before QUIC
/// can still be replaced by a newer one.
pub(crate) const DATAGRAMS_OUT: usize = 16 << 10;
/// Longest token, in bytes.
pub(crate) const TOKEN_BYTES: usize = 512;
/// Smallest connection window of an admitted socket.
pub(crate) const MIN_WINDOW: u64 = 64 << 10;
/// Slowest acceptable progress of an unfinished frame, in bytes a second.
pub(crate) const MIN_FRAME_RATE: u64 = 1024;

/// A setting that cannot be used; the text says which and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid setting: {0}")]
pub struct InvalidSetting(pub(crate) &'static str);
