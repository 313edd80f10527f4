//! Two states that talk to each other, and what the bytes between them are.

use std::future::poll_fn;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use super::state::{BOTH, ONE, Settings, State, Wait};
use super::wire::{self, Frame, Parameters};
use crate::transport::connection::{ConnectionError, StreamError, Written};
use crate::wire::code::CloseCode;

const IDLE: Duration = Duration::from_secs(30);

fn settings(server: bool) -> Settings {
    Settings {
        server,
        permits: Parameters {
            idle: 30_000,
            data: 1000,
            own_stream: 500,
            peers_stream: 500,
            one_way: 500,
            streams: [2, 1],
            datagram: 1472,
            record: 65_535,
        },
        idle: IDLE,
        keep_alive: Duration::from_secs(10),
        send_window: 1 << 20,
    }
}

/// A client and a server, and the time.
struct Pair {
    client: State,
    server: State,
    now: Instant,
}

impl Pair {
    /// After their first records.
    fn new() -> Self {
        let now = Instant::now();
        let mut pair = Self {
            client: State::new(settings(false), now),
            server: State::new(settings(true), now),
            now,
        };
        pair.talk();
        pair
    }

    /// Hands records to and fro until nobody has more to say.
    fn talk(&mut self) {
        loop {
            let to_server = self.client.record(self.now);
            let to_client = self.server.record(self.now);
            if to_server.is_none() && to_client.is_none() {
                return;
            }
            if let Some(record) = to_server {
                self.server.receive(record, self.now).unwrap();
            }
            if let Some(record) = to_client {
                self.client.receive(record, self.now).unwrap();
            }
        }
    }
}

fn open(state: &mut State, way: usize) -> Option<u64> {
    match state.open(way).unwrap() {
        Wait::Done(id) => Some(id),
        Wait::Not => None,
    }
}

fn accept(state: &mut State, way: usize) -> Option<u64> {
    match state.accept(way).unwrap() {
        Wait::Done(id) => Some(id),
        Wait::Not => None,
    }
}

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

/// How many bytes were taken.
fn write(state: &mut State, id: u64, length: usize) -> Result<usize, StreamError> {
    let mut chunks = [Bytes::from(vec![7; length])];
    match state.poll_write(id, &cx(), &mut chunks) {
        Poll::Ready(written) => {
            let Written { bytes, chunks: all } = written?;
            assert_eq!(bytes + chunks[0].len(), length);
            assert_eq!(all == 1, bytes == length);
            Ok(bytes)
        }
        Poll::Pending => Ok(0),
    }
}

/// How many bytes are there; `None` at the end.
fn read(state: &mut State, id: u64) -> Result<Option<usize>, StreamError> {
    let mut chunks = [const { Bytes::new() }; 8];
    match state.poll_read(id, &cx(), &mut chunks) {
        Poll::Ready(Ok(count)) => {
            Ok(count.map(|count| chunks[..count].iter().map(Bytes::len).sum()))
        }
        Poll::Ready(Err(error)) => Err(error),
        Poll::Pending => Ok(Some(0)),
    }
}

/// A record of these frames.
fn record(build: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut bytes = BytesMut::new();
    build(&mut bytes);
    bytes.freeze()
}

#[test]
fn a_stream_is_as_long_as_its_credit_until_it_is_read() {
    let mut pair = Pair::new();
    let id = open(&mut pair.client, BOTH).unwrap();
    assert_eq!(id, 0);
    assert_eq!(write(&mut pair.client, id, 600).unwrap(), 500);
    assert_eq!(write(&mut pair.client, id, 100).unwrap(), 0);
    pair.talk();
    assert_eq!(write(&mut pair.client, id, 100).unwrap(), 0);
    assert_eq!(accept(&mut pair.server, BOTH), Some(0));
    assert_eq!(read(&mut pair.server, id).unwrap(), Some(500));
    pair.talk();
    assert_eq!(write(&mut pair.client, id, 600).unwrap(), 500);
    pair.client.finish(id);
    pair.talk();
    assert_eq!(read(&mut pair.server, id).unwrap(), Some(500));
    assert_eq!(read(&mut pair.server, id).unwrap(), None);
}

#[test]
fn a_stream_that_nobody_reads_leaves_the_others_their_share() {
    let mut pair = Pair::new();
    let stuck = open(&mut pair.client, BOTH).unwrap();
    let read_one = open(&mut pair.client, BOTH).unwrap();
    assert_eq!(write(&mut pair.client, stuck, 5000).unwrap(), 500);
    for _ in 0..20 {
        assert_eq!(write(&mut pair.client, read_one, 400).unwrap(), 400);
        pair.talk();
        assert_eq!(read(&mut pair.server, read_one).unwrap(), Some(400));
        pair.talk();
    }
}

#[test]
fn the_credit_of_all_streams_bounds_what_is_unread() {
    let mut pair = Pair::new();
    pair.client.set_receive_window(100);
    for state in [&mut pair.client, &mut pair.server] {
        state.permit(BOTH, 8);
    }
    pair.talk();
    let ids: Vec<_> = (0..3)
        .filter_map(|_| open(&mut pair.client, BOTH))
        .collect();
    let taken: usize = ids
        .iter()
        .map(|id| write(&mut pair.client, *id, 500).unwrap())
        .sum();
    assert_eq!(taken, 1000);
    pair.talk();
    // A reset gives back what was not sent, a stop what was not read.
    pair.server.stop(ids[0], 5);
    pair.talk();
    assert!(write(&mut pair.client, ids[2], 500).unwrap() > 0);
    let error = write(&mut pair.client, ids[0], 1).unwrap_err();
    assert_eq!(error, StreamError::Peer(CloseCode::new(5)));
}

#[test]
fn the_peer_may_open_another_stream_when_one_is_over() {
    let mut pair = Pair::new();
    let first = open(&mut pair.client, BOTH).unwrap();
    assert!(open(&mut pair.client, BOTH).is_some());
    assert!(open(&mut pair.client, BOTH).is_none());
    pair.client.release_send(first);
    pair.talk();
    assert_eq!(read(&mut pair.server, first).unwrap(), None);
    pair.server.release_recv(first);
    pair.talk();
    assert!(open(&mut pair.client, BOTH).is_none(), "half of it is open");
    pair.server.release_send(first);
    pair.talk();
    assert!(open(&mut pair.client, BOTH).is_some());
}

#[test]
fn one_way_streams_go_one_way_and_have_a_credit_of_their_own() {
    let mut pair = Pair::new();
    let id = open(&mut pair.server, ONE).unwrap();
    assert_eq!(id, 3);
    assert!(open(&mut pair.server, ONE).is_none());
    write(&mut pair.server, id, 9).unwrap();
    pair.server.release_send(id);
    pair.talk();
    assert_eq!(accept(&mut pair.client, ONE), Some(3));
    assert_eq!(read(&mut pair.client, id).unwrap(), Some(9));
    assert_eq!(read(&mut pair.client, id).unwrap(), None);
    pair.client.release_recv(id);
    pair.talk();
    assert!(open(&mut pair.server, ONE).is_some());
}

#[test]
fn what_is_urgent_is_in_the_next_record_whatever_waits() {
    let mut pair = Pair::new();
    let wide = Parameters {
        data: 10 << 20,
        peers_stream: 1 << 20,
        streams: [4, 0],
        ..settings(true).permits
    };
    let mut client = State::new(settings(false), pair.now);
    client
        .receive(record(|bytes| wide.encode(bytes)), pair.now)
        .unwrap();
    pair.client = client;
    pair.client.record(pair.now);
    let [bulk, normal, high] = [(); 3].map(|()| open(&mut pair.client, BOTH).unwrap());
    for (id, priority) in [(bulk, -1), (normal, 0), (high, 1)] {
        pair.client.set_priority(id, priority);
    }
    assert_eq!(write(&mut pair.client, bulk, 200_000).unwrap(), 200_000);
    let first = |state: &mut State| {
        let mut bytes = state.record(pair.now).unwrap();
        loop {
            if let Frame::Stream { id, .. } = wire::next(&mut bytes).unwrap().unwrap() {
                return id;
            }
        }
    };
    assert_eq!(first(&mut pair.client), bulk);
    write(&mut pair.client, normal, 10).unwrap();
    write(&mut pair.client, high, 10).unwrap();
    assert_eq!(first(&mut pair.client), high);
    assert_eq!(first(&mut pair.client), bulk);
}

#[test]
fn an_end_is_confirmed_by_an_answer_that_comes_behind_it() {
    let mut pair = Pair::new();
    let id = open(&mut pair.client, BOTH).unwrap();
    write(&mut pair.client, id, 10).unwrap();
    pair.client.finish(id);
    let record = pair.client.record(pair.now).unwrap();
    assert!(pair.client.poll_stopped(id, &cx()).is_pending());
    pair.server.receive(record, pair.now).unwrap();
    assert!(pair.client.poll_stopped(id, &cx()).is_pending());
    pair.talk();
    assert_eq!(
        pair.client.poll_stopped(id, &cx()),
        Poll::Ready(Ok::<_, StreamError>(None))
    );
}

#[test]
fn resets_and_stops_carry_their_codes() {
    let mut pair = Pair::new();
    let id = open(&mut pair.client, BOTH).unwrap();
    write(&mut pair.client, id, 10).unwrap();
    pair.talk();
    pair.client.reset(id, 0x32);
    pair.talk();
    let error = read(&mut pair.server, id).unwrap_err();
    assert_eq!(error, StreamError::Peer(CloseCode::SLOW_PEER));
    assert_eq!(write(&mut pair.server, id, 1).unwrap(), 1);
    pair.client.stop(id, 0x42);
    pair.talk();
    assert_eq!(
        pair.server.poll_stopped(id, &cx()),
        Poll::Ready(Ok::<_, StreamError>(Some(CloseCode::CANCELLED)))
    );
    for half in [State::release_send, State::release_recv] {
        half(&mut pair.client, id);
        half(&mut pair.server, id);
    }
    pair.talk();
    assert!(write(&mut pair.client, id, 1).is_err());
    assert_eq!(pair.client.error(), None);
    assert_eq!(pair.server.error(), None);
}

#[test]
fn a_close_is_the_next_record_and_carries_code_and_text() {
    let mut pair = Pair::new();
    let id = open(&mut pair.client, BOTH).unwrap();
    write(&mut pair.client, id, 10).unwrap();
    pair.client.close(CloseCode::SHUTTING_DOWN, "going");
    let record = pair.client.record(pair.now).unwrap();
    assert_eq!(record.as_ref(), b"\x1d\x01\x05going");
    assert_eq!(pair.client.record(pair.now), None);
    pair.server.receive(record, pair.now).unwrap();
    match pair.server.error() {
        Some(ConnectionError::Peer(reason)) => {
            assert_eq!(reason.code, CloseCode::SHUTTING_DOWN);
            assert_eq!(reason.text, "going");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_silent_peer_is_asked_and_then_given_up() {
    let mut pair = Pair::new();
    let begun = pair.now;
    let due = pair.client.look(begun).unwrap();
    assert_eq!(due - begun, Duration::from_secs(10));
    assert!(pair.client.record(due - Duration::from_millis(1)).is_none());
    let mut ping = pair.client.record(due).unwrap();
    assert!(matches!(wire::next(&mut ping), Ok(Some(Frame::Ping(_)))));
    // The idle time begins anew with the first word after the last that came.
    let over = pair.client.look(due).unwrap();
    assert_eq!(over - due, IDLE);
    assert_eq!(pair.client.look(over), None);
    assert_eq!(pair.client.error(), Some(&ConnectionError::TimedOut));
}

#[test]
fn datagrams_wait_for_room_and_the_oldest_that_nobody_reads_is_dropped() {
    let mut pair = Pair::new();
    let one = Bytes::from(vec![1; 1400]);
    let sent = (0..100)
        .take_while(|_| pair.client.send_datagram(&one))
        .count();
    assert_eq!(sent, (16 << 10) / 1400);
    pair.talk();
    assert!(pair.client.send_datagram(&one));
    for _ in 0..100 {
        pair.client.send_datagram(&one);
        pair.talk();
    }
    let mut held = 0;
    while pair.server.read_datagram().is_some() {
        held += 1;
    }
    assert_eq!(held, (64 << 10) / 1400);
}

#[test]
fn small_pieces_share_memory_and_come_out_in_order() {
    let mut pair = Pair::new();
    pair.server.set_receive_window(1 << 20);
    let id = open(&mut pair.client, BOTH).unwrap();
    for byte in 0..100_u8 {
        let mut chunks = [Bytes::from(vec![byte])];
        let written = pair.client.poll_write(id, &cx(), &mut chunks);
        assert!(written.is_ready());
        let record = pair.client.record(pair.now).unwrap();
        pair.server.receive(record, pair.now).unwrap();
    }
    let mut all = Vec::new();
    let mut pieces = 0;
    while all.len() < 100 {
        let read = pair.server.poll_read_some(id, &cx(), 1000);
        let Poll::Ready(Ok(Some(piece))) = read else {
            panic!("{read:?}");
        };
        all.extend_from_slice(&piece);
        pieces += 1;
    }
    assert_eq!(all, (0..100).collect::<Vec<u8>>());
    assert!(pieces < 20, "{pieces}");
}

/// What a peer may not do, and the code that it is told.
#[test]
fn a_peer_that_breaks_the_rules_is_told_which() {
    type Build = fn(&mut BytesMut);
    let cases: &[(&str, u64, Build)] = &[
        ("parameters twice", 0x0a, |b| {
            settings(false).permits.encode(b)
        }),
        ("a frame of unknown type", 0x07, |b| b.extend([0x21, 0])),
        ("a type cut short", 0x07, |b| b.extend([0xc0, 0])),
        ("a stream frame cut short", 0x07, |b| {
            b.extend([0x0e, 0, 0, 9, 1])
        }),
        ("a stream beyond the last offset", 0x07, |b| {
            wire::put_stream(b, 0, (1 << 62) - 1, 1, false);
            b.extend([1]);
        }),
        ("a gap", 0x0a, |b| {
            wire::put_stream(b, 0, 1, 1, false);
            b.extend([1]);
        }),
        ("bytes again", 0x0a, |b| {
            for _ in 0..2 {
                wire::put_stream(b, 0, 0, 1, false);
                b.extend([1]);
            }
        }),
        ("data behind the end", 0x06, |b| {
            wire::put_stream(b, 0, 0, 0, true);
            wire::put_stream(b, 0, 0, 1, false);
            b.extend([1]);
        }),
        ("more than a stream's window", 0x03, |b| {
            wire::put_stream(b, 0, 0, 501, false);
            b.extend([0; 501]);
        }),
        ("more than the connection's window", 0x03, |b| {
            for id in [0, 4, 2] {
                wire::put_stream(b, id, 0, 400, false);
                b.extend([0; 400]);
            }
        }),
        ("too many streams", 0x04, |b| {
            wire::put_stream(b, 8, 0, 0, true)
        }),
        ("too many one-way streams", 0x04, |b| {
            wire::put_stream(b, 6, 0, 0, true);
        }),
        ("a stream of the largest number", 0x04, |b| {
            wire::put_stream(b, (1 << 62) - 4, 0, 0, true);
        }),
        ("a stream of ours that we did not open", 0x05, |b| {
            wire::put_stream(b, 1, 0, 0, true);
        }),
        ("data on our one-way stream", 0x05, |b| {
            wire::put_stream(b, 3, 0, 0, true);
        }),
        ("a stop of its own one-way stream", 0x05, |b| {
            wire::put_stop(b, 2, 0);
        }),
        ("credit for its own one-way stream", 0x05, |b| {
            wire::put_max_stream_data(b, 2, 9);
        }),
        ("a reset behind what was not sent", 0x06, |b| {
            wire::put_reset(b, 0, 0, 1);
        }),
        ("a reset that moves the end", 0x06, |b| {
            wire::put_stream(b, 0, 0, 3, true);
            b.extend([1, 2, 3]);
            wire::put_reset(b, 0, 0, 2);
        }),
        ("too many streams to come", 0x07, |b| {
            b.extend([0x12, 0xd0, 0, 0, 0, 0, 0, 0, 1]);
        }),
        ("a ping twice", 0x0a, |b| {
            wire::put_ping(b, false, 9);
            wire::put_ping(b, false, 9);
        }),
        ("an answer to no ping", 0x0a, |b| {
            wire::put_ping(b, true, 77)
        }),
        ("a datagram that is too large", 0x0a, |b| {
            wire::put_datagram(b, &[0; 1470]);
        }),
        ("a datagram cut short", 0x07, |b| b.extend([0x31, 5, 1])),
        ("a close with too much text", 0x07, |b| {
            wire::put_close(b, true, 0, &"x".repeat(1025));
        }),
        ("a close cut short", 0x07, |b| b.extend([0x1d, 0, 5, b'x'])),
    ];
    for (name, code, build) in cases {
        let mut pair = Pair::new();
        let fault = pair.server.receive(record(build), pair.now).unwrap_err();
        assert_eq!(fault.code, *code, "{name}");
    }
}

#[test]
fn the_first_record_must_say_what_is_permitted_and_sensibly() {
    let cases: &[(&str, u64, &[u8])] = &[
        ("something else first", 0x0a, b"\x00\x08\x00"),
        (
            "a ping first",
            0x0a,
            b"\xf4\x8c\x67\x52\x9e\xf8\xc7\xbd\x00",
        ),
        ("a parameter twice", 0x08, b"\x04\x01\x05\x04\x01\x05"),
        ("a parameter of QUIC alone", 0x08, b"\x03\x02\x44\xb0"),
        ("a connection id", 0x08, b"\x0f\x00"),
        ("a value cut short", 0x08, b"\x04\x02\x80\x00"),
        ("a value too long", 0x08, b"\x04\x02\x01\x01"),
        ("a length too long", 0x08, b"\x04\x05\x01"),
        (
            "a record too small",
            0x08,
            b"\xc5\x71\xc5\x94\x29\xcd\x08\x45\x01\x09",
        ),
        (
            "too many streams",
            0x08,
            b"\x08\x08\xd0\x00\x00\x00\x00\x00\x00\x01",
        ),
    ];
    for (name, code, bytes) in cases {
        let now = Instant::now();
        let mut server = State::new(settings(true), now);
        let record = match name.ends_with("first") {
            true => Bytes::from_static(bytes),
            false => record(|record| {
                record.extend_from_slice(b"\xff\x51\x53\x30\x0d\x0a\x0d\x0a");
                record.extend_from_slice(&[bytes.len() as u8]);
                record.extend_from_slice(bytes);
            }),
        };
        let fault = server.receive(record, now).unwrap_err();
        assert_eq!(fault.code, *code, "{name}");
    }
    // What is not known is an extension's.
    let now = Instant::now();
    let mut server = State::new(settings(true), now);
    let known = b"\xff\x51\x53\x30\x0d\x0a\x0d\x0a\x06\x40\x99\x00\x04\x01\x05";
    server.receive(Bytes::from_static(known), now).unwrap();
    assert!(server.is_begun());
}

#[tokio::test(start_paused = true)]
async fn a_close_arrives_behind_what_was_sent_and_closed_waits_for_it() {
    use super::{Connection, Ends, Side, upgraded};
    use crate::trust::origin::Transport;
    use crate::wire::config::{Limits, Timeouts};
    let (here, there) = tokio::io::duplex(1000);
    let tasks = tokio_util::task::TaskTracker::new();
    let ends = Ends {
        local: None,
        remote: ([127, 0, 0, 1], 1).into(),
        transport: Transport::WebSocket { origin: None },
    };
    let (limits, timeouts) = (Limits::default(), Timeouts::default());
    let terms = (&limits, &timeouts);
    let here = upgraded(here, Side::Client).await;
    let client = Connection::begin(here, Side::Client, ends.clone(), terms, &tasks);
    let there = upgraded(there, Side::Server).await;
    let server = Connection::begin(there, Side::Server, ends, terms, &tasks);
    client.begun().await.unwrap();
    let (mut send, mut reply) = client.open_bi().await.unwrap();
    send.write_all(&mut [Bytes::from(vec![1; 10_000])])
        .await
        .unwrap();
    let (mut answer, mut recv) = server.accept_bi().await.unwrap();
    let mut got = 0;
    while got < 10_000 {
        got += recv.read(4000).await.unwrap().unwrap().len();
    }
    answer
        .write_all(&mut [Bytes::from_static(b"yes")])
        .await
        .unwrap();
    answer.finish();
    assert_eq!(answer.stopped().await, Ok(None));
    server.close(CloseCode::SHUTTING_DOWN, "bye");
    assert_eq!(server.closed().await, ConnectionError::Local);
    // Whatever came before the end can still be read.
    assert_eq!(reply.read(9).await.unwrap().unwrap().as_ref(), b"yes");
    match client.closed().await {
        ConnectionError::Peer(reason) => assert_eq!(reason.text, "bye"),
        other => panic!("{other:?}"),
    }
    let error = poll_fn(|cx| send.poll_write(cx, &mut [Bytes::from_static(b"x")])).await;
    assert!(matches!(error, Err(StreamError::Lost(_))));
    tasks.close();
    tasks.wait().await;
}

/// The table of `docs/PROTOCOL.md`, row by row.
#[test]
fn the_documents_records_are_ours() {
    let served = Parameters {
        idle: 30_000,
        data: 16 << 10,
        own_stream: 8 << 20,
        peers_stream: 8 << 20,
        one_way: 8 << 20,
        streams: [4, 0],
        datagram: 1472,
        record: 65_535,
    };
    let ours: [Bytes; 12] = [
        record(|b| served.encode(b)),
        record(|b| {
            wire::put_stream(b, 0, 0, 2, false);
            b.extend_from_slice(b"ab");
        }),
        record(|b| wire::put_stream(b, 4, 300, 0, true)),
        record(|b| wire::put_reset(b, 4, 0x32, 5)),
        record(|b| wire::put_stop(b, 4, 0x42)),
        record(|b| wire::put_max_data(b, 65_536)),
        record(|b| wire::put_max_stream_data(b, 4, 1000)),
        record(|b| {
            wire::put_max_streams(b, false, 7);
            wire::put_max_streams(b, true, 2);
        }),
        record(|b| {
            wire::put_ping(b, false, 5);
            wire::put_ping(b, true, 5);
        }),
        record(|b| wire::put_datagram(b, b"\x92\xa2at\x05")),
        record(|b| wire::put_close(b, true, 0x21, "no")),
        record(|b| wire::put_close(b, false, 3, "x")),
    ];
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/PROTOCOL.md");
    let text = std::fs::read_to_string(path).unwrap();
    let table = text
        .split("| record | bytes |\n| --- | --- |\n")
        .nth(1)
        .unwrap();
    let rows: Vec<_> = table
        .lines()
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').rsplit_once('|').unwrap())
        .collect();
    assert_eq!(rows.len(), ours.len());
    for ((what, bytes), mut made) in rows.into_iter().zip(ours) {
        let hex: Vec<_> = made.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex.join(" "), bytes.trim().trim_matches('`'), "{what}");
        while wire::next(&mut made).unwrap().is_some() {}
    }
    // And parameters are read back as they were.
    let mut made = record(|b| served.encode(b));
    assert_eq!(wire::next(&mut made), Ok(Some(Frame::Parameters(served))));
}
