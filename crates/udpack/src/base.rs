//! The lowest floor: tools that every other part uses and that use no other part. Locks, lazily created values, wake
//! flags, counters, log limits, printable text.

pub(crate) mod extensions;
pub(crate) mod lazy;
pub(crate) mod lock;
pub(crate) mod log_limit;
pub(crate) mod pool;
pub(crate) mod rate;
pub(crate) mod sharded;
pub mod text;
pub(crate) mod wake;

pub(crate) use lazy::Lazy;
pub(crate) use lock::lock;
pub(crate) use log_limit::LogLimit;
pub(crate) use rate::Rate;
