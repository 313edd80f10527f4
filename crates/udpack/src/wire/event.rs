//! Typed events: a type that names its event and the type of the reply.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A type that is the data of one event: the same on the wire as its [`NAME`](Self::NAME) and its serde form.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use udpack::Event;
///
/// #[derive(Serialize, Deserialize, Event)]
/// #[event(name = "say", reply = Seen)]
/// struct Say {
///     text: String,
/// }
///
/// #[derive(Serialize, Deserialize)]
/// struct Seen(u64);
///
/// assert_eq!(Say::NAME, "say");
/// ```
///
/// The derive macro (feature `derive`, on by default) refuses an invalid name and unknown attributes:
///
/// ```compile_fail
/// #[derive(serde::Serialize, serde::Deserialize, udpack::Event)]
/// #[event(name = "$say")]
/// struct Say;
/// ```
///
/// ```compile_fail
/// #[derive(serde::Serialize, serde::Deserialize, udpack::Event)]
/// #[event(named = "say")]
/// struct Say;
/// ```
pub trait Event: Serialize + DeserializeOwned {
    /// The event's name: 1 to 128 bytes without control characters, not starting with `$`.
    const NAME: &'static str;

    /// The type of the reply when the event is sent as a request; `()` for an event without a reply.
    type Reply: Serialize + DeserializeOwned;
}
