//! Extended attributes go with files and directories, both ways, as far as both sides take them; what is lost is told. What a
//! peer says of them is held to the limits.
#![cfg(target_os = "linux")]

mod common;
#[path = "raw/mod.rs"]
mod raw;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use common::{Fixture, bounded, drain, fetch, memory, readable, rel, stores};
use raw::{RawLane, Say, V, dir, finish, map, put, resumable, with};
use rustix::fs::{XattrFlags, fgetxattr, fgetxattr_query, fsetxattr};
use udpack::{Client, Deny, Hello, Identity, Limits, Peer, Server, Socket};
use udpack_transfer::{
    Downloader, IfExists, LostXattrs, Memory, Outcome, Receiver, Source, Store, StoreConfig,
    Uploader, Walk, Xattrs,
};

fn set(path: &Path, name: &str, value: &[u8]) {
    let file = File::open(path).expect("open");
    fsetxattr(&file, name, value, XattrFlags::empty())
        .expect("a file system with extended attributes");
}

fn value(path: &Path, name: &str) -> Option<Vec<u8>> {
    let file = File::open(path).expect("open");
    let mut value = vec![0; fgetxattr_query(&file, name).ok()?];
    let filled = fgetxattr(&file, name, &mut *value).expect("a value");
    value.truncate(filled);
    Some(value)
}

fn taking(xattrs: Xattrs) -> StoreConfig {
    StoreConfig { xattrs, ..stores() }
}

async fn send(socket: &Socket, sources: Vec<Source>, which: Xattrs) -> Vec<Outcome> {
    let uploader = Uploader::new(socket)
        .if_exists(IfExists::Overwrite)
        .preserve(true)
        .xattrs(which);
    let (done, failed) = drain(uploader.put(sources)).await;
    assert!(failed.is_empty(), "{failed:?}");
    done
}

async fn get(socket: &Socket, store: &Store, path: &str, which: Xattrs) -> Outcome {
    let downloader = Downloader::new(socket, store.clone()).preserve(true);
    let fetched = fetch(downloader.xattrs(which), path).await;
    fetched.expect("it arrives")
}

#[tokio::test]
async fn attributes_of_files_and_directories_go_there_and_back() {
    bounded(async {
        let fixture = Fixture::with(taking(Xattrs::User), readable()).await;
        let here = tempfile::tempdir().expect("a directory");
        let tree = here.path().join("tree");
        fs::create_dir(&tree).expect("mkdir");
        // Sent in one message, in chunks, and without permission to write.
        for (name, size) in [("small", 5), ("large", 700_000), ("sealed", 9)] {
            let path = tree.join(name);
            fs::write(&path, vec![7; size]).expect("write");
            set(&path, "user.note", name.as_bytes());
            set(&path, "user.bytes", b"\0\xff");
            set(&path, "user.empty", b"");
        }
        let sealed = tree.join("sealed");
        fs::set_permissions(&sealed, fs::Permissions::from_mode(0o444)).expect("chmod");
        set(&tree, "user.dir", b"yes");
        let socket = fixture.connect().await;
        let walk = || Walk::new(&tree, "tree").every_dir(true).map(Source::from);
        let done = send(&socket, walk().collect(), Xattrs::User).await;
        assert_eq!(done.len(), 4);
        assert!(done.iter().all(|one| one.lost_xattrs == LostXattrs::None));

        let at_server = fixture.root().join("tree");
        let store = Store::open(here.path().join("down"), taking(Xattrs::User)).expect("a store");
        for name in ["small", "large", "sealed"] {
            let outcome = get(&socket, &store, &format!("tree/{name}"), Xattrs::User).await;
            assert_eq!(outcome.lost_xattrs, LostXattrs::None);
            for side in [&at_server, &here.path().join("down/tree")] {
                let path = side.join(name);
                assert_eq!(value(&path, "user.note").as_deref(), Some(name.as_bytes()));
                assert_eq!(value(&path, "user.bytes").as_deref(), Some(&b"\0\xff"[..]));
                assert_eq!(value(&path, "user.empty").as_deref(), Some(&b""[..]));
                let mode = fs::metadata(&path).expect("there").permissions().mode() & 0o777;
                let sealed = mode == 0o444;
                assert_eq!(sealed, name == "sealed", "{mode:o}");
            }
        }
        assert_eq!(value(&at_server, "user.dir").as_deref(), Some(&b"yes"[..]));
        // A directory that is there gets them, too.
        set(&tree, "user.dir", b"new");
        let source = Walk::new(&tree, "tree").every_dir(true).map(Source::from);
        let dir = source.last().expect("the directory comes last");
        send(&socket, vec![dir], Xattrs::User).await;
        assert_eq!(value(&at_server, "user.dir").as_deref(), Some(&b"new"[..]));
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn without_the_option_nothing_is_sent() {
    bounded(async {
        let fixture = Fixture::with(taking(Xattrs::All), readable()).await;
        let here = tempfile::tempdir().expect("a directory");
        let path = here.path().join("f");
        fs::write(&path, b"abc").expect("write");
        set(&path, "user.note", b"x");
        let socket = fixture.connect().await;
        let source = Source::file(&path, rel("f"));
        send(&socket, vec![source], Xattrs::None).await;
        assert_eq!(value(&fixture.root().join("f"), "user.note"), None);
    })
    .await;
}

#[tokio::test]
async fn a_server_that_takes_none_stores_the_file_and_says_so() {
    bounded(async {
        let fixture = Fixture::with(stores(), readable()).await;
        let here = tempfile::tempdir().expect("a directory");
        let path = here.path().join("f");
        fs::write(&path, b"abc").expect("write");
        let socket = fixture.connect().await;
        // A file without any loses none.
        let plain = send(&socket, vec![memory("plain", b"x".into())], Xattrs::User).await;
        assert_eq!(plain[0].lost_xattrs, LostXattrs::None);
        set(&path, "user.a", b"1");
        set(&path, "user.b", b"2");
        let source = || vec![Source::file(&path, rel("f"))];
        let done = send(&socket, source(), Xattrs::User).await;
        assert_eq!(done[0].lost_xattrs, LostXattrs::Some(2));
        assert_eq!(value(&fixture.root().join("f"), "user.a"), None);

        set(&fixture.root().join("f"), "user.secret", b"3");
        let store = Store::open(here.path().join("down"), taking(Xattrs::User)).expect("a store");
        let outcome = get(&socket, &store, "f", Xattrs::User).await;
        assert_eq!(outcome.lost_xattrs, LostXattrs::Withheld);
        assert_eq!(value(&here.path().join("down/f"), "user.secret"), None);

        // A server that takes those of users gives no others, and not a part of what was asked for.
        let fixture = fixture.reopen(taking(Xattrs::User), readable()).await;
        let socket = fixture.connect().await;
        fs::remove_file(here.path().join("down/f")).expect("remove");
        let outcome = get(&socket, &store, "f", Xattrs::All).await;
        assert_eq!(outcome.lost_xattrs, LostXattrs::Withheld);

        // A place that has no attributes at all.
        let receiver = Receiver::into_sink(Memory::new(1 << 20), readable());
        let server = receiver
            .attach(Server::builder())
            .identity(Identity::generate().expect("a key"))
            .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
            .bind("127.0.0.1:0")
            .await
            .expect("a free port");
        let socket = connect(&server).await;
        let uploader = Uploader::new(&socket).xattrs(Xattrs::User);
        let (done, failed) = drain(uploader.put(source())).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done[0].lost_xattrs, LostXattrs::Some(2));
    })
    .await;
}

async fn connect(server: &Server) -> Socket {
    Client::builder()
        .pin(server.fingerprint())
        .connect(&server.local_addr().to_string())
        .await
        .expect("it lets us in")
}

/// A server whose messages have this many bytes at most, and its root.
async fn narrow(frame: usize) -> (Server, Socket, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open(dir.path().join("up"), taking(Xattrs::User)).expect("a store");
    let limits = Limits {
        frame,
        ..Limits::default()
    };
    let server = Receiver::new(store, readable())
        .attach(Server::builder().limits(limits))
        .identity(Identity::generate().expect("a key"))
        .auth(|_: Hello| async { Ok::<_, Deny>(Peer::new("tester")) })
        .bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let socket = connect(&server).await;
    (server, socket, dir)
}

#[tokio::test]
async fn where_messages_are_small_a_file_goes_in_several_or_fails() {
    bounded(async {
        let here = tempfile::tempdir().expect("a directory");
        let path = here.path().join("f");
        fs::write(&path, vec![7; 10_000]).expect("write");
        set(&path, "user.note", &[1; 500]);
        let source = || Source::file(&path, rel("f"));
        let (_server, socket, dir) = narrow(24 << 10).await;
        let done = send(&socket, vec![source()], Xattrs::User).await;
        assert_eq!(done[0].lost_xattrs, LostXattrs::None);
        let stored = dir.path().join("up/f");
        assert_eq!(value(&stored, "user.note").as_deref(), Some(&[1; 500][..]));
        assert!(fs::read(stored).expect("there") == vec![7; 10_000]);

        let (_server, socket, dir) = narrow(16 << 10).await;
        let uploader = Uploader::new(&socket).xattrs(Xattrs::User);
        let (done, failed) = drain(uploader.put([source()])).await;
        assert!(done.is_empty());
        let told = format!("{:#}", failed[0].1);
        assert!(told.contains("do not fit"), "{told}");
        assert!(!dir.path().join("up/f").exists());
    })
    .await;
}

/// These attributes, as a message has them.
fn pairs(xattrs: &[(&[u8], &[u8])]) -> V {
    let pair = |(name, value): &(&[u8], &[u8])| {
        V::Array(vec![V::Bin(name.to_vec()), V::Bin(value.to_vec())])
    };
    V::Array(xattrs.iter().map(pair).collect())
}

fn bearing((event, data): Say, xattrs: V) -> Say {
    (event, with(data, "xattrs", xattrs))
}

#[tokio::test]
async fn attributes_that_cannot_be_are_refused_and_others_are_left_out() {
    bounded(async {
        let fixture = Fixture::with(taking(Xattrs::User), readable()).await;
        let socket = fixture.connect().await;
        let mut lane = RawLane::open(&socket).await;
        let long = vec![b'x'; 256];
        let large = vec![0; 65_536];
        let many: Vec<(&[u8], &[u8])> = vec![(b"user.a", b""); 257];
        let half = vec![0; 33_000];
        let wrong = [
            pairs(&[(b"", b"x")]),
            pairs(&[(b"user.a\0b", b"x")]),
            pairs(&[(&long, b"x")]),
            pairs(&[(b"user.a", &large)]),
            pairs(&[(b"user.a", &half), (b"user.b", &half)]),
            pairs(&many),
            V::Array(vec![V::Array(vec![V::Bin(b"user.a".to_vec())])]),
            V::Array(vec![V::Bin(b"user.a".to_vec())]),
            map([("user.a", V::Bin(b"x".to_vec()))]),
        ];
        let mut id = 0;
        for xattrs in wrong {
            for say in [
                put(id + 1, "f", b"abc"),
                resumable(id + 2, "f", 3),
                dir(id + 3, "d"),
            ] {
                id += 1;
                lane.say(&bearing(say, xattrs.clone())).await;
                assert_eq!(lane.hear().await.line, format!("error {id} bad_message"));
            }
        }
        assert!(fixture.visible().is_empty());

        // What gives rights is not set unless the operator says so, whoever asks.
        let mixed = pairs(&[
            (
                b"security.capability",
                b"\x01\0\0\x02\xff\xff\xff\xff\0\0\0\0\0\0\0\0\0\0\0\0",
            ),
            (b"user.ok", b"1"),
            (b"trusted.x", b"2"),
            (b"nonsense", b"3"),
        ]);
        lane.say(&bearing(put(100, "f", b"abc"), mixed.clone()))
            .await;
        assert_eq!(lane.hear().await.line, "done 100 f 3");
        let path = fixture.root().join("f");
        assert_eq!(value(&path, "user.ok").as_deref(), Some(&b"1"[..]));
        for name in ["security.capability", "trusted.x"] {
            assert_eq!(value(&path, name), None);
        }
        lane.say(&bearing(dir(101, "d"), mixed)).await;
        assert_eq!(lane.hear().await.line, "done 101 d 0");
        assert_eq!(value(&fixture.root().join("d"), "trusted.x"), None);

        // One that no file system holds does not fail its file.
        let odd = pairs(&[(b"user.", b""), (b"user.fine", b"")]);
        lane.say(&bearing(resumable(102, "g", 3), odd)).await;
        assert_eq!(lane.hear().await.line, "ready 102 0");
        lane.say(&raw::chunk(102, 0, b"abc")).await;
        lane.say(&finish(102, b"abc")).await;
        assert_eq!(lane.hear().await.line, "done 102 g 3");
        let path = fixture.root().join("g");
        assert_eq!(value(&path, "user.fine").as_deref(), Some(&b""[..]));
        fixture.settled().await;
    })
    .await;
}
