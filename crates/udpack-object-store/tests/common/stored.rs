//! What a store has.

use bytes::Bytes;
use udpack_object_store::ObjectSink;
use udpack_transfer::{RelPath, Sink};

/// The content under a name; `None` where nothing has it.
pub(crate) async fn read(sink: &ObjectSink, path: &RelPath) -> Option<Bytes> {
    let stored = sink.read(path).await.ok()?;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < stored.size() {
        let more = stored.read_at(bytes.len() as u64, 100_000).await;
        bytes.extend_from_slice(&more.expect("it is there"));
    }
    Some(bytes.into())
}
