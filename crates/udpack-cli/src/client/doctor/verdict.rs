//! Derives the cause from the results, without probing.

use super::{Address, Reach, Report, Session, Tls, Verdict};
use crate::client::doctor::show;
use crate::exit::Kind;
use crate::when;

/// The share of lost round trips from which on a path is reported as lossy.
const LOSSY: f64 = 0.03;

/// The most important cause: failures of the connection before causes of slowness.
pub(super) fn of(report: &Report) -> Verdict {
    if let Some(error) = &report.dns.error {
        let cause = format!("the name does not resolve: {error}");
        return by_proxy(report, "the name does not resolve here")
            .unwrap_or_else(|| broken("dns", Kind::Network, cause));
    }
    let answering = |address: &&Address| matches!(address.udp, Reach::Answered(_));
    let answering: Vec<_> = report.addresses.iter().filter(answering).collect();
    if answering.is_empty() {
        let verdict = by_proxy(report, "the server does not answer over UDP");
        return verdict.unwrap_or_else(|| unreachable(report));
    }
    if let Some(verdict) = answering.iter().find_map(|address| clock(report, address)) {
        return verdict;
    }
    let greeted = answering
        .iter()
        .any(|at| matches!(at.tls, Tls::Done { .. } | Tls::Not));
    if !greeted && let Some(verdict) = answering.iter().find_map(|address| handshake(address)) {
        return verdict;
    }
    session(report).unwrap_or_else(|| slow(report, &answering))
}

/// No session comes about although the server answers.
fn session(report: &Report) -> Option<Verdict> {
    match &report.session {
        Some(Session::Refused(text)) => Some(refused(text)),
        Some(Session::Failed(text)) => {
            let cause = format!("the server answers, but the session failed: {text}");
            Some(broken("session", Kind::Network, cause))
        }
        Some(Session::In { .. }) | None => None,
    }
}

fn broken(name: &'static str, kind: Kind, cause: String) -> Verdict {
    Verdict {
        name,
        cause,
        kind: Some(kind),
    }
}

fn works(name: &'static str, cause: String) -> Verdict {
    Verdict {
        name,
        cause,
        kind: None,
    }
}

/// What becomes of sessions that go over TCP through a proxy, because of `why`; `None` without one.
fn by_proxy(report: &Report, why: &str) -> Option<Verdict> {
    let through = report.through.as_ref()?;
    let proxy = &through.proxy;
    let broken = |kind, text: &str| {
        let cause = format!("{why}, and the proxy {proxy} does not lead to it: {text}");
        broken("proxy", kind, cause)
    };
    Some(match (&through.wss, &report.session) {
        (Tls::OtherKey(key), _) => broken(Kind::Auth, &format!("another key: {key}")),
        (Tls::Untrusted { text, .. }, _) => broken(Kind::Auth, text),
        (Tls::Failed(text), _) => broken(Kind::Network, text),
        (_, Some(Session::Refused(text))) => return Some(refused(text)),
        (_, Some(Session::Failed(text))) => broken(Kind::Network, text),
        (Tls::Done { .. } | Tls::Not, _) => {
            let cause = format!("{why}: sessions go over TCP, through the proxy {proxy}");
            works("proxy", cause)
        }
    })
}

fn refused(text: &str) -> Verdict {
    let cause = format!("the server does not let us in: {text}");
    broken("token", Kind::Auth, cause)
}

/// No server answers over UDP. Returns the most specific reason.
fn unreachable(report: &Report) -> Verdict {
    let network = |name, cause| broken(name, Kind::Network, cause);
    let all = &report.addresses;
    let port = report.server.rsplit(':').next().unwrap_or_default();
    if all.iter().any(|at| matches!(at.wss, Tls::Done { .. })) {
        let why = if all.iter().any(|at| at.udp == Reach::Refused) {
            "nobody listens at this UDP port"
        } else if all.iter().any(|at| at.udp == Reach::Forbidden) {
            "this machine's own firewall keeps UDP to the server from leaving"
        } else {
            "UDP is blocked on the way"
        };
        let cause = format!(
            "{why}: sessions go over TCP, port {port}, and connecting takes up to 0.3 s longer"
        );
        return session(report).unwrap_or_else(|| works("no_udp", cause));
    }
    if let Some(at) = all.iter().find(|at| at.udp == Reach::Refused) {
        let ip = at.address.ip();
        return network(
            "port",
            format!(
                "nobody listens at UDP port {port} of {ip}: the server does not run, or the port is another"
            ),
        );
    }
    if all.iter().any(|at| at.udp == Reach::Forbidden) {
        let cause = "this machine's own firewall keeps UDP to the server from leaving".to_owned();
        return network("firewall", cause);
    }
    let no_route = all.iter().filter_map(|at| match &at.udp {
        Reach::NoRoute(text) => Some(text),
        _ => None,
    });
    let no_route: Vec<_> = no_route.collect();
    if let Some(text) = no_route.first().filter(|_| no_route.len() == all.len()) {
        let cause = format!("this machine has no route to the server: {text}");
        return network("route", cause);
    }
    let tcp = |wanted: fn(&Reach) -> bool| all.iter().any(|at| wanted(&at.tcp));
    if tcp(|reach| matches!(reach, Reach::Answered(_))) {
        let cause = format!(
            "UDP is blocked on the way: TCP to port {port} gets through, UDP gets no answer"
        );
        return network("no_udp", cause);
    }
    if tcp(|reach| *reach == Reach::Refused) {
        let cause = format!(
            "UDP is blocked on the way or at the server: its machine answers by TCP, UDP port {port} stays silent"
        );
        return network("no_udp", cause);
    }
    let cause = "the server's machine answers neither UDP nor TCP: it is off, the address is another, or a firewall keeps all out";
    network("silent", cause.to_owned())
}

/// This machine and the certificate disagree about the time.
fn clock(report: &Report, at: &Address) -> Option<Verdict> {
    let here = when::utc(report.clock);
    match &at.tls {
        Tls::Done {
            valid: Some((from, to)),
            ..
        } => {
            let off = match report.clock {
                now if now < *from => from - now,
                now if now > *to => now - to,
                _ => return None,
            };
            let cause = format!(
                "a clock is wrong: here it is {here}, the server's certificate counts from {} to {}, so they are {} or more apart",
                when::utc(*from),
                when::utc(*to),
                show::long(off)
            );
            Some(works("clock", cause))
        }
        Tls::Untrusted { text, dates: true } => {
            let cause = format!(
                "this machine's clock ({here}) is wrong, or the server's certificate is out of date: {text}"
            );
            Some(broken("clock", Kind::Auth, cause))
        }
        _ => None,
    }
}

/// The server answers, and it is not the trusted one.
fn handshake(at: &Address) -> Option<Verdict> {
    let address = at.address;
    Some(match &at.tls {
        Tls::OtherKey(presented) => broken(
            "key",
            Kind::Auth,
            format!("{address} has another key than the one to expect: {presented}"),
        ),
        Tls::Untrusted { text, .. } => broken(
            "certificate",
            Kind::Auth,
            format!("nobody vouches for the server, and no key is given to expect: {text}"),
        ),
        Tls::Failed(text) => broken(
            "handshake",
            Kind::Network,
            format!("{address} answers, but no connection comes about: {text}"),
        ),
        Tls::Done { .. } | Tls::Not => return None,
    })
}

/// A connection is possible. What makes it slow?
fn slow(report: &Report, answering: &[&Address]) -> Verdict {
    let lossy = |at: &&&Address| at.trips.loss() >= LOSSY && at.trips.sent - at.trips.came > 1;
    if let Some(at) = answering.iter().find(lossy) {
        let (lost, sent) = (at.trips.sent - at.trips.came, at.trips.sent);
        let cause = format!(
            "the path loses packets: {lost} of {sent} round trips to {} did not come back",
            at.address
        );
        return works("loss", cause);
    }
    for at in answering {
        if let Some(path) = at.path
            && path.through < path.link
        {
            let headers = if at.address.is_ipv6() { 48 } else { 28 };
            let (through, link) = (path.through + headers, path.link + headers);
            let cause = format!(
                "packets of more than {through} bytes vanish on the way (this machine's link takes {link}): a tunnel or VPN; transfers work, with smaller packets"
            );
            return works("mtu", cause);
        }
    }
    let dead = report.addresses.len() - answering.len();
    if dead > 0 {
        let verb = if dead == 1 { "does" } else { "do" };
        let all = report.addresses.len();
        let cause = format!(
            "everything works, but {dead} of {all} addresses {verb} not answer: connecting may take 250 ms longer for each"
        );
        return works("address", cause);
    }
    works("ok", "everything works".to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Dns, Path, Through, Trips};
    use super::*;

    const MS: Duration = Duration::from_millis(10);
    const NOW: i64 = 1_800_000_000;

    fn good() -> Address {
        Address {
            address: "192.0.2.7:45456".parse().unwrap(),
            udp: Reach::Answered(MS),
            trips: Trips {
                sent: 20,
                came: 20,
                min: MS,
                sum: MS * 20,
                max: MS,
            },
            path: Some(Path {
                through: 1472,
                link: 1472,
            }),
            tls: Tls::Done {
                took: MS,
                valid: Some((NOW - 86_400, NOW + 86_400)),
            },
            tcp: Reach::Refused,
            wss: Tls::Not,
        }
    }

    fn verdict(addresses: &[Address]) -> Verdict {
        of(&report(addresses))
    }

    fn report(addresses: &[Address]) -> Report {
        Report {
            server: "host:45456".to_owned(),
            addresses: addresses.to_vec(),
            clock: NOW,
            ..Report::default()
        }
    }

    fn mute(tcp: Reach) -> Address {
        Address {
            udp: Reach::Silent(MS),
            trips: Trips::default(),
            path: None,
            tls: Tls::Not,
            tcp,
            ..good()
        }
    }

    #[test]
    fn a_good_network_is_called_so() {
        let verdict = verdict(&[good()]);
        assert_eq!((verdict.name, verdict.kind), ("ok", None));
        assert_eq!(verdict.cause, "everything works");
    }

    #[test]
    fn silence_has_a_cause_by_what_tcp_says() {
        let opens = Reach::Answered(MS);
        for (tcp, name) in [
            (opens, "no_udp"),
            (Reach::Refused, "no_udp"),
            (Reach::Silent(MS), "silent"),
        ] {
            let verdict = verdict(&[mute(tcp)]);
            assert_eq!((verdict.name, verdict.kind), (name, Some(Kind::Network)));
        }
    }

    #[test]
    fn what_goes_over_tcp_works_whatever_udp_says() {
        let done = || Tls::Done {
            took: MS,
            valid: None,
        };
        for (udp, why) in [
            (Reach::Silent(MS), "blocked on the way"),
            (Reach::Refused, "nobody listens"),
            (Reach::Forbidden, "own firewall"),
            (Reach::NoRoute("no route".to_owned()), "blocked"),
        ] {
            let at = Address {
                udp,
                wss: done(),
                ..mute(Reach::Answered(MS))
            };
            let mut report = report(&[at]);
            let verdict = of(&report);
            assert_eq!((verdict.name, verdict.kind), ("no_udp", None));
            assert!(verdict.cause.contains(why), "{}", verdict.cause);
            // A token that is refused there is refused.
            report.session = Some(Session::Refused("no".to_owned()));
            assert_eq!(of(&report).kind, Some(Kind::Auth));
        }
    }

    #[test]
    fn an_empty_port_and_a_missing_route_are_told_apart() {
        let at = |udp| Address {
            udp,
            ..mute(Reach::Silent(MS))
        };
        let no_route = || at(Reach::NoRoute("network unreachable".to_owned()));
        assert_eq!(verdict(&[no_route()]).name, "route");
        assert_eq!(verdict(&[no_route(), at(Reach::Refused)]).name, "port");
        // IPv6 without a route says nothing of why IPv4 is silent.
        assert_eq!(verdict(&[no_route(), mute(Reach::Refused)]).name, "no_udp");
        assert_eq!(verdict(&[at(Reach::Forbidden)]).name, "firewall");
        let mut unnamed = report(&[]);
        unnamed.dns = Dns {
            took: MS,
            error: Some("no such name".to_owned()),
        };
        assert_eq!(of(&unnamed).name, "dns");
    }

    #[test]
    fn a_clock_a_year_off_is_said_however_it_shows() {
        let year = 365 * 86_400;
        for off in [-year, year] {
            let mut report = report(&[good()]);
            report.clock += off;
            let verdict = of(&report);
            assert_eq!((verdict.name, verdict.kind), ("clock", None));
            assert!(verdict.cause.contains("364 days"), "{}", verdict.cause);
        }
        let tls = Tls::Untrusted {
            text: "certificate expired".to_owned(),
            dates: true,
        };
        let verdict = verdict(&[Address { tls, ..good() }]);
        assert_eq!((verdict.name, verdict.kind), ("clock", Some(Kind::Auth)));
    }

    #[test]
    fn what_is_slow_is_no_failure() {
        let mut lossy = good();
        lossy.trips.came = 13;
        assert_eq!(verdict(&[lossy]).name, "loss");
        // One of twenty may be chance.
        let mut once = good();
        once.trips.came = 19;
        assert_eq!(verdict(&[once]).name, "ok");
        let mut narrow = good();
        narrow.path = Some(Path {
            through: 1272,
            link: 1472,
        });
        let narrow = verdict(&[narrow]);
        assert_eq!((narrow.name, narrow.kind), ("mtu", None));
        assert!(
            narrow.cause.contains("more than 1300 bytes"),
            "{}",
            narrow.cause
        );
        let verdict = verdict(&[good(), mute(Reach::Silent(MS))]);
        assert_eq!((verdict.name, verdict.kind), ("address", None));
    }

    #[test]
    fn a_proxy_counts_where_udp_does_not_pass() {
        let done = || Tls::Done {
            took: MS,
            valid: None,
        };
        let through = |wss| {
            Some(Through {
                proxy: "10.0.0.1:3128".to_owned(),
                wss,
            })
        };
        let mut mute = report(&[mute(Reach::Silent(MS))]);
        mute.through = through(done());
        let found = of(&mute);
        assert_eq!((found.name, found.kind), ("proxy", None));
        assert!(
            found.cause.contains("through the proxy 10.0.0.1:3128"),
            "{}",
            found.cause
        );
        mute.session = Some(Session::Refused("no".to_owned()));
        assert_eq!(of(&mute).name, "token");
        mute.session = None;
        mute.through = through(Tls::Failed("it answers 502".to_owned()));
        let found = of(&mute);
        assert_eq!((found.name, found.kind), ("proxy", Some(Kind::Network)));
        assert!(found.cause.contains("it answers 502"), "{}", found.cause);
        mute.through = through(Tls::OtherKey("sha256:00".to_owned()));
        assert_eq!(of(&mute).kind, Some(Kind::Auth));
        // A name that only the proxy can resolve.
        let mut unnamed = report(&[]);
        unnamed.dns.error = Some("no such name".to_owned());
        unnamed.through = through(done());
        assert_eq!((of(&unnamed).name, of(&unnamed).kind), ("proxy", None));
        // Where UDP passes it does not matter.
        let mut good = report(&[good()]);
        good.through = through(Tls::Failed("nobody".to_owned()));
        assert_eq!(of(&good).name, "ok");
    }

    #[test]
    fn a_wrong_key_at_every_address_is_the_cause() {
        let other = Address {
            tls: Tls::OtherKey("sha256:00".to_owned()),
            ..good()
        };
        assert_eq!(verdict(std::slice::from_ref(&other)).name, "key");
        assert_eq!(verdict(&[other, good()]).name, "ok");
        let mut refused = report(&[good()]);
        refused.session = Some(Session::Refused("no".to_owned()));
        assert_eq!(of(&refused).kind, Some(Kind::Auth));
    }
}
