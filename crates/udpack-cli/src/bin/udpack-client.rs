//! `udpack-client`: sends files and events to a server.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    udpack_cli::client_main(std::env::args_os())
}
