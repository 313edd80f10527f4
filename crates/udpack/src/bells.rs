//! What wakes the one task that drives a session: a bit for each cause and one waker for all, where a `Notify` and
//! a future for each took some 100 bytes of every idle socket.

use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

/// One of the causes, chosen by the owner of the [`Bells`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bell(pub(crate) u8);

/// Causes of which one task waits for some at a time.
#[derive(Debug, Default)]
pub(crate) struct Bells {
    rung: AtomicU8,
    waker: AtomicWaker,
}

impl Bells {
    /// Wakes who waits for it; if nobody does, who waits next need not.
    pub(crate) fn ring(&self, bell: Bell) {
        self.rung.fetch_or(bell.0, Ordering::Release);
        self.waker.wake();
    }

    /// Forgets that it was rung; says whether it was.
    pub(crate) fn hush(&self, bell: Bell) -> bool {
        self.rung.load(Ordering::Acquire) & bell.0 != 0
            && self.rung.fetch_and(!bell.0, Ordering::AcqRel) & bell.0 != 0
    }

    /// Waits until it rings.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) fn rung(&self, bell: Bell) -> impl Future<Output = ()> + Send + use<'_> {
        poll_fn(move |cx| self.poll(bell, cx))
    }

    fn poll(&self, bell: Bell, cx: &Context<'_>) -> Poll<()> {
        if self.hush(bell) {
            return Poll::Ready(());
        }
        self.waker.register(cx.waker());
        if self.hush(bell) {
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

    const ONE: Bell = Bell(1);
    const OTHER: Bell = Bell(2);

    #[test]
    fn a_bell_that_rang_before_anybody_waited_is_heard_once() {
        let bells = Bells::default();
        bells.ring(ONE);
        bells.ring(ONE);
        assert_eq!(bells.rung(OTHER).now_or_never(), None);
        assert_eq!(bells.rung(ONE).now_or_never(), Some(()));
        assert_eq!(bells.rung(ONE).now_or_never(), None);
        bells.ring(OTHER);
        assert!(bells.hush(OTHER));
        assert_eq!(bells.rung(OTHER).now_or_never(), None);
    }

    #[tokio::test]
    async fn one_task_hears_each_of_its_bells() {
        let bells = std::sync::Arc::new(Bells::default());
        let ringer = bells.clone();
        let waiting = tokio::spawn(async move {
            tokio::join!(bells.rung(ONE), bells.rung(OTHER));
        });
        tokio::task::yield_now().await;
        ringer.ring(OTHER);
        tokio::task::yield_now().await;
        ringer.ring(ONE);
        waiting.await.expect("both were heard");
    }
}
