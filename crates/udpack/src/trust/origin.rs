//! Web pages as clients: where on a server they connect, and which pages may.

use std::fmt;
use std::sync::Arc;

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
}

impl Web {
    /// Pages of the server's own host, at `/udpack`.
    pub fn new() -> Self {
        Self {
            path: "/udpack".to_owned(),
            origins: Origins::SameHost,
        }
    }

    /// The path of the URL that pages connect to, as `/udpack`; what follows a `?` in their URL does not count. A session
    /// at another path is answered with the status 404.
    #[must_use]
    pub fn path(mut self, path: impl Into<String>) -> Self {
        self.path = path.into();
        self
    }

    /// The pages that may connect. One of another origin is answered with the status 403.
    #[must_use]
    pub fn origins(mut self, origins: Origins) -> Self {
        self.origins = origins;
        self
    }

    pub(crate) fn is_at(&self, path: &str) -> bool {
        self.path == path
    }

    pub(crate) fn allows(&self, origin: Option<&str>, host: &str) -> bool {
        // Programs that are no browser send none, and could send any.
        origin.is_none_or(|origin| self.origins.allow(origin, host))
    }
}

impl Default for Web {
    fn default() -> Self {
        Self::new()
    }
}

/// The pages that may connect to a server, by their origin: scheme, host and port of the URL that they were loaded from.
///
/// A browser says the origin of the page truthfully, whatever the page wants. Programs that are no browser say none, and
/// are not asked for one: who may come in is the token's business in any case.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Origins {
    /// Pages whose host is the one that they connect to, at any port.
    #[default]
    SameHost,
    /// Pages of these origins, each as the browser writes it: `https://example.com`, `http://127.0.0.1:8080`. Letters of
    /// either case are the same.
    Only(Vec<String>),
    /// Every page. A page of somebody else that knows a token can then use it.
    Any,
}

impl Origins {
    /// Pages of these origins.
    pub fn only<O: Into<String>>(origins: impl IntoIterator<Item = O>) -> Self {
        Self::Only(origins.into_iter().map(Into::into).collect())
    }

    /// Whether a page of this origin may connect to a server that it knows as `host`, without a port.
    fn allow(&self, origin: &str, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Only(origins) => origins.iter().any(|one| one.eq_ignore_ascii_case(origin)),
            Self::SameHost => {
                host_of(origin).is_some_and(|of_page| of_page.eq_ignore_ascii_case(host))
            }
        }
    }
}

/// The host of an origin; an IPv6 address keeps its brackets.
fn host_of(origin: &str) -> Option<&str> {
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

/// What a socket's connection speaks below the protocol.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transport {
    /// QUIC itself.
    Quic,
    /// WebTransport, from a page of this origin: as the browser said, at most 256 bytes, printable. `None` where the client
    /// said none, as programs do that are no browser.
    WebTransport {
        /// The page's origin, such as `https://example.com`.
        origin: Option<Arc<str>>,
    },
}

impl Transport {
    /// The origin of the page that this is a connection with, if it is one with a page.
    pub fn origin(&self) -> Option<&str> {
        match self {
            Self::Quic => None,
            Self::WebTransport { origin } => origin.as_deref(),
        }
    }

    /// Whether it is WebTransport.
    pub fn is_web(&self) -> bool {
        matches!(self, Self::WebTransport { .. })
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quic => f.write_str("Quic"),
            Self::WebTransport { origin } => f.debug_tuple("WebTransport").field(origin).finish(),
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
    fn a_list_allows_what_is_in_it_and_any_allows_all() {
        let list = Origins::only(["https://a.example", "http://localhost:3000"]);
        assert!(list.allow("https://a.example", "b.example"));
        assert!(list.allow("http://LOCALHOST:3000", "b.example"));
        assert!(!list.allow("https://b.example", "b.example"));
        assert!(!list.allow("https://a.example:444", "b.example"));
        assert!(!list.allow("null", "b.example"));
        assert!(Origins::Any.allow("null", "b.example"));
    }

    #[test]
    fn who_says_no_origin_is_no_page_and_may_connect() {
        let web = Web::new().origins(Origins::Only(Vec::new()));
        assert!(web.allows(None, "example.com"));
        assert!(!web.allows(Some("https://example.com"), "example.com"));
    }
}
