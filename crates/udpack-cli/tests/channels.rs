//! `listen`, `send` and `request` over lost connections, with the real binaries.

mod common;
#[path = "../../udpack-transfer/tests/common/relay.rs"]
mod relay;

use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use common::{Running, Server, assert_error, client, exited, until, workdir};
use relay::{Faults, Relay};
use serde_json::Value;
use tokio::sync::mpsc;
use udpack::text::is_printable;
use udpack::{Channel, CloseCode, Context, Deny, Fault, Hello, Identity, Message, Peer, Streaming};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// The URL with another address.
fn through(url: &str, address: &str) -> String {
    let (token, rest) = url.split_once('@').expect("a token");
    let (_, pin) = rest.split_once('#').expect("a pin");
    format!("{token}@{address}#{pin}")
}

/// Somebody who has heard the event 0.
fn listen(dir: &Path, server: &Server, url: &str, args: &[&str]) -> Running {
    let mut command = client(dir);
    command.env("UDPACK_URL", url).arg("listen").args(args);
    let mut listening = Running::spawn(&mut command);
    listening.told("listening on ");
    until("the server knows it", || send(server, "0") == 1);
    assert_eq!(listening.line(), number(0));
    listening
}

/// Sends one event; how many it is on its way to.
fn send(server: &Server, data: &str) -> u64 {
    let out = server.client(server.dir.path(), &["send", "number", data]);
    assert_eq!(out.code, 0, "{out:?}");
    let reply: Value = serde_json::from_str(&out.stdout).expect("json");
    reply["delivered"].as_u64().expect("a number")
}

fn number(data: u64) -> String {
    format!("{{\"event\":\"number\",\"data\":{data}}}")
}

/// Somebody who has the server's key but not its sessions: it resets connections it does not know, and lets
/// nobody in. Sends a word for each that knocks.
async fn impostor(keys: &Path) -> (udpack::Server, mpsc::UnboundedReceiver<()>) {
    let (knock, knocks) = mpsc::unbounded_channel();
    let server = udpack::Server::builder()
        .identity(Identity::load_or_create(keys).expect("the server's key"))
        .auth(move |_: Hello| {
            let _ = knock.send(());
            async { Err::<Peer, _>(Deny::new(CloseCode::SERVER_BUSY, "not now")) }
        })
        .bind("127.0.0.1:0")
        .await
        .expect("a port");
    (server, knocks)
}

#[test]
fn a_listener_whose_connection_is_lost_goes_on_where_it_was() {
    let server = Server::start();
    let address = server.value("listening").parse().expect("an address");
    let runtime = runtime();
    let relay = runtime.block_on(Relay::start(address, Faults::default()));
    let (other, mut knocks) = runtime.block_on(impostor(&server.dir.path().join("keys")));
    let dir = workdir();
    let mut listener = listen(
        dir.path(),
        &server,
        &through(&server.url(), &relay.addr()),
        &["-c", "4"],
    );
    assert_eq!(send(&server, "1"), 1);
    assert_eq!(listener.line(), number(1));

    // Else a probe for larger datagrams would find the other server first.
    runtime.block_on(relay.widen(Duration::from_millis(300)));
    relay.lead_to(other.local_addr());
    // What confirms this one ends the connection.
    assert_eq!(send(&server, "2"), 1);
    assert_eq!(listener.line(), number(2));
    let knocked = async { tokio::time::timeout(Duration::from_secs(30), knocks.recv()).await };
    let knocked = runtime.block_on(knocked);
    assert_eq!(knocked, Ok(Some(())), "the listener tries to come back");
    assert_eq!(send(&server, "3"), 1, "it is still a listener");
    relay.lead_to(address);
    assert_eq!(listener.line(), number(3));
    let out = listener.exited();
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(out.stdout.lines().count(), 4, "nothing twice: {out:?}");
    for line in [
        "the connection is lost; connecting again",
        "connected again: the session is resumed",
    ] {
        assert_eq!(out.stderr.matches(line).count(), 1, "{out:?}");
    }
    drop((relay, other));
    runtime.shutdown_timeout(Duration::from_secs(1));
}

#[test]
fn volatile_messages_reach_those_who_listen() {
    let server = Server::start();
    let dir = workdir();
    let mut listener = listen(dir.path(), &server, &server.url(), &["-c", "3"]);
    // Too large for a datagram, too: that one has a stream of its own.
    for data in ["[7,8]".to_owned(), format!("\"{}\"", "x".repeat(5000))] {
        let args = ["send", "--volatile", "level", &data];
        let out = server.client(server.dir.path(), &args);
        assert_eq!((out.code, &*out.stdout), (0, ""), "{out:?}");
        assert_eq!(
            listener.line(),
            format!("{{\"event\":\"level\",\"data\":{data},\"volatile\":true}}")
        );
    }
    assert_eq!(listener.exited().code, 0);
}

#[test]
fn pings_and_resumable_requests_outlive_their_connection() {
    let server = Server::start();
    let address = server.value("listening").parse().expect("an address");
    let runtime = runtime();
    let relay = runtime.block_on(Relay::start(address, Faults::default()));
    let (other, mut knocks) = runtime.block_on(impostor(&server.dir.path().join("keys")));
    let dir = workdir();
    let url = through(&server.url(), &relay.addr());
    let mut listener = listen(dir.path(), &server, &server.url(), &["-c", "4"]);
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let mut sender = Running::spawn(
        client(dir.path())
            .env("UDPACK_URL", &url)
            .args(["send", "number", "-", "--resumable"])
            .stdin(Stdio::from(reader)),
    );
    let mut pings = Running::spawn(client(dir.path()).env("UDPACK_URL", &url).args([
        "ping",
        "-c",
        "2",
        "--interval",
        "2",
    ]));
    writer.write_all(b"1\n").expect("a reader");
    assert_eq!(sender.line(), "{\"delivered\":1}");
    assert!(pings.line().starts_with("pong 1 "));

    relay.lead_to(other.local_addr());
    writer.write_all(b"2\n").expect("a reader");
    for _ in 0..2 {
        let knocked = async { tokio::time::timeout(Duration::from_secs(30), knocks.recv()).await };
        assert_eq!(runtime.block_on(knocked), Ok(Some(())));
    }
    relay.lead_to(address);
    writer.write_all(b"3\n").expect("a reader");
    drop(writer);
    let out = sender.exited();
    assert_eq!(out.code, 0, "{out:?}");
    assert_eq!(out.stdout, "{\"delivered\":1}\n".repeat(3));
    let out = pings.exited();
    assert_eq!(out.code, 0, "{out:?}");
    let out = listener.exited();
    let expected: String = (0..=3).map(|n| number(n) + "\n").collect();
    assert_eq!(
        (out.code, out.stdout.as_str()),
        (0, expected.as_str()),
        "{out:?}"
    );
    drop((relay, other));
    runtime.shutdown_timeout(Duration::from_secs(1));
}

#[test]
fn a_listener_that_does_not_keep_up_is_told_how_much_it_lost() {
    let server = Server::start();
    let dir = workdir();
    let mut listener = listen(dir.path(), &server, &server.url(), &[]);
    listener.signal("STOP");
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let mut sender = Running::spawn(
        client(dir.path())
            .env("UDPACK_URL", server.url())
            .args(["send", "text", "-"])
            .stdin(Stdio::from(reader)),
    );
    let text = format!("\"{}\"\n", "x".repeat(200 << 10));
    let mut sent = 0;
    let mut dropped = 0;
    until("events are lost", || {
        sent += 1;
        writer.write_all(text.as_bytes()).expect("a reader");
        dropped += u64::from(sender.line() == "{\"delivered\":0}");
        dropped == 3
    });
    listener.signal("CONT");
    let mut heard = 0;
    let gap: Value = loop {
        let line: Value = serde_json::from_str(&listener.line()).expect("json");
        if line["event"] == "text" {
            heard += 1;
            continue;
        }
        break line;
    };
    assert_eq!(
        gap,
        serde_json::json!({ "gap": { "room": "events", "lost": 3 } })
    );
    assert_eq!(heard + 3, sent);
    drop(writer);
    assert_eq!(sender.exited().code, 0);
    listener.signal("INT");
    assert_eq!(listener.exited().code, 130);
}

#[test]
fn a_listener_outlives_its_server_and_says_that_events_may_be_lost() {
    let first = Server::start();
    let (address, dir) = (first.value("listening").to_owned(), workdir());
    let mut listener = listen(dir.path(), &first, &first.url(), &["-c", "3"]);
    assert_eq!(send(&first, "1"), 1);
    assert_eq!(listener.line(), number(1));

    // Once without a word, once in good order.
    let second = Server::start_at(&address, first.stop(), &[]);
    let lost = listener.told("connected again: ");
    assert!(
        lost.contains("could not be resumed (unknown), events may be lost"),
        "{lost}"
    );
    let (code, server_dir) = second.terminate("TERM");
    assert_eq!(code, 0);
    let third = Server::start_at(&address, server_dir, &[]);
    listener.told("connected again: ");
    until("it listens again", || send(&third, "2") == 1);
    assert_eq!(listener.line(), number(2));
    let out = listener.exited();
    assert_eq!(out.code, 0, "{out:?}");
    for (line, count) in [
        ("the connection is lost; connecting again", 1),
        ("shutting down; connecting again", 1),
        ("connected again: ", 2),
    ] {
        assert_eq!(out.stderr.matches(line).count(), count, "{out:?}");
    }
}

/// Whether a terminal shows all of it as it is.
fn is_plain(text: &str) -> bool {
    text.chars().all(|c| c == '\n' || is_printable(c))
}

/// DEL, two sequences that C1 controls begin, and two that turn the direction of what is written.
const ACTS: &str = "\u{7f}DEL \u{9b}31mRED \u{9d}0;title\u{9c} \u{202e}RLO \u{2066}ISO";

#[test]
fn what_others_send_never_acts_on_the_terminal() {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    let dir = workdir();
    let mut listener = listen(dir.path(), &server, &server.url(), &["-c", "4"]);
    let data = serde_json::json!({ "a": ACTS, ACTS: [ACTS] });
    let name = "ev\u{202e}";
    for args in [
        &["send", "say", &data.to_string()][..],
        &["send", "--volatile", "say", &data.to_string()],
        &["send", name, "1"],
    ] {
        let out = server.client(dir.path(), args);
        assert_eq!(out.code, 0, "{args:?} {out:?}");
        let line = listener.line();
        assert!(is_plain(&line), "{line:?}");
        let line: Value = serde_json::from_str(&line).expect("JSON");
        if args.contains(&name) {
            assert_eq!(line["event"], name, "it means the same");
        } else {
            assert_eq!(line["data"], data, "it means the same");
        }
    }
    // Names with control characters do not travel.
    let out = server.client(dir.path(), &["send", "ev\u{9b}31m", "1"]);
    assert_eq!(out.code, 2, "{out:?}");
    assert_error(&out.stderr);
    assert!(is_plain(&out.stderr), "{out:?}");

    // Names of files are bytes, and are stored.
    let file = format!("{ACTS}\u{1b}[2J\n.txt");
    std::fs::write(dir.path().join(&file), "content").expect("write");
    for args in [
        &["put"][..],
        &["put", "--if-exists", "error"],
        &["put", "-n", "--if-exists", "error"],
        &["stat"],
        &["ls", "-l"],
        &["verify"],
        &["get", "--as", "copy"],
        &["get", "--if-exists", "error"],
        &["rm"],
        &["stat"],
        &["rm"],
        &["verify"],
    ] {
        for json in [&[][..], &["--json"]] {
            let args = [args, json, &["--", &file]].concat();
            let out = server.client(dir.path(), &args);
            for text in [&out.stdout, &out.stderr] {
                assert!(is_plain(text), "{args:?}: {out:?}");
            }
            for line in out.stdout.lines().filter(|_| !json.is_empty()) {
                serde_json::from_str::<Value>(line).expect("JSON");
            }
        }
    }
}

#[test]
fn negative_numbers_are_data_and_no_options() {
    let server = Server::start();
    let dir = workdir();
    let numbers = ["-5", "-0.5", "-1e3", "-9223372036854775808"];
    let mut listener = listen(dir.path(), &server, &server.url(), &["-c", "9"]);
    for number in numbers {
        for verb in ["send", "request"] {
            let out = server.client(dir.path(), &[verb, "level", number]);
            assert_eq!(out.code, 0, "{verb} {number}: {out:?}");
            let line: Value = serde_json::from_str(&listener.line()).expect("JSON");
            let data: Value = serde_json::from_str(number).expect("JSON");
            assert_eq!(line["data"], data, "{verb} {number}");
        }
    }
    // What is no number is still an option.
    let out = server.client(dir.path(), &["send", "level", "-x"]);
    assert_eq!(out.code, 2, "{out:?}");
}

#[test]
fn requests_stream_and_acknowledgements_say_that_a_handler_returned() {
    let runtime = runtime();
    let server = runtime.block_on(async {
        udpack::Server::builder()
            .identity(Identity::generate().expect("a key"))
            .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("anybody")) })
            .channel("math", |channel: Channel| async move {
                channel
                    .on("count", |n: u64, _: Context| async move {
                        Ok::<_, Fault>(Streaming::new(futures_util::stream::iter(0..n)))
                    })
                    .on("double", |n: u64, _: Context| async move {
                        Ok::<_, Fault>(n * 2)
                    })
                    .on("echo", |data: String, _: Context| async move {
                        Ok::<_, Fault>(data)
                    })
                    .on("curse", |data: String, _: Context| async move {
                        Err::<(), _>(Fault::new("cursed", data))
                    })
                    .on("fail", |_: Message, _: Context| async move {
                        Err::<(), _>(Fault::new("too_late", "come back tomorrow"))
                    })
                    .run()
                    .await
            })
            .bind("127.0.0.1:0")
            .await
            .expect("a port")
    });
    let dir = workdir();
    let run = |args: &[&str], stdin: &str| {
        let mut command = client(dir.path());
        command
            .args(args)
            .args(["--channel", "math", "--to"])
            .arg(server.local_addr().to_string())
            .args(["--fingerprint", &server.fingerprint().to_string()]);
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        writer
            .write_all(stdin.as_bytes())
            .expect("room in the pipe");
        drop(writer);
        exited(command.stdin(Stdio::from(reader)))
    };
    let out = run(
        &["request", "count", "3", "--items", "--priority", "high"],
        "",
    );
    assert_eq!((out.code, out.stdout.as_str()), (0, "0\n1\n2\n"), "{out:?}");
    let out = run(&["request", "count", "3"], "");
    assert_eq!((out.code, out.stdout.as_str()), (2, ""), "{out:?}");
    assert!(out.stderr.contains("--items"), "{out:?}");
    let out = run(&["request", "double", "-", "--resumable"], "1 2\n\n3");
    assert_eq!((out.code, out.stdout.as_str()), (0, "2\n4\n6\n"), "{out:?}");
    let out = run(&["send", "double", "-", "--acked"], "1\n2\n");
    assert_eq!((out.code, out.stdout.as_str()), (0, ""), "{out:?}");
    let out = run(&["send", "fail", "-", "--acked"], "1\n");
    assert_eq!(out.code, 9, "{out:?}");
    let text = serde_json::json!(ACTS).to_string();
    let out = run(&["request", "echo", &text], "");
    assert_eq!(out.code, 0, "{out:?}");
    assert!(is_plain(&out.stdout), "{out:?}");
    let reply: Value = serde_json::from_str(&out.stdout).expect("JSON");
    assert_eq!(reply, ACTS);
    let out = run(&["request", "curse", &text], "");
    assert_eq!(out.code, 9, "{out:?}");
    assert!(is_plain(&out.stderr), "{out:?}");
    let out = run(&["send", "nothing", "1", "--acked"], "");
    assert_eq!(out.code, 11, "{out:?}");
    let out = run(&["send", "double", "-"], "1 {");
    assert_eq!((out.code, out.stdout.as_str()), (2, "2\n"), "{out:?}");
    assert_error(&out.stderr);
    let out = run(&["send", "double", "-"], "");
    assert_eq!((out.code, out.stdout.as_str()), (0, ""), "{out:?}");
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// Nobody is told of a success that the server has not agreed to.
#[test]
fn a_channel_that_the_server_does_not_serve_is_an_error_and_nothing_else() {
    let server = Server::start();
    let dir = workdir();
    for args in [
        &["listen", "--channel", "nope"][..],
        &["send", "--channel", "nope", "e", "1"],
        &["send", "--channel", "nope", "--volatile", "e", "1"],
        &["request", "--channel", "nope", "e"],
        // Served, but not to this token.
        &["listen", "--channel", "stats"],
    ] {
        let out = server.client(dir.path(), args);
        let wanted = if args.contains(&"stats") { 6 } else { 11 };
        assert_eq!(out.code, wanted, "{args:?}: {out:?}");
        assert_eq!(out.stdout, "", "{args:?}");
        assert!(out.stderr.starts_with("error: "), "{args:?}: {out:?}");
    }
}

#[test]
fn warnings_have_the_form_of_other_messages_unless_a_log_is_asked_for() {
    let server = Server::start();
    let dir = workdir();
    let ping = |variable: &str, more: &[&str]| {
        let mut command = client(dir.path());
        command.env("RUST_LOG", variable);
        command.args(["ping", "-c", "1", "--to", &server.url()]);
        let out = exited(command.args(more));
        assert_eq!(out.code, 0, "{out:?}");
        out.stderr
    };
    assert_eq!(
        ping("", &[]),
        "warning: the token in --to shows in the list of processes: UDPACK_URL keeps it out\n"
    );
    assert_eq!(ping("", &["-q"]), "");
    for log in [ping("warn", &[]), ping("", &["-v"])] {
        assert!(log.starts_with("20"), "a time: {log}");
        assert!(log.contains(" WARN "), "a level: {log}");
    }
}
