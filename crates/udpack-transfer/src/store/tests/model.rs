//! Random sequences of what can happen to uploads, against a model that knows what must be left.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::super::disk::{LOG, PART};
use super::resume::{crash, hash, make_due, touch};
use super::*;

/// Few names and owners, so that they meet.
const NAMES: [&str; 2] = ["a", "d/e/b"];
const OWNERS: [&str; 2] = ["x", "y"];

#[derive(Debug, Clone)]
enum Happens {
    Begin {
        slot: usize,
        name: usize,
        owner: Option<usize>,
        size: Option<u64>,
        overwrite: bool,
    },
    /// Writes a byte so often, so far beyond the position.
    Write {
        slot: usize,
        beyond: u64,
        byte: u8,
        len: usize,
    },
    Have {
        slot: usize,
    },
    Checkpoint {
        slot: usize,
    },
    Drop {
        slot: usize,
    },
    Discard {
        slot: usize,
    },
    Complete {
        slot: usize,
        size: Option<u64>,
        right: bool,
    },
    Publish,
    /// Every process dies; then the store is opened again.
    Crash,
    Reopen,
    /// What is not under way gets too old.
    Expire,
    /// Somebody garbles the journal of an upload that is not under way.
    Garble {
        name: usize,
        owner: usize,
    },
}

fn happens() -> impl Strategy<Value = Happens> {
    use Happens as H;
    let slot = 0..2_usize;
    let owner = prop_oneof![1 => Just(None), 8 => Just(Some(0)), 1 => Just(Some(1))];
    let size = prop_oneof![2 => Just(None), 3 => (0..80_u64).prop_map(Some)];
    prop_oneof![
        8 => (slot.clone(), 0..NAMES.len(), owner, size, prop::bool::weighted(0.8))
            .prop_map(|(slot, name, owner, size, overwrite)| H::Begin { slot, name, owner, size, overwrite }),
        10 => (slot.clone(), prop_oneof![4 => Just(0), 1 => 1..20_u64], any::<u8>(), 0..16_usize)
            .prop_map(|(slot, beyond, byte, len)| H::Write { slot, beyond, byte, len }),
        6 => slot.clone().prop_map(|slot| H::Have { slot }),
        3 => slot.clone().prop_map(|slot| H::Checkpoint { slot }),
        3 => slot.clone().prop_map(|slot| H::Drop { slot }),
        1 => slot.clone().prop_map(|slot| H::Discard { slot }),
        3 => (slot, prop::option::weighted(0.3, 0..40_u64), prop::bool::weighted(0.8))
            .prop_map(|(slot, size, right)| H::Complete { slot, size, right }),
        2 => Just(H::Publish),
        1 => Just(H::Crash),
        1 => Just(H::Reopen),
        1 => Just(H::Expire),
        1 => (0..NAMES.len(), 0..OWNERS.len()).prop_map(|(name, owner)| H::Garble { name, owner }),
    ]
}

/// An upload as the model sees it.
#[derive(Debug, Clone)]
struct Upload {
    name: usize,
    owner: Option<usize>,
    size: Option<u64>,
    overwrite: bool,
    /// The staging file.
    disk: Vec<u8>,
    position: usize,
    /// What a crash now would leave to resume: the bytes of the staging file that are marked.
    marked: Vec<bool>,
    /// There is a journal: once anything was marked.
    journalled: bool,
    safe: usize,
    /// What was given out by `have`.
    known: Vec<bool>,
    doomed: bool,
}

/// What waits to be taken up again: the staging file, and which of it is durable.
#[derive(Debug, Clone, Default)]
struct Kept {
    disk: Vec<u8>,
    marked: Vec<bool>,
}

#[derive(Debug, Default)]
struct Model {
    open: BTreeMap<usize, Upload>,
    complete: Vec<Upload>,
    kept: BTreeMap<(usize, usize), Kept>,
    published: BTreeMap<usize, Vec<u8>>,
}

impl Upload {
    fn key(&self) -> Option<(usize, usize)> {
        self.owner.map(|owner| (self.name, owner))
    }

    fn may_skip_to(&self, offset: usize) -> bool {
        (self.position..offset).all(|at| self.known.get(at) == Some(&true))
    }

    fn skip_to(&mut self, offset: usize) {
        if self.safe == self.position && self.position < offset {
            self.safe = offset;
        }
        self.position = offset;
    }

    fn checkpoint(&mut self) {
        if self.owner.is_some() && self.safe < self.position {
            self.safe = self.position;
            self.marked[..self.position].fill(true);
            self.journalled = true;
        }
    }
}

impl Model {
    fn live(&self, key: (usize, usize)) -> bool {
        let mut all = self.open.values().chain(&self.complete);
        all.any(|upload| upload.key() == Some(key))
    }

    fn keep(&mut self, upload: Upload) {
        if let Some(key) = upload.key()
            && upload.journalled
        {
            let Upload { disk, marked, .. } = upload;
            self.kept.insert(key, Kept { disk, marked });
        }
    }

    fn drop(&mut self, slot: usize) {
        if let Some(mut upload) = self.open.remove(&slot)
            && !upload.doomed
        {
            upload.checkpoint();
            self.keep(upload);
        }
    }

    fn crash(&mut self) {
        // A whole file without a name is one that was interrupted.
        let open = std::mem::take(&mut self.open).into_values();
        let complete = std::mem::take(&mut self.complete);
        for upload in open.chain(complete) {
            self.keep(upload);
        }
    }
}

/// The store and what is open in it.
struct Real {
    dir: TempDir,
    store: Option<Store>,
    open: BTreeMap<usize, Partial>,
    complete: Vec<Complete>,
}

impl Real {
    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn log(&self, (name, owner): (usize, usize)) -> PathBuf {
        let key = Key::new(OWNERS[owner], &path(NAMES[name]));
        let journal = self.dir.path().join(".udpack/journal");
        journal.join(format!("{}{LOG}", key.as_str()))
    }

    /// Bytes of a staging file.
    fn held(&self, (name, owner): (usize, usize)) -> usize {
        let key = Key::new(OWNERS[owner], &path(NAMES[name]));
        let staging = self.dir.path().join(".udpack/staging");
        let part = staging.join(format!("{}{PART}", key.as_str()));
        fs::metadata(part).unwrap().len() as usize
    }

    fn reopen(&mut self) {
        self.store = None;
        self.store = Some(Store::open(self.dir.path(), config()).unwrap());
    }
}

fn config() -> StoreConfig {
    StoreConfig {
        overwrite: Overwrite::Always,
        min_free: Some(0),
        quota: Some(1 << 30),
        // What is synced makes no difference to a process that dies.
        sync: SyncPolicy::Never,
        ..StoreConfig::default()
    }
}

fn step(real: &mut Real, model: &mut Model, happens: &Happens) {
    match *happens {
        Happens::Begin {
            slot,
            name,
            owner,
            size,
            overwrite,
        } => {
            real.open.remove(&slot);
            model.drop(slot);
            let path = path(NAMES[name]);
            let begun = real.store().begin(&NewFile {
                path: &path,
                size,
                if_exists: match overwrite {
                    true => IfExists::Overwrite,
                    false => IfExists::Same,
                },
                owner: owner.map(|owner| OWNERS[owner]),
                tenant: None,
                dirs: &[],
                whole: false,
            });
            let key = owner.map(|owner| (name, owner));
            if let (false, Some(there)) = (overwrite, model.published.get(&name)) {
                let Ok(Begin::Exists(existing)) = begun else {
                    panic!("a file is there");
                };
                assert_eq!(existing.fingerprint(&mut |_| {}).unwrap(), hash(there));
            } else if key.is_some_and(|key| model.live(key)) {
                assert_eq!(begun.unwrap_err().code(), "busy");
            } else {
                let Ok(Begin::New(partial)) = begun else {
                    panic!("it can be begun");
                };
                let kept = key.and_then(|key| model.kept.remove(&key));
                // What nothing is known of is begun anew.
                let kept = kept.filter(|kept| kept.marked.contains(&true));
                let Kept { disk, marked } = kept.unwrap_or_default();
                assert_eq!(partial.resumable(), owner.is_some());
                real.open.insert(slot, partial);
                let upload = Upload {
                    name,
                    owner,
                    size,
                    overwrite,
                    known: vec![false; disk.len()],
                    journalled: marked.contains(&true),
                    disk,
                    marked,
                    position: 0,
                    safe: 0,
                    doomed: false,
                };
                model.open.insert(slot, upload);
            }
        }
        Happens::Write {
            slot,
            beyond,
            byte,
            len,
        } => {
            let (Some(partial), Some(upload)) =
                (real.open.get_mut(&slot), model.open.get_mut(&slot))
            else {
                return;
            };
            let offset = upload.position as u64 + beyond;
            let end = offset + len as u64;
            let outcome = partial.write_at(offset, &vec![byte; len]);
            let (offset, to) = (offset as usize, end as usize);
            if !upload.may_skip_to(offset) {
                let expected = upload.position as u64;
                assert!(
                    matches!(outcome, Err(StoreError::BadOffset { expected: at }) if at == expected)
                );
            } else if upload.size.is_some_and(|size| end > size) {
                assert_eq!(outcome.unwrap_err().code(), "size_mismatch");
                upload.doomed = true;
            } else {
                outcome.unwrap();
                upload.skip_to(offset);
                let longest = upload.disk.len().max(to);
                upload.disk.resize(longest, 0);
                upload.marked.resize(longest, false);
                upload.known.resize(longest, false);
                upload.disk[offset..to].fill(byte);
                upload.position = to;
            }
        }
        Happens::Have { slot } => {
            let (Some(partial), Some(upload)) =
                (real.open.get_mut(&slot), model.open.get_mut(&slot))
            else {
                return;
            };
            let limit = upload.size.map_or(usize::MAX, |size| size as usize);
            let durable =
                |at: usize| at < upload.safe || at >= upload.position && upload.marked[at];
            let mut told = vec![false; upload.disk.len()];
            for range in partial.have(&mut |_| {}).unwrap() {
                let (start, end) = (range.off as usize, (range.off + range.len) as usize);
                assert_eq!(range.hash, hash(&upload.disk[start..end]));
                told[start..end].fill(true);
            }
            let expected: Vec<bool> = (0..told.len())
                .map(|at| at < limit && durable(at))
                .collect();
            assert_eq!(told, expected);
            upload.known = told;
        }
        Happens::Checkpoint { slot } => {
            let (Some(partial), Some(upload)) =
                (real.open.get_mut(&slot), model.open.get_mut(&slot))
            else {
                return;
            };
            make_due(partial);
            if let Some(checkpoint) = partial.checkpoint() {
                checkpoint.run();
                upload.checkpoint();
            }
        }
        Happens::Drop { slot } => {
            real.open.remove(&slot);
            model.drop(slot);
        }
        Happens::Discard { slot } => {
            if let Some(partial) = real.open.remove(&slot) {
                partial.discard();
            }
            model.open.remove(&slot);
        }
        Happens::Complete { slot, size, right } => {
            let (Some(partial), Some(mut upload)) =
                (real.open.remove(&slot), model.open.remove(&slot))
            else {
                return;
            };
            let mut fits = true;
            for expected in [upload.size, size].into_iter().flatten() {
                let expected = expected as usize;
                if fits && expected > upload.position && upload.may_skip_to(expected) {
                    upload.skip_to(expected);
                }
                fits &= expected == upload.position;
            }
            let told = match right {
                true => hash(&upload.disk[..upload.position]),
                false => [0; 32],
            };
            let outcome = partial.complete(Some(told), size, Meta::default());
            match (fits, right) {
                (false, _) => assert_eq!(outcome.unwrap_err().code(), "size_mismatch"),
                (true, false) => assert_eq!(outcome.unwrap_err().code(), "hash_mismatch"),
                (true, true) => {
                    let complete = outcome.unwrap();
                    assert_eq!(complete.size(), upload.position as u64);
                    for bytes in [&mut upload.marked, &mut upload.known] {
                        bytes.truncate(upload.position);
                    }
                    upload.disk.truncate(upload.position);
                    real.complete.push(complete);
                    model.complete.push(upload);
                }
            }
        }
        Happens::Publish => {
            let batch = std::mem::take(&mut real.complete);
            let outcomes = real.store().publish(batch);
            let uploads = std::mem::take(&mut model.complete);
            assert_eq!(outcomes.len(), uploads.len());
            for (outcome, upload) in outcomes.into_iter().zip(uploads) {
                match model.published.get(&upload.name) {
                    Some(there) if !upload.overwrite && *there == upload.disk => {
                        assert!(outcome.unwrap().same);
                    }
                    Some(_) if !upload.overwrite => {
                        assert_eq!(outcome.unwrap_err().code(), "exists");
                    }
                    _ => {
                        let published = outcome.unwrap();
                        assert!(!published.same);
                        assert_eq!(published.hash, hash(&upload.disk));
                        model.published.insert(upload.name, upload.disk);
                    }
                }
            }
        }
        Happens::Crash => {
            for partial in std::mem::take(&mut real.open).into_values() {
                crash(partial);
            }
            for complete in &mut real.complete {
                complete.0.staged.abandon();
            }
            real.complete.clear();
            model.crash();
            real.reopen();
        }
        Happens::Reopen => {
            real.open.clear();
            real.complete.clear();
            for slot in 0..2 {
                model.drop(slot);
            }
            model.complete.clear();
            real.reopen();
        }
        Happens::Expire => {
            let old = SystemTime::now() - Duration::from_secs(48 * 60 * 60);
            for key in model.kept.keys() {
                touch(&real.log(*key), old);
            }
            let expired = model.kept.len() as u64;
            model.kept.clear();
            assert_eq!(real.store().sweep().unwrap(), expired);
        }
        Happens::Garble { name, owner } => {
            if model.kept.remove(&(name, owner)).is_some() {
                fs::write(real.log((name, owner)), "garbage").unwrap();
                // Garbage is kept until it is old, or until its upload comes again.
                assert_eq!(real.store().sweep().unwrap(), 0);
                assert_eq!(
                    purge(real.dir.path(), Duration::from_secs(3600)).unwrap(),
                    0
                );
                let disk = real.held((name, owner));
                let marked = vec![false; disk];
                let disk = vec![0; disk];
                model.kept.insert((name, owner), Kept { disk, marked });
            }
        }
    }
}

/// Directories below this one, but for the store's own.
fn dirs(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    let below = entries.filter(|entry| entry.file_type().unwrap().is_dir());
    below
        .filter(|dir| dir.file_name() != ".udpack")
        .map(|dir| 1 + dirs(&dir.path()))
        .sum()
}

/// What must hold after every step.
fn check(real: &Real, model: &Model) {
    for (slot, upload) in &model.open {
        let partial = &real.open[slot];
        assert_eq!(partial.position(), upload.position as u64);
        assert_eq!(
            partial.safe().load(Ordering::Relaxed),
            upload.safe as u64,
            "safe"
        );
    }
    let published: BTreeMap<usize, Vec<u8>> = NAMES
        .iter()
        .enumerate()
        .filter_map(|(n, name)| Some((n, fs::read(real.dir.path().join(name)).ok()?)))
        .collect();
    assert_eq!(published, model.published);
    assert_eq!(visible(&real.dir).len(), model.published.len());
    let usage = real.store().usage();
    let kept = model.kept.values().map(|kept| kept.disk.len() as u64);
    assert_eq!(usage.suspended, kept.sum::<u64>());
    let used = model.published.values().map(|bytes| match bytes.len() {
        0 => 1024,
        len => len as u64,
    });
    assert_eq!(usage.used, used.sum::<u64>() + 1024 * dirs(real.dir.path()));
    if model.open.is_empty() && model.complete.is_empty() {
        assert_eq!((usage.reserved, usage.open), (0, 0));
        let state = real.store().inner.state();
        assert_eq!((state.unwritten, state.live.len()), (0, 0));
        assert_eq!(staging(&real.dir), model.kept.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn the_store_does_what_its_model_says(sequence in prop::collection::vec(happens(), 1..80)) {
        let dir = TempDir::new().unwrap();
        let store = Store::open(dir.path(), config()).unwrap();
        let mut real = Real { dir, store: Some(store), open: BTreeMap::new(), complete: Vec::new() };
        let mut model = Model::default();
        for happens in &sequence {
            step(&mut real, &mut model, happens);
            check(&real, &model);
        }
    }
}
