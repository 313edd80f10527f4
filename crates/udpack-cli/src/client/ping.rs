//! `ping`: round trips through both event loops, not only through the network.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use crate::args::PingArgs;
use crate::exit::Explained;
use crate::hub::PING;
use crate::json::Ended;
use crate::output;
use crate::signals::Interrupts;
use crate::target::{Target, retry};
use crate::value::Value;

#[derive(Debug, Default)]
struct Times {
    count: u32,
    sum: Duration,
    min: Option<Duration>,
    max: Duration,
}

impl Times {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.sum += time;
        self.min = Some(self.min.map_or(time, |min| min.min(time)));
        self.max = self.max.max(time);
    }
}

/// The line `result`.
#[derive(Serialize)]
struct Pinged<'a> {
    event: &'static str,
    #[serde(flatten)]
    ended: Ended<'a>,
    count: u32,
    /// Milliseconds.
    min: Option<f64>,
    avg: Option<f64>,
    max: Option<f64>,
    transport: Option<&'a str>,
    transport_reason: Option<&'a str>,
}

pub(super) async fn run(args: PingArgs, interrupts: Interrupts) -> anyhow::Result<()> {
    let mut times = Times::default();
    let mut over = None;
    let result = ping(&args, interrupts, &mut times, &mut over).await;
    let shown = times
        .min
        .map(|min| (ms(min), ms(times.sum / times.count), ms(times.max)));
    if args.json {
        let error = result.as_ref().err().map(Explained::of);
        output::unless_gone(output::json(&Pinged {
            event: "result",
            ended: Ended::with(error.as_ref()),
            count: times.count,
            min: shown.map(|(min, _, _)| min),
            avg: shown.map(|(_, avg, _)| avg),
            max: shown.map(|(_, _, max)| max),
            transport: over.as_ref().map(|(name, _)| *name),
            transport_reason: over.as_ref().map(|(_, why)| &**why),
        }))?;
    } else if let Some((min, avg, max)) = shown {
        let mut line = format!("min/avg/max  {min:.3}/{avg:.3}/{max:.3} ms");
        if let Some((name, why)) = over {
            line.push_str(&format!(" over {name}: {why}"));
        }
        output::unless_gone(output::line(&line))?;
    }
    result
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

async fn ping(
    args: &PingArgs,
    mut interrupts: Interrupts,
    times: &mut Times,
    over: &mut Option<(&'static str, String)>,
) -> anyhow::Result<()> {
    let target = Target::find_reconnecting(&args.connect, retry(None))?;
    target
        .run(&mut interrupts, async |socket| {
            let channel = socket.channel(PING).resumable().open().await?;
            let mut ticks = tokio::time::interval(args.interval.0);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut number: u64 = 0;
            while args.count == 0 || number < args.count {
                ticks.tick().await;
                number += 1;
                let began = Instant::now();
                let _: Value = channel.request("ping", &number).await?;
                let time = began.elapsed();
                times.add(time);
                let why = socket.transport_reason();
                *over = why.map(|why| (socket.transport().name(), why.to_string()));
                let written = if args.json {
                    output::json(&json!({ "event": "pong", "number": number, "ms": ms(time) }))
                } else {
                    output::line(&format!("pong {number}  {:.3} ms", ms(time)))
                };
                if !output::goes_on(written)? {
                    break;
                }
            }
            Ok(())
        })
        .await
}
