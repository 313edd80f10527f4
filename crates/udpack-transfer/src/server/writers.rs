//! The writers of resumable uploads, their takeover by other writers, and the outcomes of recent uploads.
//!
//! An upload belongs to one writer at a time. The same run of a client takes its own upload over at once after a
//! reconnect; another client of the same token takes it over after the writer has been silent for a while; all others
//! receive `busy`. So two active clients never displace each other.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::store::Published;

/// The most outcomes that are remembered, of about 200 bytes each: a client that lost one asks again within minutes.
const OUTCOMES: usize = 16_384;

/// Identifies an upload of one client: 128 bits of a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct UploadKey([u8; 16]);

impl UploadKey {
    pub(crate) fn new(peer: &str, path: &str) -> Self {
        Self::of(&[peer.as_bytes(), path.as_bytes()])
    }

    /// The same upload as part of one run of a client.
    pub(crate) fn in_run(self, run: &[u8; 16]) -> Self {
        Self::of(&[&self.0, run])
    }

    fn of(parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let mut key = [0; 16];
        hasher.finalize_xof().fill(&mut key);
        Self(key)
    }
}

/// All writers of one server. A handle.
#[derive(Debug, Clone)]
pub(crate) struct Writers {
    /// A writer that was silent for this long may be replaced.
    silent: Duration,
    live: Arc<Mutex<HashMap<UploadKey, Live>>>,
    outcomes: Arc<Mutex<Outcomes>>,
}

#[derive(Debug)]
struct Live {
    run: Option<[u8; 16]>,
    active: Arc<Mutex<Instant>>,
    /// Set when the upload has ended for the client, and its writer only cleans up.
    leaving: Arc<AtomicBool>,
    /// Tells the writer that it has been replaced.
    replaced: watch::Sender<Replaced>,
    /// Closed when the writer has released the upload.
    gone: watch::Receiver<()>,
}

/// Whether a writer must release the upload, and for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replaced {
    No,
    /// For another offer of its own run. That offer may be older and delayed; then trying again helps.
    ByOwnRun,
    ByOther,
}

/// The result of claiming an upload.
#[derive(Debug)]
pub(crate) enum Claim {
    /// The upload is claimed.
    Writer(Writer),
    /// A live client writes it.
    Busy,
    /// Its writer was asked to stop; try again when this is closed.
    Wait(watch::Receiver<()>),
}

/// The right to write one upload, until dropped.
#[derive(Debug)]
pub(crate) struct Writer {
    writers: Writers,
    key: UploadKey,
    active: Arc<Mutex<Instant>>,
    leaving: Arc<AtomicBool>,
    replaced: watch::Receiver<Replaced>,
    _gone: watch::Sender<()>,
}

/// Records that a writer is alive.
#[derive(Debug, Clone)]
pub(crate) struct Pulse {
    active: Arc<Mutex<Instant>>,
    leaving: Arc<AtomicBool>,
}

impl Pulse {
    pub(crate) fn beat(&self) {
        *lock(&self.active) = Instant::now();
    }

    /// To be set when the writer is about to release the upload: later claims then wait instead of getting `busy`.
    pub(crate) fn leaving(&self) -> Arc<AtomicBool> {
        self.leaving.clone()
    }
}

impl Writers {
    /// Creates an empty table. A writer that is silent for `silent` may be replaced.
    pub(crate) fn new(silent: Duration) -> Self {
        Self {
            silent,
            live: Arc::default(),
            outcomes: Arc::default(),
        }
    }

    /// Claims an upload for a client's run.
    pub(crate) fn claim(&self, key: UploadKey, run: Option<[u8; 16]>) -> Claim {
        let mut live = lock(&self.live);
        if let Some(writer) = live.get(&key) {
            let own = run.is_some() && writer.run == run;
            if writer.leaving.load(Ordering::Acquire) {
                return Claim::Wait(writer.gone.clone());
            }
            let leaving = *writer.replaced.borrow() != Replaced::No;
            if !own && !leaving && lock(&writer.active).elapsed() < self.silent {
                return Claim::Busy;
            }
            writer.replaced.send_replace(if own {
                Replaced::ByOwnRun
            } else {
                Replaced::ByOther
            });
            return Claim::Wait(writer.gone.clone());
        }
        let active = Arc::new(Mutex::new(Instant::now()));
        let leaving = Arc::new(AtomicBool::new(false));
        let (replace, replaced) = watch::channel(Replaced::No);
        let (_gone, gone) = watch::channel(());
        live.insert(
            key,
            Live {
                run,
                active: active.clone(),
                leaving: leaving.clone(),
                replaced: replace,
                gone,
            },
        );
        Claim::Writer(Writer {
            writers: self.clone(),
            key,
            active,
            leaving,
            replaced,
            _gone,
        })
    }

    /// Remembers the outcome of an upload, for a client that lost the answer.
    pub(crate) fn ended(&self, key: UploadKey, published: &Published) {
        let mut outcomes = lock(&self.outcomes);
        if outcomes.known.insert(key, published.clone()).is_none() {
            outcomes.order.push_back(key);
            if outcomes.order.len() > OUTCOMES
                && let Some(oldest) = outcomes.order.pop_front()
            {
                outcomes.known.remove(&oldest);
            }
        }
    }

    /// The outcome of an upload, if it ended recently on this server.
    pub(crate) fn outcome(&self, key: UploadKey) -> Option<Published> {
        lock(&self.outcomes).known.get(&key).cloned()
    }
}

#[derive(Debug, Default)]
struct Outcomes {
    known: HashMap<UploadKey, Published>,
    order: VecDeque<UploadKey>,
}

impl Writer {
    pub(crate) fn pulse(&self) -> Pulse {
        Pulse {
            active: self.active.clone(),
            leaving: self.leaving.clone(),
        }
    }

    /// Notified when another writer waits for this one to release the upload.
    pub(crate) fn replaced(&self) -> watch::Receiver<Replaced> {
        self.replaced.clone()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        lock(&self.writers.live).remove(&self.key);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while the lock is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Synced;

    const SILENT: Duration = Duration::from_secs(5);

    const A: Option<[u8; 16]> = Some([1; 16]);
    const B: Option<[u8; 16]> = Some([2; 16]);

    fn writer(claim: Claim) -> Writer {
        match claim {
            Claim::Writer(writer) => writer,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_finds_a_writer_busy_that_is_about_to_let_go() {
        let writers = Writers::new(SILENT);
        let key = UploadKey::new("peer", "x");
        let first = writer(writers.claim(key, A));
        assert!(matches!(writers.claim(key, B), Claim::Busy));
        first.pulse().leaving().store(true, Ordering::Release);
        let Claim::Wait(mut gone) = writers.claim(key, B) else {
            panic!("it leaves");
        };
        drop(first);
        assert!(gone.changed().await.is_err());
        writer(writers.claim(key, B));
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_takes_its_own_upload_over_and_others_wait_for_silence() {
        let writers = Writers::new(SILENT);
        let key = UploadKey::new("peer", "x");
        let first = writer(writers.claim(key, A));
        let pulse = first.pulse();
        assert!(matches!(writers.claim(key, B), Claim::Busy));
        assert!(matches!(writers.claim(key, None), Claim::Busy));
        assert_eq!(*first.replaced().borrow(), Replaced::No);
        writer(writers.claim(UploadKey::new("peer", "y"), B));
        writer(writers.claim(UploadKey::new("other", "x"), B));

        let Claim::Wait(mut gone) = writers.claim(key, A) else {
            panic!("its own upload")
        };
        assert_eq!(*first.replaced().borrow(), Replaced::ByOwnRun);
        drop(first);
        assert!(gone.changed().await.is_err(), "closed");
        let second = writer(writers.claim(key, A));

        tokio::time::advance(SILENT - Duration::from_millis(1)).await;
        assert!(matches!(writers.claim(key, B), Claim::Busy));
        pulse.beat();
        second.pulse().beat();
        tokio::time::advance(SILENT - Duration::from_millis(1)).await;
        assert!(matches!(writers.claim(key, B), Claim::Busy));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(matches!(writers.claim(key, B), Claim::Wait(_)));
    }

    #[test]
    fn outcomes_are_remembered_for_a_while() {
        let writers = Writers::new(SILENT);
        let published = |n: u64| Published {
            path: "x".to_owned(),
            size: n,
            hash: [0; 32],
            same: false,
            sync: Synced::File,
            other_time: None,
            xattrs: 0,
        };
        let key = |n: u64| UploadKey::new("peer", &n.to_string()).in_run(&[0; 16]);
        for n in 0..=OUTCOMES as u64 {
            writers.ended(key(n), &published(n));
        }
        assert_eq!(writers.outcome(key(0)), None, "the oldest makes room");
        assert_eq!(writers.outcome(key(1)), Some(published(1)));
        let last = OUTCOMES as u64;
        assert_eq!(writers.outcome(key(last)), Some(published(last)));
    }
}
