//! Whatever name is accepted stays below any root it is joined to, on every system, and is kept
//! word for word.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::{Corpus, fuzz_target};
use udpack_fuzz::{assert_printable, within};
use udpack_transfer::RelPath;

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
    assert_eq!(path.as_str(), text);
    assert_eq!(path.to_string().parse(), Ok(path.clone()));

    assert!(text.len() <= RelPath::MAX_BYTES);
    assert!(!text.contains(['\\', ':']));
    assert!(!text.chars().any(char::is_control));

    let root = Path::new("/root");
    let joined = root.join(text);
    let below = joined.strip_prefix(root).expect("it stays below");
    assert!(
        below
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
    );
    assert!(
        below
            .components()
            .map(|part| part.as_os_str())
            .eq(path.components())
    );

    assert!((1..=RelPath::MAX_COMPONENTS).contains(&path.components().count()));
    for name in path.components() {
        assert!((1..=RelPath::MAX_COMPONENT_BYTES).contains(&name.len()));
        assert!(!name.starts_with(['.', '-']) && !name.ends_with('.'));
        assert_eq!(name.trim(), name);
    }
    assert!(
        path.parents()
            .chain([path.file_name()])
            .eq(path.components())
    );
}
