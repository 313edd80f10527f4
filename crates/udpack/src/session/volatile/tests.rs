use super::*;

fn body(event: &str, key: Option<&str>, seq: u64) -> Bytes {
    let ready = Ready::encode(event, key, &7_u8, 1 << 20).unwrap();
    whole(&ready.front, &ready.place, seq)
}

fn limits(keys: usize, bytes: usize) -> Limits {
    Limits {
        volatile_keys: keys,
        volatile_bytes: bytes,
        ..Limits::default()
    }
}

#[test]
fn the_layout_is_as_specified() {
    assert_eq!(body("at", None, 300)[..], *b"\x93\xa2at\x07\xcd\x01\x2c");
    assert_eq!(body("at", Some("x"), 1)[..], *b"\x94\xa2at\x07\x01\xa1x");
    let read = Volatile::decode(body("at", Some("x"), 1)).unwrap();
    assert_eq!(
        (read.event(), read.key(), read.seq()),
        ("at", Some("x"), Some(1))
    );
    assert_eq!(read.data::<u8>().unwrap(), 7);
    assert_eq!(read.raw()[..], [7]);
    let read = Volatile::decode(Bytes::from_static(b"\x92\xa2at\xc0")).unwrap();
    assert_eq!((read.event(), read.key(), read.seq()), ("at", None, None));
}

#[test]
fn what_breaks_a_rule_is_refused() {
    let refused = |bytes: &'static [u8]| Volatile::decode(Bytes::from_static(bytes)).unwrap_err();
    assert!(matches!(refused(b""), VolatileError::Msgpack(_)));
    assert!(matches!(refused(b"\xc1"), VolatileError::Msgpack(_)));
    assert!(matches!(refused(b"\x92\xa1a"), VolatileError::Msgpack(_)));
    assert!(matches!(
        refused(b"\x92\xa1a\x07\x07"),
        VolatileError::Msgpack(_)
    ));
    assert_eq!(refused(b"\x91\xa1a"), VolatileError::Shape);
    assert_eq!(refused(b"\x95\xa1a\x07\x07\xa1a\x07"), VolatileError::Shape);
    assert_eq!(refused(b"\x07"), VolatileError::Shape);
    assert_eq!(refused(b"\x92\x07\x07"), VolatileError::Event);
    assert_eq!(refused(b"\x92\xa0\x07"), VolatileError::Event);
    assert_eq!(refused(b"\x92\xa2$a\x07"), VolatileError::Event);
    assert_eq!(refused(b"\x93\xa1a\x07\xff"), VolatileError::Seq);
    assert_eq!(refused(b"\x93\xa1a\x07\xa1a"), VolatileError::Seq);
    assert_eq!(
        refused(b"\x94\xa1a\x07\x01\x01"),
        VolatileError::KeyNotString
    );
    assert_eq!(
        refused(b"\x94\xa1a\x07\x01\xa0"),
        VolatileError::Key(NameError::Empty)
    );
    assert_eq!(
        refused(b"\x94\xa1a\x07\x01\xa1\0"),
        VolatileError::Key(NameError::Control('\0'))
    );
}

#[test]
fn what_the_peer_would_refuse_is_not_sent() {
    let send = |event, key, limit| {
        let ready = Ready::encode(event, key, &7_u8, limit);
        ready.and_then(|ready| ready.fits(1, limit)).unwrap_err()
    };
    assert!(matches!(send("$open", None, 100), EncodeError::Reserved(_)));
    assert!(matches!(send("", None, 100), EncodeError::Name(_)));
    assert!(matches!(send("a", Some(""), 100), EncodeError::Name(_)));
    assert!(matches!(
        send("a", Some("key"), 8),
        EncodeError::TooLarge { size: 9, limit: 8 }
    ));
}

#[test]
fn what_is_passed_on_keeps_event_data_and_key_and_gets_a_number_of_its_own() {
    let key = "k".repeat(40);
    let came = Volatile::decode(body("at", Some(&key), 70_000)).unwrap();
    let relayed = Ready::relay(&came).unwrap();
    for seq in [0, 1, 127, 128, 255, 256, 65_535, 65_536, 1 << 32, u64::MAX] {
        let bytes = whole(&relayed.front, &relayed.place, seq);
        assert_eq!(bytes, body("at", Some(&key), seq));
        assert_eq!(bytes.len(), relayed.len(seq));
    }
    // Without a number, as others may send it, and from what was encoded for a channel.
    let bare = Volatile::decode(Bytes::from_static(b"\x92\xa2at\x07")).unwrap();
    let encoded = Encoded::new("at", &7_u8).unwrap();
    for ready in [
        Ready::relay(&bare).unwrap(),
        Ready::of(&encoded, None).unwrap(),
        Ready::of(&Encoded::relay_volatile(&came).unwrap(), None).unwrap(),
    ] {
        assert_eq!(&*ready.place, "at");
        assert_eq!(
            whole(&ready.front, &ready.place, 300),
            body("at", None, 300)
        );
    }
    assert!(Ready::of(&encoded, Some("a\0b")).is_err());
}

#[test]
fn the_newest_of_each_place_waits() {
    let limits = limits(10, 1000);
    let mut out = Out::default();
    let queue = |out: &mut Out, event: &str, key, seq| {
        out.queue(place(event, key), seq, body(event, key, seq), &limits)
    };
    assert_eq!(queue(&mut out, "a", None, 1), 0);
    assert_eq!(queue(&mut out, "b", Some("x"), 2), 0);
    assert_eq!(queue(&mut out, "a", None, 4), 1);
    assert_eq!(
        queue(&mut out, "a", None, 3),
        1,
        "older, though queued later"
    );
    assert_eq!(out.small.len(), 2);
    assert_eq!(out.small.seq("a"), Some(4));

    // A large one keeps its number, and gives way to a newer one.
    let a = place("a", None);
    out.is_large(&a, 3);
    assert_eq!(out.small.len(), 2, "that is not the one that waits");
    out.is_large(&a, 4);
    assert_eq!((out.small.len(), out.large.len()), (1, 1));
    assert_eq!(queue(&mut out, "a", None, 3), 1);
    assert_eq!(out.large.len(), 1);
    assert_eq!(queue(&mut out, "a", None, 5), 1);
    assert_eq!((out.small.len(), out.large.len()), (2, 0));
    assert_eq!(
        out.small.bytes,
        body("a", None, 5).len() + body("b", Some("x"), 2).len()
    );
}

#[test]
fn what_waits_is_bounded() {
    let mut out = Out::default();
    for seq in 1..=100 {
        let event = format!("event {seq}");
        let dropped = out.queue(
            place(&event, None),
            seq,
            Bytes::from(vec![0; 10]),
            &limits(10, 75),
        );
        assert_eq!(dropped, u64::from(seq > 7));
    }
    assert_eq!((out.small.len(), out.small.bytes), (7, 70));
    assert_eq!(out.small.seq("event 94"), Some(94));

    let mut waiting = Waiting::default();
    for seq in 1..=100_u64 {
        let event = format!("event {seq:03}");
        let message = Volatile::decode(body(&event, None, seq)).unwrap();
        waiting.arrived(message, &limits(10, 1000));
        assert!(waiting.latest.len() <= 10);
        assert!(waiting.seen.young.len() + waiting.seen.old.len() <= 20);
    }
    assert_eq!(waiting.latest.pop().unwrap().1.item.event(), "event 091");
    let large = Volatile::decode(body("large", None, 101)).unwrap();
    assert_eq!(waiting.arrived(large, &limits(10, 5)), 1);
}

#[test]
fn what_comes_late_is_dropped() {
    let limits = limits(10, 1000);
    let mut waiting = Waiting::default();
    let mut arrive = |event: &str, key, seq| {
        let message = Volatile::decode(body(event, key, seq)).unwrap();
        waiting.arrived(message, &limits)
    };
    assert_eq!(arrive("a", None, 5), 0);
    assert_eq!(arrive("a", None, 4), 1);
    assert_eq!(arrive("a", None, 5), 1, "the same one again");
    assert_eq!(arrive("a", Some("x"), 4), 0, "another place");
    assert_eq!(arrive("a", None, 6), 1, "takes the place of 5");
    let seqs = std::iter::from_fn(|| waiting.latest.pop()).map(|(_, entry)| entry.item.seq());
    assert_eq!(seqs.collect::<Vec<_>>(), [Some(6), Some(4)]);
}
