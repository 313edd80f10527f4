//! `put`: uploads files and directories.

use udpack::CloseCode;
use udpack_transfer::{Limiter, Source, Uploader, What};

use super::plan::{Asked, Plan};
use super::report::{Origin, Origins, Report, Thing, Transfer};
use crate::args::PutArgs;
use crate::logging::Console;
use crate::output;
use crate::progress::Meter;
use crate::signals::Interrupts;
use crate::target::{Target, retry};

pub(super) async fn run(
    args: PutArgs,
    console: &Console,
    interrupts: Interrupts,
) -> anyhow::Result<()> {
    let mut report = Report::new(console, args.show.json, args.log.quiet, "stored");
    let result = put(&args, console, interrupts, &mut report).await;
    report.finish(result)
}

async fn put(
    args: &PutArgs,
    console: &Console,
    mut interrupts: Interrupts,
    report: &mut Report,
) -> anyhow::Result<()> {
    let asked = Asked {
        paths: &args.paths,
        files_from: args.files_from.as_deref(),
        name: args.name.as_deref(),
        tree: &args.tree,
        every_dir: args.transfer.preserve,
    };
    let plan = Plan::new(&asked, |remote, local, error| {
        report.failed(remote, &local.display().to_string(), &error);
    })?;
    report.expect(plan.files);
    if args.dry_run {
        show(plan, report);
        return Ok(());
    }
    if plan.is_empty() {
        return Ok(());
    }
    let target = Target::find(&args.connect)?;
    report.start(&target.address(), plan.bytes);
    target
        .run_link(
            retry(args.transfer.retries),
            &mut interrupts,
            async |link| {
                let mut uploader = Uploader::new(&link)
                    .if_exists(args.transfer.if_exists.into())
                    .preserve(args.transfer.preserve)
                    .resume(!args.no_resume);
                if let Some(jobs) = args.transfer.jobs {
                    uploader = uploader.lanes(jobs.into());
                }
                if let Some(rate) = args.transfer.bwlimit.up {
                    uploader = uploader.limit(Limiter::new(rate));
                }
                let mut meter = Meter::new(args.show.progress, args.log.quiet, console);
                let origins = Origins::default();
                let upload = uploader.put(sources(plan, &origins));
                report
                    .follow(Transfer::Up(upload), None, &origins, &mut meter)
                    .await;
                // Every file has its outcome: there is nothing to take leave for, which takes two round trips.
                // The last of them may be here before the word that the server has let us in.
                if let Some(socket) = link.live()
                    && socket.admitted().await.is_ok()
                {
                    socket.abort(CloseCode::NORMAL, "done");
                    socket.closed().await;
                }
                Ok(())
            },
        )
        .await
}

/// Everything to send. What is known of it beyond what the upload needs goes into `origins`.
fn sources(mut plan: Plan, origins: &Origins) -> impl Iterator<Item = Source> + Send + 'static {
    let stdin = plan.stdin.take().map(|name| {
        let origin = Origin {
            shown: "-".to_owned(),
            what: Thing::File,
        };
        (Source::reader(std::io::stdin(), name), origin)
    });
    let walked = plan.walk().map(|found| {
        let origin = Origin {
            shown: found.local.display().to_string(),
            what: match &found.what {
                What::Dir { .. } => Thing::Dir,
                What::Link { .. } => Thing::Link,
                _ => Thing::File,
            },
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

/// What would be sent, and what could not be.
fn show(mut plan: Plan, report: &mut Report) {
    if let Some(name) = plan.stdin.take() {
        report.line(&format!("{}  -  -", output::printable(name.as_str())));
    }
    for found in plan.walk() {
        let remote = output::printable(&found.remote);
        match found.what {
            What::File { size, .. } => report.line(&format!("{remote}  {size}  -")),
            What::Dir { .. } => report.line(&format!("{remote}/  -  -")),
            What::Failed(error) => {
                let local = found.local.display().to_string();
                report.failed(&found.remote, &local, &error.into());
            }
            _ => report.line(&format!("{remote}  -  -")),
        }
    }
}
