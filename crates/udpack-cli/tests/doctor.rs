//! `doctor` names the cause, on networks that are broken in one way each.

mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[path = "../../udpack/tests/common/namespaces.rs"]
mod namespaces;

use std::net::TcpListener;

use common::{Exited, Server, client, exited, has_program, workdir};
use hosts::{on, only_by_proxy};
use namespaces::Hosts;
use serde_json::Value;
use udpack::{Channel, Deny, Hello, Identity, Peer};

/// `udpack-server` on the server's host.
fn serve(hosts: &Hosts) -> Server {
    serve_with(hosts, &[])
}

fn serve_with(hosts: &Hosts, args: &[&str]) -> Server {
    let dir = workdir();
    let mut command = on(
        &hosts.server,
        env!("CARGO_BIN_EXE_udpack-server"),
        dir.path(),
    );
    command.args(["--listen", "[::]:4433", "--public-host", "10.203.0.2"]);
    command.args(args);
    Server::started(command, dir)
}

/// What `doctor` says on the client's host, with the server's URL or of this address.
fn doctor(hosts: &Hosts, url: &str, args: &[&str]) -> Exited {
    let dir = workdir();
    let program = env!("CARGO_BIN_EXE_udpack-client");
    let mut command = on(&hosts.client, program, dir.path());
    command.env("UDPACK_URL", url).arg("doctor").args(args);
    exited(&mut command)
}

/// The one object of `--json`, and the exit code.
fn report(out: &Exited) -> (Value, i32) {
    let report: Value = serde_json::from_str(&out.stdout).unwrap_or_else(|_| panic!("{out:?}"));
    assert_eq!(report["exit"], out.code, "{out:?}");
    (report, out.code)
}

#[test]
fn a_network_that_works_is_called_so_on_one_screen() {
    let Some(hosts) = Hosts::new() else { return };
    let server = serve(&hosts);
    let out = doctor(&hosts, &server.url(), &[]);
    assert_eq!(out.code, 0, "{out:?}");
    let lines: Vec<_> = out.stdout.lines().collect();
    assert_eq!(lines.last(), Some(&"cause    everything works"), "{out:?}");
    assert!(lines.len() < 24, "{out:?}");
    assert!(lines.iter().all(|line| line.len() <= 120), "{out:?}");
    for start in [
        "server   10.203.0.2:4433, key given, token given",
        "dns      1 address in ",
        "address  10.203.0.2:4433",
        "  udp    answers, ",
        "  mtu    datagrams of up to 1472 bytes arrive, of 1472 tried",
        "  tls    the expected server, ",
        "  tcp    open, ",
        "  wss    the expected server, ",
        "session  let in; 20 pings, min/avg/max ",
        "proxy    none",
        "clock    20",
    ] {
        assert!(
            lines.iter().any(|line| line.starts_with(start)),
            "{start}: {out:?}"
        );
    }
    assert!(
        out.stdout
            .contains("within the dates of the server's certificate")
    );
    // Neither key nor token.
    let (report, code) = report(&doctor(&hosts, "", &["[fd00:203::2]:4433", "--json"]));
    assert_eq!(
        (report["cause"].as_str(), code),
        (Some("ok"), 0),
        "{report}"
    );
    assert_eq!(report["key"], false);
    assert_eq!(report["addresses"][0]["trips"]["came"], 20, "{report}");
    assert_eq!(report["addresses"][0]["mtu"]["through"], 1452, "{report}");
}

#[test]
fn no_udp() {
    let Some(hosts) = Hosts::new() else { return };
    let server = serve_with(&hosts, &["--no-tcp"]);
    hosts.server.nft("meta l4proto udp", "drop");
    // TCP is refused, and then taken.
    for open in [false, true] {
        let _listener = open.then(|| {
            let listening = hosts.server.run(|| TcpListener::bind("[::]:4433"));
            listening.join().expect("no panic").expect("a free port")
        });
        let out = doctor(&hosts, &server.url(), &["--json"]);
        let (report, code) = report(&out);
        assert_eq!(
            (report["cause"].as_str(), code),
            (Some("no_udp"), 5),
            "{report}"
        );
        assert!(
            report["text"]
                .as_str()
                .is_some_and(|text| text.contains("UDP is blocked"))
        );
        let tcp = if open { "ok" } else { "refused" };
        assert_eq!(report["addresses"][0]["tcp"]["status"], tcp, "{report}");
    }
}

#[test]
fn no_udp_and_a_server_that_takes_websockets() {
    let Some(hosts) = Hosts::new() else { return };
    let server = serve(&hosts);
    hosts.server.nft("meta l4proto udp", "drop");
    let out = doctor(&hosts, &server.url(), &["--json"]);
    let (report, code) = report(&out);
    assert_eq!(
        (report["cause"].as_str(), code),
        (Some("no_udp"), 0),
        "{report}"
    );
    let text = report["text"].as_str().expect("a text");
    assert!(text.contains("sessions go over TCP, port 4433"), "{text}");
    assert_eq!(report["addresses"][0]["wss"]["status"], "ok", "{report}");
    // And so they do, with no flag.
    let dir = workdir();
    std::fs::write(dir.path().join("file"), b"over TCP").expect("a file");
    let program = env!("CARGO_BIN_EXE_udpack-client");
    let mut put = on(&hosts.client, program, dir.path());
    put.env("UDPACK_URL", server.url()).args(["put", "file"]);
    let put = exited(&mut put);
    assert_eq!(put.code, 0, "{put:?}");
    assert!(put.stderr.contains("connected over TCP"), "{put:?}");
    assert!(put.stdout.starts_with("file  8  "), "{put:?}");
}

/// Only the way through the proxy is open, and only the proxy knows the name.
#[test]
fn a_proxy_is_the_only_way_out() {
    if !has_program("tinyproxy", "-v") {
        return;
    }
    let Some(hosts) = Hosts::new() else { return };
    let server = serve(&hosts);
    let dir = workdir();
    let _proxy = only_by_proxy(&hosts, dir.path());
    let by = |password: &str, args: &[&str]| {
        let dir = workdir();
        let mut command = on(
            &hosts.client,
            env!("CARGO_BIN_EXE_udpack-client"),
            dir.path(),
        );
        let proxy = format!("http://anna:{password}@10.203.0.2:3128");
        command
            .env("UDPACK_URL", server.url())
            .env("https_proxy", proxy);
        exited(command.arg("doctor").args(args))
    };
    let out = by("secret", &[]);
    assert_eq!(out.code, 0, "{out:?}");
    for said in [
        "  wss    through 10.203.0.2:3128: the expected server, ",
        "session  let in; 20 pings, ",
        "cause    the server does not answer over UDP: sessions go over TCP, through the proxy 10.203.0.2:3128",
    ] {
        assert!(out.stdout.contains(said), "{said}: {out:?}");
    }
    let (report, code) = report(&by("wrong", &["--json"]));
    assert_eq!(
        (report["cause"].as_str(), code),
        (Some("proxy"), 5),
        "{report}"
    );
    assert_eq!(
        report["through_proxy"]["wss"]["status"], "failed",
        "{report}"
    );
    let text = report["text"].as_str().expect("a text");
    assert!(
        text.contains("does not accept the user and password"),
        "{text}"
    );
    assert!(!report.to_string().contains("wrong"), "{report}");
}

#[test]
fn no_route() {
    let Some(hosts) = Hosts::new() else { return };
    for address in ["198.51.100.7:4433", "[2001:db8::7]:4433"] {
        let (report, code) = report(&doctor(&hosts, "", &[address, "--json"]));
        assert_eq!(
            (report["cause"].as_str(), code),
            (Some("route"), 5),
            "{report}"
        );
    }
}

#[test]
fn wrong_port() {
    let Some(hosts) = Hosts::new() else { return };
    let _server = serve(&hosts);
    for address in ["10.203.0.2:4434", "[fd00:203::2]:4434"] {
        let (report, code) = report(&doctor(&hosts, "", &[address, "--json"]));
        assert_eq!(
            (report["cause"].as_str(), code),
            (Some("port"), 5),
            "{report}"
        );
        let text = report["text"].as_str().unwrap_or_default();
        assert!(text.contains("nobody listens at UDP port 4434"), "{text}");
    }
}

#[test]
fn packets_above_1300_bytes_vanish() {
    let Some(hosts) = Hosts::new() else { return };
    let server = serve(&hosts);
    hosts.lose("meta length gt 1300");
    let (report, code) = report(&doctor(&hosts, &server.url(), &["--json"]));
    assert_eq!(
        (report["cause"].as_str(), code),
        (Some("mtu"), 0),
        "{report}"
    );
    let mtu = &report["addresses"][0]["mtu"];
    let through = mtu["through"].as_u64().unwrap_or_default();
    assert!((1268..=1272).contains(&through), "{report}");
    assert_eq!(mtu["tried"], 1472);
    assert_eq!(report["session"]["status"], "in");
}

#[test]
fn every_fifth_packet_is_lost() {
    let Some(hosts) = Hosts::new() else { return };
    let server = serve(&hosts);
    hosts.lose("meta l4proto udp numgen inc mod 5 eq 0");
    let (report, code) = report(&doctor(&hosts, &server.url(), &["--json"]));
    assert_eq!(
        (report["cause"].as_str(), code),
        (Some("loss"), 0),
        "{report}"
    );
    let came = report["addresses"][0]["trips"]["came"].as_u64();
    assert!(
        came.is_some_and(|came| (4..=17).contains(&came)),
        "{report}"
    );
    assert_eq!(report["addresses"][0]["mtu"]["through"], 1472, "{report}");
}

/// The server's certificate is that of a year ago, as if its clock or this machine's were a year off.
#[test]
fn a_clock_is_a_year_off() {
    let year = time::Duration::days(365);
    let then = time::OffsetDateTime::now_utc() - year;
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key");
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    params.not_before = then - time::Duration::HOUR;
    params.not_after = then + time::Duration::days(13);
    let certificate = params.self_signed(&key).expect("a certificate");
    let identity = Identity::from_pem(&certificate.pem(), &key.serialize_pem()).expect("its key");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let server = udpack::Server::builder()
        .identity(identity)
        .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
        .channel("other", |channel: Channel| async move {
            channel.recv().await.map(|_| ())
        })
        .bind("127.0.0.1:0");
    let server = runtime.block_on(server).expect("a free port");
    let (pin, address) = (server.fingerprint(), server.local_addr());
    let dir = workdir();
    let url = format!("udpack://token@{address}#{pin}");
    let doctor = |args: &[&str]| {
        exited(
            client(dir.path())
                .env("UDPACK_URL", &url)
                .arg("doctor")
                .args(args),
        )
    };
    let (report, code) = report(&doctor(&["--json"]));
    assert_eq!(
        (report["cause"].as_str(), code),
        (Some("clock"), 0),
        "{report}"
    );
    let text = report["text"].as_str().unwrap_or_default();
    assert!(
        text.starts_with("a clock is wrong: here it is 20"),
        "{text}"
    );
    assert!(
        text.contains("352 days") || text.contains("351 days"),
        "{text}"
    );
    let screen = doctor(&[]);
    assert!(
        screen.stdout.contains("\ncause    a clock is wrong: "),
        "{screen:?}"
    );
}

#[test]
fn a_name_without_address_and_a_missing_interface_are_named() {
    let dir = workdir();
    for (name, words) in [
        ("no-such-name.invalid", "does not resolve"),
        ("[fe80::1%nothing]:4433", "no network interface nothing"),
    ] {
        let out = exited(client(dir.path()).args(["doctor", name, "--json"]));
        let (report, code) = report(&out);
        assert_eq!(
            (report["cause"].as_str(), code),
            (Some("dns"), 5),
            "{report}"
        );
        let text = report["text"].as_str().unwrap_or_default();
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn a_refused_token_and_another_key_are_told_apart() {
    let server = Server::start();
    let dir = workdir();
    let ask = |url: &str| {
        let out = exited(
            client(dir.path())
                .env("UDPACK_URL", url)
                .args(["doctor", "--json"]),
        );
        let (report, code) = report(&out);
        assert_eq!(code, 4, "{report}");
        report["cause"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(
        ask(&server.url_with("another-token-than-the-right-one")),
        "token"
    );
    let url = server.url();
    let (before, _) = url.split_once("#sha256:").expect("a key");
    assert_eq!(ask(&format!("{before}#sha256:{}", "00".repeat(32))), "key");
}

/// By the name and by the number of the interface; and one that is not there is named.
#[test]
fn a_server_listens_on_a_link_local_address() {
    let Some(hosts) = Hosts::new() else { return };
    let link = hosts.server.ip("-o link show eth0").expect("a link");
    let number = link.split(':').next().expect("its number").to_owned();
    for zone in ["eth0", &number] {
        let dir = workdir();
        let mut command = on(
            &hosts.server,
            env!("CARGO_BIN_EXE_udpack-server"),
            dir.path(),
        );
        command.args(["--listen", &format!("[fe80::2%{zone}]:4433")]);
        let _server = Server::started(command, dir);
        let (report, code) = report(&doctor(&hosts, "", &["[fe80::2%eth0]:4433", "--json"]));
        assert_eq!(
            (report["cause"].as_str(), code),
            (Some("ok"), 0),
            "{report}"
        );
        let other = doctor(&hosts, "", &["10.203.0.2:4433", "--json"]);
        assert_eq!(self::report(&other).0["cause"], "port", "{other:?}");
    }
    let dir = workdir();
    let mut command = on(
        &hosts.server,
        env!("CARGO_BIN_EXE_udpack-server"),
        dir.path(),
    );
    let out = exited(command.args(["--listen", "[fe80::2%nothing]:4433"]));
    assert_eq!(out.code, 2, "{out:?}");
    let text = "there is no network interface nothing here, only lo, eth0";
    assert!(out.stderr.contains(text), "{out:?}");
}
