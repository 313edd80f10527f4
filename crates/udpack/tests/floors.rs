//! The floors of ARCHITECTURE.md hold: no module imports from a floor above its own, and QUIC's types stay on theirs.

use std::fs;
use std::path::{Path, PathBuf};

/// Files that may name quinn outside `transport/`: what benchmarks take of it.
const QUIC_ALSO: [&str; 1] = ["bench.rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The floors of a crate, lowest first: the first cells of the table under the heading that names its sources.
fn floors(of: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("the document");
    let heading = format!("### `{of}`");
    let section = text.split(&heading).nth(1).expect("a section of the crate");
    let section = section.split("\n#").next().expect("its text");
    let cells = section.lines().filter_map(|line| {
        let cell = line.strip_prefix("| `")?;
        Some(cell.split('`').next()?.trim_end_matches('/').to_owned())
    });
    cells.collect()
}

/// The sources below `dir`, without unit tests in files and directories of their own.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("a directory of sources") {
            let path = entry.expect("an entry").path();
            if path.ends_with("tests") {
                continue;
            }
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && !path.ends_with("tests.rs")
            {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A file's code, without comments and without the unit tests at its end.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source");
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or("");
    let lines = text.lines().map(|line| match line.find("//") {
        Some(at) => &line[..at],
        None => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The first names of all paths that begin at the crate's root: `a` and `b` of `crate::a::x` and `use crate::{a::x, b}`.
fn named(code: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => names.extend(group_of(group).map(name_at)),
            None => names.push(name_at(rest)),
        }
    }
    names
}

/// The parts of a group `a::{b, c}, d}`, of which each begins with a name.
fn group_of(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_i32;
    text.split_inclusive([',', '{', '}'])
        .scan(true, move |begins, part| {
            if depth < 0 {
                return None;
            }
            let here = (*begins && depth == 0).then_some(part.trim_start());
            match part.as_bytes().last() {
                Some(b'{') => depth += 1,
                Some(b'}') => depth -= 1,
                _ => {}
            }
            *begins = part.ends_with(',') || depth == 0;
            Some(here)
        })
        .flatten()
        .filter(|part| !name_at(part).is_empty())
}

fn name_at(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

/// Every import of the crate that goes up a floor, or goes round the floors by the crate's root.
fn upward(of: &str) -> Vec<String> {
    let floors = floors(of);
    assert!(floors.len() > 3, "{of} has these floors: {floors:?}");
    let dir = root().join(of);
    let floor = |name: &str| floors.iter().position(|floor| floor == name);
    let mut found = Vec::new();
    for path in sources(&dir) {
        let inside = path.strip_prefix(&dir).expect("a path below it");
        if inside == Path::new("lib.rs") {
            continue;
        }
        let top = inside.iter().next().expect("a name").to_string_lossy();
        let top = top.trim_end_matches(".rs");
        let Some(own) = floor(top) else {
            found.push(format!("{} is on no floor", inside.display()));
            continue;
        };
        let code = code(&path);
        for name in named(&code) {
            if floor(name).is_none_or(|theirs| theirs > own) {
                found.push(format!("{} imports crate::{name}", inside.display()));
            }
        }
        if code.contains("super::super") {
            found.push(format!("{} leaves its floor by super", inside.display()));
        }
    }
    found
}

#[test]
fn nothing_imports_from_a_floor_above() {
    let none: [String; 0] = [];
    assert_eq!(upward("crates/udpack/src"), none);
    assert_eq!(upward("crates/udpack-transfer/src"), none);
}

#[test]
fn only_the_transport_names_quic() {
    let dir = root().join("crates/udpack/src");
    let named: Vec<_> = sources(&dir)
        .into_iter()
        .filter(|path| {
            let code = code(path);
            code.contains("quinn::") || code.contains("quinn_proto::")
        })
        .map(|path| path.strip_prefix(&dir).expect("below it").to_owned())
        .filter(|path| {
            !path.starts_with("transport") && !QUIC_ALSO.iter().any(|also| path.ends_with(also))
        })
        .collect();
    assert_eq!(named, Vec::<PathBuf>::new());
}

#[test]
fn imports_are_found_however_they_are_written() {
    let code = "use crate::a::{b, c};\nuse crate::{d, e::{f, g}, h as i};\nlet x = crate::j::K;\npub(crate) fn l() {}";
    assert_eq!(named(code), ["a", "d", "e", "h", "j"]);
}
