//! Messages: `[event, data]`, `[event, data, id]` and `[event, data, id, deadline_ms]` in MessagePack.
//!
//! Decoding checks a whole message in one pass and records the position of its parts; the data stays encoded until
//! the caller decodes it into a type. Encoding appends one whole frame to a buffer or leaves the buffer unchanged,
//! and refuses a message that the peer would refuse. This module does not know which events exist and who may send
//! them.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::str;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use rmp_serde::config::{BytesMode, DefaultConfig, HumanReadableConfig};
use serde::{Deserialize, Serialize};

use crate::wire::code::CloseCode;
use crate::wire::control::{Decode, Gap};
use crate::wire::frame::PREFIX;
use crate::wire::message::lenient::Lenient;
use crate::wire::msgpack::{
    FieldError, Fields, Head, MAX_DEPTH, MAX_ELEMENTS, MsgpackError, Reader, Shape, Walk,
    validate_within,
};

mod lenient;

/// One received message.
///
/// Cheap to clone: clones share the frame that the message came in, and keep it alive. `Debug`
/// prints the event, the id and the length of the data, never the data.
#[derive(Clone)]
pub struct Message {
    body: Bytes,
    parts: Parts,
}

/// The positions of the parts of a valid message in its frame's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parts {
    /// The end of the data in bytes; id and deadline follow it. The data begins at the end of the event.
    data_end: usize,
    /// The position of the event, at most 10 bytes, and its length, at most 128 bytes.
    event_at: u8,
    event_len: u8,
    /// How many values the message has.
    values: u8,
}

/// Why the body of a frame is not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// It is not one acceptable MessagePack value.
    #[error(transparent)]
    Msgpack(#[from] MsgpackError),
    /// The value is not an array of 2 to 4, or of 4 for an event of the protocol's own.
    #[error("message is not an array of 2 to 4 values, of 4 only for a request: {}", Found(*.arity))]
    Shape {
        /// How many values the array has; `None` if it is no array.
        arity: Option<usize>,
    },
    /// The event is not a string.
    #[error("event is not a string")]
    EventNotString,
    /// The event is not a proper name.
    #[error("event {0}")]
    Event(NameError),
    /// The id is not an integer from 0 to 2^64 - 1.
    #[error("id is not an unsigned 64-bit integer")]
    Id,
    /// The deadline is not an integer from 0 to 2^64 - 1.
    #[error("deadline is not an unsigned 64-bit integer")]
    Deadline,
}

/// Why a message's data is not of the type asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The data is something else.
    #[error("data does not have the expected type")]
    Data(#[source] rmp_serde::decode::Error),
    /// The type left a part of an array or a map unread.
    #[error("data is longer than the expected type")]
    Unread,
}

impl Parts {
    /// The parts of a valid message of the most common form: `[event, data]` with an event of the application, of 1
    /// to 31 printable ASCII characters. Returns `None` for every other body; [`of`](Self::of) decodes those.
    ///
    /// This function creates no error values: returning them from each step would cost as much as the check itself.
    #[inline]
    pub(crate) fn common(body: &[u8]) -> Option<Self> {
        let [ARRAY_OF_2, head @ 0xa1..=0xbf, rest @ ..] = body else {
            return None;
        };
        let event_len = head & !STR;
        let (name, data) = rest.split_at_checked(event_len.into())?;
        if !is_plain(name) || name.first() == Some(&RESERVED) || !is_sound_data(data) {
            return None;
        }
        Some(Self {
            data_end: body.len(),
            event_at: 2,
            event_len,
            values: 2,
        })
    }

    /// Checks the body of one frame, all of it in one pass.
    ///
    /// # Errors
    ///
    /// As [`Message::decode`].
    pub(crate) fn of(body: &[u8], shape: Shape) -> Result<Self, MessageError> {
        let mut walk = Walk::new(body, shape)?;
        let arity = match walk.enter()? {
            Head::Array(arity) => Some(arity),
            _ => None,
        };
        let Some(values @ 2..=4) = arity else {
            // Bytes that are not MessagePack are the more serious fault, so this is checked first.
            validate_within(body, shape)?;
            return Err(MessageError::Shape { arity });
        };
        let Head::Str(name) = walk.enter()? else {
            validate_within(body, shape)?;
            return Err(MessageError::EventNotString);
        };
        let data_start = body.len() - walk.left();
        walk.value()?;
        let data_end = body.len() - walk.left();
        let mut numbers = [None; 2];
        for number in numbers.iter_mut().take(values - 2) {
            *number = Some(walk.value()?);
        }
        walk.end()?;

        check_name_bytes(name)?;
        if values == 4 && name.first() == Some(&RESERVED) {
            return Err(MessageError::Shape { arity });
        }
        let number = |value: Option<&[u8]>, error| match value {
            None => Ok(()),
            Some(value) => match Reader::new(value).head()? {
                Head::Uint(_) => Ok(()),
                _ => Err(error),
            },
        };
        let [id, deadline] = numbers;
        number(id, MessageError::Id)?;
        number(deadline, MessageError::Deadline)?;
        // Name and head are small by now.
        let small = |number: usize| u8::try_from(number).unwrap_or(u8::MAX);
        let (event_at, event_len) = (small(data_start - name.len()), small(name.len()));
        Ok(Self {
            data_end,
            event_at,
            event_len,
            values: small(values),
        })
    }
}

impl Message {
    /// Reads the body of one frame.
    ///
    /// # Errors
    ///
    /// [`MessageError::Msgpack`] if the body is not acceptable MessagePack, otherwise the rule of messages that it
    /// breaks.
    pub fn decode(body: Bytes) -> Result<Self, MessageError> {
        Self::decode_within(body, Shape::default())
    }

    /// Reads the body of one frame within the limits of `shape`.
    ///
    /// # Errors
    ///
    /// As [`decode`](Self::decode).
    pub(crate) fn decode_within(body: Bytes, shape: Shape) -> Result<Self, MessageError> {
        let parts = Parts::of(&body, shape)?;
        Ok(Self { body, parts })
    }

    /// The message with these parts.
    #[inline(always)]
    pub(crate) fn of(body: Bytes, parts: Parts) -> Self {
        Self { body, parts }
    }

    /// The name of the event.
    pub fn event(&self) -> &str {
        str::from_utf8(self.name()).expect("decode checked the event")
    }

    #[inline]
    fn name(&self) -> &[u8] {
        &self.body[usize::from(self.parts.event_at)..self.data_start()]
    }

    #[inline]
    fn data_start(&self) -> usize {
        usize::from(self.parts.event_at) + usize::from(self.parts.event_len)
    }

    #[inline]
    fn data_bytes(&self) -> &[u8] {
        &self.body[self.data_start()..self.parts.data_end]
    }

    /// The number that an answer must carry, if this is a request or an answer.
    #[inline]
    pub fn id(&self) -> Option<u64> {
        if self.parts.values > 2 {
            self.number(0)
        } else {
            None
        }
    }

    /// How long the requester waits for the reply, counted from the sending of the request, if the message has a
    /// deadline.
    pub fn deadline(&self) -> Option<Duration> {
        let ms = (self.parts.values > 3).then(|| self.number(1));
        ms.flatten().map(Duration::from_millis)
    }

    /// One of the numbers behind the data, which `decode` checked.
    fn number(&self, nth: usize) -> Option<u64> {
        let mut reader = Reader::new(self.body.get(self.parts.data_end..)?);
        for _ in 0..nth {
            reader.head().ok()?;
        }
        match reader.head() {
            Ok(Head::Uint(number)) => Some(number),
            _ => None,
        }
    }

    /// Whether the event belongs to the protocol, not to the application.
    #[inline]
    pub fn is_reserved(&self) -> bool {
        self.name().first() == Some(&RESERVED)
    }

    /// The content of a `$gap`: messages of a room that were dropped for this member. It is the only event of the
    /// protocol that `recv` returns.
    pub fn gap(&self) -> Option<Gap> {
        Gap::decode(self).ok()
    }

    /// The data as received, encoded in MessagePack: a slice of the frame, not a copy.
    pub fn raw(&self) -> Bytes {
        self.body.slice(self.data_start()..self.parts.data_end)
    }

    /// Reads the data as a `T`, which may borrow from the message.
    ///
    /// serde decides what it accepts: a struct accepts a map or an array, a string accepts binary, and of two equal
    /// keys the type may use either. For exact types see [`fields`](Self::fields).
    ///
    /// # Errors
    ///
    /// [`DecodeError`] if the data is not exactly one `T`.
    pub fn data<'a, T: Deserialize<'a>>(&'a self) -> Result<T, DecodeError> {
        decode_data(self.data_bytes())
    }

    /// Reads the data as a map with exact types, as the protocol's own messages are read.
    ///
    /// # Errors
    ///
    /// The errors of [`Fields::parse`].
    pub fn fields(&self) -> Result<Fields<'_>, FieldError> {
        Fields::parse(self.data_bytes())
    }

    /// Takes a binary field of the data as a slice of the frame, not a copy.
    ///
    /// # Errors
    ///
    /// The errors of [`fields`](Self::fields) and [`Fields::bin`].
    pub fn bulk(&self, key: &'static str) -> Result<Bytes, FieldError> {
        Ok(self.body.slice_ref(self.fields()?.bin(key)?))
    }

    /// How many bytes the message took on the stream, its frame's prefix included.
    #[expect(clippy::len_without_is_empty, reason = "a message is never empty")]
    pub fn len(&self) -> usize {
        PREFIX + self.body.len()
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("event", &self.event())
            .field("id", &self.id())
            .field("data_len", &self.data_bytes().len())
            .finish()
    }
}

impl MessageError {
    /// The close code that tells the peer.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Msgpack(_) => CloseCode::BAD_MSGPACK,
            _ => CloseCode::BAD_MESSAGE,
        }
    }
}

/// Decodes one validated value, all of it, into the receiver's type.
pub(crate) fn decode_data<'a, T: Deserialize<'a>>(data: &'a [u8]) -> Result<T, DecodeError> {
    match decode_with(data, |reader| T::deserialize(reader)) {
        Err(DecodeError::Data(error)) => decode_leniently(data).ok_or(DecodeError::Data(error)),
        decoded => decoded,
    }
}

/// Decodes again, for types that accept bytes only as a sequence of numbers.
#[cold]
fn decode_leniently<'a, T: Deserialize<'a>>(data: &'a [u8]) -> Option<T> {
    let left = Cell::new(MAX_ELEMENTS);
    decode_with(data, |reader| T::deserialize(Lenient::new(reader, &left))).ok()
}

/// The reader of data. Types with two serde forms use the human-readable one.
type DataReader<'a> = rmp_serde::Deserializer<
    rmp_serde::decode::ReadRefReader<'a, [u8]>,
    HumanReadableConfig<DefaultConfig>,
>;

#[inline(always)]
fn decode_with<'a, T>(
    data: &'a [u8],
    decode: impl FnOnce(&mut DataReader<'a>) -> Result<T, rmp_serde::decode::Error>,
) -> Result<T, DecodeError> {
    let mut reader = rmp_serde::Deserializer::from_read_ref(data).with_human_readable();
    reader.set_max_depth(SERDE_DEPTH);
    let decoded = decode(&mut reader).map_err(DecodeError::Data)?;
    if !may_be_read_in_part(data) {
        return Ok(decoded);
    }
    // The reader does not tell its position, but it tells whether it is at the end.
    match <()>::deserialize(&mut reader) {
        Err(rmp_serde::decode::Error::InvalidMarkerRead(end))
            if end.kind() == io::ErrorKind::UnexpectedEof =>
        {
            Ok(decoded)
        }
        _ => Err(DecodeError::Unread),
    }
}

/// Whether one value is an array or a map, of which a type may leave a part unread. A type reads other values
/// completely or not at all, and asking the reader for its end costs as much as reading short text.
#[inline]
fn may_be_read_in_part(value: &[u8]) -> bool {
    matches!(value, [0x80..=0x9f | 0xdc..=0xdf, ..])
}

/// Writes data as [`decode_data`] reads it: structs as maps, types with two serde forms in the human-readable one.
#[inline]
fn write_data<T: Serialize + ?Sized>(
    to: &mut impl io::Write,
    data: &T,
    bytes: BytesMode,
) -> Result<(), rmp_serde::encode::Error> {
    let mut writer = rmp_serde::Serializer::new(to)
        .with_struct_map()
        .with_human_readable()
        .with_bytes(bytes);
    data.serialize(&mut writer)
}

/// The writer encodes a `Vec<u8>` and a slice as binary. It decides by the first item, and fails on a list that
/// begins with a byte and has other items; such data is encoded again in the [plain mode](BytesMode::Normal).
const BYTES: BytesMode = BytesMode::ForceIterables;

/// Why a name is not valid for an event or a channel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// It has no bytes.
    #[error("name is empty")]
    Empty,
    /// It has too many bytes.
    #[error("name of {0} bytes is above the limit: {MAX_NAME}")]
    TooLong(usize),
    /// It holds a control character.
    #[error("name holds a control character: {0:?}")]
    Control(char),
}

/// Checks the name of an event or a channel: 1 to 128 bytes, no control characters.
///
/// # Errors
///
/// The first rule that the name breaks.
#[inline]
pub(crate) fn check_name(name: &str) -> Result<(), NameError> {
    if is_plain(name.as_bytes()) {
        return Ok(());
    }
    check_odd_name(name)
}

/// As [`check_name`], for the event of a received message.
#[inline]
fn check_name_bytes(name: &[u8]) -> Result<(), MessageError> {
    if is_plain(name) {
        return Ok(());
    }
    let name = str::from_utf8(name).map_err(|_| MsgpackError::Utf8)?;
    check_odd_name(name).map_err(MessageError::Event)
}

/// Whether this is a valid name of printable ASCII, as most names are.
#[inline]
fn is_plain(name: &[u8]) -> bool {
    matches!(name.len(), 1..=MAX_NAME) && name.iter().all(|byte| matches!(byte, b' '..=b'~'))
}

#[cold]
fn check_odd_name(name: &str) -> Result<(), NameError> {
    match name.len() {
        0 => return Err(NameError::Empty),
        1..=MAX_NAME => {}
        len => return Err(NameError::TooLong(len)),
    }
    match name.chars().find(|char| char.is_control()) {
        None => Ok(()),
        Some(char) => Err(NameError::Control(char)),
    }
}

/// Why a message cannot be sent as it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The event is not a proper name.
    #[error("event {0}")]
    Name(NameError),
    /// The event is one of the protocol's own.
    #[error("event names that start with $ are reserved: {0:?}")]
    Reserved(String),
    /// The message is too large for one frame.
    #[error("message of {size} bytes is above the limit: {limit}")]
    TooLarge {
        /// Bytes of the message, without its frame's prefix.
        size: usize,
        /// The most that a frame may hold.
        limit: usize,
    },
    /// The peer would refuse the data: too deep, too many elements, an extension type.
    #[error("data that no peer accepts: {0}")]
    Refused(MsgpackError),
    /// The type's own `Serialize` failed.
    #[error("data cannot be serialized")]
    Serialize(#[source] rmp_serde::encode::Error),
    /// The header of a bulk message is neither a struct nor a map.
    #[error("bulk header is not a map")]
    NotAMap,
    /// The header of a bulk message already has the key of the bulk bytes.
    #[error("bulk header already has the key: {0:?}")]
    Duplicate(String),
}

/// Appends one message to `buf` as a whole frame and returns the frame's length, prefix included.
///
/// Structs become maps. `limit` is the most bytes that the frame may hold without its prefix.
/// Reserved events pass. If this fails or `T` panics, `buf` is as it was.
///
/// # Errors
///
/// What makes the message unfit to be sent.
pub(crate) fn encode<T: Serialize + ?Sized>(
    buf: &mut BytesMut,
    event: &str,
    data: &T,
    id: Option<u64>,
    limit: usize,
) -> Result<usize, EncodeError> {
    let mut draft = Draft::new(buf, event, if id.is_some() { 3 } else { 2 }, limit)?;
    let start = draft.body().len();
    draft.data(data)?;
    let sound = draft.body().get(start..).is_some_and(is_one_text);
    if let Some(id) = id {
        rmp::encode::write_uint(&mut draft, id).map_err(write_failed)?;
    }
    draft.fits(0)?;
    if !sound {
        validate_within(draft.body(), Shape::default()).map_err(EncodeError::Refused)?;
    }
    draft.seal(0)
}

/// Whether a type has encoded itself as one string: serde had it as `&str`, so it needs no check.
#[inline]
fn is_one_text(data: &[u8]) -> bool {
    let mut reader = Reader::new(data);
    matches!(reader.head(), Ok(Head::Str(_))) && reader.left() == 0
}

/// Whether this is one valid value within the limits of a message's data. The message's array and its event count
/// towards the limits, too.
#[inline]
fn is_sound_data(data: &[u8]) -> bool {
    let mut reader = Reader::new(data);
    if let Ok(Head::Str(text)) = reader.head() {
        return reader.left() == 0 && (text.is_ascii() || str::from_utf8(text).is_ok());
    }
    let inside = Shape {
        depth: MAX_DEPTH - 1,
        elements: MAX_ELEMENTS - 2,
    };
    validate_within(data, inside).is_ok()
}

/// Adds the deadline in milliseconds to a request, which is one whole frame from [`encode`].
///
/// # Errors
///
/// When the frame has become too large for `limit`; the frame is then unusable.
pub(crate) fn add_deadline(
    frame: &mut BytesMut,
    deadline: Duration,
    limit: usize,
) -> Result<(), EncodeError> {
    let ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
    // Writing to a buffer that grows cannot fail.
    let _ = rmp::encode::write_uint(&mut (&mut *frame).writer(), ms);
    let size = frame.len().saturating_sub(PREFIX);
    let prefix = u32::try_from(size)
        .ok()
        .filter(|_| size <= limit)
        .ok_or(EncodeError::TooLarge { size, limit })?;
    if let Some(head) = frame.first_chunk_mut::<{ PREFIX + 1 }>() {
        head[..PREFIX].copy_from_slice(&prefix.to_be_bytes());
        head[PREFIX] = ARRAY_OF_4;
    }
    Ok(())
}

/// Encodes data alone, as [`encode_raw`] takes it.
///
/// # Errors
///
/// When the type's own `Serialize` fails.
pub(crate) fn encode_data<T: Serialize + ?Sized>(data: &T) -> Result<Vec<u8>, EncodeError> {
    // Small data fits without a reallocation.
    let mut buf = Vec::with_capacity(128);
    if write_data(&mut buf, data, BYTES).is_err() {
        buf.clear();
        write_data(&mut buf, data, BytesMode::Normal).map_err(EncodeError::Serialize)?;
    }
    Ok(buf)
}

/// One message as a whole frame, from data that serde has encoded already; everything else is as in [`encode`].
///
/// # Errors
///
/// What makes the message unfit to be sent.
pub(crate) fn encode_raw(
    event: &str,
    data: &[u8],
    id: u64,
    limit: usize,
) -> Result<Bytes, EncodeError> {
    let mut buf = BytesMut::new();
    append_raw(&mut buf, event, data, id, limit)?;
    Ok(buf.freeze())
}

/// As [`encode`], of data that serde has encoded already.
///
/// # Errors
///
/// What makes the message unfit to be sent.
pub(crate) fn append_raw(
    buf: &mut BytesMut,
    event: &str,
    data: &[u8],
    id: u64,
    limit: usize,
) -> Result<usize, EncodeError> {
    // The exact size where the name is short: bytes that fill their buffer need no second allocation to be shared.
    buf.reserve(PREFIX + 2 + event.len() + data.len() + uint_len(id));
    let mut draft = Draft::new(buf, event, 3, limit)?;
    // A draft takes every byte.
    let _ = io::Write::write(&mut draft, data);
    rmp::encode::write_uint(&mut draft, id).map_err(write_failed)?;
    draft.fits(0)?;
    if !is_one_text(data) {
        validate_within(draft.body(), Shape::default()).map_err(EncodeError::Refused)?;
    }
    draft.seal(0)
}

/// Bytes that a number takes.
fn uint_len(number: u64) -> usize {
    match number {
        0..0x80 => 1,
        0x80..0x100 => 2,
        0x100..0x1_0000 => 3,
        0x1_0000..0x1_0000_0000 => 5,
        _ => 9,
    }
}

/// Appends one message up to its last field, whose `len` bytes the caller sends right after `buf`.
///
/// The data is the map that `header` serializes to, and in it, as the last entry, `key` with a
/// binary value of `len` bytes: they go from their owner to the stream without being copied here.
/// Returns the length of the whole frame, the prefix and those bytes included. `limit` and failure
/// are as in [`encode`].
///
/// # Errors
///
/// What makes the message unfit to be sent.
pub(crate) fn encode_bulk<T: Serialize + ?Sized>(
    buf: &mut BytesMut,
    event: &str,
    header: &T,
    key: &str,
    len: usize,
    limit: usize,
) -> Result<usize, EncodeError> {
    let mut draft = Draft::new(buf, event, 2, limit)?;
    let start = draft.body().len();
    draft.data(header)?;
    draft.fits(len)?;
    draft.widen(start, key)?;
    rmp::encode::write_str(&mut draft, key).map_err(write_failed)?;
    let bin = u32::try_from(len).map_err(|_| draft.too_large(len))?;
    rmp::encode::write_bin_len(&mut draft, bin).map_err(write_failed)?;
    draft.fits(len)?;
    draft.seal(len)
}

/// One message encoded for many receivers.
///
/// Cheap to clone: clones share the bytes. `Debug` prints the length, never the data.
#[derive(Clone)]
pub struct Encoded(Bytes);

thread_local! {
    /// Where [`Encoded`] makes small messages, whose own memory is then as large as they are. Taken while data serializes,
    /// which may encode another message.
    static DRAFT: Cell<BytesMut> = Cell::new(BytesMut::new());
}
/// The largest message, in bytes of its frame, that is copied out of that memory.
const DRAFT_MOST: usize = 1024;

impl Encoded {
    /// Encodes `[event, data]`. The limit of a receiver is not known here; it is checked on sending.
    ///
    /// # Errors
    ///
    /// A message that no peer would accept, and reserved events.
    pub fn new<T: Serialize + ?Sized>(event: &str, data: &T) -> Result<Self, EncodeError> {
        if event.as_bytes().first() == Some(&RESERVED) {
            check_name(event).map_err(EncodeError::Name)?;
            return Err(EncodeError::Reserved(event.to_owned()));
        }
        // A thread that ends may have none any more.
        let mut buf = DRAFT.try_with(Cell::take).unwrap_or_default();
        encode(&mut buf, event, data, None, usize::MAX)?;
        if buf.len() > DRAFT_MOST {
            return Ok(Self(buf.freeze()));
        }
        let frame = Bytes::copy_from_slice(&buf);
        buf.clear();
        let _ = DRAFT.try_with(|draft| draft.set(buf));
        Ok(Self(frame))
    }

    /// A frame that was encoded elsewhere in this crate.
    pub(crate) fn from_frame(frame: Bytes) -> Self {
        Self(frame)
    }

    /// Encodes a received message for other receivers: event and data unchanged, without the id, and without decoding
    /// the data.
    ///
    /// # Errors
    ///
    /// Reserved events, which `recv` never hands out.
    pub fn relay(message: &Message) -> Result<Self, EncodeError> {
        if message.is_reserved() {
            return Err(EncodeError::Reserved(message.event().to_owned()));
        }
        Self::from_raw(message.event(), &message.raw())
    }

    /// `[event, data]` with valid data that is encoded already.
    pub(crate) fn from_raw(event: &str, data: &[u8]) -> Result<Self, EncodeError> {
        let mut head = vec![0x92];
        // Writing to a vector cannot fail.
        let _ = rmp::encode::write_str(&mut head, event);
        let size = head.len() + data.len();
        let prefix = u32::try_from(size).map_err(|_| EncodeError::TooLarge {
            size,
            limit: u32::MAX as usize,
        })?;
        let mut frame = BytesMut::with_capacity(PREFIX + size);
        frame.put_u32(prefix);
        frame.put_slice(&head);
        frame.put_slice(data);
        Ok(Self(frame.freeze()))
    }

    /// The whole frame, prefix included.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// How many bytes the whole frame has, prefix included.
    #[expect(clippy::len_without_is_empty, reason = "a frame is never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Debug for Encoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoded").field("len", &self.len()).finish()
    }
}

/// A frame that is being written at the end of a buffer. Dropping it before `seal` removes the written bytes, also
/// when a `Serialize` panics.
struct Draft<'a> {
    buf: &'a mut BytesMut,
    /// Where the frame begins.
    start: usize,
    /// Bytes of the body so far. Bytes above the limit are counted and not kept.
    size: usize,
    limit: usize,
    sealed: bool,
}

impl<'a> Draft<'a> {
    /// Begins a message of `arity` values with its prefix, array head and event.
    #[inline(always)]
    fn new(
        buf: &'a mut BytesMut,
        event: &str,
        arity: u8,
        limit: usize,
    ) -> Result<Self, EncodeError> {
        check_name(event).map_err(EncodeError::Name)?;
        let start = buf.len();
        // One allocation: the prefix, a short array's head, and that of a name of at most 128 bytes.
        buf.reserve(PREFIX + 3 + event.len());
        match u8::try_from(event.len()) {
            Ok(len @ 0..32) => buf.extend_from_slice(&[0, 0, 0, 0, ARRAY | arity, STR | len]),
            len => {
                let len = len.unwrap_or(u8::MAX);
                buf.extend_from_slice(&[0, 0, 0, 0, ARRAY | arity, STR8, len]);
            }
        }
        buf.extend_from_slice(event.as_bytes());
        Ok(Self {
            size: buf.len() - start - PREFIX,
            buf,
            start,
            limit: limit.min(u32::MAX as usize),
            sealed: false,
        })
    }

    #[inline]
    fn data<T: Serialize + ?Sized>(&mut self, data: &T) -> Result<(), EncodeError> {
        let (len, size) = (self.buf.len(), self.size);
        match write_data(self, data, BYTES) {
            Ok(()) => Ok(()),
            // The error is passed on, so that the common case drops no value.
            Err(error) => self.plain(error, data, len, size),
        }
    }

    /// Encodes data again, in place of what was written of it before.
    #[cold]
    fn plain<T: Serialize + ?Sized>(
        &mut self,
        _: rmp_serde::encode::Error,
        data: &T,
        len: usize,
        size: usize,
    ) -> Result<(), EncodeError> {
        self.buf.truncate(len);
        self.size = size;
        write_data(self, data, BytesMode::Normal).map_err(EncodeError::Serialize)
    }

    #[inline]
    fn body(&self) -> &[u8] {
        &self.buf[self.start + PREFIX..]
    }

    /// Checks that the body so far and `more` bytes are within the limit.
    #[inline]
    fn fits(&self, more: usize) -> Result<(), EncodeError> {
        match self.size.checked_add(more) {
            Some(size) if size <= self.limit => Ok(()),
            _ => Err(self.too_large(more)),
        }
    }

    fn too_large(&self, more: usize) -> EncodeError {
        EncodeError::TooLarge {
            size: self.size.saturating_add(more),
            limit: self.limit,
        }
    }

    /// Checks that the body from `start` on is a map without `key`, and makes its head announce
    /// one more pair.
    fn widen(&mut self, start: usize, key: &str) -> Result<(), EncodeError> {
        // The whole body is validated, so that depth and elements count as they do for the peer.
        let mut walk = Walk::new(self.body(), Shape::default()).map_err(EncodeError::Refused)?;
        walk.enter().map_err(EncodeError::Refused)?;
        walk.value().map_err(EncodeError::Refused)?;
        let Head::Map(pairs) = walk.enter().map_err(EncodeError::Refused)? else {
            return Err(EncodeError::NotAMap);
        };
        for _ in 0..pairs {
            let known = walk.value().map_err(EncodeError::Refused)?;
            if Reader::new(known).head() == Ok(Head::Str(key.as_bytes())) {
                return Err(EncodeError::Duplicate(key.to_owned()));
            }
            walk.value().map_err(EncodeError::Refused)?;
        }
        walk.end().map_err(EncodeError::Refused)?;
        walk.announce(2).map_err(EncodeError::Refused)?;

        // Only the lengths that rmp writes for this many pairs: the shortest.
        let at = self.start + PREFIX + start;
        match pairs {
            0..=14 => self.buf[at] += 1,
            15 => {
                let end = self.buf.len();
                self.buf.put_bytes(0, 2);
                self.buf.copy_within(at + 1..end, at + 3);
                self.buf[at..at + 3].copy_from_slice(&[MAP16, 0, 16]);
                self.size += 2;
            }
            // `announce` has just refused anything near 65,535 pairs.
            _ => {
                let pairs = u16::try_from(pairs + 1)
                    .map_err(|_| EncodeError::Refused(MsgpackError::TooManyElements))?;
                self.buf[at + 1..at + 3].copy_from_slice(&pairs.to_be_bytes());
            }
        }
        Ok(())
    }

    /// Fills in the prefix of a frame of which `more` bytes follow the buffer; returns the whole
    /// frame's length.
    #[inline]
    fn seal(mut self, more: usize) -> Result<usize, EncodeError> {
        let len = self.size + more;
        let prefix = u32::try_from(len).map_err(|_| self.too_large(more))?;
        self.buf[self.start..self.start + PREFIX].copy_from_slice(&prefix.to_be_bytes());
        self.sealed = true;
        Ok(PREFIX + len)
    }
}

impl io::Write for Draft<'_> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.size = self.size.saturating_add(bytes.len());
        if self.size <= self.limit {
            self.buf.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    #[inline]
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write(bytes).map(|_| ())
    }

    #[inline]
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Draft<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.sealed {
            self.buf.truncate(self.start);
        }
    }
}

/// A draft accepts every byte, so this error cannot happen; the type checker needs the conversion.
fn write_failed(error: rmp::encode::ValueWriteError) -> EncodeError {
    EncodeError::Serialize(error.into())
}

/// Prints the arity for [`MessageError::Shape`].
struct Found(Option<usize>);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("no array"),
            Some(arity) => write!(f, "{arity}"),
        }
    }
}

/// The most bytes that the name of an event or a channel may have.
pub(crate) const MAX_NAME: usize = 128;

/// The first byte of the protocol's own events.
const RESERVED: u8 = b'$';

/// The recursion depth that serde may use. The validator refuses far smaller depths, so this is a second defence.
const SERDE_DEPTH: usize = 64;

const MAP16: u8 = 0xde;

const ARRAY: u8 = 0x90;

const ARRAY_OF_2: u8 = ARRAY | 2;

const ARRAY_OF_4: u8 = ARRAY | 4;

const STR: u8 = 0xa0;

const STR8: u8 = 0xd9;

#[cfg(test)]
mod tests;
