//! What the decoder gives back does not depend on how the stream was split, and what it holds
//! follows what came, not what was promised.

use proptest::prelude::*;

use super::*;

const LIMIT: usize = 1 << 20;

fn framed(bodies: &[&[u8]]) -> Vec<u8> {
    let mut stream = Vec::new();
    for body in bodies {
        let len = u32::try_from(body.len()).expect("short");
        stream.extend_from_slice(&len.to_be_bytes());
        stream.extend_from_slice(body);
    }
    stream
}

/// Pushes `pieces` one by one and takes out every frame in between.
fn frames<'a>(
    decoder: &mut FrameDecoder,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<Bytes>, FrameError> {
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.push(Bytes::copy_from_slice(piece));
        while let Some(frame) = decoder.next_frame()? {
            frames.push(frame);
        }
    }
    Ok(frames)
}

#[test]
fn decodes_alike_however_the_stream_is_split() {
    let bodies: [&[u8]; 3] = [b"first", b"2", b"the third frame"];
    let stream = framed(&bodies);
    let check = |pieces: &[&[u8]]| {
        let mut decoder = FrameDecoder::new(LIMIT);
        let got = frames(&mut decoder, pieces.iter().copied()).expect("valid");
        assert_eq!(got, bodies, "{pieces:?}");
        assert_eq!(decoder.held(), 0);
        assert_eq!(decoder.finish(), Ok(()));
    };
    for first in 0..=stream.len() {
        let (a, rest) = stream.split_at(first);
        check(&[a, rest]);
        for second in 0..=rest.len() {
            let (b, c) = rest.split_at(second);
            check(&[a, b, c]);
        }
    }
    check(&stream.chunks(1).collect::<Vec<_>>());
}

#[test]
fn body_inside_one_chunk_is_a_slice_of_it() {
    let chunk = Bytes::from(framed(&[b"one", b"two"]));
    let mut decoder = FrameDecoder::new(LIMIT);
    decoder.push(chunk.clone());
    for at in [PREFIX, 2 * PREFIX + 3] {
        let frame = decoder.next_frame().expect("valid").expect("whole");
        assert_eq!(frame.as_ptr(), chunk[at..].as_ptr());
    }
    assert_eq!(decoder.next_frame(), Ok(None));
}

#[test]
fn body_is_a_slice_even_when_its_prefix_came_before() {
    let stream = framed(&[b"one"]);
    let mut decoder = FrameDecoder::new(LIMIT);
    decoder.push(Bytes::copy_from_slice(&stream[..PREFIX]));
    assert_eq!(decoder.next_frame(), Ok(None));
    let chunk = Bytes::copy_from_slice(&stream[PREFIX..]);
    decoder.push(chunk.clone());
    let frame = decoder.next_frame().expect("valid").expect("whole");
    assert_eq!(frame.as_ptr(), chunk.as_ptr());
}

#[test]
fn refuses_empty_frame_and_frame_above_limit() {
    let refused = |prefix: u32| {
        let mut decoder = FrameDecoder::new(100);
        decoder.push(Bytes::copy_from_slice(&prefix.to_be_bytes()));
        let first = decoder.next_frame();
        assert_eq!(
            decoder.next_frame(),
            first,
            "the decoder stays at the frame"
        );
        assert_eq!(decoder.body.capacity(), 0);
        first.err()
    };
    assert_eq!(refused(0), Some(FrameError::Empty));
    assert_eq!(refused(100), None);
    for len in [
        101,
        1 << 31,
        u32::MAX,
        u32::from_be_bytes(*b"GET "),
        u32::from_be_bytes(*b"SSH-"),
    ] {
        let expected = FrameError::TooLarge {
            len: u64::from(len),
            limit: 100,
        };
        assert_eq!(refused(len), Some(expected));
    }
}

#[test]
fn limit_counts_the_body_and_changes_between_frames() {
    let stream = framed(&[&[7; 10], &[8; 11]]);
    let mut decoder = FrameDecoder::new(10);
    decoder.push(Bytes::from(stream));
    assert_eq!(decoder.next_frame(), Ok(Some(Bytes::from(vec![7; 10]))));
    assert!(decoder.next_frame().is_err());
    decoder.set_limit(11);
    assert_eq!(decoder.next_frame(), Ok(Some(Bytes::from(vec![8; 11]))));
}

#[test]
fn end_of_stream_inside_prefix_or_body_is_truncation() {
    let stream = framed(&[b"abc"]);
    for cut in 0..=stream.len() {
        let mut decoder = FrameDecoder::new(LIMIT);
        frames(&mut decoder, [&stream[..cut]]).expect("no frame is bad");
        let whole = cut == 0 || cut == stream.len();
        assert_eq!(decoder.held(), if whole { 0 } else { cut });
        let need = if cut < PREFIX { PREFIX } else { stream.len() };
        let expected = if whole {
            Ok(())
        } else {
            Err(FrameError::Truncated { got: cut, need })
        };
        assert_eq!(decoder.finish(), expected, "cut after {cut}");
    }
}

#[test]
fn lying_prefix_costs_no_memory() {
    let mut decoder = FrameDecoder::new(LIMIT);
    decoder.push(Bytes::copy_from_slice(&(1_u32 << 20).to_be_bytes()));
    assert_eq!(decoder.next_frame(), Ok(None));
    assert_eq!((decoder.held(), decoder.body.capacity()), (PREFIX, 0));

    let mut sent = 0;
    for piece in [1, 999, 9_000, 50_000, 71_071] {
        decoder.push(Bytes::from(vec![0; piece]));
        assert_eq!(decoder.next_frame(), Ok(None));
        sent += piece;
        let room = decoder.body.capacity();
        assert!(room <= FIRST_ROOM.max(2 * sent), "{room} after {sent}");
        assert!(room < LIMIT);
    }
    // With the last byte of the first eighth the frame is believed, and all of it gets its room.
    decoder.push(Bytes::from(vec![0; LIMIT / 8]));
    assert_eq!(decoder.next_frame(), Ok(None));
    let room = decoder.body.capacity();
    assert!((LIMIT..LIMIT + LIMIT / 4).contains(&room), "{room}");
}

#[test]
fn copied_body_takes_the_room_made_at_once() {
    let body: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let stream = framed(&[&body]);
    let mut decoder = FrameDecoder::new(LIMIT);
    let mut rooms = Vec::new();
    for piece in stream.chunks(1_200) {
        decoder.push(Bytes::copy_from_slice(piece));
        match decoder.next_frame().expect("valid") {
            None => rooms.push(decoder.body.capacity()),
            Some(frame) => assert_eq!(frame, body),
        }
    }
    rooms.dedup();
    assert!(rooms.len() <= 6, "{rooms:?}");
    assert_eq!(decoder.held(), 0);
}

#[test]
fn nothing_of_a_finished_chunk_is_kept() {
    let chunk = Bytes::from(framed(&[b"abc"]));
    let mut decoder = FrameDecoder::new(LIMIT);
    decoder.push(chunk.clone());
    drop(decoder.next_frame());
    assert!(chunk.is_unique(), "the decoder still refers to the chunk");

    let chunk = Bytes::from(vec![0, 0]);
    decoder.push(chunk.clone());
    assert_eq!(decoder.next_frame(), Ok(None));
    assert!(chunk.is_unique(), "the decoder still refers to the chunk");
}

proptest! {
    #[test]
    fn split_changes_nothing(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..5_000), 0..6),
        mut cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        take_early in any::<bool>(),
    ) {
        let bodies: Vec<&[u8]> = bodies.iter().map(Vec::as_slice).collect();
        let stream = framed(&bodies);
        let mut at: Vec<usize> = cuts.drain(..).map(|cut| cut.index(stream.len() + 1)).collect();
        at.extend([0, stream.len()]);
        at.sort_unstable();
        let pieces: Vec<&[u8]> = at.windows(2).map(|ends| &stream[ends[0]..ends[1]]).collect();
        let mut decoder = FrameDecoder::new(5_000);
        let mut got = Vec::new();
        if take_early {
            got = frames(&mut decoder, pieces).expect("valid");
        } else {
            pieces.iter().for_each(|piece| decoder.push(Bytes::copy_from_slice(piece)));
            while let Some(frame) = decoder.next_frame().expect("valid") {
                got.push(frame);
            }
        }
        prop_assert_eq!(got, bodies);
        prop_assert_eq!(decoder.finish(), Ok(()));
    }

    #[test]
    fn arbitrary_bytes_decode_alike_in_any_pieces(
        stream in prop::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..300),
        size in 1_usize..20,
    ) {
        let decode = |size: usize| {
            let mut decoder = FrameDecoder::new(64);
            let mut got = Vec::new();
            let end = stream.chunks(size).try_for_each(|piece| {
                decoder.push(Bytes::copy_from_slice(piece));
                while let Some(frame) = decoder.next_frame()? {
                    got.push(frame);
                }
                Ok(())
            });
            (got, end.and_then(|()| decoder.finish()))
        };
        prop_assert_eq!(decode(size), decode(stream.len().max(1)));
    }
}

#[test]
fn memory_of_large_frames_is_used_again_once_nobody_has_them() {
    let mut decoder = FrameDecoder::new(1 << 20);
    // In two chunks, so that the frame is not a slice of what came.
    let decode = |decoder: &mut FrameDecoder, byte: u8, len: usize| {
        let mut frame = (len as u32).to_be_bytes().to_vec();
        frame.extend(vec![byte; len]);
        let rest = frame.split_off(len / 2);
        decoder.push(frame.into());
        assert!(decoder.next_frame().unwrap().is_none());
        decoder.push(rest.into());
        let body = decoder.next_frame().unwrap().unwrap();
        assert_eq!(body, vec![byte; len]);
        body
    };
    let first = decode(&mut decoder, 1, LARGE);
    let second = decode(&mut decoder, 2, LARGE);
    assert_eq!(first, vec![1; LARGE]);
    let at = first.as_ptr();
    drop(first);
    let third = decode(&mut decoder, 3, LARGE);
    assert_eq!(third.as_ptr(), at);
    assert_eq!(second, vec![2; LARGE]);
    drop((second, third));
    let larger = decode(&mut decoder, 4, 3 * LARGE);
    assert_eq!(larger, vec![4; 3 * LARGE]);
    for byte in 0..50 {
        decode(&mut decoder, byte, LARGE);
    }
    assert!(decoder.given.len() <= KEPT);
    decoder.rest();
    assert!(decoder.given.is_empty(), "nothing is kept between frames");
}
