//! The oracle: what must still be true after every hostile act, and the server it is true of.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_bytes::ByteBuf;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use udpack::{
    Channel, CloseCode, Context, Fault, Limits, RecvError, Server, ServerBuilder, Socket, Timeouts,
};

use crate::bare::{self, Bare, Stream};
use crate::common::{self, TOKEN};

/// Every wrong token of these tests contains this, so that a log line with any token can be told.
pub(crate) const MARK: &str = "s3cret";

/// The heap, descriptors and tasks belong to the process: one test at a time.
pub(crate) static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// How far the process may grow over its baseline, in KiB.
pub(crate) const GROWTH: u64 = 8 << 10;

pub(crate) fn limits() -> Limits {
    Limits {
        auth_failures: 1_000_000,
        ..Limits::default()
    }
}

pub(crate) fn timeouts() -> Timeouts {
    Timeouts {
        handshake: Duration::from_secs(5),
        // Below `frame`, as by default.
        auth: Duration::from_millis(700),
        frame: Duration::from_secs(1),
        slow_peer: Duration::from_millis(400),
        idle: Duration::from_secs(5),
        keep_alive: Duration::from_millis(500),
        close: Duration::from_secs(2),
        handler: Duration::from_millis(300),
        ..Timeouts::default()
    }
}

#[derive(Deserialize)]
struct Add {
    a: u64,
    b: u64,
}

/// A server with the channels the cases speak to.
pub(crate) fn builder() -> ServerBuilder {
    common::server()
        .limits(limits())
        .timeouts(timeouts())
        .channel("echo", echo)
        .channel("sink", sink)
        .channel("spam", spam)
        .channel("typed", typed)
}

/// Says everything back as the bytes that came.
async fn echo(channel: Channel) -> Result<(), RecvError> {
    while let Some(message) = channel.recv().await? {
        let raw = message.raw();
        let data = serde_bytes::Bytes::new(&raw);
        let _ = match message.id() {
            Some(_) => channel.reply(&message, data).await,
            None => channel.send(message.event(), data).await,
        };
    }
    Ok(())
}

/// Counts; a request asks how many came before it.
async fn sink(channel: Channel) -> Result<(), RecvError> {
    let mut count = 0_u64;
    while let Some(message) = channel.recv().await? {
        let _ = channel.reply(&message, &count).await;
        count += 1;
    }
    Ok(())
}

/// Sends without end.
async fn spam(channel: Channel) -> Result<(), udpack::SendError> {
    let block = ByteBuf::from(vec![0x5a; 32 << 10]);
    loop {
        channel.send("block", &block).await?;
    }
}

async fn typed(channel: Channel) -> Result<(), RecvError> {
    channel
        .on("add", |add: Add, _: Context| async move {
            add.a
                .checked_add(add.b)
                .ok_or_else(|| Fault::new("overflow", "too large to add"))
        })
        .on("panic", |(): (), _: Context| async {
            if true {
                panic!("on purpose");
            }
        })
        .on("fail", |(): (), _: Context| async {
            Err::<(), _>(Fault::new("mine", "no"))
        })
        .on("never", |(): (), _: Context| std::future::pending::<()>())
        .on("ping", |(): (), _: Context| async {})
        .run()
        .await
}

/// A server, one client that behaves, and what the process looked like before anybody misbehaved.
pub(crate) struct Site {
    pub(crate) server: Server,
    socket: Socket,
    ping: Channel,
    /// Where the hostile peers dial from.
    pub(crate) peers: quinn::Endpoint,
    before: Usage,
}

#[derive(Debug, Clone, Copy)]
struct Usage {
    heap: u64,
    descriptors: usize,
    tasks: usize,
}

impl Site {
    pub(crate) async fn new(builder: ServerBuilder) -> Self {
        capture_logs();
        let server = common::bind(builder).await;
        let socket = common::connect(&server).await;
        let ping = socket.open("echo").await.expect("a channel");
        let peers = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0)));
        let peers = peers.expect("a local port");
        let mut site = Self {
            server,
            socket,
            ping,
            peers,
            before: Usage {
                heap: u64::MAX >> 1,
                descriptors: usize::MAX,
                tasks: usize::MAX,
            },
        };
        // Allocators and pools take their share once.
        for _ in 0..4 {
            let (bare, control) = site.admitted().await;
            let message = bare::event("say", bare::Value::Bin(vec![0; 1 << 20]));
            for id in 1..=8 {
                let mut stream = bare.channel(id, "echo").await;
                stream.write(&message).await;
                stream.message().await.expect("the echo");
            }
            drop((message, control, bare));
            let crowd = (0..12).map(|_| site.serves("warm-up"));
            futures_util::future::join_all(crowd).await;
            site.check("warm-up").await;
        }
        // As does who prints where a handler panicked, which may be megabytes of debug information.
        let typed = site.socket.open("typed").await.expect("a channel");
        let panicked = typed.request::<_, ()>("panic", &()).await;
        assert!(panicked.is_err());
        drop(typed);
        let settled = || (descriptors(), tasks());
        let mut last = settled();
        until("descriptors and tasks settle", || {
            let now = settled();
            std::mem::replace(&mut last, now) == now
        })
        .await;
        site.before = Usage {
            heap: heap(),
            descriptors: last.0,
            tasks: last.1,
        };
        site
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.server.local_addr()
    }

    pub(crate) async fn dial(&self) -> Bare {
        let config = bare::quic(bare::tls(&[b"udpack/1"]), 1 << 20);
        self.dial_with(config)
            .await
            .expect("the handshake is sound")
    }

    pub(crate) async fn dial_with(
        &self,
        config: quinn::ClientConfig,
    ) -> Result<Bare, quinn::ConnectionError> {
        Bare::dial(&self.peers, self.address(), config).await
    }

    /// A bare peer that was let in, and its control stream.
    pub(crate) async fn admitted(&self) -> (Bare, Stream) {
        let bare = self.dial().await;
        let control = bare.enter(TOKEN).await;
        (bare, control)
    }

    /// What the process has grown by, in KiB.
    pub(crate) fn grown(&self) -> u64 {
        heap().saturating_sub(self.before.heap)
    }

    /// The behaving client is served, on the connection it has had all along.
    pub(crate) async fn others_live(&self, case: &str) {
        let ping = self.ping.request::<_, ByteBuf>("ping", &());
        within(2, case, "the other client's ping", ping.into_future())
            .await
            .unwrap_or_else(|error| panic!("{case}: the other client: {error}"));
        assert_eq!(self.socket.close_reason(), None, "{case}: the other client");
    }

    /// A client that comes now is served, and so is the one that was there before.
    pub(crate) async fn serves(&self, case: &str) {
        self.others_live(case).await;
        let fresh = async {
            let socket = common::connect(&self.server).await;
            let echo = socket.open("echo").await.expect("a channel");
            echo.send("say", &7).await.expect("queued");
            let said = echo.recv().await.expect("open").expect("a message");
            assert_eq!(said.data::<ByteBuf>().expect("bytes").as_ref(), [7]);
            let block = ByteBuf::from(vec![0xa5; 1 << 20]);
            let back: ByteBuf = echo.request("block", &block).await.expect("a reply");
            assert_eq!(back.len(), (1 << 20) + 5, "{case}");
            assert!(
                back[5..] == block[..],
                "{case}: the block came back changed"
            );
            socket
        };
        // Patience for a slow machine, not a measurement: a client that is shut out waits for as long as the test does.
        let fresh = within(10, case, "a fresh client", fresh).await;
        drop(fresh.close(CloseCode::NORMAL, ""));
        assert_eq!(leaked(), Vec::<String>::new(), "{case}: a token in the log");
    }

    /// Everything is as if nothing had happened.
    pub(crate) async fn check(&self, case: &str) {
        self.serves(case).await;
        until(&format!("{case}: only one socket is left"), || {
            self.server.sockets().len() == 1
        })
        .await;
        let before = self.before;
        until(
            &format!("{case}: descriptors are back to {before:?}"),
            || descriptors() <= before.descriptors,
        )
        .await;
        until(&format!("{case}: tasks are back to {before:?}"), || {
            tasks() <= before.tasks
        })
        .await;
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.grown() > GROWTH {
            let grown = self.grown();
            assert!(
                Instant::now() < deadline,
                "{case}: {grown} KiB over {before:?}"
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// The result of something that must not take longer.
pub(crate) async fn within<F: Future>(
    seconds: u64,
    case: &str,
    what: &str,
    future: F,
) -> F::Output {
    match tokio::time::timeout(Duration::from_secs(seconds), future).await {
        Ok(output) => output,
        Err(_) => panic!("{case}: {what} took longer than {seconds} s"),
    }
}

/// Looks again and again, for at most 5 s.
pub(crate) async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is() {
        assert!(Instant::now() < deadline, "not within 5 s: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Counts what is allocated: unlike resident memory, it does not depend on what the allocator keeps.
#[global_allocator]
static HEAP: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

/// What the process has allocated, in KiB.
pub(crate) fn heap() -> u64 {
    HEAP.current_usage() as u64 >> 10
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd")
        .expect("Linux says so")
        .count()
}

fn tasks() -> usize {
    tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks()
}

/// Log lines that hold a token, and how many there were in all.
static LEAKED: Mutex<Vec<String>> = Mutex::new(Vec::new());
static LINES: AtomicU64 = AtomicU64::new(0);

pub(crate) fn leaked() -> Vec<String> {
    assert!(LINES.load(Ordering::Relaxed) > 0, "the log is captured");
    LEAKED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

/// Everything this library logs passes `Listener`.
pub(crate) fn capture_logs() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let heard = Targets::new()
            .with_target("udpack", LevelFilter::TRACE)
            .with_targets(["quinn", "quinn_proto"].map(|target| (target, LevelFilter::INFO)));
        let layer = tracing_subscriber::fmt::layer().with_writer(Listener);
        let subscriber = tracing_subscriber::registry().with(layer.with_filter(heard));
        tracing::subscriber::set_global_default(subscriber).expect("the first subscriber");
    });
}

#[derive(Clone, Copy)]
struct Listener;

impl io::Write for Listener {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LINES.fetch_add(1, Ordering::Relaxed);
        let text = String::from_utf8_lossy(line);
        if text.contains(TOKEN) || text.contains(MARK) {
            let mut leaked = LEAKED.lock().unwrap_or_else(PoisonError::into_inner);
            leaked.push(text.into_owned());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Listener {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}
