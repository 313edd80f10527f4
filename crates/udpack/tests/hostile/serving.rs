//! A server that speaks QUIC and nothing else.

use std::sync::Arc;

use quinn::crypto::rustls::QuicServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// QUIC settings of a server with this certificate and key.
pub(crate) fn serving(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> quinn::ServerConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .expect("they belong together");
    tls.alpn_protocols = vec![b"udpack/1".to_vec()];
    let crypto = QuicServerConfig::try_from(tls).expect("a suite for the first packets");
    quinn::ServerConfig::with_crypto(Arc::new(crypto))
}
