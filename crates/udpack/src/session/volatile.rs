//! Volatile messages: only the newest is delivered, and none is retransmitted.
//!
//! A small message is a datagram: it is lost when its packet is lost, and it never delays a channel. A larger one has
//! a unidirectional stream of its own. Both the sender and the receiver keep one waiting message for each event and
//! key: a newer message replaces the older. The session's driver sends and receives them; the waiting messages belong
//! to the session, so they survive the loss of a connection.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::base::Lazy;
use crate::base::lock;
use crate::base::wake::WakeFlag;
use crate::channel::SendError;
use crate::metrics::Count;
use crate::session::Session;
use crate::session::socket::Socket;
use crate::transport::{Connection, DatagramError, RecvStream, StreamError};
use crate::wire::code::CloseCode;
use crate::wire::config::{Limits, MIN_FRAME_RATE};
use crate::wire::frame::PREFIX;
use crate::wire::message::{self, DecodeError, EncodeError, Encoded, NameError};
use crate::wire::msgpack::{
    Head, MAX_ELEMENTS, MsgpackError, Reader, Shape, Walk, validate_within,
};

/// A volatile message waits to be sent.
pub(crate) const SMALL: WakeFlag = WakeFlag(1 << 2);
/// A volatile message waits that is too large for a datagram.
pub(crate) const LARGE: WakeFlag = WakeFlag(1 << 3);

/// Messages processed in one turn, before other work of the same task.
const TURN: usize = 64;
/// The first byte of an array of 3, and of an array of 4.
const ARRAY3: u8 = 0x93;
const ARRAY4: u8 = 0x94;

/// One received volatile message. Cheap to clone.
///
/// `Debug` prints event, key and the length of the data, never the data.
#[derive(Clone)]
pub struct Volatile {
    body: Bytes,
    event: Range<usize>,
    data: Range<usize>,
    seq: Option<u64>,
    key: Option<Range<usize>>,
}

/// Why a datagram, or the content of a unidirectional stream, is not a volatile message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VolatileError {
    /// It is not one acceptable MessagePack value.
    #[error(transparent)]
    Msgpack(#[from] MsgpackError),
    /// The value is not an array of 2 to 4.
    #[error("a volatile message is an array of 2 to 4 values")]
    Shape,
    /// The event is not a proper name, or is one of the protocol's own.
    #[error("the event is no name that an application may use")]
    Event,
    /// The sequence number is not an integer from 0 to 2^64 - 1.
    #[error("the sequence number is not an unsigned 64-bit integer")]
    Seq,
    /// The key is not a proper name.
    #[error("the key {0}")]
    Key(NameError),
    /// The key is not text.
    #[error("the key is not text")]
    KeyNotString,
}

impl Volatile {
    /// Reads `[event, data]`, `[event, data, seq]` or `[event, data, seq, key]`, without a frame's prefix.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn decode(body: Bytes) -> Result<Self, VolatileError> {
        let mut walk = Walk::new(&body, Shape::default())?;
        let Head::Array(arity @ 2..=4) = walk.enter()? else {
            return Err(VolatileError::Shape);
        };
        let at = |walk: &Walk<'_>| body.len() - walk.left();
        let event = walk.value()?;
        let data_start = at(&walk);
        walk.value()?;
        let data = data_start..at(&walk);
        let seq = (arity > 2).then(|| walk.value()).transpose()?;
        let key = (arity > 3).then(|| walk.value()).transpose()?;
        let end = at(&walk);
        walk.end()?;

        let name = text(event)?.ok_or(VolatileError::Event)?;
        if name.starts_with('$') || message::check_name(name).is_err() {
            return Err(VolatileError::Event);
        }
        let event = data.start - name.len()..data.start;
        let seq = match seq.map(|seq| Reader::new(seq).head()).transpose()? {
            None => None,
            Some(Head::Uint(seq)) => Some(seq),
            Some(_) => return Err(VolatileError::Seq),
        };
        let key = match key {
            None => None,
            Some(key) => {
                let key = text(key)?.ok_or(VolatileError::KeyNotString)?;
                message::check_name(key).map_err(VolatileError::Key)?;
                Some(end - key.len()..end)
            }
        };
        Ok(Self {
            body,
            event,
            data,
            seq,
            key,
        })
    }

    /// The name of the event.
    pub fn event(&self) -> &str {
        self.text(self.event.clone())
    }

    /// The key, if the sender distinguishes several values of one event.
    pub fn key(&self) -> Option<&str> {
        self.key.clone().map(|key| self.text(key))
    }

    /// The sender's sequence number of its volatile messages; a jump shows that some were replaced or lost.
    pub fn seq(&self) -> Option<u64> {
        self.seq
    }

    /// Reads the data as a `T`, which may borrow from the message.
    ///
    /// # Errors
    /// When the data is not exactly one `T`.
    pub fn data<'a, T: Deserialize<'a>>(&'a self) -> Result<T, DecodeError> {
        message::decode_data(self.body.get(self.data.clone()).unwrap_or_default())
    }

    /// The data as received, encoded in MessagePack.
    pub fn raw(&self) -> Bytes {
        self.body.slice(self.data.clone())
    }

    /// The length of the message, in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a message is never empty")]
    pub fn len(&self) -> usize {
        self.body.len()
    }

    fn text(&self, range: Range<usize>) -> &str {
        let bytes = self.body.get(range).unwrap_or_default();
        std::str::from_utf8(bytes).unwrap_or_default()
    }

    fn place(&self) -> Arc<str> {
        place(self.event(), self.key())
    }
}

impl fmt::Debug for Volatile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volatile")
            .field("event", &self.event())
            .field("key", &self.key())
            .field("seq", &self.seq)
            .field("data_len", &self.data.len())
            .finish()
    }
}

impl Encoded {
    /// Encodes a received volatile message for other receivers, like [`relay`](Self::relay), without its key.
    ///
    /// # Errors
    /// No known case: a received message can be sent.
    pub fn relay_volatile(message: &Volatile) -> Result<Self, EncodeError> {
        Self::from_raw(message.event(), &message.raw())
    }
}

/// The text of a string value; `None` if the value is not a string.
fn text(value: &[u8]) -> Result<Option<&str>, MsgpackError> {
    match Reader::new(value).head()? {
        Head::Str(text) => Ok(Some(
            std::str::from_utf8(text).map_err(|_| MsgpackError::Utf8)?,
        )),
        _ => Ok(None),
    }
}

/// Joins event and key into one map key. Neither holds a control character, so the separator is unambiguous.
fn place(event: &str, key: Option<&str>) -> Arc<str> {
    match key {
        Some(key) => format!("{event}\0{key}").into(),
        None => event.into(),
    }
}

/// A volatile message that can be sent to many sockets: the fields that differ between them are appended.
pub(crate) struct Ready {
    /// `[event, data` with the array head of any volatile message: the first byte is replaced on sending.
    front: Bytes,
    place: Arc<str>,
}

impl Ready {
    fn encode<T: Serialize + ?Sized>(
        event: &str,
        key: Option<&str>,
        data: &T,
        limit: usize,
    ) -> Result<Self, EncodeError> {
        if event.starts_with('$') {
            return Err(EncodeError::Reserved(event.to_owned()));
        }
        let mut buf = BytesMut::new();
        message::encode(&mut buf, event, data, None, limit)?;
        buf.advance(PREFIX);
        Self::new(buf.freeze(), event, key)
    }

    /// Creates it from an encoded message.
    pub(crate) fn of(message: &Encoded, key: Option<&str>) -> Result<Self, EncodeError> {
        let front = message.bytes().slice(PREFIX..);
        // An encoded message begins with its event, which is text.
        let event = front.get(1..).map(|rest| Reader::new(rest).head());
        let event = match event {
            Some(Ok(Head::Str(event))) => std::str::from_utf8(event).unwrap_or_default(),
            _ => "",
        };
        let place = place(event, key);
        Self::at(front, place, key)
    }

    /// Creates it from a received message: event, data and key unchanged, without a copy.
    pub(crate) fn relay(message: &Volatile) -> Result<Self, EncodeError> {
        let front = message.body.slice(..message.data.end);
        Self::at(front, message.place(), message.key())
    }

    fn new(front: Bytes, event: &str, key: Option<&str>) -> Result<Self, EncodeError> {
        Self::at(front, place(event, key), key)
    }

    fn at(front: Bytes, place: Arc<str>, key: Option<&str>) -> Result<Self, EncodeError> {
        if let Some(key) = key {
            message::check_name(key).map_err(EncodeError::Name)?;
        }
        let ready = Self { front, place };
        // A short message cannot have too many elements, whatever is appended.
        if ready.len(u64::MAX) > MAX_ELEMENTS {
            let whole = whole(&ready.front, &ready.place, u64::MAX);
            validate_within(&whole, Shape::default()).map_err(EncodeError::Refused)?;
        }
        Ok(ready)
    }

    /// The length of the message in bytes with this sequence number.
    fn len(&self, seq: u64) -> usize {
        let key = self
            .place
            .split_once('\0')
            .map_or(0, |(_, key)| key.len() + if key.len() < 32 { 1 } else { 2 });
        let number = match seq {
            0..=0x7f => 1,
            0x80..=0xff => 2,
            0x100..=0xffff => 3,
            0x1_0000..=0xffff_ffff => 5,
            _ => 9,
        };
        self.front.len() + number + key
    }

    fn fits(&self, seq: u64, limit: usize) -> Result<(), EncodeError> {
        match self.len(seq) {
            size if size > limit => Err(EncodeError::TooLarge { size, limit }),
            _ => Ok(()),
        }
    }

    /// Queues the message for this session; returns how many messages were dropped, this one included.
    pub(crate) fn send(&self, session: &Session) -> Result<u64, EncodeError> {
        let limit = session.frame_limit().min(session.limits.volatile_bytes);
        let volatiles = &session.volatiles;
        let seq = volatiles.seq.fetch_add(1, Ordering::Relaxed) + 1;
        self.fits(seq, limit)?;
        let dropped = lock(&volatiles.out).get_or_make().queue(
            self.place.clone(),
            seq,
            self.front.clone(),
            &session.limits,
        );
        session.counts.add(Count::VolatileDropped, dropped);
        session.wake.set(SMALL);
        Ok(dropped)
    }
}

/// The fields after event and data: the sequence number, and the key if there is one.
fn tail(place: &str, seq: u64) -> Vec<u8> {
    let key = place.split_once('\0').map(|(_, key)| key);
    let mut tail = Vec::with_capacity(16 + key.map_or(0, str::len));
    // Writing to a vector cannot fail.
    let _ = rmp::encode::write_uint(&mut tail, seq);
    if let Some(key) = key {
        let _ = rmp::encode::write_str(&mut tail, key);
    }
    tail
}

fn head(place: &str) -> u8 {
    if place.contains('\0') { ARRAY4 } else { ARRAY3 }
}

/// The whole message as it is sent.
fn whole(front: &Bytes, place: &str, seq: u64) -> Bytes {
    let tail = tail(place, seq);
    let mut body = BytesMut::with_capacity(front.len() + tail.len());
    body.put_u8(head(place));
    body.put_slice(front.get(1..).unwrap_or_default());
    body.put_slice(&tail);
    body.freeze()
}

impl Socket {
    /// Sends a value of which only the newest matters: a position, a level, a progress.
    ///
    /// Returns at once. A newer message of the same event replaces one that waits to be sent; a message whose packet
    /// is lost is not sent again. A message of up to about 1,100 bytes, depending on the path, is sent as one
    /// datagram, before the channels' bytes; larger ones are sent one by one, each on a stream of its own. At the
    /// peer, too, a newer message replaces one that the program has not taken, and an older one that arrives late is
    /// dropped. `Limits::volatile_keys` and `Limits::volatile_bytes` bound the waiting messages: the one that has
    /// waited longest is dropped, large ones first. `Socket::metrics` counts the dropped messages.
    ///
    /// # Errors
    /// When the socket has ended, or the message cannot be sent at all: reserved or invalid event name, data that
    /// cannot be encoded or exceeds the peer's frame limit or `Limits::volatile_bytes`.
    pub fn send_volatile<T: Serialize + ?Sized>(
        &self,
        event: &str,
        data: &T,
    ) -> Result<(), SendError> {
        self.volatile(event, None, data)
    }

    /// As [`send_volatile`](Self::send_volatile), for several things of one event: each `key` (1 to 128 bytes)
    /// has its own newest message.
    ///
    /// # Errors
    /// As [`send_volatile`](Self::send_volatile), and when the key is invalid.
    pub fn send_volatile_keyed<T: Serialize + ?Sized>(
        &self,
        event: &str,
        key: &str,
        data: &T,
    ) -> Result<(), SendError> {
        self.volatile(event, Some(key), data)
    }

    fn volatile<T: Serialize + ?Sized>(
        &self,
        event: &str,
        key: Option<&str>,
        data: &T,
    ) -> Result<(), SendError> {
        let session = self.session();
        if session.closing() {
            return Err(SendError::Closed(session.closed_reason()));
        }
        let limit = session.frame_limit().min(session.limits.volatile_bytes);
        // Encoded without the lock, because `Serialize` is the application's code.
        let message = Ready::encode(event, key, data, limit).map_err(SendError::Encode)?;
        message.send(session).map(drop).map_err(SendError::Encode)
    }

    /// As [`send_volatile_keyed`](Self::send_volatile_keyed), or without a key as [`send_volatile`](Self::send_volatile),
    /// with a message that is encoded already.
    ///
    /// # Errors
    /// As [`send_volatile_keyed`](Self::send_volatile_keyed).
    pub fn send_volatile_encoded(
        &self,
        key: Option<&str>,
        message: &Encoded,
    ) -> Result<(), SendError> {
        self.pass_on(Ready::of(message, key))
    }

    /// Relays a volatile message of another socket: event, key and data as they are, without decoding.
    ///
    /// # Errors
    /// When the socket is over, or the message exceeds the peer's frame limit or `Limits::volatile_bytes`.
    pub fn relay_volatile(&self, message: &Volatile) -> Result<(), SendError> {
        self.pass_on(Ready::relay(message))
    }

    fn pass_on(&self, message: Result<Ready, EncodeError>) -> Result<(), SendError> {
        let session = self.session();
        if session.closing() {
            return Err(SendError::Closed(session.closed_reason()));
        }
        let sent = message.and_then(|message| message.send(session));
        sent.map(drop).map_err(SendError::Encode)
    }

    /// The peer's next volatile message: the one whose event and key have waited longest; `None` when the socket has
    /// ended and none is left.
    ///
    /// Several may wait at once; each message goes to one of them.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn recv_volatile(&self) -> Option<Volatile> {
        let session = self.session();
        let volatiles = &session.volatiles;
        loop {
            let mut arrived = std::pin::pin!(volatiles.arrived.notified());
            arrived.as_mut().enable();
            let over = session.end.get().is_some();
            let (first, more) = {
                let mut waiting = lock(&volatiles.waiting);
                let latest = waiting.get_mut().map(|waiting| &mut waiting.latest);
                latest.map_or((None, false), |latest| {
                    let first = latest.pop().map(|(_, entry)| entry.item);
                    (first, !latest.is_empty())
                })
            };
            if more {
                volatiles.arrived.notify_one();
            }
            if first.is_some() || over {
                return first;
            }
            tokio::select! {
                () = arrived => {}
                _ = session.end.wait() => {}
            }
        }
    }
}

/// The waiting volatile messages of one session, to send and received.
#[derive(Debug, Default)]
pub(crate) struct Volatiles {
    /// How many volatile messages were sent so far.
    seq: AtomicU64,
    /// The number of the last broadcast message that was queued here.
    broadcast: AtomicU64,
    out: Mutex<Lazy<Out>>,
    waiting: Mutex<Lazy<Waiting>>,
    /// Notified when a message has arrived.
    arrived: Notify,
}

impl Volatiles {
    /// Whether this broadcast message was not queued here before; a session may have several channels in a room.
    pub(crate) fn is_first(&self, broadcast: u64) -> bool {
        self.broadcast.swap(broadcast, Ordering::Relaxed) != broadcast
    }

    /// The small message that has waited longest, with its place and sequence number.
    fn first_small(&self) -> Option<(Arc<str>, u64, Bytes)> {
        let out = lock(&self.out);
        let (place, entry) = out.get()?.small.first()?;
        Some((place.clone(), entry.seq, entry.item.clone()))
    }

    fn any_large(&self) -> bool {
        let out = lock(&self.out);
        out.get().is_some_and(|out| !out.large.is_empty())
    }
}

#[derive(Debug, Default)]
struct Out {
    /// The messages that are not known to be too large for a datagram.
    small: Latest<Bytes>,
    large: Latest<Bytes>,
}

impl Out {
    /// Returns how many messages were dropped for it, or with it.
    fn queue(&mut self, place: Arc<str>, seq: u64, body: Bytes, limits: &Limits) -> u64 {
        if self.large.seq(&place).is_some_and(|other| other > seq) {
            return 1;
        }
        let mut dropped = u64::from(self.large.remove(&place).is_some());
        let len = body.len();
        dropped += self.small.put(place, seq, len, body);
        while self.small.len() + self.large.len() > limits.volatile_keys.max(1)
            || self.small.bytes + self.large.bytes > limits.volatile_bytes
        {
            if self.large.pop().or_else(|| self.small.pop()).is_none() {
                break;
            }
            dropped += 1;
        }
        dropped
    }

    /// Moves a message to the queue of large ones, unless a newer one has replaced it.
    fn is_large(&mut self, place: &Arc<str>, seq: u64) {
        if self.small.seq(place) == Some(seq)
            && let Some(body) = self.small.remove(place)
        {
            self.large.put(place.clone(), seq, body.len(), body);
        }
    }
}

/// The received messages that the program has not taken.
#[derive(Debug, Default)]
struct Waiting {
    latest: Latest<Volatile>,
    seen: Seen,
}

impl Waiting {
    /// Returns how many messages were dropped for it, or with it.
    fn arrived(&mut self, message: Volatile, limits: &Limits) -> u64 {
        let place = message.place();
        let keys = limits.volatile_keys.max(1);
        let len = message.len();
        if len > limits.volatile_bytes {
            return 1;
        }
        if let Some(seq) = message.seq
            && !self.seen.is_news(&place, seq, keys)
        {
            return 1;
        }
        // A stale message was detected above.
        let mut dropped = self.latest.put(place, u64::MAX, len, message);
        while self.latest.len() > keys || self.latest.bytes > limits.volatile_bytes {
            self.latest.pop();
            dropped += 1;
        }
        dropped
    }
}

/// The newest sequence number of each place, for a bounded number of recent places.
#[derive(Debug, Default)]
struct Seen {
    young: HashMap<Arc<str>, u64>,
    old: HashMap<Arc<str>, u64>,
}

impl Seen {
    fn is_news(&mut self, place: &Arc<str>, seq: u64, keys: usize) -> bool {
        let last = self.young.get(place).or_else(|| self.old.get(place));
        if last.is_some_and(|last| *last >= seq) {
            return false;
        }
        self.young.insert(place.clone(), seq);
        if self.young.len() >= keys {
            self.old = std::mem::take(&mut self.young);
        }
        true
    }
}

/// One message for each place, in the order in which the places were taken.
#[derive(Debug)]
struct Latest<T> {
    order: BTreeMap<u64, Arc<str>>,
    entries: HashMap<Arc<str>, Entry<T>>,
    next: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry<T> {
    turn: u64,
    seq: u64,
    len: usize,
    item: T,
}

impl<T> Default for Latest<T> {
    fn default() -> Self {
        Self {
            order: BTreeMap::new(),
            entries: HashMap::new(),
            next: 0,
            bytes: 0,
        }
    }
}

impl<T> Latest<T> {
    /// Inserts a message, or replaces an older one; returns 1 if one of the two was dropped.
    fn put(&mut self, place: Arc<str>, seq: u64, len: usize, item: T) -> u64 {
        if let Some(entry) = self.entries.get_mut(&place) {
            if entry.seq <= seq {
                self.bytes = self.bytes - entry.len + len;
                (entry.seq, entry.len, entry.item) = (seq, len, item);
            }
            return 1;
        }
        let turn = self.next;
        self.next += 1;
        self.bytes += len;
        self.order.insert(turn, place.clone());
        let entry = Entry {
            turn,
            seq,
            len,
            item,
        };
        self.entries.insert(place, entry);
        0
    }

    fn remove(&mut self, place: &str) -> Option<T> {
        let entry = self.entries.remove(place)?;
        self.order.remove(&entry.turn);
        self.bytes -= entry.len;
        Some(entry.item)
    }

    fn pop(&mut self) -> Option<(Arc<str>, Entry<T>)> {
        let (_, place) = self.order.pop_first()?;
        let entry = self.entries.remove(&place)?;
        self.bytes -= entry.len;
        Some((place, entry))
    }

    fn first(&self) -> Option<(&Arc<str>, &Entry<T>)> {
        let (_, place) = self.order.first_key_value()?;
        self.entries.get_key_value(place)
    }

    fn seq(&self, place: &str) -> Option<u64> {
        self.entries.get(place).map(|entry| entry.seq)
    }

    fn len(&self) -> usize {
        self.entries.len()
    }

    fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// Sends and receives volatile messages on one connection; the driver polls it. It never ends, and may be dropped at
/// any time: a message in transfer is then lost.
pub(crate) async fn serve(session: &Session, conn: &Connection) -> Infallible {
    let sending = async {
        let admitted = session.welcome().is_some();
        // Boxed, like all rare work here: the socket's task needs no memory for it otherwise.
        if admitted || Box::pin(session.wait_admitted()).await.is_ok() {
            tokio::join!(send_small(session, conn), send_large(session, conn));
        }
    };
    tokio::join!(
        sending,
        take_datagrams(session, conn),
        take_streams(session, conn)
    );
    std::future::pending().await
}

/// Drops volatile messages that a peer sends before admission, so that they do not accumulate.
pub(crate) async fn discard(conn: &Connection) -> Infallible {
    let datagrams = async {
        let mut dropped = 0_usize;
        while conn.read_datagram().await.is_ok() {
            dropped = dropped.wrapping_add(1);
            if dropped.is_multiple_of(TURN) {
                tokio::task::yield_now().await;
            }
        }
    };
    tokio::join!(datagrams, conn.refuse_early());
    std::future::pending().await
}

/// Sends the messages that fit into datagrams, as QUIC has room, until the connection has ended.
async fn send_small(session: &Session, conn: &Connection) {
    let volatiles = &session.volatiles;
    loop {
        if volatiles.first_small().is_none() {
            session.wake.wait(SMALL).await;
            continue;
        }
        // Boxed, like the large ones: a connection needs no memory for it while nothing is sent.
        if Box::pin(move_small(session, conn)).await.is_err() {
            return;
        }
    }
}

/// The connection is over.
struct Over;

async fn move_small(session: &Session, conn: &Connection) -> Result<(), Over> {
    let volatiles = &session.volatiles;
    let mut moved = 0_usize;
    while let Some((place, seq, front)) = volatiles.first_small() {
        moved = moved.wrapping_add(1);
        if moved.is_multiple_of(TURN) {
            tokio::task::yield_now().await;
        }
        let body = whole(&front, &place, seq);
        let sent = if conn
            .max_datagram_size()
            .is_some_and(|most| body.len() <= most)
        {
            tokio::select! {
                biased;
                // A newer message may have replaced it.
                () = session.wake.wait(SMALL) => continue,
                sent = conn.send_datagram(body) => sent,
            }
        } else {
            Err(DatagramError::TooLarge)
        };
        match sent {
            Ok(()) => {
                let mut out = lock(&volatiles.out);
                let out = out.get_or_make();
                // Otherwise it was replaced just now, and already counted as dropped.
                if out.small.seq(&place) == Some(seq) {
                    out.small.remove(&place);
                    session.counts.one(Count::VolatileSent);
                }
            }
            Err(DatagramError::Lost) => return Err(Over),
            Err(DatagramError::TooLarge) => {
                lock(&volatiles.out).get_or_make().is_large(&place, seq);
                session.wake.set(LARGE);
            }
        }
    }
    Ok(())
}

/// Sends the messages that are too large for datagrams, each on a stream of its own, until the connection has ended.
///
/// The peer permits one stream at a time. A message that is being sent is completed even if a newer one waits:
/// otherwise a value that changes faster than it can be sent would never arrive.
async fn send_large(session: &Session, conn: &Connection) {
    let volatiles = &session.volatiles;
    loop {
        if !volatiles.any_large() {
            session.wake.wait(LARGE).await;
            continue;
        }
        if Box::pin(move_large(session, conn)).await.is_err() {
            return;
        }
    }
}

async fn move_large(session: &Session, conn: &Connection) -> Result<(), Over> {
    let volatiles = &session.volatiles;
    let mut open = None;
    loop {
        let mut stream = match open.take() {
            Some(stream) => stream,
            None if !volatiles.any_large() => return Ok(()),
            None => conn.open_uni().await.map_err(|_| Over)?,
        };
        // Taken as late as possible, because a newer message could replace it until now.
        let first = lock(&volatiles.out).get_or_make().large.pop();
        let Some((place, entry)) = first else {
            // A stream without content would not be a message.
            session.wake.wait(LARGE).await;
            open = Some(stream);
            continue;
        };
        let mut body = [
            Bytes::copy_from_slice(&[head(&place)]),
            entry.item.slice(1..),
            tail(&place, entry.seq).into(),
        ];
        match stream.write_all(&mut body).await {
            Ok(()) => {
                stream.finish();
                session.counts.one(Count::VolatileSent);
            }
            Err(StreamError::Lost(_)) => return Err(Over),
            Err(_) => session.counts.one(Count::VolatileDropped),
        }
    }
}

async fn take_datagrams(session: &Session, conn: &Connection) {
    let mut moved = 0_usize;
    loop {
        match conn.read_datagram().await {
            // Copied, because the datagram is a slice of a buffer with other datagrams.
            Ok(datagram) => take(session, Bytes::copy_from_slice(&datagram)),
            Err(_) => return,
        }
        moved = moved.wrapping_add(1);
        if moved.is_multiple_of(TURN) {
            tokio::task::yield_now().await;
        }
    }
}

async fn take_streams(session: &Session, conn: &Connection) {
    loop {
        let reading = match conn.accept_uni().await {
            Ok(stream) => Box::pin(take_stream(session, stream)),
            Err(_) => return,
        };
        reading.await;
    }
}

async fn take_stream(session: &Session, mut stream: RecvStream) {
    match read(&mut stream, session).await {
        Ok(body) => take(session, body),
        Err(code) => {
            if let Some(code) = code {
                stream.stop(code);
                if let Some(left_out) = session.log_limit.line() {
                    tracing::warn!(%code, left_out, "volatile message given up");
                }
            }
            session.counts.one(Count::VolatileDropped);
        }
    }
}

/// Reads one message to its end. Fails with the code to stop the stream with, or `None` if the sender has reset it.
async fn read(stream: &mut RecvStream, session: &Session) -> Result<Bytes, Option<CloseCode>> {
    let limit = session.limits.frame.min(session.limits.volatile_bytes);
    let period = session.timeouts.frame;
    let least = MIN_FRAME_RATE.saturating_mul(period.as_secs().max(1));
    let (mut body, mut mark) = (Vec::new(), 0);
    let mut deadline = Instant::now() + period;
    loop {
        match tokio::time::timeout_at(deadline, stream.read(limit)).await {
            Ok(Ok(Some(chunk))) if body.len() + chunk.len() > limit => {
                return Err(Some(CloseCode::FRAME_TOO_LARGE));
            }
            Ok(Ok(Some(chunk))) => body.extend_from_slice(&chunk),
            Ok(Ok(None)) => return Ok(Bytes::from(body.into_boxed_slice())),
            Ok(Err(_)) => return Err(None),
            Err(_) if ((body.len() - mark) as u64) < least => {
                return Err(Some(CloseCode::FRAME_TIMEOUT));
            }
            Err(_) => {
                mark = body.len();
                deadline = Instant::now() + period;
            }
        }
    }
}

fn take(session: &Session, body: Bytes) {
    match Volatile::decode(body) {
        Ok(message) => {
            session.counts.one(Count::VolatileReceived);
            let dropped = lock(&session.volatiles.waiting)
                .get_or_make()
                .arrived(message, &session.limits);
            session.counts.add(Count::VolatileDropped, dropped);
            session.volatiles.arrived.notify_one();
        }
        Err(error) => {
            session.counts.one(Count::VolatileMalformed);
            if let Some(left_out) = session.log_limit.line() {
                tracing::warn!(%error, left_out, "volatile message refused");
            }
        }
    }
}

#[cfg(test)]
mod tests;
