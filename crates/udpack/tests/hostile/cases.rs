//! The table: what a hostile peer says, and what must come of it.

use udpack::CloseCode;

use crate::bare::{Value, event, frame, frame_of, hello, map, open, request};
use crate::common::TOKEN;
use crate::watch::MARK;

/// One thing a peer does.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// A new stream; the acts that follow are on it.
    Stream,
    /// `$hello` on a new stream, then `$welcome` is awaited.
    Hello,
    /// A new stream with an `$open` of this name.
    Open(&'static str),
    /// Back to the control stream.
    Control,
    Send(Vec<u8>),
    /// One byte at a time, 40 ms apart.
    Dribble(Vec<u8>),
    /// Reads one message of the server's.
    Read,
    Fin,
    Reset(u32),
    Stop(u32),
}

/// What must come of it.
#[derive(Debug, Clone)]
pub(crate) enum Expect {
    /// The connection is closed with this code and a text. Unless it was admitted, nothing else was said.
    Socket(CloseCode),
    /// The stream gets `$close`, FIN and STOP_SENDING with this code; the connection lives.
    Channel(CloseCode),
    /// The server's direction ends in order; the connection lives.
    Fin,
    /// The server's direction is reset with this code; the connection lives.
    Reset(u64),
    /// The server has given the channel up; the connection lives.
    Gone,
    /// Request 7 gets this fault; the channel lives.
    Fault(&'static str),
    /// Nothing happens: the channel lives.
    Lives,
    /// As `Lives`, and the first answer says these bytes back.
    Echoes(Vec<u8>),
    /// `$welcome`, and channels work.
    Admitted,
}

pub(crate) struct Case {
    /// Row of the checklist and what is done.
    pub(crate) name: String,
    pub(crate) acts: Vec<Act>,
    pub(crate) expect: Expect,
}

use Act::{Control, Dribble, Fin, Hello, Open, Read, Reset, Send, Stop, Stream};

fn case(name: impl Into<String>, acts: Vec<Act>, expect: Expect) -> Case {
    Case {
        name: name.into(),
        acts,
        expect,
    }
}

/// These bytes are the first on the control stream.
fn first(name: &str, bytes: Vec<u8>, expect: Expect) -> Case {
    case(name, vec![Stream, Send(bytes)], expect)
}

/// These bytes follow the hello on the control stream.
fn control(name: &str, bytes: Vec<u8>, code: CloseCode) -> Case {
    case(name, vec![Hello, Send(bytes)], Expect::Socket(code))
}

/// These bytes follow the `$open` of an echo channel.
fn echo(name: &str, bytes: Vec<u8>, expect: Expect) -> Case {
    case(name, vec![Hello, Open("echo"), Send(bytes)], expect)
}

/// A message that no channel accepts.
fn refused(name: &str, bytes: Vec<u8>, code: CloseCode) -> Case {
    echo(name, bytes, Expect::Channel(code))
}

/// A new channel begins with these bytes.
fn opening(name: &str, bytes: Vec<u8>, code: CloseCode) -> Case {
    let acts = vec![Hello, Stream, Send(bytes)];
    case(name, acts, Expect::Channel(code))
}

fn uint(value: u64) -> Value {
    Value::Uint(value)
}

fn raw(bytes: &[u8]) -> Value {
    Value::Raw(bytes.to_vec())
}

/// `[event, data]` with the bytes of the data as they are.
fn data(bytes: &[u8]) -> Vec<u8> {
    event("say", raw(bytes))
}

/// The two fields every `$hello` has, then `more`.
fn hello_with<const N: usize>(more: [(&str, Value); N]) -> Vec<u8> {
    let mut fields = vec![
        ("v".into(), uint(1)),
        ("token".into(), TOKEN.into()),
        ("agent".into(), "bare".into()),
    ];
    fields.extend(more.map(|(key, value)| (key.into(), value)));
    event("$hello", Value::Map(fields))
}

/// A `$hello` with these fields alone.
fn hello_of<const N: usize>(fields: [(&str, Value); N]) -> Vec<u8> {
    event("$hello", map(fields))
}

/// What resumes a session: its id and a token, of so many letters and bytes.
fn ticket(session: usize, token: usize) -> Value {
    map([
        ("session", Value::Str("0".repeat(session))),
        ("token", Value::Bin(vec![7; token])),
    ])
}

/// A sound hello, however long: the agent fills it up to a body of this many bytes.
fn hello_of_length(length: usize) -> Vec<u8> {
    let with = |agent: usize| {
        hello_of([
            ("v", uint(1)),
            ("token", TOKEN.into()),
            ("agent", Value::Str("x".repeat(agent))),
        ])
    };
    let short = with(1000).len() - 4;
    let exact = with(1000 + length - short);
    assert_eq!(exact.len() - 4, length);
    exact
}

/// Numbers that look random and are the same in every run.
pub(crate) fn noise(mut seed: u64, length: usize) -> Vec<u8> {
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

pub(crate) fn all() -> Vec<Case> {
    [
        handshake(),
        admission_fields(),
        after_admission(),
        framing(),
        msgpack(),
        messages(),
        handlers(),
        channels(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// 2a: before and instead of a sound hello.
fn handshake() -> Vec<Case> {
    let sound = hello(TOKEN);
    let socket = Expect::Socket;
    let wrong = |text: &str| hello(&format!("{MARK}{text}"));
    let mut cases = vec![
        case("A1 silence", vec![], socket(CloseCode::AUTH_TIMEOUT)),
        first(
            "A1 half a prefix",
            sound[..2].to_vec(),
            socket(CloseCode::AUTH_TIMEOUT),
        ),
        first(
            "A1 half a hello",
            sound[..30].to_vec(),
            socket(CloseCode::AUTH_TIMEOUT),
        ),
        case(
            "A1 a hello of one byte each 40 ms",
            vec![Stream, Dribble(sound.clone())],
            socket(CloseCode::AUTH_TIMEOUT),
        ),
        case(
            "A1 the hello on the second stream",
            vec![Stream, Stream, Send(sound.clone())],
            socket(CloseCode::AUTH_TIMEOUT),
        ),
        case(
            "A2 a channel and its data, no hello",
            vec![
                Stream,
                Stream,
                Send(open(1, "echo")),
                Send(event("say", Value::Nil)),
            ],
            socket(CloseCode::AUTH_TIMEOUT),
        ),
        case(
            "A2 early channels that use up the window",
            vec![
                Stream,
                Stream,
                Send(vec![0; 16 << 10]),
                Control,
                Send(sound.clone()),
            ],
            socket(CloseCode::AUTH_TIMEOUT),
        ),
        case(
            "A3 early data behind a wrong token",
            vec![
                Stream,
                Send(wrong("")),
                Stream,
                Send(open(1, "echo")),
                Send(event("say", Value::Nil)),
            ],
            socket(CloseCode::AUTH_FAILED),
        ),
        case(
            "A2 end at once",
            vec![Stream, Fin],
            socket(CloseCode::TRUNCATED),
        ),
        case(
            "A2 end inside the prefix",
            vec![Stream, Send(sound[..3].to_vec()), Fin],
            socket(CloseCode::TRUNCATED),
        ),
        case(
            "A2 end inside the hello",
            vec![Stream, Send(sound[..20].to_vec()), Fin],
            socket(CloseCode::TRUNCATED),
        ),
        case(
            "A2 reset instead of a hello",
            vec![Stream, Send(sound[..20].to_vec()), Reset(0xf0)],
            socket(CloseCode::TRUNCATED),
        ),
        case(
            "A2 the answer is refused before it is given",
            vec![Stream, Stop(0xf0), Send(sound.clone())],
            socket(CloseCode::PROTOCOL_ORDER),
        ),
        first(
            "F1 length 0 before the hello",
            vec![0; 4],
            socket(CloseCode::BAD_FRAME),
        ),
        first(
            "F2 16 KiB and 1 byte before the hello",
            (16_385_u32).to_be_bytes().to_vec(),
            socket(CloseCode::FRAME_TOO_LARGE),
        ),
        first(
            "F4 0xff before the hello",
            vec![0xff; 64],
            socket(CloseCode::FRAME_TOO_LARGE),
        ),
        first(
            "F4 HTTP",
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
            socket(CloseCode::FRAME_TOO_LARGE),
        ),
        first(
            "M6 0xc1 before the hello",
            frame(&[0xc1]),
            socket(CloseCode::BAD_MSGPACK),
        ),
        first(
            "M1 depth 10,000 before the hello",
            frame(&[vec![0x91; 10_000], vec![0xc0]].concat()),
            socket(CloseCode::BAD_MSGPACK),
        ),
        first(
            "M4 nil before the hello",
            frame(&[0xc0]),
            socket(CloseCode::BAD_MESSAGE),
        ),
        first(
            "M7 bytes behind the hello, in its frame",
            frame(&[&sound[4..], &[0xc0]].concat()),
            socket(CloseCode::BAD_MSGPACK),
        ),
        first("A3 wrong token", wrong(""), socket(CloseCode::AUTH_FAILED)),
        first(
            "A3 a token and one letter",
            hello(&format!("{TOKEN}x")),
            socket(CloseCode::AUTH_FAILED),
        ),
        first(
            "A3 a token less one letter",
            hello(&TOKEN[..TOKEN.len() - 1]),
            socket(CloseCode::AUTH_FAILED),
        ),
        first("A4 empty token", hello(""), socket(CloseCode::AUTH_FAILED)),
        first(
            "A4 NUL in the token",
            wrong("\0"),
            socket(CloseCode::AUTH_FAILED),
        ),
        first(
            "A4 new line in the token",
            wrong("\n\r\n"),
            socket(CloseCode::AUTH_FAILED),
        ),
        first(
            "A4 token of 512 bytes",
            wrong(&"x".repeat(506)),
            socket(CloseCode::AUTH_FAILED),
        ),
        first(
            "A4 token of 513 bytes",
            wrong(&"x".repeat(507)),
            socket(CloseCode::FRAME_TOO_LARGE),
        ),
        first(
            "A4 token of 15 KiB",
            wrong(&"x".repeat(15 << 10)),
            socket(CloseCode::FRAME_TOO_LARGE),
        ),
        first(
            "A4 token of 1 MiB",
            wrong(&"x".repeat(1 << 20)),
            socket(CloseCode::FRAME_TOO_LARGE),
        ),
        first(
            "A4 token that is not UTF-8",
            hello_of([
                ("v", uint(1)),
                ("token", raw(b"\xa7s3cret\xff")),
                ("agent", "a".into()),
            ]),
            socket(CloseCode::BAD_MSGPACK),
        ),
        first(
            "A2 hello of 16 KiB",
            hello_of_length(16 << 10),
            Expect::Admitted,
        ),
    ];
    for (name, bytes) in [
        ("an event", event("say", "hi".into())),
        ("a request", request("say", "hi".into(), uint(1))),
        ("$open", open(1, "echo")),
        ("$welcome", event("$welcome", map([("v", uint(1))]))),
        (
            "$close",
            event("$close", map([("code", uint(0)), ("text", "".into())])),
        ),
        ("$goaway", event("$goaway", Value::Nil)),
        ("$reply", request("$reply", Value::Nil, uint(1))),
        ("$HELLO", event("$HELLO", map([("v", uint(1))]))),
    ] {
        let name = format!("A2 {name} instead of the hello");
        cases.push(first(&name, bytes, socket(CloseCode::AUTH_REQUIRED)));
    }
    cases
}

/// 2a, A5: fields of the hello.
fn admission_fields() -> Vec<Case> {
    let token = || ("token", Value::from(TOKEN));
    let agent = || ("agent", Value::from("bare"));
    let version = |v: Value| hello_of([("v", v), token(), agent()]);
    let mut cases = Vec::new();
    for (name, bytes) in [
        (
            "an unknown key",
            hello_with([("admin", Value::Raw(vec![0xc3]))]),
        ),
        ("the token twice", hello_with([token()])),
        (
            "a key that is a number",
            event("$hello", Value::Map(vec![(uint(1), uint(1))])),
        ),
        (
            "a binary token",
            hello_of([("v", uint(1)), ("token", Value::Bin(TOKEN.into())), agent()]),
        ),
        (
            "a number for a token",
            hello_of([("v", uint(1)), ("token", uint(7)), agent()]),
        ),
        (
            "nil for a token",
            hello_of([("v", uint(1)), ("token", Value::Nil), agent()]),
        ),
        ("no token", hello_of([("v", uint(1)), agent()])),
        ("no agent", hello_of([("v", uint(1)), token()])),
        (
            "a number for an agent",
            hello_of([("v", uint(1)), token(), ("agent", uint(1))]),
        ),
        ("no version", hello_of([token(), agent()])),
        ("version 1.0", version(Value::Float(1.0))),
        ("version \"1\"", version("1".into())),
        ("version -1", version(Value::Int(-1))),
        (
            "an array",
            event(
                "$hello",
                Value::Array(vec![uint(1), TOKEN.into(), "bare".into()]),
            ),
        ),
        ("nil", event("$hello", Value::Nil)),
        (
            "an id",
            request("$hello", map([("v", uint(1)), token(), agent()]), uint(1)),
        ),
        ("a number for limits", hello_with([("limits", uint(1))])),
        (
            "an unknown limit",
            hello_with([("limits", map([("memory", uint(1))]))]),
        ),
        (
            "a negative limit",
            hello_with([("limits", map([("frame", Value::Int(-5))]))]),
        ),
        (
            "frames of 1 byte",
            hello_with([("limits", map([("frame", uint(1))]))]),
        ),
        (
            "frames of 4,095 bytes",
            hello_with([("limits", map([("frame", uint(4_095))]))]),
        ),
        ("the version twice", {
            hello_of([("v", uint(1)), ("v", uint(2)), token(), agent()])
        }),
        ("text for resume", hello_with([("resume", "x".into())])),
        (
            "bytes for resume",
            hello_with([("resume", Value::Bin(vec![0; 64]))]),
        ),
        (
            "a short resume token",
            hello_with([("resume", ticket(32, 31))]),
        ),
        ("a long session", hello_with([("resume", ticket(33, 32))])),
        (
            "a session without its token",
            hello_with([("resume", map([("session", "0".repeat(32).as_str().into())]))]),
        ),
        (
            "an unknown key in resume",
            hello_with([("resume", map([("received", uint(1))]))]),
        ),
        (
            "an array for ext",
            hello_with([("ext", Value::Array(vec![]))]),
        ),
    ] {
        let name = format!("A5 {name} in the hello");
        cases.push(first(&name, bytes, Expect::Socket(CloseCode::BAD_MESSAGE)));
    }
    for v in [0, 2, u64::MAX] {
        let name = format!("A5 version {v}");
        cases.push(first(
            &name,
            version(uint(v)),
            Expect::Socket(CloseCode::VERSION),
        ));
    }
    // What else the map holds does not matter.
    for (name, fields) in [
        ("alone", vec![]),
        ("and a key that is a number", vec![(uint(7), uint(1))]),
        ("and a key twice", vec![("a".into(), Value::Nil); 2]),
        (
            "and a token above the limit",
            vec![("token".into(), "x".repeat(600).as_str().into())],
        ),
        (
            "and a binary token",
            vec![("token".into(), raw(b"\xc4\x00"))],
        ),
    ] {
        for v_first in [true, false] {
            let mut fields = fields.clone();
            let at = if v_first { 0 } else { fields.len() };
            fields.insert(at, ("v".into(), uint(2)));
            cases.push(first(
                &format!("A5 version 2 {name}, v first: {v_first}"),
                event("$hello", Value::Map(fields)),
                Expect::Socket(CloseCode::VERSION),
            ));
        }
    }
    for (name, bytes) in [
        (
            "frames of 4,096 bytes",
            hello_with([("limits", map([("frame", uint(4_096))]))]),
        ),
        (
            "anything under ext",
            hello_with([("ext", map([("a", Value::Raw(vec![0x91, 0xc0]))]))]),
        ),
        ("a wish to resume", hello_with([("resume", map([]))])),
        (
            "a resume ticket that nobody gave",
            hello_with([("resume", ticket(32, 32))]),
        ),
        (
            "frames of 0 bytes",
            hello_with([("limits", map([("frame", uint(0))]))]),
        ),
        ("the largest limits", {
            hello_with([(
                "limits",
                map([("frame", uint(u64::MAX)), ("channels", uint(u64::MAX))]),
            )])
        }),
        (
            "an agent that moves the cursor",
            hello_of([
                ("v", uint(1)),
                token(),
                ("agent", "\x1b[2J\n\u{202e}".into()),
            ]),
        ),
    ] {
        cases.push(first(&format!("A5 {name}"), bytes, Expect::Admitted));
    }
    cases
}

/// 2a, A6: the control stream after admission.
fn after_admission() -> Vec<Case> {
    let order = CloseCode::PROTOCOL_ORDER;
    let close = |fields| event("$close", fields);
    vec![
        control("A6 a second hello", hello(TOKEN), order),
        control("A6 a second hello with a wrong token", hello(MARK), order),
        control(
            "A6 an event on the control stream",
            event("say", Value::Nil),
            order,
        ),
        control(
            "A6 a request on the control stream",
            request("say", Value::Nil, uint(1)),
            order,
        ),
        control("A6 $open on the control stream", open(1, "echo"), order),
        control(
            "A6 $welcome from a client",
            event("$welcome", Value::Nil),
            order,
        ),
        control(
            "A6 $goaway from a client",
            event(
                "$goaway",
                map([
                    ("code", uint(1)),
                    ("text", "".into()),
                    ("retry_after_ms", uint(0)),
                    ("window_ms", uint(0)),
                ]),
            ),
            order,
        ),
        case(
            "A6 the control stream ends",
            vec![Hello, Fin],
            Expect::Socket(order),
        ),
        case(
            "A6 the control stream is reset",
            vec![Hello, Reset(0)],
            Expect::Socket(order),
        ),
        control(
            "F1 length 0 on the control stream",
            vec![0; 4],
            CloseCode::BAD_FRAME,
        ),
        control(
            "F2 2^32-1 on the control stream",
            vec![0xff; 4],
            CloseCode::FRAME_TOO_LARGE,
        ),
        control(
            "M6 0xc1 on the control stream",
            frame(&[0xc1]),
            CloseCode::BAD_MSGPACK,
        ),
        control(
            "M4 [] on the control stream",
            frame(&[0x90]),
            CloseCode::BAD_MESSAGE,
        ),
        control(
            "F5 half a frame on the control stream",
            vec![0, 0, 0, 9, 0x92],
            CloseCode::FRAME_TIMEOUT,
        ),
        case(
            "F3 the control stream ends inside a frame",
            vec![Hello, Send(vec![0, 0, 0, 9, 0x92]), Fin],
            Expect::Socket(CloseCode::TRUNCATED),
        ),
        control(
            "M9 $close with a negative code",
            close(map([("code", Value::Int(-1)), ("text", "".into())])),
            CloseCode::BAD_MESSAGE,
        ),
        control(
            "M8 $close with its code twice",
            {
                close(map([
                    ("code", uint(0)),
                    ("text", "".into()),
                    ("code", uint(1)),
                ]))
            },
            CloseCode::BAD_MESSAGE,
        ),
        control(
            "M10 $close with a binary text",
            close(map([("code", uint(0)), ("text", Value::Bin(vec![]))])),
            CloseCode::BAD_MESSAGE,
        ),
        control(
            "A6 $close",
            close(map([("code", uint(0x1234)), ("text", "bye".into())])),
            CloseCode::new(0x1234),
        ),
        control(
            "M9 $close with a code of 2^64-1",
            close(map([("code", uint(u64::MAX)), ("text", "bye".into())])),
            CloseCode::new((1 << 62) - 1),
        ),
    ]
}

/// 2d: frames on an open channel.
fn framing() -> Vec<Case> {
    let say = event("say", Value::Nil);
    let limit = 1_114_112_u32;
    let length = |length: u32| length.to_be_bytes().to_vec();
    let full = {
        // 0x92, "say" in 4 bytes, bin32 with 5 bytes of head.
        let body = vec![0; limit as usize - 10];
        let message = event("say", Value::Bin(body));
        assert_eq!(message.len(), limit as usize + 4);
        message
    };
    let mut cases = vec![
        refused("F1 length 0", vec![0; 4], CloseCode::BAD_FRAME),
        refused(
            "F1 length 0 behind a message",
            [say.clone(), vec![0; 4]].concat(),
            CloseCode::BAD_FRAME,
        ),
        refused("F1 64 zeros", vec![0; 64], CloseCode::BAD_FRAME),
        case(
            "F2 the limit",
            vec![Hello, Open("sink"), Send(full)],
            Expect::Lives,
        ),
        refused(
            "F2 the limit and 1",
            length(limit + 1),
            CloseCode::FRAME_TOO_LARGE,
        ),
        refused("F2 2^31", length(1 << 31), CloseCode::FRAME_TOO_LARGE),
        refused("F2 2^32-1", length(u32::MAX), CloseCode::FRAME_TOO_LARGE),
        case(
            "F3 end between frames",
            vec![Hello, Open("echo"), Send(say.clone()), Fin],
            Expect::Fin,
        ),
        case(
            "F3 end without a message",
            vec![Hello, Open("echo"), Fin],
            Expect::Fin,
        ),
        refused(
            "F4 HTTP",
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            CloseCode::FRAME_TOO_LARGE,
        ),
        refused(
            "F4 SSH",
            b"SSH-2.0-OpenSSH_9.6\r\n".to_vec(),
            CloseCode::FRAME_TOO_LARGE,
        ),
        refused(
            "F4 a TLS record",
            vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc],
            CloseCode::FRAME_TOO_LARGE,
        ),
        refused("F4 all 0xff", vec![0xff; 4096], CloseCode::FRAME_TOO_LARGE),
        refused(
            "F4 a right length and noise",
            frame(&[vec![0xc1], noise(0x9e37_79b9, 511)].concat()),
            CloseCode::BAD_MSGPACK,
        ),
        refused(
            "F5 half a prefix, then silence",
            vec![0, 0],
            CloseCode::FRAME_TIMEOUT,
        ),
        refused(
            "F5 a prefix, then silence",
            length(1 << 20),
            CloseCode::FRAME_TIMEOUT,
        ),
        refused(
            "F5 half a body, then silence",
            say[..6].to_vec(),
            CloseCode::FRAME_TIMEOUT,
        ),
        case(
            "F5 a byte each 40 ms",
            vec![
                Hello,
                Open("echo"),
                Send(length(1000)),
                Dribble(vec![0xc0; 1000]),
            ],
            Expect::Channel(CloseCode::FRAME_TIMEOUT),
        ),
        case(
            "F5 the prefix too slow",
            vec![
                Hello,
                Open("echo"),
                Dribble(length(100)),
                Dribble(vec![0xc0; 100]),
            ],
            Expect::Channel(CloseCode::FRAME_TIMEOUT),
        ),
        case(
            "F7 the peer reads nothing",
            vec![Hello, Open("spam")],
            Expect::Reset(CloseCode::SLOW_PEER.value()),
        ),
    ];
    for (name, part) in [
        ("1 byte of the prefix", 1),
        ("3 bytes of the prefix", 3),
        ("the prefix", 4),
        ("half the body", 6),
        ("all but one byte", say.len() - 1),
    ] {
        cases.push(case(
            format!("F3 end after {name}"),
            vec![Hello, Open("echo"), Send(say[..part].to_vec()), Fin],
            Expect::Channel(CloseCode::TRUNCATED),
        ));
    }
    for seed in 1..=6_u64 {
        // Four zero bytes on top make it a length that is accepted; what follows is no message.
        let mut bytes = vec![0, 0, 1, 0];
        bytes.push(0xc1);
        bytes.extend(noise(seed, 600));
        cases.push(refused(
            &format!("F4 noise {seed}"),
            bytes,
            CloseCode::BAD_MSGPACK,
        ));
    }
    cases
}

/// 2e, M1 to M3, M6 to M8: what is no acceptable msgpack, and what only looks so.
fn msgpack() -> Vec<Case> {
    let nested = |unit: &[u8], times: usize| [unit.repeat(times), vec![0xc0]].concat();
    let many = |count: u32, item: &[u8]| {
        [
            &[0xdd][..],
            &count.to_be_bytes(),
            &item.repeat(count as usize),
        ]
        .concat()
    };
    let key = b"\x81\xa1k";
    let mut cases = Vec::new();
    for (name, bytes) in [
        ("M1 arrays, depth 33", nested(b"\x91", 32)),
        ("M1 arrays, depth 1,024", nested(b"\x91", 1023)),
        ("M1 arrays, depth 100,000", nested(b"\x91", 99_999)),
        ("M1 maps, depth 33", nested(key, 32)),
        ("M1 300,000 maps in each other", nested(key, 300_000)),
        (
            "M1 maps as keys of maps",
            [b"\x81".repeat(40), vec![0xc0; 41]].concat(),
        ),
        (
            "M1 arrays and maps by turns",
            nested(b"\x91\x81\xa1k", 5_000),
        ),
        (
            "M1 array32 in each other",
            nested(b"\xdd\0\0\0\x01", 10_000),
        ),
        ("M2 array32 of 2^32-1", vec![0xdd, 0xff, 0xff, 0xff, 0xff]),
        ("M2 map32 of 2^32-1", vec![0xdf, 0xff, 0xff, 0xff, 0xff]),
        ("M2 str32 of 2^32-1", vec![0xdb, 0xff, 0xff, 0xff, 0xff]),
        ("M2 bin32 of 2^32-1", vec![0xc6, 0xff, 0xff, 0xff, 0xff]),
        (
            "M2 ext32 of 2^32-1",
            vec![0xc9, 0xff, 0xff, 0xff, 0xff, 0x01],
        ),
        ("M2 str8 one byte short", vec![0xd9, 3, b'a', b'b']),
        ("M2 uint64 cut off", vec![0xcf, 0, 0]),
        ("M2 a map without its last value", vec![0x81, 0xc0]),
        ("M3 1 MiB of nil", many(1 << 20, b"\xc0")),
        ("M3 1 MiB of [nil]", many(1 << 19, b"\x91\xc0")),
        ("M3 1 MiB of empty maps", many(1 << 20, b"\x80")),
        ("M3 1 MiB of strings of one byte", many(1 << 19, b"\xa1a")),
        ("M3 65,537 elements", many(65_534, b"\xc0")),
        ("M6 0xc1", vec![0xc1]),
        ("M6 0xc1 in an array", vec![0x92, 0xc0, 0xc1]),
        ("M6 fixext of type 5", vec![0xd4, 5, 0]),
        ("M6 fixext of type -2", vec![0xd6, 0xfe, 0, 0, 0, 0]),
        ("M6 ext8 of no bytes", vec![0xc7, 0, 0xff]),
        (
            "M6 a timestamp of 5 bytes",
            vec![0xc7, 5, 0xff, 0, 0, 0, 0, 0],
        ),
        (
            "M6 a timestamp of 16 bytes",
            [&[0xd8, 0xff][..], &[0; 16]].concat(),
        ),
        ("M7 a byte behind the value", vec![0xc0, 0xc0]),
        ("M5 text that is not UTF-8", vec![0xa2, 0xc3, 0x28]),
        ("M5 an overlong NUL", vec![0xa2, 0xc0, 0x80]),
        ("M5 a surrogate", vec![0xa3, 0xed, 0xa0, 0x80]),
        ("M8 a key that is not UTF-8", vec![0x81, 0xa1, 0xff, 0xc0]),
    ] {
        cases.push(refused(name, data(&bytes), CloseCode::BAD_MSGPACK));
    }
    for (name, bytes) in [
        ("M1 depth 32", nested(b"\x91", 31)),
        ("M3 65,536 elements", many(65_533, b"\xc0")),
        ("M6 a timestamp of 4 bytes", vec![0xd6, 0xff, 0, 0, 0, 1]),
        (
            "M6 a timestamp of 8 bytes",
            [&[0xd7, 0xff][..], &[0; 8]].concat(),
        ),
        (
            "M6 a timestamp of 12 bytes",
            [&[0xc7, 12, 0xff][..], &[0; 12]].concat(),
        ),
        (
            "M8 a key twice, in the application's data",
            b"\x82\xa1k\x01\xa1k\x02".to_vec(),
        ),
        (
            "M8 keys of any type",
            b"\x82\x91\xc0\x01\xc4\x01\x00\x02".to_vec(),
        ),
        (
            "M8 numbers wider than need be",
            vec![0x92, 0xcf, 0, 0, 0, 0, 0, 0, 0, 7, 0xd0, 7],
        ),
        ("M9 NaN", vec![0xcb, 0x7f, 0xf8, 0, 0, 0, 0, 0, 1]),
    ] {
        cases.push(echo(name, data(&bytes), Expect::Echoes(bytes)));
    }
    cases
}

/// 2e, M4, M5, M9, M10: sound msgpack that is no message.
fn messages() -> Vec<Case> {
    let array = |items: Vec<Value>| frame_of(&Value::Array(items));
    let named = |name: Value| array(vec![name, Value::Nil]);
    let with_id = |id: Value| request("say", Value::Nil, id);
    let mut cases = Vec::new();
    for (name, bytes) in [
        ("M4 nil", frame(&[0xc0])),
        ("M4 a number", frame(&[7])),
        ("M4 a map", frame(&[0x81, 0xa1, b'k', 0xc0])),
        ("M4 a string of two letters", frame(b"\xa2ab")),
        ("M4 []", frame(&[0x90])),
        ("M4 [event]", array(vec!["say".into()])),
        (
            "M4 five items",
            array(vec!["say".into(), Value::Nil, uint(1), uint(1), uint(1)]),
        ),
        (
            "M9 a deadline without an id",
            array(vec!["say".into(), Value::Nil, Value::Nil, uint(1)]),
        ),
        (
            "M9 deadline nil",
            array(vec!["say".into(), Value::Nil, uint(1), Value::Nil]),
        ),
        (
            "M9 deadline -1",
            array(vec!["say".into(), Value::Nil, uint(1), Value::Int(-1)]),
        ),
        (
            "M4 ten million items announced, none there",
            frame(&[0x91, 0x90]),
        ),
        ("M9 id nil", with_id(Value::Nil)),
        ("M9 id -1", with_id(Value::Int(-1))),
        ("M9 id 1.0", with_id(Value::Float(1.0))),
        ("M9 id infinite", with_id(Value::Float(f64::INFINITY))),
        ("M10 id text", with_id("1".into())),
        ("M10 id binary", with_id(Value::Bin(vec![1]))),
        ("M5 a number for an event", named(uint(1))),
        ("M10 a binary event", named(Value::Bin(b"say".to_vec()))),
        ("M5 nil for an event", named(Value::Nil)),
        ("M5 an empty event", named("".into())),
        (
            "M5 an event of 129 bytes",
            named(Value::Str("x".repeat(129))),
        ),
        ("M5 an event with a new line", named("a\nb".into())),
        ("M5 an event with an escape", named("\x1b[2J".into())),
        ("M5 an event with NUL", named("a\0".into())),
        ("M5 an event with DEL", named("a\x7f".into())),
        ("M5 an event with a C1 control", named("a\u{85}b".into())),
        (
            "M5 an event of the protocol that does not exist",
            named("$nonsense".into()),
        ),
        ("M5 the event $", named("$".into())),
        ("C6 $reply without an id", event("$reply", Value::Nil)),
        (
            "C6 $fault without an id",
            event("$fault", map([("code", "x".into())])),
        ),
        ("C6 $cancel without an id", event("$cancel", Value::Nil)),
        ("M10 $fault with a binary code", {
            let fields = map([("code", Value::Bin(vec![b'x'])), ("message", "x".into())]);
            request("$fault", fields, uint(1))
        }),
        ("M10 $fault with an empty code", {
            let fields = map([("code", "".into()), ("message", "x".into())]);
            request("$fault", fields, uint(1))
        }),
        ("M10 $fault with a code of 129 bytes", {
            let code = "x".repeat(129);
            let fields = map([("code", code.as_str().into()), ("message", "x".into())]);
            request("$fault", fields, uint(1))
        }),
        ("M10 $fault with a code that moves the cursor", {
            let fields = map([("code", "a\u{1b}[2J".into()), ("message", "x".into())]);
            request("$fault", fields, uint(1))
        }),
        ("M10 $fault with a message of 1,025 bytes", {
            let text = "x".repeat(1025);
            let fields = map([("code", "x".into()), ("message", text.as_str().into())]);
            request("$fault", fields, uint(1))
        }),
        (
            "M9 $fault that is nil",
            request("$fault", Value::Nil, uint(1)),
        ),
        ("M8 $fault with its code twice", {
            let fields = [("code", "x"), ("message", "x"), ("code", "y")];
            request(
                "$fault",
                map(fields.map(|(key, value)| (key, value.into()))),
                uint(1),
            )
        }),
        (
            "C6 $fault without a message",
            request("$fault", map([("code", "x".into())]), uint(1)),
        ),
        ("M8 $close with an unknown key", {
            let fields = map([("code", uint(0)), ("text", "".into()), ("retry", uint(1))]);
            event("$close", fields)
        }),
        ("M9 $close with code 1.0", {
            event(
                "$close",
                map([("code", Value::Float(1.0)), ("text", "".into())]),
            )
        }),
        ("C6 $close that is nil", event("$close", Value::Nil)),
    ] {
        cases.push(refused(name, bytes, CloseCode::BAD_MESSAGE));
    }
    cases.push(refused(
        "M5 an event that is not UTF-8",
        named(raw(b"\xa2\xc3\x28")),
        CloseCode::BAD_MSGPACK,
    ));
    for (name, bytes) in [
        (
            "M5 an event of 128 bytes",
            named(Value::Str("x".repeat(128))),
        ),
        ("M9 id 2^64-1", with_id(uint(u64::MAX))),
        (
            "M9 an id wider than need be",
            frame(b"\x93\xa3say\xc0\xcf\0\0\0\0\0\0\0\x07"),
        ),
        ("B3 an event named close", named("close".into())),
        ("B3 an event named error", named("error".into())),
        (
            "C6 $reply nobody waits for",
            request("$reply", Value::Nil, uint(99)),
        ),
        ("C6 $fault nobody waits for", {
            let fields = map([
                ("code", "x".into()),
                ("message", "x".into()),
                ("more", uint(1)),
            ]);
            request("$fault", fields, uint(99))
        }),
        (
            "C6 $cancel of nothing",
            request("$cancel", Value::Nil, uint(99)),
        ),
    ] {
        cases.push(echo(name, bytes, Expect::Lives));
    }
    cases
}

/// 2e, M11 to M13: what reaches a handler.
fn handlers() -> Vec<Case> {
    let ask = |name: &str, data: Value| request(name, data, uint(7));
    let add = |a: Value, b: Value| ask("add", map([("a", a), ("b", b)]));
    let mut cases = Vec::new();
    for (name, bytes, code) in [
        ("M11 text for a map", ask("add", "x".into()), "bad_payload"),
        ("M11 nil for a map", ask("add", Value::Nil), "bad_payload"),
        (
            "M11 a field short",
            ask("add", map([("a", uint(1))])),
            "bad_payload",
        ),
        (
            "M11 a field twice",
            { ask("add", map([("a", uint(1)), ("a", uint(2)), ("b", uint(1))])) },
            "bad_payload",
        ),
        (
            "M11 an item too many",
            { ask("add", Value::Array(vec![uint(1), uint(2), uint(3)])) },
            "bad_payload",
        ),
        (
            "M9 a negative number",
            add(Value::Int(-1), uint(1)),
            "bad_payload",
        ),
        (
            "M9 a float that is whole",
            add(Value::Float(1.0), uint(1)),
            "bad_payload",
        ),
        (
            "M9 NaN",
            add(Value::Float(f64::NAN), uint(1)),
            "bad_payload",
        ),
        ("M9 2^64-1 and 1", add(uint(u64::MAX), uint(1)), "overflow"),
        (
            "M12 an unknown event",
            ask("nobody", Value::Nil),
            "no_handler",
        ),
        (
            "M12 an event named like a method",
            ask("__proto__", Value::Nil),
            "no_handler",
        ),
        (
            "M13 a handler that panics",
            ask("panic", Value::Nil),
            "internal",
        ),
        ("M13 a handler that fails", ask("fail", Value::Nil), "mine"),
        (
            "M13 a handler that never returns",
            ask("never", Value::Nil),
            "timeout",
        ),
    ] {
        let acts = vec![Hello, Open("typed"), Send(bytes)];
        cases.push(case(name, acts, Expect::Fault(code)));
    }
    for (name, bytes) in [
        (
            "M11 an event with data that does not fit",
            event("add", "x".into()),
        ),
        (
            "M12 an unknown event that asks nothing",
            event("nobody", Value::Nil),
        ),
        (
            "M13 an event whose handler panics",
            event("panic", Value::Nil),
        ),
        (
            "M13 an event whose handler fails",
            event("fail", Value::Nil),
        ),
    ] {
        cases.push(case(
            name,
            vec![Hello, Open("typed"), Send(bytes)],
            Expect::Lives,
        ));
    }
    cases
}

/// 2f: channels as such.
fn channels() -> Vec<Case> {
    let fields = |id: Value, name: Value| event("$open", map([("id", id), ("name", name)]));
    let close = |code: u64| {
        event(
            "$close",
            map([("code", uint(code)), ("text", "bye".into())]),
        )
    };
    let mut cases = vec![
        case(
            "C2 one byte, then silence",
            vec![Hello, Stream, Send(vec![0])],
            Expect::Channel(CloseCode::FRAME_TIMEOUT),
        ),
        case(
            "C2 half an $open, a byte each 40 ms",
            vec![Hello, Stream, Dribble(open(1, "echo")[..25].repeat(3))],
            Expect::Channel(CloseCode::FRAME_TIMEOUT),
        ),
        case("C2 end before $open", vec![Hello, Stream, Fin], {
            Expect::Channel(CloseCode::TRUNCATED)
        }),
        case(
            "C2 end inside $open",
            vec![Hello, Stream, Send(open(1, "echo")[..9].to_vec()), Fin],
            Expect::Channel(CloseCode::TRUNCATED),
        ),
        case(
            "C4 reset before $open",
            vec![Hello, Stream, Send(vec![0]), Reset(9)],
            Expect::Fin,
        ),
        case(
            "C4 reset inside a message",
            {
                vec![
                    Hello,
                    Open("echo"),
                    Send(event("say", Value::Nil)[..6].to_vec()),
                    Reset(0x1001),
                ]
            },
            Expect::Fin,
        ),
        case(
            "C4 reset with a code of nobody",
            {
                vec![
                    Hello,
                    Open("echo"),
                    Send(event("say", Value::Nil)),
                    Read,
                    Reset(0xf2),
                ]
            },
            Expect::Fin,
        ),
        case(
            "C4 stop while the server sends",
            vec![Hello, Open("spam"), Read, Stop(0x1007)],
            Expect::Gone,
        ),
        case(
            "C4 stop and reset at once",
            vec![Hello, Open("spam"), Read, Stop(0x1007), Reset(0x1008)],
            Expect::Gone,
        ),
        case(
            "C4 stop before $open",
            vec![Hello, Stream, Stop(0x1007), Send(open(1, "spam"))],
            Expect::Gone,
        ),
        opening(
            "F1 length 0 instead of $open",
            vec![0; 4],
            CloseCode::BAD_FRAME,
        ),
        opening(
            "F2 2^32-1 instead of $open",
            vec![0xff; 4],
            CloseCode::FRAME_TOO_LARGE,
        ),
        opening(
            "M6 0xc1 instead of $open",
            frame(&[0xc1]),
            CloseCode::BAD_MSGPACK,
        ),
        opening(
            "M4 nil instead of $open",
            frame(&[0xc0]),
            CloseCode::BAD_MESSAGE,
        ),
        opening(
            "C2 an event instead of $open",
            event("say", Value::Nil),
            CloseCode::PROTOCOL_ORDER,
        ),
        opening(
            "C2 $hello instead of $open",
            hello(TOKEN),
            CloseCode::PROTOCOL_ORDER,
        ),
        opening(
            "C2 $close instead of $open",
            close(0),
            CloseCode::PROTOCOL_ORDER,
        ),
        opening(
            "C2 a channel nobody serves",
            open(1, "nowhere"),
            CloseCode::NO_SUCH_CHANNEL,
        ),
        opening(
            "C2 a path for a name",
            open(1, "../echo"),
            CloseCode::NO_SUCH_CHANNEL,
        ),
        refused("C2 $open twice", open(2, "echo"), CloseCode::PROTOCOL_ORDER),
        refused(
            "C2 $hello on a channel",
            hello(TOKEN),
            CloseCode::PROTOCOL_ORDER,
        ),
        echo(
            "C6 $close, then more",
            [close(0), event("say", Value::Nil)].concat(),
            Expect::Fin,
        ),
        echo(
            "C6 $close twice",
            [close(0x1234), close(0x1235)].concat(),
            Expect::Fin,
        ),
        echo("C6 $close with a code of nobody", close(0xf0), Expect::Fin),
        echo("C6 $close with 2^64-1", close(u64::MAX), Expect::Fin),
        case(
            "C6 $close, then a reset",
            vec![Hello, Open("echo"), Send(close(0)), Reset(0x1001)],
            Expect::Fin,
        ),
    ];
    for (name, bytes) in [
        (
            "the id missing",
            event("$open", map([("name", "echo".into())])),
        ),
        ("the name missing", event("$open", map([("id", uint(1))]))),
        ("a negative id", fields(Value::Int(-1), "echo".into())),
        ("id 1.0", fields(Value::Float(1.0), "echo".into())),
        (
            "a binary name",
            fields(uint(1), Value::Bin(b"echo".to_vec())),
        ),
        ("an empty name", fields(uint(1), "".into())),
        ("a reserved name", fields(uint(1), "$control".into())),
        (
            "a name of 129 bytes",
            fields(uint(1), Value::Str("x".repeat(129))),
        ),
        ("a name with an escape", fields(uint(1), "\x1b[2J".into())),
        ("nil", event("$open", Value::Nil)),
        ("its id as a request", {
            request(
                "$open",
                map([("id", uint(1)), ("name", "echo".into())]),
                uint(1),
            )
        }),
        ("an unknown key", {
            event(
                "$open",
                map([("id", uint(1)), ("name", "echo".into()), ("kind", uint(1))]),
            )
        }),
        ("its name twice", {
            event(
                "$open",
                map([
                    ("id", uint(1)),
                    ("name", "echo".into()),
                    ("name", "sink".into()),
                ]),
            )
        }),
    ] {
        cases.push(opening(
            &format!("C2 $open with {name}"),
            bytes,
            CloseCode::BAD_MESSAGE,
        ));
    }
    cases
}
