//! The configuration files: named servers, and defaults of options. What is not understood is an error that names its line.
//!
//! They are TOML: tables, and in them keys with texts, whole numbers, `true` and `false`, and lists of texts. `config.toml` is
//! written by its owner; `servers.toml`, of the same form, by `login`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::parser::ValueSource;
use clap::{ArgMatches, Command};
use udpack::ConnectUrl;

use crate::args::ConnectArgs;
use crate::exit::{Failure, Kind};

/// What the files say.
#[derive(Debug, Default)]
pub(crate) struct Config {
    /// URLs by the name of their server.
    servers: BTreeMap<String, String>,
    defaults: Vec<Preset>,
}

/// The default of one option.
#[derive(Debug)]
struct Preset {
    /// The command, or `client` for all that have the option.
    table: String,
    /// The option's long name.
    key: String,
    value: Value,
    /// The file and the line, for errors.
    place: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Text(String),
    Flag(bool),
    Texts(Vec<String>),
}

/// The table for all commands.
const ALL: &str = "client";
const SERVERS: &str = "servers";

/// Where the files are; none where the system names no place.
fn dir() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let base = match set("XDG_CONFIG_HOME").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() => dir,
        _ => PathBuf::from(set("HOME")?).join(".config"),
    };
    Some(base.join("udpack"))
}

impl Config {
    /// Reads the files that there are, and checks all of what they say against these commands.
    pub(crate) fn load(command: &Command) -> anyhow::Result<Self> {
        let mut config = Self::default();
        let Some(dir) = dir() else {
            return Ok(config);
        };
        // What the owner says counts, so it comes last.
        for name in ["servers.toml", "config.toml"] {
            let path = dir.join(name);
            match fs::read_to_string(&path) {
                Ok(text) => config.add(&path, &text, command)?,
                Err(error) if is_absent(&error) => {}
                Err(error) => {
                    let text = format!("cannot read {}: {error}", path.display());
                    return Err(Failure::new(Kind::LocalFile, text).into());
                }
            }
        }
        Ok(config)
    }

    fn add(&mut self, path: &Path, text: &str, command: &Command) -> anyhow::Result<()> {
        let mut table = None;
        let mut secret = false;
        for (index, line) in text.lines().enumerate() {
            let place = format!("{}:{}", path.display(), index + 1);
            let wrong = |what: &str| {
                Failure::new(Kind::Usage, format!("{place}: {what}"))
                    .hint("see the guide for what the file may say; --help lists the options of a command")
            };
            match parse(line).map_err(|what| wrong(&what))? {
                Line::Empty => {}
                Line::Table(name) => {
                    let known = [ALL, SERVERS].contains(&name.as_str())
                        || command.find_subcommand(&name).is_some();
                    if !known {
                        return Err(wrong(&format!("no such table or command: {name}")).into());
                    }
                    table = Some(name);
                }
                Line::Key(key, value) => {
                    let Some(table) = table.clone() else {
                        return Err(wrong(&format!("the key {key} is in no table")).into());
                    };
                    if table == SERVERS {
                        let Value::Text(url) = value else {
                            return Err(wrong("the URL of a server is a text").into());
                        };
                        check_name(&key).map_err(|what| wrong(&what))?;
                        let parsed: ConnectUrl = url
                            .parse()
                            .map_err(|error| wrong(&format!("{key} is not a server: {error}")))?;
                        secret |= parsed.token().is_some();
                        self.servers.insert(key, url);
                        continue;
                    }
                    if !has(command, &table, &key) {
                        return Err(wrong(&format!("no such option: {key}")).into());
                    }
                    self.defaults.push(Preset {
                        table,
                        key,
                        value,
                        place,
                    });
                }
            }
        }
        let mode = fs::metadata(path).map_or(0, |metadata| metadata.mode());
        if secret && mode & 0o077 != 0 {
            let text = format!("others may read {}, and it holds a token", path.display());
            let hint = format!("chmod 600 {}", path.display());
            return Err(Failure::new(Kind::LocalFile, text).hint(hint).into());
        }
        Ok(())
    }

    /// The arguments for these defaults that neither the command line nor the environment gives, each with its place.
    pub(crate) fn arguments(
        &self,
        command: &Command,
        given: &ArgMatches,
    ) -> Vec<(Vec<OsString>, &str)> {
        let Some((verb, given)) = given.subcommand() else {
            return Vec::new();
        };
        let Some(command) = command.find_subcommand(verb) else {
            return Vec::new();
        };
        let mut arguments: BTreeMap<&str, (Vec<OsString>, &str)> = BTreeMap::new();
        // Those of the command count more than those of all.
        let (all, own): (Vec<_>, Vec<_>) =
            self.defaults.iter().partition(|entry| entry.table == ALL);
        for entry in all
            .into_iter()
            .chain(own.into_iter().filter(|entry| entry.table == verb))
        {
            let option = command
                .get_arguments()
                .find(|arg| arg.get_long() == Some(&entry.key));
            let Some(option) = option else { continue };
            let id = option.get_id().as_str();
            let is_given = matches!(
                given.value_source(id),
                Some(ValueSource::CommandLine | ValueSource::EnvVariable)
            );
            if is_given {
                continue;
            }
            let flag = format!("--{}", entry.key);
            let words = match &entry.value {
                Value::Flag(value) if option.get_action().takes_values() => {
                    vec![format!("{flag}={value}")]
                }
                Value::Flag(true) => vec![flag],
                Value::Flag(false) => Vec::new(),
                Value::Text(text) => vec![format!("{flag}={text}")],
                Value::Texts(texts) => texts.iter().map(|text| format!("{flag}={text}")).collect(),
            };
            let words = words.into_iter().map(OsString::from).collect();
            arguments.insert(id, (words, &entry.place));
        }
        arguments.into_values().collect()
    }

    /// Puts the URL of a named server in the place of its name.
    pub(crate) fn resolve(&self, connect: &mut ConnectArgs) {
        if let Some(url) = connect.to.as_ref().and_then(|to| self.servers.get(to)) {
            connect.to = Some(url.clone());
            connect.named = true;
        }
    }

    /// Takes the name of a server off a path, as in `work:photos`.
    pub(crate) fn take<'a>(&self, path: &'a str) -> Option<(&str, &'a str)> {
        let (name, rest) = path.split_once(':')?;
        let (name, _) = self.servers.get_key_value(name)?;
        Some((name, rest))
    }

    /// Takes `NAME:DIR/` or `NAME:` from the end of the paths of an upload, or off the name that it is to have.
    pub(crate) fn take_last(
        &self,
        connect: &mut ConnectArgs,
        paths: &mut Vec<PathBuf>,
        wanted: &mut Option<String>,
    ) -> anyhow::Result<()> {
        if let Some((name, rest)) = wanted.as_ref().and_then(|wanted| self.take(wanted)) {
            connect.to = Some(name.to_owned());
            *wanted = Some(rest.to_owned()).filter(|rest| !rest.is_empty());
            return Ok(());
        }
        let last = paths.last().and_then(|path| path.to_str());
        let Some((name, rest)) = last.and_then(|last| self.take(last)) else {
            return Ok(());
        };
        // A file of that name is meant rather.
        if paths.last().is_some_and(|path| path.exists()) {
            return Ok(());
        }
        if wanted.is_some() || connect.to.is_some() {
            let text = format!("both {name}: and an option say where to");
            return Err(Failure::new(Kind::Usage, text)
                .hint("leave out one of both")
                .into());
        }
        connect.to = Some(name.to_owned());
        *wanted = Some(rest.to_owned()).filter(|rest| !rest.is_empty());
        paths.pop();
        if paths.is_empty() {
            let text = format!("nothing to send to {name}:");
            return Err(Failure::new(Kind::Usage, text)
                .hint("name files or directories before it")
                .into());
        }
        Ok(())
    }

    /// Takes one name off all of these paths, and goes to that server.
    pub(crate) fn take_all<'a>(
        &self,
        connect: &mut ConnectArgs,
        paths: impl Iterator<Item = &'a mut String>,
    ) -> anyhow::Result<()> {
        let mut paths: Vec<_> = paths.collect();
        let named = paths.iter().filter_map(|path| self.take(path));
        let names: Vec<_> = named.map(|(name, _)| name.to_owned()).collect();
        let Some(first) = names.first() else {
            return Ok(());
        };
        if names.len() < paths.len()
            || names.iter().any(|name| name != first)
            || connect.to.as_ref().is_some_and(|to| to != first)
        {
            let text = "the paths of one command are all at one server";
            return Err(Failure::new(Kind::Usage, text)
                .hint(format!(
                    "name it once with --to {first}, and leave it out of the paths"
                ))
                .into());
        }
        for path in &mut paths {
            if let Some((_, rest)) = path.split_once(':') {
                **path = rest.to_owned();
            }
        }
        connect.to = Some(first.clone());
        Ok(())
    }
}

fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

/// Whether some command of the table has the option.
fn has(command: &Command, table: &str, key: &str) -> bool {
    let has = |command: &Command| {
        command
            .get_arguments()
            .any(|arg| arg.get_long() == Some(key))
    };
    match table {
        ALL => command.get_subcommands().any(has),
        table => command.find_subcommand(table).is_some_and(has),
    }
}

/// Whether a server may have this name.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    if name.len() > 64
        || !name.starts_with(|first: char| first.is_ascii_alphanumeric())
        || !name.bytes().all(fits)
    {
        return Err("the name of a server has 1 to 64 letters, digits, - and _, and begins with a letter or a digit".to_owned());
    }
    Ok(())
}

/// Stores a server under a name, for this user alone. Whatever had the name is replaced.
pub(crate) fn store(name: &str, url: &str) -> anyhow::Result<PathBuf> {
    check_name(name).map_err(|what| Failure::new(Kind::Usage, what))?;
    let dir = dir().ok_or_else(|| {
        Failure::new(Kind::LocalFile, "there is no place for the configuration")
            .hint("set HOME or XDG_CONFIG_HOME")
    })?;
    let path = dir.join("servers.toml");
    let failed = || format!("cannot write {}", path.display());
    fs::create_dir_all(&dir).with_context(failed)?;
    let old = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if is_absent(&error) => String::new(),
        Err(error) => return Err(error).with_context(failed),
    };
    let mut servers = BTreeMap::new();
    for line in old.lines() {
        if let Ok(Line::Key(name, Value::Text(url))) = parse(line) {
            servers.insert(name, url);
        }
    }
    servers.insert(name.to_owned(), url.to_owned());
    let mut text = format!("# Written by `udpack-client login`.\n[{SERVERS}]\n");
    for (name, url) in servers {
        let url = url.replace('\\', "\\\\").replace('"', "\\\"");
        writeln!(text, "{name} = \"{url}\"").with_context(failed)?;
    }
    // For its owner alone from the beginning.
    let mut file = tempfile::NamedTempFile::new_in(&dir).with_context(failed)?;
    file.write_all(text.as_bytes()).with_context(failed)?;
    file.as_file().sync_all().with_context(failed)?;
    file.persist(&path)
        .map_err(|error| error.error)
        .with_context(failed)?;
    File::open(&dir)
        .and_then(|dir| dir.sync_all())
        .with_context(failed)?;
    Ok(path)
}

/// One line of a file.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Empty,
    Table(String),
    Key(String, Value),
}

fn parse(line: &str) -> Result<Line, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(Line::Empty);
    }
    if let Some(rest) = line.strip_prefix('[') {
        let (name, rest) = rest.split_once(']').ok_or("a table without its `]`")?;
        only_comment(rest)?;
        return Ok(Line::Table(name.trim().to_owned()));
    }
    let (key, value) = line
        .split_once('=')
        .ok_or("neither `[table]` nor `key = value`")?;
    let key = key.trim();
    let key = key
        .strip_prefix('"')
        .and_then(|key| key.strip_suffix('"'))
        .unwrap_or(key);
    let (value, rest) = parse_value(value.trim_start())?;
    only_comment(rest)?;
    Ok(Line::Key(key.to_owned(), value))
}

fn only_comment(rest: &str) -> Result<(), String> {
    let rest = rest.trim_start();
    match rest.is_empty() || rest.starts_with('#') {
        true => Ok(()),
        false => Err(format!("not understood: {rest}")),
    }
}

/// A value, and what follows it.
fn parse_value(text: &str) -> Result<(Value, &str), String> {
    if text.starts_with(['"', '\'']) {
        let (value, rest) = parse_text(text)?;
        return Ok((Value::Text(value), rest));
    }
    if let Some(mut rest) = text.strip_prefix('[') {
        let mut texts = Vec::new();
        loop {
            rest = rest.trim_start();
            if let Some(rest) = rest.strip_prefix(']') {
                return Ok((Value::Texts(texts), rest));
            }
            let (value, after) = parse_text(rest)?;
            texts.push(value);
            let after = after.trim_start();
            rest = match after.strip_prefix(',') {
                Some(after) => after,
                None if after.starts_with(']') => after,
                None => return Err("a list without its `]` on the same line".to_owned()),
            };
        }
    }
    let end = text
        .find(|char: char| char.is_whitespace() || char == '#')
        .unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    let value = match word {
        "true" => Value::Flag(true),
        "false" => Value::Flag(false),
        number if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) => {
            Value::Text(number.to_owned())
        }
        _ => {
            return Err(
                "a value is a text in quotes, a whole number, true, false, or a list of texts"
                    .to_owned(),
            );
        }
    };
    Ok((value, rest))
}

/// A text in quotes: in single ones as it is, in double ones with `\\` and `\"`.
fn parse_text(text: &str) -> Result<(String, &str), String> {
    let open = "a text without its closing quote";
    if let Some(rest) = text.strip_prefix('\'') {
        let (value, rest) = rest.split_once('\'').ok_or(open)?;
        return Ok((value.to_owned(), rest));
    }
    let mut rest = text
        .strip_prefix('"')
        .ok_or("a list holds texts in quotes")?;
    let mut value = String::new();
    loop {
        let at = rest.find(['"', '\\']).ok_or(open)?;
        let (before, from) = rest.split_at(at);
        value.push_str(before);
        if let Some(after) = from.strip_prefix('"') {
            return Ok((value, after));
        }
        let mut chars = from.chars();
        match chars.nth(1) {
            Some(char @ ('"' | '\\')) => value.push(char),
            _ => {
                return Err(
                    "in a text only \\\" and \\\\ are escapes; single quotes take it as it is"
                        .to_owned(),
                );
            }
        }
        rest = chars.as_str();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    #[test]
    fn lines_are_read_as_toml_reads_them() {
        let key = |value| Line::Key("a".to_owned(), value);
        for (line, read) in [
            ("", Line::Empty),
            ("  # a = 1", Line::Empty),
            ("[ put ] # x", Line::Table("put".to_owned())),
            ("a = \"b#\\\"c\\\\\" # d", key(text("b#\"c\\"))),
            ("\"a\"='b\\'", key(text("b\\"))),
            ("a=12", key(text("12"))),
            ("a = true", key(Value::Flag(true))),
            (
                "a = [ \"b\", 'c', ]",
                key(Value::Texts(vec!["b".to_owned(), "c".to_owned()])),
            ),
        ] {
            assert_eq!(parse(line).as_ref(), Ok(&read), "{line}");
        }
        for line in [
            "a",
            "[put",
            "[put] x",
            "a = b",
            "a = \"b",
            "a = 'b",
            "a = \"\\n\"",
            "a = 1 2",
            "a = [1]",
            "a = ['b'",
            "a = ",
        ] {
            parse(line).expect_err(line);
        }
    }
}
