//! [`Asked`]: a request of the peer for a program that reads its channel itself, without a [`Router`](crate::Router).
//!
//! `recv` returns the message alone, without its deadline and without a later `$cancel`. This type keeps both. The program
//! decides what to answer and when to begin.

use std::fmt;
use std::future::Future;

use futures_util::future::{AbortHandle, Abortable};
use tokio::time::Instant;

use crate::channel::{Channel, RecvError};
use crate::serve::handlers::{Answered, cancelled, late, next};
use crate::wire::message::Message;

impl Channel {
    /// The next message as [`recv`](Self::recv) returns it; a request comes with its deadline and cancellation.
    ///
    /// `$cancel` is processed only while the program reads, so a program continues to read while it works on
    /// requests.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    ///
    /// # Cancel safety
    /// As [`recv`](Self::recv).
    pub async fn recv_asked(&self) -> Result<Option<(Message, Option<Asked>)>, RecvError> {
        let Some((message, begun)) = next(self).await? else {
            return Ok(None);
        };
        let asked = begun.map(|begun| Asked {
            deadline: message
                .deadline()
                .and_then(|limit| begun.since.checked_add(limit)),
            given_up: begun.given_up,
            answered: Answered {
                channel: self.clone(),
                id: begun.id,
            },
        });
        Ok(Some((message, asked)))
    }
}

/// A request's deadline and cancellation. Dropping it forgets the request; answer it by
/// [`Channel::reply`] or [`Channel::fault`].
#[must_use = "a request that is forgotten is never cancelled"]
pub struct Asked {
    answered: Answered,
    deadline: Option<Instant>,
    given_up: bool,
}

impl Asked {
    /// The requester's deadline, if it gave one.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Runs the work while the requester waits for the answer. Returns `None` if the requester has cancelled or its
    /// deadline has passed: then the work is dropped, and the requester has been told.
    ///
    /// # Cancel safety
    /// Dropping the future drops the work and forgets the request.
    pub async fn run<F: Future>(self, work: F) -> Option<F::Output> {
        let Self {
            answered: Answered { channel, id },
            deadline,
            given_up,
        } = &self;
        let (stop, stopped) = AbortHandle::new_pair();
        if *given_up {
            stop.abort();
        } else {
            channel
                .inner
                .inbox
                .calls(|calls| calls.guard(*id, stop.clone()));
        }
        let work = std::pin::pin!(Abortable::new(work, stopped));
        // No work is begun after the deadline.
        let over = deadline.is_some_and(|deadline| deadline <= Instant::now());
        let done = match deadline {
            _ if over => None,
            Some(deadline) => tokio::time::timeout_at(*deadline, work).await.ok(),
            None => Some(work.await),
        };
        match done {
            Some(Ok(output)) => return Some(output),
            Some(Err(_)) => cancelled(channel, *id),
            None => {
                let fault = late("no answer within the request's deadline");
                if let Err(error) = channel.send_fault(&fault, *id).await {
                    tracing::debug!(%error, "a fault could not be sent");
                }
            }
        }
        None
    }
}

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asked")
            .field("id", &self.answered.id)
            .finish_non_exhaustive()
    }
}
