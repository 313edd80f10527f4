//! Names that are written so that every file system holds them: each comes back as it was, none meets another, and whatever is
//! found as a name can be read.
//!
//! Input: names, with a slash between them; empty ones are passed over.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use udpack_transfer::{Mapping, RelPath, escape_name, names, unescape_name};

fuzz_target!(|input: &[u8]| {
    let mut mapping = Mapping::new(true);
    let mut exact = Mapping::new(false);
    let mut seen = BTreeSet::new();
    let all: BTreeSet<&[u8]> = input
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && !name.contains(&0) && !matches!(*name, b"." | b".."))
        .take(32)
        .collect();
    for name in all {
        let name = names::from_bytes(name);
        let read = unescape_name(&name);
        assert!(!read.is_empty() && !read.contains(['/', '\0']));
        assert_eq!(unescape_name(&escape_name(&read)), read);
        assert_eq!(exact.path(&name), escape_name(&name));

        let written = mapping.path(&name);
        assert_eq!(unescape_name(&written), *name);
        assert_eq!(mapping.path(&name), written, "it moves");
        // At least what folds ASCII takes no two for one.
        assert!(
            seen.insert(written.to_ascii_lowercase()),
            "{written} meets another"
        );
        assert!(!written.ends_with(['.', ' ']));
        assert!(!written.contains(|c: char| c.is_control() || r#"<>:"\|?*"#.contains(c)));
        assert!(!names::holds_bytes(&written), "it is not UTF-8");
        // What is too long is refused as any other name is.
        assert_eq!(written.parse::<RelPath>().is_ok(), written.len() <= 255);
    }
});
