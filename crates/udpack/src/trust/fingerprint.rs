//! Fingerprints of server keys: the SHA-256 of a key's SubjectPublicKeyInfo.
//!
//! A client that knows the fingerprint needs no certificate authority, no host name and no correct clock. The
//! certificate around the key may change; the fingerprint does not. This module does not decide whether to trust a
//! key; the TLS configuration of a client does.

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject;

/// The SHA-256 of a public key in its SubjectPublicKeyInfo form.
///
/// Displays as `sha256:` and 64 lower-case hex digits. Parses from that, from the bare digits, in
/// either case, and from the 32 byte pairs separated by colons that other tools print.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Returns the fingerprint of the first public key in `pem`.
    ///
    /// # Errors
    ///
    /// When `pem` holds no `PUBLIC KEY` section, or one that is not a SubjectPublicKeyInfo.
    pub fn of_public_key_pem(pem: &str) -> Result<Self, FingerprintError> {
        let spki = SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| FingerprintError::NoPublicKey)?;
        if !looks_like_spki(&spki) {
            return Err(FingerprintError::NoPublicKey);
        }
        Ok(Self::of_spki(&spki))
    }

    /// Returns the fingerprint of the public key in the PEM file at `path`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or holds no public key; the error names the path.
    pub fn from_public_key_file(path: impl AsRef<Path>) -> Result<Self, FingerprintError> {
        let path = path.as_ref();
        let mut pem = Vec::new();
        let read = std::fs::File::open(path)
            .and_then(|file| file.take(MAX_PUBLIC_KEY_FILE).read_to_end(&mut pem));
        if let Err(source) = read {
            return Err(FingerprintError::Read {
                path: path.to_owned(),
                source,
            });
        }
        Self::of_public_key_pem(&String::from_utf8_lossy(&pem)).map_err(|_| {
            FingerprintError::NoPublicKeyInFile {
                path: path.to_owned(),
            }
        })
    }

    /// Returns the 32 bytes of the digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn of_spki(der: &[u8]) -> Self {
        Self(sha256(der))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = match text.get(..PREFIX.len()) {
            Some(start) if start.eq_ignore_ascii_case(PREFIX) => &text[PREFIX.len()..],
            _ => text,
        };
        decode_hex(digits.as_bytes())
            .or_else(|| decode_colon_hex(digits.as_bytes()))
            .map(Self)
            .ok_or(FingerprintError::Form)
    }
}

/// Why a fingerprint could not be read or computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FingerprintError {
    /// The text is not a fingerprint.
    #[error(
        "not a key fingerprint: expected sha256: and 64 hex digits, \
         with or without colons between the byte pairs"
    )]
    Form,
    /// The text holds no public key.
    #[error("no public key: expected PEM that begins -----BEGIN PUBLIC KEY-----")]
    NoPublicKey,
    /// The file holds no public key.
    #[error("no public key in {}: expected PEM that begins -----BEGIN PUBLIC KEY-----", path.display())]
    NoPublicKeyInFile {
        /// The file that was read.
        path: PathBuf,
    },
    /// The file could not be read.
    #[error("cannot read the public key {}", path.display())]
    Read {
        /// The file that was asked for.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Returns the SHA-256 of `data`.
pub(crate) fn sha256(data: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, data);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}

/// Reads exactly 64 hex digits of either case.
pub(crate) fn decode_hex(digits: &[u8]) -> Option<[u8; 32]> {
    let (pairs, rest) = digits.as_chunks::<2>();
    if pairs.len() != 32 || !rest.is_empty() {
        return None;
    }
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(pairs) {
        *byte = hex_pair(*pair)?;
    }
    Some(out)
}

/// Reads exactly 32 pairs of hex digits with one colon between neighbours.
fn decode_colon_hex(digits: &[u8]) -> Option<[u8; 32]> {
    let mut pairs = digits.split(|byte| *byte == b':');
    let mut out = [0; 32];
    for byte in &mut out {
        *byte = hex_pair(pairs.next()?.try_into().ok()?)?;
    }
    pairs.next().is_none().then_some(out)
}

fn hex_pair([high, low]: [u8; 2]) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    u8::try_from(digit(high)? << 4 | digit(low)?).ok()
}

/// Distinguishes an SPKI from other DER: a SEQUENCE that fills the input, opening with another SEQUENCE.
fn looks_like_spki(der: &[u8]) -> bool {
    let body = match der {
        [0x30, len @ 0..=0x7f, body @ ..] if body.len() == usize::from(*len) => body,
        [0x30, 0x81, len, body @ ..] if body.len() == usize::from(*len) => body,
        [0x30, 0x82, high, low, body @ ..]
            if body.len() == usize::from(u16::from_be_bytes([*high, *low])) =>
        {
            body
        }
        _ => return false,
    };
    body.first() == Some(&0x30)
}

const PREFIX: &str = "sha256:";
const MAX_PUBLIC_KEY_FILE: u64 = 64 * 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Made with `openssl pkey -pubout`; its digest with `openssl pkey -pubin -outform DER | sha256sum`.
    const PUBLIC_KEY: &str = "-----BEGIN PUBLIC KEY-----\n\
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEOd1eSJVX+bo07PlqhSxo3Exk3qAX\n\
LUqOn27eHZ/+A7kTnb2DLmb6mJvgWg2EhBsmazOuTMj/k2JaQM0RgCatSQ==\n\
-----END PUBLIC KEY-----\n";
    const DIGEST: &str = "5ed0a8b476e6d7fe0f60dd816d026e64f48b63e180b71ca8d7be5e13fab23d4b";

    #[test]
    fn agrees_with_openssl_about_the_digest_of_a_public_key() {
        let fingerprint = Fingerprint::of_public_key_pem(PUBLIC_KEY).unwrap();
        assert_eq!(fingerprint.to_string(), format!("sha256:{DIGEST}"));
        assert_eq!(format!("{fingerprint:?}"), fingerprint.to_string());
    }

    #[test]
    fn accepts_every_form_other_tools_print() {
        let colons: Vec<&str> = (0..32).map(|i| &DIGEST[2 * i..2 * i + 2]).collect();
        let colons = colons.join(":");
        let expected: Fingerprint = format!("sha256:{DIGEST}").parse().unwrap();
        for form in [
            DIGEST.to_owned(),
            DIGEST.to_uppercase(),
            format!("sha256:{}", DIGEST.to_uppercase()),
            format!("SHA256:{DIGEST}"),
            colons.clone(),
            colons.to_uppercase(),
            format!("sha256:{colons}"),
        ] {
            assert_eq!(form.parse::<Fingerprint>().unwrap(), expected, "{form}");
        }
    }

    #[test]
    fn refuses_other_forms_and_names_the_expected_one() {
        let long = format!("{DIGEST}0");
        let trailing_colon = (0..32).map(|i| format!("{}:", &DIGEST[2 * i..2 * i + 2]));
        let trailing_colon: String = trailing_colon.collect();
        let mixed = format!("{}:{}", &DIGEST[..32], &DIGEST[32..]);
        let sign = format!("+{}", &DIGEST[1..]);
        for bad in [
            "",
            "sha256:",
            "sha256:sha256:",
            &DIGEST[1..],
            &long,
            &trailing_colon,
            &mixed,
            &sign,
            "sha1:aa",
            "é",
            "sha256é",
            &format!(" {DIGEST}"),
            &"g".repeat(64),
        ] {
            let error = bad.parse::<Fingerprint>().unwrap_err();
            assert!(error.to_string().contains("sha256: and 64 hex digits"));
        }
    }

    #[test]
    fn refuses_what_is_no_public_key() {
        for bad in [
            "",
            "garbage",
            "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
            "-----BEGIN PUBLIC KEY-----\n",
            &PUBLIC_KEY.replace("PUBLIC", "PRIVATE"),
        ] {
            Fingerprint::of_public_key_pem(bad).unwrap_err();
        }
    }

    #[test]
    fn names_the_file_that_holds_no_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pubkey.pem");
        let missing = Fingerprint::from_public_key_file(&path).unwrap_err();
        assert!(missing.to_string().contains("pubkey.pem"));
        std::fs::write(&path, "nothing").unwrap();
        let empty = Fingerprint::from_public_key_file(&path).unwrap_err();
        assert!(empty.to_string().contains("pubkey.pem"));
        std::fs::write(&path, PUBLIC_KEY).unwrap();
        Fingerprint::from_public_key_file(&path).unwrap();
    }

    proptest! {
        #[test]
        fn any_digest_survives_its_text(bytes: [u8; 32]) {
            let fingerprint = Fingerprint(bytes);
            prop_assert_eq!(fingerprint.to_string().parse::<Fingerprint>().unwrap(), fingerprint);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = text.parse::<Fingerprint>();
            let _ = Fingerprint::of_public_key_pem(&text);
        }

        #[test]
        fn nearly_right_text_parses_or_is_refused(text in "(sha256:)?[0-9a-fA-F:]{60,100}") {
            let _ = text.parse::<Fingerprint>();
        }
    }
}
