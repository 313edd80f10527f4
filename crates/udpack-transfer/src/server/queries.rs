//! The requests of a lane: what is there, what it hashes to, and its removal. Those about tokens are passed on.

use std::sync::Arc;

use serde::ser::SerializeTuple as _;
use serde::{Serialize, Serializer};
use tracing::Instrument as _;
use udpack::{Channel, Fault, FieldError, Message, SendError, Tenant};

use crate::base::code::Code;
use crate::base::names;
use crate::base::sums::{self, Cutter, Cutting};
use crate::server::hook::{Access, Hook, HookAccess};
use crate::server::places::{self, Places};
use crate::server::scope::Scope;
use crate::server::sharing::{Answer, Asked, Sharing};
use crate::staging::target::{Target, TargetFile};
use crate::store::{Entry, Kind, List, Page, StoreError, check_target};
use crate::wire::{Bin, Hash};

/// Entries of one page where the client does not say.
const PAGE: u64 = 1_000;

/// Answers requests about what is there.
#[derive(Clone)]
pub(crate) struct Queries {
    pub(crate) target: Target,
    pub(crate) places: Places,
    pub(crate) hook: Option<Arc<dyn Hook>>,
    pub(crate) sharing: Option<Sharing>,
}

/// What is asked.
enum Query {
    Stat(String),
    List {
        path: String,
        recursive: bool,
        after: Option<String>,
        limit: u64,
        /// The client reads rows.
        rows: bool,
    },
    Remove {
        path: String,
        recursive: bool,
    },
    Hash(String),
    Chunks {
        path: String,
        cutter: Cutter,
        from: u64,
        to: u64,
        limit: u64,
    },
}

impl Query {
    fn read(message: &Message) -> Result<Option<Self>, FieldError> {
        let fields = message.fields()?;
        let path = || names::field(&fields, "path");
        let path_or_root = || {
            let path = names::opt_field(&fields, "path")?;
            Ok::<_, FieldError>(path.unwrap_or_default())
        };
        let recursive = || {
            let recursive = fields.opt_bool("recursive")?;
            Ok::<_, FieldError>(recursive.unwrap_or(false))
        };
        Ok(Some(match message.event() {
            "stat" => Self::Stat(path_or_root()?),
            "list" => Self::List {
                path: path_or_root()?,
                recursive: recursive()?,
                after: names::opt_field(&fields, "after")?,
                limit: fields.opt_u64("limit")?.unwrap_or(PAGE),
                rows: fields.opt_bool("rows")?.unwrap_or(false),
            },
            "remove" => Self::Remove {
                path: path()?,
                recursive: recursive()?,
            },
            "hash" => Self::Hash(path()?),
            "chunks" => Self::Chunks {
                path: path()?,
                cutter: Cutter::new(fields.u64("average")?).ok_or(FieldError::WrongType {
                    key: "average",
                    expected: "a power of two from 4096 to 4194304",
                })?,
                from: fields.opt_u64("from")?.unwrap_or(0),
                to: fields.opt_u64("to")?.unwrap_or(u64::MAX),
                limit: fields.opt_u64("limit")?.unwrap_or(CHUNKS),
            },
            _ => return Ok(None),
        }))
    }
}

impl Query {
    /// With no more chunks than a frame of this size holds.
    fn within(mut self, frame: usize) -> Self {
        if let Self::Chunks { limit, .. } = &mut self {
            let room = frame.saturating_sub(PAGE_BYTES) / sums::ENTRY;
            *limit = (*limit).min(room as u64).min(CHUNKS);
        }
        self
    }

    /// Whether the client's token has the right to ask this.
    fn right(&self, scope: &Scope) -> Result<(), Fault> {
        let (right, allowed) = match self {
            Self::Remove { .. } => ("delete", scope.delete),
            _ => ("read", scope.read),
        };
        if allowed {
            return Ok(());
        }
        let (code, message) = Scope::no_right(right);
        Err(Fault::new(code.as_str(), message))
    }

    /// What the operator is asked; `None` where the name is none, which is refused anyway.
    fn access(&self, scope: &Scope, channel: &Channel) -> Option<HookAccess> {
        let (path, access) = match self {
            Self::Stat(path) => (scope.inside_or_root(path), Access::List),
            Self::List { path, .. } => (scope.inside_or_root(path), Access::List),
            Self::Remove { path, .. } => (scope.inside(path).map(Some), Access::Remove),
            Self::Hash(path) | Self::Chunks { path, .. } => {
                (scope.inside(path).map(Some), Access::Read)
            }
        };
        let path = path.ok()?;
        Some(HookAccess {
            path: path.map_or_else(String::new, |path| path.as_str().to_owned()),
            access,
            peer: channel
                .peer()
                .map_or_else(String::new, |peer| peer.id().to_owned()),
        })
    }
}

impl Queries {
    /// Answers one request, whatever it is, when this tenant has its turn. Cancel safe in that a removal that has begun
    /// goes on.
    pub(crate) async fn answer(
        &self,
        channel: &Channel,
        message: &Message,
        scope: &Scope,
        tenant: &Tenant,
    ) -> Result<(), SendError> {
        if Asked::is_one(message.event()) {
            return match self.of_tokens(channel, message, scope, tenant).await {
                Ok(told) => channel.reply(message, &told).await,
                Err(fault) => channel.fault(message, &fault).await,
            };
        }
        if !matches!(
            message.event(),
            "stat" | "list" | "remove" | "hash" | "chunks"
        ) {
            let fault = Fault::new(Fault::NO_HANDLER, "no such request on a transfer channel");
            return channel.fault(message, &fault).await;
        }
        let query = match Query::read(message) {
            Ok(Some(query)) => query.within(channel.frame_limit()),
            Ok(None) => return Ok(()),
            Err(error) => {
                let fault = Fault::new(Fault::BAD_PAYLOAD, error.to_string());
                return channel.fault(message, &fault).await;
            }
        };
        let pool = match &query {
            Query::Hash(_) | Query::Chunks { .. } => &self.places.hashes,
            _ => &self.places.requests,
        };
        let place = match pool.take(tenant).await {
            Ok(place) => place,
            Err(full) => {
                let fault = Fault::new(
                    places::TOO_MANY.as_str(),
                    places::too_many("requests", &full),
                );
                return channel.fault(message, &fault).await;
            }
        };
        let right = query.right(scope);
        if let (Some(hook), Ok(())) = (&self.hook, &right)
            && let Some(what) = query.access(scope, channel)
            && let Err(reason) = hook.allow(&what).await
        {
            return channel
                .fault(message, &Fault::new(Code::Forbidden.as_str(), reason))
                .await;
        }
        let (target, rights) = (self.target.clone(), scope.clone());
        let finding = async move {
            // Also when nobody waits for it any more.
            let _place = place;
            find(&target, &rights, query).await
        };
        // The log tells whose request it was.
        let found = self.target.run(finding.in_current_span()).await;
        let found = found.ok().flatten().unwrap_or_else(|| {
            let text = "the server failed to answer";
            Err(Fault::new(Fault::INTERNAL, text))
        });
        match found {
            Ok(Found::Entry(entry)) => {
                channel
                    .reply(message, &EntryFields::new(&entry, scope))
                    .await
            }
            Ok(Found::Page {
                entries,
                more,
                rows,
            }) => {
                let page = PageFields::within(channel.frame_limit(), &entries, more, rows, scope);
                if page.entries.is_empty() && !entries.is_empty() {
                    let text = "an entry is longer than the client's limit for frames";
                    return channel
                        .fault(message, &Fault::new(Code::Unsupported.as_str(), text))
                        .await;
                }
                match rows {
                    true => channel.reply(message, &RowsFields::new(&page)).await,
                    false => channel.reply(message, &page).await,
                }
            }
            Ok(Found::Removed { files, bytes }) => {
                channel
                    .reply(message, &RemovedFields { files, bytes })
                    .await
            }
            Ok(Found::Chunks { size, chunks, end }) => {
                let chunks = Bin(chunks);
                let fields = ChunksFields { size, end, chunks };
                channel.reply(message, &fields).await
            }
            Ok(Found::Hash { size, hash }) => {
                channel.reply(message, &HashFields { size, hash }).await
            }
            Err(mut fault) => {
                fault.message = scope.outside_of(&fault.message).into_owned();
                channel.fault(message, &fault).await
            }
        }
    }
}

impl Queries {
    /// Answers what is asked about tokens, on a thread that may block. What it changes it changes also when nobody waits.
    async fn of_tokens(
        &self,
        channel: &Channel,
        message: &Message,
        scope: &Scope,
        tenant: &Tenant,
    ) -> Result<Answer, Fault> {
        let asked = Asked::read(message)
            .map_err(|error| Fault::new(Fault::BAD_PAYLOAD, error.to_string()))?;
        let place = self.places.requests.take(tenant).await.map_err(|full| {
            let text = places::too_many("requests", &full);
            Fault::new(places::TOO_MANY.as_str(), text)
        })?;
        let (sharing, target) = (self.sharing.clone(), self.target.clone());
        let (scope, peer) = (scope.clone(), channel.peer());
        let span = tracing::Span::current();
        let telling = tokio::task::spawn_blocking(move || {
            let _place = place;
            let _span = span.enter();
            asked.answer(sharing.as_ref(), &target, &scope, peer.as_ref())
        });
        let failed = |_| Err(Fault::new(Fault::INTERNAL, "the server failed to answer"));
        telling.await.unwrap_or_else(failed)
    }
}

enum Found {
    Entry(Entry),
    Page {
        entries: Vec<Entry>,
        more: bool,
        rows: bool,
    },
    Removed {
        files: u64,
        bytes: u64,
    },
    Hash {
        size: u64,
        hash: Hash,
    },
    Chunks {
        size: u64,
        chunks: Vec<u8>,
        end: u64,
    },
}

async fn find(target: &Target, scope: &Scope, query: Query) -> Result<Found, Fault> {
    query.right(scope)?;
    let found = look(target, scope, query).await;
    found.map_err(|error| Fault::new(error.code(), error.to_string()))
}

async fn look(target: &Target, scope: &Scope, query: Query) -> Result<Found, StoreError> {
    match query {
        Query::Stat(path) => {
            let path = scope.inside_or_root(&path)?;
            Ok(Found::Entry(target.stat(path.as_ref()).await?))
        }
        Query::List {
            path,
            recursive,
            after,
            limit,
            rows,
        } => {
            let path = scope.inside_or_root(&path)?;
            let after = match &after {
                None => None,
                Some(after) => Some(scope.inside(after)?),
            };
            let query = List {
                path: path.as_ref(),
                recursive,
                after: after.as_ref().map(|after| after.as_str()),
                limit: usize::try_from(limit).unwrap_or(usize::MAX),
            };
            let page = match target.list(&query).await {
                // A client's root is there, also before anything was stored below it.
                Err(StoreError::NotFound { .. }) if path == scope.prefix => Page {
                    entries: Vec::new(),
                    more: false,
                },
                page => page?,
            };
            Ok(Found::Page {
                entries: page.entries,
                more: page.more,
                rows,
            })
        }
        Query::Remove { path, recursive } => {
            let removed = target.remove(&scope.inside(&path)?, recursive).await?;
            tracing::info!(
                path = names::shown(&path),
                files = removed.files,
                bytes = removed.bytes,
                "removed"
            );
            Ok(Found::Removed {
                files: removed.files,
                bytes: removed.bytes,
            })
        }
        Query::Chunks {
            path,
            cutter,
            from,
            to,
            limit,
        } => {
            let file = target.read(&scope.inside(&path)?).await?;
            let (chunks, end) = cut(&file, cutter, from, to, limit).await?;
            let size = file.size();
            Ok(Found::Chunks { size, chunks, end })
        }
        Query::Hash(path) => {
            let file = target.read(&scope.inside(&path)?).await?;
            let hash = file.fingerprint().await?;
            Ok(Found::Hash {
                size: file.size(),
                hash: Bin(hash),
            })
        }
    }
}

/// Lists the chunks of a file that begin between these offsets, at most so many, and says where the list ends.
async fn cut(
    file: &TargetFile,
    cutter: Cutter,
    from: u64,
    to: u64,
    limit: u64,
) -> Result<(Vec<u8>, u64), StoreError> {
    let mut cutting = Cutting::new(cutter);
    let (mut list, mut read, mut end) = (Vec::new(), from, from);
    for _ in 0..limit {
        if end >= to {
            break;
        }
        while cutting.needs() {
            let count = file.read_into(read, cutting.room(BLOCK)).await?;
            if count == 0 {
                cutting.end();
            }
            read = read.saturating_add(count as u64);
            cutting.add(count);
        }
        let Some(chunk) = cutting.next() else { break };
        sums::write(&mut list, chunk);
        end = end.saturating_add(chunk.len() as u64);
    }
    Ok((list, end))
}

#[derive(Serialize)]
struct EntryFields<'a> {
    #[serde(serialize_with = "names::serialize")]
    path: &'a str,
    kind: &'static str,
    size: u64,
    mtime: i64,
    mtime_ns: u32,
    mode: u32,
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "names::serialize_opt"
    )]
    target: Option<&'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    unread: bool,
}

impl<'a> EntryFields<'a> {
    fn new(entry: &'a Entry, scope: &Scope) -> Self {
        let path = scope.outside(&entry.path);
        // Where a link leads out of the client's root is none of its business.
        let below = |target: &&str| {
            path.parse()
                .is_ok_and(|path| check_target(&path, target).is_ok())
        };
        Self {
            path,
            kind: match entry.kind {
                Kind::File => "file",
                Kind::Dir => "dir",
                Kind::Link => "link",
                Kind::Other => "other",
            },
            size: entry.size,
            mtime: entry.mtime.secs,
            mtime_ns: entry.mtime.nanos,
            mode: entry.mode,
            target: entry.target.as_deref().filter(below),
            unread: entry.unread,
        }
    }
}

#[derive(Serialize)]
struct PageFields<'a> {
    entries: Vec<EntryFields<'a>>,
    more: bool,
}

impl<'a> PageFields<'a> {
    /// As many of the entries as a frame of this size holds; `more` says whether there are others.
    fn within(frame: usize, entries: &'a [Entry], more: bool, rows: bool, scope: &Scope) -> Self {
        let mut room = frame.saturating_sub(PAGE_BYTES);
        let beside = if rows { ROW_BYTES } else { ENTRY_BYTES };
        let mut page = Self {
            entries: Vec::new(),
            more,
        };
        for entry in entries {
            let fields = EntryFields::new(entry, scope);
            let bytes = beside + fields.path.len() + fields.target.map_or(0, str::len);
            if bytes > room {
                page.more = true;
                break;
            }
            room -= bytes;
            page.entries.push(fields);
        }
        page
    }
}

/// The same page with each directory named once, and without names of fields.
#[derive(Serialize)]
struct RowsFields<'a> {
    dirs: Vec<(Name<'a>, Rows<'a>)>,
    more: bool,
}

impl<'a> RowsFields<'a> {
    fn new(page: &'a PageFields<'_>) -> Self {
        let same = |a: &EntryFields<'_>, b: &EntryFields<'_>| split(a.path).0 == split(b.path).0;
        let groups = page.entries.chunk_by(same);
        Self {
            dirs: groups
                .map(|rows| {
                    let dir = rows.first().map_or("", |row| split(row.path).0);
                    (Name(dir), Rows(rows))
                })
                .collect(),
            more: page.more,
        }
    }
}

/// The directory of a path, and its last name.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

struct Name<'a>(&'a str);

impl Serialize for Name<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        names::serialize(self.0, serializer)
    }
}

/// Entries of one directory.
struct Rows<'a>(&'a [EntryFields<'a>]);

impl Serialize for Rows<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(Row))
    }
}

struct Row<'a>(&'a EntryFields<'a>);

impl Serialize for Row<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let entry = self.0;
        let more = usize::from(entry.target.is_some() || entry.unread) + usize::from(entry.unread);
        let mut row = serializer.serialize_tuple(6 + more)?;
        row.serialize_element(&Name(split(entry.path).1))?;
        row.serialize_element(entry.kind)?;
        row.serialize_element(&entry.size)?;
        row.serialize_element(&entry.mtime)?;
        row.serialize_element(&entry.mtime_ns)?;
        row.serialize_element(&entry.mode)?;
        if more > 0 {
            row.serialize_element(&entry.target.map(Name))?;
        }
        if more > 1 {
            row.serialize_element(&entry.unread)?;
        }
        row.end()
    }
}

#[derive(Serialize)]
struct ChunksFields {
    size: u64,
    end: u64,
    chunks: Bin<Vec<u8>>,
}

/// Chunks of one page, at most.
const CHUNKS: u64 = 32_768;
/// Bytes of a file that are read at once.
const BLOCK: usize = 256 << 10;
/// Bytes of a page beside its entries, at most.
const PAGE_BYTES: usize = 64;
/// Bytes of an entry beside its path and target, at most: eight keys and what they stand before.
const ENTRY_BYTES: usize = 104;
/// The same of a row, with its directory and the length of that.
const ROW_BYTES: usize = 64;

#[derive(Serialize)]
struct RemovedFields {
    files: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct HashFields {
    size: u64,
    hash: Hash,
}
