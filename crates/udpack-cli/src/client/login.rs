//! `login`: stores a server under a name, once it has let this client in.

use std::io;

use anyhow::Context as _;
use udpack::ConnectUrl;
use udpack_transfer::{Code, Remote, TransferError};

use crate::args::LoginArgs;
use crate::config;
use crate::exit::{Failure, Kind};
use crate::output;
use crate::signals::Interrupts;
use crate::target::{Target, retry};

pub(super) async fn run(mut args: LoginArgs, mut interrupts: Interrupts) -> anyhow::Result<()> {
    config::check_name(&args.name).map_err(|what| Failure::new(Kind::Usage, what))?;
    let is_stdin = args.url == "-";
    if is_stdin {
        let mut line = String::new();
        io::stdin()
            .read_line(&mut line)
            .context("cannot read standard input")?;
        args.url = line.trim().to_owned();
    }
    // The text may hold a token: only the reason is shown.
    let url = args.url.parse().map_err(|error| {
        Failure::new(Kind::Usage, format!("not a server: {error}"))
            .hint("use what `udpack-server url` prints at the server: udpack://TOKEN@HOST:PORT#sha256:HEX")
    });
    let url: ConnectUrl = url?;
    if url.token().is_some() && !is_stdin {
        tracing::warn!(
            "the token shows in the list of processes: `login - NAME` reads it from standard input"
        );
    }
    args.connect.to = Some(args.url.clone());
    args.connect.named = true;
    let target = Target::find(&args.connect)?;
    let rights = target
        .run_link_aloud(
            retry(None),
            &mut interrupts,
            async |link| match Remote::new(&link).rights().await {
                Ok(rights) => Ok(Some(rights)),
                Err(TransferError::Refused {
                    code: Code::Unsupported,
                    ..
                }) => Ok(None),
                Err(error) => Err(error.into()),
            },
        )
        .await?;
    let path = config::store(&args.name, &args.url)?;
    let may = rights.map_or_else(String::new, |rights| {
        let all = [
            ("read", rights.read),
            ("write", rights.write),
            ("delete", rights.delete),
            ("share", rights.share),
            ("watch", rights.watch),
            ("admin", rights.admin),
        ];
        let may = all
            .into_iter()
            .filter_map(|(word, may)| may.then_some(word));
        may.collect::<Vec<_>>().join(",")
    });
    let path = output::printable(&path.display().to_string());
    let line = format!("{}  {}  {may}  {path}", args.name, target.address());
    output::unless_gone(output::line(&line))
}
