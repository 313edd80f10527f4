//! The URL that holds everything that a client needs to connect: `udpack://TOKEN@HOST:PORT#sha256:HEX`.
//!
//! Nothing is percent-decoded. Every part has an alphabet that needs no escaping, and other characters are refused,
//! so that every program reads a URL in the same way.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::trust::fingerprint::{Fingerprint, FingerprintError};
use crate::trust::tokens::{MAX_TOKEN, is_token_byte};

/// The port a server listens on unless told otherwise.
pub const DEFAULT_PORT: u16 = 45456;

/// A server's address, with the token to present and the key to expect.
///
/// Parses from `udpack://[TOKEN@]HOST[:PORT][#sha256:HEX]` and from a bare `HOST[:PORT]`; the host is a DNS name, an
/// IPv4 address or an IPv6 address in brackets, a link-local one with its zone (`[fe80::1%eth0]`, the percent sign as
/// it is). `Display` prints the whole URL, including the token; `Debug` hides the token.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnectUrl {
    token: Option<String>,
    host: String,
    port: u16,
    pin: Option<Fingerprint>,
}

impl ConnectUrl {
    /// Makes a URL of a host and a port. The brackets of an IPv6 address may be left out.
    ///
    /// # Errors
    ///
    /// When `host` is neither a DNS name nor an address, or `port` is 0.
    pub fn new(host: &str, port: u16) -> Result<Self, ConnectUrlError> {
        let host = match parse_v6(host) {
            Some(address) => address,
            None => parse_host(host)?,
        };
        if port == 0 {
            return Err(ConnectUrlError::Port);
        }
        Ok(Self {
            token: None,
            host,
            port,
            pin: None,
        })
    }

    /// Reads what names a place and nothing else: `HOST[:PORT]`, without token and fingerprint.
    pub(crate) fn bare(text: &str) -> Option<Self> {
        let url = text.parse::<Self>().ok()?;
        (!text.contains("://")).then_some(url)
    }

    /// Adds the token to log in with.
    ///
    /// # Errors
    ///
    /// When `token` is empty, too long, or has characters that a URL would have to escape.
    pub fn with_token(mut self, token: impl Into<String>) -> Result<Self, ConnectUrlError> {
        let token = token.into();
        if !(1..=MAX_TOKEN).contains(&token.len()) || !token.bytes().all(is_token_byte) {
            return Err(ConnectUrlError::Token);
        }
        self.token = Some(token);
        Ok(self)
    }

    /// Adds the fingerprint of the key that the server must have.
    pub fn with_pin(mut self, pin: Fingerprint) -> Self {
        self.pin = Some(pin);
        self
    }

    /// Returns the token, if the URL has one.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Returns the host in lower case, an IPv6 address without its brackets and with its zone.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The host without the zone of its address; it is the server's name in TLS.
    pub(crate) fn server_name(&self) -> &str {
        self.host
            .split_once('%')
            .map_or(&*self.host, |(name, _)| name)
    }

    /// `HOST:PORT`.
    pub(crate) fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the fingerprint of the key to expect, if the URL has one.
    pub fn pin(&self) -> Option<Fingerprint> {
        self.pin
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, token: Option<&str>) -> fmt::Result {
        f.write_str(SCHEME)?;
        if let Some(token) = token {
            write!(f, "{token}@")?;
        }
        f.write_str(&self.authority())?;
        match self.pin {
            Some(pin) => write!(f, "#{pin}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ConnectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, self.token())
    }
}

impl fmt::Debug for ConnectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, self.token.as_ref().map(|_| "***"))
    }
}

impl FromStr for ConnectUrl {
    type Err = ConnectUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = match text.get(..SCHEME.len()) {
            Some(scheme) if scheme.eq_ignore_ascii_case(SCHEME) => &text[SCHEME.len()..],
            _ if text.contains("://") => return Err(ConnectUrlError::Scheme),
            _ if text.contains(['@', '#']) => return Err(ConnectUrlError::Bare),
            _ => text,
        };
        let (rest, pin) = match rest.split_once('#') {
            Some((rest, pin)) => (rest, Some(pin.parse().map_err(ConnectUrlError::Pin)?)),
            None => (rest, None),
        };
        let (token, authority) = match rest.split_once('@') {
            Some((token, authority)) => (Some(token), authority),
            None => (None, rest),
        };
        if authority.contains(['/', '?']) {
            return Err(ConnectUrlError::Path);
        }
        let (host, port) = split_port(authority)?;
        let mut url = Self::new(&parse_host(host)?, port)?;
        if let Some(token) = token {
            url = url.with_token(token)?;
        }
        url.pin = pin;
        Ok(url)
    }
}

/// Which part of a URL is wrong. The text is not quoted, because it may hold a token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectUrlError {
    /// It begins with another scheme.
    #[error("wrong scheme: expected udpack://")]
    Scheme,
    /// A token or a fingerprint without a scheme.
    #[error("a token or a fingerprint needs the whole form: udpack://TOKEN@HOST:PORT#sha256:HEX")]
    Bare,
    /// The token is empty, too long, or has other characters.
    #[error("bad token: expected 1 to 512 characters from A-Z a-z 0-9 . _ ~ -")]
    Token,
    /// The host is not a name or an address.
    #[error(
        "bad host: expected a DNS name in ASCII, an IPv4 address, or an IPv6 address in brackets \
         (a link-local one may have a zone: [fe80::1%eth0])"
    )]
    Host,
    /// The port is not a number from 1 to 65535.
    #[error("bad port: expected a number from 1 to 65535")]
    Port,
    /// There is a path or a query.
    #[error(
        "unexpected path or query: the host and the port are followed by nothing but #sha256:HEX"
    )]
    Path,
    /// The fingerprint is malformed.
    #[error("bad fingerprint after #")]
    Pin(#[source] FingerprintError),
}

/// Splits `HOST[:PORT]`, leaving the brackets of an IPv6 address with the host.
fn split_port(authority: &str) -> Result<(&str, u16), ConnectUrlError> {
    let (host, port) = if authority.starts_with('[') {
        let end = authority.find(']').ok_or(ConnectUrlError::Host)? + 1;
        let (host, rest) = authority.split_at(end);
        match rest.strip_prefix(':') {
            Some(port) => (host, port),
            None if rest.is_empty() => return Ok((host, DEFAULT_PORT)),
            None => return Err(ConnectUrlError::Host),
        }
    } else {
        match authority.split_once(':') {
            // More colons: an IPv6 address without brackets, or nonsense.
            Some((_, rest)) if rest.contains(':') => return Err(ConnectUrlError::Host),
            Some(parts) => parts,
            None => return Ok((authority, DEFAULT_PORT)),
        }
    };
    let digits = (1..=5).contains(&port.len()) && port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse() {
        Ok(port) if digits && port != 0 => Ok((host, port)),
        _ => Err(ConnectUrlError::Port),
    }
}

/// Parses an IPv6 address into its canonical form, with the zone of a link-local one: `fe80::1%eth0`. The zone is a
/// name on this host, so it is kept unchanged.
fn parse_v6(text: &str) -> Option<String> {
    let (address, zone) = match text.split_once('%') {
        Some((address, zone)) => (address, Some(zone)),
        None => (text, None),
    };
    let address: Ipv6Addr = address.parse().ok()?;
    let Some(zone) = zone else {
        return Some(address.to_string());
    };
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let good = (1..=MAX_ZONE).contains(&zone.len()) && zone.bytes().all(good);
    (good && address.is_unicast_link_local()).then(|| format!("{address}%{zone}"))
}

/// Checks a host and returns its canonical form: lower case, an IPv6 address without brackets.
fn parse_host(host: &str) -> Result<String, ConnectUrlError> {
    if let Some(address) = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
    {
        return parse_v6(address).ok_or(ConnectUrlError::Host);
    }
    let label = |label: &str| {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=63).contains(&label.len())
            && label.bytes().all(good)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A last label of digits makes it an address: resolvers disagree about 1.2.3 and 0x7f.1.
    let host = host.to_ascii_lowercase();
    let last = host.rsplit('.').next().unwrap_or_default();
    let numeric = match last.strip_prefix("0x") {
        Some(hex) => hex.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => last.bytes().all(|byte| byte.is_ascii_digit()),
    };
    let good = if numeric {
        host.parse::<Ipv4Addr>().is_ok()
    } else {
        host.len() <= 253 && host.split('.').all(label)
    };
    good.then_some(host).ok_or(ConnectUrlError::Host)
}

const SCHEME: &str = "udpack://";
/// Longest zone, in bytes; an interface's name has at most 15 on Linux.
const MAX_ZONE: usize = 32;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn parse(text: &str) -> ConnectUrl {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn a_link_local_address_has_a_zone() {
        for zone in ["eth0", "2", "br-lan", "eth0.100", "Wi_Fi"] {
            for text in [
                format!("[fe80::1%{zone}]:9000"),
                format!("udpack://t@[FE80:0::1%{zone}]:9000#sha256:{HEX}"),
            ] {
                let url = parse(&text);
                assert_eq!(url.host(), format!("fe80::1%{zone}"));
                assert_eq!(url.server_name(), "fe80::1");
                assert_eq!(url.authority(), format!("[fe80::1%{zone}]:9000"));
                assert_eq!(parse(&url.to_string()), url);
                assert_eq!(
                    ConnectUrl::new(url.host(), 9000).unwrap().host(),
                    url.host()
                );
            }
        }
        assert_eq!(parse("example.com").server_name(), "example.com");
    }

    #[test]
    fn reads_every_part_of_a_full_line() {
        let text = format!("udpack://abc_DEF-1.2~3@Example.COM:9000#sha256:{HEX}");
        let url = parse(&text);
        assert_eq!(url.token(), Some("abc_DEF-1.2~3"));
        assert_eq!(url.host(), "example.com");
        assert_eq!(url.port(), 9000);
        assert_eq!(url.pin(), Some(HEX.parse().unwrap()));
        assert_eq!(url.to_string(), text.replace("Example.COM", "example.com"));
    }

    #[test]
    fn fills_in_what_is_left_out() {
        for text in ["host", "host:45456", "udpack://host", "UDPACK://HOST:45456"] {
            let url = parse(text);
            assert_eq!(url, ConnectUrl::new("host", DEFAULT_PORT).unwrap());
            assert_eq!(url.to_string(), "udpack://host:45456");
        }
    }

    #[test]
    fn reads_addresses() {
        for (text, host, port) in [
            ("127.0.0.1", "127.0.0.1", 45456),
            ("127.0.0.1:1", "127.0.0.1", 1),
            ("[::1]", "::1", 45456),
            ("[2001:DB8:0::1]:65535", "2001:db8::1", 65535),
            ("a_b.c-d:80", "a_b.c-d", 80),
            ("0xfoo", "0xfoo", 45456),
        ] {
            let url = parse(text);
            assert_eq!((url.host(), url.port()), (host, port));
            assert_eq!(parse(&url.to_string()), url);
        }
        assert_eq!(
            ConnectUrl::new("::1", 5).unwrap().to_string(),
            "udpack://[::1]:5"
        );
        assert_eq!(ConnectUrl::new("[::1]", 5).unwrap().host(), "::1");
    }

    #[test]
    fn names_the_part_at_fault() {
        let long_label = "a".repeat(64);
        let long_name = "a.".repeat(127) + "com";
        let long_token = format!("udpack://{}@host", "t".repeat(513));
        for (text, fault) in [
            ("http://host", "scheme"),
            ("://host", "scheme"),
            ("token@host", "whole form"),
            (&format!("host#{HEX}"), "whole form"),
            ("", "host"),
            ("udpack://", "host"),
            ("udpack://token@", "host"),
            (":80", "host"),
            ("::1", "host"),
            ("[::1", "host"),
            ("[::1]80", "host"),
            ("fe80::1%eth0", "host"),
            ("[fe80::1%]", "host"),
            ("[fe80::1%25eth0%1]", "host"),
            ("[fe80::1%eth 0]", "host"),
            ("[2001:db8::1%eth0]", "host"),
            ("[%eth0]", "host"),
            ("[127.0.0.1]", "host"),
            ("a b", "host"),
            ("ho\nst", "host"),
            ("host.", "host"),
            (".host", "host"),
            ("a..b", "host"),
            ("-a", "host"),
            ("a-", "host"),
            ("bücher.example", "host"),
            ("1.2.3", "host"),
            ("256.1.1.1", "host"),
            ("0x7f.1", "host"),
            ("0X7F000001", "host"),
            (&long_label, "host"),
            (&long_name, "host"),
            ("host:", "port"),
            ("host:0", "port"),
            ("host:65536", "port"),
            ("host:+80", "port"),
            ("host:000080", "port"),
            ("host:http", "port"),
            ("[::1]:", "port"),
            ("host/", "path"),
            ("udpack://host:1/x", "path"),
            ("udpack://host?x=1", "path"),
            ("udpack://@host", "token"),
            ("udpack://a:b@host", "token"),
            ("udpack://a%20b@host", "token"),
            (&long_token, "token"),
            ("udpack://a@b@host", "host"),
            ("udpack://host#", "fingerprint"),
            ("udpack://host#sha256:00", "fingerprint"),
        ] {
            let Err(error) = text.parse::<ConnectUrl>() else {
                panic!("accepted {text}");
            };
            assert!(error.to_string().contains(fault), "{text}: {error}");
        }
        assert!(matches!(
            ConnectUrl::new("host", 0),
            Err(ConnectUrlError::Port)
        ));
        assert!(matches!(
            ConnectUrl::new("a@b", 1),
            Err(ConnectUrlError::Host)
        ));
    }

    #[test]
    fn debug_and_errors_hide_the_token() {
        let url = parse("udpack://hunter2hunter2@host");
        assert_eq!(format!("{url:?}"), "udpack://***@host:45456");
        let error = "udpack://hunter2!@host".parse::<ConnectUrl>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = text.parse::<ConnectUrl>();
        }

        #[test]
        fn what_parses_means_the_same_when_printed(
            text in "(udpack://)?([a-z.~]{0,3}@)?(\\[[0-9a-f:.]{0,9}\\]|[a-z0-9.x_-]{0,9})(:[0-9]{0,6})?(#[0-9a-f]{64})?"
        ) {
            if let Ok(url) = text.parse::<ConnectUrl>() {
                prop_assert_eq!(parse(&url.to_string()), url);
            }
        }

        #[test]
        fn every_url_survives_its_text(
            token in proptest::option::of("[A-Za-z0-9._~-]{1,512}"),
            host in "[a-z0-9]([a-z0-9_-]{0,20}[a-z0-9])?(\\.[a-z][a-z0-9]{0,9}){1,3}",
            port in 1..=u16::MAX,
            pin in proptest::option::of("[0-9a-f]{64}"),
        ) {
            let mut url = ConnectUrl::new(&host, port).unwrap();
            if let Some(token) = token {
                url = url.with_token(token).unwrap();
            }
            if let Some(pin) = pin {
                url = url.with_pin(pin.parse().unwrap());
            }
            prop_assert_eq!(parse(&url.to_string()), url);
        }

        #[test]
        fn every_address_survives_its_text(address: std::net::IpAddr, port in 1..=u16::MAX) {
            let url = ConnectUrl::new(&address.to_string(), port).unwrap();
            prop_assert_eq!(url.host(), address.to_string());
            prop_assert_eq!(parse(&url.to_string()), url);
        }
    }
}
