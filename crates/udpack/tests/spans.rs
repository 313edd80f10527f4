//! The fields of the spans that connections and channels run in.

mod common;

use std::sync::{Arc, Mutex};

use common::{bind, bounded, connect, server};
use udpack::Channel;

#[tokio::test]
async fn spans_name_the_session_and_the_channel() {
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("sound").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    // One thread runs both ends: the default of this thread is everybody's.
    let _guard = tracing::subscriber::set_default(subscriber);
    bounded(async {
        let server = bind(server().channel("chat", |channel: Channel| async move {
            tracing::info!("the handler of {}", channel.name());
        }))
        .await;
        let socket = connect(&server).await;
        let channel = socket.open("chat").await.expect("a channel");
        channel.recv().await.expect("an orderly end");
        let id = socket.id().to_string();
        let text = String::from_utf8(lines.0.lock().expect("sound").clone()).expect("text");
        let line = text
            .lines()
            .find(|line| line.contains("the handler of chat"))
            .expect("a line");
        assert!(line.contains(&format!("session={id} ")), "{line}");
        assert!(line.contains("id=\"tester\""), "{line}");
        assert!(line.contains("channel{name=\"chat\" id=1}"), "{line}");
    })
    .await;
}
