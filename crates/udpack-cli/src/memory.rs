//! Returns unused memory to the system while the program is idle.
//!
//! The programs' allocator keeps pages that were freed for a second, in case they are wanted again, and looks for those
//! whose time is up only when some thread allocates or ends. A program that falls idle after much work does neither, and
//! would keep tens of MB until the next activity. So after work a thread is started that ends at once.

use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::MissedTickBehavior;

/// How often the processor time is checked; longer than the allocator keeps pages.
const LOOK: Duration = Duration::from_secs(2);
/// Processor time that counts as work: far more than a connection costs that is only kept alive.
const WORK: Duration = Duration::from_millis(10);
/// How many threads end after work, at one look each: the first may be too early for what was freed just before it.
const ENDS: u32 = 2;

/// Runs for ever. It reads a clock each [`LOOK`], and after work starts two threads of 0.1 ms.
pub(crate) async fn give_back() {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = worked();
    let mut left = ENDS;
    loop {
        ticks.tick().await;
        let now = worked();
        if now.saturating_sub(seen) >= WORK {
            seen = now;
            left = ENDS;
        }
        if left > 0 {
            left -= 1;
            // If no thread can be started, the memory is kept until the next try.
            let _ = thread::Builder::new()
                .name("memory".to_owned())
                .spawn(|| ());
        }
    }
}

/// Processor time that this process has taken.
fn worked() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}
