//! The cipher suites of TLS 1.3 as QUIC needs them: no cipher is made before it is used.
//!
//! rustls makes the ciphers of TLS records, of which QUIC has none (RFC 9001, section 4), and quinn asks for the
//! keys of the next key update (section 6) as soon as it has the present ones, though most connections end before
//! it. In aws-lc each such cipher takes 592 bytes. What encrypts is the provider's, unchanged.

use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};

use rustls::crypto::CipherSuiteCommon;
use rustls::crypto::aws_lc_rs;
use rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, InboundPlainMessage, Iv, MessageDecrypter, MessageEncrypter,
    OutboundOpaqueMessage, OutboundPlainMessage, Tls13AeadAlgorithm, UnsupportedOperationError,
};
use rustls::quic::{Algorithm, HeaderProtectionKey, PacketKey, Tag};
use rustls::{
    CipherSuite, ConnectionTrafficSecrets, Error, SupportedCipherSuite, Tls13CipherSuite,
};

/// What is offered and taken, the fastest first: AES-128-GCM, AES-256-GCM, ChaCha20-Poly1305.
pub(crate) fn suites() -> Vec<SupportedCipherSuite> {
    static SUITES: LazyLock<Vec<SupportedCipherSuite>> = LazyLock::new(|| {
        let mut suites: Vec<_> = aws_lc_rs::ALL_CIPHER_SUITES
            .iter()
            .filter_map(SupportedCipherSuite::tls13)
            .collect();
        suites.sort_by_key(|suite| suite.common.suite != CipherSuite::TLS13_AES_128_GCM_SHA256);
        suites.into_iter().map(for_quic).collect()
    });
    SUITES.clone()
}

/// Made once a process: rustls takes suites that live for ever.
fn for_quic(suite: &'static Tls13CipherSuite) -> SupportedCipherSuite {
    let CipherSuiteCommon {
        suite: name,
        hash_provider,
        confidentiality_limit,
    } = suite.common;
    let quic = suite
        .quic
        .map(|quic| &*Box::leak(Box::new(WhenUsed(quic))) as &dyn Algorithm);
    SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
        common: CipherSuiteCommon {
            suite: name,
            hash_provider,
            confidentiality_limit,
        },
        hkdf_provider: suite.hkdf_provider,
        aead_alg: Box::leak(Box::new(NoRecords(suite.aead_alg))),
        quic,
    })))
}

/// Bytes that each of these suites adds to a packet (RFC 9001, section 5.3). quinn asks for it several times a packet.
const TAG: usize = 16;

/// Stands for the cipher of TLS records, which refuses everything.
struct NoRecords(&'static dyn Tls13AeadAlgorithm);

struct Refuse;

impl Tls13AeadAlgorithm for NoRecords {
    fn encrypter(&self, _: AeadKey, _: Iv) -> Box<dyn MessageEncrypter> {
        Box::new(Refuse)
    }

    fn decrypter(&self, _: AeadKey, _: Iv) -> Box<dyn MessageDecrypter> {
        Box::new(Refuse)
    }

    fn key_len(&self) -> usize {
        self.0.key_len()
    }

    fn extract_keys(
        &self,
        _: AeadKey,
        _: Iv,
    ) -> Result<ConnectionTrafficSecrets, UnsupportedOperationError> {
        Err(UnsupportedOperationError)
    }

    fn fips(&self) -> bool {
        self.0.fips()
    }
}

impl MessageEncrypter for Refuse {
    fn encrypt(
        &mut self,
        _: OutboundPlainMessage<'_>,
        _: u64,
    ) -> Result<OutboundOpaqueMessage, Error> {
        Err(Error::EncryptError)
    }

    fn encrypted_payload_len(&self, payload: usize) -> usize {
        payload
    }
}

impl MessageDecrypter for Refuse {
    fn decrypt<'a>(
        &mut self,
        _: InboundOpaqueMessage<'a>,
        _: u64,
    ) -> Result<InboundPlainMessage<'a>, Error> {
        Err(Error::DecryptError)
    }
}

/// The same algorithm; its keys for packets are made when they are used first.
struct WhenUsed(&'static dyn Algorithm);

impl Algorithm for WhenUsed {
    fn packet_key(&self, key: AeadKey, iv: Iv) -> Box<dyn PacketKey> {
        Box::new(Key {
            algorithm: self.0,
            given: Mutex::new(Some(Box::new((key, iv)))),
            made: OnceLock::new(),
        })
    }

    fn header_protection_key(&self, key: AeadKey) -> Box<dyn HeaderProtectionKey> {
        self.0.header_protection_key(key)
    }

    fn aead_key_len(&self) -> usize {
        self.0.aead_key_len()
    }

    fn fips(&self) -> bool {
        self.0.fips()
    }
}

struct Key {
    algorithm: &'static dyn Algorithm,
    /// Until it is made.
    given: Mutex<Option<Box<(AeadKey, Iv)>>>,
    made: OnceLock<Box<dyn PacketKey>>,
}

impl Key {
    #[inline]
    fn get_or_make(&self) -> Option<&dyn PacketKey> {
        match self.made.get() {
            Some(made) => Some(&**made),
            None => self.make(),
        }
    }

    #[cold]
    fn make(&self) -> Option<&dyn PacketKey> {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(given) = given.take() {
            let (key, iv) = *given;
            let made = self.algorithm.packet_key(key, iv);
            debug_assert_eq!(made.tag_len(), TAG);
            let _ = self.made.set(made);
        }
        self.made.get().map(|made| &**made)
    }
}

impl PacketKey for Key {
    fn encrypt_in_place(
        &self,
        packet_number: u64,
        header: &[u8],
        payload: &mut [u8],
    ) -> Result<Tag, Error> {
        let key = self.get_or_make().ok_or(Error::EncryptError)?;
        key.encrypt_in_place(packet_number, header, payload)
    }

    fn decrypt_in_place<'a>(
        &self,
        packet_number: u64,
        header: &[u8],
        payload: &'a mut [u8],
    ) -> Result<&'a [u8], Error> {
        let key = self.get_or_make().ok_or(Error::DecryptError)?;
        key.decrypt_in_place(packet_number, header, payload)
    }

    fn tag_len(&self) -> usize {
        TAG
    }

    fn confidentiality_limit(&self) -> u64 {
        self.get_or_make()
            .map_or(0, PacketKey::confidentiality_limit)
    }

    fn integrity_limit(&self) -> u64 {
        self.get_or_make().map_or(0, PacketKey::integrity_limit)
    }
}
