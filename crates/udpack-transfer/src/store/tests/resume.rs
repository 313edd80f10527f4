//! Interrupted uploads: what is kept, what is told of it, and that nothing wrong ever comes of it.

use std::fs::OpenOptions;
use std::sync::atomic::Ordering;

use super::super::disk::{LOG, PART};
use super::*;

const MIB: usize = 1 << 20;

#[test]
fn an_interrupted_upload_goes_on_where_it_was() {
    for reopen in [false, true] {
        let (dir, mut store) = open(StoreConfig::default());
        let bytes = noise(3 * MIB);
        let mut partial = resumable(&store, "sub/a", Some(bytes.len() as u64)).unwrap();
        assert!(partial.resumable());
        assert_eq!(have(&mut partial), []);
        partial.write_at(0, &bytes[..2 * MIB]).unwrap();
        drop(partial);
        assert_eq!((visible(&dir), files(&dir)), (vec![], 2));
        let usage = Usage {
            suspended: 2 * MIB as u64,
            ..Usage::default()
        };
        assert_eq!(store.usage(), usage);
        if reopen {
            drop(store);
            store = again(&dir);
            assert_eq!(store.usage(), usage);
        }
        let mut partial = resumable(&store, "sub/a", Some(bytes.len() as u64)).unwrap();
        let mut read = Vec::new();
        let ranges = partial.have(&mut |bytes| read.push(bytes)).unwrap();
        assert_eq!(ranges, [range(0, &bytes[..2 * MIB])]);
        assert!(read.is_sorted() && read.last() == Some(&(2 * MIB as u64)));
        assert_eq!(partial.position(), 0);
        partial.write_at(2 * MIB as u64, &bytes[2 * MIB..]).unwrap();
        assert_eq!(partial.safe().load(Ordering::Relaxed), 2 * MIB as u64);
        let published = partial.finish(Some(hash(&bytes)), None).unwrap();
        assert_eq!((published.sync, published.same), (Synced::File, false));
        assert_eq!(fs::read(dir.path().join("sub/a")).unwrap(), bytes);
        assert_eq!(files(&dir), 0);
        assert_eq!(store.usage().suspended, 0);
    }
}

#[test]
fn what_came_ahead_of_its_turn_is_durable_only_when_it_is_synced() {
    let (_dir, store) = open(StoreConfig::default());
    let bytes = noise(3 * MIB);
    let mut partial = resumable(&store, "a", Some(3 * MIB as u64)).unwrap();
    let safe = partial.safe();
    let safe = || safe.load(Ordering::Relaxed);
    for at in [2 * MIB, MIB, 0] {
        let part = &bytes[at..at + MIB];
        partial.write_any(at as u64, part).unwrap();
    }
    assert_eq!((partial.position(), safe()), (MIB as u64, 0));
    partial.make_durable().unwrap();
    assert_eq!(safe(), MIB as u64);
    // Passing over what was written says nothing of the disk.
    partial.write_any(3 * MIB as u64, b"").unwrap();
    assert_eq!((partial.position(), safe()), (3 * MIB as u64, MIB as u64));
    partial.make_durable().unwrap();
    assert_eq!(safe(), 3 * MIB as u64);
    drop(partial);
    let mut partial = resumable(&store, "a", Some(3 * MIB as u64)).unwrap();
    assert_eq!(have(&mut partial), [range(0, &bytes)]);
}

#[test]
fn a_gap_before_what_came_ahead_of_its_turn_is_missing_bytes() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = resumable(&store, "a", None).unwrap();
    partial.write_any(0, &[1; 10]).unwrap();
    partial.write_any(20, &[1; 10]).unwrap();
    let error = partial.finish(None, None).unwrap_err();
    let missing = StoreError::SizeMismatch {
        expected: 30,
        got: 10,
    };
    assert_eq!(error.to_string(), missing.to_string());
    assert_eq!(files(&dir), 0);
}

#[test]
fn what_is_sent_although_it_is_there_is_not_written_again() {
    // Whether the bytes that are sent before the rest is passed over are those that lie there.
    for same in [true, false] {
        let (dir, store) = open(StoreConfig::default());
        let mut bytes = noise(MIB);
        let mut partial = resumable(&store, "a", Some(MIB as u64)).unwrap();
        partial.write_at(0, &bytes[..MIB / 2]).unwrap();
        drop(partial);
        let mut partial = resumable(&store, "a", Some(MIB as u64)).unwrap();
        assert_eq!(have(&mut partial), [range(0, &bytes[..MIB / 2])]);
        if !same {
            bytes[999] ^= 1;
        }
        partial.write_at(0, &bytes[..1000]).unwrap();
        assert_eq!(partial.snapshot.is_some(), same, "else it is read again");
        partial.write_at(1000, &bytes[1000..2000]).unwrap();
        assert_eq!(partial.position(), 2000);
        let half = MIB as u64 / 2;
        partial.write_at(half, &bytes[MIB / 2..]).unwrap();
        partial.finish(Some(hash(&bytes)), None).unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), bytes);
    }
}

#[test]
fn only_the_same_owner_and_path_find_it() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = resumable(&store, "a", Some(4)).unwrap();
    partial.write_at(0, b"ab").unwrap();
    drop(partial);
    let path = path("a");
    for new in [
        NewFile {
            owner: Some("other"),
            ..new(&path, Some(4), IfExists::Same)
        },
        new(&path, Some(4), IfExists::Same),
    ] {
        let Begin::New(mut partial) = store.begin(&new).unwrap() else {
            panic!("nothing is there");
        };
        assert_eq!(have(&mut partial), []);
    }
    let mut partial = resumable(&store, "b", Some(4)).unwrap();
    assert_eq!(have(&mut partial), []);
    drop(partial);
    assert_eq!(files(&dir), 2);
}

#[test]
fn a_crash_costs_what_was_not_checkpointed_and_no_more() {
    let (dir, store) = open(StoreConfig::default());
    let bytes = noise(3000);
    let mut partial = resumable(&store, "a", Some(3000)).unwrap();
    partial.write_at(0, &bytes[..1000]).unwrap();
    assert!(partial.checkpoint().is_none(), "not due yet");
    due(&mut partial).run();
    assert_eq!(partial.safe().load(Ordering::Relaxed), 1000);
    partial.write_at(1000, &bytes[1000..1500]).unwrap();
    due(&mut partial).run();
    partial.write_at(1500, &bytes[1500..2500]).unwrap();
    assert_eq!(partial.safe().load(Ordering::Relaxed), 1500);
    crash(partial);
    drop(store);
    let store = again(&dir);
    let mut partial = resumable(&store, "a", Some(3000)).unwrap();
    assert_eq!(have(&mut partial), [range(0, &bytes[..1500])]);
    partial.write_at(1500, &bytes[1500..]).unwrap();
    partial.finish(Some(hash(&bytes)), Some(3000)).unwrap();
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), bytes);
}

#[test]
fn one_checkpoint_at_a_time_and_one_that_is_dropped_is_no_loss() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = resumable(&store, "a", None).unwrap();
    partial.write_at(0, b"abcd").unwrap();
    let first = due(&mut partial);
    partial.write_at(4, b"ef").unwrap();
    make_due(&mut partial);
    assert!(partial.checkpoint().is_none(), "one is under way");
    drop(first);
    assert_eq!(partial.safe().load(Ordering::Relaxed), 0);
    partial.checkpoint().unwrap().run();
    assert_eq!(partial.safe().load(Ordering::Relaxed), 6);
    assert!(partial.checkpoint().is_none(), "nothing to do");
    // A late one touches nothing once the upload is complete.
    partial.write_at(6, b"g").unwrap();
    let late = due(&mut partial);
    partial.finish(Some(hash(b"abcdefg")), None).unwrap();
    late.run();
    assert_eq!((visible(&dir), files(&dir)), (vec!["a".to_owned()], 0));
    // And one that outlives its upload keeps the file for it.
    let mut partial = resumable(&store, "b", None).unwrap();
    partial.write_at(0, b"abcd").unwrap();
    let late = due(&mut partial);
    drop(partial);
    assert_eq!(resumable(&store, "b", None).unwrap_err().code(), "busy");
    late.run();
    let mut partial = resumable(&store, "b", None).unwrap();
    assert_eq!(have(&mut partial), [range(0, b"abcd")]);
    partial.discard();
    assert_eq!((files(&dir), store.usage().open), (0, 0));
}

#[test]
fn offsets_are_the_next_or_beyond_what_is_known() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = resumable(&store, "a", Some(10)).unwrap();
    for offset in [1, 10, u64::MAX] {
        let error = partial.write_at(offset, b"x").unwrap_err();
        assert!(matches!(error, StoreError::BadOffset { expected: 0 }));
        assert_eq!((error.code(), error.retry()), ("bad_offset", false));
    }
    partial.write_at(0, b"01234").unwrap();
    drop(partial);
    // Known only once it was asked for.
    let mut partial = resumable(&store, "a", Some(10)).unwrap();
    assert_eq!(partial.write_at(5, b"5").unwrap_err().code(), "bad_offset");
    assert_eq!(have(&mut partial).len(), 1);
    assert_eq!(partial.write_at(6, b"6").unwrap_err().code(), "bad_offset");
    // In the middle of a range, at its end, back.
    partial.write_at(2, b"2").unwrap();
    partial.write_at(5, b"5").unwrap();
    assert_eq!(partial.write_at(3, b"3").unwrap_err().code(), "bad_offset");
    partial.write_at(6, b"6789").unwrap();
    partial.finish(Some(hash(b"0123456789")), None).unwrap();
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"0123456789");
}

#[test]
fn the_rest_may_be_left_out_when_it_is_known() {
    let (dir, store) = open(StoreConfig::default());
    for (name, declared, told) in [("a", Some(6), None), ("b", None, Some(6))] {
        let mut partial = resumable(&store, name, declared).unwrap();
        partial.write_at(0, b"012345").unwrap();
        drop(partial);
        let mut partial = resumable(&store, name, declared).unwrap();
        assert_eq!(have(&mut partial), [range(0, b"012345")]);
        partial.write_at(0, b"X").unwrap();
        partial.finish(Some(hash(b"X12345")), told).unwrap();
        assert_eq!(fs::read(dir.path().join(name)).unwrap(), b"X12345");
    }
}

#[test]
fn a_source_that_became_shorter_leaves_no_tail() {
    let (dir, store) = open(StoreConfig::default());
    for (name, declared, told) in [
        ("a", Some(4), None),
        ("b", None, Some(4)),
        ("c", None, None),
    ] {
        let mut partial = resumable(&store, name, None).unwrap();
        partial.write_at(0, b"0123456789").unwrap();
        drop(partial);
        let mut partial = resumable(&store, name, declared).unwrap();
        let known = if declared.is_some() { 4 } else { 10 };
        assert_eq!(have(&mut partial), [range(0, &b"0123456789"[..known])]);
        partial.write_at(2, b"2X").unwrap();
        partial.finish(Some(hash(b"012X")), told).unwrap();
        assert_eq!(fs::read(dir.path().join(name)).unwrap(), b"012X");
    }
    assert_eq!(store.usage().used, 12);
}

#[test]
fn what_is_overwritten_is_not_durable_until_it_is_synced() {
    let (_dir, store) = open(StoreConfig::default());
    let mut partial = resumable(&store, "a", Some(10)).unwrap();
    partial.write_at(0, b"0123456789").unwrap();
    drop(partial);
    let mut partial = resumable(&store, "a", Some(10)).unwrap();
    assert_eq!(have(&mut partial).len(), 1);
    partial.write_at(2, b"XY").unwrap();
    let safe = partial.safe();
    assert_eq!(safe.load(Ordering::Relaxed), 2);
    let ranges = have(&mut partial);
    assert_eq!(ranges, [range(0, b"01"), range(4, b"456789")]);
    // Skipped bytes wait for the ones before them.
    partial.write_at(6, b"Z").unwrap();
    assert_eq!((safe.load(Ordering::Relaxed), partial.position()), (2, 7));
    due(&mut partial).run();
    assert_eq!(safe.load(Ordering::Relaxed), 7);
    assert_eq!(have(&mut partial), [range(0, b"01XY45Z789")]);
}

#[test]
fn altered_bytes_are_told_as_they_are_and_never_published() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = resumable(&store, "a", Some(8)).unwrap();
    partial.write_at(0, b"abcd").unwrap();
    drop(partial);
    fs::write(part(&dir), b"abXd").unwrap();
    let mut partial = resumable(&store, "a", Some(8)).unwrap();
    assert_eq!(have(&mut partial), [range(0, b"abXd")]);
    partial.write_at(4, b"efgh").unwrap();
    let error = partial.finish(Some(hash(b"abcdefgh")), None).unwrap_err();
    assert_eq!(error.code(), "hash_mismatch");
    assert_eq!((visible(&dir), files(&dir)), (vec![], 0));
    // Shorter than the journal says.
    let mut partial = resumable(&store, "a", Some(8)).unwrap();
    partial.write_at(0, b"abcd").unwrap();
    drop(partial);
    OpenOptions::new()
        .write(true)
        .open(part(&dir))
        .unwrap()
        .set_len(3)
        .unwrap();
    let mut partial = resumable(&store, "a", Some(8)).unwrap();
    assert_eq!(have(&mut partial), [range(0, b"abc")]);
    // Shorter than what was told.
    OpenOptions::new()
        .write(true)
        .open(part(&dir))
        .unwrap()
        .set_len(1)
        .unwrap();
    assert_eq!(partial.write_at(2, b"c").unwrap_err().code(), "io");
    drop(partial);
    assert_eq!(files(&dir), 0);
}

#[test]
fn a_bad_journal_costs_time_and_nothing_else() {
    let bytes = noise(3000);
    type Spoil = (&'static str, fn(&Path));
    let spoil: [Spoil; 8] = [
        ("torn", |log| {
            let text = fs::read(log).unwrap();
            fs::write(log, &text[..text.len() - 3]).unwrap();
        }),
        ("garbled", |log| {
            let mut text = fs::read(log).unwrap();
            text[20] ^= 1;
            fs::write(log, text).unwrap();
        }),
        ("empty", |log| fs::write(log, "").unwrap()),
        ("from the future", |log| {
            fs::write(log, lines(&["upload 2 0 - peer a", "safe 0 3000"])).unwrap();
        }),
        ("of another file", |log| {
            fs::write(log, lines(&["upload 1 0 - peer b", "safe 0 1500"])).unwrap();
        }),
        ("too much", |log| {
            let text = lines(&["upload 1 0 - peer a", "safe 0 99999999999", "safe 7 1"]);
            fs::write(log, text).unwrap();
        }),
        ("a link", |log| {
            fs::remove_file(log).unwrap();
            symlink("/etc/passwd", log).unwrap();
        }),
        ("with a second name", |log| {
            fs::hard_link(log, log.with_extension("bak")).unwrap();
        }),
    ];
    for (name, spoil) in spoil {
        for reopen in [false, true] {
            let (dir, mut store) = open(StoreConfig::default());
            let mut partial = resumable(&store, "a", Some(3000)).unwrap();
            partial.write_at(0, &bytes[..1000]).unwrap();
            due(&mut partial).run();
            partial.write_at(1000, &bytes[1000..1500]).unwrap();
            drop(partial);
            spoil(&log(&dir));
            if reopen {
                drop(store);
                store = again(&dir);
            }
            let mut partial = resumable(&store, "a", Some(3000)).unwrap();
            let ranges = have(&mut partial);
            for range in &ranges {
                let (off, len) = (range.off as usize, range.len as usize);
                assert!(off + len <= 1500, "{name}");
                assert_eq!(range.hash, hash(&bytes[off..off + len]), "{name}");
            }
            assert_eq!(
                ranges.is_empty(),
                !matches!(name, "torn" | "too much"),
                "{name}"
            );
            // It is interrupted once more, and taken up once more.
            partial.write_at(0, &bytes[..2000]).unwrap();
            drop(partial);
            let mut partial = resumable(&store, "a", Some(3000)).unwrap();
            assert_eq!(have(&mut partial), [range(0, &bytes[..2000])], "{name}");
            partial.write_at(2000, &bytes[2000..]).unwrap();
            partial.finish(Some(hash(&bytes)), None).unwrap();
            assert_eq!(fs::read(dir.path().join("a")).unwrap(), bytes, "{name}");
        }
    }
}

#[test]
fn a_long_journal_is_rewritten() {
    let (dir, store) = open(StoreConfig {
        sync: SyncPolicy::Never,
        ..StoreConfig::default()
    });
    let mut partial = resumable(&store, "a", None).unwrap();
    let mut longest = 0;
    for n in 0..4000 {
        partial.write_at(n, b"x").unwrap();
        due(&mut partial).run();
        longest = longest.max(fs::metadata(log(&dir)).unwrap().len());
    }
    assert!((60_000..70_000).contains(&longest), "{longest}");
    crash(partial);
    let mut partial = resumable(&store, "a", None).unwrap();
    assert_eq!(have(&mut partial), [range(0, &[b'x'; 4000])]);
}

#[test]
fn a_file_with_a_second_name_is_never_written_to() {
    for at_start in [false, true] {
        let (dir, store) = open(StoreConfig::default());
        let mut partial = resumable(&store, "a", Some(8)).unwrap();
        partial.write_at(0, b"abcd").unwrap();
        drop(partial);
        // As a crash between the two steps of publishing by link leaves it.
        fs::hard_link(part(&dir), dir.path().join("published")).unwrap();
        let store = if at_start {
            drop(store);
            let store = again(&dir);
            assert_eq!(files(&dir), 0);
            store
        } else {
            store
        };
        let mut partial = resumable(&store, "a", Some(8)).unwrap();
        assert_eq!(have(&mut partial), []);
        partial.write_at(0, b"replaced").unwrap();
        assert_eq!(fs::read(dir.path().join("published")).unwrap(), b"abcd");
        partial.finish(None, None).unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"replaced");
    }
}

#[test]
fn strange_things_in_the_place_of_a_staging_file_are_replaced() {
    for (name, make) in OCCUPANTS {
        if name == "file" || name.starts_with("hard link") {
            continue;
        }
        let (dir, store) = open(StoreConfig::default());
        let outside = TempDir::new().unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        let key = Key::new("peer", &path("a"));
        let staging = dir.path().join(".udpack/staging");
        make(
            &staging.join(format!("{}{PART}", key.as_str())),
            outside.path(),
        );
        let mut partial = resumable(&store, "a", Some(4)).unwrap();
        partial.write_at(0, b"mine").unwrap();
        partial.finish(None, None).unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"mine", "{name}");
        assert_eq!(
            fs::read(outside.path().join("secret")).unwrap(),
            b"secret",
            "{name}"
        );
    }
}

#[test]
fn a_file_has_one_writer() {
    let (_dir, store) = open(StoreConfig::default());
    let mut partial = resumable(&store, "a", Some(4)).unwrap();
    partial.write_at(0, b"abcd").unwrap();
    let error = resumable(&store, "a", Some(4)).unwrap_err();
    assert_eq!((error.code(), error.retry()), ("busy", true));
    assert_eq!(store.usage().open, 1);
    // Until it has its name, though its descriptor may be closed by then.
    let complete = partial.complete(None, None, Meta::default()).unwrap();
    assert!(!complete.is_synced());
    assert_eq!((complete.path().as_str(), complete.size()), ("a", 4));
    assert_eq!(
        (store.usage().open, store.usage().reserved),
        (0, 4),
        "no descriptor"
    );
    assert_eq!(resumable(&store, "a", Some(4)).unwrap_err().code(), "busy");
    drop(complete);
    resumable(&store, "a", Some(4)).unwrap().discard();
    assert_eq!(store.usage(), Usage::default());
}

#[test]
fn what_failed_is_not_kept() {
    let (dir, store) = open(StoreConfig::default());
    let begun = || {
        let mut partial = resumable(&store, "a", Some(4)).unwrap();
        partial.write_at(0, b"abc").unwrap();
        due(&mut partial).run();
        assert_eq!(files(&dir), 2);
        partial
    };
    let mut partial = begun();
    assert_eq!(
        partial.write_at(3, b"de").unwrap_err().code(),
        "size_mismatch"
    );
    drop(partial);
    assert_eq!(files(&dir), 0);
    begun().finish(None, None).unwrap_err();
    assert_eq!(files(&dir), 0);
    let mut partial = begun();
    partial.write_at(3, b"d").unwrap();
    partial.finish(Some([1; 32]), None).unwrap_err();
    assert_eq!(files(&dir), 0);
    begun().discard();
    assert_eq!(files(&dir), 0);
    // A failed sync, as a checkpoint would find it.
    let mut partial = begun();
    partial.body.failed.store(true, Ordering::Release);
    assert!(matches!(
        partial.write_at(3, b"d").unwrap_err(),
        StoreError::Broken
    ));
    drop(partial);
    assert_eq!((files(&dir), store.usage()), (0, Usage::default()));
    // Nothing written: nothing to keep.
    drop(resumable(&store, "a", Some(4)).unwrap());
    assert_eq!(files(&dir), 0);
}

#[test]
fn interrupted_uploads_expire() {
    let (dir, store) = open(StoreConfig {
        expire: Duration::from_secs(3600),
        ..StoreConfig::default()
    });
    for name in ["old", "new", "future", "live"] {
        let mut partial = resumable(&store, name, None).unwrap();
        partial.write_at(0, name.as_bytes()).unwrap();
    }
    let hours = |n: u64| Duration::from_secs(n * 3600);
    let now = SystemTime::now();
    for (name, time) in [
        ("old", now - hours(2)),
        ("future", now + hours(1000)),
        ("live", now - hours(2)),
    ] {
        touch(&log_of(&dir, name), time);
    }
    let live = resumable(&store, "live", None).unwrap();
    assert_eq!(store.sweep().unwrap(), 1);
    assert_eq!(store.sweep().unwrap(), 0);
    assert_eq!(files(&dir), 6);
    assert_eq!(store.usage().suspended, 9);
    drop(live);
    assert_eq!(store.sweep().unwrap(), 1);
    // Opening does the same, and what cannot be read expires, too.
    fs::write(log_of(&dir, "new"), "garbage").unwrap();
    drop(store);
    drop(again(&dir));
    assert_eq!(files(&dir), 4);
    touch(&log_of(&dir, "new"), now - hours(48));
    drop(again(&dir));
    assert_eq!(files(&dir), 2);
}

#[test]
fn a_start_puts_the_store_s_own_directory_in_order() {
    let (dir, store) = open(StoreConfig::default());
    for name in ["whole", "no part", "no log"] {
        let mut partial = resumable(&store, name, None).unwrap();
        partial.write_at(0, b"x").unwrap();
    }
    drop(store);
    fs::remove_file(log_of(&dir, "no log")).unwrap();
    fs::remove_file(part_of(&dir, "no part")).unwrap();
    let journal = dir.path().join(".udpack/journal");
    let id = "0123456789abcdef0123456789abcdef";
    fs::write(journal.join(format!("{id}.new")), "").unwrap();
    fs::write(journal.join("notes"), "").unwrap();
    let store = again(&dir);
    assert!(part_of(&dir, "whole").exists() && log_of(&dir, "whole").exists());
    assert!(journal.join("notes").exists());
    assert_eq!(files(&dir), 3);
    assert_eq!(store.usage().suspended, 1);
}

#[test]
fn the_quota_counts_what_is_kept() {
    let config = StoreConfig {
        quota: Some(1000),
        ..StoreConfig::default()
    };
    let (dir, store) = open(config.clone());
    let mut partial = resumable(&store, "a", Some(700)).unwrap();
    partial.write_at(0, &[1; 600]).unwrap();
    drop(partial);
    drop(store);
    let store = Store::open(dir.path(), config).unwrap();
    let error = begin(&store, "b", Some(401), IfExists::Same).unwrap_err();
    assert_eq!(
        error.to_string(),
        "quota: needs 401 B, 400 B of 1000 B left"
    );
    drop(begin(&store, "b", Some(400), IfExists::Same).unwrap());
    // It does not count twice when it is taken up; refused, it is kept.
    assert_eq!(
        resumable(&store, "a", Some(1001)).unwrap_err().code(),
        "quota"
    );
    assert_eq!(store.usage().suspended, 600);
    let mut partial = resumable(&store, "a", Some(1000)).unwrap();
    assert_eq!(
        store.usage(),
        Usage {
            used: 0,
            reserved: 1000,
            open: 1,
            suspended: 0
        }
    );
    assert_eq!(store.inner.state().unwritten, 400);
    assert_eq!(have(&mut partial), [range(0, &[1; 600])]);
    partial.write_at(0, &[2; 100]).unwrap();
    assert_eq!(store.inner.state().unwritten, 400);
    partial.write_at(600, &[2; 400]).unwrap();
    assert_eq!(store.inner.state().unwritten, 0);
    partial.finish(None, None).unwrap();
    assert_eq!(
        store.usage(),
        Usage {
            used: 1000,
            ..Usage::default()
        }
    );
}

#[test]
fn kept_bytes_are_not_asked_of_the_disk_again() {
    let Some(mount) = Tmpfs::mount("size=1m") else {
        return;
    };
    let config = StoreConfig {
        min_free: Some(0),
        ..StoreConfig::default()
    };
    let store = Store::open(mount.path(), config).unwrap();
    let mut partial = resumable(&store, "a", Some(900_000)).unwrap();
    partial.write_at(0, &[1; 700_000]).unwrap();
    drop(partial);
    let mut partial = resumable(&store, "a", Some(900_000)).unwrap();
    assert_eq!(have(&mut partial).len(), 1);
    partial.write_at(700_000, &[1; 200_000]).unwrap();
    partial.finish(None, None).unwrap();
}

#[test]
fn a_batch_is_published_in_order_and_failures_stay_alone() {
    let (dir, store) = open(StoreConfig::default());
    fs::write(dir.path().join("file"), "x").unwrap();
    let mut batch = Vec::new();
    for n in 0..40 {
        let name = format!("d{}/{n}", n % 20);
        let mut partial = begin(&store, &name, None, IfExists::Error).unwrap();
        partial.write(&[n; 100]).unwrap();
        batch.push(partial.complete(None, None, Meta::default()).unwrap());
    }
    for name in ["taken", "below/x", "last"] {
        let mut partial = begin(&store, name, None, IfExists::Error).unwrap();
        partial.write(b"mine").unwrap();
        batch.push(partial.complete(None, None, Meta::default()).unwrap());
    }
    fs::write(dir.path().join("taken"), "theirs").unwrap();
    fs::write(dir.path().join("below"), "a file").unwrap();
    let outcomes: Vec<_> = store
        .publish(batch)
        .into_iter()
        .map(|outcome| outcome.map(|p| (p.path, p.sync)).map_err(|e| e.code()))
        .collect();
    for (n, outcome) in outcomes[..40].iter().enumerate() {
        assert_eq!(*outcome, Ok((format!("d{}/{n}", n % 20), Synced::Batch)));
    }
    assert_eq!(outcomes[40..42], [Err("exists"), Err("exists")]);
    assert_eq!(outcomes[42], Ok(("last".to_owned(), Synced::Batch)));
    assert_eq!(fs::read(dir.path().join("d3/23")).unwrap(), [23; 100]);
    assert_eq!((visible(&dir).len(), files(&dir)), (44, 0));
    assert_eq!(
        store.usage(),
        Usage {
            used: 4004 + 20 * 1024,
            ..Usage::default()
        },
        "with 20 directories"
    );
    assert!(store.publish(Vec::new()).is_empty());
}

#[test]
fn a_lost_write_fails_all_that_may_be_concerned() {
    let (dir, store) = open(StoreConfig::default());
    let complete = |name: &str| {
        let mut partial = begin(&store, name, None, IfExists::Error).unwrap();
        partial.write(b"mine").unwrap();
        partial.complete(None, None, Meta::default()).unwrap()
    };
    let before = complete("before");
    // Somebody else's barrier is told that bytes were lost, perhaps these.
    store.inner.disk.lose();
    let after = complete("after");
    let outcomes: Vec<_> = store
        .publish(vec![before, after])
        .into_iter()
        .map(|outcome| outcome.map(|p| p.path).map_err(|e| e.code()))
        .collect();
    assert_eq!(outcomes, [Err("io"), Ok("after".to_owned())]);
    assert_eq!((visible(&dir), files(&dir)), (vec!["after".to_owned()], 0));
}

#[test]
fn the_policy_says_how_bytes_get_on_disk() {
    use SyncPolicy::{Always, Auto, Never};
    for (policy, len, synced) in [
        (Auto, 10, Synced::Batch),
        (Auto, MIB, Synced::File),
        (Always, 10, Synced::File),
        (Never, 10, Synced::None),
        (Never, MIB, Synced::None),
    ] {
        let (dir, store) = open(StoreConfig {
            sync: policy,
            ..StoreConfig::default()
        });
        assert_eq!(store.config().sync, policy);
        let bytes = noise(len);
        let mut partial = resumable(&store, "d/a", None).unwrap();
        partial.write_at(0, &bytes[..5]).unwrap();
        drop(partial);
        let mut partial = resumable(&store, "d/a", None).unwrap();
        assert_eq!(have(&mut partial), [range(0, &bytes[..5])]);
        partial.write_at(5, &bytes[5..]).unwrap();
        let complete = partial.complete(None, None, Meta::default()).unwrap();
        assert_eq!(complete.is_synced(), synced != Synced::Batch);
        let published = publish(complete).unwrap();
        assert_eq!(published.sync, synced, "{policy:?} {len}");
        assert_eq!(fs::read(dir.path().join("d/a")).unwrap(), bytes);
        assert_eq!(files(&dir), 0);
    }
}

#[test]
fn directories_are_durable_once_and_again_when_made_again() {
    let (dir, store) = open(StoreConfig::default());
    put(&store, "a/b/c", b"", IfExists::Error).unwrap();
    let made = |name: &str| {
        let mut made = Vec::new();
        store
            .inner
            .disk
            .make_parent(&path(name), &[], &mut made)
            .unwrap();
        made.len()
    };
    assert_eq!((made("a/b/d"), made("a/x/y")), (0, 1));
    for _ in 0..50 {
        // The inode is likely to be used again.
        fs::remove_dir_all(dir.path().join("a")).unwrap();
        assert_eq!(made("a/b/c"), 2);
        put(&store, "a/b/c", b"", IfExists::Error).unwrap();
        assert_eq!(made("a/b/c"), 0);
    }
}

#[test]
fn mode_and_time_are_set() {
    let (dir, store) = open(StoreConfig::default());
    for (name, mode) in [("a", 0o644), ("b", 0o7755), ("c", 0o600), ("d", 0o400)] {
        let mut partial = begin(&store, name, None, IfExists::Same).unwrap();
        partial.write(b"x").unwrap();
        let meta = Meta {
            mtime: Some(Time {
                secs: -5,
                nanos: 250_000_000,
            }),
            mode: Some(mode),
        };
        publish(partial.complete(None, None, meta).unwrap()).unwrap();
        let metadata = fs::metadata(dir.path().join(name)).unwrap();
        assert_eq!(metadata.mode() & 0o7777, mode & 0o777);
        let Begin::Exists(existing) = store
            .begin(&new(&path(name), None, IfExists::Same))
            .unwrap()
        else {
            panic!("it is there");
        };
        let expected = Meta {
            mtime: meta.mtime,
            mode: Some(mode & 0o777),
        };
        assert_eq!(existing.meta(), expected);
        assert_eq!(existing.fingerprint(&mut |_| {}).unwrap(), hash(b"x"));
        let mut buffer = [0; 4];
        assert_eq!(existing.read_at(&mut buffer, 0).unwrap(), 1);
        assert!(existing.unchanged());
        touch(&dir.path().join(name), SystemTime::now());
        assert!(!existing.unchanged());
    }
    assert_eq!(
        Time::from(UNIX_EPOCH - Duration::from_millis(4750)),
        Time {
            secs: -5,
            nanos: 250_000_000
        }
    );
}

#[test]
fn several_processes_share_a_directory() {
    let config = StoreConfig {
        shared: true,
        min_free: Some(0),
        ..StoreConfig::default()
    };
    let dir = TempDir::new().unwrap();
    let open = || Store::open(dir.path(), config.clone());
    let (first, second) = (open().unwrap(), open().unwrap());
    // Not together with a server, in neither order.
    let alone = || Store::open(dir.path(), StoreConfig::default()).unwrap_err();
    assert!(matches!(alone(), StoreError::Locked));
    let mut a = resumable(&first, "a", Some(4)).unwrap();
    a.write_at(0, b"ab").unwrap();
    let mut b = begin(&second, "b", None, IfExists::Same).unwrap();
    b.write(b"b").unwrap();
    let mut c = begin(&first, "c", None, IfExists::Same).unwrap();
    c.write(b"c").unwrap();
    let c = c.complete(None, None, Meta::default()).unwrap();
    // What is under way elsewhere is neither taken nor swept, also by one that comes later.
    assert_eq!(resumable(&second, "a", Some(4)).unwrap_err().code(), "busy");
    assert_eq!(second.sweep().unwrap(), 0);
    let third = open().unwrap();
    b.finish(None, None).unwrap();
    publish(c).unwrap();
    drop(a);
    let mut a = resumable(&third, "a", Some(4)).unwrap();
    assert_eq!(have(&mut a), [range(0, b"ab")]);
    drop((first, second));
    a.write_at(2, b"cd").unwrap();
    a.finish(Some(hash(b"abcd")), None).unwrap();
    assert_eq!(visible(&dir), ["a", "b", "c"]);
    // A leftover without a journal goes, one that can be resumed stays.
    let id = "0123456789abcdef0123456789abcdef";
    let stray = dir.path().join(format!(".udpack/staging/{id}.part"));
    fs::write(&stray, "x").unwrap();
    third.sweep().unwrap();
    assert!(!stray.exists());
    drop(third);
    assert!(!dir.path().join(".udpack").exists());
    let store = open().unwrap();
    let mut partial = resumable(&store, "d", None).unwrap();
    partial.write_at(0, b"d").unwrap();
    drop(partial);
    drop(store);
    assert_eq!(files(&dir), 2);
    let server = Store::open(dir.path(), StoreConfig::default()).unwrap();
    assert!(matches!(open().unwrap_err(), StoreError::Locked));
    assert_eq!(server.usage().suspended, 1);
}

#[test]
fn shared_directories_come_and_go_at_once() {
    let dir = TempDir::new().unwrap();
    thread::scope(|scope| {
        for thread in 0..4 {
            let root = dir.path();
            scope.spawn(move || {
                for n in 0..25 {
                    let config = StoreConfig {
                        shared: true,
                        sync: SyncPolicy::Never,
                        min_free: Some(0),
                        ..StoreConfig::default()
                    };
                    let store = Store::open(root, config).unwrap();
                    put(&store, &format!("{thread}/{n}"), b"x", IfExists::Error).unwrap();
                }
            });
        }
    });
    assert_eq!(visible(&dir).len(), 100);
}

#[test]
fn uploads_can_be_looked_at_and_purged_beside_an_open_store() {
    let (dir, store) = open(StoreConfig::default());
    let seen = || {
        let uploads = uploads(dir.path()).unwrap();
        let seen = uploads
            .into_iter()
            .map(|u| (u.path, u.owner, u.size, u.held, u.live));
        seen.collect::<BTreeSet<_>>()
    };
    assert!(seen().is_empty());
    for (name, size) in [("a b", Some(10)), ("c", None)] {
        let mut partial = resumable(&store, name, size).unwrap();
        partial.write_at(0, b"1234").unwrap();
    }
    let mut live = resumable(&store, "c", None).unwrap();
    assert_eq!(have(&mut live).len(), 1);
    // Without a journal it is nobody's business yet.
    let mut young = resumable(&store, "young", None).unwrap();
    young.write_at(0, b"x").unwrap();
    let peer = || "peer".to_owned();
    let expected = [
        ("a b".to_owned(), peer(), Some(10), 4, false),
        ("c".to_owned(), peer(), None, 4, true),
    ];
    assert_eq!(seen(), BTreeSet::from(expected.clone()));
    assert_eq!(purge(dir.path(), Duration::from_secs(3600)).unwrap(), 0);
    assert_eq!(purge(dir.path(), Duration::ZERO).unwrap(), 1);
    assert_eq!(seen(), BTreeSet::from([expected[1].clone()]));
    assert_eq!(store.usage().suspended, 4, "not told yet");
    store.sweep().unwrap();
    assert_eq!(store.usage().suspended, 0);
    live.write_at(4, b"5").unwrap();
    live.finish(Some(hash(b"12345")), None).unwrap();
    young.finish(None, None).unwrap();
    assert!(seen().is_empty());
    // Where there never was a store.
    let empty = TempDir::new().unwrap();
    assert_eq!(uploads(empty.path()).unwrap(), []);
    assert_eq!(purge(empty.path(), Duration::ZERO).unwrap(), 0);
    assert!(uploads(&empty.path().join("missing")).is_err());
}

#[test]
fn interrupted_uploads_count_against_the_quota_of_their_directory() {
    let (_dir, store) = open(StoreConfig::default());
    let tenant = Tenant {
        prefix: Some(path("t")),
        quota: 1000,
        outer: None,
    };
    let begin = |name: &str| {
        let path = path(name);
        let new = NewFile {
            owner: Some("peer"),
            tenant: Some(&tenant),
            ..new(&path, Some(600), IfExists::Same)
        };
        match store.begin(&new)? {
            Begin::New(partial) => Ok::<_, StoreError>(partial),
            Begin::Exists(_) => panic!("nothing is there"),
        }
    };
    let mut partial = begin("t/a").unwrap();
    partial.write_at(0, &[1; 600]).unwrap();
    drop(partial);
    assert_eq!(begin("t/b").unwrap_err().code(), "quota");
    // It may go on itself, and what lies elsewhere is not counted.
    drop(begin("t/a").unwrap());
    drop(resumable(&store, "u/a", Some(600)).unwrap());
}

#[test]
fn one_owner_has_so_many_interrupted_uploads() {
    let (_dir, store) = open(StoreConfig {
        max_suspended: 2,
        ..StoreConfig::default()
    });
    for name in ["a", "b"] {
        let mut partial = resumable(&store, name, Some(9)).unwrap();
        partial.write_at(0, b"1234").unwrap();
    }
    let error = resumable(&store, "c", Some(9)).unwrap_err();
    assert_eq!((error.code(), error.retry()), ("too_many_uploads", false));
    drop(resumable(&store, "b", Some(9)).unwrap());
    // Another owner, and what is not to be resumed.
    let c = path("c");
    let mut other = new(&c, Some(9), IfExists::Same);
    assert!(matches!(store.begin(&other).unwrap(), Begin::New(_)));
    other.owner = Some("other");
    assert!(matches!(store.begin(&other).unwrap(), Begin::New(_)));
}

#[test]
fn a_file_is_replaced_by_one_of_its_size_under_a_quota_of_less_than_both() {
    let (_dir, store) = open(StoreConfig {
        quota: Some(1000),
        overwrite: Overwrite::Always,
        ..StoreConfig::default()
    });
    put(&store, "a", &[1; 600], IfExists::Same).unwrap();
    let a = path("a");
    let begin = |size| store.begin(&new(&a, Some(size), IfExists::Overwrite));
    let first = begin(600).unwrap();
    // The room of one file is given once.
    assert_eq!(begin(600).unwrap_err().code(), "quota");
    drop(first);
    assert_eq!(begin(1001).unwrap_err().code(), "quota");
    put(&store, "a", &[2; 600], IfExists::Overwrite).unwrap();
    put(&store, "a", &[3; 1000], IfExists::Overwrite).unwrap();
    assert_eq!(store.usage().used, 1000);
    assert_eq!(
        put(&store, "b", b"x", IfExists::Same).unwrap_err().code(),
        "quota"
    );
}

#[test]
fn links_take_room_of_a_quota() {
    let (_dir, store) = open(StoreConfig {
        quota: Some(2048),
        ..StoreConfig::default()
    });
    let link = |name: &str| store.make_link(&path(name), "x", IfExists::Same);
    link("a").unwrap();
    link("b").unwrap();
    assert_eq!(link("c").unwrap_err().code(), "quota");
    store.remove(&path("a"), false).unwrap();
    link("c").unwrap();
}

#[test]
fn directories_and_empty_files_take_room_of_a_quota() {
    let config = StoreConfig {
        quota: Some(5 * 1024),
        overwrite: Overwrite::Always,
        ..StoreConfig::default()
    };
    let (dir, store) = open(config.clone());
    let used = |store: &Store| store.usage().used;
    let full = |result: Result<(), StoreError>| {
        assert_eq!(result.unwrap_err().code(), "quota");
    };
    let empty = |store: &Store, name: &str| put(store, name, b"", IfExists::Same).map(drop);
    let dir_of = |store: &Store, name: &str| {
        let made = store.make_dir(&path(name), Meta::default(), None);
        made.map(drop)
    };
    empty(&store, "a").unwrap();
    assert_eq!(used(&store), 1024);
    // The directories on the way count, once.
    empty(&store, "x/y/b").unwrap();
    assert_eq!(used(&store), 4 * 1024);
    full(empty(&store, "z/c"));
    full(dir_of(&store, "z/c"));
    assert_eq!(staging(&dir), 0);
    assert!(!dir.path().join("z").exists(), "nothing is made in vain");
    dir_of(&store, "x/d").unwrap();
    assert_eq!(used(&store), 5 * 1024);
    full(empty(&store, "c"));
    full(dir_of(&store, "c"));
    full(put(&store, "c", b"1", IfExists::Same).map(drop));
    // One whose size is not told, neither.
    let c = path("c");
    full(store.begin(&new(&c, None, IfExists::Same)).map(drop));
    // What is there needs no room.
    dir_of(&store, "x/d").unwrap();
    put(&store, "a", b"1234", IfExists::Overwrite).unwrap();
    assert_eq!(used(&store), 4 * 1024 + 4);
    drop(store);
    let store = Store::open(dir.path(), config).unwrap();
    assert_eq!(used(&store), 4 * 1024 + 4, "counted anew after a restart");
    full(empty(&store, "c"));
    store.remove(&path("x"), true).unwrap();
    assert_eq!(used(&store), 4);
    empty(&store, "x/c").unwrap();
    assert_eq!(used(&store), 2 * 1024 + 4);
}

#[test]
fn a_clock_that_leaps_removes_nothing() {
    let (dir, store) = open(StoreConfig::default());
    let mut partial = resumable(&store, "a", Some(9)).unwrap();
    partial.write_at(0, b"1234").unwrap();
    drop(partial);
    drop(store);
    // As if the clock had shown 2020 until now.
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_577_836_800);
    touch(&log_of(&dir, "a"), then);
    touch(
        &dir.path().join(".udpack/lock"),
        then + Duration::from_secs(3600),
    );
    let store = again(&dir);
    assert_eq!(store.usage().suspended, 4);
    assert_eq!(store.sweep().unwrap(), 0);
    drop(store);
    // Time that a server saw counts.
    touch(&log_of(&dir, "a"), then);
    touch(
        &dir.path().join(".udpack/lock"),
        then + Duration::from_secs(48 * 3600),
    );
    assert_eq!(again(&dir).usage().suspended, 0);
}

#[test]
fn in_a_shared_directory_only_time_that_was_seen_ages_what_is_kept() {
    let shared = || StoreConfig {
        shared: true,
        ..StoreConfig::default()
    };
    let (dir, store) = open(shared());
    let mut partial = resumable(&store, "a", Some(9)).unwrap();
    partial.write_at(0, b"1234").unwrap();
    drop(partial);
    drop(store);
    let open = || Store::open(dir.path(), shared()).unwrap();
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_577_836_800);
    let hours = |hours: u64| then + Duration::from_secs(hours * 3600);
    let lock = dir.path().join(".udpack/lock");
    // Nobody came here for years.
    touch(&log_of(&dir, "a"), then);
    touch(&lock, hours(1));
    let first = open();
    assert_eq!(first.usage().suspended, 4);
    // A second one beside it forgives nothing again, and the clock leaps under both.
    let second = open();
    touch(&log_of(&dir, "a"), then);
    touch(&lock, then);
    assert_eq!(second.sweep().unwrap(), 0);
    assert_eq!(first.sweep().unwrap(), 0);
    drop((first, second));
    touch(&log_of(&dir, "a"), then);
    touch(&lock, hours(48));
    assert_eq!(open().usage().suspended, 0, "48 hours were seen");
    assert!(
        !dir.path().join(".udpack").exists(),
        "nothing is kept in it"
    );
}

#[tokio::test]
async fn who_closes_a_store_is_told_what_stays() {
    let config = StoreConfig {
        shared: true,
        ..StoreConfig::default()
    };
    let (dir, store) = open(config.clone());
    let mut partial = resumable(&store, "a", Some(9)).unwrap();
    partial.write_at(0, b"1234").unwrap();
    let (dropped, wait) = std::sync::mpsc::channel::<()>();
    let elsewhere = thread::spawn(move || {
        wait.recv().unwrap_err();
        drop(partial);
    });
    let closing = store.close(Duration::from_secs(60));
    let mut closing = std::pin::pin!(closing);
    assert!(
        tokio::time::timeout(Duration::ZERO, &mut closing)
            .await
            .is_err(),
        "the upload is open"
    );
    drop(dropped);
    let left = closing.await;
    elsewhere.join().unwrap();
    assert_eq!((left.uploads, left.bytes), (1, 4));
    assert!(dir.path().join(".udpack").exists());
    let store = Store::open(dir.path(), config).unwrap();
    resumable(&store, "a", Some(9)).unwrap().discard();
    let left = store.close(Duration::from_secs(60)).await;
    assert_eq!((left.uploads, left.bytes), (0, 0));
    assert!(!dir.path().join(".udpack").exists());
}

#[test]
fn many_begin_the_same_upload_and_one_writes_it() {
    let (dir, store) = open(StoreConfig::default());
    let barrier = Barrier::new(16);
    let won: usize = thread::scope(|scope| {
        let racers: Vec<_> = (0..16)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    match resumable(&store, "a", Some(4)) {
                        Ok(mut partial) => {
                            partial.write_at(0, b"mine").unwrap();
                            // Kept until all have tried.
                            barrier.wait();
                            partial.finish(None, None).unwrap();
                            1
                        }
                        Err(error) => {
                            assert_eq!(error.code(), "busy");
                            barrier.wait();
                            0
                        }
                    }
                })
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).sum()
    });
    assert_eq!((won, visible(&dir).len(), files(&dir)), (1, 1, 0));
}

fn resumable(store: &Store, name: &str, size: Option<u64>) -> Result<Partial, StoreError> {
    let path = path(name);
    let new = NewFile {
        owner: Some("peer"),
        ..new(&path, size, IfExists::Same)
    };
    match store.begin(&new)? {
        Begin::New(partial) => Ok(partial),
        Begin::Exists(existing) => panic!("{} is there", existing.path()),
    }
}

fn have(partial: &mut Partial) -> Vec<Range> {
    partial.have(&mut |_| {}).unwrap()
}

fn range(off: u64, bytes: &[u8]) -> Range {
    Range {
        off,
        len: bytes.len() as u64,
        hash: hash(bytes),
    }
}

pub(super) fn hash(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// As if the time for a checkpoint had passed.
pub(super) fn make_due(partial: &mut Partial) {
    partial.unsynced.bytes = u64::MAX;
}

fn due(partial: &mut Partial) -> Checkpoint {
    make_due(partial);
    partial.checkpoint().unwrap()
}

/// Ends an upload as a crash of the process does.
pub(super) fn crash(partial: Partial) {
    let mut last = partial.body.last();
    last.staged.as_mut().unwrap().abandon();
    last.staged = None;
}

fn again(dir: &TempDir) -> Store {
    let config = StoreConfig {
        min_free: Some(0),
        ..StoreConfig::default()
    };
    Store::open(dir.path(), config).unwrap()
}

/// How many files the store's own directories hold.
fn files(dir: &TempDir) -> usize {
    let journal = fs::read_dir(dir.path().join(".udpack/journal")).unwrap();
    staging(dir) + journal.count()
}

fn part_of(dir: &TempDir, name: &str) -> PathBuf {
    let key = Key::new("peer", &path(name));
    dir.path()
        .join(format!(".udpack/staging/{}{PART}", key.as_str()))
}

fn log_of(dir: &TempDir, name: &str) -> PathBuf {
    let key = Key::new("peer", &path(name));
    dir.path()
        .join(format!(".udpack/journal/{}{LOG}", key.as_str()))
}

fn part(dir: &TempDir) -> PathBuf {
    part_of(dir, "a")
}

fn log(dir: &TempDir) -> PathBuf {
    log_of(dir, "a")
}

pub(super) fn touch(path: &Path, time: SystemTime) {
    File::options()
        .append(true)
        .open(path)
        .unwrap()
        .set_modified(time)
        .unwrap();
}

fn lines(bodies: &[&str]) -> String {
    let line = |body: &&str| {
        let check = blake3::hash(body.as_bytes()).to_hex();
        format!("{} {body}\n", &check[..16])
    };
    bodies.iter().map(line).collect()
}
