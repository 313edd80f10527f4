//! Every scenario, as small as it gets: all arms report, in every round, about everything.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

const BENCH: &str = env!("CARGO_BIN_EXE_udpack-bench");

/// Runs a scenario and returns its JSON. The program itself fails when less arrives than was sent.
fn measure(args: &[&str]) -> Value {
    let output = Command::new("timeout")
        .args(["60", BENCH])
        .args(args)
        .args(["--rounds", "1", "--json"])
        .output()
        .expect("timeout is there");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {told}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[track_caller]
fn all_arms_tell_all(result: &Value, arms: &[&str]) {
    let scenarios = result["scenarios"].as_array().expect("a list");
    assert_eq!(scenarios.len(), 1);
    let scenario = &scenarios[0];
    let told = scenario["arms"].as_object().expect("arms");
    // NATS takes part where it is installed.
    let mut names: Vec<_> = told
        .keys()
        .map(String::as_str)
        .filter(|name| *name != "nats")
        .collect();
    names.sort_unstable();
    let mut expected = arms.to_vec();
    expected.sort_unstable();
    assert_eq!(names, expected);
    for (name, arm) in told {
        let runs = arm["runs"].as_array().expect("runs");
        assert_eq!(runs.len(), 1, "{name}");
        for metric in scenario["metrics"].as_array().expect("metrics") {
            let metric = metric["name"].as_str().expect("a name");
            let value = runs[0]["values"][metric].as_f64();
            assert!(value.is_some_and(f64::is_finite), "{name}: {metric}");
            let summary = &arm["summary"][metric];
            assert_eq!(summary["median"].as_f64(), value, "{name}: {metric}");
            assert!(summary["to_quinn"].is_number(), "{name}: {metric}");
            assert!(summary["to_tuned"].is_number(), "{name}: {metric}");
        }
    }
    assert!(result["machine"]["kernel"].is_string());
}

const QUIC: [&str; 3] = ["udpack", "quinn", "tuned"];

#[test]
fn streams() {
    all_arms_tell_all(&measure(&["stream", "--bytes", "1MiB"]), &QUIC);
}

#[test]
fn messages() {
    let arms = ["udpack", "quinn", "tuned", "quinn-each", "wss", "wss-batch"];
    let result = measure(&["messages", "--count", "1000", "--sockets", "3"]);
    all_arms_tell_all(&result, &arms);
    // Each socket sends as many as the others.
    assert_eq!(result["scenarios"][0]["load"]["count"], 999);
}

#[test]
fn pings() {
    let arms = ["udpack", "quinn", "tuned", "wss", "udp"];
    let result = measure(&["ping", "--count", "30", "--sockets", "3"]);
    all_arms_tell_all(&result, &arms);
}

#[test]
fn handshakes() {
    all_arms_tell_all(&measure(&["handshakes", "--count", "8"]), &QUIC);
}

#[test]
fn idle_sockets() {
    let result = measure(&["idle", "--sockets", "64", "--seconds", "0.1"]);
    all_arms_tell_all(&result, &["udpack", "quinn", "tuned", "web"]);
    let arms = result["scenarios"][0]["arms"].as_object().expect("arms");
    for (name, arm) in arms {
        let heap = arm["runs"][0]["values"]["server heap"].as_f64();
        // A connection without memory is not counted at all.
        assert!(
            heap.is_some_and(|kilobytes| kilobytes > 5.0),
            "{name}: {heap:?}"
        );
    }
}

#[test]
fn fanout() {
    let result = measure(&["fanout", "--sockets", "5", "--count", "10"]);
    all_arms_tell_all(&result, &["udpack", "quinn", "tuned", "wss", "udp"]);
}

#[test]
fn growth() {
    let args = [
        "growth",
        "--sockets",
        "2,6",
        "--seconds",
        "0.1",
        "--count",
        "60",
    ];
    let result = measure(&args);
    let rows = result["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 6);
    for row in rows {
        let sizes = row["values"].as_array().expect("numbers of sockets");
        let runs = sizes.iter().map(|runs| runs.as_array().map_or(0, Vec::len));
        assert_eq!(runs.collect::<Vec<_>>(), [1, 1], "{row}");
    }
}

#[test]
fn interference() {
    let result = measure(&["interference", "--seconds", "0.1", "--bytes", "1MiB"]);
    all_arms_tell_all(&result, &QUIC);
}

/// The real programs lie beside this one when the whole workspace is built; otherwise it says how to build them.
fn with_programs(args: &[&str]) {
    let beside = |name| Path::new(BENCH).with_file_name(name).exists();
    if beside("udpack-server") && beside("udpack-client") {
        return all_arms_tell_all(&measure(args), &QUIC);
    }
    let output = Command::new(BENCH).args(args).output().expect("it starts");
    assert!(!output.status.success());
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("cargo build --release --locked"), "{told}");
}

#[test]
fn uploads() {
    with_programs(&["upload", "--bytes", "1MiB"]);
}

#[test]
fn small_files() {
    with_programs(&["small-files", "--bytes", "100", "--count", "120"]);
}

#[test]
fn only_the_arms_that_are_asked_for_run() {
    let result = measure(&["stream", "--bytes", "1K", "--only", "tuned,udpack"]);
    let arms = result["scenarios"][0]["arms"].as_object().expect("arms");
    assert_eq!(arms.len(), 2);
    let summary = &arms["udpack"]["summary"]["rate"];
    assert!(summary["to_quinn"].is_null() && summary["to_tuned"].is_number());
}

#[test]
fn a_good_client_beside_a_hostile_one() {
    let output = Command::new("timeout")
        .args(["60", BENCH, "beside", "--rounds", "1"])
        .args(["--only", "sockets of an address,hooks"])
        .output()
        .expect("timeout is there");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let table = String::from_utf8(output.stdout).expect("text");
    for row in ["| sockets of an address | ", "| hooks | "] {
        let line = table.lines().find(|line| line.starts_with(row));
        let line = line.unwrap_or_else(|| panic!("{table}"));
        assert_eq!(line.matches(" = ").count(), 3, "{line}");
    }
}
