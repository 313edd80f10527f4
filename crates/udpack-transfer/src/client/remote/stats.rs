//! Watching the state of a server from a client.

use std::fmt;

use serde::Serialize;

use super::broken;
use super::watching::Watching;
use crate::client::link::Link;
use crate::local::error::TransferError;
use crate::wire::STATS_CHANNEL;
use crate::wire::stats::ServerStats;

/// Watches the state of a server. The token needs the right `watch` or `admin`.
///
/// # Drop
/// Stops watching.
pub struct StatsWatch {
    watching: Watching,
    over: bool,
}

impl StatsWatch {
    pub(super) fn new(link: Link) -> Self {
        Self {
            watching: Watching::new(link, STATS_CHANNEL),
            over: false,
        }
    }

    /// The first state, and each changed one, at most four times a second; `None` when the server sends no more.
    /// Nothing follows an error.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Result<ServerStats, TransferError>> {
        if self.over {
            return None;
        }
        let stats = self.stats().await.transpose();
        self.over = !matches!(stats, Some(Ok(_)));
        stats
    }

    /// Closes a socket with `forbidden`, for an administrator. Its peer receives the reason, a printable line of at
    /// most 256 bytes.
    ///
    /// [`TransferError::Refused`] with `forbidden`, `not_found`, or with an unknown code if the reason is not such a
    /// line; and those of the connection.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the request; the server may still carry it out.
    pub async fn kick(&mut self, socket: &str, reason: Option<&str>) -> Result<(), TransferError> {
        let asked = KickFields { socket, reason };
        self.watching.ask("kick", &asked).await
    }

    /// Makes the server drain, for an administrator: it accepts nothing new, lets running transfers finish within its
    /// drain time, and ends.
    ///
    /// # Errors
    /// [`TransferError::Refused`] with `forbidden`, and those of the connection.
    ///
    /// # Cancel safety
    /// As for [`kick`](Self::kick).
    pub async fn drain(&mut self) -> Result<(), TransferError> {
        self.watching.ask("drain", &NoFields {}).await
    }

    async fn stats(&mut self) -> Result<Option<ServerStats>, TransferError> {
        while let Some(message) = self.watching.next().await? {
            if message.event() == "stats" {
                let wrong = |error: udpack::DecodeError| broken(format!("stats: {error}"));
                let stats: ServerStats = message.data().map_err(wrong)?;
                return Ok(Some(stats.printable()));
            }
        }
        Ok(None)
    }
}

impl fmt::Debug for StatsWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StatsWatch").finish_non_exhaustive()
    }
}

#[derive(Serialize)]
struct KickFields<'a> {
    socket: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

#[derive(Serialize)]
struct NoFields {}
