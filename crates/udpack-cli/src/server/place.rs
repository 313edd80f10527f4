//! [`Place`]: where the server's files go, a directory or an object store.

use std::fmt;
use std::time::Duration;

use tokio::time::MissedTickBehavior;
#[cfg(feature = "store")]
use udpack_object_store::{ObjectConfig, ObjectSink};
use udpack_transfer::{Receiver, ReceiverConfig, Store, StoreConfig};

use crate::args::ServerArgs;
#[cfg(feature = "store")]
use crate::exit::{Failure, Kind};

pub(super) enum Place {
    Disk(Store),
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
            ..StoreConfig::default()
        };
        let store = Store::open(&args.dir, config).map_err(|error| {
            anyhow::Error::new(error).context(format!("cannot use {}", args.dir.display()))
        })?;
        Ok(Self::Disk(store))
    }

    pub(super) fn receiver(&self, config: ReceiverConfig) -> Receiver {
        match self {
            Self::Disk(store) => Receiver::new(store.clone(), config),
            #[cfg(feature = "store")]
            Self::Objects(sink) => Receiver::into_sink(sink.clone(), config),
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
            Self::Disk(store) => {
                let store = store.clone();
                let swept = tokio::task::spawn_blocking(move || store.sweep()).await;
                Ok(swept.unwrap_or(Ok(0))?)
            }
            #[cfg(feature = "store")]
            Self::Objects(sink) => Ok(sink.sweep().await? as u64),
        }
    }
}

#[cfg(feature = "store")]
async fn objects(args: &ServerArgs, url: &str) -> anyhow::Result<ObjectSink> {
    let defaults = ObjectConfig::default();
    let budget = args.store_budget.0.unwrap_or(defaults.budget);
    let config = ObjectConfig {
        budget,
        max_file: args.max_file.0,
        quota: args.quota.0,
        names: args.names.into(),
        overwrite: args.overwrite.into(),
        expire: args.expire.0,
        ..defaults
    };
    let opened = ObjectSink::open(url, args.dir.clone(), config).await;
    let sink = opened.map_err(|error| {
        let text = format!("{:#}", anyhow::Error::new(error));
        let failure = Failure::new(Kind::RemoteStorage, text);
        failure.hint(
            "credentials and settings come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT; AWS_ALLOW_HTTP=true for http",
        )
    })?;
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
            Self::Objects(sink) => f.write_str(sink.url()),
        }
    }
}

/// How often expired uploads are looked for.
const SWEEP: Duration = Duration::from_secs(600);
