//! Names for file systems that cannot hold every name, or hold two names as one.
//!
//! What such a system may not hold is written as `%` and two hexadecimal digits for each of its bytes, and so is each `%`. So
//! what was written tells the name, and nothing has to be remembered for the way back. Of names that a system takes for one,
//! such as `a` and `A`, the later ones have as many of their first characters written so as it takes to tell them apart.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use unicode_normalization::{UnicodeNormalization as _, is_nfc};

use super::names;
use super::path::is_reserved;

/// Writes one name, in its [text form](super::names), so that every common file system holds it: without characters and names that
/// Windows reserves, control characters, bytes that are not UTF-8, and characters that would be normalised; without a dot or
/// a space at its end. The result may be too long for a name.
pub fn escape_name(name: &str) -> String {
    escape(name, 0)
}

/// The name that was [written](escape_name) so. A `%` that is followed by anything but two hexadecimal digits stands for itself, as do
/// those that would make a NUL or a slash.
pub fn unescape_name(written: &str) -> String {
    if !written.contains('%') {
        return written.to_owned();
    }
    let written = names::bytes(written);
    let mut name = Vec::with_capacity(written.len());
    let mut rest = &*written;
    while let Some((first, behind)) = rest.split_first() {
        let byte = match behind {
            [high, low, ..] if *first == b'%' => digit(*high)
                .zip(digit(*low))
                .map(|(high, low)| (high << 4) | low)
                .filter(|byte| ![0, b'/'].contains(byte)),
            _ => None,
        };
        name.push(byte.unwrap_or(*first));
        rest = match byte {
            Some(_) => behind.get(2..).unwrap_or_default(),
            None => behind,
        };
    }
    names::from_bytes(&name).into_owned()
}

fn digit(digit: u8) -> Option<u8> {
    let value = char::from(digit).to_digit(16)?;
    u8::try_from(value).ok()
}

/// Writes a name, with its first `more` characters escaped whatever they are.
fn escape(name: &str, more: usize) -> String {
    let bytes = names::bytes(name);
    let moves = std::str::from_utf8(&bytes).is_ok_and(|text| !is_nfc(text));
    let device = usize::from(is_reserved(name));
    let mut written = String::with_capacity(bytes.len());
    let (mut at, end) = (0, bytes.len());
    let mut count = 0;
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            at += c.len_utf8();
            let unfit = c.is_control()
                || names::holds_bytes(c.encode_utf8(&mut [0; 4]))
                || r#"<>:"\|?*%"#.contains(c)
                || (moves && !c.is_ascii())
                || (at == end && (c == '.' || c == ' '));
            if unfit || count < more.max(device) {
                push(&mut written, c.encode_utf8(&mut [0; 4]).as_bytes());
            } else {
                written.push(c);
            }
            count += 1;
        }
        at += chunk.invalid().len();
        push(&mut written, chunk.invalid());
    }
    written
}

fn push(written: &mut String, bytes: &[u8]) {
    for byte in bytes {
        let _ = write!(written, "%{byte:02X}");
    }
}

/// What a name is at a file system that folds cases and normalises. At least what such a system takes for one is one.
fn folded(written: &str) -> String {
    let upper: String = written.nfd().flat_map(char::to_uppercase).collect();
    let lower: String = upper.chars().flat_map(char::to_lowercase).collect();
    lower.nfd().collect()
}

/// The names of a tree at a file system that cannot hold all of them. Where that takes some for one, it keeps all
/// names that it was asked for.
#[derive(Debug, Default)]
pub struct Mapping {
    folds: bool,
    /// By the path of the directory before it was written.
    dirs: HashMap<String, Dir>,
}

#[derive(Debug, Default)]
struct Dir {
    written: HashMap<String, String>,
    folded: HashSet<String>,
}

impl Mapping {
    /// For a file system that holds `a` and `A` as one name, or as two.
    pub fn new(folds: bool) -> Self {
        Self {
            folds,
            dirs: HashMap::new(),
        }
    }

    /// The path, of names in their [text form](super::names), under which this one is written; the same whenever it is asked for.
    pub fn path(&mut self, path: &str) -> String {
        let mut written = String::with_capacity(path.len());
        let mut dir = 0;
        for name in path.split('/') {
            if !written.is_empty() {
                written.push('/');
            }
            if self.folds {
                let above = path.get(..dir).unwrap_or_default();
                written.push_str(self.in_dir(above, name));
            } else {
                written.push_str(&escape(name, 0));
            }
            dir += name.len() + 1;
        }
        written
    }

    fn in_dir(&mut self, dir: &str, name: &str) -> &str {
        let dir = self.dirs.entry(dir.to_owned()).or_default();
        dir.written.entry(name.to_owned()).or_insert_with(|| {
            // With every character escaped it is one of its own: what is written has digits and capitals alone.
            let mut written = String::new();
            for more in 0..=name.len() {
                written = escape(name, more);
                if dir.folded.insert(folded(&written)) {
                    break;
                }
            }
            written
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn raw(bytes: &[u8]) -> String {
        names::from_bytes(bytes).into_owned()
    }

    #[test]
    fn what_no_system_holds_is_escaped_and_the_rest_stays() {
        for (name, written) in [
            ("plain name.txt", "plain name.txt"),
            (".hidden", ".hidden"),
            ("100 %", "100 %25"),
            ("%41", "%2541"),
            ("a:b?c*", "a%3Ab%3Fc%2A"),
            ("<\"\\|>", "%3C%22%5C%7C%3E"),
            ("end.", "end%2E"),
            ("end ", "end%20"),
            ("...", "..%2E"),
            ("line\nbreak\u{7f}\u{85}", "line%0Abreak%7F%C2%85"),
            ("con", "%63on"),
            ("Aux.txt", "%41ux.txt"),
            ("console", "console"),
            ("com1", "%63om1"),
            ("caf\u{e9}", "caf\u{e9}"),
            ("cafe\u{301}", "cafe%CC%81"),
            ("東京", "東京"),
        ] {
            assert_eq!(escape_name(name), written);
            assert_eq!(unescape_name(written), name);
        }
        let odd = raw(b"odd\xff\xfe name");
        assert_eq!(escape_name(&odd), "odd%FF%FE name");
        assert_eq!(unescape_name("odd%FF%FE name"), odd);
    }

    #[test]
    fn what_was_never_written_so_stands_for_itself() {
        for name in ["%", "%4", "%zz", "a%", "%2F", "%2f", "%00", "%+1", "% 1"] {
            assert_eq!(unescape_name(name), name);
        }
        assert_eq!(unescape_name("%2e%2E"), "..");
        assert_eq!(unescape_name("%E6%9D%B1"), "東");
    }

    #[test]
    fn names_that_a_system_takes_for_one_are_told_apart() {
        let mut mapping = Mapping::new(true);
        let mut at = |path: &str| mapping.path(path);
        assert_eq!(at("d/README"), "d/README");
        assert_eq!(at("d/Readme"), "d/%52eadme");
        assert_eq!(at("d/readme"), "d/%72eadme");
        assert_eq!(at("d/ReadMe"), "d/%52%65adMe");
        assert_eq!(at("d/Readme"), "d/%52eadme", "the same again");
        assert_eq!(at("e/Readme"), "e/Readme", "elsewhere");
        assert_eq!(at("D/x"), "%44/x", "directories, too");
        assert_eq!(at("d/x"), "d/x");
        assert_eq!(at("stra\u{df}e"), "stra\u{df}e");
        assert_eq!(at("STRASSE"), "%53TRASSE");
        let mut exact = Mapping::new(false);
        assert_eq!(exact.path("d/a"), "d/a");
        assert_eq!(exact.path("d/A:"), "d/A%3A");
    }

    /// Names that meet often.
    fn names_that_meet() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            Just(b"a".to_vec()),
            Just(b"A".to_vec()),
            Just(b"%".to_vec()),
            Just(b"61".to_vec()),
            Just(b"%61".to_vec()),
            Just(b".".to_vec()),
            Just(b" ".to_vec()),
            Just("\u{e9}".as_bytes().to_vec()),
            Just("e\u{301}".as_bytes().to_vec()),
            Just("\u{df}".as_bytes().to_vec()),
            Just(b"ss".to_vec()),
            Just(b"con".to_vec()),
            any::<u8>().prop_map(|byte| vec![byte]),
        ];
        prop::collection::vec(part, 1..5)
            .prop_map(|parts| parts.concat())
            .prop_filter("no name", |name| {
                !name.contains(&0) && !name.contains(&b'/') && name != b"." && name != b".."
            })
    }

    proptest! {
        #[test]
        fn every_name_comes_back_and_none_meets_another(
            all in prop::collection::hash_set(names_that_meet(), 1..12)
        ) {
            let mut mapping = Mapping::new(true);
            let mut seen = HashSet::new();
            for name in &all {
                let name = raw(name);
                let written = mapping.path(&name);
                prop_assert_eq!(&unescape_name(&written), &name);
                prop_assert_eq!(&unescape_name(&escape_name(&name)), &name);
                prop_assert!(seen.insert(folded(&written)), "{} meets another", written);
                prop_assert!(!written.ends_with(['.', ' ']));
                prop_assert!(!written.contains(|c: char| c.is_control()));
                prop_assert!(!is_reserved(&written));
                prop_assert!(!names::holds_bytes(&written));
                prop_assert_eq!(mapping.path(&name), written);
            }
        }

        #[test]
        fn whatever_is_read_is_a_name(written in names_that_meet()) {
            let name = unescape_name(&raw(&written));
            prop_assert!(!name.is_empty() && !name.contains(['/', '\0']));
            prop_assert_eq!(unescape_name(&escape_name(&name)), name);
        }
    }
}
