//! Presence: the members of a room with their metadata, sent to all members as it changes.
//!
//! An entry belongs to a session. It survives a lost connection for as long as the session can be resumed, and tracking
//! the same metadata again changes nothing. So a resume shows nobody leaving or joining.
//!
//! In a cluster each node tells the others about its own sessions, in numbered versions: each change makes the next
//! version. A node that misses a version asks for the whole list. The entries of a lost node are removed. The entries
//! of a node that leaves stay for a while, because their peers may connect to another node; there a new entry replaces
//! the old one without an absence in between.
//!
//! Each member is sent the whole state first and changes from then on. A member whose queue is full gets the whole
//! state again later, the latest only, so that it is up to date as soon as it has caught up.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Duration, Instant};

use crate::base::lock;
use crate::base::text::printable_within;
use crate::channel::Channel;
use crate::channel::overflow::{Overflow, Push};
use crate::cluster::NodeId;
use crate::cluster::wire::Head;
use crate::serve::rooms::{Directory, Guest, JoinError, Room, Rooms};
use crate::session::{Session, SessionId};
use crate::trust::auth::Peer;
use crate::wire::frame::PREFIX;
use crate::wire::message::{self, DecodeError, EncodeError, Encoded, Message};
use crate::wire::msgpack::{FieldError, Fields, Shape, Values, Walk, validate};

/// The event with all entries: `{room, entries}`, where each entry is `{peer, session, meta}`.
const STATE: &str = "presence_state";
/// The event with changed entries: `{room, joins, leaves}`; `why` is set if a node was lost.
const DIFF: &str = "presence_diff";
/// The reason when entries are removed because their node is lost.
const NODE_LOST: &str = "node_lost";
/// The largest metadata, in bytes.
const META_BYTES: usize = 4 << 10;
/// The most bytes of a room's entries, so that all of them fit into one frame.
const ROOM_BYTES: usize = 1 << 20;
/// For this long the session of a draining node may appear on another node.
const MOVING: Duration = Duration::from_secs(10);
/// The most msgpack values in a room's entries, for the same reason.
const ROOM_ELEMENTS: usize = 60_000;

/// The sessions that are present in one room.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    entries: BTreeMap<SessionId, Entry>,
    /// Members that have been sent the state.
    informed: HashSet<u64>,
    bytes: usize,
    elements: usize,
    /// The version of each other node's entries.
    versions: HashMap<NodeId, (u32, u64)>,
}

#[derive(Debug, Clone)]
struct Entry {
    /// The node of the session; `None` for this node.
    node: Option<NodeId>,
    /// The session has left that node, and its peer may connect to another node until then.
    until: Option<Instant>,
    /// The channel that tracks it; 0 if that is on another node.
    guest: u64,
    /// The number of the connection with which that channel ended.
    lost: Option<u64>,
    meta: Bytes,
    /// `{peer, session, meta}`.
    encoded: Bytes,
    elements: usize,
}

/// The rooms in which each session is tracked.
#[derive(Debug, Default)]
pub(crate) struct Tracked {
    table: Mutex<TrackedTable>,
}

#[derive(Debug, Default)]
struct TrackedTable {
    rooms: HashMap<SessionId, HashSet<Arc<str>>>,
}

impl Tracked {
    /// Returns whether the session was not tracked before. Then a task must wait for its end.
    fn add(&self, session: &SessionId, room: &Arc<str>) -> bool {
        let mut table = lock(&self.table);
        // An empty set remains for as long as the session, because a task already waits for the session's end.
        let first = !table.rooms.contains_key(session);
        let rooms = table.rooms.entry(session.clone()).or_default();
        rooms.insert(room.clone());
        first
    }

    fn remove(&self, session: &SessionId, room: &str) {
        if let Some(rooms) = lock(&self.table).rooms.get_mut(session) {
            rooms.remove(room);
        }
    }

    fn rooms(&self, session: &SessionId) -> Vec<Arc<str>> {
        let table = lock(&self.table);
        let rooms = table.rooms.get(session).into_iter().flatten();
        rooms.cloned().collect()
    }

    fn take(&self, session: &SessionId) -> HashSet<Arc<str>> {
        let mut table = lock(&self.table);
        table.rooms.remove(session).unwrap_or_default()
    }
}

/// Why a channel cannot be tracked in a room.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// It cannot join the room.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The metadata cannot be sent: it is invalid on the wire, or larger than 4 KiB.
    #[error(transparent)]
    Meta(#[from] EncodeError),
    /// The entries of the room would not fit into one message of 1 MiB.
    #[error("the room's presence is full")]
    Full,
}

impl Channel {
    /// Announces this session and its metadata in a room; joins the room first if necessary.
    ///
    /// Members get `presence_state` `{room, entries}` first and `presence_diff` `{room, joins, leaves}` from then on;
    /// [`PresenceMap`] reads both. A session has one entry in a room: tracking it again replaces the metadata, and
    /// changes nothing if the metadata is the same. The entry is removed when it is [untracked](Self::untrack), when
    /// the channel leaves the room or is closed normally, and when the session ends. It remains when the connection is
    /// lost and the session can be resumed; if the channel ended with the connection, the entry must be tracked again
    /// within `Timeouts::presence` after the resume.
    ///
    /// # Errors
    /// As for [`join`](Self::join); if the metadata is invalid or too large; if the room's presence is full.
    pub fn track<T: Serialize + ?Sized>(&self, room: &str, meta: &T) -> Result<(), TrackError> {
        let mut buf = BytesMut::new();
        message::encode(&mut buf, STATE, meta, None, META_BYTES)?;
        let frame = buf.freeze();
        // The encoded message is valid.
        let meta =
            Message::decode(frame.slice(PREFIX..)).map_or_else(|_| Bytes::new(), |m| m.raw());
        let (rooms, guest, room) = self.enter(room, None)?;
        let peer = self.peer();
        let peer = peer.as_ref().map_or("", Peer::id);
        let encoded = encode_entry(peer, &guest.session_id, &meta);
        let entry = Entry {
            node: None,
            until: None,
            guest: guest.key,
            lost: None,
            elements: elements(&encoded),
            encoded,
            meta,
        };
        let directory = rooms.directory();
        if room.track(directory, guest, entry)? {
            rooms.watch(guest);
        }
        Ok(())
    }

    /// Removes this channel's entry from a room; returns whether there was one. The channel stays in the room.
    pub fn untrack(&self, room: &str) -> bool {
        let Some((rooms, guest)) = self.guest() else {
            return false;
        };
        let directory = rooms.directory();
        let Some(room) = directory.existing(room) else {
            return false;
        };
        room.clear(directory, &guest.session_id, |entry| {
            entry.guest == guest.key
        })
    }
}

impl Rooms {
    /// Waits for the end of a session that is tracked in a room.
    fn watch(&self, guest: &Guest) {
        let (session, id) = (guest.session.clone(), guest.session_id.clone());
        let directory = Arc::downgrade(self.directory());
        let tasks = session.tasks.clone();
        let over = async move {
            session.end.wait().await;
            if let Some(directory) = directory.upgrade() {
                for name in directory.tracked.take(&id) {
                    directory.clear(&name, &id, |_| true);
                }
            }
        };
        tasks.spawn_on(over, &self.directory().runtime);
    }

    /// The session continues on connection `connection`. Removes the entries that channels of earlier connections
    /// tracked, unless they are tracked again in time.
    pub(super) fn expect_again(&self, session: &Arc<Session>, connection: u64) {
        let id = session.id();
        let directory = self.directory();
        if directory.tracked.rooms(&id).is_empty() {
            return;
        }
        let directory = Arc::downgrade(directory);
        let (tasks, session) = (session.tasks.clone(), session.clone());
        let late = async move {
            tokio::select! {
                () = tokio::time::sleep(session.timeouts.presence) => {}
                // The end of the session removes all its entries anyway.
                _ = session.end.wait() => return,
            }
            if let Some(directory) = directory.upgrade()
                && !session.conn().is_over()
            {
                for name in directory.tracked.rooms(&id) {
                    directory.clear(&name, &id, |entry| {
                        entry.lost.is_some_and(|lost| lost < connection)
                    });
                }
            }
        };
        tasks.spawn_on(late, &self.directory().runtime);
    }
}

impl Directory {
    fn clear(&self, room: &str, session: &SessionId, which: impl Fn(&Entry) -> bool) {
        if let Some(room) = self.existing(room) {
            room.clear(self, session, which);
            self.sweep(&room);
        }
    }
}

impl Presence {
    /// Whether no session of this node is present.
    pub(crate) fn is_deserted(&self) -> bool {
        self.entries.values().all(|entry| entry.node.is_some())
    }

    /// Removes the entries of this peer that wait for it to come from another node.
    fn arrive(&mut self, peer: &str) -> Vec<Bytes> {
        let awaited = |entry: &Entry| entry.until.is_some() && entry.peer() == Some(peer);
        self.take(|_, entry| awaited(entry))
    }

    fn take(&mut self, which: impl Fn(&SessionId, &Entry) -> bool) -> Vec<Bytes> {
        let those = self.entries.iter().filter(|(id, entry)| which(id, entry));
        let those: Vec<_> = those.map(|(id, _)| id.clone()).collect();
        let taken = those.iter().filter_map(|id| self.remove(id));
        taken.map(|entry| entry.encoded).collect()
    }

    fn has_room(&self, session: &SessionId, entry: &Entry) -> bool {
        let old = self.entries.get(session);
        let (bytes, elements) = old.map_or((0, 0), |old| (old.encoded.len(), old.elements));
        self.bytes - bytes + entry.encoded.len() <= ROOM_BYTES
            && self.elements - elements + entry.elements <= ROOM_ELEMENTS
    }

    fn insert(&mut self, session: &SessionId, entry: Entry) -> Option<Entry> {
        self.bytes += entry.encoded.len();
        self.elements += entry.elements;
        let old = self.entries.insert(session.clone(), entry);
        if let Some(old) = &old {
            self.bytes -= old.encoded.len();
            self.elements -= old.elements;
        }
        old
    }

    fn remove(&mut self, session: &SessionId) -> Option<Entry> {
        let old = self.entries.remove(session)?;
        self.bytes -= old.encoded.len();
        self.elements -= old.elements;
        Some(old)
    }
}

impl Entry {
    fn peer(&self) -> Option<&str> {
        Fields::parse(&self.encoded).ok()?.str("peer").ok()
    }

    /// An entry of another node.
    fn remote(node: NodeId, encoded: &[u8]) -> Option<(SessionId, Self)> {
        validate(encoded).ok()?;
        let fields = Fields::parse(encoded).ok()?;
        fields.only(&["peer", "session", "meta"]).ok()?;
        fields.str("peer").ok()?;
        let session = fields.str("session").ok()?;
        let meta = fields.raw("meta")?;
        if meta.len() > META_BYTES || encoded.len() > META_BYTES * 2 {
            return None;
        }
        let entry = Self {
            node: Some(node),
            until: None,
            guest: 0,
            lost: None,
            meta: Bytes::copy_from_slice(meta),
            encoded: Bytes::copy_from_slice(encoded),
            elements: elements(encoded),
        };
        Some((SessionId::new(session), entry))
    }
}

/// A change of presence on another node.
pub(crate) enum Change<'a> {
    Join(&'a [u8]),
    Leave { session: &'a str, moving: bool },
}

/// Presence on other nodes.
impl Room {
    /// Applies one change if it makes the next version. Returns false if a version is missing: then the whole list must
    /// be requested.
    pub(crate) fn change(&self, at: &Head, change: Change<'_>) -> bool {
        let mut presence = lock(&self.presence);
        let known = presence.versions.get(&at.node).copied();
        match known {
            Some((epoch, version)) if epoch == at.epoch && at.sequence <= version => return true,
            Some((epoch, version)) if epoch == at.epoch && at.sequence == version + 1 => {}
            // This is the first version.
            None if at.sequence == 1 => {}
            Some(_) | None => return false,
        }
        presence.versions.insert(at.node, (at.epoch, at.sequence));
        let (mut joins, mut leaves) = (Vec::new(), Vec::new());
        match change {
            Change::Join(encoded) => {
                presence.insert_remote(at.node, encoded, &mut joins, &mut leaves);
            }
            Change::Leave { session, moving } => {
                let session = SessionId::new(session);
                let entry = presence.entries.get_mut(&session);
                let Some(entry) = entry.filter(|entry| entry.node == Some(at.node)) else {
                    return true;
                };
                if moving {
                    entry.until = Some(Instant::now() + MOVING);
                } else {
                    let old = presence.remove(&session);
                    leaves.extend(old.map(|old| old.encoded));
                }
            }
        }
        self.tell(&mut presence, &joins, &leaves);
        true
    }

    /// Replaces all entries of another node.
    pub(crate) fn replace(&self, at: &Head, entries: &[Bytes]) {
        let mut presence = lock(&self.presence);
        presence.versions.insert(at.node, (at.epoch, at.sequence));
        let ids: HashSet<SessionId> = entries
            .iter()
            .filter_map(|entry| Some(Entry::remote(at.node, entry)?.0))
            .collect();
        let gone = |id: &SessionId, entry: &Entry| {
            entry.node == Some(at.node) && entry.until.is_none() && !ids.contains(id)
        };
        let (mut joins, mut leaves) = (Vec::new(), presence.take(gone));
        for entry in entries {
            presence.insert_remote(at.node, entry, &mut joins, &mut leaves);
        }
        self.tell(&mut presence, &joins, &leaves);
    }

    /// Whether this version of another node's entries is known.
    pub(crate) fn knows(&self, at: &Head, version: u64) -> bool {
        let presence = lock(&self.presence);
        match presence.versions.get(&at.node) {
            Some(known) => *known == (at.epoch, version),
            None => version == 0,
        }
    }

    /// Removes the entries of lost nodes, and entries that have waited too long for their peers. The entries of nodes
    /// that have left begin to wait.
    pub(crate) fn desert(&self, lost: &[NodeId], left: &[NodeId]) {
        let mut presence = lock(&self.presence);
        if presence.versions.is_empty() {
            return;
        }
        let now = Instant::now();
        for node in left {
            presence.versions.remove(node);
            let theirs = presence.entries.values_mut();
            for entry in theirs.filter(|entry| entry.node == Some(*node)) {
                entry.until.get_or_insert(now + MOVING);
            }
        }
        for node in lost {
            presence.versions.remove(node);
        }
        let late = presence.take(|_, entry| entry.until.is_some_and(|until| until <= now));
        self.tell(&mut presence, &[], &late);
        let lost = presence.take(|_, entry| entry.node.is_some_and(|node| lost.contains(&node)));
        if !lost.is_empty()
            && let Ok(diff) =
                self.encode(DIFF, &[("joins", &[]), ("leaves", &lost)], Some(NODE_LOST))
        {
            self.announce(&mut presence, &diff);
        }
    }

    /// The entries of this node.
    pub(crate) fn own_entries<R>(&self, read: impl FnOnce(&[Bytes]) -> R) -> R {
        let presence = lock(&self.presence);
        let own = presence
            .entries
            .values()
            .filter(|entry| entry.node.is_none());
        let own: Vec<Bytes> = own.map(|entry| entry.encoded.clone()).collect();
        read(&own)
    }

    fn tell(&self, presence: &mut Presence, joins: &[Bytes], leaves: &[Bytes]) {
        if joins.is_empty() && leaves.is_empty() {
            return;
        }
        if let Ok(diff) = self.diff(joins, leaves) {
            self.announce(presence, &diff);
        }
    }
}

impl Presence {
    fn insert_remote(
        &mut self,
        node: NodeId,
        encoded: &[u8],
        joins: &mut Vec<Bytes>,
        leaves: &mut Vec<Bytes>,
    ) {
        let Some((session, entry)) = Entry::remote(node, encoded) else {
            return;
        };
        if let Some(old) = self.entries.get_mut(&session) {
            // A session is on one node only.
            if old.node != Some(node) {
                return;
            }
            if old.encoded == entry.encoded {
                old.until = None;
                return;
            }
        }
        if !self.has_room(&session, &entry) {
            return;
        }
        if let Some(peer) = entry.peer() {
            leaves.extend(self.arrive(peer));
        }
        joins.push(entry.encoded.clone());
        leaves.extend(self.insert(&session, entry).map(|old| old.encoded));
    }
}

impl Room {
    /// Sends the state to a new member, if there are entries.
    pub(crate) fn greet(&self, guest: &Guest) {
        let mut presence = lock(&self.presence);
        if !presence.entries.is_empty() && !presence.informed.contains(&guest.key) {
            let mut state = None;
            self.tell_state(&mut presence, guest, &mut state);
        }
    }

    /// Returns whether the session was not tracked anywhere before.
    fn track(
        &self,
        directory: &Directory,
        guest: &Guest,
        entry: Entry,
    ) -> Result<bool, TrackError> {
        let session = &guest.session_id;
        let mut presence = lock(&self.presence);
        // A member that leaves is removed from the list before its entry is.
        if !self.has(guest.key) {
            return Err(JoinError::Closed.into());
        }
        let old = presence.entries.get_mut(session);
        if let Some(old) = old
            && old.meta == entry.meta
        {
            old.guest = guest.key;
            old.lost = None;
            return Ok(false);
        }
        if !presence.has_room(session, &entry) {
            return Err(TrackError::Full);
        }
        let old = presence.entries.get(session);
        let mut leaves: Vec<Bytes> = old.iter().map(|old| old.encoded.clone()).collect();
        if let Some(peer) = entry.peer().filter(|_| !presence.versions.is_empty()) {
            leaves.extend(presence.arrive(peer));
        }
        let diff = self.diff(std::slice::from_ref(&entry.encoded), &leaves)?;
        // The metadata is nested deeper in the message than it was alone.
        validate(&diff.bytes()[PREFIX..]).map_err(EncodeError::Refused)?;
        directory.share(self, |node, shared| node.joined(shared, &entry.encoded));
        presence.insert(session, entry);
        let first = directory.tracked.add(session, &self.tag.name);
        self.announce(&mut presence, &diff);
        Ok(first)
    }

    /// A member has left the room. `lost`: the number of the connection it was lost with, if its session can be
    /// resumed.
    pub(crate) fn parted(&self, directory: &Directory, guest: &Guest, lost: Option<u64>) {
        let session = &guest.session_id;
        {
            let mut presence = lock(&self.presence);
            presence.informed.remove(&guest.key);
            if lost.is_some()
                && let Some(entry) = presence.entries.get_mut(session)
                && entry.guest == guest.key
            {
                entry.lost = lost;
                return;
            }
        }
        self.clear(directory, session, |entry| entry.guest == guest.key);
    }

    /// Removes a session's entry if `which` accepts it; returns whether it did.
    fn clear(
        &self,
        directory: &Directory,
        session: &SessionId,
        which: impl Fn(&Entry) -> bool,
    ) -> bool {
        let mut presence = lock(&self.presence);
        if !presence.entries.get(session).is_some_and(which) {
            return false;
        }
        let Some(old) = presence.remove(session) else {
            return false;
        };
        directory.tracked.remove(session, &self.tag.name);
        directory.share(self, |node, shared| node.left(shared, session));
        if let Ok(diff) = self.diff(&[], &[old.encoded]) {
            self.announce(&mut presence, &diff);
        }
        true
    }

    /// Sends the change to every member, or the whole state if a change is not enough.
    fn announce(&self, presence: &mut Presence, diff: &Encoded) {
        let mut state = None;
        for guest in self.guests().iter() {
            let limit = guest.session.frame_limit();
            let informed = presence.informed.contains(&guest.key)
                && matches!(guest.outbox.try_encoded(diff, limit), Ok(true));
            if !informed {
                self.tell_state(presence, guest, &mut state);
            }
        }
    }

    fn tell_state(&self, presence: &mut Presence, guest: &Guest, state: &mut Option<Encoded>) {
        if state.is_none() {
            let entries: Vec<Bytes> = presence
                .entries
                .values()
                .map(|entry| entry.encoded.clone())
                .collect();
            *state = self.encode(STATE, &[("entries", &entries)], None).ok();
        }
        let Some(state) = state else { return };
        let limit = guest.session.frame_limit();
        match guest.outbox.push_room(
            &self.presence_tag,
            state.bytes(),
            limit,
            Overflow::LatestOnly,
            false,
        ) {
            Push::Queued { .. } => {
                presence.informed.insert(guest.key);
            }
            Push::Lost => {
                presence.informed.remove(&guest.key);
                if let Some(left_out) = guest.session.log_limit.line() {
                    tracing::warn!(left_out, "a presence is larger than the peer's frames");
                }
            }
            Push::TooSlow | Push::Over => {}
        }
    }

    fn diff(&self, joins: &[Bytes], leaves: &[Bytes]) -> Result<Encoded, EncodeError> {
        self.encode(DIFF, &[("joins", joins), ("leaves", leaves)], None)
    }

    fn encode(
        &self,
        event: &str,
        lists: &[(&str, &[Bytes])],
        why: Option<&str>,
    ) -> Result<Encoded, EncodeError> {
        let mut data = Vec::new();
        let keys = lists.len() + 1 + usize::from(why.is_some());
        write_len(rmp::encode::write_map_len, &mut data, keys);
        if let Some(why) = why {
            write_str(&mut data, "why");
            write_str(&mut data, why);
        }
        write_str(&mut data, "room");
        write_str(&mut data, &self.tag.name);
        for (name, entries) in lists {
            write_str(&mut data, name);
            write_len(rmp::encode::write_array_len, &mut data, entries.len());
            for entry in *entries {
                data.extend_from_slice(entry);
            }
        }
        Encoded::from_raw(event, &data)
    }
}

fn encode_entry(peer: &str, session: &str, meta: &[u8]) -> Bytes {
    let mut data = Vec::with_capacity(peer.len() + session.len() + meta.len() + 32);
    write_len(rmp::encode::write_map_len, &mut data, 3);
    write_str(&mut data, "peer");
    write_str(&mut data, peer);
    write_str(&mut data, "session");
    write_str(&mut data, session);
    write_str(&mut data, "meta");
    data.extend_from_slice(meta);
    data.into()
}

/// The number of values in this one, as the peer's validator counts them.
fn elements(value: &[u8]) -> usize {
    Walk::new(value, Shape::default())
        .and_then(|mut walk| walk.value().map(|_| walk.elements()))
        .unwrap_or(ROOM_ELEMENTS)
}

// Writing to a vector cannot fail.

fn write_str(data: &mut Vec<u8>, text: &str) {
    let _ = rmp::encode::write_str(data, text);
}

fn write_len<R>(write: impl FnOnce(&mut Vec<u8>, u32) -> R, data: &mut Vec<u8>, len: usize) {
    let _ = write(data, u32::try_from(len).unwrap_or(u32::MAX));
}

/// The presence in one room, built from the messages of a channel: pass every message to [`apply`](Self::apply).
///
/// A peer has an id, and metadata for each of its sessions. The memory that a server can fill is bounded: entries
/// beyond 1 MiB in total are ignored.
#[derive(Debug, Clone)]
pub struct PresenceMap {
    room: String,
    peers: BTreeMap<String, BTreeMap<String, Bytes>>,
    bytes: usize,
}

/// The changes by one message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PresenceDiff {
    /// Entries that are new or have new metadata.
    pub joins: Vec<PresenceEntry>,
    /// Entries that were removed, or had other metadata.
    pub leaves: Vec<PresenceEntry>,
    /// Why they were removed, if not by their own side: `node_lost` if the server that they were on is silent.
    pub why: Option<String>,
}

/// One session of one peer.
#[derive(Clone, PartialEq, Eq)]
pub struct PresenceEntry {
    peer: String,
    session: String,
    meta: Bytes,
}

impl PresenceEntry {
    /// The peer's id.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The session's id.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// The session's metadata.
    ///
    /// # Errors
    /// If it does not decode into `T`.
    pub fn meta<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        message::decode_data(&self.meta)
    }

    fn size(&self) -> usize {
        size(&self.peer, &self.session, &self.meta)
    }
}

impl fmt::Debug for PresenceEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PresenceEntry")
            .field("peer", &self.peer)
            .field("session", &self.session)
            .field("meta_len", &self.meta.len())
            .finish()
    }
}

fn size(peer: &str, session: &str, meta: &[u8]) -> usize {
    // The size on the wire, including keys and lengths.
    peer.len() + session.len() + meta.len() + 24
}

impl PresenceMap {
    /// An empty map for one room.
    pub fn new(room: impl Into<String>) -> Self {
        Self {
            room: room.into(),
            peers: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// Applies a message and returns what it changed; `None` for a message that is not about this room's presence.
    pub fn apply(&mut self, message: &Message) -> Option<PresenceDiff> {
        let lists = match message.event() {
            STATE => self.read(message, &["entries"]),
            DIFF => self.read(message, &["joins", "leaves"]),
            _ => return None,
        };
        let mut lists = lists.ok()?.into_iter();
        let mut diff = PresenceDiff::default();
        match (message.event(), lists.next()?, lists.next()) {
            (STATE, entries, _) => self.replace(entries, &mut diff),
            (_, joins, leaves) => {
                let why = message.fields().ok()?;
                let why = why.opt_str("why").ok()?;
                diff.why = why.map(|why| printable_within(why, META_BYTES));
                for entry in leaves.into_iter().flatten() {
                    diff.leaves.extend(self.remove(&entry.peer, &entry.session));
                }
                for entry in joins {
                    self.insert(entry, &mut diff);
                }
            }
        }
        Some(diff)
    }

    /// The ids of the present peers, sorted.
    pub fn peers(&self) -> impl Iterator<Item = &str> {
        self.peers.keys().map(String::as_str)
    }

    /// The metadata of all sessions of this peer, sorted by session id.
    pub fn metas<T: DeserializeOwned>(&self, peer: &str) -> Vec<Result<T, DecodeError>> {
        let sessions = self.peers.get(peer).into_iter().flatten();
        sessions
            .map(|(_, meta)| message::decode_data(meta))
            .collect()
    }

    /// The number of present peers.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether nobody is present.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// Reads lists of entries; an error for a message about another room.
    fn read(
        &self,
        message: &Message,
        lists: &[&'static str],
    ) -> Result<Vec<Vec<PresenceEntry>>, FieldError> {
        let fields = message.fields()?;
        if fields.str("room")? != self.room {
            return Err(FieldError::Missing("room"));
        }
        lists
            .iter()
            .map(|list| entries(fields.array(list)?))
            .collect()
    }

    fn insert(&mut self, entry: PresenceEntry, diff: &mut PresenceDiff) {
        diff.leaves.extend(self.remove(&entry.peer, &entry.session));
        if self.bytes + entry.size() > ROOM_BYTES {
            return;
        }
        self.bytes += entry.size();
        let sessions = self.peers.entry(entry.peer.clone()).or_default();
        sessions.insert(entry.session.clone(), entry.meta.clone());
        diff.joins.push(entry);
    }

    fn remove(&mut self, peer: &str, session: &str) -> Option<PresenceEntry> {
        let sessions = self.peers.get_mut(peer)?;
        let meta = sessions.remove(session)?;
        if sessions.is_empty() {
            self.peers.remove(peer);
        }
        let entry = PresenceEntry {
            peer: peer.to_owned(),
            session: session.to_owned(),
            meta,
        };
        self.bytes -= entry.size();
        Some(entry)
    }

    /// Replaces all entries by these.
    fn replace(&mut self, entries: Vec<PresenceEntry>, diff: &mut PresenceDiff) {
        let new: HashSet<(&str, &str)> = entries
            .iter()
            .map(|entry| (entry.peer.as_str(), entry.session.as_str()))
            .collect();
        let mut gone = Vec::new();
        for (peer, sessions) in &self.peers {
            for session in sessions.keys() {
                if !new.contains(&(peer.as_str(), session.as_str())) {
                    gone.push((peer.clone(), session.clone()));
                }
            }
        }
        for (peer, session) in gone {
            diff.leaves.extend(self.remove(&peer, &session));
        }
        for entry in entries {
            let known = self.peers.get(&entry.peer);
            if known.and_then(|sessions| sessions.get(&entry.session)) != Some(&entry.meta) {
                self.insert(entry, diff);
            }
        }
    }
}

fn entries(mut list: Values<'_>) -> Result<Vec<PresenceEntry>, FieldError> {
    let mut entries = Vec::new();
    while list.remaining() > 0 {
        let entry = list.next_map()?;
        let meta = entry.raw("meta").ok_or(FieldError::Missing("meta"))?;
        entries.push(PresenceEntry {
            peer: entry.str("peer")?.to_owned(),
            session: entry.str("session")?.to_owned(),
            // A copy, because the entry is kept and must not keep the whole frame.
            meta: Bytes::copy_from_slice(meta),
        });
    }
    Ok(entries)
}
