//! Makes text from a peer safe to print: decides which characters a terminal or a log receives unescaped.
//!
//! Names, reasons and messages come from the other side. Printed as they are they could move the cursor, change
//! colours and titles, reorder what stands beside them, or hide in it. Code that prints such text passes it through
//! [`printable`]; JSON goes through a writer that asks [`is_printable`].

use std::borrow::Cow;

/// The mark where text was cut.
const CUT: char = '…';

/// Whether this character can be printed unescaped: it is visible and does not change how others are displayed.
///
/// Not so are control characters (C0, DEL, C1), line and paragraph separators, bidirectional controls, zero-width
/// characters, fillers, tags and noncharacters. Variation selectors are: ordinary emoji and Japanese names carry them.
#[inline]
pub fn is_printable(c: char) -> bool {
    matches!(c, ' '..='~') || !(c.is_control() || is_invisible(c))
}

fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e00ff}'
    ) || matches!(u32::from(c), 0xfdd0..=0xfdef)
        || u32::from(c) & 0xfffe == 0xfffe
}

/// The text with everything escaped that is not [printable](is_printable): `\n`, `\u{1b}`.
///
/// The result has one line and any length.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_printable) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        push(&mut out, c);
    }
    Cow::Owned(out)
}

/// As [`printable`], cut to at most `limit` bytes; `…` marks the cut.
pub fn printable_within(text: &str, limit: usize) -> String {
    let mut out = String::with_capacity(text.len().min(limit));
    // The longest prefix that leaves room for the mark.
    let mut whole = 0;
    for c in text.chars() {
        push(&mut out, c);
        if out.len() > limit {
            out.truncate(whole);
            if limit >= CUT.len_utf8() {
                out.push(CUT);
            }
            return out;
        }
        if out.len() + CUT.len_utf8() <= limit {
            whole = out.len();
        }
    }
    out
}

/// As [`printable`], for names that need not be UTF-8: a byte that is not UTF-8 is shown as `\xff`, so that different
/// names look different.
pub fn printable_bytes(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return printable(text);
    }
    let mut out = String::with_capacity(bytes.len() + 8);
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            push(&mut out, c);
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    Cow::Owned(out)
}

fn push(out: &mut String, c: char) {
    if is_printable(c) {
        out.push(c);
    } else if matches!(c, '\n' | '\r' | '\t') {
        out.extend(c.escape_default());
    } else {
        out.extend(c.escape_unicode());
    }
}

/// The longest prefix of `text` with at most `limit` bytes.
pub(crate) fn cut(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each kind that could move the cursor, reorder or hide.
    const HARMFUL: &[char] = &[
        '\0',
        '\u{7}',
        '\u{8}',
        '\n',
        '\r',
        '\u{1b}',
        '\u{7f}',
        '\u{80}',
        '\u{85}',
        '\u{9b}',
        '\u{9d}',
        '\u{9f}',
        '\u{ad}',
        '\u{61c}',
        '\u{200b}',
        '\u{200d}',
        '\u{200e}',
        '\u{2028}',
        '\u{2029}',
        '\u{202a}',
        '\u{202e}',
        '\u{2060}',
        '\u{2066}',
        '\u{2069}',
        '\u{feff}',
        '\u{fffe}',
        '\u{e0041}',
    ];

    #[test]
    fn what_moves_the_cursor_reorders_or_hides_is_escaped() {
        for &c in HARMFUL {
            let shown = printable(&format!("a{c}b")).into_owned();
            assert!(
                shown.bytes().all(|byte| matches!(byte, b' '..=b'~')),
                "{:04x}: {shown:?}",
                u32::from(c)
            );
            assert!(shown.starts_with("a\\") && shown.ends_with('b'), "{shown}");
        }
        assert_eq!(
            printable("a\u{1b}[2Jb\nc\u{202e}\u{9b}31m\u{7f}"),
            "a\\u{1b}[2Jb\\nc\\u{202e}\\u{9b}31m\\u{7f}"
        );
    }

    #[test]
    fn what_is_seen_stays_as_it_is() {
        for text in ["", "photo 1.jpg", "grüße", "写真", "❤\u{fe0f}", "a\\b\"c"] {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text));
            assert_eq!(printable_within(text, 64), text);
        }
    }

    #[test]
    fn cut_text_keeps_to_its_limit_and_says_that_it_is_cut() {
        for text in ["é".repeat(1000), "\u{202e}".repeat(1000), "a".repeat(1000)] {
            for limit in [3, 4, 10, 128, 256] {
                let short = printable_within(&text, limit);
                assert!(short.len() <= limit, "{limit}: {short}");
                assert!(short.ends_with(CUT), "{limit}: {short}");
            }
        }
        assert_eq!(printable_within(&"a".repeat(256), 256), "a".repeat(256));
        assert_eq!(printable_within("abcd", 3), "…");
    }

    #[test]
    fn names_that_differ_only_in_bad_bytes_look_different() {
        assert_eq!(printable_bytes(b"caf\xe9.txt"), "caf\\xe9.txt");
        assert_eq!(printable_bytes(b"caf\xe8\n.txt"), "caf\\xe8\\n.txt");
        assert_eq!(printable_bytes("café".as_bytes()), "café");
        assert_eq!(printable_bytes(b"\xc2\x9b31m"), "\\u{9b}31m");
    }
}
