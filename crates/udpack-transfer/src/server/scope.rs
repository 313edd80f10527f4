//! The rights of a token, from the fields of its entry.

use std::borrow::Cow;

use udpack::Peer;

use crate::base::code::Code;
use crate::base::names;
use crate::base::path::{PathError, RelPath};
use crate::base::size::parse_size;
use crate::store::Tenant;

/// The rights of one client.
///
/// They stand in the fields of its token's entry: `scope=read,write,delete,share,watch,admin`, `prefix=a/b`,
/// `quota=10G`. A prefix is the client's root: all its names are relative to it, and it receives names without the
/// prefix, so that it learns nothing about other directories. A prefix with characters that the token file does not
/// permit is written as `prefix-encoded=a%20b`. If another token made the token, both must permit an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// May fetch, list and compare.
    pub read: bool,
    /// May upload.
    pub write: bool,
    /// May remove, and replace where the server grants it.
    pub delete: bool,
    /// May make tokens that have no more rights than its own.
    pub share: bool,
    /// May see the transfers of others, and the state of the server.
    pub watch: bool,
    /// Includes `watch` and `share`; may also cancel the transfers of others, close sockets and shut the server down.
    pub admin: bool,
    /// The client's root directory.
    pub prefix: Option<RelPath>,
    /// Most bytes of all files below its root.
    pub quota: Option<u64>,
    /// The quotas of the tokens that this one depends on.
    pub outer: Option<Tenant>,
}

impl Default for Scope {
    /// The right to upload, and nothing else.
    fn default() -> Self {
        Self {
            read: false,
            write: true,
            delete: false,
            watch: false,
            share: false,
            admin: false,
            prefix: None,
            quota: None,
            outer: None,
        }
    }
}

/// The entry of a token has invalid fields. Its owner has no rights until they are corrected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// A word of `scope` is not a right.
    #[error("unknown right {0:?} in scope, expected read, write, delete, share, watch or admin")]
    Right(String),
    /// `prefix` is not a valid path.
    #[error("prefix: {0}")]
    Prefix(#[from] PathError),
    /// `quota` is not a size.
    #[error("quota: {0}")]
    Quota(&'static str),
    /// `prefix` is not below that of the parent token.
    #[error("the prefix lies outside of the one of its parent")]
    Outside,
}

impl Scope {
    /// The rights of an admitted peer; `default` if its token has no fields for rights.
    ///
    /// # Errors
    /// When a field is invalid.
    pub fn of(peer: Option<&Peer>, default: &Self) -> Result<Self, ScopeError> {
        let claim = |key| peer.and_then(|peer| peer.claim(key));
        let mut scope = default.clone();
        if let Some(rights) = claim("scope") {
            (scope.read, scope.write, scope.delete) = (false, false, false);
            (scope.share, scope.watch, scope.admin) = (false, false, false);
            for right in rights.split(',') {
                match right {
                    "read" => scope.read = true,
                    "write" => scope.write = true,
                    "delete" => scope.delete = true,
                    "watch" => scope.watch = true,
                    "share" => scope.share = true,
                    "admin" => scope.admin = true,
                    other => return Err(ScopeError::Right(crate::base::path::printable(other))),
                }
            }
        }
        if let Some(prefix) = claim("prefix") {
            scope.prefix = Some(prefix.trim_end_matches('/').parse()?);
        }
        if let Some(prefix) = claim(ENCODED) {
            scope.prefix = Some(names::from_bytes(&decoded(prefix)).parse()?);
        }
        if let Some(quota) = claim("quota") {
            scope.quota = Some(parse_size(quota).map_err(ScopeError::Quota)?);
        }
        match peer.and_then(Peer::parent) {
            Some(parent) => scope.within(&Self::of(Some(parent), default)?),
            None => Ok(scope),
        }
    }

    /// The rights that both have.
    fn within(self, parent: &Self) -> Result<Self, ScopeError> {
        let prefix = match (self.prefix, &parent.prefix) {
            (None, parent) => parent.clone(),
            (Some(own), Some(parent)) if !is_below(&own, parent) => {
                return Err(ScopeError::Outside);
            }
            (own, _) => own,
        };
        Ok(Self {
            read: self.read && parent.read,
            write: self.write && parent.write,
            delete: self.delete && parent.delete,
            share: self.share && parent.may_share(),
            watch: self.watch && parent.watches(),
            admin: self.admin && parent.admin,
            prefix,
            quota: self.quota,
            outer: parent.tenant(),
        })
    }

    /// Whether the client may make tokens.
    pub(crate) fn may_share(&self) -> bool {
        self.share || self.admin
    }

    /// The fields of an entry whose root is this directory.
    pub(crate) fn prefix_field(prefix: &RelPath) -> (String, String) {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-~+,@=".contains(&byte);
        let bytes = prefix.to_bytes();
        if bytes.iter().all(|byte| plain(*byte)) {
            return ("prefix".to_owned(), prefix.as_str().to_owned());
        }
        let mut text = String::with_capacity(bytes.len() * 2);
        for byte in bytes.iter() {
            match plain(*byte) {
                true => text.push(char::from(*byte)),
                false => text.push_str(&format!("%{byte:02X}")),
            }
        }
        (ENCODED.to_owned(), text)
    }

    /// Whether the client may see the transfers of others, and the state of the server.
    pub fn watches(&self) -> bool {
        self.watch || self.admin
    }

    /// The refusal for a missing right.
    pub(crate) fn no_right(right: &str) -> (Code, String) {
        let message = format!("forbidden: this token has no right to {right}");
        (Code::Forbidden, message)
    }

    /// The file that the client calls `path`.
    ///
    /// # Errors
    /// When it is not a valid path, or too long below the prefix.
    pub fn inside(&self, path: &str) -> Result<RelPath, PathError> {
        // Checked as it was sent first: a prefix must not make an invalid path valid.
        let path: RelPath = path.parse()?;
        match &self.prefix {
            None => Ok(path),
            Some(prefix) => format!("{}/{}", prefix.as_str(), path.as_str()).parse(),
        }
    }

    /// As [`inside`](Self::inside), and `None` for the store's own root when the path is empty.
    ///
    /// # Errors
    /// As [`inside`](Self::inside).
    pub(crate) fn inside_or_root(&self, path: &str) -> Result<Option<RelPath>, PathError> {
        if path.is_empty() {
            return Ok(self.prefix.clone());
        }
        self.inside(path).map(Some)
    }

    /// What the client calls the file that is `path` in the store.
    pub fn outside<'a>(&self, path: &'a str) -> &'a str {
        let Some(prefix) = &self.prefix else {
            return path;
        };
        match path.strip_prefix(prefix.as_str()) {
            Some("") => "",
            Some(rest) => rest.strip_prefix('/').unwrap_or(path),
            None => path,
        }
    }

    /// Replaces the names in a sentence by the client's names, so that the prefix stays hidden.
    pub(crate) fn outside_of<'a>(&self, sentence: &'a str) -> Cow<'a, str> {
        let Some(prefix) = &self.prefix else {
            return sentence.into();
        };
        let prefix = format!("{prefix}/");
        let mut told = String::with_capacity(sentence.len());
        let mut rest = sentence;
        let mut cut = false;
        while let Some(at) = rest.find(&prefix) {
            let (before, found) = rest.split_at(at);
            told.push_str(before);
            // A name begins a word; a match in the middle of a word is another name.
            let begins =
                !(cut && before.is_empty()) && (told.is_empty() || told.ends_with([' ', '"']));
            cut = begins;
            rest = found.get(prefix.len()..).unwrap_or_default();
            if !begins {
                told.push_str(&prefix);
            }
        }
        told.push_str(rest);
        told.into()
    }

    /// The quota as the store counts it.
    pub fn tenant(&self) -> Option<Tenant> {
        match self.quota {
            None => self.outer.clone(),
            Some(quota) => Some(Tenant {
                prefix: self.prefix.clone(),
                quota,
                outer: self.outer.clone().map(Box::new),
            }),
        }
    }
}

/// Whether a directory is the other one or lies below.
fn is_below(path: &RelPath, parent: &RelPath) -> bool {
    let rest = path.as_str().strip_prefix(parent.as_str());
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Decodes a percent-encoded name; other characters are literal.
fn decoded(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let hex = (*first == b'%').then(|| behind.get(..2)).flatten();
        let hex = hex.and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = behind.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    bytes
}

/// The field of an entry whose root has characters that a field cannot hold.
const ENCODED: &str = "prefix-encoded";

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(claims: &[(&str, &str)]) -> Result<Scope, ScopeError> {
        let claims = claims
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        Scope::of(
            Some(&Peer::new("somebody").with_claims(claims)),
            &Scope::default(),
        )
    }

    #[test]
    fn rights_are_exactly_those_named() {
        let default = scope(&[]).unwrap();
        assert_eq!(default, Scope::default());
        let reader = scope(&[("scope", "read")]).unwrap();
        assert!(reader.read && !reader.write && !reader.delete && !reader.admin);
        let all = scope(&[("scope", "read,write,delete,share,admin"), ("quota", "2K")]).unwrap();
        assert!(all.read && all.write && all.delete && all.share && all.admin);
        assert_eq!(all.quota, Some(2048));
        assert!(all.watches() && !all.watch);
        let watcher = scope(&[("scope", "watch")]).unwrap();
        assert!(watcher.watches() && !watcher.admin && !watcher.read && !watcher.write);
        assert!(!reader.watches());
        for bad in ["", "read,", "Read", "write read", "all"] {
            assert!(
                matches!(scope(&[("scope", bad)]), Err(ScopeError::Right(_))),
                "{bad:?}"
            );
        }
        assert!(matches!(
            scope(&[("quota", "lots")]),
            Err(ScopeError::Quota(_))
        ));
        assert!(matches!(
            scope(&[("prefix", "../x")]),
            Err(ScopeError::Prefix(_))
        ));
    }

    fn peer(claims: &[(&str, &str)]) -> Peer {
        let claims = claims
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Peer::new("somebody").with_claims(claims.collect())
    }

    #[test]
    fn a_share_may_do_what_its_parent_may_too() {
        let below = |parent: &[(&str, &str)], own: &[(&str, &str)]| {
            let peer = peer(own).with_parent(peer(parent));
            Scope::of(Some(&peer), &Scope::default())
        };
        let all = ("scope", "read,write,delete,share,admin");
        // The operator takes rights from the parent: they are gone here, too.
        let scope = below(&[("scope", "write")], &[all]).unwrap();
        assert!(scope.write);
        assert!(!scope.read && !scope.delete && !scope.share && !scope.admin);
        let scope = below(&[("prefix", "a/b"), ("quota", "9")], &[all]).unwrap();
        assert_eq!(scope.prefix.as_ref().map(RelPath::as_str), Some("a/b"));
        let tenant = scope.tenant().unwrap();
        assert_eq!((tenant.quota, tenant.outer), (9, None));
        let own = [("prefix", "a/b/c"), ("quota", "5")];
        let scope = below(&[("prefix", "a/b"), ("quota", "9")], &own).unwrap();
        let tenant = scope.tenant().unwrap();
        assert_eq!((tenant.quota, tenant.outer.unwrap().quota), (5, 9));
        for outside in ["a", "a/bc", "b"] {
            assert_eq!(
                below(&[("prefix", "a/b")], &[("prefix", outside)]),
                Err(ScopeError::Outside),
                "{outside}"
            );
        }
    }

    #[test]
    fn a_prefix_of_any_characters_stands_in_a_field() {
        for (bytes, field) in [
            (&b"a/b.c"[..], ("prefix", "a/b.c")),
            (b"a b/c", ("prefix-encoded", "a%20b/c")),
            (b"100%", ("prefix-encoded", "100%25")),
            ("\u{7167}".as_bytes(), ("prefix-encoded", "%E7%85%A7")),
            (b"\xff#", ("prefix-encoded", "%FF%23")),
        ] {
            let prefix: RelPath = names::from_bytes(bytes).parse().unwrap();
            let (key, value) = Scope::prefix_field(&prefix);
            assert_eq!((&*key, &*value), field);
            let read = scope(&[(&key, &value)]).unwrap();
            assert_eq!(read.prefix, Some(prefix));
        }
        for bad in ["%2E%2E/x", "..", "%2Fx", "%"] {
            let read = scope(&[("prefix-encoded", bad)]);
            assert_eq!(read.is_ok(), bad == "%", "{bad}");
        }
    }

    #[test]
    fn a_prefix_is_a_root() {
        let scope = scope(&[("prefix", "teams/a/")]).unwrap();
        assert_eq!(scope.inside("x/y").unwrap().as_str(), "teams/a/x/y");
        assert_eq!(scope.outside("teams/a/x/y"), "x/y");
        assert_eq!(scope.outside("teams/a"), "");
        assert_eq!(scope.outside("teams/ab"), "teams/ab");
        assert_eq!(
            scope.inside_or_root("").unwrap().unwrap().as_str(),
            "teams/a"
        );
        for bad in ["../b", "/x", "", "a/../../b", ".."] {
            assert!(scope.inside(bad).is_err(), "{bad:?}");
        }
        assert_eq!(
            scope.outside_of("teams/a/x is in the way of teams/a/x/y"),
            "x is in the way of x/y"
        );
        assert_eq!(
            scope.outside_of("not found: teams/a/teams/a/x, steams/a/y"),
            "not found: teams/a/x, steams/a/y"
        );
        let long = ["x"; RelPath::MAX_COMPONENTS - 1].join("/");
        assert!(scope.inside(&long).is_err(), "too deep below the prefix");
    }
}
