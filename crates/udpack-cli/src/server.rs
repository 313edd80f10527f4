//! `udpack-server`: one store, one token file, one port.

mod hook;
mod metrics;
mod place;
mod systemd;
mod tokens;
mod uploads;
mod url;
#[cfg(feature = "web")]
mod web;

use std::collections::BTreeSet;
use std::io::{self, IsTerminal as _};
use std::net::SocketAddr;
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use listenfd::ListenFd;
use serde_json::json;
use tokio::time::MissedTickBehavior;
use udpack::{
    Authenticate as _, BindError, CloseCode, ClusterView, Drain, Identity, Limits, Server,
    ServerBuilder, TokenFile, Web, Whom,
};
use udpack_transfer::{Control, ReceiverConfig, Scope};
use udpack_web::{HttpListener, Site};

use crate::args::{ServerArgs, ServerCommand};
use crate::exit::{Failure, Kind};
use crate::hub::Hub;
use crate::logging::{self, Console, Role};
use crate::output;
use crate::pages;
#[cfg(feature = "web")]
use crate::qr;
use crate::server::place::Place;
use crate::signals::Interrupts;
use crate::target::qlog_dir;

pub(crate) async fn run(args: ServerArgs, given: ListenFd, console: Console) -> anyhow::Result<()> {
    match args.command {
        Some(ServerCommand::Completions { shell }) => {
            return pages::completions::<ServerArgs>(shell);
        }
        Some(ServerCommand::Man(args)) => return pages::man::<ServerArgs>(args.dir.as_deref()),
        Some(ServerCommand::Token(command)) => return tokens::run(&command),
        Some(ServerCommand::Uploads(command)) => return uploads::run(&command, &console),
        Some(ServerCommand::Url(args)) => return url::run(&args),
        None => {}
    }
    let _log = logging::start(Role::Server, &args.log, &console)?;
    let result = serve(&args, given).await;
    logging::keep(&result);
    result
}

async fn serve(args: &ServerArgs, given: ListenFd) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::catch_with_hangup()?;

    // All arguments are checked before anything is created, the keys last.
    let socket = socket(args, given).await?;
    let hook = args.hook.as_deref().map(hook).transpose()?;
    let scrapes = match &args.metrics {
        Some(address) => Some(scrapes_at(address).await?),
        None => None,
    };
    #[cfg(feature = "web")]
    let web = web::bind(args, socket.local_addr()?).await?;
    #[cfg(feature = "web")]
    let taken = web.as_ref().map(|port| port.listener.local_addr());
    #[cfg(not(feature = "web"))]
    let taken = None;
    let tcp = tcp(args, socket.local_addr()?, taken).await;
    let qlog = args.qlog.as_ref().map(|dir| qlog_dir(dir)).transpose()?;
    let place = Place::open(args).await?;
    let mut receiver = place
        .receiver(receiving(args))
        .limit(args.bwlimit.limit_up(), args.bwlimit.limit_down());
    if let Some(hook) = hook {
        receiver = receiver.hook(hook::Program::new(&hook, args.hook_timeout.0));
    }
    let identity = Identity::load_or_create(&args.keys)?;
    let (tokens, first_start) = token_file(args)?;
    #[cfg(feature = "web")]
    let link = web.as_ref().map(|port| port.link(args));
    #[cfg(not(feature = "web"))]
    let link = None;
    let receiver = receiver.sharing(tokens.clone(), link.clone());
    let hub = Hub::new();
    let control = Control::new(&receiver);
    let server = Server::builder()
        .identity(identity)
        .auth(tokens.clone())
        .agent(concat!("udpack-server/", env!("CARGO_PKG_VERSION")))
        .limits(limits(args, args.bwlimit.up))
        .congestion(args.cc.into());
    let server = match qlog {
        Some(dir) => server.qlog(dir),
        None => server,
    };
    #[cfg(feature = "web")]
    let server = match &web {
        Some(port) => server.web(port.web.clone()),
        None => server,
    };
    #[cfg(feature = "cluster")]
    let server = join(args, server).await?;
    let server = control.attach(hub.attach(receiver.attach(server)));
    let server = server.bind_to(socket).await?;

    let mut places = Vec::new();
    if let Some(scrapes) = &scrapes {
        places.push(("metrics", scrapes.local_addr().to_string()));
    }
    announce(args, &place, &server, &tokens, first_start, places, link)?;
    let watcher = systemd::Watcher::from_env();
    watcher.tell("READY=1");
    let stop = async {
        tokio::select! {
            () = interrupts.first() => {}
            () = control.drain_asked() => {}
            () = place.sweep() => {}
        }
        watcher.tell("STOPPING=1");
        tracing::info!(within = ?DRAIN, "shutting down; a second signal ends it at once");
        hub.close();
        control.shutting_down();
        receiver.shutting_down();
    };
    let counters = || {
        let (server, receiver, place) = (server.clone(), receiver.clone(), place.clone());
        Site::counters(move || metrics::text(&server, &receiver, &place))
    };
    let scraped = scrapes.map(|listener| (listener, counters()));
    #[cfg(feature = "web")]
    let browsed = web::serve(web, counters(), &server, !args.no_tcp);
    #[cfg(not(feature = "web"))]
    let browsed = std::future::pending::<anyhow::Result<()>>();
    let carried = tcp.map(|listener| (listener, Site::of(server.clone(), Web::new())));
    tokio::select! {
        ended = server.run_until(stop, Drain::within(DRAIN)) => ended?,
        failed = http(scraped) => failed?,
        failed = browsed => failed?,
        failed = http(carried) => failed?,
        () = withdraw(&server, &tokens) => {}
        () = control.run(&server) => {}
        // Also while the server drains.
        () = place.push() => {}
        () = watcher.live() => {}
    }
    tracing::info!("stopped");
    Ok(())
}

/// The UDP socket that the service manager passed, or a new one.
async fn socket(args: &ServerArgs, given: ListenFd) -> anyhow::Result<UdpSocket> {
    match systemd::inherited(given)? {
        Some(socket) => {
            tracing::info!("listening on the socket that was passed; --listen is not used");
            Ok(socket)
        }
        None => Ok(listen(&args.listen).await?),
    }
}

/// Finds the program of `--hook`.
fn hook(program: &Path) -> anyhow::Result<PathBuf> {
    hook::find(program).map_err(|error| {
        let text = format!("cannot run the hook {}: {error}", program.display());
        Failure::new(Kind::LocalFile, text)
            .hint("name an executable file with --hook")
            .into()
    })
}

/// The tokens, and whether their file was created now.
fn token_file(args: &ServerArgs) -> anyhow::Result<(TokenFile, bool)> {
    if let Some(path) = &args.token_file {
        return Ok((TokenFile::open(path)?, false));
    }
    let path = args.keys.join("token");
    let first_start = !path.exists();
    Ok((TokenFile::load_or_create(path)?, first_start))
}

/// Makes the server a node of the cluster that `--cluster` names.
#[cfg(feature = "cluster")]
async fn join(args: &ServerArgs, server: ServerBuilder) -> anyhow::Result<ServerBuilder> {
    let Some(url) = &args.cluster else {
        return Ok(server);
    };
    let nats = udpack_nats::Nats::connect(url).await.map_err(|error| {
        let kind = match error {
            udpack_nats::NatsError::Connect(_) => Kind::Network,
            _ => Kind::Usage,
        };
        let mut text = error.to_string();
        // The broker's client says in each error what its source says.
        if let Some(source) = std::error::Error::source(&error) {
            text.push_str(&format!(": {source}"));
        }
        Failure::new(kind, text).hint(
            "check that the broker of --cluster runs there, and that address and password are right",
        )
    })?;
    let name = args.cluster_name.clone();
    let name = name.unwrap_or_else(|| {
        rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned()
    });
    let address = args.advertise.clone().unwrap_or_default();
    Ok(server.cluster(nats).advertise(name, address))
}

/// Binds the UDP port.
async fn listen(address: &str) -> Result<UdpSocket, BindError> {
    // The resolver knows a zone only without brackets and port.
    let zoned = address.strip_prefix('[').filter(|rest| rest.contains('%'));
    let parts = zoned.and_then(|rest| rest.split_once("]:"));
    match parts.and_then(|(host, port)| Some((host, port.parse().ok()?))) {
        Some((host, port)) => {
            let found = udpack::lookup(host, port).await;
            let found = found.map_err(BindError::Address)?;
            Server::listen(&*found).await
        }
        None => Server::listen(address).await,
    }
}

/// Serves by HTTP for ever.
async fn http(served: Option<(HttpListener, Site)>) -> anyhow::Result<()> {
    let Some((listener, site)) = served else {
        return std::future::pending().await;
    };
    Ok(listener.serve(site).await?)
}

/// The TCP port for clients whose network lets no UDP pass: the one with the number of the UDP port, unless pages are served there
/// already, and then WebSockets beside them. Without it the server serves all others.
async fn tcp(
    args: &ServerArgs,
    udp: SocketAddr,
    pages: Option<SocketAddr>,
) -> Option<HttpListener> {
    if args.no_tcp || pages.is_some_and(|pages| pages.port() == udp.port()) {
        return None;
    }
    match HttpListener::bind(udp).await {
        Ok(listener) => Some(listener),
        Err(error) => {
            tracing::warn!(
                "not listening on TCP, so only clients that reach {udp} over UDP can connect: {error}; --no-tcp keeps this quiet"
            );
            None
        }
    }
}

async fn scrapes_at(address: &str) -> anyhow::Result<HttpListener> {
    HttpListener::bind(address).await.map_err(|error| {
        let text = format!("cannot serve metrics at {address}: {error}");
        Failure::new(Kind::Other, text)
            .hint("choose another address with --metrics, such as 127.0.0.1:9645")
            .into()
    })
}

/// The rights of tokens without a scope.
fn receiving(args: &ServerArgs) -> ReceiverConfig {
    ReceiverConfig {
        default_scope: Scope {
            read: args.allow_read || args.read_only,
            write: !args.read_only,
            ..Scope::default()
        },
        read_only: args.read_only,
        ..ReceiverConfig::default()
    }
}

/// Disconnects clients with revoked tokens soon after the file has changed, at the other nodes of a cluster as well. Runs for ever. Each
/// socket looks for itself, too, but less often: it would have to wake for it.
async fn withdraw(server: &Server, tokens: &TokenFile) {
    let state = || {
        let found = std::fs::metadata(tokens.path()).ok()?;
        Some((found.modified().ok()?, found.len(), found.ino()))
    };
    let mut ticks = tokio::time::interval(FOLLOW);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = state();
    let ids = || {
        let entries = tokens.entries().into_iter();
        let ids = entries.map(|entry| entry.id().to_owned());
        ids.collect::<BTreeSet<_>>()
    };
    let mut known = ids();
    // Once more after a change: whoever was being let in meanwhile is among the sockets by then.
    let mut again = false;
    loop {
        ticks.tick().await;
        let now = state();
        let changed = now != seen;
        if changed || again {
            seen = now;
            server.revoke(|peer| !tokens.is_valid(peer));
            if let Some(cluster) = server.cluster() {
                let now = ids();
                for id in known.difference(&now) {
                    withdraw_elsewhere(&cluster, id).await;
                }
                known = now;
            }
        }
        again = changed;
    }
}

/// Closes the sockets of a revoked token at the other nodes. They ask their own files whether it may come back.
async fn withdraw_elsewhere(cluster: &ClusterView, id: &str) {
    let (code, text) = (CloseCode::AUTH_REVOKED, "the token was withdrawn");
    let closed = cluster.close(Whom::Peer(id), code, text, ELSEWHERE).await;
    if !closed.missing.is_empty() {
        let silent = cluster.names(&closed.missing).join(", ");
        tracing::warn!(
            token = id,
            silent,
            "these nodes did not say that they closed its connections"
        );
    }
}

/// What arrives within a few seconds at this rate is all that may be under way: whoever fills a larger window
/// first and is read slowly then takes the pause for a dead peer.
fn limits(args: &ServerArgs, rate: Option<u64>) -> Limits {
    let limits = Limits {
        sockets_per_address: args.sockets_per_address as usize,
        auth_failures: args.wrong_tokens,
        ..Limits::default()
    };
    let Some(rate) = rate else {
        return limits;
    };
    let seconds = u32::try_from(rate.saturating_mul(4)).unwrap_or(u32::MAX);
    Limits {
        stream_window: seconds.clamp(LEAST_WINDOW, limits.stream_window),
        ..limits
    }
}

/// Tells where the server is and how to reach it, on standard output: a label and a value a line, and last a line that
/// can be pasted where the file is. The token stands in it on a terminal at the first start; else the command that shows it.
fn announce(
    args: &ServerArgs,
    place: &Place,
    server: &Server,
    tokens: &TokenFile,
    first_start: bool,
    places: Vec<(&'static str, String)>,
    link: Option<String>,
) -> anyhow::Result<()> {
    let fingerprint = server.fingerprint();
    let url = url::of(
        server.local_addr(),
        args.public_host.as_deref(),
        fingerprint,
    )?;
    url::leave(&url, &args.keys);
    let shown = first_start && !args.json && !args.log.quiet && io::stdout().is_terminal();
    let send = match tokens.first_token().filter(|_| shown) {
        Some(token) => format!(
            "UDPACK_URL='{}' udpack-client put FILE",
            url.with_token(token)?
        ),
        None => {
            let command = url::command(&args.keys, args.token_file.as_deref());
            format!("UDPACK_URL=\"$({command})\" udpack-client put FILE")
        }
    };
    let mut lines = vec![
        ("listening", server.local_addr().to_string()),
        ("fingerprint", fingerprint.to_string()),
        ("uploads", place.to_string()),
    ];
    if let Some(url) = place.pushed_to() {
        lines.push(("push", url.to_owned()));
    }
    lines.extend(places);
    #[cfg(feature = "web")]
    web::leave(link.as_deref(), &args.keys);
    #[cfg(feature = "web")]
    let mut pictured = None;
    if let Some(link) = link {
        #[cfg(feature = "web")]
        let link = match tokens.first_token().filter(|_| shown) {
            Some(token) => {
                let link = web::with_token(&link, &token);
                pictured.insert(link).clone()
            }
            None => link,
        };
        lines.push(("web", link));
    }
    let print = || -> io::Result<()> {
        for (label, value) in &lines {
            if args.json {
                output::json(&json!({ *label: value }))?;
            } else {
                output::line(&format!("{label} {value}"))?;
            }
        }
        #[cfg(feature = "web")]
        if let Some(link) = &pictured {
            qr::show(link)?;
        }
        if args.json {
            output::json(&json!({ "send": send }))
        } else {
            output::line(&send)
        }
    };
    // The lines are a service; a server without anybody to read them still serves.
    if let Err(error) = print() {
        tracing::warn!(%error, "cannot write to standard output");
    }
    Ok(())
}

/// How often it is looked whether the token file has changed.
const FOLLOW: Duration = Duration::from_secs(1);
/// How long the other nodes of a cluster have to say that they closed a revoked token's sockets.
const ELSEWHERE: Duration = Duration::from_secs(2);
const LEAST_WINDOW: u32 = 64 << 10;
/// How long running uploads may go on after the first signal.
const DRAIN: Duration = Duration::from_secs(10);
