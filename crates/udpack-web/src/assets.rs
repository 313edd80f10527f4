//! The files that are inside the program: all of `pages/dist`.

use std::sync::LazyLock;

/// One file, and how browsers are told of it.
#[derive(Debug)]
pub(crate) struct Asset {
    /// The path of its URL.
    pub(crate) path: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) bytes: &'static [u8],
}

/// A file of `pages/dist`, under its own name.
macro_rules! asset {
    ($name:literal, $kind:expr) => {
        asset!($name, concat!("/", $name), $kind)
    };
    ($name:literal, $path:expr, $kind:expr) => {
        Asset {
            path: $path,
            kind: $kind,
            bytes: include_bytes!(concat!("../pages/dist/", $name)),
        }
    };
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Each file of `pages/dist`; a test compares the table with the directory.
static ASSETS: &[Asset] = &[
    asset!("index.html", "/", HTML),
    asset!("app.css", CSS),
    asset!("app.js", SCRIPT),
    asset!("icon.svg", SVG),
    asset!("mux.js", SCRIPT),
    asset!("worker.js", SCRIPT),
];

/// The file at this path, and its tag: the beginning of its hash.
pub(crate) fn at(path: &str) -> Option<(&'static Asset, &'static str)> {
    static TAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
        let tag = |asset: &Asset| format!("\"{:.16}\"", blake3::hash(asset.bytes).to_hex());
        ASSETS.iter().map(tag).collect()
    });
    let found = ASSETS.iter().position(|asset| asset.path == path)?;
    Some((&ASSETS[found], &TAGS[found]))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    fn files(dir: &Path, into: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files(&path, into);
            } else {
                into.push(path);
            }
        }
    }

    #[test]
    fn every_file_of_the_pages_is_in_the_table_and_can_be_asked_for() {
        let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("pages/dist");
        let mut found = Vec::new();
        files(&dist, &mut found);
        assert_eq!(found.len(), ASSETS.len(), "{found:?}");
        for file in found {
            let name = file.strip_prefix(&dist).unwrap().to_str().unwrap();
            let path = match name {
                "index.html" => "/".to_owned(),
                name => format!("/{name}"),
            };
            let (asset, tag) = at(&path).unwrap_or_else(|| panic!("{path} is missing"));
            assert_eq!(asset.bytes, std::fs::read(&file).unwrap(), "{path}");
            assert_eq!(tag.len(), 18, "{tag}");
            let (_, extension) = name.rsplit_once('.').unwrap();
            let kind = match extension {
                "html" => HTML,
                "js" => SCRIPT,
                "css" => CSS,
                "svg" => SVG,
                "png" => "image/png",
                "json" | "map" => "application/json",
                "webmanifest" => "application/manifest+json",
                other => panic!("say here which type .{other} has"),
            };
            assert_eq!(asset.kind, kind, "{path}");
        }
    }
}
