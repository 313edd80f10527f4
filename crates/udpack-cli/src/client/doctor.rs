//! `doctor`: checks the path to a server, and names the cause of a failure.
//!
//! `examine` probes the network, `verdict` derives the cause from the results alone, and `show` prints both on one
//! screen.

mod examine;
mod show;
mod verdict;

use std::net::SocketAddr;
use std::time::Duration;

use super::ping::Trips;
use crate::args::DoctorArgs;
use crate::exit::{Failure, Kind};
use crate::output;
use crate::signals::Interrupts;
use crate::target::Target;

/// All results.
#[derive(Debug, Default)]
struct Report {
    /// `HOST:PORT`.
    server: String,
    /// A key to expect, and a token to present, were given.
    key: bool,
    token: bool,
    dns: Dns,
    addresses: Vec<Address>,
    session: Option<Session>,
    /// The environment variables that name a proxy, without passwords.
    proxies: Vec<(&'static str, String)>,
    /// The way over TCP, where that leads through a proxy.
    through: Option<Through>,
    /// This machine's clock, in seconds since 1970.
    clock: i64,
}

/// The result of resolving the name.
#[derive(Debug, Default)]
struct Dns {
    took: Duration,
    error: Option<String>,
}

/// One address of the server.
#[derive(Debug, Clone)]
struct Address {
    address: SocketAddr,
    udp: Reach,
    trips: Trips,
    path: Option<Path>,
    tls: Tls,
    tcp: Reach,
    /// A handshake over a WebSocket, if TCP works.
    wss: Tls,
}

/// The result of a first packet.
#[derive(Debug, Clone, PartialEq)]
enum Reach {
    Answered(Duration),
    /// The host reports that nothing listens at the port.
    Refused,
    /// This machine, or a router, has no route; with the system's text.
    NoRoute(String),
    /// This machine's packet filter blocks it.
    Forbidden,
    Silent(Duration),
}

/// A handshake over a WebSocket, through a proxy.
#[derive(Debug, Clone)]
struct Through {
    /// `HOST:PORT`.
    proxy: String,
    wss: Tls,
}

/// The size of datagrams that the path carries, in bytes of UDP payload.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Path {
    /// The largest that was answered.
    through: u16,
    /// The largest that the first link carries, as far as known, and that was tried.
    link: u16,
}

/// The result of a handshake.
#[derive(Debug, Clone, PartialEq)]
enum Tls {
    /// It was not tried: no server answers, or no key is given.
    Not,
    Done {
        took: Duration,
        /// The times between which the certificate is valid.
        valid: Option<(i64, i64)>,
    },
    /// The server has another key than the pinned one.
    OtherKey(String),
    /// The certificate is not trusted. `dates`: because of its dates.
    Untrusted {
        text: String,
        dates: bool,
    },
    Failed(String),
}

/// The result of authentication, and of pings after it.
#[derive(Debug)]
enum Session {
    In { trips: Trips },
    Refused(String),
    Failed(String),
}

pub(super) async fn run(args: DoctorArgs, mut interrupts: Interrupts) -> anyhow::Result<()> {
    let target = Target::find(&args.connect)?;
    let report = tokio::select! {
        report = examine::all(&target) => report,
        () = interrupts.first() => return Err(Failure::interrupted().into()),
    };
    let verdict = verdict::of(&report);
    if args.json {
        output::unless_gone(output::json(&show::json(&report, &verdict)))?;
    } else {
        for line in show::lines(&report, &verdict) {
            output::unless_gone(output::line(&line))?;
        }
    }
    match verdict.kind {
        None => Ok(()),
        // The cause is printed with the results.
        Some(kind) => {
            let text = format!("no connection is possible ({})", verdict.name);
            Err(Failure::new(kind, text).into())
        }
    }
}

/// The conclusion.
#[derive(Debug, PartialEq)]
struct Verdict {
    /// Its stable name: `ok`, `no_udp`, `loss`.
    name: &'static str,
    /// One line in plain words.
    cause: String,
    /// The kind of the failure; `None` if a connection is possible.
    kind: Option<Kind>,
}
