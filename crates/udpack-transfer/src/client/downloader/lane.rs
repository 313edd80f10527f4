//! One lane of a download: asks for files, several ahead, and hands what comes to the disk.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use udpack::{Channel, CloseCode, Message, Priority, Socket};

use super::incoming::{self, Arriving, End, Note, Wish};
use super::{Context, Held, lock};
use crate::base::code::Code;
use crate::client::link::{Link, Loss};
use crate::client::progress::Event;
use crate::client::uploader::Measure;
use crate::client::uploader::lane_end;
use crate::local::error::TransferError;
use crate::staging::file::Incoming;
use crate::store::{Meta, XattrList, Xattrs};
use crate::wire::CHANNEL;
use crate::wire::{
    self, AckFields, CancelFields, Finish, GetFields, Hole, IdField, MetaFields, Reply,
};

/// Files that may be asked for and not stored yet. The server lets 64 wait, and may learn late that one of
/// them does so no more.
const WINDOW: usize = 48;
/// Bytes that may be asked for and not received yet, when there is more than one file. As much as a lane takes
/// in a round trip: larger files are better left to other lanes.
const AHEAD: u64 = 8 << 20;
/// What a file of unknown size counts as.
const UNTOLD: u64 = AHEAD / 4;
/// Silence of the server while it owes an answer.
pub(crate) const SILENCE: Duration = Duration::from_secs(60);
/// Bytes that any server hashes in a second: it is silent while it compares the local ranges with its file.
pub(crate) const HASHED: u64 = 20 << 20;
/// How often progress of a file is sent to the server.
pub(crate) const ACK: Duration = Duration::from_millis(250);
/// Lanes that may break one after the other, on sockets that live, without a file moving.
pub(crate) const BREAKS: u32 = 5;

/// What a lane has to say beside asking for files.
#[derive(Debug, Clone, Copy)]
enum Say {
    Done { id: u64 },
    Cancel { id: u64 },
    Ack { id: u64, recv: u64 },
}

/// A file that was asked for, seen from where it is stored: tells its lane the outcome, if that still lives.
#[derive(Debug)]
pub(super) struct Asked {
    id: u64,
    /// Weak: the lane owns its files, and a lane that is dropped drops them.
    flight: Weak<Flight>,
}

impl Asked {
    /// The file is stored.
    pub(super) fn stored(self) {
        self.tell(Say::Done { id: self.id });
    }

    /// The file is not, and will not be, by what comes on this lane.
    pub(super) fn given_up(self) {
        self.tell(Say::Cancel { id: self.id });
    }

    fn tell(&self, say: Say) {
        if let Some(flight) = self.flight.upgrade() {
            flight.settled(self.id, say);
        }
    }
}

/// The files of one lane, shared with the workers that store them.
#[derive(Debug)]
struct Flight {
    files: Mutex<BTreeMap<u64, File>>,
    changed: Notify,
    say: mpsc::UnboundedSender<Say>,
    /// An `ack` waits to be said: one is enough.
    acked: AtomicBool,
    /// The highest id asked for so far.
    last: AtomicU64,
}

#[derive(Debug)]
struct File {
    /// `None` once all of it has come.
    incoming: Option<Incoming<Arriving>>,
    /// The server was asked.
    asked: bool,
    /// The server has begun to send it.
    begun: bool,
    /// Bytes that the server must compare first.
    have: u64,
    /// The file's size and the bytes that are still to come, as far as known.
    size: u64,
    left: u64,
}

impl Flight {
    fn settled(&self, id: u64, say: Say) {
        let known = lock(&self.files).remove(&id);
        if known.is_some_and(|file| file.asked) {
            let _ = self.say.send(say);
        }
        self.changed.notify_waiters();
    }

    /// Whether another file may be asked for.
    fn has_room(&self) -> bool {
        let files = lock(&self.files);
        let left = files
            .values()
            .filter(|file| file.incoming.is_some())
            .fold(0_u64, |sum, file| sum.saturating_add(file.left));
        files.len() < WINDOW && left < AHEAD
    }

    /// How long the server may be silent; `None` when it owes nothing.
    fn patience(&self) -> Option<Duration> {
        let files = lock(&self.files);
        let mut owed = files
            .values()
            .filter(|file| file.asked && file.incoming.is_some())
            .peekable();
        owed.peek()?;
        let have = owed.fold(0_u64, |sum, file| sum.saturating_add(file.have));
        Some(SILENCE + Duration::from_secs(have / HASHED))
    }

    /// Waits until another file may be asked for.
    async fn room(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.has_room() {
                return;
            }
            changed.await;
        }
    }
}

/// Runs lanes, one after the other when they are lost, until every file has its outcome.
pub(super) async fn run(
    context: Arc<Context>,
    link: Link,
    notes: mpsc::UnboundedSender<Note>,
    events: mpsc::Sender<Event>,
) {
    let link = &link;
    let mut breaks = 0;
    // No connection before there is something to ask for.
    while context.queue.any().await {
        let connected = tokio::select! {
            biased;
            // Another path may have done all.
            () = context.queue.over(), if link.is_path() => return,
            connected = link.eager() => connected,
        };
        let socket = match connected {
            Ok(socket) => socket,
            Err(error) => {
                let rested = tokio::select! {
                    biased;
                    () = context.queue.over() => return,
                    rested = link.rests(&error) => rested,
                };
                if rested {
                    continue;
                }
                return failed(&context, &events, &error).await;
            }
        };
        let opening = socket.channel(CHANNEL).priority(Priority::Bulk).open();
        let (error, moved) = match opening.await {
            Ok(channel) => {
                let lane = Lane {
                    context: &context,
                    link,
                    notes: &notes,
                    socket: &socket,
                    channel: &channel,
                    current: None,
                    acked: Instant::now(),
                    moved: false,
                };
                match lane.run().await {
                    Ended::Orderly => return,
                    Ended::Broken { error, moved } => (error, moved),
                }
            }
            Err(error) => (error.into(), false),
        };
        tracing::debug!(%error, "a lane ended");
        match link.lost(&socket, error.again()).await {
            Ok(Loss::Lane) => breaks = if moved { 1 } else { breaks + 1 },
            Ok(Loss::Admission) => {}
            Err(error) => return failed(&context, &events, &error).await,
        }
        if breaks >= BREAKS {
            return failed(&context, &events, &error).await;
        }
    }
}

/// A lane has ended. The others continue with the queue; when the last one ends, the remaining files fail.
async fn failed(context: &Context, events: &mpsc::Sender<Event>, error: &TransferError) {
    if context.lanes.fetch_sub(1, Ordering::Relaxed) > 1 {
        return;
    }
    while let Some(job) = context.queue.next().await {
        context.failed(events, job, error.again()).await;
        context.queue.settled();
    }
}

/// Ends a file that will not come. What there is of it is kept where trying again makes sense.
fn fail(incoming: Incoming<Arriving>, error: TransferError) {
    incoming.end(!error.retry(), |file| file.ended(End::Failed(error)));
}

/// What comes of a file.
enum Content {
    Bytes(Bytes),
    Hole(Hole),
}

/// How a lane ended.
enum Ended {
    /// There is nothing more to do.
    Orderly,
    Broken {
        error: TransferError,
        /// It has brought something.
        moved: bool,
    },
}

/// One channel's life.
struct Lane<'a> {
    context: &'a Arc<Context>,
    link: &'a Link,
    notes: &'a mpsc::UnboundedSender<Note>,
    socket: &'a Socket,
    channel: &'a Channel,
    /// The file that is being sent to us.
    current: Option<u64>,
    /// When progress of a file was last sent to the server.
    acked: Instant,
    moved: bool,
}

impl Lane<'_> {
    async fn run(mut self) -> Ended {
        let (say, said) = mpsc::unbounded_channel();
        let flight = Arc::new(Flight {
            files: Mutex::default(),
            changed: Notify::new(),
            say,
            acked: AtomicBool::new(false),
            last: AtomicU64::new(0),
        });
        let asking = Asking {
            context: self.context,
            notes: self.notes,
            channel: self.channel,
            flight: &flight,
            said,
            measure: Measure::new(self.channel.stats().wire_received),
        };
        let (channel, link, socket) = (self.channel, self.link, self.socket);
        let owed = || flight.patience().is_some();
        let probe = || {
            if !flight.acked.swap(true, Ordering::Relaxed) {
                let id = flight.last.load(Ordering::Relaxed);
                let _ = flight.say.send(Say::Ack { id, recv: 0 });
            }
        };
        let error = {
            let mut asking = std::pin::pin!(asking.run());
            let mut receiving = std::pin::pin!(self.receive(&flight));
            tokio::select! {
                biased;
                error = &mut receiving => error,
                () = link.silent(socket, owed, probe) => {
                    TransferError::Closed(lane_end(channel, socket))
                }
                asked = &mut asking => match asked {
                    // Every file of the download has its outcome.
                    Ok(()) => {
                        drop(channel.close(CloseCode::NORMAL, ""));
                        return Ended::Orderly;
                    }
                    // The receiving half knows why.
                    Err(LaneOver) => receiving.await,
                },
            }
        };
        drop(channel.close(CloseCode::CANCELLED, "the lane failed"));
        // Of a socket that was never admitted the link has the last word.
        let admitted = self.socket.admitted().await.is_ok();
        let mends = !admitted || link.mends(&error);
        let left = std::mem::take(&mut *lock(&flight.files));
        for incoming in left.into_values().filter_map(|file| file.incoming) {
            if mends {
                incoming.end(false, |file| file.ended(End::Suspended));
            } else {
                fail(incoming, error.again());
            }
        }
        Ended::Broken {
            error,
            moved: self.moved,
        }
    }

    /// Takes what the server sends, until the lane breaks.
    async fn receive(&mut self, flight: &Flight) -> TransferError {
        // Since when the server has owed an answer and said nothing that helps.
        let mut since = Instant::now();
        loop {
            let mut changed = std::pin::pin!(flight.changed.notified());
            changed.as_mut().enable();
            let patience = flight.patience();
            if patience.is_none() {
                since = Instant::now();
            }
            let deadline = since + patience.unwrap_or(SILENCE);
            tokio::select! {
                () = changed => {}
                message = self.channel.recv() => {
                    let message = match message {
                        Ok(Some(message)) => message,
                        Ok(None) => return TransferError::Closed(lane_end(self.channel, self.socket)),
                        Err(error) => return error.into(),
                    };
                    match self.take(flight, &message).await {
                        Ok(true) => since = Instant::now(),
                        Ok(false) => {}
                        Err(text) => return TransferError::Protocol(text),
                    }
                }
                () = tokio::time::sleep_until(deadline), if patience.is_some() => {
                    return TransferError::Silent(SILENCE);
                }
            }
        }
    }

    /// Takes one message; says whether it brought something that was owed.
    async fn take(&mut self, flight: &Flight, message: &Message) -> Result<bool, String> {
        let reply = wire::decode_reply(message).map_err(|error| error.to_string())?;
        match reply {
            Some(Reply::File {
                id,
                size,
                meta,
                xattrs,
                ..
            }) => self.begin(flight, (id, size), meta, xattrs),
            Some(Reply::Chunk { id, offset, bytes }) => {
                let len = bytes.len() as u64;
                self.content(flight, id, offset, len, Content::Bytes(bytes))
                    .await
            }
            Some(Reply::Hole(hole)) => {
                let Hole { id, offset, len } = hole;
                self.content(flight, id, offset, len, Content::Hole(hole))
                    .await
            }
            Some(Reply::Finish(Finish {
                id,
                size: Some(size),
                hash: Some(hash),
            })) => {
                let incoming = match lock(&flight.files).get_mut(&id) {
                    Some(file) if self.current == Some(id) => file.incoming.take(),
                    Some(_) => return Err(format!("the end of file {id}, which is not open")),
                    None => None,
                };
                let Some(mut incoming) = incoming else {
                    return self.late(flight, id);
                };
                self.current = None;
                incoming.finish(Some(size), Some(hash), &mut self.context.gathered());
                flight.changed.notify_waiters();
                self.progressed();
                Ok(true)
            }
            Some(Reply::Error {
                id,
                code,
                why,
                message,
                retry,
            }) => {
                let file = {
                    let mut files = lock(&flight.files);
                    match files.get(&id) {
                        // Once all has come, the server has no more say.
                        Some(file) if !file.asked || file.incoming.is_none() => None,
                        _ => files.remove(&id),
                    }
                };
                let Some(file) = file else {
                    return self.late(flight, id);
                };
                if self.current == Some(id) {
                    self.current = None;
                }
                flight.changed.notify_waiters();
                if let Some(incoming) = file.incoming {
                    let error = TransferError::Refused {
                        code: Code::read(&code, why.as_deref()),
                        message,
                        retry,
                    };
                    fail(incoming, error);
                }
                Ok(true)
            }
            // A sign of life while it compares.
            Some(Reply::Ack { id, .. }) => Ok(lock(&flight.files).contains_key(&id)),
            Some(Reply::Finish(_)) => Err("finish without size and hash".to_owned()),
            // What belongs to uploads, or to a later version.
            Some(Reply::Ready { .. } | Reply::Done { .. }) | None => Ok(false),
        }
    }

    /// Takes bytes or a hole of the file that is being sent.
    async fn content(
        &mut self,
        flight: &Flight,
        id: u64,
        offset: u64,
        len: u64,
        content: Content,
    ) -> Result<bool, String> {
        let room = match lock(&flight.files).get(&id) {
            Some(File {
                incoming: Some(incoming),
                ..
            }) if self.current == Some(id) => incoming.room(),
            Some(_) => return Err(format!("a chunk of file {id}, which is not open")),
            None => return self.late(flight, id),
        };
        if matches!(content, Content::Bytes(_)) {
            self.context.limit.take(len).await;
            self.link.moved(len);
        }
        let Ok(room) = room.acquire_owned().await else {
            return Ok(false);
        };
        let recv = offset.saturating_add(len);
        if let Some(file) = lock(&flight.files).get_mut(&id)
            && let Some(incoming) = &file.incoming
        {
            file.left = file.size.saturating_sub(recv);
            let gathered = &mut self.context.gathered();
            match content {
                Content::Bytes(bytes) => incoming.write(Some(offset), bytes, room, gathered),
                Content::Hole(hole) => incoming.hole(hole, room, gathered),
            }
        }
        flight.changed.notify_waiters();
        self.progressed();
        let now = Instant::now();
        if now - self.acked >= ACK && !flight.acked.swap(true, Ordering::Relaxed) {
            self.acked = now;
            let _ = flight.say.send(Say::Ack { id, recv });
        }
        Ok(true)
    }

    fn begin(
        &mut self,
        flight: &Flight,
        (id, size): (u64, u64),
        meta: MetaFields,
        xattrs: Option<XattrList>,
    ) -> Result<bool, String> {
        let mut files = lock(&flight.files);
        if let Some(current) = self.current
            && files
                .get(&current)
                .is_some_and(|file| file.incoming.is_some())
        {
            return Err(format!("file {id} begins before file {current} has ended"));
        }
        match files.get_mut(&id) {
            Some(File {
                incoming: Some(incoming),
                asked: true,
                begun: begun @ false,
                size: told,
                left,
                ..
            }) => {
                *begun = true;
                (*told, *left) = (size, size);
                let meta = Meta::from(meta).kept(self.context.preserve, self.context.umask);
                let resume = incoming::is_resumed(size);
                let xattrs = match self.context.xattrs {
                    Xattrs::None => Some(XattrList::default()),
                    which => xattrs.map(|xattrs| xattrs.only(which)),
                };
                let mut gathered = self.context.gathered();
                incoming.open(size, meta, xattrs, resume, &mut gathered);
                self.current = Some(id);
                Ok(true)
            }
            Some(_) => Err(format!("file {id} begins twice or unasked")),
            None => {
                drop(files);
                self.late(flight, id)
            }
        }
    }

    /// A message about a file that has its outcome here is late; one about a file never asked for is wrong.
    fn late(&self, flight: &Flight, id: u64) -> Result<bool, String> {
        if (1..=flight.last.load(Ordering::Relaxed)).contains(&id) {
            Ok(false)
        } else {
            Err(format!("file {id} was not asked for"))
        }
    }

    fn progressed(&mut self) {
        self.moved = true;
        self.link.progressed();
    }
}

/// The channel takes no more.
struct LaneOver;

/// The sending half of a lane: it alone waits when the channel is full, so that arriving messages are taken
/// meanwhile.
struct Asking<'a> {
    context: &'a Arc<Context>,
    notes: &'a mpsc::UnboundedSender<Note>,
    channel: &'a Channel,
    flight: &'a Arc<Flight>,
    said: mpsc::UnboundedReceiver<Say>,
    measure: Measure,
}

impl Asking<'_> {
    /// Asks for file after file, until every file of the download has its outcome.
    async fn run(mut self) -> Result<(), LaneOver> {
        let (context, flight) = (self.context, self.flight);
        let mut id = 0;
        loop {
            let next = async {
                flight.room().await;
                // First the place, then the file: a file that is taken is in flight at once, and is not lost
                // when the lane is.
                let place = context.places.clone().acquire_owned().await.ok()?;
                Some((place, context.queue.next().await?))
            };
            let Some((place, job)) = self.meanwhile(next).await? else {
                while let Ok(say) = self.said.try_recv() {
                    self.say(say).await?;
                }
                return Ok(());
            };
            let held = Held::new(context, job);
            let sums = match &held.job {
                Some(job) => self.meanwhile(context.sums(job, self.pays())).await?,
                None => None,
            };
            let Some(job) = held.take() else {
                continue;
            };
            id += 1;
            let asked = Asked {
                id,
                flight: Arc::downgrade(flight),
            };
            let size = job.wanted.size.unwrap_or(UNTOLD);
            let wish = {
                // Held so that the worker cannot be done with the file before it is known here.
                let mut files = lock(&flight.files);
                let notes = self.notes.clone();
                let (incoming, wish) = incoming::prepare(
                    context,
                    job,
                    place,
                    asked,
                    notes,
                    sums,
                    &mut context.gathered(),
                );
                let file = File {
                    incoming: Some(incoming),
                    asked: false,
                    begun: false,
                    have: 0,
                    size,
                    left: size,
                };
                files.insert(id, file);
                wish
            };
            // Without a wish there is nothing to ask: it is here already, or cannot be stored.
            if let Ok(wish) = self.meanwhile(wish).await? {
                self.ask(id, wish).await?;
            }
        }
    }

    /// Whether what is here is worth comparing.
    fn pays(&self) -> bool {
        let stats = self.channel.stats();
        let rate = self.measure.rate(stats.wire_received);
        let limited = self.context.limit.rate().is_some();
        self.context.delta.pays(stats.rtt, limited, rate)
    }

    async fn ask(&self, id: u64, Wish { remote, mut have }: Wish) -> Result<(), LaneOver> {
        let room = self
            .channel
            .frame_limit()
            .saturating_sub(remote.as_str().len());
        have.truncate(wire::ranges_within(room));
        match lock(&self.flight.files).get_mut(&id) {
            Some(file) => {
                file.asked = true;
                file.have = have.iter().fold(0, |sum, (_, len, _)| sum + len);
            }
            None => return Ok(()),
        }
        self.flight.last.store(id, Ordering::Relaxed);
        self.flight.changed.notify_waiters();
        let xattrs = self.context.xattrs;
        let word = xattrs.to_string();
        let fields = GetFields {
            id,
            path: remote.as_str(),
            have: wire::ranges(&have),
            // A server that knows sends no faster; one that does not is held back by its window.
            rate: self.context.limit.rate(),
            holes: true,
            xattrs: (xattrs != Xattrs::None).then_some(&word),
        };
        self.send("get", &fields).await
    }

    /// Sends pending messages while it waits for something.
    async fn meanwhile<T>(&mut self, wait: impl Future<Output = T>) -> Result<T, LaneOver> {
        let mut wait = std::pin::pin!(wait);
        loop {
            tokio::select! {
                biased;
                Some(say) = self.said.recv() => self.say(say).await?,
                done = &mut wait => return Ok(done),
            }
        }
    }

    async fn say(&self, say: Say) -> Result<(), LaneOver> {
        match say {
            Say::Done { id } => self.send("done", &IdField { id }).await,
            Say::Cancel { id } => self.send("cancel", &CancelFields { id, keep: false }).await,
            Say::Ack { id, recv } => {
                self.flight.acked.store(false, Ordering::Relaxed);
                self.send("ack", &AckFields { id, recv, safe: 0 }).await
            }
        }
    }

    async fn send<T: serde::Serialize + Sync>(
        &self,
        event: &str,
        data: &T,
    ) -> Result<(), LaneOver> {
        let sent = self.channel.send(event, data).await;
        sent.map_err(|_| LaneOver)
    }
}
