//! QUIC, and TCP a little later, for networks that let no UDP pass.
//!
//! Over TCP it takes three round trips until a session can begin, over QUIC one. The first of the three costs a server
//! next to nothing and begins early; the others wait for as long as QUIC may still answer.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::client::race::PAUSE;

/// How long QUIC has begun before TCP connects: the least that RFC 8305 recommends. Where QUIC passes, a handshake takes
/// as long as TCP's connecting or less, so that it is over when TCP is connected, on any path.
const CONNECT: Duration = Duration::from_millis(100);
/// How long QUIC has begun before more goes over TCP than its connecting.
const SPEAK: Duration = PAUSE;

/// The time that QUIC has for itself. It is over as soon as QUIC has failed.
#[derive(Clone)]
pub(super) struct HeadStart {
    begun: Instant,
    over: CancellationToken,
}

impl HeadStart {
    /// A head start that is over.
    pub(super) fn none() -> Self {
        let none = Self {
            begun: Instant::now(),
            over: CancellationToken::new(),
        };
        none.over.cancel();
        none
    }

    /// Waits until more may go over TCP than its connecting.
    pub(super) async fn may_speak(self) {
        self.until(SPEAK).await;
    }

    async fn until(&self, after: Duration) {
        // Whichever it was, the wait is over.
        let _ = timeout_at(self.begun + after, self.over.cancelled()).await;
    }
}

/// Connects by `quic`, and by `tcp` as well unless QUIC is sooner; drops the later one. `at_once`: without a head start for
/// QUIC. If neither connects, returns both errors, QUIC's first.
///
/// # Cancel safety
/// A dropped future drops both.
pub(super) async fn beside<T, E, F: Future<Output = Result<T, E>>>(
    at_once: bool,
    quic: impl Future<Output = Result<T, E>>,
    tcp: impl FnOnce(HeadStart) -> F,
) -> Result<T, [E; 2]> {
    let head_start = HeadStart {
        begun: Instant::now(),
        over: CancellationToken::new(),
    };
    if at_once {
        head_start.over.cancel();
    }
    let mut quic = std::pin::pin!(async {
        let reached = quic.await;
        head_start.over.cancel();
        reached
    });
    let mut tcp = std::pin::pin!(async {
        head_start.until(CONNECT).await;
        tcp(head_start.clone()).await
    });
    tokio::select! {
        biased;
        reached = &mut quic => match reached {
            Ok(won) => Ok(won),
            Err(first) => tcp.await.map_err(|second| [first, second]),
        },
        reached = &mut tcp => match reached {
            Ok(won) => Ok(won),
            Err(second) => quic.await.map_err(|first| [first, second]),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::net::SocketAddr;

    use super::*;
    use crate::client::race::race;

    /// What a path does to UDP.
    #[derive(Clone, Copy, PartialEq)]
    enum Udp {
        Passes,
        Vanishes,
        /// After so many milliseconds it is known that none passes.
        FailsAfter(u64),
    }

    /// Connects over a path with this round trip, in milliseconds. Returns who has won, and what has begun when.
    async fn connect(
        udp: Udp,
        trip: u64,
        at_once: bool,
    ) -> (&'static str, Vec<(&'static str, u64)>) {
        let begun = Instant::now();
        let seen = RefCell::new(Vec::new());
        let note = |what| {
            seen.borrow_mut()
                .push((what, begun.elapsed().as_millis() as u64))
        };
        let trips =
            async |count: u32| tokio::time::sleep(Duration::from_millis(trip) * count).await;
        let quic = async {
            match udp {
                Udp::Passes => trips(1).await,
                Udp::Vanishes => std::future::pending().await,
                Udp::FailsAfter(after) => {
                    tokio::time::sleep(Duration::from_millis(after)).await;
                    return Err("refused");
                }
            }
            Ok("quic")
        };
        let (note, trips) = (&note, &trips);
        let tcp = |head_start: HeadStart| async move {
            note("connect");
            trips(1).await;
            head_start.may_speak().await;
            note("speak");
            // TLS, and the WebSocket.
            trips(2).await;
            note("ready");
            Ok("tcp")
        };
        let won = beside(at_once, quic, tcp).await;
        (won.expect("one of them"), seen.into_inner())
    }

    #[tokio::test(start_paused = true)]
    async fn where_udp_passes_a_server_sees_no_more_of_tcp_than_its_connecting() {
        for trip in [0, 20, 99, 101, 150, 300, 2000] {
            let (won, seen) = connect(Udp::Passes, trip, false).await;
            assert_eq!(won, "quic");
            let expected: &[_] = match trip > 100 {
                true => &[("connect", 100)],
                false => &[],
            };
            assert_eq!(seen, expected, "a round trip of {trip} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn where_no_udp_passes_tcp_is_ready_at_most_300_ms_and_a_trip_later_than_quic() {
        for trip in (0..=200).step_by(10) {
            let (won, seen) = connect(Udp::Vanishes, trip, false).await;
            assert_eq!(won, "tcp");
            let speak = 250.max(100 + trip);
            let expected = [
                ("connect", 100),
                ("speak", speak),
                ("ready", speak + 2 * trip),
            ];
            assert_eq!(seen, expected, "a round trip of {trip} ms");
            // QUIC would be ready after one trip.
            let later = speak + 2 * trip - trip;
            assert!(later <= 300 + trip, "{later} ms later with {trip} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_waits_for_quic_once_it_has_failed_or_where_tcp_won_before() {
        for (udp, at_once, connect_at, speak_at) in [
            (Udp::FailsAfter(5), false, 5, 25),
            (Udp::FailsAfter(110), false, 100, 120),
            (Udp::FailsAfter(170), false, 100, 170),
            (Udp::Vanishes, true, 0, 20),
        ] {
            let (won, seen) = connect(udp, 20, at_once).await;
            assert_eq!(won, "tcp");
            let expected = [
                ("connect", connect_at),
                ("speak", speak_at),
                ("ready", speak_at + 40),
            ];
            assert_eq!(seen, expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_without_a_route_takes_nothing_from_quics_time_at_the_next() {
        let no_route = SocketAddr::from(([10, 0, 0, 1], 1));
        let server = SocketAddr::from(([10, 0, 0, 2], 1));
        let tcp_began = &Cell::new(false);
        let fails_at_once = async |address| {
            if address == no_route {
                return Err("no route");
            }
            tokio::time::sleep(Duration::from_millis(90)).await;
            Ok(())
        };
        let fails_at_once = &fails_at_once;
        let raced = race(vec![no_route, server], |address| {
            beside(false, fails_at_once(address), move |_| {
                tcp_began.set(tcp_began.get() || address == server);
                fails_at_once(address)
            })
        });
        assert_eq!(raced.await, Ok(()));
        assert!(!tcp_began.get(), "QUIC has 100 ms");
    }

    #[tokio::test(start_paused = true)]
    async fn both_errors_are_told_whichever_came_first() {
        for (quic, tcp) in [(10, 10), (10, 500), (500, 10)] {
            let fails = async |after, error| {
                tokio::time::sleep(Duration::from_millis(after)).await;
                Err::<(), _>(error)
            };
            let outcome = beside(false, fails(quic, "quic"), |_| fails(tcp, "tcp"));
            assert_eq!(outcome.await, Err(["quic", "tcp"]));
        }
    }
}
