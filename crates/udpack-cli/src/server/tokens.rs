//! `udpack-server token`: the tokens of a server, which follows the file by itself.

use std::time::SystemTime;

use serde_json::{Map, Value, json};
use udpack::{NewToken, TokenEntry, TokenFile, TokenFileError, TokenLineError, generate_token};
use udpack_transfer::{RelPath, format_size};

use super::url;
use crate::args::{Span, TokenCommand, TokenFileArgs, TokenNewArgs, TokenRevokeArgs};
use crate::exit::{Failure, Kind};
use crate::output;
use crate::when;

/// Blocks: files are small, and nothing else is going on.
pub(super) fn run(command: &TokenCommand) -> anyhow::Result<()> {
    match command {
        TokenCommand::New(args) => new(args),
        TokenCommand::List(args) => list(&args.file),
        TokenCommand::Revoke(args) => revoke(args),
    }
}

fn new(args: &TokenNewArgs) -> anyhow::Result<()> {
    let id = match &args.name {
        Some(name) => name.clone(),
        // As good as any random bytes, and made of letters that a name may have.
        None => {
            let random = generate_token();
            let tail: String = random
                .chars()
                .filter(char::is_ascii_alphanumeric)
                .take(8)
                .collect();
            format!("t-{tail}")
        }
    };
    let mut fields = Vec::new();
    if !args.scope.is_empty() {
        let mut words: Vec<&str> = Vec::new();
        for scope in &args.scope {
            if !words.contains(&scope.word()) {
                words.push(scope.word());
            }
        }
        fields.push(("scope".to_owned(), words.join(",")));
    }
    if let Some(prefix) = &args.prefix {
        let text = prefix.strip_suffix('/').unwrap_or(prefix);
        let prefix: RelPath = text.parse().map_err(|error| {
            Failure::new(Kind::Usage, format!("--prefix: {error}"))
                .hint("name a directory below the server's --dir, such as teams/red")
        })?;
        if prefix.as_str().contains(char::is_whitespace) {
            return Err(Failure::new(Kind::Usage, "--prefix must not hold spaces")
                .hint("choose a directory without spaces in its name: the token file separates its fields by them")
                .into());
        }
        fields.push(("prefix".to_owned(), prefix.to_string()));
    }
    if let Some(bytes) = args.quota.and_then(|size| size.0) {
        fields.push(("quota".to_owned(), bytes.to_string()));
    }
    if let Some(time) = &args.expires {
        fields.push(("expires".to_owned(), end(time)));
    }
    if args.once {
        fields.push(("once".to_owned(), "open".to_owned()));
    }
    let path = args.file.path();
    if args.file.token_file.is_none() {
        // The first token of a server is its owner's, also when this comes before the first start.
        TokenFile::load_or_create(&path)?;
    }
    let token = TokenFile::issue(
        &path,
        &NewToken {
            id: id.clone(),
            fields,
        },
    )
    .map_err(unfit)?;
    // Before the first start there is no key yet, which the URL has to name.
    let url = match url::base(&args.at, &args.file.keys) {
        Ok(url) => Some(url.with_token(token.clone())?.to_string()),
        Err(_) => None,
    };
    output::unless_gone(if args.file.json {
        output::json(&json!({ "name": id, "token": token, "url": url }))
    } else {
        let mut lines = vec![format!("name {id}"), format!("token {token}")];
        lines.extend(url.map(|url| format!("UDPACK_URL='{url}' udpack-client put FILE")));
        lines.iter().try_for_each(|line| output::line(line))
    })
}

/// The time as the token file has it, which judges it: what is neither a span nor a date is left as it is.
fn end(text: &str) -> String {
    if let Ok(Span(span)) = text.parse() {
        return when::utc(when::unix(SystemTime::now() + span));
    }
    if text.contains('-') && !text.contains('T') {
        return format!("{text}T00:00:00Z");
    }
    text.to_owned()
}

fn list(args: &TokenFileArgs) -> anyhow::Result<()> {
    for entry in TokenFile::open(args.path())?.entries() {
        let written = if args.json {
            output::json(&shown(&entry))
        } else {
            let mut line = output::printable(entry.id());
            for (key, value) in entry.fields() {
                let value = match (key.as_str(), value.parse::<u64>()) {
                    ("quota", Ok(bytes)) => format_size(bytes).replace(' ', ""),
                    _ => told(&entry, key, value),
                };
                line.push_str(&format!("  {key}={value}"));
            }
            if entry.is_expired() {
                line.push_str("  (expired)");
            }
            output::line(&line)
        };
        if !output::goes_on(written)? {
            break;
        }
    }
    Ok(())
}

fn shown(entry: &TokenEntry) -> Value {
    let mut shown = Map::new();
    shown.insert("name".to_owned(), entry.id().into());
    for (key, value) in entry.fields() {
        shown.insert(key.clone(), told(entry, key, value).into());
    }
    if entry.is_expired() {
        shown.insert("expired".to_owned(), true.into());
    }
    Value::Object(shown)
}

/// The value of a field, without digests that say nothing to people.
fn told(entry: &TokenEntry, key: &str, value: &str) -> String {
    match (key, entry.parent()) {
        ("parent", Some(parent)) => parent.to_owned(),
        ("once", _) if entry.is_used() => "used".to_owned(),
        ("once", _) => "unused".to_owned(),
        _ => output::printable(value),
    }
}

fn revoke(args: &TokenRevokeArgs) -> anyhow::Result<()> {
    let path = args.file.path();
    if !TokenFile::revoke(&path, &args.name).map_err(unfit)? {
        let text = format!(
            "no token {} in {}",
            output::printable(&args.name),
            path.display()
        );
        return Err(Failure::new(Kind::Usage, text)
            .hint("`udpack-server token list` shows the names")
            .into());
    }
    output::unless_gone(if args.file.json {
        output::json(&json!({ "revoked": args.name }))
    } else {
        output::line(&format!("revoked {}", output::printable(&args.name)))
    })
}

/// Distinguishes an impossible request of the operator from a damaged file.
fn unfit(error: TokenFileError) -> anyhow::Error {
    let hint = match &error {
        TokenFileError::IdTaken { .. } => "choose another name, or revoke that one first",
        TokenFileError::LastToken { .. } => {
            "make another one with `udpack-server token new`, or stop the server"
        }
        TokenFileError::New(TokenLineError::Expires | TokenLineError::Expired) => {
            "give --expires a time to come: 30d, 12h, 2027-01-31 or 2027-01-31T12:00:00Z"
        }
        TokenFileError::New(_) => "choose another name, such as camera-7",
        _ => return error.into(),
    };
    Failure::new(Kind::Usage, error.to_string())
        .hint(hint)
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_written_as_the_token_file_has_them() {
        assert_eq!(end("2027-01-31"), "2027-01-31T00:00:00Z");
        assert_eq!(end("2027-01-31T12:00:00Z"), "2027-01-31T12:00:00Z");
        assert_eq!(end("1893456000"), "1893456000");
        assert_eq!(end("soon"), "soon");
        let now = when::unix(SystemTime::now());
        let month: Vec<String> = (0..=2)
            .map(|late| when::utc(now + 30 * 86_400 + late))
            .collect();
        assert!(month.contains(&end("30d")));
    }
}
