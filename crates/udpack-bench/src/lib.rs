//! Measures udpack beside raw quinn, TLS WebSockets, bare datagrams and its own programs.
//!
//! A scenario has arms that take turns: each round starts a server and a client for each arm, both of them this
//! program again, and asks the client what it measured. What is sent is counted at the receiver, and a run in
//! which less arrived fails. Every connection is a client of its own, with a UDP socket of its own.

mod args;
mod beside;
mod chart;
mod document;
mod driver;
mod fanout;
mod growth;
mod nats;
mod ours;
mod page;
mod peer;
mod programs;
mod raw;
mod report;
mod stats;
mod udp;
mod web;
mod wss;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command, Scenario};

/// Bytes that this process has allocated, where it counts them.
pub type Heap = Option<fn() -> usize>;

/// Runs the program; prints what was measured to standard output, what went wrong to standard error.
pub fn main(heap: Heap) -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Serve(peer) => peer::serve(&peer, heap),
        Command::Drive(peer) => peer::drive(&peer, heap),
        Command::Stream(options) => driver::run(&[Scenario::Stream], &options),
        Command::Upload(options) => driver::run(&[Scenario::Upload], &options),
        Command::Messages(options) => driver::run(&[Scenario::Messages], &options),
        Command::Ping(options) => driver::run(&[Scenario::Ping], &options),
        Command::Handshakes(options) => driver::run(&[Scenario::Handshakes], &options),
        Command::Idle(options) => driver::run(&[Scenario::Idle], &options),
        Command::Fanout(options) => driver::run(&[Scenario::Fanout], &options),
        Command::Interference(options) => driver::run(&[Scenario::Interference], &options),
        Command::SmallFiles(options) => driver::run(&[Scenario::SmallFiles], &options),
        Command::Beside(options) => beside::run(&options),
        Command::Hog(target) => beside::hold(&target),
        Command::PageSink(options) => page::run(&options),
        Command::Growth(options) => growth::run(&options),
        Command::Document(options) => document::fill(&options),
        Command::All(options) => driver::run(&Scenario::ALL, &options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("udpack-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
