//! Names are bytes: whatever bytes a name has, it is stored, listed, read and removed byte for byte, or refused with a
//! code; nothing outside the root is touched, and no name reaches what another one holds.
//!
//! Input: a byte that says what is made under the second name (a file, a directory or a link), the length of the first
//! name, the first name, the second name. A link leads to the first name.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use libfuzzer_sys::{Corpus, fuzz_target};
use serde::{Serialize, Serializer};
use tempfile::TempDir;
use udpack::wire::{Message, PREFIX};
use udpack::{Encoded, text};
use udpack_fuzz::assert_printable;
use udpack_transfer::wire::{Request, decode};
use udpack_transfer::{
    Begin, IfExists, Kind, List, Meta, NewFile, RelPath, Store, StoreConfig, StoreError,
    SyncPolicy, names,
};

fuzz_target!(|input: &[u8]| -> Corpus {
    let [made, len, rest @ ..] = input else {
        return Corpus::Reject;
    };
    let (first, second) = rest.split_at(usize::from(*len).min(rest.len()));
    for name in [first, second] {
        travels(name);
    }
    SITE.with_borrow_mut(|site| site.try_out(*made, first, second));
    Corpus::Keep
});

thread_local! {
    static SITE: RefCell<Site> = RefCell::new(Site::new());
}

/// A name has one text form, which can be shown, and comes over the wire as it is.
fn travels(name: &[u8]) {
    let form = names::from_bytes(name);
    assert_eq!(&*names::bytes(&form), name);
    assert!(names::shown(&form).chars().all(text::is_printable));
    match form.parse::<RelPath>() {
        Ok(path) => {
            assert_eq!(path.as_str(), form);
            assert_eq!(&*path.to_bytes(), name);
            assert_printable(&path.to_string());
        }
        Err(error) => assert_printable(&error.to_string()),
    }
    let sent = Place {
        id: 1,
        path: Name(name),
    };
    let frame = Encoded::new("dir", &sent).expect("a sound message");
    let message = Message::decode(frame.bytes().slice(PREFIX..)).expect("its own message");
    match decode(&message) {
        Ok(Some(Request::Dir(offer))) => assert_eq!(offer.path, form),
        other => panic!("{other:?}"),
    }
}

/// What is in a directory: for each path its kind, and what it holds or leads to.
type Tree = BTreeMap<Vec<u8>, (Kind, Vec<u8>)>;

/// A store beside a directory that is none of its business.
struct Site {
    dir: TempDir,
    store: Store,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir(dir.path().join("beside")).expect("a directory");
        fs::write(dir.path().join("beside/file"), "not yours").expect("a file");
        let config = StoreConfig {
            sync: SyncPolicy::Never,
            min_free: Some(0),
            ..StoreConfig::default()
        };
        let store = Store::open(dir.path().join("root"), config).expect("a store");
        Self { dir, store }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn try_out(&mut self, made: u8, first: &[u8], second: &[u8]) {
        let mut expected = Tree::new();
        if let Some(path) = sound(first) {
            match self.put(&path, b"first") {
                Ok(()) => keep(&mut expected, first, Kind::File, b"first"),
                // Nothing else is there that it could meet.
                Err(error) => assert_eq!(error.code(), "bad_name", "{error}"),
            }
        }
        if let Some(path) = sound(second) {
            let (kind, holds, result) = match made % 3 {
                0 => (Kind::File, &b"second"[..], self.put(&path, b"second")),
                1 => {
                    let result = self.store.make_dir(&path, Meta::default(), None);
                    (Kind::Dir, &b""[..], result.map(drop))
                }
                _ => {
                    let target = names::from_bytes(first);
                    let result = self.store.make_link(&path, &target, IfExists::Error);
                    (Kind::Link, first, result.map(drop))
                }
            };
            match result {
                Ok(()) => {
                    let holds_first = kind == Kind::Dir && below(first, second);
                    let free = expected.is_empty() || !meets(first, second) || holds_first;
                    assert!(free, "{path}");
                    keep(&mut expected, second, kind, holds);
                }
                Err(error) => {
                    assert_printable(&error.to_string());
                    match error.code() {
                        "exists" => assert!(meets(first, second), "{error}"),
                        "forbidden" => assert_eq!(kind, Kind::Link, "{error}"),
                        code => assert_eq!(code, "bad_name", "{error}"),
                    }
                    // The directories above it may have been made.
                    if !meets(first, second) {
                        self.clear_empty(&path, &expected);
                    }
                }
            }
        }
        assert_eq!(self.on_disk(), expected);
        assert_eq!(self.listed(), expected);
        self.untouched();
        self.passes_no_link(&expected);
        for path in [first, second].into_iter().filter_map(sound) {
            let top = path.components().next().expect("at least one");
            let top: RelPath = top.parse().expect("a part of a sound path");
            match self.store.remove(&top, true) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.code(), "not_found", "{error}"),
            }
        }
        assert_eq!(self.on_disk(), Tree::new(), "it is removed by its name");
        self.untouched();
    }

    fn put(&self, path: &RelPath, bytes: &[u8]) -> Result<(), StoreError> {
        let begun = self.store.begin(&NewFile {
            path,
            size: Some(bytes.len() as u64),
            if_exists: IfExists::Error,
            owner: None,
            tenant: None,
            dirs: &[],
            whole: true,
        })?;
        let Begin::New(mut partial) = begun else {
            panic!("`error` takes no file that is there");
        };
        partial.write_at(0, bytes)?;
        let complete = partial.complete(None, Some(bytes.len() as u64), Meta::default())?;
        let published = self.store.publish(vec![complete]).pop();
        let published = published.expect("an outcome for each")?;
        assert_eq!(published.path, path.as_str());
        let stat = self.store.stat(Some(path))?;
        assert_eq!(stat.path, path.as_str());
        let there = self.store.read(path)?;
        let mut read = vec![0; bytes.len() + 1];
        assert_eq!(there.read_at(&mut read, 0).expect("readable"), bytes.len());
        assert_eq!(&read[..bytes.len()], bytes);
        Ok(())
    }

    /// Nothing is stored through a link, wherever it leads.
    fn passes_no_link(&self, expected: &Tree) {
        for (name, (kind, _)) in expected {
            if *kind == Kind::Link
                && let Some(path) = sound(&[name, &b"/x"[..]].concat())
            {
                let error = self.put(&path, b"through").expect_err("through a link");
                assert_eq!(error.code(), "exists", "{error}");
                assert_eq!(&self.on_disk(), expected);
            }
        }
    }

    /// Removes directories that were made for a name that was then refused.
    fn clear_empty(&self, path: &RelPath, expected: &Tree) {
        let mut above: Vec<&[u8]> = Vec::new();
        let bytes = path.to_bytes();
        for (at, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            above.push(&bytes[..at]);
        }
        for dir in above.into_iter().rev() {
            if !expected.contains_key(dir) {
                let _ = fs::remove_dir(self.root().join(OsStr::from_bytes(dir)));
            }
        }
    }

    /// What the system says is below the root, without the store's own.
    fn on_disk(&self) -> Tree {
        let mut tree = Tree::new();
        let mut left = vec![Vec::new()];
        while let Some(dir) = left.pop() {
            let entries = fs::read_dir(self.root().join(OsStr::from_bytes(&dir)));
            for entry in entries.expect("a directory") {
                let entry = entry.expect("an entry");
                let mut name = dir.clone();
                if !name.is_empty() {
                    name.push(b'/');
                }
                name.extend(entry.file_name().as_bytes());
                if name == b".udpack" {
                    continue;
                }
                let kind = entry.file_type().expect("a type");
                let path = self.root().join(OsStr::from_bytes(&name));
                let found = if kind.is_dir() {
                    left.push(name.clone());
                    (Kind::Dir, Vec::new())
                } else if kind.is_symlink() {
                    let target = fs::read_link(path).expect("a link");
                    (Kind::Link, target.as_os_str().as_bytes().to_vec())
                } else {
                    (Kind::File, fs::read(path).expect("a file"))
                };
                tree.insert(name, found);
            }
        }
        tree
    }

    /// What the store says.
    fn listed(&self) -> Tree {
        let page = self.store.list(&List {
            path: None,
            recursive: true,
            after: None,
            limit: 4000,
        });
        let page = page.expect("the root can be listed");
        assert!(!page.more);
        let mut tree = Tree::new();
        for entry in page.entries {
            let name = names::bytes(&entry.path).into_owned();
            let path: RelPath = entry.path.parse().expect("what is listed can be named");
            let holds = match entry.kind {
                Kind::File => {
                    let file = self.store.read(&path).expect("what is listed can be read");
                    let mut bytes = vec![0; usize::try_from(file.len()).expect("small")];
                    file.read_at(&mut bytes, 0).expect("readable");
                    bytes
                }
                Kind::Link => {
                    let target = entry.target.expect("a link leads somewhere");
                    names::bytes(&target).into_owned()
                }
                Kind::Dir | Kind::Other => Vec::new(),
            };
            tree.insert(name, (entry.kind, holds));
        }
        tree
    }

    /// Nothing outside the root has come, gone or changed, and nothing is left in staging.
    fn untouched(&self) {
        let names = |dir: PathBuf| -> Vec<_> {
            let entries = fs::read_dir(dir).expect("a directory");
            let mut names: Vec<_> = entries
                .map(|entry| entry.expect("an entry").file_name())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names(self.dir.path().to_owned()), ["beside", "root"]);
        assert_eq!(names(self.dir.path().join("beside")), ["file"]);
        let file = fs::read(self.dir.path().join("beside/file"));
        assert_eq!(file.expect("the file"), b"not yours");
        assert!(names(self.root().join(".udpack/staging")).is_empty());
        assert_eq!(self.store.usage().open, 0);
    }
}

/// The path of this name, unless it is refused.
fn sound(name: &[u8]) -> Option<RelPath> {
    match RelPath::from_os(OsStr::from_bytes(name)) {
        Ok(path) => Some(path),
        Err(error) => {
            assert_printable(&error.to_string());
            assert_eq!(StoreError::from(error).code(), "bad_name");
            None
        }
    }
}

/// Whether one of the names is the other, or lies below it.
fn meets(one: &[u8], other: &[u8]) -> bool {
    one == other || below(one, other) || below(other, one)
}

/// Whether a name lies below another.
fn below(low: &[u8], high: &[u8]) -> bool {
    low.strip_prefix(high)
        .is_some_and(|rest| rest.first() == Some(&b'/'))
}

/// Notes what is made under a name, and the directories above it.
fn keep(tree: &mut Tree, name: &[u8], kind: Kind, holds: &[u8]) {
    for (at, _) in name.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
        tree.entry(name[..at].to_owned())
            .or_insert((Kind::Dir, Vec::new()));
    }
    tree.insert(name.to_owned(), (kind, holds.to_owned()));
}

#[derive(Serialize)]
struct Place<'a> {
    id: u64,
    path: Name<'a>,
}

/// A name as it travels.
struct Name<'a>(&'a [u8]);

impl Serialize for Name<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => serializer.serialize_bytes(self.0),
        }
    }
}
