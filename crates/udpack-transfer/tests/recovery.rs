//! Uploads that something interrupts: lost connections, servers that start again, answers that say "later",
//! what a server has already; and entries that are no plain files.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::collections::HashMap;
use std::future::Future;
use std::io::{Read, Seek as _, Write as _};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Fixture, TOKEN, bounded, drain, memory, noise, rel};
use raw::{V, map, with};
use udpack::{Channel, Client, CloseCode, Hello, Identity, Peer, Server, Socket};
use udpack_transfer::wire::{self, Request};
use udpack_transfer::{
    ErrorKind, Event, IfExists, Limiter, Link, Meta, Outcome, Receiver, ReceiverConfig, Retry,
    Source, Store, StoreConfig, Time, TransferError, Upload, Uploader,
};

const MIB: usize = 1 << 20;
/// Bytes of a run that at most are sent before the server has answered, and at least where a window has room.
const EARLY: usize = 64 << 10;
const FIRST: usize = 32 << 10;

fn quick() -> Retry {
    Retry {
        first: Duration::from_millis(20),
        most: Duration::from_millis(200),
        ..Retry::default()
    }
}

fn link(server: &Server) -> Link {
    let client = Client::builder()
        .pin(server.fingerprint())
        .token(TOKEN)
        .build()
        .expect("a client");
    Link::new(client, server.local_addr().to_string()).retry(quick())
}

/// A server whose lanes a test plays itself.
async fn acted<F, Fut>(act: F) -> Server
where
    F: Fn(Channel) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    Server::builder()
        .identity(Identity::generate().expect("a key"))
        .auth(|_: Hello| async { Ok(Peer::new("tester")) })
        .channel(udpack_transfer::CHANNEL, act)
        .bind("127.0.0.1:0")
        .await
        .expect("a free port")
}

/// The next message of a client; `None` when it leaves.
async fn hear(channel: &Channel) -> Option<Request> {
    let message = channel.recv().await.ok()??;
    wire::decode(&message).expect("a sound message")
}

async fn say(channel: &Channel, event: &str, data: V) {
    let _ = channel.send(event, &data).await;
}

fn done(id: u64, path: &str, bytes: &[u8]) -> V {
    map([
        ("id", id.into()),
        ("path", path.into()),
        ("size", (bytes.len() as u64).into()),
        ("hash", blake3::hash(bytes).as_bytes().into()),
    ])
}

fn error(id: u64, code: &str, retry: bool) -> V {
    map([
        ("id", id.into()),
        ("code", code.into()),
        ("message", "no".into()),
        ("retry", retry.into()),
    ])
}

fn ready(id: u64, have: &[(u64, u64, [u8; 32])]) -> V {
    let range = |(off, len, hash): &(u64, u64, [u8; 32])| {
        V::Array(vec![(*off).into(), (*len).into(), hash.into()])
    };
    map([
        ("id", id.into()),
        ("have", V::Array(have.iter().map(range).collect())),
        ("chunk", 262_144_u64.into()),
    ])
}

/// Follows an upload to its end and does something at each event.
async fn follow(
    mut upload: Upload,
    mut at: impl FnMut(&Event),
) -> (Vec<Outcome>, Vec<TransferError>) {
    let (mut done, mut failed, mut last) = (Vec::new(), Vec::new(), 0);
    while let Some(event) = upload.next().await {
        at(&event);
        match event {
            Event::Done(outcome) => done.push(outcome),
            Event::Failed { error, .. } => failed.push(error),
            Event::Progress(progress) => {
                assert!(progress.acked >= last, "progress went down");
                assert!(progress.acked <= progress.total);
                last = progress.acked;
            }
            _ => {}
        }
    }
    let end = upload.progress();
    assert!(end.listed && end.acked == end.total && end.files_done == end.files);
    (done, failed)
}

fn cut(server: &Server) {
    for socket in server.sockets() {
        socket.abort(CloseCode::SHUTTING_DOWN, "cut by the test");
    }
}

#[tokio::test]
async fn an_upload_goes_on_over_lost_connections() {
    bounded(async {
        let fixture = Fixture::new().await;
        let mut sources = vec![
            memory("big", noise(1, 24 * MIB)),
            memory("mid", noise(2, MIB)),
        ];
        sources.extend((0..400).map(|n| memory(&format!("s/{n}"), noise(n, 3000))));
        // Slow enough that all cuts come in the middle.
        let upload = Uploader::new(link(&fixture.server))
            .lanes(3)
            .limit(Limiter::new(12 * MIB as u64))
            .put(sources);
        let mut cuts = [2, 9, 17].map(|at| at * MIB as u64).into_iter().peekable();
        let (mut reconnecting, mut connected) = (0, 0);
        let (done, failed) = follow(upload, |event| match event {
            Event::Progress(progress) if cuts.next_if(|at| progress.acked > *at).is_some() => {
                cut(&fixture.server);
            }
            Event::Reconnecting { attempt, .. } => reconnecting += usize::from(*attempt == 1),
            Event::Connected => connected += 1,
            _ => {}
        })
        .await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!((done.len(), connected), (402, 3));
        let big = done.iter().find(|outcome| outcome.path == "big");
        let big = big.expect("it is done");
        assert!(big.resumed > 0 && !big.same, "{big:?}");
        assert!(reconnecting >= 3);
        assert!(fixture.stored("big") == noise(1, 24 * MIB));
        assert!(fixture.stored("mid") == noise(2, MIB));
        for n in 0..400 {
            assert!(fixture.stored(&format!("s/{n}")) == noise(n, 3000));
        }
        assert_eq!(fixture.visible().len(), 403, "no copies");
    })
    .await;
}

#[tokio::test]
async fn the_same_upload_made_again_goes_on_where_the_first_was_given_up() {
    bounded(async {
        let fixture = Fixture::new().await;
        let local = fixture.dir.path().join("big");
        let mut bytes = noise(6, 24 * MIB);
        std::fs::write(&local, &bytes).expect("a file");
        let source = Source::file(&local, rel("big"));
        let half =
            |event: &Event| matches!(event, Event::Progress(now) if now.acked > 12 * MIB as u64);
        let mut upload = Uploader::new(link(&fixture.server))
            .limit(Limiter::new(32 * MIB as u64))
            .put([source.clone()]);
        while !half(&upload.next().await.expect("it goes on")) {}
        drop(upload);
        // Meanwhile what was not sent yet has changed.
        bytes[24 * MIB - 1] ^= 1;
        std::fs::write(&local, &bytes).expect("a file");
        let mut resumed = 0;
        let upload = Uploader::new(link(&fixture.server)).put([source]);
        let (done, failed) = follow(upload, |event| {
            if let Event::Resumed { bytes, .. } = event {
                resumed = *bytes;
            }
        })
        .await;
        assert!(failed.is_empty(), "{failed:?}");
        let done = &done[0];
        assert_eq!(done.sent + done.resumed, bytes.len() as u64);
        assert_eq!(resumed, done.resumed);
        assert!(resumed > 8 * MIB as u64 && !done.same, "{resumed}");
        assert!(fixture.stored("big") == bytes);
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn an_upload_goes_on_when_the_server_is_started_again() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a directory");
        // What is left of the old server gives address and directory back in its own time.
        let start = async |address: String| {
            loop {
                let root = dir.path().join("up");
                if let Ok(store) = Store::open(root, StoreConfig::default()) {
                    let receiver = Receiver::new(store, ReceiverConfig::default());
                    let identity = Identity::load_or_create(dir.path().join("keys"));
                    let server = Server::builder()
                        .identity(identity.expect("a key"))
                        .auth(|_: Hello| async { Ok(Peer::new("tester")) });
                    if let Ok(server) = receiver.attach(server).bind(&address).await {
                        return server;
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let server = start("127.0.0.1:0".to_owned()).await;
        let address = server.local_addr().to_string();
        let bytes = noise(3, 16 * MIB);
        let mut upload = Uploader::new(link(&server))
            .limit(Limiter::new(8 * MIB as u64))
            .put([memory("big", bytes.clone())]);
        let (mut server, mut second) = (Some(server), None);
        let (mut down, mut stored) = (false, false);
        while let Some(event) = upload.next().await {
            match event {
                Event::Progress(progress) if progress.acked > 4 * MIB as u64 => {
                    if let Some(old) = server.take() {
                        old.close(CloseCode::SHUTTING_DOWN, "restart").await;
                        down = true;
                    }
                }
                Event::Reconnecting { attempt, .. } if attempt > 1 && down => {
                    down = false;
                    second = Some(start(address.clone()).await);
                }
                Event::Done(outcome) => stored = outcome.size == bytes.len() as u64,
                Event::Failed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
        assert!(stored && second.is_some());
        assert!(std::fs::read(dir.path().join("up/big")).expect("it is there") == bytes);
    })
    .await;
}

#[tokio::test]
async fn an_upload_ends_with_the_real_reason_when_reconnecting_does_not_help() {
    bounded(async {
        let fixture = Fixture::new().await;
        let retry = Retry {
            attempts: Some(2),
            ..quick()
        };
        let upload = Uploader::new(link(&fixture.server).retry(retry))
            .limit(Limiter::new(MIB as u64))
            .put((0..20).map(|n| memory(&format!("f{n}"), noise(n, 4 * MIB))));
        let mut cut = false;
        let (done, failed) = follow(upload, |event| {
            if let Event::Progress(progress) = event
                && progress.acked > 0
                && !std::mem::replace(&mut cut, true)
            {
                let server = fixture.server.clone();
                tokio::spawn(async move { server.close(CloseCode::SHUTTING_DOWN, "").await });
            }
        })
        .await;
        assert_eq!((done.len(), failed.len()), (0, 20));
        for error in failed {
            assert_eq!(error.kind(), ErrorKind::Network, "{error}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_the_server_has_is_proved_and_not_sent_again() {
    bounded(async {
        let bytes = Arc::new(noise(5, 6 * MIB));
        let hash = |from: usize, to: usize| {
            let hash = *blake3::hash(&bytes[from..to]).as_bytes();
            (from as u64, (to - from) as u64, hash)
        };
        // The middle range has other bytes than the client's file.
        let have = [
            hash(0, MIB),
            (MIB as u64, MIB as u64, [9; 32]),
            hash(2 * MIB, 5 * MIB),
        ];
        let at_server = bytes.clone();
        let server = acted(move |channel| {
            let bytes = at_server.clone();
            async move {
                let mut sent = Vec::new();
                while let Some(request) = hear(&channel).await {
                    match request {
                        Request::File(offer) => {
                            assert!(offer.resume && offer.run.is_some());
                            say(&channel, "ready", ready(offer.id, &have)).await;
                        }
                        Request::Chunk { offset, bytes, .. } => {
                            sent.push((offset.unwrap_or(0), bytes.len() as u64));
                        }
                        Request::Finish(finish) => {
                            let ends: Vec<_> = sent.iter().map(|(off, len)| off + len).collect();
                            // What was under way before the answer, and then what is missing.
                            let then = ends.iter().zip(sent.iter().skip(1));
                            let mut then = then.filter(|(end, (off, _))| *end != off);
                            let (end, (off, _)) = then.next().expect("something is left out");
                            assert!((1..=EARLY as u64).contains(end));
                            assert_eq!(*off, MIB as u64);
                            assert!(ends.contains(&(2 * MIB as u64)));
                            assert!(sent.iter().any(|(off, _)| *off == 5 * MIB as u64));
                            assert_eq!(finish.hash, Some(*blake3::hash(&bytes).as_bytes()));
                            say(&channel, "done", done(finish.id, "x", &bytes)).await;
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        })
        .await;
        let dir = tempfile::tempdir().expect("a directory");
        let local = dir.path().join("x");
        std::fs::write(&local, &bytes[..]).expect("a file");
        let mut resumed = Vec::new();
        let upload = Uploader::new(link(&server)).put([Source::file(&local, rel("x"))]);
        let (done, failed) = follow(upload, |event| {
            if let Event::Resumed { bytes, size, .. } = event {
                resumed.push((*bytes, *size));
            }
        })
        .await;
        assert!(failed.is_empty(), "{failed:?}");
        let passed = done[0].resumed;
        assert_eq!(done[0].sent + passed, 6 * MIB as u64);
        assert!((4 * MIB - EARLY..4 * MIB).contains(&(passed as usize)));
        assert_eq!(resumed, [(passed, 6 * MIB as u64)]);
    })
    .await;
}

#[tokio::test]
async fn the_first_bytes_of_a_run_do_not_wait_for_an_answer() {
    bounded(async {
        // What the server says once it has heard the first bytes: nothing before that.
        for answer in ["ready", "error", "cut"] {
            let bytes = Arc::new(noise(7, 3 * MIB));
            let at_server = bytes.clone();
            let offers = Arc::new(AtomicUsize::new(0));
            let sockets: Arc<Mutex<Option<Server>>> = Arc::default();
            let cutter = sockets.clone();
            let server = acted(move |channel| {
                let (bytes, offers) = (at_server.clone(), offers.clone());
                let cutter = cutter.clone();
                async move {
                    // Of the open file: what is here, and whether the client may know what was.
                    let (mut open, mut here, mut told) = (None, Vec::new(), false);
                    while let Some(request) = hear(&channel).await {
                        match request {
                            Request::File(offer) if offers.fetch_add(1, Ordering::Relaxed) == 0 => {
                                assert!(offer.resume);
                                open = Some(offer.id);
                            }
                            Request::File(offer) => {
                                open = Some(offer.id);
                                // What came before is kept; it is asked for this time.
                                here.extend_from_slice(&bytes[..FIRST]);
                                told = true;
                                let hash = *blake3::hash(&here).as_bytes();
                                let have = [(0, FIRST as u64, hash)];
                                say(&channel, "ready", ready(offer.id, &have)).await;
                            }
                            // It was on its way.
                            Request::Chunk { id, .. } if open != Some(id) => {}
                            Request::Chunk {
                                id,
                                offset,
                                bytes: more,
                            } => {
                                assert_eq!(offset, Some(here.len() as u64));
                                here.extend_from_slice(&more);
                                assert!(told || here.len() <= EARLY, "it waits for an answer");
                                if told || here.len() < FIRST {
                                    continue;
                                }
                                match answer {
                                    "ready" => {
                                        told = true;
                                        say(&channel, "ready", ready(id, &[])).await;
                                    }
                                    "error" => {
                                        here.clear();
                                        open = None;
                                        say(&channel, "error", error(id, "internal", true)).await;
                                    }
                                    _ => {
                                        let server = cutter.lock().expect("a lock").clone();
                                        cut(&server.expect("it is there"));
                                    }
                                }
                            }
                            Request::Finish(finish) => {
                                assert!(told && here == bytes[..]);
                                say(&channel, "done", done(finish.id, "x", &here)).await;
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                }
            })
            .await;
            *sockets.lock().expect("a lock") = Some(server.clone());
            let upload = Uploader::new(link(&server)).put([memory("x", bytes.as_ref().clone())]);
            let (done, failed) = follow(upload, |_| {}).await;
            assert!(failed.is_empty(), "{answer}: {failed:?}");
            // A second offer sends nothing before the answer, and passes over what the first has sent.
            let again = if answer == "ready" { 0 } else { FIRST };
            assert_eq!(done[0].resumed, again as u64, "{answer}");
            let sent = done[0].sent as usize;
            assert!((3 * MIB..=3 * MIB + EARLY).contains(&sent), "{answer}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_sent_before_an_answer_is_counted_over_all_lanes() {
    bounded(async {
        // Files offered, and bytes sent of them.
        let (seen, _) = tokio::sync::watch::channel((0, 0));
        let counted = seen.clone();
        let server = acted(move |channel| {
            let counted = counted.clone();
            async move {
                let Some(Request::File(offer)) = hear(&channel).await else {
                    panic!("a file comes first");
                };
                counted.send_modify(|(files, _)| *files += 1);
                let mut all = counted.subscribe();
                let all = all.wait_for(|(files, bytes)| *files == 4 && *bytes >= EARLY);
                let refused = async {
                    assert!(all.await.is_ok());
                    say(&channel, "error", error(offer.id, "forbidden", false)).await;
                };
                let heard = async {
                    while let Some(request) = hear(&channel).await {
                        let Request::Chunk { id, bytes, .. } = request else {
                            panic!("{request:?}");
                        };
                        assert_eq!(id, offer.id);
                        counted.send_modify(|(_, sent)| *sent += bytes.len());
                    }
                };
                tokio::join!(refused, heard);
            }
        })
        .await;
        let files = (0..4).map(|n| memory(&format!("f{n}"), noise(n, 2 * MIB)));
        let (done, failed) = follow(Uploader::new(link(&server)).put(files), |_| {}).await;
        assert_eq!((done.len(), failed.len()), (0, 4));
        assert_eq!(*seen.borrow(), (4, EARLY));
    })
    .await;
}

/// What a played server does with the offers of one name, one after the other.
#[derive(Clone, Copy)]
enum Answer {
    Error(&'static str, bool),
    Done,
    /// Nothing: the connection is cut after `finish`.
    Cut,
}

/// Uploads one small file to a server that answers like this; gives what came of it, and the policies of the
/// offers.
async fn answered(
    if_exists: IfExists,
    script: &'static [Answer],
) -> (Result<Outcome, TransferError>, Vec<IfExists>) {
    let offers = Arc::new(Mutex::new(Vec::new()));
    let seen = offers.clone();
    let sockets: Arc<Mutex<Option<Server>>> = Arc::default();
    let cutter = sockets.clone();
    let server = acted(move |channel| {
        let (seen, cutter) = (seen.clone(), cutter.clone());
        async move {
            while let Some(request) = hear(&channel).await {
                match request {
                    Request::File(offer) => {
                        seen.lock().expect("a lock").push(offer.if_exists);
                        if offer.resume {
                            say(&channel, "ready", ready(offer.id, &[])).await;
                        }
                    }
                    Request::Finish(finish) => {
                        let count = seen.lock().expect("a lock").len();
                        match script.get(count - 1) {
                            Some(Answer::Error(code, retry)) => {
                                say(&channel, "error", error(finish.id, code, *retry)).await;
                            }
                            Some(Answer::Done) => {
                                let data = with(done(finish.id, "x", b"bytes"), "same", true);
                                say(&channel, "done", data).await;
                            }
                            Some(Answer::Cut) => {
                                let server = cutter.lock().expect("a lock").clone();
                                cut(&server.expect("a server"));
                            }
                            None => panic!("offered too often"),
                        }
                    }
                    _ => {}
                }
            }
        }
    })
    .await;
    *sockets.lock().expect("a lock") = Some(server.clone());
    let upload = Uploader::new(link(&server))
        .if_exists(if_exists)
        .put([memory("x", b"bytes".to_vec())]);
    let (mut done, mut failed) = follow(upload, |_| {}).await;
    let offers = offers.lock().expect("a lock").clone();
    let result = match (done.pop(), failed.pop()) {
        (Some(outcome), None) => Ok(outcome),
        (None, Some(error)) => Err(error),
        other => panic!("{other:?}"),
    };
    (result, offers)
}

fn code(error: &TransferError) -> &str {
    match error {
        TransferError::Refused { code, .. } => code.as_str(),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn what_fails_for_a_while_is_offered_again_and_what_is_final_is_not() {
    bounded(async {
        use Answer::{Done, Error};
        let (result, offers) = answered(
            IfExists::Same,
            &[Error("internal", true), Error("busy", true), Done],
        )
        .await;
        assert!(result.is_ok());
        assert_eq!(offers.len(), 3);
        let (result, offers) = answered(IfExists::Same, &[Error("hash_mismatch", true); 4]).await;
        assert_eq!(code(&result.unwrap_err()), "hash_mismatch");
        assert_eq!(offers.len(), 4, "three more");
        for (name, retry) in [("superseded", false), ("quota", true), ("forbidden", false)] {
            let script: &'static [Answer] = match name {
                "superseded" => &[Error("superseded", false)],
                "quota" => &[Error("quota", true)],
                _ => &[Error("forbidden", false)],
            };
            let (result, offers) = answered(IfExists::Same, script).await;
            let error = result.unwrap_err();
            assert_eq!((code(&error), error.retry()), (name, retry));
            assert_eq!(offers.len(), 1, "{name}");
        }
    })
    .await;
}

#[tokio::test]
async fn after_a_lost_answer_a_taken_name_is_looked_at() {
    bounded(async {
        use Answer::{Cut, Done, Error};
        let (result, offers) = answered(IfExists::Error, &[Error("exists", false)]).await;
        assert_eq!(code(&result.unwrap_err()), "exists");
        assert_eq!(offers, [IfExists::Error], "nothing was lost: it is taken");
        let (result, offers) =
            answered(IfExists::Error, &[Cut, Error("exists", false), Done]).await;
        let outcome = result.expect("it is ours");
        assert!(!outcome.same, "this run has brought it");
        assert_eq!(offers, [IfExists::Error, IfExists::Error, IfExists::Same]);
        let (result, offers) = answered(
            IfExists::Error,
            &[Cut, Error("exists", false), Error("exists", false)],
        )
        .await;
        assert_eq!(code(&result.unwrap_err()), "exists");
        assert_eq!(offers.len(), 3, "it is another's");
    })
    .await;
}

/// What a rate is made of: bytes that were sent and have arrived, and nothing of what was there already.
#[tokio::test]
async fn what_has_moved_is_what_was_sent_and_has_arrived() {
    bounded(async {
        let bytes = noise(5, 4 * MIB);
        let parts = [(MIB, 2 * MIB), (3 * MIB, 3 * MIB + 1000)];
        let have: Vec<_> = parts
            .iter()
            .map(|(from, to)| {
                let hash = *blake3::hash(&bytes[*from..*to]).as_bytes();
                (*from as u64, (*to - *from) as u64, hash)
            })
            .collect();
        let there = MIB + 1000;
        let content = bytes.clone();
        let server = acted(move |channel| {
            let (have, content) = (have.clone(), content.clone());
            async move {
                while let Some(request) = hear(&channel).await {
                    match request {
                        Request::File(offer) => {
                            say(&channel, "ready", ready(offer.id, &have)).await
                        }
                        Request::Chunk { id, offset, bytes } => {
                            // All there is up to here, and half of what just came.
                            let recv = offset.expect("an offset") + bytes.len() as u64 / 2;
                            let ack = [
                                ("id", id.into()),
                                ("recv", recv.into()),
                                ("safe", 0_u64.into()),
                            ];
                            say(&channel, "ack", map(ack)).await;
                        }
                        Request::Finish(finish) => {
                            say(&channel, "done", done(finish.id, "x", &content)).await;
                        }
                        _ => {}
                    }
                }
            }
        })
        .await;
        let mut upload = Uploader::new(link(&server)).put([memory("x", bytes.clone())]);
        let mut last = 0;
        while let Some(event) = upload.next().await {
            if let Event::Progress(progress) = event {
                assert!(progress.moved >= last, "it went down");
                assert!(progress.moved as usize <= bytes.len() - there);
                assert!(progress.sized);
                last = progress.moved;
            }
        }
        assert_eq!(upload.progress().moved as usize, bytes.len() - there);

        // One that is there as a whole, large and small; and one whose size nobody knows before its end.
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        for len in [2 * MIB, 300] {
            let put = || Uploader::new(&socket).put([memory(&format!("{len}"), noise(6, len))]);
            let mut first = put();
            while first.next().await.is_some() {}
            assert_eq!(first.progress().moved as usize, len);
            let mut second = put();
            while second.next().await.is_some() {}
            assert!(second.progress().moved as usize <= EARLY.min(len), "{len}");
        }
        let reader = std::io::Cursor::new(noise(7, 3 * MIB));
        let mut upload = Uploader::new(&socket).put([Source::reader(reader, rel("piped"))]);
        let mut seen = 0;
        while let Some(event) = upload.next().await {
            if let Event::Progress(progress) = event {
                let over = progress.files_done == 1;
                assert_eq!(progress.sized, over || progress.files == 0, "{progress:?}");
                seen += 1;
            }
        }
        assert!(seen > 0);
        let end = upload.progress();
        assert!(end.sized && end.moved == 3 * MIB as u64, "{end:?}");
    })
    .await;
}

/// A `done` says what is stored: the client believes it only where that is what it has read.
#[tokio::test]
async fn a_done_counts_only_for_the_bytes_of_its_source() {
    /// When the server says `done`, of which bytes, and whether they were there already.
    type Case = (bool, &'static [u8], u64, bool);
    let cases: [Case; 6] = [
        (false, b"bytes", 5, false),
        (false, b"other", 5, false),
        (false, b"other", 5, true),
        (false, b"bytes", 6, false),
        (true, b"other", 5, false),
        (true, b"bytes", 5, true),
    ];
    bounded(async {
        for policy in [IfExists::Same, IfExists::Skip, IfExists::Rename] {
            // One that is sent whole, and one whose bytes wait for `ready`.
            for small in [true, false] {
                for (early, content, size, same) in cases {
                    let server = acted(move |channel| async move {
                        while let Some(request) = hear(&channel).await {
                            let id = match request {
                                Request::File(offer) if early => offer.id,
                                Request::Put(put) => put.offer.id,
                                Request::File(offer) if offer.resume => {
                                    say(&channel, "ready", ready(offer.id, &[])).await;
                                    continue;
                                }
                                Request::Finish(finish) if !early => finish.id,
                                _ => continue,
                            };
                            let data = with(done(id, "x", content), "size", size);
                            say(&channel, "done", with(data, "same", same)).await;
                        }
                    })
                    .await;
                    let (count, ours) = match small {
                        true => (40, b"bytes".to_vec()),
                        false => (2, noise(4, 600_000)),
                    };
                    let sources = (0..count).map(move |n| memory(&format!("{n}"), ours.clone()));
                    let upload = Uploader::new(link(&server)).if_exists(policy).put(sources);
                    let (done, failed) = follow(upload, |_| {}).await;
                    let equal = small && content == b"bytes" && size == 5;
                    let skipped = policy == IfExists::Skip && same;
                    let expected = if equal || skipped { count } else { 0 };
                    let what = format!("{policy} {small} {early} {size} {same}: {failed:?}");
                    assert_eq!(done.len(), expected, "{what}");
                    for error in failed {
                        let kind = error.kind();
                        assert!(
                            matches!(kind, ErrorKind::Integrity | ErrorKind::Other),
                            "{what}"
                        );
                    }
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_reader_is_sent_to_its_end_and_not_twice() {
    bounded(async {
        let fixture = Fixture::new().await;
        let bytes = noise(8, 3 * MIB + 5);
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&bytes).expect("room");
        file.rewind().expect("a file");
        let sources = vec![
            Source::reader(file, rel("stdin")),
            Source::reader(std::io::empty(), rel("empty")),
        ];
        let (done, failed) = drain(Uploader::new(link(&fixture.server)).put(sources)).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!((done[0].size, done[1].size), (bytes.len() as u64, 0));
        assert!(fixture.stored("stdin") == bytes);

        // Endless, and cut off.
        let endless = Source::reader(std::io::repeat(7), rel("endless"));
        let mut sources = vec![endless];
        sources.extend((0..3).map(|n| memory(&format!("f{n}"), noise(n, 2 * MIB))));
        let upload = Uploader::new(link(&fixture.server)).put(sources);
        let mut stored = 0;
        let (done, failed) = follow(upload, |event| {
            if let Event::Done(_) = event {
                stored += 1;
                if stored == 3 {
                    cut(&fixture.server);
                }
            }
        })
        .await;
        assert_eq!((done.len(), failed.len()), (3, 1), "{failed:?}");
        assert_eq!(failed[0].kind(), ErrorKind::Network);
        assert!(!fixture.visible().contains(&"endless".to_owned()));
    })
    .await;
}

/// Fails in the middle.
struct Broken(usize);

impl Read for Broken {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = buffer.len().min(self.0);
        if count == 0 {
            return Err(std::io::Error::other("the pipe broke"));
        }
        self.0 -= count;
        Ok(count)
    }
}

#[tokio::test]
async fn each_failure_is_reported_in_its_place() {
    bounded(async {
        let fixture = Fixture::new().await;
        let unreadable = TransferError::NotAFile {
            path: "/dev/null".into(),
        };
        let sources = vec![
            memory("a", noise(1, 10)),
            Source::failed("../no name", unreadable),
            Source::reader(Broken(700_000), rel("broken")),
            memory("b", noise(2, 700_000)),
        ];
        let (done, mut failed) = drain(Uploader::new(link(&fixture.server)).put(sources)).await;
        failed.sort_by(|a, b| a.0.cmp(&b.0));
        let names: Vec<_> = failed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["../no name", "broken"]);
        assert!(
            failed
                .iter()
                .all(|(_, error)| error.kind() == ErrorKind::LocalFile)
        );
        assert_eq!((done[0].index, done[1].index), (0, 3));
        assert_eq!(fixture.visible(), ["a", "b"]);
    })
    .await;
}

#[tokio::test]
async fn directories_come_after_what_is_in_them_and_carry_what_is_preserved() {
    bounded(async {
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = log.clone();
        let server = acted(move |channel| {
            let seen = seen.clone();
            async move {
                let (mut paths, mut sums) = (HashMap::new(), HashMap::new());
                let log = |line: String| seen.lock().expect("a lock").push(line);
                while let Some(request) = hear(&channel).await {
                    match request {
                        Request::File(offer) => {
                            let mode = offer.meta.mode.map_or(0, |mode| mode);
                            log(format!(
                                "file {} {mode:o} {}",
                                offer.path, offer.meta.mtime_ns
                            ));
                            if offer.resume {
                                say(&channel, "ready", ready(offer.id, &[])).await;
                            }
                            paths.insert(offer.id, offer.path);
                        }
                        Request::Chunk { id, bytes, .. } => {
                            sums.entry(id)
                                .or_insert_with(Vec::new)
                                .extend_from_slice(&bytes);
                        }
                        Request::Finish(finish) => {
                            let bytes = sums.remove(&finish.id).unwrap_or_default();
                            let path = &paths[&finish.id];
                            log(format!("done {path}"));
                            say(&channel, "done", done(finish.id, path, &bytes)).await;
                        }
                        Request::Dir(dir) => {
                            let mtime = dir.meta.mtime.map_or(0, |mtime| mtime);
                            log(format!("dir {} {mtime}", dir.path));
                            say(&channel, "done", done(dir.id, &dir.path, b"")).await;
                        }
                        Request::Link(link) => {
                            log(format!("link {} {}", link.path, link.target));
                            say(&channel, "done", done(link.id, &link.path, b"")).await;
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        })
        .await;
        let dir = tempfile::tempdir().expect("a directory");
        let local = dir.path().join("x");
        std::fs::write(&local, noise(1, 400_000)).expect("a file");
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = std::fs::Permissions::from_mode(0o640);
            std::fs::set_permissions(&local, mode).expect("our file");
            let time = std::time::SystemTime::UNIX_EPOCH + Duration::new(1_000, 7);
            let times = std::fs::FileTimes::new().set_modified(time);
            let file = std::fs::File::options().write(true).open(&local);
            file.and_then(|file| file.set_times(times))
                .expect("our file");
        }
        let meta = |secs| Meta {
            mtime: Some(Time { secs, nanos: 0 }),
            mode: Some(0o755),
        };
        let sources = || {
            vec![
                Source::file(&local, rel("d/e/x")),
                Source::link(rel("d/link"), "e/x"),
                Source::dir(rel("d/e"), meta(5)),
                Source::dir(rel("d"), meta(6)),
                Source::dir(rel("empty"), meta(7)),
            ]
        };
        for (preserve, file, times) in [
            (true, "file d/e/x 640 7", [5, 6, 7]),
            (false, "file d/e/x 0 0", [0; 3]),
        ] {
            log.lock().expect("a lock").clear();
            let upload = Uploader::new(link(&server))
                .preserve(preserve)
                .lanes(2)
                .put(sources());
            let (done, failed) = drain(upload).await;
            assert!(failed.is_empty(), "{failed:?}");
            assert_eq!(done.len(), 5);
            let log = log.lock().expect("a lock").clone();
            let at = |line: &str| {
                log.iter()
                    .position(|known| known == line)
                    .unwrap_or_else(|| panic!("{line}: {log:?}"))
            };
            let [e, d, empty] = times;
            assert!(at(file) < at("done d/e/x"));
            assert!(at("done d/e/x") < at(&format!("dir d/e {e}")));
            assert!(at(&format!("dir d/e {e}")) < at(&format!("dir d {d}")));
            assert!(at("link d/link e/x") < at(&format!("dir d {d}")));
            at(&format!("dir empty {empty}"));
        }
    })
    .await;
}

#[tokio::test]
async fn sources_are_listed_only_as_far_as_there_is_room() {
    bounded(async {
        // A server that takes everything and answers nothing.
        let server = acted(|channel| async move { while hear(&channel).await.is_some() {} }).await;
        let listed = Arc::new(AtomicUsize::new(0));
        let dropped = Arc::new(AtomicBool::new(false));
        struct Told(Arc<AtomicBool>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let (count, told) = (listed.clone(), Told(dropped.clone()));
        let sources = (0_usize..).map(move |n| {
            let _told = &told;
            count.fetch_add(1, Ordering::SeqCst);
            memory(&format!("f{n}"), vec![1; 10])
        });
        let mut upload = Uploader::new(link(&server)).lanes(2).put(sources);
        // The lanes are full when nothing has been begun for a while.
        let quiet = async |upload: &mut Upload| {
            loop {
                match tokio::time::timeout(Duration::from_millis(500), upload.next()).await {
                    Ok(Some(Event::Started { .. } | Event::Progress(_))) => {}
                    Ok(other) => panic!("{other:?}"),
                    Err(_) => return,
                }
            }
        };
        quiet(&mut upload).await;
        let most = 8192 + 2 * (256 + 3 * 64) + 1;
        let now = listed.load(Ordering::SeqCst);
        assert!((8192..=most).contains(&now), "{now}");
        assert!(!upload.progress().listed);
        drop(upload);
        while !dropped.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_rate_is_kept_by_all_lanes_together() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket: Socket = fixture.connect().await;
        let since = std::time::Instant::now();
        let upload = Uploader::new(&socket)
            .limit(Limiter::new(2 * MIB as u64))
            .put((0..4).map(|n| memory(&format!("f{n}"), noise(n, MIB))));
        let (done, failed) = drain(upload).await;
        assert!(failed.is_empty() && done.len() == 4, "{failed:?}");
        // The burst apart; how much longer it takes is the machine's business.
        assert!(since.elapsed() > Duration::from_millis(1700));
    })
    .await;
}
