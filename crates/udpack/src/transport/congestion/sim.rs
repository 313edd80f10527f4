//! A path in virtual time: random loss, then a drop-tail queue drained at a fixed rate (or a policer), then a delay.
//!
//! Senders are as quinn is as far as a congestion controller can tell: the same pacer, acknowledgements of every second
//! packet or after 25 ms, losses by packet and time threshold (RFC 9002, section 6.1), probes after a timeout. The other
//! kind of flow is TCP CUBIC: no pacing, HyStart++.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use super::cubic::Cubic;
use super::model::Model;

pub(super) const MTU: u64 = 1452;
/// IP and UDP headers.
const HEADERS: u64 = 28;
const SAMPLE: Duration = Duration::from_millis(10);
const MAX_ACK_DELAY: Duration = Duration::from_millis(25);
/// RFC 9438, section 4.3: 3 (1 - 0.7) / (1 + 0.7).
const TCP_ALPHA: f64 = 0.53;
const INITIAL_RTT: Duration = Duration::from_millis(333);

#[derive(Clone, Debug)]
pub(super) struct Path {
    /// Bytes a second.
    pub(super) rate: f64,
    /// One way.
    pub(super) delay: Duration,
    /// Bytes that the queue holds.
    pub(super) queue: f64,
    /// Each way, 0 to 1.
    pub(super) loss: f64,
    /// Bytes of a token bucket in place of the queue.
    pub(super) policer: Option<f64>,
    /// Acknowledgements are late by up to this.
    pub(super) jitter: Duration,
}

impl Path {
    /// Of `mbit` Mbit/s and `rtt` ms with a queue of so many bandwidth-delay products.
    pub(super) fn new(mbit: f64, rtt: f64, queue: f64, loss: f64) -> Self {
        let rate = mbit * 1e6 / 8.0;
        Self {
            rate,
            delay: Duration::from_secs_f64(rtt / 2e3),
            queue: (rate * rtt / 1e3 * queue).max(3000.0),
            loss,
            policer: None,
            jitter: Duration::ZERO,
        }
    }
}

/// TCP CUBIC.
struct Tcp {
    cubic: Cubic,
    slow_start: Option<f64>,
    round_end: u64,
    round_rtt: Duration,
    last_rtt: Option<Duration>,
}

enum Kind {
    Ours(Box<Model>),
    Tcp(Tcp),
}

/// quinn's, with its numbers.
struct Pacer {
    capacity: f64,
    last_window: f64,
    tokens: f64,
    prev: Instant,
}

impl Pacer {
    fn delay(&mut self, srtt: Duration, bytes: f64, window: f64, now: Instant) -> Option<Instant> {
        if window != self.last_window {
            let burst = window * 2e6 / srtt.as_nanos().max(1) as f64;
            self.capacity = burst.clamp(10.0 * MTU as f64, 256.0 * MTU as f64);
            self.tokens = self.tokens.min(self.capacity);
            self.last_window = window;
        }
        if self.tokens >= bytes {
            return None;
        }
        let rtts = now.saturating_duration_since(self.prev).as_secs_f64() / srtt.as_secs_f64();
        self.tokens = (self.tokens + window * 1.25 * rtts).min(self.capacity);
        self.prev = now;
        if self.tokens >= bytes {
            return None;
        }
        let missing = (bytes.max(self.capacity) - self.tokens) / window;
        Some(now + srtt.mul_f64(0.8 * missing).max(Duration::from_micros(1)))
    }
}

struct Packet {
    number: u64,
    sent: Instant,
    done: bool,
}

pub(super) struct Flow {
    kind: Kind,
    start: Instant,
    /// Bytes still to send.
    left: u64,
    /// Has data for so long, then none for so long.
    turns: Option<(Duration, Duration)>,
    next: u64,
    packets: VecDeque<Packet>,
    in_flight: u64,
    largest: u64,
    srtt: Duration,
    var: Duration,
    pacer: Pacer,
    pacing: Option<Instant>,
    app_limited: bool,
    probes: u32,
    heard: Instant,
    /// The receiver's: what arrived, in order of arrival.
    received: Vec<u64>,
    unacked: u32,
    expected: u64,
    ack_due: Option<Instant>,
    processed: usize,
    pub(super) sent: u64,
    pub(super) lost: u64,
    delivered: u64,
    timeline: Vec<u64>,
    pub(super) done: Option<Instant>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Poll(usize),
    Arrive(usize, u64),
    AckDue(usize),
    Ack(usize, usize),
    Probe(usize, Instant),
    Sample,
}

pub(super) struct Sim {
    path: Path,
    begin: Instant,
    now: Instant,
    events: BinaryHeap<Reverse<(Instant, u64, Event)>>,
    number: u64,
    pub(super) flows: Vec<Flow>,
    drained: Instant,
    tokens: f64,
    tokens_at: Instant,
    queue: Vec<f64>,
    random: u64,
    changes: VecDeque<(Instant, Path)>,
}

impl Sim {
    pub(super) fn new(path: Path, seed: u64) -> Self {
        let now = Instant::now();
        let mut sim = Self {
            tokens: path.policer.unwrap_or_default(),
            path,
            begin: now,
            now,
            events: BinaryHeap::new(),
            number: 0,
            flows: Vec::new(),
            drained: now,
            tokens_at: now,
            queue: Vec::new(),
            random: seed.wrapping_mul(77_777),
            changes: VecDeque::new(),
        };
        sim.at(now, Event::Sample);
        sim
    }

    /// A flow with a [`Model`] that starts after so many seconds and has so many bytes to send.
    pub(super) fn ours(&mut self, start: f64, bytes: u64) -> usize {
        let begin = self.begin + Duration::from_secs_f64(start);
        let seed = self.random ^ self.flows.len() as u64;
        let model = Model::new(begin, MTU as u16, seed);
        self.flow(Kind::Ours(Box::new(model)), begin, bytes)
    }

    /// A TCP CUBIC flow without end.
    pub(super) fn tcp(&mut self, start: f64) -> usize {
        let initial = 10.0 * MTU as f64;
        let tcp = Tcp {
            cubic: Cubic::new(initial, MTU as f64, TCP_ALPHA),
            slow_start: Some(initial),
            round_end: 0,
            round_rtt: Duration::MAX,
            last_rtt: None,
        };
        let begin = self.begin + Duration::from_secs_f64(start);
        self.flow(Kind::Tcp(tcp), begin, u64::MAX)
    }

    fn flow(&mut self, kind: Kind, start: Instant, bytes: u64) -> usize {
        let burst = 10.0 * MTU as f64;
        self.flows.push(Flow {
            kind,
            start,
            left: bytes,
            turns: None,
            next: 0,
            packets: VecDeque::new(),
            in_flight: 0,
            largest: 0,
            srtt: Duration::ZERO,
            var: Duration::ZERO,
            pacer: Pacer {
                capacity: burst,
                last_window: 0.0,
                tokens: burst,
                prev: self.begin,
            },
            pacing: None,
            app_limited: false,
            probes: 0,
            heard: start,
            received: Vec::new(),
            unacked: 0,
            expected: 0,
            ack_due: None,
            processed: 0,
            sent: 0,
            lost: 0,
            delivered: 0,
            timeline: Vec::new(),
            done: None,
        });
        let number = self.flows.len() - 1;
        self.at(start, Event::Poll(number));
        number
    }

    /// The flow has data for `on` seconds, then none for `off` seconds, and so on.
    pub(super) fn in_turns(&mut self, flow: usize, on: f64, off: f64) {
        let turns = (Duration::from_secs_f64(on), Duration::from_secs_f64(off));
        self.flows[flow].turns = Some(turns);
    }

    /// The path changes after so many seconds.
    pub(super) fn change(&mut self, at: f64, path: Path) {
        let when = self.begin + Duration::from_secs_f64(at);
        self.changes.push_back((when, path));
    }

    /// Goes on until so many seconds have passed since the beginning.
    pub(super) fn run(&mut self, until: f64) {
        let end = self.begin + Duration::from_secs_f64(until);
        while let Some(Reverse((when, ..))) = self.events.peek()
            && *when <= end
        {
            let Some(Reverse((when, _, event))) = self.events.pop() else {
                break;
            };
            self.now = when;
            match event {
                Event::Poll(flow) => {
                    self.flows[flow].pacing = None;
                    self.poll(flow);
                }
                Event::Arrive(flow, number) => self.arrive(flow, number),
                Event::AckDue(flow) if self.flows[flow].ack_due == Some(when) => {
                    self.send_ack(flow)
                }
                Event::AckDue(_) => {}
                Event::Ack(flow, upto) => self.ack(flow, upto),
                Event::Probe(flow, heard) => self.probe(flow, heard),
                Event::Sample => self.sample(),
            }
        }
    }

    /// MB/s that arrived between two times, in seconds.
    pub(super) fn rate(&self, flow: usize, from: f64, to: f64) -> f64 {
        let timeline = &self.flows[flow].timeline;
        let at = |time: f64| timeline[((time * 100.0) as usize).min(timeline.len() - 1)];
        (at(to) - at(from)) as f64 / (to - from) / 1e6
    }

    /// The mean delay in the queue between two times, in seconds.
    pub(super) fn queue(&self, from: f64, to: f64) -> f64 {
        let to = ((to * 100.0) as usize).min(self.queue.len());
        let part = &self.queue[(from * 100.0) as usize..to];
        part.iter().sum::<f64>() / part.len() as f64
    }

    /// Seconds until the flow had sent everything and heard so.
    pub(super) fn seconds(&self, flow: usize) -> f64 {
        let done = self.flows[flow].done.expect("the flow is not done");
        (done - self.begin).as_secs_f64()
    }

    /// The share of its packets that the flow has lost, in per cent.
    pub(super) fn lost(&self, flow: usize) -> f64 {
        let flow = &self.flows[flow];
        flow.lost as f64 / flow.sent as f64 * 100.0
    }

    fn at(&mut self, when: Instant, event: Event) {
        self.number += 1;
        self.events.push(Reverse((when, self.number, event)));
    }

    fn sample(&mut self) {
        let backlog = self.drained.saturating_duration_since(self.now);
        self.queue.push(backlog.as_secs_f64());
        for flow in &mut self.flows {
            flow.timeline.push(flow.delivered);
        }
        if let Some((_, path)) = self.changes.pop_front_if(|(at, _)| *at <= self.now) {
            self.path = path;
        }
        self.at(self.now + SAMPLE, Event::Sample);
    }

    /// 0 to 1, by SplitMix64.
    fn chance(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.random;
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn is_lost(&mut self) -> bool {
        self.path.loss > 0.0 && self.chance() < self.path.loss
    }

    fn poll(&mut self, number: usize) {
        let now = self.now;
        loop {
            let flow = &mut self.flows[number];
            if now < flow.start {
                return;
            }
            if let Some((on, off)) = flow.turns {
                let into = (now - flow.start).as_nanos() % (on + off).as_nanos();
                if into >= on.as_nanos() {
                    flow.app_limited = true;
                    if flow.pacing.is_none() {
                        let wait = (on + off).as_nanos() - into;
                        let when = now + Duration::from_nanos(wait as u64);
                        flow.pacing = Some(when);
                        self.at(when, Event::Poll(number));
                    }
                    return;
                }
            }
            flow.app_limited = flow.left == 0;
            let window = match &flow.kind {
                Kind::Ours(model) => model.window() as f64,
                Kind::Tcp(tcp) => tcp
                    .slow_start
                    .unwrap_or_else(|| tcp.cubic.window(MTU as f64)),
            };
            if flow.left == 0 || (flow.in_flight + MTU) as f64 >= window {
                return;
            }
            if matches!(flow.kind, Kind::Ours(_)) {
                let srtt = if flow.srtt.is_zero() {
                    INITIAL_RTT
                } else {
                    flow.srtt
                };
                if let Some(when) = flow.pacer.delay(srtt, MTU as f64, window, now) {
                    if flow.pacing.is_none_or(|pacing| pacing > when) {
                        flow.pacing = Some(when);
                        self.at(when, Event::Poll(number));
                    }
                    return;
                }
                flow.pacer.tokens -= MTU as f64;
            }
            self.transmit(number);
        }
    }

    fn transmit(&mut self, number: usize) {
        let now = self.now;
        let flow = &mut self.flows[number];
        let packet = flow.next;
        flow.next += 1;
        flow.packets.push_back(Packet {
            number: packet,
            sent: now,
            done: false,
        });
        flow.in_flight += MTU;
        flow.sent += 1;
        flow.left = flow.left.saturating_sub(MTU);
        if let Kind::Ours(model) = &mut flow.kind {
            model.on_sent(now);
        }
        if flow.packets.len() == 1 {
            self.arm(number);
        }
        if self.is_lost() {
            return;
        }
        let size = (MTU + HEADERS) as f64;
        let leaves = if let Some(burst) = self.path.policer {
            let passed = now.saturating_duration_since(self.tokens_at).as_secs_f64();
            self.tokens = (self.tokens + passed * self.path.rate).min(burst);
            self.tokens_at = now;
            if self.tokens < size {
                return;
            }
            self.tokens -= size;
            now
        } else {
            let backlog = self.drained.saturating_duration_since(now).as_secs_f64();
            if backlog * self.path.rate + size > self.path.queue {
                return;
            }
            self.drained = self.drained.max(now) + Duration::from_secs_f64(size / self.path.rate);
            self.drained
        };
        self.at(leaves + self.path.delay, Event::Arrive(number, packet));
    }

    fn arrive(&mut self, number: usize, packet: u64) {
        let now = self.now;
        let flow = &mut self.flows[number];
        flow.received.push(packet);
        flow.delivered += MTU;
        let gap = packet != flow.expected;
        flow.expected = packet + 1;
        flow.unacked += 1;
        if flow.unacked >= 2 || gap {
            self.send_ack(number);
        } else if flow.ack_due.is_none() {
            let when = now + MAX_ACK_DELAY;
            flow.ack_due = Some(when);
            self.at(when, Event::AckDue(number));
        }
    }

    fn send_ack(&mut self, number: usize) {
        let flow = &mut self.flows[number];
        flow.ack_due = None;
        flow.unacked = 0;
        let upto = flow.received.len();
        if !self.is_lost() {
            let late = self.chance();
            let when = self.now + self.path.delay + self.path.jitter.mul_f64(late);
            self.at(when, Event::Ack(number, upto));
        }
    }

    /// Sets the probe timeout (RFC 9002, section 6.2).
    fn arm(&mut self, number: usize) {
        let flow = &self.flows[number];
        let timeout = if flow.srtt.is_zero() {
            INITIAL_RTT * 3
        } else {
            flow.srtt + (flow.var * 4).max(Duration::from_millis(1)) + MAX_ACK_DELAY
        };
        let when = self.now + timeout * 2u32.pow(flow.probes.min(6));
        self.at(when, Event::Probe(number, flow.heard));
    }

    fn probe(&mut self, number: usize, heard: Instant) {
        let flow = &mut self.flows[number];
        if flow.heard == heard && !flow.packets.is_empty() {
            flow.probes += 1;
            flow.left = flow.left.saturating_add(MTU);
            self.transmit(number);
            self.arm(number);
        }
    }

    fn ack(&mut self, number: usize, upto: usize) {
        let now = self.now;
        let flow = &mut self.flows[number];
        let first = flow
            .packets
            .front()
            .map_or(flow.next, |packet| packet.number);
        let mut newest: Option<(u64, Instant)> = None;
        let mut acked = Vec::new();
        while flow.processed < upto {
            let packet = flow.received[flow.processed];
            flow.processed += 1;
            let known = packet.checked_sub(first);
            let Some(packet) = known.and_then(|at| flow.packets.get_mut(at as usize)) else {
                continue;
            };
            if !packet.done {
                packet.done = true;
                flow.in_flight -= MTU;
                acked.push(packet.sent);
                newest = newest.max(Some((packet.number, packet.sent)));
            }
        }
        let Some((packet, sent)) = newest else { return };
        flow.heard = now;
        flow.probes = 0;
        flow.largest = flow.largest.max(packet);
        let rtt = now - sent;
        if flow.srtt.is_zero() {
            (flow.srtt, flow.var) = (rtt, rtt / 2);
        } else {
            flow.var = (flow.var * 3 + rtt.abs_diff(flow.srtt)) / 4;
            flow.srtt = (flow.srtt * 7 + rtt) / 8;
        }
        match &mut flow.kind {
            Kind::Ours(model) => {
                for sent in acked {
                    model.on_ack(now, sent, MTU);
                }
                model.on_end_acks(now, flow.in_flight, flow.app_limited);
            }
            Kind::Tcp(tcp) => {
                tcp.on_ack(now, acked.len() as u64 * MTU, rtt, flow.srtt);
                if packet >= tcp.round_end {
                    tcp.round_end = flow.next;
                    tcp.last_rtt = Some(tcp.round_rtt);
                    tcp.round_rtt = Duration::MAX;
                }
            }
        }
        self.detect_losses(number, rtt);
        let flow = &mut self.flows[number];
        if !flow.packets.is_empty() {
            self.arm(number);
        } else if flow.left == 0 && flow.done.is_none() {
            flow.done = Some(now);
        }
        self.poll(number);
    }

    fn detect_losses(&mut self, number: usize, rtt: Duration) {
        let now = self.now;
        let flow = &mut self.flows[number];
        let delay = flow.srtt.max(rtt).mul_f64(9.0 / 8.0);
        let mut lost = None;
        let mut bytes = 0;
        for packet in flow
            .packets
            .iter_mut()
            .take_while(|packet| packet.number < flow.largest)
        {
            let late = now.saturating_duration_since(packet.sent) >= delay;
            if !packet.done && (flow.largest >= packet.number + 3 || late) {
                packet.done = true;
                flow.in_flight -= MTU;
                flow.lost += 1;
                flow.left = flow.left.saturating_add(MTU);
                bytes += MTU;
                lost = Some(packet.sent);
            }
        }
        while flow.packets.pop_front_if(|packet| packet.done).is_some() {}
        if let Some(sent) = lost {
            match &mut flow.kind {
                Kind::Ours(model) => model.on_loss(now, sent, bytes),
                Kind::Tcp(tcp) => {
                    tcp.leave_slow_start();
                    tcp.cubic.on_loss(now, sent);
                }
            }
        }
    }
}

impl Tcp {
    fn on_ack(&mut self, now: Instant, bytes: u64, rtt: Duration, srtt: Duration) {
        self.round_rtt = self.round_rtt.min(rtt);
        let Some(window) = &mut self.slow_start else {
            self.cubic.on_ack(now, bytes as f64, MTU as f64, srtt);
            return;
        };
        *window += bytes as f64;
        if let Some(last) = self.last_rtt {
            let rise = (last / 8).clamp(Duration::from_millis(4), Duration::from_millis(16));
            if self.round_rtt >= last + rise && *window > 16.0 * MTU as f64 {
                self.leave_slow_start();
            }
        }
    }

    fn leave_slow_start(&mut self) {
        if let Some(window) = self.slow_start.take() {
            self.cubic = Cubic::new(window, MTU as f64, TCP_ALPHA);
        }
    }
}
