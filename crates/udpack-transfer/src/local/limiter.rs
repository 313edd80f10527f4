//! [`Limiter`]: limits the bytes per second of all lanes together.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;
use udpack::Stats;

use crate::wire::CHUNK;

/// The most bytes of a message besides those of the file: a `put` has the longest path and some numbers.
const HEADER: usize = 2048;
/// The smallest chunk at a low rate, in bytes.
pub(crate) const SMALLEST: usize = 4 << 10;
/// The burst after a pause, as a fraction of the bytes per second.
const BURST: u64 = 8;
/// The longest time that one chunk should take.
const PATIENCE: Duration = Duration::from_secs(2);

/// A bucket of bytes that fills at a steady rate. Clones share one bucket; waiting callers are served in the
/// order in which they came: lanes that share a limiter get equal turns.
#[derive(Debug, Clone)]
pub struct Limiter {
    inner: Option<Arc<Inner>>,
}

#[derive(Debug)]
struct Inner {
    /// Bytes a second, at least 1.
    rate: u64,
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// Bytes that may be sent now; negative after more than a burst was taken at once.
    level: f64,
    at: Instant,
}

impl Limiter {
    /// Permits this many bytes per second; 0 counts as 1. A burst has at most an eighth of that, or one chunk.
    pub fn new(bytes_per_second: u64) -> Self {
        let rate = bytes_per_second.max(1);
        let bucket = Mutex::new(Bucket {
            level: burst(rate),
            at: Instant::now(),
        });
        Self {
            inner: Some(Arc::new(Inner { rate, bucket })),
        }
    }

    /// No limit.
    pub fn unlimited() -> Self {
        Self { inner: None }
    }

    /// Bytes a second; `None` without a limit.
    pub fn rate(&self) -> Option<u64> {
        self.inner.as_ref().map(|inner| inner.rate)
    }

    /// Whether there is a limit at all.
    pub(crate) fn is_limited(&self) -> bool {
        self.inner.is_some()
    }

    /// Waits until this many bytes may be sent, and takes them from the bucket.
    ///
    /// # Cancel safety
    /// A dropped future has taken nothing and loses its place.
    pub async fn take(&self, bytes: u64) {
        let Some(inner) = self.inner.as_deref().filter(|_| bytes > 0) else {
            return;
        };
        let (rate, burst) = (inner.rate as f64, burst(inner.rate));
        // Later callers wait for the lock, which is granted in order.
        let mut bucket = inner.bucket.lock().await;
        bucket.fill(rate, burst);
        let missing = (bytes as f64).min(burst) - bucket.level;
        if missing > 0.0 {
            // At most a day, so that times stay representable; no sensible rate waits that long.
            let wait = (missing / rate).min(86_400.0);
            tokio::time::sleep(Duration::from_secs_f64(wait)).await;
            bucket.fill(rate, burst);
        }
        bucket.level -= bytes as f64;
    }

    /// The best size of a chunk, in bytes: a power of two, smaller at lower rates.
    pub fn chunk(&self) -> usize {
        self.inner.as_ref().map_or(CHUNK, |inner| chunk(inner.rate))
    }
}

/// The size of one lane's chunks: within the limit, and small enough that each arrives in seconds.
///
/// A receiver counts, keeps and confirms whole chunks only, and gives up a message or an upload that takes too long.
/// On a slow path large chunks would never arrive, even after many attempts. Clones share one size: the lane adapts
/// it, its reader uses it.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    limiter: Limiter,
    lanes: u64,
    /// The most bytes of file that fit into one message.
    most: usize,
    size: Arc<AtomicUsize>,
}

impl Pace {
    /// Creates the pace of one of `lanes` lanes of a socket, whose peer accepts frames of `frame` bytes.
    pub(crate) fn new(limiter: &Limiter, lanes: usize, frame: usize) -> Self {
        Self {
            limiter: limiter.clone(),
            lanes: (lanes as u64).max(1),
            most: frame.saturating_sub(HEADER).max(1),
            size: Arc::new(AtomicUsize::new(CHUNK)),
        }
    }

    /// Adapts the size to the current speed of the path: one window each round trip.
    pub(crate) fn adapt(&self, stats: &Stats) {
        self.size
            .store(path_chunk(stats.cwnd, stats.rtt, self.lanes), Relaxed);
    }

    /// The size for the next chunk, in bytes.
    pub(crate) fn chunk(&self) -> usize {
        let size = self.limiter.chunk().min(self.size.load(Relaxed));
        size.min(self.most)
    }
}

impl Default for Limiter {
    /// No limit.
    fn default() -> Self {
        Self::unlimited()
    }
}

impl Bucket {
    fn fill(&mut self, rate: f64, burst: f64) {
        let now = Instant::now();
        let gained = (now - self.at).as_secs_f64() * rate;
        self.level = (self.level + gained).min(burst);
        self.at = now;
    }
}

fn chunk(rate: u64) -> usize {
    chunk_within(rate / BURST)
}

/// The largest good size of a chunk that is at most `bytes`.
fn chunk_within(bytes: u64) -> usize {
    let mut chunk = CHUNK;
    while chunk > SMALLEST && chunk as u64 > bytes {
        chunk /= 2;
    }
    chunk
}

/// The bytes that one of `lanes` sends over a path with this window and round-trip time in [`PATIENCE`].
fn path_chunk(window: u64, rtt: Duration, lanes: u64) -> usize {
    let trips = PATIENCE.as_secs_f64() / rtt.as_secs_f64().max(1e-6);
    // A float becomes an integer by saturation.
    chunk_within((window as f64 * trips) as u64 / lanes)
}

fn burst(rate: u64) -> f64 {
    (rate / BURST).max(chunk(rate) as u64) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_kept_and_a_burst_is_small() {
        let limiter = Limiter::new(1 << 20);
        let since = Instant::now();
        limiter.take(128 << 10).await;
        assert_eq!(since.elapsed(), Duration::ZERO, "the burst");
        for _ in 0..80 {
            limiter.take(128 << 10).await;
        }
        let took = since.elapsed().as_secs_f64();
        assert!((9.9..10.2).contains(&took), "{took}");
        // A long pause gives no more than one burst.
        tokio::time::sleep(Duration::from_secs(100)).await;
        let since = Instant::now();
        limiter.take(128 << 10).await;
        limiter.take(128 << 10).await;
        let took = since.elapsed().as_secs_f64();
        assert!((0.12..0.13).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn more_than_a_burst_is_paid_for_by_the_next() {
        let limiter = Limiter::new(80_000);
        let since = Instant::now();
        limiter.take(80_000).await;
        limiter.take(10_000).await;
        let took = since.elapsed().as_secs_f64();
        assert!((0.9..1.1).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn clones_share_and_wait_in_turn() {
        let limiter = Limiter::new(1 << 20);
        // The burst is nobody's turn.
        limiter.take(128 << 10).await;
        let mut tasks = tokio::task::JoinSet::new();
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        for lane in 0..4 {
            let (limiter, order) = (limiter.clone(), order.clone());
            tasks.spawn(async move {
                for _ in 0..10 {
                    limiter.take(128 << 10).await;
                    order.lock().unwrap().push(lane);
                }
            });
        }
        while tasks.join_next().await.is_some() {}
        for turn in order.lock().unwrap().chunks(4) {
            let mut turn = turn.to_vec();
            turn.sort_unstable();
            assert_eq!(turn, [0, 1, 2, 3], "each its turn");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_waiting_takes_nothing() {
        let limiter = Limiter::new(1 << 20);
        limiter.take(128 << 10).await;
        for _ in 0..100 {
            let taking = limiter.take(128 << 10);
            let given_up = tokio::time::timeout(Duration::from_millis(1), taking).await;
            assert!(given_up.is_err());
            // The bucket fills by 1 ms each time; stop before it is enough.
            if limiter.inner.as_ref().unwrap().bucket.lock().await.level > 100_000.0 {
                break;
            }
        }
        let since = Instant::now();
        limiter.take(128 << 10).await;
        assert!(since.elapsed() < Duration::from_millis(125));
    }

    #[test]
    fn chunks_get_smaller_with_the_path() {
        let millis = Duration::from_millis;
        // Loopback, a good line far away, and one datagram of five lost on it.
        assert_eq!(path_chunk(14_000, Duration::from_micros(200), 4), CHUNK);
        assert_eq!(path_chunk(14_000, Duration::ZERO, 4), CHUNK);
        assert_eq!(path_chunk(1 << 20, millis(200), 4), CHUNK);
        assert_eq!(path_chunk(2_800, millis(100), 4), 8 << 10);
        // 64 kbit/s with everything queued; nothing at all.
        assert_eq!(path_chunk(12_000, millis(1500), 4), SMALLEST);
        assert_eq!(path_chunk(0, millis(1500), 4), SMALLEST);
        assert_eq!(path_chunk(u64::MAX, Duration::ZERO, 1), CHUNK);

        let pace = Pace::new(&Limiter::new(100_000), 4, 1 << 20);
        assert_eq!(pace.chunk(), 8 << 10, "the limit counts as well");
        let pace = |frame| Pace::new(&Limiter::unlimited(), 0, frame).chunk();
        assert_eq!(pace(1 << 20), CHUNK);
        assert_eq!(pace(CHUNK), CHUNK - HEADER, "what the peer takes, no more");
        assert_eq!(pace(0), 1);
    }

    #[test]
    fn chunks_get_smaller_with_the_rate() {
        assert_eq!(Limiter::unlimited().chunk(), CHUNK);
        assert_eq!(Limiter::new(1 << 30).chunk(), CHUNK);
        assert_eq!(Limiter::new(1 << 20).chunk(), 128 << 10);
        assert_eq!(Limiter::new(100_000).chunk(), 8 << 10);
        assert_eq!(Limiter::new(0).chunk(), SMALLEST);
    }
}
