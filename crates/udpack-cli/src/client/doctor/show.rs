//! The report as lines and as JSON.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Address, Reach, Report, Session, Tls, Trips, Verdict};
use crate::exit::Kind;
use crate::when;

/// One screen, the cause last.
pub(super) fn lines(report: &Report, verdict: &Verdict) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = |label: &str, text: String| lines.push(format!("{label:<9}{text}"));
    let given = |given, what| if given { what } else { "none" };
    line(
        "server",
        format!(
            "{}, key {}, token {}",
            report.server,
            given(report.key, "given"),
            given(report.token, "given")
        ),
    );
    let dns = match &report.dns.error {
        Some(error) => error.clone(),
        None => {
            let count = report.addresses.len();
            let noun = if count == 1 { "address" } else { "addresses" };
            format!("{count} {noun} in {}", ms(report.dns.took))
        }
    };
    line("dns", dns);
    for at in &report.addresses {
        line("address", at.address.to_string());
        line("  udp", udp(at));
        if let Some(path) = at.path {
            line(
                "  mtu",
                format!(
                    "datagrams of up to {} bytes arrive, of {} tried",
                    path.through, path.link
                ),
            );
        }
        match &at.tls {
            Tls::Not => {}
            tls => line("  tls", tls_text(tls)),
        }
        line("  tcp", reach(&at.tcp, "open"));
        match &at.wss {
            Tls::Not => {}
            wss => line("  wss", tls_text(wss)),
        }
    }
    if let Some(session) = &report.session {
        line("session", session_text(session));
    }
    let proxies = report.proxies.iter();
    let proxies: Vec<_> = proxies
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    line(
        "proxy",
        match proxies.is_empty() {
            true => "none".to_owned(),
            false => format!("{}; QUIC goes past it", proxies.join(" ")),
        },
    );
    if let Some(through) = &report.through {
        let said = tls_text(&through.wss);
        line("  wss", format!("through {}: {said}", through.proxy));
    }
    line("clock", clock(report));
    line("cause", verdict.cause.clone());
    lines
}

fn udp(at: &Address) -> String {
    let first = reach(&at.udp, "answers");
    match at.trips.sent {
        0 => first,
        sent => format!(
            "{first}; {} of {sent} came back, {}",
            at.trips.came,
            times(&at.trips)
        ),
    }
}

fn times(trips: &Trips) -> String {
    match trips.came {
        0 => "none timed".to_owned(),
        came => format!(
            "min/avg/max {:.1}/{:.1}/{:.1} ms",
            millis(trips.min),
            millis(trips.sum / came),
            millis(trips.max)
        ),
    }
}

fn reach(reach: &Reach, answered: &str) -> String {
    match reach {
        Reach::Answered(took) => format!("{answered}, {}", ms(*took)),
        Reach::Refused => "refused: nobody listens there".to_owned(),
        Reach::NoRoute(text) => format!("no way there: {text}"),
        Reach::Forbidden => "kept back by this machine".to_owned(),
        Reach::Silent(waited) => format!("no answer within {:.1} s", waited.as_secs_f64()),
    }
}

fn tls_text(tls: &Tls) -> String {
    match tls {
        Tls::Not => "not tried".to_owned(),
        Tls::Done { took, .. } => format!("the expected server, {}", ms(*took)),
        Tls::OtherKey(key) => format!("another key: {key}"),
        Tls::Untrusted { text, .. } => format!("not trusted: {text}"),
        Tls::Failed(text) => format!("failed: {text}"),
    }
}

fn session_text(session: &Session) -> String {
    match session {
        Session::In { trips } if trips.came == 0 => "let in; it answers no pings".to_owned(),
        Session::In { trips } => format!("let in; {} pings, {}", trips.came, times(trips)),
        Session::Refused(text) | Session::Failed(text) => text.clone(),
    }
}

fn clock(report: &Report) -> String {
    let here = when::utc(report.clock);
    match valid(report) {
        None => format!("{here}; nothing at hand to compare it with"),
        Some((from, to)) if (from..=to).contains(&report.clock) => {
            format!("{here}, within the dates of the server's certificate")
        }
        Some((from, to)) => format!(
            "{here}; the server's certificate has {} to {}",
            when::utc(from),
            when::utc(to)
        ),
    }
}

fn valid(report: &Report) -> Option<(i64, i64)> {
    report.addresses.iter().find_map(|at| match at.tls {
        Tls::Done { valid, .. } => valid,
        _ => None,
    })
}

/// A time of days or less, in words.
pub(super) fn long(secs: i64) -> String {
    match secs {
        0..7200 => format!("{} minutes", secs / 60),
        7200..172_800 => format!("{} hours", secs / 3600),
        _ => format!("{} days", secs / 86_400),
    }
}

/// Milliseconds, to the microsecond.
fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", millis(time))
}

/// One object.
pub(super) fn json(report: &Report, verdict: &Verdict) -> Value {
    let addresses: Vec<_> = report.addresses.iter().map(address_json).collect();
    let proxies = report.proxies.iter();
    let proxies: serde_json::Map<_, _> = proxies
        .map(|(name, value)| ((*name).to_owned(), json!(value)))
        .collect();
    let valid = valid(report);
    json!({
        "event": "result",
        "status": if verdict.kind.is_none() { "ok" } else { "error" },
        "exit": verdict.kind.map_or(0, Kind::code),
        "cause": verdict.name,
        "text": verdict.cause,
        "server": report.server,
        "key": report.key,
        "token": report.token,
        "dns": { "ms": millis(report.dns.took), "error": report.dns.error },
        "addresses": addresses,
        "session": report.session.as_ref().map(|session| match session {
            Session::In { trips } => json!({ "status": "in", "pings": trips_json(trips) }),
            Session::Refused(text) => json!({ "status": "refused", "text": text }),
            Session::Failed(text) => json!({ "status": "failed", "text": text }),
        }),
        "proxy": proxies,
        "through_proxy": report.through.as_ref().map(|through| json!({
            "proxy": through.proxy,
            "wss": tls_json(&through.wss),
        })),
        "clock": {
            "here": when::utc(report.clock),
            "certificate_from": valid.map(|(from, _)| when::utc(from)),
            "certificate_to": valid.map(|(_, to)| when::utc(to)),
        },
    })
}

fn address_json(at: &Address) -> Value {
    json!({
        "address": at.address.to_string(),
        "udp": reach_json(&at.udp),
        "trips": trips_json(&at.trips),
        "mtu": at.path.map(|path| json!({ "through": path.through, "tried": path.link })),
        "tls": tls_json(&at.tls),
        "tcp": reach_json(&at.tcp),
        "wss": tls_json(&at.wss),
    })
}

fn tls_json(tls: &Tls) -> Value {
    match tls {
        Tls::Not => json!({ "status": "not_tried" }),
        Tls::Done { took, .. } => json!({ "status": "ok", "ms": millis(*took) }),
        Tls::OtherKey(key) => json!({ "status": "other_key", "presented": key }),
        Tls::Untrusted { text, .. } => json!({ "status": "untrusted", "text": text }),
        Tls::Failed(text) => json!({ "status": "failed", "text": text }),
    }
}

fn reach_json(reach: &Reach) -> Value {
    match reach {
        Reach::Answered(took) => json!({ "status": "ok", "ms": millis(*took) }),
        Reach::Refused => json!({ "status": "refused" }),
        Reach::NoRoute(text) => json!({ "status": "no_route", "text": text }),
        Reach::Forbidden => json!({ "status": "forbidden" }),
        Reach::Silent(waited) => json!({ "status": "silent", "ms": millis(*waited) }),
    }
}

fn trips_json(trips: &Trips) -> Value {
    let timed = |time: Duration| (trips.came > 0).then(|| millis(time));
    json!({
        "sent": trips.sent,
        "came": trips.came,
        "min": timed(trips.min),
        "avg": timed(trips.sum / trips.came.max(1)),
        "max": timed(trips.max),
    })
}
