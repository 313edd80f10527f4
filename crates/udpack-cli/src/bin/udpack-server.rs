//! `udpack-server`: takes uploads and relays events.

use std::process::ExitCode;

fn main() -> ExitCode {
    udpack_cli::server_main(std::env::args_os())
}
