//! Which node has a session, and where the clients of a node that goes are sent.
//!
//! A session's id ends with the id of its node, and nodes tell each other their addresses: no broker is asked, and nothing is
//! written for a session. A node is known to be gone after 10 s; until then a client may be told to go there in vain.

use crate::base::lock;
use crate::cluster::NodeId;
use crate::serve::node::{Node, Other};
use crate::trust::url::ConnectUrl;

impl Node {
    /// The address of the other node that has this session, as far as this one knows.
    pub(crate) fn home_of(&self, session: &str) -> Option<String> {
        let home = NodeId::of_session(session)?;
        let others = lock(&self.others);
        let home = others.get(&home).filter(|home| home.takes_clients())?;
        Some(home.told.address.clone())
    }

    /// The nodes that take the clients of this one.
    pub(crate) fn spread(&self) -> Spread {
        let others = lock(&self.others);
        let takers = others.values().filter(|other| other.takes_clients());
        Spread {
            nodes: takers
                .map(|other| (other.told.sockets, other.told.address.clone()))
                .collect(),
        }
    }
}

impl Other {
    fn takes_clients(&self) -> bool {
        let told = &self.told;
        !told.lost
            && self.leaving.is_none()
            && !told.draining
            && ConnectUrl::bare(&told.address).is_some()
    }
}

/// Nodes by the sockets that they have, and are about to have.
pub(crate) struct Spread {
    nodes: Vec<(u64, String)>,
}

impl Spread {
    /// The address for one more client: that of the node with the fewest.
    pub(crate) fn next(&mut self) -> Option<String> {
        let (sockets, address) = self.nodes.iter_mut().min_by_key(|(sockets, _)| *sockets)?;
        *sockets = sockets.saturating_add(1);
        Some(address.clone())
    }
}

impl NodeId {
    /// The node whose session has this id, of 32 hexadecimal digits, if it is a node's.
    fn of_session(id: &str) -> Option<Self> {
        let digits = u64::from_str_radix(id.get(16..)?, 16).ok()?;
        Some(Self(digits.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_loaded_node_gets_the_next_client() {
        let node = |sockets, address: &str| (sockets, address.to_owned());
        let mut spread = Spread {
            nodes: vec![node(10, "a:1"), node(4, "b:1"), node(u64::MAX, "c:1")],
        };
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..100 {
            let address = spread.next().expect("three nodes");
            *counts.entry(address).or_insert(0) += 1;
        }
        assert_eq!(counts.get("a:1"), Some(&47));
        assert_eq!(counts.get("b:1"), Some(&53));
        assert_eq!(Spread { nodes: Vec::new() }.next(), None);
    }

    #[test]
    fn the_id_of_a_session_ends_with_that_of_its_node() {
        let id = NodeId([0x00, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd]);
        let session = format!("5f0c9a3e7d1b4826{id}");
        assert_eq!(NodeId::of_session(&session), Some(id));
        assert_eq!(NodeId::of_session("5f0c"), None);
    }
}
