//! `udpack-bench`: measures udpack beside raw quinn.

use std::process::ExitCode;

fn main() -> ExitCode {
    udpack_bench::main(None)
}
