//! `share`: tokens for others, as addresses for a browser and for another `udpack-client`.

use std::time::Duration;

use serde_json::json;
use udpack_transfer::{Remote, ShareEntry, ShareWish, Shared, format_size};

use super::remote::remote_path;
use super::verify::existing;
use crate::args::ShareArgs;
use crate::exit::{Failure, Kind};
use crate::json::concluded;
use crate::output;
#[cfg(feature = "web")]
use crate::qr;
use crate::signals::Interrupts;
use crate::target::{Target, retry};

pub(super) async fn run(args: ShareArgs, interrupts: Interrupts) -> anyhow::Result<()> {
    let mut count = 0;
    let result = share(&args, interrupts, &mut count).await;
    concluded(args.json, count, result)
}

async fn share(
    args: &ShareArgs,
    mut interrupts: Interrupts,
    count: &mut usize,
) -> anyhow::Result<()> {
    for (flag, is_nothing) in [
        (
            "--expires",
            args.expires.is_some_and(|span| span.0.is_zero()),
        ),
        ("--quota", args.quota.and_then(|size| size.0) == Some(0)),
    ] {
        if is_nothing {
            let text = format!("{flag} is 0: nobody could use the link");
            return Err(Failure::new(Kind::Usage, text)
                .hint("say more, or leave it out")
                .into());
        }
    }
    let prefix = remote_path(args.path.as_deref().unwrap_or_default())?;
    let wish = ShareWish {
        prefix,
        quota: args.quota.and_then(|size| size.0),
        expires: args.expires.map(|span| span.0),
        once: args.once,
        read: args.read || args.no_upload,
        write: !args.no_upload,
    };
    let target = Target::find(&args.connect)?;
    target
        .run_link_aloud(retry(None), &mut interrupts, async |link| {
            let remote = Remote::new(&link);
            if let Some(name) = &args.revoke {
                if existing(remote.unshare(name).await)?.is_none() {
                    let text = format!("this token has no share {}", output::printable(name));
                    return Err(Failure::new(Kind::NotFound, text)
                        .hint("`udpack-client share --list` shows those that it has")
                        .into());
                }
                *count += 1;
                return output::unless_gone(match args.json {
                    true => output::json(&json!({ "event": "revoked", "name": name })),
                    false => output::line(&format!("revoked {}", output::printable(name))),
                });
            }
            if args.list {
                for entry in remote.shares().await? {
                    *count += 1;
                    output::unless_gone(listed(&entry, args.json))?;
                }
                return Ok(());
            }
            let made = remote.share(&wish).await?;
            *count += 1;
            let url = target.url_with(&made.token)?;
            let does = if wish.write { "put FILE" } else { "get /" };
            output::unless_gone(shown(&made, &url, does, args.json))
        })
        .await
}

/// Prints a new share, and its address for browsers on a terminal as a picture, too.
fn shown(made: &Shared, url: &str, does: &str, json: bool) -> std::io::Result<()> {
    if json {
        return output::json(&json!({
            "event": "share",
            "name": made.name,
            "token": made.token,
            "url": url,
            "web": made.url,
        }));
    }
    output::line(&format!("name {}", output::printable(&made.name)))?;
    let web = made.url.as_deref().map(output::printable);
    if let Some(web) = &web {
        output::line(&format!("web {web}"))?;
    }
    output::line(&format!("UDPACK_URL='{url}' udpack-client {does}"))?;
    #[cfg(feature = "web")]
    if let Some(web) = &web {
        qr::show(web)?;
    }
    Ok(())
}

fn listed(entry: &ShareEntry, json: bool) -> std::io::Result<()> {
    let prefix = entry.prefix.as_ref().map_or("", |prefix| prefix.as_str());
    let expires = entry.expires_in.map(|left| left.as_secs());
    if json {
        return output::json(&json!({
            "event": "share",
            "name": entry.name,
            "prefix": prefix,
            "read": entry.read,
            "write": entry.write,
            "once": entry.once,
            "used": entry.used,
            "quota": entry.quota,
            "expires_s": expires,
        }));
    }
    let mut line = format!(
        "{}  {}/",
        output::printable(&entry.name),
        output::printable(prefix)
    );
    for (word, is) in [("write", entry.write), ("read", entry.read)] {
        if is {
            line.push_str(&format!("  {word}"));
        }
    }
    if let Some(quota) = entry.quota {
        line.push_str(&format!("  quota={}", format_size(quota).replace(' ', "")));
    }
    if let Some(left) = entry.expires_in {
        line.push_str(&format!("  ends in {}", rounded(left)));
    }
    if entry.once {
        line.push_str(if entry.used { "  used" } else { "  once" });
    }
    output::line(&line)
}

/// To the nearest of the largest unit of which there are two.
fn rounded(time: Duration) -> String {
    let secs = time.as_secs();
    match secs {
        172_800.. => format!("{} days", (secs + 43_200) / 86_400),
        7_200.. => format!("{} hours", (secs + 1_800) / 3_600),
        120.. => format!("{} minutes", (secs + 30) / 60),
        _ => format!("{secs} s"),
    }
}
