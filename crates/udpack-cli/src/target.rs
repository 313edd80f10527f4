//! Which server to talk to, which key to expect there, and which token to present.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use udpack::{
    Client, ClientBuilder, CloseCode, ConnectError, ConnectUrl, DEFAULT_PORT, Fingerprint,
    FingerprintError, Proxy, Socket, Timeouts, TokenFile, TokenFileError, Transport, claimed_token,
};
use udpack_transfer::{Link, LinkEvent, Retry, TransferError};

use crate::args::{ConnectArgs, TransportArg, ViaArgs};
use crate::exit::{Explained, Failure, Kind};
use crate::remembered::Remembered;
use crate::signals::Interrupts;
use crate::via::Via;

/// A server, and what it takes to be let in.
#[derive(Debug)]
pub(crate) struct Target {
    url: ConnectUrl,
    /// The key to expect; `None` where an authority vouches for the server.
    pin: Option<Fingerprint>,
    client: Client,
    proxy: Option<Proxy>,
    builder: ClientBuilder,
    /// The paths to spread a transfer over, by name; none: one, as the routes say.
    paths: Vec<(String, Client)>,
    /// Where servers that need TCP are remembered.
    remembered: Remembered,
    /// The file that holds no key, where none was given.
    no_key: Option<PathBuf>,
    /// The file that holds no token, where none was given.
    no_token: Option<PathBuf>,
}

impl Target {
    /// Puts it together from flags, environment and files; the first that says something counts.
    ///
    /// Server: `--to`, `UDPACK_URL`, this machine. Key: `--fingerprint`, the URL, `pubkey.pem`, the system's
    /// authorities. Token: the URL, `--token-file`, `UDPACK_TOKEN`, the file `token` beside the key.
    pub(crate) fn find(args: &ConnectArgs) -> anyhow::Result<Self> {
        Self::with(args, |client| client)
    }

    /// As [`find`](Self::find); sockets come back by themselves when their connection is lost.
    pub(crate) fn find_reconnecting(args: &ConnectArgs, retry: Retry) -> anyhow::Result<Self> {
        Self::with(args, |client| client.reconnect(retry))
    }

    fn with(
        args: &ConnectArgs,
        set: impl FnOnce(ClientBuilder) -> ClientBuilder,
    ) -> anyhow::Result<Self> {
        let url = server(args)?;
        let pin = match args.fingerprint.or_else(|| url.pin()) {
            Some(pin) => Some(pin),
            None => public_key(&args.keys)?,
        };
        let token = match url.token() {
            Some(token) => Some(token.to_owned()),
            None => token(args)?,
        };
        let looked_at = |name| {
            let path = args.keys.join(name);
            Some(std::path::absolute(&path).unwrap_or(path))
        };
        let no_key = if pin.is_none() {
            looked_at("pubkey.pem")
        } else {
            None
        };
        let no_token = if token.is_none() {
            looked_at("token")
        } else {
            None
        };
        let timeouts = Timeouts {
            handshake: args.connect_timeout.0,
            // A server whose disk is busy stops reading for a while; that is no reason to give up.
            slow_peer: Duration::from_secs(60),
            ..Timeouts::default()
        };
        let mut client = Client::builder()
            .token(claimed_token(&token.unwrap_or_default()))
            .agent(concat!("udpack-client/", env!("CARGO_PKG_VERSION")))
            .timeouts(timeouts)
            .congestion(args.cc.into())
            .transport(args.transport.unwrap_or(TransportArg::Auto).into());
        if let Some(pin) = pin {
            client = client.pin(pin);
        }
        let proxy = proxy(args)?;
        if let Some(proxy) = &proxy {
            client = client.proxy(proxy.clone());
        }
        if let Some(dir) = &args.qlog {
            client = client.qlog(qlog_dir(dir)?);
        }
        let builder = set(client);
        let client = builder.clone().build()?;
        let remembered = match args.transport {
            None => Remembered::of_user(),
            Some(_) => Remembered::nothing(),
        };
        let server = address(&url);
        if remembered.has(&server) {
            client.expect_tcp(&server);
        }
        Ok(Self {
            url,
            pin,
            client,
            proxy,
            builder,
            paths: Vec::new(),
            remembered,
            no_key,
            no_token,
        })
    }

    /// The same server, for a transfer over several paths.
    pub(crate) fn via(mut self, args: &ViaArgs) -> anyhow::Result<Self> {
        let server = self.address();
        let paths = args.via.as_ref().map(Via::paths).transpose()?;
        for path in paths.unwrap_or_default() {
            let client = path.set(self.builder.clone()).build()?;
            if self.remembered.has(&server) {
                client.expect_tcp(&server);
            }
            self.paths.push((path.name(), client));
        }
        Ok(self)
    }

    /// A link that connects again when the connection is lost.
    fn link(&self, retry: Retry) -> Link {
        let address = self.address();
        let link = |client: &Client| Link::new(client.clone(), &*address).retry(retry);
        let paths = self.paths.iter();
        let paths = paths.map(|(name, client)| (name.clone(), link(client)));
        Link::of_paths(paths).unwrap_or_else(|| link(&self.client))
    }

    /// A server that lets us in without a token, or whose key an authority vouches for, is fine; one that does not is
    /// told together with what was looked for in vain.
    fn explained(&self, error: anyhow::Error) -> anyhow::Error {
        let reason = error.chain().find_map(|error| {
            if let Some(TransferError::Connect(error)) = error.downcast_ref() {
                return Some(&**error);
            }
            error.downcast_ref::<ConnectError>()
        });
        let text = match (reason, &self.no_key, &self.no_token) {
            (Some(ConnectError::Untrusted { .. }), Some(path), _) => format!(
                "the server's key is not known: neither UDPACK_URL nor --fingerprint gives it, there is no {}, and \
                 no authority that this system trusts vouches for it",
                path.display()
            ),
            (Some(ConnectError::Denied(_)), _, Some(path))
                if Explained::of(&error).kind == Kind::Auth =>
            {
                format!(
                    "the server wants a token: neither UDPACK_URL, UDPACK_TOKEN nor --token-file gives one, and there \
                     is no {}",
                    path.display()
                )
            }
            _ => return error,
        };
        Failure::new(Kind::Auth, text)
            .hint("set UDPACK_URL to what `udpack-server url` prints at the server")
            .into()
    }

    /// `HOST:PORT`, for showing.
    pub(crate) fn address(&self) -> String {
        address(&self.url)
    }

    pub(crate) fn url(&self) -> &ConnectUrl {
        &self.url
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The proxy that the way over TCP leads through.
    pub(crate) fn proxy(&self) -> Option<&Proxy> {
        let proxy = self.proxy.as_ref();
        proxy.filter(|proxy| proxy.is_for(self.url.host()))
    }

    /// Whether anything gave a key to expect.
    pub(crate) fn has_key(&self) -> bool {
        self.no_key.is_none()
    }

    /// Whether anything gave a token to present.
    pub(crate) fn has_token(&self) -> bool {
        self.no_token.is_none()
    }

    /// The same server with another token, for somebody else.
    pub(crate) fn url_with(&self, token: &str) -> anyhow::Result<String> {
        let url = ConnectUrl::new(self.url.host(), self.url.port())?.with_token(token)?;
        let url = match self.pin {
            Some(pin) => url.with_pin(pin),
            None => url,
        };
        Ok(url.to_string())
    }

    /// As [`run`](Self::run), with a link that connects again when the connection is lost.
    pub(crate) async fn run_link<T>(
        &self,
        retry: Retry,
        interrupts: &mut Interrupts,
        work: impl AsyncFnOnce(Link) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let address = self.address();
        let link = self.link(retry);
        let first = tokio::select! {
            socket = link.eager() => socket.map_err(|error| self.explained(error.into()))?,
            () = interrupts.first() => return Err(Failure::interrupted().into()),
        };
        self.remember(&first);
        // The work begins behind the hello; whether the server lets us in shows meanwhile.
        let refused = async {
            // The work may have ended, and the socket with it, before this is looked at again.
            let connected = match first.admitted().await {
                Ok(()) => Ok(first),
                Err(_) => link.socket().await,
            };
            match connected {
                Ok(socket) => {
                    let session = socket.id();
                    tracing::info!(server = address, %session, "connected");
                    std::future::pending().await
                }
                Err(error) => error,
            }
        };
        let result = tokio::select! {
            biased;
            error = refused => return Err(self.explained(error.into())),
            result = work(link.clone()) => result.map_err(|error| self.explained(error)),
            () = interrupts.first() => {
                let end = link.end(CloseCode::CANCELLED, "interrupted");
                let _ = tokio::time::timeout(PARTING, end).await;
                return Err(Failure::interrupted().into());
            }
        };
        // Whatever was asked has its answer: a graceful close would only add round trips.
        if let Some(socket) = link.live() {
            self.remember(&socket);
        }
        let _ = tokio::time::timeout(PARTING, link.leave()).await;
        result
    }

    /// As [`run_link`](Self::run_link), for work that does not tell by itself why it waits.
    pub(crate) async fn run_link_aloud<T>(
        &self,
        retry: Retry,
        interrupts: &mut Interrupts,
        work: impl AsyncFnOnce(Link) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        self.run_link(retry, interrupts, async |link| {
            let mut events = link.events();
            let told = async {
                while let Some(event) = events.next().await {
                    if let LinkEvent::Reconnecting { delay, reason, .. } = event {
                        let secs = delay.as_secs_f64();
                        tracing::warn!("trying again in {secs:.1} s: {reason}");
                    }
                }
                std::future::pending().await
            };
            tokio::select! {
                result = work(link.clone()) => result,
                () = told => Err(Failure::interrupted().into()),
            }
        })
        .await
    }

    /// Connects, does `work`, and leaves: what `work` has sent must have arrived by its end. `work` begins behind the hello; whether the
    /// server lets us in shows meanwhile. An interrupt ends the socket at once, and what `work` had begun is dropped.
    pub(crate) async fn run<T>(
        &self,
        interrupts: &mut Interrupts,
        work: impl AsyncFnOnce(Socket) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let address = self.address();
        let socket = tokio::select! {
            socket = self.client.connect_eager(&address) => {
                socket.map_err(|error| self.explained(error.into()))?
            }
            () = interrupts.first() => return Err(Failure::interrupted().into()),
        };
        self.remember(&socket);
        let refused = async {
            match socket.admitted().await {
                Ok(()) => {
                    tracing::info!(server = address, session = %socket.id(), "connected");
                    std::future::pending().await
                }
                Err(reason) => ConnectError::Denied(reason),
            }
        };
        let result = tokio::select! {
            biased;
            error = refused => return Err(self.explained(error.into())),
            result = work(socket.clone()) => result,
            () = interrupts.first() => {
                socket.abort(CloseCode::CANCELLED, "interrupted");
                let _ = tokio::time::timeout(PARTING, socket.closed()).await;
                return Err(Failure::interrupted().into());
            }
        };
        // An answer may arrive before `$welcome`. A refusal is the reason for whatever error `work` ended with.
        if let Err(reason) = socket.admitted().await {
            return Err(self.explained(ConnectError::Denied(reason).into()));
        }
        self.remember(&socket);
        socket.abort(CloseCode::NORMAL, "done");
        let _ = tokio::time::timeout(PARTING, socket.closed()).await;
        result
    }

    /// Remembers over what the server was reached, for the next run.
    fn remember(&self, socket: &Socket) {
        let over_tcp = matches!(socket.transport(), Transport::WebSocket { .. });
        self.remembered.note(&self.address(), over_tcp);
    }
}

/// Makes the directory for qlog files, so that a wrong one is told now and not with each connection.
pub(crate) fn qlog_dir(dir: &Path) -> anyhow::Result<&Path> {
    match std::fs::create_dir_all(dir) {
        Ok(()) => Ok(dir),
        Err(error) => {
            let text = format!("cannot make the directory {}: {error}", dir.display());
            Err(Failure::new(Kind::LocalFile, text)
                .hint("choose another directory with --qlog")
                .into())
        }
    }
}

/// How to come back after a lost connection: so often, or for 5 minutes without anything moving.
pub(crate) fn retry(attempts: Option<u32>) -> Retry {
    let retry = Retry::default();
    Retry {
        patience: match attempts {
            Some(_) => DAY,
            None => retry.patience,
        },
        attempts,
        ..retry
    }
}

fn server(args: &ConnectArgs) -> anyhow::Result<ConnectUrl> {
    if let Some(to) = &args.to {
        let url: ConnectUrl = to.parse().map_err(|error| unfit("--to", &error))?;
        if url.token().is_some() && !args.named {
            tracing::warn!(
                "the token in --to shows in the list of processes: UDPACK_URL keeps it out"
            );
        }
        return Ok(url);
    }
    match env::var("UDPACK_URL") {
        Ok(url) if !url.is_empty() => {
            Ok(url.parse().map_err(|error| unfit("UDPACK_URL", &error))?)
        }
        Err(env::VarError::NotUnicode(_)) => {
            Err(Failure::new(Kind::Usage, "UDPACK_URL is not UTF-8 text").into())
        }
        _ => Ok(ConnectUrl::new("127.0.0.1", DEFAULT_PORT)?),
    }
}

/// The text may hold a token: only the reason is shown.
fn unfit(what: &str, error: &udpack::ConnectUrlError) -> Failure {
    Failure::new(Kind::Usage, format!("{what} is not a server: {error}"))
        .hint("use HOST[:PORT], or what `udpack-server url` prints at the server: udpack://TOKEN@HOST:PORT#sha256:HEX")
}

/// The proxy that is asked for, or that the environment names.
fn proxy(args: &ConnectArgs) -> anyhow::Result<Option<Proxy>> {
    if args.no_proxy {
        return Ok(None);
    }
    if let Some(proxy) = &args.proxy {
        // The text may hold a password: only the reason is shown.
        let proxy = proxy
            .parse::<Proxy>()
            .map_err(|error| Failure::new(Kind::Usage, format!("--proxy is no proxy: {error}")))?;
        return Ok(Some(proxy.except_env()));
    }
    match Proxy::from_env() {
        Some((name, Err(error))) => {
            // It is for other programs, too, and this one mostly needs none.
            tracing::warn!("{name} is not used: {error}");
            Ok(None)
        }
        Some((_, Ok(proxy))) => Ok(Some(proxy)),
        None => Ok(None),
    }
}

fn public_key(keys: &Path) -> anyhow::Result<Option<Fingerprint>> {
    match Fingerprint::from_public_key_file(keys.join("pubkey.pem")) {
        Ok(pin) => Ok(Some(pin)),
        Err(FingerprintError::Read { source, .. }) if is_absent(&source) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// None where nothing gives one.
fn token(args: &ConnectArgs) -> anyhow::Result<Option<String>> {
    let (path, asked) = match &args.token_file {
        Some(path) => (path.clone(), true),
        None => {
            if let Some(token) = env::var("UDPACK_TOKEN")
                .ok()
                .filter(|token| !token.is_empty())
            {
                return Ok(Some(token.trim().to_owned()));
            }
            (args.keys.join("token"), false)
        }
    };
    match TokenFile::open(&path) {
        Ok(file) => file.first_token().map(Some).ok_or_else(|| {
            Failure::new(
                Kind::LocalFile,
                format!("no token in plain in {}", path.display()),
            )
            .hint("ask the server's owner for the token; a digest cannot let a client in")
            .into()
        }),
        Err(TokenFileError::File(error)) if !asked && error.is_missing() => {
            tracing::debug!("no token found");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

/// `HOST:PORT`, an IPv6 address in brackets.
pub(crate) fn address(url: &ConnectUrl) -> String {
    if url.host().contains(':') {
        format!("[{}]:{}", url.host(), url.port())
    } else {
        format!("{}:{}", url.host(), url.port())
    }
}

/// A bound where the number of attempts is the one that counts.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long to wait for the server to hear that we leave.
const PARTING: Duration = Duration::from_secs(2);
