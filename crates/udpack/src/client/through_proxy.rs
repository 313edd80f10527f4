//! Reaching a server where the way over TCP leads through a proxy: the way over UDP does not, and begins with a lookup that may take
//! long or fail where only the proxy can resolve names.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::client::race::{self, Attempt, LATER, Way};
use crate::client::{Client, ConnectError, Goal, TransportChoice};
use crate::session::driver::Reached;
use crate::transport::proxy::Proxy;
use crate::trust::url::ConnectUrl;

impl Client {
    /// Makes a connection over TCP through this proxy, or over QUIC if the client goes by both and that is sooner. The address `last` is
    /// tried first.
    pub(super) async fn dial_beside_proxy(
        &self,
        goal: Goal<'_>,
        last: Option<SocketAddr>,
        proxy: &Proxy,
    ) -> Result<Reached, ConnectError> {
        let url = goal.at;
        let begin = |way, pause| Attempt {
            // Neither has one yet.
            address: unknown(proxy),
            way,
            pause,
        };
        let both = self.over == TransportChoice::Auto;
        let waits = both && !self.inner.won.was_websocket(url);
        let later = if waits { LATER } else { Duration::ZERO };
        let direct = both.then(|| begin(Way::Quic, Duration::ZERO));
        let attempts = direct.into_iter().chain([begin(Way::WebSocket, later)]);
        let raced = race::race(attempts.collect(), |attempt| async move {
            match attempt.way {
                Way::Quic => {
                    let found = self.lookup(url).await?;
                    let over = (TransportChoice::Quic, false);
                    self.dial_any(goal, race::in_turn(found, last, over)).await
                }
                Way::WebSocket => self.dial_through(goal, proxy).await,
            }
        });
        raced.await.map_err(|errors| without_lookup(url, errors))
    }

    pub(super) async fn dial_through(
        &self,
        Goal { name, at }: Goal<'_>,
        proxy: &Proxy,
    ) -> Result<Reached, ConnectError> {
        let server = (at.host(), at.port());
        let dialled = self
            .inner
            .dialer
            .dial_through(proxy, server, name.server_name());
        let dialled = dialled.await;
        dialled.map_err(|(address, error)| {
            self.dial_error(address.unwrap_or_else(|| unknown(proxy)), error)
        })
    }
}

/// In place of an address that only the proxy knows.
fn unknown(proxy: &Proxy) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::UNSPECIFIED, proxy.port()))
}

/// Why neither way leads to the server. That its name is not known here is no fault where the proxy resolves it.
fn without_lookup(url: &ConnectUrl, tried: Vec<(Attempt, ConnectError)>) -> ConnectError {
    let mut errors = Vec::new();
    let several = tried.len() > 1;
    for (attempt, error) in tried {
        match error {
            ConnectError::Resolve { .. } if several => {}
            ConnectError::EachAddress { errors: each, .. } => errors.extend(each),
            error => errors.push((attempt.address, error)),
        }
    }
    let host = url.host().to_owned();
    match errors.pop() {
        Some((_, only)) if errors.is_empty() => only,
        last => {
            errors.extend(last);
            ConnectError::EachAddress { host, errors }
        }
    }
}
