//! `udpack-server url`: what clients need to reach the server, the token included.
//!
//! A server that starts leaves its address beside its key, so that this and `token new` know it later. The token is shown
//! on request; a start shows it once, on a terminal.

use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;

use serde_json::json;
use udpack::{ConnectUrl, DEFAULT_PORT, Fingerprint, FingerprintError, TokenFile, TokenFileError};

#[cfg(feature = "web")]
use super::web;
use crate::args::{TokenFileArgs, UrlArgs, WhereArgs};
use crate::exit::{Failure, Kind};
use crate::output;

/// Prints the whole URL. Blocks.
pub(super) fn run(args: &UrlArgs) -> anyhow::Result<()> {
    let path = args.file.path();
    let tokens = match TokenFile::open(&path) {
        Err(TokenFileError::File(error)) if error.is_missing() => {
            let text = format!("no token file {}", shown(&path));
            return Err(Failure::new(Kind::LocalFile, text).hint(NOT_STARTED).into());
        }
        tokens => tokens?,
    };
    let token = tokens.first_token().ok_or_else(|| {
        let text = format!("{} holds digests only, and no token", shown(&path));
        Failure::new(Kind::LocalFile, text)
            .hint("make a token with `udpack-server token new`, which prints its URL once")
    })?;
    #[cfg(feature = "web")]
    if args.web {
        let link = web::left(&args.file.keys)?;
        return web::show(&web::with_token(&link, &token), args.file.json);
    }
    let url = base(&args.at, &args.file.keys)?.with_token(token)?;
    let url = url.to_string();
    output::unless_gone(if args.file.json {
        output::json(&json!({ "url": url }))
    } else {
        output::line(&url)
    })
}

/// The URL without a token, of the server whose key is here.
pub(super) fn base(at: &WhereArgs, keys: &Path) -> anyhow::Result<ConnectUrl> {
    let file = keys.join("pubkey.pem");
    let pin = match Fingerprint::from_public_key_file(&file) {
        Err(FingerprintError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            let text = format!("no key {}", shown(&file));
            return Err(Failure::new(Kind::LocalFile, text).hint(NOT_STARTED).into());
        }
        pin => pin?,
    };
    let left: Option<ConnectUrl> =
        left_line(keys, ADDRESS).and_then(|address| address.parse().ok());
    let host = match (&at.public_host, &left) {
        (Some(host), _) => host.clone(),
        (None, Some(left)) => left.host().to_owned(),
        (None, None) => reachable(Ipv4Addr::UNSPECIFIED.into()).to_string(),
    };
    let port = left.map_or(DEFAULT_PORT, |left| left.port());
    Ok(named(&host, port)?.with_pin(pin))
}

/// A server at this address, by the name that it is to have.
pub(super) fn of(
    bound: SocketAddr,
    public_host: Option<&str>,
    pin: Fingerprint,
) -> anyhow::Result<ConnectUrl> {
    let host = match public_host {
        Some(host) => host.to_owned(),
        None => reachable(bound.ip()).to_string(),
    };
    Ok(named(&host, bound.port())?.with_pin(pin))
}

fn named(host: &str, port: u16) -> anyhow::Result<ConnectUrl> {
    ConnectUrl::new(host, port)
        .map_err(|error| Failure::new(Kind::Usage, format!("--public-host: {error}")).into())
}

/// Leaves the address for [`base`]. Without it that goes by its flags.
pub(super) fn leave(url: &ConnectUrl, keys: &Path) {
    leave_line(keys, ADDRESS, Some(&crate::target::address(url)));
}

/// Leaves a line for later commands in a file beside the key, or takes away that of an earlier start.
pub(super) fn leave_line(keys: &Path, name: &str, line: Option<&str>) {
    let file = keys.join(name);
    let done = match line {
        // Whole, or not there: another command may read it at this moment.
        Some(line) => tempfile::NamedTempFile::new_in(keys).and_then(|mut new| {
            writeln!(new, "{line}")?;
            new.persist(file)?;
            Ok(())
        }),
        None => std::fs::remove_file(file).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        }),
    };
    if let Err(error) = done {
        tracing::debug!(%error, "no line is left in {name} beside the key");
    }
}

/// The line that the last start left.
pub(super) fn left_line(keys: &Path, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(keys.join(name)).ok()?;
    Some(text.trim().to_owned())
}

/// The command that prints the URL of a server with these files.
pub(super) fn command(keys: &Path, token_file: Option<&Path>) -> String {
    let mut command = "udpack-server url".to_owned();
    if keys != Path::new("./keys") {
        command.push_str(&format!(" --keys {}", quoted(keys)));
    }
    if let Some(file) = token_file {
        command.push_str(&format!(" --token-file {}", quoted(file)));
    }
    command
}

/// As a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn shown(path: &Path) -> String {
    std::path::absolute(path).map_or_else(
        |_| path.display().to_string(),
        |path| path.display().to_string(),
    )
}

/// The address to dial for a server bound to `bound`: if that is any address, the one this machine has
/// towards the rest of the world, as far as it knows.
pub(super) fn reachable(bound: IpAddr) -> IpAddr {
    if !bound.is_unspecified() {
        return bound;
    }
    // Connecting a UDP socket sends nothing; it asks the routing table. The addresses are for documentation.
    let towards = |local: &str, remote: &str| -> io::Result<IpAddr> {
        let socket = UdpSocket::bind(local)?;
        socket.connect(remote)?;
        socket.local_addr().map(|address| address.ip())
    };
    let v4 = towards("0.0.0.0:0", "192.0.2.1:9");
    let found = match v4 {
        Err(_) if bound.is_ipv6() => towards("[::]:0", "[2001:db8::1]:9"),
        v4 => v4,
    };
    match found {
        Ok(address) if !address.is_unspecified() => address,
        _ => IpAddr::V4(Ipv4Addr::LOCALHOST),
    }
}

impl TokenFileArgs {
    /// The token file that is meant.
    pub(super) fn path(&self) -> std::path::PathBuf {
        match &self.token_file {
            Some(path) => path.clone(),
            None => self.keys.join("token"),
        }
    }
}

const ADDRESS: &str = "address";
const NOT_STARTED: &str = "start udpack-server once, or name the directory of its key with --keys";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_pasted_whatever_the_directory_is_called() {
        assert_eq!(command(Path::new("./keys"), None), "udpack-server url");
        assert_eq!(
            command(Path::new("it's here"), Some(Path::new("/etc/t"))),
            r"udpack-server url --keys 'it'\''s here' --token-file /etc/t"
        );
    }
}
