//! `--metrics`, `--qlog` and `request`, with the real binaries.

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use common::{Running, Server, assert_error, client, exited, server, workdir};
use udpack::{Channel, Context, Deny, Fault, Hello, Identity, Peer};

/// What the server answers to these bytes, head and body.
fn http(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("somebody listens");
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    // Whoever is cut off while it writes or reads sees less, or nothing.
    let _ = stream.write_all(request.as_bytes());
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    text
}

fn get(address: &str, path: &str) -> String {
    http(
        address,
        &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n"),
    )
}

/// A server with these flags, its URL and the address of its metrics.
fn start(dir: &std::path::Path, args: &[&str]) -> (Running, String, String) {
    let mut running = Running::spawn(
        server(dir)
            .args(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"])
            .args(args),
    );
    let lines: Vec<String> = (0..5).map(|_| running.line()).collect();
    let url = common::url(dir, &lines[4]);
    let metrics = lines[3].strip_prefix("metrics ").expect("the address");
    assert!(!metrics.ends_with(":0"), "the real port");
    (running, url, metrics.to_owned())
}

#[test]
fn the_log_names_address_and_token_of_what_is_stored_sent_and_removed() {
    let dir = workdir();
    let (mut running, url, _) = start(dir.path(), &["--allow-read"]);
    let token = ["token", "new", "camera7", "--scope", "read,write,delete"];
    let out = exited(server(dir.path()).args(token));
    assert_eq!(out.code, 0, "{out:?}");
    let token = out
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("token "));
    let (_, server) = url.split_once('@').expect("a token");
    let url = format!("udpack://{}@{server}", token.expect("it is printed"));
    std::fs::write(dir.path().join("small"), "content").expect("write");
    std::fs::write(dir.path().join("large"), vec![7; 3 << 20]).expect("write");
    let mut logged = |args: &[&str], said: &str, path: &str| {
        let out = exited(client(dir.path()).env("UDPACK_URL", &url).args(args));
        assert_eq!(out.code, 0, "{out:?}");
        let line = running.told(said);
        for part in [
            "peer=127.0.0.1:",
            "id=\"camera7\"",
            &format!("path=\"{path}\""),
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    };
    // Small files are stored by threads that many share, large ones by threads of their own.
    logged(&["put", "small"], " stored ", "small");
    logged(&["put", "large"], " stored ", "large");
    logged(&["put", "small"], "was there already", "small");
    logged(&["get", "large", "--as", "back"], " sent ", "large");
    logged(&["rm", "small"], " removed ", "small");
}

#[test]
fn counters_are_served_over_http_and_nothing_else_is() {
    let dir = workdir();
    let (_server, url, metrics) = start(dir.path(), &[]);
    std::fs::write(dir.path().join("file"), "content").expect("write");
    for args in [&["put", "file"][..], &["ping", "-c", "1"]] {
        let out = exited(client(dir.path()).env("UDPACK_URL", &url).args(args));
        assert_eq!(out.code, 0, "{out:?}");
    }
    let out = exited(
        client(dir.path())
            .env("UDPACK_URL", url.replacen("udpack://", "udpack://x", 1))
            .args(["ping", "-c", "1"]),
    );
    assert_eq!(out.code, 4, "{out:?}");

    let page = get(&metrics, "/metrics");
    let (head, body) = page.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(
        head.to_lowercase()
            .contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    for line in [
        "udpack_sockets_admitted_total 2",
        "udpack_sockets_refused_total{code=\"auth_failed\"} 1",
        "udpack_requests_received_total 1",
        "udpack_files_stored_total 1",
        "udpack_files_stored_bytes_total 7",
        "udpack_uploads_open 0",
        "udpack_places_used{pool=\"files\"} 0",
        "udpack_places_waiting{pool=\"requests\"} 0",
        "udpack_places_refused_total{pool=\"hooks\"} 0",
    ] {
        assert!(body.lines().any(|found| found == line), "{line}\n{body}");
    }
    for line in body.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        assert!(name.starts_with("udpack_"), "{line}");
        value.parse::<f64>().expect("a number");
    }

    assert!(get(&metrics, "/").starts_with("HTTP/1.1 404 "));
    assert!(get(&metrics, "/metrics/more").starts_with("HTTP/1.1 404 "));
    let posted = http(
        &metrics,
        "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    );
    assert!(posted.starts_with("HTTP/1.1 405 "), "{posted}");
    assert!(posted.to_lowercase().contains("allow: get"), "{posted}");
    // Too long a head and no HTTP at all end the connection; the next one is served.
    let long = format!(
        "GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n",
        "x".repeat(100_000)
    );
    assert!(!http(&metrics, &long).starts_with("HTTP/1.1 200 "));
    let _ = http(&metrics, "\u{0}\u{1}nonsense\r\n\r\n");
    assert!(get(&metrics, "/metrics").starts_with("HTTP/1.1 200 "));
}

#[test]
fn a_silent_scraper_is_sent_away_and_holds_up_neither_others_nor_the_end() {
    let dir = workdir();
    let (mut server, _, metrics) = start(dir.path(), &[]);
    let mut silent = TcpStream::connect(&metrics).expect("somebody listens");
    silent
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("a timeout");
    silent.write_all(b"GET /met").expect("written");
    assert!(get(&metrics, "/metrics").starts_with("HTTP/1.1 200 "));
    let mut rest = Vec::new();
    let _ = silent.read_to_end(&mut rest);
    assert!(!rest.starts_with(b"HTTP/1.1 200 "));
    let _held = TcpStream::connect(&metrics).expect("somebody listens");
    server.signal("TERM");
    let out = server.exited();
    assert_eq!(out.code, 0, "{out:?}");
}

#[test]
fn a_taken_port_for_metrics_is_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let dir = workdir();
    let out = exited(server(dir.path()).args(["--listen", "127.0.0.1:0", "--metrics", &address]));
    assert_eq!(out.code, 1, "{out:?}");
    assert_error(&out.stderr);
    assert!(out.stderr.contains("--metrics"), "{out:?}");
    assert_eq!(out.stdout, "");
}

#[test]
fn qlog_files_of_both_programs_are_json_without_the_token() {
    let dir = workdir();
    let (mut server, url, _) = start(dir.path(), &["--qlog", "logs/server"]);
    let token = url.split(['/', '@']).nth(2).expect("a token").to_owned();
    let out = exited(client(dir.path()).env("UDPACK_URL", &url).args([
        "ping",
        "-c",
        "1",
        "--qlog",
        "logs/client",
    ]));
    assert_eq!(out.code, 0, "{out:?}");
    server.signal("TERM");
    assert_eq!(server.exited().code, 0);
    for side in ["server", "client"] {
        let files: Vec<_> = std::fs::read_dir(dir.path().join("logs").join(side))
            .expect("the directory")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        assert_eq!(files.len(), 1, "{files:?}");
        let text = std::fs::read_to_string(&files[0]).expect("text");
        assert!(!text.contains(&token));
        let mut records = 0;
        for record in text.split('\u{1e}').skip(1) {
            serde_json::from_str::<serde_json::Value>(record).expect("JSON");
            records += 1;
        }
        assert!(records > 2, "{text}");
    }
    let file = dir.path().join("logs/server").join("x");
    std::fs::write(&file, "").expect("write");
    let out = exited(
        client(dir.path())
            .env("UDPACK_URL", &url)
            .args(["ping", "--qlog"])
            .arg(&file),
    );
    assert_eq!(out.code, 3, "{out:?}");
    assert_error(&out.stderr);
}

#[test]
fn request_prints_the_reply_and_tells_refusals_apart() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let server = runtime.block_on(async {
        udpack::Server::builder()
            .identity(Identity::generate().expect("a key"))
            .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("anybody")) })
            .channel("math", |channel: Channel| async move {
                channel
                    .on("double", |n: u64, _: Context| async move {
                        Ok::<_, Fault>(n * 2)
                    })
                    .on("refuse", |_: Option<u64>, _: Context| async move {
                        Err::<(), _>(Fault::new("too_late", "come back tomorrow"))
                    })
                    .on("never", |_: Option<u64>, _: Context| async move {
                        std::future::pending::<()>().await
                    })
                    .run()
                    .await
            })
            .bind("127.0.0.1:0")
            .await
            .expect("a port")
    });
    let dir = workdir();
    let ask = |args: &[&str]| {
        exited(
            client(dir.path())
                .args(["request", "--channel", "math", "--to"])
                .arg(server.local_addr().to_string())
                .args(["--fingerprint", &server.fingerprint().to_string()])
                .args(args),
        )
    };
    let out = ask(&["double", "21"]);
    assert_eq!((out.code, out.stdout.as_str()), (0, "42\n"), "{out:?}");
    let out = ask(&["refuse"]);
    assert_eq!(out.code, 9, "{out:?}");
    assert!(out.stderr.contains("too_late: come back tomorrow"));
    let out = ask(&["double", "\"text\""]);
    assert_eq!(out.code, 9, "{out:?}");
    let out = ask(&["what", "{\"raw\":{\"$bin\":\"00ff\"}}"]);
    assert_eq!(out.code, 11, "{out:?}");
    assert_error(&out.stderr);
    let out = ask(&["never", "--timeout", "0.2"]);
    assert_eq!(out.code, 5, "{out:?}");
    let out = ask(&["double", "no json"]);
    assert_eq!(out.code, 2, "{out:?}");
    assert_eq!(out.stdout, "");
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// `get` asks for a path before it knows that it is a directory: that is no transfer.
#[test]
fn a_directory_that_is_fetched_leaves_no_failed_job() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    common::write(&server.uploads().join("d/f"), b"1");
    let out = server.client(dir.path(), &["get", "d"]);
    assert_eq!(out.code, 0, "{out:?}");
    let out = server.client(dir.path(), &["get", "none"]);
    assert_eq!(out.code, 12, "{out:?}");
    let out = server.client(dir.path(), &["jobs", "--ended", "--json"]);
    assert_eq!(out.code, 0, "{out:?}");
    let lines = common::events(&out.stdout);
    let ended = |job: &serde_json::Value| (job["path"].clone(), job["state"].clone());
    let mut jobs: Vec<_> = common::named(&lines, "job")
        .into_iter()
        .map(ended)
        .collect();
    jobs.sort_by_key(|job| job.0.to_string());
    assert_eq!(
        jobs,
        [
            ("d/f".into(), "done".into()),
            ("none".into(), "failed".into())
        ]
    );
}
