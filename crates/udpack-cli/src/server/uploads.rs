//! `udpack-server uploads`: interrupted uploads, seen from outside.

use serde_json::json;
use udpack_transfer::{StoreError, Suspended, purge, uploads};

use crate::args::{UploadsCommand, UploadsDirArgs, UploadsPurgeArgs};
use crate::exit::{Failure, Kind};
use crate::logging::Console;
use crate::output;
use crate::when;

/// Blocks: nothing else is going on.
pub(super) fn run(command: &UploadsCommand, console: &Console) -> anyhow::Result<()> {
    match command {
        UploadsCommand::List(args) => list(&args.dir, console),
        UploadsCommand::Purge(args) => remove(args),
    }
}

fn list(args: &UploadsDirArgs, console: &Console) -> anyhow::Result<()> {
    let waiting = uploads(existing(args)?).map_err(|error| unusable(args, error))?;
    if waiting.is_empty() && !args.json {
        console.line("no interrupted upload is waiting");
    }
    for upload in waiting {
        let written = if args.json {
            output::json(&json!({
                "key": upload.key,
                "owner": upload.owner,
                "path": upload.path,
                "size": upload.size,
                "held": upload.held,
                "touched": when::unix(upload.touched),
                "live": upload.live,
            }))
        } else {
            output::line(&line(&upload))
        };
        if !output::goes_on(written)? {
            break;
        }
    }
    Ok(())
}

/// The path comes last: it may hold spaces.
fn line(upload: &Suspended) -> String {
    let size = upload
        .size
        .map_or_else(|| "-".to_owned(), |size| size.to_string());
    format!(
        "{}  {}  {} of {size}  {}  {}",
        when::utc(when::unix(upload.touched)),
        if upload.live { "live" } else { "idle" },
        upload.held,
        output::printable(&upload.owner),
        output::printable(&upload.path),
    )
}

fn remove(args: &UploadsPurgeArgs) -> anyhow::Result<()> {
    let removed = purge(existing(&args.dir)?, args.older_than.0)
        .map_err(|error| unusable(&args.dir, error))?;
    output::unless_gone(if args.dir.json {
        output::json(&json!({ "removed": removed }))
    } else {
        output::line(&format!("removed {removed}"))
    })
}

/// A missing directory has no uploads; probably another one was meant.
fn existing(args: &UploadsDirArgs) -> anyhow::Result<&std::path::Path> {
    if args.dir.is_dir() {
        return Ok(&args.dir);
    }
    Err(Failure::new(
        Kind::LocalFile,
        format!("no directory {}", args.dir.display()),
    )
    .hint("name the server's upload directory with --dir")
    .into())
}

fn unusable(args: &UploadsDirArgs, error: StoreError) -> anyhow::Error {
    anyhow::Error::new(error).context(format!("cannot read {}", args.dir.display()))
}
