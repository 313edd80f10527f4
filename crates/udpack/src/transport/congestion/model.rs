//! The model of the path, and the window that follows from it. See the parent module.

use std::time::{Duration, Instant};

use super::cubic::Cubic;
use super::delivery::{Delivery, Purpose};
use super::loss::Fate;

/// Packets of the first window. RFC 9002, section 7.2, recommends 10 for senders that may send them at once; these are
/// paced over a round trip, as by other QUIC senders that begin with 32.
const INITIAL_PACKETS: f64 = 32.0;
/// Packets that the window always has room for; RFC 9002 asks for two, BBR for four.
const LEAST_PACKETS: f64 = 4.0;
/// Rounds over which the largest delivery rate counts, as in BBR.
const ROUNDS: usize = 10;
/// For how long the smallest RTT counts, as in BBR.
const BASE_RTT_FOR: Duration = Duration::from_secs(10);
/// Seconds of the delivery rate that the window has beyond the base RTT. Covers delayed acknowledgements and
/// scheduling; on loopback, where the RTT is 0.1 ms, less than 2 ms costs throughput.
const HEADROOM: f64 = 0.003;
/// Packets that the window has beyond that, for acknowledgements that come for several at once; BBR has three.
const SPARE_PACKETS: f64 = 3.0;
/// Start-up has at most this window, in units of what the path was seen to hold: what is seen is a round old, when
/// the window was less than half of the present one.
const STARTUP_GAIN: f64 = 3.5;
/// Start-up grows by so many times what is acknowledged. 1 is slow start; paced by quinn and with delayed
/// acknowledgements that is less than a doubling a round.
const STARTUP_STEP: f64 = 1.2;
/// Draining gives up so many times what is acknowledged. 1 would send nothing until the queue is gone, and then find
/// the path empty for as long as the losses of start-up were counted as in flight.
const DRAIN_STEP: f64 = 0.5;
/// Start-up goes on while the rate grows by this factor within `STARTUP_ROUNDS`, as in BBR.
const STARTUP_GROWTH: f64 = 1.25;
const STARTUP_ROUNDS: u32 = 3;
/// Start-up begins anew when a probe found this factor.
const PROBE_GROWTH: f64 = 1.15;
/// RTT samples in a row that a verdict needs, and bounds of the rise that ends start-up (RFC 9406, section 4.3).
const RISE_SAMPLES: u32 = 8;
const RISE: (Duration, Duration) = (Duration::from_millis(4), Duration::from_millis(16));
/// Parts of the window added while probing for more: at first, and after losses.
const PROBE: (f64, f64) = (0.05, 0.2);
/// And at least so many packets.
const PROBE_PACKETS: f64 = 2.0;
const DOWN_GAIN: f64 = 0.9;
/// The share of the bandwidth-delay product while probing for the base RTT or for other flows.
const WITHDRAWN_GAIN: f64 = 0.5;
/// Losses of the path itself that the window makes up for, at most.
const MADE_UP: f64 = 0.2;
/// Shares lost beyond the path's own at which headroom, probing and rate give way; the second as in BBRv3.
const MARGIN_HEADROOM: f64 = 0.005;
const MARGIN: f64 = 0.02;
/// The same, for an answer within a round.
const MARGIN_AT_ONCE: f64 = 0.1;
/// Packets that start-up must have lost to end for it.
const STARTUP_LOSSES: f64 = 16.0;
/// The shortest interval between steps in which reduced values recover.
const EASE_EVERY: Duration = Duration::from_millis(500);
/// Beside others: segments a round trip that the window grows by at least, as Reno's. More than the 0.53 that
/// RFC 9438 gives CUBIC, because withdrawals cost a share.
const ALPHA: f64 = 1.0;
/// A flow that meets others within this many rounds since its beginning came last and has less than its share: its
/// window grows by an additional part of the acknowledged bytes until a loss.
const YOUNG: u32 = 64;
const EAGER: f64 = 0.125;
/// Rounds of competing before a withdrawal: at first, and after some that found others.
const PATIENCE: (u32, u32) = (16, 64);
/// Cycles after a withdrawal within which competing resumes where it was.
const RECALL: u32 = 2;
/// The factor by which a mark reduces the rate (RFC 8511).
const MARK_GAIN: f64 = 0.85;
/// quinn paces at this many windows per smoothed RTT, up to `MOST` bytes.
const PACING_GAIN: f64 = 1.25;
const MOST: f64 = u32::MAX as f64;

/// The first window, in bytes. As in RFC 9002, packets larger than an Ethernet's make it no larger, unless it had no
/// room for a few of them.
fn first_window(mtu: f64) -> f64 {
    (INITIAL_PACKETS * mtu.min(1472.0)).max(LEAST_PACKETS * mtu)
}

/// The phase of the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Startup,
    /// Until the queue that start-up made is gone.
    Drain,
    /// For so many more rounds.
    Cruise(u32),
    Up,
    Down,
    /// Looks for the base RTT, for so many more rounds.
    ProbeRtt(u32),
    /// Beside others, for so many rounds.
    Compete(u32),
    /// Looks whether there are others, for so many rounds.
    Withdraw(u32),
}

/// The counters of one round.
#[derive(Debug, Clone, Copy, Default)]
struct Round {
    rtt: Option<Duration>,
    rtts: u32,
    rate: f64,
    app_limited: bool,
    fate: Fate,
}

#[derive(Debug, Clone)]
pub(super) struct Model {
    mtu: f64,
    window: f64,
    pub(super) phase: Phase,
    delivery: Delivery,
    round: Round,
    last_rtt: Option<Duration>,
    rates: [f64; ROUNDS],
    slot: usize,
    /// No rate above this until losses allow it.
    ceiling: f64,
    base_rtt: Duration,
    base_rtt_at: Instant,
    /// The base RTT before the current probe for it.
    former_rtt: Duration,
    smoothed_rtt: Duration,
    latest_rtt: Duration,
    /// The share of packets that the path loses whatever is sent, and what it was measured on.
    loss: f64,
    own: Fate,
    cruise: Fate,
    up: Fate,
    down: Fate,
    headroom: f64,
    probe: f64,
    eased: Instant,
    /// Losses are seen that may come from a queue shorter than the headroom.
    shallow: bool,
    /// The rate that start-up has reached, and rounds since.
    full_rate: f64,
    full_rounds: u32,
    /// RTT samples in a row that are above the last round's.
    risen: u32,
    /// Rounds for which the smoothed RTT may still be that of start-up's queue.
    fresh: u32,
    up_from: f64,
    /// The smallest RTT of the present cycle.
    cycle_rtt: Option<Duration>,
    cubic: Cubic,
    /// Came to a path that others fill, and has not lost anything since.
    eager: bool,
    /// Rounds since the beginning.
    age: u32,
    patience: u32,
    recall: u32,
    marked: Option<Instant>,
    seed: u64,
}

impl Model {
    /// `seed` tells connections apart, so that they do not probe in step.
    pub(super) fn new(now: Instant, mtu: u16, seed: u64) -> Self {
        let mtu = f64::from(mtu);
        Self {
            mtu,
            window: first_window(mtu),
            phase: Phase::Startup,
            delivery: Delivery::new(now),
            round: Round::default(),
            last_rtt: None,
            rates: [0.0; ROUNDS],
            slot: 0,
            ceiling: f64::INFINITY,
            base_rtt: Duration::MAX,
            base_rtt_at: now,
            former_rtt: Duration::MAX,
            smoothed_rtt: Duration::ZERO,
            latest_rtt: Duration::ZERO,
            loss: 0.0,
            own: Fate::default(),
            cruise: Fate::default(),
            up: Fate::default(),
            down: Fate::default(),
            headroom: 1.0,
            probe: PROBE.1,
            eased: now,
            shallow: false,
            full_rate: 0.0,
            full_rounds: 0,
            risen: 0,
            fresh: 0,
            up_from: 0.0,
            cycle_rtt: None,
            cubic: Cubic::new(0.0, mtu, ALPHA),
            eager: false,
            age: 0,
            patience: PATIENCE.0,
            recall: 0,
            marked: None,
            seed,
        }
    }

    pub(super) fn set_mtu(&mut self, mtu: u16) {
        self.mtu = f64::from(mtu);
        self.window = self.window.max(LEAST_PACKETS * self.mtu);
    }

    /// Bytes that may be in flight.
    pub(super) fn window(&self) -> u64 {
        self.window as u64
    }

    pub(super) fn initial_window(&self) -> u64 {
        first_window(self.mtu) as u64
    }

    /// The delivery rate that the path is believed to have, in bytes a second.
    pub(super) fn rate(&self) -> f64 {
        self.measured_rate().min(self.ceiling)
    }

    fn measured_rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    pub(super) fn on_sent(&mut self, now: Instant) {
        let purpose = match self.phase {
            Phase::Cruise(_) => Purpose::Cruise,
            Phase::Up => Purpose::Up,
            Phase::Down => Purpose::Down,
            Phase::Startup
            | Phase::Drain
            | Phase::ProbeRtt(_)
            | Phase::Compete(_)
            | Phase::Withdraw(_) => Purpose::Other,
        };
        self.delivery.on_sent(now, purpose);
    }

    pub(super) fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivery.on_ack(now, sent, bytes);
        let fate = Fate {
            acked: bytes as f64,
            lost: 0.0,
        };
        self.count(sent, fate);
    }

    pub(super) fn on_loss(&mut self, now: Instant, sent: Instant, bytes: u64) {
        let fate = Fate {
            acked: 0.0,
            lost: bytes as f64,
        };
        self.count(sent, fate);
        if let Phase::Compete(rounds) = self.phase
            && self.is_inflated(self.latest_rtt)
            && self.cubic.on_loss(now, sent)
        {
            self.eager = false;
            // Others that follow losses have just given way, too: the time to see whether there are any.
            if rounds >= self.patience {
                self.phase = Phase::Withdraw(0);
                self.delivery.begin_round();
            }
            self.set_window();
        }
    }

    /// A router says that its queue grows (RFC 3168).
    pub(super) fn on_mark(&mut self, now: Instant, sent: Instant) {
        if self.marked.is_some_and(|marked| sent <= marked) {
            return;
        }
        self.marked = Some(now);
        match self.phase {
            Phase::Startup => self.drain_at_once(),
            Phase::Compete(_) => {
                self.eager = false;
                self.cubic.on_loss(now, sent);
            }
            Phase::Drain
            | Phase::Cruise(_)
            | Phase::Up
            | Phase::Down
            | Phase::ProbeRtt(_)
            | Phase::Withdraw(_) => self.ceiling = self.rate() * MARK_GAIN,
        }
        self.set_window();
    }

    /// Nothing has come through for several timeouts: the path is not what it was (RFC 9002, section 7.6.2).
    pub(super) fn on_persistent_congestion(&mut self, now: Instant) {
        let mtu = self.mtu as u16;
        *self = Self::new(now, mtu, self.draw());
        self.window = LEAST_PACKETS * self.mtu;
    }

    pub(super) fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool) {
        let base = self.base_rtt;
        let Some(sample) = self.delivery.end_acks(now, in_flight, app_limited, base) else {
            return;
        };
        let rtt = sample.rtt;
        self.latest_rtt = rtt;
        self.smoothed_rtt = if self.smoothed_rtt.is_zero() {
            rtt
        } else {
            (self.smoothed_rtt * 7 + rtt) / 8
        };
        if rtt <= self.base_rtt {
            self.base_rtt = rtt;
            self.base_rtt_at = now;
        }
        self.round.rtts += 1;
        self.round.app_limited |= app_limited;
        for least in [&mut self.round.rtt, &mut self.cycle_rtt] {
            *least = Some(least.map_or(rtt, |least| least.min(rtt)));
        }
        if let Some((rate, app_limited)) = sample.rate
            && (!app_limited || rate > self.measured_rate())
        {
            self.round.rate = self.round.rate.max(rate);
            if let Some(slot) = self.rates.get_mut(self.slot) {
                *slot = slot.max(rate);
            }
        }
        match self.phase {
            Phase::Startup => {
                if !app_limited {
                    self.window += STARTUP_STEP * sample.acked as f64;
                }
                if self.rtt_has_risen(rtt) {
                    self.phase = Phase::Drain;
                }
            }
            Phase::Compete(_) if !app_limited => {
                let acked = sample.acked as f64;
                self.cubic.on_ack(now, acked, self.mtu, self.smoothed_rtt);
                if self.eager {
                    self.cubic.grow(acked * EAGER, self.mtu);
                }
            }
            Phase::Drain => self.window -= DRAIN_STEP * sample.acked as f64,
            Phase::Cruise(_)
            | Phase::Up
            | Phase::Down
            | Phase::ProbeRtt(_)
            | Phase::Compete(_)
            | Phase::Withdraw(_) => {}
        }
        if sample.round_ended {
            self.end_round(now);
        }
        if self.phase == Phase::Drain && in_flight as f64 <= self.content(self.base_rtt) {
            self.begin_cycle();
        }
        self.set_window();
    }

    fn count(&mut self, sent: Instant, fate: Fate) {
        self.round.fate.add(fate);
        match self.delivery.purpose(sent) {
            Purpose::Cruise => self.cruise.add(fate),
            Purpose::Up => self.up.add(fate),
            Purpose::Down => self.down.add(fate),
            Purpose::Other => {}
        }
    }

    /// As HyStart++ (RFC 9406, section 4.2), but at any time of the round: the RTT is above the last round's, so a queue
    /// grows.
    fn rtt_has_risen(&mut self, rtt: Duration) -> bool {
        let risen = self
            .last_rtt
            .is_some_and(|last| rtt >= last + (last / 8).clamp(RISE.0, RISE.1));
        self.risen = if risen { self.risen + 1 } else { 0 };
        self.risen >= RISE_SAMPLES
    }

    fn end_round(&mut self, now: Instant) {
        self.delivery.begin_round();
        self.age = self.age.saturating_add(1);
        let round = std::mem::take(&mut self.round);
        self.last_rtt = round.rtt.or(self.last_rtt);
        let too_much = round.fate.is_above(self.loss, MARGIN_AT_ONCE, self.mtu);
        if too_much && !round.app_limited && self.phase != Phase::Startup {
            self.ceiling = self.ceiling.min(round.rate.max(self.rate() / 2.0));
        }
        // Rounds in which the sender was short of data do not age the rate.
        if round.rate > 0.0 && !round.app_limited {
            self.slot = (self.slot + 1) % ROUNDS;
            if let Some(slot) = self.rates.get_mut(self.slot) {
                *slot = 0.0;
            }
        }
        if now.saturating_duration_since(self.base_rtt_at) > BASE_RTT_FOR
            && self.base_rtt_is_over(now)
        {
            return;
        }
        self.next_phase(now, &round);
    }

    /// No smaller RTT has been seen for long. Returns whether a phase begins that looks for it.
    fn base_rtt_is_over(&mut self, now: Instant) -> bool {
        match self.phase {
            // Others hold a queue: what is seen is not the base.
            Phase::Compete(_) | Phase::Withdraw(_) | Phase::ProbeRtt(_) => return false,
            Phase::Startup | Phase::Drain | Phase::Cruise(_) | Phase::Up | Phase::Down => {}
        }
        self.former_rtt = self.base_rtt;
        self.base_rtt = self.latest_rtt;
        self.base_rtt_at = now;
        if self.phase == Phase::Startup {
            return false;
        }
        self.phase = Phase::ProbeRtt(1);
        true
    }

    fn next_phase(&mut self, now: Instant, round: &Round) {
        match self.phase {
            Phase::Startup => {
                if !round.app_limited {
                    self.grow(round);
                }
            }
            Phase::Drain => {}
            Phase::ProbeRtt(0) => self.begin_cycle(),
            Phase::ProbeRtt(left) => self.phase = Phase::ProbeRtt(left - 1),
            Phase::Cruise(0) => {
                let crowded = self
                    .cycle_rtt
                    .take()
                    .is_some_and(|rtt| self.is_inflated(rtt));
                if crowded && !round.app_limited {
                    self.compete();
                } else {
                    self.recall = self.recall.saturating_sub(1);
                    self.up_from = self.measured_rate();
                    self.phase = Phase::Up;
                }
            }
            Phase::Cruise(left) => {
                self.fresh = self.fresh.saturating_sub(1);
                self.phase = Phase::Cruise(left - 1);
            }
            Phase::Up => self.phase = Phase::Down,
            Phase::Down => {
                self.judge_losses(now);
                if self.measured_rate() > PROBE_GROWTH * self.up_from {
                    self.phase = Phase::Startup;
                    self.full_rate = self.rate();
                    self.full_rounds = 0;
                    self.window = self.target();
                } else {
                    self.begin_cycle();
                }
            }
            Phase::Compete(rounds) if rounds >= 2 * self.patience => {
                self.phase = Phase::Withdraw(0);
            }
            Phase::Compete(rounds) => self.phase = Phase::Compete(rounds + 1),
            Phase::Withdraw(rounds) => {
                if round.rtt.is_some_and(|rtt| self.is_near_base(rtt)) {
                    self.recall = RECALL;
                    self.cycle_rtt = None;
                    self.phase = Phase::Cruise(2);
                } else if rounds == 0 {
                    self.phase = Phase::Withdraw(1);
                } else {
                    self.patience = (self.patience * 2).min(PATIENCE.1);
                    self.phase = Phase::Compete(0);
                }
            }
        }
    }

    /// A round of start-up is over.
    fn grow(&mut self, round: &Round) {
        // The path's own loss is known as well as it was seen so far.
        let uncertain = 3.0 * (0.25 * self.mtu / self.own.all().max(self.mtu)).sqrt();
        let margin = MARGIN_AT_ONCE + uncertain.min(0.3);
        let overrun = round.fate.lost >= STARTUP_LOSSES * self.mtu
            && round.fate.is_above(self.loss, margin, self.mtu);
        let rate = self.rate();
        if overrun {
            self.drain_at_once();
        } else if rate >= self.full_rate * STARTUP_GROWTH {
            self.full_rate = rate;
            self.full_rounds = 0;
            // More got through than before, so what was lost was not lost for want of room.
            self.own.add(round.fate);
            self.loss = self.own.loss();
        } else {
            self.full_rounds += 1;
            if self.full_rounds >= STARTUP_ROUNDS {
                self.phase = Phase::Drain;
            }
        }
    }

    /// Start-up has filled a queue that is short: nothing more is sent before it is gone.
    fn drain_at_once(&mut self) {
        self.phase = Phase::Drain;
        self.window = self.content(self.base_rtt);
    }

    fn begin_cycle(&mut self) {
        self.fresh = if self.phase == Phase::Drain { 2 } else { 0 };
        if matches!(self.phase, Phase::Drain | Phase::ProbeRtt(_)) {
            self.cycle_rtt = None;
        }
        let rounds = 4 + (self.draw() % 3) as u32;
        self.phase = Phase::Cruise(rounds);
    }

    /// Others hold a queue: from now on as they do.
    fn compete(&mut self) {
        if self.recall == 0 {
            let rtt = self.smoothed_rtt.min(self.base_rtt * 2).as_secs_f64();
            self.cubic = Cubic::new((self.rate() * rtt).max(self.target()), self.mtu, ALPHA);
            self.eager = self.age < YOUNG;
            self.patience = PATIENCE.0;
        }
        self.phase = Phase::Compete(0);
    }

    /// The least RTT of a cycle, one with a round of little sending, says that there is a queue all the time.
    fn is_inflated(&self, rtt: Duration) -> bool {
        rtt.as_secs_f64() > 1.1 * self.base_rtt.as_secs_f64() + HEADROOM
    }

    fn is_near_base(&self, rtt: Duration) -> bool {
        rtt.as_secs_f64() <= 1.1 * self.base_rtt.as_secs_f64() + HEADROOM / 2.0
    }

    /// A cycle is over: what does the path lose by itself, and what for too much being sent?
    fn judge_losses(&mut self, now: Instant) {
        let down = std::mem::take(&mut self.down);
        if down.all() > 0.0 {
            if down.is_below(self.loss, self.mtu) {
                self.own = down;
            } else {
                self.own.add(down);
            }
            self.loss = self.own.loss();
            if self.own.all() > 400.0 * self.mtu {
                self.own.halve();
            }
        }
        let ease = now.saturating_duration_since(self.eased) > EASE_EVERY;
        if ease {
            self.eased = now;
        }
        let up = std::mem::take(&mut self.up);
        if up.is_above(self.loss, MARGIN, self.mtu) {
            self.probe = (self.probe / 2.0).max(PROBE.0);
        } else if ease {
            self.probe = (self.probe * 1.5).min(PROBE.1);
        }
        let cruise = std::mem::take(&mut self.cruise);
        if cruise.is_above(self.loss, MARGIN_HEADROOM, self.mtu) {
            self.headroom /= 2.0;
        } else if ease {
            self.headroom = (self.headroom * 1.25).min(1.0);
        }
        if cruise.is_above(self.loss, MARGIN, self.mtu) {
            self.ceiling = self.rate() * (1.0 - (cruise.loss() - self.loss));
        } else if ease {
            self.ceiling *= 1.2;
        }
        self.shallow = self.loss > MARGIN_HEADROOM && self.headroom < 0.7;
    }

    /// The bandwidth-delay product of the path, in bytes.
    fn content(&self, rtt: Duration) -> f64 {
        self.rate() * rtt.as_secs_f64()
    }

    fn made_up(&self) -> f64 {
        1.0 / (1.0 - self.loss.min(MADE_UP))
    }

    fn target(&self) -> f64 {
        let headroom = self.rate() * HEADROOM * self.headroom;
        (self.content(self.base_rtt) + headroom) * self.made_up() + SPARE_PACKETS * self.mtu
    }

    fn set_window(&mut self) {
        let least = LEAST_PACKETS * self.mtu;
        let bare = self.content(self.base_rtt) * self.made_up();
        let window = match self.phase {
            Phase::Startup if self.rate() > 0.0 => {
                let most = STARTUP_GAIN * self.content(self.base_rtt);
                self.window.min(most.max(INITIAL_PACKETS * self.mtu))
            }
            Phase::Startup => self.window,
            Phase::Drain => self.window.max(self.content(self.base_rtt)),
            // quinn paces by the smoothed RTT: while that is too long, it would send too slowly.
            Phase::Cruise(_) if self.fresh > 0 => {
                let paced = self.rate() * self.smoothed_rtt.as_secs_f64() / PACING_GAIN;
                self.target().max(paced)
            }
            Phase::Cruise(_) => self.target(),
            Phase::Up => {
                // Where a window is a few packets, a part of it is nothing.
                let more = (self.probe * self.target()).max(PROBE_PACKETS * self.mtu);
                self.target() + more
            }
            Phase::Down if self.shallow => {
                // The headroom alone may be more than the queue takes.
                DOWN_GAIN * bare.min(self.target())
            }
            // With less than what the path holds it would be idle.
            Phase::Down => bare.max(DOWN_GAIN * self.target()),
            Phase::ProbeRtt(_) => WITHDRAWN_GAIN * self.content(self.former_rtt),
            Phase::Compete(_) => self.cubic.window(self.mtu).max(self.target()),
            Phase::Withdraw(_) => WITHDRAWN_GAIN * self.content(self.base_rtt),
        };
        self.window = window.clamp(least, MOST);
    }

    /// SplitMix64; nothing but being out of step depends on it.
    fn draw(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.seed;
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
