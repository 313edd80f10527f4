//! What a token is told that it may do, and the shares that it makes: never wider than itself, and gone with it.

mod common;

use std::path::PathBuf;
use std::time::Duration;

use common::{Fixture, bounded, drain, rel, token, token_file};
use udpack::{Client, CloseCode, ConnectError, Socket, TokenFile, claimed_token};
use udpack_transfer::{
    Code, Receiver, ReceiverConfig, RelPath, Remote, ShareWish, Source, Store, StoreConfig,
    TransferError, Uploader,
};

const CLIENTS: &[(&str, &str)] = &[
    ("plain", ""),
    ("boss", "scope=read,write,delete,admin"),
    (
        "sharer",
        "scope=read,write,share prefix=team/red quota=100K expires=4102444800",
    ),
    ("dropper", "scope=write,share"),
    ("reader", "scope=read,share"),
];

struct World {
    fixture: Fixture,
    tokens: PathBuf,
}

impl World {
    async fn new() -> Self {
        Self::with(ReceiverConfig::default()).await
    }

    async fn with(config: ReceiverConfig) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path().join("up"), StoreConfig::default()).expect("a store");
        let path = dir.path().join("tokens");
        let tokens = token_file(&path, CLIENTS);
        let web = Some("https://files.example/".to_owned());
        let receiver = Receiver::new(store, config).sharing(tokens.clone(), web);
        let fixture = Fixture::serve(dir, receiver, tokens).await;
        Self {
            fixture,
            tokens: path,
        }
    }

    async fn remote(&self, name: &str) -> Remote {
        Remote::new(self.socket(&token(name)).await)
    }

    async fn socket(&self, token: &str) -> Socket {
        self.fixture.connect_as(token).await
    }

    /// The code with which a token is refused.
    async fn refused(&self, token: &str) -> CloseCode {
        let connecting = Client::builder()
            .pin(self.fixture.server.fingerprint())
            .token(token)
            .connect(&self.fixture.server.local_addr().to_string())
            .await;
        match connecting {
            Err(ConnectError::Denied(reason)) => reason.code,
            other => panic!("expected a refusal: {other:?}"),
        }
    }

    fn line(&self, name: &str) -> String {
        let text = std::fs::read_to_string(&self.tokens).expect("the file");
        let line = text.lines().find(|line| line.starts_with(name));
        line.expect("its line").to_owned()
    }
}

fn into(prefix: &str) -> ShareWish {
    ShareWish {
        prefix: Some(rel(prefix)),
        ..ShareWish::default()
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, TransferError>) -> Code {
    match result {
        Err(TransferError::Refused { code, .. }) => code,
        other => panic!("expected a refusal: {other:?}"),
    }
}

/// Sends a file: `None` when it is stored, else why not.
async fn put(socket: &Socket, path: &str, bytes: usize) -> Option<Code> {
    let source = Source::bytes(vec![7; bytes], path.parse().expect("a sound path"));
    let (_, failed) = drain(Uploader::new(socket).put(vec![source])).await;
    failed
        .into_iter()
        .next()
        .map(|(_, error)| code::<()>(Err(error)))
}

#[tokio::test]
async fn a_token_is_told_what_it_may_do() {
    bounded(async {
        let world = World::new().await;
        let plain = world.remote("plain").await.rights().await.expect("told");
        assert!(plain.write && !plain.read && !plain.delete && !plain.share);
        assert!(!plain.admin && !plain.watch && !plain.once);
        assert_eq!(
            (plain.prefix, plain.quota, plain.expires_in),
            (None, None, None)
        );
        let boss = world.remote("boss").await.rights().await.expect("told");
        assert!(boss.read && boss.write && boss.delete && boss.admin && boss.share);

        let remote = world.remote("sharer").await;
        let rights = remote.rights().await.expect("told");
        assert!(rights.read && rights.write && rights.share && !rights.admin);
        assert_eq!(
            rights.prefix.as_ref().map(RelPath::as_str),
            Some("team/red")
        );
        assert_eq!(rights.quota, Some((102_400, 102_400)));
        assert!(rights.expires_in.expect("an end") > Duration::from_secs(86_400));
        let socket = world.socket(&token("sharer")).await;
        assert_eq!(put(&socket, "a", 2_400).await, None);
        let rights = remote.rights().await.expect("told");
        assert_eq!(rights.quota, Some((102_400, 100_000)));

        let config = ReceiverConfig {
            read_only: true,
            ..ReceiverConfig::default()
        };
        let world = World::with(config).await;
        let boss = world.remote("boss").await.rights().await.expect("told");
        assert!(boss.read && !boss.write && !boss.delete);
    })
    .await;
}

#[tokio::test]
async fn a_share_is_a_token_for_a_directory_of_its_makers() {
    bounded(async {
        let world = World::new().await;
        let remote = world.remote("sharer").await;
        let wish = ShareWish {
            quota: Some(5_000),
            expires: Some(Duration::from_secs(3_600)),
            ..into("in box/\u{7167}")
        };
        let share = remote.share(&wish).await.expect("a share");
        assert_eq!(
            share.url,
            Some(format!("https://files.example/#t={}", share.token))
        );
        let line = world.line(&share.name);
        assert!(!line.contains(&share.token));
        assert!(line.contains(
            " scope=write prefix-encoded=team/red/in%20box/%E7%85%A7 quota=5000 expires="
        ));

        let visitor = world.socket(&share.token).await;
        let seen = Remote::new(visitor.clone());
        let rights = seen.rights().await.expect("told");
        assert!(rights.write && !rights.read && !rights.share && !rights.delete);
        assert_eq!(
            rights.prefix, None,
            "where it leads is its maker's business"
        );
        assert_eq!(rights.quota, Some((5_000, 5_000)));
        assert!(rights.expires_in.expect("an end") <= Duration::from_secs(3_600));
        assert_eq!(put(&visitor, "sub/x", 1_000).await, None);
        assert_eq!(
            world.fixture.stored("team/red/in box/\u{7167}/sub/x"),
            [7; 1_000]
        );
        assert_eq!(put(&visitor, "z", 4_000).await, Some(Code::Quota));
        assert_eq!(
            code(seen.share(&ShareWish::default()).await),
            Code::Forbidden
        );
        assert_eq!(code(seen.shares().await), Code::Forbidden);
        assert_eq!(code(seen.unshare(&share.name).await), Code::Forbidden);
        assert_eq!(code(seen.stat(None).await), Code::Forbidden);

        let shares = remote.shares().await.expect("told");
        assert_eq!(shares.len(), 1);
        let told = &shares[0];
        assert_eq!((&told.name, told.quota), (&share.name, Some(5_000)));
        assert_eq!(told.prefix, wish.prefix);
        assert!(told.write && !told.read && !told.once && !told.used);
        let other = world.remote("boss").await;
        assert!(other.shares().await.expect("told").is_empty());
        assert_eq!(code(other.unshare(&share.name).await), Code::NotFound);
    })
    .await;
}

#[tokio::test]
async fn no_share_may_more_than_its_maker() {
    bounded(async {
        let world = World::new().await;
        let plain = world.remote("plain").await;
        assert_eq!(
            code(plain.share(&ShareWish::default()).await),
            Code::Forbidden
        );
        let read = ShareWish {
            read: true,
            ..ShareWish::default()
        };
        let dropper = world.remote("dropper").await;
        assert_eq!(code(dropper.share(&read).await), Code::Forbidden);
        let reader = world.remote("reader").await;
        assert_eq!(
            code(reader.share(&ShareWish::default()).await),
            Code::Forbidden
        );
        let read = ShareWish {
            write: false,
            ..read
        };
        reader.share(&read).await.expect("a share to read");
        let nothing = ShareWish {
            write: false,
            ..ShareWish::default()
        };
        assert_eq!(code(reader.share(&nothing).await), Code::Unknown);

        let sharer = world.remote("sharer").await;
        let quota = |bytes| ShareWish {
            quota: Some(bytes),
            ..into("a")
        };
        assert_eq!(code(sharer.share(&quota(102_401)).await), Code::Quota);
        assert_eq!(code(sharer.share(&quota(0)).await), Code::Unknown);
        let expires = |secs| ShareWish {
            expires: Some(Duration::from_secs(secs)),
            ..into("a")
        };
        assert_eq!(
            code(sharer.share(&expires(3_000_000_000)).await),
            Code::Forbidden
        );
        assert_eq!(code(sharer.share(&expires(0)).await), Code::Unknown);
        assert_eq!(code(sharer.share(&expires(u64::MAX)).await), Code::Unknown);

        // Several that may each store what is left do not store more than that together.
        let one = sharer.share(&quota(60_000)).await.expect("a share");
        let two = sharer.share(&into("b")).await.expect("a share");
        assert!(
            world
                .line(&two.name)
                .contains("quota=102400 expires=2100-01-01T00:00:00Z")
        );
        let (one, two) = (
            world.socket(&one.token).await,
            world.socket(&two.token).await,
        );
        assert_eq!(put(&one, "x", 55_000).await, None);
        assert_eq!(put(&two, "y", 55_000).await, Some(Code::Quota));
        assert_eq!(put(&two, "z", 40_000).await, None);
        let left = sharer
            .rights()
            .await
            .expect("told")
            .quota
            .expect("a quota")
            .1;
        assert!(left < 7_400, "{left}");
        assert_eq!(code(sharer.share(&quota(7_400)).await), Code::Quota);
    })
    .await;
}

#[tokio::test]
async fn a_share_ends_with_its_maker_and_when_it_is_revoked() {
    bounded(async {
        let world = World::new().await;
        let remote = world.remote("dropper").await;
        let share = remote.share(&into("a")).await.expect("a share");
        let visitor = world.socket(&share.token).await;
        remote.unshare(&share.name).await.expect("revoked");
        assert_eq!(code(remote.unshare(&share.name).await), Code::NotFound);
        assert_eq!(world.refused(&share.token).await, CloseCode::AUTH_FAILED);
        let tokens = TokenFile::open(&world.tokens).expect("the tokens");
        world
            .fixture
            .server
            .revoke(|peer| !udpack::Authenticate::is_valid(&tokens, peer));
        assert_eq!(visitor.closed().await.code, CloseCode::AUTH_REVOKED);
        assert!(remote.rights().await.is_ok(), "its maker stays");

        let share = remote.share(&into("a")).await.expect("a share");
        let visitor = world.socket(&share.token).await;
        assert!(TokenFile::revoke(&world.tokens, "dropper").expect("revoked"));
        assert_eq!(world.refused(&share.token).await, CloseCode::AUTH_FAILED);
        world
            .fixture
            .server
            .revoke(|peer| !udpack::Authenticate::is_valid(&tokens, peer));
        assert_eq!(visitor.closed().await.code, CloseCode::AUTH_REVOKED);
        let text = std::fs::read_to_string(&world.tokens).expect("the file");
        assert!(!text.contains(&share.name));
    })
    .await;
}

#[tokio::test]
async fn a_share_expires() {
    bounded(async {
        let world = World::new().await;
        let remote = world.remote("dropper").await;
        let wish = ShareWish {
            expires: Some(Duration::from_secs(2)),
            ..into("a")
        };
        let share = remote.share(&wish).await.expect("a share");
        let visitor = world.socket(&share.token).await;
        assert_eq!(visitor.closed().await.code, CloseCode::AUTH_EXPIRED);
        assert_eq!(world.refused(&share.token).await, CloseCode::AUTH_EXPIRED);
        assert!(remote.shares().await.expect("told").is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_share_for_one_is_for_the_first_who_comes() {
    bounded(async {
        let world = World::new().await;
        let remote = world.remote("dropper").await;
        let wish = ShareWish {
            once: true,
            ..into("a")
        };
        let share = remote.share(&wish).await.expect("a share");
        assert_eq!(world.refused(&share.token).await, CloseCode::AUTH_FAILED);
        assert!(!remote.shares().await.expect("told")[0].used);
        let mine = claimed_token(&share.token);
        let visitor = world.socket(&mine).await;
        let rights = Remote::new(visitor.clone()).rights().await.expect("told");
        assert!(rights.once);
        assert!(rights.expires_in.expect("an end") <= Duration::from_secs(86_400));
        assert!(remote.shares().await.expect("told")[0].used);
        let other = claimed_token(&share.token);
        assert_eq!(world.refused(&other).await, CloseCode::AUTH_FAILED);
        // A page that is loaded again opens a session of its own.
        let again = world.socket(&mine).await;
        assert_eq!(put(&again, "x", 10).await, None);
        assert_eq!(put(&visitor, "y", 10).await, None);
    })
    .await;
}

#[tokio::test]
async fn a_token_has_so_many_shares() {
    bounded(async {
        let world = World::new().await;
        let remote = world.remote("dropper").await;
        let mut first = None;
        for _ in 0..TokenFile::MAX_SHARES {
            let share = remote.share(&into("a")).await.expect("a share");
            first.get_or_insert(share.name);
        }
        assert_eq!(code(remote.share(&into("a")).await), Code::TooManyShares);
        remote.unshare(&first.expect("one")).await.expect("revoked");
        remote.share(&into("a")).await.expect("room again");
        assert_eq!(
            remote.shares().await.expect("told").len(),
            TokenFile::MAX_SHARES
        );
    })
    .await;
}

#[tokio::test]
async fn a_server_without_a_file_of_tokens_makes_none() {
    bounded(async {
        let fixture = Fixture::new().await;
        let remote = Remote::new(fixture.connect().await);
        let rights = remote.rights().await.expect("told");
        assert!(rights.write && !rights.share);
        assert_eq!(code(remote.share(&into("a")).await), Code::Unsupported);
        assert_eq!(code(remote.shares().await), Code::Unsupported);
    })
    .await;
}
