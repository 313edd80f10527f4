//! Names that cannot escape, codes of errors, sizes and patterns: what knows nothing of the rest.

pub(crate) mod code;
pub(crate) mod glob;
pub(crate) mod mapping;
pub mod names;
pub(crate) mod path;
pub(crate) mod phase;
pub(crate) mod size;
pub(crate) mod sums;
pub(crate) mod zeros;
