//! The only type through which a peer's name becomes a path.
//!
//! Names are bytes, as they are on Unix, and case-sensitive. A name is accepted word for word or refused with the
//! rule it breaks: nothing is decoded, trimmed, folded or repaired, so two sides can never disagree on what a name
//! means. Names that could leave the root or reach the store's own directory are refused, and names that no file can
//! have; the file system itself refuses names that it cannot hold. [`RelPath::check_portable`] has the stricter rules
//! for trees that must be portable to every system.
//!
//! This module does not use the file system. The store ensures that no symbolic link leads out of a root.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt;
use std::str::FromStr;

use udpack::text::is_printable;
use unicode_normalization::{UnicodeNormalization, is_nfc};

use crate::base::names;

/// A relative path, `/` between its components, that cannot leave the directory it is resolved in.
///
/// ```text
/// holiday/2024/beach.jpg   .git/config   a\\b        accepted
/// ../x   /x   a//b   a/.   .udpack/x                refused
/// ```
///
/// A `RelPath` is created only by parsing, so every value satisfies the rules. It is kept in its [text
/// form](crate::base::names): for the file system there is [`names::os`], and `Display` escapes control characters
/// and cuts long paths.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelPath(Box<str>);

impl RelPath {
    /// Longest path, in bytes: what one system call takes.
    pub const MAX_BYTES: usize = 4095;
    /// Longest component, in bytes: what common file systems hold.
    pub const MAX_COMPONENT_BYTES: usize = 255;
    /// Most components in a path: each takes a descriptor while a tree is listed or removed.
    pub const MAX_COMPONENTS: usize = 256;
    /// Longest path that is portable.
    pub const PORTABLE_BYTES: usize = 1024;
    /// Longest component that is portable; leaves room below the 255 of common file systems.
    pub const PORTABLE_COMPONENT_BYTES: usize = 200;
    /// Most components of a portable path.
    pub const PORTABLE_COMPONENTS: usize = 32;

    /// Converts a path of the operating system.
    ///
    /// # Errors
    /// As for parsing.
    pub fn from_os(path: &OsStr) -> Result<Self, PathError> {
        names::from_os(path).parse()
    }

    /// The [text form](crate::base::names), which is the path itself if that is UTF-8.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The bytes of the path.
    pub fn to_bytes(&self) -> Cow<'_, [u8]> {
        names::bytes(&self.0)
    }

    /// Checks the rules of portable names, which every operating system and tool can hold.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn check_portable(&self) -> Result<(), PathError> {
        check_portable(&self.0).map_err(|rule| PathError::new(rule, &self.0))
    }

    /// The components from the root down: at least one, none empty, none `.` or `..`.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &str> + Clone {
        self.0.split('/')
    }

    /// The last component.
    pub fn file_name(&self) -> &str {
        self.split().1
    }

    /// The components above the last; empty when the path is a bare name.
    pub fn parents(&self) -> impl DoubleEndedIterator<Item = &str> + Clone {
        self.split()
            .0
            .split('/')
            .filter(|component| !component.is_empty())
    }

    /// All above the last component; `None` when the path is a bare name.
    pub(crate) fn parent(&self) -> Option<&str> {
        self.0.rsplit_once('/').map(|(parent, _)| parent)
    }

    fn split(&self) -> (&str, &str) {
        self.0.rsplit_once('/').unwrap_or(("", &self.0))
    }
}

impl FromStr for RelPath {
    type Err = PathError;

    /// Parses a text form.
    fn from_str(path: &str) -> Result<Self, PathError> {
        // The same name has one form only.
        let name = names::bytes(path);
        let path = match &name {
            Cow::Borrowed(_) => Cow::Borrowed(path),
            Cow::Owned(name) => names::from_bytes(name),
        };
        check(&path, name.len()).map_err(|rule| PathError::new(rule, &path))?;
        Ok(Self(path.into()))
    }
}

impl TryFrom<&str> for RelPath {
    type Error = PathError;

    fn try_from(path: &str) -> Result<Self, PathError> {
        path.parse()
    }
}

impl From<RelPath> for String {
    fn from(path: RelPath) -> Self {
        path.0.into()
    }
}

impl AsRef<str> for RelPath {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&udpack::text::printable_within(
            &names::shown(&self.0),
            SHOWN,
        ))
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Why a path was refused: the broken rule, and the beginning of the path, safe to print.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad name \"{shown}\": {rule}{}", More(*got))]
pub struct PathError {
    rule: PathRule,
    shown: String,
    /// The actual number, if the rule is about a limit.
    got: Option<usize>,
}

impl PathError {
    /// The rule the path breaks; the first one found when there are several.
    pub fn rule(&self) -> PathRule {
        self.rule
    }

    fn new(rule: PathRule, path: &str) -> Self {
        let longest = |path: &str| path.split('/').map(|name| names::bytes(name).len()).max();
        Self {
            rule,
            shown: printable(path),
            got: match rule {
                PathRule::TooLong | PathRule::NotPortableLength => Some(names::bytes(path).len()),
                PathRule::ComponentTooLong | PathRule::NotPortableComponent => longest(path),
                PathRule::TooDeep | PathRule::NotPortableDepth => Some(path.split('/').count()),
                _ => None,
            },
        }
    }
}

/// The count, after the limit.
struct More(Option<usize>);

impl fmt::Display for More {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |got| write!(f, ", it has {got}"))
    }
}

/// The rules of paths, by their violations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum PathRule {
    /// The path is empty.
    #[error("it is empty")]
    Empty,
    /// The path begins with `/`.
    #[error("it begins with a slash")]
    Absolute,
    /// Two slashes in a row, or one at the end.
    #[error("a component is empty")]
    EmptyComponent,
    /// It holds a NUL, which no file system can hold.
    #[error("it holds a nul")]
    Nul,
    /// The first component is the directory that a store keeps for itself, in upper or lower case, or one of the
    /// files with which it tries the file system.
    #[error("it is the server's own: {OWN}")]
    Own,
    /// It holds bytes that are not UTF-8.
    #[error("it is not utf-8")]
    NotUtf8,
    /// A component is `.` or `..`, or for portable names would be after compatibility normalisation (NFKC).
    #[error("a component is `.` or `..`")]
    DotComponent,
    /// A component is made of dots and spaces alone, or would be after NFKC.
    #[error("a component holds nothing but dots and spaces")]
    OnlyDotsAndSpaces,
    /// A component holds `\`.
    #[error("it holds a backslash")]
    Backslash,
    /// A component holds `:` (drive letters, alternate streams).
    #[error("it holds a colon")]
    Colon,
    /// A component holds a C0 or C1 control character or DEL.
    #[error("it holds a control character")]
    Control,
    /// A component holds a bidirectional control, a zero-width or another character that cannot be
    /// seen.
    #[error("it holds an invisible character")]
    Invisible,
    /// A component begins with `.`.
    #[error("a component begins with a dot")]
    LeadingDot,
    /// A component begins with `-`, which commands would take for an option.
    #[error("a component begins with a hyphen")]
    LeadingHyphen,
    /// A component begins or ends with a space of any kind.
    #[error("a component begins or ends with a space")]
    OuterSpace,
    /// A component ends with `.`, which Windows drops.
    #[error("a component ends with a dot")]
    TrailingDot,
    /// A component is the name of a Windows device, alone or before an extension, as it stands or
    /// after NFKC.
    #[error("a component is a reserved device name")]
    Reserved,
    /// A component has more than [`RelPath::MAX_COMPONENT_BYTES`] bytes.
    #[error("a component may have {} bytes", RelPath::MAX_COMPONENT_BYTES)]
    ComponentTooLong,
    /// The path has more than [`RelPath::MAX_BYTES`] bytes.
    #[error("it may have {} bytes", RelPath::MAX_BYTES)]
    TooLong,
    /// The path has more than [`RelPath::MAX_COMPONENTS`] components.
    #[error("it may have {} components", RelPath::MAX_COMPONENTS)]
    TooDeep,
    /// A component has more than [`RelPath::PORTABLE_COMPONENT_BYTES`] bytes.
    #[error(
        "a component may have {} bytes here",
        RelPath::PORTABLE_COMPONENT_BYTES
    )]
    NotPortableComponent,
    /// The path has more than [`RelPath::PORTABLE_BYTES`] bytes.
    #[error("it may have {} bytes here", RelPath::PORTABLE_BYTES)]
    NotPortableLength,
    /// The path has more than [`RelPath::PORTABLE_COMPONENTS`] components.
    #[error("it may have {} components here", RelPath::PORTABLE_COMPONENTS)]
    NotPortableDepth,
    /// The path is not in Unicode normalisation form C.
    #[error("it is not in unicode normalisation form c")]
    NotNfc,
    /// A character becomes `/`, `\` or `:` after NFKC.
    #[error("it holds a character that stands for a separator")]
    SeparatorLookalike,
}

/// The beginning of a peer's text, escaped so that it can change neither a terminal nor a log.
pub(crate) fn printable(text: &str) -> String {
    udpack::text::printable_within(&names::shown(text), 128)
}

/// Longest path that is shown, in bytes: messages on the wire have a limit, and may hold two.
const SHOWN: usize = 256;

/// The name of a root's own directory, and the prefix of its own files beside it.
pub(crate) const OWN: &str = ".udpack";
const OWN_FILES: &str = ".udpack-probe-";

/// Whether the store reserves this name, in upper or lower case, because a file system may fold case.
fn is_own(first: &str) -> bool {
    first.eq_ignore_ascii_case(OWN)
        || first
            .get(..OWN_FILES.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(OWN_FILES))
}

/// Checks a text form whose name has `len` bytes.
fn check(path: &str, len: usize) -> Result<(), PathRule> {
    if path.is_empty() {
        return Err(PathRule::Empty);
    }
    if len > RelPath::MAX_BYTES {
        return Err(PathRule::TooLong);
    }
    if path.starts_with('/') {
        return Err(PathRule::Absolute);
    }
    if path.contains('\0') {
        return Err(PathRule::Nul);
    }
    let mut count = 0;
    for name in path.split('/') {
        count += 1;
        match name {
            "" => return Err(PathRule::EmptyComponent),
            "." | ".." => return Err(PathRule::DotComponent),
            name if count == 1 && is_own(name) => return Err(PathRule::Own),
            name if name.len() > RelPath::MAX_COMPONENT_BYTES
                && names::bytes(name).len() > RelPath::MAX_COMPONENT_BYTES =>
            {
                return Err(PathRule::ComponentTooLong);
            }
            _ => {}
        }
    }
    if count > RelPath::MAX_COMPONENTS {
        return Err(PathRule::TooDeep);
    }
    Ok(())
}

fn check_portable(path: &str) -> Result<(), PathRule> {
    let name = names::bytes(path);
    let Ok(path) = std::str::from_utf8(&name) else {
        return Err(PathRule::NotUtf8);
    };
    if path.len() > RelPath::PORTABLE_BYTES {
        return Err(PathRule::NotPortableLength);
    }
    if path.split('/').count() > RelPath::PORTABLE_COMPONENTS {
        return Err(PathRule::NotPortableDepth);
    }
    path.split('/').try_for_each(check_component)
}

/// The portable rules for one component.
fn check_component(name: &str) -> Result<(), PathRule> {
    if name.len() > RelPath::PORTABLE_COMPONENT_BYTES {
        return Err(PathRule::NotPortableComponent);
    }
    for c in name.chars() {
        match c {
            '\\' => return Err(PathRule::Backslash),
            ':' => return Err(PathRule::Colon),
            c if c.is_control() => return Err(PathRule::Control),
            c if !is_printable(c) => return Err(PathRule::Invisible),
            _ => {}
        }
    }
    check_special(name)?;
    if name.starts_with(char::is_whitespace) || name.ends_with(char::is_whitespace) {
        return Err(PathRule::OuterSpace);
    }
    if name.starts_with('.') {
        return Err(PathRule::LeadingDot);
    }
    if name.starts_with('-') {
        return Err(PathRule::LeadingHyphen);
    }
    if name.ends_with('.') {
        return Err(PathRule::TrailingDot);
    }
    if name.is_ascii() {
        return Ok(());
    }
    if !is_nfc(name) {
        return Err(PathRule::NotNfc);
    }
    // Other programs may normalise the name, so the normalised form must satisfy the rules, too.
    let folded: String = name.nfkc().collect();
    if folded.contains(['/', '\\', ':']) {
        return Err(PathRule::SeparatorLookalike);
    }
    check_special(&folded)
}

/// Refuses names with a special meaning on some system.
fn check_special(name: &str) -> Result<(), PathRule> {
    if name == "." || name == ".." {
        return Err(PathRule::DotComponent);
    }
    if name.chars().all(|c| c == '.' || c.is_whitespace()) {
        return Err(PathRule::OnlyDotsAndSpaces);
    }
    if is_reserved(name) {
        return Err(PathRule::Reserved);
    }
    Ok(())
}

/// Whether the name is a device on Windows. Superscript digits are digits after NFKC, so they need no case of their
/// own.
pub(super) fn is_reserved(name: &str) -> bool {
    let stem = name.split_once('.').map_or(name, |(stem, _)| stem).trim();
    if RESERVED
        .iter()
        .any(|reserved| stem.eq_ignore_ascii_case(reserved))
    {
        return true;
    }
    let Some((port, digit)) = stem.split_at_checked(3) else {
        return false;
    };
    (port.eq_ignore_ascii_case("com") || port.eq_ignore_ascii_case("lpt"))
        && matches!(
            digit,
            "1" | "2" | "3" | "4" | "5" | "6" | "7" | "8" | "9" | "¹" | "²" | "³"
        )
}

const RESERVED: [&str; 6] = ["con", "prn", "aux", "nul", "conin$", "conout$"];

#[cfg(test)]
mod tests {
    use super::PathRule::*;
    use super::*;
    use proptest::prelude::*;
    use std::path::{Component, Path};

    fn portable(name: &str) -> Result<RelPath, PathError> {
        // The marks of bytes as they stand, for names that are none.
        let path: RelPath = match name.strip_prefix("raw:") {
            Some(raw) => raw.parse()?,
            None => names::from_bytes(name.as_bytes()).parse()?,
        };
        path.check_portable().map(|()| path)
    }

    #[test]
    fn accepts_portable_names_word_for_word() {
        let accepted = [
            "a",
            "a.txt",
            "A.TXT",
            "a b.txt",
            "a/b",
            "holiday/2024/beach.jpg",
            "a.b.c",
            "tar.gz",
            "a-",
            "a-b",
            "_a",
            "~a",
            "a~",
            "#a",
            "@",
            "$HOME",
            "`id`",
            "a;b",
            "a|b",
            "a*",
            "a?b",
            "<a>",
            "a\"b",
            "a'b",
            "a%00b",
            "%2e%2e%2fx",
            "%252e%252e%252fx",
            "&#46;&#46;",
            "a..b",
            "a...b",
            "console",
            "con1",
            "com",
            "com10",
            "com0",
            "lpt",
            "xcon",
            "con-a",
            "nul_",
            "auxiliary.txt",
            "a.con",
            "a.nul.txt",
            "é.txt",
            "Å.txt",
            "日本語.txt",
            "한국어",
            "\u{2764}\u{fe0f}.txt",
            "😀",
            "Привет",
            "مرحبا",
            "שלום",
            "a\u{2215}b",
            "1\u{2044}2",
            "½",
            "a\u{2026}",
            "a\u{2026}b",
            "ﬁle",
            "a\u{a0}b",
            "x.part",
            "x.meta",
            "0123456789abcdef0123456789abcdef.part",
            "à",
            "K",
            "k",
        ];
        for name in accepted {
            let path = portable(name).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(path.as_str(), name);
            assert_eq!(path.to_string(), name);
        }
    }

    #[test]
    fn refuses_what_is_not_portable_by_rule() {
        let long = "a".repeat(201);
        let emoji = "😀".repeat(100);
        let huge = "a".repeat(4096);
        let long_path = ["a".repeat(100).as_str(); 11].join("/");
        let deep = ["a"; 33].join("/");
        let endless = ["a"; 257].join("/");
        let refused: &[(&str, PathRule)] = &[
            ("", Empty),
            (".", DotComponent),
            ("..", DotComponent),
            ("...", OnlyDotsAndSpaces),
            ("....", OnlyDotsAndSpaces),
            (". ", OnlyDotsAndSpaces),
            (" .", OnlyDotsAndSpaces),
            (" ", OnlyDotsAndSpaces),
            ("\u{a0}", OnlyDotsAndSpaces),
            ("\u{3000}", OnlyDotsAndSpaces),
            ("../x", DotComponent),
            ("a/../../x", DotComponent),
            ("a/..", DotComponent),
            ("a/.", DotComponent),
            ("./x", DotComponent),
            ("/", Absolute),
            ("/x", Absolute),
            ("/etc/passwd", Absolute),
            ("//x", Absolute),
            ("a/", EmptyComponent),
            ("a//b", EmptyComponent),
            ("....//x", EmptyComponent),
            ("..\\x", Backslash),
            ("\\", Backslash),
            ("a\\b", Backslash),
            ("\\\\host\\share", Backslash),
            ("\\\\?\\C:\\x", Backslash),
            ("C:\\x", Colon),
            ("C:x", Colon),
            ("x:stream", Colon),
            ("x::$DATA", Colon),
            (":", Colon),
            ("a/b:c", Colon),
            ("a\0b", Nul),
            ("\0", Nul),
            ("a\nb", Control),
            ("a\r", Control),
            ("a\tb", Control),
            ("\u{1b}[2J", Control),
            ("a\u{7f}", Control),
            ("a\u{80}", Control),
            ("a\u{85}b", Control),
            ("a\u{9b}b", Control),
            ("a\u{9f}", Control),
            ("a\u{202e}gpj.exe", Invisible),
            ("a\u{202a}", Invisible),
            ("a\u{2066}b", Invisible),
            ("a\u{2069}", Invisible),
            ("a\u{200e}", Invisible),
            ("a\u{200f}", Invisible),
            ("a\u{61c}b", Invisible),
            ("a\u{200b}b", Invisible),
            ("a\u{200c}b", Invisible),
            ("a\u{200d}b", Invisible),
            ("\u{feff}a", Invisible),
            ("a\u{2060}b", Invisible),
            ("a\u{ad}b", Invisible),
            ("a\u{2028}b", Invisible),
            ("a\u{2029}b", Invisible),
            ("a\u{180e}b", Invisible),
            ("\u{3164}", Invisible),
            ("a\u{e0041}", Invisible),
            ("a\u{fff9}b", Invisible),
            ("a\u{ffff}", Invisible),
            ("a\u{10fffe}", Invisible),
            ("a\u{fdd0}", Invisible),
            (".a", LeadingDot),
            (".udpack", Own),
            (".UDPack/lock", Own),
            (".udpack-probe-0", Own),
            (".udpacked", LeadingDot),
            ("a/.udpack", LeadingDot),
            ("raw:caf\u{10ffe9}", NotUtf8),
            (".ssh/authorized_keys", LeadingDot),
            ("a/.b", LeadingDot),
            ("..a", LeadingDot),
            ("-a", LeadingHyphen),
            ("-", LeadingHyphen),
            ("--help", LeadingHyphen),
            ("a/-rf", LeadingHyphen),
            (" a", OuterSpace),
            ("a ", OuterSpace),
            ("a/ b", OuterSpace),
            ("a /b", OuterSpace),
            ("a\u{a0}", OuterSpace),
            ("\u{3000}a", OuterSpace),
            ("a.", TrailingDot),
            ("a..", TrailingDot),
            ("a./b", TrailingDot),
            ("a.txt.", TrailingDot),
            ("CON", Reserved),
            ("con", Reserved),
            ("Prn", Reserved),
            ("AUX", Reserved),
            ("NUL", Reserved),
            ("COM1", Reserved),
            ("com9", Reserved),
            ("LPT1", Reserved),
            ("lpt9", Reserved),
            ("con.txt", Reserved),
            ("nul.tar.gz", Reserved),
            ("con .txt", Reserved),
            ("a/nul", Reserved),
            ("aux/a", Reserved),
            ("COM¹", Reserved),
            ("COM².txt", Reserved),
            ("LPT³", Reserved),
            ("CON ", Reserved),
            ("CON.", Reserved),
            ("CONIN$", Reserved),
            ("conout$", Reserved),
            ("ｃｏｎ", Reserved),
            ("ｎul.txt", Reserved),
            (&long, NotPortableComponent),
            (&emoji, ComponentTooLong),
            (&huge, TooLong),
            (&long_path, NotPortableLength),
            (&deep, NotPortableDepth),
            (&endless, TooDeep),
            ("e\u{301}.txt", NotNfc),
            ("\u{212a}", NotNfc),
            ("\u{2126}", NotNfc),
            ("a\u{30a}", NotNfc),
            ("a/e\u{301}", NotNfc),
            ("\u{ff0e}\u{ff0e}", DotComponent),
            ("\u{ff0e}", DotComponent),
            ("\u{2024}", DotComponent),
            ("\u{2025}", DotComponent),
            ("\u{2024}\u{2024}", DotComponent),
            ("\u{2026}", OnlyDotsAndSpaces),
            ("a\u{ff0f}b", SeparatorLookalike),
            ("a\u{ff3c}b", SeparatorLookalike),
            ("a\u{ff1a}b", SeparatorLookalike),
            ("\u{ff0e}\u{ff0e}\u{ff0f}x", SeparatorLookalike),
            ("a\u{fe68}b", SeparatorLookalike),
            ("\u{2100}", SeparatorLookalike),
        ];
        for (name, rule) in refused {
            match portable(name) {
                Ok(path) => panic!("accepted {path:?}, expected: {rule}"),
                Err(error) => assert_eq!(error.rule(), *rule, "{error}"),
            }
        }
    }

    #[test]
    fn every_name_that_a_file_can_have_is_accepted() {
        let longest = "é".repeat(127);
        for name in [
            ".env",
            ".git/config",
            "Screenshot 12:30:45.png",
            "a\\b",
            "aux.c",
            "-x",
            " ",
            "a ",
            "...",
            "a\nb",
            "\u{1b}[2J",
            "\u{202e}",
            "e\u{301}",
            "caf\u{10ffe9}",
            "\u{10ff80}",
            "a/.udpack",
            ".udpacked",
            &longest,
        ] {
            let path: RelPath = name.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(path.as_str(), name);
            assert_eq!(RelPath::from_os(&names::os(&path.0)).unwrap(), path);
            assert!(path.to_string().chars().all(is_printable), "{path}");
        }
    }

    #[test]
    fn one_name_has_one_form() {
        // The characters spell the bytes of an `é`.
        let spelled: RelPath = "\u{10ffc3}\u{10ffa9}".parse().unwrap();
        assert_eq!(spelled, "é".parse().unwrap());
    }

    #[test]
    fn limits_are_inclusive() {
        let deep = ["a"; RelPath::MAX_COMPONENTS].join("/");
        let raw = "\u{10ffe9}".repeat(RelPath::MAX_COMPONENT_BYTES);
        let full = ["a".repeat(255).as_str(); 15].join("/") + "/" + &"a".repeat(255);
        assert_eq!(full.len(), RelPath::MAX_BYTES);
        for name in [&deep, &raw, &full] {
            name.parse::<RelPath>()
                .unwrap_or_else(|error| panic!("{error}"));
        }
        for (name, rule, text) in [
            (
                format!("{deep}/a"),
                TooDeep,
                "it may have 256 components, it has 257",
            ),
            (
                format!("{raw}a"),
                ComponentTooLong,
                "a component may have 255 bytes, it has 256",
            ),
            (
                format!("{full}a"),
                TooLong,
                "it may have 4095 bytes, it has 4096",
            ),
        ] {
            let error = name.parse::<RelPath>().unwrap_err();
            assert_eq!(error.rule(), rule);
            assert!(error.to_string().ends_with(text), "{error}");
        }
    }

    #[test]
    fn portable_limits_are_inclusive() {
        assert!(portable(&"a".repeat(200)).is_ok());
        assert!(portable(&"😀".repeat(50)).is_ok());
        assert!(portable(&["a"; 32].join("/")).is_ok());
        let full = format!(
            "{}/{}",
            ["a".repeat(200).as_str(); 5].join("/"),
            "a".repeat(19)
        );
        assert_eq!(full.len(), RelPath::PORTABLE_BYTES);
        assert!(portable(&full).is_ok());
        assert_eq!(
            portable(&format!("{full}a")).unwrap_err().rule(),
            NotPortableLength
        );
    }

    #[test]
    fn two_bad_names_are_told_apart() {
        let text = |name: &[u8]| {
            names::from_bytes(name)
                .parse::<RelPath>()
                .unwrap_err()
                .to_string()
        };
        assert_ne!(text(b"\xe9/.."), text(b"\xe8/.."));
        assert!(text(b"\xe9/..").contains("\\xe9"));
    }

    #[test]
    fn error_text_is_printable_and_short() {
        for name in [
            "a\u{1b}[31m\n\u{202e}b",
            &"\0".repeat(1000),
            &"é".repeat(1000),
            &"\u{10ffff}".repeat(255),
        ] {
            let text = portable(name).unwrap_err().to_string();
            assert!(text.chars().all(is_printable), "{text}");
            assert!(printable(name).len() <= 128, "{text}");
        }
        assert_eq!(
            portable("a\nb").unwrap_err().to_string(),
            "bad name \"a\\nb\": it holds a control character"
        );
    }

    #[test]
    fn splits_into_parents_and_name() {
        let path: RelPath = "a/b/c.txt".parse().unwrap();
        assert_eq!(path.components().collect::<Vec<_>>(), ["a", "b", "c.txt"]);
        assert_eq!(path.parents().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(path.file_name(), "c.txt");
        let bare: RelPath = "c.txt".parse().unwrap();
        assert_eq!((bare.parents().count(), bare.file_name()), (0, "c.txt"));
    }

    fn hostile() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            4 => "[a-z]{1,4}",
            2 => Just("/".to_owned()),
            3 => prop::sample::select(vec!["..", ".", "\\", " ", "-", "con"]).prop_map(String::from),
            2 => any::<char>().prop_map(String::from),
            1 => "[\u{2024}-\u{2026}\u{ff0e}\u{ff0f}\u{ff3c}]",
        ];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn what_parses_stays_below_its_root(name in hostile()) {
            if let Ok(path) = RelPath::try_from(name.as_str()) {
                prop_assert_eq!(&*path.to_bytes(), &*names::bytes(&name));
                prop_assert_eq!(&path.as_str().parse::<RelPath>().unwrap(), &path);
                let root = Path::new("/root/of/it");
                let joined = root.join(names::os(&path.0));
                prop_assert!(joined.starts_with(root));
                let below = joined.components().skip(root.components().count());
                prop_assert!(below.clone().all(|part| matches!(part, Component::Normal(_))));
                prop_assert_eq!(below.count(), path.components().count());
                prop_assert_eq!(path.components().collect::<Vec<_>>().join("/"), path.as_str());
            }
            if name.parse::<RelPath>().is_ok_and(|path| path.check_portable().is_ok()) {
                let folded: String = name.nfkc().collect();
                prop_assert!(folded.split('/').all(|part| !["", ".", ".."].contains(&part)));
                prop_assert_eq!(folded.split('/').count(), name.split('/').count());
            }
        }

        #[test]
        fn never_panics(name in any::<String>()) {
            if let Err(error) = RelPath::try_from(name.as_str()) {
                prop_assert!(!error.to_string().chars().any(char::is_control));
            }
        }
    }
}
