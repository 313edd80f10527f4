//! The programs `udpack-server` and `udpack-client`: arguments in, exit code out.
//!
//! Standard output carries results, standard error everything else. The work is done in the
//! libraries; this crate has arguments, output and exit codes only.

mod args;
mod client;
mod config;
mod exit;
mod held;
mod hub;
mod json;
mod logging;
mod memory;
mod output;
mod pages;
mod progress;
#[cfg(feature = "web")]
mod qr;
mod remembered;
mod server;
mod signals;
mod target;
mod value;
mod via;
mod when;

use std::ffi::OsString;
use std::future::Future;
use std::io::{self, IsTerminal as _};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser};
use listenfd::ListenFd;

use args::{ClientArgs, ServerArgs};
use config::Config;
use exit::{Explained, Failure, Kind};
use logging::Console;

/// Runs `udpack-server` with these arguments, the first of which is the program's name.
pub fn server_main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // Before other threads start, because it changes the environment.
    let given = ListenFd::from_env();
    run::<ServerArgs, _>(args, |args, console| server::run(args, given, console))
}

/// Runs `udpack-client` with these arguments, the first of which is the program's name.
pub fn client_main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = args.into_iter().collect();
    let (config, args) = match configured(args) {
        Ok(configured) => configured,
        Err(error) => {
            let explained = Explained::of(&error);
            explained.print(&Console::default());
            return explained.exit_code();
        }
    };
    run::<ClientArgs, _>(args, |args, console| client::run(args, config, console))
}

/// Reads the configuration, and adds its defaults to a client's arguments.
fn configured(mut args: Vec<OsString>) -> anyhow::Result<(Config, Vec<OsString>)> {
    let mut command = ClientArgs::command();
    command.build();
    // What is wrong with them is told where they are used.
    let Ok(given) = command.clone().try_get_matches_from(&args) else {
        return Ok((Config::default(), args));
    };
    let verb = given.subcommand_name().unwrap_or_default();
    if ["completions", "man"].contains(&verb) {
        return Ok((Config::default(), args));
    }
    let mut config = Config::load(&command)?;
    let mut defaults = config.arguments(&command, &given);
    let at = args.iter().position(|arg| arg == verb);
    let at = at.map_or(args.len(), |at| at + 1);
    let is_sound = |words: &[OsString]| {
        let (before, after) = args.split_at(at);
        let all = before.iter().chain(words).chain(after);
        command.clone().try_get_matches_from(all).map(drop)
    };
    // What the command line says counts more than what does not go with it.
    defaults.retain(|(words, _)| {
        let error = is_sound(words).err();
        error.is_none_or(|error| error.kind() != ErrorKind::ArgumentConflict)
    });
    let words: Vec<_> = defaults
        .iter()
        .flat_map(|(words, _)| words.clone())
        .collect();
    if let Err(error) = is_sound(&words) {
        let alone = |(words, place): &(Vec<OsString>, &str)| {
            let error = is_sound(words).err()?;
            Some((error, (*place).to_owned()))
        };
        let (error, place) = defaults
            .iter()
            .find_map(alone)
            .unwrap_or_else(|| (error, "the defaults of the configuration".to_owned()));
        let text = error.to_string();
        // With the values that it may have, where these follow.
        let lines = text.lines().map(str::trim);
        let text = lines
            .take_while(|line| !line.is_empty())
            .collect::<Vec<_>>()
            .join(" ");
        let text = &*text;
        let text = text.strip_prefix("error: ").unwrap_or(text);
        return Err(Failure::new(Kind::Usage, format!("{place}: {text}")).into());
    }
    let is_server = |word: &OsString| word.as_encoded_bytes().starts_with(b"--to=");
    let default_server = words.iter().any(is_server);
    args.splice(at..at, words);
    config.default_server = default_server;
    Ok((config, args))
}

fn run<A: Parser, F: Future<Output = anyhow::Result<()>>>(
    args: impl IntoIterator<Item = OsString>,
    main: impl FnOnce(A, Console) -> F,
) -> ExitCode {
    let matches = A::command()
        .term_width(pages::width())
        .try_get_matches_from(args);
    let args = match matches.and_then(|mut matches| A::from_arg_matches_mut(&mut matches)) {
        Ok(args) => args,
        Err(error) => {
            // Help and version are not errors and go to standard output, which may be closed.
            let _ = match error.kind() {
                ErrorKind::DisplayHelp => {
                    let text = error.render();
                    let text = if io::stdout().is_terminal() && !logging::no_colour() {
                        text.ansi().to_string()
                    } else {
                        text.to_string()
                    };
                    output::all(pages::wrapped(&text, pages::width()).as_bytes())
                }
                _ => error.print(),
            };
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let console = Console::default();
    let result = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers())
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .and_then(|runtime| {
            runtime.spawn(memory::give_back());
            let result = runtime.block_on(async {
                signals::survive_file_size_limit()
                    .context("cannot catch the signal of the limit for file sizes")?;
                main(args, console.clone()).await
            });
            client::end_commands();
            // A blocking read of a slow disk must not delay the exit.
            runtime.shutdown_timeout(Duration::from_millis(500));
            result
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let explained = Explained::of(&error);
            explained.print(&console);
            explained.exit_code()
        }
    }
}

/// The number of threads for packets: one core is left to the threads that read, write and hash files. On two cores,
/// where they have one each, a file of 1 GiB took 11 % less time than with two (median of 10, loopback, tmpfs): the
/// second mostly took turns with them.
fn workers() -> usize {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    cores.saturating_sub(1).max(1)
}
