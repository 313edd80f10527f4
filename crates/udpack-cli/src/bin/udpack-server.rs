//! `udpack-server`: takes uploads and relays events.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    udpack_cli::server_main(std::env::args_os())
}
