//! `doctor`: what works from here to a server, and the cause of what does not.
//!
//! `examine` asks the network, `verdict` draws the conclusion from the answers alone, and `show` puts both on one screen.

mod examine;
mod show;
mod verdict;

use std::net::SocketAddr;
use std::time::Duration;

use crate::args::DoctorArgs;
use crate::exit::{Failure, Kind};
use crate::output;
use crate::signals::Interrupts;
use crate::target::Target;

/// All that was found.
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
    /// The variables that name a proxy, without what they hold of passwords.
    proxies: Vec<(&'static str, String)>,
    /// This machine's clock, in seconds since 1970.
    clock: i64,
}

/// What the name leads to.
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
    /// A handshake over a WebSocket, where there is TCP.
    wss: Tls,
}

/// What became of a first packet.
#[derive(Debug, Clone, PartialEq)]
enum Reach {
    Answered(Duration),
    /// The host says that nobody listens at the port.
    Refused,
    /// This machine, or a router, has no way there; with its words.
    NoRoute(String),
    /// This machine does not let it out.
    Forbidden,
    Silent(Duration),
}

/// Round trips, one after the other.
#[derive(Debug, Clone, Default, PartialEq)]
struct Trips {
    sent: u32,
    came: u32,
    min: Duration,
    sum: Duration,
    max: Duration,
}

impl Trips {
    fn add(&mut self, trip: Option<Duration>) {
        self.sent += 1;
        let Some(trip) = trip else {
            return;
        };
        self.min = match self.came {
            0 => trip,
            _ => self.min.min(trip),
        };
        self.came += 1;
        self.sum += trip;
        self.max = self.max.max(trip);
    }

    /// The share that did not come back.
    fn loss(&self) -> f64 {
        f64::from(self.sent - self.came) / f64::from(self.sent.max(1))
    }
}

/// How large datagrams may be on the way to the server, as bytes of UDP payload.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Path {
    /// The largest that got through.
    through: u16,
    /// The largest that the first link takes, as far as this machine knows, and that was tried.
    link: u16,
}

/// What a handshake showed.
#[derive(Debug, Clone, PartialEq)]
enum Tls {
    /// It was not tried: nobody answers, or it would say nothing without a key.
    Not,
    Done {
        took: Duration,
        /// Between which times the certificate is valid.
        valid: Option<(i64, i64)>,
    },
    /// Another key than the pinned one.
    OtherKey(String),
    /// Nobody vouches for the certificate. `dates`: because of its dates.
    Untrusted {
        text: String,
        dates: bool,
    },
    Failed(String),
}

/// What became of the token, and of pings if it was let in.
#[derive(Debug)]
enum Session {
    In { trips: Trips },
    Refused(String),
    Failed(String),
}

pub(super) async fn run(mut args: DoctorArgs, mut interrupts: Interrupts) -> anyhow::Result<()> {
    if let Some(server) = args.server.take() {
        args.connect.to = Some(server);
    }
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
        // The cause was said where the answers are.
        Some(kind) => {
            let text = format!("no connection is possible ({})", verdict.name);
            Err(Failure::new(kind, text).into())
        }
    }
}

/// What to conclude.
#[derive(Debug, PartialEq)]
struct Verdict {
    /// A name for it that stays: `ok`, `no_udp`, `loss`.
    name: &'static str,
    /// One line in plain words.
    cause: String,
    /// Why no connection is possible; none where one is.
    kind: Option<Kind>,
}
