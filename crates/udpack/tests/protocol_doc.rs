//! Runs `docs/PROTOCOL.md` against the library: every test vector, the sample session and the table
//! of close codes. The document is the fixture, so the two cannot drift apart. What §11 says beyond the shape
//! of a message is checked by the test of the same name in `udpack-transfer`.

#[path = "protocol_doc/vectors.rs"]
mod vectors;

use std::fmt::Write as _;

use vectors::{DOCUMENT, Value, Vector, blocks, read_hex, read_json, read_msgpack, vectors};

const DEFAULT_FRAME_LIMIT: usize = 1_114_112;

/// Fewer than these, and the parser below has gone blind.
const MIN_ACCEPTED: usize = 180;
const MIN_REFUSED: usize = 270;
const MIN_SESSION_FRAMES: usize = 40;

#[test]
fn every_vector_of_the_document_holds() {
    let vectors = vectors();
    let accepted = vectors
        .iter()
        .filter(|vector| vector.refusal().is_none())
        .count();
    let refused = vectors.len() - accepted;
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

#[test]
fn vector_names_are_unique() {
    let mut names: Vec<_> = vectors()
        .iter()
        .map(|vector| vector.name().to_owned())
        .collect();
    names.sort();
    let all = names.len();
    names.dedup();
    assert_eq!(all, names.len());
}

#[test]
fn sample_session_says_what_its_bytes_say() {
    let records = session();
    let frames = records
        .iter()
        .filter(|record| record.message.is_some())
        .count();
    assert!(frames >= MIN_SESSION_FRAMES, "frames found: {frames}");

    for record in records {
        let Some(expected) = record.message else {
            continue;
        };
        let (bodies, error) = library::frames(DEFAULT_FRAME_LIMIT, &record.bytes, usize::MAX);
        assert_eq!(error, None, "{}", record.line);
        assert_eq!(bodies.len(), 1, "{}", record.line);
        assert_eq!(read_msgpack(&bodies[0]), Ok(expected), "{}", record.line);

        let message = library::message(&bodies[0]);
        assert!(message.is_ok(), "{}: {message:?}", record.line);
        let event = message.map(|message| message.event).unwrap_or_default();
        if let Some(kind) = event
            .strip_prefix('$')
            .filter(|kind| library::TABLES.contains(kind))
        {
            assert_eq!(library::table(kind, &bodies[0]), Ok(()), "{}", record.line);
        }
    }
}

/// Every direction of every stream of the session, taken whole.
#[test]
fn sample_session_ends_every_stream_between_two_frames() {
    let mut streams: Vec<(String, Vec<u8>)> = Vec::new();
    for record in session() {
        match streams.iter_mut().find(|(name, _)| *name == record.stream) {
            Some((_, bytes)) => bytes.extend(record.bytes),
            None => streams.push((record.stream, record.bytes)),
        }
    }
    assert!(
        streams.len() >= 6,
        "stream directions found: {}",
        streams.len()
    );
    for (name, bytes) in streams {
        let (bodies, error) = library::frames(DEFAULT_FRAME_LIMIT, &bytes, 1);
        assert_eq!(error, None, "{name}");
        assert!(!bodies.is_empty(), "{name}");
    }
}

#[test]
fn close_codes_of_the_document_are_those_of_the_library() {
    let documented: Vec<_> = DOCUMENT.lines().filter_map(close_code_row).collect();
    assert_eq!(documented, library::close_codes());
}

/// Reads ``| `0x2a` | `name` | … | yes | meaning |``: value, name, retry.
fn close_code_row(line: &str) -> Option<(u64, &str, bool)> {
    let cells: Vec<_> = line.strip_prefix("| `0x")?.split(" | ").collect();
    let value = u64::from_str_radix(cells.first()?.strip_suffix('`')?, 16).ok()?;
    let name = cells.get(1)?.trim_matches('`');
    let retry = *cells.get(cells.len().checked_sub(2)?)? == "yes";
    Some((value, name, retry))
}

/// The only place that touches the library.
mod library {
    use bytes::Bytes;
    use udpack::wire::{self, Decode, FrameDecoder, Message};

    /// The protocol events whose tables the library checks by a function of their own.
    pub(super) const TABLES: [&str; 16] = [
        "hello",
        "welcome",
        "open",
        "close",
        "goaway",
        "channels",
        "resume",
        "ack",
        "refresh",
        "refreshed",
        "gap",
        "room",
        "at",
        "fault",
        "mark",
        "passed",
    ];

    #[derive(Debug)]
    pub(super) struct Decoded {
        pub(super) event: String,
        pub(super) id: Option<u64>,
        pub(super) deadline: Option<std::time::Duration>,
        pub(super) data: Vec<u8>,
    }

    /// Value, name and whether to retry, in ascending order.
    pub(super) fn close_codes() -> Vec<(u64, &'static str, bool)> {
        udpack::CloseCode::ALL
            .iter()
            .map(|code| (code.value(), code.name(), code.retry()))
            .collect()
    }

    /// Feeds `stream` in pieces of `step` bytes, then its end. Returns the bodies and the name of
    /// the close code, if any.
    pub(super) fn frames(
        limit: usize,
        stream: &[u8],
        step: usize,
    ) -> (Vec<Vec<u8>>, Option<&'static str>) {
        let mut decoder = FrameDecoder::new(limit);
        let mut bodies = Vec::new();
        for piece in stream.chunks(step.min(stream.len().max(1))) {
            decoder.push(Bytes::copy_from_slice(piece));
            loop {
                match decoder.next_frame() {
                    Ok(Some(body)) => bodies.push(body.to_vec()),
                    Ok(None) => break,
                    Err(error) => return (bodies, Some(error.close_code().name())),
                }
            }
        }
        let end = decoder
            .finish()
            .err()
            .map(|error| error.close_code().name());
        (bodies, end)
    }

    pub(super) fn message(body: &[u8]) -> Result<Decoded, &'static str> {
        let message = Message::decode(Bytes::copy_from_slice(body))
            .map_err(|error| error.close_code().name())?;
        Ok(Decoded {
            event: message.event().to_owned(),
            id: message.id(),
            deadline: message.deadline(),
            data: message.raw().to_vec(),
        })
    }

    /// Checks a body against the table of the protocol event `$kind`.
    pub(super) fn table(kind: &str, body: &[u8]) -> Result<(), &'static str> {
        let message = Message::decode(Bytes::copy_from_slice(body))
            .map_err(|error| error.close_code().name())?;
        let checked = match kind {
            "hello" => wire::HelloMessage::decode(&message).map(drop),
            "welcome" => wire::Welcome::decode(&message).map(drop),
            "open" => wire::Open::decode(&message).map(drop),
            "close" => udpack::CloseReason::decode(&message).map(drop),
            "goaway" => udpack::GoAway::decode(&message).map(drop),
            "channels" => wire::Channels::decode(&message).map(drop),
            "resume" => wire::Resumed::decode(&message).map(drop),
            "ack" => wire::Ack::decode(&message).map(drop),
            "refresh" => wire::Refresh::decode(&message).map(drop),
            "refreshed" => wire::Refreshed::decode(&message).map(drop),
            "gap" => udpack::Gap::decode(&message).map(drop),
            "room" => wire::RoomAt::decode(&message).map(drop),
            "at" => wire::At::decode(&message).map(drop),
            "fault" => udpack::Fault::decode(&message).map(drop),
            "mark" => wire::Mark::decode(&message).map(drop),
            "passed" => wire::Passed::decode(&message).map(drop),
            _ => return Err("no such kind of vector"),
        };
        checked.map_err(|error| error.close_code().name())
    }

    /// Checks a volatile message, which has no frame.
    pub(super) fn datagram(body: &[u8]) -> Result<(), &'static str> {
        use udpack::{CloseCode, Volatile, VolatileError};
        match Volatile::decode(Bytes::copy_from_slice(body)) {
            Ok(_) => Ok(()),
            Err(VolatileError::Msgpack(_)) => Err(CloseCode::BAD_MSGPACK.name()),
            Err(_) => Err(CloseCode::BAD_MESSAGE.name()),
        }
    }

    /// A whole frame: length and body.
    pub(super) fn encode(event: &str, data: &super::Value) -> Result<Vec<u8>, String> {
        let encoded = udpack::Encoded::new(event, data).map_err(|error| error.to_string())?;
        Ok(encoded.bytes().to_vec())
    }
}

fn check(vector: &Vector) -> Result<(), String> {
    let bytes = vector.bytes()?;
    match vector.kind() {
        "frame" => check_frames(vector, &bytes),
        "message" => check_message(vector, &bytes, library::message(&bytes)),
        // Their tables are the other test's; what these refuse must still be a message.
        "lane" | "lane-reply" | "ask" => {
            let decoded = library::message(&bytes);
            match vector.refusal() {
                Some(_) => decoded
                    .map(drop)
                    .map_err(|code| format!("no message at all: {code}")),
                None => check_message(vector, &bytes, decoded),
            }
        }
        "datagram" => check_datagram(vector, &bytes),
        kind if library::TABLES.contains(&kind) => {
            // What the table refuses must still be a message, or this tests something else.
            library::message(&bytes).map_err(|code| format!("no message at all: {code}"))?;
            let decoded = library::table(kind, &bytes).and_then(|()| library::message(&bytes));
            check_message(vector, &bytes, decoded)
        }
        kind => Err(format!("unknown kind: {kind:?}")),
    }
}

fn check_frames(vector: &Vector, stream: &[u8]) -> Result<(), String> {
    let limit = match vector.field("limit") {
        Some(limit) => limit.parse().map_err(|error| format!("limit: {error}"))?,
        None => DEFAULT_FRAME_LIMIT,
    };
    let bodies = vector
        .fields
        .iter()
        .filter(|(key, _)| key == "body")
        .map(|(_, hex)| read_hex(hex));
    let bodies: Vec<Vec<u8>> = bodies.collect::<Result<_, _>>()?;
    let bytewise = if stream.len() <= 4096 { 1 } else { 4093 };
    for step in [usize::MAX, bytewise, 3 * bytewise] {
        let (found, code) = library::frames(limit, stream, step);
        if code != vector.refusal() {
            return Err(format!(
                "in steps of {step}: expected {:?}, got {code:?}",
                vector.refusal()
            ));
        }
        if found != bodies {
            return Err(format!(
                "in steps of {step}: expected {} other frames, got {}",
                bodies.len(),
                found.len()
            ));
        }
    }
    Ok(())
}

/// A volatile message: whether it is accepted, and what it says, item by item.
fn check_datagram(vector: &Vector, bytes: &[u8]) -> Result<(), String> {
    let refusal = library::datagram(bytes).err();
    if refusal != vector.refusal() {
        return Err(format!("expected {:?}, got {refusal:?}", vector.refusal()));
    }
    if refusal.is_some() {
        return Ok(());
    }
    let fields = ["event", "data", "seq", "key"];
    let said: Vec<Value> = fields
        .into_iter()
        .filter_map(|field| vector.field(field))
        .map(read_json)
        .collect::<Result<_, _>>()?;
    let found = read_msgpack(bytes)?;
    if found != Value::Array(said) {
        return Err(format!("says something else: {found:?}"));
    }
    Ok(())
}

fn check_message(
    vector: &Vector,
    bytes: &[u8],
    decoded: Result<library::Decoded, &str>,
) -> Result<(), String> {
    let message = match (decoded, vector.refusal()) {
        (Err(code), Some(expected)) if code == expected => return Ok(()),
        (Err(code), Some(expected)) => return Err(format!("expected {expected}, got {code}")),
        (Err(code), None) => return Err(format!("expected ok, got {code}")),
        (Ok(_), Some(expected)) => return Err(format!("expected {expected}, was accepted")),
        (Ok(message), None) => message,
    };
    let Value::Str(event) = read_json(vector.field("event").ok_or("no event")?)? else {
        return Err("event is no string".to_owned());
    };
    if message.event != event {
        return Err(format!("expected event {event:?}, got {:?}", message.event));
    }
    let id = vector
        .field("id")
        .map(str::parse)
        .transpose()
        .map_err(|error| format!("id: {error}"))?;
    if message.id != id {
        return Err(format!("expected id {id:?}, got {:?}", message.id));
    }
    let deadline = vector
        .field("deadline")
        .map(str::parse)
        .transpose()
        .map_err(|error| format!("deadline: {error}"))?
        .map(std::time::Duration::from_millis);
    if message.deadline != deadline {
        return Err(format!(
            "expected deadline {deadline:?}, got {:?}",
            message.deadline
        ));
    }
    let data = vector.data()?;
    let found = read_msgpack(&message.data)?;
    if found != data {
        return Err(format!("expected data {data:.200?}, got {found:.200?}"));
    }
    if vector.field("canonical") == Some("yes") {
        let length = u32::try_from(bytes.len()).map_err(|error| error.to_string())?;
        let expected = [&length.to_be_bytes()[..], bytes].concat();
        let encoded = library::encode(&event, &data)?;
        if encoded != expected {
            return Err(format!(
                "encodes to other bytes, the first of them: {:02x?}",
                &encoded[..encoded.len().min(40)]
            ));
        }
    }
    Ok(())
}

/// One step of the sample session: a frame and what it says, or the end of a direction.
struct Record {
    line: String,
    stream: String,
    bytes: Vec<u8>,
    message: Option<Value>,
}

fn session() -> Vec<Record> {
    let mut records: Vec<(String, String, String)> = Vec::new();
    for block in blocks("session") {
        for line in block.lines().filter(|line| !line.starts_with('#')) {
            if !line.starts_with(' ') {
                records.push((line.to_owned(), line[3..].to_owned(), String::new()));
                continue;
            }
            let (_, hex, json) = records.last_mut().expect("a session begins with a frame");
            let target = if line.trim().starts_with('[') || !json.is_empty() {
                json
            } else {
                hex
            };
            target.push(' ');
            target.push_str(line.trim());
        }
    }
    let read = |(line, hex, json): (String, String, String)| {
        let stream = line[..3].trim().to_owned();
        let end = hex.trim() == "FIN";
        let bytes = if end {
            Vec::new()
        } else {
            read_hex(&hex).expect("the session's hex is well formed")
        };
        let message =
            (!end).then(|| read_json(&json).expect("the session's messages are well formed"));
        Record {
            line,
            stream,
            bytes,
            message,
        }
    };
    records.into_iter().map(read).collect()
}
