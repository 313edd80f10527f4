use serde_json::{Value, json};

use super::*;

fn message(event: ProtocolEvent, data: &Value) -> Message {
    read(&frame(event, data, None).unwrap())
}

fn read(frame: &Bytes) -> Message {
    Message::decode(frame.slice(crate::wire::frame::PREFIX..)).unwrap()
}

/// A frame whose data is a map with a binary value, which JSON cannot say.
fn with_token(event: ProtocolEvent, outer: &Value, inner: &Value, token: &[u8]) -> Message {
    struct Inner<'a>(&'a Value, &'a [u8]);
    impl Serialize for Inner<'_> {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            use serde::ser::SerializeMap;
            let mut map = serializer.serialize_map(None)?;
            for (key, value) in self.0.as_object().unwrap() {
                map.serialize_entry(key, value)?;
            }
            map.serialize_entry("token", &Binary(self.1))?;
            map.end()
        }
    }
    struct Outer<'a>(&'a Value, Inner<'a>);
    impl Serialize for Outer<'_> {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            use serde::ser::SerializeMap;
            let mut map = serializer.serialize_map(None)?;
            for (key, value) in self.0.as_object().unwrap() {
                map.serialize_entry(key, value)?;
            }
            map.serialize_entry("resume", &self.1)?;
            map.end()
        }
    }
    read(&frame(event, &Outer(outer, Inner(inner, token)), None).unwrap())
}

fn rule<T: std::fmt::Debug>(result: Result<T, ControlError>) -> &'static str {
    match result.unwrap_err() {
        ControlError::Value { rule, .. } => rule,
        other => panic!("not about a value: {other}"),
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, ControlError>) -> CloseCode {
    result.unwrap_err().close_code()
}

const SESSION: &str = "00112233445566778899aabbccddeeff";

#[test]
fn hello_says_that_it_can_resume_or_what_it_resumes_or_nothing() {
    for resume in [
        None,
        Some(ResumeRequest { session: None }),
        Some(ResumeRequest {
            session: Some(ResumeTicket {
                session: SESSION.to_owned(),
                token: [7; 32],
            }),
        }),
    ] {
        for follows in [false, true] {
            let frame = encode_hello("t", "a", &Limits::default(), resume.as_ref(), follows);
            let hello = HelloMessage::decode(&read(&frame.unwrap())).unwrap();
            assert_eq!((&hello.resume, hello.follows), (&resume, follows));
        }
    }
}

#[test]
fn hello_with_half_a_ticket_is_refused() {
    let outer = json!({"v": 1, "token": "t", "agent": "a"});
    let with = |inner: Value, token: &[u8]| {
        HelloMessage::decode(&with_token(ProtocolEvent::Hello, &outer, &inner, token))
    };
    assert_eq!(
        rule(with(json!({}), &[7; 32])),
        "resume has a session and its token, or neither"
    );
    assert_eq!(
        rule(with(json!({"session": SESSION}), &[7; 31])),
        "a resume token is 32 bytes"
    );
    assert_eq!(
        rule(with(json!({"session": "00"}), &[7; 32])),
        "session is not 32 hexadecimal digits"
    );
    let alone = json!({"v": 1, "token": "t", "agent": "a", "resume": {"session": SESSION}});
    assert_eq!(
        rule(HelloMessage::decode(&message(ProtocolEvent::Hello, &alone))),
        "resume has a session and its token, or neither"
    );
    for wrong in [json!("x"), json!([]), json!({"more": 1})] {
        let data = json!({"v": 1, "token": "t", "agent": "a", "resume": wrong});
        assert_eq!(
            code(HelloMessage::decode(&message(ProtocolEvent::Hello, &data))),
            CloseCode::BAD_MESSAGE
        );
    }
}

#[test]
fn welcome_tells_how_to_resume_and_why_not() {
    let plain = Welcome {
        session: SESSION.to_owned(),
        agent: "s".to_owned(),
        frame: 4_096,
        channels: 2,
        resumed: false,
        resume: None,
        reason: None,
        expires: None,
        marks: false,
        history: false,
    };
    let grant = ResumeGrant {
        token: [9; 32],
        window: Duration::from_secs(60),
    };
    for welcome in [
        plain.clone(),
        Welcome {
            resumed: true,
            resume: Some(grant.clone()),
            expires: Some(Duration::from_millis(1500)),
            marks: true,
            history: true,
            ..plain.clone()
        },
        Welcome {
            resume: Some(grant),
            reason: Some("expired".to_owned()),
            ..plain
        },
    ] {
        let frame = encode_welcome(&welcome, &Limits::default(), &Timeouts::default()).unwrap();
        assert_eq!(Welcome::decode(&read(&frame)), Ok(welcome));
    }
    let both = json!({
        "v": 1, "session": SESSION, "agent": "s", "limits": {"frame": 4096, "channels": 1},
        "resumed": true, "reason": "expired",
    });
    assert_eq!(
        rule(Welcome::decode(&message(ProtocolEvent::Welcome, &both))),
        "a resumed session has no reason why not"
    );
}

#[test]
fn tokens_are_not_printed() {
    let ticket = ResumeTicket {
        session: SESSION.to_owned(),
        token: [0xab; 32],
    };
    let grant = ResumeGrant {
        token: [0xab; 32],
        window: Duration::ZERO,
    };
    let refresh = Refresh {
        token: "171".to_owned(),
    };
    let shown = format!("{ticket:?} {grant:?} {refresh:?}");
    assert!(!shown.contains("171"), "{shown}");
    assert!(!shown.contains("ab, "), "{shown}");
}

#[test]
fn open_carries_priority_and_what_was_received() {
    let request = |priority, resumable, received| OpenRequest {
        id: 3,
        name: "chat",
        meta: Some("hi"),
        priority,
        resumable,
        received,
        since: &[],
    };
    for (priority, resumable, received) in [
        (Priority::Normal, false, None),
        (Priority::Bulk, true, None),
        (Priority::High, true, Some(0)),
        (Priority::Normal, true, Some(u64::MAX)),
    ] {
        let frame = encode_open(&request(priority, resumable, received), 1024).unwrap();
        let open = Open::decode(&read(&frame)).unwrap();
        assert_eq!(
            (open.priority, open.resumable, open.received),
            (priority, resumable, received)
        );
        assert_eq!((open.id, open.name.as_str()), (3, "chat"));
    }
    let plain = read(&encode_open(&request(Priority::Normal, false, None), 1024).unwrap());
    let keys = plain.data::<Value>().unwrap();
    assert_eq!(
        keys,
        json!({"id": 3, "name": "chat", "meta": "hi"}),
        "defaults are not sent"
    );
}

#[test]
fn open_with_a_strange_priority_or_a_needless_count_is_refused() {
    let open = |more: Value| {
        let mut data = json!({"id": 0, "name": "a"});
        data.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        Open::decode(&message(ProtocolEvent::Open, &data))
    };
    assert_eq!(
        rule(open(json!({"priority": 3}))),
        "a priority is 0, 1 or 2"
    );
    assert_eq!(
        rule(open(json!({"received": 0}))),
        "only a resumable channel can go on"
    );
    assert_eq!(
        rule(open(json!({"received": 0, "resumable": false}))),
        "only a resumable channel can go on"
    );
    assert_eq!(code(open(json!({"priority": -1}))), CloseCode::BAD_MESSAGE);
    assert_eq!(code(open(json!({"resumable": 1}))), CloseCode::BAD_MESSAGE);
}

#[test]
fn resume_and_ack_go_through_unchanged() {
    for resumed in [
        Resumed {
            received: 0,
            done: false,
        },
        Resumed {
            received: u64::MAX,
            done: true,
        },
    ] {
        assert_eq!(
            Resumed::decode(&read(&encode(&resumed).unwrap())),
            Ok(resumed)
        );
    }
    let ack = Ack {
        channel: 9,
        own: true,
        received: 300,
    };
    assert_eq!(Ack::decode(&read(&encode(&ack).unwrap())), Ok(ack));
    for data in [
        json!({"received": 1}),
        json!({"received": 1, "done": 1}),
        json!({"received": -1, "done": true}),
        json!({"received": 1, "done": true, "more": 1}),
    ] {
        assert_eq!(
            code(Resumed::decode(&message(ProtocolEvent::Resume, &data))),
            CloseCode::BAD_MESSAGE
        );
    }
    for data in [
        json!({"channel": 1, "received": 1}),
        json!({"channel": 1, "own": 1, "received": 1}),
        json!({"channel": "1", "own": true, "received": 1}),
    ] {
        assert_eq!(
            code(Ack::decode(&message(ProtocolEvent::Ack, &data))),
            CloseCode::BAD_MESSAGE
        );
    }
}

#[test]
fn a_token_is_refreshed_or_refused() {
    let frame = encode(&Refresh {
        token: "new".to_owned(),
    })
    .unwrap();
    assert_eq!(
        Refresh::decode(&read(&frame)).map(|refresh| refresh.token),
        Ok("new".to_owned())
    );
    let long = encode(&Refresh {
        token: "x".repeat(513),
    })
    .unwrap();
    assert_eq!(
        Refresh::decode(&read(&long)),
        Err(ControlError::TokenTooLong(513))
    );

    for refreshed in [
        Refreshed::Accepted { expires: None },
        Refreshed::Accepted {
            expires: Some(Duration::from_secs(3)),
        },
        Refreshed::Refused {
            code: CloseCode::AUTH_FAILED,
            text: "no".to_owned(),
        },
    ] {
        let frame = encode_refreshed(&refreshed).unwrap();
        assert_eq!(Refreshed::decode(&read(&frame)), Ok(refreshed));
    }
    for data in [
        json!({"code": 1}),
        json!({"text": "no"}),
        json!({"expires_ms": 1, "code": 1, "text": "no"}),
    ] {
        assert_eq!(
            rule(Refreshed::decode(&message(ProtocolEvent::Refreshed, &data))),
            "a refusal is a code and a text, and nothing else"
        );
    }
}

fn gap_frame(room: &str, lost: u64) -> Bytes {
    let room = room.to_owned();
    encode(&Gap {
        room,
        lost,
        missing: None,
    })
    .unwrap()
}

#[test]
fn a_gap_names_a_room_and_at_least_one_message() {
    let frame = gap_frame("lobby", 3);
    let gap = Gap {
        room: "lobby".to_owned(),
        lost: 3,
        missing: None,
    };
    assert_eq!(Gap::decode(&read(&frame)), Ok(gap));
    let bad = |room: &str, lost: u64| rule(Gap::decode(&read(&gap_frame(room, lost))));
    assert_eq!(bad("lobby", 0), "nothing is missing");
    assert_eq!(
        bad("a\nb", 1),
        "a room's name is 1 to 128 bytes without control characters"
    );
    assert_eq!(
        bad("", 1),
        "a room's name is 1 to 128 bytes without control characters"
    );
}

#[test]
fn none_of_them_takes_an_id() {
    let id = |event: ProtocolEvent| {
        let frame = frame(event, &json!({}), Some(1)).unwrap();
        read(&frame)
    };
    assert_eq!(
        rule(Resumed::decode(&id(ProtocolEvent::Resume))),
        "takes no id"
    );
    assert_eq!(rule(Ack::decode(&id(ProtocolEvent::Ack))), "takes no id");
    assert_eq!(
        rule(Refresh::decode(&id(ProtocolEvent::Refresh))),
        "takes no id"
    );
    assert_eq!(
        rule(Refreshed::decode(&id(ProtocolEvent::Refreshed))),
        "takes no id"
    );
    assert_eq!(rule(Gap::decode(&id(ProtocolEvent::Gap))), "takes no id");
}

#[test]
fn every_event_is_found_by_its_name() {
    for event in ProtocolEvent::ALL {
        assert!(event.name().starts_with('$'));
        assert_eq!(ProtocolEvent::named(event.name()), Some(*event));
    }
    for name in ["say", "hello", "$", "$nonsense", "$Hello"] {
        assert_eq!(ProtocolEvent::named(name), None);
    }
}
