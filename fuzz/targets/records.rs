//! The records of a connection over TCP, as a server and as a client hear them from a stranger: none makes it panic, hold more than its
//! limits, or say what it would not take itself.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use udpack::testing::hear_records;
use udpack_fuzz::within;

// A byte for the side, then each record behind its length in two bytes.
fuzz_target!(|input: &[u8]| {
    let Some((side, mut rest)) = input.split_first() else {
        return;
    };
    let mut records = Vec::new();
    while let [high, low, more @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(more.len());
        let (record, behind) = more.split_at(length);
        records.push(Bytes::copy_from_slice(record));
        rest = behind;
    }
    within(1 << 20, || {
        hear_records(side & 1 == 1, records.iter().cloned());
    });
});
