//! What every [`Sink`] must do, as tests that are generic over it: for the sinks of this crate and those of its users.
//!
//! Bytes and states are asserted. A sink is asked for what it says that it can do, and must refuse the rest.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::join;

use super::{Abilities, Begun, Expected, NewUpload, Sink};
use crate::base::path::RelPath;
use crate::store::{IfExists, List, Meta, Published, Range, StoreError};

/// Tests that a [`Sink`] keeps the rules of the trait. `make` gives an empty one each time, which grants clients
/// [`Overwrite::Always`](crate::Overwrite::Always) and takes files of 1 MiB; `bytes` looks, beside the trait, what it has
/// under a name. Must be called within a tokio runtime with a clock, which need not be paused.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// use udpack_transfer::{Memory, Overwrite, testing::sink_conforms};
///
/// let make = async || Memory::new(64 << 20).overwrite(Overwrite::Always);
/// sink_conforms(make, async |files, path| files.get(path.as_str())).await;
/// # });
/// ```
///
/// # Panics
/// Where a rule is broken, or where one of the tests takes longer than a minute.
pub async fn sink_conforms<S: Sink>(
    make: impl AsyncFn() -> S,
    bytes: impl AsyncFn(&S, &RelPath) -> Option<Bytes>,
) {
    macro_rules! run {
        ($($test:ident),* $(,)?) => {$(
            let sink = make().await;
            let look = async |path: &str| bytes(&sink, &rel(path)).await;
            let test = $test(&sink, &look);
            let ended = tokio::time::timeout(LONGEST, test).await;
            assert!(ended.is_ok(), "{} did not end", stringify!($test));
        )*};
    }
    run![
        a_file_is_seen_when_it_is_published_and_not_before,
        size_and_hash_need_not_be_told,
        ranges_come_in_any_order_or_are_refused,
        nothing_is_taken_beyond_the_size_nor_short_of_it,
        a_wrong_hash_leaves_nothing,
        what_is_aborted_or_discarded_leaves_nothing,
        a_checkpoint_outlives_its_upload,
        two_clients_do_not_share_an_upload,
        of_two_uploads_of_one_name_one_gets_it,
        a_taken_name_is_treated_as_the_client_wants,
        what_is_there_can_be_looked_at_or_that_is_refused,
        dropped_futures_lose_nothing_that_was_acknowledged,
    ];
}

const LONGEST: Duration = Duration::from_secs(60);
/// How long to wait until an upload whose future was dropped is let go of, each time.
const PAUSE: Duration = Duration::from_millis(1);
const PEER: &str = "tester";

fn rel(path: &str) -> RelPath {
    path.parse().expect("a valid path")
}

/// Bytes that differ at each place, and from those of another seed.
fn noise(seed: u8, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&[seed])
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    blake3::hash(bytes).into()
}

fn resumable<'a>(path: &'a RelPath, bytes: &Bytes) -> NewUpload<'a> {
    NewUpload {
        size: Some(bytes.len() as u64),
        resumable: true,
        ..NewUpload::new(path, PEER)
    }
}

/// Begins an upload, when one whose future was dropped is let go of.
async fn begin<S: Sink>(sink: &S, new: &NewUpload<'_>) -> S::Upload {
    loop {
        match sink.begin(new).await {
            Ok(Begun::New(upload)) => return upload,
            Err(StoreError::Busy { .. }) => tokio::time::sleep(PAUSE).await,
            Ok(Begun::Exists(stored)) => panic!("something has the name: {stored:?}"),
            Err(error) => panic!("an upload is refused: {error}"),
        }
    }
}

async fn write<S: Sink>(sink: &S, upload: &mut S::Upload, all: &Bytes, from: usize, to: usize) {
    let written = sink.write(upload, from as u64, all.slice(from..to)).await;
    assert!(written.is_ok(), "{from} to {to}: {written:?}");
}

fn expected(bytes: &[u8]) -> Expected {
    Expected {
        size: Some(bytes.len() as u64),
        hash: Some(hash(bytes)),
        meta: Meta::default(),
    }
}

/// Uploads all of it by this policy, as a server does.
async fn put<S: Sink>(
    sink: &S,
    path: &str,
    bytes: &Bytes,
    if_exists: IfExists,
) -> Result<Published, StoreError> {
    let path = rel(path);
    let new = NewUpload {
        size: Some(bytes.len() as u64),
        if_exists,
        ..NewUpload::new(&path, PEER)
    };
    let mut upload = match sink.begin(&new).await? {
        Begun::New(upload) => upload,
        Begun::Exists(stored) => {
            let (size, there) = (stored.size(), stored.hash().await?);
            let same = if_exists == IfExists::Skip || there == hash(bytes);
            return match same {
                true => Ok(Published {
                    path: path.as_str().to_owned(),
                    size,
                    hash: there,
                    same,
                    sync: crate::store::Synced::File,
                    other_time: None,
                    xattrs: 0,
                }),
                false => Err(StoreError::Exists { path }),
            };
        }
    };
    if !bytes.is_empty() {
        write(sink, &mut upload, bytes, 0, bytes.len()).await;
    }
    let whole = sink.finish(upload, expected(bytes)).await?;
    sink.publish(whole).await
}

/// What is told of it must be there, and be what was written.
fn check_have(have: &[Range], all: &[u8]) {
    let mut end = 0;
    for range in have {
        assert!(range.len > 0 && range.off >= end, "{have:?} is in order");
        end = range.off + range.len;
        let (from, to) = (range.off as usize, end as usize);
        let bytes = all.get(from..to).expect("no more than was written");
        assert_eq!(range.hash, hash(bytes), "{from} to {to}");
    }
}

/// Bytes from the beginning on that are there, in one range or several that join.
fn held(have: &[Range]) -> u64 {
    have.iter().fold(0, |end, range| match range.off == end {
        true => end + range.len,
        false => end,
    })
}

/// Sends what is missing behind what was `sent`, and publishes.
async fn complete<S: Sink>(
    sink: &S,
    mut upload: S::Upload,
    have: &[Range],
    all: &Bytes,
    sent: usize,
) -> Published {
    let mut at = sent;
    for range in have {
        let (from, to) = (range.off as usize, (range.off + range.len) as usize);
        if at < from {
            write(sink, &mut upload, all, at, from).await;
        }
        at = at.max(to);
    }
    if at < all.len() {
        write(sink, &mut upload, all, at, all.len()).await;
    }
    let whole = sink.finish(upload, expected(all)).await;
    let whole = whole.unwrap_or_else(|error| panic!("all of it is there: {error}"));
    let published = sink.publish(whole).await;
    published.unwrap_or_else(|error| panic!("the name is free: {error}"))
}

async fn a_file_is_seen_when_it_is_published_and_not_before<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    for (path, len) in [("a/b.bin", 300_000), ("empty", 0)] {
        let (all, name) = (noise(1, len), rel(path));
        let new = NewUpload {
            size: Some(len as u64),
            ..NewUpload::new(&name, PEER)
        };
        let mut upload = begin(sink, &new).await;
        for at in (0..len).step_by(70_000) {
            write(sink, &mut upload, &all, at, len.min(at + 70_000)).await;
        }
        assert_eq!(look(path).await, None, "{path}");
        let whole = sink.finish(upload, expected(&all)).await;
        let whole = whole.unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!(look(path).await, None, "{path} has no name yet");
        let published = sink.publish(whole).await;
        let published = published.unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!(published.path, path);
        assert_eq!(published.size, len as u64);
        assert_eq!(published.hash, hash(&all));
        assert!(!published.same);
        assert_eq!(look(path).await, Some(all), "{path}");
    }
}

async fn size_and_hash_need_not_be_told<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    let (all, path) = (noise(2, 50_000), rel("untold"));
    let mut upload = begin(sink, &NewUpload::new(&path, PEER)).await;
    write(sink, &mut upload, &all, 0, 20_000).await;
    write(sink, &mut upload, &all, 20_000, 50_000).await;
    let whole = sink.finish(upload, Expected::default()).await;
    let published = sink.publish(whole.expect("nothing was told")).await;
    let published = published.expect("the name is free");
    assert_eq!((published.size, published.hash), (50_000, hash(&all)));
    assert_eq!(look("untold").await, Some(all));
}

async fn ranges_come_in_any_order_or_are_refused<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    let (all, path) = (noise(3, 120_000), rel("order"));
    let new = NewUpload {
        size: Some(all.len() as u64),
        ..NewUpload::new(&path, PEER)
    };
    let mut upload = begin(sink, &new).await;
    write(sink, &mut upload, &all, 0, 30_000).await;
    if sink.abilities().any_order {
        for at in [90_000, 30_000, 60_000] {
            write(sink, &mut upload, &all, at, at + 30_000).await;
        }
    } else {
        for at in [60_000, 0] {
            let refused = sink.write(&mut upload, at, all.slice(0..30_000)).await;
            assert!(
                matches!(refused, Err(StoreError::BadOffset { expected: 30_000 })),
                "{at}: {refused:?}"
            );
        }
        write(sink, &mut upload, &all, 30_000, 120_000).await;
    }
    let whole = sink.finish(upload, expected(&all)).await;
    let published = sink.publish(whole.expect("all of it is there")).await;
    assert_eq!(published.expect("the name is free").hash, hash(&all));
    assert_eq!(look("order").await, Some(all));
}

async fn nothing_is_taken_beyond_the_size_nor_short_of_it<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    let (all, path) = (noise(4, 40_000), rel("size"));
    let new = NewUpload {
        size: Some(30_000),
        ..NewUpload::new(&path, PEER)
    };
    let mut upload = begin(sink, &new).await;
    write(sink, &mut upload, &all, 0, 20_000).await;
    let refused = sink.write(&mut upload, 20_000, all.slice(20_000..)).await;
    assert!(
        matches!(
            refused,
            Err(StoreError::SizeMismatch {
                expected: 30_000,
                got: 40_000
            })
        ),
        "{refused:?}"
    );
    sink.abort(upload).await;

    let mut upload = begin(sink, &new).await;
    write(sink, &mut upload, &all, 0, 20_000).await;
    if sink.abilities().any_order {
        // A hole is missing bytes, too.
        write(sink, &mut upload, &all, 25_000, 30_000).await;
    }
    let short = sink.finish(upload, Expected::default()).await;
    assert!(
        matches!(
            short,
            Err(StoreError::SizeMismatch {
                expected: 30_000,
                got: 20_000
            })
        ),
        "{:?}",
        short.err()
    );
    assert_eq!(look("size").await, None);
    let again = put(sink, "size", &all, IfExists::Error).await;
    assert_eq!(again.expect("nothing is left").hash, hash(&all));
}

async fn a_wrong_hash_leaves_nothing<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    let (all, path) = (noise(5, 100_000), rel("hash"));
    let mut upload = begin(sink, &resumable(&path, &all)).await;
    write(sink, &mut upload, &all, 0, all.len()).await;
    let checkpoint = sink.checkpoint(&mut upload).await;
    assert!(checkpoint.is_ok(), "{checkpoint:?}");
    let told = Expected {
        hash: Some(hash(b"another")),
        ..expected(&all)
    };
    let refused = sink.finish(upload, told).await;
    assert!(
        matches!(&refused, Err(StoreError::HashMismatch { got, .. }) if *got == hash(&all)),
        "{:?}",
        refused.err()
    );
    assert_eq!(look("hash").await, None);
    let mut upload = begin(sink, &resumable(&path, &all)).await;
    assert_eq!(sink.have(&mut upload).await.expect("a new one"), []);
    complete(sink, upload, &[], &all, 0).await;
    assert_eq!(look("hash").await, Some(all));
}

async fn what_is_aborted_or_discarded_leaves_nothing<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    let (all, path) = (noise(6, 100_000), rel("gone"));
    for whole in [false, true] {
        let mut upload = begin(sink, &resumable(&path, &all)).await;
        let have = sink.have(&mut upload).await.expect("a new one");
        assert_eq!(have, [], "whole: {whole}");
        write(sink, &mut upload, &all, 0, all.len()).await;
        let checkpoint = sink.checkpoint(&mut upload).await;
        assert!(checkpoint.is_ok(), "{checkpoint:?}");
        if whole {
            let whole = sink.finish(upload, expected(&all)).await;
            sink.discard(whole.expect("all of it is there")).await;
        } else {
            sink.abort(upload).await;
        }
        assert_eq!(look("gone").await, None, "whole: {whole}");
    }
    let mut upload = begin(sink, &resumable(&path, &all)).await;
    assert_eq!(sink.have(&mut upload).await.expect("a new one"), []);
    sink.abort(upload).await;
}

async fn a_checkpoint_outlives_its_upload<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    for (path, dropped) in [("suspended", false), ("dropped", true)] {
        let (all, name) = (noise(7, 500_000), rel(path));
        let mut upload = begin(sink, &resumable(&name, &all)).await;
        let durable = sink.durable(&upload);
        assert_eq!(durable.bytes(), 0, "{path}");
        write(sink, &mut upload, &all, 0, 200_000).await;
        assert!(durable.bytes() <= 200_000, "{path}");
        let checkpoint = sink.checkpoint(&mut upload).await;
        assert!(checkpoint.is_ok(), "{path}: {checkpoint:?}");
        let safe = durable.bytes();
        assert!(safe <= 200_000, "{path}: {safe}");
        write(sink, &mut upload, &all, 200_000, 300_000).await;
        if dropped {
            drop(upload);
        } else {
            sink.suspend(upload).await;
        }
        assert_eq!(look(path).await, None, "{path}");

        let mut upload = begin(sink, &resumable(&name, &all)).await;
        let have = sink.have(&mut upload).await.expect("what is there");
        check_have(&have, &all[..300_000]);
        if !sink.abilities().resume {
            assert_eq!((safe, &have[..]), (0, &[][..]), "{path}");
        }
        let held = held(&have);
        assert!(held >= safe, "{path}: {held} of {safe} durable bytes");
        // What a client sent before it was told of it.
        write(sink, &mut upload, &all, 0, 1_000).await;
        let published = complete(sink, upload, &have, &all, 1_000).await;
        assert_eq!(published.hash, hash(&all));
        assert_eq!(look(path).await, Some(all), "{path}");
    }
}

async fn two_clients_do_not_share_an_upload<S: Sink>(
    sink: &S,
    _: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    let (all, path) = (noise(8, 100_000), rel("shared"));
    let new = resumable(&path, &all);
    let mut upload = begin(sink, &new).await;
    write(sink, &mut upload, &all, 0, 50_000).await;
    let checkpoint = sink.checkpoint(&mut upload).await;
    assert!(checkpoint.is_ok(), "{checkpoint:?}");
    if sink.abilities().resume {
        let second = sink.begin(&new).await;
        assert!(
            matches!(second, Err(StoreError::Busy { .. })),
            "one writes it"
        );
    }
    sink.suspend(upload).await;
    let theirs = NewUpload {
        peer: "other",
        ..new
    };
    let mut upload = begin(sink, &theirs).await;
    assert_eq!(sink.have(&mut upload).await.expect("a new one"), []);
    sink.abort(upload).await;
}

async fn of_two_uploads_of_one_name_one_gets_it<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    if !sink.abilities().names {
        return;
    }
    for (path, policy, seeds) in [
        ("error", IfExists::Error, [9, 10]),
        ("other", IfExists::Same, [9, 10]),
        ("equal", IfExists::Same, [9, 9]),
    ] {
        let name = rel(path);
        let files = seeds.map(|seed| noise(seed, 60_000));
        let new = NewUpload {
            if_exists: policy,
            ..NewUpload::new(&name, PEER)
        };
        let mut whole = Vec::new();
        for all in &files {
            let mut upload = begin(sink, &new).await;
            write(sink, &mut upload, all, 0, all.len()).await;
            let finished = sink.finish(upload, expected(all)).await;
            whole.extend(finished.ok());
        }
        let [Some(second), Some(first)] = [whole.pop(), whole.pop()] else {
            panic!("{path}: both are whole");
        };
        let (first, second) = join(sink.publish(first), sink.publish(second)).await;
        let outcomes = [first, second];
        let named = |at: usize| outcomes[at].as_ref().is_ok_and(|it| !it.same);
        assert!(named(0) != named(1), "{path}: {outcomes:?}");
        let (winner, loser) = if named(0) { (0, 1) } else { (1, 0) };
        match &outcomes[loser] {
            Ok(published) => assert!(published.same && path == "equal", "{path}"),
            Err(error) => {
                assert!(
                    matches!(error, StoreError::Exists { .. }),
                    "{path}: {error}"
                );
                assert_ne!(path, "equal");
            }
        }
        assert_eq!(look(path).await.as_ref(), Some(&files[winner]), "{path}");
    }
}

async fn a_taken_name_is_treated_as_the_client_wants<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    if !sink.abilities().names {
        return;
    }
    let (old, new) = (noise(11, 30_000), noise(12, 20_000));
    let path = "dir/a.txt";
    let first = put(sink, path, &old, IfExists::Same).await;
    assert!(!first.expect("the name is free").same);

    let same = put(sink, path, &old, IfExists::Same).await;
    let same = same.expect("the same bytes");
    assert!(same.same && same.hash == hash(&old) && same.path == path);
    for policy in [IfExists::Same, IfExists::Error] {
        let refused = put(sink, path, &new, policy).await;
        assert!(
            matches!(refused, Err(StoreError::Exists { .. })),
            "{policy}: {refused:?}"
        );
    }
    let skipped = put(sink, path, &new, IfExists::Skip).await;
    let skipped = skipped.expect("what is there stays");
    assert!(skipped.same && skipped.hash == hash(&old) && skipped.size == 30_000);
    assert_eq!(look(path).await.as_ref(), Some(&old));

    for number in 1..=2 {
        let renamed = put(sink, path, &new, IfExists::Rename).await;
        let renamed = renamed.expect("a numbered name is free");
        assert_eq!(renamed.path, format!("dir/a ({number}).txt"));
        assert_eq!(look(&renamed.path).await.as_ref(), Some(&new));
    }
    assert_eq!(look(path).await.as_ref(), Some(&old));

    let replaced = put(sink, path, &new, IfExists::Overwrite).await;
    assert!(!replaced.expect("it is granted").same);
    assert_eq!(look(path).await, Some(new));
    let below = put(sink, "dir/a.txt/b", &old, IfExists::Same).await;
    assert!(below.is_err(), "a file is no directory: {below:?}");
}

async fn what_is_there_can_be_looked_at_or_that_is_refused<S: Sink>(
    sink: &S,
    _: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    let Abilities {
        read, list, remove, ..
    } = sink.abilities();
    let all = noise(13, 400_000);
    for path in ["x", "y/z"] {
        let stored = put(sink, path, &all, IfExists::Same).await;
        assert!(stored.is_ok(), "{path}: {stored:?}");
    }
    let path = rel("y/z");
    let refuses = |can: bool, error: Option<StoreError>| {
        let unsupported = matches!(error, Some(StoreError::Unsupported { .. }));
        assert!(can || unsupported, "{error:?}");
        assert!(!can || error.is_none(), "{error:?}");
    };
    refuses(read, sink.read(&path).await.err());
    refuses(list, sink.stat(Some(&path)).await.err());
    let whole = List {
        recursive: true,
        limit: 100,
        ..List::default()
    };
    refuses(list, sink.list(&whole).await.err());
    if read {
        let stored = sink.read(&path).await.expect("it was read before");
        assert_eq!((stored.size(), stored.path()), (400_000, &path));
        assert_eq!(stored.hash().await.expect("its hash"), hash(&all));
        let mut bytes = Vec::new();
        loop {
            let offset = bytes.len() as u64;
            let next = stored.read_at(offset, 100_000).await.expect("its bytes");
            assert!(next.len() <= 100_000);
            if next.is_empty() {
                break;
            }
            bytes.extend_from_slice(&next);
        }
        assert!(bytes == all, "what is read is what was written");
    }
    if list {
        let entry = sink.stat(Some(&path)).await.expect("it was there");
        assert_eq!((&*entry.path, entry.size), ("y/z", 400_000));
        let page = sink.list(&whole).await.expect("it was listed before");
        let names: Vec<_> = page.entries.iter().map(|entry| &*entry.path).collect();
        assert!(names.contains(&"x") && names.contains(&"y/z"), "{names:?}");
        assert!(!page.more);
        let mut after = String::new();
        let mut paged = Vec::new();
        loop {
            let query = List {
                after: Some(&after),
                limit: 1,
                ..whole
            };
            let page = sink.list(&query).await.expect("one by one");
            assert!(page.entries.len() <= 1);
            paged.extend(page.entries.iter().map(|entry| entry.path.clone()));
            match (page.more, page.entries.into_iter().next_back()) {
                (true, Some(last)) => after = last.path,
                _ => break,
            }
        }
        assert_eq!(paged, names);
    }
    let removed = sink.remove(&rel("x"), false).await;
    if remove {
        let removed = removed.expect("it was there");
        assert_eq!((removed.files, removed.bytes), (1, 400_000));
        let again = sink.remove(&rel("x"), false).await;
        assert!(
            matches!(again, Err(StoreError::NotFound { .. })),
            "{again:?}"
        );
        if list {
            let gone = sink.stat(Some(&rel("x"))).await;
            assert!(matches!(gone, Err(StoreError::NotFound { .. })), "{gone:?}");
        }
    } else {
        refuses(false, removed.err());
    }
}

async fn dropped_futures_lose_nothing_that_was_acknowledged<S: Sink>(
    sink: &S,
    look: &impl AsyncFn(&str) -> Option<Bytes>,
) {
    let all = noise(14, 300_000);
    for step in [
        "begin",
        "have",
        "write",
        "checkpoint",
        "finish",
        "publish",
        "suspend",
        "abort",
    ] {
        let path = rel(step);
        let new = resumable(&path, &all);
        // Polled once, then dropped.
        if step == "begin" {
            drop(sink.begin(&new).now_or_never());
        } else {
            let mut upload = begin(sink, &new).await;
            let durable = sink.durable(&upload);
            write(sink, &mut upload, &all, 0, 100_000).await;
            let checkpoint = sink.checkpoint(&mut upload).await;
            assert!(checkpoint.is_ok(), "{checkpoint:?}");
            let safe = durable.bytes();
            match step {
                "have" => {
                    sink.suspend(upload).await;
                    let mut upload = begin(sink, &new).await;
                    drop(sink.have(&mut upload).now_or_never());
                    sink.suspend(upload).await;
                }
                "write" => {
                    let bytes = all.slice(100_000..200_000);
                    drop(sink.write(&mut upload, 100_000, bytes).now_or_never());
                    sink.suspend(upload).await;
                }
                "checkpoint" => {
                    write(sink, &mut upload, &all, 100_000, 200_000).await;
                    drop(sink.checkpoint(&mut upload).now_or_never());
                    sink.suspend(upload).await;
                }
                "suspend" => drop(sink.suspend(upload).now_or_never()),
                "abort" => drop(sink.abort(upload).now_or_never()),
                _ => {
                    write(sink, &mut upload, &all, 100_000, 300_000).await;
                    if step == "finish" {
                        drop(sink.finish(upload, expected(&all)).now_or_never());
                    } else {
                        let whole = sink.finish(upload, expected(&all)).await;
                        let whole = whole.expect("all of it is there");
                        drop(sink.publish(whole).now_or_never());
                    }
                }
            }
            if matches!(step, "have" | "write" | "checkpoint" | "suspend") {
                let mut upload = begin(sink, &new).await;
                let have = sink.have(&mut upload).await.expect("what is there");
                check_have(&have, &all);
                let held = held(&have);
                assert!(held >= safe, "{step}: {held} of {safe}");
                sink.abort(upload).await;
            }
        }
        let seen = look(step).await;
        match step {
            // It may be on its way still.
            "publish" => assert!(seen.is_none_or(|seen| seen == all), "whole or nothing"),
            _ => assert_eq!(seen, None, "{step}"),
        }
        // Nothing stands in the way of the next one.
        let again = put(sink, step, &all, IfExists::Same).await;
        assert_eq!(again.expect("the same bytes").hash, hash(&all), "{step}");
        assert_eq!(look(step).await.as_ref(), Some(&all), "{step}");
    }
}
