//! Probes the network. Every probe has a time-out; different addresses are probed at once.

use std::env;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use tokio::net::TcpStream;
use tokio::time::timeout;
use udpack::probe::{Answer, Probe};
use udpack::{CloseCode, ConnectError, Handshake, TransportChoice};

use super::{Address, Dns, Path, Reach, Report, Session, Through, Tls, Trips};
use crate::hub::PING;
use crate::target::Target;
use crate::value::Value;
use crate::when;

/// The time-outs of the first probe and its repetitions.
const FIRST: [Duration; 6] = [
    Duration::from_millis(300),
    Duration::from_millis(300),
    Duration::from_millis(600),
    Duration::from_millis(600),
    Duration::from_secs(1),
    Duration::from_secs(1),
];
/// The time-out of a TCP connection.
const TCP: Duration = Duration::from_secs(4);
/// The number of measured round trips.
const TRIPS: u32 = 20;
/// The pause between two of them.
const BETWEEN: Duration = Duration::from_millis(20);
/// The time-out of all pings over a session.
const PINGS: Duration = Duration::from_secs(10);
/// The number of datagrams of one size that must all be lost before the size counts as too large.
const TRIES: u32 = 4;
/// The precision of the found size, in bytes.
const FINE: u16 = 4;
/// The smallest size that is tried, in bytes of UDP payload.
const LEAST: u16 = 1200;
const ETHERNET: [u16; 2] = [1472, 1452];
/// The most addresses of a name that are probed.
const MOST: usize = 16;

pub(super) async fn all(target: &Target) -> Report {
    let url = target.url();
    let mut report = Report {
        server: target.address(),
        key: target.has_key(),
        token: target.has_token(),
        proxies: proxies(),
        clock: when::unix(SystemTime::now()),
        ..Report::default()
    };
    let begun = Instant::now();
    let found = udpack::lookup(url.host(), url.port()).await;
    report.dns = Dns {
        took: begun.elapsed(),
        error: found.as_ref().err().map(ToString::to_string),
    };
    let mut found = found.unwrap_or_default();
    if found.is_empty() && report.dns.error.is_none() {
        report.dns.error = Some("it has no address".to_owned());
    }
    found.truncate(MOST);
    let looked_at = found.into_iter().map(|at| address(target, at));
    (report.addresses, report.through) = tokio::join!(join_all(looked_at), through(target));
    let done = |tls: &Tls| matches!(tls, Tls::Done { .. });
    let greeted = report
        .addresses
        .iter()
        .any(|at| done(&at.tls) || done(&at.wss));
    let by_proxy = report.through.as_ref().is_some_and(|way| done(&way.wss));
    if report.token && (greeted || by_proxy) {
        report.session = Some(session(target).await);
    }
    report
}

/// Tries the way through the proxy, if it leads through one.
async fn through(target: &Target) -> Option<Through> {
    let proxy = target.proxy()?.to_string();
    let url = target.url();
    let made = target
        .client()
        .handshake_through_proxy(url.host(), url.port());
    let wss = match timeout(TCP, made).await {
        Ok(made) => seen(target, made?),
        Err(_) => Tls::Failed(format!("no answer within {TCP:?}")),
    };
    Some(Through { proxy, wss })
}

/// Probes one address with all transports.
async fn address(target: &Target, address: SocketAddr) -> Address {
    let ((udp, trips, path), tcp) = tokio::join!(udp(address), tcp(address));
    let quic = async {
        match udp {
            Reach::Answered(_) => handshake(target, address, TransportChoice::Quic).await,
            _ => Tls::Not,
        }
    };
    let wss = async {
        match tcp {
            Reach::Answered(_) => {
                let made = handshake(target, address, TransportChoice::WebSocket);
                let silent = |_| Tls::Failed(format!("no answer within {TCP:?}"));
                timeout(TCP, made).await.unwrap_or_else(silent)
            }
            _ => Tls::Not,
        }
    };
    let (tls, wss) = tokio::join!(quic, wss);
    Address {
        address,
        udp,
        trips,
        path,
        tls,
        tcp,
        wss,
    }
}

async fn udp(address: SocketAddr) -> (Reach, Trips, Option<Path>) {
    let probe = match Probe::to(address).await {
        Ok(probe) => probe,
        Err(error) => return (refusal(&error), Trips::default(), None),
    };
    let begun = Instant::now();
    let mut first = Reach::Silent(Duration::ZERO);
    for patience in FIRST {
        match probe.ask(LEAST, patience).await {
            Ok(Answer::Came(took)) => {
                first = Reach::Answered(took);
                break;
            }
            Ok(_) => first = Reach::Silent(begun.elapsed()),
            Err(error) => {
                first = refusal(&error);
                break;
            }
        }
    }
    let Reach::Answered(took) = first else {
        return (first, Trips::default(), None);
    };
    let patience = (took * 3 + Duration::from_millis(150)).min(Duration::from_secs(2));
    let mut trips = Trips::default();
    for _ in 0..TRIPS {
        trips.add(came(&probe, LEAST, patience).await);
        tokio::time::sleep(BETWEEN).await;
    }
    let path = path(&probe, address, patience).await;
    (first, trips, Some(path))
}

async fn came(probe: &Probe, payload: u16, patience: Duration) -> Option<Duration> {
    match probe.ask(payload, patience).await {
        Ok(Answer::Came(took)) => Some(took),
        _ => None,
    }
}

/// Finds the largest datagram that is answered, up to the size that the first link carries.
async fn path(probe: &Probe, address: SocketAddr, patience: Duration) -> Path {
    let [v4, v6] = ETHERNET;
    let ethernet = if address.is_ipv6() { v6 } else { v4 };
    // A first link larger than Ethernet says little about the path: jumbo frames and loopback end at this machine or
    // this network.
    let link = probe.first_link().unwrap_or(ethernet).min(ethernet);
    let passes = async |payload| {
        for _ in 0..TRIES {
            if came(probe, payload, patience).await.is_some() {
                return true;
            }
        }
        false
    };
    let (mut through, mut lost) = (LEAST, link.saturating_add(1));
    if link <= LEAST || passes(link).await {
        return Path {
            through: link,
            link,
        };
    }
    while lost - through > FINE {
        let middle = through + (lost - through) / 2;
        match passes(middle).await {
            true => through = middle,
            false => lost = middle,
        }
    }
    Path { through, link }
}

fn refusal(error: &io::Error) -> Reach {
    use io::ErrorKind::{ConnectionRefused, PermissionDenied};
    match error.kind() {
        ConnectionRefused => Reach::Refused,
        PermissionDenied => Reach::Forbidden,
        _ => Reach::NoRoute(error.to_string()),
    }
}

async fn tcp(address: SocketAddr) -> Reach {
    let begun = Instant::now();
    match timeout(TCP, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Reach::Answered(begun.elapsed()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => Reach::Silent(begun.elapsed()),
        Ok(Err(error)) => refusal(&error),
        Err(_) => Reach::Silent(TCP),
    }
}

async fn handshake(target: &Target, address: SocketAddr, over: TransportChoice) -> Tls {
    let made = target
        .client()
        .handshake(address, target.url().host(), over);
    seen(target, made.await)
}

fn seen(target: &Target, made: Result<Handshake, ConnectError>) -> Tls {
    match made {
        Ok(done) => Tls::Done {
            took: done.took,
            valid: done.valid,
        },
        Err(ConnectError::PinMismatch { presented, .. }) => Tls::OtherKey(presented.to_string()),
        // Without a key the expected server is unknown, and that is not a fault of the network.
        Err(ConnectError::Untrusted { dates: false, .. }) if !target.has_key() => Tls::Not,
        Err(ConnectError::Untrusted { text, dates, .. }) => Tls::Untrusted { text, dates },
        Err(error) => Tls::Failed(error.to_string()),
    }
}

async fn session(target: &Target) -> Session {
    let socket = match target.client().connect(&target.address()).await {
        Ok(socket) => socket,
        Err(error) if error.is_auth() => return Session::Refused(error.to_string()),
        Err(error) => return Session::Failed(error.to_string()),
    };
    let mut trips = Trips::default();
    let pings = async {
        let channel = socket.open(PING).await.map_err(|error| error.to_string())?;
        for number in 0..u64::from(TRIPS) {
            let begun = Instant::now();
            let asked = channel.request::<_, Value>("ping", &number).await;
            asked.map_err(|error| error.to_string())?;
            trips.add(Some(begun.elapsed()));
        }
        Ok::<(), String>(())
    };
    let pinged = timeout(PINGS, pings).await;
    let _ = timeout(PINGS, socket.close(CloseCode::NORMAL, "done")).await;
    match pinged {
        // A server without the ping channel does not answer pings, but has admitted the client.
        Ok(Ok(()) | Err(_)) => Session::In { trips },
        Err(_) if trips.came == 0 => Session::In { trips },
        Err(_) => Session::Failed(format!("{} of {TRIPS} pings within {PINGS:?}", trips.came)),
    }
}

/// The variables that name a proxy, in either case, without the user and password that a URL of one may hold.
fn proxies() -> Vec<(&'static str, String)> {
    let names = [
        "HTTPS_PROXY",
        "https_proxy",
        "ALL_PROXY",
        "all_proxy",
        "NO_PROXY",
        "no_proxy",
    ];
    let set = names.into_iter().filter_map(|name| {
        let value = env::var(name).ok().filter(|value| !value.is_empty())?;
        Some((name, without_secret(&value)))
    });
    set.collect()
}

fn without_secret(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (_, None) => url.to_owned(),
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://…@{host}"),
        (None, Some((_, host))) => format!("…@{host}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_password_is_not_shown() {
        for (url, shown) in [
            ("http://user:pass@proxy:3128", "http://…@proxy:3128"),
            ("user:p@ss@proxy:3128", "…@proxy:3128"),
            ("http://proxy:3128", "http://proxy:3128"),
            (".example.com,10.0.0.0/8", ".example.com,10.0.0.0/8"),
        ] {
            assert_eq!(without_secret(url), shown);
        }
    }
}
