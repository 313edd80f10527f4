//! `jobs`: the transfers under way at a server.

use std::time::Duration;

use serde_json::json;
use udpack_transfer::{Job, JobKind, JobState, Jobs, JobsEvent, Phase, Remote, TransferError};

use super::verify::existing;
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
                if existing(jobs.cancel(id, args.reason.as_deref()).await)?.is_none() {
                    let text = format!("no transfer {id} is under way at the server");
                    return Err(Failure::new(Kind::NotFound, text)
                        .hint("`udpack-client jobs` lists those that are")
                        .into());
                }
                return output::unless_gone(if args.json {
                    output::json(&json!({ "event": "cancelled", "cancelled": id }))
                } else {
                    output::line(&format!("cancelled {id}"))
                });
            }
            // Those that ended follow the list, if the server remembers any.
            let mut listed = false;
            while let Some(event) = more(&mut jobs, listed && !args.watch).await {
                let changed = match event? {
                    JobsEvent::List(all) => {
                        if all.is_empty() && !args.json {
                            console.note("no transfer is under way");
                        }
                        all
                    }
                    JobsEvent::Ended(all) if args.ended => all,
                    JobsEvent::Changed(job) => vec![job],
                    _ => continue,
                };
                for job in &changed {
                    let written = show(job, args.json);
                    *count += 1;
                    if !output::goes_on(written)? {
                        return Ok(());
                    }
                }
                if !args.watch && (listed || !args.ended) {
                    break;
                }
                listed = true;
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

/// What the server tells next, or only what it has told already.
async fn more(jobs: &mut Jobs, told: bool) -> Option<Result<JobsEvent, TransferError>> {
    match told {
        // What came with the list is there.
        true => tokio::time::timeout(Duration::ZERO, jobs.next())
            .await
            .ok()
            .flatten()
            .filter(|event| !matches!(event, Ok(JobsEvent::Changed(_)))),
        false => jobs.next().await,
    }
}

pub(super) fn is_interrupt(error: &anyhow::Error) -> bool {
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
            "phase": job.phase.map(Phase::as_str),
            "rate": job.rate,
            "stalled": job.stalled,
            "eta": job.eta().map(|eta| eta.as_secs_f64()),
            "code": job.code,
            "text": job.text,
            "secs": job.elapsed.as_secs_f64(),
            "ago": job.ago.map(|ago| ago.as_secs_f64()),
        }));
    }
    let share = match job.size {
        Some(total) => format!("{} % of {}", percent(job.bytes, total), size(total as f64)),
        None => size(job.bytes as f64),
    };
    let state = match job.phase {
        _ if job.stalled => "stalled",
        Some(phase) => phase.as_str(),
        None => state,
    };
    let why = match (&job.text, &job.code) {
        (Some(text), _) => format!(" ({})", output::printable(text)),
        (None, Some(code)) => format!(" ({})", output::printable(code)),
        (None, None) => String::new(),
    };
    let pace = match job.eta() {
        Some(eta) => format!(", {}/s, eta {}", size(job.rate as f64), duration(eta)),
        None => String::new(),
    };
    // The path comes last: it may hold spaces.
    output::line(&format!(
        "{}  {kind}  {state}{why}  {share}{pace}  {}  {}  {}",
        job.id,
        duration(job.elapsed),
        output::printable(&job.peer),
        output::printable(&job.path)
    ))
}
