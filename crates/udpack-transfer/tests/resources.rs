//! One hostile token at each bound of what clients share, and a client of another token beside it, which is served as if
//! it were alone. `docs/RESOURCES.md` names these tests.

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::fs;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use common::{Fixture, bounded, noise};
use raw::{RawLane, V, chunk, dir, file, finish, get, map, put, resumable, with};
use tokio::task::JoinSet;
use udpack::{Deny, Hello, Peer, Pool, Socket};
use udpack_transfer::{
    Accepted, Hook, HookOffer, HookStored, Receiver, ReceiverConfig, Store, StoreConfig,
};

/// The hostile token; every other is a good client's.
const HOSTILE: &str = "hostile";
/// Sockets of the hostile token, and lanes of each.
const SOCKETS: usize = 3;
const LANES: usize = 16;
/// Requests of one of its lanes.
const REQUESTS: usize = 48;

/// Never answers for the hostile client, and at once for all others.
struct Stuck;

impl Hook for Stuck {
    fn accept<'a>(
        &'a self,
        offer: &'a HookOffer,
    ) -> Pin<Box<dyn Future<Output = Accepted> + Send + 'a>> {
        Box::pin(async move {
            if offer.peer == HOSTILE {
                std::future::pending::<()>().await;
            }
            Ok(None)
        })
    }

    fn done(&self, _: HookStored) {}
}

struct World {
    fixture: Fixture,
    receiver: Receiver,
}

impl World {
    async fn new(with_hook: bool) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path().join("up"), StoreConfig::default()).expect("a store");
        let config = ReceiverConfig {
            open_files: 16,
            downloads: 8,
            requests_in_all: 4,
            hashes: 4,
            hooks: 4,
            // Longer than a test takes: who hears that there is no place was not served.
            turn: Duration::from_secs(600),
            stall: Duration::from_secs(600),
            ..ReceiverConfig::default()
        };
        let mut receiver = Receiver::new(store, config);
        if with_hook {
            receiver = receiver.hook(Stuck);
        }
        let fixture = Fixture::serve(dir, receiver.clone(), |hello: Hello| async move {
            let claims = [("scope", "read,write,delete")];
            let claims = claims
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect();
            Ok::<_, Deny>(Peer::new(hello.token()).with_claims(claims))
        })
        .await;
        let large = fs::File::create(fixture.root().join("large")).expect("a file");
        large.set_len(64 << 20).expect("a hole");
        fs::create_dir(fixture.root().join("many")).expect("a directory");
        for n in 0..2000 {
            fs::write(fixture.root().join(format!("many/{n}")), "").expect("a file");
        }
        Self { fixture, receiver }
    }

    fn pool(&self, name: &str) -> &Pool {
        let mut pools = self.receiver.pools();
        pools.find(|(known, _)| *known == name).expect("a pool").1
    }

    /// Waits until the hostile token holds all that it may of this, and more of it wait where they can.
    async fn exhausted(&self, name: &str, waits: bool) {
        let pool = self.pool(name);
        let shares = pool.shares();
        let most = shares.places - shares.reserve + shares.minimum;
        loop {
            let held = pool.held(&udpack::Tenant::peer(&Peer::new(HOSTILE)));
            assert!(held <= most, "{name}: {held} of {most}");
            if held == most && (!waits || pool.waiting() > 0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A client of another token does what clients do, and nothing of it is refused.
    async fn serves_another(&self, n: u64) {
        let socket = self.fixture.connect_as("good").await;
        let mut lane = RawLane::open(&socket).await;
        let name = format!("good-{n}");
        let bytes = noise(n, 300_000);
        lane.say(&put(1, &format!("{name}-small"), b"hello")).await;
        assert_eq!(lane.hear().await.line, format!("done 1 {name}-small 5"));
        lane.say(&resumable(2, &name, 300_000)).await;
        assert_eq!(lane.hear().await.line, "ready 2 0");
        lane.say(&chunk(2, 0, &bytes)).await;
        lane.say(&finish(2, &bytes)).await;
        assert_eq!(lane.hear().await.line, format!("done 2 {name} 300000"));
        lane.say(&dir(3, &format!("{name}-dir"))).await;
        assert_eq!(lane.hear().await.line, format!("done 3 {name}-dir 0"));
        lane.say(&get(4, &name)).await;
        assert_eq!(lane.hear().await.line, format!("file 4 {name} 300000"));
        while lane.hear().await.line != "finish 4 300000" {}
        for request in ["stat", "hash", "list"] {
            let question = map([("path", name.as_str().into())]);
            let question = (request, question);
            let answer = lane.request::<serde::de::IgnoredAny>(&question);
            answer.await.expect("an answer");
        }
    }
}

/// What the hostile client holds; its sockets and tasks end with it.
#[derive(Default)]
struct Grip {
    sockets: Vec<Socket>,
    lanes: Vec<RawLane>,
    asking: JoinSet<()>,
}

impl Grip {
    /// Opens all lanes it may have.
    async fn new(world: &World) -> Self {
        let mut grip = Self::default();
        for _ in 0..SOCKETS {
            let socket = world.fixture.connect_as(HOSTILE).await;
            for _ in 0..LANES {
                grip.lanes.push(RawLane::open(&socket).await);
            }
            grip.sockets.push(socket);
        }
        grip
    }

    /// Says this on each lane, with a number.
    async fn say(&self, say: impl Fn(usize) -> raw::Say) {
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

/// How each kind of place is used up: its name, whether more wait, and the hostile client's doing.
type Case = (&'static str, bool, fn(&mut Grip) -> Doing<'_>);
type Doing<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

const CASES: &[Case] = &[
    ("files", true, |grip| {
        Box::pin(grip.say(|n| file(1, &format!("h{n}"), 10)))
    }),
    // Nobody reads what is sent: each holds a thread.
    ("downloads", true, |grip| {
        Box::pin(grip.say(|_| get(1, "large")))
    }),
    ("requests", true, |grip| {
        grip.ask("list", map([("path", "many".into()), ("limit", 1.into())]));
        Box::pin(std::future::ready(()))
    }),
    ("hashes", true, |grip| {
        grip.ask("hash", map([("path", "large".into())]));
        Box::pin(std::future::ready(()))
    }),
    // No right to read is needed for these.
    ("checks", true, |grip| {
        Box::pin(grip.say(|_| {
            let (event, offer) = file(1, "large", 1);
            (event, with(offer, "if_exists", "skip"))
        }))
    }),
    ("hooks", true, |grip| {
        Box::pin(grip.say(|n| file(1, &format!("h{n}"), 10)))
    }),
];

#[tokio::test]
async fn a_token_that_takes_all_it_can_get_keeps_nobody_else_waiting() {
    bounded(async {
        let cases = (1..).zip(CASES).map(|(n, (name, waits, take))| async move {
            let world = World::new(*name == "hooks").await;
            let mut grip = Grip::new(&world).await;
            take(&mut grip).await;
            world.exhausted(name, *waits).await;
            world.serves_another(n).await;
            assert_eq!(world.pool(name).refused(), 0, "{name}");
        });
        futures_util::future::join_all(cases).await;
    })
    .await;
}

#[tokio::test]
async fn a_file_is_kept_open_only_by_what_is_said_of_it() {
    bounded(async {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let config = ReceiverConfig {
            stall: Duration::from_millis(300),
            ..ReceiverConfig::default()
        };
        let fixture = Fixture::over(dir, StoreConfig::default(), config).await;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        lane.say(&file(1, "h", 10)).await;
        let talk = RawLane::over(lane.channel.clone());
        let talking = async {
            loop {
                // Of a file that was never offered, and of a download.
                for event in ["ack", "done"] {
                    let data = map([("id", 4711.into()), ("recv", 0.into())]);
                    talk.say(&(event, data)).await;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            heard = lane.hear() => assert_eq!(heard.line, "error 1 upload_stalled retry"),
            () = talking => {}
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_that_waits_is_given_up_by_cancel_and_by_its_deadline() {
    bounded(async {
        let world = World::new(false).await;
        let socket = world.fixture.connect_as("good").await;
        let lane = RawLane::open(&socket).await;
        // Other clients hold every place for hashes.
        let pool = world.pool("hashes");
        let mut held = Vec::new();
        for n in 0.. {
            match pool.try_take(&udpack::Tenant::peer(&Peer::new(format!("tenant-{n}")))) {
                Ok(place) => held.push(place),
                Err(_) => break,
            }
        }
        let question = map([("path", "large".into())]);
        let late = lane
            .channel
            .request::<_, serde::de::IgnoredAny>("hash", &question)
            .timeout(Duration::from_millis(100))
            .await;
        assert!(
            matches!(late, Err(udpack::RequestError::Timeout(_))),
            "{late:?}"
        );
        // Given up here, and at the server.
        while pool.waiting() > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let mut given_up = Box::pin(
            lane.channel
                .request::<_, serde::de::IgnoredAny>("hash", &question)
                .timeout(Duration::from_secs(600))
                .into_future(),
        );
        while pool.waiting() == 0 {
            tokio::select! {
                answer = &mut given_up => panic!("{answer:?}"),
                () = tokio::time::sleep(Duration::from_millis(2)) => {}
            }
        }
        drop(given_up);
        while pool.waiting() > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        drop(held);
        let question = ("hash", question);
        let answer = lane.request::<serde::de::IgnoredAny>(&question);
        answer.await.expect("an answer");
    })
    .await;
}

#[tokio::test]
async fn a_lane_takes_files_while_its_requests_wait() {
    bounded(async {
        let world = World::new(false).await;
        let socket = world.fixture.connect_as("good").await;
        let mut lane = RawLane::open(&socket).await;
        let pool = world.pool("hashes");
        let mut held = Vec::new();
        for n in 0.. {
            match pool.try_take(&udpack::Tenant::peer(&Peer::new(format!("tenant-{n}")))) {
                Ok(place) => held.push(place),
                Err(_) => break,
            }
        }
        let mut asking = JoinSet::new();
        for _ in 0..200 {
            let channel = lane.channel.clone();
            asking.spawn(async move {
                let question = map([("path", "many/1".into())]);
                channel
                    .request::<_, serde::de::IgnoredAny>("hash", &question)
                    .timeout(Duration::from_secs(600))
                    .await
                    .map(drop)
            });
        }
        while pool.waiting() < 32 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        lane.say(&put(1, "x", b"hello")).await;
        assert_eq!(lane.hear().await.line, "done 1 x 5");
        drop(held);
        // Somebody has to read for the answers to come.
        while let Some(answer) = asking.join_next().await {
            answer.expect("no panic").expect("an answer");
        }
    })
    .await;
}
