//! [`Place`]: where the server's files go, a directory or an object store.

use std::fmt;
use std::time::Duration;

use tokio::time::MissedTickBehavior;
#[cfg(feature = "store")]
use udpack_object_store::{ObjectConfig, ObjectSink, Push, PushConfig, PushStatus};
#[cfg(feature = "store")]
use udpack_transfer::{PushFailureStats, PushStats, PushingStats, names};
use udpack_transfer::{Receiver, ReceiverConfig, Store, StoreConfig};

use crate::args::ServerArgs;
#[cfg(feature = "store")]
use crate::exit::{Failure, Kind};

#[derive(Clone)]
pub(super) enum Place {
    Disk(Store),
    #[cfg(feature = "store")]
    Pushed(Store, Push),
    #[cfg(feature = "store")]
    Objects(ObjectSink),
}

impl Place {
    pub(super) async fn open(args: &ServerArgs) -> anyhow::Result<Self> {
        #[cfg(feature = "store")]
        if let Some(url) = &args.store {
            return objects(args, url).await.map(Self::Objects);
        }
        let config = StoreConfig {
            max_file: args.max_file.0,
            quota: args.quota.0,
            min_free: args.min_free.map(|size| size.0.unwrap_or(0)),
            names: args.names.into(),
            overwrite: args.overwrite.into(),
            expire: args.expire.0,
            sync: args.fsync.into(),
            xattrs: args.xattrs.into(),
            #[cfg(feature = "store")]
            changes: args.push.is_some(),
            ..StoreConfig::default()
        };
        let store = Store::open(&args.dir, config).map_err(|error| {
            anyhow::Error::new(error).context(format!("cannot use {}", args.dir.display()))
        })?;
        #[cfg(feature = "store")]
        if let Some(url) = &args.push {
            let config = PushConfig {
                objects: objects_config(args),
                ..PushConfig::default()
            };
            let push = Push::new(&store, url, config).map_err(refused)?;
            return Ok(Self::Pushed(store, push));
        }
        Ok(Self::Disk(store))
    }

    pub(super) fn receiver(&self, config: ReceiverConfig) -> Receiver {
        match self {
            Self::Disk(store) => Receiver::new(store.clone(), config),
            #[cfg(feature = "store")]
            Self::Pushed(store, push) => {
                let push = push.clone();
                Receiver::new(store.clone(), config).pushed(move || stats(push.status()))
            }
            #[cfg(feature = "store")]
            Self::Objects(sink) => Receiver::into_sink(sink.clone(), config),
        }
    }

    /// Carries what is stored to where it is pushed. Runs for ever.
    pub(super) async fn push(&self) {
        match self {
            #[cfg(feature = "store")]
            Self::Pushed(_, push) => push.run().await,
            _ => std::future::pending().await,
        }
    }

    /// How far that is: names of counters, their kinds, what they say, their values.
    pub(super) fn counters(&self) -> Vec<(&'static str, &'static str, &'static str, u64)> {
        match self {
            #[cfg(feature = "store")]
            Self::Pushed(_, push) => {
                let status = push.status();
                vec![
                    (
                        "udpack_push_waiting",
                        "gauge",
                        "Changes that are not yet in the object store.",
                        status.waiting,
                    ),
                    (
                        "udpack_push_files_total",
                        "counter",
                        "Files pushed since the start.",
                        status.files,
                    ),
                    (
                        "udpack_push_bytes_total",
                        "counter",
                        "Bytes of the files pushed since the start.",
                        status.bytes,
                    ),
                    (
                        "udpack_push_removed_total",
                        "counter",
                        "Objects removed since the start.",
                        status.removed,
                    ),
                    (
                        "udpack_push_failures_total",
                        "counter",
                        "Attempts to push that failed since the start.",
                        status.failures,
                    ),
                    (
                        "udpack_push_paused",
                        "gauge",
                        "1 while the object store is in trouble and nothing is tried.",
                        u64::from(status.trouble.is_some()),
                    ),
                ]
            }
            _ => Vec::new(),
        }
    }

    /// Where files are pushed.
    pub(super) fn pushed_to(&self) -> Option<&str> {
        match self {
            #[cfg(feature = "store")]
            Self::Pushed(_, push) => Some(push.url()),
            _ => None,
        }
    }

    /// Removes expired interrupted uploads. Runs for ever.
    pub(super) async fn sweep(&self) {
        let mut ticks = tokio::time::interval(SWEEP);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // All was swept when the place was opened.
        ticks.tick().await;
        loop {
            ticks.tick().await;
            match self.swept().await {
                Ok(0) => {}
                Ok(removed) => tracing::info!(removed, "interrupted uploads have expired"),
                Err(error) => tracing::warn!(%error, "cannot look for expired uploads"),
            }
        }
    }

    async fn swept(&self) -> anyhow::Result<u64> {
        match self {
            Self::Disk(store) => sweep(store).await,
            #[cfg(feature = "store")]
            Self::Pushed(store, _) => sweep(store).await,
            #[cfg(feature = "store")]
            Self::Objects(sink) => Ok(sink.sweep().await? as u64),
        }
    }
}

/// As watchers are told.
#[cfg(feature = "store")]
fn stats(status: PushStatus) -> PushStats {
    let moving = status.pushing.into_iter().take(SHOWN);
    let failed = status.failed.into_iter().rev().take(SHOWN);
    PushStats {
        waiting: status.waiting,
        files: status.files,
        bytes: status.bytes,
        removed: status.removed,
        failures: status.failures,
        trouble: status.trouble.map(|(why, _)| why),
        moving: moving
            .map(|it| PushingStats {
                path: names::shown(it.path.as_str()),
                size: it.size,
                bytes: it.bytes,
            })
            .collect(),
        failed: failed
            .map(|it| PushFailureStats {
                path: names::shown(it.path.as_str()),
                text: it.why,
            })
            .collect(),
    }
}

async fn sweep(store: &Store) -> anyhow::Result<u64> {
    let store = store.clone();
    let swept = tokio::task::spawn_blocking(move || store.sweep()).await;
    Ok(swept.unwrap_or(Ok(0))?)
}

#[cfg(feature = "store")]
fn objects_config(args: &ServerArgs) -> ObjectConfig {
    let defaults = ObjectConfig::default();
    let budget = args.store_budget.0.unwrap_or(defaults.budget);
    ObjectConfig { budget, ..defaults }
}

/// An object store that cannot be used.
#[cfg(feature = "store")]
fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
    let text = format!("{:#}", anyhow::Error::new(error));
    let failure = Failure::new(Kind::RemoteStorage, text);
    failure.hint(
        "credentials and settings come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT; AWS_ALLOW_HTTP=true for http",
    )
}

#[cfg(feature = "store")]
async fn objects(args: &ServerArgs, url: &str) -> anyhow::Result<ObjectSink> {
    let config = ObjectConfig {
        max_file: args.max_file.0,
        quota: args.quota.0,
        names: args.names.into(),
        overwrite: args.overwrite.into(),
        expire: args.expire.0,
        ..objects_config(args)
    };
    let opened = ObjectSink::open(url, args.dir.clone(), config).await;
    let sink = opened.map_err(refused)?;
    if !sink.is_exclusive() {
        tracing::warn!(
            "this object store ignores conditions: of two uploads of one name that end at once, the later one replaces the other"
        );
    }
    Ok(sink)
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(store) => store.root().display().fmt(f),
            #[cfg(feature = "store")]
            Self::Pushed(store, _) => store.root().display().fmt(f),
            #[cfg(feature = "store")]
            Self::Objects(sink) => f.write_str(sink.url()),
        }
    }
}

/// Files on their way, and failures, that watchers are told of.
#[cfg(feature = "store")]
const SHOWN: usize = 16;
/// How often expired uploads are looked for.
const SWEEP: Duration = Duration::from_secs(600);
