//! Typed events: a type that knows its event's name and what answers it.

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
/// The derive macro (feature `derive`, on by default) refuses a name that cannot be sent, and words it does not
/// know:
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

    /// What answers it when it is a request; `()` for an event that nobody answers.
    type Reply: Serialize + DeserializeOwned;
}
