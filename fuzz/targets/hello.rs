//! The protocol's own messages, as they come before and after a peer is admitted: at most one
//! reader takes a message, and what it keeps of the peer's text is short and printable.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::{Corpus, fuzz_target};
use udpack::wire::{
    ControlError, HelloMessage, Message, decode_close, decode_goaway, decode_hello, decode_open,
    decode_welcome, validate,
};
use udpack_fuzz::{assert_printable, within};

fuzz_target!(|input: &[u8]| -> Corpus {
    let Ok(message) = Message::decode(Bytes::copy_from_slice(input)) else {
        return Corpus::Reject;
    };
    within(8192 + 4 * input.len(), || check(&message));
    Corpus::Keep
});

fn check(message: &Message) {
    let mut accepted = 0;
    if let Some(hello) = kept(decode_hello(message), "$hello", message) {
        accepted += 1;
        assert!(hello.token.len() <= 512);
        assert_printable(&hello.agent);
        let shown = format!("{hello:?}");
        let other = HelloMessage {
            token: String::new(),
            ..hello
        };
        assert_eq!(shown, format!("{other:?}"), "a token in a log");
    }
    if let Some(welcome) = kept(decode_welcome(message), "$welcome", message) {
        accepted += 1;
        assert_eq!(welcome.session.len(), 32);
        assert!(welcome.session.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_ne!(welcome.frame, 0);
        assert_printable(&welcome.agent);
    }
    if let Some(open) = kept(decode_open(message), "$open", message) {
        accepted += 1;
        assert!((1..=128).contains(&open.name.len()));
        assert!(!open.name.starts_with('$'));
        assert_printable(&open.name);
        if let Some(meta) = open.meta {
            assert_eq!(validate(&meta), Ok(()));
        }
    }
    if let Some(reason) = kept(decode_close(message), "$close", message) {
        accepted += 1;
        assert_printable(&reason.to_string());
    }
    if let Some(goaway) = kept(decode_goaway(message), "$goaway", message) {
        accepted += 1;
        assert_printable(&goaway.text);
    }
    assert!(accepted <= 1);
}

/// What was read, after looking at whether it may be, or at the error otherwise.
fn kept<T>(read: Result<T, ControlError>, event: &str, message: &Message) -> Option<T> {
    match read {
        Ok(value) => {
            assert_eq!((message.event(), message.id()), (event, None));
            Some(value)
        }
        Err(error) => {
            assert_printable(&error.to_string());
            assert!(message.event() == event || matches!(error, ControlError::Unexpected { .. }));
            None
        }
    }
}
