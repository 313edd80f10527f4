//! Who a peer is and whether it may come in: keys and certificates, tokens, verifiers, addresses that carry both.

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
