//! [`Subscription`]: a client's channel that is opened again when it cannot continue, and misses no messages of its
//! rooms.

use std::fmt;

use serde::Serialize;

use crate::channel::{Channel, RecvError};
use crate::session::open::{OpenChannel, OpenError};
use crate::session::socket::Socket;
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::Priority;
use crate::wire::control::RoomPosition;
use crate::wire::message::Message;

/// A channel for listening to rooms, of a client that [reconnects](crate::ClientBuilder::reconnect).
///
/// A channel cannot continue when the connection was lost for longer than the server keeps the session, when the server
/// was restarted, and when the server drains and the client moves to another one. A subscription then opens another
/// channel with the same name, metadata and priority, and presents the positions of the previous one. So in rooms with
/// a history the program receives every message once, in order, or a [`Gap`](crate::Gap) in the place of messages that
/// the server does not have any more. Rooms without a history continue with new messages.
///
/// Messages that the program sent and the server had not confirmed are lost with the old channel, and so are its
/// requests.
///
/// # Drop
/// As for [`Channel`].
pub struct Subscription<T = ()> {
    socket: Socket,
    name: String,
    meta: Option<T>,
    priority: Priority,
    channel: Channel,
    /// The positions at the channel's end, while there is no other channel.
    positions: Option<Vec<RoomPosition>>,
}

impl<T: Serialize + Sync + Clone> OpenChannel<'_, T> {
    /// Opens the channel as [`open`](Self::open) does, resumable, and again for as long as the socket lives: see
    /// [`Subscription`].
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Cancel safety
    /// A dropped future has opened nothing.
    pub async fn subscribe(self) -> Result<Subscription<T>, OpenError> {
        let (socket, name) = (self.socket.clone(), self.name.to_owned());
        let (meta, priority) = (self.meta.cloned(), self.priority);
        let channel = self.resumable().open().await?;
        Ok(Subscription {
            socket,
            name,
            meta,
            priority,
            channel,
            positions: None,
        })
    }
}

impl<T: Serialize + Sync> Subscription<T> {
    /// The next message, of this channel or of the next one; `Ok(None)` after the server has finished or closed with
    /// `normal`.
    ///
    /// If the channel ended for a reason that another channel does not mend, and if the socket has ended.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future loses no message.
    pub async fn recv(&mut self) -> Result<Option<Message>, RecvError> {
        loop {
            if self.positions.is_some() {
                self.open_again().await?;
            }
            match self.channel.recv().await {
                Err(error) if is_lost(error.reason()) => {
                    self.positions = Some(self.channel.positions());
                }
                other => return other,
            }
        }
    }

    async fn open_again(&mut self) -> Result<(), RecvError> {
        let positions = self.positions.as_deref().unwrap_or_default();
        let request = self.socket.channel(&self.name);
        let request = request.priority(self.priority).resumable();
        let request = request.since(positions.iter().cloned());
        let opened = match &self.meta {
            Some(meta) => request.meta(meta).open().await,
            None => request.open().await,
        };
        match opened {
            Ok(channel) => {
                self.channel = channel;
                self.positions = None;
                Ok(())
            }
            // The socket is still reconnecting.
            Err(OpenError::NoConnection(_)) => Ok(()),
            Err(OpenError::Closed(reason)) => Err(RecvError::Closed(reason)),
            Err(error) => Err(RecvError::Closed(CloseReason::local(
                CloseCode::NOT_RESUMED,
                error.to_string(),
            ))),
        }
    }

    /// The present channel, for sending and for requests. [`recv`](Self::recv) replaces it.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The positions so far; see [`Channel::positions`]. A program can continue there after a restart.
    pub fn positions(&self) -> Vec<RoomPosition> {
        match &self.positions {
            Some(positions) => positions.clone(),
            None => self.channel.positions(),
        }
    }
}

/// Whether the channel ended only because its connection or its session did.
fn is_lost(reason: &CloseReason) -> bool {
    let lost = [
        CloseCode::NOT_RESUMED,
        CloseCode::CONNECTION_LOST,
        CloseCode::MOVED,
    ];
    reason.by != Side::Peer && lost.contains(&reason.code)
}

impl<T> fmt::Debug for Subscription<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("name", &self.name)
            .field("channel", &self.channel)
            .finish_non_exhaustive()
    }
}
