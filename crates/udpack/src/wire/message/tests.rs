//! Bytes on the wire, and what is refused on the way in and on the way out.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Buf;
use proptest::prelude::*;
use serde::de::IgnoredAny;
use serde::ser::SerializeSeq;
use serde_bytes::ByteBuf;

use super::*;

const LIMIT: usize = 1 << 20;

/// Every body that a test reads shows as well that the short way to a message's parts says nothing else than the long one.
fn decode(body: &[u8]) -> Result<Message, MessageError> {
    if let Some(parts) = Parts::common(body) {
        assert_eq!(Parts::of(body, Shape::default()), Ok(parts), "{body:02x?}");
    }
    Message::decode(Bytes::copy_from_slice(body))
}

/// The body of the one frame that `encode` makes.
fn body_of<T: Serialize + ?Sized>(event: &str, data: &T, id: Option<u64>) -> Bytes {
    let mut buf = BytesMut::new();
    let len = encode(&mut buf, event, data, id, LIMIT).expect("encodes");
    assert_eq!(len, buf.len());
    assert_eq!(buf.get_u32() as usize, len - PREFIX);
    buf.freeze()
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Say<'a> {
    room: &'a str,
    text: &'a str,
}

#[derive(Serialize)]
struct At {
    id: u64,
    off: u64,
}

#[test]
fn event_and_data_are_an_array_of_two() {
    let say = Say {
        room: "a",
        text: "hi",
    };
    let mut buf = BytesMut::new();
    assert_eq!(
        encode(&mut buf, "say", &say, None, LIMIT).expect("encodes"),
        25
    );
    assert_eq!(
        &buf[..],
        b"\x00\x00\x00\x15\x92\xa3say\x82\xa4room\xa1a\xa4text\xa2hi"
    );
    let message = Message::decode(buf.split_off(PREFIX).freeze()).expect("a message");
    assert_eq!(
        (message.event(), message.id(), message.len()),
        ("say", None, 25)
    );
    assert_eq!(message.data::<Say<'_>>().expect("a Say"), say);
    assert_eq!(
        message.fields().and_then(|fields| fields.str("text")),
        Ok("hi")
    );
    assert!(!message.is_reserved());
}

#[test]
fn the_short_way_to_the_parts_has_the_limits_of_the_long_one() {
    let nested = |depth: usize| [b"\x92\xa1e".to_vec(), vec![0x91; depth - 2], vec![0x90]].concat();
    let long = |elements: u16| {
        let len = elements.to_be_bytes();
        let nils = vec![0xc0; usize::from(elements)];
        [b"\x92\xa1e\xdc".to_vec(), len.to_vec(), nils].concat()
    };
    // The message's own array, its event and the array of the data are three of the 65,536 values.
    let sound: [Vec<u8>; 6] = [
        b"\x92\xa1e\xc0".to_vec(),
        b"\x92\xa1e\xa3\xe2\x82\xac".to_vec(),
        b"\x92\xa1e\xd9\x01a".to_vec(),
        b"\x92\xa1e\x81\xa1a\x01".to_vec(),
        nested(MAX_DEPTH),
        long(65_533),
    ];
    for body in sound {
        decode(&body).expect("a message");
        assert!(Parts::common(&body).is_some(), "{:02x?}", &body[..4]);
    }
    let unsound: [Vec<u8>; 6] = [
        b"\x92\xa1e".to_vec(),
        b"\x92\xa1e\xc0\xc0".to_vec(),
        b"\x92\xa1e\xa1\xff".to_vec(),
        b"\x92\xa1\x07\xc0".to_vec(),
        nested(MAX_DEPTH + 1),
        long(65_534),
    ];
    for body in unsound {
        decode(&body).expect_err("no message");
        assert_eq!(Parts::common(&body), None);
    }
}

#[test]
fn request_has_its_id_last() {
    let body = body_of("$reply", &(), Some(300));
    assert_eq!(&body[..], b"\x93\xa6$reply\xc0\xcd\x01\x2c");
    let message = Message::decode(body).expect("a message");
    assert_eq!(message.id(), Some(300));
    assert!(message.is_reserved());
    assert_eq!(&message.raw()[..], [0xc0]);
    message.data::<()>().expect("nil");
}

#[test]
fn a_request_may_say_how_long_it_is_waited_for() {
    let mut frame = BytesMut::new();
    encode(&mut frame, "ask", &7, Some(1), LIMIT).expect("encodes");
    add_deadline(&mut frame, Duration::from_secs(30), LIMIT).expect("fits");
    assert_eq!(
        &frame[..],
        b"\x00\x00\x00\x0a\x94\xa3ask\x07\x01\xcd\x75\x30"
    );
    let message = Message::decode(frame.split_off(PREFIX).freeze()).expect("a message");
    assert_eq!(
        (message.id(), message.deadline()),
        (Some(1), Some(Duration::from_secs(30)))
    );
    for deadline in [&[0xff][..], &[0xc0], &[0xca, 0x3f, 0x80, 0, 0]] {
        let body = [&[0x94, 0xa1, b'e', 0xc0, 0x01], deadline].concat();
        assert_eq!(decode(&body).map(|_| ()), Err(MessageError::Deadline));
    }
    let mut frame = BytesMut::new();
    let size = encode(&mut frame, "ask", &7, Some(1), LIMIT).expect("encodes") - PREFIX;
    assert!(matches!(
        add_deadline(&mut frame, Duration::MAX, size + 8),
        Err(EncodeError::TooLarge { .. })
    ));
}

#[test]
fn data_lies_in_the_frame() {
    let body = body_of(
        "chunk",
        &BTreeMap::from([("chunk", ByteBuf::from(vec![7; 9]))]),
        None,
    );
    let message = Message::decode(body.clone()).expect("a message");
    assert_eq!(message.raw().as_ptr(), body[7..].as_ptr());
    let bulk = message.bulk("chunk").expect("binary");
    assert_eq!(bulk, vec![7; 9]);
    assert_eq!(bulk.as_ptr(), body[body.len() - 9..].as_ptr());
    assert_eq!(message.bulk("other"), Err(FieldError::Missing("other")));
    let borrowed: BTreeMap<&str, &serde_bytes::Bytes> = message.data().expect("a map");
    assert_eq!(borrowed["chunk"].as_ptr(), bulk.as_ptr());
}

#[test]
fn refuses_what_is_no_array_of_two_to_four() {
    let shape = |arity| Err(MessageError::Shape { arity });
    for (body, arity) in [
        (&[0xc0][..], None),
        (&[0x01], None),
        (&[0x81, 0xa1, b'e', 0xc0], None),
        (&[0xa1, b'e'], None),
        (&[0x90], Some(0)),
        (&[0x91, 0xa1, b'e'], Some(1)),
        (&[0x94, 0xa2, b'$', b'e', 0xc0, 0x01, 0x01], Some(4)),
        (&[0x95, 0xa1, b'e', 0xc0, 0x01, 0x01, 0x01], Some(5)),
    ] {
        assert_eq!(decode(body).map(|_| ()), shape(arity), "{body:02x?}");
    }
    assert_eq!(
        MessageError::Shape { arity: Some(4) }.to_string(),
        "message is not an array of 2 to 4 values, of 4 only for a request: 4"
    );
    // The same array under a longer head is the same message.
    decode(&[0xdd, 0, 0, 0, 2, 0xa1, b'e', 0xc0]).expect("a message");
}

#[test]
fn bytes_that_are_not_msgpack_are_told_from_messages_that_are_wrong() {
    for body in [
        &[][..],
        &[0xc1],
        &[0x90, 0xc0],
        &[0x92, 0xa1, b'e'],
        &[0x92, 0xa1, 0xff, 0xc0],
        &[0x92, 0xa1, b'e', 0xc0, 0xc0],
        &[0x92, 0x01, 0xc1],
        &[0x93, 0xa1, b'e', 0xc0, 0xd4, 0x05, 0x00],
        &[0xdd, 0xff, 0xff, 0xff, 0xff],
    ] {
        assert!(
            matches!(decode(body), Err(MessageError::Msgpack(_))),
            "{body:02x?}"
        );
    }
    let deep = [&[0x92, 0xa1, b'e'][..], &[0x91; 32], &[0xc0]].concat();
    assert_eq!(decode(&deep).map(|_| ()), Err(MsgpackError::TooDeep.into()));
    let deepest = [&[0x92, 0xa1, b'e'][..], &[0x91; 31], &[0xc0]].concat();
    let message = decode(&deepest).expect("a message");
    message
        .data::<IgnoredAny>()
        .expect("serde goes as deep as a message may");
}

#[test]
fn event_must_be_a_proper_name() {
    let with_event = |event: &[u8]| {
        let body = [
            &[0x92, 0xd9, u8::try_from(event.len()).expect("short")],
            event,
            &[0xc0],
        ];
        decode(&body.concat()).map(|message| message.event().to_owned())
    };
    assert_eq!(with_event(&[b'e'; 128]), Ok("e".repeat(128)));
    assert_eq!(with_event("ünï 🦀".as_bytes()), Ok("ünï 🦀".to_owned()));
    for (event, error) in [
        (&[][..], NameError::Empty),
        (&[b'e'; 129], NameError::TooLong(129)),
        (b"a\0", NameError::Control('\0')),
        (b"\x1f", NameError::Control('\x1f')),
        (b"\x7f", NameError::Control('\x7f')),
        ("ü\u{85}".as_bytes(), NameError::Control('\u{85}')),
    ] {
        assert_eq!(with_event(event), Err(MessageError::Event(error)));
    }
    for event in [&[0x07][..], &[0xc4, 1, b'e'], &[0xc0], &[0x91, 0xa1, b'e']] {
        let body = [&[0x92], event, &[0xc0]].concat();
        assert_eq!(decode(&body).map(|_| ()), Err(MessageError::EventNotString));
    }
    assert_eq!(
        MessageError::Event(NameError::TooLong(129)).to_string(),
        "event name of 129 bytes is above the limit: 128"
    );
}

#[test]
fn id_must_be_an_unsigned_integer() {
    let with_id = |id: &[u8]| {
        let body = [&[0x93, 0xa1, b'e', 0xc0], id].concat();
        decode(&body).map(|message| message.id())
    };
    assert_eq!(with_id(&[0xd1, 0x00, 0x05]), Ok(Some(5)));
    let max = [&[0xcf][..], &[0xff; 8]].concat();
    assert_eq!(with_id(&max), Ok(Some(u64::MAX)));
    for id in [
        &[0xff][..],
        &[0xca, 0x3f, 0x80, 0, 0],
        &[0xc0],
        &[0xa1, b'1'],
        &[0xc2],
    ] {
        assert_eq!(with_id(id), Err(MessageError::Id), "{id:02x?}");
    }
}

#[test]
fn data_of_another_type_is_an_error() {
    let message = decode(&[0x92, 0xa1, b'e', 0x92, 1, 2]).expect("a message");
    assert_eq!(message.data::<(u8, u8)>().expect("two"), (1, 2));
    assert!(matches!(
        message.data::<String>(),
        Err(DecodeError::Data(_))
    ));
    assert!(message.data::<(u8,)>().is_err());
    assert!(message.data::<(u8, u8, u8)>().is_err());
    assert_eq!(message.fields().map(|_| ()), Err(FieldError::NotAMap));

    /// Reads nothing, as a careless `Deserialize` might.
    #[derive(Debug)]
    struct Nothing;
    impl<'de> Deserialize<'de> for Nothing {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            Ok(Self)
        }
    }
    assert!(matches!(
        message.data::<Nothing>(),
        Err(DecodeError::Unread)
    ));
    let map = decode(&[0x92, 0xa1, b'e', 0x81, 1, 2]).expect("a message");
    assert!(matches!(map.data::<Nothing>(), Err(DecodeError::Unread)));
    let one = decode(&[0x92, 0xa1, b'e', 0xa1, b'x']).expect("a message");
    assert!(one.data::<Nothing>().is_ok());
}

#[test]
fn debug_keeps_the_data_to_itself() {
    let message = Message::decode(body_of("login", "secret", Some(1))).expect("a message");
    assert_eq!(
        format!("{message:?}"),
        r#"Message { event: "login", id: Some(1), data_len: 7 }"#
    );
    let encoded = Encoded::new("login", "secret").expect("encodes");
    assert_eq!(format!("{encoded:?}"), "Encoded { len: 18 }");
}

/// Fails, panics or lies about its length after writing something.
enum Bad {
    Fails,
    Panics,
    Lies,
}

impl Serialize for Bad {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(Some(2))?;
        seq.serialize_element(&1)?;
        match self {
            Self::Fails => Err(serde::ser::Error::custom("no")),
            Self::Panics => panic!("on purpose"),
            Self::Lies => seq.end(),
        }
    }
}

#[test]
fn buffer_is_as_before_when_encoding_fails() {
    let mut buf = BytesMut::from(&b"before"[..]);
    let mut failed = |event: &str, data: &Bad| {
        let error = encode(&mut buf, event, data, Some(1), LIMIT).expect_err("bad");
        assert_eq!(&buf[..], b"before");
        error
    };
    assert!(matches!(
        failed("e", &Bad::Fails),
        EncodeError::Serialize(_)
    ));
    assert!(matches!(failed("e", &Bad::Lies), EncodeError::Refused(_)));
    assert!(matches!(
        failed("", &Bad::Fails),
        EncodeError::Name(NameError::Empty)
    ));
    let panicked = catch_unwind(AssertUnwindSafe(|| failed("e", &Bad::Panics)));
    assert!(panicked.is_err());
    assert_eq!(&buf[..], b"before");
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        encode_bulk(&mut buf, "e", &Bad::Panics, "chunk", 1, LIMIT)
    }));
    assert!(panicked.is_err());
    assert_eq!(&buf[..], b"before");
}

#[test]
fn limit_counts_the_body_exactly() {
    let mut buf = BytesMut::new();
    let data = "x".repeat(100);
    // Array, event, string head, string.
    let size = 1 + 2 + 2 + 100;
    assert_eq!(
        encode(&mut buf, "e", &data, None, size).expect("fits"),
        PREFIX + size
    );
    buf.clear();
    let error = encode(&mut buf, "e", &data, None, size - 1).expect_err("too large");
    assert_eq!(
        error.to_string(),
        "message of 105 bytes is above the limit: 104"
    );
    assert!(buf.is_empty());
    // What is above the limit is counted, not kept.
    let mut small = BytesMut::new();
    let data = ByteBuf::from(vec![0; LIMIT]);
    let error = encode(&mut small, "e", &data, None, 1_000).expect_err("too large");
    assert!(matches!(error, EncodeError::TooLarge { size, .. } if size == LIMIT + 8));
    assert!(small.capacity() < 4_096);
}

#[test]
fn refuses_to_send_what_a_peer_would_refuse() {
    let mut buf = BytesMut::new();
    let error = encode(&mut buf, "e", &vec![0_u16; 65_536], None, LIMIT).expect_err("too many");
    assert!(matches!(
        error,
        EncodeError::Refused(MsgpackError::TooManyElements)
    ));

    #[derive(Serialize)]
    struct Nest(Vec<Self>);
    let nest = |depth| (1..depth).fold(Nest(vec![]), |inner, _| Nest(vec![inner]));
    encode(&mut buf, "e", &nest(31), None, LIMIT).expect("31 in the message's own array");
    let error = encode(&mut buf, "e", &nest(32), None, LIMIT).expect_err("too deep");
    assert!(matches!(error, EncodeError::Refused(MsgpackError::TooDeep)));
}

#[test]
fn bulk_message_is_a_map_with_the_bytes_last() {
    let mut buf = BytesMut::new();
    let at = At { id: 1, off: 300 };
    let len = encode_bulk(&mut buf, "chunk", &at, "chunk", 5, LIMIT).expect("encodes");
    assert_eq!(
        &buf[..],
        b"\x00\x00\x00\x20\x92\xa5chunk\x83\xa2id\x01\xa3off\xcd\x01\x2c\xa5chunk\xc4\x05"
    );
    assert_eq!(len, buf.len() + 5);
    buf.extend_from_slice(b"bytes");
    let message = Message::decode(buf.split_off(PREFIX).freeze()).expect("a message");
    assert_eq!(message.len(), len);
    assert_eq!(message.bulk("chunk").expect("binary"), &b"bytes"[..]);
    assert_eq!(
        message.fields().and_then(|fields| fields.u64("off")),
        Ok(300)
    );
}

#[test]
fn bulk_header_may_have_any_number_of_fields_and_bytes() {
    for pairs in [0, 1, 14, 15, 16, 17, 300] {
        for len in [0, 1, 255, 256, 65_535, 65_536] {
            let header: BTreeMap<u64, u64> = (0..pairs).map(|key| (key, key + 1_000)).collect();
            let mut buf = BytesMut::from(&b"before"[..]);
            let whole = encode_bulk(&mut buf, "e", &header, "k", len, LIMIT).expect("encodes");
            buf.put_bytes(7, len);
            assert_eq!(buf.len() - 6, whole);
            buf.advance(6);
            assert_eq!(buf.get_u32() as usize, whole - PREFIX);
            let message = Message::decode(buf.freeze()).expect("a message");

            #[derive(Debug, PartialEq, PartialOrd, Eq, Ord, Deserialize)]
            #[serde(untagged)]
            enum Any {
                Int(u64),
                Bytes(ByteBuf),
            }
            let map: BTreeMap<Any, Any> = message.data().expect("a map");
            assert_eq!(map.len() as u64, pairs + 1);
            assert_eq!(
                map[&Any::Bytes(ByteBuf::from("k"))],
                Any::Bytes(vec![7; len].into())
            );
            for (key, value) in header {
                assert_eq!(map[&Any::Int(key)], Any::Int(value));
            }
        }
    }
}

#[test]
fn bulk_refuses_what_would_not_be_a_message() {
    let mut buf = BytesMut::from(&b"before"[..]);
    let at = At { id: 1, off: 2 };
    encode_bulk(&mut BytesMut::new(), "chunk", &at, "chunk", 100, 125).expect("fits exactly");
    let mut refused = |header: &dyn Fn(&mut BytesMut) -> Result<usize, EncodeError>| {
        let error = header(&mut buf).expect_err("refused");
        assert_eq!(&buf[..], b"before");
        error
    };
    let error = refused(&|buf| encode_bulk(buf, "chunk", &at, "chunk", 100, 124));
    assert!(matches!(
        error,
        EncodeError::TooLarge {
            size: 125,
            limit: 124
        }
    ));
    let error = refused(&|buf| encode_bulk(buf, "chunk", &at, "chunk", usize::MAX, LIMIT));
    assert!(matches!(error, EncodeError::TooLarge { .. }));
    let error = refused(&|buf| encode_bulk(buf, "chunk", &at, "chunk", usize::MAX, usize::MAX));
    assert!(matches!(error, EncodeError::TooLarge { .. }));
    let error = refused(&|buf| encode_bulk(buf, "chunk", &[1, 2], "chunk", 1, LIMIT));
    assert!(matches!(error, EncodeError::NotAMap));
    let error = refused(&|buf| encode_bulk(buf, "chunk", &(), "chunk", 1, LIMIT));
    assert!(matches!(error, EncodeError::NotAMap));
    let error = refused(&|buf| encode_bulk(buf, "chunk", &at, "off", 1, LIMIT));
    assert!(matches!(error, EncodeError::Duplicate(key) if key == "off"));
    let many: BTreeMap<u64, u64> = (0..32_766).map(|key| (key, key)).collect();
    let error = refused(&|buf| encode_bulk(buf, "e", &many, "k", 1, LIMIT));
    assert!(matches!(
        error,
        EncodeError::Refused(MsgpackError::TooManyElements)
    ));
}

#[test]
fn encoded_is_what_encode_appends() {
    let encoded = Encoded::new("say", &[1, 2]).expect("encodes");
    assert_eq!(
        &encoded.bytes()[PREFIX..],
        &body_of("say", &[1, 2], None)[..]
    );
    assert_eq!(encoded.len(), encoded.bytes().len());
    for event in ["$hello", "$"] {
        let refused = Encoded::new(event, &());
        assert!(matches!(refused, Err(EncodeError::Reserved(name)) if name == event));
    }
    assert!(matches!(
        Encoded::new("$\n", &()),
        Err(EncodeError::Name(_))
    ));
}

/// Data of any kind that survives a round trip.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Value {
    Nil,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Text(String),
    Bin(ByteBuf),
    List(Vec<Self>),
    Map(BTreeMap<String, Self>),
    Fields { left: Box<Self>, right: Option<u8> },
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Nil),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        any::<u64>().prop_map(Value::Uint),
        (-1e300..1e300).prop_map(Value::Float),
        ".{0,40}".prop_map(Value::Text),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(|bin| Value::Bin(bin.into())),
    ];
    leaf.prop_recursive(4, 60, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..20).prop_map(Value::List),
            prop::collection::btree_map(".{0,9}", inner.clone(), 0..8).prop_map(Value::Map),
            (inner, any::<Option<u8>>()).prop_map(|(left, right)| Value::Fields {
                left: Box::new(left),
                right,
            }),
        ]
    })
}

proptest! {
    #[test]
    fn any_message_survives_the_round_trip(
        event in "[^\\p{Cc}]{1,32}",
        data in any_value(),
        id in any::<Option<u64>>(),
    ) {
        let body = body_of(&event, &data, id);
        let len = body.len() + PREFIX;
        let message = decode(&body).expect("a message");
        prop_assert_eq!(message.event(), event);
        prop_assert_eq!(message.id(), id);
        prop_assert_eq!(message.len(), len);
        prop_assert_eq!(message.data::<Value>().expect("a value"), data);
    }

    #[test]
    fn name_is_checked_as_the_rule_says(name in "\\PC{0,3}[\\x00-\\u{a0}]{0,3}\\PC{0,130}") {
        let proper = (1..=128).contains(&name.len())
            && !name.chars().any(|c| matches!(c, '\0'..='\x1f' | '\x7f'..='\u{9f}'));
        prop_assert_eq!(check_name(&name).is_ok(), proper);
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        head in prop::sample::select(vec![&[][..], &[0x92, 0xa1, b'e'], &[0x93, 0xa1, b'e']]),
        tail in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        if let Ok(message) = decode(&[head, &tail].concat()) {
            let _ = (message.event(), message.id(), message.raw(), message.is_reserved());
            let _ = (message.fields(), message.bulk("a"), format!("{message:?}"));
            message.data::<IgnoredAny>().expect("serde can skip what is accepted");
            let _ = message.data::<Value>();
        }
    }
}

#[test]
fn a_relayed_message_has_the_same_event_and_data_and_no_id() {
    // `["say", {"a": [1, nil]}, 7]`, the array in its long form.
    let body = Bytes::from_static(b"\xdc\x00\x03\xa3say\x81\xa1a\x92\x01\xc0\x07");
    let message = Message::decode(body).unwrap();
    let relayed = Encoded::relay(&message).unwrap();
    assert_eq!(
        relayed.bytes().as_ref(),
        b"\x00\x00\x00\x0b\x92\xa3say\x81\xa1a\x92\x01\xc0"
    );
    let reserved = Message::decode(Bytes::from_static(b"\x92\xa6$reply\xc0")).unwrap();
    assert!(matches!(
        Encoded::relay(&reserved),
        Err(EncodeError::Reserved(_))
    ));
}
