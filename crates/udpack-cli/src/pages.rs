//! Completion scripts and manual pages, made from the same definitions as the command lines.

use std::os::fd::AsFd;
use std::path::Path;
use std::{env, fs, io};

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::exit::{Failure, Kind};
use crate::output;

/// Prints a shell's completion script.
pub(crate) fn completions<A: CommandFactory>(shell: Shell) -> anyhow::Result<()> {
    let mut command = A::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, &name, &mut script);
    if shell == Shell::Bash {
        // The generator writes the name of a program with a dash in two ways, and finds no command of it.
        let [wrong, right] = ["__subcmd__", "__"].map(|dash| name.replace('-', dash));
        script = String::from_utf8_lossy(&script)
            .replace(&wrong, &right)
            .into_bytes();
    }
    if name == "udpack-client" {
        script.extend_from_slice(match shell {
            Shell::Bash => REMOTE_BASH.as_bytes(),
            Shell::Zsh => REMOTE_ZSH.as_bytes(),
            Shell::Fish => REMOTE_FISH.as_bytes(),
            _ => b"",
        });
    }
    print(&script)
}

/// What is added for names at a server: where they may stand, `udpack-client remote-names` is asked. In `put`, `sync` and
/// `verify`, whose words are mostly local, a colon asks for it.
const REMOTE_BASH: &str = r#"
_udpack_client_remote() {
    _udpack__client "$@"
    local line=${COMP_LINE-} word=${COMP_WORDS[COMP_CWORD]} name
    line=${line:0:${COMP_POINT-0}}
    # bash takes a colon for the end of a word.
    [[ -z $line ]] || word=${line##*[[:space:]]}
    case ${COMP_WORDS[1]-} in
        get | ls | stat | rm) [[ $word != -* ]] || return 0 ;;
        put | sync | verify) [[ $word == *:* && $word != -* ]] || return 0 ;;
        *) return 0 ;;
    esac
    [[ $word == *:* || ${COMP_WORDS[COMP_CWORD-1]} != --* ]] || return 0
    local found=() cut=
    [[ $word != *:* || ${COMP_WORDBREAKS-} != *:* || -z $line ]] || cut=${word%"${word##*:}"}
    while IFS= read -r name; do
        found+=("$(printf %q "${name#"$cut"}")")
        [[ $name != *[/:] ]] || compopt -o nospace 2>/dev/null
    done < <(udpack-client remote-names -- "$word" 2>/dev/null)
    [[ ${#found[@]} -eq 0 ]] || COMPREPLY=("${found[@]}")
}
complete -F _udpack_client_remote -o bashdefault -o default udpack-client
"#;
const REMOTE_ZSH: &str = r#"
_udpack_client_remote() {
    local word=${(Q)PREFIX} command=${words[2]-}
    _udpack-client "$@"
    case $command:$word in
        (get|ls|stat|rm):-*) return ;;
        (get|ls|stat|rm):*) ;;
        (put|sync|verify):*:*) ;;
        *) return ;;
    esac
    local -a found
    found=("${(@f)$(udpack-client remote-names -- "$word" 2>/dev/null)}")
    compadd -S '' -- ${(M)found:#*[/:]}
    compadd -- ${found:#*[/:]}
}
compdef _udpack_client_remote udpack-client
"#;
const REMOTE_FISH: &str = r#"
complete -c udpack-client -n "__fish_seen_subcommand_from get ls stat rm; and not string match -q -- '-*' (commandline -ct)" -f -a "(udpack-client remote-names -- (commandline -ct) 2>/dev/null)"
complete -c udpack-client -n "__fish_seen_subcommand_from put sync verify; and string match -q -- '*:*' (commandline -ct)" -a "(udpack-client remote-names -- (commandline -ct) 2>/dev/null)"
"#;

/// Prints the manual pages, or writes each into a file of its own, as `man` looks for them.
pub(crate) fn man<A: CommandFactory>(dir: Option<&Path>) -> anyhow::Result<()> {
    let mut command = A::command().disable_help_subcommand(true);
    command.build();
    if let Some(dir) = dir {
        return fs::create_dir_all(dir)
            .and_then(|()| clap_mangen::generate_to(command, dir))
            .map_err(|error| {
                let text = format!("cannot write into {}: {error}", dir.display());
                Failure::new(Kind::LocalFile, text)
                    .hint("choose another directory")
                    .into()
            });
    }
    let mut pages = Vec::new();
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

/// Wraps text at `columns` columns. Continuation lines are indented to the text of their line, not to an option's
/// name.
pub(crate) fn wrapped(text: &str, columns: usize) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let line = line.trim_end();
        let first = line.len() - line.trim_start().len();
        // Two columns: the names, then after at least two spaces their descriptions.
        let second = line[first..]
            .rfind("  ")
            .map(|at| shown(&line[..first + at]) + 2);
        let hang = second
            .filter(|at| *at + NARROWEST / 2 <= columns)
            .unwrap_or(first);
        let mut at = 0;
        for (number, word) in line.split(' ').enumerate() {
            let long = shown(word);
            if number > 0 && at > hang && at + 1 + long > columns && !word.is_empty() {
                out.truncate(out.trim_end_matches(' ').len());
                out.push('\n');
                out.push_str(&" ".repeat(hang));
                at = hang;
            } else if number > 0 {
                out.push(' ');
                at += 1;
            }
            out.push_str(word);
            at += long;
        }
        out.push('\n');
    }
    out
}

/// The width of text in columns, without escape sequences.
fn shown(text: &str) -> usize {
    let mut styled = false;
    let takes = |c: &char| match *c {
        '\u{1b}' => {
            styled = true;
            false
        }
        'm' if styled => {
            styled = false;
            false
        }
        _ => !styled,
    };
    text.chars().filter(takes).count()
}

/// The width of help in columns: that of the terminal, up to an easily readable width.
pub(crate) fn width() -> usize {
    let terminal = terminal_columns(&io::stdout());
    let told = || env::var("COLUMNS").ok()?.parse().ok();
    terminal
        .or_else(told)
        .unwrap_or(WIDEST)
        .clamp(NARROWEST, WIDEST)
}

/// The columns of a terminal, if that is one.
pub(crate) fn terminal_columns(terminal: &impl AsFd) -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(terminal).ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

fn print(text: &[u8]) -> anyhow::Result<()> {
    output::unless_gone(output::all(text))
}

const WIDEST: usize = 100;
/// The smallest width at which descriptions fit beside their options.
const NARROWEST: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_go_on_below_their_text() {
        for (text, columns, lines) in [
            ("one two three", 8, "one two\nthree\n"),
            (
                "  -a, --all  one two three four five",
                38,
                "  -a, --all  one two three four five\n",
            ),
            (
                "  -a, --all  one two three four five",
                34,
                "  -a, --all  one two three four\n             five\n",
            ),
            (
                "          one two three",
                18,
                "          one two\n          three\n",
            ),
            (
                "averylongwordthatcannotbecut it is",
                10,
                "averylongwordthatcannotbecut\nit is\n",
            ),
            (
                "\u{1b}[1mone\u{1b}[0m two",
                7,
                "\u{1b}[1mone\u{1b}[0m two\n",
            ),
            ("\n", 10, "\n"),
        ] {
            assert_eq!(wrapped(text, columns), lines, "{text}");
        }
    }
}
