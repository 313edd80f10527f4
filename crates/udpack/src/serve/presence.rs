//! Presence: the members of a room with their metadata, sent to all members as it changes.
//!
//! An entry belongs to a session: it outlives a lost connection for as long as the session may come back, and
//! tracking the same metadata again changes nothing, so a resume shows nobody leaving or joining.
//!
//! In a cluster each node tells the others of its own sessions, in versions: one change makes the next. Who misses a
//! version asks for the whole. Entries of a node that is lost leave with it; those of one that goes stay for a while if their
//! peers may come to another node, and make room for them there without having been gone.
//!
//! Each member is sent the whole state first and changes from then on. A member with no room in its queue gets
//! the whole state again instead, the latest only, so that it is up to date as soon as it has caught up.

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

/// Everybody who is there: `{room, entries}`, where each entry is `{peer, session, meta}`.
const STATE: &str = "presence_state";
/// What has changed: `{room, joins, leaves}`, with entries as above; `why` where a node was lost.
const DIFF: &str = "presence_diff";
/// Why the entries of a node that is not heard any more leave.
const NODE_LOST: &str = "node_lost";
/// Largest meta, in bytes.
const META_BYTES: usize = 4 << 10;
/// Most bytes that the entries of one room may have, so that all of them fit into one frame.
const ROOM_BYTES: usize = 1 << 20;
/// A peer that has gone from a draining node is awaited on another one for so long.
const MOVING: Duration = Duration::from_secs(10);
/// Most msgpack values in them, likewise.
const ROOM_ELEMENTS: usize = 60_000;

/// Who is present in one room, by session.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    entries: BTreeMap<SessionId, Entry>,
    /// Members that have been sent the state.
    informed: HashSet<u64>,
    bytes: usize,
    elements: usize,
    /// The version of each other node's entries here.
    versions: HashMap<NodeId, (u32, u64)>,
}

#[derive(Debug, Clone)]
struct Entry {
    /// The node that its session is on, unless it is this one.
    node: Option<NodeId>,
    /// Its session has gone from that node, and its peer is expected elsewhere until then.
    until: Option<Instant>,
    /// The channel that tracks it; 0 on another node.
    guest: u64,
    /// It has ended with the connection of this number.
    lost: Option<u64>,
    meta: Bytes,
    /// `{peer, session, meta}`.
    encoded: Bytes,
    elements: usize,
}

/// Which sessions are tracked in which rooms.
#[derive(Debug, Default)]
pub(crate) struct Tracked {
    table: Mutex<TrackedTable>,
}

#[derive(Debug, Default)]
struct TrackedTable {
    rooms: HashMap<SessionId, HashSet<Arc<str>>>,
}

impl Tracked {
    /// Returns whether the session was not tracked before: then a task must wait for its end.
    fn add(&self, session: &SessionId, room: &Arc<str>) -> bool {
        let mut table = lock(&self.table);
        // An empty set stays for as long as the session, because a task already waits for its end.
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
    /// The meta cannot be sent: unfit for the wire, or above 4 KiB.
    #[error(transparent)]
    Meta(#[from] EncodeError),
    /// The entries of the room would no longer fit into one message of 1 MiB.
    #[error("the room's presence is full")]
    Full,
}

impl Channel {
    /// Tells a room that this session is there, and what it says about itself; joins the room first if need be.
    ///
    /// Members get `presence_state` `{room, entries}` first and `presence_diff` `{room, joins, leaves}` from then on,
    /// which [`PresenceMap`] reads. A session has one entry in a room: tracking it again replaces the meta, and
    /// changes nothing when the meta is the same. The entry goes when it is [untracked](Self::untrack), when the
    /// channel leaves the room or ends in good order, and when the session is over; not when the connection is
    /// lost and the session may come back. After that it must be tracked again within `Timeouts::presence`.
    ///
    /// # Errors
    /// As [`join`](Self::join); when the meta is unfit or too large; when the room's presence is full.
    pub fn track<T: Serialize + ?Sized>(&self, room: &str, meta: &T) -> Result<(), TrackError> {
        let mut buf = BytesMut::new();
        message::encode(&mut buf, STATE, meta, None, META_BYTES)?;
        let frame = buf.freeze();
        // What was just encoded can be read.
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

    /// Takes this channel's entry out of a room; says whether there was one. The channel stays in the room.
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
    /// Waits for the end of a session that is tracked somewhere.
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

    /// A session goes on over connection number `connection`: what it had tracked on channels that ended with an earlier
    /// one leaves, unless it is tracked again in time.
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
                // Then all its entries are removed anyway.
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
    /// Whether nobody is present by this node.
    pub(crate) fn is_deserted(&self) -> bool {
        self.entries.values().all(|entry| entry.node.is_some())
    }

    /// Takes out who has gone from another node and comes here or to a third now.
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

    /// One of another node.
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

/// What another node tells of those who are present by it.
pub(crate) enum Change<'a> {
    Join(&'a [u8]),
    Leave { session: &'a str, moving: bool },
}

/// What other nodes tell.
impl Room {
    /// Applies one change, if it makes the next version; says whether it did, or was known: otherwise all must be asked for.
    pub(crate) fn change(&self, at: &Head, change: Change<'_>) -> bool {
        let mut presence = lock(&self.presence);
        let known = presence.versions.get(&at.node).copied();
        match known {
            Some((epoch, version)) if epoch == at.epoch && at.sequence <= version => return true,
            Some((epoch, version)) if epoch == at.epoch && at.sequence == version + 1 => {}
            // The first of all.
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

    /// Takes over all entries of another node.
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

    /// Those of nodes that are lost leave, and those that were awaited for too long; those of nodes that have gone are awaited.
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

    /// Those who are present by this node.
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
            // A session is on one node.
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
    /// Sends the state to a new member, if there is any.
    pub(crate) fn greet(&self, guest: &Guest) {
        let mut presence = lock(&self.presence);
        if !presence.entries.is_empty() && !presence.informed.contains(&guest.key) {
            let mut state = None;
            self.tell_state(&mut presence, guest, &mut state);
        }
    }

    /// Says whether the session was not tracked anywhere before.
    fn track(
        &self,
        directory: &Directory,
        guest: &Guest,
        entry: Entry,
    ) -> Result<bool, TrackError> {
        let session = &guest.session_id;
        let mut presence = lock(&self.presence);
        // Leaving takes the member off the list before the entry.
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
        // The meta lies deeper in there than it did alone.
        validate(&diff.bytes()[PREFIX..]).map_err(EncodeError::Refused)?;
        directory.share(self, |node, shared| node.joined(shared, &entry.encoded));
        presence.insert(session, entry);
        let first = directory.tracked.add(session, &self.tag.name);
        self.announce(&mut presence, &diff);
        Ok(first)
    }

    /// A member has left the room: `lost` with the connection of this number, if so, and may come back.
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

    /// Removes a session's entry if it is one of `which`; says whether it did.
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

    /// Sends every member the change, or the whole state where a change is not enough.
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

/// How many values a peer counts in this one.
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

/// Who is present in one room, built from the messages of a channel: pass every message to [`apply`](Self::apply).
///
/// A peer is known by its id and has one meta for each of its sessions. What a server may put in here is bounded:
/// entries beyond 1 MiB in all are left out.
#[derive(Debug, Clone)]
pub struct PresenceMap {
    room: String,
    peers: BTreeMap<String, BTreeMap<String, Bytes>>,
    bytes: usize,
}

/// What one message changed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PresenceDiff {
    /// Entries that are new, or have a new meta.
    pub joins: Vec<PresenceEntry>,
    /// Entries that are gone, or had another meta.
    pub leaves: Vec<PresenceEntry>,
    /// Why they are gone, where it was not their own doing: `node_lost` when the server that they were on is not heard any more.
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

    /// What the session says about itself.
    ///
    /// # Errors
    /// When it does not fit `T`.
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
    // As on the wire: keys, lengths and all.
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

    /// Takes a message in and says what it changed; `None` for a message that is not about this room's presence.
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

    /// The ids of those present, in order.
    pub fn peers(&self) -> impl Iterator<Item = &str> {
        self.peers.keys().map(String::as_str)
    }

    /// Everything that this peer's sessions say about themselves, in the order of the sessions' ids.
    pub fn metas<T: DeserializeOwned>(&self, peer: &str) -> Vec<Result<T, DecodeError>> {
        let sessions = self.peers.get(peer).into_iter().flatten();
        sessions
            .map(|(_, meta)| message::decode_data(meta))
            .collect()
    }

    /// How many peers are present.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether nobody is present.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// Reads lists of entries; an error for another room's.
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

    /// Makes it hold exactly these.
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
            // A copy: the frame it came in may be large, and this is kept.
            meta: Bytes::copy_from_slice(meta),
        });
    }
    Ok(entries)
}
