//! The task of a connection: moves records between the state and the WebSocket, and runs its timers.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::Shared;
use super::wire::{code, fault};
use crate::base::lock;
use crate::transport::connection::ConnectionError;
use crate::wire::code::{CloseCode, CloseReason, Side};

/// The most messages that are read before a write.
const BURST: usize = 16;
/// How long to wait until the peer has received the close and ended the TCP connection.
const FAREWELL: Duration = Duration::from_secs(2);

/// Runs a connection to its end.
pub(super) async fn drive<S>(mut socket: WebSocketStream<S>, shared: Arc<Shared>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    {
        let mut timer = pin!(tokio::time::sleep(Duration::ZERO));
        let mut work = Work::default();
        poll_fn(|cx| work.poll(cx, &mut socket, timer.as_mut(), &shared)).await;
    }
    let last_word = async {
        // A record that is being written is completed, then the close follows.
        socket.flush().await?;
        if let Some(record) = shared.change(|state| state.record(Instant::now())) {
            socket.send(Message::Binary(record)).await?;
        }
        socket.close(None).await
    };
    let told = tokio::time::timeout(FAREWELL, last_word).await;
    shared.change(super::State::set_done);
    if matches!(told, Ok(Ok(()))) {
        // Dropping a TCP connection with unread bytes would discard the close.
        let rest = async { while let Some(Ok(_)) = socket.next().await {} };
        let _ = tokio::time::timeout(FAREWELL, rest).await;
    }
}

#[derive(Default)]
struct Work {
    /// Whether the socket may hold unsent bytes.
    unflushed: bool,
}

impl Work {
    /// Ready once the connection is over.
    fn poll<S>(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut WebSocketStream<S>,
        mut timer: Pin<&mut Sleep>,
        shared: &Shared,
    ) -> Poll<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // Registered first, so that later changes wake the driver again.
        lock(&shared.state).set_driver(cx);
        let outcome = match self.read(cx, socket, shared) {
            Ok(()) => self.write(cx, socket, shared),
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            shared.change(|state| state.end(lost(&error)));
        }
        loop {
            let Some(next) = shared.change(|state| state.look(Instant::now())) else {
                return Poll::Ready(());
            };
            if next < timer.deadline() || timer.is_elapsed() {
                timer.as_mut().reset(next);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if next <= Instant::now() {
                // A ping is due, so there is a record to send.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    fn read<S>(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut WebSocketStream<S>,
        shared: &Shared,
    ) -> Result<(), Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        for _ in 0..BURST {
            let message = match Pin::new(&mut *socket).poll_next(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(None) => return Err(Error::ConnectionClosed),
                Poll::Ready(Some(message)) => message?,
            };
            shared.change(|state| {
                let now = Instant::now();
                match message {
                    Message::Binary(record) => {
                        if let Err(fault) = state.receive(record, now) {
                            state.fail(fault);
                        }
                    }
                    Message::Text(_) => {
                        state.fail(fault(code::PROTOCOL_VIOLATION, "a message of text"));
                    }
                    // The WebSocket library answers by itself.
                    Message::Ping(_) | Message::Pong(_) => state.heard(now, 0),
                    Message::Close(_) | Message::Frame(_) => {}
                }
            });
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    fn write<S>(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut WebSocketStream<S>,
        shared: &Shared,
    ) -> Result<(), Error>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut socket = Pin::new(socket);
        while let Poll::Ready(room) = socket.as_mut().poll_ready(cx) {
            room?;
            let Some(record) = shared.change(|state| match state.error() {
                Some(_) => None,
                None => state.record(Instant::now()),
            }) else {
                break;
            };
            socket.as_mut().start_send(Message::Binary(record))?;
            self.unflushed = true;
        }
        if self.unflushed
            && let Poll::Ready(flushed) = socket.poll_flush(cx)
        {
            flushed?;
            self.unflushed = false;
        }
        Ok(())
    }
}

fn lost(error: &Error) -> ConnectionError {
    let text = match error {
        Error::ConnectionClosed | Error::AlreadyClosed => "the TCP connection was ended".to_owned(),
        error => format!("the TCP connection was lost: {error}"),
    };
    ConnectionError::Transport(CloseReason::new(
        CloseCode::CONNECTION_LOST,
        text,
        Side::Transport,
    ))
}
