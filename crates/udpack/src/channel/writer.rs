//! The task that writes a channel's queue to its stream, and closes the channel if the peer reads nothing.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;

use crate::channel::carrier::{Carrier, SessionConnection, lost};
use crate::channel::outbox::{BATCH, COPY_LIMIT, Outbox, TURN, Work};
use crate::channel::write_scheduler::WriteScheduler;
use crate::metrics::Count;
use crate::metrics::speed::Counters;
use crate::transport::on_path;
use crate::transport::path_activity::PathActivity;
use crate::transport::{Connection, ConnectionStats, SendStream, StreamError, Written as Taken};
use crate::wire::code::{CloseCode, CloseReason};
use crate::wire::config::Priority;

/// How a writer ended.
pub(crate) enum Written {
    /// The channel has ended.
    Ended(Result<(), CloseReason>),
    /// The connection was lost; the channel may continue on another one.
    Detached,
}

/// The stream that a writer writes to.
pub(crate) struct Way {
    pub(crate) conn: Arc<SessionConnection>,
    pub(crate) stream: SendStream,
    /// See [`Outbox::rewind`]; 0 for a channel's first stream.
    pub(crate) epoch: u64,
    /// A frame that is written before the queue and is not part of it.
    pub(crate) first: Option<Bytes>,
}

/// Writes the queue to a stream until the channel is over or the connection is gone, and returns how it ended.
pub(crate) async fn write_loop(
    outbox: Arc<Outbox>,
    way: Way,
    carrier: Arc<Carrier>,
    counters: Arc<Counters>,
) -> Written {
    let (conn, epoch) = (way.conn.clone(), way.epoch);
    let driven = drive(&outbox, way, &carrier, &counters).await;
    // The stream would keep its connection alive while the channel waits for another one.
    drop(outbox.take_back(epoch));
    let result = match driven {
        Ok(true) => Ok(()),
        Ok(false) => return Written::Detached,
        Err(_) if outbox.keeps() && conn.is_over() => return Written::Detached,
        Err(reason) => Err(reason),
    };
    outbox.end(result.clone());
    Written::Ended(result)
}

/// Writes until nothing is left to write. Returns `false` if the queue moved to another stream or was ended.
async fn drive(
    outbox: &Outbox,
    way: Way,
    carrier: &Carrier,
    counters: &Counters,
) -> Result<bool, CloseReason> {
    let Way {
        conn,
        mut stream,
        epoch,
        first,
    } = way;
    let mut stopped = std::pin::pin!(stream.stopped());
    let mut batch = Vec::with_capacity(BATCH);
    let mut patience = Patience::default();
    if let Some(first) = first {
        batch.push(first);
        write(
            &mut stream,
            &mut batch,
            (carrier, &conn),
            counters,
            outbox.priority,
        )
        .await?;
        batch.clear();
    }
    let mut stream = Some(stream);
    loop {
        let work = outbox.take(epoch, &mut stream, &mut batch);
        match (work, &mut stream) {
            (
                Work::Batch {
                    bytes,
                    messages,
                    gaps,
                },
                Some(stream),
            ) => {
                write(
                    stream,
                    &mut batch,
                    (carrier, &conn),
                    counters,
                    outbox.priority,
                )
                .await?;
                carrier.counts.add(Count::MessagesSent, messages as u64);
                if gaps > 0 {
                    carrier.counts.add(Count::Gaps, gaps);
                }
                outbox.written(bytes, messages);
                batch.clear();
                if bytes < messages * COPY_LIMIT {
                    // Yield, so that the connection sends and messages queued meanwhile are written together.
                    // Otherwise a sender without pauses would wake a writer for every sixty small messages.
                    tokio::task::yield_now().await;
                }
            }
            (Work::Idle, _) => {
                let watched = patience.watch(outbox, &conn);
                tokio::select! {
                    () = outbox.work.notified() => {}
                    end = &mut stopped => return Err(stop_reason(carrier, end)),
                    () = tokio::time::sleep(part(carrier, &conn)), if watched => {
                        if patience.is_over(outbox, &conn, carrier.live_channels())
                            && let Some(mut stream) = outbox.take_back(epoch)
                        {
                            return Err(slow_peer(&mut stream, carrier));
                        }
                    }
                }
            }
            (Work::Finish(last), Some(stream)) => {
                if let Some(last) = last {
                    batch.push(last);
                    write(
                        stream,
                        &mut batch,
                        (carrier, &conn),
                        counters,
                        outbox.priority,
                    )
                    .await?;
                }
                // If the peer has stopped the stream, `stopped` reports it.
                stream.finish();
                match stopped.await {
                    Ok(None) => {}
                    end => return Err(stop_reason(carrier, end)),
                }
                return confirmed(outbox, &conn, carrier).await.map(|()| true);
            }
            // Dropping the stream ends it.
            (Work::Gone | Work::Batch { .. } | Work::Finish(_), _) => return Ok(false),
        }
    }
}

/// The slow-peer time is divided into this many parts; [`PathActivity`] says which of them count.
const PARTS: u32 = 4;
/// The number of parts that must count after the path was silent. QUIC then takes up to 9/8 of the silence to declare
/// the packets in flight lost (RFC 9002, section 6.1.2: the latest round trip is as long as the silence), and sends
/// nothing new before; a silence that a connection outlives is shorter than the idle time, 30 s.
const PARTS_AFTER_SILENCE: u32 = 4 * PARTS;

/// One part of the time in which a peer on this path must read something.
fn part(carrier: &Carrier, conn: &SessionConnection) -> Duration {
    on_path(carrier.timeouts.slow_peer, conn) / PARTS
}

/// Counts the parts of the slow-peer time in which a peer read nothing although its path was alive.
struct Passed {
    activity: PathActivity,
    parts: u32,
}

impl Passed {
    fn new(conn: &SessionConnection) -> Self {
        Self {
            activity: PathActivity::new(conn),
            parts: 0,
        }
    }

    /// Counts one more part; returns whether the whole time has passed.
    fn part(&mut self, conn: &SessionConnection) -> bool {
        self.parts += u32::from(self.activity.counts(conn));
        let whole = match self.activity.was_silent() {
            true => PARTS_AFTER_SILENCE,
            false => PARTS,
        };
        self.parts >= whole
    }
}

/// Measures how long a live peer has confirmed nothing while a sender waits for it.
#[derive(Default)]
struct Patience {
    begun: Option<Stuck>,
}

/// One wait for a confirmation of the peer.
struct Stuck {
    /// How many frames were confirmed when the wait began.
    at: u64,
    passed: Passed,
    /// The connection's statistics when the wait began, and at the last check.
    begun: ConnectionStats,
    before: ConnectionStats,
}

impl Patience {
    fn watch(&mut self, outbox: &Outbox, conn: &SessionConnection) -> bool {
        let stuck = outbox.stuck_at();
        if stuck != self.begun.as_ref().map(|stuck| stuck.at) {
            self.begun = stuck.map(|at| {
                let now = conn.stats();
                Stuck {
                    at,
                    passed: Passed::new(conn),
                    begun: now,
                    before: now,
                }
            });
        }
        stuck.is_some()
    }

    /// Called when a part of the slow-peer time has passed, on a connection with `channels` channels.
    ///
    /// A peer confirms whole messages. While the path may not have carried all unconfirmed bytes yet, and carries
    /// some bytes of channels, the path is slow, not the peer.
    fn is_over(&mut self, outbox: &Outbox, conn: &SessionConnection, channels: usize) -> bool {
        let Some(stuck) = &mut self.begun else {
            return false;
        };
        if outbox.stuck_at() != Some(stuck.at) || !stuck.passed.part(conn) {
            return false;
        }
        let now = conn.stats();
        let in_all = now.bytes_sent - stuck.begun.bytes_sent;
        let of_late = now.stream_frames_sent - stuck.before.stream_frames_sent;
        let slow_path =
            of_late > 0 && in_all / (channels.max(1) as u64) < outbox.unconfirmed_bytes();
        if slow_path {
            stuck.before = now;
            stuck.passed.parts = 0;
        }
        !slow_path
    }
}

/// Called when the peer's transport has acknowledged everything. On a resumable channel this waits until its program
/// has read it, too.
async fn confirmed(
    outbox: &Outbox,
    conn: &Connection,
    carrier: &Carrier,
) -> Result<(), CloseReason> {
    let lost = conn.closed();
    let mut lost = std::pin::pin!(lost);
    while outbox.keeps() {
        if outbox.is_refused() {
            return Err(stopped_by_peer(CloseCode::NORMAL));
        }
        tokio::select! {
            () = outbox.work.notified() => {}
            error = &mut lost => return Err(carrier.reason_for(&error)),
        }
    }
    Ok(())
}

async fn write(
    stream: &mut SendStream,
    batch: &mut [Bytes],
    (carrier, conn): (&Carrier, &SessionConnection),
    counters: &Counters,
    priority: Priority,
) -> Result<(), CloseReason> {
    let mut rest = batch;
    while !rest.is_empty() {
        let mut turn = 0;
        let count = rest.iter().take_while(|bytes| {
            turn += bytes.len();
            turn <= TURN
        });
        let count = count.count().max(1);
        let (mut turn, later) = rest.split_at_mut(count);
        if priority == Priority::Bulk {
            bulk_room(carrier, conn).await?;
            for bytes in &mut *turn {
                *bytes = conn.scheduler.hold(std::mem::take(bytes));
            }
        }
        while !turn.is_empty() {
            let written = progress(stream, turn, (carrier, conn), priority).await?;
            counters.sent(written.bytes as u64);
            turn = &mut turn[written.chunks..];
            if carrier.live_channels() > 1 {
                tokio::task::yield_now().await;
            }
        }
        rest = later;
    }
    Ok(())
}

/// Waits until the bulk channels may have more bytes in flight, or the connection has ended.
async fn bulk_room(carrier: &Carrier, conn: &SessionConnection) -> Result<(), CloseReason> {
    let room = conn.scheduler.bulk_room(
        || conn.stats().congestion_window,
        carrier.limits.send_window,
        TURN,
    );
    tokio::select! {
        biased;
        () = room => Ok(()),
        error = conn.closed() => Err(carrier.reason_for(&error)),
    }
}

/// Writes a part of `rest`. The channel is closed if the peer is alive but grants no credit for the slow-peer time.
/// The idle timer handles a silent path; on a slow path each channel waits for its turn.
async fn progress(
    stream: &mut SendStream,
    rest: &mut [Bytes],
    (carrier, conn): (&Carrier, &SessionConnection),
    priority: Priority,
) -> Result<Taken, CloseReason> {
    // A writer that need not wait reads no statistics, because those take the lock of the connection.
    if let Some(written) = write_some(stream, rest, &conn.scheduler, priority).now_or_never() {
        return written.map_err(|error| stream_reason(carrier, error));
    }
    let part = part(carrier, conn);
    let (begun, _) = carrier.counters.totals();
    let mut before = begun;
    let mut passed = Passed::new(conn);
    loop {
        match tokio::time::timeout(part, write_some(stream, rest, &conn.scheduler, priority)).await
        {
            Ok(Ok(written)) => return Ok(written),
            Ok(Err(error)) => return Err(stream_reason(carrier, error)),
            Err(_) if !passed.part(conn) => {}
            Err(_) if crowded(begun, before, carrier) => {
                before = carrier.counters.totals().0;
                passed.parts = 0;
            }
            Err(_) => return Err(slow_peer(stream, carrier)),
        }
    }
}

fn slow_peer(stream: &mut SendStream, carrier: &Carrier) -> CloseReason {
    carrier.counts.one(Count::SlowPeers);
    stream.reset(CloseCode::SLOW_PEER);
    let text = format!(
        "the peer took nothing off the channel for {:?}",
        carrier.timeouts.slow_peer
    );
    if let Some(left_out) = carrier.log_limit.line() {
        tracing::warn!(left_out, "channel closed: {text}");
    }
    CloseReason::local(CloseCode::SLOW_PEER, text)
}

/// Whether a waiting channel should wait longer because others use the path. The connection had sent `begun` bytes
/// when the wait began, and `before` at the last check.
fn crowded(begun: u64, before: u64, carrier: &Carrier) -> bool {
    let (now, _) = carrier.counters.totals();
    slow_path(now - begun, now - before, carrier.live_channels())
}

/// Whether the path is slow, not the peer: while one channel waited, all `channels` wrote some bytes, but too few, in
/// total and recently, to conclude that only this one was passed over.
fn slow_path(in_all: u64, of_late: u64, channels: usize) -> bool {
    of_late > 0 && in_all / (channels.max(1) as u64) < TURN as u64
}

/// Writes as much as QUIC accepts now, or waits for its turn.
async fn write_some(
    stream: &mut SendStream,
    rest: &mut [Bytes],
    scheduler: &WriteScheduler,
    priority: Priority,
) -> Result<Taken, StreamError> {
    let mut waiting = None;
    let mut let_pass = None;
    std::future::poll_fn(|cx| {
        if waiting.is_some() {
            let left = let_pass.get_or_insert_with(|| scheduler.let_pass(priority));
            if *left > 0 {
                *left -= 1;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        let written = stream.poll_write(cx, rest);
        if written.is_pending() {
            waiting.get_or_insert_with(|| scheduler.wait(priority));
            let_pass = None;
        }
        written
    })
    .await
}

fn stream_reason(carrier: &Carrier, error: StreamError) -> CloseReason {
    match error {
        StreamError::Peer(code) => stopped_by_peer(code),
        StreamError::Lost(error) => carrier.reason_for(&error),
        StreamError::Ended => lost("the stream is closed"),
    }
}

fn stop_reason(carrier: &Carrier, end: Result<Option<CloseCode>, StreamError>) -> CloseReason {
    match end {
        Ok(Some(code)) => stopped_by_peer(code),
        Ok(None) => lost("the stream is closed"),
        Err(error) => stream_reason(carrier, error),
    }
}

fn stopped_by_peer(code: CloseCode) -> CloseReason {
    CloseReason::peer(code, "the peer reads no more from this channel")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gets_as_little_as_all_others_is_not_passed_over() {
        let turn = TURN as u64;
        assert!(slow_path(1, 1, 1), "a trickle");
        assert!(slow_path(8 * turn - 1, 1, 8), "not everybody had a turn");
        assert!(!slow_path(8 * turn, turn, 8), "all others had one");
        assert!(
            !slow_path(turn, 0, 8),
            "nothing moves although the peer is alive"
        );
        assert!(!slow_path(turn, turn, 0));
    }
}
