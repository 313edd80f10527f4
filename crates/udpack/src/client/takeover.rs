//! Going over to QUIC when UDP passes again, without losing the session.
//!
//! A connection over QUIC is made beside the one over TCP, and nothing is said on it before it stands. Then the
//! session gives up the old one itself, for the server would do so as soon as it sees the new one, and what the server
//! closes is over; it introduces itself on the new one as after a loss.

use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::Instant;

use crate::channel::carrier::lost;
use crate::client::race;
use crate::client::{Client, ConnectError, Dialler, Goal, TransportChoice, ticket, welcomed};
use crate::session::driver::{Established, Reached};
use crate::session::reconnect::{ANSWER, Probes};
use crate::session::{Session, give_up};
use crate::transport::connection::Connection;
use crate::transport::{on_path, windows};
use crate::trust::origin::Transport;
use crate::trust::url::ConnectUrl;
use crate::wire::config::Limits;

/// How often a server on a new path is asked for a sign of life.
const SIGN: Duration = Duration::from_secs(1);

impl Dialler {
    /// A connection over QUIC, once one stands, while the present one runs over TCP although the client goes by both.
    pub(super) fn poll_udp(
        &mut self,
        cx: &mut Context<'_>,
        session: &Arc<Session>,
    ) -> Poll<Box<Reached>> {
        loop {
            if self.probing.is_none() {
                let over_tcp = matches!(session.conn().transport(), Transport::WebSocket { .. });
                if self.client.over != TransportChoice::Auto || !over_tcp {
                    return Poll::Pending;
                }
                let (Goal { name, at }, client) = self.here();
                let last = session.conn().remote_address();
                let looking = look(
                    (client.clone(), name.clone(), at.clone(), last),
                    session.clone(),
                    self.probes.wait(),
                );
                self.probing = Some(Box::pin(looking));
            }
            let Some(probing) = &mut self.probing else {
                return Poll::Pending;
            };
            let reached = ready!(probing.as_mut().poll(cx));
            self.probing = None;
            if let Some(reached) = reached {
                return Poll::Ready(reached);
            }
        }
    }

    /// The present connection is left.
    pub(super) fn stop_probing(&mut self, session: &Session) {
        self.probing = None;
        let over_udp = session.conn().transport() == Transport::Quic;
        if over_udp && self.since.elapsed() >= Probes::LASTING {
            self.probes = Probes::default();
        }
    }

    /// Introduces the session on a connection that was made for it.
    pub(super) async fn move_to_quic(
        &mut self,
        session: &Session,
        (conn, endpoint): Reached,
    ) -> Result<Established, ConnectError> {
        let (goal, client) = self.here();
        let token = client.new_token().await?;
        let why = client.inner.won.note(goal.at, client.over, &conn);
        let ticket = (ticket(session), true);
        let path = conn.clone();
        let introduced = client.introduce((conn, endpoint), why, &token, ticket);
        let welcomed = async { welcomed(session, introduced.await?).await };
        let established = tokio::select! {
            biased;
            established = welcomed => established?,
            // The old connection is given up: who waits as long as a slow server may take stalls the session.
            silence = silent(&path, &session.limits) => {
                give_up(&path);
                let text = format!("nothing came over the new path within {silence:?}");
                return Err(ConnectError::Denied(lost(&text)));
            }
        };
        if self.told.is_none() {
            self.won
                .insert(self.serving, established.conn.remote_address());
        }
        self.since = Instant::now();
        Ok(established)
    }
}

/// Waits until nothing has come over a new connection for a while, although the peer was asked for signs of life;
/// returns how long. A server that is slow to answer a hello still acknowledges what it is asked.
async fn silent(conn: &Connection, limits: &Limits) -> Duration {
    let (mut heard, mut since) = (conn.stats().datagrams_received, Instant::now());
    let mut window = windows::first(limits, 1);
    loop {
        tokio::time::sleep(SIGN).await;
        let patience = on_path(ANSWER, conn);
        let now = conn.stats().datagrams_received;
        if now != heard {
            (heard, since) = (now, Instant::now());
        } else if since.elapsed() >= patience {
            return patience;
        }
        // The peer's QUIC acknowledges that it may send more.
        window = window.saturating_add(1);
        conn.set_receive_window(window);
    }
}

/// Waits, and tries to connect over QUIC then, if the session could go over.
async fn look(
    (client, name, at, last): (Client, ConnectUrl, ConnectUrl, SocketAddr),
    session: Arc<Session>,
    wait: Duration,
) -> Option<Box<Reached>> {
    tokio::time::sleep(wait).await;
    if !session.can_change() {
        return None;
    }
    let found = client.inner.dialer.lookup(at.host(), at.port()).await;
    let order = race::in_turn(found.ok()?, Some(last));
    let goal = Goal {
        name: &name,
        at: &at,
    };
    let reached = client.dial_any(goal, order, TransportChoice::Quic).await;
    if let Err(error) = &reached {
        tracing::debug!(%error, "UDP does not pass yet");
    }
    reached.ok().map(Box::new)
}
