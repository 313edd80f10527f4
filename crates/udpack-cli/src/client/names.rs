//! `remote-names`: what a word of a command line may become that names something at a server, for completion scripts.
//!
//! Somebody waits at a prompt: it ends within two seconds, and has nothing to say where it fails.

use std::time::Duration;

use udpack_transfer::{Kind as EntryKind, Link, RelPath, Remote};

use crate::args::RemoteNamesArgs;
use crate::output;
use crate::target::Target;

/// The longest time that somebody waits for completions.
const PATIENCE: Duration = Duration::from_secs(2);
/// More than this many are of no use.
const MOST: usize = 1000;

pub(super) async fn run(args: RemoteNamesArgs) -> anyhow::Result<()> {
    let mut names = args.servers.clone();
    let listing = async {
        if args.remote
            && let Ok(target) = Target::find(&args.connect)
        {
            let link = Link::new(target.client().clone(), target.address());
            list(&link, &args, &mut names).await;
            link.leave().await;
        }
    };
    // What came until then is shown.
    let _ = tokio::time::timeout(PATIENCE, listing).await;
    names
        .iter()
        .try_for_each(|name| output::unless_gone(output::line(name)))
}

async fn list(link: &Link, args: &RemoteNamesArgs, names: &mut Vec<String>) {
    let (dir, begin) = match args.word.rsplit_once('/') {
        Some((dir, begin)) => (dir, begin),
        None => ("", args.word.as_str()),
    };
    let root = match dir.parse::<RelPath>() {
        Ok(root) => Some(root),
        Err(_) if dir.is_empty() => None,
        Err(_) => return,
    };
    let mut listing = Remote::new(link).list(root.as_ref(), false);
    while names.len() < MOST
        && let Some(Ok(entry)) = listing.next().await
    {
        let name = entry.path.rsplit('/').next().unwrap_or_default();
        // Hidden names only for who asks for them, as a shell does.
        let hidden = name.starts_with('.') && !begin.starts_with('.');
        if name.starts_with(begin) && !hidden && !name.contains(char::is_control) {
            let dir = if dir.is_empty() {
                ""
            } else {
                &args.word[..=dir.len()]
            };
            let end = if entry.kind == EntryKind::Dir {
                "/"
            } else {
                ""
            };
            names.push(format!("{}{dir}{name}{end}", args.before));
        }
    }
}
