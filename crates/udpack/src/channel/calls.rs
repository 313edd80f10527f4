//! The requests of one channel in both directions: received replies and items, waiting requests, and the credit of
//! item streams.
//!
//! Pure state without I/O. The inbox keeps it under its lock, and the reader of the channel feeds it. It knows no
//! connection, because the requests of a resumable channel continue on the next one.

use std::collections::{HashMap, VecDeque};

use futures_util::future::AbortHandle;
use tokio::time::Instant;

use crate::wire::code::CloseCode;
use crate::wire::control::ProtocolEvent;
use crate::wire::message::Message;
use crate::wire::msgpack::{Head, Reader};

/// Bytes of a request's item stream that may be sent before its receiver takes them, for each direction.
pub(crate) const STREAM_CREDIT: u64 = 256 << 10;
/// Credit is returned in pieces of this size while items are taken without a wait.
const CREDIT_PIECE: u64 = STREAM_CREDIT / 4;

/// Which end of a request this side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Asker,
    Answerer,
}

impl Role {
    /// The event that carries this side's items.
    pub(crate) fn item(self) -> ProtocolEvent {
        match self {
            Self::Asker => ProtocolEvent::Push,
            Self::Answerer => ProtocolEvent::Item,
        }
    }

    /// The event that gives the other side credit.
    pub(crate) fn grant(self) -> ProtocolEvent {
        match self {
            Self::Asker => ProtocolEvent::Credit,
            Self::Answerer => ProtocolEvent::Want,
        }
    }
}

/// The requests that are not over.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    /// By this side.
    asked: Table<Asked>,
    /// By the peer: those in the backlog, and those whose handler runs.
    answering: Table<Answering>,
    /// Bytes of items for requests that no handler has begun to answer.
    waiting: usize,
}

/// A map by request id. A channel mostly has one request at a time, and hashing its id took 4 % of the instructions
/// of a request above QUIC, so the first entry is not hashed.
#[derive(Debug)]
struct Table<T> {
    first: Option<(u64, T)>,
    /// The entries beside the first.
    others: HashMap<u64, T>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            first: None,
            others: HashMap::default(),
        }
    }
}

impl<T> Table<T> {
    fn get(&self, id: u64) -> Option<&T> {
        match &self.first {
            Some((first, value)) if *first == id => Some(value),
            _ if self.others.is_empty() => None,
            _ => self.others.get(&id),
        }
    }

    fn get_mut(&mut self, id: u64) -> Option<&mut T> {
        match &mut self.first {
            Some((first, value)) if *first == id => Some(value),
            _ if self.others.is_empty() => None,
            _ => self.others.get_mut(&id),
        }
    }

    fn get_or_insert(&mut self, id: u64, value: impl FnOnce() -> T) -> &mut T {
        let here = match &self.first {
            Some((first, _)) => *first == id,
            None => self.others.is_empty(),
        };
        if here {
            let (_, value) = self.first.get_or_insert_with(|| (id, value()));
            value
        } else {
            self.others.entry(id).or_insert_with(value)
        }
    }

    fn remove(&mut self, id: u64) -> Option<T> {
        match self.first.take_if(|(first, _)| *first == id) {
            Some((_, value)) => Some(value),
            None if self.others.is_empty() => None,
            None => self.others.remove(&id),
        }
    }

    fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let first = self.first.as_mut().map(|(_, value)| value);
        first.into_iter().chain(self.others.values_mut())
    }
}

#[derive(Debug, Default)]
struct Asked {
    flow: Flow,
    /// The requester asked for items, not for one reply.
    stream: bool,
    /// An item came although the requester asked for one reply.
    unwanted: bool,
    last: Option<Message>,
}

#[derive(Debug)]
struct Answering {
    flow: Flow,
    since: Instant,
    begun: bool,
    /// When an item of the request's stream was last taken.
    moved: Option<Instant>,
    cancelled: bool,
    handler: Option<AbortHandle>,
}

/// The state of a request when a handler takes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Begun {
    pub(crate) id: u64,
    /// When the request came.
    pub(crate) since: Instant,
    /// Whether the request waited in the backlog.
    pub(crate) waited: bool,
    /// Whether the peer has cancelled the request.
    pub(crate) given_up: bool,
}

/// One request's stream of items, in both directions.
#[derive(Debug, Default)]
struct Flow {
    /// Received items that are not taken yet.
    items: VecDeque<Message>,
    /// Received bytes for which this side has not returned credit.
    open: u64,
    /// The part of `open` that was taken.
    owed: u64,
    /// Sent bytes for which the peer has not returned credit.
    spent: u64,
    ended: bool,
}

/// The result of processing a message of the protocol.
#[derive(Debug)]
pub(crate) enum Taken {
    /// It is stored; a task may wait for it.
    Filed,
    /// The peer cancelled this request, which may still wait in the backlog.
    Cancelled(u64),
    /// It came too late and is ignored.
    Dropped,
    /// It breaks the protocol: the channel is closed.
    Violation(CloseCode, String),
}

/// The next element of a stream.
#[derive(Debug)]
pub(crate) enum Next {
    Item(Message),
    /// The request's reply or fault.
    Last(Message),
    End,
}

/// The answer to a request for one reply.
#[derive(Debug)]
pub(crate) enum Reply {
    Message(Message),
    /// An item of a stream.
    Stream,
}

impl Calls {
    /// Registers a request of this side; an answer to an unregistered one is dropped.
    pub(crate) fn ask(&mut self, id: u64, stream: bool) {
        *self.asked.get_or_insert(id, Asked::default) = Asked {
            stream,
            ..Asked::default()
        };
    }

    /// Removes a request of this side; returns whether its answer had not come.
    pub(crate) fn forget(&mut self, id: u64) -> bool {
        self.asked
            .remove(id)
            .is_some_and(|asked| asked.last.is_none())
    }

    /// Takes the answer to a request for one reply and removes the request.
    pub(crate) fn reply(&mut self, id: u64) -> Option<Reply> {
        let asked = self.asked.get_mut(id)?;
        if asked.unwanted {
            return Some(Reply::Stream);
        }
        let reply = asked.last.take()?;
        self.asked.remove(id);
        Some(Reply::Message(reply))
    }

    /// Keeps a request of the peer that waits in the backlog.
    pub(crate) fn queued(&mut self, id: u64) {
        self.answering.get_or_insert(id, Answering::new);
    }

    /// A handler takes the request.
    pub(crate) fn begin(&mut self, id: u64) -> Begun {
        let mut waited = true;
        let answering = self.answering.get_or_insert(id, || {
            waited = false;
            Answering::new()
        });
        if !answering.begun {
            answering.begun = true;
            self.waiting = self.waiting.saturating_sub(answering.flow.held());
        }
        Begun {
            id,
            since: answering.since,
            waited,
            given_up: answering.cancelled,
        }
    }

    /// Stores the handle that stops the handler when the peer cancels the request; stops it at once if the peer
    /// already has.
    pub(crate) fn guard(&mut self, id: u64, handler: AbortHandle) {
        match self.answering.get_mut(id) {
            Some(answering) if !answering.cancelled => answering.handler = Some(handler),
            _ => handler.abort(),
        }
    }

    /// The request is answered, or no handler will answer it.
    pub(crate) fn answered(&mut self, id: u64) {
        if let Some(answering) = self.answering.remove(id)
            && !answering.begun
        {
            self.waiting = self.waiting.saturating_sub(answering.flow.held());
        }
    }

    /// When the request's handler last took an item of its stream.
    pub(crate) fn moved(&self, id: u64) -> Option<Instant> {
        self.answering.get(id)?.moved
    }

    /// Stops the handlers of all requests, because nobody waits for their answers.
    pub(crate) fn stop(&mut self) {
        for answering in self.answering.values_mut() {
            answering.cancel();
        }
    }

    /// Bytes of items for requests in the backlog.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// The next item of a stream that this side reads; `None` when there is nothing yet.
    pub(crate) fn next(&mut self, role: Role, id: u64) -> Option<Next> {
        match role {
            Role::Asker => {
                let Some(asked) = self.asked.get_mut(id) else {
                    return Some(Next::End);
                };
                let item = asked.flow.take().map(Next::Item);
                item.or_else(|| asked.last.clone().map(Next::Last))
            }
            Role::Answerer => {
                let Some(answering) = self.answering.get_mut(id) else {
                    return Some(Next::End);
                };
                if let Some(item) = answering.flow.take() {
                    answering.moved = Some(Instant::now());
                    return Some(Next::Item(item));
                }
                answering.flow.ended.then_some(Next::End)
            }
        }
    }

    /// The credit in bytes to return now: whole pieces, or everything if `all`.
    pub(crate) fn grant(&mut self, role: Role, id: u64, all: bool) -> Option<u64> {
        let flow = self.flow(role, id)?;
        if flow.owed == 0 || (flow.owed < CREDIT_PIECE && !all) {
            return None;
        }
        let owed = std::mem::take(&mut flow.owed);
        flow.open = flow.open.saturating_sub(owed);
        Some(owed)
    }

    /// Whether an item of this size may be sent. `None`: not yet. `false`: never, because the request is over.
    pub(crate) fn spend(&mut self, role: Role, id: u64, bytes: usize) -> Option<bool> {
        let over = match role {
            Role::Asker => self.asked.get(id).is_none_or(|asked| asked.last.is_some()),
            Role::Answerer => self
                .answering
                .get(id)
                .is_none_or(|answering| answering.cancelled),
        };
        if over {
            return Some(false);
        }
        let flow = self.flow(role, id)?;
        let sum = flow.spent.saturating_add(bytes as u64);
        if flow.spent > 0 && sum > STREAM_CREDIT {
            return None;
        }
        flow.spent = sum;
        Some(true)
    }

    /// Stores a message of this event that belongs to a request and is decoded by the table of protocol messages.
    pub(crate) fn take(&mut self, event: ProtocolEvent, message: Message) -> Taken {
        let Some(id) = message.id() else {
            return bad("an answer or a part of a stream without its request's id");
        };
        match event {
            ProtocolEvent::Reply | ProtocolEvent::Fault => match self.asked.get_mut(id) {
                Some(asked) if asked.last.is_none() => asked.last = Some(message),
                _ => return Taken::Dropped,
            },
            ProtocolEvent::Item => match self.asked.get_mut(id) {
                Some(asked) if asked.last.is_some() => return Taken::Dropped,
                Some(asked) if asked.stream => return asked.flow.put(message),
                Some(asked) => asked.unwanted = true,
                None => return Taken::Dropped,
            },
            ProtocolEvent::Push => match self.answering.get_mut(id) {
                Some(answering) if !answering.flow.ended && !answering.cancelled => {
                    if !answering.begun {
                        self.waiting += message.len();
                    }
                    return answering.flow.put(message);
                }
                _ => return Taken::Dropped,
            },
            ProtocolEvent::End => match self.answering.get_mut(id) {
                Some(answering) => answering.flow.ended = true,
                None => return Taken::Dropped,
            },
            ProtocolEvent::Credit | ProtocolEvent::Want => {
                let Ok(Head::Uint(bytes)) = Reader::new(&message.raw()).head() else {
                    return bad("credit is a number of bytes");
                };
                let role = match event {
                    ProtocolEvent::Want => Role::Asker,
                    _ => Role::Answerer,
                };
                match self.flow(role, id) {
                    Some(flow) => flow.spent = flow.spent.saturating_sub(bytes),
                    None => return Taken::Dropped,
                }
            }
            _ => {
                if let Some(answering) = self.answering.get_mut(id) {
                    answering.cancel();
                }
                return Taken::Cancelled(id);
            }
        }
        Taken::Filed
    }

    fn flow(&mut self, role: Role, id: u64) -> Option<&mut Flow> {
        match role {
            Role::Asker => self.asked.get_mut(id).map(|asked| &mut asked.flow),
            Role::Answerer => self
                .answering
                .get_mut(id)
                .map(|answering| &mut answering.flow),
        }
    }
}

impl Answering {
    fn new() -> Self {
        Self {
            flow: Flow::default(),
            since: Instant::now(),
            begun: false,
            moved: None,
            cancelled: false,
            handler: None,
        }
    }

    fn cancel(&mut self) {
        self.cancelled = true;
        if let Some(handler) = self.handler.take() {
            handler.abort();
        }
    }
}

impl Flow {
    fn put(&mut self, item: Message) -> Taken {
        let len = item.len() as u64;
        if self.open > 0 && self.open.saturating_add(len) > STREAM_CREDIT {
            let text = format!("items of a stream above their credit of {STREAM_CREDIT} bytes");
            return Taken::Violation(CloseCode::BACKLOG, text);
        }
        self.open += len;
        self.items.push_back(item);
        Taken::Filed
    }

    fn take(&mut self) -> Option<Message> {
        let item = self.items.pop_front()?;
        self.owed += item.len() as u64;
        Some(item)
    }

    fn held(&self) -> usize {
        self.items.iter().map(Message::len).sum()
    }
}

fn bad(text: &str) -> Taken {
    Taken::Violation(CloseCode::BAD_MESSAGE, text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::ProtocolEvent::{Cancel, Credit, End, Item, Push, Reply, Want};
    use super::*;
    use crate::wire::control;

    /// A message of the protocol with `len` bytes of data, or with that number.
    fn message(event: ProtocolEvent, id: u64, len: usize) -> Message {
        let data = "x".repeat(len);
        let frame = match event {
            Credit | Want => control::frame(event, &len, Some(id)),
            Item | Push => control::frame(event, &data, Some(id)),
            _ => control::frame(event, &(), Some(id)),
        };
        Message::decode(frame.unwrap().slice(crate::wire::frame::PREFIX..)).unwrap()
    }

    fn take(calls: &mut Calls, message: Message) -> Taken {
        calls.take(ProtocolEvent::of(&message).unwrap(), message)
    }

    fn filed(calls: &mut Calls, message: Message) {
        let taken = take(calls, message);
        assert!(matches!(taken, Taken::Filed), "{taken:?}");
    }

    #[test]
    fn a_table_is_a_map() {
        let mut table = Table::<u64>::default();
        let mut map = HashMap::new();
        let mut draw = 1_u64;
        for step in 0..10_000 {
            draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (id, act) = (draw >> 33 & 7, draw >> 40 & 3);
            match act {
                0 => assert_eq!(
                    table.get_or_insert(id, || step),
                    map.entry(id).or_insert(step)
                ),
                1 | 2 => assert_eq!(table.remove(id), map.remove(&id)),
                _ => assert_eq!(table.get_mut(id), map.get_mut(&id)),
            }
            assert_eq!(table.get(id), map.get(&id));
            let mut values: Vec<_> = table.values_mut().map(|value| *value).collect();
            let mut known: Vec<_> = map.values().copied().collect();
            values.sort_unstable();
            known.sort_unstable();
            assert_eq!(values, known);
        }
    }

    #[test]
    fn items_above_the_credit_are_a_violation_and_credit_given_back_counts_again() {
        let mut calls = Calls::default();
        calls.ask(1, true);
        filed(&mut calls, message(Item, 1, 200_000));
        let over = take(&mut calls, message(Item, 1, 100_000));
        assert!(
            matches!(over, Taken::Violation(CloseCode::BACKLOG, _)),
            "{over:?}"
        );
        assert!(matches!(calls.next(Role::Asker, 1), Some(Next::Item(_))));
        let bytes = calls.grant(Role::Asker, 1, false).unwrap();
        assert_eq!(bytes as usize, message(Item, 1, 200_000).len());
        assert_eq!(calls.grant(Role::Asker, 1, true), None, "given back once");
        // One item of any size is allowed when nothing is outstanding.
        filed(&mut calls, message(Item, 1, 1_000_000));
    }

    #[test]
    fn items_are_sent_within_the_credit_until_the_request_is_over() {
        let mut calls = Calls::default();
        calls.ask(1, false);
        assert_eq!(
            calls.spend(Role::Asker, 1, 1_000_000),
            Some(true),
            "one always"
        );
        assert_eq!(calls.spend(Role::Asker, 1, 1), None);
        filed(&mut calls, message(Want, 1, 1_000_000));
        assert_eq!(calls.spend(Role::Asker, 1, 200_000), Some(true));
        assert_eq!(calls.spend(Role::Asker, 1, 100_000), None);
        filed(&mut calls, message(Reply, 1, 0));
        assert_eq!(calls.spend(Role::Asker, 1, 1), Some(false));
        assert_eq!(
            calls.spend(Role::Answerer, 1, 1),
            Some(false),
            "unknown there"
        );
    }

    #[test]
    fn what_belongs_to_no_request_is_dropped_and_what_breaks_the_rules_is_not() {
        let mut calls = Calls::default();
        for event in [Reply, Item, Push, End, Credit, Want] {
            let taken = take(&mut calls, message(event, 9, 3));
            assert!(matches!(taken, Taken::Dropped), "{event:?}: {taken:?}");
        }
        for (event, data) in [(Reply, None), (Item, None), (End, None), (Credit, Some(1))] {
            let (value, id) = (data.unwrap_or(0), data);
            let frame = match event {
                Credit => control::frame(event, &"text", id),
                _ => control::frame(event, &value, id),
            };
            let bad = Message::decode(frame.unwrap().slice(crate::wire::frame::PREFIX..)).unwrap();
            let taken = take(&mut calls, bad);
            assert!(
                matches!(taken, Taken::Violation(CloseCode::BAD_MESSAGE, _)),
                "{event:?}: {taken:?}"
            );
        }
    }

    #[test]
    fn items_for_requests_that_wait_count_as_waiting_until_they_are_begun_or_given_up() {
        let mut calls = Calls::default();
        for id in [1, 2] {
            calls.queued(id);
            filed(&mut calls, message(Push, id, 1000));
        }
        let one = message(Push, 1, 1000).len();
        assert_eq!(calls.waiting(), 2 * one);
        calls.begin(1);
        assert_eq!(calls.waiting(), one);
        assert!(matches!(
            take(&mut calls, message(Cancel, 2, 0)),
            Taken::Cancelled(2)
        ));
        calls.answered(2);
        assert_eq!(calls.waiting(), 0);
        let (handle, _) = AbortHandle::new_pair();
        calls.guard(1, handle.clone());
        take(&mut calls, message(Cancel, 1, 0));
        assert!(handle.is_aborted());
        filed(&mut calls, message(End, 1, 0));
        assert!(matches!(calls.next(Role::Answerer, 1), Some(Next::Item(_))));
        assert!(matches!(calls.next(Role::Answerer, 1), Some(Next::End)));
    }
}
