//! Reads what `docs/PROTOCOL.md` holds for tests: the vectors, and blocks in general. With a JSON parser and
//! a msgpack reader of its own, so that a mistake in the library's cannot hide behind itself.
#![allow(dead_code, reason = "each test binary uses its own part")]

use serde::ser::{Error as _, Serialize, Serializer};

pub(crate) const DOCUMENT: &str = include_str!("../../../../docs/PROTOCOL.md");

/// One test vector.
pub(crate) struct Vector {
    pub(crate) fields: Vec<(String, String)>,
}

impl Vector {
    pub(crate) fn name(&self) -> &str {
        self.field("name").unwrap_or("a vector without a name")
    }

    pub(crate) fn kind(&self) -> &str {
        self.field("kind").unwrap_or_default()
    }

    pub(crate) fn field(&self, key: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// What an accepted one's `data` says.
    pub(crate) fn data(&self) -> Result<Value, String> {
        read_json(self.field("data").ok_or("no data")?)
    }

    pub(crate) fn refusal(&self) -> Option<&str> {
        self.field("expect")?.strip_prefix("refuse ")
    }

    /// Its bytes, if its fields are those that a vector may have.
    pub(crate) fn bytes(&self) -> Result<Vec<u8>, String> {
        let known = [
            "name",
            "kind",
            "expect",
            "limit",
            "hex",
            "event",
            "data",
            "id",
            "deadline",
            "seq",
            "key",
            "about",
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
        read_hex(self.field("hex").ok_or("no hex")?)
    }
}

/// The vectors of all ` ```vectors ` blocks.
pub(crate) fn vectors() -> Vec<Vector> {
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

/// The contents of all fenced blocks that begin with ` ```tag `.
pub(crate) fn blocks(tag: &str) -> Vec<&'static str> {
    let fence = format!("\n```{tag}\n");
    DOCUMENT
        .split(&fence)
        .skip(1)
        .map(|rest| rest.split("\n```").next().unwrap_or_default())
        .collect()
}

/// Reads `92 a1 65 (c0 c0)*3`.
pub(crate) fn read_hex(text: &str) -> Result<Vec<u8>, String> {
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
pub(crate) enum Value {
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
pub(crate) fn read_msgpack(bytes: &[u8]) -> Result<Value, String> {
    let mut reader = Reader { bytes, at: 0 };
    let value = reader.msgpack()?;
    if reader.at != bytes.len() {
        return Err(format!("msgpack ends at {} of {}", reader.at, bytes.len()));
    }
    Ok(value)
}

/// Reads JSON with the stretches that the document describes.
pub(crate) fn read_json(text: &str) -> Result<Value, String> {
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
