//! The interface of systemd: a socket that it has bound, and notifications about the service's state
//! (`sd_listen_fds`, `sd_notify`).

use std::io;
use std::net::UdpSocket;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use listenfd::ListenFd;

use crate::exit::{Failure, Kind};

/// The UDP socket that systemd passed to this process, if any. Other passed sockets are logged.
pub(super) fn inherited(mut given: ListenFd) -> anyhow::Result<Option<UdpSocket>> {
    match given.len() {
        0 => return Ok(None),
        1 => {}
        count => tracing::warn!(
            count,
            "more than one socket was passed: only the first is used"
        ),
    }
    let socket = given.take_udp_socket(0).map_err(|error| {
        Failure::new(
            Kind::Usage,
            format!("LISTEN_FDS: the socket that was passed is no UDP socket: {error}"),
        )
        .hint("a systemd .socket unit for this server has ListenDatagram=, not ListenStream=")
    })?;
    Ok(socket)
}

/// The receiver of notifications, if there is one.
#[derive(Debug)]
pub(super) struct Watcher {
    to: Option<(UnixDatagram, SocketAddr)>,
    /// The watchdog interval.
    pub(super) alive: Option<Duration>,
}

impl Watcher {
    /// Reads the environment. Errors are logged and do not stop the server.
    pub(super) fn from_env() -> Self {
        let to = std::env::var_os("NOTIFY_SOCKET").and_then(|name| {
            let name = name.as_encoded_bytes();
            let address = match name {
                [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
                [b'/', ..] => SocketAddr::from_pathname(String::from_utf8_lossy(name).as_ref()),
                _ => Err(io::Error::other("it is neither a path nor an abstract name")),
            };
            match address.and_then(|address| Ok((UnixDatagram::unbound()?, address))) {
                Ok(to) => Some(to),
                Err(error) => {
                    tracing::warn!(%error, "NOTIFY_SOCKET cannot be used: readiness is not reported");
                    None
                }
            }
        });
        let for_us =
            std::env::var("WATCHDOG_PID").map_or(true, |pid| pid.parse() == Ok(std::process::id()));
        let alive = std::env::var("WATCHDOG_USEC").ok().filter(|_| for_us);
        // Twice in each watchdog interval.
        let alive = alive.and_then(|micros| micros.parse().ok());
        Self {
            to,
            alive: alive.map(|micros: u64| Duration::from_micros(micros / 2)),
        }
    }

    /// Sends a notification.
    pub(super) fn tell(&self, state: &str) {
        let Some((socket, address)) = &self.to else {
            return;
        };
        if let Err(error) = socket.send_to_addr(state.as_bytes(), address) {
            tracing::warn!(%error, state, "cannot notify the service manager");
        }
    }

    /// Sends watchdog notifications for ever, if they are requested.
    pub(super) async fn live(&self) {
        let Some(every) = self.alive.filter(|every| !every.is_zero()) else {
            return std::future::pending().await;
        };
        let mut ticks = tokio::time::interval(every);
        loop {
            ticks.tick().await;
            self.tell("WATCHDOG=1");
        }
    }
}
