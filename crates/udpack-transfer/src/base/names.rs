//! Names of files as bytes: their form in strings and on the wire.
//!
//! A file's name need not be UTF-8, yet nearly all are, and nearly all code that handles names handles text. So a
//! string holds a name in its *text form*: the name itself if it is UTF-8; otherwise each byte that is not UTF-8
//! becomes one character, `U+10FF00` plus the byte (`U+10FF80` to `U+10FFFF`, the end of a private plane). The bytes
//! of a name that really holds one of these characters are treated the same, so no two names share a form and no name
//! loses a byte. Slashes stay slashes.
//!
//! Code at the edges converts the form: [`bytes()`] and [`os`] for the file system, [`shown`] for people, and on the
//! wire a name is `str` when it is UTF-8 and `bin` when it is not.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};
use udpack::{FieldError, Fields};

/// The character of byte 0; only bytes from 0x80 on are used.
const BASE: u32 = 0x10_ff00;
/// The first character that represents a byte.
const FIRST: char = '\u{10ff80}';
/// The byte with which the UTF-8 of each such character begins, and few others.
const LEAD: u8 = 0xf4;

/// The text form of a name.
pub fn from_bytes(name: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(name) {
        Ok(text) if !holds_bytes(text) => Cow::Borrowed(text),
        _ => Cow::Owned(form(name)),
    }
}

/// The text form of a name of the operating system.
pub fn from_os(name: &OsStr) -> Cow<'_, str> {
    from_bytes(name.as_bytes())
}

/// The bytes of the name that has this text form.
pub fn bytes(text: &str) -> Cow<'_, [u8]> {
    if !holds_bytes(text) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut name = Vec::with_capacity(text.len());
    for c in text.chars() {
        match u8::try_from(u32::from(c).wrapping_sub(BASE)) {
            Ok(byte) if c >= FIRST => name.push(byte),
            _ => name.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(name)
}

/// The name with this text form, for the operating system.
pub fn os(text: &str) -> Cow<'_, OsStr> {
    match bytes(text) {
        Cow::Borrowed(name) => Cow::Borrowed(OsStr::from_bytes(name)),
        Cow::Owned(name) => Cow::Owned(OsString::from_vec(name)),
    }
}

/// The name with this text form, for display: one line without control characters, and each byte that is not UTF-8 as
/// `\xff`.
pub fn shown(text: &str) -> String {
    udpack::text::printable_bytes(&bytes(text)).into_owned()
}

/// Whether some character of the text form represents a byte, so that the name is not UTF-8.
pub fn holds_bytes(text: &str) -> bool {
    text.as_bytes().contains(&LEAD) && text.chars().any(|c| c >= FIRST)
}

fn form(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len() + 16);
    let raw = |text: &mut String, bytes: &[u8]| {
        text.extend(
            bytes
                .iter()
                .filter_map(|byte| char::from_u32(BASE + u32::from(*byte))),
        );
    };
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c >= FIRST {
                raw(&mut text, c.encode_utf8(&mut [0; 4]).as_bytes());
            } else {
                text.push(c);
            }
        }
        raw(&mut text, chunk.invalid());
    }
    text
}

/// Reads a name: `str`, or `bin` when it is not UTF-8.
pub(crate) fn field(fields: &Fields<'_>, key: &'static str) -> Result<String, FieldError> {
    match fields.opt_bin(key) {
        Ok(Some(name)) if std::str::from_utf8(name).is_err() => Ok(from_bytes(name).into_owned()),
        _ => fields
            .str(key)
            .map(|name| from_bytes(name.as_bytes()).into_owned()),
    }
}

/// As [`field`], for one that may be absent.
pub(crate) fn opt_field(
    fields: &Fields<'_>,
    key: &'static str,
) -> Result<Option<String>, FieldError> {
    match fields.opt_bin(key) {
        Ok(Some(name)) if std::str::from_utf8(name).is_err() => {
            Ok(Some(from_bytes(name).into_owned()))
        }
        _ => Ok(fields
            .opt_str(key)?
            .map(|name| from_bytes(name.as_bytes()).into_owned())),
    }
}

/// Writes a name in its wire form; for serde's `serialize_with`.
pub(crate) fn serialize<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    if !holds_bytes(text) {
        return serializer.serialize_str(text);
    }
    let name = bytes(text);
    match std::str::from_utf8(&name) {
        Ok(text) => serializer.serialize_str(text),
        Err(_) => serializer.serialize_bytes(&name),
    }
}

/// As [`serialize`], for one that may be absent.
pub(crate) fn serialize_opt<S: Serializer>(
    text: &Option<impl AsRef<str>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match text {
        Some(text) => serialize(text.as_ref(), serializer),
        None => serializer.serialize_none(),
    }
}

/// Reads a name into its text form; for serde's `deserialize_with`.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    struct Either;

    impl Visitor<'_> for Either {
        type Value = String;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a name: str, or bin when it is not utf-8")
        }

        fn visit_str<E: Error>(self, name: &str) -> Result<String, E> {
            Ok(from_bytes(name.as_bytes()).into_owned())
        }

        fn visit_bytes<E: Error>(self, name: &[u8]) -> Result<String, E> {
            if std::str::from_utf8(name).is_ok() {
                return Err(E::invalid_type(serde::de::Unexpected::Bytes(name), &self));
            }
            Ok(from_bytes(name).into_owned())
        }
    }

    deserializer.deserialize_any(Either)
}

/// As [`deserialize`], for one that may be absent.
pub(crate) fn deserialize_opt<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    deserialize(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_that_is_text_is_its_own_form() {
        for name in [
            "a",
            "häuser/日本語",
            "😀",
            "\u{fffd}",
            "\u{10ff7f}",
            "a\nb",
            "",
        ] {
            assert_eq!(from_bytes(name.as_bytes()), name);
            assert_eq!(&*bytes(name), name.as_bytes());
        }
    }

    #[test]
    fn bytes_that_are_no_text_stand_as_one_character_each() {
        assert_eq!(from_bytes(b"caf\xe9"), "caf\u{10ffe9}");
        assert_eq!(&*bytes("caf\u{10ffe9}"), b"caf\xe9");
        assert_eq!(shown("caf\u{10ffe9}"), "caf\\xe9");
        // A name that holds such a character itself.
        let real = "x\u{10ffe9}";
        assert_eq!(from_bytes(real.as_bytes()).chars().count(), 5);
        assert_eq!(&*bytes(&from_bytes(real.as_bytes())), real.as_bytes());
    }

    #[test]
    fn names_travel_as_str_where_that_can_hold_them() {
        let packed = |name: &[u8]| {
            #[derive(serde::Serialize)]
            struct Data<'a> {
                #[serde(serialize_with = "super::serialize")]
                n: &'a str,
            }
            let text = from_bytes(name);
            let frame = udpack::Encoded::new("e", &Data { n: &text }).unwrap();
            // An array of two, the event, a map of one, its key.
            frame.bytes().slice(udpack::wire::PREFIX + 6..).to_vec()
        };
        assert_eq!(packed(b"a"), b"\xa1a");
        assert_eq!(packed(b"caf\xe9"), b"\xc4\x04caf\xe9");
        assert_eq!(packed("\u{10ffff}".as_bytes()), b"\xa4\xf4\x8f\xbf\xbf");
    }

    proptest! {
        #[test]
        fn every_name_comes_back(name in prop::collection::vec(any::<u8>(), 0..40)) {
            let text = from_bytes(&name).into_owned();
            prop_assert_eq!(&*bytes(&text), &name[..]);
            prop_assert_eq!(text.split('/').count(), name.split(|b| *b == b'/').count());
            prop_assert!(shown(&text).chars().all(udpack::text::is_printable));
        }

        #[test]
        fn every_character_comes_back(name in any::<String>()) {
            let text = from_bytes(name.as_bytes()).into_owned();
            prop_assert_eq!(&*bytes(&text), name.as_bytes());
        }
    }
}
