//! `put -n`: reports what a run would send and what would be refused, as far as the server reveals it.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::Context as _;
use udpack_transfer::{
    Code, Found, IfExists, Kind as EntryKind, RelPath, Remote, StoreError, TransferError, What,
};

use super::plan::Plan;
use super::put::thing;
use super::report::{Fate, Report, Thing};
use super::verify::{existing, hash};
use crate::args::PutArgs;
use crate::exit::{Explained, Kind};
use crate::logging::Console;

/// The predicted outcome of one entry.
#[derive(Debug)]
struct Outlook {
    path: String,
    source: String,
    what: Thing,
    size: Option<u64>,
    /// An error where it would be refused.
    fate: anyhow::Result<Fate>,
}

/// Asks the server for each name, and reports the predicted outcomes.
pub(super) async fn run(
    args: &PutArgs,
    console: &Console,
    remote: &Remote,
    plan: Plan,
    report: &mut Report,
) -> anyhow::Result<()> {
    let asks = match remote.stat(None).await {
        Ok(_) => true,
        Err(TransferError::Refused {
            code: Code::Forbidden,
            ..
        }) => {
            console
                .note("this token may not read: which names are taken at the server is not known");
            false
        }
        Err(error) => return Err(error.into()),
    };
    let policy = args.transfer.if_exists.into();
    if let Some(name) = &plan.stdin {
        let taken = match asks && policy == IfExists::Error {
            true => existing(remote.stat(Some(name)).await)?.is_some(),
            false => false,
        };
        let fate = if taken {
            Err(exists(name))
        } else {
            Ok(Fate::Send)
        };
        report.planned(name.as_str(), "-", Thing::File, None, fate);
    }
    plan.each(
        args.transfer.pace.jobs.unwrap_or(SIDE_BY_SIDE),
        |found| look(asks.then(|| remote.clone()), found, policy),
        |outlook| {
            if let Err(error) = &outlook.fate
                && matches!(Explained::of(error).kind, Kind::Network | Kind::Auth)
            {
                return outlook.fate.map(drop);
            }
            let (path, source) = (&outlook.path, &outlook.source);
            report.planned(path, source, outlook.what, outlook.size, outlook.fate);
            Ok(())
        },
    )
    .await
}

/// `remote`: unless it cannot be asked.
async fn look(remote: Option<Remote>, found: Found, policy: IfExists) -> Outlook {
    let size = match found.what {
        What::File { size, .. } => Some(size),
        _ => None,
    };
    Outlook {
        path: found.remote.clone(),
        source: found.local.display().to_string(),
        what: thing(&found),
        size,
        fate: fate(remote, found, policy).await,
    }
}

/// An error where it would be refused.
async fn fate(remote: Option<Remote>, found: Found, policy: IfExists) -> anyhow::Result<Fate> {
    let local = found.local;
    let (name, kind) = match found.what {
        What::Failed(error) => return Err(error.into()),
        What::File { remote, size } => {
            File::open(&local).map_err(|source| unreadable(&local, source))?;
            (remote, Asked::File(size))
        }
        What::Dir { remote } => (remote, Asked::Dir),
        What::Link { remote, target } => (remote, Asked::Link(target)),
        _ => return Ok(Fate::Send),
    };
    let Some(remote) = remote else {
        return Ok(Fate::Send);
    };
    let Some(there) = existing(remote.stat(Some(&name)).await)? else {
        return Ok(Fate::Send);
    };
    let is_dir = there.kind == EntryKind::Dir;
    let is_file = there.kind == EntryKind::File;
    match (kind, policy) {
        (Asked::Dir, _) if is_dir => Ok(Fate::Same),
        (Asked::Dir, _) => Err(exists(&name)),
        (Asked::Link(target), _) if there.target.as_ref() == Some(&target) => match policy {
            IfExists::Error => Err(exists(&name)),
            _ => Ok(Fate::Same),
        },
        (Asked::File(_), IfExists::Rename) => Ok(Fate::Send),
        (_, IfExists::Overwrite) if !is_dir => Ok(Fate::Send),
        // A size of 0 may be that of a file that tells none.
        (Asked::File(size), IfExists::Same | IfExists::Skip)
            if is_file && (size == 0 || size == there.size) =>
        {
            let path = local.clone();
            let ours = tokio::task::spawn_blocking(move || hash(&path));
            let (ours, theirs) = tokio::join!(ours, remote.hash(&name));
            let ours = ours.context("the local file was not read")?;
            let ours = ours.map_err(|source| unreadable(&local, source))?;
            match existing(theirs)? {
                None => Ok(Fate::Send),
                Some(theirs) if theirs == ours => Ok(Fate::Same),
                Some(_) if policy == IfExists::Skip => Ok(Fate::Skip),
                Some(_) => Err(exists(&name)),
            }
        }
        (Asked::File(_), IfExists::Skip) if is_file => Ok(Fate::Skip),
        _ => Err(exists(&name)),
    }
}

/// The kind of the new entry.
enum Asked {
    File(u64),
    Dir,
    Link(String),
}

fn unreadable(path: &Path, source: io::Error) -> TransferError {
    TransferError::Source {
        path: path.to_owned(),
        source,
    }
}

/// The error for a taken name.
fn exists(name: &RelPath) -> anyhow::Error {
    let error = StoreError::Exists { path: name.clone() };
    TransferError::Refused {
        code: error.refusal(),
        message: error.to_string(),
        retry: false,
    }
    .into()
}

/// The number of parallel requests, like the transfers of a run.
const SIDE_BY_SIDE: u8 = 4;
