//! [`Receiver`]: the server's half of a transfer. Serves lanes, bounds them, and talks to the disk.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior};
use udpack::{Channel, CloseCode, Fault, Message, RecvError, SendError, ServerBuilder};

use crate::CHANNEL;
use crate::lane::{Action, Lane, Refusal};
use crate::path::RelPath;
use crate::store::{IfExists, Store};
use crate::wire::{
    self, AckFields, BadMessage, CHUNK, DoneFields, ErrorFields, Hash, Offer, ReadyFields, Request,
};
use crate::worker::{Incoming, Outcome};

/// Bounds of a [`Receiver`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiverConfig {
    /// A file that is open and gets no chunk for this long ends with `upload_stalled`. Defaults to 60 s.
    pub stall: Duration,
    /// Lanes one socket may have at once. Defaults to 16; further ones are closed with `refused`.
    pub lanes_per_socket: usize,
    /// Files being received or checked at once, all sockets together. Defaults to 256. A further `file`
    /// waits for its turn, and its lane with it.
    pub open_files: usize,
    /// How long it waits before it is refused with `too_many_uploads`. Defaults to 10 s.
    pub turn: Duration,
    /// Files of one lane that may be in checking while the next ones come in. Defaults to 32.
    pub pipeline: usize,
}

impl Default for ReceiverConfig {
    fn default() -> Self {
        Self {
            stall: Duration::from_secs(60),
            lanes_per_socket: 16,
            open_files: 256,
            turn: Duration::from_secs(10),
            pipeline: 32,
        }
    }
}

/// Takes uploads into a [`Store`]. A handle: clones share the store and the bounds.
#[derive(Debug, Clone)]
pub struct Receiver {
    store: Store,
    config: Arc<ReceiverConfig>,
    slots: Arc<Semaphore>,
}

impl Receiver {
    /// A receiver over this store.
    pub fn new(store: Store, config: ReceiverConfig) -> Self {
        let slots = Arc::new(Semaphore::new(
            config.open_files.clamp(1, Semaphore::MAX_PERMITS),
        ));
        Self {
            store,
            config: Arc::new(config),
            slots,
        }
    }

    /// Registers this receiver for the channels named [`CHANNEL`].
    pub fn attach(&self, server: ServerBuilder) -> ServerBuilder {
        let receiver = self.clone();
        server.channel(CHANNEL, move |channel| {
            let receiver = receiver.clone();
            async move { receiver.serve(channel).await }
        })
    }

    /// The store that the files go to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Serves one lane until the client finishes it.
    ///
    /// # Errors
    /// As [`Channel::recv`]. Failures of single files are told to the client and are no error here.
    ///
    /// # Cancel safety
    /// Dropping the future drops the file that is open; files whose `finish` came are stored all the same.
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
        let (outcomes, found) = mpsc::unbounded_channel();
        let serving = Serving {
            receiver: self,
            channel,
            lane: Lane::new(),
            files: HashMap::new(),
            pending: None,
            outcomes,
            active: Instant::now(),
        };
        serving.run(found).await
    }
}

/// The lanes of one socket.
#[derive(Clone)]
struct Lanes(Arc<Semaphore>);

/// One lane being served.
struct Serving<'a> {
    receiver: &'a Receiver,
    channel: Channel,
    lane: Lane,
    /// Files that still owe the client an outcome.
    files: HashMap<u64, Tracked>,
    pending: Option<Pending>,
    outcomes: mpsc::UnboundedSender<Outcome>,
    /// When the client last did something about the open file.
    active: Instant,
}

struct Tracked {
    /// `None` while the file waits for its turn.
    incoming: Option<Incoming>,
    /// The client waits for our `ready`, not we for its chunks.
    our_turn: bool,
    acked: u64,
    told: Instant,
}

/// What must happen before the next message is read.
enum Pending {
    Turn {
        offer: Offer,
        path: RelPath,
        turn: Wait<Option<OwnedSemaphorePermit>>,
    },
    Room {
        id: u64,
        bytes: Bytes,
        room: Wait<Option<OwnedSemaphorePermit>>,
    },
}

type Wait<T> = Pin<Box<dyn Future<Output = T> + Send>>;

const TICK: Duration = Duration::from_millis(250);
const HEARTBEAT: Duration = Duration::from_secs(1);

impl Serving<'_> {
    async fn run(mut self, mut found: mpsc::UnboundedReceiver<Outcome>) -> Result<(), RecvError> {
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut finished = false;
        let result = loop {
            if finished && self.files.is_empty() {
                break Ok(());
            }
            let reading = !finished
                && self.pending.is_none()
                && self.files.len() <= self.receiver.config.pipeline;
            let told = tokio::select! {
                Some(outcome) = found.recv() => self.outcome(outcome).await,
                permit = wait(&mut self.pending), if self.pending.is_some() => self.waited(permit).await,
                _ = ticker.tick(), if !self.files.is_empty() => self.tick().await,
                message = self.channel.recv(), if reading => match message {
                    Ok(Some(message)) => self.message(&message).await,
                    Ok(None) => {
                        finished = true;
                        self.forget_open();
                        Ok(())
                    }
                    Err(error) => break Err(error),
                },
            };
            match told {
                Ok(()) => {}
                // The client no longer listens. Files in checking are stored all the same.
                Err(error) if error.is_closed() => break Ok(()),
                Err(error) => tracing::warn!(%error, "an answer could not be sent"),
            }
        };
        self.forget_open();
        result
    }

    async fn message(&mut self, message: &Message) -> Result<(), SendError> {
        let request = match wire::decode(message) {
            // What a lane takes are events; whoever asks gets an answer, so that no request is left without.
            _ if message.id().is_some() => {
                let fault = Fault::new(Fault::NO_HANDLER, "a transfer channel takes no requests");
                return self.channel.fault(message, &fault).await;
            }
            Ok(Some(request)) => request,
            Ok(None) => {
                let fault = Fault::new(Fault::NO_HANDLER, "no such event on a transfer channel");
                return self.channel.fault(message, &fault).await;
            }
            Err(BadMessage {
                id: Some(id),
                event,
                text,
            }) => {
                if self.lane.dropping() == Some(id) {
                    // It has its error: it was on its way, sound or not.
                    return Ok(());
                }
                if self.lane.malformed(id) {
                    self.forget(id);
                }
                let message = format!("{event}: {text}");
                return self
                    .refuse(Refusal {
                        id,
                        code: "bad_message",
                        message,
                    })
                    .await;
            }
            Err(error) => {
                self.channel
                    .close(CloseCode::BAD_MESSAGE, error.to_string());
                return Ok(());
            }
        };
        self.active = Instant::now();
        match self.lane.on(&request) {
            Action::Begin(offer) => self.begin(offer).await,
            Action::Write => {
                if let Request::Chunk { id, bytes, .. } = request {
                    self.chunk(id, bytes);
                }
                Ok(())
            }
            Action::Finish(finish) => {
                if let Some(incoming) = self.incoming(finish.id) {
                    incoming.finish(finish);
                }
                Ok(())
            }
            Action::Abort(refusal) => {
                self.forget(refusal.id);
                self.refuse(refusal).await
            }
            Action::Refuse(refusal) | Action::Suspend(refusal) => self.refuse(refusal).await,
            Action::Dir(_) | Action::Link(_) | Action::Send(_) | Action::Sent { .. } => Ok(()),
            Action::Ignore => Ok(()),
        }
    }

    async fn begin(&mut self, offer: Offer) -> Result<(), SendError> {
        let id = offer.id;
        if self.files.contains_key(&id) {
            self.lane.ended(id);
            let message = "the file before it has no outcome yet".to_owned();
            return self
                .refuse(Refusal {
                    id,
                    code: "protocol_order",
                    message,
                })
                .await;
        }
        let path: RelPath = match offer.path.parse() {
            Ok(path) => path,
            Err(error) => {
                self.lane.ended(id);
                let message = format!("bad name: {error}");
                return self
                    .refuse(Refusal {
                        id,
                        code: "bad_name",
                        message,
                    })
                    .await;
            }
        };
        let our_turn = offer.resume || offer.if_exists == IfExists::Skip;
        let tracked = Tracked {
            incoming: None,
            our_turn,
            acked: 0,
            told: Instant::now(),
        };
        self.files.insert(id, tracked);
        let slots = self.receiver.slots.clone();
        if let Ok(slot) = slots.clone().try_acquire_owned() {
            self.start(offer, path, slot);
        } else {
            let limit = self.receiver.config.turn;
            let turn = Box::pin(async move {
                tokio::time::timeout(limit, slots.acquire_owned())
                    .await
                    .ok()
                    .and_then(Result::ok)
            });
            self.pending = Some(Pending::Turn { offer, path, turn });
        }
        Ok(())
    }

    fn start(&mut self, offer: Offer, path: RelPath, slot: OwnedSemaphorePermit) {
        let id = offer.id;
        let store = self.receiver.store.clone();
        let incoming = Incoming::begin(store, offer, path, slot, self.outcomes.clone());
        if let Some(tracked) = self.files.get_mut(&id) {
            tracked.incoming = Some(incoming);
        }
    }

    fn chunk(&mut self, id: u64, bytes: Bytes) {
        let Some(incoming) = self.incoming(id) else {
            return;
        };
        let room = incoming.room();
        match room.clone().try_acquire_owned() {
            Ok(permit) => incoming.write(bytes, permit),
            Err(_) => {
                let room = Box::pin(async move { room.acquire_owned().await.ok() });
                self.pending = Some(Pending::Room { id, bytes, room });
            }
        }
    }

    /// What was waited for has come, or will not.
    async fn waited(&mut self, permit: Option<OwnedSemaphorePermit>) -> Result<(), SendError> {
        self.active = Instant::now();
        match (self.pending.take(), permit) {
            (Some(Pending::Turn { offer, path, .. }), Some(slot)) => {
                self.start(offer, path, slot);
                Ok(())
            }
            (Some(Pending::Turn { offer, .. }), None) => {
                self.lane.ended(offer.id);
                self.files.remove(&offer.id);
                let limit = self.receiver.config.open_files;
                let message = format!("too many uploads: {limit} are open and none ended in time");
                self.error(offer.id, "too_many_uploads", &message, true)
                    .await
            }
            (Some(Pending::Room { id, bytes, .. }), Some(room)) => {
                if let Some(incoming) = self.incoming(id) {
                    incoming.write(bytes, room);
                }
                Ok(())
            }
            (Some(Pending::Room { .. }) | None, _) => Ok(()),
        }
    }

    async fn outcome(&mut self, outcome: Outcome) -> Result<(), SendError> {
        match outcome {
            Outcome::Ready { id, have } => {
                self.active = Instant::now();
                if let Some(tracked) = self.files.get_mut(&id) {
                    tracked.our_turn = false;
                }
                let have = have
                    .into_iter()
                    .map(|(off, len, hash)| (off, len, Hash(hash)))
                    .collect();
                let fields = ReadyFields {
                    id,
                    have,
                    chunk: CHUNK as u64,
                };
                self.channel.send("ready", &fields).await
            }
            Outcome::Done {
                id,
                path,
                size,
                hash,
                same,
            } => {
                if !self.settle(id) {
                    return Ok(());
                }
                let fields = DoneFields {
                    id,
                    path: &path,
                    size,
                    hash: Hash(hash),
                    same,
                    sync: None,
                };
                self.channel.send("done", &fields).await
            }
            Outcome::Error {
                id,
                code,
                message,
                retry,
            } => {
                if !self.settle(id) {
                    return Ok(());
                }
                self.error(id, code, &message, retry).await
            }
        }
    }

    /// The file has its outcome; says whether the client still waits for one.
    fn settle(&mut self, id: u64) -> bool {
        self.lane.ended(id);
        if matches!(&self.pending, Some(Pending::Room { id: waiting, .. }) if *waiting == id) {
            self.pending = None;
        }
        self.files.remove(&id).is_some()
    }

    /// Acknowledgements, signs of life, and the end of files that get nothing any more.
    async fn tick(&mut self) -> Result<(), SendError> {
        let now = Instant::now();
        if let Some(id) = self.lane.open()
            && self.pending.is_none()
            && self.files.get(&id).is_some_and(|tracked| !tracked.our_turn)
            && now - self.active >= self.receiver.config.stall
        {
            self.lane.ended(id);
            self.forget(id);
            let message = format!("nothing came for {:?}", self.receiver.config.stall);
            self.error(id, "upload_stalled", &message, true).await?;
        }
        let mut acks = Vec::new();
        for (id, tracked) in &mut self.files {
            let recv = tracked.incoming.as_ref().map_or(0, Incoming::received);
            if recv > tracked.acked || now - tracked.told >= HEARTBEAT {
                tracked.acked = recv;
                tracked.told = now;
                acks.push(AckFields {
                    id: *id,
                    recv,
                    safe: 0,
                });
            }
        }
        for ack in acks {
            self.channel.send("ack", &ack).await?;
        }
        Ok(())
    }

    fn incoming(&mut self, id: u64) -> Option<&mut Incoming> {
        self.files.get_mut(&id)?.incoming.as_mut()
    }

    fn forget(&mut self, id: u64) {
        self.files.remove(&id);
        let waits_for = match &self.pending {
            Some(Pending::Turn { offer, .. }) => Some(offer.id),
            Some(Pending::Room { id, .. }) => Some(*id),
            None => None,
        };
        if waits_for == Some(id) {
            self.pending = None;
        }
    }

    fn forget_open(&mut self) {
        if let Some(id) = self.lane.open() {
            self.lane.ended(id);
            self.forget(id);
        }
    }

    async fn refuse(&mut self, Refusal { id, code, message }: Refusal) -> Result<(), SendError> {
        tracing::debug!(code, "upload refused: {message}");
        self.error(id, code, &message, false).await
    }

    async fn error(
        &mut self,
        id: u64,
        code: &str,
        message: &str,
        retry: bool,
    ) -> Result<(), SendError> {
        self.channel
            .send(
                "error",
                &ErrorFields {
                    id,
                    code,
                    message,
                    retry,
                },
            )
            .await
    }
}

/// Ready when what is pending has come; dropping it loses nothing.
async fn wait(pending: &mut Option<Pending>) -> Option<OwnedSemaphorePermit> {
    match pending {
        Some(Pending::Turn { turn, .. }) => turn.await,
        Some(Pending::Room { room, .. }) => room.await,
        None => std::future::pending().await,
    }
}
