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

/// Measured round trips.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Trips {
    pub(super) sent: u32,
    pub(super) came: u32,
    pub(super) min: Duration,
    pub(super) sum: Duration,
    pub(super) max: Duration,
}

impl Trips {
    /// Adds one: `None` if nothing came back.
    pub(super) fn add(&mut self, trip: Option<Duration>) {
        self.sent += 1;
        let Some(trip) = trip else {
            return;
        };
        self.min = match self.came {
            0 => trip,
            _ => self.min.min(trip),
        };
        self.came += 1;
        self.sum += trip;
        self.max = self.max.max(trip);
    }

    /// The share of lost round trips, 0 to 1.
    pub(super) fn loss(&self) -> f64 {
        f64::from(self.sent - self.came) / f64::from(self.sent.max(1))
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
    let mut trips = Trips::default();
    let mut over = None;
    let result = ping(&args, interrupts, &mut trips, &mut over).await;
    let shown = (trips.came > 0).then(|| {
        let average = trips.sum / trips.came;
        (ms(trips.min), ms(average), ms(trips.max))
    });
    if args.json {
        let error = result.as_ref().err().map(Explained::of);
        output::unless_gone(output::json(&Pinged {
            event: "result",
            ended: Ended::with(error.as_ref()),
            count: trips.came,
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
    trips: &mut Trips,
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
                trips.add(Some(time));
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
