//! Patterns of excluded entries, as in `.gitignore`.
//!
//! ```text
//! *.o          any entry whose name ends in .o        build/       directories called build
//! doc/*.html   from the top: doc/a.html               a/**/b       a/b, a/x/b, a/x/y/b
//! ```
//!
//! `*` and `?` stop at `/`; `[a-z]`, `[!a-z]` and `\` before a character work as in shells. There are no exceptions
//! (`!pattern`): patterns only exclude.

use std::str::FromStr;

/// Patterns of entries to exclude. Empty by default.
#[derive(Debug, Clone, Default)]
pub struct Exclude {
    patterns: Vec<Pattern>,
}

impl Exclude {
    /// Adds a pattern.
    pub fn push(&mut self, pattern: Pattern) {
        self.patterns.push(pattern);
    }

    /// Whether the entry at `path`, relative to the top of the tree, is excluded by its own name or path.
    pub fn matches(&self, path: &str, is_dir: bool) -> bool {
        self.patterns
            .iter()
            .any(|pattern| pattern.matches(path, is_dir))
    }

    /// Whether the entry or one of the directories above it is excluded.
    pub fn covers(&self, path: &str, is_dir: bool) -> bool {
        !self.patterns.is_empty()
            && (self.matches(path, is_dir)
                || path
                    .match_indices('/')
                    .any(|(at, _)| self.matches(path.get(..at).unwrap_or_default(), true)))
    }
}

impl FromIterator<Pattern> for Exclude {
    fn from_iter<I: IntoIterator<Item = Pattern>>(patterns: I) -> Self {
        Self {
            patterns: patterns.into_iter().collect(),
        }
    }
}

/// One pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    parts: Vec<Part>,
    /// Matched against the path from the top, not the name alone.
    anchored: bool,
    dirs_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    /// `**`: any number of components, none included.
    Any,
    Name(Vec<Token>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Char(char),
    One,
    Star,
    Set {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
}

/// Why a pattern is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// The pattern is empty, or only a slash.
    #[error("the pattern is empty")]
    Empty,
    /// `[` without its `]`, or with nothing between them.
    #[error("a [ of the pattern has no ]")]
    OpenSet,
    /// A backslash at the end.
    #[error("the pattern ends with a backslash")]
    Escape,
    /// Longer than any path.
    #[error("the pattern is longer than {LONGEST} bytes")]
    TooLong,
}

/// Bytes of a pattern at most: a path is never longer.
const LONGEST: usize = 4096;

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.len() > LONGEST {
            return Err(PatternError::TooLong);
        }
        let (text, dirs_only) = match text.strip_suffix('/') {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let anchored = text.contains('/');
        let text = text.strip_prefix('/').unwrap_or(text);
        if text.is_empty() {
            return Err(PatternError::Empty);
        }
        let parts = text
            .split('/')
            .filter(|part| !part.is_empty())
            .map(|part| match part {
                "**" => Ok(Part::Any),
                part => tokens(part).map(Part::Name),
            })
            .collect::<Result<Vec<_>, _>>()?;
        if parts.is_empty() {
            return Err(PatternError::Empty);
        }
        Ok(Self {
            parts,
            anchored,
            dirs_only,
        })
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, PatternError> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        tokens.push(match c {
            '*' => {
                if tokens.last() == Some(&Token::Star) {
                    continue;
                }
                Token::Star
            }
            '?' => Token::One,
            '\\' => Token::Char(chars.next().ok_or(PatternError::Escape)?),
            '[' => {
                let negated = chars.next_if(|c| matches!(c, '!' | '^')).is_some();
                let mut ranges = Vec::new();
                loop {
                    let low = match chars.next().ok_or(PatternError::OpenSet)? {
                        // As the first character of the set it is literal.
                        ']' if !ranges.is_empty() => break,
                        '\\' => chars.next().ok_or(PatternError::OpenSet)?,
                        c => c,
                    };
                    let mut ahead = chars.clone();
                    let high = match (ahead.next(), ahead.next()) {
                        (Some('-'), Some(high)) if high != ']' => {
                            chars.nth(1);
                            match high {
                                '\\' => chars.next().ok_or(PatternError::OpenSet)?,
                                high => high,
                            }
                        }
                        _ => low,
                    };
                    ranges.push((low, high));
                }
                Token::Set { negated, ranges }
            }
            c => Token::Char(c),
        });
    }
    Ok(tokens)
}

impl Pattern {
    /// Whether it matches the entry at `path`, relative to the top of the tree.
    pub fn matches(&self, path: &str, is_dir: bool) -> bool {
        if self.dirs_only && !is_dir {
            return false;
        }
        if !self.anchored {
            let name = path.rsplit('/').next().unwrap_or(path);
            return match self.parts.as_slice() {
                [Part::Name(tokens)] => name_matches(tokens, name),
                // A lone `**`.
                _ => true,
            };
        }
        // Which of the pattern's parts may match next, after each component of the path.
        let mut states = vec![false; self.parts.len() + 1];
        if let Some(first) = states.first_mut() {
            *first = true;
        }
        self.skip_any(&mut states);
        for name in path.split('/') {
            let mut next = vec![false; states.len()];
            for (at, part) in self.parts.iter().enumerate() {
                if !states.get(at).copied().unwrap_or(false) {
                    continue;
                }
                let to = match part {
                    Part::Any => Some(at),
                    Part::Name(tokens) => name_matches(tokens, name).then_some(at + 1),
                };
                if let Some(state) = to.and_then(|to| next.get_mut(to)) {
                    *state = true;
                }
            }
            self.skip_any(&mut next);
            states = next;
        }
        // `a/**` means what is in `a`, not `a` itself.
        match self.parts.split_last() {
            Some((Part::Any, _)) => states
                .last()
                .is_some_and(|end| *end && path.split('/').count() >= self.least()),
            _ => states.last().copied().unwrap_or(false),
        }
    }

    /// `**` may stand for no component at all.
    fn skip_any(&self, states: &mut [bool]) {
        for (at, part) in self.parts.iter().enumerate() {
            if *part == Part::Any
                && states.get(at).copied().unwrap_or(false)
                && let Some(after) = states.get_mut(at + 1)
            {
                *after = true;
            }
        }
    }

    /// The least number of components of a path below the prefix of a final `**`.
    fn least(&self) -> usize {
        1 + self.parts.iter().filter(|part| **part != Part::Any).count()
    }
}

/// Whether one name matches; linear but for the last `*`, which is tried at every place.
fn name_matches(tokens: &[Token], name: &str) -> bool {
    let mut at = 0;
    let mut rest = name.chars();
    // The position to retry from if the rest does not match: after the last star, one character later.
    let mut retry = None;
    loop {
        let before = rest.clone();
        match (tokens.get(at), rest.next()) {
            (None, None) => return true,
            (Some(Token::Star), c) => {
                at += 1;
                rest = before.clone();
                retry = c.map(|_| (at, before));
                continue;
            }
            (Some(token), Some(c)) if token.is(c) => {
                at += 1;
                continue;
            }
            _ => {}
        }
        let Some((after_star, mut from)) = retry else {
            return false;
        };
        from.next();
        at = after_star;
        rest = from.clone();
        retry = (!from.as_str().is_empty()).then_some((after_star, from));
    }
}

impl Token {
    fn is(&self, c: char) -> bool {
        match self {
            Self::Char(wanted) => *wanted == c,
            Self::One => true,
            Self::Star => false,
            Self::Set { negated, ranges } => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != *negated
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern(text: &str) -> Pattern {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn patterns_match_as_in_gitignore() {
        for (text, path, is_dir, expected) in [
            ("*.o", "a.o", false, true),
            ("*.o", "x/y/a.o", false, true),
            ("*.o", "a.out", false, false),
            ("*.o", ".o", false, true),
            ("a*b*c", "aXbXbXc", false, true),
            ("a*b*c", "aXbXbX", false, false),
            ("*", "anything", false, true),
            ("**", "any/thing", false, true),
            ("?", "é", false, true),
            ("?", "ab", false, false),
            ("[a-c]x", "bx", false, true),
            ("[!a-c]x", "bx", false, false),
            ("[^a-c]x", "dx", false, true),
            ("[]]x", "]x", false, true),
            ("[a-]x", "-x", false, true),
            ("\\*", "*", false, true),
            ("\\*", "a", false, false),
            ("build/", "build", true, true),
            ("build/", "build", false, false),
            ("build/", "x/build", true, true),
            ("/build", "build", true, true),
            ("/build", "x/build", true, false),
            ("doc/*.html", "doc/a.html", false, true),
            ("doc/*.html", "x/doc/a.html", false, false),
            ("doc/*.html", "doc/x/a.html", false, false),
            ("a/**/b", "a/b", false, true),
            ("a/**/b", "a/x/b", false, true),
            ("a/**/b", "a/x/y/b", false, true),
            ("a/**/b", "a/x/y/c", false, false),
            ("**/b", "b", false, true),
            ("**/b", "a/x/b", false, true),
            ("a/**", "a/x", false, true),
            ("a/**", "a/x/y", false, true),
            ("a/**", "a", true, false),
            ("a/b/", "a/b", true, true),
            ("a/b/", "a/b", false, false),
            ("A", "a", false, false),
        ] {
            assert_eq!(
                pattern(text).matches(path, is_dir),
                expected,
                "{text} on {path}"
            );
        }
    }

    #[test]
    fn what_lies_in_a_directory_left_out_is_covered() {
        let exclude: Exclude = [pattern("build/"), pattern("x/y")].into_iter().collect();
        assert!(exclude.covers("a/build/c", false));
        assert!(exclude.covers("x/y/z", false));
        assert!(!exclude.covers("a/build", false), "a file of that name");
        assert!(!exclude.covers("a/x/y/z", false));
        assert!(!Exclude::default().covers("a/b", true));
    }

    #[test]
    fn patterns_that_mean_nothing_are_refused() {
        for (text, error) in [
            ("", PatternError::Empty),
            ("/", PatternError::Empty),
            ("//", PatternError::Empty),
            ("[", PatternError::OpenSet),
            ("[]", PatternError::OpenSet),
            ("[a", PatternError::OpenSet),
            ("a\\", PatternError::Escape),
        ] {
            assert_eq!(text.parse::<Pattern>(), Err(error), "{text}");
        }
        assert_eq!(
            "a".repeat(LONGEST + 1).parse::<Pattern>(),
            Err(PatternError::TooLong)
        );
    }

    #[test]
    fn many_stars_take_no_longer_than_their_product() {
        let hard = pattern(&"a*".repeat(1000));
        assert!(!hard.matches(&"a".repeat(999), false));
        let deep = pattern(&"**/a/".repeat(100));
        assert!(!deep.matches(&["a"; 99].join("/"), true));
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_matches_without_panic(text in ".{0,20}", path in ".{0,20}") {
            if let Ok(pattern) = text.parse::<Pattern>() {
                pattern.matches(&path, true);
            }
        }

        #[test]
        fn an_escaped_name_matches_only_itself(name in "[^/]{1,10}", other in "[^/]{1,10}") {
            let escaped: String = name.chars().flat_map(|c| ['\\', c]).collect();
            let pattern = pattern(&escaped);
            prop_assert!(pattern.matches(&name, false));
            prop_assert_eq!(pattern.matches(&other, false), name == other);
        }
    }
}
