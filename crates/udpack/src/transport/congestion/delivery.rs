//! Samples of the delivery rate (draft-cheng-iccrg-delivery-rate-estimation), from what quinn tells a controller.
//!
//! quinn keeps no state of a controller for each packet, so each *instant* of sending is remembered, with the bytes
//! delivered until then. An acknowledged packet is found by the instant of its sending.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Instants remembered; further ones count as the last of these. 10 packets an instant are the least with a full
/// window, so this is a window of more than 200 MB.
const MOST: usize = 1 << 14;
/// How long beyond three round trips a packet's acknowledgement is awaited, for peers that delay theirs.
const PATIENCE: Duration = Duration::from_millis(100);

/// The purpose of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Cruise,
    Up,
    Down,
    Other,
}

#[derive(Debug, Clone)]
struct Sending {
    at: Instant,
    /// Bytes delivered when this was sent, and when the last of them was.
    delivered: u64,
    delivered_at: Instant,
    /// When the packet was sent that was acknowledged last.
    first_sent: Instant,
    purpose: Purpose,
    app_limited: bool,
}

/// In the order of their instants. The only one needs no memory of its own: where there is one packet at a time, that
/// would be made and given back for each.
#[derive(Debug, Clone, Default)]
struct Sendings {
    first: Option<Sending>,
    others: VecDeque<Sending>,
}

impl Sendings {
    fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.others.len()
    }

    fn front(&self) -> Option<&Sending> {
        self.first.as_ref().or_else(|| self.others.front())
    }

    fn back(&self) -> Option<&Sending> {
        self.others.back().or(self.first.as_ref())
    }

    fn push_back(&mut self, sending: Sending) {
        if self.others.is_empty() && self.first.is_none() {
            self.first = Some(sending);
        } else {
            self.others.push_back(sending);
        }
    }

    fn pop_front(&mut self) {
        if self.first.take().is_none() {
            self.others.pop_front();
        }
    }

    fn clear(&mut self) {
        *self = Self::default();
    }

    /// Frees memory when most of it is unused.
    fn trim(&mut self) {
        let (used, room) = (self.others.len(), self.others.capacity());
        if room > 8 && used < room / 4 {
            self.others.shrink_to(used * 2);
        }
    }

    fn find(&self, at: Instant) -> Option<&Sending> {
        if let Some(first) = self.first.as_ref().filter(|first| first.at == at) {
            return Some(first);
        }
        // Where there is one packet at a time, that is the last.
        if let Some(last) = self.others.back().filter(|last| last.at == at) {
            return Some(last);
        }
        let found = self.others.binary_search_by(|sending| sending.at.cmp(&at));
        self.others.get(found.ok()?)
    }
}

/// The result of one batch of acknowledgements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// Bytes acknowledged.
    pub(super) acked: u64,
    /// The RTT of the newest packet among them.
    pub(super) rtt: Duration,
    /// The delivery rate in bytes per second, and whether the sender was limited by its data.
    pub(super) rate: Option<(f64, bool)>,
    /// A packet sent after the last round ended has arrived.
    pub(super) round_ended: bool,
}

/// Tracks sent and delivered packets.
#[derive(Debug, Clone)]
pub(super) struct Delivery {
    sendings: Sendings,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
    idle: bool,
    app_limited_until: u64,
    round_end: u64,
    acked: u64,
    newest: Option<Instant>,
    /// The RTT of the newest packet of the last batch.
    rtt: Duration,
}

impl Delivery {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            sendings: Sendings::default(),
            delivered: 0,
            delivered_at: now,
            first_sent: now,
            idle: true,
            app_limited_until: 0,
            round_end: 0,
            acked: 0,
            newest: None,
            rtt: Duration::from_secs(1),
        }
    }

    pub(super) fn on_sent(&mut self, now: Instant, purpose: Purpose) {
        if self.idle {
            self.idle = false;
            self.first_sent = now;
            self.delivered_at = now;
        }
        let known = self.sendings.back().is_some_and(|last| last.at >= now);
        if known {
            return;
        }
        self.forget(now);
        if self.sendings.len() >= MOST {
            return;
        }
        self.sendings.push_back(Sending {
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            purpose,
            app_limited: self.app_limited_until > self.delivered,
        });
    }

    /// Removes instants for which no acknowledgement is expected any more. quinn also reports packets that only
    /// acknowledge and are not acknowledged themselves: without this, a receiver would remember all of them.
    fn forget(&mut self, now: Instant) {
        let keep = self.rtt * 3 + PATIENCE;
        while let Some(first) = self.sendings.front()
            && now.saturating_duration_since(first.at) > keep
        {
            self.sendings.pop_front();
        }
        self.sendings.trim();
    }

    /// The purpose of the packets sent at this instant.
    pub(super) fn purpose(&self, sent: Instant) -> Purpose {
        self.sendings
            .find(sent)
            .map_or(Purpose::Other, |sending| sending.purpose)
    }

    pub(super) fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        self.delivered_at = now;
        self.acked += bytes;
        self.newest = self.newest.max(Some(sent));
    }

    /// The batch of acknowledgements is complete. `min_rtt` is the least time that a rate may be measured over.
    pub(super) fn end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        min_rtt: Duration,
    ) -> Option<Sample> {
        let acked = std::mem::take(&mut self.acked);
        let newest = self.newest.take()?;
        let rtt = now.saturating_duration_since(newest);
        self.rtt = rtt;
        if app_limited {
            self.app_limited_until = self.delivered + in_flight.max(1);
        }
        self.idle = in_flight == 0;
        let mut sample = Sample {
            acked,
            rtt,
            rate: None,
            round_ended: false,
        };
        if let Some(sending) = self.sendings.find(newest).cloned() {
            self.first_sent = self.first_sent.max(sending.at);
            let send_elapsed = sending.at.saturating_duration_since(sending.first_sent);
            let ack_elapsed = now.saturating_duration_since(sending.delivered_at);
            let interval = send_elapsed.max(ack_elapsed);
            if interval >= min_rtt.min(rtt) && !interval.is_zero() {
                let bytes = self.delivered.saturating_sub(sending.delivered) as f64;
                sample.rate = Some((bytes / interval.as_secs_f64(), sending.app_limited));
            }
            sample.round_ended = sending.delivered >= self.round_end;
        }
        if in_flight == 0 {
            // No acknowledgement is expected; an idle connection needs no memory.
            self.sendings.clear();
            return Some(sample);
        }
        // A packet that is neither acknowledged nor lost two round trips later is asked for no more.
        let keep = rtt * 2;
        while let Some(first) = self.sendings.front()
            && newest.saturating_duration_since(first.at) > keep
        {
            self.sendings.pop_front();
        }
        Some(sample)
    }

    /// Starts a round, which ends when a packet sent from now on arrives.
    pub(super) fn begin_round(&mut self) {
        self.round_end = self.delivered;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn measures_what_arrives_a_second() {
        let begin = Instant::now();
        let mut delivery = Delivery::new(begin);
        // 1000 bytes every ms, each back after 10 ms.
        let mut rate = None;
        for ms in 0..40u32 {
            let now = begin + MS * ms;
            if ms >= 10 {
                delivery.on_ack(now, now - MS * 10, 1000);
                let sample = delivery.end_acks(now, 10_000, false, MS * 10).unwrap();
                assert_eq!(sample.rtt, MS * 10);
                assert_eq!(sample.acked, 1000);
                rate = sample.rate.or(rate);
            }
            delivery.on_sent(now, Purpose::Cruise);
        }
        let (rate, app_limited) = rate.expect("samples");
        assert!((rate - 1e6).abs() < 1e3, "{rate}");
        assert!(!app_limited);
        assert!(delivery.sendings.len() <= 32);
    }

    #[test]
    fn a_pause_is_not_measured_as_a_slow_path() {
        let begin = Instant::now();
        let mut delivery = Delivery::new(begin);
        delivery.on_sent(begin, Purpose::Other);
        delivery.on_ack(begin + MS * 10, begin, 1000);
        let sample = delivery
            .end_acks(begin + MS * 10, 0, true, MS * 10)
            .unwrap();
        assert!(sample.round_ended);
        let later = begin + MS * 5000;
        delivery.on_sent(later, Purpose::Other);
        delivery.on_ack(later + MS * 10, later, 10_000);
        let sample = delivery
            .end_acks(later + MS * 10, 0, false, MS * 10)
            .unwrap();
        let (rate, app_limited) = sample.rate.unwrap();
        assert!((rate - 1e6).abs() < 1e3, "{rate}");
        assert!(app_limited, "sent when there was nothing more to send");
    }

    #[test]
    fn what_was_never_sent_is_no_sample() {
        let begin = Instant::now();
        let mut delivery = Delivery::new(begin);
        assert!(delivery.end_acks(begin, 0, false, MS).is_none());
        delivery.on_ack(begin, begin + MS * 7, 1000);
        let sample = delivery.end_acks(begin, 0, false, MS).unwrap();
        assert!(sample.rate.is_none() && !sample.round_ended);
        assert_eq!(sample.rtt, Duration::ZERO);
        assert_eq!(delivery.purpose(begin), Purpose::Other);
    }

    #[test]
    fn who_only_acknowledges_remembers_little() {
        let begin = Instant::now();
        let mut delivery = Delivery::new(begin);
        delivery.on_sent(begin, Purpose::Other);
        delivery.on_ack(begin + MS, begin, 1000);
        delivery.end_acks(begin + MS, 0, true, MS).unwrap();
        for ms in 2..60_000 {
            delivery.on_sent(begin + MS * ms, Purpose::Other);
        }
        assert!(delivery.sendings.len() <= 110);
        let later = begin + MS * 120_000;
        delivery.on_sent(later, Purpose::Other);
        assert_eq!(delivery.sendings.len(), 1);
        assert!(delivery.sendings.others.capacity() <= 8);
        delivery.on_ack(later + MS, later, 1000);
        assert!(delivery.end_acks(later + MS, 0, true, MS).is_some());
    }

    #[test]
    fn remembers_so_many_instants_and_no_more() {
        let begin = Instant::now();
        let mut delivery = Delivery::new(begin);
        for at in 0..MOST as u32 + 100 {
            delivery.on_sent(begin + Duration::from_micros(1) * at, Purpose::Up);
        }
        assert_eq!(delivery.sendings.len(), MOST);
    }
}
