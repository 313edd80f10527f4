//! Metrics: counters of a socket or a server.
//!
//! [`Counts`] uses relaxed atomic additions and adds a socket's counts to those of its server; no other code runs
//! until a caller reads them. [`Metrics`] is one reading, and [`Metrics::prometheus`] formats it for a scraper. Names
//! of peers never become labels: the number of series is fixed.

pub(crate) mod speed;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::base::sharded::Numbers;
use crate::metrics::speed::Stats;
use crate::wire::code::{CloseCode, CloseReason, Fault, Side};

/// The codes of [`CloseCode::ALL`], one place for the application's codes, and one for unknown codes.
const CODES: usize = CloseCode::ALL.len() + 2;

/// The table of metrics: each row is a field of [`Metrics`] and a metric family of its text.
macro_rules! metrics {
    (
        numbers { $($count:ident $field:ident $kind:ident $name:literal $help:literal;)* }
        words { $($(#[$doc:meta])* $word:ident $words:ident $label:literal $family:literal $about:literal $known:expr;)* }
        ends { $($(#[$end_doc:meta])* $end:ident $ends:ident $end_name:literal $end_help:literal;)* }
        stats { $($stat:ident $stat_kind:ident $stat_name:literal $stat_help:literal;)* }
    ) => {
        /// One plain number of a [`Counts`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Count { $($count),* }

        const COUNTS: usize = [$(Count::$count),*].len();

        /// A counter of [`Counts`] that is divided by a word; the last word counts all other values.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Words { $($(#[$doc])* $word),* }

        const WORDS: usize = [$(Words::$word),*].len();

        impl Words {
            fn known(self) -> &'static [&'static str] {
                match self { $(Self::$word => $known),* }
            }
        }

        /// A counter of [`Counts`] that is divided by code and side.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        enum Ended { $($end),* }

        const ENDED: usize = [$(Ended::$end),*].len();

        /// The counters of one socket, or of a server with all its sockets, past ones included.
        #[derive(Debug, Clone, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Metrics {
            $(#[doc = $help] pub $field: u64,)*
            $($(#[$doc])* pub $words: BTreeMap<&'static str, u64>,)*
            $($(#[$end_doc])* pub $ends: Vec<Ends>,)*
            /// Bytes and packets so far; round-trip time, MTU and window are current values.
            pub stats: Stats,
        }

        impl Metrics {
            fn read(counts: &Counts, stats: Stats) -> Self {
                Self {
                    $($field: counts.get(Count::$count),)*
                    $($words: counts.words(Words::$word),)*
                    $($ends: counts.ends(Ended::$end),)*
                    stats,
                }
            }

            fn write(&self, text: &mut Exposition) {
                $(text.number($name, stringify!($kind), $help, self.$field);)*
                $(text.words($family, $label, $about, &self.$words);)*
                $(text.ends($end_name, $end_help, &self.$ends);)*
                $(text.number($stat_name, stringify!($stat_kind), $stat_help, self.stats.$stat);)*
            }
        }
    };
}

metrics! {
    numbers {
        Sockets sockets gauge "udpack_sockets" "Admitted sockets of this moment.";
        Detached detached gauge "udpack_sessions_detached" "Sessions whose connection is lost and that may still be resumed.";
        Channels channels gauge "udpack_channels" "Channels open at this moment.";
        Admitted admitted counter "udpack_sockets_admitted_total" "Sockets that were let in.";
        HandshakesFailed handshakes_failed counter "udpack_handshakes_failed_total" "Handshakes that failed or took too long.";
        Retries retries counter "udpack_handshake_retries_total" "Connections that had to prove their address first.";
        HandshakesPaced handshakes_paced counter "udpack_handshakes_paced_total" "Handshakes that had to wait because others of their address led to no session.";
        TokensSlowed tokens_slowed counter "udpack_tokens_slowed_total" "Tokens that had to wait because of wrong ones from their address.";
        ChannelsOpened channels_opened counter "udpack_channels_opened_total" "Channels that this side opened.";
        ChannelsAccepted channels_accepted counter "udpack_channels_accepted_total" "Channels that the peer opened, refused ones included.";
        ChannelsRefused channels_refused counter "udpack_channels_refused_total" "Channels of the peer that were refused before anybody served them.";
        FramesHeldUp frames_held_up counter "udpack_frames_held_up_total" "Large frames that waited until there was memory for them.";
        MessagesSent messages_sent counter "udpack_messages_sent_total" "Frames written to channels: events, requests, answers and the protocol's own.";
        MessagesReceived messages_received counter "udpack_messages_received_total" "Frames read from channels: events, requests, answers and the protocol's own.";
        RequestsSent requests_sent counter "udpack_requests_sent_total" "Requests to the peer.";
        RequestsReceived requests_received counter "udpack_requests_received_total" "Requests of the peer.";
        RequestsTimedOut requests_timed_out counter "udpack_requests_timed_out_total" "Requests to the peer without an answer in time.";
        RequestsCancelled requests_cancelled counter "udpack_requests_cancelled_total" "Requests of the peer that it gave up.";
        HandlerPanics handler_panics counter "udpack_handler_panics_total" "Handlers of sockets, channels and events that panicked, and verifiers.";
        HandlersFailed handlers_failed counter "udpack_channel_handlers_failed_total" "Channel handlers that returned an error.";
        UnknownEvents unknown_events counter "udpack_unknown_events_total" "Messages with an event that no handler takes.";
        BadPayloads bad_payloads counter "udpack_bad_payloads_total" "Messages whose data does not fit their handler.";
        SlowPeers slow_peers counter "udpack_slow_peers_total" "Channels lost because the peer took nothing off them.";
        Gaps gaps counter "udpack_room_gaps_total" "Gaps announced to members of rooms.";
        RoomSent room_sent counter "udpack_room_messages_sent_total" "Room messages queued for a member.";
        RoomDropped room_dropped counter "udpack_room_messages_dropped_total" "Room messages that a member did not get.";
        ClusterNodes cluster_nodes gauge "udpack_cluster_nodes" "Other nodes of the cluster that are heard.";
        ClusterDegraded cluster_degraded gauge "udpack_cluster_degraded" "1 while the broker between the nodes cannot be reached or is too slow.";
        ClusterPublished cluster_published counter "udpack_cluster_messages_published_total" "Room messages handed to the broker for other nodes.";
        ClusterDropped cluster_dropped counter "udpack_cluster_messages_dropped_total" "Room messages that other nodes will not get, because the queue to the broker was full.";
        ClusterReceived cluster_received counter "udpack_cluster_messages_received_total" "Room messages of other nodes.";
        ClusterLost cluster_lost counter "udpack_cluster_messages_lost_total" "Room messages of other nodes that are missing here, as told to members by gaps.";
        ClusterIgnored cluster_ignored counter "udpack_cluster_messages_ignored_total" "Messages of other nodes that are malformed, doubled or of another version.";
        VolatileSent volatile_sent counter "udpack_volatile_sent_total" "Volatile messages sent.";
        VolatileReceived volatile_received counter "udpack_volatile_received_total" "Volatile messages received.";
        VolatileDropped volatile_dropped counter "udpack_volatile_dropped_total" "Volatile messages replaced by newer ones or dropped, at either end of their way.";
        VolatileMalformed volatile_malformed counter "udpack_volatile_malformed_total" "Datagrams of the peer that are no message.";
        Resumed resumed counter "udpack_sessions_resumed_total" "Sessions that went on over a new connection.";
        Reconnects reconnects counter "udpack_reconnects_total" "Times this client connected again by itself.";
        Refreshed refreshed counter "udpack_tokens_refreshed_total" "Tokens replaced while connected.";
        Expired expired counter "udpack_tokens_expired_total" "Sockets closed because their token expired.";
        Revoked revoked counter "udpack_tokens_revoked_total" "Sockets closed because their token was withdrawn.";
    }
    words {
        /// Connections refused before their handshake, by reason: `"busy"`, `"draining"`.
        Knocks knocks_refused "reason" "udpack_handshakes_refused_total" "Connections refused before their handshake." &["busy", "draining", "other"];
        /// Connections refused after their handshake, by the name of the close code.
        Refused refused "code" "udpack_sockets_refused_total" "Connections refused after their handshake, by close code." &CODE_NAMES;
        /// Requests of the peer that were answered with a fault, by its code; the application's own codes are counted
        /// together as `"application"`.
        FaultsSent faults_sent "code" "udpack_faults_sent_total" "Requests of the peer answered with a fault, by its code." FAULTS;
        /// Requests to the peer that were answered with a fault, by its code.
        FaultsReceived faults_received "code" "udpack_faults_received_total" "Requests to the peer answered with a fault, by its code." FAULTS;
        /// Sessions that could not be resumed, by reason: `"unknown"`, `"expired"`, `"identity"`, `"off"` or `"other"`.
        ResumesRefused resumes_refused "reason" "udpack_sessions_not_resumed_total" "Sessions that could not be resumed, by reason." &["unknown", "expired", "identity", "off", "other"];
    }
    ends {
        /// Admitted sockets that ended, by code and side.
        Sockets closed "udpack_sockets_closed_total" "Admitted sockets that ended, by close code and side.";
        /// Channels that ended, by code and side; those that both sides merely finished as `normal`.
        Channels channels_closed "udpack_channels_closed_total" "Channels that ended, by close code and side.";
    }
    stats {
        sent counter "udpack_sent_bytes_total" "Application bytes handed to QUIC.";
        received counter "udpack_received_bytes_total" "Application bytes taken from QUIC.";
        wire_sent counter "udpack_wire_sent_bytes_total" "UDP payload bytes sent.";
        wire_received counter "udpack_wire_received_bytes_total" "UDP payload bytes received.";
        packets_sent counter "udpack_packets_sent_total" "Packets sent.";
        packets_lost counter "udpack_packets_lost_total" "Packets declared lost.";
        cwnd gauge "udpack_congestion_window_bytes" "Congestion windows of the live connections together.";
    }
}

const FAULTS: &[&str] = &[
    Fault::NO_HANDLER,
    Fault::BAD_PAYLOAD,
    Fault::INTERNAL,
    Fault::CANCELLED,
    Fault::TIMEOUT,
    Fault::REPLY_TOO_LARGE,
    "application",
];

/// Counters for each close code, created on first use, because most stay empty.
#[derive(Debug, Default)]
struct Table(OnceLock<Box<[AtomicU64]>>);

impl Table {
    fn add(&self, places: usize, at: usize) {
        let places = self
            .0
            .get_or_init(|| (0..places).map(|_| AtomicU64::new(0)).collect());
        if let Some(place) = places.get(at) {
            place.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The counters that are not zero, with their names.
    fn read(
        &self,
        name: impl Fn(usize) -> &'static str,
    ) -> impl Iterator<Item = (&'static str, u64)> {
        let places = self.0.get().map_or(&[][..], |places| places);
        places
            .iter()
            .map(|place| place.load(Ordering::Relaxed))
            .enumerate()
            .filter(|(_, count)| *count > 0)
            .map(move |(at, count)| (name(at), count))
    }
}

/// Counts of one socket, or of one endpoint; those of a socket are added to its endpoint's as well.
#[derive(Debug)]
pub(crate) struct Counts {
    numbers: Numbers<COUNTS>,
    tables: OnceLock<Box<Tables>>,
    parent: Option<Arc<Self>>,
}

/// The counters that are divided by word or by code; created on first use.
#[derive(Debug, Default)]
struct Tables {
    words: [Table; WORDS],
    ends: [[Table; SIDES.len()]; ENDED],
}

impl Counts {
    /// Counts of one socket.
    pub(crate) fn root() -> Arc<Self> {
        Self::make(Numbers::plain(), None)
    }

    /// Counts that many sockets share.
    pub(crate) fn shared() -> Arc<Self> {
        Self::make(Numbers::spread(), None)
    }

    pub(crate) fn child(parent: Arc<Self>) -> Arc<Self> {
        Self::make(Numbers::plain(), Some(parent))
    }

    fn make(numbers: Numbers<COUNTS>, parent: Option<Arc<Self>>) -> Arc<Self> {
        Arc::new(Self {
            numbers,
            tables: OnceLock::new(),
            parent,
        })
    }

    fn tables(&self) -> &Tables {
        self.tables.get_or_init(Box::default)
    }

    /// These counts and the counts that they are added to.
    fn each(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |counts| counts.parent.as_deref())
    }

    /// Adds `n` to a counter.
    pub(crate) fn add(&self, what: Count, n: u64) {
        for counts in self.each() {
            counts.numbers.add(what as usize, n);
        }
    }

    /// Adds 1 to a counter.
    pub(crate) fn one(&self, what: Count) {
        self.add(what, 1);
    }

    /// Subtracts 1 from a counter of current values.
    pub(crate) fn less(&self, what: Count) {
        self.add(what, 1_u64.wrapping_neg());
    }

    pub(crate) fn get(&self, what: Count) -> u64 {
        self.numbers.get(what as usize)
    }

    /// Counts a connection that was refused after its handshake.
    pub(crate) fn refused(&self, code: CloseCode) {
        self.word(Words::Refused, code.name());
    }

    /// Counts the end of an admitted socket.
    pub(crate) fn closed(&self, reason: &CloseReason) {
        match (reason.by, reason.code) {
            (Side::Local, CloseCode::AUTH_EXPIRED) => self.one(Count::Expired),
            (Side::Local, CloseCode::AUTH_REVOKED) => self.one(Count::Revoked),
            _ => {}
        }
        self.ended(Ended::Sockets, reason);
    }

    /// Counts the end of a channel.
    pub(crate) fn channel_closed(&self, reason: &CloseReason) {
        self.ended(Ended::Channels, reason);
    }

    fn ended(&self, what: Ended, reason: &CloseReason) {
        for counts in self.each() {
            counts.tables().ends[what as usize][reason.by as usize].add(CODES, place(reason.code));
        }
    }

    /// Adds 1 to the counter of this word.
    pub(crate) fn word(&self, what: Words, word: &str) {
        let known = what.known();
        let last = known.len() - 1;
        let at = known.iter().position(|known| *known == word);
        for counts in self.each() {
            counts.tables().words[what as usize].add(known.len(), at.unwrap_or(last));
        }
    }

    /// Counts a message that was not handled, by the code of the fault.
    pub(crate) fn not_handled(&self, fault: &str) {
        match fault {
            Fault::NO_HANDLER => self.one(Count::UnknownEvents),
            Fault::BAD_PAYLOAD => self.one(Count::BadPayloads),
            _ => {}
        }
    }

    /// Connections refused so far, before or after their handshake.
    pub(crate) fn all_refused(&self) -> u64 {
        let refused = [Words::Knocks, Words::Refused].map(|what| self.words(what));
        refused.iter().flat_map(BTreeMap::values).sum()
    }

    pub(crate) fn metrics(&self, stats: Stats) -> Metrics {
        Metrics::read(self, stats)
    }

    fn words(&self, what: Words) -> BTreeMap<&'static str, u64> {
        let known = what.known();
        let table = &self.tables().words[what as usize];
        table.read(|at| known[at]).collect()
    }

    fn ends(&self, what: Ended) -> Vec<Ends> {
        let tables = SIDES.into_iter().zip(&self.tables().ends[what as usize]);
        let counts = tables.flat_map(|(by, table)| {
            let counts = table.read(code_name);
            counts.map(move |(code, count)| Ends { code, by, count })
        });
        counts.collect()
    }
}

const SIDES: [Side; 3] = [Side::Local, Side::Peer, Side::Transport];

/// The index of a code's counter: known codes first, then the application's, then unknown ones.
fn place(code: CloseCode) -> usize {
    match CloseCode::ALL.binary_search(&code) {
        Ok(at) => at,
        Err(_) if code.value() >= CloseCode::APPLICATION => CODES - 2,
        Err(_) => CODES - 1,
    }
}

/// The names of these counters.
const CODE_NAMES: [&str; CODES] = {
    let mut names = ["unknown"; CODES];
    names[CODES - 2] = "application";
    let mut at = 0;
    while at < CloseCode::ALL.len() {
        names[at] = CloseCode::ALL[at].name();
        at += 1;
    }
    names
};

fn code_name(at: usize) -> &'static str {
    CODE_NAMES[at]
}

/// How many ends one code and one side caused.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ends {
    /// [`CloseCode::name`]; `"application"` for the application's own codes together.
    pub code: &'static str,
    /// Who ended them.
    pub by: Side,
    /// How many.
    pub count: u64,
}

impl Metrics {
    /// These numbers in the Prometheus text format 0.0.4 (`text/plain; version=0.0.4`).
    ///
    /// Every name begins with `udpack_` and does not depend on what peers do; a code that did not occur has no
    /// line.
    pub fn prometheus(&self) -> String {
        let mut text = Exposition::default();
        self.write(&mut text);
        let stats = &self.stats;
        // A server has no round-trip time of its own.
        if !stats.rtt.is_zero() {
            let name = "udpack_rtt_seconds";
            text.family(name, "gauge", "Smoothed round-trip time.");
            text.sample(name, &[], stats.rtt.as_secs_f64());
        }
        text.text
    }
}

/// A text in the Prometheus format that is being written.
#[derive(Default)]
struct Exposition {
    text: String,
}

impl Exposition {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn number(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn words(&mut self, name: &str, label: &str, help: &str, words: &BTreeMap<&str, u64>) {
        self.family(name, "counter", help);
        for (word, count) in words {
            self.sample(name, &[(label, word)], *count);
        }
    }

    fn ends(&mut self, name: &str, help: &str, ends: &[Ends]) {
        self.family(name, "counter", help);
        for Ends { code, by, count } in ends {
            let by = match by {
                Side::Local => "local",
                Side::Peer => "peer",
                Side::Transport => "transport",
            };
            self.sample(name, &[("code", code), ("by", by)], *count);
        }
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl fmt::Display) {
        let labels: Vec<_> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{}\"", escaped(value)))
            .collect();
        if labels.is_empty() {
            self.line(format_args!("{name} {value}"));
        } else {
            self.line(format_args!("{name}{{{}}} {value}", labels.join(",")));
        }
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        self.text.push_str(&line.to_string());
        self.text.push('\n');
    }
}

/// A label's value: backslash, quote and line feed escaped.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_counts_into_its_server() {
        let server = Counts::shared();
        let (a, b) = (Counts::child(server.clone()), Counts::child(server.clone()));
        a.one(Count::Sockets);
        b.one(Count::Sockets);
        b.less(Count::Sockets);
        a.add(Count::MessagesSent, 7);
        a.refused(CloseCode::AUTH_FAILED);
        b.closed(&CloseReason::peer(CloseCode::new(0x1234), ""));
        b.channel_closed(&CloseReason::local(CloseCode::new(0x99), ""));
        a.word(Words::FaultsSent, Fault::INTERNAL);
        a.word(Words::FaultsSent, "a_code_of_ours");
        a.word(Words::ResumesRefused, "no such word");
        let sum = server.metrics(Stats::default());
        assert_eq!((sum.sockets, sum.messages_sent), (1, 7));
        assert_eq!(sum.refused, BTreeMap::from([("auth_failed", 1)]));
        let end = |code, by| vec![Ends { code, by, count: 1 }];
        assert_eq!(sum.closed, end("application", Side::Peer));
        assert_eq!(sum.channels_closed, end("unknown", Side::Local));
        assert_eq!(
            sum.faults_sent,
            BTreeMap::from([("internal", 1), ("application", 1)])
        );
        assert_eq!(sum.resumes_refused, BTreeMap::from([("other", 1)]));
        assert_eq!(server.all_refused(), 1);
        assert_eq!(b.metrics(Stats::default()).messages_sent, 0);
    }

    #[test]
    fn every_code_has_its_own_place() {
        for (at, code) in CloseCode::ALL.iter().enumerate() {
            assert_eq!((place(*code), code_name(at)), (at, code.name()));
        }
        for code in [CloseCode::new(0x1000), CloseCode::new(0x99)] {
            assert_eq!(code_name(place(code)), code.name());
        }
    }

    #[test]
    fn the_text_is_one_family_after_the_other() {
        let counts = Counts::root();
        counts.one(Count::Admitted);
        counts.closed(&CloseReason::local(CloseCode::NORMAL, ""));
        let text = counts.metrics(Stats::default()).prometheus();
        let mut known: Vec<&str> = Vec::new();
        let mut family = "";
        for line in text.lines() {
            if let Some(line) = line.strip_prefix("# HELP ") {
                family = line.split_once(' ').expect("a help text").0;
                assert!(!known.contains(&family), "{family} twice");
                known.push(family);
            } else if let Some(line) = line.strip_prefix("# TYPE ") {
                let (name, kind) = line.split_once(' ').expect("a type");
                assert_eq!(name, family);
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                assert!(kind == "counter" || kind == "gauge");
            } else {
                let name = line.split(['{', ' ']).next().expect("a name");
                assert_eq!(name, family);
                let value = line.rsplit(' ').next().expect("a value");
                value.parse::<f64>().expect("a number");
            }
        }
        assert!(text.contains("\nudpack_sockets_admitted_total 1\n"));
        assert!(text.contains("\nudpack_sockets_closed_total{code=\"normal\",by=\"local\"} 1\n"));
        assert!(!text.contains("rtt"), "a server has none");
        assert!(text.ends_with('\n'));
    }

    #[test]
    fn labels_and_help_are_escaped() {
        let mut text = Exposition::default();
        text.family("x", "gauge", "a\\b\nc");
        text.sample("x", &[("l", "\"\\\n")], 1);
        assert_eq!(
            text.text,
            "# HELP x a\\\\b\\nc\n# TYPE x gauge\nx{l=\"\\\"\\\\\\n\"} 1\n"
        );
    }
}
