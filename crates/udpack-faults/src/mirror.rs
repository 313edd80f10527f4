//! `sync` of random trees: edits at both sides while it runs, SIGKILL of the client, of the server or of both at random
//! instants. Whatever happened, each file of the copy is whole: a version that one side had. A run that nothing disturbs makes the two
//! equal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;

use crate::ledger::{PRIVATE, Tally, hash};
use crate::load::PATIENCE;
use crate::rig::{self, Rig};
use crate::rng::Rng;

/// How often.
#[derive(Clone, Debug, Args)]
pub(crate) struct MirrorArgs {
    /// How often something is killed, or edited during the run.
    #[arg(long, default_value_t = 60)]
    cycles: u64,

    /// In every so-manieth cycle nothing is disturbed, and the two must become equal.
    #[arg(long, default_value_t = 4)]
    equal_every: u64,
}

/// What a cycle does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Nothing,
    Edits,
    KillClient,
    KillServer,
    KillBoth,
}

/// Every content that a file ever had: the copy may show no other.
#[derive(Debug, Default)]
struct Known {
    hashes: Mutex<BTreeSet<[u8; 32]>>,
    versions: AtomicU64,
}

impl Known {
    /// The time of a version, of which there is no second one. The kernel's clock stands still for milliseconds: two files of one
    /// size, written within them, would have one time, and a `sync` without `--checksum` takes them for equal. None is a whole second,
    /// which matches every time within that second.
    fn time_of_its_own(&self) -> SystemTime {
        let version = 1 + self.versions.fetch_add(1, Ordering::Relaxed);
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + Duration::from_micros(version)
    }

    fn add(&self, hash: blake3::Hash) {
        let mut known = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(*hash.as_bytes());
    }

    fn has(&self, hash: blake3::Hash) -> bool {
        let known = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        known.contains(hash.as_bytes())
    }
}

/// Runs the cycles; true when nothing was wrong.
pub(crate) fn run(args: &MirrorArgs, rig: &Rig, mut rng: Rng) -> anyhow::Result<bool> {
    let uploads = rig.work().join("uploads");
    let (tree, copy) = (rig.work().join("tree"), uploads.join("copy"));
    fs::create_dir_all(&tree)?;
    let flags = ["--overwrite", "always"];
    let port = rig::free_port(&mut rng)?;
    let mut server = rig.server_with(port, &uploads, &flags)?;
    server.kill();
    rig.token()?;
    server = rig.server_with(port, &uploads, &flags)?;
    let known = Known::default();
    let mut tally = Tally::default();
    let mut times: BTreeMap<What, u32> = BTreeMap::new();
    let began = Instant::now();
    let (mut cycle, mut runs) = (0, 0);
    while cycle < args.cycles && tally.bad() < ENOUGH {
        cycle += 1;
        let last = cycle % args.equal_every.max(1) == 0 || cycle == args.cycles;
        let what = match rng.range(0, 99) {
            _ if last => What::Nothing,
            0..40 => What::Edits,
            40..65 => What::KillClient,
            65..85 => What::KillServer,
            _ => What::KillBoth,
        };
        *times.entry(what).or_default() += 1;
        for _ in 0..rng.range(5, 40) {
            edit(&mut rng, &tree, &known)?;
        }
        if rng.chance(40) && copy.exists() {
            for _ in 0..rng.range(1, 10) {
                edit(&mut rng, &copy, &known)?;
            }
        }
        let delta = if rng.chance(50) { "always" } else { "auto" };
        let rate = if what == What::Nothing { "none" } else { "8M" };
        let arguments = [
            "sync",
            "--delete",
            "--delta",
            delta,
            "--bwlimit",
            rate,
            "tree",
            ":copy",
        ];
        let checksum = ["--checksum"];
        let by_content = rng.chance(30);
        let arguments = [
            &arguments[..1],
            &checksum[..usize::from(by_content)],
            &arguments[1..],
        ]
        .concat();
        let mut sync = rig.client(port, rig.work(), &arguments)?;
        runs += 1;
        let instant = Duration::from_millis(rng.range(5, 700));
        let over = AtomicBool::new(what != What::Edits);
        let (mut here, mut there) = (Rng::new(rng.next()), Rng::new(rng.next()));
        thread::scope(|scope| -> anyhow::Result<()> {
            let edits = [(&mut here, &tree), (&mut there, &copy)].map(|(rng, root)| {
                let (over, known) = (&over, &known);
                scope.spawn(move || -> anyhow::Result<()> {
                    while !over.load(Ordering::Relaxed) {
                        edit(rng, root, known)?;
                        thread::sleep(Duration::from_millis(rng.range(1, 30)));
                    }
                    Ok(())
                })
            });
            match what {
                What::Nothing => {}
                What::Edits => thread::sleep(instant),
                What::KillClient => {
                    thread::sleep(instant);
                    sync.kill();
                }
                What::KillServer | What::KillBoth => {
                    thread::sleep(instant);
                    if what == What::KillBoth {
                        sync.kill();
                    }
                }
            }
            over.store(true, Ordering::Relaxed);
            for edits in edits {
                edits
                    .join()
                    .map_err(|_| anyhow::anyhow!("edits failed"))??;
            }
            Ok(())
        })?;
        if matches!(what, What::KillServer | What::KillBoth) {
            server.kill();
            server = rig.server_with(port, &uploads, &flags)?;
        }
        let told = sync.finish(PATIENCE)?;
        if told.stuck {
            tally.wrong(&format!("a client did not end in {PATIENCE:?}, {what:?}"));
        }
        tally.acked += told.acked.len() as u64;
        for (name, found) in files(&copy)? {
            if let Some(found) = found
                && !known.has(found)
            {
                tally.corrupt += 1;
                println!("CORRUPT: {name} of the copy is no version that ever was, {what:?}");
            }
        }
        if what == What::Nothing {
            if !told.success {
                tally.wrong(&format!("an undisturbed run failed: {:?}", told.errors));
            }
            let (ours, theirs) = (files(&tree)?, files(&copy)?);
            if ours != theirs {
                tally.wrong(&format!("the copy differs: {}", difference(&ours, &theirs)));
            }
        }
        if server.ended()?.is_some() {
            tally.wrong("the server ended by itself");
            server = rig.server_with(port, &uploads, &flags)?;
        }
    }
    if let Err(error) = server.terminate() {
        tally.wrong(&format!("{error:#}"));
    }
    for line in rig::panics(&rig.log()) {
        tally.wrong(&line);
    }
    for (what, count) in &times {
        println!("{what:?}: {count} cycles");
    }
    tally.print(runs, began.elapsed());
    if tally.bad() == 0 {
        fs::remove_dir_all(rig.work())?;
    }
    Ok(tally.bad() == 0)
}

/// Writes, removes or moves a file or a directory, or makes one of the other. What is in the way of that stays.
fn edit(rng: &mut Rng, root: &Path, known: &Known) -> anyhow::Result<()> {
    let path = root.join(any_name(rng));
    match rng.range(0, 9) {
        0 => drop(fs::remove_dir_all(&path)),
        1 => drop(fs::remove_file(&path)),
        2 => drop(fs::rename(&path, root.join(any_name(rng)))),
        3 => drop(fs::create_dir_all(&path)),
        way => {
            if let Some(dir) = path.parent() {
                let _ = fs::create_dir_all(dir);
            }
            let size = [0, 7, 5_000, 300_000, 1_500_000][rng.index(5)];
            let mut bytes = content(rng.next() % 40, size);
            // Another version of what is there: something inserted.
            if way > 7
                && let Ok(old) = fs::read(&path)
                && !old.is_empty()
                && known.has(blake3::hash(&old))
            {
                let at = rng.index(old.len());
                bytes = old;
                bytes.splice(at..at, *b"in between");
            }
            known.add(blake3::hash(&bytes));
            // In one step: a file that is written in place may be seen half written by anyone.
            let new = root.with_extension(format!("new{}", rng.next()));
            fs::write(&new, bytes)?;
            File::options()
                .write(true)
                .open(&new)?
                .set_modified(known.time_of_its_own())?;
            if fs::rename(&new, &path).is_err() {
                fs::remove_file(new)?;
            }
        }
    }
    Ok(())
}

fn any_name(rng: &mut Rng) -> PathBuf {
    let dir = ["", "a", "b", "a/b", "c d", "a/b/c"][rng.index(6)];
    Path::new(dir).join(["x", "y", "z", "a", "b", "f0", "f1", "f2"][rng.index(8)])
}

/// One of 40 contents of each size, so that some are found again under other names.
fn content(number: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut stream = blake3::Hasher::new();
    stream.update(&number.to_le_bytes());
    stream.finalize_xof().fill(&mut bytes);
    bytes
}

/// Everything below a directory, by name: the hash of a file, nothing of a directory. What goes meanwhile is left out.
fn files(root: &Path) -> anyhow::Result<BTreeMap<String, Option<blake3::Hash>>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![(root.to_owned(), String::new())];
    while let Some((dir, prefix)) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        for entry in entries {
            let entry = entry?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if name == PRIVATE {
                continue;
            }
            if entry.file_type()?.is_dir() {
                dirs.push((entry.path(), format!("{name}/")));
                found.insert(name, None);
            } else {
                found.insert(name, Some(hash(&entry.path())?));
            }
        }
    }
    Ok(found)
}

/// The first name at which two trees differ.
fn difference(
    ours: &BTreeMap<String, Option<blake3::Hash>>,
    theirs: &BTreeMap<String, Option<blake3::Hash>>,
) -> String {
    let names: BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    let differs = |name: &&&String| ours.get(**name) != theirs.get(**name);
    match names.iter().find(differs) {
        Some(name) => format!(
            "{name}: {:?} here, {:?} there",
            ours.get(*name),
            theirs.get(*name)
        ),
        None => "nothing".to_owned(),
    }
}

/// After so many findings the run ends: the first ones tell.
const ENOUGH: u64 = 10;
