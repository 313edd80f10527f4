//! A certificate of an authority, for browsers: read from two files, and again when these change.
//!
//! Clients that speak `udpack/1` pin the server's own key and never receive this certificate, so a renewal does not
//! affect them.

use std::fmt;
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::trust::secret_file::{self, SecretFileError, Version};
use crate::trust::tls::{self, ALPN, CertificateSource};

/// A certificate that browsers trust because an authority has signed it, for [`Web::certificate`](crate::Web::certificate).
///
/// Presented to all clients except those that speak `udpack/1`, which pin the server's own key. Clones share one
/// certificate.
#[derive(Clone)]
pub struct WebCertificate {
    inner: Arc<Inner>,
}

struct Inner {
    chain: PathBuf,
    key: PathBuf,
    state: Mutex<State>,
}

struct State {
    served: Arc<CertifiedKey>,
    /// The versions of the files that were read last, valid or not.
    seen: Versions,
}

/// The metadata of the two files; `None` if it cannot be read.
type Versions = [Option<Version>; 2];

impl WebCertificate {
    /// Reads a chain, leaf first, and the leaf's private key, both in PEM. The key is PKCS#8, PKCS#1 or SEC1, without
    /// a passphrase, of RSA, ECDSA P-256, P-384 or Ed25519; a key file that everybody may read is refused. Blocks.
    ///
    /// # Errors
    /// When a file cannot be read, holds no chain or key in PEM, or the two do not belong together; the error names
    /// the file.
    pub fn load(
        chain: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> Result<Self, WebCertificateError> {
        let (chain, key) = (chain.into(), key.into());
        let seen = versions(&chain, &key);
        let served = Arc::new(read(&chain, &key)?);
        Ok(Self {
            inner: Arc::new(Inner {
                chain,
                key,
                state: Mutex::new(State { served, seen }),
            }),
        })
    }

    /// Whether the files have changed since they were read last, or reading them failed. Blocks for as long as the file system does.
    pub fn has_changed(&self) -> bool {
        versions(&self.inner.chain, &self.inner.key) != self.inner.lock().seen
    }

    /// Reads the files again. Later handshakes use the new certificate; existing connections continue. Blocks.
    ///
    /// # Errors
    /// As [`load`](Self::load). The earlier certificate then stays in use.
    pub fn reload(&self) -> Result<(), WebCertificateError> {
        let seen = versions(&self.inner.chain, &self.inner.key);
        let read = read(&self.inner.chain, &self.inner.key);
        let mut state = self.inner.lock();
        state.seen = seen;
        state.served = Arc::new(read?);
        Ok(())
    }

    fn current(&self) -> Arc<CertifiedKey> {
        self.inner.lock().served.clone()
    }
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for WebCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WebCertificate")
            .field(&self.inner.chain)
            .finish()
    }
}

/// Why a certificate is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WebCertificateError {
    /// A file could not be read, or everybody on this machine can read the key's.
    #[error(transparent)]
    File(#[from] SecretFileError),
    /// A file holds no certificate in PEM, or a damaged one.
    #[error("no certificate in PEM in {}: a chain is wanted, the server's own certificate first", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// A file holds no private key in PEM, or one that cannot be used.
    #[error("no private key in {} that can be used: PKCS#8, PKCS#1 or SEC1 in PEM is wanted, without a passphrase", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// The key does not belong to the certificate.
    #[error("the key in {} is not that of the first certificate in {}", key.display(), chain.display())]
    Mismatch {
        /// The file of the chain.
        chain: PathBuf,
        /// The file of the key.
        key: PathBuf,
    },
}

fn read(chain: &Path, key: &Path) -> Result<CertifiedKey, WebCertificateError> {
    let no_certificate = || WebCertificateError::NoCertificate {
        path: chain.to_owned(),
    };
    let (pem, _) = secret_file::content(chain, MAX_FILE, |_| Ok(()))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|_| no_certificate())?;
    if certificates.is_empty() {
        return Err(no_certificate());
    }
    // A group may read it: certificate tools keep keys for the group of the servers that use them.
    let private = |metadata: &Metadata| secret_file::check_mode(key, metadata, 0o660);
    let (pem, _) = secret_file::content(key, MAX_FILE, private)?;
    let no_key = || WebCertificateError::NoKey {
        path: key.to_owned(),
    };
    let der = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| no_key())?;
    let signing = tls::loaded_key(der).map_err(|_| no_key())?;
    let certified = CertifiedKey::new(certificates, signing);
    match certified.keys_match() {
        Ok(()) => Ok(certified),
        Err(rustls::Error::InconsistentKeys(_)) => Err(WebCertificateError::Mismatch {
            chain: chain.to_owned(),
            key: key.to_owned(),
        }),
        Err(_) => Err(no_certificate()),
    }
}

fn versions(chain: &Path, key: &Path) -> Versions {
    [chain, key].map(|path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Version::of(&metadata))
    })
}

/// The certificates of one server: its own for clients that pin its key, and optionally another one for browsers.
#[derive(Debug, Clone)]
pub(crate) struct Certificates {
    own: Arc<CertificateSource>,
    web: Option<WebCertificate>,
}

impl Certificates {
    pub(crate) fn new(own: Arc<CertificateSource>, web: Option<WebCertificate>) -> Self {
        Self { own, web }
    }

    /// The hashes that browsers compare; empty if an authority has signed the certificate for browsers.
    pub(crate) fn hashes(&self) -> Vec<[u8; 32]> {
        match self.web {
            Some(_) => Vec::new(),
            None => self.own.hashes(),
        }
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // The server prefers `udpack/1`, so a client that offers it gets the server's own certificate.
        match &self.web {
            Some(web) if !offers_ours(&hello) => Some(web.current()),
            _ => self.own.resolve(hello),
        }
    }
}

fn offers_ours(hello: &ClientHello<'_>) -> bool {
    hello
        .alpn()
        .is_some_and(|mut offered| offered.any(|name| name == ALPN))
}

const MAX_FILE: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection};
    use tempfile::TempDir;

    use super::*;
    use crate::trust::fingerprint::Fingerprint;
    use crate::trust::tls::{Trust, client_config, server_config};

    const HOST: &str = "files.example";

    /// An authority, and the files that it has signed.
    struct Authority {
        issuer: CertifiedIssuer<'static, KeyPair>,
        dir: TempDir,
    }

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            Self {
                issuer: CertifiedIssuer::self_signed(params, key).unwrap(),
                dir: tempfile::tempdir().unwrap(),
            }
        }

        fn chain(&self) -> PathBuf {
            self.dir.path().join("chain.pem")
        }

        fn key(&self) -> PathBuf {
            self.dir.path().join("key.pem")
        }

        /// Signs a new key, and puts it and the chain into the files.
        fn sign(&self) {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new([HOST.to_owned()]).unwrap();
            let leaf = params.signed_by(&key, &self.issuer).unwrap();
            let chain = leaf.pem() + &self.issuer.pem();
            put(&self.chain(), &chain, 0o644);
            put(&self.key(), &key.serialize_pem(), 0o600);
        }

        fn load(&self) -> Result<WebCertificate, WebCertificateError> {
            WebCertificate::load(self.chain(), self.key())
        }

        /// A client that trusts this authority, and offers these protocols.
        fn client(&self, protocols: &[&[u8]]) -> ClientConfig {
            let mut roots = RootCertStore::empty();
            roots.add(self.issuer.der().clone()).unwrap();
            let config = ClientConfig::builder_with_provider(tls::provider());
            let config = config.with_protocol_versions(&[&rustls::version::TLS13]);
            let mut config = config
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
            config
        }
    }

    /// As certbot does it: a new file under the old name.
    fn put(path: &Path, text: &str, mode: u32) {
        let new = path.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(mode)).unwrap();
        std::fs::rename(new, path).unwrap();
    }

    fn own() -> (Arc<CertificateSource>, Fingerprint) {
        let key = Arc::new(KeyPair::generate().unwrap());
        let fingerprint = Fingerprint::of_public_key_pem(&key.public_key_pem()).unwrap();
        (
            Arc::new(CertificateSource::issuing(key).unwrap()),
            fingerprint,
        )
    }

    /// Shakes hands; the chain that the client has accepted.
    fn handshake(
        certificates: &Arc<Certificates>,
        client: ClientConfig,
    ) -> Result<Vec<CertificateDer<'static>>, rustls::Error> {
        let protocols: [&[u8]; 3] = [ALPN, b"h3", b"http/1.1"];
        let config = server_config(certificates.clone(), &protocols).unwrap();
        let mut server = ServerConnection::new(Arc::new(config)).unwrap();
        let name = ServerName::try_from(HOST).unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
        while client.is_handshaking() || server.is_handshaking() {
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            server.read_tls(&mut &*bytes).unwrap();
            server.process_new_packets()?;
            bytes.clear();
            server.write_tls(&mut bytes).unwrap();
            client.read_tls(&mut &*bytes).unwrap();
            client.process_new_packets()?;
        }
        Ok(client.peer_certificates().unwrap().to_vec())
    }

    #[test]
    fn browsers_get_the_authoritys_word_and_others_the_pinned_key() {
        let authority = Authority::new();
        authority.sign();
        let (own, pin) = own();
        let certificates = Certificates::new(own.clone(), Some(authority.load().unwrap()));
        assert!(certificates.hashes().is_empty());
        let certificates = Arc::new(certificates);
        for protocols in [&[&b"h3"[..]][..], &[b"http/1.1"], &[]] {
            let chain = handshake(&certificates, authority.client(protocols)).unwrap();
            assert_eq!(chain.len(), 2);
            assert_eq!(&chain[1], authority.issuer.der());
        }
        let pinned = || client_config(Trust::Pin(pin)).unwrap();
        assert_eq!(handshake(&certificates, pinned()).unwrap().len(), 1);
        // Who speaks both is asked for neither name nor authority: it gets the key that may be pinned.
        let both = authority.client(&[b"h3", ALPN]);
        assert!(handshake(&certificates, both).is_err());

        let alone = Arc::new(Certificates::new(own, None));
        assert_eq!(alone.hashes().len(), 2);
        assert!(handshake(&alone, authority.client(&[b"h3"])).is_err());
        handshake(&alone, pinned()).unwrap();
    }

    #[test]
    fn a_renewed_file_is_taken_and_a_broken_one_is_not() {
        let authority = Authority::new();
        authority.sign();
        let web = authority.load().unwrap();
        let certificates = Arc::new(Certificates::new(own().0, Some(web.clone())));
        let served = || handshake(&certificates, authority.client(&[b"h3"])).unwrap();
        let first = served();
        assert!(!web.has_changed());
        authority.sign();
        assert!(web.has_changed());
        assert_eq!(served(), first, "only when it is told to");
        web.reload().unwrap();
        assert!(!web.has_changed());
        let second = served();
        assert_ne!(second, first);

        let sound = std::fs::read_to_string(authority.chain()).unwrap();
        put(&authority.chain(), &sound[..300], 0o644);
        assert!(web.has_changed());
        let error = web.reload().unwrap_err();
        assert!(
            matches!(error, WebCertificateError::NoCertificate { .. }),
            "{error}"
        );
        assert_eq!(served(), second);
        assert!(!web.has_changed(), "told once");
        std::fs::remove_file(authority.chain()).unwrap();
        assert!(web.has_changed());
        assert!(matches!(
            web.reload(),
            Err(WebCertificateError::File(SecretFileError::Read { .. }))
        ));
        assert_eq!(served(), second);
        authority.sign();
        web.reload().unwrap();
        assert_ne!(served(), second);
    }

    #[test]
    fn bad_files_are_named() {
        let authority = Authority::new();
        let refused = || authority.load().unwrap_err().to_string();
        let (chain, key) = (authority.chain(), authority.key());
        let (chain, key) = (chain.display().to_string(), key.display().to_string());
        assert_eq!(refused(), format!("cannot read {chain}"));
        authority.sign();
        let sound = std::fs::read_to_string(authority.key()).unwrap();
        put(&authority.key(), &sound, 0o640);
        authority.load().expect("a group may read it");
        put(&authority.key(), &sound, 0o644);
        assert!(refused().starts_with(&format!("{key} has mode 0644, so others")));
        for bad in ["", "garbage", &sound[..80]] {
            put(&authority.key(), bad, 0o600);
            assert!(
                refused().starts_with(&format!("no private key in {key}")),
                "{bad}"
            );
        }
        let other = KeyPair::generate().unwrap().serialize_pem();
        put(&authority.key(), &other, 0o600);
        assert_eq!(
            refused(),
            format!("the key in {key} is not that of the first certificate in {chain}")
        );
        std::fs::remove_file(authority.key()).unwrap();
        assert_eq!(refused(), format!("cannot read {key}"));
        authority.sign();
        let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for bad in ["", "garbage", garbage, &sound] {
            put(&authority.chain(), bad, 0o644);
            assert!(
                refused().starts_with(&format!("no certificate in PEM in {chain}")),
                "{bad}"
            );
        }
        put(&authority.chain(), &"x".repeat(2 << 20), 0o644);
        assert!(refused().contains("larger than"), "{}", refused());
    }
}
