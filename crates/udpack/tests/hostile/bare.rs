//! A peer that speaks QUIC and nothing else: every byte it sends is the test's own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use udpack::wire::{FrameDecoder, Message};

#[path = "tls.rs"]
mod tls;

pub(crate) use tls::tls;

/// A msgpack value, written the shortest way.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Nil,
    Uint(u64),
    Int(i64),
    Float(f64),
    Str(String),
    Bin(Vec<u8>),
    Array(Vec<Self>),
    Map(Vec<(Self, Self)>),
    /// Bytes as they are, msgpack or not.
    Raw(Vec<u8>),
}

impl Value {
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        const ROOM: &str = "a vector takes everything";
        match self {
            Self::Nil => rmp::encode::write_nil(out).expect(ROOM),
            Self::Uint(value) => drop(rmp::encode::write_uint(out, *value).expect(ROOM)),
            Self::Int(value) => drop(rmp::encode::write_sint(out, *value).expect(ROOM)),
            Self::Float(value) => rmp::encode::write_f64(out, *value).expect(ROOM),
            Self::Str(value) => rmp::encode::write_str(out, value).expect(ROOM),
            Self::Bin(value) => rmp::encode::write_bin(out, value).expect(ROOM),
            Self::Array(items) => {
                rmp::encode::write_array_len(out, items.len() as u32).expect(ROOM);
                items.iter().for_each(|item| item.write(out));
            }
            Self::Map(entries) => {
                rmp::encode::write_map_len(out, entries.len() as u32).expect(ROOM);
                for (key, value) in entries {
                    key.write(out);
                    value.write(out);
                }
            }
            Self::Raw(bytes) => out.extend_from_slice(bytes),
        }
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Str(value.to_owned())
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Uint(value)
    }
}

/// A map with text for keys.
pub(crate) fn map<const N: usize>(entries: [(&str, Value); N]) -> Value {
    Value::Map(entries.map(|(key, value)| (key.into(), value)).into())
}

/// A prefix and `body`.
pub(crate) fn frame(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).expect("a test body fits 32 bits");
    [&length.to_be_bytes()[..], body].concat()
}

/// A frame around one value.
pub(crate) fn frame_of(value: &Value) -> Vec<u8> {
    let mut body = Vec::new();
    value.write(&mut body);
    frame(&body)
}

/// The frame of `[event, data]`.
pub(crate) fn event(name: &str, data: Value) -> Vec<u8> {
    frame_of(&Value::Array(vec![name.into(), data]))
}

/// The frame of `[event, data, id]`.
pub(crate) fn request(name: &str, data: Value, id: Value) -> Vec<u8> {
    frame_of(&Value::Array(vec![name.into(), data, id]))
}

/// A sound `$hello` with this token.
pub(crate) fn hello(token: &str) -> Vec<u8> {
    let fields = map([
        ("v", Value::Uint(1)),
        ("token", token.into()),
        ("agent", "bare".into()),
    ]);
    event("$hello", fields)
}

/// A sound `$open`.
pub(crate) fn open(id: u64, name: &str) -> Vec<u8> {
    event("$open", map([("id", id.into()), ("name", name.into())]))
}

/// QUIC settings of a peer that stays alive however quiet it is.
pub(crate) fn quic(tls: rustls::ClientConfig, stream_window: u32) -> quinn::ClientConfig {
    let crypto = QuicClientConfig::try_from(tls).expect("a suite for the first packets");
    let mut transport = quinn::TransportConfig::default();
    transport
        .keep_alive_interval(Some(Duration::from_millis(50)))
        .stream_receive_window(stream_window.into());
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    config
}

/// One connection of bare QUIC. Dropping it closes it.
pub(crate) struct Bare {
    pub(crate) conn: quinn::Connection,
}

impl Bare {
    /// Dials from `endpoint`.
    pub(crate) async fn dial(
        endpoint: &quinn::Endpoint,
        server: SocketAddr,
        config: quinn::ClientConfig,
    ) -> Result<Self, quinn::ConnectionError> {
        let connecting = endpoint
            .connect_with(config, server, "any.name")
            .expect("settings that can dial");
        Ok(Self {
            conn: connecting.await?,
        })
    }

    /// Says `$hello` and reads `$welcome`.
    pub(crate) async fn enter(&self, token: &str) -> Stream {
        let mut control = self.stream().await;
        control.write(&hello(token)).await;
        let welcome = control.message().await.expect("admitted");
        assert_eq!(welcome.event(), "$welcome");
        control
    }

    /// A new bidirectional stream; nothing is sent yet.
    pub(crate) async fn stream(&self) -> Stream {
        let (send, recv) = self.conn.open_bi().await.expect("credit for a stream");
        Stream::new(send, recv)
    }

    /// A new channel.
    pub(crate) async fn channel(&self, id: u64, name: &str) -> Stream {
        let mut stream = self.stream().await;
        stream.write(&open(id, name)).await;
        stream
    }
}

/// A stream with its frames cut, for reading what the server says.
pub(crate) struct Stream {
    pub(crate) send: quinn::SendStream,
    pub(crate) recv: quinn::RecvStream,
    decoder: FrameDecoder,
}

/// How the server's direction of a stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    Fin,
    Reset(u64),
    Connection(quinn::ConnectionError),
}

impl Stream {
    pub(crate) fn new(send: quinn::SendStream, recv: quinn::RecvStream) -> Self {
        Self {
            send,
            recv,
            decoder: FrameDecoder::new(2 << 20),
        }
    }

    /// Writes what the server still takes: it may have stopped the stream or closed the connection already.
    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        let _ = self.send.write_chunk(Bytes::copy_from_slice(bytes)).await;
    }

    /// The server's next message, or how its direction ended.
    pub(crate) async fn message(&mut self) -> Result<Message, Ended> {
        loop {
            if let Some(body) = self.decoder.next_frame().expect("the server sends frames") {
                return Ok(Message::decode(body).expect("the server sends messages"));
            }
            match self.recv.read_chunk(64 << 10, true).await {
                Ok(Some(chunk)) => self.decoder.push(chunk.bytes),
                Ok(None) => {
                    self.decoder
                        .finish()
                        .expect("the server sends whole frames");
                    return Err(Ended::Fin);
                }
                Err(quinn::ReadError::Reset(code)) => return Err(Ended::Reset(code.into_inner())),
                Err(quinn::ReadError::ConnectionLost(error)) => {
                    return Err(Ended::Connection(error));
                }
                Err(other) => panic!("reading the server's direction: {other}"),
            }
        }
    }
}
