//! The rules of every sink, over a store in memory and over a directory, with parts so small that the tests' files have many.

use tempfile::TempDir;
use udpack_object_store::{ObjectConfig, ObjectSink};
use udpack_transfer::Overwrite;
use udpack_transfer::testing::sink_conforms;

#[path = "common/stored.rs"]
mod stored;

use stored::read;

fn config() -> ObjectConfig {
    ObjectConfig {
        part: 32 << 10,
        budget: 4 << 20,
        overwrite: Overwrite::Always,
        ..ObjectConfig::default()
    }
}

/// Directories for as long as the tests run.
#[derive(Default)]
struct Dirs(std::sync::Mutex<Vec<TempDir>>);

impl Dirs {
    fn add(&self) -> std::path::PathBuf {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().to_owned();
        self.0.lock().expect("sound").push(dir);
        path
    }
}

#[tokio::test]
async fn a_store_in_memory_keeps_the_rules() {
    let dirs = Dirs::default();
    let make = async || {
        ObjectSink::memory(dirs.add(), config())
            .await
            .expect("a sink")
    };
    sink_conforms(make, read).await;
}

#[tokio::test]
async fn a_directory_keeps_the_rules() {
    let dirs = Dirs::default();
    let make = async || {
        let url = format!("file://{}", dirs.add().display());
        let sink = ObjectSink::open(&url, dirs.add(), config()).await;
        let sink = sink.expect("a sink");
        assert!(sink.is_exclusive());
        sink
    };
    sink_conforms(make, read).await;
}
