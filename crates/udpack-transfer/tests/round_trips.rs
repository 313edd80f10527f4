//! How many round trips each request costs from nothing to its end, counted on a network whose clock stands still
//! while anything computes.

mod common;

use std::time::Duration;

use common::{TOKEN, known, noise, rel};
use tempfile::TempDir;
use tokio::time::Instant;
use udpack::testing::Net;
use udpack::{Client, Identity, Server};
use udpack_transfer::{
    Downloader, Event, Fetch, Link, Receiver, ReceiverConfig, Remote, Scope, Source, Store,
    StoreConfig, TransferError, Uploader, Wanted,
};

/// One way.
const DELAY: Duration = Duration::from_millis(100);

struct Far {
    net: Net,
    server: Server,
    dir: TempDir,
}

impl Far {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path().join("up"), StoreConfig::default()).expect("a store");
        let config = ReceiverConfig {
            default_scope: Scope {
                read: true,
                delete: true,
                ..Scope::default()
            },
            ..ReceiverConfig::default()
        };
        let net = Net::new(1).delay(DELAY);
        let builder = Server::builder()
            .identity(Identity::generate().expect("a key"))
            .auth(known);
        let server = net
            .bind(Receiver::new(store, config).attach(builder))
            .await
            .expect("an address");
        std::fs::write(dir.path().join("up/small"), noise(1, 10)).expect("a file");
        Self { net, server, dir }
    }

    fn link(&self, token: &str) -> Link {
        let builder = Client::builder()
            .pin(self.server.fingerprint())
            .token(token);
        let client = self.net.attach(builder).build().expect("a client");
        Link::new(client, self.server.local_addr().to_string())
    }

    /// Works over a link of its own, from nothing until the link is left, and asserts that it took two round trips: one for the
    /// handshake, one for the answer.
    async fn takes_two<T>(&self, what: &str, work: impl AsyncFnOnce(Link) -> T) -> T {
        let link = self.link(TOKEN);
        let began = Instant::now();
        let done = work(link.clone()).await;
        assert!(link.live().is_some(), "{what}: the link is lost");
        link.leave().await;
        let took = began.elapsed();
        let most = 4 * DELAY + TIMERS;
        assert!(took >= 4 * DELAY && took <= most, "{what}: {took:?}");
        done
    }
}

/// Timers are as fine as a millisecond, and a few run one after the other. Much less than a round trip.
const TIMERS: Duration = Duration::from_millis(10);

#[tokio::test(start_paused = true)]
async fn a_request_takes_two_round_trips() {
    let far = Far::new().await;
    let small = rel("small");
    let entry = far
        .takes_two("stat", async |link| {
            Remote::new(link).stat(Some(&small)).await
        })
        .await;
    assert_eq!(entry.expect("it is there").size, 10);
    let names = far
        .takes_two("list", async |link| {
            let mut listing = Remote::new(link).list(None, true);
            let mut names = Vec::new();
            while let Some(entry) = listing.next().await {
                names.push(entry.expect("a list").path);
            }
            names
        })
        .await;
    assert_eq!(names, ["small"]);
    let listed = far
        .takes_two("list of a file", async |link| {
            Remote::new(link).list(Some(&small), false).next().await
        })
        .await;
    assert_eq!(listed.expect("an entry").expect("a list").path, "small");
    let hashed = far
        .takes_two("hash", async |link| Remote::new(link).hash(&small).await)
        .await;
    let hash = *blake3::hash(&noise(1, 10)).as_bytes();
    assert_eq!(hashed.expect("it is read"), (10, hash));
    let rights = far
        .takes_two("rights", async |link| Remote::new(link).rights().await)
        .await;
    assert!(rights.expect("they are told").delete);
    // What is answered side by side costs no more than one.
    let missing = rel("missing");
    let both = far
        .takes_two("stat of two", async |link| {
            let remote = Remote::new(link);
            tokio::join!(remote.stat(Some(&small)), remote.stat(Some(&missing)))
        })
        .await;
    assert!(both.0.is_ok() && both.1.is_err());
    let removed = far
        .takes_two("remove", async |link| {
            Remote::new(link).remove(&small, false).await
        })
        .await;
    assert_eq!(removed.expect("it is removed").files, 1);
    assert!(!far.dir.path().join("up/small").exists());
}

#[tokio::test(start_paused = true)]
async fn a_small_file_takes_two_round_trips_each_way() {
    let far = Far::new().await;
    far.takes_two("put", async |link| {
        let source = Source::bytes(noise(2, 10), rel("new"));
        let mut upload = Uploader::new(link).put([source]);
        while let Some(event) = upload.next().await {
            assert!(!matches!(event, Event::Failed { .. }), "{event:?}");
        }
    })
    .await;
    let path = far.dir.path().join("up/new");
    assert_eq!(std::fs::read(path).expect("it is stored"), noise(2, 10));
    far.takes_two("get", async |link| {
        let got = far.dir.path().join("got");
        let store = Store::open(got, StoreConfig::default()).expect("a store");
        let wanted = Wanted {
            remote: rel("small"),
            local: rel("here"),
            size: None,
        };
        // What the program asks beside it: what the path is.
        let remote = Remote::new(&link);
        let small = rel("small");
        let asked = remote.stat(Some(&small));
        let mut download = Downloader::new(&link, store).get([wanted]);
        let received = async {
            while let Some(event) = download.next().await {
                assert!(!matches!(event, Event::Failed { .. }), "{event:?}");
            }
        };
        let (entry, ()) = tokio::join!(asked, received);
        assert_eq!(entry.expect("it is there").size, 10);
    })
    .await;
    let path = far.dir.path().join("got/here");
    assert_eq!(std::fs::read(path).expect("it is stored"), noise(1, 10));
    let mut read = Vec::new();
    far.takes_two("fetch", async |link| {
        let fetched = Fetch::new(link).read(&rel("small"), &mut read).await;
        assert_eq!(fetched.expect("it is read").size, 10);
    })
    .await;
    assert_eq!(read, noise(1, 10));
}

/// Who asks behind the `$hello` learns of a refusal as who waits for the `$welcome`: it is of the connection.
#[tokio::test(start_paused = true)]
async fn a_refused_token_is_the_error_of_each_request() {
    let far = Far::new().await;
    let denied = |error: &TransferError| {
        let TransferError::Connect(error) = error else {
            panic!("{error:?}");
        };
        assert!(error.is_auth(), "{error}");
    };
    let link = far.link("another-token-than-the-server-knows");
    let remote = Remote::new(&link);
    denied(&remote.stat(None).await.expect_err("a refusal"));
    denied(&remote.rights().await.expect_err("again"));
    let link = far.link("another-token-than-the-server-knows");
    let told = Remote::new(&link).jobs().next().await;
    denied(&told.expect("an answer").expect_err("a refusal"));
    let link = far.link("another-token-than-the-server-knows");
    let error = Fetch::new(&link)
        .read(&rel("small"), &mut Vec::new())
        .await
        .expect_err("a refusal");
    denied(&error.cause);
    let store = Store::open(far.dir.path().join("got"), StoreConfig::default()).expect("a store");
    let wanted = Wanted {
        remote: rel("small"),
        local: rel("here"),
        size: None,
    };
    let link = far.link("another-token-than-the-server-knows");
    let mut download = Downloader::new(link, store).get([wanted]);
    let mut failed = 0;
    while let Some(event) = download.next().await {
        if let Event::Failed { error, .. } = event {
            denied(&error);
            failed += 1;
        }
    }
    assert_eq!(failed, 1);
}
