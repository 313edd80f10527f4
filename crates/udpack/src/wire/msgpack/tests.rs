//! Every marker byte, every lie about a length, and agreement with a second, naive reading.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde::de::IgnoredAny;

use super::*;

/// A value that has `depth` arrays (`array`) or maps around a nil, alternating if both.
fn nested(depth: usize, kinds: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for kind in kinds.iter().cycle().take(depth) {
        bytes.extend_from_slice(kind);
    }
    bytes.push(NIL);
    bytes
}

const ARRAY: &[u8] = &[0x91];
const MAP: &[u8] = &[0x81, 0x00];

fn truncated(need: u64, left: u64) -> Result<(), MsgpackError> {
    Err(MsgpackError::Truncated { need, left })
}

#[test]
fn accepts_the_shortest_value_of_every_marker_and_nothing_shorter() {
    for marker in 0..=u8::MAX {
        // What must follow the marker for the value to be whole, with the least of contents.
        let rest: Vec<u8> = match marker {
            0x80..=0x8f => vec![0; usize::from(marker & 0x0f) * 2],
            0x90..=0x9f => vec![0; usize::from(marker & 0x0f)],
            0xa0..=0xbf => vec![b'a'; usize::from(marker & 0x1f)],
            0xc4 | 0xd9 => vec![2, b'a', b'b'],
            0xc5 | 0xda => vec![0, 2, b'a', b'b'],
            0xc6 | 0xdb => vec![0, 0, 0, 2, b'a', b'b'],
            0xc7 => [&[12, 0xff][..], &[0; 12]].concat(),
            0xc8 => [&[0, 12, 0xff][..], &[0; 12]].concat(),
            0xc9 => [&[0, 0, 0, 12, 0xff][..], &[0; 12]].concat(),
            0xcc | 0xd0 => vec![0; 1],
            0xcd | 0xd1 => vec![0; 2],
            0xca | 0xce | 0xd2 => vec![0; 4],
            0xcb | 0xcf | 0xd3 => vec![0; 8],
            0xd6 => [&[0xff][..], &[0; 4]].concat(),
            0xd7 => [&[0xff][..], &[0; 8]].concat(),
            0xdc => vec![0, 1, 0],
            0xdd => vec![0, 0, 0, 1, 0],
            0xde => vec![0, 1, 0, 0],
            0xdf => vec![0, 0, 0, 1, 0, 0],
            0x00..=0x7f | 0xc0 | 0xc2 | 0xc3 | 0xe0..=0xff => vec![],
            0xc1 => {
                assert_eq!(validate(&[0xc1]), Err(MsgpackError::ReservedByte));
                continue;
            }
            // No timestamp has 1, 2 or 16 bytes.
            0xd4 | 0xd5 | 0xd8 => {
                let len = 1 << (marker - 0xd4);
                let mut bytes = vec![0; 2 + len];
                (bytes[0], bytes[1]) = (marker, 0xff);
                assert_eq!(validate(&bytes), Err(MsgpackError::Timestamp(len)));
                bytes[1] = 5;
                assert_eq!(validate(&bytes), Err(MsgpackError::Extension(5)));
                continue;
            }
        };
        let whole = [&[marker][..], &rest].concat();
        assert_eq!(validate(&whole), Ok(()), "{whole:02x?}");
        for cut in 0..whole.len() {
            assert!(
                matches!(validate(&whole[..cut]), Err(MsgpackError::Truncated { .. })),
                "{whole:02x?} cut at {cut}"
            );
        }
        let longer = [&whole[..], &[NIL]].concat();
        assert_eq!(validate(&longer), Err(MsgpackError::Trailing(1)));
    }
}

#[test]
fn refuses_lengths_that_are_not_there() {
    for (marker, need, left) in [
        (0xdd, u64::from(u32::MAX), 5),
        (0xdf, u64::from(u32::MAX) * 2, 5),
        (0xdb, u64::from(u32::MAX), 5),
        (0xc6, u64::from(u32::MAX), 5),
        (0xc9, u64::from(u32::MAX), 4),
    ] {
        let bytes = [marker, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
        assert_eq!(validate(&bytes), truncated(need, left), "{marker:02x}");
    }
    assert_eq!(validate(&[]), truncated(1, 0));
    assert_eq!(validate(&[0xdd, 0xff, 0xff]), truncated(4, 2));
}

#[test]
fn refuses_depth_above_the_limit_without_recursion() {
    let kinds: [&[&[u8]]; 3] = [&[ARRAY], &[MAP], &[ARRAY, MAP]];
    for kinds in kinds {
        assert_eq!(validate(&nested(MAX_DEPTH, kinds)), Ok(()));
        for depth in [MAX_DEPTH + 1, 1_024, 100_000, 300_000] {
            assert_eq!(validate(&nested(depth, kinds)), Err(MsgpackError::TooDeep));
        }
    }
    // An empty array is as deep as a full one.
    let mut deep = nested(MAX_DEPTH, &[ARRAY]);
    deep[MAX_DEPTH] = 0x90;
    assert_eq!(validate(&deep), Err(MsgpackError::TooDeep));
}

#[test]
fn depth_is_counted_again_after_leaving_an_array() {
    let deep = nested(MAX_DEPTH - 1, &[ARRAY, MAP]);
    let bytes = [&[0x93][..], &deep, &deep, &deep].concat();
    assert_eq!(validate(&bytes), Ok(()));
}

#[test]
fn refuses_elements_above_the_limit() {
    let array = |len: usize, item: &[u8]| {
        let mut bytes = vec![0xdd];
        bytes.extend_from_slice(&u32::try_from(len).expect("short").to_be_bytes());
        bytes.extend_from_slice(&item.repeat(len));
        bytes
    };
    // The array itself counts.
    assert_eq!(validate(&array(MAX_ELEMENTS - 1, &[NIL])), Ok(()));
    assert_eq!(
        validate(&array(MAX_ELEMENTS, &[NIL])),
        Err(MsgpackError::TooManyElements)
    );
    // Keys and values count, and so do the arrays and maps inside.
    assert_eq!(validate(&array(21_845, &[0x81, 0, 0])), Ok(()));
    assert_eq!(
        validate(&array(21_846, &[0x81, 0, 0])),
        Err(MsgpackError::TooManyElements)
    );
    assert_eq!(validate(&array(32_767, &[0x91, 0])), Ok(()));
    assert_eq!(
        validate(&array(32_768, &[0x91, 0])),
        Err(MsgpackError::TooManyElements)
    );
    for item in [&[NIL][..], &[0x91, NIL], &[0x80], &[0xa1, b'a']] {
        let bytes = array((1 << 20) / item.len(), item);
        assert_eq!(validate(&bytes), Err(MsgpackError::TooManyElements));
    }
    // A megabyte of bare nils is one value and a tail.
    assert_eq!(
        validate(&[NIL; 1 << 20]),
        Err(MsgpackError::Trailing((1 << 20) - 1))
    );
}

#[test]
fn shape_tightens_the_limits_and_cannot_loosen_the_depth() {
    let shape = |depth, elements| Shape { depth, elements };
    let bytes = [0x92, 0x91, NIL, NIL];
    assert_eq!(validate_within(&bytes, shape(2, 4)), Ok(()));
    assert_eq!(
        validate_within(&bytes, shape(1, 4)),
        Err(MsgpackError::TooDeep)
    );
    assert_eq!(
        validate_within(&bytes, shape(2, 3)),
        Err(MsgpackError::TooManyElements)
    );
    assert_eq!(validate_within(&[NIL], shape(0, 1)), Ok(()));
    assert_eq!(
        validate_within(&[NIL], shape(0, 0)),
        Err(MsgpackError::TooManyElements)
    );
    let deep = nested(MAX_DEPTH + 1, &[ARRAY]);
    assert_eq!(
        validate_within(&deep, shape(100, 100)),
        Err(MsgpackError::TooDeep)
    );
}

#[test]
fn refuses_text_that_is_not_utf8_as_value_and_as_key() {
    for bytes in [
        &[0xa1, 0xff][..],
        &[0x81, 0xa2, 0xc3, 0x28, NIL],
        &[0xd9, 3, 0xed, 0xa0, 0x80],
    ] {
        assert_eq!(validate(bytes), Err(MsgpackError::Utf8));
    }
    assert_eq!(validate(&[0xc4, 1, 0xff]), Ok(()));
}

/// `{"k": value}`
fn one(value: &[u8]) -> Vec<u8> {
    [&[0x81, 0xa1, b'k'], value].concat()
}

#[test]
fn reads_each_type_of_field() {
    let map = [
        &[0x89][..],
        &[0xa1, b's', 0xa2, b'h', b'i'],
        &[
            0xa1, b'u', 0xcf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        ],
        &[0xa1, b'i', 0xd3, 0x80, 0, 0, 0, 0, 0, 0, 0],
        &[0xa1, b'b', 0xc4, 2, 1, 2],
        &[0xa1, b't', 0xc3],
        &[0xa1, b'm', 0x81, 0xa1, b'x', 0x07],
        &[0xa1, b'a', 0x92, 0x01, 0x91, 0xc4, 1, 9],
        &[0xa1, b'n', NIL],
        &[0xa1, b'f', 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    let fields = Fields::parse(&map).expect("a map");
    assert_eq!(fields.str("s"), Ok("hi"));
    assert_eq!(fields.u64("u"), Ok(u64::MAX));
    assert_eq!(fields.i64("i"), Ok(i64::MIN));
    assert_eq!(fields.bin("b"), Ok(&[1, 2][..]));
    assert_eq!(fields.bool("t"), Ok(true));
    assert_eq!(fields.map("m").and_then(|map| map.u64("x")), Ok(7));
    let mut array = fields.array("a").expect("an array");
    assert_eq!(array.remaining(), 2);
    assert_eq!(array.next_u64(), Ok(1));
    let mut inner = array.next_array().expect("an array");
    assert_eq!(inner.next_bin(), Ok(&[9][..]));
    assert_eq!(inner.next_bin(), Err(FieldError::Length("a")));
    assert_eq!((inner.finish(), array.finish()), (Ok(()), Ok(())));
    assert_eq!(fields.raw("f").map(<[u8]>::len), Some(9));
    assert_eq!(fields.raw("n"), Some(&[NIL][..]));
    assert_eq!(fields.raw("z"), None);
}

#[test]
fn nil_and_absent_are_none_if_optional_and_missing_if_not() {
    let map = one(&[NIL]);
    let fields = Fields::parse(&map).expect("a map");
    assert_eq!(fields.opt_str("k"), Ok(None));
    assert_eq!(fields.opt_u64("k"), Ok(None));
    assert_eq!(fields.opt_i64("z"), Ok(None));
    assert_eq!(fields.opt_bin("z"), Ok(None));
    assert_eq!(fields.opt_bool("z"), Ok(None));
    assert!(matches!(fields.opt_map("z"), Ok(None)));
    assert!(matches!(fields.opt_array("z"), Ok(None)));
    assert_eq!(fields.str("k"), Err(FieldError::Missing("k")));
    assert_eq!(fields.u64("z"), Err(FieldError::Missing("z")));
}

#[test]
fn types_are_exact() {
    /// Which of the readers accept a value: str, u64, i64, bin, bool, map, array.
    fn accepted(value: &[u8]) -> [bool; 7] {
        let map = one(value);
        let fields = Fields::parse(&map).expect("a map");
        [
            fields.str("k").is_ok(),
            fields.u64("k").is_ok(),
            fields.i64("k").is_ok(),
            fields.bin("k").is_ok(),
            fields.bool("k").is_ok(),
            fields.map("k").is_ok(),
            fields.array("k").is_ok(),
        ]
    }
    let y = true;
    let n = false;
    let max = [0xff; 8];
    for (value, expected) in [
        (&[0xa1, b'a'][..], [y, n, n, n, n, n, n]),
        (&[0xc4, 1, b'a'], [n, n, n, y, n, n, n]),
        (&[0x05], [n, y, y, n, n, n, n]),
        // A signed marker with a value that is not negative is the same integer.
        (&[0xd0, 0x05], [n, y, y, n, n, n, n]),
        (&[0xd0, 0xff], [n, n, y, n, n, n, n]),
        (&[0xff], [n, n, y, n, n, n, n]),
        // 2^63 and 2^64 - 1
        (&[0xcf, 0x80, 0, 0, 0, 0, 0, 0, 0], [n, y, n, n, n, n, n]),
        (&[&[0xcf][..], &max].concat(), [n, y, n, n, n, n, n]),
        // 1.0, NaN, infinity
        (&[0xca, 0x3f, 0x80, 0, 0], [n; 7]),
        (&[0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0], [n; 7]),
        (&[0xcb, 0x7f, 0xf8, 0, 0, 0, 0, 0, 0], [n; 7]),
        (&[0xca, 0x7f, 0x80, 0, 0], [n; 7]),
        (&[0xc2], [n, n, n, n, y, n, n]),
        (&[0x80], [n, n, n, n, n, y, n]),
        (&[0x90], [n, n, n, n, n, n, y]),
        (&[0xd6, 0xff, 0, 0, 0, 0], [n; 7]),
    ] {
        assert_eq!(accepted(value), expected, "{value:02x?}");
    }
    let map = one(&[0xc4, 1, b'a']);
    let error = Fields::parse(&map).expect("a map").str("k");
    assert_eq!(
        error.expect_err("binary").to_string(),
        r#"wrong type for key "k": expected string"#
    );
}

#[test]
fn refuses_maps_that_are_not_of_the_protocol() {
    let parse = |bytes: &[u8]| Fields::parse(bytes).map(|_| ());
    assert_eq!(parse(&[NIL]), Err(FieldError::NotAMap));
    assert_eq!(parse(&[0x90]), Err(FieldError::NotAMap));
    assert_eq!(parse(&[0x81, 0x01, NIL]), Err(FieldError::KeyNotString));
    assert_eq!(
        parse(&[0x81, 0xc4, 1, b'a', NIL]),
        Err(FieldError::KeyNotString)
    );
    let twice = [0x83, 0xa1, b'a', 1, 0xa1, b'b', 2, 0xd9, 1, b'a', 3];
    assert_eq!(parse(&twice), Err(FieldError::Duplicate("a".into())));
    assert_eq!(parse(&[0x80, NIL]), Err(MsgpackError::Trailing(1).into()));
    assert_eq!(
        parse(&[0x81, 0xa1, b'a', 0xc1]),
        Err(MsgpackError::ReservedByte.into())
    );
    let keys = |len: u8| {
        let pairs = (0..len).flat_map(|key| [0xa1, b'A' + key, NIL]);
        [0xde, 0, len].into_iter().chain(pairs).collect::<Vec<u8>>()
    };
    assert_eq!(parse(&keys(32)), Ok(()));
    assert_eq!(parse(&keys(33)), Err(FieldError::TooManyKeys));
}

#[test]
fn unknown_keys_are_named_and_cut_short() {
    let map = [
        &[0x82, 0xa1, b'a', NIL, 0xd9, 200][..],
        &[b'x'; 200],
        &[NIL],
    ]
    .concat();
    let fields = Fields::parse(&map).expect("a map");
    assert_eq!(fields.only(&["a", &"x".repeat(200)]), Ok(()));
    assert_eq!(
        fields.only(&["a"]),
        Err(FieldError::Unknown("x".repeat(64)))
    );
}

#[test]
fn debug_prints_keys_and_no_values() {
    let map = [0x81, 0xa5, b't', b'o', b'k', b'e', b'n', 0xa2, b'h', b'i'];
    let fields = Fields::parse(&map).expect("a map");
    assert_eq!(format!("{fields:?}"), r#"Fields["token"]"#);
}

/// The same rules read from the specification once more, by recursion and with no care for speed.
fn naive<'a>(bytes: &'a [u8], depth: usize, elements: &mut usize) -> Option<&'a [u8]> {
    *elements += 1;
    let (&marker, mut rest) = bytes.split_first()?;
    let mut number = |size: usize| {
        let (number, after) = rest.split_at_checked(size)?;
        rest = after;
        Some(
            number
                .iter()
                .fold(0, |sum, byte| (sum << 8) | usize::from(*byte)),
        )
    };
    let (text, fixed, inside) = match marker {
        0x00..=0x7f | 0xc0 | 0xc2 | 0xc3 | 0xe0..=0xff => (false, 0, None),
        0xcc | 0xd0 => (false, 1, None),
        0xcd | 0xd1 => (false, 2, None),
        0xca | 0xce | 0xd2 => (false, 4, None),
        0xcb | 0xcf | 0xd3 => (false, 8, None),
        0xa0..=0xbf => (true, usize::from(marker & 31), None),
        0xd9..=0xdb => (true, number(1 << (marker - 0xd9))?, None),
        0xc4..=0xc6 => (false, number(1 << (marker - 0xc4))?, None),
        0xd4..=0xd8 | 0xc7..=0xc9 => {
            let len = match marker {
                0xd4.. => 1 << (marker - 0xd4),
                _ => number(1 << (marker - 0xc7))?,
            };
            if number(1)? != 0xff || ![4, 8, 12].contains(&len) {
                return None;
            }
            (false, len, None)
        }
        0x90..=0x9f => (false, 0, Some(usize::from(marker & 15))),
        0xdc | 0xdd => (false, 0, Some(number(2 << (marker - 0xdc))?)),
        0x80..=0x8f => (false, 0, Some(usize::from(marker & 15) * 2)),
        0xde | 0xdf => (false, 0, Some(number(2 << (marker - 0xde))? * 2)),
        0xc1 => return None,
    };
    let (data, mut rest) = rest.split_at_checked(fixed)?;
    if text && str::from_utf8(data).is_err() {
        return None;
    }
    if let Some(inside) = inside {
        if depth == MAX_DEPTH {
            return None;
        }
        for _ in 0..inside {
            rest = naive(rest, depth + 1, elements)?;
        }
    }
    Some(rest)
}

fn naive_accepts(bytes: &[u8]) -> bool {
    let mut elements = 0;
    naive(bytes, 0, &mut elements) == Some(&[]) && elements <= MAX_ELEMENTS
}

fn agrees(bytes: &[u8]) {
    let accepted = validate(bytes).is_ok();
    assert_eq!(accepted, naive_accepts(bytes), "{bytes:02x?}");
    if accepted {
        rmp_serde::from_slice::<IgnoredAny>(bytes).expect("serde can skip what is accepted");
    }
    if let Ok(fields) = Fields::parse(bytes) {
        assert!(accepted);
        // Readers of whatever type never panic.
        let key = "a";
        let _ = (
            fields.opt_str(key),
            fields.opt_u64(key),
            fields.opt_i64(key),
        );
        let _ = (
            fields.opt_bin(key),
            fields.opt_bool(key),
            fields.opt_map(key),
        );
        if let Ok(Some(mut array)) = fields.opt_array(key) {
            while array.remaining() > 0 && (array.next_u64().is_ok() || array.next_array().is_ok())
            {
            }
        }
    }
}

/// Valid MessagePack of any kind, written without the code under test.
fn any_value() -> impl Strategy<Value = Vec<u8>> {
    let leaf = prop_oneof![
        any::<u64>().prop_map(|int| rmp_serde::to_vec(&int)),
        any::<i64>().prop_map(|int| rmp_serde::to_vec(&int)),
        any::<f64>().prop_map(|float| rmp_serde::to_vec(&float)),
        any::<Option<bool>>().prop_map(|bool| rmp_serde::to_vec(&bool)),
        ".{0,40}".prop_map(|text| rmp_serde::to_vec(&text)),
        prop::collection::vec(any::<u8>(), 0..300)
            .prop_map(|bin| rmp_serde::to_vec(serde_bytes::Bytes::new(&bin))),
    ]
    .prop_map(|bytes| bytes.expect("serializes"));
    leaf.prop_recursive(6, 200, 20, |inner| {
        let joined = |head: fn(&mut Vec<u8>, u32), per: usize, values: Vec<Vec<u8>>| {
            let len = values.len() / per;
            let mut bytes = Vec::new();
            head(&mut bytes, u32::try_from(len).expect("short"));
            bytes.extend(values.into_iter().take(len * per).flatten());
            bytes
        };
        let array = |bytes: &mut Vec<u8>, len| {
            rmp::encode::write_array_len(bytes, len).expect("a vector takes it");
        };
        let map = |bytes: &mut Vec<u8>, len| {
            rmp::encode::write_map_len(bytes, len).expect("a vector takes it");
        };
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..20)
                .prop_map(move |values| joined(array, 1, values)),
            prop::collection::vec(inner, 0..40).prop_map(move |values| joined(map, 2, values)),
        ]
    })
}

proptest! {
    #[test]
    fn accepts_any_value(bytes in any_value()) {
        prop_assert_eq!(validate(&bytes), Ok(()));
        agrees(&bytes);
    }

    #[test]
    fn agrees_about_spoiled_values(
        mut bytes in any_value(),
        spoil in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        for (at, byte) in spoil {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        agrees(&bytes);
        agrees(&bytes[..cut.index(bytes.len())]);
    }

    #[test]
    fn agrees_about_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        agrees(&bytes);
    }

    #[test]
    fn agrees_about_small_numbers_and_heads(
        bytes in prop::collection::vec(prop_oneof![0_u8..4, 0x80_u8..0xa4, 0xc0_u8..=0xff], 0..60),
    ) {
        agrees(&bytes);
    }

    #[test]
    fn reads_the_fields_that_were_written(
        map in prop::collection::btree_map("[a-z]{1,8}", any::<u64>(), 0..32),
    ) {
        let bytes = rmp_serde::to_vec(&map).expect("serializes");
        let fields = Fields::parse(&bytes).expect("a map");
        let mut read = BTreeMap::new();
        for (key, value) in &fields.entries {
            read.insert((*key).to_owned(), as_u64("k", value).expect("an integer"));
        }
        prop_assert_eq!(read, map);
    }
}
