//! Strict MessagePack: received bytes are validated before serde reads them.
//!
//! A general decoder trusts its input: it recurses as deep as the input says, ignores bytes after the value, and
//! accepts text for binary. [`validate`] walks a value without recursion and without allocating, and [`Fields`] reads
//! the protocol's own maps with exact types. Nothing here builds a tree of values, and nothing here writes.

use std::fmt;
use std::str;

/// How deep arrays and maps may nest; a message's own array is depth 1.
pub const MAX_DEPTH: usize = 32;

/// How many values one message may hold, every key and every array or map counted too.
pub const MAX_ELEMENTS: usize = 65_536;

/// Why bytes are not one acceptable MessagePack value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MsgpackError {
    /// The value claims more than the bytes that are there.
    #[error("value needs {need} bytes, {left} left")]
    Truncated {
        /// The least number of bytes that the value needs, counted from the position of the error.
        need: u64,
        /// The number of bytes that were left at this position.
        left: u64,
    },
    /// Arrays and maps nest deeper than the limit.
    #[error("arrays and maps nested too deep")]
    TooDeep,
    /// The value holds more values than the limit.
    #[error("too many elements")]
    TooManyElements,
    /// The byte 0xc1, which MessagePack never uses.
    #[error("reserved byte 0xc1")]
    ReservedByte,
    /// An extension type other than the timestamp, -1.
    #[error("extension type not accepted: {0}")]
    Extension(i8),
    /// A timestamp whose length is not 4, 8 or 12 bytes.
    #[error("timestamp length not 4, 8 or 12 bytes: {0}")]
    Timestamp(usize),
    /// A string that is not UTF-8.
    #[error("string is not UTF-8")]
    Utf8,
    /// Bytes after the value.
    #[error("bytes after the value: {0}")]
    Trailing(usize),
}

/// The limits that [`validate_within`] holds a value to. Defaults to [`MAX_DEPTH`] and
/// [`MAX_ELEMENTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// How deep arrays and maps may nest; more than [`MAX_DEPTH`] means [`MAX_DEPTH`].
    pub depth: usize,
    /// How many values there may be, keys, arrays and maps included.
    pub elements: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            depth: MAX_DEPTH,
            elements: MAX_ELEMENTS,
        }
    }
}

/// Checks that `bytes` are exactly one value within [`MAX_DEPTH`] and [`MAX_ELEMENTS`].
///
/// Takes time proportional to the elements and the text, and a fixed amount of memory.
///
/// # Errors
///
/// The first reason found for which a peer must not send these bytes.
pub fn validate(bytes: &[u8]) -> Result<(), MsgpackError> {
    validate_within(bytes, Shape::default())
}

/// Checks that `bytes` are exactly one value within the limits of `shape`.
///
/// # Errors
///
/// As [`validate`].
pub(crate) fn validate_within(bytes: &[u8], shape: Shape) -> Result<(), MsgpackError> {
    let mut walk = Walk::new(bytes, shape)?;
    walk.value()?;
    walk.end()
}

/// Why a protocol map does not have the expected fields.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FieldError {
    /// The value is not a map.
    #[error("not a map")]
    NotAMap,
    /// A key of the map is not a string.
    #[error("map key is not a string")]
    KeyNotString,
    /// A key appears twice.
    #[error("duplicate key: {0:?}")]
    Duplicate(String),
    /// A key that must be there is absent or nil.
    #[error("missing key: {0:?}")]
    Missing(&'static str),
    /// The value of a key has another type than the protocol says.
    #[error("wrong type for key {key:?}: expected {expected}")]
    WrongType {
        /// The key.
        key: &'static str,
        /// What its value must be.
        expected: &'static str,
    },
    /// An array has more or fewer values than the protocol says.
    #[error("wrong number of values in an array of key {0:?}")]
    Length(&'static str),
    /// A key that this message does not have.
    #[error("unknown key: {0:?}")]
    Unknown(String),
    /// The map has more keys than any protocol map has.
    #[error("more than {MAX_KEYS} keys in a map")]
    TooManyKeys,
    /// The bytes are not MessagePack; cannot happen to a message that was decoded.
    #[error(transparent)]
    Malformed(#[from] MsgpackError),
}

/// A strict reader of a protocol map: string keys, none twice, exact types.
///
/// Binary is not text, a float is not an integer, and an integer that does not fit is refused
/// rather than cut. Keys may come in any order. `Debug` prints the keys only, since a value may be
/// a secret.
#[derive(Clone)]
pub struct Fields<'a> {
    /// Each key with the bytes of its value; few enough that a linear search is the fastest.
    entries: Vec<(&'a str, &'a [u8])>,
}

impl<'a> Fields<'a> {
    /// Reads the keys of `map`, which must be exactly one map.
    ///
    /// # Errors
    ///
    /// Anything but a map with string keys, none twice, of at most 32 keys; malformed bytes.
    pub fn parse(map: &'a [u8]) -> Result<Self, FieldError> {
        let mut walk = Walk::new(map, Shape::default())?;
        let Head::Map(len) = walk.enter()? else {
            return Err(FieldError::NotAMap);
        };
        if len > MAX_KEYS {
            return Err(FieldError::TooManyKeys);
        }
        let mut entries: Vec<(&str, &[u8])> = Vec::with_capacity(len);
        for _ in 0..len {
            let Head::Str(key) = Reader::new(walk.value()?).head()? else {
                return Err(FieldError::KeyNotString);
            };
            let key = text(key)?;
            if entries.iter().any(|(known, _)| *known == key) {
                return Err(FieldError::Duplicate(excerpt(key)));
            }
            entries.push((key, walk.value()?));
        }
        walk.end()?;
        Ok(Self { entries })
    }

    /// Reads one integer from 0 to 2^64 - 1 of a map that may be invalid elsewhere. Returns `None` if the value
    /// cannot be determined, for example if the key appears twice. For error replies to maps that
    /// [`parse`](Self::parse) refuses.
    pub fn peek_u64(map: &'a [u8], key: &'static str) -> Option<u64> {
        let mut walk = Walk::new(map, Shape::default()).ok()?;
        let Head::Map(len) = walk.enter().ok()? else {
            return None;
        };
        let mut found = None;
        for _ in 0..len {
            let name = Reader::new(walk.value().ok()?).head().ok()?;
            let value = walk.value().ok()?;
            if matches!(name, Head::Str(name) if name == key.as_bytes())
                && found.replace(value).is_some()
            {
                return None;
            }
        }
        as_u64(key, found?).ok()
    }

    /// The last key, in the order of the map.
    pub fn last_key(&self) -> Option<&'a str> {
        self.entries.last().map(|(key, _)| *key)
    }

    /// Reads text.
    ///
    /// # Errors
    ///
    /// [`FieldError::Missing`], or [`FieldError::WrongType`] for anything but a string.
    pub fn str(&self, key: &'static str) -> Result<&'a str, FieldError> {
        required(key, self.opt_str(key))
    }

    /// Reads text that may be absent or nil.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`] for anything else but a string.
    pub fn opt_str(&self, key: &'static str) -> Result<Option<&'a str>, FieldError> {
        self.read(key, as_str)
    }

    /// Reads an integer from 0 to 2^64 - 1.
    ///
    /// # Errors
    ///
    /// [`FieldError::Missing`], or [`FieldError::WrongType`] for anything but such an integer.
    pub fn u64(&self, key: &'static str) -> Result<u64, FieldError> {
        required(key, self.opt_u64(key))
    }

    /// Reads an integer from 0 to 2^64 - 1 that may be absent or nil.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`] for anything else but such an integer.
    pub fn opt_u64(&self, key: &'static str) -> Result<Option<u64>, FieldError> {
        self.read(key, as_u64)
    }

    /// Reads an integer from -2^63 to 2^63 - 1.
    ///
    /// # Errors
    ///
    /// [`FieldError::Missing`], or [`FieldError::WrongType`] for anything but such an integer.
    pub fn i64(&self, key: &'static str) -> Result<i64, FieldError> {
        required(key, self.opt_i64(key))
    }

    /// Reads an integer from -2^63 to 2^63 - 1 that may be absent or nil.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`] for anything else but such an integer.
    pub fn opt_i64(&self, key: &'static str) -> Result<Option<i64>, FieldError> {
        self.read(key, as_i64)
    }

    /// Reads binary.
    ///
    /// # Errors
    ///
    /// [`FieldError::Missing`], or [`FieldError::WrongType`] for anything but binary.
    pub fn bin(&self, key: &'static str) -> Result<&'a [u8], FieldError> {
        required(key, self.opt_bin(key))
    }

    /// Reads binary that may be absent or nil.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`] for anything else but binary.
    pub fn opt_bin(&self, key: &'static str) -> Result<Option<&'a [u8]>, FieldError> {
        self.read(key, as_bin)
    }

    /// Reads true or false.
    ///
    /// # Errors
    ///
    /// [`FieldError::Missing`], or [`FieldError::WrongType`] for anything but a boolean.
    pub fn bool(&self, key: &'static str) -> Result<bool, FieldError> {
        required(key, self.opt_bool(key))
    }

    /// Reads true or false that may be absent or nil.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`] for anything else but a boolean.
    pub fn opt_bool(&self, key: &'static str) -> Result<Option<bool>, FieldError> {
        self.read(key, as_bool)
    }

    /// Reads a map inside this one.
    ///
    /// # Errors
    ///
    /// [`FieldError::Missing`], [`FieldError::WrongType`] for anything but a map, or what
    /// [`Fields::parse`] refuses about it.
    pub fn map(&self, key: &'static str) -> Result<Self, FieldError> {
        required(key, self.opt_map(key))
    }

    /// Reads a map inside this one that may be absent or nil.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`] for anything else but a map, or what [`Fields::parse`] refuses
    /// about it.
    pub(crate) fn opt_map(&self, key: &'static str) -> Result<Option<Self>, FieldError> {
        self.read(key, as_map)
    }

    /// Reads an array.
    ///
    /// # Errors
    ///
    /// [`FieldError::Missing`], or [`FieldError::WrongType`] for anything but an array.
    pub fn array(&self, key: &'static str) -> Result<Values<'a>, FieldError> {
        required(key, self.opt_array(key))
    }

    /// Reads an array that may be absent or nil.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`] for anything else but an array.
    pub fn opt_array(&self, key: &'static str) -> Result<Option<Values<'a>>, FieldError> {
        self.read(key, as_array)
    }

    /// Returns the MessagePack bytes of a value of any type, nil included; `None` if absent.
    pub fn raw(&self, key: &str) -> Option<&'a [u8]> {
        self.entries
            .iter()
            .find(|(known, _)| *known == key)
            .map(|(_, value)| *value)
    }

    /// Checks that there is no key besides the `allowed` ones.
    ///
    /// # Errors
    ///
    /// [`FieldError::Unknown`] with the first other key.
    pub fn only(&self, allowed: &[&str]) -> Result<(), FieldError> {
        match self.entries.iter().find(|(key, _)| !allowed.contains(key)) {
            None => Ok(()),
            Some((key, _)) => Err(FieldError::Unknown(excerpt(key))),
        }
    }

    fn read<T>(&self, key: &'static str, convert: Convert<'a, T>) -> Result<Option<T>, FieldError> {
        match self.raw(key) {
            None | Some([NIL]) => Ok(None),
            Some(value) => convert(key, value).map(Some),
        }
    }
}

impl fmt::Debug for Fields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fields")?;
        f.debug_list()
            .entries(self.entries.iter().map(|(key, _)| key))
            .finish()
    }
}

/// A strict reader of an array in a protocol map, value by value; see [`Fields::array`].
#[derive(Clone)]
pub struct Values<'a> {
    key: &'static str,
    reader: Reader<'a>,
    left: usize,
}

impl<'a> Values<'a> {
    /// How many values are still to be read.
    pub fn remaining(&self) -> usize {
        self.left
    }

    /// Reads an integer from 0 to 2^64 - 1.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`], or [`FieldError::Length`] after the last value.
    pub fn next_u64(&mut self) -> Result<u64, FieldError> {
        self.read(as_u64)
    }

    /// Reads binary.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`], or [`FieldError::Length`] after the last value.
    pub fn next_bin(&mut self) -> Result<&'a [u8], FieldError> {
        self.read(as_bin)
    }

    /// Reads an array inside this one.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`], or [`FieldError::Length`] after the last value.
    pub fn next_array(&mut self) -> Result<Self, FieldError> {
        self.read(as_array)
    }

    /// Reads a map inside this array.
    ///
    /// # Errors
    ///
    /// [`FieldError::WrongType`], [`FieldError::Length`] after the last value, or what
    /// [`Fields::parse`] refuses about the map.
    pub(crate) fn next_map(&mut self) -> Result<Fields<'a>, FieldError> {
        self.read(as_map)
    }

    /// Checks that every value was read.
    ///
    /// # Errors
    ///
    /// [`FieldError::Length`] if values are left.
    pub fn finish(self) -> Result<(), FieldError> {
        if self.left == 0 {
            Ok(())
        } else {
            Err(FieldError::Length(self.key))
        }
    }

    fn read<T>(&mut self, convert: Convert<'a, T>) -> Result<T, FieldError> {
        if self.left == 0 {
            return Err(FieldError::Length(self.key));
        }
        let mut walk = Walk::new(self.reader.rest, Shape::default())?;
        let value = walk.value()?;
        let read = convert(self.key, value)?;
        self.reader = walk.reader;
        self.left -= 1;
        Ok(read)
    }
}

impl fmt::Debug for Values<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Values")
            .field("key", &self.key)
            .field("remaining", &self.left)
            .finish()
    }
}

/// Converts the bytes of one value into the type that the protocol defines for `key`.
type Convert<'a, T> = fn(&'static str, &'a [u8]) -> Result<T, FieldError>;

fn as_str<'a>(key: &'static str, value: &'a [u8]) -> Result<&'a str, FieldError> {
    match Reader::new(value).head()? {
        Head::Str(bytes) => Ok(text(bytes)?),
        _ => wrong_type(key, "string"),
    }
}

fn as_u64(key: &'static str, value: &[u8]) -> Result<u64, FieldError> {
    match Reader::new(value).head()? {
        Head::Uint(int) => Ok(int),
        _ => wrong_type(key, "unsigned 64-bit integer"),
    }
}

fn as_i64(key: &'static str, value: &[u8]) -> Result<i64, FieldError> {
    let int = match Reader::new(value).head()? {
        Head::Uint(int) => i64::try_from(int).ok(),
        Head::Negative(int) => Some(int),
        _ => None,
    };
    int.map_or_else(|| wrong_type(key, "signed 64-bit integer"), Ok)
}

fn as_bin<'a>(key: &'static str, value: &'a [u8]) -> Result<&'a [u8], FieldError> {
    match Reader::new(value).head()? {
        Head::Bin(bytes) => Ok(bytes),
        _ => wrong_type(key, "binary"),
    }
}

fn as_bool(key: &'static str, value: &[u8]) -> Result<bool, FieldError> {
    match Reader::new(value).head()? {
        Head::Bool(bool) => Ok(bool),
        _ => wrong_type(key, "boolean"),
    }
}

fn as_map<'a>(key: &'static str, value: &'a [u8]) -> Result<Fields<'a>, FieldError> {
    match Fields::parse(value) {
        Err(FieldError::NotAMap) => wrong_type(key, "map"),
        other => other,
    }
}

fn as_array<'a>(key: &'static str, value: &'a [u8]) -> Result<Values<'a>, FieldError> {
    let mut reader = Reader::new(value);
    match reader.head()? {
        Head::Array(left) => Ok(Values { key, reader, left }),
        _ => wrong_type(key, "array"),
    }
}

fn wrong_type<T>(key: &'static str, expected: &'static str) -> Result<T, FieldError> {
    Err(FieldError::WrongType { key, expected })
}

fn required<T>(key: &'static str, value: Result<Option<T>, FieldError>) -> Result<T, FieldError> {
    value?.ok_or(FieldError::Missing(key))
}

#[inline]
fn text(bytes: &[u8]) -> Result<&str, MsgpackError> {
    str::from_utf8(bytes).map_err(|_| MsgpackError::Utf8)
}

/// The beginning of a peer's key: enough to recognise it, too short to flood a log.
fn excerpt(key: &str) -> String {
    key.chars().take(MAX_EXCERPT).collect()
}

/// A walk over one value: checks every byte, and keeps only the number of open values at each depth.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    reader: Reader<'a>,
    /// Values that the heads read so far announce; an array and a map count, too.
    elements: usize,
    depth: usize,
    shape: Shape,
}

impl<'a> Walk<'a> {
    /// Starts before the one value that `bytes` should hold.
    #[inline]
    pub(crate) fn new(bytes: &'a [u8], shape: Shape) -> Result<Self, MsgpackError> {
        let mut walk = Self {
            reader: Reader::new(bytes),
            elements: 0,
            depth: 0,
            shape: Shape {
                depth: shape.depth.min(MAX_DEPTH),
                ..shape
            },
        };
        walk.announce(1)?;
        Ok(walk)
    }

    /// Bytes not walked yet.
    #[inline]
    pub(crate) fn left(&self) -> usize {
        self.reader.rest.len()
    }

    /// Reads one head; the values inside an array or a map are then the next ones walked.
    #[inline(always)]
    pub(crate) fn enter(&mut self) -> Result<Head<'a>, MsgpackError> {
        let head = self.reader.head()?;
        let inside = match head {
            Head::Array(len) => len,
            Head::Map(len) => len * 2,
            // Most text is ASCII, and for short text the test for ASCII is the cheaper one.
            Head::Str(bytes) if bytes.is_ascii() => return Ok(head),
            Head::Str(bytes) => {
                text(bytes)?;
                return Ok(head);
            }
            _ => return Ok(head),
        };
        if self.depth == self.shape.depth {
            return Err(MsgpackError::TooDeep);
        }
        self.announce(inside)?;
        self.depth += 1;
        Ok(head)
    }

    /// Walks one value with everything inside it; returns its bytes.
    #[inline]
    pub(crate) fn value(&mut self) -> Result<&'a [u8], MsgpackError> {
        let start = self.reader.rest;
        match self.enter()? {
            Head::Array(len) => self.inside(len)?,
            Head::Map(len) => self.inside(len * 2)?,
            _ => {}
        }
        let (value, _) = start.split_at(start.len() - self.reader.rest.len());
        Ok(value)
    }

    /// Walks the `values` of an array or a map that was entered, and leaves it.
    fn inside(&mut self, values: usize) -> Result<(), MsgpackError> {
        let few = |values| u32::try_from(values).map_err(|_| MsgpackError::TooManyElements);
        let outside = self.depth - 1;
        // For each open array or map outside the innermost one, the values still to come in it.
        let mut open = [0; MAX_DEPTH];
        let mut left: u32 = few(values)?;
        loop {
            while left == 0 {
                self.depth -= 1;
                if self.depth == outside {
                    return Ok(());
                }
                left = open[self.depth];
            }
            left -= 1;
            let values = match self.enter()? {
                Head::Array(len) => len,
                Head::Map(len) => len * 2,
                _ => continue,
            };
            // `enter` went one level deeper: keep the number of values left in the surrounding array or map.
            open[self.depth - 1] = left;
            left = few(values)?;
        }
    }

    /// Values walked or announced so far.
    pub(crate) fn elements(&self) -> usize {
        self.elements
    }

    /// Checks that no bytes follow the value.
    #[inline]
    pub(crate) fn end(&self) -> Result<(), MsgpackError> {
        match self.left() {
            0 => Ok(()),
            left => Err(MsgpackError::Trailing(left)),
        }
    }

    /// Counts values that follow.
    #[inline]
    pub(crate) fn announce(&mut self, values: usize) -> Result<(), MsgpackError> {
        // Cannot overflow: a head never announces more values than there are bytes.
        self.elements += values;
        if self.elements > self.shape.elements {
            return Err(MsgpackError::TooManyElements);
        }
        Ok(())
    }
}

/// The beginning of a value. Text and binary are complete in it; the values inside an array or a map follow the head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Head<'a> {
    Nil,
    Bool(bool),
    Uint(u64),
    Negative(i64),
    Float,
    /// Not yet known to be UTF-8.
    Str(&'a [u8]),
    Bin(&'a [u8]),
    /// At least as many bytes are left as there are values inside.
    Array(usize),
    /// At least twice as many bytes are left as there are pairs.
    Map(usize),
    Timestamp,
}

/// A cursor over bytes: every step is checked against what is left.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    #[inline]
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes that were not read yet.
    #[inline]
    pub(crate) fn left(&self) -> usize {
        self.rest.len()
    }

    /// Reads the head of the next value.
    #[inline(always)]
    pub(crate) fn head(&mut self) -> Result<Head<'a>, MsgpackError> {
        let [marker] = self.array()?;
        Ok(match marker {
            0x00..=0x7f => Head::Uint(u64::from(marker)),
            0x80..=0x8f => self.map(u32::from(marker & 0x0f))?,
            0x90..=0x9f => self.values(u32::from(marker & 0x0f))?,
            0xa0..=0xbf => Head::Str(self.take(u32::from(marker & 0x1f))?),
            NIL => Head::Nil,
            0xc1 => return Err(MsgpackError::ReservedByte),
            0xc2 => Head::Bool(false),
            0xc3 => Head::Bool(true),
            0xc4 => {
                let len = self.len8()?;
                Head::Bin(self.take(len)?)
            }
            0xc5 => {
                let len = self.len16()?;
                Head::Bin(self.take(len)?)
            }
            0xc6 => {
                let len = self.len32()?;
                Head::Bin(self.take(len)?)
            }
            0xc7 => {
                let len = self.len8()?;
                self.extension(len)?
            }
            0xc8 => {
                let len = self.len16()?;
                self.extension(len)?
            }
            0xc9 => {
                let len = self.len32()?;
                self.extension(len)?
            }
            0xca => {
                self.array::<4>()?;
                Head::Float
            }
            0xcb => {
                self.array::<8>()?;
                Head::Float
            }
            0xcc => Head::Uint(u64::from(u8::from_be_bytes(self.array()?))),
            0xcd => Head::Uint(u64::from(u16::from_be_bytes(self.array()?))),
            0xce => Head::Uint(u64::from(u32::from_be_bytes(self.array()?))),
            0xcf => Head::Uint(u64::from_be_bytes(self.array()?)),
            0xd0 => int(i64::from(i8::from_be_bytes(self.array()?))),
            0xd1 => int(i64::from(i16::from_be_bytes(self.array()?))),
            0xd2 => int(i64::from(i32::from_be_bytes(self.array()?))),
            0xd3 => int(i64::from_be_bytes(self.array()?)),
            0xd4 => self.extension(1)?,
            0xd5 => self.extension(2)?,
            0xd6 => self.extension(4)?,
            0xd7 => self.extension(8)?,
            0xd8 => self.extension(16)?,
            0xd9 => {
                let len = self.len8()?;
                Head::Str(self.take(len)?)
            }
            0xda => {
                let len = self.len16()?;
                Head::Str(self.take(len)?)
            }
            0xdb => {
                let len = self.len32()?;
                Head::Str(self.take(len)?)
            }
            0xdc => {
                let len = self.len16()?;
                self.values(len)?
            }
            0xdd => {
                let len = self.len32()?;
                self.values(len)?
            }
            0xde => {
                let len = self.len16()?;
                self.map(len)?
            }
            0xdf => {
                let len = self.len32()?;
                self.map(len)?
            }
            0xe0..=0xff => Head::Negative(i64::from(i8::from_be_bytes([marker]))),
        })
    }

    #[inline]
    fn values(&self, len: u32) -> Result<Head<'a>, MsgpackError> {
        self.at_least(u64::from(len)).map(Head::Array)
    }

    #[inline]
    fn map(&self, len: u32) -> Result<Head<'a>, MsgpackError> {
        let values = self.at_least(u64::from(len) * 2)?;
        Ok(Head::Map(values / 2))
    }

    fn extension(&mut self, len: u32) -> Result<Head<'a>, MsgpackError> {
        let kind = i8::from_be_bytes(self.array()?);
        let data = self.take(len)?;
        match (kind, data.len()) {
            (TIMESTAMP, 4 | 8 | 12) => Ok(Head::Timestamp),
            (TIMESTAMP, len) => Err(MsgpackError::Timestamp(len)),
            (other, _) => Err(MsgpackError::Extension(other)),
        }
    }

    #[inline]
    fn len8(&mut self) -> Result<u32, MsgpackError> {
        Ok(u32::from(u8::from_be_bytes(self.array()?)))
    }

    #[inline]
    fn len16(&mut self) -> Result<u32, MsgpackError> {
        Ok(u32::from(u16::from_be_bytes(self.array()?)))
    }

    #[inline]
    fn len32(&mut self) -> Result<u32, MsgpackError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    #[inline]
    fn take(&mut self, len: u32) -> Result<&'a [u8], MsgpackError> {
        let len = self.at_least(u64::from(len))?;
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], MsgpackError> {
        let Some((taken, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.truncated(N as u64));
        };
        self.rest = rest;
        Ok(*taken)
    }

    /// Checks that as many bytes are left as a length claims.
    #[inline]
    fn at_least(&self, need: u64) -> Result<usize, MsgpackError> {
        match usize::try_from(need) {
            Ok(len) if len <= self.rest.len() => Ok(len),
            _ => Err(self.truncated(need)),
        }
    }

    #[cold]
    fn truncated(&self, need: u64) -> MsgpackError {
        MsgpackError::Truncated {
            need,
            left: self.rest.len() as u64,
        }
    }
}

/// Integers are compared by value; the number of bytes in which the sender encoded one has no meaning.
#[inline]
fn int<'a>(value: i64) -> Head<'a> {
    u64::try_from(value).map_or(Head::Negative(value), Head::Uint)
}

/// The most keys of a protocol map.
const MAX_KEYS: usize = 32;

/// The most characters of a peer's key that an error quotes.
const MAX_EXCERPT: usize = 64;

const NIL: u8 = 0xc0;

/// The one extension type that is accepted.
const TIMESTAMP: i8 = -1;

#[cfg(test)]
mod tests;
