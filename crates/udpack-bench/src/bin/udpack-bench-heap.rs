//! `udpack-bench` with an allocator that counts.

use std::alloc::System;
use std::process::ExitCode;

use cap::Cap;

#[global_allocator]
static HEAP: Cap<System> = Cap::new(System, usize::MAX);

fn main() -> ExitCode {
    udpack_bench::main(Some(|| HEAP.allocated()))
}
