//! Opening a channel: its options, and shortcuts without options.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::channel::inbox::Inbox;
use crate::channel::writer::Way;
use crate::channel::{Channel, Opened, SendError};
use crate::metrics::Count;
use crate::metrics::speed::Counters;
use crate::session::or_parent;
use crate::session::socket::Socket;
use crate::wire::code::CloseReason;
use crate::wire::config::Priority;
use crate::wire::control::{self, GoAway, MOST_POSITIONS, RoomPosition};
use crate::wire::message::EncodeError;

impl Socket {
    /// Begins to open a channel of this name: set options, then call [`open`](OpenChannel::open).
    pub fn channel<'a>(&'a self, name: &'a str) -> OpenChannel<'a> {
        OpenChannel {
            socket: self,
            name,
            meta: None,
            priority: Priority::default(),
            resumable: false,
            since: Vec::new(),
        }
    }

    /// Opens a channel of this name, of normal priority, that ends with its connection.
    ///
    /// # Errors
    /// As [`OpenChannel::open`].
    ///
    /// # Cancel safety
    /// A dropped future has opened nothing.
    pub async fn open(&self, name: &str) -> Result<Channel, OpenError> {
        self.channel(name).open().await
    }
}

/// A channel that is about to be opened; made by [`Socket::channel`]. Dropping it opens nothing.
#[must_use = "nothing is opened before `open`"]
pub struct OpenChannel<'a, T: ?Sized = ()> {
    pub(super) socket: &'a Socket,
    pub(super) name: &'a str,
    pub(super) meta: Option<&'a T>,
    pub(super) priority: Priority,
    resumable: bool,
    since: Vec<RoomPosition>,
}

impl<'a, T: Serialize + Sync + ?Sized> OpenChannel<'a, T> {
    /// Sets the priority, for both directions. Defaults to normal.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Sets data for the peer, which reads it with `Channel::meta`.
    pub fn meta<U: Serialize + Sync + ?Sized>(self, meta: &'a U) -> OpenChannel<'a, U> {
        OpenChannel {
            socket: self.socket,
            name: self.name,
            meta: Some(meta),
            priority: self.priority,
            resumable: self.resumable,
            since: self.since,
        }
    }

    /// Lets the channel continue on the next connection, if both sides resume sessions.
    pub fn resumable(mut self) -> Self {
        self.resumable = true;
        self
    }

    /// Lets the channel continue in rooms at these positions: those of another channel at its end, see
    /// `Channel::positions`. When the server lets the channel join one of these rooms, the channel gets the messages
    /// after the position, in order, and then new ones; or a [`Gap`](crate::Gap) in the place of messages that the
    /// server does not have any more. At most 256 positions are sent. They have no effect at a server that does not
    /// support positions.
    pub fn since(mut self, positions: impl IntoIterator<Item = RoomPosition>) -> Self {
        self.since = positions.into_iter().take(MOST_POSITIONS).collect();
        self
    }

    /// Opens the channel.
    ///
    /// Costs no round trip: messages may follow at once. The first `recv` or request reports whether the peer serves
    /// the name. Waits while the peer permits no further channel.
    ///
    /// # Errors
    /// If the name is invalid, `meta` cannot be encoded, the socket has ended or is going away, or no channel became
    /// free, or no connection was made, within `Timeouts::request`.
    ///
    /// # Cancel safety
    /// A dropped future has opened nothing.
    pub async fn open(self) -> Result<Channel, OpenError> {
        let Self { socket, name, .. } = self;
        let session = socket.session();
        let mut since = self.since;
        if !since.is_empty() {
            // The server's answer tells what it supports.
            let _ = session.wait_admitted().await;
            let knows = session.welcome().is_some_and(|welcome| welcome.history);
            if !knows || !session.client {
                since.clear();
            }
        }
        crate::wire::message::check_name(name).map_err(EncodeError::Name)?;
        if name.starts_with('$') {
            return Err(EncodeError::Reserved(name.to_owned()).into());
        }
        let id = session.next_channel_id();
        let request = control::OpenRequest {
            id,
            name,
            meta: self.meta,
            priority: self.priority,
            resumable: self.resumable,
            received: None,
            since: &since,
        };
        let frame = control::encode_open(&request, session.frame_limit())?;
        let opening = async {
            loop {
                let (conn, number) = session.ready().await?;
                match conn.open_bi().await {
                    Ok((stream, recv)) => return Ok((conn, number, stream, recv)),
                    // A client that reconnects will have another connection.
                    Err(_) if session.reconnects() && !session.closing() => session.down(number),
                    Err(error) => return Err(OpenError::Closed(session.reason_for(&error))),
                }
            }
        };
        let (conn, number, stream, recv) = tokio::time::timeout(session.timeouts.request, opening)
            .await
            .map_err(|_| {
                if session.is_up() {
                    let welcome = session.welcome().filter(|_| session.client);
                    OpenError::TooManyChannels(welcome.map(|welcome| welcome.channels))
                } else {
                    OpenError::NoConnection(session.timeouts.request)
                }
            })??;
        let inbox = Inbox::new(recv, session.limits.frame);
        let counters = Counters::child(session.counters.clone());
        let opened = Opened {
            id,
            name: name.to_owned(),
            meta: None,
            priority: self.priority,
            resumable: self.resumable,
            since,
        };
        let way = Way {
            conn,
            stream,
            epoch: 0,
            first: Some(frame),
        };
        session.counts.one(Count::ChannelsOpened);
        let span = tracing::debug_span!(parent: &session.span, "channel", name, id);
        let span = or_parent(span, session.span.clone());
        let session = session.clone();
        Ok(span.in_scope(|| session.channel(opened, true, (way, number), inbox, counters)))
    }
}

impl<T: ?Sized> fmt::Debug for OpenChannel<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenChannel")
            .field("name", &self.name)
            .field("priority", &self.priority)
            .field("resumable", &self.resumable)
            .finish_non_exhaustive()
    }
}

/// Why a channel could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The name or the data cannot be sent.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The peer permitted no further channel in time.
    #[error("the peer permits no further channel{}", .0.map(|most| format!(": {most} may be open")).unwrap_or_default())]
    TooManyChannels(
        /// How many channels it permits, if known: the server announces it.
        Option<u64>,
    ),
    /// There was no connection for this long; the socket is still reconnecting.
    #[error("no connection within {0:?}")]
    NoConnection(Duration),
    /// The server is shutting down.
    #[error("the server is going away: {}", .0.text)]
    GoingAway(GoAway),
    /// The socket has ended.
    #[error("socket closed: {0}")]
    Closed(CloseReason),
}

impl From<SendError> for OpenError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Encode(error) => Self::Encode(error),
            SendError::Closed(reason) => Self::Closed(reason),
            SendError::Finished => Self::Closed(crate::channel::carrier::lost(
                "the channel ended while it was opened",
            )),
        }
    }
}
