//! What a client over TCP may send that is not as it should be, behind the HTTP handshake: each is told its code or dropped, in
//! bounded time, and others are served meanwhile and afterwards.

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{TOKEN, server};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use udpack::testing::Net;
use udpack::{Channel, Client, CloseCode, Drain, Limits, Server};

/// How a connection must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// A fault of the transport, with this code of QUIC.
    Fault(u64),
    /// A close of the protocol.
    Close(CloseCode),
    /// Without a word: nothing that is said would be understood.
    Dropped,
}

/// What is sent.
enum Input {
    /// Bytes in place of WebSocket frames.
    Raw(Vec<u8>),
    /// Messages.
    Messages(Vec<Message>),
    /// Records behind one with transport parameters, each a message.
    Records(Vec<Vec<u8>>),
}

use Input::{Messages, Raw, Records};

/// Transport parameters that permit much: 1 MiB in all and for each stream, 8 streams both ways, 1 one way.
const PARAMETERS: &[u8] = b"\xff\x51\x53\x30\x0d\x0a\x0d\x0a\x1a\
    \x04\x04\x80\x10\x00\x00\x05\x04\x80\x10\x00\x00\x06\x04\x80\x10\x00\x00\x08\x01\x08\x09\x01\x01\x20\x02";

fn parameters() -> Vec<u8> {
    let mut bytes = PARAMETERS.to_vec();
    bytes.extend([0x45, 0xc0]);
    bytes[8] = (bytes.len() - 9) as u8;
    bytes
}

/// A STREAM frame with offset and length.
fn stream(id: u8, offset: u8, data: &[u8], fin: bool) -> Vec<u8> {
    let mut bytes = vec![0x0e | u8::from(fin), id, offset];
    bytes.extend((0x8000_0000 | data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// A frame of the protocol.
fn frame(body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_be_bytes().to_vec();
    bytes.extend(body);
    bytes
}

/// `$hello` with this token.
fn hello(token: &str) -> Vec<u8> {
    let mut body = b"\x92\xa6$hello\x83\xa1v\x01\xa5token\xd9".to_vec();
    body.push(token.len() as u8);
    body.extend(token.as_bytes());
    body.extend(b"\xa5agent\xa1x");
    frame(&body)
}

/// A frame of WebSocket from a client, its mask being 0.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first, 0x80 | payload.len() as u8, 0, 0, 0, 0];
    bytes.extend(payload);
    bytes
}

fn ping(number: u8) -> Vec<u8> {
    let mut bytes = b"\xf4\x8c\x67\x52\x9e\xf8\xc7\xbd".to_vec();
    bytes.push(number);
    bytes
}

fn cases() -> Vec<(&'static str, Input, End)> {
    use End::{Close, Dropped, Fault};
    let record = |bytes: &[u8]| Records(vec![bytes.to_vec()]);
    let mut second = parameters();
    second.extend(stream(0, 0, &hello(TOKEN), false));
    vec![
        // Below QMux.
        ("bytes that are no frame", Raw(vec![0xff; 64]), Dropped),
        ("a reserved opcode", Raw(masked(0x83, b"x")), Dropped),
        ("a reserved bit", Raw(masked(0xc2, b"x")), Dropped),
        (
            "a frame without a mask",
            Raw(b"\x82\x01x".to_vec()),
            Dropped,
        ),
        (
            "a continuation of nothing",
            Raw(masked(0x80, b"x")),
            Dropped,
        ),
        ("a ping in fragments", Raw(masked(0x09, b"x")), Dropped),
        (
            "a ping that is too long",
            Raw([b"\x89\xfe\x00\x7e".as_slice(), &[0; 130]].concat()),
            Dropped,
        ),
        (
            "a frame that is too long",
            Raw(b"\x82\xff\x00\x00\x00\x00\x00\x01\x00\x00\0\0\0\0".to_vec()),
            Dropped,
        ),
        (
            "a length of 2^63",
            Raw(b"\x82\xff\x80\x00\x00\x00\x00\x00\x00\x00\0\0\0\0".to_vec()),
            Dropped,
        ),
        (
            "fragments that are too long",
            Raw([
                masked(0x02, &[0; 100]),
                b"\x00\xfe\xff\xff\0\0\0\0".to_vec(),
                vec![0; 65_535],
            ]
            .concat()),
            Dropped,
        ),
        (
            "a close with half a code",
            Raw(masked(0x88, b"\x03")),
            Dropped,
        ),
        (
            "a close at once",
            Messages(vec![Message::Close(None)]),
            Dropped,
        ),
        (
            "a message of text",
            Messages(vec![Message::text("hello")]),
            Fault(0x0a),
        ),
        // QMux: the first record.
        ("nothing", Messages(vec![]), Close(CloseCode::NORMAL)),
        (
            "empty messages",
            Messages(vec![Message::binary(Bytes::new()); 100]),
            Close(CloseCode::NORMAL),
        ),
        (
            "no parameters",
            Messages(vec![Message::binary(ping(1))]),
            Fault(0x0a),
        ),
        (
            "parameters that are cut short",
            Messages(vec![Message::binary(parameters()[..20].to_vec())]),
            Fault(0x07),
        ),
        (
            "parameters of QUIC alone",
            Messages(vec![Message::binary(
                b"\xff\x51\x53\x30\x0d\x0a\x0d\x0a\x02\x0f\x00".to_vec(),
            )]),
            Fault(0x08),
        ),
        ("parameters twice", record(&parameters()), Fault(0x0a)),
        // Its frames.
        ("a frame of unknown type", record(b"\x40\x99"), Fault(0x07)),
        (
            "a frame that is cut short",
            record(b"\x0e\x00\x00\x09x"),
            Fault(0x07),
        ),
        ("a gap", record(&stream(0, 9, b"x", false)), Fault(0x0a)),
        (
            "the same bytes twice",
            Records(vec![stream(0, 0, b"x", false); 2]),
            Fault(0x0a),
        ),
        (
            "data behind the end",
            Records(vec![stream(4, 0, b"x", true), stream(4, 1, b"x", false)]),
            Fault(0x06),
        ),
        (
            "a reset behind what was sent",
            record(b"\x04\x04\x00\x09"),
            Fault(0x06),
        ),
        (
            "more than an unknown client may send",
            record(&stream(0, 0, &[0; 16_385], false)),
            Fault(0x03),
        ),
        (
            "one stream too many",
            record(&stream(16, 0, b"", false)),
            Fault(0x04),
        ),
        (
            "a one-way stream before admission",
            record(&stream(2, 0, b"x", true)),
            Fault(0x04),
        ),
        (
            "a stream of the server",
            record(&stream(1, 0, b"x", true)),
            Fault(0x05),
        ),
        (
            "a stop of what it sends itself",
            record(b"\x05\x02\x00"),
            Fault(0x05),
        ),
        (
            "an answer to a ping that never was",
            record(b"\xf4\x8c\x67\x52\x9e\xf8\xc7\xbe\x3f"),
            Fault(0x0a),
        ),
        (
            "a ping that goes back",
            Records(vec![ping(2), ping(1)]),
            Fault(0x0a),
        ),
        (
            "a datagram that is too large",
            record(&[b"\x30".as_slice(), &[0; 1472]].concat()),
            Fault(0x0a),
        ),
        (
            "a close with too much text",
            record(&[b"\x1d\x00\x44\x01".as_slice(), &[b'x'; 1025]].concat()),
            Fault(0x07),
        ),
        // What is sound, but never comes to a hello.
        (
            "pings without end",
            Records((0..60).map(ping).collect()),
            Close(CloseCode::AUTH_TIMEOUT),
        ),
        (
            "padding",
            Records(vec![vec![0; 60_000]; 20]),
            Close(CloseCode::AUTH_TIMEOUT),
        ),
        (
            "credit without end",
            Records(vec![b"\x10\xbf\xff\xff\xff".to_vec(); 200]),
            Close(CloseCode::AUTH_TIMEOUT),
        ),
        (
            "datagrams before admission",
            Records(vec![[b"\x30".as_slice(), &[0; 1000]].concat(); 200]),
            Close(CloseCode::AUTH_TIMEOUT),
        ),
        (
            "streams that wait for admission",
            record(&[stream(0, 0, b"", false), stream(12, 0, b"x", true)].concat()),
            Close(CloseCode::AUTH_TIMEOUT),
        ),
        // Sound, and against the protocol above.
        (
            "a hello that is none",
            record(&stream(0, 0, &frame(b"\x92\xa1x\xc0"), false)),
            Close(CloseCode::AUTH_REQUIRED),
        ),
        (
            "a frame of length 0",
            record(&stream(0, 0, &[0; 4], false)),
            Close(CloseCode::BAD_FRAME),
        ),
        (
            "a frame that is too large",
            record(&stream(0, 0, &[0, 1, 0, 0], false)),
            Close(CloseCode::FRAME_TOO_LARGE),
        ),
        (
            "a control stream that ends",
            record(&stream(0, 0, b"", true)),
            Close(CloseCode::TRUNCATED),
        ),
        (
            "a control stream that is reset",
            record(b"\x04\x00\x00\x00"),
            Close(CloseCode::TRUNCATED),
        ),
        (
            "a wrong token",
            record(&stream(0, 0, &hello("wrong"), false)),
            Close(CloseCode::AUTH_FAILED),
        ),
        (
            "parameters and a hello twice",
            Messages(vec![Message::binary(second.clone()); 2]),
            Fault(0x0a),
        ),
    ]
}

async fn hand_over(server: &Server) -> DuplexStream {
    let (here, there) = duplex(256 << 10);
    let from = ([192, 0, 2, 7], 1).into();
    server.take_websocket(there, from, None).await;
    here
}

/// Sends this, and says how the server ends the connection.
async fn fate(server: &Server, input: Input) -> End {
    let mut pipe = hand_over(server).await;
    let messages = match input {
        Raw(bytes) => {
            pipe.write_all(&bytes).await.expect("room");
            let mut all = Vec::new();
            let read = tokio::time::timeout(Duration::from_secs(60), pipe.read_to_end(&mut all));
            read.await.expect("it ends").expect("an orderly end");
            return End::Dropped;
        }
        Messages(messages) => messages,
        Records(records) => {
            let first = std::iter::once(parameters());
            first.chain(records).map(Message::binary).collect()
        }
    };
    let socket = WebSocketStream::from_raw_socket(pipe, Role::Client, None).await;
    let (mut send, mut recv) = socket.split();
    let sending = async {
        for message in messages {
            if send.send(message).await.is_err() {
                return;
            }
        }
    };
    let hearing = async {
        let mut end = End::Dropped;
        while let Some(Ok(message)) = recv.next().await {
            if let Message::Binary(mut record) = message {
                // The parameters may be in front of the last word.
                if record.starts_with(&PARAMETERS[..8]) {
                    record = record.split_off(9 + usize::from(record[8]));
                }
                let code = |at: usize| match record[at] {
                    // The codes that are expected fit one byte, or two.
                    one @ 0..0x40 => u64::from(one),
                    two => u64::from(two & 0x3f) << 8 | u64::from(record[at + 1]),
                };
                match record.first() {
                    Some(0x1c) => end = End::Fault(code(1)),
                    Some(0x1d) => end = End::Close(CloseCode::new(code(1))),
                    _ => {}
                }
            }
        }
        end
    };
    let both = async { tokio::join!(sending, hearing).1 };
    let ended = tokio::time::timeout(Duration::from_secs(60), both).await;
    ended.expect("the server ends it")
}

/// A client of good will, over UDP or TCP, is let in and answered.
async fn is_served(net: &Net, server: &Server) {
    for choice in [
        udpack::TransportChoice::Quic,
        udpack::TransportChoice::WebSocket,
    ] {
        let client = Client::builder()
            .pin(server.fingerprint())
            .token(TOKEN)
            .transport(choice);
        let socket = net.connect(client, server).await.expect("let in");
        let channel = socket.open("echo").await.expect("a channel");
        let answer: u64 = channel.request("echo", &7_u64).await.expect("an answer");
        assert_eq!(answer, 7);
        socket.close(CloseCode::NORMAL, "").await;
    }
}

async fn serving(net: &Net) -> Server {
    let builder = server()
        .limits(Limits {
            auth_failures: 1000,
            ..Limits::default()
        })
        .channel("echo", |channel: Channel| async move {
            let echo = |n: u64, _: udpack::Context| async move { Ok::<_, udpack::Fault>(n) };
            channel.on("echo", echo).run().await
        });
    net.bind(builder).await.expect("an address")
}

#[tokio::test(start_paused = true)]
async fn whatever_comes_is_told_its_code_and_others_are_served() {
    let net = Net::new(1);
    let server = serving(&net).await;
    let cases = cases();
    assert!(cases.len() >= 30);
    for (name, input, expected) in cases {
        assert_eq!(fate(&server, input).await, expected, "{name}");
        is_served(&net, &server).await;
    }
    let drained = server.run_until(async {}, Drain::within(Duration::from_secs(1)));
    let drained = tokio::time::timeout(Duration::from_secs(20), drained).await;
    drained.expect("nothing is left").expect("it drains");
}

#[tokio::test(start_paused = true)]
async fn who_hangs_up_anywhere_leaves_nothing() {
    let net = Net::new(2);
    let server = serving(&net).await;
    let mut whole = parameters();
    whole.extend(stream(0, 0, &hello(TOKEN), false));
    let bytes = [vec![0x82, 0xfe, 0, whole.len() as u8, 0, 0, 0, 0], whole].concat();
    for cut in (0..=bytes.len()).step_by(7) {
        let mut pipe = hand_over(&server).await;
        pipe.write_all(&bytes[..cut]).await.expect("room");
        drop(pipe);
    }
    is_served(&net, &server).await;
    let mut tries = 0;
    while !server.sockets().is_empty() && tries < 1000 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        tries += 1;
    }
    assert!(server.sockets().is_empty());
}

/// It asks for answers, and takes none: what waits for it stays small, and its time ends.
#[tokio::test(start_paused = true)]
async fn who_takes_no_answers_is_given_up() {
    let net = Net::new(3);
    let server = serving(&net).await;
    let (here, there) = duplex(1000);
    server
        .take_websocket(there, ([192, 0, 2, 7], 1).into(), None)
        .await;
    let mut socket = WebSocketStream::from_raw_socket(here, Role::Client, None).await;
    let first = socket.send(Message::binary(parameters())).await;
    first.expect("taken");
    let mut number = 0_u32;
    let asked = async {
        loop {
            number += 1;
            let mut ping = ping(0);
            ping.pop();
            ping.extend((0x8000_0000 | number).to_be_bytes());
            if socket.send(Message::binary(ping)).await.is_err() {
                return;
            }
            // The server always reads, so nothing else lets the clock go on.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), asked).await;
    assert!(ended.is_ok(), "after {number}");
    is_served(&net, &server).await;
}
