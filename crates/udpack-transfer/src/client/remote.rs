//! [`Remote`]: a client's requests about a server's directory, besides transfers. Every answer is checked before it is
//! used.

mod jobs;
mod order;
mod stats;
mod watching;
mod wire;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use udpack::{Channel, RequestError, SendError};

use crate::base::code::Code;
use crate::base::path::RelPath;
use crate::base::sums::{Cutter, ENTRY, Sums};
use crate::client::link::{Link, Loss};
use crate::local::base::Page;
use crate::local::error::TransferError;
use crate::store::{Entry, Removed};
use crate::wire::CHANNEL;
use order::Order;

pub use jobs::{Job, JobKind, JobState, Jobs, JobsEvent};
pub use stats::StatsWatch;
pub use wire::{Rights, ShareEntry, ShareWish, Shared};

/// Entries of the first page of a list, which somebody waits for, and of each further one.
const FIRST: usize = 512;
const PAGE: usize = 4_000;
/// Chunks of one part of a list of chunks, on average; parts that are cut at the same time; the longest chunks by which a part
/// goes on into the next one.
const PART: u64 = 2_048;
const PARTS: usize = 8;
const OVERLAP: u64 = 4;
/// How long the server may take to look something up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to read a whole file or to remove a tree. It sends nothing meanwhile; the connection's timers
/// detect a dead server.
const LONG: Duration = Duration::from_secs(24 * 3600);
/// How many times one request may be lost together with its channel.
const LOSSES: u32 = 8;

/// A server's directory, used through one channel. A handle: clones share the channel, and their requests run in
/// parallel.
///
/// A request that is lost with its connection is sent again on the next one, as long as the [`Link`] finds one.
#[derive(Clone)]
pub struct Remote {
    inner: Arc<Inner>,
}

struct Inner {
    link: Link,
    channel: Mutex<Option<Channel>>,
}

impl Remote {
    /// The directory of the server that this link leads to. Opens nothing yet.
    pub fn new(link: impl Into<Link>) -> Self {
        Self {
            inner: Arc::new(Inner {
                link: link.into(),
                channel: Mutex::new(None),
            }),
        }
    }

    /// The entry of this name; `None` is the root. Symbolic links are not followed.
    ///
    /// # Errors
    /// [`TransferError::Refused`] with `not_found` among others, and those of the connection.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the request.
    pub async fn stat(&self, path: Option<&RelPath>) -> Result<Entry, TransferError> {
        let asked = wire::PathField::new(path);
        let found: wire::Found = self.ask("stat", &asked, PATIENCE).await?;
        found.entry(path)
    }

    /// The entries below a directory; `None` is the root. If recursive, each directory comes before its entries. A file
    /// or a link is listed as itself.
    ///
    /// Nothing is requested before the first [`Listing::next`].
    pub fn list(&self, path: Option<&RelPath>, recursive: bool) -> Listing {
        Listing {
            remote: self.clone(),
            path: path.cloned(),
            recursive,
            order: Order::new(path, recursive),
            ready: VecDeque::new(),
            ahead: JoinSet::new(),
            asked: FIRST,
            state: State::Unasked,
        }
    }

    /// Removes a file, a link or an empty directory; with `recursive` a directory and everything in it.
    ///
    /// If the answer was lost with the connection and the name is gone afterwards, it counts as removed, with a count
    /// of zero.
    ///
    /// # Errors
    /// [`TransferError::Refused`] with `not_found`, `not_empty`, `forbidden` among others, and those of the
    /// connection.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the request; the server may still remove the entry.
    pub async fn remove(&self, path: &RelPath, recursive: bool) -> Result<Removed, TransferError> {
        let asked = wire::RemoveFields {
            path: path.as_str(),
            recursive,
        };
        let mut lost = false;
        match self
            .ask_noting::<_, wire::Gone>("remove", &asked, LONG, &mut lost)
            .await
        {
            Ok(gone) => Ok(gone.removed()),
            Err(TransferError::Refused { code, .. }) if lost && code == Code::NotFound => {
                Ok(Removed { files: 0, bytes: 0 })
            }
            Err(error) => Err(error),
        }
    }

    /// Size and BLAKE3 of a file, as the server reads it now. Takes as long as reading the file.
    ///
    /// # Errors
    /// As for [`stat`](Self::stat).
    ///
    /// # Cancel safety
    /// As for [`stat`](Self::stat).
    pub async fn hash(&self, path: &RelPath) -> Result<(u64, [u8; 32]), TransferError> {
        let asked = wire::PathField::new(Some(path));
        let hashed: wire::Hashed = self.ask("hash", &asked, LONG).await?;
        Ok((hashed.size, hashed.hash.0))
    }

    /// The first chunks of a file at the server, for a source of this size, and what fetches the others.
    pub(crate) async fn sums(
        &self,
        path: &RelPath,
        size: u64,
    ) -> Result<(Sums, Others), TransferError> {
        let cutter = Cutter::fit(size);
        let mut sums = Sums::new(cutter);
        let mut others = Others {
            remote: self.clone(),
            path: path.clone(),
            cutter,
            from: 0,
            size: u64::MAX,
        };
        let (list, size) = others.part(0, others.length()).await?;
        others.from = sums.read(0, &list).map_err(broken)?;
        others.size = size;
        Ok((sums, others))
    }

    /// The rights of this client's token.
    ///
    /// # Errors
    /// As for [`stat`](Self::stat); [`Code::Unsupported`] from a server that does not know this request.
    ///
    /// # Cancel safety
    /// As for [`stat`](Self::stat).
    pub async fn rights(&self) -> Result<Rights, TransferError> {
        let told: wire::RightsReply = self.ask("rights", &wire::Nothing {}, PATIENCE).await?;
        told.rights()
    }

    /// Makes a token for somebody else. It grants at most what this client may do. It ends when it is
    /// [revoked](Self::unshare), when it expires, or when this client's own token ends.
    ///
    /// If the answer is lost with the connection, the request is sent again. The server may then keep one share whose
    /// token nobody has.
    ///
    /// [`TransferError::Refused`] with `forbidden`, `quota`, `too_many_shares`, `bad_name` among others, with
    /// [`Code::Unsupported`] from a server that makes no shares; and those of the connection.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the request; the server may still make the share.
    pub async fn share(&self, wish: &ShareWish) -> Result<Shared, TransferError> {
        self.ask("share", &wire::ShareFields::of(wish), PATIENCE)
            .await
    }

    /// The shares that this client's token has made, without expired ones. The server does not know their tokens any
    /// more.
    ///
    /// # Errors
    /// As for [`share`](Self::share).
    ///
    /// # Cancel safety
    /// As for [`stat`](Self::stat).
    pub async fn shares(&self) -> Result<Vec<ShareEntry>, TransferError> {
        let told: wire::Shares = self.ask("shares", &wire::Nothing {}, PATIENCE).await?;
        told.shares
            .into_iter()
            .map(wire::ShareReply::entry)
            .collect()
    }

    /// Revokes a share by its name. Clients that use it are disconnected.
    ///
    /// # Errors
    /// As for [`share`](Self::share), and [`TransferError::Refused`] with `not_found`.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the request; the server may still revoke the share.
    pub async fn unshare(&self, name: &str) -> Result<(), TransferError> {
        self.ask("unshare", &wire::NameField { name }, PATIENCE)
            .await
    }

    /// Watches the server's transfers, as far as this client may see them.
    ///
    /// Nothing is requested before the first [`Jobs::next`].
    pub fn jobs(&self) -> Jobs {
        Jobs::new(self.inner.link.clone())
    }

    /// Watches the state of the server, for a client that may.
    ///
    /// Nothing is requested before the first [`StatsWatch::next`].
    pub fn stats(&self) -> StatsWatch {
        StatsWatch::new(self.inner.link.clone())
    }

    async fn ask<T, R>(
        &self,
        event: &'static str,
        data: &T,
        patience: Duration,
    ) -> Result<R, TransferError>
    where
        T: Serialize + Sync,
        R: DeserializeOwned + 'static,
    {
        self.ask_noting(event, data, patience, &mut false).await
    }

    /// Sends a request, if need be again, and records whether an answer was lost.
    async fn ask_noting<T, R>(
        &self,
        event: &'static str,
        data: &T,
        patience: Duration,
        lost: &mut bool,
    ) -> Result<R, TransferError>
    where
        T: Serialize + Sync,
        R: DeserializeOwned + 'static,
    {
        let mut losses = 0;
        loop {
            let channel = self.channel().await?;
            let answer = channel.request::<T, R>(event, data).timeout(patience).await;
            match answer.map_err(|error| failed(error, patience)) {
                Ok(reply) => {
                    self.inner.link.progressed();
                    return Ok(reply);
                }
                Err(error @ TransferError::Closed(_)) => {
                    self.forget(&channel).await;
                    *lost = true;
                    if losses + 1 >= LOSSES {
                        return Err(error);
                    }
                    if self.inner.link.lost(&channel.socket(), error).await? == Loss::Lane {
                        losses += 1;
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The channel for requests: the open one, or a new one.
    async fn channel(&self) -> Result<Channel, TransferError> {
        let mut open = self.inner.channel.lock().await;
        if let Some(channel) = open.as_ref().filter(|open| open.close_reason().is_none()) {
            return Ok(channel.clone());
        }
        *open = None;
        let channel = open_eager(&self.inner.link, CHANNEL).await?;
        *open = Some(channel.clone());
        Ok(channel)
    }

    async fn forget(&self, lost: &Channel) {
        let mut open = self.inner.channel.lock().await;
        if open.as_ref().is_some_and(|open| open.id() == lost.id()) {
            *open = None;
        }
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").finish_non_exhaustive()
    }
}

/// Fetches the chunks of a file behind the first ones. Several parts of the file are cut at the same time.
#[derive(Debug)]
pub(crate) struct Others {
    remote: Remote,
    path: RelPath,
    cutter: Cutter,
    /// Where they begin.
    from: u64,
    /// The size of the file.
    size: u64,
}

impl Others {
    /// The length of a part.
    fn length(&self) -> u64 {
        self.cutter.average() * PART
    }

    /// All chunks: these and the others. No more than a comparison uses.
    pub(crate) async fn all(self, mut sums: Sums) -> Result<Sums, TransferError> {
        let mut parts = std::pin::pin!(self.parts());
        while let Some(part) = parts.next().await {
            let (from, list) = part?;
            if sums.is_full() {
                break;
            }
            sums.read(from, &list).map_err(broken)?;
        }
        Ok(sums)
    }

    /// Gives each part, in order, until one fails or nobody takes it.
    pub(crate) async fn give(&self, pages: mpsc::Sender<Page>) {
        let mut parts = std::pin::pin!(self.parts());
        while let Some(part) = parts.next().await {
            match part {
                Ok(page) => {
                    if pages.send(page).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    let path = self.path.as_str();
                    tracing::debug!(%error, path, "no more chunks to compare with");
                    return;
                }
            }
        }
    }

    /// The parts in order, each with its offset. A part goes on a little into the next one: where cutting begins in the
    /// middle, the first chunks are not those of the whole file.
    fn parts(&self) -> impl Stream<Item = Result<Page, TransferError>> + use<'_> {
        let length = self.length();
        let mut from = self.from;
        let starts = std::iter::from_fn(move || {
            let start = from;
            from = from.saturating_add(length);
            (start < self.size).then_some(start)
        });
        let overlap = self.cutter.longest() as u64 * OVERLAP;
        let parts = starts.map(move |from| async move {
            let to = from.saturating_add(length + overlap);
            let (list, size) = self.part(from, to).await?;
            match size == self.size {
                true => Ok((from, list)),
                false => Err(broken("the file has another size than before")),
            }
        });
        futures_util::stream::iter(parts).buffered(PARTS)
    }

    /// The list of the chunks between these offsets, and the size of the file.
    async fn part(&self, from: u64, to: u64) -> Result<(Vec<u8>, u64), TransferError> {
        let (mut list, mut at) = (Vec::new(), from);
        let most = to.saturating_sub(from) / self.cutter.shortest() as u64 + 2;
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        loop {
            let asked = wire::ChunksFields {
                path: self.path.as_str(),
                average: self.cutter.average(),
                from: at,
                to,
            };
            let page: wire::Chunks = self.remote.ask("chunks", &asked, LONG).await?;
            let mut one = Sums::new(self.cutter);
            let end = one.read(at, &page.chunks.0).map_err(broken)?;
            if end != page.end || end > page.size {
                return Err(broken("a list of chunks does not end where it says"));
            }
            list.extend_from_slice(&page.chunks.0);
            if list.len() / ENTRY > most {
                return Err(broken("a list has more chunks than fit into that part"));
            }
            if end >= to.min(page.size) {
                return Ok((list, page.size));
            }
            if end == at {
                return Err(broken("an empty list of chunks is said to have more"));
            }
            at = end;
        }
    }
}

/// Opens a channel without waiting for `$welcome`.
async fn open_eager(link: &Link, name: &str) -> Result<Channel, TransferError> {
    loop {
        let socket = link.eager().await?;
        let error = match socket.open(name).await {
            Ok(channel) => return Ok(channel),
            Err(error) => TransferError::from(error),
        };
        if link.lost(&socket, error.again()).await? == Loss::Lane {
            return Err(error);
        }
    }
}

/// The error of a request as one of a transfer.
fn failed(error: RequestError, patience: Duration) -> TransferError {
    match error {
        // The deadline passed, at this side or at the server.
        error if error.is_timeout() => TransferError::Silent(patience),
        RequestError::Fault(fault) => {
            let code = Code::read(&fault.code, None);
            TransferError::Refused {
                code,
                message: crate::wire::printable(&fault.message),
                // A `$fault` does not contain this.
                retry: code.retry(),
            }
        }
        RequestError::NoHandler => TransferError::Refused {
            code: Code::Unsupported,
            message: "the server does not know this request".to_owned(),
            retry: false,
        },
        RequestError::Cancelled => TransferError::Refused {
            retry: true,
            code: Code::Cancelled,
            message: "the server gave the request up".to_owned(),
        },
        RequestError::Closed(reason) | RequestError::Send(SendError::Closed(reason)) => {
            TransferError::Closed(reason)
        }
        other => TransferError::Protocol(other.to_string()),
    }
}

fn broken(text: impl Into<String>) -> TransferError {
    TransferError::Protocol(text.into())
}

/// The entries of a directory, page by page. One page is fetched ahead.
///
/// # Drop
/// Cancels the pending request.
#[derive(Debug)]
pub struct Listing {
    remote: Remote,
    path: Option<RelPath>,
    recursive: bool,
    order: Order,
    ready: VecDeque<Entry>,
    /// A page, and whether there are more.
    ahead: JoinSet<Result<(Vec<Entry>, bool), TransferError>>,
    /// Entries that were requested last.
    asked: usize,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unasked,
    Fetching,
    Over,
}

impl Listing {
    /// The next entry; `None` after the last one. Nothing follows an error.
    ///
    /// Every entry has been checked: its path is a [`RelPath`] below the requested directory and sorts after the
    /// previous one, and its directory has been listed.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Entry, TransferError>> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Some(Ok(entry));
            }
            match self.state {
                State::Over => return None,
                State::Unasked => self.fetch(None),
                State::Fetching => {}
            }
            let page = match self.ahead.join_next().await {
                Some(Ok(page)) => page,
                Some(Err(_)) | None => Err(broken("the request for a list was dropped")),
            };
            if let Err(error) = page.and_then(|page| self.take(page)) {
                self.state = State::Over;
                self.ready.clear();
                self.ahead.abort_all();
                return Some(Err(error));
            }
        }
    }

    fn take(&mut self, (entries, more): (Vec<Entry>, bool)) -> Result<(), TransferError> {
        for entry in &entries {
            self.order.check(entry)?;
        }
        self.ready = entries.into();
        if !more {
            self.state = State::Over;
            return Ok(());
        }
        let Some(last) = self.ready.back().map(|entry| entry.path.clone()) else {
            return Err(broken("an empty page of a list is said to have more"));
        };
        self.asked = PAGE;
        self.fetch(Some(last));
        Ok(())
    }

    fn fetch(&mut self, after: Option<String>) {
        self.state = State::Fetching;
        let (remote, path, recursive) = (self.remote.clone(), self.path.clone(), self.recursive);
        let most = self.asked;
        self.ahead.spawn(async move {
            let asked = wire::ListFields {
                path: path.as_ref().map(RelPath::as_str),
                recursive,
                after: after.as_deref(),
                limit: most as u64,
                rows: true,
            };
            let page: wire::Page = remote.ask("list", &asked, PATIENCE).await?;
            let more = page.more;
            Ok((page.listed(most)?, more))
        });
    }
}
