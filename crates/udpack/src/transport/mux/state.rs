//! The state of a connection over a byte stream: its streams, flow control, and the next record. It has no I/O and no
//! clock: the driver passes records and times in, and takes records out.
//!
//! A record is built only when the writer has room for it, so that urgent data never waits behind data that was
//! queued earlier.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use super::wire::{self, Fault, Frame, Parameters, code, fault};
use crate::transport::connection::{ConnectionError, ConnectionStats, StreamError, Written};
use crate::wire::code::{CloseCode, CloseReason, Side};
use crate::wire::config::{DATAGRAMS_IN, DATAGRAMS_OUT};

/// The most bytes of one stream that wait for the writer.
const STREAM_OUT: usize = 256 << 10;
/// The largest record that this side sends, in bytes. Short, because nothing overtakes a record.
const RECORD_OUT: usize = 32 << 10;
/// Room for a ping at the end of a record.
const PING_ROOM: usize = 16;
/// A shorter piece of a stream is copied out of its receive buffer, which is much larger.
const WORTH_KEEPING: usize = 8 << 10;
/// The least size of a buffer for small pieces of a stream, in bytes.
const LEAST_BUFFER: usize = 256;
/// The interval of pings while data is sent.
const PROBE: Duration = Duration::from_secs(1);
/// Round-trip time assumed before the first measurement.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// The settings of a connection.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub(super) server: bool,
    /// The parameters that the first record announces.
    pub(super) permits: Parameters,
    pub(super) idle: Duration,
    pub(super) keep_alive: Duration,
    /// The most bytes of all streams that wait for the writer.
    pub(super) send_window: u64,
}

/// The kinds of streams, as indices.
pub(super) const BOTH: usize = 0;
pub(super) const ONE: usize = 1;

/// The kind of a stream: [`BOTH`] or [`ONE`].
fn way(id: u64) -> usize {
    (id >> 1 & 1) as usize
}

/// The result of a call that may have to wait.
pub(super) enum Wait<T> {
    Done(T),
    /// Not ready; a change wakes the caller.
    Not,
}

#[derive(Debug)]
pub(super) struct State {
    settings: Settings,
    /// The parameters of the peer's first record.
    peer: Option<Parameters>,
    streams: HashMap<u64, Stream>,
    opening: Opening,
    flow: Flow,
    out: Outgoing,
    datagrams_in: VecDeque<Bytes>,
    datagrams_in_bytes: usize,
    alive: Alive,
    stats: ConnectionStats,
    /// Why the connection has ended.
    error: Option<ConnectionError>,
    /// Whether the connection is finished.
    done: bool,
    driver: Option<Waker>,
    /// The changes since they were last taken.
    news: News,
}

/// The notifications to send after the lock is released.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct News {
    /// Whether the peer opened a stream, or this side may open one, for each kind.
    pub(super) accept: [bool; 2],
    pub(super) open: [bool; 2],
    /// Whether a datagram came, or there is room for one.
    pub(super) datagram: bool,
    pub(super) room: bool,
    /// Whether the peer's first record came, or the connection has ended.
    pub(super) turn: bool,
}

/// Counts of opened streams, for each kind.
#[derive(Debug, Default)]
struct Opening {
    /// How many this side has opened, and how many it may open.
    opened: [u64; 2],
    may: [u64; 2],
    /// How many the peer has opened, how many of them have ended, how many it may have at once, and the announced
    /// limit.
    seen: [u64; 2],
    over: [u64; 2],
    permitted: [u64; 2],
    told: [u64; 2],
    /// Streams that the peer opened and the program has not accepted.
    waiting: [VecDeque<u64>; 2],
}

/// Flow control over all streams, in bytes.
#[derive(Debug, Default)]
struct Flow {
    /// Bytes written to streams, and the peer's limit.
    given: u64,
    may: u64,
    /// Streams whose writer waits for credit.
    blocked: Vec<u64>,
    /// Bytes that wait for the writer.
    queued: u64,
    /// Bytes received, bytes read or discarded, the window, and the announced limit.
    received: u64,
    read: u64,
    window: u64,
    told: u64,
}

/// Data that waits to be sent.
#[derive(Debug, Default)]
struct Outgoing {
    begun: bool,
    /// Streams with data, by priority, the highest first.
    ready: BTreeMap<Reverse<i32>, VecDeque<u64>>,
    resets: VecDeque<u64>,
    stops: VecDeque<u64>,
    credits: VecDeque<u64>,
    permits: [bool; 2],
    window: bool,
    datagrams: VecDeque<Bytes>,
    datagram_bytes: usize,
    pong: Option<u64>,
    /// The close: whether it is the application's, its code, its text.
    close: Option<(bool, u64, String)>,
}

/// The state of liveness checks.
#[derive(Debug)]
struct Alive {
    heard: Instant,
    /// When the first record was sent since the last one received.
    since: Option<Instant>,
    /// Whether data was sent since the last ping.
    unprobed: bool,
    probed: Option<Instant>,
    next: u64,
    out: Option<(u64, Instant)>,
    wanted: bool,
    measured: bool,
    asked: Option<u64>,
    /// Ended streams, and the ping whose answer confirms that the peer has received them.
    unconfirmed: VecDeque<(u64, u64)>,
}

#[derive(Debug, Default)]
struct Stream {
    send: Option<Sending>,
    recv: Option<Receiving>,
    /// Whether the peer may already open another stream in its place.
    counted: bool,
}

#[derive(Debug)]
struct Sending {
    queue: VecDeque<Bytes>,
    queued: usize,
    /// Bytes sent, and the peer's limit.
    sent: u64,
    may: u64,
    priority: i32,
    scheduled: bool,
    end: End,
    /// The code with which the peer stopped the stream.
    stopped: Option<u64>,
    /// Whether the program holds a handle.
    held: bool,
    writer: Option<Waker>,
    watcher: Option<Waker>,
}

/// The state of the stream's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    /// The end follows the queued bytes.
    Finishing,
    Finished,
    /// The peer has received everything.
    Confirmed,
    Resetting(u64),
    Reset,
}

#[derive(Debug)]
struct Receiving {
    chunks: VecDeque<Bytes>,
    received: u64,
    read: u64,
    window: u64,
    told: u64,
    credit_queued: bool,
    end: Option<Finish>,
    /// The code with which this side stopped the stream.
    stopped: Option<u64>,
    held: bool,
    /// Whether the program has been told of the end.
    over: bool,
    reader: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finish {
    Fin,
    Reset(u64),
}

impl Sending {
    fn new(may: u64) -> Self {
        Self {
            queue: VecDeque::new(),
            queued: 0,
            sent: 0,
            may,
            priority: 0,
            scheduled: false,
            end: End::Open,
            stopped: None,
            held: true,
            writer: None,
            watcher: None,
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.end, End::Confirmed | End::Reset)
    }

    fn wake(&mut self) {
        wake(&mut self.writer);
        wake(&mut self.watcher);
    }
}

impl Receiving {
    fn new(window: u64) -> Self {
        Self {
            chunks: VecDeque::new(),
            received: 0,
            read: 0,
            window,
            told: window,
            credit_queued: false,
            end: None,
            stopped: None,
            held: true,
            over: false,
            reader: None,
        }
    }

    fn is_over(&self) -> bool {
        self.end.is_some() && (self.over || self.stopped.is_some())
    }

    fn push(&mut self, data: Bytes) {
        if data.len() >= WORTH_KEEPING {
            self.chunks.push_back(data);
            return;
        }
        // Small pieces share a buffer, so that the memory is proportional to the received bytes.
        let last = self.chunks.pop_back();
        let joined = match last.map(Bytes::try_into_mut) {
            Some(Ok(mut last)) if last.capacity() - last.len() >= data.len() => {
                last.extend_from_slice(&data);
                last.freeze()
            }
            Some(last) => {
                let last = last.map_or_else(|bytes| bytes, BytesMut::freeze);
                let room = (2 * last.len()).clamp(LEAST_BUFFER, WORTH_KEEPING);
                self.chunks.push_back(last);
                copied(&data, room.max(data.len()))
            }
            None => Bytes::copy_from_slice(&data),
        };
        self.chunks.push_back(joined);
    }
}

fn copied(data: &[u8], room: usize) -> Bytes {
    let mut bytes = BytesMut::with_capacity(room);
    bytes.extend_from_slice(data);
    bytes.freeze()
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

fn keep(place: &mut Option<Waker>, cx: &Context<'_>) {
    match place {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *place = Some(cx.waker().clone()),
    }
}

impl State {
    pub(super) fn new(settings: Settings, now: Instant) -> Self {
        let permits = settings.permits;
        Self {
            peer: None,
            streams: HashMap::new(),
            opening: Opening {
                permitted: permits.streams,
                told: permits.streams,
                ..Opening::default()
            },
            flow: Flow {
                window: permits.data,
                told: permits.data,
                ..Flow::default()
            },
            out: Outgoing::default(),
            datagrams_in: VecDeque::new(),
            datagrams_in_bytes: 0,
            alive: Alive {
                heard: now,
                since: Some(now),
                unprobed: false,
                probed: None,
                next: 0,
                out: None,
                wanted: true,
                measured: false,
                asked: None,
                unconfirmed: VecDeque::new(),
            },
            stats: ConnectionStats {
                bytes_sent: 0,
                bytes_received: 0,
                datagrams_sent: 0,
                datagrams_received: 0,
                stream_frames_sent: 0,
                packets_sent: 0,
                packets_lost: 0,
                rtt: INITIAL_RTT,
                congestion_window: STREAM_OUT as u64,
                mtu: 0,
            },
            error: None,
            done: false,
            driver: None,
            news: News::default(),
            settings,
        }
    }

    pub(super) fn error(&self) -> Option<&ConnectionError> {
        self.error.as_ref()
    }

    pub(super) fn stats(&self) -> ConnectionStats {
        self.stats
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// Whether the peer's first record has arrived.
    pub(super) fn is_begun(&self) -> bool {
        self.peer.is_some()
    }

    pub(super) fn news(&mut self) -> News {
        std::mem::take(&mut self.news)
    }

    fn is_local(&self, id: u64) -> bool {
        (id & 1 == 1) == self.settings.server
    }

    /// Wakes the driver to send.
    fn work(&mut self) {
        wake(&mut self.driver);
    }

    /// Registers the driver's waker.
    pub(super) fn set_driver(&mut self, cx: &Context<'_>) {
        keep(&mut self.driver, cx);
    }

    // ---- Streams of this side ----

    /// Opens a stream, if the peer permits one more.
    pub(super) fn open(&mut self, way: usize) -> Result<Wait<u64>, ConnectionError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        let Some(peer) = self.peer else {
            return Ok(Wait::Not);
        };
        let opening = &mut self.opening;
        if opening.opened[way] >= opening.may[way] {
            return Ok(Wait::Not);
        }
        let id = opening.opened[way] << 2 | (way as u64) << 1 | u64::from(self.settings.server);
        opening.opened[way] += 1;
        let both = way == BOTH;
        let may = if both {
            peer.peers_stream
        } else {
            peer.one_way
        };
        let recv = both.then(|| Receiving::new(self.settings.permits.own_stream));
        let stream = Stream {
            send: Some(Sending::new(may)),
            recv,
            counted: false,
        };
        self.streams.insert(id, stream);
        Ok(Wait::Done(id))
    }

    /// The next stream that the peer has opened.
    pub(super) fn accept(&mut self, way: usize) -> Result<Wait<u64>, ConnectionError> {
        match self.opening.waiting[way].pop_front() {
            Some(id) => Ok(Wait::Done(id)),
            None => match &self.error {
                Some(error) => Err(error.clone()),
                None => Ok(Wait::Not),
            },
        }
    }

    /// Sets how many streams the peer may have open at once.
    pub(super) fn permit(&mut self, way: usize, streams: u32) {
        self.opening.permitted[way] = streams.into();
        self.permit_more(way);
    }

    fn permit_more(&mut self, way: usize) {
        let opening = &self.opening;
        if opening.permitted[way].saturating_add(opening.over[way]) > opening.told[way] {
            self.out.permits[way] = true;
            self.work();
        }
    }

    pub(super) fn set_receive_window(&mut self, bytes: u64) {
        self.flow.window = bytes;
        self.grant();
    }

    /// Announces more credit to the peer, once it is an eighth of the window.
    fn grant(&mut self) {
        let flow = &self.flow;
        let may = flow.read.saturating_add(flow.window);
        if may.saturating_sub(flow.told) >= (flow.window / 8).max(1) {
            self.out.window = true;
            self.work();
        }
    }

    // ---- Sending ----

    pub(super) fn poll_write(
        &mut self,
        id: u64,
        cx: &Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Written, StreamError>> {
        if let Some(error) = &self.error {
            return Poll::Ready(Err(StreamError::Lost(error.clone())));
        }
        let Some(stream) = self.streams.get_mut(&id).and_then(|s| s.send.as_mut()) else {
            return Poll::Ready(Err(StreamError::Ended));
        };
        if let Some(code) = stream.stopped {
            return Poll::Ready(Err(StreamError::Peer(CloseCode::new(code))));
        }
        if stream.end != End::Open {
            return Poll::Ready(Err(StreamError::Ended));
        }
        let flow = &mut self.flow;
        let credit = stream.may - stream.sent - stream.queued as u64;
        let in_all = flow.may - flow.given;
        let most = STREAM_OUT.min(usize::try_from(self.settings.send_window).unwrap_or(STREAM_OUT));
        let room = match stream.queued > 0 && flow.queued >= self.settings.send_window {
            true => 0,
            false => most.saturating_sub(stream.queued),
        };
        let mut left =
            usize::try_from(credit.min(in_all)).map_or(room, |allowed| allowed.min(room));
        let mut written = Written {
            bytes: 0,
            chunks: 0,
        };
        for chunk in &mut *chunks {
            if chunk.len() > left {
                if left > 0 {
                    stream.queue.push_back(chunk.split_to(left));
                    written.bytes += left;
                }
                break;
            }
            left -= chunk.len();
            written.bytes += chunk.len();
            written.chunks += 1;
            let whole = std::mem::take(chunk);
            if !whole.is_empty() {
                stream.queue.push_back(whole);
            }
        }
        if written.bytes == 0 && written.chunks < chunks.len() {
            keep(&mut stream.writer, cx);
            if in_all == 0 && !flow.blocked.contains(&id) {
                flow.blocked.push(id);
            }
            return Poll::Pending;
        }
        stream.queued += written.bytes;
        flow.given += written.bytes as u64;
        flow.queued += written.bytes as u64;
        if written.bytes > 0 {
            self.schedule(id);
        }
        Poll::Ready(Ok(written))
    }

    fn schedule(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id).and_then(|s| s.send.as_mut())
            && !stream.scheduled
        {
            stream.scheduled = true;
            let level = self.out.ready.entry(Reverse(stream.priority));
            level.or_default().push_back(id);
        }
        self.work();
    }

    pub(super) fn set_priority(&mut self, id: u64, priority: i32) {
        if let Some(stream) = self.sending(id) {
            stream.priority = priority;
        }
    }

    fn sending(&mut self, id: u64) -> Option<&mut Sending> {
        self.streams.get_mut(&id)?.send.as_mut()
    }

    fn receiving(&mut self, id: u64) -> Option<&mut Receiving> {
        self.streams.get_mut(&id)?.recv.as_mut()
    }

    pub(super) fn finish(&mut self, id: u64) {
        if let Some(stream) = self.sending(id)
            && stream.end == End::Open
            && stream.stopped.is_none()
        {
            stream.end = End::Finishing;
            self.schedule(id);
        }
    }

    pub(super) fn reset(&mut self, id: u64, code: u64) {
        if let Some(stream) = self.sending(id)
            && matches!(stream.end, End::Open | End::Finishing | End::Finished)
        {
            stream.end = End::Resetting(code);
            self.unqueue(id);
            self.out.resets.push_back(id);
            self.work();
        }
    }

    /// Discards the queued bytes of a stream.
    fn unqueue(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id).and_then(|s| s.send.as_mut()) {
            let dropped = std::mem::take(&mut stream.queued) as u64;
            stream.queue.clear();
            self.flow.queued -= dropped;
            self.flow.given -= dropped;
            if dropped > 0 {
                self.unblock();
            }
        }
    }

    /// Wakes writers when there is credit over all streams again.
    fn unblock(&mut self) {
        for id in std::mem::take(&mut self.flow.blocked) {
            if let Some(stream) = self.sending(id) {
                wake(&mut stream.writer);
            }
        }
    }

    /// The program has dropped the sending side of a stream.
    pub(super) fn release_send(&mut self, id: u64) {
        self.finish(id);
        if let Some(stream) = self.sending(id) {
            stream.held = false;
            stream.writer = None;
        }
        self.tidy(id);
    }

    pub(super) fn poll_stopped(
        &mut self,
        id: u64,
        cx: &Context<'_>,
    ) -> Poll<Result<Option<CloseCode>, StreamError>> {
        let error = self.error.clone();
        let Some(stream) = self.sending(id) else {
            return Poll::Ready(Ok(None));
        };
        if let Some(code) = stream.stopped {
            return Poll::Ready(Ok(Some(CloseCode::new(code))));
        }
        if stream.is_over() || matches!(stream.end, End::Resetting(_)) {
            return Poll::Ready(Ok(None));
        }
        if let Some(error) = error {
            return Poll::Ready(Err(StreamError::Lost(error)));
        }
        keep(&mut stream.watcher, cx);
        Poll::Pending
    }

    // ---- Receiving ----

    pub(super) fn poll_read(
        &mut self,
        id: u64,
        cx: &Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<Option<usize>, StreamError>> {
        self.read(id, cx, |waiting| {
            let count = waiting.len().min(chunks.len());
            for (place, chunk) in chunks.iter_mut().zip(waiting.drain(..count)) {
                *place = chunk;
            }
            let bytes = chunks[..count].iter().map(Bytes::len).sum();
            (bytes, count)
        })
    }

    /// As [`poll_read`](Self::poll_read), at most so many bytes.
    pub(super) fn poll_read_some(
        &mut self,
        id: u64,
        cx: &Context<'_>,
        most: usize,
    ) -> Poll<Result<Option<Bytes>, StreamError>> {
        self.read(id, cx, |waiting| {
            let bytes = match waiting.front_mut() {
                Some(first) if first.len() > most => first.split_to(most),
                _ => waiting.pop_front().unwrap_or_default(),
            };
            (bytes.len(), bytes)
        })
    }

    fn read<T>(
        &mut self,
        id: u64,
        cx: &Context<'_>,
        take: impl FnOnce(&mut VecDeque<Bytes>) -> (usize, T),
    ) -> Poll<Result<Option<T>, StreamError>> {
        let error = self.error.clone();
        let Some(stream) = self.receiving(id) else {
            return Poll::Ready(Err(StreamError::Ended));
        };
        if stream.stopped.is_some() {
            return Poll::Ready(Err(StreamError::Ended));
        }
        if let Some(Finish::Reset(code)) = stream.end {
            stream.over = true;
            self.tidy(id);
            return Poll::Ready(Err(StreamError::Peer(CloseCode::new(code))));
        }
        if !stream.chunks.is_empty() {
            let (bytes, taken) = take(&mut stream.chunks);
            stream.read += bytes as u64;
            let may = stream.read.saturating_add(stream.window);
            if stream.end.is_none()
                && !stream.credit_queued
                && may.saturating_sub(stream.told) >= (stream.window / 8).max(1)
            {
                stream.credit_queued = true;
                self.out.credits.push_back(id);
                self.work();
            }
            self.flow.read += bytes as u64;
            self.grant();
            return Poll::Ready(Ok(Some(taken)));
        }
        if stream.end.is_some() {
            stream.over = true;
            self.tidy(id);
            return Poll::Ready(Ok(None));
        }
        if let Some(error) = error {
            return Poll::Ready(Err(StreamError::Lost(error)));
        }
        keep(&mut stream.reader, cx);
        Poll::Pending
    }

    pub(super) fn stop(&mut self, id: u64, code: u64) {
        let Some(stream) = self.receiving(id) else {
            return;
        };
        if stream.stopped.is_some() || stream.over {
            return;
        }
        stream.stopped = Some(code);
        stream.chunks.clear();
        let unread = stream.received - stream.read;
        stream.read = stream.received;
        let ended = stream.end.is_some();
        self.flow.read += unread;
        self.grant();
        if ended {
            self.tidy(id);
        } else {
            self.out.stops.push_back(id);
            self.work();
        }
    }

    /// The program has dropped the receiving side of a stream.
    pub(super) fn release_recv(&mut self, id: u64) {
        self.stop(id, CloseCode::NORMAL.value());
        if let Some(stream) = self.receiving(id) {
            stream.held = false;
            stream.reader = None;
        }
        self.tidy(id);
    }

    /// Removes an ended stream, and lets the peer open another in its place.
    fn tidy(&mut self, id: u64) {
        let local = self.is_local(id);
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let over = stream.send.as_ref().is_none_or(Sending::is_over)
            && stream.recv.as_ref().is_none_or(Receiving::is_over);
        if !over {
            return;
        }
        let held = stream.send.as_ref().is_some_and(|send| send.held)
            || stream.recv.as_ref().is_some_and(|recv| recv.held);
        let count = !local && !std::mem::replace(&mut stream.counted, true);
        if !held {
            self.streams.remove(&id);
        }
        if count {
            self.opening.over[way(id)] += 1;
            self.permit_more(way(id));
        }
    }

    // ---- Datagrams ----

    /// The largest datagram that the peer accepts, in bytes.
    pub(super) fn max_datagram_size(&self) -> Option<usize> {
        let peer = self.peer?;
        let frame = usize::try_from(peer.datagram.min(peer.record)).unwrap_or(usize::MAX);
        let most = frame.min(RECORD_OUT - PING_ROOM).checked_sub(5)?;
        (most > 0).then_some(most)
    }

    /// Queues a datagram if there is room; returns whether there was.
    pub(super) fn send_datagram(&mut self, datagram: &Bytes) -> bool {
        if self.out.datagram_bytes + datagram.len() > DATAGRAMS_OUT
            && !self.out.datagrams.is_empty()
        {
            return false;
        }
        self.out.datagram_bytes += datagram.len();
        self.out.datagrams.push_back(datagram.clone());
        self.work();
        true
    }

    pub(super) fn read_datagram(&mut self) -> Option<Bytes> {
        let datagram = self.datagrams_in.pop_front()?;
        self.datagrams_in_bytes -= datagram.len();
        Some(datagram)
    }

    // ---- The end ----

    /// Closes the connection with a code and text for the peer.
    pub(super) fn close(&mut self, code: CloseCode, text: &str) {
        if self.end(ConnectionError::Local) {
            self.out.close = Some((true, code.value(), text.to_owned()));
        }
    }

    /// Closes the connection because of a fault of the peer.
    pub(super) fn fail(&mut self, fault: Fault) {
        let text = format!("QMux: {} ({:#x})", fault.text, fault.code);
        let reason = CloseReason::new(CloseCode::TRANSPORT_ERROR, text, Side::Transport);
        if self.end(ConnectionError::Transport(reason)) {
            self.out.close = Some((false, fault.code, fault.text.to_owned()));
        }
    }

    /// Ends the connection; returns whether it had not ended before.
    pub(super) fn end(&mut self, error: ConnectionError) -> bool {
        if self.error.is_some() {
            return false;
        }
        self.error = Some(error);
        self.news = News {
            accept: [true; 2],
            open: [true; 2],
            datagram: true,
            room: true,
            turn: true,
        };
        self.flow.queued = 0;
        self.out.ready.clear();
        self.out.datagrams.clear();
        for stream in self.streams.values_mut() {
            if let Some(send) = &mut stream.send {
                send.queue.clear();
                send.queued = 0;
                send.wake();
            }
            if let Some(recv) = &mut stream.recv {
                wake(&mut recv.reader);
            }
        }
        self.work();
        true
    }

    /// Records that the close was sent, if that was possible.
    pub(super) fn set_done(&mut self) {
        self.done = true;
        self.news.turn = true;
    }

    // ---- Records ----

    /// Processes a record of the peer.
    pub(super) fn receive(&mut self, mut record: Bytes, now: Instant) -> Result<(), Fault> {
        self.heard(now, record.len());
        if self.error.is_some() {
            return Ok(());
        }
        while let Some(frame) = wire::next(&mut record)? {
            let first = self.peer.is_none();
            match frame {
                Frame::Parameters(parameters) if first => self.begin(&parameters),
                Frame::Parameters(_) => {
                    return Err(fault(code::PROTOCOL_VIOLATION, "parameters come once"));
                }
                Frame::Close {
                    application,
                    code,
                    text,
                } => {
                    self.peer_closes(application, code, &text);
                    return Ok(());
                }
                _ if first => {
                    return Err(fault(code::PROTOCOL_VIOLATION, "parameters come first"));
                }
                frame => self.frame(frame, now)?,
            }
        }
        Ok(())
    }

    /// Records that bytes arrived, even if only of the layer below.
    pub(super) fn heard(&mut self, now: Instant, bytes: usize) {
        self.alive.heard = now;
        self.alive.since = None;
        self.stats.datagrams_received += 1;
        self.stats.bytes_received += bytes as u64;
    }

    fn begin(&mut self, parameters: &Parameters) {
        self.peer = Some(*parameters);
        self.opening.may = parameters.streams;
        self.flow.may = parameters.data;
        if parameters.idle > 0 {
            let theirs = Duration::from_millis(parameters.idle);
            self.settings.idle = self.settings.idle.min(theirs);
        }
        self.news.open = [true; 2];
        self.news.turn = true;
        self.stats.mtu = u16::try_from(parameters.record).unwrap_or(u16::MAX);
    }

    fn peer_closes(&mut self, application: bool, code: u64, text: &[u8]) {
        let text = String::from_utf8_lossy(text);
        self.end(match application {
            true => ConnectionError::Peer(CloseReason::peer(CloseCode::new(code), &text)),
            false => {
                let text = format!("the peer found a fault: {text} ({code:#x})");
                let reason = CloseReason::peer(CloseCode::TRANSPORT_ERROR, &text);
                ConnectionError::Transport(CloseReason {
                    by: Side::Transport,
                    ..reason
                })
            }
        });
    }

    fn frame(&mut self, frame: Frame, now: Instant) -> Result<(), Fault> {
        match frame {
            Frame::Stream {
                id,
                offset,
                data,
                fin,
            } => self.data(id, offset, data, fin)?,
            Frame::Reset { id, code, size } => self.peer_resets(id, code, size)?,
            Frame::Stop { id, code } => self.peer_stops(id, code)?,
            Frame::MaxData(most) => {
                if most > self.flow.may {
                    self.flow.may = most;
                    self.unblock();
                }
            }
            Frame::MaxStreamData { id, most } => {
                self.find(id, Half::Send)?;
                if let Some(stream) = self.sending(id)
                    && most > stream.may
                {
                    stream.may = most;
                    wake(&mut stream.writer);
                }
            }
            Frame::MaxStreams { one_way, most } => {
                let may = &mut self.opening.may[usize::from(one_way)];
                *may = most.max(*may);
                self.news.open[usize::from(one_way)] = true;
            }
            Frame::Datagram { data, head } => {
                if (data.len() + head) as u64 > self.settings.permits.datagram {
                    return Err(fault(code::PROTOCOL_VIOLATION, "a datagram is too large"));
                }
                self.datagram(&data);
            }
            Frame::Ping(sequence) => {
                let alive = &mut self.alive;
                if alive.asked.is_some_and(|before| sequence <= before) {
                    return Err(fault(code::PROTOCOL_VIOLATION, "a ping goes back"));
                }
                alive.asked = Some(sequence);
                self.out.pong = Some(sequence);
                self.work();
            }
            Frame::Pong(sequence) => self.pong(sequence, now)?,
            // Credit follows from reading, so `Blocked` needs no reaction; the other frames are handled elsewhere.
            Frame::Blocked | Frame::Padding | Frame::Parameters(_) | Frame::Close { .. } => {}
        }
        Ok(())
    }

    fn datagram(&mut self, data: &[u8]) {
        self.datagrams_in_bytes += data.len();
        self.datagrams_in.push_back(Bytes::copy_from_slice(data));
        self.news.datagram = true;
        while self.datagrams_in_bytes > DATAGRAMS_IN || self.datagrams_in.len() > DATAGRAMS_IN / 64
        {
            // The oldest datagram is dropped.
            self.read_datagram();
        }
    }

    fn pong(&mut self, sequence: u64, now: Instant) -> Result<(), Fault> {
        let alive = &mut self.alive;
        if sequence >= alive.next {
            return Err(fault(code::PROTOCOL_VIOLATION, "an answer to no ping"));
        }
        if let Some((asked, at)) = alive.out
            && asked <= sequence
        {
            let took = now.saturating_duration_since(at);
            self.stats.rtt = match std::mem::replace(&mut alive.measured, true) {
                false => took,
                true => (self.stats.rtt * 7 + took) / 8,
            };
            alive.out = None;
        }
        while let Some((id, asked)) = self.alive.unconfirmed.front().copied()
            && asked <= sequence
        {
            self.alive.unconfirmed.pop_front();
            if let Some(stream) = self.sending(id)
                && stream.end == End::Finished
            {
                stream.end = End::Confirmed;
                wake(&mut stream.watcher);
            }
            self.tidy(id);
        }
        if !self.alive.unconfirmed.is_empty() {
            self.alive.wanted = true;
            self.work();
        }
        Ok(())
    }

    /// Checks that the peer may use this half of a stream, and creates the streams that it opens by that.
    fn find(&mut self, id: u64, half: Half) -> Result<(), Fault> {
        let (local, way) = (self.is_local(id), way(id));
        if way == ONE && local == (half == Half::Recv) {
            return Err(fault(code::STREAM_STATE, "the wrong side of a stream"));
        }
        let number = id >> 2;
        if local {
            return match number < self.opening.opened[way] {
                true => Ok(()),
                false => Err(fault(code::STREAM_STATE, "a stream that was not opened")),
            };
        }
        if number >= self.opening.told[way] {
            return Err(fault(code::STREAM_LIMIT, "too many streams"));
        }
        // Opening a stream also opens all earlier ones.
        while self.opening.seen[way] <= number {
            let id = self.opening.seen[way] << 2 | id & 3;
            self.opening.seen[way] += 1;
            let permits = &self.settings.permits;
            let (window, may) = match way {
                BOTH => (permits.peers_stream, self.peer.map(|peer| peer.own_stream)),
                _ => (permits.one_way, None),
            };
            let stream = Stream {
                send: may.map(Sending::new),
                recv: Some(Receiving::new(window)),
                counted: false,
            };
            self.streams.insert(id, stream);
            self.opening.waiting[way].push_back(id);
            self.news.accept[way] = true;
        }
        Ok(())
    }

    fn data(&mut self, id: u64, offset: u64, data: Bytes, fin: bool) -> Result<(), Fault> {
        self.find(id, Half::Recv)?;
        let length = data.len() as u64;
        let end = match self.receiving(id) {
            Some(stream) => {
                if stream.end.is_some() {
                    return Err(fault(code::FINAL_SIZE, "data behind the end of a stream"));
                }
                if offset != stream.received {
                    return Err(fault(code::PROTOCOL_VIOLATION, "a gap in a stream"));
                }
                let end = offset + length;
                if end > stream.told {
                    return Err(fault(code::FLOW_CONTROL, "a stream's window"));
                }
                end
            }
            None => return Err(fault(code::FINAL_SIZE, "data behind the end of a stream")),
        };
        self.flow.received += length;
        if self.flow.received > self.flow.told {
            return Err(fault(code::FLOW_CONTROL, "the connection's window"));
        }
        let Some(stream) = self.receiving(id) else {
            return Ok(());
        };
        stream.received = end;
        if fin {
            stream.end = Some(Finish::Fin);
        }
        if stream.stopped.is_some() {
            stream.read = end;
            self.flow.read += length;
            self.grant();
            self.tidy(id);
        } else {
            if length > 0 {
                stream.push(data);
            }
            if length > 0 || fin {
                wake(&mut stream.reader);
            }
        }
        Ok(())
    }

    fn peer_resets(&mut self, id: u64, code: u64, size: u64) -> Result<(), Fault> {
        self.find(id, Half::Recv)?;
        let Some(stream) = self.receiving(id) else {
            // The stream has ended and was read.
            return Ok(());
        };
        match stream.end {
            Some(Finish::Reset(_)) => return Ok(()),
            Some(Finish::Fin) if size != stream.received => {
                return Err(fault(code::FINAL_SIZE, "a stream's end has moved"));
            }
            _ => {}
        }
        // The final size may be smaller than the received bytes in this draft, but not larger, because no bytes are
        // lost.
        if size > stream.received {
            return Err(fault(code::FINAL_SIZE, "more than was sent"));
        }
        let unread = stream.received - stream.read;
        stream.chunks.clear();
        stream.read = stream.received;
        if !stream.over {
            stream.end = Some(Finish::Reset(code));
        }
        wake(&mut stream.reader);
        self.flow.read += unread;
        self.grant();
        self.tidy(id);
        Ok(())
    }

    fn peer_stops(&mut self, id: u64, code: u64) -> Result<(), Fault> {
        self.find(id, Half::Send)?;
        if let Some(stream) = self.sending(id)
            && stream.stopped.is_none()
            && !stream.is_over()
        {
            stream.stopped = Some(code);
            stream.wake();
            self.reset(id, code);
        }
        Ok(())
    }

    // ---- What goes out ----

    /// The next record, if there is something to send.
    pub(super) fn record(&mut self, now: Instant) -> Option<Bytes> {
        let most = self.peer.map_or(wire::LEAST_RECORD, |peer| peer.record);
        let most = usize::try_from(most).map_or(RECORD_OUT, |most| most.min(RECORD_OUT));
        let most = most - PING_ROOM;
        let mut record = BytesMut::new();
        if !std::mem::replace(&mut self.out.begun, true) {
            self.settings.permits.encode(&mut record);
        }
        if let Some((application, code, text)) = self.out.close.take() {
            wire::put_close(&mut record, application, code, &text);
            return Some(self.said(record, now));
        }
        if self.error.is_some() {
            return None;
        }
        self.put_control(&mut record, most);
        self.put_datagrams(&mut record, most);
        self.put_streams(&mut record, most);
        self.put_ping(&mut record, now);
        (!record.is_empty()).then(|| self.said(record, now))
    }

    fn said(&mut self, record: BytesMut, now: Instant) -> Bytes {
        self.alive.since.get_or_insert(now);
        self.stats.datagrams_sent += 1;
        self.stats.packets_sent += 1;
        self.stats.bytes_sent += record.len() as u64;
        record.freeze()
    }

    fn put_control(&mut self, record: &mut BytesMut, most: usize) {
        /// The longest of these frames.
        const ROOM: usize = 4 * 8;
        if let Some(sequence) = self.out.pong.take() {
            wire::put_ping(record, true, sequence);
        }
        if std::mem::take(&mut self.out.window) {
            let may = self.flow.read.saturating_add(self.flow.window);
            if may > self.flow.told {
                self.flow.told = may;
                wire::put_max_data(record, may);
            }
        }
        for way in [BOTH, ONE] {
            let opening = &mut self.opening;
            let may = opening.permitted[way].saturating_add(opening.over[way]);
            if std::mem::take(&mut self.out.permits[way]) && may > opening.told[way] {
                opening.told[way] = may;
                wire::put_max_streams(record, way == ONE, may);
            }
        }
        while record.len() + ROOM <= most
            && let Some(id) = self.out.resets.pop_front()
        {
            if let Some(stream) = self.sending(id)
                && let End::Resetting(code) = stream.end
            {
                stream.end = End::Reset;
                wire::put_reset(record, id, code, stream.sent);
            }
            self.tidy(id);
        }
        while record.len() + ROOM <= most
            && let Some(id) = self.out.stops.pop_front()
        {
            if let Some(stream) = self.receiving(id)
                && stream.end.is_none()
                && let Some(code) = stream.stopped
            {
                wire::put_stop(record, id, code);
            }
        }
        while record.len() + ROOM <= most
            && let Some(id) = self.out.credits.pop_front()
        {
            if let Some(stream) = self.receiving(id) {
                stream.credit_queued = false;
                if stream.end.is_none() && stream.stopped.is_none() {
                    stream.told = stream.read.saturating_add(stream.window);
                    wire::put_max_stream_data(record, id, stream.told);
                }
            }
        }
    }

    fn put_datagrams(&mut self, record: &mut BytesMut, most: usize) {
        while let Some(datagram) = self.out.datagrams.front() {
            if record.len() + wire::datagram_size(datagram.len()) > most {
                return;
            }
            self.out.datagram_bytes -= datagram.len();
            self.news.room = true;
            if let Some(datagram) = self.out.datagrams.pop_front() {
                wire::put_datagram(record, &datagram);
                self.alive.unprobed = true;
            }
        }
    }

    fn put_streams(&mut self, record: &mut BytesMut, most: usize) {
        while let Some(mut level) = self.out.ready.first_entry() {
            let priority = level.key().0;
            let Some(id) = level.get_mut().pop_front() else {
                level.remove();
                continue;
            };
            let Some(stream) = self.streams.get_mut(&id).and_then(|s| s.send.as_mut()) else {
                continue;
            };
            if stream.priority != priority {
                let level = self.out.ready.entry(Reverse(stream.priority));
                level.or_default().push_back(id);
                continue;
            }
            if !matches!(stream.end, End::Open | End::Finishing) {
                stream.scheduled = false;
                continue;
            }
            let head = wire::stream_head(id, stream.sent, stream.queued);
            let room = most.saturating_sub(record.len() + head);
            if room == 0 {
                // No byte fits: the stream is first in the next record.
                level.get_mut().push_front(id);
                return;
            }
            let length = stream.queued.min(room);
            let fin = stream.end == End::Finishing && length == stream.queued;
            wire::put_stream(record, id, stream.sent, length, fin);
            stream.take(record, length);
            self.stats.stream_frames_sent += 1;
            self.alive.unprobed = true;
            self.flow.queued -= length as u64;
            if stream.queued > 0 {
                level.get_mut().push_back(id);
                continue;
            }
            stream.scheduled = false;
            if fin {
                stream.end = End::Finished;
                self.alive.unconfirmed.push_back((id, self.alive.next));
                self.alive.wanted = true;
            }
        }
    }

    fn put_ping(&mut self, record: &mut BytesMut, now: Instant) {
        let alive = &mut self.alive;
        if alive.out.is_some() {
            return;
        }
        let stale = alive.probed.is_none_or(|probed| now >= probed + PROBE);
        let silent = now >= alive.heard + self.settings.keep_alive;
        if alive.wanted || silent || (stale && alive.unprobed) {
            wire::put_ping(record, false, alive.next);
            alive.out = Some((alive.next, now));
            alive.next += 1;
            alive.probed = Some(now);
            (alive.wanted, alive.unprobed) = (false, false);
        }
    }

    /// Ends the connection if no bytes arrived for too long. Otherwise returns the time of the next check.
    pub(super) fn look(&mut self, now: Instant) -> Option<Instant> {
        if self.error.is_some() {
            return None;
        }
        let from = self.alive.since.unwrap_or(self.alive.heard);
        let from = from.max(self.alive.heard);
        let over = from + self.settings.idle;
        if now >= over {
            self.end(ConnectionError::TimedOut);
            return None;
        }
        Some(match self.alive.out {
            Some(_) => over,
            None => {
                let keep_alive = self.alive.heard + self.settings.keep_alive;
                let probe = match (self.alive.unprobed, self.alive.probed) {
                    (true, Some(probed)) => probed + PROBE,
                    _ => keep_alive,
                };
                keep_alive.min(probe).min(over)
            }
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Send,
    Recv,
}

impl Sending {
    /// Moves so many bytes from the queue into a record.
    fn take(&mut self, record: &mut BytesMut, length: usize) {
        let mut left = length;
        while left > 0
            && let Some(first) = self.queue.front_mut()
        {
            if first.len() > left {
                record.extend_from_slice(&first.split_to(left));
                break;
            }
            left -= first.len();
            record.extend_from_slice(first);
            self.queue.pop_front();
        }
        self.sent += length as u64;
        self.queued -= length;
        if self.queued <= STREAM_OUT / 2 {
            wake(&mut self.writer);
        }
    }
}
