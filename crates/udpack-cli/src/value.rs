//! Any message's data, between MessagePack and JSON.
//!
//! What JSON has no form for is shown as an object with one key, and read back from it: bytes as `{"$bin":"<hex>"}`, a
//! time as `{"$timestamp":[seconds,nanoseconds]}`, a number that is none or infinite as `{"$float":"nan"}`, `"inf"` or
//! `"-inf"`, a map with keys that are no text as `{"$map":[[key,value],…]}`. So is a map that would itself be read as one
//! of these. Numbers beyond 64 bits are refused. Keys keep their order.

use std::fmt;
use std::io::Read;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};
use serde_json::value::RawValue;

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
        let value = serde_json::from_str::<Self>(text)?;
        whole_numbers_fit(text)?;
        value.read()
    }

    /// Reads one JSON value after the other, with or without white space between them. Nothing follows an error.
    pub(crate) fn all_of(text: impl Read) -> impl Iterator<Item = Result<Self, serde_json::Error>> {
        let values = serde_json::Deserializer::from_reader(text).into_iter::<Box<RawValue>>();
        values.map(|value| value.and_then(|text| Self::from_json(text.get())))
    }

    /// Shows it as JSON on one line.
    pub(crate) fn json(&self) -> Json<'_> {
        Json(self)
    }

    /// Turns what stands for something that JSON has no form for into that.
    fn read(self) -> Result<Self, serde_json::Error> {
        Ok(match self {
            Self::Array(items) => Self::Array(all(items)?),
            Self::Map(entries) => match <[_; 1]>::try_from(entries) {
                Ok([(Self::Str(key), value)]) if FORMS.contains(&key.as_str()) => {
                    stands_for(&key, value)?
                }
                Ok(entry) => Self::Map(pairs(entry.into())?),
                Err(entries) => Self::Map(pairs(entries)?),
            },
            other => other,
        })
    }

    /// Whether JSON has an object for this map that is not read as something else.
    fn is_object(entries: &[(Self, Self)]) -> bool {
        match entries {
            [(Self::Str(key), _)] => !FORMS.contains(&key.as_str()),
            entries => entries.iter().all(|(key, _)| matches!(key, Self::Str(_))),
        }
    }
}

fn all(items: Vec<Value>) -> Result<Vec<Value>, serde_json::Error> {
    items.into_iter().map(Value::read).collect()
}

fn pairs(entries: Vec<(Value, Value)>) -> Result<Vec<(Value, Value)>, serde_json::Error> {
    let entries = entries.into_iter();
    entries
        .map(|(key, value)| Ok((key, value.read()?)))
        .collect()
}

/// What `{key: value}` stands for.
fn stands_for(key: &str, value: Value) -> Result<Value, serde_json::Error> {
    let read = match (key, value) {
        (BIN, Value::Str(hex)) => from_hex(&hex).map(Value::Bin),
        (FLOAT, Value::Str(name)) => match name.as_str() {
            "nan" => Some(f64::NAN),
            "inf" => Some(f64::INFINITY),
            "-inf" => Some(f64::NEG_INFINITY),
            _ => None,
        }
        .map(Value::F64),
        (SHOWN_TIMESTAMP, Value::Array(parts)) => moment(&parts).map(Value::Timestamp),
        (MAP, Value::Array(entries)) => {
            let entry = |entry| match entry {
                Value::Array(both) => <[Value; 2]>::try_from(both).ok().map(|[k, v]| (k, v)),
                _ => None,
            };
            match entries.into_iter().map(entry).collect::<Option<Vec<_>>>() {
                Some(entries) => {
                    let read = |(key, value): (Value, Value)| Ok((key.read()?, value.read()?));
                    let entries: Result<_, serde_json::Error> =
                        entries.into_iter().map(read).collect();
                    return Ok(Value::Map(entries?));
                }
                None => None,
            }
        }
        _ => None,
    };
    read.ok_or_else(|| {
        de::Error::custom(match key {
            BIN => "$bin takes an even number of hex digits",
            FLOAT => "$float takes \"nan\", \"inf\" or \"-inf\"",
            MAP => "$map takes a list of pairs [key,value]",
            _ => "$timestamp takes [seconds,nanoseconds]",
        })
    })
}

/// JSON's whole numbers have no end, ours have 64 bits: a larger one would silently become another number.
fn whole_numbers_fit(json: &str) -> Result<(), serde_json::Error> {
    // The text is known to be JSON.
    let mut rest = json;
    while let Some(at) = rest.find(|c: char| c == '"' || c == '-' || c.is_ascii_digit()) {
        rest = &rest[at..];
        if let Some(text) = rest.strip_prefix('"') {
            let mut escaped = false;
            let end = text.find(|c| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            });
            rest = end.map_or("", |end| &text[end + 1..]);
            continue;
        }
        let end = rest.find(|c: char| !(c.is_ascii_digit() || "+-.eE".contains(c)));
        let (number, behind) = rest.split_at(end.unwrap_or(rest.len()));
        let whole = !number.contains(['.', 'e', 'E']);
        if whole && number.parse::<u64>().is_err() && number.parse::<i64>().is_err() {
            return Err(de::Error::custom(format_args!(
                "{number} takes more than 64 bits"
            )));
        }
        rest = behind;
    }
    Ok(())
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
                map.serialize_entry(SHOWN_TIMESTAMP, &timestamp(bytes))?;
                map.end()
            }
            Value::Array(items) => {
                let mut seq = serializer.serialize_seq(Some(items.len()))?;
                for item in items {
                    seq.serialize_element(&Json(item))?;
                }
                seq.end()
            }
            Value::Map(entries) if Value::is_object(entries) => {
                serializer.collect_map(entries.iter().map(|(key, value)| (key, Json(value))))
            }
            Value::Map(entries) => {
                let pairs: Vec<_> = entries
                    .iter()
                    .map(|(key, value)| [Json(key), Json(value)])
                    .collect();
                serializer.collect_map([(MAP, pairs)])
            }
            Value::F32(value) if !value.is_finite() => not_finite(f64::from(*value), serializer),
            Value::F64(value) if !value.is_finite() => not_finite(*value, serializer),
            plain => plain.serialize(serializer),
        }
    }
}

fn not_finite<S: Serializer>(value: f64, serializer: S) -> Result<S::Ok, S::Error> {
    let name = if value.is_nan() {
        "nan"
    } else if value > 0.0 {
        "inf"
    } else {
        "-inf"
    };
    serializer.collect_map([(FLOAT, name)])
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

/// The shortest form of seconds since 1970 and nanoseconds.
fn moment(parts: &[Value]) -> Option<Vec<u8>> {
    let (secs, nanos) = match parts {
        [Value::Uint(secs), Value::Uint(nanos)] => (i64::try_from(*secs).ok()?, *nanos),
        [Value::Int(secs), Value::Uint(nanos)] => (*secs, *nanos),
        _ => return None,
    };
    let nanos = u32::try_from(nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000)?;
    if let (Ok(secs), 0) = (u32::try_from(secs), nanos) {
        return Some(secs.to_be_bytes().into());
    }
    Some(match u64::try_from(secs) {
        Ok(secs) if secs < 1 << 34 => (u64::from(nanos) << 34 | secs).to_be_bytes().into(),
        _ => [&nanos.to_be_bytes()[..], &secs.to_be_bytes()].concat(),
    })
}

const BIN: &str = "$bin";
const FLOAT: &str = "$float";
const MAP: &str = "$map";
const SHOWN_TIMESTAMP: &str = "$timestamp";
/// The keys of objects that stand for something else.
const FORMS: [&str; 4] = [BIN, FLOAT, MAP, SHOWN_TIMESTAMP];
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
    fn what_json_has_no_form_for_comes_back_as_it_was() {
        let text = |text: &str| Value::Str(text.to_owned());
        for (value, shown) in [
            (
                Value::Map(vec![
                    (Value::Uint(1), Value::Nil),
                    (text("1"), Value::Bool(true)),
                ]),
                r#"{"$map":[[1,null],["1",true]]}"#,
            ),
            (
                Value::Map(vec![(text("$bin"), text("00"))]),
                r#"{"$map":[["$bin","00"]]}"#,
            ),
            (
                Value::Map(vec![(text("$bin"), text("00")), (text("b"), Value::Nil)]),
                r#"{"$bin":"00","b":null}"#,
            ),
            (
                Value::Map(vec![(
                    text("$map"),
                    Value::Array(vec![Value::Bin(vec![7])]),
                )]),
                r#"{"$map":[["$map",[{"$bin":"07"}]]]}"#,
            ),
            (Value::F64(f64::INFINITY), r#"{"$float":"inf"}"#),
            (Value::F64(f64::NEG_INFINITY), r#"{"$float":"-inf"}"#),
            (
                Value::Timestamp(vec![0, 0, 0, 9]),
                r#"{"$timestamp":[9,0]}"#,
            ),
            (
                Value::Timestamp(vec![0, 0, 0, 4, 0, 0, 0, 9]),
                r#"{"$timestamp":[9,1]}"#,
            ),
            (
                Value::Timestamp(vec![0, 0, 0, 7, 255, 255, 255, 255, 255, 255, 255, 255]),
                r#"{"$timestamp":[-1,7]}"#,
            ),
        ] {
            let heard = over_the_wire(&value);
            assert_eq!(heard, value);
            assert_eq!(heard.json().to_string(), shown);
            assert_eq!(Value::from_json(shown).expect(shown), value);
        }
        let nan = over_the_wire(&Value::from_json(r#"{"$float":"nan"}"#).expect("a number"));
        assert!(matches!(nan, Value::F64(nan) if nan.is_nan()));
        assert_eq!(nan.json().to_string(), r#"{"$float":"nan"}"#);
    }

    #[test]
    fn what_would_become_something_else_is_refused() {
        for bad in [
            "18446744073709551616",
            "[-9223372036854775809]",
            r#"{"a":[{"b":123456789012345678901234567890}]}"#,
            r#"{"$float":"1"}"#,
            r#"{"$float":1}"#,
            r#"{"$map":[[1]]}"#,
            r#"{"$map":{}}"#,
            r#"{"$timestamp":[0,1000000000]}"#,
            r#"{"$timestamp":null}"#,
            r#"{"$bin":7}"#,
            "1e999",
            "NaN",
        ] {
            Value::from_json(bad).expect_err(bad);
            let streamed = format!("1 {bad}");
            assert!(
                Value::all_of(streamed.as_bytes())
                    .nth(1)
                    .expect("two")
                    .is_err(),
                "{bad}"
            );
        }
        for good in [
            r#""18446744073709551616 \"""#,
            "18446744073709551615",
            "1.8446744073709551616e19",
            "-0",
            r#"{"\\":-9223372036854775808}"#,
        ] {
            Value::from_json(good).expect(good);
        }
    }
}
