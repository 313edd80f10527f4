//! Certificates that a server issues to itself, and the file that keeps them.
//!
//! A browser that trusts a certificate by its hash accepts one that is valid for at most 14 days. So there are always
//! two certificates, the current one and its successor, and a page that knows both hashes can connect at any time. A
//! file keeps them, because a newly issued certificate has another hash even with the same key.

use std::path::PathBuf;
use std::sync::Arc;

use aws_lc_rs::digest;
use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SigningKey};
use time::OffsetDateTime;

use crate::trust::secret_file::{self, SecretFileError, Version};
use crate::trust::tls::TlsError;

/// The lifetime of a certificate, in seconds. Browsers that trust a certificate by its hash accept at most 14 days.
pub(crate) const VALIDITY: i64 = 13 * 24 * 60 * 60;
/// How far behind a client's clock may be, in seconds.
pub(crate) const BACKDATE: i64 = 60 * 60;
const SUBJECT_NAMES: [&str; 2] = ["udpack", "localhost"];

/// A certificate and the seconds since 1970 between which it is valid.
pub(crate) struct Issued {
    pub(crate) certificate: Arc<CertifiedKey>,
    pem: String,
    not_before: i64,
    not_after: i64,
}

impl Issued {
    /// Issues a certificate that is valid from now on.
    pub(crate) fn new(
        issuer: &KeyPair,
        key: &Arc<dyn SigningKey>,
        now: i64,
    ) -> Result<Self, TlsError> {
        Self::from(issuer, key, now.saturating_sub(BACKDATE))
    }

    /// Issues the successor of this certificate.
    pub(crate) fn next(
        &self,
        issuer: &KeyPair,
        key: &Arc<dyn SigningKey>,
    ) -> Result<Self, TlsError> {
        let then = self.not_before.saturating_add(VALIDITY / 2);
        Self::new(issuer, key, then)
    }

    fn from(
        issuer: &KeyPair,
        key: &Arc<dyn SigningKey>,
        not_before: i64,
    ) -> Result<Self, TlsError> {
        let not_after = not_before.saturating_add(VALIDITY);
        let mut params = CertificateParams::new(SUBJECT_NAMES.map(str::to_owned))?;
        params.not_before = OffsetDateTime::from_unix_timestamp(not_before)?;
        params.not_after = OffsetDateTime::from_unix_timestamp(not_after)?;
        params
            .distinguished_name
            .push(DnType::CommonName, SUBJECT_NAMES[0]);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.self_signed(issuer)?;
        Ok(Self {
            pem: certificate.pem(),
            certificate: Arc::new(CertifiedKey::new(vec![certificate.into()], key.clone())),
            not_before,
            not_after,
        })
    }

    pub(crate) fn is_stale(&self, now: i64) -> bool {
        now < self.not_before || self.not_after.saturating_sub(now) < VALIDITY / 2
    }

    /// The hash that a browser compares.
    pub(crate) fn hash(&self) -> [u8; 32] {
        self.certificate
            .end_entity_cert()
            .map(hash_of)
            .unwrap_or_default()
    }

    /// Parses a certificate from a file; `None` if it is not for this key.
    fn parse(text: &str, issuer: &KeyPair, key: &Arc<dyn SigningKey>) -> Option<Self> {
        let (not_before, pem) = text.split_once('\n')?;
        let not_before: i64 = not_before.trim().parse().ok()?;
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
        let of = ParsedCertificate::try_from(&der).ok()?;
        let ours = issuer.subject_public_key_info();
        (*of.subject_public_key_info() == *ours).then(|| Self {
            certificate: Arc::new(CertifiedKey::new(vec![der], key.clone())),
            pem: pem.to_owned(),
            not_before,
            not_after: not_before.saturating_add(VALIDITY),
        })
    }
}

/// The seconds since 1970 between which a certificate of X.509 is valid; `None` if the bytes are not a certificate.
pub(crate) fn dates(certificate: &[u8]) -> Option<(i64, i64)> {
    let (SEQUENCE, mut outer) = element(&mut &*certificate)? else {
        return None;
    };
    let (SEQUENCE, mut fields) = element(&mut outer)? else {
        return None;
    };
    // The version may be missing; before the dates stand the serial number, the algorithm and the issuer.
    if element(&mut { fields })?.0 == VERSION {
        element(&mut fields)?;
    }
    for _ in 0..3 {
        element(&mut fields)?;
    }
    let (SEQUENCE, mut dates) = element(&mut fields)? else {
        return None;
    };
    Some((date(element(&mut dates)?)?, date(element(&mut dates)?)?))
}

const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// Takes one element of DER from the front: its tag and its content.
fn element<'a>(rest: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (&[tag, first], mut behind) = rest.split_first_chunk::<2>()?;
    let length = match first {
        0..=0x7f => usize::from(first),
        0x81..=0x83 => {
            let (bytes, after) = behind.split_at_checked(usize::from(first & 0x7f))?;
            behind = after;
            bytes
                .iter()
                .fold(0, |length, byte| length << 8 | usize::from(*byte))
        }
        _ => return None,
    };
    let (content, after) = behind.split_at_checked(length)?;
    *rest = after;
    Some((tag, content))
}

/// The seconds since 1970 of a time of DER, which is `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`.
fn date((tag, text): (u8, &[u8])) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = match tag {
        UTC_TIME => {
            let (year, rest) = text.split_at_checked(2)?;
            let year: i32 = year.parse().ok()?;
            (year + if year < 50 { 2000 } else { 1900 }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = text.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    let part = |at: usize| rest.get(at..at + 2)?.parse::<u8>().ok();
    let month = time::Month::try_from(part(0)?).ok()?;
    let date = time::Date::from_calendar_date(year, month, part(2)?).ok()?;
    let time = date.with_hms(part(4)?, part(6)?, part(8)?).ok()?;
    Some(time.assume_utc().unix_timestamp())
}

/// SHA-256 of a certificate's DER.
pub(crate) fn hash_of(certificate: &CertificateDer<'_>) -> [u8; 32] {
    let hash = digest::digest(&digest::SHA256, certificate);
    <[u8; 32]>::try_from(hash.as_ref()).unwrap_or_default()
}

/// The file that keeps the current certificate and the next.
pub(crate) struct Kept {
    path: PathBuf,
    version: Option<Version>,
}

impl Kept {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self {
            path,
            version: None,
        }
    }

    /// The certificates in the file, if the file exists and they are for this key.
    pub(crate) fn read(
        &mut self,
        issuer: &KeyPair,
        key: &Arc<dyn SigningKey>,
    ) -> Result<Option<(Issued, Issued)>, SecretFileError> {
        let (text, version) = match secret_file::read(&self.path, MAX_FILE) {
            Ok(read) => read,
            Err(error) if error.is_missing() => return Ok(None),
            Err(error) => return Err(error),
        };
        self.version = Some(version);
        let text = String::from_utf8_lossy(&text);
        let mut parts = text.split(MARK).skip(1);
        let mut next = || Issued::parse(parts.next()?, issuer, key);
        Ok(next().zip(next()))
    }

    /// Writes both certificates to the file, unless another process has just written it.
    pub(crate) fn write(&mut self, current: &Issued, next: &Issued) -> Result<(), SecretFileError> {
        let one = |issued: &Issued| format!("{MARK}{}\n{}", issued.not_before, issued.pem);
        let text = format!("{TITLE}{}{}", one(current), one(next));
        let written = match self.version {
            None => secret_file::create(&self.path, text.as_bytes())?,
            Some(version) => secret_file::replace(&self.path, text.as_bytes(), version)?,
        };
        if written {
            let (_, version) = secret_file::read(&self.path, MAX_FILE)?;
            self.version = Some(version);
        }
        Ok(())
    }
}

/// The first line of the file.
const TITLE: &str =
    "Certificates for browsers: the current one, then the next. Renewed by the server.\n";
/// The text before the time from which a certificate is valid, in seconds since 1970.
const MARK: &str = "valid from ";
const MAX_FILE: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::tls::signing_key;

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn a_certificate_lives_at_most_13_days() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let signer = signing_key(&key).unwrap();
        let issued = Issued::new(&key, &signer, NOW).unwrap();
        assert_eq!(issued.not_before, NOW - 3600);
        assert_eq!(issued.not_after - issued.not_before, 13 * 24 * 3600);
        issued.certificate.keys_match().unwrap();
    }

    #[test]
    fn the_dates_of_a_certificate_can_be_read() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let signer = signing_key(&key).unwrap();
        // The latter is after 2049, when the form of dates changes.
        for now in [NOW, 2_600_000_000, 800_000_000] {
            let issued = Issued::new(&key, &signer, now).unwrap();
            let der = issued.certificate.end_entity_cert().unwrap();
            assert_eq!(dates(der), Some((issued.not_before, issued.not_after)));
            for cut in 0..der.len().min(200) {
                assert_eq!(dates(&der[..cut]), None, "{cut}");
            }
            // Whatever is wrong with it, it is read to an end.
            for at in 0..200 {
                let mut other = der.to_vec();
                other[at] ^= 0x81;
                dates(&other);
            }
        }
    }

    #[test]
    fn the_next_one_is_valid_an_hour_before_its_turn() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let signer = signing_key(&key).unwrap();
        let issued = Issued::new(&key, &signer, NOW).unwrap();
        let next = issued.next(&key, &signer).unwrap();
        let turn = issued.not_before + VALIDITY / 2 + 1;
        assert!(issued.is_stale(turn) && !issued.is_stale(turn - 1));
        assert_eq!(next.not_before, turn - 1 - BACKDATE);
        assert!(!next.is_stale(turn));
    }
}
