//! `verify`: compares local files with the server's by their hashes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use udpack_transfer::{Code, Found, Kind as EntryKind, RelPath, Remote, TransferError, What};

use super::failures::Failures;
use super::plan::{Asked, Plan};
use crate::args::VerifyArgs;
use crate::exit::{Explained, Failure, Kind};
use crate::json::{Ended, FileLine, Line, ResultLine};
use crate::logging::Console;
use crate::output;
use crate::progress::size;
use crate::signals::Interrupts;
use crate::target::{Target, retry};
use crate::value::hex;

/// The result of one comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Same,
    Differs,
    Missing,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Differs => "differs",
            Self::Missing => "missing",
        }
    }
}

/// A finished comparison.
#[derive(Debug)]
struct Compared {
    local: PathBuf,
    remote: String,
    bytes: u64,
    /// BLAKE3 of a local file; none for anything else.
    hash: Option<[u8; 32]>,
    verdict: anyhow::Result<Verdict>,
}

#[derive(Debug)]
struct Tally {
    json: bool,
    /// The number of equal files.
    same: usize,
    /// The number of equal directories and links.
    others: usize,
    wrong: usize,
    bytes: u64,
    failures: Failures,
}

pub(super) async fn run(
    args: VerifyArgs,
    console: &Console,
    mut interrupts: Interrupts,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut tally = Tally {
        json: args.json,
        same: 0,
        others: 0,
        wrong: 0,
        bytes: 0,
        failures: Failures::new(console),
    };
    let result = verify(&args, &mut interrupts, &mut tally).await;
    let total = tally.same + tally.others + tally.wrong + tally.failures.count();
    let result = match result {
        Ok(()) if tally.wrong > 0 => {
            tally.failures.tell();
            let verbs = match tally.wrong {
                1 => "is missing at the server or differs there",
                _ => "are missing at the server or differ there",
            };
            let all = output::counted(total as u64, "entry", "entries");
            let text = format!("{} of {all} {verbs}", tally.wrong);
            Err(Failure::new(Kind::Integrity, text)
                .hint("`udpack-client put` sends what is missing; what differs needs --if-exists overwrite or rename")
                .into())
        }
        Ok(()) if total == 0 => Err(Failure::new(
            Kind::LocalFile,
            "nothing to compare: no file was found",
        )
        .hint("check the paths and --exclude")
        .into()),
        Ok(()) => tally.failures.verdict(total, "compared", None),
        Err(error) => Err(error),
    };
    let secs = began.elapsed().as_secs_f64();
    if args.json {
        let explained = result.as_ref().err().map(Explained::of);
        output::unless_gone(output::json(&Line::Result(ResultLine {
            ended: Ended::with(explained.as_ref()),
            files: tally.same,
            failed: tally.wrong + tally.failures.count(),
            bytes: tally.bytes,
            secs,
            rate: tally.bytes as f64 / secs.max(1e-6),
            ..ResultLine::default()
        })))?;
    }
    if tally.same > 0 {
        let files = output::counted(tally.same as u64, "file", "files");
        let bytes = size(tally.bytes as f64);
        console.note(&format!("{files} the same, {bytes} in {secs:.2} s"));
    }
    result
}

async fn verify(
    args: &VerifyArgs,
    interrupts: &mut Interrupts,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let asked = Asked {
        paths: &args.paths,
        list: None,
        list_is_stdin: false,
        instead: None,
        clashes: false,
        name: args.name.as_deref(),
        tree: &args.tree,
        every_dir: true,
        mapped: false,
    };
    if args.paths.iter().any(|path| path == Path::new("-")) {
        return Err(
            Failure::new(Kind::Usage, "standard input cannot be compared")
                .hint("name a file")
                .into(),
        );
    }
    let mut early = Vec::new();
    let plan = Plan::new(&asked, |remote, local, error| {
        early.push(Compared {
            local: local.to_owned(),
            remote: remote.to_owned(),
            bytes: 0,
            hash: None,
            verdict: Err(error),
        });
    })?;
    for failed in &early {
        tally.add(failed)?;
    }
    if plan.is_empty() {
        return Ok(());
    }
    let target = Target::find(&args.connect)?;
    target
        .run_link_aloud(retry(None), interrupts, async |link| {
            let remote = Remote::new(&link);
            plan.each(
                args.jobs,
                |found| compare(remote.clone(), found),
                |compared| {
                    // A comparison needs the server.
                    if let Err(error) = &compared.verdict
                        && matches!(Explained::of(error).kind, Kind::Network | Kind::Auth)
                    {
                        return compared.verdict.map(drop);
                    }
                    tally.add(&compared)
                },
            )
            .await
        })
        .await
}

impl Tally {
    fn add(&mut self, compared: &Compared) -> anyhow::Result<()> {
        let source = compared.local.display().to_string();
        let path = compared.remote.as_str();
        let explained = compared.verdict.as_ref().err().map(Explained::of);
        let status = match compared.verdict {
            Ok(verdict) => verdict.word(),
            Err(_) => "error",
        };
        if self.json {
            let hash = compared.hash.as_ref().map(|hash| hex(hash));
            output::unless_gone(output::json(&Line::File(FileLine {
                status,
                path,
                source: &source,
                bytes: Some(compared.bytes),
                hash: hash.as_deref(),
                error_kind: explained.as_ref().map(|explained| explained.kind.name()),
                error: explained.as_ref().map(|explained| explained.text.as_str()),
                ..FileLine::default()
            })))?;
        } else if matches!(compared.verdict, Ok(Verdict::Differs | Verdict::Missing)) {
            let path = output::printable(path);
            output::unless_gone(output::line(&format!("{status}  {path}")))?;
        }
        match (&compared.verdict, explained) {
            (Ok(Verdict::Same), _) if compared.hash.is_none() => self.others += 1,
            (Ok(Verdict::Same), _) => {
                self.same += 1;
                self.bytes += compared.bytes;
            }
            (Ok(_), _) => self.wrong += 1,
            (Err(_), Some(explained)) => {
                let alone = self.same + self.others + self.wrong + self.failures.count() == 0;
                self.failures.add(&source, explained, alone);
            }
            (Err(_), None) => {}
        }
        Ok(())
    }
}

async fn compare(remote: Remote, found: Found) -> Compared {
    let mut compared = Compared {
        local: found.local,
        remote: found.remote,
        bytes: 0,
        hash: None,
        verdict: Ok(Verdict::Same),
    };
    compared.verdict = match found.what {
        What::File { remote: name, .. } => file(&remote, &name, &mut compared).await,
        What::Dir { remote: name } => {
            let entry = remote.stat(Some(&name)).await;
            existing(entry).map(|entry| match entry {
                Some(entry) if entry.kind == EntryKind::Dir => Verdict::Same,
                Some(_) => Verdict::Differs,
                None => Verdict::Missing,
            })
        }
        What::Link {
            remote: name,
            target,
        } => {
            let entry = remote.stat(Some(&name)).await;
            existing(entry).map(|entry| match entry {
                Some(entry) if entry.target.as_ref() == Some(&target) => Verdict::Same,
                Some(_) => Verdict::Differs,
                None => Verdict::Missing,
            })
        }
        What::Failed(error) => Err(error.into()),
        _ => Ok(Verdict::Differs),
    };
    compared
}

/// Reads both sides at the same time.
async fn file(remote: &Remote, name: &RelPath, compared: &mut Compared) -> anyhow::Result<Verdict> {
    let path = compared.local.clone();
    let ours = tokio::task::spawn_blocking(move || hash(&path));
    let theirs = remote.hash(name);
    let (ours, theirs) = tokio::join!(ours, theirs);
    let theirs = match theirs {
        // The name belongs to another kind of entry.
        Err(TransferError::Refused {
            code: Code::IsDirectory | Code::NotAFile,
            ..
        }) => return Ok(Verdict::Differs),
        theirs => existing(theirs)?,
    };
    let ours = ours.context("the local file was not read")?;
    let (size, hash) = ours.map_err(|source| TransferError::Source {
        path: compared.local.clone(),
        source,
    })?;
    compared.bytes = size;
    compared.hash = Some(hash);
    Ok(match theirs {
        Some(theirs) if theirs == (size, hash) => Verdict::Same,
        Some(_) => Verdict::Differs,
        None => Verdict::Missing,
    })
}

/// Turns `not_found` into `None`.
pub(super) fn existing<T>(answer: Result<T, TransferError>) -> anyhow::Result<Option<T>> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(TransferError::Refused {
            code: Code::NotFound,
            ..
        }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Size and BLAKE3. Blocks.
pub(super) fn hash(path: &Path) -> io::Result<(u64, [u8; 32])> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok((hasher.count(), *hasher.finalize().as_bytes()))
}
