//! The encoding of HTTP/3 and WebTransport for a session: settings, the request, the headers of streams, the closing
//! capsule, and error codes. Pure: no I/O.

use bytes::{BufMut, Bytes, BytesMut};
use web_transport_proto::{
    ConnectError, ConnectRequest, Frame, Setting, VarInt, error_from_http3, error_to_http3,
};

use crate::wire::code::CloseCode;

/// The application protocol of HTTP/3.
pub(crate) const ALPN: &[u8] = b"h3";

/// Bytes of a field section, at most.
pub(super) const FIELD_SECTION: u64 = 16 << 10;
/// Bytes of text in a close, at most.
pub(super) const CLOSE_TEXT: usize = 1024;

/// A fault that ends the connection: its code and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) code: u64,
    pub(super) text: &'static str,
}

pub(super) const fn fault(code: u64, text: &'static str) -> Fault {
    Fault { code, text }
}

/// The codes of RFC 9114, RFC 9204 and the WebTransport drafts that a server uses.
pub(super) mod code {
    pub(crate) const NO_ERROR: u64 = 0x100;
    pub(crate) const STREAM_CREATION: u64 = 0x103;
    pub(crate) const CLOSED_CRITICAL_STREAM: u64 = 0x104;
    pub(crate) const FRAME_UNEXPECTED: u64 = 0x105;
    pub(crate) const FRAME_ERROR: u64 = 0x106;
    pub(crate) const EXCESSIVE_LOAD: u64 = 0x107;
    pub(crate) const ID_ERROR: u64 = 0x108;
    pub(crate) const SETTINGS: u64 = 0x109;
    pub(crate) const MISSING_SETTINGS: u64 = 0x10a;
    pub(crate) const REQUEST_REJECTED: u64 = 0x10b;
    pub(crate) const REQUEST_INCOMPLETE: u64 = 0x10d;
    pub(crate) const MESSAGE: u64 = 0x10e;
    pub(crate) const QPACK_DECOMPRESSION: u64 = 0x200;
    pub(crate) const QPACK_ENCODER_STREAM: u64 = 0x201;
    pub(crate) const QPACK_DECODER_STREAM: u64 = 0x202;
    pub(crate) const BUFFERED_STREAM_REJECTED: u64 = 0x3994_bd84;
}

/// Types of unidirectional streams.
pub(super) mod uni {
    pub(crate) const CONTROL: u64 = 0x00;
    pub(crate) const PUSH: u64 = 0x01;
    pub(crate) const QPACK_ENCODER: u64 = 0x02;
    pub(crate) const QPACK_DECODER: u64 = 0x03;
    pub(crate) const WEBTRANSPORT: u64 = 0x54;
}

/// Types of frames.
pub(super) mod frame {
    pub(crate) const DATA: u64 = 0x00;
    pub(crate) const HEADERS: u64 = 0x01;
    pub(crate) const SETTINGS: u64 = 0x04;
    /// Begins a stream of a session in place of a frame.
    pub(crate) const WEBTRANSPORT: u64 = 0x41;

    /// Whether it is a frame of RFC 9114, section 7.2, or one of HTTP/2 that must not be used: others are skipped.
    pub(crate) fn is_known(kind: u64) -> bool {
        matches!(kind, 0..=0x09 | 0x0d | WEBTRANSPORT)
    }

    /// Whether the frame may come on the control stream after SETTINGS: CANCEL_PUSH, GOAWAY, MAX_PUSH_ID.
    pub(crate) fn is_control(kind: u64) -> bool {
        matches!(kind, 0x03 | 0x07 | 0x0d)
    }
}

/// The first bytes of a server's control stream: its type, and SETTINGS.
///
/// It announces WebTransport for three generations of the draft. `0x14e9cd29` is not announced, because clients that
/// read it expect flow control of sessions.
pub(super) fn settings() -> Bytes {
    let mut payload = BytesMut::new();
    for (setting, value) in [
        (Setting::MAX_FIELD_SECTION_SIZE, FIELD_SECTION as u32),
        (Setting::ENABLE_CONNECT_PROTOCOL, 1),
        (Setting::ENABLE_DATAGRAM, 1),
        (Setting::ENABLE_DATAGRAM_DEPRECATED, 1),
        (Setting::WEBTRANSPORT_ENABLE_DEPRECATED, 1),
        (Setting::WEBTRANSPORT_MAX_SESSIONS_DEPRECATED, 1),
        (Setting::WEBTRANSPORT_MAX_SESSIONS, 1),
    ] {
        setting.encode(&mut payload);
        VarInt::from_u32(value).encode(&mut payload);
    }
    let mut bytes = BytesMut::new();
    put(&mut bytes, uni::CONTROL);
    put(&mut bytes, frame::SETTINGS);
    put(&mut bytes, payload.len() as u64);
    bytes.put_slice(&payload);
    bytes.freeze()
}

/// Checks the payload of a client's SETTINGS.
pub(super) fn check_settings(mut payload: &[u8]) -> Result<(), Fault> {
    const WT_ENABLED: u64 = 0x2c7c_f000;
    let mut seen = Vec::new();
    let (mut datagrams, mut webtransport) = (false, false);
    while !payload.is_empty() {
        let (Ok(id), Ok(value)) = (VarInt::decode(&mut payload), VarInt::decode(&mut payload))
        else {
            return Err(fault(code::FRAME_ERROR, "SETTINGS end within a setting"));
        };
        let (id, value) = (id.into_inner(), value.into_inner());
        if matches!(id, 0x00 | 0x02..=0x05) {
            return Err(fault(code::SETTINGS, "a setting of HTTP/2"));
        }
        if seen.contains(&id) {
            return Err(fault(code::SETTINGS, "a setting that is there twice"));
        }
        seen.push(id);
        let id = VarInt::from_u64(id).map(Setting).ok();
        match id {
            Some(Setting::ENABLE_DATAGRAM | Setting::ENABLE_DATAGRAM_DEPRECATED) => {
                datagrams |= value == 1;
            }
            Some(Setting::WEBTRANSPORT_ENABLE_DEPRECATED | Setting::WEBTRANSPORT_MAX_SESSIONS) => {
                webtransport |= value > 0;
            }
            Some(id) if id.0.into_inner() == WT_ENABLED => webtransport |= value > 0,
            _ => {}
        }
    }
    match (datagrams, webtransport) {
        (true, true) => Ok(()),
        (false, _) => Err(fault(code::SETTINGS, "the client takes no datagrams")),
        (true, false) => Err(fault(
            code::SETTINGS,
            "the client does not speak WebTransport",
        )),
    }
}

/// The status for a malformed request.
pub(super) const BAD_REQUEST: u16 = 400;
pub(super) const FORBIDDEN: u16 = 403;
pub(super) const NOT_FOUND: u16 = 404;

/// A client's request for a session.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) path: String,
    /// The server's host name in the request, without a port.
    pub(super) host: String,
    pub(super) origin: Option<String>,
}

/// Reads the field section of a request that asks for a session.
///
/// # Errors
/// The status for a request of another kind; a fault for an unreadable request.
pub(super) fn request(section: &[u8]) -> Result<Result<Request, u16>, Fault> {
    let mut whole = BytesMut::with_capacity(section.len() + 9);
    Frame::HEADERS.encode(&mut whole);
    put(&mut whole, section.len() as u64);
    whole.put_slice(section);
    match ConnectRequest::decode(&mut whole.freeze()) {
        Ok(request) => Ok(Ok(Request {
            path: request.url.path().to_owned(),
            host: request.url.host_str().unwrap_or_default().to_owned(),
            origin: request.headers.get("origin").map(|origin| {
                // An origin with control characters or other bytes matches no page.
                origin.to_str().unwrap_or("null").to_owned()
            }),
        })),
        Err(ConnectError::QpackError(_)) => Err(fault(
            code::QPACK_DECOMPRESSION,
            "the field section is not sound",
        )),
        Err(ConnectError::FieldSectionTooLarge | ConnectError::FrameTooLarge) => Err(fault(
            code::EXCESSIVE_LOAD,
            "the field section is too large",
        )),
        Err(ConnectError::WrongMethod(_) | ConnectError::WrongProtocol(_)) => Ok(Err(NOT_FOUND)),
        Err(_) => Ok(Err(BAD_REQUEST)),
    }
}

/// HEADERS with this status and nothing else.
pub(super) fn answer(status: u16) -> Bytes {
    // Entries of QPACK's static table (RFC 9204, appendix A): two zeroes, then an index.
    Bytes::from_static(match status {
        200 => &[0x01, 0x03, 0x00, 0x00, 0xd9],
        FORBIDDEN => &[0x01, 0x04, 0x00, 0x00, 0xff, 0x05],
        NOT_FOUND => &[0x01, 0x03, 0x00, 0x00, 0xdb],
        _ => &[0x01, 0x04, 0x00, 0x00, 0xff, 0x04],
    })
}

/// A DATA frame with the capsule that closes a session.
pub(super) fn close_capsule(code: u32, text: &str) -> Bytes {
    let mut capsule = BytesMut::new();
    put(&mut capsule, CLOSE_SESSION);
    put(&mut capsule, 4 + text.len() as u64);
    capsule.put_u32(code);
    capsule.put_slice(text.as_bytes());
    let mut bytes = BytesMut::new();
    put(&mut bytes, frame::DATA);
    put(&mut bytes, capsule.len() as u64);
    bytes.put_slice(&capsule);
    bytes.freeze()
}

const CLOSE_SESSION: u64 = 0x2843;

/// Finds the capsule that closes a session in the content of DATA frames, and skips all others.
#[derive(Debug, Default)]
pub(super) struct Capsules {
    /// The header and the content of the unfinished capsule.
    held: Vec<u8>,
    /// The rest of a capsule to skip, in bytes.
    skip: u64,
}

impl Capsules {
    /// Processes the next bytes; returns code and text of a close when it is complete.
    pub(super) fn push(&mut self, mut bytes: &[u8]) -> Result<Option<(u32, String)>, Fault> {
        loop {
            let skipped = bytes
                .len()
                .min(usize::try_from(self.skip).unwrap_or(usize::MAX));
            self.skip -= skipped as u64;
            let Some((first, rest)) = bytes[skipped..].split_first() else {
                return Ok(None);
            };
            self.held.push(*first);
            bytes = rest;
            let mut held = &self.held[..];
            let Ok(kind) = VarInt::decode(&mut held) else {
                continue;
            };
            let Ok(length) = VarInt::decode(&mut held) else {
                continue;
            };
            let length = length.into_inner();
            if kind.into_inner() != CLOSE_SESSION {
                self.skip = length;
                self.held.clear();
            } else if !(4..=4 + CLOSE_TEXT as u64).contains(&length) {
                return Err(fault(
                    code::MESSAGE,
                    "a close needs 4 to 1,028 bytes in its capsule",
                ));
            } else if held.len() as u64 == length {
                let (code, text) = held.split_at(4);
                let code = code
                    .iter()
                    .fold(0, |code, byte| code << 8 | u32::from(*byte));
                return Ok(Some((code, String::from_utf8_lossy(text).into_owned())));
            }
        }
    }

    /// Whether a capsule is unfinished.
    pub(super) fn is_within(&self) -> bool {
        self.skip > 0 || !self.held.is_empty()
    }
}

/// The header of a stream of this session, for [`frame::WEBTRANSPORT`] or [`uni::WEBTRANSPORT`].
pub(super) fn stream_header(kind: u64, session: u64) -> Bytes {
    let mut bytes = BytesMut::with_capacity(10);
    put(&mut bytes, kind);
    put(&mut bytes, session);
    bytes.freeze()
}

/// Bytes of a datagram's prefix.
pub(crate) fn prefix_len(session: u64) -> usize {
    VarInt::from_u64(session / 4).map_or(8, VarInt::size)
}

/// A datagram of this session.
pub(crate) fn datagram(session: u64, body: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(8 + body.len());
    put(&mut bytes, session / 4);
    bytes.put_slice(body);
    bytes.freeze()
}

/// The content of a datagram, if it belongs to this session.
pub(crate) fn datagram_body(session: u64, mut datagram: Bytes) -> Option<Bytes> {
    let quarter = VarInt::decode(&mut datagram).ok()?.into_inner();
    (quarter == session / 4).then_some(datagram)
}

/// Converts a code of the protocol into WebTransport's; a code beyond 32 bits becomes the largest one.
pub(super) fn code_u32(code: CloseCode) -> u32 {
    u32::try_from(code.value()).unwrap_or(u32::MAX)
}

/// A code of the protocol as the code of a reset or stop.
pub(crate) fn to_http3(code: CloseCode) -> u64 {
    error_to_http3(code_u32(code))
}

/// Whether the code of a reset or stop is one of WebTransport's. HTTP/3's own end the streams of a session that ends.
pub(crate) fn is_code(wire: u64) -> bool {
    // Every 31st code point is reserved.
    error_from_http3(wire).is_some_and(|code| error_to_http3(code) == wire)
}

/// Converts the code of a reset or stop into one of the protocol; a code that is not WebTransport's only means that
/// the stream was given up.
pub(crate) fn from_http3(wire: u64) -> CloseCode {
    match error_from_http3(wire) {
        Some(code) if is_code(wire) => CloseCode::new(code.into()),
        _ => CloseCode::CANCELLED,
    }
}

/// Writes a variable-length integer; callers pass no value that it cannot hold.
fn put(bytes: &mut BytesMut, value: u64) {
    VarInt::from_u64(value).unwrap_or(VarInt::MAX).encode(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_go_there_and_back_and_reserved_points_are_none() {
        for value in [0, 1, 0x1d, 0x1e, 0x1f, 0x43, 0xff, 0x1000, 0xffff_ffff] {
            let code = CloseCode::new(value);
            assert_eq!(from_http3(to_http3(code)), code);
        }
        assert_eq!(to_http3(CloseCode::NORMAL), 0x52e4_a40f_a8db);
        assert_eq!(to_http3(CloseCode::new(0xffff_ffff)), 0x52e5_ac98_3162);
        assert_eq!(
            to_http3(CloseCode::new(1 << 40)),
            to_http3(CloseCode::new(0xffff_ffff))
        );
        for foreign in [
            0,
            0x10c,
            0x52e4_a40f_a8da,
            0x52e4_a40f_a8db + 0x1e,
            u64::MAX,
        ] {
            assert_eq!(from_http3(foreign), CloseCode::CANCELLED, "{foreign:#x}");
        }
    }

    #[test]
    fn a_close_is_found_among_other_capsules_however_it_is_cut() {
        let mut bytes = Vec::new();
        // One of GREASE, an unknown one of three bytes, then the close.
        bytes.extend([0x17, 0x00]);
        bytes.extend([0x80, 0x01, 0x02, 0x03, 0x03, 1, 2, 3]);
        bytes.extend([0x68, 0x43, 0x07, 0, 0, 0x10, 0x07, b'b', b'y', b'e']);
        for piece in 1..=bytes.len() {
            let mut capsules = Capsules::default();
            let found = bytes
                .chunks(piece)
                .find_map(|bytes| capsules.push(bytes).unwrap());
            assert_eq!(found, Some((0x1007, "bye".to_owned())), "{piece}");
        }
    }

    #[test]
    fn a_close_of_wrong_length_is_refused_before_its_bytes_come() {
        for length in [&[0x03][..], &[0x44, 0x05], &[0xff; 8]] {
            let bytes = [&[0x68, 0x43][..], length].concat();
            let error = Capsules::default().push(&bytes).unwrap_err();
            assert_eq!(error.code, code::MESSAGE);
        }
    }

    #[test]
    fn our_own_close_is_read_back() {
        let bytes = close_capsule(67, "done");
        assert_eq!(
            bytes[..],
            [
                0x00, 0x0b, 0x68, 0x43, 0x08, 0, 0, 0, 67, b'd', b'o', b'n', b'e'
            ]
        );
        let found = Capsules::default().push(&bytes[2..]).unwrap();
        assert_eq!(found, Some((67, "done".to_owned())));
    }

    #[test]
    fn settings_must_be_sound_and_name_datagrams_and_webtransport() {
        let checked = |bytes: &[u8]| check_settings(bytes).map_err(|fault| fault.code);
        let draft02 = [0x33, 0x01, 0xab, 0x60, 0x37, 0x42, 0x01];
        assert_eq!(checked(&draft02), Ok(()));
        assert_eq!(checked(&draft02[..2]), Err(code::SETTINGS));
        assert_eq!(checked(&draft02[2..]), Err(code::SETTINGS));
        assert_eq!(checked(&draft02[..5]), Err(code::FRAME_ERROR));
        assert_eq!(checked(&[]), Err(code::SETTINGS));
        let twice = [&draft02[..], &draft02[..2]].concat();
        assert_eq!(checked(&twice), Err(code::SETTINGS));
        let of_http2 = [&draft02[..], &[0x03, 0x01]].concat();
        assert_eq!(checked(&of_http2), Err(code::SETTINGS));
        let grease = [&draft02[..], &[0x40, 0x40, 0x05]].concat();
        assert_eq!(checked(&grease), Ok(()));
    }

    #[test]
    fn a_datagram_carries_the_quarter_of_its_session() {
        let sent = datagram(8, b"body");
        assert_eq!(sent[..], *b"\x02body");
        assert_eq!(
            datagram_body(8, sent.clone()).as_deref(),
            Some(&b"body"[..])
        );
        assert_eq!(datagram_body(0, sent), None);
        assert_eq!(datagram_body(0, Bytes::new()), None);
        assert_eq!((prefix_len(0), prefix_len(256)), (1, 2));
    }

    /// The rows of a table of the document's section on WebTransport: the first cell, and the code in the second.
    fn rows(heading: &str) -> Vec<(String, String)> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/PROTOCOL.md");
        let text = std::fs::read_to_string(path).unwrap();
        let table = text.split(heading).nth(1).unwrap().split("\n\n").next();
        let rows = table.unwrap().lines().filter_map(|line| {
            let (what, bytes) = line.trim_matches('|').rsplit_once('|')?;
            let bytes = bytes.trim().strip_prefix('`')?.strip_suffix('`')?;
            Some((what.trim().to_owned(), bytes.to_owned()))
        });
        rows.collect()
    }

    #[test]
    fn the_documents_bytes_are_ours() {
        let body = b"\x92\xa2at\x05";
        let ours = [
            ("server: control stream", settings()),
            ("server: 200", answer(200)),
            ("server: 404", answer(NOT_FOUND)),
            ("server: 403", answer(FORBIDDEN)),
            ("server: 400", answer(BAD_REQUEST)),
            (
                "bidirectional stream of session 0",
                stream_header(frame::WEBTRANSPORT, 0),
            ),
            (
                "unidirectional stream of session 0",
                stream_header(uni::WEBTRANSPORT, 0),
            ),
            (
                "bidirectional stream of session 256",
                stream_header(frame::WEBTRANSPORT, 256),
            ),
            (
                "datagram of session 4 with `92 a2 61 74 05`",
                datagram(4, body),
            ),
            (
                "close with `auth_failed` and \"no\"",
                close_capsule(0x21, "no"),
            ),
            ("close with 0 and no text", close_capsule(0, "")),
        ];
        let rows = rows("| what | bytes |\n| --- | --- |\n");
        assert_eq!(rows.len(), ours.len());
        for ((what, bytes), (ours, made)) in rows.iter().zip(ours) {
            assert_eq!(what, ours);
            let made: Vec<_> = made.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(made.join(" "), *bytes, "{what}");
        }
    }

    #[test]
    fn the_documents_codes_are_ours() {
        let number = |text: &str| u64::from_str_radix(&text[2..], 16).unwrap();
        let rows = rows("| code of §9 | in RESET_STREAM and STOP_SENDING |\n| --- | --- |\n");
        assert_eq!(rows.len(), 6);
        for (code, wire) in rows {
            let code = CloseCode::new(number(&code));
            assert_eq!(to_http3(code), number(&wire), "{code}");
            assert_eq!(from_http3(number(&wire)), code);
        }
    }
}
