//! The fields of the spans that connections and channels run in.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{bind, bounded, connect, server};
use tracing::Level;
use udpack::{Channel, Client, Timeouts};

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

impl Lines {
    /// Takes the lines of this thread up to this level: one thread runs both ends, so its default is everybody's.
    fn listen(&self, level: Level) -> tracing::subscriber::DefaultGuard {
        let writer = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().expect("sound").clone()).expect("text")
    }
}

#[tokio::test]
async fn a_datagram_that_cannot_be_sent_is_told_in_words() {
    let lines = Lines::default();
    let _guard = lines.listen(Level::DEBUG);
    bounded(async {
        // The system takes nothing for a broadcast address from whoever did not ask for that.
        let timeouts = Timeouts {
            handshake: Duration::from_millis(200),
            ..Timeouts::default()
        };
        let client = Client::builder().timeouts(timeouts);
        let error = client.connect("255.255.255.255:9").await;
        error.expect_err("nobody is there");
        let text = lines.text();
        let line = text
            .lines()
            .find(|line| line.contains("WARN") && line.contains("could not be sent"))
            .unwrap_or_else(|| panic!("no line: {text}"));
        assert!(line.contains("to=255.255.255.255:9"), "{line}");
        assert!(!text.contains("Transmit"), "{text}");
    })
    .await;
}

#[tokio::test]
async fn spans_name_the_session_and_the_channel() {
    let lines = Lines::default();
    let _guard = lines.listen(Level::DEBUG);
    bounded(async {
        let server = bind(server().channel("chat", |channel: Channel| async move {
            tracing::info!("the handler of {}", channel.name());
        }))
        .await;
        let socket = connect(&server).await;
        let channel = socket.open("chat").await.expect("a channel");
        channel.recv().await.expect("an orderly end");
        let id = socket.id().to_string();
        let text = lines.text();
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

/// Programs log at a level at which channels have no spans.
#[tokio::test]
async fn what_channels_do_is_logged_under_their_connection_when_they_have_no_spans() {
    let lines = Lines::default();
    let _guard = lines.listen(Level::INFO);
    bounded(async {
        let server = bind(server().channel("chat", |channel: Channel| async move {
            tracing::info!("handler {}", channel.id());
        }))
        .await;
        let socket = connect(&server).await;
        for _ in 0..3 {
            let channel = socket.open("chat").await.expect("a channel");
            channel.recv().await.expect("an orderly end");
        }
        let text = lines.text();
        let told: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("handler"))
            .collect();
        assert_eq!(told.len(), 3, "{text}");
        for line in told {
            let fields = line.split_once("conn{").expect("a connection").1;
            let fields = fields.split_once('}').expect("its end").0;
            let keys: Vec<&str> = fields
                .split(' ')
                .filter_map(|field| Some(field.split_once('=')?.0))
                .collect();
            assert_eq!(keys, ["peer", "session", "id"], "{line}");
            assert!(fields.ends_with("id=\"tester\""), "{line}");
            assert!(
                fields.contains(&format!("session={} ", socket.id())),
                "{line}"
            );
        }
    })
    .await;
}
