//! Names that cannot escape, sizes and patterns: what knows nothing of the rest.

pub(crate) mod glob;
pub mod names;
pub(crate) mod path;
pub(crate) mod size;
