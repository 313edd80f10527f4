//! `jobs`: the transfers under way at a server.

use serde_json::json;
use udpack_transfer::{Job, JobKind, JobState, JobsEvent, Remote};

use crate::args::JobsArgs;
use crate::exit::{Failure, Kind};
use crate::output;
use crate::progress::{duration, percent, size};
use crate::signals::Interrupts;
use crate::target::{Target, retry};

pub(super) async fn run(args: JobsArgs, mut interrupts: Interrupts) -> anyhow::Result<()> {
    let target = Target::find(&args.connect)?;
    let result = target
        .run_link(retry(None), &mut interrupts, async |link| {
            let mut jobs = Remote::new(&link).jobs();
            if let Some(id) = args.cancel {
                jobs.cancel(id).await?;
                return output::unless_gone(if args.json {
                    output::json(&json!({ "cancelled": id }))
                } else {
                    output::line(&format!("cancelled {id}"))
                });
            }
            while let Some(event) = jobs.next().await {
                let changed = match event? {
                    JobsEvent::List(all) => all,
                    JobsEvent::Changed(job) => vec![job],
                    _ => continue,
                };
                for job in &changed {
                    let written = show(job, args.json);
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
        // An interrupt is how one stops watching.
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
