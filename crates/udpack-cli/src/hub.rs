//! The server's own channels: `events`, which relays each client's messages to the others, and `ping`.
//!
//! A message goes to every other client that can take it now. A client that cannot loses it and receives a gap:
//! sending never waits for the slowest. Volatile messages of clients with an `events` channel are relayed in the same
//! way. The hub keeps no history and gives no delivery guarantees.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use udpack::{
    Channel, CloseCode, Encoded, Fault, Message, Overflow, RecvError, Rooms, ServerBuilder,
};

use crate::value::Value;

/// The channel whose messages go to all other clients.
pub(crate) const EVENTS: &str = "events";
/// The channel that echoes requests.
pub(crate) const PING: &str = "ping";

/// Serves the server's own channels. A handle.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    over: watch::Sender<bool>,
}

/// The reply to a request on `events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Delivered {
    /// Other clients that the event was queued for.
    pub(crate) delivered: u64,
}

impl Hub {
    pub(crate) fn new() -> Self {
        Self {
            over: watch::Sender::new(false),
        }
    }

    /// Serves both channels on a server.
    pub(crate) fn attach(&self, server: ServerBuilder) -> ServerBuilder {
        let (events, ping) = (self.clone(), self.clone());
        server
            .channel(EVENTS, move |channel: Channel| {
                let hub = events.clone();
                async move { hub.relay(channel).await }
            })
            .channel(PING, move |channel: Channel| {
                let hub = ping.clone();
                async move { hub.echo(channel).await }
            })
    }

    /// Closes all channels served here, so that idle listeners do not delay the server's end.
    pub(crate) fn close(&self) {
        self.over.send_replace(true);
    }

    async fn relay(&self, channel: Channel) -> anyhow::Result<()> {
        let rooms = channel.rooms_handle().context("a server has rooms")?;
        rooms.policy(EVENTS, Overflow::DropNewest)?;
        channel.join(EVENTS)?;
        let messages = async {
            while let Some(message) = self.recv(&channel).await? {
                // Relayed unchanged: the server need not decode it.
                match Encoded::relay(&message) {
                    Ok(relayed) => {
                        let delivered = send_to_others(&rooms, &channel, &relayed);
                        let _ = channel.reply(&message, &Delivered { delivered }).await;
                    }
                    Err(error) => tracing::debug!(%error, "event not passed on"),
                }
            }
            Ok(())
        };
        let (socket, session) = (channel.socket(), channel.session_id());
        let volatile = async {
            while let Some(message) = socket.recv_volatile().await {
                rooms.to(EVENTS).except(&session).relay_volatile(&message);
            }
            std::future::pending().await
        };
        tokio::select! {
            // First, so that none is left when the channel ends.
            biased;
            never = volatile => never,
            ended = messages => ended,
        }
    }

    async fn echo(&self, channel: Channel) -> Result<(), RecvError> {
        while let Some(message) = self.recv(&channel).await? {
            match message.data::<Value>() {
                Ok(data) => {
                    let _ = channel.reply(&message, &data).await;
                }
                Err(error) => {
                    let _ = channel.fault(&message, &Fault::from(error)).await;
                }
            }
        }
        Ok(())
    }

    /// The next message; `None` once the server shuts down.
    async fn recv(&self, channel: &Channel) -> Result<Option<Message>, RecvError> {
        let mut over = self.over.subscribe();
        tokio::select! {
            message = channel.recv() => message,
            _ = over.wait_for(|over| *over) => {
                drop(channel.close(CloseCode::SHUTTING_DOWN, "the server is shutting down"));
                Ok(None)
            }
        }
    }
}

/// Sends a message to the other clients; returns for how many it was queued.
fn send_to_others(rooms: &Rooms, from: &Channel, message: &Encoded) -> u64 {
    let sent = rooms
        .to(EVENTS)
        .except(&from.session_id())
        .send_encoded(message);
    if sent.dropped > 0 && sent.dropped == rooms.dropped() {
        tracing::warn!("a slow listener loses events and receives their number");
    }
    sent.delivered
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use udpack::{Client, Deny, Hello, Identity, Limits, Peer, Server, Socket};

    use super::*;

    async fn client(server: &Server, limits: Limits) -> (Socket, Channel) {
        let socket = Client::builder()
            .pin(server.fingerprint())
            .limits(limits)
            .connect(&server.local_addr().to_string())
            .await
            .expect("the server lets everybody in");
        let channel = socket.open(EVENTS).await.expect("a channel");
        (socket, channel)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_does_not_read_loses_events_and_holds_up_nobody() {
        let hub = Hub::new();
        let builder = Server::builder()
            .identity(Identity::generate().expect("a key"))
            .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("anybody")) });
        let server = hub
            .attach(builder)
            .bind("127.0.0.1:0")
            .await
            .expect("a port");
        let narrow = Limits {
            stream_window: 64 << 10,
            connection_window: 64 << 10,
            ..Limits::default()
        };
        let (_lazy, _unread) = client(&server, narrow).await;
        let (_eager, read) = client(&server, Limits::default()).await;
        let (_sender, send) = client(&server, Limits::default()).await;
        let data = "x".repeat(200 << 10);
        let mut heard = 0;
        let ask = async || {
            let asked = send
                .request("event", &data)
                .timeout(Duration::from_secs(10));
            let reply: Delivered = asked.await.expect("a reply in time");
            reply.delivered
        };
        let all = tokio::time::timeout(Duration::from_secs(60), async {
            // All are there once both others are reached; after that one queue fills up.
            while ask().await < 2 {
                tokio::task::yield_now().await;
            }
            while ask().await > 1 {}
        });
        let reading = async {
            while let Ok(Some(message)) = read.recv().await {
                assert_eq!(message.data::<String>().expect("text").len(), 200 << 10);
                heard += 1;
            }
        };
        tokio::select! {
            ended = all => ended.expect("in time"),
            () = reading => panic!("the reader's channel ended"),
        }
        assert!(heard > 0);
        assert!(server.rooms().dropped() > 0, "losses are counted");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn volatile_messages_go_to_all_other_listeners() {
        let builder = Server::builder()
            .identity(Identity::generate().expect("a key"))
            .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("anybody")) });
        let server = Hub::new()
            .attach(builder)
            .bind("127.0.0.1:0")
            .await
            .expect("a port");
        let (sender, _events) = client(&server, Limits::default()).await;
        let (first, _events1) = client(&server, Limits::default()).await;
        let (second, _events2) = client(&server, Limits::default()).await;
        while server.rooms().members(EVENTS).len() < 3 {
            tokio::task::yield_now().await;
        }
        sender
            .send_volatile_keyed("cursor", "alice", &(3, 4))
            .expect("sent");
        for socket in [first, second] {
            let taken = tokio::time::timeout(Duration::from_secs(60), socket.recv_volatile());
            let message = taken.await.expect("in time").expect("a message");
            assert_eq!((message.event(), message.key()), ("cursor", Some("alice")));
            assert_eq!(message.data::<(u8, u8)>().expect("a place"), (3, 4));
        }
        assert!(
            tokio::time::timeout(Duration::from_millis(1), sender.recv_volatile())
                .await
                .is_err(),
            "not to its sender"
        );
    }
}
