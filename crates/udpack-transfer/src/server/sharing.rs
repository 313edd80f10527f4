//! Reports the rights of a token to its client, and manages shares: tokens that a client makes for others, with no
//! more rights than its own.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use udpack::{Fault, FieldError, Message, NewShare, Peer, TokenEntry, TokenFile, TokenFileError};

use crate::base::code::Code;
use crate::base::names;
use crate::base::path::RelPath;
use crate::base::size::format_size;
use crate::server::scope::Scope;
use crate::staging::target::Target;
use crate::store::Tenant;

/// The file of shares, and the address of the pages for browsers. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Sharing {
    tokens: TokenFile,
    /// The address of the pages.
    web: Option<Arc<str>>,
}

/// A request about tokens.
#[derive(Debug)]
pub(crate) enum Asked {
    Rights,
    Share(Wish),
    Shares,
    Unshare(String),
}

/// The requested share.
#[derive(Debug)]
pub(crate) struct Wish {
    prefix: String,
    quota: Option<u64>,
    expires_s: Option<u64>,
    once: bool,
    read: bool,
    write: bool,
}

impl Asked {
    /// Whether requests of this name are about tokens.
    pub(crate) fn is_one(event: &str) -> bool {
        matches!(event, "rights" | "share" | "shares" | "unshare")
    }

    /// Reads a request that is about tokens.
    pub(crate) fn read(message: &Message) -> Result<Self, FieldError> {
        let fields = message.fields()?;
        let flag = |key, default| Ok::<_, FieldError>(fields.opt_bool(key)?.unwrap_or(default));
        Ok(match message.event() {
            "share" => Self::Share(Wish {
                prefix: names::opt_field(&fields, "prefix")?.unwrap_or_default(),
                quota: fields.opt_u64("quota")?,
                expires_s: fields.opt_u64("expires_s")?,
                once: flag("once", false)?,
                read: flag("read", false)?,
                write: flag("write", true)?,
            }),
            "shares" => Self::Shares,
            "unshare" => Self::Unshare(fields.str("name")?.to_owned()),
            _ => Self::Rights,
        })
    }

    /// Answers the request. Blocks.
    pub(crate) fn answer(
        self,
        sharing: Option<&Sharing>,
        target: &Target,
        scope: &Scope,
        peer: Option<&Peer>,
    ) -> Result<Answer, Fault> {
        let tenant = scope.tenant();
        let left = || left(target, tenant.as_ref());
        if let Self::Rights = self {
            let rights = Rights::of(sharing, scope, peer, tenant.as_ref(), left()?);
            return Ok(Answer::Rights(rights));
        }
        let (Some(sharing), Some(peer)) = (sharing, peer) else {
            let text = "this server makes no shares";
            return Err(Fault::new(Fault::NO_HANDLER, text));
        };
        if !scope.may_share() {
            let (code, message) = Scope::no_right("share");
            return Err(Fault::new(code.as_str(), message));
        }
        match self {
            Self::Share(wish) => Ok(Answer::Made(sharing.share(left()?, scope, peer, wish)?)),
            Self::Unshare(name) => sharing.unshare(peer, &name).map(|()| Answer::Nothing),
            Self::Shares | Self::Rights => Ok(Answer::Shares {
                shares: sharing.shares(scope, peer),
            }),
        }
    }
}

/// How many bytes a client may still store by the quotas of its token; `None` without a quota. Blocks.
fn left(target: &Target, tenant: Option<&Tenant>) -> Result<Option<u64>, Fault> {
    let Some(tenant) = tenant else {
        return Ok(None);
    };
    let Some(store) = target.store() else {
        // The usage of another sink is unknown.
        return Ok(Some(tenant.quota));
    };
    let left = store.left(tenant);
    left.map(Some)
        .map_err(|error| Fault::new(error.code(), error.to_string()))
}

/// An answer.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Answer {
    Rights(Rights),
    Made(Made),
    Shares { shares: Vec<Shared> },
    Nothing,
}

/// The rights of a token.
#[derive(Serialize)]
pub(crate) struct Rights {
    read: bool,
    write: bool,
    delete: bool,
    share: bool,
    admin: bool,
    watch: bool,
    once: bool,
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "names::serialize_opt"
    )]
    prefix: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quota: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quota_left: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_ms: Option<u64>,
}

/// A new share.
#[derive(Serialize)]
pub(crate) struct Made {
    name: String,
    token: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quota: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_ms: Option<u64>,
}

/// A share as its maker sees it.
#[derive(Serialize)]
pub(crate) struct Shared {
    name: String,
    #[serde(serialize_with = "names::serialize")]
    prefix: String,
    read: bool,
    write: bool,
    once: bool,
    used: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    quota: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_ms: Option<u64>,
}

impl Sharing {
    /// Manages shares in this file; `web` is the address of the pages.
    pub(crate) fn new(tokens: TokenFile, web: Option<String>) -> Self {
        Self {
            tokens,
            web: web.map(Into::into),
        }
    }

    /// Makes the share of this client. Blocks.
    pub(crate) fn share(
        &self,
        left: Option<u64>,
        scope: &Scope,
        peer: &Peer,
        wish: Wish,
    ) -> Result<Made, Fault> {
        let prefix = scope
            .inside_or_root(&wish.prefix)
            .map_err(|error| Fault::new(Code::BadName.as_str(), error.to_string()))?;
        let rights = wish.rights(scope)?;
        let quota = wish.room(left)?;
        let expires = wish.end(peer)?;
        let mut fields = vec![("scope".to_owned(), rights)];
        fields.extend(prefix.as_ref().map(Scope::prefix_field));
        fields.extend(quota.map(|quota| ("quota".to_owned(), quota.to_string())));
        let new = NewShare {
            fields,
            expires,
            once: wish.once,
        };
        let made = self.tokens.share(peer, new).map_err(share_fault)?;
        tracing::info!(
            share = made.id,
            prefix = prefix.as_ref().map(|prefix| names::shown(prefix.as_str())),
            "a share was made"
        );
        let url = self
            .web
            .as_ref()
            .map(|web| format!("{web}#t={}", made.token));
        Ok(Made {
            name: made.id,
            token: made.token,
            url,
            quota,
            expires_ms: left_ms(expires),
        })
    }

    /// The shares of this client.
    pub(crate) fn shares(&self, scope: &Scope, peer: &Peer) -> Vec<Shared> {
        let shares = self.tokens.shares(peer);
        shares.iter().map(|entry| shown(entry, scope)).collect()
    }

    /// Revokes one of them. Blocks.
    pub(crate) fn unshare(&self, peer: &Peer, name: &str) -> Result<(), Fault> {
        match self.tokens.unshare(peer, name).map_err(share_fault)? {
            true => {
                tracing::info!(
                    share = udpack::text::printable(name).as_ref(),
                    "a share was revoked"
                );
                Ok(())
            }
            false => Err(Fault::new(
                Code::NotFound.as_str(),
                "not found: this token has no share of that name",
            )),
        }
    }
}

impl Rights {
    pub(crate) fn of(
        sharing: Option<&Sharing>,
        scope: &Scope,
        peer: Option<&Peer>,
        tenant: Option<&Tenant>,
        left: Option<u64>,
    ) -> Self {
        let shares = sharing
            .zip(peer)
            .is_some_and(|(sharing, peer)| sharing.tokens.can_share(peer));
        // A client with a share does not learn the directory in which its maker has put it.
        let is_share = peer.is_some_and(|peer| peer.parent().is_some());
        let prefix = scope.prefix.as_ref().filter(|_| !is_share);
        Self {
            read: scope.read,
            write: scope.write,
            delete: scope.delete,
            share: shares && scope.may_share(),
            admin: scope.admin,
            watch: scope.watches(),
            once: peer.is_some_and(|peer| peer.claim("once").is_some()),
            prefix: prefix.map(|prefix| prefix.as_str().to_owned()),
            quota: tenant.map(|tenant| tenant.quota),
            quota_left: left,
            expires_ms: left_ms(peer.and_then(Peer::expires)),
        }
    }
}

impl Wish {
    /// The rights as words of an entry; the client must have each of them.
    fn rights(&self, scope: &Scope) -> Result<String, Fault> {
        let wanted = [
            ("read", self.read, scope.read),
            ("write", self.write, scope.write),
        ];
        let mut words = Vec::new();
        for (word, wanted, own) in wanted {
            if wanted && !own {
                let (code, message) = Scope::no_right(word);
                return Err(Fault::new(code.as_str(), message));
            }
            words.extend(wanted.then_some(word));
        }
        if words.is_empty() {
            let text = "a share needs read or write";
            return Err(Fault::new(Fault::BAD_PAYLOAD, text));
        }
        Ok(words.join(","))
    }

    /// The quota, which must fit into the client's own.
    fn room(&self, left: Option<u64>) -> Result<Option<u64>, Fault> {
        if self.quota == Some(0) {
            return Err(Fault::new(
                Fault::BAD_PAYLOAD,
                "a quota of 0 bytes takes nothing",
            ));
        }
        match (self.quota, left) {
            (Some(quota), Some(left)) if quota > left => {
                let (quota, left) = (format_size(quota), format_size(left));
                let text = format!("quota: {quota} wanted, this token has {left} left");
                Err(Fault::new(Code::Quota.as_str(), text))
            }
            (None, Some(0)) if self.write => {
                let text = "quota: this token has nothing left";
                Err(Fault::new(Code::Quota.as_str(), text))
            }
            (quota, left) => Ok(quota.or(left)),
        }
    }

    /// The expiry, which is not after that of the client's own token.
    fn end(&self, peer: &Peer) -> Result<Option<SystemTime>, Fault> {
        let own = peer.expires();
        let Some(secs) = self.expires_s else {
            return Ok(own);
        };
        let end = SystemTime::now().checked_add(Duration::from_secs(secs));
        let end = end
            .filter(|_| (1..=MAX_SECS).contains(&secs))
            .ok_or_else(|| {
                Fault::new(
                    Fault::BAD_PAYLOAD,
                    "expires_s is 1 to 3155760000, a hundred years",
                )
            })?;
        match own {
            Some(own) if end > own => {
                let left = own.duration_since(SystemTime::now()).unwrap_or_default();
                let text = format!("forbidden: this token itself ends in {} s", left.as_secs());
                Err(Fault::new(Code::Forbidden.as_str(), text))
            }
            _ => Ok(Some(end)),
        }
    }
}

/// A share, with names as its maker sees them.
fn shown(entry: &TokenEntry, scope: &Scope) -> Shared {
    let claims = entry.fields().to_vec();
    let own = Scope::of(
        Some(&Peer::new(entry.id()).with_claims(claims)),
        &Scope::default(),
    );
    let own = own.unwrap_or_else(|_| Scope {
        write: false,
        ..Scope::default()
    });
    let prefix = own.prefix.as_ref().map_or("", RelPath::as_str);
    Shared {
        name: entry.id().to_owned(),
        prefix: scope.outside(prefix).to_owned(),
        read: own.read,
        write: own.write,
        once: entry.is_once(),
        used: entry.is_used(),
        quota: own.quota,
        expires_ms: left_ms(entry.expires()),
    }
}

/// Milliseconds until the expiry.
fn left_ms(end: Option<SystemTime>) -> Option<u64> {
    let left = end?.duration_since(SystemTime::now()).unwrap_or_default();
    Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
}

/// The refusal if the token file cannot hold a share.
fn share_fault(error: TokenFileError) -> Fault {
    match error {
        TokenFileError::TooManyShares { .. } => {
            Fault::new(Code::TooManyShares.as_str(), error.to_string())
        }
        // The peer's own token was revoked meanwhile.
        TokenFileError::NoParent { .. } => {
            let (code, message) = Scope::no_right("share");
            Fault::new(code.as_str(), message)
        }
        error => {
            tracing::error!(%error, "a share cannot be kept");
            Fault::new(
                Code::Io.as_str(),
                "the server cannot change its file of tokens",
            )
        }
    }
}

/// The longest lifetime of a share in seconds: a hundred years.
const MAX_SECS: u64 = 3_155_760_000;
