//! What a member of a room sees of numbered messages.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::ops::Range;

use udpack::{Channel, Gap, Message, Missing, Server};

pub(crate) const ROOM: &str = "hall";

#[derive(Debug, PartialEq, Eq, Clone)]
pub(crate) enum Seen {
    Number(u64),
    Gap(u64, Option<Missing>),
}

pub(crate) fn see(message: &Message) -> Seen {
    match message.gap() {
        Some(Gap {
            room,
            lost,
            missing,
        }) => {
            assert_eq!(room, ROOM);
            Seen::Gap(lost, missing)
        }
        None => Seen::Number(message.data().expect("a number")),
    }
}

/// Sends these numbers to the room.
pub(crate) fn say(server: &Server, numbers: Range<u64>) {
    for number in numbers {
        let sent = server.rooms().to(ROOM).send("n", &number);
        sent.expect("a sound message");
    }
}

pub(crate) async fn next(channel: &Channel) -> Seen {
    see(&channel.recv().await.expect("alive").expect("a message"))
}

pub(crate) async fn hear(channel: &Channel, numbers: Range<u64>) {
    for number in numbers {
        assert_eq!(next(channel).await, Seen::Number(number));
    }
}
