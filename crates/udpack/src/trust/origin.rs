//! Web pages as clients: the path at which they connect, and which pages may connect.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::trust::web_certificate::WebCertificate;

/// How a server serves browsers, for [`ServerBuilder::web`](crate::ServerBuilder::web): at which path, and for which
/// pages.
///
/// ```
/// use udpack::{Origins, Web};
///
/// let web = Web::new().origins(Origins::only(["https://example.com"]));
/// # drop(web);
/// ```
#[derive(Debug, Clone)]
pub struct Web {
    path: String,
    origins: Origins,
    /// The accepted host names, beside those that nobody else can own; `None` accepts every name.
    hosts: Option<Vec<String>>,
    certificate: Option<WebCertificate>,
}

impl Web {
    /// Accepts pages of the server's own host, at `/udpack`.
    pub fn new() -> Self {
        Self {
            path: "/udpack".to_owned(),
            origins: Origins::SameHost,
            hosts: None,
            certificate: None,
        }
    }

    /// Sets the path of the URL that pages connect to, such as `/udpack`; the query of their URL is ignored. A
    /// session at another path is answered with the status 404.
    #[must_use]
    pub fn path(mut self, path: impl Into<String>) -> Self {
        self.path = path.into();
        self
    }

    /// Sets the pages that may connect. A page of another origin gets the status 403.
    #[must_use]
    pub fn origins(mut self, origins: Origins) -> Self {
        self.origins = origins;
        self
    }

    /// Sets the host names by which browsers reach this server. Addresses, names without a dot and names that end in
    /// `.local` or `.localhost` are always accepted. A session under another name gets the status 403. Defaults to
    /// every name.
    ///
    /// The owner of a name can point it to this server's address after a page was loaded from it ("DNS rebinding").
    /// The browser then treats that page as one of the same host, although it is a stranger's. Nobody else can do
    /// this with addresses and with the names above.
    #[must_use]
    pub fn hosts<H: Into<String>>(mut self, hosts: impl IntoIterator<Item = H>) -> Self {
        self.hosts = Some(hosts.into_iter().map(Into::into).collect());
        self
    }

    /// A certificate that browsers trust by its authority, for WebTransport and [`Server::https`](crate::Server::https), in place of
    /// those that the server issues to itself. Clients that speak `udpack/1` get the server's own key as before.
    #[must_use]
    pub fn certificate(mut self, certificate: WebCertificate) -> Self {
        self.certificate = Some(certificate);
        self
    }

    /// The certificate of [`certificate`](Self::certificate).
    pub(crate) fn web_certificate(&self) -> Option<&WebCertificate> {
        self.certificate.as_ref()
    }

    /// Whether browsers may reach the server under this name or address, which is without a port; an IPv6 address has its
    /// brackets.
    pub fn is_host(&self, host: &str) -> bool {
        let Some(hosts) = &self.hosts else {
            return true;
        };
        is_private_host(host) || hosts.iter().any(|one| one.eq_ignore_ascii_case(host))
    }

    /// Whether a page of this origin may connect to the server under this name or address.
    pub fn is_origin(&self, origin: &str, host: &str) -> bool {
        self.origins.allow(origin, host)
    }

    /// The path of [`path`](Self::path).
    pub fn url_path(&self) -> &str {
        &self.path
    }

    pub(crate) fn is_at(&self, path: &str) -> bool {
        self.path == path
    }

    pub(crate) fn allows(&self, origin: Option<&str>, host: &str) -> bool {
        // Programs other than browsers send none, and could send any origin.
        origin.is_none_or(|origin| self.is_host(host) && self.is_origin(origin, host))
    }
}

impl Default for Web {
    fn default() -> Self {
        Self::new()
    }
}

/// The pages that may connect to a server, by their origin: scheme, host and port of the URL that they were loaded from.
///
/// A browser always sends the true origin of a page. Other programs send none, and none is required of them: the
/// token authenticates every client in any case.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Origins {
    /// Pages whose host is the one that they connect to, at any port.
    #[default]
    SameHost,
    /// Pages of these origins, each as the browser writes it: `https://example.com`, `http://127.0.0.1:8080`. Letters of
    /// either case are the same.
    Only(Vec<String>),
    /// Pages of the same host, and of these origins.
    SameHostAnd(Vec<String>),
    /// Every page. A stranger's page that knows a token can then use it.
    Any,
}

impl Origins {
    /// Pages of these origins.
    pub fn only<O: Into<String>>(origins: impl IntoIterator<Item = O>) -> Self {
        Self::Only(origins.into_iter().map(Into::into).collect())
    }

    /// The host of an origin; an IPv6 address keeps its brackets. `None` where the text is no origin of a web page.
    pub fn host(origin: &str) -> Option<&str> {
        let rest = origin
            .strip_prefix("https://")
            .or_else(|| origin.strip_prefix("http://"))?;
        let end = match rest.strip_prefix('[') {
            Some(address) => address.find(']')? + 2,
            None => rest.find(':').unwrap_or(rest.len()),
        };
        let (host, port) = rest.split_at(end);
        let sound = port.is_empty()
            || port
                .strip_prefix(':')
                .is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        (sound && !host.is_empty()).then_some(host)
    }

    /// Whether a page of this origin may connect to a server that it knows as `host`, without a port.
    fn allow(&self, origin: &str, host: &str) -> bool {
        let same = || Self::host(origin).is_some_and(|page| page.eq_ignore_ascii_case(host));
        let is_in = |list: &[String]| list.iter().any(|one| one.eq_ignore_ascii_case(origin));
        match self {
            Self::Any => true,
            Self::Only(origins) => is_in(origins),
            Self::SameHost => same(),
            Self::SameHostAnd(origins) => same() || is_in(origins),
        }
    }
}

/// Whether the host is an address, or a name that no public name server resolves.
fn is_private_host(host: &str) -> bool {
    let v6 = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let lower = host.to_ascii_lowercase();
    host.parse::<Ipv4Addr>().is_ok()
        || v6.is_some_and(|text| text.parse::<Ipv6Addr>().is_ok())
        || (!host.is_empty() && !host.contains(['.', '[', ':', '@']))
        || [".local", ".localhost"]
            .iter()
            .any(|end| lower.ends_with(end))
}

/// The transport below the protocol of a socket's connection.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transport {
    /// QUIC itself.
    Quic,
    /// WebTransport, from a page of this origin: as the browser said, at most 256 bytes, printable. `None` if the
    /// client sent none; programs other than browsers send none.
    WebTransport {
        /// The page's origin, such as `https://example.com`.
        origin: Option<Arc<str>>,
    },
    /// A WebSocket over TCP, where the network lets no UDP pass; the origin as with WebTransport.
    WebSocket {
        /// The page's origin, such as `https://example.com`.
        origin: Option<Arc<str>>,
    },
}

impl Transport {
    /// Its name: `quic`, `webtransport` or `wss`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::WebTransport { .. } => "webtransport",
            Self::WebSocket { .. } => "wss",
        }
    }

    /// The origin of the page at the other end, if there is one.
    pub fn origin(&self) -> Option<&str> {
        match self {
            Self::Quic => None,
            Self::WebTransport { origin } | Self::WebSocket { origin } => origin.as_deref(),
        }
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quic => f.write_str("Quic"),
            Self::WebTransport { origin } => f.debug_tuple("WebTransport").field(origin).finish(),
            Self::WebSocket { origin } => f.debug_tuple("WebSocket").field(origin).finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_the_same_host_may_connect_whatever_its_port() {
        for (origin, host, allowed) in [
            ("https://example.com", "example.com", true),
            ("https://example.com:8443", "example.com", true),
            ("http://127.0.0.1:8080", "127.0.0.1", true),
            ("https://[::1]:443", "[::1]", true),
            ("https://EXAMPLE.com", "example.COM", true),
            ("https://example.com.evil.net", "example.com", false),
            ("https://evil.net", "example.com", false),
            ("https://example.com@evil.net", "example.com", false),
            ("https://example.com:80@evil.net", "example.com", false),
            ("https://[::1", "[::1]", false),
            ("https://[::1]evil", "[::1]", false),
            ("ftp://example.com", "example.com", false),
            ("null", "null", false),
            ("", "", false),
            ("https://", "", false),
        ] {
            assert_eq!(Origins::SameHost.allow(origin, host), allowed, "{origin}");
        }
    }

    #[test]
    fn a_name_that_others_may_own_is_a_host_only_if_it_is_listed() {
        let web = Web::new().hosts(["files.example.com"]);
        for (host, known) in [
            ("127.0.0.1", true),
            ("[::1]", true),
            ("[fe80::1]", true),
            ("localhost", true),
            ("nas", true),
            ("nas.local", true),
            ("app.LOCALHOST", true),
            ("Files.Example.com", true),
            ("example.com", false),
            ("evil.files.example.com", false),
            ("127.0.0.1.evil.net", false),
            ("evil.net", false),
            ("evil.", false),
            ("[::1].evil", false),
            ("[evil.net]", false),
            ("", false),
        ] {
            assert_eq!(web.is_host(host), known, "{host}");
            let origin = format!("https://{host}");
            let allowed = web.allows(Some(&origin), host);
            assert_eq!(allowed, known, "a page of {host}");
            assert!(web.allows(None, host), "no page at {host}");
            assert!(Web::new().is_host(host), "{host}");
        }
    }

    #[test]
    fn a_list_allows_what_is_in_it_and_any_allows_all() {
        let list = Origins::only(["https://a.example", "http://localhost:3000"]);
        assert!(list.allow("https://a.example", "b.example"));
        assert!(list.allow("http://LOCALHOST:3000", "b.example"));
        assert!(!list.allow("https://b.example", "b.example"));
        assert!(!list.allow("https://a.example:444", "b.example"));
        assert!(!list.allow("null", "b.example"));
        assert!(Origins::Any.allow("null", "b.example"));
        let both = Origins::SameHostAnd(vec!["https://a.example".to_owned()]);
        assert!(both.allow("https://a.example", "b.example"));
        assert!(both.allow("https://b.example:1", "b.example"));
        assert!(!both.allow("https://c.example", "b.example"));
    }

    #[test]
    fn who_says_no_origin_is_no_page_and_may_connect() {
        let web = Web::new().origins(Origins::Only(Vec::new()));
        assert!(web.allows(None, "example.com"));
        assert!(!web.allows(Some("https://example.com"), "example.com"));
    }
}
