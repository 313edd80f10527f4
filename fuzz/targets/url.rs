//! The lines people paste: a URL, a fingerprint, a public key. What is read and printed again
//! means the same, and only the URL's own text ever shows its token.
#![no_main]

use std::net::Ipv6Addr;

use libfuzzer_sys::{Corpus, fuzz_target};
use udpack::{ConnectUrl, Fingerprint};
use udpack_fuzz::{assert_printable, within};

fuzz_target!(|input: &[u8]| -> Corpus {
    let Ok(text) = std::str::from_utf8(input) else {
        return Corpus::Reject;
    };
    within(16 * 1024 + 16 * text.len(), || {
        check_url(text);
        check_fingerprint(text);
    });
    Corpus::Keep
});

fn check_url(text: &str) {
    let url = match text.parse::<ConnectUrl>() {
        Ok(url) => url,
        Err(error) => {
            assert_printable(&error.to_string());
            assert_printable(&format!("{error:?}"));
            return;
        }
    };
    let line = url.to_string();
    assert_eq!(line.parse::<ConnectUrl>().expect("its own text"), url);
    assert_eq!(
        line.parse::<ConnectUrl>()
            .expect("its own text")
            .to_string(),
        line
    );
    assert_ne!(url.port(), 0);
    assert!(!url.host().is_empty());
    let plain = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"/@#?%[]".contains(&byte))
    };
    match url.host().split_once('%') {
        Some((address, zone)) => {
            let address: Ipv6Addr = address.parse().expect("only IPv6 addresses have a zone");
            assert!(address.is_unicast_link_local());
            assert!(!zone.is_empty() && plain(zone));
        }
        None => assert!(plain(url.host())),
    }

    let rebuilt = ConnectUrl::new(url.host(), url.port()).expect("its own parts");
    let rebuilt = match url.token() {
        Some(token) => rebuilt.with_token(token).expect("its own token"),
        None => rebuilt,
    };
    let rebuilt = match url.pin() {
        Some(pin) => rebuilt.with_pin(pin),
        None => rebuilt,
    };
    assert_eq!(rebuilt, url);

    let hidden = format!("{url:?}");
    match url.token() {
        Some(token) => assert_eq!(hidden, line.replacen(&format!("{token}@"), "***@", 1)),
        None => assert_eq!(hidden, line),
    }
}

fn check_fingerprint(text: &str) {
    if let Err(error) = Fingerprint::of_public_key_pem(text) {
        assert_printable(&error.to_string());
    }
    match text.parse::<Fingerprint>() {
        Ok(fingerprint) => {
            assert_eq!(
                fingerprint.to_string().parse::<Fingerprint>().ok(),
                Some(fingerprint)
            );
        }
        Err(error) => assert_printable(&error.to_string()),
    }
}
