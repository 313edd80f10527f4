//! Decides whether time counts against a peer: only time in which its path was alive counts.

use crate::transport::Connection;

/// Records for each part of a time-out whether packets were sent and received. A part counts if packets were received
/// in it, or if none were sent. A path on which sent packets stay unanswered is silent; the idle timer handles that.
pub(crate) struct PathActivity {
    received: u64,
    sent: u64,
    /// Whether packets were sent and none received in some part. QUIC retransmits at doubling intervals, so after
    /// that a part without sent packets proves nothing.
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

    /// Ends a part; returns whether it counts.
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
