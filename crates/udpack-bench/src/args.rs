//! The command line, and what each scenario does when nothing else is said.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use udpack_transfer::parse_size;

use crate::{beside, document, growth, page};

/// Measures udpack beside raw quinn, in turns, in processes of their own.
#[derive(Debug, Parser)]
#[command(name = "udpack-bench", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bytes from memory to nowhere, one stream
    Stream(Options),
    /// A file to a file with the real programs, verified; raw quinn only streams
    Upload(Options),
    /// Messages of 64 bytes one way, one channel a socket, one `send` each; raw quinn encodes, decodes and checks
    /// them with rmp-serde, WebSockets and NATS carry ready bytes and count them
    Messages(Options),
    /// A request and its reply, one after the other on each socket
    Ping(Options),
    /// Connecting, and being let in: one after the other, then 32 at once
    Handshakes(Options),
    /// Memory of connections on which nothing happens
    Idle(Options),
    /// Messages from one socket to all others
    Fanout(Options),
    /// Round trips of small messages without and beside a saturating upload
    Interference(Options),
    /// A tree of small files with the real programs, set-up included
    SmallFiles(Options),
    /// All of them, messages and ping with 1 and with 100 sockets
    All(Options),
    /// A good client beside a hostile one that has taken all it can get of one thing, for each such thing
    Beside(beside::Options),
    /// Memory, idle processor time and rates of udpack with few sockets and with many
    Growth(growth::Options),
    /// Fill docs/BENCHMARKS.md with results, and draw its charts
    Document(document::Options),
    /// Takes all it can get of one thing until standard input ends
    #[command(hide = true)]
    Hog(beside::Target),
    /// Counts what pages send to it, until standard input ends
    #[command(hide = true)]
    PageSink(page::Options),
    /// Serves one arm until standard input ends
    #[command(hide = true)]
    Serve(Peer),
    /// Runs the client of one arm once
    #[command(hide = true)]
    Drive(Peer),
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scenario {
    Stream,
    Upload,
    Messages,
    Ping,
    Handshakes,
    Idle,
    Fanout,
    Interference,
    SmallFiles,
}

/// Who does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Arm {
    /// The public interface with its default settings, or the real programs.
    Udpack,
    /// Raw quinn with quinn's defaults; messages in writes of 32 KiB.
    Quinn,
    /// Raw quinn with the transport settings and the UDP socket of udpack.
    Tuned,
    /// The same server, to which browsers connect: sessions of web-transport-quinn's client.
    Web,
    /// Raw quinn with its defaults, one write for each message.
    QuinnEach,
    /// tokio-tungstenite over TLS, each message flushed.
    Wss,
    /// tokio-tungstenite over TLS, flushed after 256 messages.
    WssBatch,
    /// A publisher, nats-server and a subscriber, without TLS; only where it is installed.
    Nats,
    /// Bare datagrams by quinn's UDP socket, neither encrypted nor sent again: the kernel's and tokio's part of the work.
    Udp,
}

/// A number that a scenario measures.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
}

/// How much a scenario does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Load {
    pub(crate) bytes: u64,
    pub(crate) sockets: usize,
    pub(crate) count: u64,
    pub(crate) seconds: f64,
    pub(crate) workers: Option<usize>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Rounds, after one that does not count
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Print one JSON object with all values instead of tables
    #[arg(long)]
    pub(crate) json: bool,
    /// Only these arms
    #[arg(long, value_delimiter = ',')]
    pub(crate) only: Vec<Arm>,
    #[command(flatten)]
    pub(crate) asked: Asked,
    /// Address that servers listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) listen: IpAddr,
    /// Command that servers are started by, such as "ip netns exec NAME"
    #[arg(long, default_value = "")]
    pub(crate) server_via: String,
    /// Command that clients are started by
    #[arg(long, default_value = "")]
    pub(crate) client_via: String,
    /// Where files are kept meanwhile; by default memory (/dev/shm) where there is some
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Asked {
    /// Bytes to send, or of each file: 1GiB, 64M
    #[arg(long, value_parser = parse_size)]
    pub(crate) bytes: Option<u64>,
    /// Sockets at once
    #[arg(long, value_parser = at_least_one)]
    pub(crate) sockets: Option<usize>,
    /// Messages, round trips, handshakes or files in all
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// Seconds that each half of `interference` takes, and that `idle` waits before it looks
    #[arg(long, value_parser = seconds)]
    pub(crate) seconds: Option<f64>,
    /// Worker threads of each runtime; by default one for each core
    #[arg(long, value_parser = at_least_one)]
    pub(crate) workers: Option<usize>,
}

impl Options {
    /// Rounds of one arm, both sides on loopback.
    pub(crate) fn alone(arm: Arm, rounds: u32, asked: Asked) -> Self {
        Self {
            rounds,
            json: false,
            only: vec![arm],
            asked,
            listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
            server_via: String::new(),
            client_via: String::new(),
            dir: None,
        }
    }
}

/// One side of one arm.
#[derive(Debug, Args)]
pub(crate) struct Peer {
    pub(crate) scenario: Scenario,
    pub(crate) arm: Arm,
    #[command(flatten)]
    pub(crate) asked: Asked,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
    /// Address to connect to
    #[arg(long, default_value = "127.0.0.1:45456")]
    pub(crate) connect: SocketAddr,
    /// The server's key as it printed it
    #[arg(long, default_value = "")]
    pub(crate) key: String,
    /// Where a server keeps files, or a client has them
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
}

impl Peer {
    pub(crate) fn load(&self) -> Load {
        self.scenario.load(&self.asked)
    }
}

pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("expected a number".to_owned()),
    }
}

pub(crate) fn seconds(text: &str) -> Result<f64, &'static str> {
    match text.parse() {
        Ok(seconds) if (0.01..=120.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected a number from 0.01 to 120"),
    }
}

impl Scenario {
    pub(crate) const ALL: [Self; 9] = [
        Self::Stream,
        Self::Upload,
        Self::Messages,
        Self::Ping,
        Self::Handshakes,
        Self::Idle,
        Self::Fanout,
        Self::Interference,
        Self::SmallFiles,
    ];

    /// As it is written on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Upload => "upload",
            Self::Messages => "messages",
            Self::Ping => "ping",
            Self::Handshakes => "handshakes",
            Self::Idle => "idle",
            Self::Fanout => "fanout",
            Self::Interference => "interference",
            Self::SmallFiles => "small-files",
        }
    }

    /// It and its load in a line.
    pub(crate) fn said(self, load: &Load) -> String {
        let Load {
            bytes,
            sockets,
            count,
            seconds,
            ..
        } = load;
        let name = self.name();
        match self {
            Self::Stream | Self::Upload => format!("{name}: {bytes} bytes"),
            Self::Messages | Self::Ping => {
                format!("{name}: {count} messages of 64 bytes, sockets: {sockets}")
            }
            Self::Handshakes => format!("{name}: {count} alone, {count} with 32 at once"),
            Self::Idle => format!("{name}: {sockets} sockets, of each"),
            Self::Fanout => format!("{name}: {count} messages to {sockets} sockets"),
            Self::Interference => {
                format!("{name}: {seconds} s without, {seconds} s beside an upload")
            }
            Self::SmallFiles => format!("{name}: {count} files of {bytes} bytes"),
        }
    }

    /// Its arms, in the order of their turns.
    pub(crate) fn arms(self) -> &'static [Arm] {
        match self {
            Self::Messages => &[
                Arm::Udpack,
                Arm::Quinn,
                Arm::Tuned,
                Arm::QuinnEach,
                Arm::Wss,
                Arm::WssBatch,
                Arm::Nats,
            ],
            Self::Ping => &[
                Arm::Udpack,
                Arm::Quinn,
                Arm::Tuned,
                Arm::Wss,
                Arm::Nats,
                Arm::Udp,
            ],
            Self::Fanout => &[
                Arm::Udpack,
                Arm::Quinn,
                Arm::Tuned,
                Arm::Wss,
                Arm::Nats,
                Arm::Udp,
            ],
            Self::Idle => &[Arm::Udpack, Arm::Quinn, Arm::Tuned, Arm::Web],
            _ => &[Arm::Udpack, Arm::Quinn, Arm::Tuned],
        }
    }

    pub(crate) fn metrics(self) -> &'static [Metric] {
        macro_rules! metrics {
            ($($name:literal $unit:literal),* $(,)?) => { &[$(Metric { name: $name, unit: $unit }),*] };
        }
        match self {
            Self::Stream | Self::Upload => metrics!["rate" "MB/s"],
            Self::Messages => metrics!["rate" "messages/s"],
            Self::Ping => metrics!["p50" "us", "p99" "us", "rate" "replies/s"],
            Self::Handshakes => metrics![
                "rate" "/s", "p50" "ms", "p99" "ms", "p99.9" "ms",
                "rate of 32" "/s", "p50 of 32" "ms", "p99 of 32" "ms", "p99.9 of 32" "ms",
            ],
            Self::Idle => metrics![
                "server heap" "kB", "server RSS" "kB", "client heap" "kB", "client RSS" "kB",
            ],
            Self::Fanout => metrics!["rate" "messages/s", "p50" "ms", "p99" "ms"],
            Self::Interference => metrics![
                "p50 alone" "ms", "p99 alone" "ms", "p50 beside" "ms", "p99 beside" "ms",
                "p99 ratio" "x", "upload" "MB/s",
            ],
            Self::SmallFiles => metrics!["rate" "files/s"],
        }
    }

    /// What the processor time is given for: the unit's name, and how many of it a load is.
    pub(crate) fn work(self, load: &Load) -> (&'static str, f64) {
        match self {
            Self::Stream | Self::Upload => ("GiB", load.bytes as f64 / (1_u64 << 30) as f64),
            Self::Messages => ("1e6 messages", load.count as f64 / 1e6),
            Self::Ping => ("1e6 replies", load.count as f64 / 1e6),
            Self::Handshakes => ("1e3 handshakes", 2.0 * load.count as f64 / 1e3),
            Self::Idle => ("1e3 sockets", load.sockets as f64 / 1e3),
            Self::Fanout => (
                "1e6 messages",
                load.count as f64 * load.sockets as f64 / 1e6,
            ),
            Self::Interference => ("run", 1.0),
            Self::SmallFiles => ("1e4 files", load.count as f64 / 1e4),
        }
    }

    /// What is asked for, and defaults for the rest.
    pub(crate) fn load(self, asked: &Asked) -> Load {
        let (bytes, sockets, count): (u64, usize, u64) = match self {
            Self::Stream | Self::Upload => (1 << 30, 1, 1),
            Self::Messages => (64, 1, 1_000_000),
            Self::Ping if asked.sockets.is_some_and(|sockets| sockets > 1) => (64, 1, 100_000),
            Self::Ping => (64, 1, 10_000),
            Self::Handshakes => (0, 1, 1000),
            Self::Idle => (0, 1000, 1),
            Self::Fanout => (64, 1000, 100),
            Self::Interference => (256 << 20, 1, 1),
            Self::SmallFiles => (4096, 1, 10_000),
        };
        let bytes = match self {
            Self::Stream | Self::Upload | Self::Interference | Self::SmallFiles => {
                asked.bytes.unwrap_or(bytes)
            }
            _ => bytes,
        };
        let sockets = match self {
            Self::Messages | Self::Ping | Self::Idle | Self::Fanout => {
                asked.sockets.unwrap_or(sockets)
            }
            _ => sockets,
        };
        let count = match self {
            Self::Messages | Self::Ping => {
                // Each socket has the same part.
                let part = asked.count.unwrap_or(count) / sockets as u64;
                part.max(1) * sockets as u64
            }
            Self::Handshakes | Self::Fanout | Self::SmallFiles => asked.count.unwrap_or(count),
            _ => count,
        };
        Load {
            bytes,
            sockets,
            count,
            seconds: asked
                .seconds
                .unwrap_or(if self == Self::Idle { 2.0 } else { 5.0 }),
            workers: asked.workers,
        }
    }
}

impl Arm {
    /// As it is written on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Udpack => "udpack",
            Self::Quinn => "quinn",
            Self::Tuned => "tuned",
            Self::Web => "web",
            Self::QuinnEach => "quinn-each",
            Self::Wss => "wss",
            Self::WssBatch => "wss-batch",
            Self::Nats => "nats",
            Self::Udp => "udp",
        }
    }
}
