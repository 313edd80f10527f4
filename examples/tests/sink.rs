//! The sink of `examples/sink.rs` keeps the rules of `udpack_transfer::Sink`.

#[allow(dead_code, reason = "its `main` is run as a program of its own")]
#[path = "../sink.rs"]
mod sink;

use std::sync::Mutex;

use udpack_transfer::testing::sink_conforms;

#[tokio::test]
async fn a_sink_that_sends_files_on_conforms() {
    let bodies = Mutex::new(None);
    let make = async || {
        let (forward, kept) = sink::archive().await.expect("a free port");
        *bodies.lock().expect("no panic") = Some(kept);
        forward
    };
    let look = async |_: &sink::Forward, path: &udpack_transfer::RelPath| {
        let bodies = bodies.lock().expect("no panic").clone()?;
        let body = bodies.lock().expect("no panic").get(path.as_str()).cloned();
        body.map(Into::into)
    };
    sink_conforms(make, look).await;
}
