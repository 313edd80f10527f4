//! A channel on which a server tells what goes on, opened again when it is lost.

use serde::Serialize;
use udpack::{Channel, Message};

use super::{LOSSES, PATIENCE, failed};
use crate::client::link::Link;
use crate::local::error::TransferError;

/// Opens nothing before the first call.
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

    /// What the server tells next; `None` when it tells no more.
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
                    self.losses += 1;
                    let error = error.into();
                    if !self.link.mends(&error) || self.losses >= LOSSES {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Asks for something that has no answer but that it is done.
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
        let socket = self.link.socket().await?;
        let channel = socket.open(self.name).await?;
        self.channel = Some(channel.clone());
        Ok(channel)
    }
}
