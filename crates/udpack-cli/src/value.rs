//! Any message's data, between MessagePack and JSON.
//!
//! JSON has no binary: a binary value is shown as `{"$bin":"<hex>"}` and read back from it. A timestamp is
//! shown as `{"$timestamp":[seconds,nanoseconds]}`. Keys keep their order; a key that is no text is shown as
//! the JSON of its value.

use std::fmt;
use std::io::Read;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};

/// One MessagePack value. `Serialize` gives it back as it was; [`Value::json`] shows it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Nil,
    Bool(bool),
    Uint(u64),
    Int(i64),
    F32(f32),
    F64(f64),
    Str(String),
    Bin(Vec<u8>),
    Timestamp(Vec<u8>),
    Array(Vec<Self>),
    Map(Vec<(Self, Self)>),
}

impl Value {
    /// Reads JSON text.
    pub(crate) fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str::<Self>(text)?.with_binary()
    }

    /// Reads one JSON value after the other, with or without white space between them. Nothing follows an error.
    pub(crate) fn all_of(text: impl Read) -> impl Iterator<Item = Result<Self, serde_json::Error>> {
        let values = serde_json::Deserializer::from_reader(text).into_iter();
        values.map(|value| value.and_then(Self::with_binary))
    }

    /// Shows it as JSON on one line.
    pub(crate) fn json(&self) -> Json<'_> {
        Json(self)
    }

    /// Turns every `{"$bin":"<hex>"}` into the bytes it stands for.
    fn with_binary(self) -> Result<Self, serde_json::Error> {
        Ok(match self {
            Self::Array(items) => Self::Array(
                items
                    .into_iter()
                    .map(Self::with_binary)
                    .collect::<Result<_, _>>()?,
            ),
            Self::Map(entries) => {
                if let [(Self::Str(key), Self::Str(hex))] = entries.as_slice()
                    && key == BIN
                {
                    let bytes = from_hex(hex).ok_or_else(|| {
                        de::Error::custom("$bin takes an even number of hex digits")
                    })?;
                    return Ok(Self::Bin(bytes));
                }
                Self::Map(
                    entries
                        .into_iter()
                        .map(|(key, value)| Ok((key, value.with_binary()?)))
                        .collect::<Result<_, serde_json::Error>>()?,
                )
            }
            other => other,
        })
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nil => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Uint(value) => serializer.serialize_u64(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
            Self::F32(value) => serializer.serialize_f32(*value),
            Self::F64(value) => serializer.serialize_f64(*value),
            Self::Str(value) => serializer.serialize_str(value),
            Self::Bin(value) => serializer.serialize_bytes(value),
            Self::Timestamp(value) => {
                serializer.serialize_newtype_struct(EXT, &(TIMESTAMP, Bytes(value)))
            }
            Self::Array(items) => serializer.collect_seq(items),
            Self::Map(entries) => serializer.collect_map(entries.iter().map(|(k, v)| (k, v))),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Nil)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Uint(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(u64::try_from(value).map_or(Value::Int(value), Value::Uint))
    }

    fn visit_f32<E>(self, value: f32) -> Result<Value, E> {
        Ok(Value::F32(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::F64(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Str(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Str(value))
    }

    fn visit_bytes<E>(self, value: &[u8]) -> Result<Value, E> {
        Ok(Value::Bin(value.to_owned()))
    }

    fn visit_byte_buf<E>(self, value: Vec<u8>) -> Result<Value, E> {
        Ok(Value::Bin(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<Value, D::Error> {
        let Value::Array(parts) = Value::deserialize(SeqOnly(inner))? else {
            return Err(de::Error::custom("bad extension"));
        };
        match <[Value; 2]>::try_from(parts) {
            Ok([_, Value::Bin(bytes)]) => Ok(Value::Timestamp(bytes)),
            _ => Err(de::Error::custom("bad extension")),
        }
    }
}

/// Asks for a sequence where any value would be asked for: an extension offers itself only as a pair.
struct SeqOnly<D>(D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for SeqOnly<D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_seq(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

struct Bytes<'a>(&'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

/// A value as JSON shows it.
pub(crate) struct Json<'a>(&'a Value);

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Bin(bytes) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry(BIN, &hex(bytes))?;
                map.end()
            }
            Value::Timestamp(bytes) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("$timestamp", &timestamp(bytes))?;
                map.end()
            }
            Value::Array(items) => {
                let mut seq = serializer.serialize_seq(Some(items.len()))?;
                for item in items {
                    seq.serialize_element(&Json(item))?;
                }
                seq.end()
            }
            Value::Map(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (key, value) in entries {
                    match key {
                        Value::Str(key) => map.serialize_entry(key, &Json(value))?,
                        key => map.serialize_entry(&key.json().to_string(), &Json(value))?,
                    }
                }
                map.end()
            }
            plain => plain.serialize(serializer),
        }
    }
}

impl fmt::Display for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

/// Lower-case hexadecimal digits of some bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |value| char::from_digit(u32::from(value), 16).unwrap_or('0');
    let digits = bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]);
    let mut text = String::with_capacity(2 * bytes.len());
    text.extend(digits);
    text
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |[high, low]: &[u8; 2]| u8::try_from(digit(*high)? << 4 | digit(*low)?).ok();
    let bytes = pairs.iter().map(byte).collect::<Option<_>>();
    bytes.filter(|_| rest.is_empty())
}

/// Seconds since 1970 and nanoseconds, from the three forms a timestamp has.
fn timestamp(bytes: &[u8]) -> Option<(i64, u32)> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some((u32::from_be_bytes(bytes).into(), 0));
    }
    if let Ok(bytes) = <[u8; 8]>::try_from(bytes) {
        let both = u64::from_be_bytes(bytes);
        let nanos = u32::try_from(both >> 34).ok()?;
        return Some((i64::try_from(both & ((1 << 34) - 1)).ok()?, nanos));
    }
    let (nanos, secs) = bytes.split_first_chunk::<4>()?;
    let secs = i64::from_be_bytes(secs.try_into().ok()?);
    Some((secs, u32::from_be_bytes(*nanos)))
}

const BIN: &str = "$bin";
/// The name under which the MessagePack library passes extension types through serde.
const EXT: &str = "_ExtStruct";
/// The extension type of a timestamp, the only one that a peer accepts.
const TIMESTAMP: i8 = -1;

#[cfg(test)]
mod tests {
    use super::*;
    use udpack::{Encoded, wire::Message};

    fn over_the_wire(value: &Value) -> Value {
        let encoded = Encoded::new("e", value).expect("a value the peer accepts");
        let body = encoded.bytes().slice(udpack::wire::PREFIX..);
        Message::decode(body)
            .expect("a message")
            .data()
            .expect("any value")
    }

    #[test]
    fn json_survives_the_wire() {
        for text in [
            "null",
            "true",
            "0",
            "-1",
            "18446744073709551615",
            "-9223372036854775808",
            "1.5",
            "\"é\"",
            "[]",
            "[1,[2,{\"b\":1,\"a\":null}]]",
            "{\"$bin\":\"00ff\"}",
            "{\"x\":{\"$bin\":\"\"}}",
        ] {
            let value = Value::from_json(text).expect(text);
            assert_eq!(over_the_wire(&value), value);
            assert_eq!(value.json().to_string(), text);
        }
    }

    #[test]
    fn binary_travels_as_binary() {
        let value = Value::from_json("[{\"$bin\":\"DEADbeef\"}]").expect("json");
        let bytes = Value::Bin(vec![0xde, 0xad, 0xbe, 0xef]);
        assert_eq!(value, Value::Array(vec![bytes]));
        for bad in ["{\"$bin\":\"0\"}", "{\"$bin\":\"xx\"}", "{\"$bin\":\"é\"}"] {
            Value::from_json(bad).expect_err(bad);
        }
    }

    #[test]
    fn timestamps_pass_unchanged_and_are_shown() {
        for (bytes, shown) in [
            (vec![0, 0, 0, 9], "{\"$timestamp\":[9,0]}"),
            (vec![0, 0, 0, 4, 0, 0, 0, 9], "{\"$timestamp\":[9,1]}"),
            (
                vec![0, 0, 0, 7, 255, 255, 255, 255, 255, 255, 255, 255],
                "{\"$timestamp\":[-1,7]}",
            ),
        ] {
            let value = Value::Timestamp(bytes);
            assert_eq!(over_the_wire(&value), value);
            assert_eq!(value.json().to_string(), shown);
        }
    }

    #[test]
    fn keys_that_are_no_text_are_shown_as_json() {
        let value = Value::Map(vec![(Value::Uint(1), Value::Nil)]);
        assert_eq!(over_the_wire(&value).json().to_string(), "{\"1\":null}");
    }
}
