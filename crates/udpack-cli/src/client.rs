//! `udpack-client`: one module for each command that talks to a server.

mod demo;
mod doctor;
mod dry;
mod events;
mod failures;
mod follow;
mod get;
mod jobs;
mod local;
mod login;
mod names;
mod ping;
mod plan;
mod producer;
mod put;
mod remote;
mod report;
mod share;
mod stats;
mod sync;
mod verify;

pub(crate) use self::producer::end_commands;
use udpack_transfer::{Downloader, Link, Store, Uploader};

use crate::args::{ClientArgs, ClientCommand, ConnectArgs, LogArgs, PaceArgs};
use crate::config::Config;
use crate::logging::{self, Console, Role};
use crate::pages;
use crate::signals::Interrupts;

/// The permissions that new files of this process do not get; if the system does not tell, those of group and others.
fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    umask
        .and_then(|umask| u32::from_str_radix(umask.trim(), 8).ok())
        .unwrap_or(0o077)
}

impl PaceArgs {
    fn uploader(&self, link: &Link) -> Uploader {
        let uploader = Uploader::new(link)
            .umask(Some(umask()))
            .limit(self.bwlimit.limit_up());
        match self.jobs {
            Some(jobs) => uploader.lanes(jobs.into()),
            None => uploader,
        }
    }

    fn downloader(&self, link: &Link, store: Store) -> Downloader {
        let downloader = Downloader::new(link, store)
            .umask(Some(umask()))
            .limit(self.bwlimit.limit_down());
        match self.jobs {
            Some(jobs) => downloader.lanes(jobs.into()),
            None => downloader,
        }
    }
}

pub(crate) async fn run(
    mut args: ClientArgs,
    config: Config,
    mut console: Console,
) -> anyhow::Result<()> {
    name_server(&mut args.command, &config)?;
    let _log = match args.command.log() {
        Some(log) => {
            console = console.quiet(log.quiet);
            logging::start(Role::Client, log, &console)?
        }
        None => None,
    };
    let interrupts = Interrupts::catch()?;
    let result = match args.command {
        ClientCommand::Put(args) => put::run(args, &console, interrupts).await,
        ClientCommand::Get(args) => get::run(args, &console, interrupts).await,
        ClientCommand::Sync(args) => sync::run(args, &console, interrupts).await,
        ClientCommand::Ls(args) => remote::ls(args, interrupts).await,
        ClientCommand::Stat(args) => remote::stat(args, &console, interrupts).await,
        ClientCommand::Rm(args) => remote::rm(args, &console, interrupts).await,
        ClientCommand::Verify(args) => verify::run(args, &console, interrupts).await,
        ClientCommand::Jobs(args) => jobs::run(args, &console, interrupts).await,
        ClientCommand::Share(args) => share::run(args, interrupts).await,
        ClientCommand::Stats(args) => stats::run(args, interrupts).await,
        ClientCommand::Demo(args) => demo::run(args, &console, interrupts).await,
        ClientCommand::Send(args) => events::send(args, interrupts).await,
        ClientCommand::Request(args) => events::request(args, interrupts).await,
        ClientCommand::Listen(args) => events::listen(args, &console, interrupts).await,
        ClientCommand::Ping(args) => ping::run(args, interrupts).await,
        ClientCommand::Doctor(args) => doctor::run(args, interrupts).await,
        ClientCommand::Login(args) => login::run(args, interrupts).await,
        ClientCommand::RemoteNames(args) => names::run(args).await,
        ClientCommand::Completions { shell } => pages::completions::<ClientArgs>(shell),
        ClientCommand::Man(args) => pages::man::<ClientArgs>(args.dir.as_deref()),
    };
    logging::keep(&result);
    result
}

impl ClientCommand {
    /// How it reaches a server; `None` for a command that talks to none but its own.
    fn connect(&mut self) -> Option<&mut ConnectArgs> {
        Some(match self {
            Self::Put(args) => &mut args.connect,
            Self::Get(args) => &mut args.connect,
            Self::Sync(args) => &mut args.connect,
            Self::Ls(args) => &mut args.connect,
            Self::Stat(args) => &mut args.connect,
            Self::Rm(args) => &mut args.connect,
            Self::Verify(args) => &mut args.connect,
            Self::Jobs(args) => &mut args.connect,
            Self::Share(args) => &mut args.connect,
            Self::Stats(args) => &mut args.connect,
            Self::Send(args) => &mut args.connect,
            Self::Request(args) => &mut args.connect,
            Self::Listen(args) => &mut args.connect,
            Self::Ping(args) => &mut args.connect,
            Self::Doctor(args) => &mut args.connect,
            Self::Login(args) => &mut args.connect,
            Self::RemoteNames(args) => &mut args.connect,
            Self::Demo(_) | Self::Completions { .. } | Self::Man(_) => return None,
        })
    }

    /// What it logs; `None` for a command that only prints a text.
    fn log(&mut self) -> Option<&LogArgs> {
        match self {
            Self::Demo(args) => Some(&args.log),
            other => other.connect().map(|connect| &connect.log),
        }
    }
}

/// Selects a configured server: by `--to NAME`, or by paths such as `NAME:photos`, from which the name is removed.
fn name_server(command: &mut ClientCommand, config: &Config) -> anyhow::Result<()> {
    use ClientCommand as C;
    match command {
        C::Put(args) => config.take_last(&mut args.connect, &mut args.paths, &mut args.name)?,
        C::Verify(args) => config.take_last(&mut args.connect, &mut args.paths, &mut args.name)?,
        C::Get(args) => {
            // The last of two paths may be `-`, standard output.
            let paths = args.paths.iter_mut().filter(|path| *path != "-");
            config.take_all(&mut args.connect, paths)?;
        }
        C::Stat(args) => config.take_all(&mut args.connect, args.paths.iter_mut())?,
        C::Rm(args) => config.take_all(&mut args.connect, args.paths.iter_mut())?,
        C::Ls(args) => config.take_all(&mut args.connect, args.path.iter_mut())?,
        C::Sync(args) => {
            config.take_one(&mut args.connect, [&mut args.source, &mut args.copy])?;
        }
        C::RemoteNames(args) => {
            args.connect.log = LogArgs::quiet();
            let word = std::mem::take(&mut args.word);
            args.remote = true;
            if let Some((name, rest)) = config.take(&word) {
                args.before = format!("{name}:");
                args.word = rest.to_owned();
                args.connect.to = Some(name.to_owned());
            } else if let Some(rest) = word.strip_prefix(':') {
                args.before = ":".to_owned();
                args.word = rest.to_owned();
            } else {
                // Another name with a colon is no server's.
                args.remote = !word.contains(':');
                args.servers = config.names(&word);
                args.word = word;
            }
        }
        C::Doctor(args) => {
            if let Some(server) = args.server.take() {
                args.connect.to = Some(server);
            }
        }
        // Its URL is the server.
        C::Login(_) => return Ok(()),
        _ => {}
    }
    if let Some(connect) = command.connect() {
        config.resolve(connect);
    }
    Ok(())
}
