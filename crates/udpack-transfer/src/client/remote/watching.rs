//! A channel on which a server reports its state. It is opened again when it is lost.

use serde::Serialize;
use udpack::{Channel, Message};

use super::{LOSSES, PATIENCE, failed, open_eager};
use crate::client::link::{Link, Loss};
use crate::local::error::TransferError;

/// Nothing is opened before the first call.
pub(super) struct Watching {
    link: Link,
    /// The name of the channel.
    name: &'static str,
    channel: Option<Channel>,
    losses: u32,
}

impl Watching {
    pub(super) fn new(link: Link, name: &'static str) -> Self {
        Self {
            link,
            name,
            channel: None,
            losses: 0,
        }
    }

    /// The next message; `None` when the server sends no more.
    pub(super) async fn next(&mut self) -> Result<Option<Message>, TransferError> {
        loop {
            let channel = self.channel().await?;
            match channel.recv().await {
                Ok(message) => {
                    self.losses = 0;
                    self.link.progressed();
                    return Ok(message);
                }
                Err(error) => {
                    self.channel = None;
                    let error = TransferError::from(error);
                    if self.losses + 1 >= LOSSES {
                        return Err(error);
                    }
                    if self.link.lost(&channel.socket(), error).await? == Loss::Lane {
                        self.losses += 1;
                    }
                }
            }
        }
    }

    /// Sends a request whose answer only confirms it.
    pub(super) async fn ask<T: Serialize + Sync>(
        &mut self,
        event: &'static str,
        asked: &T,
    ) -> Result<(), TransferError> {
        let channel = self.channel().await?;
        let request = channel.request::<_, ()>(event, asked);
        let answer = request.timeout(PATIENCE).await;
        answer.map_err(|error| failed(error, PATIENCE))
    }

    async fn channel(&mut self) -> Result<Channel, TransferError> {
        if let Some(channel) = &self.channel {
            return Ok(channel.clone());
        }
        let channel = open_eager(&self.link, self.name).await?;
        self.channel = Some(channel.clone());
        Ok(channel)
    }
}
