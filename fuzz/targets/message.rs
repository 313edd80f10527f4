//! No bytes make the validator or the decoder panic, recurse or allocate beyond measure; what is
//! accepted is acceptable in all its parts, and serde can read it.
#![no_main]

use std::fmt;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use serde::Deserialize;
use serde::de::{
    Deserializer, EnumAccess, IgnoredAny, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use udpack::wire::{Message, MessageError, PREFIX, validate};
use udpack_fuzz::{assert_printable, within};

fuzz_target!(|input: &[u8]| {
    // The validator's memory is fixed: it lives on the stack.
    within(0, || {
        let _ = validate(input);
    });
    let body = Bytes::copy_from_slice(input);
    within(4096 + 256 * input.len(), || check(&body));
});

fn check(body: &Bytes) {
    let valid = validate(body);
    let message = match (Message::decode(body.clone()), valid) {
        (Ok(message), Ok(())) => message,
        (Ok(_), Err(error)) => panic!("decoded what does not validate: {error}"),
        (Err(MessageError::Msgpack(error)), valid) => {
            assert_eq!(valid, Err(error), "decoder and validator disagree");
            return;
        }
        (Err(error), valid) => {
            assert_eq!(valid, Ok(()), "{error}");
            assert_printable(&error.to_string());
            return;
        }
    };

    assert!((1..=128).contains(&message.event().len()));
    assert!(!message.event().chars().any(char::is_control));
    assert_eq!(message.is_reserved(), message.event().starts_with('$'));
    assert_eq!(message.len(), PREFIX + body.len());
    assert_eq!(validate(&message.raw()), Ok(()));

    if let Err(error) = message.data::<IgnoredAny>() {
        panic!("acceptable data cannot be skipped: {error:?}");
    }
    let _ = message.data::<Value>();
    let _ = message.data::<Shape>();
    let _ = message.data::<&str>();
    if let Err(error) = message.fields() {
        assert_printable(&error.to_string());
    }
    if let Ok(bulk) = message.bulk("chunk") {
        let bytes = message.fields().and_then(|fields| fields.bin("chunk"));
        assert_eq!(bytes, Ok(&bulk[..]));
    }
}

/// What an application could ask for that has many ways to go wrong.
#[derive(Deserialize)]
#[expect(dead_code, reason = "only read from the wire")]
enum Shape {
    Nothing,
    Text(String),
    Pair(u8, f32),
    Nested {
        inner: Option<Box<Shape>>,
        list: Vec<Shape>,
    },
}

/// Any value at all, built by recursion as a general decoder would.
#[expect(dead_code, reason = "only read from the wire")]
enum Value {
    Scalar,
    Text(String),
    Bytes(Vec<u8>),
    Array(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Wrapped(Box<Value>),
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
        f.write_str("any value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Value, E> {
        Ok(Value::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Value, E> {
        Ok(Value::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Value, E> {
        Ok(Value::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Scalar)
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Value, E> {
        Ok(Value::Bytes(bytes.to_owned()))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<Value, D::Error> {
        Ok(Value::Wrapped(Box::new(Value::deserialize(inner)?)))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<Value, A::Error> {
        let (tag, inner) = data.variant::<Value>()?;
        Ok(Value::Array(vec![tag, inner.newtype_variant()?]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }
}
