//! What a program serves with: handlers by event, their arguments, rooms and presence; a server as
//! one node of a cluster.

pub(crate) mod asked;
pub(crate) mod everywhere;
pub(crate) mod extract;
pub(crate) mod handlers;
pub(crate) mod history;
pub(crate) mod node;
pub(crate) mod presence;
pub(crate) mod rooms;
pub(crate) mod router;
