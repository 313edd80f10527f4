//! Wakes the task that drives a session: one bit for each cause, and one waker for all causes. A `Notify` and a
//! future for each cause took some 100 bytes of every idle socket.

use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

/// One flag: a bit, chosen by the owner of the [`WakeFlags`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WakeFlag(pub(crate) u8);

/// Flags with one waker: a single task waits for some of them at a time.
#[derive(Debug, Default)]
pub(crate) struct WakeFlags {
    set: AtomicU8,
    waker: AtomicWaker,
}

impl WakeFlags {
    /// Sets the flag and wakes the task that waits for it. If none does, the next `wait` returns at once.
    pub(crate) fn set(&self, flag: WakeFlag) {
        self.set.fetch_or(flag.0, Ordering::Release);
        self.waker.wake();
    }

    /// Clears the flag; returns whether it was set.
    pub(crate) fn take(&self, flag: WakeFlag) -> bool {
        self.set.load(Ordering::Acquire) & flag.0 != 0
            && self.set.fetch_and(!flag.0, Ordering::AcqRel) & flag.0 != 0
    }

    /// Waits until the flag is set, and clears it.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) fn wait(&self, flag: WakeFlag) -> impl Future<Output = ()> + Send + use<'_> {
        poll_fn(move |cx| self.poll(flag, cx))
    }

    fn poll(&self, flag: WakeFlag, cx: &Context<'_>) -> Poll<()> {
        if self.take(flag) {
            return Poll::Ready(());
        }
        self.waker.register(cx.waker());
        if self.take(flag) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const ONE: WakeFlag = WakeFlag(1);
    const OTHER: WakeFlag = WakeFlag(2);

    #[test]
    fn a_flag_set_before_anybody_waited_is_seen_once() {
        let wake = WakeFlags::default();
        wake.set(ONE);
        wake.set(ONE);
        assert_eq!(wake.wait(OTHER).now_or_never(), None);
        assert_eq!(wake.wait(ONE).now_or_never(), Some(()));
        assert_eq!(wake.wait(ONE).now_or_never(), None);
        wake.set(OTHER);
        assert!(wake.take(OTHER));
        assert_eq!(wake.wait(OTHER).now_or_never(), None);
    }

    #[tokio::test]
    async fn one_task_sees_each_of_its_flags() {
        let wake = std::sync::Arc::new(WakeFlags::default());
        let setter = wake.clone();
        let waiting = tokio::spawn(async move {
            tokio::join!(wake.wait(ONE), wake.wait(OTHER));
        });
        tokio::task::yield_now().await;
        setter.set(OTHER);
        tokio::task::yield_now().await;
        setter.set(ONE);
        waiting.await.expect("both were seen");
    }
}
