//! `put`: uploads files and directories.

use std::io::{self, Read};
use std::path::Path;

use anyhow::Context as _;
use udpack_transfer::{Found, Limiter, Remote, Source, Uploader, What};

use super::dry;
use super::plan::{Asked, List, Plan};
use super::report::{Origin, Origins, Report, Thing, Transfer};
use super::umask;
use crate::args::{IfExistsArg, PutArgs};
use crate::exit::{EmptyStdin, Failure, Kind};
use crate::logging::Console;
use crate::progress::Meter;
use crate::signals::Interrupts;
use crate::target::{Target, retry};

pub(super) async fn run(
    args: PutArgs,
    console: &Console,
    interrupts: Interrupts,
) -> anyhow::Result<()> {
    let mut report = Report::new(console, args.show.json, &args.log, "stored");
    let result = put(&args, console, interrupts, &mut report).await;
    report.finish(result)
}

async fn put(
    args: &PutArgs,
    console: &Console,
    mut interrupts: Interrupts,
    report: &mut Report,
) -> anyhow::Result<()> {
    let list = match &args.files_from {
        Some(from) => {
            let (from, null) = (from.clone(), args.null);
            Some(blocking(&mut interrupts, move || List::read(&from, null)).await??)
        }
        None => None,
    };
    // These say which of two files of one name is kept: both, or the later one.
    let clashes = matches!(
        args.transfer.if_exists,
        IfExistsArg::Overwrite | IfExistsArg::Rename
    );
    let asked = Asked {
        paths: &args.paths,
        list,
        list_is_stdin: args.files_from.as_deref() == Some(Path::new("-")),
        name: args.name.as_deref(),
        clashes,
        tree: &args.tree,
        every_dir: args.transfer.preserve,
    };
    let plan = Plan::new(&asked, |remote, local, error| {
        report.failed(remote, &local.display().to_string(), &error);
    })?;
    report.expect(plan.files);
    if !clashes {
        let plan = plan.clone();
        let clash = blocking(&mut interrupts, move || plan.clash()).await?;
        if let Some((first, second, name)) = clash {
            let text = format!(
                "{} and {} would both be stored as {name}",
                first.display(),
                second.display()
            );
            return Err(Failure::new(Kind::Usage, text)
                .hint("send them one by one with --as NAME, or keep both with --if-exists rename")
                .into());
        }
    }
    if plan.is_empty() {
        return nothing(args, report);
    }
    let target = Target::find(&args.connect)?;
    if args.dry_run {
        target
            .run_link_aloud(
                retry(args.transfer.retries),
                &mut interrupts,
                async |link| dry::run(args, console, &Remote::new(&link), plan, report).await,
            )
            .await?;
        return nothing(args, report);
    }
    report.start(&target.address(), plan.bytes);
    target
        .run_link(
            retry(args.transfer.retries),
            &mut interrupts,
            async |link| {
                let mut uploader = Uploader::new(&link)
                    .if_exists(args.transfer.if_exists.into())
                    .preserve(args.transfer.preserve)
                    .umask(Some(umask()))
                    .resume(!args.no_resume);
                if let Some(jobs) = args.transfer.jobs {
                    uploader = uploader.lanes(jobs.into());
                }
                if let Some(rate) = args.transfer.bwlimit.up {
                    uploader = uploader.limit(Limiter::new(rate));
                }
                let mut meter = Meter::new(args.show.progress, args.log.quiet, console);
                report.connected(&link, &mut meter);
                let origins = Origins::default();
                let upload = uploader.put(sources(plan, args.allow_empty, &origins));
                report
                    .follow(Transfer::Up(upload), None, &origins, &mut meter)
                    .await;
                nothing(args, report)
            },
        )
        .await
}

/// Runs blocking work while waiting for an interrupt.
async fn blocking<T: Send + 'static>(
    interrupts: &mut Interrupts,
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<T> {
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => done.context("looking through the files failed"),
        () = interrupts.first() => Err(Failure::interrupted().into()),
    }
}

/// Fails a run that found nothing to do.
fn nothing(args: &PutArgs, report: &Report) -> anyhow::Result<()> {
    if args.allow_empty || !report.is_empty() {
        return Ok(());
    }
    let text = match (&args.files_from, args.paths.is_empty()) {
        (Some(list), true) => format!("nothing to send: no path in {}", list.display()),
        _ => "nothing to send: no file was found".to_owned(),
    };
    Err(Failure::new(Kind::LocalFile, text)
        .hint("check the paths, the list and --exclude; with --allow-empty this is no error")
        .into())
}

/// Standard input, which gives an error in place of an end before the first byte unless that is allowed.
struct Stdin {
    /// Its end is sound.
    allowed: bool,
}

impl Read for Stdin {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = io::stdin().read(buffer)?;
        if count == 0 && !buffer.is_empty() && !self.allowed {
            return Err(io::Error::other(EmptyStdin));
        }
        self.allowed = true;
        Ok(count)
    }
}

pub(super) fn thing(found: &Found) -> Thing {
    match &found.what {
        What::Dir { .. } => Thing::Dir,
        What::Link { .. } => Thing::Link,
        _ => Thing::File,
    }
}

/// Everything to send. What is known of it beyond what the upload needs goes into `origins`.
fn sources(
    mut plan: Plan,
    allow_empty: bool,
    origins: &Origins,
) -> impl Iterator<Item = Source> + Send + 'static {
    let stdin = plan.stdin.take().map(|name| {
        let origin = Origin {
            shown: "-".to_owned(),
            what: Thing::File,
        };
        let allowed = allow_empty;
        let dirs = vec![0o777; name.parents().count()];
        (Source::reader(Stdin { allowed }, name).dirs(dirs), origin)
    });
    let walked = plan.walk().map(|found| {
        let origin = Origin {
            shown: found.local.display().to_string(),
            what: thing(&found),
        };
        (Source::from(found), origin)
    });
    let origins = origins.clone();
    stdin
        .into_iter()
        .chain(walked)
        .enumerate()
        .map(move |(index, (source, origin))| {
            origins.insert(index, origin);
            source
        })
}
