//! Questions to all nodes of a cluster: the members of a room, closing somebody's sockets, sending to somebody's
//! channels. Each node answers for itself. The asking node waits until a deadline and reports which nodes have not
//! answered.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::base::lock;
use crate::cluster::NodeId;
use crate::serve::node::{ClusterView, Node};
use crate::serve::rooms::{Directory, Guest};
use crate::session::socket::Socket;
use crate::wire::code::CloseCode;
use crate::wire::message::{Encoded, decode_data, encode_data};
use crate::wire::msgpack::validate;

/// The most questions of one node that wait for answers.
const QUESTIONS: usize = 1024;
/// The most answers that wait for the asking task: one of each node.
const ANSWERS: usize = crate::cluster::sequence::MAX_NODES;
/// The most bytes of members in one node's answer.
const MEMBERS: usize = 512 << 10;

/// Selects sockets or channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Whom<'a> {
    /// Those of the session with this id.
    Session(&'a str),
    /// Those of all sessions of the peer with this id.
    Peer(&'a str),
}

impl Whom<'_> {
    fn is(self, session: &str, peer: Option<&str>) -> bool {
        match self {
            Self::Session(id) => id == session,
            Self::Peer(id) => Some(id) == peer,
        }
    }
}

/// The answers of all nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answers<T> {
    /// The combined answer of this node and of the nodes that answered in time.
    pub value: T,
    /// Nodes that are alive and did not answer in time. Their part is not in `value`; an action may have been carried
    /// out there all the same.
    pub missing: Vec<NodeId>,
}

/// A member of a room, on any node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ClusterMember {
    /// The session that its channel belongs to.
    pub session: String,
    /// Its peer's id.
    pub peer: String,
    /// Its channel's name.
    pub name: String,
}

/// The sockets of a server.
pub(crate) trait Sockets: Send + Sync {
    fn all(&self) -> Vec<Socket>;
}

/// The questions of a node and their answers.
#[derive(Default)]
pub(crate) struct Questions {
    waiting: Mutex<Waiting>,
    sockets: Mutex<Option<Weak<dyn Sockets>>>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    questions: HashMap<u64, mpsc::Sender<(NodeId, Bytes)>>,
}

#[derive(Serialize, Deserialize)]
enum Question<'a> {
    #[serde(rename = "members")]
    Members(&'a str),
    #[serde(rename = "close")]
    Close {
        #[serde(borrow)]
        whom: Named<'a>,
        code: u64,
        text: &'a str,
    },
    /// The frame follows the question.
    #[serde(rename = "send")]
    Send {
        #[serde(borrow)]
        whom: Named<'a>,
        channel: &'a str,
    },
}

/// [`Whom`] as it is sent.
#[derive(Clone, Copy, Serialize, Deserialize)]
enum Named<'a> {
    #[serde(rename = "session")]
    Session(&'a str),
    #[serde(rename = "peer")]
    Peer(&'a str),
}

#[derive(Default, Serialize, Deserialize)]
struct Answer {
    count: u64,
    members: Vec<ClusterMember>,
}

impl<'a> From<Whom<'a>> for Named<'a> {
    fn from(whom: Whom<'a>) -> Self {
        match whom {
            Whom::Session(id) => Self::Session(id),
            Whom::Peer(id) => Self::Peer(id),
        }
    }
}

impl<'a> From<Named<'a>> for Whom<'a> {
    fn from(named: Named<'a>) -> Self {
        match named {
            Named::Session(id) => Self::Session(id),
            Named::Peer(id) => Self::Peer(id),
        }
    }
}

impl Questions {
    pub(crate) fn answered_by(&self, sockets: Weak<dyn Sockets>) {
        *lock(&self.sockets) = Some(sockets);
    }

    /// Handles an answer; returns `false` if nobody waits for it.
    pub(crate) fn answer(&self, number: u64, node: NodeId, body: Bytes) -> bool {
        let waiting = lock(&self.waiting);
        let asker = waiting.questions.get(&number);
        asker.is_some_and(|asker| asker.try_send((node, body)).is_ok())
    }

    fn ask(&self) -> Option<(Asked<'_>, mpsc::Receiver<(NodeId, Bytes)>)> {
        let mut waiting = lock(&self.waiting);
        if waiting.questions.len() >= QUESTIONS {
            return None;
        }
        let number = waiting.next;
        waiting.next += 1;
        let (asker, answers) = mpsc::channel(ANSWERS);
        waiting.questions.insert(number, asker);
        Some((
            Asked {
                questions: self,
                number,
            },
            answers,
        ))
    }

    /// This node's answer; `None` if the question cannot be read.
    pub(crate) fn reply(
        &self,
        directory: &Directory,
        question: &[u8],
        frame: Bytes,
    ) -> Option<Vec<u8>> {
        validate(question).ok()?;
        let question: Question<'_> = decode_data(question).ok()?;
        encode_data(&self.own(directory, question, frame)).ok()
    }

    fn own(&self, directory: &Directory, question: Question<'_>, frame: Bytes) -> Answer {
        let mut answer = Answer::default();
        match question {
            Question::Members(room) => {
                let guests = directory.existing(room).map(|room| room.guests());
                let guests = guests.unwrap_or_default();
                answer.count = guests.len() as u64;
                let mut left = MEMBERS;
                answer.members = guests
                    .iter()
                    .map(member)
                    .take_while(|member| {
                        let size = 64 + member.peer.len() + member.name.len();
                        left = left.saturating_sub(size);
                        left > 0
                    })
                    .collect();
            }
            Question::Close { whom, code, text } => {
                let whom = Whom::from(whom);
                let sockets = lock(&self.sockets).as_ref().and_then(Weak::upgrade);
                let sockets = sockets.map(|sockets| sockets.all()).unwrap_or_default();
                for socket in sockets {
                    if whom.is(&socket.id(), Some(socket.peer().id())) {
                        socket.abort(CloseCode::new(code), text);
                        answer.count += 1;
                    }
                }
            }
            Question::Send { whom, channel, .. } => {
                let whom = Whom::from(whom);
                answer.count = directory.deliver_to(channel, &frame, |guest| {
                    let peer = guest.session.peer.get();
                    whom.is(&guest.session_id, peer.as_ref().map(|peer| peer.id()))
                });
            }
        }
        answer
    }
}

fn member(guest: &Arc<Guest>) -> ClusterMember {
    let peer = guest.session.peer.get();
    ClusterMember {
        session: guest.session_id.to_string(),
        peer: peer.map_or_else(String::new, |peer| peer.id().to_owned()),
        name: guest.name().to_owned(),
    }
}

/// A question that waits for answers until it is dropped.
struct Asked<'a> {
    questions: &'a Questions,
    number: u64,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        lock(&self.questions.waiting).questions.remove(&self.number);
    }
}

impl ClusterView {
    /// What operators call these nodes: their names, or their ids where they have none or are not known.
    pub fn names(&self, nodes: &[NodeId]) -> Vec<String> {
        let known = self.nodes();
        let name = |id: &NodeId| {
            let node = known.iter().find(|node| node.id == *id);
            let name = node.map(|node| node.name.clone());
            name.filter(|name| !name.is_empty())
                .unwrap_or_else(|| id.to_string())
        };
        nodes.iter().map(name).collect()
    }
}

/// Questions to all nodes. Each waits at most `within` for the other nodes, and not at all if there are none.
///
/// # Cancel safety
/// Dropping a future discards the answers; an action may be carried out all the same.
impl ClusterView {
    /// The members of a room, on all nodes; from each node as many as fit into 512 KiB.
    pub async fn members(&self, room: &str, within: Duration) -> Answers<Vec<ClusterMember>> {
        let question = Question::Members(room);
        let (answers, missing) = self.ask(question, &Bytes::new(), within).await;
        let members = answers.into_iter().flat_map(|answer| answer.members);
        Answers {
            value: members.collect(),
            missing,
        }
    }

    /// Closes sockets at once, on any node, as [`Socket::abort`] does; returns how many. With
    /// [`CloseCode::AUTH_REVOKED`] and [`Whom::Peer`] it is [`Server::revoke`](crate::Server::revoke) for the cluster.
    pub async fn close(
        &self,
        whom: Whom<'_>,
        code: CloseCode,
        text: &str,
        within: Duration,
    ) -> Answers<u64> {
        let question = Question::Close {
            whom: whom.into(),
            code: code.value(),
            text,
        };
        self.count(question, &Bytes::new(), within).await
    }

    /// Sends a message to the selected channels of this name, on any node, that
    /// [`Rooms::to_channels`](crate::Rooms::to_channels) knows; returns to how many. Only that number shows a loss.
    pub async fn send(
        &self,
        whom: Whom<'_>,
        channel: &str,
        message: &Encoded,
        within: Duration,
    ) -> Answers<u64> {
        let question = Question::Send {
            whom: whom.into(),
            channel,
        };
        self.count(question, message.bytes(), within).await
    }

    async fn count(&self, question: Question<'_>, frame: &Bytes, within: Duration) -> Answers<u64> {
        let (answers, missing) = self.ask(question, frame, within).await;
        Answers {
            value: answers.iter().map(|answer| answer.count).sum(),
            missing,
        }
    }

    async fn ask(
        &self,
        question: Question<'_>,
        frame: &Bytes,
        within: Duration,
    ) -> (Vec<Answer>, Vec<NodeId>) {
        let deadline = Instant::now() + within;
        let node: &Node = self.node();
        let mut missing: BTreeSet<NodeId> = self
            .nodes()
            .into_iter()
            .filter(|node| !node.lost)
            .map(|node| node.id)
            .collect();
        let mut answers = Vec::new();
        let encoded = encode_data(&question);
        let asked = node.questions.ask().filter(|_| !missing.is_empty());
        if let (Some((asked, mut incoming)), Ok(encoded)) = (asked, encoded)
            && node.question(asked.number, &encoded, frame)
        {
            answers.push(
                node.questions
                    .own(self.directory(), question, frame.clone()),
            );
            while !missing.is_empty() {
                let answer = tokio::time::timeout_at(deadline, incoming.recv());
                let Ok(Some((from, body))) = answer.await else {
                    break;
                };
                if validate(&body).is_ok()
                    && let Ok(answer) = decode_data::<Answer>(&body)
                    && missing.remove(&from)
                {
                    answers.push(answer);
                }
            }
        } else {
            answers.push(
                node.questions
                    .own(self.directory(), question, frame.clone()),
            );
        }
        (answers, missing.into_iter().collect())
    }
}
