//! What hostile pages do, and what each must get.

use bytes::Bytes;
use udpack::CloseCode;

use crate::bare;

/// One thing that a peer does.
pub(crate) enum Act {
    /// A sound control stream.
    Settings,
    /// A request, or what stands in its place.
    Connect(Vec<u8>),
    /// Says what is missing for a session, and reads the answer.
    Session,
    /// A new stream to the server alone.
    Uni(Vec<u8>),
    /// A new stream both ways.
    Bi(Vec<u8>),
    /// A new one of the session.
    Stream(Vec<u8>),
    /// The first stream of all is the present one.
    First,
    /// The request's stream is.
    Request,
    /// More on the present stream.
    More(Vec<u8>),
    /// The same, byte by byte.
    Dribble(Vec<u8>),
    /// The same, so many times.
    Flood(Vec<u8>, usize),
    Fin,
    /// Gives the present stream up, with this code.
    Give(u64),
    Datagram(Vec<u8>),
}

/// What must come of it.
pub(crate) enum Expect {
    /// The connection is closed with this code of HTTP/3.
    Closed(u64),
    /// The request is answered so, and the connection closed.
    Status(&'static [u8]),
    /// The session is closed with this code of the protocol.
    Refused(CloseCode),
    /// The present stream is stopped, and reset, with this code; nothing else ends.
    Stopped(u64),
    /// The server's half of the present stream is reset with this code; nothing else ends.
    Reset(u64),
    /// Nothing: the connection serves.
    Lives,
}

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) acts: Vec<Act>,
    pub(crate) expect: Expect,
}

/// A number of QUIC's variable length.
pub(crate) fn number(value: u64) -> Vec<u8> {
    match value {
        0..=0x3f => vec![value as u8],
        0x40..=0x3fff => (value as u16 | 0x4000).to_be_bytes().to_vec(),
        0x4000..=0x3fff_ffff => (value as u32 | 0x8000_0000).to_be_bytes().to_vec(),
        _ => (value | 0xc000_0000_0000_0000).to_be_bytes().to_vec(),
    }
}

const HUGE: u64 = (1 << 62) - 1;

fn frame(kind: u64, payload: &[u8]) -> Vec<u8> {
    [number(kind), number(payload.len() as u64), payload.to_vec()].concat()
}

/// A frame whose length is a lie.
fn headless(kind: u64, length: u64) -> Vec<u8> {
    [number(kind), number(length)].concat()
}

fn setting(id: u64, value: u64) -> Vec<u8> {
    [number(id), number(value)].concat()
}

fn sound() -> Vec<u8> {
    [setting(0x33, 1), setting(0x2b60_3742, 1)].concat()
}

/// A control stream with these settings.
fn control(settings: &[u8]) -> Vec<u8> {
    [number(0), frame(0x04, settings)].concat()
}

/// A sound control stream.
pub(crate) fn settings() -> Vec<u8> {
    control(&sound())
}

/// A length of QPACK behind these bits.
fn prefixed(out: &mut Vec<u8>, bits: u32, flags: u8, value: usize) {
    let mask = (1_usize << bits) - 1;
    if value < mask {
        out.push(flags | value as u8);
        return;
    }
    out.push(flags | mask as u8);
    let mut rest = value - mask;
    while rest >= 128 {
        out.push(rest as u8 & 0x7f | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// A field section, each field in full.
fn section(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut out = vec![0, 0];
    for (name, value) in fields {
        prefixed(&mut out, 3, 0x20, name.len());
        out.extend_from_slice(name.as_bytes());
        prefixed(&mut out, 7, 0, value.len());
        out.extend_from_slice(value.as_bytes());
    }
    out
}

const FIELDS: [(&str, &str); 5] = [
    (":method", "CONNECT"),
    (":scheme", "https"),
    (":authority", "127.0.0.1:1"),
    (":path", "/udpack"),
    (":protocol", "webtransport"),
];

/// A sound request.
pub(crate) fn connect() -> Vec<u8> {
    frame(0x01, &section(&FIELDS))
}

/// A request in which this field has another value, or is missing.
fn with(name: &str, value: Option<&str>) -> Vec<u8> {
    let mut fields: Vec<_> = FIELDS.into_iter().filter(|(own, _)| *own != name).collect();
    if let Some(value) = value {
        fields.push((name, value));
    }
    frame(0x01, &section(&fields))
}

/// A stream of this session.
pub(crate) fn stream_of(session: u64, bytes: &[u8]) -> Vec<u8> {
    [number(0x41), number(session), bytes.to_vec()].concat()
}

fn uni_of(session: u64, bytes: &[u8]) -> Vec<u8> {
    [number(0x54), number(session), bytes.to_vec()].concat()
}

/// A datagram with this quarter of a session's id.
pub(crate) fn datagram_of(quarter: u64, bytes: &[u8]) -> Bytes {
    [number(quarter), bytes.to_vec()].concat().into()
}

/// The capsule of a close, with a length that may be a lie.
fn close(length: u64, payload: &[u8]) -> Vec<u8> {
    [number(0x2843), number(length), payload.to_vec()].concat()
}

const BAD_REQUEST: &[u8] = &[0x01, 0x04, 0x00, 0x00, 0xff, 0x04];
const FORBIDDEN: &[u8] = &[0x01, 0x04, 0x00, 0x00, 0xff, 0x05];
const NOT_FOUND: &[u8] = &[0x01, 0x03, 0x00, 0x00, 0xdb];

pub(crate) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut case = |name: &str, acts: Vec<Act>, expect: Expect| {
        cases.push(Case {
            name: name.to_owned(),
            acts,
            expect,
        });
    };
    use Act::{
        Bi, Connect, Datagram, Dribble, Fin, First, Flood, Give, More, Request, Session, Settings,
        Stream, Uni,
    };
    use Expect::{Closed, Lives, Refused, Reset, Status, Stopped};

    // The control stream.
    for (name, kind) in [
        ("data", 0x00),
        ("headers", 0x01),
        ("a goaway", 0x07),
        ("grease", 0x21),
        ("a push id", 0x0d),
    ] {
        let bytes = [number(0), frame(kind, b"\0"), frame(0x04, &sound())].concat();
        let name = format!("control begins with {name}");
        case(&name, vec![Uni(bytes), Bi(connect())], Closed(0x10a));
    }
    for id in [0x00, 0x02, 0x03, 0x04, 0x05] {
        let bytes = control(&[sound(), setting(id, 1)].concat());
        case(
            &format!("setting {id} of http/2"),
            vec![Uni(bytes)],
            Closed(0x109),
        );
    }
    let twice = control(&[sound(), setting(0x33, 1)].concat());
    case("a setting twice", vec![Uni(twice)], Closed(0x109));
    let twice = control(&[sound(), setting(0x40, 1), setting(0x40, 1)].concat());
    case("an unknown setting twice", vec![Uni(twice)], Closed(0x109));
    let alone = control(&setting(0x2b60_3742, 1));
    case("no datagrams", vec![Uni(alone)], Closed(0x109));
    let off = control(&[setting(0x33, 0), setting(0x2b60_3742, 1)].concat());
    case("datagrams off", vec![Uni(off)], Closed(0x109));
    case(
        "no webtransport",
        vec![Uni(control(&setting(0x33, 1)))],
        Closed(0x109),
    );
    case("no settings in it", vec![Uni(control(&[]))], Closed(0x109));
    case(
        "settings cut in a setting",
        vec![Uni(control(&sound()[..5]))],
        Closed(0x106),
    );
    case(
        "settings cut in a value",
        vec![Uni(control(&[0x33]))],
        Closed(0x106),
    );
    for length in [17 << 10, 1 << 20, HUGE] {
        let bytes = [number(0), headless(0x04, length)].concat();
        case(
            &format!("settings of {length} bytes"),
            vec![Uni(bytes)],
            Closed(0x107),
        );
    }
    case(
        "control ends at once",
        vec![Uni(number(0)), Fin],
        Closed(0x104),
    );
    case(
        "control ends in settings",
        vec![Uni(settings()[..4].to_vec()), Fin],
        Closed(0x104),
    );
    case("control ends", vec![Uni(settings()), Fin], Closed(0x104));
    case(
        "control is reset in a session",
        vec![Settings, Session, First, Give(0)],
        Closed(0x104),
    );
    case(
        "control ends in a session",
        vec![Settings, Session, First, Fin],
        Closed(0x104),
    );
    case(
        "settings twice",
        vec![Uni([settings(), frame(0x04, &sound())].concat())],
        Closed(0x105),
    );
    case(
        "two control streams",
        vec![Settings, Uni(settings())],
        Closed(0x103),
    );
    for kind in [0x00, 0x01, 0x02, 0x05, 0x06, 0x08, 0x09, 0x41] {
        let bytes = [settings(), frame(kind, b"\0")].concat();
        case(
            &format!("frame {kind:#x} on control"),
            vec![Uni(bytes)],
            Closed(0x105),
        );
    }
    let endless = [settings(), headless(0x21, HUGE)].concat();
    case(
        "grease without end on control",
        vec![Uni(endless)],
        Closed(0x107),
    );
    let grease = frame(0x21 + 0x1f, &[0; 1000]);
    case(
        "much grease before a session",
        vec![Settings, Flood(grease.clone(), 40)],
        Closed(0x107),
    );
    let acts = vec![Settings, Session, First, Flood(grease, 100)];
    case("much grease in a session", acts, Closed(0x107));

    // Other streams of HTTP/3.
    case(
        "a push stream",
        vec![Settings, Uni(number(0x01))],
        Closed(0x103),
    );
    for (kind, code) in [(0x02, 0x201), (0x03, 0x202)] {
        let name = |what: &str| format!("qpack {kind}: {what}");
        case(
            &name("twice"),
            vec![Uni(number(kind)), Uni(number(kind))],
            Closed(0x103),
        );
        case(
            &name("ends"),
            vec![Settings, Uni(number(kind)), Fin],
            Closed(0x104),
        );
        let much = [number(kind), vec![0x3f; 1100]].concat();
        case(&name("much"), vec![Settings, Uni(much)], Closed(code));
        let little = [number(kind), vec![0x20; 10]].concat();
        case(&name("little"), vec![Settings, Uni(little), Session], Lives);
    }
    case(
        "a stream of grease",
        vec![Uni([number(0x21), vec![0; 100]].concat())],
        Stopped(0x103),
    );
    case(
        "a stream of the future",
        vec![Uni(number(HUGE))],
        Stopped(0x103),
    );

    // Requests.
    for kind in [0x00, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0d] {
        let bytes = [frame(kind, b"\0"), connect()].concat();
        let name = format!("a request begins with frame {kind:#x}");
        case(&name, vec![Settings, Bi(bytes)], Closed(0x105));
    }
    for length in [(16 << 10) + 1, 1 << 20, HUGE] {
        let name = format!("a field section of {length} bytes");
        case(
            &name,
            vec![Settings, Bi(headless(0x01, length))],
            Closed(0x107),
        );
    }
    let within = headless(0x01, 16 << 10);
    case(
        "a field section that is all there may be",
        vec![Settings, Bi(within)],
        Closed(0x107),
    );
    let many: Vec<_> = (0..500).map(|n| format!("x{n}")).collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), "")).collect();
    let many = frame(0x01, &section(&[&FIELDS[..], &many].concat()));
    case(
        "fields without end",
        vec![Settings, Bi(many)],
        Closed(0x107),
    );
    for (name, bytes) in [
        ("nothing", vec![]),
        ("half a prefix", vec![0]),
        ("a dynamic field", vec![0, 0, 0x80]),
        ("a static field beyond the last", vec![0, 0, 0xff, 0x7f]),
        (
            "a length beyond all",
            vec![
                0, 0, 0x27, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            ],
        ),
        ("a name cut off", vec![0, 0, 0x25, b'a']),
        ("a name that is no text", vec![0, 0, 0x22, 0xff, 0xfe, 0x00]),
    ] {
        let bytes = frame(0x01, &bytes);
        case(
            &format!("fields of {name}"),
            vec![Settings, Bi(bytes)],
            Closed(0x200),
        );
    }
    for (name, request, answer) in [
        ("GET", with(":method", Some("GET")), NOT_FOUND),
        ("no method", with(":method", None), NOT_FOUND),
        (
            "a websocket",
            with(":protocol", Some("websocket")),
            NOT_FOUND,
        ),
        ("no protocol", with(":protocol", None), NOT_FOUND),
        ("another path", with(":path", Some("/udpack/..")), NOT_FOUND),
        (
            "a path like it",
            with(":path", Some("/udpack%00")),
            NOT_FOUND,
        ),
        ("no path", with(":path", None), BAD_REQUEST),
        ("no authority", with(":authority", None), BAD_REQUEST),
        ("no scheme", with(":scheme", None), BAD_REQUEST),
        ("plain http", with(":scheme", Some("http")), BAD_REQUEST),
        (
            "an authority that is none",
            with(":authority", Some("[::")),
            BAD_REQUEST,
        ),
        ("a header that is none", with("a b", Some("c")), BAD_REQUEST),
        (
            "another origin",
            with("origin", Some("https://evil.example")),
            FORBIDDEN,
        ),
        (
            "no origin to speak of",
            with("origin", Some("null")),
            FORBIDDEN,
        ),
        ("an empty origin", with("origin", Some("")), FORBIDDEN),
    ] {
        let acts = vec![Settings, Connect(request)];
        case(&format!("a request: {name}"), acts, Status(answer));
    }
    case(
        "a request that ends at once",
        vec![Settings, Bi(vec![]), Fin],
        Reset(0x10d),
    );
    case(
        "a request cut off",
        vec![Settings, Bi(connect()[..9].to_vec()), Give(0x10c)],
        Lives,
    );
    let greased = [frame(0x21, b"grease"), frame(0x7e, b""), connect()].concat();
    case(
        "grease before a request",
        vec![Settings, Connect(greased), Session],
        Lives,
    );
    case(
        "the request first",
        vec![Connect(connect()), Settings, Session],
        Lives,
    );
    case(
        "a request that is over",
        vec![Settings, Connect(connect()), Fin],
        Closed(0x100),
    );
    case(
        "a request given up",
        vec![Settings, Connect(connect()), Session, Request, Give(0x10c)],
        Closed(0x100),
    );
    case("two requests", vec![Session, Bi(connect())], Stopped(0x10b));
    case(
        "a request beside a session",
        vec![Session, Bi(with(":method", Some("GET")))],
        Stopped(0x10b),
    );

    // Streams of a session.
    for id in [1, 2, 3, 5] {
        case(
            &format!("a stream of session {id}"),
            vec![Session, Bi(stream_of(id, b""))],
            Closed(0x108),
        );
        case(
            &format!("as well, one way, {id}"),
            vec![Session, Uni(uni_of(id, b""))],
            Closed(0x108),
        );
    }
    case(
        "a stream of another session",
        vec![Session, Bi(stream_of(400, b"x"))],
        Stopped(0x3994_bd84),
    );
    case(
        "as well, one way",
        vec![Session, Uni(uni_of(400, b"x"))],
        Stopped(0x3994_bd84),
    );
    case(
        "half a header, ended",
        vec![Session, Bi(vec![0x40, 0x41]), Fin],
        Reset(0x10d),
    );
    case(
        "data first",
        vec![Session, Bi(frame(0x00, b"x"))],
        Closed(0x105),
    );
    case(
        "settings first",
        vec![Session, Bi(settings()[1..].to_vec())],
        Closed(0x105),
    );

    // The capsules.
    let on_request = |bytes: Vec<u8>| vec![Session, Request, More(bytes)];
    for (name, capsule) in [
        ("no code", close(0, b"")),
        ("half a code", close(3, b"\0\0\0")),
        ("too much text", close(1029, &[0; 4])),
        ("text without end", close(HUGE, &[0; 4])),
    ] {
        let acts = on_request(frame(0x00, &capsule));
        case(&format!("a close: {name}"), acts, Closed(0x10e));
    }
    let half = frame(0x00, &close(8, b"\0\0\0\x01"));
    let acts = vec![Session, Request, More(half), Fin];
    case("a close cut off", acts, Closed(0x10e));
    let acts = vec![Session, Request, More(headless(0x00, 100)), Fin];
    case("data cut off", acts, Closed(0x10e));
    let acts = vec![Session, Request, More(vec![0x00]), Fin];
    case("a frame cut off", acts, Closed(0x10e));
    case(
        "a close",
        on_request(frame(0x00, &close(7, b"\0\0\0\x05bye"))),
        Closed(0x100),
    );
    case(
        "a close of no text",
        on_request(frame(0x00, &close(7, b"\0\0\0\x05\xff\xfe\xfd"))),
        Closed(0x100),
    );
    let long = [&[0, 0, 0x10, 0][..], &[b'x'; 1024]].concat();
    case(
        "a close of all the text there may be",
        on_request(frame(0x00, &close(1028, &long))),
        Closed(0x100),
    );
    let dribble = frame(0x00, &close(7, b"\0\0\0\x05bye"));
    case(
        "a close byte by byte",
        vec![Session, Request, Dribble(dribble)],
        Closed(0x100),
    );
    let pieces: Vec<u8> = close(7, b"\0\0\0\x05bye")
        .iter()
        .flat_map(|byte| frame(0x00, &[*byte]))
        .collect();
    case(
        "a close, a frame for each byte",
        on_request(pieces),
        Closed(0x100),
    );
    case(
        "the request ends",
        vec![Session, Request, Fin],
        Closed(0x100),
    );
    let grease = [
        frame(0x00, &frame(0x17, b"")),
        frame(0x00, &frame(0x29 + 0x17, b"12345")),
        frame(0x21, b"x"),
    ];
    case("capsules of grease", on_request(grease.concat()), Lives);
    let unknown = frame(
        0x00,
        &[frame(0x190b_4d3d, &number(1000)), frame(0x00, b"datagram")].concat(),
    );
    case("capsules that are not known", on_request(unknown), Lives);
    let endless = [headless(0x00, HUGE), headless(0x1234, HUGE)].concat();
    case(
        "a capsule without end",
        vec![Session, Request, More(endless), Flood(vec![0; 1000], 100)],
        Closed(0x107),
    );
    let grease = frame(0x00, &frame(0x17, &[0; 500]));
    case(
        "capsules without end",
        vec![Session, Request, Flood(grease, 240)],
        Closed(0x107),
    );
    let acts = on_request(headless(0x21, HUGE));
    case("a frame without end", acts, Closed(0x107));
    for kind in [0x01, 0x02, 0x04, 0x05, 0x07, 0x41] {
        let acts = on_request(frame(kind, b"\0"));
        case(
            &format!("frame {kind:#x} behind a request"),
            acts,
            Closed(0x105),
        );
    }

    // Datagrams, and the protocol above.
    for (name, bytes) in [
        ("empty", vec![]),
        ("of half a number", vec![0xc0]),
        ("of another session", vec![0x05, 0x90]),
        ("of no message", vec![0x00, 0xff, 0xff]),
        ("of nothing", vec![0x00]),
    ] {
        case(
            &format!("a datagram {name}"),
            vec![Session, Datagram(bytes)],
            Lives,
        );
    }
    let wrong = bare::hello("s3cret");
    case(
        "a wrong token",
        vec![Session, Stream(wrong)],
        Refused(CloseCode::AUTH_FAILED),
    );
    let first = bare::open(1, "echo");
    case(
        "no hello first",
        vec![Session, Stream(first)],
        Refused(CloseCode::AUTH_REQUIRED),
    );
    case(
        "a control stream that ends",
        vec![Session, Stream(vec![]), Fin],
        Refused(CloseCode::TRUNCATED),
    );
    let large = vec![0x7f, 0xff, 0xff, 0xff];
    case(
        "a frame too large",
        vec![Session, Stream(large)],
        Refused(CloseCode::FRAME_TOO_LARGE),
    );
    case(
        "no hello at all",
        vec![Session],
        Refused(CloseCode::AUTH_TIMEOUT),
    );
    cases
}
