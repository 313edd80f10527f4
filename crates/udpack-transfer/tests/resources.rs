//! One hostile token at each bound of what clients share, and a client of another token beside it, which is served as if
//! it were alone. `docs/RESOURCES.md` names these tests.

mod common;
#[path = "raw/hogs.rs"]
mod hogs;
#[path = "raw/mod.rs"]
mod raw;

use std::fs;
use std::time::Duration;

use common::{Fixture, bounded, noise};
use hogs::{Grip, HOGS, Hog, LARGE, MANY, Stuck, is_exhausted};
use raw::{RawLane, chunk, dir, file, finish, get, map, put, resumable};
use tokio::task::JoinSet;
use udpack::{Deny, Hello, Peer, Pool, Tenant};
use udpack_transfer::{Receiver, ReceiverConfig, Store, StoreConfig};

/// The hostile token; every other is a good client's.
const HOSTILE: &str = "hostile";
/// Its sockets.
const SOCKETS: usize = 3;

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
            receiver = receiver.hook(Stuck(HOSTILE));
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
        let large = fs::File::create(fixture.root().join(LARGE)).expect("a file");
        large.set_len(64 << 20).expect("a hole");
        fs::create_dir(fixture.root().join(MANY)).expect("a directory");
        for n in 0..2000 {
            fs::write(fixture.root().join(format!("{MANY}/{n}")), "").expect("a file");
        }
        Self { fixture, receiver }
    }

    fn pool(&self, name: &str) -> &Pool {
        let mut pools = self.receiver.pools();
        pools.find(|(known, _)| *known == name).expect("a pool").1
    }

    /// Waits until the hostile token holds all that it may of this, and more of it wait.
    async fn exhausted(&self, name: &str) {
        let (pool, tenant) = (self.pool(name), Tenant::peer(&Peer::new(HOSTILE)));
        while !is_exhausted(pool, &tenant) {
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

/// One after the other: side by side they would wait for each other, being one thread.
#[tokio::test]
async fn a_token_that_takes_all_it_can_get_keeps_nobody_else_waiting() {
    for (n, Hog { name, take }) in (1..).zip(HOGS) {
        bounded(async {
            let world = World::new(*name == "hooks").await;
            let mut sockets = Vec::new();
            for _ in 0..SOCKETS {
                sockets.push(world.fixture.connect_as(HOSTILE).await);
            }
            let mut grip = Grip::over(sockets).await;
            take(&mut grip).await;
            world.exhausted(name).await;
            world.serves_another(n).await;
            assert_eq!(world.pool(name).refused(), 0, "{name}");
        })
        .await;
    }
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
            match pool.try_take(&Tenant::peer(&Peer::new(format!("tenant-{n}")))) {
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
            match pool.try_take(&Tenant::peer(&Peer::new(format!("tenant-{n}")))) {
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
