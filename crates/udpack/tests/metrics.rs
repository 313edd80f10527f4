//! What is counted, the text for scrapers, and the qlog files.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use common::{TOKEN, bind, bounded, client, connect, server};
use serde_json::Value;
use udpack::{
    Channel, CloseCode, Context, Ends, Fault, Limits, Metrics, RequestError, Server, Side,
};

async fn until(server: &Server, what: impl Fn(&Metrics) -> bool) -> Metrics {
    let come = async {
        while !what(&server.metrics()) {
            tokio::task::yield_now().await;
        }
    };
    let come = tokio::time::timeout(Duration::from_secs(10), come).await;
    assert!(come.is_ok(), "not in time: {:?}", server.metrics());
    server.metrics()
}

fn count(ends: &[Ends], code: &str, by: Side) -> u64 {
    ends.iter()
        .filter(|end| end.code == code && end.by == by)
        .map(|end| end.count)
        .sum()
}

fn handlers() -> udpack::ServerBuilder {
    server()
        .channel("work", |channel: Channel| async move {
            channel
                .on("double", |n: u64, _: Context| async move {
                    Ok::<_, Fault>(n * 2)
                })
                .on("refuse", |_: u64, _: Context| async move {
                    Err::<(), _>(Fault::new("too_late", "come back tomorrow"))
                })
                .on("panic", |n: u64, _: Context| async move {
                    assert_eq!(n, 0, "on purpose");
                })
                .run()
                .await
        })
        .channel("fails", |_: Channel| async move { Err::<(), _>("no") })
}

#[tokio::test]
async fn what_happens_on_channels_is_counted_for_the_socket_and_the_server() {
    bounded(async {
        let server = bind(handlers()).await;
        let socket = connect(&server).await;
        let work = socket.open("work").await.expect("a channel");
        let ask = |event: &'static str| {
            let work = work.clone();
            async move { work.request::<_, u64>(event, &21_u64).await }
        };
        assert_eq!(ask("double").await.expect("a reply"), 42);
        assert!(matches!(ask("refuse").await, Err(RequestError::Fault(_))));
        assert!(matches!(ask("panic").await, Err(RequestError::Fault(_))));
        assert!(matches!(ask("what").await, Err(RequestError::NoHandler)));
        let misfit = work.request::<_, u64>("double", "text").await;
        assert!(matches!(misfit, Err(RequestError::Fault(_))));
        for name in ["fails", "nobody"] {
            let channel = socket.open(name).await.expect("a channel");
            channel.recv().await.expect_err("closed");
        }

        let here = socket.metrics();
        assert_eq!((here.sockets, here.admitted), (1, 1));
        assert_eq!((here.channels_opened, here.requests_sent), (3, 5));
        let faults = BTreeMap::from([
            ("application", 1),
            ("bad_payload", 1),
            ("internal", 1),
            ("no_handler", 1),
        ]);
        assert_eq!(here.faults_received, faults);

        let there = until(&server, |now| {
            // The opening of each channel and five requests; five answers and two words of farewell.
            now.messages_received == 8 && now.channels == 1
        })
        .await;
        assert_eq!((there.sockets, there.admitted), (1, 1));
        assert_eq!(
            (there.channels_accepted, there.channels_refused),
            (3, 1),
            "one has no handler"
        );
        assert_eq!(there.requests_received, 5);
        assert_eq!(there.faults_sent, faults);
        assert_eq!(
            (there.handler_panics, there.handlers_failed),
            (1, 1),
            "{there:?}"
        );
        assert_eq!((there.unknown_events, there.bad_payloads), (1, 1));
        let closed = &there.channels_closed;
        assert_eq!(count(closed, "handler_failed", Side::Local), 1);
        assert_eq!(count(closed, "no_such_channel", Side::Local), 1);
        assert_eq!(there.stats.received, server.stats().received);

        work.close(CloseCode::new(0x1234), "enough").await;
        until(&server, |now| {
            count(&now.channels_closed, "application", Side::Peer) == 1 && now.channels == 0
        })
        .await;
        socket.close(CloseCode::NORMAL, "done").await;
        let there = until(&server, |now| now.sockets == 0).await;
        assert_eq!(count(&there.closed, "normal", Side::Peer), 1, "{there:?}");
        assert_eq!(there.refused, BTreeMap::new());
        assert_eq!(there.messages_sent, 5, "answers; farewells are no messages");
    })
    .await;
}

#[tokio::test]
async fn refusals_are_counted_by_their_reason() {
    bounded(async {
        let server = bind(handlers().limits(Limits {
            sockets: 1,
            auth_failures: 1,
            ..Limits::default()
        }))
        .await;
        let address = server.local_addr().to_string();
        let first = connect(&server).await;
        let second = client(&server).connect(&address).await;
        assert!(second.is_err(), "there is one place");
        first.close(CloseCode::NORMAL, "").await;
        until(&server, |now| now.sockets == 0).await;
        let wrong = client(&server).token("wrong").connect(&address).await;
        assert!(wrong.is_err());
        let now = until(&server, |now| now.refused.len() == 2).await;
        let refused = BTreeMap::from([("auth_failed", 1), ("server_busy", 1)]);
        assert_eq!(now.refused, refused);
        let slowed = client(&server).connect(&address).await;
        slowed.expect("let in");
        let now = until(&server, |now| now.sockets == 0).await;
        assert_eq!(now.tokens_slowed, 1, "for the wrong one before");
        assert_eq!(now.knocks_refused, BTreeMap::new());
        assert_eq!(server.refused(), 2);
        let text = now.prometheus();
        for line in [
            "udpack_sockets 0",
            "udpack_sockets_admitted_total 2",
            "udpack_sockets_refused_total{code=\"auth_failed\"} 1",
            "udpack_tokens_slowed_total 1",
            "udpack_sockets_closed_total{code=\"normal\",by=\"peer\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    })
    .await;
}

/// The records of a JSON-SEQ file: each begins with a record separator and ends with a line feed.
fn records(path: &Path) -> Vec<Value> {
    let bytes = std::fs::read(path).expect("the file");
    assert_eq!(bytes.first(), Some(&0x1e));
    assert!(
        bytes
            .windows(TOKEN.len())
            .all(|window| window != TOKEN.as_bytes())
    );
    bytes
        .split(|byte| *byte == 0x1e)
        .skip(1)
        .map(|record| {
            assert_eq!(record.last(), Some(&b'\n'));
            serde_json::from_slice(record).expect("a record is JSON")
        })
        .collect()
}

#[tokio::test]
async fn each_connection_has_its_qlog_file() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        let (at_server, at_client) = (dir.path().join("server"), dir.path().join("client/logs"));
        let server = bind(handlers().qlog(&at_server)).await;
        let client = client(&server).qlog(&at_client).build().expect("settings");
        for _ in 0..2 {
            let address = server.local_addr().to_string();
            let socket = client.connect(&address).await.expect("let in");
            let work = socket.open("work").await.expect("a channel");
            let reply: u64 = work.request("double", &1_u64).await.expect("a reply");
            assert_eq!(reply, 2);
            socket.close(CloseCode::NORMAL, "").await;
        }
        server.close(CloseCode::NORMAL, "").await;
        drop((server, client));
        for (dir, side) in [(at_server, "server"), (at_client, "client")] {
            let files: Vec<_> = std::fs::read_dir(dir)
                .expect("the directory")
                .map(|entry| entry.expect("an entry").path())
                .collect();
            assert_eq!(files.len(), 2, "{files:?}");
            for file in files {
                assert_eq!(file.extension(), Some("sqlog".as_ref()));
                // The last handle goes with quinn's own task.
                let records = loop {
                    if std::fs::metadata(&file).expect("the file").len() > 0 {
                        break records(&file);
                    }
                    tokio::task::yield_now().await;
                };
                let (head, events) = records.split_first().expect("a head");
                assert!(head["title"].as_str().expect("a title").contains(side));
                assert!(events.iter().all(|event| event["name"].is_string()));
                let sent = |event: &&Value| event["name"] == "transport:packet_sent";
                assert!(events.iter().any(|event| sent(&event)), "{events:?}");
            }
        }
    })
    .await;
}
