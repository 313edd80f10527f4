//! Runs `docs/PROTOCOL.md` against the library: every test vector, the sample session and the table
//! of close codes. The document is the fixture, so the two cannot drift apart. It is read with a JSON
//! parser and a msgpack reader of its own, so that a mistake in the library's cannot hide behind
//! itself.

use std::fmt::Write as _;

use serde::ser::{Error as _, Serialize, Serializer};

const DOCUMENT: &str = include_str!("../../../docs/PROTOCOL.md");
const DEFAULT_FRAME_LIMIT: usize = 1_114_112;

/// Fewer than these, and the parser below has gone blind.
const MIN_ACCEPTED: usize = 90;
const MIN_REFUSED: usize = 130;
const MIN_SESSION_FRAMES: usize = 15;

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
        if let Err(why) = vector.check() {
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
    use udpack::wire::{self, FrameDecoder, Message};

    /// The protocol events whose tables the library checks by a function of their own.
    pub(super) const TABLES: [&str; 5] = ["hello", "welcome", "open", "close", "goaway"];

    #[derive(Debug)]
    pub(super) struct Decoded {
        pub(super) event: String,
        pub(super) id: Option<u64>,
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
            data: message.raw().to_vec(),
        })
    }

    /// Checks a body against the table of the protocol event `$kind`.
    pub(super) fn table(kind: &str, body: &[u8]) -> Result<(), &'static str> {
        let message = Message::decode(Bytes::copy_from_slice(body))
            .map_err(|error| error.close_code().name())?;
        let checked = match kind {
            "hello" => wire::decode_hello(&message).map(drop),
            "welcome" => wire::decode_welcome(&message).map(drop),
            "open" => wire::decode_open(&message).map(drop),
            "close" => wire::decode_close(&message).map(drop),
            "goaway" => wire::decode_goaway(&message).map(drop),
            _ => return Err("no such kind of vector"),
        };
        checked.map_err(|error| error.close_code().name())
    }

    /// A whole frame: length and body.
    pub(super) fn encode(event: &str, data: &super::Value) -> Result<Vec<u8>, String> {
        let encoded = udpack::Encoded::new(event, data).map_err(|error| error.to_string())?;
        Ok(encoded.bytes().to_vec())
    }
}

struct Vector {
    fields: Vec<(String, String)>,
}

impl Vector {
    fn name(&self) -> &str {
        self.field("name").unwrap_or("a vector without a name")
    }

    fn field(&self, key: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    fn refusal(&self) -> Option<&str> {
        self.field("expect")?.strip_prefix("refuse ")
    }

    fn check(&self) -> Result<(), String> {
        let known = [
            "name",
            "kind",
            "expect",
            "limit",
            "hex",
            "event",
            "data",
            "id",
            "body",
            "canonical",
        ];
        if let Some((key, _)) = self
            .fields
            .iter()
            .find(|(key, _)| !known.contains(&key.as_str()))
        {
            return Err(format!("unknown field: {key}"));
        }
        if self.refusal().is_none() && self.field("expect") != Some("ok") {
            return Err(format!(
                "expect is neither ok nor a refusal: {:?}",
                self.field("expect")
            ));
        }
        let bytes = read_hex(self.field("hex").ok_or("no hex")?)?;
        match self.field("kind") {
            Some("frame") => self.check_frames(&bytes),
            Some("message") => self.check_message(&bytes, library::message(&bytes)),
            Some(kind) if library::TABLES.contains(&kind) => {
                // What the table refuses must still be a message, or this tests something else.
                library::message(&bytes).map_err(|code| format!("no message at all: {code}"))?;
                let decoded = library::table(kind, &bytes).and_then(|()| library::message(&bytes));
                self.check_message(&bytes, decoded)
            }
            kind => Err(format!("unknown kind: {kind:?}")),
        }
    }

    fn check_frames(&self, stream: &[u8]) -> Result<(), String> {
        let limit = match self.field("limit") {
            Some(limit) => limit.parse().map_err(|error| format!("limit: {error}"))?,
            None => DEFAULT_FRAME_LIMIT,
        };
        let bodies = self
            .fields
            .iter()
            .filter(|(key, _)| key == "body")
            .map(|(_, hex)| read_hex(hex));
        let bodies: Vec<Vec<u8>> = bodies.collect::<Result<_, _>>()?;
        let bytewise = if stream.len() <= 4096 { 1 } else { 4093 };
        for step in [usize::MAX, bytewise, 3 * bytewise] {
            let (found, code) = library::frames(limit, stream, step);
            if code != self.refusal() {
                return Err(format!(
                    "in steps of {step}: expected {:?}, got {code:?}",
                    self.refusal()
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

    fn check_message(
        &self,
        bytes: &[u8],
        decoded: Result<library::Decoded, &str>,
    ) -> Result<(), String> {
        let message = match (decoded, self.refusal()) {
            (Err(code), Some(expected)) if code == expected => return Ok(()),
            (Err(code), Some(expected)) => return Err(format!("expected {expected}, got {code}")),
            (Err(code), None) => return Err(format!("expected ok, got {code}")),
            (Ok(_), Some(expected)) => return Err(format!("expected {expected}, was accepted")),
            (Ok(message), None) => message,
        };
        let Value::Str(event) = read_json(self.field("event").ok_or("no event")?)? else {
            return Err("event is no string".to_owned());
        };
        if message.event != event {
            return Err(format!("expected event {event:?}, got {:?}", message.event));
        }
        let id = self
            .field("id")
            .map(str::parse)
            .transpose()
            .map_err(|error| format!("id: {error}"))?;
        if message.id != id {
            return Err(format!("expected id {id:?}, got {:?}", message.id));
        }
        let data = read_json(self.field("data").ok_or("no data")?)?;
        let found = read_msgpack(&message.data)?;
        if found != data {
            return Err(format!("expected data {data:.200?}, got {found:.200?}"));
        }
        if self.field("canonical") == Some("yes") {
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
}

/// The vectors of all ` ```vectors ` blocks.
fn vectors() -> Vec<Vector> {
    let mut vectors = Vec::new();
    for block in blocks("vectors") {
        for paragraph in block.split("\n\n") {
            let mut fields: Vec<(String, String)> = Vec::new();
            for line in paragraph.lines() {
                if let Some(more) = line.strip_prefix(' ') {
                    let (_, value) = fields
                        .last_mut()
                        .expect("a block does not begin with a continuation");
                    value.push(' ');
                    value.push_str(more.trim());
                } else {
                    let (key, value) = line
                        .split_once(':')
                        .expect("a line of a vector is `field: value`");
                    fields.push((key.to_owned(), value.trim().to_owned()));
                }
            }
            vectors.push(Vector { fields });
        }
    }
    vectors
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

/// The contents of all fenced blocks that begin with ` ```tag `.
fn blocks(tag: &str) -> Vec<&'static str> {
    let fence = format!("\n```{tag}\n");
    DOCUMENT
        .split(&fence)
        .skip(1)
        .map(|rest| rest.split("\n```").next().unwrap_or_default())
        .collect()
}

/// Reads `92 a1 65 (c0 c0)*3`.
fn read_hex(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        if let Some(group) = rest.strip_prefix('(') {
            let (inner, after) = group.split_once(")*").ok_or("a group that does not end")?;
            let (count, after) = after.split_once(' ').unwrap_or((after, ""));
            let count = count
                .parse()
                .map_err(|error| format!("count of a group: {error}"))?;
            bytes.extend(read_hex(inner)?.repeat(count));
            rest = after.trim_start();
        } else {
            let digits = rest.get(..2).ok_or("half a byte")?;
            bytes.push(
                u8::from_str_radix(digits, 16).map_err(|error| format!("{digits}: {error}"))?,
            );
            rest = rest[2..].trim_start();
        }
    }
    Ok(bytes)
}

/// A msgpack value, compared by what it says and not by how it is written.
#[derive(Clone, PartialEq, Debug)]
enum Value {
    Nil,
    Bool(bool),
    Int(i128),
    /// By its bits, so that NaN equals itself.
    Float(u64),
    Str(String),
    Bin(Vec<u8>),
    Array(Vec<Self>),
    Map(Vec<(Self, Self)>),
    Timestamp(Vec<u8>),
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nil => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => match (u64::try_from(*value), i64::try_from(*value)) {
                (Ok(value), _) => serializer.serialize_u64(value),
                (_, Ok(value)) => serializer.serialize_i64(value),
                _ => Err(S::Error::custom("an integer beyond msgpack")),
            },
            Self::Float(bits) => serializer.serialize_f64(f64::from_bits(*bits)),
            Self::Str(value) => serializer.serialize_str(value),
            Self::Bin(value) => serializer.serialize_bytes(value),
            Self::Array(items) => serializer.collect_seq(items),
            Self::Map(pairs) => {
                serializer.collect_map(pairs.iter().map(|(key, value)| (key, value)))
            }
            Self::Timestamp(_) => Err(S::Error::custom("a timestamp has no form in serde")),
        }
    }
}

/// Reads one msgpack value that fills `bytes`. Trusts the validator for depth.
fn read_msgpack(bytes: &[u8]) -> Result<Value, String> {
    let mut reader = Reader { bytes, at: 0 };
    let value = reader.msgpack()?;
    if reader.at != bytes.len() {
        return Err(format!("msgpack ends at {} of {}", reader.at, bytes.len()));
    }
    Ok(value)
}

/// Reads JSON with the stretches that the document describes.
fn read_json(text: &str) -> Result<Value, String> {
    let mut reader = Reader {
        bytes: text.as_bytes(),
        at: 0,
    };
    let value = reader.json()?;
    reader.space();
    if reader.at != text.len() {
        return Err(format!("text after the JSON value: {text:.80}"));
    }
    Ok(value)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8], String> {
        let end = self
            .at
            .checked_add(count)
            .filter(|end| *end <= self.bytes.len())
            .ok_or("ends too early")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn big_endian(&mut self, width: usize) -> Result<u64, String> {
        Ok(self
            .take(width)?
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn msgpack(&mut self) -> Result<Value, String> {
        let tag = self.byte()?;
        let low = |mask: u8| usize::from(tag & mask);
        match tag {
            0x00..=0x7f => Ok(Value::Int(tag.into())),
            0x80..=0x8f => self.map(low(0x0f)),
            0x90..=0x9f => self.array(low(0x0f)),
            0xa0..=0xbf => self.str(low(0x1f)),
            0xc0 => Ok(Value::Nil),
            0xc2 | 0xc3 => Ok(Value::Bool(tag == 0xc3)),
            0xc4..=0xc6 => {
                let length = self.length(1 << (tag - 0xc4))?;
                Ok(Value::Bin(self.take(length)?.to_vec()))
            }
            0xc7..=0xc9 => {
                let length = self.length(1 << (tag - 0xc7))?;
                self.timestamp(length)
            }
            0xca => {
                let bits = u32::try_from(self.big_endian(4)?).map_err(|error| error.to_string())?;
                Ok(Value::Float(f64::from(f32::from_bits(bits)).to_bits()))
            }
            0xcb => Ok(Value::Float(self.big_endian(8)?)),
            0xcc..=0xcf => Ok(Value::Int(self.big_endian(1 << (tag - 0xcc))?.into())),
            0xd0..=0xd3 => {
                let width = 1 << (tag - 0xd0);
                let shift = 64 - 8 * width;
                Ok(Value::Int(
                    ((self.big_endian(width)? << shift).cast_signed() >> shift).into(),
                ))
            }
            0xd4..=0xd8 => self.timestamp(1 << (tag - 0xd4)),
            0xd9..=0xdb => {
                let length = self.length(1 << (tag - 0xd9))?;
                self.str(length)
            }
            0xdc | 0xdd => {
                let length = self.length(2 << (tag - 0xdc))?;
                self.array(length)
            }
            0xde | 0xdf => {
                let length = self.length(2 << (tag - 0xde))?;
                self.map(length)
            }
            0xe0..=0xff => Ok(Value::Int(tag.cast_signed().into())),
            0xc1 => Err("0xc1".to_owned()),
        }
    }

    fn length(&mut self, width: usize) -> Result<usize, String> {
        usize::try_from(self.big_endian(width)?).map_err(|error| error.to_string())
    }

    fn str(&mut self, length: usize) -> Result<Value, String> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|error| error.to_string())?;
        Ok(Value::Str(text.to_owned()))
    }

    fn array(&mut self, length: usize) -> Result<Value, String> {
        (0..length)
            .map(|_| self.msgpack())
            .collect::<Result<_, _>>()
            .map(Value::Array)
    }

    fn map(&mut self, length: usize) -> Result<Value, String> {
        (0..length)
            .map(|_| Ok((self.msgpack()?, self.msgpack()?)))
            .collect::<Result<_, _>>()
            .map(Value::Map)
    }

    fn timestamp(&mut self, length: usize) -> Result<Value, String> {
        match self.byte()? {
            0xff => Ok(Value::Timestamp(self.take(length)?.to_vec())),
            other => Err(format!("ext of type {other:#04x}")),
        }
    }

    fn space(&mut self) {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }

    /// Skips space, then says whether `wanted` is next and takes it if so.
    fn next_is(&mut self, wanted: &str) -> bool {
        self.space();
        let found = self.bytes[self.at..].starts_with(wanted.as_bytes());
        self.at += if found { wanted.len() } else { 0 };
        found
    }

    fn json(&mut self) -> Result<Value, String> {
        let words = [
            ("null", Value::Nil),
            ("true", Value::Bool(true)),
            ("false", Value::Bool(false)),
        ];
        if let Some((_, value)) = words.into_iter().find(|(word, _)| self.next_is(word)) {
            Ok(value)
        } else if self.next_is("\"") {
            self.json_string()
        } else if self.next_is("[") {
            self.json_items("]", Self::json).map(Value::Array)
        } else if self.next_is("{") {
            let pairs = self.json_items("}", |reader| {
                let key = reader.json()?;
                if !reader.next_is(":") {
                    return Err("a key without a colon".to_owned());
                }
                Ok((key, reader.json()?))
            })?;
            stretch(pairs)
        } else {
            self.json_number()
        }
    }

    fn json_items<T>(
        &mut self,
        end: &str,
        mut item: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let mut items = Vec::new();
        if self.next_is(end) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if self.next_is(end) {
                return Ok(items);
            }
            if !self.next_is(",") {
                return Err(format!("expected a comma or {end}"));
            }
        }
    }

    fn json_string(&mut self) -> Result<Value, String> {
        let mut text = Vec::new();
        loop {
            match self.byte()? {
                b'"' => {
                    return String::from_utf8(text)
                        .map(Value::Str)
                        .map_err(|error| error.to_string());
                }
                b'\\' => match self.byte()? {
                    b'n' => text.push(b'\n'),
                    plain @ (b'"' | b'\\' | b'/') => text.push(plain),
                    other => return Err(format!("escape not used in the document: {other:#04x}")),
                },
                byte => text.push(byte),
            }
        }
    }

    fn json_number(&mut self) -> Result<Value, String> {
        let start = self.at;
        while self
            .bytes
            .get(self.at)
            .is_some_and(|byte| b"+-.0123456789eE".contains(byte))
        {
            self.at += 1;
        }
        let text =
            std::str::from_utf8(&self.bytes[start..self.at]).map_err(|error| error.to_string())?;
        if text.contains(['.', 'e', 'E']) {
            text.parse()
                .map(|value: f64| Value::Float(value.to_bits()))
                .map_err(|error| format!("{text}: {error}"))
        } else {
            text.parse()
                .map(Value::Int)
                .map_err(|error| format!("number {text:?}: {error}"))
        }
    }
}

/// Turns `{"$bin": …}` and its like into what they stand for.
fn stretch(pairs: Vec<(Value, Value)>) -> Result<Value, String> {
    let [(Value::Str(key), value)] = pairs.as_slice() else {
        return Ok(Value::Map(pairs));
    };
    match (key.as_str(), value) {
        ("$bin", Value::Str(hex)) => read_hex(hex).map(Value::Bin),
        ("$ts", Value::Str(hex)) => read_hex(hex).map(Value::Timestamp),
        ("$f64", Value::Str(hex)) => u64::from_str_radix(hex, 16)
            .map(Value::Float)
            .map_err(|error| error.to_string()),
        ("$map", Value::Array(pairs)) => {
            let pair = |pair: &Value| match pair {
                Value::Array(pair) if pair.len() == 2 => Ok((pair[0].clone(), pair[1].clone())),
                other => Err(format!("no pair: {other:?}")),
            };
            pairs
                .iter()
                .map(pair)
                .collect::<Result<_, _>>()
                .map(Value::Map)
        }
        ("$repeat" | "$nest", Value::Array(arguments)) => {
            let [value, Value::Int(count)] = arguments.as_slice() else {
                return Err(format!("{key} takes a value and a count"));
            };
            let count = usize::try_from(*count).map_err(|error| error.to_string())?;
            Ok(match (key.as_str(), value) {
                ("$nest", value) => {
                    (0..count).fold(value.clone(), |inner, _| Value::Array(vec![inner]))
                }
                (_, Value::Str(text)) => Value::Str(text.repeat(count)),
                (_, Value::Bin(bytes)) => Value::Bin(bytes.repeat(count)),
                (_, value) => Value::Array(vec![value.clone(); count]),
            })
        }
        _ => Ok(Value::Map(pairs)),
    }
}
