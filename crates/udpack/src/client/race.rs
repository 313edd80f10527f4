//! Trying several addresses of a server at once, each a little later than the one before it (RFC 8305).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

/// How long an attempt is alone before the next one begins: what RFC 8305 recommends.
pub(super) const PAUSE: Duration = Duration::from_millis(250);
/// Most addresses of one name that are tried. Each costs a socket until the race is over.
const MOST: usize = 32;

/// The order in which these addresses are tried: `last`, where it is one of them, before the others, which stay in the
/// order of the resolver; then IPv6 and IPv4 take turns, so that one family without a route does not delay the other.
pub(crate) fn in_turn(addresses: Vec<SocketAddr>, last: Option<SocketAddr>) -> Vec<SocketAddr> {
    let mut sorted = addresses;
    // Stable: the others keep their order.
    sorted.sort_by_key(|address| Some(*address) != last);
    let first_is_v6 = sorted.first().is_some_and(SocketAddr::is_ipv6);
    let (mut these, mut others): (VecDeque<_>, VecDeque<_>) = sorted
        .into_iter()
        .partition(|address| address.is_ipv6() == first_is_v6);
    let mut order: Vec<SocketAddr> = Vec::new();
    while let Some(address) = these.pop_front() {
        if !others.is_empty() {
            std::mem::swap(&mut these, &mut others);
        }
        if !order.contains(&address) && order.len() < MOST {
            order.push(address);
        }
    }
    order
}

/// Tries the addresses until one succeeds, then drops the other attempts. If none succeeds, returns each address with
/// its error, in the order in which they were tried.
///
/// # Cancel safety
/// A dropped future drops all attempts.
pub(crate) async fn race<T, E, F: Future<Output = Result<T, E>>>(
    addresses: Vec<SocketAddr>,
    attempt: impl Fn(SocketAddr) -> F,
) -> Result<T, Vec<(SocketAddr, E)>> {
    let mut waiting = addresses.into_iter().enumerate().peekable();
    let mut running = FuturesUnordered::new();
    let mut failed: Vec<(usize, SocketAddr, E)> = Vec::new();
    let mut due = Instant::now();
    loop {
        // Without a timer if there is nothing to wait for, because a timer takes a millisecond.
        while Instant::now() >= due
            && let Some((at, address)) = waiting.next()
        {
            let made = attempt(address);
            running.push(async move { (at, address, made.await) });
            due = Instant::now() + PAUSE;
        }
        tokio::select! {
            biased;
            Some((at, address, ended)) = running.next() => match ended {
                Ok(won) => return Ok(won),
                Err(error) => {
                    failed.push((at, address, error));
                    due = Instant::now();
                }
            },
            () = tokio::time::sleep_until(due), if waiting.peek().is_some() => {}
            else => break,
        }
    }
    failed.sort_by_key(|(at, ..)| *at);
    let failed = failed.into_iter();
    Err(failed.map(|(_, address, error)| (address, error)).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const V4: [&str; 3] = ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"];
    const V6: [&str; 3] = ["[fd00::1]:1", "[fd00::2]:1", "[fd00::3]:1"];

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn order(texts: &[&str], last: Option<&str>) -> Vec<String> {
        let last = last.map(|text| text.parse().unwrap());
        let order = in_turn(addresses(texts), last);
        order.iter().map(SocketAddr::to_string).collect()
    }

    #[test]
    fn the_families_take_turns_in_the_resolvers_order() {
        let ([a, b, c], [x, y, z]) = (V4, V6);
        assert_eq!(order(&[x, y, a, b], None), [x, a, y, b]);
        assert_eq!(order(&[a, x, y, z], None), [a, x, y, z]);
        assert_eq!(order(&[a, b, c, x], None), [a, x, b, c]);
        assert_eq!(order(&[a, a, b, a], None), [a, b]);
        assert_eq!(order(&[], None), [""; 0]);
    }

    #[test]
    fn what_worked_last_comes_first() {
        let ([a, b, c], [x, y, _]) = (V4, V6);
        assert_eq!(order(&[x, y, a, b], Some(b)), [b, x, a, y]);
        assert_eq!(order(&[a, b], Some(c)), [a, b], "it has left the name");
    }

    #[test]
    fn a_name_with_very_many_addresses_is_not_tried_at_all_of_them() {
        let many = (0..4000).map(|n| SocketAddr::from(([10, 1, (n >> 8) as u8, n as u8], 1)));
        assert_eq!(in_turn(many.collect(), None).len(), MOST);
    }

    /// Runs a race among as many addresses as there are outcomes (when it ends, and whether it wins), and says who won and
    /// when each began, in milliseconds.
    async fn run(outcomes: &[(u64, bool)]) -> (Result<usize, Vec<usize>>, Vec<u64>) {
        let begun = Instant::now();
        let starts = Mutex::new(Vec::new());
        let addresses = (0..outcomes.len()).map(|n| SocketAddr::from(([10, 0, 0, 1], n as u16)));
        let outcome = race(addresses.collect(), |address| {
            let number = usize::from(address.port());
            let (takes, wins) = outcomes[number];
            let now = begun.elapsed().as_millis() as u64;
            starts.lock().unwrap().push(now);
            async move {
                tokio::time::sleep(Duration::from_millis(takes)).await;
                if wins { Ok(number) } else { Err(number) }
            }
        });
        let outcome = tokio::time::timeout(Duration::from_secs(600), outcome).await;
        let outcome = outcome.expect("a race ends");
        let errors =
            |errors: Vec<(SocketAddr, usize)>| errors.into_iter().map(|(_, n)| n).collect();
        (outcome.map_err(errors), starts.into_inner().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_begin_250_ms_apart_or_when_one_has_failed() {
        let mute = (10_000, false);
        let (won, starts) = run(&[mute, mute, mute, mute, (20, true)]).await;
        assert_eq!((won, starts), (Ok(4), vec![0, 250, 500, 750, 1000]));
        let (won, starts) = run(&[(10, false), (10, false), mute, (20, true)]).await;
        assert_eq!((won, starts), (Ok(3), vec![0, 10, 20, 270]));
        // An earlier one may fail late, and win late.
        let (won, starts) = run(&[(300, false), mute, (400, true), mute]).await;
        assert_eq!((won, starts), (Ok(2), vec![0, 250, 300, 550]));
        let (won, starts) = run(&[(300, true), mute, mute]).await;
        assert_eq!((won, starts), (Ok(0), vec![0, 250]));
    }

    #[tokio::test(start_paused = true)]
    async fn errors_come_in_the_order_of_the_attempts() {
        let (won, _) = run(&[(900, false), (10, false), (400, false)]).await;
        assert_eq!(won, Err(vec![0, 1, 2]));
        assert_eq!(run(&[]).await.0, Err(vec![]));
    }
}
