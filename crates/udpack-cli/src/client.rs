//! `udpack-client`: one module for each command that talks to a server.

mod demo;
mod doctor;
mod dry;
mod events;
mod failures;
mod follow;
mod get;
mod jobs;
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

use crate::args::{ClientArgs, ClientCommand, PaceArgs};
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
    console: Console,
) -> anyhow::Result<()> {
    name_server(&mut args.command, &config)?;
    let log = match &args.command {
        ClientCommand::Put(args) => &args.log,
        ClientCommand::Get(args) => &args.log,
        ClientCommand::Sync(args) => &args.log,
        ClientCommand::Ls(args) => &args.log,
        ClientCommand::Stat(args) => &args.log,
        ClientCommand::Rm(args) => &args.log,
        ClientCommand::Verify(args) => &args.log,
        ClientCommand::Jobs(args) => &args.log,
        ClientCommand::Share(args) => &args.log,
        ClientCommand::Stats(args) => &args.log,
        ClientCommand::Demo(args) => &args.log,
        ClientCommand::Send(args) => &args.log,
        ClientCommand::Request(args) => &args.log,
        ClientCommand::Listen(args) => &args.log,
        ClientCommand::Ping(args) => &args.log,
        ClientCommand::Doctor(args) => &args.log,
        ClientCommand::Login(args) => &args.log,
        ClientCommand::Completions { shell } => return pages::completions::<ClientArgs>(*shell),
        ClientCommand::Man(args) => return pages::man::<ClientArgs>(args.dir.as_deref()),
        ClientCommand::RemoteNames(args) => &args.log,
    };
    let console = console.quiet(log.quiet);
    let _log = logging::start(Role::Client, log, &console)?;
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
        ClientCommand::Completions { .. } | ClientCommand::Man(_) => Ok(()),
    };
    logging::keep(&result);
    result
}

/// Selects a configured server: by `--to NAME`, or by paths such as `NAME:photos`, from which the name is removed.
fn name_server(command: &mut ClientCommand, config: &Config) -> anyhow::Result<()> {
    use ClientCommand as C;
    let connect = match command {
        C::Put(args) => {
            config.take_last(&mut args.connect, &mut args.paths, &mut args.name)?;
            &mut args.connect
        }
        C::Verify(args) => {
            config.take_last(&mut args.connect, &mut args.paths, &mut args.name)?;
            &mut args.connect
        }
        C::Get(args) => {
            // The last of two paths may be `-`, standard output.
            let paths = args.paths.iter_mut().filter(|path| *path != "-");
            config.take_all(&mut args.connect, paths)?;
            &mut args.connect
        }
        C::Stat(args) => {
            config.take_all(&mut args.connect, args.paths.iter_mut())?;
            &mut args.connect
        }
        C::Rm(args) => {
            config.take_all(&mut args.connect, args.paths.iter_mut())?;
            &mut args.connect
        }
        C::Ls(args) => {
            config.take_all(&mut args.connect, args.path.iter_mut())?;
            &mut args.connect
        }
        C::Sync(args) => {
            config.take_one(&mut args.connect, [&mut args.source, &mut args.copy])?;
            &mut args.connect
        }
        C::RemoteNames(args) => {
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
            &mut args.connect
        }
        C::Jobs(args) => &mut args.connect,
        C::Share(args) => &mut args.connect,
        C::Stats(args) => &mut args.connect,
        C::Send(args) => &mut args.connect,
        C::Request(args) => &mut args.connect,
        C::Listen(args) => &mut args.connect,
        C::Ping(args) => &mut args.connect,
        C::Doctor(args) => {
            if let Some(server) = args.server.take() {
                args.connect.to = Some(server);
            }
            &mut args.connect
        }
        C::Login(_) | C::Demo(_) | C::Completions { .. } | C::Man(_) => {
            return Ok(());
        }
    };
    config.resolve(connect);
    Ok(())
}
