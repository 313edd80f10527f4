//! Runs the vectors of `docs/PROTOCOL.md` that are about §11 against the library: what a lane's messages say and
//! which of them are refused, and which requests a server takes.

mod common;
#[path = "../../udpack/tests/protocol_doc/vectors.rs"]
mod vectors;

use std::fmt::Write as _;

use bytes::Bytes;
use common::{Fixture, bounded};
use serde::de::IgnoredAny;
use udpack::{Channel, Deny, Encoded, Hello, Message, Peer, RequestError};
use udpack_transfer::wire::{self, Have, MetaFields, Reply, Request};
use udpack_transfer::{
    CHANNEL, Code, Control, IfExists, JOBS_CHANNEL, Receiver, ReceiverConfig, STATS_CHANNEL, Scope,
    ServerStats, Store, StoreConfig, Synced, Xattr, XattrList, Xattrs,
};
use vectors::{Value, Vector, read_msgpack, vectors};

/// Fewer than these, and the parser has gone blind.
const MIN_ACCEPTED: usize = 64;
const MIN_REFUSED: usize = 104;
const MIN_ASKED: usize = 51;

/// What a message was read as: each key of its table, `None` for what is absent, nil, or as if absent.
type Said = Vec<(&'static str, Option<Value>)>;

#[test]
fn every_vector_of_a_lane_holds() {
    let vectors: Vec<_> = vectors()
        .into_iter()
        .filter(|vector| vector.kind().starts_with("lane"))
        .collect();
    let refused = vectors.iter().filter(|v| v.refusal().is_some()).count();
    let accepted = vectors.len() - refused;
    assert!(
        accepted >= MIN_ACCEPTED,
        "accepted vectors found: {accepted}"
    );
    assert!(refused >= MIN_REFUSED, "refused vectors found: {refused}");

    let mut failures = String::new();
    for vector in &vectors {
        if let Err(why) = check(vector) {
            writeln!(failures, "{}: {why}", vector.name()).expect("writing to a string succeeds");
        }
    }
    assert!(failures.is_empty(), "vectors that do not hold:\n{failures}");
}

fn check(vector: &Vector) -> Result<(), String> {
    let bytes = Bytes::from(vector.bytes()?);
    let message = Message::decode(bytes).map_err(|error| error.to_string())?;
    let decoded = match vector.kind() {
        "lane" => wire::decode(&message).map(|request| request.map(asked)),
        "lane-reply" => wire::decode_reply(&message).map(|reply| reply.map(answered)),
        kind => return Err(format!("unknown kind: {kind:?}")),
    };
    match (decoded, vector.refusal()) {
        (Err(bad), Some("bad_message")) => {
            let about = vector.field("about").map(str::parse).transpose();
            let about = about.map_err(|error| format!("about: {error}"))?;
            // What a server breaks is not answered.
            if vector.kind() == "lane" && bad.id != about {
                return Err(format!("expected it to be about {about:?}: {bad:?}"));
            }
            Ok(())
        }
        (Err(bad), refusal) => Err(format!("expected {refusal:?}, got {bad}")),
        (Ok(None), _) => Err("not an event of a lane".to_owned()),
        (Ok(Some(_)), Some(refusal)) => Err(format!("expected {refusal}, was accepted")),
        (Ok(Some(said)), None) => {
            let data = vector.data()?;
            for (key, found) in said {
                let written = written(&data, key);
                if found != written {
                    return Err(format!(
                        "{key}: expected {written:.200?}, got {found:.200?}"
                    ));
                }
            }
            Ok(())
        }
    }
}

/// What a vector's data has under this key, `None` where that means as much as nothing.
fn written(data: &Value, key: &str) -> Option<Value> {
    let Value::Map(pairs) = data else {
        return None;
    };
    let (_, value) = pairs
        .iter()
        .find(|(name, _)| *name == Value::Str(key.to_owned()))?;
    let nothing = match key {
        "mtime_ns" => *value == Value::Int(0),
        "have" => *value == Value::Array(Vec::new()),
        "if_exists" => *value == text("same"),
        // A word of another version.
        "sync" => ![text("file"), text("batch"), text("none")].contains(value),
        _ => *value == Value::Bool(false),
    };
    match value {
        Value::Nil => None,
        _ if nothing => None,
        // What lies above the permissions is the kind of file.
        Value::Int(mode) if key == "mode" => Some(Value::Int(mode & 0o7777)),
        value => Some(value.clone()),
    }
}

fn text(text: &str) -> Value {
    Value::Str(text.to_owned())
}

/// A name, from its text form.
fn name(text: &str) -> Value {
    match String::from_utf8(udpack_transfer::names::bytes(text).into_owned()) {
        Ok(name) => Value::Str(name),
        Err(raw) => Value::Bin(raw.into_bytes()),
    }
}

fn int(number: impl Into<i128>) -> Option<Value> {
    Some(Value::Int(number.into()))
}

fn flag(flag: bool) -> Option<Value> {
    flag.then_some(Value::Bool(true))
}

fn bin(bytes: &[u8]) -> Option<Value> {
    Some(Value::Bin(bytes.to_vec()))
}

fn policy(if_exists: IfExists) -> Option<Value> {
    (if_exists != IfExists::default()).then(|| text(&if_exists.to_string()))
}

fn ranges(have: &Have) -> Option<Value> {
    let range = |(off, len, hash): &(u64, u64, [u8; 32])| {
        Value::Array(
            [int(*off), int(*len), bin(hash)]
                .into_iter()
                .flatten()
                .collect(),
        )
    };
    (!have.is_empty()).then(|| Value::Array(have.iter().map(range).collect()))
}

fn meta(meta: MetaFields) -> Said {
    vec![
        ("mtime", meta.mtime.and_then(int)),
        ("mtime_ns", int(meta.mtime_ns).filter(|_| meta.mtime_ns > 0)),
        ("mode", meta.mode.and_then(int)),
    ]
}

fn pairs(xattrs: &XattrList) -> Option<Value> {
    let pair = |one: &Xattr| Some(Value::Array(vec![bin(&one.name)?, bin(&one.value)?]));
    let all = xattrs.as_slice().iter();
    (!xattrs.as_slice().is_empty()).then(|| Value::Array(all.filter_map(pair).collect()))
}

fn modes(dirs: &[u32]) -> Option<Value> {
    (!dirs.is_empty()).then(|| Value::Array(dirs.iter().filter_map(|mode| int(*mode)).collect()))
}

fn asked(request: Request) -> Said {
    match request {
        Request::File(offer) => {
            let (path, size) = if offer.short {
                ("filename", "filesize")
            } else {
                ("path", "size")
            };
            let mut said = vec![
                ("id", int(offer.id).filter(|_| !offer.short)),
                (path, Some(name(&offer.path))),
                (size, offer.size.and_then(int)),
                ("if_exists", policy(offer.if_exists)),
                ("resume", flag(offer.resume)),
                ("run", offer.run.and_then(|run| bin(&run))),
                ("dirs", modes(&offer.dirs)),
                ("base", offer.base.as_deref().map(name)),
                ("xattrs", pairs(&offer.xattrs)),
            ];
            said.extend(meta(offer.meta));
            said
        }
        Request::Put(put) => {
            let mut said = vec![
                ("id", int(put.offer.id)),
                ("path", Some(name(&put.offer.path))),
                ("if_exists", policy(put.offer.if_exists)),
                ("run", put.offer.run.and_then(|run| bin(&run))),
                ("dirs", modes(&put.offer.dirs)),
                ("xattrs", pairs(&put.offer.xattrs)),
                ("hash", bin(&put.hash)),
                ("data", bin(&put.bytes)),
            ];
            assert_eq!(put.offer.size, Some(put.bytes.len() as u64));
            assert!(!put.offer.resume && !put.offer.short);
            said.extend(meta(put.offer.meta));
            said
        }
        Request::Dir(offer) => {
            let mut said = vec![
                ("id", int(offer.id)),
                ("path", Some(name(&offer.path))),
                ("dirs", modes(&offer.dirs)),
                ("xattrs", pairs(&offer.xattrs)),
            ];
            said.extend(meta(offer.meta));
            said
        }
        Request::Link(offer) => vec![
            ("id", int(offer.id)),
            ("path", Some(name(&offer.path))),
            ("target", Some(name(&offer.target))),
            ("dirs", modes(&offer.dirs)),
            ("if_exists", policy(offer.if_exists)),
        ],
        Request::Get(wish) => vec![
            ("id", int(wish.id)),
            ("path", Some(name(&wish.path))),
            ("have", ranges(&wish.have)),
            ("rate", wish.rate.and_then(int)),
            ("holes", flag(wish.holes)),
            (
                "xattrs",
                (wish.xattrs != Xattrs::None).then(|| text(&wish.xattrs.to_string())),
            ),
        ],
        Request::Chunk { id, offset, bytes } => vec![
            ("id", offset.and_then(|_| int(id))),
            ("off", offset.and_then(int)),
            ("chunk", bin(&bytes)),
        ],
        Request::Copy(copied) => vec![
            ("id", int(copied.id)),
            ("off", int(copied.offset)),
            ("from", int(copied.from)),
            ("len", int(copied.len)),
        ],
        Request::Hole(hole) => vec![
            ("id", int(hole.id)),
            ("off", int(hole.offset)),
            ("len", int(hole.len)),
        ],
        Request::Finish(finish) => vec![
            ("id", finish.hash.and_then(|_| int(finish.id))),
            ("size", finish.size.and_then(int)),
            ("hash", finish.hash.and_then(|hash| bin(&hash))),
        ],
        Request::Cancel { id, keep } => vec![("id", int(id)), ("keep", flag(keep))],
        // In the short form it is 0.
        Request::Done { id } => vec![("id", int(id).filter(|_| id > 0))],
        Request::Ack { id, recv } => vec![("id", int(id)), ("recv", int(recv))],
        other => panic!("a message that this test does not know: {other:?}"),
    }
}

fn answered(reply: Reply) -> Said {
    match reply {
        Reply::Ready {
            id,
            have,
            base,
            holes,
        } => vec![
            ("id", int(id)),
            ("have", ranges(&have)),
            ("base", base.and_then(int)),
            ("holes", flag(holes)),
        ],
        Reply::Ack { id, recv, safe } => {
            vec![("id", int(id)), ("recv", int(recv)), ("safe", int(safe))]
        }
        Reply::Done {
            id,
            path,
            size,
            hash,
            same,
            sync,
            mtime,
            xattrs,
        } => vec![
            ("id", int(id)),
            ("path", Some(name(&path))),
            ("size", int(size)),
            ("hash", bin(&hash)),
            ("same", flag(same)),
            (
                "sync",
                sync.map(|way| match way {
                    Synced::File => text("file"),
                    Synced::Batch => text("batch"),
                    Synced::None => text("none"),
                }),
            ),
            ("mtime", mtime.and_then(int)),
            ("xattrs", int(xattrs).filter(|_| xattrs > 0)),
        ],
        Reply::File {
            id,
            path,
            size,
            meta: fields,
            xattrs,
        } => {
            let mut said = vec![
                ("id", int(id)),
                ("path", Some(name(&path))),
                ("size", int(size)),
                (
                    "xattrs",
                    xattrs.map(|list| pairs(&list).unwrap_or(Value::Array(Vec::new()))),
                ),
            ];
            said.extend(meta(fields));
            said
        }
        Reply::Chunk { id, offset, bytes } => {
            vec![
                ("id", int(id)),
                ("off", int(offset)),
                ("chunk", bin(&bytes)),
            ]
        }
        Reply::Hole(hole) => vec![
            ("id", int(hole.id)),
            ("off", int(hole.offset)),
            ("len", int(hole.len)),
        ],
        Reply::Finish(finish) => vec![
            ("id", int(finish.id)),
            ("size", finish.size.and_then(int)),
            ("hash", finish.hash.and_then(|hash| bin(&hash))),
        ],
        Reply::Error {
            id,
            code,
            why,
            message,
            retry,
        } => vec![
            ("id", int(id)),
            ("code", Some(text(&code))),
            ("why", why.as_deref().map(text)),
            ("message", Some(text(&message))),
            ("retry", flag(retry)),
        ],
        other => panic!("a message that this test does not know: {other:?}"),
    }
}

/// Rows of two tables of the document: code, usual `retry`; code, `why`.
#[test]
fn the_codes_of_the_document_are_those_of_the_library() {
    let document = include_str!("../../../docs/PROTOCOL.md");
    let begin = document.find("### Error codes").expect("the section");
    let end = document[begin..].find("### Paths").expect("the next");
    let documented: Vec<_> = document[begin..begin + end]
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split(" | ");
            let code = cells.next()?.trim_end_matches('`');
            let cell = cells.next()?;
            let why = cell.strip_prefix('`').map(|why| why.trim_end_matches('`'));
            Some((code, why, cell == "yes"))
        })
        .collect();
    let rows = |of_several: bool| {
        let all = Code::ALL.iter().copied();
        all.filter(move |code| code.why().is_some() == of_several)
            .map(move |code| (code.as_str(), code.why(), !of_several && code.retry()))
    };
    let known: Vec<_> = rows(false).chain(rows(true)).collect();
    assert_eq!(documented, known);
}

/// The requests, asked of a server whose directory is empty: it answers something else than that they break
/// their table, or just that.
#[tokio::test]
async fn every_vector_of_a_request_holds() {
    bounded(async {
        let rights = Scope {
            read: true,
            delete: true,
            admin: true,
            ..Scope::default()
        };
        let config = ReceiverConfig {
            default_scope: rights,
            ..ReceiverConfig::default()
        };
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path().join("up"), StoreConfig::default()).expect("a store");
        let receiver = Receiver::new(store, config);
        let control = Control::new(&receiver);
        let anybody = |_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) };
        let more = |server| control.attach(server);
        let fixture = Fixture::serve_more(dir, receiver, anybody, more).await;
        let looking = fixture.server.clone();
        let looking = tokio::spawn(async move { control.run(&looking).await });
        let socket = fixture.connect().await;
        let lane = socket.open(CHANNEL).await.expect("a lane");
        let jobs = socket.open(JOBS_CHANNEL).await.expect("the list of jobs");
        let stats = socket.open(STATS_CHANNEL).await.expect("the state");
        let mut asked = 0;
        let mut failures = String::new();
        for vector in vectors().iter().filter(|vector| vector.kind() == "ask") {
            asked += 1;
            let channel = match vector.name() {
                name if name.starts_with("jobs") => &jobs,
                name if name.starts_with("stats") => &stats,
                _ => &lane,
            };
            if let Err(why) = ask(channel, vector).await {
                writeln!(failures, "{}: {why}", vector.name())
                    .expect("writing to a string succeeds");
            }
        }
        looking.abort();
        assert!(asked >= MIN_ASKED, "vectors found: {asked}");
        assert!(failures.is_empty(), "vectors that do not hold:\n{failures}");
    })
    .await;
}

/// What a server tells of its state is read whole, and written as it was.
#[test]
fn the_state_of_the_document_is_that_of_the_library() {
    let vectors = vectors();
    let vector = vectors.iter().find(|vector| vector.name() == "stats");
    let vector = vector.expect("a vector named `stats`");
    let bytes = Bytes::from(vector.bytes().expect("sound bytes"));
    let message = Message::decode(bytes.clone()).expect("a message");
    let stats: ServerStats = message.data().expect("the state");
    assert_eq!(stats.sockets[0].rtt, 0.03125);
    let frame = Encoded::new("stats", &stats).expect("it can be told");
    assert_eq!(frame.bytes()[4..], bytes);
}

async fn ask(channel: &Channel, vector: &Vector) -> Result<(), String> {
    let bytes = Bytes::from(vector.bytes()?);
    let message = Message::decode(bytes).map_err(|error| error.to_string())?;
    message.id().ok_or("no request")?;
    let data = read_msgpack(&message.raw())?;
    let answer = channel
        .request::<_, IgnoredAny>(message.event(), &data)
        .await;
    let code = match &answer {
        Ok(_) => None,
        Err(RequestError::NoHandler) => Some("no_handler"),
        Err(RequestError::Fault(fault)) => Some(fault.code.as_str()),
        Err(error) => return Err(error.to_string()),
    };
    match (vector.refusal(), code) {
        (Some(expected), code) if code == Some(expected) => Ok(()),
        (None, code) if code != Some("bad_payload") => Ok(()),
        (expected, code) => Err(format!("expected {expected:?}, got {code:?}")),
    }
}
