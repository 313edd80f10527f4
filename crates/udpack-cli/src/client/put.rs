//! `put`: uploads files.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use udpack_transfer::{RelPath, Source, TransferError, Uploader};

use super::report::Report;
use crate::args::PutArgs;
use crate::exit::{Failure, Kind};
use crate::logging::Console;
use crate::output;
use crate::progress::Meter;
use crate::signals::Interrupts;
use crate::target::Target;

pub(super) async fn run(
    args: PutArgs,
    console: &Console,
    interrupts: Interrupts,
) -> anyhow::Result<()> {
    let mut report = Report::new(console, args.show.json, args.log.quiet);
    let result = put(&args, console, interrupts, &mut report).await;
    report.finish(result)
}

async fn put(
    args: &PutArgs,
    console: &Console,
    mut interrupts: Interrupts,
    report: &mut Report,
) -> anyhow::Result<()> {
    report.expect(args.paths.len());
    let plan = Plan::new(args, report)?;
    if args.dry_run {
        for (source, size) in plan.sources.iter().zip(&plan.sizes) {
            report.line(&format!(
                "{}  {size}  -",
                output::printable(source.remote())
            ));
        }
        return Ok(());
    }
    if plan.sources.is_empty() {
        return Ok(());
    }
    let target = Target::find(&args.connect)?;
    report.start(&target.address(), plan.sizes.iter().sum());
    target
        .run(&mut interrupts, async |socket| {
            let mut uploader = Uploader::new(&socket).if_exists(args.if_exists.into());
            if let Some(jobs) = args.jobs {
                uploader = uploader.lanes(jobs.into());
            }
            let mut meter = Meter::new(args.show.progress, args.log.quiet, console);
            report
                .follow(uploader.put(plan.sources), &plan.locals, &mut meter)
                .await;
            Ok(())
        })
        .await
}

/// What to send under which names. Files that cannot be sent are in the report already.
#[derive(Debug, Default)]
struct Plan {
    sources: Vec<Source>,
    sizes: Vec<u64>,
    /// The paths as they were given.
    locals: Vec<String>,
}

impl Plan {
    fn new(args: &PutArgs, report: &mut Report) -> anyhow::Result<Self> {
        let mut plan = Self::default();
        let mut taken: HashMap<String, &Path> = HashMap::new();
        if args.paths.len() > 1 && args.name.as_ref().is_some_and(|name| !name.ends_with('/')) {
            return Err(Failure::new(Kind::Usage, "--as NAME takes a single file")
                .hint("end it with a slash to name a directory for all of them")
                .into());
        }
        for path in &args.paths {
            let local = path.display().to_string();
            let name = remote_name(path, args.name.as_deref());
            if let Some(other) = taken.insert(name.clone(), path) {
                let text = format!(
                    "{} and {local} would both be stored as {name}",
                    other.display()
                );
                return Err(Failure::new(Kind::Usage, text)
                    .hint("send them one by one, with --as NAME")
                    .into());
            }
            match check(path, &name) {
                Ok((remote, size)) => {
                    plan.sources.push(Source::file(path, remote));
                    plan.sizes.push(size);
                    plan.locals.push(local);
                }
                Err(error) => report.failed(&name, &local, &error),
            }
        }
        Ok(plan)
    }
}

/// The file's own name, or what `--as` makes of it. Not yet known to be valid.
fn remote_name(path: &Path, wanted: Option<&str>) -> String {
    let own = || {
        path.file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy()
    };
    match wanted {
        Some(dir) if dir.ends_with('/') => format!("{dir}{}", own()),
        Some(name) => name.to_owned(),
        None => own().into_owned(),
    }
}

/// Finds out before dialling whether a file can be sent at all.
fn check(path: &Path, name: &str) -> anyhow::Result<(RelPath, u64)> {
    let unreadable = |source| TransferError::Source {
        path: path.to_owned(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if metadata.is_dir() {
        let text = format!("is a directory: {}", path.display());
        return Err(Failure::new(Kind::LocalFile, text)
            .hint("this version sends files only: name the files in it")
            .into());
    }
    if !metadata.is_file() {
        let text = format!("not a regular file: {}", path.display());
        return Err(Failure::new(Kind::LocalFile, text)
            .hint("copy what it gives into a file first")
            .into());
    }
    File::open(path).map_err(unreadable)?;
    let remote = name.parse().map_err(|error: udpack_transfer::PathError| {
        Failure::new(Kind::Policy, error.to_string()).hint("choose another name with --as")
    })?;
    Ok((remote, metadata.len()))
}
