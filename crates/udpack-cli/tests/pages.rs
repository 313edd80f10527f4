//! Completion, manual pages and help, as the shells and terminals that they are for take them.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Server, client, exited, installed, quiet, server, skipped, workdir, write};

/// What a shell prints that was given both completion scripts; nothing where it is not installed.
fn completed(shell: &str, dir: &Path, args: &[&str]) -> Option<String> {
    if quiet(Command::new(shell), dir)
        .arg("--version")
        .output()
        .is_err()
    {
        skipped(&format!("completion in {shell}, which is not installed"));
        return None;
    }
    for (name, mut program) in [("client", client(dir)), ("server", server(dir))] {
        let out = exited(program.args(["completions", shell]));
        assert_eq!(out.code, 0, "{out:?}");
        fs::write(dir.join(name), out.stdout).expect("write");
    }
    let mut command = quiet(Command::new(shell), dir);
    let out = exited(command.env("PATH", installed()).env("HOME", dir).args(args));
    assert_eq!(out.code, 0, "{shell}: {out:?}");
    Some(out.stdout)
}

/// What is typed, and what must be among the completions.
const TYPED: [(&str, &str); 6] = [
    ("udpack-client pu", "put"),
    ("udpack-client put --if", "--if-exists"),
    ("udpack-client put --if-exists ove", "overwrite"),
    ("udpack-server tok", "token"),
    ("udpack-server token re", "revoke"),
    ("udpack-server token new --sco", "--scope"),
];

#[test]
fn bash_completes_commands_flags_and_values() {
    let dir = workdir();
    let mut script = "set -u; source ./client; source ./server\n".to_owned();
    for (typed, _) in TYPED {
        let program = typed.split(' ').next().expect("a program");
        script.push_str(&format!(
            "COMP_WORDS=({typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()\n\
             f=$(complete -p {program} | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n\
             $f {program} \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"\n\
             echo \"${{COMPREPLY[@]-}}\"\n"
        ));
    }
    let Some(out) = completed("bash", dir.path(), &["--norc", "-c", &script]) else {
        return;
    };
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), TYPED.len(), "{out}");
    for ((typed, expected), line) in TYPED.iter().zip(lines) {
        assert!(
            line.split(' ').any(|word| word == *expected),
            "{typed}: {line}"
        );
    }
}

#[test]
fn fish_completes_commands_flags_and_values() {
    let dir = workdir();
    for (typed, expected) in TYPED {
        let script = format!("source ./client; source ./server; complete -C '{typed}'");
        let Some(out) = completed("fish", dir.path(), &["--no-config", "-c", &script]) else {
            return;
        };
        let found = |line: &str| line.split(['\t', '=']).next() == Some(expected);
        assert!(out.lines().any(found), "{typed}: {out}");
    }
}

#[test]
fn zsh_completes_commands_flags_and_values() {
    let dir = workdir();
    for (typed, expected) in TYPED {
        // A shell in a terminal of its own: completion is there only where somebody types.
        let script = format!(
            "zmodload zsh/zpty; zpty shell zsh -f -i\n\
             zpty -w shell \"PS1=; autoload -Uz compinit; compinit -u -D; source ./client; source ./server; echo rea''dy\"\n\
             zpty -r -m shell before '*ready*'\n\
             zpty -w -n shell $'{typed}\\t'\n\
             zpty -r -m shell shown '*{expected}*'\n\
             zpty -d shell; print found"
        );
        let Some(out) = completed("zsh", dir.path(), &["-f", "-c", &script]) else {
            return;
        };
        assert_eq!(out.trim(), "found", "{typed}");
    }
}

/// A server with some files, stored under the name `work` for whoever's home is the second.
fn work() -> (Server, tempfile::TempDir) {
    let server = Server::start_in(workdir(), &["--allow-read"]);
    for name in [
        "data/one",
        "data/two words",
        "dates.txt",
        "other",
        ".hidden",
    ] {
        write(&server.uploads().join(name), b"1");
    }
    let dir = workdir();
    let config = dir.path().join(".config/udpack/servers.toml");
    write(
        &config,
        format!("[servers]\nwork = '{}'\n", server.url()).as_bytes(),
    );
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(config, private).expect("chmod");
    (server, dir)
}

/// What is typed, and all that it may become.
const REMOTE: [(&str, &[&str]); 7] = [
    (
        "udpack-client get work:da",
        &["work:data/", "work:dates.txt"],
    ),
    ("udpack-client get work:data/o", &["work:data/one"]),
    ("udpack-client ls -l work:oth", &["work:other"]),
    ("udpack-client rm wor", &["work:"]),
    ("udpack-client put f work:data/o", &["work:data/one"]),
    (
        "udpack-client sync d work:dat",
        &["work:data/", "work:dates.txt"],
    ),
    ("udpack-client get nosuch:da", &[]),
];

#[test]
fn names_at_a_server_are_listed_for_completion_and_failures_are_silent() {
    let (server, dir) = work();
    let names = |word: &str| {
        let out = exited(client(dir.path()).args(["remote-names", "--", word]));
        assert_eq!((out.code, out.stderr.as_str()), (0, ""), "{out:?}");
        let mut lines: Vec<_> = out.stdout.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(
        names("work:"),
        ["work:data/", "work:dates.txt", "work:other"]
    );
    assert_eq!(names("work:data/t"), ["work:data/two words"]);
    assert_eq!(names("work:.h"), ["work:.hidden"]);
    assert_eq!(names("wo"), ["work:"]);
    for nothing in ["work:nosuch/x", "work:../", "work:data/one/x", "nosuch:a"] {
        assert!(names(nothing).is_empty(), "{nothing}");
    }
    drop(server);
    // Nobody answers any more.
    assert!(names("work:da").is_empty());
}

#[test]
fn bash_completes_names_at_a_server() {
    let (_server, dir) = work();
    for (typed, expected) in REMOTE {
        let script = format!(
            "source ./client; COMP_WORDS=({typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()\n\
             COMP_LINE='{typed}'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDBREAKS=' '\n\
             _udpack_client_remote udpack-client \"${{COMP_WORDS[COMP_CWORD]}}\" x; printf '%s\\n' \"${{COMPREPLY[@]-}}\""
        );
        let Some(out) = completed("bash", dir.path(), &["--norc", "-c", &script]) else {
            return;
        };
        let mut lines: Vec<_> = out.lines().filter(|line| line.contains(':')).collect();
        lines.sort_unstable();
        assert_eq!(lines, expected, "{typed}: {out}");
    }
    // As it is where a colon ends a word.
    let script = "source ./client; COMP_WORDS=(udpack-client get work : da); COMP_CWORD=4; COMPREPLY=()\n\
                  COMP_LINE='udpack-client get work:da'; COMP_POINT=25\n\
                  _udpack_client_remote udpack-client da :; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let Some(out) = completed("bash", dir.path(), &["--norc", "-c", script]) else {
        return;
    };
    let mut lines: Vec<_> = out.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["data/", "dates.txt"]);
}

#[test]
fn fish_completes_names_at_a_server() {
    let (_server, dir) = work();
    for (typed, expected) in REMOTE {
        let script = format!("source ./client; complete -C '{typed}'");
        let Some(out) = completed("fish", dir.path(), &["--no-config", "-c", &script]) else {
            return;
        };
        let lines = out.lines().filter_map(|line| line.split('\t').next());
        let mut lines: Vec<_> = lines.filter(|line| line.contains(':')).collect();
        lines.sort_unstable();
        assert_eq!(lines, expected, "{typed}: {out}");
    }
}

#[test]
fn zsh_completes_names_at_a_server() {
    let (_server, dir) = work();
    for (typed, expected) in REMOTE {
        let Some(expected) = expected.first() else {
            continue;
        };
        let script = format!(
            "zmodload zsh/zpty; zpty shell zsh -f -i\n\
             zpty -w shell \"PS1=; autoload -Uz compinit; compinit -u -D; source ./client; setopt automenu; echo rea''dy\"\n\
             zpty -r -m shell before '*ready*'\n\
             zpty -w -n shell $'{typed}\\t\\t'\n\
             zpty -r -m shell shown '*{}*'\n\
             zpty -d shell; print found",
            expected.trim_end_matches('/')
        );
        let Some(out) = completed("zsh", dir.path(), &["-f", "-c", &script]) else {
            return;
        };
        assert_eq!(out.trim(), "found", "{typed}");
    }
}

#[test]
fn manual_pages_are_written_one_by_one_and_read_by_man() {
    let dir = workdir();
    let pages = dir.path().join("man/man1");
    for mut program in [client(dir.path()), server(dir.path())] {
        let out = exited(program.arg("man").arg(&pages));
        assert_eq!((out.code, out.stdout.as_str()), (0, ""), "{out:?}");
    }
    for page in [
        "udpack-client.1",
        "udpack-client-put.1",
        "udpack-server.1",
        "udpack-server-token-new.1",
        "udpack-server-url.1",
    ] {
        let text = fs::read_to_string(pages.join(page)).expect(page);
        assert_eq!(text.matches(".TH ").count(), 1, "{page}");
    }
    let put = fs::read_to_string(pages.join("udpack-client-put.1")).expect("a page");
    assert!(
        put.contains("Exit codes") && put.contains("Examples"),
        "{put}"
    );
    let file = dir.path().join("file");
    fs::write(&file, "").expect("write");
    let out = exited(client(dir.path()).arg("man").arg(&file));
    assert_eq!(out.code, 3, "{out:?}");
}

#[test]
fn help_is_as_wide_as_asked_and_short_or_long() {
    let dir = workdir();
    let help = |flag: &str, columns: &str| {
        let out = exited(
            client(dir.path())
                .env("COLUMNS", columns)
                .args(["put", flag]),
        );
        assert_eq!(out.code, 0, "{out:?}");
        out.stdout
    };
    for columns in [40, 80] {
        let help = help("-h", &columns.to_string());
        for line in help.lines() {
            // A list of values has no place to be cut at.
            let longest = line.split(' ').map(str::len).max().unwrap_or(0);
            let long = line.chars().count() > columns;
            assert!(!long || longest + 20 > columns, "{columns}: {line}");
        }
    }
    let (short, long) = (help("-h", "80"), help("--help", "80"));
    assert!(short.lines().count() < long.lines().count(), "{short}");
    assert!(!short.contains("Exit codes:"), "{short}");
    assert!(
        long.contains("Examples:") && long.contains("Exit codes:"),
        "{long}"
    );
}
