//! No datagram and no unidirectional stream makes the decoder panic or allocate beyond measure; what is accepted
//! is acceptable in all its parts.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use serde::de::IgnoredAny;
use udpack::Volatile;
use udpack::wire::validate;
use udpack_fuzz::{assert_printable, within};

fuzz_target!(|input: &[u8]| {
    let body = Bytes::copy_from_slice(input);
    within(4096 + 256 * input.len(), || check(&body));
});

fn check(body: &Bytes) {
    let valid = validate(body);
    let message = match Volatile::decode(body.clone()) {
        Ok(message) => message,
        Err(error) => {
            assert_printable(&error.to_string());
            return;
        }
    };
    assert_eq!(valid, Ok(()), "decoded what does not validate");
    for name in [Some(message.event()), message.key()].into_iter().flatten() {
        assert!((1..=128).contains(&name.len()));
        assert!(!name.chars().any(char::is_control));
    }
    assert!(!message.event().starts_with('$'));
    assert!(message.seq().is_some() || message.key().is_none());
    assert_eq!(validate(&message.raw()), Ok(()));
    if let Err(error) = message.data::<IgnoredAny>() {
        panic!("acceptable data cannot be skipped: {error:?}");
    }
}
