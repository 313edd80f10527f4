//! tokio-tungstenite over TLS 1.3.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use crate::args::{Load, Scenario};
use crate::fanout::{self, Fanout};
use crate::ours::{MESSAGE, all, ping_values};
use crate::peer::{Ready, Report};
use crate::raw::{client_tls, server_tls};

/// The first message of a client that wants its messages counted.
const COUNT: &str = "count";
/// That of a client which gets its messages back.
const ECHO: &str = "echo";
/// That of a member of the room. Any other first message is that of a client whose messages go to all members.
const JOIN: &str = "join";
/// Messages that may wait for a member.
const WAITING: usize = 64;

/// Serves until the process ends.
pub(crate) async fn serve(listen: SocketAddr) -> anyhow::Result<Ready> {
    let (tls, key) = server_tls(&[])?;
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind(listen).await?;
    let ready = Ready {
        address: listener.local_addr()?,
        key,
    };
    let (room, _) = broadcast::channel(WAITING);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, room) = (acceptor.clone(), room.clone());
            tokio::spawn(async move {
                // The client notices: it gets no answer.
                let _ = serve_one(tcp, acceptor, room).await;
            });
        }
    });
    Ok(ready)
}

async fn serve_one(
    tcp: TcpStream,
    acceptor: TlsAcceptor,
    room: broadcast::Sender<Bytes>,
) -> anyhow::Result<()> {
    tcp.set_nodelay(true)?;
    let tls: server::TlsStream<TcpStream> = acceptor.accept(tcp).await?;
    let mut socket = tokio_tungstenite::accept_async(tls).await?;
    let first = socket.next().await.context("no message")??;
    let first = first.to_text()?;
    if first == JOIN {
        let mut messages = room.subscribe();
        socket.send(Message::text(JOIN)).await?;
        loop {
            let data = messages.recv().await?;
            socket.send(Message::Binary(data)).await?;
        }
    }
    let (count, echo) = (first == COUNT, first == ECHO);
    let mut messages = 0_u64;
    while let Some(message) = socket.next().await {
        match message? {
            Message::Binary(data) if count => messages += u64::from(data.len() == MESSAGE),
            Message::Binary(data) if echo => socket.send(Message::Binary(data)).await?,
            Message::Binary(data) => drop(room.send(data)),
            Message::Text(_) => socket.send(Message::text(messages.to_string())).await?,
            Message::Close(_) => break,
            _ => {}
        }
    }
    Ok(())
}

type Socket = WebSocketStream<client::TlsStream<TcpStream>>;

async fn connect(ready: &Ready, connector: &TlsConnector) -> anyhow::Result<Socket> {
    let tcp = TcpStream::connect(ready.address).await?;
    tcp.set_nodelay(true)?;
    let tls = connector.connect("localhost".try_into()?, tcp).await?;
    let (socket, _) = tokio_tungstenite::client_async("wss://localhost/", tls).await?;
    Ok(socket)
}

/// Runs a scenario's client; messages are flushed after each `batch` of them.
pub(crate) async fn drive(
    scenario: Scenario,
    ready: &Ready,
    load: &Load,
    batch: u64,
) -> anyhow::Result<Report> {
    let connector = TlsConnector::from(Arc::new(client_tls(&ready.key, &[])?));
    let mut sockets = Vec::with_capacity(load.sockets);
    for _ in 0..load.sockets {
        sockets.push(connect(ready, &connector).await?);
    }
    match scenario {
        Scenario::Fanout => fanout(connect(ready, &connector).await?, sockets, load).await,
        Scenario::Messages => messages(sockets, load, batch).await,
        Scenario::Ping => ping(sockets, load).await,
        _ => bail!("WebSockets take no part in it"),
    }
}

async fn messages(sockets: Vec<Socket>, load: &Load, batch: u64) -> anyhow::Result<Report> {
    let each = load.count / load.sockets as u64;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for mut socket in sockets {
        tasks.spawn(async move {
            let data = Bytes::from(vec![0xa5; MESSAGE]);
            socket.send(Message::text(COUNT)).await?;
            for nth in 1..=each {
                socket.feed(Message::Binary(data.clone())).await?;
                if nth % batch == 0 {
                    socket.flush().await?;
                }
            }
            socket.send(Message::text("how many")).await?;
            let answer = socket.next().await.context("no answer")??;
            let messages: u64 = answer.to_text()?.parse()?;
            ensure!(messages == each, "{messages} messages of {each} arrived");
            Ok(())
        });
    }
    all(tasks).await?;
    let rate = load.count as f64 / begun.elapsed().as_secs_f64();
    Ok(Report::default().value("rate", rate))
}

async fn ping(sockets: Vec<Socket>, load: &Load) -> anyhow::Result<Report> {
    let each = load.count / load.sockets as u64;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for mut socket in sockets {
        tasks.spawn(async move {
            let data = Bytes::from(vec![0xa5; MESSAGE]);
            socket.send(Message::text(ECHO)).await?;
            let mut micros = Vec::with_capacity(each as usize);
            for _ in 0..each {
                let asked = Instant::now();
                socket.send(Message::Binary(data.clone())).await?;
                let reply = socket.next().await.context("no reply")??;
                micros.push(asked.elapsed().as_secs_f64() * 1e6);
                ensure!(reply.into_data() == data, "another reply than the request");
            }
            Ok(micros)
        });
    }
    let micros = all(tasks).await?.concat();
    Ok(ping_values(&micros, begun.elapsed()))
}

/// One client sends, all others are members of the room.
async fn fanout(
    mut publisher: Socket,
    sockets: Vec<Socket>,
    load: &Load,
) -> anyhow::Result<Report> {
    let run = Fanout::new(load);
    let mut tasks = JoinSet::new();
    for mut socket in sockets {
        socket.send(Message::text(JOIN)).await?;
        socket.next().await.context("no answer")??;
        let (run, load) = (run.clone(), load.clone());
        tasks.spawn(async move {
            let mut millis = Vec::new();
            for _ in 0..load.count {
                let message = socket.next().await.context("no message")??.into_data();
                let sent = message.first_chunk().context("a short message")?;
                millis.push(run.received(u64::from_be_bytes(*sent)));
            }
            Ok(millis)
        });
    }
    publisher.send(Message::text("publish")).await?;
    let begun = Instant::now();
    for _ in 0..load.count {
        let mut data = vec![0xa5; MESSAGE];
        let now = run.next().await?.to_be_bytes();
        data.iter_mut().zip(now).for_each(|(byte, now)| *byte = now);
        publisher.send(Message::Binary(data.into())).await?;
    }
    let millis = all(tasks).await?.concat();
    Ok(fanout::values(&millis, begun))
}
