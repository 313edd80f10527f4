//! What `delivery.rs` shows over QUIC, over a WebSocket: the same tests, the same promises.

#[path = "delivery.rs"]
mod delivery;
