//! udpack
