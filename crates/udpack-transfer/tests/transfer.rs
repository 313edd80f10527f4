//! Uploads end to end: bytes, progress, names taken, policies, limits, many clients, sources that misbehave.

mod common;

use common::{Fixture, bounded, drain, memory, noise, rel};
use std::time::Duration;
use udpack::CloseCode;
use udpack_transfer::{
    ErrorKind, Event, IfExists, Limiter, Overwrite, ReceiverConfig, Source, StoreConfig,
    TransferError, Uploader,
};

/// A large local file that takes no space: too much to be sent before a test acts.
fn sparse(fixture: &Fixture, name: &str, size: u64) -> Source {
    let path = fixture.dir.path().join(name);
    std::fs::File::create(&path)
        .expect("a file")
        .set_len(size)
        .expect("a sparse file");
    Source::file(path, rel(name))
}

#[tokio::test]
async fn files_of_every_size_arrive_whole() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let sizes = [0, 1, 255, 65_536, 262_143, 262_144, 262_145, 5_000_000];
        let sources = sizes
            .iter()
            .map(|size| memory(&format!("f{size}"), noise(*size as u64, *size)))
            .collect::<Vec<_>>();
        let (done, failed) = drain(Uploader::new(&socket).put(sources)).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done.len(), sizes.len());
        for (outcome, size) in done.iter().zip(sizes) {
            let bytes = noise(size as u64, size);
            assert_eq!(fixture.stored(&outcome.path), bytes);
            assert_eq!(outcome.hash, *blake3::hash(&bytes).as_bytes());
            assert_eq!(
                (outcome.size, outcome.sent, outcome.same),
                (size as u64, size as u64, false)
            );
        }
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn local_files_arrive_under_the_name_asked_for_and_directories_are_made() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let local = fixture.dir.path().join("local.bin");
        std::fs::write(&local, noise(1, 700_000)).expect("a local file");
        let sources = vec![Source::file(&local, rel("deep/er/name.bin"))];
        let (done, failed) = drain(Uploader::new(&socket).put(sources)).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done[0].path, "deep/er/name.bin");
        assert_eq!(fixture.stored("deep/er/name.bin"), noise(1, 700_000));
        assert_eq!(fixture.visible(), ["deep/", "deep/er/", "deep/er/name.bin"]);
    })
    .await;
}

#[tokio::test]
async fn many_small_files_share_a_lane() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let sources = (0..500)
            .map(|n| memory(&format!("d/{n}"), noise(n, 100)))
            .collect::<Vec<_>>();
        let (done, failed) = drain(Uploader::new(&socket).lanes(1).put(sources)).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done.len(), 500);
        for n in 0..500 {
            assert_eq!(fixture.stored(&format!("d/{n}")), noise(n, 100));
        }
    })
    .await;
}

#[tokio::test]
async fn the_same_file_again_is_success_and_hardly_anything_is_sent() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        for size in [0, 10, 3_000_000] {
            let source = memory(&format!("f{size}"), noise(size, size as usize));
            let (first, _) = drain(Uploader::new(&socket).put(vec![source.clone()])).await;
            assert_eq!((first[0].sent, first[0].same), (size, false));
            let (again, failed) = drain(Uploader::new(&socket).put(vec![source])).await;
            assert!(failed.is_empty(), "{failed:?}");
            assert_eq!((again[0].same, again[0].hash), (true, first[0].hash));
            // What went out before the server had answered.
            assert!(again[0].sent <= size.min(64 << 10));
            assert_eq!(again[0].resumed, 0);
        }
    })
    .await;
}

#[tokio::test]
async fn small_files_that_do_not_ask_first_are_compared_at_the_server() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        // More files than ask first, so that the bytes go out at once.
        let sources = |seed: u64| {
            (0..40)
                .map(|n| memory(&format!("s{n}"), noise(seed * n, 50)))
                .collect::<Vec<_>>()
        };
        let (done, _) = drain(Uploader::new(&socket).put(sources(1))).await;
        assert_eq!(done.len(), 40);
        let (done, failed) = drain(Uploader::new(&socket).put(sources(1))).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert!(done.iter().all(|outcome| outcome.same));
        // Only number 0 has the same bytes under the other seed.
        let (done, failed) = drain(Uploader::new(&socket).put(sources(2))).await;
        assert_eq!(done.len(), 1);
        assert_eq!(failed.len(), 39);
        for (path, error) in failed {
            assert!(
                matches!(&error, TransferError::Refused { code, .. } if code == "exists"),
                "{path}: {error}"
            );
        }
        for n in 0..40 {
            assert_eq!(
                fixture.stored(&format!("s{n}")),
                noise(n, 50),
                "what was there stays"
            );
        }
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn a_taken_name_is_refused_and_what_is_there_stays() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        std::fs::write(fixture.root().join("x"), noise(1, 1000)).expect("a stored file");
        for (len, policy) in [
            (1000, IfExists::Same),
            (999, IfExists::Same),
            (1000, IfExists::Error),
            (0, IfExists::Same),
        ] {
            let upload = Uploader::new(&socket)
                .if_exists(policy)
                .put(vec![memory("x", noise(2, len))]);
            let (done, failed) = drain(upload).await;
            assert!(done.is_empty());
            let (_, error) = &failed[0];
            assert!(
                matches!(error, TransferError::Refused { code, .. } if code == "exists"),
                "{error}"
            );
            assert_eq!(error.kind(), ErrorKind::Policy);
        }
        let upload = Uploader::new(&socket)
            .if_exists(IfExists::Skip)
            .put(vec![memory("x", noise(2, 5))]);
        let (done, _) = drain(upload).await;
        let told = |done: &udpack_transfer::Outcome| (done.same, done.skipped, done.size);
        assert_eq!(told(&done[0]), (false, true, 1000));
        // Of one size, and too large to be sent before the server has said that it has the name.
        let local = fixture.dir.path().join("local");
        let large = noise(3, 700_000);
        for (content, same) in [(&large, true), (&large, true), (&noise(4, 700_000), false)] {
            std::fs::write(&local, content).expect("a local file");
            let upload = Uploader::new(&socket)
                .if_exists(IfExists::Skip)
                .put(vec![Source::file(&local, rel("large"))]);
            let (done, failed) = drain(upload).await;
            assert!(failed.is_empty(), "{failed:?}");
            if done[0].sent == 0 || !same {
                assert_eq!(told(&done[0]), (same, !same, 700_000));
            }
            assert!(fixture.stored("large") == large);
        }
        let reader = Source::reader(std::io::Cursor::new(large.clone()), rel("large"));
        let upload = Uploader::new(&socket)
            .if_exists(IfExists::Skip)
            .put(vec![reader]);
        let (done, _) = drain(upload).await;
        assert!(done[0].same || done[0].skipped, "{done:?}");
        for policy in [IfExists::Overwrite, IfExists::Rename] {
            let upload = Uploader::new(&socket)
                .if_exists(policy)
                .put(vec![memory("x", noise(2, 5))]);
            let (_, failed) = drain(upload).await;
            assert!(
                matches!(&failed[0].1, TransferError::Refused { code, .. } if code == "forbidden")
            );
        }
        assert_eq!(fixture.stored("x"), noise(1, 1000));
        assert_eq!(fixture.visible(), ["large", "x"]);
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn overwrite_and_rename_do_what_they_say_where_granted() {
    bounded(async {
        let config = StoreConfig {
            overwrite: Overwrite::Always,
            ..StoreConfig::default()
        };
        let fixture = Fixture::with(config, ReceiverConfig::default()).await;
        let socket = fixture.connect().await;
        std::fs::write(fixture.root().join("a.txt"), b"old").expect("a stored file");
        let put = |policy, bytes: &[u8]| {
            drain(
                Uploader::new(&socket)
                    .if_exists(policy)
                    .put(vec![memory("a.txt", bytes.to_vec())]),
            )
        };
        let (done, _) = put(IfExists::Rename, b"renamed").await;
        assert_eq!(done[0].path, "a (1).txt");
        let (done, _) = put(IfExists::Overwrite, b"new").await;
        assert_eq!(done[0].path, "a.txt");
        assert_eq!(fixture.stored("a.txt"), b"new");
        assert_eq!(fixture.stored("a (1).txt"), b"renamed");
    })
    .await;
}

/// Two sources of one name: the second has its turn when the first has its outcome, and what counts as done is there.
#[tokio::test]
async fn two_sources_of_one_name_are_taken_one_after_the_other() {
    for size in [0, 5_000, 300_000, 2_000_000] {
        for lanes in [1, 4] {
            bounded(async {
                let config = StoreConfig {
                    overwrite: Overwrite::Always,
                    ..StoreConfig::default()
                };
                let fixture = Fixture::with(config, ReceiverConfig::default()).await;
                let socket = fixture.connect().await;
                let (first, second) = (noise(1, size), noise(2, size + 1));
                for policy in [
                    IfExists::Same,
                    IfExists::Error,
                    IfExists::Skip,
                    IfExists::Overwrite,
                    IfExists::Rename,
                ] {
                    let what = format!("{policy} {size} {lanes}");
                    let name = format!("{policy}/x.jpg");
                    let mut sources: Vec<Source> = [&first, &second]
                        .map(|bytes| memory(&name, bytes.clone()))
                        .into();
                    // So that there are not few, and small ones travel in batches.
                    for n in 0..40 {
                        sources.push(memory(&format!("{policy}/other{n}"), noise(9 + n, 10)));
                    }
                    let uploader = Uploader::new(&socket).lanes(lanes).if_exists(policy);
                    let (done, failed) = drain(uploader.put(sources)).await;
                    for outcome in &done {
                        if outcome.index != 1 || policy != IfExists::Skip {
                            let ours = [&first, &second].get(outcome.index).copied();
                            if let Some(ours) = ours {
                                assert_eq!(outcome.hash, *blake3::hash(ours).as_bytes(), "{what}");
                                assert_eq!(outcome.size, ours.len() as u64, "{what}");
                            }
                        }
                    }
                    let (kept, others) = match policy {
                        IfExists::Overwrite => (&second, 0),
                        IfExists::Rename => (&first, 1),
                        _ => (&first, 0),
                    };
                    assert!(fixture.stored(&name) == *kept, "{what}");
                    let renamed = format!("{policy}/x (1).jpg");
                    match others {
                        1 => assert!(fixture.stored(&renamed) == second, "{what}"),
                        _ => assert!(!fixture.visible().contains(&renamed), "{what}"),
                    }
                    let refused = matches!(policy, IfExists::Same | IfExists::Error);
                    assert_eq!(failed.len(), usize::from(refused), "{what}: {failed:?}");
                    assert_eq!(done.len(), 42 - usize::from(refused), "{what}");
                    if refused {
                        assert_eq!(failed[0].0, name);
                        let TransferError::Refused { code, .. } = &failed[0].1 else {
                            panic!("{what}: {failed:?}");
                        };
                        assert_eq!(code, "exists", "{what}");
                    }
                    let skipped = done.iter().find(|outcome| outcome.index == 1);
                    if policy == IfExists::Skip {
                        let skipped = skipped.expect("skipped is done");
                        assert_eq!((skipped.same, skipped.skipped), (false, true), "{what}");
                        assert_eq!(skipped.hash, *blake3::hash(&first).as_bytes(), "{what}");
                    }
                }
            })
            .await;
        }
    }
}

#[tokio::test]
async fn one_bad_file_does_not_stop_the_others() {
    bounded(async {
        let config = StoreConfig {
            max_file: Some(1000),
            ..StoreConfig::default()
        };
        let fixture = Fixture::with(config, ReceiverConfig::default()).await;
        let socket = fixture.connect().await;
        let missing = fixture.dir.path().join("missing");
        let sources = vec![
            memory("ok1", noise(1, 1000)),
            Source::file(&missing, rel("missing")),
            memory("big", noise(2, 1001)),
            Source::file(fixture.dir.path(), rel("directory")),
            memory("ok2", noise(3, 10)),
        ];
        let (done, mut failed) = drain(Uploader::new(&socket).lanes(2).put(sources)).await;
        assert_eq!(
            done.iter()
                .map(|outcome| outcome.path.as_str())
                .collect::<Vec<_>>(),
            ["ok1", "ok2"]
        );
        failed.sort_by(|a, b| a.0.cmp(&b.0));
        let kinds: Vec<_> = failed
            .iter()
            .map(|(path, error)| (path.as_str(), error.kind()))
            .collect();
        assert_eq!(
            kinds,
            [
                ("big", ErrorKind::Policy),
                ("directory", ErrorKind::LocalFile),
                ("missing", ErrorKind::LocalFile)
            ]
        );
        assert_eq!(fixture.visible(), ["ok1", "ok2"]);
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn a_file_that_changes_while_it_is_sent_is_not_stored() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let local = fixture.dir.path().join("growing");
        let mut upload = Uploader::new(&socket)
            .resume(false)
            .limit(Limiter::new(32 << 20))
            .put(vec![sparse(&fixture, "growing", 64 << 20)]);
        let mut changed = false;
        let error = loop {
            match upload.next().await.expect("an outcome") {
                Event::Started { .. } => {
                    // The size was taken; the reader cannot be through 64 MiB before the server has most of them.
                    let mut file = std::fs::OpenOptions::new()
                        .append(true)
                        .open(&local)
                        .expect("the file");
                    std::io::Write::write_all(&mut file, b"more").expect("room");
                    changed = true;
                }
                Event::Failed { error, .. } => break error,
                Event::Done(_) => panic!("a changed file must not be stored"),
                _ => {}
            }
        };
        assert!(changed);
        assert!(
            matches!(error, TransferError::SourceChanged { .. }),
            "{error}"
        );
        assert!(fixture.visible().is_empty());
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn dropping_an_upload_leaves_nothing_visible() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let mut upload = Uploader::new(&socket)
            .resume(false)
            .limit(Limiter::new(8 << 20))
            .put(vec![sparse(&fixture, "big", 512 << 20)]);
        while let Some(event) = upload.next().await {
            if matches!(event, Event::Progress(progress) if progress.acked > 0) {
                break;
            }
        }
        drop(upload);
        fixture.settled().await;
        assert!(fixture.visible().is_empty());
        // The socket is as good as new.
        let (done, _) =
            drain(Uploader::new(&socket).put(vec![memory("small", noise(2, 10))])).await;
        assert_eq!(done.len(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_lost_connection_fails_every_file_and_leaves_nothing_half_written() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let mut sources = vec![memory("small", noise(1, 1000))];
        sources.extend((0..6).map(|n| sparse(&fixture, &format!("f{n}"), 512 << 20)));
        let mut upload = Uploader::new(&socket)
            .lanes(2)
            .resume(false)
            .limit(Limiter::new(8 << 20))
            .put(sources);
        let mut failed = 0;
        while let Some(event) = upload.next().await {
            match event {
                Event::Progress(progress) if progress.acked > 0 => {
                    socket.abort(CloseCode::new(0x1001), "cut")
                }
                Event::Failed { error, .. } => {
                    assert_eq!(error.kind(), ErrorKind::Network, "{error}");
                    failed += 1;
                }
                _ => {}
            }
        }
        assert!(failed >= 6, "only the small file can have been stored");
        fixture.settled().await;
        for name in fixture.visible() {
            assert_eq!(name, "small");
            assert_eq!(fixture.stored(&name), noise(1, 1000));
        }
    })
    .await;
}

#[tokio::test]
async fn fifty_clients_with_twenty_files_each_do_not_get_in_each_others_way() {
    bounded(async {
        let fixture = Fixture::new().await;
        let mut clients = tokio::task::JoinSet::new();
        for client in 0..50_u64 {
            let socket = fixture.connect().await;
            clients.spawn(async move {
                let sources = (0..20_u64)
                    .map(|n| {
                        let size = [0, 1, 1000, 70_000, 300_000][(n % 5) as usize];
                        memory(&format!("c{client}/{n}"), noise(client * 100 + n, size))
                    })
                    .collect::<Vec<_>>();
                let (done, failed) = drain(Uploader::new(&socket).put(sources)).await;
                assert!(failed.is_empty(), "{failed:?}");
                done.len()
            });
        }
        while let Some(count) = clients.join_next().await {
            assert_eq!(count.expect("no panic"), 20);
        }
        for client in 0..50_u64 {
            for n in 0..20_u64 {
                let size = [0, 1, 1000, 70_000, 300_000][(n % 5) as usize];
                let stored = fixture.stored(&format!("c{client}/{n}"));
                assert!(
                    stored == noise(client * 100 + n, size),
                    "c{client}/{n} differs"
                );
            }
        }
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn of_many_clients_racing_for_one_name_exactly_one_wins() {
    bounded(async {
        let fixture = Fixture::new().await;
        let mut clients = tokio::task::JoinSet::new();
        for client in 0..20_u64 {
            let socket = fixture.connect().await;
            clients.spawn(async move {
                let upload = Uploader::new(&socket)
                    .if_exists(IfExists::Error)
                    .put(vec![memory("one", noise(client, 200_000))]);
                let (done, failed) = drain(upload).await;
                for (_, error) in &failed {
                    assert!(
                        matches!(error, TransferError::Refused { code, .. } if code == "exists"),
                        "{error}"
                    );
                }
                done.first().map(|_| client)
            });
        }
        let mut winners = Vec::new();
        while let Some(outcome) = clients.join_next().await {
            winners.extend(outcome.expect("no panic"));
        }
        assert_eq!(winners.len(), 1, "{winners:?}");
        assert_eq!(fixture.stored("one"), noise(winners[0], 200_000));
        fixture.settled().await;
    })
    .await;
}

#[tokio::test]
async fn more_files_than_may_be_open_wait_for_their_turn() {
    bounded(async {
        let receiver = ReceiverConfig {
            open_files: 2,
            ..ReceiverConfig::default()
        };
        let fixture = Fixture::with(StoreConfig::default(), receiver).await;
        let socket = fixture.connect().await;
        let sources = (0..30)
            .map(|n| memory(&format!("f{n}"), noise(n, 400_000)))
            .collect::<Vec<_>>();
        let (done, failed) = drain(Uploader::new(&socket).lanes(8).put(sources)).await;
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(done.len(), 30);
    })
    .await;
}

#[tokio::test]
async fn lanes_of_one_socket_are_bounded() {
    bounded(async {
        let receiver = ReceiverConfig {
            lanes_per_socket: 2,
            ..ReceiverConfig::default()
        };
        let fixture = Fixture::with(StoreConfig::default(), receiver).await;
        let socket = fixture.connect().await;
        // Two lanes are let in; what the refused ones had is reported, the rest goes over the other two.
        let sources = (0..40)
            .map(|n| memory(&format!("f{n}"), noise(n, 300_000)))
            .collect::<Vec<_>>();
        let (done, failed) = drain(Uploader::new(&socket).lanes(4).put(sources)).await;
        assert_eq!(done.len() + failed.len(), 40);
        assert!(done.len() >= 38, "{failed:?}");
        assert!(failed.iter().all(|(_, error)| matches!(
            error,
            TransferError::Closed(reason) if reason.code == CloseCode::REFUSED
        )));
    })
    .await;
}

#[tokio::test]
async fn a_server_that_goes_away_in_order_lets_the_upload_finish() {
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        let mut upload = Uploader::new(&socket).put(vec![memory("big", noise(1, 40_000_000))]);
        let (tell, told) = tokio::sync::oneshot::channel::<()>();
        let server = fixture.server.clone();
        let going = tokio::spawn(async move {
            server
                .run_until(told, udpack::Drain::within(Duration::from_secs(20)))
                .await
        });
        let mut tell = Some(tell);
        let mut done = false;
        while let Some(event) = upload.next().await {
            match event {
                Event::Progress(progress) if progress.acked > 0 => drop(tell.take()),
                Event::Done(_) => done = true,
                Event::Failed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
        assert!(done);
        going.await.expect("no panic").expect("an orderly end");
        assert_eq!(fixture.stored("big"), noise(1, 40_000_000));
        assert_eq!(socket.closed().await.code, CloseCode::SHUTTING_DOWN);
    })
    .await;
}

/// A time beyond what file systems hold that count seconds in 34 bits, and one before what any of them holds.
const FAR: [i64; 3] = [16_725_225_600, -10_000_000_000, 1_700_000_000];

#[tokio::test]
async fn a_time_that_the_file_system_cannot_hold_is_told_to_the_sender() {
    use std::os::unix::fs::MetadataExt as _;
    use udpack_transfer::{Meta, Time};
    bounded(async {
        let fixture = Fixture::new().await;
        let socket = fixture.connect().await;
        for (number, secs) in FAR.into_iter().enumerate() {
            let meta = Meta {
                mtime: Some(Time { secs, nanos: 5 }),
                mode: None,
            };
            let name = format!("d{number}");
            let upload = Uploader::new(&socket)
                .preserve(true)
                .put(vec![Source::dir(rel(&name), meta)]);
            let (done, failed) = drain(upload).await;
            assert!(failed.is_empty(), "{failed:?}");
            let stored = fixture.root().join(&name);
            let got = std::fs::metadata(stored).expect("it is there").mtime();
            let told = done[0]
                .other_time
                .map(|time| (time.asked.secs, time.got.secs));
            // What holds it says nothing; what does not says which it is.
            assert_eq!(told, (got != secs).then_some((secs, got)), "{secs}");
            if secs > 0 && number == 2 {
                assert_eq!(told, None, "every file system holds the times of today");
            }
        }
    })
    .await;
}
