//! A server's identity across restarts: one private key, kept in a directory.
//!
//! The key is the identity. Certificates are issued from it in memory and kept only for browsers, which know them by
//! their hash. Every other long-lived secret of an endpoint is derived from the key, so that no other secret has to
//! be stored. This module never asks for a passphrase and never replaces an existing key; it refuses to load a
//! doubtful one.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::hkdf;
use rcgen::{KeyPair, PublicKeyData};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;

use crate::trust::fingerprint::Fingerprint;
use crate::trust::secret_file::{self, SecretFileError};
use crate::trust::tls::{self, CertificateSource};
use crate::trust::web_certificate::{Certificates, WebCertificate};

/// A server's key pair and the certificates that go with it.
///
/// Clones share one key and one certificate. `Debug` shows the fingerprint, nothing else.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<Inner>,
}

struct Inner {
    key: Arc<KeyPair>,
    fingerprint: Fingerprint,
    certificates: Arc<CertificateSource>,
    derived: hkdf::Prk,
    /// The file for the certificates for browsers, if they may be kept.
    kept: Option<PathBuf>,
}

impl Identity {
    /// Loads the identity kept in `dir`, or creates one there.
    ///
    /// The private key is `prikey.pem` (PKCS#8), the public key `pubkey.pem`; both are created
    /// with mode 0600, the directory with 0700. A missing `pubkey.pem` is written again from the
    /// private key. When several processes start on an empty directory together, all of them end
    /// up with the key of the first.
    ///
    /// # Errors
    ///
    /// When the key is there but cannot be used: unreadable, readable by others, owned by somebody
    /// else, empty, encrypted or not a key; when the two files do not belong together; when only
    /// `pubkey.pem` is there; or when the files cannot be created. No existing file is changed.
    pub fn load_or_create(dir: impl AsRef<Path>) -> Result<Self, IdentityError> {
        let files = KeyFiles::new(dir.as_ref());
        // The public key is written last. Looked at first, it cannot be alone by accident.
        let public = files.read_public()?;
        let key = match files.read_private() {
            Ok(key) => key,
            Err(IdentityError::File(error)) if error.is_missing() => {
                if public.is_some() {
                    return Err(IdentityError::PrivateKeyMissing {
                        public: files.public,
                        private: files.private,
                    });
                }
                files.create_private()?;
                files.read_private()?
            }
            Err(error) => return Err(error),
        };

        let public = match public {
            Some(public) => Some(public),
            None if secret_file::create(&files.public, key.public_key_pem().as_bytes())? => None,
            None => files.read_public()?,
        };
        files.check_pair(public, &key)?;
        let certificates = dir.as_ref().join(CERTIFICATE_FILE);
        Self::new(key, Some(certificates), CertificateSource::issuing)
    }

    /// Loads the identity kept in `dir`, and writes nothing.
    ///
    /// # Errors
    ///
    /// As [`load_or_create`](Self::load_or_create), and when there is no private key. The public
    /// key file may be missing, but must match if it is there.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self, IdentityError> {
        let files = KeyFiles::new(dir.as_ref());
        let key = files.read_private()?;
        files.check_pair(files.read_public()?, &key)?;
        Self::self_signed(key)
    }

    /// Makes a new identity that lives in memory only.
    ///
    /// # Errors
    ///
    /// When the cryptographic library fails.
    pub fn generate() -> Result<Self, IdentityError> {
        Self::self_signed(new_key()?)
    }

    /// Uses a certificate of a certificate authority, and its key.
    ///
    /// The chain, leaf first, is served as it is and never renewed. Clients may still pin the key.
    ///
    /// # Errors
    ///
    /// When a text is not a chain or a key in PEM, or the key does not belong to the leaf.
    pub fn from_pem(
        certificate_chain_pem: &str,
        private_key_pem: &str,
    ) -> Result<Self, IdentityError> {
        let chain = CertificateDer::pem_slice_iter(certificate_chain_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .unwrap_or_default();
        let leaf = chain.first().ok_or(IdentityError::BadCertificate)?;
        let leaf_spki = ParsedCertificate::try_from(leaf)
            .map_err(|_| IdentityError::BadCertificate)?
            .subject_public_key_info();
        let key = parse_key("the given private key", private_key_pem.as_bytes())?;
        if *leaf_spki != *key.subject_public_key_info() {
            return Err(IdentityError::CertificateMismatch);
        }
        Self::new(key, None, |key| CertificateSource::given(key, chain))
    }

    /// Returns the fingerprint that clients pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.inner.fingerprint
    }

    /// Returns the public key as PEM, the content of `pubkey.pem`.
    pub fn public_key_pem(&self) -> String {
        self.inner.key.public_key_pem()
    }

    /// Returns the certificates of a server of this identity; `web` is for browsers in place of its own.
    pub(crate) fn certificates(&self, web: Option<WebCertificate>) -> Certificates {
        Certificates::new(self.inner.certificates.clone(), web)
    }

    /// Stores the certificates beside the key from now on, if the key is in a file, so that their hashes stay the
    /// same after a restart.
    pub(crate) fn keep_certificates(&self) {
        self.inner.certificates.keep(self.inner.kept.clone());
    }

    /// Returns the key for stateless resets: because the key is lasting, a restarted server can tell its old peers at
    /// once that their connections are gone.
    ///
    /// It is HKDF-SHA256 of the private key under a label of its own: one derived key reveals neither the private key
    /// nor another derived key. An attacker who makes one server answer packets of a connection of another server
    /// with the same key can end that connection, so two servers that run at the same time must not share a key (RFC
    /// 9000, section 21.11).
    pub(crate) fn reset_secret(&self) -> [u8; 32] {
        self.derive(RESET_LABEL)
    }

    /// Returns the key that marks connection ids as this server's own.
    pub(crate) fn cid_key(&self) -> u64 {
        u64::from_be_bytes(self.derive(CID_LABEL))
    }

    /// Returns the key that encrypts address validation tokens; they remain valid after a restart.
    pub(crate) fn address_secret(&self) -> [u8; 32] {
        self.derive(TOKEN_LABEL)
    }

    fn self_signed(key: KeyPair) -> Result<Self, IdentityError> {
        Self::new(key, None, CertificateSource::issuing)
    }

    fn new<F>(key: KeyPair, kept: Option<PathBuf>, certificates: F) -> Result<Self, IdentityError>
    where
        F: FnOnce(Arc<KeyPair>) -> Result<CertificateSource, tls::TlsError>,
    {
        let key = Arc::new(key);
        let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, DERIVATION_SALT);
        Ok(Self {
            inner: Arc::new(Inner {
                fingerprint: Fingerprint::of_spki(&key.subject_public_key_info()),
                certificates: Arc::new(certificates(key.clone()).map_err(IdentityError::crypto)?),
                derived: salt.extract(key.serialized_der()),
                kept,
                key,
            }),
        })
    }

    fn derive<const N: usize>(&self, label: &[u8]) -> [u8; N] {
        let mut out = [0; N];
        self.inner
            .derived
            .expand(&[label], Length(N))
            .and_then(|okm| okm.fill(&mut out))
            .expect("no label asks for more than 255 digests, and the lengths agree");
        out
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity")
            .field(&self.inner.fingerprint)
            .finish()
    }
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A key file could not be read or created, or is not private.
    #[error(transparent)]
    File(#[from] SecretFileError),
    /// The private key is empty.
    #[error("empty: {origin}: remove it to get a new key, or restore it")]
    Empty {
        /// The file, or a description of the text.
        origin: String,
    },
    /// The private key is protected by a passphrase.
    #[error("encrypted: {origin}: decrypt it first, as with openssl pkcs8 -topk8 -nocrypt")]
    Encrypted {
        /// The file, or a description of the text.
        origin: String,
    },
    /// The private key is damaged, of another format, or of a kind that cannot be used.
    #[error("not a private key in PKCS#8 PEM: {origin}")]
    NotAKey {
        /// The file, or a description of the text.
        origin: String,
    },
    /// The public key file holds no public key.
    #[error("not a public key in PEM: {}: remove it to have it written again", path.display())]
    NotAPublicKey {
        /// The file.
        path: PathBuf,
    },
    /// The two key files do not belong together.
    #[error(
        "{} is not the public key of {}: remove it to have it written again, \
         or restore the private key it belongs to",
        public.display(), private.display()
    )]
    PairMismatch {
        /// The public key file.
        public: PathBuf,
        /// The private key file.
        private: PathBuf,
    },
    /// There is a public key but no private key.
    #[error(
        "{} is missing but {} exists: restore the private key, \
         or remove the public key to start with a new identity",
        private.display(), public.display()
    )]
    PrivateKeyMissing {
        /// The public key file.
        public: PathBuf,
        /// The private key file.
        private: PathBuf,
    },
    /// The certificate chain holds no usable certificate, or a damaged one.
    #[error("not a certificate chain in PEM")]
    BadCertificate,
    /// The private key is not the one in the leaf certificate.
    #[error("the private key does not belong to the first certificate of the chain")]
    CertificateMismatch,
    /// The cryptographic library refused.
    #[error("cannot use the key for TLS")]
    Crypto(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl IdentityError {
    pub(crate) fn crypto(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Crypto(Box::new(error))
    }
}

/// The two files of an identity.
struct KeyFiles {
    private: PathBuf,
    public: PathBuf,
}

impl KeyFiles {
    fn new(dir: &Path) -> Self {
        Self {
            private: dir.join(PRIVATE_KEY_FILE),
            public: dir.join(PUBLIC_KEY_FILE),
        }
    }

    fn read_private(&self) -> Result<KeyPair, IdentityError> {
        let (pem, _) = secret_file::read(&self.private, MAX_KEY_FILE)?;
        parse_key(&self.private.display().to_string(), &pem)
    }

    /// Creates the private key, unless another process was faster.
    fn create_private(&self) -> Result<(), IdentityError> {
        if let Some(dir) = self.private.parent() {
            secret_file::create_dir(dir)?;
        }
        let key = new_key()?;
        if secret_file::create(&self.private, key.serialize_pem().as_bytes())? {
            tracing::info!(path = %self.private.display(), "new server key");
        }
        Ok(())
    }

    fn read_public(&self) -> Result<Option<Fingerprint>, IdentityError> {
        use crate::trust::fingerprint::FingerprintError;

        let path = &self.public;
        match Fingerprint::from_public_key_file(path) {
            Ok(fingerprint) => Ok(Some(fingerprint)),
            Err(FingerprintError::Read { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(None)
            }
            Err(FingerprintError::Read { path, source }) => {
                Err(SecretFileError::Read { path, source }.into())
            }
            Err(_) => Err(IdentityError::NotAPublicKey { path: path.clone() }),
        }
    }

    fn check_pair(&self, public: Option<Fingerprint>, key: &KeyPair) -> Result<(), IdentityError> {
        let actual = Fingerprint::of_spki(&key.subject_public_key_info());
        match public {
            Some(public) if public != actual => Err(IdentityError::PairMismatch {
                public: self.public.clone(),
                private: self.private.clone(),
            }),
            _ => Ok(()),
        }
    }
}

fn new_key() -> Result<KeyPair, IdentityError> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(IdentityError::crypto)
}

/// Parses a private key. Errors never quote its text.
fn parse_key(origin: &str, pem: &[u8]) -> Result<KeyPair, IdentityError> {
    let origin = || origin.to_owned();
    if pem.trim_ascii().is_empty() {
        return Err(IdentityError::Empty { origin: origin() });
    }
    let encrypted = [
        &b"-----BEGIN ENCRYPTED PRIVATE KEY-----"[..],
        b"Proc-Type: 4,ENCRYPTED",
    ];
    if encrypted
        .iter()
        .any(|mark| pem.windows(mark.len()).any(|window| window == *mark))
    {
        return Err(IdentityError::Encrypted { origin: origin() });
    }
    PrivateKeyDer::from_pem_slice(pem)
        .ok()
        .and_then(|der| KeyPair::try_from(&der).ok())
        .ok_or_else(|| IdentityError::NotAKey { origin: origin() })
}

/// The length of a derived key.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

const PRIVATE_KEY_FILE: &str = "prikey.pem";
const PUBLIC_KEY_FILE: &str = "pubkey.pem";
const CERTIFICATE_FILE: &str = "webcert.pem";
const MAX_KEY_FILE: u64 = 64 * 1024;

const DERIVATION_SALT: &[u8] = b"udpack identity v1";
const RESET_LABEL: &[u8] = b"stateless reset";
const CID_LABEL: &[u8] = b"connection id";
const TOKEN_LABEL: &[u8] = b"address validation token";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    /// A directory with an identity in it.
    fn kept() -> (tempfile::TempDir, KeyFiles, Identity) {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(dir.path()).unwrap();
        let files = KeyFiles::new(dir.path());
        (dir, files, identity)
    }

    #[test]
    fn creates_private_files_and_keeps_them() {
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        let first = Identity::load_or_create(&keys).unwrap();
        let files = KeyFiles::new(&keys);
        assert_eq!(mode(&keys), 0o700);
        assert_eq!(mode(&files.private), 0o600);
        assert_eq!(mode(&files.public), 0o600);
        assert_eq!(std::fs::read_dir(&keys).unwrap().count(), 2);
        let public = std::fs::read_to_string(&files.public).unwrap();
        assert_eq!(public, first.public_key_pem());
        assert_eq!(
            Fingerprint::of_public_key_pem(&public).unwrap(),
            first.fingerprint()
        );
        let private = std::fs::read_to_string(&files.private).unwrap();
        assert!(private.starts_with("-----BEGIN PRIVATE KEY-----\n"));

        for again in [Identity::load_or_create(&keys), Identity::load(&keys)] {
            assert_eq!(again.unwrap().fingerprint(), first.fingerprint());
        }
        assert_eq!(std::fs::read_to_string(&files.private).unwrap(), private);
    }

    #[test]
    fn racing_first_starts_agree_on_one_key() {
        for _ in 0..8 {
            let dir = tempfile::tempdir().unwrap();
            let keys = dir.path().join("keys");
            let barrier = std::sync::Barrier::new(8);
            let found: Vec<Fingerprint> = std::thread::scope(|scope| {
                let start = || {
                    barrier.wait();
                    Identity::load_or_create(&keys).unwrap().fingerprint()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap())
                    .collect()
            });
            assert!(found.iter().all(|fingerprint| *fingerprint == found[0]));
            assert_eq!(std::fs::read_dir(&keys).unwrap().count(), 2);
        }
    }

    #[test]
    fn load_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            Identity::load(dir.path()),
            Err(IdentityError::File(error)) if error.is_missing()
        ));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn writes_a_missing_public_key_again() {
        let (dir, files, identity) = kept();
        std::fs::remove_file(&files.public).unwrap();
        Identity::load(dir.path()).unwrap();
        assert!(!files.public.exists());
        Identity::load_or_create(dir.path()).unwrap();
        let public = std::fs::read_to_string(&files.public).unwrap();
        assert_eq!(public, identity.public_key_pem());
    }

    #[test]
    fn refuses_a_public_key_of_another_identity() {
        let (dir, files, _) = kept();
        let other = Identity::generate().unwrap().public_key_pem();
        std::fs::write(&files.public, &other).unwrap();
        for result in [
            Identity::load_or_create(dir.path()),
            Identity::load(dir.path()),
        ] {
            assert!(matches!(result, Err(IdentityError::PairMismatch { .. })));
        }
        std::fs::write(&files.public, "garbage").unwrap();
        let result = Identity::load_or_create(dir.path());
        assert!(matches!(result, Err(IdentityError::NotAPublicKey { .. })));
        assert_eq!(std::fs::read(&files.public).unwrap(), b"garbage");
    }

    #[test]
    fn makes_no_new_key_beside_an_old_public_key() {
        let (dir, files, _) = kept();
        std::fs::remove_file(&files.private).unwrap();
        let error = Identity::load_or_create(dir.path()).unwrap_err();
        assert!(matches!(error, IdentityError::PrivateKeyMissing { .. }));
        assert!(!files.private.exists());
    }

    #[test]
    fn refuses_a_private_key_that_others_can_read() {
        let (dir, files, _) = kept();
        std::fs::set_permissions(&files.private, PermissionsExt::from_mode(0o644)).unwrap();
        let text = Identity::load_or_create(dir.path())
            .unwrap_err()
            .to_string();
        let fix = format!("chmod 600 {}", files.private.display());
        assert!(text.contains("mode 0644") && text.contains(&fix), "{text}");
    }

    #[test]
    fn never_overwrites_a_key_it_cannot_use() {
        let (dir, files, _) = kept();
        let good = std::fs::read_to_string(&files.private).unwrap();
        for (content, word) in [
            (String::new(), "empty"),
            ("\n \n".to_owned(), "empty"),
            ("garbage".to_owned(), "not a private key"),
            (good.replace("MIG", "AAA"), "not a private key"),
            (good.replace("PRIVATE", "ENCRYPTED PRIVATE"), "encrypted"),
            (
                good.replace("KEY-----\nM", "KEY-----\nProc-Type: 4,ENCRYPTED\n\nM"),
                "encrypted",
            ),
            (
                Identity::generate().unwrap().public_key_pem(),
                "not a private key",
            ),
        ] {
            std::fs::write(&files.private, &content).unwrap();
            for result in [
                Identity::load_or_create(dir.path()),
                Identity::load(dir.path()),
            ] {
                let text = result.unwrap_err().to_string();
                assert!(text.starts_with(word), "{word}: {text}");
                assert!(text.contains("prikey.pem"), "{text}");
            }
            assert_eq!(std::fs::read_to_string(&files.private).unwrap(), content);
        }
    }

    #[test]
    fn derived_keys_last_and_differ() {
        let (dir, _, first) = kept();
        let again = Identity::load(dir.path()).unwrap();
        let other = Identity::generate().unwrap();
        assert_eq!(first.cid_key(), again.cid_key());
        assert_ne!(first.cid_key(), other.cid_key());
        assert_eq!(first.reset_secret(), again.reset_secret());
        assert_ne!(first.reset_secret(), other.reset_secret());
        assert_eq!(first.address_secret(), again.address_secret());
        assert_ne!(first.address_secret(), other.address_secret());
        let labels = [RESET_LABEL, CID_LABEL, TOKEN_LABEL].map(|label| first.derive::<8>(label));
        assert!(labels[0] != labels[1] && labels[1] != labels[2] && labels[0] != labels[2]);
    }

    #[test]
    fn debug_shows_the_fingerprint_alone() {
        let identity = Identity::generate().unwrap();
        assert_eq!(
            format!("{identity:?}"),
            format!("Identity({})", identity.fingerprint())
        );
    }

    #[test]
    fn takes_an_issued_certificate_with_its_key_only() {
        let key = new_key().unwrap();
        let params = rcgen::CertificateParams::new(["example.com".to_owned()]).unwrap();
        let chain = params.self_signed(&key).unwrap().pem();
        let identity = Identity::from_pem(&chain, &key.serialize_pem()).unwrap();
        assert_eq!(
            identity.fingerprint(),
            Fingerprint::of_public_key_pem(&key.public_key_pem()).unwrap()
        );
        let certificates = Arc::new(identity.certificates(None));
        tls::server_config(certificates, &[tls::ALPN]).unwrap();

        let other = new_key().unwrap().serialize_pem();
        assert!(matches!(
            Identity::from_pem(&chain, &other),
            Err(IdentityError::CertificateMismatch)
        ));
        for bad in ["", "garbage", &key.public_key_pem(), &chain[..200]] {
            assert!(matches!(
                Identity::from_pem(bad, &key.serialize_pem()),
                Err(IdentityError::BadCertificate)
            ));
        }
        assert!(matches!(
            Identity::from_pem(&chain, ""),
            Err(IdentityError::Empty { .. })
        ));
    }
}
