//! Whether time counts against a peer: only time in which the path to it was alive.

use crate::transport::Connection;

/// What was said and heard on a connection, part by part of a time. A part counts if something was heard in it, or if
/// nothing was said: a path on which what is sent stays unanswered is silent, which is the idle timer's business.
pub(crate) struct PathActivity {
    received: u64,
    sent: u64,
    /// A part went by in which something was sent and nothing received. QUIC repeats what was lost at intervals that
    /// double, so from then on a part in which nothing is said proves nothing.
    silent: bool,
}

impl PathActivity {
    pub(crate) fn new(conn: &Connection) -> Self {
        let stats = conn.stats();
        Self {
            received: stats.datagrams_received,
            sent: stats.datagrams_sent,
            silent: false,
        }
    }

    /// Another part has passed. Says whether it counts.
    pub(crate) fn counts(&mut self, conn: &Connection) -> bool {
        let stats = conn.stats();
        let (received, sent) = (stats.datagrams_received, stats.datagrams_sent);
        let heard = received != self.received;
        self.silent |= !heard && sent != self.sent;
        (self.received, self.sent) = (received, sent);
        heard || !self.silent
    }

    /// Whether the path was silent in any part so far.
    pub(crate) fn was_silent(&self) -> bool {
        self.silent
    }
}
