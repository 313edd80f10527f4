//! The configuration files: named servers, and defaults of options. What is not understood is an error that names its line.
//!
//! They are TOML. `config.toml` is written by its owner; `servers.toml`, of the same form, by `login`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::parser::ValueSource;
use clap::{ArgMatches, Command};
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use udpack::ConnectUrl;

use crate::args::ConnectArgs;
use crate::exit::{Failure, Kind};
use crate::held;

/// What the files say.
#[derive(Debug, Default)]
pub(crate) struct Config {
    /// URLs by the name of their server.
    servers: BTreeMap<String, String>,
    defaults: Vec<Preset>,
    /// The server of this run is that of a default: a name in a path counts more.
    pub(crate) default_server: bool,
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

impl Value {
    /// What a value may be.
    const RULE: &str = "a value is a text, a number, true, false, or a list of texts";

    fn read(value: &DeValue<'_>) -> Option<Self> {
        Some(match value {
            DeValue::String(text) => Self::Text(text.to_string()),
            DeValue::Integer(number) => Self::Text(number.to_string()),
            DeValue::Float(number) => Self::Text(number.to_string()),
            DeValue::Boolean(value) => Self::Flag(*value),
            DeValue::Array(values) => {
                let texts = values.iter().map(|value| value.get_ref().as_str());
                Self::Texts(
                    texts
                        .map(|text| text.map(str::to_owned))
                        .collect::<Option<_>>()?,
                )
            }
            DeValue::Datetime(_) | DeValue::Table(_) => return None,
        })
    }
}

/// The line of a byte, counted from 1.
fn line(text: &str, at: usize) -> usize {
    let before = text.bytes().take(at);
    1 + before.filter(|byte| *byte == b'\n').count()
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
        let place = |span: Range<usize>| format!("{}:{}", path.display(), line(text, span.start));
        let wrong = |span: Range<usize>, what: &str| {
            Failure::new(Kind::Usage, format!("{}: {what}", place(span))).hint(
                "see the guide for what the file may say; --help lists the options of a command",
            )
        };
        let tables = DeTable::parse(text).map_err(|error| {
            let span = error.span().unwrap_or_default();
            wrong(span, error.message())
        })?;
        let mut secret = false;
        for (table, entries) in tables.get_ref() {
            let (span, table) = (table.span(), table.get_ref());
            let DeValue::Table(entries) = entries.get_ref() else {
                let text = format!(
                    "`{table}` is in no table: options stand below [client] or the name of a command, such as [put]"
                );
                return Err(wrong(span, &text).into());
            };
            if ![ALL, SERVERS].contains(&table.as_ref())
                && command.find_subcommand(table.as_ref()).is_none()
            {
                return Err(wrong(span, &format!("no such table or command: {table}")).into());
            }
            for (key, value) in entries {
                let (span, key) = (key.span(), key.get_ref());
                if table == SERVERS {
                    let DeValue::String(url) = value.get_ref() else {
                        return Err(wrong(span, "the URL of a server is a text").into());
                    };
                    check_name(key).map_err(|what| wrong(span.clone(), &what))?;
                    let parsed: ConnectUrl = url
                        .parse()
                        .map_err(|error| wrong(span, &format!("{key} is not a server: {error}")))?;
                    secret |= parsed.token().is_some();
                    self.servers.insert(key.to_string(), url.to_string());
                    continue;
                }
                let Some(takes_values) = option(command, table, key) else {
                    return Err(wrong(span, &format!("no such option: {key}")).into());
                };
                let value =
                    Value::read(value.get_ref()).ok_or_else(|| wrong(value.span(), Value::RULE))?;
                if !takes_values && !matches!(value, Value::Flag(_)) {
                    return Err(wrong(span, &format!("{key} is true or false")).into());
                }
                self.defaults.push(Preset {
                    table: table.to_string(),
                    key: key.to_string(),
                    value,
                    place: place(span),
                });
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

    /// The servers whose names begin so, each as paths do: `work:`.
    pub(crate) fn names(&self, begin: &str) -> Vec<String> {
        let names = self.servers.keys().filter(|name| name.starts_with(begin));
        names.map(|name| format!("{name}:")).collect()
    }

    /// The server that the command line names.
    fn asked<'a>(&self, connect: &'a ConnectArgs) -> Option<&'a str> {
        connect.to.as_deref().filter(|_| !self.default_server)
    }

    /// Goes to the server that a path names, unless the command line names another one.
    fn go(&self, connect: &mut ConnectArgs, name: &str) -> anyhow::Result<()> {
        if self.asked(connect).is_some_and(|to| to != name) {
            let text = format!("both {name}: and an option say where to");
            return Err(Failure::new(Kind::Usage, text)
                .hint("leave out one of both")
                .into());
        }
        connect.to = Some(name.to_owned());
        Ok(())
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
            let (name, rest) = (name.to_owned(), rest.to_owned());
            self.go(connect, &name)?;
            *wanted = Some(rest).filter(|rest| !rest.is_empty());
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
        if wanted.is_some() {
            let text = format!("both {name}: and --as say where to");
            return Err(Failure::new(Kind::Usage, text)
                .hint("leave out one of both")
                .into());
        }
        let (name, rest) = (name.to_owned(), rest.to_owned());
        self.go(connect, &name)?;
        *wanted = Some(rest).filter(|rest| !rest.is_empty());
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
            || self.asked(connect).is_some_and(|to| to != first)
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

    /// As [`take_all`](Self::take_all), for the two paths of a mirror: one of them is here.
    pub(crate) fn take_one(
        &self,
        connect: &mut ConnectArgs,
        paths: [&mut PathBuf; 2],
    ) -> anyhow::Result<()> {
        for path in paths {
            // A directory of that name is meant rather.
            let named = path.to_str().filter(|_| !path.exists());
            if let Some((name, rest)) = named.and_then(|path| self.take(path)) {
                let (name, rest) = (name.to_owned(), format!(":{rest}"));
                self.go(connect, &name)?;
                *path = rest.into();
            }
        }
        Ok(())
    }
}

fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

/// Whether the option takes values, if some command of the table has it.
fn option(command: &Command, table: &str, key: &str) -> Option<bool> {
    let find = |command: &Command| {
        let mut all = command.get_arguments();
        let found = all.find(|arg| arg.get_long() == Some(key))?;
        Some(found.get_action().takes_values())
    };
    match table {
        ALL => command.get_subcommands().find_map(find),
        table => command.find_subcommand(table).and_then(find),
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

/// How long another process that stores a server may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Stores a server under a name, for this user alone. Whatever had the name is replaced; what other processes store at the same
/// time stays.
pub(crate) fn store(name: &str, url: &str) -> anyhow::Result<PathBuf> {
    check_name(name).map_err(|what| Failure::new(Kind::Usage, what))?;
    let dir = dir().ok_or_else(|| {
        Failure::new(Kind::LocalFile, "there is no place for the configuration")
            .hint("set HOME or XDG_CONFIG_HOME")
    })?;
    let path = dir.join("servers.toml");
    let failed = || format!("cannot write {}", path.display());
    fs::create_dir_all(&dir).with_context(failed)?;
    let _held = held::hold(&dir, PATIENCE).with_context(failed)?;
    let old = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if is_absent(&error) => String::new(),
        Err(error) => return Err(error).with_context(failed),
    };
    let mut servers = BTreeMap::new();
    let tables = DeTable::parse(&old).map(Spanned::into_inner);
    // A file that cannot be read is told when it is used; what it holds is replaced.
    if let Ok(tables) = &tables
        && let Some(DeValue::Table(entries)) = tables.get(SERVERS).map(Spanned::get_ref)
    {
        for (name, url) in entries {
            if let Some(url) = url.get_ref().as_str() {
                servers.insert(name.get_ref().to_string(), url.to_owned());
            }
        }
    }
    servers.insert(name.to_owned(), url.to_owned());
    let mut text = format!("# Written by `udpack-client login`.\n[{SERVERS}]\n");
    for (name, url) in servers {
        writeln!(text, "{name} = {}", toml::Value::String(url)).with_context(failed)?;
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
