//! Detects which messages of other nodes are missing. It does no I/O and has no clock: the caller says how much time
//! has passed.
//!
//! Each node numbers the messages that it publishes to a topic, from 1. A number beyond the next one tells how many
//! messages are lost; a number that was seen before belongs to a duplicate. After the last message, a mark repeats its
//! number.
//!
//! The first number of a node is accepted as it is, unless the topic was followed before the node could begin: then the
//! messages before that number are lost, too.

use std::collections::HashMap;

use crate::cluster::NodeId;
use crate::cluster::wire::Head;

/// The most nodes whose messages to one topic are followed.
pub(crate) const MAX_NODES: usize = 1024;
/// The largest accepted loss; a larger one means that the number is invalid.
const MAX_JUMP: u64 = 1 << 32;

/// The numbers received from all nodes on one topic.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    streams: HashMap<NodeId, Stream>,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    epoch: u32,
    /// The last number that was received or reported as lost.
    last: u64,
    /// Losses that were reported while the node was silent, without knowing their number.
    told: u64,
}

/// What to do with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is accepted, and this many messages before it are lost.
    Next { lost: u64 },
    /// It is a duplicate, or belongs to an earlier epoch.
    Old,
    /// Its number is impossible.
    Bad,
}

impl Heard {
    /// Checks a message. `known`: the node and the topic have been followed for so long that the node's first number
    /// would be known.
    pub(crate) fn message(
        &mut self,
        node: NodeId,
        epoch: u32,
        sequence: u64,
        known: bool,
    ) -> Verdict {
        let Some(before) = sequence.checked_sub(1) else {
            return Verdict::Bad;
        };
        match self.advance(node, epoch, before, sequence, known) {
            Verdict::Next { lost } => Verdict::Next { lost },
            other => other,
        }
    }

    /// Checks a mark: the node's last message has the number `last`.
    pub(crate) fn mark(&mut self, node: NodeId, epoch: u32, last: u64, known: bool) -> Verdict {
        self.advance(node, epoch, last, last, known)
    }

    /// The messages up to `before` were sent. After this call no loss up to `now` has to be reported.
    fn advance(&mut self, node: NodeId, epoch: u32, before: u64, now: u64, known: bool) -> Verdict {
        let full = self.streams.len() >= MAX_NODES;
        let Some(stream) = self.streams.get_mut(&node) else {
            if full || (known && before > MAX_JUMP) {
                return Verdict::Bad;
            }
            let stream = Stream {
                epoch,
                last: now,
                told: 0,
            };
            self.streams.insert(node, stream);
            let lost = if known { before } else { 0 };
            return Verdict::Next { lost };
        };
        // Epochs increase, and wrap around after 2^32.
        let ahead = epoch.wrapping_sub(stream.epoch);
        let last = match ahead {
            0 => stream.last,
            1..=0x7fff_ffff => 0,
            _ => return Verdict::Old,
        };
        if ahead == 0 && now <= last {
            return Verdict::Old;
        }
        let lost = before.saturating_sub(last);
        if lost > MAX_JUMP {
            return Verdict::Bad;
        }
        stream.epoch = epoch;
        stream.last = now;
        let told = std::mem::take(&mut stream.told);
        stream.told = told.saturating_sub(lost);
        Verdict::Next {
            lost: lost.saturating_sub(told),
        }
    }

    /// The node is silent: its last messages may be lost. Returns the number of losses to report: 1, which stands for
    /// at least one, if the node was heard on this topic.
    pub(crate) fn silent(&mut self, node: NodeId) -> u64 {
        match self.streams.get_mut(&node) {
            Some(stream) if stream.told == 0 => {
                stream.told = 1;
                1
            }
            _ => 0,
        }
    }

    /// Forgets a node that has left or will not come back.
    pub(crate) fn forget(&mut self, node: NodeId) {
        self.streams.remove(&node);
    }
}

/// How far each node has come in the log of a room. All nodes read the same entries, and so find the same ones doubled.
#[derive(Debug, Default)]
pub(crate) struct Origins {
    nodes: HashMap<NodeId, Origin>,
}

#[derive(Debug)]
struct Origin {
    /// Epoch and number of its last entry.
    last: (u32, u64),
    /// The offset of that.
    offset: u64,
}

impl Origins {
    /// Whether the entry at this offset is there for the first time.
    pub(crate) fn is_new(&mut self, head: &Head, offset: u64) -> bool {
        let last = (head.epoch, head.sequence);
        let known = self.nodes.get(&head.node);
        if known.is_some_and(|known| known.last >= last) {
            return false;
        }
        if known.is_none() && self.nodes.len() >= MAX_NODES {
            self.drop_oldest();
        }
        self.nodes.insert(head.node, Origin { last, offset });
        true
    }

    /// Forgets the node that has been silent for the most entries.
    fn drop_oldest(&mut self) {
        let oldest = self.nodes.iter().min_by_key(|(_, origin)| origin.offset);
        if let Some(oldest) = oldest.map(|(node, _)| *node) {
            self.nodes.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: NodeId = NodeId([1; 8]);
    const B: NodeId = NodeId([2; 8]);

    fn next(lost: u64) -> Verdict {
        Verdict::Next { lost }
    }

    #[test]
    fn holes_are_counted_and_what_came_before_is_old() {
        let mut heard = Heard::default();
        assert_eq!(heard.message(A, 0, 5, false), next(0), "joined later");
        assert_eq!(heard.message(A, 0, 6, true), next(0));
        assert_eq!(heard.message(A, 0, 9, true), next(2));
        assert_eq!(heard.message(A, 0, 9, true), Verdict::Old, "doubled");
        assert_eq!(heard.message(A, 0, 7, true), Verdict::Old, "reordered");
        assert_eq!(
            heard.message(B, 0, 3, true),
            next(2),
            "known from its first"
        );
    }

    #[test]
    fn a_mark_shows_a_lost_tail_once() {
        let mut heard = Heard::default();
        assert_eq!(heard.mark(A, 0, 0, false), next(0));
        assert_eq!(heard.message(A, 0, 1, true), next(0));
        assert_eq!(heard.mark(A, 0, 1, true), Verdict::Old);
        assert_eq!(heard.mark(A, 0, 4, true), next(3));
        assert_eq!(heard.mark(A, 0, 4, true), Verdict::Old);
        assert_eq!(heard.message(A, 0, 4, true), Verdict::Old, "told as lost");
        assert_eq!(heard.message(A, 0, 5, true), next(0));
    }

    #[test]
    fn a_stream_that_begins_anew_counts_from_one() {
        let mut heard = Heard::default();
        assert_eq!(heard.message(A, 3, 100, false), next(0));
        assert_eq!(heard.message(A, 4, 1, true), next(0));
        assert_eq!(heard.message(A, 3, 101, true), Verdict::Old, "of before");
        assert_eq!(heard.message(A, 5, 4, true), next(3));
        let mut heard = Heard::default();
        assert_eq!(heard.message(A, u32::MAX, 9, false), next(0));
        assert_eq!(heard.message(A, 0, 1, true), next(0), "counted around");
    }

    #[test]
    fn what_cannot_be_changes_nothing() {
        let mut heard = Heard::default();
        assert_eq!(heard.message(A, 0, 1, true), next(0));
        assert_eq!(heard.message(A, 0, 0, true), Verdict::Bad);
        assert_eq!(heard.message(A, 0, u64::MAX, true), Verdict::Bad);
        assert_eq!(heard.mark(A, 0, u64::MAX, true), Verdict::Bad);
        assert_eq!(heard.message(A, 0, 2, true), next(0));
        assert_eq!(heard.message(B, 0, u64::MAX, true), Verdict::Bad);
    }

    #[test]
    fn nodes_beyond_the_bound_are_not_followed() {
        let mut heard = Heard::default();
        for n in 0..MAX_NODES as u64 {
            let node = NodeId(n.to_be_bytes());
            assert_eq!(heard.message(node, 0, 1, true), next(0));
        }
        assert_eq!(heard.message(NodeId([0xff; 8]), 0, 1, true), Verdict::Bad);
        heard.forget(NodeId([0; 8]));
        assert_eq!(heard.message(NodeId([0xff; 8]), 0, 1, true), next(0));
    }

    #[test]
    fn a_loss_that_was_told_during_silence_is_not_told_again() {
        let mut heard = Heard::default();
        assert_eq!(heard.silent(A), 0, "never heard");
        assert_eq!(heard.message(A, 0, 1, true), next(0));
        assert_eq!(heard.silent(A), 1);
        assert_eq!(heard.silent(A), 0, "once");
        assert_eq!(heard.mark(A, 0, 4, true), next(2), "3 are lost, 1 was told");
        assert_eq!(heard.message(A, 0, 6, true), next(1));
    }

    fn head(node: NodeId, epoch: u32, sequence: u64) -> Head {
        Head {
            node,
            epoch,
            sequence,
        }
    }

    #[test]
    fn an_entry_of_a_log_counts_once() {
        let mut origins = Origins::default();
        let mut new =
            |node, epoch, sequence, offset| origins.is_new(&head(node, epoch, sequence), offset);
        assert!(new(A, 0, 5, 1));
        assert!(new(B, 0, 3, 2));
        assert!(!new(A, 0, 5, 3), "doubled");
        assert!(!new(A, 0, 4, 4), "of before");
        assert!(new(A, 0, 6, 5));
        assert!(new(A, 1, 1, 6), "counts anew");
        assert!(!new(A, 0, 7, 7), "of before");
        assert!(new(B, u32::MAX, u64::MAX, 8));
    }

    #[test]
    fn of_too_many_nodes_the_one_silent_for_longest_is_forgotten() {
        let mut origins = Origins::default();
        let node = |n: u64| NodeId(n.to_be_bytes());
        for n in 0..MAX_NODES as u64 {
            assert!(origins.is_new(&head(node(n), 0, 1), n + 1));
        }
        let offset = MAX_NODES as u64;
        assert!(origins.is_new(&head(node(0), 0, 2), offset + 1));
        assert!(origins.is_new(&head(A, 0, 1), offset + 2));
        assert_eq!(origins.nodes.len(), MAX_NODES);
        assert!(!origins.is_new(&head(node(0), 0, 2), offset + 3), "kept");
        assert!(
            origins.is_new(&head(node(1), 0, 1), offset + 4),
            "forgotten"
        );
    }

    /// What happens to one message or mark between two nodes.
    #[derive(Debug, Clone, Copy)]
    enum Act {
        Arrive,
        Lose,
        Double,
        MarkArrives,
        Restart,
        Silence,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            6 => Just(Act::Arrive),
            3 => Just(Act::Lose),
            1 => Just(Act::Double),
            2 => Just(Act::MarkArrives),
            1 => Just(Act::Restart),
            1 => Just(Act::Silence),
        ]
    }

    proptest! {
        /// Against a model that knows what was lost: each message is delivered once and in order, and when the last mark
        /// is through, exactly what is missing was told; one more for each silence in which nothing was lost.
        #[test]
        fn everything_is_delivered_or_told(acts in prop::collection::vec(act(), 1..200)) {
            let mut heard = Heard::default();
            prop_assert_eq!(heard.mark(A, 1, 0, false), next(0));
            let (mut epoch, mut sequence) = (1, 0);
            let (mut lost, mut told, mut silences) = (0_u64, 0_u64, 0_u64);
            let mut tell = |verdict: Verdict| match verdict {
                Verdict::Next { lost } => { told += lost; true }
                Verdict::Old => false,
                Verdict::Bad => panic!("nothing bad was sent"),
            };
            for act in acts {
                match act {
                    Act::Arrive | Act::Double => {
                        sequence += 1;
                        prop_assert!(tell(heard.message(A, epoch, sequence, true)));
                        if matches!(act, Act::Double) {
                            prop_assert!(!tell(heard.message(A, epoch, sequence, true)));
                        }
                    }
                    Act::Lose => { sequence += 1; lost += 1; }
                    Act::MarkArrives => { tell(heard.mark(A, epoch, sequence, true)); }
                    Act::Restart => {
                        // A stream is begun anew only long after its last mark.
                        tell(heard.mark(A, epoch, sequence, true));
                        (epoch, sequence) = (epoch + 1, 0);
                    }
                    Act::Silence => {
                        let more = heard.silent(A);
                        silences += more;
                        tell(next(more));
                    }
                }
            }
            tell(heard.mark(A, epoch, sequence, true));
            prop_assert!(told >= lost, "{told} of {lost}");
            prop_assert!(told <= lost + silences, "{told} of {lost}, {silences} silences");
        }

        /// Whatever another node makes up: no message is delivered twice, and nothing is told twice.
        #[test]
        fn made_up_numbers_never_deliver_twice(
            numbers in prop::collection::vec((0..3_u32, prop_oneof![0..20_u64, any::<u64>()], any::<bool>()), 1..100),
        ) {
            let mut heard = Heard::default();
            let mut last = (0, 0);
            for (epoch, sequence, mark) in numbers {
                let verdict = match mark {
                    true => heard.mark(A, epoch, sequence, true),
                    false => heard.message(A, epoch, sequence, true),
                };
                if let Verdict::Next { .. } = verdict
                    && !mark
                {
                    prop_assert!((epoch, sequence) > last);
                    last = (epoch, sequence);
                }
            }
        }
    }
}
