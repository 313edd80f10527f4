//! tokio-tungstenite over TLS 1.3.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use crate::args::{Load, Scenario};
use crate::ours::{MESSAGE, all, ping_values};
use crate::peer::{Ready, Report};
use crate::raw::{client_tls, server_tls};

/// The first message of a client that wants its messages counted; all others get them back.
const COUNT: &str = "count";

/// Serves until the process ends.
pub(crate) async fn serve(listen: SocketAddr) -> anyhow::Result<Ready> {
    let (tls, key) = server_tls(&[])?;
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind(listen).await?;
    let ready = Ready {
        address: listener.local_addr()?,
        key,
    };
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // The client notices: it gets no answer.
                let _ = serve_one(tcp, acceptor).await;
            });
        }
    });
    Ok(ready)
}

async fn serve_one(tcp: TcpStream, acceptor: TlsAcceptor) -> anyhow::Result<()> {
    tcp.set_nodelay(true)?;
    let tls: server::TlsStream<TcpStream> = acceptor.accept(tcp).await?;
    let mut socket = tokio_tungstenite::accept_async(tls).await?;
    let first = socket.next().await.context("no message")??;
    let count = first.to_text()? == COUNT;
    let mut messages = 0_u64;
    while let Some(message) = socket.next().await {
        match message? {
            Message::Binary(data) if count => messages += u64::from(data.len() == MESSAGE),
            Message::Binary(data) => socket.send(Message::Binary(data)).await?,
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
            socket.send(Message::text("echo")).await?;
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
