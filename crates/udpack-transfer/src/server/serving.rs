//! Serves one lane: carries out what [`Lane`] decides, and tells the client the outcomes.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use udpack::{
    Asked, Channel, CloseCode, Fault, Message, Peer, Place, RecvError, SendError, Tenant,
};

use crate::base::code::Code;
use crate::base::path::RelPath;
use crate::local::limiter::Limiter;
use crate::server::hook::{Access, HookAccess, HookOffer};
use crate::server::jobs::{Job, JobEnd, JobKind};
use crate::server::outgoing::{self, Wanted};
use crate::server::places::{self, Slot};
use crate::server::receiver::{NoScope, Receiver};
use crate::server::scope::Scope;
use crate::server::upload::{Outcome, Outcomes, Task, Upload, Uploads};
use crate::server::writers::{Claim, Pulse, Replaced, UploadKey, Writer};
use crate::staging::file::{Gathered, Incoming, Whole};
use crate::store::{
    IfExists, NewDir, NewLink, Placed, Published, StoreError, Synced, check_target,
};
use crate::wire::lane::{Action, Lane, Refusal};
use crate::wire::{
    self, AckFields, BadMessage, Bin, CHUNK, Copied, DirOffer, DoneFields, ErrorFields, Hole,
    LinkOffer, Offer, Put, ReadyFields, Request, Wish,
};

/// How often the lane checks the state of its files.
const TICK: Duration = Duration::from_millis(250);
/// The longest silence about a file that waits.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long a new writer waits until the old one has released the upload.
const HANDOVER: Duration = Duration::from_secs(15);
/// Requests that may wait on one lane beside those that are being answered.
const BACKLOG: usize = 1024;
/// Bytes of all requests of one lane together.
const BACKLOG_BYTES: usize = 1 << 20;
/// Downloads that may wait on one lane.
const GETS: usize = 64;
/// Downloads that the client may leave unconfirmed.
const UNCONFIRMED: usize = 1024;

/// One lane that is being served.
pub(crate) struct Serving<'a> {
    receiver: &'a Receiver,
    channel: Channel,
    scope: Scope,
    client: Client,
    lane: Lane,
    /// Files whose outcome the client does not have yet.
    files: HashMap<u64, Tracked>,
    pending: Option<Pending>,
    /// Small files with steps that are not submitted to the pool yet.
    gathered: Gathered<Upload>,
    outcomes: Outcomes,
    found: mpsc::UnboundedReceiver<Outcome>,
    /// When the client last did something about the open file.
    active: Instant,
    downloads: Downloads,
    requests: Requests,
    /// Tasks that create directories and links. They end with the lane, as do the tasks of requests and downloads.
    making: JoinSet<()>,
}

/// The client of the lane.
struct Client {
    /// The peer whose scope applies, as it was when the scope was read.
    peer: Option<Peer>,
    owner: Arc<str>,
    /// The tenant whose share of the server's places it takes.
    tenant: Tenant,
}

/// The downloads that the client requested.
#[derive(Default)]
struct Downloads {
    /// The queue of the task that sends them.
    queue: Option<mpsc::Sender<Wanted>>,
    /// Stops the download of this id.
    stops: HashMap<u64, CancellationToken>,
    task: JoinSet<()>,
}

/// Requests that wait or are being answered.
struct Requests {
    tasks: JoinSet<()>,
    bytes: Arc<AtomicUsize>,
    /// Permits of the requests that are being answered.
    turns: Arc<Semaphore>,
}

impl Requests {
    /// At most `most` requests are answered at once.
    fn new(most: usize) -> Self {
        let most = most.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            tasks: JoinSet::new(),
            bytes: Arc::default(),
            turns: Arc::new(Semaphore::new(most)),
        }
    }

    /// Whether another request may wait, beside those that may be answered at once.
    fn has_room(&self, most: usize) -> bool {
        self.tasks.len() < most + BACKLOG && self.bytes.load(Ordering::Relaxed) < BACKLOG_BYTES
    }
}

struct Tracked {
    /// `None` while the file has not begun.
    incoming: Option<Incoming<Upload>>,
    /// Whether the client waits for the server's `ready` and the server waits for no chunk.
    our_turn: bool,
    acked: u64,
    safe: u64,
    told: Instant,
    job: Option<Job>,
    /// For a file that can be resumed: proves that the writer is alive, and tells it that it was replaced.
    writer: Option<(Pulse, watch::Receiver<Replaced>)>,
}

impl Tracked {
    fn new(our_turn: bool) -> Self {
        Self {
            incoming: None,
            our_turn,
            acked: 0,
            safe: 0,
            told: Instant::now(),
            job: None,
            writer: None,
        }
    }
}

/// The rate that the client of a socket last set for its downloads.
#[derive(Clone, Default)]
struct Taken(Arc<Mutex<Limiter>>);

/// Work that must end before the next message is read.
enum Pending {
    Start {
        id: u64,
        start: Wait<Start>,
    },
    Room {
        id: u64,
        content: Content,
        room: Wait<Option<OwnedSemaphorePermit>>,
    },
}

/// Bytes to be written.
enum Content {
    Bytes(Option<u64>, Bytes),
    Copy(Copied),
    Hole(Hole),
}

impl Pending {
    fn id(&self) -> u64 {
        match self {
            Self::Start { id, .. } | Self::Room { id, .. } => *id,
        }
    }
}

/// The result of an offer.
enum Start {
    Begin(Box<Task>, Slot),
    /// The file was stored before; the answer was lost.
    Known(Published),
    Refused(Code, String, bool),
}

/// The result of pending work.
enum Waited {
    Start(Start),
    Room(Option<OwnedSemaphorePermit>),
}

type Wait<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl<'a> Serving<'a> {
    /// A lane on which this peer has these rights.
    pub(crate) fn new(
        receiver: &'a Receiver,
        channel: Channel,
        scope: Scope,
        peer: Option<Peer>,
    ) -> Self {
        let (outcomes, found) = mpsc::unbounded_channel();
        Self {
            client: Client {
                owner: peer.as_ref().map_or("", |peer| peer.id()).into(),
                peer,
                tenant: places::tenant(&channel),
            },
            receiver,
            channel,
            scope,
            lane: Lane::new(),
            files: HashMap::new(),
            pending: None,
            gathered: receiver.uploads.gathered(),
            outcomes,
            found,
            active: Instant::now(),
            downloads: Downloads::default(),
            requests: Requests::new(receiver.config.requests),
            making: JoinSet::new(),
        }
    }

    pub(crate) async fn run(mut self) -> Result<(), RecvError> {
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut finished = false;
        let result = loop {
            let nothing_owed = self.files.is_empty()
                && self.downloads.stops.is_empty()
                && self.requests.tasks.is_empty();
            if finished && nothing_owed {
                break Ok(());
            }
            let reading = !finished
                && self.pending.is_none()
                && self.files.len() <= self.receiver.config.pipeline
                && self.requests.has_room(self.receiver.config.requests);
            let told = tokio::select! {
                biased;
                _ = ticker.tick(), if !self.files.is_empty() => self.tick().await,
                Some(outcome) = self.found.recv() => self.outcome(outcome).await,
                waited = wait(&mut self.pending), if self.pending.is_some() => self.waited(waited).await,
                Some(_) = self.requests.tasks.join_next() => Ok(()),
                Some(_) = self.making.join_next() => Ok(()),
                // The task that sends downloads ends before the lane only when the lane accepts nothing any more.
                Some(_) = self.downloads.task.join_next() => break Ok(()),
                message = self.channel.recv_asked(), if reading => match message {
                    Ok(Some((message, Some(asked)))) => {
                        self.asked(message, asked);
                        Ok(())
                    }
                    Ok(Some((message, None))) => self.message(message).await,
                    Ok(None) => {
                        finished = true;
                        self.suspend_open();
                        Ok(())
                    }
                    Err(error) => break Err(error),
                },
                // There is nothing more to read at the moment.
                () = std::future::ready(()), if !self.gathered.is_empty() => {
                    self.gathered.hand_over();
                    Ok(())
                }
            };
            match told {
                Ok(()) => {}
                // The client has closed the lane. Files that are being verified are stored all the same.
                Err(error) if error.is_closed() => break Ok(()),
                // The client cannot receive an outcome either: closing the lane tells it.
                Err(error) => {
                    let text = format!("an answer could not be sent: {error}");
                    self.channel.close(CloseCode::FRAME_TOO_LARGE, text);
                    break Ok(());
                }
            }
        };
        self.suspend_open();
        result
    }

    /// Reads the client's rights again if its token has been replaced since. What has begun under the old rights
    /// continues. Returns `false` for a lane that would now lead to another directory: it is closed.
    fn entitled(&mut self) -> bool {
        let peer = self.channel.peer();
        if peer == self.client.peer {
            return true;
        }
        let text = match self.receiver.scope(peer.as_ref()) {
            Ok(scope) if scope.prefix == self.scope.prefix => {
                (self.scope, self.client.peer) = (scope, peer);
                return true;
            }
            Ok(_) => "this token leads to another directory",
            Err(NoScope) => NoScope::TEXT,
        };
        self.channel.close(CloseCode::REFUSED, text);
        false
    }

    /// Has a request answered, unless the client cancels it before.
    fn asked(&mut self, message: Message, asked: Asked) {
        if !self.entitled() {
            return;
        }
        let held = Held::new(&self.requests.bytes, message.len());
        let (queries, turns) = (self.receiver.queries.clone(), self.requests.turns.clone());
        let (channel, scope, tenant) = (
            self.channel.clone(),
            self.scope.clone(),
            self.client.tenant.clone(),
        );
        let asking = async move {
            let _held = held;
            let work = async {
                let _turn = turns.acquire().await;
                queries.answer(&channel, &message, &scope, &tenant).await
            };
            if let Some(Err(error)) = asked.run(work).await {
                tracing::debug!(%error, "a request was not answered");
            }
        };
        self.requests.tasks.spawn(asking.in_current_span());
    }

    async fn message(&mut self, message: Message) -> Result<(), SendError> {
        let request = match wire::decode(&message) {
            Ok(Some(request)) => request,
            Ok(None) => {
                let fault = Fault::new(Fault::NO_HANDLER, "no such event on a transfer channel");
                return self.channel.fault(&message, &fault).await;
            }
            Err(error) => return self.malformed(error).await,
        };
        if let Request::Ack { id, .. } = &request
            && let Some((pulse, _)) = self.files.get(id).and_then(|file| file.writer.as_ref())
        {
            // The client is comparing the ranges that the server has.
            pulse.beat();
        }
        let action = self.lane.on(&request);
        if self.lane.open().is_some_and(|open| request.id() == open) {
            // Messages about other files do not keep the open file from timing out.
            self.active = Instant::now();
        }
        let asks = matches!(
            action,
            Action::Begin(_) | Action::Put | Action::Dir(_) | Action::Link(_) | Action::Send(_)
        );
        if asks && !self.entitled() {
            return Ok(());
        }
        self.act(action, request).await
    }

    /// Handles a message that cannot be read: fails its file, or closes the lane if that is unknown.
    async fn malformed(&mut self, error: BadMessage) -> Result<(), SendError> {
        let Some(id) = error.id else {
            self.channel
                .close(CloseCode::BAD_MESSAGE, error.to_string());
            return Ok(());
        };
        if self.lane.dropping() == Some(id) {
            // The file has its error already: this message was on its way, whether well-formed or not.
            return Ok(());
        }
        let code = Code::BadMessage;
        let message = format!("{}: {}", error.event, error.text);
        if self.lane.malformed(id) {
            self.discard(id, JobEnd::Failed(code, message.clone()));
        }
        self.refuse(Refusal { id, code, message }).await
    }

    /// Carries out what the state machine requires for this request.
    async fn act(&mut self, action: Action, request: Request) -> Result<(), SendError> {
        match action {
            Action::Begin(offer) => self.begin(offer, None).await,
            Action::Put => match request {
                Request::Put(put) => {
                    let Put { offer, hash, bytes } = put;
                    self.begin(offer, Some(Whole { hash, bytes })).await
                }
                _ => Ok(()),
            },
            Action::Write => {
                if let Request::Chunk { id, offset, bytes } = request {
                    let len = bytes.len() as u64;
                    self.content(id, Content::Bytes(offset, bytes), len);
                }
                Ok(())
            }
            Action::Copy(copied) => {
                self.content(copied.id, Content::Copy(copied), 0);
                Ok(())
            }
            Action::Hole(hole) => {
                self.content(hole.id, Content::Hole(hole), 0);
                Ok(())
            }
            Action::Finish(finish) => {
                let tracked = self.files.get_mut(&finish.id);
                if let Some(incoming) = tracked.and_then(|tracked| tracked.incoming.as_mut()) {
                    incoming.finish(finish.size, finish.hash, &mut self.gathered);
                }
                Ok(())
            }
            Action::Abort(refusal) => {
                let end = match refusal.code {
                    Code::Cancelled => JobEnd::Cancelled,
                    code => JobEnd::Failed(code, refusal.message.clone()),
                };
                self.discard(refusal.id, end);
                self.refuse(refusal).await
            }
            Action::Suspend(refusal) => {
                self.suspend(refusal.id);
                self.refuse(refusal).await
            }
            Action::Refuse(refusal) => self.refuse(refusal).await,
            Action::Dir(offer) => self.dir(offer).await,
            Action::Link(offer) => self.link(offer).await,
            Action::Send(wish) => self.wish(wish).await,
            Action::Sent { id, stored: _ } => {
                if let Some(get) = self.downloads.stops.get(&id) {
                    get.cancel();
                }
                Ok(())
            }
            Action::Ignore => Ok(()),
        }
    }

    /// The path of an offer, if this client may write there.
    fn writable(&self, id: u64, path: &str) -> Result<RelPath, Refusal> {
        if !self.scope.write {
            let (code, message) = Scope::no_right("write");
            return Err(Refusal { id, code, message });
        }
        self.scope.inside(path).map_err(|error| Refusal {
            id,
            code: Code::BadName,
            message: error.to_string(),
        })
    }

    /// The base of an offer, if this client may read it. Otherwise the client learns nothing about the file and sends
    /// everything.
    fn base(&self, offer: &Offer) -> Option<RelPath> {
        let base = offer.base.as_ref().filter(|_| self.scope.read)?;
        self.scope.inside(base).ok()
    }

    async fn begin(&mut self, offer: Offer, whole: Option<Whole>) -> Result<(), SendError> {
        let id = offer.id;
        if self.files.contains_key(&id) {
            self.lane.ended(id);
            let message = "the file before it has no outcome yet".to_owned();
            return self
                .refuse(Refusal {
                    id,
                    code: Code::ProtocolOrder,
                    message,
                })
                .await;
        }
        let path = match self.writable(id, &offer.path) {
            Ok(path) => path,
            Err(refusal) => {
                self.lane.ended(id);
                return self.refuse(refusal).await;
            }
        };
        let our_turn = offer.resume || offer.if_exists == IfExists::Skip;
        self.files.insert(id, Tracked::new(our_turn));
        let mut task = Task {
            path,
            base: self.base(&offer),
            owner: self.client.owner.clone(),
            tenant: self.scope.tenant(),
            key: None,
            known: None,
            writer: None,
            offer,
            whole,
            span: tracing::Span::current(),
        };
        // Most files do not have to wait.
        let free = task.whole.is_none() || !self.receiver.limit_in.is_limited();
        let plain = free && !asks_what_is_there(&task.offer) && self.receiver.hook.is_none();
        let file = || {
            self.receiver
                .places
                .files
                .take(&self.client.tenant)
                .now_or_never()
        };
        if plain && let Some(Ok(file)) = file() {
            let slot = Slot { file, check: None };
            return match stored_before(&self.receiver.uploads, &mut task) {
                Some(published) => self.outcome(Outcome::Done { id, published }).await,
                None => {
                    self.start(task, slot);
                    Ok(())
                }
            };
        }
        let start = Box::pin(start(
            self.receiver.clone(),
            task,
            self.client.tenant.clone(),
        ));
        self.pending = Some(Pending::Start { id, start });
        Ok(())
    }

    fn start(&mut self, task: Task, slot: Slot) {
        let id = task.offer.id;
        let writer = task
            .writer
            .as_ref()
            .map(|writer| (writer.pulse(), writer.replaced()));
        let job = self.job(JobKind::Put, task.path.as_str(), task.offer.size, {
            let outcomes = self.outcomes.clone();
            move || {
                let _ = outcomes.send(Outcome::Cancelled { id });
            }
        });
        let outcomes = self.outcomes.clone();
        let uploads = &self.receiver.uploads;
        let notes = job.notes();
        let incoming = uploads.begin(task, slot, notes, outcomes, &mut self.gathered);
        if let Some(tracked) = self.files.get_mut(&id) {
            tracked.incoming = Some(incoming);
            tracked.job = Some(job);
            tracked.writer = writer;
        }
    }

    fn job(
        &self,
        kind: JobKind,
        path: &str,
        size: Option<u64>,
        cancel: impl Fn() + Send + Sync + 'static,
    ) -> Job {
        self.receiver
            .jobs
            .start(kind, path, &self.client.owner, size, cancel)
    }

    /// Writes what has arrived, `len` bytes of it over the network, as soon as there is room.
    fn content(&mut self, id: u64, content: Content, len: u64) {
        let tracked = self.files.get(&id);
        let Some(incoming) = tracked.and_then(|tracked| tracked.incoming.as_ref()) else {
            return;
        };
        let room = incoming.room();
        let limit = &self.receiver.limit_in;
        if !limit.is_limited()
            && let Ok(permit) = room.clone().try_acquire_owned()
        {
            self.write(id, content, permit);
            return;
        }
        let limit = limit.clone();
        let room = Box::pin(async move {
            limit.take(len).await;
            room.acquire_owned().await.ok()
        });
        self.pending = Some(Pending::Room { id, content, room });
    }

    /// Handles the result of pending work.
    async fn waited(&mut self, waited: Waited) -> Result<(), SendError> {
        self.active = Instant::now();
        match (self.pending.take(), waited) {
            (Some(Pending::Start { id, .. }), Waited::Start(start)) => match start {
                Start::Begin(task, slot) => {
                    self.start(*task, slot);
                    Ok(())
                }
                Start::Known(published) => self.outcome(Outcome::Done { id, published }).await,
                Start::Refused(code, message, retry) => {
                    self.outcome(Outcome::Error {
                        id,
                        code,
                        message,
                        retry,
                    })
                    .await
                }
            },
            (Some(Pending::Room { id, content, .. }), Waited::Room(Some(room))) => {
                self.write(id, content, room);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Creates a directory on the blocking pool; its outcome is handled like that of a file.
    async fn dir(&mut self, offer: DirOffer) -> Result<(), SendError> {
        let path = match self.writable(offer.id, &offer.path) {
            Ok(path) => path,
            Err(refusal) => return self.refuse(refusal).await,
        };
        let (target, tenant) = (self.receiver.target().clone(), self.scope.tenant());
        self.make(offer.id, async move {
            let new = NewDir {
                path: &path,
                meta: offer.meta.into(),
                xattrs: &offer.xattrs,
                dirs: &offer.dirs,
                tenant: tenant.as_ref(),
            };
            let made = target.make_dir(&new).await?;
            Ok((path, made))
        });
        Ok(())
    }

    async fn link(&mut self, offer: LinkOffer) -> Result<(), SendError> {
        let path = match self.writable(offer.id, &offer.path) {
            Ok(path) => path,
            Err(refusal) => return self.refuse(refusal).await,
        };
        // The target is checked relative to the client's own root, which the store does not know.
        let checked = offer
            .path
            .parse()
            .map_err(StoreError::from)
            .and_then(|path: RelPath| check_target(&path, &offer.target));
        if let Err(error) = checked {
            return self
                .refuse(Refusal {
                    id: offer.id,
                    code: error.refusal(),
                    message: error.to_string(),
                })
                .await;
        }
        let (target, tenant) = (self.receiver.target().clone(), self.scope.tenant());
        self.make(offer.id, async move {
            let new = NewLink {
                path: &path,
                target: &offer.target,
                if_exists: offer.if_exists,
                dirs: &offer.dirs,
                tenant: tenant.as_ref(),
            };
            let made = target.make_link(&new).await?;
            Ok((path, made))
        });
        Ok(())
    }

    fn make(
        &mut self,
        id: u64,
        make: impl Future<Output = Result<(RelPath, Placed), StoreError>> + Send + 'static,
    ) {
        self.files.insert(id, Tracked::new(true));
        let (target, outcomes) = (self.receiver.target().clone(), self.outcomes.clone());
        let (steps, share) = (
            self.receiver.places.steps.clone(),
            self.client.tenant.clone(),
        );
        let make = move |place: Place| async move {
            let _place = place;
            let _ = outcomes.send(match make.await {
                Ok((path, placed)) => Outcome::Done {
                    id,
                    published: Published {
                        path: path.as_str().to_owned(),
                        size: 0,
                        hash: *blake3::hash(b"").as_bytes(),
                        same: placed.same,
                        sync: Synced::File,
                        other_time: placed.other_time,
                        xattrs: placed.xattrs,
                    },
                },
                Err(error) => Outcome::failed(id, &error),
            });
        };
        let outcomes = self.outcomes.clone();
        let span = tracing::Span::current();
        self.making.spawn(async move {
            match steps.take(&share).await {
                Ok(place) => drop(target.run(make(place).instrument(span))),
                Err(full) => drop(outcomes.send(Outcome::Error {
                    id,
                    code: Code::TooManyUploads,
                    message: places::too_many("uploads", &full),
                    retry: true,
                })),
            }
        });
    }

    /// Handles `get`: queues a download.
    async fn wish(&mut self, wish: Wish) -> Result<(), SendError> {
        let id = wish.id;
        let refusal = |code, message| Refusal { id, code, message };
        let path = if self.scope.read {
            self.scope
                .inside(&wish.path)
                .map_err(|error| refusal(Code::BadName, error.to_string()))
        } else {
            let (code, message) = Scope::no_right("read");
            Err(refusal(code, message))
        };
        let path = path.and_then(|path| {
            if self.downloads.stops.len() >= GETS || self.lane.gets() > UNCONFIRMED {
                let message = format!("more than {GETS} downloads wait on this lane");
                return Err(refusal(Code::ProtocolOrder, message));
            }
            Ok(path)
        });
        let path = match path {
            Ok(path) => path,
            Err(refusal) => {
                self.lane.unsent(id);
                return self.refuse(refusal).await;
            }
        };
        let unwanted = CancellationToken::new();
        let job = self.job(JobKind::Get, path.as_str(), None, {
            let unwanted = unwanted.clone();
            move || unwanted.cancel()
        });
        self.downloads.stops.insert(id, unwanted.clone());
        let wanted = Wanted {
            id,
            path,
            shown: wish.path,
            have: wish.have,
            holes: wish.holes,
            xattrs: wish.xattrs,
            taken: self.taken(wish.rate),
            job,
            unwanted,
        };
        let queue = self.downloads.queue.get_or_insert_with(|| {
            let (queue, wishes) = mpsc::channel(GETS);
            let sending = outgoing::send_files(
                self.receiver.clone(),
                self.channel.clone(),
                self.client.tenant.clone(),
                wishes,
                self.outcomes.clone(),
            );
            self.downloads.task.spawn(sending.in_current_span());
            queue
        });
        // There is room: the number of queued downloads was checked above.
        let _ = queue.try_send(wanted);
        Ok(())
    }

    /// The limit that the client set for its downloads: one for all lanes of its socket.
    fn taken(&self, rate: Option<u64>) -> Limiter {
        let Some(rate) = rate else {
            return Limiter::unlimited();
        };
        let all: Taken = self.channel.extensions().get_or_insert_with(Taken::default);
        let mut limiter = all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if limiter.rate() != Some(rate.max(1)) {
            *limiter = Limiter::new(rate);
        }
        limiter.clone()
    }

    async fn outcome(&mut self, outcome: Outcome) -> Result<(), SendError> {
        match outcome {
            Outcome::Ready { id, mut have, base } => {
                self.active = Instant::now();
                have.truncate(wire::ranges_within(self.channel.frame_limit()));
                let Some(tracked) = self.files.get_mut(&id) else {
                    return Ok(());
                };
                tracked.our_turn = false;
                if let Some(job) = &tracked.job {
                    job.skip(have.iter().map(|(_, len, _)| len).sum());
                }
                self.lane.told(id, &have);
                let fields = ReadyFields {
                    id,
                    have: wire::ranges(&have),
                    chunk: CHUNK as u64,
                    base,
                    holes: true,
                };
                self.channel.send("ready", &fields).await
            }
            Outcome::Done { id, published } => {
                if !self.settle(id, JobEnd::Done) {
                    return Ok(());
                }
                let fields = DoneFields {
                    id,
                    path: self.scope.outside(&published.path),
                    size: published.size,
                    hash: Bin(published.hash),
                    same: published.same,
                    sync: Some(wire::sync_word(published.sync)),
                    mtime: published.other_time.map(|time| time.got.secs),
                    xattrs: published.xattrs,
                };
                self.channel.send("done", &fields).await
            }
            Outcome::Error {
                id,
                code,
                message,
                retry,
            } => {
                if !self.settle(id, JobEnd::Failed(code, message.clone())) {
                    return Ok(());
                }
                self.error(id, code, &message, retry).await
            }
            Outcome::Cancelled { id } => {
                // A file that is being verified continues to its end.
                let open = self.lane.open() == Some(id);
                if !open || !self.files.contains_key(&id) {
                    return Ok(());
                }
                self.lane.ended(id);
                let job = self.files.get(&id).and_then(|file| file.job.as_ref());
                let message = job.map(Job::cancelled).unwrap_or_default();
                self.discard(id, JobEnd::Cancelled);
                self.error(id, Code::Cancelled, &message, false).await
            }
            Outcome::Sent { id, failed } => {
                self.downloads.stops.remove(&id);
                if failed.is_some() {
                    self.lane.unsent(id);
                }
                Ok(())
            }
        }
    }

    /// Records the outcome of a file. Returns whether the client still waits for one.
    fn settle(&mut self, id: u64, end: JobEnd) -> bool {
        self.lane.ended(id);
        self.remove_pending(id);
        match self.files.remove(&id) {
            Some(tracked) => {
                if let Some(job) = tracked.job {
                    if let Some(incoming) = &tracked.incoming {
                        job.update(incoming.received(), incoming.safe());
                    }
                    job.end(end);
                }
                true
            }
            None => false,
        }
    }

    /// Sends acknowledgements and signs of life, and ends files that receive nothing any more.
    async fn tick(&mut self) -> Result<(), SendError> {
        let now = Instant::now();
        let waiting = self.pending.as_ref().map(Pending::id);
        if let Some(id) = self.lane.open()
            && waiting.is_none()
            && self.files.get(&id).is_some_and(|tracked| !tracked.our_turn)
            && now - self.active >= self.receiver.config.stall
        {
            self.lane.ended(id);
            self.suspend(id);
            let message = format!("nothing came for {:?}", self.receiver.config.stall);
            self.error(id, Code::UploadStalled, &message, true).await?;
        }
        let mut acks = Vec::new();
        let mut replaced = Vec::new();
        for (id, tracked) in &mut self.files {
            if let Some((pulse, superseded)) = &tracked.writer {
                let superseded = *superseded.borrow();
                if superseded != Replaced::No {
                    replaced.push((*id, superseded == Replaced::ByOwnRun));
                    continue;
                }
                // A file that waits for the server has not stalled.
                if waiting == Some(*id) || tracked.our_turn || self.lane.open() != Some(*id) {
                    pulse.beat();
                }
            }
            let (recv, safe) = tracked
                .incoming
                .as_ref()
                .map_or((0, 0), |incoming| (incoming.received(), incoming.safe()));
            if let Some(job) = &tracked.job {
                job.update(recv, safe);
            }
            if let Some(incoming) = &tracked.incoming {
                incoming.pause(&mut self.gathered);
            }
            let further = recv > tracked.acked || safe > tracked.safe;
            if further || now - tracked.told >= HEARTBEAT {
                (tracked.acked, tracked.safe) = (recv, safe);
                tracked.told = now;
                acks.push(AckFields {
                    id: *id,
                    recv,
                    safe,
                });
            }
        }
        for (id, own) in replaced {
            self.lane.ended(id);
            self.suspend(id);
            let message = "another offer of this upload has taken it over";
            self.error(id, Code::Superseded, message, own).await?;
        }
        for ack in acks {
            self.channel.send("ack", &ack).await?;
        }
        Ok(())
    }

    fn write(&mut self, id: u64, content: Content, room: OwnedSemaphorePermit) {
        if let Some(tracked) = self.files.get(&id) {
            if let Some((pulse, _)) = &tracked.writer {
                pulse.beat();
            }
            if let Some(incoming) = &tracked.incoming {
                match content {
                    Content::Bytes(offset, bytes) => {
                        incoming.write(offset, bytes, room, &mut self.gathered);
                    }
                    Content::Copy(copied) => incoming.copy(copied, room, &mut self.gathered),
                    Content::Hole(hole) => incoming.hole(hole, room, &mut self.gathered),
                }
            }
        }
    }

    /// Ends a file and removes its bytes.
    fn discard(&mut self, id: u64, end: JobEnd) {
        self.remove_pending(id);
        if let Some(tracked) = self.files.remove(&id) {
            if let Some(incoming) = tracked.incoming {
                incoming.end(true, drop);
            }
            if let Some(job) = tracked.job {
                job.end(end);
            }
        }
    }

    /// Ends a file and keeps what can be resumed.
    fn suspend(&mut self, id: u64) {
        self.remove_pending(id);
        self.files.remove(&id);
    }

    fn suspend_open(&mut self) {
        if let Some(id) = self.lane.open() {
            self.lane.ended(id);
            self.suspend(id);
        }
    }

    fn remove_pending(&mut self, id: u64) {
        if self.pending.as_ref().map(Pending::id) == Some(id) {
            self.pending = None;
        }
    }

    async fn refuse(&mut self, Refusal { id, code, message }: Refusal) -> Result<(), SendError> {
        tracing::debug!(%code, "refused: {message}");
        self.error(id, code, &message, false).await
    }

    async fn error(
        &mut self,
        id: u64,
        code: Code,
        message: &str,
        retry: bool,
    ) -> Result<(), SendError> {
        let message = self.scope.outside_of(message);
        let fields = ErrorFields::new(&self.channel, id, code, &message, retry);
        self.channel.send("error", &fields).await
    }
}

/// Everything before the disk: the operator's hook, the right to write, an outcome that is known already, a free place.
async fn start(receiver: Receiver, mut task: Task, tenant: Tenant) -> Start {
    let places = &receiver.places;
    let full = |full| {
        let message = places::too_many("uploads", &full);
        Start::Refused(Code::TooManyUploads, message, true)
    };
    if let Some(hook) = &receiver.hook {
        let _place = match places.hooks.take(&tenant).await {
            Ok(place) => place,
            Err(error) => return full(error),
        };
        let offer = HookOffer {
            path: task.path.as_str().to_owned(),
            size: task.offer.size,
            peer: task.owner.to_string(),
        };
        if let Some(base) = &task.base {
            let read = HookAccess {
                path: base.as_str().to_owned(),
                access: Access::Read,
                peer: task.owner.to_string(),
            };
            if hook.allow(&read).await.is_err() {
                task.base = None;
            }
        }
        match hook.accept(&offer).await {
            Ok(None) => {}
            Ok(Some(name)) => match name.parse() {
                Ok(path) => task.path = path,
                Err(error) => {
                    tracing::error!(%error, "the hook gave a bad name");
                    let message = "the operator's hook gave a bad name".to_owned();
                    return Start::Refused(Code::Refused, message, false);
                }
            },
            Err(message) => return Start::Refused(Code::Refused, message, false),
        }
    }
    if task.offer.resume {
        let key = UploadKey::new(&task.owner, task.path.as_str());
        match claim(&receiver, key, task.offer.run).await {
            Some(writer) => task.writer = Some(writer),
            None => {
                let error = StoreError::Busy {
                    path: task.path.clone(),
                };
                return Start::Refused(error.refusal(), error.to_string(), error.retry());
            }
        }
    }
    if let Some(published) = stored_before(&receiver.uploads, &mut task) {
        return Start::Known(published);
    }
    if let Some(whole) = &task.whole {
        receiver.limit_in.take(whole.bytes.len() as u64).await;
    }
    let file = match tokio::time::timeout(receiver.config.turn, places.files.take(&tenant)).await {
        Ok(Ok(file)) => file,
        Ok(Err(error)) => return full(error),
        Err(_) => {
            let limit = receiver.config.open_files;
            let message = format!("too many uploads: {limit} are open and none ended in time");
            return Start::Refused(Code::TooManyUploads, message, true);
        }
    };
    let check = match asks_what_is_there(&task.offer) {
        true => match places.checks.take(&tenant).await {
            Ok(check) => Some(check),
            Err(error) => return full(error),
        },
        false => None,
    };
    Start::Begin(Box::new(task), Slot { file, check })
}

/// Whether a stored file may have to be read as a whole before the first byte of this one arrives.
fn asks_what_is_there(offer: &Offer) -> bool {
    offer.resume || offer.if_exists == IfExists::Skip
}

/// Bytes that count as queued for as long as this value lives.
struct Held(Arc<AtomicUsize>, usize);

impl Held {
    fn new(count: &Arc<AtomicUsize>, bytes: usize) -> Self {
        count.fetch_add(bytes, Ordering::Relaxed);
        Self(count.clone(), bytes)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// The outcome of an earlier offer of this file by the same run, if it is known and the stored file is the offered one.
/// Otherwise notes the key for the outcome, and what the file must be equal to.
fn stored_before(uploads: &Uploads, task: &mut Task) -> Option<Published> {
    let run = task.offer.run.as_ref()?;
    let key = UploadKey::new(&task.owner, task.path.as_str()).in_run(run);
    task.key = Some(key);
    let known = uploads.writers().outcome(key)?;
    let skips = task.offer.if_exists == IfExists::Skip;
    let equal = match &task.whole {
        Some(whole) => whole.hash == known.hash && whole.bytes.len() as u64 == known.size,
        // No more bytes will arrive.
        None => skips && task.offer.size.is_none_or(|size| size == known.size),
    };
    if equal {
        return Some(known);
    }
    // With `skip` any stored file counts.
    task.known = (!skips).then_some(known);
    None
}

/// Acquires the right to write an upload. Waits for an old writer that was asked to stop.
async fn claim(receiver: &Receiver, key: UploadKey, run: Option<[u8; 16]>) -> Option<Writer> {
    let claiming = async {
        loop {
            match receiver.uploads.writers().claim(key, run) {
                Claim::Writer(writer) => return Some(writer),
                Claim::Busy => return None,
                Claim::Wait(mut gone) => {
                    // An error is expected: the old writer holds the other end.
                    let _ = gone.changed().await;
                }
            }
        }
    };
    tokio::time::timeout(HANDOVER, claiming)
        .await
        .ok()
        .flatten()
}

/// Ready when pending work has a result. Dropping the future loses nothing.
async fn wait(pending: &mut Option<Pending>) -> Waited {
    match pending {
        Some(Pending::Start { start, .. }) => Waited::Start(start.await),
        Some(Pending::Room { room, .. }) => Waited::Room(room.await),
        None => std::future::pending().await,
    }
}
