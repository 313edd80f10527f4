//! Identity and admission of peers: keys and certificates, tokens, verifiers, and the URLs that carry a key and a
//! token.

pub(crate) mod auth;
pub(crate) mod certificate;
pub(crate) mod fingerprint;
#[cfg(feature = "https")]
pub(crate) mod https;
pub(crate) mod identity;
pub(crate) mod origin;
pub(crate) mod secret_file;
pub(crate) mod tls;
pub(crate) mod tokens;
pub(crate) mod url;
pub(crate) mod web_certificate;
