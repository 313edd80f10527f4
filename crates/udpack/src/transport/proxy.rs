//! HTTP proxies: what names one, for which servers it is, and the request `CONNECT` by which it leads to a server.
//!
//! A proxy is told the server's name and no address, so a client that cannot resolve names works behind one. It sees TLS and
//! nothing of what is in it.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::base::text::printable_within;
use crate::transport::dialer::DialError;
use crate::trust::url::ConnectUrl;

/// An HTTP proxy that takes `CONNECT`, for sessions over TCP; see `ClientBuilder::proxy`.
///
/// Parses from `[http://][USER[:PASSWORD]@]HOST[:PORT]`, user and password percent-encoded where they must be; the default port
/// is 1080, as curl has it. `Debug` and `Display` hide user and password.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    host: String,
    port: u16,
    /// `USER:PASSWORD` in base64.
    credentials: Option<String>,
    /// Servers to which one goes without it.
    except: Vec<Exception>,
}

/// Why a text names no proxy that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// Only `http://` is spoken.
    #[error("a proxy of the kind {0:?} is not supported, only http")]
    Scheme(String),
    /// Host or port are no host and port.
    #[error("expected [http://][USER[:PASSWORD]@]HOST[:PORT]")]
    Address,
    /// User or password are not percent-encoded text, or hold a control character.
    #[error("the user or the password is not percent-encoded text")]
    Credentials,
}

/// The default port.
const PORT: u16 = 1080;
/// The largest head of an answer that is read, in bytes.
const HEAD: usize = 16 << 10;

/// Names a proxy for all programs; the first that is set counts. As in curl, small letters go before capital ones.
const VARIABLES: [&str; 4] = ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];

impl Proxy {
    /// The proxy that the environment names by curl's rules, with its exceptions: `https_proxy`, `HTTPS_PROXY`, `all_proxy` or
    /// `ALL_PROXY`, the first that is set and not empty, and the name of that variable. `None` where none is.
    ///
    /// # Errors
    /// In the second part of the pair, when the value names no proxy that can be used.
    pub fn from_env() -> Option<(&'static str, Result<Self, ProxyError>)> {
        let (name, value) = VARIABLES
            .iter()
            .find_map(|name| Some((*name, set(name)?)))?;
        Some((name, value.parse().map(Self::except_env)))
    }

    /// As [`except`](Self::except), with the list in `no_proxy` or `NO_PROXY`, if one of them is set.
    #[must_use]
    pub fn except_env(self) -> Self {
        match set("no_proxy").or_else(|| set("NO_PROXY")) {
            Some(list) => self.except(&list),
            None => self,
        }
    }

    /// Lets the client go without the proxy to the servers of this list, as the variable `NO_PROXY` has it: names, addresses
    /// and networks with a comma or a space between them. A name stands for itself and all that end in a dot and it, an
    /// address for itself, `10.0.0.0/8` for a network, `*` for everything. What is none of these is passed over.
    #[must_use]
    pub fn except(mut self, list: &str) -> Self {
        let entries = list.split([',', ' ', '\t']);
        self.except = entries.filter_map(Exception::of).collect();
        self
    }

    /// Whether the way to this server leads through the proxy. `host` is a name or an address without brackets.
    pub fn is_for(&self, host: &str) -> bool {
        let address = address(host);
        let name = host.trim_end_matches('.').to_ascii_lowercase();
        !self.except.iter().any(|except| except.has(&name, address))
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Asks a proxy that has been connected to for a way to a server.
    ///
    /// # Cancel safety
    /// A dropped future leaves the stream in the middle.
    pub(super) async fn connect<S>(
        &self,
        stream: &mut S,
        (host, port): (&str, u16),
    ) -> Result<(), DialError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let told = async {
            stream
                .write_all(self.request(host, port).as_bytes())
                .await?;
            read_head(stream).await
        };
        let head = match told.await {
            Ok(head) => head,
            Err(error) => return Err(proxy_error(true, printable_within(&error.to_string(), 256))),
        };
        match status(&head) {
            Some(200..=299) => Ok(()),
            // tinyproxy says 401 of credentials that it does not accept.
            Some(code @ (401 | 407)) => {
                let text = match self.credentials {
                    Some(_) => "it does not accept the user and password",
                    None => "it wants a user and a password",
                };
                Err(proxy_error(false, format!("{text} ({code})")))
            }
            Some(403) => Err(proxy_error(
                false,
                format!("it does not let through to {host}:{port} (403)"),
            )),
            // Of the network behind it, which may change.
            Some(code @ 500..) => Err(proxy_error(true, format!("it answers {code}"))),
            Some(code) => Err(proxy_error(false, format!("it answers {code}"))),
            None => Err(proxy_error(false, "it does not speak HTTP".to_owned())),
        }
    }

    fn request(&self, host: &str, port: u16) -> String {
        let authority = match host.contains(':') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        };
        let credentials = match &self.credentials {
            Some(credentials) => format!("Proxy-Authorization: Basic {credentials}\r\n"),
            None => String::new(),
        };
        format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{credentials}\r\n")
    }
}

fn proxy_error(retry: bool, text: String) -> DialError {
    DialError::Proxy { text, retry }
}

/// The head of an answer, up to its empty line. Behind it the server's part begins, and it speaks only when spoken to.
async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    loop {
        let mut some = [0; 1024];
        let count = stream.read(&mut some).await?;
        let part = some.get(..count).unwrap_or_default();
        if part.is_empty() {
            return Err(io::Error::other("it ends the connection without an answer"));
        }
        head.extend_from_slice(part);
        if let Some(end) = head.windows(4).position(|window| window == b"\r\n\r\n") {
            let whole = end + 4 == head.len() || status(&head).is_none_or(|code| code >= 300);
            return match whole {
                true => Ok(head),
                false => Err(io::Error::other("it says more than its answer")),
            };
        }
        if head.len() > HEAD {
            return Err(io::Error::other("its answer is too long"));
        }
    }
}

/// The status of an answer of HTTP/1.
fn status(head: &[u8]) -> Option<u16> {
    let line = head.strip_prefix(b"HTTP/1.")?.get(1..6)?;
    let [b' ', digits @ .., b' ' | b'\r'] = line else {
        return None;
    };
    let code = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (100..1000).contains(&code).then_some(code)
}

impl FromStr for Proxy {
    type Err = ProxyError;

    fn from_str(text: &str) -> Result<Self, ProxyError> {
        let rest = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some((scheme, _)) => return Err(ProxyError::Scheme(printable_within(scheme, 32))),
            None => text,
        };
        let rest = rest.split(['/', '?', '#']).next().unwrap_or(rest);
        let (user, place) = match rest.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, rest),
        };
        let url: ConnectUrl = match place.rsplit_once(':') {
            Some((_, port)) if !port.is_empty() && !port.contains(']') && !port.contains('.') => {
                place.parse()
            }
            _ => format!("{}:{PORT}", place.trim_end_matches(':')).parse(),
        }
        .map_err(|_| ProxyError::Address)?;
        let credentials = user.map(|user| {
            let (user, password) = user.split_once(':').unwrap_or((user, ""));
            let (user, password) = (decoded(user)?, decoded(password)?);
            Some(base64(&[&user[..], b":", &password[..]].concat()))
        });
        let credentials = match credentials {
            Some(None) => return Err(ProxyError::Credentials),
            Some(some) => some,
            None => None,
        };
        Ok(Self {
            host: url.host().to_owned(),
            port: url.port(),
            credentials,
            except: Vec::new(),
        })
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// A variable that is set and not empty.
fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Proxy").field(&self.to_string()).finish()
    }
}

/// Servers to which one goes without the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    Any,
    /// In small letters, without a dot at either end.
    Name(String),
    /// An address, and how many of its bits count.
    Network(IpAddr, u8),
}

impl Exception {
    fn of(entry: &str) -> Option<Self> {
        if entry == "*" {
            return Some(Self::Any);
        }
        let (host, bits) = match entry.split_once('/') {
            Some((host, bits)) => (host, Some(bits.parse::<u8>().ok()?)),
            None => (entry, None),
        };
        if let Some(address) = address(host) {
            let most = if address.is_ipv6() { 128 } else { 32 };
            let bits = bits.unwrap_or(most);
            return (bits <= most).then_some(Self::Network(address, bits));
        }
        let name = host.trim_matches('.');
        (bits.is_none() && !name.is_empty()).then(|| Self::Name(name.to_ascii_lowercase()))
    }

    fn has(&self, name: &str, address: Option<IpAddr>) -> bool {
        match (self, address) {
            (Self::Any, _) => true,
            (Self::Name(end), None) => {
                let front = name.strip_suffix(&**end);
                front.is_some_and(|front| front.is_empty() || front.ends_with('.'))
            }
            (Self::Network(network, bits), Some(address)) => in_network(address, *network, *bits),
            _ => false,
        }
    }
}

fn in_network(address: IpAddr, network: IpAddr, bits: u8) -> bool {
    let bits = u32::from(bits);
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            let differ = address.to_bits() ^ network.to_bits();
            differ.leading_zeros() >= bits
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => {
            let differ = address.to_bits() ^ network.to_bits();
            differ.leading_zeros() >= bits
        }
        _ => false,
    }
}

/// The address that this is, with or without brackets; its zone does not count.
fn address(host: &str) -> Option<IpAddr> {
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let bare = bare.unwrap_or(host);
    let bare = bare.split('%').next().unwrap_or(bare);
    let v6 = bare
        .parse::<Ipv6Addr>()
        .ok()
        .map(|address| address.to_canonical());
    v6.or_else(|| bare.parse().ok())
}

/// The bytes of a percent-encoded text; none that are control characters.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        };
        if byte.is_ascii_control() {
            return None;
        }
        decoded.push(byte);
    }
    Some(decoded)
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group
            .iter()
            .fold(0, |bits, byte| bits << 8 | u32::from(*byte));
        let bits = bits << (8 * (3 - group.len()));
        for place in 0..4 {
            let digit = (bits >> (18 - 6 * place)) & 0x3f;
            text.push(match place <= group.len() {
                true => DIGITS
                    .get(digit as usize)
                    .map_or('=', |digit| char::from(*digit)),
                false => '=',
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
            ("Aladdin:open sesame", "QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn a_proxy_is_read_from_its_url() {
        for (text, shown, credentials) in [
            ("proxy", "proxy:1080", None),
            ("http://proxy:3128/", "proxy:3128", None),
            ("HTTP://10.0.0.1", "10.0.0.1:1080", None),
            ("http://[fd00::1]:3128", "[fd00::1]:3128", None),
            ("[fd00::1]", "[fd00::1]:1080", None),
            (
                "http://anna:s%65cret@proxy:1",
                "proxy:1",
                Some("anna:secret"),
            ),
            ("anna@proxy", "proxy:1080", Some("anna:")),
            (
                "http://a%40b:c@d:e%3a@proxy:1",
                "proxy:1",
                Some("a@b:c@d:e:"),
            ),
        ] {
            let proxy: Proxy = text.parse().unwrap();
            assert_eq!(proxy.to_string(), shown, "{text}");
            let credentials = credentials.map(|plain| base64(plain.as_bytes()));
            assert_eq!(proxy.credentials, credentials, "{text}");
            let debug = format!("{proxy:?}");
            assert!(
                !debug.contains("secret") && !debug.contains("anna"),
                "{debug}"
            );
        }
        let wrong = |text: &str| text.parse::<Proxy>().unwrap_err();
        assert_eq!(wrong("socks5://a:1"), ProxyError::Scheme("socks5".into()));
        assert_eq!(wrong("https://a:1"), ProxyError::Scheme("https".into()));
        for text in [
            "",
            "http://",
            "http://:3128",
            "a:0",
            "a:70000",
            "a b",
            "http://a:x",
        ] {
            assert_eq!(wrong(text), ProxyError::Address, "{text:?}");
        }
        for text in ["http://a%0a:b@c", "http://a%4:b@c", "http://a%zz@c"] {
            assert_eq!(wrong(text), ProxyError::Credentials, "{text:?}");
        }
    }

    #[test]
    fn some_servers_are_reached_without_it_by_curls_rules() {
        let list = "example.com, .Local 10.0.0.0/8,192.0.2.7 [fd00::]/16,::1,nothing/8,,bad/";
        let proxy: Proxy = "proxy".parse().unwrap();
        let proxy = proxy.except(list);
        for (host, through) in [
            ("example.com", false),
            ("EXAMPLE.com.", false),
            ("www.example.com", false),
            ("notexample.com", true),
            ("example.org", true),
            ("printer.local", false),
            ("local", false),
            ("10.200.3.4", false),
            ("11.0.0.1", true),
            ("192.0.2.7", false),
            ("192.0.2.8", true),
            ("fd01::1", true),
            ("fd00::9%eth0", false),
            ("::1", false),
            ("::ffff:10.0.0.1", false),
        ] {
            assert_eq!(proxy.is_for(host), through, "{host}");
        }
        assert!(!proxy.except("*").is_for("anything"));
    }

    /// What a proxy that answers so is to the client, and whether that is worth another try.
    async fn answered(proxy: &str, answer: &[u8]) -> (String, Result<(), (String, bool)>) {
        let proxy: Proxy = proxy.parse().unwrap();
        let (mut ours, mut theirs) = tokio::io::duplex(1 << 20);
        theirs.write_all(answer).await.unwrap();
        let asked = async {
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                asked.push(theirs.read_u8().await.unwrap());
            }
            theirs.shutdown().await.unwrap();
            String::from_utf8(asked).unwrap()
        };
        let (asked, connected) =
            tokio::join!(asked, proxy.connect(&mut ours, ("a.example", 45456)));
        let connected = connected.map_err(|error| match error {
            DialError::Proxy { text, retry } => (text, retry),
            other => panic!("{other:?}"),
        });
        (asked, connected)
    }

    #[tokio::test]
    async fn the_request_and_what_becomes_of_each_answer() {
        let (asked, connected) = answered("p", b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n").await;
        let request = "CONNECT a.example:45456 HTTP/1.1\r\nHost: a.example:45456\r\n\r\n";
        assert_eq!((&*asked, connected), (request, Ok(())));
        let (asked, connected) = answered("u:p@p", b"HTTP/1.0 200 \r\n\r\n").await;
        let request = "CONNECT a.example:45456 HTTP/1.1\r\nHost: a.example:45456\r\n\
                       Proxy-Authorization: Basic dTpw\r\n\r\n";
        assert_eq!((&*asked, connected), (request, Ok(())));
        let head = [b"HTTP/1.1 200 OK\r\n", &vec![b'x'; 20_000][..]].concat();
        for (proxy, answer, text, retry) in [
            (
                "p",
                &b"HTTP/1.1 407 No\r\n\r\nbody"[..],
                "it wants a user and a password (407)",
                false,
            ),
            (
                "u:p@p",
                b"HTTP/1.1 407 No\r\n\r\n",
                "it does not accept the user and password (407)",
                false,
            ),
            (
                "p",
                b"HTTP/1.1 403 No\r\n\r\n",
                "it does not let through to a.example:45456 (403)",
                false,
            ),
            ("p", b"HTTP/1.1 504 No\r\n\r\n", "it answers 504", true),
            ("p", b"HTTP/1.1 301 No\r\n\r\n", "it answers 301", false),
            (
                "p",
                b"SSH-2.0-OpenSSH\r\n\r\n",
                "it does not speak HTTP",
                false,
            ),
            (
                "p",
                b"HTTP/1.1 2000 No\r\n\r\n",
                "it does not speak HTTP",
                false,
            ),
            (
                "p",
                b"HTTP/1.1 200 OK\r\n\r\nmore",
                "it says more than its answer",
                true,
            ),
            (
                "p",
                b"HTTP/1.1 200 OK\r\n",
                "it ends the connection without an answer",
                true,
            ),
            ("p", b"", "it ends the connection without an answer", true),
            ("p", &head, "its answer is too long", true),
        ] {
            let (_, connected) = answered(proxy, answer).await;
            assert_eq!(connected, Err((text.to_owned(), retry)));
        }
    }
}
