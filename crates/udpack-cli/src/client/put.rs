//! `put`: uploads files and directories.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::Context as _;
use udpack_transfer::{Found, Link, Remote, Source, TransferError, What};

use super::dry;
use super::follow::Follow;
use super::plan::{Asked, List, Plan, remote_name};
use super::producer::Producer;
use super::report::{Origin, Origins, Report, Thing, Transfer};
use crate::args::{IfExistsArg, PutArgs, TornArg, WrittenArg};
use crate::exit::{Failure, Kind};
use crate::logging::Console;
use crate::progress::Meter;
use crate::signals::Interrupts;
use crate::target::{Target, retry};

pub(super) async fn run(
    args: PutArgs,
    console: &Console,
    interrupts: Interrupts,
) -> anyhow::Result<()> {
    let mut report = Report::new(console, args.show.json, &args.connect.log);
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
    // These policies say which of two files of one name is kept: both, or the later one.
    let clashes = matches!(
        args.transfer.if_exists,
        IfExistsArg::Overwrite | IfExistsArg::Rename
    );
    let instead = match (&args.from_command, &args.follow) {
        (Some(_), _) => Some("what a command writes"),
        (_, Some(_)) => Some("a file that grows"),
        _ => None,
    };
    // It is read once, like standard input, but it has a name.
    let name = match &args.follow {
        Some(path) => Some(remote_name(path, args.name.as_deref())),
        None => args.name.clone(),
    };
    let growing = match &args.follow {
        Some(path) => Some(Follow::open(path, args.until).map_err(|source| {
            let path = path.clone();
            TransferError::Source { path, source }
        })?),
        None => None,
    };
    let asked = Asked {
        paths: &args.paths,
        list,
        list_is_stdin: args.files_from.as_deref() == Some(Path::new("-")),
        instead,
        name: name.as_deref(),
        clashes,
        tree: &args.tree,
        every_dir: args.transfer.preserve,
        mapped: args.names == WrittenArg::Mapped,
    };
    let plan = Plan::new(&asked, |remote, local, error| {
        report.failed(remote, &local.display().to_string(), &error);
    })?;
    if plan.stdin.is_none() && (args.size.is_some() || args.require_eof_marker.is_some()) {
        let text = "--size and --require-eof-marker are about standard input, or --from-command";
        return Err(Failure::new(Kind::Usage, text)
            .hint("name `-` as the path, or leave them out")
            .into());
    }
    report.expect(plan.files);
    if !clashes {
        check_clashes(&plan, &mut interrupts).await?;
    }
    if plan.is_empty() {
        return nothing(args, report);
    }
    let target = Target::find(&args.connect)?.via(&args.transfer.paths)?;
    let tries = retry(args.transfer.pace.retries);
    if args.dry_run {
        let work = async |link| dry::run(args, console, &Remote::new(&link), plan, report).await;
        target.run_link_aloud(tries, &mut interrupts, work).await?;
        return nothing(args, report);
    }
    report.start(&target.address(), plan.bytes);
    let work = async |link| {
        upload(args, console, &link, plan, growing, report).await;
        nothing(args, report)
    };
    target.run_link(tries, &mut interrupts, work).await
}

async fn upload(
    args: &PutArgs,
    console: &Console,
    link: &Link,
    plan: Plan,
    growing: Option<Follow>,
    report: &mut Report,
) {
    let transfer = &args.transfer;
    let uploader = transfer.pace.uploader(link);
    let uploader = uploader
        .if_exists(transfer.if_exists.into())
        .preserve(transfer.preserve)
        .xattrs(transfer.keep.xattrs())
        .delta(args.delta.into())
        .may_tear(args.changed == TornArg::Warn)
        .resume(!args.no_resume);
    let mut meter = Meter::new(args.show.progress, console);
    report.connected(link, &mut meter);
    let origins = Origins::default();
    let upload = uploader.put(sources(plan, args, growing, &origins));
    report
        .follow(Transfer::Up(upload), None, &origins, &mut meter)
        .await;
}

/// Fails if two files would get the same name at the server.
async fn check_clashes(plan: &Plan, interrupts: &mut Interrupts) -> anyhow::Result<()> {
    let plan = plan.clone();
    let clash = blocking(interrupts, move || plan.clash()).await?;
    let Some((first, second, name)) = clash else {
        return Ok(());
    };
    let (first, second) = (first.display(), second.display());
    let text = format!("{first} and {second} would both be stored as {name}");
    Err(Failure::new(Kind::Usage, text)
        .hint("send them one by one with --as NAME, or keep both with --if-exists rename")
        .into())
}

/// Runs blocking work, and waits for an interrupt meanwhile.
async fn blocking<T: Send + 'static>(
    interrupts: &mut Interrupts,
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<T> {
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => done.context("looking through the files failed"),
        () = interrupts.first() => Err(Failure::interrupted().into()),
    }
}

/// Fails a run that had nothing to send.
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

pub(super) fn thing(found: &Found) -> Thing {
    match &found.what {
        What::Dir { .. } => Thing::Dir,
        What::Link { .. } => Thing::Link,
        _ => Thing::File,
    }
}

/// Collects everything to send. `origins` receives what the report needs to know about each file.
fn sources(
    mut plan: Plan,
    args: &PutArgs,
    growing: Option<Follow>,
    origins: &Origins,
) -> impl Iterator<Item = Source> + Send + 'static + use<> {
    let stdin = plan.stdin.take().map(|name| {
        let (mut producer, shown) = match (&args.from_command, growing) {
            (Some(line), _) => (Producer::command(line), line.clone()),
            (None, Some(file)) => {
                let shown = args.follow.as_deref().unwrap_or_else(|| Path::new("-"));
                (Producer::growing(file), shown.display().to_string())
            }
            (None, None) => (Producer::stdin(), "-".to_owned()),
        };
        producer.allow_empty = args.allow_empty;
        producer.size = args.size;
        let marker = args.require_eof_marker.as_ref();
        producer.marker = marker.map(|marker| marker.as_bytes().to_vec());
        let dirs = vec![0o777; name.parents().count()];
        let source = match (args.no_resume, &args.follow) {
            (true, _) => Source::reader(producer, name),
            // It begins in each run as it did in the one before, unless it is another file.
            (false, Some(_)) => Source::growing(producer, args.spool, name),
            (false, None) => Source::spooled(producer, args.spool, name),
        };
        let what = Thing::File;
        (source.dirs(dirs), Origin { shown, what })
    });
    let walked = plan.walk().map(|found| {
        let origin = Origin {
            shown: found.local.display().to_string(),
            what: thing(&found),
        };
        (Source::from(found), origin)
    });
    origins.of(stdin.into_iter().chain(walked))
}
