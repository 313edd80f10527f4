//! What was measured, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::thread;

use anyhow::Context;
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{Arm, Load, Metric, Scenario};
use crate::stats::{median, rank, ratio};

/// What was built in.
const LOCK: &str = include_str!("../../../Cargo.lock");
const PACKAGES: [&str; 8] = [
    "udpack",
    "quinn",
    "quinn-proto",
    "quinn-udp",
    "rustls",
    "aws-lc-rs",
    "tokio",
    "tokio-tungstenite",
];

/// Where it was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    cores: usize,
    cpu: String,
    kernel: String,
    versions: BTreeMap<&'static str, String>,
}

impl Machine {
    pub(crate) fn here() -> anyhow::Result<Self> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("no kernel")?;
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpus
            .lines()
            .find_map(|line| line.strip_prefix("model name"));
        let cpu = cpu.map_or("unknown", |cpu| cpu.trim_start_matches([' ', '\t', ':']));
        Ok(Self {
            cores: thread::available_parallelism()?.get(),
            cpu: cpu.to_owned(),
            kernel: kernel.trim().to_owned(),
            versions: PACKAGES.into_iter().filter_map(version).collect(),
        })
    }
}

/// The version of a package that this was built with.
fn version(package: &'static str) -> Option<(&'static str, String)> {
    let mut lines = LOCK.lines();
    lines.find(|line| line.strip_prefix("name = ") == Some(&format!("\"{package}\"")))?;
    let version = lines.next()?.strip_prefix("version = ")?;
    Some((package, version.trim_matches('"').to_owned()))
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} cores ({}), Linux {}",
            self.cores, self.cpu, self.kernel
        )?;
        for (package, version) in &self.versions {
            write!(f, ", {package} {version}")?;
        }
        Ok(())
    }
}

/// One turn of an arm.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    pub(crate) values: BTreeMap<String, f64>,
    /// Packets that the client took for lost.
    pub(crate) lost: Option<u64>,
    /// Seconds of processor time of both sides, from their start to their end.
    pub(crate) cpu: f64,
}

/// All turns of all arms of one scenario.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) scenario: Scenario,
    pub(crate) load: Load,
    pub(crate) runs: Vec<(Arm, Vec<Run>)>,
}

/// One line of a table.
#[derive(Debug, Serialize)]
struct Line {
    min: f64,
    median: f64,
    max: f64,
    to_quinn: Option<f64>,
    to_tuned: Option<f64>,
}

impl Outcome {
    fn values(&self, arm: Arm, metric: &Metric) -> Vec<f64> {
        let runs = self.runs.iter().find(|(this, _)| *this == arm);
        let values = runs.into_iter().flat_map(|(_, runs)| runs);
        values
            .filter_map(|run| run.values.get(metric.name).copied())
            .collect()
    }

    fn line(&self, arm: Arm, metric: &Metric) -> Line {
        let values = self.values(arm, metric);
        let to = |base: Arm| {
            let base = self.values(base, metric);
            (!base.is_empty()).then(|| ratio(&values, &base))
        };
        Line {
            min: rank(&values, 0.0),
            median: median(&values),
            max: rank(&values, 1.0),
            to_quinn: to(Arm::Quinn),
            to_tuned: to(Arm::Tuned),
        }
    }

    /// Processor seconds for each unit of work, the median of the rounds.
    fn cpu(&self, runs: &[Run]) -> f64 {
        let (_, work) = self.scenario.work(&self.load);
        median(&runs.iter().map(|run| run.cpu / work).collect::<Vec<_>>())
    }

    /// Packets lost in a run, the median of the rounds.
    fn lost(runs: &[Run]) -> Option<f64> {
        let lost: Option<Vec<f64>> = runs.iter().map(|run| run.lost.map(|n| n as f64)).collect();
        lost.map(|lost| median(&lost))
    }

    /// Everything that is in the table, and every value it comes from.
    pub(crate) fn json(&self) -> Value {
        let metrics = self.scenario.metrics();
        let arms: BTreeMap<&str, Value> = self
            .runs
            .iter()
            .map(|(arm, runs)| {
                let lines: BTreeMap<&str, Line> = metrics
                    .iter()
                    .map(|metric| (metric.name, self.line(*arm, metric)))
                    .collect();
                let of_arm = json!({
                    "summary": lines,
                    "cpu_per_work": self.cpu(runs),
                    "lost": Self::lost(runs),
                    "runs": runs,
                });
                (arm.name(), of_arm)
            })
            .collect();
        let (work, amount) = self.scenario.work(&self.load);
        json!({
            "scenario": self.scenario,
            "load": self.load,
            "metrics": metrics,
            "work": { "unit": work, "amount": amount },
            "arms": arms,
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (work, _) = self.scenario.work(&self.load);
        writeln!(f, "{}", self.scenario.said(&self.load))?;
        writeln!(
            f,
            "  {:<16} {:<11} {:>11} {:>11} {:>11} {:<11} {:>8} {:>8}",
            "", "arm", "min", "median", "max", "unit", "x quinn", "x tuned"
        )?;
        for metric in self.scenario.metrics() {
            for (arm, _) in &self.runs {
                let line = self.line(*arm, metric);
                writeln!(
                    f,
                    "  {:<16} {:<11} {:>11} {:>11} {:>11} {:<11} {:>8} {:>8}",
                    metric.name,
                    arm.name(),
                    figure(line.min),
                    figure(line.median),
                    figure(line.max),
                    metric.unit,
                    multiple(line.to_quinn),
                    multiple(line.to_tuned),
                )?;
            }
        }
        for (arm, runs) in &self.runs {
            let lost = Self::lost(runs).map_or_else(|| "unknown".to_owned(), figure);
            writeln!(
                f,
                "  {:<16} {:<11} {:>8.3} CPU s per {work}, packets lost {lost}",
                "cost",
                arm.name(),
                self.cpu(runs),
            )?;
        }
        Ok(())
    }
}

/// A number with as many digits as it is worth.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

fn multiple(value: Option<f64>) -> String {
    value.map_or_else(String::new, |value| format!("{value:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_what_it_was_built_with() {
        for package in PACKAGES {
            assert!(version(package).is_some(), "{package}");
        }
    }

    #[test]
    fn a_table_compares_each_arm_with_raw_quinn() {
        let run = |rate: f64| Run {
            values: BTreeMap::from([("rate".to_owned(), rate)]),
            lost: Some(3),
            cpu: 2.0,
        };
        let load = Load {
            bytes: 2 << 30,
            sockets: 1,
            count: 1,
            seconds: 1.0,
            workers: None,
        };
        let outcome = Outcome {
            scenario: Scenario::Stream,
            load,
            runs: vec![
                (Arm::Udpack, vec![run(900.0), run(500.0), run(1000.0)]),
                (Arm::Quinn, vec![run(450.0), run(400.0), run(400.0)]),
            ],
        };
        let json = outcome.json();
        let ours = &json["arms"]["udpack"];
        assert_eq!(ours["summary"]["rate"]["median"], 900.0);
        assert_eq!(ours["summary"]["rate"]["to_quinn"], 2.0);
        assert_eq!(ours["summary"]["rate"]["to_tuned"], Value::Null);
        assert_eq!(ours["cpu_per_work"], 1.0);
        assert_eq!(ours["lost"], 3.0);
        assert_eq!(ours["runs"][1]["values"]["rate"], 500.0);
        let table = outcome.to_string();
        assert!(table.contains("2.00"), "{table}");
    }
}
