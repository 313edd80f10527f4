//! What every other part uses and what knows nothing of the rest: locks, values made when first needed, wake flags,
//! counters, bounds for the log, printable text. The lowest floor.

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
