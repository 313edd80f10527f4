//! Whatever name is accepted stays below any root it is joined to.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::{Corpus, fuzz_target};
use udpack_fuzz::{assert_printable, within};
use udpack_transfer::{RelPath, names};

fuzz_target!(|input: &[u8]| -> Corpus {
    let Ok(text) = std::str::from_utf8(input) else {
        return Corpus::Reject;
    };
    within(8192 + 64 * text.len().min(4096), || check(text));
    Corpus::Keep
});

fn check(text: &str) {
    let path = match text.parse::<RelPath>() {
        Ok(path) => path,
        Err(error) => return assert_printable(&error.to_string()),
    };
    // Names are bytes: whatever the text stands for, joined to a root it stays below.
    let name = names::os(path.as_str()).into_owned();
    assert!(!name.as_encoded_bytes().contains(&0));
    let root = Path::new("/root");
    let joined = root.join(&name);
    let below = joined.strip_prefix(root).expect("it stays below");
    assert!(below.components().count() > 0);
    assert!(
        below
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
    );
}
