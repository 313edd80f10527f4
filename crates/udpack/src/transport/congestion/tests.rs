//! The controller on simulated paths, in virtual time. Every run is the same: the paths' chances come from a seed.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::model::{Model, Phase};
use super::sim::{Path, Sim};

const MIB: u64 = 1 << 20;

/// MB/s of an upload, its losses in per cent, and the mean delay of the queue in seconds.
fn upload(path: Path, bytes: u64, seed: u64) -> (f64, f64, f64) {
    let mut sim = Sim::new(path, seed);
    let flow = sim.ours(0.0, bytes);
    sim.run(120.0);
    let seconds = sim.seconds(flow);
    let rate = bytes as f64 / seconds / 1e6;
    (rate, sim.lost(flow), sim.queue(0.0, seconds))
}

#[test]
fn random_loss_costs_what_it_loses() {
    for (loss, least) in [
        (0.0, 11.4),
        (0.01, 11.3),
        (0.02, 11.2),
        (0.05, 10.9),
        (0.1, 10.5),
    ] {
        let (rate, lost, queue) = upload(Path::new(100.0, 50.0, 1.0, loss), 100 * MIB, 1);
        assert!(rate > least, "{loss}: {rate} MB/s of 12.5");
        assert!(lost < loss * 100.0 + 1.0, "{loss}: {lost} % lost");
        assert!(
            queue < 0.0125,
            "{loss}: {queue} s of queue, a quarter of 50 ms"
        );
    }
}

#[test]
fn fills_long_paths_that_lose() {
    for (mbit, rtt, loss, mib, least) in [
        (500.0, 20.0, 0.001, 300, 0.90),
        (50.0, 200.0, 0.01, 100, 0.85),
        (20.0, 300.0, 0.02, 60, 0.80),
    ] {
        let path = Path::new(mbit, rtt, 1.0, loss);
        let link = path.rate / 1e6;
        let (rate, ..) = upload(path, mib * MIB, 2);
        assert!(
            rate > least * link,
            "{mbit} Mbit/s {rtt} ms: {rate} of {link} MB/s"
        );
    }
}

#[test]
fn alone_it_keeps_the_queue_short_however_long_it_may_be() {
    for queue in [1.0, 4.0, 16.0] {
        let mut sim = Sim::new(Path::new(50.0, 50.0, queue, 0.0), 1);
        let flow = sim.ours(0.0, u64::MAX);
        sim.run(30.0);
        let (mean, rate) = (sim.queue(2.0, 30.0), sim.rate(flow, 2.0, 30.0));
        assert!(mean < 0.0125, "{queue}: {mean} s");
        assert!(rate > 0.97 * 6.25 * 1452.0 / 1480.0, "{queue}: {rate} MB/s");
    }
}

#[test]
fn shares_with_tcp_cubic_whoever_comes_first() {
    for (queue, least) in [(1.0, 0.3), (4.0, 0.2)] {
        for (ours, tcp) in [(0.0, 5.0), (5.0, 0.0), (0.0, 0.1)] {
            let mut sim = Sim::new(Path::new(100.0, 50.0, queue, 0.0), 1);
            let ours = sim.ours(ours, u64::MAX);
            let tcp = sim.tcp(tcp);
            sim.run(65.0);
            let (ours, tcp) = (sim.rate(ours, 5.0, 65.0), sim.rate(tcp, 5.0, 65.0));
            let share = ours / (ours + tcp);
            assert!(
                (least..1.0 - least).contains(&share),
                "{queue}: {ours} to {tcp} MB/s"
            );
            assert!(ours + tcp > 11.5, "{queue}: {ours} and {tcp} MB/s");
        }
    }
}

#[test]
fn two_of_them_share_evenly_with_a_short_queue() {
    for (queue, loss) in [(1.0, 0.0), (4.0, 0.0), (1.0, 0.01)] {
        let mut sim = Sim::new(Path::new(100.0, 50.0, queue, loss), 1);
        let (first, second) = (sim.ours(0.0, u64::MAX), sim.ours(2.0, u64::MAX));
        sim.run(40.0);
        let (a, b) = (sim.rate(first, 12.0, 40.0), sim.rate(second, 12.0, 40.0));
        assert!(
            (0.4..0.6).contains(&(a / (a + b))),
            "{queue}: {a} to {b} MB/s"
        );
        assert!(a + b > 11.5, "{queue}: {a} and {b} MB/s");
        let mean = sim.queue(12.0, 40.0);
        assert!(mean < 0.0125, "{queue}: {mean} s");
    }
}

#[test]
fn is_alone_again_when_the_others_have_gone() {
    let mut sim = Sim::new(Path::new(50.0, 50.0, 2.0, 0.0), 1);
    let ours = sim.ours(0.0, u64::MAX);
    let tcp = sim.tcp(2.0);
    sim.in_turns(tcp, 15.0, 100.0);
    sim.run(45.0);
    let beside = sim.rate(ours, 5.0, 17.0);
    assert!((1.2..5.0).contains(&beside), "{beside} MB/s beside TCP");
    let (alone, queue) = (sim.rate(ours, 30.0, 45.0), sim.queue(30.0, 45.0));
    assert!(alone > 5.8, "{alone} MB/s");
    assert!(queue < 0.0125, "{queue} s");
}

#[test]
fn a_short_queue_or_a_policer_is_not_flooded() {
    let short = Path::new(100.0, 50.0, 0.1, 0.0);
    let mut policer = Path::new(100.0, 50.0, 1.0, 0.0);
    policer.policer = Some(600e3);
    for (path, least) in [(short, 11.0), (policer, 10.0)] {
        let (rate, lost, _) = upload(path.clone(), 100 * MIB, 1);
        assert!(rate > least, "{path:?}: {rate} MB/s");
        assert!(lost < 8.0, "{path:?}: {lost} % lost");
    }
}

#[test]
fn follows_a_path_that_changes() {
    let mut sim = Sim::new(Path::new(50.0, 40.0, 1.0, 0.0), 1);
    let flow = sim.ours(0.0, u64::MAX);
    sim.change(10.0, Path::new(20.0, 40.0, 2.5, 0.0));
    sim.change(25.0, Path::new(100.0, 40.0, 1.0, 0.0));
    sim.run(40.0);
    let (narrow, queue) = (sim.rate(flow, 15.0, 25.0), sim.queue(18.0, 25.0));
    assert!(narrow > 0.9 * 2.5, "{narrow} MB/s of 2.5");
    assert!(queue < 0.02, "{queue} s");
    let wide = sim.rate(flow, 28.0, 40.0);
    assert!(wide > 0.9 * 12.5, "{wide} MB/s of 12.5");
}

#[test]
fn starts_at_its_rate_after_a_pause() {
    let mut sim = Sim::new(Path::new(100.0, 50.0, 1.0, 0.0), 1);
    let flow = sim.ours(0.0, u64::MAX);
    sim.in_turns(flow, 3.0, 5.0);
    sim.run(8.0);
    let lost = sim.flows[flow].lost;
    sim.run(11.0);
    // One way of 25 ms until something arrives, then the full rate.
    let rate = sim.rate(flow, 8.05, 8.35);
    assert!(rate > 11.0, "{rate} MB/s");
    assert_eq!(sim.flows[flow].lost, lost);
}

#[test]
fn comes_back_after_silence() {
    let mut sim = Sim::new(Path::new(50.0, 50.0, 1.0, 0.0), 1);
    let flow = sim.ours(0.0, u64::MAX);
    sim.change(5.0, Path::new(50.0, 50.0, 1.0, 1.0));
    sim.change(8.0, Path::new(50.0, 50.0, 1.0, 0.0));
    sim.run(20.0);
    assert!(sim.rate(flow, 5.2, 8.0) < 0.01);
    let rate = sim.rate(flow, 15.0, 20.0);
    assert!(rate > 5.8, "{rate} MB/s");
}

#[test]
fn works_where_bandwidth_delay_products_are_tiny_or_acknowledgements_late() {
    let mut late = Path::new(100.0, 50.0, 1.0, 0.01);
    late.jitter = Duration::from_millis(10);
    for (path, bytes, least) in [
        (Path::new(1000.0, 0.2, 50.0, 0.0), 200 * MIB, 0.95),
        (Path::new(10.0, 1.0, 20.0, 0.0), 20 * MIB, 0.95),
        (Path::new(1.0, 600.0, 1.0, 0.0), 2 * MIB, 0.7),
        (late, 100 * MIB, 0.88),
    ] {
        let link = path.rate / 1e6;
        let (rate, ..) = upload(path.clone(), bytes, 1);
        assert!(rate > least * link, "{path:?}: {rate} of {link} MB/s");
    }
}

#[test]
fn who_sends_little_is_not_told_that_the_path_carries_little() {
    let mut sim = Sim::new(Path::new(100.0, 50.0, 1.0, 0.0), 1);
    let flow = sim.ours(0.0, u64::MAX);
    // 2 ms of every 100 ms: a fiftieth of the link at most.
    sim.in_turns(flow, 0.002, 0.098);
    sim.run(20.0);
    assert_eq!(sim.flows[flow].lost, 0);
    assert!(sim.rate(flow, 1.0, 20.0) > 0.1);
}

#[test]
fn a_window_of_a_few_packets_is_no_trap() {
    // Nothing but losses to begin with, so that start-up ends with the least window.
    let mut sim = Sim::new(Path::new(1.6, 40.0, 2.0, 0.5), 3);
    let flow = sim.ours(0.0, u64::MAX);
    sim.change(10.0, Path::new(1.6, 40.0, 2.0, 0.0));
    sim.run(40.0);
    let rate = sim.rate(flow, 20.0, 40.0);
    assert!(rate > 0.9 * 0.2 * 1452.0 / 1480.0, "{rate} of 0.2 MB/s");
}

/// A model that has seen one round trip of its first window.
fn begun() -> (Model, Instant) {
    let begin = Instant::now();
    let mut model = Model::new(begin, 1200, 7);
    assert_eq!(model.window(), 32 * 1200);
    assert_eq!(model.phase, Phase::Startup);
    model.on_sent(begin);
    let now = begin + Duration::from_millis(50);
    for _ in 0..32 {
        model.on_ack(now, begin, 1200);
    }
    model.on_end_acks(now, 0, false);
    (model, now)
}

#[test]
fn start_up_more_than_doubles_and_a_mark_ends_it() {
    let (mut model, now) = begun();
    assert_eq!(model.window(), 32 * 1200 * 22 / 10);
    assert!((model.rate() - 768_000.0).abs() < 1.0, "{}", model.rate());
    model.on_sent(now);
    model.on_mark(now + Duration::from_millis(50), now);
    assert_eq!(model.phase, Phase::Drain);
    assert_eq!(model.window(), 32 * 1200, "what the path holds");
}

#[test]
fn a_mark_lowers_the_rate_once_a_round_trip() {
    let (mut model, now) = begun();
    model.phase = Phase::Cruise(3);
    model.on_sent(now);
    let rate = model.rate();
    let then = now + Duration::from_millis(50);
    model.on_mark(then, now);
    model.on_mark(then, now);
    assert!((model.rate() - 0.85 * rate).abs() < 1.0);
}

#[test]
fn persistent_congestion_begins_anew_with_the_least_window() {
    let (mut model, now) = begun();
    model.on_persistent_congestion(now);
    assert_eq!(model.window(), 4 * 1200);
    assert_eq!(model.phase, Phase::Startup);
    assert_eq!(model.rate(), 0.0);
    model.set_mtu(9000);
    assert_eq!(model.window(), 4 * 9000);
}

proptest! {
    /// Whatever order things happen in, and whatever a peer acknowledges: a window that quinn can use.
    #[test]
    fn any_history_leaves_a_usable_window(
        steps in prop::collection::vec((0u8..7, 0u64..200_000, 0u64..3_000_000), 0..300),
    ) {
        let begin = Instant::now();
        let mut now = begin;
        let mut model = Model::new(begin, 1200, 1);
        for (kind, micros, number) in steps {
            let ago = now.checked_sub(Duration::from_micros(number)).unwrap_or(begin);
            match kind {
                0 | 1 => {
                    now += Duration::from_micros(micros);
                    model.on_sent(now);
                }
                2 => model.on_ack(now, ago, number),
                3 => model.on_end_acks(now, number, number % 3 == 0),
                4 => model.on_loss(now, ago, number),
                5 => model.on_mark(now, ago),
                _ if number < 100_000 => model.on_persistent_congestion(now),
                _ => model.set_mtu(1200 + (number % 60_000) as u16),
            }
            prop_assert!(model.window() >= 4800 && model.window() <= u64::from(u32::MAX));
            prop_assert!(model.rate().is_finite());
        }
    }
}
