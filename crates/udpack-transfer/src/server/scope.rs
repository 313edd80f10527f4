//! What one token may do: the fields of its entry as rules for lanes.

use std::borrow::Cow;

use udpack::Peer;

use crate::base::code::Code;
use crate::base::path::{PathError, RelPath};
use crate::base::size::parse_size;
use crate::store::Tenant;

/// The rights of one client.
///
/// They stand in the fields of its token's entry: `scope=read,write,delete,watch,admin`, `prefix=a/b`, `quota=10G`.
/// A prefix is the client's root: all it names lies below, and it receives names without it, so that it
/// cannot even find out what lies beside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// May fetch, list and compare.
    pub read: bool,
    /// May upload.
    pub write: bool,
    /// May remove, and replace where the server grants it.
    pub delete: bool,
    /// May see the transfers of others, and the state of the server.
    pub watch: bool,
    /// May see as one who may watch, cancel the transfers of others, close sockets, and shut the server down.
    pub admin: bool,
    /// The directory that is its root.
    pub prefix: Option<RelPath>,
    /// Most bytes of all files below its root.
    pub quota: Option<u64>,
}

impl Default for Scope {
    /// To upload, and nothing else.
    fn default() -> Self {
        Self {
            read: false,
            write: true,
            delete: false,
            watch: false,
            admin: false,
            prefix: None,
            quota: None,
        }
    }
}

/// A token's entry has rules that cannot be understood; its owner may do nothing until that is mended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// A word of `scope` that is no right.
    #[error("unknown right {0:?} in scope, expected read, write, delete, watch or admin")]
    Right(String),
    /// `prefix` is no path.
    #[error("prefix: {0}")]
    Prefix(#[from] PathError),
    /// `quota` is no size.
    #[error("quota: {0}")]
    Quota(&'static str),
}

impl Scope {
    /// The rights of an admitted peer; `default` where its token says nothing of rights.
    ///
    /// # Errors
    /// When a field cannot be understood.
    pub fn of(peer: Option<&Peer>, default: &Self) -> Result<Self, ScopeError> {
        let claim = |key| peer.and_then(|peer| peer.claim(key));
        let mut scope = default.clone();
        if let Some(rights) = claim("scope") {
            (scope.read, scope.write, scope.delete) = (false, false, false);
            (scope.watch, scope.admin) = (false, false);
            for right in rights.split(',') {
                match right {
                    "read" => scope.read = true,
                    "write" => scope.write = true,
                    "delete" => scope.delete = true,
                    "watch" => scope.watch = true,
                    "admin" => scope.admin = true,
                    other => return Err(ScopeError::Right(crate::base::path::printable(other))),
                }
            }
        }
        if let Some(prefix) = claim("prefix") {
            scope.prefix = Some(prefix.trim_end_matches('/').parse()?);
        }
        if let Some(quota) = claim("quota") {
            scope.quota = Some(parse_size(quota).map_err(ScopeError::Quota)?);
        }
        Ok(scope)
    }

    /// Whether it sees the transfers of others, and the state of the server.
    pub fn watches(&self) -> bool {
        self.watch || self.admin
    }

    /// The refusal of what this client has no right to.
    pub(crate) fn no_right(right: &str) -> (Code, String) {
        let message = format!("forbidden: this token has no right to {right}");
        (Code::Forbidden, message)
    }

    /// The file that the client calls `path`.
    ///
    /// # Errors
    /// When it is no path, or too long below the prefix.
    pub fn inside(&self, path: &str) -> Result<RelPath, PathError> {
        // Judged as it was sent first: a prefix must not make good what is bad.
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

    /// A sentence of the store's with the names in it as the client knows them.
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
            // A name begins a word; in the middle of one it is another's.
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
        self.quota.map(|quota| Tenant {
            prefix: self.prefix.clone(),
            quota,
        })
    }
}

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
        let all = scope(&[("scope", "read,write,delete,admin"), ("quota", "2K")]).unwrap();
        assert!(all.read && all.write && all.delete && all.admin);
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
            scope.outside_of("exists: teams/a/x is in the way of teams/a/x/y"),
            "exists: x is in the way of x/y"
        );
        assert_eq!(
            scope.outside_of("not found: teams/a/teams/a/x, steams/a/y"),
            "not found: teams/a/x, steams/a/y"
        );
        let long = ["x"; RelPath::MAX_COMPONENTS - 1].join("/");
        assert!(scope.inside(&long).is_err(), "too deep below the prefix");
    }
}
