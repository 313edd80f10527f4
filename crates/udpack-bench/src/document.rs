//! Fills a document with results: each block between `<!-- results: NAME -->` and `<!-- end -->` becomes the table of
//! what `NAME` measured, and charts are drawn beside it. What has no results stays as it is.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use serde::Deserialize;
use serde_json::Value;

use crate::chart::{self, Bar, Group, Series, figure};
use crate::growth::growth;
use crate::stats::{median, rank, ratio};

const BEGIN: &str = "<!-- results: ";
const END: &str = "<!-- end -->";
const OURS: &str = "udpack";

#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Where the scripts of bench/ have put their results
    #[arg(default_value = "target/bench-results")]
    results: PathBuf,
    /// The document to fill; charts go into the directory `charts` beside it
    #[arg(long, default_value = "docs/BENCHMARKS.md")]
    document: PathBuf,
}

/// One run, as the scripts of `bench/` write it.
#[derive(Debug, Clone, Deserialize)]
struct Run {
    way: String,
    round: u64,
    unit: String,
    /// None: it failed.
    value: Option<f64>,
    #[serde(default)]
    lost: Option<f64>,
    #[serde(default)]
    link: Option<f64>,
    #[serde(default)]
    rate: Option<f64>,
    #[serde(default)]
    late: Option<f64>,
    #[serde(default)]
    late_share: Option<f64>,
    #[serde(default)]
    queue: Option<f64>,
    #[serde(default)]
    series: Vec<f64>,
    machine: Value,
}

/// Fills the document and draws the charts.
pub(crate) fn fill(options: &Options) -> anyhow::Result<()> {
    let results = &options.results;
    let text = fs::read_to_string(&options.document)
        .with_context(|| format!("cannot read {}", options.document.display()))?;
    let charts = options.document.with_file_name("charts");
    fs::create_dir_all(&charts)?;
    let filled = replace(&text, |name| {
        let made = block(results, &charts, name).with_context(|| name.to_owned())?;
        if made.is_none() {
            eprintln!("no results of {name} in {}", results.display());
        }
        Ok(made)
    })?;
    fs::write(&options.document, filled)?;
    Ok(())
}

/// Replaces what is between the marks by what `make` says, if it says something.
fn replace(
    text: &str,
    mut make: impl FnMut(&str) -> anyhow::Result<Option<String>>,
) -> anyhow::Result<String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let (name, after) = after.split_once(" -->\n").context("a mark has no end")?;
        let (old, after) = after
            .split_once(END)
            .with_context(|| format!("no end of {name}"))?;
        ensure!(!old.contains(BEGIN), "no end of {name}");
        let made = make(name)?;
        let body = made.as_deref().unwrap_or(old);
        let _ = write!(out, "{before}{BEGIN}{name} -->\n{body}{END}");
        rest = after;
    }
    Ok(out + rest)
}

/// The text of a block, its charts drawn; none without results.
fn block(results: &Path, charts: &Path, name: &str) -> anyhow::Result<Option<String>> {
    match name {
        _ if name.starts_with("bench-") => scenario(results, charts, name),
        "machine" => machine(results),
        "wan" => wan(results, charts),
        "fairness" => fairness(results, charts),
        "alone" => alone(results),
        "interference" => interference(results),
        "growth" => grown(results, charts),
        _ => {
            let Some(runs) = runs(&results.join(format!("{name}.jsonl")))? else {
                return Ok(None);
            };
            let group = group("", &runs);
            let unit = runs.first().map_or("", |run| run.unit.as_str());
            draw(charts, name, &chart::bars(title(name), unit, &[group]))?;
            Ok(Some(table(&runs) + &picture(name, title(name))))
        }
    }
}

fn draw(charts: &Path, name: &str, chart: &str) -> anyhow::Result<()> {
    let path = charts.join(name).with_added_extension("svg");
    fs::write(&path, chart).with_context(|| format!("cannot write {}", path.display()))
}

fn picture(name: &str, what: &str) -> String {
    format!("\n![{what}](charts/{name}.svg)\n")
}

/// The runs in a file of JSON lines; none if it is missing or empty.
fn runs(path: &Path) -> anyhow::Result<Option<Vec<Run>>> {
    let Ok(text) = fs::read_to_string(path) else {
        return Ok(None);
    };
    let runs: Vec<Run> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .with_context(|| path.display().to_string())?;
    Ok((!runs.is_empty()).then_some(runs))
}

/// What a program printed as JSON; none if it is missing.
fn printed(path: &Path) -> anyhow::Result<Option<Value>> {
    let Ok(text) = fs::read_to_string(path) else {
        return Ok(None);
    };
    let value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(Some(value))
}

/// The ways, in the order of their first turns.
fn ways(runs: &[Run]) -> Vec<&str> {
    let mut ways: Vec<&str> = Vec::new();
    for run in runs {
        if !ways.contains(&run.way.as_str()) {
            ways.push(&run.way);
        }
    }
    ways
}

fn of<'a>(runs: &'a [Run], way: &str) -> Vec<&'a Run> {
    runs.iter().filter(|run| run.way == way).collect()
}

fn each(runs: &[&Run], field: impl Fn(&Run) -> Option<f64>) -> Vec<f64> {
    runs.iter().filter_map(|run| field(run)).collect()
}

/// How many times as fast ours is, round by round.
fn against(runs: &[Run], way: &str) -> f64 {
    let by_round = |way: &str| -> BTreeMap<u64, f64> {
        let good = of(runs, way).into_iter();
        good.filter_map(|run| Some((run.round, run.value?)))
            .collect()
    };
    let (ours, theirs) = (by_round(OURS), by_round(way));
    let both: (Vec<f64>, Vec<f64>) = ours
        .iter()
        .filter_map(|(round, ours)| Some((*ours, *theirs.get(round)?)))
        .unzip();
    ratio(&both.0, &both.1)
}

fn group(heading: &str, runs: &[Run]) -> Group {
    let bars = ways(runs).into_iter().filter_map(|way| {
        let values = each(&of(runs, way), |run| run.value);
        (!values.is_empty()).then(|| bar(way, &values))
    });
    Group {
        heading: heading.to_owned(),
        bars: bars.collect(),
    }
}

fn bar(label: &str, values: &[f64]) -> Bar {
    Bar {
        label: label.to_owned(),
        min: rank(values, 0.0),
        median: median(values),
        max: rank(values, 1.0),
        ours: label == OURS,
    }
}

/// A number, or a dash where there is none.
fn cell(value: f64) -> String {
    if value.is_finite() {
        figure(value)
    } else {
        "–".to_owned()
    }
}

fn spread(values: &[f64]) -> String {
    if values.is_empty() {
        return "–".to_owned();
    }
    let [min, max] = [0.0, 1.0].map(|share| cell(rank(values, share)));
    format!("**{}** ({min}–{max})", cell(median(values)))
}

/// Runs that failed, of how many.
fn failures(runs: &[&Run]) -> String {
    let failed = runs.iter().filter(|run| run.value.is_none()).count();
    format!("{failed} of {}", runs.len())
}

fn table(runs: &[Run]) -> String {
    let unit = runs.first().map_or("", |run| run.unit.as_str());
    let mut out = format!(
        "| | {unit}: median (least–most) | udpack is | failed |\n| --- | --- | --- | --- |\n"
    );
    for way in ways(runs) {
        let these = of(runs, way);
        let values = each(&these, |run| run.value);
        let times = match way {
            OURS => String::new(),
            _ => format!("{} ×", cell(against(runs, way))),
        };
        let _ = writeln!(
            out,
            "| {way} | {} | {times} | {} |",
            spread(&values),
            failures(&these)
        );
    }
    out
}

/// All results whose names begin so, in the order of their names, without the beginning.
fn files(results: &Path, prefix: &str) -> anyhow::Result<Vec<(String, Vec<Run>)>> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(results) else {
        return Ok(found);
    };
    for entry in entries {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let case = name
            .strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix(".jsonl"));
        if let Some(case) = case
            && let Some(runs) = runs(&results.join(&*name))?
        {
            found.push((case.to_owned(), runs));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

fn wan(results: &Path, charts: &Path) -> anyhow::Result<Option<String>> {
    let cells = files(results, "wan-")?;
    if cells.is_empty() {
        return Ok(None);
    }
    let mut out = String::new();
    let mut groups = Vec::new();
    for (name, runs) in &cells {
        let _ = writeln!(
            out,
            "| {name} | MB/s: median (least–most) | % of the link | udpack is | packets lost, % | failed |\n\
             | --- | --- | --- | --- | --- | --- |"
        );
        for way in ways(runs) {
            let these = of(runs, way);
            let times = match way {
                OURS => String::new(),
                _ => format!("{} ×", cell(against(runs, way))),
            };
            let _ = writeln!(
                out,
                "| {way} | {} | {} | {times} | {} | {} |",
                spread(&each(&these, |run| run.value)),
                cell(median(&each(&these, |run| run.link)) * 100.0),
                cell(median(&each(&these, |run| run.lost))),
                failures(&these)
            );
        }
        out.push('\n');
        let of_link: Vec<Run> = runs
            .iter()
            .map(|run| Run {
                value: run.value.and(run.link).map(|link| link * 100.0),
                ..run.clone()
            })
            .collect();
        groups.push(group(name, &of_link));
    }
    let title = "File bytes per second, as a share of the link";
    draw(
        charts,
        "wan",
        &chart::bars(title, "% of the link's rate", &groups),
    )?;
    Ok(Some(
        picture("wan", title).trim_start().to_owned() + "\n" + &out,
    ))
}

fn fairness(results: &Path, charts: &Path) -> anyhow::Result<Option<String>> {
    let mut out = String::from(
        "| case | flow | % of the bytes, both running | % of them from second 10 on | MB/s from second 10 on |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    let mut pictures = String::new();
    for (case, runs) in files(results, "fairness-")? {
        if case.starts_with("alone") {
            continue;
        }
        for way in ways(&runs) {
            let these = of(&runs, way);
            let _ = writeln!(
                out,
                "| {case} | {way} | {} | {} | {} |",
                spread(&each(&these, |run| run.value)),
                spread(&each(&these, |run| run.late_share)),
                spread(&each(&these, |run| run.late)),
            );
        }
        let first = runs.iter().filter(|run| run.round == 1);
        let series: Vec<Series> = first
            .map(|run| Series {
                label: run.way.clone(),
                values: run.series.clone(),
            })
            .collect();
        let name = format!("fairness-{case}");
        let title = format!("{case}: two flows on 100 Mbit/s, 50 ms (round 1)");
        draw(charts, &name, &chart::lines(&title, "MB/s", &series))?;
        pictures += &picture(&name, &title);
    }
    Ok((!pictures.is_empty()).then(|| out + &pictures))
}

fn alone(results: &Path) -> anyhow::Result<Option<String>> {
    let mut out = String::from(
        "| case | MB/s | standing queue, bandwidth-delay products | packets lost, % |\n| --- | --- | --- | --- |\n",
    );
    let mut some = false;
    for (case, runs) in files(results, "fairness-alone-")? {
        let these: Vec<&Run> = runs.iter().collect();
        let _ = writeln!(
            out,
            "| queue of {case} | {} | {} | {} |",
            spread(&each(&these, |run| run.rate)),
            spread(&each(&these, |run| run.queue)),
            spread(&each(&these, |run| run.lost)),
        );
        some = true;
    }
    Ok(some.then_some(out))
}

fn interference(results: &Path) -> anyhow::Result<Option<String>> {
    let mut out = String::new();
    for loss in ["0", "1"] {
        if let Some(value) = printed(&results.join(format!("interference-{loss}.json")))? {
            let _ = writeln!(out, "Loss {loss} % each way:\n");
            for scenario in list(&value, "scenarios") {
                out += &measured(scenario);
            }
            out.push('\n');
        }
    }
    Ok((!out.is_empty()).then_some(out))
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value
        .get(name)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn word<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn number(value: Option<&Value>) -> f64 {
    value.and_then(Value::as_f64).unwrap_or(f64::NAN)
}

/// The table of one scenario of `udpack-bench`.
fn measured(scenario: &Value) -> String {
    let mut out = String::from(
        "| | | median (least–most) | × quinn | × tuned |\n| --- | --- | --- | --- | --- |\n",
    );
    for metric in list(scenario, "metrics") {
        let (name, unit) = (word(metric, "name"), word(metric, "unit"));
        for (arm, of_arm) in arms(scenario) {
            let at = |field: &str| {
                let path = of_arm.get("summary").and_then(|lines| lines.get(name));
                number(path.and_then(|line| line.get(field)))
            };
            let _ = writeln!(
                out,
                "| {name}, {unit} | {arm} | **{}** ({}–{}) | {} | {} |",
                cell(at("median")),
                cell(at("min")),
                cell(at("max")),
                cell(at("to_quinn")),
                cell(at("to_tuned")),
            );
        }
    }
    let work = scenario.get("work").map_or("", |work| word(work, "unit"));
    for (arm, of_arm) in arms(scenario) {
        let cpu = cell(number(of_arm.get("cpu_per_work")));
        let _ = writeln!(out, "| CPU seconds per {work} | {arm} | {cpu} | | |");
    }
    out
}

/// The arms of a scenario, ours first.
fn arms(scenario: &Value) -> Vec<(&str, &Value)> {
    let arms = scenario.get("arms").and_then(Value::as_object);
    let mut arms: Vec<(&str, &Value)> = arms
        .into_iter()
        .flatten()
        .map(|(arm, of_arm)| (arm.as_str(), of_arm))
        .collect();
    arms.sort_by_key(|(arm, _)| *arm != OURS);
    arms
}

/// What `udpack-bench` measured of a scenario, as the script that called it has named it.
fn scenario(results: &Path, charts: &Path, name: &str) -> anyhow::Result<Option<String>> {
    let Some(value) = printed(&results.join(format!("{name}.json")))? else {
        return Ok(None);
    };
    let Some(scenario) = list(&value, "scenarios").first() else {
        return Ok(None);
    };
    let mut out = measured(scenario);
    let rate = list(scenario, "metrics")
        .iter()
        .find(|metric| word(metric, "name") == "rate");
    if let Some(metric) = rate {
        let bars = arms(scenario).into_iter().map(|(arm, of_arm)| {
            let runs = list(of_arm, "runs").iter();
            let values = runs.map(|run| number(run.get("values").and_then(|v| v.get("rate"))));
            bar(arm, &values.collect::<Vec<_>>())
        });
        let group = Group {
            heading: String::new(),
            bars: bars.collect(),
        };
        let (title, unit) = (title(name), word(metric, "unit"));
        draw(charts, name, &chart::bars(title, unit, &[group]))?;
        out += &picture(name, title);
    }
    Ok(Some(out))
}

/// What a chart shows.
/// What `growth` printed: a column for each number of sockets.
fn grown(results: &Path, charts: &Path) -> anyhow::Result<Option<String>> {
    let Some(value) = printed(&results.join("growth.json"))? else {
        return Ok(None);
    };
    let sockets = list(&value, "sockets")
        .iter()
        .map(|count| number(Some(count)));
    let sockets: Vec<String> = sockets.map(figure).collect();
    let mut out = format!("| sockets | {} | last ÷ first |\n|", sockets.join(" | "));
    out += &" --- |".repeat(sockets.len() + 2);
    out.push('\n');
    let mut pictures = String::new();
    for row in list(&value, "rows") {
        let columns = list(row, "values").iter().map(|runs| {
            let runs = runs.as_array().into_iter().flatten();
            runs.map(|run| number(Some(run))).collect::<Vec<_>>()
        });
        let columns: Vec<Vec<f64>> = columns.collect();
        let medians: Vec<f64> = columns.iter().map(|values| median(values)).collect();
        let spreads: Vec<String> = columns.iter().map(|values| spread(values)).collect();
        let [scenario, name, unit] = ["scenario", "name", "unit"].map(|key| word(row, key));
        let _ = writeln!(
            out,
            "| {scenario}: {name}, {unit} | {} | {} |",
            spreads.join(" | "),
            cell(growth(&medians))
        );
        let bars = sockets.iter().zip(&columns).map(|(sockets, values)| Bar {
            ours: true,
            ..bar(&format!("{sockets} sockets"), values)
        });
        let group = Group {
            heading: String::new(),
            bars: bars.collect(),
        };
        let file = format!(
            "growth-{scenario}-{}",
            name.replace(' ', "-").to_lowercase()
        );
        let title = format!("{scenario}: {name}");
        draw(charts, &file, &chart::bars(&title, unit, &[group]))?;
        pictures += &picture(&file, &title);
    }
    Ok(Some(out + &pictures))
}

fn title(name: &str) -> &str {
    match name {
        "peers-loopback" => "One file over loopback, from memory to memory",
        "peers-netns" => "One file between two namespaces, MTU 1,500",
        "small-files-tmpfs" => "10,000 files of 4 KiB, in memory",
        "small-files-ext4" => "10,000 files of 4 KiB, on ext4",
        "bench-stream" => "Bytes from memory to nowhere, over loopback",
        "bench-messages-1" => "Messages of 64 bytes one way, 1 socket",
        "bench-messages-100" => "Messages of 64 bytes one way, 100 sockets",
        "bench-ping-1" => "Replies a second, 1 socket",
        "bench-ping-100" => "Replies a second, 100 sockets",
        _ => name,
    }
}

fn machine(results: &Path) -> anyhow::Result<Option<String>> {
    let mut out = String::new();
    let mut tcp = None;
    for prefix in ["peers-", "wan-"] {
        for (_, runs) in files(results, prefix)? {
            tcp = tcp.or_else(|| Some(word(&runs.first()?.machine, "tcp").to_owned()));
        }
    }
    let described = match printed(&results.join("bench-stream.json"))? {
        Some(value) => value.get("machine").cloned(),
        None => files(results, "peers-")?
            .first()
            .and_then(|(_, runs)| Some(runs.first()?.machine.clone())),
    };
    let Some(described) = described else {
        return Ok(None);
    };
    let cores = described.get("cores").and_then(Value::as_u64);
    let _ = write!(
        out,
        "{} cores of {}, Linux {}",
        cores.unwrap_or_default(),
        word(&described, "cpu"),
        word(&described, "kernel")
    );
    if let Some(tcp) = tcp {
        let _ = write!(out, "; TCP congestion control by default: {tcp}");
    }
    let versions = described.get("versions").and_then(Value::as_object);
    for (package, version) in versions.into_iter().flatten() {
        let _ = write!(out, "; {package} {}", version.as_str().unwrap_or_default());
    }
    out.push_str(".\n");
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_only_what_has_results() {
        let text = "a\n<!-- results: one -->\nold\n<!-- end -->\nb\n<!-- results: two -->\nkept\n<!-- end -->\n";
        let filled = replace(text, |name| Ok((name == "one").then(|| "new\n".to_owned())));
        assert_eq!(
            filled.expect("the marks are whole"),
            text.replace("old", "new")
        );
        let broken = "<!-- results: one -->\n<!-- results: two -->\n<!-- end -->\n";
        assert!(replace(broken, |_| Ok(None)).is_err());
    }

    #[test]
    fn compares_with_ours_round_by_round() {
        let dir = tempfile::tempdir().expect("a directory");
        let line = |way: &str, round: u64, value: &str| {
            format!(
                "{{\"way\":\"{way}\",\"round\":{round},\"unit\":\"MB/s\",\"value\":{value},\"machine\":{{}}}}\n"
            )
        };
        let lines = [
            line("udpack", 1, "10"),
            line("scp", 1, "5"),
            line("udpack", 2, "30"),
            line("scp", 2, "null"),
            line("udpack", 3, "12"),
            line("scp", 3, "3"),
        ];
        fs::write(dir.path().join("peers-x.jsonl"), lines.concat()).expect("written");
        let text = block(dir.path(), dir.path(), "peers-x").expect("readable");
        let text = text.expect("there are results");
        assert!(
            text.contains("| udpack | **12.0** (10.0–30.0) |  | 0 of 3 |"),
            "{text}"
        );
        assert!(
            text.contains("| scp | **4.00** (3.00–5.00) | 3.00 × | 1 of 3 |"),
            "{text}"
        );
        assert!(dir.path().join("peers-x.svg").exists());
        assert!(
            block(dir.path(), dir.path(), "peers-y")
                .expect("readable")
                .is_none()
        );
    }
}
