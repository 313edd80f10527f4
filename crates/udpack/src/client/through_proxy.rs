//! Reaching a server where the way over TCP leads through a proxy: the way over UDP does not, and begins with a lookup that may take
//! long or fail where only the proxy can resolve names.

use std::net::{Ipv4Addr, SocketAddr};

use crate::client::beside::{HeadStart, beside};
use crate::client::race;
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
        if self.over != TransportChoice::Auto {
            return self.dial_through(goal, proxy, HeadStart::none()).await;
        }
        let url = goal.at;
        let quic = async {
            let found = self.lookup(url).await?;
            let order = race::in_turn(found, last);
            self.dial_any(goal, order, TransportChoice::Quic).await
        };
        let reached = beside(self.inner.won.was_websocket(url), quic, |head_start| {
            self.dial_through(goal, proxy, head_start)
        });
        let reached = reached.await;
        reached.map_err(|errors| without_lookup(url, unknown(proxy), errors))
    }

    pub(super) async fn dial_through(
        &self,
        Goal { name, at }: Goal<'_>,
        proxy: &Proxy,
        head_start: HeadStart,
    ) -> Result<Reached, ConnectError> {
        let server = (at.host(), at.port());
        let dialer = &self.inner.dialer;
        let name = name.server_name();
        let dialled = dialer.dial_through(proxy, server, name, head_start.may_speak());
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

/// Why neither way leads to the server; `unknown` is in place of an address. That its name is not known here is no fault where the
/// proxy resolves it.
fn without_lookup(url: &ConnectUrl, unknown: SocketAddr, tried: [ConnectError; 2]) -> ConnectError {
    let mut errors = Vec::new();
    for error in tried {
        match error {
            ConnectError::Resolve { .. } => {}
            ConnectError::EachAddress { errors: each, .. } => errors.extend(each),
            error => errors.push((unknown, error)),
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
