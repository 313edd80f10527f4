//! How what udpack needs grows with the number of its sockets: the same measurements with few of them and with many.

use std::env;

use clap::Args;
use serde_json::{Value, json};

use crate::args::{Arm, Asked, Options as Run, Scenario, at_least_one, seconds};
use crate::chart::figure;
use crate::driver::measure;
use crate::report::{Machine, Outcome};
use crate::stats::median;

#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Sockets at once, from few to many
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000, 10_000], value_parser = at_least_one)]
    sockets: Vec<usize>,
    /// Rounds of each, after one that does not count
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds in which nothing happens, for the processor time of keep-alives
    #[arg(long, default_value_t = 20.0, value_parser = seconds)]
    seconds: f64,
    /// Messages, and requests, over all sockets together
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// Print one JSON object with all values instead of a table
    #[arg(long)]
    json: bool,
}

/// What is measured: by which scenario, under which name, in which unit.
const ROWS: [(Scenario, &str, &str); 6] = [
    (Scenario::Idle, "server heap", "kB a socket"),
    (Scenario::Idle, "server RSS", "kB a socket"),
    (Scenario::Idle, "server idle CPU", "% of a core"),
    (Scenario::Idle, "connects", "/s"),
    (Scenario::Messages, "rate", "messages/s"),
    (Scenario::Ping, "rate", "replies/s"),
];

/// Measures with each number of sockets, and prints what grew how.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let machine = Machine::here()?;
    // By number of sockets, then by scenario.
    let mut sizes: Vec<Vec<Outcome>> = Vec::new();
    for &sockets in &options.sockets {
        let asked = Asked {
            bytes: None,
            sockets: Some(sockets),
            count: Some(options.count),
            seconds: Some(options.seconds),
            workers: None,
        };
        let run = Run::alone(Arm::Udpack, options.rounds, asked);
        let scenarios = [Scenario::Idle, Scenario::Messages, Scenario::Ping].into_iter();
        let outcomes = scenarios.map(|scenario| measure(scenario, scenario.load(&run.asked), &run));
        sizes.push(outcomes.collect::<anyhow::Result<_>>()?);
    }
    let rows = ROWS.map(|(scenario, name, unit)| {
        let values = sizes
            .iter()
            .map(|outcomes| values(outcomes, scenario, name));
        (scenario, name, unit, values.collect::<Vec<_>>())
    });
    if options.json {
        let rows = rows.map(|(scenario, name, unit, values)| -> Value {
            json!({ "scenario": scenario, "name": name, "unit": unit, "values": values })
        });
        let result = json!({
            "machine": machine,
            "command": env::args().collect::<Vec<_>>(),
            "sockets": options.sockets,
            "rows": rows,
        });
        println!("{result}");
        return Ok(());
    }
    println!("{machine}\n");
    print!("{:<42}", "sockets");
    for sockets in &options.sockets {
        print!("{sockets:>12}");
    }
    println!("{:>8}", "last");
    for (scenario, name, unit, values) in rows {
        print!("{:<42}", format!("{}: {name}, {unit}", scenario.name()));
        let medians: Vec<f64> = values.iter().map(|values| median(values)).collect();
        for value in &medians {
            print!("{:>12}", figure(*value));
        }
        println!("{:>6} x", figure(growth(&medians)));
    }
    Ok(())
}

/// How many times the first value the last one is.
pub(crate) fn growth(medians: &[f64]) -> f64 {
    match (medians.first(), medians.last()) {
        (Some(first), Some(last)) => last / first,
        _ => f64::NAN,
    }
}

/// What the rounds of a scenario told.
fn values(outcomes: &[Outcome], scenario: Scenario, name: &str) -> Vec<f64> {
    let outcome = outcomes.iter().find(|outcome| outcome.scenario == scenario);
    let runs = outcome.into_iter().flat_map(|outcome| &outcome.runs);
    let runs = runs.flat_map(|(_, runs)| runs);
    runs.filter_map(|run| run.values.get(name).copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_from_the_first_to_the_last() {
        assert_eq!(growth(&[2.0, 9.0, 3.0]), 1.5);
        assert!(growth(&[]).is_nan());
    }
}
