//! `--web`, with the real binaries: what a start prints, what the port says, what outlasts a restart.
#![cfg(feature = "web")]

mod common;

use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{Running, client, exited, has_program, installed, quiet, server, workdir};
use serde_json::Value;

/// A server with pages, and the link that it prints.
fn start(dir: &Path, args: &[&str]) -> (Running, String) {
    let args = ["--listen", "127.0.0.1:0", "--web", "127.0.0.1:0"]
        .iter()
        .chain(args);
    let mut running = Running::spawn(server(dir).args(args));
    let link = loop {
        let line = running.line();
        if let Some(link) = line.strip_prefix("web ") {
            break link.to_owned();
        }
    };
    (running, link)
}

/// The body of what is at this path.
fn get(link: &str, path: &str) -> String {
    let authority = link.strip_prefix("http://").expect("plain on loopback");
    let authority = authority.trim_end_matches('/');
    let mut stream = TcpStream::connect(authority).expect("somebody listens");
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).expect("a timeout");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("written");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
    let (_, body) = text.split_once("\r\n\r\n").expect("a body");
    body.to_owned()
}

fn told(link: &str) -> Value {
    serde_json::from_str(&get(link, "/.well-known/udpack.json")).expect("JSON")
}

#[test]
fn pages_are_served_and_their_hashes_outlast_a_restart() {
    let dir = workdir();
    let (mut first, link) = start(dir.path(), &[]);
    assert!(!link.contains('#'), "no token where nobody looks: {link}");
    assert!(get(&link, "/").contains("<title>udpack</title>"));
    assert!(get(&link, "/metrics").contains("udpack_sockets_admitted_total 0"));
    let before = told(&link);
    assert_eq!(before["hashes"].as_array().map(Vec::len), Some(2));
    first.signal("TERM");
    assert_eq!(first.exited().code, 0);
    let (_second, link) = start(dir.path(), &[]);
    assert_eq!(told(&link)["hashes"], before["hashes"]);
}

#[test]
fn the_link_with_its_token_is_shown_on_request_until_a_start_without_pages() {
    let dir = workdir();
    let (mut running, link) = start(dir.path(), &[]);
    let token = fs::read_to_string(dir.path().join("keys/token")).expect("a token");
    let token = token.split_whitespace().next_back().expect("a token");
    let out = exited(server(dir.path()).args(["url", "--web"]));
    assert_eq!(out.stdout, format!("{link}#t={token}\n"), "{out:?}");
    let out = exited(server(dir.path()).args(["url", "--web", "--json"]));
    let shown: Value = serde_json::from_str(&out.stdout).expect("JSON");
    assert_eq!(shown["web"], format!("{link}#t={token}"));
    running.signal("TERM");
    assert_eq!(running.exited().code, 0);
    let mut without = Running::spawn(server(dir.path()).args(["--listen", "127.0.0.1:0"]));
    assert!(without.line().starts_with("listening "));
    assert!(
        (0..2)
            .map(|_| without.line())
            .all(|line| !line.contains("web"))
    );
    let _ = without.line();
    let out = exited(server(dir.path()).args(["url", "--web"]));
    assert_eq!(out.code, 3, "{out:?}");
    assert!(out.stderr.contains("--web"), "{out:?}");
}

#[test]
fn what_cannot_be_is_told_before_anything_is_made() {
    let dir = workdir();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let web = ["--listen", "127.0.0.1:0", "--web", &address];
    let out = exited(server(dir.path()).args(web));
    assert_eq!(out.code, 1, "{out:?}");
    assert!(out.stderr.contains("--web"), "{out:?}");
    let origin = ["--web", "--web-origin", "example.com"];
    let out = exited(server(dir.path()).args(origin));
    assert_eq!(out.code, 2, "{out:?}");
    let alone = ["--web-origin", "https://example.com"];
    let out = exited(server(dir.path()).args(alone));
    assert_eq!(out.code, 2, "{out:?}");
    assert!(!dir.path().join("keys").exists());
}

/// An authority, and the files that it has signed.
struct Authority {
    issuer: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
    chain: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn new(dir: &Path) -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().expect("a key");
        Self {
            issuer: rcgen::CertifiedIssuer::self_signed(params, key).expect("an authority"),
            chain: dir.join("fullchain.pem"),
            key: dir.join("privkey.pem"),
        }
    }

    /// Signs a new key, and replaces the files one after the other.
    fn sign(&self) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(["files.example".to_owned()]);
        let leaf = params.expect("a name").signed_by(&key, &self.issuer);
        let chain = leaf.expect("a certificate").pem() + &self.issuer.pem();
        for (path, text) in [(&self.chain, chain), (&self.key, key.serialize_pem())] {
            let new = path.with_extension("new");
            fs::write(&new, text).expect("written");
            fs::set_permissions(&new, Permissions::from_mode(0o600)).expect("ours");
            fs::rename(new, path).expect("renamed");
        }
    }

    fn args(&self) -> [String; 6] {
        let path = |path: &Path| path.display().to_string();
        let [chain, key] = [path(&self.chain), path(&self.key)];
        let [cert, secret] = ["--tls-cert".to_owned(), "--tls-key".to_owned()];
        let name = ["--public-host".to_owned(), "files.example".to_owned()];
        let [host, name] = name;
        [cert, chain, secret, key, host, name]
    }

    /// The certificate that a client is served that trusts this authority and nobody else, and what it reads.
    fn served(&self, port: &str, path: &str) -> (Vec<u8>, String) {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.issuer.der().clone()).expect("an authority");
        let config = rustls::ClientConfig::builder_with_provider(provider.into())
            .with_safe_default_protocol_versions()
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = "files.example".try_into().expect("a name");
        let tls = rustls::ClientConnection::new(config.into(), name).expect("a client");
        let tcp = TcpStream::connect(format!("127.0.0.1:{port}")).expect("somebody listens");
        let patience = Some(Duration::from_secs(30));
        tcp.set_read_timeout(patience).expect("a timeout");
        let mut stream = rustls::StreamOwned::new(tls, tcp);
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: files.example:{port}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).expect("trusted");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        let chain = stream.conn.peer_certificates().expect("a chain");
        assert_eq!(chain.len(), 2);
        let (_, body) = text.split_once("\r\n\r\n").expect("a body");
        (chain[0].to_vec(), body.to_owned())
    }
}

#[test]
fn a_certificate_of_an_authority_is_served_to_browsers_and_follows_its_files() {
    let dir = workdir();
    let authority = Authority::new(dir.path());
    authority.sign();
    let args = authority.args();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (mut running, link) = start(dir.path(), &args);
    let port = link
        .strip_prefix("https://files.example:")
        .expect("by its name");
    let port = port.trim_end_matches('/');
    let (first, told) = authority.served(port, "/.well-known/udpack.json");
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(told["hashes"], serde_json::json!([]));

    // Who pins the server's key does so as before.
    let file = dir.path().join("a file");
    fs::write(&file, "bytes").expect("written");
    let paste = exited(server(dir.path()).args(["url", "--public-host", "127.0.0.1"])).stdout;
    let out = exited(
        client(dir.path())
            .env("UDPACK_URL", paste.trim())
            .arg("put")
            .arg(&file),
    );
    assert_eq!(out.code, 0, "{out:?}");

    authority.sign();
    running.told("the certificate for browsers was read again");
    let (second, _) = authority.served(port, "/healthz");
    assert_ne!(second, first);
    fs::write(&authority.chain, "no certificate").expect("written");
    running.signal("HUP");
    let told = running.told("the certificate for browsers stays as it was");
    let path = authority.chain.display().to_string();
    assert!(told.contains(&path), "{told}");
    assert_eq!(authority.served(port, "/healthz").0, second);
    running.signal("TERM");
    assert_eq!(running.exited().code, 0);
}

#[test]
fn files_that_are_no_certificate_are_named() {
    let dir = workdir();
    let authority = Authority::new(dir.path());
    authority.sign();
    let refused = |what: &str| {
        let web = ["--listen", "127.0.0.1:0", "--web", "127.0.0.1:0"];
        let out = exited(server(dir.path()).args(web).args(authority.args()));
        assert_eq!(out.code, 3, "{out:?}");
        assert!(out.stderr.contains(what), "{out:?}");
        assert!(out.stderr.contains("--tls-key"), "{out:?}");
        assert!(!dir.path().join("keys").exists());
    };
    fs::set_permissions(&authority.key, Permissions::from_mode(0o604)).expect("ours");
    refused("privkey.pem has mode 0604");
    fs::write(&authority.key, "no key").expect("written");
    fs::set_permissions(&authority.key, Permissions::from_mode(0o600)).expect("ours");
    refused("no private key in ");
    fs::remove_file(&authority.chain).expect("removed");
    refused("fullchain.pem: No such file");
    let alone = ["--web", "--tls-cert", "x"];
    assert_eq!(exited(server(dir.path()).args(alone)).code, 2);
}

/// The objects that a command prints.
fn printed(out: &common::Exited) -> Vec<Value> {
    assert_eq!(out.code, 0, "{out:?}");
    let lines = out.stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[test]
fn a_link_is_made_listed_and_revoked() {
    let dir = workdir();
    let (_running, link) = start(dir.path(), &[]);
    let new = ["token", "new", "anna", "--scope", "write,share", "--json"];
    let host = ["--public-host", "127.0.0.1"];
    let anna = printed(&exited(server(dir.path()).args(new).args(host)));
    let anna = anna[0]["url"].as_str().expect("a URL").to_owned();
    let file = dir.path().join("file");
    fs::write(&file, vec![7; 5_000]).expect("written");
    let run =
        |url: &str, args: &[&str]| exited(client(dir.path()).env("UDPACK_URL", url).args(args));
    let put = |url: &str| run(url, &["put", file.to_str().expect("text")]);

    let wanted = [
        "share",
        "in box/anna/",
        "--quota",
        "6K",
        "--expires",
        "7d",
        "--json",
    ];
    let made = printed(&run(&anna, &wanted)).remove(0);
    let text = |key: &str| made[key].as_str().expect("text").to_owned();
    assert_eq!(text("web"), format!("{link}#t={}", text("token")));
    assert_eq!(put(&text("url")).code, 0);
    let stored = dir.path().join("uploads/in box/anna/file");
    assert_eq!(fs::read(stored).expect("stored").len(), 5_000);
    fs::write(&file, vec![8; 5_000]).expect("written");
    let full = run(&text("url"), &["put", "file", "--as", "other"]);
    assert_eq!(full.code, 6, "{full:?}");
    assert!(full.stderr.contains("quota"), "{full:?}");
    let read = run(&anna, &["share", "--read"]);
    assert_eq!(read.code, 6, "{read:?}");
    assert!(read.stderr.contains("no right to read"), "{read:?}");

    let once = run(&anna, &["share", "--once"]);
    assert_eq!(once.code, 0, "{once:?}");
    let line = once.stdout.lines().last().expect("a line");
    let url = line.split('\'').nth(1).expect("a URL").to_owned();
    assert!(url.starts_with("udpack://once~"), "{once:?}");
    assert_eq!(put(&url).code, 0);
    let again = put(&url);
    assert_eq!(again.code, 4, "{again:?}");

    let listed = printed(&run(&anna, &["share", "--list", "--json"]));
    let shares: Vec<_> = listed
        .iter()
        .filter(|line| line["event"] == "share")
        .collect();
    assert_eq!(shares.len(), 2);
    assert_eq!(
        (&shares[0]["prefix"], &shares[0]["used"]),
        (&"in box/anna".into(), &false.into())
    );
    assert_eq!(
        (&shares[1]["once"], &shares[1]["used"]),
        (&true.into(), &true.into())
    );
    assert_eq!(run(&anna, &["share", "--revoke", &text("name")]).code, 0);
    assert_eq!(put(&text("url")).code, 4);
    let gone = run(&anna, &["share", "--revoke", &text("name")]);
    assert_eq!(gone.code, 12, "{gone:?}");
    let list = run(&anna, &["share", "--list"]).stdout;
    assert_eq!(list.lines().count(), 1, "{list}");
    assert!(
        list.contains("  /  write  ends in 24 hours  used"),
        "{list}"
    );
}

#[test]
fn a_terminal_sees_the_token_and_its_picture_once() {
    if !has_program("script", "--version") {
        return;
    }
    let dir = workdir();
    let screen = dir.path().join("screen");
    let shown = || String::from_utf8_lossy(&fs::read(&screen).unwrap_or_default()).into_owned();
    let start = |columns: &str| {
        let command = format!(
            "stty cols {columns}; exec udpack-server --listen 127.0.0.1:0 --web 127.0.0.1:0"
        );
        let mut running = Running::spawn(
            quiet(Command::new("script"), dir.path())
                .env("PATH", installed())
                .args(["-qefc", &command])
                .arg(&screen),
        );
        common::until("it is started", || {
            shown().contains("udpack-client put FILE")
        });
        let seen = shown();
        running.signal("TERM");
        let _ = running.exited();
        seen
    };
    let seen = start("80");
    let link = seen.lines().find_map(|line| line.strip_prefix("web "));
    assert!(link.is_some_and(|link| link.contains("/#t=")), "{seen}");
    let picture = seen.lines().filter(|line| line.contains("\u{1b}[30;107m"));
    assert_eq!(picture.count(), 21, "{seen}");
    fs::remove_file(&screen).expect("a file");
    let seen = start("80");
    assert!(
        seen.contains("web http://") && !seen.contains("#t="),
        "{seen}"
    );
    assert!(!seen.contains("\u{1b}[30;107m"), "{seen}");
}
