//! [`Subscription`]: a client's channel that is opened again where it cannot go on, and misses nothing of its rooms.

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
/// When the connection is lost for longer than the server keeps the session, or the server was restarted, or drains and the
/// client moves to another, the channel cannot go on. This opens another of the same name, meta and priority and presents the positions of the one before, so
/// that in rooms with a history the program sees every message once, in order, or a [`Gap`](crate::Gap) in the place of
/// what the server does not have any more. Rooms without a history go on with what is sent from then on.
///
/// What the program had sent and the server had not confirmed is lost with the old channel, and so are its requests.
///
/// # Drop
/// As a [`Channel`]'s.
pub struct Subscription<T = ()> {
    socket: Socket,
    name: String,
    meta: Option<T>,
    priority: Priority,
    channel: Channel,
    /// As of the channel's end, while there is no other.
    positions: Option<Vec<RoomPosition>>,
}

impl<T: Serialize + Sync + Clone> OpenChannel<'_, T> {
    /// Opens it as [`open`](Self::open) does, resumable, for as long as the socket lives: see [`Subscription`].
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
    /// # Errors
    /// When the channel ended in a way that another channel does not mend, and when the socket is over.
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
            // The socket is still looking for one.
            Err(OpenError::NoConnection(_)) => Ok(()),
            Err(OpenError::Closed(reason)) => Err(RecvError::Closed(reason)),
            Err(error) => Err(RecvError::Closed(CloseReason::local(
                CloseCode::NOT_RESUMED,
                error.to_string(),
            ))),
        }
    }

    /// The channel of this moment: to send on it, to ask something. Another takes its place in [`recv`](Self::recv).
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// How far it has come; see [`Channel::positions`]. A program that starts again may go on from there.
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
