//! [`Receiver`]: the server's half of a transfer. Bounds its lanes and ties them to a store.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use udpack::{Channel, CloseCode, Peer, Pool, RecvError, ServerBuilder, TokenFile};

use crate::local::limiter::Limiter;
use crate::server::hook::Hook;
use crate::server::jobs::{Jobs, Transfer, TransferWatch};
use crate::server::places::{Places, cores};
use crate::server::queries::Queries;
use crate::server::scope::Scope;
use crate::server::serving::Serving;
use crate::server::sharing::Sharing;
use crate::server::upload::Uploads;
use crate::server::writers::Writers;
use crate::staging::target::Target;
use crate::store::{Sink, Store};
use crate::wire::stats::PushStats;
use crate::wire::{CHANNEL, JOBS_CHANNEL};

/// Bounds of a [`Receiver`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiverConfig {
    /// A file that is open and gets no chunk for this long ends with `upload_stalled`. Defaults to 60 s.
    pub stall: Duration,
    /// The most lanes of one socket. Defaults to 16; further ones are closed with `refused`.
    pub lanes_per_socket: usize,
    /// The most files being received at once, all sockets together. Defaults to 256, of which a quarter is reserved
    /// for tokens that have few; all shared resources here are divided in this way, see [`udpack::Shares::of`]. A
    /// further `file` waits for its turn, and its lane waits, too.
    pub open_files: usize,
    /// How long such a file waits before it is refused with `too_many_uploads`, or a download with
    /// `too_many_requests`. Defaults to 10 s.
    pub turn: Duration,
    /// A client that sends a resumable file and is silent for this long may be replaced by another client of the same
    /// token. Defaults to 5 s.
    pub takeover: Duration,
    /// The most files of one lane that are being verified while the next ones arrive. Defaults to 512.
    pub pipeline: usize,
    /// The most requests of one lane that are answered at once. Defaults to 32.
    pub requests: usize,
    /// The most requests that are answered at once, all sockets together, except hashes; one token gets half of the
    /// processors, at least 1. Defaults to twice the processors, at least 4.
    pub requests_in_all: usize,
    /// The most existing files that are hashed at once: this many for requests, and as many for uploads; one token
    /// gets half of the processors of each, at least 1. Defaults to the processors, at least 4.
    pub hashes: usize,
    /// The most files that are sent at once, all sockets together; each has a thread. Defaults to 128.
    pub downloads: usize,
    /// The most concurrent calls of the [`Hook`] for uploads. Defaults to 16.
    pub hooks: usize,
    /// The rights of a client whose token has none of the fields for rights. Defaults to uploading only.
    pub default_scope: Scope,
    /// Whether uploads and removals are refused, whatever the tokens permit. Defaults to no.
    pub read_only: bool,
}

impl Default for ReceiverConfig {
    fn default() -> Self {
        Self {
            stall: Duration::from_secs(60),
            lanes_per_socket: 16,
            open_files: 256,
            turn: Duration::from_secs(10),
            takeover: Duration::from_secs(5),
            pipeline: 512,
            requests: 32,
            requests_in_all: 2 * cores(2),
            hashes: cores(4),
            downloads: 128,
            hooks: 16,
            default_scope: Scope::default(),
            read_only: false,
        }
    }
}

/// Serves the files of a [`Store`], or of any other [`Sink`]: receives uploads, sends downloads, answers requests. A
/// handle: clones share the store and the bounds.
#[derive(Clone)]
pub struct Receiver {
    pub(crate) uploads: Uploads,
    pub(crate) config: Arc<ReceiverConfig>,
    pub(crate) places: Places,
    pub(crate) queries: Queries,
    pub(crate) jobs: Jobs,
    pub(crate) hook: Option<Arc<dyn Hook>>,
    pub(crate) limit_in: Limiter,
    pub(crate) limit_out: Limiter,
    pub(crate) pushed: Option<Pushed>,
}

/// Says how far a push is.
type Pushed = Arc<dyn Fn() -> PushStats + Send + Sync>;

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver")
            .field("store", &self.store())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Receiver {
    /// A receiver over this store.
    pub fn new(store: Store, config: ReceiverConfig) -> Self {
        Self::over(Target::Disk(store), config)
    }

    /// A receiver whose files go into this sink. Operations that the sink does not support are refused with
    /// `unsupported`.
    pub fn into_sink(sink: impl Sink, config: ReceiverConfig) -> Self {
        Self::over(Target::new(sink), config)
    }

    fn over(target: Target, config: ReceiverConfig) -> Self {
        let places = Places::new(&config);
        Self {
            queries: Queries {
                target: target.clone(),
                places: places.clone(),
                hook: None,
                sharing: None,
            },
            uploads: Uploads::new(target, Writers::new(config.takeover)),
            config: Arc::new(config),
            places,
            jobs: Jobs::default(),
            hook: None,
            limit_in: Limiter::unlimited(),
            limit_out: Limiter::unlimited(),
            pushed: None,
        }
    }

    /// Shows watchers, in [`ServerStats::push`](crate::ServerStats::push), what is copied elsewhere behind the store. Called
    /// whenever the server is looked at; must not block.
    #[must_use]
    pub fn pushed(mut self, status: impl Fn() -> PushStats + Send + Sync + 'static) -> Self {
        self.pushed = Some(Arc::new(status));
        self
    }

    /// Asks this hook about every upload.
    #[must_use]
    pub fn hook(mut self, hook: impl Hook) -> Self {
        let hook = Arc::new(hook);
        self.uploads = self.uploads.hook(hook.clone());
        self.queries.hook = Some(hook.clone());
        self.hook = Some(hook);
        self
    }

    /// Lets clients with the right `share` make tokens for others. The tokens are stored in this file, which must be
    /// the server's verifier. `web` is the address of the pages for browsers, such as `https://files.example.org/`,
    /// for links to them.
    #[must_use]
    pub fn sharing(mut self, tokens: TokenFile, web: Option<String>) -> Self {
        self.queries.sharing = Some(Sharing::new(tokens, web));
        self
    }

    /// Limits the rates of received and of sent file bytes, all lanes of all sockets together.
    #[must_use]
    pub fn limit(mut self, received: Limiter, sent: Limiter) -> Self {
        self.limit_in = received;
        self.limit_out = sent;
        self
    }

    /// Registers this receiver for the channels named [`CHANNEL`] and [`JOBS_CHANNEL`].
    pub fn attach(&self, server: ServerBuilder) -> ServerBuilder {
        let (lanes, jobs) = (self.clone(), self.clone());
        server
            .channel(CHANNEL, move |channel: Channel| {
                let receiver = lanes.clone();
                async move { receiver.serve(channel).await }
            })
            .channel(JOBS_CHANNEL, move |channel: Channel| {
                let receiver = jobs.clone();
                async move {
                    let default = &receiver.config.default_scope;
                    receiver.jobs.watch(channel, default).await
                }
            })
    }

    /// To be called when the server begins to shut down: the channels of watchers are closed once no transfer is
    /// left, so that they do not delay the end.
    pub fn shutting_down(&self) {
        self.jobs.close();
    }

    /// The running transfers with their progress, without those that wait for their turn.
    pub fn transfers(&self) -> Vec<Transfer> {
        self.jobs.transfers()
    }

    /// Returns a watcher that reports [`transfers`](Self::transfers) when they change. Must be called within a tokio
    /// runtime.
    pub fn watch(&self) -> TransferWatch {
        self.jobs.told()
    }

    /// Cancels a transfer: its client receives `cancelled` with this reason, and the data of an upload is removed. An
    /// upload that is being verified runs to its end. Returns `false` if no transfer has this id.
    pub fn cancel(&self, id: u64, reason: Option<&str>) -> bool {
        self.jobs.cancel(id, reason)
    }

    /// The pools of shared resources, each with a short name for counters.
    pub fn pools(&self) -> impl Iterator<Item = (&'static str, &Pool)> {
        self.places.all().into_iter()
    }

    /// The store of the files; `None` for another [`Sink`].
    pub fn store(&self) -> Option<&Store> {
        self.target().store()
    }

    pub(crate) fn target(&self) -> &Target {
        self.uploads.target()
    }

    /// Serves one lane until the client finishes it.
    ///
    /// # Errors
    /// As [`Channel::recv`]. Failures of single files are sent to the client and are no error here.
    ///
    /// # Cancel safety
    /// Dropping the future ends the file that is open: it is put aside if it can be resumed, else removed.
    /// Files whose `finish` came are stored all the same.
    pub async fn serve(&self, channel: Channel) -> Result<(), RecvError> {
        let lanes: Lanes = channel
            .extensions()
            .get_or_insert_with(|| Lanes(Arc::new(Semaphore::new(self.config.lanes_per_socket))));
        let Ok(_lane) = lanes.0.try_acquire_owned() else {
            let text = format!(
                "more than {} lanes on one socket",
                self.config.lanes_per_socket
            );
            channel.close(CloseCode::REFUSED, text);
            return Ok(());
        };
        let peer = channel.peer();
        match self.scope(peer.as_ref()) {
            Ok(scope) => match Serving::new(self, channel, scope, peer).run().await {
                // A client without outstanding outcomes need not finish its lanes before it leaves.
                Err(error) if error.reason().code == CloseCode::NORMAL => Ok(()),
                served => served,
            },
            Err(NoScope) => {
                channel.close(CloseCode::REFUSED, NoScope::TEXT);
                Ok(())
            }
        }
    }

    /// The rights of a peer.
    pub(crate) fn scope(&self, peer: Option<&Peer>) -> Result<Scope, NoScope> {
        match Scope::of(peer, &self.config.default_scope) {
            Ok(scope) if self.config.read_only => Ok(Scope {
                write: false,
                delete: false,
                ..scope
            }),
            Ok(scope) => Ok(scope),
            Err(error) => {
                let peer = peer.map_or("", Peer::id);
                tracing::error!(peer, %error, "the entry of a token is unusable");
                Err(NoScope)
            }
        }
    }
}

/// The fields for rights of a token are invalid; the log says why.
#[derive(Debug)]
pub(crate) struct NoScope;

impl NoScope {
    /// The text for the client.
    pub(crate) const TEXT: &str = "the rights of this token are not understood";
}

/// The lanes of one socket.
#[derive(Clone)]
struct Lanes(Arc<Semaphore>);
