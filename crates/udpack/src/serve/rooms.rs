//! Rooms: one message, encoded once, for many channels of a server. Sending never waits for a slow member.
//!
//! A room is a list of channels. A send copies the pointer to the present list and then queues the same bytes for each
//! member in turn; it holds no lock but that member's own. The room's policy decides what happens if a member's queue
//! is full ([`Overflow`]).
//!
//! Order of locks: the table, a guest's list of rooms, a room's `sending`, its presence, its list of guests, the tracked
//! sessions, an outbox, a room's log, the list of logs. A seat is dropped with none of them held.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;
use tokio::runtime::Handle;

use crate::base::lock;
use crate::channel::history::{Archive, Record};
use crate::channel::outbox::Outbox;
use crate::channel::overflow::{Overflow, Push, Tag};
use crate::channel::{Channel, WeakChannel};
use crate::metrics::Count;
use crate::serve::history::Start;
use crate::serve::node::{Node, Running, Shared};
use crate::serve::presence::{Presence, Tracked};
use crate::session::socket::Socket;
use crate::session::volatile::{Ready, Volatile};
use crate::session::{Attached, Session, SessionId};
use crate::trust::auth::Peer;
use crate::wire::code::{CloseCode, CloseReason};
use crate::wire::control::RoomPosition;
use crate::wire::event::Event;
use crate::wire::message::{EncodeError, Encoded, NameError, check_name};

/// The room name in gaps of messages to all channels.
const ALL: &str = "*";

/// Messages to a room that follow each other faster than this are left to the channels' writers, which send many at
/// once. Writing a message directly takes QUIC's lock, about a microsecond for each member.
const QUIET: Duration = Duration::from_micros(50);

/// The rooms of one server. A handle: clones share the rooms.
#[derive(Clone)]
pub struct Rooms {
    directory: Arc<Directory>,
}

pub(crate) struct Directory {
    pub(super) table: Mutex<Table>,
    pub(super) archive: Arc<Archive>,
    pub(crate) tracked: Tracked,
    pub(crate) runtime: Handle,
    max_rooms: usize,
    next: AtomicU64,
    dropped: AtomicU64,
    /// Set if the server is a node of a cluster.
    running: OnceLock<Running>,
}

pub(super) struct Table {
    pub(super) rooms: HashMap<Arc<str>, Arc<Room>>,
    /// The known channels by name, one list for each name.
    channels: HashMap<Arc<str>, Arc<Room>>,
    all: Arc<Room>,
}

/// One room, or one of the lists of all channels of a name.
pub(crate) struct Room {
    pub(crate) tag: Arc<Tag>,
    /// The key of the presence state in a member's queue.
    pub(crate) presence_tag: Arc<Tag>,
    /// Sorted by key. A sender takes the list as it is at that moment.
    guests: Mutex<Arc<Vec<Arc<Guest>>>>,
    pub(super) sending: Mutex<Sending>,
    pub(crate) presence: Mutex<Presence>,
    /// In a cluster, the room's topic.
    shared: Option<Arc<Shared>>,
}

/// The settings for sending to a room.
#[derive(Default)]
pub(super) struct Sending {
    /// Set by the application; a room with a policy stays when it is empty.
    pub(super) policy: Option<Overflow>,
    pub(super) history: Option<Arc<Record>>,
    /// When the last send began.
    begun: Option<Instant>,
}

impl Sending {
    /// Whether the room may be removed without losing a setting.
    fn is_default(&self) -> bool {
        self.policy.is_none() && self.history.is_none()
    }

    /// Records the beginning of a send. Returns whether the room was idle before.
    pub(super) fn begin(&mut self) -> bool {
        let now = Instant::now();
        let before = self.begun.replace(now);
        before.is_none_or(|before| now.duration_since(before) >= QUIET)
    }
}

/// A channel in the directory; it does not keep the channel alive.
pub(crate) struct Guest {
    pub(crate) key: u64,
    pub(crate) session: Arc<Session>,
    pub(crate) session_id: SessionId,
    pub(crate) outbox: Arc<Outbox>,
    /// The number of the connection with which the channel ends; `None` if it is resumable.
    connection: Option<u64>,
    channel: WeakChannel,
    name: Arc<str>,
    /// Positions that the channel's opener presented, of rooms that the channel has not joined since.
    pub(super) since: Mutex<Vec<RoomPosition>>,
    rooms: Mutex<Joined>,
}

impl Guest {
    pub(super) fn close_slow(&self) {
        if let Some(channel) = self.channel.upgrade() {
            channel.close_with(CloseReason::local(
                CloseCode::SLOW_PEER,
                "the peer is too slow for this room",
            ));
        }
    }
}

/// The rooms of a channel; after its end, the names of its last rooms.
enum Joined {
    In(BTreeMap<Arc<str>, Arc<Room>>),
    Over(Vec<Arc<str>>),
}

impl Guest {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Joined {
    /// Removes the channel from all rooms, because the channel has ended.
    fn end(&mut self) -> BTreeMap<Arc<str>, Arc<Room>> {
        match self {
            Self::In(rooms) => {
                let rooms = std::mem::take(rooms);
                *self = Self::Over(rooms.keys().cloned().collect());
                rooms
            }
            Self::Over(_) => BTreeMap::new(),
        }
    }
}

/// A channel's membership in its rooms. The channel's outbox holds it; dropping it, when the sending side ends, leaves
/// the rooms.
pub(crate) struct Seat {
    directory: Weak<Directory>,
    guest: Arc<Guest>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let rooms = lock(&self.guest.rooms).end();
        if let Some(directory) = self.directory.upgrade() {
            directory.left(&self.guest, rooms);
        }
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Seat").field(&self.guest.key).finish()
    }
}

impl Attached for Rooms {
    fn resumed(&self, session: &Arc<Session>, connection: u64) {
        self.expect_again(session, connection);
    }
}

impl Rooms {
    /// The rooms of a session's server; `None` on a client.
    fn of(session: &Session) -> Option<&Self> {
        let attached: &dyn Any = &**session.rooms.get()?;
        attached.downcast_ref()
    }

    pub(crate) fn new(max_rooms: usize, history_bytes: usize, runtime: Handle) -> Self {
        Self {
            directory: Arc::new(Directory {
                table: Mutex::new(Table {
                    rooms: HashMap::new(),
                    channels: HashMap::new(),
                    all: Room::new(0, ALL.into(), None),
                }),
                archive: Archive::new(history_bytes),
                tracked: Tracked::default(),
                runtime,
                max_rooms,
                next: AtomicU64::new(2),
                dropped: AtomicU64::new(0),
                running: OnceLock::new(),
            }),
        }
    }

    /// Connects these rooms to a cluster. Must be called before a room exists.
    pub(crate) fn cluster(&self, node: &Arc<Node>) {
        let _ = self
            .directory
            .running
            .set(node.run(Arc::downgrade(&self.directory)));
    }

    /// The cluster node of these rooms.
    pub(crate) fn node(&self) -> Option<&Arc<Node>> {
        self.directory.node()
    }

    pub(crate) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Addresses the members of a room; a room without members has none.
    pub fn to<'a>(&self, room: &str) -> Broadcast<'a> {
        let name = room;
        let room = lock(&self.directory.table).rooms.get(name).cloned();
        let shared = match &room {
            Some(room) => room.shared.clone(),
            None => self.node().and_then(|node| node.stray(name)),
        };
        Broadcast {
            shared,
            ..self.broadcast(room)
        }
    }

    /// Addresses every channel of this name that the rooms know: channels that have joined a room, and channels that a
    /// `Router` serves. A [`Gap`](crate::Gap) in such messages has the channel's name.
    pub fn to_channels<'a>(&self, name: &str) -> Broadcast<'a> {
        let room = lock(&self.directory.table).channels.get(name).cloned();
        self.broadcast(room)
    }

    /// Addresses every channel that the rooms know, as for [`to_channels`](Self::to_channels). A gap has the name `*`.
    pub fn to_all<'a>(&self) -> Broadcast<'a> {
        let room = lock(&self.directory.table).all.clone();
        self.broadcast(Some(room))
    }

    /// The present members of a room.
    pub fn members(&self, room: &str) -> Vec<Member> {
        let room = lock(&self.directory.table).rooms.get(room).cloned();
        let guests = room.map(|room| room.guests()).unwrap_or_default();
        guests
            .iter()
            .map(|guest| Member {
                guest: guest.clone(),
            })
            .collect()
    }

    /// Removes all members from a room, as [`Channel::leave`] does for one. Returns how many there were.
    pub fn leave(&self, room: &str) -> usize {
        let members = self.members(room).into_iter();
        members
            .filter(|member| self.directory.leave(&member.guest, room))
            .count()
    }

    /// Closes the channels of all members of a room, as [`Channel::close`] does for one. Returns how many there were.
    /// Their sockets stay open; close those of [`members`](Self::members) to end them.
    pub fn disconnect(&self, room: &str, code: CloseCode, text: &str) -> usize {
        let channels = self.members(room).into_iter();
        let channels = channels.filter_map(|member| member.channel());
        channels
            .map(|channel| channel.close_with(CloseReason::local(code, text)))
            .count()
    }

    /// The present rooms: those with members, and those with their own policy or with a history.
    pub fn names(&self) -> Vec<String> {
        let table = lock(&self.directory.table);
        table.rooms.keys().map(|name| (**name).to_owned()).collect()
    }

    /// The present rooms, as [`names`](Self::names) returns them, each with its number of members.
    pub fn sizes(&self) -> Vec<(String, usize)> {
        let rooms: Vec<_> = {
            let table = lock(&self.directory.table);
            table.rooms.values().cloned().collect()
        };
        rooms
            .iter()
            .map(|room| ((*room.tag.name).to_owned(), room.guests().len()))
            .collect()
    }

    /// Sets what happens to this room's messages for members whose queues are full, from the next message on.
    ///
    /// A room with its own policy stays when it is empty, until it gets the default policy again.
    ///
    /// # Errors
    /// If the name is invalid, or there are `Limits::rooms` already.
    pub fn policy(&self, room: &str, overflow: Overflow) -> Result<(), JoinError> {
        check_name(room)?;
        let mut table = lock(&self.directory.table);
        let has_history =
            (table.rooms.get(room)).is_some_and(|room| lock(&room.sending).history.is_some());
        let chosen = Some(overflow).filter(|chosen| has_history || *chosen != Overflow::default());
        if chosen.is_some() || table.rooms.contains_key(room) {
            let room = self.directory.room(&mut table, room)?;
            lock(&room.sending).policy = chosen;
            self.directory.sweep_in(&mut table, &room);
        }
        Ok(())
    }

    /// How many messages were lost so far because members' queues were full, over all rooms.
    pub fn dropped(&self) -> u64 {
        self.directory.dropped.load(Ordering::Relaxed) + self.directory.lost_from_history()
    }

    fn broadcast<'a>(&self, room: Option<Arc<Room>>) -> Broadcast<'a> {
        Broadcast {
            directory: self.directory.clone(),
            room,
            shared: None,
            except: Vec::new(),
        }
    }
}

impl fmt::Debug for Rooms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = lock(&self.directory.table);
        f.debug_struct("Rooms")
            .field("rooms", &table.rooms.len())
            .field("channels", &table.all.guests().len())
            .finish_non_exhaustive()
    }
}

/// A member of a room, as it was when it was asked for.
#[derive(Clone)]
pub struct Member {
    guest: Arc<Guest>,
}

impl Member {
    /// The session of its channel.
    pub fn session(&self) -> &SessionId {
        &self.guest.session_id
    }

    /// Its peer.
    pub fn peer(&self) -> Option<Peer> {
        self.guest.session.peer.get()
    }

    /// Its channel's name.
    pub fn name(&self) -> &str {
        &self.guest.name
    }

    /// Its channel: to send to this member alone, to send it a request, or to close it. `None` if no handle of the
    /// channel exists any more.
    pub fn channel(&self) -> Option<Channel> {
        self.guest.channel.upgrade()
    }

    /// The socket of its channel.
    pub fn socket(&self) -> Socket {
        Socket::of(&self.guest.session)
    }

    /// Whether its peer is connected; see [`Socket::is_connected`].
    pub fn is_connected(&self) -> bool {
        self.guest.session.states.is_connected()
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member")
            .field("session", &self.session())
            .field("peer", &self.peer())
            .field("name", &self.name())
            .finish()
    }
}

/// The channels that a message is addressed to. Made by [`Rooms::to`] and similar methods.
#[must_use = "nothing is sent until `send` is called"]
pub struct Broadcast<'a> {
    pub(super) directory: Arc<Directory>,
    pub(super) room: Option<Arc<Room>>,
    /// In a cluster, the topic on which other nodes receive the message.
    pub(super) shared: Option<Arc<Shared>>,
    pub(super) except: Vec<&'a str>,
}

/// The outcome of one message to many members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// How many members it was queued for. If the cluster keeps the room's messages: how many this node had then, who
    /// get the message when it comes from the room's log.
    pub delivered: u64,
    /// How many messages were lost: this one, for members without room for it, and older ones that were dropped for it.
    pub dropped: u64,
}

impl Sent {
    /// Counts the outcome for one member. Closes a member that is too slow for the room's policy.
    pub(super) fn count(&mut self, push: Push, guest: &Guest) {
        match push {
            Push::Queued { lost } => {
                self.delivered += 1;
                self.dropped += lost;
            }
            Push::Lost => self.dropped += 1,
            Push::TooSlow => {
                self.dropped += 1;
                guest.close_slow();
            }
            Push::Over => {}
        }
    }
}

impl<'a> Broadcast<'a> {
    /// Excludes the channels of this session.
    pub fn except(mut self, session: &'a str) -> Self {
        self.except.push(session);
        self
    }

    /// Sends one message to all of them: encodes it once and queues it for each, without waiting. The room's
    /// [`Overflow`] policy applies to a member whose queue is full, and to a member that does not accept so large a
    /// frame.
    ///
    /// Messages to one channel arrive in the order in which they were queued, whether by rooms or directly. If two
    /// threads send to one room at the same moment, different members may receive the two messages in different order.
    ///
    /// # Errors
    /// If the message cannot be sent to anybody: its event name is reserved or invalid, or its data cannot be encoded.
    pub fn send<T: Serialize + ?Sized>(self, event: &str, data: &T) -> Result<Sent, EncodeError> {
        Ok(self.send_encoded(&Encoded::new(event, data)?))
    }

    /// Like [`send`](Self::send), with a typed event.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn emit<E: Event>(self, event: &E) -> Result<Sent, EncodeError> {
        self.send(E::NAME, event)
    }

    /// Like [`send`](Self::send), with a message that is already encoded.
    pub fn send_encoded(self, message: &Encoded) -> Sent {
        if let Some(sent) = self.append(message) {
            return sent;
        }
        let sent = match &self.room {
            Some(room) => self.directory.deliver(room, message.bytes(), &self.except),
            None => Sent::default(),
        };
        if let Some(shared) = &self.shared
            && let Some(node) = self.directory.node()
        {
            node.publish(shared, &self.except, message.bytes());
        }
        sent
    }
}

/// Volatile messages: to the sockets of the channels.
impl Broadcast<'_> {
    /// Sends a volatile message, of which only the newest counts, to the socket of each channel; once to a socket with
    /// several such channels. See [`Socket::send_volatile`]. The message is encoded once. Nothing waits and there is no
    /// gap: a slow socket gets the next message instead.
    ///
    /// `Sent` counts sockets; `dropped` counts messages that this one replaced and peers that it was too large for.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn send_volatile<T: Serialize + ?Sized>(
        self,
        event: &str,
        data: &T,
    ) -> Result<Sent, EncodeError> {
        self.send_volatile_encoded(None, &Encoded::new(event, data)?)
    }

    /// Like [`send_volatile`](Self::send_volatile), with a key, for several values of one event; see
    /// [`Socket::send_volatile_keyed`].
    ///
    /// # Errors
    /// As for [`send`](Self::send), and if the key is invalid.
    pub fn send_volatile_keyed<T: Serialize + ?Sized>(
        self,
        event: &str,
        key: &str,
        data: &T,
    ) -> Result<Sent, EncodeError> {
        self.send_volatile_encoded(Some(key), &Encoded::new(event, data)?)
    }

    /// Like [`send_volatile`](Self::send_volatile), or with a key like
    /// [`send_volatile_keyed`](Self::send_volatile_keyed), with a message that is already encoded.
    ///
    /// # Errors
    /// If the key is invalid.
    pub fn send_volatile_encoded(
        self,
        key: Option<&str>,
        message: &Encoded,
    ) -> Result<Sent, EncodeError> {
        Ok(self.volatile(&Ready::of(message, key)?))
    }

    /// Sends a volatile message that arrived from one of the sockets to the others. Event, key and data are neither
    /// decoded nor copied. Exclude its sender with [`except`](Self::except).
    pub fn relay_volatile(self, message: &Volatile) -> Sent {
        // A message that was received can be sent.
        Ready::relay(message).map_or_else(|_| Sent::default(), |message| self.volatile(&message))
    }

    fn volatile(self, message: &Ready) -> Sent {
        let mut sent = Sent::default();
        let Some(room) = &self.room else {
            return sent;
        };
        let number = self.directory.next();
        for guest in room.guests().iter() {
            let session = &guest.session;
            if self.except.contains(&&*guest.session_id)
                || session.end.get().is_some()
                || !session.volatiles.is_first(number)
            {
                continue;
            }
            match message.send(session) {
                Ok(dropped) => {
                    sent.delivered += 1;
                    sent.dropped += dropped;
                }
                Err(_) => {
                    session.counts.one(Count::VolatileDropped);
                    sent.dropped += 1;
                }
            }
        }
        sent
    }
}

impl fmt::Debug for Broadcast<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broadcast")
            .field("room", &self.room.as_ref().map(|room| &room.tag.name))
            .field("except", &self.except)
            .finish()
    }
}

/// Why a channel cannot join a room.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The room's name is not valid.
    #[error("room's {0}")]
    Name(#[from] NameError),
    /// The channel belongs to a client's socket; only servers have rooms.
    #[error("only a server has rooms")]
    Client,
    /// The channel has ended.
    #[error("the channel is over")]
    Closed,
    /// There are already as many rooms as `Limits::rooms` allows.
    #[error("there are {0} rooms already")]
    TooManyRooms(usize),
    /// The channel is already in as many rooms as `Limits::rooms_per_channel` allows.
    #[error("the channel is in {0} rooms already")]
    TooManyJoined(usize),
    /// A history needs a random number, and the system provides none.
    #[error("no random number for the room's history")]
    NoRandom,
}

impl Channel {
    /// The rooms of this channel's server; `None` on a client.
    pub fn rooms_handle(&self) -> Option<Rooms> {
        Rooms::of(self.session()).cloned()
    }

    /// Joins a room: messages to the room from now on are also sent to this channel's peer. Joining a room again has no
    /// effect.
    ///
    /// A member stays until it [leaves](Self::leave) or the channel ends; a room does not keep a channel alive. If
    /// sessions are [tracked](Self::track) in the room, the peer is told which (`presence_state`).
    ///
    /// In a room with a [history](Rooms::history), a channel whose opener presented its position there first gets the
    /// messages that it missed: see [`OpenChannel::since`](crate::OpenChannel::since), and [`join_at`](Self::join_at)
    /// for other positions.
    ///
    /// # Errors
    /// On a client, on a channel that has ended, for an invalid name, and beyond `Limits::rooms` or
    /// `Limits::rooms_per_channel`.
    pub fn join(&self, room: &str) -> Result<(), JoinError> {
        self.enter(room, None).map(drop)
    }

    pub(crate) fn enter(
        &self,
        name: &str,
        start: Option<Start>,
    ) -> Result<(&Rooms, &Arc<Guest>, Arc<Room>), JoinError> {
        let (rooms, guest) = self.guest().ok_or(JoinError::Client)?;
        check_name(name)?;
        let room = {
            let mut table = lock(&rooms.directory.table);
            let mut joined = lock(&guest.rooms);
            let Joined::In(joined) = &mut *joined else {
                return Err(JoinError::Closed);
            };
            if let Some(room) = joined.get(name) {
                return Ok((rooms, guest, room.clone()));
            }
            let most = guest.session.limits.rooms_per_channel;
            if joined.len() >= most {
                return Err(JoinError::TooManyJoined(most));
            }
            let room = rooms.directory.room(&mut table, name)?;
            guest.follow(&rooms.directory, &room, start);
            room.add(guest);
            joined.insert(room.tag.name.clone(), room.clone());
            room
        };
        guest.outbox.catch_up_now();
        room.greet(guest);
        Ok((rooms, guest, room))
    }

    /// Leaves a room; returns whether the channel was a member. Messages sent to the room before still arrive.
    pub fn leave(&self, room: &str) -> bool {
        let Some((rooms, guest)) = self.guest() else {
            return false;
        };
        rooms.directory.leave(guest, room)
    }

    /// The rooms of the channel, sorted by name; after the channel's end, those it was in when it ended.
    pub fn rooms(&self) -> Vec<String> {
        let guest = self.member().get().and_then(|guest| guest.downcast_ref());
        let Some(guest): Option<&Arc<Guest>> = guest else {
            return Vec::new();
        };
        let names = |name: &Arc<str>| (**name).to_owned();
        match &*lock(&guest.rooms) {
            Joined::In(rooms) => rooms.keys().map(names).collect(),
            Joined::Over(rooms) => rooms.iter().map(names).collect(),
        }
    }

    /// Registers the channel, so that `to_channels` and `to_all` address it; `None` on a client.
    pub(crate) fn guest(&self) -> Option<(&Rooms, &Arc<Guest>)> {
        let rooms = Rooms::of(self.session())?;
        let guest = self.member().get_or_init(|| {
            let guest = Arc::new(Guest {
                key: rooms.directory.next(),
                session: self.session().clone(),
                session_id: self.session().id(),
                outbox: self.outbox().clone(),
                connection: (!self.outbox().keeps()).then(|| self.session().current().1),
                channel: self.downgrade(),
                name: self.name().into(),
                since: Mutex::new(self.presented().to_vec()),
                rooms: Mutex::new(Joined::In(BTreeMap::new())),
            });
            let welcome = self.session().welcome();
            if welcome.is_some_and(|welcome| welcome.marks) {
                guest.outbox.set_paced();
            }
            rooms.directory.welcome(&guest);
            // If the channel has ended, the outbox returns the seat, and dropping it here leaves the rooms.
            let _ = self.outbox().keep(Box::new(Seat {
                directory: Arc::downgrade(&rooms.directory),
                guest: guest.clone(),
            }));
            Box::new(guest)
        });
        Some((rooms, guest.downcast_ref()?))
    }
}

impl Directory {
    pub(crate) fn next(&self) -> u64 {
        self.next.fetch_add(2, Ordering::Relaxed)
    }

    /// The room of this name; creates it if necessary.
    pub(super) fn room(&self, table: &mut Table, name: &str) -> Result<Arc<Room>, JoinError> {
        if let Some(room) = table.rooms.get(name) {
            return Ok(room.clone());
        }
        if table.rooms.len() >= self.max_rooms {
            return Err(JoinError::TooManyRooms(self.max_rooms));
        }
        let node = self.node();
        let shared = node.and_then(|node| node.enter(name));
        let room = Room::new(self.next(), name.into(), shared);
        if let (Some(node), Some(shared)) = (node, &room.shared) {
            node.entered(shared, &room);
        }
        table.rooms.insert(room.tag.name.clone(), room.clone());
        Ok(room)
    }

    pub(crate) fn node(&self) -> Option<&Arc<Node>> {
        self.running.get().map(|running| &running.node)
    }

    /// In a cluster, calls `tell` with the node and the room's topic.
    pub(crate) fn share(&self, room: &Room, tell: impl FnOnce(&Node, &Shared)) {
        if let (Some(node), Some(shared)) = (self.node(), &room.shared) {
            tell(node, shared);
        }
    }

    /// Queues a frame for the room's members on this node.
    pub(crate) fn deliver(&self, room: &Room, frame: &Bytes, except: &[&str]) -> Sent {
        let (policy, history, idle) = {
            let mut sending = lock(&room.sending);
            (sending.policy, sending.history.clone(), sending.begin())
        };
        // A copy has only what comes by the log; this comes from a node that does not keep the room's messages.
        if let Some(record) = history.as_ref().filter(|record| !record.copy) {
            return room.deliver_kept(record, frame, except, (policy, idle));
        }
        let whom = |guest: &Guest| !except.contains(&&*guest.session_id);
        self.deliver_where(room, frame, whom, (policy.unwrap_or_default(), idle))
    }

    /// Queues a frame for some of the channels of this name; returns for how many.
    pub(crate) fn deliver_to(
        &self,
        channel: &str,
        frame: &Bytes,
        whom: impl Fn(&Guest) -> bool,
    ) -> u64 {
        let channels = lock(&self.table).channels.get(channel).cloned();
        channels.map_or(0, |channels| {
            let sending = (Overflow::default(), lock(&channels.sending).begin());
            self.deliver_where(&channels, frame, whom, sending)
                .delivered
        })
    }

    fn deliver_where(
        &self,
        room: &Room,
        frame: &Bytes,
        whom: impl Fn(&Guest) -> bool,
        (policy, idle): (Overflow, bool),
    ) -> Sent {
        let mut sent = Sent::default();
        for guest in room.guests().iter() {
            if !whom(guest) {
                continue;
            }
            let limit = guest.session.frame_limit();
            let counts = &guest.session.counts;
            let dropped = sent.dropped;
            let push = guest
                .outbox
                .push_room(&room.tag, frame, limit, policy, idle);
            if matches!(push, Push::Queued { .. }) {
                counts.one(Count::RoomSent);
            }
            sent.count(push, guest);
            if sent.dropped > dropped {
                counts.add(Count::RoomDropped, sent.dropped - dropped);
            }
        }
        if sent.dropped > 0 {
            self.dropped.fetch_add(sent.dropped, Ordering::Relaxed);
        }
        sent
    }

    /// Tells the room's members on this node that this many messages of other nodes are lost.
    pub(crate) fn missing(&self, room: &Room, lost: u64) {
        let history = lock(&room.sending).history.clone();
        let history = history.filter(|record| !record.copy);
        if let Some(record) = &history {
            record.skip(lost);
        }
        for guest in room.guests().iter() {
            match &history {
                Some(record) => guest.outbox.follow_skip(record),
                None => guest.outbox.lose_room(&room.tag, lost),
            }
        }
    }

    pub(crate) fn existing(&self, name: &str) -> Option<Arc<Room>> {
        lock(&self.table).rooms.get(name).cloned()
    }

    fn welcome(&self, guest: &Arc<Guest>) {
        let mut table = lock(&self.table);
        table.all.add(guest);
        let id = self.next();
        table
            .channels
            .entry(guest.name.clone())
            .or_insert_with(|| Room::new(id, guest.name.clone(), None))
            .add(guest);
    }

    /// Handles the end of a channel.
    fn left(&self, guest: &Guest, rooms: BTreeMap<Arc<str>, Arc<Room>>) {
        {
            let mut table = lock(&self.table);
            table.all.remove(guest.key);
            if let Some(channels) = table.channels.get(&guest.name)
                && channels.remove(guest.key)
            {
                table.channels.remove(&guest.name);
            }
        }
        // A lost connection alone ends no presence: the session may be resumed.
        let session = &guest.session;
        let lost = guest.connection.filter(|connection| {
            let (conn, now) = session.current();
            session.end.get().is_none() && (*connection < now || conn.is_over())
        });
        for room in rooms.values() {
            self.part(guest, room, lost);
        }
    }

    /// Removes a channel from a room; returns whether it was a member.
    fn leave(&self, guest: &Guest, room: &str) -> bool {
        let left = match &mut *lock(&guest.rooms) {
            Joined::In(rooms) => rooms.remove(room),
            Joined::Over(_) => None,
        };
        match left {
            Some(room) => {
                self.part(guest, &room, None);
                true
            }
            None => false,
        }
    }

    fn part(&self, guest: &Guest, room: &Arc<Room>, lost: Option<u64>) {
        room.remove(guest.key);
        let record = lock(&room.sending).history.clone();
        if let Some(record) = record {
            guest.outbox.unfollow(&record);
        }
        room.parted(self, guest, lost);
        self.sweep(room);
    }

    /// Removes a room that has no members, no policy and no history.
    pub(crate) fn sweep(&self, room: &Arc<Room>) {
        self.sweep_in(&mut lock(&self.table), room);
    }

    pub(super) fn sweep_in(&self, table: &mut Table, room: &Arc<Room>) {
        if table.sweep(room)
            && let (Some(node), Some(shared)) = (self.node(), &room.shared)
        {
            node.leave(shared);
        }
    }
}

impl Table {
    /// Removes the room if nothing needs it; returns whether it did.
    fn sweep(&mut self, room: &Arc<Room>) -> bool {
        let name = &room.tag.name;
        room.guests().is_empty()
            && lock(&room.sending).is_default()
            && lock(&room.presence).is_deserted()
            && self
                .rooms
                .get(name)
                .is_some_and(|known| Arc::ptr_eq(known, room))
            && self.rooms.remove(name).is_some()
    }
}

impl Room {
    fn new(id: u64, name: Arc<str>, shared: Option<Arc<Shared>>) -> Arc<Self> {
        let tag = |id, replaces| {
            Arc::new(Tag {
                id,
                name: name.clone(),
                replaces,
            })
        };
        Arc::new(Self {
            tag: tag(id, false),
            presence_tag: tag(id + 1, true),
            guests: Mutex::default(),
            sending: Mutex::default(),
            presence: Mutex::default(),
            shared,
        })
    }

    /// The present members.
    pub(crate) fn guests(&self) -> Arc<Vec<Arc<Guest>>> {
        lock(&self.guests).clone()
    }

    pub(crate) fn has(&self, key: u64) -> bool {
        let guests = lock(&self.guests);
        guests.binary_search_by_key(&key, |guest| guest.key).is_ok()
    }

    fn add(&self, guest: &Arc<Guest>) {
        let mut guests = lock(&self.guests);
        if let Err(at) = guests.binary_search_by_key(&guest.key, |guest| guest.key) {
            Arc::make_mut(&mut guests).insert(at, guest.clone());
        }
    }

    /// Returns whether no member is left.
    fn remove(&self, key: u64) -> bool {
        let mut guests = lock(&self.guests);
        if let Ok(at) = guests.binary_search_by_key(&key, |guest| guest.key) {
            Arc::make_mut(&mut guests).remove(at);
        }
        guests.is_empty()
    }
}
