//! The server's own channels: `events`, where each client hears what the others send, and `ping`.
//!
//! A message goes to every other client that can take it now. One that cannot loses it, which is counted:
//! nobody waits for the slowest. Rooms, history and delivery guarantees are not here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use udpack::{Channel, CloseCode, Encoded, Fault, Message, RecvError, ServerBuilder};

use crate::value::Value;

/// The channel whose messages go to all other clients.
pub(crate) const EVENTS: &str = "events";
/// The channel whose requests come back as they are.
pub(crate) const PING: &str = "ping";

/// Everybody who is on the `events` channel. A handle.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    members: Mutex<HashMap<u64, Member>>,
    next: AtomicU64,
    dropped: AtomicU64,
    over: watch::Sender<bool>,
}

#[derive(Debug, Clone)]
struct Member {
    channel: Channel,
    dropped: Arc<AtomicU64>,
}

/// The reply to a request on `events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Delivered {
    /// Other clients that the event is on its way to.
    pub(crate) delivered: u64,
}

impl Hub {
    pub(crate) fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                members: Mutex::default(),
                next: AtomicU64::new(0),
                dropped: AtomicU64::new(0),
                over: watch::Sender::new(false),
            }),
        }
    }

    /// Serves both channels on a server.
    pub(crate) fn attach(&self, server: ServerBuilder) -> ServerBuilder {
        let (events, ping) = (self.clone(), self.clone());
        server
            .channel(EVENTS, move |channel| {
                let hub = events.clone();
                async move { hub.relay(channel).await }
            })
            .channel(PING, move |channel| {
                let hub = ping.clone();
                async move { hub.echo(channel).await }
            })
    }

    /// Closes all channels served here, so that nobody who merely listens holds up the end of the server.
    pub(crate) fn close(&self) {
        self.inner.over.send_replace(true);
    }

    async fn relay(&self, channel: Channel) -> Result<(), RecvError> {
        let seat = self.join(&channel);
        while let Some(message) = self.recv(&channel).await? {
            // Passed on as it came: the server need not understand it.
            match Encoded::relay(&message) {
                Ok(relayed) => {
                    let delivered = self.send_to_others(&channel, &relayed);
                    let _ = channel.reply(&message, &Delivered { delivered }).await;
                }
                Err(error) => tracing::debug!(%error, "event not passed on"),
            }
        }
        drop(seat);
        Ok(())
    }

    async fn echo(&self, channel: Channel) -> Result<(), RecvError> {
        while let Some(message) = self.recv(&channel).await? {
            match message.data::<Value>() {
                Ok(data) => {
                    let _ = channel.reply(&message, &data).await;
                }
                Err(error) => {
                    let fault = Fault::new(Fault::BAD_PAYLOAD, error.to_string());
                    let _ = channel.fault(&message, &fault).await;
                }
            }
        }
        Ok(())
    }

    /// The next message, or none once the server goes down.
    async fn recv(&self, channel: &Channel) -> Result<Option<Message>, RecvError> {
        let mut over = self.inner.over.subscribe();
        tokio::select! {
            message = channel.recv() => message,
            _ = over.wait_for(|over| *over) => {
                drop(channel.close(CloseCode::SHUTTING_DOWN, "the server is shutting down"));
                Ok(None)
            }
        }
    }

    fn send_to_others(&self, from: &Channel, message: &Encoded) -> u64 {
        let others: Vec<Member> = self
            .members()
            .values()
            .filter(|member| member.channel.session_id() != from.session_id())
            .cloned()
            .collect();
        let mut delivered = 0;
        for member in others {
            match member.channel.try_send_encoded(message) {
                Ok(true) => delivered += 1,
                Ok(false) => {
                    let lost = member.dropped.fetch_add(1, Ordering::Relaxed);
                    self.inner.dropped.fetch_add(1, Ordering::Relaxed);
                    if lost == 0 {
                        tracing::warn!(
                            session = %member.channel.session_id(),
                            "slow listener loses events"
                        );
                    }
                }
                Err(error) => tracing::debug!(%error, "event not sent"),
            }
        }
        delivered
    }

    fn join(&self, channel: &Channel) -> Seat {
        let key = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let member = Member {
            channel: channel.clone(),
            dropped: Arc::default(),
        };
        self.members().insert(key, member);
        Seat {
            hub: self.clone(),
            key,
        }
    }

    fn members(&self) -> MutexGuard<'_, HashMap<u64, Member>> {
        // Nothing panics while it is held, and the map is whole after each change.
        self.inner
            .members
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One member's place, given up on drop.
struct Seat {
    hub: Hub,
    key: u64,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let member = self.hub.members().remove(&self.key);
        if let Some(member) = member {
            let dropped = member.dropped.load(Ordering::Relaxed);
            if dropped > 0 {
                let total = self.hub.inner.dropped.load(Ordering::Relaxed);
                tracing::info!(
                    session = %member.channel.session_id(),
                    dropped,
                    total,
                    "slow listener left"
                );
            }
        }
    }
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
        assert!(
            hub.inner.dropped.load(Ordering::Relaxed) > 0,
            "losses are counted"
        );
    }
}
