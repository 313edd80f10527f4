//! `jobs`: the transfers under way at a server.

use serde_json::json;
use udpack_transfer::{Code, Job, JobKind, JobState, JobsEvent, Remote, TransferError};

use crate::args::JobsArgs;
use crate::exit::{Failure, Kind};
use crate::json::concluded;
use crate::logging::Console;
use crate::output;
use crate::progress::{duration, percent, size};
use crate::signals::Interrupts;
use crate::target::{Target, retry};

pub(super) async fn run(
    args: JobsArgs,
    console: &Console,
    interrupts: Interrupts,
) -> anyhow::Result<()> {
    let mut count = 0;
    let result = jobs(&args, console, interrupts, &mut count).await;
    concluded(args.json, count, result)
}

async fn jobs(
    args: &JobsArgs,
    console: &Console,
    mut interrupts: Interrupts,
    count: &mut usize,
) -> anyhow::Result<()> {
    let target = Target::find(&args.connect)?;
    let result = target
        .run_link_aloud(retry(None), &mut interrupts, async |link| {
            let mut jobs = Remote::new(&link).jobs();
            if let Some(id) = args.cancel {
                jobs.cancel(id, None).await.map_err(|error| match error {
                    TransferError::Refused {
                        code: Code::NotFound,
                        ..
                    } => {
                        let text = format!("no transfer {id} is under way at the server");
                        Failure::new(Kind::NotFound, text)
                            .hint("`udpack-client jobs` lists those that are")
                            .into()
                    }
                    error => anyhow::Error::new(error),
                })?;
                return output::unless_gone(if args.json {
                    output::json(&json!({ "event": "cancelled", "cancelled": id }))
                } else {
                    output::line(&format!("cancelled {id}"))
                });
            }
            while let Some(event) = jobs.next().await {
                let changed = match event? {
                    JobsEvent::List(all) => {
                        if all.is_empty() && !args.json && !args.log.quiet {
                            console.line("no transfer is under way");
                        }
                        all
                    }
                    JobsEvent::Changed(job) => vec![job],
                    _ => continue,
                };
                for job in &changed {
                    let written = show(job, args.json);
                    *count += 1;
                    if written.as_ref().is_err_and(output::is_gone) {
                        return Ok(());
                    }
                    output::unless_gone(written)?;
                }
                if !args.watch {
                    break;
                }
            }
            Ok(())
        })
        .await;
    match result {
        // An interrupt ends watching normally.
        Err(error) if args.watch && is_interrupt(&error) => Ok(()),
        result => result,
    }
}

fn is_interrupt(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Failure>()
        .is_some_and(|failure| failure.kind() == Kind::Interrupted)
}

fn show(job: &Job, json: bool) -> std::io::Result<()> {
    let kind = match job.kind {
        JobKind::Put => "put",
        JobKind::Get => "get",
        _ => "other",
    };
    let state = match job.state {
        JobState::Running => "running",
        JobState::Done => "done",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
        JobState::Suspended => "suspended",
        _ => "other",
    };
    if json {
        return output::json(&json!({
            "event": "job",
            "id": job.id,
            "kind": kind,
            "path": job.path,
            "peer": job.peer,
            "size": job.size,
            "bytes": job.bytes,
            "safe": job.safe,
            "state": state,
            "code": job.code,
            "secs": job.elapsed.as_secs_f64(),
        }));
    }
    let share = match job.size {
        Some(total) => format!("{} % of {}", percent(job.bytes, total), size(total as f64)),
        None => size(job.bytes as f64),
    };
    let why = match &job.code {
        Some(code) => format!(" ({})", output::printable(code)),
        None => String::new(),
    };
    // The path comes last: it may hold spaces.
    output::line(&format!(
        "{}  {kind}  {state}{why}  {share}  {}  {}  {}",
        job.id,
        duration(job.elapsed),
        output::printable(&job.peer),
        output::printable(&job.path)
    ))
}
