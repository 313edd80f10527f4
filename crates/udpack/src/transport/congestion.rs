//! The congestion controller of [`CongestionControl::Auto`](crate::CongestionControl::Auto).
//!
//! # What it is made for
//!
//! quinn asks its controller for one thing, the congestion window, and paces at 5/4 of that window per smoothed
//! round trip; a rate it does not ask for. So here **the window is the rate**: what a controller with a pacer of
//! its own does with pacing gains is done with the window alone.
//!
//! # How it works
//!
//! The controller keeps a model of the path (as BBR does, draft-ietf-ccwg-bbr): the *delivery rate*, the largest
//! of ten round trips (`rate`), and the *base RTT*, the smallest of ten seconds. Their product is what the path
//! holds. The window is that product, with 3 ms of rate on top, which makes the model work where a round trip is
//! microseconds and costs a queue of at most 3 ms elsewhere.
//!
//! * **Start-up** about doubles the rate each round trip, as slow start does; the window is never beyond 3.5 times the
//!   rate seen so far, which is a round trip old. It ends when the RTT rises (as in HyStart++, RFC 9406, but within the
//!   round), when the rate has not grown by a quarter for three round trips, or when losses far above those of the path
//!   appear. Its queue is drained by sending half of what is acknowledged, so that the path is never empty.
//! * **Probing.** After four to seven round trips of cruising comes one with a fifth more, to find new
//!   room, and one with a tenth less, but no less than the path holds, which lets the queue of the one before drain and
//!   shows the base RTT.
//!   If the rate grew by a seventh, start-up goes on from there.
//! * **Random loss** costs nothing: loss is measured in the rounds in which least is sent, so that it is the path's
//!   own; the window makes up for it. What is lost *beyond* that is answered: less headroom, gentler probing,
//!   then a ceiling on the rate, so that a policer or a short queue is not flooded.
//! * **Beside others.** A window of exactly the path's size starves beside a flow that fills the queue. When
//!   the RTT never came near its base during a whole cycle, others hold a queue; then the window follows CUBIC
//!   (RFC 9438, with losses counted only while the queue stands), which shares with CUBIC and Reno flows as they
//!   share with each other. After a reduction, when other loss-based flows have just reduced, too, this
//!   flow withdraws to half its share for a round trip: if the queue is gone it was of its own making, and the model
//!   takes over again. The idea of telling one's own queue from the others' is Copa's (Arun and
//!   Balakrishnan, NSDI 2018); it is applied to a different controller here.
//! * **Idle** connections keep their model and go on at their rate, paced.
//!
//! How it does on real paths, and what others do there, is measured in `docs/BENCHMARKS.md`; the tests beside this
//! module run it on simulated ones.

mod cubic;
mod delivery;
mod loss;
mod model;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use model::Model;

/// Makes the controller described above.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ModelConfig;

impl ControllerFactory for ModelConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let seed = RandomState::new().build_hasher().finish();
        Box::new(Auto(Model::new(now, current_mtu, seed)))
    }
}

/// quinn's view of a [`Model`].
#[derive(Debug, Clone)]
struct Auto(Model);

impl Controller for Auto {
    fn on_sent(&mut self, now: Instant, _bytes: u64, _last_packet_number: u64) {
        self.0.on_sent(now);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _: bool, _: &RttEstimator) {
        self.0.on_ack(now, sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _: Option<u64>) {
        self.0.on_end_acks(now, in_flight, app_limited);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost: u64) {
        if persistent {
            self.0.on_persistent_congestion(now);
        } else if lost == 0 {
            self.0.on_mark(now, sent);
        } else {
            self.0.on_loss(now, sent, lost);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.0.set_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.0.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.0.window();
        metrics.pacing_rate = Some((self.0.rate() * 8.0) as u64);
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.0.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
