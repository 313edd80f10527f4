//! The protocol's own messages, as they come before and after a peer is admitted: at most one
//! reader takes a message, and what it keeps of the peer's text is short and printable.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::{Corpus, fuzz_target};
use udpack::wire::{
    Ack, Channels, ControlError, Decode, HelloMessage, Message, Open, Refresh, Refreshed, Resumed,
    Welcome, validate,
};
use udpack::{CloseReason, Gap, GoAway, Why};
use udpack_fuzz::{assert_printable, within};

fuzz_target!(|input: &[u8]| -> Corpus {
    let Ok(message) = Message::decode(Bytes::copy_from_slice(input)) else {
        return Corpus::Reject;
    };
    within(8192 + 32 * input.len(), || check(&message));
    Corpus::Keep
});

fn check(message: &Message) {
    let mut accepted = 0;
    if let Some(hello) = kept(HelloMessage::decode(message), "$hello", message) {
        accepted += 1;
        assert!(hello.token.len() <= 512);
        assert_printable(&hello.agent);
        let ticket = hello
            .resume
            .as_ref()
            .and_then(|resume| resume.session.as_ref());
        assert!(ticket.is_none_or(|ticket| is_session(&ticket.session)));
        let shown = format!("{hello:?}");
        let mut other = HelloMessage {
            token: String::new(),
            ..hello
        };
        if let Some(resume) = &mut other.resume
            && let Some(ticket) = &mut resume.session
        {
            ticket.token = [0; 32];
        }
        assert_eq!(shown, format!("{other:?}"), "a token in a log");
    }
    if let Some(welcome) = kept(Welcome::decode(message), "$welcome", message) {
        accepted += 1;
        assert!(is_session(&welcome.session));
        assert!(!welcome.resumed || welcome.reason.is_none());
        assert_printable(welcome.reason.as_deref().unwrap_or_default());
        let mut other = welcome.clone();
        if let Some(grant) = &mut other.resume {
            grant.token = [0; 32];
        }
        assert_eq!(
            format!("{welcome:?}"),
            format!("{other:?}"),
            "a token in a log"
        );
        assert!(welcome.frame >= 4096);
        assert_printable(&welcome.agent);
    }
    if let Some(open) = kept(Open::decode(message), "$open", message) {
        accepted += 1;
        assert!((1..=128).contains(&open.name.len()));
        assert!(!open.name.starts_with('$'));
        assert_printable(&open.name);
        assert!(open.resumable || open.received.is_none());
        if let Some(meta) = open.meta {
            assert_eq!(validate(&meta), Ok(()));
        }
    }
    if let Some(reason) = kept(CloseReason::decode(message), "$close", message) {
        accepted += 1;
        assert_printable(&reason.to_string());
    }
    if let Some(goaway) = kept(GoAway::decode(message), "$goaway", message) {
        accepted += 1;
        assert_printable(&goaway.text);
        assert_printable(goaway.address.as_deref().unwrap_or_default());
    }
    if let Some(channels) = kept(Channels::decode(message), "$channels", message) {
        accepted += 1;
        assert!(channels.open.len() <= message.len());
    }
    if kept(Resumed::decode(message), "$resume", message).is_some() {
        accepted += 1;
    }
    if kept(Ack::decode(message), "$ack", message).is_some() {
        accepted += 1;
    }
    if let Some(refresh) = kept(Refresh::decode(message), "$refresh", message) {
        accepted += 1;
        assert!(refresh.token.len() <= 512);
        assert_eq!(format!("{refresh:?}"), "Refresh { .. }", "a token in a log");
    }
    if let Some(refreshed) = kept(Refreshed::decode(message), "$refreshed", message) {
        accepted += 1;
        if let Refreshed::Refused { text, .. } = refreshed {
            assert_printable(&text);
        }
    }
    if let Some(gap) = kept(Gap::decode(message), "$gap", message) {
        accepted += 1;
        assert!((1..=128).contains(&gap.room.len()));
        let unknown = gap.missing.is_some_and(|missing| missing.why == Why::Epoch);
        assert!(gap.lost > 0 || unknown);
    }
    assert!(accepted <= 1);
}

fn is_session(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
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
