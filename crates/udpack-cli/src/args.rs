//! The command lines of both binaries.
//!
//! Secrets never have to be in an argument: a token comes from a file or the environment. Those variables
//! are read in `target`, not here, so that no help text and no usage error can show their values.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use udpack::{CongestionControl, Fingerprint, Priority, TransportChoice};
use udpack_transfer::{
    Delta, IfExists, Limiter, Names, Overwrite, Pattern, SyncPolicy, Xattrs, names, parse_size,
};

use crate::via::Via;

const SIZES: &str = "\
SIZE is a number of bytes, with K, M, G or T for powers of 1024: 512K, 10M, 1.5G. RATE is a SIZE per second: 10M \
for each direction, 10M:1M for up and down. DURATION is a number with s, m, h or d: 90s, 24h, 7d.";

const PATTERNS: &str = "\
GLOB is matched as in .gitignore: *.o excludes every entry with such a name, /doc/*.html only entries at that place, \
build/ every directory of that name.";

const HOOK: &str = "\
CMD is run with one argument, `accept` before a file is accepted or `done` once it is stored, and UDPACK_PATH, \
UDPACK_SIZE, UDPACK_PEER in its environment; for `done` also UDPACK_FILE and UDPACK_HASH. `accept` refuses with \
an exit code other than 0 and a line on standard error, and renames with a line on standard output.";

const GAPS: &str = "\
If this client reads too slowly and events are lost, a line {\"gap\":{\"room\":NAME,\"lost\":COUNT}} stands in their \
place. After a lost connection the session continues without loss if the server still has it; standard error reports \
which.";

const DOCTOR: &str = "\
Neither key nor token is needed: without them only the network is examined. Exit code 0 means that a connection is \
possible; the last line names what may make it slow.";

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    any other error
  2    wrong usage
  3    a local file is missing or unreadable, or nothing was found to send
  4    the token was refused, or the server's key is not the pinned one
  5    network: run it again
  6    refused by the server's rules, or cancelled
  7    the bytes differ
  8    the server's disk: full, or failing
  9    the handler refused the request
  10   some of several files failed
  11   no handler for this request, or no such channel
  12   no such file or transfer at the server
  13   files changed or vanished while they were read; all others are done
  14   a command at the other end of a pipe failed, or its output is incomplete
  130  interrupted";

const ENVIRONMENT: &str = "\
Environment:
  UDPACK_URL    the server, as `udpack-server url` prints it: udpack://TOKEN@HOST:PORT#sha256:HEX
  UDPACK_TOKEN  the token, if neither the URL nor --token-file gives one
  NO_COLOR      no colours, if it is set to anything
  RUST_LOG      what to log, instead of -q and -v";

const MORE: &str = "More options, examples, environment and exit codes: --help";

const SERVER_EXAMPLES: &str = "\
Examples:
  udpack-server                                  files go to ./uploads, key and token to ./keys
  udpack-server --dir /srv/files --allow-read    clients may also read
  udpack-server token new guest --expires 30d    another token, and its URL
  udpack-server url                              the URL of the first token";

const CLIENT_EXAMPLES: &str = "\
Examples:
  export UDPACK_URL='udpack://…'                 as `udpack-server url` prints it at the server
  udpack-client put video.mkv photos/            upload a file, and the content of a directory
  udpack-client get video.mkv --as copy.mkv      download a file
  udpack-client ls -l                            list the server's files";

const PUT_EXAMPLES: &str = "\
Examples:
  udpack-client put report.pdf                   stored as report.pdf
  udpack-client put photos --as backup/          stored as backup/photos/…
  udpack-client put -p --exclude '*.tmp' work/   the content of work, with modes and times
  tar c work | udpack-client put - --as work.tar
  udpack-client put --from-command 'pg_dump shop' --as shop.sql
  udpack-client put --follow build.log           while it is written, until it is closed";

const GET_EXAMPLES: &str = "\
Examples:
  udpack-client get report.pdf                   into this directory
  udpack-client get photos/ --as local/          the content of photos, into local
  udpack-client get / --as mirror/ -p            everything, with modes and times
  udpack-client get shop.sql --to-command 'psql --single-transaction shop'
  udpack-client get work.tar - | tar t           to standard output";

const SYNC_EXAMPLES: &str = "\
Examples:
  udpack-client sync work :backup/work           make the server's backup/work a copy of work
  udpack-client sync work :backup/work --delete --max-delete 100
  udpack-client sync -n work :backup/work --delete    list what would be sent and deleted
  udpack-client sync --watch --delete work :work keep the copy up to date, until interrupted
  udpack-client sync :backup/work restored       the other way";

const VERIFY_EXAMPLES: &str = "\
Examples:
  udpack-client verify photos && rm -r photos    remove files that are safely at the server";

const LOGIN_EXAMPLES: &str = "\
Examples:
  ssh host udpack-server url | udpack-client login - work
  udpack-client put photos/ work:backup/         to backup at that server
  udpack-client ls -l work:";

const SHARE_EXAMPLES: &str = "\
Examples:
  udpack-client share inbox --quota 2G --expires 7d   to upload into inbox
  udpack-client share inbox/anna --once               for the first one who opens it
  udpack-client share photos --no-upload              to list and download";

const SEND_EXAMPLES: &str = "\
Examples:
  udpack-client send hello '{\"text\":\"hi\"}'
  udpack-client send level -5
  udpack-client listen | jq -c .data             events of other clients

Values that JSON cannot express: {\"$bin\":\"00ff\"} bytes, {\"$timestamp\":[seconds,nanoseconds]} a time, \
{\"$float\":\"nan\"}, \"inf\" or \"-inf\", {\"$map\":[[1,\"one\"]]} a map whose keys are not text.";

/// Takes uploads over reliable UDP and relays events between clients.
#[derive(Debug, Parser)]
#[command(
    name = "udpack-server",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = MORE,
    after_long_help = format!("{SERVER_EXAMPLES}\n\n{SIZES}\n\n{HOOK}\n\n{EXIT_CODES}")
)]
pub(crate) struct ServerArgs {
    #[command(subcommand)]
    pub(crate) command: Option<ServerCommand>,

    /// Address and UDP port to listen on; port 0 picks a free one. The default is all addresses, IPv6 and IPv4. A
    /// link-local address needs its network interface: `[fe80::1%eth0]:45456`.
    #[arg(
        long,
        value_name = "ADDR:PORT",
        default_value = "[::]:45456",
        env = "UDPACK_LISTEN"
    )]
    pub(crate) listen: String,

    /// The directory for received files; created if it is missing.
    #[arg(long, default_value = "./uploads", env = "UDPACK_DIR")]
    pub(crate) dir: PathBuf,

    /// Store received files in an object store instead: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX
    /// or file:///DIRECTORY. Credentials come from the environment (AWS_ACCESS_KEY_ID and so on; AWS_ENDPOINT with
    /// AWS_ALLOW_HTTP=true for your own server). --dir holds the journals with which uploads continue after a crash.
    #[cfg(feature = "store")]
    #[arg(long, value_name = "URL", env = "UDPACK_STORE", group = "objects", conflicts_with_all = ["min_free", "fsync", "xattrs"])]
    pub(crate) store: Option<String>,

    /// Store received files in --dir, and copy them from there to an object store, with an address and credentials as
    /// for --store. A client is told that its file is stored when it is in --dir. What clients overwrite or remove is
    /// overwritten or removed in the object store, too; what you remove in --dir yourself stays there.
    #[cfg(feature = "store")]
    #[arg(long, value_name = "URL", env = "UDPACK_PUSH", group = "objects")]
    pub(crate) push: Option<String>,

    /// Memory for files on their way into the object store, over all uploads. A file is stored in at most 10,000 parts,
    /// each of at most a quarter of this size.
    #[cfg(feature = "store")]
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "256M",
        requires = "objects"
    )]
    pub(crate) store_budget: Size,

    /// The directory of the server's key and token; created at the first start, readable only by its owner.
    #[arg(long, default_value = "./keys", env = "UDPACK_KEYS")]
    pub(crate) keys: PathBuf,

    /// The file of the clients' tokens, one per line; must exist. Default: KEYS/token, created at the first start.
    #[arg(long, value_name = "FILE", env = "UDPACK_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,

    /// The host name or address to show in the URL. Default: a guess from the network interfaces.
    #[arg(long, value_name = "NAME", env = "UDPACK_PUBLIC_HOST")]
    pub(crate) public_host: Option<String>,

    /// The most permissive option that clients may use when a name is taken.
    #[arg(long, value_enum, default_value_t = OverwriteArg::Never)]
    pub(crate) overwrite: OverwriteArg,

    /// Largest file; with `none` only the quota and the disk limit it.
    #[arg(long, value_name = "SIZE", default_value = "none")]
    pub(crate) max_file: Size,

    /// Which names may be stored: any that the file system can hold, or only portable ones, which every operating
    /// system can hold.
    #[arg(long, value_enum, default_value_t = NamesArg::Any)]
    pub(crate) names: NamesArg,

    /// Which extended attributes of files and directories clients may store and read: none, those of users (`user.*`), or
    /// all that the server may set, with access control lists and capabilities, which can give rights to files. No quota
    /// counts the room that they take on the disk, at most 64K a file.
    #[arg(long, value_enum, value_name = "KIND", default_value_t = GrantArg::None)]
    pub(crate) xattrs: GrantArg,

    /// Most clients connected at once from one address (an IPv4 address or an IPv6 /64).
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sockets_per_address: u32,

    /// From this many wrong tokens on, the tokens of an address are verified one per second. A wrong token is forgotten
    /// after 5 s.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) wrong_tokens: u32,

    /// Most bytes of all files together, each empty file, directory and link counted as 1,024; with `none` only the
    /// disk limits them.
    #[arg(long, value_name = "SIZE", default_value = "none")]
    pub(crate) quota: Size,

    /// Free space that uploads leave on the disk. Default: a twentieth of it, at most 1G.
    #[arg(long, value_name = "SIZE")]
    pub(crate) min_free: Option<Size>,

    /// Let every client also read, list and compare files, not only those whose token says `scope=read`.
    #[arg(long)]
    pub(crate) allow_read: bool,

    /// Accept no files: every client may read, none may write or remove, whatever its token says.
    #[arg(long, conflicts_with = "allow_read")]
    pub(crate) read_only: bool,

    /// When files are synced to disk: with `auto` before they are reported, small ones in batches; with `always` each
    /// by itself; with `never` the system decides, and a power cut may lose files that were reported.
    #[arg(long, value_enum, default_value_t = FsyncArg::Auto)]
    pub(crate) fsync: FsyncArg,

    /// How long an interrupted upload can be resumed.
    #[arg(long, value_name = "DURATION", default_value = "24h")]
    pub(crate) expire: Span,

    /// Most bytes per second of all clients together, for uploads and downloads each or as UP:DOWN.
    #[arg(long, value_name = "RATE[:RATE]", default_value = "none")]
    pub(crate) bwlimit: Rates,

    /// A program to run before each file is accepted, and after each is stored.
    #[arg(long, value_name = "CMD", env = "UDPACK_HOOK")]
    pub(crate) hook: Option<PathBuf>,

    /// How long that program may take to answer; after that the file is refused.
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "10s",
        env = "UDPACK_HOOK_TIMEOUT",
        requires = "hook"
    )]
    pub(crate) hook_timeout: Span,

    /// Serve counters for Prometheus over HTTP at this address, under /metrics; port 0 picks a free one. Anybody
    /// who reaches it can read them.
    #[arg(long, value_name = "ADDR:PORT", env = "UDPACK_METRICS")]
    pub(crate) metrics: Option<String>,

    /// Share the clients' events with other servers, over this NATS broker: nats://HOST:PORT or tls://HOST:PORT, with
    /// USER:PASSWORD@ or TOKEN@ before the host if the broker requires it; several brokers are separated by commas. The
    /// broker must accept messages of 2 MB (`max_payload: 2MB`).
    #[cfg(feature = "cluster")]
    #[arg(
        long,
        value_name = "URL",
        env = "UDPACK_CLUSTER",
        hide_env_values = true
    )]
    pub(crate) cluster: Option<String>,

    /// The name of this server in the cluster. Default: the name of the machine.
    #[cfg(feature = "cluster")]
    #[arg(long, value_name = "NAME", requires = "cluster")]
    pub(crate) cluster_name: Option<String>,

    /// Where clients reach this server of the cluster, and no other: HOST:PORT. Clients that come back to another server are told to
    /// go on here when their session is here, and those of a server that shuts down move here. All servers of a cluster have one key.
    #[cfg(feature = "cluster")]
    #[arg(
        long,
        value_name = "HOST:PORT",
        requires = "cluster",
        env = "UDPACK_ADVERTISE",
        value_parser = place
    )]
    pub(crate) advertise: Option<String>,

    /// Serve pages for browsers at this address, over TCP: upload, download and more, with a token. Default: the
    /// address and the port number of --listen. The pages use HTTPS with the server's own certificate, of which
    /// browsers warn, or with that of
    /// --tls-cert; and plain HTTP as well if only this machine can reach them.
    #[cfg(feature = "web")]
    #[arg(long, value_name = "ADDR:PORT", num_args = 0..=1, env = "UDPACK_WEB")]
    pub(crate) web: Option<Option<String>>,

    /// Do not listen on TCP. Otherwise clients whose network blocks UDP connect over TCP, at the port number of
    /// --listen.
    #[arg(long)]
    pub(crate) no_tcp: bool,

    /// The origin of another server's pages that may connect from a browser, such as `https://example.com`; may be
    /// given several times.
    #[cfg(feature = "web")]
    #[arg(long, value_name = "ORIGIN", requires = "web")]
    pub(crate) web_origin: Vec<Origin>,

    /// A certificate chain for browsers in PEM, signed by an authority that they trust, the server's certificate first
    /// (certbot's fullchain.pem). It is read again when it changes, and on SIGHUP. Other clients still get the server's
    /// own key.
    #[cfg(feature = "web")]
    #[arg(long, value_name = "FILE", requires_all = ["web", "tls_key"], env = "UDPACK_TLS_CERT")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// The private key of that certificate in PEM (certbot's privkey.pem).
    #[cfg(feature = "web")]
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_cert",
        env = "UDPACK_TLS_KEY"
    )]
    pub(crate) tls_key: Option<PathBuf>,

    /// Write a qlog file of each QUIC connection into this directory; costs time and disk space.
    #[arg(long, value_name = "DIR", env = "UDPACK_QLOG")]
    pub(crate) qlog: Option<PathBuf>,

    /// Congestion control for what the server sends.
    #[arg(long, value_enum, default_value_t = CcArg::Auto)]
    pub(crate) cc: CcArg,

    /// Print the first lines as JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) log: LogArgs,
}

/// Commands of the server besides serving.
#[derive(Debug, Subcommand)]
pub(crate) enum ServerCommand {
    /// Create, list and revoke the clients' tokens; a running server applies the change within two seconds.
    #[command(subcommand)]
    Token(TokenCommand),
    /// List and remove interrupted uploads, even while a server is running.
    #[command(subcommand)]
    Uploads(UploadsCommand),
    /// Print the URL for clients, with the first token of the file: a secret, for UDPACK_URL.
    Url(UrlArgs),
    /// Print a shell's completion script.
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the manual pages, or write each into its own file.
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The directory for the files, such as /usr/local/share/man/man1. Default: all pages, one after the other.
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Create a token and print it; only its digest is stored.
    #[command(after_long_help = SIZES)]
    New(TokenNewArgs),
    /// List the tokens by name, with their rights.
    List(TokenListArgs),
    /// Revoke a token; a running server disconnects its clients within two seconds.
    Revoke(TokenRevokeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TokenNewArgs {
    /// The token's name in logs and lists. Default: a random one.
    pub(crate) name: Option<String>,

    /// Its rights: read, write, delete, share, watch, admin, separated by commas. Default: those of every client.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "SCOPE")]
    pub(crate) scope: Vec<ScopeArg>,

    /// The directory that is the root for its clients.
    #[arg(long, value_name = "DIR")]
    pub(crate) prefix: Option<String>,

    /// Most bytes of all files below its directory together, each empty file, directory and link counted as 1,024.
    #[arg(long, value_name = "SIZE")]
    pub(crate) quota: Option<Size>,

    /// When it expires: after a time such as 30d or 12h, or at a date such as 2027-01-31 or 2027-01-31T12:00:00Z.
    #[arg(long, value_name = "TIME")]
    pub(crate) expires: Option<String>,

    /// Only the first client that presents the token may use it, for 24 hours from then on.
    #[arg(long)]
    pub(crate) once: bool,

    #[command(flatten)]
    pub(crate) at: WhereArgs,

    #[command(flatten)]
    pub(crate) file: TokenFileArgs,
}

#[derive(Debug, Args)]
pub(crate) struct UrlArgs {
    /// Print the link for browsers instead; the server must have been started with --web.
    #[cfg(feature = "web")]
    #[arg(long)]
    pub(crate) web: bool,

    #[command(flatten)]
    pub(crate) at: WhereArgs,

    #[command(flatten)]
    pub(crate) file: TokenFileArgs,
}

/// The address where clients reach the server.
#[derive(Debug, Args)]
pub(crate) struct WhereArgs {
    /// The server's host name or address. Default: the one it printed at its last start, else a guess from the network
    /// interfaces.
    #[arg(long, value_name = "NAME", env = "UDPACK_PUBLIC_HOST")]
    pub(crate) public_host: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct TokenListArgs {
    #[command(flatten)]
    pub(crate) file: TokenFileArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TokenRevokeArgs {
    /// The token's name.
    pub(crate) name: String,

    #[command(flatten)]
    pub(crate) file: TokenFileArgs,
}

/// The token file, and the form of the output.
#[derive(Debug, Args)]
pub(crate) struct TokenFileArgs {
    /// The directory of the server's key and token.
    #[arg(long, default_value = "./keys", env = "UDPACK_KEYS")]
    pub(crate) keys: PathBuf,

    /// The file of the clients' tokens. Default: KEYS/token.
    #[arg(long, value_name = "FILE", env = "UDPACK_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,

    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The origin of another server's pages.
#[cfg(feature = "web")]
#[derive(Debug, Clone)]
pub(crate) struct Origin(pub(crate) String);

#[cfg(feature = "web")]
impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match udpack::Origins::host(text) {
            Some(_) => Ok(Self(text.to_owned())),
            None => {
                Err("not an origin, such as https://example.com or http://127.0.0.1:8080".into())
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScopeArg {
    Read,
    Write,
    Delete,
    Watch,
    Share,
    Admin,
}

impl ScopeArg {
    /// The word in the token file.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Delete => "delete",
            Self::Watch => "watch",
            Self::Share => "share",
            Self::Admin => "admin",
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum UploadsCommand {
    /// List interrupted uploads, oldest first.
    List(UploadsListArgs),
    /// Remove interrupted uploads, except those being written.
    #[command(after_long_help = SIZES)]
    Purge(UploadsPurgeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct UploadsListArgs {
    #[command(flatten)]
    pub(crate) dir: UploadsDirArgs,
}

#[derive(Debug, Args)]
pub(crate) struct UploadsPurgeArgs {
    /// Remove only uploads that have not grown for this long.
    #[arg(long, value_name = "DURATION", default_value = "24h")]
    pub(crate) older_than: Span,

    #[command(flatten)]
    pub(crate) dir: UploadsDirArgs,
}

/// The store, and the form of the output.
#[derive(Debug, Args)]
pub(crate) struct UploadsDirArgs {
    /// The directory of received files.
    #[arg(long, default_value = "./uploads", env = "UDPACK_DIR")]
    pub(crate) dir: PathBuf,

    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Sends files and events over reliable UDP.
#[derive(Debug, Parser)]
#[command(
    name = "udpack-client",
    version,
    after_help = MORE,
    after_long_help = format!("{CLIENT_EXAMPLES}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}")
)]
pub(crate) struct ClientArgs {
    #[command(subcommand)]
    pub(crate) command: ClientCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    /// Upload files and directories; each file is verified and on the server's disk when it is reported.
    #[command(after_help = MORE, after_long_help = format!("{PUT_EXAMPLES}\n\n{PATTERNS}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Put(PutArgs),
    /// Download files and directories; each file is verified and on disk when it is reported.
    #[command(after_help = MORE, after_long_help = format!("{GET_EXAMPLES}\n\n{PATTERNS}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Get(GetArgs),
    /// Make one directory a copy of another: transfer the differences, and with --delete remove what only the copy has.
    #[command(after_help = MORE, after_long_help = format!("{SYNC_EXAMPLES}\n\n{PATTERNS}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Sync(SyncArgs),
    /// List a directory of the server.
    #[command(after_help = MORE, after_long_help = format!("{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Ls(LsArgs),
    /// Show kind, size, time and mode of files of the server.
    #[command(after_help = MORE, after_long_help = format!("{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Stat(StatArgs),
    /// Remove files of the server.
    #[command(after_help = MORE, after_long_help = format!("{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Rm(RmArgs),
    /// Compare local files with the server's, byte for byte by their hashes; nothing is sent.
    #[command(after_help = MORE, after_long_help = format!("{VERIFY_EXAMPLES}\n\n{PATTERNS}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Verify(VerifyArgs),
    /// List the transfers that are running at the server, watch them, or cancel one.
    #[command(after_help = MORE, after_long_help = format!("{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Jobs(JobsArgs),
    /// Create a drop link: a token for somebody else, for one directory of the server. It grants at most this client's
    /// rights.
    #[command(after_help = MORE, after_long_help = format!("{SHARE_EXAMPLES}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Share(ShareArgs),
    /// Show the state of the server: traffic, connections, rooms, memory, disk, quotas. Needs a token with the scope
    /// `watch` or `admin`.
    #[command(after_help = MORE, after_long_help = format!("{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Stats(StatsArgs),
    /// Upload a file over loopback, between a server and a client in this process, and verify it.
    Demo(DemoArgs),
    /// Send one event and wait until the server has handled it; prints the reply as JSON.
    #[command(after_help = MORE, after_long_help = format!("{SEND_EXAMPLES}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Send(SendArgs),
    /// Send a request on any channel of the server; prints the reply as JSON.
    #[command(after_help = MORE, after_long_help = format!("{SEND_EXAMPLES}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Request(RequestArgs),
    /// Print each event that other clients send, one JSON object a line; reconnects after a lost connection.
    #[command(after_help = MORE, after_long_help = format!("{GAPS}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Listen(ListenArgs),
    /// Measure application round-trip time.
    #[command(after_help = MORE, after_long_help = format!("{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Ping(PingArgs),
    /// Examine the path to a server, and explain what does not work: names, each address over UDP and TCP, packet size,
    /// loss, key, token, clock.
    #[command(after_help = MORE, after_long_help = format!("{DOCTOR}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Doctor(DoctorArgs),
    /// Store a server under a name, for `--to NAME` and paths such as NAME:photos.
    #[command(after_help = MORE, after_long_help = format!("{LOGIN_EXAMPLES}\n\n{ENVIRONMENT}\n\n{EXIT_CODES}"))]
    Login(LoginArgs),
    /// Print a shell's completion script.
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the server's names that begin with a word, one per line: for completion scripts.
    #[command(hide = true)]
    RemoteNames(RemoteNamesArgs),
    /// Print the manual pages, or write each into its own file.
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RemoteNamesArgs {
    /// The word as typed so far: `da`, `work:da` or `:da`.
    pub(crate) word: String,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    /// What stands before the path in each line: `work:`, `:` or nothing.
    #[arg(skip)]
    pub(crate) before: String,

    /// Named servers that begin with the word.
    #[arg(skip)]
    pub(crate) servers: Vec<String>,

    /// The server is asked.
    #[arg(skip)]
    pub(crate) remote: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LoginArgs {
    /// The URL that `udpack-server url` or `token new` prints at the server; `-` reads it from standard input, which
    /// hides the token from other users of this machine.
    pub(crate) url: String,

    /// The name for this server.
    pub(crate) name: String,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PutArgs {
    /// Files and directories to send; `dir/` sends the directory's content, `-` standard input.
    #[arg(value_name = "PATH", required_unless_present_any = ["files_from", "from_command", "follow"])]
    pub(crate) paths: Vec<PathBuf>,

    /// Send the output of this shell command. It is stored only if the command exits with 0; in a pipeline the exit
    /// code of the last command counts.
    #[arg(long, value_name = "CMD", requires = "name", conflicts_with_all = ["paths", "files_from"])]
    pub(crate) from_command: Option<String>,

    /// Send a file while it grows, and store it when its last writer has closed it, or as --until says. It fails if it
    /// is cut, replaced or renamed meanwhile.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["paths", "files_from", "from_command", "no_resume", "dry_run"])]
    pub(crate) follow: Option<PathBuf>,

    /// Where the file of --follow ends: at this many bytes, or after a time without growth, such as 30s.
    #[arg(long, value_name = "SIZE|SECSs", requires = "follow", conflicts_with_all = ["paths", "files_from", "from_command"])]
    pub(crate) until: Option<Until>,

    /// Store standard input or the command's output only if it has this many bytes.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) size: Option<u64>,

    /// Store standard input or the command's output only if it ends with this text, with or without an end of line.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) require_eof_marker: Option<OsString>,

    /// How much of standard input or of the command's output is kept until the server has it on disk, so that a lost
    /// connection does no harm: 16M in memory, the rest in a private file in TMPDIR.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1G")]
    pub(crate) spool: u64,

    /// Also send the files that FILE lists, one path per line; `-` reads the list from standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) files_from: Option<PathBuf>,

    /// In the list of --files-from, NUL ends each path, as `find -print0` writes it.
    #[arg(short = '0', long, requires = "files_from")]
    pub(crate) null: bool,

    /// Succeed even if there is nothing to send, and store an empty file if standard input is empty.
    #[arg(long)]
    pub(crate) allow_empty: bool,

    /// Name at the server, for a single file or directory; with a `/` at the end, the directory for all.
    #[arg(long = "as", value_name = "NAME|DIR/", value_parser = name())]
    pub(crate) name: Option<String>,

    #[command(flatten)]
    pub(crate) tree: TreeArgs,

    #[command(flatten)]
    pub(crate) transfer: TransferArgs,

    /// Start interrupted files from the beginning, and let the server keep nothing of them for a later resume.
    #[arg(long)]
    pub(crate) no_resume: bool,

    /// How names are written here: `exact`, or `mapped`, as `get --names mapped` writes them.
    #[arg(long, value_enum, default_value_t = WrittenArg::Exact, conflicts_with = "files_from")]
    pub(crate) names: WrittenArg,

    /// A file that changes while it is read: a failure, or with `warn` stored as it was read, which is told and ends with code 13.
    #[arg(long, value_enum, default_value_t = TornArg::Fail)]
    pub(crate) changed: TornArg,

    /// With --if-exists overwrite, send only the differences from the stored file: with `auto` if the network is slower
    /// than reading twice. Needs a token that may read; files of up to 256K are sent whole.
    #[arg(long, value_enum, default_value_t = DeltaArg::Auto)]
    pub(crate) delta: DeltaArg,

    /// Show what would be sent and what would be refused, and send nothing. If the token may read, the server is asked
    /// for files of the same names. Its other rules take effect only in a real run: --overwrite, --names, --max-file,
    /// --quota, the space on its disk, --hook.
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    #[command(flatten)]
    pub(crate) show: ShowArgs,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// Files and directories of the server; `dir/` gets the directory's content, `/` everything.
    #[arg(value_name = "REMOTE", required = true, value_parser = name())]
    pub(crate) paths: Vec<String>,

    /// Write a single file to the standard input of this shell command, which must exit with 0. The last bytes are
    /// written only when the whole file is verified; without them the command should fail.
    #[arg(long, value_name = "CMD", conflicts_with = "name")]
    pub(crate) to_command: Option<String>,

    /// Local name, for a single file or directory; with a `/` at the end, the directory for all.
    #[arg(long = "as", value_name = "NAME|DIR/")]
    pub(crate) name: Option<PathBuf>,

    /// Exclude these entries; may be given several times.
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<Pattern>,

    /// How names are written here: `exact`, or `mapped`, so that every common file system holds them: what it may not hold as `%`
    /// and two hexadecimal digits. `put --names mapped` reads them back.
    #[arg(long, value_enum, default_value_t = WrittenArg::Exact)]
    pub(crate) names: WrittenArg,

    /// With --if-exists overwrite, get only what differs from the file that is here: `auto` where the network is slower than
    /// reading twice. Files up to 256K come whole.
    #[arg(long, value_enum, default_value_t = DeltaArg::Auto)]
    pub(crate) delta: DeltaArg,

    #[command(flatten)]
    pub(crate) transfer: TransferArgs,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    #[command(flatten)]
    pub(crate) show: ShowArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SyncArgs {
    /// The directory to copy: a local one, or one of the server with a colon before it.
    #[arg(value_name = "FROM")]
    pub(crate) source: PathBuf,

    /// The directory that becomes the copy; created if it is missing. One of the two is at the server: `:backup/work`,
    /// or `:` for its root.
    #[arg(value_name = "TO")]
    pub(crate) copy: PathBuf,

    /// Delete what only the copy has, after everything else has arrived. If something has failed, nothing is deleted.
    /// Entries that
    /// --exclude names stay.
    #[arg(long, visible_alias = "delete-after")]
    pub(crate) delete: bool,

    /// Delete nothing if more than this many files, directories and links would be deleted.
    #[arg(long, value_name = "N", requires = "delete")]
    pub(crate) max_delete: Option<usize>,

    /// List what would be sent and deleted, and do nothing.
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,

    /// Keep running: wait until something changes in FROM, which must be local, and send that, too. A server that
    /// cannot be reached is tried again until it can.
    #[cfg(target_os = "linux")]
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) watch: bool,

    /// Compare the hashes of files with the same size and time, too: both sides read all of them.
    #[arg(short, long)]
    pub(crate) checksum: bool,

    /// Transfer only the differences from the replaced file, or, when sending, from one that was moved: with `auto` if the
    /// network is slower than reading twice. A new version of at most 256K is sent whole.
    #[arg(long, value_enum, default_value_t = DeltaArg::Auto)]
    pub(crate) delta: DeltaArg,

    /// What to do about a file that changes while it is read: `retry` sends it up to three times before it counts as
    /// failed. `warn` stores it as it was read, says so, and exits with code 13; what the server sends is tried again instead.
    #[arg(long, value_enum, default_value_t = ChangedArg::Retry)]
    pub(crate) changed: ChangedArg,

    /// What to do about a file that is gone when it is read: skip it, or count it as failed.
    #[arg(long, value_enum, default_value_t = VanishedArg::Skip)]
    pub(crate) vanished: VanishedArg,

    #[command(flatten)]
    pub(crate) tree: TreeArgs,

    #[command(flatten)]
    pub(crate) keep: KeepArgs,

    #[command(flatten)]
    pub(crate) pace: PaceArgs,

    #[command(flatten)]
    pub(crate) paths: ViaArgs,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,

    #[command(flatten)]
    pub(crate) show: ShowArgs,
}

/// What to do about a file that changes while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ChangedArg {
    Retry,
    Fail,
    Warn,
}

/// The same, where nothing is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TornArg {
    Fail,
    Warn,
}

/// Which extended attributes are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum XattrsArg {
    User,
    All,
}

impl KeepArgs {
    pub(crate) fn xattrs(self) -> Xattrs {
        match self.xattrs {
            None => Xattrs::None,
            Some(XattrsArg::User) => Xattrs::User,
            Some(XattrsArg::All) => Xattrs::All,
        }
    }
}

/// Which extended attributes clients may copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GrantArg {
    None,
    User,
    All,
}

impl From<GrantArg> for Xattrs {
    fn from(arg: GrantArg) -> Self {
        match arg {
            GrantArg::None => Self::None,
            GrantArg::User => Self::User,
            GrantArg::All => Self::All,
        }
    }
}

/// How names are written here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WrittenArg {
    Exact,
    Mapped,
}

/// What to do about a file that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VanishedArg {
    Skip,
    Fail,
}

/// Selects a part of a local tree.
#[derive(Debug, Clone, Args)]
pub(crate) struct TreeArgs {
    /// Exclude these entries; may be given several times.
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<Pattern>,

    /// Keep symbolic links as links, instead of following them.
    #[arg(long)]
    pub(crate) links: bool,
}

/// How many files are transferred at once, and how they use the network.
#[derive(Debug, Clone, Args)]
pub(crate) struct PaceArgs {
    /// How many files to transfer in parallel. Default: 4.
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) jobs: Option<u8>,

    /// Reconnect at most this many times without progress. Default: until nothing has moved for 5 minutes.
    #[arg(long, value_name = "N")]
    pub(crate) retries: Option<u32>,

    /// Most bytes per second, for each direction or as UP:DOWN.
    #[arg(long, value_name = "RATE[:RATE]", default_value = "none")]
    pub(crate) bwlimit: Rates,
}

/// What is copied of files beside their bytes, times and modes.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct KeepArgs {
    /// Copy extended attributes: those of users (`user.*`), or with `--xattrs=all` also access control lists,
    /// capabilities and others that both sides may set. The server must be started with --xattrs. What is lost is told.
    #[arg(long, value_enum, value_name = "KIND", num_args = 0..=1, require_equals = true, default_missing_value = "user")]
    pub(crate) xattrs: Option<XattrsArg>,
}

/// How files are transferred, in either direction.
#[derive(Debug, Clone, Args)]
pub(crate) struct TransferArgs {
    #[command(flatten)]
    pub(crate) pace: PaceArgs,

    /// What to do when the name is taken: `same` succeeds if the content is equal. For uploads, the server must allow
    /// the last two.
    #[arg(long, value_enum, default_value_t = IfExistsArg::Same)]
    pub(crate) if_exists: IfExistsArg,

    /// Keep modification times and modes.
    #[arg(short, long)]
    pub(crate) preserve: bool,

    #[command(flatten)]
    pub(crate) keep: KeepArgs,

    #[command(flatten)]
    pub(crate) paths: ViaArgs,
}

/// Several paths to the server.
#[derive(Debug, Clone, Args)]
pub(crate) struct ViaArgs {
    /// Spread the transfer over these interfaces or local addresses, as in eth0,wlan0: each has a connection of its own, and one that
    /// is lost leaves the rest to the others. `auto` takes every interface that has a default route.
    #[arg(long, value_name = "NAMES|auto", help_heading = "Connection")]
    pub(crate) via: Option<Via>,
}

#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// The directory. Default: the root.
    #[arg(value_parser = name())]
    pub(crate) path: Option<String>,

    /// Also show kind, mode, size and modification time.
    #[arg(short)]
    pub(crate) long: bool,

    /// Also list the content of directories, at any depth.
    #[arg(short = 'R', long)]
    pub(crate) recursive: bool,

    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StatArgs {
    /// The files and directories.
    #[arg(value_name = "PATH", required = true, value_parser = name())]
    pub(crate) paths: Vec<String>,

    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// The files, and with -r the directories.
    #[arg(value_name = "PATH", required = true, value_parser = name())]
    pub(crate) paths: Vec<String>,

    /// Remove directories, too, with all their content.
    #[arg(short, long)]
    pub(crate) recursive: bool,

    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Local files and directories, named as for `put`.
    #[arg(value_name = "PATH", required = true)]
    pub(crate) paths: Vec<PathBuf>,

    /// Name at the server, for a single file or directory; with a `/` at the end, the directory for all.
    #[arg(long = "as", value_name = "NAME|DIR/", value_parser = name())]
    pub(crate) name: Option<String>,

    #[command(flatten)]
    pub(crate) tree: TreeArgs,

    /// How many files to compare in parallel.
    #[arg(short, long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) jobs: u8,

    /// Print JSON, one object per line, the last one `result`.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct JobsArgs {
    /// Keep running, and print a line whenever a transfer moves or ends.
    #[arg(long)]
    pub(crate) watch: bool,

    /// Also list transfers that ended recently, and why.
    #[arg(long)]
    pub(crate) ended: bool,

    /// Cancel this transfer; for a transfer of another client the token needs the scope `admin`.
    #[arg(long, value_name = "ID", conflicts_with_all = ["watch", "ended"])]
    pub(crate) cancel: Option<u64>,

    /// The reason, a line of at most 256 bytes, which the client of the transfer receives.
    #[arg(long, value_name = "TEXT", value_parser = reason, requires = "cancel", conflicts_with_all = ["watch", "ended"])]
    pub(crate) reason: Option<String>,

    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Keep running, and print a line whenever something has changed.
    #[arg(long)]
    pub(crate) watch: bool,

    /// Close the connection with this id; the token needs the scope `admin`.
    #[arg(long, value_name = "ID", conflicts_with = "watch")]
    pub(crate) kick: Option<String>,

    /// The reason, a line of at most 256 bytes, which the client receives.
    #[arg(long, value_name = "TEXT", value_parser = reason, requires = "kick", conflicts_with_all = ["watch", "drain"])]
    pub(crate) reason: Option<String>,

    /// Make the server drain and shut down; the token needs the scope `admin`.
    #[arg(long, conflicts_with_all = ["watch", "kick"])]
    pub(crate) drain: bool,

    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The file to send. Default: 64 MiB of generated data.
    pub(crate) file: Option<PathBuf>,

    /// Congestion control of both sides.
    #[arg(long, value_enum, default_value_t = CcArg::Auto)]
    pub(crate) cc: CcArg,

    #[command(flatten)]
    pub(crate) show: ShowArgs,

    #[command(flatten)]
    pub(crate) log: LogArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SendArgs {
    /// The event's name.
    pub(crate) event: String,

    /// Its data, in JSON; `-` sends each JSON value on standard input. `{"$bin":"<hex>"}` stands for bytes.
    #[arg(allow_negative_numbers = true)]
    pub(crate) json: String,

    /// Only wait until the handler has taken it, and print nothing.
    #[arg(long)]
    pub(crate) acked: bool,

    /// Send it as a volatile message: only the latest value is kept, it may be lost, and nothing is printed.
    #[arg(long, conflicts_with = "acked")]
    pub(crate) volatile: bool,

    #[command(flatten)]
    pub(crate) ask: AskArgs,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RequestArgs {
    /// The event's name.
    pub(crate) event: String,

    /// Its data, in JSON; `-` sends a request with each JSON value on standard input. `{"$bin":"<hex>"}` stands for
    /// bytes.
    #[arg(default_value = "null", allow_negative_numbers = true)]
    pub(crate) json: String,

    /// Request a stream of items, and print each as it arrives.
    #[arg(long)]
    pub(crate) items: bool,

    /// Seconds to wait for the reply, or for the last item. Default: 30 for a reply, no limit for items.
    #[arg(long, value_name = "SECS")]
    pub(crate) timeout: Option<Seconds>,

    #[command(flatten)]
    pub(crate) ask: AskArgs,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

/// The channel, and whether it survives a lost connection.
#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    #[command(flatten)]
    pub(crate) channel: ChannelArgs,

    /// Continue on a new connection when the connection is lost, without losing or repeating messages.
    #[arg(long)]
    pub(crate) resumable: bool,

    /// Reconnect at most this many times in a row. Default: for up to 5 minutes.
    #[arg(long, value_name = "N", requires = "resumable")]
    pub(crate) retries: Option<u32>,
}

/// Selects a channel.
#[derive(Debug, Args)]
pub(crate) struct ChannelArgs {
    /// The channel's name.
    #[arg(long, default_value = crate::hub::EVENTS)]
    pub(crate) channel: String,

    /// The channel's priority over other channels of the connection.
    #[arg(long, value_enum, default_value_t = PriorityArg::Normal)]
    pub(crate) priority: PriorityArg,
}

#[derive(Debug, Args)]
pub(crate) struct ListenArgs {
    #[command(flatten)]
    pub(crate) channel: ChannelArgs,

    /// Stop after this many events.
    #[arg(short, long, value_name = "COUNT")]
    pub(crate) count: Option<u64>,

    /// Reconnect at most this many times in a row; 0 ends with the connection. Default: for up to 5 minutes.
    #[arg(long, value_name = "N")]
    pub(crate) retries: Option<u32>,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ShareArgs {
    /// The directory that becomes the root of the link. Default: this client's own.
    #[arg(value_name = "DIR", value_parser = name())]
    pub(crate) path: Option<String>,

    /// Most bytes of all files in it. Default: what this client's own token has left.
    #[arg(long, value_name = "SIZE")]
    pub(crate) quota: Option<Size>,

    /// How long the link is valid, such as 12h or 7d. Default: as long as this client's own token.
    #[arg(long, value_name = "TIME")]
    pub(crate) expires: Option<Span>,

    /// Only the first browser or client that presents the link may use it, for 24 hours from then on.
    #[arg(long)]
    pub(crate) once: bool,

    /// Also allow listing and downloading.
    #[arg(long)]
    pub(crate) read: bool,

    /// Allow only listing and downloading.
    #[arg(long)]
    pub(crate) no_upload: bool,

    /// List the links that this client's token has made.
    #[arg(long, conflicts_with_all = ["path", "quota", "expires", "once", "read", "no_upload"])]
    pub(crate) list: bool,

    /// Revoke a link by its name, and disconnect its users.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["list", "path", "quota", "expires", "once", "read", "no_upload"])]
    pub(crate) revoke: Option<String>,

    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// The server, as for --to: HOST, HOST:PORT, a whole udpack:// URL, or the name of one that `login` stored.
    #[arg(value_name = "HOST[:PORT]|URL|NAME", conflicts_with = "to")]
    pub(crate) server: Option<String>,

    /// Print JSON, one object.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PingArgs {
    /// How many pings to send; 0 continues until interrupted.
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    pub(crate) count: u64,

    /// Seconds between two pings.
    #[arg(long, value_name = "SECS", default_value = "1")]
    pub(crate) interval: Seconds,

    /// Print JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) connect: ConnectArgs,
}

/// The server, and how to authenticate. Each command that talks to one logs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectArgs {
    /// The server: HOST, HOST:PORT, a whole udpack:// URL, or a name that `login` stored. Default: UDPACK_URL, else
    /// this machine.
    #[arg(long, value_name = "HOST[:PORT]|URL|NAME")]
    pub(crate) to: Option<String>,

    /// Set if the server came from the configuration file.
    #[arg(skip)]
    pub(crate) named: bool,

    /// The directory with the server's public key and the token.
    #[arg(long, default_value = "./keys", env = "UDPACK_KEYS")]
    pub(crate) keys: PathBuf,

    /// The file with the token. Default: UDPACK_TOKEN, else KEYS/token.
    #[arg(long, value_name = "FILE", env = "UDPACK_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,

    /// The fingerprint of the server's key. Default: the one in the URL, else that of KEYS/pubkey.pem; else the server
    /// needs a certificate of an authority that this system trusts.
    #[arg(long, value_name = "HEX")]
    pub(crate) fingerprint: Option<Fingerprint>,

    /// The transport. Default: auto; for a day after TCP was needed, it tries both at once.
    #[arg(long, value_enum, env = "UDPACK_TRANSPORT", hide_short_help = true)]
    pub(crate) transport: Option<TransportArg>,

    /// The HTTP proxy for connections over TCP, `[http://][USER[:PASSWORD]@]HOST[:PORT]`. Default: https_proxy,
    /// HTTPS_PROXY, all_proxy or ALL_PROXY, except for servers in no_proxy or NO_PROXY. A password is safer in a
    /// variable: other users can see arguments.
    #[arg(long, value_name = "URL", hide_short_help = true)]
    pub(crate) proxy: Option<String>,

    /// Use no proxy, whatever the environment says.
    #[arg(long, conflicts_with = "proxy", hide_short_help = true)]
    pub(crate) no_proxy: bool,

    /// Congestion control for what the client sends.
    #[arg(long, value_enum, default_value_t = CcArg::Auto, hide_short_help = true)]
    pub(crate) cc: CcArg,

    /// Seconds to wait for the server to answer.
    #[arg(
        long,
        value_name = "SECS",
        default_value = "10",
        hide_short_help = true
    )]
    pub(crate) connect_timeout: Seconds,

    /// Write a qlog file of each QUIC connection into this directory.
    #[arg(long, value_name = "DIR", env = "UDPACK_QLOG", hide_short_help = true)]
    pub(crate) qlog: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) log: LogArgs,
}

/// How progress and results are shown.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct ShowArgs {
    /// How to show progress on standard error: `plain` prints a line every 5 s; `auto` shows a bar on a terminal, else
    /// plain.
    #[arg(long, value_enum, default_value_t = ProgressArg::Auto, value_name = "STYLE")]
    pub(crate) progress: ProgressArg,

    /// Print results as JSON, one object per line, the last one `result`.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is logged, and where.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct LogArgs {
    /// Show only errors.
    #[arg(short, long, conflicts_with = "verbose")]
    pub(crate) quiet: bool,

    /// Show more of the log on standard error; twice for everything.
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    /// Also write a log file into this directory, a new one each day.
    #[arg(
        long,
        value_name = "DIR",
        env = "UDPACK_LOG_DIR",
        hide_short_help = true
    )]
    pub(crate) log_dir: Option<PathBuf>,
}

impl LogArgs {
    /// For what other programs call: it says nothing.
    pub(crate) fn quiet() -> Self {
        Self {
            quiet: true,
            verbose: 0,
            log_dir: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressArg {
    Auto,
    Bar,
    Plain,
    None,
}

/// Options with the values of a library's enum.
macro_rules! value_enums {
    ($($arg:ident for $of:ident { $($(#[$attr:meta])* $value:ident),+ })+) => {$(
        #[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
        pub(crate) enum $arg {
            $($(#[$attr])* $value),+
        }

        impl From<$arg> for $of {
            fn from(arg: $arg) -> Self {
                match arg {
                    $($arg::$value => Self::$value),+
                }
            }
        }
    )+};
}

value_enums! {
    CcArg for CongestionControl { Auto, Cubic, Bbr, #[value(name = "newreno")] NewReno }
    DeltaArg for Delta { Auto, Always, Never }
    FsyncArg for SyncPolicy { Auto, Always, Never }
    IfExistsArg for IfExists { Same, Error, Skip, Overwrite, Rename }
    NamesArg for Names { Any, Portable }
    OverwriteArg for Overwrite { Never, Rename, Always }
    PriorityArg for Priority { Bulk, Normal, High }
    TransportArg for TransportChoice {
        /// QUIC over UDP; a WebSocket over TCP if UDP brings no answer within 250 ms.
        Auto,
        /// Only QUIC over UDP.
        Quic,
        /// Only a WebSocket over TCP.
        #[value(name = "wss")]
        WebSocket
    }
}

/// Parses a reason in the form that servers accept.
fn reason(text: &str) -> Result<String, String> {
    if text.len() > REASON {
        return Err(format!(
            "it has {} bytes, and {REASON} are the most",
            text.len()
        ));
    }
    match text.chars().all(udpack::text::is_printable) {
        true => Ok(text.to_owned()),
        false => Err("it holds a character that cannot be printed".to_owned()),
    }
}

/// The most bytes of a reason.
const REASON: usize = 256;

/// Parses a name at the server, which may consist of any bytes, into its text form.
fn name() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().map(|name| names::from_os(&name).into_owned())
}

/// Where a file that grows ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// At this many bytes.
    Size(u64),
    /// After this long without growth.
    Idle(Duration),
}

impl FromStr for Until {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_suffix('s') {
            Some(secs) => secs
                .parse::<Seconds>()
                .map(|secs| Self::Idle(secs.0))
                .map_err(|error| error.to_string()),
            None => parse_size(text)
                .map(Self::Size)
                .map_err(|error| format!("{error}, or seconds such as 30s")),
        }
    }
}

/// A number of bytes, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) Option<u64>);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.eq_ignore_ascii_case("none") {
            return Ok(Self(None));
        }
        let bytes = parse_size(text).map_err(|error| format!("{error}, or none"))?;
        Ok(Self(Some(bytes)))
    }
}

/// Bytes per second, up and down; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rates {
    pub(crate) up: Option<u64>,
    pub(crate) down: Option<u64>,
}

impl Rates {
    /// A new limiter for uploads.
    pub(crate) fn limit_up(&self) -> Limiter {
        self.up.map_or_else(Limiter::unlimited, Limiter::new)
    }

    /// A new limiter for downloads.
    pub(crate) fn limit_down(&self) -> Limiter {
        self.down.map_or_else(Limiter::unlimited, Limiter::new)
    }
}

impl FromStr for Rates {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rate = |text: &str| match text.parse()? {
            Size(Some(bytes)) if bytes < LEAST_RATE => {
                Err("expected at least 1K a second, or none".to_owned())
            }
            Size(rate) => Ok(rate),
        };
        let (up, down) = text.split_once(':').unwrap_or((text, text));
        Ok(Self {
            up: rate(up)?,
            down: rate(down)?,
        })
    }
}

/// At a lower rate nothing would arrive within the time that an answer may take.
const LEAST_RATE: u64 = 1024;

/// A length of time with its unit: `90s`, `15m`, `24h`, `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

impl FromStr for Span {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "expected a number and its unit: 90s, 15m, 24h or 7d";
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let unit = text.chars().last().ok_or(FORM)?;
        let each = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(FORM),
        };
        let number = text.strip_suffix(unit).ok_or(FORM)?;
        if !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(FORM);
        }
        let number: u64 = number.parse().map_err(|_| FORM)?;
        // A time a century ago still fits every clock.
        number
            .checked_mul(each)
            .filter(|secs| *secs <= 100 * 366 * 86_400)
            .map(|secs| Self(Duration::from_secs(secs)))
            .ok_or("longer than a century")
    }
}

/// A time in seconds, fractions allowed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Seconds(pub(crate) Duration);

impl FromStr for Seconds {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const DAY: f64 = 86_400.0;
        let secs: f64 = text.parse().map_err(|_| "expected a number of seconds")?;
        if !(0.01..=DAY).contains(&secs) {
            return Err("expected 0.01 to 86400 seconds");
        }
        Ok(Self(Duration::from_secs_f64(secs)))
    }
}

/// A server's place without anything about trust in it.
#[cfg(feature = "cluster")]
fn place(text: &str) -> Result<String, String> {
    let url: udpack::ConnectUrl = text.parse().map_err(|error| format!("{error}"))?;
    match text.contains("://") || url.host().contains('%') {
        true => Err("expected HOST:PORT and nothing else".to_owned()),
        false => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_lines_are_sound() {
        ServerArgs::command().debug_assert();
        ClientArgs::command().debug_assert();
    }

    #[test]
    fn every_flag_has_a_help_text() {
        fn check(command: &clap::Command) {
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {arg}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        check(&ServerArgs::command());
        check(&ClientArgs::command());
    }

    #[test]
    fn help_fits_the_width_and_names_own_options_before_those_of_the_connection() {
        fn check(command: &mut clap::Command, width: usize) {
            let wrapped =
                |help: clap::builder::StyledStr| crate::pages::wrapped(&help.to_string(), width);
            let short = wrapped(command.render_help());
            let long = wrapped(command.render_long_help());
            for line in short.lines().chain(long.lines()) {
                // What has no space to be cut at, such as a URL or a list of values.
                let longest = line.split(' ').map(|word| word.chars().count()).max();
                let cut = longest.is_none_or(|longest| longest + 40 < width);
                assert!(!cut || line.chars().count() <= width, "{width}: {line}");
            }
            for help in [&short, &long] {
                if let (Some(own), Some(to)) = (help.find("Options:"), help.find("Connection:")) {
                    assert!(own < to, "{help}");
                    assert!(help[to..].contains("--to"), "{help}");
                    assert!(!help[own..to].contains("--fingerprint"), "{help}");
                }
            }
            for sub in command.get_subcommands_mut() {
                check(sub, width);
            }
        }
        for width in [60, 80, 100] {
            for command in [ServerArgs::command(), ClientArgs::command()] {
                let mut command = command.term_width(width);
                command.build();
                check(&mut command, width);
            }
        }
        let put = |long: bool| {
            let mut command = ClientArgs::command();
            let put = command.find_subcommand_mut("put").expect("a command");
            let help = if long {
                put.render_long_help()
            } else {
                put.render_help()
            };
            help.to_string()
        };
        assert!(!put(false).contains("Exit codes:") && put(true).contains("Exit codes:"));
        assert!(put(true).contains("Examples:"));
    }

    #[test]
    fn each_option_stands_under_its_heading() {
        fn check(command: &clap::Command) {
            let name = command.get_name();
            let connects = command.get_arguments().any(|arg| arg.get_id() == "to");
            for arg in command.get_arguments() {
                let expected = match arg.get_id().as_str() {
                    "to" | "keys" | "token_file" | "fingerprint" | "transport" | "cc" | "proxy"
                    | "no_proxy" | "connect_timeout" | "qlog" | "via"
                        if connects =>
                    {
                        Some("Connection")
                    }
                    "progress" | "quiet" | "verbose" | "log_dir" => Some("Output"),
                    "json" => arg.get_help_heading(),
                    _ => None,
                };
                assert_eq!(arg.get_help_heading(), expected, "{name} {}", arg.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        check(&ServerArgs::command());
        check(&ClientArgs::command());
    }

    #[test]
    fn a_size_may_be_none() {
        assert_eq!("1.5G".parse(), Ok(Size(Some(3 << 29))));
        assert_eq!("none".parse(), Ok(Size(None)));
        for bad in ["", "G", "1.5", "no", "1e3"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_seconds() {
        assert_eq!("0.25".parse(), Ok(Seconds(Duration::from_millis(250))));
        for bad in ["", "x", "-1", "0", "inf", "NaN", "1e9"] {
            assert!(bad.parse::<Seconds>().is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_are_for_both_directions_or_for_each() {
        let rates = |up, down| Ok(Rates { up, down });
        assert_eq!("10M".parse(), rates(Some(10 << 20), Some(10 << 20)));
        assert_eq!("10M:none".parse(), rates(Some(10 << 20), None));
        assert_eq!("none:1K".parse(), rates(None, Some(1024)));
        assert_eq!("none".parse(), rates(None, None));
        for bad in ["", ":", "10", "0", "1M:", "1M:1M:1M", "fast"] {
            bad.parse::<Rates>().expect_err(bad);
        }
    }

    #[test]
    fn spans_have_a_unit() {
        for (text, secs) in [
            ("0", 0),
            ("0s", 0),
            ("90s", 90),
            ("15m", 900),
            ("24h", 86_400),
            ("7d", 604_800),
        ] {
            assert_eq!(text.parse(), Ok(Span(Duration::from_secs(secs))), "{text}");
        }
        for bad in [
            "",
            "s",
            "90",
            "1.5h",
            "-1s",
            "1w",
            "é",
            "99999999999999999999s",
            "40000d",
        ] {
            bad.parse::<Span>().expect_err(bad);
        }
    }
}
