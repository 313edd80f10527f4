//! `stats`: the state of a server.

use std::io;
use std::time::Duration;

use serde_json::json;
use udpack_transfer::{
    ClusterStats, PushStats, QuotaStats, Remote, ServerStats, SocketStats, StatsWatch,
};

use super::jobs::is_interrupt;
use super::verify::existing;
use crate::args::StatsArgs;
use crate::exit::{Failure, Kind};
use crate::json::concluded;
use crate::output;
use crate::progress::{duration, percent, size};
use crate::signals::Interrupts;
use crate::target::{Target, retry};

pub(super) async fn run(args: StatsArgs, interrupts: Interrupts) -> anyhow::Result<()> {
    let mut count = 0;
    let result = stats(&args, interrupts, &mut count).await;
    concluded(args.json, count, result)
}

async fn stats(
    args: &StatsArgs,
    mut interrupts: Interrupts,
    count: &mut usize,
) -> anyhow::Result<()> {
    let target = Target::find(&args.connect)?;
    let result = target
        .run_link_aloud(retry(None), &mut interrupts, async |link| {
            let mut watch = Remote::new(&link).stats();
            if args.kick.is_some() || args.drain {
                return act(args, &mut watch).await;
            }
            while let Some(stats) = watch.next().await {
                let stats = stats?;
                *count += 1;
                let written = match (args.json, args.watch) {
                    (true, _) => output::json(&told(&stats)?),
                    (false, true) => output::line(&short(&stats)),
                    (false, false) => show(&stats),
                };
                if !output::goes_on(written)? {
                    return Ok(());
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

/// What an administrator wants done.
async fn act(args: &StatsArgs, watch: &mut StatsWatch) -> anyhow::Result<()> {
    let Some(id) = &args.kick else {
        watch.drain().await?;
        return output::unless_gone(if args.json {
            output::json(&json!({ "event": "draining" }))
        } else {
            output::line("the server is shutting down")
        });
    };
    if existing(watch.kick(id, args.reason.as_deref()).await)?.is_none() {
        let text = format!("no connection {} is there", output::printable(id));
        return Err(Failure::new(Kind::NotFound, text)
            .hint("`udpack-client stats` lists those that are")
            .into());
    }
    output::unless_gone(if args.json {
        output::json(&json!({ "event": "kicked", "kicked": id }))
    } else {
        output::line(&format!("closed {}", output::printable(id)))
    })
}

/// As the protocol has it, with the event that each line of JSON has.
fn told(stats: &ServerStats) -> anyhow::Result<serde_json::Value> {
    let mut told = serde_json::to_value(stats)?;
    if let Some(fields) = told.as_object_mut() {
        fields.insert("event".to_owned(), "stats".into());
    }
    Ok(told)
}

fn short(stats: &ServerStats) -> String {
    let jobs = &stats.jobs;
    let draining = if stats.draining { "  draining" } else { "" };
    format!(
        "in {}/s  out {}/s  uploads {}  downloads {}  stored {}  failed {}  connections {}{draining}",
        size(stats.receive_rate as f64),
        size(stats.send_rate as f64),
        jobs.puts,
        jobs.gets,
        stats.files,
        jobs.failed,
        stats.sockets_in_all,
    )
}

/// A label and its values a line; what there may be many of is indented below.
fn show(stats: &ServerStats) -> io::Result<()> {
    let jobs = &stats.jobs;
    let draining = if stats.draining {
        ", shutting down"
    } else {
        ""
    };
    output::line(&format!("uptime {}{draining}", time(stats.uptime)))?;
    for (label, all, rate) in [
        ("received", stats.received, stats.receive_rate),
        ("sent", stats.sent, stats.send_rate),
    ] {
        output::line(&format!("{label} {}, {}/s now", amount(all), amount(rate)))?;
    }
    output::line(&format!(
        "running {}, {}",
        output::counted(jobs.puts, "upload", "uploads"),
        output::counted(jobs.gets, "download", "downloads")
    ))?;
    output::line(&format!(
        "ended {} well, {} failed, {} cancelled, {} interrupted",
        jobs.done, jobs.failed, jobs.cancelled, jobs.suspended
    ))?;
    output::line(&format!(
        "stored {}, {}",
        output::counted(stats.files, "file", "files"),
        amount(stats.stored)
    ))?;
    if let Some(memory) = stats.memory {
        output::line(&format!("memory {}", amount(memory)))?;
    }
    if let (Some(free), Some(total)) = (stats.disk_free, stats.disk_total) {
        output::line(&format!("disk {} free of {}", amount(free), amount(total)))?;
    }
    stats.quotas.iter().try_for_each(show_quota)?;
    output::line(&format!("connections {}", stats.sockets_in_all))?;
    stats.sockets.iter().try_for_each(show_socket)?;
    if let Some(push) = &stats.push {
        show_push(push)?;
    }
    if let Some(cluster) = &stats.cluster {
        show_cluster(cluster)?;
    }
    output::line(&format!("rooms {}", stats.rooms_in_all))?;
    for room in &stats.rooms {
        let name = output::printable(&room.name);
        output::line(&format!("  {}  {name}", room.members))?;
    }
    Ok(())
}

fn amount(bytes: u64) -> String {
    size(bytes as f64)
}

fn time(secs: f64) -> String {
    duration(Duration::try_from_secs_f64(secs).unwrap_or_default())
}

fn show_quota(quota: &QuotaStats) -> io::Result<()> {
    let whose = quota
        .peer
        .as_deref()
        .map_or_else(|| "server".to_owned(), output::printable);
    let used = match quota.used {
        Some(used) => format!(
            "{} % of {}",
            percent(used, quota.quota),
            amount(quota.quota)
        ),
        None => format!("{}, not counted yet", amount(quota.quota)),
    };
    let prefix = quota.prefix.as_deref().map_or_else(String::new, |prefix| {
        format!("  {}", output::printable(prefix))
    });
    output::line(&format!("quota {whose}  {used}{prefix}"))
}

fn show_socket(socket: &SocketStats) -> io::Result<()> {
    let away = if socket.connected {
        ""
    } else {
        "  out of reach"
    };
    output::line(&format!(
        "  {}  {}  {}  {}  in {}  out {}  {:.1} ms  {}{away}  {}",
        socket.id,
        output::printable(&socket.peer),
        socket.transport,
        socket.address,
        amount(socket.received),
        amount(socket.sent),
        socket.rtt * 1000.0,
        time(socket.age),
        output::printable(&socket.agent),
    ))
}

fn show_push(push: &PushStats) -> io::Result<()> {
    output::line(&format!(
        "push {} waiting, {} pushed, {}, {} removed, {} attempts failed",
        push.waiting,
        push.files,
        amount(push.bytes),
        push.removed,
        push.failures
    ))?;
    if let Some(why) = &push.trouble {
        output::line(&format!("  paused  {why}"))?;
    }
    for moving in &push.moving {
        output::line(&format!(
            "  pushing  {} % of {}  {}",
            percent(moving.bytes, moving.size),
            amount(moving.size),
            output::printable(&moving.path)
        ))?;
    }
    for failed in &push.failed {
        let path = output::printable(&failed.path);
        output::line(&format!("  failed  {path}  {}", failed.text))?;
    }
    Ok(())
}

fn show_cluster(cluster: &ClusterStats) -> io::Result<()> {
    let state = if cluster.degraded { "  degraded" } else { "" };
    output::line(&format!("nodes {}{state}", 1 + cluster.nodes.len()))?;
    let here = (&cluster.own, "  this one");
    let others = cluster.nodes.iter().map(|node| (node, ""));
    for (node, here) in std::iter::once(here).chain(others) {
        let state = match node {
            _ if node.lost => "  lost",
            _ if node.draining => "  draining",
            _ if node.degraded => "  degraded",
            _ => "",
        };
        output::line(&format!(
            "  {}  {}  {}  connections {}  rooms {}  members {}{state}{here}",
            node.id,
            output::printable(&node.name),
            output::printable(&node.address),
            node.sockets,
            node.rooms,
            node.members,
        ))?;
    }
    Ok(())
}
