//! However a stream is cut into chunks, the same frames come out, and the memory held follows the
//! bytes that came, not the lengths they claim.
//!
//! Input: the number of chunk lengths, those lengths (used over and over), then the stream.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::{Corpus, fuzz_target};
use udpack::wire::{FrameDecoder, FrameError, PREFIX};
use udpack_fuzz::within;

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((&count, rest)) = input.split_first() else {
        return Corpus::Reject;
    };
    let Some((chunks, stream)) = rest.split_at_checked(usize::from(count % 16)) else {
        return Corpus::Reject;
    };
    let chunks: Vec<usize> = chunks.iter().map(|len| usize::from(*len)).collect();
    for limit in [16, 1_114_112] {
        let (frames, end) = model(stream, limit);
        for chunks in [&chunks[..], &[]] {
            within(16 * 1024 + 16 * stream.len(), || {
                check(stream, chunks, limit, &frames, &end);
            });
        }
    }
    Corpus::Keep
});

fn check(
    stream: &[u8],
    chunks: &[usize],
    limit: usize,
    frames: &[&[u8]],
    end: &Result<(), FrameError>,
) {
    let mut decoder = FrameDecoder::new(limit);
    let mut frames = frames.iter();
    let mut lens = chunks.iter().cycle();
    let (mut pushed, mut returned) = (0, 0);
    while pushed < stream.len() {
        let len = lens.next().map_or(stream.len(), |len| *len);
        // A chunk of no bytes is a legal thing to push, but one alone gets nowhere.
        let len = if len == 0 && chunks.iter().all(|len| *len == 0) {
            1
        } else {
            len.min(stream.len() - pushed)
        };
        decoder.push(Bytes::copy_from_slice(&stream[pushed..pushed + len]));
        pushed += len;
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    assert_eq!(Some(&&frame[..]), frames.next());
                    returned += PREFIX + frame.len();
                }
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(Err(&error), end.as_ref());
                    assert!(frames.next().is_none(), "stopped too early");
                    assert_eq!(decoder.next_frame(), Err(error), "an error stays");
                    return;
                }
            }
            assert_eq!(decoder.held(), pushed - returned);
        }
        assert_eq!(decoder.held(), pushed - returned);
    }
    assert!(frames.next().is_none(), "frames are missing");
    assert_eq!(&decoder.finish(), end);
}

/// The frames of a stream and how it ends, read in the plainest way.
fn model(mut stream: &[u8], limit: usize) -> (Vec<&[u8]>, Result<(), FrameError>) {
    let mut frames = Vec::new();
    while let Some((prefix, rest)) = stream.split_first_chunk::<PREFIX>() {
        let len = u32::from_be_bytes(*prefix) as usize;
        if len == 0 {
            return (frames, Err(FrameError::Empty));
        }
        if len > limit {
            let (len, limit) = (len as u64, limit as u64);
            return (frames, Err(FrameError::TooLarge { len, limit }));
        }
        let Some((frame, rest)) = rest.split_at_checked(len) else {
            let (got, need) = (stream.len(), PREFIX + len);
            return (frames, Err(FrameError::Truncated { got, need }));
        };
        frames.push(frame);
        stream = rest;
    }
    let end = match stream.len() {
        0 => Ok(()),
        got => Err(FrameError::Truncated { got, need: PREFIX }),
    };
    (frames, end)
}
