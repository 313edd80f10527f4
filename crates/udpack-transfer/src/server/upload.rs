//! Whom the server receives a file for: one client, its run, the operator's hook.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;
use tracing::Span;
use udpack::Place;

use crate::base::code::Code;
use crate::base::path::RelPath;
use crate::base::phase::Phase;
use crate::server::hook::{Hook, HookStored, HookWhole};
use crate::server::jobs::JobNotes;
use crate::server::places::Slot;
use crate::server::writers::{Pulse, UploadKey, Writer, Writers};
use crate::staging::file::{First, Gathered, Incoming, Plan, Recipient, Whole};
use crate::staging::publisher::Staging;
use crate::staging::target::{Target, TargetWhole};
use crate::store::{IfExists, Published, StoreError, Tenant};
use crate::wire::{Have, Offer};

/// Size from which on a file is a large one: the store puts those on disk by themselves.
const SMALL: u64 = 1 << 20;

/// What the disk found, for the lane to tell the client.
#[derive(Debug)]
pub(crate) enum Outcome {
    Ready {
        id: u64,
        have: Have,
        base: Option<u64>,
    },
    Done {
        id: u64,
        published: Published,
    },
    Error {
        id: u64,
        code: Code,
        message: String,
        retry: bool,
    },
    /// It was cancelled by its owner or an admin.
    Cancelled {
        id: u64,
    },
    /// A download is under way, or has failed and the client was notified.
    Sent {
        id: u64,
        failed: Option<Code>,
    },
}

impl Outcome {
    pub(crate) fn failed(id: u64, error: &StoreError) -> Self {
        Self::Error {
            id,
            code: error.refusal(),
            message: error.to_string(),
            retry: error.retry(),
        }
    }
}

/// Where the outcomes of a lane's files go.
pub(crate) type Outcomes = mpsc::UnboundedSender<Outcome>;

/// What all uploads of one server share. A handle.
#[derive(Clone)]
pub(crate) struct Uploads {
    staging: Staging<Upload>,
    writers: Writers,
    hook: Option<Arc<dyn Hook>>,
}

/// An offer that is to become a file.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) offer: Offer,
    /// The name in the store.
    pub(crate) path: RelPath,
    /// What the offer calls its base, in the store, where the client may read it.
    pub(crate) base: Option<RelPath>,
    /// Whose it is.
    pub(crate) owner: Arc<str>,
    pub(crate) tenant: Option<Tenant>,
    /// Names the upload within its client's run.
    pub(crate) key: Option<UploadKey>,
    /// What that run has stored under this name before: nothing else may come under it.
    pub(crate) known: Option<Published>,
    /// The right to write it, where it can be resumed.
    pub(crate) writer: Option<Writer>,
    /// All of it, where it came with the offer.
    pub(crate) whole: Option<Whole>,
    /// The socket it comes by, for the log: threads that many files share write it.
    pub(crate) span: Span,
}

impl Uploads {
    pub(crate) fn new(target: Target, writers: Writers) -> Self {
        Self {
            staging: Staging::new(target),
            writers,
            hook: None,
        }
    }

    /// Asks this hook about every file that is whole, and tells it of every one that is stored, whether or not its client
    /// still listens.
    pub(crate) fn hook(mut self, hook: Arc<dyn Hook>) -> Self {
        self.hook = Some(hook);
        self
    }

    pub(crate) fn target(&self) -> &Target {
        self.staging.target()
    }

    pub(crate) fn writers(&self) -> &Writers {
        &self.writers
    }

    /// Small files of one lane, to be handed over together.
    pub(crate) fn gathered(&self) -> Gathered<Upload> {
        self.staging.gathered()
    }

    /// Begins a file: the first step looks at the name and the space, and is the last of one that came whole.
    pub(crate) fn begin(
        &self,
        task: Task,
        slot: Slot,
        notes: JobNotes,
        outcomes: Outcomes,
        gathered: &mut Gathered<Upload>,
    ) -> Incoming<Upload> {
        let Task { offer, writer, .. } = task;
        let Slot { file, check } = slot;
        // No large file is synced for a small one, and none is read.
        let asks = offer.resume || offer.if_exists == IfExists::Skip;
        let small = !asks && offer.size.is_some_and(|size| size < SMALL);
        let upload = Upload {
            uploads: self.clone(),
            path: task.path.clone(),
            owner: task.owner.clone(),
            key: task.key,
            since: Instant::now(),
            small,
            notes,
            span: task.span,
            file: Some(file),
            leaving: Leaving {
                id: offer.id,
                outcomes,
                writer: writer.map(Box::new),
            },
        };
        let plan = Plan {
            path: task.path,
            peer: task.owner,
            size: offer.size,
            meta: offer.meta.into(),
            xattrs: offer.xattrs,
            if_exists: offer.if_exists,
            resume: offer.resume,
            tenant: task.tenant,
            dirs: offer.dirs,
            known: task.known,
            base: task.base,
            sums: None,
            small,
            leaving: upload.leaving.pulse().map(|pulse| pulse.leaving()),
        };
        let first = task.whole.map_or(First::Look(check), First::Whole);
        Incoming::begin(&self.staging, plan, upload, first, gathered)
    }
}

impl std::fmt::Debug for Uploads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uploads").finish_non_exhaustive()
    }
}

/// One upload, as the server sees it.
#[derive(Debug)]
pub(crate) struct Upload {
    uploads: Uploads,
    path: RelPath,
    owner: Arc<str>,
    key: Option<UploadKey>,
    since: Instant,
    small: bool,
    notes: JobNotes,
    span: Span,
    /// Its place among the files that are open.
    file: Option<Place>,
    leaving: Leaving,
}

/// The right to write an upload, and the word that it has ended.
#[derive(Debug)]
struct Leaving {
    id: u64,
    outcomes: Outcomes,
    writer: Option<Box<Writer>>,
}

impl Leaving {
    fn pulse(&self) -> Option<Pulse> {
        self.writer.as_ref().map(|writer| writer.pulse())
    }

    /// The last that is told of it.
    fn tell(&mut self, outcome: Outcome) {
        // Who hears of it may offer it again at once, and who waits to write it must find the outcome.
        self.writer = None;
        // Nobody listens any more once the lane is gone; the file is stored all the same.
        let _ = self.outcomes.send(outcome);
    }

    fn broken(&mut self) {
        let outcome = Outcome::Error {
            id: self.id,
            code: Code::Internal,
            message: "the server failed to store the file".to_owned(),
            retry: true,
        };
        self.tell(outcome);
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.broken();
        }
    }
}

impl Recipient for Upload {
    const DOWNLOADS: bool = false;

    fn phase(&self, phase: Phase) {
        self.notes.phase(phase);
    }

    fn wrote(&mut self, _skipped: u64, _len: u64, position: u64) {
        self.notes.bytes(position);
    }

    fn ready(&mut self, have: Have, base: Option<u64>) {
        let id = self.leaving.id;
        let ready = Outcome::Ready { id, have, base };
        let _ = self.leaving.outcomes.send(ready);
    }

    fn was_there(mut self, published: Published) {
        if published.same {
            let (path, bytes) = (&published.path, published.size);
            let told = || tracing::info!(path, bytes, "was there already");
            self.span.in_scope(told);
        }
        let id = self.leaving.id;
        self.leaving.tell(Outcome::Done { id, published });
    }

    async fn complete(
        mut self,
        staging: &Staging<Self>,
        complete: TargetWhole,
        size: u64,
        _skipped: u64,
    ) {
        let file = self.file.take();
        match self.uploads.hook.clone() {
            Some(hook) => {
                let whole = HookWhole {
                    path: self.path.as_str().to_owned(),
                    file: complete.staged_at(staging.target()),
                    size,
                    peer: self.owner.to_string(),
                };
                self.verify(staging.clone(), hook, whole, complete, file);
            }
            None => {
                let small = self.small;
                staging.publish(complete, self, small).await;
            }
        }
    }

    fn stored(mut self, stored: Result<Published, StoreError>) {
        let id = self.leaving.id;
        let _logged = self.span.clone().entered();
        let outcome = match stored {
            Ok(published) => {
                tracing::info!(
                    path = published.path,
                    bytes = published.size,
                    secs = self.since.elapsed().as_secs_f64(),
                    same = published.same,
                    "stored"
                );
                if let Some(key) = self.key {
                    self.uploads.writers.ended(key, &published);
                }
                if let Some(hook) = &self.uploads.hook
                    && !published.same
                {
                    hook.done(HookStored {
                        file: self.uploads.target().stored_at(&published.path),
                        path: published.path.clone(),
                        size: published.size,
                        hash: published.hash,
                        peer: self.owner.to_string(),
                    });
                }
                Outcome::Done { id, published }
            }
            Err(error) => {
                tracing::info!(code = error.code(), "upload refused: {error}");
                Outcome::failed(id, &error)
            }
        };
        self.leaving.tell(outcome);
    }

    fn broken(mut self) {
        self.leaving.broken();
    }
}

impl Upload {
    /// Publishes a file when the hook agrees, beside this thread. The file keeps its place until then.
    fn verify(
        mut self,
        staging: Staging<Self>,
        hook: Arc<dyn Hook>,
        whole: HookWhole,
        complete: TargetWhole,
        place: Option<Place>,
    ) {
        self.notes.phase(Phase::Checking);
        tokio::spawn(async move {
            let agreed = hook.verify(&whole).await;
            // Files are removed and synced there.
            staging.target().clone().run(async move {
                let _place = place;
                let reason = match agreed {
                    Ok(()) => return staging.publish(complete, self, false).await,
                    Err(reason) => reason,
                };
                complete.discard().await;
                self.leaving.tell(Outcome::Error {
                    id: self.leaving.id,
                    code: Code::Refused,
                    message: reason,
                    retry: false,
                });
            });
        });
    }
}
