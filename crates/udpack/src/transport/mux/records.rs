//! What one side of a connection over TCP makes of the records of a stranger, without a socket: for the fuzz targets.

use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tokio::time::Instant;

use super::state::{BOTH, ONE, State, Wait};
use super::{Side, settings, wire};
use crate::wire::config::{Limits, Timeouts};

/// Gives records to a new connection, of a server or a client, whose program reads what comes and says it back. Returns how many were
/// taken before one ended the connection.
///
/// # Panics
/// When what the connection says itself is no record.
pub fn hear(server: bool, records: impl IntoIterator<Item = Bytes>) -> usize {
    let side = if server { Side::Server } else { Side::Client };
    let now = Instant::now();
    let settings = settings(side, &Limits::default(), &Timeouts::default());
    let mut state = State::new(settings, now);
    let cx = &mut Context::from_waker(Waker::noop());
    let mut open = Vec::new();
    let mut taken = 0;
    for record in records {
        match state.receive(record, now) {
            Ok(()) => taken += 1,
            Err(fault) => state.fail(fault),
        }
        for way in [BOTH, ONE] {
            if let Ok(Wait::Done(id)) = state.open(way) {
                open.push(id);
            }
            while let Ok(Wait::Done(id)) = state.accept(way) {
                open.push(id);
            }
        }
        open.retain(|id| goes_on(&mut state, *id, cx));
        while let Some(datagram) = state.read_datagram() {
            state.send_datagram(&datagram);
        }
        let over = state.error().is_some();
        while let Some(record) = state.record(now) {
            check(record);
        }
        state.look(now);
        if over {
            break;
        }
    }
    taken
}

/// Says back what has come on this stream; whether more may come.
fn goes_on(state: &mut State, id: u64, cx: &Context<'_>) -> bool {
    loop {
        match state.poll_read_some(id, cx, 1000) {
            Poll::Ready(Ok(Some(bytes))) => {
                let _ = state.poll_write(id, cx, &mut [bytes]);
            }
            Poll::Ready(Ok(None)) => {
                state.finish(id);
                break;
            }
            Poll::Ready(Err(_)) => break,
            Poll::Pending => return true,
        }
    }
    state.release_recv(id);
    state.release_send(id);
    false
}

/// What this side says is a record that it would take itself.
fn check(mut record: Bytes) {
    assert!(
        record.len() <= wire::RECORD,
        "a record of {} bytes",
        record.len()
    );
    loop {
        match wire::next(&mut record) {
            Ok(Some(_)) => {}
            Ok(None) => return,
            Err(fault) => panic!("said {fault:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `fuzz/targets/records.rs` does: a byte for the side, then each record behind its length in two bytes.
    #[test]
    fn the_corpus_of_the_fuzz_target_is_heard() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/records");
        let mut taken = 0;
        for input in std::fs::read_dir(corpus).unwrap() {
            let input = std::fs::read(input.unwrap().path()).unwrap();
            let (side, mut rest) = input.split_first().unwrap();
            let mut records = Vec::new();
            while let [high, low, more @ ..] = rest {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                let (record, behind) = more.split_at(length);
                records.push(Bytes::copy_from_slice(record));
                rest = behind;
            }
            taken += hear(side & 1 == 1, records);
        }
        assert!(taken > 60, "{taken}");
    }
}
