//! The bytes of QMux (draft-ietf-quic-qmux-02): QUIC's frames in records, and the transport parameters. Pure: no I/O.
//!
//! A record is one binary message of a WebSocket, which gives its length, and has one or more whole frames.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use web_transport_proto::VarInt;

/// A fault that ends the connection: its code and its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) code: u64,
    pub(crate) text: &'static str,
}

/// The used codes of RFC 9000, section 20.1.
pub(super) mod code {
    pub(crate) const FLOW_CONTROL: u64 = 0x03;
    pub(crate) const STREAM_LIMIT: u64 = 0x04;
    pub(crate) const STREAM_STATE: u64 = 0x05;
    pub(crate) const FINAL_SIZE: u64 = 0x06;
    pub(crate) const FRAME_ENCODING: u64 = 0x07;
    pub(crate) const TRANSPORT_PARAMETER: u64 = 0x08;
    pub(crate) const PROTOCOL_VIOLATION: u64 = 0x0a;
}

pub(super) const fn fault(code: u64, text: &'static str) -> Fault {
    Fault { code, text }
}

/// The default limit of a record, in bytes, which is also the smallest permitted one.
pub(super) const LEAST_RECORD: u64 = 16_382;
/// The largest record that this side accepts, in bytes.
pub(crate) const RECORD: usize = 65_535;
/// The most bytes of text in a close.
const CLOSE_TEXT: usize = 1024;
/// The most bytes of transport parameters.
const PARAMETERS: usize = 1024;
/// A stream has no further byte than this one, and no value is larger.
const MOST: u64 = (1 << 62) - 1;
/// Numbers of streams of one kind go up to this (RFC 9000, section 4.6).
const MOST_STREAMS: u64 = 1 << 60;

/// Types of frames.
mod kind {
    pub(super) const PADDING: u64 = 0x00;
    pub(super) const RESET_STREAM: u64 = 0x04;
    pub(super) const STOP_SENDING: u64 = 0x05;
    pub(super) const STREAM: u64 = 0x08;
    pub(super) const STREAM_LAST: u64 = 0x0f;
    pub(super) const FIN: u64 = 0x01;
    pub(super) const LEN: u64 = 0x02;
    pub(super) const OFF: u64 = 0x04;
    pub(super) const MAX_DATA: u64 = 0x10;
    pub(super) const MAX_STREAM_DATA: u64 = 0x11;
    pub(super) const MAX_STREAMS_BIDI: u64 = 0x12;
    pub(super) const MAX_STREAMS_UNI: u64 = 0x13;
    pub(super) const DATA_BLOCKED: u64 = 0x14;
    pub(super) const STREAM_DATA_BLOCKED: u64 = 0x15;
    pub(super) const STREAMS_BLOCKED_BIDI: u64 = 0x16;
    pub(super) const STREAMS_BLOCKED_UNI: u64 = 0x17;
    pub(super) const CLOSE: u64 = 0x1c;
    pub(super) const CLOSE_APP: u64 = 0x1d;
    pub(super) const DATAGRAM: u64 = 0x30;
    pub(super) const DATAGRAM_LEN: u64 = 0x31;
    pub(super) const PARAMETERS: u64 = 0x3f51_5330_0d0a_0d0a;
    pub(super) const PING: u64 = 0x348c_6752_9ef8_c7bd;
    pub(super) const PONG: u64 = 0x348c_6752_9ef8_c7be;
}

/// Ids of transport parameters.
mod parameter {
    pub(super) const MAX_IDLE_TIMEOUT: u64 = 0x01;
    pub(super) const MAX_DATA: u64 = 0x04;
    pub(super) const STREAM_DATA_BIDI_LOCAL: u64 = 0x05;
    pub(super) const STREAM_DATA_BIDI_REMOTE: u64 = 0x06;
    pub(super) const STREAM_DATA_UNI: u64 = 0x07;
    pub(super) const STREAMS_BIDI: u64 = 0x08;
    pub(super) const STREAMS_UNI: u64 = 0x09;
    pub(super) const DATAGRAM: u64 = 0x20;
    pub(super) const RECORD: u64 = 0x0571_c594_29cd_0845;

    /// Whether this is a parameter of QUIC that must not be sent here.
    pub(super) fn is_of_quic_alone(id: u64) -> bool {
        matches!(id, 0x00 | 0x02 | 0x03 | 0x0a..=0x10)
    }
}

/// The transport parameters, which a side announces in its first record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parameters {
    /// The idle time-out in milliseconds; 0: none.
    pub(crate) idle: u64,
    /// Bytes on all streams, on each that it opened, on each that the peer did, and on each that is one-way.
    pub(crate) data: u64,
    pub(crate) own_stream: u64,
    pub(crate) peers_stream: u64,
    pub(crate) one_way: u64,
    /// Streams that the peer may open.
    pub(crate) streams: [u64; 2],
    /// The largest datagram frame, in bytes, head included; 0: datagrams are not accepted.
    pub(crate) datagram: u64,
    /// The largest record, in bytes.
    pub(crate) record: u64,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            idle: 0,
            data: 0,
            own_stream: 0,
            peers_stream: 0,
            one_way: 0,
            streams: [0; 2],
            datagram: 0,
            record: LEAST_RECORD,
        }
    }
}

impl Parameters {
    pub(super) fn encode(&self, into: &mut BytesMut) {
        let mut list = BytesMut::new();
        for (id, value) in [
            (parameter::MAX_IDLE_TIMEOUT, self.idle),
            (parameter::MAX_DATA, self.data),
            (parameter::STREAM_DATA_BIDI_LOCAL, self.own_stream),
            (parameter::STREAM_DATA_BIDI_REMOTE, self.peers_stream),
            (parameter::STREAM_DATA_UNI, self.one_way),
            (parameter::STREAMS_BIDI, self.streams[0]),
            (parameter::STREAMS_UNI, self.streams[1]),
            (parameter::DATAGRAM, self.datagram),
            (parameter::RECORD, self.record),
        ] {
            if value > 0 {
                put(&mut list, id);
                put(&mut list, size(value) as u64);
                put(&mut list, value);
            }
        }
        put(into, kind::PARAMETERS);
        put(into, list.len() as u64);
        into.put_slice(&list);
    }

    fn decode(mut list: Bytes) -> Result<Self, Fault> {
        const BAD: Fault = fault(code::TRANSPORT_PARAMETER, "transport parameters");
        let mut read = Self::default();
        let mut seen = Vec::new();
        while list.has_remaining() {
            let id = get(&mut list).map_err(|_| BAD)?;
            let mut value = counted(&mut list, usize::MAX).map_err(|_| BAD)?;
            if seen.contains(&id) || parameter::is_of_quic_alone(id) {
                return Err(BAD);
            }
            seen.push(id);
            let place = match id {
                parameter::MAX_IDLE_TIMEOUT => &mut read.idle,
                parameter::MAX_DATA => &mut read.data,
                parameter::STREAM_DATA_BIDI_LOCAL => &mut read.own_stream,
                parameter::STREAM_DATA_BIDI_REMOTE => &mut read.peers_stream,
                parameter::STREAM_DATA_UNI => &mut read.one_way,
                parameter::STREAMS_BIDI => &mut read.streams[0],
                parameter::STREAMS_UNI => &mut read.streams[1],
                parameter::DATAGRAM => &mut read.datagram,
                parameter::RECORD => &mut read.record,
                // Of an extension.
                _ => continue,
            };
            *place = get(&mut value).map_err(|_| BAD)?;
            if value.has_remaining() {
                return Err(BAD);
            }
        }
        match read.record >= LEAST_RECORD && read.streams.iter().all(|most| *most <= MOST_STREAMS) {
            true => Ok(read),
            false => Err(BAD),
        }
    }
}

/// A frame. Those that only tell that a sender waits for credit are [`Frame::Blocked`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    Parameters(Parameters),
    Stream {
        id: u64,
        offset: u64,
        data: Bytes,
        fin: bool,
    },
    Reset {
        id: u64,
        code: u64,
        size: u64,
    },
    Stop {
        id: u64,
        code: u64,
    },
    MaxData(u64),
    MaxStreamData {
        id: u64,
        most: u64,
    },
    MaxStreams {
        one_way: bool,
        most: u64,
    },
    Blocked,
    /// The end of the connection: by the application, or because of a fault.
    Close {
        application: bool,
        code: u64,
        text: Bytes,
    },
    Ping(u64),
    Pong(u64),
    Datagram {
        data: Bytes,
        /// Bytes of its head.
        head: usize,
    },
    Padding,
}

/// Reads the next frame of a record; `None` at its end.
pub(crate) fn next(record: &mut Bytes) -> Result<Option<Frame>, Fault> {
    if !record.has_remaining() {
        return Ok(None);
    }
    let before = record.len();
    let kind = get(record)?;
    let frame = match kind {
        kind::PADDING => Frame::Padding,
        kind::STREAM..=kind::STREAM_LAST => stream(kind, record)?,
        kind::RESET_STREAM => Frame::Reset {
            id: get(record)?,
            code: get(record)?,
            size: get(record)?,
        },
        kind::STOP_SENDING => Frame::Stop {
            id: get(record)?,
            code: get(record)?,
        },
        kind::MAX_DATA => Frame::MaxData(get(record)?),
        kind::MAX_STREAM_DATA => Frame::MaxStreamData {
            id: get(record)?,
            most: get(record)?,
        },
        kind::MAX_STREAMS_BIDI | kind::MAX_STREAMS_UNI => {
            let most = get(record)?;
            if most > MOST_STREAMS {
                return Err(fault(code::FRAME_ENCODING, "MAX_STREAMS"));
            }
            Frame::MaxStreams {
                one_way: kind == kind::MAX_STREAMS_UNI,
                most,
            }
        }
        kind::DATA_BLOCKED | kind::STREAMS_BLOCKED_BIDI | kind::STREAMS_BLOCKED_UNI => {
            get(record)?;
            Frame::Blocked
        }
        kind::STREAM_DATA_BLOCKED => {
            get(record)?;
            get(record)?;
            Frame::Blocked
        }
        kind::CLOSE | kind::CLOSE_APP => {
            let code = get(record)?;
            if kind == kind::CLOSE {
                get(record)?;
            }
            Frame::Close {
                application: kind == kind::CLOSE_APP,
                code,
                text: counted(record, CLOSE_TEXT)?,
            }
        }
        kind::DATAGRAM => Frame::Datagram {
            head: before - record.len(),
            data: record.split_to(record.len()),
        },
        kind::DATAGRAM_LEN => {
            let data = counted(record, RECORD)?;
            let head = before - record.len() - data.len();
            Frame::Datagram { data, head }
        }
        kind::PARAMETERS => Frame::Parameters(Parameters::decode(counted(record, PARAMETERS)?)?),
        kind::PING => Frame::Ping(get(record)?),
        kind::PONG => Frame::Pong(get(record)?),
        _ => return Err(fault(code::FRAME_ENCODING, "a frame of unknown type")),
    };
    Ok(Some(frame))
}

fn stream(kind: u64, record: &mut Bytes) -> Result<Frame, Fault> {
    let id = get(record)?;
    let offset = match kind & kind::OFF {
        0 => 0,
        _ => get(record)?,
    };
    let data = match kind & kind::LEN {
        0 => record.split_to(record.len()),
        _ => counted(record, RECORD)?,
    };
    if offset.saturating_add(data.len() as u64) > MOST {
        return Err(fault(code::FRAME_ENCODING, "a stream's offset"));
    }
    Ok(Frame::Stream {
        id,
        offset,
        data,
        fin: kind & kind::FIN != 0,
    })
}

/// The length of the head of a STREAM frame with `length` bytes of data.
pub(super) fn stream_head(id: u64, offset: u64, length: usize) -> usize {
    1 + size(id) + size(offset) + size(length as u64)
}

/// The head of a STREAM frame; the data follow it.
pub(super) fn put_stream(into: &mut BytesMut, id: u64, offset: u64, length: usize, fin: bool) {
    put(
        into,
        kind::STREAM | kind::OFF | kind::LEN | if fin { kind::FIN } else { 0 },
    );
    put(into, id);
    put(into, offset);
    put(into, length as u64);
}

pub(super) fn put_reset(into: &mut BytesMut, id: u64, code: u64, size: u64) {
    put_all(into, &[kind::RESET_STREAM, id, code, size]);
}

pub(super) fn put_stop(into: &mut BytesMut, id: u64, code: u64) {
    put_all(into, &[kind::STOP_SENDING, id, code]);
}

pub(super) fn put_max_data(into: &mut BytesMut, most: u64) {
    put_all(into, &[kind::MAX_DATA, most]);
}

pub(super) fn put_max_stream_data(into: &mut BytesMut, id: u64, most: u64) {
    put_all(into, &[kind::MAX_STREAM_DATA, id, most]);
}

pub(super) fn put_max_streams(into: &mut BytesMut, one_way: bool, most: u64) {
    let kind = match one_way {
        false => kind::MAX_STREAMS_BIDI,
        true => kind::MAX_STREAMS_UNI,
    };
    put_all(into, &[kind, most.min(MOST_STREAMS)]);
}

/// A ping, or the answer to one.
pub(super) fn put_ping(into: &mut BytesMut, answer: bool, sequence: u64) {
    put_all(
        into,
        &[if answer { kind::PONG } else { kind::PING }, sequence],
    );
}

pub(super) fn put_datagram(into: &mut BytesMut, data: &[u8]) {
    put_all(into, &[kind::DATAGRAM_LEN, data.len() as u64]);
    into.put_slice(data);
}

/// The length of the frame of a datagram of `length` bytes.
pub(super) fn datagram_size(length: usize) -> usize {
    1 + size(length as u64) + length
}

/// The end of the connection, by the application with a code of its own, or because of a fault.
pub(super) fn put_close(into: &mut BytesMut, application: bool, code: u64, text: &str) {
    match application {
        true => put_all(into, &[kind::CLOSE_APP, code]),
        // The type of the frame that caused the fault is not sent.
        false => put_all(into, &[kind::CLOSE, code, kind::PADDING]),
    }
    put(into, text.len() as u64);
    into.put_slice(text.as_bytes());
}

fn put_all(into: &mut BytesMut, values: &[u64]) {
    for value in values {
        put(into, *value);
    }
}

/// Writes an integer; larger values become the largest one.
fn put(into: &mut BytesMut, value: u64) {
    VarInt::from_u64(value).unwrap_or(VarInt::MAX).encode(into);
}

fn size(value: u64) -> usize {
    VarInt::from_u64(value).map_or(8, VarInt::size)
}

fn get(record: &mut Bytes) -> Result<u64, Fault> {
    match VarInt::decode(record) {
        Ok(value) => Ok(value.into_inner()),
        Err(_) => Err(fault(code::FRAME_ENCODING, "a frame is cut short")),
    }
}

/// A length of at most `most`, and that many bytes.
fn counted(record: &mut Bytes, most: usize) -> Result<Bytes, Fault> {
    let length = usize::try_from(get(record)?).unwrap_or(usize::MAX);
    if length > record.len() || length > most {
        return Err(fault(code::FRAME_ENCODING, "a length in a frame"));
    }
    Ok(record.split_to(length))
}
