//! The queue of streams between a session's task and the code that accepts them.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Mutex;

use tokio::sync::Notify;

use crate::base::lock;

/// A bounded queue. An empty one has no memory beside itself: tokio's channels keep room for 32 values, and most sessions
/// are idle.
#[derive(Debug)]
pub(super) struct Handover<T> {
    queue: Mutex<Queue<T>>,
    most: usize,
    moved: Notify,
}

#[derive(Debug)]
struct Queue<T> {
    values: VecDeque<T>,
    closed: bool,
}

impl<T> Handover<T> {
    /// Creates a queue of at most `most` values.
    pub(super) fn new(most: usize) -> Self {
        Self {
            queue: Mutex::new(Queue {
                values: VecDeque::new(),
                closed: false,
            }),
            most,
            moved: Notify::new(),
        }
    }

    /// Adds a value. Returns it if there is no room, or the queue is closed.
    pub(super) fn push(&self, value: T) -> Result<(), T> {
        let mut queue = lock(&self.queue);
        if queue.closed || queue.values.len() >= self.most {
            return Err(value);
        }
        queue.values.push_back(value);
        drop(queue);
        self.moved.notify_one();
        Ok(())
    }

    /// Closes the queue. Waiting values can still be taken.
    pub(super) fn close(&self) {
        lock(&self.queue).closed = true;
        self.moved.notify_waiters();
    }

    /// The next value; `None` after the last.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn take(&self) -> Option<T> {
        loop {
            let mut moved = pin!(self.moved.notified());
            moved.as_mut().enable();
            {
                let mut queue = lock(&self.queue);
                if let Some(value) = queue.values.pop_front() {
                    if queue.values.is_empty() {
                        queue.values = VecDeque::new();
                    } else {
                        // Wakes the next waiting task.
                        self.moved.notify_one();
                    }
                    return Some(value);
                }
                if queue.closed {
                    return None;
                }
            }
            moved.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[tokio::test]
    async fn values_come_in_order_up_to_the_bound_and_after_the_close() {
        let handover = Handover::new(2);
        assert_eq!(handover.take().now_or_never(), None);
        assert_eq!((handover.push(1), handover.push(2)), (Ok(()), Ok(())));
        assert_eq!(handover.push(3), Err(3));
        assert_eq!(handover.take().await, Some(1));
        assert_eq!(handover.push(4), Ok(()));
        handover.close();
        assert_eq!(handover.push(5), Err(5));
        assert_eq!(handover.take().await, Some(2));
        assert_eq!(handover.take().await, Some(4));
        assert_eq!(handover.take().await, None);
    }

    #[tokio::test]
    async fn everybody_who_waits_gets_a_value_or_hears_of_the_close() {
        let handover = Handover::new(2);
        let waiting = async { tokio::join!(handover.take(), handover.take(), handover.take()) };
        let handing = async {
            tokio::task::yield_now().await;
            handover.push('a').expect("room");
            handover.push('b').expect("room");
            handover.close();
        };
        let ((one, two, three), ()) = tokio::join!(waiting, handing);
        let mut got: Vec<_> = [one, two, three].into_iter().flatten().collect();
        got.sort_unstable();
        assert_eq!(got, ['a', 'b']);
    }
}
