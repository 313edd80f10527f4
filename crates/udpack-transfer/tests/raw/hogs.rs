//! How one client uses up each kind of place that a server has for transfers: one table, for the tests of
//! `docs/RESOURCES.md` and for `udpack-bench beside`, which measures a good client beside it.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::task::JoinSet;
use udpack::{Pool, Socket, Tenant};
use udpack_transfer::{Accepted, Hook, HookOffer, HookStored};

use super::raw::{RawLane, Say, V, file, get, map, with};

/// Lanes of each of its sockets.
const LANES: usize = 16;
/// Requests of one of its lanes.
const REQUESTS: usize = 48;
/// A file that takes long to read, and a directory that takes long to list.
pub(crate) const LARGE: &str = "large";
pub(crate) const MANY: &str = "many";

/// One kind of place.
pub(crate) struct Hog {
    /// The name of its pool.
    pub(crate) name: &'static str,
    /// How it is used up.
    pub(crate) take: fn(&mut Grip) -> Doing<'_>,
}

pub(crate) type Doing<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// More of each wait for their turn.
pub(crate) const HOGS: &[Hog] = &[
    Hog {
        name: "files",
        take: |grip| Box::pin(grip.say(|n| file(1, &format!("h{n}"), 10))),
    },
    // Nobody reads what is sent: each holds a thread.
    Hog {
        name: "downloads",
        take: |grip| Box::pin(grip.say(|_| get(1, LARGE))),
    },
    Hog {
        name: "requests",
        take: |grip| {
            grip.ask("list", map([("path", MANY.into()), ("limit", 1.into())]));
            Box::pin(std::future::ready(()))
        },
    },
    Hog {
        name: "hashes",
        take: |grip| {
            grip.ask("hash", map([("path", LARGE.into())]));
            Box::pin(std::future::ready(()))
        },
    },
    // No right to read is needed for these.
    Hog {
        name: "checks",
        take: |grip| {
            Box::pin(grip.say(|_| {
                let (event, offer) = file(1, LARGE, 1);
                (event, with(offer, "if_exists", "skip"))
            }))
        },
    },
    // Of a hook that never answers.
    Hog {
        name: "hooks",
        take: |grip| Box::pin(grip.say(|n| file(1, &format!("h{n}"), 10))),
    },
];

/// A hook that never answers for this identity, and at once for all others.
pub(crate) struct Stuck(pub(crate) &'static str);

impl Hook for Stuck {
    fn accept<'a>(
        &'a self,
        offer: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>> {
        Box::pin(async move {
            if offer.peer == self.0 {
                std::future::pending::<()>().await;
            }
            Ok(None)
        })
    }

    fn done(&self, _: HookStored) {}
}

/// Whether this tenant holds all that it may, and more of it wait.
///
/// # Panics
/// When it holds more.
pub(crate) fn is_exhausted(pool: &Pool, tenant: &Tenant) -> bool {
    let shares = pool.shares();
    let most = shares
        .each
        .min(shares.places - shares.reserve + shares.minimum);
    let held = pool.held(tenant);
    assert!(held <= most, "{held} of {most}");
    held == most && pool.waiting() > 0
}

/// What the hostile client holds; its sockets and tasks end with it.
#[derive(Default)]
pub(crate) struct Grip {
    sockets: Vec<Socket>,
    lanes: Vec<RawLane>,
    asking: JoinSet<()>,
}

impl Grip {
    /// Opens all lanes that these sockets may have.
    pub(crate) async fn over(sockets: Vec<Socket>) -> Self {
        let mut grip = Self::default();
        for socket in &sockets {
            for _ in 0..LANES {
                grip.lanes.push(RawLane::open(socket).await);
            }
        }
        grip.sockets = sockets;
        grip
    }

    /// Says this on each lane, with a number.
    async fn say(&self, say: impl Fn(usize) -> Say) {
        for (n, lane) in self.lanes.iter().enumerate() {
            lane.say(&say(n)).await;
        }
    }

    /// Asks this on each lane, again as soon as it is answered.
    fn ask(&mut self, event: &'static str, question: V) {
        for lane in &self.lanes {
            for _ in 0..REQUESTS {
                let (channel, question) = (lane.channel.clone(), question.clone());
                self.asking.spawn(async move {
                    loop {
                        let answer = channel
                            .request::<_, serde::de::IgnoredAny>(event, &question)
                            .timeout(Duration::from_secs(600));
                        if answer.await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
    }
}
