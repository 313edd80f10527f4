//! The TLS 1.3 configurations of both sides: the server's certificate, and the client's trust.
//!
//! A server signs with its lasting key under a short-lived certificate that is replaced while the
//! server runs. A client trusts one pinned key or the platform's certificate authorities; the
//! check cannot be skipped. 0-RTT is off on both sides: early data can be
//! replayed, and the first thing a client sends is its token.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use rcgen::KeyPair;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{
    CertificateError, DigitallySignedStruct, OtherError, PeerIncompatible, SignatureScheme,
    SupportedCipherSuite,
};
use rustls_platform_verifier::Verifier;

use crate::trust::certificate::{Issued, Kept};
use crate::trust::fingerprint::Fingerprint;

/// The application protocol, with its version, that both sides must agree on.
pub(crate) const ALPN: &[u8] = b"udpack/1";

/// How a client verifies the server's identity.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trust {
    /// The server has this key, whatever its certificate, name and dates.
    Pin(Fingerprint),
    /// A certificate for the server's name from an authority that the platform trusts.
    PlatformRoots,
}

/// Why no TLS configuration could be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// The library refused the key, the protocol version or the platform's authorities.
    #[error("TLS setup failed")]
    Setup(#[from] rustls::Error),
    /// The certificate could not be made.
    #[error("cannot issue a certificate")]
    Issue(#[from] rcgen::Error),
    /// The clock shows a time that certificates cannot express.
    #[error("the clock shows a year that no certificate can hold")]
    Clock(#[from] time::error::ComponentRange),
}

/// The server's key was not the pinned one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pin mismatch: expected {expected}, the server presented {presented}")]
pub(crate) struct PinMismatch {
    /// The pinned key.
    pub(crate) expected: Fingerprint,
    /// The key the server presented, without proof that it holds it.
    pub(crate) presented: Fingerprint,
}

/// Why a client does not trust a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Distrust {
    /// The server has another key than the pinned one.
    Key(PinMismatch),
    /// The certificate has expired, or is not valid yet.
    Dates,
    /// The certificate is damaged, is for another name, or no authority that the platform trusts has signed it.
    Certificate,
}

impl Distrust {
    /// Returns `None` for an error that is not about the server's certificate.
    pub(crate) fn of(error: &rustls::Error) -> Option<Self> {
        use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext, Other};
        let rustls::Error::InvalidCertificate(error) = error else {
            return None;
        };
        Some(match error {
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. } => {
                Self::Dates
            }
            Other(OtherError(inner)) => match inner.downcast_ref() {
                Some(mismatch) => Self::Key(*mismatch),
                None => Self::Certificate,
            },
            _ => Self::Certificate,
        })
    }
}

tokio::task_local! {
    static ATTEMPT: Attempt;
}

/// One attempt to connect: it learns why the verifier refused the server.
///
/// quinn keeps only the text of a verifier's error. The verifier runs in the task that drives the connection, so that task is
/// given its attempt by [`scope`](Self::scope).
#[derive(Clone, Debug, Default)]
pub(crate) struct Attempt(Arc<OnceLock<Distrust>>);

impl Attempt {
    /// Why the verifier refused the server; `None` if it did not.
    pub(crate) fn distrust(&self) -> Option<Distrust> {
        self.0.get().copied()
    }

    /// Runs a connection's task as a part of this attempt.
    pub(crate) fn scope<F: Future>(self, task: F) -> impl Future<Output = F::Output> {
        ATTEMPT.scope(self, task)
    }
}

/// Where a server's certificate comes from.
pub(crate) struct CertificateSource {
    key: Arc<dyn SigningKey>,
    mode: Mode,
}

enum Mode {
    /// Issued from the key itself, again and again.
    Issued {
        issuer: Arc<KeyPair>,
        served: Box<Mutex<Served>>,
        clock: Clock,
    },
    /// Given from outside and served unchanged.
    Given(Arc<CertifiedKey>),
}

/// The current certificate and its successor.
struct Served {
    current: Issued,
    /// The successor, issued ahead if its hash must be known.
    next: Option<Issued>,
    ahead: bool,
    /// The file that keeps both.
    file: Option<Kept>,
}

type Clock = Box<dyn Fn() -> i64 + Send + Sync>;

impl CertificateSource {
    /// Issues certificates from `key`, and a new one whenever the current one grows old.
    pub(crate) fn issuing(key: Arc<KeyPair>) -> Result<Self, TlsError> {
        Self::issuing_by(key, Box::new(unix_now))
    }

    /// Serves `chain` as it is.
    pub(crate) fn given(
        key: Arc<KeyPair>,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<Self, TlsError> {
        let key = signing_key(&key)?;
        Ok(Self {
            mode: Mode::Given(Arc::new(CertifiedKey::new(chain, key.clone()))),
            key,
        })
    }

    fn issuing_by(issuer: Arc<KeyPair>, clock: Clock) -> Result<Self, TlsError> {
        let key = signing_key(&issuer)?;
        let served = Served {
            current: Issued::new(&issuer, &key, clock())?,
            next: None,
            ahead: false,
            file: None,
        };
        Ok(Self {
            key,
            mode: Mode::Issued {
                issuer,
                served: Box::new(Mutex::new(served)),
                clock,
            },
        })
    }

    /// Issues the next certificate ahead from now on, and keeps both in this file, so that a restart changes neither.
    /// If the file cannot be used, this is logged and the certificates are not kept.
    pub(crate) fn keep(&self, file: Option<PathBuf>) {
        if let Mode::Issued {
            issuer,
            served,
            clock,
        } = &self.mode
        {
            let mut served = served.lock().unwrap_or_else(PoisonError::into_inner);
            served.ahead = true;
            served.file = file.map(Kept::at);
            if let Some((current, next)) = served.kept(issuer, &self.key) {
                (served.current, served.next) = (current, Some(next));
            }
            served.renew(issuer, &self.key, clock());
        }
    }

    /// The SHA-256 of the current certificate and of the next, if they are issued here for a key that browsers accept
    /// by hash.
    pub(crate) fn hashes(&self) -> Vec<[u8; 32]> {
        match &self.mode {
            Mode::Issued {
                issuer,
                served,
                clock,
            } if issuer.algorithm() == &rcgen::PKCS_ECDSA_P256_SHA256 => {
                let mut served = served.lock().unwrap_or_else(PoisonError::into_inner);
                served.ahead = true;
                served.renew(issuer, &self.key, clock());
                let next = served.next.iter();
                std::iter::once(&served.current)
                    .chain(next)
                    .map(Issued::hash)
                    .collect()
            }
            Mode::Issued { .. } | Mode::Given(_) => Vec::new(),
        }
    }

    /// Returns the certificate to serve now.
    ///
    /// Renewal happens here, on a handshake, so that it needs no task and no shutdown.
    fn current(&self) -> Arc<CertifiedKey> {
        match &self.mode {
            Mode::Given(certificate) => certificate.clone(),
            Mode::Issued {
                issuer,
                served,
                clock,
            } => {
                let mut served = served.lock().unwrap_or_else(PoisonError::into_inner);
                served.renew(issuer, &self.key, clock());
                served.current.certificate.clone()
            }
        }
    }
}

impl Served {
    /// Replaces a stale current certificate, and issues the next one if it is needed ahead.
    fn renew(&mut self, issuer: &KeyPair, key: &Arc<dyn SigningKey>, now: i64) {
        if !self.current.is_stale(now) && (self.next.is_some() || !self.ahead) {
            return;
        }
        // Another process with the same key may already have renewed it.
        if self.current.is_stale(now)
            && let Some((current, next)) = self.kept(issuer, key)
        {
            (self.current, self.next) = (current, Some(next));
        }
        let mut renewed = || -> Result<(), TlsError> {
            if self.current.is_stale(now) {
                let next = self.next.take().filter(|next| !next.is_stale(now));
                self.current = match next {
                    Some(next) => next,
                    None => Issued::new(issuer, key, now)?,
                };
            }
            if self.next.is_none() && self.ahead {
                self.next = Some(self.current.next(issuer, key)?);
            }
            Ok(())
        };
        match renewed() {
            Ok(()) => {
                if let (Some(file), Some(next)) = (&mut self.file, &self.next)
                    && let Err(error) = file.write(&self.current, next)
                {
                    tracing::warn!(%error, "certificates not kept");
                }
            }
            // Clients that pin the key do not look at the dates, so the old one still serves.
            Err(error) => tracing::error!(%error, "certificate not renewed"),
        }
    }

    /// The certificates in the file, if they are for this key.
    fn kept(&mut self, issuer: &KeyPair, key: &Arc<dyn SigningKey>) -> Option<(Issued, Issued)> {
        match self.file.as_mut()?.read(issuer, key) {
            Ok(kept) => kept,
            Err(error) => {
                tracing::warn!(%error, "kept certificates not used");
                None
            }
        }
    }
}

impl fmt::Debug for CertificateSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateSource").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for CertificateSource {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

/// Trusts a server as [`Trust`] says.
///
/// To a pin, names, dates and authorities do not matter: the key is the identity. Only the end-entity's key
/// counts, so the pinned certificate is worthless as an intermediate behind another one; and the
/// signature over the handshake is checked, so it is worthless without the private key.
#[derive(Debug)]
struct ServerVerifier {
    trusted: Trusted,
    provider: Arc<CryptoProvider>,
}

#[derive(Debug)]
enum Trusted {
    Key(Fingerprint),
    Platform(Verifier),
}

impl ServerVerifier {
    fn new(trust: Trust) -> Result<Self, TlsError> {
        let provider = provider();
        let trusted = match trust {
            Trust::Pin(expected) => Trusted::Key(expected),
            Trust::PlatformRoots => Trusted::Platform(Verifier::new(provider.clone())?),
        };
        Ok(Self { trusted, provider })
    }
}

fn verify_pin(
    expected: Fingerprint,
    end_entity: &CertificateDer<'_>,
) -> Result<ServerCertVerified, rustls::Error> {
    let spki = ParsedCertificate::try_from(end_entity)?.subject_public_key_info();
    let presented = Fingerprint::of_spki(&spki);
    if presented == expected {
        return Ok(ServerCertVerified::assertion());
    }
    let mismatch = PinMismatch {
        expected,
        presented,
    };
    Err(CertificateError::Other(OtherError(Arc::new(mismatch))).into())
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = match &self.trusted {
            Trusted::Key(expected) => verify_pin(*expected, end_entity),
            Trusted::Platform(verifier) => verifier.verify_server_cert(
                end_entity,
                intermediates,
                server_name,
                ocsp_response,
                now,
            ),
        };
        verified.inspect_err(|error| {
            if let Some(distrust) = Distrust::of(error) {
                // Outside of an attempt nothing records the reason.
                let _ = ATTEMPT.try_with(|attempt| attempt.0.set(distrust));
            }
        })
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Makes the client side of TLS.
///
/// One configuration serves any number of connections and should be kept: it remembers sessions,
/// which makes reconnecting cheaper.
pub(crate) fn client_config(trust: Trust) -> Result<rustls::ClientConfig, TlsError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier::new(trust)?))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_early_data = false;
    Ok(config)
}

/// Makes the server side of TLS, for clients that speak one of these protocols.
pub(crate) fn server_config(
    certificates: Arc<dyn ResolvesServerCert>,
    protocols: &[&[u8]],
) -> Result<rustls::ServerConfig, TlsError> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    config.max_early_data_size = 0;
    // A client uses one ticket for a connection and receives the next one on it.
    config.send_tls13_tickets = 1;
    Ok(config)
}

/// The cipher suites to offer and accept, the fastest first.
const SUITES: [SupportedCipherSuite; 3] = [
    TLS13_AES_128_GCM_SHA256,
    TLS13_AES_256_GCM_SHA384,
    TLS13_CHACHA20_POLY1305_SHA256,
];

/// Chosen explicitly, because rustls' own choice panics as soon as any dependency enables a second one.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: SUITES.to_vec(),
        ..aws_lc_rs::default_provider()
    })
}

pub(crate) fn signing_key(key: &KeyPair) -> Result<Arc<dyn SigningKey>, TlsError> {
    let der = PrivateKeyDer::try_from(key.serialized_der().to_vec())
        .map_err(|reason| rustls::Error::General(reason.to_owned()))?;
    Ok(loaded_key(der)?)
}

/// A private key to sign with.
pub(crate) fn loaded_key(
    der: PrivateKeyDer<'static>,
) -> Result<Arc<dyn SigningKey>, rustls::Error> {
    provider().key_provider.load_private_key(der)
}

fn unix_now() -> i64 {
    let seconds = |duration: std::time::Duration| i64::try_from(duration.as_secs());
    match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => seconds(since).unwrap_or(i64::MAX),
        Err(before) => seconds(before.duration()).map_or(i64::MIN, |seconds| -seconds),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::sync::atomic::{AtomicI64, Ordering};
    use std::time::Duration;

    use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
    use quinn::crypto::{ServerConfig as _, Session};
    use quinn::{ClientConfig, ConnectionError, Endpoint, ServerConfig, Side, TransportErrorCode};
    use quinn_proto::transport_parameters::TransportParameters;
    use rustls::HandshakeKind;
    use rustls::quic::{ClientConnection, Version};

    use super::*;
    use crate::trust::certificate::{BACKDATE, VALIDITY, hash_of};

    const NOW: i64 = 1_800_000_000;

    fn key() -> Arc<KeyPair> {
        Arc::new(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap())
    }

    fn fingerprint(key: &KeyPair) -> Fingerprint {
        Fingerprint::of_public_key_pem(&key.public_key_pem()).unwrap()
    }

    fn certificate(key: &KeyPair) -> CertificateDer<'static> {
        let signer = signing_key(key).unwrap();
        let issued = Issued::new(key, &signer, unix_now()).unwrap();
        issued
            .certificate
            .end_entity_cert()
            .unwrap()
            .clone()
            .into_owned()
    }

    /// A server that serves `chain` and signs with `key`, whether they belong together or not.
    fn forged(chain: Vec<CertificateDer<'static>>, key: &Arc<KeyPair>) -> Arc<CertificateSource> {
        Arc::new(CertificateSource::given(key.clone(), chain).unwrap())
    }

    fn issuing(key: &Arc<KeyPair>) -> Arc<CertificateSource> {
        Arc::new(CertificateSource::issuing(key.clone()).unwrap())
    }

    fn client_tls(trust: Trust) -> Result<QuicClientConfig, TlsError> {
        Ok(QuicClientConfig::try_from(client_config(trust)?).unwrap())
    }

    fn server_tls(certificates: Arc<CertificateSource>) -> Result<QuicServerConfig, TlsError> {
        Ok(QuicServerConfig::try_from(server_config(certificates, &[ALPN])?).unwrap())
    }

    fn pinned(fingerprint: Fingerprint) -> QuicClientConfig {
        client_tls(Trust::Pin(fingerprint)).unwrap()
    }

    /// Shakes hands over loopback and returns the protocol that was agreed on.
    async fn handshake(
        server: QuicServerConfig,
        client: QuicClientConfig,
    ) -> Result<Vec<u8>, ConnectionError> {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = ServerConfig::with_crypto(Arc::new(server));
        let server = Endpoint::server(server, loopback).unwrap();
        let dialer = Endpoint::client(loopback).unwrap();
        let config = ClientConfig::new(Arc::new(client));
        let address = server.local_addr().unwrap();
        let dialing = dialer.connect_with(config, address, "any.name").unwrap();
        let accepting = async { server.accept().await.unwrap().await };
        let both = async { tokio::join!(dialing, accepting) };
        let (dialed, accepted) = tokio::time::timeout(Duration::from_secs(10), both)
            .await
            .unwrap();
        let connection = dialed?;
        accepted.unwrap();
        let data = connection.handshake_data().unwrap();
        Ok(data.downcast::<HandshakeData>().unwrap().protocol.unwrap())
    }

    #[tokio::test]
    async fn every_suite_carries_data_across_updates_of_its_keys() {
        let initial = SUITES[0].tls13().unwrap().quic_suite().unwrap();
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        for suite in SUITES {
            let key = key();
            let mut config =
                rustls::ClientConfig::builder_with_provider(Arc::new(CryptoProvider {
                    cipher_suites: vec![suite],
                    ..aws_lc_rs::default_provider()
                }))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(
                    ServerVerifier::new(Trust::Pin(fingerprint(&key))).unwrap(),
                ))
                .with_no_client_auth();
            config.alpn_protocols = vec![ALPN.to_vec()];
            let client = QuicClientConfig::with_initial(Arc::new(config), initial).unwrap();
            let server = ServerConfig::with_crypto(Arc::new(server_tls(issuing(&key)).unwrap()));
            let server = Endpoint::server(server, loopback).unwrap();
            let address = server.local_addr().unwrap();
            let dialer = Endpoint::client(loopback).unwrap();
            let config = ClientConfig::new(Arc::new(client));
            let dialing = dialer.connect_with(config, address, "any.name").unwrap();
            let accepting = async { server.accept().await.unwrap().await };
            let (dialed, accepted) = tokio::join!(dialing, accepting);
            let (dialed, accepted) = (dialed.unwrap(), accepted.unwrap());
            for round in 0..6_u8 {
                for (from, to) in [(&dialed, &accepted), (&accepted, &dialed)] {
                    let sent = vec![round; 10_000];
                    let mut stream = from.open_uni().await.unwrap();
                    stream.write_all(&sent).await.unwrap();
                    stream.finish().unwrap();
                    let mut stream = to.accept_uni().await.unwrap();
                    assert_eq!(stream.read_to_end(10_000).await.unwrap(), sent);
                }
                if round % 2 == 0 {
                    dialed.force_key_update();
                } else {
                    accepted.force_key_update();
                }
            }
        }
    }

    /// A client and a server's session, until neither has anything left to say.
    fn shaken(
        client: &Arc<rustls::ClientConfig>,
        server: &Arc<QuicServerConfig>,
    ) -> Result<(ClientConnection, Box<dyn Session>), rustls::Error> {
        let parameters = TransportParameters::read(Side::Server, &mut &[][..]).unwrap();
        let mut said = Vec::new();
        parameters.write(&mut said);
        let name = ServerName::try_from("any.name").unwrap();
        let mut client = ClientConnection::new(client.clone(), Version::V1, name, said).unwrap();
        let mut server = server.clone().start_session(1, &parameters);
        for _ in 0..4 {
            let mut bytes = Vec::new();
            while client.write_hs(&mut bytes).is_some() {}
            if !bytes.is_empty() {
                server.read_handshake(&bytes).unwrap();
            }
            loop {
                let mut bytes = Vec::new();
                let keys = server.write_handshake(&mut bytes);
                if !bytes.is_empty() {
                    client.read_hs(&bytes)?;
                }
                if keys.is_none() && bytes.is_empty() {
                    break;
                }
            }
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        Ok((client, server))
    }

    #[test]
    fn a_client_comes_back_by_its_ticket_and_nothing_is_said_after_the_handshake() {
        let key = key();
        let server = Arc::new(server_tls(issuing(&key)).unwrap());
        let client = client_config(Trust::Pin(fingerprint(&key))).unwrap();
        let client = Arc::new(client);
        for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
            // The last word of the first is the ticket for the second.
            let (client, mut server) = shaken(&client, &server).unwrap();
            assert_eq!(client.handshake_kind(), Some(kind));
            let data = server.handshake_data().unwrap();
            let data = data.downcast::<HandshakeData>().unwrap();
            assert_eq!(data.protocol.as_deref(), Some(ALPN));
            assert!(server.peer_identity().is_none());
            // A key update of TLS.
            let refused = server.read_handshake(&[24, 0, 0, 1, 0]).unwrap_err();
            assert_eq!(refused.code, TransportErrorCode::crypto(10));
        }
    }

    #[tokio::test]
    async fn the_pinned_key_is_believed() {
        let key = key();
        let client = pinned(fingerprint(&key));
        let protocol = handshake(server_tls(issuing(&key)).unwrap(), client).await;
        assert_eq!(protocol.unwrap(), b"udpack/1");
    }

    #[tokio::test]
    async fn a_new_certificate_of_the_pinned_key_is_believed() {
        let key = key();
        let (first, second) = (certificate(&key), certificate(&key));
        assert_ne!(first, second);
        for chain in [first, second] {
            let client = pinned(fingerprint(&key));
            let server = server_tls(forged(vec![chain], &key)).unwrap();
            handshake(server, client).await.unwrap();
        }
    }

    #[tokio::test]
    async fn neither_dates_nor_names_matter_to_a_pin() {
        let key = key();
        let signer = signing_key(&key).unwrap();
        let expired = Issued::new(&key, &signer, 0).unwrap();
        let chain = expired.certificate.cert.clone();
        let client = pinned(fingerprint(&key));
        let server = server_tls(forged(chain, &key)).unwrap();
        handshake(server, client).await.unwrap();
    }

    /// What a client that pins `key` says to this server, and what its attempt learns.
    async fn refused(
        key: &KeyPair,
        server: Arc<CertificateSource>,
    ) -> (rustls::Error, Option<Distrust>) {
        let client = Arc::new(client_config(Trust::Pin(fingerprint(key))).unwrap());
        let server = Arc::new(server_tls(server).unwrap());
        let attempt = Attempt::default();
        let shaking = async { shaken(&client, &server).err().unwrap() };
        (attempt.clone().scope(shaking).await, attempt.distrust())
    }

    #[tokio::test]
    async fn another_key_is_refused_and_both_fingerprints_are_known() {
        let (pinned_key, actual) = (key(), key());
        let (error, distrust) = refused(&pinned_key, issuing(&actual)).await;
        let mismatch = PinMismatch {
            expected: fingerprint(&pinned_key),
            presented: fingerprint(&actual),
        };
        assert_eq!(distrust, Some(Distrust::Key(mismatch)));
        assert_eq!(Distrust::of(&error), distrust);
        let text = mismatch.to_string();
        assert!(text.contains(&mismatch.expected.to_string()), "{text}");
        assert!(text.contains(&mismatch.presented.to_string()), "{text}");
    }

    #[tokio::test]
    async fn the_pinned_certificate_without_its_key_is_refused() {
        let (owner, thief) = (key(), key());
        let server = forged(vec![certificate(&owner)], &thief);
        let (error, distrust) = refused(&owner, server).await;
        let bad = CertificateError::BadSignature;
        assert_eq!(error, rustls::Error::InvalidCertificate(bad));
        assert_eq!(distrust, None, "it is the pinned certificate");
    }

    #[tokio::test]
    async fn the_pinned_certificate_behind_another_leaf_is_refused() {
        let (owner, thief) = (key(), key());
        let chain = vec![certificate(&thief), certificate(&owner)];
        let (_, distrust) = refused(&owner, forged(chain, &thief)).await;
        let Some(Distrust::Key(mismatch)) = distrust else {
            panic!("{distrust:?}");
        };
        assert_eq!(mismatch.presented, fingerprint(&thief));
    }

    #[test]
    fn dates_are_told_from_other_faults() {
        let of = |error| Distrust::of(&rustls::Error::InvalidCertificate(error));
        assert_eq!(of(CertificateError::Expired), Some(Distrust::Dates));
        assert_eq!(of(CertificateError::NotValidYet), Some(Distrust::Dates));
        let unknown = of(CertificateError::UnknownIssuer);
        assert_eq!(unknown, Some(Distrust::Certificate));
        assert_eq!(Distrust::of(&rustls::Error::DecryptError), None);
    }

    #[tokio::test]
    async fn a_self_signed_server_is_refused_without_a_pin() {
        // A machine may have no authorities at all; then there is no configuration either.
        if let Ok(client) = client_tls(Trust::PlatformRoots) {
            let server = server_tls(issuing(&key())).unwrap();
            handshake(server, client).await.unwrap_err();
        }
    }

    #[tokio::test]
    async fn both_sides_insist_on_the_protocol() {
        let key = key();
        for protocols in [vec![], vec![b"h3".to_vec()], vec![b"udpack/2".to_vec()]] {
            let mut server = server_config(issuing(&key), &[ALPN]).unwrap();
            server.alpn_protocols.clone_from(&protocols);
            let server = QuicServerConfig::try_from(server).unwrap();
            let client = pinned(fingerprint(&key));
            assert_no_protocol(handshake(server, client).await);

            let mut client = client_config(Trust::Pin(fingerprint(&key))).unwrap();
            client.alpn_protocols = protocols;
            let client = QuicClientConfig::try_from(client).unwrap();
            let server = server_tls(issuing(&key)).unwrap();
            assert_no_protocol(handshake(server, client).await);
        }
    }

    fn assert_no_protocol(result: Result<Vec<u8>, ConnectionError>) {
        // The TLS alert no_application_protocol, seen by whichever side raised it.
        let expected = TransportErrorCode::crypto(120);
        match result.unwrap_err() {
            ConnectionError::TransportError(error) => assert_eq!(error.code, expected),
            ConnectionError::ConnectionClosed(close) => assert_eq!(close.error_code, expected),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn early_data_is_off_on_both_sides() {
        let key = key();
        assert_eq!(
            server_config(issuing(&key), &[ALPN])
                .unwrap()
                .max_early_data_size,
            0
        );
        let client = client_config(Trust::Pin(fingerprint(&key))).unwrap();
        assert!(!client.enable_early_data);
    }

    #[test]
    fn renews_at_half_life_and_when_the_clock_goes_back() {
        let now = Arc::new(AtomicI64::new(NOW));
        let clock = {
            let now = now.clone();
            Box::new(move || now.load(Ordering::Relaxed))
        };
        let source = CertificateSource::issuing_by(key(), clock).unwrap();
        let at = |time: i64| {
            now.store(time, Ordering::Relaxed);
            source
                .current()
                .end_entity_cert()
                .unwrap()
                .clone()
                .into_owned()
        };
        let first = at(NOW);
        let half = NOW - BACKDATE + VALIDITY / 2;
        assert_eq!(at(half), first);
        assert_eq!(at(NOW - BACKDATE), first);
        let second = at(half + 1);
        assert_ne!(second, first);
        assert_eq!(at(half + 2), second);
        let third = at(NOW - 10);
        assert_ne!(third, second);
        // A time no certificate can hold: the last one still serves.
        assert_eq!(at(i64::MAX), third);
        assert_eq!(at(i64::MIN), third);
        at(0);
        at(NOW * 3);
    }

    #[test]
    fn the_next_certificate_is_known_ahead_and_follows() {
        let now = Arc::new(AtomicI64::new(NOW));
        let clock = {
            let now = now.clone();
            Box::new(move || now.load(Ordering::Relaxed))
        };
        let source = CertificateSource::issuing_by(key(), clock).unwrap();
        let at = |time: i64| {
            now.store(time, Ordering::Relaxed);
            <[_; 2]>::try_from(source.hashes()).unwrap()
        };
        let half = VALIDITY / 2;
        let [first, second] = at(NOW);
        assert_eq!(at(NOW - BACKDATE + half), [first, second]);
        let [then, third] = at(NOW - BACKDATE + half + 1);
        assert_eq!(then, second);
        let leaf = source.current();
        assert_eq!(hash_of(leaf.end_entity_cert().unwrap()), second);
        // Nobody came for so long that the next one is old as well.
        let [fourth, fifth] = at(NOW + 3 * VALIDITY);
        let mut all = vec![first, second, third, fourth, fifth];
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 5);
    }

    #[test]
    fn kept_certificates_outlive_a_restart_and_other_keys_do_not_use_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("webcert.pem");
        let start = |key: &Arc<KeyPair>, now: i64| {
            let source = CertificateSource::issuing_by(key.clone(), Box::new(move || now)).unwrap();
            source.keep(Some(file.clone()));
            <[_; 2]>::try_from(source.hashes()).unwrap()
        };
        let (ours, theirs) = (key(), key());
        let [first, second] = start(&ours, NOW);
        assert_eq!(start(&ours, NOW + 60), [first, second]);
        let later = NOW - BACKDATE + VALIDITY / 2 + 1;
        let [then, third] = start(&ours, later);
        assert_eq!(then, second);
        assert_eq!(start(&ours, later), [second, third]);
        let other = start(&theirs, later);
        assert!(!other.contains(&second) && !other.contains(&third));
        assert_eq!(start(&theirs, later), other);
        std::fs::write(&file, "valid from never").unwrap();
        let anew = start(&theirs, later);
        assert!(!anew.contains(&other[0]));
        assert_eq!(start(&theirs, later), anew);
    }

    #[test]
    fn only_keys_that_browsers_take_have_hashes() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        assert!(issuing(&Arc::new(key)).hashes().is_empty());
        let key = self::key();
        let given = forged(vec![certificate(&key)], &key);
        assert!(given.hashes().is_empty());
    }

    #[test]
    fn every_kind_of_key_that_can_be_read_can_sign() {
        for kind in [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
            &rcgen::PKCS_RSA_SHA256,
        ] {
            let key = KeyPair::generate_for(kind).unwrap();
            let signer = signing_key(&key).unwrap();
            let issued = Issued::new(&key, &signer, NOW).unwrap();
            issued.certificate.keys_match().unwrap();
        }
    }
}
