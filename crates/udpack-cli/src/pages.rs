//! Completion scripts and manual pages, made from the same definitions as the command lines.

use std::io;

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::output;

/// Prints a shell's completion script.
pub(crate) fn completions<A: CommandFactory>(shell: Shell) -> anyhow::Result<()> {
    let mut command = A::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    print(&script)
}

/// Prints the manual page, and one for each command below it.
pub(crate) fn man<A: CommandFactory>() -> anyhow::Result<()> {
    let mut pages = Vec::new();
    let mut command = A::command().disable_help_subcommand(true);
    command.build();
    render(&command, &mut pages)?;
    print(&pages)
}

fn render(command: &Command, pages: &mut Vec<u8>) -> io::Result<()> {
    clap_mangen::Man::new(command.clone()).render(pages)?;
    command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set())
        .try_for_each(|sub| render(sub, pages))
}

fn print(text: &[u8]) -> anyhow::Result<()> {
    output::unless_gone(output::all(text))
}
